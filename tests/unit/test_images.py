"""Images in the store: import, names, deletion, layers and their derived files."""

import errno
import gzip
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard
from rig.ocisources import OCI, SourceMaker, digest, docker_archive, tar_of
from rig.stores import fail_to_open, open_at

from fusestore import layerfiles, sources
from fusestore.check import check
from fusestore.errors import BadName, BadSource, Busy, Exists, LayerRefused, NotFound, StoreDamaged
from fusestore.store import Image, Store

BASE, APP, OTHER = tar_of({"etc/passwd": b"root"}), tar_of({"app": b"1"}), tar_of({"app": b"2"})


pytestmark = pytest.mark.usefixtures("unsynced")


@pytest.fixture
def store(store: Store) -> Iterator[Store]:
    yield store
    assert os.listdir(os.path.join(store.path, "tmp")) == []


def layout(path: Path, *tars: bytes, name: str | None = "x:1") -> str:
    maker = SourceMaker()
    return maker.add(maker.image(tars), name).directory(path)


def stored(store: Store) -> list[str]:
    """The files that images consist of."""
    found = []
    for top in ("blobs", "layers", "images"):
        for directory, _, files in os.walk(Path(store.path, top)):
            found += [os.path.relpath(os.path.join(directory, name), store.path) for name in files]
    return sorted(name for name in found if not name.endswith("/cache"))


def read(store: Store, image: Image) -> list[bytes]:
    return [layer.reader.read(0, layer.index.tar_size) for layer in store.open_layers(image)]


# Import


def test_what_is_imported(tmp_path: Path, store: Store) -> None:
    image = store.import_image(layout(tmp_path / "s", BASE, APP))
    assert (image.names, image.architecture, image.os) == (("x:1", "default"), "amd64", "linux")
    assert image.created == "2024-01-02T03:04:05Z"
    assert [layer.diff_id for layer in image.layers] == [digest(BASE), digest(APP)]
    assert image.size == sum(len(gzip.compress(tar, mtime=0)) for tar in (BASE, APP))
    assert store.images() == [image]
    assert digest(store.config(image)) == f"sha256:{image.id}"
    assert json.loads(store.manifest(image))["layers"][0]["digest"] == image.layers[0].blob
    assert store.image_config(image)["rootfs"]["type"] == "layers"


@pytest.mark.parametrize(
    "compress",
    [
        lambda tar: tar,
        lambda tar: gzip.compress(tar, mtime=0),
        zstandard.compress,
        lambda tar: zstandard.compress(tar[:-512]),
    ],
    ids=["plain", "gzip", "zstd", "zstd without the last of the padding"],
)
def test_layers_read_as_their_tar(tmp_path: Path, store: Store, compress: Callable[[bytes], bytes]) -> None:
    maker = SourceMaker()
    layers = [maker.blob(compress(tar), OCI + "layer.v1.tar") for tar in (BASE, APP)]
    image = store.import_image(maker.add(maker.image([BASE, APP], layers=layers)).directory(tmp_path / "s"))
    assert read(store, image) == [BASE, APP]
    assert store.open_layers(image)[0].index.lookup(0, b"etc") is not None


def test_docker_save_gets_a_manifest(tmp_path: Path, store: Store) -> None:
    (tmp_path / "a").write_bytes(tar_of(docker_archive([BASE, APP], ["x:1"])))
    image = store.import_image(str(tmp_path / "a"))
    assert [layer.media_type for layer in image.layers] == [OCI + "layer.v1.tar"] * 2
    assert read(store, image) == [BASE, APP]


def test_names_given_replace_the_sources(tmp_path: Path, store: Store) -> None:
    assert store.import_image(layout(tmp_path / "s", BASE), ["a/b", "c"]).names == ("a/b", "c", "default")


def test_only_the_first_image_is_the_default(tmp_path: Path, store: Store) -> None:
    first = store.import_image(layout(tmp_path / "1", BASE, name=None))
    second = store.import_image(layout(tmp_path / "2", APP, name=None))
    assert store.image_names() == {"default": first.id}
    assert second.names == ()


def test_a_name_moves_to_the_image_imported_last(tmp_path: Path, store: Store) -> None:
    first = store.import_image(layout(tmp_path / "1", BASE))
    second = store.import_image(layout(tmp_path / "2", APP))
    assert store.image_names() == {"x:1": second.id, "default": first.id}
    store.untag("default")
    assert store.image(first.id).names == ()


