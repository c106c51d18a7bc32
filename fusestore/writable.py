"""The changes in a container's rootfs: what write(2), rename(2) and the like do to the upper. Blocking.

Everything that is changed is copied up first, with its directories. The steps of a change are ordered so that
whenever they stop, the union shows the tree before or after it:

* a copy is made whole in the scratch directory, then renamed into place;
* a removal of what a layer has is one rename of a whiteout over it;
* a directory moves with its redirect already set: until it has moved, the redirect names where it is.

Copying up a file copies up all its hard links, as links of one file (overlayfs does so with index=on, by
other means): whoever opens another name sees the same file. Between the first link and the last a crash
leaves the other names with the old file, whose content is the same.

Directories that the copied object lies in keep their times (fs/overlayfs/copy_up.c, ovl_set_timestamps), but
for ctime, which nobody can set: theirs and the object's own is then another one than the kernel knows.
"""

import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence

from . import acl, disk
from .blobs import LayerReader
from .errors import (
    BadInput,
    Exists,
    IsADirectory,
    NoAttribute,
    NoSpace,
    NotADirectory,
    NotEmpty,
    NotFound,
    NotPermitted,
    ReadOnly,
)
from .inodes import Caller, Changes, FileHandle, Maybe, Node, Steps
from .nodes import WHITEOUT_RDEV, Attr, Extent, Xattrs
from .objects import Object
from .openfile import OpenFile, step_of
from .rootfs import Rootfs
from .scheme import Scheme
from .syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, groups_of
from .union import Resolved, over
from .upper import Birth, Upper

__all__ = ["WritableRootfs"]

_COPY_CHUNK = 1 << 20


