"""Containers on disk: their directories, documents, names, and the locks that guard them. Blocking.

Every method costs the same however many containers there are, and however large they or their images are;
only `ids` and `names` read a directory. What a container's image is, `fusestore.store` says: this module only
keeps it.

The rule a maintainer must not break: methods with `_locked` in their names are called with the workspace's
lock held. Where several renames make one change, an intent is written first (layout.py), and `repair_names`
can finish or undo it.
"""

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from .durable import Workspace, discard, empty_trash, is_damage, lock_directory, read_file
from .errors import BadDocument, BadName, Busy, Exists, Locked, NotFound, StoreDamaged
from .layout import Layout, RunLayout
from .lostmount import is_lost, require_alone
from .metadata import DOCUMENT_MAX, Document, merge, parse_document, render
from .names import is_hex_id, parse_container_id

__all__ = ["Bindings", "Container", "Containers", "Draft", "Hold"]

_RELEASE_S = 0.1
_PREFIX = re.compile(r"[0-9a-f]{12,63}")
"""An id made at random, shortened."""

_STORED_MAX = 2 * DOCUMENT_MAX
"""Bytes of a stored document, at most: it is limited as shown."""


Bindings = dict[str, tuple[tuple[int, ...], str]]
"""Of containers, by id: a version of the document, and the id of the image in it."""


@dataclass(frozen=True, slots=True)
class Container:
    """What is known of a container, at one moment."""

    id: str
    name: str
    """The id, where none was given."""
    image_name: str
    """As it was called when the container was made; "" while unbound or if the image has no name."""
    image_id: str
    """64 hex digits; "" while unbound."""
    created_at: int
    """Unix seconds."""
    mountlabel: str
    mounted: bool


@dataclass(frozen=True, slots=True)
class Draft:
    """A container to be made. Ids, names and the document are checked already."""

    id: str
    document: Document
    """As it is stored, but for `created-at`, which is when it is made."""
    fill: Callable[[str], None] = lambda directory: None
    """Puts more into its directory before anybody sees it; what it raises, `create` raises."""


