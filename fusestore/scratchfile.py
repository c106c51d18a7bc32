"""Scratch files: what editors and ``jq … > tmp`` put next to a metadata.json. Pure but for the clock.

They are held in memory and gone with the mount. To whoever uses them they are ordinary files (mode, owner,
times, truncation, unlinked while open), bounded by `SCRATCH_MAX` bytes each, `SCRATCH_FILES_MAX` a container
and `SCRATCH_TOTAL_MAX` bytes together, since a daemon's memory is what they take.
"""

import os
import stat
from time import time_ns

from . import errors
from .inodes import Branch, Changes, FileHandle, Node
from .nodes import Attr, Inode
from .synthetic import BLOCK_SIZE

__all__ = [
    "SCRATCH_FILES_MAX",
    "SCRATCH_MAX",
    "SCRATCH_TOTAL_MAX",
    "ScratchFile",
    "ScratchHandle",
    "ScratchMemory",
]

SCRATCH_MAX = 1 << 20
"""Bytes in one file: that of the largest document."""

SCRATCH_FILES_MAX = 64
"""Files next to one metadata.json. An editor makes three."""

SCRATCH_TOTAL_MAX = 64 << 20
"""Bytes in all scratch files of a mount."""


class ScratchMemory:
    """What the scratch files of one mount take together."""

    __slots__ = ("_used",)

    def __init__(self) -> None:
        self._used = 0

    def change(self, before: int, after: int) -> None:
        """A file has `after` bytes instead of `before`. Raises NoSpace, and nothing changed."""
        more = after - before
        if more > 0 and self._used + more > SCRATCH_TOTAL_MAX:
            raise errors.NoSpace(
                f"at most {SCRATCH_TOTAL_MAX} bytes fit next to all metadata.json of a mount: use workdir"
            )
        self._used += more


class ScratchFile(Node):
    """A file in memory. Its name is asked for each time: what one name means may become another's."""

    __slots__ = ("_attr", "_memory", "container", "data")

    entry_timeout_s = 0.0
    attr_timeout_s = 0.0

    def __init__(
        self,
        branch: Branch,
        ino: Inode,
        container: Node,
        memory: ScratchMemory,
        data: bytes,
        mode: int,
        uid: int,
        gid: int,
    ) -> None:
        """`mode`: permission bits. Raises NoSpace."""
        super().__init__(branch, ino)
        self.container = container
        self.data = bytearray()
        self._memory = memory
        memory.change(0, len(data))
        self.data += data
        now = time_ns()
        self._attr = Attr(stat.S_IFREG | stat.S_IMODE(mode), uid, gid, 0, 0, 1, 0, now, now, now)

    @property
    def attr(self) -> Attr:
        size = len(self.data)
        return self._attr._replace(size=size, blocks=-(-size // BLOCK_SIZE))

    def unlinked(self) -> None:
        """Its name is gone; open handles go on working."""
        self._attr = self._attr._replace(nlink=0, ctime_ns=time_ns())

    def change(self, changes: Changes) -> None:
        """Raises FileTooLarge, NoSpace."""
        if changes.size is not None:
            self.resize(changes.size)
        attr, now = self._attr, time_ns()
        self._attr = attr._replace(
            mode=attr.mode if changes.mode is None else stat.S_IFREG | stat.S_IMODE(changes.mode),
            uid=attr.uid if changes.uid is None else changes.uid,
            gid=attr.gid if changes.gid is None else changes.gid,
            atime_ns=attr.atime_ns if changes.atime_ns is None else changes.atime_ns,
            mtime_ns=attr.mtime_ns if changes.mtime_ns is None else changes.mtime_ns,
            ctime_ns=now,
        )

    def resize(self, size: int) -> None:
        self._claim(size)
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))
        self._modified()

    def write(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        self._claim(max(end, len(self.data)))
        self.data.extend(bytes(max(0, offset - len(self.data))))
        self.data[offset:end] = data
        self._modified()

    def _claim(self, size: int) -> None:
        if size > SCRATCH_MAX:
            raise errors.FileTooLarge(f"at most {SCRATCH_MAX} bytes next to metadata.json: use workdir")
        self._memory.change(len(self.data), size)

    def __del__(self) -> None:
        self._memory.change(len(self.data), 0)

    def _modified(self) -> None:
        now = time_ns()
        self._attr = self._attr._replace(mtime_ns=now, ctime_ns=now)


class ScratchHandle(FileHandle):
    """An open scratch file."""

    __slots__ = ("_appends", "_file")

    # Its name may become metadata.json at any time, and then a write must have come here, error and all.
    direct_io = True
    keep_cache = False

    def __init__(self, file: ScratchFile, flags: int) -> None:
        super().__init__(file)
        self._file = file
        self._appends = bool(flags & os.O_APPEND)
        if flags & os.O_TRUNC:
            file.resize(0)

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self._file.data[offset : offset + size])

    def write(self, offset: int, data: bytes) -> int:
        self._file.write(len(self._file.data) if self._appends else offset, data)
        return len(data)

    def truncate(self, size: int) -> None:
        self._file.resize(size)
