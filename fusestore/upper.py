"""One container's writable layer: its diff/ directory, in overlayfs's own format. Blocking.

Every object is named by a descriptor of it (O_PATH) or by a descriptor of its directory and its name: no
path is ever built, so depth and renames do not matter, and no symbolic link is followed. What cannot be done
with an O_PATH descriptor goes through /proc/self/fd, which leads to the object itself, a link too.

The format (fs/overlayfs/, overlayfs.rst): a whiteout is a character device 0:0; an opaque directory has the
xattr ``…overlay.opaque`` = "y", a renamed one ``…overlay.redirect``. Besides, which the kernel does not
mind, the root has ``…overlay.fusestore.moved`` = "y" as soon as fusestore has renamed a directory of the
image, and a copy has ``…overlay.fusestore.origin`` = "layer:inode there" of what it is a copy of. What the
xattrs are called in full, and where owners and modes are, `fusestore.scheme` says.

What must appear whole is made in the scratch directory and renamed into place. One step is not enough only
where PLAIN sets an ACL and with it the mode: between the two the ACL, which is what counts, is the new one.
"""

import contextlib
import errno
import itertools
import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

from . import acl, disk
from .errors import NoAttribute, NotPermitted, NotSupported
from .nodes import WHITEOUT_RDEV, Attr, Xattrs
from .scheme import PLAIN_ACCESS, Scheme, get_xattr, is_own, proc_path, put_access, record, recorded
from .syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT
from .union import Ref, UpperEntry

__all__ = ["Birth", "Found", "Upper"]

_MOVED = b"fusestore.moved"
_ORIGIN = b"fusestore.origin"
_PERMISSIONS = 0o7777
_PATH_MAX = 4096
"""Bytes of a path that the kernel takes, with its NUL (limits.h)."""
_serial = itertools.count()
"""Names in the scratch directory, which is this process's alone."""


class Found(NamedTuple):
    """An entry of an upper directory."""

    entry: UpperEntry
    ino: int
    """Its inode number in the file system below."""
    format: int
    """S_IFMT bits, as the user is to see them."""


class Birth(NamedTuple):
    """What a new object begins with."""

    mode: int
    """With S_IFMT bits."""
    uid: int
    gid: int
    xattrs: Xattrs = ()
    """ACLs are consistent with the mode."""


_WHITEOUT_ENTRY = UpperEntry(is_whiteout=True)
_PLAIN_ENTRY = UpperEntry()


def _temporary() -> bytes:
    """A name that is free in the scratch directory."""
    return b"%x" % next(_serial)


def _given_away(mode: int) -> int:
    """What chown(2) leaves of a mode (fs/attr.c, setattr_prepare and setattr_should_drop_suidgid)."""
    if stat.S_ISDIR(mode):
        return mode
    return mode & ~(stat.S_ISUID | (stat.S_ISGID if mode & stat.S_IXGRP else 0))


def _is_so(status: os.stat_result, birth: Birth) -> bool:
    return (status.st_mode, status.st_uid, status.st_gid) == (birth.mode, birth.uid, birth.gid)


