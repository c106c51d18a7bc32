"""What a new index.json of /views/oci does to the store. Blocking.

A program that uses an OCI image layout changes it by writing index.json anew (OCI image-spec,
image-layout.md). What differs from the store's is done in this order, so that an image that cannot come in
changes no name:

* A descriptor of what is no image here yet, or of an image that lost blobs which were written into the view:
  the image is imported, from those blobs and the store's.
* A name that leads elsewhere: the image is tagged.
* A name that is missing: it is taken away. The image stays, as it does after ``rm images/NAME``.

All names change in one step.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from . import errors, oci
from .images import INDEX_MAX, require_places
from .layout import ANNOTATION_NAME, DEFAULT_TAG, OCI_LAYOUT_VERSION
from .names import digest_hex, parse_digest, parse_image_name
from .nodes import Digest
from .store import Catalog, Image, Scratch, Store

__all__ = ["Known", "apply_index"]

_NESTING_MAX = 3
"""Indexes inside indexes."""


@dataclass(frozen=True, slots=True)
class Known:
    """What a program knows of the store: the index.json that it read or wrote last."""

    digests: frozenset[str]
    """Of descriptors, also of broken images."""
    names: Mapping[str, str]
    """name → id."""

    @classmethod
    def of(cls, catalog: Catalog) -> "Known":
        return cls(frozenset(str(entry.raw.get("digest")) for entry in catalog.entries), catalog.names)


def apply_index(store: Store, data: bytes, staged: Mapping[Digest, str], base: Known | None) -> Known:
    """Makes the store have what the index `data` has. `staged`: verified blobs, and paths to read them.

    `base`: what who wrote it knew before, where somebody read index.json: only what differs from it is done,
    so that programs that write at the same time do not undo each other's names. Gives what he knows now.

    Raises BadSource and what importing raises; then images before the one that is wrong are there.
    """
    document = oci.parse_object(data, "index.json", INDEX_MAX)
    wanted = oci.parse_descriptors(document, "manifests", "index.json")
    now = store.catalog()
    base = base or Known.of(now)
    known = {entry.raw.get("digest"): entry.image_id for entry in now.entries}
    ids: dict[Digest, str | None] = {}
    """By digest of the descriptor; None: its image is broken."""
    given = [name for name in map(_name_of, wanted) if name is not None]
    taken_away = {
        name: owner
        for name, owner in base.names.items()
        if name not in given and now.names.get(name) == owner
    }
    for name in given:
        if name not in now.names:
            parse_image_name(name)
    require_places(given, now.names.keys() - taken_away.keys())
    for descriptor in wanted:
        if descriptor.digest in ids:
            continue
        image_id = known.get(descriptor.digest)
        image = None if image_id is None else now.images[image_id]
        is_new = descriptor.digest not in known and descriptor.digest not in base.digests
        if is_new or not staged.keys().isdisjoint(_blobs(descriptor, image)):
            image_id = _import(store, descriptor, staged).id
        ids[descriptor.digest] = image_id
    if any(name.startswith(f"{DEFAULT_TAG}/") for name in given) and DEFAULT_TAG not in now.names:
        # The first image got it, as it came without its name.
        taken_away |= {DEFAULT_TAG: store.catalog().names.get(DEFAULT_TAG, "")}
    pairs = [(_name_of(descriptor), ids[descriptor.digest]) for descriptor in wanted]
    names = {name: image_id for name, image_id in pairs if name is not None and image_id is not None}
    changed = {name: owner for name, owner in names.items() if base.names.get(name) != owner}
    store.change_names(changed, taken_away)
    return Known(frozenset(ids), names)


def _blobs(descriptor: oci.Descriptor, image: Image | None) -> Iterator[Digest]:
    """What is known of the blobs that the descriptor leads to."""
    yield descriptor.digest
    if image is not None:
        yield from (image.manifest, image.config, *(layer.blob for layer in image.layers))


def _name_of(descriptor: oci.Descriptor) -> str | None:
    return descriptor.annotations.get(ANNOTATION_NAME)


def _import(store: Store, descriptor: oci.Descriptor, staged: Mapping[Digest, str]) -> Image:
    """Gives it no name: what comes after it may fail."""
    with store.scratch() as scratch:
        source = _Layout(store, scratch, staged)
        source.add(descriptor.digest)
        source.finish(descriptor)
        return store.import_image(f"oci:{scratch.path}")


class _Layout:
    """An OCI image layout of symlinks, in a scratch directory."""

    def __init__(self, store: Store, scratch: Scratch, staged: Mapping[Digest, str]) -> None:
        self._store = store
        self._scratch = scratch
        self._staged = staged
        self._added: set[Digest] = set()
        scratch.mkdir("blobs")
        scratch.mkdir("blobs/sha256")

    def add(self, digest: Digest, depth: int = 0) -> None:
        """A manifest or index, and what it points to. What is missing the import misses."""
        path = self._link(digest)
        if not os.path.exists(path) or os.path.getsize(path) > oci.DOCUMENT_MAX:
            return
        with open(path, "rb") as file:
            document = oci.parse_object(file.read(), f"manifest {digest}")
        for key, inner in _digests(document):
            if key != "manifests":
                self._link(inner)
            elif depth < _NESTING_MAX:
                self.add(inner, depth + 1)

    def _link(self, digest: Digest) -> str:
        path = self._staged.get(digest) or self._store.blob_path(digest)
        if digest not in self._added:
            self._added.add(digest)
            self._scratch.symlink(f"blobs/sha256/{digest_hex(digest)}", path)
        return path

    def finish(self, descriptor: oci.Descriptor) -> None:
        entry = {"mediaType": descriptor.media_type, "digest": descriptor.digest, "size": descriptor.size}
        self._scratch.write("index.json", oci.encode({"schemaVersion": 2, "manifests": [entry]}))
        self._scratch.write("oci-layout", oci.encode({"imageLayoutVersion": OCI_LAYOUT_VERSION}))


def _digests(document: Mapping[str, Any]) -> Iterator[tuple[str, Digest]]:
    """Key and digest of each descriptor; what is none is left to who parses it."""
    for key in ("config", "layers", "manifests"):
        found = document.get(key)
        for descriptor in found if isinstance(found, list) else [found]:
            if isinstance(descriptor, dict) and isinstance(descriptor.get("digest"), str):
                try:
                    yield key, parse_digest(descriptor["digest"])
                except errors.BadName:
                    continue
