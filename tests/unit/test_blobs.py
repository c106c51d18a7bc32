"""Taking blobs in, and reading the tar inside them: every compression, damage, threads."""

import bz2
import errno
import gzip
import hashlib
import io
import os
import random
import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
from rig.ocisources import tar_of
from rig.pages import drop_pages
from rig.stores import fail_to_open
from rig.streams import STREAMS, content

from fusestore import blobs
from fusestore.blobs import Ingested, LayerReader, derive, ingest, open_reader
from fusestore.errors import LayerRefused, StoreDamaged
from fusestore.layer import LayerIndex
from fusestore.nodes import Digest
from fusestore.seek import SeekTable
from fusestore.spancache import SpanCache
from fusestore.tar import TarLimits

LARGE = 1 << 30
FILES = {f"dir/file{number}": content(number * 90_001, seed=number) for number in range(11)}


TAR = tar_of(FILES)
COMPRESSORS = {"plain": lambda plain: plain} | {name: make for name, (_, make) in STREAMS.items()}
SEEKABLE = [name for name in COMPRESSORS if name != "plain"]


def sha256(data: bytes) -> Digest:
    return Digest("sha256:" + hashlib.sha256(data).hexdigest())


@dataclass
class Layer:
    """A blob in a directory, with what `ingest` made of it."""

    place: Path
    blob: bytes
    ingested: Ingested

    @property
    def path(self) -> Path:
        return self.place / "blob"

    def open(self, cache: SpanCache) -> LayerReader:
        seek = str(self.place / "seek")
        return open_reader(str(self.path), seek, cache, str(self.place / "cache"), self.ingested.tar_size)


@pytest.fixture(scope="module")
def ingested() -> dict[str, tuple[bytes, Ingested]]:
    made = {name: make(TAR) for name, make in COMPRESSORS.items()}
    return {name: (blob, ingest(io.BytesIO(blob))) for name, blob in made.items()}


@pytest.fixture
def layer(ingested):
    """Makes a Layer of one of COMPRESSORS, on a disk."""
    places = []

    def made(name: str) -> Layer:
        place = Path(
            tempfile.mkdtemp(prefix="fusestore-blobs-", dir=os.environ.get("FUSESTORE_TEST_TMP", "/var/tmp"))
        )
        places.append(place)
        blob, result = ingested[name]
        (place / "blob").write_bytes(blob)
        (place / "seek").write_bytes(result.seek)
        return Layer(place, blob, result)

    yield made
    for place in places:
        shutil.rmtree(place)


@pytest.fixture
def decoders(monkeypatch):
    """The runs that were decoded, in order."""
    runs = []

    class Counted(blobs.RunDecoder):
        def __init__(self, table, run, read_at):
            runs.append(run)
            super().__init__(table, run, read_at)

    monkeypatch.setattr(blobs, "RunDecoder", Counted)
    return runs


# Taking in.


@pytest.mark.parametrize("name", COMPRESSORS)
def test_digests_and_sizes(ingested, name):
    blob, result = ingested[name]
    assert (result.blob, result.blob_size) == (sha256(blob), len(blob))
    assert (result.diff_id, result.tar_size) == (sha256(TAR), len(TAR))


@pytest.mark.parametrize("name", COMPRESSORS)
def test_the_compression_is_told(ingested, name):
    assert ingested[name][1].compression == (STREAMS[name][0] if name in STREAMS else "none")


@pytest.mark.parametrize("name", COMPRESSORS)
def test_the_index_knows_where_the_content_is(ingested, name):
    index = LayerIndex(ingested[name][1].index)
    directory = index.lookup(index.ROOT, b"dir")
    for path, data in FILES.items():
        inode = index.lookup(directory, path.removeprefix("dir/").encode())
        found = b"".join(TAR[each.source : each.source + each.length] for each in index.extents(inode))
        assert found == data


def test_of_a_plain_tar_each_span_can_be_read_alone(layer):
    one = layer("plain")
    table = SeekTable(one.place / "seek", len(TAR))
    assert table.compression == "none"
    assert [table.run(span) for span in range(len(table))] == [(n, n + 1) for n in range(len(table))]
    assert [table.restart(span).in_offset for span in range(len(table))] == list(table.starts[:-1])
    table.close()


