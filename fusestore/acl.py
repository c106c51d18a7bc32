"""POSIX access control lists, as the kernel's xattrs have them. Pure.

A list says more of a file's permissions than its mode, and the two agree always (acl(5)): the mode's bits of
the owner and of others are the entries of those, its group bits are the mask, or where there is none the
entry of the owning group. A list with nothing but these three is no list: the mode says it all.

The form (linux/posix_acl_xattr.h): a version of 32 bits, then for each entry tag, permissions (16 bits each)
and id (32 bits), little-endian, sorted.
"""

import stat
import struct
from collections.abc import Iterable
from typing import NamedTuple

from .errors import BadInput
from .nodes import Xattrs

__all__ = ["ACCESS", "DEFAULT", "NAMES", "check", "from_text", "inherited", "mode_of", "with_mode"]

ACCESS = b"system.posix_acl_access"
DEFAULT = b"system.posix_acl_default"
"""Of a directory: what is made in it begins with."""
NAMES = frozenset((ACCESS, DEFAULT))

_OWNER, _USER, _OWNING_GROUP, _GROUP, _MASK, _OTHERS = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_VERSION = 2
_NO_ID = 0xFFFFFFFF
_HEADER = struct.Struct("<I")
_ENTRY = struct.Struct("<HHI")
_ENTRIES_MAX = 511
"""What FUSE's kernel takes: a page (fs/fuse/acl.c)."""
_TAGS_OF_TEXT = {
    (b"user", False): _OWNER,
    (b"user", True): _USER,
    (b"group", False): _OWNING_GROUP,
    (b"group", True): _GROUP,
    (b"mask", False): _MASK,
    (b"other", False): _OTHERS,
}
_PERMISSIONS_OF_TEXT = {ord("r"): 4, ord("w"): 2, ord("x"): 1, ord("-"): 0}


class _Entry(NamedTuple):
    tag: int
    permissions: int
    """rwx, as three bits."""
    id: int


def check(value: bytes) -> None:
    """Raises BadInput for what Linux takes for no list (fs/posix_acl.c, posix_acl_valid)."""
    entries = _parse(value)
    tags = [entry.tag for entry in entries]
    singles = [tag for tag in tags if tag not in (_USER, _GROUP)]
    is_extended = len(singles) < len(tags)
    wanted = (
        [_OWNER, _OWNING_GROUP, _OTHERS] if _MASK not in tags else [_OWNER, _OWNING_GROUP, _MASK, _OTHERS]
    )
    if tags != sorted(tags) or singles != wanted or (is_extended and _MASK not in tags):
        raise BadInput("an ACL whose entries are not those of acl(5), in their order")
    if any(entry.permissions > 7 for entry in entries):
        raise BadInput("an ACL with permissions that are not rwx")
    if any(entry.id == _NO_ID for entry in entries if entry.tag in (_USER, _GROUP)):
        raise BadInput("an ACL with an entry of nobody's")
    if len(entries) > _ENTRIES_MAX:
        raise BadInput(f"an ACL with more than {_ENTRIES_MAX} entries")


def mode_of(value: bytes, mode: int) -> tuple[int, bool]:
    """`mode` with the permissions that a file has by the list `value`, and whether that says all of it."""
    entries = _parse(value)
    found = {entry.tag: entry.permissions for entry in entries}
    group = found.get(_MASK, found[_OWNING_GROUP])
    permissions = found[_OWNER] << 6 | group << 3 | found[_OTHERS]
    return mode & ~0o777 | permissions, not found.keys() & {_USER, _GROUP, _MASK}


def with_mode(value: bytes, mode: int) -> bytes:
    """The list of a file whose mode is changed to `mode` (chmod(2))."""
    entries = _parse(value)
    group = _MASK if any(entry.tag == _MASK for entry in entries) else _OWNING_GROUP
    changed = {_OWNER: mode >> 6 & 7, group: mode >> 3 & 7, _OTHERS: mode & 7}
    return _pack(entry._replace(permissions=changed.get(entry.tag, entry.permissions)) for entry in entries)


def inherited(default: bytes, mode: int) -> tuple[int, Xattrs]:
    """Mode and ACLs of what is made with `mode` in a directory whose default list is `default`.

    The umask plays no part (acl(5), "Object creation and default ACLs").
    """
    given, _ = mode_of(default, mode)
    mode &= given | ~0o777
    access = with_mode(default, mode)
    xattrs = () if mode_of(access, mode)[1] else ((ACCESS, access),)
    return mode, (*xattrs, (DEFAULT, default)) if stat.S_ISDIR(mode) else xattrs


def from_text(text: bytes) -> bytes | None:
    """The list that star, GNU tar and libarchive write as ``SCHILY.acl.…``. Raises BadInput.

    Entries are ``tag:name:rwx`` with the number of who is named as name, or in a fourth field. None for a
    list without these numbers, for nobody knows whom it means, and for one that says no more than a mode.
    """
    entries = []
    for line in text.replace(b"\n", b",").split(b","):
        fields = [field.strip() for field in line.partition(b"#")[0].split(b":")]
        if fields == [b""]:
            continue
        tag = _TAGS_OF_TEXT.get((fields[0], len(fields) > 1 and fields[1] != b""))
        if tag is None or not 3 <= len(fields) <= 4 or not set(fields[2]) <= _PERMISSIONS_OF_TEXT.keys():
            raise BadInput(f"{line!r} is no entry of an ACL")
        id_ = _NO_ID
        if tag in (_USER, _GROUP):
            number = next((field for field in (fields[-1], fields[1]) if field.isdigit()), None)
            if number is None:
                return None
            id_ = int(number[:10])
        permissions = sum(_PERMISSIONS_OF_TEXT[letter] for letter in set(fields[2]))
        entries.append(_Entry(tag, permissions, min(id_, _NO_ID)))
    value = _pack(sorted(entries, key=lambda entry: (entry.tag, entry.id)))
    check(value)
    return None if mode_of(value, 0)[1] else value


def _parse(value: bytes) -> list[_Entry]:
    if (len(value) - _HEADER.size) % _ENTRY.size or value[: _HEADER.size] != _HEADER.pack(_VERSION):
        raise BadInput("an ACL of unknown form")
    return [_Entry(*fields) for fields in _ENTRY.iter_unpack(value[_HEADER.size :])]


def _pack(entries: Iterable[_Entry]) -> bytes:
    return _HEADER.pack(_VERSION) + b"".join(_ENTRY.pack(*entry) for entry in entries)