def test_shared_layers_are_stored_once(tmp_path: Path, store: Store) -> None:
    store.import_image(layout(tmp_path / "1", BASE, APP))
    store.import_image(layout(tmp_path / "2", BASE, OTHER), ["y"])
    assert len([name for name in stored(store) if name.endswith("/index")]) == 3
    assert len([name for name in stored(store) if name.startswith("blobs")]) == 3 + 2 * 2


def test_the_same_layer_twice(tmp_path: Path, store: Store) -> None:
    image = store.import_image(layout(tmp_path / "1", BASE, APP, BASE))
    assert [layer.diff_id for layer in image.layers] == [digest(BASE), digest(APP), digest(BASE)]
    assert read(store, image) == [BASE, APP, BASE]


def test_importing_again_changes_nothing(tmp_path: Path, store: Store) -> None:
    image = store.import_image(layout(tmp_path / "1", BASE, APP))
    before = stored(store)
    assert store.import_image(f"oci:{tmp_path}/1") == image
    assert stored(store) == before


def test_another_compression_of_an_image_only_brings_names(tmp_path: Path, store: Store) -> None:
    maker = SourceMaker()
    plain = [maker.blob(tar, OCI + "layer.v1.tar") for tar in (BASE, APP)]
    text = maker.add(maker.image([BASE, APP], layers=plain), "plain").directory(tmp_path / "plain")
    image = store.import_image(layout(tmp_path / "1", BASE, APP))
    before = stored(store)
    again = store.import_image(text)
    assert (again.id, again.names) == (image.id, ("x:1", "default", "plain"))
    assert stored(store) == before


def test_an_uncompressed_layer_from_before_there_were_checksums_gets_them(
    tmp_path: Path, store: Store
) -> None:
    maker = SourceMaker()
    plain = [maker.blob(BASE, OCI + "layer.v1.tar")]
    image = store.import_image(maker.add(maker.image([BASE], layers=plain), "x").directory(tmp_path / "1"))
    (table,) = Path(store.path).glob("layers/*/seek.*")
    made = table.read_bytes()
    table.unlink()
    with open_at(tmp_path) as other:
        assert read(other, image) == [BASE]
    assert table.read_bytes() == made


@pytest.mark.parametrize("damage", ["remove", "change", "truncate"])
def test_importing_again_repairs(tmp_path: Path, store: Store, damage: str) -> None:
    text = layout(tmp_path / "1", BASE, APP)
    image = store.import_image(text)
    for digest_ in (image.layers[0].blob, image.config, image.manifest):
        path = Path(store.blob_path(digest_))
        data = path.read_bytes()
        path.unlink()
        if damage != "remove":
            path.write_bytes(data[:-1] if damage == "truncate" else data[:-1] + b"\0")
    assert check(store)
    assert store.import_image(text) == image
    assert read(store, image) == [BASE, APP]


def test_importing_another_compression_repairs(tmp_path: Path, store: Store) -> None:
    image = store.import_image(layout(tmp_path / "1", BASE, APP))
    os.unlink(store.blob_path(image.layers[0].blob))
    maker = SourceMaker()
    plain = [maker.blob(tar, OCI + "layer.v1.tar") for tar in (BASE, APP)]
    store.import_image(maker.add(maker.image([BASE, APP], layers=plain), "plain").directory(tmp_path / "2"))
    assert store.image("plain").id == store.image("x:1").id == image.id
    assert read(store, store.image("x:1")) == [BASE, APP]
    os.unlink(store.blob_path(image.layers[1].blob))
    os.unlink(store.blob_path(image.manifest))


def refused(tmp_path: Path, store: Store, text: str, error: type[Exception], message: str) -> None:
    store.import_image(layout(tmp_path / "good", BASE))
    before, names = stored(store), store.image_names()
    with pytest.raises(error, match=message):
        store.import_image(text, ["x:1", "y"])
    assert (stored(store), store.image_names()) == (before, names)


def test_a_blob_of_another_digest(tmp_path: Path, store: Store) -> None:
    maker = SourceMaker()
    image = maker.image([BASE, APP])
    name = "blobs/sha256/" + digest(gzip.compress(APP, mtime=0))[7:]
    maker.files[name] = maker.files[name][:-1] + b"\1"
    refused(tmp_path, store, maker.add(image).directory(tmp_path / "s"), LayerRefused, "digest|gzip")