def test_a_damaged_plain_tar_is_an_error_where_it_is_damaged_only(layer):
    one = layer("plain")
    changed = bytearray(one.blob)
    changed[-1000] ^= 1
    one.path.write_bytes(changed)
    reader = one.open(SpanCache(LARGE))
    assert reader.read(0, 4096) == TAR[:4096]
    with pytest.raises(StoreDamaged, match=f"layer blob {one.path}: .* another checksum .* import the image"):
        reader.read(len(TAR) - 4096, 10)
    assert reader.read_now(len(TAR) - 4096, 10) is None
    one.path.write_bytes(one.blob)
    reader.reopen()
    assert reader.read(len(TAR) - 4096, 4096) == TAR[-4096:]
    reader.close()


def test_the_sink_gets_the_blob_and_progress_its_length(ingested):
    blob, _ = ingested["gzip 6"]
    sunk, lengths = [], []
    ingest(io.BytesIO(blob), sink=sunk.append, progress=lengths.append)
    assert b"".join(sunk) == blob
    assert sum(lengths) == len(blob)


class Trickle(io.BytesIO):
    """A pipe or a socket: gives less than it is asked for."""

    def read(self, size=-1):
        return super().read(min(size, 5))


@pytest.mark.parametrize("name", ["plain", "gzip 6", "zstd"])
def test_a_source_may_give_less_than_it_is_asked_for(name):
    blob = COMPRESSORS[name](tar_of({"a": b"x" * 1000}))
    assert ingest(Trickle(blob)) == ingest(io.BytesIO(blob))


def test_expected_digests_that_match_are_fine(ingested):
    blob, result = ingested["zstd"]
    assert ingest(io.BytesIO(blob), expected_blob=result.blob, expected_diff_id=result.diff_id) == result


def test_another_blob_is_refused(ingested):
    blob, result = ingested["gzip 6"]
    with pytest.raises(LayerRefused, match=f"the blob has digest {result.blob}, not {sha256(b'')}"):
        ingest(io.BytesIO(blob), expected_blob=sha256(b""))


def test_another_content_is_refused(ingested):
    blob, result = ingested["gzip 6"]
    with pytest.raises(LayerRefused, match=f"uncompressed layer .* has digest {result.diff_id}, not"):
        ingest(io.BytesIO(blob), expected_diff_id=sha256(b""))


