"""/images: the images as directories, their names as links, tagging and deleting. Blocking.

Content is read-only (EROFS); names are links that can be made, moved and removed (design.md section 2).
Names and ids are asked of the store at each lookup, since others tag and import in the same store; what
lies inside an image never changes, but for metadata.json, which lists the names: each version of it is a
node of its own, because the kernel keeps the size of a file it knows.

The rule a maintainer must not break: what needs the layers opened (sizes of tars) goes through steps.
"""

import contextlib
import os
import re
import stat
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

from . import errors, oci
from .inodes import Branch, Caller, FileHandle, Inodes, Maybe, Node, Remote, Steps
from .names import is_hex_id, parse_image_name
from .nodes import Attr, Inode
from .store import Image, Layer, LayerRef, Store
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
from .syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE

__all__ = ["BlobHandle", "ImageTree", "open_fetched"]

_MADE_MAX = 64
"""Directories that hold no name yet: a daemon's memory is what they take, and ``cp -r`` makes any number."""

_METADATA = b"metadata.json"
_DOCUMENTS = (b"manifest.json", b"config.json")
_IMAGE_NAMES = (*_DOCUMENTS, _METADATA, b"rootfs", b"layers")
_LAYER_NAMES = (b"rootfs", b"blob", b"tar")


class _NameDir(Node):
    """/images itself (prefix ""), or a directory that the slashes in names make (prefix "localhost/")."""

    __slots__ = ("prefix",)

    entry_timeout_s = 0.0
    attr_timeout_s = SHARED_S

    def __init__(self, branch: Branch, ino: Inode, prefix: str) -> None:
        super().__init__(branch, ino)
        self.prefix = prefix


class _ImageDir(Node):
    """/images/<id>."""

    __slots__ = ("children", "image", "layers", "metadata", "mtime_ns", "rootfs")

    entry_timeout_s = SHARED_S

    def __init__(self, branch: Branch, ino: Inode, image: Image) -> None:
        super().__init__(branch, ino)
        self.image = image
        self.mtime_ns = oci.parse_time_ns(image.created)
        self.children: dict[bytes, Node] = {}
        """By path below this directory; all that was made so far and never changes."""
        self.metadata: _Document | None = None
        self.layers: dict[int, Layer] = {}
        """By number, as far as something needed them open."""
        self.rootfs: list[RootfsBranch] = []
        """What the driver made for this image and its layers."""


class _Inner(Node):
    """Something inside an image."""

    __slots__ = ("directory", "image")

    def __init__(self, branch: Branch, ino: Inode, image: _ImageDir, directory: Node) -> None:
        super().__init__(branch, ino)
        self.image = image
        self.directory = directory


class _LayersDir(_Inner):
    __slots__ = ()


class _LayerDir(_Inner):
    __slots__ = ("number",)

    def __init__(self, branch: Branch, ino: Inode, image: _ImageDir, directory: Node, number: int) -> None:
        super().__init__(branch, ino, image, directory)
        self.number = number


class _Document(_Inner):
    """A file whose content is at hand."""

    __slots__ = ("data",)

    def __init__(self, branch: Branch, ino: Inode, image: _ImageDir, data: bytes) -> None:
        super().__init__(branch, ino, image, image)
        self.data = data


class _Metadata(_Document):
    __slots__ = ()

    entry_timeout_s = 0.0
    attr_timeout_s = 0.0


class _Blob(_Inner):
    """A layer as it is stored."""

    __slots__ = ("path", "ref", "size")

    def __init__(
        self, branch: Branch, ino: Inode, image: _ImageDir, directory: Node, path: str, ref: LayerRef
    ) -> None:
        super().__init__(branch, ino, image, directory)
        self.path = path
        self.ref = ref
        self.size = ref.size


class _Tar(_Inner):
    """A layer as the tar it is when uncompressed."""

    __slots__ = ("layer", "size")

    def __init__(self, branch: Branch, ino: Inode, image: _ImageDir, directory: Node, layer: Layer) -> None:
        super().__init__(branch, ino, image, directory)
        self.layer = layer
        self.size = layer.reader.size


class BlobHandle(FileHandle):
    """A blob of the store as an open file."""

    __slots__ = ("_fd", "_path", "_size")

    def __init__(self, node: Node, path: str, size: int) -> None:
        """`size` is what `node` says. Raises StoreDamaged if there is no file at `path`."""
        super().__init__(node)
        self._path = path
        self._size = size
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise errors.StoreDamaged(f"{path} is missing: import the image again") from None

    def read(self, offset: int, size: int) -> bytes:
        size = max(0, min(size, self._size - offset))
        data = os.pread(self._fd, size, offset)
        if len(data) < size:
            raise errors.StoreDamaged(f"{self._path} is cut short: import the image again")
        return data

    def close(self) -> None:
        os.close(self._fd)


