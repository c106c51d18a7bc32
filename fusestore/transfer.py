"""Images from registries and to them. Blocking.

What is pulled goes the way of every import: several layers at once, verified as they stream, staged and
published whole; what the store has is not fetched. A pull that is cut off keeps what came of the layers, for
the next to go on from (fusestore.downloads).
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from hashlib import sha256
from typing import IO

from . import oci
from .durable import is_damage
from .errors import BadInput, BadName, StoreDamaged, StoreError
from .images import Image
from .importer import Progress
from .lazylayer import read_parts
from .nodes import Digest
from .reference import Reference, parse_reference
from .registry import Registry, RegistryOptions
from .sourcefiles import Reader
from .sources import Source, open_image
from .store import Store
from .transport import Upload

__all__ = ["RegistryOptions", "pull", "push"]

_PARALLEL = 4
"""Layers on their way at once: registries often bound what one connection gets."""


def pull(
    store: Store,
    reference_text: str,
    *,
    name: str | None = None,
    platform: oci.Platform | None = None,
    is_lazy: bool = False,
    options: RegistryOptions | None = None,
    progress: Progress | None = None,
) -> Image:
    """Takes an image of a registry into the store, whole and verified, or nothing.

    It is called by its reference in full (docker.io/library/busybox:latest), or `name`. `platform`: of an
    image for several, instead of this machine's. `is_lazy`: layers that can be read in parts are not fetched,
    but their tables of contents; they are when a mount has the time (fusestore.lazylayer).

    Raises BadName, NotFound (the registry has no such image), AccessDenied, RegistryFailed, and what
    `Store.import_image` raises.
    """
    reference = parse_reference(reference_text)
    options = options or RegistryOptions()

    def open_source(_: str) -> Source:
        registry = options.open(reference)
        try:
            data, media_type = registry.manifest()
            source = open_image(_RegistryBlobs(registry), data, media_type, [str(reference)], platform)
            return _resumed(_in_parts(source, registry, options.plain_http) if is_lazy else source, registry)
        except BaseException:
            registry.close()
            raise

    return store.import_source(open_source, [name] if name else [], progress)


def _resumed(source: Source, registry: Registry) -> Source:
    """The same, of layers whose download goes on where an earlier one ended."""
    layers = tuple(
        replace(layer, open_at=partial(registry.blob, layer.blob, layer.size)) if layer.blob else layer
        for layer in source.layers
    )
    return replace(source, layers=layers)


def _in_parts(source: Source, registry: Registry, plain_http: bool) -> Source:
    """The same, of layers that need not be fetched."""
    assert source.manifest is not None, "an image in a registry has one"
    manifest = oci.parse_manifest(source.manifest, str(registry.reference), source.manifest_type)
    layers = tuple(
        replace(layer, parts=partial(read_parts, registry, descriptor, plain_http))
        for layer, descriptor in zip(source.layers, manifest.layers, strict=True)
    )
    return replace(source, layers=layers)


class _RegistryBlobs:
    parallel = _PARALLEL

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self.interrupt = registry.interrupt
        self.close = registry.close

    def manifest(self, descriptor: oci.Descriptor) -> bytes:
        data, _ = self._registry.manifest(descriptor.digest)
        return data

    def document(self, descriptor: oci.Descriptor) -> bytes:
        return self._registry.document(descriptor.digest)

    def layer(self, descriptor: oci.Descriptor) -> Callable[[], Reader]:
        return partial(self._registry.blob, descriptor.digest, descriptor.size)


def push(
    store: Store,
    image_ref: str,
    reference_text: str,
    *,
    options: RegistryOptions | None = None,
    progress: Progress | None = None,
) -> Digest:
    """Uploads an image with the bytes that the store has; gives the digest of its manifest.

    What the registry has already is not sent: in that repository, or in another one of that registry after
    which the store calls an image with the same layer. The image appears there last.

    Raises NotFound (no such image in the store), BadName, AccessDenied, RegistryFailed, StoreDamaged.
    """
    reference = parse_reference(reference_text)
    image = store.image(image_ref)
    for layer in image.layers:
        store.complete_layer(layer)
    data = store.manifest(image)
    manifest = oci.parse_manifest(data, f"manifest {image.manifest}")
    if reference.digest not in (None, image.manifest):
        raise BadInput(f"{image_ref} has digest {image.manifest}, not {reference.digest}: leave it out")
    blobs = {found.digest: found for found in (*manifest.layers, manifest.config)}
    sources = _mountable(store, reference)
    counter = _Counter(sum(blob.size for blob in blobs.values()), progress)
    options = options or RegistryOptions()
    with closing(options.open(reference, pushes=True)) as registry:
        with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="push") as pool:
            jobs = [
                pool.submit(_push_blob, store, registry, blob, sources.get(blob.digest, ""), counter)
                for blob in blobs.values()
            ]
            try:
                done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
                for job in done:
                    job.result()
            except BaseException:
                registry.interrupt()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        registry.put_manifest(data, manifest.media_type)
    return image.manifest


def _mountable(store: Store, reference: Reference) -> dict[Digest, str]:
    """By the digest of a layer another repository of that registry that should have it."""
    found: dict[Digest, str] = {}
    for image in store.images():
        for name in image.names:
            # A name without a registry says nothing of where the image came from.
            if not name.startswith(f"{reference.registry}/"):
                continue
            try:
                other = parse_reference(name)
            except BadName:
                continue
            if other.repository != reference.repository:
                found.update((layer.blob, other.repository) for layer in image.layers)
    return found


def _push_blob(
    store: Store, registry: Registry, blob: oci.Descriptor, mount_from: str, counter: "_Counter"
) -> None:
    sent = counter.of_blob()
    if not registry.has_blob(blob.digest):
        upload = Upload(blob.size, partial(_reading, store.blob_path(blob.digest), blob.digest, sent))
        registry.put_blob(blob.digest, upload, mount_from)
    sent(blob.size)


class _Counter:
    """Adds up how far each blob is."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total = total
        self._progress = progress
        self._done: dict[int, int] = {}
        self._lock = threading.Lock()

    def of_blob(self) -> Callable[[int], None]:
        """What takes how many bytes of one blob are there: fewer, where it is sent again."""
        key = len(self._done)
        self._done[key] = 0

        def report(count: int) -> None:
            with self._lock:
                self._done[key] = count
                if self._progress is not None:
                    self._progress(sum(self._done.values()), self._total)

        return report


