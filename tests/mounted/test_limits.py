"""A mount whose descriptors are all used: no more files can be opened, and everything else works."""

import errno
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from rig.bustle import command
from rig.mounts import Mount

pytestmark = [pytest.mark.mounted, pytest.mark.images]

LIMIT = 300


@pytest.fixture
def limited(unmounted: Mount) -> Mount:
    """A mount whose daemon may have so many descriptors."""
    script = f"ulimit -Sn 100 && ulimit -Hn {LIMIT} && exec fusestore mount $0"
    unmounted.person.run("bash", "-c", script, unmounted.mountpoint, env=unmounted.environment).ok()
    unmounted.sh("mkdir containers/a containers/b containers/c; mkdir containers/a/rootfs/d").ok()
    return unmounted


def _open_until_refused(rootfs: Path) -> tuple[list[int], str]:
    """As many files as can be opened, and what the next one says."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2 * LIMIT + 100, hard), hard))
    files: list[int] = []
    while len(files) < 2 * LIMIT:
        try:
            files.append(os.open(rootfs / f"f{len(files)}", os.O_RDWR | os.O_CREAT))
        except OSError as error:
            return files, errno.errorcode[error.errno or 0]
    return files, ""


def _use_all(rootfs: Path) -> tuple[int, str, bool, bool]:
    """How many files could be opened, what the next one said, whether they work and, closed, others do."""
    files, refused = _open_until_refused(rootfs)
    for number, fd in enumerate(files):
        os.write(fd, b"%d" % number)
        os.fsync(fd)
    works = all(os.pread(fd, 10, 0) == b"%d" % number for number, fd in enumerate(files))
    for fd in files:
        os.close(fd)
    (rootfs / "after").write_text("after")
    names = {f"f{number}" for number in range(len(files))} | {"after"}
    return len(files), refused, works, names <= set(os.listdir(rootfs))


def test_open_files_are_bounded_by_the_hard_limit_and_go_on_at_it(limited: Mount) -> None:
    opened, refused, works, goes_on = limited.person.call(_use_all, limited.containers / "a/rootfs")
    assert (refused, works, goes_on) == ("EMFILE", True, True)
    assert LIMIT // 2 < opened < LIMIT
    assert limited.sh("echo x > containers/b/rootfs/x && cat containers/b/rootfs/x").ok() == "x\n"


OTHERS: dict[str, Callable[[Path], object]] = {
    "make a container": lambda top: os.mkdir(top / "containers/new"),
    "remove a container": lambda top: os.rmdir(top / "containers/b"),
    "rename a container": lambda top: os.rename(top / "containers/c", top / "containers/e"),
    "read metadata": lambda top: (top / "containers/a/metadata.json").read_bytes(),
    "write metadata": lambda top: (top / "containers/a/metadata.json").write_text('{"key": 1}'),
    "list containers": lambda top: os.listdir(top / "containers"),
    "enter a container": lambda top: os.listdir(top / "containers/e/rootfs/etc"),
    "list": lambda top: os.listdir(top / "containers/a/rootfs"),
    "make a directory": lambda top: os.mkdir(top / "containers/a/rootfs/d/d"),
    "copy up": lambda top: os.chmod(top / "containers/a/rootfs/bin/busybox", 0o700),
    "read an image": lambda top: (top / "images/busybox/rootfs/bin/busybox").read_bytes(),
    "tag": lambda top: os.symlink("busybox", top / "images/tag"),
    "make a file beside metadata": lambda top: (top / "containers/a/file").write_text("x"),
    "list views": lambda top: os.listdir(top / "views/podman/overlay"),
}


def _try_others(top: Path) -> tuple[dict[str, str], bool]:
    """How each fails while no more files can be opened; and whether those that are open work after that."""
    failures = {}
    files, _ = _open_until_refused(top / "containers/a/rootfs")
    for name, call in OTHERS.items():
        try:
            call(top)
        except OSError as error:
            failures[name] = errno.errorcode[error.errno or 0]
    for fd in files:
        os.write(fd, b"x")
        os.fsync(fd)
    return failures, all(os.pread(fd, 10, 0) == b"x" for fd in files)


def test_all_else_works_where_no_more_files_can_be_opened(limited: Mount) -> None:
    assert limited.person.call(_try_others, limited.mountpoint) == ({}, True)
    assert limited.fusestore("check").ok() == ""


def test_status_tells_of_a_mount_where_no_more_files_can_be_opened(limited: Mount) -> None:
    def ask() -> tuple[int, int]:
        files, _ = _open_until_refused(limited.containers / "a/rootfs")
        report = json.loads(command(environment, "status", str(limited.mountpoint), "--json"))
        return len(files) - report["handles"], report["descriptors"]["max"]

    environment = limited.person.environment(**limited.environment)
    assert limited.person.call(ask) == (0, LIMIT)
