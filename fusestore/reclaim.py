"""What a store's space is used for, and the giving back of what nobody needs. Blocking.

Reclaimable is: an image without a name that no container is of (`podman image prune` decides the same), what
no image needs, the decompressed cache while nothing is mounted, and the trash. What a dead process left in
tmp/ went when the store was opened.

Nobody is held up: what there is, is found without the store's lock, and each step takes it for its renames
alone. What came into use since it was found is passed over.

The rule a maintainer must not break: whether an image is unused is asked once more with the lock held.
"""

import contextlib
import os
import stat
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from . import quota
from .errors import Busy, NotFound
from .images import Image, loose_parts
from .layout import Layout
from .nodes import Digest
from .store import Bindings, Store
from .walk import DIRECTORY

__all__ = ["Item", "Usage", "reclaim", "usage"]

_BLOCK = 512
"""Bytes in the unit of st_blocks (inode(7))."""

_NO_NAME = "no name, and no container is of it"
_NO_IMAGE = "no image needs it"
_CACHED = "made again when it is read"
_BROKEN_OFF = "its download was broken off"
_DELETED = "deleted, not given back yet"


@dataclass(frozen=True, slots=True)
class Item:
    """Something that can be given back."""

    what: str
    """The `Usage` it is part of."""
    name: str
    size: int
    """Bytes on disk."""
    why: str


@dataclass(frozen=True, slots=True)
class Usage:
    """What one part of the store takes."""

    what: str
    count: int
    size: int
    """Bytes on disk."""
    reclaimable: int
    """Of these."""


def usage(store: Store) -> list[Usage]:
    """Reads all names of the containers' files, so it takes as long as du."""
    layout = Layout(store.path)
    caches = sum(_size(path) for _, path in _caches(layout))
    tars = [path for path in map(layout.tar, _diff_ids(layout)) if os.path.lexists(path)]
    hydrated = sum(map(_size, tars))
    downloads = _downloads(layout)
    images = sum(_size(path) for path in (layout.blobs, layout.images, layout.layers)) - caches - hydrated
    reclaimable: Counter[str] = Counter()
    for item in reclaim(store, is_dry=True):
        reclaimable[item.what] += item.size
    return [
        Usage(what, count, size, min(size, reclaimable[what]))
        for what, count, size in (
            ("images", len(store.image_ids()), images),
            ("hydrated", len(tars), hydrated),
            ("cache", len(_caches(layout)), caches),
            ("containers", len(store.container_ids()), _size(layout.containers)),
            ("trash", _count(layout.trash), _size(layout.trash)),
            ("scratch", _count(layout.tmp), _size(layout.tmp)),
            ("downloads", len(downloads), sum(map(_size, downloads))),
            ("quarantine", _count(layout.quarantine), _size(layout.quarantine)),
        )
    ]


def reclaim(store: Store, *, keep_s: float = 0, is_dry: bool = False) -> Iterator[Item]:
    """Gives back what can be, each item when it is; if `is_dry` nothing is. Images that came, and caches and
    downloads that were written, less than `keep_s` seconds ago stay.
    """
    latest_s = time.time() - keep_s
    yield from _reclaim_trash(store, is_dry)
    yield from _reclaim_images(store, latest_s, is_dry)
    yield from _reclaim_loose(store, is_dry)
    yield from _reclaim_caches(store, latest_s, is_dry)
    yield from _reclaim_downloads(store, latest_s, is_dry)
    if not is_dry:
        store.empty_trash()


def _reclaim_trash(store: Store, is_dry: bool) -> Iterator[Item]:
    """First of all: the rest goes through the trash."""
    trash = Layout(store.path).trash
    count, size = _count(trash), _size(trash)
    if count:
        if not is_dry:
            store.empty_trash()
        yield Item("trash", f"{count} in trash/", size, _DELETED)


