"""The run directory's account of live mounts, what they are told, and the boot it belongs to. Blocking.

A mount is one file that its daemon keeps flocked: whoever can lock it knows that the daemon is gone. The file
gets its name only after it is locked and written, so that a visible one is always whole and, while its daemon
lives, locked.

Beside it is a socket, the mount's bell. Kernels keep what a mount told them of a container or an image until
they are told otherwise; so whoever changes one in the store rings, names it, and waits until every mount has
its kernel forget. A mount that does not answer is left alone after `_PATIENCE_S`. A mount holds what the
kernel has mounted for it; so whoever wants it idle rings before (`IDLE`), at the mounts `BY_KERNEL` alone,
and with more patience. At the bell a mount is also asked how it does; who may is a matter of the run
directory's modes.

A daemon that is killed while its kernel is made to forget may not end: a thread of it waits in the kernel for
a request that only the daemon could answer, and keeps the connection open by which that would be aborted.
Whoever looks for live mounts, or waits for one in vain, aborts it; then all in it fails with ENOTCONN, as
when any other daemon dies.

The rule a maintainer must not break: a mount that waits at a bell answers its own, whatever its kernel does.
A request that rings keeps locks in the kernel until it is answered, and to forget the kernel may need those.
"""

import contextlib
import fcntl
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from .durable import discard
from .errors import Busy, NotFound, StoreUnusable
from .layout import BELL_SUFFIX, UNFINISHED_MOUNT, RunLayout

__all__ = [
    "BELL_MAX",
    "BY_KERNEL",
    "HOW_ARE_YOU",
    "IDLE",
    "Changed",
    "MountRecord",
    "Mounts",
    "forget_former_boot",
    "is_of_this_boot",
]

BELL_MAX = 1 << 12
"""Bytes of what is said at a bell."""

HOW_ARE_YOU = b"?"
"""Said at a bell: the answer is a JSON object, what `fusestore status` shows."""

BY_KERNEL = frozenset(["erofs", "overlay"])
"""The drivers of mounts inside which the kernel has more mounted."""

IDLE = "idle"
"""Said before a change: a container (all of them for "") is to be let go if it is idle."""

_ANSWER_MAX = 1 << 17
"""Bytes; what a socket takes at once."""

_RECORD_MAX = 1 << 16
_CONNECTIONS = "/sys/fs/fuse/connections"
_PATIENCE_S = 5.0
"""How long a mount may take to answer. To have its kernel forget it may have to wait for a request that waits
for the store's lock, behind many others."""
_ENDING_S = 2.0
_IMPATIENCE_S = 0.5
"""How long one may take that was late the last time."""
_LEAVING_S = 120.0
"""Unmounting a rootfs has all that is unwritten on its disk written, whoever's it is."""

_log = logging.getLogger("fusestore")


class Changed(NamedTuple):
    """What a mount is told: something in the store is gone, or is another."""

    place: str
    """"containers" or "images"; or `IDLE`."""
    name: str
    """An id."""

    def encode(self) -> bytes:
        return json.dumps(self).encode()

    @classmethod
    def decode(cls, data: bytes) -> "Changed":
        """Raises ValueError for what `encode` did not make."""
        try:
            place, name = json.loads(data)
        except (TypeError, RecursionError) as error:
            raise ValueError(str(error)) from None
        return cls(str(place), str(name))


