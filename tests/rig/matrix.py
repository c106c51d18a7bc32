"""Every operation on every kind of object a union can have: a table of cells. Blocking.

An `Object` is what stands at a path of a cell's own directory: members of two layers, and what was done to
them in the container since. An `Operation` is what is then done to it, with what it needs beside it.
`perform` makes all cells below one directory, whatever file system that is on, and says what came of each:
two file systems are compared by two of its answers.

Inode numbers differ, but not which object kept its own: `Seen.was` is the path that had this number before.
"""

import errno
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rig.layers import MTIME_NS, Member, device, directory, fifo, file, hard_link, opaque, symlink, whiteout
from rig.snapshot import Entry, snapshot

from fusestore.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, renameat2

__all__ = [
    "KEPT",
    "NOW",
    "Cell",
    "Object",
    "Operation",
    "Outcome",
    "Seen",
    "layers_of",
    "objects",
    "operations",
    "perform",
]

KEPT, NOW = "kept", "now"
"""An mtime that is as it was before, and one that is of the operation."""

Step = Callable[[], object]
_NULL = os.makedev(1, 3)
_USER = b"user.k"


@dataclass(frozen=True, slots=True)
class Object:
    """What is there. `bottom` and `top` are layers; `steps` are taken in the cell's directory."""

    name: str
    kind: str
    place: str
    bottom: tuple[Member, ...] = ()
    top: tuple[Member, ...] = ()
    steps: tuple[Step, ...] = ()
    path: bytes = b"x"
    needs_root: bool = False
    needs_redirects: bool = False
    """A directory of the lower has been renamed."""


@dataclass(frozen=True, slots=True)
class Operation:
    """What is done to the object at a path. The rest is what must be there besides."""

    name: str
    group: str
    do: Callable[[bytes], object]
    bottom: tuple[Member, ...] = ()
    top: tuple[Member, ...] = ()
    steps: tuple[Step, ...] = ()
    needs_root: bool = False
    needs_redirects: bool = False
    makes_anew: bool = False
    """After it has removed something: then inode numbers are used again."""


@dataclass(frozen=True, slots=True)
class Cell:
    object: Object
    operation: Operation

    @property
    def needs_root(self) -> bool:
        return self.object.needs_root or self.operation.needs_root

    @property
    def needs_redirects(self) -> bool:
        return self.object.needs_redirects or self.operation.needs_redirects

    def __str__(self) -> str:
        return f"{self.operation.name} on {self.object.name}"


@dataclass(frozen=True, slots=True)
class Seen:
    """What stands at a path afterwards."""

    entry: Entry
    """Its mtime is in `mtime`."""
    mtime: object
    """KEPT, NOW, or the nanoseconds that it was set to."""
    was: bytes | None
    """The first path, in byte order, that had its inode number before; None for a new one."""


@dataclass(frozen=True, slots=True)
class Outcome:
    result: object
    """What the operation returned, or the name of its errno."""
    after: dict[bytes, Seen]


# Objects


def _make_file(path: bytes, content: bytes = b"made") -> None:
    with open(path, "xb") as made:
        made.write(content)


def _make_full(path: bytes) -> None:
    os.mkdir(path)
    _make_file(path + b"/in")
    os.mkdir(path + b"/sub")
    _make_file(path + b"/sub/deep")


def _touch(path: bytes) -> None:
    """What it leads to is as before, but in the upper."""
    os.utime(path, ns=(MTIME_NS, MTIME_NS), follow_symlinks=False)


def _remove(path: bytes) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def _beside(path: bytes, name: bytes) -> bytes:
    return os.path.join(os.path.dirname(path), name)


