"""/containers without a kernel: making, renaming, removing, documents, scratch files (design.md, 2)."""

import errno
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rig.tinyimages import make_layout
from rig.treeshell import CALLER, OWNER, FakeRootfs, TreeShell

from fusestore import errors
from fusestore.containertree import ContainerTree
from fusestore.inodes import Caller, Changes, run
from fusestore.layout import Layout
from fusestore.mounts import Changed
from fusestore.scratchfile import SCRATCH_FILES_MAX, SCRATCH_MAX
from fusestore.store import Store
from fusestore.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE

PARTS = ["rootfs", "workdir", "rundir"]
METADATA = "containers/c/metadata.json"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", tmp_path / "run", create=True) as store:
        yield store


@pytest.fixture
def shell(store: Store) -> TreeShell:
    """A tree with the container `c`, unbound."""
    store.create_container(container_id="c")
    return TreeShell(store)


@pytest.fixture
def image_id(store: Store, tmp_path: Path) -> str:
    image_id = make_layout(tmp_path / "layout", "localhost/app:1", [{"etc/hostname": b"app\n"}])
    store.import_image(f"oci:{tmp_path}/layout")
    store.untag("default")
    return image_id


def document(shell: TreeShell, container: str = "c") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(shell.read(f"containers/{container}/metadata.json"))
    return found


def rootfs(shell: TreeShell, path: str = "containers/c/rootfs") -> FakeRootfs:
    with shell.walk(path) as entry:
        branch = entry.node.branch
    assert isinstance(branch, FakeRootfs)
    return branch


# mkdir


def test_mkdir_makes_a_container(shell: TreeShell, store: Store) -> None:
    shell.mkdir("containers/new")
    assert sorted(store.container_ids()) == ["c", "new"]


def test_mkdir_takes_the_image_tagged_default(shell: TreeShell, store: Store, image_id: str) -> None:
    store.tag(image_id, "default")
    shell.mkdir("containers/new")
    assert document(shell, "new")["image-id"] == image_id


def test_mkdir_without_default_makes_an_unbound_container(shell: TreeShell) -> None:
    shell.mkdir("containers/new")
    assert (document(shell, "new")["image-id"], document(shell, "new")["image-name"]) == ("", "")


@pytest.mark.parametrize("name", [".x", "-x", "_x", "a b", "ü", "a:b", "a\nb", "a" * 129])
def test_mkdir_of_what_cannot_be_an_id(shell: TreeShell, name: str) -> None:
    with pytest.raises(errors.BadName):
        shell.mkdir(f"containers/{name}")


def test_mkdir_of_a_name_over_255_bytes(shell: TreeShell) -> None:
    with pytest.raises(errors.NameTooLong):
        shell.mkdir("containers/" + "a" * 256)


@pytest.mark.parametrize("taken", ["c", "web"])
def test_mkdir_of_a_taken_id_or_name(shell: TreeShell, taken: str) -> None:
    shell.write(METADATA, b'{"name": "web"}')
    with pytest.raises(errors.Exists):
        shell.mkdir(f"containers/{taken}")


@pytest.mark.parametrize(
    "make",
    [
        lambda shell: shell.write("containers/x", b""),
        lambda shell: shell.mknod("containers/x"),
        lambda shell: shell.symlink("c", "containers/x"),
        lambda shell: shell.link(METADATA, "containers/x"),
        lambda shell: shell.rename(METADATA, "containers/x"),
    ],
    ids=["create", "mknod", "symlink", "link", "rename"],
)
def test_nothing_but_directories_can_be_made(shell: TreeShell, make: Callable[[TreeShell], None]) -> None:
    with pytest.raises((errors.NotPermitted, errors.CrossDevice)):
        make(shell)
    assert shell.ls("containers") == ["c"]


# Listing and names


def test_container_shows_its_four_parts_document_first(shell: TreeShell) -> None:
    assert shell.ls("containers/c") == ["metadata.json", *PARTS]


def test_listing_reads_no_document(shell: TreeShell, store: Store) -> None:
    for name in ("damaged", "other"):
        store.create_container(container_id=name)
    Path(Layout(store.path).container("damaged"), "container").write_bytes(b"rubbish")
    assert shell.ls("containers") == ["c", "damaged", "other"]


def test_name_is_a_link_to_the_id(shell: TreeShell) -> None:
    shell.write(METADATA, b'{"name": "web"}')
    assert (shell.readlink("containers/web"), shell.ls("containers")) == ("c", ["c", "web"])


