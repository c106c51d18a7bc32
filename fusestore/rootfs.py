"""A file tree served from layers and, where there is one, an upper directory: looking and reading. Blocking.

An `Object` is one file, directory … of the tree, whether it lies in a layer, in the upper or (a directory) in
both. Its identity, and with it the inode number, is where its content lies: a reference into a layer or an
inode of the upper; copy-up moves the object from the one to the other and keeps the number. Numbers are made
of the place, of a copy of what it is a copy of, so that they are the same after the kernel forgot and asked
again.

What a name leads to is always asked of `union.over`; objects hold no list of their children. An object whose
last name is gone (an orphan) keeps its descriptor and answers until the kernel forgets it.

`fusestore.writable` adds the changes.
"""

import contextlib
import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, cast
from weakref import WeakValueDictionary

from .blobs import LayerReader
from .errors import IsADirectory, NoAttribute, NotFound, ReadOnly, Stale
from .inodes import FOREVER_S, Branch, Caller, Closable, FileHandle, Inodes, Maybe, Node, Steps
from .nodes import Attr, Extent, Inode, Xattrs
from .quota import Quota, usage
from .syscalls import pread_now
from .union import Lower, Ref, Resolved, over
from .upper import Upper

__all__ = ["Descriptors", "Object", "OpenFile", "Opened", "Opener", "Rootfs"]

_SELINUX = b"security.selinux"
_SERIAL_LIMIT = (1 << 21) - 1
"""The bit above is of the numbers that `Inodes.number` makes up."""
_LAYER_OF_UPPER = 511


