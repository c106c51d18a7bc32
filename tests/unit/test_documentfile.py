"""metadata.json as an open file: which writes commit, which fail, what a close says."""

import os
from collections.abc import Callable

import pytest

from fusestore.documentfile import DocumentReader, DocumentWriter
from fusestore.errors import BadDocument, Busy
from fusestore.inodes import Branch, Node, Steps, run
from fusestore.metadata import DOCUMENT_MAX
from fusestore.nodes import Inode

OLD = b'{"id": "a", "color": "blue"}\n'
NODE = Node(Branch(), Inode(7))


class Store:
    """What commits reach."""

    def __init__(self) -> None:
        self.commits: list[bytes] = []
        self.refusal: Exception | None = None

    def commit(self, data: bytes) -> Steps[None]:
        yield lambda: None
        if self.refusal is not None:
            raise self.refusal
        self.commits.append(data)


@pytest.fixture
def store() -> Store:
    return Store()


Open = Callable[[int], DocumentWriter]


@pytest.fixture
def open_(store: Store) -> Open:
    return lambda flags: DocumentWriter(NODE, os.O_RDWR | flags, OLD, store.commit, "container a")


REPLACING = [pytest.param(os.O_TRUNC, id="trunc"), pytest.param(os.O_APPEND, id="append")]


def test_reader_gives_ranges() -> None:
    reader = DocumentReader(NODE, OLD)
    assert (reader.read(0, 4), reader.read(4, 100), reader.read(100, 1)) == (OLD[:4], OLD[4:], b"")


@pytest.mark.parametrize("flags", REPLACING)
def test_whole_object_commits_in_its_write(store: Store, open_: Open, flags: int) -> None:
    assert run(open_(flags).write(0, b'{"a":1}\n')) == 8
    assert store.commits == [b'{"a":1}\n']


@pytest.mark.parametrize("flags", REPLACING)
def test_object_in_two_writes_commits_once(store: Store, open_: Open, flags: int) -> None:
    handle = open_(flags)
    run(handle.write(0, b'{"a"'))
    assert store.commits == []
    run(handle.write(4, b":1}"))
    assert store.commits == [b'{"a":1}']


def test_append_ignores_the_kernels_offset(store: Store, open_: Open) -> None:
    handle = open_(os.O_APPEND)
    run(handle.write(len(OLD), b"{"))
    run(handle.write(3, b"}"))
    assert store.commits == [b"{}"]


@pytest.mark.parametrize("flags", REPLACING)
def test_white_space_after_the_object_commits_nothing_more(store: Store, open_: Open, flags: int) -> None:
    handle = open_(flags)
    run(handle.write(0, b"{}"))
    run(handle.write(2, b"\n"))
    run(handle.flush())
    assert store.commits == [b"{}"]


@pytest.mark.parametrize("data", [b"[1]", b"hello", b"{} x", b'{"a":1e400}', b"\0", b'{"a":"\xff"}'])
@pytest.mark.parametrize("flags", REPLACING)
def test_what_can_be_no_object_fails_at_once(store: Store, open_: Open, flags: int, data: bytes) -> None:
    with pytest.raises(BadDocument):
        run(open_(flags).write(0, data))
    assert store.commits == []


def test_refused_write_is_not_taken(store: Store, open_: Open) -> None:
    handle = open_(os.O_TRUNC)
    run(handle.write(0, b"{"))
    with pytest.raises(BadDocument):
        run(handle.write(1, b"x"))
    run(handle.write(1, b"}"))
    assert store.commits == [b"{}"]


def test_refusal_of_the_store_is_the_writes_error(store: Store, open_: Open) -> None:
    store.refusal = Busy("in use")
    handle = open_(os.O_TRUNC)
    with pytest.raises(Busy):
        run(handle.write(0, b"{}"))
    assert handle.read(0, 10) == b""


def test_incomplete_fails_at_flush_and_is_kept(store: Store, open_: Open) -> None:
    handle = open_(os.O_TRUNC)
    run(handle.write(0, b"{"))
    with pytest.raises(BadDocument):
        run(handle.flush())
    run(handle.write(1, b"}"))
    run(handle.flush())
    assert store.commits == [b"{}"]


