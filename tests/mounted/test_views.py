"""/views on a real mount: the store as podman and others of its kin want it, by the real programs."""

import errno
import hashlib
import json
import os
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rig.images import Images
from rig.mounts import Mount, wait_until
from rig.people import Result, as_root, as_user
from rig.podman import Podman, podman_of
from rig.snapshot import Entry, differences, snapshot
from rig.tinyimages import make_layout

pytestmark = [pytest.mark.mounted, pytest.mark.images]

IMAGES = ("busybox", "debian", "corners")


def _json(mount: Mount, path: str) -> Any:
    return json.loads(mount.sh("cat $1", path).ok())


def test_views_shows_what_there_is(mounted: Mount) -> None:
    assert mounted.sh("ls views").ok().split() == ["oci", "podman"]


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
def test_a_tag_of_podmans_is_podmans(mounted: Mount, podman: Podman) -> None:
    """It names the image that is here, of which nothing is copied."""
    podman("tag", "busybox", "localhost/mine:1").ok()
    assert podman.run("--rm", "localhost/mine:1", "echo", "hello").ok() == "hello\n"
    assert podman.stored() < 1 << 20
    assert "mine" not in mounted.sh("ls images/localhost 2>&1").out


@as_root
def test_buildah_builds_on_an_image(podman: Podman) -> None:
    """buildah wants what podman wants, as all of containers/storage."""
    command = [
        "buildah",
        *podman.command[1:3],
        *podman.command[3:5],
        *podman.command[5:7],
        *podman.command[-2:],
    ]

    def buildah(*arguments: str) -> str:
        return podman.person.run(*command, *arguments, env=podman.environment).ok().strip()

    made = buildah("from", "--pull-never", "busybox")
    buildah("config", "--cmd", "echo built", made)
    buildah("commit", "--quiet", made, "localhost/built")
    assert podman.run("--rm", "localhost/built").ok() == "built\n"


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


@as_user
def test_a_plain_user_mounts_the_store_where_podman_works(unmounted: Mount) -> None:
    mountpoint, environment = unmounted.mountpoint, unmounted.environment
    with podman_of(unmounted.person, mountpoint / "views/podman") as podman:
        assert podman.unshare("fusestore", "mount", mountpoint, env=environment).code == 0
        try:
            script = "echo hello > /etc/new; chown 5:5 /bin/busybox; cat /etc/new; stat -c %u:%g /bin/busybox"
            result = podman.run("--rm", "busybox", "sh", "-c", script)
            assert (result.code, result.out) == (0, "hello\n5:5\n"), result.err
        finally:
            result = podman.unshare("fusestore", "umount", mountpoint, env=environment)
        assert result.code == 0, result.err


def test_the_generation_is_that_of_the_images(fresh: Mount, images: Images) -> None:
    read = "cat views/podman/overlay-images/images.lock"
    first = fresh.sh(read).ok()
    assert len(first) == 64
    fresh.sh("ln -s busybox images/other").ok()
    second = fresh.sh(read).ok()
    assert second != first
    fresh.sh("rm images/other").ok()
    assert fresh.sh(read).ok() == first


@as_root
def test_a_container_of_podmans_loses_an_image_that_is_deleted(fresh: Mount) -> None:
    with podman_of(fresh.person, fresh.mountpoint / "views/podman") as podman:
        root = podman("mount", podman("create", "busybox").ok().strip()).ok().strip()
        fresh.expect("layer blob .* No such file")
        fresh.sh("rmdir images/$(basename $(readlink images/busybox))").ok()
        fresh.person.run("cat", f"{root}/bin/busybox").fails_with(errno.EIO)


def test_a_layer_whose_image_is_gone_is_gone(fresh: Mount) -> None:
    fresh.sh("ls views/podman/overlay/*/diff; rmdir images/$(basename $(readlink images/busybox))").ok()
    assert fresh.sh("ls views/podman/overlay").ok().split() == ["l"]
    assert _json(fresh, "views/podman/overlay-layers/layers.json") == []


