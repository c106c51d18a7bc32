"""The format of layer indexes, held still: version 1 must be written and read as it was.

Run as a program, it writes the golden file of the version in force; do that for a new version, and keep the
tests of the old one only if it is still read.
"""

import sys
from pathlib import Path

from rig.indexes import decoded_pages
from rig.tars import entry, outline

from fusestore.layer import LayerBuilder, LayerIndex
from fusestore.layerindex import VERSION
from fusestore.nodes import Extent

GOLDEN = Path(__file__).with_name("layerindex-1.bin")

ENTRIES = [
    entry(b"./", b"5", mode=0o755, mtime_ns=1_600_000_000_123_456_789),
    entry(b"bin/sh", mode=0o4755, size=700, data=(Extent(0, 700, 1536),), xattrs=((b"user.a", b"\0\xff"),)),
    entry(b"bin/ash", b"1", link=b"bin/sh"),
    entry(b"lib", b"2", mode=0o777, link=b"usr/lib"),
    entry(b"dev/null", b"3", mode=0o666, rdev=259),
    entry(b"sparse", size=1 << 20, data=(Extent(0, 5, 4096), Extent(99_999, 7, 4101)), mtime_ns=-1),
    entry(b"etc/.wh.passwd"),
    entry(b"srv/.wh..wh..opq"),
    entry(b"lower", b"1", link=b"usr/bin/env"),
    *(entry(b"many/%03d" % number, uid=number) for number in range(600)),
]
OUTLINE = {
    b"bin": "directory implicit",
    b"bin/sh": "file 0",
    b"bin/ash": "file 0",
    b"lib": "symlink usr/lib",
    b"dev": "directory implicit",
    b"dev/null": "special 0",
    b"sparse": "file -1",
    b"etc": "directory implicit",
    b"etc/passwd": "whiteout",
    b"srv": "directory implicit opaque",
    b"lower": "lower usr/bin/env",
    b"many": "directory implicit",
    **{b"many/%03d" % number: "file 0" for number in range(600)},
}


def build() -> bytes:
    builder = LayerBuilder()
    for found in ENTRIES:
        builder.add(found)
    return builder.finish(8192)


def test_version_1_is_read() -> None:
    index = LayerIndex(GOLDEN.read_bytes())
    assert outline(index) == OUTLINE
    assert index.tar_size == 8192


def test_what_is_written_is_version_1() -> None:
    """Pages are compared decoded: another release of zstd may compress them to other bytes."""
    head, pages = decoded_pages(build())
    golden_head, golden_pages = decoded_pages(GOLDEN.read_bytes())
    why = "the format changed: raise VERSION in layerindex.py and make a new golden file"
    assert (head[:12], head[16:]) == (golden_head[:12], golden_head[16:]), why
    assert pages == golden_pages, why


if __name__ == "__main__":
    assert str(VERSION) in GOLDEN.stem
    sys.exit(None if GOLDEN.write_bytes(build()) else 1)
