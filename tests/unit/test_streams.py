"""Decoding streams from the beginning and from every restart, and refusing what is no stream."""

import bz2
import gzip
import lzma
import shutil
import subprocess
import zlib

import pytest
import zlib_ng.zlib_ng
import zstandard
from rig.requirements import need
from rig.streams import SKIPPABLE_FRAME, STREAMS, EveryRestart, content, decode, gzip_stream, scan

from fusestore import streams
from fusestore.errors import LayerRefused
from fusestore.seek import SPAN, Compression, SeekTable, SpanCutter
from fusestore.streams import Decoder, GzipDecoder, Inflate, PlainDecoder, RunDecoder, ZstdDecoder, detect

PLAIN = content(3_400_000)
LIBRARIES = {"zlib-ng": streams.zlib_ng_wheel, "libz": streams.libz}


@pytest.fixture(scope="module")
def blobs() -> dict[str, bytes]:
    return {name: make(PLAIN) for name, (_, make) in STREAMS.items()}


def decoder_of(compression: Compression, spans: SpanCutter, library: Inflate | None = None) -> Decoder:
    return ZstdDecoder(spans) if compression == "zstd" else GzipDecoder(spans, library)


def table_of(tmp_path, data: bytes, tar_size: int) -> SeekTable:
    (tmp_path / "seek").write_bytes(data)
    return SeekTable(str(tmp_path / "seek"), tar_size)


def reader_of(blob: bytes):
    return lambda length, offset: blob[offset : offset + length]


def every_run(tmp_path, compression, blob: bytes, plain: bytes, spans: SpanCutter | None = None) -> bytes:
    """What all runs of the blob's table give, each decoded by itself."""
    table = table_of(tmp_path, scan(compression, blob, spans or EveryRestart()), len(plain))
    out = []
    run = 0
    while run < len(table):
        _, end = table.run(run)
        decoder = RunDecoder(table, run, reader_of(blob))
        out += [decoder.take() for _ in range(run, end)]
        run = end
    table.close()
    return b"".join(out)


# Forwards.


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("chunk", [977, 131_072, 1 << 30])
def test_a_stream_decodes_in_chunks_of_any_size(blobs, name, chunk):
    spans = SpanCutter()
    assert decode(decoder_of(STREAMS[name][0], spans), spans, blobs[name], chunk) == PLAIN


@pytest.mark.parametrize("name", STREAMS)
def test_a_short_stream_decodes_byte_by_byte(name):
    compression, make = STREAMS[name]
    spans = SpanCutter()
    assert decode(decoder_of(compression, spans), spans, make(PLAIN[:2000]), 1) == PLAIN[:2000]


@pytest.mark.parametrize("name", STREAMS)
def test_an_empty_stream_has_no_spans(name, tmp_path):
    compression, make = STREAMS[name]
    assert len(table_of(tmp_path, scan(compression, make(b"")), 0)) == 0


def test_a_plain_tar_comes_out_as_it_goes_in():
    spans = SpanCutter()
    assert decode(PlainDecoder(spans), spans, PLAIN) == PLAIN


@pytest.mark.parametrize("name", [name for name in STREAMS if name.startswith("gzip")])
def test_libz_finds_the_restarts_that_zlib_ng_finds(blobs, name, tmp_path):
    tables = [scan("gzip", blobs[name], EveryRestart(), make()) for make in LIBRARIES.values()]
    assert tables[0] == tables[1]


def test_libz_is_used_where_the_wheel_has_another_zlib_ng(monkeypatch):
    monkeypatch.setattr(zlib_ng.zlib_ng, "ZLIBNG_VERSION", "3.0.0")
    assert streams._fastest_inflate.__wrapped__() is streams.libz()


def test_libz_is_used_where_the_wheel_hides_its_functions(monkeypatch):
    monkeypatch.setattr(zlib_ng.zlib_ng, "__file__", "/nonexistent.so")
    monkeypatch.setattr(streams, "zlib_ng_wheel", streams.zlib_ng_wheel.__wrapped__)
    assert streams._fastest_inflate.__wrapped__() is streams.libz()


TOOLS = [
    "gzip -1",
    "gzip -9",
    "gzip --rsyncable",
    "pigz -p 2",
    "zstd -1",
    "zstd -19",
    "zstd --long=27",
    "zstd -T2 -B512K",
]


@pytest.mark.parametrize("command", TOOLS)
def test_what_the_tools_make_is_read_from_every_restart(command, tmp_path):
    name = command.split()[0]
    need("images", shutil.which(name) is not None, f"install {name}")
    plain = content(7_000_000, seed=5)
    blob = subprocess.run([*command.split(), "-c"], input=plain, stdout=subprocess.PIPE, check=True).stdout
    assert every_run(tmp_path, "zstd" if name == "zstd" else "gzip", blob, plain) == plain


# From a restart.


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("cutter", [SpanCutter, EveryRestart])
def test_every_run_decodes_from_its_restart(blobs, name, cutter, tmp_path):
    assert every_run(tmp_path, STREAMS[name][0], blobs[name], PLAIN, cutter()) == PLAIN


