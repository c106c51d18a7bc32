"""Calls that make a name, in a rootfs: by the manual pages and beside the file system below."""

import os
import stat
from collections.abc import Callable
from dataclasses import replace

import pytest
from rig.layers import directory, file, hard_link, symlink
from rig.posix import NOW, Call, Case, Identity, call, judging
from rig.posixpaths import (
    DIRECTORY,
    FILE,
    KINDS,
    MATE,
    MEMBER,
    OTHER_GROUP,
    OWNER,
    ROOT,
    STRANGER,
    owned,
    path_cases,
)

pytestmark = [pytest.mark.mounted]

Make = Callable[..., Call]


def _mkdir(path: bytes | int, by: Identity | None = None, mode: int = 0o755) -> Call:
    return call("mkdir", path, mode, by=by)


def _mkfifo(path: bytes | int, by: Identity | None = None, mode: int = 0o644) -> Call:
    return call("mkfifo", path, mode, by=by)


def _mknod(path: bytes | int, by: Identity | None = None, mode: int = 0o644) -> Call:
    return call("mknod", path, stat.S_IFREG | mode, 0, by=by)


def _symlink(path: bytes | int, by: Identity | None = None) -> Call:
    return call("symlink", b"target", path, by=by)


def _made(make: Make, type: str, **fields: object) -> list[Case]:
    """What all calls that make something have in common. `fields` of what is made by default."""
    made = {
        "type": type,
        "nlink": 1,
        "times": (NOW if type not in ("directory", "symlink") else None, NOW, NOW),
    }
    open_to_all = owned(directory(b"d", 0o777), ROOT)
    shared = replace(directory(b"d", 0o2777), gid=OTHER_GROUP)
    existing = {
        **KINDS,
        "link to a directory": symlink(b"x", b"d"),
        "link to itself": symlink(b"x", b"x"),
        "link to a file": symlink(b"x", b"f"),
    }
    return [
        *path_cases(make, None, needs_write=True),
        Case("something new", (), (make(b"x"),), None, {b".": "mc"}, {b"x": {**made, **fields}}),
        *(
            Case(f"over a {kind}", (thing, file(b"f"), directory(b"d")), (make(b"x"),), "EEXIST")
            for kind, thing in existing.items()
        ),
        Case("over the directory itself", (), (make(b"."),), "EEXIST"),
        Case("over the directory above", (DIRECTORY,), (make(b"x/.."),), "EEXIST"),
        *(
            Case(
                f"by {who}",
                (open_to_all,),
                (make(b"d/x", by),),
                None,
                {b"d": "mc"},
                {b"d/x": {"uid": by.uid, "gid": by.gid}},
            )
            for who, by in (
                ("root", ROOT),
                ("the owner", OWNER),
                ("one of many groups", MEMBER),
                ("a stranger", STRANGER),
            )
        ),
        *(
            Case(
                f"in a set-group-ID directory by {who}",
                (shared,),
                (make(b"d/x", by),),
                None,
                {b"d": "mc"},
                {b"d/x": {"uid": by.uid, "gid": OTHER_GROUP, "mode": _mode_of(type, fields)}},
            )
            for who, by in (
                ("root", ROOT),
                ("a stranger", STRANGER),
                ("one of its group", Identity(7, 8, (OTHER_GROUP,))),
            )
        ),
        Case(
            "in what was removed",
            (DIRECTORY,),
            (call("chdir", b"x"), call("rmdir", b"../x"), make(b"y")),
            "ENOENT",
        ),
        Case(
            "where something was removed",
            (FILE,),
            (call("unlink", b"x"), make(b"x")),
            None,
            None,
            {b"x": {**made, **fields}},
        ),
        Case(
            "where a directory was removed",
            (DIRECTORY,),
            (call("rmdir", b"x"), make(b"x")),
            None,
            None,
            {b"x": {**made, **fields}},
        ),
    ]


def _mode_of(type: str, fields: dict[str, object]) -> object:
    mode = fields["mode"]
    return 0o2755 if type == "directory" else mode


def _modes(make: Make, kept: int) -> list[Case]:
    """Modes, `kept` of them, and umasks."""
    return [
        Case(
            f"of {mode:04o} under {mask:03o}",
            (),
            (call("umask", mask), make(b"x", None, mode)),
            None,
            None,
            {b"x": {"mode": mode & ~mask & kept}},
        )
        for mode in (0o0000, 0o0151, 0o0644, 0o1777, 0o2777, 0o4777)
        for mask in (0o000, 0o022, 0o077, 0o777)
    ]


