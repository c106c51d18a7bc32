"""The files of a store, byte for byte: who changes them makes a new version (fusestore/layout.py)."""

import json
from pathlib import Path

import pytest
from rig.ocisources import OCI, SourceMaker, digest, tar_of
from rig.stores import open_at

from fusestore import containers

TAR = tar_of({"file": b"content"})


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(containers.time, "time", lambda: 1700000000.9)
    maker = SourceMaker()
    layers = [maker.blob(TAR, OCI + "layer.v1.tar")]
    text = maker.add(maker.image([TAR], layers=layers), "x:1").directory(tmp_path / "source")
    with open_at(tmp_path) as store:
        store.import_image(text)
        store.create_container(container_id="c", container_name="web", mount_label="l")
        store.set_container_metadata("c", b'{"mountlabel": "l", "z": "\\u00e9", "a": [1.0, null]}')
    return tmp_path / "store"


def test_files(root: Path) -> None:
    found = sorted(
        str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir() or path.is_symlink()
    )
    assert [name for name in found if not name.startswith(("blobs/", "layers/", "images/"))] == [
        "containers/c/container",
        "fusestore.json",
        "fusestore.lock",
        "index.json",
        "names/web",
        "oci-layout",
    ]


def test_fusestore_json(root: Path) -> None:
    assert (root / "fusestore.json").read_bytes() == b'{"format":"fusestore","version":1,"features":[]}'


def test_oci_layout(root: Path) -> None:
    assert (root / "oci-layout").read_bytes() == b'{"imageLayoutVersion":"1.0.0"}'


def test_container(root: Path) -> None:
    image = next((root / "images").iterdir()).name
    assert (root / "containers/c/container").read_text() == (
        f'{{"name": "web", "image-name": "x:1", "image-id": "{image}", "created-at": 1700000000, '
        '"mountlabel": "l", "z": "é", "a": [1.0, null]}\n'
    )


def test_name(root: Path) -> None:
    assert str((root / "names/web").readlink()) == "../containers/c"


def test_index_json(root: Path) -> None:
    image = next((root / "images").iterdir()).name
    index = (root / "index.json").read_bytes()
    manifest = json.loads(index)["manifests"][0]["digest"]
    size = (root / "blobs/sha256" / manifest[7:]).stat().st_size
    entries = ",".join(
        f'{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{manifest}","size":{size},'
        f'"annotations":{{"io.fusestore.image.id":"{image}","org.opencontainers.image.ref.name":"{name}"}}}}'
        for name in ("x:1", "default")
    )
    assert index.decode() == f'{{"schemaVersion":2,"manifests":[{entries}]}}'


def test_image_record(root: Path) -> None:
    (record,) = root.glob("images/*/image")
    manifest = json.loads((root / "index.json").read_bytes())["manifests"][0]["digest"]
    layer, media_type = digest(TAR).encode(), b"application/vnd.oci.image.layer.v1.tar"
    assert record.read_bytes() == b"".join(
        [
            b"\x86\xa7version\x01",
            b"\xa8manifest\xd9\x47" + manifest.encode(),
            b"\xa7created\xb42024-01-02T03:04:05Z",
            b"\xacarchitecture\xa5amd64",
            b"\xa2os\xa5linux",
            b"\xa6layers\x91\x94\xd9\x47"
            + layer
            + b"\xd9\x47"
            + layer
            + b"\xcd\x28\x00\xd9\x26"
            + media_type,
        ]
    )


def test_layer_files(root: Path) -> None:
    layer = digest(TAR)[7:]
    found = sorted(str(path.relative_to(root)) for path in root.glob("layers/*/*"))
    assert found == [f"layers/{layer}/index", f"layers/{layer}/seek.{layer}"]
