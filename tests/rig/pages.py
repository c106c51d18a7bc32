"""The pages of a file out of memory, as after a while. Blocking."""

import os

__all__ = ["drop_pages"]


def drop_pages(fd: int) -> None:
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
