"""A container becomes another: its changes copied, sharing blocks where the file system can. Blocking.

GNU cp copies diff/ as it lies on disk: whiteouts, opaque markers, redirects, owners, xattrs, hard links and
holes, to the file system's last bit. The clone is in its place whole, or not at all.

What was in the source at one instant is in the clone: if something changed while it was copied, there is no
clone.
"""

import os
import subprocess

from .drivers import snapshot
from .errors import Busy, StoreError
from .export import state_of
from .layout import Layout
from .store import ContainerInfo, Store

__all__ = ["clone"]

_COPY = ("cp", "-a", "--preserve=xattr", "--reflink=auto", "-T", "--")
"""Said again after -a, xattrs that cannot be copied are an error."""


def clone(store: Store, ref: str, new_id: str | None = None) -> ContainerInfo:
    """Another container, `new_id` or an id made at random, with the image, the rootfs, the label and the
    user's keys of `ref`. It is not started, its name is its id, and its workdir is empty.

    Takes as long as copying what was changed, or, with reflinks, as making its files. Raises NotFound,
    BadName, Exists; Busy if something in `ref` changes meanwhile; StoreError if it cannot be copied.
    """
    source_id = store.container_id(ref)
    with snapshot(store, source_id) as tree:
        before = state_of(tree)

        def copy_upper(source: str, target: str) -> None:
            if tree.opened.upper is not None:
                _copy(Layout.upper_in(source), Layout.upper_in(target))
            if before is None or state_of(tree) != before:
                raise Busy(f"container {source_id} is being written to: clone it when that has ended")

        return store.copy_container(source_id, new_id, copy_upper)


def _copy(source: str, target: str) -> None:
    """Raises StoreError with the first of what cp has to say."""
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    done = subprocess.run([*_COPY, source, target], env=environment, stderr=subprocess.PIPE, check=False)
    if done.returncode:
        said = os.fsdecode(done.stderr).strip().splitlines() or [f"it ended with {done.returncode}"]
        raise StoreError(f"{source} cannot be copied: {said[0].removeprefix('cp: ')}")
