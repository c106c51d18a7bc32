"""Images of a few bytes, written as OCI layouts without any tool. Blocking."""

import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rig.ocisources import tar_of

__all__ = ["CREATED", "make_layout"]

CREATED = "2024-02-03T04:05:06.000000007Z"


def make_layout(path: Path, ref: str, layers: Sequence[Mapping[str, bytes]], **fields: str) -> str:
    """An OCI layout with one image named `ref`, a gzip layer for each of `layers`. Gives the image's id.

    `fields` of the config come instead of, or beside, what it has.
    """
    blobs = path / "blobs/sha256"
    blobs.mkdir(parents=True)

    def blob(data: bytes, media_type: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {
            "mediaType": f"application/vnd.oci.image.{media_type}",
            "digest": f"sha256:{digest}",
            "size": len(data),
        }

    tars = [tar_of(files) for files in layers]
    config = {
        "created": CREATED,
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": [ref]},
        "rootfs": {
            "type": "layers",
            "diff_ids": ["sha256:" + hashlib.sha256(tar).hexdigest() for tar in tars],
        },
        **fields,
    }
    config_descriptor = blob(json.dumps(config).encode(), "config.v1+json")
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config_descriptor,
        "layers": [blob(gzip.compress(tar, mtime=0), "layer.v1.tar+gzip") for tar in tars],
    }
    descriptor = blob(json.dumps(manifest).encode(), "manifest.v1+json")
    descriptor["annotations"] = {"org.opencontainers.image.ref.name": ref}
    (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [descriptor]}))
    return str(config_descriptor["digest"]).removeprefix("sha256:")
