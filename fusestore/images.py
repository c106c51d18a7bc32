"""Images on disk: which there are, what they are called, what they are made of. Blocking.

index.json is the truth: an image exists while a descriptor there points to it, and has the names that
descriptors give it (layout.py, **index.json**). It is read again only when the file changed, and what a
manifest says is kept in memory, as it cannot change.

The rule a maintainer must not break: methods with `_locked` in their names are called with the workspace's
lock held, and what a change may leave without a reference is written down before the change (`changing`), so
that a crash leaves nothing behind for good.
"""

import contextlib
import errno
import json
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import msgpack

from . import oci
from .durable import Workspace, is_damage, read_file
from .errors import BadName, BadSource, Busy, Exists, NotFound, StoreDamaged
from .layerref import LayerRef
from .layout import ANNOTATION_ID, ANNOTATION_NAME, DEFAULT_TAG, IMAGE_RECORD_VERSION, Layout
from .names import digest_hex, is_hex_id, parse_digest, parse_image_name
from .nodes import Digest
from .sources import machine_platform

__all__ = ["INDEX_MAX", "Catalog", "Entry", "Image", "Images", "Loose", "loose_parts", "require_places"]

INDEX_MAX = 256 << 20
"""Bytes of index.json: about a million names."""

_PREFIX_MIN = 12
"""Hex digits that may stand for an id."""

_PREFIX = re.compile(r"[0-9a-f]{12,64}")


@dataclass(frozen=True, slots=True)
class Image:
    """An image, at one moment."""

    id: str
    """Hex of the config's digest."""
    names: tuple[str, ...]
    """In the order of index.json."""
    manifest: Digest
    layers: tuple[LayerRef, ...]
    """Bottom first."""
    architecture: str
    os: str
    created: str
    """RFC 3339, or ""."""

    @property
    def config(self) -> Digest:
        return Digest(f"sha256:{self.id}")

    @property
    def size(self) -> int:
        """Bytes of its layers' blobs."""
        return sum({layer.blob: layer.size for layer in self.layers}.values())


@dataclass(frozen=True, slots=True)
class Entry:
    """One descriptor of index.json."""

    raw: Mapping[str, Any]
    image_id: str | None
    """None: it cannot be understood (see `problem`), or is not of an image."""
    name: str | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Catalog:
    """index.json, understood."""

    document: Mapping[str, Any]
    entries: tuple[Entry, ...]
    images: Mapping[str, Image]
    """By id."""
    names: Mapping[str, str]
    """name → id."""


Loose = Mapping[str, Sequence[str]]
""""blobs", "layers" (diff_ids), "images" (ids): what a change may leave without a reference."""


def loose_parts(image: Image) -> dict[str, list[str]]:
    return {
        "blobs": sorted({image.manifest, image.config, *(layer.blob for layer in image.layers)}),
        "layers": sorted({layer.diff_id for layer in image.layers}),
        "images": [image.id],
    }


