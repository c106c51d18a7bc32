"""Mounts that end under load, most by kill -9: what was acknowledged is there, the next mount is clean.

FUSESTORE_TEST_KILLS=100 makes it the long test. `pytest -s` prints what was done.
"""

import contextlib
import fcntl
import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rig.images import Images
from rig.mounts import Mount, wait_until
from rig.people import Person
from rig.requirements import need
from rig.soak import UMOUNT, Soak

from fusestore.layout import run_layout
from fusestore.mounts import Changed, Mounts

pytestmark = [pytest.mark.mounted, pytest.mark.images]

KILLS = int(os.environ.get("FUSESTORE_TEST_KILLS", "0"))
"""Of both people together; 0: as many as there is time for, and other ends besides."""

KILL = "kill -9"
ENDS = {"root": (KILL, "SIGTERM", KILL), "user": (KILL, UMOUNT, KILL)}
LOAD_S = 1.0


@pytest.mark.timeout(300 + KILLS * 30)
def test_what_was_acknowledged_survives_mounts_that_end_under_load(
    person: Person, area: Path, images: Images
) -> None:
    ends = (KILL,) * (KILLS // 2) or ENDS["root" if person.is_root else "user"]
    soak = Soak(person, area / f"soak-{person.name}", images.busybox, images.busybox, person.uid)
    try:
        soak.begin()
        for end in ends:
            assert soak.round(end, LOAD_S), soak.problems()
        assert soak.finish(), soak.problems()
    finally:
        print(f"\n{soak.table()}")
        soak.close()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        fcntl.flock(file, fcntl.LOCK_UN)  # children have it open too


def _ring(mount: Mount) -> None:
    """Says that a container was changed."""
    run = run_layout(str(mount.run_dir), os.fsencode(mount.store))
    Mounts(run).announce(Changed("containers", "x"))


def _waiting(mount: Mount) -> int:
    """Requests without an answer."""
    return int(json.loads(mount.fusestore("status", mount.mountpoint, "--json").ok())["waiting"])


def _is_forgetting(pid: int) -> bool:
    """Whether the kernel has a thread of it wait for a name that is to be forgotten."""
    stacks = [file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/stack")]
    return any("fuse_reverse_inval_entry" in stack for stack in stacks)


def test_a_daemon_that_was_killed_is_let_end_where_its_kernel_forgets(fresh: Mount) -> None:
    """For that the kernel waits for a mkdir, and mkdir for the daemon, which does not end before."""
    need("root", os.geteuid() == 0, "only root can see where threads wait")
    (pid,) = fresh.pids()
    with ThreadPoolExecutor(2) as threads:
        with _locked(fresh.store / "fusestore.lock"):
            made = threads.submit(fresh.sh, "mkdir containers/a")
            wait_until(lambda: _waiting(fresh) == 1)
            told = threads.submit(fresh.person.call, _ring, fresh)
            wait_until(lambda: _is_forgetting(pid))
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: "(zombie)" in Path(f"/proc/{pid}/status").read_text())
        fresh.mount()
        assert made.result().code != 0
        told.result()
    assert fresh.sh("mkdir containers/a && ls containers").ok() == "a\n"
