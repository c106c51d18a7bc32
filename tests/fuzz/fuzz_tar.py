"""Fuzz target: tars, and layer indexes.

Invariant: whatever the bytes, a tar becomes entries and an index, or LayerRefused; an index answers, or
StoreDamaged. Every other exception, a crash or a hang is a bug. An index made from a tar is sound.

    python tests/fuzz/fuzz_tar.py [SECONDS | CORPUS.zip]

With atheris installed it is driven by coverage (then the arguments are libFuzzer's), else by random mutation.
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rig.fuzzing import drive
from rig.indexes import decoded_pages, repacked, touch_everything
from rig.tars import END, header, long_name, member, padded, pax

from fusestore.errors import LayerRefused
from fusestore.layer import LayerBuilder
from fusestore.tar import TarScanner


def sparse(*records: tuple[bytes, bytes]) -> bytes:
    return pax(*((b"GNU.sparse." + keyword, value) for keyword, value in records))


CORPUS = [
    member(b"d/", type=b"5") + member(b"d/f", b"content") + member(b"l", type=b"1", link=b"d/f") + END,
    member(b"d/.wh.x")
    + member(b"d/.wh..wh..opq")
    + member(b"c", type=b"3")
    + member(b"s", type=b"2", link=b"d"),
    pax((b"path", b"p"), (b"mtime", b"-1.5"), (b"SCHILY.xattr.user.a", b"\0"), (b"size", b"3"))
    + member(b"f", b"abc"),
    pax((b"uid", b"1"), type=b"g") + pax((b"LIBARCHIVE.xattr.user.%41", b"AP8")) + member(b"f"),
    long_name(b"n/" * 100)
    + long_name(b"t" * 200, b"K")
    + member(b"f", type=b"1")
    + member(b"t" * 100, prefix=b"p"),
    sparse((b"map", b"0,1,9,2"), (b"size", b"99")) + member(b"f", b"abc"),
    sparse((b"offset", b"0"), (b"numbytes", b"1"), (b"numblocks", b"1"), (b"size", b"9"))
    + member(b"f", b"a"),
    sparse((b"major", b"1"), (b"minor", b"0"), (b"realsize", b"9"))
    + member(b"f", padded(b"1\n2\n3\n") + b"abc"),
    member(
        b"f",
        b"ab",
        type=b"S",
        magic=b"ustar  \0",
        prefix=bytes(41) + b"00000000001\x0000000000002\0" + bytes(73) + b"00000000011\0",
    ),
    header(b"f", uid=b"\x80\0\0\0\0\0\1\0", mtime=b"\xff" * 12),
]
VALUES = [
    b"\0",
    b"\xff",
    b"/",
    b"..",
    b"=",
    b"\n",
    b",",
    b"-",
    b"9" * 20,
    b"\x80" + bytes(11),
    b"1",
    b"S",
    b"x",
    b"5",
]


def index_of(tar: bytes) -> bytes:
    scanner, builder = TarScanner(), LayerBuilder()
    for start in range(0, len(tar), 1000):
        for entry in scanner.feed(tar[start : start + 1000]):
            builder.add(entry)
    scanner.close()
    return builder.finish(scanner.size)


INDEX = index_of(b"".join(CORPUS[1:]))
HEAD, PAGES = decoded_pages(INDEX)


def check(data: bytes) -> None:
    if not data:
        return
    target, data = data[0] % 5, data[1:]
    match target:
        case 0:
            check_tar(data)
        case 1:
            check_tar(with_right_checksums(data))
        case 2:
            # The two pages of an index that is small, in one piece.
            touch_everything(repacked(HEAD, [data[: len(PAGES[0])], data[len(PAGES[0]) :]]))
        case 3:
            # The same with a head that lies.
            head = HEAD[: -len(data[:8])] + data[:8] if data else HEAD
            touch_everything(repacked(head, [data[8:], PAGES[1]]))
        case _:
            touch_everything(data)


def check_tar(tar: bytes) -> None:
    try:
        index = index_of(tar)
    except LayerRefused:
        return
    assert not touch_everything(index)


def with_right_checksums(tar: bytes) -> bytes:
    fixed = bytearray(tar)
    for start in range(0, len(tar) - 511, 512):
        if tar[start + 257 : start + 262] == b"ustar":
            total = sum(tar[start : start + 148]) + 8 * 0x20 + sum(tar[start + 156 : start + 512])
            fixed[start + 148 : start + 156] = b"%06o\0 " % total
    return bytes(fixed)


def mutated(rng: random.Random) -> bytes:
    target = rng.randrange(5)
    seed = {2: b"".join(PAGES), 3: HEAD[-8:] + PAGES[0], 4: INDEX}.get(target)
    seed = seed or b"".join(rng.sample(CORPUS, rng.randint(1, 4)))
    data = bytearray(seed)
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(data))
        value = rng.choice((*VALUES, rng.randbytes(rng.randint(1, 4))))
        match rng.randrange(8):
            case 0:
                del data[place : place + rng.randint(1, 600)]
                data = data or bytearray(1)
            case 1:
                data[place:place] = rng.choice(CORPUS)
            case _:
                data[place : place + len(value)] = value
    return bytes((target, *data))


if __name__ == "__main__":
    drive(check, mutated)