class Images:
    """The images of one store. Thread-safe: state is on disk, the caches are replaced whole."""

    def __init__(self, layout: Layout, workspace: Workspace) -> None:
        self._layout = layout
        self._workspace = workspace
        self._cached: tuple[tuple[int, ...], Catalog] | None = None
        self._known: dict[Digest, Image] = {}
        """By digest of the descriptor, without names."""

    # Reading

    def catalog(self) -> Catalog:
        """As it is now; the same object as long as index.json is the same file. Raises StoreDamaged."""
        path = self._layout.index
        try:
            found = os.stat(path)
            key = (found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size)
            if self._cached is not None and self._cached[0] == key:
                return self._cached[1]
            data = read_file(path, INDEX_MAX)
            document = oci.parse_object(data, path, INDEX_MAX)
            listed = document.get("manifests") or []
            if not isinstance(listed, list):
                raise BadSource("manifests is no list")
        except (OSError, BadSource) as error:
            raise self._of_index(error) from error
        catalog = self._understand(document, listed)
        self._cached = key, catalog
        return catalog

    def changed_ns(self) -> int:
        """When index.json was written, in ns since 1970. Raises StoreDamaged."""
        try:
            return os.stat(self._layout.index).st_mtime_ns
        except OSError as error:
            raise self._of_index(error) from error

    def _of_index(self, error: OSError | BadSource) -> OSError | StoreDamaged:
        """What to raise for an error in reading index.json."""
        if isinstance(error, OSError) and not is_damage(error):
            return error
        reason = f"{self._layout.index} is damaged ({error})"
        return StoreDamaged(f"{reason}: run `fusestore check --repair`, or restore it from a backup")

    def forget(self) -> None:
        """Has all be read again: what `catalog` takes for unchangeable was repaired."""
        self._cached = None
        self._known.clear()

    def find(self, ref: str) -> Image:
        """By name, id, or 12 or more first digits of an id, ``sha256:`` before it or not. Raises NotFound."""
        catalog = self.catalog()
        if ref in catalog.names:
            return catalog.images[catalog.names[ref]]
        if ref in catalog.images:
            return catalog.images[ref]
        digits = str(ref).removeprefix("sha256:")
        if _PREFIX.fullmatch(digits):
            matching = [image_id for image_id in catalog.images if image_id.startswith(digits)]
            if len(matching) == 1:
                return catalog.images[matching[0]]
            if matching:
                raise NotFound(f"{ref} stands for {len(matching)} images: give more digits of the id")
        raise NotFound(
            f"there is no image {ref!r}: `fusestore images` lists them, `fusestore import` brings one in"
        )

    def read_blob(self, digest: Digest, what: str) -> bytes:
        """A manifest or config, verified. Raises StoreDamaged; OSError where it cannot be read just now."""
        path = self._layout.blob(digest)
        try:
            data = read_file(path, oci.DOCUMENT_MAX)
        except OSError as error:
            if not is_damage(error):
                raise
            raise StoreDamaged(
                f"{what} {path} cannot be read ({error.strerror}): import the image again"
            ) from error
        if oci.digest_of(data) != digest:
            raise StoreDamaged(f"{what} {path} is damaged: import the image again")
        return data

    def _understand(self, document: Mapping[str, Any], listed: Iterable[Any]) -> Catalog:
        entries = [self._entry(raw) for raw in listed]
        named = {entry.name for entry in entries if entry.name is not None}
        # Were both shown, one would have to be a symlink and a directory.
        entries = [replace(entry, name=None) if _above(entry.name, named) else entry for entry in entries]
        names: dict[str, str] = {}
        images: dict[str, Image] = {}
        names_of: dict[str, list[str]] = {}
        for entry in entries:
            if entry.image_id is None:
                continue
            images.setdefault(entry.image_id, self._known[entry.raw["digest"]])
            if entry.name is not None and entry.name not in names:
                names[entry.name] = entry.image_id
                names_of.setdefault(entry.image_id, []).append(entry.name)
        images = {key: replace(image, names=tuple(names_of.get(key, ()))) for key, image in images.items()}
        return Catalog(document, tuple(entries), images, names)

    def _entry(self, raw: Any) -> Entry:
        try:
            (descriptor,) = oci.parse_descriptors({"manifests": [raw]}, "manifests", "index.json")
            image = self._known.get(descriptor.digest)
            if image is None:
                image = self._recorded(descriptor) or self.image_of(descriptor)
                self._known[descriptor.digest] = image
        except (BadSource, StoreDamaged) as error:
            return Entry(raw if isinstance(raw, dict) else {}, None, None, str(error))
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            # A bad sector stays: it must not hide all other images.
            return Entry(raw, None, None, f"{os.fsdecode(error.filename)} cannot be read ({error.strerror})")
        try:
            name = parse_image_name(descriptor.annotations.get(ANNOTATION_NAME, ""))
        except BadName:
            return Entry(raw, image.id, None)
        return Entry(raw, image.id, name)

    def _recorded(self, descriptor: oci.Descriptor) -> Image | None:
        image_id = descriptor.annotations.get(ANNOTATION_ID, "")
        if not is_hex_id(image_id):
            return None
        try:
            image = _decode_record(read_file(self._layout.image_record(image_id), oci.DOCUMENT_MAX), image_id)
        except (OSError, StoreDamaged):
            return None
        return image if image.manifest == descriptor.digest else None

    def image_of(self, descriptor: oci.Descriptor) -> Image:
        """What manifest and config say. Raises BadSource if they are of no image, StoreDamaged if missing."""
        data = self.read_blob(descriptor.digest, "manifest")
        document = oci.parse_object(data, f"manifest {descriptor.digest}")
        if oci.is_index(document):
            inner = oci.parse_descriptors(document, "manifests", f"manifest {descriptor.digest}")
            descriptor = oci.choose_platform(inner, machine_platform(), f"manifest {descriptor.digest}")
            data = self.read_blob(descriptor.digest, "manifest")
        manifest = oci.parse_manifest(data, f"manifest {descriptor.digest}", descriptor.media_type)
        config = oci.parse_config(
            self.read_blob(manifest.config.digest, "config"), f"config {manifest.config.digest}"
        )
        if len(config.diff_ids) != len(manifest.layers):
            raise BadSource(f"manifest {descriptor.digest} and its config disagree about the layers")
        layers = tuple(
            LayerRef(diff_id, layer.digest, layer.size, layer.media_type)
            for diff_id, layer in zip(config.diff_ids, manifest.layers, strict=True)
        )
        image_id = digest_hex(manifest.config.digest)
        return Image(image_id, (), descriptor.digest, layers, config.architecture, config.os, config.created)

    # Changing

    def tag(self, ref: str, name: str, *, replace_other: bool) -> None:
        """Gives the image another name. Raises NotFound, BadName, Exists."""
        parse_image_name(name)
        with self._workspace.lock():
            self.change_names_locked(self.find(ref).id, [name], replace_other=replace_other)

    def untag(self, name: str) -> None:
        """The image stays, if need be without a name. Raises NotFound."""
        with self._workspace.lock():
            catalog = self.catalog()
            if name not in catalog.names:
                raise NotFound(f"there is no image name {name!r}: `fusestore images` lists them")
            self._write_locked(catalog, _without_name(catalog.entries, name))

    def rename_tag(self, old: str, new: str, *, replace_other: bool) -> None:
        """One step: the image is never without a name. Raises NotFound, BadName, Exists."""
        parse_image_name(new)
        with self._workspace.lock():
            catalog = self.catalog()
            if old not in catalog.names:
                raise NotFound(f"there is no image name {old!r}: `fusestore images` lists them")
            if old == new:
                return
            image_id = catalog.names[old]
            _require_free(
                new,
                {name: owner for name, owner in catalog.names.items() if name != old},
                image_id,
                replace_other,
            )
            entries = _without_name(catalog.entries, new) if new in catalog.names else list(catalog.entries)
            self._write_locked(
                catalog, [_named(entry, new) if entry.name == old else entry for entry in entries]
            )

    def change_names(self, given: Mapping[str, str], taken_away: Mapping[str, str]) -> None:
        """All of it in one step, or nothing. Both: name → id of an image.

        Those of `given` are the images', whoever had them; those of `taken_away` go where they are still that
        image's. Raises NotFound, BadName, Exists.
        """
        with self._workspace.lock():
            catalog = self.catalog()
            entries = list(catalog.entries)
            names = dict(catalog.names)
            for name, image_id in taken_away.items():
                if names.get(name) == image_id:
                    entries = _without_name(entries, name)
                    del names[name]
            for name, image_id in given.items():
                parse_image_name(name)
                if image_id not in catalog.images:
                    raise NotFound(f"there is no image {image_id}: it was deleted just now")
                entries = self._with_names(entries, names, image_id, [name], default=False)
                names[name] = image_id
            if entries != list(catalog.entries):
                self._write_locked(catalog, entries)

    def delete(self, ref: str, user_of: Callable[[str], str | None]) -> list[Digest]:
        """Takes the image away, with what only it used. Gives its diff_ids.

        `user_of(id)` names a container of it, if there is one. Raises NotFound, Busy.
        """
        with self._workspace.lock():
            image = self.find(ref)
            user = user_of(image.id)
            if user is not None:
                raise Busy(f"image {image.id[:12]} is used by container {user}: delete that first")
            catalog = self.catalog()
            loose = loose_parts(image)
            loose["blobs"].extend(
                entry.raw["digest"] for entry in catalog.entries if entry.image_id == image.id
            )
            with self.changing(loose):
                self._write_locked(
                    catalog, [entry for entry in catalog.entries if entry.image_id != image.id]
                )
                self.sweep_locked(loose)
            return [layer.diff_id for layer in image.layers]

    def add_locked(self, descriptor: oci.Descriptor, image: Image, names: Sequence[str]) -> None:
        """Makes `image` exist, pointed to by `descriptor`, with `names` besides those it has.

        The first image of a store without a `default` gets that name too. All its files are in place already.
        """
        self._workspace.make_directory(self._layout.image(image.id))
        self._workspace.write_file(self._layout.image_record(image.id), _encode_record(image))
        self._known[descriptor.digest] = image
        catalog = self.catalog()
        fresh = Entry(_raw(descriptor, image.id), image.id, None)
        # Of an image that is there already the names stay; the descriptor changes if its old manifest was
        # lost.
        entries = [
            _named(fresh, entry.name)
            if entry.image_id == image.id and entry.raw["digest"] != descriptor.digest
            else entry
            for entry in catalog.entries
        ]
        if all(entry.image_id != image.id for entry in entries):
            entries.append(fresh)
        self._write_locked(catalog, self._with_names(entries, catalog.names, image.id, names))

    def change_names_locked(self, image_id: str, names: Sequence[str], *, replace_other: bool) -> None:
        catalog = self.catalog()
        for name in names:
            _require_free(name, catalog.names, image_id, replace_other)
        entries = self._with_names(list(catalog.entries), catalog.names, image_id, names, default=False)
        if entries != list(catalog.entries):
            self._write_locked(catalog, entries)

    def require_free(self, names: Sequence[str]) -> None:
        """Raises Exists if one of `names` cannot be given because of where it would lie."""
        require_places(names, self.catalog().names)

    def changing(self, loose: Loose) -> AbstractContextManager[None]:
        """Around several renames: whatever ends them, an error or a crash, what is unreferenced then goes."""
        return self._workspace.intent({"loose": loose}, lambda: self.sweep_locked(loose))

    def sweep_locked(self, loose: Loose) -> None:
        """Discards those parts that no image has."""
        self._workspace.discard(*self.unreferenced(loose))

    def parts(self) -> Loose:
        """All that is there, referenced or not."""
        layout = self._layout
        return {
            "blobs": [f"sha256:{name}" for name in os.listdir(layout.blobs) if is_hex_id(name)],
            "layers": [f"sha256:{name}" for name in os.listdir(layout.layers) if is_hex_id(name)],
            "images": os.listdir(layout.images),
        }

    def unreferenced(self, loose: Loose) -> list[str]:
        """Where those parts are that no image has. None, if an entry of index.json cannot be understood."""
        catalog = self.catalog()
        if any(entry.image_id is None for entry in catalog.entries):
            return []
        layout = self._layout
        used = [loose_parts(image) for image in catalog.images.values()]
        blobs = {blob for parts in used for blob in parts["blobs"]}
        blobs.update(entry.raw["digest"] for entry in catalog.entries)
        diff_ids = {diff_id for parts in used for diff_id in parts["layers"]}
        unused_blobs = [parse_digest(blob) for blob in loose.get("blobs", ()) if blob not in blobs]
        layers = [parse_digest(diff_id) for diff_id in loose.get("layers", ())]
        return [
            *(
                layout.image(image_id)
                for image_id in loose.get("images", ())
                if image_id not in catalog.images
            ),
            *(layout.layer(diff_id) for diff_id in layers if diff_id not in diff_ids),
            *(
                path
                for diff_id in layers
                if diff_id in diff_ids
                for blob in unused_blobs
                for path in (layout.seek_table(diff_id, blob), layout.lazy(diff_id, blob))
            ),
            *(layout.blob(blob) for blob in unused_blobs),
        ]

    def make_index_locked(self, names: Mapping[str, str]) -> tuple[int, int]:
        """Writes index.json anew: what is left in it, and the images of which only the blobs are left.

        `names` {name: id} are names to give to those it has no name for any more. How many images there are
        then, and how many of them are without a name.
        """
        self.forget()
        try:
            left = _salvage(read_file(self._layout.index, INDEX_MAX))
        except OSError:
            left = []
        catalog = self._understand({"schemaVersion": 2}, left)
        entries = list(catalog.entries)
        for descriptor, image in self._stored_images():
            if all(entry.image_id != image.id for entry in entries):
                self._known[descriptor.digest] = image
                entries.append(Entry(_raw(descriptor, image.id), image.id, None))
        for name, image_id in sorted(names.items()):
            entries = self._with_name_left(entries, name, image_id)
        self._write_locked(catalog, entries)
        found = self.catalog().images.values()
        return len(found), sum(not image.names for image in found)

    @staticmethod
    def _with_name_left(entries: list[Entry], name: str, image_id: str) -> list[Entry]:
        taken = {entry.name: entry.image_id or "" for entry in entries if entry.name is not None}
        if all(entry.image_id != image_id for entry in entries):
            return entries
        try:
            _require_free(parse_image_name(name), taken, "", replace_other=False)
        except (BadName, Exists):
            return entries
        return _with_name(entries, image_id, name)

    def _stored_images(self) -> Iterator[tuple[oci.Descriptor, Image]]:
        """By what the blobs say, those that a record in images/ points to first."""
        digests = []
        for image_id in sorted(os.listdir(self._layout.images)):
            with contextlib.suppress(OSError, StoreDamaged):
                record = read_file(self._layout.image_record(image_id), oci.DOCUMENT_MAX)
                digests.append(_decode_record(record, image_id).manifest)
        for name in sorted(os.listdir(self._layout.blobs)):
            with contextlib.suppress(BadName):
                digests.append(parse_digest(f"sha256:{name}"))
        for digest in dict.fromkeys(digests):
            with contextlib.suppress(OSError, StoreDamaged, BadSource):
                if _begins_as_object(self._layout.blob(digest)):
                    data = self.read_blob(digest, "manifest")
                    media_type = oci.parse_manifest(data, digest).media_type
                    descriptor = oci.Descriptor(media_type, digest, len(data))
                    yield descriptor, self.image_of(descriptor)

    def _with_names(
        self,
        entries: list[Entry],
        taken: Mapping[str, str],
        image_id: str,
        names: Sequence[str],
        *,
        default: bool = True,
    ) -> list[Entry]:
        require_places(names, taken)
        wanted = list(dict.fromkeys(names))
        if default and DEFAULT_TAG not in taken and not _is_above(DEFAULT_TAG, (*taken, *wanted)):
            wanted.append(DEFAULT_TAG)
        for name in wanted:
            owner = taken.get(name)
            if owner == image_id:
                continue
            if owner is not None:
                entries = _without_name(entries, name)
            entries = _with_name(entries, image_id, name)
        return entries

    def _write_locked(self, catalog: Catalog, entries: Iterable[Entry]) -> None:
        document = {**catalog.document, "manifests": [entry.raw for entry in entries]}
        self._workspace.write_file(self._layout.index, oci.encode(document))