class Object(Node):
    """A file, directory, link … of a rootfs."""

    __slots__ = (
        "fd",
        "format",
        "in_upper",
        "is_orphan",
        "key",
        "links",
        "name",
        "other_names",
        "parent",
        "stack",
        "subdirectories",
        "version",
    )

    def __init__(
        self, branch: "Rootfs", ino: Inode, parent: "Object | None", name: bytes, what: Resolved
    ) -> None:
        super().__init__(branch, ino)
        self.parent = parent
        self.name = name
        """Together with `parent` a name that leads here, unless `is_orphan` or the descriptor is pinned."""
        self.other_names: dict[tuple[Object, bytes], None] | None = None
        """Of a non-directory with hard links: what else it was met under, and perhaps no longer is."""
        self.links = -1
        """How many names a lower non-directory has; -1 when they were not counted yet."""
        self.key = what.key
        self.format = what.format
        self.stack = what.stack
        self.in_upper = isinstance(what.key, int)
        self.fd = -1
        """O_PATH descriptor of an upper object, or -1: then `Rootfs.descriptor` opens it."""
        self.is_orphan = False
        self.version = 0
        """Of a directory: counts its changes."""
        self.subdirectories = -1
        """How many a merged directory has; -1 when they were not counted yet."""

    def settle(self, places: Sequence[tuple["Object", bytes]]) -> None:
        """The object is known by these names and no others."""
        self.parent, self.name = places[0] if places else (None, b"")
        self.other_names = dict.fromkeys(places[1:]) or None

    def meet(self, directory: "Object", name: bytes) -> None:
        """The object was found as `name`."""
        if self.parent is directory and self.name == name:
            return
        if self.format != stat.S_IFDIR and self.parent is not None:
            if self.other_names is None:
                self.other_names = {}
            if (directory, name) in self.other_names:
                del self.other_names[directory, name]
            else:
                self.links = -1
            self.other_names[self.parent, self.name] = None
        self.parent, self.name = directory, name

    def lose(self, directory: "Object", name: bytes) -> None:
        """The object is `name` no more; it is known by the name it was met under before, if any."""
        if self.other_names is not None:
            self.other_names.pop((directory, name), None)
        if self.parent is directory and self.name == name:
            self.parent, self.name = self.other_names.popitem()[0] if self.other_names else (None, b"")

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class Descriptors:
    """The objects with an open descriptor that can be opened again, the least recently used first."""

    def __init__(self, capacity: int) -> None:
        """`capacity`: at least 16, of which one operation may use half a dozen at a time."""
        self._capacity = capacity
        self._open: OrderedDict[Object, None] = OrderedDict()
        self._trees: OrderedDict[Rootfs, None] = OrderedDict()

    def entered(self, tree: "Rootfs") -> None:
        """`tree` holds a descriptor of its root now. Beyond half the capacity those give it up that can."""
        self._trees[tree] = None
        for _ in range(8):
            if len(self._trees) <= self._capacity // 2:
                break
            oldest = next(iter(self._trees))
            if oldest is tree or not oldest.give_up():
                self._trees.move_to_end(oldest)

    def left(self, tree: "Rootfs") -> None:
        """`tree` holds none any more."""
        self._trees.pop(tree, None)

    def used(self, thing: Object) -> None:
        """`thing` has a descriptor and it was just used; the one not used for longest may be closed."""
        self._open[thing] = None
        self._open.move_to_end(thing)
        self._close_oldest()

    def opened(self, chain: Sequence[Object]) -> None:
        """Each of `chain` was just opened, in the one before it.

        However long it is, the descriptors that the operation under way asked for before stay open.
        """
        near = max(1, self._capacity // 8)
        for thing in chain[-near:]:
            self._open[thing] = None
        for thing in chain[:-near]:
            self._open[thing] = None
            self._open.move_to_end(thing, last=False)
        self._close_oldest()

    def _close_oldest(self) -> None:
        while len(self._open) > self._capacity:
            oldest, _ = self._open.popitem(last=False)
            os.close(oldest.fd)
            oldest.fd = -1

    def discard(self, thing: Object) -> None:
        """The descriptor of `thing` must stay open, or is closed by whoever calls."""
        self._open.pop(thing, None)


@dataclass(frozen=True, slots=True)
class Opened:
    """What a rootfs is served from. `close` gives up the descriptors; called once."""

    lower: Lower
    readers: Sequence[LayerReader]
    """One for each layer of `lower`."""
    upper: Upper | None
    close: Callable[[], None]
    moved: Sequence[bytes] = ()
    """The paths of the directories that merge with lower ones of another name."""


class Opener(Protocol):
    """Where a rootfs comes from."""

    def open(self) -> Opened:
        """Blocking, in a worker thread."""

    def peek(self) -> Attr | None:
        """Attributes of a root that nobody has entered yet. Blocking. None: opening it changes nothing."""

    def peek_xattrs(self) -> Xattrs | None:
        """As `peek`."""

    def hold(self) -> Closable:
        """Keep the container from being deleted while something is open in it. Quick. Raises Locked."""


class OpenFile(FileHandle):
    """An open regular file. One opened in a layer follows its object when that is copied up."""

    __slots__ = ("_extents", "_fd", "_reader", "_size", "branch", "node")

    def __init__(self, branch: "Rootfs", node: Object, fd: int) -> None:
        self.branch = branch
        self.node: Object = node
        self._fd = fd
        if fd < 0:
            self._reader, self._extents, self._size = branch.content(node)

    def read(self, offset: int, size: int) -> Maybe[bytes]:
        if self._fd < 0 and self.node.in_upper:
            self._fd = self.branch.reopen(self.node, os.O_RDONLY)
        if self._fd >= 0:
            data = pread_now(self._fd, size, offset)
            return self._read_upper(offset, size) if data is None else data
        size = min(size, self._size - offset)
        if size <= 0:
            return b""
        extents = self._extents
        if len(extents) == 1 and extents[0].length == self._size:
            source = extents[0].source + offset
            data = self._reader.read_now(source, size)
            return self._read_decoded(source, size) if data is None else data
        return self._read_sparse(offset, size)

    def _read_upper(self, offset: int, size: int) -> Steps[bytes]:
        data: bytes = yield lambda: os.pread(self._fd, size, offset)
        return data

    def _read_decoded(self, source: int, size: int) -> Steps[bytes]:
        data: bytes = yield lambda: self._reader.read(source, size)
        return data

    def _read_sparse(self, offset: int, size: int) -> Steps[bytes]:
        data: bytes = yield lambda: read_extents(self._reader, self._extents, offset, size)
        return data

    def runs(self, size: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of each run of data in the first `size` bytes, ascending: all else is holes."""
        if self._fd < 0:
            yield from ((extent.offset, extent.length) for extent in self._extents)
            return
        end = 0
        while end < size:
            try:
                start = os.lseek(self._fd, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # lseek(2): no data from there on
                    return
                raise
            end = min(os.lseek(self._fd, start, os.SEEK_HOLE), size)
            if start < end:
                yield start, end - start

    def write(self, offset: int, data: bytes) -> Maybe[int]:
        return self._write_counted(offset, data) if self.branch.must_count else self._write(offset, data)

    def _write_counted(self, offset: int, data: bytes) -> Steps[int]:
        yield from self.branch.prepare()
        return self._write(offset, data)

    def _write(self, offset: int, data: bytes) -> int:
        """Leaves mtime: with the writeback cache the kernel says what it is, by setattr (fuse-io.rst).

        It may say nothing, for a file younger than its clock's tick: then that time stays.
        """
        before = os.fstat(self._fd)
        quota = self.branch.quota
        if quota is not None:
            quota.require_write(before, offset, len(data))
        written = os.pwrite(self._fd, data, offset)
        os.utime(self._fd, ns=(before.st_atime_ns, before.st_mtime_ns))
        if quota is not None:
            quota.changed(before, os.fstat(self._fd))
        return written

    def truncate(self, size: int) -> None:
        with self.branch.charged(self._fd):
            os.ftruncate(self._fd, size)

    def fsync(self, datasync: bool) -> Maybe[None]:
        if self._fd < 0 and self.node.in_upper:
            self._fd = self.branch.reopen(self.node, os.O_RDONLY)
        return self._sync(os.fdatasync if datasync else os.fsync) if self._fd >= 0 else None

    def _sync(self, sync: Callable[[int], None]) -> Steps[None]:
        yield lambda: sync(self._fd)

    def close(self) -> None:
        try:
            if self._fd >= 0:
                self._close()
        finally:
            self.branch.end_use()

    def _close(self) -> None:
        """XFS takes more for a file that grows than is written, and gives it back when it is closed."""
        with contextlib.ExitStack() as stack:
            try:
                if self.branch.quota is not None:
                    same = os.open(f"/proc/self/fd/{self._fd}", os.O_PATH | os.O_CLOEXEC)
                    stack.callback(os.close, same)
                    stack.enter_context(self.branch.charged(same))
            finally:
                os.close(self._fd)


def read_extents(reader: LayerReader, extents: Sequence[Extent], offset: int, size: int) -> bytes:
    """`size` bytes at `offset` of a sparse file that reaches that far. Blocking."""
    result = bytearray(size)
    for extent in extents:
        start = max(offset, extent.offset)
        end = min(offset + size, extent.offset + extent.length)
        if start < end:
            data = reader.read(extent.source + start - extent.offset, end - start)
            result[start - offset : end - offset] = data
    return bytes(result)


_NO_OBJECTS: WeakValueDictionary[Ref | int, Object] = WeakValueDictionary()
_NONE_MOVED: dict[bytes, Object] = {}
"""Of trees that were never opened: these two, empty, take a kilobyte."""


class Rootfs(Branch):
    """A read-only tree of layers. Opened on first use; `detach` ends it.

    A mount has three for each container it was asked about, most of which nobody ever enters: they are small
    until then.
    """

    __slots__ = (
        "_descriptors",
        "_hold",
        "_inodes",
        "_is_detached",
        "_moved",
        "_objects",
        "_opened",
        "_opener",
        "_outer",
        "_quota_limit",
        "_serial",
        "_uses",
        "label",
        "must_count",
        "quota",
        "root",
    )

    absence_timeout_s = FOREVER_S
    object_type: ClassVar[type[Object]] = Object

    def __init__(
        self,
        inodes: Inodes,
        descriptors: Descriptors,
        serial: int,
        outer: Node,
        opener: Opener,
        label: bytes = b"",
    ) -> None:
        """`serial` tells the trees of a mount apart in inode numbers; `outer` is what '..' of the root is."""
        self.label = label
        """Shown as security.selinux on what carries none; empty for nothing."""
        self._inodes = inodes
        self._descriptors = descriptors
        self._serial = serial
        self._outer = outer
        self._opener = opener
        self._opened: Opened | None = None
        self._is_detached = False
        self._uses = 0
        self._hold: Closable | None = None
        self.quota: Quota | None = None
        """What changes are charged to; None where there is no limit, and while `must_count`."""
        self._quota_limit: int | None = None
        self.must_count = False
        self._objects = _NO_OBJECTS
        self._moved = _NONE_MOVED
        """Where directories of the image are that were renamed, by their path in the image."""
        self.root = RootObject(self, inodes.number(), None, b"", Resolved(-1, (), stat.S_IFDIR))

    # Life

    @property
    def ready(self) -> bool:
        return self._opened is not None and not self.must_count

    def prepare(self) -> Steps[None]:
        if self._is_detached:
            raise Stale("the container is gone")
        if self._opened is None:
            opened = yield self._opener.open
            if self._opened is not None or self._is_detached:
                opened.close()
            else:
                self._take(opened)
        yield from self._count()

    def set_quota(self, limit: int | None) -> None:
        """What the changes may take on disk, in bytes; None: any number.

        What they take now is counted before the next request is served.
        """
        self._quota_limit = limit
        if limit is None:
            self.quota, self.must_count = None, False
        elif self.quota is not None:
            self.quota.limit = limit
        else:
            self.must_count = not self._is_detached

    def _count(self) -> Steps[None]:
        if not self.must_count or self._opened is None:
            return
        # A descriptor of its own: the tree may be let go meanwhile.
        root = os.dup(self.root.fd)
        try:
            used = yield lambda: usage(root)
        finally:
            os.close(root)
        if self.must_count and self._quota_limit is not None:
            self.quota, self.must_count = Quota(self._quota_limit, used), False

    def open_now(self) -> None:
        """`prepare`, in this thread. Blocking."""
        self._take(self._opener.open())

    def _take(self, opened: Opened) -> None:
        self._opened = opened
        if self._objects is _NO_OBJECTS:
            self._objects = WeakValueDictionary()
            self._moved = {}
        self.root.stack = opened.lower.root
        self.root.in_upper = opened.upper is not None
        if opened.upper is not None:
            self.root.fd = opened.upper.root
            self._descriptors.entered(self)
        for path in opened.moved:
            directory = self._walk(self.root, path)
            if directory is not None and directory.stack:
                self._moved[opened.lower.directory_path(directory.stack)] = directory

    def give_up(self) -> bool:
        """Close all descriptors, to open them again when asked, if nothing is lost by it."""
        held = (thing.is_orphan or thing.parent is None for thing in self._objects.values())
        if self.in_use or any(held):
            return False
        self._release()
        return True

    @property
    def attached(self) -> bool:
        return self._opened is not None

    is_doorway = False
    is_covered = False

    def before_enter(self) -> None:
        pass

    def require_hope(self, pid: int) -> None:
        pass

    def enter(self, pid: int) -> "Rootfs":
        return self

    def leave(self) -> None:
        pass

    @property
    def in_use(self) -> bool:
        """Whether a file or directory is open in it."""
        return self._uses > 0

    def detach(self) -> None:
        """Give up all descriptors. What the kernel still knows of the tree answers ESTALE.

        Files that are open stay so, and are charged to the quota as before.
        """
        self._is_detached = True
        quota = self.quota
        self._release()
        self.quota, self.must_count = quota, False

    def _release(self) -> None:
        for thing in self._objects.values():
            self._close_descriptor(thing)
        self.root.fd = -1
        self._descriptors.left(self)
        self.quota, self.must_count = None, self._quota_limit is not None
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()

    def _close_descriptor(self, thing: Object) -> None:
        self._descriptors.discard(thing)
        if thing.fd >= 0:
            os.close(thing.fd)
            thing.fd = -1

    def begin_use(self) -> None:
        """Something is opened. Raises Locked while the container is being deleted."""
        if self._uses == 0:
            self._hold = self._opener.hold()
        self._uses += 1

    @contextlib.contextmanager
    def charged(self, fd: int) -> Iterator[None]:
        """Around a change of the upper's object `fd`: what it takes more or less is charged to the quota."""
        quota = self.quota
        if quota is None:
            yield
            return
        before = os.fstat(fd)
        try:
            yield
        finally:
            quota.changed(before, os.fstat(fd))

    def end_use(self) -> None:
        self._uses -= 1
        if self._uses == 0 and self._hold is not None:
            self._hold.close()
            self._hold = None

    @property
    def opened(self) -> Opened:
        if self._opened is None:
            raise Stale("the container is gone")
        return self._opened

    @property
    def _lower(self) -> Lower:
        return self.opened.lower

    # Names

    def lookup(self, node: Node, name: bytes) -> Object:
        child = self.child(_object(node), name)
        if child is None:
            raise NotFound("no such file or directory")
        return child

    def child(self, directory: Object, name: bytes) -> Object | None:
        """The object called `name` now; None when there is none."""
        what = self.resolve(directory, name)
        return None if what is None else self.materialize(directory, name, what)

    def resolve(self, directory: Object, name: bytes) -> Resolved | None:
        """What `name` leads to, without making an object of it."""
        if directory.is_orphan:
            return None
        opened = self.opened
        found = None
        if directory.in_upper and opened.upper is not None:
            found = opened.upper.find(self.descriptor(directory), name)
        merged = over(found.entry if found else None, opened.lower, directory.stack, name)
        if merged is None:
            return None
        if merged.in_upper and found is not None:
            return Resolved(found.ino, merged.lower, found.format)
        return opened.lower.resolved(merged.lower)

    def materialize(self, directory: Object, name: bytes, what: Resolved) -> Object:
        """The one object for what `name` was found to be."""
        thing = self._objects.get(what.key)
        if thing is None or thing.format != what.format or (not thing.lookups and thing.stack != what.stack):
            thing = self.object_type(self, self._ino(directory, name, what), directory, name, what)
            self._objects[what.key] = thing
            return thing
        if thing.lookups == 0:
            # Its number may have become another's while the kernel did not know it.
            thing.ino = self._inodes.number(thing.ino)
        thing.meet(directory, name)
        return thing

    def _ino(self, directory: Object, name: bytes, what: Resolved) -> Inode:
        """A number for an object that the kernel does not know: a copy has that of what it is a copy of."""
        upper = self.opened.upper
        origin = None
        if isinstance(what.key, int) and upper is not None:
            origin = upper.origin(self.descriptor(directory), name)
        return self._inodes.number(self._number(origin or what.key))

    def _number(self, key: Ref | int) -> int | None:
        """An inode number made of the place: 21 bits of tree, 9 of layer, 32 of inode there."""
        layer, ino = Ref(_LAYER_OF_UPPER, key) if isinstance(key, int) else key
        if layer >= _LAYER_OF_UPPER and not isinstance(key, int):
            return None
        if self._serial >= _SERIAL_LIMIT or ino >= 1 << 32:
            return None
        return (self._serial + 1) << 41 | layer << 32 | ino

    def listing(self, node: Node) -> Maybe[list[tuple[bytes, Any]]]:
        directory = _object(node)
        if directory.is_orphan:
            return []
        return [(name, (directory.version, what)) for name, what in self.contents(directory).items()]

    def contents(self, directory: Object) -> Mapping[bytes, Resolved]:
        """Every name of a directory and what it leads to; the lower's first."""
        opened = self.opened
        lower = opened.lower.listing(directory.stack)
        if not directory.in_upper or opened.upper is None:
            return lower
        names = dict(lower)
        for name, found in opened.upper.listing(self.descriptor(directory)):
            merged = over(found.entry, opened.lower, directory.stack, name)
            if merged is None:
                names.pop(name, None)
            else:
                names[name] = Resolved(found.ino, merged.lower, found.format)
        return names

    def listed(self, node: Node, name: bytes, token: Any) -> Node | None:
        directory = _object(node)
        version, what = token
        if version == directory.version:
            return self.materialize(directory, name, what)
        return self.child(directory, name)

    def parent(self, node: Node) -> Node:
        above = _object(node).parent
        if above is None:
            return self._outer
        if above.lookups or above.parent is None:
            return above
        return self.materialize(above.parent, above.name, Resolved(above.key, above.stack, above.format))

    # Attributes

    def attr(self, node: Node) -> Attr:
        thing = _object(node)
        opened = self.opened
        if thing.in_upper and opened.upper is not None:
            attr = opened.upper.attr(self.descriptor(thing))
            is_merged = bool(thing.stack) and thing.format == stat.S_IFDIR
            return replace(attr, nlink=2 + self._count_subdirectories(thing)) if is_merged else attr
        attr = opened.lower.attr(thing.stack)
        if thing.is_orphan:
            return replace(attr, nlink=0)
        if attr.nlink > 1 and thing.format != stat.S_IFDIR and opened.upper is not None:
            return replace(attr, nlink=max(1, self._count_links(thing)))
        return attr

    def peek(self, node: Node) -> Steps[Attr]:
        if self._is_detached:
            raise Stale("the container is gone")
        peeked = (yield self._opener.peek) if node is self.root else None
        # What was seen may have changed, if others came in meanwhile.
        if peeked is not None and not self.ready:
            return cast(Attr, peeked)
        yield from self.prepare()
        return self.attr(node)

    def peek_xattrs(self, node: Node) -> Steps[Xattrs]:
        if self._is_detached:
            raise Stale("the container is gone")
        peeked = (yield self._opener.peek_xattrs) if node is self.root else None
        if peeked is not None and not self.ready:
            return self._labelled(cast(Xattrs, peeked))
        yield from self.prepare()
        return self.xattrs(node)

    def _count_links(self, thing: Object) -> int:
        if thing.links < 0:
            self.find_names(thing)
        return thing.links

    def find_names(self, thing: Object) -> None:
        """Look for all names of a lower non-directory. It takes as long as there are names."""
        places = self.places(thing)
        if places:
            thing.settle(places)
        thing.links = len(places)

    def _count_subdirectories(self, directory: Object) -> int:
        if directory.is_orphan:
            return -2
        if directory.subdirectories < 0:
            formats = [what.format for what in self.contents(directory).values()]
            directory.subdirectories = formats.count(stat.S_IFDIR)
        return directory.subdirectories

    def places(self, thing: Object) -> list[tuple[Object, bytes]]:
        """Every (directory, name) that leads to a lower non-directory now, the one it is known by first."""
        names = self.known_names(thing)
        for path in self._lower.paths(thing.stack[0]):
            directory = self._place_of(os.path.dirname(path))
            if directory is not None:
                names[directory, os.path.basename(path)] = None
        return [place for place in names if self.leads_to(place, thing)]

    def known_names(self, thing: Object) -> dict[tuple[Object, bytes], None]:
        """The names `thing` was met under, the last one first. Some may lead elsewhere by now."""
        names: dict[tuple[Object, bytes], None] = {}
        if thing.parent is not None:
            names[thing.parent, thing.name] = None
        return names | (thing.other_names or {})

    def leads_to(self, place: tuple[Object, bytes], thing: Object) -> bool:
        what = self.resolve(*place)
        return what is not None and what.key == thing.key

    def _place_of(self, path: bytes) -> Object | None:
        """Where the directory of the image at `path` is now; None, or another one, where it is gone."""
        above = path if self._moved else b""
        while above:
            moved = self._moved.get(above)
            if moved is not None:
                return self._walk(moved, path[len(above) :])
            above = os.path.dirname(above)
        return self._walk(self.root, path)

    def _walk(self, directory: Object, path: bytes) -> Object | None:
        """The directory at `path` from another, no link followed; None when there is none."""
        for name in path.split(b"/"):
            if name:
                what = self.resolve(directory, name)
                if what is None or what.format != stat.S_IFDIR:
                    return None
                directory = self.materialize(directory, name, what)
        return directory

    def readlink(self, node: Node) -> bytes:
        thing = _object(node)
        upper = self.opened.upper
        if thing.in_upper and upper is not None:
            return upper.readlink(self.descriptor(thing))
        return self._lower.target(thing.stack)

    def xattrs(self, node: Node) -> Xattrs:
        thing = _object(node)
        upper = self.opened.upper
        if thing.in_upper and upper is not None:
            shown = upper.xattrs(self.descriptor(thing))
        else:
            shown = self._lower.xattrs(thing.stack)
        return self._labelled(shown)

    def _labelled(self, xattrs: Xattrs) -> Xattrs:
        if self.label and all(name != _SELINUX for name, _ in xattrs):
            return (*xattrs, (_SELINUX, self.label))
        return xattrs

    def xattr(self, node: Node, name: bytes) -> bytes:
        thing = _object(node)
        upper = self.opened.upper
        if thing.in_upper and upper is not None:
            with contextlib.suppress(NoAttribute):
                return upper.xattr(self.descriptor(thing), name)
        else:
            for known, value in self._lower.xattrs(thing.stack):
                if known == name:
                    return value
        if name == _SELINUX and self.label:
            return self.label
        raise NoAttribute("no such attribute")

    def path(self, node: Node) -> bytes:
        names = []
        at: Object | None = _object(node)
        while at is not None and at is not self.root:
            names.append(at.name)
            at = at.parent
        if at is None:
            return b""  # it lost its last name
        outer = self._outer.branch.path(self._outer)
        return b"/".join([*([outer] if outer else []), *reversed(names)])

    # Content

    def open(self, node: Node, flags: int, caller: Caller) -> Maybe[FileHandle]:
        thing = _object(node)
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            raise ReadOnly("images are read-only")
        return self.open_for(thing, os.O_RDONLY)

    def open_for(self, thing: Object, flags: int) -> OpenFile:
        """An open file that counts as use; lower files with O_RDONLY only."""
        if thing.format == stat.S_IFDIR:
            raise IsADirectory("is a directory")
        self.begin_use()
        try:
            return OpenFile(self, thing, self.reopen(thing, flags) if thing.in_upper else -1)
        except BaseException:
            self.end_use()
            raise

    def reopen(self, thing: Object, flags: int) -> int:
        """A descriptor for the content of an upper file, the caller's to close."""
        upper = self.opened.upper
        if upper is None:
            raise ReadOnly("images are read-only")
        return upper.reopen(self.descriptor(thing), flags)

    def content(self, thing: Object) -> tuple[LayerReader, tuple[Extent, ...], int]:
        """Where the content of a lower file lies: reader, extents, size."""
        ref = thing.stack[0]
        index = self._lower.layers[ref.layer]
        return self.opened.readers[ref.layer], index.extents(ref.ino), index.attr(ref.ino).size

    def opened_dir(self, node: Node) -> Maybe[None]:
        self.begin_use()
        return None

    def closed_dir(self, node: Node) -> None:
        self.end_use()

    # Descriptors

    def descriptor(self, thing: Object) -> int:
        """An O_PATH descriptor of an upper object; it stays the object's."""
        if thing.fd >= 0:
            if thing.parent is not None and not thing.is_orphan:
                self._descriptors.used(thing)
            return thing.fd
        chain = []
        at: Object | None = thing
        while at is not None and at.fd < 0:
            chain.append(at)
            at = at.parent
        upper = self.opened.upper
        if at is None or upper is None:
            raise Stale("the container is gone")
        fd = at.fd
        opened: list[Object] = []
        try:
            for below in reversed(chain):
                fd = below.fd = upper.open(fd, below.name)
                opened.append(below)
        finally:
            self._descriptors.opened(opened)
        return fd

    def forgotten(self, node: Node) -> bool:
        thing = _object(node)
        thing.links = thing.subdirectories = -1
        if thing is not self.root:
            if self.quota is not None and thing.is_orphan and thing.fd >= 0:
                self.quota.removed(os.fstat(thing.fd))
            self._close_descriptor(thing)
        elif not self.in_use and not any(known.lookups for known in self._objects.values()):
            self._release()  # opened again when somebody comes back
        return not thing.is_orphan

    def recall(self, node: Node) -> None:
        thing = _object(node)
        while thing.parent is not None and self.leads_to((thing.parent, thing.name), thing):
            thing = thing.parent
        if thing is not self.root:
            raise Stale("the file is gone, or another mount has moved it")


class RootObject(Object):
    """The root of a rootfs. Until that is opened its attributes are a guess the kernel must not keep.

    Its descriptor belongs to what `Opener.open` gave.
    """

    __slots__ = ()

    def __del__(self) -> None:
        pass

    @property
    def attr_timeout_s(self) -> float:  # type: ignore[override]
        return cast(Rootfs, self.branch).object_type.attr_timeout_s if self.branch.ready else 0.0


def _object(node: Node) -> Object:
    assert isinstance(node, Object)
    return node
