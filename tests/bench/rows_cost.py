"""What is used and how it grows: pagecache, memory, growth."""

import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from benchimages import MANY, BenchImages
from measure import Bench, Task, drop_caches, timed
from rows_rootfs import FUSE, KERNEL, KERNEL_DRIVERS, UNION, peers
from subjects import Fusestore, Overlay, Subject, mounted, run
from works import create_and_remove, read_all, read_file, touch_byte, walk, write_file

from fusestore.drivers import DRIVERS

__all__ = ["growth", "memory", "pagecache"]

SHARED_MIB = 200
CONTAINERS = {KERNEL: 100, FUSE: 10, UNION: 10, **dict.fromkeys(KERNEL_DRIVERS, 100)}
"""Who read the same; where each has pages of its own, of fewer."""
SETTLING_S = 6
"""Until what the kernel drivers' pages came from is given back."""
MILLION = 5
"""So many containers of the image of 200,000 files are a million inodes."""
LINEAR, FLAT = 4.8, 1.5
"""The most that four times as much may take of what is linear, or does not matter."""


def pagecache(bench: Bench, images: BenchImages) -> None:
    """How often the page cache of the machine has the bytes that many containers read."""
    for name, make in peers(bench, images.large).items():
        with bench.trying(f"page cache: {name}"):
            subjects = bench.subjects(images.large, {name: make})
            with mounted(*subjects.values()):
                rootfs = [
                    path
                    for subject in subjects.values()
                    for path in _rootfs_of_several(bench, subject, CONTAINERS[name])
                ]
                drop_caches()
                before = _cached()
                for path in rootfs:
                    read_file("shared")(path)
                time.sleep(SETTLING_S)
                copies = (_cached() - before) / (SHARED_MIB << 20)
                reach = 1.05 if name in KERNEL_DRIVERS else None
                work = f"page cache after {len(rootfs)} containers read the same {SHARED_MIB} MiB"
                note = f"{_resident(subjects[name]) / (SHARED_MIB << 20):.2f} in files of the store"
                bench.ratio(work, name, "the bytes", copies, reach, note=note if name in DRIVERS else "")
                _unmount_several(subjects.values())


def _cached() -> int:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["Cached"].split()[0]) * 1024


def _resident(subject: Subject) -> int:
    """Bytes of the page cache that are of files in the subject's directory, not through mounts there."""
    files = run("find", subject.base, "-xdev", "-type", "f").splitlines()
    return sum(map(int, run("fincore", "-bnr", "-o", "RES", *files).split())) if files else 0


_several: list[Overlay] = []
"""Mounted beside the subject they are like."""


def _rootfs_of_several(bench: Bench, subject: Subject, count: int) -> list[Path]:
    """Of so many containers with the subject's image."""
    if isinstance(subject, Fusestore):
        return [subject.container(f"several{number}") for number in range(count)]
    assert isinstance(subject, Overlay)
    made = [subject.rootfs]
    for _ in range(count - 1):
        other = type(subject)(bench.place(), subject.image)
        other.mount()
        _several.append(other)
        made.append(other.rootfs)
    return made


def _unmount_several(subjects: Iterable[Subject]) -> None:
    while _several:
        _several.pop().umount()
    for subject in subjects:
        for path in subject.mountpoint.glob("containers/several*"):
            path.rmdir()


def memory(bench: Bench, images: BenchImages) -> None:
    """The own memory of who serves, as containers are walked one by one."""
    totals: dict[str, list[int]] = {}
    makers = peers(bench, images.many)
    for name in (UNION, *KERNEL_DRIVERS, FUSE):
        with bench.trying(f"memory: {name}"):
            subjects = bench.subjects(images.many, {name: makers[name]})
            drop_caches()
            with mounted(*subjects.values()):
                (subject,) = subjects.values()
                totals[name] = []
                serving = [subject]
                for path in _rootfs_of_several(bench, subject, MILLION):
                    walk(path)
                    totals[name].append(sum(one.memory() for one in [*serving, *_several]))
                _unmount_several(serving)
    for name in (UNION, *KERNEL_DRIVERS):
        if name in totals and FUSE in totals:
            count = MILLION * MANY
            ratio = totals[name][-1] / totals[FUSE][-1]
            note = f"{totals[name][-1] / count:.0f} bytes each"
            bench.ratio(f"memory with {count:,} inodes known", name, FUSE, ratio, 1.5, note=note)
    if UNION in totals:
        one, two, four = totals[UNION][0], totals[UNION][1], totals[UNION][3]
        _grown(bench, f"memory with {MANY * 4:,} inodes known", UNION, [one, two, four], LINEAR)


