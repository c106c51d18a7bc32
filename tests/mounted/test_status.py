"""fusestore status: what a mount says of itself, to whom, and what it says unasked."""

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rig.images import Images
from rig.mounts import Mount, wait_until
from rig.people import as_root, plain_user

pytestmark = [pytest.mark.mounted, pytest.mark.images]


def _status(mount: Mount) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(mount.fusestore("status", mount.mountpoint, "--json").ok())
    return found


def _count(report: dict[str, Any], kind: str) -> int:
    return int(report["requests"].get(kind, {"count": 0})["count"])


def test_it_says_what_is_mounted(fresh: Mount) -> None:
    report = _status(fresh)
    assert (report["mountpoint"], report["store"]) == (str(fresh.mountpoint), str(fresh.store))
    assert (report["driver"], [report["pid"]]) == ("union", fresh.pids())
    assert report["uptime-s"] > 0


def test_it_counts_requests_and_times_them(fresh: Mount) -> None:
    fresh.sh("mkdir containers/a && cat containers/a/rootfs/etc/hostname").ok()
    before = _status(fresh)
    fresh.sh("for i in 1 2 3 4 5 6 7; do cat containers/a/rootfs/etc/hostname; done").ok()
    after = _status(fresh)
    assert _count(after, "open") - _count(before, "open") == 7
    row = after["requests"]["open"]
    assert sum(row["below-ns"].values()) == row["count"]
    assert 0 < row["p50-ns"] <= row["p90-ns"] <= row["p99-ns"]
    assert row["per-second"] > 0


def test_it_counts_errors(fresh: Mount) -> None:
    before = _status(fresh)["errors"].get("EINVAL", 0)
    fresh.sh("mkdir containers/-; mkdir containers/a; echo '[' | tee containers/a/metadata.json")
    assert _status(fresh)["errors"]["EINVAL"] == before + 2


def test_it_counts_what_is_held(fresh: Mount) -> None:
    (pid,) = fresh.pids()
    script = """
        exec 3> containers/a/rootfs/x
        fusestore status $PWD --json
        exec 3>&-
        ls -f /proc/$1/fd | wc -l
    """
    fresh.sh("mkdir containers/a").ok()
    report, end, descriptors = fresh.sh(script, str(pid)).ok().rpartition("}\n")
    found = json.loads(report + end)
    assert found["containers"] == {"entered": 1, "in-use": 1}
    assert (found["handles"], found["waiting"]) == (1, 0)
    assert found["inodes"] >= 5
    assert 0 < found["memory"]["anonymous-bytes"] < found["memory"]["resident-bytes"]
    assert 0 < found["descriptors"]["open"] < found["descriptors"]["max"]
    assert abs(found["descriptors"]["open"] - int(descriptors)) < 8
    assert _status(fresh)["containers"]["in-use"] == 0


def test_it_counts_reads_of_what_is_decompressed(fresh: Mount, images: Images) -> None:
    fresh.fusestore("import", images.debian.source).ok()
    fresh.sh("cat images/debian/rootfs/usr/bin/perl > /dev/null").ok()
    first = _status(fresh)["spans"]
    assert first["misses"] > 0
    assert 0 < first["bytes"] <= first["bytes-max"]
    fresh.umount()
    fresh.mount()
    fresh.sh("cat images/debian/rootfs/usr/bin/perl > /dev/null").ok()
    again = _status(fresh)["spans"]
    assert again["misses"] == 0
    assert again["hits"] > 0


def test_people_get_a_table(fresh: Mount) -> None:
    fresh.sh("ls images > /dev/null").ok()
    lines = fresh.fusestore("status", fresh.mountpoint).ok().splitlines()
    assert f"mount point:  {fresh.mountpoint}" in lines
    assert any(re.match(r"opendir +\d+ +[0-9.]+ +[0-9.]+ (µs|ms|s) ", line) for line in lines)


def test_prometheus_gets_metrics(fresh: Mount) -> None:
    fresh.sh("ls images > /dev/null").ok()
    text = fresh.fusestore("status", fresh.mountpoint, "--prometheus").ok()
    assert re.search(r'^fusestore_request_seconds_count\{kind="opendir"\} [1-9]\d*$', text, re.MULTILINE)
    assert re.search(r"^fusestore_uptime_seconds [0-9.]+$", text, re.MULTILINE)


def test_without_a_mount_it_says_so(unmounted: Mount) -> None:
    result = unmounted.fusestore("status", unmounted.mountpoint)
    assert (result.code, result.out) == (1, "")
    assert "is no mount of this store: `fusestore mount` makes one" in result.err


def test_of_a_dead_mount_it_says_so(fresh: Mount) -> None:
    (pid,) = fresh.pids()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: fresh.pids() == [])
    result = fresh.fusestore("status", fresh.mountpoint)
    assert result.code == 1
    assert "is no mount of this store: `fusestore mount` makes one" in result.err


@contextmanager
def _stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_it_does_not_wait_for_a_mount_that_does_not_answer(fresh: Mount) -> None:
    (pid,) = fresh.pids()
    with _stopped(pid):
        result = fresh.fusestore("status", fresh.mountpoint, deadline_s=20)
    assert result.code == 1
    assert f"(process {pid}) does not answer: see its log, {fresh.run_dir}" in result.err
    assert _status(fresh)["pid"] == pid


def _ring(bell: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        os.chdir(bell.parent)
        connection.connect(bell.name)


@as_root
def test_another_user_may_not_ask(fresh: Mount) -> None:
    other = plain_user()
    refused = other.run("fusestore", "status", fresh.mountpoint, env=fresh.environment)
    assert (refused.code, refused.out) == (1, "")
    assert "Permission denied" in refused.err
    (bell,) = fresh.run_dir.glob("*/mounts/*.bell")
    with pytest.raises(PermissionError):
        other.call(_ring, bell)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    with subprocess.Popen(["flock", file, "sh", "-c", "echo; cat"], stdin=-1, stdout=-1) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        yield


def test_a_request_that_waits_long_is_logged_once(fresh: Mount) -> None:
    """What waits here is mkdir, for the store's lock."""
    fresh.expect("mkdir waits for over 10 s: inode ")
    with ThreadPoolExecutor(1) as thread, _locked(fresh.store / "fusestore.lock"):
        made = thread.submit(fresh.sh, "mkdir containers/a")
        wait_until(lambda: " waits for over " in fresh.log(), deadline_s=20)
        assert not made.done()
    made.result().ok()
    assert len(re.findall(" waits for over ", fresh.log())) == 1
    assert _status(fresh)["waiting"] == 0