def test_a_decoder_goes_on_from_one_run_into_the_next(blobs, tmp_path):
    for name in ("gzip small members", "zstd small frames"):
        table = table_of(tmp_path, scan(STREAMS[name][0], blobs[name]), len(PLAIN))
        decoder = RunDecoder(table, 0, reader_of(blobs[name]))
        assert b"".join(decoder.take() for _ in range(len(table))) == PLAIN


def test_restarts_are_met_at_all_bits_of_a_byte(blobs, tmp_path):
    bits = set()
    for name in ("gzip 1", "gzip 6", "gzip 9", "gzip fixed codes"):
        table = table_of(tmp_path, scan("gzip", blobs[name], EveryRestart()), len(PLAIN))
        bits |= {table.restart(span).bit for span in range(len(table))}
    assert bits == set(range(8))


@pytest.mark.parametrize("bit", range(1, 8))
def test_the_bits_before_a_restart_are_filled_with_empty_blocks(bit):
    compressor = zlib.compressobj(6, wbits=-15)
    deflate = compressor.compress(b"some text") + compressor.flush()
    shifted = (int.from_bytes(deflate, "little") << bit | (1 << bit) - 1).to_bytes(len(deflate) + 1, "little")
    assert zlib.decompressobj(-15).decompress(streams._aligned(shifted, bit)) == b"some text"


def test_restarts_of_ordinary_gzip_are_little_more_than_a_span_apart(blobs, tmp_path):
    table = table_of(tmp_path, scan("gzip", blobs["gzip 6"]), len(PLAIN))
    assert max(end - start for start, end in zip(table.starts, table.starts[1:], strict=False)) < 1.5 * SPAN


def test_one_long_block_has_one_run(blobs, tmp_path):
    table = table_of(tmp_path, scan("gzip", blobs["gzip one block"]), len(PLAIN))
    assert table.run(0) == (0, len(table)) == (0, 2)


def test_one_zstd_frame_has_one_run(blobs, tmp_path):
    table = table_of(tmp_path, scan("zstd", blobs["zstd"]), len(PLAIN))
    assert table.run(len(table) - 1) == (0, 2)


def test_small_frames_are_joined_to_spans(blobs, tmp_path):
    table = table_of(tmp_path, scan("zstd", blobs["zstd small frames"]), len(PLAIN))
    assert [table.run(span) for span in range(len(table))] == [(span, span + 1) for span in range(4)]


def test_a_member_start_needs_no_window(blobs, tmp_path):
    table = table_of(tmp_path, scan("gzip", blobs["gzip members"], EveryRestart()), len(PLAIN))
    assert table.restart(table.find(700_001)).window == b""


def test_a_blob_cut_within_a_span_is_refused_there_only(blobs, tmp_path):
    table = table_of(tmp_path, scan("gzip", blobs["gzip 6"]), len(PLAIN))
    cut = blobs["gzip 6"][: table.restart(1).in_offset + 1000]
    decoder = RunDecoder(table, 0, reader_of(cut))
    assert decoder.take() == PLAIN[: table.starts[1]]
    with pytest.raises(LayerRefused):
        decoder.take()


def test_damage_that_decodes_is_found_by_the_checksum_and_passed(blobs, tmp_path):
    blob = bytearray(blobs["gzip stored"])
    blob[1000] ^= 1
    table = table_of(tmp_path, scan("gzip", blobs["gzip stored"]), len(PLAIN))
    decoder = RunDecoder(table, 0, reader_of(bytes(blob)))
    with pytest.raises(LayerRefused, match="checksum"):
        decoder.take()
    assert decoder.take() == PLAIN[table.starts[1] : table.starts[2]]


# Refusals.

GZIP = gzip.compress(PLAIN[:50_000], mtime=0)
ZSTD = zstandard.ZstdCompressor(write_checksum=True).compress(PLAIN[:50_000])
ZSTD_HEADER = b"\x28\xb5\x2f\xfd"


def _gzip_with_reserved_block() -> bytes:
    return gzip_stream(b"\x07", b"")


