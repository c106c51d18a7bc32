"""/containers: making, renaming, deleting containers, and the files in each container's directory. Blocking.

What an operation on a name in /containers or in /containers/<id> means (design.md section 2); the state of
one container's directory is `ContainerDir`'s. Whatever waits (locks, syncs) goes through steps. Around a
yield the world may change: what was looked at before one is looked at again after it.

Nothing but directories can be made in /containers, nothing but plain files next to a metadata.json (EPERM).
"""

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

from . import errors
from .containerdir import DOCUMENT, PARTS, ContainerDir, EmptyDir, Surroundings
from .documentfile import DocumentNode, DocumentReader, DocumentWriter
from .inodes import Caller, Changes, FileHandle, Inodes, Maybe, Node, Steps
from .metadata import parse_document
from .names import parse_container_id
from .nodes import Attr
from .scratchfile import ScratchFile, ScratchHandle
from .store import Store
from .synthetic import ANEW, MANY_LINKS, SHARED_S, FixedBranch, NameLink, Owner, RootfsDriver, Unreadable
from .syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE

__all__ = ["ContainerTree"]

_REFUSAL_S = 5.0
"""How long after a refused unlink of metadata.json an opendir by that thread is taken for the same rm -r."""


class _Root(Node):
    """/containers."""

    __slots__ = ()

    attr_timeout_s = SHARED_S


class _Anew(Node):
    """A directory whose '..' is /containers: see `ANEW`."""

    __slots__ = ()

    entry_timeout_s = 0.0


