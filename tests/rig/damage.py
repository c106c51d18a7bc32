"""Ways to damage a store on disk, what `check` says of each, and what a repair leaves of it. Blocking."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "AGAIN",
    "DAMAGE",
    "PLAIN_DAMAGE",
    "REMADE",
    "Damage",
    "change_middle",
    "layer_blobs",
    "replace_text",
]

REMADE = "remove it, it is made again"
AGAIN = "import the image again"
NOTHING = ""


@dataclass(frozen=True, slots=True)
class Damage:
    """`do(store)` to a store with an image x:1 of two layers, and containers: "c", which is called "db"."""

    do: Callable[[Path], object]
    problem: str
    remedy: str
    """Both are in a line of `check`."""
    left: str = NOTHING
    """Is in each line that is still there after a repair; there are none where it is ""."""


def _blob(store: Path, digest: str) -> Path:
    return store / "blobs/sha256" / digest.removeprefix("sha256:")


def _manifest(store: Path) -> Path:
    return _blob(store, json.loads((store / "index.json").read_bytes())["manifests"][0]["digest"])


def _read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_bytes())
    return document


def _config(store: Path) -> Path:
    return _blob(store, _read(_manifest(store))["config"]["digest"])


def layer_blobs(store: Path) -> list[Path]:
    """Of the first image, bottom first."""
    return [_blob(store, layer["digest"]) for layer in _read(_manifest(store))["layers"]]


def at(store: Path, pattern: str) -> Path:
    """The file of the store that fits."""
    (path,) = store.glob(pattern)
    return path


def change_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    _replace(path, bytes(data))


def _replace(path: Path, data: bytes) -> None:
    """Readers that have the old one open keep it."""
    path.unlink()
    path.write_bytes(data)


def replace_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def _of_layers(store: Path, pattern: str, do: Callable[[Path], object]) -> None:
    """To the derived files of the first image's layers."""
    for diff_id in _read(_config(store))["rootfs"]["diff_ids"]:
        _each(store, f"layers/{diff_id.removeprefix('sha256:')}/{pattern}", do)


def _swap_layers(store: Path) -> None:
    first, second = layer_blobs(store)[:2]
    data = first.read_bytes()
    _replace(first, second.read_bytes())
    _replace(second, data)


def _swap_indexes(store: Path) -> None:
    first, second = (
        store / "layers" / diff_id.removeprefix("sha256:") / "index"
        for diff_id in _read(_config(store))["rootfs"]["diff_ids"]
    )
    shutil.copy(first, second)


def _cut(path: Path) -> None:
    _replace(path, path.read_bytes()[:50])


def _each(store: Path, pattern: str, do: Callable[[Path], object]) -> None:
    paths = list(store.glob(pattern))
    assert paths
    for path in paths:
        do(path)


def _add_entry(store: Path, entry: str) -> None:
    replace_text(store / "index.json", '"manifests":[', f'"manifests":[{entry},')


_LOST_ENTRY = '{"mediaType":"x","digest":"sha256:' + "0" * 64 + '","size":1}'
_IMAGE_LOST = "is missing"

