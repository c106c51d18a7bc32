"""Reading what is in memory: whole, or not at all; and what a thread may do without."""

import os
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rig.pages import drop_pages

from fusestore.syscalls import CAP_DAC_READ_SEARCH, give_up_capability, pread_now

CONTENT = os.urandom(1_000_000)


@pytest.fixture
def disk() -> Iterator[Path]:
    """A directory on a disk: tmpfs does not tell what is in memory."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("FUSESTORE_TEST_TMP", "/var/tmp")) as path:
        yield Path(path)


@pytest.fixture
def fd(disk: Path) -> Iterator[int]:
    path = disk / "file"
    path.write_bytes(CONTENT)
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


@pytest.mark.parametrize(
    ("size", "offset"), [(10, 0), (131072, 131072), (10_000, 999_000), (10, 1_000_000), (10, 2_000_000)]
)
def test_what_is_in_memory_is_read_up_to_the_end_of_the_file(fd: int, size: int, offset: int) -> None:
    assert pread_now(fd, size, offset) == CONTENT[offset : offset + size]


def test_what_is_not_in_memory_is_not_read(fd: int) -> None:
    drop_pages(fd)
    assert pread_now(fd, 100, 0) is None


def test_what_is_partly_in_memory_is_not_read(fd: int) -> None:
    drop_pages(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
    os.pread(fd, 4096, 0)
    assert pread_now(fd, 100, 0) == CONTENT[:100]
    assert pread_now(fd, 8192, 0) is None
    assert os.pread(fd, 8192, 0) == CONTENT[:8192]


def test_memory_is_read_at_once() -> None:
    fd = os.memfd_create("test")
    os.write(fd, CONTENT)
    assert pread_now(fd, 100, 200) == CONTENT[200:300]
    os.close(fd)


def test_what_cannot_be_read_is_an_error(disk: Path) -> None:
    fd = os.open(disk, os.O_RDONLY)
    with pytest.raises(IsADirectoryError):
        pread_now(fd, 100, 0)
    os.close(fd)


def _capabilities() -> int:
    found = re.search(r"^CapEff:\s*(\w+)$", Path("/proc/thread-self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1], 16)


def test_a_thread_gives_up_one_capability_and_others_keep_it() -> None:
    def give_up() -> int:
        give_up_capability(CAP_DAC_READ_SEARCH)
        return _capabilities()

    before = _capabilities()
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(give_up).result() == before & ~(1 << CAP_DAC_READ_SEARCH)
    assert _capabilities() == before
