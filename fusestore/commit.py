"""A container becomes an image: its changes one more layer on the layers of its own image. Blocking.

The layer and the documents are written as an OCI image layout in a scratch directory, with links to the blobs
the store has, and imported from there: what a commit makes goes through the same checks as what comes from
outside, and a crash leaves nothing of it.

The config follows the OCI image-spec (config.md): every field of the image's is kept; diff_ids and history
grow by one. Where nothing was changed no layer is made, and the history says so (``empty_layer``).
"""

import datetime
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import zstandard
from zlib_ng import zlib_ng

from . import disk, imageconfig, oci
from .drivers import snapshot
from .durable import Scratch, write_all
from .errors import Busy
from .export import export_layer, state_of
from .images import Image
from .importer import Progress
from .layerref import LayerRef
from .layout import OCI_LAYOUT_VERSION
from .names import digest_hex, parse_image_name
from .nodes import Digest
from .sources import machine_platform
from .store import Store
from .tarwriter import Sink

__all__ = ["COMPRESSIONS", "CommitOptions", "commit"]

_GZIP_LEVEL = 6
_ZSTD_LEVEL = 3
_FRAME = 1 << 20
"""Bytes of tar in each zstd frame: reading can start at any of them."""
_ATTEMPTS = 3
_DOCKER_LAYERS = {
    "application/vnd.docker.image.rootfs.diff.tar": oci.LAYER_TYPES["none"],
    "application/vnd.docker.image.rootfs.diff.tar.gzip": oci.LAYER_TYPES["gzip"],
    "application/vnd.docker.image.rootfs.diff.tar.zstd": oci.LAYER_TYPES["zstd"],
}
"""What they are called in a manifest of OCI's."""


@dataclass(frozen=True, slots=True)
class CommitOptions:
    """What a commit can be told."""

    message: str = ""
    author: str = ""
    changes: Sequence[str] = ()
    """Instructions of a Dockerfile (fusestore.imageconfig)."""
    compression: str = "gzip"
    """One of `COMPRESSIONS`."""
    epoch_s: int | None = None
    """SOURCE_DATE_EPOCH: the image's time, which no time in the layer is after."""


class _Compressor(Protocol):
    def write(self, data: bytes, /) -> object: ...

    def close(self) -> None: ...


class _Frames:
    """zstd, a frame for each `_FRAME` bytes."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._pending = bytearray()
        self._compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)

    def write(self, data: bytes, /) -> None:
        self._pending += data
        while len(self._pending) >= _FRAME:
            self._sink(self._compressor.compress(self._pending[:_FRAME]))
            del self._pending[:_FRAME]

    def close(self) -> None:
        if self._pending:
            self._sink(self._compressor.compress(self._pending))


class _Plain:
    def __init__(self, sink: Sink) -> None:
        self.write = sink

    def close(self) -> None:
        pass


class _Gzip:
    """Neither a name nor a time is in its header."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._deflate = zlib_ng.compressobj(_GZIP_LEVEL, wbits=31)

    def write(self, data: bytes, /) -> None:
        self._sink(self._deflate.compress(data))

    def close(self) -> None:
        self._sink(self._deflate.flush())


COMPRESSIONS: dict[str, Callable[[Sink], _Compressor]] = {"gzip": _Gzip, "zstd": _Frames, "none": _Plain}


