"""What the mountpoint shows and what each operation there means, by inode number. Blocking.

`Tree` is all that the FUSE layer calls. It finds the node, has its branch (the root, the images, the
containers, one rootfs …) do the work, and keeps the kernel's lookup counts and handles. Each method returns
its result, or steps that lead to it (`fusestore.inodes.Steps`); it raises FusestoreError or OSError.

Counts: what `lookup`, `mknod`, `mkdir`, `symlink`, `link`, `create` and, for each entry taken, `readdir`
return is counted as one lookup of the kernel's; `getattr` and `setattr` count nothing. A new method that
hands a node to the kernel must go through `_entered`.

This is the hot path: an operation on a branch that is ready is one plain call, no generator is made for it.
"""

import os
import time
from collections.abc import Callable, Iterable
from types import GeneratorType
from typing import Any, NamedTuple, TypeVar, cast

from . import errors
from .containertree import ContainerTree
from .imagetree import ImageTree
from .inodes import (
    ROOT_INODE,
    Branch,
    Caller,
    Changes,
    DirHandle,
    FileHandle,
    Handles,
    Inodes,
    Maybe,
    Node,
    Steps,
    run,
)
from .mounts import Changed
from .names import FILE_NAME_MAX
from .nodes import Attr, Inode, Xattrs
from .ociview import OciView
from .podmanview import PodmanView
from .store import Store
from .synthetic import FixedBranch, Owner, RootfsDriver
from .syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE

__all__ = ["Entry", "Tree"]

T = TypeVar("T")

_ROOT_REFUSAL = "only images/, containers/ and views/ are here: make a container in containers/"
_VIEWS_REFUSAL = "views/ shows the store as other programs want it: there is no other view"


class Entry(NamedTuple):
    """What the kernel is told of a node. How long it may believe it says the node's class."""

    node: Node
    attr: Attr
    is_guess: bool = False
    """`attr` could not be had: the kernel must not believe it at all."""


