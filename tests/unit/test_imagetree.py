"""/images without a kernel: what is shown, tagging, deleting; nothing else changes (design.md section 2)."""

import gzip
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rig.ocisources import tar_of
from rig.tinyimages import make_layout
from rig.treeshell import CALLER, OWNER, TreeShell

from fusestore import errors
from fusestore.inodes import Changes, run
from fusestore.store import Store
from fusestore.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE

LAYERS = [{"etc/one": b"one\n" * 3000}, {"etc/two": b"two\n"}]
CREATED_NS = 1706933106 * 10**9 + 7


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", tmp_path / "run", create=True) as store:
        yield store


@pytest.fixture
def app(store: Store, tmp_path: Path) -> str:
    """The id of an image called localhost/app:1 and default."""
    make_layout(tmp_path / "app", "localhost/app:1", LAYERS)
    return store.import_image(f"oci:{tmp_path}/app").id


@pytest.fixture
def other(store: Store, app: str, tmp_path: Path) -> str:
    """The id of an image called other."""
    make_layout(tmp_path / "other", "other", LAYERS[1:])
    return store.import_image(f"oci:{tmp_path}/other").id


@pytest.fixture
def shell(store: Store, app: str) -> TreeShell:
    return TreeShell(store)


# What is shown


def test_ids_and_names_are_shown(shell: TreeShell, app: str) -> None:
    assert shell.ls("images") == [app, "default", "localhost"]


def test_name_is_a_link_to_the_id(shell: TreeShell, app: str) -> None:
    assert shell.readlink("images/default") == app


def test_name_with_a_slash_nests(shell: TreeShell, app: str) -> None:
    assert (shell.ls("images/localhost"), shell.readlink("images/localhost/app:1")) == (
        ["app:1"],
        f"../{app}",
    )


def test_deep_names_nest_deeply(shell: TreeShell, store: Store, app: str) -> None:
    store.tag(app, "a/b/c")
    assert (shell.ls("images/a"), shell.readlink("images/a/b/c")) == (["b"], f"../../{app}")


def test_parent_of_a_nested_directory(shell: TreeShell, store: Store, app: str) -> None:
    store.tag(app, "a/b/c")
    with shell.walk("images/a/b") as entry:
        assert run(shell.tree.lookup(entry.node.ino, b"..")).node.ino == shell.ino("images/a")


def test_image_directory_is_complete(shell: TreeShell, app: str) -> None:
    assert shell.ls(f"images/{app}") == ["manifest.json", "config.json", "metadata.json", "rootfs", "layers"]
    assert shell.ls(f"images/{app}/layers") == ["0", "1"]
    assert shell.ls(f"images/{app}/layers/1") == ["rootfs", "blob", "tar"]


def test_config_is_the_one_the_id_is_of(shell: TreeShell, app: str) -> None:
    assert hashlib.sha256(shell.read(f"images/{app}/config.json")).hexdigest() == app


def test_manifest_names_the_config(shell: TreeShell, app: str) -> None:
    manifest = json.loads(shell.read(f"images/{app}/manifest.json"))
    assert manifest["config"]["digest"] == f"sha256:{app}"


def test_metadata_lists_the_names(shell: TreeShell, app: str) -> None:
    assert json.loads(shell.read(f"images/{app}/metadata.json"))["names"] == ["localhost/app:1", "default"]


@pytest.mark.parametrize("number", [0, 1])
def test_tar_is_the_uncompressed_layer(shell: TreeShell, app: str, number: int) -> None:
    assert shell.read(f"images/{app}/layers/{number}/tar") == tar_of(LAYERS[number])


@pytest.mark.parametrize("number", [0, 1])
def test_blob_is_the_layer_as_stored(shell: TreeShell, app: str, number: int) -> None:
    assert gzip.decompress(shell.read(f"images/{app}/layers/{number}/blob")) == tar_of(LAYERS[number])


@pytest.mark.parametrize(
    "name", ["manifest.json", "config.json", "metadata.json", "layers/0/blob", "layers/0/tar"]
)
def test_sizes_are_exact(shell: TreeShell, app: str, name: str) -> None:
    path = f"images/{app}/{name}"
    assert shell.stat(path).size == len(shell.read(path))


@pytest.mark.parametrize(
    "path, mode", [("", 0o755), ("/layers", 0o555), ("/layers/0", 0o555), ("/config.json", 0o444)]
)
def test_modes_owner_and_time(shell: TreeShell, app: str, path: str, mode: int) -> None:
    attr = shell.stat(f"images/{app}{path}")
    assert (stat.S_IMODE(attr.mode), attr.uid, attr.gid, attr.mtime_ns) == (
        mode,
        OWNER.uid,
        OWNER.gid,
        CREATED_NS,
    )


