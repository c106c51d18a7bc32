"""A rootfs that is looked at and read: numbers, listings, content, descriptors, its life."""

import errno
import gc
import os
import stat
from collections.abc import Callable, Iterator
from types import GeneratorType
from typing import Any

import pytest
from rig.layers import MTIME_NS, Layer, Member, directory, fifo, file, hard_link, layer, symlink, whiteout
from rig.pages import drop_pages
from rig.treecalls import CALLER, Area, FakeKernel, errno_from

from fusestore.errors import IsADirectory, NoAttribute, NotFound, QuotaExceeded, ReadOnly, Stale
from fusestore.inodes import Branch, Changes, FileHandle, Inodes, Node, run
from fusestore.layer import LayerBuilder
from fusestore.layerindex import LayerIndex
from fusestore.nodes import Attr, Extent, Inode, TarEntry, Xattrs
from fusestore.objects import Descriptors
from fusestore.rootfs import Opened, Rootfs
from fusestore.scheme import Scheme
from fusestore.union import Lower, Ref

pytestmark = pytest.mark.root

_IMAGE = [
    [directory(b"d"), file(b"d/a", b"content a"), file(b"b", b"content b"), hard_link(b"d/l", b"b")],
    [file(b"d/c"), symlink(b"s", b"d/a", xattrs=((b"trusted.k", b"v"),)), whiteout(b"none")],
]


@pytest.fixture
def area() -> Iterator[Area]:
    made = Area([layer(*members) for members in _IMAGE])
    yield made
    made.close()


@pytest.fixture
def kernel(area: Area) -> Iterator[FakeKernel]:
    made = area.kernel()
    yield made
    made.detach()


class _Images:
    """The opener of a tree without an upper."""

    def __init__(self, *layers: Layer) -> None:
        self.layers = layers
        self.closed = 0

    def open(self) -> Opened:
        readers: list[Any] = [layer.reader for layer in self.layers]
        return Opened(Lower([layer.index for layer in self.layers]), readers, None, self._close)

    def _close(self) -> None:
        self.closed += 1

    def peek(self) -> Attr | None:
        return None

    def peek_xattrs(self) -> Xattrs | None:
        return None

    def hold(self) -> "_Images":
        return self

    def close(self) -> None:
        pass


def _read_only(*members: Member, serial: int = 0, label: bytes = b"") -> Rootfs:
    rootfs = Rootfs(
        Inodes(), Descriptors(100), serial, Node(Branch(), Inode(1)), _Images(layer(*members)), label
    )
    run(rootfs.prepare())
    return rootfs


# Names


def test_lookup_of_a_missing_name(kernel: FakeKernel) -> None:
    with pytest.raises(NotFound):
        kernel.rootfs.lookup(kernel.rootfs.root, b"none")


def test_dot_dot(kernel: FakeKernel) -> None:
    rootfs = kernel.rootfs
    assert rootfs.parent(kernel.node(b"d")) is rootfs.root
    assert rootfs.parent(rootfs.root).ino == 1


def test_a_listing_gives_what_is_there_when_it_is_asked(kernel: FakeKernel) -> None:
    rootfs, top = kernel.rootfs, kernel.node(b"d")
    tokens = dict(rootfs.listing(top))
    before = kernel.node(b"d/a")
    kernel.write(b"d/a", 0, b"new")
    kernel.unlink(b"d/c")
    kernel.create(b"d/c", 0o600, b"")
    assert rootfs.listed(top, b"a", tokens[b"a"]) is before
    assert rootfs.listed(top, b"c", tokens[b"c"]) is kernel.node(b"d/c")


def test_a_listing_leaves_out_what_has_gone(kernel: FakeKernel) -> None:
    rootfs, top = kernel.rootfs, kernel.node(b"d")
    tokens = dict(rootfs.listing(top))
    kernel.unlink(b"d/a")
    assert rootfs.listed(top, b"a", tokens[b"a"]) is None


# Inode numbers


def test_hard_links_are_one_node(kernel: FakeKernel) -> None:
    assert kernel.node(b"b") is kernel.node(b"d/l")


def test_numbers_come_back_after_the_kernel_forgot(kernel: FakeKernel) -> None:
    before = kernel.node(b"d/a").ino
    kernel.forget()
    gc.collect()
    assert kernel.node(b"d/a").ino == before


def test_a_number_stays_through_copy_up(kernel: FakeKernel) -> None:
    before = kernel.node(b"d/a").ino
    kernel.write(b"d/a", 0, b"new")
    assert kernel.node(b"d/a").ino == before


