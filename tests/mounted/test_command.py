"""fusestore mount and umount as processes: what they leave, what they say when they cannot (issue: CLI)."""

import json
import os
import signal
import stat
import subprocess
from datetime import datetime
from pathlib import Path

import pytest
from rig.images import Images
from rig.mounts import Mount, Place, wait_until
from rig.people import as_root, as_user

pytestmark = [pytest.mark.mounted, pytest.mark.images]


def _says(result_err: str, *words: str) -> None:
    assert result_err.startswith("fusestore: ") and result_err.count("\n") == 1, result_err
    for word in words:
        assert word in result_err


def test_mount_returns_when_the_mount_answers(unmounted: Mount) -> None:
    assert unmounted.fusestore("mount", unmounted.mountpoint).ok() == ""
    assert unmounted.sh("ls").ok().split() == ["containers", "images", "views"]


def test_umount_returns_when_the_process_has_gone(fresh: Mount) -> None:
    assert fresh.pids() != []
    fresh.fusestore("umount", fresh.mountpoint).ok()
    assert fresh.pids() == []
    assert not fresh.is_mounted()


def test_the_process_has_left_the_terminal(fresh: Mount) -> None:
    (pid,) = fresh.pids()
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert os.getsid(pid) != os.getsid(0)
    assert os.readlink(f"/proc/{pid}/fd/0") == "/dev/null"
    assert os.readlink(f"/proc/{pid}/fd/2").startswith(str(fresh.run_dir))


def test_a_relative_mount_point_and_store_work(unmounted: Mount) -> None:
    options = ("--store", "store", "--run-dir", "run")
    unmounted.fusestore("mount", "mnt", *options, cwd=unmounted.base).ok()
    assert unmounted.sh("ls images/busybox/").code == 0
    unmounted.fusestore(*options, "umount", "./mnt/", cwd=unmounted.base).ok()


@pytest.mark.parametrize("name", ["store", "a, b\\c"])
def test_a_mount_names_its_store_as_its_source(unmounted: Mount, name: str) -> None:
    script = """
        cp -a store "$1"; export FUSESTORE_STORE=$PWD/$1
        fusestore mount mnt; findmnt --noheadings --raw --output SOURCE mnt; fusestore umount mnt
    """
    if name == "store":
        script = script.replace('cp -a store "$1"; ', "")
    result = unmounted.person.run("bash", "-c", script, "bash", name, cwd=unmounted.base,
                                  env=unmounted.environment)  # fmt: skip
    assert result.ok().strip().replace("\\x20", " ").replace("\\x5c", "\\") == f"{unmounted.base}/{name}"


