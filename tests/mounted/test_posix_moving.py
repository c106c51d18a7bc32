"""unlink, rmdir and rename in a rootfs: by the manual pages and beside the file system below."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rig.layers import Member, directory, fifo, file, hard_link, symlink
from rig.posix import BAD_ADDRESS, Call, Case, Identity, call, judging
from rig.posixpaths import (
    DIRECTORY,
    FILE,
    KINDS,
    MATE,
    MEMBER,
    OWNER,
    ROOT,
    STRANGER,
    owned,
    path_cases,
)

from fusestore.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT

pytestmark = [pytest.mark.mounted]

NOT_DIRECTORIES = {kind: thing for kind, thing in KINDS.items() if kind != "directory"}


def _unlink(path: bytes | int, by: Identity | None = None) -> Call:
    return call("unlink", path, by=by)


def _rmdir(path: bytes | int, by: Identity | None = None) -> Call:
    return call("rmdir", path, by=by)


def _in(directory_name: bytes, thing: Member, who: Identity) -> Member:
    """`thing`, which is x, as who's in a directory."""
    return owned(replace(thing, path=directory_name + b"/x"), who)


WHO_MAY = (
    # The mode of a directory of OWNER's with something of MATE's in it, who removes that, and whether.
    ("sticky directory, by the directory's owner", 0o1777, OWNER, None),
    ("sticky directory, by its own owner", 0o1777, MATE, None),
    ("sticky directory, by root", 0o1777, ROOT, None),
    ("sticky directory, by a stranger", 0o1777, STRANGER, "EPERM"),
    ("sticky directory, by one of both groups", 0o1777, MEMBER, "EPERM"),
    ("open directory, by a stranger", 0o777, STRANGER, None),
    ("group's directory, by one of the group", 0o770, MEMBER, None),
    ("group's sticky directory, by one of the group", 0o1770, MEMBER, "EPERM"),
    ("sticky directory that cannot be written, by its own owner", 0o1755, MATE, "EACCES"),
)


def _who_may(make: Callable[[bytes, Identity], Call], kinds: dict[str, Member]) -> list[Case]:
    return [
        Case(
            f"a {kind} in a {where}",
            (owned(directory(b"d", mode)), _in(b"d", thing, MATE)),
            (make(b"d/x", by),),
            gives,
            {} if gives else {b"d": "mc"},
            {b"d/x": {"uid": MATE.uid} if gives else None},
        )
        for kind, thing in kinds.items()
        for where, mode, by, gives in WHO_MAY
    ]


