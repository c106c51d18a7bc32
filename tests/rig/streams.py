"""Compressed streams as the tools of the field make them, and as none does but the formats allow. Pure."""

import gzip
import random
import zlib
from collections.abc import Callable

import zstandard
from isal import isal_zlib

from fusestore.seek import Compression, SpanCutter
from fusestore.streams import Decoder, GzipDecoder, Inflate, ZstdDecoder

__all__ = ["SKIPPABLE_FRAME", "STREAMS", "EveryRestart", "content", "decode", "gzip_stream", "scan"]


def content(size: int, seed: int = 0) -> bytes:
    """Bytes that look like a layer's: words, zeros, noise, repeats from far back."""
    source = random.Random(seed)
    words = [source.randbytes(source.randint(2, 12)) for _ in range(500)]
    out = bytearray()
    while len(out) < size:
        kind = source.randrange(8)
        if kind == 0:
            out += bytes(source.randint(1, 20_000))
        elif kind == 1:
            out += source.randbytes(source.randint(1, 20_000))
        elif kind == 2:
            start = source.randrange(len(out) + 1)
            out += out[start : start + 20_000]
        else:
            out += b"".join(source.choices(words, k=source.randint(1, 5000)))
    return bytes(out[:size])


def _deflate(plain: bytes, level: int, strategy: int = zlib.Z_DEFAULT_STRATEGY, flush: int = 0) -> bytes:
    """One member; with `flush`, an empty stored block after as many bytes, as pigz makes them."""
    compressor = zlib.compressobj(level, zlib.DEFLATED, 31, 9, strategy)
    step = flush or max(1, len(plain))
    out = []
    for start in range(0, len(plain), step):
        out.append(compressor.compress(plain[start : start + step]))
        if flush:
            out.append(compressor.flush(zlib.Z_SYNC_FLUSH))
    return b"".join([*out, compressor.flush()])


def _one_block(plain: bytes) -> bytes:
    """A single deflate block, however long the content is: what isal makes of level 0."""
    compressor = isal_zlib.compressobj(0, wbits=31)
    return bytes(compressor.compress(plain) + compressor.flush())


def _members(plain: bytes, size: int) -> bytes:
    return b"".join(gzip.compress(piece, 6, mtime=0) for piece in _pieces(plain, size))


def _all_header_fields(plain: bytes) -> bytes:
    """RFC 1952, section 2.3: FTEXT, FEXTRA, FNAME, FCOMMENT, FHCRC, twice."""
    half = len(plain) // 2
    members = (gzip.compress(plain[:half], 6, mtime=0), gzip.compress(plain[half:], 6, mtime=0))
    header = b"\x1f\x8b\x08\x1f\0\0\0\0\x00\xff" + b"\x05\x00extra" + b"a name\0" + b"a comment\0"
    header += (zlib.crc32(header) & 0xFFFF).to_bytes(2, "little")
    return b"".join(header + each[10:] for each in members)


SKIPPABLE_FRAME = b"\x5f\x2a\x4d\x18" + (3000).to_bytes(4, "little") + bytes(3000)


def _zstd(plain: bytes, level: int = 3, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(level, **options).compress(plain)


def _zstd_without_size(plain: bytes) -> bytes:
    compressor = zstandard.ZstdCompressor(3).compressobj()
    return compressor.compress(plain) + compressor.flush()


def _frames(plain: bytes, size: int, between: bytes = b"") -> bytes:
    compress = zstandard.ZstdCompressor(3, write_checksum=True).compress
    return between + between.join([compress(piece) for piece in _pieces(plain, size)] or [compress(b"")])


def _pieces(plain: bytes, size: int) -> list[bytes]:
    return [plain[start : start + size] for start in range(0, max(1, len(plain)), size)]


STREAMS: dict[str, tuple[Compression, Callable[[bytes], bytes]]] = {
    "gzip 1": ("gzip", lambda plain: _deflate(plain, 1)),
    "gzip 6": ("gzip", lambda plain: _deflate(plain, 6)),
    "gzip 9": ("gzip", lambda plain: _deflate(plain, 9)),
    "gzip flushed": ("gzip", lambda plain: _deflate(plain, 6, flush=100_003)),
    "gzip huffman only": ("gzip", lambda plain: _deflate(plain, 6, strategy=zlib.Z_HUFFMAN_ONLY)),
    "gzip fixed codes": ("gzip", lambda plain: _deflate(plain, 6, strategy=zlib.Z_FIXED)),
    "gzip stored": ("gzip", lambda plain: _deflate(plain, 0)),
    "gzip one block": ("gzip", _one_block),
    "gzip members": ("gzip", lambda plain: _members(plain, 700_001)),
    "gzip small members": ("gzip", lambda plain: _members(plain, 5003)),
    "gzip all header fields": ("gzip", _all_header_fields),
    "gzip padded": ("gzip", lambda plain: _deflate(plain, 6) + bytes(5000)),
    "zstd": ("zstd", _zstd),
    "zstd 19": ("zstd", lambda plain: _zstd(plain, 19, write_checksum=True)),
    "zstd fast": ("zstd", lambda plain: _zstd(plain, -5)),
    "zstd without size": ("zstd", _zstd_without_size),
    "zstd small frames": ("zstd", lambda plain: _frames(plain, 7001)),
    "zstd large frames": ("zstd", lambda plain: _frames(plain, 2_500_000)),
    "zstd skippable frames": (
        "zstd",
        lambda plain: _frames(plain, 300_007, SKIPPABLE_FRAME) + SKIPPABLE_FRAME,
    ),
}


def gzip_stream(deflate: bytes, plain: bytes) -> bytes:
    """A gzip member around a deflate stream made by hand."""
    trailer = zlib.crc32(plain).to_bytes(4, "little") + (len(plain) & 0xFFFFFFFF).to_bytes(4, "little")
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + deflate + trailer


class EveryRestart(SpanCutter):
    """Takes every place where decoding can begin again, not one in a MiB."""

    @property
    def wants_restart(self) -> bool:
        return True


def decode(decoder: Decoder, spans: SpanCutter, blob: bytes, chunk: int = 131_072) -> bytes:
    """The whole output, as `blobs.ingest` would take it."""
    out = bytearray()
    for start in range(0, len(blob), chunk):
        for piece in decoder.feed(blob[start : start + chunk]):
            spans.write(piece)
            out += piece
    decoder.close()
    return bytes(out)


def scan(
    compression: Compression, blob: bytes, spans: SpanCutter | None = None, library: Inflate | None = None
) -> bytes:
    """The table of seek points."""
    spans = spans or SpanCutter()
    decode(ZstdDecoder(spans) if compression == "zstd" else GzipDecoder(spans, library), spans, blob)
    return spans.finish(compression, len(blob))
