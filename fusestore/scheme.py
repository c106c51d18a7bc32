"""How an upper directory says what its file system may not let this process say. Blocking.

* NATIVE, where the process that mounted the store first may chown, mknod and set trusted.*: overlayfs's own
  xattrs begin with ``trusted.overlay.``.
* PLAIN, for everybody else: they begin with ``user.overlay.`` (what the kernel reads with userxattr). Owner,
  mode, type and device number, where the file cannot have them, are in the xattr ``user.fusestore.stat``, the
  file itself keeping what its owner needs to work with it; other xattrs that may not be set have the prefix
  ``user.fusestore.xattr.``, ACLs among them. Symbolic links, FIFOs and sockets cannot carry user.* xattrs:
  there owners are the process's own, and changing them is refused.

xattrs of the user's that begin as overlayfs's do are stored with that prefix twice ("escaped").
"""

import enum
import errno
import os
import re
import stat
from collections.abc import Iterator

from . import acl, disk
from .errors import NotPermitted, StoreDamaged
from .walk import DIRECTORY, walk

__all__ = [
    "PLAIN_ACCESS",
    "RECORD",
    "Scheme",
    "bad_records",
    "find_scheme",
    "for_union_alone",
    "get_xattr",
    "is_own",
    "proc_path",
    "put_access",
    "record",
    "recorded",
]

RECORD = b"user.fusestore.stat"
"""PLAIN: octal mode, uid, gid and device number, where the file cannot have them."""

_FOREIGN = b"user.fusestore.xattr."
_OWN = b"user.fusestore."
PLAIN_ACCESS = _FOREIGN + acl.ACCESS
"""PLAIN: where the access ACL is."""

