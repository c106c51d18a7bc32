"""What a container changed in its image: the walk that a diff and a commit share. Blocking.

Two trees are compared, name by name: the image's layers alone, and the same with the container's upper over
them. Only directories that the upper has are looked into, so the cost grows with what was changed, not with
the image. A file that the upper has counts as changed, as for podman: one copied up and written with the
bytes it had is listed. A directory is listed when its attributes differ, or a name in it came or went.

A directory of the image that was renamed is, at its new place, all new: neither diff nor layers know renames.
"""

import enum
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .nodes import Attr
from .objects import Object
from .rootfs import Rootfs
from .union import Resolved, Stack

__all__ = ["Change", "Kind", "changes", "differences", "everything"]


class Kind(enum.Enum):
    """In the letters of `podman diff` and `docker diff`."""

    ADDED = "A"
    CHANGED = "C"
    DELETED = "D"


@dataclass(frozen=True, slots=True)
class Change:
    """One name that a layer made of the container has to mention."""

    path: bytes
    """From the root, without a leading slash; b"" for the root itself."""
    kind: Kind | None
    """None: as in the image, but mentioned all the same: the way to a change, or below `is_opaque`."""
    thing: Object | None
    """None for what was deleted."""
    is_opaque: bool = False
    """A directory in place of one of the image's, of which nothing is in it by itself."""


def differences(tree: Rootfs) -> Iterator[tuple[Kind, bytes]]:
    """The paths that differ from the image, sorted, a directory before what is in it; without the root.

    `tree` is open. It must not change meanwhile, or what is being changed may be listed either way.
    """
    return ((change.kind, change.path) for change in changes(tree) if change.kind and change.path)


def changes(tree: Rootfs) -> Iterator[Change]:
    """What a layer has to mention so that the image, with it on top, is `tree`; the root first.

    Raises nothing for an upper that was never made: there is no change then, not even the root.
    """
    if tree.opened.upper is None:
        return
    lower = tree.opened.lower
    root = tree.root
    had = lower.listing(lower.root)
    has = tree.contents(root)
    kind = Kind.CHANGED if _differs(tree, root, lower.root) or had.keys() != has.keys() else None
    yield Change(b"", kind, root)
    yield from _walk(_Level(tree, b"", root, had, has, is_whole=False))


def everything(tree: Rootfs) -> Iterator[Change]:
    """All of the tree as something new, the root first: what a layer under which there is none mentions."""
    yield Change(b"", Kind.ADDED, tree.root)
    yield from _walk(_Level(tree, b"", tree.root, {}, tree.contents(tree.root), is_whole=True))


def _walk(top: "_Level") -> Iterator[Change]:
    """Not recursive: a tree may be deeper than Python's stack."""
    levels = [top.changes()]
    while levels:
        found = next(levels[-1], None)
        if found is None:
            levels.pop()
            continue
        change, inside = found
        yield change
        if inside is not None:
            levels.append(inside.changes())


class _Level:
    """One directory of the container beside the one of its path in the image."""

    def __init__(
        self,
        tree: Rootfs,
        path: bytes,
        directory: Object,
        had: Mapping[bytes, Resolved],
        has: Mapping[bytes, Resolved],
        *,
        is_whole: bool,
    ) -> None:
        """`is_whole`: nothing of the image is in it by itself, so everything is mentioned."""
        self._tree = tree
        self._path = path
        self._directory = directory
        self._had = had
        self._has = has
        self._is_whole = is_whole

    def changes(self) -> Iterator[tuple[Change, "_Level | None"]]:
        """Each change right here, and the level to go on with before the next."""
        for name in sorted(self._had.keys() | self._has.keys()):
            path = self._path + b"/" + name if self._path else name
            what = self._has.get(name)
            before = self._had[name].stack if name in self._had else ()
            if what is None:
                yield Change(path, Kind.DELETED, None), None
            elif self._is_whole or isinstance(what.key, int) or what.stack != before:
                thing = self._tree.materialize(self._directory, name, what)
                if what.format == stat.S_IFDIR:
                    yield self._directory_change(path, thing, before)
                else:
                    yield Change(path, self._kind(thing, before), thing), None

    def _directory_change(self, path: bytes, thing: Object, before: Stack) -> tuple[Change, "_Level"]:
        lower = self._tree.opened.lower
        replaces = lower.is_directory(before)
        is_merged = replaces and thing.stack == before
        had = lower.listing(before if replaces else ())
        has = self._tree.contents(thing)
        kind: Kind | None = Kind.CHANGED if before else Kind.ADDED
        if replaces and had.keys() == has.keys() and not _differs(self._tree, thing, before):
            kind = None
        is_whole = self._is_whole or not is_merged
        change = Change(path, kind, thing, is_opaque=replaces and not is_merged)
        return change, _Level(self._tree, path, thing, had, has, is_whole=is_whole)

    def _kind(self, thing: Object, before: Stack) -> Kind | None:
        if not before:
            return Kind.ADDED
        return None if thing.stack == before and not thing.in_upper else Kind.CHANGED


def _differs(tree: Rootfs, thing: Object, before: Stack) -> bool:
    """Whether a directory's attributes are others than the image's."""
    lower = tree.opened.lower
    if not before:
        return False  # the root of no image at all
    if _shown(tree.attr(thing)) != _shown(lower.attr(before)):
        return True
    return sorted(tree.xattrs(thing)) != sorted(lower.xattrs(before))


def _shown(attr: Attr) -> tuple[int, ...]:
    return attr.mode, attr.uid, attr.gid, attr.mtime_ns
