"""The store beside skopeo, umoci and buildah: what they make goes in, and they read the store as an OCI
layout."""

import json
import subprocess
from pathlib import Path

import pytest
from rig.images import Images
from rig.stores import open_at

from fusestore.check import check

pytestmark = pytest.mark.images


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tree_digest(path: Path) -> str:
    """Of names, types, modes and contents."""
    script = "find . -printf '%p %y %m %l\\n' | sort; find . -type f -print0 | sort -z | xargs -0r sha256sum"
    return run("sh", "-c", f"cd '{path}' && ({script}) | sha256sum")


@pytest.mark.parametrize("which", ["busybox", "corners", "zstd"])
def test_skopeo_reads_the_store_and_copies_out_what_went_in(
    tmp_path: Path, images: Images, which: str
) -> None:
    image = getattr(images, which)
    with open_at(tmp_path) as store:
        made = store.import_image(image.source, ["localhost/app:1"])
        assert check(store) == []
        said = json.loads(run("skopeo", "inspect", f"oci:{store.path}:localhost/app:1"))
        assert said["Layers"] == [layer.blob for layer in made.layers]
        run("skopeo", "copy", f"oci:{store.path}:localhost/app:1", f"oci:{tmp_path}/out:x")
    out = json.loads((tmp_path / "out/index.json").read_bytes())
    assert out["manifests"][0]["digest"] == made.manifest


def test_umoci_unpacks_the_store(tmp_path: Path, images: Images) -> None:
    with open_at(tmp_path) as store:
        store.import_image(images.busybox.source, ["app"])
        run("umoci", "unpack", "--image", f"{store.path}:app", f"{tmp_path}/bundle")
    reference = images.busybox.reference
    rootfs = reference / "rootfs" if (reference / "rootfs").is_dir() else reference
    assert tree_digest(tmp_path / "bundle/rootfs") == tree_digest(rootfs)


def test_skopeo_reads_a_store_of_one_image_and_one_name_without_naming_it(
    tmp_path: Path, images: Images
) -> None:
    with open_at(tmp_path) as store:
        store.import_image(images.busybox.source, ["app"])
        store.untag("default")
        run("skopeo", "inspect", f"oci:{store.path}")


def test_an_image_that_skopeo_copies_into_the_store_is_there(tmp_path: Path, images: Images) -> None:
    with open_at(tmp_path) as store:
        run("skopeo", "copy", images.busybox.source, f"oci:{store.path}:theirs")
        image = store.image("theirs")
        assert [layer.reader.size for layer in store.open_layers(image)]
        assert check(store) == []
        store.delete_image("theirs")
        assert check(store) == []


def test_archives_of_skopeo(tmp_path: Path, images: Images) -> None:
    with open_at(tmp_path) as store:
        made = {store.import_image(str(path)).id for path in (images.oci_archive, images.docker_archive)}
        assert len(made) == 1
        assert check(store) == []


def test_the_store_is_hardly_larger_than_the_blobs(tmp_path: Path, images: Images) -> None:
    with open_at(tmp_path) as store:
        image = store.import_image(images.debian.source)
        files = [path for path in Path(store.path).rglob("*") if path.is_file() and not path.is_symlink()]
        assert sum(path.stat().st_size for path in files) <= 1.15 * image.size
        assert check(store) == []
