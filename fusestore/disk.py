"""The system calls that change what a store keeps on disk. Blocking.

The rule a maintainer must not break: whatever is changed below a store, but for its caches, is changed
through `current`, so that tests can put another `Disk` in its place that stops, fails or cuts the power at
any of them.

Names are paths or, with `dir_fd`, of a directory that is a descriptor. `what` is a path, followed, or a
descriptor.
"""

import io
import os
from typing import TYPE_CHECKING, BinaryIO, cast

from . import syscalls

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

__all__ = ["Disk", "Target", "current", "open_to_write"]

Name = str | bytes
Target = str | bytes | int


class Disk:
    """The primitives, each one system call. Raises OSError."""

    # Names

    def create(self, name: Name, mode: int, dir_fd: int | None = None) -> int:
        """A new regular file, to read and write; the descriptor is the caller's to close."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(name, flags, mode, dir_fd=dir_fd)

    def mkdir(self, name: Name, mode: int, dir_fd: int | None = None) -> None:
        os.mkdir(name, mode, dir_fd=dir_fd)

    def mknod(self, name: Name, mode: int, rdev: int, dir_fd: int) -> None:
        os.mknod(name, mode, rdev, dir_fd=dir_fd)

    def symlink(self, target: Name, name: Name, dir_fd: int | None = None) -> None:
        os.symlink(target, name, dir_fd=dir_fd)

    def link(self, source: bytes, name: bytes, dir_fd: int) -> None:
        """`source` is a path, followed."""
        os.link(source, name, dst_dir_fd=dir_fd, follow_symlinks=True)

    def rename(self, source: str, target: str) -> None:
        os.rename(source, target)

    def renameat2(self, old_dir: int, old_name: bytes, new_dir: int, new_name: bytes, flags: int = 0) -> None:
        syscalls.renameat2(old_dir, old_name, new_dir, new_name, flags)

    def unlink(self, name: Name, dir_fd: int | None = None) -> None:
        os.unlink(name, dir_fd=dir_fd)

    def rmdir(self, name: Name, dir_fd: int | None = None) -> None:
        os.rmdir(name, dir_fd=dir_fd)

    # Content

    def write(self, fd: int, data: bytes | memoryview) -> int:
        return os.write(fd, data)

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def truncate(self, what: Target, size: int) -> None:
        os.truncate(what, size)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def syncfs(self, fd: int) -> None:
        syscalls.syncfs(fd)

    # Attributes

    def chmod(self, what: Target, mode: int) -> None:
        os.chmod(what, mode)

    def chown(self, what: Target, uid: int, gid: int) -> None:
        os.chown(what, uid, gid)

    def utime(self, what: Target, atime_ns: int, mtime_ns: int) -> None:
        os.utime(what, ns=(atime_ns, mtime_ns))

    def set_xattr(self, what: Target, name: Name, value: bytes) -> None:
        os.setxattr(what, name, value)

    def remove_xattr(self, what: Target, name: Name, follow_symlinks: bool = True) -> None:
        os.removexattr(what, name, follow_symlinks=follow_symlinks)


current = Disk()


def open_to_write(fd: int) -> BinaryIO:
    """The file `fd` from its beginning on, buffered, written through `current`; it is closed with it."""
    return cast(BinaryIO, io.BufferedWriter(_File(fd)))


class _File(io.RawIOBase):
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return os.lseek(self._fd, offset, whence)

    def write(self, data: "Buffer") -> int:
        return current.write(self._fd, bytes(data))

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
            super().close()
