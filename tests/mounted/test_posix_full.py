"""Calls in a rootfs whose store is on a full disk: ENOSPC, and nothing is half done."""

import os
import stat
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rig.layers import directory, file, symlink, tar_layer
from rig.mounts import Mount
from rig.ocisources import SourceMaker
from rig.people import Person, as_root
from rig.posix import Call, call, make_calls
from rig.snapshot import differences, snapshot

pytestmark = [pytest.mark.mounted]

CREATE = os.O_CREAT | os.O_WRONLY
LAYER = (
    directory(b"d"),
    file(b"d/f", b"content"),
    directory(b"e"),
    file(b"f", b"content"),
    symlink(b"s", b"f"),
)

NO_INODES: dict[str, tuple[Call, ...]] = {
    "create": (call("open", b"n", CREATE, 0o644),),
    "mkdir": (call("mkdir", b"n", 0o755),),
    "mkfifo": (call("mkfifo", b"n", 0o644),),
    "mknod": (call("mknod", b"n", stat.S_IFREG | 0o644, 0),),
    "symlink": (call("symlink", b"target", b"n"),),
    "link of the image's": (call("link", b"f", b"n"),),
    "open of the image's for writing": (call("open", b"f", os.O_WRONLY),),
    "truncate of the image's": (call("truncate", b"f", 3),),
    "chmod of the image's": (call("chmod", b"f", 0o600),),
    "chmod of the image's directory": (call("chmod", b"d", 0o700),),
    "chown of the image's link": (call("lchown", b"s", 1, 1),),
    "utimensat of the image's": (call("utimensat", b"f", None),),
    "unlink of the image's": (call("unlink", b"f"),),
    "rmdir of the image's": (call("rmdir", b"e"),),
    "rename of the image's": (call("rename", b"f", b"n"),),
    "rename of the image's directory": (call("rename", b"d", b"n"),),
    "setxattr of the image's": (call("setxattr", b"f", b"user.x", b"v", 1, 0),),
}
NO_BLOCKS: dict[str, tuple[Call, ...]] = {
    "mkdir": (call("mkdir", b"n", 0o755),),
    "symlink to many bytes": (call("symlink", b"t" * 1000, b"n"),),
    "open of the image's for writing": (call("open", b"f", os.O_WRONLY),),
    "chmod of the image's directory": (call("chmod", b"d", 0o700),),
    "setxattr of many bytes": (call("setxattr", b"made/f", b"user.x", b"v" * 3000, 3000, 0),),
}

WRITES: dict[str, tuple[Call, ...]] = {
    "write and fsync": (
        call("open", b"made/f", os.O_WRONLY | os.O_APPEND),
        call("write", bytes(1 << 20)),
        call("fsync"),
    ),
    "write and close": (
        call("open", b"made/f", os.O_WRONLY | os.O_APPEND),
        call("write", bytes(1 << 20)),
        call("close"),
    ),
}
"""With the writeback cache write(2) itself goes well."""


@dataclass(frozen=True, slots=True)
class Full:
    """What came of the calls, how the tree differs after them, what is left in the scratch directory."""

    results: dict[str, Any]
    differences: list[str]
    scratch: list[str]


def _attempt(rootfs: Path, attempts: dict[str, tuple[Call, ...]]) -> tuple[dict[str, Any], list[str]]:
    os.chdir(rootfs)
    before = snapshot(".")
    results = {what: make_calls(calls)[-1] for what, calls in attempts.items()}
    changed = differences(before, snapshot("."))
    return results | {what: make_calls(calls)[-1] for what, calls in WRITES.items()}, changed


def _full(person: Person, base: Path, fill: str, attempts: dict[str, tuple[Call, ...]]) -> Full:
    """A store on a disk of 24 MB and 300 inodes, and `fill` to leave none of them."""
    mount = Mount(person, base)
    source = SourceMaker()
    source.add(source.image([tar_layer(LAYER)]), "given")
    disk = """
        truncate -s 24M disk; mkfs.ext4 -q -m 0 -N 300 disk
        mkdir store; mount -o loop disk store; rmdir store/lost+found
    """
    with ExitStack() as stack:
        person.run("sh", "-ec", disk, cwd=base).ok()
        stack.callback(subprocess.run, ["umount", base / "store"], check=True, timeout=60)
        stack.callback(mount.close)
        mount.fusestore("import", f"{source.directory(base / 'source')}:given").ok()
        mount.mount()
        mount.sh("mkdir containers/a && cd containers/a/rootfs && mkdir made && echo content > made/f").ok()
        person.run("sh", "-c", fill, cwd=base / "store")
        mount.expect("span cache: .*No space left on device")
        results, changed = person.call(_attempt, mount.containers / "a/rootfs", attempts)
        scratch = os.listdir(mount.store / "containers/a/work")
        person.run("rm", "-r", "filler", cwd=base / "store").ok()
        mount.umount()
        mount.fusestore("check").ok()
        return Full(results, changed, scratch)


_TAKE_INODES = "mkdir filler; i=0; while touch filler/$i; do i=$((i + 1)); done"
_TAKE_BLOCKS = """
    mkdir filler; at=0
    for size in 1048576 1024; do
        while fallocate -o $at -l $size filler/zeros; do at=$((at + size)); done
    done
"""


@pytest.fixture(scope="module")
def without_inodes(person: Person, area: Path) -> Full:
    return _full(person, area / "no-inodes", _TAKE_INODES, NO_INODES)


@pytest.fixture(scope="module")
def without_blocks(person: Person, area: Path) -> Full:
    return _full(person, area / "no-blocks", _TAKE_BLOCKS, NO_BLOCKS)


@as_root
@pytest.mark.parametrize("what", NO_INODES)
def test_without_inodes_it_is_refused(without_inodes: Full, what: str) -> None:
    assert without_inodes.results[what] == "ENOSPC"


@as_root
@pytest.mark.parametrize("what", [*NO_BLOCKS, *WRITES])
def test_without_blocks_it_is_refused(without_blocks: Full, what: str) -> None:
    assert without_blocks.results[what] == "ENOSPC"


@as_root
@pytest.mark.parametrize("full", ["without_inodes", "without_blocks"])
def test_nothing_is_half_done(request: pytest.FixtureRequest, person: Person, full: str) -> None:
    found: Full = request.getfixturevalue(full)
    assert (found.differences, found.scratch) == ([], [])
