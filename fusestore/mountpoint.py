"""A mount point: what is in its way, what is mounted there, and how that is taken away. Blocking.

A daemon must never reach its own files through its own mount: it would wait for itself, in a state that not
even SIGKILL ends. `check_mountpoint` keeps whatever it touches out from under the mount point.

A mount whose daemon died stays where it was and answers ENOTCONN. Nobody can do anything with it but take it
away, so `check_mountpoint` and `unmount` do.
"""

import errno
import os
import re
import select
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import NamedTuple

from .errors import AccessDenied, Busy, FusestoreError, NotADirectory, NotFound, NotPermitted
from .layout import Layout, run_layout
from .mounts import BY_KERNEL, Mounts
from .store import Store
from .syscalls import MNT_DETACH, MS_NODEV, MS_NOSUID, MS_POSIXACL, mount, syncfs, umount2

__all__ = ["MountOptions", "attach", "check_mountpoint", "check_not_within", "detach", "device_at", "unmount"]

_OURS = "fuse.fusestore"
_UNMOUNT_TIMEOUT_S = 30.0
_KEPT_TIMEOUT_S = 3.0
"""How long an ordinary end may take, before it is looked for who keeps the mount."""
_COMMAND_MAX = 80
_POLL_S = 0.01
_PATIENCE_S = 1.0
"""How long a mount may be busy with what walks in it, or was unmounted in it, by the daemon's own doing."""


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What a mount allows: others than its user; in root's, device nodes and set-user-ID bits that act."""

    allow_other: bool = False
    allow_dev: bool = False
    allow_suid: bool = False

    @property
    def words(self) -> set[str]:
        """Those of mount.fuse3(8) that the kernel knows.

        Who may do what is checked by the kernel, from the modes shown, as soon as others than the mounting
        user can come. A plain user's own mount is not checked: alone in it, they are to its files what root
        is.
        """
        if self.allow_other:
            return {"allow_other", "default_permissions"}
        return {"default_permissions"} if os.geteuid() == 0 else set()


def check_mountpoint(mountpoint: str, *, store: str, run_dir: str) -> None:
    """Raises a FusestoreError that says what to do where a mount of that store cannot or must not be.

    Takes away a dead mount that is in the way.
    """
    with suppress(FileNotFoundError):  # no store yet
        # One whose process is stuck would keep whoever looks at it.
        Mounts(run_layout(run_dir, os.fsencode(os.path.realpath(store)))).live()
    if not _is_usable(mountpoint) and not _clear_dead(mountpoint):
        raise Busy(f"{mountpoint} is a dead mount, not of fusestore: fusermount3 -uz {mountpoint}")
    real = os.path.realpath(mountpoint)
    kind = _mounted(real)
    if kind is not None:
        way = f"fusestore umount {mountpoint}, or choose another" if kind == _OURS else "choose another"
        raise Busy(f"{mountpoint} is a mount point already: {way}")
    for what, path in _needed(store, run_dir):
        if os.path.commonpath([real, path]) in (real, path):
            raise NotPermitted(f"{mountpoint} and {what} lie in each other: choose another mount point")
    for path in {os.path.realpath(__file__), os.path.realpath(os.__file__)}:
        if os.path.commonpath([real, path]) == real:
            raise NotPermitted(
                f"{mountpoint} would hide fusestore itself, {path}: choose another mount point"
            )


def check_not_within(store: Store, mountpoint: str, run_dir: str) -> None:
    """Raises NotPermitted where one mount of a store would need another of it, or be in its way."""
    places = [("", os.path.realpath(mountpoint)), *_needed(store.path, run_dir)]
    for record in store.mounts():
        if _mounted(record.mountpoint) != _OURS:
            continue  # in another mount namespace
        for what, path in places:
            if os.path.commonpath([record.mountpoint, path]) == record.mountpoint:
                raise NotPermitted(
                    f"{what or mountpoint} lies in {record.mountpoint}, a mount of the same store: "
                    "choose a place outside of it"
                )


