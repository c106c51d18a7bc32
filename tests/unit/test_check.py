"""The verification: silent about a sound store, one line with a remedy for each thing that is wrong."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rig.ocisources import SourceMaker, tar_of
from rig.stores import fail_to_open, open_at

from fusestore.check import Finding, check
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


def at(store: Store, name: str) -> Path:
    """A file of the store by its beginning and end, `*` between."""
    (path,) = Path(store.path).glob(name)
    return path


def layer_blob(store: Store) -> Path:
    return Path(store.blob_path(store.images()[0].layers[0].blob))


def change_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.unlink()  # readers that have the old one open keep it
    path.write_bytes(data)


def replace_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def swap_indexes(store: Store) -> None:
    first, second = Path(store.path).glob("layers/*/index")
    shutil.copy(first, second)


_REMADE = "remove it, it is made again"
_AGAIN = "import the image again"

DAMAGE: dict[str, tuple[Callable[[Store], object], str, str]] = {
    "layer changed": (lambda s: change_middle(layer_blob(s)), "blobs/sha256/", _AGAIN),
    "layer missing": (lambda s: layer_blob(s).unlink(), "a layer of image", _AGAIN),
    "layer truncated": (lambda s: os.truncate(layer_blob(s), 50), "50 bytes, not", _AGAIN),
    "config changed": (
        lambda s: change_middle(Path(s.blob_path(s.images()[0].config))),
        "another digest",
        _AGAIN,
    ),
    "config missing": (lambda s: os.unlink(s.blob_path(s.images()[0].config)), "the config of image", _AGAIN),
    "manifest missing": (
        lambda s: os.unlink(s.blob_path(s.images()[0].manifest)),
        "the manifest of image",
        _AGAIN,
    ),
    "index of another layer": (swap_indexes, "is of another layer", _REMADE),
    "index changed": (
        lambda s: [change_middle(path) for path in Path(s.path).glob("layers/*/index")],
        "index: is damaged",
        _REMADE,
    ),
    "seek table changed": (
        lambda s: [change_middle(path) for path in Path(s.path).glob("layers/*/seek.*")],
        "is damaged",
        _REMADE,
    ),
    "unused blob": (
        lambda s: Path(s.path, "blobs/sha256", "0" * 64).touch(),
        "no image needs it",
        "remove it",
    ),
    "no blob at all": (lambda s: Path(s.path, "blobs/sha256/x").touch(), "no image needs it", "remove it"),
    "unused layer": (lambda s: Path(s.path, "layers", "0" * 64).mkdir(), "no image needs it", "remove it"),
    "unused image": (lambda s: Path(s.path, "images", "0" * 64).mkdir(), "no image needs it", "remove it"),
    "bad entry in index.json": (
        lambda s: replace_text(Path(s.index_path), '"manifests":[', '"manifests":[5,'),
        "no JSON object",
        "entry",
    ),
    "entry without blobs": (
        lambda s: replace_text(
            Path(s.index_path),
            '"manifests":[',
            '"manifests":[{"mediaType":"x","digest":"sha256:' + "0" * 64 + '","size":1},',
        ),
        "cannot be read",
        "remove its entry",
    ),
    "oci-layout missing": (
        lambda s: at(s, "oci-layout").unlink(),
        "missing or damaged",
        "imageLayoutVersion",
    ),
    "document damaged": (lambda s: at(s, "containers/c/container").write_bytes(b"{"), "not JSON", "delete"),
    "document missing": (lambda s: at(s, "containers/c/container").unlink(), "file is missing", "delete"),
    "document without an image's id": (
        lambda s: at(s, "containers/c/container").write_bytes(b"{}"),
        "keys are missing",
        "delete",
    ),
    "workdir missing": (lambda s: at(s, "containers/c/workdir").rmdir(), "directory is missing", "make it"),
    "image of a container missing": (
        lambda s: replace_text(at(s, "containers/c/container"), s.images()[0].id, "0" * 64),
        "its image x:1 is missing",
        "import the image again, or delete",
    ),
    "name missing": (lambda s: at(s, "names/db").unlink(), "name of container c is missing", "rename"),
    "dangling name": (
        lambda s: os.symlink("../containers/gone", Path(s.path, "names/old")),
        "gone is not called so",
        "remove it",
    ),
    "wrong name": (
        lambda s: os.symlink("../containers/c", Path(s.path, "names/old")),
        "c is not called so",
        "remove it",
    ),
    "file among the names": (lambda s: Path(s.path, "names/x").touch(), "is not called so", "remove it"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_findings(tmp_path: Path, store: Store, kind: str) -> None:
    damage, problem, remedy = DAMAGE[kind]
    damage(store)
    with open_at(tmp_path) as reopened:
        before = tree(reopened)
        found = [str(finding) for finding in check(reopened)]
        assert tree(reopened) == before
    assert any(problem in line and remedy in line for line in found), found
    assert not any("\n" in line for line in found)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_finding_says_each_thing_once(tmp_path: Path, store: Store, kind: str) -> None:
    damage, _, _ = DAMAGE[kind]
    damage(store)
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
    at(store, "names/db").unlink()
    index = json.loads(Path(store.index_path).read_bytes())
    with open_at(tmp_path) as reopened:
        assert len(check(reopened)) >= 2
    assert json.loads(Path(store.index_path).read_bytes()) == index