@pytest.mark.parametrize("flags", [0, os.O_APPEND])
def test_flush_of_nothing_written_is_silent(store: Store, open_: Open, flags: int) -> None:
    handle = open_(flags)
    run(handle.flush())
    run(handle.fsync(False))
    assert store.commits == []


def test_appended_white_space_changes_nothing(store: Store, open_: Open) -> None:
    handle = open_(os.O_APPEND)
    run(handle.write(0, b" \n"))
    run(handle.flush())
    handle.close()
    assert store.commits == []


def test_white_space_alone_replaces_nothing(open_: Open) -> None:
    handle = open_(os.O_TRUNC)
    run(handle.write(0, b"\n"))
    with pytest.raises(BadDocument):
        run(handle.flush())


def test_incomplete_at_the_last_close_is_logged(open_: Open, caplog: pytest.LogCaptureFixture) -> None:
    handle = open_(os.O_TRUNC)
    run(handle.write(0, b"{"))
    handle.close()
    assert "container a: not one whole JSON object" in caplog.text


def test_refused_edit_is_logged_as_such(store: Store, open_: Open, caplog: pytest.LogCaptureFixture) -> None:
    handle = open_(0)
    run(handle.write(OLD.index(b"blue"), b"pink"))
    store.refusal = Busy("in use")
    with pytest.raises(Busy):
        run(handle.flush())
    handle.close()
    assert "container a: the edited document was refused" in caplog.text


def test_committed_close_is_silent(open_: Open, caplog: pytest.LogCaptureFixture) -> None:
    handle = open_(os.O_TRUNC)
    run(handle.write(0, b"{}"))
    handle.close()
    assert caplog.text == ""


def test_edit_in_place_commits_at_flush(store: Store, open_: Open) -> None:
    handle = open_(0)
    run(handle.write(OLD.index(b"blue"), b"pink"))
    assert store.commits == []
    run(handle.flush())
    assert store.commits == [OLD.replace(b"blue", b"pink")]


def test_shorter_object_over_the_old_one_then_cut(store: Store, open_: Open) -> None:
    """What Python's open(…, "r+"), write, truncate does."""
    handle = open_(0)
    run(handle.write(0, b"{}\n"))
    run(handle.truncate(3))
    run(handle.flush())
    assert store.commits == [b"{}\n"]


def test_edit_that_no_cut_could_repair_fails_at_once(open_: Open) -> None:
    with pytest.raises(BadDocument):
        run(open_(0).write(0, b"x"))


def test_truncation_to_nothing_then_written_commits_in_the_write(store: Store, open_: Open) -> None:
    handle = open_(0)
    handle.truncate(0)
    run(handle.write(0, b"{}"))
    assert store.commits == [b"{}"]


def test_emptied_and_left_so_fails_at_flush(store: Store, open_: Open) -> None:
    emptied = open_(0)
    emptied.truncate(0)
    for handle in (emptied, open_(os.O_TRUNC)):
        with pytest.raises(BadDocument):
            run(handle.flush())
        # Shells close a copy of the descriptor before they write.
        run(handle.write(0, b"{}"))
        run(handle.flush())
    assert store.commits == [b"{}", b"{}"]


def test_a_refused_write_is_told_once(store: Store, open_: Open) -> None:
    handle = open_(os.O_TRUNC)
    store.refusal = Busy("in use")
    with pytest.raises(Busy):
        run(handle.write(0, b"{}"))
    run(handle.flush())


def test_write_over_the_limit_fails(open_: Open) -> None:
    with pytest.raises(BadDocument):
        run(open_(os.O_TRUNC).write(DOCUMENT_MAX, b"{"))


def test_append_handle_reads_the_old_document_until_written(open_: Open) -> None:
    handle = open_(os.O_APPEND)
    assert handle.read(0, 100) == OLD
    run(handle.write(0, b"{"))
    assert handle.read(0, 100) == b"{"
