"""What other processes change in a mounted store shows at the next lookup, though kernels keep names."""

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rig.mounts import Mount, Place

from fusestore.store import Store

pytestmark = [pytest.mark.mounted, pytest.mark.images]


def _with_store(place: Place, work: Callable[[Store], object]) -> object:
    """The result of `work` in a process of the person's, who has the store open."""

    def call() -> object:
        with Store.open(place.store, place.run_dir) as store:
            return work(store)

    return place.person.call(call)


def test_what_the_api_deletes_is_gone_at_once(mounted: Mount) -> None:
    containers = mounted.containers

    def work(store: Store) -> list[str]:
        left = []
        for name in (f"api-{number}" for number in range(50)):
            store.create_container(container_id=name)
            os.stat(containers / name / "rootfs/etc")
            store.delete_container(name)
            if os.path.lexists(containers / name):
                left.append(name)
        return left

    assert _with_store(mounted, work) == []


def test_what_the_api_renames_is_gone_at_once(mounted: Mount) -> None:
    containers = mounted.containers

    def work(store: Store) -> tuple[bool, bool]:
        store.create_container(container_id="before")
        os.stat(containers / "before/rootfs")
        store.rename_container("before", "after")
        try:
            return os.path.lexists(containers / "before"), os.path.lexists(containers / "after/rootfs")
        finally:
            store.delete_container("after")

    assert _with_store(mounted, work) == (False, True)


def test_a_container_made_again_is_not_the_old_one(mounted: Mount) -> None:
    file = mounted.containers / "again/rootfs/file"

    def work(store: Store) -> bool:
        store.create_container(container_id="again")
        file.write_text("old")
        store.delete_container("again")
        store.create_container(container_id="again")
        try:
            return file.exists()
        finally:
            store.delete_container("again")

    assert _with_store(mounted, work) is False


def test_a_label_shows_to_who_is_inside_already(mounted: Mount, container: str) -> None:
    rootfs = mounted.containers / container / "rootfs"

    def work(store: Store) -> bytes:
        os.chdir(rootfs)
        os.listxattr(".")
        store.set_container_metadata(container, {"mountlabel": "system_u:object_r:x:s0"})
        return os.getxattr("etc", "security.selinux")

    assert _with_store(mounted, work) == b"system_u:object_r:x:s0"


def test_an_image_deleted_by_the_api_is_gone_at_once(fresh: Mount) -> None:
    fresh.sh("rm images/busybox images/default")

    def work(store: Store) -> bool:
        image = next(image for image in store.images() if not image.names)
        path = fresh.images / image.id
        os.stat(path / "rootfs/bin")
        store.delete_image(image.id)
        return os.path.lexists(path)

    assert _with_store(fresh, work) is False


@pytest.fixture
def second(fresh: Mount) -> Iterator[Path]:
    """Another mount of the same store."""
    mountpoint = fresh.base / "second"
    fresh.person.run("mkdir", mountpoint).ok()
    fresh.fusestore("mount", mountpoint).ok()
    yield mountpoint
    fresh.fusestore("umount", mountpoint).ok()


def test_two_mounts_of_one_store_show_the_same(fresh: Mount, second: Path) -> None:
    script = """
        for i in $(seq 20); do
            mkdir containers/x$i && ls $1/containers/x$i/rootfs/bin > /dev/null || exit 1
            rmdir $1/containers/x$i && ! test -e containers/x$i || exit 2
        done
        mkdir containers/y && test -e $1/containers/y && echo '{"a": 1}' > containers/y/metadata.json
        cat $1/containers/y/metadata.json
    """
    assert json.loads(fresh.sh(script, second).ok())["a"] == 1
    fresh.sh("exec 9< $1/containers/y/rootfs/etc/hostname; rmdir containers/y", second).fails_with(
        errno.EBUSY
    )


def test_what_one_mount_wrote_another_shows_that_was_not_there_before(fresh: Mount, second: Path) -> None:
    script = """
        mkdir containers/a && cd containers/a/rootfs
        echo new > new; echo more >> etc/hostname; rm bin/vi; mv tmp gone; chmod 700 etc
        cd $1/containers/a/rootfs && cat new etc/hostname && ls -d bin/vi tmp gone 2> /dev/null
        stat -c %a etc
    """
    assert fresh.sh(script, second).ok() == "new\nbusybox\nmore\ngone\n700\n"


def test_changes_through_two_mounts_at_once_do_not_wait_for_each_other(fresh: Mount, second: Path) -> None:
    """Where one waited in vain the log says so, which fails the test."""
    script = """
        for i in $(seq 20); do mkdir containers/a$i $1/containers/b$i & done
        wait
        ls containers | wc -l
        for i in $(seq 20); do rmdir $1/containers/a$i & rmdir containers/b$i & done
        wait
        ls containers; ls $1/containers
    """
    assert fresh.sh(script, second).ok() == "40\n"
