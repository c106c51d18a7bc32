"""The content of real images against the tree that umoci unpacks: names, types, modes, owners, times, links,
xattrs and the sha256 of every file are equal.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from rig.images import DOCKER_TAG, Images
from rig.mounts import Mount
from rig.people import Person, as_root
from rig.snapshot import differences, snapshot

pytestmark = [pytest.mark.mounted, pytest.mark.images]


@pytest.mark.parametrize("image", ["busybox", "debian", "corners"])
def test_an_image_equals_the_reference(mounted: Mount, images: Images, image: str) -> None:
    found = mounted.person.call(snapshot, mounted.images / image / "rootfs")
    assert differences(snapshot(getattr(images, image).reference), found) == []


@pytest.mark.parametrize("image", ["busybox", "debian", "corners"])
def test_a_new_container_equals_the_reference(mounted: Mount, images: Images, image: str) -> None:
    name = mounted.new_id()
    mounted.fusestore("create", image, name).ok()
    found = mounted.person.call(snapshot, mounted.containers / name / "rootfs")
    assert differences(snapshot(getattr(images, image).reference), found) == []
    mounted.sh("rmdir containers/$1", name).ok()


@pytest.fixture(scope="module")
def other_forms(person: Person, images: Images, area: Path) -> Iterator[Mount]:
    """A mount of debian in each form in which an image can come, under the name of the form."""
    mount = Mount(person, area / f"forms-{person.name}-{person.driver}")
    sources = {
        "zstd": images.zstd.source,
        "chunked": images.chunked.source,
        "oci-archive": f"oci-archive:{images.oci_archive}",
        "docker-archive": f"docker-archive:{images.docker_archive}:{DOCKER_TAG}",
        "path-of-oci": str(images.debian.path),
        "path-of-oci-archive": str(images.oci_archive),
        "path-of-docker-archive": str(images.docker_archive),
    }
    try:
        for name, source in sources.items():
            mount.fusestore("import", source, "--name", name).ok()
        yield mount.mount()
    finally:
        mount.close()


_FORMS = [
    "zstd",
    "chunked",
    "oci-archive",
    "docker-archive",
    "path-of-oci",
    "path-of-oci-archive",
    "path-of-docker-archive",
]


@pytest.mark.parametrize("form", _FORMS)
def test_every_form_of_an_image_has_the_same_content(other_forms: Mount, images: Images, form: str) -> None:
    found = other_forms.person.call(snapshot, other_forms.images / form / "rootfs")
    assert differences(snapshot(images.debian.reference), found) == []
    other_forms.check_log()


# A plain user's copy cannot have the image's owners and devices.


@as_root
def test_a_tree_copied_out_equals_the_reference(mounted: Mount, images: Images) -> None:
    copy = mounted.base / "copy"
    mounted.sh("cp -a images/corners/rootfs $1", copy).ok()
    assert differences(snapshot(images.corners.reference), snapshot(copy)) == []
    mounted.sh("rm -r $1", copy).ok()


@as_root
def test_tar_carries_a_tree_into_a_container(mounted: Mount, images: Images) -> None:
    name = mounted.new_id()
    mounted.sh("mkdir containers/$1 && mkdir containers/$1/rootfs/in", name).ok()
    script = """
        set -o pipefail
        tar -C images/debian/rootfs/upper --format=pax --xattrs --xattrs-include=* -cf - . |
        tar -C $1 --xattrs --xattrs-include=* -xpf -
    """
    mounted.sh(script, mounted.containers / name / "rootfs/in").ok()
    found = mounted.person.call(snapshot, mounted.containers / name / "rootfs/in")
    wanted = mounted.person.call(snapshot, mounted.images / "debian/rootfs/upper")
    assert differences(wanted, found) == []
    mounted.sh("rmdir containers/$1", name).ok()


def test_an_image_is_unchanged_by_its_containers(mounted: Mount, images: Images, container: str) -> None:
    mounted.sh("cd containers/$1/rootfs; rm -r bin; echo changed > etc/hostname; mkdir new", container).ok()
    found = mounted.person.call(snapshot, mounted.images / "busybox/rootfs")
    assert differences(snapshot(images.busybox.reference), found) == []
