"""Containers that the kernel serves: how one comes in, who may take them away, and what a crash leaves.

That they are what the union shows the other files of this directory test, with `person` "erofs" or "overlay".
"""

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rig.damage import change_middle
from rig.images import Images
from rig.mounts import Mount, Place, drop_names, wait_until
from rig.requirements import need

from fusestore.erofsmount import mounts_files

pytestmark = [pytest.mark.mounted, pytest.mark.images]

PERSONS = ("erofs", "overlay")

by_erofs = pytest.mark.parametrize("person", ["erofs"], indirect=True)

RACING = 200 if os.environ.get("FUSESTORE_TEST_PROFILE") == "long" else 20
"""Containers at once."""

FIRST_STEPS = {
    "stat": "stat $1/etc/hostname",
    "ls": "ls $1 | grep -q etc",
    "open": "cat $1/etc/hostname",
    "setxattr": "setfattr -n user.x -v y $1",
    "getxattr": "getfattr --absolute-names -d $1",
    "chmod": "chmod 755 $1",
    "chdir": "cd $1 && cat etc/hostname",
    "chroot": "chroot $1 /bin/true",
    "O_PATH": "python3 -c 'import os, sys; os.stat(\"etc\", dir_fd=os.open(sys.argv[1], os.O_PATH))' $1",
    "rename": "echo x > $1/a && mv $1/a $1/b",
    "mkdir": "mkdir -p $1/new",
    "create": "echo x > $1/created",
    "exec": "$1/bin/busybox true",
    "bind": "unshare -m mount --bind $1 /mnt",
}


def _overlays(mount: Mount) -> list[str]:
    """Where something is mounted below the mount point."""
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [fields[4] for fields in lines if fields[4].startswith(f"{mount.mountpoint}/")]


def _kill(mount: Mount) -> None:
    (pid,) = mount.pids()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not mount.pids())


def test_the_kernel_serves_who_enters_and_none_before(fresh: Mount) -> None:
    fresh.sh("mkdir containers/a containers/b; ls -l containers; cat containers/a/metadata.json").ok()
    assert _overlays(fresh) == []
    assert fresh.sh("cat containers/a/rootfs/etc/hostname; stat -f -c %T containers/a/rootfs").ok() == (
        "busybox\noverlayfs\n"
    )
    assert _overlays(fresh) == [f"{fresh.containers}/a/rootfs"]


@pytest.mark.parametrize("step", FIRST_STEPS)
@pytest.mark.parametrize("where", ["from anywhere", "from the container's directory"])
def test_whatever_comes_first_is_led_in(fresh: Mount, step: str, where: str) -> None:
    path = "containers/c/rootfs" if where == "from anywhere" else "rootfs"
    enter = "" if where == "from anywhere" else "cd containers/c; sleep 0.1;"
    for moment in ("after mkdir", "after a mount"):
        if moment == "after mkdir":
            fresh.sh("mkdir containers/c").ok()
        else:
            fresh.umount()
            fresh.mount()
        result = fresh.sh(f"{enter} set -- {path}; {FIRST_STEPS[step]}")
        assert result.code == 0, f"{moment}: {result.err}"
        assert _overlays(fresh) == [f"{fresh.containers}/c/rootfs"]


def test_all_first_steps_at_once_are_led_in(fresh: Mount) -> None:
    """In many containers at once: whoever waited for an answer that does not come would be late."""
    steps = "\n".join(f"({step}) > /dev/null 2>> $2 & " for step in FIRST_STEPS.values())
    script = f"""
        led_in() {{ set -- $PWD/containers/$1/rootfs $2; {steps}
        wait; }}
        for ((number = 0; number < $2; number++)); do
            mkdir containers/c$number; led_in c$number $1 &
        done; wait; cat $1
    """
    assert fresh.sh(script, fresh.base / "errors", str(RACING), deadline_s=12 * RACING).ok() == ""
    assert len(_overlays(fresh)) == RACING


def test_umount_while_somebody_enters_is_done_or_refused(fresh: Mount) -> None:
    script = """
        cd /
        for number in {1..5}; do
            for one in {1..5}; do cat $1/containers/c$one/rootfs/etc/hostname & done > /dev/null 2>&1
            until fusestore umount $1 2> $2; do grep -q busy $2 || cat $2; wait; done
            wait; fusestore mount --driver $3 $1
        done
    """
    fresh.sh("mkdir containers/c{1..5}").ok()
    assert (
        fresh.sh(script, fresh.mountpoint, fresh.base / "said", fresh.person.driver, deadline_s=240).ok()
        == ""
    )
    assert fresh.sh("cat containers/c{1..5}/rootfs/etc/hostname | sort -u").ok() == "busybox\n"