def _raw(descriptor: oci.Descriptor, image_id: str) -> dict[str, Any]:
    return {
        "mediaType": descriptor.media_type,
        "digest": descriptor.digest,
        "size": descriptor.size,
        "annotations": {ANNOTATION_ID: image_id},
    }


def _salvage(data: bytes) -> list[dict[str, Any]]:
    """The descriptors that are whole in a damaged index.json."""
    text, decoder = data.decode("utf-8", "replace"), json.JSONDecoder()
    found, start = [], text.find("{", 1)
    while start >= 0:
        try:
            _, end = decoder.raw_decode(text, start)
            # json takes more than what is JSON, and not all of that can be written again.
            raw = oci.parse_object(text[start:end].encode(), "index.json")
            oci.parse_descriptors({"manifests": [raw]}, "manifests", "index.json")
        except (ValueError, RecursionError, BadSource):
            end = start + 1
        else:
            found.append(raw)
        start = text.find("{", end)
    return found


def _begins_as_object(path: str) -> bool:
    """Not a layer: those are large."""
    with open(path, "rb", buffering=0) as file:
        return file.read(1) == b"{"


def _above(name: str | None, named: Container[str]) -> bool:
    """Whether a name is given that is a parent directory of `name`."""
    if name is None:
        return False
    parts = name.split("/")
    return any("/".join(parts[:count]) in named for count in range(1, len(parts)))


