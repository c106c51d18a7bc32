"""What a crash at each step of each change leaves: the old state or the new, and a sound store."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rig.crashes import OPERATIONS, STRIDES, exit_at, fresh, left_over, old_and_new, prepare, state
from rig.stores import Crash, Dying, Failing, Full, Interrupted, open_at

from fusestore import disk
from fusestore.check import check
from fusestore.store import Store

pytestmark = pytest.mark.usefixtures("unsynced")


def run_until(
    dying: Dying,
    tmp_path: Path,
    operation: Callable[[Store, str], object],
    two: str,
    monkeypatch: pytest.MonkeyPatch,
) -> bool:
    """Whether the operation came to its end."""
    done = False
    with (
        contextlib.suppress(Crash, OSError, KeyboardInterrupt),
        monkeypatch.context() as patch,
        open_at(tmp_path) as store,
    ):
        patch.setattr(disk, "current", dying)
        operation(store, two)
        done = True
    return done


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("fault", [Dying, Failing, Full, Interrupted])
def test_old_or_new_after_every_step(
    tmp_path: Path, one: str, two: str, name: str, fault: type[Dying], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = old_and_new(tmp_path, one, two, OPERATIONS[name])
    assert (new == old) == (name == "empty the trash")
    for steps in range(0, 1000, STRIDES.get(name, 1)):
        place = fresh(tmp_path, steps)
        done = run_until(fault(steps), place, OPERATIONS[name], two, monkeypatch)
        with open_at(place) as store:
            after = state(store)
            assert after in (old, new), f"after {steps} steps"
            if done:
                assert after == new
            assert check(store) == [], f"after {steps} steps"
            assert os.listdir(place / "store/tmp") == []
        if done:
            break
    assert steps >= 2 or fault is Full or name == "empty the trash"


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("fault", [Failing, Interrupted])
def test_whoever_goes_on_after_an_error_has_the_old_or_the_new(
    tmp_path: Path, one: str, two: str, name: str, fault: type[Dying], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And hears which error it was, an errno of `Failing` in turn; what was not done can be done again."""
    old, new = old_and_new(tmp_path, one, two, OPERATIONS[name])
    for steps in range(0, 1000, STRIDES.get(name, 1)):
        failing = fault(steps)
        with open_at(fresh(tmp_path, steps)) as store:
            try:
                with monkeypatch.context() as patch:
                    patch.setattr(disk, "current", failing)
                    OPERATIONS[name](store, two)
                return
            except OSError as error:
                assert isinstance(failing, Failing) and error.errno == failing.number
            except KeyboardInterrupt:
                assert fault is Interrupted
            assert state(store) in (old, new), f"after {steps} steps"
            assert check(store) == [], f"after {steps} steps"
            if state(store) == old:
                OPERATIONS[name](store, two)
                assert state(store) == new


def test_an_intent_that_cannot_be_fulfilled_stays(
    tmp_path: Path, one: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with open_at(tmp_path) as store:
        prepare(store, one)
    for steps in range(1000):  # to where the name is to be put right
        place = tmp_path / str(steps)
        shutil.copytree(tmp_path / "store", place / "store", symlinks=True)
        rename = OPERATIONS["change an id under a name"]
        if run_until(Dying(steps), place, rename, "", monkeypatch):
            break
        with monkeypatch.context() as patch:
            patch.setattr(disk, "current", Full(0))
            with open_at(place) as store:
                moved = store.container_ids()
        with open_at(place) as store:
            assert store.container_names() == {"its-name": "moved" if "moved" in moved else "kept"}
            assert check(store) == []
    assert "not repaired yet" in caplog.text


def test_delete_image_after_every_step(
    tmp_path: Path, one: str, two: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for steps in range(1000):
        place = tmp_path / str(steps)
        place.mkdir()
        with open_at(place) as store:
            store.import_image(one)
            store.import_image(two)
        done = run_until(Dying(steps), place, lambda store, _: store.delete_image("one"), two, monkeypatch)
        with open_at(place) as store:
            assert check(store) == []
            assert "two" in store.image_names()
            if done:
                assert len(store.images()) == 1
                break
    assert steps > 10


def test_making_a_store_after_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for steps in range(1000):
        place = tmp_path / str(steps)
        place.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(disk, "current", Dying(steps))
            with contextlib.suppress(Crash):
                open_at(place).close()
                break
        with open_at(place) as store:
            assert check(store) == []
    assert steps > 20


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_process_that_ends_at_any_point_leaves_the_old_or_the_new(
    tmp_path: Path, one: str, two: str, name: str
) -> None:
    """Its locks, too, are no one's: all its descriptors go at once, and no `finally` is run."""
    old, new = old_and_new(tmp_path, one, two, OPERATIONS[name])
    for point in range(0, 1000, 3 * STRIDES.get(name, 1)):
        place = fresh(tmp_path, point)
        done = exit_at(place, OPERATIONS[name], two, point)
        with open_at(place) as store:
            assert state(store) in ([new] if done else [old, new]), f"at point {point}"
            assert left_over(store) == [], f"at point {point}"
        if done:
            return
    pytest.fail("it never came to its end")
