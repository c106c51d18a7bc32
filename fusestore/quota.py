"""What a container's changes take on disk, and may take: the key `quota` of its metadata. Blocking.

Counted are the blocks of what is in the upper directory, hard links once: all of it when the container is
opened, from then on what each change adds or takes away. What was removed counts until nobody has it open.
Not counted are inodes, which file systems keep apart from blocks, and, until it is opened the next time, what
others do to the directory behind the mount and what the file system gives back later than a file is closed.
"""

import os
import stat

from .errors import QuotaExceeded
from .walk import walk

__all__ = ["Quota", "usage"]

_BLOCK = 512
"""The unit of st_blocks, in bytes."""
_PAGE = 4096
"""What file systems give out at once, at least."""


class Quota:
    """One container's. Touched by the event loop's thread only."""

    __slots__ = ("limit", "used")

    def __init__(self, limit: int, used: int) -> None:
        """Both in bytes."""
        self.limit = limit
        self.used = used

    def require(self, more: int) -> None:
        """Raises QuotaExceeded where `more` bytes do not fit."""
        if self.used + more > self.limit:
            raise QuotaExceeded(
                "the container's quota is reached: remove files, or raise it in metadata.json"
            )

    def require_write(self, status: os.stat_result, offset: int, size: int) -> None:
        """Raises QuotaExceeded where a write to the file `status` is of does not fit.

        What has its blocks can be written at any time; of a file with holes what they could take
        counts.
        """
        whole = -(-max(status.st_size, offset + size) // _PAGE) * _PAGE
        touched = (-(-(offset + size) // _PAGE) - offset // _PAGE) * _PAGE
        more = min(touched, whole - status.st_blocks * _BLOCK)
        if more > 0:
            self.require(more)

    def changed(self, before: os.stat_result, after: os.stat_result) -> None:
        """An object of the upper was `before`, and is `after`."""
        self.used += (after.st_blocks - before.st_blocks) * _BLOCK

    def added(self, status: os.stat_result) -> None:
        self.used += status.st_blocks * _BLOCK

    def removed(self, status: os.stat_result) -> None:
        self.used -= status.st_blocks * _BLOCK


def usage(root: int) -> int:
    """Bytes that the directory `root` and all below it take, hard links once. As `walk` finds it."""
    blocks = os.fstat(root).st_blocks
    linked: set[tuple[int, int]] = set()
    for met in walk(root):
        status = met.status
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            if (status.st_dev, status.st_ino) in linked:
                continue
            linked.add((status.st_dev, status.st_ino))
        blocks += status.st_blocks
    return blocks * _BLOCK