def _is_above(name: str, others: Iterable[str]) -> bool:
    return any(other.startswith(f"{name}/") for other in others)


def require_places(names: Iterable[str], taken: Iterable[str]) -> None:
    """Raises Exists if one of `names` would lie below or above another, also of `taken`."""
    beside = dict.fromkeys([*taken, *names], "")
    for name in names:
        _require_free(name, beside, "", replace_other=True)


def _require_free(name: str, names: Mapping[str, str], image_id: str, replace_other: bool) -> None:
    owner = names.get(name)
    if owner not in (None, image_id) and not replace_other:
        raise Exists(f"the image name {name!r} is taken: remove it first, or choose another")
    for other in names:
        if _is_above(name, [other]) or _is_above(other, [name]):
            raise Exists(
                f"an image cannot be called {name!r} beside one called {other!r}: choose another name"
            )


def _named(entry: Entry, name: str | None) -> Entry:
    annotations = {**entry.raw.get("annotations", {})}
    annotations.pop(ANNOTATION_NAME, None)
    if name is not None:
        annotations[ANNOTATION_NAME] = name
    return Entry({**entry.raw, "annotations": annotations}, entry.image_id, name)


def _with_name(entries: Sequence[Entry], image_id: str, name: str) -> list[Entry]:
    own = [number for number, entry in enumerate(entries) if entry.image_id == image_id]
    found = list(entries)
    unnamed = [number for number in own if entries[number].name is None]
    if unnamed:
        found[unnamed[0]] = _named(entries[unnamed[0]], name)
    else:
        found.insert(own[-1] + 1, _named(entries[own[-1]], name))
    return found


