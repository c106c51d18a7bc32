"""What the kernel holds of us: nodes by inode number, lookup counts, open handles. Pure.

A `Node` is one object of the mounted tree that the kernel may know. It belongs to a `Branch`: the part of the
tree (the images, the containers, one rootfs …) that knows what operations on it mean. A node lives while the
kernel counts lookups on it, a handle is open on it, or a living node below refers to it; branches index their
nodes weakly, so what nobody needs is gone without bookkeeping. Of those that the kernel forgot the last few
thousand live on: a file handle may ask for them.

Operations that may have to wait (for a disk, a lock, a decompressor) are generators: each `yield` hands out a
function to be called in a worker thread and resumes with its result (`Steps`). Between two yields nothing
else runs: a state change never contains a yield. `run` drives them without an event loop. What may make
requests of this very mount is handed out as `Outward`, so that it leaves threads free to answer them; who
waits for such a step of another operation hands out a `Pending`; what may wait for a network is `Remote`, and
holds up nothing that waits for a disk.
"""

import itertools
import secrets
import stat
from collections import OrderedDict
from collections.abc import Callable, Generator
from types import GeneratorType
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, Union, cast

from . import errors
from .nodes import Attr, Inode, Xattrs

__all__ = [
    "FOREVER_S",
    "Branch",
    "Caller",
    "Changes",
    "Closable",
    "DirHandle",
    "FileHandle",
    "Handles",
    "Inodes",
    "Maybe",
    "Node",
    "Outward",
    "Remote",
    "Pending",
    "ROOT_INODE",
    "Steps",
    "run",
]

T = TypeVar("T")
Steps = Generator[Callable[[], Any], Any, T]
Maybe = Union[T, Steps[T]]  # noqa: UP007 - mypy takes no bare TypeVar in X | Y
"""A result, or the steps that lead to it."""

ROOT_INODE = Inode(1)


class _Step:
    """A step of a kind that is not run as others are."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call

    def __call__(self) -> Any:
        return self._call()


class Outward(_Step):
    """A step that may make requests of this very mount."""

    __slots__ = ()


class Remote(_Step):
    """A step that may wait for a network."""

    __slots__ = ()


class Pending:
    """Something that another operation is doing. Handed out as a step, it ends when that is done."""

    def __init__(self) -> None:
        self.is_done = False
        self._wake: list[Callable[[], None]] = []

    def __call__(self) -> None:
        """Without an event loop nothing is under way."""
        assert self.is_done

    def when_done(self, wake: Callable[[], None]) -> None:
        """`wake` is called at the end, or now."""
        if self.is_done:
            wake()
        else:
            self._wake.append(wake)

    def finish(self) -> None:
        self.is_done = True
        for wake in self._wake:
            wake()


FOREVER_S = 86400.0
"""How long the kernel may keep what only this process changes."""

_FORGOTTEN = 4096
"""How many nodes live on that the kernel has forgotten: 2 or 3 MB."""

_FMODE_EXEC = 1 << 5
"""In the flags of open(2) where execve(2) opens (include/linux/fs.h)."""

_generations = itertools.count(secrets.randbits(31))


def run(result: Maybe[T]) -> T:
    """Drive steps to their result in this thread."""
    if not isinstance(result, GeneratorType):
        return cast(T, result)
    try:
        call = next(result)
        while True:
            try:
                value = call()
            except Exception as error:
                call = result.throw(error)
            else:
                call = result.send(value)
    except StopIteration as stop:
        return cast(T, stop.value)


class Caller(NamedTuple):
    """Who asked: ids as the mount's user namespace sees them, the thread id, the umask."""

    uid: int
    gid: int
    pid: int
    umask: int