def test_name_follows_the_document(shell: TreeShell) -> None:
    shell.write(METADATA, b'{"name": "web"}')
    shell.write(METADATA, b'{"name": "www"}')
    assert (shell.exists("containers/web"), shell.readlink("containers/www")) == (False, "c")


def test_rm_of_a_name_gives_the_container_its_id_as_name(shell: TreeShell) -> None:
    shell.write(METADATA, b'{"name": "web", "key": 1}')
    shell.unlink("containers/web")
    assert (document(shell)["name"], document(shell)["key"]) == ("c", 1)


def test_mv_of_a_name_renames_it(shell: TreeShell) -> None:
    shell.write(METADATA, b'{"name": "web"}')
    shell.rename("containers/web", "containers/www")
    assert (document(shell)["id"], document(shell)["name"]) == ("c", "www")


def test_rm_of_a_container_is_refused(shell: TreeShell) -> None:
    with pytest.raises(errors.IsADirectory):
        shell.unlink("containers/c")


def test_rmdir_of_a_name_is_refused(shell: TreeShell) -> None:
    shell.write(METADATA, b'{"name": "web"}')
    with pytest.raises(errors.NotADirectory):
        shell.rmdir("containers/web")


@pytest.mark.parametrize("path", ["containers/x", "containers/.x", "containers/c/x", "x"])
def test_what_is_not_there(shell: TreeShell, path: str) -> None:
    with pytest.raises(errors.NotFound):
        shell.stat(path)


def test_everything_belongs_to_whoever_mounts(shell: TreeShell) -> None:
    for path in ("", "containers", "containers/c", METADATA):
        attr = shell.stat(path)
        assert (attr.uid, attr.gid) == (OWNER.uid, OWNER.gid)


# What others do in the same store


def test_container_made_behind_is_seen(shell: TreeShell, store: Store) -> None:
    assert not shell.exists("containers/new")
    store.create_container(container_id="new")
    assert shell.ls("containers/new") == ["metadata.json", *PARTS]


def test_container_deleted_behind_is_gone(shell: TreeShell, store: Store) -> None:
    with shell.walk("containers/c/rootfs"):
        made = rootfs(shell)
        store.delete_container("c")
        assert not shell.exists("containers/c")
    assert made.is_detached


def test_container_replaced_behind_is_another_directory(shell: TreeShell, store: Store) -> None:
    with shell.walk("containers/c/rootfs") as entry:
        store.rename_container("c", "aside")
        store.create_container(container_id="c")
        assert rootfs(shell).root is not entry.node


def test_old_directory_of_a_replaced_container_is_stale(shell: TreeShell, store: Store) -> None:
    with shell.walk("containers/c") as entry:
        shell.stat(METADATA)
        store.rename_container("c", "aside")
        store.create_container(container_id="c")
        with pytest.raises(errors.Stale):
            run(shell.tree.lookup(entry.node.ino, b"metadata.json"))


def test_document_written_behind_is_another_file(shell: TreeShell, store: Store) -> None:
    with shell.walk(METADATA) as entry:
        store.set_container_metadata("c", {"key": 1})
        assert shell.ino(METADATA) != entry.node.ino
    assert document(shell)["key"] == 1


def test_unchanged_document_stays_the_same_file(shell: TreeShell) -> None:
    with shell.walk(METADATA) as entry:
        assert shell.ino(METADATA) == entry.node.ino


def test_label_set_behind_reaches_the_rootfs(shell: TreeShell, store: Store) -> None:
    with shell.walk("containers/c/rootfs"):
        store.set_container_metadata("c", {"mountlabel": "a:b:c"})
        assert rootfs(shell).label == b"a:b:c"


# Reading and writing the document


def test_size_is_that_of_the_content(shell: TreeShell) -> None:
    assert shell.stat(METADATA).size == len(shell.read(METADATA))


@pytest.mark.parametrize("flags", [os.O_TRUNC, os.O_APPEND])
def test_write_replaces_the_users_keys_and_keeps_the_others(shell: TreeShell, flags: int) -> None:
    shell.write(METADATA, b'{"old": 1}')
    before = document(shell)
    shell.write(METADATA, b'{"z": 1, "a": 2}', os.O_WRONLY | flags)
    assert list(document(shell)) == [key for key in before if key != "old"] + ["z", "a"]


