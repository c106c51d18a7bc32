"""Layers that are read from a registry in parts, before their blobs are here. Blocking.

`read_parts` makes what such a layer is shown by of its table of contents (fusestore.toc); a `LazyReader`
serves its content::

    content ─ chunk ─┬─ in memory: what was decompressed just now
                     ├─ in `part`, the sparse file that is to become the blob
                     └─ in the registry: a range of the blob, kept in `part`

The rule a maintainer must not break: a chunk is compared with its digest after every decompression, wherever
its bytes came from. That is why `part` needs no care, whatever crash, power cut or registry wrote it.

Where the registry does not give what is missing, NotFetched says so, and for a moment all else that is
missing is not even asked for (`Origins`): who waits for nothing is in nobody's way. Then it is tried again.
"""

import contextlib
import json
import os
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from fcntl import LOCK_NB, LOCK_SH, flock
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING

import zstandard

from . import oci
from .blobs import LayerReader
from .chunktable import ChunkTable, pack_chunks
from .durable import read_file, write_at
from .errors import AccessDenied, BadInput, NotFetched, NotFound, NoToc, RegistryFailed, StoreDamaged
from .layer import LayerBuilder
from .layerref import LayerRef
from .layout import Layout
from .nodes import Digest
from .reference import parse_reference
from .sources import Parts
from .tar import TarLimits, TarScanner
from .toc import FOOTER, TOC_MAX, Chunk, Toc, TocPlace, find_toc, parse_footer, parse_toc

if TYPE_CHECKING:
    from .registry import Registry, RegistryOptions

__all__ = ["ChunkMemory", "LazyReader", "Origin", "Origins", "open_lazy", "open_source", "read_parts"]

_PAUSE_S = 1.0
"""How long an origin that failed is not asked again."""
_MEMORY = 64 << 20
_AHEAD_MAX = 1 << 20
"""Bytes of the blob that are fetched at once where a file is read from one end to the other."""
_LOCKS = 16
_DOCUMENT_MAX = 1 << 16
_CHUNKS_MAX = 1 << 30
_STARGZ_FILE = b"stargz.index.json"
_HEADERS = 1 << 16
"""What may stand around the table in an eStargz member."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a blob is."""

    reference: str
    plain_http: bool

    def encode(self) -> bytes:
        return json.dumps({"reference": self.reference, "plain-http": self.plain_http}).encode()

    @classmethod
    def read(cls, path: str) -> "Origin":
        """Raises StoreDamaged, and OSError."""
        try:
            found = oci.parse_object(read_file(path, _DOCUMENT_MAX), path)
            reference, plain_http = found["reference"], found["plain-http"]
            if not isinstance(reference, str) or not isinstance(plain_http, bool):
                raise KeyError
            parse_reference(reference)
        except (KeyError, BadInput):
            raise StoreDamaged(f"{path} is damaged: pull the image again") from None
        return cls(reference, plain_http)


class Origins:
    """Registries that layers are read from. Thread-safe."""

    def __init__(self, options: "Callable[[], RegistryOptions]", *, is_hasty: bool) -> None:
        """`is_hasty`: somebody waits in read(2) for what comes from them."""
        self._options = options
        self._is_hasty = is_hasty
        self._lock = threading.Lock()
        self._registries: dict[Origin, Registry] = {}
        self._failed: dict[Origin, tuple[float, str]] = {}

    def of(self, origin: Origin, ref: LayerRef) -> Callable[[int, int], bytes]:
        """What gives bytes of the blob, from one place to another, unverified. Raises NotFetched."""
        return partial(self._read, origin, ref.blob, ref.size)

    def _read(self, origin: Origin, blob: Digest, size: int, start: int, end: int) -> bytes:
        with self._lock:
            until, reason = self._failed.get(origin, (0.0, ""))
            if time.monotonic() < until:
                raise _not_fetched(blob, reason)
        try:
            return self._registry(origin).blob_range(blob, size, start, end)
        except (RegistryFailed, AccessDenied, NotFound, BadInput) as error:
            # Other credentials may help, and those are read when it is opened.
            with self._lock:
                registry = self._registries.pop(origin, None)
                self._failed[origin] = (time.monotonic() + _PAUSE_S, str(error))
            if registry is not None:
                registry.close()
            raise _not_fetched(blob, str(error)) from error

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            registries = list(self._registries.values())
            self._registries.clear()
        for registry in registries:
            registry.close()

    def _registry(self, origin: Origin) -> "Registry":
        with self._lock:
            found = self._registries.get(origin)
        if found is not None:
            return found
        options = self._options()
        options = replace(options, plain_http=options.plain_http or origin.plain_http)
        if self._is_hasty:
            options = replace(
                options,
                patience=replace(options.patience, attempts=3, pause_s=0.1, pause_max_s=1, stall_s=10),
            )
        opened = options.open(parse_reference(origin.reference))
        with self._lock:
            kept = self._registries.setdefault(origin, opened)
        if kept is not opened:
            opened.close()
        return kept