# /views/oci


def _skopeo(mount: Mount, *arguments: str | Path) -> Result:
    return mount.person.run("skopeo", "--insecure-policy", *arguments)


def _layout(mount: Mount) -> Path:
    return mount.mountpoint / "views/oci"


@pytest.fixture
def built(fresh: Mount) -> Path:
    """A directory with an OCI layout of one image called app, which is not in the store."""
    make_layout(fresh.base / "built", "app", [{"a": b"1"}, {"new": b"new\n"}])
    return fresh.base / "built"


@pytest.fixture
def source(fresh: Mount) -> Path:
    """A file of the person's."""
    fresh.sh("echo new > $1", path := fresh.base / "source").ok()
    return path


def test_the_layout_lists_the_names_and_the_blobs_of_the_store(mounted: Mount) -> None:
    names = mounted.person.run("umoci", "list", "--layout", _layout(mounted)).ok().split()
    assert sorted(names) == ["busybox", "corners", "debian", "default"]
    sums = mounted.sh("cd views/oci/blobs/sha256; sha256sum *").ok().splitlines()
    assert sums and all(line.split()[0] == line.split()[1] for line in sums)


@pytest.mark.parametrize("image", ["corners"])
def test_skopeo_inspects_an_image(mounted: Mount, image: str) -> None:
    shown = json.loads(_skopeo(mounted, "inspect", f"oci:{_layout(mounted)}:{image}").ok())
    assert shown["Layers"] == [
        one["digest"] for one in _json(mounted, f"images/{image}/manifest.json")["layers"]
    ]


def test_skopeo_copies_an_image_out(mounted: Mount) -> None:
    out = mounted.base / "out"
    _skopeo(mounted, "copy", "--quiet", f"oci:{_layout(mounted)}:corners", f"oci:{out}:corners").ok()
    digest = json.loads((out / "index.json").read_text())["manifests"][0]["digest"]
    assert digest == _json(mounted, "images/corners/metadata.json")["manifest-digest"]


def test_skopeo_copies_an_image_in(fresh: Mount, built: Path) -> None:
    _skopeo(fresh, "copy", "--quiet", f"oci:{built}:app", f"oci:{_layout(fresh)}:localhost/app:1").ok()
    assert fresh.sh("cat images/localhost/app:1/rootfs/new").ok() == "new\n"
    fresh.fusestore("check").ok()


def test_skopeo_copies_what_is_there_under_another_name(fresh: Mount, images: Images) -> None:
    _skopeo(fresh, "copy", "--quiet", images.busybox.source, f"oci:{_layout(fresh)}:again").ok()
    assert fresh.sh("[ images/again -ef images/busybox ]").code == 0


def test_skopeo_brings_back_what_a_repair_set_aside(fresh: Mount, images: Images) -> None:
    digest = _json(fresh, "images/busybox/metadata.json")["manifest-digest"]
    manifest = fresh.store / "blobs/sha256" / digest.removeprefix("sha256:")
    sound = manifest.read_bytes()
    fresh.umount()
    manifest.write_bytes(b"{}")
    fresh.fusestore("check", "--repair")
    fresh.mount()
    assert not manifest.exists()
    _skopeo(fresh, "copy", "--quiet", images.busybox.source, f"oci:{_layout(fresh)}:again").ok()
    assert manifest.read_bytes() == sound
    fresh.sh("[ images/again -ef images/busybox ]").ok()
    fresh.fusestore("check").ok()


