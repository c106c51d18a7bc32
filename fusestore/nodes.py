"""The vocabulary of file trees: attributes, extents, what a tar entry is. Pure.

Names, link targets and xattrs are bytes; times are nanoseconds since the Unix epoch; sizes and offsets are
bytes; modes carry the S_IFMT bits; device numbers are as os.makedev makes them.
"""

from typing import NamedTuple, NewType

__all__ = [
    "Attr",
    "Digest",
    "Extent",
    "Inode",
    "MAJOR_END",
    "MINOR_END",
    "TarEntry",
    "WHITEOUT_RDEV",
    "Xattrs",
    "device_major",
    "device_minor",
    "make_device",
]

Inode = NewType("Inode", int)
Digest = NewType("Digest", str)
"""``sha256:<64 hex>``, checked by `fusestore.names.parse_digest`."""

Xattrs = tuple[tuple[bytes, bytes], ...]

WHITEOUT_RDEV = 0
"""overlayfs.rst, "whiteouts and opaque directories": a character device with device number 0:0."""

MAJOR_END = 1 << 12
MINOR_END = 1 << 20
"""Of device numbers (linux/kdev_t.h)."""


def make_device(major: int, minor: int) -> int:
    """As os.makedev, which is not pure enough for the module order, does it for the numbers Linux has."""
    return (major << 8) | ((minor & ~0xFF) << 12) | (minor & 0xFF)


def device_major(rdev: int) -> int:
    return rdev >> 8 & 0xFFF | rdev >> 32 & ~0xFFF


def device_minor(rdev: int) -> int:
    return rdev & 0xFF | rdev >> 12 & ~0xFF


class Extent(NamedTuple):
    """A run of content: `length` bytes at `offset` of the file lie at `source` of the uncompressed tar."""

    offset: int
    length: int
    source: int


class Attr(NamedTuple):
    """What stat(2) says of an object."""

    mode: int
    uid: int
    gid: int
    size: int
    rdev: int
    nlink: int
    blocks: int
    """In units of 512 bytes."""
    atime_ns: int
    mtime_ns: int
    ctime_ns: int


class TarEntry(NamedTuple):
    """One member of a tar, headers merged (ustar, PAX, GNU), as it stands: nothing of the path is resolved.

    A whiteout is here an ordinary empty file called ``.wh.…``; `fusestore.layer` gives it its meaning.
    """

    type: bytes
    """b"0" regular, b"1" hard link, b"2" symlink, b"3" char, b"4" block, b"5" directory, b"6" FIFO."""
    path: bytes
    link: bytes
    """Target of a symlink (uninterpreted) or a hard link (a path in the tar)."""
    mode: int
    """Permission bits only (07777)."""
    uid: int
    gid: int
    size: int
    """Length of the file as a reader sees it; 0 for all but regular files."""
    mtime_ns: int
    rdev: int
    xattrs: Xattrs
    data: tuple[Extent, ...]
    """Ascending, no overlap; gaps read as zeros. One extent for an ordinary file, none for an empty one."""
