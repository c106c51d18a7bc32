"""Sources of images, right or wrong, of a few bytes: layouts, archives, manifest lists. Blocking."""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from fusestore.errors import RegistryFailed
from fusestore.sourcefiles import Reader
from fusestore.sources import LayerSource, Source, open_source

__all__ = ["OCI", "SourceMaker", "digest", "docker_archive", "pulled", "tar_of"]

OCI = "application/vnd.oci.image."


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def tar_of(files: Mapping[str, bytes], links: Mapping[str, str] | None = None, hard: bool = False) -> bytes:
    """`links`: name → target, symlinks or hard links."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type = tarfile.LNKTYPE if hard else tarfile.SYMTYPE
            member.linkname = target
            tar.addfile(member)
    return out.getvalue()


@dataclass
class SourceMaker:
    """The files of an OCI layout; what is put in is returned as its descriptor, to be bent at will."""

    files: dict[str, bytes] = field(default_factory=dict)
    manifests: list[dict[str, Any]] = field(default_factory=list)

    def blob(self, data: bytes, media_type: str) -> dict[str, Any]:
        self.files["blobs/sha256/" + digest(data)[7:]] = data
        return {"mediaType": media_type, "digest": digest(data), "size": len(data)}

    def image(
        self, tars: Sequence[bytes] = (), /, changes: Mapping[str, Any] | None = None, **manifest: Any
    ) -> dict[str, Any]:
        """An image of these tars, gzipped; `changes` (to the config) and `manifest` replace what would be
        written."""
        document = {
            "architecture": "amd64",
            "os": "linux",
            "created": "2024-01-02T03:04:05Z",
            "rootfs": {"type": "layers", "diff_ids": [digest(tar) for tar in tars]},
            **(changes or {}),
        }
        blobs = [self.blob(gzip.compress(tar, mtime=0), OCI + "layer.v1.tar+gzip") for tar in tars]
        fields = {
            "schemaVersion": 2,
            "mediaType": OCI + "manifest.v1+json",
            "config": self.blob(json.dumps(document).encode(), OCI + "config.v1+json"),
            "layers": blobs,
            **manifest,
        }
        return self.blob(json.dumps(fields).encode(), fields["mediaType"])

    def index(self, *manifests: Mapping[str, Any], media_type: str = OCI + "index.v1+json") -> dict[str, Any]:
        document = {"schemaVersion": 2, "mediaType": media_type, "manifests": manifests}
        return self.blob(json.dumps(document).encode(), media_type)

    def add(self, descriptor: Mapping[str, Any], name: str | None = None, **fields: Any) -> "SourceMaker":
        """Into index.json."""
        annotations = {} if name is None else {"org.opencontainers.image.ref.name": name}
        self.manifests.append({**descriptor, "annotations": annotations, **fields})
        return self

    def all_files(self) -> dict[str, bytes]:
        index = json.dumps({"schemaVersion": 2, "manifests": self.manifests}).encode()
        return {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}', "index.json": index, **self.files}

    def directory(self, path: Path) -> str:
        """Writes it; the text for import."""
        for name, data in self.all_files().items():
            file = path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        return f"oci:{path}"

    def archive(self, path: Path) -> str:
        path.write_bytes(tar_of(self.all_files()))
        return f"oci-archive:{path}"


def docker_archive(
    layers: Sequence[bytes], tags: Sequence[str] | None, links: Mapping[str, str] | None = None
) -> dict[str, bytes]:
    """The files `docker save` writes; for a layer that is in `links` only the name."""
    document = {
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [digest(tar) for tar in layers]},
    }
    config = json.dumps(document).encode()
    names = [f"{number}/layer.tar" for number in range(len(layers))]
    config_name = digest(config)[7:] + ".json"
    manifest = [{"Config": config_name, "RepoTags": tags, "Layers": names}]
    files = {"manifest.json": json.dumps(manifest).encode(), config_name: config}
    files.update((name, tar) for name, tar in zip(names, layers, strict=True) if name not in (links or {}))
    return files


class _Rest:
    """A layer from `offset` on, of a registry that is gone after byte `end` of it."""

    def __init__(self, layer: LayerSource, end: int, offsets: list[int], offset: int) -> None:
        self._file: Reader = layer.open()
        self._file.read(offset)
        self._end, self._offset, self._size = end, offset, layer.size
        offsets.append(offset)

    def read(self, size: int, /) -> bytes:
        if self._offset >= self._end < self._size:
            raise RegistryFailed("the registry is gone")
        data = self._file.read(min(size, self._end - self._offset))
        self._offset += len(data)
        return data

    def close(self) -> None:
        self._file.close()


def pulled(text: str, end: int | None = None, offsets: list[int] | None = None) -> Source:
    """The source, as one of a registry. `end`: bytes of a layer after which that is gone. `offsets` gets
    where the reading of layers began."""
    source = open_source(text)
    begun = [] if offsets is None else offsets
    layers = tuple(
        replace(layer, open_at=partial(_Rest, layer, layer.size if end is None else end, begun))
        for layer in source.layers
    )
    return replace(source, layers=layers)
