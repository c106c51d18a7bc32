"""Requests counted and timed: what is reported of them, and which are said to take long."""

import re
from itertools import accumulate
from typing import Any

import pytest

from fusestore.meter import SLOW_S, Meter, Pending, prometheus

S = 10**9


class _Clock:
    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


@pytest.fixture
def meter(clock: _Clock) -> Meter:
    return Meter(clock)


def _answer(meter: Meter, clock: _Clock, kind: str, taken_ns: int) -> None:
    began = meter.begin(kind, ())
    clock.now_ns += taken_ns
    meter.end(kind, began)


@pytest.mark.parametrize(
    ("taken_ns", "below_ns"), [(0, 1), (1, 2), (1023, 1024), (1024, 2048), (3 * S, 1 << 32)]
)
def test_a_bucket_holds_what_took_less_than_its_bound(
    meter: Meter, clock: _Clock, taken_ns: int, below_ns: int
) -> None:
    _answer(meter, clock, "read", taken_ns)
    assert meter.report()["requests"]["read"]["below-ns"] == {str(below_ns): 1}


def test_percentiles_are_bounds(meter: Meter, clock: _Clock) -> None:
    for number in range(100):
        _answer(meter, clock, "read", 3_000 if number < 50 else 60_000 if number < 95 else 5 * S)
    row = meter.report()["requests"]["read"]
    assert (row["p50-ns"], row["p90-ns"], row["p99-ns"]) == (1 << 12, 1 << 16, 1 << 33)


def test_rates_are_of_the_last_minute(meter: Meter, clock: _Clock) -> None:
    for _ in range(300):
        _answer(meter, clock, "read", S)
        meter.watch()
    assert meter.report()["requests"]["read"]["per-second"] == pytest.approx(1, rel=0.01)
    for _ in range(70):
        clock.now_ns += S
        meter.watch()
    report = meter.report()["requests"]["read"]
    assert (report["count"], report["per-second"]) == (300, 0)


def test_the_rate_of_a_young_mount_is_of_its_life(meter: Meter, clock: _Clock) -> None:
    _answer(meter, clock, "read", S // 2)
    assert meter.report()["requests"]["read"]["per-second"] == 2


def test_a_request_that_waits_long_is_said_once(meter: Meter, clock: _Clock) -> None:
    began = meter.begin("mkdir", (1, b"a"))
    clock.now_ns += SLOW_S * S
    assert meter.watch() == []
    clock.now_ns += 1
    _ = meter.begin("read", (2,))
    assert meter.watch() == [Pending("mkdir", (1, b"a"))]
    assert meter.watch() == []
    report = meter.report()
    assert (report["waiting"], report["longest-waiting-s"]) == (2, SLOW_S)
    meter.end("mkdir", began)
    assert meter.report()["waiting"] == 1


_SAMPLE = re.compile(r'[a-z_]+(\{([a-z]+="([^"\\\n]|\\[\\n"])*",?)+\})? [0-9.e+-]+\n')
"""exposition_formats.md of Prometheus: a line that is no comment."""


def _report(meter: Meter) -> dict[str, Any]:
    return meter.report() | {
        "mountpoint": 'a "quoted"\nplace\\',
        "store": "/store",
        "driver": "union",
        "containers": {"entered": 1, "in-use": 0},
        "inodes": 4,
        "handles": 3,
        "spans": {"hits": 7, "misses": 2, "bytes": 1, "bytes-max": 10},
        "memory": {"resident-bytes": 10, "anonymous-bytes": 9},
        "descriptors": {"open": 8, "max": 9},
    }


def test_what_prometheus_reads_is_well_formed(meter: Meter, clock: _Clock) -> None:
    _answer(meter, clock, "read", 5_000)
    meter.failed("ENOENT")
    lines = prometheus(_report(meter)).splitlines(keepends=True)
    samples = [line for line in lines if not line.startswith("# TYPE ")]
    assert [line for line in samples if not _SAMPLE.fullmatch(line)] == []
    assert (
        r'fusestore_info{mountpoint="a \"quoted\"\nplace\\",store="/store",driver="union"} 1' + "\n"
        in samples
    )
    assert 'fusestore_errors_total{errno="ENOENT"} 1\n' in samples
    assert "fusestore_span_hits_total 7\n" in samples


def test_prometheus_reads_a_histogram_of_the_same_buckets_each_time(meter: Meter, clock: _Clock) -> None:
    taken = [500, 5_000, 5_000, 70_000, 60 * S]
    for nanoseconds in taken:
        _answer(meter, clock, "read", nanoseconds)
    text = prometheus(_report(meter))
    found = re.findall(r'_bucket\{kind="read",le="(.*)"\} (\d+)', text)
    bounds, counts = [float(bound) for bound, _ in found], [int(count) for _, count in found]
    assert bounds == sorted(bounds) and bounds[-1] == float("inf")
    assert list(accumulate(counts, max)) == counts
    assert counts == [sum(one < bound * S for one in taken) for bound in bounds]
    _answer(meter, clock, "read", 1)
    assert re.findall(r'le="(.*)"', prometheus(_report(meter))) == [bound for bound, _ in found]
