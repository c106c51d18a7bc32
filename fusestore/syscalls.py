"""Linux system calls that the standard library lacks, typed. Blocking. errno becomes OSError, here only."""

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterable

__all__ = [
    "CAP_DAC_READ_SEARCH",
    "MNT_DETACH",
    "MOUNT_ATTR_NODEV",
    "MOUNT_ATTR_NOSUID",
    "MOUNT_ATTR_RDONLY",
    "MS_NODEV",
    "MS_NOSUID",
    "MS_POSIXACL",
    "RENAME_EXCHANGE",
    "RENAME_NOREPLACE",
    "RENAME_WHITEOUT",
    "clone_mount",
    "give_up_capability",
    "groups_of",
    "is_in_user_namespace",
    "is_mounted",
    "leave_mounts",
    "loop_device",
    "make_mount",
    "mount",
    "mount_number",
    "move_mount",
    "pread_now",
    "punch_hole",
    "pwrite_all",
    "renameat2",
    "syncfs",
    "umount2",
]

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4
CAP_DAC_READ_SEARCH = 2
MS_NOSUID = 1 << 1
MS_NODEV = 1 << 2
MS_POSIXACL = 1 << 16
MNT_DETACH = 2
MOUNT_ATTR_RDONLY = 1
MOUNT_ATTR_NOSUID = 2
MOUNT_ATTR_NODEV = 4

_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2

_AT_FDCWD = -100
_CAPABILITY_HEADER = struct.Struct("Ii")
_CAPABILITY_VERSION_3 = 0x20080522
_CAPABILITY_DATA_SIZE = 24
"""linux/capability.h: twice 32 bits each of what is effective, permitted, inheritable."""
_CLONE_NEWNS = 0x20000
_MS_REC = 1 << 14
_MS_PRIVATE = 1 << 18
_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LOOP_CONFIG = struct.Struct("II52xI240x")
"""linux/loop.h: file, block size, flags."""
_LO_FLAGS_READ_ONLY = 1
_LO_FLAGS_AUTOCLEAR = 4
_LOOP_TRIES = 100
_SECTOR = 512
_OPEN_TREE_CLONE = 1
_FSOPEN_CLOEXEC = 1
_FSCONFIG_SET_FLAG = 0
_FSCONFIG_SET_STRING = 1
_FSCONFIG_CMD_CREATE = 6
_FSMOUNT_CLOEXEC = 1
_MOVE_MOUNT_F_EMPTY_PATH = 0x04
_MOVE_MOUNT_T_EMPTY_PATH = 0x40
_AT_EMPTY_PATH = 0x1000
_STATX_MNT_ID_UNIQUE = 0x4000
_STATX_SIZE = 256
_STATX_MNT_ID_OFFSET = 0x90
_NR_STATMOUNT = 457  # glibc 2.36 has no name for it
_MNT_ID_REQ_SIZE_VER0 = 24
_STATMOUNT_SIZE = 512
_MESSAGE_MAX = 4096
_PROC_USER_INIT_INO = 0xEFFFFFFD  # include/linux/proc_ns.h

_libc = ctypes.CDLL(None, use_errno=True)
_libc.renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.syncfs.argtypes = [ctypes.c_int]
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
_libc.open_tree.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
_libc.unshare.argtypes = [ctypes.c_int]
_libc.capget.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
_libc.capset.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
_libc.fsopen.argtypes = [ctypes.c_char_p, ctypes.c_uint]
_libc.fsconfig.argtypes = [ctypes.c_int, ctypes.c_uint, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int]
_libc.fsmount.argtypes = [ctypes.c_int, ctypes.c_uint, ctypes.c_uint]
_libc.move_mount.argtypes = [
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_uint,
]
_libc.statx.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p]
_libc.syscall.argtypes = [ctypes.c_long, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint]
_libc.syscall.restype = ctypes.c_long


def _check(result: int, what: bytes) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), what)


