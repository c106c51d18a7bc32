"""Random content, any compressor, random reads: always the bytes of the tar; and blobs with random damage."""

import io
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from rig.streams import STREAMS, EveryRestart, content, scan

from fusestore.blobs import open_reader
from fusestore.errors import StoreDamaged
from fusestore.spancache import SpanCache

sizes = st.integers(1, 3_000_000)
compressors = st.sampled_from(sorted(STREAMS))
capacities = st.sampled_from([0, 1_200_000, 1 << 30])
fractions = st.floats(0, 1, exclude_max=True)
lengths = st.integers(1, 200_000)


class Opened:
    """A reader of a blob in a directory of its own."""

    def __init__(self, blob: bytes, table: bytes, tar_size: int, capacity: int) -> None:
        self._place = tempfile.TemporaryDirectory(prefix="fusestore-seek-")
        place = Path(self._place.name)
        (place / "blob").write_bytes(blob)
        (place / "seek").write_bytes(table)
        paths = [str(place / name) for name in ("blob", "seek", "cache")]
        self.reader = open_reader(paths[0], paths[1], SpanCache(capacity), paths[2], tar_size)

    def __enter__(self):
        return self.reader

    def __exit__(self, *_):
        self.reader.close()
        self._place.cleanup()


@settings(max_examples=60, deadline=None)
@given(
    size=sizes,
    seed=st.integers(0, 1000),
    name=compressors,
    capacity=capacities,
    every=st.booleans(),
    reads=st.lists(st.tuples(fractions, lengths), min_size=1, max_size=30),
)
def test_any_read_of_any_stream_is_right(size, seed, name, capacity, every, reads):
    plain = content(size, seed)
    compression, make = STREAMS[name]
    blob = make(plain)
    table = scan(compression, blob, EveryRestart() if every else None)
    with Opened(blob, table, size, capacity) as reader:
        for fraction, length in reads:
            offset = int(fraction * size)
            expected = plain[offset : offset + length]
            assert reader.read_now(offset, length) in (None, expected)
            assert reader.read(offset, length) == expected


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    name=compressors,
    damage=st.lists(st.tuples(fractions, st.binary(min_size=1, max_size=20)), min_size=1, max_size=3),
    cut=st.one_of(st.none(), fractions),
    reads=st.lists(st.tuples(fractions, lengths), min_size=1, max_size=10),
)
def test_a_damaged_blob_gives_right_bytes_or_says_so(seed, name, damage, cut, reads):
    plain = content(1_500_000, seed)
    compression, make = STREAMS[name]
    blob = make(plain)
    table = scan(compression, blob)
    changed = io.BytesIO(blob)
    for fraction, data in damage:
        changed.seek(int(fraction * len(blob)))
        changed.write(data)
    bad = changed.getvalue()[: len(blob)]
    if cut is not None:
        bad = bad[: int(cut * len(bad))]
    with Opened(bad, table, len(plain), 1 << 30) as reader:
        for fraction, length in reads:
            offset = int(fraction * len(plain))
            try:
                assert reader.read(offset, length) == plain[offset : offset + length]
            except StoreDamaged as error:
                assert "import the image again" in str(error)