class Hold:
    """Keeps a container from being deleted, renamed or bound, by anyone. `close()` lets go; idempotent."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "Hold":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Containers:
    """The containers of one store. Thread-safe: all state is on disk, and changed under the workspace's
    lock."""

    def __init__(self, layout: Layout, run: RunLayout, workspace: Workspace) -> None:
        self._layout = layout
        self._run = run
        self._workspace = workspace

    # Reading

    def ids(self) -> list[str]:
        """In no order."""
        return os.listdir(self._layout.containers)

    def names(self) -> dict[str, str]:
        """name → id, of the containers whose name is not their id."""
        ids = set(self.ids())
        found = {}
        for name in os.listdir(self._layout.names):
            target = self._link_target(name)
            if target in ids and name not in ids:
                found[name] = target
        return found

    def resolve(self, ref: str) -> str:
        """The id of the container called `ref`: its id, its name, or the first 12 or more digits of an
        id made at random. Raises NotFound.
        """
        container_id = self._find(ref)
        if container_id is None and _PREFIX.fullmatch(str(ref)):
            found = [one for one in self.ids() if one.startswith(ref) and is_hex_id(one)]
            if len(found) > 1:
                raise NotFound(f"{ref} stands for {len(found)} containers: give more digits of the id")
            container_id = next(iter(found), None)
        if container_id is None:
            raise NotFound(f"there is no container {ref!r}: `fusestore containers` lists them")
        return container_id

    def get(self, ref: str) -> Container:
        container_id = self.resolve(ref)
        stored = self._stored(container_id)
        return Container(
            id=container_id,
            name=stored.get("name", container_id),
            image_name=stored["image-name"],
            image_id=stored["image-id"],
            created_at=stored["created-at"],
            mountlabel=stored.get("mountlabel", ""),
            mounted=self.is_mounted(container_id),
        )

    def is_mounted(self, container_id: str) -> bool:
        """Whether the container is started; also of one whose document cannot be read."""
        return os.path.lexists(self._run.mounted(container_id))

    def document(self, container_id: str) -> bytes:
        """metadata.json. Raises NotFound, StoreDamaged."""
        return render(self._stored(container_id), container_id, mounted=self.is_mounted(container_id))

    def version(self, container_id: str) -> tuple[int, ...]:
        """Another value whenever `document` may give another one, or the container is another. Two stats."""
        try:
            found = os.stat(self._layout.document(container_id), follow_symlinks=False)
        except FileNotFoundError:
            raise self._missing(container_id) from None
        return found.st_ino, found.st_mtime_ns, found.st_size, self.is_mounted(container_id)

    def uses_image(self, image_id: str, known: Bindings) -> str | None:
        """The id of a container of this image, if there is one. Reads every document that `known` has not.

        One that cannot be read might be the image's: it counts as using it.
        """
        for container_id in self.ids():
            try:
                version = self.version(container_id)
                if container_id not in known or known[container_id][0] != version:
                    known[container_id] = version, self._stored(container_id)["image-id"]
            except NotFound:
                continue
            except StoreDamaged:
                return container_id
            if known[container_id][1] == image_id:
                return container_id
        return None

    def _find(self, ref: str) -> str | None:
        try:
            parse_container_id(ref)
        except (BadName, TypeError):
            return None
        if self._exists(ref):
            return ref
        target = self._link_target(ref)
        return target if target is not None and self._exists(target) else None

    def _exists(self, container_id: str) -> bool:
        return os.path.lexists(self._layout.container(container_id))

    def _link_target(self, name: str) -> str | None:
        try:
            target = os.readlink(self._layout.name(name))
        except OSError:
            return None
        container_id = os.path.basename(target)
        return container_id if target == self._layout.name_target(container_id) else None

    def _stored(self, container_id: str) -> Document:
        path = self._layout.document(container_id)
        try:
            stored = parse_document(read_file(path, _STORED_MAX))
        except FileNotFoundError:
            raise self._missing(container_id) from None
        except BadDocument as error:
            raise self._damaged(container_id, str(error)) from error
        except OSError as error:
            if is_damage(error):
                raise self._damaged(container_id, str(error.strerror)) from error
            raise
        defaults = {"name": "", "mountlabel": ""}
        strings = [
            stored.get(key, defaults.get(key)) for key in ("image-name", "image-id", "name", "mountlabel")
        ]
        if not all(isinstance(value, str) for value in strings) or not isinstance(
            stored.get("created-at"), int
        ):
            raise self._damaged(container_id, "keys are missing or of a wrong type")
        return stored

    def _missing(self, container_id: str) -> NotFound | StoreDamaged:
        if self._exists(container_id):
            return self._damaged(container_id, "the file is missing")
        return NotFound(f"there is no container {container_id!r}")

    def _damaged(self, container_id: str, what: str) -> StoreDamaged:
        path = self._layout.document(container_id)
        return StoreDamaged(
            f"{path} is damaged ({what}): save what you need from diff/ beside it, then delete it"
        )

    def draft_like(self, container_id: str, new_id: str) -> Draft:
        """Another container with this one's document: it has neither its name nor what is in it."""
        document = self._stored(container_id)
        document.pop("name", None)
        return Draft(new_id, document)

    # Locks

    def hold(self, ref: str) -> Hold:
        """Waits for nobody. Raises NotFound, Locked."""
        container_id = self.resolve(ref)
        try:
            fd = lock_directory(self._layout.container(container_id), fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Locked(f"container {container_id} is being changed by another process: try again") from None
        if fd is None:
            raise NotFound(f"there is no container {ref!r}: it was deleted just now")
        return Hold(fd)

    def is_held(self, container_id: str) -> bool:
        """Whether anybody holds it now, or is in a lost mount of it. One that is gone nobody holds."""
        try:
            fd = lock_directory(self._layout.container(container_id), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        if fd is None:
            return False
        os.close(fd)
        return is_lost(self._layout.upper(container_id), self._layout.work(container_id))

    @contextlib.contextmanager
    def _exclusive(self, container_id: str, what: str) -> Iterator[None]:
        """Nobody else holds the container or is in a lost mount of it, and it is not started; else Busy."""
        if self.is_mounted(container_id):
            raise Busy(f"container {container_id} is started: stop it before you {what} it")
        fd = self._lock_exclusively(container_id, what)
        if fd is None:
            raise NotFound(f"there is no container {container_id!r}")
        try:
            require_alone(container_id, self._layout.upper(container_id), self._layout.work(container_id))
            yield
        finally:
            os.close(fd)

    def _lock_exclusively(self, container_id: str, what: str) -> int | None:
        """Waits a moment: a mount hears of close(2) only after that has returned (FUSE_RELEASE)."""
        deadline = time.monotonic() + _RELEASE_S
        while True:
            try:
                return lock_directory(self._layout.container(container_id), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Busy(
                        f"container {container_id} is in use: leave its rootfs before you {what} it"
                    ) from None
            time.sleep(_RELEASE_S / 20)

    # Changing

    def create(self, draft: Draft, confirm_image: Callable[[], None]) -> str:
        """Makes the container: after this it is on disk whole; after any error or crash it is not there.

        Gives its directory below the run directory, which is made before: others may delete it at once.

        `confirm_image` is called with the lock held and raises if the image is gone. Raises Exists.
        """
        layout = self._layout
        name = draft.document.get("name", draft.id)
        document = {**draft.document, "created-at": int(time.time())}
        with self._workspace.scratch() as scratch:
            scratch.mkdir("container")
            scratch.mkdir(layout.work_in("container"))
            scratch.mkdir(layout.workdir_in("container"))
            scratch.write(layout.document_in("container"), _encode(document))
            draft.fill(scratch.join("container"))
            scratch.sync("container")
            with self._workspace.lock(), contextlib.ExitStack() as stack:
                confirm_image()
                self._require_free_locked(draft.id)
                self._require_free_locked(name)
                self._discard_run_locked(draft.id)
                on_error = stack.enter_context(contextlib.ExitStack())
                on_error.callback(self._discard_run_locked, draft.id)
                run_dir = self._make_rundir_locked(draft.id)
                if name != draft.id:
                    stack.enter_context(self._renaming({name: [draft.id]}))
                    self._point_name(name, draft.id)
                self._workspace.publish((scratch.join("container"), layout.container(draft.id)))
                on_error.pop_all()
        return run_dir

    def delete(self, ref: str) -> str:
        """Takes the container away, with all that is in it, in one step; its id. Raises NotFound, Busy."""
        with self._workspace.lock(), contextlib.ExitStack() as stack:
            container_id = self.resolve(ref)
            stack.enter_context(self._exclusive(container_id, "delete"))
            names = self._names_of(container_id)
            if names:
                stack.enter_context(self._renaming({name: [container_id] for name in names}))
            self._workspace.discard(self._layout.container(container_id))
            for name in names:
                self._workspace.unlink(self._layout.name(name))
            self._discard_run_locked(container_id)
        return container_id

    def rename(self, old: str, new: str) -> None:
        """`mv containers/<old> containers/<new>`: an id gets another id, a name another name.

        Raises NotFound, BadName, Exists, Busy.
        """
        parse_container_id(new)
        with self._workspace.lock():
            container_id = self.resolve(old)
            if old == new:
                return
            with self._exclusive(container_id, "rename"):
                if old == container_id:
                    self._require_free_locked(new)
                    self._change_id_locked(container_id, new)
                else:
                    self._require_free_locked(new, own_id=container_id)
                    self._change_name_locked(container_id, self._stored(container_id), new)

    def apply_locked(
        self, container_id: str, document: Document, bind: Callable[[str | None, str | None], tuple[str, str]]
    ) -> None:
        """Writes `document` over the container's: all of it or, with any error, nothing.

        `bind(image_name, image_id)` gives name and id of the image asked for, or raises. Raises what
        `metadata.merge` does; Exists for a taken name; Busy for a name while started, and for binding what is
        in use or was written to.
        """
        old = self._stored(container_id)
        change = merge(old, document, container_id)
        new = change.document
        with contextlib.ExitStack() as stack:
            if change.image_name is not None or change.image_id is not None:
                stack.enter_context(self._exclusive(container_id, "bind"))
                self._require_unwritten(container_id)
                new["image-name"], new["image-id"] = bind(change.image_name, change.image_id)
            if change.name is not None:
                if self.is_mounted(container_id):
                    raise Busy(f"container {container_id} is started: stop it before you rename it")
                self._require_free_locked(change.name, own_id=container_id)
            if len(render(new, container_id, mounted=True)) > DOCUMENT_MAX:
                raise BadDocument(
                    f"the document as shown would have over {DOCUMENT_MAX} bytes: make it smaller"
                )
            if change.name is not None:
                self._change_name_locked(container_id, new, change.name)
            elif json.dumps(new) != json.dumps(old):
                self._workspace.write_file(self._layout.document(container_id), _encode(new))
            if change.mounted is not None:
                self.set_mounted_locked(container_id, change.mounted)

    def set_mounted_locked(self, container_id: str, mounted: bool) -> None:
        """Pins the container, or releases it."""
        path = self._run.mounted(container_id)
        if mounted:
            self._make_run(container_id)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def make_rundir(self, container_id: str) -> str:
        """The container's directory below the run directory, made if it is not there. Raises NotFound."""
        with self._workspace.lock():
            if not self._exists(container_id):
                raise NotFound(f"there is no container {container_id!r}")
            return self._make_rundir_locked(container_id)

    def empty_run_trash(self) -> None:
        empty_trash(self._run.trash)

    def repair_names(self, suspects: Mapping[str, Sequence[str]]) -> None:
        """Makes each name point to that of the containers which carries it, or go. With the lock held."""
        for name, candidates in suspects.items():
            carriers = [found for found in candidates if self._documented_name(found) == name]
            if carriers:
                self._point_name(name, carriers[0])
            elif self._link_target(name) in candidates:
                self._workspace.unlink(self._layout.name(name))

    # Parts of changes

    def _renaming(self, suspects: Mapping[str, Sequence[str]]) -> AbstractContextManager[None]:
        """Around several renames: whatever ends them, an error or a crash, the names will be right."""
        return self._workspace.intent({"names": suspects}, lambda: self.repair_names(suspects))

    def _documented_name(self, container_id: str) -> str | None:
        try:
            name: str | None = self._stored(container_id).get("name")
        except (NotFound, StoreDamaged):
            return None
        return name

    def _names_of(self, container_id: str) -> list[str]:
        """The names to be removed with a container; if its document cannot be read all that point to it."""
        try:
            name = self._stored(container_id).get("name")
        except (StoreDamaged, OSError):
            return [name for name, target in self.names().items() if target == container_id]
        return [] if name is None else [name]

    def _require_free_locked(self, name: str, own_id: str | None = None) -> None:
        """Ids and names are one space. `own_id`: the container that may take its own id as its name."""
        taken_by = self._find(name)
        if taken_by is not None and not (taken_by == own_id and name == own_id):
            raise Exists(f"the name {name!r} is taken by container {taken_by}: choose another")

    def _require_unwritten(self, container_id: str) -> None:
        if os.path.exists(self._layout.upper(container_id)):
            raise Busy(f"container {container_id} was entered before it had an image: make another one")

    def _change_id_locked(self, old_id: str, new_id: str) -> None:
        name = self._stored(old_id).get("name")
        with contextlib.ExitStack() as stack:
            if name is not None:
                stack.enter_context(self._renaming({name: [old_id, new_id]}))
            self._discard_run_locked(new_id)
            self._workspace.publish((self._layout.container(old_id), self._layout.container(new_id)))
            if name is not None:
                self._point_name(name, new_id)
            with contextlib.suppress(FileNotFoundError):
                os.rename(self._run.container(old_id), self._run.container(new_id))

    def _change_name_locked(self, container_id: str, document: Document, new: str) -> None:
        """Stores `document` with another name. It is the truth: it changes between the two links."""
        old = document.get("name")
        changed = {key: value for key, value in document.items() if key != "name"}
        with self._renaming({name: [container_id] for name in (old, new) if name is not None}):
            if new != container_id:
                changed["name"] = new
                self._point_name(new, container_id)
            self._workspace.write_file(self._layout.document(container_id), _encode(changed))
            if old is not None:
                self._workspace.unlink(self._layout.name(old))

    def _point_name(self, name: str, container_id: str) -> None:
        with self._workspace.scratch() as scratch:
            scratch.symlink("name", self._layout.name_target(container_id))
            self._workspace.publish((scratch.join("name"), self._layout.name(name)))

    def _make_rundir_locked(self, container_id: str) -> str:
        path = self._run.rundir(container_id)
        self._make_run(container_id)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        return path

    def _make_run(self, container_id: str) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkdir(self._run.container(container_id), 0o700)

    def _discard_run_locked(self, container_id: str) -> None:
        discard([self._run.container(container_id)], self._run.trash)


def _encode(document: Document) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode() + b"\n"
