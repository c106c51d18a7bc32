"""What the kernel makes of EROFS images at the edges of the format, and of mounts that it refuses."""

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import pytest
from rig.erofstrees import MemoryTree, Thing, mounted, written
from rig.snapshot import differences, snapshot

from fusestore.erofs import Device, write_image
from fusestore.nodes import Extent
from fusestore.syscalls import make_mount

pytestmark = pytest.mark.root

_REGULAR = stat.S_IFREG | 0o644


def _root(**children: Thing) -> Thing:
    return Thing(stat.S_IFDIR | 0o755, children={name.encode(): child for name, child in children.items()})


def _check(tree: MemoryTree, place: Path) -> None:
    devices = written(tree, place / "image")
    with mounted(place / "image", devices, place / "mount") as root:
        assert not differences(tree.expected(), snapshot(root))


def _write_with(root: Thing, sizes: Sequence[int], place: Path) -> list[Path]:
    """An image whose devices are holes of these sizes."""
    devices = [place / f"device{number}" for number in range(len(sizes))]
    for path, size in zip(devices, sizes, strict=True):
        path.touch()
        os.truncate(path, size)
    with (place / "image").open("w+b") as output:
        write_image(MemoryTree(root), [Device(b"", size) for size in sizes], output)
    return devices


@pytest.mark.parametrize("count", (0, 1, 20, 70_000))
def test_a_directory_has_any_number_of_names(tmp_path: Path, count: int) -> None:
    names = {f"{number:x}" for number in range(count)}
    devices = _write_with(_root(**{name: Thing(_REGULAR) for name in names}), (), tmp_path)
    with mounted(tmp_path / "image", devices, tmp_path / "mount") as root:
        assert set(os.listdir(root)) == names
        assert all(os.path.exists(root / name) for name in list(names)[:1000])
        assert not os.path.exists(root / "missing")


def test_a_directory_is_as_deep_as_a_path_can_be(tmp_path: Path) -> None:
    top = below = _root()
    for _ in range(2_047):
        below.children[b"d"] = below = Thing(stat.S_IFDIR | 0o700)
    below.children[b"f"] = Thing(_REGULAR)
    devices = _write_with(top, (), tmp_path)
    with mounted(tmp_path / "image", devices, tmp_path / "mount") as root:
        directory = os.open(root, os.O_PATH)
        for _ in range(2_047):
            inner = os.open("d", os.O_PATH, dir_fd=directory)
            assert os.stat("..", dir_fd=inner).st_ino == os.fstat(directory).st_ino
            os.close(directory)
            directory = inner
        assert os.listdir(f"/proc/self/fd/{directory}") == ["f"]
        os.close(directory)


@pytest.mark.parametrize("size", (1 << 32, (1 << 32) + 1, 5 << 30, (1 << 40) + (1 << 30) + 7))
def test_a_file_is_larger_than_4_gib(tmp_path: Path, size: int) -> None:
    marks = {0: b"first", size // 2: b"middle", size - 4: b"last"}
    root = _root(large=Thing(_REGULAR, size=size, extents=[Extent(0, size, 512)]))
    (device,) = _write_with(root, (1024 + size,), tmp_path)
    with device.open("r+b") as file:
        for offset, mark in marks.items():
            file.seek(512 + offset)
            file.write(mark)
    with mounted(tmp_path / "image", [device], tmp_path / "mount") as at, (at / "large").open("rb") as large:
        assert os.fstat(large.fileno()).st_size == size
        for offset, mark in marks.items():
            assert os.pread(large.fileno(), len(mark), offset) == mark


@pytest.mark.parametrize("at", (0, 512, 4096 + 1, (1 << 39) + 12_345))
def test_a_sparse_file_is_mostly_hole(tmp_path: Path, at: int) -> None:
    size = 1 << 40
    device = bytes(1000) + b"content of an odd length" * 100
    root = _root(sparse=Thing(_REGULAR, size=size, extents=[Extent(at, 2400, 1000)]))
    tree = MemoryTree(root, [device])
    devices = written(tree, tmp_path / "image")
    assert (tmp_path / "image").stat().st_size < 32 << 20
    with mounted(tmp_path / "image", devices, tmp_path / "mount") as root_path:
        fd = os.open(root_path / "sparse", os.O_RDONLY)
        around = os.pread(fd, 10_000, max(0, at - 3000))
        far = os.pread(fd, 10, size - 10)
        os.close(fd)
    assert around.strip(b"\0") == device[1000:]
    assert around.index(b"c") == min(at, 3000)
    assert far == bytes(10)


def test_any_number_of_layers_is_mounted(tmp_path: Path) -> None:
    # Their paths are far longer than the page that mount(2) takes.
    count = 300
    files = {f"f{number}": Thing(_REGULAR, size=1, device=number, extents=[Extent(0, 1, 0)])
             for number in range(count)}  # fmt: skip
    _check(MemoryTree(_root(**files), [bytes([number % 251]) for number in range(count)]), tmp_path)


def test_an_xattr_of_all_files_is_stored_once(tmp_path: Path) -> None:
    label = (b"security.selinux", b"system_u:object_r:container_file_t:s0:c1,c2")

    def size_with(xattrs: tuple[tuple[bytes, bytes], ...]) -> int:
        files = {f"f{number}": Thing(_REGULAR, xattrs=xattrs) for number in range(1000)}
        _check(MemoryTree(_root(**files)), tmp_path)
        return (tmp_path / "image").stat().st_size

    assert size_with((label,)) - size_with(()) < 1000 * 40


def test_more_xattrs_than_are_shared_are_all_there(tmp_path: Path) -> None:
    many = tuple((b"trusted.x%d" % number, b"") for number in range(300))
    distinct = {
        f"f{number}": Thing(_REGULAR, xattrs=((b"user.x", b"%d" % number * 500),)) for number in range(900)
    }
    _check(MemoryTree(_root(many=Thing(_REGULAR, xattrs=many), **distinct)), tmp_path)


def test_a_layer_that_ends_within_a_block_is_read_to_its_end(tmp_path: Path) -> None:
    content = bytes(range(256)) * 8 + b"the end"
    root = _root(
        file=Thing(_REGULAR, size=len(content) - 512, extents=[Extent(0, len(content) - 512, 512)]),
        short=Thing(_REGULAR, size=3, device=1, extents=[Extent(0, 3, 0)]),
    )
    _check(MemoryTree(root, [content, b"abc"]), tmp_path)


@pytest.mark.parametrize(
    ("kind", "options", "number"),
    (
        (b"no such file system", [], errno.ENODEV),
        (b"erofs", [(b"source", b"/nonexistent")], errno.ENOENT),
        (b"erofs", [(b"nosuchoption", None)], errno.EINVAL),
    ),
)
def test_a_mount_that_cannot_be_made_raises(
    kind: bytes, options: list[tuple[bytes, bytes | None]], number: int
) -> None:
    with pytest.raises(OSError) as caught:
        make_mount(kind, options)
    assert caught.value.errno == number


def test_the_kernel_says_why_it_refuses_an_option() -> None:
    with pytest.raises(OSError, match="Unknown parameter 'nosuchoption'"):
        make_mount(b"erofs", [(b"nosuchoption", None)])
