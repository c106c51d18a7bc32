"""The JSON documents of OCI images: indexes, manifests, configs. Pure.

OCI image-spec: descriptor.md, image-index.md, manifest.md, config.md, image-layout.md; and what Docker calls
the same (schema 2, manifest lists). Read is what others wrote, so every field is checked before it is used,
and BadSource says what is wrong; unknown fields are ignored. Written is only what `make_manifest` makes.

The media type of a layer says that it is a tar; how it is compressed its first bytes tell
(fusestore.streams).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Any

import jiter

from .errors import BadInput, BadName, BadSource
from .names import parse_digest
from .nodes import Digest

__all__ = [
    "ACCEPTED_TYPES",
    "CONFIG_TYPE",
    "Config",
    "DOCUMENT_MAX",
    "Descriptor",
    "LAYERS_MAX",
    "LAYER_TYPES",
    "MANIFEST_TYPE",
    "Manifest",
    "Platform",
    "choose_platform",
    "encode",
    "digest_of",
    "is_index",
    "make_manifest",
    "parse_config",
    "parse_descriptors",
    "parse_list",
    "parse_manifest",
    "parse_object",
    "parse_platform",
    "parse_time_ns",
    "time_text",
]

DOCUMENT_MAX = 4 << 20
"""Bytes of a manifest, config or index: what registries and containers/image accept."""

LAYERS_MAX = 1024
"""Layers of an image. Builders stop at 127, the kernel's overlayfs at 500 lower directories."""

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"

_MANIFEST_TYPES = (MANIFEST_TYPE, "application/vnd.docker.distribution.manifest.v2+json")
_INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)

ACCEPTED_TYPES = (*_MANIFEST_TYPES, *_INDEX_TYPES)
"""Of what can be asked for by the name of an image."""

_CONFIG_TYPES = (CONFIG_TYPE, "application/vnd.docker.container.image.v1+json")

LAYER_TYPES: Mapping[str, str] = {
    "none": "application/vnd.oci.image.layer.v1.tar",
    "gzip": "application/vnd.oci.image.layer.v1.tar+gzip",
    "zstd": "application/vnd.oci.image.layer.v1.tar+zstd",
}
"""By compression."""

_ALL_LAYER_TYPES = frozenset(
    [
        *LAYER_TYPES.values(),
        "application/vnd.oci.image.layer.nondistributable.v1.tar",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
        "application/vnd.docker.image.rootfs.diff.tar",
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
        "application/vnd.docker.image.rootfs.diff.tar.zstd",
        "application/vnd.docker.image.rootfs.foreign.diff.tar",
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
    ]
)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A pointer to a blob, with what it must be."""

    media_type: str
    digest: Digest
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    os: str = ""
    architecture: str = ""
    variant: str = ""


@dataclass(frozen=True, slots=True)
class Platform:
    """What an image runs on, in GOOS's and GOARCH's words; always linux."""

    architecture: str
    variant: str = ""
    """ "" for any, or the one that goes without saying (v8 of arm64)."""

    def __str__(self) -> str:
        return f"linux/{self.architecture}" + (f"/{self.variant}" if self.variant else "")


@dataclass(frozen=True, slots=True)
class Manifest:
    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    """Bottom first."""


@dataclass(frozen=True, slots=True)
class Config:
    """What fusestore wants to know of an image's config."""

    diff_ids: tuple[Digest, ...]
    """Bottom first."""
    architecture: str
    os: str
    created: str
    """RFC 3339; "" if the image does not say."""


def digest_of(data: bytes) -> Digest:
    return Digest("sha256:" + sha256(data).hexdigest())


def encode(document: Mapping[str, object]) -> bytes:
    """JSON without blanks, as Go's tools write it."""
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


def parse_object(data: bytes, what: str, limit: int = DOCUMENT_MAX) -> dict[str, Any]:
    """The JSON object in `data`, of at most `limit` bytes. `what` names the document in errors."""
    found = _parse_json(data, what, limit)
    if not isinstance(found, dict):
        raise BadSource(f"{what} is no JSON object: the image is damaged, fetch it again")
    return found


def parse_list(data: bytes, what: str) -> list[Any]:
    """The JSON array in `data`."""
    found = _parse_json(data, what, DOCUMENT_MAX)
    if not isinstance(found, list):
        raise BadSource(f"{what} is no JSON array: the image is damaged, fetch it again")
    return found


