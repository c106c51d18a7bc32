"""The EROFS image of a small tree, byte for byte: the same tree must give the same image.

Run as a program, it writes the golden file.
"""

import io
import os
import stat
from pathlib import Path

from rig.erofstrees import MemoryTree, Thing

from fusestore.erofs import Device, write_image
from fusestore.nodes import Extent

GOLDEN = Path(__file__).with_name("erofs-1.img")


def image() -> bytes:
    second = 1_600_000_000 * 10**9
    label = (b"security.selinux", b"system_u:object_r:container_file_t:s0")
    hello = Thing(stat.S_IFREG | 0o644, 1000, 1000, second, (label,), size=5, extents=[Extent(0, 5, 512)])
    sparse = Thing(
        stat.S_IFREG | 0o600, mtime_ns=second, size=8192, device=1,
        extents=[Extent(4096, 700, 1024), Extent(8000, 192, 1724)],
    )  # fmt: skip
    below = Thing(stat.S_IFDIR | 0o700, mtime_ns=second + 1, xattrs=(label, (b"user.a", b"b")))
    below.children = {b"%03d" % number: Thing(stat.S_IFREG | 0o644) for number in range(40)}
    below.children[b"again"] = hello
    root = Thing(stat.S_IFDIR | 0o755, mtime_ns=second)
    root.children = {
        b"below": below,
        b"hello": hello,
        b"sparse": sparse,
        b"link": Thing(stat.S_IFLNK | 0o777, 70_000, 0, -1, target=b"below/hello"),
        b"long": Thing(stat.S_IFLNK | 0o777, target=b"t" * 600),
        b"null": Thing(stat.S_IFCHR | 0o666, mtime_ns=second, rdev=os.makedev(1, 3)),
        b"fifo": Thing(stat.S_IFIFO | 0o600, mtime_ns=second),
    }
    tree = MemoryTree(root, [b"first".rjust(517).ljust(1024), bytes(range(256)) * 8])
    output = io.BytesIO()
    write_image(tree, [Device(b"a", 1024), Device(b"b", 2048)], output)
    return output.getvalue()


def test_the_image_is_as_it_was() -> None:
    assert image() == GOLDEN.read_bytes()


if __name__ == "__main__":
    GOLDEN.write_bytes(image())
