"""Many processes at work in one rootfs at once: the tree stays one, and what is shown is what is stored."""

import errno
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from rig.mounts import Mount
from rig.randomcalls import Caller
from rig.snapshot import differences, snapshot

pytestmark = [pytest.mark.mounted, pytest.mark.images]

CALLS = int(os.environ.get("FUSESTORE_TEST_CALLS", "8000"))
"""Of all processes together."""

PROCESSES = 8

EXPECTED = {
    errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.EINVAL, errno.ELOOP,
    errno.ENODATA, errno.EPERM, errno.ENXIO, errno.ESPIPE, errno.EACCES,
}  # fmt: skip
"""What a call may fail with that meets names of others; none says that the file system lost its way."""


def _call_often(rootfs: Path, seed: int, calls: int) -> Counter[object]:
    os.chdir(rootfs)
    caller = Caller(rootfs, seed)
    failures: Counter[object] = Counter()
    for _ in range(calls):
        what, result = caller.step()
        if isinstance(result, int) and result not in EXPECTED:
            failures[what.split()[0], errno.errorcode.get(result, result)] += 1
    return failures


def _forget_names(mount: Mount, calls: list[Future[Counter[object]]]) -> None:
    """Have the kernel forget the names that nobody uses, over and over, until the calls are made."""
    while not all(call.done() for call in calls):
        subprocess.run(["mount", "-i", "-o", "remount,rw", mount.mountpoint], check=True, timeout=60)


@contextmanager
def _crowd(mount: Mount, rootfs: Path) -> Iterator[list[Future[Counter[object]]]]:
    with ThreadPoolExecutor(PROCESSES) as threads:
        yield [
            threads.submit(
                mount.person.call, _call_often, rootfs, seed, CALLS // PROCESSES, deadline_s=CALLS / 50
            )
            for seed in range(PROCESSES)
        ]


@pytest.mark.parametrize("person", ["root", "user"], indirect=True)
def test_a_crowd_leaves_the_tree_that_the_next_mount_shows(fresh: Mount) -> None:
    rootfs = fresh.containers / "c/rootfs"
    fresh.sh("mkdir containers/c && chmod -R u+rwX $1", rootfs).ok()
    with _crowd(fresh, rootfs) as calls:
        if fresh.person.is_root:
            _forget_names(fresh, calls)
    assert sum((call.result() for call in calls), Counter()) == {}
    shown = fresh.person.call(snapshot, rootfs)
    fresh.umount()
    fresh.fusestore("check").ok()
    fresh.mount()
    assert differences(fresh.person.call(snapshot, rootfs), shown) == []