def _parse_json(data: bytes, what: str, limit: int) -> Any:
    if len(data) > limit:
        raise BadSource(f"{what} has over {limit} bytes: no image needs that much")
    try:
        return jiter.from_json(data)
    except ValueError as error:
        raise BadSource(f"{what} is no JSON ({error}): the image is damaged, fetch it again") from None


def is_index(document: Mapping[str, Any]) -> bool:
    """Whether it lists manifests (an index, a manifest list) rather than layers."""
    media_type = document.get("mediaType")
    return media_type in _INDEX_TYPES or (media_type is None and "manifests" in document)


def parse_descriptors(document: Mapping[str, Any], key: str, what: str) -> tuple[Descriptor, ...]:
    """The descriptors under `key`, a list; Go's tools write null for an empty one."""
    found = document.get(key, ...)
    if found is None:
        return ()
    if not isinstance(found, list):
        raise BadSource(f"{what} has no list of {key}: it is not of an image")
    return tuple(_descriptor(entry, what) for entry in found)


def _descriptor(entry: Any, what: str) -> Descriptor:
    if not isinstance(entry, dict):
        raise BadSource(f"{what} has a descriptor that is no JSON object")
    digest, size, media_type = entry.get("digest"), entry.get("size"), entry.get("mediaType", "")
    if not isinstance(digest, str) or not isinstance(media_type, str):
        raise BadSource(f"{what} has a descriptor without digest or media type")
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size < 1 << 63:
        raise BadSource(f"{what} has a descriptor with a wrong size, {size!r}")
    try:
        checked = parse_digest(digest)
    except BadName as error:
        raise BadSource(f"{what}: {error}") from None
    platform = _mapping(entry.get("platform"))
    annotations = {
        key: value for key, value in _mapping(entry.get("annotations")).items() if isinstance(value, str)
    }
    return Descriptor(
        media_type,
        checked,
        size,
        annotations,
        _text(platform, "os"),
        _text(platform, "architecture"),
        _text(platform, "variant"),
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(document: Mapping[str, Any], key: str) -> str:
    value = document.get(key)
    return value if isinstance(value, str) else ""


def parse_manifest(data: bytes, what: str, media_type: str = "") -> Manifest:
    """Of an image manifest, OCI or Docker schema 2. `media_type`: what its descriptor said, if anything."""
    document = parse_object(data, what)
    if document.get("schemaVersion") != 2:
        raise BadSource(
            f"{what} is of Docker's schema 1: copy the image with skopeo first, which converts it"
        )
    media_type = _text(document, "mediaType") or media_type or MANIFEST_TYPE
    if media_type not in _MANIFEST_TYPES:
        raise BadSource(f"{what} is of type {media_type!r}: not the manifest of an image")
    config = _descriptor(document.get("config"), what)
    if config.media_type not in _CONFIG_TYPES:
        raise BadSource(
            f"{what} is of an artifact, its config is of type {config.media_type!r}: not an image"
        )
    layers = parse_descriptors(document, "layers", what)
    if len(layers) > LAYERS_MAX:
        raise BadSource(f"{what} lists {len(layers)} layers, over the limit of {LAYERS_MAX}")
    for layer in layers:
        if layer.media_type not in _ALL_LAYER_TYPES:
            raise BadSource(
                f"{what} has a layer of type {layer.media_type!r}: only plain layers of files can be read"
            )
    return Manifest(media_type, config, layers)


def parse_config(data: bytes, what: str) -> Config:
    document = parse_object(data, what)
    os = _text(document, "os")
    if os not in ("", "linux"):
        raise BadSource(f"{what} is of an image for {os!r}: only images for linux can be used")
    rootfs = _mapping(document.get("rootfs"))
    diff_ids = rootfs.get("diff_ids")
    # Docker and buildah write null for an image without layers.
    if diff_ids is None and rootfs.get("type") == "layers":
        diff_ids = []
    if not isinstance(diff_ids, list) or not all(isinstance(diff_id, str) for diff_id in diff_ids):
        raise BadSource(f"{what} has no rootfs.diff_ids: not the config of an image")
    if len(diff_ids) > LAYERS_MAX:
        raise BadSource(f"{what} lists {len(diff_ids)} layers, over the limit of {LAYERS_MAX}")
    try:
        checked = tuple(parse_digest(diff_id) for diff_id in diff_ids)
    except BadName as error:
        raise BadSource(f"{what}: {error}") from None
    return Config(checked, _text(document, "architecture"), os or "linux", _text(document, "created"))


def parse_platform(text: str) -> Platform:
    """Of ``linux/ARCH`` or ``linux/ARCH/VARIANT``. Raises BadInput."""
    parts = text.split("/")
    if not 2 <= len(parts) <= 3 or not all(re.fullmatch(r"[a-z0-9_]+", part) for part in parts):
        raise BadInput(f"{text!r} is no platform: write OS/ARCH or OS/ARCH/VARIANT, as linux/arm64")
    if parts[0] != "linux":
        raise BadInput(f"{text!r} is not for linux: only images for linux can be used")
    return Platform(*parts[1:])


def choose_platform(
    candidates: Sequence[Descriptor], wanted: Platform, what: str, *, exactly: bool = False
) -> Descriptor:
    """The manifest for `wanted`; unless it has to be `exactly` that, also the only one there is for linux."""
    linux = [found for found in candidates if found.os in ("", "linux")]
    matching = [found for found in linux if found.architecture in ("", wanted.architecture)]
    if not exactly:
        matching = matching or linux
    for variants in _variants(wanted):
        fitting = [
            found
            for found in matching
            if found.architecture == wanted.architecture and found.variant in variants
        ]
        if len({found.digest for found in fitting}) == 1:
            return fitting[0]
    if len({found.digest for found in matching}) == 1 and not (exactly and wanted.variant):
        return matching[0]
    offered = sorted({"/".join(filter(None, _platform_of(found))) for found in candidates})
    raise BadSource(f"{what} has no single image for {wanted}, but {', '.join(offered) or 'none at all'}")


def _platform_of(found: Descriptor) -> tuple[str, str, str]:
    return found.os or "?", found.architecture or "?", found.variant


def _variants(wanted: Platform) -> Sequence[tuple[str, ...]]:
    """Sets of variants to be looked for, the best one first: a processor runs code for those before it."""
    if wanted.architecture == "arm64":
        return (("", "v8"),) if wanted.variant in ("", "v8") else ((wanted.variant,), ("", "v8"))
    if wanted.architecture == "arm":
        known = ("v8", "v7", "v6", "v5")
        start = known.index(wanted.variant) if wanted.variant in known else 1
        return (*((variant,) for variant in known[start:]), ("",))
    return ((wanted.variant,),) if wanted.variant else (("",), ("v1",))


def make_manifest(config: Descriptor, layers: Sequence[Descriptor]) -> bytes:
    """An OCI manifest; the same bytes for the same arguments."""

    def plain(descriptor: Descriptor) -> dict[str, object]:
        return {"mediaType": descriptor.media_type, "digest": descriptor.digest, "size": descriptor.size}

    document = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": plain(config),
        "layers": [plain(layer) for layer in layers],
    }
    return encode(document)