_RECORD = re.compile(rb"([0-7]{1,7}):([0-9]{1,10}):([0-9]{1,10}):([0-9]{1,20})")
_KEPT_AS_FILES = (stat.S_IFREG, stat.S_IFCHR, stat.S_IFBLK)
_ID_MAX = (1 << 32) - 1
_FAILURES = frozenset([errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
"""Of the disk: they say nothing of what is allowed."""
_OTHER_OWNER = 65534
"""Any owner that is not the process's own will do to try out chown."""


class Scheme(enum.Enum):
    """How an upper directory says what its file system may not let this process say."""

    NATIVE = b"trusted.overlay."
    PLAIN = b"user.overlay."

    def __init__(self, prefix: bytes) -> None:
        self.prefix = prefix
        """Of the xattrs that overlayfs gives a meaning."""
        self.is_plain = prefix.startswith(b"user.")

    @property
    def word(self) -> str:
        """What the store's file scheme says (layout.py)."""
        return self.name.lower()

    def stored_name(self, name: bytes) -> bytes:
        """What the user's attribute `name` is kept as. Raises NotPermitted for the store's own."""
        if name.startswith(self.prefix):
            return self.prefix + b"overlay." + name[len(self.prefix) :]
        if self.is_plain:
            if name.startswith(_OWN):
                raise NotPermitted("xattrs user.fusestore.* are the store's own")
            if not name.startswith(b"user."):
                return _FOREIGN + name
        return name

    def shown_name(self, stored: bytes) -> bytes | None:
        """The inverse of `stored_name`; None for what is not the user's to see."""
        if stored.startswith(self.prefix):
            rest = stored[len(self.prefix) :]
            return self.prefix + rest[8:] if rest.startswith(b"overlay.") else None
        if self.is_plain:
            if stored.startswith(_FOREIGN):
                return stored[len(_FOREIGN) :]
            if stored.startswith(_OWN) or not stored.startswith(b"user."):
                return None
        return stored

    def holds(self, mode: int, name: bytes) -> bool:
        """Whether an object of that type can have an xattr (fs/xattr.c, xattr_permission; fs/posix_acl.c)."""
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
            return stat.S_ISDIR(mode) or name != acl.DEFAULT
        if name == acl.DEFAULT or (name == acl.ACCESS and stat.S_ISLNK(mode)):
            return False
        is_device = stat.S_ISCHR(mode) or stat.S_ISBLK(mode)
        return (self.is_plain and is_device) or not self.stored_name(name).startswith(b"user.")


def find_scheme(scratch: int) -> Scheme:
    """Try in the directory `scratch` what the native scheme needs. Raises OSError where the disk fails."""
    name, device = b"scheme", b"device"
    fd = disk.current.create(name, 0o600, dir_fd=scratch)
    try:
        disk.current.chown(fd, _OTHER_OWNER, _OTHER_OWNER)
        disk.current.set_xattr(fd, Scheme.NATIVE.prefix + b"opaque", b"n")
        disk.current.mknod(device, stat.S_IFCHR | 0o600, os.makedev(1, 3), dir_fd=scratch)
        disk.current.unlink(device, dir_fd=scratch)
    except OSError as error:
        if error.errno in _FAILURES:
            raise
        return Scheme.PLAIN
    finally:
        os.close(fd)
        disk.current.unlink(name, dir_fd=scratch)
    return Scheme.NATIVE


def is_own(name: bytes) -> bool:
    """PLAIN: whether an xattr of that name is the store's, not the user's."""
    return name.startswith(_OWN)


def recorded(path: bytes, status: os.stat_result) -> tuple[int, int, int, int]:
    """PLAIN: mode, uid, gid and rdev to show for a regular file or directory. Raises StoreDamaged."""
    record = get_xattr(path, RECORD)
    if record is None:
        return status.st_mode, status.st_uid, status.st_gid, status.st_rdev
    try:
        return _parse_record(record, status.st_mode)
    except ValueError:
        directory, _, name = path.removeprefix(b"/proc/self/fd/").partition(b"/")
        where = os.fsdecode(os.readlink(proc_path(int(directory))) + (b"/" + name if name else b""))
        raise StoreDamaged(
            f"{where}: its xattr {RECORD.decode()} is {record!r}: unmount, then check --repair"
        ) from None


def record(fd: int, at: disk.Target, mode: int, uid: int, gid: int, rdev: int) -> None:
    """PLAIN: make mode, owner and device what is asked, in the file itself or else in its record.

    `at` leads to `fd`, which may be O_PATH. Raises NotPermitted, with the mode made, for what has no record.
    """
    status = os.fstat(fd)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        if not stat.S_ISLNK(mode):
            disk.current.chmod(at, stat.S_IMODE(mode))
        if (uid, gid) != (status.st_uid, status.st_gid):
            raise NotPermitted("a plain user's store cannot keep owners of links, FIFOs and sockets")
        return
    needed = 0o700 if stat.S_ISDIR(status.st_mode) else 0o600
    real = mode & 0o777 | needed
    wanted = (mode, uid, gid, rdev)
    needs_record = wanted != (stat.S_IFMT(status.st_mode) | real, status.st_uid, status.st_gid, 0)
    # While there is a record, that is what shows, whatever the file's own mode is.
    if needs_record:
        disk.current.set_xattr(at, RECORD, b"%o:%d:%d:%d" % wanted)
    if stat.S_IMODE(status.st_mode) != real:
        try:
            disk.current.chmod(at, real)
        except OSError:
            if not needs_record:
                raise
    if not needs_record:
        _remove_xattr(at, RECORD)


def put_access(fd: int, old: bytes | None, new: bytes | None) -> None:
    """PLAIN: make the access ACL of `fd`, `old` until now, `new`; None is none."""
    if new is not None and new != old:
        disk.current.set_xattr(proc_path(fd), PLAIN_ACCESS, new)
    elif new is None and old is not None:
        _remove_xattr(proc_path(fd), PLAIN_ACCESS)


def _remove_xattr(at: disk.Target, name: bytes) -> None:
    """Of a file that may not have it."""
    try:
        disk.current.remove_xattr(at, name)
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
            raise


def _parse_record(record: bytes, real_mode: int) -> tuple[int, int, int, int]:
    """Raises ValueError for what this module never writes on a file of that mode."""
    match = _RECORD.fullmatch(record)
    if match is None:
        raise ValueError("no record")
    mode, uid, gid, rdev = int(match[1], 8), int(match[2]), int(match[3]), int(match[4])
    formats = (stat.S_IFDIR,) if stat.S_ISDIR(real_mode) else _KEPT_AS_FILES
    if stat.S_IFMT(mode) not in formats or max(uid, gid) > _ID_MAX or rdev >> 64:
        raise ValueError("no record of this file")
    return mode, uid, gid, rdev


def bad_records(root: str) -> Iterator[str]:
    """PLAIN: the files at and below `root` whose owner and mode cannot be understood.

    As `walk` finds them; a path may be longer than the kernel takes. Raises OSError where the disk fails.
    """
    try:
        top = os.open(root, DIRECTORY)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    try:
        if not _is_understood(proc_path(top) + b"/.", os.fstat(top).st_mode):
            yield root
        for met in walk(top):
            path = proc_path(met.directory) + b"/" + os.fsencode(met.name)
            if not _is_understood(path, met.status.st_mode):
                yield "/".join((root, *met.above, met.name))
    finally:
        os.close(top)


def _is_understood(path: bytes, real_mode: int) -> bool:
    if not (stat.S_ISREG(real_mode) or stat.S_ISDIR(real_mode)):
        return True
    try:
        _parse_record(os.getxattr(path, RECORD, follow_symlinks=False), real_mode)
    except OSError:
        pass  # it has none, or is gone
    except ValueError:
        return False
    return True


def for_union_alone(root: int) -> str | None:
    """PLAIN: the first path at or below `root`, "." for itself, that the kernel's overlayfs misunderstands.

    With userxattr that follows no redirects, and records and xattrs of other names say nothing to it.
    """
    if _says_more(proc_path(root) + b"/."):
        return "."
    for met in walk(root):
        if _says_more(proc_path(met.directory) + b"/" + os.fsencode(met.name)):
            return "/".join((*met.above, met.name))
    return None


def _says_more(path: bytes) -> bool:
    names = map(os.fsencode, os.listxattr(path, follow_symlinks=False))
    return any(name.startswith(_OWN) or name == Scheme.PLAIN.prefix + b"redirect" for name in names)


def proc_path(fd: int) -> bytes:
    """A path that leads to what `fd` stands for, itself not followed when it is a symbolic link."""
    return b"/proc/self/fd/%d" % fd


def get_xattr(path: bytes, name: bytes) -> bytes | None:
    """None: the object has no such attribute, or can have none."""
    try:
        return os.getxattr(path, name)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM):
            return None
        raise
