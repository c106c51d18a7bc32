"""LayerBuilder: what entries mean. Each row of the tables is one rule of design.md section 4."""

import os
import stat

import pytest
from rig.tars import entry, index_of, outline, walk

from fusestore import acl
from fusestore.errors import LayerRefused
from fusestore.layer import LayerBuilder, LayerIndex, LayerLimits
from fusestore.nodes import Extent, TarEntry

D, F, H, S, C = b"5", b"0", b"1", b"2", b"3"


def link(path: bytes, target: bytes) -> TarEntry:
    return entry(path, H, link=target)


def file(path: bytes, mtime_ns: int = 0) -> TarEntry:
    return entry(path, F, mtime_ns=mtime_ns)


TREES: dict[str, tuple[list[TarEntry], dict[bytes, str]]] = {
    "slashes and dots are dropped": (
        [entry(b"./", D), entry(b"/a//./b/", D), file(b"././a/b/f"), file(b"g/")],
        {b"a": "directory implicit", b"a/b": "directory", b"a/b/f": "file 0", b"g": "file 0"},
    ),
    "names are bytes": ([file(b"\xff\n"), file(b"\xc3")], {b"\xff\n": "file 0", b"\xc3": "file 0"}),
    "a missing parent is made": (
        [file(b"a/b/f")],
        {b"a": "directory implicit", b"a/b": "directory implicit", b"a/b/f": "file 0"},
    ),
    "a made parent can get its entry later": (
        [file(b"a/f"), entry(b"a", D)],
        {b"a": "directory", b"a/f": "file 0"},
    ),
    "the last entry wins": ([file(b"f", 1), file(b"g"), file(b"f", 2)], {b"f": "file 2", b"g": "file 0"}),
    "a directory keeps its children": (
        [entry(b"d", D), file(b"d/f"), entry(b"d", D)],
        {b"d": "directory", b"d/f": "file 0"},
    ),
    "what replaces a directory drops its children": ([file(b"d/f"), file(b"d", 1)], {b"d": "file 1"}),
    "a dropped directory does not come back": (
        [file(b"d/e/f"), file(b"d"), file(b"d/e/g")],
        {b"d": "directory implicit", b"d/e": "directory implicit", b"d/e/g": "file 0"},
    ),
    "a directory that was a file for a while": (
        [entry(b"d", D), file(b"d/f"), file(b"d"), entry(b"d", D)],
        {b"d": "directory"},
    ),
    "a directory replaces a file": ([file(b"d"), entry(b"d", D)], {b"d": "directory"}),
    "an entry below a file replaces that": (
        [file(b"d"), file(b"d/f")],
        {b"d": "directory implicit", b"d/f": "file 0"},
    ),
    "an entry below a symlink replaces that": (
        [entry(b"real", D), entry(b"d", S, link=b"real"), file(b"d/f")],
        {b"real": "directory", b"d": "directory implicit", b"d/f": "file 0"},
    ),
    # Whiteouts
    "a whiteout": ([file(b"d/.wh.gone")], {b"d": "directory implicit", b"d/gone": "whiteout"}),
    "a whiteout of any type": (
        [entry(b".wh.gone", D), link(b".wh.too", b"x")],
        {b"gone": "whiteout", b"too": "whiteout"},
    ),
    "a whiteout spares its own layer": ([file(b"f", 1), file(b".wh.f")], {b"f": "file 1"}),
    "a whiteout before what it spares": ([file(b".wh.f"), file(b"f", 1)], {b"f": "file 1"}),
    "a whiteout of a directory of the layer": (
        [entry(b"d", D), file(b"d/f"), file(b".wh.d")],
        {b"d": "directory opaque", b"d/f": "file 0"},
    ),
    "a whiteout of a directory that is only implied": (
        [file(b".wh.d"), file(b"d/f")],
        {b"d": "directory opaque", b"d/f": "file 0"},
    ),
    "an opaque directory": ([entry(b"d", D), file(b"d/.wh..wh..opq")], {b"d": "directory opaque"}),
    "an opaque directory is implied": ([file(b"d/.wh..wh..opq")], {b"d": "directory implicit opaque"}),
    "an opaque directory keeps its layer's files": (
        [file(b"d/f"), file(b"d/.wh..wh..opq"), file(b"d/g")],
        {b"d": "directory implicit opaque", b"d/f": "file 0", b"d/g": "file 0"},
    ),
    "a whiteout below a file of the layer hides nothing": (
        [file(b"d/.wh.x"), file(b"d", 1)],
        {b"d": "file 1"},
    ),
    "a whiteout below a whiteout hides nothing": ([file(b"d/.wh.x"), file(b".wh.d")], {b"d": "whiteout"}),
    "a device 0:0 is a whiteout": ([entry(b"gone", C)], {b"gone": "whiteout"}),
    "a device 0:0 spares its own layer": ([file(b"f", 1), entry(b"f", C)], {b"f": "file 1"}),
    "another device is none": ([entry(b"null", C, rdev=os.makedev(1, 3))], {b"null": "special 0"}),
    "a link to a device 0:0": ([entry(b"a", C), link(b"b", b"a")], {b"a": "whiteout", b"b": "whiteout"}),
    "a link to a device 0:0 that comes later": (
        [link(b"c", b"b"), link(b"b", b"a"), entry(b"a", C)],
        {b"a": "whiteout", b"b": "whiteout", b"c": "whiteout"},
    ),
    "files of AUFS are not shown": (
        [
            entry(b".wh..wh.plnk", D),
            file(b".wh..wh.plnk/1.2", 7),
            file(b".wh..wh.aufs"),
            link(b"f", b".wh..wh.plnk/1.2"),
        ],
        {b"f": "file 7"},
    ),
    # Hard links
    "a link": (
        [file(b"d/f", 5), link(b"g", b"./d//f")],
        {b"d": "directory implicit", b"d/f": "file 5", b"g": "file 5"},
    ),
    "a link to what comes later": ([link(b"g", b"f"), file(b"f", 5)], {b"f": "file 5", b"g": "file 5"}),
    "a link to a symlink": (
        [entry(b"s", S, link=b"x"), link(b"g", b"s")],
        {b"s": "symlink x", b"g": "symlink x"},
    ),
    "a link outlives the name of its target": (
        [file(b"f", 1), link(b"g", b"f"), file(b"f", 2)],
        {b"f": "file 2", b"g": "file 1"},
    ),
    "a link replaces a directory": (
        [file(b"f", 1), file(b"d/x"), link(b"d", b"f")],
        {b"f": "file 1", b"d": "file 1"},
    ),
    "a link below its target": (
        [file(b"f", 1), link(b"f/g", b"f")],
        {b"f": "directory implicit", b"f/g": "file 1"},
    ),
    "a link to its own name keeps it": ([file(b"f", 1), link(b"f", b"f")], {b"f": "file 1"}),
    "a link through a link that comes later": (
        [link(b"h", b"g"), link(b"g", b"f"), file(b"f", 1)],
        {b"f": "file 1", b"g": "file 1", b"h": "file 1"},
    ),
    "a link that is replaced": ([link(b"g", b"nowhere"), file(b"g", 1)], {b"g": "file 1"}),
    "a link to itself that is replaced": (
        [link(b"a", b"a"), file(b"a/f")],
        {b"a": "directory implicit", b"a/f": "file 0"},
    ),
    "a link into a lower layer": ([link(b"g", b"/./d/f")], {b"g": "lower d/f"}),
    "a link to a link into a lower layer": (
        [link(b"g", b"f"), link(b"h", b"g")],
        {b"g": "lower f", b"h": "lower f"},
    ),
    "a link to what a whiteout hides": (
        [file(b".wh.f"), link(b"g", b"f")],
        {b"f": "whiteout", b"g": "lower f"},
    ),
}


