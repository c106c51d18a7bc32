"""A layer that is read in parts becomes one whose blob is here. Blocking.

First all of the blob is fetched, from its beginning on, into `part` (layout.py, **lazy.<blob>**); how far
that came is written down, after a sync, so that it goes on there whatever ended it. Then it is taken in as
any blob is: hashed, decompressed to its diff_id and indexed. What it shows is compared with what was shown
until now, by the table of contents: names, types, owners, times, and the content by its digests.

One process completes a layer; who comes meanwhile waits, and finds it done.
"""

import contextlib
import logging
import os
import stat
from collections.abc import Callable, Iterator
from fcntl import LOCK_EX, flock
from hashlib import sha256
from itertools import zip_longest

from . import disk
from .blobs import Ingested, LayerReader, derive, open_reader
from .chunktable import ChunkTable
from .durable import Scratch, Workspace, open_directory, read_file, write_at
from .errors import NotFetched, StoreDamaged
from .layer import LayerIndex
from .layerref import LayerRef, map_index
from .layout import Layout
from .spancache import SpanCache

__all__ = ["complete", "difference", "read_ahead"]

_log = logging.getLogger("fusestore")

_PIECE = 1 << 20
"""Bytes of one request."""
_SYNCED = 16 << 20
"""Bytes that a crash costs, at most."""
_SECOND_NS = 1_000_000_000

Fetch = Callable[[int, int], bytes]
"""Gives these bytes of the blob, or raises NotFetched."""


def read_ahead(layout: Layout, workspace: Workspace, ref: LayerRef, table: ChunkTable, fetch: Fetch) -> None:
    """Fetches what whoever built the layer wants to be there early. Raises NotFetched."""
    with _held(layout.lazy(ref.diff_id, ref.blob)) as directory:
        if directory and _reached(directory) < table.prefetch_end:
            _download(workspace, directory, table.prefetch_end, fetch)


def complete(layout: Layout, workspace: Workspace, ref: LayerRef, table: ChunkTable, fetch: Fetch) -> None:
    """Returns when the blob is in its place, or the image was deleted. Raises NotFetched."""
    with _held(layout.lazy(ref.diff_id, ref.blob)) as directory:
        if directory is None:
            return
        if not os.path.exists(layout.blob(ref.blob)):
            _download(workspace, directory, ref.size, fetch)
            with workspace.scratch() as scratch:
                _take_in(layout, workspace, ref, table, directory, scratch)
        with workspace.lock():
            workspace.discard(directory)


@contextlib.contextmanager
def _held(directory: str) -> Iterator[str | None]:
    """The right to fetch all of it; None: somebody else did, or it was deleted."""
    try:
        fd = open_directory(directory)
    except FileNotFoundError:
        yield None
        return
    try:
        flock(fd, LOCK_EX)
        yield directory if os.path.exists(directory) else None
    finally:
        os.close(fd)


def _reached(directory: str) -> int:
    try:
        return int(read_file(Layout.lazy_reached_in(directory), 32))
    except (FileNotFoundError, ValueError):
        return 0