_EPOCH = datetime(1970, 1, 1)
_RFC_3339 = re.compile(
    r"(\d{4}-\d\d-\d\dT\d\d:\d\d):([0-5]\d|60)(?:\.(\d{1,9})\d*)?(Z|[+-]\d\d:\d\d)", re.ASCII
)


def parse_time_ns(created: str) -> int:
    """An RFC 3339 time in nanoseconds since the epoch; 0 for what is none."""
    match = _RFC_3339.fullmatch(created)
    if match is None:
        return 0
    minute, second, fraction, zone = match.groups()
    try:
        since = datetime.fromisoformat(minute) - _EPOCH
    except ValueError:
        return 0
    seconds = since.days * 86400 + since.seconds + int(second)
    if zone != "Z":
        sign = -1 if zone[0] == "-" else 1
        seconds -= sign * (int(zone[1:3]) * 3600 + int(zone[4:6]) * 60)
    return seconds * 10**9 + (int(fraction.ljust(9, "0")) if fraction else 0)


def time_text(time_ns: int) -> str:
    """The RFC 3339 time that `parse_time_ns` reads as `time_ns`; the epoch for what no year has."""
    seconds, fraction = divmod(time_ns, 10**9)
    try:
        moment = _EPOCH + timedelta(seconds=seconds)
    except OverflowError:
        return time_text(0)
    return f"{moment.isoformat()}.{fraction:09d}Z"
