"""The union: an image's layers, and an upper directory over them, seen as one tree. Pure.

Precedence is written once, in `_fold` for the layers and in `over` for the upper; lookup and listing both go
through them. The rules are overlayfs's (Documentation/filesystems/overlayfs.rst, "Upper and Lower",
"whiteouts and opaque directories", "redirect_dir"):

* the topmost layer that has a name decides what it is; a whiteout there means that there is nothing;
* directories of one name in successive layers merge, down to an opaque one or to something else;
* an upper directory with a redirect merges with the lower directory at that path, not the one of its name.

A directory of the image is a `Stack`: the references of its parts, topmost first. Everything else is a stack
of one. Directories that a layer only implies (its tar has no entry for them) merge like others, but take
their attributes from the next layer down that has an entry, as unpacking tar over tar gives them.

A hard link to a file of a lower layer is that file: the name leads to the lower reference.
"""

import itertools
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from .errors import LayerRefused, StoreDamaged
from .layerindex import LayerIndex
from .nodes import Attr, Xattrs

__all__ = [
    "LayerView",
    "Lower",
    "Merged",
    "Ref",
    "Resolved",
    "Stack",
    "UpperEntry",
    "check_lower_links",
    "over",
]

_PRIVATE = (b"trusted.overlay.", b"user.overlay.")
_KEPT = 1 << 14
"""How many names, and how many attributes, one image's tree keeps in memory: some 10 MB."""


class Ref(NamedTuple):
    """An inode of a layer: layer number (0 is the bottom) and inode number in its index."""

    layer: int
    ino: int


Stack: TypeAlias = tuple[Ref, ...]


class Resolved(NamedTuple):
    """What a name leads to."""

    key: Ref | int
    """Where it lies: a reference into a layer, or the inode number in the file system of the upper."""
    stack: Stack
    """The lower object, or the lower directories merged under an upper one."""
    format: int
    """S_IFMT bits."""


@dataclass(frozen=True, slots=True)
class UpperEntry:
    """What an upper directory has under a name, as far as precedence goes."""

    is_whiteout: bool = False
    is_directory: bool = False
    is_opaque: bool = False
    redirect: bytes | None = None
    """overlayfs.rst, redirect_dir: an absolute path in the lower tree, or a name beside the own one."""


class Merged(NamedTuple):
    """What a name leads to: an object of the upper, of the lower, or a directory of both."""

    in_upper: bool
    lower: Stack
    """The lower object, or the lower directories merged below an upper one; empty when there are none."""


def over(entry: UpperEntry | None, lower: "Lower", parent: Stack, name: bytes) -> Merged | None:
    """What `name` is in a directory whose upper part has `entry` there and whose lower part is `parent`."""
    if entry is None:
        found = lower.lookup(parent, name)
        return Merged(False, found) if found else None
    if entry.is_whiteout:
        return None
    if not entry.is_directory or entry.is_opaque:
        return Merged(True, ())
    if entry.redirect is None:
        below = lower.lookup(parent, name)
    elif entry.redirect.startswith(b"/"):
        below = lower.walk(entry.redirect)
    else:
        below = lower.lookup(parent, entry.redirect)
    return Merged(True, below if lower.is_directory(below) else ())


