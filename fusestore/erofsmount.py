"""EROFS images, mounted the way the kernel at hand can. Blocking.

Linux 6.15 mounts an image that is a file, with tars that are files, nowhere, and takes that for a lower layer
of overlayfs. Before, image and tars are loop devices. Before 6.12 EROFS takes nothing else; and a layer must
be somewhere in the mount namespace of who mounts overlayfs: so that is done in a namespace made for it
(fs/namespace.c, clone_private_mount), which is gone afterwards.

The rule a maintainer must not break: what a loop device reads must not come from the daemon that this is
mounted for. Others look into new block devices, udev above all: they would hang with it, and keep it.
"""

import contextlib
import os
import stat
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from .erofs import write_image
from .nodes import Attr, Extent, Xattrs
from .syscalls import (
    MOUNT_ATTR_RDONLY,
    clone_mount,
    leave_mounts,
    loop_device,
    make_mount,
    move_mount,
)

__all__ = ["MountedImage", "mount_image", "mount_overlay", "mounts_files"]

_Options = Sequence[tuple[bytes, bytes | None]]

_DIRECTORY = Attr(stat.S_IFDIR | 0o755, 0, 0, 0, 0, 2, 0, 0, 0, 0)


class MountedImage(NamedTuple):
    """An image that is mounted."""

    mount: int
    """A descriptor of the mount, which is nowhere."""
    loops: Sequence[bytes]
    """The loop devices of image and tars, which go with the mount; none where they are files."""


def mounts_files(file: int) -> bool:
    """Whether the kernel can do without loop devices on the file system of the empty file `file`, which is
    written to."""
    with os.fdopen(file, "wb", closefd=False) as output:
        write_image(_BareTree(), (), output)
    try:
        with contextlib.ExitStack() as stack:
            options: list[tuple[bytes, bytes | None]] = []
            for _ in range(2):  # overlayfs without an upper directory wants two
                mount = make_mount(b"erofs", [(b"source", b"/proc/self/fd/%d" % file)], MOUNT_ATTR_RDONLY)
                stack.callback(os.close, mount)
                options.append((b"lowerdir+", b"/proc/self/fd/%d" % mount))
            os.close(make_mount(b"overlay", options, MOUNT_ATTR_RDONLY))
    except OSError:
        return False
    return True


def mount_image(image: bytes, tars: Sequence[bytes], *, by_loops: bool) -> MountedImage:
    """Mount the EROFS image in the file `image`, with devices `tars`. Raises OSError.

    The kernel has the tars open as long as anybody has the image, also in another mount namespace.
    """
    with contextlib.ExitStack() as stack:
        if by_loops:
            loops = []
            for path in (image, *tars):
                descriptor, device = loop_device(path)
                stack.callback(os.close, descriptor)
                loops.append(device)
            return MountedImage(_mount_devices(loops), loops)
        options: list[tuple[bytes, bytes | None]] = [(b"source", image)]
        for tar in tars:
            # By a mount of its own: the place where the daemon's mount is can be unmounted meanwhile.
            clone = clone_mount(tar)
            stack.callback(os.close, clone)
            options.append((b"device", b"/proc/self/fd/%d" % clone))
        return MountedImage(make_mount(b"erofs", options, MOUNT_ATTR_RDONLY), ())


def mount_overlay(image: MountedImage, options: _Options, attributes: int) -> int:
    """Mount overlayfs, nowhere, with the image as its lower layer: a descriptor. Raises OSError."""
    if not image.loops:
        return _mount_over(image.mount, options, attributes)

    def mount() -> int:
        leave_mounts()
        lower = _mount_devices(image.loops)  # the same file system once more
        try:
            root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                move_mount(lower, root)
            finally:
                os.close(root)
            return _mount_over(lower, options, attributes)
        finally:
            os.close(lower)

    with ThreadPoolExecutor(1) as alone:  # a thread can have a mount namespace of its own
        return alone.submit(mount).result()


def _mount_over(lower: int, options: _Options, attributes: int) -> int:
    return make_mount(b"overlay", [(b"lowerdir+", b"/proc/self/fd/%d" % lower), *options], attributes)


def _mount_devices(loops: Sequence[bytes]) -> int:
    image, *tars = loops
    options: list[tuple[bytes, bytes | None]] = [(b"ro", None), (b"source", image)]
    options += [(b"device", tar) for tar in tars]
    return make_mount(b"erofs", options, MOUNT_ATTR_RDONLY)


class _BareTree:
    """An empty directory, as `fusestore.erofs.Tree`."""

    root = 0

    def listing(self, directory: int) -> Mapping[bytes, int]:
        return {}

    def attr(self, node: int) -> Attr:
        return _DIRECTORY

    def xattrs(self, node: int) -> Xattrs:
        return ()

    def target(self, node: int) -> bytes:
        raise AssertionError("no symlink")

    def content(self, node: int) -> tuple[int, Sequence[Extent]]:
        raise AssertionError("no file")

    def read(self, device: int, offset: int, size: int) -> bytes:
        raise AssertionError("no device")
