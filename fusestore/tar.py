"""A tar stream as entries: bytes in, `TarEntry` out, no file anywhere. Pure.

Reads what layers are made of: ustar, PAX (POSIX.1-2001 pax, headers x and g), GNU (L, K, S, base-256 numbers)
and the three PAX sparse formats of GNU tar; the manuals are POSIX "pax", tar(5) of libarchive and GNU tar's
"Sparse Formats". Where these leave a choice, Go's archive/tar decides, because umoci, skopeo and podman read
through it: links, directories, devices and FIFOs have no content whatever their size field says, a GNU long
name goes before a PAX path, and entry types that it hands on and umoci then refuses are refused here. Unlike
Go, a g header acts on the entries after it, as POSIX, GNU tar and libarchive have it.

Invariants: any chunking of the same bytes gives the same entries; memory is bounded by `TarLimits`, never by
what a header declares; the only exception that leaves this module is LayerRefused.

A maintainer must not let a number of the input reach an allocation or a seek before it is compared with a
limit, and must not use floats: an mtime has nanoseconds, a double has not.
"""

import re
from binascii import a2b_base64
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from struct import Struct
from typing import NamedTuple, TypedDict, TypeVar
from urllib.parse import unquote_to_bytes
from zlib import adler32

from . import acl
from .errors import BadInput, LayerRefused
from .nodes import MAJOR_END, MINOR_END, Extent, TarEntry, Xattrs, make_device

__all__ = ["TarLimits", "TarScanner"]

T = TypeVar("T")

BLOCK = 512
_ACLS = {b"SCHILY.acl.access": acl.ACCESS, b"SCHILY.acl.default": acl.DEFAULT}
"""ACLs as text, of star, GNU tar and libarchive; SCHILY.xattr.system.posix_acl_… goes before it."""


@dataclass(frozen=True, slots=True)
class TarLimits:
    """What one tar may ask of us. The defaults are far above real layers and far below what hurts."""

    total: int = 64 << 30
    """Bytes of the tar: the bound on decompression bombs (design.md section 4)."""
    entries: int = 10_000_000
    """Entries of the tar: at 20 µs each an import of this many takes minutes, not days."""
    extended_header: int = 1 << 20
    """Bytes in one x, g, L or K header, and in one sparse map. Go's archive/tar has the same limit."""
    extended_headers_per_entry: int = 16
    """x, g, L and K headers in a row; real tars have at most four."""
    sparse_extents: int = 65_536
    """Extents of one sparse file: each costs 24 bytes in the index."""
    xattr_name: int = 255
    """XATTR_NAME_MAX of linux/limits.h: a longer one can be stored nowhere."""
    xattr_value: int = 65_536
    """XATTR_SIZE_MAX of linux/limits.h."""
    xattrs: int = 256 << 10
    """Bytes of names and values of one entry's xattrs."""


class _Malformed(Exception):
    """What is wrong, without the place: `TarScanner.feed` adds it."""


class _Pax(TypedDict, total=False):
    """The records of an x or g header that are known here. None: an empty value, which undoes a g record."""

    path: bytes | None
    linkpath: bytes | None
    size: int | None
    uid: int | None
    gid: int | None
    mtime_ns: int | None
    xattrs: dict[bytes, bytes]
    sparse: dict[bytes, bytes]
    sparse_pairs: list[int]
    """GNU.sparse.offset and GNU.sparse.numbytes of format 0.0, in turn."""


class _Header(NamedTuple):
    """The fields of a header block that are used, as they stand."""

    name: bytes
    mode: bytes
    uid: bytes
    gid: bytes
    size: bytes
    mtime: bytes
    checksum: bytes
    type: bytes
    link: bytes
    magic: bytes
    dev_major: bytes
    dev_minor: bytes
    prefix: bytes
    trailer: bytes