@pytest.mark.parametrize("others", [("", "union"), ("union", ""), ("", "")], ids=repr)
def test_a_store_is_mounted_by_the_kernel_only_once(unmounted: Mount, others: tuple[str, str]) -> None:
    own = unmounted.person.driver
    drivers = [other or own for other in others]
    second = unmounted.base / "second"
    second.mkdir()
    unmounted.fusestore("mount", "--driver", drivers[0], unmounted.mountpoint).ok()
    refused = unmounted.fusestore("mount", "--driver", drivers[1], second)
    assert (refused.code, f"by {own} it can be mounted once" in refused.err) == (1, True)
    assert not os.path.ismount(second)
    unmounted.sh("mkdir containers/c; cat containers/c/rootfs/etc/hostname").ok()


@pytest.mark.parametrize(
    "take_away",
    (
        lambda mount: mount.sh("rmdir containers/c"),
        lambda mount: mount.sh("rm -r containers/c"),
        lambda mount: mount.fusestore("rm", "c"),
    ),
    ids=("rmdir", "rm -r", "command"),
)
def test_a_container_that_nobody_is_in_goes(fresh: Mount, take_away: Callable[[Mount], object]) -> None:
    fresh.sh("mkdir containers/c; echo x > containers/c/rootfs/file").ok()
    take_away(fresh).ok()  # type: ignore[attr-defined]
    assert _overlays(fresh) == []
    assert fresh.sh("ls containers").ok() == ""


@pytest.mark.parametrize("take_away", ("rmdir containers/c", "mv containers/c containers/d", "fusestore rm c",
                                       "rm -r containers/c"))  # fmt: skip
def test_a_container_that_somebody_is_in_stays_whole(fresh: Mount, take_away: str) -> None:
    fresh.sh("mkdir containers/c; echo x > containers/c/rootfs/file").ok()
    script = f"exec 3< containers/c/rootfs/file; {take_away}; code=$?; cat <&3; exit $code"
    result = fresh.sh(script)
    result.fails_with(errno.EBUSY) if "fusestore" not in take_away else None
    assert result.code and result.out == "x\n"
    assert fresh.sh("cat containers/c/rootfs/file containers/c/rootfs/etc/hostname").ok() == "x\nbusybox\n"


def test_mv_takes_the_content_along(fresh: Mount) -> None:
    fresh.sh("mkdir containers/c; echo x > containers/c/rootfs/file; mv containers/c containers/d").ok()
    assert fresh.sh("cat containers/d/rootfs/file").ok() == "x\n"
    assert _overlays(fresh) == [f"{fresh.containers}/d/rootfs"]


def test_starting_and_stopping_leave_the_mount_to_who_is_in_it(fresh: Mount) -> None:
    fresh.sh("mkdir containers/c").ok()
    script = "exec 3> containers/c/rootfs/file; fusestore start c; fusestore stop c; echo y >&3; cat $1"
    assert fresh.sh(script, "containers/c/rootfs/file").ok().endswith("y\n")
    assert len(_overlays(fresh)) == 1


def test_few_descriptors_serve_many_containers(unmounted: Mount) -> None:
    """The oldest are unmounted where nobody is in them."""
    words = ("ulimit -n 256; exec fusestore mount --driver $1 $2", "bash", unmounted.person.driver)
    unmounted.person.run("bash", "-c", *words, unmounted.mountpoint, env=unmounted.environment).ok()
    looks = """
        for i in {1..80}; do mkdir containers/$i && echo $i > containers/$i/rootfs/id || exit 1; done
        cat containers/{1..4}/rootfs/id | wc -l
    """
    assert unmounted.sh(looks, deadline_s=240).ok() == "4\n"
    assert len(_overlays(unmounted)) == 64


def _lookups(mount: Mount) -> int:
    report = json.loads(mount.fusestore("status", mount.mountpoint, "--json").ok())
    return int(report["requests"]["lookup"]["count"])


