"""The upper directory in both schemes: what is on disk, and what is shown of it."""

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from rig.deep import deepen, few_descriptors
from rig.people import Person
from rig.requirements import need
from rig.stores import Failing, on_disk

from fusestore.acl import DEFAULT
from fusestore.errors import NoAttribute, NotPermitted, StoreDamaged
from fusestore.nodes import Attr
from fusestore.scheme import RECORD, Scheme, bad_records, find_scheme, for_union_alone
from fusestore.union import UpperEntry
from fusestore.upper import Birth, Upper

pytestmark = pytest.mark.root

_NOBODY = Person("nobody", 65534, 65534, "/")
_NULL = os.makedev(1, 3)
_LINK = stat.S_IFLNK | 0o777
_LOWER_FIFO = Attr(stat.S_IFIFO | 0o640, 12, 34, 0, 0, 1, 0, 0, 0, 0)
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY


@dataclass
class Place:
    """An upper directory and its scratch directory."""

    upper: Upper
    path: Path
    scratch: Path

    @property
    def root(self) -> int:
        return self.upper.root

    @property
    def left(self) -> list[str]:
        """What is in the scratch directory, but for the one whiteout that the others are links of."""
        return [name for name in os.listdir(self.scratch) if os.fsencode(name) != self.upper._whiteout]

    def fd(self, name: bytes) -> int:
        return self.upper.open(self.root, name)

    def attr(self, name: bytes) -> Attr:
        fd = self.fd(name)
        try:
            return self.upper.attr(fd)
        finally:
            os.close(fd)

    def file(self, name: bytes, mode: int = 0o644, uid: int = 0, gid: int = 0) -> None:
        os.close(self.upper.make_file(self.root, name, Birth(stat.S_IFREG | mode, uid, gid), replaces=False))

    def directory(self, name: bytes) -> int:
        self.upper.make_directory(self.root, name, Birth(stat.S_IFDIR | 0o755, 0, 0), replaces=False)
        return self.fd(name)


