"""What a mount says of itself, asked or not: `fusestore status`, and requests that take long. Blocking.

The watch is a thread of its own: it also sees a request that holds up the event loop. It only reads, and only
what the loop's thread changes in single steps.
"""

import logging
import os
import resource
import threading
from typing import Any

from .errors import FusestoreError
from .meter import SLOW_S, Meter, Pending
from .mounts import MountRecord
from .store import Store
from .tree import Tree

__all__ = ["Watch"]

_PERIOD_S = 1.0
_BY_HANDLE = {"read", "write", "flush", "fsync", "release", "readdir", "fsyncdir", "releasedir"}
"""Kinds of requests that name a handle; the others name an inode."""

_log = logging.getLogger("fusestore")


class Watch:
    """Watches over one mount between `__enter__` and `__exit__`."""

    def __init__(self, meter: Meter, tree: Tree, store: Store) -> None:
        self._meter = meter
        self._tree = tree
        self._store = store
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(_PERIOD_S):
            for request in self._meter.watch():
                _log.warning("%s waits for over %d s: %s", request.kind, SLOW_S, self._subject(request))

    def _subject(self, request: Pending) -> str:
        if not request.arguments or not isinstance(request.arguments[0], int):
            return "the mount"
        number = request.arguments[0]
        try:
            ino = self._tree.handles.inode(number) if request.kind in _BY_HANDLE else number
            path = self._tree.path(ino)
        except (KeyError, FusestoreError):
            return f"{'handle' if request.kind in _BY_HANDLE else 'inode'} {number}"
        return f"inode {ino}" + (f", {os.fsdecode(path)!r}" if path else "")

    def report(self, record: MountRecord) -> dict[str, Any]:
        """What `fusestore status` shows. In the event loop's thread."""
        entered, in_use = self._tree.live_containers()
        spans = self._store.span_use()
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return {
            "mountpoint": record.mountpoint,
            "store": self._store.path,
            "driver": record.driver,
            "pid": record.pid,
            **self._meter.report(),
            "containers": {"entered": entered, "in-use": in_use},
            "inodes": len(self._tree.inodes),
            "handles": len(self._tree.handles),
            "spans": {
                "hits": spans.hits,
                "misses": spans.misses,
                "bytes": spans.used,
                "bytes-max": spans.capacity,
            },
            "memory": _memory(),
            # Less the one that listing them takes.
            "descriptors": {"open": len(os.listdir("/proc/self/fd")) - 1, "max": limit},
        }


def _memory() -> dict[str, int]:
    """Bytes, as proc_pid_status(5) has them."""
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return {
        key: int(fields[field].split()[0]) * 1024
        for key, field in (("resident-bytes", "VmRSS"), ("anonymous-bytes", "RssAnon"))
    }
