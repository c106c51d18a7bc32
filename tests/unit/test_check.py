"""The verification: silent about a sound store, one line with a remedy for each thing that is wrong."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rig.damage import DAMAGE, PLAIN_DAMAGE, Damage, change_middle, layer_blobs
from rig.deep import deepen
from rig.ocisources import SourceMaker, tar_of
from rig.stores import fail_to_open, open_at

from fusestore.check import Finding, check
from fusestore.repair import repair
from fusestore.store import Store

BASE, APP = tar_of({"etc/passwd": b"root" * 500}), tar_of({"app": b"1"}, {"link": "app"})


pytestmark = pytest.mark.usefixtures("unsynced")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """One image of two layers, a container of it with a name, and one without an image."""
    maker = SourceMaker()
    text = maker.add(maker.image([BASE, APP]), "x:1").directory(tmp_path / "source")
    store = open_at(tmp_path)
    store.import_image(text)
    store.create_container(container_id="c", container_name="web")
    store.create_container(container_id="other")
    store.set_container_metadata("c", {"a": 1})
    store.rename_container("web", "db")
    store.close()
    return store


def tree(store: Store) -> dict[str, bytes | str]:
    found: dict[str, bytes | str] = {}
    for directory, _, files in os.walk(store.path):
        for name in files:
            path = Path(directory, name)
            found[str(path)] = os.readlink(path) if path.is_symlink() else path.read_bytes()
    return found


def test_a_sound_store(store: Store) -> None:
    before = tree(store)
    assert check(store) == []
    assert tree(store) == before


def test_progress_ends_at_the_total(store: Store) -> None:
    seen: list[tuple[int, int]] = []
    check(store, lambda *now: seen.append(now))
    blobs = sum(entry.stat().st_size for entry in os.scandir(Path(store.path, "blobs/sha256")))
    assert seen[-1] == (blobs, blobs)


def layer_blob(store: Store) -> Path:
    return layer_blobs(Path(store.path))[0]


def damage(store: Store, kind: str) -> Damage:
    """Does it, and says what it was."""
    if kind in PLAIN_DAMAGE:
        store.scheme("plain")
    found = {**DAMAGE, **PLAIN_DAMAGE}[kind]
    found.do(Path(store.path))
    return found


KINDS = [*DAMAGE, *PLAIN_DAMAGE]


@pytest.mark.parametrize("kind", KINDS)
def test_findings(tmp_path: Path, store: Store, kind: str) -> None:
    done = damage(store, kind)
    with open_at(tmp_path) as reopened:
        before = tree(reopened)
        found = [str(finding) for finding in check(reopened)]
        assert tree(reopened) == before
    assert any(done.problem in line and done.remedy in line for line in found), found
    assert not any("\n" in line for line in found)


@pytest.fixture
def metadata_image(tmp_path: Path, store: Store) -> Path:
    with open_at(tmp_path) as reopened:
        return Path(reopened.metadata_image(reopened.images()[0]))


@pytest.mark.parametrize("kind", [None, "index changed", "seek table changed", "layer changed"])
def test_what_a_sound_metadata_image_is_of_may_be_damaged(
    tmp_path: Path, store: Store, metadata_image: Path, kind: str | None
) -> None:
    if kind:
        damage(store, kind)
    with open_at(tmp_path) as reopened:
        before = tree(reopened)
        found = check(reopened)
        assert tree(reopened) == before
    assert bool(found) == bool(kind)
    assert str(metadata_image) not in {finding.path for finding in found}


@pytest.mark.parametrize(
    "do", [change_middle, lambda path: os.truncate(path, 50), lambda path: os.truncate(path, 0)]
)
def test_a_damaged_metadata_image_is_found_and_made_again(
    tmp_path: Path, store: Store, metadata_image: Path, do: Callable[[Path], object]
) -> None:
    sound = metadata_image.read_bytes()
    do(metadata_image)
    with open_at(tmp_path) as reopened:
        line = f"{metadata_image}: is damaged: remove it, it is made again"
        assert [str(finding) for finding in check(reopened)] == [line]
        assert repair(reopened, lambda line: None) == []
        reopened.metadata_image(reopened.images()[0])
    assert metadata_image.read_bytes() == sound


def test_a_metadata_image_of_what_can_have_none(tmp_path: Path) -> None:
    maker = SourceMaker()
    with open_at(tmp_path) as store:
        image = store.import_image(maker.add(maker.image([]), "empty:1").directory(tmp_path / "empty"))
        path = Path(store.path, "images", image.id, "erofs.1")
        path.touch()
        assert [str(finding) for finding in check(store)] == [
            f"{path}: is of another image: remove it, it is made again"
        ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_finding_says_each_thing_once(tmp_path: Path, store: Store, kind: str) -> None:
    damage(store, kind)
    with open_at(tmp_path) as reopened:
        for finding in check(reopened):
            assert finding.path not in finding.problem
            assert "again" not in finding.problem and "remove" not in finding.problem


@pytest.mark.parametrize(
    "name", ["layer", "manifest", "layers/*/index", "layers/*/seek.*", "containers/c/container"]
)
def test_what_cannot_be_read_now_is_not_to_be_thrown_away(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    image = store.images()[0]
    paths = {"layer": layer_blob(store), "manifest": Path(store.blob_path(image.manifest))}
    path = paths[name] if name in paths else next(Path(store.path).glob(name))
    fail_to_open(monkeypatch, path, errno.EIO)
    with open_at(tmp_path) as reopened:
        found = [finding for finding in check(reopened) if finding.path == str(path)]
    assert {str(finding) for finding in found} == {
        f"{path}: cannot be read (Input/output error): see to that, then check again"
    }


def test_what_no_path_leads_to_is_found_and_left(tmp_path: Path, store: Store) -> None:
    store.scheme("plain")
    last = deepen(Path(store.path, "containers/c/workdir"), 100)
    os.setxattr(f"/proc/self/fd/{last}", b"user.fusestore.stat", b"wrong")
    os.close(last)
    said: list[str] = []
    with open_at(tmp_path) as reopened:
        (found,) = check(reopened)
        assert found.path.endswith("/".join(["d" * 50] * 100))
        assert (found.problem, found.remedy) == (
            "its xattr user.fusestore.stat is damaged",
            "unmount, give directories above it shorter names, then check --repair",
        )
        assert (repair(reopened, said.append), said) == ([found], [])


def test_directories_of_containers_that_the_disk_fails_to_read(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.scheme("plain")
    path = Path(store.path, "containers/c/workdir")
    fail_to_open(monkeypatch, path, errno.EIO)
    with open_at(tmp_path) as reopened:
        found = [str(finding) for finding in check(reopened)]
    assert found == [f"{path}: cannot be read (Input/output error): see to that, then check again"]


@pytest.mark.parametrize("name", ["layers/*/index", "layers/*/seek.*", "layers/*/cache", "images/*/image"])
def test_derived_files_may_be_missing(tmp_path: Path, store: Store, name: str) -> None:
    for path in Path(store.path).glob(name):
        path.unlink()
    with open_at(tmp_path) as reopened:
        assert check(reopened) == []


@pytest.mark.parametrize("time_s", [0, 1, 4_000_000_000])
def test_times_are_no_finding(tmp_path: Path, store: Store, time_s: int) -> None:
    """A copy of a store, a restored backup, a wrong clock."""
    for directory, directories, files in os.walk(store.path):
        for name in [*directories, *files]:
            os.utime(os.path.join(directory, name), (time_s, time_s), follow_symlinks=False)
    with open_at(tmp_path) as reopened:
        assert check(reopened) == []
        assert reopened.get_container_metadata("c")["a"] == 1


def test_the_remedy_works(tmp_path: Path, store: Store) -> None:
    """Of derived files: removing them is all."""
    for path in Path(store.path).glob("layers/*/*"):
        if path.name != "cache":
            change_middle(path)
    with open_at(tmp_path) as reopened:
        for finding in check(reopened):
            os.unlink(finding.path)
        assert check(reopened) == []


def test_a_finding_is_one_line() -> None:
    assert str(Finding("/a", "is bad", "remove it")) == "/a: is bad: remove it"


def test_several_things_at_once(tmp_path: Path, store: Store) -> None:
    layer_blob(store).unlink()
    Path(store.path, "names/db").unlink()
    index = json.loads(Path(store.path, "index.json").read_bytes())
    with open_at(tmp_path) as reopened:
        assert len(check(reopened)) >= 2
    assert json.loads(Path(store.path, "index.json").read_bytes()) == index
