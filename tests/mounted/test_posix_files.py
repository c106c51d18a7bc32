"""Calls that open and size files, in a rootfs: by the manual pages and beside the file system below."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from rig.layers import Member, directory, file, hard_link, symlink
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

READ, WRITE, BOTH = os.O_RDONLY, os.O_WRONLY, os.O_RDWR
CREATE, NEW, EMPTY = os.O_CREAT, os.O_CREAT | os.O_EXCL, os.O_TRUNC
PROGRAM = Member(b"x", b"0", Path("/usr/bin/sleep").read_bytes(), mode=0o755)
NOT_CACHED = "atime: reads of what the kernel has cached do not come to the file below"


def _open(path: bytes | int, flags: int, by: Identity | None = None, mode: int = 0o644) -> Call:
    return call("open", path, flags, mode, by=by)


def _read(path: bytes | int, by: Identity | None = None) -> Call:
    return _open(path, READ, by)


def _create(path: bytes | int, by: Identity | None = None) -> Call:
    return _open(path, CREATE | WRITE, by)


CLASSES = (
    # Who, and which of a file's three bits of OWNER's are theirs.
    ("its owner", OWNER, 6),
    ("one of its group", MATE, 3),
    ("one of its group by a supplementary one", MEMBER, 3),
    ("a stranger", STRANGER, 0),
)
ACCESS = {"reading": (READ, 4), "writing": (WRITE, 2), "both": (BOTH, 6)}


def _by_class(kind: str, thing: Member, access: dict[str, tuple[int, int]]) -> list[Case]:
    """Each class of users has its own bits and no others': who has fewer than the rest is refused."""
    return [
        Case(
            f"a {kind} of {mode:04o} for {what} by {who}",
            (owned(replace(thing, mode=mode)),),
            (_open(b"x", flags, by),),
            None if mode >> shift & needed == needed else "EACCES",
        )
        for what, (flags, needed) in access.items()
        for who, by, shift in CLASSES
        for mode in (*(bits << shift for bits in range(8)), 0o777 & ~(7 << shift))
    ]


