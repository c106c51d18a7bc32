"""The span cache: decompressed spans in one sparse file a layer, bounded over all layers. Blocking.

A span lies in the layer's file at its offset in the tar. The file is scratch: it may be deleted at any time,
needs no bookkeeping and no sync. What it holds when it is opened is *unverified*: believed only after its
CRC-32 matches the table, so that crashes and power cuts need no care. What was written or verified since is
*held*, and read without a check.

    SpanCache ── the bound, and who was used last ──┬── SpanFile (a layer, open) ── _Entry (a span on disk)
                                                    └── _Dormant (the file of a layer that is not open)

Eviction is by least recent use, and punches holes. Readers take no lock against it. The protocol that keeps
them from ever returning punched zeros, and which every change here must keep:

* `SpanFile._held[i]` is set after span i was written and cleared before it is punched, to another object each
  time, so a reader that finds the same objects before and after its pread has read what they stand for;
* both writing with setting and clearing with punching are done under the file's lock;
* the cache's lock is taken inside a file's lock, never the other way round; no system call is made under it.

A file belongs to one process at a time (flock); another process works on a file of its own without a name.
"""

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from fcntl import LOCK_EX, LOCK_NB, flock
from typing import Final

from isal.isal_zlib import crc32

from .seek import FilePath, SeekTable
from .streams import RunDecoder
from .syscalls import pread_now, punch_hole, pwrite_all

__all__ = ["PARKED_MAX", "SpanCache", "SpanFile"]

PARKED_MAX: Final = 4
"""Unfinished decodes kept in memory; one of zstd costs its window, usually 8 MiB."""

_log = logging.getLogger(__name__)

_BLOCK = 4096
"""What holes are aligned to; a span is accounted with the whole blocks at its ends."""


class _Entry:
    """One span on disk; equal only to itself."""

    __slots__ = ("file", "size", "span")

    def __init__(self, file: "SpanFile", span: int, size: int) -> None:
        self.file = file
        self.span = span
        self.size = size

    def evict(self) -> None:
        self.file._evict(self)


class _Dormant:
    """The file of a layer that this process has not open, left by an earlier use; evicted whole."""

    __slots__ = ("path", "size")

    def __init__(self, path: bytes, size: int) -> None:
        self.path = path
        self.size = size

    def evict(self) -> None:
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return
        try:
            flock(fd, LOCK_EX | LOCK_NB)
            os.ftruncate(fd, 0)
        except OSError:
            pass  # Another process has it, and bounds it.
        finally:
            os.close(fd)


