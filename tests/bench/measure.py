"""How it is measured and printed: rounds in turn, medians, caches dropped, a table that survives failures.

Every work is done by all subjects in turn, several times, so that what else the machine does falls on all of
them. A ratio is median by median: below 1 is for fusestore.
"""

import contextlib
import os
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rig.images import Image
from subjects import Fusestore, Subject

__all__ = ["Bench", "Figure", "Task", "drop_caches", "timed"]


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


@dataclass(frozen=True, slots=True)
class Figure:
    """Medians of the rounds."""

    seconds: float
    cpu: float = 0.0
    """CPU seconds of the processes that serve the subject, meanwhile."""


Work = Callable[[Path], float | None]
"""Done in a rootfs, which is the working directory, as for a program in a container, and given as ".". Its
seconds, where not all that it did is to count."""


@dataclass(frozen=True, slots=True)
class Task:
    do: Callable[[], float | None]
    """Its seconds, where not all that it did is to count."""
    prepare: Callable[[], object] = lambda: None
    """Before each round; does not count."""
    spent: Callable[[], float] = lambda: 0.0
    """CPU seconds so far of what serves it."""


class Bench:
    """The table, and what the parts share: subjects are made once. `base` is theirs, until `close`."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.is_failed = False
        self.reached = self.missed = 0
        self._made: dict[tuple[Path, str], Subject] = {}
        self._imported: dict[Path, Path] = {}
        """The store that has an image, by the image's path."""
        # podman wants its directories to have 50 characters at most.
        self.base = Path(
            tempfile.mkdtemp(prefix="fsb-", dir=os.environ.get("FUSESTORE_TEST_TMP", "/var/tmp"))
        )

    def close(self) -> None:
        shutil.rmtree(self.base, ignore_errors=True)

    def begin(self) -> None:
        print("| work | | beside | ratio | to reach | | CPU s of the daemons | |")
        print("|---|---|---|---|---|---|---|---|", flush=True)

    def part(self, name: str, work: Callable[["Bench"], None]) -> None:
        started = time.monotonic()
        with self.trying(name):
            work(self)
        for subject in self._made.values():
            subject.forget()
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """What fails in here is said, and the bench goes on."""
        try:
            yield
        except Exception as error:
            self.is_failed = True
            print(f"| {what} | FAILED: {type(error).__name__}: {' '.join(str(error).split())} |", flush=True)
            if not isinstance(error, RuntimeError):
                traceback.print_exc()

    def subjects(self, image: Image, makers: Mapping[str, Callable[[Path], Subject]]) -> dict[str, Subject]:
        """Those that can be made, by name; what each misses is said. `makers`: of a subject with `image`, in
        an empty directory."""
        for name, make in makers.items():
            if (image.path, name) not in self._made:
                with self.trying(name):
                    self._made[image.path, name] = make(self.place())
        return {name: self._made[image.path, name] for name in makers if (image.path, name) in self._made}

    def fusestore(
        self, image: Image, driver: str = "union", *, is_hydrated: bool = False
    ) -> Callable[[Path], Fusestore]:
        """Makes one in an empty directory; the image is imported once for all."""

        def make(base: Path) -> Fusestore:
            if image.path not in self._imported:
                self._imported[image.path] = Fusestore(self.place(), image).base / "store"
            imported = self._imported[image.path]
            return Fusestore(base, image, driver, imported=imported, is_hydrated=is_hydrated)

        return make

    def place(self) -> Path:
        """An empty directory."""
        return Path(tempfile.mkdtemp(dir=self.base))

    def compare(
        self,
        work: str,
        do: Work,
        subjects: Mapping[str, Subject],
        beside: Mapping[str, Mapping[str, float | None]],
        *,
        cold: bool = False,
        before: Callable[[Subject], object] | None = None,
        rounds: int | None = None,
    ) -> None:
        """A row for each of ours and each peer of it in `beside`, which says what ratio is to be reached.

        Mounted subjects only. cold: each is mounted anew, with no caches, for each round; otherwise a first
        round does not count. `before` is done before each round and does not count either.
        """
        with self.trying(work):
            figures = self.figures(work, do, subjects, cold=cold, before=before, rounds=rounds)
            for name, peers in beside.items():
                for peer, reach in peers.items():
                    if name in figures and peer in figures:
                        self.row(work, name, peer, figures[name], figures[peer], reach)

    def figures(
        self,
        work: str,
        do: Work,
        subjects: Mapping[str, Subject],
        *,
        cold: bool = False,
        before: Callable[[Subject], object] | None = None,
        rounds: int | None = None,
    ) -> dict[str, Figure]:
        """By the name of the subject. Who fails is said, and left out."""

        def prepare(subject: Subject) -> None:
            if cold:
                subject.umount()
                subject.forget()
                drop_caches()
                subject.mount()
            if before:
                before(subject)

        def inside(subject: Subject) -> float | None:
            os.chdir(subject.rootfs)
            try:
                return do(Path())
            finally:
                os.chdir("/")

        tasks = {
            name: Task(lambda it=it: inside(it), lambda it=it: prepare(it), it.spent)  # type: ignore[misc]
            for name, it in subjects.items()
        }
        return self.alternate(work, tasks, rounds=rounds, is_warm=not cold)

    def alternate(
        self, work: str, tasks: Mapping[str, Task], *, rounds: int | None = None, is_warm: bool = False
    ) -> dict[str, Figure]:
        """By name. Who fails is said, and left out. is_warm: one round more, which does not count."""
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in tasks}
        for number in range((rounds or self.rounds) + is_warm):
            for name in list(times):
                task = tasks[name]
                try:
                    task.prepare()
                    spent, start = task.spent(), time.perf_counter()
                    counted = task.do()
                    seconds = time.perf_counter() - start if counted is None else counted
                    if number >= is_warm:
                        times[name].append((seconds, task.spent() - spent))
                except Exception as error:
                    del times[name]
                    with self.trying(f"{work}: {name}"):
                        raise error
        return {
            name: Figure(statistics.median(s for s, _ in done), statistics.median(cpu for _, cpu in done))
            for name, done in times.items()
        }

    def row(
        self,
        work: str,
        name: str,
        peer: str,
        ours: Figure,
        theirs: Figure,
        reach: float | None = None,
        note: str = "",
    ) -> None:
        cpu = f"{ours.cpu:.2f} · {theirs.cpu:.2f}" if ours.cpu or theirs.cpu else ""
        seconds = f"{ours.seconds:.3g} s · {theirs.seconds:.3g} s"
        self.ratio(work, name, peer, ours.seconds / theirs.seconds, reach, cpu, note or seconds)

    def ratio(
        self,
        work: str,
        name: str,
        peer: str,
        ratio: float,
        reach: float | None = None,
        cpu: str = "",
        note: str = "",
    ) -> None:
        """`reach`: at most this."""
        said = ""
        if reach is not None:
            if ratio <= reach:
                self.reached += 1
            else:
                self.missed += 1
                said = "missed"
        aim = "" if reach is None else f"{reach:g}"
        print(f"| {work} | {name} | {peer} | {ratio:.3g} | {aim} | {said} | {cpu} | {note} |", flush=True)
