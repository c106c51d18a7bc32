"""/images on a real mount: what is shown, tagging by symlink, deleting; nothing else can be written."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from rig.images import Images
from rig.mounts import Mount
from rig.snapshot import snapshot

pytestmark = [pytest.mark.mounted, pytest.mark.images]

PERSONS = ("root", "user", "erofs", "overlay", "overlay-user")


def _id(mount: Mount, name: str) -> str:
    return os.path.basename(mount.sh("readlink images/$1", name).ok().strip())


def _json(mount: Mount, path: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(mount.sh("cat $1", path).ok())
    return found


def test_ls_shows_ids_and_names(mounted: Mount) -> None:
    shown = mounted.sh("ls images").ok().split()
    assert {"busybox", "corners", "debian", "default"} < set(shown)
    assert {_id(mounted, name) for name in ("busybox", "corners", "debian", "default")} < set(shown)


def test_an_image_directory_is_complete(mounted: Mount) -> None:
    assert mounted.sh("ls images/debian/ images/debian/layers/ images/debian/layers/1").ok().split() == [
        *["images/debian/:", "config.json", "layers", "manifest.json", "metadata.json", "rootfs"],
        *["images/debian/layers/:", "0", "1"],
        *["images/debian/layers/1:", "blob", "rootfs", "tar"],
    ]


def test_the_id_is_the_digest_of_the_config(mounted: Mount) -> None:
    assert mounted.sh("sha256sum < images/debian/config.json").ok().split()[0] == _id(mounted, "debian")


def test_the_manifest_is_the_one_that_was_imported(mounted: Mount, images: Images) -> None:
    index = json.loads((images.debian.path / "index.json").read_text())
    digest = index["manifests"][0]["digest"]
    assert "sha256:" + mounted.sh("sha256sum < images/debian/manifest.json").ok().split()[0] == digest


def test_metadata_json_names_the_image(mounted: Mount) -> None:
    shown = _json(mounted, "images/debian/metadata.json")
    assert shown["id"] == _id(mounted, "debian")
    assert "debian" in shown["names"]
    assert len(shown["layers"]) == 2


@pytest.mark.parametrize("image", ["busybox", "debian", "corners"])
def test_blob_and_tar_have_the_digests_of_the_image(mounted: Mount, image: str) -> None:
    layers = _json(mounted, f"images/{image}/manifest.json")["layers"]
    diff_ids = _json(mounted, f"images/{image}/config.json")["rootfs"]["diff_ids"]
    sums = mounted.sh("cd images/$1/layers; sha256sum */blob */tar", image).ok().split("\n")[:-1]
    found = {line.split("  ")[1]: "sha256:" + line.split("  ")[0] for line in sums}
    assert found == {
        **{f"{number}/blob": layer["digest"] for number, layer in enumerate(layers)},
        **{f"{number}/tar": diff_id for number, diff_id in enumerate(diff_ids)},
    }


def test_a_tar_is_as_long_as_stat_says(mounted: Mount) -> None:
    shown = (
        mounted.sh("cd images/debian/layers/0; stat -c %s tar blob; wc -c < tar; wc -c < blob").ok().split()
    )
    assert shown[:2] == shown[2:]


def _read_backwards(path: Path, step: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        pieces = []
        for offset in reversed(range(0, size, step)):
            file.seek(offset)
            piece = b""
            while len(piece) < min(step, size - offset):
                piece += file.read(min(step, size - offset) - len(piece))
            pieces.append(piece)
    return b"".join(reversed(pieces))


def test_a_tar_can_be_read_in_any_order(mounted: Mount) -> None:
    path = mounted.images / "busybox/layers/0/tar"
    forwards = mounted.person.call(Path.read_bytes, path)
    assert mounted.person.call(_read_backwards, path, 100_001) == forwards


def test_tar_lists_a_layer(mounted: Mount) -> None:
    assert "bin/busybox" in mounted.sh("tar tPf images/busybox/layers/0/tar").ok().split()


def test_a_layer_alone_shows_whiteouts_as_overlayfs_does(mounted: Mount) -> None:
    found = mounted.person.call(snapshot, mounted.images / "debian/layers/1/rootfs/lower")
    whiteouts = {path for path, entry in found.items() if entry.type == "char" and entry.rdev == 0}
    assert whiteouts == {b"gone", b"kept/file2"}
    assert not [path for path in found if b".wh." in path]


def test_a_layer_alone_shows_opaque_directories_as_overlayfs_does(mounted: Mount) -> None:
    found = mounted.person.call(snapshot, mounted.images / "debian/layers/1/rootfs/lower")
    name = "trusted.overlay.opaque" if mounted.person.is_root else "user.overlay.opaque"
    opaque = {path for path, entry in found.items() if (name, b"y") in entry.xattrs}
    assert opaque == {b"opaque", b"becomes-directory", b"symlink-becomes-directory"}


def test_whiteouts_are_listed_as_character_devices(mounted: Mount) -> None:
    # overlayfs believes readdir's type: a whiteout of unknown type is looked at, one of a wrong type is
    # shown.
    listed = mounted.person.call(_types, mounted.images / "debian/layers/1/rootfs/lower")
    assert listed["gone"] == stat.S_IFCHR


def _types(path: Path) -> dict[str, int]:
    return {entry.name: stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode) for entry in os.scandir(path)}


_REFUSED = [
    "touch images/debian/x",
    "echo > images/debian/config.json",
    "echo >> images/debian/manifest.json",
    "rm images/debian/metadata.json",
    "mkdir images/debian/x",
    "rmdir images/debian/rootfs",
    "rmdir images/debian/layers",
    "rm images/debian/layers/0/blob",
    "mv images/debian/config.json images/debian/x",
    "ln -s y images/debian/x",
    "touch images/debian/rootfs/x",
    "echo x > images/debian/rootfs/etc/bash.bashrc",
    "mkdir images/debian/rootfs/x",
    "rm images/debian/rootfs/etc/bash.bashrc",
    "rm images/debian/layers/1/rootfs/lower/becomes-file",
    "chmod 777 images/debian/rootfs/etc",
    "chown 0 images/debian/rootfs/etc",
    "mv images/debian/rootfs/etc images/debian/rootfs/x",
    "ln images/debian/rootfs/etc/bash.bashrc images/debian/rootfs/x",
    "ln -s y images/debian/rootfs/x",
    "mkfifo images/debian/rootfs/x",
    "truncate -s 0 images/debian/rootfs/etc/bash.bashrc",
    "setfattr -n user.x -v y images/debian/rootfs/etc",
    "touch -d @0 images/debian/rootfs/etc",
    "touch images/x",
    "mkfifo images/x",
]


@pytest.mark.parametrize("command", _REFUSED)
def test_every_other_write_is_refused(mounted: Mount, command: str) -> None:
    mounted.sh(command).fails_with(errno.EROFS)


# Tags


def test_ln_tags_an_image(fresh: Mount) -> None:
    image = _id(fresh, "busybox")
    fresh.sh("ln -s $1 images/mine", image).ok()
    assert _id(fresh, "mine") == image
    assert "mine" in _json(fresh, "images/mine/metadata.json")["names"]


def test_ln_by_name_tags_an_image(fresh: Mount) -> None:
    fresh.sh("ln -s busybox images/mine").ok()
    assert _id(fresh, "mine") == _id(fresh, "busybox")


def test_a_name_with_slashes_nests(fresh: Mount, images: Images) -> None:
    fresh.fusestore("import", images.busybox.source, "--name", "localhost/app:1").ok()
    assert fresh.sh("cat images/localhost/app:1/rootfs/etc/hostname").ok() == "busybox\n"
    fresh.sh("cd images/localhost; ln -s app:1 app:2").ok()
    assert _id(fresh, "localhost/app:2") == _id(fresh, "busybox")
    fresh.sh("rm images/localhost/app:*").ok()
    assert "localhost" not in fresh.sh("ls images").ok().split()


def test_mkdir_makes_a_place_for_names(fresh: Mount) -> None:
    fresh.sh("mkdir -p images/localhost/a && ln -s busybox images/localhost/a/app:2").ok()
    assert _id(fresh, "localhost/a/app:2") == _id(fresh, "busybox")
    fresh.sh("mkdir images/empty images/x && rmdir images/x").ok()
    fresh.umount()
    fresh.mount()
    assert set(fresh.sh("ls images").ok().split()) >= {"busybox", "default", "localhost"}
    fresh.sh("stat images/empty").fails_with(errno.ENOENT)


def test_places_without_a_name_are_few(fresh: Mount) -> None:
    fresh.sh("for i in $(seq 65); do mkdir images/d$i || exit; done").fails_with(errno.ENOSPC)
    fresh.sh("ln -s busybox images/d1/a && mkdir images/d65").ok()


def test_a_directory_of_names_cannot_be_moved(fresh: Mount) -> None:
    fresh.sh("mkdir images/a && ln -s busybox images/a/b").ok()
    fresh.sh("mv images/a images/c").fails_with(errno.EROFS)
    fresh.sh("rm -r images/a && ! test -e images/a").ok()


def test_a_taken_tag_is_kept(fresh: Mount, images: Images) -> None:
    fresh.fusestore("import", images.debian.source).ok()
    fresh.sh("ln -sT $1 images/busybox", _id(fresh, "debian")).fails_with(errno.EEXIST)


def test_ln_sfn_moves_a_tag(fresh: Mount, images: Images) -> None:
    fresh.fusestore("import", images.debian.source).ok()
    fresh.sh("ln -sfn debian images/busybox").ok()
    assert _id(fresh, "busybox") == _id(fresh, "debian")


def test_ln_to_no_image_is_refused(fresh: Mount) -> None:
    fresh.sh("ln -s no-such-image images/mine").fails_with(errno.ENOENT)


def test_rm_untags(fresh: Mount) -> None:
    image = _id(fresh, "busybox")
    fresh.sh("rm images/busybox").ok()
    assert fresh.sh("ls images").ok().split() == sorted([image, "default"])


def test_mv_renames_a_tag(fresh: Mount) -> None:
    image = _id(fresh, "busybox")
    fresh.sh("mv images/busybox images/renamed").ok()
    assert _id(fresh, "renamed") == image
    fresh.sh("stat images/busybox").fails_with(errno.ENOENT)


def test_skopeo_reads_the_tags(fresh: Mount) -> None:
    fresh.sh("ln -s busybox images/mine && rm images/busybox").ok()
    index = json.loads((fresh.store / "index.json").read_text())
    names = {one["annotations"]["org.opencontainers.image.ref.name"] for one in index["manifests"]}
    assert names == {"mine", "default"}
    fresh.person.run("skopeo", "inspect", f"oci:{fresh.store}:mine").ok()


# Deleting


def test_rmdir_deletes_an_image_and_what_only_it_used(fresh: Mount, images: Images) -> None:
    before = set(os.listdir(fresh.store / "blobs/sha256"))
    fresh.fusestore("import", images.debian.source).ok()
    fresh.sh("rmdir images/$1", _id(fresh, "debian")).ok()
    assert set(os.listdir(fresh.store / "blobs/sha256")) == before
    fresh.sh("stat images/debian").fails_with(errno.ENOENT)


def test_rmdir_keeps_the_layers_of_another_image(fresh: Mount, images: Images) -> None:
    fresh.fusestore("import", images.debian.source).ok()
    fresh.fusestore("import", images.corners.source).ok()
    fresh.sh("rmdir images/$1", _id(fresh, "debian")).ok()
    assert fresh.sh("cat images/corners/rootfs/upper/xattrs").ok() == "xattrs\n"
    assert fresh.fusestore("check").ok() == ""


def test_rmdir_of_a_used_image_is_busy(fresh: Mount) -> None:
    fresh.sh("mkdir containers/a").ok()
    fresh.sh("rmdir images/$1", _id(fresh, "busybox")).fails_with(errno.EBUSY)
    fresh.sh("rmdir containers/a").ok()
    fresh.sh("rmdir images/$1", _id(fresh, "busybox")).ok()
    assert fresh.sh("ls images").ok() == ""


def test_what_import_adds_is_seen_at_once(fresh: Mount, images: Images) -> None:
    fresh.sh("stat images/debian").fails_with(errno.ENOENT)
    fresh.fusestore("import", images.debian.source).ok()
    assert fresh.sh("cat images/debian/rootfs/lower/becomes-file").ok() == "now a file\n"
    assert "debian" in fresh.sh("ls images").ok().split()


def test_gc_beside_a_mount_takes_what_nobody_needs(fresh: Mount) -> None:
    """The mount shows it at once, and keeps the cache that it reads from."""
    script = """
        mkdir containers/c; cat containers/c/rootfs/bin/busybox > /dev/null
        rm images/*[!0-9a-f]*
        fusestore gc; ls images | wc -l
        fusestore rm c; fusestore gc | grep -c 'no name, and no container'; ls images | wc -l
        ls ../store/blobs/sha256 | wc -l
    """
    assert fresh.sh(script).ok().splitlines() == ["0 bytes given back", "1", "1", "0", "0"]