def test_open_reader_keeps_the_old_document(shell: TreeShell) -> None:
    old = shell.read(METADATA)
    fh = shell.open(METADATA)
    shell.write(METADATA, b'{"key": 1}')
    assert run(shell.tree.read(fh, 0, 1 << 20)) == old
    shell.close(fh)


def test_size_is_right_while_somebody_writes(shell: TreeShell) -> None:
    fh = shell.open(METADATA, os.O_WRONLY | os.O_TRUNC)
    run(shell.tree.write(fh, 0, b"{"))
    assert shell.stat(METADATA).size == len(shell.read(METADATA))
    run(shell.tree.write(fh, 1, b"}"))
    shell.close(fh)


@pytest.mark.parametrize(
    "data, error",
    [
        (b"hello", errors.BadDocument),
        (b"[]", errors.BadDocument),
        (b'{"mounted": 1}', errors.BadDocument),
        (b'{"name": "a/b"}', errors.BadName),
        (b'{"id": "d"}', errors.NotPermitted),
        (b'{"created-at": 1}', errors.NotPermitted),
        (b'{"image-name": "no-such"}', errors.NotFound),
    ],
)
def test_refused_write_fails_at_once_and_changes_nothing(
    shell: TreeShell, data: bytes, error: type[Exception]
) -> None:
    old = shell.read(METADATA)
    fh = shell.open(METADATA, os.O_WRONLY | os.O_TRUNC)
    with pytest.raises(error):
        run(shell.tree.write(fh, 0, data))
    shell.close(fh)
    assert shell.read(METADATA) == old


@pytest.mark.parametrize(
    "changes",
    [
        Changes(mode=stat.S_IFREG | 0o644),
        Changes(uid=OWNER.uid, gid=OWNER.gid),
        Changes(mtime_ns=5, atime_ns=6),
        Changes(size=0),
    ],
)
def test_what_changes_nothing_of_the_document_is_accepted(shell: TreeShell, changes: Changes) -> None:
    before = shell.stat(METADATA)
    shell.setattr(METADATA, changes)
    assert shell.stat(METADATA) == before


@pytest.mark.parametrize("path", [METADATA, "containers/c"])
@pytest.mark.parametrize("changes", [Changes(mode=0o600), Changes(uid=1), Changes(gid=2)])
def test_mode_and_owner_are_fixed(shell: TreeShell, path: str, changes: Changes) -> None:
    before = shell.stat(path)
    with pytest.raises(errors.NotPermitted):
        shell.setattr(path, changes)
    assert shell.stat(path) == before


def test_mkdir_with_the_mode_it_has_anyway(shell: TreeShell) -> None:
    assert stat.S_IMODE(shell.setattr("containers/c", Changes(mode=stat.S_IFDIR | 0o755)).mode) == 0o755


def test_document_cannot_be_cut(shell: TreeShell) -> None:
    with pytest.raises(errors.BadDocument):
        shell.setattr(METADATA, Changes(size=5))


def test_ftruncate_goes_to_the_handle(shell: TreeShell) -> None:
    fh = shell.open(METADATA, os.O_RDWR)
    node = shell.tree.handles.file(fh).node
    run(shell.tree.setattr(node.ino, Changes(size=0), fh, CALLER))
    run(shell.tree.write(fh, 0, b'{"key": 1}'))
    shell.close(fh)
    assert document(shell)["key"] == 1


def test_damaged_document_is_an_io_error_of_its_file_only(shell: TreeShell, store: Store) -> None:
    Path(Layout(store.path).container("c"), "container").write_bytes(b"rubbish")
    assert shell.ls("containers/c") == ["metadata.json", *PARTS]
    with pytest.raises(errors.StoreDamaged):
        shell.read(METADATA)


@pytest.fixture(params=["rubbish", "missing", "no descriptor", "bad disk"])
def unreadable(
    request: pytest.FixtureRequest, store: Store, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], object]:
    """Makes the document of `c` unreadable from now on."""

    def fail(number: int) -> None:
        def refuse(*_: object) -> bytes:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("fusestore.containers.read_file", refuse)

    document = Path(Layout(store.path).container("c"), "container")
    ways: dict[str, Callable[[], object]] = {
        "rubbish": lambda: document.write_bytes(b"rubbish"),
        "missing": document.unlink,
        "no descriptor": lambda: fail(errno.EMFILE),
        "bad disk": lambda: fail(errno.EIO),
    }
    return ways[request.param]