OPEN = [
    *path_cases(_read),
    *path_cases(_create, None, needs_write=True, prefix="to create: "),
    *_by_class("file", FILE, ACCESS),
    *_by_class("directory", DIRECTORY, {"reading": (READ, 4)}),
    *_by_class("FIFO", KINDS["FIFO"], {"both": (BOTH, 6)}),
    *(
        Case(
            f"a file of 0000 for {what} by root", (owned(replace(FILE, mode=0)),), (_open(b"x", flags, ROOT),)
        )
        for what, (flags, _) in ACCESS.items()
    ),
    *(
        Case(f"a directory {what}", (DIRECTORY,), (_open(b"x", flags),), "EISDIR")
        for what, flags in (
            ("for writing", WRITE),
            ("for both", BOTH),
            ("to empty it", READ | EMPTY),
            ("to create it", READ | CREATE),
        )
    ),
    Case("a directory to create it anew", (DIRECTORY,), (_open(b"x", NEW | READ),), "EEXIST"),
    Case("a directory as one", (DIRECTORY,), (_open(b"x", os.O_DIRECTORY),), None, {}),
    Case("to create a directory", (), (_open(b"x", CREATE | os.O_DIRECTORY),), "EINVAL"),
    *(
        Case(f"a {kind} as a directory", (thing,), (_open(b"x", os.O_DIRECTORY),), gives)
        for kind, thing, gives in (
            ("file", FILE, "ENOTDIR"),
            ("FIFO", KINDS["FIFO"], "ENOTDIR"),
            ("link to nothing", symlink(b"x", b"none"), "ENOENT"),
        )
    ),
    Case(
        "a link to a directory as a directory",
        (DIRECTORY, symlink(b"s", b"x")),
        (_open(b"s", os.O_DIRECTORY),),
        None,
        {},
    ),
    Case(
        "a link to a directory as a directory, not followed",
        (DIRECTORY, symlink(b"s", b"x")),
        (_open(b"s", os.O_DIRECTORY | os.O_NOFOLLOW),),
        "ENOTDIR",
    ),
    Case("a link, not followed", (FILE, symlink(b"s", b"x")), (_open(b"s", os.O_NOFOLLOW),), "ELOOP"),
    Case(
        "a link, not followed, to create it",
        (symlink(b"s", b"x"),),
        (_open(b"s", CREATE | WRITE | os.O_NOFOLLOW),),
        "ELOOP",
    ),
    Case("a file, no link followed", (FILE,), (_open(b"x", os.O_NOFOLLOW),), None, {}),
    Case(
        "a link itself",
        (FILE, symlink(b"s", b"x")),
        (_open(b"s", os.O_NOFOLLOW | os.O_PATH), call("fstat")),
        (0o120777, 1, 1),
        {},
    ),
    Case("a link to itself", (symlink(b"s", b"s"),), (_open(b"s", READ),), "ELOOP"),
    *(
        Case(
            f"a {kind} to create it anew",
            (FILE if kind == "file" else thing,),
            (_open(b"x", NEW | WRITE),),
            "EEXIST",
        )
        for kind, thing in {
            **KINDS,
            "link to nothing": symlink(b"x", b"none"),
            "link to itself": symlink(b"x", b"x"),
        }.items()
    ),
    Case(
        "to create what a link leads to",
        (symlink(b"s", b"y"),),
        (_open(b"s", CREATE | WRITE),),
        None,
        {b".": "mc"},
        {b"y": {"type": "file", "size": 0}, b"s": {"type": "symlink"}},
    ),
    Case(
        "to create what a link to itself leads to",
        (symlink(b"s", b"s"),),
        (_open(b"s", CREATE | WRITE),),
        "ELOOP",
    ),
    Case(
        "to create what a link leads to below nothing",
        (symlink(b"s", b"none/y"),),
        (_open(b"s", CREATE | WRITE),),
        "ENOENT",
    ),
    Case("to create with a slash", (), (_open(b"x/", CREATE | WRITE),), "EISDIR"),
    Case("a FIFO that nobody reads", (KINDS["FIFO"],), (_open(b"x", WRITE | os.O_NONBLOCK),), "ENXIO"),
    Case("a FIFO that nobody writes", (KINDS["FIFO"],), (_open(b"x", READ | os.O_NONBLOCK),), None, {}),
    Case("a socket", (), (call("bind", b"x"), _open(b"x", BOTH)), "ENXIO"),
    *(
        Case(
            f"to empty a file of {size} bytes for {what}",
            (file(b"x", b"c" * size),),
            (_open(b"x", flags | EMPTY),),
            None,
            {b"x": "mc"},
            {b"x": {"size": 0}},
        )
        for size in (0, 7)
        for what, (flags, _) in ACCESS.items()
    ),
    Case(
        "to empty one that cannot be written",
        (owned(file(b"x", b"content", 0o555)),),
        (_open(b"x", READ | EMPTY, OWNER),),
        "EACCES",
        None,
        {b"x": {"content": b"content"}},
    ),
    Case(
        "to empty one that can only be written",
        (owned(file(b"x", b"content", 0o200)),),
        (_open(b"x", WRITE | EMPTY, OWNER),),
        None,
        {b"x": "mc"},
        {b"x": {"size": 0}},
    ),
    Case(
        "to empty one of two names",
        (FILE, hard_link(b"y", b"x")),
        (_open(b"y", WRITE | EMPTY),),
        None,
        {b"x": "mc", b"y": "mc"},
        {b"x": {"size": 0, "nlink": 2}},
    ),
    Case(
        "to empty what cannot be created anew",
        (FILE,),
        (_open(b"x", NEW | WRITE | EMPTY),),
        "EEXIST",
        None,
        {b"x": {"size": 7}},
    ),
    Case(
        "to create something new",
        (),
        (_create(b"x"),),
        None,
        {b".": "mc"},
        {
            b"x": {"type": "file", "mode": 0o644, "nlink": 1, "size": 0, "times": (NOW, NOW, NOW)},
            b".": {"nlink": 2},
        },
    ),
    Case(
        "to create what is there",
        (FILE,),
        (_open(b"x", CREATE | READ, None, 0o7777),),
        None,
        {},
        {b"x": {"mode": 0o644}},
    ),
    *(
        Case(
            f"to create of {mode:04o} under {mask:03o}",
            (),
            (call("umask", mask), _open(b"x", CREATE | WRITE, None, mode)),
            None,
            None,
            {b"x": {"mode": mode & ~mask}},
        )
        for mode in (0o0000, 0o0151, 0o0644, 0o1777, 0o2777, 0o4777)
        for mask in (0o000, 0o022, 0o077, 0o777)
    ),
    *(
        Case(
            f"to create by {who}",
            (directory(b"d", 0o777),),
            (_create(b"d/x", by),),
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
            f"to create of {mode:04o} in a set-group-ID directory by {who}",
            (replace(directory(b"d", 0o2777), gid=OTHER_GROUP),),
            (_open(b"d/x", CREATE | WRITE, by, mode),),
            None,
            {b"d": "mc"},
            {b"d/x": {"gid": OTHER_GROUP, "mode": left}},
        )
        for who, by, mode, left in (
            ("root", ROOT, 0o2755, 0o2755),
            ("a stranger", STRANGER, 0o644, 0o644),
            ("a stranger", STRANGER, 0o2755, 0o755),
            ("a stranger", STRANGER, 0o2744, 0o2744),
            ("one of its group", Identity(7, 8, (OTHER_GROUP,)), 0o2755, 0o2755),
        )
    ),
    Case(
        "to create and write what then cannot be opened",
        (owned(directory(b"d")),),
        (_open(b"d/x", CREATE | WRITE, OWNER, 0), call("write", b"new", by=OWNER)),
        3,
        {b"d": "mc"},
        {b"d/x": {"mode": 0, "content": b"new"}},
    ),
    Case(
        "what was created so",
        (owned(directory(b"d")),),
        (_open(b"d/x", CREATE | WRITE, OWNER, 0), _open(b"d/x", WRITE, OWNER)),
        "EACCES",
    ),
    *(
        Case(
            f"without atime by {who}",
            (owned(replace(FILE, mode=0o666)),),
            (_open(b"x", READ | os.O_NOATIME, by),),
            gives,
            {},
        )
        for who, by, gives in (
            ("its owner", OWNER, None),
            ("root", ROOT, None),
            ("a stranger", STRANGER, "EPERM"),
        )
    ),
    Case(
        "and read, without atime",
        (FILE,),
        (_open(b"x", READ | os.O_NOATIME), call("read", 99)),
        b"content",
        {},
    ),
    Case("for writing, and read", (FILE,), (_open(b"x", WRITE), call("read", 99)), "EBADF", {}),
    Case("for reading, and write", (FILE,), (_open(b"x", READ), call("write", b"new")), "EBADF", {}),
    Case(
        "for writing, and write",
        (FILE,),
        (_open(b"x", WRITE), call("write", b"new")),
        3,
        {b"x": "mc"},
        {b"x": {"content": b"newtent"}},
    ),
    Case(
        "to append, and write",
        (FILE,),
        (_open(b"x", WRITE | os.O_APPEND), call("write", b"more")),
        4,
        {b"x": "mc"},
        {b"x": {"content": b"contentmore"}},
    ),
    Case("for writing, and write nothing", (FILE,), (_open(b"x", WRITE), call("write", b"")), 0, {}),
    Case("and fstat", (FILE,), (_open(b"x", READ), call("fstat")), (0o100644, 1, 7), {}),
    Case("a file too often for one process", (FILE,), (call("limit_files"), _open(b"x", READ)), "EMFILE", {}),
    *(
        Case(
            f"a running program for {what}",
            (PROGRAM,),
            (call("run", b"x"), _open(b"x", flags)),
            "ETXTBSY",
            None,
            {b"x": {"content": PROGRAM.content}},
            differs=NOT_CACHED,
        )
        for what, flags in (
            ("writing", WRITE),
            ("both", BOTH),
            ("writing, to empty it", WRITE | EMPTY),
            ("reading, to empty it", READ | EMPTY),
        )
    ),
    Case(
        "a running program for reading",
        (PROGRAM,),
        (call("run", b"x"), _open(b"x", READ)),
        None,
        differs=NOT_CACHED,
    ),
    Case(
        "what is open for writing as a program",
        (PROGRAM,),
        (_open(b"x", WRITE), call("run", b"x")),
        "ETXTBSY",
        {},
    ),
    Case("and seek data", (FILE,), (_open(b"x", READ), call("lseek", 0, os.SEEK_DATA)), 0, {}),
    Case("and seek a hole", (FILE,), (_open(b"x", READ), call("lseek", 0, os.SEEK_HOLE)), 7, {}),
    Case(
        "and seek data at the end",
        (FILE,),
        (_open(b"x", READ), call("lseek", 7, os.SEEK_DATA)),
        "ENXIO",
        {},
    ),
    Case(
        "without a name",
        (),
        (_open(b".", os.O_TMPFILE | BOTH),),
        "ENOTSUP",
        {},
        differs="pyfuse3 has no tmpfile",
    ),
    Case("without a name for reading", (), (_open(b".", os.O_TMPFILE | READ),), "EINVAL"),
]


