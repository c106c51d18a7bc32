"""Tables of contents of layers that can be read in parts: eStargz and zstd:chunked. Pure.

Both are JSON documents inside the blob that list the tar's entries and, of regular files, the chunks: where
each begins in the blob, how long it is, and its digest (stargz-snapshotter, docs/estargz.md;
containers/storage, docs/containers-storage-zstd-chunked.md). The layer's descriptor has the digest of the
document in an annotation, so that all in it is as trustworthy as the manifest.

What a table cannot say as the tar does is refused (NoToc), and the layer has to be downloaded: names that are
not UTF-8 (both write U+FFFD), chunks without a digest or too large to be held in memory. The offsets of files
in the tar are not in it: content is numbered through in a space of its own, file after file (`Toc.size`).
"""

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import jiter

from . import oci
from .errors import BadName, NoToc
from .names import digest_hex, parse_digest
from .nodes import Digest, Extent, TarEntry, make_device

__all__ = [
    "CHUNK_MAX",
    "FOOTER",
    "Chunk",
    "TOC_MAX",
    "Toc",
    "TocPlace",
    "find_toc",
    "parse_footer",
    "parse_toc",
]

TOC_MAX: Final = 128 << 20
"""Bytes of a table: about half a million entries."""
_VALUES_MAX: Final = 12 << 20
"""Commas, and what opens objects and lists: for each, three bytes or so, a table may take 100 of memory.
A table of 128 MiB that lists a tree has 5 to 9 million."""
CHUNK_MAX: Final = 32 << 20
"""Bytes of a chunk, which is decompressed whole: stargz-snapshotter makes 4 MiB."""
FOOTER: Final = 51
"""Bytes at the end of an eStargz blob that say where the table is."""

_STARGZ_DIGEST = "containerd.io/snapshot/stargz/toc.digest"
# The second is containers/storage's before 1.46 (Debian 12).
_CHUNKED = ("io.github.containers.zstd-chunked", "io.containers.zstd-chunked")
_POSITION = re.compile(r"([0-9]{1,18}):([0-9]{1,18}):([0-9]{1,18}):1")
_FOOTER_EXTRA = re.compile(rb"\x1f\x8b\x08\x04.{6}\x1a\x00SG\x16\x00([0-9a-f]{16})STARGZ", re.DOTALL)
_TYPES = {
    "reg": b"0", "hardlink": b"1", "symlink": b"2", "char": b"3", "block": b"4", "dir": b"5", "fifo": b"6",
}  # fmt: skip
_PREFETCH = ".prefetch.landmark"
_OVERHEAD = 1 << 12
_LOST = "\ufffd"
_ID_END = 1 << 32
_SIZE_END = 1 << 62


@dataclass(frozen=True, slots=True)
class TocPlace:
    """Where the table of a layer is, as its descriptor says."""

    digest: Digest
    """Of eStargz that of the document, of zstd:chunked that of its compressed bytes."""
    compression: str
    """ "gzip" (eStargz) or "zstd" (zstd:chunked)."""
    offset: int = 0
    length: int = 0
    """Bytes in the blob; 0: the blob's footer says where it is."""
    decoded: int = 0


class Chunk(NamedTuple):
    start: int
    """In the space of `Toc`."""
    offset: int
    """In the blob: what decompression begins with."""
    end: int
    """In the blob: enough for it."""
    inner: int
    """Decompressed bytes before it."""
    size: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Toc:
    entries: list[TarEntry]
    """As the tar has them, but for where their content is: it lies in the chunks, from `Chunk.start` on."""
    chunks: list[Chunk]
    """Ascending."""
    size: int
    prefetch_end: int
    """The first bytes of the blob that whoever built it wants read ahead; 0: none."""


def find_toc(layer: oci.Descriptor) -> TocPlace | None:
    """None: it has none. Raises NoToc for annotations that cannot be."""
    annotations = layer.annotations
    for prefix in _CHUNKED:
        checksum = annotations.get(f"{prefix}.manifest-checksum")
        position = _POSITION.fullmatch(annotations.get(f"{prefix}.manifest-position", ""))
        if checksum is not None and position is not None:
            offset, length, decoded = map(int, position.groups())
            if not 0 < length <= layer.size - offset or not length <= TOC_MAX >= decoded:
                raise NoToc("its table of contents lies outside of it, or is too large")
            return TocPlace(_digest(checksum), "zstd", offset, length, decoded)
    checksum = annotations.get(_STARGZ_DIGEST)
    if checksum is None or layer.size <= FOOTER or layer.media_type.endswith("zstd"):
        return None
    return TocPlace(_digest(checksum), "gzip")


def parse_footer(data: bytes) -> int:
    """Where in an eStargz blob the gzip member with the table begins; `data` are its last `FOOTER` bytes."""
    found = _FOOTER_EXTRA.match(data)
    if found is None:
        raise NoToc("it has no eStargz footer")
    return int(found[1], 16)


def parse_toc(data: bytes, end: int) -> Toc:
    """`end`: of the content in the blob, where the table begins. Raises NoToc."""
    if sum(map(data.count, (b",", b"{", b"["))) > _VALUES_MAX:
        raise NoToc("its table of contents is too large")
    try:
        document = jiter.from_json(data)
    except ValueError as error:
        raise NoToc(f"its table of contents is no JSON ({error})") from None
    listed = document.get("entries") if isinstance(document, dict) else None
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise NoToc("its table of contents has no entries")
    builder = _Builder(end)
    for raw in listed:
        builder.add(raw)
    return builder.finish()


