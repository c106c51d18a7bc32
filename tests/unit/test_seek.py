"""The table of spans: how it is cut, what it says, and that any damage is refused."""

import os
import struct

import pytest
from isal.isal_zlib import crc32
from rig.streams import content

from fusestore.errors import StoreDamaged
from fusestore.seek import SPAN, SPAN_LIMIT, SPAN_MAX, SeekTable, SpanCutter

WINDOW = content(32_768, seed=1)
HEADER = 48
RECORD = struct.Struct("<QQQIHBB")


def table_bytes() -> bytes:
    """Spans of 10, 20 and 30 bytes; the second is reached from the first, the third has a window."""
    spans = SpanCutter()
    spans.restart(100, 0, b"")
    spans.write(b"a" * 10)
    spans._end_span()
    spans.write(b"b" * 20)
    spans.restart(200, 5, WINDOW)
    spans.write(b"c" * 30)
    return spans.finish("gzip", 1000)


@pytest.fixture
def open_table(tmp_path):
    """Opens a table with these bytes; closes it after the test."""
    tables = []

    def opened(data: bytes, tar_size: int = 60) -> SeekTable:
        path = tmp_path / f"seek{len(tables)}"
        path.write_bytes(data)
        tables.append(SeekTable(str(path), tar_size))
        return tables[-1]

    yield opened
    for table in tables:
        table.close()


def rebuilt(data: bytes, *, header: bytes | None = None, records: bytes | None = None) -> bytes:
    """The table with another header or other records, and checksums that fit."""
    head = bytearray(header or data[:HEADER])
    body = records if records is not None else data[HEADER : HEADER + 3 * RECORD.size]
    struct.pack_into("<I", head, 40, crc32(body))
    struct.pack_into("<I", head, 44, crc32(head[:44]))
    return bytes(head) + body + data[HEADER + 3 * RECORD.size :]


# Cutting.


def test_a_restart_is_wanted_at_the_beginning():
    assert SpanCutter().wants_restart


def test_the_next_restart_is_wanted_a_span_later():
    spans = SpanCutter()
    spans.restart(0, 0, b"")
    spans.write(bytes(SPAN - 1))
    assert not spans.wants_restart
    spans.write(b"x")
    assert spans.wants_restart


def test_without_a_restart_spans_are_cut_at_their_largest(open_table):
    spans = SpanCutter()
    spans.restart(0, 0, b"")
    spans.write(bytes(2 * SPAN_MAX + 5))
    table = open_table(spans.finish("zstd", 10), 2 * SPAN_MAX + 5)
    assert table.starts == (0, SPAN_MAX, 2 * SPAN_MAX, 2 * SPAN_MAX + 5)


def test_a_restart_after_a_forced_cut_begins_a_run(open_table):
    spans = SpanCutter()
    spans.restart(0, 0, b"")
    spans.write(bytes(SPAN_MAX + 7))
    spans.restart(5, 0, b"")
    spans.write(b"x")
    table = open_table(spans.finish("gzip", 10), SPAN_MAX + 8)
    assert [table.run(span) for span in range(len(table))] == [(0, 2), (0, 2), (2, 3)]


def test_a_restart_at_the_end_leaves_no_span(open_table):
    spans = SpanCutter()
    spans.restart(0, 0, b"")
    spans.write(b"x")
    spans.restart(5, 0, b"")
    assert len(open_table(spans.finish("gzip", 10), 1)) == 1


def test_the_checksum_of_a_span_does_not_depend_on_how_it_was_written(open_table):
    one, many = SpanCutter(), SpanCutter()
    for spans, step in ((one, 1 << 20), (many, 999)):
        spans.restart(0, 0, b"")
        for start in range(0, 10_000, step):
            spans.write(content(10_000)[start : start + step])
    assert one.finish("gzip", 10) == many.finish("gzip", 10)


# Reading.


def test_find_and_run(open_table):
    table = open_table(table_bytes())
    found = [(table.find(offset), table.run(table.find(offset))) for offset in (0, 9, 10, 29, 30, 59)]
    first, second, third = (0, (0, 2)), (1, (0, 2)), (2, (2, 3))
    assert found == [first, first, second, second, third, third]


def test_checksums_are_those_of_the_bytes(open_table):
    assert open_table(table_bytes()).crc32s == (crc32(b"a" * 10), crc32(b"b" * 20), crc32(b"c" * 30))


def test_restarts_come_back_with_their_windows(open_table):
    table = open_table(table_bytes())
    assert table.restart(0) == (100, 0, b"")
    assert table.restart(2) == (200, 5, WINDOW)


