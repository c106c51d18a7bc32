"""What is missing or damaged in the store, on a real mount: EIO, a line in the log, and the rest goes on."""

import errno
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from rig.damage import DAMAGE, PLAIN_DAMAGE
from rig.images import Images
from rig.mounts import Mount
from rig.ocisources import SourceMaker, tar_of
from rig.people import Person, as_user

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


# Each kind of damage: what it touches, and what a repair makes of it


@dataclass(frozen=True, slots=True)
class Touched:
    """`script` fails with EIO, and the log then has a line that names `remedy`; "": nothing is touched."""

    script: str = ""
    remedy: str = ""
    is_all: bool = False
    """Images as such, so that no container of any has a rootfs."""


_LAYER = Touched("cat containers/c/rootfs/etc/passwd", "import the image again")
_INDEX = Touched("ls images", "run `fusestore check --repair`", is_all=True)
_DOCUMENT = Touched("cat containers/c/metadata.json", "save what you need from diff/ beside it")
_RECORD = Touched("stat containers/c/rootfs/f", "unmount, then check --repair")

TOUCHED: dict[str, Touched] = {
    "layer changed": _LAYER,
    "layer missing": _LAYER,
    "layer truncated": _LAYER,
    "layers swapped": _LAYER,
    "config changed": Touched("cat images/x:1/config.json", "import the image again"),
    "manifest changed": Touched("cat images/x:1/manifest.json", "import the image again"),
    "index changed": Touched("ls containers/c/rootfs", "check --repair` makes it again"),
    "seek table changed": Touched(),
    "index.json cut short": _INDEX,
    "index.json missing": _INDEX,
    "entry without blobs": Touched(),
    "document damaged": _DOCUMENT,
    "document missing": _DOCUMENT,
    "file among the containers": Touched(),
    "record b'x:0:0:0' of a file": _RECORD,
}


@pytest.fixture
def two_images(person: Person, area: Path) -> Iterator[Mount]:
    """A store with what `rig.damage` wants, and beside it another image with the container "other"."""
    base = Path(tempfile.mkdtemp(prefix="own-", dir=area))
    base.rmdir()
    mount = Mount(person, base)
    source = SourceMaker()
    tars = [tar_of({"etc/passwd": b"root" * 500}), tar_of({"app": b"1"}, {"link": "app"})]
    source.add(source.image(tars), "x:1").add(source.image([tar_of({"theirs": b"theirs\n"})]), "y:1")
    layout = source.directory(mount.base / "source")
    try:
        for name in ("x:1", "y:1"):
            mount.fusestore("import", f"{layout}:{name}").ok()
        mount.fusestore("create", "x:1", "c", "--name", "db").ok()
        mount.fusestore("create", "y:1", "other").ok()
        mount.mount()
        mount.sh("echo f > containers/c/rootfs/f; echo own > containers/other/rootfs/own").ok()
        mount.umount()
        yield mount
    finally:
        mount.close()


def _require_rest(mount: Mount, touched: Touched) -> None:
    assert json.loads(mount.sh("cat containers/other/metadata.json").ok())["id"] == "other"
    mount.sh("touch containers/other/workdir/w && cat containers/other/workdir/w").ok()
    if not touched.is_all:
        assert mount.sh("cd containers/other/rootfs && cat theirs own").ok() == "theirs\nown\n"
        assert mount.sh("cat images/y:1/rootfs/theirs").ok() == "theirs\n"
        mount.fusestore("create", "y:1", "new").ok()
        mount.sh("cat containers/new/rootfs/theirs && rmdir containers/new").ok()


@as_user
@pytest.mark.parametrize("kind", TOUCHED)
def test_only_what_is_touched_fails(two_images: Mount, kind: str) -> None:
    mount, damage, touched = two_images, (DAMAGE | PLAIN_DAMAGE)[kind], TOUCHED[kind]
    mount.person.call(damage.do, mount.store)
    found = mount.fusestore("check")
    assert found.code == 1
    assert any(damage.problem in line and damage.remedy in line for line in found.out.splitlines())
    mount.expect(".*")
    mount.mount()
    if touched.script:
        mount.sh(touched.script).fails_with(errno.EIO)
        assert touched.remedy in mount.log()
    _require_rest(mount, touched)
    assert "unmount it, then repair" in mount.fusestore("check", "--repair").err
    mount.umount()
    assert mount.fusestore("check", "--repair").code == (1 if damage.left else 0)
    mount.mount()
    _require_rest(mount, Touched())
