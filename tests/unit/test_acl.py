"""ACLs in bytes and in text. The kernel is the judge of the rest: tests/mounted/test_acl.py."""

import stat
import struct

import pytest

from fusestore import acl
from fusestore.errors import BadInput

_OWNER, _USER, _OWNING_GROUP, _GROUP, _MASK, _OTHERS = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_NO_ID = 0xFFFFFFFF


def _packed(*entries: tuple[int, int] | tuple[int, int, int], version: int = 2) -> bytes:
    """`entries`: tag, permissions, id."""
    return struct.pack("<I", version) + b"".join(
        struct.pack("<HHI", *(*entry, _NO_ID)[:3]) for entry in entries
    )


_NAMED = _packed((_OWNER, 6), (_USER, 6, 12), (_OWNING_GROUP, 4), (_GROUP, 5, 13), (_MASK, 7), (_OTHERS, 0))
_MINIMAL = _packed((_OWNER, 6), (_OWNING_GROUP, 4), (_OTHERS, 1))


@pytest.mark.parametrize("value", [_NAMED, _MINIMAL, _packed((1, 0), (4, 7), (0x10, 7), (0x20, 7))])
def test_a_list_of_the_kernels_form_is_taken(value: bytes) -> None:
    acl.check(value)


BROKEN = {
    "empty": b"",
    "a header only": _packed(),
    "version": _packed((1, 6), (4, 4), (0x20, 0), version=1),
    "half an entry": _MINIMAL + b"\x01\0",
    "no owner": _packed((4, 4), (0x20, 0)),
    "two owners": _packed((1, 6), (1, 6), (4, 4), (0x20, 0)),
    "no others": _packed((1, 6), (4, 4)),
    "order": _packed((4, 4), (1, 6), (0x20, 0)),
    "named without a mask": _packed((1, 6), (2, 6, 12), (4, 4), (0x20, 0)),
    "nobody": _packed((1, 6), (2, 6, _NO_ID), (4, 4), (0x10, 4), (0x20, 0)),
    "permissions": _packed((1, 8), (4, 4), (0x20, 0)),
    "tag": _packed((1, 6), (4, 4), (0x20, 0), (0x40, 0)),
    "more than a page": _packed(
        (1, 6), *((2, 4, number) for number in range(508)), (4, 4), (0x10, 4), (0x20, 0)
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_linux_takes_for_no_list_is_refused(what: str) -> None:
    with pytest.raises(BadInput):
        acl.check(BROKEN[what])


TEXTS = {
    "libarchive": b"user::rw-,user:anna:rw-:12,group::r--,group:staff:r-x:13,mask::rwx,other::---",
    "star and numeric GNU tar": b"user::rw-,user:12:rw-,group::r--,group:13:r-x,mask::rwx,other::---",
    "lines, comments, another order": b"user::rw-\nuser:12:rw-\t#effective:rw-\nmask::rwx\n"
    b"other::---\ngroup:13:r-x\ngroup::r--\n",
}


@pytest.mark.parametrize("what", TEXTS)
def test_texts_of_tars_are_read(what: str) -> None:
    assert acl.from_text(TEXTS[what]) == _NAMED


@pytest.mark.parametrize(
    "text", [b"user::rw-,user:anna:rw-,group::r--,mask::rw-,other::---", b"user::rw-,group::r--,other::---"]
)
def test_texts_that_name_people_only_or_nobody_are_left_out(text: bytes) -> None:
    assert acl.from_text(text) is None


@pytest.mark.parametrize(
    "text", [b"user::rw-", b"nonsense", b"user::rwq,group::r--,other::---", b"user", b"user::r:1:2,other::r"]
)
def test_texts_that_are_no_lists_are_refused(text: bytes) -> None:
    with pytest.raises(BadInput):
        acl.from_text(text)


def test_the_group_bits_of_the_mode_are_the_mask() -> None:
    assert acl.mode_of(_NAMED, stat.S_IFREG | 0o4000) == (stat.S_IFREG | 0o4670, False)
    assert acl.mode_of(_MINIMAL, 0o777) == (0o641, True)


def test_a_changed_mode_changes_the_mask_and_no_entry_of_others() -> None:
    changed = acl.with_mode(_NAMED, 0o604)
    assert changed == _packed((1, 6), (2, 6, 12), (4, 4), (8, 5, 13), (0x10, 0), (0x20, 4))
    assert acl.with_mode(_MINIMAL, 0o604) == _packed((1, 6), (4, 0), (0x20, 4))


def test_a_file_inherits_what_its_mode_allows() -> None:
    mode, xattrs = acl.inherited(_NAMED, stat.S_IFREG | 0o666)
    assert mode == stat.S_IFREG | 0o660
    assert xattrs == ((acl.ACCESS, _packed((1, 6), (2, 6, 12), (4, 4), (8, 5, 13), (0x10, 6), (0x20, 0))),)


def test_a_directory_inherits_the_default_too() -> None:
    mode, xattrs = acl.inherited(_NAMED, stat.S_IFDIR | 0o777)
    assert mode == stat.S_IFDIR | 0o670
    assert xattrs == ((acl.ACCESS, _NAMED), (acl.DEFAULT, _NAMED))


def test_a_default_that_is_a_mode_makes_a_mode() -> None:
    assert acl.inherited(_MINIMAL, stat.S_IFREG | 0o666) == (stat.S_IFREG | 0o640, ())
