"""What a mount holds: no more than the kernel asks it to, and nothing of what is closed and forgotten."""

import itertools
import json
import os
import re
import resource
import stat
import subprocess
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from rig.images import Images
from rig.mounts import Mount, drop_names, wait_until
from rig.people import as_root
from rig.randomcalls import Caller
from rig.requirements import need

pytestmark = [pytest.mark.mounted, pytest.mark.images]

CALLS = int(os.environ.get("FUSESTORE_TEST_CALLS", "20000"))


def _daemon(mount: Mount) -> Path:
    (pid,) = mount.pids()
    return Path(f"/proc/{pid}")


def _wait_until_idle(daemon: Path) -> None:
    """Until it waits for requests and there are none: to forget is one, but nobody hears of its end."""
    spent: deque[str] = deque(maxlen=5)

    def is_idle() -> bool:
        spent.append((daemon / "schedstat").read_text().split()[0])
        return spent.count(spent[0]) == 5 and "State:\tS" in (daemon / "status").read_text()

    wait_until(is_idle)


def _call_often(rootfs: Path, seed: int, calls: int) -> None:
    os.chdir(rootfs)
    caller = Caller(rootfs, seed)
    for _ in range(calls):
        caller.step()


def test_the_kernel_forgets_exactly_what_it_was_told(fresh: Mount) -> None:
    """A count that sinks below zero is a warning in the log, which no test may leave behind."""
    need("root", os.geteuid() == 0, "only root can drop the kernel's caches")
    fresh.sh("mkdir containers/a containers/b && chmod -R u+rwX containers/*/rootfs").ok()
    with ThreadPoolExecutor(4) as threads:
        calls = [
            threads.submit(
                fresh.person.call, _call_often, fresh.containers / name / "rootfs", seed, CALLS // 20
            )
            for seed, name in enumerate("aabb")
        ]
        while not all(call.done() for call in calls):
            drop_names()
    for call in calls:
        call.result()
    fresh.sh("ls -lR > /dev/null; mv containers/a containers/c; rm -r containers/b;"
             "sed -i 's/{/{\"k\": 1,/' containers/c/metadata.json").ok()  # fmt: skip
    drop_names()
    daemon = _daemon(fresh)
    _wait_until_idle(daemon)
    fresh.umount()
    assert re.findall("unmounted .*: (.*)", fresh.log()) == ["0 lookups, 0 handles left"]


