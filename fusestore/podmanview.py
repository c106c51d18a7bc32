"""/views/podman: the store's images as a read-only additional image store of podman and its kin. Blocking.

The files are those that containers/storage reads in a directory named as ``additionalimagestores``
(containers/storage: store.go, layers.go, images.go, drivers/overlay/overlay.go)::

    overlay-images/images.lock          64 bytes that change whenever images.json or layers.json does:
    overlay-layers/layers.lock          a process that lives long reads them again then
    overlay-images/images.json
    overlay-images/<image id>/manifest, =<base64 of manifest-sha256:…>, =<base64 of sha256:…>
    overlay-layers/layers.json
    overlay-layers/<layer id>.tar-split.gz
    overlay/<layer id>/diff             the layer alone, as `RootfsDriver.layer_rootfs` shows it
    overlay/<layer id>/link, lower      its short name; those of the layers below it
    overlay/l/<short name>              a symlink to ../<layer id>/diff

A layer's id is the one that podman's own pulls give it: it says all that lies below too, so that images share
layers. Its short name depends on the id alone, for podman writes it into the containers that it makes.

All is made of one catalog of the store (`_Contents`), anew whenever that changed. A document that may change
is a node of its own in each version, as the kernel keeps the size of a file it knows.
"""

import base64
import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from . import errors
from .inodes import Branch, Caller, FileHandle, Inodes, Maybe, Node, Remote, Steps
from .names import digest_hex
from .nodes import Attr, Inode
from .oci import parse_time_ns, time_text
from .store import Catalog, Image, Layer, LayerRef, Store
from .synthetic import (
    MANY_LINKS,
    SHARED_S,
    BytesHandle,
    NameLink,
    Owner,
    RootfsBranch,
    RootfsDriver,
    Unreadable,
)
from .tarsplit import TarSplit

__all__ = ["PodmanView", "layer_ids", "podman_names"]

_log = logging.getLogger(__name__)

_LINK_LENGTH = 12
"""Characters of a layer's short name, of 6 bits: 100 of them after a mount point have to fit in a page."""

_IMAGES, _LAYERS, _OVERLAY, _LINKS = "overlay-images", "overlay-layers", "overlay", "overlay/l"
_DIFF = "diff"
_TAR_SPLIT = ".tar-split.gz"

_HOST = r"(?:localhost(?=[:/])|[a-zA-Z0-9-]+(?:\.[a-zA-Z0-9-]+)+|[a-zA-Z0-9-]+(?=:[0-9]))(?::[0-9]+)?"
_PATH = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_REFERENCE = re.compile(rf"(?:({_HOST})/)?({_PATH}(?:/{_PATH})*)(?::(\w[\w.-]{{0,127}}))?", re.ASCII)
"""distribution/reference: a name with a tag. What is no such name podman cannot be told."""


def layer_ids(image: Image) -> list[str]:
    """The ids that containers/image gives the layers, bottom first (storage_dest.go)."""
    ids: list[str] = []
    for layer in image.layers:
        digits = digest_hex(layer.diff_id)
        ids.append(hashlib.sha256(f"{ids[-1]}+{digits}".encode()).hexdigest() if ids else digits)
    return ids


def podman_names(names: Mapping[str, str]) -> dict[str, str]:
    """The names of `names` {name: id} as podman spells them.

    One without a registry is in localhost/, one without a tag is tagged latest. A name that is spelt so gets
    it before others that would be. None of them twice: podman refuses a store that has that.
    """
    found: dict[str, str] = {}
    for exact in (True, False):
        for name, image_id in names.items():
            match = _REFERENCE.fullmatch(name)
            if match is not None:
                host, path, tag = match.groups()
                spelt = f"{host or 'localhost'}/{path}:{tag or 'latest'}"
                if (spelt == name) is exact:
                    found.setdefault(spelt, image_id)
    return found


@dataclass(frozen=True, slots=True)
class _LayerEntry:
    """A layer, by one of the images that have it."""

    image: Image
    number: int
    link: str
    lower: str
    parent: str

    @property
    def ref(self) -> LayerRef:
        return self.image.layers[self.number]


