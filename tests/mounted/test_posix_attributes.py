"""chmod, chown and utimensat in a rootfs: by the manual pages and beside the file system below."""

import os
from dataclasses import replace

import pytest
from rig.layers import Member, hard_link, symlink
from rig.posix import KEPT, NOW, Call, Case, Identity, call, judging
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

UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2
FOLLOWED = {kind: thing for kind, thing in KINDS.items() if kind != "link"}


def _chmod(path: bytes | int, by: Identity | None = None, mode: int = 0o640) -> Call:
    return call("chmod", path, mode, by=by)


def _of_group(member: Member, gid: int) -> Member:
    return replace(member, uid=OWNER.uid, gid=gid)


CHMOD = [
    *path_cases(_chmod),
    *(
        Case(
            f"{kind} to {mode:04o}",
            (thing,),
            (_chmod(b"x", None, mode),),
            None,
            {b"x": "c"},
            {b"x": {"mode": mode}},
        )
        for kind, thing in FOLLOWED.items()
        for mode in (0o0000, 0o0111, 0o1755, 0o2755, 0o4755, 0o7777)
    ),
    *(
        Case(
            f"{kind} by {who}",
            (owned(thing),),
            (_chmod(b"x", by, 0o1700),),
            gives,
            {b"x": "c"} if gives is None else {},
        )
        for kind, thing in FOLLOWED.items()
        for who, by, gives in (
            ("its owner", OWNER, None),
            ("root", ROOT, None),
            ("one of its group", MATE, "EPERM"),
            ("one of its group by a supplementary one", MEMBER, "EPERM"),
            ("a stranger", STRANGER, "EPERM"),
        )
    ),
    *(
        Case(
            f"set-group-ID of {kind} by {who}",
            (_of_group(replace(thing, uid=by.uid), gid),),
            (_chmod(b"x", by, 0o2755),),
            after={b"x": {"mode": mode}},
        )
        for kind, thing in FOLLOWED.items()
        for who, by, gid, mode in (
            ("an owner in its group", OWNER, OWNER.gid, 0o2755),
            ("an owner not in its group", OWNER, OTHER_GROUP, 0o755),
            ("root", ROOT, OTHER_GROUP, 0o2755),
        )
    ),
    Case(
        "set-group-ID by an owner in its group by a supplementary one",
        (replace(FILE, uid=MEMBER.uid, gid=OWNER.gid),),
        (_chmod(b"x", MEMBER, 0o2755),),
        after={b"x": {"mode": 0o2755}},
    ),
    Case("the same again", (FILE,), (_chmod(b"x", None, 0o644),), None, {b"x": "c"}),
    Case(
        "through a link",
        (FILE, symlink(b"s", b"x")),
        (_chmod(b"s"),),
        None,
        {b"x": "c"},
        {b"x": {"mode": 0o640}},
    ),
    Case("through a link to nothing", (symlink(b"s", b"none"),), (_chmod(b"s"),), "ENOENT"),
    Case("through a link to itself", (symlink(b"s", b"s"),), (_chmod(b"s"),), "ELOOP"),
    Case(
        "one of two names",
        (FILE, hard_link(b"y", b"x")),
        (_chmod(b"y"),),
        None,
        {b"x": "c", b"y": "c"},
        {b"x": {"mode": 0o640, "nlink": 2}},
    ),
    Case(
        "fchmod of a file open for reading",
        (FILE,),
        (call("open", b"x", os.O_RDONLY), call("fchmod", 0o400)),
        None,
        {b"x": "c"},
        {b"x": {"mode": 0o400}},
    ),
    Case(
        "fchmod of an O_PATH descriptor",
        (FILE,),
        (call("open", b"x", os.O_PATH), call("fchmod", 0o400)),
        "EBADF",
        {},
    ),
    Case(
        "fchmod of a directory",
        (DIRECTORY,),
        (call("open", b"x", os.O_RDONLY), call("fchmod", 0o700)),
        None,
        {b"x": "c"},
    ),
    Case(
        "fchmod of another's",
        (owned(FILE),),
        (call("open", b"x", os.O_RDONLY, by=STRANGER), call("fchmod", 0o7, by=STRANGER)),
        "EPERM",
        {},
    ),
    Case(
        "fchmod of what was removed",
        (FILE,),
        (call("open", b"x", os.O_RDWR), call("unlink", b"x"), call("fchmod", 0o4711), call("fstat")),
        (0o104711, 0, 7),
    ),
    Case("of a socket", (), (call("bind", b"x"), _chmod(b"x", None, 0o4711)), after={b"x": {"mode": 0o4711}}),
    *(
        Case(
            f"{mode:04o} written by {who}",
            (owned(replace(FILE, mode=mode)),),
            (call("open", b"x", os.O_WRONLY, by=by), call("write", b"new", by=by)),
            3,
            {b"x": "mc"},
            {b"x": {"mode": left, "content": b"newtent"}},
        )
        for mode, who, by, left in (
            (0o4777, "a stranger", STRANGER, 0o777),
            (0o2777, "a stranger", STRANGER, 0o777),
            (0o6777, "its owner", OWNER, 0o777),
            (0o6777, "root", ROOT, 0o6777),
        )
    ),
    Case(
        "2767 written by a stranger",
        (owned(replace(FILE, mode=0o2767)),),
        (call("open", b"x", os.O_WRONLY, by=STRANGER), call("write", b"new", by=STRANGER)),
        3,
        {b"x": "mc"},
        {b"x": {"mode": 0o2767, "content": b"newtent"}},
        differs="fs/fuse/dir.c, fuse_setattr: without FUSE_HANDLE_KILLPRIV_V2 only executable ones lose it",
    ),
    *(
        Case(
            f"{mode:04o} {what} by a stranger",
            (owned(replace(FILE, mode=mode)),),
            calls,
            None,
            {b"x": "mc"},
            {b"x": {"mode": 0o777, "size": 3}},
        )
        for mode in (0o4777, 0o2777, 0o6777)
        for what, calls in (
            ("truncated", (call("truncate", b"x", 3, by=STRANGER),)),
            (
                "truncated when open",
                (call("open", b"x", os.O_RDWR, by=STRANGER), call("ftruncate", 3, by=STRANGER)),
            ),
        )
    ),
]