def _without_name(entries: Sequence[Entry], name: str) -> list[Entry]:
    """The entry goes if its image has another, else it stays without a name."""
    found = list(entries)
    for number in reversed(range(len(found))):
        if found[number].name == name:
            if sum(entry.image_id == found[number].image_id for entry in found) > 1:
                del found[number]
            else:
                found[number] = _named(found[number], None)
    return found


def _encode_record(image: Image) -> bytes:
    layers = [[layer.diff_id, layer.blob, layer.size, layer.media_type] for layer in image.layers]
    record = {
        "version": IMAGE_RECORD_VERSION,
        "manifest": image.manifest,
        "created": image.created,
        "architecture": image.architecture,
        "os": image.os,
        "layers": layers,
    }
    packed: bytes = msgpack.packb(record)
    return packed


def _decode_record(data: bytes, image_id: str) -> Image:
    """Raises StoreDamaged, whatever `data` is."""
    try:
        record = msgpack.unpackb(data)
        if record["version"] != IMAGE_RECORD_VERSION:
            raise ValueError("another version")
        texts = [record["created"], record["architecture"], record["os"]]
        layers = tuple(
            LayerRef(parse_digest(diff_id), parse_digest(blob), size, media_type)
            for diff_id, blob, size, media_type in record["layers"]
        )
        if not all(isinstance(text, str) for text in (*texts, *(layer.media_type for layer in layers))):
            raise ValueError("no text")
        if not all(isinstance(layer.size, int) and layer.size >= 0 for layer in layers):
            raise ValueError("no size")
        manifest = parse_digest(record["manifest"])
    except (ValueError, KeyError, TypeError, BadName, msgpack.UnpackException) as error:
        raise StoreDamaged(
            f"the record of image {image_id} is damaged: remove it, it is made again"
        ) from error
    created, architecture, os_name = texts
    return Image(image_id, (), manifest, layers, architecture, os_name, created)
