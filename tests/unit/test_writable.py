"""Changes in a rootfs, one at a time: what shows, and what is on disk in the upper."""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig.layers import MTIME_NS, Member, device, directory, fifo, file, hard_link, layer, symlink
from rig.treecalls import CALLER, Area, FakeKernel, errno_from

from fusestore import disk
from fusestore.errors import NotFound
from fusestore.inodes import Caller, Changes, run
from fusestore.objects import Object
from fusestore.rootfs import Rootfs
from fusestore.scheme import Scheme
from fusestore.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE
from fusestore.union import Resolved
from fusestore.upper import Upper

pytestmark = pytest.mark.root

_NULL = os.makedev(1, 3)
_IMAGE: list[Member] = [
    directory(b"d", 0o750, uid=7, xattrs=((b"user.k", b"d"),)),
    file(b"d/a", b"content a", 0o4711, uid=5, gid=6, xattrs=((b"user.k", b"a"),)),
    directory(b"d/e"),
    file(b"d/e/x", b"content x"),
    file(b"b", b"content b"),
    hard_link(b"d/l", b"b"),
    hard_link(b"d/e/m", b"b"),
    directory(b"empty"),
    symlink(b"s", b"d/a", uid=9),
    device(b"null", _NULL, mode=0o666),
    fifo(b"fifo"),
]


@pytest.fixture
def area() -> Iterator[Area]:
    made = Area([layer(*_IMAGE)])
    yield made
    made.close()


@pytest.fixture
def kernel(area: Area) -> Iterator[FakeKernel]:
    made = area.kernel()
    yield made
    made.detach()


def _again(area: Area, kernel: FakeKernel) -> FakeKernel:
    """The same upper, opened anew by a process that knows nothing."""
    kernel.detach()
    return area.kernel()


