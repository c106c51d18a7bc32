"""Random system calls below one directory, with few names, so that they meet each other's work. Blocking."""

import os
import random
from pathlib import Path

__all__ = ["Caller"]

NAMES = ("etc", "bin", "hostname", "passwd", "busybox", "tmp", "a", "b", "c", "d")


class Caller:
    """Random system calls below one directory. Two of the same seed make the same calls."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.random = random.Random(seed)

    def path(self) -> str:
        """At most three names; few, so that calls meet each other's work."""
        return "/".join(self.random.choices(NAMES, k=self.random.randint(1, 3)))

    def step(self) -> tuple[str, object]:
        """One call: what it was, and what came of it."""
        name = self.random.choice(CALL_NAMES)
        paths = self.path(), self.path()
        number = self.random.randrange(1 << 16)
        try:
            return f"{name} {paths} {number}", getattr(self, name)(*paths, number)
        except OSError as error:
            return f"{name} {paths} {number}", error.errno

    def mkdir(self, path: str, other: str, number: int) -> None:
        os.mkdir(path, 0o700 | number & 0o077)

    def write(self, path: str, other: str, number: int) -> None:
        flags = self.random.choice((os.O_CREAT, os.O_CREAT | os.O_EXCL, os.O_TRUNC, os.O_APPEND, 0))
        fd = os.open(path, os.O_RDWR | flags, 0o600 | number & 0o177)
        try:
            os.pwrite(fd, bytes([number & 0xFF]) * (number >> 4), number & 0x3FFF)
        finally:
            os.close(fd)

    def read(self, path: str, other: str, number: int) -> bytes:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # it may be a FIFO
        try:
            return os.pread(fd, number, number >> 2)
        finally:
            os.close(fd)

    def truncate(self, path: str, other: str, number: int) -> None:
        os.truncate(path, number)

    def unlink(self, path: str, other: str, number: int) -> None:
        os.unlink(path)

    def rmdir(self, path: str, other: str, number: int) -> None:
        os.rmdir(path)

    def rename(self, path: str, other: str, number: int) -> None:
        os.rename(path, other)

    def link(self, path: str, other: str, number: int) -> None:
        os.link(path, other, follow_symlinks=False)

    def symlink(self, path: str, other: str, number: int) -> None:
        os.symlink(path, other)

    def mkfifo(self, path: str, other: str, number: int) -> None:
        os.mkfifo(path)

    def chmod(self, path: str, other: str, number: int) -> None:
        os.chmod(path, 0o700 | number & 0o077)

    def utime(self, path: str, other: str, number: int) -> None:
        os.utime(path, ns=(number, number * 1001), follow_symlinks=False)

    def set_xattr(self, path: str, other: str, number: int) -> None:
        os.setxattr(path, f"user.{number & 3}", b"v" * (number & 0x3F), follow_symlinks=False)

    def remove_xattr(self, path: str, other: str, number: int) -> None:
        os.removexattr(path, f"user.{number & 3}", follow_symlinks=False)

    def list(self, path: str, other: str, number: int) -> list[str]:
        return sorted(os.listdir(path))

    def stat(self, path: str, other: str, number: int) -> tuple[int, ...]:
        status = os.lstat(path)
        return status.st_mode, status.st_nlink, status.st_size if not os.path.isdir(path) else 0

    def use_unlinked(self, path: str, other: str, number: int) -> tuple[bytes, int]:
        """A file that is written, read and asked for its links after its name is gone."""
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if not os.path.isfile(path):
                return b"", 0
            os.unlink(path)
            os.pwrite(fd, b"after", number)
            return os.pread(fd, 100, number), os.fstat(fd).st_nlink
        finally:
            os.close(fd)


CALL_NAMES = (
    "mkdir", "write", "write", "read", "truncate", "unlink", "rmdir", "rename", "rename", "link", "symlink",
    "mkfifo", "chmod", "utime", "set_xattr", "remove_xattr", "list", "stat", "use_unlinked",
)  # fmt: skip