def _download(workspace: Workspace, directory: str, end: int, fetch: Fetch) -> None:
    """Bytes of the blob up to `end`, from where the last one stopped."""
    start = synced = _reached(directory)
    fd = os.open(Layout.lazy_part_in(directory), os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        while start < end:
            data = fetch(start, min(start + _PIECE, end))
            write_at(fd, data, start)
            start += len(data)
            if start - synced >= _SYNCED or start >= end:
                disk.current.fdatasync(fd)
                synced = start
                with workspace.lock():
                    if os.path.exists(directory):  # the image may have been deleted
                        workspace.write_file(Layout.lazy_reached_in(directory), b"%d" % start)
    finally:
        os.close(fd)


def _take_in(
    layout: Layout, workspace: Workspace, ref: LayerRef, table: ChunkTable, directory: str, scratch: Scratch
) -> None:
    part = Layout.lazy_part_in(directory)
    fd = os.open(part, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        flock(fd, LOCK_EX)  # nobody writes into it from now on
        disk.current.fsync(fd)
        try:
            made = derive(part, blob=ref.blob, diff_id=ref.diff_id)
        except StoreDamaged as error:
            # What the registry sent may have been damaged on its way: from the beginning, then.
            with workspace.lock():
                workspace.unlink(Layout.lazy_reached_in(directory))
            raise NotFetched(
                f"what the registry sent of layer {ref.blob} is another blob ({error.__cause__}): it is"
                " fetched anew"
            ) from error
        moves = _stage(layout, ref, made, scratch)
        wrong = _compare(table, made, directory, scratch)
        if wrong:
            _log.error(
                "layer %s is damaged: its table of contents, by which it was shown, says otherwise than its"
                " tar: %s; from the next mount on it is shown as the tar says",
                ref.blob,
                wrong,
            )
        with workspace.lock():
            if not os.path.exists(directory):
                return  # the image was deleted
            workspace.publish(*moves, (part, layout.blob(ref.blob)))
    finally:
        os.close(fd)


def _stage(layout: Layout, ref: LayerRef, made: Ingested, scratch: Scratch) -> list[tuple[str, str]]:
    scratch.write("index", made.index)
    scratch.write("seek", made.seek)
    scratch.sync()
    return [
        (scratch.join("index"), layout.layer_index(ref.diff_id)),
        (scratch.join("seek"), layout.seek_table(ref.diff_id, ref.blob)),
    ]


def _compare(table: ChunkTable, made: Ingested, directory: str, scratch: Scratch) -> str:
    shown = map_index(Layout.lazy_index_in(directory))
    part = Layout.lazy_part_in(directory)
    reader = open_reader(part, scratch.join("seek"), SpanCache(0), scratch.join("cache"), made.tar_size)
    try:
        return difference(shown, table, LayerIndex(made.index), reader)
    finally:
        reader.close()


def difference(shown: LayerIndex, table: ChunkTable, real: LayerIndex, reader: LayerReader) -> str:
    """The first thing in which the two trees differ; "" for none. `reader` is of the tar of `real`.

    Times may differ by less than a second: eStargz has no more of them.
    """
    files: list[tuple[int, int, bytes]] = []
    waiting = [(LayerIndex.ROOT, b"")]
    seen = set()
    while waiting:
        directory, path = waiting.pop()
        if _facts(shown, directory) != _facts(real, directory) or not _same_time(shown, real, directory):
            return _named(path, "its attributes")
        for one, other in zip_longest(shown.children(directory), real.children(directory)):
            if one != other:
                name = min(found[0] for found in (one, other) if found is not None)
                return _named(path + b"/" + name, "whether it is there, or which links there are")
            name, ino = one
            below = path + b"/" + name
            if stat.S_ISDIR(real.mode(ino)):
                waiting.append((ino, below))
            elif _facts(shown, ino) != _facts(real, ino) or not _same_time(shown, real, ino):
                return _named(below, "its attributes")
            elif stat.S_ISREG(real.mode(ino)) and not real.is_lower_link(ino) and ino not in seen:
                seen.add(ino)
                extents = real.extents(ino)
                files.append((extents[0].source if extents else 0, ino, below))
    # In the order of the tar: it is decompressed once.
    for _, ino, path in sorted(files):
        if not _same_content(shown, table, real, reader, ino):
            return _named(path, "its content")
    return ""


def _named(path: bytes, what: str) -> str:
    return f"{what}, of {os.fsdecode(path)!r}"


def _facts(index: LayerIndex, ino: int) -> tuple[object, ...]:
    attr = index.attr(ino)
    is_lower = index.is_lower_link(ino)
    target = index.target(ino) if stat.S_ISLNK(attr.mode) or is_lower else b""
    flags = index.is_opaque(ino), index.is_implicit(ino), is_lower
    known = attr.mode, attr.uid, attr.gid, attr.size, attr.rdev, attr.nlink
    return known, flags, target, sorted(index.xattrs(ino))


def _same_time(shown: LayerIndex, real: LayerIndex, ino: int) -> bool:
    return abs(shown.attr(ino).mtime_ns - real.attr(ino).mtime_ns) < _SECOND_NS


def _same_content(
    shown: LayerIndex, table: ChunkTable, real: LayerIndex, reader: LayerReader, ino: int
) -> bool:
    size = real.attr(ino).size
    start = shown.extents(ino)[0].source if size else 0
    offset = 0
    while offset < size:
        chunk = table[table.find(start + offset)]
        data = bytearray(chunk.size)
        for extent in real.extents(ino):
            low, high = max(offset, extent.offset), min(offset + chunk.size, extent.offset + extent.length)
            if low < high:
                data[low - offset : high - offset] = reader.read(
                    extent.source + low - extent.offset, high - low
                )
        if chunk.start != start + offset or sha256(data).digest() != chunk.digest:
            return False
        offset += chunk.size
    return True
