"""Namespaces: mounts for a test process alone, and a user who is root in one of their own. Blocking.

Tests make namespaces (unshare, podman, runc), and a namespace has a copy of every mount there was: it keeps
alive what another test process unmounts meanwhile. So none has the mounts of another one.
"""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["enter", "leave_the_mounts_of_others", "user_namespace"]

_CLONE_NEWNS = 0x20000
"""unshare(2)"""
_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def leave_the_mounts_of_others() -> None:
    """For this thread and the processes it starts. What the machine mounts and unmounts still comes here."""
    _check(_libc.unshare(_CLONE_NEWNS), "unshare")
    subprocess.run(["mount", "--make-rslave", "/"], check=True, timeout=30)


@contextmanager
def user_namespace(uid: int, gid: int) -> Iterator[int]:
    """A process of the user in whose user and mount namespace they are root, and which it keeps."""
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", "echo && exec sleep infinity"]
    changes = os.geteuid() != uid
    with subprocess.Popen(
        words, cwd="/", stdout=subprocess.PIPE, user=uid if changes else None, group=gid if changes else None,
        extra_groups=[] if changes else None,
    ) as holder:  # fmt: skip
        try:
            assert holder.stdout is not None and holder.stdout.read(1) == b"\n", "no user namespace was made"
            yield holder.pid
        finally:
            holder.kill()


def enter(holder: int) -> None:
    """Go to the namespaces of a process of the own user's."""
    descriptors = [os.open(f"/proc/{holder}/ns/{name}", os.O_RDONLY) for name in ("user", "mnt")]
    for fd in descriptors:
        _check(_libc.setns(fd, 0), "setns")
        os.close(fd)