@pytest.mark.parametrize("scheme", list(Scheme))
def test_a_copys_number_comes_back_after_the_kernel_forgot(scheme: Scheme) -> None:
    area = Area([layer(*members) for members in _IMAGE], scheme)
    kernel = area.kernel()
    paths = [b"d", b"d/a", b"b", b"d/l", *([b"s"] if scheme is Scheme.NATIVE else [])]
    before = {path: kernel.node(path).ino for path in paths}
    for path in paths:
        kernel.utimens(path, 5)
    kernel.forget()
    gc.collect()
    assert {path: kernel.node(path).ino for path in paths} == before
    kernel.rename(b"d", b"z", 0)
    kernel.forget()
    gc.collect()
    assert kernel.node(b"z/a").ino == before[b"d/a"]
    kernel.detach()
    area.close()


@pytest.mark.parametrize("scheme", list(Scheme))
def test_a_number_that_is_not_on_disk_stays_while_the_node_lives_on(scheme: Scheme) -> None:
    area = Area([layer(symlink(b"s", b"a"), fifo(b"f"))], scheme)
    kernel = area.kernel()
    before = [kernel.node(path).ino for path in (b"s", b"f")]
    for path in (b"s", b"f"):
        kernel.utimens(path, 5)
        kernel.forget_one(path)
    assert [kernel.node(path).ino for path in (b"s", b"f")] == before
    kernel.detach()
    area.close()


@pytest.mark.parametrize("record", [b"", b"1", b"x:y", b"-1:5", b"1:2:3", b"0:99999999999999999999"])
def test_a_damaged_origin_only_costs_the_number(area: Area, kernel: FakeKernel, record: bytes) -> None:
    kernel.write(b"d/a", 0, b"new")
    kernel.forget()
    gc.collect()
    os.setxattr(area.diff / "d/a", b"trusted.overlay.fusestore.origin", record)
    assert kernel.node(b"d/a").ino > 0


def test_numbers_of_two_trees_differ() -> None:
    numbers = [
        rootfs.lookup(rootfs.root, b"a").ino
        for rootfs in (_read_only(file(b"a"), serial=n) for n in (0, 1, 7))
    ]
    assert len(set(numbers)) == 3


def test_no_layer_shares_the_numbers_of_the_upper() -> None:
    rootfs = _read_only()
    upper, last = rootfs._number(7), rootfs._number(Ref(510, 7))
    assert upper is not None and last is not None and upper != last
    assert rootfs._number(Ref(511, 7)) is None


def test_no_tree_shares_the_numbers_made_up_for_those_without() -> None:
    made_up = Inodes().number()
    numbers = [_read_only(serial=(1 << 21) - past)._number(0) for past in (1, 2)]
    assert numbers[0] is None
    assert numbers[1] is not None and numbers[1] < made_up


def test_a_tree_with_a_serial_beyond_the_bits_has_numbers_too() -> None:
    rootfs = _read_only(file(b"a"), file(b"b"), serial=1 << 40)
    assert rootfs.lookup(rootfs.root, b"a").ino != rootfs.lookup(rootfs.root, b"b").ino


def test_a_number_taken_meanwhile_is_not_used_twice(area: Area) -> None:
    """An object that the kernel forgot, alive for its descriptor, when its old number is another's."""
    kernel = area.kernel()
    rootfs = kernel.rootfs
    kernel.write(b"d/a", 0, b"new")
    old = kernel.node(b"d/a")
    kernel.forget()
    usurper = Node(Branch(), old.ino)
    rootfs._inodes.remember(usurper)
    assert kernel.node(b"d/a").ino != usurper.ino
    kernel.detach()


def test_of_what_the_kernel_forgot_the_last_few_thousand_live_on() -> None:
    count = 5000
    rootfs = _read_only(*(file(b"%d" % number) for number in range(count)))
    inodes = rootfs._inodes
    for number in range(count):
        thing = rootfs.lookup(rootfs.root, b"%d" % number)
        inodes.remember(thing)
        inodes.forget(thing.ino, 1)
    last = thing.ino
    del thing
    gc.collect()
    assert len(rootfs._objects) == 4096
    assert inodes.recalled(last).lookups == 0
    with pytest.raises(Stale):
        inodes.recalled(rootfs.lookup(rootfs.root, b"0").ino)


def test_what_was_replaced_while_the_kernel_did_not_know_it_is_another(area: Area) -> None:
    """By another mount; the file system below gives the number again."""
    kernel = area.kernel()
    kernel.chmod(b"d", 0o700)
    kernel.snapshot()
    kernel.forget_one(b"d")
    os.setxattr(area.diff / "d", b"trusted.overlay.opaque", b"y")
    assert errno_from(kernel.node, b"d/a") == errno.ENOENT
    kernel.detach()


