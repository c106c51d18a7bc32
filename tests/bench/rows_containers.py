"""Images and containers come and go: import, containers, many."""

import itertools
import shutil
from functools import partial
from pathlib import Path

from benchimages import BenchImages
from measure import Bench, Figure, Task, timed
from rig.images import make_images
from rows_rootfs import EROFS, KERNEL_DRIVERS, UNION
from subjects import Fusestore, Ratarmount, Storage, Subject, mounted, run, used
from works import read_file

__all__ = ["containers", "imports", "many"]

SKOPEO = "skopeo copy, buildah from and mount"
PODMAN, BUILDAH = "podman", "buildah"
THOUSAND = 1_000
OF_PODMAN = 30
"""So many of podman's containers are made and removed; each of 1,000 takes it no less."""
TEN_THOUSAND = 10_000

_first_file = read_file("etc/os-release")


def imports(bench: Bench, images: BenchImages) -> None:
    image = images.debian
    sizes: dict[str, int] = {}
    subjects: list[Subject] = []

    def ours(driver: str) -> None:
        subject = Fusestore(bench.place(), image, driver)
        subjects.append(subject)
        subject.mount()
        _first_file(subject.rootfs)

    def peer() -> float:
        storage = Storage(bench.place() / "s")
        try:
            seconds = timed(lambda: _by_storage(storage))
            sizes[SKOPEO] = used(storage.base / "root")
        finally:
            storage.close()
        return seconds

    def _by_storage(storage: Storage) -> None:
        storage.load(image)
        _first_file(Path(storage.buildah("mount", storage.buildah("from", storage.IMAGE))))

    def ratarmount() -> None:
        subject = Ratarmount(bench.place(), image)
        subjects.append(subject)
        subject.mount()
        _first_file(subject.rootfs)

    def unpack() -> float:
        bundle = bench.place() / "bundle"
        seconds = timed(lambda: run("umoci", "unpack", "--image", f"{image.path}:{image.ref}", bundle))
        sizes["the unpacked tree"] = used(bundle / "rootfs")
        shutil.rmtree(bundle)
        return seconds

    def end() -> None:
        for subject in subjects:
            subject.umount()
            if isinstance(subject, Fusestore):
                sizes[subject.driver] = used(subject.base / "store")
            shutil.rmtree(subject.base)
        subjects.clear()

    tasks = {driver: Task(partial(ours, driver), end) for driver in (UNION, EROFS)}
    tasks |= {SKOPEO: Task(peer, end), "ratarmount": Task(ratarmount, end), "umoci unpack": Task(unpack, end)}
    work = "import, to the first file read in a container"
    figures = bench.alternate(work, tasks)
    end()
    aims = {SKOPEO: 0.15, "ratarmount": None, "umoci unpack": None}
    for driver in (UNION, EROFS):
        for beside, aim in aims.items():
            if driver in figures and beside in figures:
                bench.row(work, driver, beside, figures[driver], figures[beside], aim)
    sizes["the compressed blobs"] = used(image.path / "blobs")
    for beside, reach in ((SKOPEO, 0.45), ("the unpacked tree", None), ("the compressed blobs", 1.15)):
        if UNION in sizes and beside in sizes:
            bench.ratio("bytes on disk after it", UNION, beside, sizes[UNION] / sizes[beside], reach)


def containers(bench: Bench, images: BenchImages) -> None:
    image = images.debian
    drivers = (UNION, *KERNEL_DRIVERS)
    makers = {driver: bench.fusestore(image, driver) for driver in drivers}
    subjects = bench.subjects(image, makers)
    storage = Storage(bench.place() / "s")
    try:
        with mounted(*subjects.values()):
            storage.load(image)
            _one(bench, subjects, storage)
            _a_thousand(bench, subjects, storage)
    finally:
        storage.close()


