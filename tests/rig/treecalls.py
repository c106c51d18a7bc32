"""System calls by path on two trees that are not mounted. Blocking.

`FakeKernel` makes them on a `WritableRootfs` as the kernel does over FUSE: it keeps what it looked up, counts
the lookups, refuses by itself what the VFS refuses (fs/namei.c), and forgets when it is told to. `RealTree`
makes the same calls in a real directory. Both, and `rig.dictmodel.TreeModel`, have the same methods: paths
are relative to the root, no symbolic link is followed, errors are OSError.
"""

import contextlib
import errno
import hashlib
import os
import stat
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from rig.dictmodel import Thing, TreeModel
from rig.layers import Layer
from rig.requirements import need
from rig.snapshot import TYPES, Entry, Snapshot, snapshot

from fusestore.errors import FusestoreError, errno_of
from fusestore.inodes import Branch, Caller, Changes, FileHandle, Inodes, Maybe, Node, run
from fusestore.nodes import Attr, Inode, Xattrs
from fusestore.objects import Descriptors
from fusestore.quota import usage
from fusestore.rootfs import Opened
from fusestore.scheme import Scheme
from fusestore.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, renameat2
from fusestore.union import Lower
from fusestore.upper import Upper
from fusestore.writable import WritableRootfs

__all__ = ["CALLER", "Area", "FakeKernel", "RealTree", "errno_from"]

T = TypeVar("T")

CALLER = Caller(uid=0, gid=0, pid=1, umask=0)
_NEVER_REACHED = 1 << 60
_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def errno_from(call: Callable[..., object], *arguments: object) -> int:
    """0, or the errno the call fails with."""
    try:
        call(*arguments)
    except OSError as error:
        assert error.errno, f"{call} raised {error!r}"
        return error.errno
    return 0


class _Hold:
    def close(self) -> None:
        pass


class Area:
    """An upper directory on disk and its scratch; a rootfs over it can be opened again and again."""

    def __init__(self, layers: Sequence[Layer], scheme: Scheme = Scheme.NATIVE, capacity: int = 1000) -> None:
        need("root", os.geteuid() == 0, "run the tests as root to have owners and devices in a tree")
        self._directory = tempfile.TemporaryDirectory(dir=os.environ.get("FUSESTORE_TEST_TMP", "/var/tmp"))
        self.path = Path(self._directory.name)
        self.layers = layers
        self.scheme = scheme
        self.capacity = capacity
        (self.path / "scratch").mkdir()
        self._home = os.open(self.path, os.O_RDONLY)
        self._scratch = os.open(self.path / "scratch", os.O_RDONLY)
        lower = Lower([layer.index for layer in layers])
        if lower.root:
            home = Upper(self._home, self._scratch, scheme)
            attr, xattrs = lower.attr(lower.root), lower.xattrs(lower.root)
            os.close(home.copy_directory(self._home, b"diff", attr, xattrs))
        else:
            self.diff.mkdir()

    @property
    def diff(self) -> Path:
        return self.path / "diff"

    def close(self) -> None:
        os.close(self._home)
        os.close(self._scratch)
        self._directory.cleanup()

    def open(self) -> Opened:
        """The `Opener` of a rootfs."""
        root = os.open(self.diff, _PATH)
        lower = Lower([layer.index for layer in self.layers])
        readers: Sequence[Any] = [layer.reader for layer in self.layers]
        upper = Upper(root, self._scratch, self.scheme)
        return Opened(lower, readers, upper, lambda: os.close(root), upper.moved())

    def peek(self) -> Attr:
        raise AssertionError("the rootfs is prepared")

    def peek_xattrs(self) -> Xattrs:
        raise AssertionError("the rootfs is prepared")

    def hold(self) -> _Hold:
        return _Hold()

    def kernel(self) -> "FakeKernel":
        """A rootfs over the upper as it is now, and a kernel that knows nothing of it yet."""
        inodes = Inodes()
        outer = Node(Branch(), Inode(1))
        rootfs = WritableRootfs(inodes, Descriptors(self.capacity), 0, outer, self)
        rootfs.set_quota(_NEVER_REACHED)
        run(rootfs.prepare())
        return FakeKernel(rootfs, inodes)


