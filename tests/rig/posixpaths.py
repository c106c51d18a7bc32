"""Who calls on what, and the rows of path_resolution(7): what every call makes of its path. Pure."""

import os
import stat
from collections.abc import Callable
from dataclasses import replace

from rig.layers import Member, device, directory, fifo, file, symlink
from rig.posix import BAD_ADDRESS, Call, Case, Identity

__all__ = [
    "DIRECTORY",
    "FILE",
    "KINDS",
    "LINK",
    "MATE",
    "MEMBER",
    "OTHER_GROUP",
    "OWNER",
    "ROOT",
    "STRANGER",
    "owned",
    "path_cases",
]


ROOT = Identity(0, 0)
OWNER = Identity(65534, 65534)
MATE = Identity(65533, 65534)
"""Of the owner's group."""
MEMBER = Identity(65532, 65532, (65531, 65534))
"""Of the owner's group by the last of its supplementary ones."""
STRANGER = Identity(65530, 65530, (65529,))

OTHER_GROUP = 65000

FILE, DIRECTORY, LINK = file(b"x", b"content"), directory(b"x"), symlink(b"x", b"target")
KINDS = {
    "file": FILE,
    "directory": DIRECTORY,
    "link": LINK,
    "FIFO": fifo(b"x"),
    "device": device(b"x", os.makedev(1, 3)),
}

_LONGEST_NAME = b"n" * 255
_DEEP = [b"/".join([b"d" * 255] * depth) for depth in range(1, 15)]
_LONGEST_PATH = _DEEP[-1] + b"/" + b"./" * 128 + _LONGEST_NAME
assert len(_LONGEST_PATH) == 4095  # limits.h: PATH_MAX counts the NUL


def owned(member: Member, who: Identity = OWNER) -> Member:
    """`member` as `who`'s."""
    return replace(member, uid=who.uid, gid=who.gid)


def path_cases(
    make: Callable[[bytes | int, Identity | None], Call],
    thing: Callable[[bytes], Member] | None = file,
    *,
    given: tuple[Member, ...] = (),
    gives: object = None,
    needs_write: bool = False,
    prefix: str = "",
) -> list[Case]:
    """Rows for the call that `make(path, by)` is.

    `thing(path)` is what must be there for it, None for nothing; `given` is there besides. `needs_write`
    of the directory: where a name is made or removed. `gives` where it works; `prefix` of the rows' names.
    """

    def there(path: bytes) -> tuple[Member, ...]:
        return () if thing is None else (thing(path),)

    links = tuple(symlink(b"l%d" % number, b"l%d" % (number - 1)) for number in range(1, 41))
    chain = (*given, directory(b"d"), *there(b"d/x"), symlink(b"l0", b"d"), *links)
    deep = (*given, *map(directory, _DEEP))
    closed = (*given, owned(directory(b"d", 0o666)), *(owned(member) for member in there(b"d/x")))
    fixed = (*given, owned(directory(b"d", 0o555)), *(owned(member) for member in there(b"d/x")))
    rows = [
        ("below a file", (file(b"f"),), b"f/x", "ENOTDIR"),
        ("below a FIFO", (fifo(b"p"),), b"p/x", "ENOTDIR"),
        ("below a device", (device(b"c", 0x103),), b"c/x", "ENOTDIR"),
        ("below nothing", (), b"none/x", "ENOENT"),
        ("below a link to nothing", (symlink(b"s", b"none"),), b"s/x", "ENOENT"),
        ("below a link to a file", (file(b"f"), symlink(b"s", b"f")), b"s/x", "ENOTDIR"),
        ("below a ring of links", (symlink(b"a", b"b"), symlink(b"b", b"a")), b"a/x", "ELOOP"),
        ("an empty path", (), b"", "ENOENT"),
        ("no address", (), BAD_ADDRESS, "EFAULT"),
        ("a name of 256 bytes", (), b"n" * 256, "ENAMETOOLONG"),
        ("below a name of 256 bytes", (), b"n" * 256 + b"/x", "ENAMETOOLONG"),
    ]
    cases = [Case(name, (*given, *more), (make(path, None),), number) for name, more, path, number in rows]
    cases += [
        Case("below 41 links", chain, (make(b"l40/x", None),), "ELOOP"),
        Case("below 40 links", chain, (make(b"l39/x", None),), gives),
        Case("a name of 255 bytes", (*given, *there(_LONGEST_NAME)), (make(_LONGEST_NAME, None),), gives),
        Case(
            "a path of 4,095 bytes",
            (*deep, *there(_DEEP[-1] + b"/" + _LONGEST_NAME)),
            (make(_LONGEST_PATH, None),),
            gives,
        ),
        Case(
            "a path of 4,096 bytes",
            deep,
            (make(_LONGEST_PATH.replace(b"./n", b".//n"), None),),
            "ENAMETOOLONG",
        ),
        Case("below a directory without x", closed, (make(b"d/x", OWNER),), "EACCES"),
        Case("below a directory without x, root", closed, (make(b"d/x", ROOT),), gives),
    ]
    if thing is not None:
        cases.append(Case("nothing", given, (make(b"none", None),), "ENOENT"))
        if thing(b"x").format not in (stat.S_IFDIR, stat.S_IFLNK):
            cases.append(Case("a file and a slash", (*given, thing(b"x")), (make(b"x/", None),), "ENOTDIR"))
    if needs_write:
        cases += [
            Case("in a directory without w", fixed, (make(b"d/x", OWNER),), "EACCES"),
            Case("in a directory without w, root", fixed, (make(b"d/x", ROOT),), gives),
            Case("in another's directory", fixed, (make(b"d/x", STRANGER),), "EACCES"),
        ]
    return [replace(case, name=f"{prefix}{case.name}") for case in cases]