def open_fetched(store: Store, ref: LayerRef, make: Callable[[], BlobHandle]) -> Maybe[FileHandle]:
    """What `make` opens, a layer's blob, fetched first where that is still to be done."""
    return make() if os.path.exists(store.blob_path(ref.blob)) else _open_lazy(store, ref, make)


def _open_lazy(store: Store, ref: LayerRef, make: Callable[[], BlobHandle]) -> Steps[FileHandle]:
    yield Remote(lambda: store.complete_layer(ref))
    return make()


class _TarHandle(FileHandle):
    __slots__ = ("_reader",)

    def __init__(self, tar: _Tar) -> None:
        super().__init__(tar)
        self._reader = tar.layer.reader

    def read(self, offset: int, size: int) -> Maybe[bytes]:
        data = self._reader.read_now(offset, size)
        return self._decode(offset, size) if data is None else data

    def _decode(self, offset: int, size: int) -> Steps[bytes]:
        data: bytes = yield lambda: self._reader.read(offset, size)
        return data


class ImageTree(Branch):
    """Touched by the event loop's thread only."""

    def __init__(
        self, store: Store, inodes: Inodes, driver: RootfsDriver, owner: Owner, parent: Node
    ) -> None:
        """`parent` is what '..' of /images is."""
        self._store = store
        self._inodes = inodes
        self._driver = driver
        self._owner = owner
        self._parent = parent
        self._images: WeakValueDictionary[str, _ImageDir] = WeakValueDictionary()
        self._name_dirs: WeakValueDictionary[str, _NameDir] = WeakValueDictionary()
        self._links: WeakValueDictionary[str, NameLink] = WeakValueDictionary()
        self._made: set[str] = set()
        """Prefixes that mkdir made, until there is a name below."""
        self._emptied: set[str] = set()
        """Prefixes whose last name was removed here: ``rm -r images/localhost`` ends with an rmdir of it."""
        self.root = _NameDir(self, inodes.number(), "")

    # Names and ids

    def lookup(self, node: Node, name: bytes) -> Maybe[Node]:
        if isinstance(node, _NameDir):
            return self._lookup_name(node, os.fsdecode(name))
        if isinstance(node, _ImageDir):
            return self._lookup_in_image(node, name)
        if isinstance(node, _LayersDir):
            return self._layer_dir(node, name)
        if isinstance(node, _LayerDir):
            return self._lookup_in_layer(node, name)
        raise errors.NotFound(f"there is no {name!r}")

    def _lookup_name(self, directory: _NameDir, name: str) -> Node:
        if directory is self.root and is_hex_id(name):
            return self._image(name)
        names = self._store.image_names()
        full_name = directory.prefix + name
        image_id = names.get(full_name)
        if image_id is not None:
            return self._link(directory, full_name, image_id)
        prefix = full_name + "/"
        if prefix in self._emptied or any(known.startswith(prefix) for known in (*names, *self._made)):
            return self._name_dir(prefix)
        raise errors.NotFound(f"there is no image {full_name!r}")

    def _image(self, image_id: str) -> _ImageDir:
        """The directory of an image. Raises NotFound, also for what the store had and has no more."""
        known = self._images.get(image_id)
        if not self._store.has_image(image_id):
            if known is not None:
                self._let_go(known)
            raise errors.NotFound(f"there is no image {image_id}")
        if known is None:
            known = _ImageDir(self, self._inodes.number(), self._store.image(image_id))
            self._images[image_id] = known
        return known

    def _link(self, directory: _NameDir, full_name: str, image_id: str) -> NameLink:
        target = ("../" * full_name.count("/") + image_id).encode()
        known = self._links.get(full_name)
        if known is None or known.target != target:
            known = NameLink(self, self._inodes.number(), directory, target)
            self._links[full_name] = known
        return known

    def _name_dir(self, prefix: str) -> _NameDir:
        if not prefix:
            return self.root
        known = self._name_dirs.get(prefix)
        if known is None:
            known = self._name_dirs[prefix] = _NameDir(self, self._inodes.number(), prefix)
        return known

    def parent(self, node: Node) -> Node:
        if isinstance(node, (_Inner, NameLink)):
            return node.directory
        if node is self.root:
            return self._parent
        if isinstance(node, _NameDir):
            return self._name_dir(re.sub("[^/]+/$", "", node.prefix))
        return self.root

    # Inside an image

    def _lookup_in_image(self, directory: _ImageDir, name: bytes) -> Maybe[Node]:
        if self._images.get(directory.image.id) is not directory:
            raise errors.Stale(f"image {directory.image.id} was deleted")
        if name == _METADATA:
            return self._metadata(directory)
        known = directory.children.get(name)
        if known is not None:
            return known
        if name not in _IMAGE_NAMES:
            raise errors.NotFound(f"there is no {name!r} in an image")
        if name == b"rootfs":
            made = self._rootfs(directory, self._driver.image_rootfs(directory.image, directory))
        elif name == b"layers":
            made = _LayersDir(self, self._inodes.number(), directory, directory)
        else:
            data = self._document(directory.image, name)
            made = _Document(self, self._inodes.number(), directory, data)
        directory.children[name] = made
        return made

    def _document(self, image: Image, name: bytes) -> bytes:
        return self._store.manifest(image) if name == b"manifest.json" else self._store.config(image)

    def _metadata(self, directory: _ImageDir) -> _Document:
        image = self._store.image(directory.image.id)
        data = self._store.image_metadata(image)
        if directory.metadata is None or directory.metadata.data != data:
            directory.metadata = _Metadata(self, self._inodes.number(), directory, data)
        return directory.metadata

    def _rootfs(self, directory: _ImageDir, rootfs: RootfsBranch) -> Node:
        directory.rootfs.append(rootfs)
        return rootfs.root

    def _layer_dir(self, layers: _LayersDir, name: bytes) -> Node:
        directory = layers.image
        if not name.isdigit() or name != b"%d" % int(name) or int(name) >= len(directory.image.layers):
            raise errors.NotFound(f"the image has no layer {name!r}")
        key = b"layers/" + name
        if key not in directory.children:
            directory.children[key] = _LayerDir(self, self._inodes.number(), directory, layers, int(name))
        return directory.children[key]

    def _lookup_in_layer(self, layer: _LayerDir, name: bytes) -> Maybe[Node]:
        if name not in _LAYER_NAMES:
            raise errors.NotFound(f"there is no {name!r} in a layer")
        if name == b"tar" and layer.number not in layer.image.layers:
            return self._opened_layer(layer)
        return self._in_layer(layer, name)

    def _opened_layer(self, layer: _LayerDir) -> Steps[Node]:
        yield from self._open_layer(layer)
        return self._in_layer(layer, b"tar")

    def _open_layer(self, layer: _LayerDir) -> Steps[None]:
        if layer.number not in layer.image.layers:
            ref = layer.image.image.layers[layer.number]
            opened = yield Remote(lambda: self._store.open_layer(ref))
            layer.image.layers[layer.number] = opened

    def _in_layer(self, layer: _LayerDir, name: bytes) -> Node:
        """`name` is of `_LAYER_NAMES`; for b"tar" the layer is open."""
        directory = layer.image
        key = b"layers/%d/%s" % (layer.number, name)
        made = directory.children.get(key)
        if made is None:
            if name == b"rootfs":
                image = directory.image
                made = self._rootfs(directory, self._driver.layer_rootfs(image, layer.number, layer))
            elif name == b"blob":
                ref = directory.image.layers[layer.number]
                path = os.fspath(self._store.blob_path(ref.blob))
                made = _Blob(self, self._inodes.number(), directory, layer, path, ref)
            else:
                opened = directory.layers[layer.number]
                made = _Tar(self, self._inodes.number(), directory, layer, opened)
            directory.children[key] = made
        return made

    # Listing

    def listing(self, node: Node) -> Maybe[list[tuple[bytes, Any]]]:
        if isinstance(node, _NameDir):
            return self._list_names(node)
        if isinstance(node, _ImageDir):
            return [(name, None) for name in _IMAGE_NAMES]
        if isinstance(node, _LayersDir):
            return [(b"%d" % number, None) for number in range(len(node.image.image.layers))]
        if isinstance(node, _LayerDir):
            return self._list_layer(node)
        raise errors.NotADirectory("not a directory")

    def _list_names(self, directory: _NameDir) -> list[tuple[bytes, Any]]:
        names = self._store.image_names()
        shown = self._store.image_ids() if directory is self.root else []
        below = {
            name.removeprefix(directory.prefix).partition("/")[0]
            for name in (*names, *self._made)
            if name.startswith(directory.prefix) and name != directory.prefix
        }
        return [(name.encode(), None) for name in (*sorted(shown), *sorted(below))]

    def _list_layer(self, layer: _LayerDir) -> Steps[list[tuple[bytes, Any]]]:
        # Sizes of tars that are not here yet are not waited for.
        is_lazy = yield lambda: self._store.is_lazy(layer.image.image.layers[layer.number])
        if not is_lazy:
            with contextlib.suppress(errors.StoreError, OSError):
                yield from self._open_layer(layer)
        return [(name, None) for name in _LAYER_NAMES]

    def listed(self, node: Node, name: bytes, token: Any) -> Node | None:
        try:
            found = self.lookup(node, name)
        except (errors.NotFound, errors.Stale):
            return None
        except (errors.FusestoreError, OSError):
            return self._unreadable(node)
        # Where a lookup needs steps the layer could not be opened for the listing.
        return found if isinstance(found, Node) else self._unreadable(node)

    def _unreadable(self, directory: Node) -> Node:
        """What in `directory` cannot be looked up: files, but for the images themselves."""
        is_image = isinstance(directory, _NameDir)
        return Unreadable(self._inodes.number(), stat.S_IFDIR if is_image else stat.S_IFREG)

    # What is there

    def attr(self, node: Node) -> Attr:
        owner = self._owner
        if isinstance(node, _ImageDir):
            return owner.directory(node.mtime_ns, 4, 0o755)
        if isinstance(node, _Inner):
            return self._inner_attr(node)
        mtime_ns = self._store.images_changed_ns()
        if isinstance(node, NameLink):
            return owner.link(node.target, mtime_ns)
        return owner.directory(mtime_ns, MANY_LINKS)

    def _inner_attr(self, node: _Inner) -> Attr:
        mtime_ns = node.image.mtime_ns
        if isinstance(node, _Document):
            return self._owner.file(len(node.data), mtime_ns)
        if isinstance(node, (_Blob, _Tar)):
            return self._owner.file(node.size, mtime_ns)
        nlink = 2 + len(node.image.image.layers) if isinstance(node, _LayersDir) else 3
        return self._owner.directory(mtime_ns, nlink, 0o555)

    def readlink(self, node: Node) -> bytes:
        if not isinstance(node, NameLink):
            raise errors.BadInput("not a symbolic link")
        return node.target

    def open(self, node: Node, flags: int, caller: Caller) -> Maybe[FileHandle]:
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            raise errors.ReadOnly("images are read-only")
        if isinstance(node, _Document):
            return BytesHandle(node, node.data)
        if isinstance(node, _Blob):
            blob = node
            return open_fetched(self._store, blob.ref, lambda: BlobHandle(blob, blob.path, blob.size))
        if isinstance(node, _Tar):
            return _TarHandle(node)
        raise errors.IsADirectory("is a directory")

    # Tagging, deleting

    def symlink(self, node: Node, name: bytes, target: bytes, caller: Caller) -> Steps[Node]:
        """``ln -s <image> images/<name>``: tags."""
        directory = _place(node)
        full_name = parse_image_name(directory.prefix + os.fsdecode(name))
        if directory.prefix + os.fsdecode(name) in self._store.image_names():
            raise errors.Exists(f"{full_name} is the name of an image: ln -sfn replaces it")
        return self._tag(directory, name, full_name, target)

    def _tag(self, directory: _NameDir, name: bytes, full_name: str, target: bytes) -> Steps[Node]:
        image_id = yield lambda: self._resolve(directory.prefix, os.fsdecode(target))
        yield lambda: self._store.tag(image_id, full_name)
        self._named(full_name)
        return self._lookup_name(directory, os.fsdecode(name))

    def _resolve(self, prefix: str, target: str) -> str:
        """The id of what a link in the directory `prefix` would lead to. Raises NotFound.

        A target that leads nowhere from there may also be said as seen from /images: an id or a name.
        """
        for reference in _references(prefix, target):
            try:
                return self._store.image(reference).id
            except (errors.NotFound, errors.BadName):
                continue
        raise errors.NotFound(f"{target!r} is no image: link to an id or a name in images/")

    def _named(self, full_name: str) -> None:
        """Directories on the way to it need not be remembered any more: they are there as long as it is."""
        self._made = {prefix for prefix in self._made if not full_name.startswith(prefix)}

    def mkdir(self, node: Node, name: bytes, mode: int, caller: Caller) -> Node:
        """``mkdir images/<prefix>``: a place for names, in memory as long as it is empty."""
        directory = _place(node)
        full_name = parse_image_name(directory.prefix + os.fsdecode(name))
        with contextlib.suppress(errors.NotFound):
            self._lookup_name(directory, os.fsdecode(name))
            raise errors.Exists(f"images/{full_name} is there")
        if len(self._made) >= _MADE_MAX:
            raise errors.NoSpace(
                f"at most {_MADE_MAX} directories in images/ may be without a name of an image"
            )
        self._made.add(f"{full_name}/")
        return self._name_dir(f"{full_name}/")

    def unlink(self, node: Node, name: bytes) -> Maybe[None]:
        """``rm images/<name>``: untags."""
        directory = _place(node)
        found = self._lookup_name(directory, os.fsdecode(name))
        if not isinstance(found, NameLink):
            raise errors.IsADirectory(f"{name!r} is a directory")
        return self._untag(directory.prefix + os.fsdecode(name))

    def _untag(self, full_name: str) -> Steps[None]:
        yield lambda: self._store.untag(full_name)
        names = self._store.image_names()
        parts = full_name.split("/")[:-1]
        for count in range(1, len(parts) + 1):
            prefix = "/".join(parts[:count]) + "/"
            if not any(known.startswith(prefix) for known in names):
                self._emptied.add(prefix)

    def rename(self, node: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int) -> Maybe[None]:
        """``mv images/<name> images/<other>``: renames a tag."""
        directory, new_directory = _place(node), _place(new_parent)
        if flags & RENAME_EXCHANGE:
            raise errors.BadInput("names of images cannot be exchanged: move one after the other")
        found = self._lookup_name(directory, os.fsdecode(name))
        if not isinstance(found, NameLink):
            raise errors.ReadOnly("only names of images can be renamed")
        old = directory.prefix + os.fsdecode(name)
        new = parse_image_name(new_directory.prefix + os.fsdecode(new_name))
        return self._rename_tag(old, new, not flags & RENAME_NOREPLACE)

    def _rename_tag(self, old: str, new: str, replace: bool) -> Steps[None]:
        yield lambda: self._store.rename_tag(old, new, replace)
        self._named(new)

    def rmdir(self, node: Node, name: bytes) -> Maybe[None]:
        """``rmdir images/<id>``: deletes the image."""
        found = self._lookup_name(_place(node), os.fsdecode(name))
        if isinstance(found, NameLink):
            raise errors.NotADirectory(f"{name!r} is a name: rm it")
        if isinstance(found, _NameDir):
            self._remove_name_dir(found)
            return None
        assert isinstance(found, _ImageDir)
        return self._delete(found)

    def _remove_name_dir(self, directory: _NameDir) -> None:
        """It is there for its names only: with the last of them it goes, unless mkdir made it."""
        prefixes = (self._made | self._emptied) - {directory.prefix}
        if any(known.startswith(directory.prefix) for known in (*self._store.image_names(), *prefixes)):
            raise errors.NotEmpty(f"images/{directory.prefix} has names of images in it")
        self._emptied.discard(directory.prefix)
        self._made.discard(directory.prefix)

    def _delete(self, directory: _ImageDir) -> Steps[None]:
        if any(rootfs.in_use for rootfs in directory.rootfs):
            raise errors.Busy("a file of the image is open: close it before you delete the image")
        yield lambda: self._store.delete_image(directory.image.id)
        self._let_go(directory)

    def _let_go(self, directory: _ImageDir) -> None:
        """It was deleted, or the kernel forgot it."""
        if self._images.get(directory.image.id) is directory:
            del self._images[directory.image.id]
        for rootfs in directory.rootfs:
            rootfs.detach()
        directory.rootfs.clear()
        directory.children.clear()
        directory.metadata = None
        directory.layers.clear()

    def forgotten(self, node: Node) -> bool:
        if isinstance(node, _NameDir):
            self._emptied.discard(node.prefix)
        if isinstance(node, _ImageDir) and not any(rootfs.in_use for rootfs in node.rootfs):
            self._let_go(node)
        return False


def _place(node: Node) -> _NameDir:
    """Where names may be made and removed."""
    if not isinstance(node, _NameDir):
        raise errors.ReadOnly("images are read-only")
    return node


def _references(prefix: str, target: str) -> list[str]:
    """What a link's target may mean, as references relative to /images; the likeliest first."""
    components = [component for component in target.split("/") if component not in ("", ".")]
    if target.startswith("/"):
        # Where we are mounted is not known: what follows any component "images" may be meant.
        return [
            "/".join(components[position + 1 :])
            for position, component in enumerate(components)
            if component == "images"
        ]
    found = []
    for base in (prefix, ""):
        path = [component for component in base.split("/") if component]
        for component in components:
            if component != "..":
                path.append(component)
            elif path:
                path.pop()
        found.append("/".join(path))
    return found