def _is_whiteout(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


@pytest.fixture
def base() -> Iterator[Path]:
    """A directory for two, searchable by everybody."""
    need("root", os.geteuid() == 0, "run the tests as root to test owners and devices")
    with tempfile.TemporaryDirectory(dir=os.environ.get("FUSESTORE_TEST_TMP", "/var/tmp")) as name:
        path = Path(name)
        path.chmod(0o755)
        for directory in ("upper", "scratch"):
            (path / directory).mkdir()
            os.chown(path / directory, _NOBODY.uid, _NOBODY.gid)
        yield path


def _place(base: Path, scheme: Scheme) -> Place:
    root, scratch = (os.open(base / name, _DIRECTORY) for name in ("upper", "scratch"))
    return Place(Upper(root, scratch, scheme), base / "upper", base / "scratch")


@pytest.fixture(params=list(Scheme))
def place(base: Path, request: pytest.FixtureRequest) -> Iterator[Place]:
    """In each scheme. Root can write the plain one, too."""
    made = _place(base, request.param)
    yield made
    os.close(made.root)
    os.close(made.upper._scratch)


@pytest.fixture
def native(base: Path) -> Place:
    return _place(base, Scheme.NATIVE)


@pytest.fixture
def plain(base: Path) -> Place:
    return _place(base, Scheme.PLAIN)


# Which scheme


def test_root_has_the_native_scheme(native: Place) -> None:
    assert find_scheme(native.upper._scratch) is Scheme.NATIVE
    assert not os.listdir(native.scratch)


def test_a_plain_user_has_the_plain_scheme(native: Place) -> None:
    assert _NOBODY.call(find_scheme, native.upper._scratch) is Scheme.PLAIN
    assert not os.listdir(native.scratch)


# What a name is


def test_a_missing_name_is_nothing(place: Place) -> None:
    assert place.upper.find(place.root, b"a") is None


def test_a_whiteout_is_the_kernels(place: Place) -> None:
    place.upper.put_whiteout(place.root, b"a", replaces=False)
    assert _is_whiteout(place.path / "a")
    found = place.upper.find(place.root, b"a")
    assert found is not None and found.entry == UpperEntry(is_whiteout=True)


def test_an_opaque_directory_has_the_kernels_mark(place: Place) -> None:
    place.upper.set_opaque(place.directory(b"d"))
    assert os.getxattr(place.path / "d", place.upper.scheme.value + b"opaque") == b"y"
    found = place.upper.find(place.root, b"d")
    assert found is not None and found.entry == UpperEntry(is_directory=True, is_opaque=True)


def test_a_renamed_directory_has_the_kernels_redirect(place: Place) -> None:
    place.upper.set_redirect(place.directory(b"d"), b"/old")
    assert os.getxattr(place.path / "d", place.upper.scheme.value + b"redirect") == b"/old"
    found = place.upper.find(place.root, b"d")
    assert found is not None and found.entry == UpperEntry(is_directory=True, redirect=b"/old")


def test_renamed_directories_are_found(place: Place) -> None:
    assert place.upper.moved() == []
    for name, redirect in ((b"d", b"/a"), (b"e", b"/b")):
        above = place.directory(name)
        place.upper.make_directory(above, b"below", Birth(stat.S_IFDIR | 0o755, 0, 0), replaces=False)
        place.upper.set_redirect(above, redirect)
    place.upper.set_redirect(place.upper.open(above, b"below"), b"/c")
    os.close(place.directory(b"f"))
    assert sorted(place.upper.moved()) == [b"d", b"e", b"e/below"]


def test_renamed_directories_are_found_at_any_depth_with_few_descriptors(place: Place) -> None:
    name = "d" * 100
    last = deepen(place.path, 60, name)
    place.upper.set_redirect(last, b"/a")
    os.close(last)
    with few_descriptors():
        assert place.upper.moved() == [b"/".join([name.encode()] * 60)]


def test_listing_and_find_agree(place: Place) -> None:
    upper, root = place.upper, place.root
    place.file(b"file")
    os.close(place.directory(b"d"))
    upper.make_node(root, b"device", Birth(stat.S_IFCHR | 0o600, 0, 0), _NULL, replaces=False)
    upper.make_node(root, b"fifo", Birth(stat.S_IFIFO | 0o600, 0, 0), 0, replaces=False)
    upper.make_node(root, b"socket", Birth(stat.S_IFSOCK | 0o600, 0, 0), 0, replaces=False)
    upper.make_symlink(root, b"link", b"d", Birth(_LINK, 0, 0), replaces=False)
    upper.put_whiteout(root, b"gone", replaces=False)
    listing = dict(upper.listing(root))
    assert listing == {name: upper.find(root, name) for name in listing}
    assert {name: found.format for name, found in listing.items() if not found.entry.is_whiteout} == {
        b"file": stat.S_IFREG,
        b"d": stat.S_IFDIR,
        b"device": stat.S_IFCHR,
        b"fifo": stat.S_IFIFO,
        b"socket": stat.S_IFSOCK,
        b"link": stat.S_IFLNK,
    }


def test_a_failing_disk_says_nothing_of_what_is_allowed(native: Place) -> None:
    for step in range(5):
        with on_disk(Failing(step)), pytest.raises(OSError):
            find_scheme(native.upper._scratch)


# Making


@pytest.mark.parametrize("mode", [0o644, 0o4755, 0o000])
def test_a_new_file_has_mode_and_owner(place: Place, mode: int) -> None:
    place.file(b"a", mode, 12, 34)
    attr = place.attr(b"a")
    assert (attr.mode, attr.uid, attr.gid) == (stat.S_IFREG | mode, 12, 34)


def test_what_replaces_a_whiteout_takes_its_place(place: Place) -> None:
    upper, root = place.upper, place.root
    makers = {
        b"file": lambda name: os.close(
            upper.make_file(root, name, Birth(stat.S_IFREG | 0o644, 0, 0), replaces=True)
        ),
        b"d": lambda name: upper.make_directory(root, name, Birth(stat.S_IFDIR | 0o755, 0, 0), replaces=True),
        b"fifo": lambda name: upper.make_node(root, name, Birth(stat.S_IFIFO, 0, 0), 0, replaces=True),
        b"symlink": lambda name: upper.make_symlink(root, name, b"x", Birth(_LINK, 0, 0), replaces=True),
        b"link": lambda name: upper.link(place.fd(b"file"), root, name, replaces=True),
    }
    for name, make in makers.items():
        upper.put_whiteout(root, name, replaces=False)
        make(name)
        found = upper.find(root, name)
        assert found is not None and not found.entry.is_whiteout
    assert not place.left


def test_a_directory_in_place_of_a_whiteout_is_opaque(place: Place) -> None:
    place.upper.put_whiteout(place.root, b"d", replaces=False)
    place.upper.make_directory(place.root, b"d", Birth(stat.S_IFDIR | 0o755, 0, 0), replaces=True)
    found = place.upper.find(place.root, b"d")
    assert found is not None and found.entry.is_opaque


def test_nothing_is_made_over_something(place: Place) -> None:
    upper, root = place.upper, place.root
    place.file(b"a")
    for make in (
        lambda: upper.make_file(root, b"a", Birth(stat.S_IFREG | 0o644, 0, 0), replaces=False),
        lambda: upper.make_directory(root, b"a", Birth(stat.S_IFDIR | 0o755, 0, 0), replaces=False),
        lambda: upper.make_node(root, b"a", Birth(stat.S_IFIFO, 0, 0), 0, replaces=False),
        lambda: upper.make_symlink(root, b"a", b"x", Birth(_LINK, 0, 0), replaces=False),
        lambda: upper.link(place.fd(b"a"), root, b"a", replaces=False),
        lambda: upper.put_whiteout(root, b"a", replaces=False),
    ):
        with pytest.raises(FileExistsError):
            make()
    assert not place.left


def test_a_file_that_cannot_be_dressed_is_not_there(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EDQUOT, "quota")

    monkeypatch.setattr(place.upper, "_dress", refuse)
    for replaces in (False, True):
        with pytest.raises(OSError, match="quota"):
            place.upper.make_file(place.root, b"a", Birth(stat.S_IFREG | 0o644, 12, 34), replaces)
    assert not os.listdir(place.path) and not os.listdir(place.scratch)


# Taking away


def test_a_whiteout_replaces_a_file_in_one_step(place: Place) -> None:
    place.file(b"a")
    place.upper.put_whiteout(place.root, b"a", replaces=True)
    assert _is_whiteout(place.path / "a") and not place.left


def test_all_whiteouts_are_one_inode(place: Place) -> None:
    for name in (b"a", b"b"):
        place.upper.put_whiteout(place.root, name, replaces=False)
    assert (place.path / "a").stat().st_ino == (place.path / "b").stat().st_ino


@pytest.mark.parametrize("reason", [errno.EMLINK, errno.ENOENT])
def test_a_whiteout_that_takes_no_more_links_gets_a_successor(
    place: Place, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    place.upper.put_whiteout(place.root, b"a", replaces=False)
    link, refusals = os.link, [reason]
    if reason == errno.ENOENT:
        (place.scratch / os.fsdecode(place.upper._whiteout or b"")).unlink()

    def full(*arguments: object, **more: object) -> None:
        if refusals:
            raise OSError(refusals.pop(), "no more links")
        link(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "link", full)
    place.upper.put_whiteout(place.root, b"b", replaces=False)
    assert _is_whiteout(place.path / "b")
    assert (place.path / "a").stat().st_ino != (place.path / "b").stat().st_ino


def test_a_whiteout_that_could_not_be_made_is_made_the_next_time(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(os, "mknod", full)
        with pytest.raises(OSError, match="no space"):
            place.upper.put_whiteout(place.root, b"a", replaces=False)
    place.upper.put_whiteout(place.root, b"a", replaces=False)
    assert _is_whiteout(place.path / "a")


@pytest.mark.parametrize("leave_whiteout", [True, False])
def test_a_directory_is_removed_with_its_whiteouts(place: Place, leave_whiteout: bool) -> None:
    directory = place.directory(b"d")
    place.upper.put_whiteout(directory, b"hidden", replaces=False)
    place.upper.remove_directory(place.root, b"d", leave_whiteout)
    assert os.path.lexists(place.path / "d") == leave_whiteout
    assert not place.left


def test_a_directory_that_is_cleared_is_opaque_first(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = place.directory(b"d")
    place.upper.put_whiteout(directory, b"hidden", replaces=False)
    monkeypatch.setattr(os, "unlink", lambda *arguments, **more: (_ for _ in ()).throw(OSError("stopped")))
    with pytest.raises(OSError, match="stopped"):
        place.upper.clear_whiteouts(directory)
    found = place.upper.find(place.root, b"d")
    assert found is not None and found.entry.is_opaque


# Moving


@pytest.mark.parametrize("leave_whiteout", [True, False])
@pytest.mark.parametrize("over_whiteout", [True, False])
def test_a_directory_moves(place: Place, leave_whiteout: bool, over_whiteout: bool) -> None:
    os.close(place.directory(b"d"))
    if over_whiteout:
        place.upper.put_whiteout(place.root, b"e", replaces=False)
    place.upper.move(place.root, b"d", place.root, b"e", leave_whiteout, over_whiteout)
    assert (place.path / "e").is_dir()
    assert os.path.lexists(place.path / "d") == leave_whiteout
    assert not leave_whiteout or _is_whiteout(place.path / "d")


# Attributes


def test_chmod_and_chown_show(place: Place) -> None:
    place.file(b"a")
    fd = place.fd(b"a")
    place.upper.chown(fd, 5, -1)
    place.upper.chown(fd, -1, 6)
    place.upper.chmod(fd, 0o4711)
    attr = place.upper.attr(fd)
    assert (attr.mode, attr.uid, attr.gid) == (stat.S_IFREG | 0o4711, 5, 6)


def test_times_can_be_set_one_by_one(place: Place) -> None:
    place.file(b"a")
    fd = place.fd(b"a")
    place.upper.utimens(fd, 1, 2)
    place.upper.utimens(fd, None, 3)
    place.upper.utimens(fd, 4, None)
    attr = place.upper.attr(fd)
    assert (attr.atime_ns, attr.mtime_ns) == (4, 3)


def test_a_plain_file_keeps_what_its_owner_needs(plain: Place) -> None:
    plain.file(b"a", 0o4001, 12, 34)
    status = (plain.path / "a").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o601, 0, 0)
    assert os.getxattr(plain.path / "a", b"user.fusestore.stat") == b"104001:12:34:0"


def test_a_plain_directory_keeps_what_its_owner_needs(plain: Place) -> None:
    plain.upper.make_directory(plain.root, b"d", Birth(stat.S_IFDIR | 0o1070, 12, 34), replaces=False)
    assert stat.S_IMODE((plain.path / "d").stat().st_mode) == 0o770
    assert os.getxattr(plain.path / "d", b"user.fusestore.stat") == b"41070:12:34:0"


def test_a_plain_file_that_is_what_it_says_has_no_record(plain: Place) -> None:
    plain.file(b"a", 0o4755, 1, 1)
    fd = plain.fd(b"a")
    plain.upper.chown(fd, 0, 0)
    plain.upper.chmod(fd, 0o755)
    assert not os.listxattr(plain.path / "a")


def test_a_plain_device_is_a_record(plain: Place) -> None:
    plain.upper.make_node(plain.root, b"null", Birth(stat.S_IFCHR | 0o666, 0, 0), _NULL, replaces=False)
    assert (plain.path / "null").is_file()
    attr = plain.attr(b"null")
    assert (attr.mode, attr.rdev) == (stat.S_IFCHR | 0o666, _NULL)


def test_a_plain_device_stays_one_under_chmod_and_chown(plain: Place) -> None:
    plain.upper.make_node(plain.root, b"null", Birth(stat.S_IFBLK | 0o666, 0, 0), _NULL, replaces=False)
    fd = plain.fd(b"null")
    plain.upper.chmod(fd, 0o600)
    plain.upper.chown(fd, 3, 4)
    attr = plain.upper.attr(fd)
    assert (attr.mode, attr.uid, attr.gid, attr.rdev) == (stat.S_IFBLK | 0o600, 3, 4, _NULL)


def test_plain_links_keep_the_owner_of_the_process(plain: Place) -> None:
    plain.upper.make_symlink(plain.root, b"link", b"x", Birth(_LINK, 12, 34), replaces=False)
    plain.upper.make_node(plain.root, b"fifo", Birth(stat.S_IFIFO | 0o644, 12, 34), 0, replaces=False)
    for name in (b"link", b"fifo"):
        assert (plain.attr(name).uid, plain.attr(name).gid) == (0, 0)
        with pytest.raises(NotPermitted):
            plain.upper.chown(plain.fd(name), 12, -1)
        plain.upper.chown(plain.fd(name), 0, 0)


def test_a_plain_fifo_of_somebody_else_has_its_mode_all_the_same(plain: Place) -> None:
    plain.upper.make_node(plain.root, b"new", Birth(stat.S_IFIFO | 0o640, 12, 34), 0, replaces=False)
    os.close(plain.upper.copy_special(plain.root, b"copy", _LOWER_FIFO, (), None))
    assert [plain.attr(name).mode for name in (b"new", b"copy")] == [stat.S_IFIFO | 0o640] * 2


def test_a_plain_fifo_has_its_own_mode(plain: Place) -> None:
    plain.upper.make_node(plain.root, b"fifo", Birth(stat.S_IFIFO | 0o644, 0, 0), 0, replaces=False)
    plain.upper.chmod(plain.fd(b"fifo"), 0o600)
    assert plain.attr(b"fifo").mode == stat.S_IFIFO | 0o600


@pytest.mark.parametrize("record", [b"", b"1:2:3", b"x:0:0:0", b"100644:0:0:0:0"])
def test_a_damaged_record_is_named(plain: Place, record: bytes) -> None:
    plain.file(b"a")
    os.setxattr(plain.path / "a", b"user.fusestore.stat", record)
    with pytest.raises(StoreDamaged, match=r"user\.fusestore\.stat"):
        plain.attr(b"a")


# Xattrs


@pytest.mark.parametrize(
    ("scheme", "name", "stored"),
    [
        (Scheme.NATIVE, b"user.k", b"user.k"),
        (Scheme.NATIVE, b"trusted.k", b"trusted.k"),
        (Scheme.NATIVE, b"trusted.overlay.opaque", b"trusted.overlay.overlay.opaque"),
        (Scheme.NATIVE, b"trusted.overlay.overlay.k", b"trusted.overlay.overlay.overlay.k"),
        (Scheme.NATIVE, b"user.overlay.opaque", b"user.overlay.opaque"),
        (Scheme.NATIVE, b"user.fusestore.stat", b"user.fusestore.stat"),
        (Scheme.PLAIN, b"user.k", b"user.k"),
        (Scheme.PLAIN, b"user.overlay.opaque", b"user.overlay.overlay.opaque"),
        (Scheme.PLAIN, b"trusted.overlay.opaque", b"user.fusestore.xattr.trusted.overlay.opaque"),
        (Scheme.PLAIN, b"security.capability", b"user.fusestore.xattr.security.capability"),
    ],
)
def test_xattrs_are_stored_as(base: Path, scheme: Scheme, name: bytes, stored: bytes) -> None:
    place = _place(base, scheme)
    fd = place.directory(b"d")
    place.upper.set_xattr(fd, name, b"value")
    assert os.listxattr(place.path / "d") == [os.fsdecode(stored)]
    assert place.upper.xattrs(fd) == ((name, b"value"),)
    assert place.upper.xattr(fd, name) == b"value"
    place.upper.remove_xattr(fd, name)
    assert not os.listxattr(place.path / "d")


def test_marks_of_the_format_are_not_the_users(place: Place) -> None:
    fd = place.directory(b"d")
    place.upper.set_opaque(fd)
    place.upper.set_redirect(fd, b"/d")
    place.upper.chown(fd, 5, 5)
    assert place.upper.xattrs(fd) == ()
    opaque = place.upper.scheme.value + b"opaque"
    assert place.upper.xattr(fd, opaque) is None
    with pytest.raises(NoAttribute):
        place.upper.remove_xattr(fd, opaque)


def test_what_the_kernel_leaves_on_copied_files_is_not_shown(native: Place) -> None:
    native.file(b"a")
    os.setxattr(native.path / "a", b"trusted.overlay.origin", b"\0\xfb")
    assert native.upper.xattrs(native.fd(b"a")) == ()


def test_a_missing_xattr_is_no_attribute(place: Place) -> None:
    fd = place.directory(b"d")
    assert place.upper.xattr(fd, b"user.none") is None
    with pytest.raises(NoAttribute):
        place.upper.remove_xattr(fd, b"user.none")


def test_the_stores_own_xattrs_are_out_of_reach(plain: Place) -> None:
    plain.file(b"a", uid=5)
    fd = plain.fd(b"a")
    with pytest.raises(NotPermitted):
        plain.upper.set_xattr(fd, b"user.fusestore.stat", b"0:0:0:0")
    with pytest.raises(NotPermitted):
        plain.upper.remove_xattr(fd, b"user.fusestore.stat")
    assert plain.upper.xattr(fd, b"user.fusestore.stat") is None


# Copies

_LOWER = Attr(stat.S_IFREG | 0o640, 7, 8, 0, 0, 1, 0, 1111, 2222, 3333)


def test_a_staged_copy_appears_whole(place: Place) -> None:
    staged, fd = place.upper.stage()
    os.write(fd, b"content")
    place.upper.dress_copy(fd, _LOWER, ((b"user.k", b"v"),))
    os.close(fd)
    os.close(place.upper.publish(staged, place.root, b"a"))
    attr = place.attr(b"a")
    assert (attr.mode, attr.uid, attr.gid, attr.mtime_ns) == (stat.S_IFREG | 0o640, 7, 8, 2222)
    assert place.upper.xattrs(place.fd(b"a")) == ((b"user.k", b"v"),)
    assert (place.path / "a").read_bytes() == b"content" and not place.left


def test_a_copy_never_replaces(place: Place) -> None:
    place.file(b"a")
    staged, fd = place.upper.stage()
    os.close(fd)
    with pytest.raises(FileExistsError):
        place.upper.publish(staged, place.root, b"a")


@pytest.mark.parametrize("format", [stat.S_IFDIR, stat.S_IFCHR, stat.S_IFIFO, stat.S_IFLNK])
def test_a_copy_of_something_special_has_its_times(place: Place, format: int) -> None:
    attr = Attr(format | 0o600, 0, 0, 0, _NULL if format == stat.S_IFCHR else 0, 1, 0, 1111, 2222, 3333)
    if format == stat.S_IFDIR:
        place.upper.copy_directory(place.root, b"a", attr, ())
    else:
        target = b"x" if format == stat.S_IFLNK else None
        place.upper.copy_special(place.root, b"a", attr, (), target)
    copied = place.attr(b"a")
    assert (stat.S_IFMT(copied.mode), copied.rdev, copied.mtime_ns) == (format, attr.rdev, 2222)


@pytest.mark.parametrize("format", [stat.S_IFIFO, stat.S_IFLNK])
def test_copies_lose_the_xattrs_that_their_type_cannot_have(place: Place, format: int) -> None:
    attr = Attr(format | 0o600, 0, 0, 0, 0, 1, 0, 0, 0, 0)
    target = b"x" if format == stat.S_IFLNK else None
    xattrs = ((b"trusted.k", b"t"), (b"user.k", b"u"))
    place.upper.copy_special(place.root, b"a", attr, xattrs, target)
    kept = xattrs[:1] if place.upper.scheme is Scheme.NATIVE else ()
    assert place.upper.xattrs(place.fd(b"a")) == kept


@pytest.mark.parametrize("format", [stat.S_IFDIR, stat.S_IFIFO])
def test_a_copy_that_fails_leaves_nothing(place: Place, format: int) -> None:
    place.file(b"a")
    attr = Attr(format | 0o600, 0, 0, 0, 0, 1, 0, 0, 0, 0)
    with pytest.raises(FileExistsError):
        if format == stat.S_IFDIR:
            place.upper.copy_directory(place.root, b"a", attr, ())
        else:
            place.upper.copy_special(place.root, b"a", attr, (), None)
    assert not place.left


# As the plain user it is made for


def _use_as_plain_user(place: Place) -> list[tuple[int, int, int, int]]:
    upper, root = place.upper, place.root
    os.close(upper.make_file(root, b"file", Birth(stat.S_IFREG | 0o4000, 0, 0), replaces=False))
    upper.make_directory(root, b"d", Birth(stat.S_IFDIR | 0o000, 0, 5), replaces=False)
    upper.make_node(root, b"null", Birth(stat.S_IFCHR | 0o666, 0, 0), _NULL, replaces=False)
    upper.make_symlink(root, b"symlink", b"x", Birth(_LINK, 0, 0), replaces=False)
    upper.make_node(root, b"fifo", Birth(stat.S_IFIFO | 0o600, 0, 0), 0, replaces=False)
    inside = upper.open(root, b"d")
    upper.link(upper.open(root, b"file"), inside, b"link", replaces=False)
    upper.link(upper.open(root, b"symlink"), inside, b"symlink", replaces=False)
    upper.move(root, b"file", inside, b"moved", leave_whiteout=True, over_whiteout=False)
    upper.put_whiteout(root, b"symlink", replaces=True)
    upper.set_xattr(inside, b"security.k", b"v")
    upper.set_redirect(inside, b"/e")
    shown = [(upper.open(root, name)) for name in (b"d", b"null", b"fifo")] + [upper.open(inside, b"link")]
    return [(attr.mode, attr.uid, attr.gid, attr.nlink) for attr in map(upper.attr, shown)]


def test_a_plain_user_can_do_all_of_it(plain: Place) -> None:
    assert _NOBODY.call(_use_as_plain_user, plain) == [
        (stat.S_IFDIR, 0, 5, 2),
        (stat.S_IFCHR | 0o666, 0, 0, 1),
        (stat.S_IFIFO | 0o600, 65534, 65534, 1),
        (stat.S_IFREG | 0o4000, 0, 0, 2),
    ]
    assert _is_whiteout(plain.path / "file") and _is_whiteout(plain.path / "symlink")


FOR_THE_UNION_ALONE = {
    "an owner": lambda upper, fd: upper.chown(fd, 12, 34),
    "an attribute": lambda upper, fd: upper.set_xattr(fd, b"security.x", b"1"),
    "an ACL": lambda upper, fd: upper.set_xattr(fd, DEFAULT, b""),
    "a renamed directory": lambda upper, fd: upper.set_redirect(fd, b"/etc"),
}


@pytest.mark.parametrize("what", FOR_THE_UNION_ALONE)
def test_what_the_kernel_would_misunderstand_is_named(plain: Place, what: str) -> None:
    outer = plain.directory(b"outer")
    assert for_union_alone(plain.root) is None
    plain.upper.make_directory(outer, b"inner", Birth(stat.S_IFDIR | 0o755, 0, 0), replaces=False)
    fd = plain.upper.open(outer, b"inner")
    plain.upper.set_opaque(fd)
    plain.upper.set_xattr(fd, b"user.x", b"1")
    assert for_union_alone(plain.root) is None
    FOR_THE_UNION_ALONE[what](plain.upper, fd)
    assert for_union_alone(plain.root) == "outer/inner"


def test_bad_records_are_found_at_any_depth(plain: Place) -> None:
    last = deepen(plain.path, 150)
    Path(f"/proc/self/fd/{last}/f").touch()
    (plain.path / "sound").touch()
    (plain.path / "link").symlink_to("sound")
    wrong = (plain.path, Path(f"/proc/self/fd/{last}"), Path(f"/proc/self/fd/{last}/f"))
    for path in wrong:
        os.setxattr(path, RECORD, b"wrong")
    os.close(last)
    deepest = "/".join([os.fspath(plain.path), *["d" * 50] * 150])
    with few_descriptors():
        found = list(bad_records(os.fspath(plain.path)))
    assert sorted(found) == [os.fspath(plain.path), deepest, f"{deepest}/f"]


def test_of_what_is_not_there_no_record_is_bad(tmp_path: Path) -> None:
    assert list(bad_records(f"{tmp_path}/none")) == []