def test_what_is_in_use_stays_when_the_document_cannot_be_read(
    shell: TreeShell, unreadable: Callable[[], object]
) -> None:
    with shell.walk("containers/c/rootfs") as entry:
        fh = shell.open("containers/c/rootfs/inside")
        shell.stat(METADATA)
        unreadable()
        assert shell.ls("containers/c") == ["metadata.json", *PARTS]
        assert shell.ino("containers/c/rootfs") == entry.node.ino
        assert run(shell.tree.read(fh, 0, 20)) == b"container c"
        shell.close(fh)


def test_label_and_pin_stay_when_the_document_cannot_be_read(
    shell: TreeShell, unreadable: Callable[[], object]
) -> None:
    shell.write(METADATA, b'{"mountlabel": "a:b:c", "mounted": true}')
    with shell.walk("containers/c/rootfs"):
        unreadable()
        assert rootfs(shell).label == b"a:b:c"
        with pytest.raises(errors.Busy):
            shell.unlink(METADATA)


def test_document_is_read_again_after_an_error_that_passes(
    shell: TreeShell, monkeypatch: pytest.MonkeyPatch
) -> None:
    with shell.walk("containers/c"), monkeypatch.context() as patch:
        patch.setattr("fusestore.containers.read_file", lambda *_: os.read(-1, 1))
        with pytest.raises(OSError):
            shell.read(METADATA)
        patch.undo()
        assert document(shell)["id"] == "c"


