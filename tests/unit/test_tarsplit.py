"""The tar-split file: the tar comes out of it again, and any range of it can be read."""

import base64
import gzip
import json
import random

import pytest

from fusestore.tarsplit import TarSplit

PIECE = 45 << 10


def _file(size: int) -> tuple[bytes, TarSplit]:
    tar = random.Random(size).randbytes(size)
    return tar, TarSplit(size, lambda offset, length: tar[offset : offset + length])


@pytest.mark.parametrize("size", [0, 1, 2, 3, 512, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 3 * PIECE + 1024])
def test_the_lines_hold_the_tar_in_order(size: int) -> None:
    tar, file = _file(size)
    lines = [json.loads(line) for line in gzip.decompress(file.read(0, TarSplit.size(size))).splitlines()]
    assert [(line["type"], line["position"]) for line in lines] == [(2, n) for n in range(len(lines))]
    assert b"".join(base64.b64decode(line["payload"]) for line in lines) == tar


@pytest.mark.parametrize("size", [0, 1, PIECE, 2 * PIECE + 77])
def test_the_size_is_that_of_all_that_can_be_read(size: int) -> None:
    _, file = _file(size)
    assert len(file.read(0, 1 << 20)) == TarSplit.size(size)
    assert file.read(TarSplit.size(size), 10) == file.read(1 << 20, 10) == b""


@pytest.mark.parametrize("step", [1000, 4096, 65_535, 131_072])
def test_it_can_be_read_in_pieces(step: int) -> None:
    _, file = _file(3 * PIECE + 5)
    size = TarSplit.size(3 * PIECE + 5)
    pieces = [file.read(offset, step) for offset in range(0, size, step)]
    assert b"".join(pieces) == file.read(0, size)
