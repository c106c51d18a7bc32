"""The span cache: what is held is right, the bound holds, the file is scratch."""

import errno
import fcntl
import os
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
from rig.streams import content

from fusestore import spancache
from fusestore.seek import SeekTable, SpanCutter
from fusestore.spancache import PARKED_MAX, SpanCache

SIZES = (100_000, 5_000, 300, 64_000, 4096, 200_000, 77_777)
"""Spans that begin and end within blocks, and one that is within a single block."""
TAR = content(sum(SIZES))
LARGE = 1 << 30


@pytest.fixture
def place():
    """A directory on a disk, where st_blocks counts."""
    path = Path(
        tempfile.mkdtemp(prefix="fusestore-spans-", dir=os.environ.get("FUSESTORE_TEST_TMP", "/var/tmp"))
    )
    yield path
    shutil.rmtree(path)


@pytest.fixture
def table(tmp_path):
    spans = SpanCutter()
    start = 0
    for size in SIZES:
        spans.restart(start, 0, b"")
        spans.write(TAR[start : start + size])
        start += size
    (tmp_path / "seek").write_bytes(spans.finish("zstd", len(TAR)))
    table = SeekTable(str(tmp_path / "seek"), len(TAR))
    yield table
    table.close()


@pytest.fixture
def open_file(place, table):
    """Opens the span file of a layer; closes it after the test."""
    files = []

    def opened(cache: SpanCache, name: str = "cache"):
        file = cache.open(str(place / name), table)
        files.append(file)
        return file

    yield opened
    for file in files:
        if file._fd >= 0:
            file.close()


def span_bytes(table: SeekTable, span: int) -> bytes:
    return TAR[table.starts[span] : table.starts[span + 1]]


def store_all(file, table) -> None:
    for span in range(len(table)):
        assert file.store(span, span_bytes(table, span))


def on_disk(path: Path) -> int:
    return path.stat().st_blocks * 512


def held(file, table) -> list[int]:
    return [span for span in range(len(table)) if file.read(*table.starts[span : span + 2]) is not None]


# Reading.


def test_nothing_is_here_at_first(open_file, table):
    file = open_file(SpanCache(LARGE))
    assert file.read(0, 1) is None
    assert file.load(0) is None


def test_a_stored_span_is_read(open_file, table):
    file = open_file(SpanCache(LARGE))
    file.store(3, span_bytes(table, 3))
    assert file.read(table.starts[3] + 5, table.starts[4]) == span_bytes(table, 3)[5:]
    assert file.load(3) == span_bytes(table, 3)


def test_a_read_over_several_spans_needs_all_of_them(open_file, table):
    file = open_file(SpanCache(LARGE))
    for span in (1, 3):
        file.store(span, span_bytes(table, span))
    start, end = table.starts[1] + 7, table.starts[4] - 7
    assert file.read(start, end) is None
    file.store(2, span_bytes(table, 2))
    assert file.read(start, end) == TAR[start:end]


def test_a_read_that_ends_where_a_span_ends_needs_not_the_next(open_file, table):
    file = open_file(SpanCache(LARGE))
    file.store(0, span_bytes(table, 0))
    assert file.read(0, SIZES[0]) == TAR[: SIZES[0]]


def test_a_file_deleted_while_open_goes_on(open_file, table, place):
    file = open_file(SpanCache(LARGE))
    store_all(file, table)
    (place / "cache").unlink()
    assert file.read(0, len(TAR)) == TAR


def test_a_file_cut_while_open_is_not_believed(open_file, table, place):
    file = open_file(SpanCache(LARGE))
    store_all(file, table)
    os.truncate(place / "cache", 50_000)
    assert file.read(40_000, 60_000) is None


def test_what_cannot_be_read_is_not_here(open_file, table, monkeypatch):
    file = open_file(SpanCache(LARGE))
    store_all(file, table)

    def failing(fd, length, offset):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", failing)
    assert file.read(0, 10) is None


# The bound.


