"""What is measured: fusestore by each driver, and the peers, each with one image and one container. Blocking.

A subject shows an image at `rootfs` between `mount` and `umount`. Making one does what has to be done once:
import, mksquashfs, an index. `Storage` is podman's and buildah's, which are commands and no file systems.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rig.images import Image

__all__ = [
    "COMMAND",
    "FuseOverlayfs",
    "Fusestore",
    "Overlay",
    "Ratarmount",
    "Squashfuse",
    "Storage",
    "Subject",
    "cpu_seconds",
    "mounted",
    "run",
    "used",
]

COMMAND = (sys.executable, "-m", "fusestore")
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def run(*command: str | Path, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """The standard output. RuntimeError, with what it said, when it fails or is not installed."""
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=600, env={**os.environ, **(env or {})}, cwd=cwd
        )
    except FileNotFoundError as error:
        raise RuntimeError(f"{command[0]} is not installed") from error
    if result.returncode:
        raise RuntimeError(f"{command[0]}: exit {result.returncode}: {result.stderr.strip()[-300:]}")
    return result.stdout


def used(path: Path) -> int:
    """Bytes on disk below `path`."""
    return int(run("du", "-sx", "-B1", path).split()[0])


def cpu_seconds(pids: list[int]) -> float:
    """What these processes spent so far, those of their children that ended included."""
    spent = 0.0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        spent += sum(map(int, fields[11:15])) * _TICK_S
    return spent


class Subject:
    """An image, mounted at `rootfs`."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.mountpoint = base / "mnt"
        self.mountpoint.mkdir(parents=True)
        self.rootfs = self.mountpoint

    def mount(self) -> None:
        raise NotImplementedError

    def umount(self) -> None:
        run("umount", self.mountpoint)

    def forget(self) -> None:
        """While it is not mounted: as if nothing had been read yet."""

    def renew(self) -> None:
        """While it is mounted: nothing was changed in `rootfs`, which may be another path from now on."""

    def pids(self) -> list[int]:
        """The processes that serve it."""
        return _with_argument(self.mountpoint)

    def spent(self) -> float:
        """CPU seconds of these processes since they were started."""
        return cpu_seconds(self.pids())

    def memory(self) -> int:
        """Bytes of these processes' own memory."""
        lines = (line for pid in self.pids() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def _with_argument(argument: Path) -> list[int]:
    """The processes that have `argument` in their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if os.fsencode(argument) in process.read_bytes().split(b"\0"):
                found.append(int(process.parent.name))
    return found


class Fusestore(Subject):
    """A store with one image, imported, or else like the store `imported`, which is not to be mounted."""

    def __init__(
        self,
        base: Path,
        image: Image,
        driver: str = "union",
        *,
        imported: Path | None = None,
        is_hydrated: bool = False,
        command: tuple[str, ...] = COMMAND,
    ) -> None:
        super().__init__(base)
        self.driver, self.command = driver, command
        self.image = image
        self.env = {"FUSESTORE_STORE": str(base / "store"), "FUSESTORE_RUN_DIR": str(base / "run")}
        self._containers = 0
        self._name_container()
        if imported is None:
            self.do("import", image.source, "--name", "image")
        else:
            # Links: what is written in place, what was decompressed, is not there yet.
            run("cp", "-al", imported, base / "store")
        if is_hydrated:
            self.do("hydrate", "image")

    def do(self, *arguments: str | Path) -> None:
        run(*self.command, *arguments, env=self.env)

    def mount(self) -> None:
        self.do("mount", "--driver", self.driver, self.mountpoint)
        self.rootfs.parent.mkdir(exist_ok=True)

    def umount(self) -> None:
        self.do("umount", self.mountpoint)

    def forget(self) -> None:
        """As after a reboot, but with what was decompressed before gone as well."""
        for cache in (self.base / "store/layers").glob("*/cache"):
            cache.unlink()

    def renew(self) -> None:
        self.rootfs.parent.rmdir()
        self._containers += 1
        self._name_container()
        self.rootfs.parent.mkdir()

    def _name_container(self) -> None:
        self.rootfs = self.mountpoint / f"containers/bench{self._containers}/rootfs"

    def container(self, name: str) -> Path:
        """Another container, made where there is none yet."""
        path = self.mountpoint / f"containers/{name}"
        path.mkdir(exist_ok=True)
        return path / "rootfs"

    def pids(self) -> list[int]:
        """The daemon, and the process that mounts for it."""
        found = super().pids()
        for pid in found.copy():
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                found += [int(child) for child in children.read_text().split() if int(child) not in found]
        return found


class Overlay(Subject):
    """The kernel's overlayfs on the image as umoci unpacked it."""

    def __init__(self, base: Path, image: Image) -> None:
        super().__init__(base)
        self.image = image
        self._make()

    def _make(self) -> None:
        for name in ("upper", "work"):
            (self.base / name).mkdir()

    @property
    def options(self) -> str:
        return f"lowerdir={self.image.reference},upperdir={self.base}/upper,workdir={self.base}/work"

    def mount(self) -> None:
        run("mount", "-t", "overlay", "-o", self.options, "overlay", self.mountpoint)

    def renew(self) -> None:
        self.umount()
        for name in ("upper", "work"):
            shutil.rmtree(self.base / name)
        self._make()
        self.mount()

    def pids(self) -> list[int]:
        return []


class FuseOverlayfs(Overlay):
    """fuse-overlayfs on the same."""

    def mount(self) -> None:
        run("fuse-overlayfs", "-o", self.options, self.mountpoint)

    def pids(self) -> list[int]:
        return _with_argument(self.mountpoint)


class Squashfuse(Subject):
    """squashfuse, on the unpacked image as mksquashfs packs it. Read-only."""

    def __init__(self, base: Path, image: Image) -> None:
        super().__init__(base)
        run("mksquashfs", image.reference, base / "image.squashfs", "-quiet", "-no-progress")

    def mount(self) -> None:
        run("squashfuse", self.base / "image.squashfs", self.mountpoint)


class Ratarmount(Subject):
    """ratarmount, on the layers as they came, its index made before. Read-only; it knows no whiteouts."""

    def __init__(self, base: Path, image: Image) -> None:
        super().__init__(base)
        manifest = run("skopeo", "inspect", "--format", "{{range .Layers}}{{.}} {{end}}", image.source)
        self._layers = []
        for number, digest in enumerate(manifest.split()):
            link = base / f"{number}.tar.gz"
            link.symlink_to(image.path / "blobs" / digest.replace(":", "/"))
            self._layers.append(link)
        self.mount()
        self.umount()

    def mount(self) -> None:
        run("ratarmount", "--index-folders", self.base, *self._layers, self.mountpoint)


class Storage:
    """podman's, buildah's and skopeo's containers-storage, on kernel overlayfs."""

    IMAGE = "localhost/bench:1"

    def __init__(self, base: Path) -> None:
        self.base = base
        base.mkdir(parents=True)
        self.options = ("--root", base / "root", "--runroot", base / "run", "--storage-driver", "overlay")

    def load(self, image: Image) -> None:
        place = f"[overlay@{self.base}/root+{self.base}/run]"
        run("skopeo", "--insecure-policy", "copy", "-q", image.source,
            f"containers-storage:{place}{self.IMAGE}")  # fmt: skip

    def buildah(self, *arguments: str | Path) -> str:
        return run("buildah", *self.options, *arguments).strip()

    def podman(self, *arguments: str | Path) -> str:
        own = ("--cgroup-manager", "cgroupfs", "--events-backend", "file")
        return run("podman", *self.options, *own, *arguments).strip()

    def words(self, program: str) -> str:
        """`program` and how it is to be called, for a shell."""
        return " ".join(map(str, (program, *self.options)))

    def close(self) -> None:
        """Ends all mounts below, which the programs leave behind, and removes it."""
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        for mount in reversed([mount for mount in mounts if mount.startswith(f"{self.base}/")]):
            subprocess.run(["umount", "-l", mount], check=False, capture_output=True, timeout=60)
        shutil.rmtree(self.base)


@contextlib.contextmanager
def mounted(*subjects: Subject) -> Iterator[None]:
    """Each with nothing changed."""
    with contextlib.ExitStack() as stack:
        for subject in subjects:
            subject.mount()
            stack.callback(_end, subject.umount, subject.mountpoint)
            subject.renew()
        yield


def _end(umount: Callable[[], None], mountpoint: Path) -> None:
    """Lazily where it does not go otherwise: a part that failed must not keep the next from its work."""
    try:
        umount()
    except RuntimeError:
        subprocess.run(["umount", "-l", mountpoint], check=False, capture_output=True, timeout=60)
