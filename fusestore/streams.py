"""Compressed streams: decoding one from its beginning while marking restarts, and decoding from a restart.

Blocking (CPU). What a layer's compression looks like is known here only.

Forwards, a decoder is fed the blob in pieces of any size and yields the output in pieces of bounded size, so
that a decompression bomb meets its owner's limit before it meets the memory. Where decoding could begin again
and the `SpanCutter` wants it, the decoder says so. Any input ends well or in LayerRefused.

* gzip (RFC 1952, 1951), any number of members, zeros after the last: zlib's `inflate` with Z_BLOCK, which
  stops at the ends of deflate blocks. Python's modules do not offer it, so it is called through ctypes: in
  the zlib-ng wheel, which exports its C interface (twice as fast, promised by nobody), or else in libz.so.1.
  Both must go on working: the tests run every stream through both.
* zstd (RFC 8878), any number of frames, skippable ones too: a walker over the block headers finds the frames.
  Inside a frame there is no way in.

From a restart, gzip needs only a raw deflate decoder with a dictionary; restarts are at any bit, so the bits
before it in its byte are overwritten by empty deflate blocks of fitting length (`_aligned`). From a restart
at the end of the blob on, there are zeros (seek.py).
"""

import ctypes as ct
import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import repeat
from typing import Any, Final, NamedTuple, NoReturn, Protocol, cast

import zlib_ng.zlib_ng
import zstandard
from isal import isal_zlib
from isal.isal_zlib import crc32

from .errors import LayerRefused
from .seek import WINDOW, Compression, Restart, SeekTable, SpanCutter

__all__ = [
    "Decoder",
    "GzipDecoder",
    "HEAD",
    "Inflate",
    "PlainDecoder",
    "ReadAt",
    "RunDecoder",
    "ZstdDecoder",
    "detect",
    "libz",
    "zlib_ng_wheel",
]

HEAD: Final = 16
"""Bytes from the start of a blob that `detect` wants."""
ZSTD_WINDOW_MAX: Final = 128 << 20
"""What zstd(1) decodes without --long: RFC 8878 leaves the limit to the decoder. A frame costs as much."""

_IsalError = cast(type[Exception], isal_zlib.error)
_READ = 64 << 10
_PIECE = 256 << 10
_ZEROS = bytes(4096)

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_SKIPPABLE_MAGIC = b"\x2a\x4d\x18"
_REFUSED_MAGIC = (
    ("xz", re.compile(rb"\xfd7zXZ\x00")),
    ("bzip2", re.compile(rb"BZh[1-9]1AY&SY")),
    ("lz4", re.compile(rb"\x04\x22\x4d\x18")),
)


class Decoder(Protocol):
    """A stream being decoded from its beginning. Belongs to one thread."""

    def feed(self, data: bytes) -> Iterator[memoryview]:
        """The output that `data` completes, in pieces of at most 1 MiB.

        Run it to its end; a piece is valid until the next is asked for. Raises LayerRefused.
        """

    def close(self) -> None:
        """The blob is at its end. Raises LayerRefused when the stream is not."""


def detect(head: bytes) -> Compression:
    """The compression of a blob that begins with `head`, told by magic bytes: media types lie.

    Raises LayerRefused for a compression that OCI layers do not have; what has no magic is taken for a tar.
    """
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    if head.startswith(_ZSTD_MAGIC) or _is_skippable(head):
        return "zstd"
    for name, magic in _REFUSED_MAGIC:
        if magic.match(head):
            raise LayerRefused(f"unsupported compression {name}: convert the image to gzip or zstd layers")
    return "none"


def _is_skippable(head: bytes | bytearray) -> bool:
    return 0x50 <= head[0] <= 0x5F and head[1:4] == _SKIPPABLE_MAGIC if len(head) >= 4 else False


class PlainDecoder:
    """A tar that is not compressed: what comes in goes out, and reading can start anywhere."""

    def __init__(self, spans: SpanCutter) -> None:
        self._spans = spans

    def feed(self, data: bytes) -> Iterator[memoryview]:
        if self._spans.wants_restart:
            self._spans.restart(self._spans.tar_size, 0, b"")
        yield memoryview(data)

    def close(self) -> None:
        pass


# --- gzip ---------------------------------------------------------------------------------------------------