@pytest.mark.parametrize("capacity", [0, 4096, 110_000, 250_000, 400_000])
def test_the_bound_holds_on_disk_after_every_store(open_file, table, place, capacity):
    cache = SpanCache(capacity)
    files = [open_file(cache, name) for name in ("a", "b")]
    for span in [*range(len(table)), *reversed(range(len(table)))]:
        for file in files:
            file.store(span, span_bytes(table, span))
            assert on_disk(place / "a") + on_disk(place / "b") <= cache.used <= capacity


def test_a_span_over_the_capacity_is_not_stored(open_file, table):
    file = open_file(SpanCache(110_000))
    assert not file.store(5, span_bytes(table, 5))
    assert file.store(0, span_bytes(table, 0))


def test_the_least_recently_used_span_is_evicted(open_file, table):
    cache = SpanCache(260_000)
    file = open_file(cache)
    for span in (0, 3, 6):
        file.store(span, span_bytes(table, span))
    assert file.read(0, 10) is not None
    file.store(1, span_bytes(table, 1))
    assert held(file, table) == [0, 1, 6]


def test_eviction_takes_from_other_layers(open_file, table):
    cache = SpanCache(250_000)
    first, second = open_file(cache, "a"), open_file(cache, "b")
    first.store(5, span_bytes(table, 5))
    second.store(0, span_bytes(table, 0))
    assert held(first, table) == []


def test_eviction_leaves_no_block_behind(open_file, table, place):
    """Neighbours share a block at each boundary."""
    cache = SpanCache(LARGE)
    file = open_file(cache)
    store_all(file, table)
    cache.capacity = 0
    assert cache._reserve(0)
    assert cache.used == 0
    assert on_disk(place / "cache") == 0


def test_eviction_spares_the_neighbours(open_file, table):
    for span in range(len(table)):
        cache = SpanCache(LARGE)
        file = open_file(cache, f"cache{span}")
        store_all(file, table)
        entry = file._held[span]
        entry.evict()
        for other in range(len(table)):
            start, end = table.starts[other : other + 2]
            assert file.read(start, end) == (None if other == span else TAR[start:end])


# Races, each step in the order that hurts.


@pytest.mark.parametrize("refill", [False, True])
def test_a_span_evicted_during_a_read_is_not_returned(open_file, table, monkeypatch, refill):
    """pread may have met the hole; storing the span again does not heal that."""
    cache = SpanCache(LARGE)
    file = open_file(cache)
    store_all(file, table)
    pread = os.pread

    def evicted_first(fd, length, offset):
        monkeypatch.setattr(os, "pread", pread)
        file._held[0].evict()
        data = pread(fd, length, offset)
        assert data == bytes(length)
        if refill:
            file.store(0, span_bytes(table, 0))
        return data

    monkeypatch.setattr(os, "pread", evicted_first)
    assert file.read(0, 100) is None


def test_an_eviction_that_comes_late_spares_the_span_stored_again(open_file, table):
    cache = SpanCache(LARGE)
    file = open_file(cache)
    file.store(0, span_bytes(table, 0))
    victim, _ = cache._entries.popitem(last=False)
    victim.evict()
    file.store(0, span_bytes(table, 0))
    victim.evict()
    assert file.read(0, 100) == TAR[:100]


def test_an_eviction_after_close_touches_no_descriptor(open_file, table, monkeypatch):
    cache = SpanCache(LARGE)
    file = open_file(cache)
    file.store(0, span_bytes(table, 0))
    victim, _ = cache._entries.popitem(last=False)
    file.close()
    monkeypatch.setattr(spancache, "punch_hole", lambda fd, *_: pytest.fail(f"punched descriptor {fd}"))
    victim.evict()


def test_a_span_stored_twice_at_once_counts_once(open_file, table, monkeypatch):
    cache = SpanCache(LARGE)
    file = open_file(cache)
    reserve = cache._reserve

    def other_first(size):
        monkeypatch.setattr(cache, "_reserve", reserve)
        assert file.store(0, span_bytes(table, 0))
        return reserve(size)

    monkeypatch.setattr(cache, "_reserve", other_first)
    assert file.store(0, span_bytes(table, 0))
    assert cache.used == file._held[0].size