def _reclaim_images(store: Store, latest_s: float, is_dry: bool) -> Iterator[Item]:
    layout = Layout(store.path)
    images = store.images()
    users = Counter(path for image in images for path in _files(layout, image))
    known: Bindings = {}
    for image in images:
        if image.names or not _is_older(layout.image_record(image.id), latest_s):
            continue
        own = [path for path in _files(layout, image) if users[path] == 1]
        tars = [layout.tar(layer.diff_id) for layer in dict.fromkeys(image.layers)]
        size = sum(map(_size, own))
        hydrated = sum(_size(path) for path in own if path in tars)
        try:
            store.prune_image(image.id, known, is_dry=is_dry)
        except (Busy, NotFound):
            continue
        users.subtract(_files(layout, image))
        yield Item("images", image.id, size - hydrated, _NO_NAME)
        if hydrated:
            yield Item("hydrated", image.id, hydrated, _NO_NAME)


def _files(layout: Layout, image: Image) -> list[str]:
    """What the image is made of, but for its layers' caches."""
    parts = loose_parts(image)
    return [
        *(layout.image(image_id) for image_id in parts["images"]),
        *(layout.blob(Digest(blob)) for blob in parts["blobs"]),
        *(layout.layer_index(Digest(diff_id)) for diff_id in parts["layers"]),
        *(layout.tar(Digest(diff_id)) for diff_id in parts["layers"]),
        *(
            of_layer(layer.diff_id, layer.blob)
            for layer in dict.fromkeys(image.layers)
            for of_layer in (layout.seek_table, layout.lazy)
        ),
    ]


def _reclaim_loose(store: Store, is_dry: bool) -> Iterator[Item]:
    sizes = {path: _size(path) for path in store.unreferenced() if os.path.lexists(path)}
    if sizes and not is_dry:
        store.sweep()
    for path, size in sizes.items():
        if is_dry or not os.path.lexists(path):
            yield Item("images", os.path.relpath(path, store.path), size, _NO_IMAGE)


def _reclaim_caches(store: Store, latest_s: float, is_dry: bool) -> Iterator[Item]:
    """A mount keeps the files open: until it ends their space would stay taken, and their content be lost."""
    if store.mounts():
        return
    loose = set(store.unreferenced())
    for diff_id, path in _caches(Layout(store.path)):
        size = _size(path)
        if size and os.path.dirname(path) not in loose and _is_older(path, latest_s):
            if not is_dry:
                store.discard_cache(diff_id)
            yield Item("cache", os.path.relpath(path, store.path), size, _CACHED)


def _reclaim_downloads(store: Store, latest_s: float, is_dry: bool) -> Iterator[Item]:
    for path in _downloads(Layout(store.path)):
        size = _size(path)
        if _is_older(path, latest_s) and store.discard_download(path, is_dry=is_dry):
            yield Item("downloads", os.path.relpath(path, store.path), size, _BROKEN_OFF)


def _downloads(layout: Layout) -> list[str]:
    if not os.path.isdir(layout.downloads):  # made when needed
        return []
    return [f"{layout.downloads}/{name}" for name in sorted(os.listdir(layout.downloads))]


def _caches(layout: Layout) -> list[tuple[Digest, str]]:
    found = [(diff_id, layout.span_cache(diff_id)) for diff_id in _diff_ids(layout)]
    return [(diff_id, path) for diff_id, path in found if os.path.lexists(path)]


def _diff_ids(layout: Layout) -> list[Digest]:
    return [Digest(f"sha256:{name}") for name in sorted(os.listdir(layout.layers))]


def _is_older(path: str, latest_s: float) -> bool:
    """Not, if it is not there: who made it new is about to put it back."""
    try:
        return os.stat(path).st_mtime <= latest_s
    except FileNotFoundError:
        return False


def _count(path: str) -> int:
    return len(os.listdir(path)) if os.path.isdir(path) else 0


def _size(path: str) -> int:
    """Bytes on disk of the file, or of the directory with all that is in it.

    What is gone, or may not be looked at, is nothing.
    """
    size = 0
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        found = os.lstat(path)
        size = found.st_blocks * _BLOCK
        if stat.S_ISDIR(found.st_mode):
            directory = os.open(path, DIRECTORY)
            try:
                size = quota.usage(directory)
            finally:
                os.close(directory)
    return size
