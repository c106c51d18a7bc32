"""Sources of images: OCI layouts and docker-save archives, as directories or in tars. Blocking; only reads.

::

    oci:DIR[:REF]               an OCI image layout
    oci-archive:FILE[:REF]      the same in a tar
    docker-archive:FILE[:REF]   what `docker save` writes
    PATH                        any of these, told apart by content

REF is a name the source gives the image, or a digest ``sha256:…`` of its manifest; of a docker-archive also
``@N``, its Nth image.

Nothing is trusted: documents are bounded and their digests and sizes checked here, a layer's digest by who
reads it (fusestore.blobs), and where a name leads by fusestore.sourcefiles
and fusestore.sourcearchive.
"""

import os
import posixpath
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from . import oci
from .errors import BadName, BadSource
from .layout import ANNOTATION_NAME
from .names import digest_hex, parse_digest, parse_image_name
from .nodes import Digest
from .sourcefiles import Reader, SourceDirectory, SourceFiles, read_document

__all__ = ["Blobs", "LayerSource", "Parts", "Source", "machine_platform", "open_image", "open_source"]

NESTING_MAX = 3
"""Indexes inside indexes."""

_CONTAINERD_NAME = "io.containerd.image.name"
_DIGESTS_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Parts:
    """What a layer is shown by before its blob is here: files of **lazy.<blob>** (layout.py)."""

    index: bytes
    chunks: bytes
    origin: bytes


@dataclass(frozen=True, slots=True)
class LayerSource:
    """One layer of a source, still to be verified."""

    diff_id: Digest
    blob: Digest | None
    """None: the source does not say."""
    size: int
    media_type: str
    """ "" if the source does not say."""
    open: Callable[[], Reader]
    """The caller closes what it gives. Any thread."""
    open_at: Callable[[int], Reader] | None = None
    """The same from an offset on, where it is worth keeping what came before the way was cut off."""
    parts: Callable[[], Parts] | None = None
    """Asked instead, where reading in parts will do; raises NoToc where that cannot be. Any thread."""


@dataclass(frozen=True, slots=True)
class Source:
    """One image. `close` it when all its layers were read."""

    manifest: bytes | None
    """None: the source has none, it is to be made when the blobs are known."""
    manifest_type: str
    config: bytes
    config_type: str
    parsed_config: oci.Config
    layers: tuple[LayerSource, ...]
    """Bottom first, as many as the config's diff_ids."""
    names: tuple[str, ...]
    """What the source calls the image, as far as an image can be called that."""
    close: Callable[[], None]
    interrupt: Callable[[], None] = lambda: None
    """Has readers that wait in other threads fail soon."""
    parallel: int = 2
    """Layers that are worth reading at once. Where none waits for a network, decompression and hashing, which
    release the GIL, fill the processors, and a third layer would mostly cost memory."""

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_source(text: str, *, scratch: str | None = None) -> Source:
    """The image `text` means. Raises BadSource, which says what to do instead.

    `scratch`: the directory where a compressed archive is decompressed (default: that of temporary files).
    """
    kind, path, ref = _parse(text)
    files = SourceDirectory(path) if os.path.isdir(path) else _open_archive(path, scratch)
    try:
        if kind == "":
            kind = "oci" if files.has("oci-layout") else "docker" if files.has("manifest.json") else ""
        if kind == "oci":
            return _open_layout(files, text, ref)
        if kind == "docker":
            return _open_docker(files, text, ref)
        raise BadSource(f"{path} holds no image: neither an oci-layout nor a manifest.json is in it")
    except BaseException:
        files.close()
        raise


def _open_archive(path: str, scratch: str | None) -> SourceFiles:
    from .sourcearchive import SourceArchive

    return SourceArchive(path, scratch)


def machine_platform() -> oci.Platform:
    """This machine's, as images spell it (GOARCH, GOARM)."""
    machine = os.uname().machine
    names = {
        "x86_64": "amd64",
        "aarch64": "arm64",
        "i686": "386",
        "loongarch64": "loong64",
    }
    if machine in ("armv6l", "armv7l"):
        return oci.Platform("arm", machine[3:5])
    return oci.Platform(names.get(machine, machine))


_TRANSPORTS = {"oci": ("oci", True), "oci-archive": ("oci", False), "docker-archive": ("docker", False)}


_SKOPEO = frozenset(("docker", "docker-daemon", "containers-storage", "dir", "ostree", "sif", "tarball"))
"""Transports that containers-transports(5) has besides."""


