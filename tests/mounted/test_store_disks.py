"""A store on a disk that is full, or that its file system made read-only: what every change says then.

The errno of the disk comes to the caller, reading goes on, nothing is half done, and when the disk is well
again so is the store. Quotas and broken disks are in the unit tests (`test_store_crashes.py`): kernels that
have neither quota files nor device-mapper could not show them here.
"""

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from rig.mounts import Mount, wait_until
from rig.ocisources import SourceMaker, tar_of
from rig.people import Person, as_root

pytestmark = [pytest.mark.mounted]


@dataclass(frozen=True, slots=True)
class Disk:
    """A store on an ext4 of its own in a file."""

    mount: Mount
    sources: Path

    def sh(self, script: str) -> None:
        self.mount.person.run("sh", "-ec", script, cwd=self.mount.base).ok()

    def fill(self) -> None:
        self.sh(
            "mkdir store/filler; at=0; for size in 1048576 4096 1024; do "
            "while fallocate -o $at -l $size store/filler/zeros 2>/dev/null; do at=$((at + size)); done; done"
        )

    def empty(self) -> None:
        self.sh("rm -r store/filler")

    def _ext4(self) -> Path:
        """What the kernel says of the mounted file system, there as long as that is."""
        command = ["findmnt", "-no", "SOURCE", "--mountpoint", self.mount.store]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        return Path("/sys/fs/ext4", os.path.basename(found))

    def fail(self) -> None:
        """Has ext4 find an error, and do what errors=remount-ro says."""
        (self._ext4() / "trigger_fs_error").write_text("a test")

    def mend(self) -> None:
        ext4 = self._ext4()
        said = self.mount.fusestore("umount", self.mount.mountpoint)
        assert "Read-only file system" in said.err and not self.mount.is_mounted()
        self.sh("umount store")
        # Another process that copies its mount namespace just now keeps it for as long as it runs.
        wait_until(lambda: not ext4.exists(), 60)
        self.sh("e2fsck -fy disk >/dev/null 2>&1 || [ $? = 1 ]; mount -o loop disk store")
        self.mount.mount()


@pytest.fixture
def disk(person: Person, area: Path) -> Iterator[Disk]:
    base = area / "store-disk"
    mount = Mount(person, base)
    sources = SourceMaker()
    sources.add(sources.image([tar_of({"f": b"of the image\n"})]), "one")
    sources.add(sources.image([tar_of({"f": os.urandom(1 << 20)})]), "two")
    with ExitStack() as stack:
        stack.callback(subprocess.run, ["rm", "-r", base], check=True)
        made = Disk(mount, Path(sources.directory(base / "source").removeprefix("oci:")))
        made.sh(
            "truncate -s 32M disk; mkfs.ext4 -q -m 0 disk; mkdir store; "
            "mount -o loop,errors=remount-ro disk store; rmdir store/lost+found"
        )
        stack.callback(subprocess.run, ["umount", mount.store], check=True, timeout=60)
        stack.callback(mount.close)
        mount.fusestore("import", f"oci:{made.sources}:one").ok()
        mount.fusestore("create", "one", "a").ok()
        mount.mount()
        mount.sh("cd containers/a/rootfs && echo written > own && sync own").ok()
        yield made


CHANGES = {
    "make a container": "mkdir containers/b",
    "write metadata": "echo '{\"a\": 1}' > containers/a/metadata.json",
    "tag": "ln -s one images/again",
    "make a file": "echo > containers/a/rootfs/new && sync containers/a/rootfs/new",
    "write to a file": "head -c 100000 /dev/zero > containers/a/rootfs/own2 && sync containers/a/rootfs/own2",
    "copy a file up": "chmod 600 containers/a/rootfs/f",
    "make a container by command": "fusestore create one c",
    "import": "fusestore import oci:$1:two",
}
NEEDS_BLOCKS = CHANGES.keys() - {"make a file", "copy a file up"}
"""What a disk without a free block refuses; a small file's inode may be had."""

Spoil = tuple[Callable[[Disk], None], Callable[[Disk], None], int, frozenset[str]]
SPOILS: dict[str, Spoil] = {
    "full": (Disk.fill, Disk.empty, errno.ENOSPC, frozenset(NEEDS_BLOCKS)),
    "read-only": (Disk.fail, Disk.mend, errno.EROFS, frozenset(CHANGES)),
}


@as_root
@pytest.mark.parametrize("what", SPOILS)
def test_a_disk_that_takes_nothing(disk: Disk, what: str) -> None:
    spoil, mend, number, refused = SPOILS[what]
    mount = disk.mount
    mount.expect(".*")
    spoil(disk)
    for change in sorted(refused):
        mount.sh(CHANGES[change], disk.sources).fails_with(number)
    assert mount.sh("cat containers/a/rootfs/own images/one/rootfs/f").ok() == "written\nof the image\n"
    assert mount.sh("ls containers && jq -r .id containers/a/metadata.json").ok() == "a\na\n"
    mend(disk)
    mount.sh("rm -f containers/a/rootfs/own2").ok()
    for script in CHANGES.values():
        mount.sh(script, disk.sources).ok()
    assert mount.sh("cat containers/a/rootfs/own").ok() == "written\n"
    mount.umount()
    assert mount.fusestore("check").ok() == ""