# Attributes


def test_link_counts_follow_what_is_hidden(kernel: FakeKernel) -> None:
    assert kernel.rootfs.attr(kernel.node(b"b")).nlink == 2
    kernel.unlink(b"d/l")
    assert kernel.rootfs.attr(kernel.node(b"b")).nlink == 1


def test_xattrs_of_the_layer_are_shown(kernel: FakeKernel) -> None:
    link = kernel.node(b"s")
    assert kernel.rootfs.xattrs(link) == ((b"trusted.k", b"v"),)
    with pytest.raises(NoAttribute):
        kernel.rootfs.xattr(link, b"user.none")


@pytest.mark.parametrize(("own", "shown"), [((), b"label"), (((b"security.selinux", b"own"),), b"own")])
def test_a_label_is_shown_on_what_has_none(own: tuple[tuple[bytes, bytes], ...], shown: bytes) -> None:
    rootfs = _read_only(file(b"a", xattrs=own), label=b"label")
    thing = rootfs.lookup(rootfs.root, b"a")
    assert rootfs.xattr(thing, b"security.selinux") == shown
    assert rootfs.xattrs(thing) == ((b"security.selinux", shown),)


def test_no_label_is_no_xattr() -> None:
    rootfs = _read_only(file(b"a"))
    with pytest.raises(NoAttribute):
        rootfs.xattr(rootfs.lookup(rootfs.root, b"a"), b"security.selinux")


# Content


@pytest.mark.parametrize(
    ("offset", "size", "expected"), [(0, 100, b"content a"), (3, 4, b"tent"), (9, 1, b""), (50, 5, b"")]
)
def test_reading_a_lower_file(kernel: FakeKernel, offset: int, size: int, expected: bytes) -> None:
    handle = run(kernel.rootfs.open(kernel.node(b"d/a"), os.O_RDONLY, CALLER))
    assert run(handle.read(offset, size)) == expected
    handle.close()


def test_reading_a_sparse_lower_file() -> None:
    builder = LayerBuilder()
    extents = (Extent(4, 3, 0), Extent(10, 2, 3))
    builder.add(TarEntry(b"0", b"a", b"", 0o644, 0, 0, 15, MTIME_NS, 0, (), extents))
    content = layer(file(b"x", b"abcde")).reader
    rootfs = Rootfs(
        Inodes(),
        Descriptors(100),
        0,
        Node(Branch(), Inode(1)),
        _Images(Layer(LayerIndex(builder.finish(5)), content)),
    )
    run(rootfs.prepare())
    handle = run(rootfs.open(rootfs.lookup(rootfs.root, b"a"), os.O_RDONLY, CALLER))
    whole = b"\0\0\0\0abc\0\0\0de\0\0\0"
    assert [run(handle.read(offset, 4)) for offset in range(16)] == [
        whole[offset : offset + 4] for offset in range(16)
    ]
    assert run(handle.read(0, 100)) == whole


def test_a_handle_follows_its_file_into_the_upper(kernel: FakeKernel) -> None:
    kernel.hold(1, b"b", False)
    assert kernel.held(1) == (2, b"content b")
    kernel.write(b"d/l", 8, b"new")
    assert kernel.held(1) == (2, b"content new")


def test_an_upper_file_that_is_not_in_memory_is_read_in_steps(area: Area, kernel: FakeKernel) -> None:
    kernel.write(b"b", 0, b"CONTENT")
    handle = run(kernel.rootfs.open(kernel.node(b"b"), os.O_RDONLY, CALLER))
    assert handle.read(0, 100) == b"CONTENT b"
    with open(area.diff / "b", "rb") as file:
        drop_pages(file.fileno())
    steps = handle.read(0, 100)
    assert isinstance(steps, GeneratorType)
    assert run(steps) == b"CONTENT b"
    handle.close()


def test_directories_are_not_opened_as_files(kernel: FakeKernel) -> None:
    with pytest.raises(IsADirectory):
        kernel.rootfs.open(kernel.node(b"d"), os.O_RDONLY, CALLER)