def _parse(text: str) -> tuple[str, str, str]:
    """kind ("oci", "docker", "" = look), path, ref ("" = none)."""
    transport, colon, rest = text.partition(":")
    if colon and transport in _TRANSPORTS:
        kind, wants_directory = _TRANSPORTS[transport]
        path, ref = _split_ref(rest)
        if os.path.isdir(path) != wants_directory and os.path.exists(path):
            wanted = "a directory" if wants_directory else "a file"
            raise BadSource(
                f"{path} is not {wanted}, as {transport}: wants: give the path without {transport}:"
            )
    else:
        kind, path, ref = "", text, ""
        if not os.path.exists(path) and colon and transport in _SKOPEO:
            if transport == "docker":
                raise BadSource(f"{text} is in a registry: fusestore pull {text}")
            raise BadSource(
                f"{text} cannot be read directly: copy it first, with skopeo copy {text} oci:DIR:NAME"
            )
    if not os.path.exists(path):
        forms = "oci:DIR[:REF], oci-archive:FILE[:REF], docker-archive:FILE[:REF] or a path"
        other = "" if kind else ", or take it from a registry: fusestore pull NAME"
        raise BadSource(f"there is no {path or 'such source'}: give {forms}{other}")
    return kind, path, ref


def _split_ref(rest: str) -> tuple[str, str]:
    """As containers/image does, at the first colon; but a path that exists may have colons itself."""
    if os.path.exists(rest):
        return rest, ""
    path, _, ref = rest.partition(":")
    return path, ref


class Blobs(Protocol):
    """Where an image's blobs are. What it gives is what the descriptor says, but for the bytes of layers."""

    parallel: int
    """See Source."""

    def manifest(self, descriptor: oci.Descriptor, /) -> bytes:
        """Of an image, or an index. Raises BadSource."""

    def document(self, descriptor: oci.Descriptor, /) -> bytes:
        """Any other document. Raises BadSource."""

    def layer(self, descriptor: oci.Descriptor, /) -> Callable[[], Reader]:
        """Raises BadSource if it can be seen that the layer is another."""

    def interrupt(self) -> None: ...

    def close(self) -> None: ...


def open_image(
    blobs: Blobs, data: bytes, media_type: str, names: Sequence[str], platform: oci.Platform | None = None
) -> Source:
    """The image of a manifest, or of an index. Closing it closes `blobs`; who catches an error closes them.

    `media_type`: of `data`, where it is known. `platform`: None for this machine's, or else the only one.
    """
    wanted = platform or machine_platform()
    digest = oci.digest_of(data)
    for _ in range(NESTING_MAX):
        what = f"manifest {digest}"
        document = oci.parse_object(data, what)
        if not oci.is_index(document):
            break
        inner = oci.parse_descriptors(document, "manifests", what)
        descriptor = oci.choose_platform(inner, wanted, what, exactly=platform is not None)
        digest, media_type = descriptor.digest, descriptor.media_type
        data = blobs.manifest(descriptor)
    manifest = oci.parse_manifest(data, f"manifest {digest}", media_type)
    config_data = blobs.document(manifest.config)
    config = oci.parse_config(config_data, f"config {manifest.config.digest}")
    if platform is not None and config.architecture != platform.architecture:
        raise BadSource(f"manifest {digest} is of an image for linux/{config.architecture}, not {platform}")
    _require_same_count(len(manifest.layers), len(config.diff_ids))
    return Source(
        manifest=data,
        manifest_type=manifest.media_type,
        config=config_data,
        config_type=manifest.config.media_type,
        parsed_config=config,
        layers=tuple(
            LayerSource(diff_id, layer.digest, layer.size, layer.media_type, blobs.layer(layer))
            for layer, diff_id in zip(manifest.layers, config.diff_ids, strict=True)
        ),
        names=_valid_names(names),
        close=blobs.close,
        interrupt=blobs.interrupt,
        parallel=blobs.parallel,
    )


# OCI image layouts


def _open_layout(files: SourceFiles, text: str, ref: str) -> Source:
    if not files.has("oci-layout"):
        raise BadSource(f"{files.path} is no OCI image layout: there is no oci-layout in it")
    index = oci.parse_object(read_document(files, "index.json"), f"index.json of {files.path}")
    entries = oci.parse_descriptors(index, "manifests", f"index.json of {files.path}")
    descriptor, names = _select(entries, ref, files.path)
    blobs = _LayoutBlobs(files)
    return open_image(blobs, blobs.document(descriptor), descriptor.media_type, names)


class _LayoutBlobs:
    parallel = 2

    def __init__(self, files: SourceFiles) -> None:
        self._files = files

    def document(self, descriptor: oci.Descriptor) -> bytes:
        files = self._files
        data = read_document(files, _blob_name(descriptor.digest))
        if len(data) != descriptor.size or oci.digest_of(data) != descriptor.digest:
            raise BadSource(
                f"blob {descriptor.digest} in {files.path} has another digest or size: fetch the image again"
            )
        return data

    manifest = document

    def layer(self, descriptor: oci.Descriptor) -> Callable[[], Reader]:
        name = _blob_name(descriptor.digest)
        size = self._files.size(name)
        if size != descriptor.size:
            raise BadSource(
                f"layer {descriptor.digest} has {size} bytes, not {descriptor.size}: fetch the image again"
            )
        return partial(self._files.open, name)

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        self._files.close()


