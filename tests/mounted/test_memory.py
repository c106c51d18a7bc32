"""What a mount holds: no more than the kernel asks it to, and nothing of what is closed and forgotten."""

import json
import os
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rig.images import Images
from rig.mounts import Mount, drop_names, wait_until
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
    """Beside the file, at first, what was decompressed, the blob of that, and by EROFS the tar."""
    fresh.fusestore("import", images.debian.source).ok()
    fresh.fusestore("create", "debian", "a").ok()

    def cached(*patterns: str) -> int:
        found = fresh.sh(f"fincore --bytes --noheadings --output RES {' '.join(patterns)}").ok()
        return sum(map(int, found.split()))

    blobs = json.loads(fresh.sh("cat images/debian/metadata.json").ok())["layers"]
    layers = [f"{fresh.store}/blobs/{blob['digest'].replace(':', '/')}" for blob in blobs]
    layers += [f"{fresh.store}/layers/*/cache", "images/debian/layers/*/tar"]
    perl = "containers/a/rootfs/usr/bin/perl"
    size = int(fresh.sh(f"cat {perl} > /dev/null; stat -c %s {perl}").ok())
    assert cached(*layers) > size // 2

    def has_it_once() -> bool:
        fresh.sh(f"cat {perl} > /dev/null").ok()  # by the kernel alone, or else all of it comes again
        return cached(*layers) < 64 << 10 and cached(perl) > size // 2

    wait_until(has_it_once, 30)
