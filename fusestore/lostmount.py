"""Mounts of a container's rootfs that the kernel serves and no daemon has any more. Blocking.

A killed daemon leaves those to who is in them, an unmount by hand too. overlayfs.rst: what else changes their
upper directory has undefined behavior.
"""

import errno
import os
import time
from contextlib import suppress

from .errors import Busy
from .syscalls import make_mount

__all__ = ["escaped", "is_lost", "left_by", "require_alone"]

_LEAVING_S = 1.0
"""How long the kernel may take to be done with a mount that nobody is in any more."""
_POLL_S = 0.05


def require_alone(container_id: str, upper: str, work: str) -> None:
    """Raises Busy while somebody is in such a mount of the container's. `upper`, `work`: its directories."""
    left = left_by(work)
    if not os.path.lexists(left):
        return
    give_up = time.monotonic() + _LEAVING_S
    while is_lost(upper, work):
        if time.monotonic() > give_up:
            raise Busy(f"container {container_id} is in use in a mount that is gone: end what runs in it")
        time.sleep(_POLL_S)
    with suppress(OSError):
        os.rmdir(left)


def is_lost(upper: str, work: str) -> bool:
    """Whether somebody is in such a mount now, or was a moment ago."""
    # What looks further has the kernel log an error.
    return os.path.lexists(left_by(work)) and _is_in_use(escaped(upper))


def left_by(work: str) -> str:
    """What overlayfs makes in its work directory for a mount, and leaves."""
    return f"{work}/work"


def escaped(path: str) -> bytes:
    """A path as overlayfs's options have it."""
    return os.fsencode(path).replace(b"\\", b"\\\\")


def _is_in_use(upper: bytes) -> bool:
    """Whether there is an overlayfs with that upper directory, be it nowhere any more.

    fs/overlayfs/super.c, ovl_fill_super: with index=on that is EBUSY, and looked at before the work
    directory, which is wrong here on purpose.
    """
    options = [(b"lowerdir+", upper), (b"upperdir", upper), (b"workdir", upper), (b"index", b"on")]
    try:
        os.close(make_mount(b"overlay", options))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False