@pytest.mark.parametrize("rule", TREES)
def test_tree(rule: str) -> None:
    entries, expected = TREES[rule]
    assert outline(index_of(entries)) == expected


REFUSED: dict[str, list[TarEntry]] = {
    "no name": [file(b"")],
    "dot dot": [file(b"a/../b")],
    "dot dot first": [file(b"../b")],
    "dot dot last": [file(b"a/..")],
    "NUL": [file(b"a\0b")],
    "NUL in a known directory": [file(b"d/a"), file(b"d/a\0b")],
    "a long name": [file(b"n" * 256)],
    "a long name in a known directory": [file(b"d/a"), file(b"d/" + b"n" * 256)],
    "a long name above": [file(b"n" * 256 + b"/f")],
    "a long path": [file(b"a/" * 2048 + b"f")],
    "the root is a file": [file(b"/")],
    "the root is a link": [link(b".", b"f")],
    "a symlink to nothing": [entry(b"s", S)],
    "a symlink to a long path": [entry(b"s", S, link=b"t" * 4096)],
    "a link to nothing": [link(b"l", b"")],
    "a link to the root": [link(b"l", b"/")],
    "a link to dot dot": [link(b"l", b"../f")],
    "a link to a long path": [link(b"l", b"a/" * 2048 + b"f")],
    "a link to a directory": [entry(b"d", D), link(b"l", b"d")],
    "a link to a directory that comes later": [link(b"l", b"d"), file(b"d/f")],
    "a link to itself": [link(b"l", b"l")],
    "links in a circle": [link(b"a", b"b"), link(b"b", b"c"), link(b"c", b"a")],
    "a whiteout of nothing": [file(b".wh.")],
    "a whiteout of dot": [file(b".wh..")],
    "a whiteout of dot dot": [file(b".wh...")],
    "below a whiteout": [file(b".wh.d/f")],
}


