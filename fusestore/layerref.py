"""One layer of one image, and its index on disk. Blocking."""

import mmap
import os
from dataclasses import dataclass

from .errors import StoreDamaged
from .layer import LayerIndex
from .nodes import Digest

__all__ = ["LayerRef", "map_index"]


@dataclass(frozen=True, slots=True)
class LayerRef:
    """One layer of one image: which content, in which blob."""

    diff_id: Digest
    blob: Digest
    size: int
    """Bytes of the blob."""
    media_type: str

    @property
    def is_compressed(self) -> bool:
        return self.blob != self.diff_id


def map_index(path: str) -> LayerIndex:
    """The index in the file. Raises StoreDamaged, naming the file, and OSError.

    It is mapped: the file may be replaced and removed, but never truncated.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        if size == 0:
            raise StoreDamaged(f"layer index {path} is empty: remove it, it is made again from the blob")
        return LayerIndex(mmap.mmap(fd, size, access=mmap.ACCESS_READ))
    except StoreDamaged as error:
        raise StoreDamaged(f"{path}: {error}") from error
    finally:
        os.close(fd)
