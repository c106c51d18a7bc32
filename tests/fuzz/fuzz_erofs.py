"""Fuzz target: the writer of EROFS images.

Invariant: whatever the tree, NotSupported, or an image in which a reader of the format finds the same tree,
content included. The trees have what no layer has, too. Every other exception, a crash or a hang is a bug.

    python tests/fuzz/fuzz_erofs.py [SECONDS | CORPUS.zip]

With atheris installed it is driven by coverage (then the arguments are libFuzzer's), else by random mutation.
"""

import io
import os
import random
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rig.erofsreader import read_image
from rig.erofstrees import MemoryTree, Thing
from rig.fuzzing import Bytes, drive
from rig.snapshot import differences

from fusestore.erofs import Device, write_image
from fusestore.errors import NotSupported
from fusestore.nodes import Extent, Xattrs

DEVICES = [random.Random(number).randbytes(size) for number, size in enumerate((64 * 1024, 3000, 0))]
NOWHERE = (b"user.", b"x")
"""Names of xattrs that have no place: they are left out."""


@dataclass(frozen=True)
class Values:
    """What things of a tree have."""

    ids: tuple[int, ...] = (0, 1000, 0xFFFF, 0x1_0000, 0xFFFF_FFFF)
    times: tuple[int, ...] = (0, 1, -1, 10**9, 1 << 62)
    names: tuple[bytes, ...] = (
        *(b"user.a", b"trusted.b", b"security.c", b"system.posix_acl_access", b"user." + b"n" * 255),
        *NOWHERE,
    )
    lengths: tuple[int, ...] = (0, 1, 3, 100, 500, 4000, 0xFFFF)
    repeats: tuple[int, ...] = (1, 40, 511)
    kinds: tuple[int, ...] = (
        *(stat.S_IFREG, stat.S_IFREG, stat.S_IFDIR, stat.S_IFDIR, stat.S_IFLNK),
        *(stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK),
    )
    is_odd: bool = False


ORDINARY = Values()
ODD = Values(
    ids=(*ORDINARY.ids, -1, 1 << 32),
    times=(*ORDINARY.times, -(1 << 70)),
    names=(*ORDINARY.names, b"user." + b"n" * 256),
    lengths=(*ORDINARY.lengths, 0x1_0000),
    repeats=(*ORDINARY.repeats, 600),
    kinds=(*ORDINARY.kinds, 0, 0o150000),
    is_odd=True,
)
CONTENT_MAX = 1 << 17


def xattrs(source: Bytes, values: Values) -> Xattrs:
    found = {}
    for _ in range(source.byte() % 4):
        found[source.choice(values.names)] = bytes([source.byte()]) * source.choice(values.lengths)
    return tuple(found.items())


def fill(thing: Thing, source: Bytes, values: Values) -> None:
    thing.device = source.byte() % len(DEVICES)
    room = len(DEVICES[thing.device])
    end = 0
    for _ in range(source.byte() % 6):
        unit = source.choice((1, 512, 4096))
        begin = end + source.byte() % 16 * unit
        length = 1 + source.byte() * unit
        start = source.number()
        if not values.is_odd:
            length = min(length, room)
            start %= room - length + 1
        if length:
            thing.extents = [*thing.extents, Extent(begin, length, start)]
            end = begin + length
    thing.size = end + source.byte() % 3 * 700
    if values.is_odd and source.byte() % 2:
        thing.size = source.number() or 1


def tree_of(source: Bytes) -> MemoryTree:
    values = ODD if source.byte() % 4 == 3 else ORDINARY
    root = Thing(stat.S_IFDIR | 0o755, mtime_ns=source.choice(values.times), xattrs=xattrs(source, values))
    directories, others = [root], [Thing(stat.S_IFREG)]
    while source.left and len(directories) + len(others) < 400:
        parent = source.choice(directories)
        name = source.take(source.byte() % 24)
        if not values.is_odd:
            name = name.translate(None, b"/\0").strip(b".")
        name = (name or b"%d" % len(others)) * (1 if source.byte() % 32 else 10)
        if source.byte() % 8 == 0:
            parent.children[name] = source.choice(others)
            continue
        thing = Thing(source.choice(values.kinds) | source.byte(), source.choice(values.ids))
        thing.gid = source.choice(values.ids)
        thing.mtime_ns = source.choice((root.mtime_ns, *values.times))
        thing.xattrs = xattrs(source, values)
        if stat.S_ISREG(thing.mode):
            fill(thing, source, values)
        elif stat.S_ISLNK(thing.mode):
            thing.target = (source.take(source.byte() % 8) or b"t") * source.choice(values.repeats)
            if not values.is_odd:
                thing.target = thing.target.replace(b"\0", b"0")
        elif stat.S_IFMT(thing.mode) in (stat.S_IFCHR, stat.S_IFBLK):
            thing.rdev = os.makedev(source.number() & 0xFFF, source.number() & 0xFFFFF)
        elif stat.S_ISDIR(thing.mode):
            for number in range(source.choice((0, 0, 0, 1, 40, 130))):
                thing.children[b"%03d" % number] = Thing(stat.S_IFREG | 0o600, mtime_ns=root.mtime_ns)
        if name not in parent.children:
            parent.children[name] = thing
            (directories if thing.is_directory else others).append(thing)
    return MemoryTree(root, DEVICES)


def check(data: bytes) -> None:
    tree = tree_of(Bytes(data))
    output = io.BytesIO()
    try:
        write_image(tree, [Device(b"", len(device)) for device in DEVICES], output)
    except NotSupported as error:
        assert str(error).startswith("an EROFS image has no room for ")
        return
    things = list(tree.things())
    if any(thing.size > CONTENT_MAX for thing in things):
        return
    for thing in (tree.root, *things):
        thing.xattrs = tuple(item for item in thing.xattrs if item[0] not in NOWHERE)
    wrong = differences(tree.expected(), read_image(output.getvalue(), DEVICES))
    assert not wrong, "\n".join(wrong)


def mutated(source: random.Random) -> bytes:
    return source.randbytes(source.choice((4, 40, 400, 3000)))


if __name__ == "__main__":
    drive(check, mutated)