class Changes(NamedTuple):
    """What setattr is to change; None leaves a field as it is. Sizes in bytes, times in ns."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


class Closable(Protocol):
    """Something held until it is closed, once."""

    def close(self) -> None: ...


class Node:
    """One object the kernel may know. `lookups` is the kernel's count (fuse.rst: nlookup)."""

    __slots__ = ("__weakref__", "branch", "generation", "ino", "lookups")

    entry_timeout_s: ClassVar[float] = FOREVER_S
    """How long the kernel may believe that the name leads here."""
    attr_timeout_s: ClassVar[float] = FOREVER_S
    format: int = stat.S_IFDIR
    """S_IFMT bits: what it is listed as when its attributes cannot be had."""

    def __init__(self, branch: "Branch", ino: Inode) -> None:
        self.branch = branch
        self.ino = ino
        self.generation = next(_generations) & 0xFFFFFFFF
        """Together with the number what no other node has, of this mount or another: file handles are made
        of both (name_to_handle_at(2))."""
        self.lookups = 0


class FileHandle:
    """An open file. `direct_io` has every read and write come here at once, past the page cache."""

    __slots__ = ("node",)
    direct_io: ClassVar[bool] = False
    keep_cache: ClassVar[bool] = True

    def __init__(self, node: Node) -> None:
        self.node = node

    def read(self, offset: int, size: int) -> Maybe[bytes]:
        """At most `size` bytes from `offset`; short only at the end of the file."""
        raise errors.NotPermitted("this file cannot be read")

    def write(self, offset: int, data: bytes) -> Maybe[int]:
        raise errors.NotPermitted("this file cannot be written")

    def truncate(self, size: int) -> Maybe[None]:
        """ftruncate(2) on this handle."""
        raise errors.NotPermitted("this file cannot be written")

    def flush(self) -> Maybe[None]:
        """close(2) was called on one of its descriptors; others may follow."""
        return None

    def fsync(self, datasync: bool) -> Maybe[None]:
        return None

    def close(self) -> Maybe[None]:
        """The last descriptor is gone. Called once."""
        return None


class DirHandle:
    """An open directory: a snapshot of its listing, taken anew whenever reading starts at 0 (rewinddir)."""

    __slots__ = ("listing", "node")

    def __init__(self, node: Node, listing: list[tuple[bytes, Any]] | None = None) -> None:
        self.node = node
        self.listing = listing
        """None until it is read for the first time."""


