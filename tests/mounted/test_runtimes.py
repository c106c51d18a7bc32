"""Containers under the programs that run them: runc, crun, podman, systemd-nspawn, chroot.

Each starts, writes, exits with the command's code, and what it wrote is there for the next.
"""

import json
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig.mounts import Mount
from rig.people import Person, Result, as_root, root
from rig.requirements import need

pytestmark = [pytest.mark.mounted, pytest.mark.images]

_WRITE = 'echo "$0" >> /root/written; exit 3'
_RUNTIMES = {"runc": "runc", "crun": "crun --cgroup-manager=disabled"}

runtimes = pytest.mark.parametrize("runtime", _RUNTIMES)


@pytest.fixture
def workplace(person: Person) -> Iterator[Path]:
    """A directory for what runtimes keep."""
    path = Path(tempfile.mkdtemp(prefix="runtimes-", dir="/var/tmp"))  # podman wants 50 characters at most
    os.chown(path, person.uid, person.gid)
    yield path
    subprocess.run(["umount", "-q", path / "storage/overlay"], check=False, timeout=30)
    shutil.rmtree(path)


def _sh(mounted: Mount, workplace: Path, script: str, *arguments: str) -> Result:
    """Lines of bash of the person's. cgroup2 is all they see of cgroups: crun refuses machines with both."""
    need("root", os.geteuid() == 0, "mounting cgroup2 needs root")
    person = mounted.person
    alone = 'mount -t cgroup2 none /sys/fs/cgroup; exec "$@"'
    change = ("setpriv", f"--reuid={person.uid}", f"--regid={person.gid}", "--clear-groups")
    env = {**mounted.environment, "HOME": str(workplace), "XDG_RUNTIME_DIR": str(workplace)}
    start = f"cd {shlex.quote(str(workplace))}\ncontainers={shlex.quote(str(mounted.containers))}\n"
    return root().run(
        "unshare", "--mount", "bash", "-ec", alone, "bash", *change, "bash", "-c", start + script, "bash",
        *arguments, env=env,
    )  # fmt: skip


def _runtime(name: str) -> str:
    return f"{_RUNTIMES[name]} --root $PWD/state"


@runtimes
def test_a_bundle_runs_and_what_it_wrote_stays(
    mounted: Mount, workplace: Path, container: str, runtime: str
) -> None:
    script = f"""
        for turn in first second; do
            fusestore bundle $1 $turn -- sh -c '{_WRITE}' $turn
            {_runtime(runtime)} run --bundle $turn $1; echo $?
        done
        cat $containers/$1/rootfs/root/written
    """
    assert _sh(mounted, workplace, script, container).ok() == "3\n3\nfirst\nsecond\n"


@runtimes
def test_a_bundle_without_arguments_runs_the_images_command(
    mounted: Mount, workplace: Path, runtime: str
) -> None:
    change = "ENV GREETING='hello there'", "WORKDIR /srv/x", 'CMD ["sh", "-c", "echo $GREETING in $PWD"]'
    name = mounted.new_id()
    mounted.fusestore("create", "busybox", name).ok()
    options = [word for one in change for word in ("-c", one)]
    image = mounted.fusestore("commit", *options, name, "localhost/greeter").ok().strip()
    mounted.fusestore("rm", name).ok()
    mounted.fusestore("create", image, name).ok()
    script = f"fusestore bundle $1 b; {_runtime(runtime)} run --bundle b $1"
    assert _sh(mounted, workplace, script, name).ok() == "hello there in /srv/x\n"
    mounted.fusestore("rm", name).ok()
    mounted.sh("rmdir images/$1", image).ok()


@runtimes
def test_two_of_one_image_run_at_once(mounted: Mount, workplace: Path, runtime: str) -> None:
    """Each goes on when the other has said, in its own rootfs, who it is."""
    names = [mounted.new_id() for _ in range(2)]
    mounted.sh('for name; do mkdir "containers/$name"; done', *names).ok()
    inside = "hostname > /root/me; until [ -e /root/go ]; do usleep 10000; done"
    script = f"""
        for name; do
            fusestore bundle $name $name -- sh -c '{inside}'
            {_runtime(runtime)} run --bundle $name $name & runs+=($!)
        done
        for name; do until [ -s $containers/$name/rootfs/root/me ]; do sleep 0.01; done; done
        for name; do touch $containers/$name/rootfs/root/go; done
        for run in "${{runs[@]}}"; do wait $run || echo failed; done
        for name; do cat $containers/$name/rootfs/root/me; done
    """
    assert _sh(mounted, workplace, script, *names).ok().split() == names
    mounted.fusestore("rm", *names).ok()