def test_paths_from_outside_ask_the_daemon_once_in_a_while(fresh: Mount) -> None:
    fresh.sh("mkdir containers/c; stat containers/c/rootfs/etc/hostname").ok()
    before, started = _lookups(fresh), time.monotonic()
    fresh.sh("for i in {1..1000}; do test -e containers/c/rootfs/etc/hostname || exit 1; done").ok()
    assert _lookups(fresh) - before < 100 + 10 * (time.monotonic() - started)


@pytest.mark.parametrize(
    "remove",
    ["rm -rf containers/c", "cd containers/c && rm -rf *", "cd containers/c && rm -rf metadata.json rootfs"],
)
def test_nothing_is_removed_of_what_others_walk_into_all_along(fresh: Mount, remove: str) -> None:
    """Their walks have the kernel believe the name; who was refused must be asked about it all the same."""
    script = """
        mkdir containers/c; exec 3< containers/c/rootfs/bin/busybox
        (while test -e containers/c/rootfs/etc/hostname; do :; done; echo lost) & walker=$!
        for i in {1..10}; do (eval "$1") 2> $2 && echo removed; sleep 0.05; done
        kill $walker; wait
        ls containers/c/rootfs/bin/busybox containers/c/rootfs/etc/hostname
    """
    found = fresh.sh(script, remove, fresh.base / "errors")
    assert found.out == "containers/c/rootfs/bin/busybox\ncontainers/c/rootfs/etc/hostname\n"


def test_whatever_comes_first_after_a_mount_was_given_back_is_led_in(fresh: Mount) -> None:
    """The kernel believed the name just before."""
    script = """
        mkdir containers/$1 && stat containers/$1/rootfs/etc/hostname && mv containers/$1 containers/x &&
        mv containers/x containers/$1 && set -- containers/$1/rootfs &&
    """
    for number, step in enumerate(FIRST_STEPS.values()):
        fresh.sh(f"{script}{step}", str(number)).ok()
    assert len(_overlays(fresh)) == len(FIRST_STEPS)


def test_what_was_unmounted_by_hand_is_mounted_again(fresh: Mount) -> None:
    fresh.sh("mkdir containers/c; echo x > containers/c/rootfs/file; umount containers/c/rootfs").ok()
    assert fresh.sh("cat containers/c/rootfs/file").ok() == "x\n"


def test_what_was_unmounted_by_hand_is_not_taken_for_what_was_mounted_since(fresh: Mount) -> None:
    """The ids in mountinfo are given out again."""
    elsewhere = fresh.base / "elsewhere"
    elsewhere.mkdir()
    script = """
        mkdir containers/c; echo x > containers/c/rootfs/file
        umount containers/c/rootfs; for i in {1..20}; do mount -t tmpfs none $1; done
        cat containers/c/rootfs/file; for i in {1..20}; do umount $1; done
    """
    assert fresh.sh(script, elsewhere).ok() == "x\n"


def test_umount_is_refused_while_somebody_is_in_a_container(fresh: Mount) -> None:
    fresh.sh("mkdir containers/c").ok()
    assert fresh.sh("cd containers/c/rootfs; fusestore umount $1", fresh.mountpoint).code == 1
    assert fresh.sh("cat containers/c/rootfs/etc/hostname").ok() == "busybox\n"


def _has_own_mounts(process: "subprocess.Popen[bytes]") -> bool:
    return os.readlink(f"/proc/{process.pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt")


def test_umount_is_done_where_another_namespace_keeps_a_container(fresh: Mount) -> None:
    """And it is said who does. EROFS has files of the mount open: that did not let it be unmounted."""
    fresh.sh("mkdir containers/c; cat containers/c/rootfs/etc/hostname").ok()
    command = ["unshare", "--mount", "--propagation", "private", "sleep", "60"]
    with subprocess.Popen(command) as keeper:
        try:
            wait_until(lambda: _has_own_mounts(keeper))
            result = fresh.fusestore("umount", fresh.mountpoint)
            assert (result.code, fresh.is_mounted()) == (1, False)
            assert (
                f"unmounted here, and served on: still mounted for process {keeper.pid} (sleep" in result.err
            )
        finally:
            keeper.kill()
    wait_until(lambda: not fresh.pids())