def renameat2(old_dir: int, old_name: bytes, new_dir: int, new_name: bytes, flags: int = 0) -> None:
    """renameat2(2): `flags` of RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT."""
    _check(_libc.renameat2(old_dir, old_name, new_dir, new_name, flags), old_name)


def pread_now(fd: int, size: int, offset: int) -> bytes | None:
    """As os.pread from a regular file, up to `size` or the end of file; None where that waits for a disk.

    A file system that cannot tell is waited for: it is mostly tmpfs, which never takes long.
    """
    buffer = bytearray(size)
    try:
        count = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return os.pread(fd, size, offset)
        raise
    if count < size and offset + count < os.fstat(fd).st_size:
        return None
    return bytes(memoryview(buffer)[:count])


def pwrite_all(fd: int, data: bytes, offset: int) -> None:
    """pwrite(2), until all is written."""
    view = memoryview(data)
    while len(view):
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written


def punch_hole(fd: int, offset: int, length: int) -> None:
    """fallocate(2), FALLOC_FL_PUNCH_HOLE: gives the blocks back, keeps the file's size."""
    _check(_libc.fallocate(fd, _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE, offset, length), b"fallocate")


def syncfs(fd: int) -> None:
    """syncfs(2): the file system that `fd` is on. Raises what failed there since `fd` was opened."""
    _check(_libc.syncfs(fd), b"syncfs")


def mount(source: bytes, target: bytes, type: bytes, flags: int, options: bytes) -> None:
    """mount(2): `flags` of MS_NOSUID, MS_NODEV, MS_POSIXACL."""
    _check(_libc.mount(source, target, type, flags, options), target)


def umount2(target: bytes, flags: int = 0) -> None:
    """umount2(2): `flags` of MNT_DETACH."""
    _check(_libc.umount2(target, flags), target)


def groups_of(pid: int) -> frozenset[int]:
    """The supplementary groups of a process or thread, as this one's user namespace sees them (proc(5)).

    None of one that has ended.
    """
    try:
        with open(f"/proc/{pid}/status", "rb") as status:
            for line in status:
                if line.startswith(b"Groups:"):
                    return frozenset(map(int, line.split()[1:]))
    except (FileNotFoundError, ProcessLookupError):
        pass
    return frozenset()


def is_in_user_namespace() -> bool:
    """Whether this process is in another user namespace than the machine's own."""
    return os.stat("/proc/self/ns/user").st_ino != _PROC_USER_INIT_INO


def give_up_capability(number: int) -> None:
    """This thread does without a capability (CAP_*, below 32) from now on: capset(2)."""
    header = _CAPABILITY_HEADER.pack(_CAPABILITY_VERSION_3, 0)
    data = ctypes.create_string_buffer(_CAPABILITY_DATA_SIZE)
    _check(_libc.capget(header, data), b"capget")
    (effective,) = struct.unpack_from("I", data)
    struct.pack_into("I", data, 0, effective & ~(1 << number))
    _check(_libc.capset(header, data), b"capset")


def make_mount(kind: bytes, options: Iterable[tuple[bytes, bytes | None]], attributes: int = 0) -> int:
    """A new mount of file system type `kind` that is nowhere yet; the descriptor is the caller's to close.

    The mount goes with its last descriptor unless `move_mount` gave it a place. Options are set one by one
    in their order, so that they may be of any number and hold commas; None for one without a value.
    `attributes`: MOUNT_ATTR_*. OSError says what the file system said.
    """
    context = _libc.fsopen(kind, _FSOPEN_CLOEXEC)
    _check(min(context, 0), kind)
    try:
        for name, value in options:
            command = _FSCONFIG_SET_FLAG if value is None else _FSCONFIG_SET_STRING
            _check_mount(_libc.fsconfig(context, command, name, value, 0), context, name)
        _check_mount(_libc.fsconfig(context, _FSCONFIG_CMD_CREATE, None, None, 0), context, kind)
        mount: int = _libc.fsmount(context, _FSMOUNT_CLOEXEC, attributes)
        _check_mount(min(mount, 0), context, kind)
        return mount
    finally:
        os.close(context)