class Lower:
    """An image's layers as one read-only tree. Layers are given bottom first; there may be none.

    The trees of an image share one: what was asked for last is kept, and threads may ask at once.
    """

    def __init__(self, layers: Sequence[LayerIndex]) -> None:
        self.layers = tuple(layers)
        self.root: Stack = self._roots(len(self.layers))
        self._link_targets: dict[Ref, Ref] = {}
        self._links_to: dict[Ref, set[bytes]] | None = None
        self._paths: dict[Ref, tuple[bytes, ...]] = {}
        self._subdirectories: dict[Stack, int] = {}
        self._attrs: dict[Stack, Attr] = {}
        self._listings: dict[Stack, dict[bytes, Resolved]] = {}
        self._listed = 0

    def _roots(self, count: int) -> Stack:
        """The merged root of the lowest `count` layers; an opaque root hides what is below it."""
        roots = []
        for number in reversed(range(count)):
            roots.append(Ref(number, LayerIndex.ROOT))
            if self.layers[number].is_opaque(LayerIndex.ROOT):
                break
        return tuple(roots)

    def _fold(self, candidates: Iterable[Ref]) -> Stack:
        """What one name is, given what each layer that has it says, topmost first. Empty: it is not there."""
        found: list[Ref] = []
        for ref in candidates:
            index = self.layers[ref.layer]
            if index.is_lower_link(ref.ino):
                return tuple(found) if found else (self._link_target(ref),)
            mode = index.mode(ref.ino)
            if not stat.S_ISDIR(mode):
                return tuple(found) if found or index.is_whiteout(ref.ino) else (ref,)
            found.append(ref)
            if index.is_opaque(ref.ino):
                break
        return tuple(found)

    def lookup(self, directory: Stack, name: bytes) -> Stack:
        """The object called `name`; an empty stack when there is none."""
        return self._fold(self._candidates(directory, name))

    def _candidates(self, directory: Stack, name: bytes) -> Iterator[Ref]:
        for layer, ino in directory:
            child = self.layers[layer].lookup(ino, name)
            if child is not None:
                yield Ref(layer, child)

    def resolved(self, stack: Stack) -> Resolved:
        """What a name leads to that `lookup` found `stack` for."""
        return Resolved(stack[0], stack, stat.S_IFMT(self.mode(stack)))

    def listing(self, directory: Stack) -> Mapping[bytes, Resolved]:
        """Every name of the directory with its object; sorted by name where one layer alone has it."""
        kept = self._listings.get(directory)
        if kept is None:
            kept = self._list(directory)
            if self._listed > _KEPT:
                self._listings, self._listed = {}, 0
            self._listings[directory] = kept
            self._listed += 1 + len(kept)
        return kept

    def _list(self, directory: Stack) -> dict[bytes, Resolved]:
        names: dict[bytes, list[Ref]] = {}
        for layer, ino in directory:
            for name, child in self.layers[layer].children(ino):
                names.setdefault(name, []).append(Ref(layer, child))
        found = ((name, self._fold(refs)) for name, refs in names.items())
        return {name: self.resolved(stack) for name, stack in found if stack}

    def walk(self, path: bytes) -> Stack:
        """The object at `path` from the root, no symbolic link followed; empty when there is none."""
        return self._walk_from(self.root, path)

    def _walk_from(self, stack: Stack, path: bytes) -> Stack:
        for name in path.split(b"/"):
            if not name:
                continue
            if not self.is_directory(stack):
                return ()
            stack = self.lookup(stack, name)
        return stack

    def is_directory(self, stack: Stack) -> bool:
        return bool(stack) and stat.S_ISDIR(self.mode(stack))

    def mode(self, stack: Stack) -> int:
        ref = stack[0]
        return self.layers[ref.layer].mode(ref.ino)

    def attr(self, stack: Stack) -> Attr:
        """Attributes as a tree unpacked from the layers would have them, link count included."""
        kept = self._attrs.get(stack)
        if kept is None:
            kept = self._attr(stack)
            if len(self._attrs) > _KEPT:
                self._attrs = {}
            self._attrs[stack] = kept
        return kept

    def _attr(self, stack: Stack) -> Attr:
        ref = self._speaker(stack)
        attr = self.layers[ref.layer].attr(ref.ino)
        if stat.S_ISDIR(attr.mode):
            nlink = attr.nlink if stack == (ref,) else 2 + self._count_subdirectories(stack)
        else:
            nlink = self.nlink(ref, attr.nlink)
        return attr if nlink == attr.nlink else attr._replace(nlink=nlink)

    def xattrs(self, stack: Stack) -> Xattrs:
        """Without what would act as overlayfs's own in a mount above: that is not the layer's to say."""
        ref = self._speaker(stack)
        stored = self.layers[ref.layer].xattrs(ref.ino)
        return tuple(item for item in stored if not item[0].startswith(_PRIVATE))

    def target(self, stack: Stack) -> bytes:
        """What a symbolic link says."""
        ref = stack[0]
        return self.layers[ref.layer].target(ref.ino)

    def _speaker(self, stack: Stack) -> Ref:
        """The part of a directory whose attributes count: the topmost with an entry in its layer's tar.

        An opaque marker hides what a directory holds, not the directory: the search goes on below it.
        """
        for ref in itertools.chain(stack, self._hidden_under(stack[-1])):
            index = self.layers[ref.layer]
            if not stat.S_ISDIR(index.mode(ref.ino)):
                break
            if not index.is_implicit(ref.ino):
                return ref
        return stack[0]

    def _hidden_under(self, directory: Ref) -> Iterator[Ref]:
        """What the layers below an opaque `directory` have in its place, topmost first."""
        if not self.layers[directory.layer].is_opaque(directory.ino):
            return
        if directory.ino == LayerIndex.ROOT:
            yield from (Ref(number, LayerIndex.ROOT) for number in reversed(range(directory.layer)))
            return
        head, _, name = self.directory_path((directory,)).rpartition(b"/")
        siblings = self._candidates(self.walk(head), name)
        yield from (ref for ref in siblings if ref.layer < directory.layer)

    def _count_subdirectories(self, stack: Stack) -> int:
        count = self._subdirectories.get(stack)
        if count is None:
            count = [child.format for child in self.listing(stack).values()].count(stat.S_IFDIR)
            self._subdirectories[stack] = count
        return count

    # Hard links

    def nlink(self, ref: Ref, own: int) -> int:
        """How many names of the merged tree lead to the non-directory `ref`; its layer alone has `own`."""
        if own == 1 and ref not in self._lower_links():
            return 1
        return max(1, len(self.paths(ref)))

    def paths(self, ref: Ref) -> tuple[bytes, ...]:
        """Every path of the merged tree, without a leading slash, that leads to the non-directory `ref`."""
        known = self._paths.get(ref)
        if known is None:
            names = self.layers[ref.layer].names(ref.ino)
            candidates = {self._path_of(ref.layer, directory, name) for directory, name in names}
            candidates |= self._lower_links().get(ref, set())
            known = tuple(sorted(path for path in candidates if self.walk(path) == (ref,)))
            self._paths[ref] = known
        return known

    def directory_path(self, stack: Stack) -> bytes:
        """The path in the image, without a leading slash, of a directory of it."""
        layer, ino = stack[0]
        if ino == LayerIndex.ROOT:
            return b""
        return self._path_of(layer, *self.layers[layer].parent(ino))

    def _path_of(self, layer: int, directory: int, name: bytes) -> bytes:
        index = self.layers[layer]
        components = [name]
        while directory != LayerIndex.ROOT:
            directory, name = index.parent(directory)
            components.append(name)
        return b"/".join(reversed(components))

    def _link_target(self, link: Ref) -> Ref:
        target = self._link_targets.get(link)
        if target is None:
            found = self._resolve_link(link)
            if not found or self.is_directory(found):
                path = self.layers[link.layer].target(link.ino)
                raise StoreDamaged(f"layer {link.layer}: hard link to nothing, {path!r}: import it again")
            target = self._link_targets[link] = found[0]
        return target

    def _resolve_link(self, link: Ref) -> Stack:
        """What a hard link to a lower layer's file names in the layers below its own."""
        return self._walk_from(self._roots(link.layer), self.layers[link.layer].target(link.ino))

    def _lower_links(self) -> dict[Ref, set[bytes]]:
        """For each file that a layer above links to: the paths of those links, and those they name.

        The latter since an index keeps the names of its own hard-linked files only: for a file with one name
        in its layer, that name is what some link calls its target.
        """
        if self._links_to is None:
            links: dict[Ref, set[bytes]] = {}
            for number, index in enumerate(self.layers):
                for directory, name, target in index.lower_links:
                    child = index.lookup(directory, name)
                    if child is not None:
                        paths = links.setdefault(self._link_target(Ref(number, child)), set())
                        paths |= {self._path_of(number, directory, name), target}
            self._links_to = links
        return self._links_to