class SpanCache:
    """The bound that all layers of a process share. Thread-safe."""

    def __init__(self, capacity: int) -> None:
        """`capacity`: bytes on disk. A span that does not fit is not kept."""
        self.capacity = capacity
        self._lock = threading.RLock()
        """Reentrant: readers close when they are collected, and the collector may run in any allocation, that
        of a holder of this lock too."""
        self._used = 0
        self._entries: OrderedDict[_Entry | _Dormant, None] = OrderedDict()
        """What can be evicted, least recently used first. `_used` counts these, and besides what is being
        written or evicted just now."""
        self._dormant: dict[bytes, _Dormant] = {}
        self._parked: OrderedDict[tuple[SpanFile, int], RunDecoder] = OrderedDict()
        self._warned = False
        self.hits = 0
        self.misses = 0
        """Reads of what was decoded before, and spans that had to be decoded. Counted without a lock: beside
        each other threads may miss one."""

    @property
    def used(self) -> int:
        """Bytes on disk, at most."""
        return self._used

    def adopt(self, paths: Iterable[FilePath]) -> None:
        """Count the files that earlier processes left for layers not open now, and evict what is too much.

        Without this, only layers that are opened again are bounded. Paths that do not exist are ignored.
        """
        for path in paths:
            try:
                size = os.stat(path).st_blocks * 512
            except OSError:
                continue
            if size:
                self._add_dormant(os.fsencode(path), size)
        self._reserve(0)

    def open(self, path: FilePath, table: SeekTable) -> "SpanFile":
        """The cached spans of the layer with this table. Always succeeds: where no disk will, memory does."""
        with self._lock:
            dormant = self._dormant.pop(os.fsencode(path), None)
            if dormant:
                del self._entries[dormant]
                self._used -= dormant.size
        file = SpanFile(self, path, table)
        self._reserve(0)
        return file

    # The rest is for SpanFile.

    def _add_dormant(self, path: bytes, size: int) -> None:
        dormant = _Dormant(path, size)
        with self._lock:
            if path not in self._dormant:
                self._dormant[path] = dormant
                self._entries[dormant] = None
                self._entries.move_to_end(dormant, last=False)
                self._used += size

    def _touch(self, entries: Iterable[_Entry | None]) -> None:
        """Note that these are used; not while the lock is taken, for this is also done by event loops."""
        if self._lock.acquire(blocking=False):
            try:
                for entry in entries:
                    if entry and entry in self._entries:
                        self._entries.move_to_end(entry)
            finally:
                self._lock.release()

    def _reserve(self, size: int) -> bool:
        """Count `size` more bytes, after evicting what is too much. False: no room, nothing was counted."""
        while True:
            with self._lock:
                if self._used + size <= self.capacity:
                    self._used += size
                    return True
                if size > self.capacity or not self._entries:
                    return False
                victim, _ = self._entries.popitem(last=False)
                if isinstance(victim, _Dormant):
                    del self._dormant[victim.path]
            victim.evict()
            self._unreserve(victim.size)

    def _unreserve(self, size: int) -> None:
        with self._lock:
            self._used -= size

    def _add(self, entry: _Entry) -> None:
        """Let `entry` be evicted, as the most recently used; its size was reserved."""
        with self._lock:
            self._entries[entry] = None

    def _add_found(self, entry: _Entry) -> None:
        """Count `entry`, and let it be evicted, as the least recently used."""
        with self._lock:
            self._entries[entry] = None
            self._entries.move_to_end(entry, last=False)
            self._used += entry.size

    def _remove(self, entries: Iterable[_Entry]) -> int:
        """Count these no longer, but for what is being evicted just now; how many bytes they were."""
        removed = 0
        with self._lock:
            for entry in entries:
                if entry in self._entries:
                    del self._entries[entry]
                    removed += entry.size
            self._used -= removed
        return removed

    def _park(self, file: "SpanFile", run: int, decoder: RunDecoder) -> None:
        with self._lock:
            self._parked[file, run] = decoder
            dropped = self._parked.popitem(last=False) if len(self._parked) > PARKED_MAX else None
        del dropped  # outside the lock: a generator ends here

    def _unpark(self, file: "SpanFile", run: int) -> RunDecoder | None:
        with self._lock:
            return self._parked.pop((file, run), None)

    def _unpark_all(self, file: "SpanFile") -> None:
        with self._lock:
            dropped = [self._parked.pop(key) for key in list(self._parked) if key[0] is file]
        del dropped

    def _warn_once(self, error: OSError) -> None:
        with self._lock:
            warned, self._warned = self._warned, True
        if not warned:
            _log.warning("span cache: %s; until there is room, layers are decompressed at each read", error)


