"""Files in memory, next to a metadata.json."""

import os
import stat

import pytest

from fusestore.errors import FileTooLarge, NoSpace
from fusestore.inodes import Branch, Changes, Node
from fusestore.nodes import Inode
from fusestore.scratchfile import SCRATCH_MAX, SCRATCH_TOTAL_MAX, ScratchFile, ScratchHandle, ScratchMemory

BRANCH = Branch()


@pytest.fixture
def file() -> ScratchFile:
    return ScratchFile(
        BRANCH, Inode(7), Node(BRANCH, Inode(6)), ScratchMemory(), b"abcdef", 0o640, 1000, 1001
    )


def test_new_file_has_mode_owner_and_size(file: ScratchFile) -> None:
    attr = file.attr
    assert (attr.mode, attr.uid, attr.gid, attr.size, attr.nlink) == (stat.S_IFREG | 0o640, 1000, 1001, 6, 1)


def test_write_beyond_the_end_leaves_zeros(file: ScratchFile) -> None:
    ScratchHandle(file, os.O_WRONLY).write(8, b"x")
    assert bytes(file.data) == b"abcdef\0\0x"


def test_append_goes_to_the_end_wherever_the_kernel_says(file: ScratchFile) -> None:
    ScratchHandle(file, os.O_WRONLY | os.O_APPEND).write(0, b"g")
    assert bytes(file.data) == b"abcdefg"


def test_open_with_trunc_empties(file: ScratchFile) -> None:
    ScratchHandle(file, os.O_WRONLY | os.O_TRUNC)
    assert file.attr.size == 0


@pytest.mark.parametrize("size, content", [(2, b"ab"), (8, b"abcdef\0\0")])
def test_truncate(file: ScratchFile, size: int, content: bytes) -> None:
    ScratchHandle(file, os.O_RDWR).truncate(size)
    assert bytes(file.data) == content


def test_read_is_short_at_the_end(file: ScratchFile) -> None:
    assert ScratchHandle(file, os.O_RDONLY).read(4, 10) == b"ef"


@pytest.mark.parametrize("offset", [SCRATCH_MAX, 1 << 40])
def test_write_over_the_limit_is_refused(file: ScratchFile, offset: int) -> None:
    with pytest.raises(FileTooLarge):
        ScratchHandle(file, os.O_WRONLY).write(offset, b"x")
    assert file.attr.size == 6


def test_limit_itself_fits(file: ScratchFile) -> None:
    file.resize(SCRATCH_MAX)
    assert file.attr.size == SCRATCH_MAX


def test_attributes_can_be_set(file: ScratchFile) -> None:
    file.change(Changes(mode=0o104755, uid=5, gid=6, atime_ns=7, mtime_ns=8))
    attr = file.attr
    assert (attr.mode, attr.uid, attr.gid, attr.atime_ns, attr.mtime_ns) == (0o104755, 5, 6, 7, 8)


def test_unlinked_file_has_no_link_and_keeps_its_content(file: ScratchFile) -> None:
    file.unlinked()
    assert (file.attr.nlink, ScratchHandle(file, os.O_RDONLY).read(0, 9)) == (0, b"abcdef")


def test_all_files_together_are_bounded() -> None:
    memory = ScratchMemory()

    def made(size: int) -> ScratchFile:
        return ScratchFile(BRANCH, Inode(7), Node(BRANCH, Inode(6)), memory, bytes(size), 0o640, 1000, 1001)

    files = [made(SCRATCH_MAX) for _ in range(SCRATCH_TOTAL_MAX // SCRATCH_MAX)]
    other = made(0)
    with pytest.raises(NoSpace):
        other.write(0, b"x")
    with pytest.raises(NoSpace):
        other.resize(1)
    assert other.attr.size == 0
    files[0].resize(SCRATCH_MAX - 1)
    other.write(0, b"x")
    del files[1:]
    other.resize(SCRATCH_MAX)