def _grown(bench: Bench, work: str, name: str, figures: list[float] | list[int], reach: float) -> None:
    """`figures`: at one, two and four times the size."""
    one, two, four = figures
    note = f"{two / one:.2f} × for twice as much"
    bench.ratio(work, name, "a quarter of it", four / one, reach, note=note)


Sized = Callable[[int], Callable[[Path], float | None]]


def growth(bench: Bench, images: BenchImages) -> None:
    """What four times as much takes, three rounds of each. Memory: see there."""
    _of_images(bench, images)
    drivers = (UNION, *KERNEL_DRIVERS)
    makers = {driver: bench.fusestore(images.many, driver) for driver in drivers}
    subjects = bench.subjects(images.many, makers)

    def each(work: Callable[[Path], None]) -> Sized:
        """Of the directories of `many`, which has a quarter, a quarter and half of it."""
        return lambda size: (
            lambda root: [work(root / part) for part in "abc"[: (1, 2, 3)[size // 2]]] and None
        )

    with mounted(*subjects.values()):
        for work, do in (("walk", each(walk)), ("read", each(read_all))):
            _of_sizes(bench, f"{work} of {MANY:,} files, cold", do, subjects, cold=True)
        files = 2_500
        _of_sizes(bench, f"create, write, close, unlink × {files * 4:,}",
                  lambda size: create_and_remove(files * size), subjects)  # fmt: skip
        _of_sizes(bench, "write 1 GiB and fsync", lambda size: write_file("big", size << 28), subjects)
    makers = {driver: bench.fusestore(images.large, driver) for driver in drivers}
    subjects = bench.subjects(images.large, makers)
    names = {1: "quarter-gib", 2: "half-gib", 4: "one-gib"}
    with mounted(*subjects.values()):
        _of_sizes(bench, "copy-up of 1 GiB, cold", lambda size: touch_byte(names[size]), subjects, cold=True,
                  before=Subject.renew)  # fmt: skip
        _of_sizes(
            bench, "read of 2 GiB, cold", lambda size: read_file("two-gib", size << 29), subjects, cold=True
        )


def _of_sizes(
    bench: Bench,
    work: str,
    do: Sized,
    subjects: dict[str, Subject],
    *,
    cold: bool = False,
    before: Callable[[Subject], object] | None = None,
) -> None:
    figures = [
        bench.figures(work, do(size), subjects, cold=cold, before=before, rounds=min(bench.rounds, 3))
        for size in (1, 2, 4)
    ]
    for name in subjects:
        if all(name in found for found in figures):
            _grown(bench, work, name, [found[name].seconds for found in figures], LINEAR)


def _of_images(bench: Bench, images: BenchImages) -> None:
    sized = {1: images.many_quarter, 2: images.many_half, 4: images.many}
    tasks, made = {}, {}
    for size, image in sized.items():

        def load(size: int = size, image: object = image) -> float:
            place = bench.place()
            return timed(lambda: made.update({size: Fusestore(place, image)}))

        tasks[str(size)] = Task(load)
    figures = bench.alternate("import", tasks, rounds=min(bench.rounds, 3))
    if len(figures) == 3:
        _grown(bench, f"import of {MANY:,} files", UNION, [one.seconds for one in figures.values()], LINEAR)
    with mounted(*made.values()):

        def make(place: Fusestore) -> float:
            paths = [place.mountpoint / f"containers/c{number}" for number in range(200)]
            seconds = timed(lambda: [path.mkdir() for path in paths])
            for path in paths:
                path.rmdir()
            return seconds

        tasks = {str(size): Task(partial(make, made[size])) for size in sized}
        figures = bench.alternate("mkdir", tasks, is_warm=True)
    if len(figures) == 3:
        work = f"mkdir of a container, image of {MANY:,} files"
        _grown(bench, work, UNION, [one.seconds for one in figures.values()], FLAT)