def test_a_layer_of_another_diff_id(tmp_path: Path, store: Store) -> None:
    maker = SourceMaker()
    rootfs = {"rootfs": {"type": "layers", "diff_ids": [digest(BASE), digest(OTHER)]}}
    text = maker.add(maker.image([BASE, APP], rootfs)).directory(tmp_path / "s")
    refused(tmp_path, store, text, LayerRefused, "diff_id")


def test_a_blob_in_the_store_is_not_believed_to_have_another_diff_id(tmp_path: Path, store: Store) -> None:
    store.import_image(layout(tmp_path / "1", APP))
    store.import_image(layout(tmp_path / "2", OTHER))
    maker = SourceMaker()
    changes = {"author": "x", "rootfs": {"type": "layers", "diff_ids": [digest(OTHER)]}}
    text = maker.add(maker.image([APP], changes)).directory(tmp_path / "s")
    refused(tmp_path, store, text, LayerRefused, "diff_id")


def test_a_truncated_layer(tmp_path: Path, store: Store) -> None:
    maker = SourceMaker()
    data = gzip.compress(APP, mtime=0)[:-9]
    layers = [maker.blob(data, OCI + "layer.v1.tar+gzip")]
    text = maker.add(maker.image([APP], layers=layers)).directory(tmp_path / "s")
    refused(tmp_path, store, text, LayerRefused, "truncated")


def test_no_tar(tmp_path: Path, store: Store) -> None:
    refused(tmp_path, store, layout(tmp_path / "s", BASE, b"x" * 2000), LayerRefused, "tar")


def test_a_hard_link_to_nothing(tmp_path: Path, store: Store) -> None:
    link = tar_of({}, {"b": "missing"}, hard=True)
    refused(tmp_path, store, layout(tmp_path / "s", BASE, link), LayerRefused, "missing")


def test_a_hard_link_to_a_lower_layer(tmp_path: Path, store: Store) -> None:
    link = tar_of({}, {"b": "etc/passwd"}, hard=True)
    store.import_image(layout(tmp_path / "s", BASE, link))


def test_a_missing_source(tmp_path: Path, store: Store) -> None:
    refused(tmp_path, store, "oci:/none", BadSource, "there is no /none")


def test_a_bad_name(tmp_path: Path, store: Store) -> None:
    with pytest.raises(BadName):
        store.import_image(layout(tmp_path / "s", BASE), ["a b"])
    assert store.images() == []


def test_a_name_below_another(tmp_path: Path, store: Store) -> None:
    store.import_image(layout(tmp_path / "s", BASE), ["a/b"])
    for name in ("a", "a/b/c"):
        with pytest.raises(Exists, match="beside one called"):
            store.import_image(f"oci:{tmp_path}/s", [name])


def test_progress_ends_at_the_total(tmp_path: Path, store: Store) -> None:
    seen: list[tuple[int, int]] = []
    image = store.import_image(layout(tmp_path / "s", BASE, APP), progress=lambda *now: seen.append(now))
    assert seen[-1] == (image.size, image.size)
    assert seen == sorted(seen)


def test_interrupted_by_the_user(tmp_path: Path, store: Store) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.import_image(layout(tmp_path / "s", BASE, APP), progress=interrupt)
    assert stored(store) == []


def test_imports_and_deletions_from_many_threads(tmp_path: Path, store: Store) -> None:
    texts = [layout(tmp_path / str(number), BASE, tar_of({"n": b"%d" % number})) for number in range(3)]
    failures = []

    def work(text: str, name: str) -> None:
        try:
            for _ in range(4):
                image = store.import_image(text, [name])
                try:
                    store.delete_image(image.id)
                except NotFound:
                    continue
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(texts[n % 3], f"n{n}")) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(isinstance(error, Busy) for error in failures), failures


# Names


@pytest.fixture
def pair(tmp_path: Path, store: Store) -> tuple[Image, Image]:
    first = store.import_image(layout(tmp_path / "1", BASE), ["one"])
    second = store.import_image(layout(tmp_path / "2", APP), ["two"])
    return store.image(first.id), second


def test_found_by_name_id_or_its_beginning(store: Store, pair: tuple[Image, Image]) -> None:
    for ref in ("two", pair[1].id, pair[1].id[:12]):
        assert store.image(ref) == pair[1]


