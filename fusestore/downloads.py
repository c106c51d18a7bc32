"""Blobs on their way from a registry, kept where the way is cut off. Blocking.

What is here of one is a file of downloads/ (layout.py): its beginning, after which the next pull of it goes
on, whatever ended this one. Nothing in it is believed: who reads a `Download` compares the whole with the
blob's digest, and begins anew (`Download.restart`) where it is another.

One process at a time fetches a blob so (flock): `Downloads.open` gives None to the others.
"""

import os
from collections.abc import Callable

from . import disk
from .durable import Workspace, write_all
from .errors import AccessDenied, RegistryFailed
from .layout import Layout
from .nodes import Digest
from .sourcefiles import Reader

__all__ = ["Download", "Downloads", "discard_download"]


class Download:
    """The bytes of one blob, those that are here first. Not thread-safe."""

    def __init__(self, fd: int, path: str, size: int, rest: Callable[[int], Reader]) -> None:
        """`fd`, of `path`, stays the caller's. `rest(offset)` gives what follows there."""
        self.path = path
        self.fd = fd
        self._open_rest = rest
        self._rest: Reader | None = None
        self._offset = 0
        self.kept = os.fstat(fd).st_size
        """Bytes that were here before."""
        if self.kept > size:
            self.restart()
        os.lseek(fd, 0, os.SEEK_END)

    def read(self, size: int, /) -> bytes:
        """At least one byte, until the end. Raises what the rest raises, OSError for the disk."""
        if self._offset < self.kept:
            data = os.pread(self.fd, min(size, self.kept - self._offset), self._offset)
        else:
            if self._rest is None:
                self._rest = self._open_rest(self._offset)
            data = self._rest.read(size)
            write_all(self.fd, data)
        self._offset += len(data)
        return data

    def restart(self) -> None:
        """Forgets what is here."""
        self.close()
        disk.current.truncate(self.fd, 0)
        os.lseek(self.fd, 0, os.SEEK_SET)
        self._offset = self.kept = 0

    def close(self) -> None:
        """Of the rest. Idempotent."""
        rest, self._rest = self._rest, None
        if rest is not None:
            rest.close()


class Downloads:
    """Those of one pull, kept where its registry or the user ends it, removed where anything else does: of a
    layer that is refused nothing is worth keeping, and a full disk wants its space back.

    A context. Thread-safe.
    """

    def __init__(self, layout: Layout, workspace: Workspace) -> None:
        self._layout = layout
        self._workspace = workspace
        self._opened: list[Download] = []

    def open(self, blob: Digest, size: int, rest: Callable[[int], Reader]) -> Download | None:
        """None: another process is fetching it."""
        path = self._layout.download(blob)
        fd = self._workspace.claim(path)
        if fd is None:
            return None
        opened = Download(fd, path, size, rest)
        self._opened.append(opened)
        return opened

    def __enter__(self) -> "Downloads":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        was_cut_off = isinstance(error, RegistryFailed | AccessDenied) or not isinstance(
            error, Exception | None
        )
        for opened in self._opened:
            opened.close()
            is_begun = os.fstat(opened.fd).st_size > 0
            self._workspace.release(opened.path, opened.fd, is_kept=was_cut_off and is_begun)


def discard_download(workspace: Workspace, path: str, *, is_dry: bool) -> bool:
    """Takes one away; whether nobody is going on with it. `is_dry`: only looks."""
    fd = workspace.claim(path)
    if fd is None:
        return False
    workspace.release(path, fd, is_kept=is_dry)
    return True
