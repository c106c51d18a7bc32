"""Layer blobs: taking one in, and reading ranges of the tar inside it. Blocking; no path is spelt here.

Taking in (`ingest`, `derive`) is one pass over the blob, whatever its compression::

    source ─ read ─┬─ sink                       the caller's file
                   ├─ sha256                     → blob digest
                   └─ Decoder ─┬─ sha256         → diff_id
                               ├─ SpanCutter     → the table of seek points
                               └─ TarScanner ─ LayerBuilder → the layer's index

Its time is that of the decoder and the hashes, which release the GIL: run one thread a layer. It keeps
nothing but what it returns, and any input ends in `Ingested` or in LayerRefused.

A blob may lack the zeros at the end of the tar whose diff_id the config has: skopeo 1.9.3 (Debian 12) drops
what follows the two end blocks when it writes zstd:chunked, and so does all that was built with
containers/storage from before its pull request 1772. Where zeros up to the end of the tar's record make the
diff_id come true (`_missing_padding`), the padded tar is the layer: scanner, size and table, in which the
zeros are a run of their own (seek.py), know no other. Where none do, the blob is refused.

Reading is a `LayerReader`: of a plain tar `_PlainReader`, of a compressed one `_SpanReader` over a
`SeekTable` (where decoding can begin), a `SpanFile` (what was decoded before) and the blob. Blob, table and
cache file are kept open: a reader goes on working when their names are removed, and goes on with another blob
of that name only when told (`LayerReader.reopen`). Every decoded span is
compared with its CRC-32 before anyone sees it, so a damaged blob is an error for its damaged spans, and never
wrong data. Of a tar that is a file a span is compared when something of it is read first, by this reader.
"""

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Final, Protocol

from isal.isal_zlib import crc32

from .durable import is_damage
from .errors import LayerRefused, StoreDamaged
from .layer import LayerBuilder
from .nodes import Digest
from .seek import Compression, FilePath, SeekTable, SpanCutter
from .spancache import SpanCache, SpanFile
from .streams import HEAD, Decoder, GzipDecoder, PlainDecoder, ReadAt, RunDecoder, ZstdDecoder, detect
from .syscalls import pread_now
from .tar import TarLimits, TarScanner

if TYPE_CHECKING:
    from _hashlib import HASH

__all__ = ["Ingested", "LayerReader", "Source", "derive", "ingest", "open_reader", "unpack"]

_READ: Final = 128 << 10
_BLOCK: Final = 512
_RECORD: Final = 20 * _BLOCK
"""What tar(1) pads a tar to a multiple of, unless told otherwise (-b)."""

_RUN_LOCKS: Final = 16
"""The runs of a layer share this many locks, so a run may wait for another that it has nothing to do with."""


class Source(Protocol):
    """What a blob is read from."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes; none only at the end."""


@dataclass(frozen=True, slots=True)
class Ingested:
    """What one pass over a blob found out."""

    blob: Digest
    blob_size: int
    diff_id: Digest
    """The digest of the uncompressed tar (OCI image-spec, config.md, rootfs.diff_ids)."""
    tar_size: int
    """Bytes of that tar: more than the blob decompresses to, where it leaves out the padding."""
    index: bytes
    """The file `fusestore.layer.LayerIndex` reads."""
    seek: bytes
    """The file `fusestore.seek.SeekTable` reads."""
    compression: Compression


def ingest(
    source: Source,
    *,
    sink: Callable[[bytes], object] | None = None,
    expected_blob: Digest | None = None,
    expected_diff_id: Digest | None = None,
    limits: TarLimits | None = None,
    progress: Callable[[int], object] | None = None,
) -> Ingested:
    """Read a layer blob to its end. `sink` gets all of its bytes, `progress` the length of each piece read.

    Only with `expected_diff_id` can it be seen that the tar lacks its padding, and then it is added.

    Raises LayerRefused when the blob is no layer, breaks a limit, or has another digest than expected; what
    `sink` wrote until then is the caller's to remove.
    """
    limits = limits or TarLimits()
    blob_hash, tar_hash = sha256(), sha256()
    spans, scanner, builder = SpanCutter(), TarScanner(limits), LayerBuilder()
    blob_size = 0

    def take(piece: bytes | memoryview) -> None:
        spans.write(piece)
        tar_hash.update(piece)
        for entry in scanner.feed(piece):
            builder.add(entry)

    def read() -> bytes:
        nonlocal blob_size
        data = source.read(_READ)
        blob_size += len(data)
        blob_hash.update(data)
        if sink and data:
            sink(data)
        if progress and data:
            progress(len(data))
        return data

    head = data = read()
    while data and len(head) < HEAD:
        data = read()
        head += data
    compression = detect(head)
    decoder = _decoder(compression, spans)
    data = head
    while data:
        for piece in decoder.feed(data):
            take(piece)
        data = read()
    decoder.close()
    # Not of a plain tar: that is its own diff_id.
    if expected_diff_id is not None and compression != "none":
        padding = _missing_padding(tar_hash, spans.tar_size, expected_diff_id)
        if padding:
            spans.restart(blob_size, 0, b"")
            take(bytes(padding))
    scanner.close()
    blob = Digest("sha256:" + blob_hash.hexdigest())
    diff_id = Digest("sha256:" + tar_hash.hexdigest())
    _compare("blob", blob, expected_blob)
    _compare("uncompressed layer (diff_id)", diff_id, expected_diff_id)
    return Ingested(
        blob=blob,
        blob_size=blob_size,
        diff_id=diff_id,
        tar_size=spans.tar_size,
        index=builder.finish(spans.tar_size),
        seek=spans.finish(compression, blob_size),
        compression=compression,
    )