class _Contents:
    """What is there, of one catalog."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.images = catalog.images
        self.layers: dict[str, _LayerEntry] = {}
        """By id, each after the one below it."""
        self.links: dict[str, str] = {}
        """short name → layer id."""
        for image in catalog.images.values():
            self._add(image)
        self._fixed: dict[str, Mapping[str, object]] = {
            "": dict.fromkeys((_IMAGES, _LAYERS, _OVERLAY)),
            _IMAGES: {"images.lock": None, "images.json": None, **self.images},
            _LAYERS: {"layers.lock": None, "layers.json": None,
                      **{f"{layer_id}{_TAR_SPLIT}": None for layer_id in self.layers}},
            _OVERLAY: {"l": None, **self.layers},
            _LINKS: self.links,
        }  # fmt: skip

    def names(self, directory: str) -> Collection[str]:
        """Of what is in a directory. Raises Stale where that is gone."""
        head, _, name = directory.rpartition("/")
        if directory in self._fixed:
            return self._fixed[directory]
        if head == _IMAGES and name in self.images:
            return _big_data_names(self.images[name])
        if head == _OVERLAY and name in self.layers:
            return (_DIFF, "link", "lower") if self.layers[name].parent else (_DIFF, "link")
        raise errors.Stale(f"views/podman/{directory} is of an image that was deleted")

    def _add(self, image: Image) -> None:
        ids = layer_ids(image)
        links = [_link_name(layer_id) for layer_id in ids]
        for number, layer_id in enumerate(ids):
            if layer_id not in self.layers:
                lower = ":".join(f"l/{link}" for link in reversed(links[:number]))
                parent = ids[number - 1] if number else ""
                self.layers[layer_id] = _LayerEntry(image, number, links[number], lower, parent)
                self.links[links[number]] = layer_id


class _Documents(NamedTuple):
    contents: _Contents
    """What they are made of."""
    images: bytes
    layers: bytes
    is_final: bool
    """Not, as long as the size of a layer is not known: of a lazy one, or one without an index."""


def _link_name(layer_id: str) -> str:
    return base64.urlsafe_b64encode(bytes.fromhex(layer_id))[:_LINK_LENGTH].decode()


class _Dir(Node):
    """A directory, by its path below the view."""

    __slots__ = ("path",)

    entry_timeout_s = SHARED_S
    attr_timeout_s = SHARED_S

    def __init__(self, branch: Branch, ino: Inode, path: str) -> None:
        super().__init__(branch, ino)
        self.path = path


class _File(Node):
    """A file whose content is at hand, in one version."""

    __slots__ = ("data", "directory")

    entry_timeout_s = 0.0

    def __init__(self, branch: Branch, ino: Inode, directory: _Dir, data: bytes) -> None:
        super().__init__(branch, ino)
        self.directory = directory
        self.data = data


class _TarSplitFile(Node):
    __slots__ = ("directory", "layer", "size")

    entry_timeout_s = SHARED_S

    def __init__(self, branch: Branch, ino: Inode, directory: _Dir, layer: Layer) -> None:
        super().__init__(branch, ino)
        self.directory = directory
        self.layer = layer
        self.size = TarSplit.size(layer.reader.size)


class _TarSplitHandle(FileHandle):
    __slots__ = ("_file",)

    def __init__(self, file: _TarSplitFile) -> None:
        super().__init__(file)
        reader = file.layer.reader
        self._file = TarSplit(reader.size, reader.read)

    def read(self, offset: int, size: int) -> Steps[bytes]:
        data: bytes = yield lambda: self._file.read(offset, size)
        return data


class PodmanView(Branch):
    """Touched by the event loop's thread only."""

    def __init__(
        self, store: Store, inodes: Inodes, driver: RootfsDriver, owner: Owner, parent: Node
    ) -> None:
        """`parent` is what '..' of /views/podman is."""
        self._store = store
        self._inodes = inodes
        self._driver = driver
        self._owner = owner
        self._parent = parent
        self._nodes: WeakValueDictionary[str, Node] = WeakValueDictionary()
        """By path."""
        self._trees: WeakValueDictionary[str, RootfsBranch] = WeakValueDictionary()
        """By layer id."""
        self._latest: _Contents | None = None
        self._documents: _Documents | None = None
        self.root = _Dir(self, inodes.number(), "")
        self._nodes[""] = self.root

    def _contents(self) -> _Contents:
        catalog = self._store.catalog()
        if self._latest is None or self._latest.catalog is not catalog:
            self._latest = _Contents(catalog)
        return self._latest

    # Looking

    def lookup(self, node: Node, name: bytes) -> Maybe[Node]:
        if not isinstance(node, _Dir):
            raise errors.NotADirectory("not a directory")
        contents, text = self._contents(), os.fsdecode(name)
        if text not in contents.names(node.path):
            raise errors.NotFound(f"there is no {name!r}")
        return self._found(contents, node, _join(node.path, text))

    def _found(self, contents: _Contents, directory: _Dir, path: str) -> Maybe[Node]:
        """What is at `path`, a name in `directory` that `_names` has."""
        parent, name = directory.path, path.rpartition("/")[2]
        if not parent or (parent in (_IMAGES, _OVERLAY) and "." not in name):
            return self._node(path, lambda ino: _Dir(self, ino, path))
        if name.endswith((".lock", ".json")):
            return self._document(contents, directory, path)
        if parent == _LINKS:
            target = f"../{contents.links[name]}/{_DIFF}".encode()
            return self._node(path, lambda ino: NameLink(self, ino, directory, target))
        if parent == _LAYERS:
            return self._tar_split(contents.layers[name.removesuffix(_TAR_SPLIT)], directory, path)
        owner = parent.rpartition("/")[2]
        if parent.startswith(f"{_IMAGES}/"):
            return self._big_data(contents.images[owner], directory, path)
        layer = contents.layers[owner]
        if name == _DIFF:
            return self._diff(owner, layer, directory)
        return self._file(directory, path, (layer.link if name == "link" else layer.lower).encode())

    def _node(self, path: str, make: Callable[[Inode], Node]) -> Node:
        found = self._nodes.get(path)
        if found is None:
            found = self._nodes[path] = make(self._inodes.number())
        return found

    def _file(self, directory: _Dir, path: str, data: bytes) -> Node:
        known = self._nodes.get(path)
        if not isinstance(known, _File) or known.data != data:
            known = self._nodes[path] = _File(self, self._inodes.number(), directory, data)
        return known

    def _document(self, contents: _Contents, directory: _Dir, path: str) -> Steps[Node]:
        found = self._documents
        if found is None or found.contents is not contents or not found.is_final:
            found = self._documents = yield lambda: self._make_documents(contents)
        if path.endswith(".lock"):
            return self._file(
                directory, path, hashlib.sha256(found.images + found.layers).hexdigest().encode()
            )
        return self._file(directory, path, found.images if directory.path == _IMAGES else found.layers)

    def _big_data(self, image: Image, directory: _Dir, path: str) -> Steps[Node]:
        is_config = path.endswith(_big_data_names(image)[-1])
        data = yield lambda: self._store.config(image) if is_config else self._store.manifest(image)
        return self._file(directory, path, data)

    def _tar_split(self, layer: _LayerEntry, directory: _Dir, path: str) -> Maybe[Node]:
        known = self._nodes.get(path)
        return self._made_tar_split(layer, directory, path) if known is None else known

    def _made_tar_split(self, layer: _LayerEntry, directory: _Dir, path: str) -> Steps[Node]:
        opened = yield Remote(lambda: self._store.open_layers(layer.image, is_whole=True))
        return self._node(path, lambda ino: _TarSplitFile(self, ino, directory, opened[layer.number]))

    def _diff(self, layer_id: str, layer: _LayerEntry, directory: _Dir) -> Node:
        known = self._trees.get(layer_id)
        if known is None:
            known = self._driver.layer_rootfs(layer.image, layer.number, directory)
            self._trees[layer_id] = known
        return known.root

    def parent(self, node: Node) -> Node:
        if node is self.root:
            return self._parent
        if isinstance(node, (_File, _TarSplitFile, NameLink)):
            return node.directory
        assert isinstance(node, _Dir)
        above = node.path.rpartition("/")[0]
        return self._node(above, lambda ino: _Dir(self, ino, above))

    def path(self, node: Node) -> bytes:
        return f"views/podman/{node.path}".rstrip("/").encode() if isinstance(node, _Dir) else b""

    # Listing

    def listing(self, node: Node) -> list[tuple[bytes, Any]]:
        if not isinstance(node, _Dir):
            raise errors.NotADirectory("not a directory")
        contents = self._contents()
        return [(name.encode(), contents) for name in contents.names(node.path)]

    def listed(self, node: Node, name: bytes, token: _Contents) -> Node:
        assert isinstance(node, _Dir)
        found = self._found(token, node, _join(node.path, name.decode()))
        # What takes steps is looked up when somebody wants more of it than its name.
        return found if isinstance(found, Node) else Unreadable(self._inodes.number(), stat.S_IFREG)

    # What is there

    def attr(self, node: Node) -> Attr:
        mtime_ns = self._store.images_changed_ns()
        if isinstance(node, _File):
            return self._owner.file(len(node.data), mtime_ns)
        if isinstance(node, _TarSplitFile):
            return self._owner.file(node.size, mtime_ns)
        if isinstance(node, NameLink):
            return self._owner.link(node.target, mtime_ns)
        return self._owner.directory(mtime_ns, MANY_LINKS, 0o555)

    def readlink(self, node: Node) -> bytes:
        if not isinstance(node, NameLink):
            raise errors.BadInput("not a symbolic link")
        return node.target

    def open(self, node: Node, flags: int, caller: Caller) -> FileHandle:
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            raise errors.ReadOnly("views/podman is read-only")
        if isinstance(node, _File):
            return BytesHandle(node, node.data)
        if isinstance(node, _TarSplitFile):
            return _TarSplitHandle(node)
        raise errors.IsADirectory("is a directory")

    # Documents. In a worker thread: they only read the store

    def _make_documents(self, contents: _Contents) -> _Documents:
        names: dict[str, list[str]] = {}
        for name, image_id in podman_names(contents.catalog.names).items():
            names.setdefault(image_id, []).append(name)
        images = []
        for image in contents.images.values():
            try:
                images.append(self._image_document(image, names.get(image.id, [])))
            except FileNotFoundError as error:
                _log.warning("views/podman has no image %s: %s is missing", image.id, error.filename)
        sizes = {layer.ref: self._store.layer_tar_size(layer.ref) for layer in contents.layers.values()}
        layers = [self._layer_document(*item, sizes[item[1].ref]) for item in contents.layers.items()]
        return _Documents(
            contents, json.dumps(images).encode(), json.dumps(layers).encode(), -1 not in sizes.values()
        )

    def _image_document(self, image: Image, names: list[str]) -> dict[str, Any]:
        blobs = {"manifest": image.manifest, f"manifest-{image.manifest}": image.manifest,
                 image.config: image.config}  # fmt: skip
        return {
            "id": image.id,
            "digest": image.manifest,
            "names": names,
            "layer": (layer_ids(image) or [""])[-1],
            "metadata": "{}",
            "created": time_text(parse_time_ns(image.created)),
            "big-data-names": list(blobs),
            "big-data-sizes": {
                name: os.stat(self._store.blob_path(digest)).st_size for name, digest in blobs.items()
            },
            "big-data-digests": blobs,
        }

    def _layer_document(self, layer_id: str, layer: _LayerEntry, tar_size: int) -> dict[str, Any]:
        ref = layer.ref
        compression = 0 if not ref.is_compressed else 4 if ref.media_type.endswith("zstd") else 2
        return {
            "id": layer_id,
            "parent": layer.parent,
            "created": time_text(parse_time_ns(layer.image.created)),
            "compressed-diff-digest": ref.blob,
            "compressed-size": ref.size,
            "diff-digest": ref.diff_id,
            # podman lists no image at all where it does not know the size of a layer.
            "diff-size": ref.size if tar_size < 0 else tar_size,
            "compression": compression,
        }


def _big_data_names(image: Image) -> tuple[str, ...]:
    """The files of an image: manifest, the same by its digest, config."""

    def coded(name: str) -> str:
        return "=" + base64.b64encode(name.encode()).decode()

    return ("manifest", coded(f"manifest-{image.manifest}"), coded(image.config))


def _join(directory: str, name: str) -> str:
    return f"{directory}/{name}" if directory else name