def test_the_table_works_without_its_name(open_table, tmp_path):
    table = open_table(table_bytes())
    (tmp_path / "seek0").unlink()
    assert table.restart(2).window == WINDOW


def test_an_empty_tar(open_table):
    assert len(open_table(SpanCutter().finish("gzip", 20), 0)) == 0


def test_opening_reads_no_window(open_table, monkeypatch):
    preads = []
    pread = os.pread
    monkeypatch.setattr(
        os, "pread", lambda fd, length, at: preads.append((length, at)) or pread(fd, length, at)
    )
    open_table(table_bytes())
    assert preads == [(HEADER, 0), (3 * RECORD.size, HEADER)]


# Damage.


def test_any_changed_byte_is_refused(open_table):
    """In header and records at once, in a window when it is asked for."""
    data = table_bytes()
    windows = HEADER + 3 * RECORD.size
    for place in [*range(windows), *range(windows, len(data), 501), len(data) - 1]:
        changed = bytearray(data)
        changed[place] ^= 0x10
        with pytest.raises(StoreDamaged, match=r"seek points .*/seek"):
            open_table(bytes(changed)).restart(2)


def test_any_cut_is_refused(open_table):
    data = table_bytes()
    for length in [*range(200), len(data) - 1]:
        with pytest.raises(StoreDamaged):
            open_table(data[:length])


def test_a_longer_file_is_refused(open_table):
    with pytest.raises(StoreDamaged):
        open_table(table_bytes() + b"x")


def test_a_table_for_another_tar_is_refused(open_table):
    with pytest.raises(StoreDamaged, match="made for a tar of 60 bytes, where this one has 61"):
        open_table(table_bytes(), 61)


def test_a_missing_table_is_damage(tmp_path):
    with pytest.raises(StoreDamaged, match="No such file"):
        SeekTable(str(tmp_path / "none"), 60)


def test_a_directory_is_damage(tmp_path):
    with pytest.raises(StoreDamaged):
        SeekTable(str(tmp_path), 60)


def test_a_damaged_window_spares_the_other_runs(open_table):
    data = bytearray(table_bytes())
    data[-1] ^= 1
    table = open_table(bytes(data))
    with pytest.raises(StoreDamaged, match="window of span 2"):
        table.restart(2)
    assert table.restart(0).window == b""


def test_a_window_longer_than_deflate_has_is_refused(open_table):
    spans = SpanCutter()
    spans.restart(100, 0, WINDOW + b"x")
    spans.write(b"a" * 10)
    table = open_table(spans.finish("gzip", 1000), 10)
    with pytest.raises(StoreDamaged, match="window of span 0 is too long"):
        table.restart(0)


@pytest.mark.parametrize(
    ("fmt", "offset", "value"),
    [
        ("<H", 8, 2),  # version
        ("<B", 10, 3),  # compression
        ("<I", 12, 2),  # spans
        ("<I", 12, 1 << 31),
        ("<Q", 16, 61),  # sizes of tar, blob, windows
        ("<Q", 24, 150),
        ("<Q", 32, 0),
    ],
)
def test_a_header_that_contradicts_the_file_is_refused(open_table, fmt, offset, value):
    data = table_bytes()
    header = bytearray(data[:HEADER])
    struct.pack_into(fmt, header, offset, value)
    with pytest.raises(StoreDamaged):
        open_table(rebuilt(data, header=bytes(header)))


@pytest.mark.parametrize(
    ("span", "field", "value"),
    [
        (0, 0, 1),  # the first span begins later
        (1, 0, 0),  # an empty span
        (1, 0, 31),  # out of order
        (2, 0, 60),  # nothing left for the last
        (2, 1, 1001),  # beyond the blob
        (2, 2, 1),  # a window beyond the file
        (2, 4, 65_535),
        (2, 5, 8),  # no bit of a byte
        (0, 6, 0),  # no restart at the beginning
        (1, 6, 2),  # a flag of a later version
    ],
)
def test_records_that_contradict_each_other_are_refused(open_table, span, field, value):
    data = table_bytes()
    records = [list(each) for each in RECORD.iter_unpack(data[HEADER : HEADER + 3 * RECORD.size])]
    records[span][field] = value
    with pytest.raises(StoreDamaged):
        open_table(rebuilt(data, records=b"".join(RECORD.pack(*each) for each in records)))


def test_a_span_longer_than_a_reader_allocates_is_refused(open_table):
    data = table_bytes()
    size = 30 + SPAN_LIMIT + 1
    header = bytearray(data[:HEADER])
    struct.pack_into("<Q", header, 16, size)
    with pytest.raises(StoreDamaged, match="out of order"):
        open_table(rebuilt(data, header=bytes(header)), size)
