"""The process that mounts for a daemon, and walks in the daemon's own mount. Blocking.

Who waits for an answer of a FUSE daemon cannot be killed (fs/fuse/dev.c, request_wait_answer). Were it a
thread of the daemon itself, a killed daemon would never quite end: that thread would keep /dev/fuse open, and
with it everybody waiting who is in the mount. So whatever makes requests of the mount is done by a process of
its own, started anew, which has nothing of the daemon's open and ends when the daemon does.

The rule a maintainer must not break: here is no thread, and no child, that could hold the daemon's /dev/fuse.

Spoken is msgpack over a pair of sockets: ``[serial, name, arguments…]`` to the process, for an answer
``[serial, errno, message, result]`` back; there is none to serial 0. `Mounter` is the daemon's side.
"""

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import msgpack

from .erofsmount import MountedImage, mount_image, mount_overlay
from .syscalls import (
    CAP_DAC_READ_SEARCH,
    MNT_DETACH,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOSUID,
    give_up_capability,
    mount_number,
    move_mount,
    umount2,
)

__all__ = ["Mounter"]

_CHUNK = 1 << 16
_END_TIMEOUT_S = 10.0
_DIRECTORY_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Mounter:
    """The process, as its daemon sees it. Thread-safe; every method may be called at any time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[Any]] = {}
        self._serial = 0
        self._has_ended = False
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fusestore.mounter", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd="/",
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # ^C is for the daemon
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def close(self) -> None:
        """What is under way is finished; what is mounted stays."""
        self._socket.shutdown(socket.SHUT_WR)
        try:
            self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._socket.close()

    def is_own(self, pid: int) -> bool:
        """Whether a thread is one of the process."""
        return os.path.exists(f"/proc/{self._process.pid}/task/{pid}")

    def walk_to(self, path: str) -> None:
        """Have the kernel look `path` up. Raises OSError."""
        self._call("walk_to", os.fsencode(path))

    def start_walk(self, path: str) -> None:
        """The same, without waiting and without an error."""
        self._post("walk_to", os.fsencode(path))

    def walk_soon(self, path: str) -> None:
        """The same, of many that come at once only the last."""
        self._post("walk_soon", os.fsencode(path))

    def mount(
        self,
        place: str,
        lower: str,
        devices: Sequence[str] | None,
        options: Sequence[tuple[bytes, bytes | None]],
        *,
        by_loops: bool = False,
    ) -> tuple[int, int]:
        """Mount overlayfs over the directory `place`, its lower layer the EROFS image `lower` with `devices`.

        The image is mounted once for all that use it with the same devices. Without devices `lower` is a
        directory. `options` are overlayfs's other ones; `by_loops`: see `fusestore.erofsmount`. What
        `unmount` takes, and the mount's `mount_number`. Raises OSError.
        """
        tars = None if devices is None else [os.fsencode(device) for device in devices]
        places = os.fsencode(place), os.fsencode(lower)
        token, number = self._call("mount", *places, tars, options, by_loops)
        return token, number

    def unmount(self, token: int) -> None:
        """Raises OSError: EBUSY while somebody is in it. What is not mounted any more is no error."""
        self._call("unmount", token, False)

    def unmount_lazily(self, token: int) -> None:
        """The same, whoever is in it, without waiting and without an error."""
        self._post("unmount", token, True)

    def _call(self, name: str, *arguments: Any) -> Any:
        answer: Future[Any] = Future()
        with self._lock:
            if self._has_ended:
                raise _gone()
            self._serial += 1
            self._waiting[self._serial] = answer
            self._socket.sendall(msgpack.packb([self._serial, name, *arguments]))
        return answer.result()

    def _post(self, name: str, *arguments: Any) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(msgpack.packb([0, name, *arguments]))

    def _read(self) -> None:
        unpacker = msgpack.Unpacker()
        while data := _receive(self._socket):
            unpacker.feed(data)
            for serial, code, message, result in unpacker:
                with self._lock:
                    answer = self._waiting.pop(serial)
                if code:
                    answer.set_exception(OSError(code, message))
                else:
                    answer.set_result(result)
        with self._lock:
            self._has_ended = True
            unanswered, self._waiting = self._waiting, {}
        for answer in unanswered.values():
            answer.set_exception(_gone())


def _gone() -> OSError:
    return OSError(errno.EPIPE, "the process that mounts has ended: mount anew")


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(_CHUNK)
    except ConnectionError:
        return b""


_Source = tuple[bytes, ...]
"""What an image is mounted from: its file, and the tars."""


class _Image:
    """An image that is mounted, or about to be, and `users` mounts of containers that it is for."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        """Held while it is mounted."""
        self.mounted: MountedImage | None = None
        self.users = 0


class _Mounted:
    """A container's mount, over the directory that the descriptor `directory` is of."""

    def __init__(self, directory: int, image: "_Source | None") -> None:
        self.lock = threading.Lock()
        """Held while it is unmounted."""
        self.directory = directory
        self.image = image


