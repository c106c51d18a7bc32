"""/views/oci: the store as an OCI image layout, to read and to write. Blocking.

What is there (OCI image-spec, image-layout.md)::

    oci-layout
    index.json              the store's own: a descriptor for each name
    blobs/sha256/<hex>      the store's blobs, and those written here that no image has yet
    <anything else>         files and directories of programs that write: they make a blob, or index.json,
                            under another name first

How a blob comes in: written in its place, its digest is checked when it is closed; written elsewhere, when it
is renamed into its place. One that has another digest is an error there and then, and is not kept. It becomes
part of the store when an index.json is written, in place or by a rename, that leads to it
(fusestore.ociindex); until then it is on disk without a name (fusestore.stagedfile) and goes with the mount.

Blobs of the store are never changed: who writes one again writes a file of its own, which only has to have
the same digest. Each version of index.json is a node of its own, as the kernel keeps the size of a file.
"""

import os
from collections import OrderedDict
from typing import Any
from weakref import WeakValueDictionary

from . import errors, oci
from .documentfile import DocumentReader
from .images import INDEX_MAX
from .imagetree import BlobHandle, open_fetched
from .inodes import Branch, Caller, Changes, FileHandle, Inodes, Maybe, Node, Steps
from .layout import OCI_LAYOUT_VERSION
from .names import digest_hex, parse_digest
from .nodes import Attr, Digest, Inode
from .ociindex import Known, apply_index
from .stagedfile import StagedFile, StagedHandle
from .store import Catalog, LayerRef, Store
from .synthetic import MANY_LINKS, SHARED_S, Owner
from .syscalls import RENAME_NOREPLACE

__all__ = ["OciView"]

_STAGED_MAX = 512
"""Files written here that no image has: each is a descriptor. An image has up to 127 layers."""

_BASES_MAX = 256
"""Processes whose last look at index.json is remembered."""

_WHOLE = "what is in views/oci is written anew as a whole, or not at all"

_BLOBS = "blobs/sha256"
_INDEX, _LAYOUT = "index.json", "oci-layout"
_LAYOUT_DATA = oci.encode({"imageLayoutVersion": OCI_LAYOUT_VERSION})
_FIXED = {"": ("blobs", _INDEX, _LAYOUT), "blobs": ("sha256",)}
"""What is in directories, besides what is written there."""


class _Dir(Node):
    """A directory, by its path below the view."""

    __slots__ = ("above", "path")

    entry_timeout_s = 0.0
    attr_timeout_s = SHARED_S

    def __init__(self, branch: Branch, ino: Inode, above: Node, path: str) -> None:
        super().__init__(branch, ino)
        self.above = above
        self.path = path


class _Blob(Node):
    """A blob of the store."""

    __slots__ = ("directory", "file", "lazy", "size")

    entry_timeout_s = 0.0

    def __init__(
        self, branch: Branch, ino: Inode, directory: Node, file: str, size: int, lazy: LayerRef | None
    ) -> None:
        """`lazy`: the layer of which it is, where it is still to be fetched."""
        super().__init__(branch, ino)
        self.directory = directory
        self.file = file
        self.size = size
        self.lazy = lazy


class _Document(Node):
    """index.json in one version, or oci-layout."""

    __slots__ = ("data", "directory", "known", "path")

    entry_timeout_s = 0.0
    attr_timeout_s = 0.0

    def __init__(
        self, branch: Branch, ino: Inode, directory: Node, path: str, data: bytes, known: Known | None
    ) -> None:
        """`known`: what one knows who has read it; None of oci-layout."""
        super().__init__(branch, ino)
        self.directory = directory
        self.path = path
        self.data = data
        self.known = known


class _BlobReader(BlobHandle):
    """Past the page cache: who writes the blob again has the kernel take its size for 0, for readers too."""

    __slots__ = ()
    direct_io = True
    keep_cache = False


