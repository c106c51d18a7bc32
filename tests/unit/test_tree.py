"""The tree by inode number: lookup counts, handles, readdir positions, what waits and what does not."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import GeneratorType
from typing import Any

import pytest
from rig.treeshell import CALLER, FakeRootfs, TreeShell

from fusestore import errors
from fusestore.inodes import ROOT_INODE, Changes, Node, run
from fusestore.layout import Layout
from fusestore.nodes import Attr
from fusestore.scratchfile import ScratchFile, ScratchHandle
from fusestore.store import Store
from fusestore.tree import Tree


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", tmp_path / "run", create=True) as store:
        store.create_container(container_id="c")
        yield store


@pytest.fixture
def shell(store: Store) -> TreeShell:
    return TreeShell(store)


@pytest.fixture
def tree(shell: TreeShell) -> Tree:
    return shell.tree


# The root


def test_root_shows_three_directories(shell: TreeShell) -> None:
    assert shell.ls("") == ["images", "containers", "views"]


@pytest.mark.parametrize(
    "make",
    [
        lambda shell: shell.mkdir("x"),
        lambda shell: shell.write("x", b""),
        lambda shell: shell.symlink("y", "x"),
        lambda shell: shell.mknod("x"),
        lambda shell: shell.unlink("images"),
        lambda shell: shell.rmdir("containers"),
        lambda shell: shell.rename("images", "x"),
        lambda shell: shell.link("images", "x"),
        lambda shell: shell.setattr("", Changes(mode=0)),
    ],
    ids=["mkdir", "create", "symlink", "mknod", "unlink", "rmdir", "rename", "link", "chmod"],
)
def test_nothing_can_be_made_or_changed_in_the_root(
    shell: TreeShell, make: Callable[[TreeShell], None]
) -> None:
    with pytest.raises((errors.NotPermitted, errors.CrossDevice)) as caught:
        make(shell)
    assert caught.value.errno in (errno.EPERM, errno.EXDEV)


def test_what_comes_in_the_place_of_a_node_being_looked_up_is_what_the_kernel_knows(shell: TreeShell) -> None:
    with shell.walk("containers/c") as container:
        looking = shell.tree.lookup(container.node.ino, b"rootfs")
        assert isinstance(looking, GeneratorType)
        next(looking)
        old = shell.driver.made[-1].root
        new = FakeRootfs(shell.tree.inodes, container.node, "new").root
        shell.tree.inodes.replace(old, new)
        with pytest.raises(StopIteration):
            looking.send(None)
        assert shell.tree.inodes.node(old.ino) is new


def test_statfs_is_that_of_the_stores_file_system(tree: Tree, store: Store) -> None:
    found = os.statvfs(store.path)
    assert (tree.statfs()[0], tree.statfs()[2], tree.statfs()[8]) == (
        found.f_bsize,
        found.f_blocks,
        found.f_namemax,
    )


# Counting


def test_lookup_counts_and_forget_takes_back(tree: Tree) -> None:
    known = len(tree.inodes)
    containers = run(tree.lookup(ROOT_INODE, b"containers")).node.ino
    for _ in range(3):
        entry = run(tree.lookup(containers, b"c"))
    assert (entry.node.lookups, len(tree.inodes)) == (3, known + 1)
    tree.forget([(entry.node.ino, 2)])
    assert run(tree.getattr(entry.node.ino)).node is entry.node
    tree.forget([(entry.node.ino, 1)])
    with pytest.raises(errors.Stale):
        run(tree.getattr(entry.node.ino))


@pytest.mark.parametrize("name", [b".", b".."])
def test_dot_lookups_count_too(tree: Tree, name: bytes) -> None:
    containers = run(tree.lookup(ROOT_INODE, b"containers")).node
    directory = run(tree.lookup(containers.ino, b"c")).node
    expected = directory if name == b"." else containers
    before = expected.lookups
    assert run(tree.lookup(directory.ino, name)).node is expected
    assert expected.lookups == before + 1


def test_root_is_its_own_parent(tree: Tree) -> None:
    assert run(tree.lookup(ROOT_INODE, b"..")).node.ino == ROOT_INODE


def test_the_two_directories_stay_when_they_are_forgotten(shell: TreeShell) -> None:
    before = shell.ino("containers")
    assert shell.ino("containers") == before


def test_getattr_and_setattr_count_nothing(shell: TreeShell) -> None:
    with shell.walk("containers/c/metadata.json") as entry:
        run(shell.tree.getattr(entry.node.ino))
        run(shell.tree.setattr(entry.node.ino, Changes(mode=0o644), None, CALLER))
        assert entry.node.lookups == 1


def test_create_counts(shell: TreeShell) -> None:
    with shell.walk("containers/c") as entry:
        fh, _, made = run(shell.tree.create(entry.node.ino, b"tmp", 0o644, os.O_RDWR, CALLER))
    assert (made.node.lookups, len(shell.tree.handles)) == (1, 1)
    run(shell.tree.release(fh))
    assert len(shell.tree.handles) == 0


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "too many"), KeyboardInterrupt()])
def test_create_that_fails_at_its_end_holds_nothing(
    shell: TreeShell, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[ScratchHandle] = []
    monkeypatch.setattr(ScratchHandle, "close", lambda handle: closed.append(handle))

    def fail(self: ScratchFile) -> Attr:
        raise error

    with shell.walk("containers/c") as entry, monkeypatch.context() as patch:
        patch.setattr(ScratchFile, "attr", property(fail))
        known = len(shell.tree.inodes)
        with pytest.raises(type(error)):
            run(shell.tree.create(entry.node.ino, b"tmp", 0o644, os.O_RDWR, CALLER))
        assert (len(closed), len(shell.tree.handles), len(shell.tree.inodes)) == (1, 0, known)


# Names and branches


@pytest.mark.parametrize("path", ["", "images", "containers", "containers/c"])
def test_names_over_255_bytes(shell: TreeShell, path: str) -> None:
    with shell.walk(path) as entry, pytest.raises(errors.NameTooLong):
        run(shell.tree.lookup(entry.node.ino, b"x" * 256))


@pytest.mark.parametrize(
    "target", ["images/x", "containers/x", "containers/c/metadata.json", "containers/c/workdir/x"]
)
def test_rename_out_of_a_rootfs(shell: TreeShell, target: str) -> None:
    with pytest.raises(errors.CrossDevice):
        shell.rename("containers/c/rootfs/inside", target)


@pytest.mark.parametrize("target", ["images/x", "containers/x", "containers/c/workdir/x"])
def test_hard_link_out_of_a_rootfs(shell: TreeShell, target: str) -> None:
    with pytest.raises(errors.CrossDevice):
        shell.link("containers/c/rootfs/inside", target)


def test_unknown_rename_flags(shell: TreeShell) -> None:
    with pytest.raises(errors.BadInput):
        shell.rename("containers/c", "containers/d", 4)


# What waits


def test_lookup_in_a_rootfs_opens_it_first(shell: TreeShell) -> None:
    with shell.walk("containers/c/rootfs") as entry:
        first = shell.tree.lookup(entry.node.ino, b"inside")
        assert isinstance(first, GeneratorType)
        assert run(first).attr.size == len(b"container c")


def test_nothing_waits_once_it_is_open(shell: TreeShell) -> None:
    tree = shell.tree
    with shell.walk("containers/c/rootfs") as entry:
        ino = run(tree.lookup(entry.node.ino, b"inside")).node.ino
        assert not isinstance(tree.lookup(entry.node.ino, b"inside"), GeneratorType)
        opened = tree.open(ino, os.O_RDONLY, CALLER)
        assert isinstance(opened, tuple)
        assert tree.read(opened[0], 0, 4) == b"cont"
        assert tree.release(opened[0]) is None


@pytest.mark.parametrize("path", ["containers/c/rootfs", "containers/c/rundir"])
def test_attributes_of_what_is_not_open_are_waited_for(shell: TreeShell, path: str) -> None:
    with shell.walk(path) as entry:
        assert isinstance(shell.tree.getattr(entry.node.ino), GeneratorType)
        parent, name = path.rsplit("/", 1)
        assert isinstance(shell.tree.lookup(shell.ino(parent), name.encode()), GeneratorType)
        shell.ls(path)
        assert not isinstance(shell.tree.getattr(entry.node.ino), GeneratorType)


def test_listing_waits_for_the_attributes_of_what_is_not_open(shell: TreeShell) -> None:
    with shell.walk("containers/c") as entry:
        fh = run(shell.tree.opendir(entry.node.ino, CALLER))
        shell.readdir(fh)
        taken: list[bytes] = []

        def take(name: bytes, *_: object) -> bool:
            taken.append(name)
            return True

        steps: Any = shell.tree.readdir(fh, 2, take)
        waits = [next(steps)]
        assert taken == [b"metadata.json"]
        with pytest.raises(StopIteration):
            while True:
                waits.append(steps.send(waits[-1]()))
        assert (len(waits), taken) == (3, [b"metadata.json", b"rootfs", b"workdir", b"rundir"])
        shell.tree.releasedir(fh)


def test_getattr_does_not_open_a_rootfs(shell: TreeShell) -> None:
    shell.stat("containers/c/rootfs")
    assert not any(made.attached for made in shell.driver.made)


def test_absent_names_are_asked_for_again(shell: TreeShell) -> None:
    for path in ("images", "containers", "containers/c"):
        assert shell.tree.absence_timeout_s(shell.ino(path) if path != "containers/c" else ROOT_INODE) == 0


# readdir


@pytest.fixture
def listing(shell: TreeShell) -> Iterator[tuple[TreeShell, int]]:
    """A handle on a directory of the containers c, d, e."""
    for name in ("d", "e"):
        shell.mkdir(f"containers/{name}")
    fh = run(shell.tree.opendir(shell.ino("containers"), CALLER))
    yield shell, fh
    shell.tree.releasedir(fh)


def names(found: list[tuple[bytes, Any, int]]) -> list[bytes]:
    return [name for name, _, _ in found]


def test_readdir_starts_with_the_dots(listing: tuple[TreeShell, int]) -> None:
    shell, fh = listing
    found = shell.readdir(fh)
    assert names(found) == [b".", b"..", b"c", b"d", b"e"]
    assert [entry.node.ino for _, entry, _ in found[:2]] == [shell.ino("containers"), ROOT_INODE]


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_readdir_in_pieces_gives_the_same(listing: tuple[TreeShell, int], limit: int) -> None:
    shell, fh = listing
    found: list[tuple[bytes, Any, int]] = []
    while piece := shell.readdir(fh, found[-1][2] if found else 0, limit):
        found += piece
    assert names(found) == [b".", b"..", b"c", b"d", b"e"]


def test_readdir_leaves_out_what_has_gone_since(listing: tuple[TreeShell, int]) -> None:
    shell, fh = listing
    position = shell.readdir(fh, 0, 2)[-1][2]
    shell.rmdir("containers/d")
    assert names(shell.readdir(fh, position)) == [b"c", b"e"]


def test_rewinddir_lists_anew(listing: tuple[TreeShell, int]) -> None:
    shell, fh = listing
    shell.readdir(fh)
    shell.mkdir("containers/f")
    assert names(shell.readdir(fh)) == [b".", b"..", b"c", b"d", b"e", b"f"]


def test_readdir_from_the_middle_of_a_handle_not_read_yet(listing: tuple[TreeShell, int]) -> None:
    shell, fh = listing
    assert names(shell.readdir(fh, 3)) == [b"d", b"e"]


def test_readdir_counts_what_was_taken_and_no_dots(shell: TreeShell) -> None:
    tree = shell.tree
    containers = run(tree.lookup(ROOT_INODE, b"containers")).node
    before = containers.lookups
    fh = run(tree.opendir(containers.ino, CALLER))
    taken: list[Any] = []
    run(tree.readdir(fh, 0, lambda name, entry, position: taken.append(entry.node) or True))
    refused: list[Any] = []
    run(tree.readdir(fh, 2, lambda name, entry, position: bool(refused.append(entry.node))))
    assert [node.lookups for node in taken[2:]] == [1]
    assert (containers.lookups, refused[0]) == (before, taken[2])
    tree.releasedir(fh)


def test_listed_container_is_the_one_lookup_finds(shell: TreeShell) -> None:
    with shell.walk("containers/c") as entry:
        fh = run(shell.tree.opendir(shell.ino("containers"), CALLER))
        assert shell.readdir(fh)[2][1].node is entry.node
        shell.tree.releasedir(fh)


def test_listing_containers_does_not_look_into_them(shell: TreeShell, store: Store) -> None:
    for number in range(300):
        os.mkdir(Layout(store.path).container(f"n{number}"))  # without a document: reading it would fail
    assert len(shell.ls("containers")) == 301


def test_rootfs_in_use_is_told_of_directory_handles(shell: TreeShell) -> None:
    with shell.walk("containers/c/rootfs") as entry:
        fh = run(shell.tree.opendir(entry.node.ino, CALLER))
        with pytest.raises(errors.Busy):
            shell.rmdir("containers/c")
        shell.tree.releasedir(fh)
    shell.rmdir("containers/c")


# Damage


@pytest.mark.parametrize(
    "error", [errors.StoreDamaged("a layer"), OSError(errno.EMFILE, "too many"), errors.Busy("locked")]
)
@pytest.mark.parametrize("is_open", [False, True])
def test_what_is_damaged_is_listed_with_its_neighbours(
    shell: TreeShell, error: Exception, is_open: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: FakeRootfs, node: Node) -> Attr:
        raise error

    with shell.walk("containers/c"):
        if is_open:
            shell.ls("containers/c/rootfs")
        monkeypatch.setattr(FakeRootfs, "attr", fail)
        with shell.walk("containers/c") as entry:
            fh = run(shell.tree.opendir(entry.node.ino, CALLER))
            found = {name: shown for name, shown, _ in shell.readdir(fh)}
            shell.tree.releasedir(fh)
        assert set(found) == {b".", b"..", b"metadata.json", b"rootfs", b"workdir", b"rundir"}
        assert (found[b"rootfs"].is_guess, found[b"rootfs"].attr.mode) == (True, stat.S_IFDIR)
        assert not found[b"metadata.json"].is_guess
        with pytest.raises(type(error)):
            shell.stat("containers/c/rootfs")


def test_rundir_that_cannot_be_made_is_listed(
    shell: TreeShell, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: str) -> Path:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(store, "run_dir", full)
    assert shell.ls("containers/c") == ["metadata.json", "rootfs", "workdir", "rundir"]
    with pytest.raises(OSError, match="no space"):
        shell.stat("containers/c/rundir")


def test_document_that_cannot_be_read_is_listed(
    shell: TreeShell, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: str) -> bytes:
        raise OSError(errno.EIO, "bad disk")

    monkeypatch.setattr(store, "document", fail)
    assert shell.ls("containers/c") == ["metadata.json", "rootfs", "workdir", "rundir"]
    with pytest.raises(OSError, match="bad disk"):
        shell.stat("containers/c/metadata.json")
