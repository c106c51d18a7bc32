"""kill -9 of the daemon under load, again and again: what was acknowledged is there, the next mount is clean.

FUSESTORE_TEST_KILLS=100 makes it the long test.
"""

import contextlib
import errno
import json
import os
import random
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from rig.mounts import Mount, wait_until
from rig.randomcalls import Caller

pytestmark = [pytest.mark.mounted, pytest.mark.images]

KILLS = int(os.environ.get("FUSESTORE_TEST_KILLS", "10"))
"""Of both people together."""

WRITERS = 3
_DEAD = (errno.ENOTCONN, errno.ECONNABORTED)
"""What calls fail with whose daemon is dead, or dies."""


def _content(name: str) -> bytes:
    return name.encode() * 5000


def _write_often(containers: Path, journal: Path, prefix: str) -> None:
    """Makes containers and deletes every other one, until the daemon dies; `journal` has what was done."""
    with open(journal, "a", buffering=1) as said, contextlib.suppress(_Died), _dying():
        for number in range(1 << 30):
            name = f"{prefix}-{number}"
            container = containers / name
            container.mkdir()
            with open(container / "rootfs/etc/hostname", "r+b") as file:
                file.write(_content(name))
                os.fsync(file.fileno())
            (container / "metadata.json").write_text(json.dumps({"number": number}))
            said.write(f"{name} made\n")
            if number % 2:
                said.write(f"{name} going\n")
                container.rmdir()
                said.write(f"{name} gone\n")


class _Died(Exception):
    pass


@contextlib.contextmanager
def _dying() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _DEAD:
            raise
        raise _Died from error


def _call_often(rootfs: Path, seed: int) -> None:
    """Random calls in a rootfs until the daemon dies."""
    with contextlib.suppress(_Died), _dying():
        os.chdir(rootfs)
        caller = Caller(rootfs, seed)
        while caller.step()[1] != errno.ENOTCONN:
            pass


def _journals(directory: Path) -> list[str]:
    return [line for file in sorted(directory.iterdir()) for line in file.read_text().splitlines()]


def _kill_under_load(mount: Mount, journals: Path, number: int, chance: random.Random) -> None:
    (pid,) = mount.pids()
    enough = len(_journals(journals)) + chance.randint(1, 40)
    with ThreadPoolExecutor(WRITERS + 1) as threads:
        done: list[Future[None]] = [
            threads.submit(
                mount.person.call,
                _write_often,
                mount.containers,
                journals / str(writer),
                f"k{number}-{writer}",
            )
            for writer in range(WRITERS)
        ]
        done.append(threads.submit(mount.person.call, _call_often, mount.containers / "calls/rootfs", number))
        wait_until(
            lambda: len(_journals(journals)) >= enough or any(one.done() for one in done), deadline_s=50
        )
        ended = [one for one in done if one.done()]
        os.kill(pid, signal.SIGKILL)
    assert ended == []
    for one in done:
        one.result()
    wait_until(lambda: mount.pids() == [])


def _lost(containers: Path, lines: list[str]) -> list[str]:
    """What is not as the journal says."""
    said: dict[str, str] = dict(line.split() for line in lines)
    wrong = []
    for name, what in said.items():
        container = containers / name
        if what == "gone" and container.exists():
            wrong.append(f"{name} is back")
        elif what == "made" and (
            (container / "rootfs/etc/hostname").read_bytes()[: len(_content(name))] != _content(name)
            or json.loads((container / "metadata.json").read_text())["number"] != int(name.rpartition("-")[2])
        ):
            wrong.append(f"{name} lost something")
    return wrong


def test_what_was_acknowledged_survives_kills_under_load(fresh: Mount) -> None:
    chance = random.Random(fresh.person.uid)
    journals = fresh.base / "journals"
    journals.mkdir()
    os.chown(journals, fresh.person.uid, fresh.person.gid)
    fresh.sh("mkdir containers/calls && chmod -R u+rwX containers/calls/rootfs").ok()
    for number in range(KILLS // 2):
        _kill_under_load(fresh, journals, number, chance)
        assert fresh.fusestore("check").ok() == ""
        fresh.mount()
        assert fresh.person.call(_lost, fresh.containers, _journals(journals)) == []
        assert len(fresh.pids()) == 1
    fresh.umount()
    assert fresh.fusestore("check").ok() == ""
    assert (os.listdir(fresh.store / "tmp"), os.listdir(fresh.store / "trash")) == ([], [])
    assert list(fresh.run_dir.glob("*/mounts/*")) == []