def _open_often(rootfs: Path, count: int) -> None:
    for number in range(count // 4):
        for path in (rootfs / "etc/hostname", rootfs / "bin/busybox"):
            os.close(os.open(path, os.O_RDONLY))
        new = rootfs / f"new{number}"
        fd = os.open(new, os.O_RDWR | os.O_CREAT)
        os.unlink(new)
        os.write(fd, b"unlinked")
        assert os.pread(fd, 100, 0) == b"unlinked"
        os.close(fd)
        os.scandir(rootfs / "etc").close()


def _held(daemon: Path) -> tuple[int, int]:
    """Descriptors, and bytes of memory."""
    (memory,) = re.findall(r"RssAnon:\s+(\d+) kB", (daemon / "status").read_text())
    return len(os.listdir(daemon / "fd")), int(memory) * 1024


def test_opening_and_closing_holds_nothing(fresh: Mount) -> None:
    fresh.sh("mkdir containers/a").ok()
    daemon, rootfs = _daemon(fresh), fresh.containers / "a/rootfs"
    fresh.person.call(_open_often, rootfs, CALLS // 10)
    _wait_until_idle(daemon)
    descriptors, memory = _held(daemon)
    fresh.person.call(_open_often, rootfs, CALLS, deadline_s=CALLS / 100)
    _wait_until_idle(daemon)
    descriptors_after, memory_after = _held(daemon)
    assert descriptors_after <= descriptors
    assert memory_after < memory + (256 << 10) + CALLS * 8


@pytest.mark.parametrize("person", ["erofs", "overlay"], indirect=True)
def test_the_page_cache_has_once_what_the_kernel_serves(fresh: Mount, images: Images) -> None:
    """Beside the file, at first, what was decompressed, and the blob of that."""
    fresh.fusestore("import", images.debian.source).ok()
    fresh.fusestore("create", "debian", "a").ok()

    def cached(*patterns: str) -> int:
        found = fresh.sh(f"fincore --bytes --noheadings --output RES {' '.join(patterns)}").ok()
        return sum(map(int, found.split()))

    blobs = json.loads(fresh.sh("cat images/debian/metadata.json").ok())["layers"]
    layers = [f"{fresh.store}/blobs/{blob['digest'].replace(':', '/')}" for blob in blobs]
    layers.append(f"{fresh.store}/layers/*/cache")
    perl = "containers/a/rootfs/usr/bin/perl"
    size = int(fresh.sh(f"cat {perl} > /dev/null; stat -c %s {perl}").ok())
    assert cached(*layers) > size // 2

    def has_it_once() -> bool:
        fresh.sh(f"cat {perl} > /dev/null").ok()  # by the kernel alone, or else all of it comes again
        return cached(*layers) < 64 << 10 and cached(perl) > size // 2

    wait_until(has_it_once, 30)


def _hold_much(containers: Path, count: int) -> list[int]:
    """Makes and enters containers, makes files in one of them, and has some open."""
    for number in range(count):
        (containers / str(number)).mkdir()
        (containers / f"{number}/rootfs/file").touch()
    for number in range(25 * count):
        os.mknod(containers / f"0/rootfs/a-name-of-some-length-{number}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return [os.open(containers / f"{number}/rootfs/file", os.O_RDWR) for number in range(count)]


@as_root
def test_memory_is_bounded_by_what_is_known_and_open(fresh: Mount) -> None:
    """The bounds are those of the README."""
    fresh.sh("mkdir containers/a && ls -lR containers/a > /dev/null").ok()
    daemon, count = _daemon(fresh), 40
    _, before = _held(daemon)

    def hold() -> dict[str, Any]:
        files = _hold_much(fresh.containers, count)
        command = ["fusestore", "status", str(fresh.mountpoint), "--json"]
        environment = fresh.person.environment(**fresh.environment)
        said = subprocess.run(command, env=environment, stdout=-1, check=True, timeout=60).stdout
        assert len(files) == count
        found: dict[str, Any] = json.loads(said)
        return found

    report = fresh.person.call(hold)
    assert report["containers"]["entered"] >= count == report["handles"]
    assert report["inodes"] > 25 * count
    bound = report["inodes"] * 1536 + report["containers"]["entered"] * 4096 + report["handles"] * 1024
    assert report["memory"]["anonymous-bytes"] < before + bound + (1 << 20)


def _read_some(rootfs: Path, part: int, parts: int) -> None:
    paths = (Path(directory, name) for directory, _, names in os.walk(rootfs) for name in names)
    for path in itertools.islice(paths, part, 600, parts):
        if stat.S_ISREG(path.lstat().st_mode):
            path.read_bytes()


@as_root
def test_memory_is_bounded_while_layers_are_decompressed(unmounted: Mount, images: Images) -> None:
    """By many at once, who have what others want decompressed evicted."""
    unmounted.options = ("--cache-size", "4M")
    unmounted.fusestore("import", images.debian.source).ok()
    unmounted.mount()
    daemon, rootfs = _daemon(unmounted), unmounted.images / "debian/rootfs/usr/lib"
    unmounted.sh("find images/debian/rootfs/usr/lib -ls > /dev/null").ok()
    _, before = _held(daemon)
    most = 0
    with ThreadPoolExecutor(8) as threads:
        readers = [threads.submit(unmounted.person.call, _read_some, rootfs, part, 8) for part in range(8)]
        while not all(reader.done() for reader in readers):
            most = max(most, _held(daemon)[1])
    for reader in readers:
        reader.result()
    assert before < most < before + (64 << 20)