def _chown(path: bytes | int, by: Identity | None = None) -> Call:
    return call("chown", path, OWNER.uid, OWNER.gid, by=by or ROOT)


def _lchown(path: bytes | int, by: Identity | None = None) -> Call:
    return call("lchown", path, OWNER.uid, OWNER.gid, by=by or ROOT)


CHOWN = [
    *path_cases(_chown),
    *path_cases(_lchown, lambda path: symlink(path, b"none"), prefix="lchown: "),
    *(
        Case(
            f"{kind} by root to {uid}, {gid}",
            (owned(thing),),
            (call("lchown", b"x", uid, gid, by=ROOT),),
            None,
            {b"x": "c"},
            {b"x": {"uid": OWNER.uid if uid == -1 else uid, "gid": OWNER.gid if gid == -1 else gid}},
        )
        for kind, thing in KINDS.items()
        for uid, gid in ((0, 0), (7, -1), (-1, 8), (1 << 31, (1 << 32) - 2))
    ),
    *(
        Case(
            f"{kind} {what}",
            (owned(thing, MEMBER),),
            (call("lchown", b"x", uid, gid, by=by),),
            gives,
            {b"x": "c"} if gives is None else {},
        )
        for kind, thing in KINDS.items()
        for what, by, uid, gid, gives in (
            ("given away by its owner", MEMBER, STRANGER.uid, -1, "EPERM"),
            ("by its owner to what it is", MEMBER, MEMBER.uid, MEMBER.gid, None),
            ("by its owner to a supplementary group", MEMBER, -1, MEMBER.groups[0], None),
            ("by its owner to a group it is not in", MEMBER, -1, OTHER_GROUP, "EPERM"),
            ("by its owner to both", MEMBER, STRANGER.uid, MEMBER.groups[0], "EPERM"),
            ("by one of its group", Identity(OWNER.uid, MEMBER.gid), -1, OWNER.gid, "EPERM"),
            ("taken by a stranger", STRANGER, STRANGER.uid, STRANGER.gid, "EPERM"),
        )
    ),
    *(
        Case(
            f"{kind} of {mode:04o} {who}",
            (owned(replace(thing, mode=mode)),),
            (call("chown", b"x", *to, by=by),),
            None,
            {b"x": "c"},
            {b"x": {"mode": left}},
        )
        for kind, thing in (("file", FILE), ("device", KINDS["device"]), ("directory", DIRECTORY))
        for mode, kept in (
            (0o6755, 0o755),
            (0o4711, 0o711),
            (0o2755, 0o755),
            (0o4644, 0o644),
            (0o2644, 0o2644),
            (0o6444, 0o2444),
        )
        for who, by, to in (("by its owner", OWNER, (-1, OWNER.gid)), ("by root", ROOT, (0, 0)))
        for left in (mode if kind == "directory" else kept,)
    ),
    Case(
        "neither owner nor group, by a stranger", (owned(FILE),), (call("chown", b"x", -1, -1, by=STRANGER),)
    ),
    Case("neither owner nor group", (owned(FILE),), (call("chown", b"x", -1, -1),), None, {b"x": "c"}),
    Case(
        "through a link",
        (FILE, symlink(b"s", b"x")),
        (_chown(b"s"),),
        None,
        {b"x": "c"},
        {b"x": {"uid": OWNER.uid}, b"s": {"uid": 0}},
    ),
    Case(
        "lchown of a link",
        (FILE, symlink(b"s", b"x")),
        (_lchown(b"s"),),
        None,
        {b"s": "c"},
        {b"x": {"uid": 0}, b"s": {"uid": OWNER.uid}},
    ),
    Case("through a link to nothing", (symlink(b"s", b"none"),), (_chown(b"s"),), "ENOENT"),
    Case("through a link to itself", (symlink(b"s", b"s"),), (_chown(b"s"),), "ELOOP"),
    Case(
        "one of two names",
        (FILE, hard_link(b"y", b"x")),
        (_chown(b"y"),),
        None,
        {b"x": "c", b"y": "c"},
        {b"x": {"uid": OWNER.uid, "nlink": 2}},
    ),
    Case(
        "fchown",
        (FILE,),
        (call("open", b"x", os.O_RDONLY), call("fchown", 5, 6, by=ROOT)),
        None,
        {b"x": "c"},
        {b"x": {"uid": 5, "gid": 6}},
    ),
    Case(
        "fchown of another's",
        (owned(FILE),),
        (call("open", b"x", os.O_RDONLY, by=STRANGER), call("fchown", STRANGER.uid, -1, by=STRANGER)),
        "EPERM",
        {},
    ),
    Case(
        "of a socket",
        (),
        (call("bind", b"x"), call("chown", b"x", 5, 6, by=ROOT)),
        after={b"x": {"uid": 5, "gid": 6}},
    ),
]


