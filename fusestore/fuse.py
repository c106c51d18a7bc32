"""The FUSE protocol's side of the tree: pyfuse3's operations. Async.

A handler has three steps: decode, one call of `fusestore.tree.Tree`, encode. What the tree answers with steps
is driven here: each blocking call runs in a worker thread while the loop serves other requests
(`fusestore.inodes` says what may change in between: nothing of a step's).

The error boundary is `_bounded`: whatever a handler raises becomes an errno there, and only there. pyfuse3
ends the mount on any other exception; `trio.Cancelled` is not an Exception and passes. What is `Locked` is
tried again there for a while: so whoever raises that must have changed nothing yet.
"""

import contextlib
import errno
import functools
import logging
import os
import stat
from collections.abc import Awaitable, Callable, Sequence
from types import GeneratorType
from typing import Any, TypeVar, cast

import pyfuse3
import trio

from .acl import ACCESS
from .errors import FusestoreError, Locked, NotFound, StoreError, errno_of
from .inodes import ROOT_INODE, Caller, Changes, FileHandle, Maybe, Outward, Pending, Remote
from .meter import Meter
from .nodes import Inode
from .syscalls import is_in_user_namespace
from .tree import Entry, Tree

__all__ = ["Filesystem"]

T = TypeVar("T")
Handler = TypeVar("Handler", bound=Callable[..., Awaitable[Any]])

_THREADS = 8
"""Blocking calls at once. Most wait for the disk; decompression limits itself to the cores."""
_REMOTE_THREADS = 32
"""The same of those that wait for registries."""

_LOCKED_S = 1.0
"""How long a request waits for a container that another process has locked: a few renames take less."""

_LOCKED_PAUSE_S = 0.01

_EXECUTABLE = 0o111

_HOLD_S = 2.0
"""How long a LOOKUP waits for a rootfs to be mounted."""

_log = logging.getLogger("fusestore")


def _bounded(handler: Handler) -> Handler:
    """The error boundary around a handler, which is counted and timed there."""
    kind = handler.__name__

    @functools.wraps(handler)
    async def bounded(self: "Filesystem", *arguments: Any) -> Any:
        began = self.meter.begin(kind, arguments)
        try:
            try:
                return await handler(self, *arguments)
            except Locked:
                self.tree.rest()
                return await _when_free(handler, (self, *arguments))
        except Exception as error:
            _report(kind, error)
            number = errno_of(error)
            self.meter.failed(errno.errorcode.get(number, str(number)))
            raise pyfuse3.FUSEError(number) from None
        finally:
            self.meter.end(kind, began)
            for ino in self.tree.inodes.take_outdated():
                _outdate(ino)

    return cast(Handler, bounded)


async def _when_free(handler: Handler, arguments: tuple[Any, ...]) -> Any:
    """Call the handler again and again, as long as what it needs is locked and patience lasts."""
    give_up = trio.current_time() + _LOCKED_S
    while True:
        await trio.sleep(_LOCKED_PAUSE_S)
        try:
            return await handler(*arguments)
        except Locked:
            if trio.current_time() > give_up:
                raise


def _outdate(ino: Inode) -> None:
    """Have the kernel ask for attributes. It takes no lock for that and drops no page: the loop may wait."""
    with contextlib.suppress(FileNotFoundError):  # it does not know the inode any more
        pyfuse3.invalidate_inode(pyfuse3.InodeT(ino), attr_only=True)


def _report(operation: str, error: Exception) -> None:
    """Log what the user's errno does not tell: a line for a damaged store, a traceback for the unforeseen."""
    if isinstance(error, StoreError):
        _log.error("%s: %s", operation, error)
    elif not isinstance(error, (FusestoreError, OSError)):
        _log.error("%s failed unforeseen", operation, exc_info=error)


