"""How fast, and how large, beside the peers: ``python tests/bench/bench.py`` prints a table of ratios.

With words behind it, only the parts of these names (`PARTS`): ``bench.py memory rootfs``.

Every work is done by fusestore and by its peer in the same run, alternating, ROUNDS times; a ratio is median
by median, below 1 is for fusestore. Absolute times depend on the machine and mean little. Needs root, the
images of the tests (`rig.images`) and fuse-overlayfs. Cold: caches dropped and all mounted anew before it.

The peers work on the image as umoci unpacked it: what unpacking costs is a row of its own.
"""

import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from isal import isal_zlib

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rig.distribution import make_distribution
from rig.images import Image, Images, make_images
from rig.ocisources import OCI, SourceMaker, digest, tar_of
from rig.people import root
from rig.podman import podman_of
from rig.registries import docker_registry, hold_back, proxy_of

ROUNDS = 5
CONTAINERS = 10_000
FILES = 500
OPENS = 2_000
LARGE, LARGE_ROUNDS = 1 << 30, 3
"""Bytes of a file that is read while other things are done, and how often."""
SMALL_FILES = 20_000
FEW, MANY = 1_000, 200_000
"""Files in a directory, or containers."""

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

    def spent(self) -> float:
        """Seconds of processor time of the daemon so far."""
        fields = Path(f"/proc/{self.pid()}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

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


def look(container: Path) -> int:
    """lstat a container and what is right in it; how many inodes that is."""
    with os.scandir(container) as entries:
        return 1 + sum(1 for entry in entries if entry.stat(follow_symlinks=False))


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
    for number in range(FEW):
        (place.mountpoint / f"containers/n{number}").mkdir()
    place.umount()
    place.mount()
    before = place.memory()
    count = sum(look(place.mountpoint / f"containers/n{number}") for number in range(FEW))
    each = (place.memory() - before) / count
    row("the same, of containers nobody entered", "1 KiB", each / 1024, f"{each:.0f} bytes")
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


def make_large_image(path: Path) -> Image:
    """Two gzip layers, each with a file of LARGE bytes; in the upper one besides many empty ones."""
    chance = random.Random(1)
    words = [b"%x" % chance.getrandbits(32) for _ in range(5_000)]
    text = b" ".join(chance.choices(words, k=150_000))[: 1 << 20]
    small = {f"small/{number}": b"" for number in range(SMALL_FILES)}
    contents = [{"lower": text * (LARGE >> 20)}, {"upper": text * (LARGE >> 20), **small}]
    maker, layers, diff_ids = SourceMaker(), [], []
    for content in contents:
        tar = tar_of(content)
        diff_ids.append(digest(tar))
        gzip = isal_zlib.compress(tar, 1, wbits=31)
        layers.append(maker.blob(gzip, OCI + "layer.v1.tar+gzip"))
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    manifest = {
        "schemaVersion": 2,
        "config": maker.blob(json.dumps(config).encode(), OCI + "config.v1+json"),
        "layers": layers,
    }
    maker.manifests.append(maker.blob(json.dumps(manifest).encode(), OCI + "manifest.v1+json"))
    maker.manifests[0]["annotations"] = {"org.opencontainers.image.ref.name": "large"}
    maker.directory(path)
    return Image(path, "large", path, 2)


def bench_concurrency(base: Path, images: Images) -> None:
    place = Fusestore(base / "concurrency", make_large_image(base / "large-image"))
    place.load()
    place.mount()

    def cool() -> None:
        place.umount()
        place.forget()
        drop_caches()
        place.mount()
        os.stat(place.rootfs / "lower")

    def read(*names: str) -> list[subprocess.Popen[bytes]]:
        return [subprocess.Popen(["dd", "bs=1M", "of=/dev/null", f"if={place.rootfs}/{name}", "status=none"])
                for name in names]  # fmt: skip

    def stat_while(readers: list[subprocess.Popen[bytes]], count: int) -> list[float]:
        """Seconds of each lstat of a file that the kernel does not know yet."""
        times: list[float] = []
        while len(times) < count and all(reader.poll() is None for reader in readers):
            path = place.rootfs / f"small/{len(times)}"
            times.append(timed(lambda path=path: os.lstat(path)))  # type: ignore[misc]
            time.sleep(0.001)
        return times

    ratios, late = [], []
    for _ in range(LARGE_ROUNDS):
        cool()
        idle = stat_while([], 1_000)
        cool()
        readers = read("lower")
        busy = stat_while(readers, SMALL_FILES)
        readers[0].kill()
        readers[0].wait()
        ratios.append(statistics.median(busy) / statistics.median(idle))
        late.append(statistics.quantiles(busy, n=20)[-1] / statistics.median(idle))
    row(
        "lstat of a file while 1 GiB is read from a gzip layer, cold",
        "while nothing is read",
        statistics.median(ratios),
        f"at most 5; 5 of 100 take longer than {statistics.median(late):.0f}",
    )

    alone, together, cores = [], [], []
    for _ in range(LARGE_ROUNDS):
        for names, times in ((["lower"], alone), (["lower", "upper"], together)):
            cool()
            before = place.spent()
            seconds = timed(lambda names=names: [reader.wait() for reader in read(*names)])  # type: ignore[misc]
            times.append(seconds)
        cores.append((place.spent() - before) / seconds)
    row(
        "reads of 1 GiB from each of two gzip layers at once, cold",
        "one of them alone",
        statistics.median(together) / statistics.median(alone),
        f"{statistics.median(cores):.2f} cores busy",
    )
    place.umount()


def bench_directory(base: Path, images: Images) -> None:
    place = Fusestore(base / "directory", images.busybox)
    place.load()
    place.mount()

    def work(count: int) -> dict[str, float]:
        """Seconds for each file."""
        directory = place.rootfs / f"d{count}"
        directory.mkdir()
        paths = [directory / str(number) for number in range(count)]
        works = {
            "create": lambda: [os.close(os.open(path, os.O_CREAT | os.O_WRONLY)) for path in paths],
            "list": lambda: os.listdir(directory),
            "lstat": lambda: [os.lstat(path) for path in paths],
            "remove": lambda: [os.unlink(path) for path in paths],
        }
        times = {name: timed(work) / count for name, work in works.items()}
        directory.rmdir()
        return times

    work(FEW)  # warm
    rounds = [work(FEW) for _ in range(ROUNDS)]
    many = work(MANY)
    for name, seconds in many.items():
        few = statistics.median(done[name] for done in rounds)
        row(f"{name} a file in a directory of {MANY}", f"in one of {FEW}", seconds / few, "at most 3")
    place.umount()


def bench_lazy(base: Path, images: Images) -> None:
    """From nothing to the content of one file of an image in a registry: Debian with a compiler."""
    place = base / "lazy"
    place.mkdir()
    (place / "mnt").mkdir()
    env = {"FUSESTORE_STORE": str(place / "store"), "FUSESTORE_RUN_DIR": str(place / "run")}

    def ours(reference: str) -> None:
        run(*COMMAND, "pull", "--lazy", reference, env=env)
        run(*COMMAND, "mount", place / "mnt", env=env)
        run(*COMMAND, "create", "default", "c", env=env)
        run("cat", place / "mnt/containers/c/rootfs/etc/debian_version")

    def clear() -> None:
        run(*COMMAND, "umount", place / "mnt", env=env)
        shutil.rmtree(place / "store")

    with (
        docker_registry(base / "registry") as registry,
        proxy_of(registry.port) as proxy,
        podman_of(root(), place) as podman,
    ):
        reference = f"{registry.name}/lazy/app:1"
        options = ("--dest-compress-format", "zstd:chunked", "--dest-tls-verify=false")
        run("skopeo", "copy", *options, make_distribution().source, f"docker://{reference}")

        def theirs() -> None:
            # It warns of what it finds itself: no .ok().
            assert podman("pull", "--quiet", "--tls-verify=false", reference).code == 0
            assert podman.run("--rm", reference, "cat", "/etc/debian_version").code == 0

        lazy, whole = [], []
        for _ in range(LARGE_ROUNDS):
            lazy.append(timed(lambda: ours(reference)))
            clear()
            whole.append(timed(theirs))
            assert podman("rmi", "--all", "--force").code == 0
        ratio = statistics.median(lazy) / statistics.median(whole)
        row("pull --lazy, mount, create, read a file", "podman pull, podman run", ratio, "at most 0.1")
        hold_back(proxy)
        ours(f"{proxy.name}/lazy/app:1")
        found = subprocess.check_output([*COMMAND, "images", "--json"], env={**os.environ, **env})
        size = json.loads(found)[0]["size"]
        clear()
        row("bytes fetched until then", "the image", proxy.fetched() / size)


@contextlib.contextmanager
def mounted(*subjects: Subject) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for subject in subjects:
            subject.mount()
            stack.callback(subject.umount)
        yield


PARTS = {
    "import": bench_import,
    "containers": bench_containers,
    "memory": bench_memory,
    "rootfs": bench_rootfs,
    "loop": bench_loop,
    "concurrency": bench_concurrency,
    "directory": bench_directory,
    "lazy": bench_lazy,
}


def main() -> None:
    images = make_images()
    base = Path(
        tempfile.mkdtemp(prefix="fusestore-bench-", dir=os.environ.get("FUSESTORE_TEST_TMP", "/var/tmp"))
    )
    print("| work | beside | ratio | |\n|---|---|---|---|")
    try:
        for name in sys.argv[1:] or PARTS:
            PARTS[name](base, images)
    finally:
        shutil.rmtree(base)


if __name__ == "__main__":
    main()
