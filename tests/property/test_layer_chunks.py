"""TarScanner: its entries do not depend on how the bytes come, and only LayerRefused leaves it."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from rig.tars import END, header, long_name, member, padded, pax

from fusestore.errors import LayerRefused
from fusestore.nodes import TarEntry
from fusestore.tar import TarScanner

NAMES = st.binary(max_size=300).map(lambda name: name.replace(b"\0", b"/") + b"n")
CONTENT = st.binary(max_size=1200)
VALUES = st.binary(max_size=40)
RUNS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 700)), max_size=30)


def file(name: bytes, content: bytes, type: bytes, link: bytes) -> bytes:
    return member(name[-100:], content if type in b"07" else b"", type=type, link=link[:100])


def with_records(name: bytes, xattrs: dict[bytes, bytes], mtime: int, content: bytes) -> bytes:
    records = [(b"path", name), (b"mtime", b"%d.%09d" % (mtime, mtime)), (b"size", b"%d" % len(content))]
    records += [(b"SCHILY.xattr.user." + key.hex().encode(), value) for key, value in xattrs.items()]
    return pax(*records) + header(b"x") + padded(content)


def sparse_map(runs: list[tuple[int, int]]) -> tuple[list[int], int]:
    """Offsets and lengths in turn, and the size of the file, of runs that are (gap, length)."""
    pairs: list[int] = []
    end = 0
    for gap, length in runs:
        pairs += (end + gap, length)
        end += gap + length
    return pairs, end + 5


def sparse(version: int, runs: list[tuple[int, int]]) -> bytes:
    pairs, size = sparse_map(runs)
    stored = bytes(sum(pairs[1::2]))
    if version == 1:
        lines = b"".join(b"%d\n" % number for number in (len(runs), *pairs))
        records = [(b"major", b"1"), (b"minor", b"0"), (b"realsize", b"%d" % size)]
        return pax(*((b"GNU.sparse." + key, value) for key, value in records)) + member(
            b"s", padded(lines) + stored
        )
    if version == 0:
        records = [(b"size", b"%d" % size), (b"map", b",".join(b"%d" % number for number in pairs))]
        return pax(*((b"GNU.sparse." + key, value) for key, value in records)) + member(b"s", stored)
    slots = [b"%011o\0%011o\0" % pair for pair in zip(pairs[::2], pairs[1::2], strict=True)]
    more = slots[4:]
    tail = b"".join(slots[:4]).ljust(96, b"\0") + (b"\1" if more else b"\0") + b"%011o\0" % size
    blocks = header(b"s", type=b"S", size=len(stored), magic=b"ustar  \0", prefix=bytes(41) + tail)
    while more:
        block, more = more[:21], more[21:]
        blocks += b"".join(block).ljust(504, b"\0") + (b"\1" if more else b"\0") + bytes(7)
    return blocks + padded(stored)


MEMBERS = st.one_of(
    st.builds(file, NAMES, CONTENT, st.sampled_from([b"0", b"1", b"2", b"5", b"6", b"7"]), NAMES),
    st.builds(
        with_records, NAMES, st.dictionaries(VALUES, VALUES, max_size=4), st.integers(0, 999_999_999), CONTENT
    ),
    st.builds(lambda name: long_name(name) + member(b"short"), NAMES),
    st.builds(lambda name: long_name(name, b"K") + member(b"l", type=b"2"), NAMES),
    st.builds(sparse, st.integers(0, 2), RUNS),
)
TARS = st.builds(
    lambda members, end: b"".join(members) + end, st.lists(MEMBERS, max_size=5), st.sampled_from([b"", END])
)


def scanned(chunks: list[bytes]) -> list[TarEntry] | None:
    """None: refused."""
    scanner = TarScanner()
    entries = []
    try:
        for chunk in chunks:
            entries += scanner.feed(memoryview(chunk))
        scanner.close()
    except LayerRefused:
        return None
    return entries


def cut(data: bytes, at: list[int]) -> list[bytes]:
    bounds = [0, *sorted(place % (len(data) + 1) for place in at), len(data)]
    return [data[start:end] for start, end in pairwise(bounds)]


PLACES = st.lists(st.integers(0, 1 << 20), max_size=20)


@settings(deadline=None)
@given(TARS, PLACES)
def test_any_chunking_gives_the_same_entries(tar: bytes, at: list[int]) -> None:
    whole = scanned([tar])
    assert whole is not None
    assert scanned(cut(tar, at)) == whole


@settings(deadline=None)
@given(
    TARS, st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=8)), min_size=1), PLACES
)
def test_damaged_tars_are_read_or_refused_by_any_chunking(
    tar: bytes, damage: list[tuple[int, bytes]], at: list[int]
) -> None:
    damaged = bytearray(tar or bytes(512))
    for place, value in damage:
        place %= len(damaged)
        damaged[place : place + len(value)] = value
    for start in range(0, len(damaged) - 511, 512):
        # Right checksums, so that the damage is seen by what is behind them.
        block = bytes(damaged[start : start + 512])
        if block[257:262] == b"ustar":
            total = sum(block[:148]) + 8 * 0x20 + sum(block[156:])
            damaged[start + 148 : start + 156] = b"%06o\0 " % total
    assert scanned(cut(bytes(damaged), at)) == scanned([bytes(damaged)])


@settings(deadline=None)
@given(st.binary(max_size=2000))
def test_junk_is_refused(junk: bytes) -> None:
    assert scanned([junk]) in (None, [])