def test_a_blob_can_be_read_from_the_middle(shell: TreeShell, app: str) -> None:
    fh = shell.open(f"images/{app}/layers/0/tar")
    assert run(shell.tree.read(fh, 512, 4)) == b"one\n"
    shell.close(fh)


def test_rootfs_is_the_merged_image(shell: TreeShell, app: str) -> None:
    assert shell.read(f"images/{app}/rootfs/inside") == f"image {app}".encode()


def test_layers_have_a_rootfs_each(shell: TreeShell, app: str) -> None:
    assert shell.read(f"images/{app}/layers/1/rootfs/inside") == b"layer 1"


@pytest.mark.parametrize("path", ["x", "layers/2", "layers/-1", "layers/00", "layers/0/x"])
def test_what_is_not_there(shell: TreeShell, app: str, path: str) -> None:
    with pytest.raises(errors.NotFound):
        shell.stat(f"images/{app}/{path}")


def test_missing_blob_is_an_io_error(shell: TreeShell, store: Store, app: str) -> None:
    Path(store.blob_path(store.image(app).layers[0].blob)).unlink()
    with pytest.raises(errors.StoreDamaged):
        shell.read(f"images/{app}/layers/0/blob")


def test_blob_cut_short_is_an_io_error(shell: TreeShell, store: Store, app: str) -> None:
    os.truncate(store.blob_path(store.image(app).layers[0].blob), 10)
    with pytest.raises(errors.StoreDamaged):
        shell.read(f"images/{app}/layers/0/blob")


@pytest.mark.parametrize("damaged", ["manifest.json", "config.json"])
def test_damaged_document_is_listed_with_the_rest(
    shell: TreeShell, store: Store, app: str, damaged: str
) -> None:
    image = store.image(app)
    digest = image.manifest if damaged == "manifest.json" else image.config
    Path(store.blob_path(digest)).write_bytes(b"rubbish")
    assert shell.ls(f"images/{app}") == ["manifest.json", "config.json", "metadata.json", "rootfs", "layers"]
    with pytest.raises(errors.StoreDamaged):
        shell.read(f"images/{app}/{damaged}")


def test_layer_that_cannot_be_opened_is_listed_whole(shell: TreeShell, store: Store, app: str) -> None:
    for layer in Path(store.path, "layers").iterdir():
        shutil.rmtree(layer)
    Path(store.blob_path(store.image(app).layers[1].blob)).unlink()
    for number in range(2):
        assert shell.ls(f"images/{app}/layers/{number}") == ["rootfs", "blob", "tar"]
    with pytest.raises(errors.StoreDamaged):
        shell.stat(f"images/{app}/layers/1/tar")


# What others do in the same store


def test_names_given_behind_are_seen(shell: TreeShell, store: Store, app: str) -> None:
    assert not shell.exists("images/new")
    store.tag(app, "new")
    assert shell.readlink("images/new") == app


def test_names_taken_behind_are_gone(shell: TreeShell, store: Store) -> None:
    store.untag("localhost/app:1")
    assert not shell.exists("images/localhost")


def test_name_moved_behind_is_another_link(shell: TreeShell, store: Store, other: str) -> None:
    with shell.walk("images/default") as entry:
        store.tag(other, "default", replace=True)
        assert shell.ino("images/default") != entry.node.ino
    assert shell.readlink("images/default") == other


def test_metadata_with_another_name_is_another_file(shell: TreeShell, store: Store, app: str) -> None:
    path = f"images/{app}/metadata.json"
    with shell.walk(path) as entry:
        store.tag(app, "new")
        assert shell.ino(path) != entry.node.ino


def test_metadata_stays_the_same_file(shell: TreeShell, app: str) -> None:
    path = f"images/{app}/metadata.json"
    with shell.walk(path) as entry:
        assert shell.ino(path) == entry.node.ino


def test_image_deleted_behind_is_gone(shell: TreeShell, store: Store, app: str) -> None:
    with shell.walk(f"images/{app}") as entry:
        store.delete_image(app)
        assert not shell.exists(f"images/{app}")
        with pytest.raises(errors.Stale):
            run(shell.tree.lookup(entry.node.ino, b"config.json"))


# Tagging


TARGETS: dict[str, Callable[[str], str]] = {
    "id": lambda app: app,
    "id prefix": lambda app: app[:12],
    "name": lambda app: "localhost/app:1",
    "dot": lambda app: f"./{app}",
    "slash at the end": lambda app: f"{app}/",
    "absolute": lambda app: f"/mnt/images/{app}",
    "absolute to a name": lambda app: "/mnt/images/localhost/app:1",
    "absolute, mounted below images": lambda app: f"/images/mnt/images/{app}",
}


