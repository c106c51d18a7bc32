"""Local tars of layers: made whole, read instead of the blob, counted, given back."""

import os
from pathlib import Path

import pytest
from rig.damage import change_middle
from rig.ocisources import OCI, SourceMaker, tar_of
from rig.stores import open_at

from fusestore.blobs import RunDecoder
from fusestore.check import check
from fusestore.durable import write_sparse
from fusestore.errors import NotFound, StoreDamaged
from fusestore.hydration import Hydration, dehydrate, hydrate, hydration
from fusestore.images import Image
from fusestore.reclaim import reclaim, usage
from fusestore.repair import repair
from fusestore.store import Store

SPARSE = {"zeros": bytes(4 << 20), "text": b"x" * 100_000, "more": bytes(1 << 20)}


@pytest.fixture
def image(store: Store, one: str) -> Image:
    return store.import_image(one)


@pytest.fixture
def tars(store: Store, image: Image) -> list[Path]:
    """Where the local tars of `image` are, or would be."""
    return [
        Path(store.path, "layers", layer.diff_id.removeprefix("sha256:"), "tar") for layer in image.layers
    ]


def _content(store: Store, image: Image) -> list[bytes]:
    return [layer.reader.read(0, layer.reader.size) for layer in store.open_layers(image)]


def _used(store: Store, what: str) -> int:
    (size,) = (part.size for part in usage(store) if part.what == what)
    return size


def test_the_tars_are_the_layers(store: Store, image: Image, tars: list[Path]) -> None:
    content = _content(store, image)
    hydrate(store, image)
    assert [tar.read_bytes() for tar in tars] == content
    assert [store.local_tar(layer) for layer in image.layers] == list(map(str, tars))