def _in_layer(kind: str, path: bytes, content: bytes = b"content") -> tuple[Member, ...]:
    """The object as members of a layer; links lead to `o` beside it."""
    other = _beside(path, b"o")
    to: dict[str, tuple[Member, ...]] = {
        "link to a file": (file(other, b"other"),),
        "link to a directory": (directory(other), file(other + b"/in")),
        "link to a device": (device(other, _NULL, mode=0o666),),
        "link to a FIFO": (fifo(other),),
        "link to a link": (symlink(other, b"oo"), file(other + b"o", b"other")),
        "link to nothing": (),
    }
    if kind in to:
        return (*to[kind], symlink(path, b"o"))
    return {
        "file": (file(path, content, xattrs=((_USER, b"v"),)),),
        "empty directory": (directory(path, xattrs=((_USER, b"v"),)),),
        "full directory": (
            directory(path, 0o750),
            file(path + b"/in", content),
            directory(path + b"/sub"),
            file(path + b"/sub/deep", content),
        ),
        "device": (device(path, _NULL, mode=0o666),),
        "FIFO": (fifo(path),),
    }[kind]


def _in_mount(kind: str, path: bytes) -> Step:
    """Makes the object in the container."""

    def link(make_other: Step | None) -> None:
        if make_other is not None:
            make_other()
        os.symlink(b"o", path)

    other = _beside(path, b"o")
    steps: dict[str, Step] = {
        "file": partial(_make_file, path),
        "empty directory": partial(os.mkdir, path),
        "full directory": partial(_make_full, path),
        "device": partial(os.mknod, path, stat.S_IFCHR | 0o666, _NULL),
        "FIFO": partial(os.mkfifo, path),
        "link to a file": partial(link, partial(_make_file, other)),
        "link to a directory": partial(link, partial(_make_full, other)),
        "link to nothing": partial(link, None),
    }
    return steps[kind]


_DIRECTORIES = ("empty directory", "full directory")
_OBJECTS = ("file", *_DIRECTORIES, "device", "FIFO")
_LINKS = ("link to a file", "link to a directory", "link to nothing")


def _object(kind: str, place: str, **more: Any) -> Object:
    return Object(f"{kind}, {place}", kind, place, needs_root="device" in kind, **more)


def objects() -> Iterator[Object]:
    """Each kind of object in each place it can have in a union."""
    for kind in (*_OBJECTS, *_LINKS, "link to a device", "link to a FIFO", "link to a link"):
        lower = _in_layer(kind, b"x")
        yield _object(kind, "in the lower", bottom=lower)
        yield _object(kind, "in both", bottom=lower, steps=(partial(_touch, b"x"),))
    for kind in (*_OBJECTS, *_LINKS):
        yield _object(kind, "in the upper", steps=(_in_mount(kind, b"x"),))
    for kind in _OBJECTS:
        lower = _in_layer(kind, b"x")
        other = _in_layer("full directory" if kind == "file" else "file", b"x")
        yield _object(
            kind,
            "in place of a removed one",
            bottom=other,
            steps=(partial(_remove, b"x"), _in_mount(kind, b"x")),
        )
        moved = (directory(b"d"), *_in_layer(kind, b"d/x"))
        move = partial(os.rename, b"d", b"q")
        more: dict[str, Any] = {"bottom": moved, "path": b"q/x", "needs_redirects": True}
        yield _object(kind, "in a renamed directory", steps=(move,), **more)
        if kind in ("file", "full directory"):
            yield _object(
                kind, "in a renamed directory, in both", steps=(move, partial(_touch, b"q/x")), **more
            )
        yield _object(
            kind,
            "renamed",
            bottom=_in_layer(kind, b"w"),
            steps=(partial(os.rename, b"w", b"x"),),
            needs_redirects=kind in _DIRECTORIES,
        )
    for kind in ("file", "device", "link to a file"):
        linked = (*_in_layer(kind, b"x"), hard_link(b"y", b"x"))
        link = partial(os.link, b"x", b"y", follow_symlinks=False)
        yield _object(kind, "hard-linked in the lower", bottom=linked)
        yield _object(kind, "hard-linked in both", bottom=linked, steps=(partial(_touch, b"y"),))
        yield _object(kind, "hard-linked in the upper", bottom=_in_layer(kind, b"x"), steps=(link,))
    yield _object(
        "file", "in two layers", bottom=_in_layer("file", b"x"), top=_in_layer("file", b"x", b"another")
    )
    full = _in_layer("full directory", b"x")
    own = (directory(b"x", 0o700), file(b"x/in", b"another"), file(b"x/own"))
    yield _object("full directory", "merged of two layers", bottom=full, top=own)
    for kind, content in (("full directory", own), ("empty directory", (directory(b"x"),))):
        yield _object(kind, "opaque in a layer", bottom=full, top=(*content, opaque(b"x")))
        yield _object(kind, "opaque", bottom=full, steps=(partial(_remove, b"x"), _in_mount(kind, b"x")))
    yield _object(
        "empty directory",
        "emptied",
        bottom=full,
        steps=(partial(_remove, b"x/in"), partial(_remove, b"x/sub")),
    )
    yield _object("nothing", "never there")
    for kind in ("file", "full directory"):
        yield _object(
            "nothing", f"a {kind} whited out", bottom=_in_layer(kind, b"x"), steps=(partial(_remove, b"x"),)
        )
        yield _object(
            "nothing", f"a {kind} whited out in a layer", bottom=_in_layer(kind, b"x"), top=(whiteout(b"x"),)
        )


