"""The OCI layout of a store: how blobs come in, and what a new index.json does."""

import gc
import hashlib
import json
import os
import tracemalloc
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from rig.tinyimages import make_layout
from rig.treeshell import TreeShell

from fusestore import errors, oci
from fusestore.check import check
from fusestore.inodes import Caller, Changes, run
from fusestore.store import Store
from fusestore.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE

BLOBS = "views/oci/blobs/sha256"
INDEX = "views/oci/index.json"
NAME = "org.opencontainers.image.ref.name"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", tmp_path / "run", create=True) as store:
        make_layout(tmp_path / "app", "app", [{"a": b"1"}])
        store.import_image(f"oci:{tmp_path}/app")
        yield store


@pytest.fixture
def shell(store: Store) -> Iterator[TreeShell]:
    yield TreeShell(store)
    # Files that are still there have descriptors, which tests after these would see closed.
    gc.collect()


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A layout with an image called other, of two layers."""
    make_layout(tmp_path / "other", "other", [{"b": b"2"}, {"c": b"3"}])
    return tmp_path / "other"


def _name(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _index(shell: TreeShell) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(shell.read(INDEX))
    return found


def _put_blobs(shell: TreeShell, layout: Path) -> None:
    for blob in (layout / "blobs/sha256").iterdir():
        shell.write(f"{BLOBS}/{blob.name}", blob.read_bytes())


def _descriptor(layout: Path, name: str | None) -> dict[str, Any]:
    (found,) = json.loads((layout / "index.json").read_text())["manifests"]
    return {**found, "annotations": {} if name is None else {NAME: name}}


def _put_index(shell: TreeShell, *more: dict[str, Any]) -> None:
    index = _index(shell)
    index["manifests"] += more
    shell.write(INDEX, json.dumps(index).encode())


def test_an_image_comes_in_by_its_blobs_and_the_index(shell: TreeShell, store: Store, other: Path) -> None:
    _put_blobs(shell, other)
    assert store.image_names().keys() == {"app", "default"}
    _put_index(shell, _descriptor(other, "localhost/other:1"))
    assert store.image_names().keys() == {"app", "default", "localhost/other:1"}
    assert shell.exists("images/localhost/other:1")


def test_an_image_may_come_without_a_name(shell: TreeShell, store: Store, other: Path) -> None:
    _put_blobs(shell, other)
    _put_index(shell, _descriptor(other, None))
    assert [image.names for image in store.images()] == [("app", "default"), ()]


def test_the_first_image_may_have_a_name_below_default(tmp_path: Path, other: Path) -> None:
    with Store.open(tmp_path / "empty", tmp_path / "run", create=True) as store:
        shell = TreeShell(store)
        _put_blobs(shell, other)
        _put_index(shell, _descriptor(other, "default/1"))
        assert store.image_names().keys() == {"default/1"}


def test_what_is_in_an_image_is_no_longer_held_here(shell: TreeShell, store: Store, other: Path) -> None:
    _put_blobs(shell, other)
    blob = f"{BLOBS}/{_name(next((other / 'blobs/sha256').iterdir()).read_bytes())}"
    shell.unlink(blob)
    with pytest.raises(errors.NotFound):
        shell.stat(blob)
    _put_blobs(shell, other)
    _put_index(shell, _descriptor(other, "other"))
    with pytest.raises(errors.ReadOnly):
        shell.unlink(blob)


def test_a_platforms_image_of_an_index_comes_in(shell: TreeShell, store: Store, other: Path) -> None:
    _put_blobs(shell, other)
    inner = json.dumps({"schemaVersion": 2, "manifests": [_descriptor(other, None)]}).encode()
    shell.write(f"{BLOBS}/{_name(inner)}", inner)
    media_type = "application/vnd.oci.image.index.v1+json"
    _put_index(shell, {"mediaType": media_type, "digest": f"sha256:{_name(inner)}", "size": len(inner),
                       "annotations": {NAME: "many"}})  # fmt: skip
    assert "many" in store.image_names()


def test_a_name_moves_and_goes_by_the_index(shell: TreeShell, store: Store, other: Path) -> None:
    store.import_image(f"oci:{other}")
    index = _index(shell)
    kept = [one for one in index["manifests"] if one["annotations"][NAME] != "default"]
    (moved,) = (one for one in kept if one["annotations"][NAME] == "app")
    moved["digest"], moved["size"] = (
        next(one[key] for one in kept if one is not moved) for key in ("digest", "size")
    )
    shell.write(INDEX, json.dumps({**index, "manifests": kept}).encode())
    ids = [image.id for image in store.images()]
    assert len(ids) == 2
    assert store.image_names() == {"app": store.image("other").id, "other": store.image("other").id}


@pytest.mark.parametrize("missing", range(4))
def test_an_index_is_refused_where_a_blob_is_missing(
    shell: TreeShell, store: Store, other: Path, missing: int
) -> None:
    before = store.image_names()
    _put_blobs(shell, other)
    shell.unlink(f"{BLOBS}/{sorted(os.listdir(other / 'blobs/sha256'))[missing]}")
    with pytest.raises(errors.BadInput):
        _put_index(shell, _descriptor(other, "other"))
    assert store.image_names() == before


@pytest.mark.parametrize("lost", range(4))
def test_an_image_that_lost_a_blob_has_it_again(
    shell: TreeShell, store: Store, other: Path, lost: int
) -> None:
    store.import_image(f"oci:{other}")
    blob = Path(store.path, "blobs/sha256", sorted(os.listdir(other / "blobs/sha256"))[lost])
    blob.unlink()
    store.forget_images()
    _put_blobs(shell, other)
    _put_index(shell, _descriptor(other, "again"))
    assert blob.exists()
    assert store.image("again").names == store.image("other").names
    assert check(store) == []


@pytest.mark.parametrize(
    "second",
    [{"digest": f"sha256:{'0' * 64}"}, {"annotations": {NAME: "no name"}}],
    ids=["missing", "without a name that may be"],
)
def test_an_index_that_fails_moves_no_name(
    shell: TreeShell, store: Store, other: Path, tmp_path: Path, second: dict[str, Any]
) -> None:
    make_layout(tmp_path / "third", "third", [{"d": b"4"}])
    before = store.image_names()
    _put_blobs(shell, other)
    _put_blobs(shell, tmp_path / "third")
    index = _index(shell)
    index["manifests"] = [
        *(one for one in index["manifests"] if one["annotations"][NAME] != "app"),
        _descriptor(other, "app"),
        {**_descriptor(tmp_path / "third", "third"), **second},
    ]
    with pytest.raises(errors.BadInput):
        shell.write(INDEX, json.dumps(index).encode())
    assert store.image_names() == before


def test_a_blob_with_another_digest_is_refused_and_gone(shell: TreeShell) -> None:
    path = f"{BLOBS}/{_name(b'right')}"
    with pytest.raises(errors.WrongDigest):
        shell.write(path, b"wrong")
    assert not shell.exists(path)
    shell.write(path, b"right")
    assert shell.read(path) == b"right"


def test_a_blob_that_is_changed_afterwards_is_none(shell: TreeShell) -> None:
    path = f"{BLOBS}/{_name(b'right')}"
    shell.write(path, b"right")
    with pytest.raises(errors.WrongDigest):
        shell.write(path, b"wrong", os.O_WRONLY | os.O_APPEND)
    assert not shell.exists(path)


def test_a_file_becomes_a_blob_with_the_right_digest(shell: TreeShell) -> None:
    shell.mkdir("views/oci/work")
    shell.write("views/oci/work/file", b"data")
    with pytest.raises(errors.WrongDigest):
        shell.rename("views/oci/work/file", f"{BLOBS}/{_name(b'other')}")
    shell.rename("views/oci/work/file", f"{BLOBS}/{_name(b'data')}")
    assert shell.read(f"{BLOBS}/{_name(b'data')}") == b"data"
    shell.rmdir("views/oci/work")
    assert shell.ls("views/oci") == ["blobs", "index.json", "oci-layout"]


@pytest.mark.parametrize("is_closed", [False, True], ids=["still open", "closed"])
def test_what_is_written_while_it_is_hashed_becomes_no_blob(shell: TreeShell, is_closed: bool) -> None:
    path = f"{BLOBS}/{_name(b'right')}"
    shell.write("views/oci/file", b"right")
    with shell.walk("views/oci") as root, shell.walk(BLOBS) as blobs:
        to = (blobs.node.ino, os.path.basename(path).encode())
        renaming = shell.tree.rename(root.node.ino, b"file", *to, 0)
        assert isinstance(renaming, Generator)
        digest = next(renaming)()
        fh = shell.open("views/oci/file", os.O_WRONLY)
        run(shell.tree.write(fh, 0, b"wrong"))
        if is_closed:
            shell.close(fh)
        with pytest.raises(errors.Busy):
            renaming.send(digest)
    if not is_closed:
        shell.close(fh)
    assert not shell.exists(path)
    assert shell.read("views/oci/file") == b"wrong"


def test_a_file_is_like_others(shell: TreeShell) -> None:
    shell.write("views/oci/a", b"data")
    shell.write("views/oci/a", b" and more", os.O_WRONLY | os.O_APPEND)
    assert shell.setattr("views/oci/a", Changes(mode=0o600, mtime_ns=5)).mtime_ns == 5
    shell.rename("views/oci/a", "views/oci/b")
    assert (shell.read("views/oci/b"), shell.stat("views/oci/b").mode & 0o777) == (b"data and more", 0o600)
    shell.write("views/oci/c", b"")
    with pytest.raises(errors.Exists):
        shell.rename("views/oci/c", "views/oci/b", RENAME_NOREPLACE)
    with pytest.raises(errors.NotPermitted):
        shell.rename("views/oci/c", "views/oci/b", RENAME_EXCHANGE)
    shell.unlink("views/oci/b")
    shell.unlink("views/oci/c")
    assert shell.ls("views/oci") == ["blobs", "index.json", "oci-layout"]


def test_oci_layout_can_be_written_as_it_is_only(shell: TreeShell) -> None:
    shell.write("views/oci/oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
    with pytest.raises(errors.BadSource):
        shell.write("views/oci/oci-layout", b'{"imageLayoutVersion": "2.0.0"}')


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda shell: shell.write("views/oci/blobs/x", b""), errors.NotPermitted),
        (lambda shell: shell.write(f"{BLOBS}/x", b""), errors.NotPermitted),
        (lambda shell: shell.mkdir("views/oci/blobs/sha512"), errors.NotPermitted),
        (lambda shell: shell.rmdir(BLOBS), errors.NotEmpty),
        (lambda shell: shell.unlink(INDEX), errors.ReadOnly),
        (lambda shell: shell.write(INDEX, b"", os.O_WRONLY), errors.ReadOnly),
        (lambda shell: shell.setattr(INDEX, Changes(size=0)), errors.ReadOnly),
        (lambda shell: shell.setattr(INDEX, Changes(mode=0)), errors.NotPermitted),
        (lambda shell: shell.rename(INDEX, "views/oci/x"), errors.ReadOnly),
        (lambda shell: shell.symlink("x", "views/oci/x"), errors.ReadOnly),
    ],
)
def test_what_cannot_be_done(shell: TreeShell, change: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        change(shell)


def test_so_many_files_are_too_many(shell: TreeShell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusestore.ociview._STAGED_MAX", 4)
    shell.write("views/oci/a", b"")
    with pytest.raises(errors.NoSpace):
        for number in range(5):
            shell.write(f"views/oci/{number}", b"")


def test_nothing_written_here_has_a_name_on_disk(shell: TreeShell, store: Store) -> None:
    shell.write("views/oci/a", b"data")
    assert not list(Path(store.path, "tmp").iterdir())


def test_a_process_undoes_no_name_that_it_never_saw(shell: TreeShell, store: Store) -> None:
    caller = Caller(uid=0, gid=0, pid=os.getpid(), umask=0o022)
    before = json.loads(_read_as(shell, caller))
    store.tag("app", "others")
    store.untag("default")
    before["manifests"] = [one for one in before["manifests"] if one["annotations"][NAME] != "app"]
    before["manifests"].append({**before["manifests"][0], "annotations": {NAME: "mine"}})
    _write_as(shell, caller, json.dumps(before).encode())
    assert store.image_names().keys() == {"mine", "others"}


def test_a_process_takes_away_what_it_wrote_itself_only(shell: TreeShell, store: Store) -> None:
    caller = Caller(uid=0, gid=0, pid=os.getpid(), umask=0o022)
    before = json.loads(_read_as(shell, caller))
    mine = {**before["manifests"][0], "annotations": {NAME: "mine"}}
    _write_as(shell, caller, json.dumps({**before, "manifests": [*before["manifests"], mine]}).encode())
    store.tag("app", "others")
    _write_as(shell, caller, json.dumps(before).encode())
    assert store.image_names().keys() == {"app", "default", "others"}


def test_what_one_process_read_another_may_write(shell: TreeShell, store: Store) -> None:
    before = _read_as(shell, Caller(uid=0, gid=0, pid=os.getpid(), umask=0o022))
    store.tag("app", "others")
    _write_as(shell, Caller(uid=0, gid=0, pid=os.getppid(), umask=0o022), before)
    assert store.image_names().keys() == {"app", "default", "others"}


def test_the_index_is_encoded_once(shell: TreeShell, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    before = shell.read(INDEX)
    with monkeypatch.context() as patched:
        patched.setattr(oci, "encode", _fail)
        assert shell.read(INDEX) == before
    store.tag("app", "more")
    assert shell.read(INDEX) != before


def _fail(*_: object) -> bytes:
    raise AssertionError("encoded again")


def test_what_is_too_long_for_oci_layout_is_not_read(shell: TreeShell) -> None:
    shell.write("views/oci/file", b"{}")
    shell.setattr("views/oci/file", Changes(size=200 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(errors.BadSource):
            shell.rename("views/oci/file", "views/oci/oci-layout")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("path", ["images", "views/oci", BLOBS, "views/podman", "views/podman/overlay"])
def test_without_its_index_a_store_is_damaged(shell: TreeShell, store: Store, path: str) -> None:
    with shell.walk(path) as entry:
        Path(store.path, "index.json").unlink()
        with pytest.raises(errors.StoreDamaged):
            run(shell.tree.getattr(entry.node.ino))


def _read_as(shell: TreeShell, caller: Caller) -> bytes:
    with shell.walk(INDEX) as entry:
        fh, _ = run(shell.tree.open(entry.node.ino, os.O_RDONLY, caller))
        data = run(shell.tree.read(fh, 0, 1 << 20))
        run(shell.tree.release(fh))
    return data


def _write_as(shell: TreeShell, caller: Caller, data: bytes) -> None:
    with shell.walk(INDEX) as entry:
        fh, _ = run(shell.tree.open(entry.node.ino, os.O_WRONLY | os.O_TRUNC, caller))
        run(shell.tree.write(fh, 0, data))
        run(shell.tree.flush(fh))
        run(shell.tree.release(fh))