class SpanFile:
    """The cached spans of one layer. Thread-safe, but for `close`, beside which no other method may run."""

    def __init__(self, cache: SpanCache, path: FilePath, table: SeekTable) -> None:
        """Through `SpanCache.open` only."""
        self._cache = cache
        self._path = os.fsencode(path)
        self._table = table
        self._lock = threading.Lock()
        self._held: list[_Entry | None] = [None] * len(table)
        self._unverified: dict[int, _Entry] = {}
        self._fd, self._named = _open_own(self._path)
        self._take_stock()

    def close(self) -> None:
        """The file stays, and stays counted unless it was deleted."""
        self._cache._unpark_all(self)
        with self._lock:
            fd, self._fd = self._fd, -1
            left = self._cache._remove([*filter(None, self._held), *self._unverified.values()])
        if self._named and left and os.fstat(fd).st_nlink:
            self._cache._add_dormant(self._path, left)
        os.close(fd)

    def read(self, offset: int, end: int, *, waits: bool = True) -> bytes | None:
        """Bytes `offset` to `end` (at least one, all in the tar), or None unless all their spans are held.

        With `waits` false also None where it would have to wait for the disk.
        """
        table = self._table
        first = table.find(offset)
        after = first + 1 if end <= table.starts[first + 1] else table.find(end - 1) + 1
        held = self._held[first:after]
        if None in held:
            return None
        try:
            read = os.pread if waits else pread_now
            data = read(self._fd, end - offset, offset)
        except OSError:
            return None  # The blob has it too.
        if data is None or len(data) != end - offset or self._held[first:after] != held:
            return None
        self._cache._touch(held)
        return data

    def load(self, span: int) -> bytes | None:
        """A whole span, verified now if it was not yet; None when it is not here."""
        start, end = self._table.starts[span : span + 2]
        data = self.read(start, end)
        if data is not None or span not in self._unverified:
            return data
        with self._lock:
            entry = self._unverified.pop(span, None)
            if entry is None:
                return None
            try:
                data = os.pread(self._fd, end - start, start)
            except OSError:
                data = b""
            if crc32(data) == self._table.crc32s[span] and len(data) == end - start:
                self._held[span] = entry
                self._cache._touch([entry])
                return data
            self._punch(span)
            self._cache._remove([entry])
            return None

    def store(self, span: int, data: bytes) -> bool:
        """Keep a whole span, which the caller has verified. False: there is no room for it."""
        if self._held[span] or self.load(span) is not None:
            return True
        entry = _Entry(self, span, self._blocks(span))
        if not self._cache._reserve(entry.size):
            return False
        with self._lock:
            if self._held[span] or not self._write(entry, data):
                self._cache._unreserve(entry.size)
            return self._held[span] is not None

    def count(self, *, is_hit: bool) -> None:
        """A read was served from what was decoded before, or not."""
        if is_hit:
            self._cache.hits += 1
        else:
            self._cache.misses += 1

    def give_back(self) -> None:
        """Have the kernel drop what it caches of the file, once that is on disk: it stays kept there."""
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def clear(self) -> None:
        """Give back all that is kept; readers beside it find it missing."""
        with self._lock:
            self._start_over()

    def park(self, run: int, decoder: RunDecoder) -> None:
        """Keep an unfinished decode of `run`, in memory, for whoever reads on; a few per process are kept."""
        self._cache._park(self, run, decoder)

    def unpark(self, run: int) -> RunDecoder | None:
        """Take the unfinished decode of `run`; the caller owns it."""
        return self._cache._unpark(self, run)

    def _write(self, entry: _Entry, data: bytes) -> bool:
        """Write and hold a span that is not here. Under the lock."""
        try:
            pwrite_all(self._fd, data, self._table.starts[entry.span])
        except OSError as error:
            self._cache._warn_once(error)
            self._punch(entry.span)
            return False
        self._held[entry.span] = entry
        self._cache._add(entry)
        return True

    def _evict(self, entry: _Entry) -> None:
        with self._lock:
            if self._fd < 0:
                return
            span = entry.span
            if self._held[span] is entry:
                self._held[span] = None
            elif self._unverified.get(span) is entry:
                del self._unverified[span]
            else:
                return
            self._punch(span)

    def _punch(self, span: int) -> None:
        """Give back the blocks of `span`, which is neither held nor unverified. Under the lock.

        At the ends, a block shared with a span that is not here either goes too: else eviction would leave
        a block behind at each boundary.
        """
        starts = self._table.starts
        start, end = starts[span], starts[span + 1]
        low, high = start // _BLOCK * _BLOCK, -(-end // _BLOCK) * _BLOCK
        before, after = span - 1, span + 1
        while before >= 0 and starts[before + 1] > low:
            if self._is_here(before):
                low = starts[before + 1]
            before -= 1
        while after < len(self._table) and starts[after] < high:
            if self._is_here(after):
                high = starts[after]
            after += 1
        try:
            punch_hole(self._fd, low, high - low)
        except OSError as error:
            self._cache._warn_once(error)
            self._start_over()  # a file system that cannot punch holes: this keeps the bound

    def _start_over(self) -> None:
        """Empty the file. Under the lock."""
        gone = [*filter(None, self._held), *self._unverified.values()]
        self._held[:] = [None] * len(self._held)
        self._unverified.clear()
        os.ftruncate(self._fd, 0)
        self._cache._remove(gone)

    def _is_here(self, span: int) -> bool:
        return self._held[span] is not None or span in self._unverified

    def _blocks(self, span: int) -> int:
        """Bytes of the blocks that `span` touches."""
        start, end = self._table.starts[span : span + 2]
        return -(-end // _BLOCK) * _BLOCK - start // _BLOCK * _BLOCK

    def _take_stock(self) -> None:
        """Note the spans whose blocks are all in the file, and give back the blocks of the others."""
        table = self._table
        if os.fstat(self._fd).st_size > table.tar_size:
            os.ftruncate(self._fd, table.tar_size)
        scraps = set()
        for start, end in _data_extents(self._fd):
            for span in range(table.find(start), table.find(end - 1) + 1):
                if start <= table.starts[span] and table.starts[span + 1] <= end:
                    self._unverified[span] = _Entry(self, span, self._blocks(span))
                else:
                    scraps.add(span)
        for span in scraps:
            self._punch(span)
        for entry in self._unverified.values():
            self._cache._add_found(entry)


def _open_own(path: bytes) -> tuple[int, bool]:
    """A file to read and write that no other process uses, and whether it is the one called `path`."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            flock(fd, LOCK_EX | LOCK_NB)
        except OSError:
            os.close(fd)
            raise
        return fd, True
    except OSError:
        pass
    try:
        return os.open(os.path.dirname(path), os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600), False
    except OSError:
        return os.memfd_create("fusestore-spans", os.MFD_CLOEXEC), False


def _data_extents(fd: int) -> Iterator[tuple[int, int]]:
    """lseek(2), SEEK_DATA and SEEK_HOLE: where the file has blocks, as (start, end)."""
    end = 0
    while True:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:  # ENXIO: a hole up to the end
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end