@pytest.mark.parametrize("lie", REFUSED)
def test_refused(lie: str) -> None:
    with pytest.raises(LayerRefused):
        index_of(REFUSED[lie])


def test_the_longest_path_is_kept() -> None:
    path = b"a/" * 2047 + b"ff"
    assert list(outline(index_of([file(path)])))[-1] == path


@pytest.mark.parametrize(
    ("limits", "entries"),
    [
        (LayerLimits(nodes=3), [file(b"a/b/c")]),
        (LayerLimits(directories=1), [file(b"a/f"), file(b"a/b/f")]),
        (LayerLimits(path_bytes=3), [file(b"ab"), file(b"cd")]),
        (LayerLimits(detail_bytes=3), [entry(b"a", xattrs=((b"ab", b"cd"),))]),
        (LayerLimits(detail_bytes=24), [entry(b"a", size=9, data=(Extent(0, 1, 512), Extent(2, 1, 513)))]),
        (LayerLimits(links_per_file=1), [file(b"a"), link(b"b", b"a")]),
        (LayerLimits(lower_links=1), [link(b"a", b"x"), link(b"b", b"y")]),
    ],
)
def test_limits_are_kept_to(limits: LayerLimits, entries: list[TarEntry]) -> None:
    def build(builder: LayerBuilder) -> None:
        for found in entries:
            builder.add(found)
        builder.finish(0)

    build(LayerBuilder())
    with pytest.raises(LayerRefused, match="limit: "):
        build(LayerBuilder(limits))


# What the index says of one object


def one(found: TarEntry, *others: TarEntry) -> tuple[LayerIndex, int]:
    index = index_of([found, *others])
    inode = index.lookup(index.ROOT, found.path)
    assert inode is not None
    return index, inode


def test_attributes_of_a_file() -> None:
    index, inode = one(
        entry(b"f", mode=0o6751, uid=1, gid=(1 << 32) - 2, size=513, mtime_ns=-1, data=(Extent(0, 513, 512),))
    )
    attr = index.attr(inode)
    assert (attr.mode, attr.uid, attr.gid) == (stat.S_IFREG | 0o6751, 1, (1 << 32) - 2)
    assert (attr.size, attr.blocks, attr.nlink, attr.rdev) == (513, 2, 1, 0)
    assert (attr.atime_ns, attr.mtime_ns, attr.ctime_ns) == (-1, -1, -1)


@pytest.mark.parametrize("mtime_ns", [-(1 << 63) * 10**9, -1, 0, 999_999_999, (1 << 63) * 10**9 - 1])
def test_times_are_exact(mtime_ns: int) -> None:
    index, inode = one(file(b"f", mtime_ns))
    assert index.attr(inode).mtime_ns == mtime_ns


@pytest.mark.parametrize(
    ("type", "mode"),
    [(b"3", stat.S_IFCHR), (b"4", stat.S_IFBLK), (b"5", stat.S_IFDIR), (b"6", stat.S_IFIFO)],
)
def test_type_and_device(type: bytes, mode: int) -> None:
    rdev = os.makedev(259, 70_000) if type in b"34" else 0
    index, inode = one(entry(b"x", type, mode=0o1777, rdev=rdev))
    assert (index.mode(inode), index.attr(inode).rdev) == (mode | 0o1777, rdev)


def test_a_symlink_has_its_target_and_length() -> None:
    index, inode = one(entry(b"s", S, link=b"../\xff", mode=0o777))
    assert (index.target(inode), index.attr(inode).size) == (b"../\xff", 4)