@contextmanager
def _reading(path: str, digest: Digest, sent: Callable[[int], None]) -> Iterator["_BlobFile"]:
    with ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb", buffering=0))
        except OSError as error:
            raise _unreadable(path, error) from error
        yield _BlobFile(file, path, digest, sent)


def _unreadable(path: str, error: OSError) -> StoreError:
    """Not an OSError, which would be taken for one of the connection."""
    kind = StoreDamaged if is_damage(error) else StoreError
    return kind(f"blob {path} cannot be read ({error.strerror}): import the image again")


class _BlobFile:
    """A blob of the store, verified as it is read. Raises StoreDamaged, at its end if not before."""

    def __init__(self, file: IO[bytes], path: str, digest: Digest, sent: Callable[[int], None]) -> None:
        self._file = file
        self._path = path
        self._digest = digest
        self._sent = sent
        self._hash = sha256()
        self._offset = 0

    def read(self, size: int, /) -> bytes:
        try:
            data = self._file.read(size)
        except OSError as error:
            raise _unreadable(self._path, error) from error
        self._hash.update(data)
        self._offset += len(data)
        self._sent(self._offset)
        if not data and f"sha256:{self._hash.hexdigest()}" != self._digest:
            raise StoreDamaged(f"blob {self._path} has another digest: import the image again")
        return data