_Z_NO_FLUSH = 0
_Z_BLOCK = 5
_Z_OK = 0
_Z_STREAM_END = 1
_Z_BUF_ERROR = -5
_WBITS_RAW = -15
_WBITS_GZIP = 31
_TRAILER = 8
"""CRC-32 and length after a gzip member's deflate stream."""


class _ZStream(ct.Structure):
    """z_stream of zlib.h."""

    _fields_ = (
        ("next_in", ct.c_void_p),
        ("avail_in", ct.c_uint),
        ("total_in", ct.c_ulong),
        ("next_out", ct.c_void_p),
        ("avail_out", ct.c_uint),
        ("total_out", ct.c_ulong),
        ("msg", ct.c_char_p),
        ("state", ct.c_void_p),
        ("zalloc", ct.c_void_p),
        ("zfree", ct.c_void_p),
        ("opaque", ct.c_void_p),
        ("data_type", ct.c_int),
        ("adler", ct.c_ulong),
        ("reserved", ct.c_ulong),
    )


class _ZngStream(ct.Structure):
    """zng_stream of zlib-ng.h."""

    _fields_ = (
        ("next_in", ct.c_void_p),
        ("avail_in", ct.c_uint32),
        ("total_in", ct.c_size_t),
        ("next_out", ct.c_void_p),
        ("avail_out", ct.c_uint32),
        ("total_out", ct.c_size_t),
        ("msg", ct.c_char_p),
        ("state", ct.c_void_p),
        ("zalloc", ct.c_void_p),
        ("zfree", ct.c_void_p),
        ("opaque", ct.c_void_p),
        ("data_type", ct.c_int),
        ("adler", ct.c_uint32),
        ("reserved", ct.c_ulong),
    )


class Inflate(NamedTuple):
    """The functions of one zlib. Each takes a pointer to a `stream_type`; the GIL is released in them."""

    stream_type: type[ct.Structure]
    init: Callable[[Any], int]
    inflate: Callable[[Any, int], int]
    reset: Callable[[Any], int]
    end: Callable[[Any], int]


def _function(library: ct.CDLL, name: str, *argument_types: Any) -> Callable[..., int]:
    function = library[name]
    function.argtypes = argument_types
    function.restype = ct.c_int
    return function


@cache
def libz() -> Inflate:
    """The system's zlib. Raises OSError where there is none."""
    library = ct.CDLL("libz.so.1")
    init = _function(library, "inflateInit2_", ct.c_void_p, ct.c_int, ct.c_char_p, ct.c_int)
    return Inflate(
        _ZStream,
        # zlib compares the first digit of the version and the size of the structure with its own.
        lambda stream: init(stream, _WBITS_GZIP, b"1.2.11", ct.sizeof(_ZStream)),
        _function(library, "inflate", ct.c_void_p, ct.c_int),
        _function(library, "inflateReset", ct.c_void_p),
        _function(library, "inflateEnd", ct.c_void_p),
    )


@cache
def zlib_ng_wheel() -> Inflate:
    """zlib-ng as its Python package brings it. Raises OSError or AttributeError when it hides them."""
    library = ct.CDLL(zlib_ng.zlib_ng.__file__)
    init = _function(library, "zng_inflateInit2", ct.c_void_p, ct.c_int32)
    return Inflate(
        _ZngStream,
        lambda stream: init(stream, _WBITS_GZIP),
        _function(library, "zng_inflate", ct.c_void_p, ct.c_int32),
        _function(library, "zng_inflateReset", ct.c_void_p),
        _function(library, "zng_inflateEnd", ct.c_void_p),
    )


@cache
def _fastest_inflate() -> Inflate:
    try:
        # The structure above is that of zlib-ng 2; another one would not fail cleanly, so do not try it.
        if str(zlib_ng.zlib_ng.ZLIBNG_VERSION).startswith("2."):
            return zlib_ng_wheel()
    except (OSError, AttributeError):
        pass
    return libz()


