"""A store that is mounted in a user namespace and outside of one: root in there is not what root is."""

import pytest
from rig.mounts import Mount
from rig.people import Result

pytestmark = [pytest.mark.mounted, pytest.mark.images]

_CHANGE = """
rm -r etc
mkdir etc
echo new > etc/new
echo more >> bin/busybox
mkdir set
chmod 2750 set
rm bin/ls
"""
_LOOK = "find . -printf '%p %M %s %l\\n' | sort"


def _in_rootfs(mount: Mount, script: str) -> Result:
    return mount.person.run("bash", "-ec", f'cd "$0/containers/c/rootfs"\n{script}', mount.mountpoint)


def _in_namespace(mount: Mount, script: str) -> Result:
    """`script` in the rootfs of container c, in a user namespace where the person is root.

    The store is mounted in there only.
    """
    inside = f"""
        fusestore mount "$0"
        trap 'fusestore umount "$0"' EXIT
        mkdir -p "$0/containers/c"
        (cd "$0/containers/c/rootfs"; {script})
    """
    words = ("unshare", "--user", "--map-root-user", "--mount", "bash", "-ec", inside, mount.mountpoint)
    return mount.person.run(*words, env=mount.environment, deadline_s=60)


def test_what_was_changed_in_a_user_namespace_is_there_outside_of_it(unmounted: Mount) -> None:
    inside = _in_namespace(unmounted, _CHANGE + _LOOK).ok()
    unmounted.mount()
    outside = _in_rootfs(unmounted, _LOOK).ok()
    assert "./etc/new" in inside and "./bin/ls" not in inside
    assert outside == inside


def test_roots_store_is_refused_in_a_user_namespace(unmounted: Mount) -> None:
    unmounted.mount()
    unmounted.umount()
    inside = _in_namespace(unmounted, "true")
    if unmounted.person.is_root:
        assert inside.code == 1
        assert "mount it as root outside of a user namespace" in inside.err.splitlines()[0]
    else:
        assert inside.ok() == ""
