"""Fuzz target: tables of seek points, and compressed streams.

Invariant: whatever the bytes, a table opens and gives its restarts, or StoreDamaged; a stream decodes in
pieces of at most 1 MiB, or LayerRefused; and a run decoded from any table over any blob ends in these two
ways. Every other exception, a crash or a hang is a bug.

    python tests/fuzz/fuzz_seek.py [SECONDS | CORPUS.zip]

With atheris installed it is driven by coverage (then the arguments are libFuzzer's), else by random mutation.
"""

import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from isal.isal_zlib import crc32
from rig.fuzzing import drive
from rig.streams import STREAMS, EveryRestart, content, scan

from fusestore.errors import LayerRefused, StoreDamaged
from fusestore.seek import SeekTable, SpanCutter
from fusestore.streams import Decoder, GzipDecoder, RunDecoder, ZstdDecoder, libz, zlib_ng_wheel

TAR_SIZE = 40_000
TAR = content(TAR_SIZE, seed=7)
BLOBS = [(compression, make(TAR)) for compression, make in STREAMS.values()]
TABLES = [scan(compression, blob, EveryRestart()) for compression, blob in BLOBS]
HEADER, RECORDS_CRC32, HEADER_CRC32 = 48, 40, 44


def check(data: bytes) -> None:
    if not data:
        return
    target, data = data[0] % 4, data[1:]
    if target == 0:
        check_table(data)
    elif target == 1:
        check_table(with_fitting_checksums(data))
    elif target == 2:
        for library in (libz(), zlib_ng_wheel()):
            spans = SpanCutter()
            check_stream(GzipDecoder(spans, library), spans, data)
    else:
        spans = SpanCutter()
        check_stream(ZstdDecoder(spans), spans, data)


def check_table(data: bytes) -> None:
    fd = os.memfd_create("fuzz")
    try:
        os.write(fd, data)
        table = SeekTable(f"/proc/self/fd/{fd}", TAR_SIZE)
    except StoreDamaged:
        return
    finally:
        os.close(fd)
    blob = max((blob for compression, blob in BLOBS if compression == table.compression), key=len)
    for span in range(min(len(table), 50)):
        run, end = table.run(span)
        assert run <= span < end
        try:
            decoder = RunDecoder(table, run, lambda length, offset: blob[offset : offset + length])
            while decoder.next_span < end:
                start = decoder.next_span
                assert len(decoder.take()) == table.starts[start + 1] - table.starts[start]
        except (StoreDamaged, LayerRefused):
            pass
    table.close()


def with_fitting_checksums(data: bytes) -> bytes:
    """Else a mutation seldom comes further than them."""
    if len(data) < HEADER:
        return data
    changed = bytearray(data)
    records = changed[HEADER : HEADER + 32 * min(int.from_bytes(changed[12:16], "little"), 1 << 16)]
    changed[RECORDS_CRC32 : RECORDS_CRC32 + 4] = crc32(records).to_bytes(4, "little")
    changed[HEADER_CRC32:HEADER] = crc32(changed[:HEADER_CRC32]).to_bytes(4, "little")
    return bytes(changed)


def check_stream(decoder: Decoder, spans: SpanCutter, data: bytes) -> None:
    try:
        for piece in decoder.feed(data):
            assert len(piece) <= 1 << 20
            spans.write(piece)
            if spans.tar_size > 64 << 20:
                return
        decoder.close()
    except LayerRefused:
        pass


def mutated(source: random.Random) -> bytes:
    target = source.randrange(4)
    wanted = {2: "gzip", 3: "zstd"}.get(target)
    seeds = [blob for compression, blob in BLOBS if compression == wanted] if wanted else TABLES
    data = bytearray(source.choice(seeds))
    for _ in range(source.choice((0, 1, 1, 2, 5, 20))):
        # The headers are where the decisions are.
        place = source.randrange(min(len(data), source.choice((20, 200, len(data)))))
        kind = source.randrange(4)
        if kind == 0:
            data[place] = source.randrange(256)
        elif kind == 1:
            data[place] ^= 1 << source.randrange(8)
        elif kind == 2:
            del data[place : place + source.randrange(1, 10)]
        else:
            data[place:place] = source.randbytes(source.randrange(1, 10))
        if not data:
            break
    return bytes([target]) + bytes(data)


if __name__ == "__main__":
    drive(check, mutated)
