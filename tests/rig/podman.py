"""Debian's podman, with storage of a test's own. Blocking."""

import os
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
        self._own: tuple[str | Path, ...] = (
            "podman", "--root", base / "root", "--runroot", base / "run", "--storage-driver", "overlay",
            "--cgroup-manager", "cgroupfs", "--events-backend", "file",
        )  # fmt: skip
        self.command = (*self._own, "--storage-opt", f"additionalimagestore={image_store}")

    @property
    def environment(self) -> dict[str, str]:
        return {"XDG_RUNTIME_DIR": str(self.base / "runtime")}

    def __call__(self, *arguments: str | Path) -> Result:
        return self.person.run(*self.command, *arguments, env=self.environment)

    def unshare(self, *command: str | Path, env: dict[str, str]) -> Result:
        """`command` in the user namespace where a plain user's podman works, of which it keeps one."""
        return self.person.run(*self._own, "unshare", *command, env={**self.environment, **env})

    def end(self) -> None:
        """Ends the process that keeps a plain user's namespaces, and so all that is mounted there."""
        self.person.run(*self._own, "system", "migrate", env=self.environment)

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
    """The person's; its containers and mounts are taken away at the end."""
    base = Path(tempfile.mkdtemp(prefix="podman-", dir="/var/tmp"))  # it wants 50 characters at most
    (base / "runtime").mkdir()
    if not person.is_root:
        for directory in (base, base / "runtime"):
            os.chown(directory, person.uid, person.gid)
    podman = Podman(person, base, image_store)
    try:
        yield podman
    finally:
        podman("rm", "--all", "--force", "--time", "0")
        if not person.is_root:
            podman.end()
        for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
            if (mount := line.split()[4]).startswith(f"{base}/"):
                person.run("umount", "-l", mount)
        shutil.rmtree(base)
