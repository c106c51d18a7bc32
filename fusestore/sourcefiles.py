"""The files that a source of images consists of, in a directory or a tar. Blocking; only reads.

The tar may be compressed (gzip, zstd, xz, bzip2): it is then decompressed to an unlinked file first.

Nothing is trusted. In a directory symlinks are followed, as its owner may have made them, but only to regular
files; in a tar they lead to members of the same tar.
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
from typing import IO, Any, Protocol

import zstandard

from . import oci
from .errors import BadSource

__all__ = ["Reader", "SourceArchive", "SourceDirectory", "SourceFiles", "read_document"]

ARCHIVE_MAX = 256 << 30
"""Bytes of a compressed archive, decompressed: a bomb ends here, or when the disk is full."""

MEMBERS_MAX = 100_000
"""Members of an archive: three a layer, and a few."""

HEADER_MAX = 1 << 20
"""Bytes tarfile may read at once: it reads extended headers whole, whatever length they claim."""

LINKS_MAX = 8
"""Symlinks followed from one name in an archive."""


class Reader(Protocol):
    """A blob being read. Not thread-safe; each has its own place in the file."""

    def read(self, size: int, /) -> bytes: ...

    def close(self) -> None: ...


class SourceFiles(Protocol):
    """The files of a source, by names relative to it."""

    path: str

    def has(self, name: str) -> bool: ...

    def size(self, name: str) -> int:
        """Raises BadSource if there is no regular file `name`."""

    def open(self, name: str) -> Reader: ...

    def close(self) -> None: ...


def read_document(files: SourceFiles, name: str, limit: int = oci.DOCUMENT_MAX) -> bytes:
    if files.size(name) > limit:
        raise BadSource(f"{name} in {files.path} has over {limit} bytes: no image needs that much")
    reader = files.open(name)
    try:
        chunks = []
        while chunk := reader.read(limit):
            chunks.append(chunk)
            limit -= len(chunk)
        return b"".join(chunks)
    finally:
        reader.close()


class _Section:
    """`size` bytes of a file at `start`, read through a descriptor of its own."""

    def __init__(self, fd: int, start: int, size: int) -> None:
        self._fd = fd
        self._offset = start
        self._end = start + size

    def read(self, size: int, /) -> bytes:
        data = os.pread(self._fd, min(size, self._end - self._offset), self._offset)
        self._offset += len(data)
        return data

    def close(self) -> None:
        os.close(self._fd)


class SourceDirectory:
    def __init__(self, path: str) -> None:
        self.path = path

    def has(self, name: str) -> bool:
        return os.path.isfile(os.path.join(self.path, name))

    def size(self, name: str) -> int:
        fd = self._open(name)
        try:
            return os.fstat(fd).st_size
        finally:
            os.close(fd)

    def open(self, name: str) -> Reader:
        fd = self._open(name)
        return _Section(fd, 0, os.fstat(fd).st_size)

    def _open(self, name: str) -> int:
        name = _plain_name(name, self.path)
        try:
            # O_NONBLOCK: a FIFO there must not hold us.
            fd = os.open(os.path.join(self.path, name), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise BadSource(
                f"{name} in {self.path} cannot be read ({error.strerror}): fetch the image again"
            ) from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise BadSource(f"{name} in {self.path} is no regular file: fetch the image again")
        return fd

    def close(self) -> None:
        pass


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
        return _Section(os.dup(self._fd), start, size)

    def _find(self, name: str) -> tuple[int, int]:
        wanted = _plain_name(name, self.path)
        for _ in range(LINKS_MAX):
            if wanted in self._files:
                return self._files[wanted]
            if wanted not in self._links:
                break
            wanted = _plain_name(self._links[wanted], self.path)
        raise BadSource(f"{name} is missing in {self.path}: save the image again")

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _plain_name(name: str, path: str) -> str:
    """`name`, normalised; BadSource if it leads out of the source."""
    plain = posixpath.normpath(name)
    if plain.startswith(("/", "../")) or plain in ("..", ".") or "\0" in plain:
        raise BadSource(f"{path} names a file outside of itself, {name!r}: do not use it")
    return plain


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