class _Digester:
    """Passes on what is written, and knows its size and digest."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> None:
        self._hash.update(data)
        self.size += len(data)
        self._sink(data)

    @property
    def digest(self) -> Digest:
        return Digest(f"sha256:{self._hash.hexdigest()}")


@dataclass(frozen=True, slots=True)
class _Layer:
    descriptor: oci.Descriptor
    diff_id: Digest


def commit(
    store: Store, ref: str, name: str, options: CommitOptions, progress: Progress | None = None
) -> Image:
    """Makes an image called `name` of the container `ref`; a name that another image has moves to this one.

    The container may be in use. The layer holds what was in it at one instant: if something changes while it
    is written, it is written again, and after three times refused as Busy.

    Raises NotFound, BadName, BadInput (`options`), Busy, StoreDamaged.
    """
    parse_image_name(name)
    change = imageconfig.parse(options.changes)
    container = store.container(ref)
    base = store.image(container.image_id) if container.image_id else None
    config = store.image_config(base) if base is not None else _empty_config()
    with store.scratch() as scratch, store.hold(container.id):
        for directory in ("blobs", "blobs/sha256"):
            scratch.mkdir(directory)
        layers = [_link(store, scratch, layer) for layer in (base.layers if base is not None else ())]
        made = _write_layer(store, container.id, scratch, options)
        if made is not None:
            layers.append(made.descriptor)
        imageconfig.extend(config, made.diff_id if made is not None else None, _history(options))
        change(config)
        _write_layout(scratch, config, layers)
        return store.import_image(scratch.path, names=[name], progress=progress)


def _empty_config() -> dict[str, Any]:
    """Of a container without an image."""
    return {
        "architecture": machine_platform().architecture,
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": []},
        "history": [],
    }


def _history(options: CommitOptions) -> dict[str, Any]:
    if options.epoch_s is None:
        created = datetime.datetime.now(datetime.UTC)
    else:
        created = datetime.datetime.fromtimestamp(options.epoch_s, datetime.UTC)
    entry = {
        "created": created.isoformat().replace("+00:00", "Z"),
        "created_by": "fusestore commit",
        "author": options.author,
        "comment": options.message,
    }
    return {key: value for key, value in entry.items() if value}


def _link(store: Store, scratch: Scratch, layer: LayerRef) -> oci.Descriptor:
    """A layer of the store in the layout. Raises NotFetched for a lazy one."""
    store.complete_layer(layer)
    scratch.symlink(f"blobs/sha256/{digest_hex(layer.blob)}", store.blob_path(layer.blob))
    return oci.Descriptor(_DOCKER_LAYERS.get(layer.media_type, layer.media_type), layer.blob, layer.size)


def _write_layer(store: Store, container_id: str, scratch: Scratch, options: CommitOptions) -> _Layer | None:
    """The container's changes as a blob of the layout; None if there are none. Raises Busy."""
    latest_ns = None if options.epoch_s is None else options.epoch_s * 1_000_000_000
    for attempt in range(_ATTEMPTS):
        name = f"layer-{attempt}"
        fd = scratch.create(name)
        try:
            blob = _Digester(partial(write_all, fd))
            compressor = COMPRESSIONS[options.compression](blob.write)
            content = _Digester(compressor.write)
            with snapshot(store, container_id) as tree:
                before = state_of(tree)
                has_changes = export_layer(tree, content.write, latest_ns)
                compressor.close()
                if before is None or state_of(tree) != before:
                    continue
        finally:
            os.close(fd)
        if not has_changes:
            return None
        disk.current.rename(scratch.join(name), scratch.join(f"blobs/sha256/{digest_hex(blob.digest)}"))
        descriptor = oci.Descriptor(oci.LAYER_TYPES[options.compression], blob.digest, blob.size)
        return _Layer(descriptor, content.digest)
    raise Busy(f"container {container_id} is being written to: commit it when that has ended")


def _write_layout(scratch: Scratch, config: dict[str, Any], layers: Sequence[oci.Descriptor]) -> None:
    def put(data: bytes) -> Digest:
        digest = oci.digest_of(data)
        scratch.write(f"blobs/sha256/{digest_hex(digest)}", data)
        return digest

    config_data = oci.encode(config)
    manifest = oci.make_manifest(oci.Descriptor(oci.CONFIG_TYPE, put(config_data), len(config_data)), layers)
    entry = {"mediaType": oci.MANIFEST_TYPE, "digest": put(manifest), "size": len(manifest)}
    scratch.write("index.json", oci.encode({"schemaVersion": 2, "manifests": [entry]}))
    scratch.write("oci-layout", oci.encode({"imageLayoutVersion": OCI_LAYOUT_VERSION}))