def test_umount_says_where_a_container_is_mounted_besides(fresh: Mount) -> None:
    elsewhere = fresh.base / "elsewhere"
    elsewhere.mkdir()
    fresh.sh("mkdir containers/c; mount --bind containers/c/rootfs $1", elsewhere).ok()
    result = fresh.fusestore("umount", fresh.mountpoint)
    assert (result.code, fresh.is_mounted()) == (1, False)
    assert f"still mounted for {elsewhere}. End or unmount that" in result.err
    assert fresh.person.run("cat", elsewhere / "etc/hostname").ok() == "busybox\n"
    subprocess.run(["umount", elsewhere], check=True, timeout=30)
    wait_until(lambda: not fresh.pids())


def test_what_a_killed_daemon_left_is_taken_away(fresh: Mount) -> None:
    fresh.sh("mkdir containers/c; echo x > containers/c/rootfs/file; ls containers/c/rootfs/bin").ok()
    _kill(fresh)
    assert len(_overlays(fresh)) == 1
    fresh.mount()
    assert _overlays(fresh) == []
    assert fresh.sh("cat containers/c/rootfs/file").ok() == "x\n"


def _lose_daemon(mount: Mount) -> None:
    _kill(mount)
    mount.mount()


def _go_on_with_the_union(mount: Mount) -> None:
    _kill(mount)
    mount.fusestore("mount", "--driver", "union", mount.mountpoint).ok()


@pytest.mark.parametrize(
    "lose_mount",
    (_lose_daemon, _go_on_with_the_union, lambda mount: mount.sh("umount -l containers/c/rootfs").ok()),
    ids=("killed daemon", "killed daemon, then the union", "umount -l"),
)
def test_a_container_waits_for_who_is_left_in_a_lost_mount(
    fresh: Mount, lose_mount: Callable[[Mount], object]
) -> None:
    """What else changes the directories of theirs beside it would be undefined behavior."""
    fresh.sh("mkdir containers/c containers/other").ok()
    script = [
        "bash",
        "-c",
        "exec 3> $1/file; echo; read; echo written >&3",
        "bash",
        f"{fresh.containers}/c/rootfs",
    ]
    with subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as left:
        try:
            assert left.stdin and left.stdout and left.stdout.readline() == b"\n"
            lose_mount(fresh)
            for attempt in ("echo x > c/rootfs/file", "rmdir c", "rm -r c", "mv c d"):
                fresh.sh(f"cd containers; {attempt}").fails_with(errno.EBUSY)
            assert fresh.sh("cat containers/other/rootfs/etc/hostname").ok() == "busybox\n"
            left.communicate(b"\n", timeout=30)
        finally:
            left.kill()
    assert fresh.sh("cat containers/c/rootfs/file").ok() == "written\n"


@pytest.mark.parametrize("image", ["busybox", "debian", "corners"])
@by_erofs
def test_check_repairs_the_image_of_names_that_the_kernel_has(
    fresh: Mount, images: Images, image: str
) -> None:
    fresh.fusestore("import", getattr(images, image).source).ok()
    fresh.fusestore("create", image, "c").ok()
    count = "ls -AR containers/c/rootfs | sha256sum"
    listed = fresh.sh(count).ok()
    assert fresh.fusestore("check").ok() == ""
    fresh.umount()
    (path,) = fresh.store.glob("images/*/erofs.1")
    change_middle(path)
    assert fresh.fusestore("check").code == 1
    fresh.fusestore("check", "--repair").ok()
    fresh.mount()
    assert fresh.sh(count).ok() == listed


def test_nobody_hangs_when_the_daemon_is_killed_as_they_enter(fresh: Mount) -> None:
    steps = "\n".join(f"({step}) & " for step in FIRST_STEPS.values())
    script = f"""
        led_in() {{ set -- $PWD/containers/$1/rootfs; {steps}
        wait; }}
        for ((number = 0; number < $2; number++)); do
            mkdir containers/c$number; led_in c$number &
        done > /dev/null 2>&1
        kill -KILL $1; wait; true
    """
    fresh.sh(script, str(fresh.pids()[0]), str(RACING), deadline_s=12 * RACING).ok()
    fresh.mount()
    fresh.sh("[ -e containers/c7 ] || mkdir containers/c7").ok()
    assert fresh.sh("cat containers/c7/rootfs/etc/hostname").ok() == "busybox\n"
    fresh.fusestore("check").ok()