def test_fusermount_ends_the_process_too(fresh: Mount) -> None:
    command = ["umount"] if fresh.person.is_root else ["fusermount3", "-u"]
    fresh.person.run(*command, fresh.mountpoint).ok()
    wait_until(lambda: fresh.pids() == [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_unmounts(fresh: Mount, number: signal.Signals) -> None:
    (pid,) = fresh.pids()
    os.kill(pid, number)
    wait_until(lambda: fresh.pids() == [] and not fresh.is_mounted())


_HOLDER = """
    cd /; mkdir $1/containers/a
    coproc holder { python3 -c '
import mmap, sys
with open(sys.argv[1], "w+b") as file:
    file.write(b"written " * 9000)
    file.flush()
    with mmap.mmap(file.fileno(), 72000) as mapped:
        mapped[-8:] = b"a mapped"
        print("ready", flush=True)
        input()
' $1/containers/a/rootfs/x 2> /dev/null; }
    read -u ${holder[0]}
    kill -TERM $2
    while mountpoint -q $1; do sleep 0.02; done
"""
"""Leaves a process that holds a file with pages that nobody wrote, of a mount that was told to end ($2)."""


def _assert_all_was_written(mount: Mount) -> None:
    written = (mount.store / "containers/a/diff/x").read_bytes()
    assert (len(written), written[:8], written[-8:]) == (72000, b"written ", b"a mapped")


def test_sigterm_serves_an_open_file_until_it_is_closed(fresh: Mount) -> None:
    (pid,) = fresh.pids()
    script = (
        _HOLDER
        + "kill -0 $2 && echo >&${holder[1]} && wait $holder_PID && tail --pid=$2 -s 0.05 -f /dev/null"
    )
    fresh.sh(script, fresh.mountpoint, str(pid)).ok()
    assert fresh.pids() == []
    _assert_all_was_written(fresh)


def test_a_second_signal_ends_a_busy_mount_and_loses_nothing(fresh: Mount) -> None:
    (pid,) = fresh.pids()
    fresh.expect("still in use")
    script = _HOLDER + "kill -TERM $2; tail --pid=$2 -s 0.05 -f /dev/null; kill $holder_PID"
    fresh.sh(script, fresh.mountpoint, str(pid)).ok()
    assert fresh.pids() == []
    _assert_all_was_written(fresh)


@as_root
def test_what_was_written_survives_a_power_cut_after_umount(place: Place, images: Images) -> None:
    """The store's disk is a file; its copy, made right after, is what a machine without power would find."""
    disk, copy = place.base / "disk", place.base / "copy"
    script = """
        trap 'umount -lq mnt $3 2> /dev/null || true' EXIT
        truncate -s 64M $1; mkfs.ext4 -q $1; mkdir $3; mount -o loop,commit=600 $1 $3
        FUSESTORE_STORE=$3/store; export FUSESTORE_STORE
        fusestore import $4 > /dev/null; fusestore mount mnt; mkdir mnt/containers/a
        sync -f $3
        echo survives > mnt/containers/a/rootfs/x; fusestore umount mnt
        cp $1 $2; umount $3
        mount -o loop $2 $3; cat $3/store/containers/a/diff/x; umount $3
    """
    result = place.person.run(
        "bash", "-euc", script, "bash", disk, copy, place.base / "at", images.busybox.source,
        cwd=place.base, env=place.environment,
    )  # fmt: skip
    assert result.ok() == "survives\n"


def test_umount_of_a_busy_mount_is_refused(fresh: Mount) -> None:
    result = fresh.sh("fusestore umount $PWD")
    assert result.code == 1
    _says(result.err, "busy")
    assert fresh.sh("ls images").code == 0


_KEEPER = """
    store=$1; shift
    unshare "$@" sleep 1000 & keeper=$!
    trap 'kill $keeper' EXIT
    until [ "$(cat /proc/$keeper/comm)" = sleep ]; do sleep 0.02; done
    fusestore umount $store 2> said && exit 9
"""
"""Has the mount $1 kept by a mount namespace, and unmounted here."""


def _kept(mount: Mount, script: str) -> str:
    options = ["--mount"] if mount.person.is_root else ["--user", "--map-root-user", "--mount"]
    words = ("bash", "-c", _KEEPER + script, "bash", mount.mountpoint, *options)
    return mount.person.run(*words, cwd=mount.base, env=mount.environment, deadline_s=40).ok()


def test_umount_names_who_keeps_the_mount_elsewhere(fresh: Mount) -> None:
    script = """
        echo $keeper $(wc -l < said) $(cat said)
        fusestore umount $store 2> said; cat said
    """
    first, again = _kept(fresh, script).splitlines()
    pid, lines, said = first.split(" ", 2)
    assert lines == "1" and f"process {pid} (sleep 1000), in a mount namespace" in said
    assert again == said
    assert not fresh.is_mounted()
    wait_until(lambda: fresh.pids() == [])


@as_root
def test_umount_names_where_else_it_is_mounted(fresh: Mount) -> None:
    other = fresh.base / "other"
    fresh.person.run("mkdir", other).ok()
    fresh.person.run("mount", "--bind", fresh.mountpoint, other).ok()
    result = fresh.fusestore("umount", fresh.mountpoint)
    fresh.person.run("umount", other).ok()
    assert result.code == 1
    _says(result.err, f"still mounted for {other}")
    wait_until(lambda: fresh.pids() == [])


def test_a_signal_to_a_mount_that_is_kept_elsewhere_leaves_its_successor_alone(fresh: Mount) -> None:
    (pid,) = fresh.pids()
    fresh.expect("still in use")
    script = f"""
        fusestore mount $store
        while kill -TERM {pid} 2> /dev/null; do sleep 0.05; done
        ls $store
    """
    assert _kept(fresh, script).split() == ["containers", "images", "views"]


def test_umount_waits_only_for_what_it_unmounted(fresh: Mount) -> None:
    assert _kept(fresh, "fusestore mount $store && fusestore umount $store && ls -A $store") == ""
    wait_until(lambda: fresh.pids() == [])


def test_umount_of_nothing_is_refused(unmounted: Mount) -> None:
    result = unmounted.fusestore("umount", unmounted.mountpoint)
    assert result.code == 1
    _says(result.err, "fusestore mount")


def test_a_second_mount_at_one_place_is_refused(fresh: Mount) -> None:
    result = fresh.fusestore("mount", fresh.mountpoint)
    assert result.code == 1
    _says(result.err, "mount point already")


def test_two_mounts_of_one_store_show_the_same(fresh: Mount) -> None:
    second = fresh.base / "second"
    second.mkdir()
    os.chown(second, fresh.person.uid, fresh.person.gid)
    fresh.fusestore("mount", second).ok()
    try:
        fresh.sh("mkdir containers/a && echo x > containers/a/rootfs/x").ok()
        assert fresh.sh("cd $1 && cat containers/a/rootfs/x", second).ok() == "x\n"
        fresh.sh("echo '{\"user\": 1}' > $1/containers/a/metadata.json", second).ok()
        assert fresh.sh("jq .user containers/a/metadata.json").ok() == "1\n"
    finally:
        fresh.fusestore("umount", second).ok()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        ("rm -r mnt", ["does not exist", "mkdir"]),
        ("rm -r mnt; touch mnt", ["not a directory"]),
        ("rm -r mnt; ln -s store mnt", ["lie in each other", "choose another"]),
        ("rm -r mnt; mkdir store/mnt; ln -s store/mnt mnt", ["choose another"]),
        ("rm -r mnt; ln -s run mnt", ["run directory", "choose another"]),
        ("mv run mnt/; ln -s mnt/run run", ["run directory", "choose another"]),
        (
            "mkdir -p deep/mnt; mv run deep/mnt/; ln -s deep/mnt/run run; rmdir mnt; ln -s deep mnt",
            ["choose another"],
        ),
    ],
)
def test_where_no_mount_can_be_is_refused(unmounted: Mount, make: str, words: list[str]) -> None:
    unmounted.person.run("bash", "-c", make, cwd=unmounted.base).ok()
    result = unmounted.fusestore("mount", unmounted.mountpoint)
    assert result.code == 1
    _says(result.err, *words)


