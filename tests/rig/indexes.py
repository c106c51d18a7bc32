"""Layer indexes taken apart and put together by their documented format, to damage them inside. Pure."""

import struct
from itertools import pairwise
from zlib import crc32

import zstandard

from fusestore.errors import NotADirectory, StoreDamaged
from fusestore.layer import LayerIndex

__all__ = ["decoded_pages", "repacked", "touch_everything"]

HEADER = struct.Struct("<8sII")
COUNTS = struct.Struct("<QQQQI")


def decoded_pages(index: bytes) -> tuple[bytes, list[bytes]]:
    """What is before the page table, and the pages."""
    table_at = HEADER.size + COUNTS.size
    inodes, block_bytes, _, _, _ = COUNTS.unpack(index[HEADER.size : table_at])
    count = -(-block_bytes // 65_536) + -(-inodes // 1024)
    ends = struct.unpack_from(f"<{count}Q", index, table_at)
    bounds = pairwise((table_at + 8 * count, *ends))
    return index[:table_at], [zstandard.decompress(index[start:end]) for start, end in bounds]


def repacked(head: bytes, pages: list[bytes]) -> bytes:
    """An index all of whose checksums are right, whatever is in it."""
    compressor = zstandard.ZstdCompressor(write_checksum=True)
    frames = [compressor.compress(page) for page in pages]
    end = len(head) + 8 * len(frames)
    table = b"".join(struct.pack("<Q", end := end + len(frame)) for frame in frames)
    counts = head[HEADER.size :]
    magic, version, _ = HEADER.unpack(head[: HEADER.size])
    return b"".join((HEADER.pack(magic, version, crc32(counts + table)), counts, table, *frames))


def touch_everything(data: bytes, most: int = 64) -> bool:
    """Asks all there is to ask. Says whether it was damaged; any other exception fails the test."""
    damaged = False
    try:
        index = LayerIndex(data)
    except StoreDamaged:
        return True
    for inode in range(min(len(index), most)):
        for ask in (
            index.attr, index.mode, index.is_opaque, index.is_implicit, index.is_whiteout,
            index.is_lower_link,
            index.xattrs, index.target, index.extents, index.names, index.parent, index.children,
            lambda directory: index.lookup(directory, b"m"),
        ):  # fmt: skip
            try:
                ask(inode)
            except StoreDamaged:
                damaged = True
            except NotADirectory:
                pass
    try:
        assert isinstance(index.lower_links, tuple)
    except StoreDamaged:
        damaged = True
    return damaged
