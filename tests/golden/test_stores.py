"""Whole stores that earlier commits wrote, as users have them: what today's code makes of them.

Each has two images, four tags, a container that nobody entered, and one with each kind of change. "first" was
written by 3c78a8a, for root, before stores had a file `scheme` and uppers said where their files came from;
"plain" by c651934, for a plain user.
"""

import io
import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from rig.requirements import need

from fusestore.check import check
from fusestore.drivers import snapshot
from fusestore.errors import FusestoreError, StoreUnusable
from fusestore.export import export_tree
from fusestore.store import Store

STORES = ("store-1-first", "store-1-plain")
IMAGE = "faaccc422d507304401133bd67b9cbbb513c51be8aa892565a51aa055aa3c154"
BASE = "b428313a0be3f6071bee58994743f4f4a8a7fa9ee72f36df794ffbb597118466"
XATTR = "SCHILY.xattr."


def _unpack(name: str, place: Path) -> Path:
    """With xattrs, which tarfile leaves out, and as root with owners."""
    is_root = os.geteuid() == 0
    need("root", is_root or "plain" in name, "only root can have root's store")
    with tarfile.open(Path(__file__).with_name(f"{name}.tar.xz")) as tar:
        tar.extraction_filter = lambda member, path: member
        for member in tar:
            tar.extract(member, place, numeric_owner=True)
            for key, value in member.pax_headers.items():
                if key.startswith(XATTR):
                    attribute = key.removeprefix(XATTR)
                    os.setxattr(place / member.name, attribute, value.encode(), follow_symlinks=False)
    return place / "store"


@pytest.fixture(params=STORES)
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return _unpack(request.param, tmp_path)


def _open(root: Path) -> Store:
    return Store.open(root, root.parent / "run")


def _files(root: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in root.rglob("*"):
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else None
        found[str(path.relative_to(root))] = (status.st_mode, status.st_uid, status.st_size, content)
    return found


def test_it_is_whole_and_nothing_in_it_has_to_change(root: Path) -> None:
    before = _files(root)
    with _open(root) as store:
        assert check(store) == []
    assert _files(root) == before


def test_its_images_and_containers(root: Path) -> None:
    with _open(root) as store:
        assert {image.id: sorted(image.names) for image in store.images()} == {
            IMAGE: ["default", "localhost/golden:1"],
            BASE: ["again", "base"],
        }
        assert sorted(store.container_ids()) == ["changed", "untouched"]
        assert store.container_names() == {"web": "untouched"}
        document = store.get_container_metadata("web")
        assert (document["id"], document["image-id"], document["mine"]) == ("untouched", IMAGE, [1, "é"])


UNCHANGED = {
    "etc/hostname": b"golden\n", "hard": b"golden\n", "d/a": b"a", "d/sub/b": b"b", "second": b"second\n",
    "big": bytes(range(256)) * 400, "full/x": b"x", "link": "etc/hostname",
}  # fmt: skip
CHANGED = {
    "etc/hostname": b"golden\nchanged\n", "hard": b"golden\nchanged\n", "moved/a": b"a", "moved/sub/b": b"b",
    "second": b"second\n", "new/file": b"new\n", "full/y": b"y\n", "sym": "target",
}  # fmt: skip


def _tar(store: Store, container_id: str) -> tuple[list[tarfile.TarInfo], dict[str, bytes | str]]:
    output = io.BytesIO()
    with snapshot(store, container_id) as tree:
        export_tree(tree, output.write)
    output.seek(0)
    content: dict[str, bytes | str] = {}
    with tarfile.open(fileobj=output) as tar:
        members = tar.getmembers()
        for member in members:
            if member.issym():
                content[member.name.removeprefix("./")] = member.linkname
            elif member.isfile() or member.islnk():
                file = tar.extractfile(member)
                assert file is not None
                content[member.name.removeprefix("./")] = file.read()
    return members, content


@pytest.mark.parametrize(("container", "expected"), [("untouched", UNCHANGED), ("changed", CHANGED)])
def test_its_trees(root: Path, container: str, expected: dict[str, object]) -> None:
    with _open(root) as store:
        assert _tar(store, container)[1] == expected


def test_owners_modes_and_xattrs(root: Path) -> None:
    with _open(root) as store:
        members = {member.name.removeprefix("./"): member for member in _tar(store, "changed")[0]}
    hostname, second = members["etc/hostname"], members["second"]
    assert (hostname.uid, hostname.gid) == (3, 4)
    assert second.mode == 0o600
    found = {key: value for key, value in second.pax_headers.items() if key.startswith(XATTR)}
    assert found == {f"{XATTR}user.k": "v", f"{XATTR}user.mine": "1"}


def test_what_is_derived_can_go_and_comes_back(root: Path) -> None:
    for path in (*root.glob("layers/*/*"), *root.glob("images/*/image")):
        path.unlink()
    with _open(root) as store:
        assert len(store.images()) == 2
        assert _tar(store, "changed")[1] == CHANGED
        assert check(store) == []


def _write(name: str, text: str) -> Callable[[Path], None]:
    def do(root: Path) -> None:
        (root / name).write_text(text)

    return do


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a version to come": (
        _write("fusestore.json", '{"format":"fusestore","version":2,"features":[]}'),
        "{root} is a store of version 2, this fusestore knows 1: upgrade fusestore",
    ),
    "a version there never was": (
        _write("fusestore.json", '{"format":"fusestore","version":0,"features":[]}'),
        "{root} is a store of version 0, this fusestore knows 1: upgrade fusestore",
    ),
    "a feature to come": (
        _write("fusestore.json", '{"format":"fusestore","version":1,"features":["holograms"]}'),
        "{root} uses holograms, unknown to this fusestore: upgrade fusestore",
    ),
    "a damaged fusestore.json": (
        _write("fusestore.json", '{"format":"fusestore"'),
        "{root}/fusestore.json is damaged: restore it from a backup, or import the images into a new store",
    ),
    "no fusestore.json": (
        lambda root: (root / "fusestore.json").unlink(),
        "there is no store at {root}: make one with `fusestore import`, or name another with --store",
    ),
    "a damaged index.json": (
        _write("index.json", '{"schemaVersion":2'),
        "{root}/index.json is damaged (",
    ),
    "a scheme that is none": (
        _write("scheme", "both\n"),
        "{root}/scheme says neither native nor plain: write into it which one the store is",
    ),
}
"""What is done to a store, and how the line begins that refuses it (fusestore/layout.py)."""


def _use(root: Path) -> None:
    with _open(root) as store:
        store.images()
        with snapshot(store, "changed"):
            pass


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_and_in_which_words(tmp_path: Path, what: str) -> None:
    change, line = REFUSED[what]
    root = _unpack("store-1-plain", tmp_path)
    change(root)
    before = _files(root)
    with pytest.raises(FusestoreError) as raised:
        _use(root)
    assert str(raised.value).startswith(line.format(root=root))
    assert isinstance(raised.value, StoreUnusable) or "index" in what
    assert _files(root) == before
