"""An open regular file of a rootfs: read from its layer or, by a descriptor, in the upper. Blocking.

What is at hand (in the page cache of this machine, or decoded) is answered at once, without a step.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

from . import disk
from .blobs import LayerReader
from .inodes import FileHandle, Maybe, Remote, Steps
from .nodes import Extent
from .objects import Object
from .quota import Quota
from .syscalls import pread_now

__all__ = ["OpenFile", "step_of"]

T = TypeVar("T")


class Home(Protocol):
    """The tree a file is open in."""

    must_count: bool
    """`prepare` is to run before anything is charged."""
    quota: Quota | None

    def content(self, thing: Object) -> tuple[LayerReader, tuple[Extent, ...], int]: ...

    def reopen(self, thing: Object, flags: int) -> int: ...

    def prepare(self) -> Steps[None]: ...

    def charged(self, fd: int) -> AbstractContextManager[None]: ...

    def end_file(self) -> None:
        """Called once, when a file is closed that was opened with a descriptor; before `end_use`."""

    def end_use(self) -> None:
        """Called once, when the file is closed."""


class OpenFile(FileHandle):
    """An open regular file. One opened in a layer follows its object when that is copied up."""

    __slots__ = ("_extents", "_fd", "_is_counted", "_reader", "_size", "branch", "node")

    def __init__(self, branch: Home, node: Object, fd: int) -> None:
        self.branch = branch
        self.node: Object = node
        self._fd = fd
        self._is_counted = fd >= 0
        if fd < 0:
            self._reader, self._extents, self._size = branch.content(node)

    def read(self, offset: int, size: int) -> Maybe[bytes]:
        if self._fd < 0 and self.node.in_upper:
            self._fd = self.branch.reopen(self.node, os.O_RDONLY)
        if self._fd >= 0:
            data = pread_now(self._fd, size, offset)
            return self._read_upper(offset, size) if data is None else data
        size = min(size, self._size - offset)
        if size <= 0:
            return b""
        extents = self._extents
        if len(extents) == 1 and extents[0].length == self._size:
            source = extents[0].source + offset
            data = self._reader.read_now(source, size)
            return self._read_decoded(source, size) if data is None else data
        return self._read_sparse(offset, size)

    def _read_upper(self, offset: int, size: int) -> Steps[bytes]:
        data: bytes = yield lambda: os.pread(self._fd, size, offset)
        return data

    def _read_decoded(self, source: int, size: int) -> Steps[bytes]:
        data: bytes = yield step_of(self._reader, lambda: self._reader.read(source, size))
        return data

    def _read_sparse(self, offset: int, size: int) -> Steps[bytes]:
        data: bytes = yield step_of(
            self._reader, lambda: _read_extents(self._reader, self._extents, offset, size)
        )
        return data

    def runs(self, size: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of each run of data in the first `size` bytes, ascending: all else is holes."""
        if self._fd < 0:
            yield from ((extent.offset, extent.length) for extent in self._extents)
            return
        end = 0
        while end < size:
            try:
                start = os.lseek(self._fd, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # lseek(2): no data from there on
                    return
                raise
            end = min(os.lseek(self._fd, start, os.SEEK_HOLE), size)
            if start < end:
                yield start, end - start

    def write(self, offset: int, data: bytes) -> Maybe[int]:
        return self._write_counted(offset, data) if self.branch.must_count else self._write(offset, data)

    def _write_counted(self, offset: int, data: bytes) -> Steps[int]:
        yield from self.branch.prepare()
        return self._write(offset, data)

    def _write(self, offset: int, data: bytes) -> int:
        """Leaves mtime: with the writeback cache the kernel says what it is, by setattr (fuse-io.rst).

        It may say nothing, for a file younger than its clock's tick: then that time stays.
        """
        before = os.fstat(self._fd)
        quota = self.branch.quota
        if quota is not None:
            quota.require_write(before, offset, len(data))
        written = disk.current.pwrite(self._fd, data, offset)
        try:
            disk.current.utime(self._fd, before.st_atime_ns, before.st_mtime_ns)
        finally:
            if quota is not None:
                quota.changed(before, os.fstat(self._fd))
        return written

    def truncate(self, size: int) -> None:
        with self.branch.charged(self._fd):
            disk.current.truncate(self._fd, size)

    def fsync(self, datasync: bool) -> Maybe[None]:
        if self._fd < 0 and self.node.in_upper:
            self._fd = self.branch.reopen(self.node, os.O_RDONLY)
        if self._fd < 0:
            return None
        return self._sync(disk.current.fdatasync if datasync else disk.current.fsync)

    def _sync(self, sync: Callable[[int], None]) -> Steps[None]:
        yield lambda: sync(self._fd)

    def close(self) -> None:
        try:
            if self._fd >= 0:
                self._close()
        finally:
            if self._is_counted:
                self.branch.end_file()
            self.branch.end_use()

    def _close(self) -> None:
        """XFS takes more for a file that grows than is written, and gives it back when it is closed."""
        with contextlib.ExitStack() as stack:
            try:
                if self.branch.quota is not None:
                    same = os.open(f"/proc/self/fd/{self._fd}", os.O_PATH | os.O_CLOEXEC)
                    stack.callback(os.close, same)
                    stack.enter_context(self.branch.charged(same))
            finally:
                os.close(self._fd)


def step_of(reader: LayerReader, call: Callable[[], T]) -> Callable[[], T]:
    """`call`, which reads of `reader`, as a step."""
    return Remote(call) if reader.is_remote else call


def _read_extents(reader: LayerReader, extents: Sequence[Extent], offset: int, size: int) -> bytes:
    """`size` bytes at `offset` of a sparse file that reaches that far. Blocking."""
    result = bytearray(size)
    for extent in extents:
        start = max(offset, extent.offset)
        end = min(offset + size, extent.offset + extent.length)
        if start < end:
            data = reader.read(extent.source + start - extent.offset, end - start)
            result[start - offset : end - offset] = data
    return bytes(result)
