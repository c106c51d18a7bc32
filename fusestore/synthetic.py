"""What the tree makes up (directories, links, documents) and what it asks of a rootfs driver. Pure.

/, /images and /containers consist of objects that lie nowhere on disk as they are shown: all belong to
whoever runs the mount (`Owner`) and have fixed modes. What is real, a container's rootfs, comes from a
`RootfsDriver` (design.md section 5); the parts above it use these two protocols only, and are tested with a
driver of memory.
"""

import stat
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from . import errors
from .inodes import Branch, Caller, Changes, FileHandle, Maybe, Node
from .nodes import Attr, Inode

__all__ = [
    "ANEW",
    "BLOCK_SIZE",
    "SHARED_S",
    "BytesHandle",
    "FixedBranch",
    "MANY_LINKS",
    "NameLink",
    "Owner",
    "RootfsBranch",
    "RootfsDriver",
    "Unreadable",
]

BLOCK_SIZE = 512
"""The unit of st_blocks, in bytes."""

SHARED_S = 1.0
"""How long the kernel may keep what other processes change too. They say when they do (`fusestore.mounts`);
this bounds what remains if one dies before it has.
"""

ANEW = ".anew-"
"""What names in /containers begin with through which a driver walks, to have the kernel ask for each name on
its path: ESTALE to the first LOOKUP has it begin anew, with LOOKUP_REVAL (fs/namei.c, filename_lookup). No
container can be called so, and nobody else finds it.
"""