def test_umoci_changes_an_image(fresh: Mount, source: Path) -> None:
    layout = _layout(fresh)
    other = ("--image", f"{layout}:other")
    config = ("--image", f"{layout}:busybox", "--tag", "other", "--config.cmd", "ls")
    fresh.person.run("umoci", "config", *config).ok()
    fresh.person.run("umoci", "insert", "--rootless", *other, source, "/new").ok()
    assert _json(fresh, "images/other/config.json")["config"]["Cmd"] == ["ls"]
    assert fresh.sh("cat images/other/rootfs/new; ls images/other/layers").ok().split() == ["new", "0", "1"]
    assert fresh.sh("ls -A views/oci").ok().split() == ["blobs", "index.json", "oci-layout"]


def test_umoci_unpacks_an_image(fresh: Mount) -> None:
    bundle = fresh.base / "bundle"
    rootless = () if fresh.person.is_root else ("--rootless",)
    fresh.person.run("umoci", "unpack", *rootless, "--image", f"{_layout(fresh)}:busybox", bundle).ok()
    assert (bundle / "rootfs/bin/busybox").exists()


def test_umoci_takes_a_name_away_and_the_image_stays(fresh: Mount) -> None:
    image = fresh.sh("readlink images/busybox").ok().strip()
    fresh.person.run("umoci", "rm", "--image", f"{_layout(fresh)}:busybox").ok()
    fresh.person.run("umoci", "gc", "--layout", _layout(fresh)).ok()
    assert fresh.sh("ls images").ok().split() == [image, "default"]


@as_root
def test_buildah_pushes_an_image(fresh: Mount, images: Images) -> None:
    base = fresh.base / "buildah"
    buildah = ("buildah", "--root", base / "root", "--runroot", base / "run", "--storage-driver", "vfs")
    policy = fresh.base / "policy.json"
    policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    options = ("--signature-policy", policy, "--quiet")
    # A relative path: buildah makes an image name of it.
    source = f"oci:{images.busybox.path.name}:busybox"
    made = fresh.person.run(*buildah, "from", *options, source, cwd=images.busybox.path.parent).ok().strip()
    fresh.person.run(*buildah, "config", "--cmd", "vi", made).ok()
    fresh.person.run(*buildah, "commit", *options, made, "localhost/pushed").ok()
    target = f"oci:{_layout(fresh)}:pushed"
    fresh.person.run(*buildah, "push", *options, "localhost/pushed", target).ok()
    assert _json(fresh, "images/pushed/config.json")["config"]["Cmd"] == ["vi"]
    fresh.person.run("umount", "-q", base / "root/vfs")


WRONG = "0" * 64

_WRITE_INDEX = 'echo "$1" | cat > views/oci/index.json'
"""A shell drops what close(2) says, cat does not."""


@pytest.mark.parametrize(
    "write",
    [
        "cat $1 > views/oci/blobs/sha256/$2",
        "cp $1 views/oci/blobs/sha256/$2",
        "cp $1 views/oci/tmp && mv views/oci/tmp views/oci/blobs/sha256/$2",
        "mkdir views/oci/.t && cp $1 views/oci/.t/x && mv views/oci/.t/x views/oci/blobs/sha256/$2",
    ],
)
def test_a_blob_is_taken_with_its_digest_only(fresh: Mount, source: Path, write: str) -> None:
    fresh.sh(write, source, WRONG).fails_with(errno.EIO)
    fresh.sh("ls views/oci/blobs/sha256/$1", WRONG).fails_with(errno.ENOENT)
    fresh.sh("rm -rf views/oci/.t").ok()
    right = hashlib.sha256(source.read_bytes()).hexdigest()
    fresh.sh(write, source, right).ok()
    assert fresh.sh("cat views/oci/blobs/sha256/$1", right).ok() == "new\n"


def test_a_blob_of_the_store_is_never_changed(fresh: Mount, source: Path) -> None:
    name = fresh.sh("cd views/oci/blobs/sha256; ls | head -1").ok().strip()
    fresh.sh("cat $1 > views/oci/blobs/sha256/$2", source, name).fails_with(errno.EIO)
    fresh.sh("rm views/oci/blobs/sha256/$1", name).fails_with(errno.EROFS)
    fresh.sh("echo >> views/oci/blobs/sha256/$1", name).fails_with(errno.EROFS)
    assert fresh.sh("sha256sum views/oci/blobs/sha256/$1", name).ok().startswith(name)
    fresh.fusestore("check").ok()