def _digest(text: str) -> Digest:
    try:
        return parse_digest(text)
    except BadName as error:
        raise NoToc(f"the digest of its table of contents is none ({error})") from None


class _Builder:
    def __init__(self, end: int) -> None:
        self._end = end
        self._entries: list[TarEntry] = []
        self._chunks: list[Chunk] = []
        self._size = 0
        self._prefetch_end = 0
        # Of the file that chunks belong to: its name, what is left of it, where its content ends.
        self._name = ""
        self._left = 0
        self._file_end = end

    def add(self, raw: Mapping[str, Any]) -> None:
        name, kind = _text(raw, "name"), _text(raw, "type")
        if kind == "chunk":
            if name != self._name or not self._left:
                raise NoToc(f"its table of contents has a chunk of {name!r} out of place")
            self._add_chunk(raw, _number(raw, "chunkOffset"))
            return
        self._require_whole()
        if kind not in _TYPES:
            raise NoToc(f"its table of contents has an entry of type {kind!r}")
        is_file = kind == "reg"
        size = _number(raw, "size") if is_file else 0
        data = (Extent(0, size, self._size),) if size else ()
        self._entries.append(_entry(raw, name, kind, size, data))
        if is_file and name.removeprefix("./").lstrip("/") == _PREFETCH:
            self._prefetch_end = _number(raw, "offset", below=self._end)
        if size:
            self._name, self._left = name, size
            self._file_end = _number(raw, "endOffset", below=self._end + 1) or self._end
            self._add_chunk(raw, 0)

    def finish(self) -> Toc:
        self._require_whole()
        offsets = sorted({chunk.offset for chunk in self._chunks})
        following = dict(zip(offsets, [*offsets[1:], self._end], strict=False))
        chunks = []
        for start, offset, end, inner, size, digest in self._chunks:
            # More than that no compression needs for what does not get smaller.
            needed = inner + size
            bound = offset + needed + needed // 64 + _OVERHEAD
            chunks.append(Chunk(start, offset, min(end, following[offset], bound), inner, size, digest))
        return Toc(self._entries, chunks, self._size, self._prefetch_end)

    def _require_whole(self) -> None:
        if self._left:
            raise NoToc(f"its table of contents does not have all of {self._name!r}")

    def _add_chunk(self, raw: Mapping[str, Any], offset: int) -> None:
        size = _number(raw, "chunkSize") or self._left
        # Only of a file of one chunk its digest is that of the chunk.
        checksum = _text(raw, "chunkDigest") or (
            _text(raw, "digest") if size == self._left and not offset else ""
        )
        if not 0 < size <= min(self._left, CHUNK_MAX):
            raise NoToc(f"its table of contents has a chunk of {size} bytes in {self._name!r}")
        place, inner = _number(raw, "offset", below=self._file_end), _number(raw, "innerOffset")
        if inner > CHUNK_MAX:
            raise NoToc(f"its table of contents has a chunk of {self._name!r} deep inside of another")
        digest = bytes.fromhex(digest_hex(_digest(checksum)))
        self._chunks.append(Chunk(self._size, place, self._file_end, inner, size, digest))
        self._size += size
        self._left -= size
        if self._size >= _SIZE_END:
            raise NoToc("its table of contents lists more than there can be")


def _entry(raw: Mapping[str, Any], name: str, kind: str, size: int, data: tuple[Extent, ...]) -> TarEntry:
    rdev = 0
    if kind in ("char", "block"):
        rdev = make_device(_number(raw, "devMajor"), _number(raw, "devMinor"))
    return TarEntry(
        type=_TYPES[kind],
        path=_bytes(name) or b"./",
        link=_bytes(_text(raw, "linkName")),
        mode=_number(raw, "mode") & 0o7777,
        uid=_number(raw, "uid", below=_ID_END),
        gid=_number(raw, "gid", below=_ID_END),
        size=size,
        mtime_ns=oci.parse_time_ns(_text(raw, "modtime")),
        rdev=rdev,
        xattrs=tuple(_xattrs(raw.get("xattrs"))),
        data=data,
    )


def _xattrs(value: Any) -> Iterator[tuple[bytes, bytes]]:
    if value is None:
        return
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise NoToc("its table of contents has xattrs that are none")
    for name, text in value.items():
        try:
            yield _bytes(name), base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise NoToc("its table of contents has xattrs that are none") from None


def _text(raw: Mapping[str, Any], key: str) -> str:
    value = raw.get(key, "")
    if type(value) is str:
        return value
    raise NoToc(f"its table of contents has a {key} that is no text")


def _bytes(text: str) -> bytes:
    if _LOST in text:
        raise NoToc(f"its table of contents cannot say the name {text!r}")
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise NoToc("its table of contents has a name that is no text") from None


def _number(raw: Mapping[str, Any], key: str, below: int = _SIZE_END) -> int:
    value = raw.get(key, 0)
    if type(value) is int and 0 <= value < below:  # bool is none here
        return value
    raise NoToc(f"its table of contents has the {key} {value!r}")
