"""What is missing or damaged in the store, on a real mount: EIO, a line in the log, and the rest goes on."""

import errno
import json
import shutil
from pathlib import Path

import pytest
from rig.images import Images
from rig.mounts import Mount

pytestmark = [pytest.mark.mounted, pytest.mark.images]


def _layer_blob(mount: Mount) -> Path:
    (image,) = json.loads(mount.fusestore("images", "--json").ok())
    digest: str = image["layers"][0]["digest"]
    return mount.store / "blobs/sha256" / digest.removeprefix("sha256:")


def _log_names(mount: Mount, blob: Path) -> None:
    mount.expect(blob.name)
    (line, *_) = [line for line in mount.log().splitlines() if blob.name in line]
    assert "import the image again" in line


def test_a_missing_blob_is_eio(unmounted: Mount) -> None:
    blob = _layer_blob(unmounted)
    blob.unlink()
    unmounted.mount()
    unmounted.sh("cat images/busybox/rootfs/bin/busybox").fails_with(errno.EIO)
    _log_names(unmounted, blob)


def test_a_damaged_blob_is_eio_and_the_mount_goes_on(unmounted: Mount) -> None:
    blob = _layer_blob(unmounted)
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 0xFF
    blob.write_bytes(data)
    unmounted.mount()
    unmounted.sh("cat images/busybox/rootfs/bin/busybox").fails_with(errno.EIO)
    _log_names(unmounted, blob)
    unmounted.sh("mkdir containers/a && ls images containers/a/rootfs/bin").ok()


def test_importing_again_repairs_a_blob(unmounted: Mount, images: Images) -> None:
    _layer_blob(unmounted).write_bytes(b"damaged")
    assert unmounted.fusestore("check").code == 1
    unmounted.fusestore("import", images.busybox.source).ok()
    assert unmounted.fusestore("check").ok() == ""
    unmounted.mount()
    unmounted.sh("sha256sum images/busybox/rootfs/bin/busybox").ok()


@pytest.mark.parametrize("damage", ["removed", "damaged"])
def test_importing_again_heals_the_mount(unmounted: Mount, images: Images, damage: str) -> None:
    blob = _layer_blob(unmounted)
    if damage == "removed":
        blob.unlink()
    else:
        blob.write_bytes(bytes(blob.stat().st_size))
    unmounted.mount()
    unmounted.sh("cat images/busybox/rootfs/bin/busybox").fails_with(errno.EIO)
    _log_names(unmounted, blob)
    unmounted.fusestore("import", images.busybox.source).ok()
    unmounted.sh("cat images/busybox/rootfs/bin/busybox > /dev/null").ok()


@pytest.mark.parametrize("damage", ["removed", "damaged"])
def test_derived_files_are_made_again(unmounted: Mount, damage: str) -> None:
    for directory in (unmounted.store / "layers").iterdir():
        if damage == "removed":
            shutil.rmtree(directory)
        else:
            for file in directory.iterdir():
                file.write_bytes(b"not what it was" * 100)
    unmounted.expect("layers/")
    unmounted.mount()
    assert unmounted.sh("cat images/busybox/rootfs/etc/hostname").ok() == "busybox\n"
    assert unmounted.fusestore("check").ok() == ""


def test_a_container_whose_document_is_damaged_is_eio(fresh: Mount) -> None:
    fresh.sh("mkdir containers/a containers/b").ok()
    document = fresh.store / "containers/a/container"
    document.write_bytes(b"{ damaged")
    fresh.sh("cat containers/a/metadata.json").fails_with(errno.EIO)
    fresh.expect("containers/a")
    assert fresh.sh("jq -r .id containers/b/metadata.json").ok() == "b\n"
    assert fresh.fusestore("check").code == 1


def test_what_is_damaged_is_listed_with_its_neighbours(unmounted: Mount) -> None:
    """The layer's blob is gone and so is all that was derived from it; `ls` has readdirplus in the kernel."""
    unmounted.fusestore("create", "busybox", "a").ok()
    blob = _layer_blob(unmounted)
    blob.unlink()
    for directory in (unmounted.store / "layers").iterdir():
        shutil.rmtree(directory)
    unmounted.mount()
    assert unmounted.sh("ls containers/a").ok() == "metadata.json\nrootfs\nrundir\nworkdir\n"
    assert unmounted.sh("cd images/busybox && echo * && cd layers/0 && echo *").ok() == (
        "config.json layers manifest.json metadata.json rootfs\nblob rootfs tar\n"
    )
    assert json.loads(unmounted.sh("cat containers/a/metadata.json").ok())["id"] == "a"
    unmounted.sh("ls containers/a/rootfs").fails_with(errno.EIO)
    _log_names(unmounted, blob)
    unmounted.sh("rm -r containers/a && mkdir containers/a").ok()
