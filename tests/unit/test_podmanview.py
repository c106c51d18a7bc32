"""What podman's view of a store says: names, layer ids, documents."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig.tinyimages import make_layout
from rig.treeshell import TreeShell

from fusestore import errors
from fusestore.oci import parse_time_ns, time_text
from fusestore.podmanview import layer_ids, podman_names
from fusestore.store import Store

ID = "1" * 64
OTHER = "2" * 64


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", tmp_path / "run", create=True) as store:
        make_layout(tmp_path / "app", "app", [{"a": b"1"}, {"b": b"2"}])
        store.import_image(f"oci:{tmp_path}/app")
        yield store


@pytest.fixture
def shell(store: Store) -> TreeShell:
    return TreeShell(store)


@pytest.mark.parametrize(
    ("name", "spelt"),
    [
        ("app", "localhost/app:latest"),
        ("app:1", "localhost/app:1"),
        ("team/app:1", "localhost/team/app:1"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app:1", "localhost:5000/app:1"),
        ("host:5000/app", "host:5000/app:latest"),
        ("docker.io/library/app:V2", "docker.io/library/app:V2"),
    ],
)
def test_a_name_is_spelt_as_podman_does(name: str, spelt: str) -> None:
    assert podman_names({name: ID}) == {spelt: ID}


@pytest.mark.parametrize("name", ["App", "a@b", "a+b", "a/B:1", "docker.io/App", "_a", "a:b:c"])
def test_what_is_no_name_to_podman_is_left_out(name: str) -> None:
    assert podman_names({name: ID}) == {}


def test_no_name_is_given_twice() -> None:
    assert podman_names({"app": ID, "localhost/app:latest": OTHER}) == {"localhost/app:latest": OTHER}
    assert podman_names({"app:latest": ID, "app": OTHER}) == {"localhost/app:latest": ID}


def test_a_layer_id_is_the_diff_id_and_what_lies_below(store: Store) -> None:
    image = store.image("app")
    low, high = (layer.diff_id.removeprefix("sha256:") for layer in image.layers)
    assert layer_ids(image) == [low, hashlib.sha256(f"{low}+{high}".encode()).hexdigest()]


def test_the_upper_layer_leads_to_the_lower(shell: TreeShell, store: Store) -> None:
    low, high = layer_ids(store.image("app"))
    lower = shell.read(f"views/podman/overlay/{high}/lower").decode()
    assert lower == "l/" + shell.read(f"views/podman/overlay/{low}/link").decode()
    assert shell.readlink(f"views/podman/overlay/{lower}") == f"../{low}/diff"
    assert shell.ls(f"views/podman/overlay/{low}") == ["diff", "link"]
    assert shell.read(f"views/podman/overlay/{low}/diff/inside")


def test_an_image_that_lost_its_manifest_does_not_hide_the_others(
    shell: TreeShell, store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_layout(tmp_path / "other", "other", [{"c": b"3"}])
    other = store.import_image(f"oci:{tmp_path}/other")
    Path(store.blob_path(other.manifest)).unlink()
    shown = json.loads(shell.read("views/podman/overlay-images/images.json"))
    assert [image["id"] for image in shown] == [store.image("app").id]
    assert other.id in caplog.text


def test_a_size_that_is_not_known_yet_is_told_when_it_is(shell: TreeShell, store: Store) -> None:
    """podman lists no image where it is told none, and reads it anew where the lock file changes."""

    def shown() -> tuple[list[int], bytes]:
        layers = json.loads(shell.read("views/podman/overlay-layers/layers.json"))
        return [layer["diff-size"] for layer in layers], shell.read("views/podman/overlay-layers/layers.lock")

    low = store.image("app").layers[0]
    index = Path(store.path, "layers", low.diff_id.removeprefix("sha256:"), "index")
    data = index.read_bytes()
    index.unlink()
    (size, upper_size), lock = shown()
    assert size == low.size
    index.write_bytes(data)
    assert shown()[0] == [store.layer_tar_size(low), upper_size]
    assert shown()[1] != lock


def test_big_data_is_what_the_record_says(shell: TreeShell, store: Store) -> None:
    image = store.image("app")
    (shown,) = json.loads(shell.read("views/podman/overlay-images/images.json"))
    names = shell.ls(f"views/podman/overlay-images/{image.id}")
    data = [shell.read(f"views/podman/overlay-images/{image.id}/{name}") for name in names]
    assert [len(one) for one in data] == list(shown["big-data-sizes"].values())
    assert ["sha256:" + hashlib.sha256(one).hexdigest() for one in data] == list(
        shown["big-data-digests"].values()
    )


@pytest.mark.parametrize("path", ["nothing", "overlay/" + ID, "overlay/l/nothing", "overlay-images/" + ID])
def test_nothing_else_is_there(shell: TreeShell, path: str) -> None:
    with pytest.raises(errors.NotFound):
        shell.read(f"views/podman/{path}")


def test_nothing_can_be_written(shell: TreeShell) -> None:
    with pytest.raises(errors.ReadOnly):
        shell.write("views/podman/overlay-images/images.lock", b"")


@pytest.mark.parametrize(
    ("created", "text"),
    [
        ("2024-02-03T04:05:06.000000007Z", "2024-02-03T04:05:06.000000007Z"),
        ("2024-02-03T04:05:06+01:00", "2024-02-03T03:05:06.000000000Z"),
        ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00.000000000Z"),
        ("0001-01-01T00:00:00+23:00", "1970-01-01T00:00:00.000000000Z"),
        ("2016-12-31T23:59:60.5Z", "2017-01-01T00:00:00.500000000Z"),
        ("2023-02-29T00:00:00Z", "1970-01-01T00:00:00.000000000Z"),
        ("2024-02-03T24:00:00Z", "1970-01-01T00:00:00.000000000Z"),
        ("yesterday", "1970-01-01T00:00:00.000000000Z"),
        ("", "1970-01-01T00:00:00.000000000Z"),
    ],
)
def test_a_time_is_always_one_that_go_reads(created: str, text: str) -> None:
    assert time_text(parse_time_ns(created)) == text
