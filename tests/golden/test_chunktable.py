"""The file of chunks, byte for byte: who changes it makes a new version (fusestore/chunktable.py)."""

from pathlib import Path

from fusestore.chunktable import ChunkTable, pack_chunks
from fusestore.toc import Chunk

GOLDEN = Path(__file__).with_name("chunks-1.bin")
CHUNKS = [
    Chunk(0, 190, 46186, 0, 99131, bytes(range(32))),
    Chunk(99131, 46186, 50193, 512, 10037, bytes(range(32, 64))),
    Chunk(109168, 1 << 40, (1 << 40) + 7, 0, 1, b"\xff" * 32),
]


def test_chunks() -> None:
    data = pack_chunks(CHUNKS, compression="gzip", blob_size=1 << 41, size=109169, prefetch_end=46186)
    assert data == GOLDEN.read_bytes()
    table = ChunkTable(GOLDEN.read_bytes(), "golden")
    assert [table[number] for number in range(len(table))] == CHUNKS