class Tree:
    """The whole mounted tree of one store.

    Touched by one thread only; what waits goes through steps. Closing the store is the caller's business.
    """

    def __init__(
        self,
        store: Store,
        make_driver: Callable[[Store, Inodes], RootfsDriver],
        owner: Owner,
        deleted: Callable[[], None],
    ) -> None:
        """`owner` is whose the made-up objects are; `deleted` is called when there is trash to empty."""
        self.inodes = Inodes()
        self.handles = Handles()
        self._driver = driver = make_driver(store, self.inodes)
        branch = _FixedDirectory(store, owner, ROOT_INODE, None, _ROOT_REFUSAL)
        self.root = branch.root
        self._images = ImageTree(store, self.inodes, driver, owner, self.root)
        self._containers = ContainerTree(store, self.inodes, driver, owner, self.root, deleted)
        views = _FixedDirectory(store, owner, self.inodes.number(), self.root, _VIEWS_REFUSAL)
        views.children = {
            b"oci": OciView(store, self.inodes, owner, views.root).root,
            b"podman": PodmanView(store, self.inodes, driver, owner, views.root).root,
        }
        branch.children = {
            b"images": self._images.root,
            b"containers": self._containers.root,
            b"views": views.root,
        }
        for node in (self.root, *branch.children.values(), *views.children.values()):
            # Held for ever: the kernel's counts come on top of this one.
            self.inodes.remember(node)
        self._held = self.inodes.lookups

    # Names

    def before_lead_in(self, parent_ino: int, name: bytes, pid: int) -> Maybe[None]:
        """Precedes `lead_in`: what may take long."""
        node = self._leading(parent_ino, name)
        return None if node is None else self._containers.before_lead_in(node, name, pid)

    def lead_in(self, parent_ino: int, name: bytes, pid: int) -> Maybe[None]:
        """Precedes a `lookup` by the thread `pid`, who should not pass before it is done, if that is soon."""
        node = self._leading(parent_ino, name)
        return None if node is None else self._containers.lead_in(node, name, pid)

    def _leading(self, parent_ino: int, name: bytes) -> Node | None:
        """The directory where `name` may lead into a container; None for '.': see `_recalled`."""
        if name == b".":
            return None
        node = self.inodes.node(parent_ino)
        return node if node.branch is self._containers else None

    def lookup(self, parent_ino: int, name: bytes) -> Maybe[Entry]:
        if name == b".":
            return self._recalled(parent_ino)
        node = self._place(parent_ino, name)
        branch = node.branch
        if not branch.ready:
            return _prepared(branch, self.lookup, parent_ino, name)
        if name == b"..":
            return self._entered(branch.parent(node))
        return self._entered(branch.lookup(node, name))

    def _recalled(self, ino: int) -> Maybe[Entry]:
        """What a file handle leads to: the kernel looks '.' up where it does not know the inode any more."""
        node = self.inodes.recalled(ino)
        if not node.branch.ready:
            return _prepared(node.branch, self._recalled, ino)
        if not node.lookups:
            node.branch.recall(node)
        return self._entered(node)

    def absence_timeout_s(self, parent_ino: int) -> float:
        """How long the kernel may believe that a name `lookup` did not find is missing there."""
        return self.inodes.node(parent_ino).branch.absence_timeout_s

    def path(self, ino: int) -> bytes:
        """For people: where that inode is, as far as that is at hand. Any thread. Raises Stale."""
        node = self.inodes.node(ino)
        return node.branch.path(node)

    def live_containers(self) -> tuple[int, int]:
        """How many containers somebody was in, and in how many something is open."""
        return self._containers.live()

    def heard(self, changed: Changed) -> tuple[int, bytes] | None:
        """Another process changed something in the store: directory and name that the kernel must forget."""
        name = changed.name.encode()
        if changed.place == "containers":
            keeps = self._containers.heard(changed.name)
            return None if keeps else (self._containers.root.ino, name)
        if changed.place == "images":
            return self._images.root.ino, name
        return None

    def abandon(self) -> None:
        """The mount point is gone: hold nothing for those who are still inside."""
        self._containers.abandon()

    def let_go(self, container_id: str) -> Maybe[None]:
        """Unmount the rootfs of a container, or of all for "", where nobody is in it."""
        return self._containers.let_go(container_id)

    def rest(self) -> None:
        """No request is being answered: whoever else runs now may find containers idle."""
        self._driver.rest()

    def forget(self, counts: Iterable[tuple[int, int]]) -> list[int]:
        """`counts`: inode number, and by how much the kernel's count sinks.

        What the kernel was not told of so often is returned; there should be none.
        """
        return [ino for ino, count in counts if not self.inodes.forget(ino, count)]

    @property
    def lookups(self) -> int:
        """The sum of the kernel's counts; 0 when it has forgotten all but the root."""
        return self.inodes.lookups - self._held

    def readlink(self, ino: int) -> Maybe[bytes]:
        node = self.inodes.node(ino)
        if not node.branch.ready:
            return _prepared(node.branch, self.readlink, ino)
        return node.branch.readlink(node)

    # Attributes

    def getattr(self, ino: int, pid: int = 0) -> Maybe[Entry]:
        """`pid`: the thread that asks; 0 if it is none of this machine's."""
        node = self.inodes.node(ino)
        if node.branch.ready:
            return Entry(node, node.branch.attr(node))
        return self._peeked_for(node, pid)

    def setattr(self, ino: int, changes: Changes, fh: int | None, caller: Caller) -> Maybe[Entry]:
        """A size goes to the handle, where the kernel names one: it may change what the mode forbids."""
        node = self.inodes.node(ino)
        branch = node.branch
        if not branch.ready:
            return _prepared(branch, self.setattr, ino, changes, fh, caller)
        if fh is not None and changes.size is not None:
            return self._truncated(node, changes, self.handles.file(fh), caller)
        done = branch.setattr(node, changes, caller)
        return self._shown(node) if done is None else self._changed(node, done)

    def getxattr(self, ino: int, name: bytes) -> Maybe[bytes]:
        node = self.inodes.node(ino)
        if not node.branch.ready:
            return self._peeked_xattr(node, name)
        return node.branch.xattr(node, name)

    def listxattr(self, ino: int) -> Maybe[list[bytes]]:
        node = self.inodes.node(ino)
        if not node.branch.ready:
            return self._xattr_names(node.branch.peek_xattrs(node))
        xattrs = node.branch.xattrs(node)
        if isinstance(xattrs, tuple):
            return [name for name, _ in xattrs]
        return self._xattr_names(xattrs)

    def setxattr(self, ino: int, name: bytes, value: bytes, caller: Caller) -> Maybe[None]:
        node = self.inodes.node(ino)
        if not node.branch.ready:
            return _prepared(node.branch, self.setxattr, ino, name, value, caller)
        return node.branch.set_xattr(node, name, value, caller)

    def removexattr(self, ino: int, name: bytes) -> Maybe[None]:
        node = self.inodes.node(ino)
        if not node.branch.ready:
            return _prepared(node.branch, self.removexattr, ino, name)
        return node.branch.remove_xattr(node, name)

    def statfs(self) -> tuple[int, ...]:
        """The file system the store lies on, as `Branch.space` says it."""
        return self.root.branch.space(self.root)

    # Making and removing

    def mknod(self, parent_ino: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Maybe[Entry]:
        node = self._place(parent_ino, name)
        if not node.branch.ready:
            return _prepared(node.branch, self.mknod, parent_ino, name, mode, rdev, caller)
        return self._entered(node.branch.mknod(node, name, mode, rdev, caller))

    def mkdir(self, parent_ino: int, name: bytes, mode: int, caller: Caller) -> Maybe[Entry]:
        node = self._place(parent_ino, name)
        if not node.branch.ready:
            return _prepared(node.branch, self.mkdir, parent_ino, name, mode, caller)
        return self._entered(node.branch.mkdir(node, name, mode, caller))

    def symlink(self, parent_ino: int, name: bytes, target: bytes, caller: Caller) -> Maybe[Entry]:
        node = self._place(parent_ino, name)
        if not node.branch.ready:
            return _prepared(node.branch, self.symlink, parent_ino, name, target, caller)
        return self._entered(node.branch.symlink(node, name, target, caller))

    def link(self, ino: int, new_parent_ino: int, name: bytes) -> Maybe[Entry]:
        node = self.inodes.node(ino)
        parent = self._place(new_parent_ino, name)
        if parent.branch is not node.branch:
            raise errors.CrossDevice("a hard link cannot leave its rootfs")
        if not node.branch.ready:
            return _prepared(node.branch, self.link, ino, new_parent_ino, name)
        return self._entered(node.branch.link(node, parent, name))

    def unlink(self, parent_ino: int, name: bytes, caller: Caller) -> Maybe[None]:
        node = self._place(parent_ino, name)
        if not node.branch.ready:
            return _prepared(node.branch, self.unlink, parent_ino, name, caller)
        if node.branch is self._containers:
            return self._containers.unlink_for(node, name, caller)
        return node.branch.unlink(node, name)

    def rmdir(self, parent_ino: int, name: bytes) -> Maybe[None]:
        node = self._place(parent_ino, name)
        if not node.branch.ready:
            return _prepared(node.branch, self.rmdir, parent_ino, name)
        return node.branch.rmdir(node, name)

    def rename(
        self, parent_ino: int, name: bytes, new_parent_ino: int, new_name: bytes, flags: int
    ) -> Maybe[None]:
        node = self._place(parent_ino, name)
        parent = self._place(new_parent_ino, new_name)
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE):
            raise errors.BadInput("rename: only RENAME_NOREPLACE and RENAME_EXCHANGE are known here")
        if parent.branch is not node.branch:
            raise errors.CrossDevice("not within one rootfs: copy and remove instead, as mv does")
        if not node.branch.ready:
            return _prepared(node.branch, self.rename, parent_ino, name, new_parent_ino, new_name, flags)
        return node.branch.rename(node, name, parent, new_name, flags)

    # Open files

    def open(self, ino: int, flags: int, caller: Caller) -> Maybe[tuple[int, FileHandle]]:
        node = self.inodes.node(ino)
        branch = node.branch
        if not branch.ready:
            return _prepared(branch, self.open, ino, flags, caller)
        if flags & os.O_TRUNC and self.handles.is_running(node):
            # The kernel looks after this only (fs/namei.c, handle_truncate), where nobody opens for writing.
            raise errors.Running("the program runs")
        opened = branch.open(node, flags, caller)
        if isinstance(opened, FileHandle):
            return self.handles.add_opened(opened, flags), opened
        return self._opened(opened, flags)

    def create(
        self, parent_ino: int, name: bytes, mode: int, flags: int, caller: Caller
    ) -> Maybe[tuple[int, FileHandle, Entry]]:
        node = self._place(parent_ino, name)
        branch = node.branch
        if not branch.ready:
            return _prepared(branch, self.create, parent_ino, name, mode, flags, caller)
        made = branch.create(node, name, mode, flags, caller)
        return self._created_now(*made) if isinstance(made, tuple) else self._created(made)

    def read(self, fh: int, offset: int, size: int) -> Maybe[bytes]:
        return self.handles.file(fh).read(offset, size)

    def write(self, fh: int, offset: int, data: bytes) -> Maybe[int]:
        return self.handles.file(fh).write(offset, data)

    def flush(self, fh: int) -> Maybe[None]:
        return self.handles.file(fh).flush()

    def fsync(self, fh: int, datasync: bool) -> Maybe[None]:
        return self.handles.file(fh).fsync(datasync)

    def release(self, fh: int) -> Maybe[None]:
        return cast(FileHandle, self.handles.remove(fh)).close()

    # Open directories

    def opendir(self, ino: int, caller: Caller) -> Maybe[int]:
        node = self.inodes.node(ino)
        branch = node.branch
        if not branch.ready:
            return _prepared(branch, self.opendir, ino, caller)
        self._containers.require_welcome(node, caller)
        done = branch.opened_dir(node)
        if done is None:
            return self.handles.add(DirHandle(node, None))
        return self._opened_dir(node, done)

    def readdir(self, fh: int, start: int, emit: Callable[[bytes, Entry, int], bool]) -> Maybe[None]:
        """Call `emit(name, entry, next position)` from position `start` until it returns False (not taken).

        A position is an index in the listing that this handle took when it was last read from 0; what has
        gone since is left out. '.' and '..' come first and are not counted.
        """
        handle = self.handles.directory(fh)
        if start == 0 or handle.listing is None:
            listing = handle.node.branch.listing(handle.node)
            if not isinstance(listing, list):
                return self._listed(handle, listing, start, emit)
            handle.listing = listing
        return self._emit(handle, handle.listing, start, emit)

    def fsyncdir(self, fh: int) -> Maybe[None]:
        node = self.handles.directory(fh).node
        return node.branch.fsync_dir(node)

    def releasedir(self, fh: int) -> None:
        handle = cast(DirHandle, self.handles.remove(fh))
        handle.node.branch.closed_dir(handle.node)

    # How results become entries

    def _place(self, parent_ino: int, name: bytes) -> Node:
        if len(name) > FILE_NAME_MAX:
            raise errors.NameTooLong(f"a name has at most {FILE_NAME_MAX} bytes")
        return self.inodes.node(parent_ino)

    def _shown(self, node: Node) -> Maybe[Entry]:
        if node.branch.ready:
            return Entry(node, node.branch.attr(node))
        return self._peeked(node)

    def _peeked(self, node: Node) -> Steps[Entry]:
        return Entry(node, (yield from node.branch.peek(node)))

    def _peeked_for(self, node: Node, pid: int) -> Steps[Entry]:
        return Entry(node, (yield from node.branch.peek_for(node, pid)))

    def _entered(self, found: Maybe[Node]) -> Maybe[Entry]:
        if not isinstance(found, Node) or not found.branch.ready:
            return self._entered_later(found)
        # Attributes first: what raises is not counted.
        entry = Entry(found, found.branch.attr(found))
        self.inodes.remember(found)
        return entry

    def _entered_later(self, found: Maybe[Node]) -> Steps[Entry]:
        node = yield from _steps(found)
        # Counted before: meanwhile another node may come in its place, which takes the count over.
        self.inodes.remember(node)
        try:
            return (yield from _steps(self._shown(node)))
        except BaseException:
            self.inodes.forget(node.ino, 1)
            raise

    def _changed(self, node: Node, steps: Steps[None]) -> Steps[Entry]:
        yield from steps
        return (yield from _steps(self._shown(node)))

    def _truncated(self, node: Node, changes: Changes, handle: FileHandle, caller: Caller) -> Steps[Entry]:
        yield from _steps(handle.truncate(cast(int, changes.size)))
        rest = changes._replace(size=None)
        if rest != Changes():
            yield from _steps(node.branch.setattr(node, rest, caller))
        return (yield from _steps(self._shown(node)))

    def _peeked_xattr(self, node: Node, name: bytes) -> Steps[bytes]:
        for known, value in (yield from node.branch.peek_xattrs(node)):
            if known == name:
                return value
        raise errors.NoAttribute("no such attribute")

    def _xattr_names(self, steps: Steps[Xattrs]) -> Steps[list[bytes]]:
        xattrs = yield from steps
        return [name for name, _ in xattrs]

    def _opened(self, steps: Steps[FileHandle], flags: int) -> Steps[tuple[int, FileHandle]]:
        handle = yield from steps
        return self.handles.add_opened(handle, flags), handle

    def _created_now(self, node: Node, handle: FileHandle) -> tuple[int, FileHandle, Entry]:
        try:
            entry = Entry(node, node.branch.attr(node))
        except BaseException:
            run(handle.close())
            raise
        self.inodes.remember(node)
        return self.handles.add(handle), handle, entry

    def _created(self, steps: Steps[tuple[Node, FileHandle]]) -> Steps[tuple[int, FileHandle, Entry]]:
        node, handle = yield from steps
        return self._created_now(node, handle)

    def _opened_dir(self, node: Node, steps: Steps[None]) -> Steps[int]:
        yield from steps
        return self.handles.add(DirHandle(node, None))

    def _listed(
        self,
        handle: DirHandle,
        steps: Steps[list[tuple[bytes, Any]]],
        start: int,
        emit: Callable[[bytes, Entry, int], bool],
    ) -> Steps[None]:
        handle.listing = yield from steps
        yield from _steps(self._emit(handle, handle.listing, start, emit))

    def _emit(
        self,
        handle: DirHandle,
        listing: list[tuple[bytes, Any]],
        start: int,
        emit: Callable[[bytes, Entry, int], bool],
    ) -> Maybe[None]:
        node = handle.node
        branch = node.branch
        for position, name in enumerate((b".", b"..")):
            if start <= position:
                shown = branch.parent(node) if position else node
                if not emit(name, Entry(shown, shown.branch.attr(shown)), position + 1):
                    return None
        listed, remember = branch.listed, self.inodes.remember
        for index in range(max(start - 2, 0), len(listing)):
            name, token = listing[index]
            child = listed(node, name, token)
            if child is None:
                continue
            if child.branch is not branch and not child.branch.ready:
                return self._emit_peeked(handle, listing, index, child, emit)
            try:
                entry = Entry(child, child.branch.attr(child))
            except _GONE:
                continue
            except (errors.FusestoreError, OSError):
                entry = _guess(child)
            if not emit(name, entry, index + 3):
                return None
            remember(child)
        return None

    def _emit_peeked(
        self,
        handle: DirHandle,
        listing: list[tuple[bytes, Any]],
        index: int,
        child: Node,
        emit: Callable[[bytes, Entry, int], bool],
    ) -> Steps[None]:
        """The rest of `_emit`, from `index` on: that is `child`, whose branch is not ready."""
        entry: Entry | None = None
        self.inodes.remember(child)  # see `_entered_later`
        try:
            entry = yield from self._peeked(child)
        except _GONE:
            pass
        except (errors.FusestoreError, OSError):
            entry = _guess(child)
        is_taken = entry is not None and emit(listing[index][0], entry, index + 3)
        if not is_taken:
            self.inodes.forget(child.ino, 1)
            if entry is not None:
                return
        yield from _steps(self._emit(handle, listing, index + 3, emit))


