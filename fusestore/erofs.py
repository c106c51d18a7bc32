"""EROFS images that hold a tree's metadata; what is in its files lies in other files, the devices. Pure.

The format, as far as it is used here (Documentation/filesystems/erofs.rst, fs/erofs/erofs_fs.h; kernel 6.12).
Integers are little-endian, blocks have 512 bytes, since that is what content in a tar is aligned to::

    1024    superblock, 128 bytes
    1152    device table, 128 bytes a device; devices count from 1, 0 is the image itself
    …       inodes, directory blocks and copied content, in the order of the walk; the root first, for its
            number (nid) has 16 bits
    …       shared xattrs

An inode lies at a multiple of 32 bytes, which is its number, counted from one block before the root's. It has
64 bytes, or 32 (compact) where owners, size and link count fit in fewer bits and the mtime is the image's.
Then come its xattrs: values that were met before or can be met again are in the shared area, by offset.
Then, of

* a regular file: its chunk indexes, 8 bytes each: device and block where an equal part of it lies, or a hole;
* a symlink: the target; of a directory: its last block. Inode and these must be in one block; where they are
  too long, they are in blocks of their own.

A block of a directory has the entries, sorted, then their names. A directory does not span fewer blocks than
it needs, and no name is cut.

The content of an ordinary file is one chunk. Sparse files have chunks so small that each is all hole or all
in one run of a device, or, where that would be too many, or a run does not begin at a block, some chunks
are copied into the image.

Invariants: memory is bounded by the largest directory, by the depth of the tree and by `_SHARED_LIMIT`, not
by the number of entries, but for files of several names, which are remembered until all are met. The same
tree gives the same bytes. The only errors raised are NotSupported and the tree's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from stat import S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT, S_IFREG, S_IFSOCK
from struct import Struct
from struct import error as StructError
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

from .errors import NotSupported
from .nodes import Attr, Extent, Xattrs

__all__ = ["Device", "Output", "Tree", "write_image"]

NodeT = TypeVar("NodeT")

_BLOCK: Final = 512
_BLOCK_BITS = 9
_SLOT = 32

_SUPERBLOCK_AT = 1024
_SUPERBLOCK = Struct("<IIIBBHQqIIII16s16sIHHHBBIQB23x")
_MAGIC = 0xE0F5E1E2
_HAS_MTIME = 0x2
_HAS_CHUNKS = 0x4
_HAS_DEVICES = 0x8
_DEVICE = Struct("<64sII56x")
"""Tag, blocks, where the device is in one address space of all (nowhere)."""
_MOST_DEVICES = 0xFFFF

_COMPACT = Struct("<HHHHI4xIIHH4x")
"""Format, xattr count, mode, link count, size, what the layout needs, serial number, owner, group."""
_EXTENDED = Struct("<HHH2xQIIIIqII16x")
"""Format, xattr count, mode, size, what the layout needs, serial number, owner, group, mtime, link count."""
_PLAIN = 0 << 1
_INLINE = 2 << 1
_CHUNKS = 4 << 1
"""Layouts: in blocks; the same but the last block after the inode; in chunks."""
_IS_EXTENDED = 1

_INDEXES = 0x20
_MOST_CHUNK_BITS = 31
_INDEX = Struct("<HHI")
"""0, device, block."""
_HOLE = _INDEX.pack(0, 0, 0xFFFF_FFFF)
_INDEX_SIZE = _INDEX.size

_XATTR_HEADER = Struct("<IB7x")
"""A filter of names (none), number of shared xattrs."""
_XATTR = Struct("<BBH")
_XATTR_ID = Struct("<I")
_MOST_SHARED = 255
_SHARED_LIMIT = 1 << 20
"""Bytes of the shared area, which is held in memory. What comes when it is full is stored with its inode."""
_XATTR_NAMES = ((b"user.", 1), (b"trusted.", 4), (b"security.", 6))
_ACL_NAMES = {b"system.posix_acl_access": 2, b"system.posix_acl_default": 3}

_ENTRY = Struct("<QHBx")
"""Inode number, offset of the name in the block, type."""
_ENTRY_SIZE = _ENTRY.size
_TYPES = {S_IFREG: 1, S_IFDIR: 2, S_IFCHR: 3, S_IFBLK: 4, S_IFIFO: 5, S_IFSOCK: 6, S_IFLNK: 7}
_NAME_MAX = 255
_TARGET_MAX = 4095

_SPARSE_LIMIT = 256 << 20
"""Bytes that the image may grow by for one sparse file: its chunk indexes and what is copied."""
_COPY_SIZE = 1 << 20
_WINDOW = 1 << 20


class Device(NamedTuple):
    """A file that content lies in."""

    tag: bytes
    """At most 64 bytes that tell a reader of the image which one; the kernel goes by the order."""
    size: int


class Tree(Protocol[NodeT]):
    """What is written. Nodes are hashable; the names of one object lead to equal nodes."""

    @property
    def root(self) -> NodeT:
        """A directory."""

    def listing(self, directory: NodeT, /) -> Mapping[bytes, NodeT]: ...
    def attr(self, node: NodeT, /) -> Attr:
        """nlink of a non-directory is how often it is in the tree; of a directory it does not count."""

    def xattrs(self, node: NodeT, /) -> Xattrs: ...
    def target(self, node: NodeT, /) -> bytes: ...
    def content(self, node: NodeT, /) -> tuple[int, Sequence[Extent]]:
        """Of a regular file: number of the device, from 0, and what lies where in it, ascending."""

    def read(self, device: int, offset: int, size: int, /) -> bytes:
        """Content, for the few pieces that are copied."""


class Output(Protocol):
    """A binary file, empty at first. What is skipped must read as zeros."""

    def seek(self, offset: int, /) -> object: ...
    def write(self, data: bytes | bytearray, /) -> object: ...


def write_image(tree: Tree[NodeT], devices: Sequence[Device], output: Output) -> None:
    """Write `tree`. Raises NotSupported for what EROFS has no room for; `output` is rubbish then.

    Xattrs outside ``user.``, ``trusted.``, ``security.`` and the two of POSIX ACLs, which no Linux file
    system has a place for, are left out.
    """
    _Writer(tree, devices, output).write()


class _Window:
    """Writes at any offset; cheap where they come close to each other."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._start = 0
        self._data = bytearray()

    def put(self, offset: int, data: bytes | bytearray) -> None:
        at = offset - self._start
        if at < 0:
            self._output.seek(offset)
            self._output.write(data[:-at])
            data = data[-at:]
            at = 0
        gap = at - len(self._data)
        if gap > _WINDOW:
            self.flush()
            self._start, at, gap = offset, 0, 0
        if gap > 0:
            self._data += bytes(gap)
        self._data[at : at + len(data)] = data
        if len(self._data) >= 2 * _WINDOW:
            self._write(_WINDOW)

    def flush(self) -> None:
        self._write(len(self._data))

    def _write(self, size: int) -> None:
        self._output.seek(self._start)
        self._output.write(self._data[:size])
        del self._data[:size]
        self._start += size


