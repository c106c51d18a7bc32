"""fusestore.chunktable: the file of chunks."""

import pytest

from fusestore.chunktable import ChunkTable, pack_chunks
from fusestore.errors import StoreDamaged
from fusestore.toc import CHUNK_MAX, Chunk

CHUNKS = [Chunk(0, 5, 50, 0, 10, b"a" * 32), Chunk(10, 50, 90, 512, 30, b"b" * 32)]
DATA = pack_chunks(CHUNKS, compression="zstd", blob_size=100, size=40, prefetch_end=50)


def test_reading() -> None:
    table = ChunkTable(DATA, "here")
    assert [table[number] for number in range(len(table))] == CHUNKS
    assert [table.find(offset) for offset in (0, 9, 10, 39)] == [0, 0, 1, 1]
    assert (table.compression, table.blob_size, table.size, table.prefetch_end) == ("zstd", 100, 40, 50)


def test_a_layer_without_content() -> None:
    table = ChunkTable(pack_chunks([], compression="gzip", blob_size=9, size=0, prefetch_end=0), "here")
    assert len(table) == 0


def test_whatever_is_wrong_is_found() -> None:
    for place in range(len(DATA)):
        damaged = bytearray(DATA)
        damaged[place] ^= 1
        with pytest.raises(StoreDamaged, match="here is damaged: pull the image again"):
            ChunkTable(bytes(damaged), "here")
        with pytest.raises(StoreDamaged):
            ChunkTable(DATA[:place], "here")


def test_chunks_that_do_not_ascend() -> None:
    data = pack_chunks(CHUNKS[::-1], compression="gzip", blob_size=100, size=40, prefetch_end=0)
    with pytest.raises(StoreDamaged):
        ChunkTable(data, "here")


@pytest.mark.parametrize(
    "wrong",
    [
        {"offset": 50},
        {"offset": 1 << 63},
        {"end": 101},
        {"end": 1 << 63},
        {"inner": CHUNK_MAX + 1},
        {"size": 9},
    ],
    ids=repr,
)
def test_a_chunk_that_cannot_be_is_refused_when_it_is_asked_for(wrong: dict[str, int]) -> None:
    """Checksums that fit are no proof: memory is taken for what the record says."""
    chunks = [CHUNKS[0]._replace(**wrong), CHUNKS[1]]
    data = pack_chunks(chunks, compression="zstd", blob_size=100, size=40, prefetch_end=0)
    table = ChunkTable(data, "here")
    assert table[1] == CHUNKS[1]
    with pytest.raises(StoreDamaged, match="here is damaged"):
        table[0]
