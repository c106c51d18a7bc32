"""Everything a reader can see of a directory tree, as a value; and the difference of two. Blocking.

Walks by descriptors only (openat and friends), so paths of any length and names of any bytes work, and a
symlink is never followed. Two trees are the same when `differences` returns nothing.

Left out on purpose: atime and ctime (reading and copying change them), the size of directories (each
filesystem invents its own) and the directories' link count where a filesystem keeps none (btrfs says 1).
"""

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

__all__ = ["TYPES", "Entry", "Snapshot", "differences", "snapshot"]

TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "char",
    stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One name of a tree."""

    type: str
    mode: int
    """Permission bits (07777)."""
    uid: int
    gid: int
    size: int | None
    """None for directories."""
    mtime_ns: int
    rdev: int
    nlink: int | None
    """None for a directory on a filesystem that does not count subdirectories."""
    group: bytes | None
    """The first name, in byte order, of the hard-link group this name belongs to; None with one name."""
    target: bytes | None
    xattrs: tuple[tuple[str, bytes], ...]
    sha256: str | None


Snapshot = dict[bytes, Entry]
"""From the path below the root (``b"."`` for the root itself, no leading slash) to what stands there."""


def snapshot(root: str | Path, *, content: bool = True) -> Snapshot:
    """The tree at `root`. `content=False` leaves out the digests, for trees that must not be read."""
    top = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        found: Snapshot = {b".": _entry(top, b".", os.stat(top), content)}
        inodes: dict[int, list[bytes]] = {}
        for path, entry, inode in _walk(top, b"", content):
            found[path] = entry
            if entry.type != "directory" and entry.nlink != 1:
                inodes.setdefault(inode, []).append(path)
    finally:
        os.close(top)
    for paths in inodes.values():
        for path in paths:
            found[path] = replace(found[path], group=min(paths))
    return found


def _walk(directory: int, prefix: bytes, content: bool) -> Iterator[tuple[bytes, Entry, int]]:
    for name in sorted(map(os.fsencode, os.listdir(directory))):
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        path = prefix + name
        yield path, _entry(directory, name, status, content), status.st_ino
        if stat.S_ISDIR(status.st_mode):
            below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
            try:
                yield from _walk(below, path + b"/", content)
            finally:
                os.close(below)


def _entry(directory: int, name: bytes, status: os.stat_result, content: bool) -> Entry:
    kind = stat.S_IFMT(status.st_mode)
    is_directory = kind == stat.S_IFDIR
    # No *at call reads xattrs; the magic link keeps the walk off full paths.
    reachable = b"/proc/self/fd/%d/%s" % (directory, name)
    return Entry(
        type=TYPES[kind],
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        size=None if is_directory else status.st_size,
        mtime_ns=status.st_mtime_ns,
        rdev=status.st_rdev,
        nlink=None if is_directory and status.st_nlink < 2 else status.st_nlink,
        group=None,
        target=os.readlink(name, dir_fd=directory) if kind == stat.S_IFLNK else None,
        xattrs=tuple(
            (key, os.getxattr(reachable, key, follow_symlinks=False))
            for key in sorted(os.listxattr(reachable, follow_symlinks=False))
        ),
        sha256=_sha256(directory, name) if content and kind == stat.S_IFREG else None,
    )


def _sha256(directory: int, name: bytes) -> str:
    with open(os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def differences(
    expected: Mapping[bytes, Entry], found: Mapping[bytes, Entry], *, ignore: frozenset[str] = frozenset()
) -> list[str]:
    """One line for each name that differs, in byte order; empty when the trees are the same.

    `ignore` names fields of `Entry` that do not count.
    """
    names = [field.name for field in fields(Entry) if field.name not in ignore]
    lines = []
    for path in sorted(expected.keys() | found.keys()):
        if path not in found:
            lines.append(f"{path!r}: missing, expected a {expected[path].type}")
        elif path not in expected:
            lines.append(f"{path!r}: not expected, found a {found[path].type}")
        else:
            wrong = [
                f"{name} {_shown(name, found[path])} instead of {_shown(name, expected[path])}"
                for name in names
                if getattr(found[path], name) != getattr(expected[path], name)
                and not (name == "nlink" and None in (found[path].nlink, expected[path].nlink))
            ]
            if wrong:
                lines.append(f"{path!r}: " + ", ".join(wrong))
    return lines


def _shown(name: str, entry: Entry) -> str:
    value = getattr(entry, name)
    return f"{value:04o}" if name == "mode" else repr(value)