UNLINK = [
    *path_cases(_unlink, needs_write=True),
    *_who_may(_unlink, NOT_DIRECTORIES),
    *(
        Case(f"a {kind}", (thing,), (_unlink(b"x"),), None, {b".": "mc"}, {b"x": None})
        for kind, thing in NOT_DIRECTORIES.items()
    ),
    Case("a socket", (), (call("bind", b"x"), _unlink(b"x")), None, None, {b"x": None}),
    Case("a directory", (DIRECTORY,), (_unlink(b"x"),), "EISDIR"),
    Case("a directory and a slash", (DIRECTORY,), (_unlink(b"x/"),), "EISDIR"),
    Case("nothing and a slash", (), (_unlink(b"x/"),), "ENOENT"),
    Case(
        "a directory by a stranger",
        (owned(directory(b"d", 0o777)), _in(b"d", DIRECTORY, OWNER)),
        (_unlink(b"d/x", STRANGER),),
        "EISDIR",
    ),
    Case("a dot", (), (_unlink(b"."),), "EISDIR"),
    Case("two dots", (DIRECTORY,), (_unlink(b"x/.."),), "EISDIR"),
    Case(
        "a link, not what it leads to",
        (FILE, symlink(b"s", b"x")),
        (_unlink(b"s"),),
        None,
        {b".": "mc"},
        {b"x": {"nlink": 1}, b"s": None},
    ),
    Case("a link and a slash", (DIRECTORY, symlink(b"s", b"x")), (_unlink(b"s/"),), "ENOTDIR"),
    Case(
        "one of two names",
        (FILE, hard_link(b"y", b"x")),
        (_unlink(b"x"),),
        None,
        {b".": "mc", b"y": "c"},
        {b"x": None, b"y": {"nlink": 1, "content": b"content"}},
    ),
    Case(
        "two of three names in turn",
        (FILE, hard_link(b"y", b"x"), hard_link(b"z", b"x")),
        (_unlink(b"x"), _unlink(b"z")),
        None,
        {b".": "mc", b"y": "c"},
        {b"y": {"nlink": 1}},
    ),
    Case(
        "a name in another directory",
        (directory(b"a"), directory(b"b"), file(b"a/x"), hard_link(b"b/x", b"a/x")),
        (_unlink(b"b/x"),),
        None,
        {b"b": "mc", b"a/x": "c"},
        {b"a/x": {"nlink": 1}},
    ),
    Case(
        "what is open",
        (FILE,),
        (call("open", b"x", os.O_RDONLY), _unlink(b"x"), call("fstat")),
        (0o100644, 0, 7),
    ),
    Case(
        "and read what was open",
        (FILE,),
        (call("open", b"x", os.O_RDONLY), _unlink(b"x"), call("read", 99)),
        b"content",
    ),
    Case(
        "and write what was open",
        (FILE,),
        (call("open", b"x", os.O_RDWR), _unlink(b"x"), call("write", b"longer than it was"), call("fstat")),
        (0o100644, 0, 18),
    ),
    Case(
        "one of two names of what is open",
        (FILE, hard_link(b"y", b"x")),
        (call("open", b"x", os.O_RDONLY), _unlink(b"x"), call("fstat")),
        (0o100644, 1, 7),
    ),
    Case("twice", (FILE,), (_unlink(b"x"), _unlink(b"x")), "ENOENT"),
    Case(
        "and make it again",
        (FILE,),
        (_unlink(b"x"), call("open", b"x", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)),
        None,
        None,
        {b"x": {"size": 0, "mode": 0o600, "nlink": 1}},
    ),
    Case("and list", (FILE, file(b"y")), (_unlink(b"x"), call("list", b".")), [b"y"]),
    Case(
        "what a program runs from",
        (Member(b"x", b"0", Path("/usr/bin/sleep").read_bytes(), mode=0o755),),
        (call("run", b"x"), _unlink(b"x")),
        None,
        {b".": "mc"},
        {b"x": None},
    ),
]

