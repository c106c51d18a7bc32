"""References to images in registries, as docker and podman write them. Pure.

::

    [docker://][REGISTRY/]REPOSITORY[:TAG][@DIGEST]

The grammar is that of distribution's ``reference`` package. The first component is a registry if it has a
dot, a colon or a capital in it, or is ``localhost``; without one it is docker.io, and a repository there
without a slash is in ``library/``. Without tag and digest the tag is ``latest``; with both the digest counts.
"""

import ipaddress
import re
from dataclasses import dataclass

from .errors import BadName
from .names import is_hex_id, parse_digest
from .nodes import Digest

__all__ = ["DOCKER_HUB", "Reference", "is_loopback", "parse_reference"]

DOCKER_HUB = "docker.io"

_REPOSITORY_MAX = 255
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_REGISTRY = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9A-Fa-f:]+\])(?::[0-9]{{1,5}})?")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True, slots=True)
class Reference:
    """An image in a registry. `str()` is its full name, as `fusestore.names.parse_image_name` takes it."""

    registry: str
    """A host, with ``:PORT`` where one was given."""
    repository: str
    tag: str
    """ "" where a digest was given alone."""
    digest: Digest | None

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.registry}/{self.repository}{tag}" + (f"@{self.digest}" if self.digest else "")

    @property
    def target(self) -> str:
        """What a manifest is asked for by (OCI distribution-spec, "Pulling manifests")."""
        return self.digest or self.tag

    @property
    def host(self) -> str:
        """Where the registry answers."""
        return "registry-1.docker.io" if self.registry == DOCKER_HUB else self.registry


def is_loopback(host: str) -> bool:
    """Whether ``HOST[:PORT]`` is this machine, by its name alone."""
    name = re.sub(r":[0-9]+$", "", host).strip("[]")
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def parse_reference(text: str) -> Reference:
    """Raises BadName, which says what to write instead."""
    rest = text.removeprefix("docker://")
    rest, at, digest_text = rest.partition("@")
    if at and not digest_text.startswith("sha256:"):
        # What stands before an @ elsewhere may be a password: it is not repeated.
        raise BadName("what follows the @ of an image's reference is a digest, sha256:<64 hex digits>")
    digest = parse_digest(digest_text) if at else None
    first, slash, remainder = rest.partition("/")
    if slash and (re.search(r"[.:A-Z]", first) or first == "localhost"):
        registry, path = first, remainder
    else:
        registry, path = DOCKER_HUB, rest
    if registry == "index.docker.io":
        registry = DOCKER_HUB
    repository, colon, tag = path.partition(":")
    if registry == DOCKER_HUB and "/" not in repository:
        repository = f"library/{repository}"
    if not colon and digest is None:
        tag = "latest"
    if not _REGISTRY.fullmatch(registry):
        raise BadName(f"{registry!r} cannot name a registry: write HOST or HOST:PORT before the first slash")
    short = repository.removeprefix("library/")
    if not _REPOSITORY.fullmatch(repository) or len(repository) > _REPOSITORY_MAX or is_hex_id(short):
        raise BadName(
            f"{short!r} cannot name an image of a registry: use lower-case letters and digits, with . _ - "
            "between them, joined by /"
        )
    if (colon or digest is None) and not _TAG.fullmatch(tag):
        raise BadName(f"{tag!r} cannot be a tag: use 1 to 128 letters, digits and _ . -, no . or - first")
    return Reference(registry, repository, tag, digest)