@pytest.mark.parametrize("ref", ["none", "", "0" * 12, "0" * 64, "f"])
def test_not_found(store: Store, pair: tuple[Image, Image], ref: str) -> None:
    with pytest.raises(NotFound, match="`fusestore images` lists them"):
        store.image(ref)
    with pytest.raises(NotFound):
        store.image(pair[0].id[:11])


def test_tag(store: Store, pair: tuple[Image, Image]) -> None:
    store.tag("one", "localhost/app:1")
    assert store.image(pair[0].id).names == ("one", "default", "localhost/app:1")


def test_a_taken_name(store: Store, pair: tuple[Image, Image]) -> None:
    with pytest.raises(Exists):
        store.tag("one", "two")
    store.tag("one", "one")
    store.tag("one", "two", replace=True)
    assert store.image_names()["two"] == pair[0].id
    assert store.image(pair[1].id).names == ()


@pytest.mark.parametrize("name", ["", "a b", "a//b", "0" * 64, "../x"])
def test_bad_image_names(store: Store, pair: tuple[Image, Image], name: str) -> None:
    with pytest.raises(BadName):
        store.tag("one", name)
    with pytest.raises(BadName):
        store.rename_tag("one", name)


def test_untagged_images_stay(store: Store, pair: tuple[Image, Image]) -> None:
    store.untag("two")
    assert store.images()[1].names == ()
    with pytest.raises(NotFound):
        store.untag("two")


def test_rename_tag(store: Store, pair: tuple[Image, Image]) -> None:
    store.rename_tag("one", "first")
    assert store.image("first") == store.image(pair[0].id)
    with pytest.raises(Exists):
        store.rename_tag("first", "two")
    store.rename_tag("first", "two", replace=True)
    assert store.image_names() == {"two": pair[0].id, "default": pair[0].id}


def test_a_name_can_move_below_itself(store: Store, pair: tuple[Image, Image]) -> None:
    store.rename_tag("one", "one/two")
    with pytest.raises(NotFound):
        store.rename_tag("one", "three")


def test_what_others_wrote_into_index_json_is_kept(store: Store, pair: tuple[Image, Image]) -> None:
    path = Path(store.path, "index.json")
    index = json.loads(path.read_bytes())
    index["annotations"] = {"by": "others"}
    index["manifests"][0]["platform"] = {"os": "linux", "architecture": "amd64"}
    path.write_text(json.dumps(index))
    store.tag("two", "again")
    after = json.loads(path.read_bytes())
    assert after["annotations"] == {"by": "others"}
    assert after["manifests"][0] == index["manifests"][0]


def test_an_image_that_another_tool_put_in(tmp_path: Path, store: Store) -> None:
    text = layout(tmp_path / "s", BASE, APP, name="theirs").removeprefix("oci:")
    shutil.copytree(f"{text}/blobs", f"{store.path}/blobs", dirs_exist_ok=True)
    shutil.copy(f"{text}/index.json", Path(store.path, "index.json"))
    assert store.image_names() == {"theirs": store.images()[0].id}
    assert read(store, store.image("theirs")) == [BASE, APP]
    store.delete_image("theirs")
    assert stored(store) == []


def test_names_below_names_are_not_shown(store: Store, pair: tuple[Image, Image]) -> None:
    path = Path(store.path, "index.json")
    path.write_bytes(path.read_bytes().replace(b'"two"', b'"one/two"'))
    assert store.image_names() == {"one": pair[0].id, "default": pair[0].id}


