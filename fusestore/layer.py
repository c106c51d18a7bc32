"""What a layer's tar entries mean: the tree of one layer, whiteouts included, as a `LayerIndex`. Pure.

The rules are design.md section 4 and OCI image-spec, layer.md. Where both are silent:

* `.wh.NAME`, whatever the type of its entry, hides NAME of lower layers. If the layer has NAME itself, NAME
  stays and, if it is a directory, is opaque: what was there before is gone, as umoci and podman have it.
* A character device 0:0 is overlayfs's spelling of the same, and a hard link to one is another.
* `.wh..wh..opq` makes its directory opaque. All other names that begin with `.wh..wh.` are AUFS's own files
  and shown nowhere, as in podman and containerd; hard links to them work, since AUFS kept link targets there.
* Below `.wh.NAME` there can be nothing, and `.wh.` alone hides nothing: refused.
* The last entry of a name wins as if it were the only one: a directory merges with the lower one also if a
  file had its name for a while.
* A whiteout does not make what it hides anew: with `.wh.a` in the layer, `a/.wh.b` says nothing more.
* A hard link is to the inode that its target's name has when the link comes, else to the one that it has in
  the end, else to a lower layer. Owner, mode and times of a link entry are ignored, as umoci does.
* Xattrs of overlayfs in a layer are data; escaping them is the union's business.

Invariants: the tree does not depend on where in the tar a whiteout stands; the only error is LayerRefused;
memory is 150 to 350 bytes an entry and bounded by `LayerLimits`. A maintainer must keep whiteouts out of the
tree until `finish`, or order begins to matter.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from stat import S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFREG
from typing import NamedTuple

from . import acl
from .errors import BadInput, LayerRefused
from .layerindex import (
    DRAFT,
    EXTENTS,
    IMPLICIT,
    LOWER_LINK,
    NO_BLOCK,
    OPAQUE,
    Block,
    IndexWriter,
    LayerIndex,
    pack_extents,
)
from .names import FILE_NAME_MAX
from .nodes import WHITEOUT_RDEV, TarEntry, Xattrs

__all__ = ["LayerBuilder", "LayerIndex", "LayerLimits"]

PATH_MAX = 4096
"""Bytes of a path (design.md section 4); also what keeps the tree less than 2,048 deep."""
SYMLINK_MAX = 4095
"""Bytes of a symlink's target: Linux makes no longer one (PATH_MAX with its NUL)."""


@dataclass(frozen=True, slots=True)
class LayerLimits:
    """What one layer may ask of us beyond `TarLimits`."""

    nodes: int = 10_000_000
    """Objects, with those that only a path implies."""
    directories: int = 2_000_000
    """350 bytes of memory each, and one short entry can imply 2,047 of them."""
    path_bytes: int = 512 << 20
    """Bytes of all paths and link targets: bounds the memory of names, and time, a lookup a component."""
    detail_bytes: int = 256 << 20
    """Bytes of all xattrs and extents, which the builder holds in memory."""
    links_per_file: int = 65_000
    """Names of one file: as many as ext4 gives it."""
    lower_links: int = 1_000_000
    """Hard links into lower layers: each is searched there at import."""


_WHITEOUT_PREFIX = b".wh."
_AUFS_PREFIX = b".wh..wh."
_OPAQUE_NAME = b".wh..wh..opq"
_NO_NAMES = frozenset((b"", b".", b".."))

_TYPE_BITS = {b"0": S_IFREG, b"2": S_IFLNK, b"3": S_IFCHR, b"4": S_IFBLK, b"5": S_IFDIR, b"6": S_IFIFO}
_IMPLICIT_DIRECTORY = DRAFT.pack(S_IFDIR | 0o755, IMPLICIT, 0, 0, 0, 0, 0, 0, 0)
_WHITEOUT = DRAFT.pack(S_IFCHR, 0, 0, 0, 0, 0, 0, WHITEOUT_RDEV, 0)
_LOWER_LINK = DRAFT.pack(0, LOWER_LINK, 0, 0, 0, 0, 0, 0, 0)
_FLAGS_AT = 2
"""Of the low byte of the flags in a draft."""