_CHANGES: list[Callable[[Rootfs, Any], object]] = [
    lambda rootfs, at: rootfs.open(at, os.O_WRONLY, CALLER),
    lambda rootfs, at: rootfs.open(at, os.O_RDONLY | os.O_TRUNC, CALLER),
    lambda rootfs, at: rootfs.setattr(at, Changes(mode=0), CALLER),
    lambda rootfs, at: rootfs.create(rootfs.root, b"x", 0o644, os.O_RDWR, CALLER),
    lambda rootfs, at: rootfs.mknod(rootfs.root, b"x", stat.S_IFIFO, 0, CALLER),
    lambda rootfs, at: rootfs.mkdir(rootfs.root, b"x", 0o755, CALLER),
    lambda rootfs, at: rootfs.symlink(rootfs.root, b"x", b"a", CALLER),
    lambda rootfs, at: rootfs.link(at, rootfs.root, b"x"),
    lambda rootfs, at: rootfs.unlink(rootfs.root, b"a"),
    lambda rootfs, at: rootfs.rmdir(rootfs.root, b"d"),
    lambda rootfs, at: rootfs.rename(rootfs.root, b"a", rootfs.root, b"b", 0),
    lambda rootfs, at: rootfs.set_xattr(at, b"user.k", b"v", CALLER),
    lambda rootfs, at: rootfs.remove_xattr(at, b"user.k"),
]


@pytest.mark.parametrize("change", _CHANGES)
def test_an_image_cannot_be_changed(change: Callable[[Rootfs, Any], object]) -> None:
    rootfs = _read_only(file(b"a"), directory(b"d"))
    with pytest.raises(ReadOnly):
        change(rootfs, rootfs.lookup(rootfs.root, b"a"))


# Descriptors


def test_a_deep_walk_keeps_the_descriptors_of_the_operation() -> None:
    """Renaming between two directories deeper than there are descriptors to keep."""
    deep = b"/".join([b"d"] * 40)
    area = Area([layer(directory(b"x/" + deep), directory(b"y/" + deep))], capacity=16)
    kernel = area.kernel()
    kernel.create(b"x/" + deep + b"/file", 0o644, b"content")
    kernel.mkdir(b"y/" + deep + b"/made", 0o755)
    kernel.forget()
    kernel.rename(b"x/" + deep + b"/file", b"y/" + deep + b"/file", 0)
    assert (area.diff / os.fsdecode(b"y/" + deep) / "file").read_bytes() == b"content"
    assert not (area.diff / os.fsdecode(b"x/" + deep) / "file").exists()
    kernel.detach()
    area.close()


def test_descriptors_stay_within_their_capacity() -> None:
    area = Area([layer()], capacity=16)
    kernel = area.kernel()
    before = len(os.listdir("/proc/self/fd"))
    for number in range(100):
        kernel.create(b"file%d" % number, 0o644, b"")
    kernel.snapshot()
    assert len(os.listdir("/proc/self/fd")) <= before + 16
    kernel.detach()
    area.close()


def test_no_descriptor_is_left_when_it_is_detached(area: Area) -> None:
    before = len(os.listdir("/proc/self/fd"))
    kernel = area.kernel()
    for name in (b"d/a", b"d/c", b"b"):
        kernel.write(name, 0, b"x")
    kernel.hold(1, b"d/a", True)
    kernel.unlink(b"d/a")
    kernel.rename(b"d", b"e", 0)
    kernel.snapshot()
    kernel.detach()
    del kernel
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


# Life


def test_it_is_ready_once_prepared(area: Area) -> None:
    rootfs = area.kernel().rootfs
    assert rootfs.ready
    rootfs.detach()
    assert not rootfs.ready


def test_preparing_twice_opens_once() -> None:
    opener = _Images(layer(file(b"a")))
    rootfs = Rootfs(Inodes(), Descriptors(100), 0, Node(Branch(), Inode(1)), opener)
    both = rootfs.prepare(), rootfs.prepare()
    opened = [next(steps)() for steps in both]
    for steps, result in zip(both, opened, strict=True):
        with pytest.raises(StopIteration):
            steps.send(result)
    assert opener.closed == 1 and rootfs.opened is opened[0]


def test_what_is_detached_is_stale(area: Area) -> None:
    kernel = area.kernel()
    thing = kernel.node(b"d/a")
    kernel.rootfs.detach()
    for call in (
        lambda: kernel.rootfs.lookup(kernel.rootfs.root, b"d"),
        lambda: kernel.rootfs.attr(thing),
        lambda: kernel.rootfs.open(thing, os.O_RDONLY, CALLER),
        lambda: run(kernel.rootfs.prepare()),
    ):
        with pytest.raises(Stale):
            call()


def test_an_open_upper_file_can_be_read_and_written_after_detaching(area: Area) -> None:
    kernel = area.kernel()
    handle = run(kernel.rootfs.open(kernel.node(b"d/a"), os.O_RDWR, CALLER))
    kernel.rootfs.detach()
    assert run(handle.write(0, b"X")) == 1
    assert run(handle.read(0, 3)) == b"Xon"
    handle.close()


