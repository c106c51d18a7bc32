"""Debian's podman, with storage of a test's own. Blocking."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rig.people import Person, Result

__all__ = ["Podman", "podman_of"]


class Podman:
    """The command, on kernel overlayfs, with one additional image store."""

    def __init__(self, person: Person, base: Path, image_store: Path) -> None:
        self.person = person
        self.base = base
        self.command: tuple[str | Path, ...] = (
            "podman", "--root", base / "root", "--runroot", base / "run", "--storage-driver", "overlay",
            "--storage-opt", f"additionalimagestore={image_store}",
            "--cgroup-manager", "cgroupfs", "--events-backend", "file",
        )  # fmt: skip

    def __call__(self, *arguments: str | Path) -> Result:
        return self.person.run(*self.command, *arguments)

    def run(self, *arguments: str | Path) -> Result:
        """``podman run``, so that it works without CAP_SYS_RESOURCE and beside cgroups of both versions."""
        limits = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024")
        return self("--runtime", "runc", "run", "--network", "none", *limits, *arguments)

    def stored(self) -> int:
        """Bytes of regular files in its storage."""
        files = (path for path in (self.base / "root").rglob("*") if path.is_file() and not path.is_symlink())
        return sum(path.stat().st_size for path in files)


@contextmanager
def podman_of(person: Person, image_store: Path) -> Iterator[Podman]:
    """Root's; its containers and mounts are taken away at the end."""
    base = Path(tempfile.mkdtemp(prefix="podman-", dir="/var/tmp"))  # it wants 50 characters at most
    podman = Podman(person, base, image_store)
    try:
        yield podman
        podman("rm", "--all", "--force", "--time", "0")
    finally:
        for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
            if (mount := line.split()[4]).startswith(f"{base}/"):
                person.run("umount", "-l", mount)
        shutil.rmtree(base)