def test_names_are_read_again_only_when_they_change(
    store: Store, pair: tuple[Image, Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.image_names()

    def no_reading(*_: object) -> None:
        raise AssertionError("index.json was read")

    with monkeypatch.context() as patch:
        patch.setattr("fusestore.images.read_file", no_reading)
        store.image_names()


# Deletion


def test_what_only_it_used_goes(tmp_path: Path, store: Store) -> None:
    store.import_image(layout(tmp_path / "1", BASE, APP), ["one"])
    alone = stored(store)
    store.import_image(layout(tmp_path / "2", BASE, OTHER), ["two"])
    store.delete_image("two")
    assert stored(store) == alone
    store.delete_image("one")
    assert (stored(store), store.images()) == ([], [])


def test_not_while_a_container_uses_it(store: Store, pair: tuple[Image, Image]) -> None:
    store.create_container("one", container_id="c")
    with pytest.raises(Busy, match="used by container c"):
        store.delete_image("one")
    store.delete_container("c")
    store.delete_image("one")
    with pytest.raises(NotFound):
        store.delete_image("one")


def test_an_open_layer_can_be_read_after_its_image_is_gone(tmp_path: Path, store: Store) -> None:
    image = store.import_image(layout(tmp_path / "1", BASE))
    (layer,) = store.open_layers(image)
    store.delete_image(image.id)
    store.empty_trash()
    assert layer.reader.read(0, len(BASE)) == BASE


def test_another_images_blob_of_the_same_layer_stays(tmp_path: Path, store: Store) -> None:
    store.import_image(layout(tmp_path / "1", BASE, APP), ["one"])
    maker = SourceMaker()
    plain = [maker.blob(tar, OCI + "layer.v1.tar") for tar in (BASE, OTHER)]
    second = maker.image([BASE, OTHER], layers=plain)
    image = store.import_image(maker.add(second).directory(tmp_path / "2"), ["two"])
    store.delete_image("one")
    assert read(store, image) == [BASE, OTHER]


# Layers and what is derived from them


def test_layers_are_shared(tmp_path: Path, store: Store) -> None:
    first = store.import_image(layout(tmp_path / "1", BASE, APP), ["one"])
    second = store.import_image(layout(tmp_path / "2", BASE, OTHER), ["two"])
    assert store.open_layers(first)[0] is store.open_layers(second)[0]


@pytest.mark.parametrize("damage", [b"", b"x" * 100, None], ids=["empty", "garbage", "missing"])
@pytest.mark.parametrize("which", ["index", "seek."])
def test_derived_files_are_made_again(tmp_path: Path, store: Store, which: str, damage: bytes | None) -> None:
    image = store.import_image(layout(tmp_path / "1", BASE))
    name = next(name for name in stored(store) if f"/{which}" in name)
    path = Path(store.path, name)
    before = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage)
    assert read(store, image) == [BASE]
    assert path.read_bytes() == before


def test_all_derived_files_can_be_removed(tmp_path: Path, store: Store) -> None:
    image = store.import_image(layout(tmp_path / "1", BASE, APP))
    for top in ("layers", "images"):
        shutil.rmtree(Path(store.path, top))
        os.mkdir(Path(store.path, top))
    with open_at(tmp_path) as other:
        assert other.images() == [image]
        assert read(other, image) == [BASE, APP]


@pytest.mark.parametrize("record", [b"", b"\xc1", b"\x80", b"\x93\1\2\3", b"x" * 100])
def test_a_damaged_record_is_made_again(tmp_path: Path, record: bytes) -> None:
    with open_at(tmp_path) as store:
        image = store.import_image(layout(tmp_path / "1", BASE))
    Path(store.path, "images", image.id, "image").write_bytes(record)
    with open_at(tmp_path) as store:
        assert store.images() == [image]


def test_a_missing_blob_is_the_stores_fault(tmp_path: Path) -> None:
    with open_at(tmp_path) as store:
        image = store.import_image(layout(tmp_path / "1", BASE))
    for digest_ in (image.layers[0].blob, image.config, image.manifest):
        os.unlink(store.blob_path(digest_))
    with open_at(tmp_path) as store:
        for operation in (store.open_layers, store.config, store.manifest, store.image_config):
            with pytest.raises(StoreDamaged, match="import the image again"):
                operation(image)


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    text = layout(tmp_path / "1", BASE, APP)
    before = len(os.listdir("/proc/self/fd"))
    with open_at(tmp_path) as store:
        read(store, store.import_image(text))
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"manifests":5}'])
def test_a_damaged_index_json(tmp_path: Path, content: bytes) -> None:
    with open_at(tmp_path) as store:
        Path(store.path, "index.json").write_bytes(content)
        with pytest.raises(StoreDamaged, match=r"index\.json is damaged"):
            store.images()


