"""/views on a real mount: the store as podman and others of its kin want it, by the real programs."""

import hashlib
import json
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rig.images import Images
from rig.mounts import Mount, wait_until
from rig.people import as_root
from rig.podman import Podman, podman_of
from rig.snapshot import Entry, differences, snapshot

pytestmark = [pytest.mark.mounted, pytest.mark.images]

IMAGES = ("busybox", "debian", "corners")


def _json(mount: Mount, path: str) -> Any:
    return json.loads(mount.sh("cat $1", path).ok())


def test_views_shows_what_there_is(mounted: Mount) -> None:
    assert mounted.sh("ls views").ok().split() == ["podman"]


@pytest.mark.parametrize(
    "command",
    [
        "touch views/x",
        "touch views/podman/x",
        "mkdir views/podman/overlay/x",
        "rm views/podman/overlay-images/images.lock",
        "> views/podman/overlay-images/images.lock",
    ],
)
def test_nothing_else_can_be_made_or_changed_there(mounted: Mount, command: str) -> None:
    result = mounted.sh(command)
    assert result.code != 0
    assert "Operation not permitted" in result.err or "Read-only file system" in result.err


# /views/podman


@pytest.fixture
def podman(mounted: Mount) -> Iterator[Podman]:
    with podman_of(mounted.person, mounted.mountpoint / "views/podman") as podman:
        yield podman


def test_all_of_the_view_can_be_listed_and_read(mounted: Mount) -> None:
    mounted.sh("cd views/podman; ls -l . overlay* overlay/* overlay/*/diff overlay-images/*").ok()
    mounted.sh("cd views/podman; cat overlay-*/*.* overlay-images/*/* overlay/*/link overlay/*/lower").ok()


def test_a_tar_split_is_as_long_as_stat_says(mounted: Mount) -> None:
    sizes = mounted.sh("cd views/podman/overlay-layers; for f in *.gz; do stat -c %s $f; wc -c < $f; done")
    lines = sizes.ok().split()
    assert lines[::2] == lines[1::2] and len(lines) == 8


@pytest.mark.parametrize("image", IMAGES)
def test_each_layer_is_there_once_with_its_digests(mounted: Mount, image: str) -> None:
    store = mounted.sh("cat views/podman/overlay-images/images.json").ok()
    entry = next(one for one in json.loads(store) if f"localhost/{image}:latest" in one["names"])
    layers = {one["id"]: one for one in _json(mounted, "views/podman/overlay-layers/layers.json")}
    found, layer = [], layers[entry["layer"]]
    while layer is not None:
        found.append((layer["diff-digest"], layer["compressed-diff-digest"], layer["diff-size"]))
        layer = layers.get(layer["parent"])
    shown = _json(mounted, f"images/{image}/metadata.json")
    sizes = mounted.sh("stat -c %s images/$1/layers/*/tar", image).ok().split()
    expected = [
        (one["diff-id"], one["digest"], int(size)) for one, size in zip(shown["layers"], sizes, strict=True)
    ]
    assert found[::-1] == expected


@as_root
def test_podman_lists_every_image_of_the_store(podman: Podman) -> None:
    shown = json.loads(podman("images", "--format", "json").ok())
    names = {name for image in shown for name in image["Names"]}
    assert names == {f"localhost/{name}:latest" for name in (*IMAGES, "default")}
    assert all(image["ReadOnly"] for image in shown)


@as_root
def test_podman_inspects_an_image(mounted: Mount, podman: Podman) -> None:
    (shown,) = json.loads(podman("inspect", "debian").ok())
    config = _json(mounted, "images/debian/config.json")
    assert shown["Id"] == _json(mounted, "images/debian/metadata.json")["id"]
    assert shown["Config"]["Cmd"] == config["config"]["Cmd"]
    assert shown["RootFS"]["Layers"] == config["rootfs"]["diff_ids"]