def test_a_mount_inside_another_of_its_store_is_refused(fresh: Mount) -> None:
    fresh.sh("mkdir -p containers/a/workdir/mnt").ok()
    result = fresh.fusestore("mount", fresh.containers / "a/workdir/mnt")
    assert result.code == 1
    _says(result.err, f"lies in {fresh.mountpoint}, a mount of the same store", "outside of it")


def test_mount_without_a_store_says_what_to_do(place: Place) -> None:
    result = place.fusestore("mount", place.mountpoint)
    assert result.code == 1
    _says(result.err, "fusestore import")
    assert not place.store.exists()


def _kill(mount: Mount) -> None:
    (pid,) = mount.pids()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: mount.pids() == [])


def test_mount_takes_a_dead_mount_away(fresh: Mount) -> None:
    _kill(fresh)
    fresh.mount()
    assert fresh.sh("ls").ok().split() == ["containers", "images", "views"]
    fresh.umount()
    assert not fresh.is_mounted()


def test_umount_takes_a_dead_mount_away(fresh: Mount) -> None:
    _kill(fresh)
    fresh.umount()
    assert not fresh.is_mounted()
    assert list(fresh.run_dir.glob("*/mounts/*")) == []


def test_a_killed_daemon_loses_nothing_that_was_synced(fresh: Mount) -> None:
    fresh.sh("mkdir containers/a && echo kept > containers/a/rootfs/x && sync containers/a/rootfs/x").ok()
    _kill(fresh)
    assert fresh.fusestore("check").ok() == ""
    fresh.mount()
    assert fresh.sh("cat containers/a/rootfs/x").ok() == "kept\n"


