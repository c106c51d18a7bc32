"""The tar-split file of a layer, from which its tar comes to the byte: made where it is read. Pure.

containers/storage keeps one for each layer (overlay-layers/<id>.tar-split.gz): gzip of JSON lines, of which
those of type 2 hold pieces of the tar as they stand (vbatts/tar-split, tar/storage/entry.go). Ours has no
others, of a fixed number of bytes each, and every line is a gzip member of its own, stored and not deflated
(RFC 1952, section 2.2: a file is any number of members). So the place of each byte is known, and nothing has
to be prepared or kept to answer a read.
"""

import struct
import zlib
from base64 import b64encode
from collections.abc import Callable

__all__ = ["TarSplit"]

_PIECE = 45 << 10
"""Bytes of tar in a line: with what base64 adds they fit in one stored block of 65,535 bytes."""

_HEAD = bytes((0x1F, 0x8B, 8, 0, 0, 0, 0, 0, 0, 255))
_LINE = '{{"type":2,"position":{:12d},"payload":"'
_LINE_END = b'"}\n'
_STORED = struct.Struct("<BHH")
_TAIL = struct.Struct("<II")
_AROUND = len(_HEAD) + _STORED.size + len(_LINE.format(0)) + len(_LINE_END) + _TAIL.size


class TarSplit:
    """The file for a tar of `tar_size` bytes, of which `read(offset, length)` gives a range."""

    def __init__(self, tar_size: int, read: Callable[[int, int], bytes]) -> None:
        self._tar_size = tar_size
        self._read = read

    @staticmethod
    def size(tar_size: int) -> int:
        """Bytes of the file for a tar of so many."""
        whole, rest = divmod(tar_size, _PIECE)
        return whole * _member_size(_PIECE) + (_member_size(rest) if rest or not whole else 0)

    def read(self, offset: int, length: int) -> bytes:
        """At most `length` bytes at `offset`; fewer at the end only. Raises what `read` raises."""
        size = _member_size(_PIECE)
        end = min(offset + length, self.size(self._tar_size))
        members = [self._member(number) for number in range(offset // size, -(-end // size))]
        start = offset % size
        return b"".join(members)[start : start + max(0, end - offset)]

    def _member(self, number: int) -> bytes:
        start = number * _PIECE
        piece = self._read(start, min(_PIECE, self._tar_size - start))
        line = _LINE.format(number).encode() + b64encode(piece) + _LINE_END
        block = _STORED.pack(1, len(line), len(line) ^ 0xFFFF)
        return _HEAD + block + line + _TAIL.pack(zlib.crc32(line), len(line))


def _member_size(piece: int) -> int:
    return _AROUND + -(-piece // 3) * 4
