"""What a disk may hold after a power cut: replay of recorded changes of which some are lost. Blocking.

As in ALICE (Pillai et al., OSDI 2014): what fsync(2) was called for is there, of the rest any part may be,
whatever came first. One call's change of names is there whole or not at all, a rename across directories too,
and an fsync of either directory makes it last: file systems with a journal do that. A write that is lost
leaves zeros where a later one is there, and else a shorter file.

Names are of inodes here as on a disk: a file that has its name need not have its content.
"""

import hashlib
import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rig.stores import Unsynced

from fusestore.disk import Target

__all__ = ["Cut", "Recorder", "State", "cuts"]


@dataclass(frozen=True, slots=True)
class Names:
    """A change of directories: (directory, name, inode) that come, and that go."""

    comes: tuple[tuple[int, str, int], ...] = ()
    goes: tuple[tuple[int, str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Write:
    inode: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Sync:
    inode: int | None
    """None: everything."""


@dataclass(frozen=True, slots=True)
class Truncate:
    inode: int
    size: int


Change = Names | Write | Truncate | Sync


@dataclass
class State:
    """Directories, files and links by inode; 0 is the root."""

    directories: dict[int, dict[str, int]] = field(default_factory=dict)
    files: dict[int, bytes] = field(default_factory=dict)
    links: dict[int, str] = field(default_factory=dict)

    def copy(self) -> "State":
        directories = {inode: dict(names) for inode, names in self.directories.items()}
        return State(directories, dict(self.files), dict(self.links))

    def apply(self, change: Change) -> None:
        if isinstance(change, Write):
            old = self.files[change.inode].ljust(change.offset, b"\0")
            end = change.offset + len(change.data)
            self.files[change.inode] = old[: change.offset] + change.data + old[end:]
        elif isinstance(change, Truncate):
            self.files[change.inode] = self.files[change.inode][: change.size].ljust(change.size, b"\0")
        elif isinstance(change, Names):
            for directory, name, inode in change.goes:
                if self.directories[directory].get(name) == inode:
                    del self.directories[directory][name]
            for directory, name, inode in change.comes:
                self.directories[directory][name] = inode

    def make(self, path: Path, inode: int = 0) -> None:
        """Makes it at `path`, where nothing is."""
        if inode in self.files:
            path.write_bytes(self.files[inode])
        elif inode in self.links:
            path.symlink_to(self.links[inode])
        else:
            path.mkdir(0o700)
            for name, below in self.directories[inode].items():
                self.make(path / name, below)

    def digest(self, inode: int = 0) -> bytes:
        """The same for states that look the same."""
        found = hashlib.sha256()
        if inode in self.files:
            found.update(b"f" + self.files[inode])
        elif inode in self.links:
            found.update(b"l" + self.links[inode].encode())
        else:
            found.update(b"d")
            for name, below in sorted(self.directories[inode].items()):
                found.update(name.encode() + b"\0" + self.digest(below))
        return found.digest()


Name = str | bytes


def _path(name: Name, dir_fd: int | None) -> str:
    path = os.fsdecode(name)
    return path if dir_fd is None else f"{os.readlink(f'/proc/self/fd/{dir_fd}')}/{path}"


class Recorder(Unsynced):
    """Does what it is told below `root`, and keeps a record of it; elsewhere it keeps none."""

    def __init__(self, root: Path) -> None:
        self.start = State()
        self.changes: list[Change] = []
        self._root = os.fspath(root)
        self._lock = threading.Lock()
        self._count = 0
        self._inodes: dict[int, int] = {}
        """By st_ino, of what is there now."""
        self._born = State()
        self._adopt(self._root)
        self.start = self._born.copy()

    @property
    def everything(self) -> State:
        """The start, with all inodes that came later, which no name leads to yet."""
        state = self._born.copy()
        for directory in state.directories:
            state.directories[directory] = dict(self.start.directories.get(directory, {}))
        for file in state.files:
            state.files[file] = self.start.files.get(file, b"")
        return state

    def _adopt(self, path: str) -> int:
        inode = self._new(path)
        if os.path.islink(path):
            self._born.links[inode] = os.readlink(path)
        elif os.path.isdir(path):
            self._born.directories[inode] = {}
            for name in os.listdir(path):
                self._born.directories[inode][name] = self._adopt(f"{path}/{name}")
        else:
            self._born.files[inode] = Path(path).read_bytes()
        return inode

    def _new(self, path: str) -> int:
        self._inodes[os.lstat(path).st_ino] = inode = self._count
        self._count += 1
        return inode

    def _place(self, path: str) -> tuple[int, str] | None:
        directory, name = os.path.split(os.fspath(path))
        if not f"{directory}/".startswith(f"{self._root}/"):
            return None
        return self._inodes[os.stat(directory).st_ino], name

    def _inode_at(self, path: str) -> int:
        self._meet(path)
        return self._inodes[os.lstat(path).st_ino]

    def _comes(self, path: str, keep: Callable[[int], None]) -> None:
        place = self._place(path)
        if place is not None:
            inode = self._new(path)
            keep(inode)
            self.changes.append(Names(comes=((*place, inode),)))

    def mkdir(self, name: Name, mode: int, dir_fd: int | None = None) -> None:
        with self._lock:
            super().mkdir(name, mode, dir_fd)
            self._comes(_path(name, dir_fd), lambda inode: self._born.directories.setdefault(inode, {}))

    def create(self, name: Name, mode: int, dir_fd: int | None = None) -> int:
        with self._lock:
            fd = super().create(name, mode, dir_fd)
            self._comes(_path(name, dir_fd), lambda inode: self._born.files.setdefault(inode, b""))
            return fd

    def mknod(self, name: Name, mode: int, rdev: int, dir_fd: int) -> None:
        """What it is does not matter here: it is a name like others."""
        with self._lock:
            super().mknod(name, mode, rdev, dir_fd)
            self._comes(_path(name, dir_fd), lambda inode: self._born.files.setdefault(inode, b""))

    def symlink(self, target: Name, name: Name, dir_fd: int | None = None) -> None:
        with self._lock:
            super().symlink(target, name, dir_fd)
            self._comes(
                _path(name, dir_fd), lambda inode: self._born.links.setdefault(inode, os.fsdecode(target))
            )

    def write(self, fd: int, data: bytes | memoryview) -> int:
        with self._lock:
            offset = os.lseek(fd, 0, os.SEEK_CUR)
            count = super().write(fd, data)
            inode = self._inodes.get(os.fstat(fd).st_ino)
            if inode is not None:
                self.changes.append(Write(inode, offset, bytes(data[:count])))
            return count

    def truncate(self, what: Target, size: int) -> None:
        with self._lock:
            super().truncate(what, size)
            inode = self._inodes.get(os.stat(what).st_ino)
            if inode is not None:
                self.changes.append(Truncate(inode, size))

    def fsync(self, fd: int) -> None:
        with self._lock:
            self._meet(os.readlink(f"/proc/self/fd/{fd}"))
            inode = self._inodes.get(os.fstat(fd).st_ino)
            if inode is not None:
                self.changes.append(Sync(inode))

    fdatasync = fsync

    def syncfs(self, fd: int) -> None:
        with self._lock:
            for directory, directories, files in os.walk(self._root):
                for name in directories + files:
                    self._meet(f"{directory}/{name}")
            self.changes.append(Sync(None))

    def _meet(self, path: str) -> None:
        """Notes what was made by others, or past `disk`: of that any part may be lost until it is synced."""
        if not f"{path}/".startswith(f"{self._root}/") or os.lstat(path).st_ino in self._inodes:
            return
        self._meet(os.path.dirname(path))
        if os.path.islink(path):
            self._comes(path, lambda inode: self._born.links.setdefault(inode, os.readlink(path)))
        elif os.path.isdir(path):
            self._comes(path, lambda inode: self._born.directories.setdefault(inode, {}))
        else:
            self._comes(path, lambda inode: self._born.files.setdefault(inode, b""))
            content = Path(path).read_bytes()
            self.changes.append(Write(self._inode_at(path), 0, content))

    def rename(self, source: str, target: str) -> None:
        with self._lock:
            old, new = self._place(source), self._place(target)
            inode = self._inode_at(source) if old is not None else -1
            super().rename(source, target)
            if old is not None and new is not None:
                self.changes.append(Names(comes=((*new, inode),), goes=((*old, inode),)))

    def unlink(self, name: Name, dir_fd: int | None = None) -> None:
        self._goes(_path(name, dir_fd), super().unlink)

    def rmdir(self, name: Name, dir_fd: int | None = None) -> None:
        self._goes(_path(name, dir_fd), super().rmdir)

    def _goes(self, path: str, remove: Callable[[str], None]) -> None:
        with self._lock:
            place = self._place(path)
            number = os.lstat(path).st_ino
            inode = self._inode_at(path) if place is not None else -1
            remove(path)
            if place is not None:
                self.changes.append(Names(goes=((*place, inode),)))
                del self._inodes[number]


@dataclass(frozen=True, slots=True)
class Cut:
    """One state that a power cut may leave."""

    kind: str
    after: int
    """So many changes had been asked for."""
    is_after_all: bool
    state: State


def cuts(recorder: Recorder, *, randomly: int, seed: int) -> Iterator[Cut]:
    """States after each number of changes, none twice: of what was not synced nothing, all, all but one, one,
    names without content, and `randomly` chosen parts.
    """
    changes, source = recorder.changes, random.Random(seed)
    seen: set[tuple[bool, bytes]] = set()
    for after in range(len(changes) + 1):
        lasting, open_ = _split(changes[:after])
        names = [number for number in open_ if isinstance(changes[number], Names)]
        choices = [("nothing", ()), ("all", open_), ("names only", names)]
        choices += [("all but one", [other for other in open_ if other != one]) for one in open_]
        choices += [("one only", [one]) for one in open_]
        choices += [("some", [one for one in open_ if source.random() < 0.5]) for _ in range(randomly)]
        for kind, kept in choices:
            state = recorder.everything
            for number in sorted({*lasting, *kept}):
                state.apply(changes[number])
            key = (after == len(changes), state.digest())
            if key not in seen:
                seen.add(key)
                yield Cut(kind, after, after == len(changes), state)


def _split(changes: list[Change]) -> tuple[list[int], list[int]]:
    """Which changes last, by fsync, and which may be lost."""
    lasting: set[int] = set()
    for number, change in enumerate(changes):
        if isinstance(change, Sync):
            lasting.update(
                earlier for earlier in range(number) if _makes_last(change.inode, changes[earlier])
            )
    open_ = [
        number
        for number, change in enumerate(changes)
        if number not in lasting and not isinstance(change, Sync)
    ]
    return sorted(lasting), open_


def _makes_last(inode: int | None, change: Change) -> bool:
    if inode is None:
        return True
    if isinstance(change, Write | Truncate):
        return change.inode == inode
    if isinstance(change, Names):
        return any(directory == inode for directory, _, _ in (*change.comes, *change.goes))
    return False