REFUSED = {
    "truncated gzip": (gzip.compress(TAR)[:-100], "truncated"),
    "gzip without its end": (gzip.compress(TAR)[:-4], "gzip data: truncated"),
    "zstd without its end": (STREAMS["zstd 19"][1](TAR)[:-1], "zstd data: truncated"),
    "truncated tar": (TAR[:100_000], "truncated"),
    "truncated tar in gzip": (gzip.compress(TAR[:100_000]), "truncated"),
    "garbage after gzip": (gzip.compress(TAR) + b"garbage", "garbage"),
    "bzip2": (bz2.compress(TAR), "unsupported compression bzip2"),
    "text": (b"no tar at all " * 100, "tar"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    blob, message = REFUSED[name]
    with pytest.raises(LayerRefused, match=message):
        ingest(io.BytesIO(blob))


@pytest.mark.parametrize("name", ["gzip 9", "zstd 19"])
def test_a_bomb_is_refused_at_its_limit_and_read_no_further(name):
    bomb = COMPRESSORS[name](tar_of({"zeros": bytes(80 << 20)}))
    sunk = []
    with pytest.raises(LayerRefused, match="limit: total"):
        ingest(io.BytesIO(bomb + bytes(10 << 20)), sink=sunk.append, limits=TarLimits(total=1 << 20))
    assert sum(map(len, sunk)) <= 131_072


def test_derive_makes_the_same_again(layer):
    one = layer("gzip 6")
    assert derive(str(one.path), blob=one.ingested.blob, diff_id=one.ingested.diff_id) == one.ingested


@pytest.mark.parametrize(
    "damage", [lambda blob: blob[:-50], lambda blob: blob[:-4] + b"\0\0\0\0", lambda _: b""]
)
def test_derive_names_the_damaged_blob(layer, damage):
    one = layer("gzip 6")
    one.path.write_bytes(damage(one.blob))
    with pytest.raises(StoreDamaged, match=f"layer blob {one.path}: .*; import the image again"):
        derive(str(one.path), blob=one.ingested.blob)


def test_derive_names_the_missing_blob(layer):
    one = layer("gzip 6")
    one.path.unlink()
    with pytest.raises(StoreDamaged, match=f"layer blob {one.path}: No such file or directory; import"):
        derive(str(one.path), blob=one.ingested.blob)


# Reading.

RANGES = [
    (0, 1),
    (0, 0),
    (511, 2),
    (len(TAR) // 2, 131_072),
    ((1 << 20) - 1, 2),
    (1 << 20, 1 << 20),
    (100_000, 3_500_000),
    (0, len(TAR)),
    (len(TAR) - 1, 1),
    (len(TAR) - 1, 100),
    (len(TAR), 1),
    (len(TAR) + 1000, 1),
    (0, 1 << 62),
]


@pytest.mark.parametrize("name", COMPRESSORS)
@pytest.mark.parametrize("capacity", [0, 3 << 20, LARGE])
def test_any_range_is_that_of_the_tar(layer, name, capacity):
    reader = layer(name).open(SpanCache(capacity))
    assert reader.size == len(TAR)
    for offset, length in RANGES + RANGES[::-1]:
        assert reader.read(offset, length) == TAR[offset : offset + length]
        assert reader.read_now(offset, length) in (None, TAR[offset : offset + length])
    reader.close()


@pytest.mark.parametrize("name", SEEKABLE)
def test_read_now_gives_what_was_decoded_and_nothing_else(layer, name):
    reader = layer(name).open(SpanCache(LARGE))
    assert reader.read_now(100, 10) is None
    assert reader.read_now(len(TAR), 10) == b""
    reader.read(100, 10)
    assert reader.read_now(100, 10) == TAR[100:110]
    assert reader.read_now(100, 3_000_000) is None
    reader.close()


def test_read_now_of_a_plain_tar_gives_what_is_in_memory(layer):
    made = layer("plain")
    reader = made.open(SpanCache(0))
    assert reader.read_now(100, 10) is None
    reader.read(0, len(TAR))  # and so it was compared
    assert reader.read_now(100, 3_000_000) == TAR[100:3_000_100]
    with open(made.path, "rb") as blob:
        drop_pages(blob.fileno())
    assert reader.read_now(100, 10) is None
    assert reader.read(100, 3_000_000) == TAR[100:3_000_100]
    assert reader.read_now(100, 10) == TAR[100:110]
    reader.close()


@pytest.mark.parametrize("name", SEEKABLE)
def test_read_now_does_not_wait_for_the_cache(layer, name):
    made = layer(name)
    reader = made.open(SpanCache(LARGE))
    reader.read(100, 10)
    with open(made.place / "cache", "rb") as cache:
        drop_pages(cache.fileno())
    assert reader.read_now(100, 10) is None
    assert reader.read(100, 10) == TAR[100:110]
    reader.close()


@pytest.mark.parametrize("name", SEEKABLE)
def test_each_run_is_decoded_once(layer, name, decoders):
    reader = layer(name).open(SpanCache(LARGE))
    for offset in [*range(0, len(TAR), 50_000), *range(0, len(TAR), 70_000)]:
        reader.read(offset, 4096)
    assert len(decoders) == len(set(decoders))
    reader.close()


@pytest.mark.parametrize("name", ["zstd", "gzip one block"])
@pytest.mark.parametrize("capacity", [0, 3 << 20])
def test_reading_on_in_a_run_decodes_it_once_even_without_room(layer, name, capacity, decoders):
    reader = layer(name).open(SpanCache(capacity))
    assert b"".join(reader.read(offset, 131_072) for offset in range(0, len(TAR), 131_072)) == TAR
    assert decoders == [0]
    reader.close()


@pytest.mark.parametrize("name", ["zstd", "gzip one block"])
def test_going_back_in_a_run_decodes_it_from_its_restart(layer, name, decoders):
    reader = layer(name).open(SpanCache(0))
    for offset in (3 << 20, 0, 3 << 20):
        assert reader.read(offset, 4096) == TAR[offset : offset + 4096]
    assert decoders == [0, 0]
    reader.close()


def test_the_cache_outlives_the_reader(layer, decoders):
    one = layer("gzip 6")
    reader = one.open(SpanCache(LARGE))
    reader.read(0, len(TAR))
    reader.close()
    decoders.clear()
    reader = one.open(SpanCache(LARGE))
    assert reader.read_now(0, 10) is None
    assert reader.read(0, len(TAR)) == TAR
    assert decoders == []
    reader.close()


def test_garbage_in_the_cache_file_is_decoded_again(layer):
    one = layer("gzip 6")
    (one.place / "cache").write_bytes(os.urandom(len(TAR)))
    reader = one.open(SpanCache(LARGE))
    assert reader.read(0, len(TAR)) == TAR
    reader.close()


def test_a_reader_works_on_when_its_files_are_removed(layer):
    one = layer("gzip 6")
    reader = one.open(SpanCache(LARGE))
    for name in ("blob", "seek", "cache"):
        (one.place / name).unlink()
    assert reader.read(0, len(TAR)) == TAR
    reader.close()


def test_two_caches_read_one_layer(layer):
    """Two processes, as far as flock is concerned."""
    one = layer("gzip 6")
    readers = [one.open(SpanCache(LARGE)), one.open(SpanCache(LARGE))]
    for reader in readers:
        assert reader.read(0, len(TAR)) == TAR
    for reader in readers:
        reader.close()


@pytest.mark.parametrize("name", ["plain", "gzip 6", "zstd"])
def test_close_gives_every_descriptor_back(layer, name):
    one = layer(name)
    before = sorted(os.listdir("/proc/self/fd"))
    reader = one.open(SpanCache(LARGE))
    reader.read(0, 3_000_000)
    reader.close()
    reader.close()
    assert sorted(os.listdir("/proc/self/fd")) == before


# A blob that leaves out the end of its tar.

END = len(TAR.rstrip(b"\0")) + -len(TAR.rstrip(b"\0")) % 512
"""Of the last member with its padding."""
LEFT = {"two end blocks": END + 1024, "one end block": END + 512, "no end block": END}


def unpadded(place: Path, left: int, compress=COMPRESSORS["zstd small frames"]) -> Layer:
    """A blob with the first `left` bytes of TAR, whose diff_id is that of TAR."""
    blob = compress(TAR[:left])
    result = ingest(io.BytesIO(blob), expected_diff_id=sha256(TAR))
    (place / "blob").write_bytes(blob)
    (place / "seek").write_bytes(result.seek)
    return Layer(place, blob, result)


def test_the_tar_ends_with_its_record():
    assert len(TAR) % 10_240 == 0
    assert not any(TAR[END:])


@pytest.mark.parametrize("left", LEFT.values(), ids=LEFT)
def test_the_padded_tar_is_the_layer(left):
    whole = ingest(io.BytesIO(COMPRESSORS["zstd"](TAR)))
    found = ingest(io.BytesIO(COMPRESSORS["zstd"](TAR[:left])), expected_diff_id=sha256(TAR))
    assert (found.diff_id, found.tar_size, found.index) == (whole.diff_id, whole.tar_size, whole.index)


@pytest.mark.parametrize("name", SEEKABLE)
@pytest.mark.parametrize("capacity", [0, LARGE])
def test_what_a_blob_leaves_out_is_read_as_zeros(tmp_path, name, capacity):
    left = LEFT["two end blocks"]
    reader = unpadded(tmp_path, left, COMPRESSORS[name]).open(SpanCache(capacity))
    assert reader.size == len(TAR)
    for offset in (left, len(TAR) - 1, left - 1, left + 511, 0):
        assert reader.read(offset, len(TAR)) == TAR[offset:]
    reader.close()


def test_zeros_left_out_need_no_blob(tmp_path):
    one = unpadded(tmp_path, LEFT["two end blocks"])
    os.truncate(one.path, 0)
    reader = one.open(SpanCache(0))
    assert reader.read(LEFT["two end blocks"], len(TAR)) == TAR[LEFT["two end blocks"] :]
    with pytest.raises(StoreDamaged):
        reader.read(LEFT["two end blocks"] - 1, 2)
    reader.close()


def test_derive_pads_as_ingest_does(tmp_path):
    one = unpadded(tmp_path, LEFT["two end blocks"])
    assert derive(str(one.path), blob=sha256(one.blob), diff_id=sha256(TAR)) == one.ingested


def test_an_empty_tar_may_lack_all_of_it():
    blob = COMPRESSORS["zstd"](b"")
    result = ingest(io.BytesIO(blob), expected_diff_id=sha256(bytes(10_240)))
    assert result.tar_size == 10_240
    assert result.index == ingest(io.BytesIO(bytes(10_240))).index


def test_the_end_blocks_may_have_a_record_of_their_own():
    tar = tar_of({"file": bytes(10_240 - 512)})
    assert len(tar) == 20_480
    blob = COMPRESSORS["zstd"](tar[:10_240])
    assert ingest(io.BytesIO(blob), expected_diff_id=sha256(tar)).tar_size == 20_480


def test_a_tar_without_padding_gets_none():
    tar = TAR[: LEFT["two end blocks"]]
    found = ingest(io.BytesIO(COMPRESSORS["zstd"](tar)), expected_diff_id=sha256(tar))
    assert found == ingest(io.BytesIO(COMPRESSORS["zstd"](tar)))


NOT_PADDING = {
    "a record more": TAR + bytes(10_240),
    "a part of a block": TAR[: LEFT["two end blocks"] + 511],
    "something else than zeros": TAR[:-1] + b"\1",
}


@pytest.mark.parametrize("name", NOT_PADDING)
def test_what_padding_does_not_explain_is_refused(name):
    unpadded_tar = TAR[: LEFT["two end blocks"]]
    with pytest.raises(LayerRefused, match=f"has digest {sha256(unpadded_tar)}, not"):
        ingest(io.BytesIO(COMPRESSORS["zstd"](unpadded_tar)), expected_diff_id=sha256(NOT_PADDING[name]))


def test_a_plain_tar_is_its_own_diff_id():
    with pytest.raises(LayerRefused, match=r"uncompressed layer \(diff_id\) has digest"):
        ingest(io.BytesIO(TAR[: LEFT["two end blocks"]]), expected_diff_id=sha256(TAR))


# Threads.


def in_threads(count: int, work) -> None:
    """Runs work(number) in threads that start together; raises what one of them raised."""
    barrier = threading.Barrier(count)
    errors = []

    def run(number: int) -> None:
        barrier.wait()
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("name", ["gzip 6", "gzip one block", "zstd"])
@pytest.mark.parametrize("capacity", [0, LARGE])
def test_threads_that_miss_one_span_decode_it_once(layer, name, capacity, decoders):
    reader = layer(name).open(SpanCache(capacity))
    offset = reader.size - 1000

    def work(number: int) -> None:
        assert reader.read(offset, 1000) == TAR[offset:]

    in_threads(8, work)
    assert len(decoders) == 1
    reader.close()


@pytest.mark.parametrize("name", ["gzip 6", "gzip one block", "zstd", "zstd small frames"])
def test_four_threads_read_what_is_right_while_spans_are_evicted(layer, name):
    cache = SpanCache(5 << 19)
    reader = layer(name).open(cache)

    def work(number: int) -> None:
        for turn in range(40):
            offset = (turn * 1_234_567 + number * 777_777) % len(TAR)
            assert reader.read(offset, 70_000) == TAR[offset : offset + 70_000]
            assert reader.read_now(offset, 70_000) in (None, TAR[offset : offset + 70_000])

    in_threads(4, work)
    assert cache.used <= cache.capacity
    reader.close()


# Damage.


@pytest.mark.parametrize("name", ["gzip 6", "gzip members", "gzip stored", "zstd small frames"])
def test_damage_is_an_error_of_its_span_and_of_no_other(layer, name):
    one = layer(name)
    damaged = bytearray(one.blob)
    place = len(damaged) // 2
    damaged[place : place + 100] = bytes(byte ^ 0x55 for byte in damaged[place : place + 100])
    one.path.write_bytes(damaged)
    reader = one.open(SpanCache(LARGE))
    errors = []
    for offset in range(0, len(TAR), 10_000):
        try:
            assert reader.read(offset, 10_000) == TAR[offset : offset + 10_000]
        except StoreDamaged as error:
            errors.append((offset, str(error)))
    assert errors
    assert errors[-1][0] - errors[0][0] <= 2_500_000
    assert all(text.startswith(f"layer blob {one.path}: ") for _, text in errors)
    assert all(text.endswith("; import the image again") and "\n" not in text for _, text in errors)
    reader.close()


def test_damage_that_decodes_spares_the_spans_behind_it_in_its_run(tmp_path):
    """One frame, of blocks that are not compressed."""
    tar = tar_of({"noise": random.Random(1).randbytes(5_000_000)})
    blob = bytearray(STREAMS["zstd"][1](tar))
    result = ingest(io.BytesIO(blob))
    blob[1_000_000] ^= 1
    (tmp_path / "blob").write_bytes(blob)
    (tmp_path / "seek").write_bytes(result.seek)
    reader = Layer(tmp_path, bytes(blob), result).open(SpanCache(LARGE))
    assert reader.read(3 << 20, 4096) == tar[3 << 20 :][:4096]
    with pytest.raises(StoreDamaged, match="wrong checksum at byte 0 of its tar"):
        reader.read(0, 4096)
    reader.close()


@pytest.mark.parametrize("name", ["gzip 6", "zstd small frames", "zstd", "plain"])
def test_a_truncated_blob_is_an_error_behind_its_end_only(layer, name):
    one = layer(name)
    os.truncate(one.path, len(one.blob) * 7 // 8)
    reader = one.open(SpanCache(LARGE))
    assert reader.read(0, 4096) == TAR[:4096]
    with pytest.raises(StoreDamaged, match=f"layer blob {one.path}"):
        reader.read(len(TAR) - 4096, 4096)
    assert reader.read(0, 4096) == TAR[:4096]
    reader.close()


def test_what_was_cached_outlives_the_blob(layer):
    one = layer("zstd")
    reader = one.open(SpanCache(LARGE))
    reader.read(0, len(TAR))
    os.truncate(one.path, 0)
    assert reader.read(0, len(TAR)) == TAR
    reader.close()


def test_a_blob_of_another_layer_is_damage(layer):
    one = layer("gzip 6")
    one.path.write_bytes(gzip.compress(content(5_000_000, seed=99)))
    reader = one.open(SpanCache(LARGE))
    with pytest.raises(StoreDamaged):
        reader.read(0, 10)
    reader.close()


def test_a_missing_blob_is_damage(layer):
    one = layer("gzip 6")
    one.path.unlink()
    with pytest.raises(
        StoreDamaged, match=f"layer blob {one.path}: No such file or directory; import the image"
    ):
        one.open(SpanCache(LARGE))


def test_a_damaged_table_is_damage_and_leaks_nothing(layer):
    one = layer("gzip 6")
    (one.place / "seek").write_bytes(b"FSSPANS\n" + bytes(100))
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(StoreDamaged, match="seek points"):
        one.open(SpanCache(LARGE))
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_reader_that_cannot_be_opened_leaks_nothing(layer, monkeypatch):
    def exhausted(*_):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    one = layer("gzip 6")
    before = sorted(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(SpanCache, "open", exhausted)
    with pytest.raises(OSError, match="Too many open files"):
        one.open(SpanCache(LARGE))
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_disk_error_of_the_blob_is_no_damage(layer):
    reader = layer("gzip 6").open(SpanCache(LARGE))
    os.close(reader._blob_fd)
    try:
        with pytest.raises(OSError, match="Bad file descriptor"):
            reader.read(0, 10)
    finally:
        reader._blob_fd = os.open("/dev/null", os.O_RDONLY)
        reader.close()


PASSING = [errno.EMFILE, errno.ENFILE, errno.EIO, errno.EACCES, errno.ENOSPC, errno.ENOMEM]


@pytest.mark.parametrize("number", PASSING)
@pytest.mark.parametrize("file", ["blob", "seek"])
def test_what_cannot_be_opened_is_no_damage(layer, monkeypatch, file, number):
    one = layer("gzip 6")
    fail_to_open(monkeypatch, one.place / file, number)
    with pytest.raises(OSError) as failure:
        one.open(SpanCache(LARGE))
    assert failure.value.errno == number


@pytest.mark.parametrize("number", PASSING)
def test_what_cannot_be_opened_to_derive_is_no_damage(layer, monkeypatch, number):
    one = layer("gzip 6")
    fail_to_open(monkeypatch, one.path, number)
    with pytest.raises(OSError) as failure:
        derive(str(one.path))
    assert failure.value.errno == number


@pytest.mark.parametrize("name", ["plain", "gzip 6", "zstd"])
def test_a_blob_that_replaced_a_damaged_one_is_read_when_reopened(layer, name):
    one = layer(name)
    reader = one.open(SpanCache(LARGE))
    one.path.write_bytes(one.blob[: len(one.blob) // 2])
    with pytest.raises(StoreDamaged):
        reader.read(0, len(TAR))
    (one.place / "sound").write_bytes(one.blob)
    (one.place / "sound").rename(one.path)
    reader.reopen()
    assert reader.read(0, len(TAR)) == TAR
    reader.close()


def test_a_blob_that_cannot_be_reopened_is_still_read(layer):
    one = layer("gzip 6")
    reader = one.open(SpanCache(LARGE))
    one.path.unlink()
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(StoreDamaged):
        reader.reopen()
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert reader.read(0, len(TAR)) == TAR
    reader.close()