def clone_mount(path: bytes) -> int:
    """A mount, which is nowhere, of the file or directory at `path` and what is below it: open_tree(2).

    What is opened through it keeps its file system, but not the mount that `path` leads through. The
    descriptor is the caller's to close.
    """
    mount: int = _libc.open_tree(_AT_FDCWD, path, _OPEN_TREE_CLONE | os.O_CLOEXEC)
    _check(min(mount, 0), path)
    return mount


def leave_mounts() -> None:
    """Give this thread a mount namespace of its own, where nothing comes from the others: unshare(2)."""
    _check(_libc.unshare(_CLONE_NEWNS), b"unshare")
    mount(b"none", b"/", b"none", _MS_REC | _MS_PRIVATE, b"")


def loop_device(path: bytes) -> tuple[int, bytes]:
    """A loop device that reads the file at `path`: a descriptor, the caller's to close, and its own path.

    It goes with the last who has it open: loop(4), LO_FLAGS_AUTOCLEAR. Raises OSError.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            for _ in range(_LOOP_TRIES):
                device = b"/dev/loop%d" % fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
                fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
                flags = _LO_FLAGS_READ_ONLY | _LO_FLAGS_AUTOCLEAR
                try:
                    fcntl.ioctl(fd, _LOOP_CONFIGURE, _LOOP_CONFIG.pack(file, _SECTOR, flags))
                    return fd, device
                except OSError as error:
                    os.close(fd)
                    if error.errno != errno.EBUSY:  # else another was quicker
                        raise
        finally:
            os.close(control)
    except OSError as error:
        raise OSError(error.errno, f"no loop device: {error.strerror}", path) from None
    finally:
        os.close(file)
    raise OSError(errno.EBUSY, "no loop device is free", path)


def mount_number(fd: int) -> int:
    """Of the mount that a descriptor lies in: statx(2), STATX_MNT_ID_UNIQUE. No other ever gets it.

    Raises OSError where the kernel has none (before Linux 6.8).
    """
    found = ctypes.create_string_buffer(_STATX_SIZE)
    _check(_libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_MNT_ID_UNIQUE, found), b"statx")
    (mask,) = struct.unpack_from("I", found)
    if not mask & _STATX_MNT_ID_UNIQUE:
        raise OSError(errno.EOPNOTSUPP, "mounts have no unique numbers")
    (number,) = struct.unpack_from("Q", found, _STATX_MNT_ID_OFFSET)
    return int(number)


def is_mounted(number: int) -> bool:
    """Whether the mount of that `mount_number` has a place in this mount namespace: statmount(2)."""
    request = struct.pack("IIQQ", _MNT_ID_REQ_SIZE_VER0, 0, number, 0)
    found = ctypes.create_string_buffer(_STATMOUNT_SIZE)
    result = _libc.syscall(_NR_STATMOUNT, request, found, _STATMOUNT_SIZE, 0)
    if result and ctypes.get_errno() == errno.ENOENT:
        return False
    _check(result, b"statmount")
    return True


def move_mount(mount: int, directory: int) -> None:
    """Put what `make_mount` gave over `directory`, a descriptor. Neither is closed."""
    flags = _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH
    _check(_libc.move_mount(mount, b"", directory, b"", flags), b"move_mount")


def _check_mount(result: int, context: int, what: bytes) -> None:
    """As `_check`, with the messages that the kernel keeps in the context: ``e``, a space, and the text."""
    if result == 0:
        return
    code = ctypes.get_errno()
    messages = []
    try:
        while message := os.read(context, _MESSAGE_MAX):
            messages.append(message[2:].decode(errors="replace").strip())
    except OSError:  # ENODATA: that was all of them
        pass
    raise OSError(code, ": ".join((os.strerror(code), *messages)), what)
