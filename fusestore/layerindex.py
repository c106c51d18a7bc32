"""The layer index: the file that holds one layer's tree, read where it is touched. Pure.

Format, version 1; integers little-endian::

    header      magic, version, CRC-32 of all that follows up to the pages, counts (`_HEADER`, `_COUNTS`)
    page table  for each page the offset of its end in the file, 8 bytes
    pages       each a zstd frame with content size and checksum; 64 KiB decoded, the last of a section less

The decoded pages are two sections. **Blocks**: msgpack values, found by (offset, length)::

    directory   [parent inode, name, xattrs, table, names, runs]; names are sorted. In a directory of more
                than 512 names, names and runs are empty and table lists its leaves: first name, offset,
                length, …
    leaf        [names, runs]
    node        [target, xattrs, extents, names]; extents are packed `_EXTENT`s, names are inode, name, …
    lower links [inode, …]

where xattrs are name, value, … and runs are first inode, count, … for the names in their order. **Records**:
one `_RECORD` for each inode number, 1024 a page.

Inode 0 is the root. The inodes of a directory's children follow each other, and a directory comes before what
is in it, so that a walk reads the file from one end to the other.

Version history: 1, the first. A reader refuses every other version: the index is derived and made again.

Invariants: whatever the bytes are, reading them raises StoreDamaged or nothing, and memory is bounded by
`_BLOCK_LIMIT` and the page size. A maintainer who changes what is written here, if only the order of inodes,
must raise VERSION.
"""

from array import array
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from stat import S_IFCHR, S_IFDIR, S_IFMT, S_IFREG
from struct import Struct
from struct import error as StructError
from threading import Lock
from typing import Any, ClassVar, Final, NamedTuple, Protocol
from zlib import crc32

import msgpack
from zstandard import ZstdCompressor, ZstdDecompressor, ZstdError, get_frame_parameters

from .errors import NotADirectory, StoreDamaged
from .nodes import WHITEOUT_RDEV, Attr, Extent, Xattrs

__all__ = [
    "DRAFT",
    "EXTENTS",
    "IMPLICIT",
    "LOWER_LINK",
    "OPAQUE",
    "VERSION",
    "IndexWriter",
    "LayerIndex",
]

VERSION: Final = 1

OPAQUE: Final = 1
IMPLICIT: Final = 2
LOWER_LINK: Final = 4
EXTENTS: Final = 8
"""Flags. EXTENTS: the content is not one run; the node block has the runs, `source` counts their bytes."""

DRAFT: Final = Struct("<HHIIIqQQQ")
"""The part of a record that a tar entry gives: mode, flags, uid, gid, nanoseconds and seconds of mtime, size,
rdev, source (offset of the content in the uncompressed tar)."""
_TAIL = Struct("<IIQ")
"""The part that the whole tree gives: nlink, length and offset of the block (length 0: none)."""
_RECORD = Struct(DRAFT.format + _TAIL.format.removeprefix("<"))
_EXTENT = Struct("<QQQ")

_MAGIC = b"fslayer\0"
_HEADER = Struct("<8sII")
"""Magic, version, CRC-32."""
_COUNTS = Struct("<QQQQI")
"""Inodes, bytes of blocks, size of the tar, offset and length of the block of lower links."""
_PAGE_END = Struct("<Q")

_PAGE_SIZE = 1 << 16
_RECORDS_PER_PAGE = _PAGE_SIZE // _RECORD.size
_LEAF_NAMES = 512
_BLOCK_LIMIT = 32 << 20
"""Above the largest block that `fusestore.layer` makes: 65,000 hard links with names of 255 bytes."""
_CACHE_WEIGHT = 32 << 20
_COMPRESSION_LEVEL = 6


class _Buffer(Protocol):
    """bytes, or an mmap: slices are copies, so the mmap can be closed once the index is not used again."""

    def __len__(self) -> int: ...
    def __getitem__(self, key: slice, /) -> bytes: ...


class Block(NamedTuple):
    offset: int
    length: int


NO_BLOCK: Final = Block(0, 0)