class Branch:
    """One part of the tree. This base is the answer of a read-only place; parts override what they can do.

    Methods take nodes of this branch and return values, or steps (see the module's docstring) where the
    annotation is Maybe. They raise FusestoreError or OSError, nothing else on purpose.
    """

    __slots__ = ("__weakref__",)

    absence_timeout_s: ClassVar[float] = 0.0
    """How long the kernel may believe that a name is missing."""

    @property
    def ready(self) -> bool:
        """False while the first use of this part still has to open something: `prepare` does it."""
        return True

    def prepare(self) -> Steps[None]:
        """Make the branch ready. May run twice at once; the later one finds the work done."""
        raise NotImplementedError

    # What is there

    def attr(self, node: Node) -> Attr:
        """Attributes, without waiting. Of a branch that is not ready `peek` says them."""
        raise NotImplementedError

    def peek(self, node: Node) -> Steps[Attr]:
        """Attributes while the branch is not ready; makes it so only where it must."""
        raise NotImplementedError

    def peek_for(self, node: Node, pid: int) -> Steps[Attr]:
        """As `peek`, for the thread `pid`, who asks for nothing else. Raises Stale to have it look again."""
        return self.peek(node)

    def peek_xattrs(self, node: Node) -> Steps[Xattrs]:
        """As `peek`: ls -l and stat ask for these too."""
        yield from self.prepare()
        xattrs = self.xattrs(node)
        return (yield from xattrs) if isinstance(xattrs, GeneratorType) else cast(Xattrs, xattrs)

    def lookup(self, node: Node, name: bytes) -> Maybe[Node]:
        """The child `name` ('.' and '..' never come here). Raises NotFound."""
        raise NotImplementedError

    def listing(self, node: Node) -> Maybe[list[tuple[bytes, Any]]]:
        """Names in the directory without '.' and '..', each with a token that makes `listed` cheap."""
        raise NotImplementedError

    def listed(self, node: Node, name: bytes, token: Any) -> Node | None:
        """The node of an entry of `listing`, also of a damaged one; None when it has gone since."""
        raise NotImplementedError

    def parent(self, node: Node) -> Node:
        """What '..' is."""
        raise NotImplementedError

    def readlink(self, node: Node) -> bytes:
        raise errors.BadInput("not a symbolic link")

    def xattrs(self, node: Node) -> Maybe[Xattrs]:
        return ()

    def xattr(self, node: Node, name: bytes) -> Maybe[bytes]:
        """Raises NoAttribute."""
        raise errors.NoAttribute("no such attribute")

    def space(self, node: Node) -> tuple[int, ...]:
        """statvfs(3) fields (bsize, frsize, blocks, bfree, bavail, files, ffree, favail, namemax)."""
        raise NotImplementedError

    # Open

    def open(self, node: Node, flags: int, caller: Caller) -> Maybe[FileHandle]:
        raise errors.ReadOnly("nothing can be opened here")

    def opened_dir(self, node: Node) -> Maybe[None]:
        """A directory handle was opened; `closed_dir` follows once."""
        return None

    def closed_dir(self, node: Node) -> None:
        """See `opened_dir`."""

    # Changes

    def setattr(self, node: Node, changes: Changes, caller: Caller) -> Maybe[None]:
        raise errors.ReadOnly("read-only part of the store")

    def create(
        self, node: Node, name: bytes, mode: int, flags: int, caller: Caller
    ) -> Maybe[tuple[Node, FileHandle]]:
        raise errors.ReadOnly("read-only part of the store")

    def mknod(self, node: Node, name: bytes, mode: int, rdev: int, caller: Caller) -> Maybe[Node]:
        raise errors.ReadOnly("read-only part of the store")

    def mkdir(self, node: Node, name: bytes, mode: int, caller: Caller) -> Maybe[Node]:
        raise errors.ReadOnly("read-only part of the store")

    def symlink(self, node: Node, name: bytes, target: bytes, caller: Caller) -> Maybe[Node]:
        raise errors.ReadOnly("read-only part of the store")

    def link(self, node: Node, new_parent: Node, name: bytes) -> Maybe[Node]:
        raise errors.ReadOnly("read-only part of the store")

    def unlink(self, node: Node, name: bytes) -> Maybe[None]:
        raise errors.ReadOnly("read-only part of the store")

    def rmdir(self, node: Node, name: bytes) -> Maybe[None]:
        raise errors.ReadOnly("read-only part of the store")

    def rename(self, node: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int) -> Maybe[None]:
        """Within this branch; `flags` of RENAME_NOREPLACE, RENAME_EXCHANGE."""
        raise errors.ReadOnly("read-only part of the store")

    def set_xattr(self, node: Node, name: bytes, value: bytes, caller: Caller) -> Maybe[None]:
        raise errors.ReadOnly("read-only part of the store")

    def remove_xattr(self, node: Node, name: bytes) -> Maybe[None]:
        raise errors.ReadOnly("read-only part of the store")

    def fsync_dir(self, node: Node) -> Maybe[None]:
        return None

    def forgotten(self, node: Node) -> bool:
        """The kernel knows `node` no more. True: `recall` may be asked for it."""
        return False

    def recall(self, node: Node) -> None:
        """A file handle leads to `node`, which the kernel forgot. Raises Stale where it is there no more."""
        raise NotImplementedError

    # For people

    def path(self, node: Node) -> bytes:
        """A path that leads to `node` from the mount point, where one is at hand; else empty. Any thread."""
        return b""


