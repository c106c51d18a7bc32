"""The layers of a store, opened: index and reader, shared in a process, remade when missing. Blocking.

A layer's derived files (layout.py, **layers**) are no truth: what is missing or does not open is derived from
the blob once more. That a blob has the content of a diff_id is believed only when its seek table is there, or
the two digests are equal. A layer whose blob is not here yet is read from its registry (fusestore.lazylayer),
by whoever does not need all of it, until it is completed (fusestore.completion).

Thread-safe. A layer is shared by all who open it, and closes when nobody refers to it any more.
"""

import contextlib
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

from . import disk
from .blobs import LayerReader, derive, open_reader, unpack
from .completion import complete, read_ahead
from .durable import Workspace, is_damage, write_sparse
from .errors import StoreDamaged
from .layer import LayerIndex
from .layerref import LayerRef, map_index
from .layout import Layout
from .lazylayer import ChunkMemory, Origins, open_lazy, open_source
from .nodes import Digest
from .seek import SeekTable
from .spancache import SpanCache

if TYPE_CHECKING:
    from .registry import RegistryOptions

__all__ = ["Layer", "LayerFiles", "default_cache_size"]

_KEPT_OPEN = 64
"""Layers kept open though nobody refers to them: opening one costs about a millisecond."""

CACHE_SIZE_MIN = 256 << 20
CACHE_SIZE_MAX = 16 << 30


class Layer:
    """An open layer."""

    __slots__ = ("__weakref__", "index", "reader", "ref")

    def __init__(self, ref: LayerRef, index: LayerIndex, reader: LayerReader) -> None:
        self.ref = ref
        self.index = index
        self.reader = reader