def test_an_implied_directory_is_of_root_and_1970() -> None:
    index = index_of([file(b"d/f")])
    attr = index.attr(walk(index)[b"d"])
    assert (attr.mode, attr.uid, attr.gid, attr.mtime_ns) == (stat.S_IFDIR | 0o755, 0, 0, 0)


def test_a_directory_has_the_attributes_of_its_last_entry() -> None:
    index, inode = one(entry(b"d", D, mode=0o700, xattrs=((b"a", b"1"),)), entry(b"d", D, mode=0o711))
    assert (index.mode(inode), index.xattrs(inode)) == (stat.S_IFDIR | 0o711, ())


def test_the_root_has_the_attributes_of_its_entry() -> None:
    index = index_of([file(b"f"), entry(b"./", D, mode=0o1777, uid=5, xattrs=((b"a", b"1"),))])
    assert (index.mode(index.ROOT), index.attr(index.ROOT).uid) == (stat.S_IFDIR | 0o1777, 5)
    assert index.xattrs(index.ROOT) == ((b"a", b"1"),)
    assert not index.is_implicit(index.ROOT)


def test_a_root_without_an_entry_is_implied() -> None:
    index = index_of([file(b"f")])
    assert index.is_implicit(index.ROOT)


def test_the_root_can_be_opaque() -> None:
    index = index_of([file(b".wh..wh..opq")])
    assert index.is_opaque(index.ROOT)


@pytest.mark.parametrize("type", [b"0", b"2", b"5", b"6"])
def test_xattrs_of_any_type_are_kept(type: bytes) -> None:
    xattrs = ((b"security.capability", b"\1\0\xff"), (b"trusted.overlay.opaque", b"y"))
    index, inode = one(entry(b"x", type, link=b"t" if type == b"2" else b"", xattrs=xattrs))
    assert index.xattrs(inode) == xattrs
    assert not index.is_opaque(inode)


def test_nlink_of_directories_counts_subdirectories() -> None:
    index, inode = one(entry(b"d", D), file(b"d/f"), file(b"d/a/f"), entry(b"d/b", D), file(b"d/.wh.c"))
    assert index.attr(inode).nlink == 4


def test_hard_links_know_each_other() -> None:
    index, inode = one(file(b"f"), link(b"d/g", b"f"), link(b"d/h", b"d/g"))
    directory = walk(index)[b"d"]
    assert index.attr(inode).nlink == 3
    assert set(index.names(inode)) == {(0, b"f"), (directory, b"g"), (directory, b"h")}


def test_a_file_of_one_name_does_not_list_it() -> None:
    index, inode = one(file(b"f"), link(b"g", b"f"), file(b"g"))
    assert (index.names(inode), index.attr(inode).nlink) == ((), 1)


def test_lower_links_are_listed() -> None:
    index = index_of([link(b"a", b"x/y"), link(b"b", b"a"), link(b"c", b"z"), link(b"d", b"f"), file(b"f")])
    assert set(index.lower_links) == {(0, b"a", b"x/y"), (0, b"b", b"x/y"), (0, b"c", b"z")}


@pytest.mark.parametrize(
    ("size", "data", "blocks"),
    [
        (0, (), 0),
        (1 << 40, (), 0),
        (513, (Extent(0, 513, 1024),), 2),
        (600, (Extent(0, 512, 1024),), 1),
        (1 << 40, (Extent(512, 10, 1024), Extent(9999, 1014, 1034)), 2),
    ],
)
def test_extents_and_blocks(size: int, data: tuple[Extent, ...], blocks: int) -> None:
    index, inode = one(entry(b"f", size=size, data=data))
    assert (index.extents(inode), index.attr(inode).blocks) == (data, blocks)


def test_parent_of_a_directory() -> None:
    index = index_of([file(b"a/b/f")])
    a, b = walk(index)[b"a"], walk(index)[b"a/b"]
    assert [index.parent(inode) for inode in (index.ROOT, a, b)] == [(0, b""), (0, b"a"), (a, b"b")]


def test_the_size_of_the_tar_is_kept() -> None:
    assert index_of([], 10_240).tar_size == 10_240


def test_the_mode_is_that_of_the_list() -> None:
    """A tar's header may have the permissions of the owning group where a file's mode has the mask."""
    access = acl.from_text(b"user::rw,user:12:r,group::r,mask::rwx,other::r")
    assert access is not None
    index = index_of([entry(b"f", mode=0o4644, xattrs=((acl.ACCESS, access),))])
    assert index.attr(walk(index)[b"f"]).mode == stat.S_IFREG | 0o4674
