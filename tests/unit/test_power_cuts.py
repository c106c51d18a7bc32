"""What a power cut at each step of each change leaves, whichever of what was not synced is lost."""

import shutil
from itertools import islice
from pathlib import Path

import pytest
from rig.crashes import OPERATIONS, STRIDES, left_over, prepare, state
from rig.powercut import Recorder, Sync, cuts
from rig.stores import open_at

from fusestore import disk

pytestmark = pytest.mark.usefixtures("unsynced")


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_old_state_or_the_new(
    tmp_path: Path, one: str, two: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_at(tmp_path) as store:
        prepare(store, one)
        old = state(store)
        recorder = Recorder(tmp_path / "store")
        with monkeypatch.context() as patch:
            patch.setattr(disk, "current", recorder)
            OPERATIONS[name](store, two)
        new = state(store)
    assert (new == old) == (name == "empty the trash")
    for cut in islice(cuts(recorder, randomly=0, seed=1), None, None, STRIDES.get(name, 1)):
        place = tmp_path / "cut"
        place.mkdir()
        cut.state.make(place / "store")
        with open_at(place) as store:
            where = f"after {cut.after} changes, {cut.kind} of what was not synced: {recorder.changes}"
            assert state(store) in ([new] if cut.is_after_all else [old, new]), where
            assert left_over(store) == [], where
        shutil.rmtree(place)


def test_without_fsync_something_is_lost(tmp_path: Path, one: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above would show nothing."""
    with open_at(tmp_path) as store:
        store.import_image(one)
        recorder = Recorder(tmp_path / "store")
        monkeypatch.setattr(disk, "current", recorder)
        store.create_container(container_id="new")
    recorder.changes = [change for change in recorder.changes if not isinstance(change, Sync)]
    found = set()
    for cut in cuts(recorder, randomly=0, seed=1):
        place = tmp_path / "cut"
        place.mkdir()
        cut.state.make(place / "store")
        with open_at(place) as store:
            found.update("damaged" for line in left_over(store) if "not JSON" in line)
            found.update("lost" for _ in [1] if cut.is_after_all and store.container_ids() == [])
        shutil.rmtree(place)
    assert found == {"damaged", "lost"}
