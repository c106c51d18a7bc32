"""The chunks of a layer that is not all here: which bytes of the blob hold which content. Pure.

The file, version 1, little endian::

    header    magic, version, CRC-32 of all that follows it, compression, bytes of the blob, bytes of content,
              the end of what is to be read ahead, number of chunks
    starts    8 bytes of each chunk: where its content begins in the space that the layer's index speaks of
    records   of each chunk: where its compressed bytes begin and end in the blob, how much decompressed comes
              before it there, its length, its sha256

Starts ascend, from 0, each chunk ending where the next begins. A reader refuses (StoreDamaged) all else: what
the starts say when the file is opened, what a record says when it is asked for.
"""

import sys
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from struct import Struct
from typing import Final
from zlib import crc32

from .errors import StoreDamaged
from .toc import CHUNK_MAX, TOC_MAX, Chunk

__all__ = ["ChunkTable", "pack_chunks"]

_MAGIC = b"FSCHUNK\n"
_VERSION: Final = 1
_HEADER = Struct("<8sII")
_COUNTS = Struct("<IQQQQ")
_RECORD = Struct("<QQII32s")
_CODES = {"gzip": 1, "zstd": 2}


def pack_chunks(
    chunks: Sequence[Chunk], *, compression: str, blob_size: int, size: int, prefetch_end: int
) -> bytes:
    """The file. `compression`: "gzip" or "zstd"."""
    starts = array("Q", (chunk.start for chunk in chunks))
    if sys.byteorder == "big":
        starts.byteswap()
    records = b"".join(
        _RECORD.pack(chunk.offset, chunk.end, chunk.inner, chunk.size, chunk.digest) for chunk in chunks
    )
    counts = _COUNTS.pack(_CODES[compression], blob_size, size, prefetch_end, len(chunks))
    body = counts + starts.tobytes() + records
    return _HEADER.pack(_MAGIC, _VERSION, crc32(body)) + body


class ChunkTable:
    """The file, in memory: 64 bytes a chunk. Chunks are numbered from 0. Immutable."""

    def __init__(self, data: bytes, where: str) -> None:
        """Raises StoreDamaged, naming `where`."""
        self._where = where
        body = memoryview(data)[_HEADER.size :]
        if len(body) < _COUNTS.size or _HEADER.unpack_from(data) != (_MAGIC, _VERSION, crc32(body)):
            raise _damaged(where)
        code, self.blob_size, self.size, self.prefetch_end, count = _COUNTS.unpack_from(body)
        ends = _COUNTS.size + 8 * count
        if len(body) != ends + _RECORD.size * count or code not in _CODES.values():
            raise _damaged(where)
        self.compression = next(name for name, value in _CODES.items() if value == code)
        self._starts = array("Q")
        self._starts.frombytes(body[_COUNTS.size : ends])
        if sys.byteorder == "big":
            self._starts.byteswap()
        self._starts.append(self.size)
        self._records = body[ends:]
        if self._starts[0] or any(before >= after for before, after in pairwise(self._starts)):
            raise _damaged(where)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def find(self, offset: int) -> int:
        """The chunk that holds the byte of content at `offset`, which is below `size`."""
        return bisect_right(self._starts, offset) - 1

    def __getitem__(self, number: int) -> Chunk:
        """Raises StoreDamaged."""
        start, end = self._starts[number], self._starts[number + 1]
        chunk = Chunk(start, *_RECORD.unpack_from(self._records, number * _RECORD.size))
        # A table of contents is the longest there is.
        if (
            not chunk.offset < chunk.end <= min(self.blob_size, chunk.offset + TOC_MAX)
            or chunk.inner > CHUNK_MAX
            or chunk.size != end - start
            or chunk.size > TOC_MAX
        ):
            raise _damaged(self._where)
        return chunk


def _damaged(where: str) -> StoreDamaged:
    return StoreDamaged(f"{where} is damaged: pull the image again")
