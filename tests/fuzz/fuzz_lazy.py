"""Fuzz target: what lazy layers are made of: annotations, tables of contents, tables of chunks, origins.

Invariant: whatever a registry sends, parts that the index and the table of chunks are sound in, or NoToc,
LayerRefused, RegistryFailed; whatever is in the store, or StoreDamaged; and content that is read is what its
digest says, or NotFetched. Every other exception, a crash or a hang is a bug.

    python tests/fuzz/fuzz_lazy.py [SECONDS | CORPUS.zip]

With atheris installed it is driven by coverage (then the arguments are libFuzzer's), else by random mutation.
"""

import gzip
import hashlib
import json
import os
import random
import sys
import tarfile
import tempfile
import zlib
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import zstandard
from rig.fuzzing import Bytes, drive, own_directory, spliced_seed
from rig.indexes import touch_everything
from rig.stargz import TOC_DIGEST, make_stargz

from fusestore.chunktable import ChunkTable, pack_chunks
from fusestore.errors import LayerRefused, NotFetched, NoToc, RegistryFailed, StoreDamaged
from fusestore.lazylayer import ChunkMemory, LazyReader, Origin, read_parts
from fusestore.nodes import Digest
from fusestore.oci import Descriptor, digest_of
from fusestore.reference import parse_reference
from fusestore.toc import FOOTER, Chunk, find_toc, parse_footer, parse_toc

PLACE = own_directory()
GZIP, ZSTD = (f"application/vnd.oci.image.layer.v1.tar+{kind}" for kind in ("gzip", "zstd"))


class Registry:
    """Gives the parts of one blob, as far as there are any."""

    reference = parse_reference("localhost:5000/app:1")

    def __init__(self, blob: bytes) -> None:
        self._blob = blob

    def blob_range(self, digest: Digest, size: int, start: int, end: int) -> bytes:
        assert 0 <= start < end <= size, "a range outside of the blob is asked for"
        return self._blob[start:end]


def check_parts(blob: bytes, layer: Descriptor) -> None:
    try:
        parts = read_parts(Registry(blob), layer, False)  # type: ignore[arg-type]
    except (NoToc, LayerRefused, RegistryFailed):
        return
    assert not touch_everything(parts.index)
    (PLACE / "origin").write_bytes(parts.origin)
    assert Origin.read(str(PLACE / "origin")).reference == str(Registry.reference)
    check_table(parts.chunks, blob)


def as_stargz(toc: bytes) -> None:
    """A table that was signed, whatever is in it."""
    head = b"content of the blob " * 10
    info = tarfile.TarInfo("stargz.index.json")
    info.size = len(toc)
    member = gzip.compress(info.tobuf() + toc + bytes(-len(toc) % 512 + 1024), 1)
    footer = make_stargz([]).data[-FOOTER : -FOOTER + 16] + b"%016x" % len(head)
    blob = head + member + footer + make_stargz([]).data[-FOOTER + len(footer) :]
    check_parts(blob, Descriptor(GZIP, Digest(digest_of(blob)), len(blob), {TOC_DIGEST: digest_of(toc)}))


def as_chunked(toc: bytes) -> None:
    head, table = zstandard.compress(b"content"), zstandard.compress(toc)
    prefix = "io.github.containers.zstd-chunked"
    annotations = {
        f"{prefix}.manifest-checksum": digest_of(table),
        f"{prefix}.manifest-position": f"{len(head)}:{len(table)}:{len(toc)}:1",
    }
    blob = head + table
    check_parts(blob, Descriptor(ZSTD, Digest(digest_of(blob)), len(blob), annotations))


def as_any_blob(data: bytes) -> None:
    """Where even the digests fit what comes: footers, positions and members are all that is wrong."""
    source = Bytes(data)
    kind, prefix = source.choice((GZIP, ZSTD)), "io.containers.zstd-chunked"
    position = f"{source.number()}:{source.number()}:{source.number()}:{source.byte() % 3}"
    blob = source.rest()
    annotations = {f"{prefix}.manifest-position": position, f"{prefix}.manifest-checksum": digest_of(blob)}
    if kind == GZIP:
        annotations = {TOC_DIGEST: digest_of(blob)}
    check_parts(blob, Descriptor(kind, Digest(digest_of(blob)), max(len(blob), 1), annotations))


def as_annotations(data: bytes) -> None:
    """Keys and values of a descriptor, and the end of its blob."""
    source = Bytes(data)
    keys = (TOC_DIGEST, *(f"io.containers.zstd-chunked.manifest-{key}" for key in ("checksum", "position")))
    annotations = {key: source.take(source.byte()).decode("latin-1") for key in keys}
    size = source.number()
    try:
        place = find_toc(
            Descriptor(source.choice((GZIP, ZSTD)), Digest(f"sha256:{'0' * 64}"), size, annotations)
        )
        assert place is None or place.offset + place.length <= size
        assert parse_footer(source.rest()) >= 0
    except NoToc:
        pass


