"""The run directory's account of live mounts, and of the boot it belongs to. Blocking.

A mount is one file that its daemon keeps flocked: whoever can lock it knows that the daemon is gone. The file
gets its name only after it is locked and written, so that a visible one is always whole and, while its daemon
lives, locked.
"""

import contextlib
import fcntl
import json
import os
import secrets

from .durable import discard
from .errors import StoreUnusable
from .layout import RunLayout

__all__ = ["MountRecord", "Mounts", "forget_former_boot", "is_of_this_boot"]

_RECORD_MAX = 1 << 16


class MountRecord:
    """One mount. `close`, in the daemon, ends it; idempotent."""

    def __init__(self, mountpoint: str, pid: int, driver: str, path: str, fd: int = -1) -> None:
        self.mountpoint = mountpoint
        self.pid = pid
        self.driver = driver
        self._path = path
        self._fd = fd

    def close(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "MountRecord":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Mounts:
    """The mounts of one store. Thread-safe."""

    def __init__(self, run: RunLayout) -> None:
        self._directory = run.mounts

    def record(self, mountpoint: str, pid: int, driver: str) -> MountRecord:
        """The lock is of the open file: processes forked from this one share it."""
        data = json.dumps({"mountpoint": mountpoint, "pid": pid, "driver": driver}).encode()
        if len(data) > _RECORD_MAX:
            raise StoreUnusable(
                f"the path of the mount point is too long: choose a shorter one than {mountpoint[:80]}…"
            )
        name = secrets.token_hex(8)
        temp, path = f"{self._directory}/.{name}", f"{self._directory}/{name}"
        fd = os.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(fd, data)
            os.rename(temp, path)
        except BaseException:
            os.close(fd)
            raise
        return MountRecord(mountpoint, pid, driver, path, fd)

    def live(self) -> list[MountRecord]:
        """Newest last. Removes the files of those that ended without closing theirs."""
        found = []
        for name in os.listdir(self._directory):
            path = f"{self._directory}/{name}"
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                if not name.startswith("."):
                    record = json.loads(os.pread(fd, _RECORD_MAX, 0))
                    started_ns = os.fstat(fd).st_mtime_ns
                    entry = MountRecord(record["mountpoint"], record["pid"], record["driver"], path)
                    found.append((started_ns, name, entry))
            else:
                if not name.startswith("."):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)
            finally:
                os.close(fd)
        return [entry for _, _, entry in sorted(found)]


def _boot_id() -> bytes:
    with open("/proc/sys/kernel/random/boot_id", "rb") as file:
        return file.read()


def is_of_this_boot(run: RunLayout) -> bool:
    try:
        with open(run.boot, "rb") as file:
            return file.read() == _boot_id()
    except FileNotFoundError:
        return False


def forget_former_boot(run: RunLayout) -> None:
    """Empties a run directory that is from before a reboot. With the store's lock held."""
    if is_of_this_boot(run):
        return
    for directory in (run.containers, run.mounts):
        discard([f"{directory}/{name}" for name in os.listdir(directory)], run.trash)
    temp = f"{run.boot}.{secrets.token_hex(8)}"
    with open(temp, "xb") as file:
        file.write(_boot_id())
    os.rename(temp, run.boot)
