"""Containers: making, names, locks, documents, deleting."""

import contextlib
import errno
import fcntl
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusestore import durable
from fusestore.errors import (
    BadDocument,
    BadInput,
    BadName,
    Busy,
    Exists,
    Locked,
    NotFound,
    NotPermitted,
)
from fusestore.layout import Layout
from fusestore.store import Store

pytestmark = pytest.mark.usefixtures("unsynced")


def test_default_places_and_modes(store: Store) -> None:
    info = store.create_container(container_id="c")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in info.dir.parent.iterdir()}
    assert modes == {"container": 0o600, "work": 0o700, "workdir": 0o700}
    assert (store.work_dir("c"), store.run_dir("c")) == (info.dir, info.run_dir)


def test_an_id_made_at_random(store: Store) -> None:
    info = store.create_container()
    assert len(info.id) == 64
    assert store.container_ids() == [info.id]


def test_a_container_of_the_default_image(store: Store, one: str) -> None:
    image = store.import_image(one)
    info = store.create_container()
    assert store.container(info.id).image_id == image.id
    assert store.container(info.id).image_name == "one"
    assert info.config["architecture"] == "amd64"


def test_without_an_image_it_is_unbound(store: Store) -> None:
    info = store.create_container(container_id="c")
    assert (store.container("c").image_id, info.config) == ("", {})


@pytest.mark.parametrize("ref", [{"image_name": "none"}, {"image_id": "0" * 64}])
def test_a_missing_image_makes_no_container(store: Store, ref: dict[str, str]) -> None:
    with pytest.raises(NotFound):
        store.create_container(**ref)
    assert store.container_ids() == []


def test_name_and_id_of_an_image_must_agree(store: Store, one: str, two: str) -> None:
    store.import_image(one)
    image = store.import_image(two)
    with pytest.raises(BadInput, match="is not image-id"):
        store.create_container(image_name="one", image_id=image.id)


@pytest.mark.parametrize("nothing", ["", None])
def test_what_is_empty_is_not_given(store: Store, nothing: str | None) -> None:
    info = store.create_container(container_id=nothing, container_name=nothing, mount_label=nothing)
    assert len(info.id) == 64
    assert (store.container(info.id).name, store.container(info.id).mountlabel) == (info.id, "")


def test_the_digest_of_a_config_is_an_id(store: Store, one: str) -> None:
    image = store.import_image(one)
    for ref in (image.config, image.config[:19]):
        info = store.create_container(image_id=ref)
        assert store.container(info.id).image_id == image.id


def test_a_create_that_is_interrupted_at_its_end_leaves_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store._mounts, "announce", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.create_container(container_name="web")
    assert (store.container_ids(), store.container_names()) == ([], {})


@pytest.mark.parametrize("kwargs", [{"container_id": "a/b"}, {"container_name": ".x"}])
def test_bad_names(store: Store, kwargs: dict[str, str]) -> None:
    with pytest.raises(BadName):
        store.create_container(**kwargs)


def test_a_bad_label(store: Store) -> None:
    with pytest.raises(BadDocument):
        store.create_container(mount_label="a\0b")


@pytest.mark.parametrize(
    "kwargs",
    [
        {"container_id": "c"},
        {"container_id": "web"},
        {"container_name": "c"},
        {"container_name": "web"},
        {"container_id": "d", "container_name": "web"},
    ],
)
def test_ids_and_names_are_one_space(store: Store, kwargs: dict[str, str]) -> None:
    store.create_container(container_id="c", container_name="web")
    with pytest.raises(Exists):
        store.create_container(**kwargs)
    assert store.container_ids() == ["c"]


def test_a_dangling_name_is_free(store: Store) -> None:
    os.symlink("../containers/gone", Path(store.path, "names/web"))
    store.create_container(container_id="c", container_name="web")
    assert store.container_names() == {"web": "c"}


def test_by_name(store: Store) -> None:
    store.create_container(container_id="c", container_name="web")
    assert store.container_id("web") == "c"
    assert store.get_container_metadata("web")["name"] == "web"
    store.delete_container("web")
    assert store.container_ids() == []