# Operations


def _open(flags: int, path: bytes) -> object:
    """Open, read and write what can be, and look."""
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o640)
    try:
        status = os.fstat(fd)
        if flags & os.O_PATH or not stat.S_ISREG(status.st_mode):
            return stat.S_IFMT(status.st_mode)
        access = flags & os.O_ACCMODE
        found: list[object] = []
        if access != os.O_WRONLY:
            found.append(os.read(fd, 3))
        if access != os.O_RDONLY:
            found.append(os.write(fd, b"NEW"))
        if access != os.O_WRONLY:
            found.append(os.pread(fd, 100, 0))
        status = os.fstat(fd)
        return [*found, status.st_nlink, status.st_size]
    finally:
        os.close(fd)


def _stat(status: os.stat_result) -> tuple[int, ...]:
    """Of a directory neither size nor link count: file systems have their own."""
    own = () if stat.S_ISDIR(status.st_mode) else (status.st_size, status.st_nlink, status.st_rdev)
    return (status.st_mode, status.st_uid, status.st_gid, *own)


def _held(path: bytes, *, write: bool) -> object:
    """Remove what is open, then use it."""
    fd = os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        is_directory = stat.S_ISDIR(os.fstat(fd).st_mode)
        (os.rmdir if is_directory else os.unlink)(path)
        results = [_stat(os.fstat(fd))]
        for call in (partial(os.fchmod, fd, 0o604), partial(os.utime, fd, ns=(7, 7))):
            results.append(_result(call))
        if is_directory:
            results.append(_result(partial(os.listdir, fd)))
        elif stat.S_ISREG(os.fstat(fd).st_mode):
            if write:
                results.append(_result(partial(os.pwrite, fd, b"NEW", 2)))
            results.append(_result(partial(os.pread, fd, 100, 0)))
        results.append(_stat(os.fstat(fd)))
        return results
    finally:
        os.close(fd)


def _seen_by_reader(path: bytes) -> object:
    """A descriptor opened before somebody writes shows what was written."""
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(reader).st_mode):
            return None
        _open(os.O_WRONLY, path)
        return os.read(reader, 100), _stat(os.fstat(reader))
    finally:
        os.close(reader)


def _result(call: Callable[[], object]) -> object:
    try:
        return call()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def _at(name: bytes, call: Callable[[bytes], object]) -> Callable[[bytes], object]:
    """`call` with a name below the object."""
    return lambda path: call(path + b"/" + name)


def _list_xattrs(path: bytes) -> object:
    return sorted(os.listxattr(path, follow_symlinks=False))


def _remake(path: bytes) -> None:
    _remove(path)
    os.mkdir(path)
    _make_file(path + b"/new")


