"""A mount namespace for a test process alone. Blocking.

Tests make namespaces (unshare, podman, runc), and a namespace has a copy of every mount there was: it keeps
alive what another test process unmounts meanwhile. So none has the mounts of another one.
"""

import ctypes
import os
import subprocess

__all__ = ["leave_the_mounts_of_others"]

_CLONE_NEWNS = 0x20000
"""unshare(2)"""


def leave_the_mounts_of_others() -> None:
    """For this thread and the processes it starts. What the machine mounts and unmounts still comes here."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "unshare")
    subprocess.run(["mount", "--make-rslave", "/"], check=True, timeout=30)
