"""The verification of a whole store. Blocking; changes nothing: `fusestore.repair` does.

Two passes. Contents first, without any lock, since it takes long: every blob is read and hashed, every layer
decompressed to its diff_id and scanned, and the derived files, those of whole images too, compared with what
that gives. Then, with the
store's names locked, what points to what: index.json, names, documents, and what nothing points to.

Nothing is reported that does no harm: a derived file that is missing is made again, trash is emptied by the
next mount.
"""

import contextlib
import enum
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import BinaryIO

from . import oci
from .blobs import Ingested, derive
from .durable import is_damage, read_file
from .errors import BadName, BadSource, NotSupported, StoreDamaged, StoreError
from .images import Image, loose_parts
from .layer import LayerIndex
from .layerref import LayerRef, map_index
from .layout import Layout
from .lazylayer import open_source
from .metadataimage import write_metadata_image
from .names import is_hex_id, parse_container_id, parse_digest
from .nodes import Digest
from .scheme import RECORD, Scheme, bad_records
from .seek import SeekTable
from .store import Store

__all__ = ["Cure", "Finding", "check", "examine"]

_IMPORT_AGAIN = "import the image again"
_PULL_AGAIN = "pull the image again"
_MADE_AGAIN = "remove it, it is made again from the blob"
_REMADE = "remove it, it is made again"
_HYDRATE_AGAIN = "remove it, and run `fusestore hydrate` for its image"
_UNUSED = "remove it"
_SAVE = "save what you need from diff/ beside it, then delete the container"
_NOT_READ = "see to that, then check again"
_STRAY = "nothing of a store's"
_MOVE = "move it elsewhere"
_INDEX = "check --repair makes it again of what is left, or restore it from a backup"
_RECORD_REMEDY = "unmount, then check --repair"
_SHORTEN = "unmount, give directories above it shorter names, then check --repair"
_PATH_MAX = 4096
"""Bytes of a path that the kernel takes, with its NUL (limits.h)."""
_CHUNK = 1 << 20


class Cure(enum.Enum):
    """What can be done about a finding without losing anything."""

    BY_HAND = enum.auto()
    """Nothing: only its remedy helps."""
    DERIVE = enum.auto()
    """Make the derived file again."""
    SET_ASIDE = enum.auto()
    """Move it into the quarantine."""
    SET_CONTAINER_ASIDE = enum.auto()
    """Move the container whose document it is into the quarantine."""
    SET_RECORD_ASIDE = enum.auto()
    """Write the record of owner and mode of that file into the quarantine, and have it do without."""
    MAKE_DIRECTORY = enum.auto()
    POINT_NAME = enum.auto()
    """Have the name point to the container that carries it."""
    WRITE_OCI_LAYOUT = enum.auto()
    MAKE_INDEX = enum.auto()
    """Make index.json of what is left in it and of the images that are there."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it should be. `str()` is one line."""

    path: str
    problem: str
    remedy: str
    cure: Cure = Cure.BY_HAND

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}: {self.remedy}"


def check(store: Store, progress: Callable[[int, int], None] | None = None) -> list[Finding]:
    """What is wrong with `store`; nothing, if it is sound. `progress(done, total)`: bytes of blobs."""
    return examine(store, store.lock(), progress)


def examine(
    store: Store,
    lock: AbstractContextManager[object],
    progress: Callable[[int, int], None] | None = None,
) -> list[Finding]:
    """The same. Enters `lock` for the second pass: one that does nothing, if the caller has the store's."""
    layout = Layout(store.path)
    try:
        images = store.images()
    except StoreDamaged as error:
        cause = error.__cause__
        problem = f"is damaged ({cause.strerror})" if isinstance(cause, OSError) else "is damaged"
        return [Finding(layout.index, problem, _INDEX, Cure.MAKE_INDEX)]
    layers = list({(layer.diff_id, layer.blob): layer for image in images for layer in image.layers}.values())
    layer_blobs = {layer.blob for layer in layers}
    others = [digest for digest in _stored_blobs(layout) if digest not in layer_blobs]
    diff_ids = {layer.diff_id for layer in layers}
    sizes = [layer.size for layer in layers]
    sizes += [_size(layout.blob(digest)) for digest in others]
    sizes += [_size(layout.tar(diff_id)) for diff_id in diff_ids]
    total, done = sum(sizes), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(min(done, total), total)

    content = [finding for layer in layers for finding in _check_layer(layout, layer, advance)]
    content += [finding for digest in others for finding in _check_blob(layout, digest, advance)]
    content += [finding for diff_id in diff_ids for finding in _check_tar(layout, diff_id, advance)]
    wrong = {finding.path for finding in content}
    content += [finding for image in images for finding in _check_metadata_image(store, layout, image, wrong)]
    content += _check_uppers(store, layout)
    with lock:
        # What was deleted meanwhile is no finding.
        content = [finding for finding in content if _is_there(finding.path)]
        structure = [
            *_check_images(store, layout),
            *_check_unused(store, layout),
            *_check_containers(store, layout),
            *_check_strays(layout),
        ]
    return content + structure


