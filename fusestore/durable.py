"""Changes on disk that survive a crash whole or not at all. Blocking.

Every change of the store goes through a `Workspace`: temp → fsync → rename → fsync of the directory; removal
is a rename into the trash. After a crash or a power cut the old state or the new one is there, and at worst
rubbish in tmp/ and trash/.

The rule a maintainer must not break: nothing is renamed into place before it was synced.

A thing in tmp/ is flocked (shared) by its maker for as long as it is worked on; what can be locked
exclusively has no maker any more. Between making and locking there is a gap: so after locking the maker looks
whether the thing is still in its place, and makes another if not.
"""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from . import disk
from .errors import BadName, Busy, StoreUnusable
from .layout import INTENT
from .names import parse_digest

__all__ = [
    "Scratch",
    "Workspace",
    "discard",
    "empty_trash",
    "is_damage",
    "lock_directory",
    "open_directory",
    "read_file",
    "read_intent",
    "write_all",
    "write_at",
    "write_sparse",
]

LOCK_TIMEOUT_S = 60.0
"""How long to wait for the store's names: they are held for a few renames, never while data is copied."""

_LOCK_POLL_MAX_S = 0.02

_INTENT_MAX = 16 << 20
_HOLE = 64 << 10
"""Bytes, and their alignment, that are worth a hole."""
_ZEROS = bytes(_HOLE)

_DAMAGE = frozenset(
    [
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EINVAL,
        errno.EFBIG,
        errno.ELOOP,
        errno.ENXIO,
        errno.ENODEV,
    ]
)

_UNREACHABLE = frozenset([errno.EACCES, errno.ENAMETOOLONG])


