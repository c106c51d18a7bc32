"""mounted, start and stop on a real mount: what pinning a container means (design.md section 2)."""

import errno
import json
from pathlib import Path

import pytest
from rig.mounts import Mount

pytestmark = [pytest.mark.mounted, pytest.mark.images]

PERSONS = ("root", "user", "erofs", "overlay", "overlay-user")

_PIN = "echo '{\"mounted\": true}' > containers/$1/metadata.json"
_RELEASE = "echo '{\"mounted\": false}' > containers/$1/metadata.json"


def _is_mounted(mount: Mount, container: str) -> bool:
    shown = json.loads(mount.sh("cat containers/$1/metadata.json", container).ok())
    return shown["mounted"] is True


def test_writing_mounted_pins_and_releases(mounted: Mount, container: str) -> None:
    mounted.sh(_PIN, container).ok()
    assert _is_mounted(mounted, container)
    mounted.sh(_RELEASE, container).ok()
    assert not _is_mounted(mounted, container)


@pytest.mark.parametrize(
    "command", ["rmdir $1", "rm -r $1", "rm $1/metadata.json", "mv $1 x", "cd $1; rm metadata.json"]
)
def test_a_pinned_container_is_busy(mounted: Mount, container: str, command: str) -> None:
    mounted.sh(_PIN, container).ok()
    mounted.sh(f"cd containers; {command}", container).fails_with(errno.EBUSY)
    assert _is_mounted(mounted, container)
    assert mounted.sh("cat containers/$1/rootfs/etc/hostname", container).ok() == "busybox\n"


def test_the_name_of_a_pinned_container_stays(mounted: Mount, container: str) -> None:
    document = json.dumps({"name": f"n-{container}", "mounted": True})
    mounted.sh('echo "$2" > containers/$1/metadata.json', container, document).ok()
    mounted.sh("rm containers/n-$1", container).fails_with(errno.EBUSY)


def test_rm_r_of_a_pinned_container_says_the_same_of_all(mounted: Mount, container: str) -> None:
    mounted.sh(_PIN, container).ok()
    said = mounted.sh("rm -r containers/$1", container).err.splitlines()
    assert said and all(line.endswith("Device or resource busy") for line in said), said


def test_starting_a_container_takes_its_removal_back(mounted: Mount, container: str) -> None:
    mounted.sh("cd containers/$1 && rm metadata.json && rmdir rootfs", container).ok()
    mounted.fusestore("start", container).ok()
    assert _is_mounted(mounted, container)
    assert mounted.sh("cat containers/$1/rootfs/etc/hostname", container).ok() == "busybox\n"


def test_a_write_that_leaves_mounted_out_keeps_it(mounted: Mount, container: str) -> None:
    mounted.sh(_PIN, container).ok()
    mounted.sh("echo '{\"user\": 1}' > containers/$1/metadata.json", container).ok()
    assert _is_mounted(mounted, container)


def test_start_prints_where_the_rootfs_is(mounted: Mount, container: str) -> None:
    printed = mounted.fusestore("start", container).ok()
    assert Path(printed.rstrip("\n")) == mounted.containers / container / "rootfs"
    assert _is_mounted(mounted, container)
    mounted.fusestore("stop", container).ok()
    assert not _is_mounted(mounted, container)


def test_start_twice_and_stop_once_is_stopped(mounted: Mount, container: str) -> None:
    for action in ("start", "start", "stop"):
        mounted.fusestore(action, container)
    assert not _is_mounted(mounted, container)


def test_rm_of_a_started_container_is_refused(mounted: Mount, container: str) -> None:
    mounted.fusestore("start", container).ok()
    result = mounted.fusestore("rm", container)
    assert result.code == 1
    assert result.err.startswith("fusestore: ") and result.err.count("\n") == 1


def test_start_without_a_mount_says_what_to_do(unmounted: Mount) -> None:
    unmounted.fusestore("create", "busybox", "a").ok()
    result = unmounted.fusestore("start", "a")
    assert result.code == 1
    assert "fusestore mount" in result.err


def test_the_label_is_shown_as_security_selinux(mounted: Mount, container: str) -> None:
    label = "system_u:object_r:container_file_t:s0:c1,c2"
    document = json.dumps({"mountlabel": label, "mounted": True})
    mounted.sh('echo "$2" > containers/$1/metadata.json', container, document).ok()
    script = "getfattr --only-values -n security.selinux containers/$1/rootfs/etc/hostname"
    assert mounted.sh(script, container).ok().rstrip("\0") == label


def test_create_takes_a_label(mounted: Mount) -> None:
    name = mounted.new_id()
    mounted.fusestore("create", "--label", "a:b:c:s0", "busybox", name).ok()
    assert json.loads(mounted.fusestore("inspect", name).ok())["mountlabel"] == "a:b:c:s0"
    mounted.fusestore("rm", name).ok()


def test_the_rootfs_works_without_being_started(mounted: Mount, container: str) -> None:
    assert not _is_mounted(mounted, container)
    mounted.sh("echo x > containers/$1/rootfs/x && cat containers/$1/rootfs/x", container).ok()