class IndexWriter:
    """Puts an index together: first every block, then every record in the order of inode numbers."""

    def __init__(self) -> None:
        self._compressor = ZstdCompressor(_COMPRESSION_LEVEL, write_checksum=True, write_content_size=True)
        self._pages: list[bytes] = []
        self._open_page = bytearray()
        self._block_bytes = 0

    def add_directory(
        self, parent: int, name: bytes, xattrs: Xattrs, names: Sequence[bytes], inodes: Sequence[int]
    ) -> Block:
        """`names` sorted, `inodes` theirs."""
        if len(names) <= _LEAF_NAMES:
            return self._add([parent, name, _flat(xattrs), [], names, _runs(inodes)])
        table: list[bytes | int] = []
        for first in range(0, len(names), _LEAF_NAMES):
            last = first + _LEAF_NAMES
            leaf = self._add([names[first:last], _runs(inodes[first:last])])
            table += (names[first], leaf.offset, leaf.length)
        return self._add([parent, name, _flat(xattrs), table, [], []])

    def add_node(
        self, target: bytes, xattrs: Xattrs, extents: bytes, names: Sequence[tuple[int, bytes]]
    ) -> Block:
        """`extents` as `pack_extents` makes them."""
        return self._add([target, _flat(xattrs), extents, _flat(names)])

    def _add(self, value: list[Any]) -> Block:
        packed: bytes = msgpack.packb(value)
        block = Block(self._block_bytes, len(packed))
        self._block_bytes += len(packed)
        self._write(packed)
        return block

    def finish(
        self, records: Iterable[tuple[bytes, int, Block]], tar_size: int, lower_links: Sequence[int]
    ) -> bytes:
        """The file. `records`: DRAFT, nlink and block of each inode in order; `lower_links`: inodes."""
        lower = self._add(list(lower_links))
        self._close_page()
        inode_count = 0
        for draft, nlink, block in records:
            self._write(draft + _TAIL.pack(nlink, block.length, block.offset))
            inode_count += 1
        self._close_page()
        counts = _COUNTS.pack(inode_count, self._block_bytes, tar_size, lower.offset, lower.length)
        end = _HEADER.size + len(counts) + _PAGE_END.size * len(self._pages)
        table = bytearray()
        for page in self._pages:
            end += len(page)
            table += _PAGE_END.pack(end)
        header = _HEADER.pack(_MAGIC, VERSION, crc32(counts + table))
        return b"".join((header, counts, table, *self._pages))

    def _write(self, data: bytes) -> None:
        self._open_page += data
        while len(self._open_page) >= _PAGE_SIZE:
            self._pages.append(self._compressor.compress(self._open_page[:_PAGE_SIZE]))
            del self._open_page[:_PAGE_SIZE]

    def _close_page(self) -> None:
        if self._open_page:
            self._pages.append(self._compressor.compress(self._open_page))
            self._open_page.clear()


def pack_extents(extents: Iterable[Extent]) -> bytes:
    return b"".join(_EXTENT.pack(*extent) for extent in extents)


def _flat(pairs: Iterable[tuple[Any, Any]]) -> list[Any]:
    return [item for pair in pairs for item in pair]


def _runs(inodes: Sequence[int]) -> list[int]:
    runs: list[int] = []
    following = -1
    for inode in inodes:
        if inode == following:
            runs[-1] += 1
        else:
            runs += (inode, 1)
        following = inode + 1
    return runs


class _Leaf(NamedTuple):
    names: list[bytes]
    inodes: Sequence[int]


class _Directory(NamedTuple):
    parent: int
    name: bytes
    xattrs: Xattrs
    first_names: list[bytes]
    """Of the leaves; empty in a directory small enough to be one leaf."""
    leaf_blocks: list[Block]
    leaf: _Leaf


class _Node(NamedTuple):
    target: bytes
    xattrs: Xattrs
    extents: bytes
    names: tuple[tuple[int, bytes], ...]


_NO_NODE = _Node(b"", (), b"", ())