def derive(
    blob_path: FilePath,
    *,
    blob: Digest | None = None,
    diff_id: Digest | None = None,
    limits: TarLimits | None = None,
    progress: Callable[[int], object] | None = None,
) -> Ingested:
    """The same pass over a blob of the store, to make its derived files again.

    Raises StoreDamaged when the blob is not there, or not the one it should be; OSError where it could not be
    read.
    """
    try:
        with open(blob_path, "rb", buffering=0) as source:
            return ingest(
                source, expected_blob=blob, expected_diff_id=diff_id, limits=limits, progress=progress
            )
    except (OSError, LayerRefused) as error:
        raise _of_blob(error, blob_path) from error


def unpack(
    blob_path: FilePath, seek_path: FilePath, diff_id: Digest, tar_size: int, sink: Callable[[bytes], object]
) -> None:
    """Gives `sink` the whole tar of a compressed layer, in pieces. Two threads share the work.

    Raises StoreDamaged where blob or table are damaged or the tar has another digest than `diff_id`, OSError
    where they could not be read, and what `sink` raises; what that was given until then is no tar.
    """
    tar_hash = sha256()
    with (
        open(blob_path, "rb", buffering=0) as blob,
        closing(SeekTable(seek_path, tar_size)) as table,
        ThreadPoolExecutor(1) as decoding,
    ):
        spans = _spans(table, lambda length, offset: os.pread(blob.fileno(), length, offset))
        try:
            ahead = decoding.submit(next, spans, None)
            while (data := ahead.result()) is not None:
                ahead = decoding.submit(next, spans, None)
                tar_hash.update(data)
                sink(data)
        except LayerRefused as error:
            raise _of_blob(error, blob_path) from error
    if f"sha256:{tar_hash.hexdigest()}" != diff_id:
        raise _damaged(blob_path, f"it has not the content {diff_id}")


def _spans(table: SeekTable, read_at: ReadAt) -> Iterator[bytes]:
    """All spans, decoded in order. Raises LayerRefused."""
    span = 0
    while span < len(table):
        run, run_end = table.run(span)
        decoder = RunDecoder(table, run, read_at)
        while decoder.next_span < run_end:
            yield decoder.take()
        span = run_end


def _decoder(compression: Compression, spans: SpanCutter) -> Decoder:
    if compression == "gzip":
        return GzipDecoder(spans)
    if compression == "zstd":
        return ZstdDecoder(spans)
    return PlainDecoder(spans)