def _truncate(path: bytes | int, by: Identity | None = None, size: int = 3) -> Call:
    return call("truncate", path, size, by=by)


UNCHANGED = "the kernel keeps the times, and those of a file that keeps its size (POSIX asks for no more)"
SIZES = (
    # Size of the file, new size, content then.
    ("to nothing", 0, b""),
    ("shorter", 3, b"con"),
    ("longer", 10, b"content\0\0\0"),
    ("a page longer", 7 + 4096, b"content" + bytes(4096)),
)
TRUNCATE = [
    *path_cases(_truncate),
    *(
        Case(
            f"{what}",
            (FILE,),
            (_truncate(b"x", None, size),),
            None,
            {b"x": "mc"},
            {b"x": {"size": size, "content": content}},
        )
        for what, size, content in SIZES
    ),
    Case(
        "to its own size",
        (FILE,),
        (_truncate(b"x", None, 7),),
        None,
        None,
        {b"x": {"content": b"content"}},
        differs=UNCHANGED,
    ),
    Case(
        "an empty file to nothing",
        (file(b"x"),),
        (_truncate(b"x", None, 0),),
        None,
        None,
        {b"x": {"size": 0}},
        differs=UNCHANGED,
    ),
    Case(
        "shorter and longer",
        (FILE,),
        (_truncate(b"x", None, 3), _truncate(b"x", None, 7)),
        None,
        {b"x": "mc"},
        {b"x": {"content": b"con\0\0\0\0"}},
    ),
    Case(
        "to a tebibyte",
        (FILE,),
        (_truncate(b"x", None, 1 << 40),),
        None,
        {b"x": "mc"},
        {b"x": {"size": 1 << 40}},
    ),
    Case("below nothing", (FILE,), (_truncate(b"x", None, -1),), "EINVAL"),
    Case("beyond what a file can be", (FILE,), (_truncate(b"x", None, (1 << 63) - 1),), "EFBIG"),
    Case(
        "beyond the process's limit",
        (FILE,),
        (call("limit_size", 100), _truncate(b"x", None, 101)),
        "EFBIG",
        {},
    ),
    Case(
        "to the process's limit",
        (FILE,),
        (call("limit_size", 100), _truncate(b"x", None, 100)),
        None,
        {b"x": "mc"},
    ),
    Case("a directory", (DIRECTORY,), (_truncate(b"x"),), "EISDIR"),
    Case("a FIFO", (KINDS["FIFO"],), (_truncate(b"x"),), "EINVAL"),
    Case("a device", (KINDS["device"],), (_truncate(b"x"),), "EINVAL"),
    Case("a socket", (), (call("bind", b"x"), _truncate(b"x")), "EINVAL"),
    Case(
        "through a link",
        (FILE, symlink(b"s", b"x")),
        (_truncate(b"s"),),
        None,
        {b"x": "mc"},
        {b"x": {"size": 3}},
    ),
    Case("through a link to nothing", (symlink(b"s", b"none"),), (_truncate(b"s"),), "ENOENT"),
    Case("through a link to itself", (symlink(b"s", b"s"),), (_truncate(b"s"),), "ELOOP"),
    Case(
        "one of two names",
        (FILE, hard_link(b"y", b"x")),
        (_truncate(b"y"),),
        None,
        {b"x": "mc", b"y": "mc"},
        {b"x": {"size": 3, "nlink": 2}},
    ),
    *(
        Case(
            f"one of {mode:04o} by {who}",
            (owned(replace(FILE, mode=mode)),),
            (_truncate(b"x", by),),
            None if mode >> shift & 2 else "EACCES",
        )
        for who, by, shift in CLASSES
        for mode in (2 << shift, 5 << shift, 0o777 & ~(2 << shift))
    ),
    Case(
        "one of 0000 by root", (owned(replace(FILE, mode=0)),), (_truncate(b"x", ROOT),), None, {b"x": "mc"}
    ),
    Case(
        "a running program",
        (PROGRAM,),
        (call("run", b"x"), _truncate(b"x")),
        "ETXTBSY",
        None,
        {b"x": {"content": PROGRAM.content}},
        differs=NOT_CACHED,
    ),
    Case(
        "what is open",
        (FILE,),
        (_open(b"x", READ), _truncate(b"x"), call("fstat")),
        (0o100644, 1, 3),
        {b"x": "mc"},
    ),
    Case(
        "what was written just now",
        (FILE,),
        (_open(b"x", WRITE), call("write", b"new content"), _truncate(b"x", None, 5)),
        None,
        {b"x": "mc"},
        {b"x": {"content": b"new c"}},
    ),
]