class Filesystem(pyfuse3.Operations):
    """One mounted tree. Requests arrive in one thread, the event loop's."""

    supports_dot_lookup = True
    enable_writeback_cache = True

    def __init__(self, tree: Tree, enable_acl: bool) -> None:
        """`enable_acl`: the kernel checks ACLs, and modes too then (fs/fuse/inode.c, FUSE_POSIX_ACL)."""
        super().__init__()
        self.enable_acl = enable_acl
        self.tree = tree
        self.meter = Meter()
        self.waiting = 0
        """Requests that wait for a worker thread now."""
        self.nursery: trio.Nursery | None = None
        """For what goes on after a request was answered."""
        self._is_in_namespace = is_in_user_namespace()
        self._limiter = trio.CapacityLimiter(_THREADS)
        self._outward = trio.CapacityLimiter(_THREADS)
        self._remote = trio.CapacityLimiter(_REMOTE_THREADS)

    async def finish(self, result: Maybe[T]) -> T:
        """The result of an operation of the tree, its steps taken in worker threads."""
        if not isinstance(result, GeneratorType):
            return cast(T, result)
        self.waiting += 1
        self.tree.rest()
        try:
            call = next(result)
            while True:
                try:
                    value = await self._step(call)
                except Exception as error:
                    call = result.throw(error)
                else:
                    call = result.send(value)
        except StopIteration as stop:
            return cast(T, stop.value)
        finally:
            self.waiting -= 1

    async def _hold(self, leading: Maybe[None]) -> None:
        """Waits until these steps are done, but not for long: who is held can do nothing else.

        They go on; what goes wrong after that is logged.
        """
        outcome: list[Exception | None] = []
        done = trio.Event()

        async def lead() -> None:
            try:
                await self.finish(leading)
            except Exception as error:
                if late.cancelled_caught:
                    _report("lookup", error)
                outcome.append(error)
            done.set()

        assert self.nursery is not None, "the mount is not served yet"
        with trio.move_on_after(_HOLD_S) as late:
            self.nursery.start_soon(lead)
            await done.wait()
        if outcome and outcome[0] is not None:
            raise outcome[0]

    async def _step(self, call: Callable[[], Any]) -> Any:
        if isinstance(call, Pending):
            done = trio.Event()
            call.when_done(done.set)
            return await done.wait()
        limiter = self._limiter
        if isinstance(call, Outward):
            limiter = self._outward
        elif isinstance(call, Remote):
            limiter = self._remote
        return await trio.to_thread.run_sync(call, limiter=limiter)

    # Names

    @_bounded
    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        await self.finish(self.tree.before_lead_in(parent_inode, name, ctx.pid))
        leading = self.tree.lead_in(parent_inode, name, ctx.pid)
        if leading is not None:
            await self._hold(leading)
        try:
            return _encode(await self.finish(self.tree.lookup(parent_inode, name)))
        except NotFound:
            timeout_s = self.tree.absence_timeout_s(parent_inode)
            if timeout_s == 0:
                raise
            return _encode_absence(timeout_s)

    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        unknown = self.tree.forget(inode_list)
        if unknown:
            _log.warning("forgotten more often than looked up: inodes %s; this is a bug", unknown)

    @_bounded
    async def readlink(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileNameT:
        return pyfuse3.FileNameT(await self.finish(self.tree.readlink(inode)))

    # Attributes

    @_bounded
    async def getattr(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return _encode(await self.finish(self.tree.getattr(inode, ctx.pid)))

    @_bounded
    async def setattr(
        self,
        inode: pyfuse3.InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: pyfuse3.FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        changes = _decode_changes(attr, fields)
        return _encode(await self.finish(self.tree.setattr(inode, changes, fh, _caller(ctx))))

    @_bounded
    async def getxattr(
        self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext
    ) -> bytes:
        return await self.finish(self.tree.getxattr(inode, name))

    @_bounded
    async def listxattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> Sequence[pyfuse3.XAttrNameT]:
        names = await self.finish(self.tree.listxattr(inode))
        may_see_all = ctx.uid == 0 and not self._is_in_namespace
        return cast(Sequence[pyfuse3.XAttrNameT], names if may_see_all else _without_trusted(names))

    @_bounded
    async def setxattr(
        self,
        inode: pyfuse3.InodeT,
        name: pyfuse3.XAttrNameT,
        value: bytes,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        await self.finish(self.tree.setxattr(inode, name, value, _caller(ctx)))
        if name == ACCESS and not self.enable_acl:
            # Otherwise the kernel looks itself what has become of the mode (fs/fuse/acl.c, fuse_set_acl).
            pyfuse3.invalidate_inode(inode, attr_only=True)

    @_bounded
    async def removexattr(
        self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext
    ) -> None:
        await self.finish(self.tree.removexattr(inode, name))

    @_bounded
    async def access(self, inode: pyfuse3.InodeT, mode: pyfuse3.ModeT, ctx: pyfuse3.RequestContext) -> bool:
        """Asked only in mounts whose modes the kernel does not check: there all but this is allowed."""
        shown = (await self.finish(self.tree.getattr(inode))).attr.mode
        return not mode & os.X_OK or stat.S_ISDIR(shown) or bool(shown & _EXECUTABLE)

    @_bounded
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        for field, value in zip(_STATVFS_FIELDS, self.tree.statfs(), strict=True):
            setattr(data, field, value)
        return data

    # Making, removing, moving

    @_bounded
    async def mknod(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        rdev: int,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        return _encode(await self.finish(self.tree.mknod(parent_inode, name, mode, rdev, _caller(ctx))))

    @_bounded
    async def mkdir(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        return _encode(await self.finish(self.tree.mkdir(parent_inode, name, mode, _caller(ctx))))

    @_bounded
    async def symlink(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        target: pyfuse3.FileNameT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        return _encode(await self.finish(self.tree.symlink(parent_inode, name, target, _caller(ctx))))

    @_bounded
    async def link(
        self,
        inode: pyfuse3.InodeT,
        new_parent_inode: pyfuse3.InodeT,
        new_name: pyfuse3.FileNameT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        return _encode(await self.finish(self.tree.link(inode, new_parent_inode, new_name)))

    @_bounded
    async def unlink(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> None:
        await self.finish(self.tree.unlink(parent_inode, name, _caller(ctx)))

    @_bounded
    async def rmdir(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> None:
        await self.finish(self.tree.rmdir(parent_inode, name))

    @_bounded
    async def rename(
        self,
        parent_inode_old: pyfuse3.InodeT,
        name_old: pyfuse3.FileNameT,
        parent_inode_new: pyfuse3.InodeT,
        name_new: pyfuse3.FileNameT,
        flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        moved = self.tree.rename(parent_inode_old, name_old, parent_inode_new, name_new, flags)
        await self.finish(moved)

    # Files

    @_bounded
    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        return _encode_open(*await self.finish(self.tree.open(inode, flags, _caller(ctx))))

    @_bounded
    async def create(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        created = self.tree.create(parent_inode, name, mode, flags, _caller(ctx))
        number, handle, entry = await self.finish(created)
        return _encode_open(number, handle), _encode(entry)

    @_bounded
    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        return await self.finish(self.tree.read(fh, off, size))

    @_bounded
    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        return await self.finish(self.tree.write(fh, off, buf))

    @_bounded
    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        await self.finish(self.tree.flush(fh))

    @_bounded
    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        await self.finish(self.tree.fsync(fh, datasync))

    @_bounded
    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        await self.finish(self.tree.release(fh))

    # Directories

    @_bounded
    async def opendir(self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        return pyfuse3.FileHandleT(await self.finish(self.tree.opendir(inode, _caller(ctx))))

    @_bounded
    async def readdir(self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        def emit(name: bytes, entry: Entry, position: int) -> bool:
            return pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), _encode(entry), position)

        await self.finish(self.tree.readdir(fh, start_id, emit))

    @_bounded
    async def fsyncdir(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        await self.finish(self.tree.fsyncdir(fh))

    @_bounded
    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        self.tree.releasedir(fh)


_STATVFS_FIELDS = (
    "f_bsize",
    "f_frsize",
    "f_blocks",
    "f_bfree",
    "f_bavail",
    "f_files",
    "f_ffree",
    "f_favail",
    "f_namemax",
)


def _without_trusted(names: list[bytes]) -> list[bytes]:
    """xattr(7): processes without CAP_SYS_ADMIN, and all in user namespaces, do not see trusted.*.

    The kernel lets them read none: overlayfs, which copies what is listed, could copy nothing up.
    """
    return [name for name in names if not name.startswith(b"trusted.")]


def _caller(ctx: pyfuse3.RequestContext) -> Caller:
    return Caller(ctx.uid, ctx.gid, ctx.pid, ctx.umask)


def _decode_changes(attr: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields) -> Changes:
    return Changes(
        mode=attr.st_mode if fields.update_mode else None,
        uid=attr.st_uid if fields.update_uid else None,
        gid=attr.st_gid if fields.update_gid else None,
        size=attr.st_size if fields.update_size else None,
        atime_ns=attr.st_atime_ns if fields.update_atime else None,
        mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
    )


def _encode(entry: Entry) -> pyfuse3.EntryAttributes:
    node, attr, is_guess = entry
    encoded = pyfuse3.EntryAttributes()
    encoded.st_ino = pyfuse3.InodeT(node.ino)
    encoded.generation = 0 if node.ino == ROOT_INODE else node.generation  # the kernel made the root itself
    encoded.entry_timeout = node.entry_timeout_s
    encoded.attr_timeout = 0.0 if is_guess else node.attr_timeout_s
    encoded.st_mode = pyfuse3.ModeT(attr.mode)
    encoded.st_nlink = attr.nlink
    encoded.st_uid = attr.uid
    encoded.st_gid = attr.gid
    encoded.st_rdev = attr.rdev
    encoded.st_size = attr.size
    encoded.st_blocks = attr.blocks
    encoded.st_atime_ns = attr.atime_ns
    encoded.st_mtime_ns = attr.mtime_ns
    encoded.st_ctime_ns = attr.ctime_ns
    return encoded


def _encode_absence(timeout_s: float) -> pyfuse3.EntryAttributes:
    """An entry with inode 0: the kernel remembers that the name is missing (fuse_lowlevel.h)."""
    encoded = pyfuse3.EntryAttributes()
    encoded.st_ino = pyfuse3.InodeT(0)
    encoded.entry_timeout = timeout_s
    return encoded


def _encode_open(number: int, handle: FileHandle) -> pyfuse3.FileInfo:
    return pyfuse3.FileInfo(
        fh=pyfuse3.FileHandleT(number), direct_io=handle.direct_io, keep_cache=handle.keep_cache
    )