class LayerView(Lower):
    """One layer of an image alone, as overlayfs would store it: whiteouts and opaque markers are shown."""

    def __init__(self, layers: Sequence[LayerIndex], number: int) -> None:
        """Of `layers`, bottom first, show number `number`."""
        super().__init__(layers[: number + 1])
        self.root = (Ref(number, LayerIndex.ROOT),)
        self._merged = Lower(self.layers)

    def _fold(self, candidates: Iterable[Ref]) -> Stack:
        top = next(iter(candidates), None)
        if top is not None and self.layers[top.layer].is_whiteout(top.ino):
            return (top,)
        return super()._fold([top] if top else [])

    def _resolve_link(self, link: Ref) -> Stack:
        return self._merged._resolve_link(link)

    def _speaker(self, stack: Stack) -> Ref:
        return stack[0]

    def xattrs(self, stack: Stack) -> Xattrs:
        ref = stack[0]
        shown = super().xattrs(stack)
        if self.is_directory(stack) and self.layers[ref.layer].is_opaque(ref.ino):
            shown = (*shown, *((prefix + b"opaque", b"y") for prefix in _PRIVATE))
        return shown


def check_lower_links(layers: Sequence[LayerIndex]) -> None:
    """Raises LayerRefused when a hard link of a layer leads to nothing, or to a directory, below it."""
    lower = Lower(layers)
    for number, index in enumerate(layers):
        for directory, name, target in index.lower_links:
            child = index.lookup(directory, name)
            if child is None:
                continue
            found = lower._resolve_link(Ref(number, child))
            if not lower.is_directory(found) and found:
                continue
            what = "a directory" if found else "nothing"
            raise LayerRefused(f"layer {number}: hard link {name!r} leads to {what}: {target!r}")