def _ftruncate(size: int = 3, by: Identity | None = None) -> Call:
    return call("ftruncate", size, by=by)


FTRUNCATE = [
    *(
        Case(
            f"{what} when open for {access}",
            (FILE,),
            (_open(b"x", flags), _ftruncate(size)),
            None,
            {b"x": "mc"},
            {b"x": {"size": size, "content": content}},
        )
        for access, flags in (("writing", WRITE), ("both", BOTH), ("appending", WRITE | os.O_APPEND))
        for what, size, content in SIZES
    ),
    Case(
        "to its own size",
        (FILE,),
        (_open(b"x", WRITE), _ftruncate(7)),
        None,
        {b"x": "mc"},
        {b"x": {"content": b"content"}},
    ),
    Case(
        "to a tebibyte",
        (FILE,),
        (_open(b"x", WRITE), _ftruncate(1 << 40)),
        None,
        {b"x": "mc"},
        {b"x": {"size": 1 << 40}},
    ),
    Case("below nothing", (FILE,), (_open(b"x", WRITE), _ftruncate(-1)), "EINVAL", {}),
    Case("beyond what a file can be", (FILE,), (_open(b"x", WRITE), _ftruncate((1 << 63) - 1)), "EFBIG", {}),
    Case(
        "beyond the process's limit",
        (FILE,),
        (call("limit_size", 100), _open(b"x", WRITE), _ftruncate(101)),
        "EFBIG",
        {},
    ),
    Case("what is open for reading", (FILE,), (_open(b"x", READ), _ftruncate()), "EINVAL", {}),
    Case("what is open as a path", (FILE,), (_open(b"x", os.O_PATH), _ftruncate()), "EBADF", {}),
    Case("a directory", (DIRECTORY,), (_open(b"x", READ), _ftruncate()), "EINVAL", {}),
    Case("a FIFO", (KINDS["FIFO"],), (_open(b"x", BOTH), _ftruncate()), "EINVAL", {}),
    Case(
        "what nobody may open any more",
        (owned(FILE),),
        (_open(b"x", BOTH, OWNER), call("chmod", b"x", 0), _ftruncate(3, OWNER)),
        None,
        {b"x": "mc"},
        {b"x": {"size": 3, "mode": 0}},
    ),
    Case(
        "what was created so",
        (owned(directory(b"d")),),
        (_open(b"d/x", CREATE | BOTH, OWNER, 0), _ftruncate(5, OWNER)),
        None,
        {b"d": "mc"},
        {b"d/x": {"size": 5, "mode": 0}},
    ),
    Case(
        "what was opened by another",
        (owned(FILE),),
        (_open(b"x", WRITE), _ftruncate(3, STRANGER)),
        None,
        {b"x": "mc"},
        {b"x": {"size": 3}},
    ),
    Case(
        "what was removed",
        (FILE,),
        (_open(b"x", BOTH), call("unlink", b"x"), _ftruncate(), call("fstat")),
        (0o100644, 0, 3),
    ),
    Case(
        "one of two names",
        (FILE, hard_link(b"y", b"x")),
        (_open(b"y", WRITE), _ftruncate()),
        None,
        {b"x": "mc", b"y": "mc"},
        {b"x": {"size": 3}},
    ),
    Case(
        "what was written just now",
        (FILE,),
        (_open(b"x", WRITE), call("write", b"new content"), _ftruncate(5)),
        None,
        {b"x": "mc"},
        {b"x": {"content": b"new c"}},
    ),
    Case(
        "and write",
        (FILE,),
        (_open(b"x", WRITE), _ftruncate(0), call("write", b"ab")),
        2,
        {b"x": "mc"},
        {b"x": {"content": b"ab"}},
    ),
]


