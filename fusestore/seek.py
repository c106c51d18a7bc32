"""Seek points of a layer: the table of its spans. Blocking: preads its own file.

The uncompressed tar is cut into *spans* of about 1 MiB, each with the CRC-32 of its bytes. A span with a
*restart* can be decoded without what stands before it; one without is reached by decoding from the nearest
restart before it. The spans from one restart up to the next are a *run*::

    tar    |  span 0   |  span 1   |   span 2   |  span 3  |  span 4  |
    blob   ^restart 0  ^restart 1  ^restart 2                ^restart 4
           run 0       run 1       run 2: spans 2 and 3      run 4

One table serves all formats: gzip restarts at the ends of deflate blocks (with the 32 KiB before them, the
window), zstd at the starts of frames, and a stream that offers none of these has one run. A run whose restart
is at the end of the blob is zeros: padding of the tar that the blob leaves out (blobs.py). Of a blob that is
not compressed each span is a run: what it has the table for is the checksums.

The file, version 1, little endian::

    header    48 bytes   magic, version, compression, number of spans, sizes of the tar, the blob and the
                         windows, CRC-32 of the records, CRC-32 of the header
    records   32 bytes   of each span: offset in the tar, offset in the blob, place of its window, CRC-32 of
                         the span, length of the window, bits of the blob's byte before the restart, flags
                         (1: restart)
    windows              zstd frames with a checksum each

A reader refuses (StoreDamaged, naming the file) another magic or version, a wrong CRC-32, a file of another
length, and records that contradict each other; a window only when it is asked for. The file is derived:
removing it costs the time to read the blob once. It is read by pread and not mapped: a mapped file that
somebody truncates ends the process.
"""

import os
import struct
from bisect import bisect_right
from itertools import pairwise
from typing import Final, Literal, NamedTuple

import zstandard
from isal.isal_zlib import crc32

from .durable import is_damage
from .errors import StoreDamaged

__all__ = ["Compression", "FilePath", "Restart", "SPAN", "SPAN_MAX", "SeekTable", "SpanCutter", "WINDOW"]

Compression = Literal["none", "gzip", "zstd"]
FilePath = str | bytes

SPAN: Final = 1 << 20
"""Bytes of output after which a restart is wanted: the price of a random read against the windows' size."""
SPAN_MAX: Final = 2 << 20
"""A span that meets no restart is cut here; the cache holds whole spans."""
SPAN_LIMIT: Final = 8 << 20
"""The longest span a reader believes in: it allocates a span at a time."""
SPANS_LIMIT: Final = 1 << 20
"""A terabyte of tar; bounds what opening a table allocates."""
WINDOW: Final = 32768
"""How far back a deflate block may refer (RFC 1951, section 2)."""

_MAGIC = b"FSSPANS\n"
_VERSION = 1
_HEADER = struct.Struct("<8sHBxIQQQII")
_RECORD = struct.Struct("<QQQIHBB")
_CODES: dict[Compression, int] = {"none": 0, "gzip": 1, "zstd": 2}
_RESTART = 1


class Restart(NamedTuple):
    """Where decoding can begin: at bit `bit` (0 is the lowest) of the byte `in_offset` of the blob."""

    in_offset: int
    bit: int
    window: bytes
    """The output just before, at most WINDOW bytes; empty at the start of a gzip member or a zstd frame."""


class SpanCutter:
    """Cuts decoded output into spans and makes the table of them. Its owner is one decoding pass.

    The decoder asks `wants_restart`, and calls `restart` where decoding could begin again; whoever takes the
    output calls `write` with all of it. `restart` speaks of the place that `write` has reached.
    """

    def __init__(self) -> None:
        self.tar_size = 0
        """Bytes written so far."""
        self._records: list[tuple[int, int, int, int, int, int, int]] = []
        self._windows: list[bytes] = []
        self._windows_size = 0
        self._compress = zstandard.ZstdCompressor(level=3, write_checksum=True).compress
        self._run_start = -SPAN
        self._restart: Restart | None = None
        self._length = 0
        self._crc32 = 0

    @property
    def wants_restart(self) -> bool:
        """Whether SPAN bytes have gone by since the last restart (true before the first)."""
        return self.tar_size - self._run_start >= SPAN

    def restart(self, in_offset: int, bit: int, history: bytes | memoryview) -> None:
        """Begin a run here. `history`: what the window must hold; copied."""
        self._end_span()
        self._run_start = self.tar_size
        self._restart = Restart(in_offset, bit, bytes(history))

    def write(self, data: bytes | memoryview) -> None:
        while len(data):
            if self._length == SPAN_MAX:
                self._end_span()
            piece = data[: SPAN_MAX - self._length]
            self._crc32 = crc32(piece, self._crc32)
            self._length += len(piece)
            self.tar_size += len(piece)
            data = data[len(piece) :]

    def finish(self, compression: Compression, blob_size: int) -> bytes:
        """The table file's bytes, for the blob just decoded."""
        self._end_span()
        records = b"".join(_RECORD.pack(*record) for record in self._records)
        header = _HEADER.pack(
            _MAGIC,
            _VERSION,
            _CODES[compression],
            len(self._records),
            self.tar_size,
            blob_size,
            self._windows_size,
            crc32(records),
            0,
        )[:-4]
        return b"".join([header, crc32(header).to_bytes(4, "little"), records, *self._windows])

    def _end_span(self) -> None:
        if self._length == 0:
            return
        in_offset = bit = flags = 0
        window = b""
        if self._restart:
            in_offset, bit, history = self._restart
            flags = _RESTART
            window = self._compress(history) if history else b""
        start = self.tar_size - self._length
        place = (self._windows_size, self._crc32, len(window))
        self._records.append((start, in_offset, *place, bit, flags))
        self._windows.append(window)
        self._windows_size += len(window)
        self._restart = None
        self._length = self._crc32 = 0