_FLAGS = {
    "": 0,
    "CREAT": os.O_CREAT,
    "CREAT|EXCL": os.O_CREAT | os.O_EXCL,
    "CREAT|TRUNC": os.O_CREAT | os.O_TRUNC,
    "CREAT|NOFOLLOW": os.O_CREAT | os.O_NOFOLLOW,
    "CREAT|DIRECTORY": os.O_CREAT | os.O_DIRECTORY,
    "TRUNC": os.O_TRUNC,
    "APPEND": os.O_APPEND,
    "DIRECTORY": os.O_DIRECTORY,
    "NOFOLLOW": os.O_NOFOLLOW,
}
_RENAMES = {"": 0, " NOREPLACE": RENAME_NOREPLACE, " EXCHANGE": RENAME_EXCHANGE}
_NOREPLACES = (
    "nothing",
    "a whiteout",
    "a file of the lower",
    "an emptied directory",
    "its other name",
    "itself",
)
"""All else that is there is refused the same."""


def _rename_to(target: bytes, flags: int, path: bytes) -> None:
    renameat2(_AT_FDCWD, path, _AT_FDCWD, target, flags)


def _rename_from(source: bytes, flags: int, path: bytes) -> None:
    renameat2(_AT_FDCWD, source, _AT_FDCWD, path, flags)


_AT_FDCWD = -100


def _targets() -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """What a rename can go onto: name, path, and what makes it."""
    yield "nothing", b"z", {}
    yield "a whiteout", b"z", {"bottom": _in_layer("file", b"z"), "steps": (partial(_remove, b"z"),)}
    yield "a name in a lower directory", b"e/z", {"bottom": (directory(b"e"),)}
    for kind in ("file", "empty directory", "full directory", "FIFO", "link to a directory"):
        yield f"a {kind} of the lower", b"p/z", {"bottom": (directory(b"p"), *_in_layer(kind, b"p/z"))}
    for kind in ("file", "empty directory", "full directory", "link to nothing"):
        yield (
            f"a {kind} of the upper",
            b"z",
            {"steps": (_in_mount(kind, b"z"),)}
            if kind != "link to nothing"
            else {"steps": (partial(os.symlink, b"none", b"z"),)},
        )
    full = _in_layer("full directory", b"z")
    yield "a file of both", b"z", {"bottom": _in_layer("file", b"z"), "steps": (partial(_touch, b"z"),)}
    yield (
        "an emptied directory",
        b"z",
        {
            "bottom": full,
            "steps": (partial(_remove, b"z/in"), partial(_remove, b"z/sub")),
        },
    )
    yield (
        "an opaque directory",
        b"z",
        {"bottom": full, "steps": (partial(_remove, b"z"), partial(os.mkdir, b"z"))},
    )
    yield (
        "a name in a renamed directory",
        b"s/z",
        {
            "bottom": (directory(b"r"), file(b"r/z")),
            "steps": (partial(os.rename, b"r", b"s"),),
            "needs_redirects": True,
        },
    )
    yield "its other name", b"y", {}
    yield "itself", b"x", {}
    yield "a name below it", b"x/z", {}