def _is_there(path: str) -> bool:
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        pass  # longer than the kernel takes
    return True


def _stored_blobs(layout: Layout) -> list[Digest]:
    found = []
    for name in os.listdir(layout.blobs):
        with contextlib.suppress(BadName):
            found.append(parse_digest(f"sha256:{name}"))
    return found


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


# Contents


def _check_blob(layout: Layout, digest: Digest, advance: Callable[[int], None]) -> Iterator[Finding]:
    yield from _check_digest(layout.blob(digest), digest, _IMPORT_AGAIN, advance)


def _check_tar(layout: Layout, diff_id: Digest, advance: Callable[[int], None]) -> Iterator[Finding]:
    path = layout.tar(diff_id)
    if os.path.lexists(path):
        yield from _check_digest(path, diff_id, _HYDRATE_AGAIN, advance)


def _check_digest(
    path: str, digest: Digest, remedy: str, advance: Callable[[int], None]
) -> Iterator[Finding]:
    try:
        with open(path, "rb", buffering=0) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        yield _unread(path, error, remedy, Cure.SET_ASIDE)
        return
    if f"sha256:{found}" != digest:
        yield Finding(path, "the content has another digest", remedy, Cure.SET_ASIDE)
    advance(_size(path))


def _unread(path: str, error: OSError, remedy: str, cure: Cure) -> Finding:
    """`remedy` and `cure` are those of a file which is damaged."""
    problem = f"cannot be read ({error.strerror})"
    return Finding(path, problem, remedy, cure) if is_damage(error) else Finding(path, problem, _NOT_READ)


def _check_layer(layout: Layout, layer: LayerRef, advance: Callable[[int], None]) -> Iterator[Finding]:
    path = layout.blob(layer.blob)
    try:
        made = derive(path, blob=layer.blob, diff_id=layer.diff_id, progress=advance)
    except OSError as error:
        yield _unread(path, error, _IMPORT_AGAIN, Cure.SET_ASIDE)
        return
    except StoreDamaged as error:
        # A blob that is missing altogether is found with its image.
        yield Finding(path, f"is damaged ({error.__cause__})", _IMPORT_AGAIN, Cure.SET_ASIDE)
        return
    yield from _check_index(layout.layer_index(layer.diff_id), made)
    yield from _check_table(layout.seek_table(layer.diff_id, layer.blob), made)


def _check_index(path: str, made: Ingested) -> Iterator[Finding]:
    try:
        with open(path, "rb") as file:
            if file.read() == made.index:
                return
        # Another version of zstd packs the same index into other bytes.
        if not _is_same(map_index(path), LayerIndex(made.index)):
            yield Finding(path, "is of another layer", _MADE_AGAIN, Cure.DERIVE)
    except FileNotFoundError:
        return
    except OSError as error:
        yield _unread(path, error, _MADE_AGAIN, Cure.DERIVE)
    except StoreDamaged:
        yield Finding(path, "is damaged", _MADE_AGAIN, Cure.DERIVE)


def _is_same(found: LayerIndex, expected: LayerIndex) -> bool:
    """Compares the trees, and so reads all of both. Raises StoreDamaged."""
    if (found.tar_size, len(found)) != (expected.tar_size, len(expected)):
        return False
    pending = [LayerIndex.ROOT]
    while pending:
        directory = pending.pop()
        children = expected.children(directory)
        if found.children(directory) != children:
            return False
        for _, ino in children:
            if _facts(found, ino) != _facts(expected, ino):
                return False
            if stat.S_ISDIR(expected.mode(ino)):
                pending.append(ino)
    return True


def _facts(index: LayerIndex, ino: int) -> tuple[object, ...]:
    attr = index.attr(ino)
    has_target = stat.S_ISLNK(attr.mode) or index.is_lower_link(ino)
    content = index.target(ino) if has_target else index.extents(ino) if stat.S_ISREG(attr.mode) else None
    return attr, index.is_opaque(ino), index.is_lower_link(ino), index.xattrs(ino), content


def _check_table(path: str, made: Ingested) -> Iterator[Finding]:
    try:
        with open(path, "rb") as file:
            if file.read() == made.seek:
                return
        SeekTable(path, made.tar_size).close()
    except FileNotFoundError:
        return
    except OSError as error:
        yield _unread(path, error, _MADE_AGAIN, Cure.DERIVE)
    except StoreDamaged:
        yield Finding(path, "is damaged", _MADE_AGAIN, Cure.DERIVE)