@pytest.mark.parametrize("file", ["index.json", "blob", "layers/*/index", "layers/*/seek.*", "manifest"])
def test_a_file_that_cannot_be_opened_now_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """Nothing is made again either: there may be no room, or the disk may be failing."""
    with open_at(tmp_path) as store:
        image = store.import_image(layout(tmp_path / "1", BASE))
    with open_at(tmp_path) as store:
        if file == "manifest":
            shutil.rmtree(Path(store.path, "images", image.id))
        paths = {"blob": store.blob_path(image.layers[0].blob), "manifest": store.blob_path(image.manifest)}
        (path,) = [paths[file]] if file in paths else map(str, Path(store.path).glob(file))
        with monkeypatch.context() as patch:
            fail_to_open(patch, path, errno.EMFILE)
            patch.setattr(layerfiles, "derive", lambda *_, **__: pytest.fail("made again"))
            with pytest.raises(OSError, match="Too many open files"):
                read(store, store.image(image.id))
        read(store, store.image(image.id))


def test_a_layer_that_cannot_be_opened_leaks_nothing(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = layout(tmp_path / "1", BASE)
    before = len(os.listdir("/proc/self/fd"))

    def exhausted() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Too many open files"):
        patch.setattr(sources._LayoutBlobs, "layer", lambda blobs, descriptor: exhausted)
        store.import_image(text)
    assert len(os.listdir("/proc/self/fd")) == before


def test_importing_again_heals_the_layers_that_are_open(tmp_path: Path, store: Store) -> None:
    text = layout(tmp_path / "1", BASE)
    image = store.import_image(text)
    layers = store.open_layers(image)
    Path(store.blob_path(image.layers[0].blob)).write_bytes(b"damaged")
    with pytest.raises(StoreDamaged):
        layers[0].reader.read(0, 10)
    store.import_image(text)
    assert layers[0].reader.read(0, len(BASE)) == BASE


def test_metadata_of_an_image(tmp_path: Path, store: Store) -> None:
    image = store.import_image(layout(tmp_path / "1", BASE))
    shown = json.loads(store.image_metadata(image))
    assert (shown["id"], shown["names"], shown["size"]) == (image.id, ["x:1", "default"], image.size)
    assert shown["layers"][0]["diff-id"] == digest(BASE)


def test_what_cannot_be_read_just_now_is_not_called_damaged(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = store.import_image(layout(tmp_path / "s", BASE))

    def refuse(*_: object) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch, open_at(Path(store.path).parent) as other:
        patch.setattr("fusestore.images.read_file", refuse)
        for operation in (other.images, lambda: store.config(image)):
            with pytest.raises(OSError) as caught:
                operation()
            assert caught.value.errno == errno.EMFILE
        patch.undo()
        assert other.images() == [image]


@pytest.mark.parametrize("what", ["manifest", "config"])
def test_a_bad_sector_is_no_damage(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    image = store.import_image(layout(tmp_path / "s", BASE))
    fail_to_open(monkeypatch, store.blob_path(getattr(image, what)), errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        getattr(store, what)(image)
    monkeypatch.undo()


def test_a_bad_sector_hides_no_other_image(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = store.import_image(layout(tmp_path / "1", BASE))
    other = store.import_image(layout(tmp_path / "2", OTHER))
    shutil.rmtree(Path(store.path, "images", image.id))
    with monkeypatch.context() as patch, open_at(Path(store.path).parent) as reopened:
        fail_to_open(patch, store.blob_path(image.manifest), errno.EIO)
        assert [found.id for found in reopened.images()] == [other.id]
        assert any(
            "cannot be read (Input/output error)" in entry.problem for entry in reopened.image_entries()
        )


@pytest.mark.parametrize("names", [["a", "a/b"], ["a/b", "a"]])
def test_names_that_cannot_stand_beside_each_other_are_refused_before_the_import(
    tmp_path: Path, store: Store, names: list[str]
) -> None:
    with pytest.raises(Exists, match="beside"):
        store.import_image(str(tmp_path / "none"), names)


@pytest.mark.parametrize("name", ["taken/below", "x"])
def test_a_sources_own_name_that_cannot_be_given_is_refused(tmp_path: Path, store: Store, name: str) -> None:
    store.import_image(layout(tmp_path / "first", BASE), ["taken", "x/y"])
    before = store.image_names()
    with pytest.raises(Exists, match="beside"):
        store.import_image(layout(tmp_path / "s", APP, name=name))
    assert (store.image_names(), len(store.images())) == (before, 1)


def test_a_first_image_is_not_called_default_beside_a_name_below_it(tmp_path: Path, store: Store) -> None:
    store.import_image(layout(tmp_path / "s", BASE), ["default/x"])
    assert list(store.image_names()) == ["default/x"]
