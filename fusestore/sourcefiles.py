"""The files that a source of images consists of, and those of a directory. Blocking; only reads.

Nothing is trusted. In a directory symlinks are followed, as its owner may have made them, but only to regular
files.
"""

import os
import posixpath
import stat
from typing import Protocol

from . import oci
from .errors import BadSource

__all__ = ["Reader", "Section", "SourceDirectory", "SourceFiles", "plain_name", "read_document"]


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


class Section:
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
        return Section(fd, 0, os.fstat(fd).st_size)

    def _open(self, name: str) -> int:
        name = plain_name(name, self.path)
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


def plain_name(name: str, path: str) -> str:
    """`name`, normalised; BadSource if it leads out of the source."""
    plain = posixpath.normpath(name)
    if plain.startswith(("/", "../")) or plain in ("..", ".") or "\0" in plain:
        raise BadSource(f"{path} names a file outside of itself, {name!r}: do not use it")
    return plain