def test_what_was_changed_is_there_after_the_kernel_forgot_it(fresh: Mount) -> None:
    """It looks for what a file was copied from; what it finds it must find again the next time."""
    fresh.sh("mkdir containers/c; echo new >> containers/c/rootfs/etc/hostname").ok()
    drop_names()
    look = "cd containers/c/rootfs; for try in 1 2 3; do tail -n 1 etc/hostname; done"
    assert fresh.sh(look).ok() == "new\nnew\nnew\n"


def test_inode_numbers_of_what_was_changed_are_kept_where_erofs_is_below(fresh: Mount) -> None:
    number = "stat -c %i containers/c/rootfs/etc/hostname"
    before = fresh.sh(f"mkdir containers/c; {number}").ok()
    assert fresh.sh(f"touch containers/c/rootfs/etc/hostname; {number}").ok() == before
    linked = fresh.sh("cd containers/c/rootfs/etc; ln hostname link; stat -c %i link; echo x >> link").ok()
    assert (linked == before) == (fresh.person.driver == "erofs")
    assert fresh.sh("cat containers/c/rootfs/etc/hostname").ok() == "busybox\nx\n"
    drop_names()
    assert (fresh.sh(number).ok() == before) == (fresh.person.driver == "erofs")


def test_link_counts_and_sizes_are_overlayfs_own(fresh: Mount) -> None:
    fresh.sh("mkdir containers/c").ok()
    links, size = fresh.sh("stat -c '%h %s' containers/c/rootfs").ok().split()
    assert links == "1" and int(size) > 0


@by_erofs
def test_o_direct_is_for_files_that_were_written_to(fresh: Mount) -> None:
    fresh.sh("mkdir containers/c").ok()
    result = fresh.sh("dd if=containers/c/rootfs/etc/hostname iflag=direct of=/dev/null")
    result.fails_with(errno.EINVAL)


@by_erofs
def test_lists_are_for_files_that_were_changed(fresh: Mount) -> None:
    fresh.sh("mkdir containers/c").ok()
    give = "setfacl -m u:12:r containers/c/rootfs/etc/passwd"
    fresh.sh(give).fails_with(errno.EOPNOTSUPP)
    fresh.sh(f"touch containers/c/rootfs/etc/passwd; {give}").ok()


def test_hard_links_of_the_image_part_when_one_is_written_to(mounted: Mount) -> None:
    name = mounted.new_id()
    mounted.fusestore("create", "debian", name).ok()
    script = (
        "cd containers/$1/rootfs/upper; echo four >> linked-2; tail -n 1 linked-1 linked-2 | grep -c four"
    )
    assert mounted.sh(script, name).ok() == "1\n"
    mounted.sh("rmdir containers/$1", name).ok()


@pytest.mark.parametrize("command", ["rmdir containers/c/rootfs", "mv containers/c/rootfs containers/c/x"])
def test_a_rootfs_that_was_entered_is_busy(fresh: Mount, command: str) -> None:
    fresh.sh("mkdir containers/c; ls containers/c/rootfs").ok()
    fresh.sh(command).fails_with(errno.EBUSY)
    assert fresh.sh("cat containers/c/rootfs/etc/hostname").ok() == "busybox\n"


def test_a_container_with_a_mountlabel_is_the_unions(fresh: Mount) -> None:
    label = "system_u:object_r:container_file_t:s0"
    fresh.fusestore("create", "default", "c", "--label", label).ok()
    shown = fresh.sh("getfattr --only-values -n security.selinux containers/c/rootfs/etc/hostname").ok()
    assert shown.rstrip("\0\n") == label
    assert _overlays(fresh) == []


def test_a_container_with_a_quota_is_the_unions(fresh: Mount) -> None:
    fresh.sh("mkdir containers/c; echo '{\"quota\": 65536}' > containers/c/metadata.json").ok()
    script = "dd if=/dev/zero of=containers/c/rootfs/big bs=1M count=1 conv=fsync"
    fresh.sh(script).fails_with(errno.EDQUOT)
    assert _overlays(fresh) == []