def default_cache_size(path: str) -> int:
    """Bytes of decompressed layers to keep on that disk: a tenth of what is free, 256 MiB to 16 GiB."""
    found = os.statvfs(path)
    return min(max(found.f_bavail * found.f_frsize // 10, CACHE_SIZE_MIN), CACHE_SIZE_MAX)


class LayerFiles:
    """The layers of one store. `close` it last."""

    def __init__(
        self,
        layout: Layout,
        workspace: Workspace,
        cache_size: int | None,
        registries: "Callable[[], RegistryOptions]",
    ) -> None:
        self._memory = ChunkMemory()
        self._origins = Origins(registries, is_hasty=True)
        self._background = Origins(registries, is_hasty=False)
        self._layout = layout
        self._workspace = workspace
        self._cache_size = cache_size
        self._lock = threading.Lock()
        """Guards the four below; not held while a layer is opened."""
        self._cache: SpanCache | None = None
        self._open: weakref.WeakValueDictionary[Digest, Layer] = weakref.WeakValueDictionary()
        self._recent: OrderedDict[Digest, Layer] = OrderedDict()
        self._opening: dict[Digest, threading.Lock] = {}

    def open(self, ref: LayerRef, *, is_whole: bool = False) -> Layer:
        """The layer, shared with all others who opened it. Raises StoreDamaged if its blob is missing or
        damaged.

        Takes seconds when the derived files have to be made again. `is_whole`: its reader is of the tar, for
        which it is fetched where it is not here; raises NotFetched.
        """
        with self._lock:
            opening = self._opening.setdefault(ref.diff_id, threading.Lock())
        with opening:
            with self._lock:
                layer = self._open.get(ref.diff_id)
            if layer is None or (is_whole and layer.reader.is_remote):
                layer = self._open_or_derive(ref, is_whole)
            with self._lock:
                self._open[ref.diff_id] = layer
                self._recent[ref.diff_id] = layer
                self._recent.move_to_end(ref.diff_id)
                dropped = self._recent.popitem(last=False) if len(self._recent) > _KEPT_OPEN else None
        del dropped  # closes it, outside the lock
        return layer

    def is_lazy(self, ref: LayerRef) -> bool:
        """Whether its blob is not here, and it is read in parts."""
        layout = self._layout
        return not os.path.exists(layout.blob(ref.blob)) and os.path.exists(
            layout.lazy(ref.diff_id, ref.blob)
        )

    def read_ahead(self, ref: LayerRef) -> None:
        """Fetches of a lazy layer what is wanted early. Raises NotFetched, StoreDamaged."""
        with contextlib.suppress(FileNotFoundError):  # completed, or deleted
            table, origin = open_source(self._layout, ref)
            fetch = self._background.of(origin, ref)
            read_ahead(self._layout, self._workspace, ref, table, fetch)

    def complete(self, ref: LayerRef, *, is_background: bool = False) -> None:
        """Fetches a lazy layer, whose blob is here then. Raises NotFetched, StoreDamaged.

        `is_background`: nobody waits, so it is tried for long.
        """
        origins = self._background if is_background else self._origins
        with contextlib.suppress(FileNotFoundError):  # completed, or deleted
            table, origin = open_source(self._layout, ref)
            complete(self._layout, self._workspace, ref, table, origins.of(origin, ref))
        with self._lock:
            layer = self._open.get(ref.diff_id)
            # Who has it open goes on with what it was shown by.
            if layer is not None and layer.reader.is_remote:
                del self._open[ref.diff_id]
                self._recent.pop(ref.diff_id, None)
        del layer

    def is_complete(self, ref: LayerRef) -> bool:
        """Whether the derived files open, and so prove that blob and diff_id belong together."""
        try:
            tar_size = map_index(self._layout.layer_index(ref.diff_id)).tar_size
            SeekTable(self._layout.seek_table(ref.diff_id, ref.blob), tar_size).close()
        except (OSError, StoreDamaged) as error:
            if not is_damage(error):
                raise
            return False
        return True

    def tar_size(self, ref: LayerRef) -> int:
        """Bytes of its tar, by its index; -1 where that is missing or damaged."""
        try:
            return map_index(self._layout.layer_index(ref.diff_id)).tar_size
        except (OSError, StoreDamaged) as error:
            if not is_damage(error):
                raise
            return -1

    def local_tar(self, ref: LayerRef) -> str | None:
        """The file with the layer's tar, where there is one: the blob, or what `hydrate` made."""
        if not ref.is_compressed:
            return self._layout.blob(ref.blob)
        path = self._layout.tar(ref.diff_id)
        try:
            return path if os.stat(path).st_size == self.tar_size(ref) else None
        except FileNotFoundError:
            return None

    def hydrate(
        self, ref: LayerRef, confirm: Callable[[], object], progress: Callable[[int], object]
    ) -> None:
        """Makes the layer's local tar. `confirm`, called with the store's names locked,
        raises if it is not to be any more; `progress` is told the length of each piece.

        It is whole, verified and on disk before anybody sees it. Raises StoreDamaged, OSError.
        """
        layer = self.open(ref, is_whole=True)
        with self._workspace.scratch() as scratch:
            fd = scratch.create("tar")
            try:
                place = 0

                def write(data: bytes) -> None:
                    nonlocal place
                    write_sparse(fd, data, place)
                    place += len(data)
                    progress(len(data))

                blob, table = self._layout.blob(ref.blob), self._layout.seek_table(ref.diff_id, ref.blob)
                unpack(blob, table, ref.diff_id, layer.reader.size, write)
                disk.current.truncate(fd, place)
            finally:
                os.close(fd)
            scratch.sync()
            with self._workspace.lock():
                confirm()
                self._workspace.publish((scratch.join("tar"), self._layout.tar(ref.diff_id)))

    def dehydrate(self, ref: LayerRef) -> None:
        """Takes the local tar away. Who has it open keeps it, and its space."""
        self._workspace.discard(self._layout.tar(ref.diff_id))

    def drop(self, diff_ids: list[Digest]) -> None:
        """No longer keep these open; who refers to them still can use them."""
        with self._lock:
            dropped = [self._recent.pop(diff_id, None) for diff_id in diff_ids]
        del dropped

    def reopen(self) -> None:
        """Has open layers read the blobs that are there now: an import replaces damaged ones. Those that were
        deleted are not kept open; who refers to them still can use them."""
        with self._lock:
            layers = list(self._open.values())
        for layer in layers:
            try:
                layer.reader.reopen()
            except StoreDamaged:
                if not self.is_lazy(layer.ref):
                    self.drop([layer.ref.diff_id])

    def give_back(self) -> None:
        """Have the kernel drop what it caches of the files of open layers."""
        with self._lock:
            layers = list(self._open.values())
        for layer in layers:
            layer.reader.give_back()

    def close(self) -> None:
        """Idempotent. Layers that someone refers to stay open until let go."""
        with self._lock:
            dropped = list(self._recent.values())
            self._recent.clear()
        del dropped
        self._origins.close()
        self._background.close()

    def _open_or_derive(self, ref: LayerRef, is_whole: bool) -> Layer:
        try:
            return self._open_layer(ref)
        except (OSError, StoreDamaged) as error:
            if not is_damage(error):
                raise
        if not self.is_lazy(ref):
            self._derive(ref)
        elif is_whole:
            self.complete(ref)
        else:
            with contextlib.suppress(FileNotFoundError):  # completed just now
                return self._open_lazy(ref)
        return self._open_layer(ref)

    def _open_lazy(self, ref: LayerRef) -> Layer:
        index = map_index(self._layout.lazy_index_in(self._layout.lazy(ref.diff_id, ref.blob)))
        return Layer(ref, index, open_lazy(self._layout, ref, self._origins, self._memory))

    def _open_layer(self, ref: LayerRef) -> Layer:
        index = map_index(self._layout.layer_index(ref.diff_id))
        table = self._layout.seek_table(ref.diff_id, ref.blob)
        cache, cache_path = self._span_cache(), self._layout.span_cache(ref.diff_id)
        tar = self._layout.tar(ref.diff_id)
        reader = open_reader(self._layout.blob(ref.blob), table, cache, cache_path, index.tar_size, tar)
        return Layer(ref, index, reader)

    def _span_cache(self) -> SpanCache:
        with self._lock:
            if self._cache is None:
                size = default_cache_size(self._layout.root) if self._cache_size is None else self._cache_size
                self._cache = SpanCache(size)
                layers = os.listdir(self._layout.layers)
                self._cache.adopt(self._layout.span_cache(Digest(f"sha256:{name}")) for name in layers)
            return self._cache

    @property
    def cache(self) -> SpanCache | None:
        """None until the first layer is opened."""
        return self._cache

    def _derive(self, ref: LayerRef) -> None:
        made = derive(self._layout.blob(ref.blob), blob=ref.blob, diff_id=ref.diff_id)
        with self._workspace.lock():
            # The image may have been deleted meanwhile: its layers are not to come back.
            if not os.path.exists(self._layout.blob(ref.blob)):
                raise StoreDamaged(
                    f"layer blob {self._layout.blob(ref.blob)} is gone: import the image again"
                )
            self._workspace.make_directory(self._layout.layer(ref.diff_id))
            self._workspace.write_file(self._layout.layer_index(ref.diff_id), made.index)
            self._workspace.write_file(self._layout.seek_table(ref.diff_id, ref.blob), made.seek)