def test_what_ran_in_a_dead_mount_fails_and_starts_again(fresh: Mount) -> None:
    """It is inside when the daemon dies, and stays there: the mount comes back beside it."""
    (pid,) = fresh.pids()
    script = """
        mkdir containers/a; cd containers/a/rootfs; exec 3> open; echo kept > synced; sync synced
        kill -KILL $1; tail --pid=$1 -s 0.05 -f /dev/null
        cat synced; mkdir new; ls /proc/self/cwd/
        (cd / && fusestore mount $2 && cat $2/containers/a/rootfs/synced)
        cat synced
    """
    result = fresh.sh(script, str(pid), fresh.mountpoint)
    assert result.out == "kept\n"
    assert result.err.count("Transport endpoint is not connected") == 4, result.err
    fresh.umount()
    assert fresh.fusestore("check").ok() == ""


@as_user
def test_a_closed_fuse_device_is_explained(unmounted: Mount) -> None:
    device, person = unmounted.base.parent / "closed-fuse", unmounted.person
    os.mknod(device, 0o600 | stat.S_IFCHR, os.stat("/dev/fuse").st_rdev)
    # In a mount namespace of its own: for this command alone the device is closed.
    namespace = ["unshare", "--mount", "bash", "-c", 'mount --bind "$0" /dev/fuse && exec "$@"', str(device)]
    become = ["setpriv", f"--reuid={person.uid}", f"--regid={person.gid}", "--clear-groups"]
    done = subprocess.run(
        [*namespace, *become, "fusestore", "mount", str(unmounted.mountpoint)],
        env=person.environment(**unmounted.environment),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    device.unlink()
    assert done.returncode == 1
    _says(done.stderr, "chmod 0666 /dev/fuse")


@as_root
@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("mount -o remount,ro $PWD/disk; fusestore create busybox", ["Read-only", "mount it writable"]),
        ("mount -o remount,ro $PWD/disk; fusestore mount mnt", ["Read-only", "mount it writable"]),
        ("cat /dev/zero > disk/zero; fusestore create busybox", ["No space left", "make room"]),
        ("cat /dev/zero > disk/zero; fusestore --store disk/new import $1", ["No space left", "make room"]),
    ],
)
def test_a_disk_that_takes_nothing_is_explained(
    place: Place, images: Images, command: str, words: list[str]
) -> None:
    script = f"""
        mkdir disk; mount -t tmpfs -o size=3m none disk; trap 'umount -l disk' EXIT
        export FUSESTORE_STORE=$PWD/disk/store
        fusestore import $1 > /dev/null && {{ {command} 2> error; }} 2> /dev/null; echo $?; cat error >&2
    """
    result = place.person.run(
        "bash", "-c", script, "bash", images.busybox.source, cwd=place.base, env=place.environment
    )
    assert result.out.splitlines()[-1] == "1"
    _says(result.err, *words)


@as_user
def test_why_a_directory_of_roots_cannot_be_mounted_on_is_said(unmounted: Mount) -> None:
    result = unmounted.fusestore("mount", "/mnt")
    assert result.code == 1
    _says(result.err, "/mnt could not be mounted", "user has no write access", "of your own")


@as_user
def test_allow_other_needs_the_permission_of_root(unmounted: Mount) -> None:
    conf = Path("/etc/fuse.conf")
    if conf.exists() and "user_allow_other" in conf.read_text().splitlines():
        unmounted.fusestore("mount", "--allow-other", unmounted.mountpoint).ok()
        return
    result = unmounted.fusestore("mount", "--allow-other", unmounted.mountpoint)
    assert result.code == 1
    _says(result.err, "user_allow_other", "/etc/fuse.conf")


@as_root
def test_allow_other_lets_others_in(unmounted: Mount) -> None:
    unmounted.fusestore("mount", "--allow-other", unmounted.mountpoint).ok()
    others = subprocess.run(
        ["cat", unmounted.images / "busybox/rootfs/etc/hostname"],
        user=65534, capture_output=True, timeout=30, check=True,
    )  # fmt: skip
    assert others.stdout == b"busybox\n"


@as_root
@pytest.mark.parametrize("driver", ["union", "erofs"])
def test_devices_and_set_user_id_bits_act_where_asked_for(unmounted: Mount, driver: str) -> None:
    script = """
        cd $1; shift; fusestore mount --driver $2 --allow-other $1 mnt; cd mnt
        [ -d containers/c ] || mkdir containers/c
        cd containers/c/rootfs; chmod 755 .
        [ -e zero ] || { mknod -m 666 zero c 1 5; cp /usr/bin/id .; chmod 4755 id; }
        head -c 1 zero | od -An -tx1; setpriv --reuid 65534 --clear-groups ./id -u
        cd ../../../..; fusestore umount mnt
    """

    def act(*options: str) -> str:
        words = ("bash", "-c", script, "bash", unmounted.base, " ".join(options), driver)
        return unmounted.person.run(*words, env=unmounted.environment).out

    assert act() == "65534\n"
    assert act("--allow-dev") == " 00\n65534\n"
    assert act("--allow-suid") == "0\n"