class SeekTable:
    """The table of a layer's spans, open. Spans are numbered from 0; offsets are in the tar.

    The records are in memory (about 200 bytes a span), the windows on disk. Immutable; safe from any thread;
    `close` gives the descriptor back, after which only `restart` fails.
    """

    def __init__(self, path: FilePath, tar_size: int) -> None:
        """Raises StoreDamaged when there is no sound table at `path`, made for a tar of `tar_size` bytes.

        OSError where it could not be read.
        """
        self._where = os.fsdecode(path)
        self._fd = -1
        self.tar_size = tar_size
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._load(os.fstat(self._fd).st_size)
        except OSError as error:
            self.close()
            if not is_damage(error):
                raise
            raise self._damaged(error.strerror or "unreadable") from error
        except StoreDamaged:
            self.close()
            raise

    def close(self) -> None:
        """Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __len__(self) -> int:
        return len(self.crc32s)

    def find(self, offset: int) -> int:
        """The span that holds byte `offset`, which is below `tar_size`."""
        return bisect_right(self.starts, offset) - 1

    def run(self, span: int) -> tuple[int, int]:
        """The run of `span`, as a range of spans: first (the one with the restart) and one past the last."""
        place = bisect_right(self._restarts, span)
        end = self._restarts[place] if place < len(self._restarts) else len(self)
        return self._restarts[place - 1], end

    def restart(self, span: int) -> Restart:
        """The restart of `span`, the first of a run. Raises StoreDamaged when its window is damaged."""
        in_offset, window_offset, window_length, bit = self._places[span]
        if window_length == 0:
            return Restart(in_offset, bit, b"")
        try:
            stored = os.pread(self._fd, window_length, self._windows_offset + window_offset)
            # max_output_size holds only where the frame does not say its size, and then it is a limit.
            if zstandard.frame_content_size(stored) > WINDOW:
                raise self._damaged(f"the window of span {span} is too long")
            window = zstandard.ZstdDecompressor().decompress(stored, max_output_size=WINDOW)
        except zstandard.ZstdError as error:
            raise self._damaged(f"the window of span {span}: {error}") from error
        return Restart(in_offset, bit, window)

    def _load(self, file_size: int) -> None:
        header = os.pread(self._fd, _HEADER.size, 0)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise self._damaged("not a table of seek points")
        if crc32(header[:-4]) != int.from_bytes(header[-4:], "little"):
            raise self._damaged("wrong checksum of the header")
        _, version, code, count, tar_size, blob_size, windows_size, records_crc32, _ = _HEADER.unpack(header)
        if version != _VERSION:
            raise self._damaged(f"version {version}, where this program reads version {_VERSION}")
        names = {code: name for name, code in _CODES.items()}
        self._windows_offset = _HEADER.size + count * _RECORD.size
        if count > SPANS_LIMIT or code not in names or file_size != self._windows_offset + windows_size:
            raise self._damaged("counts that do not fit the file")
        records = os.pread(self._fd, count * _RECORD.size, _HEADER.size)
        if crc32(records) != records_crc32:
            raise self._damaged("wrong checksum of the records")
        self.compression: Compression = names[code]
        self.blob_size: int = blob_size
        if tar_size != self.tar_size:
            raise self._damaged(f"made for a tar of {tar_size} bytes, where this one has {self.tar_size}")
        self._read_records(records, windows_size)

    def _read_records(self, records: bytes, windows_size: int) -> None:
        starts: list[int] = []
        crc32s: list[int] = []
        restarts: list[int] = []
        places: dict[int, tuple[int, int, int, int]] = {}
        for span, record in enumerate(_RECORD.iter_unpack(records)):
            start, in_offset, window_offset, span_crc32, window_length, bit, flags = record
            if flags == _RESTART:
                restarts.append(span)
                places[span] = (in_offset, window_offset, window_length, bit)
            outside = in_offset > self.blob_size or window_offset + window_length > windows_size
            if outside or flags > _RESTART or bit > 7:
                raise self._damaged(f"the record of span {span} contradicts itself")
            starts.append(start)
            crc32s.append(span_crc32)
        if bool(starts) != bool(self.tar_size):
            raise self._damaged("spans that do not fit the size of the tar")
        if starts and (starts[0] != 0 or restarts[:1] != [0]):
            raise self._damaged("no restart at the beginning")
        starts.append(self.tar_size)
        if not all(0 < after - before <= SPAN_LIMIT for before, after in pairwise(starts)):
            raise self._damaged("spans out of order")
        self.starts = tuple(starts)
        """Where each span begins, and after the last one the size of the tar."""
        self.crc32s = tuple(crc32s)
        self._restarts = tuple(restarts)
        self._places = places

    def _damaged(self, what: str) -> StoreDamaged:
        return StoreDamaged(f"seek points {self._where}: {what}; remove it, it is made again from the blob")
