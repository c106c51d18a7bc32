"""What FUSE could do and pyfuse3 does not hand on: it fails as on a file system that lacks it."""

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rig.images import Images
from rig.mounts import Mount

pytestmark = [pytest.mark.mounted, pytest.mark.images]

_SIZE = 1 << 20
_FIEMAP, _GETFLAGS, _SETFLAGS, _FICLONE = 0xC020660B, 0x80086601, 0x40086602, 0x40049409
"""Of linux/fs.h and linux/fiemap.h."""


def _fallocate(mode: int) -> Callable[[int, str], None]:
    def call(fd: int, _: str) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.fallocate(fd, mode, ctypes.c_long(0), ctypes.c_long(4096)):
            raise OSError(ctypes.get_errno(), "fallocate")

    return call


@pytest.mark.parametrize(
    ("call", "number"),
    [
        pytest.param(_fallocate(0), errno.EOPNOTSUPP, id="fallocate"),
        pytest.param(_fallocate(1 | 2), errno.EOPNOTSUPP, id="punch a hole"),
        pytest.param(_fallocate(16), errno.EOPNOTSUPP, id="zero a range"),
        pytest.param(lambda fd, _: fcntl.ioctl(fd, _FICLONE, fd), errno.EOPNOTSUPP, id="FICLONE"),
        pytest.param(lambda fd, _: fcntl.ioctl(fd, _FIEMAP, bytes(32)), errno.EOPNOTSUPP, id="fiemap"),
        pytest.param(lambda fd, _: fcntl.ioctl(fd, _GETFLAGS, bytes(8)), errno.ENOTTY, id="lsattr"),
        pytest.param(lambda fd, _: fcntl.ioctl(fd, _SETFLAGS, bytes(8)), errno.ENOTTY, id="chattr"),
        pytest.param(
            lambda _, path: os.open(os.path.dirname(path), os.O_TMPFILE | os.O_RDWR),
            errno.EOPNOTSUPP,
            id="O_TMPFILE",
        ),
    ],
)
def test_it_fails(mounted: Mount, container: str, call: Callable[[int, str], object], number: int) -> None:
    with pytest.raises(OSError) as failure:
        mounted.person.call(_on_a_file, mounted.containers / container / "rootfs/file", call)
    assert failure.value.errno == number


def _on_a_file(path: Path, call: Callable[[int, str], object]) -> object:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(fd, _SIZE)
    return call(fd, str(path))


def test_a_sparse_file_shows_one_hole_at_its_end(mounted: Mount, container: str) -> None:
    def seek(fd: int, _: str) -> tuple[int, int]:
        os.pwrite(fd, b"x", _SIZE // 2)
        return os.lseek(fd, 0, os.SEEK_DATA), os.lseek(fd, 0, os.SEEK_HOLE)

    path = mounted.containers / container / "rootfs/file"
    assert mounted.person.call(_on_a_file, path, seek) == (0, _SIZE)


def test_posix_fallocate_and_copy_file_range_work(mounted: Mount, container: str) -> None:
    def work(fd: int, path: str) -> tuple[int, int]:
        os.posix_fallocate(fd, 0, 2 * _SIZE)
        copy = os.open(f"{path}-copy", os.O_RDWR | os.O_CREAT, 0o600)
        return os.fstat(fd).st_size, os.copy_file_range(fd, copy, 4096)

    path = mounted.containers / container / "rootfs/file"
    assert mounted.person.call(_on_a_file, path, work) == (2 * _SIZE, 4096)


def test_skopeo_wants_a_name_where_an_image_has_several(unmounted: Mount, images: Images) -> None:
    """As the README says: index.json has a descriptor for each name, and `default` is one."""
    assert unmounted.person.run("skopeo", "inspect", f"oci:{unmounted.store}").code != 0
    assert unmounted.person.run("skopeo", "inspect", f"oci:{unmounted.store}:default").code == 0
