"""A container's tree as a tar: all of it, or the layer that its changes make. Blocking.

Members come sorted, a directory before what is in it, an opaque marker right after its directory. Names of
one file are hard links to the first of them; content is written once. Sockets are left out: a tar cannot hold
them, and nobody listens behind them any more.
"""

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Iterator

from .changes import Change, changes, everything
from .errors import NotFound, Stale
from .inodes import run
from .objects import Object
from .openfile import OpenFile
from .rootfs import Rootfs
from .tarwriter import Sink, TarWriter, is_storable

__all__ = ["export_layer", "export_tree", "state_of"]

_HOLE_LEAST = 4096
"""Bytes; pieces of a file between smaller holes are written as one, which is smaller and faster to read."""


def export_tree(tree: Rootfs, sink: Sink) -> None:
    """The whole tree, as `podman export` writes it; its root is the member ``.``."""
    _write(tree, TarWriter(sink), everything(tree))


def export_layer(tree: Rootfs, sink: Sink, latest_ns: int | None = None) -> bool:
    """What makes `tree` of its image, as a layer (OCI image-spec, layer.md). Whether there was anything.

    No time in it is after `latest_ns`. The same changes give the same bytes.
    """
    found = list(changes(tree))
    if all(change.kind is None for change in found):
        found = []
    _write(tree, TarWriter(sink, latest_ns), iter(found))
    return bool(found)


def state_of(tree: Rootfs) -> bytes | None:
    """Something that differs whenever what `export_layer` would write does; None while that changes.

    Every change of an object sets its ctime (inode(7)), every change of a directory that of the directory.
    """
    digest = hashlib.sha256()
    try:
        for change in changes(tree):
            ctime_ns = tree.attr(change.thing).ctime_ns if change.thing is not None else 0
            digest.update(b"%d %d %b\0" % (ctime_ns, change.thing is None, change.path))
    except (FileNotFoundError, NotFound, Stale):
        return None
    return digest.digest()


def _write(tree: Rootfs, tar: TarWriter, found: Iterator[Change]) -> None:
    first: dict[object, bytes] = {}
    for change in found:
        thing = change.thing
        if thing is None:
            tar.add_whiteout(change.path)
            continue
        attr = tree.attr(thing)
        if not is_storable(attr.mode):
            continue
        if stat.S_ISDIR(attr.mode):
            tar.add(change.path, attr, tree.xattrs(thing))
            if change.is_opaque:
                tar.add_opaque(change.path)
            continue
        known = first.setdefault(thing.key, change.path)
        if known != change.path:
            tar.add_link(change.path, attr, known)
        elif stat.S_ISREG(attr.mode):
            with _opened(tree, thing) as file:
                # Its size may have changed since; what is written is what the header says.
                attr = tree.attr(thing)
                tar.add_file(
                    change.path, attr, tree.xattrs(thing), _data(file.runs(attr.size)), _reader(file)
                )
        else:
            target = tree.readlink(thing) if stat.S_ISLNK(attr.mode) else b""
            tar.add(change.path, attr, tree.xattrs(thing), target)
    tar.close()


@contextlib.contextmanager
def _opened(tree: Rootfs, thing: Object) -> Iterator[OpenFile]:
    file = tree.open_for(thing, os.O_RDONLY)
    try:
        yield file
    finally:
        file.close()


def _reader(file: OpenFile) -> Callable[[int, int], bytes]:
    def read(offset: int, size: int) -> bytes:
        data = run(file.read(offset, size))
        return data + bytes(size - len(data))  # shorter where it was truncated meanwhile

    return read


def _data(runs: Iterator[tuple[int, int]]) -> list[tuple[int, int]]:
    """The runs of data, those that only a small hole parts as one."""
    joined: list[tuple[int, int]] = []
    for offset, length in runs:
        if joined and offset - sum(joined[-1]) < _HOLE_LEAST:
            start, _ = joined.pop()
            offset, length = start, offset + length - start
        joined.append((offset, length))
    return joined