class OciView(Branch):
    """Touched by the event loop's thread only."""

    def __init__(self, store: Store, inodes: Inodes, owner: Owner, parent: Node) -> None:
        """`parent` is what '..' of /views/oci is."""
        self._store = store
        self._inodes = inodes
        self._owner = owner
        self._known: WeakValueDictionary[str, Node] = WeakValueDictionary()
        """Documents and blobs by path."""
        self._encoded: tuple[Catalog, bytes, Known] | None = None
        """index.json, and what it was made of."""
        self._staged: dict[str, StagedFile] = {}
        self.root = _Dir(self, inodes.number(), parent, "")
        self._bases: OrderedDict[int, Known] = OrderedDict()
        """What a process has read or written last of index.json, by its id; of the last that did."""
        self._latest: Known | None = None
        """What anybody has: a shell reads it by one process and writes it by another."""
        self._dirs = {"": self.root}
        for path in ("blobs", _BLOBS):
            self._make_dir(self._dirs[os.path.dirname(path)], path)

    def _make_dir(self, above: _Dir, path: str) -> _Dir:
        made = self._dirs[path] = _Dir(self, self._inodes.number(), above, path)
        return made

    # Looking

    def lookup(self, node: Node, name: bytes) -> Node:
        directory, path = self._place(node, name)
        found = self._staged.get(path) or self._dirs.get(path)
        if found is not None:
            return found
        if path in (_INDEX, _LAYOUT):
            data, known = self._index() if path == _INDEX else (_LAYOUT_DATA, None)
            document = self._known.get(path)
            if not isinstance(document, _Document) or document.data != data:
                document = _Document(self, self._inodes.number(), directory, path, data, known)
            self._known[path] = document
            return document
        if directory.path == _BLOBS:
            return self._blob(directory, path)
        raise errors.NotFound(f"there is no views/oci/{path}")

    def _index(self) -> tuple[bytes, Known]:
        """index.json. Encoded once: that of 10,000 names takes as long as many a request."""
        catalog = self._store.catalog()
        if self._encoded is None or self._encoded[0] is not catalog:
            self._encoded = (catalog, oci.encode(catalog.document), Known.of(catalog))
        return self._encoded[1:]

    def _place(self, node: Node, name: bytes) -> tuple[_Dir, str]:
        """A directory that is there, and the path of a name in it."""
        if not isinstance(node, _Dir):
            raise errors.NotADirectory("not a directory")
        if self._dirs.get(node.path) is not node:
            raise errors.NotFound(f"views/oci/{node.path} was removed")
        return node, os.path.join(node.path, os.fsdecode(name))

    def _blob(self, directory: _Dir, path: str) -> Node:
        digest = _digest_of(path)
        missing = errors.NotFound(f"there is no views/oci/{path}")
        if digest is None:
            raise missing
        file = self._store.blob_path(digest)
        lazy = None
        try:
            size = os.stat(file).st_size
        except FileNotFoundError:
            lazy = next((ref for ref in self._store.lazy_layers() if ref.blob == digest), None)
            if lazy is None:
                raise missing from None
            size = lazy.size
        known = self._known.get(path)
        if not isinstance(known, _Blob) or known.size != size:
            known = self._known[path] = _Blob(self, self._inodes.number(), directory, file, size, lazy)
        return known

    def parent(self, node: Node) -> Node:
        if isinstance(node, _Dir):
            return node.above
        assert isinstance(node, (_Blob, _Document, StagedFile))
        return node.directory

    def path(self, node: Node) -> bytes:
        path = getattr(node, "path", "")
        return os.fsencode(f"views/oci/{path}".rstrip("/"))

    def listing(self, node: Node) -> list[tuple[bytes, Any]]:
        directory, _ = self._place(node, b"")
        names = set(_FIXED.get(directory.path, ()))
        names |= {os.path.basename(path) for path in (*self._staged, *self._dirs)
                  if path and os.path.dirname(path) == directory.path}  # fmt: skip
        if directory.path == _BLOBS:
            names |= set(os.listdir(os.path.dirname(self._store.blob_path(_ANY))))
            names |= {digest_hex(ref.blob) for ref in self._store.lazy_layers()}
        return [(os.fsencode(name), None) for name in sorted(names)]

    def listed(self, node: Node, name: bytes, token: Any) -> Node | None:
        try:
            return self.lookup(node, name)
        except errors.NotFound:
            return None

    def attr(self, node: Node) -> Attr:
        if isinstance(node, StagedFile):
            return node.attr
        mtime_ns = self._store.images_changed_ns()
        if isinstance(node, _Blob):
            return self._owner.file(node.size, mtime_ns, 0o644)
        if isinstance(node, _Document):
            return self._owner.file(len(node.data), mtime_ns, 0o644)
        return self._owner.directory(mtime_ns, MANY_LINKS)

    def setattr(self, node: Node, changes: Changes, caller: Caller) -> None:
        if isinstance(node, StagedFile):
            node.change(changes)
        elif changes.mode is not None or changes.uid is not None or changes.gid is not None:
            raise errors.NotPermitted("modes and owners in views/oci are fixed")
        elif changes.size is not None:
            raise errors.ReadOnly(_WHOLE)
        # Times stay the store's; the kernel sets them after a write.

    # Files

    def open(self, node: Node, flags: int, caller: Caller) -> Maybe[FileHandle]:
        if isinstance(node, _Dir):
            raise errors.IsADirectory("is a directory")
        if isinstance(node, StagedFile):
            return self._opened(node, flags)
        assert isinstance(node, (_Blob, _Document))
        if flags & os.O_ACCMODE == os.O_RDONLY:
            if isinstance(node, _Blob):
                blob = node

                def make() -> _BlobReader:
                    return _BlobReader(blob, blob.file, blob.size)

                return make() if blob.lazy is None else open_fetched(self._store, blob.lazy, make)
            if node.known is not None:
                self._note_base(_process(caller.pid), node.known)
            return DocumentReader(node, node.data)
        if not flags & os.O_TRUNC:
            raise errors.ReadOnly(_WHOLE)
        # The kernel takes the node's size for what is written now: the next lookup finds another node.
        path = node.path if isinstance(node, _Document) else f"{_BLOBS}/{os.path.basename(node.file)}"
        self._known.pop(path, None)
        return self._opened(self._new_file(node.directory, path, 0o644, caller), flags)

    def _note_base(self, process: int | None, known: Known) -> None:
        self._latest = known
        if process is not None:
            self._bases[process] = known
            self._bases.move_to_end(process)
            if len(self._bases) > _BASES_MAX:
                self._bases.popitem(last=False)

    def create(
        self, node: Node, name: bytes, mode: int, flags: int, caller: Caller
    ) -> tuple[Node, FileHandle]:
        directory, path = self._place(node, name)
        if directory.path == "blobs" or (directory.path == _BLOBS and _digest_of(path) is None):
            raise errors.NotPermitted("blobs are called by the 64 hex digits of their sha256")
        made = self._staged[path] = self._new_file(directory, path, mode, caller)
        return made, self._opened(made, flags)

    def _new_file(self, directory: Node, path: str, mode: int, caller: Caller) -> StagedFile:
        if len(self._staged) >= _STAGED_MAX:
            raise errors.NoSpace(
                f"views/oci holds {_STAGED_MAX} files of no image: remove some, or mount the store again"
            )
        process = _process(caller.pid)
        base = self._bases.get(process or 0, self._latest)
        fd = self._store.unnamed_file()
        return StagedFile(self, self._inodes.number(), directory, path, fd, mode, caller, process, base)

    def _opened(self, file: StagedFile, flags: int) -> StagedHandle:
        return StagedHandle(file, flags, self._check, self._released)

    def _check(self, file: StagedFile) -> Steps[None]:
        """Something was written: whether it can be what its name says."""
        if file.path == _INDEX:
            yield from self._apply(file)
        elif file.path == _LAYOUT:
            _check_layout(_read(file, oci.DOCUMENT_MAX))
        elif os.path.dirname(file.path) == _BLOBS:
            yield from self._verify(file, file.path)

    def _verify(self, file: StagedFile, path: str) -> Steps[None]:
        """Whether the content is that of the blob at `path`. Raises WrongDigest."""
        expected = _digest_of(path)
        found = yield from file.hash()
        if found != expected:
            raise errors.WrongDigest(f"the bytes written to views/oci/{path} have the digest {found}")

    def _released(self, file: StagedFile) -> None:
        """One handle less. What was not written to its end, or wrongly, is not kept as a blob."""
        digest = _digest_of(file.path)
        if digest is not None and not file.writers and not file.is_sound(digest):
            self._drop(file)

    def _drop(self, file: StagedFile) -> None:
        if self._staged.get(file.path) is file:
            del self._staged[file.path]

    def _apply(self, file: StagedFile) -> Steps[None]:
        """`file` has a new index.json."""
        blobs = {
            digest: one
            for path, one in self._staged.items()
            if (digest := _digest_of(path)) is not None and one.is_sound(digest)
        }
        paths = {digest: f"/proc/self/fd/{one.fd}" for digest, one in blobs.items()}
        file.base = yield lambda: apply_index(self._store, _read(file, INDEX_MAX), paths, file.base)
        self._note_base(file.process, file.base)
        for digest, one in blobs.items():
            if os.path.exists(self._store.blob_path(digest)):
                self._drop(one)

    # Names

    def mkdir(self, node: Node, name: bytes, mode: int, caller: Caller) -> Node:
        directory, path = self._place(node, name)
        if directory.path in ("blobs", _BLOBS):
            raise errors.NotPermitted("only sha256/ is in blobs/, and only blobs are there")
        if len(self._dirs) >= _STAGED_MAX:
            raise errors.NoSpace(f"views/oci holds {_STAGED_MAX} directories: remove some")
        return self._make_dir(directory, path)

    def unlink(self, node: Node, name: bytes) -> None:
        found = self.lookup(node, name)
        if isinstance(found, _Dir):
            raise errors.IsADirectory("is a directory")
        if not isinstance(found, StagedFile):
            raise errors.ReadOnly("blobs go with their images: rmdir images/ID deletes one")
        self._drop(found)

    def rmdir(self, node: Node, name: bytes) -> None:
        found = self.lookup(node, name)
        if not isinstance(found, _Dir):
            raise errors.NotADirectory("not a directory")
        if found.path in ("blobs", _BLOBS) or self.listing(found):
            raise errors.NotEmpty(f"views/oci/{found.path} is not empty")
        del self._dirs[found.path]

    def rename(self, node: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int) -> Maybe[None]:
        file = self.lookup(node, name)
        directory, path = self._place(new_parent, new_name)
        if not isinstance(file, StagedFile) or file.writers:
            raise errors.ReadOnly("only files that were written here, and closed, can be renamed")
        if flags & ~RENAME_NOREPLACE or path in self._dirs or directory.path == "blobs":
            raise errors.NotPermitted("a file is renamed to be a blob, index.json, or a file of another name")
        if flags & RENAME_NOREPLACE:
            self._require_free(new_parent, new_name)
        if directory.path == _BLOBS and _digest_of(path) is None:
            raise errors.NotPermitted("blobs are called by the 64 hex digits of their sha256")
        return self._rename(file, directory, path)

    def _require_free(self, parent: Node, name: bytes) -> None:
        try:
            self.lookup(parent, name)
        except errors.NotFound:
            return
        raise errors.Exists(f"{name!r} is there")

    def _rename(self, file: StagedFile, directory: _Dir, path: str) -> Steps[None]:
        digest = _digest_of(path)
        if path == _INDEX:
            yield from self._apply(file)
        elif path == _LAYOUT:
            _check_layout(_read(file, oci.DOCUMENT_MAX))
        elif digest is not None:
            yield from self._verify(file, path)
            if not file.is_sound(digest):
                raise errors.Busy(f"views/oci/{path} was written while it was read to be a blob")
        # It may have been removed or renamed meanwhile.
        if self._staged.get(file.path) is file:
            del self._staged[file.path]
        if path not in (_INDEX, _LAYOUT):
            file.directory, file.path = directory, path
            self._staged[path] = file


_ANY = Digest("sha256:" + "0" * 64)


def _digest_of(path: str) -> Digest | None:
    """Of a blob's path; None for what is none."""
    directory, _, name = path.rpartition("/")
    try:
        return parse_digest(f"sha256:{name}") if directory == _BLOBS else None
    except errors.BadName:
        return None


def _process(thread: int) -> int | None:
    """The process that a thread is of: a program's threads share what one of them read."""
    try:
        with open(f"/proc/{thread}/status", "rb") as file:
            (line,) = (line for line in file if line.startswith(b"Tgid:"))
    except (OSError, ValueError):
        return None
    return int(line.split()[1])


def _read(file: StagedFile, limit: int) -> bytes:
    """A document; longer than `limit` if it is too long."""
    return os.pread(file.fd, limit + 1, 0)


def _check_layout(data: bytes) -> None:
    """Raises BadSource: only what is there can be written there."""
    if oci.parse_object(data, _LAYOUT).get("imageLayoutVersion") != OCI_LAYOUT_VERSION:
        raise errors.BadSource(f"oci-layout can only say version {OCI_LAYOUT_VERSION}")
