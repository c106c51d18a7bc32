"""Local tars of an image's layers: made when asked for, and given back. Blocking.

Whoever reads an image that is hydrated reads files: nothing is decompressed, and what the kernel mounted
needs no daemon for it. The price is the size of the layers uncompressed. Images that share a layer share its
tar; a layer that came uncompressed has its blob, and needs none.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

from .images import Image
from .layerref import LayerRef
from .store import Store

__all__ = ["Hydration", "dehydrate", "hydrate", "hydration"]

_BLOCK = 512
"""Bytes in the unit of st_blocks (inode(7))."""


@dataclass(frozen=True, slots=True)
class Hydration:
    """How far an image is hydrated."""

    layers: int
    """That came compressed, each counted once."""
    hydrated: int
    """Of these."""
    size: int
    """Bytes on disk of the local tars."""
    missing: int
    """Bytes that the others have uncompressed; on disk they take no more."""


def hydration(store: Store, image: Image) -> Hydration:
    """Raises StoreDamaged."""
    sizes = {layer.ref.diff_id: layer.index.tar_size for layer in store.open_layers(image)}
    layers = _layers(image)
    tars = {layer.diff_id: tar for layer in layers if (tar := store.local_tar(layer)) is not None}
    return Hydration(
        layers=len(layers),
        hydrated=len(tars),
        size=sum(os.stat(tar).st_blocks * _BLOCK for tar in tars.values()),
        missing=sum(sizes[layer.diff_id] for layer in layers if layer.diff_id not in tars),
    )


def hydrate(store: Store, image: Image, progress: Callable[[int, int], object] | None = None) -> None:
    """Makes the local tars that `image` lacks. `progress(done, total)`: bytes.

    Each is there when it is whole. Lazy layers are fetched first. Raises NotFound where the image is deleted
    meanwhile, NotFetched, StoreDamaged, OSError.
    """
    for layer in _layers(image):
        store.complete_layer(layer)
    done, total = 0, hydration(store, image).missing

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    for layer in _layers(image):
        store.hydrate_layer(image, layer, advance)


def dehydrate(store: Store, image: Image) -> None:
    """Takes the local tars of `image` away, those too that other images share."""
    for layer in _layers(image):
        store.dehydrate_layer(image, layer)


def _layers(image: Image) -> list[LayerRef]:
    """Those that came compressed."""
    return list({layer.diff_id: layer for layer in image.layers if layer.is_compressed}.values())