class ContainerTree(FixedBranch):
    """Touched by the event loop's thread only."""

    refusal = "containers/ holds directories only, and a container plain files: use its rootfs or workdir"

    def __init__(
        self,
        store: Store,
        inodes: Inodes,
        driver: RootfsDriver,
        owner: Owner,
        parent: Node,
        deleted: Callable[[], None],
    ) -> None:
        """`parent` is what '..' of /containers is; `deleted` is called when there is trash to empty."""
        self._store = store
        self._inodes = inodes
        self._owner = owner
        self._parent = parent
        self._deleted = deleted
        self._around = Surroundings(store, inodes, driver, owner)
        self._dirs: WeakValueDictionary[str, ContainerDir] = WeakValueDictionary()
        self._links: WeakValueDictionary[str, NameLink] = WeakValueDictionary()
        self._kept: dict[str, ContainerDir] = {}
        """Directories with state that the kernel has forgotten: scratch files, a removal half-way."""
        self._refused: dict[ContainerDir, tuple[int, float]] = {}
        """Who was refused to remove it (thread id), and until when that counts."""
        self._anew: set[str] = set()
        """What walkers are to ask for once more."""
        self.root = _Root(self, inodes.number())

    # Looking

    def attr(self, node: Node) -> Attr:
        if isinstance(node, (ContainerDir, EmptyDir)):
            return node.attr()
        if isinstance(node, DocumentNode):
            return self._owner.file(len(node.data or b""), node.mtime_ns, 0o644)
        if isinstance(node, ScratchFile):
            return node.attr
        status = os.stat(self._around.layout.containers)
        if isinstance(node, NameLink):
            return self._owner.link(node.target, status.st_mtime_ns)
        return self._owner.directory(status.st_mtime_ns, MANY_LINKS)

    def path(self, node: Node) -> bytes:
        return b"containers/" + node.id.encode() if isinstance(node, ContainerDir) else b""

    def live(self) -> tuple[int, int]:
        """How many containers were entered and not let go since, and in how many something is open."""
        known = list(self._dirs.values())
        return sum(one.is_entered for one in known), sum(one.is_in_use for one in known)

    def lookup(self, node: Node, name: bytes) -> Maybe[Node]:
        if isinstance(node, ContainerDir):
            return self._lookup_in(node, name)
        if node is not self.root:
            raise errors.NotFound(f"there is no {name!r}")
        text = os.fsdecode(name)
        if text in self._anew:
            self._anew.remove(text)
            return _Anew(self, self._inodes.number())
        try:
            parse_container_id(text)
        except errors.BadName:
            raise errors.NotFound(f"there is no container {text!r}") from None
        return self._container(text) or self._link(text)

    def before_lead_in(self, node: Node, name: bytes, pid: int) -> Maybe[None]:
        """See `Tree.before_lead_in`."""
        if name != b"rootfs" or not isinstance(node, ContainerDir) or self._around.driver.is_walker(pid):
            return None
        return node.before_enter()

    def lead_in(self, node: Node, name: bytes, pid: int) -> Maybe[None]:
        """See `Tree.lead_in`: who comes to a rootfs has it entered, unless it is this process."""
        if node is self.root:
            text = os.fsdecode(name)
            if not text.startswith(ANEW):
                return self._approach(text, pid)
            self._walk_anew(text, pid)
            return None
        if name != b"rootfs" or not isinstance(node, ContainerDir) or self._around.driver.is_walker(pid):
            return None
        if self._is_refused(node, pid):
            why = f"container {node.id} is in use: it cannot be removed now"
            # Any other errno has the kernel forget the name, and with it the mount (fs/fuse/dir.c).
            raise InterruptedError(errno.EINTR, why) if node.is_covered else errors.Busy(why)
        return node.enter_rootfs(pid)

    def _walk_anew(self, name: str, pid: int) -> None:
        if not self._around.driver.is_walker(pid):
            raise errors.NotFound(f"there is no container {name!r}")
        if name not in self._anew:
            self._anew.add(name)
            raise errors.Stale("walk again, and ask for everything")

    def _approach(self, container_id: str, pid: int) -> Maybe[None]:
        container = self._dirs.get(container_id)
        if container is None or container.is_unknown_to_kernel:
            if container is not None and pid in container.seekers:
                return container.make_known()
            self._around.driver.approached(container_id, pid)
        return None

    def _lookup_in(self, container: ContainerDir, name: bytes) -> Maybe[Node]:
        if name == DOCUMENT:
            return container.document()
        file = container.scratch.get(name)
        if file is not None:
            return file
        container.refresh()
        if name in PARTS:
            return container.part(name)
        raise errors.NotFound(f"there is no {name!r}")

    def _container(self, container_id: str) -> ContainerDir | None:
        """The directory of the container of this id, checked against the store; None if there is none."""
        known = self._dirs.get(container_id)
        if known is not None:
            try:
                known.check()
                return known
            except (errors.NotFound, errors.Stale):
                self._drop(known)
        made = self._new_dir(container_id)
        try:
            made.check()
        except errors.NotFound:
            return None
        self._dirs[container_id] = made
        return made

    def _new_dir(self, container_id: str) -> ContainerDir:
        return ContainerDir(self, self._inodes.number(), self._around, container_id)

    def _drop(self, container: ContainerDir) -> None:
        """It was deleted, perhaps behind us."""
        container.is_gone = True
        container.detach()
        self._kept.pop(container.id, None)
        if self._dirs.get(container.id) is container:
            del self._dirs[container.id]

    def _link(self, name: str) -> Node:
        container_id = self._store.container_id(name)
        if container_id != name:
            return self._link_to(name, container_id)
        made = self._container(name)  # just now: it was looked for before
        if made is None:
            raise errors.NotFound(f"there is no container {name!r}")
        return made

    def _link_to(self, name: str, container_id: str) -> NameLink:
        target = container_id.encode()
        known = self._links.get(name)
        if known is None or known.target != target:
            known = NameLink(self, self._inodes.number(), self.root, target)
            self._links[name] = known
        return known

    def parent(self, node: Node) -> Node:
        if isinstance(node, (EmptyDir, DocumentNode, ScratchFile)):
            return node.container
        return self._parent if node is self.root else self.root

    def readlink(self, node: Node) -> bytes:
        if not isinstance(node, NameLink):
            raise errors.BadInput("not a symbolic link")
        return node.target

    def heard(self, container_id: str) -> bool:
        """Another process changed this container, or it is gone.

        Whether its name must be kept: the kernel would unmount what is mounted below one that it forgets.
        """
        known = self._dirs.get(container_id)
        if known is None:
            return False
        with contextlib.suppress(errors.FusestoreError):
            known.check()
        return known.is_covered

    def abandon(self) -> None:
        """See `Tree.abandon`."""
        for container in list(self._dirs.values()):
            if container.is_covered:
                container.detach()

    def let_go(self, container_id: str) -> Steps[None]:
        """See `Tree.let_go`."""
        for container in list(self._dirs.values()):
            if container_id in ("", container.id):
                with contextlib.suppress(errors.Busy):
                    yield from container.leave()

    # Listing: one readdir of the store, no document read

    def listing(self, node: Node) -> Maybe[list[tuple[bytes, Any]]]:
        if node is self.root:
            ids = [(name.encode(), None) for name in self._store.container_ids()]
            links = [(name.encode(), target) for name, target in self._store.container_names().items()]
            return sorted(ids) + sorted(links)
        if isinstance(node, ContainerDir):
            node.refresh()
            return self._list_container(node)
        if isinstance(node, EmptyDir):
            node.attr()
            return []
        raise errors.NotADirectory("not a directory")

    def _list_container(self, container: ContainerDir) -> Steps[list[tuple[bytes, Any]]]:
        if not container.is_removing:
            with contextlib.suppress(OSError):
                yield from container.make_rundir()
        return [(name, None) for name in container.names()]

    def listed(self, node: Node, name: bytes, token: Any) -> Node | None:
        try:
            if isinstance(node, ContainerDir):
                return self._listed_in(node, name)
            if token is not None:
                return self._link_to(name.decode(), token)
            return self._listed_container(name.decode())
        except (errors.NotFound, errors.Stale):
            return None
        except (errors.FusestoreError, OSError):
            is_file = name == DOCUMENT
            return Unreadable(self._inodes.number(), stat.S_IFREG if is_file else stat.S_IFDIR)

    def _listed_in(self, container: ContainerDir, name: bytes) -> Node | None:
        if name == DOCUMENT:
            return container.document()
        return container.part_now(name) if name in PARTS else container.scratch.get(name)

    def _listed_container(self, container_id: str) -> ContainerDir:
        """As `_container`, with nothing checked: a lookup precedes any use of it."""
        known = self._dirs.get(container_id)
        if known is None:
            known = self._dirs[container_id] = self._new_dir(container_id)
        return known

    # Open files

    def open(self, node: Node, flags: int, caller: Caller) -> FileHandle:
        if isinstance(node, DocumentNode):
            return self._open_document(node, flags)
        if isinstance(node, ScratchFile):
            return ScratchHandle(node, flags)
        raise errors.IsADirectory("is a directory")

    def _open_document(self, node: DocumentNode, flags: int, is_new: bool = False) -> FileHandle:
        container = node.container
        assert isinstance(container, ContainerDir)
        if node.data is None:
            # Raises what is wrong with it; or it was put right meanwhile, and looking it up again finds it.
            self._store.document(container.id)
            raise errors.Stale("the document was replaced")
        if flags & os.O_ACCMODE == os.O_RDONLY and not flags & os.O_TRUNC:
            return DocumentReader(node, node.data)
        container.renew_document()
        return DocumentWriter(
            node,
            flags,
            node.data,
            lambda data: self._commit(container, data),
            f"container {container.id}",
            is_new,
        )

    def create(
        self, node: Node, name: bytes, mode: int, flags: int, caller: Caller
    ) -> tuple[Node, FileHandle]:
        if not isinstance(node, ContainerDir):
            self._refuse()
        node.refresh()
        if name in PARTS:
            raise errors.Exists(f"{name!r} is part of the container")
        if name == DOCUMENT:
            is_new = not node.shows_document
            if is_new:
                node.take_back()
            elif flags & os.O_EXCL:
                raise errors.Exists("metadata.json is there")
            document = node.document()
            return document, self._open_document(document, flags, is_new)
        file = node.scratch.get(name)
        if file is None:
            file = node.add_scratch(name, b"", mode & ~caller.umask, caller.uid, caller.gid)
        elif flags & os.O_EXCL:
            raise errors.Exists(f"{name!r} is there")
        return file, ScratchHandle(file, flags)

    def _commit(self, container: ContainerDir, data: bytes) -> Steps[None]:
        """`data`, one whole object, becomes the container's document."""
        container.refresh()
        binds = self._binds(container.id, data)
        if binds and container.is_entered:
            raise errors.Busy(f"container {container.id} was entered without an image: make another one")
        if container.is_covered and container.asks_more(parse_document(data)):
            yield from container.leave()
        yield lambda: self._store.set_container_metadata(container.id, data)
        if binds and container.is_entered and not container.is_in_use:
            # Someone entered while it was being bound, and sees no image yet.
            container.detach()
        container.refresh()

    def _binds(self, container_id: str, data: bytes) -> bool:
        """Whether `data` asks for an image, and the container has none."""
        document = parse_document(data)
        if not document.get("image-name") and not document.get("image-id"):
            return False
        return not self._store.container(container_id).image_id

    def setattr(self, node: Node, changes: Changes, caller: Caller) -> None:
        if isinstance(node, ScratchFile):
            node.change(changes)
        elif isinstance(node, DocumentNode):
            # A size of 0 by truncate(2), without an open file, is accepted: empty is no document, nothing was
            # written yet. Times are accepted and stay the store's: touch and cp -p set them.
            if changes.size not in (None, 0, len(node.data or b"")):
                raise errors.BadDocument("a document cannot be cut: write a whole one")
            self._require_unchanged(node, changes)
        elif isinstance(node, ContainerDir) and changes.mtime_ns is None and changes.atime_ns is None:
            self._require_unchanged(node, changes)
        else:
            self._refuse()

    def _require_unchanged(self, node: Node, changes: Changes) -> None:
        """Modes and owners are fixed. To set what is there, as ``mkdir -m 755`` does, is no change."""
        attr = self.attr(node)
        mode = None if changes.mode is None else stat.S_IMODE(changes.mode)
        if (
            mode not in (None, stat.S_IMODE(attr.mode))
            or changes.uid not in (None, attr.uid)
            or changes.gid not in (None, attr.gid)
        ):
            raise errors.NotPermitted("mode and owner of a container and its metadata.json are fixed")

    # Making, renaming, deleting containers

    def mkdir(self, node: Node, name: bytes, mode: int, caller: Caller) -> Steps[Node]:
        if node is not self.root:
            self._refuse()
        container_id = parse_container_id(os.fsdecode(name))
        return self._make(container_id)

    def _make(self, container_id: str) -> Steps[Node]:
        yield lambda: self._store.create_container(container_id=container_id)
        made = self._container(container_id)
        if made is None:
            raise errors.NotFound(f"container {container_id} was deleted as soon as it was made")
        self._around.driver.approached(container_id, 0)
        return made

    def rmdir(self, node: Node, name: bytes) -> Maybe[None]:
        if isinstance(node, ContainerDir):
            if name not in PARTS:
                raise errors.NotADirectory(f"{name!r} is no directory")
            node.remove_part(name)
            return None
        if node is not self.root:
            raise errors.NotFound(f"there is no {name!r}")
        container = self._container(os.fsdecode(name))
        if container is None:
            self.lookup(node, name)
            raise errors.NotADirectory(f"{name!r} is a name: rm it, or rmdir the container")
        return self._delete(container)

    def _delete(self, container: ContainerDir) -> Steps[None]:
        yield from container.leave()
        container.require_idle("delete")
        container.detach()
        container.is_leaving = True
        try:
            yield lambda: self._store.delete_container(container.id)
        finally:
            container.is_leaving = False
        self._drop(container)
        self._deleted()

    def unlink(self, node: Node, name: bytes) -> Maybe[None]:
        if isinstance(node, ContainerDir):
            if name in PARTS:
                raise errors.IsADirectory(f"{name!r} is a directory")
            if name != DOCUMENT:
                node.unlink_scratch(name)
            elif node.shows_document:
                node.declare_removal()
            else:
                raise errors.NotFound("metadata.json was removed")
            return None
        found = self.lookup(node, name)
        if not isinstance(found, NameLink):
            raise errors.IsADirectory(f"{name!r} is a container: rmdir it")
        # The container's name goes back to its id.
        return self._rename_name(os.fsdecode(name), found.target.decode())

    def rename(self, node: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int) -> Maybe[None]:
        if flags & RENAME_EXCHANGE:
            raise errors.BadInput("RENAME_EXCHANGE works inside a rootfs only")
        if isinstance(node, ContainerDir) and new_parent is not node:
            raise errors.CrossDevice("files next to a metadata.json stay there: copy them")
        if isinstance(node, ContainerDir):
            return self._rename_in(node, name, new_name, bool(flags & RENAME_NOREPLACE))
        if node is not self.root or new_parent is not self.root:
            self._refuse()
        found = self.lookup(node, name)
        new_id = parse_container_id(os.fsdecode(new_name))
        if isinstance(found, ContainerDir):
            return self._rename_container(found, new_id)
        return self._rename_name(os.fsdecode(name), new_id)

    def _rename_name(self, old: str, new: str) -> Steps[None]:
        yield lambda: self._store.rename_container(old, new)

    def _rename_container(self, container: ContainerDir, new_id: str) -> Steps[None]:
        yield from container.leave()
        container.require_idle("rename")
        container.detach_doorway()
        old_id = container.id
        has_rundir = container.has_rundir

        def rename() -> str | None:
            self._store.rename_container(old_id, new_id)
            with contextlib.suppress(OSError):
                return os.fspath(self._store.run_dir(new_id)) if has_rundir else None
            return None

        container.is_leaving = True
        try:
            rundir = yield rename
        finally:
            container.is_leaving = False
        # The kernel moves its name along with this node.
        self._dirs.pop(old_id, None)
        container.renamed(new_id, rundir)
        self._dirs[new_id] = container
        if self._kept.pop(old_id, None) is not None:
            self._kept[new_id] = container

    # rm -r of a container in use

    def unlink_for(self, node: Node, name: bytes, caller: Caller) -> Maybe[None]:
        """As `unlink`, and remembers whom it refused because the container is in use."""
        if isinstance(node, ContainerDir) and node.is_entered and name in (DOCUMENT, node.aside):
            return self._leave_and_unlink(node, name, caller)
        return self._unlink_for(node, name, caller)

    def _leave_and_unlink(self, container: ContainerDir, name: bytes, caller: Caller) -> Steps[None]:
        try:
            yield from container.leave()
        except errors.Busy:
            until = self._refuse_removal(container, caller)
            yield from container.be_asked(until)
            raise
        self._unlink_for(container, name, caller)

    def _unlink_for(self, node: Node, name: bytes, caller: Caller) -> Maybe[None]:
        try:
            return self.unlink(node, name)
        except errors.Busy:
            if isinstance(node, ContainerDir):
                self._refuse_removal(node, caller)
            raise

    def _refuse_removal(self, container: ContainerDir, caller: Caller) -> float:
        """Until when it counts."""
        until = time.monotonic() + _REFUSAL_S
        self._refused[container] = caller.pid, until
        return until

    def require_welcome(self, node: Node, caller: Caller) -> None:
        """Raises Busy for the root of a part whose removal was refused to the same caller just now.

        After an error ``rm -r`` goes on with the next name: it would empty the rootfs of a running container.
        """
        if not self._refused:
            return
        for container in list(self._refused):
            if self._is_refused(container, caller.pid) and container.has_root(node):
                raise errors.Busy(f"container {container.id} is in use: it cannot be removed now")

    def _is_refused(self, container: ContainerDir, pid: int) -> bool:
        refused, until = self._refused.get(container, (0, 0.0))
        if until < time.monotonic():
            self._refused.pop(container, None)
            return False
        return pid == refused

    # Renaming next to a metadata.json

    def _rename_in(
        self, container: ContainerDir, name: bytes, new_name: bytes, keep_target: bool
    ) -> Maybe[None]:
        if name in PARTS:
            self._refuse()
        if new_name in PARTS:
            raise errors.IsADirectory(f"{new_name!r} is a directory")
        source = container.document() if name == DOCUMENT else container.scratch.get(name)
        if source is None:
            raise errors.NotFound(f"there is no {name!r}")
        is_there = container.shows_document if new_name == DOCUMENT else new_name in container.scratch
        if is_there and keep_target:
            raise errors.Exists(f"{new_name!r} is there")
        if name == new_name:
            return None
        if isinstance(source, ScratchFile) and new_name == DOCUMENT:
            return self._move_to_document(container, name, source)
        if name == DOCUMENT:
            container.put_aside(new_name)
        else:
            container.rename_scratch(name, new_name)
        return None

    def _move_to_document(self, container: ContainerDir, name: bytes, file: ScratchFile) -> Steps[None]:
        data = bytes(file.data)
        parse_document(data)
        yield from self._commit(container, data)
        if container.scratch.get(name) is file:
            del container.scratch[name]
        container.take_back()

    # What the kernel lets go

    def forgotten(self, node: Node) -> bool:
        if not isinstance(node, ContainerDir) or node.is_gone:
            return False
        if node.has_state:
            self._kept[node.id] = node
        else:
            self._kept.pop(node.id, None)
            node.detach()
        return False
