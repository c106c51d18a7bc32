"""What the tests of the store have in common: two images that share a layer, a store without fsync."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from rig.ocisources import SourceMaker, tar_of
from rig.stores import Unsynced, open_at

from fusestore import disk
from fusestore.check import check
from fusestore.store import Store

BASE = tar_of({"etc/passwd": b"root"})


def _image(path: Path, content: bytes) -> str:
    maker = SourceMaker()
    return maker.add(maker.image([BASE, tar_of({"app": content})]), path.name).directory(path)


@pytest.fixture
def one(tmp_path: Path) -> str:
    return _image(tmp_path / "one", b"1")


@pytest.fixture
def two(tmp_path: Path) -> str:
    """Shares its lower layer with `one`."""
    return _image(tmp_path / "two", b"2")


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fsync: what a power cut would lose is not the point."""
    monkeypatch.setattr(disk, "current", Unsynced())


@pytest.fixture
def store(unsynced: None, tmp_path: Path) -> Iterator[Store]:
    """A store that is sound afterwards, whatever the test did."""
    with open_at(tmp_path) as opened:
        yield opened
        assert check(opened) == []