class Upper:
    """The upper directory at `root`, a descriptor that stays the caller's, as `scratch` does.

    Not thread-safe but for `stage` and what works on its result.
    """

    def __init__(self, root: int, scratch: int, scheme: Scheme) -> None:
        self.root = root
        self.scheme = scheme
        self._scratch = scratch
        self._prefix = scheme.prefix
        self._is_plain = scheme.is_plain
        self._whiteout: bytes | None = None

    # Looking

    def find(self, directory: int, name: bytes) -> Found | None:
        """The entry `name` of a directory; None when there is none."""
        try:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return None
        mode = status.st_mode
        if stat.S_ISCHR(mode) and status.st_rdev == WHITEOUT_RDEV:
            return Found(_WHITEOUT_ENTRY, status.st_ino, stat.S_IFCHR)
        path = b"%b/%b" % (proc_path(directory), name)
        if stat.S_ISDIR(mode):
            opaque = get_xattr(path, self._prefix + b"opaque") == b"y"
            redirect = get_xattr(path, self._prefix + b"redirect")
            entry = UpperEntry(is_directory=True, is_opaque=opaque, redirect=redirect)
            return Found(entry, status.st_ino, stat.S_IFDIR)
        if self._is_plain and stat.S_ISREG(mode):
            mode = recorded(path, status)[0]
        return Found(_PLAIN_ENTRY, status.st_ino, stat.S_IFMT(mode))

    def listing(self, directory: int) -> list[tuple[bytes, Found]]:
        """All entries, whiteouts included, in the order of the file system below."""
        with os.scandir(proc_path(directory)) as entries:
            names = [(entry.name, entry) for entry in entries]
        found = []
        for name, entry in names:
            if entry.is_file(follow_symlinks=False) and not self._is_plain:
                found.append((name, Found(_PLAIN_ENTRY, entry.inode(), stat.S_IFREG)))
            elif entry.is_symlink():
                found.append((name, Found(_PLAIN_ENTRY, entry.inode(), stat.S_IFLNK)))
            elif (this := self.find(directory, name)) is not None:
                found.append((name, this))
        return found

    def open(self, directory: int, name: bytes) -> int:
        """An O_PATH descriptor, the caller's to close."""
        return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)

    def reopen(self, fd: int, flags: int) -> int:
        """A descriptor for reading or writing the regular file `fd`, the caller's to close."""
        return os.open(proc_path(fd), flags | os.O_CLOEXEC | os.O_NOCTTY)

    def attr(self, fd: int) -> Attr:
        """Attributes of `fd`; a directory's link count is the upper's own, not the union's, its size 0."""
        status = os.fstat(fd)
        is_directory = stat.S_ISDIR(status.st_mode)  # of whose size each file system says what it likes
        mode, uid, gid, rdev = status.st_mode, status.st_uid, status.st_gid, status.st_rdev
        if self._is_plain and (is_directory or stat.S_ISREG(mode)):
            mode, uid, gid, rdev = recorded(proc_path(fd), status)
        return Attr(
            mode=mode,
            uid=uid,
            gid=gid,
            size=0 if is_directory else status.st_size,
            rdev=rdev,
            nlink=status.st_nlink,
            blocks=0 if is_directory else status.st_blocks,
            atime_ns=status.st_atime_ns,
            mtime_ns=status.st_mtime_ns,
            ctime_ns=status.st_ctime_ns,
        )

    def readlink(self, fd: int) -> bytes:
        return os.readlink(b"", dir_fd=fd)

    def xattrs(self, fd: int) -> Xattrs:
        """The user's attributes, by the names the user knows."""
        path = proc_path(fd)
        shown = ((name, self.scheme.shown_name(name)) for name in map(os.fsencode, os.listxattr(path)))
        return tuple((seen, os.getxattr(path, stored)) for stored, seen in shown if seen is not None)

    def xattr(self, fd: int, name: bytes) -> bytes | None:
        """None: `fd` has no such attribute."""
        if self._is_plain and is_own(name):
            return None
        return get_xattr(proc_path(fd), self.scheme.stored_name(name))

    # Attributes

    def chmod(self, fd: int, mode: int) -> None:
        if self._is_plain:
            before = get_xattr(proc_path(fd), PLAIN_ACCESS)
            access = None if before is None else acl.with_mode(before, mode)
            self._record_access(fd, before, access, mode)
        else:
            disk.current.chmod(proc_path(fd), mode & _PERMISSIONS)

    def chown(self, fd: int, uid: int, gid: int) -> None:
        """-1 leaves one as it is. What chown(2) takes from a file goes in the same step: set-user-ID."""
        if self._is_plain:
            attr = self.attr(fd)
            wanted = (attr.uid if uid == -1 else uid, attr.gid if gid == -1 else gid)
            if wanted != (attr.uid, attr.gid):
                record(fd, proc_path(fd), _given_away(attr.mode), *wanted, attr.rdev)
        else:
            disk.current.chown(proc_path(fd), uid, gid)

    def utimens(self, fd: int, atime_ns: int | None, mtime_ns: int | None) -> None:
        """None leaves one as it is."""
        status = os.fstat(fd)
        atime_ns = status.st_atime_ns if atime_ns is None else atime_ns
        mtime_ns = status.st_mtime_ns if mtime_ns is None else mtime_ns
        disk.current.utime(proc_path(fd), atime_ns, mtime_ns)

    def truncate(self, fd: int, size: int) -> None:
        disk.current.truncate(proc_path(fd), size)

    def set_xattr(self, fd: int, name: bytes, value: bytes) -> None:
        """Raises NotSupported for what only a file system itself gives a meaning."""
        if self._is_plain and name.startswith(b"system.") and name != acl.DEFAULT:
            raise NotSupported("of system.* a plain user's store keeps ACLs only")
        disk.current.set_xattr(proc_path(fd), self.scheme.stored_name(name), value)

    def set_access(self, fd: int, value: bytes) -> None:
        """Set the access ACL, and with it the mode. An ACL that says no more than a mode is not kept."""
        if not self._is_plain:
            disk.current.set_xattr(proc_path(fd), acl.ACCESS, value)
            return
        mode, says_all = acl.mode_of(value, self.attr(fd).mode)
        before = get_xattr(proc_path(fd), PLAIN_ACCESS)
        self._record_access(fd, before, None if says_all else value, mode)

    def remove_xattr(self, fd: int, name: bytes) -> None:
        """Raises NoAttribute."""
        try:
            disk.current.remove_xattr(proc_path(fd), self.scheme.stored_name(name))
        except OSError as error:
            if error.errno == errno.ENODATA:
                raise NoAttribute("no such attribute") from None
            raise

    def set_opaque(self, fd: int) -> None:
        """The directory hides what the layers have under its name."""
        disk.current.set_xattr(proc_path(fd), self._prefix + b"opaque", b"y")

    def set_redirect(self, fd: int, path: bytes) -> None:
        """The directory merges with the lower one at `path`, which is absolute in the image."""
        disk.current.set_xattr(proc_path(self.root), self._prefix + _MOVED, b"y")
        disk.current.set_xattr(proc_path(fd), self._prefix + b"redirect", path)

    def set_origin(self, fd: int, origin: Ref) -> None:
        """`fd` is a copy of a layer's object. Not kept where that takes an xattr the file cannot have."""
        with contextlib.suppress(OSError):
            disk.current.set_xattr(proc_path(fd), self._prefix + _ORIGIN, b"%d:%d" % origin)

    def origin(self, directory: int, name: bytes) -> Ref | None:
        """What `set_origin` said of the object `name`."""
        path = b"%b/%b" % (proc_path(directory), name)
        try:
            record = os.getxattr(path, self._prefix + _ORIGIN, follow_symlinks=False)
            layer, ino = map(int, record.split(b":"))
        except (OSError, ValueError):
            return None
        return Ref(layer, ino) if layer >= 0 and ino >= 0 else None

    def moved(self) -> list[bytes]:
        """The paths of all directories with a redirect.

        Reads all directories, but none where `set_redirect` never was called: what only the kernel renamed is
        not found.
        """
        found: list[bytes] = []
        if get_xattr(proc_path(self.root), self._prefix + _MOVED) is None:
            return found
        pending = [b""]
        while pending:
            path = pending.pop()
            fd = self._descend(path)
            try:
                if path and get_xattr(proc_path(fd), self._prefix + b"redirect") is not None:
                    found.append(path)
                pending.extend(path + b"/" + name if path else name for name in self._subdirectories(fd))
            finally:
                os.close(fd)
        return found

    def _descend(self, path: bytes) -> int:
        """A descriptor of the directory at `path`, however long that is, with one more open meanwhile."""
        fd = os.dup(self.root)
        while path:
            end = len(path) if len(path) < _PATH_MAX else path.rindex(b"/", 0, _PATH_MAX)
            try:
                below = self.open(fd, path[:end])
            finally:
                os.close(fd)
            fd, path = below, path[end + 1 :]
        return fd

    def _subdirectories(self, directory: int) -> list[bytes]:
        with os.scandir(proc_path(directory)) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]

    # Making, in place

    def make_file(self, directory: int, name: bytes, birth: Birth, replaces: bool) -> int:
        """Create a regular file and open it read-write; `replaces` a whiteout of that name when told so.

        It has its name when it has its owner and mode, and not before.
        """
        in_place = not replaces and self._is_born_so(birth)
        home, temporary = (directory, name) if in_place else (self._scratch, _temporary())
        mode = birth.mode & _PERMISSIONS if in_place else 0o600
        fd = disk.current.create(temporary, mode, dir_fd=home)
        try:
            if not in_place:
                self._dress(fd, birth, 0, fd)
                self._appear(temporary, directory, name, replaces)
            elif not _is_so(os.fstat(fd), birth):  # this process's umask had a say
                self._dress(fd, birth, 0, fd)
        except BaseException:
            os.close(fd)
            disk.current.unlink(temporary, dir_fd=home)
            raise
        return fd

    def _is_born_so(self, birth: Birth) -> bool:
        """Whether open(2) alone makes it: it is this process's, and PLAIN needs no record of it."""
        is_own = birth.uid == os.geteuid() and birth.gid == os.getegid() and not birth.xattrs
        return is_own and not (self._is_plain and (birth.mode & 0o7600) != 0o600)

    def make_directory(self, directory: int, name: bytes, birth: Birth, replaces: bool) -> None:
        """Create a directory; one that `replaces` a whiteout is opaque, for the whiteout hid a lower one."""
        temporary = _temporary()
        disk.current.mkdir(temporary, 0o700, dir_fd=self._scratch)
        try:
            with self._opened(self._scratch, temporary) as fd:
                self._dress(fd, birth, 0, proc_path(fd))
                if replaces:
                    self.set_opaque(fd)
            if replaces:
                disk.current.renameat2(self._scratch, temporary, directory, name, RENAME_EXCHANGE)
            else:
                disk.current.renameat2(self._scratch, temporary, directory, name, RENAME_NOREPLACE)
        except BaseException:
            with contextlib.suppress(OSError):
                disk.current.rmdir(temporary, dir_fd=self._scratch)
            raise
        if replaces:
            with contextlib.suppress(OSError):  # the whiteout; the scratch directory takes it along
                disk.current.unlink(temporary, dir_fd=self._scratch)

    def make_node(self, directory: int, name: bytes, birth: Birth, rdev: int, replaces: bool) -> None:
        """Create a device, FIFO, socket or (mknod's other use) an empty regular file."""
        temporary = _temporary()
        self._mknod(temporary, birth.mode, rdev)
        self._settle(temporary, birth, rdev, directory, name, replaces)

    def make_symlink(self, directory: int, name: bytes, target: bytes, birth: Birth, replaces: bool) -> None:
        temporary = _temporary()
        disk.current.symlink(target, temporary, dir_fd=self._scratch)
        self._settle(temporary, birth, 0, directory, name, replaces)

    def link(self, fd: int, directory: int, name: bytes, replaces: bool) -> None:
        """One more name for the object `fd`."""
        home, temporary = (self._scratch, _temporary()) if replaces else (directory, name)
        disk.current.link(proc_path(fd), temporary, dir_fd=home)
        if replaces:
            self._place(temporary, directory, name, replaces)

    def _settle(
        self, temporary: bytes, birth: Birth, rdev: int, directory: int, name: bytes, replaces: bool
    ) -> None:
        try:
            with self._opened(self._scratch, temporary) as fd:
                self._dress(fd, birth, rdev, proc_path(fd))
            self._appear(temporary, directory, name, replaces)
        except BaseException:
            disk.current.unlink(temporary, dir_fd=self._scratch)
            raise

    def _appear(self, temporary: bytes, directory: int, name: bytes, replaces: bool) -> None:
        """A non-directory of the scratch directory gets its name: over a whiteout, or where nothing is."""
        flags = 0 if replaces else RENAME_NOREPLACE
        disk.current.renameat2(self._scratch, temporary, directory, name, flags)

    # Taking away

    def remove(self, directory: int, name: bytes) -> None:
        """Unlink a non-directory that no layer has below."""
        disk.current.unlink(name, dir_fd=directory)

    def remove_directory(self, directory: int, name: bytes, leave_whiteout: bool) -> None:
        """Remove a directory with at most whiteouts in it. They go after it: nothing they hide appears."""
        if leave_whiteout:
            temporary = self._link_whiteout()
            disk.current.renameat2(self._scratch, temporary, directory, name, RENAME_EXCHANGE)
        else:
            temporary = _temporary()
            disk.current.renameat2(directory, name, self._scratch, temporary)
        with contextlib.suppress(OSError):  # it is removed; the rest goes with the scratch directory
            with self._opened(self._scratch, temporary) as fd:
                self._unlink_whiteouts(fd)
            disk.current.rmdir(temporary, dir_fd=self._scratch)

    def clear_whiteouts(self, fd: int) -> None:
        """Empty a directory that shows nothing, where it is: opaque first, then no whiteout is needed."""
        self.set_opaque(fd)
        self._unlink_whiteouts(fd)

    def _unlink_whiteouts(self, fd: int) -> None:
        for name, found in self.listing(fd):
            if found.entry.is_whiteout:
                disk.current.unlink(name, dir_fd=fd)

    def put_whiteout(self, directory: int, name: bytes, replaces: bool) -> None:
        """Hide a lower name; `replaces` an upper non-directory of that name in the same step."""
        temporary = self._link_whiteout()
        self._place(temporary, directory, name, replaces)

    def _place(self, temporary: bytes, directory: int, name: bytes, replaces: bool) -> None:
        """Rename a non-directory out of the scratch directory, or unlink it there."""
        try:
            self._appear(temporary, directory, name, replaces)
        except BaseException:
            disk.current.unlink(temporary, dir_fd=self._scratch)
            raise

    def _link_whiteout(self) -> bytes:
        """A whiteout in the scratch directory. All are links of one inode, as the kernel's are."""
        temporary = _temporary()
        if self._whiteout is not None:
            try:
                self._link_in_scratch(self._whiteout, temporary)
                return temporary
            except OSError as error:
                if error.errno not in (errno.EMLINK, errno.EPERM, errno.ENOENT):
                    raise
                with contextlib.suppress(FileNotFoundError):
                    disk.current.unlink(self._whiteout, dir_fd=self._scratch)
                self._whiteout = None
        whiteout = _temporary()
        disk.current.mknod(whiteout, stat.S_IFCHR, WHITEOUT_RDEV, dir_fd=self._scratch)
        self._whiteout = whiteout
        self._link_in_scratch(whiteout, temporary)
        return temporary

    def _link_in_scratch(self, source: bytes, name: bytes) -> None:
        disk.current.link(b"%b/%b" % (proc_path(self._scratch), source), name, dir_fd=self._scratch)

    # Moving

    def move(
        self,
        directory: int,
        name: bytes,
        new_directory: int,
        new_name: bytes,
        leave_whiteout: bool,
        over_whiteout: bool,
    ) -> None:
        """rename(2) within the upper, in one step; a whiteout stays behind where a layer has the old name."""
        if over_whiteout:
            # A directory cannot be renamed over a device: they change places, and the whiteout stays or goes.
            disk.current.renameat2(directory, name, new_directory, new_name, RENAME_EXCHANGE)
            if not leave_whiteout:
                with contextlib.suppress(OSError):  # it is moved; one that hides nothing does no harm
                    disk.current.unlink(name, dir_fd=directory)
        else:
            flags = RENAME_WHITEOUT if leave_whiteout else 0
            disk.current.renameat2(directory, name, new_directory, new_name, flags)

    def exchange(self, directory: int, name: bytes, other_directory: int, other_name: bytes) -> None:
        disk.current.renameat2(directory, name, other_directory, other_name, RENAME_EXCHANGE)

    # Copy-up

    def stage(self) -> tuple[bytes, int]:
        """An empty file in the scratch directory: its name, and a descriptor, the caller's to close."""
        name = _temporary()
        return name, disk.current.create(name, 0o600, dir_fd=self._scratch)

    def unstage(self, name: bytes) -> None:
        disk.current.unlink(name, dir_fd=self._scratch)

    def dress_copy(self, fd: int, attr: Attr, xattrs: Xattrs) -> None:
        """Give a staged file the attributes of what it is a copy of, times last.

        Links, FIFOs and sockets lose the xattrs that Linux lets no such object have.
        """
        self._dress(fd, Birth(attr.mode, attr.uid, attr.gid, xattrs), attr.rdev, proc_path(fd))
        disk.current.utime(proc_path(fd), attr.atime_ns, attr.mtime_ns)

    def publish(self, staged: bytes, directory: int, name: bytes) -> int:
        """The staged object appears as `name`, which no entry of the upper has.

        This and the copies below give an O_PATH descriptor, the caller's to close. It is opened first: when
        there is no descriptor to be had, nothing has appeared.
        """
        fd = self.open(self._scratch, staged)
        try:
            disk.current.renameat2(self._scratch, staged, directory, name, RENAME_NOREPLACE)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def copy_directory(self, directory: int, name: bytes, attr: Attr, xattrs: Xattrs) -> int:
        """An upper part for a lower directory."""
        return self._copy(directory, name, attr, xattrs, None)

    def copy_special(
        self, directory: int, name: bytes, attr: Attr, xattrs: Xattrs, target: bytes | None
    ) -> int:
        """A copy of a lower symbolic link (to `target`), device, FIFO or socket."""
        return self._copy(directory, name, attr, xattrs, target)

    def copy_nameless(self, attr: Attr, xattrs: Xattrs, target: bytes | None) -> int:
        """A copy that no directory has, of a lower directory or special object that is open and removed."""
        staged = self._stage_copy(attr, xattrs, target)
        try:
            return self.open(self._scratch, staged)
        finally:
            self._unstage_copy(staged, attr)

    def _copy(self, directory: int, name: bytes, attr: Attr, xattrs: Xattrs, target: bytes | None) -> int:
        staged = self._stage_copy(attr, xattrs, target)
        try:
            return self.publish(staged, directory, name)
        except BaseException:
            self._unstage_copy(staged, attr)
            raise

    def _stage_copy(self, attr: Attr, xattrs: Xattrs, target: bytes | None) -> bytes:
        staged = _temporary()
        if target is not None:
            disk.current.symlink(target, staged, dir_fd=self._scratch)
        elif stat.S_ISDIR(attr.mode):
            disk.current.mkdir(staged, 0o700, dir_fd=self._scratch)
        else:
            self._mknod(staged, attr.mode, attr.rdev)
        try:
            with self._opened(self._scratch, staged) as fd:
                self.dress_copy(fd, attr, xattrs)
        except BaseException:
            self._unstage_copy(staged, attr)
            raise
        return staged

    def _unstage_copy(self, staged: bytes, attr: Attr) -> None:
        remove = disk.current.rmdir if stat.S_ISDIR(attr.mode) else disk.current.unlink
        remove(staged, dir_fd=self._scratch)

    # How things are stored

    def _mknod(self, temporary: bytes, mode: int, rdev: int) -> None:
        """A new object in the scratch directory: a plain user's devices are regular files with a record."""
        if self._is_plain and (stat.S_ISCHR(mode) or stat.S_ISBLK(mode)):
            mode, rdev = stat.S_IFREG, 0
        disk.current.mknod(temporary, stat.S_IFMT(mode) | 0o600, rdev, dir_fd=self._scratch)

    def _dress(self, fd: int, birth: Birth, rdev: int, at: disk.Target) -> None:
        """Give a new object its owner, mode and those xattrs that Linux lets it have.

        `at`: what leads to it, where `fd` is O_PATH; else that is quicker.
        """
        mode, uid, gid, xattrs = birth
        if self._is_plain:
            with contextlib.suppress(NotPermitted):  # links, FIFOs and sockets stay the process's own
                record(fd, at, mode, uid, gid, rdev)
        else:
            disk.current.chown(at, uid, gid)
            if not stat.S_ISLNK(mode):
                disk.current.chmod(at, mode & _PERMISSIONS)
        for name, value in xattrs:
            if self.scheme.holds(mode, name):
                disk.current.set_xattr(at, self.scheme.stored_name(name), value)

    def _record_access(self, fd: int, before: bytes | None, access: bytes | None, mode: int) -> None:
        """PLAIN: make the access ACL, `before` until now, and the mode what is asked, or leave both."""
        put_access(fd, before, access)
        try:
            self._record_mode(fd, mode)
        except BaseException:
            with contextlib.suppress(OSError):
                put_access(fd, access, before)
            raise

    def _record_mode(self, fd: int, mode: int) -> None:
        attr = self.attr(fd)
        mode = stat.S_IFMT(attr.mode) | mode & _PERMISSIONS
        record(fd, proc_path(fd), mode, attr.uid, attr.gid, attr.rdev)

    @contextlib.contextmanager
    def _opened(self, directory: int, name: bytes) -> Iterator[int]:
        fd = self.open(directory, name)
        try:
            yield fd
        finally:
            os.close(fd)
