"""The work that is measured: each done in a rootfs, by this process or a program. Blocking.

What this process does itself it does by plain system calls, so that little of the time is Python's.
"""

import functools
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from benchimages import MODULES
from subjects import run

__all__ = [
    "create_and_remove",
    "fio",
    "git_status",
    "import_modules",
    "lstat_all",
    "open_read_close_all",
    "read_all",
    "read_file",
    "touch_byte",
    "untar",
    "walk",
    "write_file",
]

_BLOCK = 1 << 20


def walk(root: Path) -> None:
    """lstat everything."""
    stack = [os.fsencode(root)]
    while stack:
        with os.scandir(stack.pop()) as entries:
            for entry in entries:
                entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    stack.append(entry.path)


def read_all(root: Path) -> None:
    """Lists everything, and reads all regular files."""
    stack = [os.fsencode(root)]
    while stack:
        with os.scandir(stack.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    stack.append(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    _read(entry.path)


def _read(path: bytes | Path, limit: int | None = None) -> None:
    left = sys.maxsize if limit is None else limit
    fd = os.open(path, os.O_RDONLY)
    while left > 0 and (data := os.read(fd, _BLOCK)):
        left -= len(data)
    os.close(fd)


@functools.cache
def _names(reference: Path, *, is_files: bool) -> list[str]:
    """What is in a tree, relative to it: all, or regular files of up to 1 MiB."""
    found = []
    for directory, subdirectories, files in os.walk(reference):
        for path in (
            os.path.join(directory, name) for name in (files if is_files else files + subdirectories)
        ):
            if not is_files or (os.path.isfile(path) and not os.path.islink(path)
                                and os.stat(path).st_size <= _BLOCK):  # fmt: skip
                found.append(os.path.relpath(path, reference))
    return found


def lstat_all(reference: Path) -> Callable[[Path], None]:
    """lstat of all names of `reference`, a tree like the rootfs."""

    def work(root: Path) -> None:
        for name in _names(reference, is_files=False):
            os.lstat(f"{root}/{name}")

    return work


def open_read_close_all(reference: Path) -> Callable[[Path], None]:
    """open, one read and close of all files of up to 1 MiB."""

    def work(root: Path) -> None:
        for name in _names(reference, is_files=True):
            fd = os.open(f"{root}/{name}", os.O_RDONLY)
            os.read(fd, _BLOCK)
            os.close(fd)

    return work


def create_and_remove(count: int) -> Callable[[Path], None]:
    """create, write 4 KiB, close, of so many files in a new directory; then unlink."""

    def work(root: Path) -> None:
        data = b"x" * 4096
        directory = f"{root}/made"
        os.mkdir(directory)
        for number in range(count):
            fd = os.open(f"{directory}/{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            os.write(fd, data)
            os.close(fd)
        for number in range(count):
            os.unlink(f"{directory}/{number}")
        os.rmdir(directory)

    return work


def write_file(name: str, size: int) -> Callable[[Path], None]:
    """Sequential, over what is there, until it is on disk."""

    def work(root: Path) -> None:
        data = os.urandom(_BLOCK)
        fd = os.open(root / name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        for _ in range(size // _BLOCK):
            os.write(fd, data)
        os.fsync(fd)
        os.close(fd)

    return work


def read_file(name: str, size: int | None = None) -> Callable[[Path], None]:
    """Sequential; only the first `size` bytes, if given."""
    return lambda root: _read(root / name, size)


def touch_byte(name: str) -> Callable[[Path], None]:
    """Writes one byte in the middle of a file of the image."""

    def work(root: Path) -> None:
        fd = os.open(root / name, os.O_RDWR)
        os.pwrite(fd, b"!", os.fstat(fd).st_size // 2)
        os.close(fd)

    return work


def fio(root: Path) -> float:
    """Random reads and writes of 4 KiB in a file of 128 MiB; seconds for 10,000 of them."""
    report = run(
        "fio", "--name=bench", f"--directory={root}", "--rw=randrw", "--bs=4k", "--size=128m",
        "--runtime=2", "--time_based", "--ioengine=psync", "--fallocate=none", "--output-format=json",
    )  # fmt: skip
    (root / "bench.0.0").unlink()
    (job,) = json.loads(report)["jobs"]
    return float(10_000 / (job["read"]["iops"] + job["write"]["iops"]))


def untar(archive: Path, *, is_kept: bool = False) -> Callable[[Path], None]:
    """Unpacks it below /untar, and removes that, if it is not to be kept."""

    def work(root: Path) -> None:
        target = root / "untar"
        target.mkdir()
        run("tar", "-xf", archive, "-C", target)
        if not is_kept:
            shutil.rmtree(target)

    return work


def git_status(root: Path) -> None:
    """In /untar/src."""
    run("git", "status", "--porcelain", cwd=root / "untar/src", env={"GIT_CONFIG_GLOBAL": "/dev/null"})


def import_modules(root: Path) -> None:
    """All of /opt/modules, by a new Python."""
    statement = "import " + ", ".join(f"m{number}" for number in range(MODULES))
    run("/usr/bin/python3", "-SBc", statement, env={"PYTHONPATH": str(root / "opt/modules")})
