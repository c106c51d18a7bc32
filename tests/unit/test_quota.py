"""What an upper directory takes on disk, and what may still be written."""

import os
from pathlib import Path

import pytest
from rig.deep import deepen, few_descriptors

from fusestore.errors import QuotaExceeded
from fusestore.quota import Quota, usage


def _usage(path: Path) -> int:
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY)
    try:
        return usage(fd)
    finally:
        os.close(fd)


def _blocks(*paths: Path) -> int:
    return sum(os.lstat(path).st_blocks for path in paths) * 512


def test_usage_counts_everything_below_and_hard_links_once(tmp_path: Path) -> None:
    deep = tmp_path / "d/e"
    deep.mkdir(parents=True)
    (deep / "f").write_bytes(bytes(10_000))
    (tmp_path / "f").write_bytes(bytes(100_000))
    os.link(tmp_path / "f", deep / "g")
    (tmp_path / "link").symlink_to("x" * 200)
    with open(tmp_path / "holes", "wb") as file:
        file.truncate(1 << 30)
    names = (
        tmp_path,
        tmp_path / "d",
        deep,
        deep / "f",
        tmp_path / "f",
        tmp_path / "link",
        tmp_path / "holes",
    )
    assert _usage(tmp_path) == _blocks(*names)


def test_usage_holds_no_descriptor_afterwards(tmp_path: Path) -> None:
    (tmp_path / "d/e/f").mkdir(parents=True)
    before = os.listdir("/proc/self/fd")
    _usage(tmp_path)
    assert os.listdir("/proc/self/fd") == before


def test_usage_of_a_tree_deeper_than_there_are_descriptors(tmp_path: Path) -> None:
    last = deepen(tmp_path, 150)
    try:
        each = os.fstat(last).st_blocks * 512
    finally:
        os.close(last)
    with few_descriptors():
        assert _usage(tmp_path) == _blocks(tmp_path) + 150 * each


@pytest.mark.parametrize(
    ("used", "more", "fits"),
    [(0, 100, True), (0, 101, False), (100, 0, True), (100, 1, False), (200, 0, False)],
)
def test_what_fits(used: int, more: int, fits: bool) -> None:
    quota = Quota(100, used)
    if fits:
        quota.require(more)
    else:
        with pytest.raises(QuotaExceeded):
            quota.require(more)


@pytest.mark.parametrize(
    ("offset", "size", "fits"),
    [
        (0, 8192, True),
        (4000, 200, True),
        (8191, 1, True),
        (8191, 2, False),
        (8192, 1, False),
        (1 << 20, 1, False),
    ],
)
def test_a_full_quota_takes_what_has_its_blocks(tmp_path: Path, offset: int, size: int, fits: bool) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"x" * 8192)
    quota = Quota(8192, 8192)
    if fits:
        quota.require_write(os.stat(file), offset, size)
    else:
        with pytest.raises(QuotaExceeded):
            quota.require_write(os.stat(file), offset, size)


def test_changes_add_and_take_away(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.touch()
    quota, before = Quota(1 << 20, 0), os.stat(file)
    file.write_bytes(b"x" * 8192)
    quota.changed(before, os.stat(file))
    assert quota.used == os.stat(file).st_blocks * 512 > 0
    quota.removed(os.stat(file))
    assert quota.used == 0