def _allocate(offset: int, length: int, by: Identity | None = None) -> Call:
    return call("posix_fallocate", offset, length, by=by)


EMULATED = (
    "without fallocate(2) glibc reads what is there, if it may, and writes zeros where there is nothing"
)
POSIX_FALLOCATE = [
    *(
        Case(
            f"{what} of a file open for {access}",
            (FILE,),
            (_open(b"x", flags), _allocate(offset, length)),
            None,
            {b"x": "mc"} if flags == WRITE else None,
            {b"x": {"content": b"content".ljust(offset + length, b"\0")}},
            differs="" if flags == WRITE else EMULATED,
        )
        for access, flags in (("writing", WRITE), ("both", BOTH))
        for what, offset, length in (
            ("more than all", 0, 10),
            ("the end", 7, 1),
            ("beyond the end", 20, 30),
            ("some pages", 0, 20000),
        )
    ),
    Case(
        "all of an empty file",
        (file(b"x"),),
        (_open(b"x", WRITE), _allocate(0, 567)),
        None,
        {b"x": "mc"},
        {b"x": {"size": 567}},
    ),
    Case(
        "of a new file",
        (),
        (_open(b"x", CREATE | WRITE), _allocate(10, 10)),
        None,
        {b".": "mc"},
        {b"x": {"content": bytes(20)}},
    ),
    Case(
        "what is there",
        (FILE,),
        (_open(b"x", BOTH), _allocate(2, 3)),
        None,
        None,
        {b"x": {"content": b"content"}},
        differs=EMULATED,
    ),
    Case(
        "what is a hole",
        (),
        (_open(b"x", CREATE | BOTH), call("ftruncate", 100), _allocate(10, 50)),
        None,
        {b".": "mc"},
        {b"x": {"content": bytes(100)}},
    ),
    *(
        Case(f"{what}", (FILE,), (_open(b"x", flags), _allocate(offset, length)), gives, {})
        for what, flags, offset, length, gives in (
            ("nothing", BOTH, 0, 0, "EINVAL"),
            ("less than nothing", BOTH, 0, -1, "EINVAL"),
            ("before the beginning", BOTH, -1, 10, "EINVAL"),
            ("more than a file can be", BOTH, 1, (1 << 63) - 1, "EFBIG"),
            ("of a file open for reading", READ, 0, 10, "EBADF"),
            ("of what is open as a path", os.O_PATH, 0, 10, "EBADF"),
        )
    ),
    Case("of a directory", (DIRECTORY,), (_open(b"x", READ), _allocate(0, 10)), "EBADF", {}),
    Case("of a FIFO", (KINDS["FIFO"],), (_open(b"x", BOTH), _allocate(0, 10)), "ESPIPE", {}),
    Case(
        "beyond the process's limit",
        (FILE,),
        (call("limit_size", 100), _open(b"x", WRITE), _allocate(0, 101)),
        "EFBIG",
        differs=EMULATED,
    ),
    Case(
        "of what was removed",
        (FILE,),
        (_open(b"x", BOTH), call("unlink", b"x"), _allocate(0, 100), call("fstat")),
        (0o100644, 0, 100),
    ),
    Case(
        "of what nobody may open any more",
        (owned(directory(b"d")),),
        (_open(b"d/x", CREATE | BOTH, OWNER, 0), _allocate(0, 5, OWNER)),
        None,
        {b"d": "mc"},
        {b"d/x": {"size": 5}},
    ),
]

TABLES = {"open": OPEN, "truncate": TRUNCATE, "ftruncate": FTRUNCATE, "posix_fallocate": POSIX_FALLOCATE}

judge, test_root, test_a_plain_user = judging("files", TABLES)
