"""Work in a container's rootfs, each driver beside what it is to replace: cold, warm, change, copyup.

The driver union stands beside fuse-overlayfs, those of the kernel beside kernel overlayfs.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from benchimages import BenchImages
from measure import Bench, Task, drop_caches
from rig.images import Image
from subjects import FuseOverlayfs, Overlay, Squashfuse, Subject, mounted
from works import (
    create_and_remove,
    fio,
    git_status,
    import_modules,
    lstat_all,
    open_read_close_all,
    read_all,
    read_file,
    touch_byte,
    untar,
    walk,
    write_file,
)

from fusestore.drivers import DRIVERS

__all__ = ["FUSE", "KERNEL", "KERNEL_DRIVERS", "UNION", "beside", "change", "cold", "copyup", "peers", "warm"]

UNION, EROFS = "union", "erofs"
KERNEL_DRIVERS = [name for name in DRIVERS if name != UNION]
KERNEL, FUSE = "kernel overlayfs", "fuse-overlayfs"
HYDRATED = ", hydrated"
SQUASHFUSE = "squashfuse"

FILES = 10_000
SIZE = 1 << 30

Makers = Mapping[str, Callable[[Path], Subject]]


def peers(bench: Bench, image: Image) -> dict[str, Callable[[Path], Subject]]:
    """Fusestore by each driver, and what it stands beside."""
    ours = {name: bench.fusestore(image, name) for name in (UNION, *KERNEL_DRIVERS)}
    return {**ours, KERNEL: partial(Overlay, image=image), FUSE: partial(FuseOverlayfs, image=image)}


def beside(by_kernel: float | None, by_union: float | None) -> dict[str, dict[str, float | None]]:
    """Who stands beside whom, and the ratio to be reached."""
    return {**{name: {KERNEL: by_kernel} for name in KERNEL_DRIVERS}, UNION: {FUSE: by_union}}


def cold(bench: Bench, images: BenchImages) -> None:
    image = images.debian
    hydrated: Makers = {
        driver + HYDRATED: bench.fusestore(image, driver, is_hydrated=True) for driver in (UNION, EROFS)
    }
    makers = {**peers(bench, image), **hydrated, SQUASHFUSE: partial(Squashfuse, image=image)}
    subjects = bench.subjects(image, makers)
    with mounted(*subjects.values()):
        for work, do, by_kernel, of_gzip in (
            ("walk of the tree, cold", walk, 0.5, 1.0),
            ("read of all files, cold", read_all, 1.5, None),
        ):
            rows = beside(by_kernel, of_gzip)
            rows[UNION] |= {SQUASHFUSE: None}
            rows |= {EROFS + HYDRATED: {KERNEL: 0.5}, UNION + HYDRATED: {FUSE: 1.0}}
            bench.compare(work, do, subjects, rows, cold=True)


def warm(bench: Bench, images: BenchImages) -> None:
    image = images.debian
    subjects = bench.subjects(image, peers(bench, image))
    rows = beside(1.05, 1.0)
    with mounted(*subjects.values()):
        for work, do in (
            ("walk of the tree, warm", walk),
            ("lstat of all names, warm", lstat_all(image.reference)),
            ("open, read, close of all small files, warm", open_read_close_all(image.reference)),
        ):
            bench.compare(work, do, subjects, rows)
        names = lstat_all(image.reference)
        bench.compare("lstat of all names from outside, by their whole path, warm",
                      lambda _: names(Path.cwd()), subjects, beside(None, None))  # fmt: skip


def change(bench: Bench, images: BenchImages) -> None:
    subjects = bench.subjects(images.debian, peers(bench, images.debian))
    rows = beside(1.05, 1.0)
    with mounted(*subjects.values()):
        bench.compare(
            f"create, write 4 KiB, close, unlink, × {FILES:,}", create_and_remove(FILES), subjects, rows
        )
        bench.compare("write 1 GiB and fsync", write_file("big", SIZE), subjects, rows)
        bench.compare("read it back", read_file("big"), subjects, rows)
        bench.compare("read it back, caches dropped", read_file("big"), subjects, rows,
                      before=lambda _: drop_caches())  # fmt: skip
        bench.compare("fio: random reads and writes of 4 KiB", fio, subjects, rows)
        bench.compare("import of 500 modules of Python", import_modules, subjects, rows)
        bench.compare("untar a git repository, remove it", untar(images.source_tree), subjects, rows)
        keep = untar(images.source_tree, is_kept=True)
        tasks = {name: Task(partial(keep, subject.rootfs)) for name, subject in subjects.items()}
        able = bench.alternate("untar, kept", tasks, rounds=1)
        subjects = {name: subjects[name] for name in able}
        bench.compare("git status in it", git_status, subjects, rows)


def copyup(bench: Bench, images: BenchImages) -> None:
    subjects = bench.subjects(images.large, peers(bench, images.large))
    rows = beside(1.05, 1.0)
    with mounted(*subjects.values()):

        def renew(subject: Subject) -> None:
            subject.renew()
            read_file("one-gib")(subject.rootfs)

        bench.compare("copy-up of 1 GiB, by one byte, read before", touch_byte("one-gib"), subjects, rows,
                      before=renew)  # fmt: skip
        bench.compare("the same, cold", touch_byte("one-gib"), subjects, beside(None, None), cold=True,
                      before=Subject.renew)  # fmt: skip
        bench.compare("read of a file of 2 GiB, cold", read_file("two-gib"), subjects, beside(1.5, None),
                      cold=True)  # fmt: skip