MKDIR = [
    *_made(_mkdir, "directory", nlink=2, mode=0o755),
    *_modes(_mkdir, 0o1777),
    Case("counts above", (), (_mkdir(b"x"),), None, {b".": "mc"}, {b".": {"nlink": 3}}),
    Case(
        "counts beside others",
        (directory(b"d"), FILE),
        (_mkdir(b"y"),),
        None,
        {b".": "mc"},
        {b".": {"nlink": 4}},
    ),
    Case("with a slash", (), (_mkdir(b"x/"),), None, {b".": "mc"}, {b"x": {"type": "directory"}}),
    Case("with a dot", (), (_mkdir(b"x/."),), "ENOENT"),
    Case("over a link to nothing and a slash", (symlink(b"s", b"none"),), (_mkdir(b"s/"),), "EEXIST"),
]
MKFIFO = [
    *_made(_mkfifo, "fifo", mode=0o644),
    *_modes(_mkfifo, 0o7777),
    Case("counts not above", (), (_mkfifo(b"x"),), None, {b".": "mc"}, {b".": {"nlink": 2}}),
    Case("with a slash", (), (_mkfifo(b"x/"),), "ENOENT"),
]
WHITEOUT = "a character device 0:0 is overlayfs's whiteout: it would hide, not be"
MKNOD = [
    *_made(_mknod, "file", mode=0o644),
    *_modes(_mknod, 0o7777),
    Case("with a slash", (), (_mknod(b"x/"),), "ENOENT"),
    *(
        Case(
            f"a {type} by root",
            (),
            (call("mknod", b"x", format | 0o640, rdev, by=ROOT),),
            None,
            {b".": "mc"},
            {b"x": {"type": type, "mode": 0o640, "rdev": rdev, "nlink": 1, "times": (NOW, NOW, NOW)}},
        )
        for type, format, rdev in (
            ("fifo", stat.S_IFIFO, 0),
            ("socket", stat.S_IFSOCK, 0),
            ("char", stat.S_IFCHR, os.makedev(1, 3)),
            ("block", stat.S_IFBLK, os.makedev(7, 0)),
            ("block", stat.S_IFBLK, 0),
        )
        if type != "block" or rdev
    ),
    Case(
        "a device of large numbers",
        (),
        (call("mknod", b"x", stat.S_IFBLK | 0o600, os.makedev(4095, 1048575), by=ROOT),),
        None,
        {b".": "mc"},
        {b"x": {"rdev": os.makedev(4095, 1048575)}},
    ),
    Case(
        "a file without a type",
        (),
        (call("mknod", b"x", 0o600, 0),),
        None,
        {b".": "mc"},
        {b"x": {"type": "file"}},
    ),
    *(
        Case(
            f"a {type} by a stranger",
            (owned(directory(b"d", 0o777)),),
            (call("mknod", b"d/x", format | 0o600, rdev, by=STRANGER),),
            gives,
            {b"d": "mc"} if gives is None else {},
        )
        for type, format, rdev, gives in (
            ("file", stat.S_IFREG, 0, None),
            ("FIFO", stat.S_IFIFO, 0, None),
            ("socket", stat.S_IFSOCK, 0, None),
            ("character device", stat.S_IFCHR, os.makedev(1, 3), "EPERM"),
            ("block device", stat.S_IFBLK, os.makedev(7, 0), "EPERM"),
        )
    ),
    *(
        Case(f"a {type}", (), (call("mknod", b"x", format | 0o600, 0, by=ROOT),), gives)
        for type, format, gives in (
            ("directory", stat.S_IFDIR, "EPERM"),
            ("link", stat.S_IFLNK, "EINVAL"),
            ("thing of no type", 0o170000, "EINVAL"),
        )
    ),
    Case(
        "a whiteout", (), (call("mknod", b"x", stat.S_IFCHR | 0o600, 0, by=ROOT),), "EPERM", differs=WHITEOUT
    ),
]

LONGEST_TARGET = b"t" * 4095
SYMLINK = [
    *_made(_symlink, "symlink", mode=0o777),
    Case("with a slash", (), (_symlink(b"x/"),), "ENOENT"),
    Case("counts not above", (), (_symlink(b"x"),), None, {b".": "mc"}, {b".": {"nlink": 2}}),
    Case(
        "with a umask",
        (),
        (call("umask", 0o777), _symlink(b"x")),
        None,
        {b".": "mc"},
        {b"x": {"mode": 0o777}},
    ),
    *(
        Case(
            f"to {what}",
            (),
            (call("symlink", target, b"x"),),
            None,
            {b".": "mc"},
            {b"x": {"target": target, "size": len(target)}},
        )
        for what, target in (
            ("a byte", b"t"),
            ("255 bytes", b"t" * 255),
            ("a long path", b"/".join([b"n" * 255] * 15)),
            ("a name that is too long", b"n" * 300),
            ("4,095 bytes", LONGEST_TARGET),
            ("bytes that are no text", b"\xff\n /\x01"),
            ("slashes", b"//a///"),
            ("itself", b"x"),
        )
    ),
    Case("to 4,096 bytes", (), (call("symlink", LONGEST_TARGET + b"t", b"x"),), "ENAMETOOLONG"),
    Case("to nothing", (), (call("symlink", b"", b"x"),), "ENOENT"),
    Case("to no address", (), (call("symlink", 1, b"x"),), "EFAULT"),
]