class _Cache:
    """What was decoded last, of all indexes of the process, bounded by weight in bytes. For any thread."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = Lock()
        self._items: OrderedDict[tuple[int, int], tuple[Any, int]] = OrderedDict()
        self._weight = 0

    def get(self, key: tuple[int, int]) -> Any:
        with self._lock:
            item = self._items.get(key)
            if item is None:
                return None
            self._items.move_to_end(key)
            return item[0]

    def put(self, key: tuple[int, int], value: object, weight: int) -> None:
        with self._lock:
            replaced = self._items.pop(key, None)
            self._items[key] = value, weight
            self._weight += weight - (replaced[1] if replaced else 0)
            while self._weight > self._capacity and len(self._items) > 1:
                self._weight -= self._items.popitem(last=False)[1][1]


class LayerIndex:
    """One layer as it is in its tar, whiteouts included. Threads may share it; the buffer must outlive it.

    Opening reads the header and the page table; pages are decoded when touched. Any method raises
    StoreDamaged, naming the layer index, where the bytes are not what was written. Inode numbers are those
    that this index gives, 0 to `len() - 1`; others are IndexError.
    """

    ROOT: ClassVar[int] = 0

    __slots__ = (
        "_block_bytes",
        "_block_pages",
        "_buffer",
        "_count",
        "_directory_space",
        "_last_page",
        "_last_record",
        "_leaf_space",
        "_lower_links",
        "_page_space",
        "_pages",
        "tar_size",
    )

    _cache: ClassVar[_Cache] = _Cache(_CACHE_WEIGHT)
    _spaces: ClassVar[Iterator[int]] = count()
    """Each index has its own first halves of the cache's keys: for pages, directories, leaves."""

    _count: int
    _block_bytes: int
    tar_size: int
    """Bytes of the uncompressed tar."""

    def __init__(self, buffer: _Buffer) -> None:
        """Raises StoreDamaged for bytes that are no index, a damaged one or one of another version."""
        self._buffer = buffer
        self._page_space, self._directory_space, self._leaf_space = (next(self._spaces) for _ in range(3))
        # What is asked of an inode comes in a row, and of its neighbours next: a step before the cache, which
        # takes a lock. Each is one tuple, so that threads see it whole.
        self._last_record: tuple[int | None, tuple[int, ...]] = (None, ())
        self._last_page: tuple[int | None, bytes] = (None, b"")
        pages_at = _HEADER.size + _COUNTS.size
        if len(buffer) < pages_at:
            raise _damaged("it is too short")
        magic, version, crc = _HEADER.unpack(buffer[: _HEADER.size])
        if magic != _MAGIC:
            raise _damaged("it begins with other bytes")
        if version != VERSION:
            raise _damaged(f"its version is {version}, not {VERSION}")
        counts = buffer[_HEADER.size : pages_at]
        self._count, self._block_bytes, self.tar_size, lower_offset, lower_length = _COUNTS.unpack(counts)
        self._lower_links = Block(lower_offset, lower_length)
        self._block_pages = -(-self._block_bytes // _PAGE_SIZE)
        page_count = self._block_pages + -(-self._count // _RECORDS_PER_PAGE)
        table_end = pages_at + page_count * _PAGE_END.size
        if not self._count or len(buffer) < table_end:
            raise _damaged("its counts are wrong")
        table = buffer[pages_at:table_end]
        if crc32(counts + table) != crc:
            raise _damaged("the checksum of its header is wrong")
        self._pages = array("Q", (table_end,))
        self._pages.frombytes(table)
        if self._pages.itemsize != _PAGE_END.size or self._pages[-1] != len(buffer):
            raise _damaged("its length is wrong")

    def __len__(self) -> int:
        """Inodes, the root included."""
        return self._count

    def attr(self, ino: int) -> Attr:
        """What stat(2) shows of the object in this layer alone.

        nlink counts names in this layer, for a directory 2 and its subdirectories; atime and ctime are mtime;
        the size of a symlink is its target's, of a directory 0.
        """
        mode, flags, uid, gid, mtime_fraction, mtime_s, size, rdev, source, nlink, _, _ = self._record(ino)
        mtime_ns = mtime_s * 1_000_000_000 + mtime_fraction
        blocks = 0
        if S_IFMT(mode) == S_IFREG:
            blocks = ((source if flags & EXTENTS else size) + 511) // 512
        return Attr(mode, uid, gid, size, rdev, nlink, blocks, mtime_ns, mtime_ns, mtime_ns)

    def mode(self, ino: int) -> int:
        """With the type; 0 for a lower link, whose type this layer does not say."""
        return self._record(ino)[0]

    def is_opaque(self, ino: int) -> bool:
        """Whether a directory hides the whole directory of that name in lower layers."""
        return bool(self._record(ino)[1] & OPAQUE)

    def is_implicit(self, ino: int) -> bool:
        """Whether the layer has no entry for a directory: its attributes say nothing about the image."""
        return bool(self._record(ino)[1] & IMPLICIT)

    def is_lower_link(self, ino: int) -> bool:
        """Whether it stands for the object that `target(ino)` names in lower layers."""
        return bool(self._record(ino)[1] & LOWER_LINK)

    def is_whiteout(self, ino: int) -> bool:
        """Whether it hides its name in lower layers. All whiteouts of a layer may be one inode."""
        record = self._record(ino)
        return S_IFMT(record[0]) == S_IFCHR and record[7] == WHITEOUT_RDEV

    def lookup(self, dir_ino: int, name: bytes) -> int | None:
        """The inode of a name, whiteouts like any other; None if there is none. Raises NotADirectory."""
        directory = self._directory(dir_ino)
        leaf = directory.leaf
        if directory.first_names:
            position = bisect_right(directory.first_names, name) - 1
            if position < 0:
                return None
            leaf = self._leaf(directory.leaf_blocks[position])
        names = leaf.names
        position = bisect_left(names, name)
        if position < len(names) and names[position] == name:
            return leaf.inodes[position]
        return None

    def children(self, dir_ino: int) -> list[tuple[bytes, int]]:
        """Names and inodes, sorted by name, whiteouts included. Raises NotADirectory."""
        directory = self._directory(dir_ino)
        children = list(zip(*directory.leaf, strict=True))
        for block in directory.leaf_blocks:
            children += zip(*self._leaf(block), strict=True)
        return children

    def parent(self, dir_ino: int) -> tuple[int, bytes]:
        """Directory and name of a directory; the root is in itself, without a name. Raises NotADirectory."""
        directory = self._directory(dir_ino)
        return directory.parent, directory.name

    def names(self, ino: int) -> tuple[tuple[int, bytes], ...]:
        """Directory and name of each name of an object with several; of a lower link also the only one."""
        return self._node(ino).names

    def target(self, ino: int) -> bytes:
        """Of a symlink, as the tar has it; of a lower link, the path in lower layers, no slash before it."""
        return self._node(ino).target

    def xattrs(self, ino: int) -> Xattrs:
        """Sorted by name."""
        if S_IFMT(self._record(ino)[0]) == S_IFDIR:
            return self._directory(ino).xattrs
        return self._node(ino).xattrs

    def extents(self, ino: int) -> tuple[Extent, ...]:
        """Where the content lies: ascending, no overlap; what is between reads as zeros up to the size."""
        record = self._record(ino)
        if S_IFMT(record[0]) != S_IFREG:
            return ()
        if not record[1] & EXTENTS:
            return (Extent(0, record[6], record[8]),) if record[6] else ()
        try:
            return tuple(map(Extent._make, _EXTENT.iter_unpack(self._node(ino).extents)))
        except StructError:
            raise _damaged("a list of extents is no such list") from None

    @property
    def lower_links(self) -> tuple[tuple[int, bytes, bytes], ...]:
        """Directory, name and target of each name that is a hard link to an object of lower layers."""
        inodes = self._value(self._lower_links)
        if not isinstance(inodes, list):
            raise _damaged("the list of lower links is no list")
        links: list[tuple[int, bytes, bytes]] = []
        for ino in inodes:
            node = self._node(self._checked(ino))
            links += ((directory, name, node.target) for directory, name in node.names)
        return tuple(links)

    # Decoding. What the file says is believed only after its type and range are checked.

    def _record(self, ino: int) -> tuple[int, ...]:
        """The fields of DRAFT and _TAIL."""
        last, record = self._last_record
        if last == ino:
            return record
        if not 0 <= ino < self._count:
            raise IndexError(f"inode {ino} of a layer that has {self._count}")
        page = self._page(self._block_pages + ino // _RECORDS_PER_PAGE)
        record = _RECORD.unpack_from(page, ino % _RECORDS_PER_PAGE * _RECORD.size)
        self._last_record = ino, record
        return record

    def _directory(self, ino: int) -> _Directory:
        directory: _Directory | None = self._cache.get((self._directory_space, ino))
        if directory is not None:
            return directory
        record = self._record(ino)
        if S_IFMT(record[0]) != S_IFDIR:
            raise NotADirectory(f"inode {ino} of the layer is no directory")
        parent, name, xattrs, table, names, runs = self._fields(Block(record[11], record[10]), 6)
        if type(name) is not bytes or not isinstance(table, list) or len(table) % 3:
            raise _damaged("a directory is none")
        first_names = _all_bytes(table[::3])
        blocks = [Block(*block) for block in zip(_all_ints(table[1::3]), _all_ints(table[2::3]), strict=True)]
        leaf = self._make_leaf(names, runs)
        directory = _Directory(self._checked(parent), name, _pairs(xattrs), first_names, blocks, leaf)
        weight = record[10] + 100 * (5 + len(leaf.names) + 2 * len(first_names))
        self._cache.put((self._directory_space, ino), directory, weight)
        return directory

    def _leaf(self, block: Block) -> _Leaf:
        key = self._leaf_space, block.offset
        leaf: _Leaf | None = self._cache.get(key)
        if leaf is None:
            leaf = self._make_leaf(*self._fields(block, 2))
            self._cache.put(key, leaf, block.length + 100 * (3 + len(leaf.names)))
        return leaf

    def _make_leaf(self, names: Any, runs: Any) -> _Leaf:
        names = _all_bytes(names)
        runs = _all_ints(runs)
        inodes: list[int] = []
        for first, length in zip(runs[::2], runs[1::2], strict=False):
            if not 0 <= first <= first + length <= self._count:
                raise _damaged("a directory has inodes that do not exist")
            if length > len(names) - len(inodes):
                raise _damaged("a directory has more inodes than names")
            if length == len(names):
                return _Leaf(names, range(first, first + length))
            inodes += range(first, first + length)
        if len(inodes) != len(names):
            raise _damaged("a directory has more names than inodes")
        return _Leaf(names, inodes)

    def _node(self, ino: int) -> _Node:
        record = self._record(ino)
        if not record[10] or S_IFMT(record[0]) == S_IFDIR:
            return _NO_NODE
        target, xattrs, extents, names = self._fields(Block(record[11], record[10]), 4)
        if type(target) is not bytes or type(extents) is not bytes:
            raise _damaged("a node is none")
        if not isinstance(names, list) or len(names) % 2:
            raise _damaged("a list of names is no such list")
        named = zip(map(self._checked, names[::2]), _all_bytes(names[1::2]), strict=True)
        return _Node(target, _pairs(xattrs), extents, tuple(named))

    def _checked(self, ino: Any) -> int:
        if type(ino) is not int or not 0 <= ino < self._count:
            raise _damaged("it names an inode that does not exist")
        return ino

    def _fields(self, block: Block, number: int) -> list[Any]:
        fields = self._value(block)
        if not isinstance(fields, list) or len(fields) != number:
            raise _damaged("a block has other fields")
        return fields

    def _value(self, block: Block) -> Any:
        """The msgpack value of a block."""
        offset, length = block
        end = offset + length
        if offset < 0 or not 0 < length <= _BLOCK_LIMIT or end > self._block_bytes:
            raise _damaged("a block lies outside")
        first, last = offset // _PAGE_SIZE, (end - 1) // _PAGE_SIZE
        start = first * _PAGE_SIZE
        if first == last:
            packed = self._page(first)[offset - start : end - start]
        else:
            packed = b"".join(map(self._page, range(first, last + 1)))[offset - start : end - start]
        try:
            return msgpack.unpackb(packed, raw=False, strict_map_key=True)
        except (ValueError, TypeError, msgpack.UnpackException):
            raise _damaged("a block is no msgpack") from None

    def _page(self, number: int) -> bytes:
        last, page = self._last_page
        if last != number:
            page = self._cached_page(number)
            self._last_page = number, page
        return page

    def _cached_page(self, number: int) -> bytes:
        key = self._page_space, number
        cached: bytes | None = self._cache.get(key)
        if cached is not None:
            return cached
        if number < self._block_pages:
            size = min(_PAGE_SIZE, self._block_bytes - number * _PAGE_SIZE)
        else:
            first = (number - self._block_pages) * _RECORDS_PER_PAGE
            size = min(_RECORDS_PER_PAGE, self._count - first) * _RECORD.size
        frame = self._buffer[self._pages[number] : self._pages[number + 1]]
        try:
            # decompress() takes as much memory as the frame says it needs.
            if get_frame_parameters(frame).content_size != size:
                raise _damaged(f"page {number} has another size")
            page = ZstdDecompressor().decompress(frame, allow_extra_data=False)
        except ZstdError:
            raise _damaged(f"page {number} does not decode") from None
        self._cache.put(key, page, len(page))
        return page


def _pairs(value: Any) -> Xattrs:
    flat = _all_bytes(value)
    if len(flat) % 2:
        raise _damaged("an xattr has no value")
    return tuple(zip(flat[::2], flat[1::2], strict=True))


def _all_bytes(value: Any) -> list[bytes]:
    if not isinstance(value, list) or any(type(item) is not bytes for item in value):
        raise _damaged("a list of names is no such list")
    return value


def _all_ints(value: Any) -> list[int]:
    if not isinstance(value, list) or any(type(item) is not int for item in value):
        raise _damaged("a list of numbers is no such list")
    return value


def _damaged(what: str) -> StoreDamaged:
    return StoreDamaged(
        f"layer index is damaged ({what}): unmount, then `fusestore check --repair` makes it again"
    )
