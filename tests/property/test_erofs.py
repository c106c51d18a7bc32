"""EROFS images: the kernel shows the tree that was written, and any tree is written or refused."""

import io
import os
import random
import stat
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rig.erofstrees import MemoryTree, Thing, mounted, written
from rig.snapshot import differences, snapshot
from rig.treestrategies import profile

from fusestore.erofs import Device, write_image
from fusestore.errors import NotSupported
from fusestore.nodes import Extent, Xattrs

_TIMES = st.one_of(
    st.sampled_from((0, 1_600_000_000_123_456_789)),
    st.integers(-(1 << 40), 1 << 60),
)
_OWNERS = st.sampled_from((0, 1000, 0xFFFF, 0x1_0000, 0xFFFF_FFFE))
_PERMISSIONS = st.sampled_from((0o644, 0o755, 0o4755, 0o1777, 0, 0o7777))
_NAMES = st.binary(min_size=1, max_size=255).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b"..")
)
_TARGETS = st.one_of(
    st.binary(min_size=1, max_size=300), st.integers(300, 4095).map(lambda length: b"t" * length)
).filter(lambda target: b"\0" not in target)


def _acl(uid: int) -> bytes:
    """posix_acl_xattr.h: version 2; owner, one user, group, mask and others may read."""
    entries = ((1, 0xFFFF_FFFF), (2, uid), (4, 0xFFFF_FFFF), (16, 0xFFFF_FFFF), (32, 0xFFFF_FFFF))
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", tag, 4, who) for tag, who in entries)


_XATTRS: st.SearchStrategy[Xattrs] = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from((b"user.k", b"trusted.k", b"security.k", b"user." + b"n" * 250)),
            st.one_of(st.binary(max_size=40), st.integers(1, 3000).map(lambda length: b"v" * length)),
        ),
        st.tuples(st.just(b"system.posix_acl_access"), st.builds(_acl, st.integers(0, 3))),
    ),
    max_size=4,
    unique_by=lambda item: item[0],
).map(tuple)


@st.composite
def _things(draw: st.DrawFn, devices: list[bytes], kinds: tuple[int, ...]) -> Thing:
    kind = draw(st.sampled_from(kinds))
    xattrs = draw(_XATTRS)
    if kind == stat.S_IFLNK:
        # Neither user.* nor ACLs are for symlinks.
        xattrs = tuple(item for item in xattrs if item[0].startswith((b"trusted.", b"security.")))
    elif kind not in (stat.S_IFREG, stat.S_IFDIR):
        xattrs = tuple(item for item in xattrs if not item[0].startswith(b"user."))
    thing = Thing(kind | draw(_PERMISSIONS), draw(_OWNERS), draw(_OWNERS), draw(_TIMES), xattrs)
    if kind == stat.S_IFLNK:
        thing.target = draw(_TARGETS)
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        thing.rdev = os.makedev(draw(st.integers(0, 4095)), draw(st.integers(0, (1 << 20) - 1)))
    elif kind == stat.S_IFREG and devices:
        thing.device = draw(st.integers(0, len(devices) - 1))
        thing.size, thing.extents = draw(_contents(len(devices[thing.device])))
    return thing


@st.composite
def _contents(draw: st.DrawFn, stored: int) -> tuple[int, list[Extent]]:
    """A size and where the content is: in one piece, as in a tar, or in several, at blocks or not."""
    if draw(st.booleans()):
        source = draw(st.integers(0, stored // 512 - 1)) * 512
        size = draw(st.integers(0, stored - source))
        return size, [Extent(0, size, source)] if size else []
    unit = draw(st.sampled_from((1, 512, 4096)))
    bounds = sorted(draw(st.sets(st.integers(0, 60_000 // unit), min_size=2, max_size=12)))
    extents = []
    for start, end in zip(bounds[::2], bounds[1::2], strict=False):
        length = (end - start) * unit
        source_unit = draw(st.sampled_from((1, 512)))
        source = draw(st.integers(0, (stored - length) // source_unit)) * source_unit
        extents.append(Extent(start * unit, length, source))
    return bounds[-1] * unit + draw(st.integers(0, 5000)), extents


@st.composite
def _trees(draw: st.DrawFn) -> MemoryTree:
    devices = [
        random.Random(number).randbytes(64 * 1024 + 512 * number) for number in range(draw(st.integers(0, 3)))
    ]
    root = Thing(stat.S_IFDIR | 0o755, xattrs=draw(_XATTRS), mtime_ns=draw(_TIMES))
    directories, files = [root], []
    kinds = (
        stat.S_IFREG,
        stat.S_IFDIR,
        stat.S_IFLNK,
        stat.S_IFCHR,
        stat.S_IFBLK,
        stat.S_IFIFO,
        stat.S_IFSOCK,
    )
    for name in draw(st.lists(_NAMES, max_size=40)):
        parent = draw(st.sampled_from(directories))
        if files and draw(st.integers(0, 5)) == 0:
            parent.children[name] = draw(st.sampled_from(files))
            continue
        if name in parent.children:
            continue
        thing = parent.children[name] = draw(_things(devices, kinds))
        (directories if thing.is_directory else files).append(thing)
    if draw(st.booleans()):
        crowded = draw(st.sampled_from(directories))
        for number in range(draw(st.integers(1, 300))):
            crowded.children.setdefault(b"%d" % (number * 7919), Thing(stat.S_IFREG | 0o600))
    return MemoryTree(root, devices)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        yield Path(directory)


@pytest.mark.root
@profile(ci=150, long=3000)
@given(tree=_trees())
def test_the_kernel_shows_the_tree(place: Path, tree: MemoryTree) -> None:
    devices = written(tree, place / "image")
    with mounted(place / "image", devices, place / "mount") as root:
        wrong = differences(tree.expected(), snapshot(root))
        assert not wrong, "\n".join(wrong)


_ANY_EXTENTS = st.lists(
    st.builds(Extent, st.integers(0, 1 << 66), st.integers(0, 1 << 66), st.integers(0, 1 << 66)), max_size=3
)


@st.composite
def _odd_trees(draw: st.DrawFn) -> MemoryTree:
    """Trees as no layer has them: every number out of range at times, every name possible."""
    number = st.one_of(st.integers(0, 9), st.integers(-(1 << 70), 1 << 70))
    root = Thing(stat.S_IFDIR)
    for name in draw(st.lists(st.binary(max_size=300), max_size=6)):
        root.children[name] = Thing(
            draw(st.one_of(st.integers(0, 0xFFFF), st.sampled_from((0o100644, 0o120777, 0o040755)))),
            draw(number),
            draw(number),
            draw(number),
            tuple(draw(st.lists(st.tuples(st.binary(max_size=300), st.binary(max_size=9)), max_size=2))),
            draw(number),
            draw(st.one_of(st.binary(max_size=9), st.just(b"t" * 5000))),
            draw(st.one_of(st.integers(0, 100_000), number)),
            0,
            draw(_ANY_EXTENTS),
        )
    return MemoryTree(root, [b"device" * 1000])


@profile(ci=300, long=20_000)
@given(_odd_trees())
def test_any_tree_is_written_or_refused(tree: MemoryTree) -> None:
    output = io.BytesIO()
    try:
        write_image(tree, [Device(b"", len(tree.devices[0]))], output)
    except NotSupported as error:
        assert str(error).startswith("an EROFS image has no room for ")
    else:
        assert len(output.getvalue()) % 512 == 0