@pytest.mark.parametrize("target", TARGETS)
def test_symlink_tags(shell: TreeShell, store: Store, app: str, target: str) -> None:
    shell.symlink(TARGETS[target](app), "images/new")
    assert store.image_names()["new"] == app


@pytest.mark.parametrize(
    "target", ["../{}", "{}", "app:1", "localhost/app:1", "../default", "../localhost/app:1"]
)
def test_symlink_in_a_name_directory_tags(shell: TreeShell, store: Store, app: str, target: str) -> None:
    shell.symlink(target.format(app), "images/localhost/new")
    assert store.image_names()["localhost/new"] == app


@pytest.mark.parametrize(
    "target", ["no-such", "0" * 64, "..", "/", "/mnt/other", "images", "/mnt/images/no-such"]
)
def test_symlink_to_no_image(shell: TreeShell, target: str) -> None:
    with pytest.raises(errors.NotFound):
        shell.symlink(target, "images/new")


@pytest.mark.parametrize("name", ["default", "localhost"])
def test_symlink_over_a_taken_name(shell: TreeShell, app: str, name: str) -> None:
    with pytest.raises(errors.Exists):
        shell.symlink(app, f"images/{name}")


@pytest.mark.parametrize("name", ["a b", "ü", "-x", "f" * 64])
def test_symlink_of_what_cannot_be_a_name(shell: TreeShell, app: str, name: str) -> None:
    with pytest.raises(errors.BadName):
        shell.symlink(app, f"images/{name}")


def test_ln_sfn_moves_a_name(shell: TreeShell, store: Store, other: str) -> None:
    """ln makes a link of another name, and renames it over the one that is there."""
    shell.symlink("other", "images/CuXd3F9a")
    shell.rename("images/CuXd3F9a", "images/default")
    assert (store.image_names()["default"], "CuXd3F9a" in store.image_names()) == (other, False)


def test_rm_untags(shell: TreeShell, store: Store, app: str) -> None:
    shell.unlink("images/default")
    assert (store.image_names(), store.image_ids()) == ({"localhost/app:1": app}, [app])


@pytest.mark.parametrize("new", ["new", "localhost/new"])
def test_mv_renames_a_tag(shell: TreeShell, store: Store, app: str, new: str) -> None:
    shell.rename("images/default", f"images/{new}")
    assert store.image_names() == {"localhost/app:1": app, new: app}


def test_mv_with_noreplace_keeps_the_other(shell: TreeShell, other: str) -> None:
    with pytest.raises(errors.Exists):
        shell.rename("images/other", "images/default", RENAME_NOREPLACE)


def test_mv_does_not_exchange(shell: TreeShell, other: str) -> None:
    with pytest.raises(errors.BadInput):
        shell.rename("images/other", "images/default", RENAME_EXCHANGE)


# Directories for names


def test_mkdir_makes_a_place_for_names(shell: TreeShell, store: Store, app: str) -> None:
    shell.mkdir("images/a")
    shell.mkdir("images/a/b")
    assert ("a" in shell.ls("images"), shell.ls("images/a"), shell.ls("images/a/b")) == (True, ["b"], [])
    shell.symlink(app, "images/a/b/new")
    assert store.image_names()["a/b/new"] == app


def test_a_name_can_be_moved_into_a_new_directory(shell: TreeShell, store: Store) -> None:
    shell.mkdir("images/a")
    shell.rename("images/default", "images/a/new")
    assert "a/new" in store.image_names()


def test_directory_that_was_made_goes_with_its_last_name(shell: TreeShell, app: str) -> None:
    shell.mkdir("images/a")
    shell.symlink(app, "images/a/new")
    shell.unlink("images/a/new")
    assert not shell.exists("images/a")


def test_directory_that_was_made_goes_with_rmdir_or_the_mount(shell: TreeShell, store: Store) -> None:
    shell.mkdir("images/a")
    shell.mkdir("images/a/b")
    assert not TreeShell(store).exists("images/a")
    with pytest.raises(errors.NotEmpty):
        shell.rmdir("images/a")
    shell.rmdir("images/a/b")
    shell.rmdir("images/a")
    assert not shell.exists("images/a")


def test_number_of_empty_directories_is_bounded(shell: TreeShell, app: str) -> None:
    for number in range(64):
        shell.mkdir(f"images/d{number}")
    with pytest.raises(errors.NoSpace):
        shell.mkdir("images/one-more")
    shell.symlink(app, "images/d0/new")
    shell.mkdir("images/one-more")