def _not_fetched(blob: Digest, reason: str) -> NotFetched:
    return NotFetched(f"layer blob {blob} is not all here: {reason}")


# What a table of contents gives


def read_parts(registry: "Registry", layer: oci.Descriptor, plain_http: bool) -> Parts:
    """Raises NoToc where it has to be downloaded, RegistryFailed where the table is another than the
    manifest says, LayerRefused for what no layer may contain."""
    place = find_toc(layer)
    if place is None:
        raise NoToc("it has no table of contents")

    def read(start: int, end: int) -> bytes:
        return registry.blob_range(layer.digest, layer.size, start, end)

    toc = (_read_stargz if place.compression == "gzip" else _read_chunked)(read, layer, place)
    builder = LayerBuilder()
    for entry in toc.entries:
        builder.add(entry)
    chunks = pack_chunks(
        toc.chunks,
        compression=place.compression,
        blob_size=layer.size,
        size=toc.size,
        prefetch_end=toc.prefetch_end,
    )
    origin = Origin(str(registry.reference), plain_http)
    return Parts(builder.finish(toc.size), chunks, origin.encode())


def _read_chunked(read: Callable[[int, int], bytes], layer: oci.Descriptor, place: TocPlace) -> Toc:
    data = read(place.offset, place.offset + place.length)
    _require(data, layer, place)
    return parse_toc(_inflate("zstd", data, place.decoded), place.offset)


def _read_stargz(read: Callable[[int, int], bytes], layer: oci.Descriptor, place: TocPlace) -> Toc:
    end = layer.size - FOOTER
    offset = parse_footer(read(end, layer.size))
    if not 0 <= offset < end or end - offset > TOC_MAX:
        raise NoToc("its table of contents lies outside of it, or is too large")
    member = _inflate("gzip", read(offset, end), TOC_MAX + _HEADERS)
    # The table is a file of the tar, too, and shown as one.
    own = next((found for found in TarScanner(TarLimits()).feed(member) if found.path == _STARGZ_FILE), None)
    if own is None or len(own.data) != 1:
        raise NoToc("its table of contents is not where its footer says")
    inner = own.data[0].source
    data = member[inner : inner + own.size]
    _require(data, layer, place)
    toc = parse_toc(data, offset)
    chunk = Chunk(toc.size, offset, end, inner, own.size, sha256(data).digest())
    entry = own._replace(data=(own.data[0]._replace(source=toc.size),))
    return replace(toc, entries=[*toc.entries, entry], chunks=[*toc.chunks, chunk], size=toc.size + own.size)


def _require(data: bytes, layer: oci.Descriptor, place: TocPlace) -> None:
    found = oci.digest_of(data)
    if found != place.digest:
        raise RegistryFailed(
            f"the table of contents of layer {layer.digest} has digest {found}, not {place.digest} as its"
            " manifest says: pull it again, or without --lazy"
        )


def _inflate(compression: str, data: bytes, size: int) -> bytes:
    """At most `size` bytes of the one stream in `data`. Raises NoToc."""
    try:
        if compression == "gzip":
            return zlib.decompressobj(31).decompress(data, size)
        return zstandard.ZstdDecompressor().stream_reader(data).read(size)
    except (zlib.error, zstandard.ZstdError) as error:
        raise NoToc(f"it cannot be decompressed ({error})") from None


# Reading