def _link_old(path: bytes | int, by: Identity | None = None) -> Call:
    return call("link", path, b"w/new", by=by)


def _link_new(path: bytes | int, by: Identity | None = None) -> Call:
    return call("link", b"given", path, by=by)


SPACIOUS = owned(directory(b"w", 0o777))
SOURCE = owned(file(b"given", b"content", 0o666))
NOT_DIRECTORIES = {kind: thing for kind, thing in KINDS.items() if kind != "directory"}
LINK_CALL = [
    *path_cases(_link_old, given=(SPACIOUS,)),
    *path_cases(_link_new, None, given=(SOURCE,), needs_write=True, prefix="to: "),
    *(
        Case(
            f"a {kind}",
            (thing,),
            (call("link", b"x", b"y"),),
            None,
            {b".": "mc", b"x": "c"},
            {b"x": {"nlink": 2}, b"y": {"nlink": 2, "type": thing_type}, b".": {"nlink": 2}},
        )
        for kind, thing, thing_type in (
            (kind, thing, {"link": "symlink", "FIFO": "fifo", "device": "char"}.get(kind, kind))
            for kind, thing in NOT_DIRECTORIES.items()
        )
    ),
    Case(
        "a socket",
        (),
        (call("bind", b"x"), call("link", b"x", b"y")),
        None,
        None,
        {b"y": {"type": "socket", "nlink": 2}},
    ),
    Case("a directory", (DIRECTORY,), (call("link", b"x", b"y"),), "EPERM"),
    Case(
        "a directory by a stranger",
        (SPACIOUS, DIRECTORY),
        (call("link", b"x", b"w/y", by=STRANGER),),
        "EPERM",
    ),
    *(
        Case(f"over a {kind}", (SOURCE, thing), (_link_new(b"x"),), "EEXIST")
        for kind, thing in {**KINDS, "link to itself": symlink(b"x", b"x")}.items()
    ),
    Case("over itself", (FILE,), (call("link", b"x", b"x"),), "EEXIST"),
    Case("over another of its names", (FILE, hard_link(b"y", b"x")), (call("link", b"x", b"y"),), "EEXIST"),
    Case("with a slash", (SOURCE,), (_link_new(b"x/"),), "ENOENT"),
    Case(
        "from one directory to another",
        (directory(b"a"), directory(b"b"), file(b"a/x")),
        (call("link", b"a/x", b"b/y"),),
        None,
        {b"b": "mc", b"a/x": "c"},
        {b"b/y": {"nlink": 2}},
    ),
    Case(
        "a third name",
        (FILE, hard_link(b"y", b"x")),
        (call("link", b"y", b"z"),),
        None,
        {b".": "mc", b"x": "c", b"y": "c"},
        {name: {"nlink": 3} for name in (b"x", b"y", b"z")},
    ),
    Case(
        "and remove the first",
        (FILE,),
        (call("link", b"x", b"y"), call("unlink", b"x")),
        None,
        {b".": "mc"},
        {b"x": None, b"y": {"nlink": 1, "content": b"content"}},
    ),
    Case(
        "and write by it",
        (FILE,),
        (call("link", b"x", b"y"), call("open", b"y", os.O_WRONLY | os.O_TRUNC), call("write", b"new")),
        3,
        {b".": "mc", b"x": "mc"},
        {b"x": {"content": b"new", "nlink": 2}},
    ),
    Case(
        "what was removed while it is open",
        (FILE,),
        (call("open", b"x", os.O_RDONLY), call("unlink", b"x"), call("link_open", b"y")),
        "ENOENT",
        None,
        {b"y": None},
    ),
    Case(
        "by its owner",
        (SPACIOUS, owned(FILE)),
        (call("link", b"x", b"w/y", by=OWNER),),
        None,
        {b"w": "mc", b"x": "c"},
    ),
    Case(
        "one's own in another's directory",
        (owned(directory(b"d")), replace(FILE, uid=MATE.uid)),
        (call("link", b"x", b"d/y", by=MATE),),
        "EACCES",
    ),
    Case(
        "what a link leads to stays",
        (FILE, symlink(b"s", b"x")),
        (call("link", b"s", b"y"),),
        None,
        {b".": "mc", b"s": "c"},
        {b"x": {"nlink": 1}, b"y": {"type": "symlink", "nlink": 2}},
    ),
]

TABLES = {"mkdir": MKDIR, "mkfifo": MKFIFO, "mknod": MKNOD, "symlink": SYMLINK, "link": LINK_CALL}

judge, test_root, test_a_plain_user = judging("making", TABLES)
