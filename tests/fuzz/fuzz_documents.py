"""Fuzz target: what is read as JSON or msgpack, from images, from the store, from users and at the bell.

Invariant: whatever the bytes, a value or BadInput, of the store's own files StoreDamaged, of what makes
it a store StoreUnusable, at the bell ValueError. Every other exception, a crash or a hang is a bug.

    python tests/fuzz/fuzz_documents.py [SECONDS | CORPUS.zip]

With atheris installed it is driven by coverage (then the arguments are libFuzzer's), else by random mutation.
"""

import io
import json
import os
import random
import sys
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import msgpack
from rig.fuzzing import drive, own_directory, spliced_seed
from rig.ocisources import SourceMaker, docker_archive, tar_of

from fusestore import imageconfig, metadata, oci, runtimespec
from fusestore.containers import Containers
from fusestore.durable import Workspace, read_intent
from fusestore.errors import BadInput, FusestoreError, StoreDamaged, StoreUnusable
from fusestore.images import Images
from fusestore.layout import Layout, run_layout
from fusestore.mounts import Changed
from fusestore.sources import open_source
from fusestore.storedir import require_store

PLACE = own_directory()
LAYOUT = Layout(str(PLACE / "store"))
for _directory in (LAYOUT.root, *LAYOUT.directories):
    os.mkdir(_directory)
ID = "0" * 64
CONTAINER = "c"


def as_manifest(data: bytes) -> None:
    oci.parse_manifest(data, "manifest")


def as_config(data: bytes) -> None:
    oci.parse_config(data, "config")


INSTRUCTIONS = imageconfig.parse(
    [
        *('CMD ["a"]', "ENTRYPOINT b", "ENV A=1", "EXPOSE 1", "LABEL l=1", "ONBUILD RUN x", "USER u"),
        *("VOLUME /v", "WORKDIR w"),
    ]
)


def as_run_config(data: bytes) -> None:
    """What a container of an image is run by, and what a commit makes of it."""
    oci.parse_config(data, "config")
    config = oci.parse_object(data, "config")
    settings = imageconfig.settings_of(config)
    imageconfig.extend(config, None, {"created": "2024-01-01T00:00:00Z"})
    INSTRUCTIONS(config)
    imageconfig.settings_of(config)
    oci.encode(config)
    user = runtimespec.find_user(settings.get("User", ""), lambda path: data.decode("utf-8", "replace"))
    assert 0 <= min(user.uid, user.gid) <= max(user.uid, user.gid, *user.groups) < 1 << 32
    json.dumps(runtimespec.make_spec("/", "h", settings, ["x"], user))


def as_users(data: bytes) -> None:
    """passwd or group, and who is looked for."""
    text = data.decode("utf-8", "replace")
    who, _, files = text.partition("\n")
    runtimespec.find_user(who, lambda path: files)
    imageconfig.parse([f"CMD {who}", f"ENV {who}", f"VOLUME {who}", f"WORKDIR {who}"])({})


def as_index(data: bytes) -> None:
    oci.parse_descriptors(oci.parse_object(data, "index"), "manifests", "index")