@as_root
@pytest.mark.parametrize("directory", ["lower", "upper", "corner"])
def test_podman_mounts_the_tree_of_the_image(
    mounted: Mount, images: Images, podman: Podman, directory: str
) -> None:
    root = podman("mount", podman("create", "corners").ok().strip()).ok().strip()
    expected = snapshot(images.corners.reference / directory)
    found = mounted.person.call(snapshot, Path(root, directory))
    # What the kernel does not take for its own when root mounts, it shows.
    found = {path: _without(entry, "user.overlay.opaque") for path, entry in found.items()}
    # overlayfs counts no subdirectories, and links of one layer alone.
    assert not differences(expected, found, ignore=frozenset(("nlink", "group")))


def _without(entry: Entry, xattr: str) -> Entry:
    return replace(entry, xattrs=tuple(one for one in entry.xattrs if one[0] != xattr))


@as_root
def test_podman_runs_a_container_and_says_what_changed(podman: Podman) -> None:
    script = "echo hello > /etc/new; rm /bin/ls; cat /etc/new"
    assert podman.run("--name", "job", "busybox", "sh", "-c", script).ok() == "hello\n"
    changes = set(podman("diff", "job").ok().splitlines())
    assert {"C /bin", "D /bin/ls", "C /etc", "A /etc/new"} <= changes


@as_root
def test_podman_copies_nothing(podman: Podman) -> None:
    podman.run("debian", "true").ok()
    assert podman.stored() < 1 << 20


@as_root
@pytest.mark.parametrize("image", ["busybox", "corners"])
def test_podman_saves_an_image_with_the_digests_it_has(mounted: Mount, podman: Podman, image: str) -> None:
    archive = podman.base / "saved.tar"
    podman("save", "--quiet", "--format", "docker-archive", "--output", archive, image).ok()
    with tarfile.open(archive) as tar:
        (manifest,) = json.load(tar.extractfile("manifest.json"))  # type: ignore[arg-type]
        found = [
            "sha256:" + hashlib.file_digest(tar.extractfile(name), "sha256").hexdigest()  # type: ignore[arg-type]
            for name in manifest["Layers"]
        ]
    assert found == _json(mounted, f"images/{image}/config.json")["rootfs"]["diff_ids"]


@as_root
def test_podman_cannot_remove_an_image(podman: Podman) -> None:
    assert "cannot remove read-only image" in podman("rmi", "busybox").err


@as_root
def test_a_podman_that_lives_long_sees_images_come_and_go(fresh: Mount, images: Images) -> None:
    with podman_of(fresh.person, fresh.mountpoint / "views/podman") as podman:
        socket = podman.base / "socket"

        def names() -> set[str]:
            ask = (
                "curl",
                "--silent",
                "--show-error",
                "--unix-socket",
                socket,
                "http://d/v4.0.0/libpod/images/json",
            )
            listed = json.loads(fresh.person.run(*ask).ok())
            return {name for image in listed for name in image.get("Names") or ()}

        service = subprocess.Popen(
            [*podman.command, "system", "service", "--time", "0", f"unix://{socket}"],
            env=fresh.person.environment(), stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            wait_until(socket.exists)
            assert "localhost/corners:latest" not in names()
            fresh.fusestore("import", images.corners.source).ok()
            assert "localhost/corners:latest" in names()
            fresh.sh("rmdir images/$(basename $(readlink images/corners))").ok()
            assert "localhost/corners:latest" not in names()
        finally:
            service.terminate()
            service.wait(timeout=30)


def test_the_generation_is_that_of_the_images(fresh: Mount, images: Images) -> None:
    read = "cat views/podman/overlay-images/images.lock"
    first = fresh.sh(read).ok()
    assert len(first) == 64
    fresh.sh("ln -s busybox images/other").ok()
    second = fresh.sh(read).ok()
    assert second != first
    fresh.sh("rm images/other").ok()
    assert fresh.sh(read).ok() == first


def test_a_layer_whose_image_is_gone_is_gone(fresh: Mount) -> None:
    fresh.sh("ls views/podman/overlay/*/diff; rmdir images/$(basename $(readlink images/busybox))").ok()
    assert fresh.sh("ls views/podman/overlay").ok().split() == ["l"]
    assert _json(fresh, "views/podman/overlay-layers/layers.json") == []