class MountRecord:
    """One mount. `close`, in the daemon, ends it; idempotent."""

    def __init__(
        self,
        mountpoint: str,
        pid: int,
        driver: str,
        path: str,
        *,
        fd: int = -1,
        bell: socket.socket | None = None,
        ringing: Collection[object] = (),
    ) -> None:
        self.mountpoint = mountpoint
        self.pid = pid
        self.driver = driver
        self.bell = bell
        """In the daemon: listens; each connection says one `Changed` and waits for one byte, or asks."""
        self._path = path
        self._fd = fd
        self._ringing = ringing

    @property
    def bell_name(self) -> str:
        return os.path.basename(self._path) + BELL_SUFFIX

    @property
    def is_ringing(self) -> bool:
        """In the daemon: it waits at another's bell now."""
        return bool(self._ringing)

    def close(self) -> None:
        if self._fd >= 0:
            if self.bell is not None:
                self.bell.close()
            for path in (self._path + BELL_SUFFIX, self._path):
                _remove(path)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "MountRecord":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Mounts:
    """The mounts of one store. Thread-safe."""

    def __init__(self, run: RunLayout) -> None:
        self._run = run
        self._own: set[str] = set()
        """Bells of this process's mounts: what it changes it tells its kernel itself."""
        self._ringing: set[object] = set()
        """One for each thread that is in `_ring_at`. Changed by calls that are atomic, without a lock."""
        self._late: set[str] = set()
        """Bells that were not answered in time. Changed as `_ringing`."""

    def record(self, mountpoint: str, pid: int, driver: str, device: str | None = None) -> MountRecord:
        """`device` is the mount's, MAJOR:MINOR, where it can be said.

        The lock is of the open file: processes forked from this one share it.
        """
        fields = {"mountpoint": mountpoint, "pid": pid, "driver": driver, "device": device}
        data = json.dumps(fields).encode()
        if len(data) > _RECORD_MAX:
            raise StoreUnusable(
                f"the path of the mount point is too long: choose a shorter one than {mountpoint[:80]}…"
            )
        name = secrets.token_hex(8)
        temp, path = self._run.new_mount(name), self._run.mount(name)
        with contextlib.ExitStack() as on_error:
            fd = os.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            on_error.callback(os.close, fd)
            on_error.callback(_remove, temp)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(fd, data)
            on_error.callback(_remove, path + BELL_SUFFIX)
            bell = self._hang_bell(name)
            on_error.callback(bell.close)
            os.rename(temp, path)
            on_error.pop_all()
        return MountRecord(mountpoint, pid, driver, path, fd=fd, bell=bell, ringing=self._ringing)

    def _hang_bell(self, name: str) -> socket.socket:
        bell = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with self._short_path() as directory:
                bell.bind(f"{directory}/{name}{BELL_SUFFIX}")
            bell.listen()
        except BaseException:
            bell.close()
            raise
        self._own.add(name + BELL_SUFFIX)
        return bell

    @contextlib.contextmanager
    def _short_path(self) -> Iterator[str]:
        """A path to the directory that leaves room for a name in the 108 bytes of unix(7)."""
        fd = os.open(self._run.mounts, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield f"/proc/self/fd/{fd}"
        finally:
            os.close(fd)

    def announce(self, changed: Changed) -> None:
        """Tell every mount but this process's own, and wait until it no longer shows what was before."""
        self._ring_at([name for name in os.listdir(self._run.mounts) if name.endswith(BELL_SUFFIX)], changed)

    def ask_to_leave(self, container_id: str) -> None:
        """Have every other mount let go of a container, or of all for "", where it is idle."""
        bells = [record.bell_name for record in self.live() if record.driver in BY_KERNEL]
        self._ring_at(bells, Changed(IDLE, container_id))

    def _ring_at(self, bells: Collection[str], changed: Changed) -> None:
        this_call = object()
        self._ringing.add(this_call)
        try:
            for name in set(bells) - self._own:
                self._tell(name, changed)
        finally:
            self._ringing.discard(this_call)

    def _tell(self, name: str, changed: Changed) -> None:
        try:
            self._say(name, changed.encode(), self._patience_s(name, changed), 1)
            self._late.discard(name)
        except (FileNotFoundError, ConnectionError):
            pass  # its daemon has gone
        except (TimeoutError, BlockingIOError):  # stopped; or too many wait already
            self._late.add(name)
            if name in [record.bell_name for record in self.live()]:
                _log.warning(
                    "a mount of this store does not answer: it may show %s for a while", changed.name
                )

    def _patience_s(self, name: str, changed: Changed) -> float:
        if changed.place == IDLE:
            return _LEAVING_S
        return _IMPATIENCE_S if name in self._late else _PATIENCE_S

    def ask(self, mountpoint: str) -> dict[str, Any]:
        """What the newest mount at `mountpoint` says of itself.

        Raises NotFound; Busy where it says nothing.
        """
        for record in reversed(self.live()):
            if record.mountpoint == mountpoint:
                break
        else:
            raise NotFound(f"{mountpoint} is no mount of this store: `fusestore mount` makes one")
        log = self._run.mount_log(os.fsencode(mountpoint))
        try:
            said = self._say(record.bell_name, HOW_ARE_YOU, _PATIENCE_S, _ANSWER_MAX)
            answer: dict[str, Any] = json.loads(said)
        except (OSError, ValueError):
            raise Busy(
                f"the mount at {mountpoint} (process {record.pid}) does not answer: see its log, {log}"
            ) from None
        return answer

    def _say(self, name: str, message: bytes, patience_s: float, answer_max: int) -> bytes:
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection,
            self._short_path() as directory,
        ):
            connection.settimeout(patience_s)
            connection.connect(f"{directory}/{name}")
            connection.send(message)
            return connection.recv(answer_max)

    def live(self) -> list[MountRecord]:
        """Newest last. Removes the files of those that ended without closing theirs, and helps those to end
        that cannot."""
        found = []
        for name in os.listdir(self._run.mounts):
            if name.endswith(BELL_SUFFIX):
                continue
            path = self._run.mount(name)
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                if not name.startswith(UNFINISHED_MOUNT):
                    record = json.loads(os.pread(fd, _RECORD_MAX, 0))
                    started_ns = os.fstat(fd).st_mtime_ns
                    if _is_stuck(record["pid"]):
                        _let_end(record["pid"], record.get("device"), record["mountpoint"])
                        continue
                    entry = MountRecord(record["mountpoint"], record["pid"], record["driver"], path)
                    found.append((started_ns, name, entry))
            else:
                if not name.startswith(UNFINISHED_MOUNT):
                    for left in (path, path + BELL_SUFFIX):
                        _remove(left)
            finally:
                os.close(fd)
        return [entry for _, _, entry in sorted(found)]


