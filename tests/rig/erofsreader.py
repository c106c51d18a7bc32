"""A reader of EROFS images that believes nothing (Documentation/filesystems/erofs.rst). Pure.

It knows what `fusestore.erofs` writes of the format, by numbers of its own. Whatever breaks the format is an
AssertionError.
"""

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from struct import unpack_from
from typing import NamedTuple

from rig.snapshot import TYPES, Entry, Snapshot

__all__ = ["read_image"]

BLOCK, SLOT = 512, 32
PREFIXES = {
    1: b"user.", 4: b"trusted.", 6: b"security.",
    2: b"system.posix_acl_access", 3: b"system.posix_acl_default",
}  # fmt: skip
KINDS = {
    1: stat.S_IFREG,
    2: stat.S_IFDIR,
    3: stat.S_IFCHR,
    4: stat.S_IFBLK,
    5: stat.S_IFIFO,
    6: stat.S_IFSOCK,
}
KINDS[7] = stat.S_IFLNK
PLAIN, INLINE, CHUNKS = 0, 2, 4


class _Inode(NamedTuple):
    layout: int
    mode: int
    uid: int
    gid: int
    size: int
    place: int
    nlink: int
    mtime_ns: int
    xattrs: tuple[tuple[str, bytes], ...]
    rest_at: int


def read_image(image: bytes, devices: Sequence[bytes]) -> Snapshot:
    """The tree in it, as `rig.snapshot.snapshot` of a mount."""
    return _Reader(image, devices).tree()