def operations() -> Iterator[Operation]:
    for access in ("RDONLY", "WRONLY", "RDWR"):
        for flag, number in _FLAGS.items():
            flags = getattr(os, f"O_{access}") | number
            if access != "RDWR" and flag not in ("", "CREAT", "TRUNC", "APPEND", "DIRECTORY", "NOFOLLOW"):
                continue
            yield Operation(f"open {access} {flag}".strip(), "open", partial(_open, flags))
    yield Operation("open PATH", "open", partial(_open, os.O_PATH))
    yield Operation("open PATH|NOFOLLOW", "open", partial(_open, os.O_PATH | os.O_NOFOLLOW))
    yield Operation("open TMPFILE", "open", partial(_open, os.O_TMPFILE | os.O_RDWR))
    looks: dict[str, Callable[[bytes], object]] = {
        "stat": lambda path: _stat(os.stat(path)),
        "lstat": lambda path: _stat(os.lstat(path)),
        "access": lambda path: [os.access(path, mode) for mode in (os.F_OK, os.R_OK, os.W_OK, os.X_OK)],
        "readlink": os.readlink,
        "list": lambda path: sorted(os.listdir(path)),
        "list of xattrs": _list_xattrs,
        "getxattr": lambda path: os.getxattr(path, _USER),
        "getxattr of none": lambda path: os.getxattr(path, b"user.none", follow_symlinks=False),
    }
    yield from (Operation(name, "look", do) for name, do in looks.items())
    changes: dict[str, Callable[[bytes], object]] = {
        "truncate to 0": lambda path: os.truncate(path, 0),
        "truncate to 3": lambda path: os.truncate(path, 3),
        "truncate to 100": lambda path: os.truncate(path, 100),
        "chmod": lambda path: os.chmod(path, 0o710),
        "utime": lambda path: os.utime(path, ns=(5, 5)),
        "utime of itself": lambda path: os.utime(path, ns=(5, 5), follow_symlinks=False),
        "setxattr": lambda path: os.setxattr(path, b"user.n", b"w"),
        "setxattr of itself": lambda path: os.setxattr(path, b"user.n", b"w", follow_symlinks=False),
        "setxattr CREATE": lambda path: os.setxattr(path, _USER, b"w", os.XATTR_CREATE),
        "setxattr REPLACE": lambda path: os.setxattr(path, _USER, b"w", os.XATTR_REPLACE),
        "removexattr": lambda path: os.removexattr(path, _USER),
        "removexattr of none": lambda path: os.removexattr(path, b"user.none"),
        "removed while read": partial(_held, write=False),
        "removed while written": partial(_held, write=True),
        "written while read": _seen_by_reader,
    }
    yield from (Operation(name, "change", do) for name, do in changes.items())
    roots: dict[str, Callable[[bytes], object]] = {
        "chown": lambda path: os.chown(path, 5, 6),
        "chown of itself": lambda path: os.lchown(path, 5, 6),
        "setxattr trusted": lambda path: os.setxattr(path, b"trusted.n", b"w", follow_symlinks=False),
        "setxattr trusted.overlay": lambda path: os.setxattr(
            path, b"trusted.overlay.opaque", b"y", follow_symlinks=False
        ),
        "mknod of a device": lambda path: os.mknod(path, stat.S_IFCHR | 0o600, _NULL),
        "mknod of a whiteout": lambda path: os.mknod(path, stat.S_IFCHR | 0o600, 0),
    }
    yield from (Operation(name, "change", do, needs_root=True) for name, do in roots.items())
    other = _in_layer("file", b"other")
    names: dict[str, Callable[[bytes], object]] = {
        "mkdir": lambda path: os.mkdir(path, 0o750),
        "mknod of a file": lambda path: os.mknod(path, stat.S_IFREG | 0o600),
        "mkfifo": lambda path: os.mkfifo(path, 0o600),
        "symlink": lambda path: os.symlink(b"target", path),
        "link": lambda path: os.link(path, b"new", follow_symlinks=False),
        "link of what it leads to": lambda path: os.link(path, b"new", follow_symlinks=True),
        "link to it": lambda path: os.link(b"other", path),
        "unlink": os.unlink,
        "rmdir": os.rmdir,
        "rm -r": _remove,
    }
    yield from (Operation(name, "names", do, bottom=other) for name, do in names.items())
    yield Operation("rm -r and mkdir", "names", _remake, makes_anew=True)
    below: dict[str, Callable[[bytes], object]] = {
        "create below": _at(b"new", partial(_open, os.O_RDWR | os.O_CREAT | os.O_EXCL)),
        "mkdir below": _at(b"new", os.mkdir),
        "symlink below": _at(b"new", partial(os.symlink, b"target")),
        "write below": _at(b"in", partial(_open, os.O_RDWR)),
        "unlink below": _at(b"in", os.unlink),
        "rmdir below": _at(b"sub", os.rmdir),
        "rm -r below": _at(b"sub", _remove),
        "rename out of it": _at(b"in", partial(_rename_to, b"new", 0)),
        "rename of a directory out of it": _at(b"sub", partial(_rename_to, b"new", 0)),
        "link out of it": _at(b"in", lambda path: os.link(path, b"new")),
        "link into it": _at(b"new", lambda path: os.link(b"other", path)),
    }
    yield from (Operation(name, "below", do, bottom=other) for name, do in below.items())
    for kind, flags in _RENAMES.items():
        for name, target, more in _targets():
            if flags == RENAME_NOREPLACE and name not in _NOREPLACES:
                continue
            yield Operation(f"rename{kind} onto {name}", "rename", partial(_rename_to, target, flags), **more)
        sources = (
            (directory(b"f"), *_in_layer("file", b"f/s")),
            (directory(b"f"), *_in_layer("full directory", b"f/s")),
        )
        for source, members in zip(("a file", "a directory"), sources, strict=True):
            yield Operation(
                f"rename{kind} of {source} onto it",
                "rename",
                partial(_rename_from, b"f/s", flags),
                bottom=members,
            )


