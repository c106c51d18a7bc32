"""The repair of a store: what `fusestore.check` finds, as far as nothing is lost by it. Blocking.

Derived files are made again; what cannot be is moved into the quarantine (layout.py), never deleted: a
damaged blob, a container whose document is lost, what nobody knows. What is missing only an import can bring
back; so an image whose blob was set aside stays, and has that finding.

The rules a maintainer must not break: nothing is touched while anybody uses the store, and the store's lock
is held from before that is looked at until all is done. Each step is a change of its own that a crash may
follow: the next repair goes on from there.
"""

import contextlib
import fcntl
import os
import secrets
from collections.abc import Callable

from . import disk, oci
from .blobs import derive
from .check import Cure, Finding, examine
from .containers import Containers
from .durable import Workspace, lock_directory, read_file
from .errors import BadInput, Busy, StoreError
from .images import INDEX_MAX, Images
from .layerref import LayerRef
from .layout import OCI_LAYOUT_VERSION, Layout, RunLayout
from .scheme import RECORD
from .store import Store

__all__ = ["repair"]

_ROUNDS = 5
"""What is set aside in one shows what nothing needs any more in the next."""

_OF_WHAT_IS_THERE = frozenset([Cure.DERIVE, Cure.SET_ASIDE, Cure.SET_RECORD_ASIDE])


def repair(
    store: Store, said: Callable[[str], object], progress: Callable[[int, int], None] | None = None
) -> list[Finding]:
    """Repairs `store` and gives what is left to find. `said` gets one line for each thing done, when it is.

    Raises Busy, and has done nothing, while the store is mounted or a container is started or held.
    """
    layout = Layout(store.path)
    workspace = Workspace(tmp=layout.tmp, trash=layout.trash, lock=layout.lock)
    with workspace.lock():
        _require_unused(store, layout, workspace)
        bench = _Bench(store, layout, workspace, said)
        findings = examine(store, contextlib.nullcontext(), progress)
        try:
            for _ in range(_ROUNDS):
                if not [finding for finding in findings if bench.cure(finding)]:
                    break
                store.forget_images()
                findings = examine(store, contextlib.nullcontext(), progress)
        finally:
            bench.write_reasons()
    return findings


def _require_unused(store: Store, layout: Layout, workspace: Workspace) -> None:
    for record in store.mounts():
        raise Busy(f"{store.path} is mounted at {record.mountpoint}: unmount it, then repair")
    if workspace.is_in_use():
        raise Busy(f"another process is at work in {store.path}: wait for it, or end it, then repair")
    for container_id in store.container_ids():
        if store.is_started(container_id):
            raise Busy(f"container {container_id} is started: stop it, then repair")
        with contextlib.suppress(OSError):
            _lock_container(layout, container_id)()