MANY_LINKS = 1
"""The link count of a directory that does not count its subdirectories: btrfs says it, find(1) knows it."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose the made-up objects are."""

    uid: int
    gid: int

    def directory(self, mtime_ns: int, nlink: int, permissions: int = 0o755) -> Attr:
        return self._attr(stat.S_IFDIR | permissions, 0, mtime_ns, nlink)

    def link(self, target: bytes, mtime_ns: int) -> Attr:
        return self._attr(stat.S_IFLNK | 0o777, len(target), mtime_ns, 1)

    def file(self, size: int, mtime_ns: int, permissions: int = 0o444) -> Attr:
        return self._attr(stat.S_IFREG | permissions, size, mtime_ns, 1)

    def _attr(self, mode: int, size: int, mtime_ns: int, nlink: int) -> Attr:
        blocks = -(-size // BLOCK_SIZE)
        return Attr(mode, self.uid, self.gid, size, 0, nlink, blocks, mtime_ns, mtime_ns, mtime_ns)


class RootfsBranch(Protocol):
    """A rootfs, workdir or rundir as the tree sees it: a `Branch` with these besides."""

    @property
    def root(self) -> Node: ...

    @property
    def in_use(self) -> bool:
        """A handle is open in it."""
        ...

    @property
    def attached(self) -> bool:
        """It was entered: it holds descriptors of what lies under it."""
        ...

    label: bytes
    """Shown as security.selinux on what carries none; empty for none."""

    def be_asked(self, until: float) -> None:
        """Whoever comes to a doorway until then (time.monotonic) is to ask for it."""
        ...

    def set_quota(self, limit: int | None) -> None:
        """Bytes that changes may take on disk (fusestore.quota); None for any number."""
        ...

    @property
    def is_doorway(self) -> bool:
        """Its root is only what the kernel mounts something over when somebody comes."""
        ...

    @property
    def is_covered(self) -> bool:
        """It is a doorway, and that is done."""
        ...

    def before_enter(self) -> Maybe[None]:
        """What can take long, and makes no requests of this mount."""
        ...

    def require_hope(self, pid: int) -> None:
        """Raises what `enter` raised for that thread, once: the kernel asks again before it gives up."""
        ...

    def enter(self, pid: int) -> "Maybe[RootfsBranch]":
        """The thread `pid` comes, who knows the name: what it finds there, this or another in its place."""
        ...

    def leave(self) -> Maybe[None]:
        """Give back what is held though nobody is there. Raises Busy if somebody is, and it is held."""
        ...

    def rest(self) -> None:
        """Give back at once what is held only until the next request."""
        ...

    def moved_to(self, place: str) -> None:
        """The container has another id, which `place` is, or for workdir and rundir their path. Not of a
        doorway."""
        ...

    def detach(self) -> None:
        """Give up all descriptors. Its nodes answer Stale from now on. Idempotent."""
        ...


class RootfsDriver(Protocol):
    """Makes what a rootfs is. All are cheap: what they return opens something on first use only."""

    def container_rootfs(self, container_id: str, parent: Node, label: bytes) -> RootfsBranch: ...

    def rest(self) -> None:
        """`RootfsBranch.rest` of all that hold something so."""
        ...

    def approached(self, container_id: str, pid: int) -> None:
        """The thread `pid` makes or finds a container: it may come to its rootfs. Returns at once."""
        ...

    def look_up(self, container_id: str) -> None:
        """Walk to a rootfs through the kernel. In a thread; makes requests of this very mount."""
        ...

    def look_up_anew(self, container_id: str) -> None:
        """Have the kernel ask for a rootfs by a name that it may believe to know. As `look_up`."""
        ...

    def is_walker(self, pid: int) -> bool:
        """Whether the thread `pid` walks for one of these, or mounts."""
        ...

    def directory(self, path: str, parent: Node) -> RootfsBranch:
        """`path`: a real directory, shown as it is."""
        ...

    def image_rootfs(self, image: Any, parent: Node) -> RootfsBranch:
        """`image`: a fusestore.images.Image; all its layers merged, read-only."""
        ...

    def layer_rootfs(self, image: Any, number: int, parent: Node) -> RootfsBranch:
        """Layer `number` (0 is the bottom) of `image` alone."""
        ...


class _UnreadableBranch(Branch):
    def attr(self, node: Node) -> Attr:
        raise errors.StoreDamaged("looking up the name says what is wrong")


_UNREADABLE = _UnreadableBranch()


class Unreadable(Node):
    """What stands in a listing for what is damaged or cannot be read now: its neighbours are listed with it.

    The kernel asks for its name again before anything is done with it.
    """

    __slots__ = ("format",)

    entry_timeout_s = 0.0
    attr_timeout_s = 0.0

    def __init__(self, ino: Inode, format: int) -> None:
        """`format`: S_IFMT bits."""
        super().__init__(_UNREADABLE, ino)
        self.format = format


class NameLink(Node):
    """A name that leads to an id. Names are asked for each time: another may have it by now."""

    __slots__ = ("directory", "target")

    entry_timeout_s = 0.0
    attr_timeout_s = 0.0
    format = stat.S_IFLNK

    def __init__(self, branch: Branch, ino: Inode, directory: Node, target: bytes) -> None:
        """`directory` is where it lies, `target` what readlink(2) says."""
        super().__init__(branch, ino)
        self.directory = directory
        self.target = target


class BytesHandle(FileHandle):
    """An open file whose whole content is at hand and does not change."""

    __slots__ = ("_data",)

    def __init__(self, node: Node, data: bytes) -> None:
        super().__init__(node)
        self._data = data

    def read(self, offset: int, size: int) -> bytes:
        return self._data[offset : offset + size]


class FixedBranch(Branch):
    """A part of the tree where nobody may make or change anything (EPERM) but what a subclass allows."""

    refusal = "nothing can be made or changed here"

    def _refuse(self) -> NoReturn:
        raise errors.NotPermitted(self.refusal)

    def open(self, node: Node, flags: int, caller: Caller) -> Maybe[FileHandle]:
        self._refuse()

    def setattr(self, node: Node, changes: Changes, caller: Caller) -> Maybe[None]:
        self._refuse()

    def create(
        self, node: Node, name: bytes, mode: int, flags: int, caller: Caller
    ) -> Maybe[tuple[Node, FileHandle]]:
        self._refuse()

    def mknod(self, node: Node, name: bytes, mode: int, rdev: int, caller: Caller) -> Maybe[Node]:
        self._refuse()

    def mkdir(self, node: Node, name: bytes, mode: int, caller: Caller) -> Maybe[Node]:
        self._refuse()

    def symlink(self, node: Node, name: bytes, target: bytes, caller: Caller) -> Maybe[Node]:
        self._refuse()

    def link(self, node: Node, new_parent: Node, name: bytes) -> Maybe[Node]:
        self._refuse()

    def unlink(self, node: Node, name: bytes) -> Maybe[None]:
        self._refuse()

    def rmdir(self, node: Node, name: bytes) -> Maybe[None]:
        self._refuse()

    def rename(self, node: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int) -> Maybe[None]:
        self._refuse()

    def set_xattr(self, node: Node, name: bytes, value: bytes, caller: Caller) -> Maybe[None]:
        raise errors.NotSupported("no extended attributes here")

    def remove_xattr(self, node: Node, name: bytes) -> Maybe[None]:
        raise errors.NotSupported("no extended attributes here")