def _is_usable(mountpoint: str) -> bool:
    """False for a dead mount."""
    try:
        # Opened, not only looked at: the kernel knows the attributes of a mount whose daemon died.
        os.close(os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except FileNotFoundError:
        raise NotFound(f"{mountpoint} does not exist: mkdir it first") from None
    except NotADirectoryError:
        raise NotADirectory(f"{mountpoint} is not a directory: choose one") from None
    except PermissionError:
        raise AccessDenied(f"{mountpoint} is not open to you: choose a directory of your own") from None
    except OSError as error:
        if error.errno not in (errno.ENOTCONN, errno.ECONNABORTED):
            raise
        return False
    return True


def _needed(store: str, run_dir: str) -> Iterator[tuple[str, str]]:
    """What the daemon uses while it serves: what it is to people, and its real path."""
    real = os.path.realpath(store)
    run = run_layout(run_dir, os.fsencode(real))
    for what, paths in (
        (f"the store {store}", (real, *Layout(real).directories)),
        (f"the run directory {run_dir}", (run.root, *run.directories)),
    ):
        for path in paths:
            yield what, os.path.realpath(path)


def device_at(real: str) -> str | None:
    """The device, ``MAJOR:MINOR``, of the file system mounted at `real`, a path without symlinks."""
    return next((entry.device for entry in _entries("self") if entry.path == os.fsencode(real)), None)


def _mounted(real: str) -> str | None:
    """The type of the file system mounted at `real`."""
    return next((entry.type for entry in _entries("self") if entry.path == os.fsencode(real)), None)


class _Entry(NamedTuple):
    """A line of proc_pid_mountinfo(5)."""

    device: str
    path: bytes
    type: str
    options: bytes
    """Of the file system."""


def _entries(pid: str) -> list[_Entry]:
    """What a process sees mounted, the last one first. Raises OSError where that may not be known."""
    with open(f"/proc/{pid}/mountinfo", "rb") as file:
        return [_entry(line) for line in file][::-1]


def _entry(line: bytes) -> _Entry:
    known, _, more = line.partition(b" - ")
    _, _, device, _, path, *_ = known.split()
    type, *_, options = more.split()
    return _Entry(device.decode(), _unescaped(path), type.decode(errors="replace"), _unescaped(options))


def _unescaped(field: bytes) -> bytes:
    return re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), field)


def _keepers(store: Store, real: str, device: str | None) -> list[str]:
    """Who keeps mounted what was at `real` before, or what the kernel had mounted inside it: places in this
    mount namespace, processes in others.

    Where it was gone already, `device` is None: then whoever sees a mount of fusestore there.
    """
    upper = b"upperdir=%s/" % os.fsencode(Layout(store.path).containers)

    def is_it(entry: _Entry) -> bool:
        if entry.type == "overlay" and upper in entry.options:
            return True
        if device is None:
            return entry.type == _OURS and entry.path == os.fsencode(real)
        return entry.device == device

    if places := [os.fsdecode(entry.path) for entry in _entries("self") if is_it(entry)]:
        return places
    processes = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            if any(map(is_it, _entries(pid))):
                with open(f"/proc/{pid}/cmdline", "rb") as file:
                    command = os.fsdecode(file.read(_COMMAND_MAX).replace(b"\0", b" ")).strip()
                processes.append(f"process {pid} ({command}), in a mount namespace of its own")
    return processes


def _clear_dead(mountpoint: str) -> bool:
    """Takes a dead mount of fusestore's away; False if there is none."""
    real = os.path.realpath(mountpoint)
    if _mounted(real) != _OURS:
        return False
    with suppress(AccessDenied):
        if not _is_usable(mountpoint):
            detach(real, lazily=True)
            return True
    return False


def attach(source: str, real: str, options: MountOptions) -> int:
    """Root's mount: its device, the caller's to close.

    `source` is what mount(8) lists, and by which it knows what in fstab is mounted already.

    libfuse would do it but for MS_POSIXACL: without that the kernel takes the umask off every mode before it
    comes here, and no default ACL can be inherited (fs/fuse/inode.c, dont_mask).
    """
    try:
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise FusestoreError(f"/dev/fuse: {error.strerror}: modprobe fuse") from None
    given = f"fd={device},rootmode={stat.S_IFDIR:o},user_id=0,group_id={os.getegid()}"
    flags = MS_POSIXACL
    flags |= 0 if options.allow_suid else MS_NOSUID
    flags |= 0 if options.allow_dev else MS_NODEV
    try:
        words = os.fsencode(source), os.fsencode(real), _OURS.encode()
        mount(*words, flags, ",".join([given, *options.words]).encode())
    except OSError as error:
        os.close(device)
        raise FusestoreError(
            f"{real} could not be mounted ({error.strerror}): choose another directory"
        ) from None
    return device