def as_document(data: bytes) -> None:
    is_prefix = metadata.is_prefix(data)
    document = metadata.parse_document(data)
    assert is_prefix and all(metadata.is_prefix(data[:cut]) for cut in {1, len(data) // 2, *data[:4]})
    stored = {"image-name": "", "image-id": "", "created-at": 1, "mine": [1]}
    change = metadata.merge(stored, document, "c")
    assert json.loads(metadata.render(change.document, "c", mounted=False))["id"] == "c"


def as_bell(data: bytes) -> None:
    Changed.decode(data)


WORKSPACE = Workspace(tmp=LAYOUT.tmp, trash=LAYOUT.trash, lock=LAYOUT.lock)


def _images() -> Images:
    return Images(LAYOUT, WORKSPACE)


def _containers() -> Containers:
    return Containers(LAYOUT, run_layout(str(PLACE / "run"), b"store"), WORKSPACE)


def as_store_index(data: bytes) -> None:
    """Reads it, and makes of it one that is whole."""
    Path(LAYOUT.index).write_bytes(data)
    try:
        catalog = _images().catalog()
        assert set(catalog.names.values()) <= set(catalog.images)
    except StoreDamaged:
        _images().make_index_locked({"name": ID})
        _images().catalog()


def as_record(data: bytes) -> None:
    os.makedirs(LAYOUT.image(ID), exist_ok=True)
    Path(LAYOUT.image_record(ID)).write_bytes(data)
    entry = {"mediaType": oci.MANIFEST_TYPE, "digest": f"sha256:{ID}", "size": 1, "annotations": {}}
    entry["annotations"] = {"io.fusestore.image.id": ID}
    Path(LAYOUT.index).write_bytes(oci.encode({"schemaVersion": 2, "manifests": [entry]}))
    _images().catalog()


def as_stored_document(data: bytes) -> None:
    """A container's, which lists, shows and deletes all the same."""
    os.makedirs(LAYOUT.container(CONTAINER), exist_ok=True)
    Path(LAYOUT.document(CONTAINER)).write_bytes(data)
    containers = _containers()
    containers.names()
    metadata.parse_document(containers.document(CONTAINER))


def as_intent(data: bytes) -> None:
    """What an interrupted change left: it is acted upon, or nobody meant it."""
    path = PLACE / "intent"
    path.write_bytes(data)
    intent = read_intent(str(path))
    if intent is not None:
        assert ".." not in {*intent.names, *(name for names in intent.names.values() for name in names)}
        _containers().repair_names(intent.names)
        Path(LAYOUT.index).write_bytes(oci.encode({"schemaVersion": 2, "manifests": []}))
        assert all("/../" not in path for path in _images().unreferenced(intent.loose))


def as_format(data: bytes) -> None:
    """Of a store that is opened."""
    layout = Layout(str(PLACE / "other"))
    os.makedirs(layout.tmp, exist_ok=True)
    Path(layout.format_file).write_bytes(data)
    require_store(layout, create=False)


def as_archive(data: bytes) -> None:
    path = PLACE / "archive.tar"
    path.write_bytes(data)
    for kind in ("oci-archive", "docker-archive"):
        try:
            with open_source(f"{kind}:{path}") as source:
                for layer in source.layers:
                    with closing(layer.open()) as reader:
                        while reader.read(1 << 16):
                            pass
        except FusestoreError as error:
            assert isinstance(error, BadInput)


READERS: list[tuple[Callable[[bytes], None], type[Exception]]] = [
    (as_manifest, BadInput),
    (as_config, BadInput),
    (as_index, BadInput),
    (as_document, FusestoreError),
    (as_bell, ValueError),
    (as_store_index, StoreDamaged),
    (as_record, StoreDamaged),
    (as_archive, BadInput),
    (as_stored_document, StoreDamaged),
    (as_intent, StoreDamaged),
    (as_format, StoreUnusable),
    (as_run_config, BadInput),
    (as_users, BadInput),
]


def check(data: bytes) -> None:
    if not data:
        return
    reader, declared = READERS[data[0] % len(READERS)]
    try:
        reader(data[1:])
    except declared:
        pass


RUN_CONFIG = json.dumps(
    {
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": []},
        "history": [],
        "config": {
            "User": "app:audio",
            "Env": ["A=1"],
            "Cmd": ["x"],
            "ExposedPorts": {"1/tcp": {}},
            "Labels": {"a": "b"},
            "WorkingDir": "/srv",
            "Volumes": {"/v": {}},
            "OnBuild": ["RUN x"],
        },
    }
).encode()


def _seeds() -> list[list[bytes]]:
    maker = SourceMaker()
    tars = [tar_of({"etc/passwd": b"root"}), tar_of({"app": b"1"}, {"link": "app"})]
    maker.add(maker.image(tars), "x:1").add(maker.index(maker.image(tars[:1])), "many")
    files = {name: data for name, data in maker.files.items() if data.startswith(b"{")}
    documents = list(files.values())
    index = oci.encode({"schemaVersion": 2, "manifests": maker.manifests})
    user = [b'{"a":1,"name":"n","mounted":true,"mountlabel":"x","image-name":"i","image-id":"0"}']
    digest = f"sha256:{ID}"
    record = {"version": 1, "manifest": digest, "created": "", "architecture": "amd64", "os": "linux"}
    records = [msgpack.packb({**record, "layers": [[digest, digest, 1, "type"]]})]
    directory = Path(maker.directory(PLACE / "source").removeprefix("oci:").split(":")[0])
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.add(directory, ".")
    docker = tar_of(docker_archive(tars, ["x:1"]))
    return [
        documents, documents, [*documents, index], user, [Changed("images", ID).encode()], [index], records,
        [archive.getvalue(), docker],
        [b'{"name": "n", "image-name": "", "image-id": "", "created-at": 1, "mine": [1.5, "\\u00e9"]}'],
        [b'{"names": {"n": ["c", "d"]}, "loose": {"blobs": ["%b"], "layers": ["%b"], "images": ["%b"]}}'
         % (digest.encode(), digest.encode(), ID.encode())],
        [b'{"format":"fusestore","version":%d,"features":[]}' % version for version in (1, 2)],
        [RUN_CONFIG],
        [b"app:audio\napp:x:1000:100:App:/srv:/bin/false\naudio:x:29:app,other\n"],
    ]  # fmt: skip


SEEDS = _seeds()
TOKENS = (
    *(b"{", b"}", b"[", b"]", b'"', b",", b":", b"null", b"true", b"-1", b"1e999", b"NaN"),
    *(b"99999999999999999999", b"\\ud800", b"\\u0000", b"\xff", b"[" * 2000, b'{"a":' * 2000),
    *(b"sha256:", b"..", b"/", b"mediaType", b"digest"),
)


def mutated(source: random.Random) -> bytes:
    return spliced_seed(source, SEEDS, TOKENS)


if __name__ == "__main__":
    drive(check, mutated)