@pytest.mark.parametrize("ref", ["none", "", "a/b", "..", "\udcff", None])
def test_no_such_container(store: Store, ref: Any) -> None:
    for operation in (
        store.container,
        store.delete_container,
        store.hold,
        store.stop_container,
        store.run_dir,
    ):
        with pytest.raises(NotFound):
            operation(ref)


def test_renaming_the_id_of_a_container_takes_its_name_along(store: Store) -> None:
    store.create_container(container_id="c", container_name="web")
    store.rename_container("c", "d")
    assert store.container_names() == {"web": "d"}
    assert store.container("web").id == "d"


def test_renaming_to_what_is_taken(store: Store) -> None:
    store.create_container(container_id="a", container_name="x")
    store.create_container(container_id="b", container_name="y")
    for old, new in (("a", "b"), ("a", "y"), ("x", "y"), ("x", "b"), ("a", "x")):
        with pytest.raises(Exists):
            store.rename_container(old, new)


def test_a_deleted_container_leaves_nothing_in_its_run_directory(store: Store) -> None:
    store.create_container(container_id="c")
    (store.run_dir("c") / "file").touch()
    store.delete_container("c")
    store.create_container(container_id="c")
    assert list(store.run_dir("c").iterdir()) == []


def test_anything_can_be_deleted(store: Store) -> None:
    store.create_container(container_id="c")
    fd = os.open(Layout(store.path).container("c"), os.O_RDONLY)
    for _ in range(1100):
        os.mkdir("d" * 200, dir_fd=fd)
        inner = os.open("d" * 200, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.fchmod(fd, 0)
    os.close(fd)
    store.delete_container("c")
    store.empty_trash()
    assert os.listdir(Path(store.path, "trash")) == []


# Locks


def test_a_held_container_cannot_be_deleted_renamed_or_bound(store: Store, one: str) -> None:
    store.create_container(container_id="c")
    store.import_image(one)
    with store.hold("c"), store.hold("c"):
        for operation in (
            lambda: store.delete_container("c"),
            lambda: store.rename_container("c", "d"),
            lambda: store.set_container_metadata("c", {"image-name": "one"}),
        ):
            with pytest.raises(Busy, match="in use"):
                operation()
        store.set_container_metadata("c", {"a": 1, "name": "web"})
    store.delete_container("c")


def test_a_started_container_cannot_be_deleted_or_renamed(store: Store) -> None:
    store.create_container(container_id="c")
    store.set_container_metadata("c", {"mounted": True})
    for operation in (
        lambda: store.delete_container("c"),
        lambda: store.rename_container("c", "d"),
        lambda: store.set_container_metadata("c", {"name": "web"}),
    ):
        with pytest.raises(Busy, match="started"):
            operation()
    store.stop_container("c")
    store.delete_container("c")


def test_whoever_holds_the_names_makes_others_wait_and_then_give_up(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "LOCK_TIMEOUT_S", 0.05)
    fd = os.open(Path(store.path, "fusestore.lock"), os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(Busy, match="another process has held"):
        store.create_container()
    os.close(fd)
    store.create_container()


def test_containers_made_and_deleted_from_many_threads(store: Store) -> None:
    def work(number: int) -> None:
        for turn in range(5):
            with contextlib.suppress(Exists, NotFound):
                store.create_container(container_id=f"c{turn}", container_name=f"n{number}")
            with contextlib.suppress(NotFound, Busy):
                store.delete_container(f"c{turn}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(store.container_names().values()) <= set(store.container_ids())


# Metadata


def test_users_keys_come_back_in_order(store: Store) -> None:
    store.create_container(container_id="c")
    store.set_container_metadata("c", b'{"z": [1, {"b": 1, "a": 2}], "id": "c", "a": null}')
    text = store.document("c").decode()
    assert text.index('"z"') < text.index('"b"') < text.index('"a": 2') < text.index('"a": null')
    store.set_container_metadata("c", {"x": 1})
    assert "z" not in store.get_container_metadata("c")


@pytest.mark.parametrize(
    ("document", "error"),
    [
        (b"[]", BadDocument),
        (b"{", BadDocument),
        (b'{"mounted": 1}', BadDocument),
        (b'{"id": "d"}', NotPermitted),
        (b'{"name": "a/b"}', BadName),
        (b'{"name": "other"}', Exists),
        (b'{"image-name": "none"}', NotFound),
        ({"a": float("nan")}, BadInput),
        ({"a": b""}, BadInput),
        ({"a": [[0]] * 90_000}, BadDocument),
    ],
)
def test_a_refused_document_changes_nothing(store: Store, document: Any, error: type[Exception]) -> None:
    store.create_container(container_id="other")
    store.create_container(container_id="c")
    store.set_container_metadata("c", {"a": 1})
    before = store.document("c")
    with pytest.raises(error):
        store.set_container_metadata("c", document)
    assert store.document("c") == before


def test_binding(store: Store, one: str) -> None:
    store.create_container(container_id="c")
    image = store.import_image(one)
    store.set_container_metadata("c", {"image-name": "one"})
    assert store.container("c").image_id == image.id
    with pytest.raises(NotPermitted):
        store.set_container_metadata("c", {"image-id": "0" * 64})


def test_binding_by_the_beginning_of_an_id(store: Store, one: str) -> None:
    store.create_container(container_id="c")
    image = store.import_image(one)
    store.set_container_metadata("c", {"image-id": image.id[:12]})
    assert (store.container("c").image_id, store.container("c").image_name) == (image.id, "one")


def test_what_was_entered_cannot_be_bound(store: Store, one: str) -> None:
    store.create_container(container_id="c")
    store.import_image(one)
    Path(store.upper_dir("c")).mkdir()
    with pytest.raises(Busy, match="entered"):
        store.set_container_metadata("c", {"image-name": "one"})
    assert store.container("c").image_id == ""


@pytest.mark.parametrize(
    "change",
    [
        lambda store: store.set_container_metadata("c", {"a": 2}),
        lambda store: store.set_container_metadata("c", {"a": 1, "mounted": True}),
        lambda store: store.rename_container("web", "db"),
        lambda store: (
            store.delete_container("c"),
            store.create_container(container_id="c", container_name="web"),
        ),
    ],
)
def test_the_version_changes_with_the_document(store: Store, change: Callable[[Store], object]) -> None:
    store.create_container(container_id="c", container_name="web")
    store.set_container_metadata("c", {"a": 1})
    before = store.version("c")
    assert store.version("c") == before
    change(store)
    assert store.version("c") != before


def test_versions_of_quick_changes_are_all_different(store: Store) -> None:
    store.create_container(container_id="c")
    seen = set()
    for number in range(50):
        store.set_container_metadata("c", {"a": number % 2})
        seen.add(store.version("c"))
    assert len(seen) == 50


def test_the_same_document_again_is_not_written(store: Store) -> None:
    store.create_container(container_id="c")
    before = store.version("c")
    store.set_container_metadata("c", store.document("c"))
    assert store.version("c") == before


def test_many_containers_are_listed_from_names_alone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.create_container(container_id="c", container_name="web")

    def no_reading(*_: object) -> None:
        raise AssertionError("a document was read")

    with monkeypatch.context() as patch:
        patch.setattr("fusestore.containers.read_file", no_reading)
        assert (store.container_ids(), store.container_names()) == (["c"], {"web": "c"})


def test_ctrl_c_between_renames_leaves_names_right(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.create_container(container_id="c", container_name="known")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(store._containers), "_discard_run_locked", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.delete_container("c")
    assert (store.container_ids(), store.container_names()) == ([], {})


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.EIO])
def test_a_document_that_cannot_be_read_just_now_is_not_called_damaged(
    store: Store, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.create_container(container_id="c", container_name="web")

    def refuse(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("fusestore.containers.read_file", refuse)
        with pytest.raises(OSError) as caught:
            store.document("c")
        assert caught.value.errno == number
        store.delete_container("c")
    assert (store.container_ids(), store.container_names()) == ([], {})


def test_holding_what_another_process_changes_waits_for_nobody(store: Store) -> None:
    store.create_container(container_id="c")
    fd = durable.lock_directory(Layout(store.path).container("c"), fcntl.LOCK_EX)
    assert fd is not None
    with pytest.raises(Locked):
        store.hold("c")
    os.close(fd)
    store.hold("c").close()
