"""An archive of an image as the files it consists of: a tar, of docker save or of an OCI layout. Blocking.

It may be compressed (gzip, zstd, xz, bzip2): it is then decompressed to an unlinked file first. Nothing is
trusted; symlinks lead to members of the same tar. What it takes to read archives is loaded with this module,
by who has one.
"""

import bz2
import gzip
import lzma
import os
import posixpath
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from typing import IO, Any

import zstandard

from .errors import BadSource
from .sourcefiles import Reader, Section, plain_name

__all__ = ["SourceArchive"]

ARCHIVE_MAX = 256 << 30
"""Bytes of a compressed archive, decompressed: a bomb ends here, or when the disk is full."""

MEMBERS_MAX = 100_000
"""Members of an archive: three a layer, and a few."""

HEADER_MAX = 1 << 20
"""Bytes tarfile may read at once: it reads extended headers whole, whatever length they claim."""

LINKS_MAX = 8
"""Symlinks followed from one name in an archive."""


class SourceArchive:
    """A tar. Its members are indexed once; their content is read from the file by position."""

    def __init__(self, path: str, scratch: str | None) -> None:
        self.path = path
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise BadSource(f"{path} cannot be read: {error.strerror}") from error
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise BadSource(f"{path} is no regular file: save the image to a file first")
            fd = _decompressed(fd, path, scratch)
            self._size = os.fstat(fd).st_size
            self._files: dict[str, tuple[int, int]] = {}
            self._links: dict[str, str] = {}
            self._scan(fd)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd

    def _scan(self, fd: int) -> None:
        before = -1
        for count, member in enumerate(self._members(fd)):
            # Later members of a name replace earlier ones. tarfile believes in negative sizes and would go
            # round in circles.
            if count >= MEMBERS_MAX or member.offset <= before:
                raise BadSource(f"{self.path} is no sound archive: save the image again")
            before = member.offset
            name = posixpath.normpath(member.name)
            self._files.pop(name, None)
            self._links.pop(name, None)
            if member.isreg() and not member.issparse():
                if member.size < 0 or member.offset_data + member.size > self._size:
                    raise BadSource(f"{self.path} is truncated: save the image again")
                self._files[name] = member.offset_data, member.size
            elif member.issym():
                self._links[name] = posixpath.join(posixpath.dirname(name), member.linkname)
            elif member.islnk():
                self._links[name] = member.linkname

    def _members(self, fd: int) -> Iterator[tarfile.TarInfo]:
        try:
            with tarfile.open(fileobj=_Headers(fd, self.path), mode="r:") as tar:  # type: ignore[call-overload]
                while (member := tar.next()) is not None:
                    yield member
                    tar.members.clear()
        except (tarfile.TarError, ValueError, OverflowError, EOFError, ArithmeticError, LookupError) as error:
            raise BadSource(f"{self.path} is no sound archive ({error}): save the image again") from error

    def has(self, name: str) -> bool:
        return name in self._files or name in self._links

    def size(self, name: str) -> int:
        return self._find(name)[1]

    def open(self, name: str) -> Reader:
        start, size = self._find(name)
        return Section(os.dup(self._fd), start, size)

    def _find(self, name: str) -> tuple[int, int]:
        wanted = plain_name(name, self.path)
        for _ in range(LINKS_MAX):
            if wanted in self._files:
                return self._files[wanted]
            if wanted not in self._links:
                break
            wanted = plain_name(self._links[wanted], self.path)
        raise BadSource(f"{name} is missing in {self.path}: save the image again")

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class _Headers:
    """What tarfile reads headers through: it may seek anywhere, but not read a claimed gigabyte."""

    def __init__(self, fd: int, path: str) -> None:
        self._fd = fd
        self._path = path
        self._offset = 0

    def read(self, size: int) -> bytes:
        if not 0 <= size <= HEADER_MAX:
            raise BadSource(f"{self._path} has an extended header of {size} bytes: save the image again")
        data = os.pread(self._fd, size, self._offset)
        self._offset += len(data)
        return data

    def seek(self, offset: int) -> None:
        if not 0 <= offset < 1 << 63:
            raise BadSource(f"{self._path} is no sound archive: save the image again")
        self._offset = offset

    def tell(self) -> int:
        return self._offset


def _decompressed(fd: int, path: str, scratch: str | None) -> int:
    """`fd`, or instead of it one of an unlinked file with what it holds decompressed."""
    head = os.pread(fd, 8, 0)
    decoder = next((decoder for magic, decoder in _DECODERS if head.startswith(magic)), None)
    if decoder is None:
        return fd
    with open(fd, "rb", closefd=False) as compressed, tempfile.TemporaryFile(dir=scratch) as plain:
        left = ARCHIVE_MAX
        try:
            with decoder(compressed) as stream:
                while chunk := stream.read(1 << 20):
                    left -= len(chunk)
                    if left < 0:
                        raise BadSource(
                            f"{path} has over {ARCHIVE_MAX} bytes decompressed: unpack it yourself first"
                        )
                    plain.write(chunk)
        except (EOFError, OSError, lzma.LZMAError, zstandard.ZstdError, ValueError) as error:
            if isinstance(error, OSError) and error.errno:
                raise  # of the disk; bz2 and gzip raise it without a number
            raise BadSource(f"{path} cannot be decompressed ({error}): save the image again") from error
        plain.flush()
        replacement = os.dup(plain.fileno())
    os.close(fd)
    return replacement


def _open_zstd(file: IO[bytes]) -> Any:
    return zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True, closefd=False)


_DECODERS = (
    (b"\x1f\x8b", gzip.open),
    (b"\x28\xb5\x2f\xfd", _open_zstd),
    (b"\xfd7zXZ\0", lzma.open),
    (b"BZh", bz2.open),
)