def as_toc(data: bytes) -> None:
    end = 1 << 40
    try:
        toc = parse_toc(data, end)
    except NoToc:
        return
    assert sum(chunk.size for chunk in toc.chunks) == toc.size
    assert all(before.start + before.size == after.start for before, after in pairwise(toc.chunks))
    assert all(0 <= chunk.offset < chunk.end <= end for chunk in toc.chunks)
    packed = pack_chunks(
        toc.chunks, compression="gzip", blob_size=end, size=toc.size, prefetch_end=toc.prefetch_end
    )
    table = ChunkTable(packed, "chunks")
    assert [table[number] for number in range(len(table))] == toc.chunks


CONTENT = b"".join(b"%d " % number for number in range(3000))
MEMBERS = b"".join(
    gzip.compress(CONTENT[start : start + 4000], mtime=0) for start in range(0, len(CONTENT), 4000)
)


def as_table(data: bytes) -> None:
    check_table(data, MEMBERS)
    if len(data) > 16:
        check_table(data[:12] + zlib.crc32(data[16:]).to_bytes(4, "little") + data[16:], MEMBERS)


def check_table(data: bytes, blob: bytes) -> None:
    try:
        table = ChunkTable(data, "chunks")
    except StoreDamaged:
        return
    memory, (part, path) = ChunkMemory(), tempfile.mkstemp(dir=PLACE)
    os.unlink(path)
    reader = LazyReader(
        part, path, str(PLACE / ("0" * 64)), table, lambda start, end: blob[start:end], memory
    )
    for offset in {0, table.size // 2, table.size - 1} if table.size else ():
        try:
            chunk = table[table.find(offset)]
            assert chunk.start <= offset < chunk.start + chunk.size
            found = reader.read(chunk.start, chunk.size)
            assert hashlib.sha256(found).digest() == chunk.digest
        except (NotFetched, StoreDamaged):
            pass
    reader.close()


def as_origin(data: bytes) -> None:
    (PLACE / "origin").write_bytes(data)
    try:
        origin = Origin.read(str(PLACE / "origin"))
    except StoreDamaged:
        return
    (PLACE / "origin").write_bytes(origin.encode())
    assert Origin.read(str(PLACE / "origin")) == origin


TARGETS = (as_toc, as_stargz, as_chunked, as_any_blob, as_annotations, as_table, as_origin)


def check(data: bytes) -> None:
    if data:
        TARGETS[data[0] % len(TARGETS)](data[1:])


def _tables() -> list[bytes]:
    digest = "sha256:" + "ab" * 32
    entries = [
        {
            "name": "d/",
            "type": "dir",
            "mode": 493,
            "modtime": "2024-01-01T00:00:00Z",
            "xattrs": {"user.a": "YQ=="},
        },
        {"name": "d/f", "type": "reg", "size": 10, "offset": 7, "chunkSize": 6, "chunkDigest": digest},
        {"name": "d/f", "type": "chunk", "offset": 90, "chunkOffset": 6, "chunkDigest": digest},
        {
            "name": "g",
            "type": "reg",
            "size": 3,
            "offset": 100,
            "endOffset": 150,
            "digest": digest,
            "innerOffset": 5,
        },
        {"name": "l", "type": "symlink", "linkName": "d/f"},
        {"name": "h", "type": "hardlink", "linkName": "g", "uid": 1, "gid": 2},
        {"name": "c", "type": "char", "devMajor": 1, "devMinor": 3},
        {"name": ".prefetch.landmark", "type": "reg", "size": 1, "offset": 130, "digest": digest},
    ]
    return [
        json.dumps({"version": 1, "entries": some}).encode() for some in (entries, entries[:2], entries[3:])
    ]


def _chunks() -> bytes:
    chunks, place = [], 0
    for start in range(0, len(CONTENT), 4000):
        data = CONTENT[start : start + 4000]
        end = place + len(gzip.compress(data, mtime=0))
        chunks.append(Chunk(start, place, end, 0, len(data), hashlib.sha256(data).digest()))
        place = end
    return pack_chunks(chunks, compression="gzip", blob_size=place, size=len(CONTENT), prefetch_end=0)


SEEDS = (
    *(_tables(), _tables(), _tables()),
    *([b"\0\0\0\0" + make_stargz([]).data], [b"\x47sha256:" + b"ab" * 32 + b"\x20" + b"1:2:3:1\0\0\0\1\7\0"]),
    *([_chunks()], [Origin("localhost:5000/app:1", False).encode()]),
)  # fmt: skip
TOKENS = (
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b",",
        b":",
        b"null",
        b"true",
        b"-1",
        b"1e999",
        b"0",
        b"4611686018427387904",
    ),
    *(
        b"99999999999999999999",
        b"\\ud800",
        b"\\u0000",
        b"\\ufffd",
        b"\xff",
        b"[" * 2000,
        b"sha256:",
        b"..",
        b"/",
    ),
    *(b"offset", b"chunkSize", b"chunkOffset", b"innerOffset", b"chunkDigest", b"chunk", b"reg", b"size"),
)


def mutated(source: random.Random) -> bytes:
    return spliced_seed(source, SEEDS, TOKENS)


if __name__ == "__main__":
    drive(check, mutated)