@pytest.mark.parametrize("is_open", [True, False], ids=["open already", "opened later"])
def test_what_is_hydrated_is_read_without_decoding(
    store: Store, image: Image, is_open: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    layers = store.open_layers(image) if is_open else []
    content = _content(store, image)
    hydrate(store, image)
    if not is_open:
        store = open_at(tmp_path)
        layers = store.open_layers(image)
    monkeypatch.setattr(RunDecoder, "take", lambda decoder: pytest.fail("decoded"))
    assert [layer.reader.read(0, layer.reader.size) for layer in layers] == content
    assert [layer.reader.read_now(0, 10) for layer in layers] == [each[:10] for each in content]
    store.close()


def test_the_cache_of_what_is_hydrated_is_given_back(store: Store, image: Image) -> None:
    layers = store.open_layers(image)
    _content(store, image)
    assert store.span_use().used > 0
    hydrate(store, image)
    assert (store.span_use().used, _used(store, "cache")) == (0, 0)
    assert len(layers) == 2


def test_what_is_dehydrated_is_decoded_again(store: Store, image: Image, tars: list[Path]) -> None:
    content = _content(store, image)
    layers = store.open_layers(image)
    hydrate(store, image)
    dehydrate(store, image)
    assert not any(tar.exists() for tar in tars)
    assert [layer.reader.read(0, layer.reader.size) for layer in layers] == content


def test_a_local_tar_may_be_removed_at_any_time(store: Store, image: Image, tars: list[Path]) -> None:
    content = _content(store, image)
    hydrate(store, image)
    tars[0].unlink()
    assert _content(store, image) == content
    store.reopen_layers()
    assert _content(store, image) == content


def test_one_that_was_cut_does_not_count(
    store: Store, image: Image, tars: list[Path], tmp_path: Path
) -> None:
    content = _content(store, image)
    hydrate(store, image)
    os.truncate(tars[0], 1000)
    with open_at(tmp_path) as other:
        assert other.local_tar(image.layers[0]) is None
        assert _content(other, image) == content
        hydrate(other, image)
    assert tars[0].read_bytes() == content[0]


def test_one_that_is_cut_while_it_is_open_is_told_of(store: Store, image: Image, tars: list[Path]) -> None:
    hydrate(store, image)
    layers = store.open_layers(image)
    os.truncate(tars[0], 1000)
    with pytest.raises(StoreDamaged, match=f"{tars[0]}: truncated: remove it and mount anew"):
        layers[0].reader.read(0, 2000)
    tars[0].unlink()


def test_one_that_is_damaged_is_told_of(store: Store, image: Image, tars: list[Path]) -> None:
    hydrate(store, image)
    layers = store.open_layers(image)
    data = bytearray(tars[0].read_bytes())
    data[600] ^= 1
    tars[0].write_bytes(data)
    with pytest.raises(StoreDamaged, match=f"{tars[0]}: .* another checksum .*: remove it and mount anew"):
        layers[0].reader.read(0, 10)
    tars[0].unlink()


def test_it_is_said_how_much_is_missing(store: Store, image: Image) -> None:
    sizes = [layer.reader.size for layer in store.open_layers(image)]
    assert hydration(store, image) == Hydration(layers=2, hydrated=0, size=0, missing=sum(sizes))
    store.hydrate_layer(image, image.layers[0], lambda count: None)
    found = hydration(store, image)
    assert (found.hydrated, found.missing) == (1, sizes[1])
    assert 0 < found.size == _used(store, "hydrated")


def test_progress_ends_with_all(store: Store, image: Image) -> None:
    said: list[tuple[int, int]] = []
    missing = hydration(store, image).missing
    hydrate(store, image, lambda done, total: said.append((done, total)))
    assert said[-1] == (missing, missing)
    assert [done for done, _ in said] == sorted(done for done, _ in said)


def test_images_share_the_tars_of_shared_layers(store: Store, image: Image, two: str) -> None:
    other = store.import_image(two)
    hydrate(store, image)
    assert hydration(store, other).hydrated == 1


def test_layers_that_came_uncompressed_are_not_copied(store: Store, tmp_path: Path) -> None:
    maker = SourceMaker()
    tar = tar_of({"a": b"a"})
    manifest = maker.image([tar], layers=[maker.blob(tar, OCI + "layer.v1.tar")])
    image = store.import_image(maker.add(manifest, "plain").directory(tmp_path / "plain"))
    hydrate(store, image)
    assert hydration(store, image) == Hydration(0, 0, 0, 0)
    assert store.local_tar(image.layers[0]) == store.blob_path(image.layers[0].blob)


def test_zeros_take_no_space(store: Store, tmp_path: Path) -> None:
    maker = SourceMaker()
    image = store.import_image(maker.add(maker.image([tar_of(SPARSE)]), "sparse").directory(tmp_path / "s"))
    hydrate(store, image)
    assert hydration(store, image).size < 1 << 20
    assert _content(store, image) == [tar_of(SPARSE)]


@pytest.mark.parametrize("piece", [1000, 65_536, 100_000, 1 << 20])
def test_what_is_written_sparse_is_what_was_given(tmp_path: Path, piece: int) -> None:
    data = b"a" * 70_000 + bytes(200_000) + b"b" + bytes(131_072) + b"c" * 65_536 + bytes(300_000)
    path = tmp_path / "file"
    with open(path, "wb") as file:
        for start in range(0, len(data), piece):
            write_sparse(file.fileno(), data[start : start + piece], start)
        os.ftruncate(file.fileno(), len(data))
    assert path.read_bytes() == data


def test_an_image_that_is_deleted_meanwhile_leaves_nothing(store: Store, image: Image) -> None:
    def delete(done: int, total: int) -> None:
        if store.has_image(image.id):
            store.delete_image(image.id)

    with pytest.raises(NotFound):
        hydrate(store, image, delete)
    assert os.listdir(Path(store.path, "layers")) == os.listdir(Path(store.path, "tmp")) == []


def test_a_damaged_blob_makes_no_tar(store: Store, image: Image, tars: list[Path]) -> None:
    sound = Path(store.blob_path(image.layers[1].blob)).read_bytes()
    change_middle(Path(store.blob_path(image.layers[1].blob)))
    with pytest.raises(StoreDamaged, match="import the image again"):
        hydrate(store, image)
    assert [tar.exists() for tar in tars] == [True, False]
    assert os.listdir(Path(store.path, "tmp")) == []
    Path(store.blob_path(image.layers[1].blob)).write_bytes(sound)


def test_check_finds_a_damaged_tar_and_repair_takes_it_away(
    store: Store, image: Image, tars: list[Path]
) -> None:
    hydrate(store, image)
    change_middle(tars[0])
    (finding,) = check(store)
    assert str(finding) == (
        f"{tars[0]}: the content has another digest: remove it, and run `fusestore hydrate` for its image"
    )
    assert repair(store, lambda line: None) == []
    assert not tars[0].exists()


def test_gc_counts_the_tars_of_what_goes_and_leaves_the_others(
    store: Store, image: Image, tars: list[Path]
) -> None:
    hydrate(store, image)
    size = _used(store, "hydrated")
    assert [item for item in reclaim(store) if item.what == "hydrated"] == []
    for name in store.image_names():
        store.untag(name)
    (reclaimable,) = (part.reclaimable for part in usage(store) if part.what == "hydrated")
    (item,) = (item for item in reclaim(store) if item.what == "hydrated")
    assert reclaimable == item.size == size
    assert not any(tar.exists() for tar in tars)
