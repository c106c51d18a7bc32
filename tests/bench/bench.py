"""How fast, and how large, beside the peers: ``python tests/bench/bench.py`` prints a table of ratios.

Every work is done by fusestore and by its peer in the same run, alternating, ROUNDS times; a ratio is median
by median, below 1 is for fusestore. Absolute times depend on the machine and mean little. Needs root, the
images of the tests (`rig.images`) and fuse-overlayfs. Cold: caches dropped and all mounted anew before it.

The peers work on the image as umoci unpacked it: what unpacking costs is a row of its own.
"""

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rig.images import Image, Images, make_images

ROUNDS = 5
CONTAINERS = 10_000
FILES = 500
OPENS = 2_000

COMMAND = [sys.executable, "-m", "fusestore"]
PLAIN_LOOP = "import trio, fusestore.mount as m, fusestore.cli as c; m._stand_in = lambda _: trio; c.main()"
"""The daemon as it would be with pyfuse3's own event loop."""


def run(*command: str | Path, env: dict[str, str] | None = None) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=600, env={**os.environ, **(env or {})})


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def used(path: Path) -> int:
    """Bytes on disk below `path`."""
    return int(subprocess.check_output(["du", "-s", "-B1", path]).split()[0])


class Fusestore:
    """A store with an image, mounted, with one container."""

    def __init__(self, base: Path, image: Image, command: list[str] = COMMAND) -> None:
        self.base, self.image, self.command = base, image, command
        self.mountpoint = base / "mnt"
        self.mountpoint.mkdir(parents=True)
        self.env = {"FUSESTORE_STORE": str(base / "store"), "FUSESTORE_RUN_DIR": str(base / "run")}
        self.rootfs = self.mountpoint / "containers/bench/rootfs"

    def do(self, *arguments: str | Path) -> None:
        run(*self.command, *arguments, env=self.env)

    def load(self) -> None:
        self.do("import", self.image.source, "--name", "image")

    def mount(self) -> None:
        self.do("mount", self.mountpoint)
        self.rootfs.parent.mkdir(exist_ok=True)

    def umount(self) -> None:
        self.do("umount", self.mountpoint)

    def forget(self) -> None:
        """As after a reboot: nothing decompressed yet."""
        for cache in (self.base / "store/layers").glob("*/cache"):
            cache.unlink()

    def pid(self) -> int:
        words = [b"mount", os.fsencode(self.mountpoint)]
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if all(word in process.read_bytes().split(b"\0") for word in words):
                    return int(process.parent.name)
        raise RuntimeError("the daemon is not there")

    def memory(self) -> int:
        for line in Path(f"/proc/{self.pid()}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("no RssAnon")


class Overlay:
    """An overlay of the unpacked image: the kernel's or fuse-overlayfs."""

    def __init__(self, base: Path, image: Image, kind: str) -> None:
        self.kind = kind
        self.rootfs = base / "mnt"
        for name in ("mnt", "upper", "work"):
            (base / name).mkdir(parents=True)
        self.options = f"lowerdir={image.reference},upperdir={base}/upper,workdir={base}/work"

    def mount(self) -> None:
        if self.kind == "fuse-overlayfs":
            run("fuse-overlayfs", "-o", self.options, self.rootfs)
        else:
            run("mount", "-t", "overlay", "-o", self.options, "overlay", self.rootfs)

    def umount(self) -> None:
        run("umount", self.rootfs)

    def forget(self) -> None:
        pass


Subject = Fusestore | Overlay


def walk(root: Path) -> int:
    """lstat everything; how many there are."""
    count = 0
    stack = [os.fsencode(root)]
    while stack:
        with os.scandir(stack.pop()) as entries:
            for entry in entries:
                entry.stat(follow_symlinks=False)
                count += 1
                if entry.is_dir(follow_symlinks=False):
                    stack.append(entry.path)
    return count


def read_all(root: Path) -> None:
    for directory, _, names in os.walk(os.fsencode(root)):
        for name in names:
            path = os.path.join(directory, name)
            if os.path.isfile(path) and not os.path.islink(path):
                with open(path, "rb", buffering=0) as file:
                    while file.read(1 << 20):
                        pass


def open_close(root: Path) -> None:
    path = root / "usr/bin/perl"
    for _ in range(OPENS):
        os.close(os.open(path, os.O_RDONLY))


def create(root: Path) -> None:
    directory = root / "made"
    directory.mkdir()
    for number in range(FILES):
        (directory / str(number)).write_bytes(b"x" * 1000)
    shutil.rmtree(directory)


def untar(root: Path, archive: Path) -> None:
    target = root / "untar"
    target.mkdir()
    run("tar", "-xf", archive, "-C", target)
    shutil.rmtree(target)


def drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def compare(
    subjects: dict[str, Subject], work: Callable[[Path], object], *, cold: bool = False
) -> dict[str, float]:
    """Median seconds of `work` for each subject."""
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(ROUNDS):
        for name, subject in subjects.items():
            if cold:
                subject.umount()
                subject.forget()
                drop_caches()
                subject.mount()
            elif not times[name]:
                work(subject.rootfs)  # warm
            times[name].append(timed(lambda subject=subject: work(subject.rootfs)))  # type: ignore[misc]
    return {name: statistics.median(values) for name, values in times.items()}


def row(work: str, peer: str, ratio: float, note: str = "") -> None:
    print(f"| {work} | {peer} | {ratio:.2f} | {note} |", flush=True)


def bench_import(base: Path, images: Images) -> None:
    ours, theirs = [], []
    for number in range(ROUNDS):
        place = Fusestore(base / f"import{number}", images.debian)
        ours.append(timed(place.load))
        bundle = base / f"unpack{number}"
        theirs.append(
            timed(
                lambda bundle=bundle: run(
                    "umoci", "unpack", "--image", f"{images.debian.path}:debian", bundle
                )
            )  # type: ignore[misc]
        )
    blobs = used(images.debian.path / "blobs")
    row("import", "umoci unpack", statistics.median(ours) / statistics.median(theirs))
    row(
        "bytes on disk after import",
        "the compressed blobs",
        used(place.base / "store") / blobs,
        "at most 1.15",
    )
    row(
        "bytes on disk after import",
        "the unpacked tree",
        used(place.base / "store") / used(bundle / "rootfs"),
    )


def bench_containers(base: Path, images: Images) -> None:
    large, small = Fusestore(base / "large", images.debian), Fusestore(base / "small", images.busybox)
    for place in (large, small):
        place.load()
        place.mount()

    def make(place: Fusestore, start: int, count: int) -> float:
        return timed(lambda: [(place.mountpoint / f"containers/c{start + n}").mkdir() for n in range(count)])

    many = make(large, 0, 200)
    row("mkdir of a container, image of 36 MB", "image of 1 MB", many / make(small, 0, 200), "O(1): 1")
    make(large, 200, CONTAINERS - 200)
    row(
        f"mkdir of a container beside {CONTAINERS} others",
        "beside none",
        make(large, CONTAINERS, 200) / many,
        "O(1): 1",
    )
    plain = base / "plain"
    for number in range(CONTAINERS + 200):
        (plain / f"c{number}").mkdir(parents=True)
    ours = timed(lambda: run("ls", large.mountpoint / "containers"))
    theirs = timed(lambda: run("ls", plain))
    row(f"ls of {CONTAINERS + 200} containers", "ls of as many directories", ours / theirs, f"{ours:.2f} s")
    ours = timed(lambda: run("ls", "-l", large.mountpoint / "containers"))
    theirs = timed(lambda: run("ls", "-l", plain))
    row("ls -l of the same", "ls -l of the same", ours / theirs, f"{ours:.2f} s")
    for place in (large, small):
        place.umount()


def bench_memory(base: Path, images: Images) -> None:
    place = Fusestore(base / "memory", images.debian)
    place.load()
    place.mount()
    walk(place.rootfs)
    before, count = place.memory(), 0
    for number in range(5):
        (place.mountpoint / f"containers/m{number}").mkdir()
        count += walk(place.mountpoint / f"containers/m{number}/rootfs")
    each = (place.memory() - before) / count
    row("memory of the daemon for each inode the kernel knows", "1 KiB", each / 1024, f"{each:.0f} bytes")
    place.umount()


def bench_rootfs(base: Path, images: Images) -> None:
    ours = Fusestore(base / "ours", images.debian)
    ours.load()
    subjects: dict[str, Subject] = {
        "ours": ours,
        "fuse-overlayfs": Overlay(base / "fuse", images.debian, "fuse-overlayfs"),
        "kernel overlayfs": Overlay(base / "kernel", images.debian, "overlay"),
    }
    archive = base / "files.tar"
    run("tar", "-cf", archive, "-C", images.debian.reference, "usr/lib/python3.11")
    with mounted(*subjects.values()):
        works: list[tuple[str, Callable[[Path], object], bool]] = [
            ("walk of all names, cold", walk, True),
            ("read of all files, cold", read_all, True),
            ("walk of all names, warm", walk, False),
            ("read of all files, warm", read_all, False),
            (f"{OPENS} times open and close of a file, warm", open_close, False),
            (f"create, write, remove {FILES} files", create, False),
            ("untar of python's library, remove it", lambda root: untar(root, archive), False),
        ]
        for name, work, cold in works:
            medians = compare(subjects, work, cold=cold)
            for peer in list(subjects)[1:]:
                row(name, peer, medians["ours"] / medians[peer])


def bench_loop(base: Path, images: Images) -> None:
    subjects: dict[str, Subject] = {
        "ours": Fusestore(base / "loop", images.debian),
        "plain": Fusestore(base / "trio", images.debian, [sys.executable, "-c", PLAIN_LOOP]),
    }
    for place in subjects.values():
        assert isinstance(place, Fusestore)
        place.load()
    with mounted(*subjects.values()):
        medians = compare(subjects, open_close)
        row(
            f"{OPENS} times open and close",
            "with pyfuse3's own event loop",
            medians["ours"] / medians["plain"],
        )


@contextlib.contextmanager
def mounted(*subjects: Subject) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for subject in subjects:
            subject.mount()
            stack.callback(subject.umount)
        yield


def main() -> None:
    images = make_images()
    base = Path(
        tempfile.mkdtemp(prefix="fusestore-bench-", dir=os.environ.get("FUSESTORE_TEST_TMP", "/var/tmp"))
    )
    print("| work | beside | ratio | |\n|---|---|---|---|")
    try:
        for part in (bench_import, bench_containers, bench_memory, bench_rootfs, bench_loop):
            part(base, images)
    finally:
        shutil.rmtree(base)


if __name__ == "__main__":
    main()
