"""Stores for tests that need no mount, and disks under them that die or fail at a chosen step. Blocking."""

import builtins
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fusestore import disk
from fusestore.disk import Disk
from fusestore.store import Store

__all__ = [
    "Crash",
    "Dying",
    "Exiting",
    "Failing",
    "Full",
    "Interrupted",
    "Unsynced",
    "fail_to_open",
    "on_disk",
    "open_at",
]


def open_at(place: Path) -> Store:
    """The store and run directory in `place`, made if need be."""
    return Store.open(place / "store", place / "run", create=True)


def fail_to_open(patch: pytest.MonkeyPatch, wanted: str | os.PathLike[str], number: int) -> None:
    """Has every open(2) of that file fail with an errno, until `patch` is undone."""
    real_open, real_os_open = open, os.open

    def refuse(path: Any) -> None:
        if not isinstance(path, int) and os.fsdecode(path) == os.fspath(wanted):
            raise OSError(number, os.strerror(number), path)

    def opened(path: Any, *args: Any, **kwargs: Any) -> Any:
        refuse(path)
        return real_open(path, *args, **kwargs)

    def os_opened(path: Any, *args: Any, **kwargs: Any) -> int:
        refuse(path)
        return real_os_open(path, *args, **kwargs)

    patch.setattr(builtins, "open", opened)
    patch.setattr(os, "open", os_opened)


@contextmanager
def on_disk(other: Disk) -> Iterator[None]:
    """Whatever is changed is changed through `other`."""
    before, disk.current = disk.current, other
    try:
        yield
    finally:
        disk.current = before


class Crash(BaseException):
    """The process is gone: not an Exception, nothing may tidy up after it."""


class Unsynced(Disk):
    """A process that dies loses nothing it wrote: fsync is for power cuts, and slow."""

    def fsync(self, fd: int) -> None:
        pass

    def fdatasync(self, fd: int) -> None:
        pass

    def syncfs(self, fd: int) -> None:
        pass


class Dying(Unsynced):
    """Lets `steps` primitives happen, then none any more."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def step(self) -> None:
        if self.left == 0:
            raise Crash
        self.left -= 1


class Exiting(Unsynced):
    """Ends the process at one of the points before and after each primitive: 0 is before the first."""

    CODE = 9

    def __init__(self, point: int) -> None:
        self.left = point

    def step(self) -> None:
        if self.left == 0:
            self.end()
        self.left -= 1

    def end(self) -> None:
        os._exit(self.CODE)


class Failing(Dying):
    """Instead of dying fails once, with an errno that depends on the step: each has its turn."""

    ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)

    def __init__(self, steps: int) -> None:
        super().__init__(steps)
        self.number = self.ERRNOS[steps % len(self.ERRNOS)]

    def step(self) -> None:
        self.left -= 1
        if self.left == -1:
            raise OSError(self.number, os.strerror(self.number))


class Interrupted(Dying):
    """Once, the user presses Ctrl-C."""

    def step(self) -> None:
        self.left -= 1
        if self.left == -1:
            raise KeyboardInterrupt


class Full(Dying):
    """From then on nothing can be made any more; to move and to remove needs no space."""

    def step(self) -> None:
        self.left -= 1

    def make(self) -> None:
        self.step()
        if self.left < 0:
            raise OSError(errno.ENOSPC, "no space")


def _stepping(name: str, before: str, after: str | None = None) -> Callable[..., Any]:
    real = getattr(Unsynced, name)

    def primitive(self: Any, *args: Any, **kwargs: Any) -> Any:
        getattr(self, before)()
        found = real(self, *args, **kwargs)
        if after is not None:
            getattr(self, after)()
        return found

    return primitive


PRIMITIVES = tuple(name for name in vars(Disk) if not name.startswith("_"))
_MAKING = ("create", "link", "mkdir", "mknod", "pwrite", "set_xattr", "symlink", "write")

for _name in PRIMITIVES:
    setattr(Dying, _name, _stepping(_name, "step"))
    setattr(Exiting, _name, _stepping(_name, "step", "step"))
for _name in _MAKING:
    setattr(Full, _name, _stepping(_name, "make"))