@pytest.mark.parametrize("key", ['"quota": 65536', '"mountlabel": "a:b:c"'])
def test_what_the_kernel_knows_nothing_of_is_refused_while_somebody_is_in(fresh: Mount, key: str) -> None:
    """Once they have left, the container is the union's when it is entered again."""
    script = """
        mkdir containers/c; exec 3< containers/c/rootfs/etc/hostname; echo "{$1}" > containers/c/metadata.json
    """
    fresh.sh(script, key).fails_with(errno.EBUSY)
    assert fresh.sh("jq -c '[.quota, .mountlabel]' containers/c/metadata.json").ok() == "[null,null]\n"
    fresh.sh('echo "{$1}" > containers/c/metadata.json', key).ok()
    if "quota" in key:
        fresh.sh("dd if=/dev/zero of=containers/c/rootfs/x bs=1M count=1 conv=fsync").fails_with(errno.EDQUOT)
    else:
        shown = fresh.sh("getfattr --only-values -n security.selinux containers/c/rootfs/etc").ok()
        assert shown.rstrip("\0\n") == "a:b:c"
    assert _overlays(fresh) == []


def test_a_quota_that_another_process_sets_is_heeded_when_they_have_left(fresh: Mount) -> None:
    fresh.expect("container c: its quota counts when it is entered anew")
    python = fresh.person.run("sh", "-c", 'head -1 "$(command -v fusestore)"').ok()[2:].strip()
    program = """
import os, sys
from fusestore.store import Store
with Store.open(os.environ["FUSESTORE_STORE"], os.environ["FUSESTORE_RUN_DIR"]) as store:
    store.set_container_metadata("c", {"quota": int(sys.argv[1])})
"""
    script = """
        mkdir containers/c; exec 3< containers/c/rootfs/etc/hostname; "$1" -c "$2" 70000
        ls containers > /dev/null; exec 3<&-; "$1" -c "$2" 65536
    """
    fresh.sh(script, python, program).ok()
    fresh.sh("dd if=/dev/zero of=containers/c/rootfs/x bs=1M count=1 conv=fsync").fails_with(errno.EDQUOT)


def test_a_container_without_an_image_is_the_unions(fresh: Mount) -> None:
    fresh.sh("rm images/default; mkdir containers/c; echo x > containers/c/rootfs/x").ok()
    assert fresh.sh("cat containers/c/rootfs/x").ok() == "x\n"
    assert _overlays(fresh) == []
    assert "container c is served by the union: it has no image yet" in fresh.log()


def test_of_a_plain_users_store_the_kernel_has_what_it_understands(unmounted: Mount) -> None:
    (unmounted.store / "scheme").write_text("plain\n")
    unmounted.mount()
    changes = """
        mkdir containers/a containers/b
        cd containers/a/rootfs; rm -r etc; mkdir etc; echo new > etc/new; rm bin/vi; chown 12 tmp
    """
    unmounted.sh(changes).ok()
    assert len(_overlays(unmounted)) == 1
    look = "cd containers/a/rootfs; find . -printf '%p %M %U %s\n' | sort | grep -v ' d'"
    shown = unmounted.sh(look).ok()
    unmounted.umount()
    unmounted.fusestore("mount", "--driver", "union", unmounted.mountpoint).ok()
    assert unmounted.sh(look).ok() == shown
    unmounted.sh("chown 12 containers/a/rootfs/etc/new; touch containers/b/rootfs/root").ok()
    unmounted.umount()
    unmounted.mount()
    assert unmounted.sh(
        "stat -c %u containers/a/rootfs/etc/new; ls containers/b/rootfs/etc"
    ).ok().split() == [*["12", "hostname", "passwd"]]
    assert _overlays(unmounted) == [f"{unmounted.containers}/b/rootfs"]
    assert "a is served by the union: the kernel would misunderstand the xattrs of etc/new" in unmounted.log()


@pytest.mark.parametrize("person", ["user"], indirect=True)
def test_a_plain_user_is_told_to_use_the_union(unmounted: Mount) -> None:
    result = unmounted.fusestore("mount", "--driver", "erofs", unmounted.mountpoint)
    assert (result.code, "use --driver union" in result.err) == (1, True)


WITHOUT_FILE_MOUNTS = """
import sys
from fusestore import kernelrootfs
from fusestore.cli import main
kernelrootfs.mounts_files = lambda file: False
sys.exit(main())
"""


@pytest.fixture
def by_loops(unmounted: Mount) -> Mount:
    """Mounted as where the kernel mounts no files: Linux before 6.12."""
    need("root", os.path.exists("/dev/loop-control"), "there are no loop devices: modprobe loop")
    command = ("python", "-c", WITHOUT_FILE_MOUNTS, "mount", "--driver", "erofs", unmounted.mountpoint)
    unmounted.person.run(*command, env=unmounted.environment).ok()
    return unmounted