class _Reader:
    def __init__(self, image: bytes, devices: Sequence[bytes]) -> None:
        self._image, self._devices = image, devices
        assert len(image) % BLOCK == 0
        magic, _, self._features, bits, slots, self._root = unpack_from("<IIIBBH", image, 1024)
        self._inodes, seconds, nanoseconds, blocks, meta, xattrs = unpack_from("<QqIIII", image, 1024 + 16)
        incompatible, _, count, table = unpack_from("<IHHH", image, 1024 + 80)
        assert (magic, bits, slots) == (0xE0F5E1E2, 9, 0)
        assert incompatible & ~0xC == 0
        assert blocks * BLOCK == len(image)
        assert count == len(devices)
        self._time_ns = seconds * 10**9 + nanoseconds
        self._meta, self._shared = meta * BLOCK, xattrs * BLOCK
        for number, device in enumerate(devices):
            (stored,) = unpack_from("<I", image, table * 128 + number * 128 + 64)
            assert stored == -(-len(device) // BLOCK)

    def tree(self) -> Snapshot:
        places: dict[bytes, int] = {b".": self._root}
        subdirectories: Counter[int] = Counter()
        waiting = [(b"", self._root, self._root)]
        seen = {self._root}
        while waiting:
            prefix, number, parent = waiting.pop()
            for name, child, kind in self._directory(number, parent):
                places[prefix + name] = child
                mode = self._inode(child).mode
                assert stat.S_IFMT(mode) == kind
                if stat.S_ISDIR(mode):
                    assert child not in seen, "a directory has two names"
                    seen.add(child)
                    subdirectories[number] += 1
                    waiting.append((prefix + name + b"/", child, number))
        assert self._inodes == len(set(places.values()))
        names: dict[int, list[bytes]] = {}
        for path, number in places.items():
            names.setdefault(number, []).append(path)
        return {
            path: self._entry(number, sorted(names[number]), subdirectories[number])
            for path, number in places.items()
        }

    def _entry(self, number: int, names: list[bytes], subdirectories: int) -> Entry:
        inode = self._inode(number)
        kind = stat.S_IFMT(inode.mode)
        is_directory = kind == stat.S_IFDIR
        assert inode.nlink == (2 + subdirectories if is_directory else len(names))
        content = b"" if is_directory else self._content(inode)
        return Entry(
            type=TYPES[kind],
            mode=stat.S_IMODE(inode.mode),
            uid=inode.uid,
            gid=inode.gid,
            size=None if is_directory else inode.size,
            mtime_ns=inode.mtime_ns,
            rdev=_device(inode.place) if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0,
            nlink=inode.nlink,
            group=names[0] if len(names) > 1 else None,
            target=content if kind == stat.S_IFLNK else None,
            xattrs=inode.xattrs,
            sha256=hashlib.sha256(content).hexdigest() if kind == stat.S_IFREG else None,
        )

    def _inode(self, number: int) -> _Inode:
        at = self._meta + number * SLOT
        assert at >= self._meta
        form, xattr_count, mode = unpack_from("<HHH", self._image, at)
        if form & 1:
            size, place, _, uid, gid, seconds, nanoseconds, nlink = unpack_from(
                "<QIIIIqII", self._image, at + 8
            )
            mtime_ns, head = seconds * 10**9 + nanoseconds, 64
            assert nanoseconds < 10**9
        else:
            nlink, size, place, _, uid, gid = unpack_from("<HI4xIIHH", self._image, at + 6)
            mtime_ns, head = self._time_ns, 32
        xattr_size = 12 + (xattr_count - 1) * 4 if xattr_count else 0
        xattrs = tuple(sorted(self._xattrs(at + head, xattr_size)))
        assert len({name for name, _ in xattrs}) == len(xattrs)
        rest = at + head + xattr_size
        return _Inode(form >> 1, mode, uid, gid, size, place, nlink, mtime_ns, xattrs, rest)

    def _xattrs(self, at: int, size: int) -> Iterator[tuple[str, bytes]]:
        if not size:
            return
        count = self._image[at + 4]
        for number in range(count):
            (found,) = unpack_from("<I", self._image, at + 12 + 4 * number)
            yield self._xattr(self._shared + 4 * found)[0]
        place, end = at + 12 + 4 * count, at + size
        while place < end:
            pair, place = self._xattr(place)
            yield pair
        assert place == end

    def _xattr(self, at: int) -> tuple[tuple[str, bytes], int]:
        length, index, size = unpack_from("<BBH", self._image, at)
        name, end = self._image[at + 4 : at + 4 + length], at + 4 + length + size
        assert end <= len(self._image)
        value = self._image[end - size : end]
        return ((PREFIXES[index] + name).decode("utf-8", "surrogateescape"), value), -(-end // 4) * 4

    def _content(self, inode: _Inode) -> bytes:
        if inode.layout == CHUNKS:
            return self._chunks(inode)
        if not stat.S_ISREG(inode.mode) and not stat.S_ISLNK(inode.mode) and not stat.S_ISDIR(inode.mode):
            return b""
        inline = inode.size % BLOCK or (BLOCK if inode.size else 0) if inode.layout == INLINE else 0
        at, size = inode.place * BLOCK, inode.size - inline
        assert at + size <= len(self._image)
        tail = self._image[inode.rest_at : inode.rest_at + inline]
        if inline:
            first, last = inode.rest_at // BLOCK, (inode.rest_at + inline - 1) // BLOCK
            assert first == last, "what is inline lies across blocks"
        return self._image[at : at + size] + tail

    def _chunks(self, inode: _Inode) -> bytes:
        assert inode.place & ~0x3F == 0 and inode.place & 0x20
        chunk = BLOCK << (inode.place & 0x1F)
        content = bytearray(inode.size)
        indexes = -(-inode.rest_at // 8) * 8
        for number in range(-(-inode.size // chunk)):
            zero, device, block = unpack_from("<HHI", self._image, indexes + 8 * number)
            assert not zero
            if block == 0xFFFF_FFFF:
                continue
            start = number * chunk
            size = min(chunk, inode.size - start)
            source = self._devices[device - 1] if device else self._image
            assert block * BLOCK + size <= len(source) // BLOCK * BLOCK
            content[start : start + size] = source[block * BLOCK : block * BLOCK + size]
        return bytes(content)

    def _directory(self, number: int, parent: int) -> Iterator[tuple[bytes, int, int]]:
        """Names, but . and ..; inode numbers; types."""
        data = self._content(self._inode(number))
        before, own = b"", {}
        for start in range(0, len(data), BLOCK):
            block = data[start : start + BLOCK]
            (names_at,) = unpack_from("<H", block, 8)
            assert names_at and names_at % 12 == 0
            entries = [unpack_from("<QHB", block, at) for at in range(0, names_at, 12)]
            ends = [at for _, at, _ in entries[1:]]
            for (child, at, kind), end in zip(entries, [*ends, len(block)], strict=True):
                name = block[at:end].rstrip(b"\0")
                assert name > before and b"/" not in name and b"\0" not in name
                before = name
                if name in (b".", b".."):
                    own[name] = child
                else:
                    yield name, child, KINDS[kind]
        assert own == {b".": number, b"..": parent}


def _device(encoded: int) -> int:
    """kdev_t.h: new_decode_dev; st_rdev's way of saying it is that of glibc."""
    return os.makedev((encoded & 0xFFF00) >> 8, (encoded & 0xFF) | (encoded >> 12 & 0xFFF00))