# Cells


def layers_of(cells: Mapping[int, Cell], owner: tuple[int, int]) -> list[list[Member]]:
    """Two layers with what all cells are given, each in a directory of its number."""
    layers: list[list[Member]] = [[], []]
    for number, cell in cells.items():
        place = b"%d" % number
        given = (
            (*cell.object.bottom, *cell.operation.bottom),
            (*cell.object.top, *cell.operation.top),
        )
        for members, own in zip(layers, given, strict=True):
            members.append(_placed(directory(b""), place, owner))
            members += (_placed(member, place, owner) for member in own)
    return layers


def _placed(member: Member, place: bytes, owner: tuple[int, int]) -> Member:
    path = place + b"/" + member.path if member.path else place
    link = place + b"/" + member.link if member.type == b"1" else member.link
    return replace(member, path=path, link=link, uid=owner[0], gid=owner[1])


def perform(root: Path, cells: Mapping[int, Cell]) -> dict[int, Outcome]:
    """Makes what each cell needs, does what it is about, and looks; in the caller's process."""
    os.umask(0o022)
    before = {}
    for number, cell in cells.items():
        os.chdir(root / str(number))
        for step in (*cell.object.steps, *cell.operation.steps):
            step()
        before[number] = _inodes()
    start_ns = _next_tick()
    results = {}
    for number, cell in cells.items():
        os.chdir(root / str(number))
        results[number] = _result(partial(cell.operation.do, cell.object.path))
    outcomes = {}
    for number, result in results.items():
        os.chdir(root / str(number))
        outcomes[number] = Outcome(
            result, _look(before[number], start_ns, cells[number].operation.makes_anew)
        )
    return outcomes


def _next_tick() -> int:
    """What is done from now on has this time or a later one, what was done had an earlier one."""
    now = partial(time.clock_gettime_ns, 5)  # CLOCK_REALTIME_COARSE: what file systems take times from
    before = now()
    while now() == before:
        pass
    return now()


def _inodes() -> dict[bytes, tuple[int, int]]:
    """Inode number and mtime of everything in the current directory."""
    own = os.lstat(b".")
    found = {b".": (own.st_ino, own.st_mtime_ns)}
    waiting = [b"."]
    while waiting:
        above = waiting.pop()
        with os.scandir(above) as entries:
            for entry in entries:
                path = entry.path.removeprefix(b"./")
                status = entry.stat(follow_symlinks=False)
                found[path] = status.st_ino, status.st_mtime_ns
                if stat.S_ISDIR(status.st_mode):
                    waiting.append(path)
    return found


def _look(before: dict[bytes, tuple[int, int]], start_ns: int, makes_anew: bool) -> dict[bytes, Seen]:
    first: dict[int, bytes] = {}
    for path in () if makes_anew else sorted(before):
        first.setdefault(before[path][0], path)
    entries = snapshot(Path())
    found = {}
    for path, (number, mtime_ns) in _inodes().items():
        was = first.get(number)
        known = {before[one][1] for one in (was, path) if one in before}
        mtime: object = KEPT if mtime_ns in known else NOW if mtime_ns >= start_ns else mtime_ns
        found[path] = Seen(replace(entries[path], mtime_ns=0), mtime, was)
    return found
