"""The reference for trees under change: a file system of dicts, and how layers are unpacked into it. Pure.

Written from POSIX, overlayfs.rst and the OCI layer specification, not from the union. Calls are those of
`rig.treecalls`: paths relative to the root, no symbolic link followed, errors as OSError in Linux's order.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from rig.layers import Member
from rig.snapshot import TYPES, Entry, Snapshot

from fusestore.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE

__all__ = ["ANY", "FRESH", "Thing", "TreeModel", "presence", "settled"]

FRESH = -1
"""An mtime that is the present: later than anything in an image."""
ANY = -2
"""An mtime that the rules leave open."""
_PRESENT_NS = 1_700_000_000 * 10**9


@dataclass(eq=False, slots=True)
class Thing:
    """An inode. A directory has `children`."""

    format: int
    mode: int
    uid: int
    gid: int
    rdev: int = 0
    content: bytearray = field(default_factory=bytearray)
    target: bytes = b""
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    mtime_ns: int = FRESH
    children: dict[bytes, "Thing"] = field(default_factory=dict)

    @property
    def is_directory(self) -> bool:
        return self.format == stat.S_IFDIR


def _directory(mode: int = 0o755, mtime_ns: int = 0) -> Thing:
    return Thing(stat.S_IFDIR, mode, 0, 0, mtime_ns=mtime_ns)


def settled(expected: Snapshot, found: Snapshot) -> Snapshot:
    """`expected`, with what `found` has where the model says FRESH or ANY, and `found` is such."""
    result = dict(expected)
    for path, entry in expected.items():
        seen = found.get(path)
        if seen and (entry.mtime_ns == ANY or (entry.mtime_ns == FRESH and seen.mtime_ns > _PRESENT_NS)):
            result[path] = replace(entry, mtime_ns=seen.mtime_ns)
    return result


def presence(tree: Snapshot) -> Snapshot:
    """`tree` with FRESH for every time that is the present: what two trees of one age have in common."""
    return {
        path: replace(entry, mtime_ns=FRESH) if entry.mtime_ns > _PRESENT_NS else entry
        for path, entry in tree.items()
    }


class TreeModel:
    """One tree. `keeps_owners` of links, FIFOs and sockets: a plain user's store cannot."""

    def __init__(self, layers: Sequence[Sequence[Member]] = (), keeps_owners: bool = True) -> None:
        self.root = _directory()
        self.keeps_owners = keeps_owners
        self.handles: dict[int, Thing] = {}
        for members in layers:
            self._unpack(members)

    # Layers

    def _unpack(self, members: Sequence[Member]) -> None:
        here = {member.path for member in members}
        from_below = {
            member.path: self.at(member.link)
            for member in members
            if member.type == b"1" and member.link not in here
        }
        markers = [member for member in members if os.path.basename(member.path).startswith(b".wh.")]
        for marker in markers:
            self._mark(marker.path)
        for member in sorted(members, key=lambda member: member.path.count(b"/")):
            if member in markers:
                self._implied(os.path.dirname(member.path))
            elif member.type != b"1":
                self._place(member)
        for member in members:
            if member.type == b"1":
                thing = from_below[member.path] if member.path in from_below else self.at(member.link)
                self._implied(os.path.dirname(member.path)).children[os.path.basename(member.path)] = thing

    def _mark(self, path: bytes) -> None:
        """Do what a whiteout or an opaque marker does to what was there before."""
        head, name = os.path.split(path)
        try:
            parent = self.at(head)
        except OSError:
            return
        if parent.is_directory:
            if name == b".wh..wh..opq":
                parent.children.clear()
            else:
                parent.children.pop(name.removeprefix(b".wh."), None)

    def _implied(self, path: bytes) -> Thing:
        """The directory at `path`, made where something else or nothing is."""
        at = self.root
        for name in _split(path):
            child = at.children.get(name)
            if child is None or not child.is_directory:
                child = at.children[name] = _directory()
            at = child
        return at

    def _place(self, member: Member) -> None:
        if not _split(member.path):
            thing = self.root
        else:
            parent = self._implied(os.path.dirname(member.path))
            name = os.path.basename(member.path)
            before = parent.children.get(name)
            if before is None or not before.is_directory or member.type != b"5":
                before = parent.children[name] = Thing(member.format, 0, 0, 0)
            thing = before
        thing.mode, thing.uid, thing.gid, thing.rdev = member.mode, member.uid, member.gid, member.rdev
        thing.content, thing.target = bytearray(member.content), member.link
        thing.xattrs, thing.mtime_ns = dict(member.xattrs), member.mtime_ns

    # Looking

    def at(self, path: bytes) -> Thing:
        at = self.root
        for name in _split(path):
            if not at.is_directory:
                raise OSError(errno.ENOTDIR, path)
            if name not in at.children:
                raise OSError(errno.ENOENT, path)
            at = at.children[name]
        return at

    def _parent(self, path: bytes) -> tuple[Thing, bytes]:
        parent = self.at(os.path.dirname(path))
        if not parent.is_directory:
            raise OSError(errno.ENOTDIR, path)
        return parent, os.path.basename(path)

    def walk(self) -> Iterator[tuple[bytes, Thing]]:
        """Every path and what is there, the root as b"."."""
        yield b".", self.root
        waiting = [(b"", self.root)]
        while waiting:
            prefix, directory = waiting.pop()
            for name, thing in directory.children.items():
                yield prefix + name, thing
                if thing.is_directory:
                    waiting.append((prefix + name + b"/", thing))

    def snapshot(self) -> Snapshot:
        names: dict[Thing, list[bytes]] = {}
        for path, thing in self.walk():
            names.setdefault(thing, []).append(path)
        return {path: self._entry(thing, paths) for thing, paths in names.items() for path in paths}

    def _entry(self, thing: Thing, paths: list[bytes]) -> Entry:
        is_file, is_link = thing.format == stat.S_IFREG, thing.format == stat.S_IFLNK
        subdirectories = sum(child.is_directory for child in thing.children.values())
        return Entry(
            type=TYPES[thing.format],
            mode=0o777 if is_link else thing.mode,
            uid=thing.uid,
            gid=thing.gid,
            size=None if thing.is_directory else len(thing.content) if is_file else len(thing.target),
            mtime_ns=thing.mtime_ns,
            rdev=thing.rdev,
            nlink=2 + subdirectories if thing.is_directory else len(paths),
            group=min(paths) if len(paths) > 1 else None,
            target=thing.target if is_link else None,
            xattrs=tuple(sorted((os.fsdecode(key), value) for key, value in thing.xattrs.items())),
            sha256=hashlib.sha256(thing.content).hexdigest() if is_file else None,
        )

    # Making

    def create(self, path: bytes, mode: int, data: bytes) -> None:
        self._make(path, Thing(stat.S_IFREG, mode, 0, 0, content=bytearray(data)))

    def mkdir(self, path: bytes, mode: int) -> None:
        self._make(path, Thing(stat.S_IFDIR, mode & 0o1777, 0, 0))

    def mknod(self, path: bytes, format: int, mode: int, rdev: int) -> None:
        self._make(path, Thing(format, mode, 0, 0, rdev=rdev))

    def symlink(self, path: bytes, target: bytes) -> None:
        self._make(path, Thing(stat.S_IFLNK, 0o777, 0, 0, target=target))

    def _make(self, path: bytes, thing: Thing) -> None:
        parent, name = self._parent(path)
        if name in parent.children:
            raise OSError(errno.EEXIST, path)
        if parent.mode & stat.S_ISGID:
            thing.gid = parent.gid
            if thing.is_directory:
                thing.mode |= stat.S_ISGID
        parent.children[name] = thing
        parent.mtime_ns = FRESH

    def link(self, path: bytes, new_path: bytes) -> None:
        thing = self.at(path)
        parent, name = self._parent(new_path)
        if name in parent.children:
            raise OSError(errno.EEXIST, new_path)
        if thing.is_directory:
            raise OSError(errno.EPERM, path)
        parent.children[name] = thing
        parent.mtime_ns = FRESH

    # Removing, moving

    def unlink(self, path: bytes) -> None:
        parent, name = self._parent(path)
        if self.at(path).is_directory:
            raise OSError(errno.EISDIR, path)
        del parent.children[name]
        parent.mtime_ns = FRESH

    def rmdir(self, path: bytes) -> None:
        parent, name = self._parent(path)
        thing = self.at(path)
        if not thing.is_directory:
            raise OSError(errno.ENOTDIR, path)
        if thing.children:
            raise OSError(errno.ENOTEMPTY, path)
        del parent.children[name]
        parent.mtime_ns = FRESH

    def rename(self, path: bytes, new_path: bytes, flags: int) -> None:
        old, name = self._parent(path)
        new, new_name = self._parent(new_path)
        source = self.at(path)
        target = new.children.get(new_name)
        if target is not None and flags & RENAME_NOREPLACE:
            raise OSError(errno.EEXIST, new_path)
        if target is None and flags & RENAME_EXCHANGE:
            raise OSError(errno.ENOENT, new_path)
        if _is_within(new_path, path) and new_path != path:
            raise OSError(errno.EINVAL, new_path)
        if _is_within(path, new_path) and new_path != path:
            raise OSError(errno.EINVAL if flags & RENAME_EXCHANGE else errno.ENOTEMPTY, new_path)
        if source is target:
            return
        if target is not None and flags & RENAME_EXCHANGE:
            old.children[name] = target
        else:
            if target is not None:
                _check_replaceable(source, target, new_path)
            del old.children[name]
        new.children[new_name] = source
        old.mtime_ns = new.mtime_ns = FRESH

    # Content

    def _file(self, path: bytes) -> Thing:
        return self.openable(self.at(path))

    @staticmethod
    def openable(thing: Thing) -> Thing:
        if thing.format != stat.S_IFREG:
            refusals = {stat.S_IFDIR: errno.EISDIR, stat.S_IFLNK: errno.ELOOP}
            raise OSError(refusals.get(thing.format, errno.ENXIO), "not a regular file")
        return thing

    def write(self, path: bytes, offset: int, data: bytes) -> None:
        self.put(self._file(path), offset, data)

    def overwrite(self, path: bytes, data: bytes) -> None:
        thing = self._file(path)
        self.resize(thing, 0)
        thing.mtime_ns = FRESH
        self.put(thing, 0, data)

    def truncate(self, path: bytes, size: int) -> None:
        self.resize(self._file(path), size)

    @staticmethod
    def put(thing: Thing, offset: int, data: bytes) -> None:
        if data:
            thing.content.extend(bytes(max(0, offset - len(thing.content))))
            thing.content[offset : offset + len(data)] = data
            thing.mtime_ns = FRESH

    @staticmethod
    def resize(thing: Thing, size: int) -> None:
        thing.mtime_ns = FRESH if size != len(thing.content) else ANY
        del thing.content[size:]
        thing.content.extend(bytes(size - len(thing.content)))

    # Open files

    def hold(self, slot: int, path: bytes, writable: bool) -> None:
        self.handles[slot] = self._file(path)

    def held(self, slot: int) -> tuple[int, bytes]:
        """Link count and content of an open file."""
        thing = self.handles[slot]
        return sum(thing is other for _, other in self.walk()), bytes(thing.content)

    def held_write(self, slot: int, offset: int, data: bytes) -> None:
        self.put(self.handles[slot], offset, data)

    def held_truncate(self, slot: int, size: int) -> None:
        self.resize(self.handles[slot], size)

    def held_chmod(self, slot: int, mode: int) -> None:
        self.handles[slot].mode = mode

    def release(self, slot: int) -> None:
        del self.handles[slot]

    # Attributes

    def chmod(self, path: bytes, mode: int) -> None:
        thing = self.at(path)
        if thing.format == stat.S_IFLNK:
            raise OSError(errno.EOPNOTSUPP, path)
        thing.mode = mode

    def chown(self, path: bytes, uid: int, gid: int) -> None:
        thing = self.at(path)
        is_whole = self.keeps_owners or thing.format in (
            stat.S_IFREG, stat.S_IFDIR, stat.S_IFCHR, stat.S_IFBLK
        )  # fmt: skip
        if not is_whole and (uid, gid) != (0, 0):
            raise OSError(errno.EPERM, path)
        thing.uid, thing.gid = uid, gid
        if not thing.is_directory:  # chown(2)
            thing.mode &= ~stat.S_ISUID
            if thing.mode & stat.S_IXGRP:
                thing.mode &= ~stat.S_ISGID

    def utimens(self, path: bytes, mtime_ns: int) -> None:
        self.at(path).mtime_ns = mtime_ns

    def set_xattr(self, path: bytes, name: bytes, value: bytes) -> None:
        thing = self.at(path)
        if thing.format not in (stat.S_IFREG, stat.S_IFDIR):
            has_room = self.keeps_owners or thing.format in (stat.S_IFCHR, stat.S_IFBLK)
            if name.startswith(b"user.") or not has_room:
                raise OSError(errno.EPERM, path)
        thing.xattrs[name] = value

    def remove_xattr(self, path: bytes, name: bytes) -> None:
        thing = self.at(path)
        if name.startswith(b"user.") and thing.format not in (stat.S_IFREG, stat.S_IFDIR):
            raise OSError(errno.EPERM, path)
        if name not in thing.xattrs:
            raise OSError(errno.ENODATA, path)
        del thing.xattrs[name]


def _split(path: bytes) -> list[bytes]:
    return [name for name in path.split(b"/") if name not in (b"", b".")]


def _is_within(path: bytes, ancestor: bytes) -> bool:
    return (path + b"/").startswith(ancestor + b"/")


def _check_replaceable(source: Thing, target: Thing, path: bytes) -> None:
    if source.is_directory and not target.is_directory:
        raise OSError(errno.ENOTDIR, path)
    if target.is_directory and not source.is_directory:
        raise OSError(errno.EISDIR, path)
    if target.children:
        raise OSError(errno.ENOTEMPTY, path)