class Inodes:
    """The nodes the kernel counts lookups on. Touched by one thread only, the event loop's."""

    def __init__(self) -> None:
        self._held: dict[int, Node] = {}
        self._forgotten: OrderedDict[int, Node] = OrderedDict()
        self._outdated: set[Inode] = set()
        self._next = 1 << 62

    def __len__(self) -> int:
        return len(self._held)

    def number(self, preferred: int | None = None) -> Inode:
        """A number for a new node: `preferred` unless a node the kernel knows has it, else one never used."""
        if preferred is not None and preferred not in self._held:
            return Inode(preferred)
        self._next += 1
        return Inode(self._next)

    def node(self, ino: int) -> Node:
        try:
            return self._held[ino]
        except KeyError:
            raise errors.Stale(f"inode {ino} is not known") from None

    def recalled(self, ino: int) -> Node:
        """The node that a file handle names: one the kernel knows, or one of the last that it forgot."""
        node = self._forgotten.get(ino)
        return self.node(ino) if node is None or node.ino != ino else node

    def remember(self, node: Node) -> None:
        """The kernel was told of `node` once more."""
        node.lookups += 1
        if node.lookups == 1:
            self._held[node.ino] = node
            self._forgotten.pop(node.ino, None)

    def outdate(self, node: Node) -> None:
        """The attributes of `node` changed by what was asked of another: the kernel must ask for them."""
        if node.lookups:
            self._outdated.add(node.ino)

    def take_outdated(self) -> set[Inode]:
        """The nodes outdated since the last call."""
        if not self._outdated:
            return self._outdated
        taken, self._outdated = self._outdated, set()
        return taken

    def replace(self, old: Node, new: Node) -> None:
        """The number that the kernel knows `old` by means `new` from now on; the kernel notices nothing.

        `new` is not known yet. `old` is as if the kernel had forgotten it, but its branch is not told.
        """
        new.ino, new.lookups, old.lookups = old.ino, old.lookups, 0
        new.generation = old.generation
        if new.lookups:
            self._held[new.ino] = new

    def forget(self, ino: int, count: int) -> bool:
        """The kernel's count sinks. False: it was not that high, so somebody has counted wrong."""
        node = self._held.get(ino)
        if ino == ROOT_INODE:
            return True
        if node is None:
            return False
        node.lookups -= count
        if node.lookups > 0:
            return True
        del self._held[ino]
        if node.branch.forgotten(node):
            self._forgotten[ino] = node
            if len(self._forgotten) > _FORGOTTEN:
                self._forgotten.popitem(last=False)
        return node.lookups == 0

    @property
    def lookups(self) -> int:
        """What the kernel has been told of and has not forgotten, and what is held by `remember` besides."""
        return sum(node.lookups for node in self._held.values())


class Handles:
    """Open handles by number; a number is not used twice."""

    def __init__(self) -> None:
        self._handles: dict[int, Any] = {}
        self._running: dict[int, Node] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._handles)

    def add(self, handle: FileHandle | DirHandle) -> int:
        self._next += 1
        self._handles[self._next] = handle
        return self._next

    def add_opened(self, handle: FileHandle, flags: int) -> int:
        """`flags` are open(2)'s, as the kernel has them."""
        number = self.add(handle)
        if flags & _FMODE_EXEC:
            self._running[number] = handle.node
        return number

    def is_running(self, node: Node) -> bool:
        """Whether the file is open as a program: the kernel has it open as long as that runs."""
        return node in self._running.values()

    def file(self, number: int) -> FileHandle:
        return cast(FileHandle, self._handles[number])

    def inode(self, number: int) -> Inode:
        """What is open there. Raises KeyError."""
        return cast(Node, self._handles[number].node).ino

    def open_files(self) -> set[Inode]:
        """The files that the kernel may hold unwritten pages of."""
        handles = self._handles.values()
        return {one.node.ino for one in handles if isinstance(one, FileHandle) and not one.direct_io}

    def directory(self, number: int) -> DirHandle:
        return cast(DirHandle, self._handles[number])

    def remove(self, number: int) -> Any:
        self._running.pop(number, None)
        return self._handles.pop(number)
