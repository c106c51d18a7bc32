"""The writer of tars: layers of committed containers, exports of whole trees. Pure: bytes go to `sink`.

tarfile makes the headers (POSIX.1-2001, pax); here is what it leaves to its callers: times to the nanosecond,
xattrs (``SCHILY.xattr.*``), sparse files (GNU's format 1.0), and the markers of the OCI image-spec (layer.md,
"Whiteouts"). The same calls give the same bytes: no user names, no time of writing.
"""

import stat
import tarfile
from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from urllib.parse import quote_from_bytes

from .nodes import Attr, Xattrs, device_major, device_minor

__all__ = ["Sink", "TarWriter", "is_storable"]

Sink = Callable[[bytes], object]
Read = Callable[[int, int], bytes]
"""(offset, size) in a file → its bytes, exactly `size`."""

_NS = 1_000_000_000
_PIECE = 1 << 20
_TYPES = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
}
_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"


def is_storable(mode: int) -> bool:
    """Whether a tar can hold an object of that type: sockets it cannot."""
    return stat.S_IFMT(mode) in _TYPES


class TarWriter:
    """Writes members in the order they are added; `close` ends the archive."""

    def __init__(self, sink: Sink, latest_ns: int | None = None) -> None:
        """`latest_ns`: no time later than that is written (SOURCE_DATE_EPOCH, reproducible-builds.org)."""
        self._sink = sink
        self._latest_ns = latest_ns
        self._written = 0

    def add(self, path: bytes, attr: Attr, xattrs: Xattrs, target: bytes = b"") -> None:
        """A directory, symbolic link (to `target`), device or FIFO; b"" is the root. Raises ValueError."""
        self._header(self._info(path, attr, xattrs, target))

    def add_link(self, path: bytes, attr: Attr, first: bytes) -> None:
        """One more name for the non-directory that was added as `first`."""
        info = self._info(path, attr, (), first)
        info.type = tarfile.LNKTYPE
        self._header(info)

    def add_file(
        self, path: bytes, attr: Attr, xattrs: Xattrs, data: Sequence[tuple[int, int]], read: Read
    ) -> None:
        """A regular file; `data`: (offset, length) of what is no hole, ascending; only that is read.

        A file without holes has one such run, an empty one none.
        """
        info = self._info(path, attr, xattrs, b"")
        if not attr.size or list(data) == [(0, attr.size)]:
            info.size = attr.size
            self._header(info)
            self._data(data, read)
            return
        # tar.texi, "PAX Format, Version 1.0": the map stands before the data, in decimal lines.
        runs = [*data, (attr.size, 0)] if not data or sum(data[-1]) < attr.size else list(data)
        numbers = [len(runs), *(number for run in runs for number in run)]
        table = b"".join(b"%d\n" % number for number in numbers)
        table += bytes(-len(table) % tarfile.BLOCKSIZE)
        directory, _, name = _text(path).rpartition("/")
        info.pax_headers = {
            **info.pax_headers,
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.name": _text(path),
            "GNU.sparse.realsize": str(attr.size),
        }
        info.name = "/".join(filter(None, (directory, "GNUSparseFile.0", name)))
        info.size = len(table) + sum(length for _, length in data)
        self._header(info)
        self._put(table)
        self._data(data, read)

    def add_whiteout(self, path: bytes) -> None:
        """`path`, of a layer below, is gone."""
        directory, slash, name = path.rpartition(b"/")
        self._marker(directory + slash + _WHITEOUT + name)

    def add_opaque(self, path: bytes) -> None:
        """Nothing that layers below have in the directory `path` is in it."""
        self._marker(path + b"/" + _OPAQUE if path else _OPAQUE)

    def close(self) -> None:
        self._put(bytes(2 * tarfile.BLOCKSIZE))
        self._put(bytes(-self._written % tarfile.RECORDSIZE))

    def _marker(self, path: bytes) -> None:
        info = tarfile.TarInfo(_text(path))
        info.mode = 0
        self._header(info)

    def _info(self, path: bytes, attr: Attr, xattrs: Xattrs, target: bytes) -> tarfile.TarInfo:
        format_bits = stat.S_IFMT(attr.mode)
        if format_bits not in _TYPES:
            raise ValueError(f"a tar cannot hold {path!r}")
        # Go's readers, and GNU tar, tell a root by "./".
        info = tarfile.TarInfo(_text(path) or ".")
        info.type = _TYPES[format_bits]
        info.mode = attr.mode & 0o7777
        info.uid, info.gid = attr.uid, attr.gid
        info.linkname = _text(target)
        if format_bits in (stat.S_IFCHR, stat.S_IFBLK):
            info.devmajor, info.devminor = device_major(attr.rdev), device_minor(attr.rdev)
        mtime_ns = attr.mtime_ns if self._latest_ns is None else min(attr.mtime_ns, self._latest_ns)
        info.mtime = mtime_ns // _NS
        extended = dict(_xattr_record(name, value) for name, value in sorted(xattrs))
        if mtime_ns % _NS:
            extended["mtime"] = _seconds(mtime_ns)
        info.pax_headers = extended
        return info

    def _header(self, info: tarfile.TarInfo) -> None:
        self._put(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))

    def _data(self, runs: Iterable[tuple[int, int]], read: Read) -> None:
        for offset, length in runs:
            end = offset + length
            while offset < end:
                piece = read(offset, min(_PIECE, end - offset))
                self._put(piece)
                offset += len(piece)
        self._put(bytes(-self._written % tarfile.BLOCKSIZE))

    def _put(self, data: bytes) -> None:
        self._sink(data)
        self._written += len(data)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _xattr_record(name: bytes, value: bytes) -> tuple[str, str]:
    """In libarchive's spelling where a pax keyword cannot be that name; Go's tools know only SCHILY's."""
    try:
        keyword = name.decode()
    except UnicodeDecodeError:
        keyword = "="
    if "=" in keyword:
        return "LIBARCHIVE.xattr." + quote_from_bytes(name, safe=""), b64encode(value).decode()
    return "SCHILY.xattr." + keyword, _text(value)


def _seconds(ns: int) -> str:
    """Decimal seconds, as pax wants them; exact, and right before 1970 too."""
    sign = "-" if ns < 0 else ""
    return f"{sign}{abs(ns) // _NS}.{abs(ns) % _NS:09}".rstrip("0")