def _missing_padding(tar_hash: "HASH", tar_size: int, diff_id: Digest) -> int:
    """How many zeros make a tar the one of `diff_id`; 0 where it is that already, or no padding makes it so.

    Tried are whole blocks, to the end of the record in which two end blocks end: they may be missing too.
    """
    padded = tar_hash.copy()
    record_end = -(-(tar_size + 2 * _BLOCK) // _RECORD) * _RECORD
    for size in range(tar_size, record_end + 1, _BLOCK):
        if f"sha256:{padded.hexdigest()}" == diff_id:
            return size - tar_size
        padded.update(bytes(_BLOCK))
    return 0


def _compare(what: str, found: Digest, expected: Digest | None) -> None:
    if expected is not None and found != expected:
        raise LayerRefused(f"the {what} has digest {found}, not {expected}")


def _damaged(blob_path: FilePath, what: str) -> StoreDamaged:
    return StoreDamaged(f"layer blob {os.fsdecode(blob_path)}: {what}; import the image again")


def _of_blob(error: OSError | LayerRefused, blob_path: FilePath) -> OSError | StoreDamaged:
    """What to raise for an error in reading a blob."""
    if isinstance(error, LayerRefused):
        return _damaged(blob_path, str(error))
    if is_damage(error):
        return _damaged(blob_path, error.strerror or "unreadable")
    return error


class LayerReader(ABC):
    """Random access to the uncompressed tar of one layer.

    Thread-safe, but for `close`: the caller sees to it that no read runs beside it or comes after it. One
    that nobody refers to any more closes itself: layers are shared, and none of those who share one knows the
    last.
    """

    is_remote = False
    """Whether `read` may have to wait for a registry."""

    def __init__(self, blob_fd: int, blob_path: FilePath, size: int) -> None:
        self.size = size
        """Bytes of the tar."""
        self._blob_fd = blob_fd
        self._blob_path = blob_path

    @abstractmethod
    def read_now(self, offset: int, length: int) -> bytes | None:
        """As `read`, where that takes no decompression and no waiting for disk or thread; else None.

        For an event loop: it costs one pread.
        """

    @abstractmethod
    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes of the tar at `offset`; fewer only at its end.

        Raises StoreDamaged where blob or table are damaged, OSError where they could not be read; other
        ranges go on working.
        """

    def reopen(self) -> None:
        """Read, from now on, what is at its paths: an import replaces a damaged blob, and local tars come and
        go.

        Beside reads. Raises StoreDamaged where there is none any more, OSError where it could not be opened;
        then it goes on with the old one.
        """
        found = _open_blob(self._blob_path)
        try:
            os.dup2(found, self._blob_fd, inheritable=False)
        finally:
            os.close(found)

    def give_back(self) -> None:
        """Have the kernel drop what it caches of the layer's files, for who keeps what was read.

        What is not on disk yet goes there first, and is dropped by a later call. Beside reads.
        """
        os.posix_fadvise(self._blob_fd, 0, 0, os.POSIX_FADV_DONTNEED)

    @abstractmethod
    def close(self) -> None:
        """Idempotent."""

    def __del__(self) -> None:
        self.close()


def open_reader(
    blob_path: FilePath,
    seek_path: FilePath,
    cache: SpanCache,
    cache_path: FilePath,
    tar_size: int,
    tar_path: FilePath | None = None,
) -> LayerReader:
    """A reader of the blob, with its table in `seek_path`.

    `cache_path` need not exist. Where the whole tar is at `tar_path`, that is read instead of the blob.
    Raises StoreDamaged when blob or table are missing, or the table is damaged or made for a tar of another
    size; OSError where they could not be opened.
    """
    blob_fd = _open_blob(blob_path)
    with ExitStack() as on_error:
        on_error.callback(os.close, blob_fd)
        table = SeekTable(seek_path, tar_size)
        on_error.callback(table.close)
        if table.compression == "none":
            table.close()  # it has no windows
            on_error.pop_all()
            return _PlainReader(blob_fd, blob_path, table)
        cached = cache.open(cache_path, table)
        on_error.pop_all()
    return _SpanReader(blob_fd, blob_path, table, cached, tar_path)


def _open_blob(path: FilePath) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _of_blob(error, path) from error


class _PlainReader(LayerReader):
    """The blob is the tar, or lies beside it."""

    def __init__(self, blob_fd: int, blob_path: FilePath, table: SeekTable) -> None:
        """Of the table only spans and checksums are used."""
        super().__init__(blob_fd, blob_path, table.tar_size)
        self._table = table
        self._is_sound = bytearray(len(table))
        """Of each span, whether it was compared with its checksum. Threads may do so twice."""

    def _damaged(self, what: str) -> StoreDamaged:
        return _damaged(self._blob_path, what)

    def reopen(self) -> None:
        super().reopen()
        self._is_sound = bytearray(len(self._table))

    def read_now(self, offset: int, length: int) -> bytes | None:
        end = min(offset + length, self.size)
        if offset >= end:
            return b""
        if 0 in self._is_sound[self._table.find(offset) : self._table.find(end - 1) + 1]:
            return None
        data = pread_now(self._blob_fd, end - offset, offset)
        return None if data is None or len(data) < end - offset else data

    def read(self, offset: int, length: int) -> bytes:
        end = min(offset + length, self.size)
        if offset >= end:
            return b""
        is_sound = self._is_sound
        for span in range(self._table.find(offset), self._table.find(end - 1) + 1):
            if not is_sound[span]:
                self._compare(span)
                is_sound[span] = True
        return self._read(offset, end)

    def _compare(self, span: int) -> None:
        start, end = self._table.starts[span], self._table.starts[span + 1]
        if crc32(self._read(start, end)) != self._table.crc32s[span]:
            raise self._damaged(f"bytes {start} to {end} have another checksum than when it came")

    def _read(self, offset: int, end: int) -> bytes:
        data = os.pread(self._blob_fd, end - offset, offset)
        while len(data) < end - offset:
            more = os.pread(self._blob_fd, end - offset - len(data), offset + len(data))
            if not more:
                raise self._damaged("truncated")
            data += more
        return data

    def close(self) -> None:
        fd, self._blob_fd = self._blob_fd, -1
        if fd >= 0:
            os.close(fd)


class _LocalTar(_PlainReader):
    """What `unpack` gave. Not reopened: there is another one for another file."""

    def _damaged(self, what: str) -> StoreDamaged:
        return StoreDamaged(f"{os.fsdecode(self._blob_path)}: {what}: remove it and mount anew")


def _open_tar(path: FilePath, table: SeekTable) -> _LocalTar | None:
    """None where it is not there, or cannot be read: the blob has it too."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    tar = _LocalTar(fd, path, table)
    return tar if os.fstat(fd).st_size == table.tar_size else None


class _SpanReader(LayerReader):
    """The blob is compressed: spans come from the cache, or else are decoded into it. None of this is needed
    while there is a local tar.

    The spans of a run are decoded by one thread at a time, under the run's lock; who finds the lock taken
    waits, and then finds the span in the cache. A decode stops at the span that was asked for; if the run
    goes on, the decoder is parked there, so that reading on does not decode from the restart again.
    """

    def __init__(
        self,
        blob_fd: int,
        blob_path: FilePath,
        table: SeekTable,
        cached: SpanFile,
        tar_path: FilePath | None,
    ) -> None:
        super().__init__(blob_fd, blob_path, table.tar_size)
        self._tar_path = tar_path
        self._tar: _LocalTar | None = None
        """Closes itself after the last read of it."""
        self._table = table
        self._cached = cached
        self._run_locks = tuple(threading.Lock() for _ in range(_RUN_LOCKS))
        self._unstored: tuple[int, bytes] | None = None
        """The last span decoded that the cache had no room for: what follows in it is usually read next."""
        self._find_tar()

    def _find_tar(self) -> None:
        self._tar = None if self._tar_path is None else _open_tar(self._tar_path, self._table)
        if self._tar is not None:
            self._unstored = None
            self._cached.clear()

    def reopen(self) -> None:
        self._find_tar()
        super().reopen()

    def give_back(self) -> None:
        super().give_back()
        tar = self._tar
        if tar is not None:
            tar.give_back()
        self._cached.give_back()

    def read_now(self, offset: int, length: int) -> bytes | None:
        tar = self._tar
        if tar is not None:
            return tar.read_now(offset, length)
        end = min(offset + length, self.size)
        if offset >= end:
            return b""
        data = self._cached.read(offset, end, waits=False)
        if data is not None:
            self._cached.count(is_hit=True)
        return data

    def read(self, offset: int, length: int) -> bytes:
        tar = self._tar
        if tar is not None:
            return tar.read(offset, length)
        end = min(offset + length, self.size)
        starts = self._table.starts
        pieces = []
        while offset < end:
            span = self._table.find(offset)
            stop = min(end, starts[span + 1])
            data = self._cached.read(offset, stop)
            if data is None:
                data = self._span(span)[offset - starts[span] : stop - starts[span]]
            else:
                self._cached.count(is_hit=True)
            pieces.append(data)
            offset = stop
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        fd, self._blob_fd = self._blob_fd, -1
        if fd >= 0:
            self._cached.close()
            self._table.close()
            os.close(fd)

    def _span(self, span: int) -> bytes:
        """A whole span that could not be read from the cache."""
        run, run_end = self._table.run(span)
        with self._run_locks[run % _RUN_LOCKS]:
            kept = self._unstored
            data = kept[1] if kept and kept[0] == span else self._cached.load(span)
            self._cached.count(is_hit=data is not None)
            return self._decode(run, run_end, span) if data is None else data

    def _decode(self, run: int, run_end: int, wanted: int) -> bytes:
        """Decode up to and with span `wanted`, and keep what comes by. Under the run's lock."""
        decoder = self._cached.unpark(run)
        if decoder is None or decoder.next_span > wanted:  # What it decoded has been evicted.
            decoder = RunDecoder(self._table, run, self._read_blob)
        while True:
            span = decoder.next_span
            try:
                data = decoder.take()
            except LayerRefused as error:
                if span < wanted:
                    continue
                raise _damaged(self._blob_path, str(error)) from error
            stored = self._cached.store(span, data)
            if span == wanted:
                self._unstored = None if stored else (span, data)
                if decoder.next_span < run_end:
                    self._cached.park(run, decoder)
                return data

    def _read_blob(self, length: int, offset: int) -> bytes:
        return os.pread(self._blob_fd, length, offset)
