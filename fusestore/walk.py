"""All that is below a directory, however deep, on two descriptors. Blocking.

Others may change the tree meanwhile: what is gone when its turn comes is passed over, as is what may not be
read. No symbolic link is followed, and nothing outside the directory is met: the way up is `..` only if that
still leads to where the walk came from, else it is the way down once more.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

__all__ = ["DIRECTORY", "Met", "walk"]

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
"""How a directory is opened to be listed."""

_PASSED_OVER = (FileNotFoundError, NotADirectoryError, PermissionError)


class Met(NamedTuple):
    """A file, directory, link …: valid until the next is asked for."""

    directory: int
    """A descriptor of where it is; the walk's."""
    above: Sequence[str]
    """The names that lead there."""
    name: str
    status: os.stat_result


def walk(root: int) -> Iterator[Met]:
    """What is below the directory `root`, a descriptor: directories ahead of what is in them.

    It takes as long as there are names.
    """
    walker = _Walker(root)
    try:
        yield from walker.below()
    finally:
        walker.close()


class _Walker:
    def __init__(self, root: int) -> None:
        self._root = root
        self._fd = os.open(".", DIRECTORY, dir_fd=root)
        self._above: list[str] = []
        self._identities = [_identity(self._fd)]
        """Of the directories on the way, the root's and the present one's among them."""
        self._pending: list[list[str]] = [[]]
        """The directories in each of them that are to be entered."""

    def close(self) -> None:
        os.close(self._fd)

    def below(self) -> Iterator[Met]:
        yield from self._listing()
        while True:
            if self._enter():
                yield from self._listing()
            elif self._above:
                self._climb()
            else:
                return

    def _listing(self) -> Iterator[Met]:
        with os.scandir(self._fd) as entries:
            for entry in entries:
                try:
                    status = entry.stat(follow_symlinks=False)
                except _PASSED_OVER:
                    continue
                if stat.S_ISDIR(status.st_mode):
                    self._pending[-1].append(entry.name)
                yield Met(self._fd, self._above, entry.name, status)

    def _enter(self) -> bool:
        """The next directory in the present one; False if none is left."""
        while self._pending[-1]:
            name = self._pending[-1].pop()
            with suppress(*_PASSED_OVER):
                self._move(os.open(name, DIRECTORY, dir_fd=self._fd))
                self._above.append(name)
                self._identities.append(_identity(self._fd))
                self._pending.append([])
                return True
        return False

    def _climb(self) -> None:
        for stack in (self._above, self._identities, self._pending):
            stack.pop()
        with suppress(*_PASSED_OVER):
            up = os.open("..", DIRECTORY, dir_fd=self._fd)
            if _identity(up) == self._identities[-1]:
                self._move(up)
                return
            os.close(up)
        self._descend()

    def _descend(self) -> None:
        """To the last directory on the way that is still where it was."""
        self._move(os.open(".", DIRECTORY, dir_fd=self._root))
        for depth, name in enumerate(self._above, 1):
            with suppress(*_PASSED_OVER):
                below = os.open(name, DIRECTORY, dir_fd=self._fd)
                if _identity(below) == self._identities[depth]:
                    self._move(below)
                    continue
                os.close(below)
            del self._above[depth - 1 :], self._identities[depth:], self._pending[depth:]
            return

    def _move(self, fd: int) -> None:
        os.close(self._fd)
        self._fd = fd


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino
