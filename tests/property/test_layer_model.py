"""LayerBuilder against a model of nested dicts, on random layers of few names, so that they meet."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rig.tars import entry, index_of, outline, walk

from fusestore.errors import LayerRefused
from fusestore.nodes import TarEntry


class Refused(Exception):
    pass


@dataclass(eq=False)
class Thing:
    word: str


@dataclass(eq=False)
class Link(Thing):
    """Stands for a path that was not there when the link came."""

    target: tuple[bytes, ...] = ()


@dataclass(eq=False)
class Directory(Thing):
    children: dict[bytes, Thing] = field(default_factory=dict)
    opaque: bool = False


def parts(path: bytes) -> tuple[bytes, ...]:
    return tuple(path.split(b"/"))


def find(root: Directory, path: tuple[bytes, ...]) -> Thing | None:
    found: Thing | None = root
    for name in path:
        found = found.children.get(name) if isinstance(found, Directory) else None
    return found


def make(root: Directory, path: tuple[bytes, ...]) -> Directory:
    """The directory of a path; what stands in the way goes."""
    here = root
    for name in path:
        child = here.children.get(name)
        if not isinstance(child, Directory):
            child = here.children[name] = Directory("directory implicit")
        here = child
    return here


def is_marker(found: TarEntry) -> bool:
    return parts(found.path)[-1].startswith(b".wh.") or found.type == b"3"


def model(entries: list[TarEntry]) -> Directory:
    root = Directory("")
    for found in entries:
        *above, name = parts(found.path)
        if is_marker(found):
            continue
        if found.type == b"1":
            thing = find(root, parts(found.link)) or Link("", parts(found.link))
            if isinstance(thing, Directory):
                raise Refused
        else:
            thing = Thing(f"file {found.mtime_ns}")
        parent = make(root, tuple(above))
        if found.type == b"5":
            old = parent.children.get(name)
            thing = old if isinstance(old, Directory) else Directory("")
            thing.word = "directory"
        parent.children[name] = thing
    markers = {found for found in entries if is_marker(found)}
    resolve_links(root, {parts(found.path) for found in markers if found.type == b"3"})
    hide(root, markers)
    return root


def resolve_links(root: Directory, devices: set[tuple[bytes, ...]]) -> None:
    def end_of(link: Link, before: tuple[Link, ...]) -> Thing:
        if link in before:
            raise Refused
        found = find(root, link.target)
        if isinstance(found, Directory):
            raise Refused
        if isinstance(found, Link):
            return end_of(found, (*before, link))
        if found is not None:
            return found
        if link.target in devices:
            return Thing("whiteout")
        link.word = f"lower {b'/'.join(link.target).decode()}"
        return link

    def replaced(directory: Directory) -> dict[bytes, Thing]:
        return {
            name: end_of(child, ()) if isinstance(child, Link) else child
            for name, child in directory.children.items()
        }

    directories = [root]
    results = []
    for directory in directories:
        directories += [child for child in directory.children.values() if isinstance(child, Directory)]
        results.append(replaced(directory))
    for directory, children in zip(directories, results, strict=True):
        directory.children = children


def hide(root: Directory, markers: set[TarEntry]) -> None:
    """Said of a marker at a time: what it does depends on no other marker but one that hides it."""
    hidden = {}
    for found in markers:
        *above, name = parts(found.path)
        hidden[found] = tuple(above) if name == b".wh..wh..opq" else (*above, name.removeprefix(b".wh."))
    without = {
        path for found, path in hidden.items() if not found.path.endswith(b"opq") and find(root, path) is None
    }
    effective = []
    for found, path in hidden.items():
        above = parts(found.path)[:-1]
        prefixes = [above[:length] for length in range(1, len(above) + 1)]
        if any(prefix in without for prefix in prefixes):
            continue
        if all(isinstance(find(root, prefix), Directory | None) for prefix in prefixes) and (
            not any(is_below_file(root, prefix) for prefix in prefixes)
        ):
            effective.append((found, path))
    for found, path in sorted(effective, key=lambda each: parts(each[0].path)):
        parent = make(root, parts(found.path)[:-1])
        if found.path.endswith(b"opq"):
            parent.opaque = True
            continue
        thing = parent.children.setdefault(path[-1], Thing("whiteout"))
        if isinstance(thing, Directory):
            thing.opaque, thing.word = True, "directory"


def is_below_file(root: Directory, path: tuple[bytes, ...]) -> bool:
    return any(not isinstance(find(root, path[:length]), Directory | None) for length in range(1, len(path)))


def described(root: Directory) -> dict[bytes, str]:
    words = {}
    waiting = [(b"", root)]
    while waiting:
        path, directory = waiting.pop()
        for name, child in directory.children.items():
            below = path + b"/" + name if path else name
            words[below] = child.word
            if isinstance(child, Directory):
                words[below] += " opaque" if child.opaque else ""
                waiting.append((below, child))
    return words


def groups(names: dict[bytes, object]) -> set[frozenset[bytes]]:
    """Names that are one object."""
    found: dict[object, set[bytes]] = {}
    for name, identity in names.items():
        found.setdefault(identity, set()).add(name)
    return {frozenset(same) for same in found.values()}


def things(root: Directory) -> dict[bytes, object]:
    found: dict[bytes, object] = {}
    waiting = [(b"", root)]
    while waiting:
        path, directory = waiting.pop()
        for name, child in directory.children.items():
            below = path + b"/" + name if path else name
            found[below] = child
            if isinstance(child, Directory):
                waiting.append((below, child))
    return found


NAMES = st.sampled_from([b"a", b"b", b"c"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(b"/".join)
DIRECTORIES = st.lists(NAMES, max_size=2).map(lambda names: b"".join(name + b"/" for name in names))
PLAIN = st.one_of(
    st.builds(entry, PATHS, st.sampled_from([b"0", b"5"]), mtime_ns=st.integers(1, 1 << 60)),
    st.builds(entry, PATHS, st.just(b"1"), link=PATHS),
)
MARKERS = st.one_of(
    st.builds(lambda directory, name: entry(directory + b".wh." + name), DIRECTORIES, NAMES),
    st.builds(lambda directory: entry(directory + b".wh..wh..opq"), DIRECTORIES),
    st.builds(entry, PATHS, st.just(b"3")),
)


@settings(deadline=None)
@given(st.lists(st.one_of(PLAIN, MARKERS), max_size=14))
def test_a_layer_is_what_the_model_says(entries: list[TarEntry]) -> None:
    try:
        expected = model(entries)
    except Refused:
        with pytest.raises(LayerRefused):
            index_of(entries)
        return
    index = index_of(entries)
    words = outline(index)
    assert words == described(expected)
    inodes: dict[bytes, object] = {
        path: inode for path, inode in walk(index).items() if words.get(path, "whiteout") != "whiteout"
    }
    same = {path: thing for path, thing in things(expected).items() if words[path] != "whiteout"}
    assert groups(inodes) == groups(same)
    for path, inode in walk(index).items():
        if words.get(path, "").startswith(("file", "lower")):
            (group,) = [group for group in groups(same) if path in group]
            assert index.attr(inode).nlink == len(group)


@settings(deadline=None)
@given(st.lists(PLAIN, max_size=10), st.lists(MARKERS, max_size=6), st.data())
def test_the_place_of_whiteouts_changes_nothing(
    plain: list[TarEntry], markers: list[TarEntry], data: st.DataObject
) -> None:
    shuffled = list(plain)
    for marker in markers:
        shuffled.insert(data.draw(st.integers(0, len(shuffled))), marker)
    try:
        index = index_of([*plain, *markers])
    except LayerRefused:
        with pytest.raises(LayerRefused):
            index_of(shuffled)
        return
    other = index_of(shuffled)
    assert outline(index) == outline(other)
    assert [index.attr(inode) for inode in range(len(index))] == [
        other.attr(inode) for inode in range(len(other))
    ]
