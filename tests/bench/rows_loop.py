"""fusestore's process itself: concurrency, its event loop, large directories."""

import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from benchimages import SMALL, BenchImages
from measure import Bench, drop_caches, timed
from rig.images import make_images
from rows_rootfs import UNION
from subjects import Fusestore, mounted

__all__ = ["concurrency", "directory", "loop"]

PLAIN_LOOP = "import trio, fusestore.mount as m, fusestore.cli as c; m._stand_in = lambda _: trio; c.main()"
"""The daemon as it would be with pyfuse3's own event loop."""
FEW, MANY = 1_000, 200_000
"""Files in a directory."""
OPENS = 2_000


def concurrency(bench: Bench, images: BenchImages) -> None:
    """While 1 GiB is read from a gzip layer; and from two."""
    (place,) = bench.subjects(images.large, {UNION: bench.fusestore(images.large)}).values()

    def cool() -> None:
        place.umount()
        place.forget()
        drop_caches()
        place.mount()
        os.stat(place.rootfs / "one-gib")

    def read(*names: str) -> list[subprocess.Popen[bytes]]:
        options = ("bs=1M", "count=1024", "of=/dev/null", "status=none")
        return [subprocess.Popen(["dd", f"if={place.rootfs}/{name}", *options]) for name in names]

    def stat_while(readers: list[subprocess.Popen[bytes]], count: int) -> list[float]:
        """Seconds of each lstat of a file that the kernel does not know yet."""
        times: list[float] = []
        while len(times) < count and all(reader.poll() is None for reader in readers):
            path = place.rootfs / f"small/{len(times)}"
            times.append(timed(partial(os.lstat, path)))
            time.sleep(0.001)
        return times

    with mounted(place):
        ratios, late = [], []
        for _ in range(bench.rounds):
            cool()
            idle = stat_while([], 1_000)
            cool()
            readers = read("two-gib")
            busy = stat_while(readers, SMALL)
            readers[0].kill()
            readers[0].wait()
            ratios.append(statistics.median(busy) / statistics.median(idle))
            late.append(statistics.quantiles(busy, n=20)[-1] / statistics.median(idle))
        note = f"5 of 100 take longer than {statistics.median(late):.0f}"
        work = "lstat of a file while 1 GiB is read from a gzip layer, cold"
        bench.ratio(work, UNION, "while nothing is read", statistics.median(ratios), 5, note=note)

        alone, together, cores = [], [], []
        for _ in range(bench.rounds):
            for names, times in ((["two-gib"], alone), (["two-gib", "one-gib"], together)):
                cool()
                before = place.spent()
                seconds = timed(lambda names=names: [reader.wait() for reader in read(*names)])  # type: ignore[misc]
                times.append(seconds)
            cores.append((place.spent() - before) / seconds)
        note = f"{statistics.median(cores):.2f} cores busy"
        work = "reads of 1 GiB from each of two gzip layers at once, cold"
        ratio = statistics.median(together) / statistics.median(alone)
        bench.ratio(work, UNION, "one of them alone", ratio, note=note)


def loop(bench: Bench, images: BenchImages) -> None:
    plain = (sys.executable, "-c", PLAIN_LOOP)
    image = images.debian
    makers = {UNION: bench.fusestore(image), "plain": partial(Fusestore, image=image, command=plain)}
    subjects = bench.subjects(image, makers)

    def open_close(root: Path) -> None:
        for _ in range(OPENS):
            os.close(os.open("usr/bin/perl", os.O_RDONLY))

    with mounted(*subjects.values()):
        work = f"open and close of a file × {OPENS:,}"
        figures = bench.figures(work, open_close, subjects)
        bench.row(work, UNION, "with pyfuse3's own event loop", figures[UNION], figures["plain"])


def directory(bench: Bench, images: BenchImages) -> None:
    """A directory of many files."""
    busybox = make_images().busybox
    (place,) = bench.subjects(busybox, {UNION: bench.fusestore(busybox)}).values()

    def work(count: int) -> dict[str, float]:
        """Seconds for each file."""
        directory = place.rootfs / f"d{count}"
        directory.mkdir()
        paths = [f"{directory}/{number}" for number in range(count)]
        works = {
            "create": lambda: [os.close(os.open(path, os.O_CREAT | os.O_WRONLY)) for path in paths],
            "list": lambda: os.listdir(directory),
            "lstat": lambda: [os.lstat(path) for path in paths],
            "remove": lambda: [os.unlink(path) for path in paths],
        }
        times = {name: timed(work) / count for name, work in works.items()}
        directory.rmdir()
        return times

    with mounted(place):
        work(FEW)  # warm
        rounds = [work(FEW) for _ in range(bench.rounds)]
        for name, seconds in work(MANY).items():
            few = statistics.median(done[name] for done in rounds)
            bench.ratio(
                f"{name} a file in a directory of {MANY:,}", UNION, f"one of {FEW:,}", seconds / few, 3
            )