_GONE = (errors.NotFound, errors.Stale, FileNotFoundError)
"""What an entry of a listing raises that has gone since it was taken."""


def _guess(node: Node) -> Entry:
    """How what is damaged is listed."""
    attr = Attr(
        mode=node.format, uid=0, gid=0, size=0, rdev=0, nlink=1, blocks=0, atime_ns=0, mtime_ns=0, ctime_ns=0
    )
    return Entry(node, attr, is_guess=True)


def _prepared(branch: Branch, operation: Callable[..., Maybe[T]], *arguments: Any) -> Steps[T]:
    """Make the branch ready, then do `operation`."""
    yield from branch.prepare()
    return (yield from _steps(operation(*arguments)))


def _steps(result: Maybe[T]) -> Steps[T]:
    if isinstance(result, GeneratorType):
        return cast(T, (yield from result))
    return cast(T, result)


class _FixedDirectory(FixedBranch):
    """A directory of other branches: the mountpoint itself, and /views."""

    def __init__(self, store: Store, owner: Owner, ino: Inode, parent: Node | None, refusal: str) -> None:
        """Without a `parent` it is the mountpoint."""
        self.root = Node(self, ino)
        self.children: dict[bytes, Node] = {}
        self.refusal = refusal
        self._parent = parent or self.root
        self._store_path = store.path
        self._owner = owner
        self._made_ns = time.time_ns()

    def attr(self, node: Node) -> Attr:
        return self._owner.directory(self._made_ns, 2 + len(self.children))

    def lookup(self, node: Node, name: bytes) -> Node:
        try:
            return self.children[name]
        except KeyError:
            raise errors.NotFound(f"no {name!r} here") from None

    def listing(self, node: Node) -> list[tuple[bytes, Any]]:
        return list(self.children.items())

    def listed(self, node: Node, name: bytes, token: Node) -> Node:
        return token

    def parent(self, node: Node) -> Node:
        return self._parent

    def space(self, node: Node) -> tuple[int, ...]:
        found = os.statvfs(self._store_path)
        return (
            found.f_bsize,
            found.f_frsize,
            found.f_blocks,
            found.f_bfree,
            found.f_bavail,
            found.f_files,
            found.f_ffree,
            found.f_favail,
            found.f_namemax,
        )