def _is_whiteout(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def _redirect(path: Path) -> bytes | None:
    try:
        return os.getxattr(path, b"trusted.overlay.redirect")
    except OSError:
        return None


def _is_opaque(path: Path) -> bool:
    return "trusted.overlay.opaque" in os.listxattr(path)


def _read(kernel: FakeKernel, path: bytes) -> bytes:
    handle = run(kernel.rootfs.open(kernel.node(path), os.O_RDONLY, CALLER))
    try:
        return run(handle.read(0, 1000))
    finally:
        handle.close()


# Copy-up


@pytest.mark.parametrize("path", [b"d/a", b"d", b"d/e/x", b"b", b"s", b"null", b"fifo", b"empty"])
@pytest.mark.parametrize("scheme", list(Scheme))
def test_a_copy_is_what_it_is_a_copy_of(path: bytes, scheme: Scheme) -> None:
    area = Area([layer(*_IMAGE)], scheme)
    kernel = area.kernel()
    before = kernel.snapshot()
    run(kernel.rootfs.copy_up(kernel.node(path)))
    assert kernel.node(path).in_upper
    after = kernel.snapshot()
    if scheme is Scheme.PLAIN and path == b"s":  # whose owner it cannot keep
        del before[b"s"], after[b"s"]
    assert after == before
    kernel.detach()
    area.close()


@pytest.mark.parametrize("path", [b"d/e/x", b"b"])
def test_copying_up_changes_no_time_of_the_directories(kernel: FakeKernel, path: bytes) -> None:
    kernel.write(path, 0, b"new")
    tree = kernel.snapshot()
    assert {tree[name].mtime_ns for name in (b"d", b"d/e")} == {MTIME_NS}


def test_a_copy_takes_all_its_names_along(area: Area, kernel: FakeKernel) -> None:
    kernel.write(b"d/l", 8, b"new")
    names = ("b", "d/l", "d/e/m")
    assert {(area.diff / name).read_bytes() for name in names} == {b"content new"}
    assert len({(area.diff / name).stat().st_ino for name in names}) == 1


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("written", [b"b", b"z/l", b"z/y/m"])
def test_names_in_renamed_directories_come_along(
    area: Area, kernel: FakeKernel, written: bytes, again: bool
) -> None:
    kernel.rename(b"d/e", b"d/y", 0)
    kernel.rename(b"d", b"z", 0)
    kernel.forget()
    kernel = _again(area, kernel) if again else kernel
    assert kernel.rootfs.attr(kernel.node(written)).nlink == 3
    kernel.write(written, 8, b"new")
    assert {_read(kernel, name) for name in (b"b", b"z/l", b"z/y/m")} == {b"content new"}
    kernel.detach()


def test_a_name_in_a_removed_directory_that_had_moved_counts_no_more(kernel: FakeKernel) -> None:
    kernel.rename(b"d/e", b"y", 0)
    for name in (b"y/m", b"y/x"):
        kernel.unlink(name)
    kernel.rmdir(b"y")
    kernel.mkdir(b"y", 0o755)
    assert kernel.rootfs.attr(kernel.node(b"b")).nlink == 2
    assert kernel.rootfs._moved == {}


def test_names_in_a_directory_that_the_kernel_renamed_come_along_once_they_were_met(
    area: Area, kernel: FakeKernel
) -> None:
    kernel.rename(b"d", b"z", 0)
    os.removexattr(area.diff, b"trusted.overlay.fusestore.moved")
    kernel = _again(area, kernel)
    assert kernel.rootfs.attr(kernel.node(b"b")).nlink == 1
    kernel.node(b"z/l")
    assert kernel.rootfs.attr(kernel.node(b"b")).nlink == 2
    kernel.detach()


@pytest.mark.parametrize("step", ["dress_copy", "publish", "open"])
def test_a_copy_that_fails_leaves_the_tree_as_it_was(
    area: Area, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    before = kernel.snapshot()
    kernel.chmod(b"d", 0o750)  # the directory is copied up before

    def refuse(*arguments: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(Upper, step, refuse)
        assert errno_from(kernel.write, b"d/a", 0, b"new") == errno.ENOSPC
    assert kernel.snapshot() == before
    assert not os.listdir(area.path / "scratch")
    kernel.forget()


def test_a_copy_that_cannot_have_all_its_names_has_none(
    area: Area, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = kernel.snapshot()
    link = Upper.link

    def refuse(upper: Upper, fd: int, directory: int, name: bytes, replaces: bool) -> None:
        if name == b"m":
            raise OSError(errno.EMLINK, "too many links")
        link(upper, fd, directory, name, replaces)

    with monkeypatch.context() as patch:
        patch.setattr(Upper, "link", refuse)
        assert errno_from(kernel.write, b"b", 0, b"new") == errno.EMLINK
    assert kernel.snapshot() == before
    assert not os.path.lexists(area.diff / "b") and not os.path.lexists(area.diff / "d/l")
    kernel.write(b"b", 0, b"new")
    assert {_read(kernel, name) for name in (b"b", b"d/l", b"d/e/m")} == {b"newtent b"}


@pytest.mark.parametrize("copied", [False, True], ids=["lower", "upper"])
def test_many_hard_links_cost_as_much_each_as_few(copied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0
    resolve = Rootfs.resolve

    def count(rootfs: Rootfs, directory: Object, name: bytes) -> Resolved | None:
        nonlocal asked
        asked += 1
        return resolve(rootfs, directory, name)

    monkeypatch.setattr(Rootfs, "resolve", count)
    costs = []
    for links in (20, 200):
        area = Area([layer(file(b"f", b"x"), *(hard_link(b"%d" % n, b"f") for n in range(links)))])
        kernel = area.kernel()
        if copied:
            kernel.write(b"f", 0, b"y")
        asked = 0
        assert kernel.snapshot()[b"f"].nlink == links + 1
        for n in range(links):
            kernel.unlink(b"%d" % n)
        assert kernel.snapshot()[b"f"].nlink == 1
        costs.append(asked / links)
        kernel.detach()
        area.close()
    assert costs[1] < costs[0] * 1.1


def test_two_copy_ups_of_one_file_make_one_copy(area: Area, kernel: FakeKernel) -> None:
    thing = kernel.node(b"d/a")
    first, second = (kernel.rootfs.open(thing, os.O_RDWR, CALLER) for _ in range(2))
    copies = [next(first), next(second)]  # type: ignore[call-overload]
    for copy in copies:
        copy()
    handles = []
    for steps in (second, first):
        with pytest.raises(StopIteration) as stop:
            steps.send(None)  # type: ignore[union-attr]
        handles.append(stop.value.value)
    handles[0].write(0, b"CON")
    handles[1].write(3, b"TENT")
    assert _read(kernel, b"d/a") == b"CONTENT a"
    assert not os.listdir(area.path / "scratch")
    for handle in handles:
        handle.close()


def test_a_file_removed_while_it_is_copied_up_is_an_orphan(area: Area, kernel: FakeKernel) -> None:
    kernel.hold(1, b"d/a", False)
    steps = kernel.rootfs.open(kernel.node(b"d/a"), os.O_RDWR, CALLER)
    copy = next(steps)  # type: ignore[call-overload]
    kernel.unlink(b"d/a")
    copy()
    with pytest.raises(StopIteration) as stop:
        steps.send(None)  # type: ignore[union-attr]
    stop.value.value.write(8, b"!")
    assert kernel.held(1) == (0, b"content !")
    assert _is_whiteout(area.diff / "d/a")
    stop.value.value.close()


def test_a_failing_copy_leaves_nothing_in_use(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(Upper, "stage", refuse)
        assert errno_from(kernel.write, b"d/a", 0, b"new") == errno.ENOSPC
    assert not kernel.rootfs.in_use


# Truncating


@pytest.mark.parametrize("size", [0, 4, 100])
def test_a_file_truncated_in_the_layer_is_modified(kernel: FakeKernel, size: int) -> None:
    kernel.truncate(b"d/a", size)
    entry = kernel.snapshot()[b"d/a"]
    assert (entry.size, entry.mtime_ns > MTIME_NS) == (size, True)
    assert _read(kernel, b"d/a") == b"content a"[:size] + bytes(max(0, size - 9))


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDONLY | os.O_NOATIME, os.O_RDWR | os.O_NOATIME])
def test_what_is_read_for_the_kernel_or_without_atime_is_not_accessed(
    area: Area, kernel: FakeKernel, flags: int
) -> None:
    kernel.chmod(b"d/a", 0o600)
    handle = run(kernel.rootfs.open(kernel.node(b"d/a"), flags, CALLER))
    assert run(handle.read(0, 100)) == b"content a"
    run(handle.close())
    assert (area.diff / "d/a").stat().st_atime_ns == MTIME_NS


def test_opening_with_truncation_copies_no_content(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(kernel.rootfs.opened.readers[0]), "read", None)
    kernel.overwrite(b"d/a", b"new")
    assert _read(kernel, b"d/a") == b"new"


# Making


def test_a_set_group_id_directory_passes_its_group_on(kernel: FakeKernel) -> None:
    kernel.chown(b"empty", 0, 42)
    kernel.chmod(b"empty", 0o2755)
    kernel.create(b"empty/file", 0o644, b"")
    kernel.mkdir(b"empty/d", 0o755)
    kernel.symlink(b"empty/s", b"x")
    tree = kernel.snapshot()
    assert [tree[b"empty/" + name].gid for name in (b"file", b"d", b"s")] == [42, 42, 42]
    assert [tree[b"empty/" + name].mode for name in (b"file", b"d")] == [0o644, 0o2755]


def test_what_is_made_belongs_to_the_caller(kernel: FakeKernel) -> None:
    caller = Caller(uid=12, gid=34, pid=1, umask=0)
    made = kernel.rootfs.mkdir(kernel.rootfs.root, b"new", 0o700, caller)
    attr = kernel.rootfs.attr(made)
    assert (attr.uid, attr.gid, attr.mode) == (12, 34, stat.S_IFDIR | 0o700)


def test_a_device_that_would_be_a_whiteout_is_refused(area: Area, kernel: FakeKernel) -> None:
    assert errno_from(kernel.mknod, b"new", stat.S_IFCHR, 0o600, 0) == errno.EPERM
    assert not os.path.lexists(area.diff / "new")


def test_a_link_to_a_taken_name_copies_nothing(kernel: FakeKernel) -> None:
    steps = kernel.rootfs.link(kernel.node(b"d/a"), kernel.rootfs.root, b"b")
    assert errno_from(lambda: kernel.link(b"d/a", b"b")) == errno.EEXIST
    steps.close()
    assert not kernel.node(b"d/a").in_upper


def test_nothing_is_made_in_a_directory_that_is_gone(kernel: FakeKernel) -> None:
    gone = kernel.node(b"empty")
    kernel.rootfs._inodes.remember(gone)
    kernel.rmdir(b"empty")
    for call in (
        lambda: kernel.rootfs.create(gone, b"x", 0o644, os.O_RDWR, CALLER),
        lambda: kernel.rootfs.mkdir(gone, b"x", 0o755, CALLER),
        lambda: kernel.rootfs.symlink(gone, b"x", b"y", CALLER),
        lambda: run(kernel.rootfs.link(kernel.node(b"b"), gone, b"x")),
        lambda: run(kernel.rootfs.rename(kernel.rootfs.root, b"b", gone, b"x", 0)),
        lambda: kernel.rootfs.lookup(gone, b"x"),
    ):
        with pytest.raises((NotFound, FileNotFoundError)):
            call()
    assert kernel.rootfs.listing(gone) == []
    assert kernel.rootfs.attr(gone).nlink == 0


# Removing


def test_a_lower_name_is_hidden_by_a_whiteout(area: Area, kernel: FakeKernel) -> None:
    kernel.unlink(b"d/a")
    assert _is_whiteout(area.diff / "d/a")
    assert errno_from(kernel.node, b"d/a") == errno.ENOENT


def test_an_upper_name_is_removed_without_one(area: Area, kernel: FakeKernel) -> None:
    kernel.create(b"d/new", 0o644, b"")
    kernel.unlink(b"d/new")
    assert os.listdir(area.diff / "d") == []


def test_a_directory_whose_lower_names_are_hidden_can_be_removed(area: Area, kernel: FakeKernel) -> None:
    kernel.unlink(b"d/e/x")
    kernel.unlink(b"d/e/m")
    kernel.rmdir(b"d/e")
    assert _is_whiteout(area.diff / "d/e")
    kernel.mkdir(b"d/e", 0o755)
    assert _is_opaque(area.diff / "d/e")
    assert kernel.rootfs.listing(kernel.node(b"d/e")) == []


def test_a_directory_that_cannot_be_removed_shows_nothing_it_hid(
    area: Area, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.unlink(b"d/e/x")
    kernel.unlink(b"d/e/m")

    def refuse(*arguments: object, **more: object) -> None:
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(disk.Disk, "renameat2", refuse)
        assert errno_from(kernel.rmdir, b"d/e") == errno.EIO
    assert kernel.rootfs.listing(kernel.node(b"d/e")) == []
    kernel = _again(area, kernel)
    assert kernel.rootfs.listing(kernel.node(b"d/e")) == []
    kernel.detach()


def test_a_lower_file_unlinked_while_open_is_read_and_written(kernel: FakeKernel) -> None:
    kernel.hold(1, b"d/a", False)
    kernel.unlink(b"d/a")
    assert kernel.held(1) == (0, b"content a")
    run(kernel.rootfs.setattr(kernel._handles[1].node, Changes(size=7, mode=0o600), CALLER))
    assert kernel.held(1) == (0, b"content")
    assert kernel.rootfs.attr(kernel._handles[1].node).mode == stat.S_IFREG | 0o600


def test_an_upper_file_unlinked_while_open_is_read_and_written(kernel: FakeKernel) -> None:
    kernel.create(b"new", 0o644, b"content")
    kernel.hold(1, b"new", True)
    kernel.unlink(b"new")
    kernel.held_write(1, 7, b"!")
    kernel.create(b"new", 0o644, b"other")
    assert kernel.held(1) == (0, b"content!")


def test_an_unlinked_upper_file_is_kept_though_its_descriptor_was_closed(kernel: FakeKernel) -> None:
    kernel.create(b"new", 0o644, b"content")
    kernel.hold(1, b"new", True)
    kernel.exhaust()
    kernel.unlink(b"new")
    assert kernel.held(1) == (0, b"content")


@pytest.mark.parametrize("scheme", list(Scheme))
@pytest.mark.parametrize("path", [b"empty", b"fifo", b"null", b"s"])
def test_what_was_removed_while_open_can_be_changed(path: bytes, scheme: Scheme) -> None:
    area = Area([layer(*_IMAGE)], scheme)
    kernel = area.kernel()
    rootfs, thing = kernel.rootfs, kernel.node(path)
    kernel._inodes.remember(thing)  # as an open descriptor does
    (kernel.rmdir if path == b"empty" else kernel.unlink)(path)
    mode = 0o777 if path == b"s" else 0o700
    changes = Changes(mtime_ns=5) if path == b"s" else Changes(mtime_ns=5, mode=mode)
    run(rootfs.setattr(thing, changes, CALLER))
    attr = rootfs.attr(thing)
    assert (attr.nlink, attr.mtime_ns, stat.S_IMODE(attr.mode)) == (0, 5, mode)
    assert _is_whiteout(area.diff / os.fsdecode(path))
    assert errno_from(kernel.node, path) == errno.ENOENT
    kernel._inodes.forget(thing.ino, 1)
    kernel.detach()
    area.close()


def test_an_orphan_gets_no_new_name(kernel: FakeKernel) -> None:
    kernel.hold(1, b"d/a", False)
    kernel.unlink(b"d/a")
    with pytest.raises(NotFound):
        run(kernel.rootfs.link(kernel._handles[1].node, kernel.rootfs.root, b"new"))


def test_a_file_that_lost_one_name_is_found_by_another(kernel: FakeKernel) -> None:
    kernel.write(b"b", 0, b"C")
    for name in (b"b", b"d/l", b"d/e/m"):
        kernel.node(name)
    kernel.unlink(b"b")
    thing = kernel.node(b"d/l")
    kernel.exhaust()
    assert kernel.rootfs.attr(thing).nlink == 2
    assert kernel.rootfs.lookup(kernel.node(b"d"), b"l") is thing


def test_a_file_that_lost_its_only_known_name_keeps_its_descriptor(kernel: FakeKernel) -> None:
    kernel.write(b"b", 0, b"C")
    kernel.forget()
    kernel.hold(1, b"b", False)
    kernel.unlink(b"b")
    for number in range(20):
        kernel.create(b"more%d" % number, 0o644, b"")
    assert kernel.held(1) == (2, b"Content b")


# Moving


def test_a_renamed_lower_directory_is_redirected(area: Area, kernel: FakeKernel) -> None:
    kernel.rename(b"d", b"z", 0)
    assert _redirect(area.diff / "z") == b"/d"
    assert _is_whiteout(area.diff / "d")
    assert _names(kernel, b"z") == [b"a", b"e", b"l"]


def test_a_directory_moved_out_of_a_moved_one_is_redirected_to_the_image(
    area: Area, kernel: FakeKernel
) -> None:
    kernel.rename(b"d", b"z", 0)
    kernel.rename(b"z/e", b"y", 0)
    assert _redirect(area.diff / "y") == b"/d/e"
    kernel = _again(area, kernel)
    assert (_names(kernel, b"y"), _names(kernel, b"z")) == ([b"m", b"x"], [b"a", b"l"])
    kernel.detach()


def test_a_new_directory_in_place_of_a_lower_one_is_opaque(area: Area, kernel: FakeKernel) -> None:
    kernel.mkdir(b"new", 0o755)
    kernel.rename(b"new", b"empty", 0)
    assert _is_opaque(area.diff / "empty")
    kernel.mkdir(b"new", 0o755)
    kernel.rename(b"new", b"d", RENAME_EXCHANGE)
    assert _is_opaque(area.diff / "d") and _redirect(area.diff / "new") == b"/d"
    kernel = _again(area, kernel)
    assert (_names(kernel, b"d"), _names(kernel, b"new")) == ([], [b"a", b"e", b"l"])
    kernel.detach()


def test_a_lower_directory_takes_the_place_of_a_hidden_one(area: Area, kernel: FakeKernel) -> None:
    kernel.rmdir(b"empty")
    kernel.rename(b"d", b"empty", 0)
    assert _redirect(area.diff / "empty") == b"/d" and _is_whiteout(area.diff / "d")
    kernel.rename(b"empty", b"d", 0)
    assert _is_whiteout(area.diff / "empty")
    kernel = _again(area, kernel)
    assert _names(kernel, b"d") == [b"a", b"e", b"l"]
    kernel.detach()


def test_a_directory_with_whiteouts_is_renamed_over(area: Area, kernel: FakeKernel) -> None:
    kernel.unlink(b"d/e/x")
    kernel.unlink(b"d/e/m")
    kernel.rename(b"empty", b"d/e", 0)
    assert _redirect(area.diff / "d/e") == b"/empty"
    kernel = _again(area, kernel)
    assert _names(kernel, b"d/e") == []
    kernel.detach()


def test_a_rename_that_fails_over_a_cleared_directory_shows_nothing_it_hid(
    area: Area, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.unlink(b"d/e/x")
    kernel.unlink(b"d/e/m")
    kernel.chmod(b"empty", 0o700)

    def refuse(*arguments: object, **more: object) -> None:
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(Upper, "move", refuse)
        assert errno_from(kernel.rename, b"empty", b"d/e", 0) == errno.EIO
    assert _names(kernel, b"d/e") == []
    kernel = _again(area, kernel)
    assert _names(kernel, b"d/e") == []
    kernel.detach()


@pytest.mark.parametrize("flags", [0, RENAME_EXCHANGE])
def test_what_moved_is_found_without_its_descriptor(kernel: FakeKernel, flags: int) -> None:
    kernel.rename(b"d", b"empty", flags)
    kernel.exhaust()
    kernel.chmod(b"empty", 0o700)
    assert kernel.snapshot()[b"empty"].mode == 0o700
    if flags:
        kernel.exhaust()
        kernel.chmod(b"d", 0o711)
        assert kernel.snapshot()[b"d"].mode == 0o711


def test_exchanged_directories_keep_the_link_counts(kernel: FakeKernel) -> None:
    kernel.snapshot()
    kernel.rename(b"b", b"d/e", RENAME_EXCHANGE)
    tree = kernel.snapshot()
    assert (tree[b"."].nlink, tree[b"d"].nlink) == (5, 2)


def test_lower_and_upper_change_places(area: Area, kernel: FakeKernel) -> None:
    kernel.mkdir(b"new", 0o755)
    kernel.create(b"new/n", 0o644, b"")
    kernel.rename(b"d/a", b"new", RENAME_EXCHANGE)
    assert _read(kernel, b"new") == b"content a"
    assert _names(kernel, b"d/a") == [b"n"]
    kernel = _again(area, kernel)
    assert _read(kernel, b"new") == b"content a"
    assert _names(kernel, b"d/a") == [b"n"]
    kernel.detach()


@pytest.mark.parametrize(
    ("path", "new_path", "flags", "expected"),
    [
        (b"none", b"x", 0, errno.ENOENT),
        (b"b", b"d/a", RENAME_NOREPLACE, errno.EEXIST),
        (b"b", b"d/l", RENAME_NOREPLACE, errno.EEXIST),
        (b"b", b"none", RENAME_EXCHANGE, errno.ENOENT),
        (b"b", b"empty", 0, errno.EISDIR),
        (b"empty", b"b", 0, errno.ENOTDIR),
        (b"empty", b"d", 0, errno.ENOTEMPTY),
        (b"d", b"empty", 0, 0),
        (b"b", b"d/l", 0, 0),
        (b"b", b"d/a", RENAME_EXCHANGE, 0),
    ],
)
def test_renames_are_refused_as_by_other_file_systems(
    kernel: FakeKernel, path: bytes, new_path: bytes, flags: int, expected: int
) -> None:
    rootfs = kernel.rootfs
    places = [(kernel.node(os.path.dirname(at)), os.path.basename(at)) for at in (path, new_path)]

    def rename() -> None:
        run(rootfs.rename(*places[0], *places[1], flags))

    try:
        rename()
    except Exception as error:
        assert getattr(error, "errno", None) == expected
        assert not kernel.node(b"b").in_upper
    else:
        assert expected == 0


def test_two_names_of_one_file_are_not_copied_to_be_renamed(kernel: FakeKernel) -> None:
    kernel.rename(b"b", b"d/l", 0)
    run(kernel.rootfs.rename(kernel.rootfs.root, b"b", kernel.node(b"d"), b"l", 0))
    assert not kernel.node(b"b").in_upper


def test_unknown_flags_of_rename_are_refused(kernel: FakeKernel) -> None:
    assert errno_from(kernel.rename, b"b", b"x", 4) == errno.EINVAL


def _names(kernel: FakeKernel, path: bytes) -> list[bytes]:
    return sorted(name for name, _ in kernel.rootfs.listing(kernel.node(path)))


# Xattrs


def test_the_users_xattrs_may_look_like_the_formats(area: Area, kernel: FakeKernel) -> None:
    kernel.set_xattr(b"d", b"trusted.overlay.opaque", b"y")
    assert _names(kernel, b"d") == [b"a", b"e", b"l"]
    kernel = _again(area, kernel)
    assert _names(kernel, b"d") == [b"a", b"e", b"l"]
    assert dict(kernel.snapshot()[b"d"].xattrs)["trusted.overlay.opaque"] == b"y"
    kernel.detach()


def test_removing_a_missing_xattr_copies_nothing(kernel: FakeKernel) -> None:
    assert errno_from(kernel.remove_xattr, b"b", b"user.none") == errno.ENODATA
    assert not kernel.node(b"b").in_upper


# Durability


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The inode numbers that went to disk, by fsync(2) or fdatasync(2)."""
    found: list[int] = []
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: found.append(os.fstat(fd).st_ino))
    return found


@pytest.mark.parametrize("datasync", [False, True])
@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("path", [b"new", b"d/a"])
def test_fsync_of_a_file_reaches_the_file_on_disk(
    area: Area, kernel: FakeKernel, synced: list[int], path: bytes, writable: bool, datasync: bool
) -> None:
    if path == b"new":
        kernel.create(path, 0o644, b"")
    kernel.hold(1, path, writable)
    kernel.write(path, 0, b"written by another handle")
    synced.clear()
    run(kernel._handles[1].fsync(datasync))
    assert synced == [(area.diff / os.fsdecode(path)).stat().st_ino]


def test_fsync_of_a_removed_file_reaches_it(kernel: FakeKernel, synced: list[int]) -> None:
    kernel.hold(1, b"d/a", True)
    kernel.unlink(b"d/a")
    synced.clear()
    run(kernel._handles[1].fsync(False))
    assert len(synced) == 1


def test_the_content_of_a_copy_is_on_disk_before_its_name_is(
    area: Area, kernel: FakeKernel, synced: list[int]
) -> None:
    run(kernel.rootfs.copy_up(kernel.node(b"d/a")))
    assert synced == [(area.diff / "d/a").stat().st_ino]


def test_fsync_of_a_directory_reaches_it(area: Area, kernel: FakeKernel, synced: list[int]) -> None:
    kernel.create(b"d/new", 0o644, b"")
    for path in ("", "d"):
        synced.clear()
        run(kernel.rootfs.fsync_dir(kernel.node(os.fsencode(path))))
        assert synced == [(area.diff / path).stat().st_ino]


def test_fsync_of_what_only_a_layer_has_does_nothing(kernel: FakeKernel, synced: list[int]) -> None:
    kernel.hold(1, b"d/a", False)
    assert kernel._handles[1].fsync(False) is None
    run(kernel.rootfs.fsync_dir(kernel.node(b"d")))
    assert not synced


def test_create_that_fails_at_its_end_holds_nothing(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(type(kernel.rootfs), "_made", full)
        assert errno_from(kernel.create, b"new", 0o644, b"") == errno.EMFILE
    assert (len(os.listdir("/proc/self/fd")), kernel.rootfs.in_use) == (before, False)