class _Worker:
    """What the process has mounted. Thread-safe: the kernel keeps nobody waiting for what others asked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        """Protects what follows, and is never held during a system call that may take long."""
        self._images: dict[_Source, _Image] = {}
        self._mounted: dict[int, _Mounted] = {}
        """By token."""
        self._token = 0
        self._next: bytes | None = None
        self._is_wanted = threading.Event()
        threading.Thread(target=self._walk, daemon=True).start()

    def walk_to(self, path: bytes) -> None:
        os.stat(path, follow_symlinks=False)

    def walk_soon(self, path: bytes) -> None:
        self._next = path
        self._is_wanted.set()

    def _walk(self) -> None:
        while True:
            self._is_wanted.wait()
            self._is_wanted.clear()
            path, self._next = self._next, None
            if path is not None:
                with contextlib.suppress(OSError):
                    self.walk_to(path)

    def mount(
        self,
        place: bytes,
        lower_path: bytes,
        devices: list[bytes] | None,
        options: list[tuple[bytes, bytes | None]],
        by_loops: bool,
    ) -> tuple[int, int]:
        source: _Source | None = None
        with contextlib.ExitStack() as meanwhile, contextlib.ExitStack() as stack:
            directory = os.open(place, _DIRECTORY_FLAGS)
            stack.callback(os.close, directory)
            if devices is None:
                directory_below = os.open(lower_path, _DIRECTORY_FLAGS)
                meanwhile.callback(os.close, directory_below)  # overlayfs has a mount of its own of it
                lower = MountedImage(directory_below, ())
                _find_no_origins()
            else:
                source = (lower_path, *devices)
                lower = self._take(source, by_loops)
                stack.callback(self._drop, source)
            # Device nodes and set-user-ID bits act there as they do in the mount around it.
            shut = os.fstatvfs(directory).f_flag
            attributes = MOUNT_ATTR_NODEV if shut & os.ST_NODEV else 0
            attributes |= MOUNT_ATTR_NOSUID if shut & os.ST_NOSUID else 0
            overlay = mount_overlay(lower, options, attributes)
            stack.callback(os.close, overlay)
            number = mount_number(overlay)
            move_mount(overlay, directory)
            os.close(overlay)
            stack.pop_all()
        with self._lock:
            self._token += 1
            self._mounted[self._token] = _Mounted(directory, source)
            return self._token, number

    def unmount(self, token: int, lazily: bool) -> None:
        """Through the descriptor, never by path: rmdir(2), which has us do it, holds the locks for that."""
        with self._lock:
            mounted = self._mounted.get(token)
        if mounted is None:
            return
        with mounted.lock:
            if token not in self._mounted:
                return  # unmounted while we waited
            try:
                umount2(b"/proc/self/fd/%d" % mounted.directory, MNT_DETACH if lazily else 0)
            except OSError as error:
                if error.errno != errno.EINVAL:  # else it was unmounted by hand
                    raise
            with self._lock:
                del self._mounted[token]
            os.close(mounted.directory)
        if mounted.image is not None:
            self._drop(mounted.image)

    def _take(self, source: _Source, by_loops: bool) -> MountedImage:
        path, *tars = source
        with self._lock:
            image = self._images.setdefault(source, _Image())
            image.users += 1
        try:
            with image.lock:
                if image.mounted is None:
                    image.mounted = mount_image(path, tars, by_loops=by_loops)
                return image.mounted
        except OSError:
            self._drop(source)
            raise

    def _drop(self, source: _Source) -> None:
        with self._lock:
            image = self._images[source]
            image.users -= 1
            if image.users:
                return
            del self._images[source]
        if image.mounted is not None:
            os.close(image.mounted.mount)


def _find_no_origins() -> None:
    """What this thread mounts does not ask FUSE for what its files were copied up from.

    overlayfs does by file handle, to have the inode number of before (fs/overlayfs/namei.c,
    ovl_check_origin), once the kernel forgot the file. What FUSE gives for one has no name there, and is not
    valid when it is looked at again (fs/fuse/dir.c, fuse_dentry_revalidate): the file would be ESTALE from
    then on. overlayfs asks only where who mounted it has this capability (ovl_decode_real_fh); all else that
    it is for CAP_DAC_OVERRIDE allows too.
    """
    give_up_capability(CAP_DAC_READ_SEARCH)


def _serve(connection: socket.socket) -> None:
    """Until the daemon's side is closed."""
    worker = _Worker()
    known: dict[str, Callable[..., Any]] = {
        one.__name__: one for one in (worker.walk_to, worker.walk_soon, worker.mount, worker.unmount)
    }
    lock = threading.Lock()

    def do(serial: int, name: str, arguments: list[Any]) -> None:
        code, message, result = 0, "", None
        try:
            result = known[name](*arguments)
        except OSError as error:
            code, message = error.errno or errno.EIO, error.strerror or str(error)
        except Exception as error:  # who waits must be answered
            code, message = errno.EIO, repr(error)
            traceback.print_exc()
        if serial:
            with lock, contextlib.suppress(OSError):
                connection.sendall(msgpack.packb([serial, code, message, result]))

    unpacker = msgpack.Unpacker()
    while data := _receive(connection):
        unpacker.feed(data)
        for serial, name, *arguments in unpacker:
            threading.Thread(target=do, args=(serial, name, arguments)).start()


if __name__ == "__main__":
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, signal.SIG_IGN)  # meant for the daemon, which needs us to leave
    with socket.socket(fileno=int(sys.argv[1])) as daemon:
        _serve(daemon)
