"""Directories deeper than a path can say, and few descriptors to reach them with. Blocking."""

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

__all__ = ["deepen", "few_descriptors"]


def deepen(path: Path, levels: int, name: str = "d" * 50) -> int:
    """Makes so many directories of that name in `path`, one in the other: a descriptor of the last."""
    here = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(levels):
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = below
    return here


@contextlib.contextmanager
def few_descriptors() -> Iterator[None]:
    """This process may open ten more."""
    free = [os.open("/", os.O_PATH) for _ in range(10)]
    for fd in free:
        os.close(fd)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(free) + 1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