REFUSED = {
    "crc of gzip": ("gzip", GZIP[:-8] + bytes([GZIP[-8] ^ 1]) + GZIP[-7:]),
    "size of gzip": ("gzip", GZIP[:-4] + bytes([GZIP[-4] ^ 1]) + GZIP[-3:]),
    "method of gzip": ("gzip", b"\x1f\x8b\x07" + GZIP[3:]),
    "garbage after gzip": ("gzip", GZIP + b"x"),
    "another compression after gzip": ("gzip", GZIP + ZSTD),
    "garbage after padding": ("gzip", GZIP + bytes(100) + b"x"),
    "gzip after padding": ("gzip", GZIP + bytes(100) + GZIP),
    "garbage like gzip": ("gzip", GZIP + b"\x1f\x8c" + bytes(20)),
    "half a magic after gzip": ("gzip", GZIP + b"\x1f"),
    "reserved block in deflate": ("gzip", _gzip_with_reserved_block()),
    "distance before the beginning": ("gzip", gzip_stream(b"\x03\x02\x00", b"")),
    "checksum of zstd": ("zstd", ZSTD[:-1] + bytes([ZSTD[-1] ^ 1])),
    "garbage after zstd": ("zstd", ZSTD + b"garbage"),
    "zeros after zstd": ("zstd", ZSTD + bytes(512)),
    "gzip after zstd": ("zstd", ZSTD + GZIP),
    "half a magic after zstd": ("zstd", ZSTD + ZSTD_HEADER[:3]),
    "skippable frame cut": ("zstd", ZSTD + SKIPPABLE_FRAME[:-1]),
    "reserved block in zstd": ("zstd", ZSTD_HEADER + b"\x20\x01" + b"\x07\0\0" + b"x"),
    "block over 128 KiB": ("zstd", ZSTD_HEADER + b"\x00\x88" + ((1 << 17) + 1 << 3).to_bytes(3, "little")),
    "window over the limit": ("zstd", ZSTD_HEADER + b"\x00\x98" + b"\x01\0\0"),
    "dictionary": ("zstd", ZSTD_HEADER + b"\x21\x07\x01" + b"\x09\0\0" + b"x"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_refused(name, chunk):
    compression, blob = REFUSED[name]
    spans = SpanCutter()
    with pytest.raises(LayerRefused):
        decode(decoder_of(compression, spans), spans, blob, chunk)


@pytest.mark.parametrize("make", LIBRARIES.values(), ids=LIBRARIES)
@pytest.mark.parametrize("name", [name for name in REFUSED if REFUSED[name][0] == "gzip"])
def test_both_libraries_refuse_the_same(make, name):
    spans = SpanCutter()
    with pytest.raises(LayerRefused):
        decode(GzipDecoder(spans, make()), spans, REFUSED[name][1])


@pytest.mark.parametrize(("compression", "blob"), [("gzip", GZIP), ("zstd", ZSTD)])
def test_a_stream_cut_anywhere_is_refused(compression, blob):
    for length in [*range(1, 60), *range(60, len(blob), 997), *range(len(blob) - 20, len(blob))]:
        spans = SpanCutter()
        with pytest.raises(LayerRefused):
            decode(decoder_of(compression, spans), spans, blob[:length])


def test_a_block_too_large_is_refused_before_it_is_collected():
    decoder = ZstdDecoder(SpanCutter())
    with pytest.raises(LayerRefused, match="damaged block"):
        list(decoder.feed(REFUSED["block over 128 KiB"][1]))


BOMB = bytes(64 << 20)
REPEATED_128_KIB = (1 << 17 << 3 | 0b010).to_bytes(3, "little") + b"\0"
"""A block of zstd: the smallest there is for its output."""


@pytest.mark.parametrize(
    ("compression", "blob"),
    [
        ("gzip", zlib.compress(BOMB, 9, wbits=31)),
        ("zstd", zstandard.ZstdCompressor(level=19).compress(BOMB)),
        ("zstd", ZSTD_HEADER + b"\x00\x88" + REPEATED_128_KIB * 512 + b"\x01\0\0"),
    ],
)
def test_a_bomb_comes_out_in_pieces_of_a_mebibyte(compression, blob):
    spans = SpanCutter()
    decoder = decoder_of(compression, spans)
    sizes = []
    for piece in decoder.feed(blob):
        spans.write(piece)
        sizes.append(len(piece))
    decoder.close()
    assert sum(sizes) == len(BOMB)
    assert max(sizes) <= 1 << 20


def test_blocks_without_output_are_not_looked_at_one_by_one():
    blocks = 80_000
    empty = streams._EMPTY_BLOCKS[0]
    assert empty.count == 0
    fixed = sum(0b010 << 10 * place for place in range(blocks))
    deflate = (fixed | 0b011 << 10 * blocks).to_bytes(10 * blocks // 8 + 2, "little")
    calls = 0
    library = streams.libz()

    def counted(stream, flush):
        nonlocal calls
        calls += 1
        return library.inflate(stream, flush)

    spans = SpanCutter()
    decoder = GzipDecoder(spans, library._replace(inflate=counted))
    assert decode(decoder, spans, gzip_stream(deflate, b"")) == b""
    assert calls < 10


@pytest.mark.parametrize(
    ("head", "compression"),
    [
        (GZIP[:16], "gzip"),
        (ZSTD[:16], "zstd"),
        (SKIPPABLE_FRAME[:16], "zstd"),
        (b"bin/\0\0\0\0\0\0\0\0\0\0\0\0", "none"),
        (b"BZh.txt\0\0\0\0\0\0\0\0\0", "none"),
        (b"", "none"),
        (b"PAX", "none"),
    ],
)
def test_the_compression_is_told_by_magic_bytes(head, compression):
    assert detect(head) == compression


@pytest.mark.parametrize(
    ("blob", "name"),
    [(lzma.compress(b"x"), "xz"), (bz2.compress(b"x"), "bzip2"), (b"\x04\x22\x4d\x18" + bytes(12), "lz4")],
)
def test_other_compressions_are_refused_by_name(blob, name):
    with pytest.raises(LayerRefused, match=f"unsupported compression {name}"):
        detect(blob[:16])
