"""Images of a few bytes, written as OCI layouts without any tool. Blocking."""

import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rig.ocisources import OCI, tar_of

__all__ = ["CREATED", "Blob", "make_layout", "write_layout"]

CREATED = "2024-02-03T04:05:06.000000007Z"


@dataclass(frozen=True, slots=True)
class Blob:
    """A layer as it goes into a layout."""

    data: bytes
    diff_id: str
    media_type: str = "application/vnd.oci.image.layer.v1.tar+gzip"
    annotations: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, tar: bytes) -> "Blob":
        return cls(gzip.compress(tar, mtime=0), "sha256:" + hashlib.sha256(tar).hexdigest())


def make_layout(path: Path, ref: str, layers: Sequence[Mapping[str, bytes]], **fields: str) -> str:
    """An OCI layout with one image named `ref`, a gzip layer for each of `layers`. Gives the image's id.

    `fields` of the config come instead of, or beside, what it has.
    """
    return write_layout(path, ref, [Blob.of(tar_of(files)) for files in layers], **fields)


def write_layout(path: Path, ref: str, layers: Sequence[Blob], **fields: str) -> str:
    """The same of layers as they are."""
    blobs = path / "blobs/sha256"
    blobs.mkdir(parents=True)

    def blob(data: bytes, media_type: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {
            "mediaType": media_type,
            "digest": f"sha256:{digest}",
            "size": len(data),
        }

    config = {
        "created": CREATED,
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": [ref]},
        "rootfs": {
            "type": "layers",
            "diff_ids": [layer.diff_id for layer in layers],
        },
        **fields,
    }
    config_descriptor = blob(json.dumps(config).encode(), f"{OCI}config.v1+json")
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config_descriptor,
        "layers": [
            blob(layer.data, layer.media_type)
            | ({"annotations": dict(layer.annotations)} if layer.annotations else {})
            for layer in layers
        ],
    }
    descriptor = blob(json.dumps(manifest).encode(), f"{OCI}manifest.v1+json")
    descriptor["annotations"] = {"org.opencontainers.image.ref.name": ref}
    (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [descriptor]}))
    return str(config_descriptor["digest"]).removeprefix("sha256:")