def _check_metadata_image(store: Store, layout: Layout, image: Image, wrong: set[str]) -> Iterator[Finding]:
    """`wrong`: what has a finding already; of layers that do nothing can be made to compare with."""
    path = layout.metadata_image(image.id)
    needed = [layout.blob(layer.blob) for layer in image.layers]
    for layer in image.layers:
        needed.append(layout.layer_index(layer.diff_id))
        needed.append(layout.seek_table(layer.diff_id, layer.blob))
    if wrong.intersection(needed) or not all(map(os.path.exists, [path, *needed])):
        return
    try:
        with open(path, "rb") as file, tempfile.TemporaryFile() as made:
            write_metadata_image(store.open_layers(image), os.dup(made.fileno()))
            made.seek(0)
            if not _has_same(file, made):
                yield Finding(path, "is damaged", _REMADE, Cure.SET_ASIDE)
    except NotSupported:
        yield Finding(path, "is of another image", _REMADE, Cure.SET_ASIDE)  # this one has none
    except (FileNotFoundError, StoreDamaged):
        return  # deleted just now
    except OSError as error:
        yield _unread(path, error, _REMADE, Cure.SET_ASIDE)


def _has_same(file: BinaryIO, other: BinaryIO) -> bool:
    """Reads both to their ends, or to where they differ."""
    while (data := file.read(_CHUNK)) == other.read(_CHUNK):
        if not data:
            return True
    return False


def _check_uppers(store: Store, layout: Layout) -> Iterator[Finding]:
    """What a plain user's containers say of owners and modes."""
    try:
        scheme = read_file(layout.scheme, 64).decode("ascii", "replace").strip()
    except OSError:
        return  # not mounted yet: there is none
    if scheme != Scheme.PLAIN.word:
        return
    for container_id in sorted(store.container_ids()):
        for root in (layout.upper(container_id), layout.workdir(container_id)):
            try:
                for path in bad_records(root):
                    problem = f"its xattr {RECORD.decode()} is damaged"
                    if len(os.fsencode(path)) < _PATH_MAX:
                        yield Finding(path, problem, _RECORD_REMEDY, Cure.SET_RECORD_ASIDE)
                    else:
                        yield Finding(path, problem, _SHORTEN)
            except OSError as error:
                yield Finding(root, f"cannot be read ({error.strerror})", _NOT_READ)


# What points to what


def _check_images(store: Store, layout: Layout) -> Iterator[Finding]:
    try:
        version = oci.parse_object(read_file(layout.oci_layout, oci.DOCUMENT_MAX), "oci-layout").get(
            "imageLayoutVersion"
        )
    except (OSError, BadSource):
        version = None
    if not isinstance(version, str):
        remedy = 'write {"imageLayoutVersion":"1.0.0"} into it'
        yield Finding(layout.oci_layout, "is missing or damaged", remedy, Cure.WRITE_OCI_LAYOUT)
    for entry in store.image_entries():
        if entry.image_id is None:
            yield Finding(
                layout.index,
                entry.problem.removesuffix(f": {_IMPORT_AGAIN}"),
                "remove its entry, or import the image again",
                # What is an entry stays: its blobs may come back.
                Cure.BY_HAND if entry.raw else Cure.MAKE_INDEX,
            )
    for image in store.images():
        yield from _check_image(store, layout, image)


def _check_image(store: Store, layout: Layout, image: Image) -> Iterator[Finding]:
    known = f"of image {image.id[:12]}"
    for digest, what in ((image.manifest, "manifest"), (image.config, "config")):
        if not os.path.exists(layout.blob(digest)):
            yield Finding(layout.blob(digest), f"the {what} {known} is missing", _IMPORT_AGAIN)
    for layer in dict.fromkeys(image.layers):
        path = layout.blob(layer.blob)
        if store.is_lazy(layer):
            yield from _check_lazy(layout, layer)
        elif not os.path.exists(path):
            yield Finding(path, f"a layer {known} is missing", _IMPORT_AGAIN)
        elif _size(path) != layer.size:
            yield Finding(path, f"a layer {known} has {_size(path)} bytes, not {layer.size}", _IMPORT_AGAIN)
    try:
        described = store.describe_image(image)
    except (BadSource, StoreError, OSError):
        return  # its blobs are found above, or by their digests
    if described != image:
        path = layout.image_record(image.id)
        yield Finding(path, "contradicts the manifest", _REMADE, Cure.SET_ASIDE)