_ROOT = 0
_UNNUMBERED = 0xFFFF_FFFF


class _Details(NamedTuple):
    """What few objects have."""

    target: bytes
    xattrs: Xattrs
    extents: bytes


_NO_DETAILS = _Details(b"", (), b"")


class LayerBuilder:
    """Takes the entries of one tar in their order, then gives the index. One thread at a time.

    Objects are numbered as they come ("nodes"): each has the draft of a record, directories have children.
    """

    __slots__ = (
        "_children",
        "_detail_bytes",
        "_details",
        "_device_whiteouts",
        "_drafts",
        "_last_directory",
        "_last_directory_path",
        "_last_head",
        "_last_parent",
        "_limits",
        "_link_targets",
        "_linked",
        "_path_bytes",
        "_whiteouts",
    )

    def __init__(self, limits: LayerLimits = LayerLimits()) -> None:
        self._limits = limits
        self._drafts = bytearray(_IMPLICIT_DIRECTORY)
        self._children: dict[int, dict[bytes, int]] = {_ROOT: {}}
        self._details: dict[int, _Details] = {}
        # Nodes that may have several names, and lower links.
        self._linked: set[int] = set()
        # Of nodes that stand for a target which was not there when the link came.
        self._link_targets: dict[int, bytes] = {}
        # Directory and name; without a name, the directory is opaque.
        self._whiteouts: list[tuple[bytes, bytes]] = []
        self._device_whiteouts: set[bytes] = set()
        self._path_bytes = 0
        self._detail_bytes = 0
        # Most entries are in the directory of the entry before.
        self._last_head: bytes | None = None
        self._last_parent = b""
        self._last_directory_path: bytes | None = None
        self._last_directory = _ROOT

    def add(self, entry: TarEntry) -> None:
        """Raises LayerRefused for what a layer must not contain; the builder is then of no use."""
        self._path_bytes += len(entry.path) + len(entry.link)
        if self._path_bytes > self._limits.path_bytes:
            raise LayerRefused("layer has too many or too long names (limit: path_bytes)")
        parent, name = self._place(entry.path)
        if not name:
            if entry.type != b"5":
                raise _refused(entry.path, "the root of a layer must be a directory")
            self._update(_ROOT, entry)
        elif name == _OPAQUE_NAME:
            self._whiteouts.append((parent, b""))
        elif name.startswith(_WHITEOUT_PREFIX) and not name.startswith(_AUFS_PREFIX):
            hidden = name.removeprefix(_WHITEOUT_PREFIX)
            if hidden in _NO_NAMES:
                raise _refused(entry.path, "a whiteout must name what it hides")
            self._whiteouts.append((parent, hidden))
        elif entry.type == b"3" and entry.rdev == WHITEOUT_RDEV:
            self._whiteouts.append((parent, name))
            self._device_whiteouts.add(parent + b"/" + name if parent else name)
        else:
            self._set(parent, name, entry)

    def finish(self, tar_size: int) -> bytes:
        """The index file, once. `tar_size`: bytes of the uncompressed tar (`TarScanner.size`).

        Raises LayerRefused for hard links to directories, to themselves or in a circle.
        """
        whiteout = self._new(_WHITEOUT)
        self._resolve_links(whiteout)
        self._apply_whiteouts(whiteout)
        tree = _Tree(self._children, self._drafts, self._details, self._linked)
        return _Numbering(tree, self._limits).write(tar_size)

    # Entries, in their order.

    def _place(self, path: bytes) -> tuple[bytes, bytes]:
        """The path of the directory, without `.` and needless slashes, and the name; the root has neither."""
        stripped = path.rstrip(b"/")
        head, _, name = stripped.rpartition(b"/")
        if (
            head == self._last_head
            and name not in _NO_NAMES
            and len(name) <= FILE_NAME_MAX
            and len(stripped) <= PATH_MAX
            and b"\0" not in name
        ):
            return self._last_parent, name
        components = _components(path)
        if not components:
            return b"", b""
        last = components.pop()
        parent = b"/".join(components)
        for component in components:
            if component.startswith(_WHITEOUT_PREFIX) and not component.startswith(_AUFS_PREFIX):
                raise _refused(path, "it lies below a whiteout")
        if last == name:
            self._last_head, self._last_parent = head, parent
        return parent, last

    def _set(self, parent: bytes, name: bytes, entry: TarEntry) -> None:
        # A link's target is looked for first: the link's own directories may replace it.
        node = self._link(entry) if entry.type == b"1" else None
        directory = self._last_directory
        if parent != self._last_directory_path:
            made = self._directory(parent, replace=True)
            assert made is not None
            self._last_directory_path, self._last_directory = parent, made
            directory = made
        siblings = self._children[directory]
        replaced = siblings.get(name)
        if entry.type == b"5":
            if replaced in self._children:
                self._update(replaced, entry)
                return
            node = self._new_directory(_draft(entry))
        else:
            if replaced in self._children:
                self._last_directory_path = None  # it may lie in what is dropped here
            if node is None:
                node = self._new(_draft(entry))
        siblings[name] = node
        if entry.type != b"1":
            self._set_details(node, entry)

    def _update(self, directory: int, entry: TarEntry) -> None:
        self._drafts[directory * DRAFT.size : (directory + 1) * DRAFT.size] = _draft(entry)
        self._details.pop(directory, None)
        self._set_details(directory, entry)

    def _set_details(self, node: int, entry: TarEntry) -> None:
        extents = b"" if _is_one_run(entry) else pack_extents(entry.data)
        target = entry.link if entry.type == b"2" else b""
        if target or entry.xattrs or extents:
            if entry.type == b"2" and len(target) > SYMLINK_MAX:
                raise _refused(entry.path, f"a symlink to a path of {len(target)} bytes")
            self._detail_bytes += len(extents) + sum(len(key) + len(value) for key, value in entry.xattrs)
            if self._detail_bytes > self._limits.detail_bytes:
                raise LayerRefused("layer has too many xattrs and extents (limit: detail_bytes)")
            self._details[node] = _Details(target, entry.xattrs, extents)
        elif entry.type == b"2":
            raise _refused(entry.path, "a symlink to nothing")

    def _link(self, entry: TarEntry) -> int:
        """The node that a hard link names, or one that stands for it until `finish`."""
        target = b"/".join(_components(entry.link))
        node = self._find(target)
        if node in self._children:
            raise _refused(entry.path, "a hard link to a directory")
        if node is None:
            node = self._new(_LOWER_LINK)
            self._link_targets[node] = target
        self._linked.add(node)
        return node

    def _new(self, draft: bytes) -> int:
        node = len(self._drafts) // DRAFT.size
        if node > self._limits.nodes:
            raise LayerRefused(f"layer has more than {self._limits.nodes} files (limit: nodes)")
        self._drafts += draft
        return node

    def _new_directory(self, draft: bytes) -> int:
        if len(self._children) > self._limits.directories:
            raise LayerRefused(
                f"layer has more than {self._limits.directories} directories (limit: directories)"
            )
        node = self._new(draft)
        self._children[node] = {}
        return node

    def _find(self, path: bytes) -> int | None:
        node: int | None = _ROOT
        for component in _split(path):
            children = self._children.get(node) if node is not None else None
            if children is None:
                return None
            node = children.get(component)
        return node

    def _directory(self, path: bytes, *, replace: bool) -> int | None:
        """The directory of a path, made where it is missing.

        Where the path leads through another object: with `replace` that becomes a directory, else None.
        """
        node = _ROOT
        for component in _split(path):
            siblings = self._children[node]
            child = siblings.get(component)
            if child not in self._children:
                if child is not None and not replace:
                    return None
                child = siblings[component] = self._new_directory(_IMPLICIT_DIRECTORY)
            node = child
        return node

    # What waits until all entries are known.

    def _resolve_links(self, whiteout: int) -> None:
        """Puts in place of each link that waits, and still has a name, what its target is now."""
        if not self._link_targets:
            return
        ends: dict[int, int] = {}
        waiting = [_ROOT]
        while waiting:
            siblings = self._children[waiting.pop()]
            for name, node in siblings.items():
                if node in self._children:
                    waiting.append(node)
                elif node in self._link_targets:
                    siblings[name] = self._end_of_link(node, whiteout, ends)
        lower_links = self._link_targets.keys() & set(ends.values())
        if len(lower_links) > self._limits.lower_links:
            raise LayerRefused(
                f"layer has {len(lower_links)} hard links into lower layers (limit: lower_links)"
            )
        for node in lower_links:
            self._details[node] = _Details(self._link_targets[node], (), b"")
        self._linked.update(ends.values())
        self._linked.discard(whiteout)

    def _end_of_link(self, link: int, whiteout: int, ends: dict[int, int]) -> int:
        """What a link leads to, through other links that wait; itself if that is not in this layer."""
        chain: dict[int, None] = {}
        node = link
        while node in self._link_targets and node not in ends:
            target = self._link_targets[node]
            if node in chain:
                raise _refused(target, "a hard link to itself")
            chain[node] = None
            found = self._find(target)
            if found in self._children:
                raise _refused(target, "a hard link to a directory")
            if found is not None:
                node = found
            elif target in self._device_whiteouts:
                node = whiteout
            else:
                ends[node] = node
        end = ends.get(node, node)
        ends.update(dict.fromkeys(chain, end))
        return end

    def _apply_whiteouts(self, whiteout: int) -> None:
        # The upper ones first: below a name that is hidden whole, nothing needs hiding.
        for parent, name in sorted(self._whiteouts, key=lambda placed: len(_split(placed[0]))):
            directory = self._directory(parent, replace=False)
            if directory is None:
                continue
            if not name:
                self._drafts[directory * DRAFT.size + _FLAGS_AT] |= OPAQUE
                continue
            hidden = self._children[directory].setdefault(name, whiteout)
            if hidden in self._children:
                # The layer's own directory stands where the lower one was removed: it inherits nothing.
                self._drafts[hidden * DRAFT.size + _FLAGS_AT] |= OPAQUE
                self._drafts[hidden * DRAFT.size + _FLAGS_AT] &= ~IMPLICIT


