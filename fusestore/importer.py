"""The way of an image into the store. Blocking; layers are taken in several at a time, each by a thread.

Everything is staged in a directory of tmp/ first, verified and synced there; then, with the store's names
locked, it is renamed into place, content before names, index.json last. An import that fails or is killed
leaves the store as it was, but for downloads to go on from (fusestore.downloads); killed between two renames
it leaves an intent, and the next open removes what nothing points to (layout.py, **intent**).

What the store has already is not stored twice, but it is verified again: importing an image repairs it.
"""

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass

from . import disk, oci
from .blobs import Ingested, derive, ingest
from .downloads import Download, Downloads
from .durable import Scratch, Workspace, write_all
from .errors import Busy, LayerRefused, NoToc, StoreDamaged
from .images import Image, Images, loose_parts
from .layerfiles import LayerFiles
from .layerref import LayerRef, map_index
from .layout import Layout
from .names import digest_hex, parse_image_name
from .nodes import Digest
from .sources import LayerSource, Parts, Source
from .union import check_lower_links

__all__ = ["Importer", "Progress"]

Progress = Callable[[int, int], None]
"""Called with bytes of blobs done and bytes in all; from any thread, one at a time."""

_ATTEMPTS = 3


class _Stopped(Exception):
    """Another layer failed, or the user interrupts."""


class _Gone(Exception):
    """What the store had when it was looked at was deleted meanwhile."""


@dataclass(frozen=True, slots=True)
class _Staged:
    """A layer on its way. Files are names in the scratch directory; None: the store's own is good."""

    ref: LayerRef
    blob_path: str | None = None
    index_file: str | None = None
    seek_file: str | None = None
    is_lazy: bool = False
    lazy_dir: str | None = None


