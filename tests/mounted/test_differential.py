"""The same random calls in a container's rootfs and in a copy of the image on the file system below.

Each call gives the same result or the same errno; at the end, and after a remount, both trees are the same.
"""

import os
import random
from pathlib import Path
from typing import Any

import pytest
from rig.mounts import Mount
from rig.snapshot import differences, snapshot

pytestmark = [pytest.mark.mounted, pytest.mark.images]

CALLS = int(os.environ.get("FUSESTORE_TEST_CALLS", "3000"))

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


def _both(first: Path, second: Path, seed: int, calls: int) -> list[tuple[str, Any, Any]]:
    """The calls that did not give the same."""
    callers = [Caller(root, seed) for root in (first, second)]
    different = []
    for _ in range(calls):
        results = []
        for caller in callers:
            os.chdir(caller.root)
            results.append(caller.step())
        (what, here), (_, there) = results
        if here != there:
            different.append((what, here, there))
    return different


@pytest.mark.parametrize("seed", range(3))
def test_random_calls_do_what_they_do_elsewhere(fresh: Mount, seed: int) -> None:
    person, copy, rootfs = fresh.person, fresh.base / "copy", fresh.containers / "d/rootfs"
    # Owners and times of a copy are those of who makes it, and when; a plain user must be let in everywhere.
    preserved = "--preserve=mode,links,xattr" + (",ownership" if person.is_root else "")
    fresh.sh("mkdir containers/d && chmod -R u+rwX $1 && cp -r $2 $1 $3", rootfs, preserved, copy).ok()
    assert person.call(_both, rootfs, copy, seed, CALLS, deadline_s=280) == []
    ignored = frozenset({"mtime_ns"} if person.is_root else {"mtime_ns", "uid", "gid", "rdev"})
    expected = person.call(snapshot, copy)
    assert differences(expected, person.call(snapshot, rootfs), ignore=ignored) == []
    fresh.umount()
    fresh.mount()
    assert differences(expected, person.call(snapshot, rootfs), ignore=ignored) == []