def test_threads_read_what_is_right_while_spans_are_evicted(open_file, table):
    cache = SpanCache(220_000)
    files = [open_file(cache, name) for name in ("a", "b")]
    wrong = []
    hits = [0] * 4

    def work(number: int) -> None:
        for turn in range(400):
            span = (turn * 7 + number * 3) % len(table)
            file = files[(turn + number) % 2]
            start, end = table.starts[span : span + 2]
            data = file.read(start, end)
            if data is None:
                file.store(span, TAR[start:end])
            else:
                hits[number] += 1
                if data != TAR[start:end]:
                    wrong.append((span, turn))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sum(hits) > 0
    assert cache.used <= cache.capacity


# From one process to the next.


def test_what_an_earlier_process_stored_is_verified_and_held(open_file, table):
    file = open_file(SpanCache(LARGE))
    store_all(file, table)
    file.close()
    again = open_file(SpanCache(LARGE))
    assert held(again, table) == []
    assert again.load(3) == span_bytes(table, 3)
    assert held(again, table) == [3]


def test_what_an_earlier_process_stored_counts(open_file, table, place):
    file = open_file(SpanCache(LARGE))
    store_all(file, table)
    file.close()
    cache = SpanCache(250_000)
    open_file(cache)
    assert 0 < on_disk(place / "cache") <= cache.used <= 250_000


@pytest.mark.parametrize("garbage", [b"\xff" * len(TAR), b"\xff" * 150_000, TAR + b"\xff" * 50_000, b"\xff"])
def test_garbage_in_the_file_is_never_returned(open_file, table, place, garbage):
    (place / "cache").write_bytes(garbage)
    file = open_file(SpanCache(LARGE))
    for span in range(len(table)):
        assert file.load(span) in (None, span_bytes(table, span))
        assert file.store(span, span_bytes(table, span))
    assert file.read(0, len(TAR)) == TAR


def test_garbage_is_given_back_when_it_is_found(open_file, table, place):
    (place / "cache").write_bytes(b"\xff" * len(TAR))
    cache = SpanCache(LARGE)
    file = open_file(cache)
    for span in range(len(table)):
        assert file.load(span) is None
    assert cache.used == on_disk(place / "cache") == 0


def test_half_a_span_is_given_back_at_once(open_file, table, place):
    with open(place / "cache", "wb") as file:
        file.seek(8192)
        file.write(TAR[8192:20_000])
    cache = SpanCache(LARGE)
    open_file(cache)
    assert cache.used == on_disk(place / "cache") == 0


def test_a_file_in_use_is_left_to_its_user(open_file, table, place):
    """flock holds between open files, so one process can play both."""
    first = open_file(SpanCache(LARGE))
    store_all(first, table)
    second = open_file(SpanCache(LARGE))
    assert second.load(0) is None
    store_all(second, table)
    second.close()
    assert first.read(0, len(TAR)) == TAR
    assert [path.name for path in place.iterdir()] == ["cache"]


def test_without_a_directory_the_spans_are_in_memory(table, place):
    file = SpanCache(LARGE).open(str(place / "missing" / "cache"), table)
    store_all(file, table)
    assert file.read(0, len(TAR)) == TAR
    file.close()


def test_a_closed_layer_still_counts_and_can_be_evicted(open_file, table, place):
    cache = SpanCache(LARGE)
    file = open_file(cache, "a")
    store_all(file, table)
    used = cache.used
    file.close()
    assert cache.used == used
    cache.capacity = used
    other = open_file(cache, "b")
    assert other.store(0, span_bytes(table, 0))
    assert on_disk(place / "a") == 0


def test_a_deleted_file_counts_no_longer_once_it_is_closed(open_file, table, place):
    cache = SpanCache(LARGE)
    file = open_file(cache)
    store_all(file, table)
    (place / "cache").unlink()
    file.close()
    assert cache.used == 0


def test_a_layer_may_close_under_the_lock_of_the_cache(open_file, table):
    """As when the garbage collector runs there."""
    cache = SpanCache(LARGE)
    file = open_file(cache)
    with cache._lock:
        file.close()
    assert file._fd == -1


