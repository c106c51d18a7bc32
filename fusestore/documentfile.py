"""metadata.json as an open file: what each read, write and close of it means. Blocking, through steps only.

A reader has the whole document of the moment it was opened. A writer has a buffer of its own, and what it
wrote becomes the document as a whole or not at all (design.md section 2):

* As soon as the buffer is one whole object it is committed, inside that write(2): a shell shows write's error
  and drops close's. A write after which the buffer can no longer become an object, or that the store refuses,
  fails and leaves the buffer as it was.
* What is still incomplete when a descriptor is closed fails there, and is kept: others may write on
  (``(echo '{'; echo '}') > metadata.json``). What is incomplete at the last close is gone, with a line in
  the log.
* Who empties the document and writes nothing at all (``cp /dev/null metadata.json``) is told at close.
* A writer that began with a copy of the document (no O_TRUNC, no O_APPEND) edits it in place; half-way states
  may look whole, so it commits at flush.

The kernel's idea of the file's size never counts: with the writeback cache it is the kernel's own and does
not follow a document that changes behind it. So every version of a document is a node of its own, and so is
what is left of one when somebody opens it to write.
"""

import logging
import os
from collections.abc import Callable

from . import errors
from .inodes import Branch, FileHandle, Maybe, Node, Steps
from .metadata import DOCUMENT_MAX, is_prefix, parse_document
from .nodes import Inode
from .synthetic import BytesHandle

__all__ = ["Commit", "DocumentNode", "DocumentReader", "DocumentWriter"]

log = logging.getLogger(__name__)

Commit = Callable[[bytes], Steps[None]]
"""Makes these bytes, a whole object, the document of the container. Raises what the store refuses."""


class DocumentNode(Node):
    """One version of a container's document. Its name is asked for each time: the next is another node."""

    __slots__ = ("data", "container", "mtime_ns", "version")

    entry_timeout_s = 0.0
    attr_timeout_s = 0.0

    def __init__(
        self, branch: Branch, ino: Inode, container: Node, version: object, data: bytes | None, mtime_ns: int
    ) -> None:
        super().__init__(branch, ino)
        self.container = container
        self.version = version
        """The store's token for this content."""
        self.data = data
        """None when the store's file is damaged."""
        self.mtime_ns = mtime_ns


class DocumentReader(BytesHandle):
    """Past the page cache: who opens the document to write has the kernel take its size for 0."""

    __slots__ = ()
    direct_io = True
    keep_cache = False


class DocumentWriter(FileHandle):
    """An open file that can change the document."""

    __slots__ = ("_appends", "_buffer", "_commit", "_committed", "_edits", "_is_emptied", "_old", "_what")

    direct_io = True
    keep_cache = False

    def __init__(
        self, node: Node, flags: int, old: bytes, commit: Commit, what: str, is_new: bool = False
    ) -> None:
        """`old` is the document now; `what` names the file in the log.

        `is_new`: open(2) made the file, which begins empty; touch leaves it so.
        """
        super().__init__(node)
        self._old = old
        self._commit = commit
        self._what = what
        self._appends = bool(flags & os.O_APPEND)
        self._edits = not self._appends and not is_new and not flags & os.O_TRUNC
        self._buffer = old if self._edits else b""
        self._committed = self._buffer
        """The buffer as the document knows it; while it is the buffer nothing is pending."""
        self._is_emptied = bool(flags & os.O_TRUNC) and not is_new
        """Cut to nothing, and nobody tried to write since: write(2) tells of what it refuses itself."""

    def read(self, offset: int, size: int) -> bytes:
        shown = self._old if self._appends and not self._buffer else self._buffer
        return shown[offset : offset + size]

    def write(self, offset: int, data: bytes) -> Maybe[int]:
        self._is_emptied = False
        # What O_APPEND adds is a document of its own; the kernel's offset is that of the one it replaces.
        start = len(self._buffer) if self._appends else offset
        end = start + len(data)
        if end > DOCUMENT_MAX:
            raise errors.BadDocument(f"metadata.json takes at most {DOCUMENT_MAX} bytes")
        draft = self._buffer[:start].ljust(start, b"\0") + data + self._buffer[end:]
        if self._edits:
            # The rest of the old document may still be overwritten or cut off.
            if not is_prefix(draft[:end]):
                parse_document(draft)
            self._buffer = draft
            return len(data)
        try:
            parse_document(draft)
        except errors.BadDocument:
            if not is_prefix(draft):
                raise
            self._buffer = draft
            return len(data)
        if draft.strip() == self._committed.strip():
            self._buffer = self._committed = draft
            return len(data)
        return self._write_whole(draft, len(data))

    def _write_whole(self, draft: bytes, size: int) -> Steps[int]:
        yield from self._commit(draft)
        self._buffer = self._committed = draft
        return size

    def truncate(self, size: int) -> None:
        if size > DOCUMENT_MAX:
            raise errors.BadDocument(f"metadata.json takes at most {DOCUMENT_MAX} bytes")
        self._buffer = self._buffer[:size].ljust(size, b"\0")
        if size == 0:
            self._edits = False
            self._committed = b""
            self._is_emptied = True

    def flush(self) -> Maybe[None]:
        buffer = self._buffer
        if self._is_emptied:
            raise errors.BadDocument("metadata.json was emptied and nothing written: the old document stays")
        if buffer == self._committed or (self._appends and buffer.isspace()):
            return None
        parse_document(buffer)
        return self._commit_buffer(buffer)

    def _commit_buffer(self, buffer: bytes) -> Steps[None]:
        yield from self._commit(buffer)
        self._committed = buffer

    def fsync(self, datasync: bool) -> Maybe[None]:
        return self.flush()

    def close(self) -> None:
        buffer = self._buffer
        if buffer == self._committed or (self._appends and buffer.isspace()):
            return
        try:
            parse_document(buffer)
        except errors.BadDocument:
            log.warning("%s: not one whole JSON object was written: the old document stays", self._what)
        else:
            log.warning("%s: the edited document was refused: the old document stays", self._what)
