"""What a walk through a tree meets, and what it does where others change it."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig.deep import deepen, few_descriptors

from fusestore.walk import DIRECTORY, walk


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory with others below, and one beside it."""
    for name in ("tree/a/b/c", "tree/a/e", "tree/z/y", "outside/secret"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("tree/f", "tree/a/b/f", "tree/a/e/f", "outside/f"):
        (tmp_path / name).touch()
    return tmp_path / "tree"


def _walk(path: Path) -> Iterator[str]:
    root = os.open(path, DIRECTORY)
    try:
        for met in walk(root):
            assert stat.S_ISDIR(met.status.st_mode) == stat.S_ISDIR(
                os.stat(met.name, dir_fd=met.directory, follow_symlinks=False).st_mode
            )
            yield "/".join([*met.above, met.name])
    finally:
        os.close(root)


def test_all_is_met_once_and_directories_ahead_of_what_is_in_them(tree: Path) -> None:
    found = list(_walk(tree))
    assert sorted(found) == sorted(os.fspath(path.relative_to(tree)) for path in tree.rglob("*"))
    assert all(found.index(os.path.dirname(path)) < index for index, path in enumerate(found) if "/" in path)


def test_links_are_not_followed(tree: Path) -> None:
    (tree / "link").symlink_to("../outside")
    assert [path for path in _walk(tree) if "link" in path] == ["link"]


def test_what_a_link_took_the_place_of_is_passed_over(tree: Path) -> None:
    found = []
    for path in _walk(tree):
        found.append(path)
        if path == "z":
            (tree / "z").rename(tree.parent / "elsewhere")
            (tree / "z").symlink_to("../outside")
    assert "a/b/c" in found and not any(path.startswith("z/") for path in found)


def test_from_a_directory_moved_outside_it_comes_back(tree: Path) -> None:
    found = []
    for path in _walk(tree):
        found.append(path)
        if path == "a/b/c":
            (tree / "a/b").rename(tree.parent / "outside/b")
    assert sorted(found) == ["a", "a/b", "a/b/c", "a/b/f", "a/e", "a/e/f", "f", "z", "z/y"]


def test_what_was_moved_with_a_directory_above_it_is_passed_over(tree: Path) -> None:
    found = []
    for path in _walk(tree):
        found.append(path)
        if path == "a/b/c":
            (tree / "a/b").rename(tree.parent / "outside/b")
            (tree / "a").rename(tree.parent / "outside/a")
    assert {"f", "z", "z/y"} <= set(found) and not any("secret" in path for path in found)


def test_what_is_removed_under_it_ends_there(tree: Path) -> None:
    found = []
    for path in _walk(tree):
        found.append(path)
        if path == "z/y":
            (tree / "z/y").rmdir()
            (tree / "z").rmdir()
    assert "a/b/f" in found


def test_a_tree_deeper_than_there_are_descriptors_and_than_paths_can_be(tmp_path: Path) -> None:
    os.close(deepen(tmp_path, 150))
    with few_descriptors():
        assert max(len(path) for path in _walk(tmp_path)) == 150 * 51 - 1


def test_no_descriptor_is_left_by_a_walk_that_ends_early(tree: Path) -> None:
    before = os.listdir("/proc/self/fd")
    met = _walk(tree)
    next(met)
    met.close()  # type: ignore[attr-defined]
    assert os.listdir("/proc/self/fd") == before