def _utimens(
    path: bytes | int,
    by: Identity | None = None,
    times: tuple[tuple[int, int], ...] | None = ((1, 2), (3, 4)),
    flags: int = 0,
) -> Call:
    return call("utimensat", path, times, flags, by=by)


NOFOLLOW = 0x100
NOW_BOTH = ((0, UTIME_NOW), (0, UTIME_NOW))
OMIT_BOTH = ((0, UTIME_OMIT), (0, UTIME_OMIT))
WRITABLE = owned(replace(FILE, mode=0o666))
UTIMENSAT = [
    *path_cases(_utimens),
    *(
        Case(
            f"{kind} {what}",
            (thing,),
            (_utimens(b"x", None, times, NOFOLLOW),),
            None,
            {b"x": letters},
            {b"x": {"times": shown if kind not in ("directory", "link") else (None, *shown[1:])}},
        )
        for kind, thing in KINDS.items()
        for what, times, letters, shown in (
            (
                "both",
                ((5, 6), (7, 8)),
                "amc" if kind not in ("directory", "link") else "mc",
                (5 * 10**9 + 6, 7 * 10**9 + 8, NOW),
            ),
            ("mtime", ((0, UTIME_OMIT), (7, 8)), "mc", (KEPT, 7 * 10**9 + 8, NOW)),
            ("now", None, "amc" if kind not in ("directory", "link") else "mc", (NOW, NOW, NOW)),
            ("mtime now", ((0, UTIME_OMIT), (0, UTIME_NOW)), "mc", (KEPT, NOW, NOW)),
        )
    ),
    *(
        Case(
            f"file {what}",
            (FILE,),
            (_utimens(b"x", None, times),),
            None,
            {b"x": letters} if letters else {},
            {b"x": {"times": shown}},
        )
        for what, times, letters, shown in (
            ("atime", ((5, 6), (7, UTIME_OMIT)), "ac", (5 * 10**9 + 6, KEPT, NOW)),
            ("atime now", ((0, UTIME_NOW), (7, UTIME_OMIT)), "ac", (NOW, KEPT, NOW)),
            ("both now by UTIME_NOW", NOW_BOTH, "amc", (NOW, NOW, NOW)),
            ("neither", OMIT_BOTH, "", (KEPT, KEPT, KEPT)),
            ("atime now, mtime then", ((0, UTIME_NOW), (1, 2)), "amc", (NOW, 10**9 + 2, NOW)),
            (
                "the last nanosecond",
                ((1, 999_999_999), (2, 999_999_999)),
                "amc",
                (1_999_999_999, 2_999_999_999, NOW),
            ),
            ("before 1970", ((-1, 0), (-2, 5)), "amc", (-(10**9), -2 * 10**9 + 5, NOW)),
            ("1970", ((0, 0), (0, 0)), "amc", (0, 0, NOW)),
            (
                "after 2038",
                ((1 << 31, 0), ((1 << 31) + 1, 1)),
                "amc",
                ((1 << 31) * 10**9, ((1 << 31) + 1) * 10**9 + 1, NOW),
            ),
            (
                "after 2106",
                ((1 << 32, 0), ((1 << 32) + 1, 1)),
                "amc",
                ((1 << 32) * 10**9, ((1 << 32) + 1) * 10**9 + 1, NOW),
            ),
        )
    ),
    *(
        Case(f"{what}", (FILE,), (_utimens(b"x", None, times),), "EINVAL")
        for what, times in (
            ("an atime of a billion ns", ((0, 10**9), (0, 0))),
            ("an mtime of a billion ns", ((0, 0), (0, 10**9))),
            ("an atime of less than no ns", ((0, -1), (0, 0))),
            ("an mtime of less than no ns", ((0, 0), (0, -1))),
        )
    ),
    *(
        Case(f"{what} by {who}", (thing,), (_utimens(b"x", by, times),), gives)
        for what, times, results in (
            ("set", ((1, 2), (3, 4)), (None, None, "EPERM", "EPERM", "EPERM", "EPERM")),
            ("now", None, (None, None, None, "EACCES", None, "EACCES")),
            ("now by UTIME_NOW", NOW_BOTH, (None, None, None, "EACCES", None, "EACCES")),
            ("neither", OMIT_BOTH, (None,) * 6),
            (
                "atime now, mtime omitted",
                ((0, UTIME_NOW), (0, UTIME_OMIT)),
                (None, None, "EPERM", "EPERM", "EPERM", "EPERM"),
            ),
            (
                "atime now, mtime set",
                ((0, UTIME_NOW), (1, 2)),
                (None, None, "EPERM", "EPERM", "EPERM", "EPERM"),
            ),
        )
        for (who, by, thing), gives in zip(
            (
                ("the owner", OWNER, owned(replace(FILE, mode=0))),
                ("root", ROOT, owned(replace(FILE, mode=0))),
                ("a stranger who may write", STRANGER, WRITABLE),
                ("a stranger who may not", STRANGER, owned(FILE)),
                ("one of its group who may write", MEMBER, owned(replace(FILE, mode=0o664))),
                ("one of its group who may not", MATE, owned(FILE)),
            ),
            results,
            strict=True,
        )
    ),
    Case("through a link", (FILE, symlink(b"s", b"x")), (_utimens(b"s"),), None, {b"x": "amc"}),
    Case(
        "of a link",
        (FILE, symlink(b"s", b"x")),
        (_utimens(b"s", None, ((1, 2), (3, 4)), NOFOLLOW),),
        None,
        {b"s": "mc"},
    ),
    Case("through a link to nothing", (symlink(b"s", b"none"),), (_utimens(b"s"),), "ENOENT"),
    Case("through a link to itself", (symlink(b"s", b"s"),), (_utimens(b"s"),), "ELOOP"),
    Case(
        "one of two names", (FILE, hard_link(b"y", b"x")), (_utimens(b"y"),), None, {b"x": "amc", b"y": "amc"}
    ),
    Case("an unknown flag", (FILE,), (_utimens(b"x", None, None, 1),), "EINVAL"),
    Case(
        "futimens",
        (FILE,),
        (call("open", b"x", os.O_RDONLY), call("futimens", ((1, 2), (3, 4)))),
        None,
        {b"x": "amc"},
    ),
    Case(
        "futimens of what was removed",
        (FILE,),
        (call("open", b"x", os.O_RDWR), call("unlink", b"x"), call("futimens", None), call("fstat")),
        (0o100644, 0, 7),
    ),
    Case(
        "futimens after a write",
        (FILE,),
        (call("open", b"x", os.O_RDWR), call("write", b"new"), call("futimens", ((1, 2), (3, 4)))),
        None,
        {b"x": "amc"},
        {b"x": {"times": (10**9 + 2, 3 * 10**9 + 4, NOW)}},
    ),
    Case(
        "a write after futimens",
        (FILE,),
        (call("open", b"x", os.O_WRONLY), call("futimens", ((1, 2), (3, 4))), call("write", b"new")),
        3,
        {b"x": "amc"},
        {b"x": {"times": (10**9 + 2, NOW, NOW)}},
    ),
]

TABLES = {"chmod": CHMOD, "chown": CHOWN, "utimensat": UTIMENSAT}

judge, test_root, test_a_plain_user = judging("attributes", TABLES)
