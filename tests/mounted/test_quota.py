"""The quota of a container: what is refused when it is reached, and what is counted."""

import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rig.mounts import Mount, Place, wait_until
from rig.people import as_root

pytestmark = [pytest.mark.mounted, pytest.mark.images]

MIB = 1 << 20


def _set(mount: Mount, container: str, quota: int) -> None:
    mount.sh('echo "{\\"quota\\": $2}" > containers/$1/metadata.json', container, str(quota)).ok()


def _rootfs(mount: Mount, container: str) -> Path:
    return mount.containers / container / "rootfs"


def _taken(mount: Mount, container: str) -> int:
    """Bytes on disk."""
    diff = mount.store / "containers" / container / "diff"
    return int(mount.person.run("du", "-s", "-B1", diff).ok().split()[0])


@pytest.fixture
def limited(mounted: Mount, container: str) -> str:
    """The id of a container with a quota of 1 MiB."""
    _set(mounted, container, MIB)
    return container


@pytest.mark.parametrize("quota", ["0", "-1", "1.5", '"1048576"', "true", "null", "[]"])
def test_what_is_no_quota_is_refused(mounted: Mount, limited: str, quota: str) -> None:
    mounted.sh('echo "{\\"quota\\": $2}" > containers/$1/metadata.json', limited, quota).fails_with(
        errno.EINVAL
    )
    assert mounted.sh("jq .quota containers/$1/metadata.json", limited).ok() == f"{MIB}\n"


def _write(path: Path, size: int, end: Callable[[int], object]) -> str:
    """Writes so much and ends with `end`; what the first of the calls to fail says."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(fd, bytes(size))
        end(fd)
        return "done"
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    finally:
        try:
            os.close(fd)
        except OSError:
            pass


def _write_and_sync(path: Path, size: int) -> str:
    return _write(path, size, os.fsync)


def _write_and_close(path: Path, size: int) -> str:
    return _write(path, size, lambda fd: os.close(os.dup(fd)))


@pytest.mark.parametrize(("write", "said"), [(_write_and_sync, "EDQUOT"), (_write_and_close, "EIO")])
def test_writing_beyond_it_is_refused(
    mounted: Mount, limited: str, write: Callable[[Path, int], str], said: str
) -> None:
    """Of what a cached write failed with the kernel keeps for close(2) only whether it was ENOSPC."""
    path = _rootfs(mounted, limited) / "new"
    assert mounted.person.call(write, path, MIB // 2) == "done"
    assert mounted.person.call(write, path, 2 * MIB) == said
    assert _taken(mounted, limited) <= MIB


def _write_mapped(path: Path, size: int) -> str:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.truncate(fd, size)
    with mmap.mmap(fd, size) as mapped:
        mapped[:] = b"x" * size
        try:
            mapped.flush()
            return "done"
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        finally:
            os.close(fd)


def test_writing_a_mapped_file_beyond_it_is_refused(mounted: Mount, limited: str) -> None:
    """Making it longer takes nothing."""
    path = _rootfs(mounted, limited) / "new"
    assert mounted.person.call(_write_mapped, path, MIB // 2) == "done"
    assert mounted.person.call(_write_mapped, path, 2 * MIB) == "EDQUOT"
    assert _taken(mounted, limited) <= MIB


MAKING = {
    "create": "echo x > new",
    "mkdir": "mkdir new",
    "symlink": "ln -s x new",
    "fifo": "mkfifo new",
    "hard link": "ln filler new",
    "copy-up": "chmod 600 bin/busybox",
    "copy-up of a part": "truncate -s 500000 bin/busybox",
    "xattr": "setfattr -n user.x -v y filler",
}
"""What there is no room for."""


def _fill(mount: Mount, container: str) -> None:
    """Takes all of it."""
    mount.sh("cd containers/$1/rootfs; dd if=/dev/zero of=filler bs=4k oflag=direct", container).fails_with(
        errno.EDQUOT
    )


@pytest.mark.parametrize("what", MAKING)
def test_when_it_is_reached_nothing_is_made(mounted: Mount, limited: str, what: str) -> None:
    _fill(mounted, limited)
    mounted.sh(f"cd containers/$1/rootfs; {MAKING[what]}", limited).fails_with(errno.EDQUOT)
    assert mounted.sh("cd containers/$1/rootfs; ls -d new", limited).code != 0


STILL = {
    "overwriting": "dd if=/dev/urandom of=filler bs=4k count=4 conv=notrunc,fsync status=none",
    "reading": "cmp -n 100 filler /dev/zero",
    "renaming": "mv filler elsewhere",
    "removing what is new": "rm filler",
    "removing what is the image's": "rm bin/busybox",
    "truncating": "truncate -s 0 filler",
    "modes": "chmod 600 filler",
}
"""What goes on."""


@pytest.mark.parametrize("what", STILL)
def test_when_it_is_reached_the_rest_goes_on(mounted: Mount, limited: str, what: str) -> None:
    _fill(mounted, limited)
    mounted.sh(f"cd containers/$1/rootfs; {STILL[what]}", limited).ok()


RELEASES = {
    "rm": "rm big",
    "rm of an open file": "exec 3< big; rm big; exec 3<&-",
    "truncate": "truncate -s 0 big",
    ">": ": > big",
    "mv over it": "touch small; mv small big",
    "rm -r": "mkdir d; mv big d; rm -r d",
    "rm of both its links": "ln big other; rm big other",
}


@pytest.mark.parametrize("how", RELEASES)
def test_what_is_given_back_can_be_taken_again(mounted: Mount, limited: str, how: str) -> None:
    """Ten times what fits, and afterwards no more than fits."""
    script = f"""
        cd containers/$1/rootfs
        for i in 1 2 3 4 5 6 7 8 9 10; do
            dd if=/dev/zero of=big bs=1k count=700 conv=fsync status=none || exit
            {RELEASES[how]}
        done
        rm -f big
    """
    mounted.sh(script, limited).ok()
    path = _rootfs(mounted, limited) / "new"
    assert mounted.person.call(_write_and_sync, path, MIB * 3 // 4) == "done"
    assert mounted.person.call(_write_and_sync, path, MIB) == "EDQUOT"


def test_what_is_removed_counts_while_it_is_open(mounted: Mount, limited: str) -> None:
    script = """
        cd containers/$1/rootfs
        dd if=/dev/zero of=big bs=1k count=700 conv=fsync status=none; exec 3< big; rm big
        dd if=/dev/zero of=new bs=1k count=700 conv=fsync status=none
    """
    mounted.sh(script, limited).fails_with(errno.EDQUOT)


def test_a_file_with_holes_takes_what_it_holds(mounted: Mount, limited: str) -> None:
    mounted.sh("cd containers/$1/rootfs; truncate -s 1G holes; cp --sparse=always holes copy", limited).ok()


def test_what_was_there_before_counts(mounted: Mount, container: str) -> None:
    mounted.sh(
        "dd if=/dev/zero of=containers/$1/rootfs/x bs=1k count=700 conv=fsync status=none", container
    ).ok()
    _set(mounted, container, MIB)
    path = _rootfs(mounted, container) / "new"
    assert mounted.person.call(_write_and_sync, path, MIB // 2) == "EDQUOT"


def _write_twice(path: Path, metadata: Path) -> list[str]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    results = []
    for quota in ('{"quota": 1048576}', "{}"):
        metadata.write_text(quota)
        try:
            os.write(fd, bytes(2 * MIB))
            os.fsync(fd)
            results.append("done")
        except OSError as error:
            results.append(errno.errorcode[error.errno or 0])
    return results


def test_it_holds_and_is_lifted_for_what_is_open_already(mounted: Mount, container: str) -> None:
    path, metadata = _rootfs(mounted, container) / "x", mounted.containers / container / "metadata.json"
    assert mounted.person.call(_write_twice, path, metadata) == ["EDQUOT", "done"]


def test_workdir_is_free_of_it(mounted: Mount, limited: str) -> None:
    path = mounted.containers / limited / "workdir/x"
    assert mounted.person.call(_write_and_sync, path, 2 * MIB) == "done"


def test_df_shows_the_disk_of_the_store(mounted: Mount, limited: str) -> None:
    """pyfuse3 does not say where statfs(2) was asked."""
    inside, outside = mounted.sh("stat -fc %b containers/$1/rootfs; stat -fc %b .", limited).ok().split()
    assert inside == outside


def test_it_holds_after_another_mount(fresh: Mount) -> None:
    fresh.sh("mkdir containers/a").ok()
    _set(fresh, "a", MIB)
    path = _rootfs(fresh, "a") / "x"
    assert fresh.person.call(_write_and_sync, path, MIB // 2) == "done"
    fresh.umount()
    fresh.mount()
    assert fresh.person.call(_write_and_sync, path, MIB) == "EDQUOT"


def test_another_process_sets_it(fresh: Mount) -> None:
    fresh.sh("mkdir containers/a; echo > containers/a/rootfs/x").ok()
    script = """