class _Space:
    """Gives out places in the image: inodes fill what the blocks between them leave free."""

    def __init__(self, start: int) -> None:
        """`start`: in bytes, a multiple of the block size."""
        self.end = start
        """No byte is in use from here on."""
        self._next = start
        self._room = start
        """Inodes go from `_next` to `_room`; where that is `end`, on from there."""

    def inode(self, size: int, uncut: bool) -> int:
        """Of `size` bytes in all, in one block where it must not be cut."""
        at = _aligned(self._next, _SLOT)
        if uncut and at // _BLOCK != (at + size - 1) // _BLOCK:
            at = _aligned(at, _BLOCK)
        if at + size > self._room:
            if self._room != self.end:
                at = self.end
            self.end = self._room = _aligned(at + size, _BLOCK)
        self._next = at + size
        return at

    def blocks(self, size: int) -> int:
        """Where `size` bytes begin, in blocks of their own."""
        at = self.end
        self.end += _aligned(size, _BLOCK)
        return at


class _SharedXattrs:
    """The shared area as it grows."""

    def __init__(self) -> None:
        self.data = bytearray()
        self._ids: dict[bytes, int] = {}

    def find(self, entry: bytes) -> int | None:
        """The id of an entry; None when it must be stored with its inode."""
        found = self._ids.get(entry)
        if found is None and len(self.data) + len(entry) <= _SHARED_LIMIT:
            found = self._ids[entry] = len(self.data) // 4
            self.data += entry
        return found