def test_a_closed_layer_opened_again_counts_once(open_file, table):
    cache = SpanCache(LARGE)
    file = open_file(cache)
    store_all(file, table)
    used = cache.used
    file.close()
    open_file(cache)
    assert cache.used == used


def test_files_of_layers_not_open_are_adopted_and_evicted(open_file, table, place):
    file = open_file(SpanCache(LARGE))
    store_all(file, table)
    file.close()
    cache = SpanCache(LARGE)
    cache.adopt([str(place / "cache"), str(place / "missing")])
    assert cache.used == on_disk(place / "cache")
    cache = SpanCache(10_000)
    cache.adopt([str(place / "cache")])
    assert cache.used == on_disk(place / "cache") == 0


def test_a_file_that_another_process_uses_is_not_evicted(open_file, table, place):
    file = open_file(SpanCache(LARGE))
    store_all(file, table)
    SpanCache(0).adopt([str(place / "cache")])
    assert file.read(0, len(TAR)) == TAR


def test_a_file_is_taken_over_when_its_user_is_gone(open_file, table, place):
    with open(place / "cache", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
    file = open_file(SpanCache(LARGE))
    file.store(0, span_bytes(table, 0))
    assert on_disk(place / "cache") > 0


# Faults.


def test_a_full_disk_is_said_once_and_counts_nothing(open_file, table, monkeypatch, caplog):
    cache = SpanCache(LARGE)
    file = open_file(cache)
    pwrite = os.pwrite

    def full(fd, data, offset):
        pwrite(fd, data[:5000], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    assert not file.store(0, span_bytes(table, 0))
    assert not file.store(3, span_bytes(table, 3))
    (record,) = caplog.records
    assert record.getMessage() == (
        "span cache: [Errno 28] No space left on device; "
        "until there is room, layers are decompressed at each read"
    )
    assert cache.used == 0
    monkeypatch.undo()
    assert file.store(0, span_bytes(table, 0))


def test_a_full_disk_leaves_no_part_of_a_span(open_file, table, place, monkeypatch, caplog):
    file = open_file(SpanCache(LARGE))
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:5000], offset) and full())

    def full():
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    assert not file.store(0, span_bytes(table, 0))
    assert on_disk(place / "cache") == 0
    assert len(caplog.records) == 1


def test_a_short_write_is_finished(open_file, table, monkeypatch):
    file = open_file(SpanCache(LARGE))
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:30_000], offset))
    file.store(0, span_bytes(table, 0))
    assert file.read(0, SIZES[0]) == TAR[: SIZES[0]]


def test_without_holes_the_file_is_emptied(open_file, table, place, monkeypatch, caplog):
    cache = SpanCache(250_000)
    file = open_file(cache)

    def unsupported(fd, offset, length):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(spancache, "punch_hole", unsupported)
    for span in [*range(len(table)), *range(len(table))]:
        file.store(span, span_bytes(table, span))
        start, end = table.starts[span : span + 2]
        assert file.read(start, end) == TAR[start:end]
        assert on_disk(place / "cache") <= cache.used <= 250_000
    assert len(caplog.records) == 1


# Unfinished decodes.


def test_a_parked_decoder_is_taken_once(open_file):
    file = open_file(SpanCache(LARGE))
    decoder = object()
    file.park(0, decoder)
    assert file.unpark(0) is decoder
    assert file.unpark(0) is None


def test_few_decoders_are_parked(open_file):
    file = open_file(SpanCache(LARGE))
    for run in range(PARKED_MAX + 1):
        file.park(run, object())
    assert [run for run in range(PARKED_MAX + 1) if file.unpark(run)] == list(range(1, PARKED_MAX + 1))


def test_closing_a_layer_drops_its_decoders_only(open_file):
    cache = SpanCache(LARGE)
    first, second = open_file(cache, "a"), open_file(cache, "b")
    first.park(0, object())
    second.park(0, object())
    first.close()
    assert second.unpark(0)
    assert not cache._parked