def _check_lazy(layout: Layout, layer: LayerRef) -> Iterator[Finding]:
    """Of a layer that is read in parts; these are compared with their digests whenever they are read."""
    path = layout.lazy(layer.diff_id, layer.blob)
    try:
        index = map_index(layout.lazy_index_in(path))
        _is_same(index, index)
        open_source(layout, layer)
    except FileNotFoundError as error:
        if os.path.exists(path):
            yield Finding(path, f"is damaged ({error.filename} is missing)", _PULL_AGAIN, Cure.SET_ASIDE)
    except OSError as error:
        yield _unread(path, error, _PULL_AGAIN, Cure.SET_ASIDE)
    except StoreDamaged:
        yield Finding(path, "is damaged", _PULL_AGAIN, Cure.SET_ASIDE)


def _check_unused(store: Store, layout: Layout) -> Iterator[Finding]:
    entries = store.image_entries()
    if any(entry.image_id is None for entry in entries):
        return  # that entry may be what uses it
    parts = [loose_parts(image) for image in store.images()]
    blobs = {blob for part in parts for blob in part["blobs"]} | {entry.raw["digest"] for entry in entries}
    diff_ids = {diff_id for part in parts for diff_id in part["layers"]}
    for directory, used in (
        (layout.blobs, {digest.partition(":")[2] for digest in blobs}),
        (layout.layers, {digest.partition(":")[2] for digest in diff_ids}),
        (layout.images, set(store.image_ids())),
    ):
        for name in sorted(set(os.listdir(directory)) - used):
            yield Finding(f"{directory}/{name}", "no image needs it", _UNUSED, Cure.SET_ASIDE)


def _check_containers(store: Store, layout: Layout) -> Iterator[Finding]:
    names = {}
    images = set(store.image_ids())
    for container_id in sorted(store.container_ids()):
        path = layout.document(container_id)
        if not _is_container(layout, container_id):
            continue  # a stray, or deleted just now
        for part in (layout.work(container_id), layout.workdir(container_id)):
            if not os.path.isdir(part):
                yield Finding(part, "the directory is missing", "make it, empty", Cure.MAKE_DIRECTORY)
        try:
            found = store.container(container_id)
        except OSError as error:
            yield _unread(path, error, _SAVE, Cure.SET_CONTAINER_ASIDE)
            continue
        except StoreDamaged as error:
            problem = str(error).removeprefix(f"{path} ").rpartition(": ")[0]
            yield Finding(path, problem, _SAVE, Cure.SET_CONTAINER_ASIDE)
            continue
        if found.image_id and found.image_id not in images:
            known = found.image_name or found.image_id[:12]
            yield Finding(
                path, f"its image {known} is missing", "import the image again, or delete the container"
            )
        if found.name != container_id:
            names[found.name] = container_id
    links = {name: _target(layout, name) for name in os.listdir(layout.names)}
    for name in sorted(names.keys() - links.keys()):
        problem = f"the name of container {names[name]} is missing"
        yield Finding(layout.name(name), problem, "rename the container", Cure.POINT_NAME)
    for name, target in sorted(links.items()):
        if names.get(name) != target:
            problem = f"{target or 'what it points to'} is not called so"
            yield Finding(layout.name(name), problem, _UNUSED, Cure.SET_ASIDE)


def _check_strays(layout: Layout) -> Iterator[Finding]:
    """What nobody made who keeps to the format, outside of what is the users'."""
    places: list[tuple[str, Callable[[str], bool]]] = [(layout.root, layout.is_at_root)]
    places += [(path, layout.is_in_layer) for path in _directories(layout.layers)]
    places += [(path, layout.is_in_image) for path in _directories(layout.images)]
    places += [(path, layout.is_in_container) for path in _directories(layout.containers)]
    if os.path.isdir(layout.downloads):
        places.append((layout.downloads, is_hex_id))
    for directory, is_known in places:
        for name in sorted(os.listdir(directory)):
            if not is_known(name):
                yield Finding(f"{directory}/{name}", _STRAY, _MOVE, Cure.SET_ASIDE)
    for name in sorted(os.listdir(layout.containers)):
        if not _is_container(layout, name):
            yield Finding(layout.container(name), _STRAY, _MOVE, Cure.SET_ASIDE)


def _directories(parent: str) -> list[str]:
    with os.scandir(parent) as entries:
        return sorted(entry.path for entry in entries if entry.is_dir(follow_symlinks=False))


def _is_container(layout: Layout, name: str) -> bool:
    try:
        parse_container_id(name)
    except BadName:
        return False
    path = layout.container(name)
    return os.path.isdir(path) and not os.path.islink(path)


def _target(layout: Layout, name: str) -> str:
    """The id a name points to, "" for what is no such link."""
    try:
        target = os.readlink(layout.name(name))
    except OSError:
        return ""
    container_id = os.path.basename(target)
    return container_id if target == layout.name_target(container_id) else ""