def test_container_replaced_while_its_document_was_unreadable_is_another(
    shell: TreeShell, store: Store, unreadable: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    with shell.walk("containers/c/rootfs") as entry:
        shell.stat(METADATA)
        unreadable()
        shell.stat("containers/c")
        os.rename(Layout(store.path).container("c"), Layout(store.path).container("aside"))
        store.create_container(container_id="c")
        assert shell.ino("containers/c/rootfs") != entry.node.ino


def test_container_with_a_damaged_document_can_be_removed(shell: TreeShell, store: Store) -> None:
    Path(Layout(store.path).container("c"), "container").write_bytes(b"rubbish")
    shell.rm_r("containers/c")
    assert store.container_ids() == []


# Binding


def test_writing_the_image_binds(shell: TreeShell, image_id: str) -> None:
    shell.write(METADATA, b'{"image-name": "localhost/app:1"}')
    assert document(shell)["image-id"] == image_id


def test_binding_is_refused_once_rootfs_was_entered(shell: TreeShell, image_id: str) -> None:
    with shell.walk("containers/c"):
        shell.ls("containers/c/rootfs")
        with pytest.raises(errors.Busy):
            shell.write(METADATA, b'{"image-name": "localhost/app:1"}')
    assert document(shell)["image-id"] == ""


def test_other_keys_can_be_written_once_rootfs_was_entered(shell: TreeShell) -> None:
    with shell.walk("containers/c"):
        shell.ls("containers/c/rootfs")
        shell.write(METADATA, b'{"key": 1}')
    assert document(shell)["key"] == 1


def test_who_enters_while_it_is_being_bound_sees_the_image_after(shell: TreeShell, image_id: str) -> None:
    with shell.walk("containers/c"):
        fh = shell.open(METADATA, os.O_WRONLY | os.O_TRUNC)
        steps: Any = shell.tree.write(fh, 0, b'{"image-name": "localhost/app:1"}')
        call = next(steps)
        shell.ls("containers/c/rootfs")
        early = rootfs(shell)
        with pytest.raises(StopIteration):
            steps.send(call())
        assert early.is_detached
        shell.close(fh)


# mounted


def test_writing_mounted_pins_and_releases(shell: TreeShell, store: Store) -> None:
    shell.write(METADATA, b'{"mounted": true}')
    assert store.container("c").mounted
    shell.write(METADATA, b'{"mounted": false}')
    assert not store.container("c").mounted


@pytest.mark.parametrize(
    "remove",
    [
        lambda shell: shell.rmdir("containers/c"),
        lambda shell: shell.rename("containers/c", "containers/d"),
        lambda shell: shell.unlink(METADATA),
    ],
    ids=["rmdir", "mv", "rm"],
)
@pytest.mark.parametrize("how", ["pinned", "open here", "held elsewhere"])
def test_container_in_use_is_busy(
    shell: TreeShell, store: Store, how: str, remove: Callable[[TreeShell], None]
) -> None:
    with shell.walk("containers/c"):
        if how == "pinned":
            shell.write(METADATA, b'{"mounted": true}')
        elif how == "open here":
            shell.open("containers/c/workdir/inside")
        hold = store.hold("c") if how == "held elsewhere" else None
        with pytest.raises(errors.Busy):
            remove(shell)
        if hold is not None:
            hold.close()
    assert shell.ls("containers/c") == ["metadata.json", *PARTS]


def test_rm_r_of_a_pinned_container_stays_out_of_its_rootfs(shell: TreeShell) -> None:
    shell.write(METADATA, b'{"mounted": true}')
    with pytest.raises(errors.Busy):
        shell.unlink(METADATA)
    with pytest.raises(errors.Busy):
        shell.ls("containers/c/rootfs")


def test_parts_of_a_pinned_container_are_as_busy_as_it(shell: TreeShell) -> None:
    shell.write(METADATA, b'{"mounted": true}')
    for part in PARTS:
        with pytest.raises(errors.Busy):
            shell.rmdir(f"containers/c/{part}")


def test_others_may_enter_after_a_refused_rm(shell: TreeShell) -> None:
    shell.write(METADATA, b'{"mounted": true}')
    with pytest.raises(errors.Busy):
        shell.unlink(METADATA)
    other = Caller(uid=1000, gid=1001, pid=CALLER.pid + 1, umask=0)
    assert shell.ls("containers/c/rootfs", other) == ["inside"]


# rmdir, mv


def test_rmdir_deletes_at_once(shell: TreeShell, store: Store) -> None:
    Path(Layout(store.path).container("c"), "workdir/file").write_bytes(b"")
    shell.rmdir("containers/c")
    assert (store.container_ids(), shell.exists("containers/c"), shell.deletions) == ([], False, 1)


def test_rmdir_lets_go_of_the_rootfs(shell: TreeShell) -> None:
    with shell.walk("containers/c"):
        shell.ls("containers/c/rootfs")
        shell.rmdir("containers/c")
    assert all(made.is_detached for made in shell.driver.made)


def test_nobody_enters_while_the_store_deletes(shell: TreeShell) -> None:
    with shell.walk("containers/c") as entry:
        steps: Any = shell.tree.rmdir(shell.ino("containers"), b"c")
        call = next(steps)
        with pytest.raises(errors.Busy):
            run(shell.tree.lookup(entry.node.ino, b"rootfs"))
        call()


def test_id_can_be_used_again_after_rmdir(shell: TreeShell) -> None:
    shell.write("containers/c/tmp", b"x")
    shell.rmdir("containers/c")
    shell.mkdir("containers/c")
    assert shell.ls("containers/c") == ["metadata.json", *PARTS]


def test_mv_renames_a_container(shell: TreeShell) -> None:
    shell.rename("containers/c", "containers/d")
    assert (shell.ls("containers"), document(shell, "d")["id"]) == (["d"], "d")


def test_mv_renames_the_id_in_a_document_that_was_seen(shell: TreeShell) -> None:
    with shell.walk("containers/c"):
        assert document(shell)["id"] == "c"
        shell.rename("containers/c", "containers/d")
        assert document(shell, "d")["id"] == "d"


def test_mv_keeps_the_directory_the_kernel_knows(shell: TreeShell) -> None:
    with shell.walk("containers/c") as entry:
        shell.rename("containers/c", "containers/d")
        assert shell.ino("containers/d") == entry.node.ino


def test_mv_keeps_scratch_files(shell: TreeShell) -> None:
    shell.write("containers/c/tmp", b"x")
    shell.rename("containers/c", "containers/d")
    assert shell.read("containers/d/tmp") == b"x"


def test_mv_takes_the_rootfs_along(shell: TreeShell) -> None:
    with shell.walk("containers/c"):
        shell.ls("containers/c/rootfs")
        before = rootfs(shell, "containers/c/rootfs")
        shell.rename("containers/c", "containers/d")
        assert rootfs(shell, "containers/d/rootfs") is before
        assert before.place == "d"


@pytest.mark.parametrize(
    "target, flags, error",
    [
        ("containers/other", 0, errors.Exists),
        ("containers/other", RENAME_NOREPLACE, errors.Exists),
        ("containers/.x", 0, errors.BadName),
        ("containers/other", RENAME_EXCHANGE, errors.BadInput),
        ("containers/other/c", 0, errors.NotPermitted),
        ("images/c", 0, errors.CrossDevice),
        ("c", 0, errors.CrossDevice),
    ],
)
def test_mv_refused(shell: TreeShell, target: str, flags: int, error: type[Exception]) -> None:
    shell.mkdir("containers/other")
    with pytest.raises(error):
        shell.rename("containers/c", target, flags)
    assert document(shell)["id"] == "c"


# rm -r


def test_rm_r_deletes_without_entering_rootfs(shell: TreeShell, store: Store) -> None:
    shell.rm_r("containers/c")
    assert store.container_ids() == []
    assert not any(made.handles or made.attached for made in shell.driver.made)


def test_rm_r_removes_scratch_files_too(shell: TreeShell, store: Store) -> None:
    shell.write("containers/c/a", b"x")
    shell.rm_r("containers/c")
    assert store.container_ids() == []


def test_unlinked_document_hides_what_is_on_disk(shell: TreeShell) -> None:
    shell.unlink(METADATA)
    assert (shell.ls("containers/c"), [shell.ls(f"containers/c/{part}") for part in PARTS]) == (
        PARTS,
        [[]] * 3,
    )


def test_unlinked_document_hides_what_the_kernel_knows(shell: TreeShell) -> None:
    """The number of the root, which it may have cached, is an empty directory's: no lookup comes before."""
    with shell.walk("containers/c/rootfs") as entry:
        shell.unlink(METADATA)
        fh = run(shell.tree.opendir(entry.node.ino, CALLER))
        assert [name for name, _, _ in shell.readdir(fh)] == [b".", b".."]
        with pytest.raises(errors.NotFound):
            run(shell.tree.lookup(entry.node.ino, b"inside"))


def test_nothing_on_disk_is_lost_until_the_last_rmdir(shell: TreeShell, store: Store) -> None:
    shell.unlink(METADATA)
    for part in PARTS:
        shell.rmdir(f"containers/c/{part}")
    assert (shell.ls("containers/c"), store.container_ids()) == ([], ["c"])
    shell.rmdir("containers/c")
    assert store.container_ids() == []


@pytest.mark.parametrize("part", PARTS)
def test_parts_cannot_be_removed_before(shell: TreeShell, part: str) -> None:
    with pytest.raises(errors.NotPermitted):
        shell.rmdir(f"containers/c/{part}")


@pytest.mark.parametrize("part", PARTS)
def test_part_is_removed_once(shell: TreeShell, part: str) -> None:
    shell.unlink(METADATA)
    shell.rmdir(f"containers/c/{part}")
    with pytest.raises(errors.NotFound):
        shell.rmdir(f"containers/c/{part}")


@pytest.mark.parametrize(
    "again",
    [
        lambda shell: shell.close(shell.open(METADATA, os.O_WRONLY | os.O_CREAT)),
        lambda shell: shell.close(shell.open(METADATA, os.O_WRONLY | os.O_CREAT | os.O_EXCL)),
        lambda shell: shell.write(METADATA, b"{}"),
        lambda shell: (shell.write("containers/c/tmp", b"{}"), shell.rename("containers/c/tmp", METADATA)),
    ],
    ids=["touch", "O_EXCL", "write", "rename"],
)
def test_making_the_document_again_takes_the_removal_back(
    shell: TreeShell, again: Callable[[TreeShell], None]
) -> None:
    with shell.walk("containers/c"):
        shell.unlink(METADATA)
        shell.rmdir("containers/c/rootfs")
        again(shell)
        assert shell.ls("containers/c") == ["metadata.json", *PARTS]
        assert shell.read("containers/c/rootfs/inside") == b"container c"


def test_starting_a_container_takes_its_removal_back(shell: TreeShell, store: Store) -> None:
    with shell.walk("containers/c") as entry:
        shell.unlink(METADATA)
        shell.rmdir("containers/c/rootfs")
        store.set_container_metadata("c", {"mounted": True})
        shell.tree.heard(Changed("containers", "c"))
        assert shell.ls("containers/c") == ["metadata.json", *PARTS]
        assert shell.ino("containers/c") == entry.node.ino
        with pytest.raises(errors.Busy):
            shell.rmdir("containers/c")


def test_taken_back_removal_gives_the_kernels_number_its_rootfs_again(shell: TreeShell) -> None:
    with shell.walk("containers/c/rootfs") as entry:
        shell.unlink(METADATA)
        shell.write(METADATA, b"{}")
        assert shell.ino("containers/c/rootfs") == entry.node.ino


def test_bad_document_takes_nothing_back_from_disk(shell: TreeShell) -> None:
    old = shell.read(METADATA)
    shell.unlink(METADATA)
    with pytest.raises(errors.BadDocument):
        shell.write(METADATA, b"rubbish")
    assert shell.read(METADATA) == old


def test_removal_survives_being_forgotten_by_the_kernel(shell: TreeShell) -> None:
    with shell.walk("containers/c"):
        shell.unlink(METADATA)
    assert shell.ls("containers/c") == PARTS


def test_another_mount_shows_a_half_removed_container_whole(shell: TreeShell, store: Store) -> None:
    shell.unlink(METADATA)
    assert TreeShell(store).ls("containers/c") == ["metadata.json", *PARTS]


# Putting the document aside, as editors do


def test_renamed_document_becomes_a_scratch_file(shell: TreeShell) -> None:
    old = shell.read(METADATA)
    shell.rename(METADATA, "containers/c/metadata.json~")
    assert (shell.ls("containers/c"), shell.read("containers/c/metadata.json~")) == (
        ["metadata.json~", *PARTS],
        old,
    )


def test_renamed_document_leaves_the_rootfs_alone(shell: TreeShell) -> None:
    fh = shell.open("containers/c/rootfs/inside")
    shell.rename(METADATA, "containers/c/metadata.json~")
    assert shell.ls("containers/c/rootfs") == ["inside"]
    run(shell.tree.release(fh))


def test_vim_saves(shell: TreeShell) -> None:
    """backupcopy=no: rename to a backup, write the file anew, remove the backup."""
    shell.rename(METADATA, "containers/c/metadata.json~")
    shell.write(METADATA, b'{"key": 1}', os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    shell.unlink("containers/c/metadata.json~")
    assert (document(shell)["key"], shell.ls("containers/c")) == (1, ["metadata.json", *PARTS])


def test_document_can_be_moved_back(shell: TreeShell) -> None:
    old = document(shell)
    shell.rename(METADATA, "containers/c/tmp")
    shell.rename("containers/c/tmp", METADATA)
    assert (document(shell), shell.ls("containers/c")) == (old, ["metadata.json", *PARTS])


def test_rm_r_after_the_document_was_renamed_deletes_without_entering(shell: TreeShell, store: Store) -> None:
    shell.write("containers/c/a", b"x")
    shell.rename(METADATA, "containers/c/z")
    shell.rename("containers/c/z", "containers/c/zz")
    shell.rm_r("containers/c")
    assert store.container_ids() == []
    assert not any(made.attached for made in shell.driver.made)


# Scratch files


def test_scratch_file_is_an_ordinary_file(shell: TreeShell) -> None:
    shell.write("containers/c/tmp", b"text")
    attr = shell.stat("containers/c/tmp")
    assert (attr.mode, attr.uid, attr.gid, attr.size) == (
        stat.S_IFREG | 0o644,
        CALLER.uid,
        CALLER.gid,
        4,
    )
    assert shell.read("containers/c/tmp") == b"text"


def test_scratch_files_attributes_can_be_set(shell: TreeShell) -> None:
    shell.write("containers/c/tmp", b"text")
    attr = shell.setattr("containers/c/tmp", Changes(mode=0o600, size=2))
    assert (stat.S_IMODE(attr.mode), attr.size) == (0o600, 2)


def test_scratch_files_are_listed_between_document_and_parts(shell: TreeShell) -> None:
    for name in ("b", "a"):
        shell.write(f"containers/c/{name}", b"")
    assert shell.ls("containers/c") == ["metadata.json", "a", "b", *PARTS]


def test_scratch_file_can_be_renamed_over_another(shell: TreeShell) -> None:
    shell.write("containers/c/a", b"a")
    shell.write("containers/c/b", b"b")
    shell.rename("containers/c/a", "containers/c/b")
    assert (shell.read("containers/c/b"), shell.exists("containers/c/a")) == (b"a", False)


def test_unlinked_scratch_file_can_still_be_read(shell: TreeShell) -> None:
    shell.write("containers/c/a", b"a")
    fh = shell.open("containers/c/a")
    shell.unlink("containers/c/a")
    assert (run(shell.tree.read(fh, 0, 10)), shell.exists("containers/c/a")) == (b"a", False)
    shell.close(fh)


def test_scratch_file_takes_1_mib(shell: TreeShell) -> None:
    shell.write("containers/c/a", bytes(SCRATCH_MAX))
    with pytest.raises(errors.FileTooLarge):
        shell.write("containers/c/a", bytes(SCRATCH_MAX + 1))


def test_number_of_scratch_files_is_bounded(shell: TreeShell) -> None:
    for number in range(SCRATCH_FILES_MAX):
        shell.write(f"containers/c/{number}", b"")
    with pytest.raises(errors.NoSpace):
        shell.write("containers/c/one-more", b"")


def test_o_excl_refuses_a_name_that_is_there(shell: TreeShell) -> None:
    shell.write("containers/c/a", b"")
    for name in ("a", "metadata.json", "rootfs"):
        with shell.walk("containers/c") as entry, pytest.raises(errors.Exists):
            run(shell.tree.create(entry.node.ino, name.encode(), 0o600, os.O_EXCL, CALLER))


@pytest.mark.parametrize(
    "make",
    [
        lambda shell: shell.mkdir("containers/c/x"),
        lambda shell: shell.symlink("y", "containers/c/x"),
        lambda shell: shell.mknod("containers/c/x"),
        lambda shell: shell.link(METADATA, "containers/c/x"),
        lambda shell: shell.rename("containers/c/rootfs", "containers/c/x"),
        lambda shell: shell.setattr("containers/c", Changes(mode=0o700)),
    ],
    ids=["mkdir", "symlink", "mknod", "link", "mv rootfs", "chmod"],
)
def test_only_plain_files_can_be_made_beside_the_document(
    shell: TreeShell, make: Callable[[TreeShell], None]
) -> None:
    with pytest.raises(errors.NotPermitted):
        make(shell)
    assert shell.ls("containers/c") == ["metadata.json", *PARTS]


def test_mv_onto_the_document_commits(shell: TreeShell) -> None:
    shell.write("containers/c/tmp", b'{"key": 1}')
    shell.rename("containers/c/tmp", METADATA)
    assert (document(shell)["key"], shell.exists("containers/c/tmp")) == (1, False)


@pytest.mark.parametrize("data", [b"", b"{", b"rubbish", b'{"id": "d"}'])
def test_mv_of_a_bad_document_keeps_both(shell: TreeShell, data: bytes) -> None:
    old = shell.read(METADATA)
    shell.write("containers/c/tmp", data)
    with pytest.raises((errors.BadDocument, errors.NotPermitted)):
        shell.rename("containers/c/tmp", METADATA)
    assert (shell.read(METADATA), shell.read("containers/c/tmp")) == (old, data)


def test_mv_onto_the_document_with_noreplace(shell: TreeShell) -> None:
    shell.write("containers/c/tmp", b"{}")
    with pytest.raises(errors.Exists):
        shell.rename("containers/c/tmp", METADATA, RENAME_NOREPLACE)


def test_scratch_file_does_not_leave_its_container(shell: TreeShell) -> None:
    shell.mkdir("containers/d")
    shell.write("containers/c/tmp", b"{}")
    with pytest.raises(errors.CrossDevice):
        shell.rename("containers/c/tmp", "containers/d/metadata.json")


def test_scratch_files_outlive_the_kernels_memory_but_not_the_mount(shell: TreeShell, store: Store) -> None:
    shell.write("containers/c/tmp", b"x")
    assert shell.read("containers/c/tmp") == b"x"
    assert not TreeShell(store).exists("containers/c/tmp")


# Workdir, rundir


def test_rundir_is_made_when_first_looked_up(shell: TreeShell, store: Store) -> None:
    shell.stat("containers/c/rundir")
    assert stat.S_IMODE(os.stat(store.run_dir("c")).st_mode) == 0o700


@pytest.mark.parametrize("part", PARTS)
def test_parent_of_a_part_is_the_container(shell: TreeShell, part: str) -> None:
    with shell.walk(f"containers/c/{part}") as entry:
        assert run(shell.tree.lookup(entry.node.ino, b"..")).node.ino == shell.ino("containers/c")


def test_forgotten_container_is_let_go(shell: TreeShell) -> None:
    shell.ls("containers/c/rootfs")
    assert all(made.is_detached for made in shell.driver.made)


def test_refusals_say_what_to_do(shell: TreeShell) -> None:
    with pytest.raises(errors.NotPermitted, match=re.escape("use its rootfs or workdir")):
        shell.symlink("y", "containers/c/x")


def test_a_container_that_is_made_while_it_is_looked_for_is_no_link(
    shell: TreeShell, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, looked = ContainerTree._container, []

    def look_too_early(tree: ContainerTree, container_id: str) -> object:
        looked.append(container_id)
        return None if len(looked) == 1 else look(tree, container_id)

    monkeypatch.setattr(ContainerTree, "_container", look_too_early)
    assert stat.S_ISDIR(shell.stat("containers/c").mode)