@pytest.mark.parametrize("index", ["{", '{"manifests": [{"digest": "x"}]}'])
def test_an_index_that_is_none_is_refused(fresh: Mount, index: str) -> None:
    before = fresh.sh("cat views/oci/index.json").ok()
    fresh.sh(_WRITE_INDEX, index).fails_with(errno.EINVAL)
    layout = _layout(fresh)
    fresh.sh('echo "$1" > views/oci/new', index).ok()
    with pytest.raises(OSError, match="Invalid argument"):
        fresh.person.call(os.rename, layout / "new", layout / "index.json")
    assert fresh.sh("cat views/oci/index.json").ok() == before


def test_an_index_that_leads_to_no_manifest_is_refused(fresh: Mount) -> None:
    index = json.loads(fresh.sh("cat views/oci/index.json").ok())
    index["manifests"].append({**index["manifests"][0], "digest": f"sha256:{WRONG}", "annotations": {}})
    fresh.sh(_WRITE_INDEX, json.dumps(index)).fails_with(errno.EINVAL)
    assert len(json.loads(fresh.sh("cat views/oci/index.json").ok())["manifests"]) == 2


@pytest.mark.parametrize("name", ["busybox/below", "a/../b", "x/y"])
def test_an_index_with_a_name_that_cannot_be_changes_nothing(fresh: Mount, name: str) -> None:
    index = json.loads(fresh.sh("cat views/oci/index.json").ok())
    for new in ("fine", "x", name):
        annotations = {"org.opencontainers.image.ref.name": new}
        index["manifests"].append({**index["manifests"][0], "annotations": annotations})
    names = fresh.sh("ls images").ok()
    result = fresh.sh(_WRITE_INDEX, json.dumps(index))
    assert result.code != 0
    assert fresh.sh("ls images").ok() == names
    assert len(json.loads(fresh.sh("cat views/oci/index.json").ok())["manifests"]) == 2


def test_what_was_written_and_never_used_is_gone_with_the_mount(fresh: Mount) -> None:
    fresh.sh("head -c 1000000 /dev/zero > views/oci/left").ok()
    assert list((fresh.store / "tmp").glob("*/*")) == []
    fresh.umount()
    fresh.mount()
    assert "left" not in fresh.sh("ls views/oci").ok()


def test_copies_at_once_keep_each_others_names(fresh: Mount, images: Images) -> None:
    copy = f"skopeo --insecure-policy copy --quiet {images.busybox.source} oci:$PWD/views/oci:"
    start = f"for n in 1 2 3 4 5 6; do {copy}app$n & jobs+=($!); done"
    fresh.sh(f"{start}; for job in ${{jobs[@]}}; do wait $job || exit; done").ok()
    assert {f"app{number}" for number in range(1, 7)} <= set(fresh.sh("ls images").ok().split())


def test_a_copy_of_the_index_takes_no_name_away_that_came_since(fresh: Mount) -> None:
    copy = fresh.base / "copy"
    fresh.sh("cat views/oci/index.json > $1; ln -s busybox images/other", copy).ok()
    fresh.sh("cat $1 > views/oci/index.json", copy).ok()
    assert "other" in fresh.sh("ls images").ok().split()


@pytest.mark.parametrize("path", ["index.json", "blobs/sha256/$(ls views/oci/blobs/sha256 | head -1)"])
def test_who_reads_is_not_cut_off_by_who_writes(fresh: Mount, path: str) -> None:
    script = f"cp views/oci/{path} $1; exec 3< views/oci/{path} 4> views/oci/{path}; cmp $1 - <&3; cat $1 >&4"
    fresh.sh(script, fresh.base / "copy").ok()
