"""Ends, fails and cuts the power at every step of every change of a store and of a container's rootfs, and
prints what came of it.

    python tests/bench/crashes.py [RANDOM [ONE_IN]]

A table: fault, tries, how often what is there is neither the old state nor the new (or not the new, though
the call had returned), and how often anything was left that does not belong there. RANDOM: parts of what was
not synced, chosen at random, that are lost after each change, besides those chosen on purpose. Fails if
anything was lost or left. ONE_IN: of so many steps one is tried; by default all, which takes an hour, less
where TMPDIR is in memory. Needs root.
"""

import contextlib
import os
import shutil
import sys
import tempfile
from collections import Counter
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rig import treecrashes
from rig.crashes import OPERATIONS, exit_at, fresh, left_over, old_and_new, state
from rig.ocisources import SourceMaker, tar_of
from rig.powercut import Recorder, cuts
from rig.stores import Crash, Dying, Failing, Full, Interrupted, Unsynced, on_disk, open_at

from fusestore import disk
from fusestore.scheme import Scheme

_ONE_IN = int(sys.argv[2]) if len(sys.argv) > 2 else 1
_PLACE = os.environ.get("TMPDIR", "/var/tmp")
EXIT = "exit before and after each change"
FAULTS: dict[str, type[Dying]] = {
    "death at each change": Dying,
    "one error of the disk": Failing,
    "full from then on": Full,
    "SIGINT": Interrupted,
}


class Table:
    def __init__(self) -> None:
        self.tries: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.left: Counter[str] = Counter()

    def count(self, fault: str, where: str, wrong: object, left: object) -> None:
        self.tries[fault] += 1
        if wrong:
            self.lost[fault] += 1
            print(f"LOST: {fault}, {where}: {wrong}")
        if left:
            self.left[fault] += 1
            print(f"LEFT OVER: {fault}, {where}: {left}")

    def judge(self, fault: str, place: Path, allowed: list[dict[str, object]], where: str) -> None:
        with open_at(place) as store:
            self.count(fault, where, state(store) not in allowed, left_over(store))

    def print(self) -> int:
        print(f"\n{'fault':40} {'tries':>8} {'lost':>6} {'left over':>10}")
        for fault in self.tries:
            print(f"{fault:40} {self.tries[fault]:8} {self.lost[fault]:6} {self.left[fault]:10}")
        return 1 if self.lost or self.left else 0


def _image(path: Path, content: bytes) -> str:
    maker = SourceMaker()
    layers = [tar_of({"etc/passwd": b"root"}), tar_of({"app": content})]
    return maker.add(maker.image(layers), path.name).directory(path)


def _ends(
    table: Table, base: Path, name: str, two: str, old: dict[str, object], new: dict[str, object]
) -> None:
    for point in range(0, 10_000, _ONE_IN):
        place = fresh(base, point)
        done = exit_at(place, OPERATIONS[name], two, point)
        table.judge(EXIT, place, [new] if done else [old, new], f"{name}, point {point}")
        shutil.rmtree(place)
        if done:
            return


def _faults(
    table: Table, base: Path, name: str, two: str, old: dict[str, object], new: dict[str, object]
) -> None:
    for fault, kind in FAULTS.items():
        for steps in range(0, 10_000, _ONE_IN):
            place = fresh(base, steps)
            done = False
            with (
                contextlib.suppress(Crash, OSError, KeyboardInterrupt),
                open_at(place) as store,
                on_disk(kind(steps)),
            ):
                OPERATIONS[name](store, two)
                done = True
            table.judge(fault, place, [new] if done else [old, new], f"{name}, step {steps}")
            shutil.rmtree(place)
            if done:
                break


def _power(table: Table, base: Path, name: str, two: str, randomly: int) -> None:
    place = fresh(base, 0)
    with open_at(place) as store:
        old = state(store)
        recorder = Recorder(place / "store")
        with on_disk(recorder):
            OPERATIONS[name](store, two)
        new = state(store)
    for cut in islice(cuts(recorder, randomly=randomly, seed=1), None, None, _ONE_IN):
        made = base / "cut"
        made.mkdir()
        cut.state.make(made / "store")
        where = f"{name}, after {cut.after} changes"
        allowed = [new] if cut.is_after_all else [old, new]
        table.judge(f"power cut, there is: {cut.kind}", made, allowed, where)
        shutil.rmtree(made)


def _in_a_rootfs(table: Table, base: Path, old: Path, scheme: str, name: str) -> None:
    states = treecrashes.states_of(name, treecrashes.copy(old, base / "done"))
    shutil.rmtree(base / "done")
    for fault, (kind, judge) in treecrashes.FAULTS.items():
        for point in range(0, 10_000, _ONE_IN):
            place = treecrashes.copy(old, base / str(point))
            outcome = judge(name, place, states, kind(point))
            where = f"{scheme}: {name}, point {point}"
            table.count(f"in a rootfs: {fault}", where, outcome.wrong, outcome.left)
            shutil.rmtree(place)
            if outcome.is_done:
                break


def main() -> int:
    randomly = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    disk.current = Unsynced()
    table = Table()
    for scheme in Scheme:
        with tempfile.TemporaryDirectory(dir=_PLACE) as directory:
            base = Path(directory)
            treecrashes.make_store(base / "old", scheme)
            for name in treecrashes.CHANGES:
                _in_a_rootfs(table, base, base / "old", scheme.word, name)
                print(f"in a rootfs, {scheme.word}: {name}: done", flush=True)
    for name in OPERATIONS:
        with tempfile.TemporaryDirectory(dir=_PLACE) as directory:
            base = Path(directory)
            one, two = _image(base / "one", b"1"), _image(base / "two", b"2")
            old, new = old_and_new(base, one, two, OPERATIONS[name])
            shutil.rmtree(base / "-1")
            _ends(table, base, name, two, old, new)
            _faults(table, base, name, two, old, new)
            _power(table, base, name, two, randomly)
        print(f"{name}: done", flush=True)
    return table.print()


if __name__ == "__main__":
    sys.exit(main())