@dataclass(slots=True)
class _Sparse:
    """A sparse file whose map is still being read."""

    entry: TarEntry
    real_size: int
    stored: int
    """Bytes of content in the tar, the map of format 1.0 not counted."""
    pairs: list[int]
    """Offset and length in turn."""
    map_text: bytearray
    """Of format 1.0: what has been read of the map, whole blocks."""
    map_lines: int


_HEADER = Struct("100s 8s 8s 8s 12s 12s 8s c 100s 8s 64x 8s 8s 155s 8x 4s")
_ZERO_BLOCK = bytes(BLOCK)
_EXTENDED_TYPES = frozenset(b"xgLK"[i : i + 1] for i in range(4))
_REGULAR_TYPES = frozenset((b"0", b"\0", b"7"))
_HEADER_ONLY_TYPES = frozenset(b"123456"[i : i + 1] for i in range(6))
_PREFIX_OF_STAR = 131
"""star keeps atime and ctime behind a shorter prefix; "tar\\0" at the end of the block tells."""

_INT64_END = 1 << 63
_ID_END = (1 << 32) - 1
"""uid_t and gid_t are 32 bits and their largest value means "leave as it is" to chown(2)."""

_PAX_LENGTH = re.compile(rb"([1-9][0-9]{0,8}) ")
_PAX_NUMBER = re.compile(rb"[0-9]{1,19}")
_PAX_TIME = re.compile(rb"(-?)([0-9]{1,19})(?:\.([0-9]*))?")
_MEMO_SIZE = 16_384

_OLD_SPARSE_IN_HEADER = range(386, 386 + 4 * 24, 24)
_OLD_SPARSE_IN_EXTENSION = range(0, 21 * 24, 24)


