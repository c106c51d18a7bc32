"""The EROFS image of an image's merged tree: what the kernel needs of it to mount it. Blocking.

It shows what `fusestore.union.Lower` shows, and points into the layers' tars for content.
"""

from collections.abc import Mapping, Sequence

from . import disk
from .erofs import Device, write_image
from .errors import NotSupported
from .layerfiles import Layer
from .nodes import Attr, Extent, Xattrs
from .union import Lower, Stack

__all__ = ["write_metadata_image"]


def write_metadata_image(layers: Sequence[Layer], fd: int) -> None:
    """Write the tree of `layers`, bottom first, into the empty file `fd`, which is closed.

    It is on disk afterwards. Raises NotSupported for what EROFS has no room for, StoreDamaged.
    """
    with disk.open_to_write(fd) as output:
        tree = _MergedTree(layers)
        devices = [
            Device(layer.ref.diff_id.removeprefix("sha256:").encode(), layer.index.tar_size)
            for layer in layers
        ]
        write_image(tree, devices, output)
        output.flush()
        disk.current.fsync(fd)


class _MergedTree:
    """The layers as `fusestore.erofs.Tree`."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self._lower = Lower([layer.index for layer in layers])
        if not self._lower.root:
            raise NotSupported("an image without layers has no tree")

    @property
    def root(self) -> Stack:
        return self._lower.root

    def listing(self, directory: Stack) -> Mapping[bytes, Stack]:
        return {name: found.stack for name, found in self._lower.listing(directory).items()}

    def attr(self, node: Stack) -> Attr:
        return self._lower.attr(node)

    def xattrs(self, node: Stack) -> Xattrs:
        return self._lower.xattrs(node)

    def target(self, node: Stack) -> bytes:
        return self._lower.target(node)

    def content(self, node: Stack) -> tuple[int, Sequence[Extent]]:
        number, ino = node[0]
        return number, self._layers[number].index.extents(ino)

    def read(self, device: int, offset: int, size: int) -> bytes:
        return self._layers[device].reader.read(offset, size)
