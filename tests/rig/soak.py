"""A store under mixed load, one of whose mounts ends again and again while another lives on. Blocking.

A round: workers (rig.load) by two mounts, the API and commands; after some time one mount ends by a fault;
when all have stopped the store must be sound, everything that was acknowledged there, and nothing over. Every
wait is bounded.
"""

import json
import os
import random
import signal
import stat
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from rig.images import Image
from rig.ledger import Ledger, judge
from rig.load import (
    KILLED,
    Where,
    by_hands,
    by_images,
    calling,
    exercising,
    in_rootfs,
    killing,
    reading,
)
from rig.mounts import Mount, drop_names, wait_until
from rig.people import Person

__all__ = ["FAULTS", "Soak"]

UMOUNT = "umount and mount"
_SIGNALS = {"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
FAULTS = (*_SIGNALS, UMOUNT)
"""How a mount ends."""

_LIVES_ON = "none: a mount that lives on"
_CACHE = "4M"
"""What a mount keeps decompressed: so little that the readers have it evict all the time."""
_DESCRIPTORS_KEPT = 16
"""How many more a daemon may have open at the end: of layers and spans, which it opens once."""
_END_S = 60.0
"""What anything may take that should end at once, on a busy machine."""


@dataclass
class _Row:
    """What came of a fault."""

    tries: int = 0
    lost: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


class Soak:
    """Use `begin`, `round` as often as wanted, `finish`, and in any case `close`."""

    def __init__(self, person: Person, base: Path, default: Image, read: Image, seed: int) -> None:
        """`base` is made. `default` is the image of containers, the files of `read` are compared."""
        self._person = person
        self.victim = Mount(person, base, "--cache-size", _CACHE)
        self.steady = Mount(person, base / "steady", "--cache-size", _CACHE)
        self.steady.store, self.steady.run_dir = self.victim.store, self.victim.run_dir
        self._images = (default, read)
        self._digests = _digests(read.reference)
        self._chance = random.Random(seed)
        self._ledgers: dict[str, Ledger] = {}
        self._number = 0
        self.rows = {fault: _Row() for fault in (*FAULTS, KILLED, _LIVES_ON)}
        self._before: dict[str, Any] = {}
        self._after: dict[str, Any] = {}
        self._files: list[str] = []
        self._descriptors: list[str] = []

    @property
    def done(self) -> Counter[str]:
        """What was done, by its kind."""
        return sum((ledger.done for ledger in self._ledgers.values()), Counter())

    def begin(self) -> None:
        for image in self._images:
            self.victim.fusestore("import", image.source).ok()
        self.victim.mount()
        self.steady.mount()
        for mount in (self.victim, self.steady):  # what is opened once, and stays
            mount.sh("mkdir containers/w && echo > containers/w/rootfs/f && rmdir containers/w").ok()
            mount.sh("find images/*/rootfs/etc -type f | xargs cat > /dev/null").ok()
        wait_until(self._is_trash_empty, _END_S)
        self._files = self.steady.files()
        self.victim.sh("mkdir containers/calls && chmod -R u+rwX containers/calls/rootfs").ok()
        self.steady.sh("mkdir containers/file").ok()
        self._descriptors = self.steady.descriptors()
        self._before = self._status()

    def _status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            self.steady.fusestore("status", self.steady.mountpoint, "--json").ok()
        )
        return found

    def _is_trash_empty(self) -> bool:
        return os.listdir(self.steady.store / "trash") == []

    # One round

    def round(self, fault: str, load_s: float) -> bool:
        """`load_s` of work, then `fault`. False if anything was lost, is left over or went wrong."""
        self._number += 1
        row = self.rows[fault]
        row.tries += 1
        self.rows[_LIVES_ON].tries += 1
        killed = self.done[KILLED]
        row.lost += self._work(fault, load_s)
        self.rows[KILLED].tries += self.done[KILLED] - killed
        row.lost += self._complaints("check")
        if not self.victim.pids():
            self.victim.mount()
        row.lost += self._judge()
        row.left += self._left_over()
        self.steady.check_log()
        return not any(row.lost or row.left for row in self.rows.values())

    def _complaints(self, *command: str) -> list[str]:
        said = self.steady.fusestore(*command, deadline_s=300)
        return [] if said.code == 0 and not said.out + said.err else [f"{said.out}{said.err}"]

    def _work(self, fault: str, load_s: float) -> list[str]:
        """The work, and the fault in the midst of it; what went wrong."""
        fault_s = time.monotonic() + load_s
        end_s = fault_s + min(2.0, load_s / 2)
        # An umount is refused while somebody is in the mount.
        victim_end_s = fault_s if fault == UMOUNT else fault_s + _END_S
        victim, steady = self._where(self.victim), self._where(self.steady)
        image = self._images[1].ref
        number = self._number
        jobs: dict[str, tuple[Callable[..., Ledger], tuple[object, ...]]] = {
            "victim-1": (in_rootfs, (victim, "v1", number, victim_end_s)),
            "victim-2": (in_rootfs, (victim, "v2", number, victim_end_s)),
            "victim-reads": (reading, (victim, self._digests, image, victim_end_s)),
            "victim-calls": (calling, (victim, "calls", number, victim_end_s)),
            "steady-1": (in_rootfs, (steady, "s1", number, end_s)),
            "steady-reads": (reading, (steady, self._digests, image, end_s)),
            "steady-file": (exercising, (steady, "file", number, end_s)),
            "api": (by_hands, (steady, "api", number, end_s, False)),
            "commands": (by_hands, (steady, "command", number, end_s, True)),
            "images": (by_images, (steady, "image", number, end_s)),
            "killed": (killing, (steady, "killed", number, end_s)),
        }
        with ThreadPoolExecutor(len(jobs)) as threads:
            working: dict[str, Future[Ledger]] = {
                name: threads.submit(
                    self._person.call,
                    function,
                    self._ledgers.get(name, Ledger()),
                    *arguments,
                    deadline_s=load_s + 2 * _END_S,
                )
                for name, (function, arguments) in jobs.items()
            }
            time.sleep(max(0.0, fault_s - time.monotonic()))
            ended_s = time.monotonic()
            wrong = self._end(fault)
            for name, future in working.items():
                self._ledgers[name] = future.result()
        for name, ledger in self._ledgers.items():
            died_s, ledger.died_s = ledger.died_s, None
            said, ledger.wrong = ledger.wrong, []
            wrong += [f"{name}: {line}" for line in said]
            if died_s is not None and (died_s < ended_s or not name.startswith("victim")):
                wrong.append(f"{name}: its mount was gone")
        return wrong

    def _where(self, mount: Mount) -> Where:
        environment = self._person.environment(**mount.environment)
        return Where(mount.mountpoint, mount.store, mount.run_dir, environment)

    def _end(self, fault: str) -> list[str]:
        """The victim's end; what is wrong with it."""
        (pid,) = self.victim.pids()
        if fault != UMOUNT:
            os.kill(pid, _SIGNALS[fault])
        else:
            wait_until(self._umounted, _END_S)
        wait_until(lambda: self.victim.pids() == [], _END_S)
        if fault == "kill -9":
            return []
        assert not self.victim.is_mounted(), f"still mounted after {fault}"
        stray = os.listdir(self.victim.mountpoint)
        return [f"below the mount point there is {stray}"] if stray else []

    def _umounted(self) -> bool:
        said = self.victim.fusestore("umount", self.victim.mountpoint)
        assert said.code == 0 or "Device or resource busy" in said.err, said.err
        return said.code == 0

    # After it

    def _judge(self) -> list[str]:
        """What is not as the ledgers say, by either mount; what was open is settled."""
        wrong = []
        for name, ledger in self._ledgers.items():
            top = (self.victim if name.startswith("victim") else self.steady).mountpoint
            said, self._ledgers[name] = self._person.call(_judged, ledger, top, deadline_s=_END_S)
            wrong += [f"{name}: {line}" for line in said]
        return wrong

    def _left_over(self) -> list[str]:
        """What is in the store that no ledger knows."""
        wait_until(self._is_trash_empty, _END_S)
        store, (run,) = self.steady.store, self.steady.run_dir.iterdir()
        known = {key: box for ledger in self._ledgers.values() for key, box in ledger.known.items()}
        containers = {key.partition("/")[2] for key in known if key.startswith("containers/")}
        names = {box.name for box in known.values() if box.name}
        tags = {key.partition("/")[2] for key in known if key.startswith("images/")}
        started = {key.partition("/")[2] for key, box in known.items() if box.is_started}
        expected: dict[str, tuple[set[str], set[str]]] = {
            "containers": (set(os.listdir(store / "containers")), containers | {"calls", "file"}),
            "names": (set(os.listdir(store / "names")), names),
            "tags": (self._tags(), tags | {image.ref for image in self._images} | {"default"}),
            "started": ({path.parent.name for path in run.glob("containers/*/mounted")}, started),
        }
        left = [
            f"{what}: {sorted(found - wanted)} too much, {sorted(wanted - found)} missing"
            for what, (found, wanted) in expected.items()
            if found != wanted
        ]
        counted = {
            "records of mounts": len([file for file in (run / "mounts").iterdir() if not file.suffix]),
            "entries of tmp, of which a mount has one": len(os.listdir(store / "tmp")),
            "processes": len(self.victim.pids()) + len(self.steady.pids()),
        }
        return left + [f"{count} {what}, with 2 mounts" for what, count in counted.items() if count != 2]

    def _tags(self) -> set[str]:
        images = json.loads(self.steady.fusestore("images", "--json").ok())
        return {name for image in images for name in image["names"]}

    # The end

    def finish(self) -> bool:
        """Takes all away and looks what is left. False as `round`."""
        row = self.rows[_LIVES_ON]
        drop_names()
        self._after = self._status()
        for name, ledger in self._ledgers.items():
            for key, box in ledger.known.items():
                if box.is_started:
                    self.steady.fusestore("stop", key.partition("/")[2]).ok()
                if key.startswith("images/"):
                    self.steady.sh('rm "$1"', key).ok()
            ledger.known.clear()
            del name
        self.steady.fusestore("rm", *os.listdir(self.steady.store / "containers")).ok()
        self.steady.fusestore("gc").ok()
        drop_names()
        wait_until(self._is_trash_empty, _END_S)
        left = sorted(set(self.steady.files()) - set(self._files))
        missing = sorted(set(self._files) - set(self.steady.files()))
        if left or missing:
            row.left.append(f"files: {left} too much, {missing} missing")
        more = sorted((Counter(self.steady.descriptors()) - Counter(self._descriptors)).elements())
        if len(more) > _DESCRIPTORS_KEPT:
            row.left.append(f"{len(more)} descriptors more than at the beginning: {more[:40]}")
        for mount in (self.victim, self.steady):
            mount.umount()
        row.lost += self._complaints("check")
        for place in ("tmp", "trash"):
            if found := os.listdir(self.steady.store / place):
                row.left.append(f"{place}: {found}")
        return not any(row.lost or row.left for row in self.rows.values())

    def close(self) -> None:
        self.victim.close()
        self.steady.close()

    def table(self) -> str:
        """For people: what was done, what came of the faults, what the mount that lived on holds."""
        lines = [f"{'work':40} {'times':>9}"]
        lines += [f"{kind:40} {count:9}" for kind, count in sorted(self.done.items())]
        if self._after:
            lines += ["", f"{_LIVES_ON.partition(': ')[2]:40} {'begin':>9} {'end':>9}"]
            lines += [
                f"{what:40} {_measure(self._before, *path):9} {_measure(self._after, *path):9}"
                for what, path in _MEASURES.items()
            ]
        lines += ["", f"{'fault':40} {'tries':>9} {'lost':>9} {'left over':>9}"]
        lines += [
            f"{fault:40} {row.tries:9} {len(row.lost):9} {len(row.left):9}"
            for fault, row in self.rows.items()
        ]
        return "\n".join(lines)

    def problems(self) -> list[str]:
        return [f"{fault}: {said}" for fault, row in self.rows.items() for said in (*row.lost, *row.left)]


_MEASURES: Mapping[str, tuple[str, ...]] = {
    "resident memory, KiB": ("memory", "resident-bytes"),
    "of it anonymous, KiB": ("memory", "anonymous-bytes"),
    "descriptors": ("descriptors", "open"),
    "open handles": ("handles",),
    "inodes known": ("inodes",),
    "seconds up": ("uptime-s",),
}


def _measure(report: Mapping[str, Any], *path: str) -> int:
    found: Any = report
    for key in path:
        found = found[key]
    return int(found) // (1024 if path[-1].endswith("bytes") else 1)


def _judged(ledger: Ledger, top: Path) -> tuple[list[str], Ledger]:
    return judge(ledger, top), ledger


def _digests(reference: Path) -> dict[str, str]:
    """SHA-256 of the regular files, by path."""
    found = {}
    for directory, _, names in os.walk(reference):
        for name in names:
            path = Path(directory, name)
            if stat.S_ISREG(path.lstat().st_mode) and str(path).isprintable():
                found[str(path.relative_to(reference))] = sha256(path.read_bytes()).hexdigest()
    return found