class _Tree(NamedTuple):
    """What a builder has made of all entries."""

    children: dict[int, dict[bytes, int]]
    drafts: bytearray
    details: dict[int, _Details]
    linked: set[int]


class _Numbering:
    """Gives the nodes that are reached from the root their inode numbers, and writes the index."""

    def __init__(self, tree: _Tree, limits: LayerLimits) -> None:
        self._tree = tree
        self._limits = limits
        nodes = len(tree.drafts) // DRAFT.size
        self._inode_of = array("I", (_UNNUMBERED,)) * nodes
        self._nodes = array("I")  # by inode number
        self._nlinks = array("I")
        self._block_offsets = array("Q")
        self._block_lengths = array("I")
        self._names: dict[int, list[tuple[int, bytes]]] = {node: [] for node in tree.linked}
        self._writer = IndexWriter()

    def write(self, tar_size: int) -> bytes:
        self._write_directories()
        lower_links = self._write_nodes()
        return self._writer.finish(self._records(), tar_size, lower_links)

    def _number(self, node: int) -> int:
        inode = self._inode_of[node] = len(self._nodes)
        self._nodes.append(node)
        self._nlinks.append(1)
        self._block_offsets.append(NO_BLOCK.offset)
        self._block_lengths.append(NO_BLOCK.length)
        return inode

    def _set_block(self, inode: int, block: Block) -> None:
        self._block_offsets[inode], self._block_lengths[inode] = block

    def _write_directories(self) -> None:
        """Numbers everything: a directory's children in one go, then what is below each in turn."""
        self._number(_ROOT)
        waiting: list[tuple[int, int, bytes]] = [(_ROOT, LayerIndex.ROOT, b"")]
        while waiting:
            node, parent, name = waiting.pop()
            inode = self._inode_of[node]
            children = self._tree.children[node]
            names = sorted(child for child in children if not child.startswith(_AUFS_PREFIX))
            inodes: list[int] = []
            subdirectories: list[tuple[int, int, bytes]] = []
            for child_name in names:
                child = children[child_name]
                child_inode = self._inode_of[child]
                if child_inode == _UNNUMBERED:
                    child_inode = self._number(child)
                    if child in self._tree.children:
                        subdirectories.append((child, inode, child_name))
                if child in self._names:
                    self._names[child].append((inode, child_name))
                inodes.append(child_inode)
            xattrs = self._tree.details.get(node, _NO_DETAILS).xattrs
            self._set_block(inode, self._writer.add_directory(parent, name, xattrs, names, inodes))
            self._nlinks[inode] = 2 + len(subdirectories)
            waiting += reversed(subdirectories)

    def _write_nodes(self) -> list[int]:
        """The blocks of all else, and the lower links."""
        lower_links: list[int] = []
        for inode, node in enumerate(self._nodes):
            if node in self._tree.children:
                continue
            details = self._tree.details.get(node, _NO_DETAILS)
            names: Sequence[tuple[int, bytes]] = self._names.get(node, ())
            is_lower_link = self._tree.drafts[node * DRAFT.size + _FLAGS_AT] & LOWER_LINK
            if names:
                if len(names) > self._limits.links_per_file:
                    raise _refused(names[0][1], f"a file of {len(names)} names (limit: links_per_file)")
                self._nlinks[inode] = len(names)
            if is_lower_link:
                lower_links.append(inode)
            elif len(names) == 1:
                names = ()
            if names or details is not _NO_DETAILS:
                self._set_block(inode, self._writer.add_node(*details, names))
        return lower_links

    def _records(self) -> Iterator[tuple[bytes, int, Block]]:
        drafts = memoryview(self._tree.drafts)
        blocks = map(Block, self._block_offsets, self._block_lengths)
        for node, nlink, block in zip(self._nodes, self._nlinks, blocks, strict=True):
            yield bytes(drafts[node * DRAFT.size : (node + 1) * DRAFT.size]), nlink, block