class WritableRootfs(Rootfs):
    """A rootfs over an upper directory."""

    __slots__ = ()

    @property
    def _upper(self) -> Upper:
        upper = self.opened.upper
        if upper is None:
            raise ReadOnly("images are read-only")
        return upper

    # Files

    def open(self, node: Node, flags: int, caller: Caller) -> Maybe[FileHandle]:
        thing = _thing(node)
        writes = flags & os.O_ACCMODE != os.O_RDONLY
        truncates = flags & os.O_TRUNC
        if not writes and not truncates:
            return self.open_for(thing, os.O_RDONLY | flags & os.O_NOATIME)
        # Always for reading too: with the writeback cache the kernel reads the page it writes a part of, and
        # O_APPEND is its own business (fuse.rst). Nobody reads by that, so the file was not accessed.
        only_writes = flags & os.O_ACCMODE == os.O_WRONLY
        upper_flags = os.O_RDWR | truncates | (os.O_NOATIME if only_writes else flags & os.O_NOATIME)
        if thing.in_upper:
            return self._open_upper(thing, upper_flags, caller)
        return self._open_copied(thing, upper_flags, caller)

    def _open_copied(self, thing: Object, upper_flags: int, caller: Caller) -> Steps[FileHandle]:
        self.begin_use()
        try:
            yield from self.copy_up(thing, 0 if upper_flags & os.O_TRUNC else None)
            return self._open_upper(thing, upper_flags, caller)
        finally:
            self.end_use()

    def _open_upper(self, thing: Object, upper_flags: int, caller: Caller) -> FileHandle:
        with self.charged(self.descriptor(thing)):
            opened = self.open_for(thing, upper_flags)
        if upper_flags & os.O_TRUNC:
            # Of all that changes a file's content only this comes without a setattr that says so.
            self._lose_privileges(thing, caller)
        return opened

    def _lose_privileges(self, thing: Object, caller: Caller) -> None:
        """What only root may keep when it changes a file (fs/attr.c, setattr_should_drop_suidgid)."""
        attr = self.attr(thing)
        kept = attr.mode
        if caller.uid != 0:
            kept &= ~stat.S_ISUID
            if attr.mode & stat.S_IXGRP or not _may_set_group_id(caller, attr.gid):
                kept &= ~stat.S_ISGID
        if kept != attr.mode:
            fd = self.descriptor(thing)
            with self.charged(fd):
                self._upper.chmod(fd, kept)

    def create(
        self, node: Node, name: bytes, mode: int, flags: int, caller: Caller
    ) -> Maybe[tuple[Node, FileHandle]]:
        directory = _thing(node)
        replaces = self._vacant(directory, name)
        birth = self._birth(directory, stat.S_IFREG | mode, caller)
        with contextlib.ExitStack() as on_error:
            self.begin_use()
            on_error.callback(self.end_use)
            self.begin_file()
            on_error.callback(self.end_file)
            fd = self._upper.make_file(self.descriptor(directory), name, birth, replaces)
            on_error.callback(os.close, fd)
            child = self._made(directory, name, Resolved(os.fstat(fd).st_ino, (), stat.S_IFREG))
            opened = OpenFile(self, child, fd)
            on_error.pop_all()
            return child, opened

    def mknod(self, node: Node, name: bytes, mode: int, rdev: int, caller: Caller) -> Node:
        directory = _thing(node)
        if stat.S_ISCHR(mode) and rdev == WHITEOUT_RDEV:
            raise NotPermitted("a character device 0:0 would be a whiteout")
        replaces = self._vacant(directory, name)
        birth = self._birth(directory, mode, caller)
        self._upper.make_node(self.descriptor(directory), name, birth, rdev, replaces)
        return self._made(directory, name)

    def mkdir(self, node: Node, name: bytes, mode: int, caller: Caller) -> Node:
        directory = _thing(node)
        replaces = self._vacant(directory, name)
        birth = self._birth(directory, stat.S_IFDIR | mode, caller)
        self._upper.make_directory(self.descriptor(directory), name, birth, replaces)
        return self._made(directory, name)

    def symlink(self, node: Node, name: bytes, target: bytes, caller: Caller) -> Node:
        directory = _thing(node)
        replaces = self._vacant(directory, name)
        birth = self._birth(directory, stat.S_IFLNK | 0o777, caller)
        self._upper.make_symlink(self.descriptor(directory), name, target, birth, replaces)
        return self._made(directory, name)

    def link(self, node: Node, new_parent: Node, name: bytes) -> Steps[Node]:
        thing, directory = _thing(node), _thing(new_parent)
        self._vacant(directory, name)  # before anything is copied; and after it again
        yield from self.copy_up(thing)
        if thing.is_orphan:
            raise NotFound("no such file or directory")
        replaces = self._vacant(directory, name)
        self._upper.link(self.descriptor(thing), self.descriptor(directory), name, replaces)
        return self._made(directory, name)

    def _vacant(self, directory: Object, name: bytes) -> bool:
        """Make sure that `name` can be made in `directory`, now in the upper; True if a whiteout is there."""
        if directory.is_orphan:
            raise NotFound("no such file or directory")
        found = self._upper.find(self.descriptor(directory), name) if directory.in_upper else None
        if over(found.entry if found else None, self._lower, directory.stack, name) is not None:
            raise Exists("file exists")
        if self.quota is not None:
            self.quota.require(1)
        self._copy_up_directory(directory)
        return found is not None

    def _birth(self, directory: Object, mode: int, caller: Caller) -> Birth:
        """What something new begins with.

        A set-group-ID directory passes on its group (inode(7)), one with a default ACL that, instead of the
        umask (acl(5)).
        """
        parent = self.attr(directory)
        gid = caller.gid
        if parent.mode & stat.S_ISGID:
            gid = parent.gid
            if stat.S_ISDIR(mode):
                mode |= stat.S_ISGID
        acls: Xattrs = ()
        if not stat.S_ISLNK(mode):
            try:
                mode, acls = acl.inherited(self.xattr(directory, acl.DEFAULT), mode)
            except NoAttribute:
                mode &= ~caller.umask
        return Birth(mode, caller.uid, gid, acls)

    def _made(self, directory: Object, name: bytes, what: Resolved | None = None) -> Object:
        """The new object `name`; of one that nothing else leads to yet it may be known what it is."""
        if what is None:
            child = self.lookup(directory, name)
        else:
            child = self.materialize(directory, name, what, is_new=True)
        self._gained(directory, child)
        if self.quota is not None:
            status = os.fstat(self.descriptor(child))
            if child.format == stat.S_IFDIR or status.st_nlink == 1:
                self.quota.added(status)
        return child

    def _gained(self, directory: Object, thing: Object, count: int = 1) -> None:
        """`directory` has one name more (or `count` of -1: one less), which leads to `thing`.

        The number of subdirectories is kept, for to count them takes a listing.
        """
        directory.version += 1
        if thing.format == stat.S_IFDIR and directory.subdirectories >= 0:
            directory.subdirectories += count

    def _lost(self, directory: Object, thing: Object) -> None:
        self._gained(directory, thing, -1)

    # Attributes

    def setattr(self, node: Node, changes: Changes, caller: Caller) -> Maybe[None]:
        thing = _thing(node)
        if caller.uid != 0 and self._upper.scheme is Scheme.PLAIN:
            self._check_chown(thing, changes)
        if not thing.in_upper:
            return self._setattr_copied(thing, changes)
        self._setattr_upper(thing, changes)
        return None

    def _check_chown(self, thing: Object, changes: Changes) -> None:
        """chown(2) of a plain user, which the kernel does not check in their own mount (`fusestore.mount`).

        Refused as everywhere: tools like cp and sed then leave the owner, where after a success they would go
        on to ACLs, which the kernel lets nobody set on what is not theirs.
        """
        attr = self.attr(thing)
        if changes.uid not in (None, attr.uid):
            raise NotPermitted("only root may give files away")
        if changes.gid not in (None, attr.gid, os.getegid(), *os.getgroups()):
            raise NotPermitted("only root may give files to a group it is not in")

    def _setattr_copied(self, thing: Object, changes: Changes) -> Steps[None]:
        yield from self.copy_up(thing, changes.size)
        self._setattr_upper(thing, changes)

    def _setattr_upper(self, thing: Object, changes: Changes) -> None:
        fd = self.descriptor(thing)
        with self.charged(fd):
            self._set(fd, changes)

    def _set(self, fd: int, changes: Changes) -> None:
        upper = self._upper
        # To its own size: the kernel, which keeps the times, leaves them (fs/fuse/dir.c, fuse_do_setattr).
        if changes.size is not None and changes.size != os.fstat(fd).st_size:
            upper.truncate(fd, changes.size)
        if changes.uid is not None or changes.gid is not None:
            upper.chown(
                fd,
                -1 if changes.uid is None else changes.uid,
                -1 if changes.gid is None else changes.gid,
            )
        if changes.mode is not None:  # after chown(2), which clears set-user-ID
            upper.chmod(fd, changes.mode)
        if changes.atime_ns is not None or changes.mtime_ns is not None:
            upper.utimens(fd, changes.atime_ns, changes.mtime_ns)

    def set_xattr(self, node: Node, name: bytes, value: bytes, caller: Caller) -> Steps[None]:
        thing = _thing(node)
        yield from self.copy_up(thing)
        if self.quota is not None:
            self.quota.require(1)
        fd = self.descriptor(thing)
        with self.charged(fd):
            self._set_xattr_upper(thing, fd, name, value, caller)

    def _set_xattr_upper(self, thing: Object, fd: int, name: bytes, value: bytes, caller: Caller) -> None:
        if name == acl.ACCESS:
            attr = self.attr(thing)
            self._upper.set_access(fd, value)
            if attr.mode & stat.S_ISGID and not _may_set_group_id(caller, attr.gid):
                self._upper.chmod(fd, self._upper.attr(fd).mode & ~stat.S_ISGID)
        else:
            self._upper.set_xattr(fd, name, value)

    def remove_xattr(self, node: Node, name: bytes) -> Steps[None]:
        thing = _thing(node)
        self.xattr(thing, name)
        yield from self.copy_up(thing)
        with self.charged(self.descriptor(thing)):
            self._upper.remove_xattr(self.descriptor(thing), name)

    # Removal

    def unlink(self, node: Node, name: bytes) -> None:
        directory = _thing(node)
        thing = self.lookup(directory, name)
        if thing.format == stat.S_IFDIR:
            raise IsADirectory("is a directory")
        self._copy_up_directory(directory)
        fd = self.descriptor(directory)
        with self._losing_name(thing, directory, name):
            if self._lower.lookup(directory.stack, name):
                self._upper.put_whiteout(fd, name, replaces=thing.in_upper)
            else:
                self._upper.remove(fd, name)
        self._lost(directory, thing)

    def rmdir(self, node: Node, name: bytes) -> None:
        directory = _thing(node)
        thing = self.lookup(directory, name)
        if thing.format != stat.S_IFDIR:
            raise NotADirectory("not a directory")
        if self.contents(thing):
            raise NotEmpty("directory not empty")
        self._copy_up_directory(directory)
        fd = self.descriptor(directory)
        has_lower = bool(self._lower.lookup(directory.stack, name))
        with self._losing_name(thing, directory, name):
            if thing.in_upper:
                self._upper.remove_directory(fd, name, leave_whiteout=has_lower)
            else:
                self._upper.put_whiteout(fd, name, replaces=False)
        self._lost(directory, thing)

    @contextlib.contextmanager
    def _losing_name(self, thing: Object, directory: Object, name: bytes) -> Iterator[None]:
        """Around the removal of a name: what the kernel knows keeps a descriptor, or has another name."""
        if thing.in_upper and (thing.lookups or self.quota is not None):
            self.descriptor(thing)
        lower = thing.stack if thing.format == stat.S_IFDIR else ()
        yield
        if lower:
            self._moved.pop(self._lower.directory_path(lower), None)
        self._descriptors.discard(thing)
        if thing.format == stat.S_IFDIR:
            thing.is_orphan = True
        else:
            self._keep_a_name(thing, directory, name)
        if thing.is_orphan:
            self._objects.pop(thing.key, None)
            if not thing.lookups and thing.fd >= 0 and self.quota is not None:
                self.quota.removed(os.fstat(thing.fd))  # else when the kernel forgets it
        elif thing.in_upper and thing.parent is not None:
            self._descriptors.used(thing)

    def _keep_a_name(self, thing: Object, directory: Object, name: bytes) -> None:
        """Of a non-directory that lost a name. Where an upper file has no other that is known, its descriptor
        must stay open.

        Not all names are tried: there may be thousands, and as many removals.
        """
        thing.lose(directory, name)
        thing.links -= thing.links > 0
        while thing.parent is not None and not self.leads_to((thing.parent, thing.name), thing):
            thing.lose(thing.parent, thing.name)
            thing.links = -1
        if thing.in_upper:
            thing.is_orphan = thing.fd < 0 or os.fstat(thing.fd).st_nlink == 0
        elif thing.parent is None:
            self.find_names(thing)
            thing.is_orphan = thing.links == 0

    # Moving

    def rename(self, node: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int) -> Steps[None]:
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE):
            raise BadInput("of the flags of renameat2(2) only NOREPLACE and EXCHANGE are known")
        old, new = _thing(node), _thing(new_parent)
        while True:
            source = self.lookup(old, name)
            target = self.child(new, new_name)
            if source is target and not flags & RENAME_NOREPLACE:
                return  # rename(2): two hard links of one file
            if flags & RENAME_EXCHANGE:
                moving = [source, self.lookup(new, new_name)]
            else:
                self._check_replaceable(source, target, flags)
                moving = [source]
            lower = [thing for thing in moving if not thing.in_upper]
            if not lower:
                break
            yield from self.copy_up(lower[0])
        self._copy_up_directory(old)
        self._copy_up_directory(new)
        if target is not None and flags & RENAME_EXCHANGE:
            self._exchange(source, old, name, target, new, new_name)
        elif target is not None:
            with self._losing_name(target, new, new_name):
                self._move(source, old, name, new, new_name, target)
        else:
            self._move(source, old, name, new, new_name, None)
        source.parent, source.name = new, new_name
        self._lost(old, source)
        self._gained(new, source)
        if target is not None:
            self._lost(new, target)
            if flags & RENAME_EXCHANGE:
                self._gained(old, target)

    def _check_replaceable(self, source: Object, target: Object | None, flags: int) -> None:
        if target is None:
            return
        if flags & RENAME_NOREPLACE:
            raise Exists("file exists")
        if target.format == stat.S_IFDIR:
            if source.format != stat.S_IFDIR:
                raise IsADirectory("is a directory")
            if self.contents(target):
                raise NotEmpty("directory not empty")
        elif source.format == stat.S_IFDIR:
            raise NotADirectory("not a directory")

    def _move(
        self, source: Object, old: Object, name: bytes, new: Object, new_name: bytes, target: Object | None
    ) -> None:
        upper = self._upper
        self._prepare_move(source, new, new_name)
        if target is not None and target.in_upper and target.format == stat.S_IFDIR:
            with self.charged(self.descriptor(target)):
                upper.clear_whiteouts(self.descriptor(target))
            target.stack = ()
        found = upper.find(self.descriptor(new), new_name)
        upper.move(
            self.descriptor(old),
            name,
            self.descriptor(new),
            new_name,
            leave_whiteout=bool(self._lower.lookup(old.stack, name)),
            over_whiteout=source.format == stat.S_IFDIR and found is not None and found.entry.is_whiteout,
        )

    def _exchange(
        self, source: Object, old: Object, name: bytes, target: Object, new: Object, new_name: bytes
    ) -> None:
        self._prepare_move(source, new, new_name)
        self._prepare_move(target, old, name)
        self._upper.exchange(self.descriptor(old), name, self.descriptor(new), new_name)
        target.parent, target.name = old, name

    def _prepare_move(self, thing: Object, new: Object, new_name: bytes) -> None:
        """Let a directory be the same wherever it is: it merges with what it merged with, or with nothing."""
        if thing.format != stat.S_IFDIR:
            return
        fd = self.descriptor(thing)
        with self.charged(fd), self.charged(self._upper.root):
            if thing.stack:
                path = self._lower.directory_path(thing.stack)
                self._upper.set_redirect(fd, b"/" + path)
                self._moved[path] = thing
            elif self._lower.lookup(new.stack, new_name):
                self._upper.set_opaque(fd)

    # Copy-up

    def copy_up(self, thing: Object, size: int | None = None) -> Steps[None]:
        """Make `thing` an object of the upper; of a file only the first `size` bytes, if given.

        What loses bytes by that is modified now.
        """
        if thing.in_upper:
            return
        if thing.format == stat.S_IFREG:
            self.begin_use()  # between its steps the tree stays open
            try:
                yield from self._copy_up_file(thing, size)
            finally:
                self.end_use()
        elif thing.is_orphan:
            attr, xattrs, target = self._copied(thing)
            self._keep_orphan(thing, self._upper.copy_nameless(attr, xattrs, target))
        elif thing.format == stat.S_IFDIR:
            self._copy_up_directory(thing)
        else:
            self._copy_up_special(thing)

    def _copy_up_file(self, thing: Object, size: int | None) -> Steps[None]:
        upper, stack = self._upper, thing.stack
        reader, extents, whole = self.content(thing)
        length = whole if size is None else min(size, whole)
        content = sum(max(0, min(extent.length, length - extent.offset)) for extent in extents)
        quota = self.quota
        if quota is not None:
            quota.require(content)
        staged, fd = upper.stage()
        if quota is not None:
            quota.used += content  # others go on while it is copied
        try:
            yield step_of(reader, lambda: _copy_content(reader, extents, length, fd))
            if thing.in_upper:
                return  # by somebody else, while the content was copied
            attr = self._lower.attr(stack)
            if length < whole:
                attr = attr._replace(mtime_ns=time.time_ns())
            upper.dress_copy(fd, attr, self._lower.xattrs(stack))
            if thing.is_orphan:
                self._keep_orphan(thing, upper.reopen(fd, os.O_PATH))
            else:
                places = self.places(thing)
                self._enter_upper(thing, places, lambda at, name: upper.publish(staged, at, name))
        finally:
            if quota is not None:
                quota.used -= content
            os.close(fd)
            with contextlib.suppress(FileNotFoundError):  # where it was published
                upper.unstage(staged)

    def _keep_orphan(self, thing: Object, fd: int) -> None:
        """`fd`, an object of the upper without a name, is what `thing` is from now on."""
        thing.fd, thing.in_upper, thing.stack = fd, True, ()
        if self.quota is not None:
            self.quota.added(os.fstat(fd))

    def _copied(self, thing: Object) -> tuple[Attr, Xattrs, bytes | None]:
        """Of a lower object what a copy of it has, but for content: attributes, xattrs, a link's target."""
        lower, stack = self._lower, thing.stack
        target = lower.target(stack) if thing.format == stat.S_IFLNK else None
        return lower.attr(stack), lower.xattrs(stack), target

    def _copy_up_special(self, thing: Object) -> None:
        upper = self._upper
        attr, xattrs, target = self._copied(thing)
        places = self.places(thing)
        self._enter_upper(thing, places, lambda at, name: upper.copy_special(at, name, attr, xattrs, target))

    def _copy_up_directory(self, thing: Object) -> None:
        """Give a directory and those above it an upper part; quick where they have one."""
        chain = []
        at: Object | None = thing
        while at is not None and not at.in_upper:
            if at.is_orphan:
                raise NotFound("no such file or directory")
            chain.append(at)
            at = at.parent
        for below in reversed(chain):
            self._copy_directory(below)

    def _copy_directory(self, thing: Object) -> None:
        upper, parent = self._upper, thing.parent
        assert parent is not None, "the root is in the upper"
        attr, xattrs, _ = self._copied(thing)
        self._enter_upper(
            thing, [(parent, thing.name)], lambda at, name: upper.copy_directory(at, name, attr, xattrs)
        )

    def _enter_upper(
        self, thing: Object, places: list[tuple[Object, bytes]], put: Callable[[int, bytes], int]
    ) -> None:
        """`put` the copy at the first of the places, link it at the others; from then on `thing` is there.

        When one of them fails, those before are taken back: a name left behind would keep the old content.
        """
        for directory, _ in places:
            self._copy_up_directory(directory)
        done: list[tuple[Object, bytes]] = []
        fd = -1
        try:
            for directory, name in places:
                with self._times_kept(directory) as at:
                    if fd < 0:
                        fd = put(at, name)
                    else:
                        self._upper.link(fd, at, name, replaces=False)
                    done.append((directory, name))
        except BaseException:
            for directory, name in done:
                with self._times_kept(directory) as at:
                    self._take_back(at, thing, name)
            if fd >= 0:
                os.close(fd)
            raise
        self._upper.set_origin(fd, thing.stack[0])
        self._objects.pop(thing.key, None)
        status = os.fstat(fd)
        if self.quota is not None:
            self.quota.added(status)
        thing.key = status.st_ino
        self._objects[thing.key] = thing
        thing.in_upper, thing.fd = True, fd
        self._inodes.outdate(thing)
        thing.settle(places)
        if thing.format != stat.S_IFDIR:
            thing.stack = ()
        for directory, _ in places:
            directory.version += 1
        self._descriptors.used(thing)

    def _take_back(self, directory: int, thing: Object, name: bytes) -> None:
        if thing.format == stat.S_IFDIR:
            self._upper.remove_directory(directory, name, leave_whiteout=False)
        else:
            self._upper.remove(directory, name)

    @contextlib.contextmanager
    def _times_kept(self, directory: Object) -> Iterator[int]:
        """Around a copy-up into a directory, whose times it does not change; its descriptor."""
        fd = self.descriptor(directory)
        before = os.fstat(fd)
        try:
            yield fd
        finally:
            self._upper.utimens(fd, before.st_atime_ns, before.st_mtime_ns)
            self._inodes.outdate(directory)

    def fsync_dir(self, node: Node) -> Steps[None]:
        thing = _thing(node)
        if thing.in_upper:
            fd = self._upper.reopen(self.descriptor(thing), os.O_RDONLY)
            try:
                yield lambda: disk.current.fsync(fd)
            finally:
                os.close(fd)


def _copy_content(reader: LayerReader, extents: Sequence[Extent], length: int, fd: int) -> None:
    """The first `length` bytes of a lower file, holes left out, to disk. Blocking, in a worker thread."""
    disk.current.truncate(fd, length)
    for extent in extents:
        end = min(extent.offset + extent.length, length)
        for offset in range(extent.offset, end, _COPY_CHUNK):
            count = min(_COPY_CHUNK, end - offset)
            data = reader.read(extent.source + offset - extent.offset, count)
            if disk.current.pwrite(fd, data, offset) != count:
                raise NoSpace("no space left for a copy in the container")
    if length:
        disk.current.fsync(fd)


def _may_set_group_id(caller: Caller, gid: int) -> bool:
    """Whether a file of group `gid` keeps its set-group-ID bit when the caller changes its permissions."""
    return caller.uid == 0 or gid == caller.gid or gid in groups_of(caller.pid)


def _thing(node: Node) -> Object:
    assert isinstance(node, Object)
    return node