def _loops(mount: Mount) -> list[str]:
    """What the loop devices read that are of its store."""
    files = [path.read_text().strip() for path in Path("/sys/block").glob("loop*/loop/backing_file")]
    return [file.removeprefix(f"{mount.store}/") for file in files if file.startswith(f"{mount.store}/")]


@by_erofs
def test_without_file_mounts_the_kernel_reads_loop_devices(by_loops: Mount) -> None:
    sums = "find . -xdev -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum"
    by_loops.sh("mkdir containers/a containers/b; echo x > containers/a/rootfs/new").ok()
    assert by_loops.sh("cat containers/*/rootfs/etc/hostname containers/a/rootfs/new").ok() == (
        "busybox\nbusybox\nx\n"
    )
    assert sorted(_overlays(by_loops)) == [f"{by_loops.containers}/{name}/rootfs" for name in "ab"]
    (metadata,) = (path.relative_to(by_loops.store) for path in by_loops.store.glob("images/*/erofs.1"))
    tars = [path.relative_to(by_loops.store) for path in by_loops.store.glob("layers/*/tar")]
    assert sorted(_loops(by_loops)) == sorted(map(str, (metadata, *tars)))
    shown = by_loops.sh(f"cd containers/b/rootfs; {sums}").ok()
    assert by_loops.sh(f"cd images/busybox/rootfs; {sums}").ok() == shown
    assert "by loop devices, of images that are hydrated for it" in by_loops.log()


@by_erofs
@pytest.mark.parametrize("step", FIRST_STEPS)
def test_without_file_mounts_whatever_comes_first_is_led_in(by_loops: Mount, step: str) -> None:
    result = by_loops.sh(f"mkdir containers/c; set -- containers/c/rootfs; {FIRST_STEPS[step]}")
    assert result.code == 0, result.err
    assert _overlays(by_loops) == [f"{by_loops.containers}/c/rootfs"]


@by_erofs
def test_loop_devices_go_with_the_last_container(by_loops: Mount) -> None:
    by_loops.sh("mkdir containers/a; cat containers/a/rootfs/etc/hostname").ok()
    assert _loops(by_loops)
    by_loops.sh("rmdir containers/a").ok()
    wait_until(lambda: not _loops(by_loops))


@by_erofs
def test_loop_devices_outlive_no_killed_daemon(by_loops: Mount) -> None:
    by_loops.sh("mkdir containers/a; cat containers/a/rootfs/etc/hostname").ok()
    _kill(by_loops)
    by_loops.mount()
    wait_until(lambda: not _loops(by_loops))
    assert by_loops.sh("cat containers/a/rootfs/etc/hostname").ok() == "busybox\n"


@by_erofs
def test_where_there_are_no_loop_devices_the_union_serves(unmounted: Mount) -> None:
    """In a mount namespace where /dev has none."""
    command = ["python", "-c", WITHOUT_FILE_MOUNTS, "mount", "--driver", "erofs", str(unmounted.mountpoint)]
    script = f"""
        mount --bind /dev/null /dev/loop-control && {shlex.join(command)} && cd {unmounted.containers} &&
        mkdir c && cat c/rootfs/etc/hostname && cd / && fusestore umount {unmounted.mountpoint}
    """
    said = "container c is served by the union: .*no loop device: "
    unmounted.expect(said)
    result = unmounted.person.run("unshare", "--mount", "bash", "-c", script, env=unmounted.environment)
    assert result.ok() == "busybox\n"
    assert re.search(said, unmounted.log())


@by_erofs
@pytest.mark.parametrize(
    ("make_file", "found"),
    [
        (lambda base: os.open(base, os.O_TMPFILE | os.O_RDWR), True),
        (lambda base: os.memfd_create("image"), False),
    ],
    ids=["disk", "tmpfs"],
)
def test_it_is_tried_whether_files_are_mounted(
    place: Place, make_file: Callable[[Path], int], found: bool
) -> None:
    """EROFS reads no file of a tmpfs (fs/erofs/super.c: read_folio)."""
    file = make_file(place.base)
    try:
        assert mounts_files(file) == found
    finally:
        os.close(file)