class _Counter:
    """Adds up what the threads report, and stops them."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total = total
        self._progress = progress
        self._done = 0
        self._lock = threading.Lock()
        self.stopped = threading.Event()

    def add(self, count: int) -> None:
        if self.stopped.is_set():
            raise _Stopped
        if self._progress is not None:
            with self._lock:
                self._done += count
                self._progress(min(self._done, self._total), self._total)


class Importer:
    """Brings images into one store. Thread-safe."""

    def __init__(self, layout: Layout, workspace: Workspace, images: Images, layers: LayerFiles) -> None:
        self._layout = layout
        self._workspace = workspace
        self._images = images
        self._layers = layers

    def run(
        self, open_source: Callable[[str], Source], names: Sequence[str], progress: Progress | None
    ) -> Image:
        """See `Store.import_source`."""
        for name in names:
            parse_image_name(name)
        self._images.require_free(names)
        for _ in range(_ATTEMPTS):
            with (
                self._workspace.scratch() as scratch,
                open_source(scratch.path) as source,
                contextlib.suppress(_Gone),
                Downloads(self._layout, self._workspace) as downloads,
            ):
                wanted = names or source.names
                self._images.require_free(wanted)
                return self._import(source, wanted, scratch, downloads, progress)
        raise Busy("other processes keep deleting what this image needs: end them, then import it again")

    def _import(
        self,
        source: Source,
        names: Sequence[str],
        scratch: Scratch,
        downloads: Downloads,
        progress: Progress | None,
    ) -> Image:
        """Raises _Gone."""
        if self._has_sound_variant(source):
            image_id = digest_hex(oci.digest_of(source.config))
            with self._workspace.lock():
                if image_id not in self._images.catalog().images:
                    raise _Gone
                self._images.change_names_locked(image_id, names, replace_other=True)
                return self._images.find(image_id)
        staged = self._stage(source, scratch, downloads, progress)
        self._check_lower_links(staged, scratch)
        config = oci.Descriptor(source.config_type, oci.digest_of(source.config), len(source.config))
        scratch.write("config", source.config)
        manifest_data = source.manifest
        if manifest_data is None:
            refs = [layer.ref for layer in staged]
            manifest_data = oci.make_manifest(
                config, [oci.Descriptor(r.media_type, r.blob, r.size) for r in refs]
            )
        scratch.write("manifest", manifest_data)
        descriptor = oci.Descriptor(source.manifest_type, oci.digest_of(manifest_data), len(manifest_data))
        image = Image(
            id=digest_hex(config.digest),
            names=(),
            manifest=descriptor.digest,
            layers=tuple(layer.ref for layer in staged),
            architecture=source.parsed_config.architecture,
            os=source.parsed_config.os,
            created=source.parsed_config.created,
        )
        scratch.sync()
        with self._workspace.lock():
            if not all(self._is_there(layer) for layer in staged):
                raise _Gone
            with self._images.changing(loose_parts(image)):
                self._publish_locked(staged, scratch, config.digest, descriptor.digest)
                self._images.add_locked(descriptor, image, names)
            return self._images.find(image.id)

    def _has_sound_variant(self, source: Source) -> bool:
        """Whether the store has this image with another manifest (compressed differently), and all of it."""
        known = self._images.catalog().images.get(digest_hex(oci.digest_of(source.config)))
        if known is None or (
            source.manifest is not None and oci.digest_of(source.manifest) == known.manifest
        ):
            return False
        documents = all(self._is_stored(digest, None) for digest in (known.manifest, known.config))
        return documents and all(self._is_stored(layer.blob, layer.size) for layer in known.layers)

    def _is_stored(self, digest: Digest, size: int | None) -> bool:
        """Whether the blob is in the store and has its digest: hashed, since this may be the repair of it."""
        try:
            with open(self._layout.blob(digest), "rb", buffering=0) as file:
                if size is not None and os.fstat(file.fileno()).st_size != size:
                    return False
                return hashlib.file_digest(file, "sha256").hexdigest() == digest_hex(digest)
        except FileNotFoundError:
            return False

    # Staging

    def _stage(
        self, source: Source, scratch: Scratch, downloads: Downloads, progress: Progress | None
    ) -> list[_Staged]:
        """All layers, verified, bottom first."""
        unique = {(layer.diff_id, layer.blob): layer for layer in source.layers}
        counter = _Counter(sum(layer.size for layer in unique.values()), progress)
        with ThreadPoolExecutor(source.parallel, thread_name_prefix="import") as pool:
            jobs = {
                key: pool.submit(self._stage_layer, layer, scratch, downloads, str(number), counter)
                for number, (key, layer) in enumerate(unique.items())
            }
            try:
                done, _ = wait(jobs.values(), return_when=FIRST_EXCEPTION)
                for job in done:
                    job.result()
            except BaseException:
                counter.stopped.set()
                source.interrupt()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return [jobs[layer.diff_id, layer.blob].result() for layer in source.layers]

    def _stage_layer(
        self,
        layer: LayerSource,
        scratch: Scratch,
        downloads: Downloads,
        prefix: str,
        counter: _Counter,
    ) -> _Staged:
        blob = layer.blob or layer.diff_id  # what it is if it is not compressed
        if self._is_stored(blob, layer.size):
            ref = LayerRef(layer.diff_id, blob, layer.size, layer.media_type or oci.LAYER_TYPES["none"])
            if self._layers.is_complete(ref):
                counter.add(layer.size)
                return _Staged(ref)
            try:
                made = derive(self._layout.blob(blob), blob=blob, diff_id=layer.diff_id, progress=counter.add)
            except StoreDamaged as error:
                if not os.path.exists(self._layout.blob(blob)):
                    raise _Gone from error
                raise LayerRefused(str(error)) from error
            return self._stage_derived(layer, made, scratch, prefix, None)
        if layer.parts is not None:
            with contextlib.suppress(NoToc):
                return self._stage_parts(layer, layer.parts, scratch, prefix, counter)
        download = None
        if layer.open_at is not None:
            download = downloads.open(blob, layer.size, layer.open_at)
        try:
            if download is not None:
                made = self._ingest_download(layer, download, counter)
                path = download.path
            else:
                path = scratch.join(f"blob-{prefix}")
                made = self._ingest_copy(layer, scratch.create(f"blob-{prefix}"), counter)
        except LayerRefused as error:
            raise LayerRefused(
                f"layer {blob} is refused ({error}): fetch the image again, or use another"
            ) from error
        return self._stage_derived(layer, made, scratch, prefix, path)

    def _ingest_copy(self, layer: LayerSource, fd: int, counter: _Counter) -> Ingested:
        """Takes the blob into `fd`, which is closed."""
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, fd)
            reader = layer.open()
            stack.callback(reader.close)
            return ingest(
                reader,
                sink=lambda data: write_all(fd, data),
                expected_blob=layer.blob,
                expected_diff_id=layer.diff_id,
                progress=counter.add,
            )

    def _ingest_download(self, layer: LayerSource, download: Download, counter: _Counter) -> Ingested:
        """What was kept may be anything: only a blob that came whole just now is refused."""
        while True:
            try:
                made = ingest(
                    download,
                    expected_blob=layer.blob,
                    expected_diff_id=layer.diff_id,
                    progress=counter.add,
                )
            except LayerRefused:
                if not download.kept:
                    raise
                download.restart()
            else:
                disk.current.fsync(download.fd)
                return made

    def _stage_parts(
        self,
        layer: LayerSource,
        read_parts: Callable[[], Parts],
        scratch: Scratch,
        prefix: str,
        counter: _Counter,
    ) -> _Staged:
        """Raises NoToc."""
        assert layer.blob is not None, "what is in a registry has a digest"
        ref = LayerRef(layer.diff_id, layer.blob, layer.size, layer.media_type)
        # One that is lazy already has more of its blob than a new one.
        if self._layers.is_lazy(ref):
            counter.add(layer.size)
            return _Staged(ref, is_lazy=True)
        name = f"lazy-{prefix}"
        try:
            parts = read_parts()
        except LayerRefused as error:
            raise LayerRefused(f"layer {layer.blob} is refused ({error}): use another image") from error
        scratch.mkdir(name)
        scratch.write(Layout.lazy_index_in(name), parts.index)
        scratch.write(Layout.lazy_chunks_in(name), parts.chunks)
        scratch.write(Layout.lazy_origin_in(name), parts.origin)
        fd = scratch.create(Layout.lazy_part_in(name))
        try:
            disk.current.truncate(fd, layer.size)
        finally:
            os.close(fd)
        counter.add(layer.size)
        return _Staged(ref, is_lazy=True, lazy_dir=name)

    def _stage_derived(
        self, layer: LayerSource, made: Ingested, scratch: Scratch, prefix: str, blob_path: str | None
    ) -> _Staged:
        media_type = layer.media_type or oci.LAYER_TYPES[made.compression]
        ref = LayerRef(layer.diff_id, made.blob, made.blob_size, media_type)
        index_file = f"index-{prefix}"
        scratch.write(index_file, made.index)
        seek_file = f"seek-{prefix}"
        scratch.write(seek_file, made.seek)
        return _Staged(ref, blob_path, index_file, seek_file)

    def _check_lower_links(self, staged: Sequence[_Staged], scratch: Scratch) -> None:
        """Refuses hard links that lead to nothing: only all layers together can tell."""
        try:
            indexes = [map_index(self._index_path(layer, scratch)) for layer in staged]
        except FileNotFoundError as error:
            raise _Gone from error
        if any(index.lower_links for index in indexes):
            check_lower_links(indexes)

    def _index_path(self, layer: _Staged, scratch: Scratch) -> str:
        if layer.is_lazy:
            ref = layer.ref
            directory = (
                scratch.join(layer.lazy_dir) if layer.lazy_dir else self._layout.lazy(ref.diff_id, ref.blob)
            )
            return self._layout.lazy_index_in(directory)
        return (
            scratch.join(layer.index_file)
            if layer.index_file
            else self._layout.layer_index(layer.ref.diff_id)
        )

    # Publishing

    def _is_there(self, layer: _Staged) -> bool:
        ref = layer.ref
        if layer.is_lazy:
            return layer.lazy_dir is not None or os.path.exists(self._layout.lazy(ref.diff_id, ref.blob))
        needed = [] if layer.blob_path else [self._layout.blob(ref.blob)]
        if layer.index_file is None:
            needed.append(self._layout.layer_index(ref.diff_id))
            needed.append(self._layout.seek_table(ref.diff_id, ref.blob))
        return all(os.path.exists(path) for path in needed)

    def _publish_locked(
        self, staged: Sequence[_Staged], scratch: Scratch, config: Digest, manifest: Digest
    ) -> None:
        layout = self._layout
        moves = []
        obsolete = []
        for layer in {layer.ref: layer for layer in staged}.values():
            ref = layer.ref
            lazy = layout.lazy(ref.diff_id, ref.blob)
            if not layer.is_lazy:
                obsolete.append(lazy)
            elif layer.lazy_dir is not None and not os.path.exists(lazy):  # nobody else was faster
                self._workspace.make_directory(layout.layer(ref.diff_id))
                moves.append((scratch.join(layer.lazy_dir), lazy))
            if layer.blob_path is not None:
                moves.append((layer.blob_path, layout.blob(ref.blob)))
            if layer.index_file is not None:
                self._workspace.make_directory(layout.layer(ref.diff_id))
                moves.append((scratch.join(layer.index_file), layout.layer_index(ref.diff_id)))
            if layer.seek_file is not None:
                moves.append((scratch.join(layer.seek_file), layout.seek_table(ref.diff_id, ref.blob)))
        moves.append((scratch.join("config"), layout.blob(config)))
        moves.append((scratch.join("manifest"), layout.blob(manifest)))
        self._workspace.publish(*moves)
        self._workspace.discard(*obsolete)