class TarScanner:
    """Turns the bytes of one tar into entries. One thread at a time; of no use after LayerRefused.

    Every piece of the tar that is needed whole (a header, the body of an extended header, a block of a sparse
    map) is collected, then given to the one method that knows it, `_step`; content is skipped.
    """

    __slots__ = (
        "_checksums",
        "_entries",
        "_extended_headers",
        "_extended_type",
        "_global_pax",
        "_limits",
        "_long_link",
        "_long_name",
        "_need",
        "_numbers",
        "_padding",
        "_partial",
        "_pax",
        "_position",
        "_size",
        "_skip",
        "_sparse",
        "_step",
    )

    def __init__(self, limits: TarLimits = TarLimits()) -> None:
        self._limits = limits
        self._size = 0
        self._position = 0  # in the tar: of the next byte that no step has taken
        self._partial = bytearray()  # the beginning of the next piece
        self._need = BLOCK  # length of the next piece
        self._skip = 0
        self._padding = 0  # of what is skipped, the bytes after the content
        self._step: Callable[[bytes], TarEntry | None] | None = self._read_header  # None: past the end blocks
        self._entries = 0
        self._extended_headers = 0
        self._extended_type = b""
        self._global_pax: _Pax | None = None
        self._pax: _Pax | None = None
        self._long_name: bytes | None = None
        self._long_link: bytes | None = None
        self._sparse: _Sparse | None = None
        self._numbers = _NumberMemo()
        self._checksums = _ChecksumMemo()

    @property
    def size(self) -> int:
        """Bytes fed so far, those after the end blocks too: at the end, the size of the tar."""
        return self._size

    def feed(self, data: bytes | memoryview) -> list[TarEntry]:
        """The entries whose headers end in `data`, in the order of the tar.

        Raises LayerRefused for what breaks the format or a limit; entries of the same `data` are then lost.
        """
        self._size += len(data)
        if self._size > self._limits.total:
            raise LayerRefused(f"tar is larger than {self._limits.total} bytes (limit: total)")
        entries: list[TarEntry] = []
        here, end = 0, len(data)
        while self._step is not None:
            if self._skip:
                skipped = min(self._skip, end - here)
                self._skip -= skipped
                self._position += skipped
                here += skipped
                if self._skip:
                    break
            if self._partial:
                part = data[here : here + self._need - len(self._partial)]
                self._partial += part
                here += len(part)
                if len(self._partial) < self._need:
                    break
                piece = bytes(self._partial)
                self._partial.clear()
            elif end - here >= self._need:
                piece = bytes(data[here : here + self._need])
                here += self._need
            else:
                self._partial += data[here:]
                break
            self._position += len(piece)
            try:
                entry = self._step(piece)
            except _Malformed as error:
                raise LayerRefused(f"tar at byte {self._position - len(piece)}: {error}") from None
            if entry is not None:
                entries.append(entry)
        return entries

    def close(self) -> None:
        """Says that no byte follows. Raises LayerRefused where the tar stops within an entry.

        The end blocks may be missing, or one of them: GNU tar and Go accept both. So may the padding of the
        last entry: `umoci insert` writes none, and Go does not miss it.
        """
        if self._step is None:
            return
        within_content = self._skip > self._padding or self._sparse is not None
        unfinished = within_content or self._partial or self._extended_headers
        if unfinished or self._step == self._read_extended:
            raise LayerRefused(f"tar is truncated: it ends at byte {self._size}, within an entry")

    # What the next piece is: each method takes it, sets what comes after it, and may give an entry.

    def _read_header(self, block: bytes) -> TarEntry | None:
        if block == _ZERO_BLOCK:
            self._step = self._read_second_zero_block
            return None
        header = _HEADER.unpack(block)
        checksum = header[6]
        total = (adler32(block[:256]) & 0xFFFF) + (adler32(block[256:]) & 0xFFFF)
        if total != self._checksums[checksum]:
            _check_signed_sum(block, checksum, self._numbers)
        kind: bytes = header[7]
        if kind in _EXTENDED_TYPES:
            self._start_extended(kind, self._numbers[header[4]])
            return None
        self._entries += 1
        if self._entries > self._limits.entries:
            raise _Malformed(f"more than {self._limits.entries} entries (limit: entries)")
        entry = self._finish_entry(_Header._make(header), block)
        if self._sparse is None:
            self._forget_extended()
        return entry

    def _read_second_zero_block(self, block: bytes) -> None:
        if block != _ZERO_BLOCK:
            raise _Malformed("a header after a block of zeros; tools disagree about what follows")
        self._step = None

    def _start_extended(self, kind: bytes, size: int) -> None:
        self._extended_headers += 1
        if self._extended_headers > self._limits.extended_headers_per_entry:
            raise _Malformed("too many extended headers before an entry (limit: extended_headers_per_entry)")
        if not 0 <= size <= self._limits.extended_header:
            raise _Malformed(f"extended header of {size} bytes (limit: extended_header)")
        self._extended_type = kind
        if size:
            self._step, self._need = self._read_extended, size
        else:
            self._read_extended(b"")

    def _read_extended(self, body: bytes) -> None:
        self._step, self._need = self._read_header, BLOCK
        self._skip = -len(body) % BLOCK
        if self._extended_type == b"L":
            self._long_name = _until_nul(body)
        elif self._extended_type == b"K":
            self._long_link = _until_nul(body)
        elif self._extended_type == b"x":
            self._pax = _parse_pax(body, self._limits)
        else:
            # A g header belongs to all entries after it; one with nothing after it is no truncated entry.
            self._extended_headers -= 1
            records = _parse_pax(body, self._limits)
            records.pop("sparse", None)
            records.pop("sparse_pairs", None)
            self._global_pax = _merged(self._global_pax, records, self._limits)

    def _forget_extended(self) -> None:
        self._pax = self._long_name = self._long_link = None
        self._extended_headers = 0

    def _finish_entry(self, header: _Header, block: bytes) -> TarEntry | None:
        """The entry of a header block and the extended headers before it; None when a sparse map follows."""
        numbers = self._numbers
        kind = header.type
        path = _until_nul(header.name)
        if header.prefix[0] and header.magic.startswith(b"ustar\0"):
            prefix = header.prefix[:_PREFIX_OF_STAR] if header.trailer == b"tar\0" else header.prefix
            path = _until_nul(prefix) + b"/" + path
        link = _until_nul(header.link)
        size = numbers[header.size]
        uid = numbers[header.uid]
        gid = numbers[header.gid]
        mtime_ns = numbers[header.mtime] * 1_000_000_000
        xattrs: Xattrs = ()
        pax = self._pax
        if self._global_pax is not None:
            pax = _merged(self._global_pax, pax or {}, self._limits)
        if pax:
            path = path if (pax_path := pax.get("path")) is None else pax_path
            link = link if (pax_link := pax.get("linkpath")) is None else pax_link
            size = size if (pax_size := pax.get("size")) is None else pax_size
            uid = uid if (pax_uid := pax.get("uid")) is None else pax_uid
            gid = gid if (pax_gid := pax.get("gid")) is None else pax_gid
            mtime_ns = mtime_ns if (pax_mtime_ns := pax.get("mtime_ns")) is None else pax_mtime_ns
            if named := pax.get("xattrs"):
                xattrs = tuple(sorted(named.items()))
        if self._long_name is not None:
            path = self._long_name
        if self._long_link is not None:
            link = self._long_link
        if not (0 <= uid < _ID_END and 0 <= gid < _ID_END):
            raise _Malformed(f"owner {uid}:{gid} does not fit in 32 bits")
        mode = numbers[header.mode] & 0o7777
        rdev = 0

        if kind in _REGULAR_TYPES:
            if path.endswith(b"/"):
                # How tars of the seventies spell a directory. With content, readers disagree where the next
                # header is: Go's archive/tar and GNU tar would each see other files.
                if size:
                    raise _Malformed("a directory by its name that has content")
                kind = b"5"
            else:
                kind = b"0"
        elif kind in _HEADER_ONLY_TYPES:
            size = 0
            if kind in b"34":
                rdev = _device(numbers[header.dev_major], numbers[header.dev_minor])
        elif kind != b"S":
            raise _Malformed(f"entry type {kind!r} is none that a layer can have")
        if kind not in b"12":
            link = b""

        if size < 0 or self._position + size > self._limits.total:
            raise _Malformed(f"entry of {size} bytes in a tar of at most {self._limits.total} (limit: total)")
        sparse = pax.get("sparse", {}) if pax else {}
        sparse_pairs = pax.get("sparse_pairs", []) if pax else []
        if kind == b"S" or sparse or sparse_pairs:
            entry = TarEntry(b"0", path, link, mode, uid, gid, 0, mtime_ns, rdev, xattrs, ())
            if kind == b"S":
                return self._start_old_sparse(entry, size, block)
            return self._start_pax_sparse(entry, kind, size, sparse, sparse_pairs)
        self._padding = -size % BLOCK
        self._skip = size + self._padding
        data = (Extent(0, size, self._position),) if size else ()
        return TarEntry(kind, path, link, mode, uid, gid, size, mtime_ns, rdev, xattrs, data)

    # Sparse files. The map is in the header and in blocks after it (old GNU), in PAX records (0.0, 0.1) or at
    # the beginning of the content (1.0); in the content, runs of data follow each other without the holes.

    def _start_old_sparse(self, entry: TarEntry, stored: int, block: bytes) -> TarEntry | None:
        if block[257:263] != b"ustar ":
            raise _Malformed("a sparse entry (type S) in a tar that is not GNU's")
        self._sparse = _Sparse(entry, self._numbers[block[483:495]], stored, [], bytearray(), 0)
        return self._add_old_sparse(self._sparse, block, _OLD_SPARSE_IN_HEADER, more=block[482] != 0)

    def _read_old_sparse_extension(self, block: bytes) -> TarEntry | None:
        assert self._sparse is not None
        return self._add_old_sparse(self._sparse, block, _OLD_SPARSE_IN_EXTENSION, more=block[504] != 0)

    def _add_old_sparse(self, sparse: _Sparse, block: bytes, slots: range, *, more: bool) -> TarEntry | None:
        for slot in slots:
            if not block[slot]:
                break
            sparse.pairs.append(self._numbers[block[slot : slot + 12]])
            sparse.pairs.append(self._numbers[block[slot + 12 : slot + 24]])
        if more:
            # Blocks with nothing in them also count, or a stream of them would have no bound.
            sparse.map_lines += 1
            if sparse.map_lines * BLOCK > self._limits.extended_header:
                raise _Malformed("the map of a sparse file is too long (limit: extended_header)")
            self._check_extent_count(len(sparse.pairs) // 2)
            self._step = self._read_old_sparse_extension
            return None
        return self._finish_sparse(sparse)

    def _start_pax_sparse(
        self, entry: TarEntry, kind: bytes, stored: int, records: dict[bytes, bytes], pairs: list[int]
    ) -> TarEntry | None:
        if kind != b"0":
            raise _Malformed("sparse records for an entry that has no content")
        version = records.get(b"major", b""), records.get(b"minor", b"")
        if name := records.get(b"name"):
            entry = entry._replace(path=_without_nul(name))
        real_size = _pax_number(records.get(b"size") or records.get(b"realsize") or b"")
        if version == (b"1", b"0"):
            self._sparse = _Sparse(entry, real_size, stored, [], bytearray(), 0)
            self._step = self._read_sparse_map
            return None
        if version not in ((b"", b""), (b"0", b"0"), (b"0", b"1")):
            raise _Malformed(f"GNU sparse format {b'.'.join(version)!r} is unknown")
        if b"map" in records:
            pairs = [_pax_number(number) for number in records[b"map"].split(b",")] if records[b"map"] else []
        count = _pax_number(records[b"numblocks"]) if b"numblocks" in records else len(pairs) // 2
        if 2 * count != len(pairs):
            raise _Malformed("the map of a sparse file has another length than it says")
        return self._finish_sparse(_Sparse(entry, real_size, stored, pairs, bytearray(), 0))

    def _read_sparse_map(self, block: bytes) -> TarEntry | None:
        """One block of format 1.0: decimal numbers, a line each: how many pairs, then the pairs."""
        sparse = self._sparse
        assert sparse is not None
        sparse.map_text += block
        sparse.map_lines += block.count(b"\n")
        sparse.stored -= BLOCK
        if sparse.stored < 0 or len(sparse.map_text) > self._limits.extended_header:
            raise _Malformed("the map of a sparse file is longer than the entry (limit: extended_header)")
        count = _pax_number(bytes(sparse.map_text[: sparse.map_text.find(b"\n") + 1]).removesuffix(b"\n"))
        self._check_extent_count(count)
        if sparse.map_lines <= 2 * count:
            return None
        lines = bytes(sparse.map_text).split(b"\n", 2 * count + 1)
        sparse.pairs = [_pax_number(line) for line in lines[1 : 2 * count + 1]]
        return self._finish_sparse(sparse)

    def _finish_sparse(self, sparse: _Sparse) -> TarEntry:
        self._check_extent_count(len(sparse.pairs) // 2)
        if not 0 <= sparse.real_size < _INT64_END:
            raise _Malformed(f"sparse file of {sparse.real_size} bytes")
        source = self._position
        data: list[Extent] = []
        reached = 0
        for offset, length in zip(sparse.pairs[::2], sparse.pairs[1::2], strict=True):
            if length < 0 or offset < reached or offset + length > sparse.real_size:
                raise _Malformed("the map of a sparse file is not ascending or leaves the file")
            reached = offset + length
            if length:
                data.append(Extent(offset, length, source))
                source += length
        if source - self._position != sparse.stored:
            raise _Malformed("the map of a sparse file does not cover its content")
        self._padding = -sparse.stored % BLOCK
        self._skip = sparse.stored + self._padding
        self._step = self._read_header
        self._sparse = None
        self._forget_extended()
        return sparse.entry._replace(size=sparse.real_size, data=tuple(data))

    def _check_extent_count(self, count: int) -> None:
        if count > self._limits.sparse_extents:
            raise _Malformed(f"sparse file of {count} extents (limit: sparse_extents)")


class _NumberMemo(dict[bytes, int]):
    """Number fields, decoded. Real tars repeat the same few: a hit costs a tenth of the parsing."""

    def __missing__(self, field: bytes) -> int:
        if len(self) >= _MEMO_SIZE:
            self.clear()
        number = self[field] = _parse_number(field)
        return number


class _ChecksumMemo(dict[bytes, int]):
    """For a checksum field, what the two adler32 halves of its block add up to if the block is sound.

    adler32 of 256 bytes is cheap, and its low half is 1 plus their sum: 256 * 255 is below its modulus 65521.
    The field itself counts as eight spaces (POSIX, ustar).
    """

    def __missing__(self, field: bytes) -> int:
        if len(self) >= _MEMO_SIZE:
            self.clear()
        total = self[field] = _parse_number(field) + 2 + sum(field) - 8 * 0x20
        return total


def _check_signed_sum(block: bytes, checksum: bytes, numbers: _NumberMemo) -> None:
    """Some tars of old summed signed bytes; Go and GNU tar accept those too."""
    summed = block[:148] + b" " * 8 + block[156:]
    if numbers[checksum] != sum(byte - 256 if byte > 127 else byte for byte in summed):
        raise _Malformed("no tar header, or a damaged one: its checksum is wrong")


def _parse_number(field: bytes) -> int:
    """A number field: octal digits within spaces and NULs, or, with the first bit set, base-256 (GNU)."""
    if field[0] & 0x80:
        first = field[0] & 0x7F
        number = int.from_bytes(bytes((first,)) + field[1:], "big")
        if first & 0x40:
            number -= 1 << (8 * len(field) - 1)
        if not -_INT64_END <= number < _INT64_END:
            raise _Malformed("a number field that does not fit in 64 bits")
        return number
    digits = _until_nul(field.strip(b" \0")).rstrip(b" ")
    if not digits:
        return 0
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        raise _Malformed(f"{field!r} is no number field")
    return int(digits, 8)


def _until_nul(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _without_nul(value: bytes) -> bytes:
    if b"\0" in value:
        raise _Malformed("NUL in a name")
    return value


def _device(major: int, minor: int) -> int:
    if not (0 <= major < MAJOR_END and 0 <= minor < MINOR_END):
        raise _Malformed(f"device {major}:{minor} is none that Linux can have")
    return make_device(major, minor)


def _pax_number(value: bytes) -> int:
    if not _PAX_NUMBER.fullmatch(value) or (number := int(value)) >= _INT64_END:
        raise _Malformed(f"{value[:40]!r} is no number of a PAX header or sparse map")
    return number


def _pax_time_ns(value: bytes) -> int:
    """`-?seconds[.fraction]` in nanoseconds; digits after the ninth are dropped."""
    matched = _PAX_TIME.fullmatch(value)
    if not matched or (seconds := int(matched[2])) >= _INT64_END:
        raise _Malformed(f"{value[:40]!r} is no time")
    time_ns = seconds * 1_000_000_000 + int((matched[3] or b"")[:9].ljust(9, b"0"))
    return -time_ns if matched[1] else time_ns


def _pax_records(body: bytes) -> Iterable[tuple[bytes, bytes]]:
    """Keyword and value of each record: `length keyword=value\\n`, the length that of the whole record."""
    start = 0
    while start < len(body):
        length = _PAX_LENGTH.match(body, start)
        stop = start + int(length[1]) if length else 0
        if length is None or not length.end() < stop <= len(body) or body[stop - 1] != 0x0A:
            raise _Malformed("a PAX header with a record of wrong length")
        keyword, equals, value = body[length.end() : stop - 1].partition(b"=")
        if not equals or not keyword or b"\0" in keyword:
            raise _Malformed("a PAX header with a record that has no keyword")
        yield keyword, value
        start = stop


def _parse_pax(body: bytes, limits: TarLimits) -> _Pax:
    """The records of a header that are known here; others, such as atime and comment, are ignored."""
    pax: _Pax = {}
    xattrs: dict[bytes, bytes] = {}
    for keyword, value in _pax_records(body):
        if keyword == b"mtime":
            pax["mtime_ns"] = _pax_time_ns(value) if value else None
        elif keyword == b"path":
            pax["path"] = _without_nul(value) or None
        elif keyword == b"linkpath":
            pax["linkpath"] = _without_nul(value) or None
        elif keyword == b"size":
            pax["size"] = _pax_number(value) if value else None
        elif keyword == b"uid":
            pax["uid"] = _pax_number(value) if value else None
        elif keyword == b"gid":
            pax["gid"] = _pax_number(value) if value else None
        elif keyword.startswith(b"SCHILY.xattr."):
            xattrs[keyword[13:]] = value
        elif keyword in _ACLS:
            if (found := _well_formed(acl.from_text, value)) is not None:
                xattrs.setdefault(_ACLS[keyword], found)
        elif keyword.startswith(b"LIBARCHIVE.xattr."):
            # libarchive writes both spellings of one attribute: SCHILY's is the one Go reads.
            xattrs.setdefault(unquote_to_bytes(keyword[17:]), _base64(value))
        elif keyword in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            pairs = pax.setdefault("sparse_pairs", [])
            if (len(pairs) % 2 == 0) != (keyword == b"GNU.sparse.offset"):
                raise _Malformed("the map of a sparse file is out of order")
            pairs.append(_pax_number(value))
        elif keyword.startswith(b"GNU.sparse."):
            pax.setdefault("sparse", {})[keyword[11:]] = value
    if xattrs:
        _check_xattrs(xattrs, limits)
        pax["xattrs"] = xattrs
    return pax


def _well_formed(function: Callable[[bytes], T], value: bytes) -> T:
    """What a function of `fusestore.acl` makes of a value."""
    try:
        return function(value)
    except BadInput as error:
        raise _Malformed(str(error)) from None


def _base64(value: bytes) -> bytes:
    """libarchive leaves the padding off."""
    digits = value.rstrip(b"=\n")
    try:
        return a2b_base64(digits + b"=" * (-len(digits) % 4), strict_mode=True) if digits else b""
    except ValueError:
        raise _Malformed("an xattr that is not base64") from None


def _check_xattrs(xattrs: dict[bytes, bytes], limits: TarLimits) -> None:
    total = 0
    for name, value in xattrs.items():
        if not name or b"\0" in name or len(name) > limits.xattr_name:
            raise _Malformed("an xattr whose name is empty, has a NUL or is too long (limit: xattr_name)")
        if name in acl.NAMES:
            _well_formed(acl.check, value)
        if len(value) > limits.xattr_value:
            raise _Malformed(f"an xattr of {len(value)} bytes (limit: xattr_value)")
        total += len(name) + len(value)
    if total > limits.xattrs:
        raise _Malformed(f"xattrs of {total} bytes (limit: xattrs)")


def _merged(under: _Pax | None, over: _Pax, limits: TarLimits) -> _Pax:
    """Records of `over` win; xattrs are united by name."""
    if not under:
        return over
    merged: _Pax = {**under, **over}
    if "xattrs" in under and "xattrs" in over:
        merged["xattrs"] = {**under["xattrs"], **over["xattrs"]}
        _check_xattrs(merged["xattrs"], limits)
    return merged
