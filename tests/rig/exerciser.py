"""Files changed at random and compared with a copy in memory at each step, in the manner of fsx. Blocking.

Every way in which a program reaches the bytes of a file: read and write, through the page cache and past it,
append, mapped memory, truncation, copies inside the kernel, holes; with descriptors that stay open across
each other's changes, and with the pages dropped in between.
"""

import errno
import mmap
import os
import random
from collections import deque
from collections.abc import Sequence

from fusestore.syscalls import punch_hole

__all__ = ["FileExerciser", "exercise"]

_SIZE_MAX = 2 << 20
_PAGE = mmap.PAGESIZE


def exercise(paths: Sequence[str], contents: Sequence[bytes], seed: int, calls: int) -> list[bytes]:
    """`calls` steps spread over the files at `paths`, which have `contents`; what they have afterwards.

    Raises AssertionError where a file is not what it should be.
    """
    chance = random.Random(seed)
    files = [FileExerciser(path, content, chance) for path, content in zip(paths, contents, strict=True)]
    for _ in range(calls):
        chance.choice(files).step()
    return [file.finish() for file in files]


class FileExerciser:
    """One file and what should be in it."""

    def __init__(self, path: str, content: bytes, chance: random.Random) -> None:
        self._path = path
        self._content = bytearray(content)
        self._chance = chance
        self._history: deque[str] = deque(maxlen=20)
        self._reader = os.open(path, os.O_RDONLY)
        self._writer = -1
        self._compare_all()

    def step(self) -> None:
        name = self._chance.choices(_NAMES, _WEIGHTS)[0]
        self._history.append(name)
        getattr(self, f"_{name}")()
        size = os.stat(self._path).st_size
        assert size == len(self._content), f"{size} bytes instead of {len(self._content)}: {self._said()}"

    def finish(self) -> bytes:
        """Close the file; what is in it."""
        self._compare_all()
        self._close()
        os.close(self._reader)
        return bytes(self._content)

    def _said(self) -> str:
        return f"{self._path} after " + "; ".join(self._history)

    def _note(self, *details: int) -> None:
        self._history[-1] += f" {details}"

    def _compare(self, found: bytes, offset: int) -> None:
        expected = self._content[offset : offset + len(found)]
        if found == expected:
            return
        wrong = [at for at in range(len(found)) if at >= len(expected) or found[at] != expected[at]]
        raise AssertionError(
            f"{len(wrong)} of {len(found)} bytes at {offset} are wrong, from {offset + wrong[0]} to "
            f"{offset + wrong[-1]}, of {len(self._content)}: {self._said()}"
        )

    def _compare_all(self) -> None:
        found = os.pread(self._reader, _SIZE_MAX * 2, 0)
        assert len(found) == len(self._content), f"{len(found)} bytes: {self._said()}"
        self._compare(found, 0)

    # Where, and what

    def _span(self, end: int) -> tuple[int, int]:
        """Somewhere before `end`: offset and length, at least one byte, often at the edges of pages."""
        length = min(self._chance.choice((1, 511, 4096, 10_000, 70_000, 300_000)), end)
        length = self._chance.randint(1, length)
        offset = self._chance.randint(0, end - length)
        if self._chance.random() < 0.3:
            offset -= offset % _PAGE
        self._note(offset, length)
        return offset, length

    def _writable(self) -> int:
        if self._writer < 0:
            self._writer = os.open(self._path, os.O_RDWR)
        return self._writer

    def _any(self) -> int:
        return self._writer if self._writer >= 0 and self._chance.random() < 0.5 else self._reader

    def _room(self) -> int:
        """How far a write may go: mostly inside, a bit beyond the end."""
        return min(len(self._content) + self._chance.choice((0, 0, 1, 5_000, 100_000)), _SIZE_MAX) or 1

    def _put(self, data: bytes, offset: int) -> None:
        if offset > len(self._content):
            self._content.extend(bytes(offset - len(self._content)))
        self._content[offset : offset + len(data)] = data

    def _resize(self, size: int) -> None:
        del self._content[size:]
        self._content.extend(bytes(size - len(self._content)))

    # Reading

    def _read(self) -> None:
        offset, length = self._span(len(self._content) + 1)
        found = os.pread(self._any(), length, offset)
        assert len(found) == max(0, min(length, len(self._content) - offset)), self._said()
        self._compare(found, offset)

    def _read_direct(self) -> None:
        offset, length = self._span(len(self._content) + 1)
        fd = os.open(self._path, os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, length) as buffer:
                count = os.preadv(fd, [buffer], offset)
                assert count == max(0, min(length, len(self._content) - offset)), self._said()
                self._compare(buffer[:count], offset)
        finally:
            os.close(fd)

    def _read_mapped(self) -> None:
        if not self._content:
            return
        offset, length = self._span(len(self._content))
        start = offset - offset % _PAGE
        with mmap.mmap(self._any(), offset + length - start, offset=start, prot=mmap.PROT_READ) as mapped:
            self._compare(mapped[:], start)

    # Writing

    def _write(self) -> None:
        offset, length = self._span(self._room())
        data = self._chance.randbytes(length)
        assert os.pwrite(self._writable(), data, offset) == length, self._said()
        self._put(data, offset)

    def _write_direct(self) -> None:
        offset, length = self._span(self._room())
        data = self._chance.randbytes(length)
        fd = os.open(self._path, os.O_RDWR | os.O_DIRECT)
        try:
            with mmap.mmap(-1, length) as buffer:
                buffer[:] = data
                assert os.pwritev(fd, [buffer], offset) == length, self._said()
        finally:
            os.close(fd)
        self._put(data, offset)

    def _write_mapped(self) -> None:
        offset, length = self._span(self._room())
        fd = self._writable()
        if offset + length > len(self._content):
            os.ftruncate(fd, offset + length)
            self._resize(offset + length)
        data = self._chance.randbytes(length)
        start = offset - offset % _PAGE
        with mmap.mmap(fd, offset + length - start, offset=start) as mapped:
            mapped[offset - start :] = data
            if self._chance.random() < 0.3:
                mapped.flush()
        self._put(data, offset)

    def _append(self) -> None:
        length = self._chance.randint(1, 9_000)
        if len(self._content) + length > _SIZE_MAX:
            return
        data = self._chance.randbytes(length)
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND)
        try:
            assert os.write(fd, data) == length, self._said()
        finally:
            os.close(fd)
        self._content += data

    def _copy_inside(self) -> None:
        """copy_file_range(2), between two places of the file that do not overlap."""
        size = len(self._content)
        if size < 2:
            return
        length = self._chance.randint(1, min(size // 2, 50_000))
        source = self._chance.randint(0, size // 2 - length)
        target = self._chance.randint(source + length, _SIZE_MAX - length)
        self._note(source, target, length)
        fd = self._writable()
        count = os.copy_file_range(self._reader, fd, length, source, target)
        assert count > 0, self._said()
        self._put(bytes(self._content[source : source + count]), target)

    # Size

    def _truncate(self) -> None:
        size = self._chance.randint(0, self._room())
        self._note(size)
        if self._chance.random() < 0.5:
            os.truncate(self._path, size)
        else:
            os.ftruncate(self._writable(), size)
        self._resize(size)

    def _truncate_mapped(self) -> None:
        """What a map of the last page shows beyond the file: zeros."""
        start = len(self._content) - len(self._content) % _PAGE - _PAGE
        if start < 0:
            return
        size = start + self._chance.randint(0, _PAGE)
        self._note(size)
        fd = self._writable()
        with mmap.mmap(fd, _PAGE, offset=start) as mapped:
            before = mapped[:1]
            os.ftruncate(fd, size)
            self._resize(size)
            if size > start:
                self._compare(before, start)
                rest = mapped[size - start :]
                assert rest == bytes(len(rest)), self._said()

    def _empty(self) -> None:
        os.close(os.open(self._path, os.O_WRONLY | os.O_TRUNC))
        self._resize(0)

    def _allocate(self) -> None:
        offset, length = self._span(self._room())
        os.posix_fallocate(self._writable(), offset, length)
        self._resize(max(len(self._content), offset + length))

    def _punch(self) -> None:
        """Either a hole or a clear refusal, which changes nothing."""
        offset, length = self._span(self._room())
        try:
            punch_hole(self._writable(), offset, length)
        except OSError as error:
            assert error.errno == errno.EOPNOTSUPP, self._said()
        else:
            end = min(offset + length, len(self._content))
            self._content[offset:end] = bytes(max(0, end - offset))

    # Descriptors and pages

    def _reopen(self) -> None:
        self._close()
        os.close(self._reader)
        self._reader = os.open(self._path, os.O_RDONLY)

    def _close(self) -> None:
        if self._writer >= 0:
            os.close(self._writer)
            self._writer = -1

    def _sync(self) -> None:
        self._chance.choice((os.fsync, os.fdatasync))(self._any())

    def _drop_pages(self) -> None:
        fd = self._any()
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def _rename(self) -> None:
        """Away and back, also over nothing: descriptors stay with the file."""
        other = self._path + ".moved"
        os.rename(self._path, other)
        os.link(other, self._path)
        os.unlink(other)


_STEPS = {
    "read": 20, "read_direct": 5, "read_mapped": 10, "write": 15, "write_direct": 5, "write_mapped": 10,
    "append": 4, "copy_inside": 3, "truncate": 6, "truncate_mapped": 2, "empty": 0.3, "allocate": 1,
    "punch": 2, "reopen": 4, "sync": 2, "drop_pages": 3, "rename": 1,
}  # fmt: skip
_NAMES, _WEIGHTS = tuple(_STEPS), tuple(_STEPS.values())