def _is_stuck(pid: int) -> bool:
    """Whether that process was killed, but has a thread that does not end."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            state = file.read().rpartition(b") ")[2][:1]
        return state == b"Z" and len(os.listdir(f"/proc/{pid}/task")) > 1
    except (FileNotFoundError, ProcessLookupError):
        return False


def _let_end(pid: int, device: str | None, mountpoint: str) -> None:
    """Has the kernel fail every request to a mount (fuse.rst, "Control filesystem"), and waits a moment for
    the end of its process: after that its device may be another's."""
    path = f"{_CONNECTIONS}/{(device or '').partition(':')[2]}/abort"
    try:
        with open(path, "wb", buffering=0) as file:
            if _is_stuck(
                pid
            ):  # so what was opened is this mount's: nothing but its end lets go of the device
                file.write(b"1")
        give_up = time.monotonic() + _ENDING_S
        while _is_stuck(pid) and time.monotonic() < give_up:
            time.sleep(_ENDING_S / 1000)
    except OSError as error:
        _log.warning(
            "%s hangs, for its process was killed and does not end; %s: %s. "
            "As root, mount -t fusectl none %s, then try again",
            *(mountpoint, path, error.strerror, _CONNECTIONS),
        )


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _boot_id() -> bytes:
    with open("/proc/sys/kernel/random/boot_id", "rb") as file:
        return file.read()


def is_of_this_boot(run: RunLayout) -> bool:
    try:
        with open(run.boot, "rb") as file:
            return file.read() == _boot_id()
    except FileNotFoundError:
        return False


def forget_former_boot(run: RunLayout) -> None:
    """Empties a run directory that is from before a reboot. With the store's lock held."""
    if is_of_this_boot(run):
        return
    for directory in (run.containers, run.mounts):
        discard([f"{directory}/{name}" for name in os.listdir(directory)], run.trash)
    with open(run.new_boot, "wb") as file:
        file.write(_boot_id())
    os.rename(run.new_boot, run.boot)
