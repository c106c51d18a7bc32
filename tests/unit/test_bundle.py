"""Where a bundle takes what it says from: the image's config, and files of the container's rootfs."""

import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rig.ocisources import SourceMaker, tar_of

from fusestore import bundle
from fusestore.bundle import write_bundle
from fusestore.errors import BadInput, Exists, NotFound
from fusestore.store import Store

_PASSWD = b"app:x:1000:100::/:\n"
_SETTINGS = {"User": "app", "Cmd": ["/bin/sh"]}


@pytest.fixture
def live(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The store, said to be mounted at /mnt, of root."""
    monkeypatch.setattr(bundle.os, "geteuid", lambda: 0)
    with store.record_mount("/mnt", os.getpid(), "union"):
        yield store


def _container(
    store: Store,
    tmp_path: Path,
    files: dict[str, bytes],
    links: dict[str, str] | None = None,
    settings: object = _SETTINGS,
) -> None:
    """The container `c` of an image with these, whose user is `app` if nothing else is said."""
    maker = SourceMaker()
    made = maker.image([tar_of(files, links)], {"config": settings})
    store.import_image(maker.add(made, "app").directory(tmp_path / "image"))
    store.create_container("app", container_id="c", container_name="name")


def _written(store: Store, tmp_path: Path) -> dict[str, Any]:
    write_bundle(store, "c", str(tmp_path / "bundle"), [])
    spec: dict[str, Any] = json.loads((tmp_path / "bundle/config.json").read_text())
    return spec


def test_it_names_the_rootfs_in_the_mount(live: Store, tmp_path: Path) -> None:
    _container(live, tmp_path, {"etc/passwd": _PASSWD})
    spec = _written(live, tmp_path)
    assert spec["root"] == {"path": "/mnt/containers/c/rootfs", "readonly": False}
    assert (spec["hostname"], spec["process"]["args"]) == ("name", ["/bin/sh"])


def test_making_one_enters_the_container_not(live: Store, tmp_path: Path) -> None:
    _container(live, tmp_path, {"etc/passwd": _PASSWD})
    _written(live, tmp_path)
    assert not os.path.exists(live.upper_dir("c"))


@pytest.mark.parametrize(
    ("where", "links"),
    [
        ("etc/passwd", {}),
        ("usr/etc/passwd", {"etc": "usr/etc"}),
        ("usr/etc/passwd", {"etc": "/usr/etc"}),
        ("usr/passwd", {"etc/passwd": "../usr/./passwd"}),
        ("usr/passwd", {"etc/passwd": "../../../../usr/passwd"}),
        ("usr/passwd", {"etc/passwd": "/there", "there": "usr//passwd"}),
    ],
)
def test_links_stay_in_the_rootfs(live: Store, tmp_path: Path, where: str, links: dict[str, str]) -> None:
    _container(live, tmp_path, {where: _PASSWD}, links)
    assert _written(live, tmp_path)["process"]["user"]["uid"] == 1000


@pytest.mark.parametrize(
    ("files", "links", "said"),
    [
        ({}, {}, "is not in its /etc/passwd"),
        ({}, {"etc/passwd": "../../../../../../../../../../../../../../etc/passwd"}, "loop of links"),
        ({}, {"etc/passwd": "/etc/passwd"}, "loop of links"),
        ({"etc": b""}, {}, "is not in its /etc/passwd"),
        ({"etc/passwd/x": b""}, {}, "is no file"),
    ],
)
def test_what_is_no_passwd_is_refused(
    live: Store, tmp_path: Path, files: dict[str, bytes], links: dict[str, str], said: str
) -> None:
    _container(live, tmp_path, files, links)
    with pytest.raises(BadInput, match=said):
        _written(live, tmp_path)
    assert not (tmp_path / "bundle").exists()


def test_what_is_no_config_is_refused(live: Store, tmp_path: Path) -> None:
    _container(live, tmp_path, {"etc/passwd": _PASSWD}, settings={"Cmd": "sh"})
    with pytest.raises(BadInput, match="Cmd in the image's config is no list of texts"):
        write_bundle(live, "c", str(tmp_path / "bundle"), ["sh"])
    assert not (tmp_path / "bundle").exists()


def test_what_a_config_leaves_open_is_not_missed(live: Store, tmp_path: Path) -> None:
    nothing = dict.fromkeys(("User", "Entrypoint", "Cmd", "Env", "WorkingDir", "Labels"))
    _container(live, tmp_path, {}, settings={**nothing, "Cmd": ["sh"], "Volumes": "ignored"})
    assert _written(live, tmp_path)["process"]["args"] == ["sh"]


def test_a_plain_users_is_root_whoever_the_image_names(
    live: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _container(live, tmp_path, {})
    monkeypatch.setattr(bundle.os, "geteuid", lambda: 1000)
    spec = _written(live, tmp_path)
    assert spec["process"]["user"]["uid"] == 0
    assert spec["linux"]["uidMappings"][0]["hostID"] == 1000


def test_a_config_that_is_there_stays(live: Store, tmp_path: Path) -> None:
    _container(live, tmp_path, {"etc/passwd": _PASSWD})
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/config.json").write_text("mine")
    with pytest.raises(Exists, match="remove it"):
        write_bundle(live, "c", str(tmp_path / "bundle"), [])
    assert (tmp_path / "bundle/config.json").read_text() == "mine"


def test_half_a_config_is_not_left(live: Store, tmp_path: Path) -> None:
    _container(live, tmp_path, {"etc/passwd": _PASSWD})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_bundle(live, "c", str(tmp_path / "bundle"), [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path / "bundle") == []
    assert _written(live, tmp_path)


def test_without_a_mount_there_is_no_rootfs(store: Store, tmp_path: Path) -> None:
    _container(store, tmp_path, {})
    with pytest.raises(NotFound, match="fusestore mount"):
        write_bundle(store, "c", str(tmp_path / "bundle"), [])
