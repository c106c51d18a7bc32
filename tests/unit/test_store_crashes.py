"""What a crash at each step of each change leaves: the old state or the new, and a sound store."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rig.stores import Crash, Dying, Failing, Full, Interrupted, open_at

from fusestore import durable
from fusestore.check import check
from fusestore.store import Store

pytestmark = pytest.mark.usefixtures("unsynced")


def state(store: Store) -> dict[str, object]:
    """What a user can tell of a store."""
    documents = {}
    for container_id in store.container_ids():
        document = store.get_container_metadata(container_id)
        del document["created-at"]
        documents[container_id] = document
    return {
        "images": {image.id: image for image in store.images()},
        "names": store.image_names(),
        "containers": documents,
        "container names": store.container_names(),
    }


def prepare(store: Store, one: str) -> None:
    store.import_image(one)
    store.create_container(container_id="kept", container_name="its-name")
    store.create_container("one", container_id="plain")


def _add_a_file(_: str, directory: str) -> None:
    Path(directory, "workdir/more").touch()


OPERATIONS: dict[str, Callable[[Store, str], object]] = {
    "create": lambda store, _: store.create_container(container_id="new"),
    "create with a name": lambda store, _: store.create_container(container_id="new", container_name="n"),
    "copy": lambda store, _: store.copy_container("kept", "new", _add_a_file),
    "delete": lambda store, _: store.delete_container("plain"),
    "delete with a name": lambda store, _: store.delete_container("kept"),
    "change an id": lambda store, _: store.rename_container("plain", "moved"),
    "change an id under a name": lambda store, _: store.rename_container("kept", "moved"),
    "change a name": lambda store, _: store.rename_container("its-name", "other"),
    "give up a name": lambda store, _: store.rename_container("its-name", "kept"),
    "set metadata": lambda store, _: store.set_container_metadata("plain", {"a": 1}),
    "set metadata with a name": lambda store, _: store.set_container_metadata("plain", {"a": 1, "name": "n"}),
    "import": lambda store, two: store.import_image(two),
    "import with names": lambda store, two: store.import_image(two, ["one", "x:1"]),
    "tag": lambda store, _: store.tag("one", "again"),
    "untag": lambda store, _: store.untag("one"),
    "rename a tag": lambda store, _: store.rename_tag("one", "default", replace=True),
    "empty the trash": lambda store, _: store.empty_trash(),
}


def run_until(
    disk: Dying,
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
        patch.setattr(durable, "disk", disk)
        operation(store, two)
        done = True
    return done


def fresh(tmp_path: Path, number: int) -> Path:
    """A copy of the store that `old_and_new` made."""
    place = tmp_path / str(number)
    shutil.copytree(tmp_path / "old", place, symlinks=True)
    return place


def old_and_new(
    tmp_path: Path, one: str, two: str, operation: Callable[[Store, str], object]
) -> tuple[dict[str, object], dict[str, object]]:
    with open_at(tmp_path / "old") as store:
        prepare(store, one)
        old = state(store)
    with open_at(fresh(tmp_path, -1)) as store:
        operation(store, two)
        return old, state(store)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("fault", [Dying, Failing, Full, Interrupted])
def test_old_or_new_after_every_step(
    tmp_path: Path, one: str, two: str, name: str, fault: type[Dying], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = old_and_new(tmp_path, one, two, OPERATIONS[name])
    assert (new == old) == (name == "empty the trash")
    for steps in range(1000):
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
    old, new = old_and_new(tmp_path, one, two, OPERATIONS[name])
    done = False
    for steps in range(1000):
        with open_at(fresh(tmp_path, steps)) as store, monkeypatch.context() as patch:
            patch.setattr(durable, "disk", fault(steps))
            with contextlib.suppress(OSError, KeyboardInterrupt):
                OPERATIONS[name](store, two)
                done = True
            assert state(store) in (old, new), f"after {steps} steps"
            assert check(store) == [], f"after {steps} steps"
        if done:
            break


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
            patch.setattr(durable, "disk", Full(0))
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
            patch.setattr(durable, "disk", Dying(steps))
            with contextlib.suppress(Crash):
                open_at(place).close()
                break
        with open_at(place) as store:
            assert check(store) == []
    assert steps > 20


@pytest.mark.parametrize("name", ["create with a name", "import", "set metadata with a name"])
def test_a_killed_process_leaves_its_locks_to_none(tmp_path: Path, one: str, two: str, name: str) -> None:
    class Killed(Dying):
        def step(self) -> None:
            if self.left == 0:
                os._exit(9)
            self.left -= 1

    with open_at(tmp_path) as store:
        prepare(store, one)
    for steps in range(3, 30, 3):
        pid = os.fork()
        if pid == 0:
            with open_at(tmp_path) as store:
                durable.disk = Killed(steps)
                OPERATIONS[name](store, two)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        with open_at(tmp_path) as store:
            assert check(store) == []
            assert os.listdir(tmp_path / "store/tmp") == []
        if os.waitstatus_to_exitcode(status) == 0:
            return
        assert os.waitstatus_to_exitcode(status) == 9