from fusestore.store import Store
import os
with Store.open(os.environ["FUSESTORE_STORE"], os.environ["FUSESTORE_RUN_DIR"]) as store:
    store.set_container_metadata("a", {"quota": 1 << 20})
"""
    python = fresh.person.run("sh", "-c", 'head -1 "$(command -v fusestore)"').ok()[2:].strip()
    fresh.person.run(python, "-c", script, env=fresh.environment).ok()
    path = _rootfs(fresh, "a") / "x"
    wait_until(lambda: fresh.person.call(_write_and_sync, path, 2 * MIB) == "EDQUOT")


@as_root
def test_what_xfs_gives_back_of_a_closed_file_can_be_taken_again(place: Place) -> None:
    """While a file grows it has more blocks than it needs."""
    script = """
        cd $1; truncate -s 320M disk; mkfs.xfs -q disk; mkdir xfs here; mount -o loop disk xfs
        trap 'fusestore umount here; umount xfs' EXIT
        export FUSESTORE_STORE=$1/xfs/store
        umoci init --layout image; umoci new --image image:empty
        fusestore import oci:image:empty > /dev/null; fusestore mount here
        mkdir here/containers/a; echo '{"quota": 8388608}' > here/containers/a/metadata.json
        for i in $(seq 40); do
            dd if=/dev/zero of=here/containers/a/rootfs/x bs=4k count=300 oflag=direct status=none
            rm here/containers/a/rootfs/x
        done
    """
    place.person.run("bash", "-ec", script, "bash", place.base, env=place.environment).ok()