class GzipDecoder:
    """Inflates into a buffer that keeps the last 32 KiB of output in front of the new: a restart's window."""

    def __init__(self, spans: SpanCutter, library: Inflate | None = None) -> None:
        self._live = False
        self._spans = spans
        self._library = library or _fastest_inflate()
        self._stream = self._library.stream_type()
        self._pointer = ct.byref(self._stream)
        self._buffer = ct.create_string_buffer(WINDOW + _PIECE)
        self._output = memoryview(self._buffer).cast("B")
        self._taken = WINDOW
        """Up to where the output in the buffer was yielded."""
        self._consumed = 0
        """Bytes of the blob before the piece being fed."""
        self._member_start = 0
        """Output before the current member."""
        self._ended = False
        self._padding = False
        if self._library.init(self._pointer) != _Z_OK:
            raise MemoryError("inflateInit2")
        self._live = True
        self._rewind_output()

    def __del__(self) -> None:
        if self._live:
            self._library.end(self._pointer)

    def feed(self, data: bytes) -> Iterator[memoryview]:
        stream = self._stream
        source = ct.c_char_p(data)  # points into `data`, and keeps it alive
        stream.next_in = ct.cast(source, ct.c_void_p)
        stream.avail_in = len(data)
        while not self._ended or self._next_member(data):
            # Z_BLOCK stops at each block, and a hostile stream has one every 10 bits: only when it is wanted.
            seeking = self._spans.wants_restart
            code = self._library.inflate(self._pointer, _Z_BLOCK if seeking else _Z_NO_FLUSH)
            if code not in (_Z_OK, _Z_STREAM_END, _Z_BUF_ERROR):
                message = (stream.msg or b"damaged").decode("ascii", "replace")
                _refuse(f"gzip data: {message}")
            self._ended = code == _Z_STREAM_END
            full = stream.avail_out == 0
            # zlib.h: data_type has 128 right after a block or the header, 64 in the last block, and below
            # that the number of bits read and not used.
            boundary = seeking and code == _Z_OK and stream.data_type & 192 == 128
            if full or boundary or self._ended:
                yield from self._take()
            if boundary:
                self._mark_restart(len(data))
            if full:
                self._rewind_output()
            elif stream.avail_in == 0:
                break
        yield from self._take()
        self._consumed += len(data)

    def close(self) -> None:
        if not self._ended:
            _refuse("gzip data: truncated")

    def _take(self) -> Iterator[memoryview]:
        end = len(self._output) - self._stream.avail_out
        if end > self._taken:
            piece = self._output[self._taken : end]
            self._taken = end
            yield piece

    def _rewind_output(self) -> None:
        self._output[:WINDOW] = self._output[-WINDOW:]
        self._taken = WINDOW
        self._stream.next_out = ct.addressof(self._buffer) + WINDOW
        self._stream.avail_out = _PIECE

    def _mark_restart(self, fed: int) -> None:
        unused_bits = self._stream.data_type & 63
        in_offset = self._consumed + fed - self._stream.avail_in - -(-unused_bits // 8)
        history = min(WINDOW, self._spans.tar_size - self._member_start)
        window = self._output[self._taken - history : self._taken]
        self._spans.restart(in_offset, -unused_bits % 8, window)

    def _next_member(self, data: bytes) -> bool:
        """Begins another member, or consumes padding (gzip(1): tapes pad with zeros). False: no more here."""
        start = len(data) - self._stream.avail_in
        if start == len(data):
            return False
        self._padding = self._padding or data[start] == 0
        if self._padding:
            if data[start:].strip(b"\0"):
                _refuse("gzip data: garbage after the end")
            self._stream.avail_in = 0
            return False
        if data[start] != 0x1F:
            _refuse("gzip data: garbage after the end")
        self._library.reset(self._pointer)
        self._member_start = self._spans.tar_size
        self._ended = False
        return True


class _Bits:
    """Writes bits, the lowest first (RFC 1951, section 3.1.1)."""

    def __init__(self) -> None:
        self.value = 0
        self.count = 0

    def put(self, value: int, width: int) -> None:
        self.value |= value << self.count
        self.count += width


def _empty_blocks() -> tuple[_Bits, ...]:
    """For each n of 0…7, deflate blocks without output whose length in bits is n modulo 8.

    A block of the fixed code that only ends is 3 + 7 = 10 bits, so some of these give the even lengths. One
    with its own code, of 91 bits (RFC 1951, section 3.2.7), makes them odd: literals 255 and 256 and distance
    0 have codes of one bit; the code lengths are written with the symbols 1 (bit 0) and 18 (bit 1; zeros).
    """
    result = []
    for n in range(8):
        bits = _Bits()
        if n % 2:
            bits.put(0b10_0, 3)  # not the last block, dynamic code
            bits.put(0, 5 + 5)  # 257 literal codes, 1 distance code
            bits.put(14, 4)  # 18 code length codes, in this order:
            for symbol in (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1):
                bits.put(1 if symbol in (1, 18) else 0, 3)
            bits.put(1 | 127 << 1, 8)  # 11 + 127 zeros
            bits.put(1 | 106 << 1, 8)  # 11 + 106 zeros: literals 0 … 254
            bits.put(0, 3)  # length 1 for 255, 256 and the distance
            bits.put(1, 1)  # 256: end of block
        while bits.count % 8 != n:
            bits.put(0b01_0, 3)  # not the last block, fixed code
            bits.put(0, 7)  # 256: end of block
        result.append(bits)
    return tuple(result)


_EMPTY_BLOCKS = _empty_blocks()


def _aligned(data: bytes, bit: int) -> bytes:
    """Deflate data that begins at bit `bit` of `data`, made to begin at bit 0."""
    if bit == 0 or not data:
        return data
    blocks = _EMPTY_BLOCKS[bit]
    whole, rest = divmod(blocks.count, 8)
    tail = blocks.value >> whole * 8
    prefix = (blocks.value & (1 << whole * 8) - 1).to_bytes(whole, "little")
    return prefix + bytes([data[0] >> rest << rest | tail]) + data[1:]


def _decode_gzip(blob: Iterator[bytes], restart: Restart) -> Iterator[bytes]:
    decoder = isal_zlib.decompressobj(_WBITS_RAW, zdict=restart.window)
    data = _aligned(next(blob, b""), restart.bit)
    trailer = _TRAILER
    while True:
        output = decoder.decompress(data, _PIECE)
        if output:
            yield output
        if decoder.eof:
            data = decoder.unused_data
            while len(data) <= trailer:
                more = next(blob, b"")
                if not more:
                    return
                data += more
            data = data[trailer:]
            # Only the member begun in its middle had to be read raw; the others take in their own trailer.
            decoder = isal_zlib.decompressobj(_WBITS_GZIP)
            trailer = 0
            continue
        data = decoder.unconsumed_tail
        if not data:
            data = next(blob, b"")
            if not data and not output:
                return


# --- zstd ---------------------------------------------------------------------------------------------------

_BLOCK_MAX = 128 << 10
"""RFC 8878, section 3.1.1.2.4: a block's size and its output."""
_BLOCKS_AT_ONCE = 8


class ZstdDecoder:
    """Walks frame and block headers, and gives the decoder of zstandard whole blocks, a few at a time.

    So the frames are known, and the output of one call is bounded, which zstandard does not offer.
    """

    def __init__(self, spans: SpanCutter | None) -> None:
        """`spans`: who wants to know the frames, or None when decoding again."""
        self._spans = spans
        self._context = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_MAX)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._checksum = False
        self._pending = b""
        """Bytes not walked yet: less than a block or a header."""
        self._skip = 0
        """Bytes left of a skippable frame."""
        self._consumed = 0
        """Bytes of the blob before `_pending`."""

    def feed(self, data: bytes) -> Iterator[memoryview]:
        data = self._pending + data if self._pending else data
        place = 0
        while place < len(data):
            if self._skip:
                step = min(self._skip, len(data) - place)
                self._skip -= step
            elif self._frame is None:
                step = self._begin_frame(data, place)
            else:
                step, last = self._whole_blocks(data, place)
                output = self._decode(data[place : place + step], last) if step else b""
                if output:
                    yield memoryview(output)
            if step == 0:
                break
            place += step
        self._pending = data[place:]
        self._consumed += place

    def close(self) -> None:
        if self._frame is not None or self._pending or self._skip:
            _refuse("zstd data: truncated")

    def _begin_frame(self, data: bytes, place: int) -> int:
        """Walks a frame's header (RFC 8878, section 3.1.1); the bytes walked, 0 when there are too few."""
        head = data[place : place + 18]
        if _is_skippable(head):
            if len(head) < 8:
                return 0
            self._skip = int.from_bytes(head[4:8], "little")
            return 8
        if not _ZSTD_MAGIC.startswith(head[:4]) and not _may_be_skippable(head):
            _refuse("zstd data: garbage after the end" if self._consumed + place else "zstd data: damaged")
        if len(head) < 5:
            return 0
        descriptor = head[4]
        single_segment = descriptor & 32
        size = 5 + (not single_segment) + (0, 1, 2, 4)[descriptor & 3]
        size += (1 if single_segment else 0, 2, 4, 8)[descriptor >> 6]
        if len(head) < size:
            return 0
        if self._spans and self._spans.wants_restart:
            self._spans.restart(self._consumed + place, 0, b"")
        self._checksum = bool(descriptor & 4)
        self._frame = self._context.decompressobj()
        self._decode(head[:size], last=False)
        return size

    def _whole_blocks(self, data: bytes, place: int) -> tuple[int, bool]:
        """The bytes of the whole blocks at `place`, a few at most; and whether they end the frame."""
        end = place
        for _ in range(_BLOCKS_AT_ONCE):
            if len(data) - end < 3:
                break
            header = int.from_bytes(data[end : end + 3], "little")
            last, kind, size = header & 1, header >> 1 & 3, header >> 3
            if kind == 3 or size > _BLOCK_MAX:
                _refuse("zstd data: damaged block")
            stored = 1 if kind == 1 else size  # kind 1: one byte, repeated
            stop = end + 3 + stored + (4 if last and self._checksum else 0)
            if stop > len(data):
                break
            end = stop
            if last:
                return end - place, True
        return end - place, False

    def _decode(self, data: bytes, last: bool) -> bytes:
        assert self._frame is not None
        try:
            output = self._frame.decompress(data)
        except zstandard.ZstdError as error:
            _refuse(f"zstd data: {error}", error)
        if last:
            self._frame = None
        return output


