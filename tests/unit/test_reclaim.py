"""What of a store can be given back, and that nothing else is."""

import os
import tempfile
from pathlib import Path

import pytest
from rig.deep import deepen
from rig.people import plain_user
from rig.stores import open_at

from fusestore.reclaim import Item, reclaim, usage
from fusestore.store import Store


@pytest.fixture
def unnamed(store: Store, one: str, two: str) -> tuple[str, str]:
    """Two images that share a layer, neither with a name."""
    found = store.import_image(one).id, store.import_image(two).id
    for name in store.image_names():
        store.untag(name)
    return found


def _names(items: list[Item]) -> list[str]:
    return [item.name for item in items]


def _used(store: Store) -> int:
    return sum(part.size for part in usage(store))


def test_of_a_new_store_nothing_is_reclaimable(store: Store) -> None:
    assert list(reclaim(store)) == []


def test_images_without_names_go(store: Store, unnamed: tuple[str, str]) -> None:
    assert _names(list(reclaim(store))) == list(unnamed)
    assert store.images() == []
    assert os.listdir(Path(store.path, "blobs/sha256")) == os.listdir(Path(store.path, "layers")) == []


def test_what_images_share_is_of_the_last_of_them(store: Store, unnamed: tuple[str, str]) -> None:
    """As it is deleted: in the order in which they came."""
    first, second = list(reclaim(store, is_dry=True))
    assert 0 < first.size < second.size


def test_images_with_a_name_or_a_container_stay(store: Store, unnamed: tuple[str, str]) -> None:
    store.tag(unnamed[0], "kept")
    store.create_container(image_id=unnamed[1])
    assert list(reclaim(store)) == []
    assert store.image_ids() == list(unnamed)


def test_a_container_that_cannot_be_read_may_be_of_any_image(store: Store, unnamed: tuple[str, str]) -> None:
    store.create_container(container_id="damaged")
    document = Path(store.path, "containers/damaged/container")
    document.write_text("{")
    assert list(reclaim(store)) == []
    store.delete_container("damaged")


def test_what_came_into_use_meanwhile_stays(store: Store, unnamed: tuple[str, str]) -> None:
    """A container of the second image is made when the first has been reclaimed."""
    going = reclaim(store)
    assert next(going).name == unnamed[0]
    store.create_container(image_id=unnamed[1])
    assert list(going) == []
    assert store.image_ids() == [unnamed[1]]


def test_what_was_deleted_meanwhile_is_passed_over(store: Store, unnamed: tuple[str, str]) -> None:
    going = reclaim(store)
    next(going)
    store.delete_image(unnamed[1])
    assert unnamed[1] not in _names(list(going))


@pytest.mark.parametrize(("age_s", "stays"), [(3600, True), (7200, False)])
def test_what_came_lately_can_be_kept(
    store: Store, unnamed: tuple[str, str], age_s: int, stays: bool
) -> None:
    record = Path(store.path, "images", unnamed[0], "image")
    then = record.stat().st_mtime - age_s
    os.utime(record, (then, then))
    reclaimed = _names(list(reclaim(store, keep_s=5400)))
    assert (unnamed[0] not in reclaimed) == stays
    assert unnamed[1] not in reclaimed


def test_what_no_image_needs_goes(store: Store, one: str) -> None:
    store.import_image(one)
    paths = [f"blobs/sha256/{'0' * 64}", f"layers/{'1' * 64}", f"images/{'2' * 64}"]
    Path(store.path, paths[0]).write_bytes(b"x" * 5000)
    for path in paths[1:]:
        Path(store.path, path).mkdir()
    found = list(reclaim(store))
    assert sorted(_names(found)) == sorted(paths)
    assert {item.name: item.size for item in found}[paths[0]] == 8192
    assert len(store.images()) == 1


def test_the_cache_goes_and_is_made_again(store: Store, one: str) -> None:
    image = store.import_image(one)
    cache = Path(store.path, "layers", image.layers[0].diff_id.removeprefix("sha256:"), "cache")
    cache.write_bytes(b"x" * 4096)
    assert _names(list(reclaim(store))) == [os.path.relpath(cache, store.path)]
    assert not cache.exists()


def test_the_cache_stays_while_the_store_is_mounted(store: Store, one: str) -> None:
    image = store.import_image(one)
    cache = Path(store.path, "layers", image.layers[0].diff_id.removeprefix("sha256:"), "cache")
    cache.write_bytes(b"x" * 4096)
    with store.record_mount("/nowhere", os.getpid(), "union"):
        assert list(reclaim(store)) == []
    cache.unlink()


def test_the_trash_goes(store: Store) -> None:
    store.create_container(container_id="deleted")
    store.delete_container("deleted")
    (item,) = reclaim(store)
    assert (item.what, item.name) == ("trash", "1 in trash/")
    assert os.listdir(Path(store.path, "trash")) == []


def test_a_dry_run_says_the_same_and_changes_nothing(store: Store, unnamed: tuple[str, str]) -> None:
    store.create_container(container_id="deleted", image_id=unnamed[0])
    store.delete_container("deleted")
    before = _used(store)
    said = list(reclaim(store, is_dry=True))
    assert _used(store) == before
    assert list(reclaim(store)) == said
    assert _used(store) < before


def test_usage_says_how_much_of_it_is_reclaimable(store: Store, unnamed: tuple[str, str]) -> None:
    store.create_container(image_id=unnamed[1])
    found = {part.what: part for part in usage(store)}
    assert found["images"].count == 2
    assert 0 < found["images"].reclaimable < found["images"].size
    assert (found["containers"].count, found["containers"].reclaimable) == (1, 0)
    assert found["containers"].size > 0


def test_hard_links_are_counted_once(store: Store, one: str) -> None:
    store.import_image(one)
    store.create_container(container_id="c")
    workdir = Path(store.path, "containers/c/workdir")
    (workdir / "a").write_bytes(b"x" * (1 << 20))
    (before,) = (part.size for part in usage(store) if part.what == "containers")
    os.link(workdir / "a", workdir / "b")
    (after,) = (part.size for part in usage(store) if part.what == "containers")
    assert before >= 1 << 20 and after - before < 1 << 20


def test_a_tree_deeper_than_paths_can_be_is_counted(store: Store) -> None:
    store.create_container(container_id="c")
    before = _used(store)
    last = deepen(Path(store.path, "containers/c/workdir"), 150)
    Path(f"/proc/self/fd/{last}/f").write_bytes(bytes(1 << 20))
    os.close(last)
    assert _used(store) - before >= 1 << 20


def _used_and_given_back(place: Path) -> tuple[int, list[str], list[str]]:
    """Of a store with a directory that nobody may look into: bytes, what is reclaimed, what trash is left."""
    with open_at(place) as store:
        store.create_container(container_id="c")
        closed = Path(store.path, "containers/c/workdir/closed")
        closed.mkdir()
        (closed / "f").touch()
        closed.chmod(0)
        used = _used(store)
        store.delete_container("c")
        whats = [item.what for item in reclaim(store)]
        return used, whats, os.listdir(Path(store.path, "trash"))


def test_what_may_not_be_looked_into_hinders_nobody() -> None:
    """As overlayfs's work directory, for a plain user."""
    person = plain_user()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        os.chown(directory, person.uid, person.gid)
        used, whats, left = person.call(_used_and_given_back, Path(directory))
    assert used > 0 and (whats, left) == (["trash"], [])