def unmount(store: Store, mountpoint: str) -> None:
    """Unmount and wait until the daemon has gone and everything is on disk.

    Raises NotFound where nothing of this store is mounted, Busy while something in it is in use or another
    mount namespace keeps it, NotPermitted where it is another's, OSError where the disk did not take what
    was written.
    """
    real = os.path.realpath(mountpoint)
    with ExitStack() as stack:
        # Opened before: syncfs(2) reports what failed since then, also to the daemon.
        disk = os.open(store.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, disk)
        # The newest is at that place: older ones were unmounted here, and somebody keeps them elsewhere.
        record = next((record for record in reversed(store.mounts()) if record.mountpoint == real), None)
        process = -1
        if record is not None:
            with suppress(ProcessLookupError):
                process = os.pidfd_open(record.pid)
                stack.callback(os.close, process)
        if record is not None and process >= 0:
            device = device_at(real)
            if device is not None:
                _leave(store, real, _PATIENCE_S if record.driver in BY_KERNEL else 0)
            _wait_for_end(store, real, device, record.pid, process)
        elif not _clear_dead(mountpoint):
            raise NotFound(f"{mountpoint} is no mount of this store: `fusestore mount` makes one")
        syncfs(disk)


def _leave(store: Store, real: str, patience_s: float) -> None:
    """Have the mount give back what the kernel has mounted inside it, and take it away. Raises Busy."""
    give_up = time.monotonic() + patience_s
    while True:
        store.ask_to_leave()
        try:
            return detach(real)
        except Busy:
            if time.monotonic() > give_up:
                raise
        time.sleep(_POLL_S)


def _wait_for_end(store: Store, real: str, device: str | None, pid: int, process: int) -> None:
    """`device` is what was mounted at `real`, `process` a descriptor of `pid`, who serves it."""
    start = time.monotonic()
    has_looked = False
    while pid in [record.pid for record in store.mounts()]:
        waited_s = time.monotonic() - start
        if waited_s > _KEPT_TIMEOUT_S and not has_looked:
            has_looked = True
            if keepers := _keepers(store, real, device):
                more = f", and {len(keepers) - 1} more" if len(keepers) > 1 else ""
                raise Busy(
                    f"{real} is unmounted here, and served on: still mounted for {keepers[0]}{more}. "
                    "End or unmount that"
                )
        if waited_s > _UNMOUNT_TIMEOUT_S:
            raise Busy(
                f"{real} is unmounted here, but its process {pid} still runs: see its log; "
                "as root, look for who keeps it in another mount namespace"
            )
        time.sleep(_POLL_S)
    left_s = max(0.0, start + _UNMOUNT_TIMEOUT_S - time.monotonic())
    if not select.select([process], [], [], left_s)[0]:
        raise Busy(f"{real} is unmounted, and no longer served, but its process still runs: see its log")


def detach(real: str, *, lazily: bool = False) -> None:
    """umount(8), or fusermount3 -u for a plain user. `lazily`: also while it is in use.

    Raises Busy while it is in use, NotFound where nothing is mounted, NotPermitted where it is another's.
    """
    if os.geteuid() == 0:
        try:
            umount2(os.fsencode(real), MNT_DETACH if lazily else 0)
        except OSError as error:
            raise _refusal(real, os.strerror(error.errno or 0)) from None
        return
    try:
        command = ["fusermount3", "-u", *(["-z"] if lazily else []), "--", real]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except FileNotFoundError:
        raise FusestoreError(f"{real}: fusermount3 is missing: apt-get install fuse3") from None
    if done.returncode:
        raise _refusal(real, os.fsdecode(done.stderr).strip().removeprefix("fusermount3: "))


def _refusal(real: str, said: str) -> FusestoreError:
    """`said` is an errno's text, or has one at its end: all that fusermount3 lets out."""
    if said.endswith(os.strerror(errno.EBUSY)):
        return Busy(f"{real}: {os.strerror(errno.EBUSY)}: leave it and close its files, then try again")
    if said.endswith((os.strerror(errno.EINVAL), os.strerror(errno.ENOENT))) or "not found in" in said:
        return NotFound(f"{real} is not mounted any more ({said})")
    if said.endswith((os.strerror(errno.EPERM), os.strerror(errno.EACCES))):
        return NotPermitted(f"{real} is not yours to unmount ({said}): have who mounted it do it, or root")
    return FusestoreError(f"{real} could not be unmounted: {said}")