@pytest.mark.parametrize("limit_later", [None, 1 << 20])
def test_an_open_file_keeps_its_quota_after_detaching(area: Area, limit_later: int | None) -> None:
    kernel = area.kernel()
    rootfs = kernel.rootfs
    handle = run(rootfs.open(kernel.node(b"d/a"), os.O_RDWR, CALLER))
    assert rootfs.quota is not None
    rootfs.set_quota(rootfs.quota.used)
    rootfs.detach()
    with pytest.raises(QuotaExceeded):
        run(handle.write(1 << 16, b"X"))
    rootfs.set_quota(limit_later)
    assert run(handle.write(1 << 16, b"X")) == 1
    handle.close()


def test_it_is_in_use_while_something_is_open(kernel: FakeKernel) -> None:
    rootfs = kernel.rootfs
    assert not rootfs.in_use
    kernel.hold(1, b"d/a", False)
    rootfs.opened_dir(rootfs.root)
    kernel.release(1)
    assert rootfs.in_use
    rootfs.closed_dir(rootfs.root)
    assert not rootfs.in_use


def test_a_tree_that_the_kernel_forgot_lets_go_and_opens_again(area: Area) -> None:
    kernel = area.kernel()
    rootfs = kernel.rootfs
    kernel.write(b"d/a", 0, b"new")
    kernel.forget()
    rootfs._inodes.forget(rootfs.root.ino, 1)
    assert not rootfs.ready
    run(rootfs.prepare())
    rootfs._inodes.remember(rootfs.root)
    kernel.hold(1, b"d/a", False)
    assert kernel.held(1) == (1, b"newtent a")
    kernel.detach()


def test_a_missing_object_in_the_upper_is_an_error_and_not_a_crash(area: Area) -> None:
    kernel = area.kernel()
    kernel.write(b"d/a", 0, b"x")
    thing = kernel.node(b"d/a")
    kernel.rootfs._close_descriptor(thing)
    (area.diff / "d/a").unlink()
    with pytest.raises(OSError) as caught:
        kernel.rootfs.attr(thing)
    assert caught.value.errno == errno.ENOENT
    kernel.rootfs.detach()  # what others took from the directory is not counted


def test_attributes_of_an_unopened_tree_are_read_in_a_step() -> None:
    class Counting(_Images):
        reads = 0

        def open(self) -> Opened:
            self.reads += 1
            return super().open()

        def peek(self) -> Attr | None:
            self.reads += 1
            return None

    opener = Counting(layer(directory(b"d")))
    rootfs = Rootfs(Inodes(), Descriptors(100), 0, Node(Branch(), Inode(1)), opener)
    steps: Any = rootfs.peek(rootfs.root)
    call = next(steps)
    assert opener.reads == 0
    call = steps.send(call())
    assert opener.reads == 1
    with pytest.raises(StopIteration) as caught:
        steps.send(call())
    assert (opener.reads, caught.value.value.mode) == (2, rootfs.attr(rootfs.root).mode)


def test_container_is_held_until_the_tree_rests_and_then_only_while_something_is_open() -> None:
    class Held(_Images):
        held: list[bool]

        def hold(self) -> "_Images":
            self.held.append(True)
            return self

        def close(self) -> None:
            self.held.append(False)

    opener = Held(layer(file(b"a", b"")))
    opener.held = []
    descriptors = Descriptors(100)
    rootfs = Rootfs(Inodes(), descriptors, 0, Node(Branch(), Inode(1)), opener)
    run(rootfs.prepare())

    def opened() -> FileHandle:
        return run(rootfs.open(rootfs.lookup(rootfs.root, b"a"), os.O_RDONLY, CALLER))

    run(opened().close())
    second = opened()
    descriptors.rest()
    assert opener.held == [True]
    run(second.close())
    assert opener.held == [True]
    descriptors.rest()
    descriptors.rest()
    assert opener.held == [True, False]


def test_peeked_attributes_give_way_to_those_of_a_tree_that_was_opened_meanwhile() -> None:
    class Guessing(_Images):
        def peek(self) -> Attr | None:
            return Attr(0, 0, 0, 0, 0, 0, 0, 0, 0, 0)

    rootfs = Rootfs(Inodes(), Descriptors(100), 0, Node(Branch(), Inode(1)), Guessing(layer(directory(b"d"))))
    steps: Any = rootfs.peek(rootfs.root)
    peeked = next(steps)()
    run(rootfs.prepare())
    try:
        call = steps.send(peeked)
        while True:
            call = steps.send(call())
    except StopIteration as stop:
        assert stop.value == rootfs.attr(rootfs.root)