class _Dentry:
    """A name the kernel knows. Each is one lookup of its node."""

    __slots__ = ("children", "node")

    def __init__(self, node: Any) -> None:
        self.node = node
        self.children: dict[bytes, _Dentry] = {}

    @property
    def format(self) -> int:
        return stat.S_IFMT(self.node.branch.attr(self.node).mode)


def _settle(start: Callable[[], Maybe[T]]) -> T:
    """What a call comes to, its errors as the kernel sees them."""
    try:
        return run(start())
    except FusestoreError as error:
        raise OSError(errno_of(error), str(error)) from None


class FakeKernel:
    """See the module's docstring."""

    def __init__(self, rootfs: WritableRootfs, inodes: Inodes) -> None:
        self.rootfs = rootfs
        self._inodes = inodes
        self._root = _Dentry(rootfs.root)
        inodes.remember(rootfs.root)
        self._handles: dict[int, FileHandle] = {}

    # What the kernel knows

    def _enter(self, parent: _Dentry, name: bytes, node: Node) -> _Dentry:
        self._inodes.remember(node)
        assert self._inodes.node(node.ino) is node, "two nodes have one inode number"
        child = parent.children[name] = _Dentry(node)
        return child

    def _drop(self, dentry: _Dentry) -> None:
        for child in dentry.children.values():
            self._drop(child)
        dentry.children.clear()
        self._inodes.forget(dentry.node.ino, 1)

    def forget(self) -> None:
        """Forget all but the root and what is open, and so much else that no node of it lives on."""
        for child in self._root.children.values():
            self._drop(child)
        self._root.children.clear()
        self._inodes._forgotten.clear()

    def forget_one(self, path: bytes) -> None:
        """Forget the name `path` and all below it, if it is known; nodes live on."""
        dentry: _Dentry | None = self._root
        *above, name = path.split(b"/")
        for step in above:
            dentry = dentry and dentry.children.get(step)
        if dentry and name in dentry.children:
            self._drop(dentry.children.pop(name))

    def exhaust(self) -> None:
        """Have all descriptors closed that may be: as if many others had been used."""
        for thing in list(self.rootfs._descriptors._open):
            self.rootfs._close_descriptor(thing)

    def detach(self) -> None:
        """Close what is open, forget the tree and let go of the upper. What it takes was counted right."""
        for slot in list(self._handles):
            self.release(slot)
        self.forget()
        if self.rootfs.attached:
            quota = self.rootfs.quota
            assert quota is not None and quota.used == usage(self.rootfs.root.fd)
        self.rootfs.detach()

    def _child(self, parent: _Dentry, name: bytes) -> _Dentry | None:
        known = parent.children.get(name)
        if known is not None:
            return known
        try:
            return self._enter(parent, name, _settle(lambda: self.rootfs.lookup(parent.node, name)))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise

    def _at(self, path: bytes) -> _Dentry:
        dentry: _Dentry | None = self._root
        for name in path.split(b"/"):
            if name in (b"", b"."):
                continue
            assert dentry is not None
            if dentry.format != stat.S_IFDIR:
                raise OSError(errno.ENOTDIR, path)
            dentry = self._child(dentry, name)
            if dentry is None:
                raise OSError(errno.ENOENT, path)
        assert dentry is not None
        return dentry

    def _parent(self, path: bytes) -> tuple[_Dentry, bytes]:
        parent = self._at(os.path.dirname(path))
        if parent.format != stat.S_IFDIR:
            raise OSError(errno.ENOTDIR, path)
        return parent, os.path.basename(path)

    def _vacant(self, path: bytes) -> tuple[_Dentry, bytes]:
        parent, name = self._parent(path)
        if self._child(parent, name) is not None:
            raise OSError(errno.EEXIST, path)
        return parent, name

    def node(self, path: bytes) -> Any:
        return self._at(path).node

    def snapshot(self) -> Snapshot:
        """The tree, each name looked up and listed anew; what was known must still be the same node."""
        found: dict[int, list[tuple[bytes, Entry]]] = {}
        for path, node in self._walk(self._root, b""):
            found.setdefault(node.ino, []).append((path, self._entry(node)))
        result: Snapshot = {}
        for names in found.values():
            group = min(path for path, _ in names) if len(names) > 1 else None
            result.update((path, replace(entry, group=group)) for path, entry in names)
        return result

    def _walk(self, dentry: _Dentry, prefix: bytes) -> Iterator[tuple[bytes, Any]]:
        yield prefix.rstrip(b"/") or b".", dentry.node
        if dentry.format != stat.S_IFDIR:
            return
        listing = _settle(lambda: self.rootfs.listing(dentry.node))
        names = [name for name, _ in listing]
        assert len(names) == len(set(names)), f"a name is listed twice: {names}"
        assert dentry.children.keys() <= set(names), f"known and not listed: {dentry.children.keys()}"
        for name, token in listing:
            known = dentry.children.get(name)
            listed = self.rootfs.listed(dentry.node, name, token)
            looked_up = self.rootfs.lookup(dentry.node, name)
            assert listed is looked_up, f"{prefix + name!r}: listing and lookup disagree"
            assert known is None or known.node is looked_up, f"{prefix + name!r}: another node than before"
            child = known or self._enter(dentry, name, looked_up)
            if child.format == stat.S_IFDIR:
                assert self.rootfs.parent(child.node) is dentry.node, f"{prefix + name!r}: wrong .."
            yield from self._walk(child, prefix + name + b"/")

    def _entry(self, node: Any) -> Entry:
        rootfs = self.rootfs
        attr = rootfs.attr(node)
        format = stat.S_IFMT(attr.mode)
        for name, value in rootfs.xattrs(node):
            assert rootfs.xattr(node, name) == value
        return Entry(
            type=TYPES[format],
            mode=stat.S_IMODE(attr.mode),
            uid=attr.uid,
            gid=attr.gid,
            size=None if format == stat.S_IFDIR else attr.size,
            mtime_ns=attr.mtime_ns,
            rdev=attr.rdev,
            nlink=attr.nlink,
            group=None,
            target=rootfs.readlink(node) if format == stat.S_IFLNK else None,
            xattrs=tuple(sorted((os.fsdecode(name), value) for name, value in rootfs.xattrs(node))),
            sha256=hashlib.sha256(self._content(node)).hexdigest() if format == stat.S_IFREG else None,
        )

    def _content(self, node: Node) -> bytes:
        handle = self._open(node, os.O_RDONLY)
        try:
            return self._read_all(handle)
        finally:
            _settle(lambda: handle.close())

    def _open(self, node: Node, flags: int) -> FileHandle:
        return _settle(lambda: self.rootfs.open(node, flags, CALLER))

    def _read_all(self, handle: FileHandle) -> bytes:
        size = self.rootfs.attr(handle.node).size
        data = _settle(lambda: handle.read(0, size + 1))
        tail = size // 2
        assert _settle(lambda: handle.read(tail, size)) == data[tail:]
        return data

    # Making

    def create(self, path: bytes, mode: int, data: bytes) -> None:
        parent, name = self._vacant(path)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        node, handle = _settle(
            lambda: self.rootfs.create(parent.node, name, stat.S_IFREG | mode, flags, CALLER)
        )
        self._enter(parent, name, node)
        self._write_and_close(handle, 0, data)

    def _write_and_close(self, handle: FileHandle, offset: int, data: bytes) -> None:
        try:
            self._write(handle, offset, data)
        finally:
            _settle(lambda: handle.close())

    def _write(self, handle: FileHandle, offset: int, data: bytes) -> None:
        """With the writeback cache the kernel says when it was (fs/fuse/inode.c, fuse_write_inode)."""
        if data:
            assert _settle(lambda: handle.write(offset, data)) == len(data)
            self._change(handle.node, Changes(mtime_ns=time.time_ns()))

    def mkdir(self, path: bytes, mode: int) -> None:
        parent, name = self._vacant(path)
        mode &= 0o1777  # fs/namei.c, vfs_mkdir
        self._enter(parent, name, _settle(lambda: self.rootfs.mkdir(parent.node, name, mode, CALLER)))

    def mknod(self, path: bytes, format: int, mode: int, rdev: int) -> None:
        parent, name = self._vacant(path)
        made = _settle(lambda: self.rootfs.mknod(parent.node, name, format | mode, rdev, CALLER))
        self._enter(parent, name, made)

    def symlink(self, path: bytes, target: bytes) -> None:
        parent, name = self._vacant(path)
        self._enter(parent, name, _settle(lambda: self.rootfs.symlink(parent.node, name, target, CALLER)))

    def link(self, path: bytes, new_path: bytes) -> None:
        thing = self._at(path)
        parent, name = self._vacant(new_path)
        if thing.format == stat.S_IFDIR:
            raise OSError(errno.EPERM, path)
        linked = _settle(lambda: self.rootfs.link(thing.node, parent.node, name))
        assert linked is thing.node
        self._enter(parent, name, linked)

    # Removing, moving

    def unlink(self, path: bytes) -> None:
        parent, name = self._parent(path)
        if self._at(path).format == stat.S_IFDIR:
            raise OSError(errno.EISDIR, path)
        _settle(lambda: self.rootfs.unlink(parent.node, name))
        self._drop(parent.children.pop(name))

    def rmdir(self, path: bytes) -> None:
        parent, name = self._parent(path)
        if self._at(path).format != stat.S_IFDIR:
            raise OSError(errno.ENOTDIR, path)
        _settle(lambda: self.rootfs.rmdir(parent.node, name))
        self._drop(parent.children.pop(name))

    def rename(self, path: bytes, new_path: bytes, flags: int) -> None:
        old, name = self._parent(path)
        new, new_name = self._parent(new_path)
        source, target = self._at(path), self._child(new, new_name)
        _refuse_rename(path, new_path, target is not None, flags)
        if target is not None and source.node is target.node:
            return
        if target is not None and not flags & RENAME_EXCHANGE:
            if source.format == stat.S_IFDIR != target.format:
                raise OSError(errno.ENOTDIR, new_path)
            if target.format == stat.S_IFDIR != source.format:
                raise OSError(errno.EISDIR, new_path)
        _settle(lambda: self.rootfs.rename(old.node, name, new.node, new_name, flags))
        del old.children[name]
        if target is not None:
            del new.children[new_name]
            if flags & RENAME_EXCHANGE:
                old.children[name] = target
            else:
                self._drop(target)
        new.children[new_name] = source

    # Content

    def _file(self, path: bytes) -> _Dentry:
        return self._openable(self._at(path))

    @staticmethod
    def _openable(dentry: _Dentry) -> _Dentry:
        if dentry.format != stat.S_IFREG:
            raise OSError(_not_openable(dentry.format), "not a regular file")
        return dentry

    def write(self, path: bytes, offset: int, data: bytes) -> None:
        self._write_and_close(self._open(self._file(path).node, os.O_WRONLY), offset, data)

    def overwrite(self, path: bytes, data: bytes) -> None:
        self._write_and_close(self._open(self._file(path).node, os.O_WRONLY | os.O_TRUNC), 0, data)

    def truncate(self, path: bytes, size: int) -> None:
        self._change(self._file(path).node, Changes(size=size))

    # Open files. Each handle keeps its node known.

    def hold(self, slot: int, path: bytes, writable: bool) -> None:
        node = self._file(path).node
        self._handles[slot] = self._open(node, os.O_RDWR if writable else os.O_RDONLY)
        self._inodes.remember(node)

    def held(self, slot: int) -> tuple[int, bytes]:
        handle = self._handles[slot]
        return self.rootfs.attr(handle.node).nlink, self._read_all(handle)

    def held_write(self, slot: int, offset: int, data: bytes) -> None:
        self._write(self._handles[slot], offset, data)

    def held_truncate(self, slot: int, size: int) -> None:
        _settle(lambda: self._handles[slot].truncate(size))

    def held_chmod(self, slot: int, mode: int) -> None:
        self._change(self._handles[slot].node, Changes(mode=mode))

    def release(self, slot: int) -> None:
        handle = self._handles.pop(slot)
        _settle(lambda: handle.close())
        self._inodes.forget(handle.node.ino, 1)

    # Attributes

    def _change(self, node: Node, changes: Changes) -> None:
        _settle(lambda: self.rootfs.setattr(node, changes, CALLER))

    def chmod(self, path: bytes, mode: int) -> None:
        dentry = self._at(path)
        if dentry.format == stat.S_IFLNK:
            raise OSError(errno.EOPNOTSUPP, path)
        self._change(dentry.node, Changes(mode=mode))

    def chown(self, path: bytes, uid: int, gid: int) -> None:
        node = self._at(path).node
        mode: int | None = self.rootfs.attr(node).mode
        assert mode is not None
        kept = mode & ~stat.S_ISUID
        if mode & stat.S_IXGRP:
            kept &= ~stat.S_ISGID
        if stat.S_ISDIR(mode) or kept == mode:
            mode = None
        else:  # fs/fuse/dir.c, fuse_setattr: without FUSE_HANDLE_KILLPRIV the kernel sends the new mode
            mode = kept
        self._change(node, Changes(uid=uid, gid=gid, mode=mode))

    def utimens(self, path: bytes, mtime_ns: int) -> None:
        self._change(self._at(path).node, Changes(atime_ns=mtime_ns, mtime_ns=mtime_ns))

    def set_xattr(self, path: bytes, name: bytes, value: bytes) -> None:
        dentry = self._user_xattr(path, name)
        _settle(lambda: self.rootfs.set_xattr(dentry.node, name, value, CALLER))

    def remove_xattr(self, path: bytes, name: bytes) -> None:
        dentry = self._user_xattr(path, name)
        _settle(lambda: self.rootfs.remove_xattr(dentry.node, name))

    def _user_xattr(self, path: bytes, name: bytes) -> _Dentry:
        dentry = self._at(path)
        if name.startswith(b"user.") and dentry.format not in (stat.S_IFREG, stat.S_IFDIR):
            raise OSError(errno.EPERM, path)  # fs/xattr.c, xattr_permission
        return dentry


