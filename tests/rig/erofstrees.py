"""Trees in memory for EROFS images: what is written, and what a mount of the image must show. Blocking."""

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rig.snapshot import TYPES, Entry, Snapshot

from fusestore.erofs import Device, write_image
from fusestore.nodes import Attr, Extent, Xattrs
from fusestore.syscalls import MNT_DETACH, MOUNT_ATTR_RDONLY, make_mount, move_mount, umount2

__all__ = ["MemoryTree", "Thing", "mounted", "written"]


@dataclass(eq=False, slots=True)
class Thing:
    """One object of a tree. Several names may lead to a non-directory."""

    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    xattrs: Xattrs = ()
    rdev: int = 0
    target: bytes = b""
    size: int = 0
    device: int = 0
    extents: Sequence[Extent] = ()
    children: dict[bytes, "Thing"] = field(default_factory=dict)

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)


class MemoryTree:
    """A tree with its devices, which hold the content."""

    def __init__(self, root: Thing, devices: Sequence[bytes] = ()) -> None:
        self.root = root
        self.devices = devices
        self._places: dict[Thing, list[bytes]] = {}
        for path, thing in self._walk(root, b""):
            self._places.setdefault(thing, []).append(path)

    def __repr__(self) -> str:
        return f"MemoryTree({self.root}, {[len(data) for data in self.devices]} bytes)"

    def _walk(self, directory: Thing, prefix: bytes) -> Iterator[tuple[bytes, Thing]]:
        waiting = [(prefix, directory)]
        while waiting:
            prefix, directory = waiting.pop()
            for name, child in directory.children.items():
                yield prefix + name, child
                if child.is_directory:
                    waiting.append((prefix + name + b"/", child))

    def things(self) -> Iterator[Thing]:
        """All but the root, once each."""
        return iter(self._places)

    def listing(self, directory: Thing) -> Mapping[bytes, Thing]:
        return directory.children

    def attr(self, thing: Thing) -> Attr:
        nlink = 1 if thing.is_directory else len(self._places[thing])
        size = len(thing.target) or thing.size
        time_ns = thing.mtime_ns
        return Attr(thing.mode, thing.uid, thing.gid, size, thing.rdev, nlink, 0, time_ns, time_ns, time_ns)

    def xattrs(self, thing: Thing) -> Xattrs:
        return thing.xattrs

    def target(self, thing: Thing) -> bytes:
        return thing.target

    def content(self, thing: Thing) -> tuple[int, Sequence[Extent]]:
        return thing.device, thing.extents

    def read(self, device: int, offset: int, size: int) -> bytes:
        return self.devices[device][offset : offset + size]

    def expected(self) -> Snapshot:
        """What a reader of a mount sees."""
        return {path: self._entry(thing) for path, thing in [(b".", self.root), *self._walk(self.root, b"")]}

    def _entry(self, thing: Thing) -> Entry:
        kind = stat.S_IFMT(thing.mode)
        places = self._places.get(thing, [])
        subdirectories = sum(child.is_directory for child in thing.children.values())
        return Entry(
            type=TYPES[kind],
            mode=stat.S_IMODE(thing.mode),
            uid=thing.uid,
            gid=thing.gid,
            size=None if thing.is_directory else len(thing.target) or thing.size,
            mtime_ns=thing.mtime_ns,
            rdev=thing.rdev,
            nlink=2 + subdirectories if thing.is_directory else len(places),
            group=min(places) if len(places) > 1 else None,
            target=thing.target if kind == stat.S_IFLNK else None,
            xattrs=tuple(sorted((name.decode(), value) for name, value in thing.xattrs)),
            sha256=hashlib.sha256(self._bytes(thing)).hexdigest() if kind == stat.S_IFREG else None,
        )

    def _bytes(self, thing: Thing) -> bytes:
        content = bytearray(thing.size)
        for offset, length, source in thing.extents:
            content[offset : offset + length] = self.read(thing.device, source, length)
        return bytes(content)


def written(tree: MemoryTree, path: Path) -> list[Path]:
    """Writes the image at `path`, and its devices, whose paths are returned, beside it."""
    devices = [path.with_name(f"{path.name}.{number}") for number in range(len(tree.devices))]
    for place, data in zip(devices, tree.devices, strict=True):
        place.write_bytes(data)
    with path.open("w+b") as output:
        write_image(tree, [Device(b"", len(data)) for data in tree.devices], output)
    return devices


@contextmanager
def mounted(image: Path, devices: Iterable[Path], at: Path) -> Iterator[Path]:
    """The kernel's mount of an image. Its files are local: nothing in it can hang."""
    at.mkdir(exist_ok=True)
    options = [(b"source", os.fsencode(image)), *((b"device", os.fsencode(path)) for path in devices)]
    mount = make_mount(b"erofs", options, MOUNT_ATTR_RDONLY)
    try:
        directory = os.open(at, os.O_PATH | os.O_DIRECTORY)
        try:
            move_mount(mount, directory)
        finally:
            os.close(directory)
    finally:
        os.close(mount)
    try:
        yield at
    finally:
        umount2(os.fsencode(at), MNT_DETACH)