@runtimes
def test_a_running_container_is_in_use_until_it_is_stopped(
    mounted: Mount, workplace: Path, container: str, runtime: str
) -> None:
    run = _runtime(runtime)
    script = f"""
        fusestore bundle $1 b -- sh -c 'echo started > /root/written; exec sleep 1000'
        {run} run --detach --bundle b $1 < /dev/null > out 2>&1
        until [ -s $containers/$1/rootfs/root/written ]; do sleep 0.01; done
        rmdir $containers/$1 2> /dev/null || echo in use
        {run} kill $1 KILL
        until {run} state $1 | grep -q stopped; do sleep 0.01; done
        {run} delete $1
        cat $containers/$1/rootfs/root/written
        rmdir $containers/$1 && echo deleted
    """
    assert _sh(mounted, workplace, script, container).ok() == "in use\nstarted\ndeleted\n"


@as_root
@runtimes
def test_the_user_is_the_one_the_rootfs_knows(unmounted: Mount, workplace: Path, runtime: str) -> None:
    unmounted.options = ("--allow-other",)
    unmounted.mount()
    unmounted.sh("""
        mkdir containers/first; cd containers/first/rootfs
        echo app:x:1000:100::/: > etc/passwd; echo more:x:7:app > etc/group
        fusestore commit -c 'USER app' first app; fusestore create app c
    """).ok()  # fmt: skip
    script = f"fusestore bundle c b -- sh -c 'id -u; id -g; id -G'; {_runtime(runtime)} run --bundle b c"
    assert _sh(unmounted, workplace, script).ok() == "1000\n100\n100 7\n"


@runtimes
def test_devices_work_and_are_the_runtimes_own(
    mounted: Mount, workplace: Path, container: str, runtime: str
) -> None:
    script = f"""
        fusestore bundle $1 b -- sh -c 'echo x > /dev/null; head -c 3 /dev/zero | wc -c'
        {_runtime(runtime)} run --bundle b $1; find $containers/$1/rootfs/dev ! -type d | wc -l
    """
    before = mounted.sh("find containers/$1/rootfs/dev ! -type d 2> /dev/null | wc -l", container).out
    assert _sh(mounted, workplace, script, container).ok() == f"3\n{before}"


def test_podman_runs_a_rootfs(mounted: Mount, workplace: Path, container: str) -> None:
    """Without limits and cgroups, which this machine may not let it set."""
    options = "--rm --cgroups disabled --network none --ulimit nofile=1024:1024 --ulimit nproc=1000:1000"
    storage = "overlay" if mounted.person.is_root else "vfs"
    script = f"""
        podman() {{
            command podman --runtime crun --cgroup-manager cgroupfs --storage-driver {storage} \
                --root $PWD/storage --runroot $PWD/run "$@" 2>> errors
        }}
        for turn in first second; do
            podman run {options} --rootfs $containers/$1/rootfs sh -c '{_WRITE}' $turn; echo $?
        done
        cat $containers/$1/rootfs/root/written || cat errors >&2
        podman system migrate
    """
    assert _sh(mounted, workplace, script, container).ok() == "3\n3\nfirst\nsecond\n"


@as_root
def test_systemd_nspawn_runs_a_rootfs(mounted: Mount) -> None:
    name = mounted.new_id()
    mounted.fusestore("create", "debian", name).ok()
    mounted.sh("mkdir -p containers/$1/rootfs/{usr,root}; echo ID=test > containers/$1/rootfs/etc/os-release",
               name).ok()  # fmt: skip
    script = f"""
        for turn in first second; do
            systemd-nspawn --quiet --register=no --keep-unit --directory $PWD/containers/$1/rootfs \
                sh -c '{_WRITE}' $turn 2> /dev/null; echo $?
        done
        cat containers/$1/rootfs/root/written
    """
    assert mounted.sh(script, name).ok() == "3\n3\nfirst\nsecond\n"
    mounted.fusestore("rm", name).ok()


def test_chroot_runs_a_rootfs(mounted: Mount, container: str) -> None:
    enter = "" if mounted.person.is_root else "unshare --user --map-root-user "
    script = f"""
        for turn in first second; do
            {enter}chroot containers/$1/rootfs sh -c '{_WRITE}' $turn; echo $?
        done
        cat containers/$1/rootfs/root/written
    """
    assert mounted.sh(script, container).ok() == "3\n3\nfirst\nsecond\n"


def test_a_bundle_is_for_who_makes_it(mounted: Mount, container: str) -> None:
    spec = json.loads(mounted.sh("fusestore bundle $1 ../b -- id && cat ../b/config.json && rm -r ../b",
                                 container).ok())  # fmt: skip
    mappings = spec["linux"].get("uidMappings")
    uid = mounted.person.uid
    assert mappings == (None if uid == 0 else [{"containerID": 0, "hostID": uid, "size": 1}])
