"""LayerIndex as a file: large directories, many pages, damage."""

import mmap
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rig.indexes import decoded_pages, repacked, touch_everything
from rig.tars import entry, index_of, walk

from fusestore.errors import NotADirectory, StoreDamaged
from fusestore.layer import LayerBuilder, LayerIndex
from fusestore.layerindex import VERSION, _Cache


def index_bytes(*paths: bytes) -> bytes:
    builder = LayerBuilder()
    for path in paths:
        builder.add(entry(path))
    return builder.finish(0)


@pytest.mark.parametrize("count", [0, 1, 511, 512, 513, 1024, 1025, 3000])
def test_directory_of_any_size(count: int) -> None:
    names = [b"%06d" % number for number in range(count)]
    index = index_of([entry(b"d", b"5"), *(entry(b"d/" + name) for name in reversed(names))])
    directory = walk(index)[b"d"]
    children = index.children(directory)
    assert [name for name, _ in children] == names
    assert all(index.lookup(directory, name) == inode for name, inode in children)


@pytest.mark.parametrize(
    "name", [b"", b"000000", b"000511", b"000511x", b"000512", b"001999x", b"\xff" * 255]
)
def test_a_name_that_is_not_in_a_large_directory(name: bytes) -> None:
    index = index_of(entry(b"%06dy" % number) for number in range(2000))
    assert index.lookup(index.ROOT, name) is None


def test_names_of_whiteouts_and_links_among_others() -> None:
    entries = [entry(b"%04d" % number) for number in range(0, 600, 2)]
    entries += [entry(b".wh.%04d" % number) for number in range(1, 600, 4)]
    entries += [entry(b"%04d" % number, b"1", link=b"0000") for number in range(3, 600, 4)]
    index = index_of(entries)
    for number in range(600):
        inode = index.lookup(index.ROOT, b"%04d" % number)
        assert inode is not None
        assert index.is_whiteout(inode) == (number % 4 == 1)
        assert index.attr(inode).nlink == (151 if number % 4 == 3 or number == 0 else 1)


def test_records_of_many_pages() -> None:
    index = index_of(entry(b"%d/%d" % (number % 7, number), mtime_ns=number) for number in range(5000))
    found = walk(index)
    assert len(found) == 5008
    assert all(index.attr(found[b"%d/%d" % (n % 7, n)]).mtime_ns == n for n in range(5000))


def test_a_block_may_lie_across_pages() -> None:
    xattrs = {b"%04d" % number: bytes([number % 256]) * 50_000 for number in range(5)}
    index = index_of(entry(name, xattrs=((b"user.x", value),)) for name, value in xattrs.items())
    assert {name: index.xattrs(inode) for name, inode in index.children(index.ROOT)} == {
        name: ((b"user.x", value),) for name, value in xattrs.items()
    }


def test_an_index_may_be_mapped(tmp_path: Path) -> None:
    file = tmp_path / "index"
    file.write_bytes(index_bytes(b"a", b"b/c"))
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sorted(walk(LayerIndex(mapped))) == [b"", b"a", b"b", b"b/c"]


def test_indexes_do_not_share_what_is_cached() -> None:
    one, two = index_of([entry(b"a")]), index_of([entry(b"b")])
    assert one.lookup(one.ROOT, b"a") is not None
    assert two.lookup(two.ROOT, b"a") is None


def test_threads_share_an_index_and_a_cache_too_small_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = _Cache(200_000)
    monkeypatch.setattr(LayerIndex, "_cache", cache)
    paths = [b"%d/%d" % (number % 50, number) for number in range(6000)]
    index = index_of(entry(path, mtime_ns=number) for number, path in enumerate(paths))

    def times(_: int) -> list[int]:
        found = walk(index)
        return [index.attr(found[path]).mtime_ns for path in paths]

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(times, range(4))) == [list(range(6000))] * 4
    assert sum(weight for _, weight in cache._items.values()) == cache._weight <= 200_000


def test_a_file_is_no_directory() -> None:
    index = index_of([entry(b"f")])
    inode = index.lookup(index.ROOT, b"f")
    assert inode is not None
    with pytest.raises(NotADirectory):
        index.lookup(inode, b"x")