FULL = {
    "a file": (file(b"x/f"),),
    "a directory": (directory(b"x/d"),),
    "a link to nothing": (symlink(b"x/s", b"none"),),
    "a FIFO": (fifo(b"x/p"),),
    "a name that is hidden": (file(b"x/.h"),),
}
RMDIR = [
    *path_cases(_rmdir, directory, needs_write=True),
    *_who_may(_rmdir, {"directory": DIRECTORY}),
    Case(
        "an empty one",
        (DIRECTORY, directory(b"y")),
        (_rmdir(b"x"),),
        None,
        {b".": "mc"},
        {b"x": None, b".": {"nlink": 3}},
    ),
    Case("with a slash", (DIRECTORY,), (_rmdir(b"x/"),), None, {b".": "mc"}, {b"x": None}),
    *(
        Case(f"with {what} in it", (DIRECTORY, *more), (_rmdir(b"x"),), "ENOTEMPTY")
        for what, more in FULL.items()
    ),
    *(
        Case(
            f"with {what} in it, removed before",
            (DIRECTORY, *more),
            ((_rmdir if more[0].type == b"5" else _unlink)(more[0].path), _rmdir(b"x")),
            None,
            {b".": "mc"},
            {b"x": None},
        )
        for what, more in FULL.items()
    ),
    *(Case(f"a {kind}", (thing,), (_rmdir(b"x"),), "ENOTDIR") for kind, thing in NOT_DIRECTORIES.items()),
    Case("a socket", (), (call("bind", b"x"), _rmdir(b"x")), "ENOTDIR"),
    Case("a link to one", (DIRECTORY, symlink(b"s", b"x")), (_rmdir(b"s"),), "ENOTDIR"),
    Case("a link to one and a slash", (DIRECTORY, symlink(b"s", b"x")), (_rmdir(b"s/"),), "ENOTDIR"),
    Case("a dot", (), (_rmdir(b"."),), "EINVAL"),
    Case("one and a dot", (DIRECTORY,), (_rmdir(b"x/."),), "EINVAL"),
    Case("two dots", (DIRECTORY,), (_rmdir(b"x/.."),), "ENOTEMPTY"),
    Case(
        "what is open",
        (DIRECTORY,),
        (call("open", b"x", os.O_RDONLY), _rmdir(b"x"), call("fstat")),
        (0o40755, 0, 0),
    ),
    Case("one's own place", (DIRECTORY,), (call("chdir", b"x"), _rmdir(b"../x"), call("list", b".")), []),
    Case(
        "and make it again",
        (DIRECTORY,),
        (_rmdir(b"x"), call("mkdir", b"x", 0o700)),
        None,
        {b".": "mc", b"x": "mc"},
        {b"x": {"mode": 0o700, "nlink": 2}, b".": {"nlink": 3}},
    ),
    Case(
        "and make a file there",
        (DIRECTORY,),
        (_rmdir(b"x"), call("mknod", b"x", 0o100600, 0)),
        None,
        None,
        {b"x": {"type": "file"}, b".": {"nlink": 2}},
    ),
    Case("twice", (DIRECTORY,), (_rmdir(b"x"), _rmdir(b"x")), "ENOENT"),
]


def _rename(old: bytes | int, new: bytes | int, by: Identity | None = None) -> Call:
    return call("rename", old, new, by=by)


def _renameat2(old: bytes, new: bytes, flags: int, by: Identity | None = None) -> Call:
    return call("renameat2", old, new, flags, by=by)


def _as(thing: Member, path: bytes) -> Member:
    return replace(thing, path=path)