def _select(entries: Sequence[oci.Descriptor], ref: str, path: str) -> tuple[oci.Descriptor, list[str]]:
    """The image meant, and its names: `ref`, or all it has."""
    by_digest = _as_digest(ref)
    if by_digest is not None:
        matching = [entry for entry in entries if entry.digest == by_digest]
    else:
        matching = [entry for entry in entries if not ref or ref in _names(entry)]
    if not matching:
        raise BadSource(f"{path} has no image {ref!r}, but {_offer(entries)}")
    if len({entry.digest for entry in matching}) > 1:
        # Without platforms nothing tells them apart.
        if not ref and any(_names(entry) or not entry.architecture for entry in matching):
            raise BadSource(f"{path} has several images, choose one of {_offer(entries)}")
        chosen = oci.choose_platform(matching, machine_platform(), path)
    else:
        chosen = matching[0]
    if ref and by_digest is None:
        preferred = [_preferred_name(entry) for entry in matching if entry.digest == chosen.digest]
        return chosen, [name for name in preferred if name is not None][:1] or [ref]
    names = [_preferred_name(entry) for entry in entries if entry.digest == chosen.digest]
    return chosen, [name for name in names if name is not None]


def _as_digest(ref: str) -> Digest | None:
    try:
        return parse_digest(ref)
    except BadName:
        return None


def _names(entry: oci.Descriptor) -> list[str]:
    return [entry.annotations[key] for key in (_CONTAINERD_NAME, ANNOTATION_NAME) if key in entry.annotations]


def _preferred_name(entry: oci.Descriptor) -> str | None:
    """docker and containerd put the whole name elsewhere, and only the tag where the specification says."""
    return next(iter(_names(entry)), None)


def _offer(entries: Sequence[oci.Descriptor]) -> str:
    names = sorted({name for entry in entries for name in _names(entry)[:1]})
    digests = [entry.digest for entry in entries if not _names(entry)][:_DIGESTS_SHOWN]
    return ", ".join([*names, *digests]) or "none at all"


def _blob_name(digest: Digest) -> str:
    return f"blobs/sha256/{digest_hex(digest)}"


# docker save


def _open_docker(files: SourceFiles, text: str, ref: str) -> Source:
    what = f"manifest.json of {files.path}"
    if not files.has("manifest.json"):
        raise BadSource(f"{files.path} is no docker archive: give the path without docker-archive:")
    images = oci.parse_list(read_document(files, "manifest.json"), what)
    image = _select_docker(images, ref, files.path)
    config_name, layer_names = image.get("Config"), image.get("Layers") or []
    if not isinstance(config_name, str) or not all(isinstance(name, str) for name in layer_names):
        raise BadSource(f"{what} names no config or layers: it is not of docker save")
    config_data = read_document(files, config_name)
    config = oci.parse_config(config_data, f"config {config_name}")
    _require_same_count(len(layer_names), len(config.diff_ids))
    layers = [
        LayerSource(diff_id, None, files.size(name), "", partial(files.open, name))
        for name, diff_id in zip(layer_names, config.diff_ids, strict=True)
    ]
    return Source(
        manifest=None,
        manifest_type=oci.MANIFEST_TYPE,
        config=config_data,
        config_type=oci.CONFIG_TYPE,
        parsed_config=config,
        layers=tuple(layers),
        names=_valid_names([ref] if ref and not ref.startswith("@") else _tags(image)),
        close=files.close,
    )


def _select_docker(images: Sequence[Any], ref: str, path: str) -> dict[str, Any]:
    found = [image for image in images if isinstance(image, dict)]
    if re.fullmatch(r"@[0-9]{1,6}", ref):
        found = found[int(ref[1:]) :][:1]
    elif ref:
        found = [image for image in found if _full_tag(ref) in map(_full_tag, _tags(image))]
    tags = (
        ", ".join(tag for image in images if isinstance(image, dict) for tag in _tags(image)) or "@0, @1, …"
    )
    if not found:
        raise BadSource(f"{path} has no image {ref!r}, but {tags}")
    if len(found) > 1:
        raise BadSource(f"{path} has several images, choose one of {tags}")
    return found[0]


def _tags(image: dict[str, Any]) -> list[str]:
    tags = image.get("RepoTags")
    return [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []


def _full_tag(tag: str) -> str:
    """docker writes busybox:latest, skopeo docker.io/library/busybox:latest, people busybox."""
    for prefix in ("docker.io/", "library/"):
        tag = tag.removeprefix(prefix)
    return tag if ":" in posixpath.basename(tag) else f"{tag}:latest"


def _require_same_count(layers: int, diff_ids: int) -> None:
    if layers != diff_ids:
        raise BadSource(f"the manifest lists {layers} layers, the config {diff_ids}: fetch the image again")


def _valid_names(names: Sequence[str]) -> tuple[str, ...]:
    valid = []
    for name in dict.fromkeys(names):
        try:
            valid.append(parse_image_name(name))
        except BadName:
            continue
    return tuple(valid)