def _lock_container(layout: Layout, container_id: str) -> Callable[[], None]:
    """Gives what unlocks it again. Raises Busy."""
    try:
        fd = lock_directory(layout.container(container_id), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Busy(f"container {container_id} is in use: end what uses it, then repair") from None
    return lambda: None if fd is None else os.close(fd)


class _Bench:
    """One repair, with the lock held."""

    def __init__(
        self, store: Store, layout: Layout, workspace: Workspace, said: Callable[[str], object]
    ) -> None:
        self._store = store
        self._layout = layout
        self._workspace = workspace
        self._said = said
        self._reasons: list[str] = []
        self._quarantine = f"{layout.quarantine}/{secrets.token_hex(8)}"
        self._images = Images(layout, workspace)
        self._containers = Containers(layout, RunLayout(store.run_path), workspace)
        self._done: set[tuple[str, Cure]] = set()
        self._cures: dict[Cure, Callable[[Finding], str]] = {
            Cure.DERIVE: self._derive,
            Cure.SET_ASIDE: self._set_aside,
            Cure.SET_CONTAINER_ASIDE: self._set_container_aside,
            Cure.SET_RECORD_ASIDE: self._set_record_aside,
            Cure.MAKE_DIRECTORY: self._make_directory,
            Cure.POINT_NAME: self._point_name,
            Cure.WRITE_OCI_LAYOUT: self._write_oci_layout,
            Cure.MAKE_INDEX: self._make_index,
        }

    def cure(self, finding: Finding) -> bool:
        """Whether something was done. Nothing is done twice: what does not help stays a finding."""
        key = finding.path, finding.cure
        if finding.cure not in self._cures or key in self._done:
            return False
        if finding.cure in _OF_WHAT_IS_THERE and not os.path.lexists(finding.path):
            return False  # set aside with its directory
        self._done.add(key)
        line = f"{finding.path}: {finding.problem}: {self._cures[finding.cure](finding)}"
        self._reasons.append(line)
        self._said(line)
        return True

    def write_reasons(self) -> None:
        if os.path.isdir(self._quarantine):
            text = "".join(f"{line}\n" for line in self._reasons)
            self._workspace.write_file(f"{self._quarantine}/reasons", os.fsencode(text))

    def _aside(self, path: str) -> str:
        """Where in the quarantine the thing at `path` goes."""
        target = f"{self._quarantine}/{os.path.relpath(path, self._layout.root)}"
        return f"{target}.{secrets.token_hex(4)}" if os.path.lexists(target) else target

    def _move(self, path: str) -> str:
        target = self._aside(path)
        self._workspace.set_aside(path, target)
        return f"moved to {target}"

    # The cures: each gives what it did.

    def _set_aside(self, finding: Finding) -> str:
        return self._move(finding.path)

    def _derive(self, finding: Finding) -> str:
        layout, path = self._layout, finding.path
        for layer in self._layers():
            if path not in (layout.layer_index(layer.diff_id), layout.seek_table(layer.diff_id, layer.blob)):
                continue
            try:
                made = derive(layout.blob(layer.blob), blob=layer.blob, diff_id=layer.diff_id)
            except StoreError:
                continue  # its blob is a finding itself
            moved = self._move(path)
            data = made.index if path == layout.layer_index(layer.diff_id) else made.seek
            self._workspace.write_file(path, data)
            return f"made again from the blob, the old one {moved}"
        return self._move(path)

    def _layers(self) -> list[LayerRef]:
        return [layer for image in self._store.images() for layer in image.layers]

    def _set_container_aside(self, finding: Finding) -> str:
        directory = os.path.dirname(finding.path)
        unlock = _lock_container(self._layout, os.path.basename(directory))
        try:
            return f"the container was {self._move(directory)}"
        finally:
            unlock()

    def _set_record_aside(self, finding: Finding) -> str:
        target = self._aside(f"{finding.path}.{RECORD.decode()}")
        value = os.getxattr(finding.path, RECORD, follow_symlinks=False)
        self._workspace.write_new(target, value)
        disk.current.remove_xattr(finding.path, RECORD, follow_symlinks=False)
        return f"moved to {target}; owner and mode are now those the file itself has"

    def _make_directory(self, finding: Finding) -> str:
        moved = ""
        if os.path.lexists(finding.path):
            moved = f", what was there {self._move(finding.path)}"
        self._workspace.make_directory(finding.path)
        return f"made, empty{moved}"

    def _point_name(self, finding: Finding) -> str:
        name = os.path.basename(finding.path)
        self._containers.repair_names({name: self._store.container_ids()})
        return "made again"

    def _write_oci_layout(self, finding: Finding) -> str:
        moved = f", the old one {self._move(finding.path)}" if os.path.lexists(finding.path) else ""
        self._workspace.write_file(finding.path, oci.encode({"imageLayoutVersion": OCI_LAYOUT_VERSION}))
        return f"written{moved}"

    def _make_index(self, finding: Finding) -> str:
        # A copy: were it gone for a moment, a crash then would cost the names in it.
        kept = ""
        with contextlib.suppress(OSError):
            data = read_file(finding.path, INDEX_MAX)
            target = self._aside(finding.path)
            self._workspace.write_new(target, data)
            kept = f", the old one is {target}"
        count, nameless = self._images.make_index_locked(self._names_in_documents())
        return f"made again with {count} images, {nameless} of them without a name{kept}"

    def _names_in_documents(self) -> dict[str, str]:
        found = {}
        for container_id in self._store.container_ids():
            with contextlib.suppress(StoreError, BadInput, OSError):
                container = self._store.container(container_id)
                if container.image_name and container.image_id:
                    found[container.image_name] = container.image_id
        return found