DAMAGE: dict[str, Damage] = {
    "layer changed": Damage(
        lambda store: change_middle(layer_blobs(store)[0]), "blobs/sha256/", AGAIN, "a layer of image"
    ),
    "layer missing": Damage(
        lambda store: layer_blobs(store)[0].unlink(), "a layer of image", AGAIN, "a layer of image"
    ),
    "layer truncated": Damage(
        lambda store: _cut(layer_blobs(store)[0]), "50 bytes, not", AGAIN, "a layer of image"
    ),
    "layers swapped": Damage(_swap_layers, "is damaged (the blob", AGAIN, "a layer of image"),
    "config changed": Damage(
        lambda store: change_middle(_config(store)), "another digest", AGAIN, "the config of image"
    ),
    "config missing": Damage(
        lambda store: _config(store).unlink(), "the config of image", AGAIN, "the config of image"
    ),
    "manifest changed": Damage(
        lambda store: change_middle(_manifest(store)), "another digest", AGAIN, "the manifest of image"
    ),
    "manifest missing": Damage(
        lambda store: _manifest(store).unlink(), "the manifest of image", AGAIN, "the manifest of image"
    ),
    "index of another layer": Damage(_swap_indexes, "is of another layer", REMADE),
    "index changed": Damage(
        lambda store: _of_layers(store, "index", change_middle), "index: is damaged", REMADE
    ),
    "index truncated": Damage(lambda store: _of_layers(store, "index", _cut), "index: is damaged", REMADE),
    "seek table changed": Damage(
        lambda store: _of_layers(store, "seek.*", change_middle), "is damaged", REMADE
    ),
    "all derived files changed": Damage(
        lambda store: _of_layers(store, "[is]*", change_middle), "is damaged", REMADE
    ),
    "record of an image changed": Damage(
        lambda store: _each(store, "images/*/image", lambda path: _replace(path, _other_record(path))),
        "contradicts the manifest",
        REMADE,
    ),
    "unused blob": Damage(
        lambda store: (store / "blobs/sha256" / ("0" * 64)).touch(), "no image needs it", "remove it"
    ),
    "no blob at all": Damage(
        lambda store: (store / "blobs/sha256/x").touch(), "no image needs it", "remove it"
    ),
    "unused layer": Damage(
        lambda store: (store / "layers" / ("0" * 64)).mkdir(), "no image needs it", "remove it"
    ),
    "unused image": Damage(
        lambda store: (store / "images" / ("0" * 64)).mkdir(), "no image needs it", "remove it"
    ),
    "index.json cut short": Damage(
        lambda store: os.truncate(store / "index.json", (store / "index.json").stat().st_size - 5),
        "index.json: is damaged",
        "check --repair",
    ),
    "index.json empty": Damage(
        lambda store: os.truncate(store / "index.json", 0), "index.json: is damaged", "check --repair"
    ),
    "index.json missing": Damage(
        lambda store: (store / "index.json").unlink(), "index.json: is damaged", "check --repair"
    ),
    "bad entry in index.json": Damage(lambda store: _add_entry(store, "5"), "no JSON object", "entry"),
    "entry without blobs": Damage(
        lambda store: _add_entry(store, _LOST_ENTRY), "cannot be read", "remove its entry", "index.json"
    ),
    "oci-layout missing": Damage(
        lambda store: (store / "oci-layout").unlink(), "missing or damaged", "imageLayoutVersion"
    ),
    "oci-layout damaged": Damage(
        lambda store: (store / "oci-layout").write_bytes(b"{"), "missing or damaged", "imageLayoutVersion"
    ),
    "document damaged": Damage(
        lambda store: (store / "containers/c/container").write_bytes(b"{"), "not JSON", "delete"
    ),
    "document missing": Damage(
        lambda store: (store / "containers/c/container").unlink(), "file is missing", "delete"
    ),
    "document without an image's id": Damage(
        lambda store: (store / "containers/c/container").write_bytes(b"{}"), "keys are missing", "delete"
    ),
    "workdir missing": Damage(
        lambda store: (store / "containers/c/workdir").rmdir(), "directory is missing", "make it"
    ),
    "file in place of work": Damage(
        lambda store: ((store / "containers/c/work").rmdir(), (store / "containers/c/work").touch()),
        "directory is missing",
        "make it",
    ),
    "image of a container missing": Damage(
        lambda store: replace_text(store / "containers/c/container", _config(store).name, "0" * 64),
        "its image x:1 is missing",
        "import the image again, or delete",
        "its image x:1 is missing",
    ),
    "name missing": Damage(
        lambda store: (store / "names/db").unlink(), "name of container c is missing", "rename"
    ),
    "dangling name": Damage(
        lambda store: os.symlink("../containers/gone", store / "names/old"),
        "gone is not called so",
        "remove it",
    ),
    "wrong name": Damage(
        lambda store: os.symlink("../containers/c", store / "names/old"), "c is not called so", "remove it"
    ),
    "name of another": Damage(
        lambda store: (
            (store / "names/db").unlink(),
            os.symlink("../containers/other", store / "names/db"),
        ),
        "other is not called so",
        "remove it",
    ),
    "file among the names": Damage(
        lambda store: (store / "names/x").touch(), "is not called so", "remove it"
    ),
    "file among the containers": Damage(
        lambda store: (store / "containers/x").touch(), "nothing of a store's", "move it"
    ),
    "directory that can be no container": Damage(
        lambda store: (store / "containers/.x").mkdir(), "nothing of a store's", "move it"
    ),
    "file in a container": Damage(
        lambda store: (store / "containers/c/x").touch(), "nothing of a store's", "move it"
    ),
    "file in a layer": Damage(
        lambda store: _each(store, "layers/*", lambda path: (path / "x").touch()),
        "nothing of a store's",
        "move it",
    ),
    "file in an image": Damage(
        lambda store: _each(store, "images/*", lambda path: (path / "x").touch()),
        "nothing of a store's",
        "move it",
    ),
    "file in the store": Damage(lambda store: (store / "x").touch(), "nothing of a store's", "move it"),
}


def _other_record(path: Path) -> bytes:
    return path.read_bytes().replace(b"linux", b"xunil")


def _set_record(path: Path, record: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.touch(0o600)
    os.setxattr(path, b"user.fusestore.stat", record)


PLAIN_DAMAGE: dict[str, Damage] = {
    f"record {record!r} of a file": Damage(
        lambda store, record=record: _set_record(store / "containers/c/diff/f", record),  # type: ignore[misc]
        "its xattr user.fusestore.stat is damaged",
        "check --repair",
    )
    for record in (b"", b"1:2:3", b"x:0:0:0", b"100644:-1:0:0", b"40755:0:0:0", b"100644:4294967296:0:0")
}
"""Of a store whose scheme is plain."""
