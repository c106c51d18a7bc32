"""What a mount is asked, how long its answers take, and what still waits for one. Pure.

Each kind of request has a row of buckets: bucket n counts the answers that took less than 2**n ns, and not
less than half of that. Percentiles are bounds of buckets: at most twice what was measured.

The rule a maintainer must not break: `begin` and `end` are on every request's way. They read the clock once
each, take no lock, and belong to the event loop's thread. What else is here may be called in another one,
which sees each number as it is at some time.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from time import perf_counter_ns
from typing import Any, NamedTuple

__all__ = ["SLOW_S", "Meter", "Pending", "prometheus"]

SLOW_S = 10
"""What a request waits before that is worth a line in the log."""

_RATE_SLICE_S, _RATE_SLICES = 10, 6
"""Rates are of the last minute, or of a mount's life while that is shorter."""
_BUCKETS = 64
_SHOWN = range(10, 35)
"""Buckets from 1 µs to 17 s, for Prometheus: there each must be shown from the beginning."""
_PERCENTILES = (50, 90, 99)


class _Row:
    """The answers to one kind of request."""

    __slots__ = ("buckets", "total_ns")

    def __init__(self) -> None:
        self.buckets = [0] * _BUCKETS
        self.total_ns = 0


class Pending(NamedTuple):
    """A request that has no answer yet."""

    kind: str
    arguments: tuple[Any, ...]
    """The handler's: the first is an inode number or a handle."""


class Meter:
    """The requests to one mount."""

    def __init__(self, clock: Callable[[], int] = perf_counter_ns) -> None:
        """`clock` gives nanoseconds, never less than before."""
        self._clock = clock
        self._started_ns = clock()
        self._rows: defaultdict[str, _Row] = defaultdict(_Row)
        self._pending: dict[int, tuple[str, tuple[Any, ...]]] = {}
        """By when they came. Two at the same tick of a coarse clock: then only one of them is known."""
        self._told: set[int] = set()
        self._errors: Counter[str] = Counter()
        self._past: deque[tuple[int, dict[str, int]]] = deque([(self._started_ns, {})], _RATE_SLICES)
        """When a slice of time began, and the counts then."""

    def begin(self, kind: str, arguments: tuple[Any, ...]) -> int:
        """A request came; what is returned names it to `end`."""
        now = self._clock()
        self._pending[now] = kind, arguments
        return now

    def end(self, kind: str, began: int) -> None:
        """It has its answer, whatever that is."""
        self._pending.pop(began, None)
        row = self._rows[kind]
        taken = self._clock() - began
        row.buckets[taken.bit_length()] += 1
        row.total_ns += taken

    def failed(self, errno_name: str) -> None:
        """An answer is an error."""
        self._errors[errno_name] += 1

    def watch(self) -> list[Pending]:
        """To be called about once a second. Requests that wait for longer than `SLOW_S`; each only once."""
        now = self._clock()
        if now - self._past[-1][0] >= _RATE_SLICE_S * 10**9:
            self._past.append((now, self._counts()))
        pending = self._pending.copy()
        self._told &= pending.keys()
        late = {
            began: request
            for began, request in pending.items()
            if now - began > SLOW_S * 10**9 and began not in self._told
        }
        self._told |= late.keys()
        return [Pending(*request) for request in late.values()]

    def _counts(self) -> dict[str, int]:
        return {kind: sum(row.buckets) for kind, row in self._rows.copy().items()}

    def report(self) -> dict[str, Any]:
        """For JSON. Times are in what their keys end in."""
        now = self._clock()
        since, before = self._past[0]
        elapsed_s = max(now - since, 1) / 10**9
        counts = self._counts()
        pending = list(self._pending.copy())
        return {
            "uptime-s": round((now - self._started_ns) / 10**9, 3),
            "requests": {
                kind: {
                    "count": counts[kind],
                    "per-second": round((counts[kind] - before.get(kind, 0)) / elapsed_s, 3),
                    **{f"p{part}-ns": _percentile(row.buckets, part) for part in _PERCENTILES},
                    "total-ns": row.total_ns,
                    "below-ns": {str(1 << power): n for power, n in enumerate(row.buckets) if n},
                }
                for kind, row in sorted(self._rows.copy().items())
                if kind in counts
            },
            "errors": dict(sorted(self._errors.copy().items())),
            "waiting": len(pending),
            "longest-waiting-s": round((now - min(pending)) / 10**9, 3) if pending else 0.0,
        }


def _percentile(buckets: list[int], part: int) -> int:
    """Nanoseconds that so many of 100 answers took less than."""
    wanted = sum(buckets) * part / 100
    for power, count in enumerate(buckets):
        wanted -= count
        if wanted <= 0:
            return 1 << power
    return 0


def prometheus(report: Mapping[str, Any]) -> str:
    """A mount's report as Prometheus reads it (text format 0.0.4)."""
    return "".join(f"{line}\n" for line in _lines(report))


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    own = {key: report[key] for key in ("mountpoint", "store", "driver")}
    yield "# TYPE fusestore_info gauge"
    yield f"fusestore_info{_labels(own)} 1"
    requests = report["requests"]
    name = "fusestore_request_seconds"
    yield f"# TYPE {name} histogram"
    for kind, row in requests.items():
        counts = {int(bound_ns): count for bound_ns, count in row["below-ns"].items()}
        for power in _SHOWN:
            below = sum(count for bound_ns, count in counts.items() if bound_ns <= 1 << power)
            yield f"{name}_bucket{_labels({'kind': kind, 'le': repr((1 << power) / 1e9)})} {below}"
        yield f"{name}_bucket{_labels({'kind': kind, 'le': '+Inf'})} {row['count']}"
        yield f"{name}_sum{_labels({'kind': kind})} {row['total-ns'] / 1e9!r}"
        yield f"{name}_count{_labels({'kind': kind})} {row['count']}"
    yield "# TYPE fusestore_errors_total counter"
    for errno_name, count in report["errors"].items():
        yield f"fusestore_errors_total{_labels({'errno': errno_name})} {count}"
    for name, kind_of_metric, value in _plain_metrics(report):
        yield f"# TYPE fusestore_{name} {kind_of_metric}"
        yield f"fusestore_{name} {value!r}"


def _plain_metrics(report: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    yield "uptime_seconds", "gauge", report["uptime-s"]
    yield "waiting_requests", "gauge", report["waiting"]
    yield "longest_waiting_seconds", "gauge", report["longest-waiting-s"]
    yield "containers_entered", "gauge", report["containers"]["entered"]
    yield "containers_in_use", "gauge", report["containers"]["in-use"]
    yield "inodes", "gauge", report["inodes"]
    yield "handles", "gauge", report["handles"]
    yield "span_hits_total", "counter", report["spans"]["hits"]
    yield "span_misses_total", "counter", report["spans"]["misses"]
    yield "span_bytes", "gauge", report["spans"]["bytes"]
    yield "span_bytes_max", "gauge", report["spans"]["bytes-max"]
    yield "resident_bytes", "gauge", report["memory"]["resident-bytes"]
    yield "anonymous_bytes", "gauge", report["memory"]["anonymous-bytes"]
    yield "descriptors", "gauge", report["descriptors"]["open"]
    yield "descriptors_max", "gauge", report["descriptors"]["max"]


def _labels(labels: Mapping[str, str]) -> str:
    return "{" + ",".join(f'{key}="{_escaped(value)}"' for key, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