AREA = owned(directory(b"w", 0o777))
TWO = (directory(b"a"), directory(b"b"))
FULL_X = (DIRECTORY, file(b"x/f", b"inside"), directory(b"x/d"))
RENAME = [
    *path_cases(lambda path, by=None: _rename(path, b"w/new", by), given=(AREA,), needs_write=True),
    *path_cases(
        lambda path, by=None: _rename(b"w/old", path, by),
        None,
        given=(AREA, owned(file(b"w/old"))),
        needs_write=True,
        prefix="to: ",
    ),
    *_who_may(lambda path, by: _rename(path, path + b"y", by), KINDS),
    *(
        Case(
            f"a file over a {kind} in a {where}",
            (
                owned(directory(b"d", mode)),
                _in(b"d", thing, MATE),
                directory(b"e", 0o777),
                owned(file(b"e/y"), by),
            ),
            (_rename(b"e/y", b"d/x", by),),
            gives,
            {} if gives else {b"d": "mc", b"d/x": "c", b"e": "mc"},
        )
        for kind, thing in NOT_DIRECTORIES.items()
        for where, mode, by, gives in WHO_MAY
    ),
    *(
        Case(
            f"a {kind}",
            (thing,),
            (_rename(b"x", b"y"),),
            None,
            {b".": "mc"},
            {b"x": None, b".": {"nlink": 3 if kind == "directory" else 2}},
        )
        for kind, thing in KINDS.items()
    ),
    *(
        Case(
            f"a {kind} to another directory",
            (*TWO, _as(thing, b"a/x")),
            (_rename(b"a/x", b"b/y"),),
            None,
            {b"a": "mc", b"b": "mc"},
            {b"a": {"nlink": 2}, b"b": {"nlink": 3 if kind == "directory" else 2}, b"a/x": None},
        )
        for kind, thing in KINDS.items()
    ),
    Case(
        "a socket",
        (),
        (call("bind", b"x"), _rename(b"x", b"y")),
        None,
        None,
        {b"y": {"type": "socket"}, b"x": None},
    ),
    Case(
        "a directory and what is in it",
        FULL_X,
        (_rename(b"x", b"y"),),
        None,
        {b".": "mc"},
        {b"y/f": {"content": b"inside"}, b"y/d": {"type": "directory"}, b"y": {"nlink": 3}},
    ),
    Case(
        "a directory and what is in it to another",
        (*TWO, *FULL_X),
        (_rename(b"x", b"b/y"),),
        None,
        {b".": "mc", b"b": "mc"},
        {b"b/y/f": {"content": b"inside"}, b"b": {"nlink": 3}, b".": {"nlink": 4}},
    ),
    Case(
        "a directory there and back",
        FULL_X,
        (_rename(b"x", b"y"), _rename(b"y", b"x")),
        None,
        None,
        {b"x/f": {"content": b"inside"}, b".": {"nlink": 3}},
    ),
    Case(
        "a directory's place is another's then",
        FULL_X,
        (_rename(b"x", b"y"), call("mkdir", b"x", 0o700), call("list", b"x")),
        [],
    ),
    *(
        Case(
            f"a {kind} over a {other}",
            (_as(thing, b"x"), _as(there, b"y")),
            (_rename(b"x", b"y"),),
            None,
            {b".": "mc"} | ({b"y": "c"}),
            {b"x": None},
        )
        for kind, thing in NOT_DIRECTORIES.items()
        for other, there in NOT_DIRECTORIES.items()
    ),
    *(
        Case(f"a {kind} over a directory", (thing, directory(b"y")), (_rename(b"x", b"y"),), "EISDIR")
        for kind, thing in NOT_DIRECTORIES.items()
    ),
    *(
        Case(f"a directory over a {kind}", (DIRECTORY, _as(thing, b"y")), (_rename(b"x", b"y"),), "ENOTDIR")
        for kind, thing in NOT_DIRECTORIES.items()
    ),
    Case(
        "a directory over a link to a directory",
        (DIRECTORY, directory(b"d"), symlink(b"y", b"d")),
        (_rename(b"x", b"y"),),
        "ENOTDIR",
    ),
    Case(
        "a directory over an empty one",
        (*FULL_X, directory(b"y")),
        (_rename(b"x", b"y"),),
        None,
        {b".": "mc", b"y": "c"},
        {b".": {"nlink": 3}, b"y/f": {"content": b"inside"}},
    ),
    *(
        Case(
            f"a directory over one with {what} in it",
            (directory(b"z"), DIRECTORY, *more),
            (_rename(b"z", b"x"),),
            "ENOTEMPTY",
        )
        for what, more in FULL.items()
    ),
    Case(
        "over one of two names",
        (FILE, file(b"y", b"there"), hard_link(b"z", b"y")),
        (_rename(b"x", b"y"),),
        None,
        {b".": "mc", b"y": "c", b"z": "c"},
        {b"y": {"content": b"content"}, b"z": {"nlink": 1, "content": b"there"}},
    ),
    Case(
        "over what is open",
        (FILE, file(b"y", b"there")),
        (call("open", b"y", os.O_RDONLY), _rename(b"x", b"y"), call("fstat")),
        (0o100644, 0, 5),
    ),
    Case(
        "and read what was open",
        (FILE, file(b"y", b"there")),
        (call("open", b"y", os.O_RDONLY), _rename(b"x", b"y"), call("read", 99)),
        b"there",
    ),
    Case(
        "over a directory that is open",
        (DIRECTORY, directory(b"y")),
        (call("open", b"y", os.O_RDONLY), _rename(b"x", b"y"), call("fstat")),
        (0o40755, 0, 0),
    ),
    Case(
        "what is open",
        (FILE,),
        (call("open", b"x", os.O_RDONLY), _rename(b"x", b"y"), call("fstat")),
        (0o100644, 1, 7),
    ),
    Case("to its own name", (FILE,), (_rename(b"x", b"x"),), None, {}),
    Case("a directory to its own name", FULL_X, (_rename(b"x", b"x"),), None, {}),
    Case(
        "to another of its names",
        (FILE, hard_link(b"y", b"x")),
        (_rename(b"x", b"y"),),
        None,
        {},
        {b"x": {"nlink": 2}, b"y": {"nlink": 2}},
    ),
    Case(
        "one of two names",
        (FILE, hard_link(b"y", b"x")),
        (_rename(b"x", b"z"),),
        None,
        {b".": "mc", b"y": "c"},
        {b"z": {"nlink": 2}},
    ),
    Case("into itself", (DIRECTORY,), (_rename(b"x", b"x/y"),), "EINVAL"),
    Case("into what is in it", FULL_X, (_rename(b"x", b"x/d/y"),), "EINVAL"),
    Case("over what it is in", FULL_X, (_rename(b"x/d", b"x"),), "ENOTEMPTY"),
    Case("a file over what it is in", FULL_X, (_rename(b"x/f", b"x"),), "ENOTEMPTY"),
    *(
        Case(f"{what}", (DIRECTORY, file(b"f")), (_rename(old, new),), "EBUSY")
        for what, old, new in (
            ("a dot", b".", b"y"),
            ("a directory and a dot", b"x/.", b"y"),
            ("two dots", b"x/..", b"y"),
            ("to a dot", b"x", b"."),
            ("to two dots", b"f", b"x/.."),
        )
    ),
    Case("a file to a slash", (FILE,), (_rename(b"x", b"y/"),), "ENOTDIR"),
    Case(
        "a directory to a slash",
        (DIRECTORY,),
        (_rename(b"x", b"y/"),),
        None,
        {b".": "mc"},
        {b"y": {"type": "directory"}},
    ),
    Case(
        "a directory with a slash",
        (DIRECTORY,),
        (_rename(b"x/", b"y"),),
        None,
        {b".": "mc"},
        {b"y": {"type": "directory"}},
    ),
    Case(
        "a link, not what it leads to",
        (FILE, symlink(b"s", b"x")),
        (_rename(b"s", b"y"),),
        None,
        {b".": "mc"},
        {b"y": {"type": "symlink"}},
    ),
    Case(
        "to a link, not what it leads to",
        (FILE, file(b"t"), symlink(b"s", b"x")),
        (_rename(b"t", b"s"),),
        None,
        None,
        {b"s": {"type": "file", "size": 0}, b"x": {"size": 7}},
    ),
    Case(
        "a directory that cannot be written, to another by its owner",
        (owned(directory(b"a")), owned(directory(b"b")), owned(directory(b"a/x", 0o555))),
        (_rename(b"a/x", b"b/x", OWNER),),
        "EACCES",
    ),
    Case(
        "a directory that cannot be written, to another by root",
        (owned(directory(b"a")), owned(directory(b"b")), owned(directory(b"a/x", 0o555))),
        (_rename(b"a/x", b"b/x", ROOT),),
        None,
    ),
    Case(
        "a directory that cannot be written, within its own by its owner",
        (owned(directory(b"a")), owned(directory(b"a/x", 0o555))),
        (_rename(b"a/x", b"a/y", OWNER),),
        None,
        {b"a": "mc"},
    ),
    Case(
        "a file that cannot be written, to another directory",
        (owned(directory(b"a")), owned(directory(b"b")), owned(file(b"a/x", mode=0))),
        (_rename(b"a/x", b"b/x", OWNER),),
        None,
        {b"a": "mc", b"b": "mc"},
    ),
    Case(
        "what a program runs from",
        (Member(b"x", b"0", Path("/usr/bin/sleep").read_bytes(), mode=0o755),),
        (call("run", b"x"), _rename(b"x", b"y")),
        None,
        {b".": "mc"},
        {b"x": None},
        differs="atime: reads of what the kernel has cached do not come to the file below",
    ),
    Case("a file onto no address", (FILE,), (_rename(b"x", BAD_ADDRESS),), "EFAULT"),
    # renameat2(2)
    *(
        Case(
            f"NOREPLACE over a {kind}",
            (file(b"f"), thing),
            (_renameat2(b"f", b"x", RENAME_NOREPLACE),),
            "EEXIST",
        )
        for kind, thing in {**KINDS, "link to itself": symlink(b"x", b"x")}.items()
    ),
    *(
        Case(
            f"NOREPLACE of a {kind}",
            (thing,),
            (_renameat2(b"x", b"y", RENAME_NOREPLACE),),
            None,
            {b".": "mc"},
            {b"x": None},
        )
        for kind, thing in KINDS.items()
    ),
    Case("NOREPLACE to its own name", (FILE,), (_renameat2(b"x", b"x", RENAME_NOREPLACE),), "EEXIST"),
    *(
        Case(
            f"EXCHANGE of a {kind} with a {other}",
            (*TWO, _as(thing, b"a/x"), _as(there, b"b/y")),
            (_renameat2(b"a/x", b"b/y", RENAME_EXCHANGE),),
            None,
            {b"a": "mc", b"b": "mc", b"a/x": "c", b"b/y": "c"},
            {
                b"a": {"nlink": 3 if other == "directory" else 2},
                b"b": {"nlink": 3 if kind == "directory" else 2},
            },
        )
        for kind, thing in KINDS.items()
        for other, there in KINDS.items()
    ),
    Case(
        "EXCHANGE of full directories",
        (*FULL_X, directory(b"y"), file(b"y/g")),
        (_renameat2(b"x", b"y", RENAME_EXCHANGE),),
        None,
        {b".": "mc", b"x": "c", b"y": "c"},
        {b"y/f": {"content": b"inside"}, b"x/g": {"size": 0}},
    ),
    Case("EXCHANGE with nothing", (FILE,), (_renameat2(b"x", b"y", RENAME_EXCHANGE),), "ENOENT"),
    Case("EXCHANGE with what is in it", FULL_X, (_renameat2(b"x", b"x/d", RENAME_EXCHANGE),), "EINVAL"),
    Case("EXCHANGE with what it is in", FULL_X, (_renameat2(b"x/f", b"x", RENAME_EXCHANGE),), "EINVAL"),
    Case("EXCHANGE with itself", (FILE,), (_renameat2(b"x", b"x", RENAME_EXCHANGE),), None, {}),
    Case(
        "EXCHANGE in a sticky directory by a stranger",
        (owned(directory(b"d", 0o1777)), _in(b"d", FILE, MATE), owned(file(b"d/y"), STRANGER)),
        (_renameat2(b"d/x", b"d/y", RENAME_EXCHANGE, STRANGER),),
        "EPERM",
    ),
    Case(
        "EXCHANGE and NOREPLACE",
        (FILE, file(b"y")),
        (_renameat2(b"x", b"y", RENAME_EXCHANGE | RENAME_NOREPLACE),),
        "EINVAL",
    ),
    Case("an unknown flag", (FILE,), (_renameat2(b"x", b"y", 64),), "EINVAL"),
    Case(
        "WHITEOUT",
        (FILE,),
        (_renameat2(b"x", b"y", RENAME_WHITEOUT, ROOT),),
        "EINVAL",
        differs="whiteouts are the union's own",
    ),
]

TABLES = {"unlink": UNLINK, "rmdir": RMDIR, "rename": RENAME}

judge, test_root, test_a_plain_user = judging("moving", TABLES)
