"""A mount that runs out of descriptors: an error for what needs one more, and nothing else."""

import errno
import os
import resource
from pathlib import Path

import pytest
from rig.mounts import Mount

pytestmark = [pytest.mark.mounted, pytest.mark.images]

LIMIT = 300


@pytest.fixture
def limited(unmounted: Mount) -> Mount:
    """A mount whose daemon may have so many descriptors."""
    script = f"ulimit -Sn 100 && ulimit -Hn {LIMIT} && exec fusestore mount $0"
    unmounted.person.run("bash", "-c", script, unmounted.mountpoint, env=unmounted.environment).ok()
    unmounted.sh("mkdir containers/a containers/b").ok()
    return unmounted


def _open_until_refused(rootfs: Path) -> tuple[int, str, bool, bool]:
    """How many files could be opened, what the next one said, whether they work and, closed, others do."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2 * LIMIT + 100, hard), hard))
    files: list[int] = []
    refused = ""
    while not refused and len(files) < 2 * LIMIT:
        try:
            files.append(os.open(rootfs / f"f{len(files)}", os.O_RDWR | os.O_CREAT))
        except OSError as error:
            refused = errno.errorcode[error.errno or 0]
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
    opened, refused, works, goes_on = limited.person.call(
        _open_until_refused, limited.containers / "a/rootfs"
    )
    assert (refused, works, goes_on) == ("EMFILE", True, True)
    assert LIMIT // 2 < opened < LIMIT
    assert limited.sh("echo x > containers/b/rootfs/x && cat containers/b/rootfs/x").ok() == "x\n"