class ChunkMemory:
    """What was decompressed last, of all layers. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        """Reentrant: readers close when they are collected, which may be in any allocation."""
        self._chunks: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._used = 0

    def get(self, layer: int, number: int) -> bytes | None:
        with self._lock:
            data = self._chunks.get((layer, number))
            if data is not None:
                self._chunks.move_to_end((layer, number))
            return data

    def put(self, layer: int, number: int, data: bytes) -> None:
        with self._lock:
            if (layer, number) not in self._chunks:
                self._chunks[layer, number] = data
                self._used += len(data)
            while self._used > _MEMORY and len(self._chunks) > 1:
                _, dropped = self._chunks.popitem(last=False)
                self._used -= len(dropped)

    def drop(self, layer: int) -> None:
        with self._lock:
            for key in [key for key in self._chunks if key[0] == layer]:
                self._used -= len(self._chunks.pop(key))


class LazyReader(LayerReader):
    """The content of a layer in the space of its chunks."""

    is_remote = True

    def __init__(
        self,
        part_fd: int,
        part_path: str,
        blob_path: str,
        table: ChunkTable,
        fetch: Callable[[int, int], bytes],
        memory: ChunkMemory,
    ) -> None:
        """`part_fd` is closed with it. `fetch(start, end)` gives bytes of the blob, or raises NotFetched."""
        super().__init__(part_fd, blob_path, table.size)
        self.table = table
        self._part_path = part_path
        self._fetch = fetch
        self._memory = memory
        self._locks = tuple(threading.Lock() for _ in range(_LOCKS))
        self._next = -1
        """The chunk after those fetched last."""
        self._ahead = 0

    def read_now(self, offset: int, length: int) -> bytes | None:
        end = min(offset + length, self.size)
        if offset >= end:
            return b""
        number = self.table.find(offset)
        data = self._memory.get(id(self), number)
        start = self.table[number].start
        return data[offset - start : end - start] if data is not None and end <= start + len(data) else None

    def read(self, offset: int, length: int) -> bytes:
        end = min(offset + length, self.size)
        if offset >= end:
            return b""
        last = self.table.find(end - 1)
        pieces = []
        for number in range(self.table.find(offset), last + 1):
            start = self.table[number].start
            pieces.append(self._chunk(number, last)[max(0, offset - start) : end - start])
        return b"".join(pieces)

    def close(self) -> None:
        fd, self._blob_fd = self._blob_fd, -1
        if fd >= 0:
            self._memory.drop(id(self))
            os.close(fd)

    def _chunk(self, number: int, last: int) -> bytes:
        """A whole chunk. Those up to `last` will be wanted next."""
        with self._locks[number % _LOCKS]:
            data = self._memory.get(id(self), number)
            if data is not None:
                return data
            chunk = self.table[number]
            data = self._decoded(chunk, os.pread(self._blob_fd, chunk.end - chunk.offset, chunk.offset))
            if data is None:
                data = self._fetched(number, last)
            self._memory.put(id(self), number, data)
            return data

    def _fetched(self, number: int, last: int) -> bytes:
        chunk, end = self.table[number], self._fetch_end(number, last)
        for until in (end, chunk.end):
            found = self._fetch(chunk.offset, until)
            data = self._decoded(chunk, found)
            if data is not None:
                self._keep(found, chunk.offset)
                return data
        name = os.path.basename(os.fsdecode(self._blob_path))
        raise _not_fetched(
            Digest(f"sha256:{name}"),
            f"what its registry sends at {chunk.offset} has another digest than its table of contents says",
        )

    def _fetch_end(self, number: int, last: int) -> int:
        """Of the chunks from `number` on that are worth one request."""
        self._ahead = min(max(2 * self._ahead, 1 << 16), _AHEAD_MAX) if number == self._next else 0
        chunk = self.table[number]
        end = chunk.end
        for following in range(number + 1, len(self.table)):
            after = self.table[following]
            is_wanted = following <= last or after.end - chunk.offset <= self._ahead
            if after.offset < end or after.offset - end > self._ahead or not is_wanted:
                break
            end = after.end
            number = following
        self._next = number + 1
        return end

    def _decoded(self, chunk: Chunk, data: bytes) -> bytes | None:
        """None: these are not its bytes."""
        try:
            decoded = _inflate(self.table.compression, data, chunk.inner + chunk.size)[chunk.inner :]
        except NoToc:
            return None
        return decoded if sha256(decoded).digest() == chunk.digest else None

    def _keep(self, data: bytes, offset: int) -> None:
        """Puts bytes of the blob into `part`, as long as it is that."""
        with contextlib.suppress(OSError):
            fd = os.open(self._part_path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                flock(fd, LOCK_SH | LOCK_NB)
                if os.path.samestat(os.fstat(fd), os.stat(self._part_path)):
                    write_at(fd, data, offset)
            finally:
                os.close(fd)


def open_source(layout: Layout, ref: LayerRef) -> tuple[ChunkTable, Origin]:
    """What is where in the blob of a layer, and where that is.

    Raises StoreDamaged, OSError; FileNotFoundError where its blob is here, or the layer was deleted.
    """
    directory = layout.lazy(ref.diff_id, ref.blob)
    path = layout.lazy_chunks_in(directory)
    table = ChunkTable(read_file(path, _CHUNKS_MAX), path)
    origin = Origin.read(layout.lazy_origin_in(directory))
    if table.blob_size != ref.size:
        raise StoreDamaged(f"{path} is of a blob of {table.blob_size} bytes: pull the image again")
    return table, origin


def open_lazy(layout: Layout, ref: LayerRef, origins: Origins, memory: ChunkMemory) -> LazyReader:
    """Raises as `open_source`."""
    table, origin = open_source(layout, ref)
    part = layout.lazy_part_in(layout.lazy(ref.diff_id, ref.blob))
    fd = os.open(part, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    fetch = origins.of(origin, ref)
    return LazyReader(fd, part, layout.blob(ref.blob), table, fetch, memory)