def read_file(path: str, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises OSError, EFBIG if it is larger."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        chunks = []
        while limit >= 0 and (chunk := file.read(min(limit + 1, 1 << 20))):
            chunks.append(chunk)
            limit -= len(chunk)
    if limit < 0:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
    return b"".join(chunks)


def is_damage(error: Exception) -> bool:
    """Whether an error in reading a file is about what is there: a disk's may be over in a moment.

    What is no OSError was raised by whoever read the content, and is.
    """
    return not isinstance(error, OSError) or error.errno in _DAMAGE


def open_directory(path: str) -> int:
    """A descriptor of a directory, for locking it or syncing it. A symlink is not followed."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def lock_directory(path: str, operation: int) -> int | None:
    """flock(2) on the directory at `path`: a descriptor that holds the lock until it is closed.

    None if the directory is gone. Raises BlockingIOError if `operation` has LOCK_NB and the lock is taken.
    The lock is on what is at `path` now, not on what was renamed away meanwhile.
    """
    while True:
        try:
            fd = open_directory(path)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, operation)
            if _is_at(fd, path):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _is_at(fd: int, path: str) -> bool:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    held = os.fstat(fd)
    return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)


def _is_locked(fd: int) -> bool:
    """Whether another has a lock on it; if not, this has one now, until it is closed."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def write_all(fd: int, data: bytes | memoryview) -> None:
    """write(2) until everything is written."""
    rest = memoryview(data)
    while rest:
        rest = rest[disk.current.write(fd, rest) :]


def write_sparse(fd: int, data: bytes, offset: int) -> None:
    """Writes `data` at `offset` of a file that is empty from there on; blocks of zeros become holes.

    Where the file ends with a hole the caller gives it its size.
    """
    start = place = 0
    while place < len(data):
        end = min(len(data), place + _HOLE - (offset + place) % _HOLE)
        if data[place:end] == _ZEROS[: end - place]:
            write_at(fd, data[start:place], offset + start)
            start = end
        place = end
    write_at(fd, data[start:], offset + start)


def write_at(fd: int, data: bytes, offset: int) -> None:
    """`write_all` from there on."""
    if data:
        os.lseek(fd, offset, os.SEEK_SET)
        write_all(fd, data)


def _set_exact_mtime(fd: int) -> None:
    """Makes the mtime the clock's, to the nanosecond: the kernel's own is as coarse as its tick.

    With the inode number it then tells any two versions of a file apart.
    """
    now = time.time_ns()
    disk.current.utime(fd, now, now)


def _sync_directory(path: str) -> None:
    fd = open_directory(path)
    try:
        disk.current.fsync(fd)
    finally:
        os.close(fd)


def _sync_tree(path: str) -> None:
    """Puts on disk all that is at and below the directory `path`, children first.

    What cannot be opened to sync it, because of its type, its mode or its path's length, is put there with
    the whole file system: a directory's fsync(2) says nothing of the attributes of what is in it.
    """
    root = open_directory(path)  # before the others: syncfs(2) tells of what failed since
    try:
        directories = [path]
        is_whole = True
        for directory in directories:
            try:
                with os.scandir(directory) as entries:
                    for entry in entries:
                        if entry.is_dir(follow_symlinks=False):
                            directories.append(entry.path)
                        else:
                            is_whole &= entry.is_file(follow_symlinks=False) and _sync_file(entry.path)
            except OSError as error:
                if error.errno not in _UNREACHABLE:
                    raise
                is_whole = False
        if is_whole:
            for directory in reversed(directories):
                _sync_directory(directory)
        else:
            disk.current.syncfs(root)
    finally:
        os.close(root)


def _sync_file(path: str) -> bool:
    """False where the regular file at `path` cannot be opened."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in _UNREACHABLE:
            raise
        return False
    try:
        disk.current.fsync(fd)
    finally:
        os.close(fd)
    return True


def _unique() -> str:
    return secrets.token_hex(12)


class Scratch:
    """A private directory in tmp/. `close` removes it with what it still holds; a crash leaves it for the
    next open.

    `fd` is a descriptor of the directory, `path` its path: on the same filesystem as everything in the store.
    Not thread-safe beyond what the filesystem is.
    """

    def __init__(self, path: str, fd: int, trash: str) -> None:
        self.path = path
        self.fd = fd
        self._trash = trash

    def join(self, name: str) -> str:
        return f"{self.path}/{name}"

    def mkdir(self, name: str, mode: int = 0o700) -> None:
        path = self.join(name)
        disk.current.mkdir(path, mode)
        disk.current.chmod(path, mode)  # whatever the umask is

    def symlink(self, name: str, target: str) -> None:
        disk.current.symlink(target, self.join(name))

    def create(self, name: str) -> int:
        """A descriptor of a new file, to write."""
        return disk.current.create(self.join(name), 0o600)

    def write(self, name: str, data: bytes) -> None:
        """A new file. Like all that is made here it is not on disk before `sync`."""
        fd = self.create(name)
        try:
            write_all(fd, data)
            _set_exact_mtime(fd)
        finally:
            os.close(fd)

    def sync(self, name: str | None = None) -> None:
        """Puts all that is in it on disk, or in one directory in it: before that is renamed out of it.

        Whether the directory itself is there after a crash does not matter then.
        """
        _sync_tree(self.path if name is None else self.join(name))

    def sync_name(self) -> None:
        """Has the directory be there after a crash."""
        _sync_directory(os.path.dirname(self.path))

    def close(self) -> None:
        """Idempotent."""
        if self.fd < 0:
            return
        try:
            try:
                disk.current.rmdir(self.path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                _remove(self.path, self._trash)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Leaves it, with all it holds, to the next who opens the store; `close` does nothing then."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> "Scratch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _remove(path: str, trash: str) -> None:
    """Removes what is at `path`, now, deleting through the trash."""
    target = f"{trash}/{_unique()}"
    disk.current.rename(path, target)
    _delete(target, trash)


def _delete(entry: str, trash: str) -> None:
    """Deletes `entry`, in `trash`. Directories in it are moved up first: no recursion, no long paths.

    Another process may be deleting the same.
    """
    pending = [entry]
    while pending:
        path = pending.pop()
        try:
            _delete_one(path, trash, pending)
        except FileNotFoundError:
            continue


def _delete_one(path: str, trash: str, pending: list[str]) -> None:
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        disk.current.unlink(path)
        return
    if found.st_uid == os.geteuid() and found.st_mode & 0o700 != 0o700:
        disk.current.chmod(path, 0o700)
    with os.scandir(path) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                if entry.is_dir(follow_symlinks=False):
                    # A directory that changes its parent must be writable itself, unless one is root.
                    if os.geteuid() != 0:
                        disk.current.chmod(entry.path, 0o700)
                    target = f"{trash}/{_unique()}"
                    disk.current.rename(entry.path, target)
                    pending.append(target)
                else:
                    disk.current.unlink(entry.path)
    disk.current.rmdir(path)


def discard(paths: Iterable[str], trash: str) -> None:
    """Moves `paths` into the directory `trash` of the same filesystem; what is gone is passed over.

    They are gone from where they were whatever comes then, but a crash may lose them from `trash`.
    """
    touched: dict[str, None] = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            disk.current.rename(path, f"{trash}/{_unique()}")
            touched[os.path.dirname(path)] = None
    for directory in touched:
        _sync_directory(directory)


def empty_trash(trash: str) -> None:
    """Deletes everything in the directory `trash`. Raises the first OSError after trying everything."""
    failure: OSError | None = None
    for name in os.listdir(trash):
        try:
            _delete(f"{trash}/{name}", trash)
        except OSError as error:
            failure = failure or error
    if failure is not None:
        raise failure


class Intent(NamedTuple):
    """What a file says that `Workspace.intent` wrote."""

    names: Mapping[str, Sequence[str]]
    loose: Mapping[str, Sequence[str]]


def read_intent(path: str) -> Intent | None:
    """None: nothing was changed yet, or what is there nobody wrote to be acted upon."""
    try:
        found = json.loads(read_file(path, _INTENT_MAX))
        intent = Intent(_lists(found.get("names", {})), _lists(found.get("loose", {})))
        for digest in (*intent.loose.get("blobs", ()), *intent.loose.get("layers", ())):
            parse_digest(digest)
    except (FileNotFoundError, ValueError, AttributeError, RecursionError, BadName):
        return None
    return intent


def _lists(value: Any) -> Mapping[str, Sequence[str]]:
    """Names by name: none leads out of the directory that it is joined to. Raises ValueError and more."""
    found = {key: [str(name) for name in names] for key, names in value.items() if isinstance(names, list)}
    if found != value or not all(map(_is_component, (*found, *itertools.chain(*found.values())))):
        raise ValueError("an intent names what is nowhere")
    return found


def _is_component(name: str) -> bool:
    return name.isascii() and name not in ("", ".", "..") and not {"/", "\0"} & set(name)


class Workspace:
    """Where changes of one store are made: its tmp/, its trash/, its lock. Thread-safe."""

    def __init__(self, *, tmp: str, trash: str, lock: str) -> None:
        self._tmp = tmp
        self._trash = trash
        self._lock_path = lock
        self._threads = threading.Lock()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """The right to change what is in index.json, names/, containers/, blobs/, layers/, images/.

        Held by one thread of one process; not reentrant. Raises Busy after `LOCK_TIMEOUT_S`.
        """
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        if not self._threads.acquire(timeout=LOCK_TIMEOUT_S):
            raise self._busy()
        try:
            fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                self._flock(fd, deadline)
                yield
            finally:
                os.close(fd)
        finally:
            self._threads.release()

    def _flock(self, fd: int, deadline: float) -> None:
        pause = 0.0005
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise self._busy() from None
            time.sleep(pause)
            pause = min(2 * pause, _LOCK_POLL_MAX_S)

    def _busy(self) -> Busy:
        held = f"another process has held {self._lock_path} for {LOCK_TIMEOUT_S:.0f} s"
        return Busy(f"{held}: wait for it, or end it")

    def scratch(self) -> Scratch:
        """A new private directory, 0700; the caller closes it."""
        while True:
            path = f"{self._tmp}/{_unique()}"
            disk.current.mkdir(path, 0o700)
            fd = lock_directory(path, fcntl.LOCK_SH)
            if fd is not None:
                return Scratch(path, fd, self._trash)

    @contextlib.contextmanager
    def intent(self, what: Mapping[str, object], repair: Callable[[], None]) -> Iterator[None]:
        """Says on disk what is about to change, while it does (layout.py, **tmp/…/intent**).

        Whatever ends the change early is followed by `repair`. The intent goes when the change is done or
        repaired, and not before: else it waits for the next who opens the store.
        """
        with self.scratch() as scratch:
            scratch.write(INTENT, json.dumps(what).encode())
            scratch.sync()
            scratch.sync_name()
            is_whole = False
            try:
                try:
                    yield
                except BaseException:
                    repair()
                    is_whole = True
                    raise
                is_whole = True
            finally:
                if not is_whole:
                    scratch.abandon()

    def write_file(self, path: str, data: bytes) -> None:
        """Makes `data` the content of `path`: readers see the old content or the new. Mode 0600.

        inode number and mtime tell any two versions apart, however quickly one follows the other.
        """
        fd, temp = self._temporary()
        try:
            try:
                write_all(fd, data)
                _set_exact_mtime(fd)
                disk.current.fsync(fd)
                disk.current.rename(temp, path)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    disk.current.unlink(temp)
                raise
        finally:
            os.close(fd)
        _sync_directory(os.path.dirname(path))

    def _temporary(self) -> tuple[int, str]:
        while True:
            path = f"{self._tmp}/{_unique()}"
            fd = disk.current.create(path, 0o600)
            fcntl.flock(fd, fcntl.LOCK_SH)
            if os.fstat(fd).st_nlink:
                return fd, path
            os.close(fd)

    def claim(self, path: str) -> int | None:
        """A descriptor of the file at `path`, to read and to write, made if need be with its directories.

        It is flocked, exclusively, until the caller closes it; None: another has it.
        """
        self._make_directories(os.path.dirname(path))
        while True:
            try:
                fd = disk.current.create(path, 0o600)
            except FileExistsError:
                try:
                    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
                except FileNotFoundError:
                    continue
            if _is_locked(fd):
                os.close(fd)
                return None
            if _is_at(fd, path):
                return fd
            os.close(fd)

    def release(self, path: str, fd: int, *, is_kept: bool) -> None:
        """Closes what `claim` gave, and removes the file if that is still in its place and not to be kept."""
        try:
            if not is_kept and _is_at(fd, path):
                disk.current.unlink(path)
        finally:
            os.close(fd)

    def publish(self, *moves: tuple[str, str]) -> None:
        """Renames synced things into their places, in order, then syncs the directories they are in now."""
        for source, target in moves:
            disk.current.rename(source, target)
        for directory in dict.fromkeys(os.path.dirname(target) for _, target in moves):
            _sync_directory(directory)

    def make_directory(self, path: str) -> None:
        """mkdir -m 0700, synced in its parent; nothing if it exists."""
        with contextlib.suppress(FileExistsError):
            disk.current.mkdir(path, 0o700)
            _sync_directory(os.path.dirname(path))

    def unlink(self, path: str) -> None:
        """Removes a file or symlink for good; nothing if it is gone."""
        with contextlib.suppress(FileNotFoundError):
            disk.current.unlink(path)
            _sync_directory(os.path.dirname(path))

    def discard(self, *paths: str) -> None:
        """Moves `paths` into the trash: gone at once, whatever their size. `empty_trash` frees the space.

        What is gone already is passed over.
        """
        discard(paths, self._trash)

    def set_aside(self, source: str, target: str) -> None:
        """Renames a thing to where nothing is, in directories that are made if need be."""
        self._make_directories(os.path.dirname(target))
        disk.current.rename(source, target)
        for directory in (os.path.dirname(target), os.path.dirname(source)):
            _sync_directory(directory)

    def write_new(self, path: str, data: bytes) -> None:
        """`write_file`, in directories that are made if need be."""
        self._make_directories(os.path.dirname(path))
        self.write_file(path, data)

    def _make_directories(self, path: str) -> None:
        if not os.path.isdir(path):
            self._make_directories(os.path.dirname(path))
            self.make_directory(path)

    def empty_trash(self) -> None:
        """Deletes what was discarded, by whomever. Raises the first OSError after trying everything."""
        empty_trash(self._trash)

    def is_in_use(self) -> bool:
        """Whether something in tmp/ has a maker: a mount, an import, whatever will want the lock."""
        for name in os.listdir(self._tmp):
            try:
                fd = os.open(
                    f"{self._tmp}/{name}", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                )
            except OSError:
                continue
            try:
                if _is_locked(fd):
                    return True
            finally:
                os.close(fd)
        return False

    def dead(self) -> Iterator[Scratch]:
        """Directories in tmp/ that have no maker any more, each locked exclusively; the receiver closes it.

        Dead temporary files are removed on the way: they mean nothing.
        """
        for name in os.listdir(self._tmp):
            path = f"{self._tmp}/{name}"
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ELOOP):
                    continue
                reason = f"{path} cannot be opened ({error.strerror})"
                raise StoreUnusable(f"{reason}: use the store as its owner") from error
            with contextlib.ExitStack() as stack:
                stack.callback(os.close, fd)
                if _is_locked(fd) or not _is_at(fd, path):
                    continue
                if stat.S_ISDIR(os.fstat(fd).st_mode):
                    stack.pop_all()
                    yield Scratch(path, fd, self._trash)
                else:
                    disk.current.unlink(path)