@pytest.mark.parametrize("name", ["default", "localhost", "localhost/app:1"])
def test_mkdir_of_what_is_there(shell: TreeShell, name: str) -> None:
    with pytest.raises(errors.Exists):
        shell.mkdir(f"images/{name}")


@pytest.mark.parametrize("name", ["a b", "-x", "f" * 64])
def test_mkdir_of_what_can_be_no_part_of_a_name(shell: TreeShell, name: str) -> None:
    with pytest.raises(errors.BadName):
        shell.mkdir(f"images/{name}")


# Deleting


def test_rmdir_deletes_the_image(shell: TreeShell, store: Store, app: str) -> None:
    with shell.walk(f"images/{app}"):
        shell.ls(f"images/{app}/rootfs")
        shell.rmdir(f"images/{app}")
    assert (store.image_ids(), shell.ls("images")) == ([], [])
    assert all(made.is_detached for made in shell.driver.made)


def test_rmdir_of_an_image_with_a_container(shell: TreeShell, store: Store, app: str) -> None:
    store.create_container(container_id="c")
    with pytest.raises(errors.Busy):
        shell.rmdir(f"images/{app}")
    assert store.image_ids() == [app]


def test_rmdir_of_an_image_with_an_open_file(shell: TreeShell, store: Store, app: str) -> None:
    shell.open(f"images/{app}/rootfs/inside")
    with pytest.raises(errors.Busy):
        shell.rmdir(f"images/{app}")
    assert store.image_ids() == [app]


def test_rmdir_of_a_directory_of_names(shell: TreeShell) -> None:
    with pytest.raises(errors.NotEmpty):
        shell.rmdir("images/localhost")


def test_rm_r_of_a_directory_of_names_untags_them_all(shell: TreeShell, store: Store, app: str) -> None:
    for name in ("localhost/new", "localhost/deep/one", "localhost/deep/two"):
        store.tag(app, name)
    shell.rm_r("images/localhost")
    assert (shell.ls("images"), shell.exists("images/localhost")) == ([app, "default"], False)


def test_directory_of_names_is_gone_when_its_last_name_is(shell: TreeShell) -> None:
    shell.unlink("images/localhost/app:1")
    assert not shell.exists("images/localhost")


def test_rm_of_an_image_is_refused(shell: TreeShell, app: str) -> None:
    with pytest.raises(errors.IsADirectory):
        shell.unlink(f"images/{app}")


def test_rmdir_of_a_name_is_refused(shell: TreeShell) -> None:
    with pytest.raises(errors.NotADirectory):
        shell.rmdir("images/default")


@pytest.mark.parametrize(
    "write",
    [
        lambda shell, image: shell.write("images/new", b""),
        lambda shell, image: shell.mknod("images/new"),
        lambda shell, image: shell.link("images/default", "images/new"),
        lambda shell, image: shell.setattr("images", Changes(mode=0o700)),
        lambda shell, image: shell.rename(image, "images/new"),
        lambda shell, image: shell.rename("images/localhost", "images/new"),
        lambda shell, image: shell.rename("images/default", f"{image}/new"),
        lambda shell, image: shell.symlink("x", f"{image}/new"),
        lambda shell, image: shell.mkdir(f"{image}/new"),
        lambda shell, image: shell.write(f"{image}/config.json", b""),
        lambda shell, image: shell.open(f"{image}/layers/0/tar", os.O_RDWR),
        lambda shell, image: shell.setattr(f"{image}/config.json", Changes(size=0)),
        lambda shell, image: shell.unlink(f"{image}/metadata.json"),
        lambda shell, image: shell.rmdir(f"{image}/rootfs"),
    ],
)
def test_every_other_write_is_refused(
    shell: TreeShell, app: str, write: Callable[[TreeShell, str], object]
) -> None:
    before = shell.ls("images")
    with pytest.raises(errors.ReadOnly):
        write(shell, f"images/{app}")
    assert shell.ls("images") == before


def test_forgotten_image_is_let_go(shell: TreeShell, app: str) -> None:
    shell.ls(f"images/{app}/rootfs")
    assert all(made.is_detached for made in shell.driver.made)


def test_opening_for_reading_needs_no_more_than_a_handle(shell: TreeShell, app: str) -> None:
    with shell.walk(f"images/{app}/config.json") as entry:
        fh, handle = run(shell.tree.open(entry.node.ino, os.O_RDONLY, CALLER))
    assert (handle.keep_cache, handle.direct_io) == (True, False)
    run(shell.tree.release(fh))