@dataclass(slots=True)
class _Directory(Generic[NodeT]):
    """A directory until the numbers of all its children are known."""

    at: int
    number: int
    head: "_Head"
    is_inline: bool
    """Whether the last block is with the inode."""
    names: list[bytes]
    """Sorted, with ``.`` and ``..``."""
    blocks: list[tuple[int, int]]
    """Positions of the first name of each block and of the one after the last."""
    numbers: list[int] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    waiting: list[tuple[int, NodeT]] = field(default_factory=list)
    """Subdirectories that have no number yet, the next one last; with their positions in `names`."""
    nlink: int = 2

    def pack(self, first: int, last: int) -> bytes:
        """One block, not padded."""
        names = self.names[first:last]
        offset = _ENTRY_SIZE * len(names)
        entries = bytearray()
        for position, name in enumerate(names, first):
            entries += _ENTRY.pack(self.numbers[position], offset, self.types[position])
            offset += len(name)
        return bytes(entries) + b"".join(names)


class _Writer(Generic[NodeT]):
    def __init__(self, tree: Tree[NodeT], devices: Sequence[Device], output: Output) -> None:
        if len(devices) > _MOST_DEVICES:
            raise _no_room(f"{len(devices)} layers")
        self._tree = tree
        self._devices = devices
        self._window = _Window(output)
        start = _aligned(_SUPERBLOCK_AT + _SUPERBLOCK.size + _DEVICE.size * len(devices), _BLOCK)
        self._base = start - _BLOCK
        """What inode numbers are counted from: none is 0, which readdir(3) takes for no entry."""
        self._space = _Space(start)
        self._shared = _SharedXattrs()
        self._linked: dict[NodeT, tuple[int, int]] = {}
        """Number of each file that has names to come, and how many."""
        self._count = 0
        self._time_ns = tree.attr(tree.root).mtime_ns

    def write(self) -> None:
        root = self._enter(self._tree.root, None)
        open_directories = [root]
        while open_directories:
            directory = open_directories[-1]
            if directory.waiting:
                position, node = directory.waiting.pop()
                child = self._enter(node, directory)
                directory.numbers[position] = child.number
                open_directories.append(child)
            else:
                self._put_directory(directory)
                open_directories.pop()
        # At least a block, for the image to end where its last byte is written.
        shared = self._shared.data.ljust(_aligned(len(self._shared.data) or 1, _BLOCK), b"\0")
        shared_at = self._space.blocks(len(shared))
        self._window.put(shared_at, shared)
        self._window.flush()
        self._put_head(root.number, shared_at)
        self._window.flush()

    def _put_head(self, root: int, shared_at: int) -> None:
        seconds, nanoseconds = divmod(self._time_ns, 10**9)
        table_at = _SUPERBLOCK_AT + _SUPERBLOCK.size
        head = bytearray()
        for device in self._devices:
            blocks = -(-device.size // _BLOCK)
            if blocks >= 1 << 32 or len(device.tag) > 64:
                raise _no_room(f"a layer of {device.size} bytes")
            head += _DEVICE.pack(device.tag, blocks, 0)
        if self._space.end >= _BLOCK << 32:
            raise _no_room("a tree so large")
        try:
            superblock = _SUPERBLOCK.pack(
                _MAGIC, 0, _HAS_MTIME, _BLOCK_BITS, 0, root, self._count, seconds, nanoseconds,
                self._space.end // _BLOCK, self._base // _BLOCK, shared_at // _BLOCK, b"", b"",
                _HAS_CHUNKS | _HAS_DEVICES, 0, len(self._devices), table_at // _DEVICE.size, 0, 0, 0, 0, 0,
            )  # fmt: skip
        except StructError:
            raise _no_room(f"an mtime of {seconds} s") from None
        self._window.put(_SUPERBLOCK_AT, superblock + head)

    # Directories

    def _enter(self, node: NodeT, parent: _Directory[NodeT] | None) -> _Directory[NodeT]:
        """Gives a directory its place, and writes all of its children but the directories."""
        children = self._tree.listing(node)
        if b"." in children or b".." in children:
            raise _no_room("a file of the name . or ..")
        names = sorted((*children, b".", b".."))
        blocks, tail = _split(names)
        attr = self._tree.attr(node)
        head = _Head(attr, self._xattrs(node), (len(blocks) - 1) * _BLOCK + tail, len(names), self._time_ns)
        is_inline = head.size + tail <= _BLOCK
        at = self._space.inode(head.size + (tail if is_inline else 0), is_inline)
        number = (at - self._base) // _SLOT
        directory = _Directory[NodeT](at, number, head, is_inline, names, blocks)
        for position, name in enumerate(names):
            if name == b".":
                child_number, kind = number, S_IFDIR
            elif name == b"..":
                child_number, kind = (parent.number if parent else number), S_IFDIR
            else:
                child = children[name]
                child_attr = self._tree.attr(child)
                kind = S_IFMT(child_attr.mode)
                if kind == S_IFDIR:
                    child_number = 0
                    directory.waiting.append((position, child))
                else:
                    child_number = self._file(child, child_attr, kind)
            directory.numbers.append(child_number)
            directory.types.append(_TYPES[kind])
        directory.nlink = 2 + len(directory.waiting)
        directory.waiting.reverse()
        return directory

    def _put_directory(self, directory: _Directory[NodeT]) -> None:
        packed = [directory.pack(first, last) for first, last in directory.blocks]
        inline = packed.pop() if directory.is_inline else b""
        layout, at = (_INLINE if directory.is_inline else _PLAIN), 0
        if packed:
            data = b"".join(block.ljust(_BLOCK, b"\0") for block in packed)
            at = self._space.blocks(len(data))
            self._window.put(at, data)
        self._put_inode(directory.at, directory.head, layout, at // _BLOCK, directory.nlink, inline)

    # All else

    def _file(self, node: NodeT, attr: Attr, kind: int) -> int:
        """Writes a non-directory, once however many names it has. Its number."""
        if attr.nlink > 1 and node in self._linked:
            number, names = self._linked.pop(node)
            if names > 1:
                self._linked[node] = number, names - 1
            return number
        at = self._put_file(node, attr, kind)
        number = (at - self._base) // _SLOT
        if attr.nlink > 1:
            self._linked[node] = number, attr.nlink - 1
        return number

    def _put_file(self, node: NodeT, attr: Attr, kind: int) -> int:
        xattrs = self._xattrs(node)
        if kind == S_IFREG:
            head = _Head(attr, xattrs, attr.size, attr.nlink, self._time_ns)
            return self._put_regular(node, head)
        if kind == S_IFLNK:
            return self._put_symlink(self._tree.target(node), attr, xattrs)
        if kind not in _TYPES:
            raise _no_room(f"a file of mode {attr.mode:o}")
        is_device = kind in (S_IFCHR, S_IFBLK)
        if is_device and not 0 <= attr.rdev < 1 << 32:
            raise _no_room(f"the device number {attr.rdev:#x}")
        head = _Head(attr, xattrs, 0, attr.nlink, self._time_ns)
        at = self._space.inode(head.size, False)
        self._put_inode(at, head, _PLAIN, attr.rdev if is_device else 0, attr.nlink)
        return at

    def _put_symlink(self, target: bytes, attr: Attr, xattrs: bytes) -> int:
        if not 0 < len(target) <= _TARGET_MAX or b"\0" in target:
            raise _no_room(f"a symlink to {target[:100]!r}")
        head = _Head(attr, xattrs, len(target), attr.nlink, self._time_ns)
        if head.size + len(target) <= _BLOCK:
            at = self._space.inode(head.size + len(target), True)
            self._put_inode(at, head, _INLINE, 0, attr.nlink, target)
            return at
        at = self._space.inode(head.size, False)
        blocks = self._space.blocks(len(target))
        self._window.put(blocks, target)
        self._put_inode(at, head, _PLAIN, blocks // _BLOCK, attr.nlink)
        return at

    def _put_regular(self, node: NodeT, head: "_Head") -> int:
        size = head.file_size
        if not size:
            at = self._space.inode(head.size, False)
            self._put_inode(at, head, _PLAIN, 0, head.attr.nlink)
            return at
        device, extents = self._tree.content(node)
        device_size = self._devices[device].size if extents else 0
        for offset, length, source in extents:
            if not 0 <= offset <= offset + length <= size or not 0 <= source <= device_size - length:
                raise _no_room("content outside of its file or its layer")
        bits, indexes = self._chunks(device, extents, size)
        gap = -head.size % _INDEX_SIZE
        at = self._space.inode(head.size + gap + len(indexes), False)
        self._put_inode(at, head, _CHUNKS, bits | _INDEXES, head.attr.nlink, bytes(gap) + indexes)
        return at

    def _put_inode(
        self, at: int, head: "_Head", layout: int, place: int, nlink: int, rest: bytes = b""
    ) -> None:
        self._window.put(at, head.pack(layout, place, nlink, self._count) + head.xattrs + rest)
        self._count += 1

    # Content

    def _chunks(self, device: int, extents: Sequence[Extent], size: int) -> tuple[int, bytes]:
        """Size of the chunks, as the power of two of blocks, and their indexes."""
        # The kernel answers EIO where a block is not there in full.
        stored = self._devices[device].size // _BLOCK * _BLOCK if extents else 0
        if len(extents) == 1 and extents[0].length == size:
            bits = max(0, (size - 1).bit_length() - _BLOCK_BITS)
            if bits <= _MOST_CHUNK_BITS and _is_mapped(extents[0], 0, size, size, stored):
                return bits, _INDEX.pack(0, device + 1, extents[0].source // _BLOCK)
        cost, bits = min((_cost(extents, size, bits, stored), bits) for bits in range(_MOST_CHUNK_BITS + 1))
        if cost > _SPARSE_LIMIT:
            raise _no_room(f"a sparse file of {size} bytes in {len(extents)} pieces")
        chunk = _BLOCK << bits
        indexes = bytearray(_HOLE * -(-size // chunk))
        for extent in extents:
            for number in range(extent.offset // chunk, _end_chunk(extent, chunk)):
                if _is_mapped(extent, number * chunk, chunk, size, stored):
                    block = (extent.source + number * chunk - extent.offset) // _BLOCK
                    _INDEX.pack_into(indexes, number * _INDEX_SIZE, 0, device + 1, block)
                else:
                    at = number * _INDEX_SIZE
                    if indexes[at : at + _INDEX_SIZE] == _HOLE:
                        blocks = self._space.blocks(min(chunk, size - number * chunk)) // _BLOCK
                        _INDEX.pack_into(indexes, at, 0, 0, blocks)
                    _, _, block = _INDEX.unpack_from(indexes, at)
                    self._copy(device, extent, number * chunk, chunk, block * _BLOCK)
        return bits, bytes(indexes)

    def _copy(self, device: int, extent: Extent, start: int, chunk: int, to: int) -> None:
        """What `extent` has of the chunk that begins at `start` of the file."""
        offset = max(extent.offset, start)
        end = min(extent.offset + extent.length, start + chunk)
        while offset < end:
            size = min(_COPY_SIZE, end - offset)
            data = self._tree.read(device, extent.source + offset - extent.offset, size)
            self._window.put(to + offset - start, data)
            offset += size

    # Xattrs

    def _xattrs(self, node: NodeT) -> bytes:
        """What comes between an inode and its content."""
        xattrs = self._tree.xattrs(node)
        if not xattrs:
            return b""
        ids, inline = bytearray(), bytearray()
        for name, value in xattrs:
            entry = _xattr_entry(name, value)
            if not entry:
                continue
            found = self._shared.find(entry) if len(ids) < _MOST_SHARED * _XATTR_ID.size else None
            if found is None:
                inline += entry
            else:
                ids += _XATTR_ID.pack(found)
        if not ids and not inline:
            return b""
        return _XATTR_HEADER.pack(0, len(ids) // _XATTR_ID.size) + ids + inline


class _Head:
    """What an inode says of itself: small if it can be."""

    __slots__ = ("attr", "file_size", "is_compact", "size", "xattrs")

    def __init__(self, attr: Attr, xattrs: bytes, file_size: int, nlink: int, time_ns: int) -> None:
        """`nlink`: at most; `time_ns`: the mtime that goes without saying."""
        self.attr = attr
        self.xattrs = xattrs
        self.file_size = file_size
        self.is_compact = (
            attr.mtime_ns == time_ns
            and attr.uid <= 0xFFFF
            and attr.gid <= 0xFFFF
            and file_size <= 0xFFFF_FFFF
            and nlink <= 0xFFFF
        )
        self.size = (_COMPACT.size if self.is_compact else _EXTENDED.size) + len(xattrs)
        """Of the inode and its xattrs."""

    def pack(self, layout: int, place: int, nlink: int, serial: int) -> bytes:
        attr = self.attr
        # erofs_fs.h: 0 for none, else one for the header and one for each four bytes that follow it.
        xattr_count = (len(self.xattrs) - _XATTR_HEADER.size) // 4 + 1 if self.xattrs else 0
        try:
            if self.is_compact:
                return _COMPACT.pack(
                    layout, xattr_count, attr.mode, nlink, self.file_size, place, serial, attr.uid, attr.gid
                )
            seconds, nanoseconds = divmod(attr.mtime_ns, 10**9)
            return _EXTENDED.pack(
                layout | _IS_EXTENDED, xattr_count, attr.mode, self.file_size, place, serial, attr.uid,
                attr.gid, seconds, nanoseconds, nlink,
            )  # fmt: skip
        except StructError:
            raise _no_room(f"{attr} and xattrs of {len(self.xattrs)} bytes") from None


def _split(names: Sequence[bytes]) -> tuple[list[tuple[int, int]], int]:
    """Which names, sorted, go into which block; and the bytes in use of the last."""
    blocks: list[tuple[int, int]] = []
    first = used = 0
    for position, name in enumerate(names):
        length = len(name)
        if not 0 < length <= _NAME_MAX or b"\0" in name or b"/" in name:
            raise _no_room(f"the name {name[:300]!r}")
        used += _ENTRY_SIZE + length
        if used > _BLOCK:
            blocks.append((first, position))
            first, used = position, _ENTRY_SIZE + length
    return [*blocks, (first, len(names))], used


def _cost(extents: Sequence[Extent], size: int, bits: int, stored: int) -> int:
    """Bytes that a sparse file takes of the image with chunks of this size."""
    chunk = _BLOCK << bits
    copied = 0
    last_copied = -1
    for extent in extents:
        first, end = extent.offset // chunk, _end_chunk(extent, chunk)
        if (extent.source - extent.offset) % _BLOCK:
            copied += end - max(first, last_copied + 1)
            last_copied = end - 1
            continue
        for number in (first, end - 1):
            if number > last_copied and not _is_mapped(extent, number * chunk, chunk, size, stored):
                copied += 1
                last_copied = number
    return -(-size // chunk) * _INDEX_SIZE + copied * chunk


def _end_chunk(extent: Extent, chunk: int) -> int:
    """The chunk after the last that `extent` has part of."""
    return -(-(extent.offset + extent.length) // chunk)


def _is_mapped(extent: Extent, start: int, chunk: int, size: int, stored: int) -> bool:
    """Whether the chunk at `start` can be what is in the `stored` bytes of the device's whole blocks."""
    end = min(start + chunk, size)
    shift = extent.source - extent.offset
    return (
        extent.offset <= start
        and end <= extent.offset + extent.length
        and end + shift <= stored
        and not shift % _BLOCK
    )


def _xattr_entry(name: bytes, value: bytes) -> bytes:
    """An entry, padded; empty for a name that has no place."""
    index = _ACL_NAMES.get(name, 0)
    rest = b""
    if not index:
        for prefix, prefix_index in _XATTR_NAMES:
            if name.startswith(prefix):
                index, rest = prefix_index, name[len(prefix) :]
        if not rest:
            return b""
    if len(rest) > _NAME_MAX or len(value) > 0xFFFF:
        raise _no_room(f"the xattr {name[:300]!r} of {len(value)} bytes")
    entry = _XATTR.pack(len(rest), index, len(value)) + rest + value
    return entry.ljust(_aligned(len(entry), _XATTR.size), b"\0")


def _aligned(offset: int, to: int) -> int:
    return -(-offset // to) * to


def _no_room(what: str) -> NotSupported:
    return NotSupported(f"an EROFS image has no room for {what}")