def _not_openable(format: int) -> int:
    return {stat.S_IFDIR: errno.EISDIR, stat.S_IFLNK: errno.ELOOP}.get(format, errno.ENXIO)


def _refuse_rename(path: bytes, new_path: bytes, target_exists: bool, flags: int) -> None:
    """What do_renameat2 in fs/namei.c refuses, in its order."""
    if target_exists and flags & RENAME_NOREPLACE:
        raise OSError(errno.EEXIST, new_path)
    if not target_exists and flags & RENAME_EXCHANGE:
        raise OSError(errno.ENOENT, new_path)
    if new_path.startswith(path + b"/"):
        raise OSError(errno.EINVAL, new_path)
    if path.startswith(new_path + b"/"):
        raise OSError(errno.EINVAL if flags & RENAME_EXCHANGE else errno.ENOTEMPTY, new_path)


class RealTree:
    """A directory of a real file system. Root only."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._handles: dict[int, int] = {}

    @classmethod
    def made(cls, path: Path, model: TreeModel) -> "RealTree":
        """A new directory with what `model` has."""
        path.mkdir()
        tree = cls(path)
        names: dict[Thing, bytes] = {}
        for name, thing in model.walk():
            if thing in names:
                tree.link(names[thing], name)
            else:
                tree._put(name, thing)
                names[thing] = name
        for thing, name in reversed(names.items()):
            tree.utimens(name, thing.mtime_ns)
        return tree

    def _put(self, path: bytes, thing: Thing) -> None:
        if thing.format == stat.S_IFLNK:
            self.symlink(path, thing.target)
        elif thing.format != stat.S_IFDIR:
            self.mknod(path, thing.format, 0o600, thing.rdev)
        elif path != b".":
            self.mkdir(path, 0o700)
        if thing.content:
            self.write(path, 0, thing.content)
        self.chown(path, thing.uid, thing.gid)
        if thing.format != stat.S_IFLNK:
            self.chmod(path, thing.mode)
        for name, value in thing.xattrs.items():
            self.set_xattr(path, name, value)

    def close(self) -> None:
        for fd in (*self._handles.values(), self._root):
            os.close(fd)

    def snapshot(self) -> Snapshot:
        """Groups of one name are none, whatever nlink says: overlayfs counts hidden names, too."""
        found = snapshot(self._path)
        sizes = Counter(entry.group for entry in found.values())
        return {
            path: replace(entry, group=None) if sizes[entry.group] == 1 else entry
            for path, entry in found.items()
        }

    @contextlib.contextmanager
    def _parent(self, path: bytes) -> Iterator[tuple[int, bytes]]:
        """A descriptor of the directory, no link followed on the way, and the name."""
        fd = os.dup(self._root)
        try:
            for name in filter(None, os.path.dirname(path).split(b"/")):
                below = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
                os.close(fd)
                fd = below
            yield fd, os.path.basename(path) or b"."
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _opened(self, path: bytes, flags: int) -> Iterator[int]:
        with self._parent(path) as (parent, name):
            format = stat.S_IFMT(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
            if format != stat.S_IFREG:
                raise OSError(_not_openable(format), path)
            fd = os.open(name, flags | os.O_NOFOLLOW, dir_fd=parent)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _at(self, path: bytes) -> Iterator[bytes]:
        """A path that leads to the object itself, a link too."""
        with self._parent(path) as (parent, name):
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=parent)
            try:
                yield b"/proc/self/fd/%d" % fd
            finally:
                os.close(fd)

    def create(self, path: bytes, mode: int, data: bytes) -> None:
        with self._parent(path) as (parent, name):
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode, dir_fd=parent)
            os.write(fd, data)
            os.close(fd)

    def mkdir(self, path: bytes, mode: int) -> None:
        with self._parent(path) as (parent, name):
            os.mkdir(name, mode, dir_fd=parent)

    def mknod(self, path: bytes, format: int, mode: int, rdev: int) -> None:
        with self._parent(path) as (parent, name):
            os.mknod(name, format | mode, rdev, dir_fd=parent)

    def symlink(self, path: bytes, target: bytes) -> None:
        with self._parent(path) as (parent, name):
            os.symlink(target, name, dir_fd=parent)

    def link(self, path: bytes, new_path: bytes) -> None:
        with self._at(path) as at, self._parent(new_path) as (new, new_name):
            os.link(at, new_name, dst_dir_fd=new, follow_symlinks=True)

    def unlink(self, path: bytes) -> None:
        with self._parent(path) as (parent, name):
            os.unlink(name, dir_fd=parent)

    def rmdir(self, path: bytes) -> None:
        with self._parent(path) as (parent, name):
            os.rmdir(name, dir_fd=parent)

    def rename(self, path: bytes, new_path: bytes, flags: int) -> None:
        with self._parent(path) as (old, name), self._parent(new_path) as (new, new_name):
            renameat2(old, name, new, new_name, flags)

    def write(self, path: bytes, offset: int, data: bytes) -> None:
        with self._opened(path, os.O_WRONLY) as fd:
            os.pwrite(fd, data, offset)

    def overwrite(self, path: bytes, data: bytes) -> None:
        with self._opened(path, os.O_WRONLY | os.O_TRUNC) as fd:
            os.pwrite(fd, data, 0)

    def truncate(self, path: bytes, size: int) -> None:
        with self._opened(path, os.O_WRONLY) as fd:
            os.truncate(b"/proc/self/fd/%d" % fd, size)  # unlike ftruncate(2) it leaves mtime with the size

    def hold(self, slot: int, path: bytes, writable: bool) -> None:
        with self._opened(path, os.O_RDWR if writable else os.O_RDONLY) as fd:
            self._handles[slot] = os.dup(fd)

    def held(self, slot: int) -> tuple[int, bytes]:
        status = os.fstat(self._handles[slot])
        return status.st_nlink, os.pread(self._handles[slot], status.st_size + 1, 0)

    def held_write(self, slot: int, offset: int, data: bytes) -> None:
        os.pwrite(self._handles[slot], data, offset)

    def held_truncate(self, slot: int, size: int) -> None:
        os.ftruncate(self._handles[slot], size)

    def held_chmod(self, slot: int, mode: int) -> None:
        os.fchmod(self._handles[slot], mode)

    def release(self, slot: int) -> None:
        os.close(self._handles.pop(slot))

    def chmod(self, path: bytes, mode: int) -> None:
        with self._at(path) as at:
            if stat.S_ISLNK(os.stat(at).st_mode):
                raise OSError(errno.EOPNOTSUPP, path)
            os.chmod(at, mode)

    def chown(self, path: bytes, uid: int, gid: int) -> None:
        with self._at(path) as at:
            os.chown(at, uid, gid)

    def utimens(self, path: bytes, mtime_ns: int) -> None:
        with self._at(path) as at:
            os.utime(at, ns=(mtime_ns, mtime_ns))

    def set_xattr(self, path: bytes, name: bytes, value: bytes) -> None:
        with self._at(path) as at:
            os.setxattr(at, name, value)

    def remove_xattr(self, path: bytes, name: bytes) -> None:
        with self._at(path) as at:
            os.removexattr(at, name)
