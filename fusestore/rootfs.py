"""A file tree served from layers and, where there is one, an upper directory: looking and reading. Blocking.

Inode numbers are made of the place where an object lies, of a copy of what it is a copy of, so that they are
the same after the kernel forgot and asked again.

What a name leads to is always asked of `union.over`. An object whose last name is gone (an orphan) keeps its
descriptor and answers until the kernel forgets it.

`fusestore.writable` adds the changes.
"""

import contextlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast
from weakref import WeakValueDictionary

from .blobs import LayerReader
from .errors import IsADirectory, NoAttribute, NotFound, ReadOnly, Stale
from .inodes import FOREVER_S, Branch, Caller, Closable, FileHandle, Inodes, Maybe, Node, Steps
from .nodes import Attr, Extent, Xattrs
from .objects import Descriptors, Object, RootObject
from .openfile import OpenFile
from .quota import Quota, usage
from .union import Lower, Ref, Resolved, over
from .upper import Upper

__all__ = ["Opened", "Opener", "Rootfs"]

_SELINUX = b"security.selinux"
_SERIAL_LIMIT = (1 << 21) - 1
"""The bit above is of the numbers that `Inodes.number` makes up."""
_LAYER_OF_UPPER = 511


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

    def moved_to(self, place: str) -> None:
        """What is opened next is there: the container's new id, or the path of a directory of its own."""


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
        self.root = RootObject(self, inodes.number(), self.object_type.attr_timeout_s)

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

    def be_asked(self, until: float) -> None:
        pass

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

    def moved_to(self, place: str) -> None:
        """The container was renamed while nobody used it: what is open lies where it lay."""
        self._opener.moved_to(place)

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
        if self._hold is None:
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

    def begin_file(self) -> None:
        self._descriptors.begin_file()

    def end_file(self) -> None:
        self._descriptors.end_file()

    def end_use(self) -> None:
        self._uses -= 1
        if self._uses == 0:
            self._descriptors.idle(self)

    def rest(self) -> None:
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

    def materialize(self, directory: Object, name: bytes, what: Resolved, is_new: bool = False) -> Object:
        """The one object for what `name` was found to be. `is_new`: it was just made, and is no copy."""
        thing = self._objects.get(what.key)
        if thing is None or thing.format != what.format or (not thing.lookups and thing.stack != what.stack):
            origin = None if is_new else self._origin(directory, name, what)
            # A copy has the number of what it is a copy of.
            ino = self._inodes.number(self._number(origin or what.key))
            thing = self.object_type(self, ino, directory, name, what)
            self._objects[what.key] = thing
            return thing
        if thing.lookups == 0:
            # Its number may have become another's while the kernel did not know it.
            thing.ino = self._inodes.number(thing.ino)
        thing.meet(directory, name)
        return thing

    def _origin(self, directory: Object, name: bytes, what: Resolved) -> Ref | None:
        """What the object in the upper is a copy of."""
        upper = self.opened.upper
        if isinstance(what.key, int) and upper is not None:
            return upper.origin(self.descriptor(directory), name)
        return None

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
            return attr._replace(nlink=2 + self._count_subdirectories(thing)) if is_merged else attr
        attr = opened.lower.attr(thing.stack)
        if thing.is_orphan:
            return attr._replace(nlink=0)
        if attr.nlink > 1 and thing.format != stat.S_IFDIR and opened.upper is not None:
            return attr._replace(nlink=max(1, self._count_links(thing)))
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
            value = upper.xattr(self.descriptor(thing), name)
        else:
            value = next((value for known, value in self._lower.xattrs(thing.stack) if known == name), None)
        if value is None and name == _SELINUX:
            value = self.label or None
        if value is None:
            raise NoAttribute("no such attribute")
        return value

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
            if not thing.in_upper:
                return OpenFile(self, thing, -1)
            self.begin_file()
            try:
                return OpenFile(self, thing, self.reopen(thing, flags))
            except BaseException:
                self.end_file()
                raise
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


def _object(node: Node) -> Object:
    assert isinstance(node, Object)
    return node
