"""Pulls that are cut off and gone on with: what is fetched again, and what of it is believed."""

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from rig.ocisources import SourceMaker, pulled, tar_of
from rig.stores import Unsynced, open_at

from fusestore import disk, durable
from fusestore.errors import LayerRefused, RegistryFailed
from fusestore.reclaim import reclaim, usage
from fusestore.store import Store

CUT = 200_000


@pytest.fixture
def big(tmp_path: Path) -> str:
    """A source of one layer, which cannot be compressed, of half a megabyte."""
    maker = SourceMaker()
    content = random.Random(1).randbytes(500_000)
    return maker.add(maker.image([tar_of({"big": content})]), "big").directory(tmp_path / "big")


def _cut(store: Store, big: str) -> Path:
    """Begins a pull; what is here of the layer then."""
    with pytest.raises(RegistryFailed, match="gone"):
        store.import_source(lambda _: pulled(big, CUT))
    (path,) = _kept(store)
    return path


def _kept(store: Store) -> list[Path]:
    return list(Path(store.path, "downloads").iterdir())


def test_the_next_pull_goes_on_where_the_last_one_was(store: Store, big: str) -> None:
    assert _cut(store, big).stat().st_size == CUT
    offsets: list[int] = []
    image = store.import_source(lambda _: pulled(big, offsets=offsets))
    assert offsets == [CUT]
    assert store.images() == [image]
    assert _kept(store) == []


def _flip(path: Path, place: int = 1000) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def _lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.truncate(1 << 20)


def _forget_a_block(path: Path) -> None:
    """As a power cut may."""
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(bytes(4096))


@pytest.mark.parametrize("damage", [_flip, _lengthen, _forget_a_block])
def test_what_was_kept_is_not_believed(store: Store, big: str, damage: Callable[[Path], None]) -> None:
    damage(_cut(store, big))
    offsets: list[int] = []
    store.import_source(lambda _: pulled(big, offsets=offsets))
    assert offsets[-1] == 0
    assert _kept(store) == []


def test_what_is_refused_is_not_kept(store: Store, big: str) -> None:
    """Not what was read from the registry just now, be it after a beginning that was kept."""
    (blob,) = (
        path for path in Path(big.removeprefix("oci:"), "blobs/sha256").iterdir() if path.stat().st_size > CUT
    )
    _cut(store, big)
    _flip(blob, -1000)
    with pytest.raises(LayerRefused):
        store.import_source(lambda _: pulled(big))
    assert _kept(store) == []


class _Ending(Unsynced):
    """Raises an error once so much of the layer is written."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def write(self, fd: int, data: bytes | memoryview) -> int:
        if os.lseek(fd, 0, os.SEEK_CUR) > CUT:
            raise self._error
        return super().write(fd, data)


@pytest.mark.parametrize(
    ("error", "kept"), [(KeyboardInterrupt(), 1), (OSError(errno.ENOSPC, "No space left on device"), 0)]
)
def test_ctrl_c_keeps_what_came_and_a_full_disk_has_its_space_back(
    store: Store, big: str, monkeypatch: pytest.MonkeyPatch, error: BaseException, kept: int
) -> None:
    monkeypatch.setattr(disk, "current", _Ending(error))
    with pytest.raises(type(error)):
        store.import_source(lambda _: pulled(big))
    assert [path.stat().st_size > CUT for path in _kept(store)] == kept * [True]


def test_a_blob_that_another_pull_is_fetching_is_fetched_aside(store: Store, big: str) -> None:
    path = _cut(store, big)
    workspace = durable.Workspace(tmp="", trash="", lock="")
    fd = workspace.claim(str(path))
    assert fd is not None
    offsets: list[int] = []
    image = store.import_source(lambda _: pulled(big, offsets=offsets))
    workspace.release(str(path), fd, is_kept=True)
    assert store.images() == [image]
    assert offsets == [] and path.stat().st_size == CUT


def test_a_new_store_with_something_to_go_on_from_stays(store: Store, big: str) -> None:
    _cut(store, big)
    store.remove_if_empty()
    assert len(_kept(store)) == 1


def test_a_new_store_without_goes(tmp_path: Path) -> None:
    with open_at(tmp_path) as store:
        os.mkdir(f"{store.path}/downloads")
        store.remove_if_empty()
        assert not os.path.exists(store.path)


@pytest.mark.parametrize(("age_s", "stays"), [(3600, True), (7200, False)])
def test_what_nobody_goes_on_with_is_given_back(store: Store, big: str, age_s: int, stays: bool) -> None:
    path = _cut(store, big)
    then = path.stat().st_mtime - age_s
    os.utime(path, (then, then))
    size = {part.what: part for part in usage(store)}["downloads"]
    assert size.count == 1 and size.size == size.reclaimable >= CUT
    items = [item.name for item in reclaim(store, keep_s=5400)]
    assert (items == [], path.exists()) == (stays, stays)


def test_what_somebody_is_fetching_is_not_given_back(store: Store, big: str) -> None:
    workspace = durable.Workspace(tmp="", trash="", lock="")
    path = _cut(store, big)
    fd = workspace.claim(str(path))
    assert fd is not None
    assert list(reclaim(store)) == []
    workspace.release(str(path), fd, is_kept=True)
    assert len(list(reclaim(store, is_dry=True))) == 1
    assert path.exists()