@as_user
@pytest.mark.parametrize("option", ["--allow-dev", "--allow-suid"])
def test_only_root_can_let_devices_and_set_user_id_bits_act(unmounted: Mount, option: str) -> None:
    result = unmounted.fusestore("mount", option, unmounted.mountpoint)
    assert (result.code, "are for root's mounts" in result.err) == (1, True)


def test_foreground_logs_to_standard_error(unmounted: Mount) -> None:
    script = """
        cd $1; fusestore mount --foreground mnt 2> log &
        until ls mnt/images > /dev/null 2>&1; do kill -0 $! || { cat log; exit 1; }; done
        fusestore umount mnt; wait $!; code=$?; cat log; exit $code
    """
    result = unmounted.person.run("bash", "-c", script, "bash", unmounted.base, env=unmounted.environment)
    assert " INFO " in result.ok()


def test_a_terminal_that_goes_unmounts_what_it_had_in_the_foreground(unmounted: Mount) -> None:
    script = """
        cd $1; fusestore mount --foreground mnt 2> log &
        until ls mnt/images > /dev/null 2>&1; do kill -0 $! || { cat log; exit 1; }; done
        kill -HUP $!; wait $! && ! mountpoint -q mnt
    """
    unmounted.person.run("bash", "-c", script, "bash", unmounted.base, env=unmounted.environment).ok()


def _log_file(mount: Mount) -> Path:
    (file,) = mount.run_dir.glob("*/mount-*.log")
    return file


def test_sighup_goes_on_in_a_new_log(fresh: Mount) -> None:
    (pid,) = fresh.pids()
    log = _log_file(fresh)
    moved = log.rename(fresh.base / "moved")
    os.kill(pid, signal.SIGHUP)
    wait_until(log.exists)
    wait_until(lambda: os.readlink(f"/proc/{pid}/fd/2") == str(log))
    fresh.umount()
    assert " unmounted " in log.read_text()
    assert " mounted " in moved.read_text() and " unmounted " not in moved.read_text()


def test_a_log_that_cannot_be_opened_anew_goes_on_in_the_old_file(fresh: Mount) -> None:
    (pid,) = fresh.pids()
    log = _log_file(fresh)
    moved = log.rename(fresh.base / "moved")
    log.mkdir()
    os.kill(pid, signal.SIGHUP)
    wait_until(lambda: "the log goes on in the old file" in moved.read_text())
    log.rmdir()
    fresh.umount()
    assert " unmounted " in moved.read_text()


def test_the_log_can_be_json(unmounted: Mount) -> None:
    unmounted.fusestore("mount", "--log-format", "json", unmounted.mountpoint).ok()
    unmounted.sh("mkdir containers/a").ok()
    (unmounted.store / "containers/a/container").write_text("damaged")
    unmounted.sh("cat containers/a/metadata.json")
    unmounted.umount()
    lines = [json.loads(line) for line in unmounted.log().splitlines()]
    assert {frozenset(line) for line in lines} == {frozenset(("time", "level", "logger", "message"))}
    assert all(datetime.fromisoformat(line["time"]).tzinfo for line in lines)
    assert [line["message"] for line in lines if line["level"] == "ERROR" and "damaged" in line["message"]]


def test_a_cache_size_is_taken(unmounted: Mount, images: Images) -> None:
    unmounted.fusestore("import", "--cache-size", "1M", images.debian.source).ok()
    unmounted.fusestore("mount", "--cache-size", "4M", unmounted.mountpoint).ok()
    shown = unmounted.sh("cat images/debian/layers/0/tar | sha256sum; cat images/debian/config.json").ok()
    assert shown.split()[0] in shown.split("-", 1)[1]
    used = sum(file.stat().st_blocks * 512 for file in unmounted.store.glob("layers/*/cache"))
    assert used <= 4 << 20