def _may_be_skippable(head: bytes) -> bool:
    """Whether fewer than four bytes could become a skippable frame's magic."""
    return len(head) < 4 and 0x50 <= head[0] <= 0x5F and _SKIPPABLE_MAGIC.startswith(head[1:])


# --- from a restart -----------------------------------------------------------------------------------------

ReadAt = Callable[[int, int], bytes]
"""Reads the blob: `read_at(length, offset)`; no bytes at its end."""


class RunDecoder:
    """One run of a table being decoded, span after span. Belongs to one thread at a time."""

    def __init__(self, table: SeekTable, run: int, read_at: ReadAt) -> None:
        """`run`: the span with the restart. Raises StoreDamaged when the table's window is damaged."""
        self._table = table
        restart = table.restart(run)
        self._pieces: Iterator[bytes | memoryview]
        if restart.in_offset == table.blob_size:
            self._pieces = repeat(_ZEROS)
        else:
            self._pieces = _decode_from(table.compression, read_at, restart)
        self._left_over: bytes | memoryview = b""
        self.next_span = run

    def take(self) -> bytes:
        """The next span, checked. Raises LayerRefused where the blob does not give it; skips it then."""
        span = self.next_span
        self.next_span += 1
        length = self._table.starts[span + 1] - self._table.starts[span]
        pieces = [self._left_over]
        excess = len(self._left_over) - length
        self._left_over = b""
        while excess < 0:
            piece = next(self._pieces, None)
            if piece is None:
                _refuse(f"no data from byte {self._table.starts[span]} of its tar on")
            pieces.append(piece)
            excess += len(piece)
        if excess:
            last = memoryview(pieces[-1])
            pieces[-1], self._left_over = last[:-excess], last[-excess:]
        data = b"".join(pieces)
        if crc32(data) != self._table.crc32s[span]:
            _refuse(f"wrong checksum at byte {self._table.starts[span]} of its tar")
        return data


def _decode_from(compression: Compression, read_at: ReadAt, restart: Restart) -> Iterator[bytes | memoryview]:
    """The output from `restart` on, in pieces of at most 1 MiB that stay valid."""
    blob = _read_on(read_at, restart.in_offset)
    if compression == "gzip":
        try:
            yield from _decode_gzip(blob, restart)
        except _IsalError as error:
            _refuse(f"gzip data: {error}", error)
    else:
        decoder = ZstdDecoder(None)
        for data in blob:
            yield from decoder.feed(data)


def _read_on(read_at: ReadAt, offset: int) -> Iterator[bytes]:
    while data := read_at(_READ, offset):
        yield data
        offset += len(data)


def _refuse(what: str, cause: Exception | None = None) -> NoReturn:
    raise LayerRefused(what) from cause