def _draft(entry: TarEntry) -> bytes:
    mtime_s, mtime_fraction = divmod(entry.mtime_ns, 1_000_000_000)
    flags = source = 0
    size = entry.size
    if entry.type == b"0":
        if _is_one_run(entry):
            source = entry.data[0].source if entry.data else 0
        else:
            flags = EXTENTS
            source = sum(extent.length for extent in entry.data)
    elif entry.type == b"2":
        size = len(entry.link)
    mode = _TYPE_BITS[entry.type] | _permissions(entry)
    return DRAFT.pack(mode, flags, entry.uid, entry.gid, mtime_fraction, mtime_s, size, entry.rdev, source)


def _permissions(entry: TarEntry) -> int:
    """The mode as it is where the entry is unpacked: bsdtar's header has the owning group's, not the mask."""
    access = dict(entry.xattrs).get(acl.ACCESS) if entry.type != b"2" else None
    if access is None:
        return entry.mode
    try:
        acl.check(access)
    except BadInput:  # of a table of contents: the tar is refused when it comes
        return entry.mode
    return acl.mode_of(access, entry.mode)[0]


def _is_one_run(entry: TarEntry) -> bool:
    """Whether the content, if any, lies in the tar in one piece without holes."""
    if len(entry.data) == 1:
        return entry.data[0].length == entry.size
    return not entry.data and not entry.size


def _split(path: bytes) -> list[bytes]:
    return path.split(b"/") if path else []


def _components(path: bytes) -> list[bytes]:
    """Of a path as a tar has it; none for the root. Raises LayerRefused for what breaks the rules."""
    components = [component for component in path.split(b"/") if component not in (b"", b".")]
    if not path:
        raise LayerRefused("layer has an entry without a name")
    if b".." in components:
        raise _refused(path, "a path with ..")
    if b"\0" in path:
        raise _refused(path, "a path with NUL")
    if max(map(len, components), default=0) > FILE_NAME_MAX:
        raise _refused(path, f"a name of more than {FILE_NAME_MAX} bytes")
    if sum(map(len, components)) + len(components) - 1 > PATH_MAX:
        raise _refused(path, f"a path of more than {PATH_MAX} bytes")
    return components


def _refused(path: bytes, what: str) -> LayerRefused:
    shown = path if len(path) <= 100 else path[:100] + b"..."
    return LayerRefused(f"layer entry {shown!r}: {what}")
