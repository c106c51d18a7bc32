"""The objects of a rootfs, and those of them that have an open descriptor. Blocking.

An `Object` is one file, directory … of the tree, whether it lies in a layer, in the upper or (a directory) in
both. Its identity, and with it the inode number, is where its content lies: a reference into a layer or an
inode of the upper; copy-up moves the object from the one to the other and keeps the number.

Objects hold no list of their children. The descriptors of all trees of a mount are one cache (`Descriptors`):
an object that can be opened again by its name may lose its own whenever another is opened.
"""

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

from .inodes import Branch, Node
from .nodes import Inode
from .union import Resolved

__all__ = ["Descriptors", "Object", "RootObject"]


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
        self, branch: Branch, ino: Inode, parent: "Object | None", name: bytes, what: Resolved
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
        """O_PATH descriptor of an upper object, or -1: then its rootfs opens it when asked."""
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


class RootObject(Object):
    """The root of a rootfs. Until that is opened its attributes are a guess the kernel must not keep.

    Its descriptor belongs to what `Opener.open` gave.
    """

    __slots__ = ("_kept_s",)

    def __init__(self, branch: Branch, ino: Inode, kept_s: float) -> None:
        """`kept_s`: how long the kernel may believe its attributes, once they are known."""
        super().__init__(branch, ino, None, b"", Resolved(-1, (), stat.S_IFDIR))
        self._kept_s = kept_s

    def __del__(self) -> None:
        pass

    @property
    def attr_timeout_s(self) -> float:  # type: ignore[override]
        return self._kept_s if self.branch.ready else 0.0


class Tree(Protocol):
    """What has a root with a descriptor."""

    def give_up(self) -> bool:
        """Close all descriptors, to open them again when asked, if nothing is lost by it."""

    def rest(self) -> None:
        """Let the container be deleted, if nothing is open in it."""


class Descriptors:
    """The objects with an open descriptor that can be opened again, the least recently used first."""

    def __init__(self, capacity: int) -> None:
        """`capacity`: at least 16, of which one operation may use half a dozen at a time. Beside them there
        may be two and a half times as many open files."""
        self._capacity = capacity
        self._files = 0
        self._open: OrderedDict[Object, None] = OrderedDict()
        self._trees: OrderedDict[Tree, None] = OrderedDict()
        self._idle: set[Tree] = set()

    def begin_file(self) -> None:
        """A file with a descriptor is to be opened; `end_file` follows. Raises EMFILE where the last ones
        would go: everything else needs some for a moment."""
        if self._files >= 5 * self._capacity // 2:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        self._files += 1

    def end_file(self) -> None:
        self._files -= 1

    def entered(self, tree: Tree) -> None:
        """`tree` holds a descriptor of its root now. Beyond half the capacity those give it up that can."""
        self._trees[tree] = None
        for _ in range(8):
            if len(self._trees) <= self._capacity // 2:
                break
            oldest = next(iter(self._trees))
            if oldest is tree or not oldest.give_up():
                self._trees.move_to_end(oldest)

    def left(self, tree: Tree) -> None:
        """`tree` holds none any more."""
        self._trees.pop(tree, None)

    def idle(self, tree: Tree) -> None:
        """Nothing is open in `tree` any more. It keeps its container until `rest`: most come back at once."""
        self._idle.add(tree)

    def rest(self) -> None:
        """Have idle trees let go of their containers. To be called before anybody else gets to run."""
        while self._idle:
            self._idle.pop().rest()

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
