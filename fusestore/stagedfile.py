"""Files on their way into the store by /views/oci: on disk, without a name there. Blocking.

To who writes one it is an ordinary file of the view. On disk it is a file in the store's tmp/ whose name was
removed as soon as it was made: it is gone when nobody has it any more, whatever ends the mount. It counts as
a blob only after its bytes were hashed (`StagedFile.is_sound`); every write takes that back.
"""

import hashlib
import os
import stat
from collections.abc import Callable

from .inodes import Branch, Caller, Changes, FileHandle, Maybe, Node, Steps
from .nodes import Attr, Digest, Inode
from .ociindex import Known

__all__ = ["StagedFile", "StagedHandle"]


class StagedFile(Node):
    """A file in the view. Its name is asked for each time: a blob of the store may take its place."""

    __slots__ = (
        "_gid",
        "_mode",
        "_sound",
        "_uid",
        "_writes",
        "base",
        "directory",
        "fd",
        "path",
        "process",
        "writers",
    )

    entry_timeout_s = 0.0
    attr_timeout_s = 0.0

    def __init__(
        self,
        branch: Branch,
        ino: Inode,
        directory: Node,
        path: str,
        fd: int,
        mode: int,
        caller: Caller,
        process: int | None,
        base: Known | None,
    ) -> None:
        """`path`: where it is in the view; `fd`: what `Store.unnamed_file` gave, the object's own now.

        `process` makes it, and knew `base` of the store.
        """
        super().__init__(branch, ino)
        self.directory = directory
        self.path = path
        self.fd = fd
        self.process = process
        self.base = base
        self.writers = 0
        """Open handles that may write."""
        self._mode = stat.S_IMODE(mode & ~caller.umask)
        self._uid, self._gid = caller.uid, caller.gid
        self._sound: Digest | None = None
        self._writes = 0
        """Changes of the content, each counted when it is done: one that is still under way will be."""

    @property
    def attr(self) -> Attr:
        found = os.fstat(self.fd)
        times = (found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns)
        mode = stat.S_IFREG | self._mode
        return Attr(mode, self._uid, self._gid, found.st_size, 0, 1, found.st_blocks, *times)

    def is_sound(self, digest: Digest) -> bool:
        """Whether it was hashed to that, and not written since."""
        return self._sound == digest

    def hash(self) -> Steps[Digest]:
        """The digest of what is in it now. Where it is written meanwhile, it does not count (`is_sound`)."""
        writes = self._writes
        digest: Digest = yield lambda: _digest(self.fd)
        if self._writes == writes:
            self._sound = digest
        return digest

    def change(self, changes: Changes) -> None:
        if changes.size is not None:
            self.resize(changes.size)
        if changes.atime_ns is not None or changes.mtime_ns is not None:
            found = os.fstat(self.fd)
            atime_ns = found.st_atime_ns if changes.atime_ns is None else changes.atime_ns
            mtime_ns = found.st_mtime_ns if changes.mtime_ns is None else changes.mtime_ns
            os.utime(self.fd, ns=(atime_ns, mtime_ns))
        self._mode = self._mode if changes.mode is None else stat.S_IMODE(changes.mode)
        self._uid = self._uid if changes.uid is None else changes.uid
        self._gid = self._gid if changes.gid is None else changes.gid

    def resize(self, size: int) -> None:
        os.ftruncate(self.fd, size)
        self._changed()

    def write(self, offset: int, data: bytes) -> Steps[int]:
        written: int = yield lambda: os.pwrite(self.fd, data, offset)
        # After the write: one may have been hashed while it was under way.
        self._changed()
        return written

    def _changed(self) -> None:
        self._writes += 1
        self._sound = None

    def __del__(self) -> None:
        os.close(self.fd)


class StagedHandle(FileHandle):
    """An open staged file."""

    __slots__ = ("_appends", "_checked", "_file", "_is_dirty", "_released", "_is_writer")

    direct_io = True
    keep_cache = False

    def __init__(
        self,
        file: StagedFile,
        flags: int,
        checked: Callable[[StagedFile], Steps[None]],
        released: Callable[[StagedFile], None],
    ) -> None:
        """`checked` says at a close(2) whether what was written can be; `released` is told of the last."""
        super().__init__(file)
        self._checked = checked
        self._released = released
        self._file = file
        self._appends = bool(flags & os.O_APPEND)
        self._is_writer = flags & os.O_ACCMODE != os.O_RDONLY
        self._is_dirty = False
        """Something was written by it that was not checked yet. A shell closes copies before it writes."""
        if flags & os.O_TRUNC:
            file.resize(0)
        file.writers += self._is_writer

    def read(self, offset: int, size: int) -> Steps[bytes]:
        data: bytes = yield lambda: os.pread(self._file.fd, size, offset)
        return data

    def write(self, offset: int, data: bytes) -> Steps[int]:
        self._is_dirty = True
        return self._file.write(os.fstat(self._file.fd).st_size if self._appends else offset, data)

    def truncate(self, size: int) -> None:
        self._is_dirty = True
        self._file.resize(size)

    def flush(self) -> Maybe[None]:
        return self._check() if self._is_dirty else None

    def _check(self) -> Steps[None]:
        yield from self._checked(self._file)
        self._is_dirty = False

    def close(self) -> None:
        self._file.writers -= self._is_writer
        self._released(self._file)


def _digest(fd: int) -> Digest:
    found, offset = hashlib.sha256(), 0
    while data := os.pread(fd, 1 << 20, offset):
        found.update(data)
        offset += len(data)
    return Digest(f"sha256:{found.hexdigest()}")