@pytest.mark.parametrize("inode", [-1, 2, 1 << 40])
def test_inodes_that_do_not_exist(inode: int) -> None:
    with pytest.raises(IndexError):
        index_of([entry(b"f")]).attr(inode)


def test_the_same_entries_give_the_same_bytes() -> None:
    assert index_bytes(b"a/b", b"c") == index_bytes(b"a/b", b"c")


# Damage from outside, which the checksums find

SOUND = index_bytes(*(b"%d/%d" % (number % 9, number) for number in range(3000)))


def change(at: int, value: bytes) -> bytes:
    return SOUND[:at] + value + SOUND[at + len(value) :]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        SOUND[:20],
        SOUND[:-1],
        SOUND + b"\0",
        change(0, b"X"),
        change(8, struct.pack("<I", VERSION + 1)),
        change(12, b"\0\0\0\0"),
        change(16, struct.pack("<Q", 1 << 62)),
        change(16, bytes(8)),
        change(24, struct.pack("<Q", 1 << 62)),
        change(60, b"\xff"),
    ],
)
def test_damage_is_found_when_opened(data: bytes) -> None:
    with pytest.raises(StoreDamaged, match="layer index"):
        LayerIndex(data)


def test_another_version_is_named() -> None:
    with pytest.raises(StoreDamaged, match=f"version is {VERSION + 1}, not {VERSION}.*check --repair"):
        LayerIndex(change(8, struct.pack("<I", VERSION + 1)))


def test_damage_of_a_page_is_found_when_it_is_touched() -> None:
    index = LayerIndex(change(len(SOUND) - 10, b"????"))
    assert index.lookup(index.ROOT, b"1") is not None
    with pytest.raises(StoreDamaged, match="layer index"):
        index.attr(len(index) - 1)


# Damage from inside, which only a look at each value finds


def rewrite(change: Callable[[bytearray], None], page: int = 0) -> bytes:
    """An index of little content with one of its two pages changed (blocks, records), checksums right."""
    builder = LayerBuilder()
    builder.add(entry(b"d/f", xattrs=((b"user.a", b"b"),)))
    builder.add(entry(b"l", b"1", link=b"lower"))
    head, pages = decoded_pages(builder.finish(0))
    changed = bytearray(pages[page])
    change(changed)
    assert len(changed) == len(pages[page])
    pages[page] = bytes(changed)
    return repacked(head, pages)


def replace(old: bytes, new: bytes) -> Callable[[bytearray], None]:
    def change(page: bytearray) -> None:
        assert old in page
        page[:] = page.replace(old, new, 1)

    return change


def put(at: int, value: bytes) -> Callable[[bytearray], None]:
    def change(page: bytearray) -> None:
        page[at : at + len(value)] = value

    return change


def test_rewriting_nothing_leaves_it_sound() -> None:
    assert not touch_everything(rewrite(lambda page: None))


@pytest.mark.parametrize(
    "data",
    [
        rewrite(replace(b"\xc4\x01d", b"\xa1dd")),  # a name that is text
        rewrite(replace(b"\xc4\x01d", b"\xc4\x7fd")),  # a name longer than its block
        rewrite(replace(b"\xc4\x06user.a", b"\xcb\0\0\0\0\0\0\0")),  # an xattr that is a number
        rewrite(replace(b"\xc4\x05lower", b"\x01\x02\x03\x04\x05\x06\x07")),  # a target that is seven numbers
        rewrite(put(0, b"\x95")),  # fewer fields
        rewrite(put(0, b"\xdf\xff\xff\xff\xff")),  # a map of four billion
        rewrite(put(0, b"\xdd\xff\xff\xff\xff")),  # a list of four billion
        rewrite(put(1, b"\x7f")),  # a parent that does not exist
        rewrite(put(56, b"\xff\xff\xff\xff\xff\xff\xff\xff"), page=1),  # a block that lies outside
        rewrite(put(52, b"\xff\xff\xff\xff"), page=1),  # a block of four gigabytes
        rewrite(put(52, bytes(4)), page=1),  # a directory without a block
    ],
)
def test_lies_within_are_found(data: bytes) -> None:
    assert touch_everything(data)