def _one(bench: Bench, subjects: dict[str, Subject], storage: Storage) -> None:
    def shell(script: str) -> None:
        run("sh", "-ec", script)

    buildah, podman = storage.words(BUILDAH), storage.words(PODMAN)
    theirs = {
        BUILDAH: f"c=$({buildah} from {storage.IMAGE}); m=$({buildah} mount $c); echo 1 >$m/file;"
        f" {buildah} umount $c; {buildah} rm $c",
        PODMAN: f"c=$({podman} create {storage.IMAGE} true); m=$({podman} mount $c); echo 1 >$m/file;"
        f" {podman} rm -f $c",
    }
    tasks = {name: Task(partial(shell, script)) for name, script in theirs.items()}
    for name, subject in subjects.items():
        one = subject.mountpoint / "containers/one"
        script = f"mkdir {one}; echo 1 >{one}/rootfs/file; rmdir {one}"
        tasks[name] = Task(partial(shell, script), spent=subject.spent)
    work = "a container made, entered, one file written, removed"
    figures = bench.alternate(work, tasks, is_warm=True)
    for name, peer in itertools.product(subjects, theirs):
        if name in figures and peer in figures:
            bench.row(work, name, peer, figures[name], figures[peer], 0.05)


def _a_thousand(bench: Bench, subjects: dict[str, Subject], storage: Storage) -> None:
    def ours(subject: Subject) -> float:
        paths = [subject.mountpoint / f"containers/c{number}" for number in range(THOUSAND)]
        return timed(lambda: [[path.mkdir() for path in paths], [path.rmdir() for path in paths]]) / THOUSAND

    def theirs() -> float:
        def work() -> None:
            for _ in range(OF_PODMAN):
                storage.podman("create", storage.IMAGE, "true")
            storage.podman("rm", "--all")

        return timed(work) / OF_PODMAN

    tasks = {name: Task(partial(ours, it), spent=it.spent) for name, it in subjects.items()}
    work = f"{THOUSAND:,} containers made and removed, each"
    figures = bench.alternate(work, {**tasks, PODMAN: Task(theirs)})
    for name in subjects:
        if name in figures and PODMAN in figures:
            bench.row(work, name, f"{PODMAN}, each of {OF_PODMAN}", figures[name], figures[PODMAN], 0.02)


def many(bench: Bench, images: BenchImages) -> None:
    """What containers cost that are not touched."""
    busybox = make_images().busybox
    (large,) = bench.subjects(images.debian, {UNION: bench.fusestore(images.debian)}).values()
    (small,) = bench.subjects(busybox, {UNION: bench.fusestore(busybox)}).values()

    def make(place: Subject, start: int, count: int) -> Figure:
        paths = [place.mountpoint / f"containers/c{number}" for number in range(start, start + count)]
        return Figure(timed(lambda: [path.mkdir() for path in paths]))

    with mounted(large, small):
        first, of_small = make(large, 0, 200), make(small, 0, 200)
        bench.row("mkdir of a container, image of 270 MB", UNION, "image of 1 MB", first, of_small, 1.5)
        make(large, 200, TEN_THOUSAND - 200)
        last = make(large, TEN_THOUSAND, 200)
        bench.row(
            f"mkdir of a container beside {TEN_THOUSAND:,} others", UNION, "beside none", last, first, 1.5
        )
        plain = bench.place()
        for number in range(TEN_THOUSAND + 200):
            (plain / f"c{number}").mkdir()
        for command in (("ls",), ("ls", "-l")):
            tasks = {
                UNION: Task(partial(run, *command, large.mountpoint / "containers")),
                "plain": Task(partial(run, *command, plain)),
            }
            work = f"{' '.join(command)} of {TEN_THOUSAND + 200:,} containers"
            figures = bench.alternate(work, tasks)
            bench.row(work, UNION, "of as many directories", figures[UNION], figures["plain"])
        for number in range(TEN_THOUSAND + 200):
            (large.mountpoint / f"containers/c{number}").rmdir()
