"""Names from outside, checked once: digests, container ids, image names; how all else is shown. Pure.

The rules are: OCI image-spec, descriptor.md (digests, sha256 only); design.md section 2 (container ids);
OCI distribution-spec / containers/image docker reference (image names).
"""

import re

from .errors import BadName
from .nodes import Digest

__all__ = [
    "FILE_NAME_MAX",
    "digest_hex",
    "is_hex_id",
    "parse_container_id",
    "parse_digest",
    "parse_image_name",
    "printable",
]

FILE_NAME_MAX = 255
"""Bytes in one path component (limits.h, NAME_MAX)."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_HEX_ID = re.compile(r"[0-9a-f]{64}")
_CONTAINER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_IMAGE_COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@+-]{0,254}")


def parse_digest(text: str) -> Digest:
    """Raises BadName for anything but ``sha256:`` and 64 lower-case hex digits."""
    if not _DIGEST.fullmatch(text):
        raise BadName(f"digest {text!r} is not sha256:<64 hex digits>; other algorithms are not supported")
    return Digest(text)


def digest_hex(digest: Digest) -> str:
    return digest[7:]


def is_hex_id(text: str) -> bool:
    """Whether `text` has the form of an image id (the config digest's 64 hex digits)."""
    return _HEX_ID.fullmatch(text) is not None


def parse_container_id(text: str) -> str:
    """A container's id or name: 1–128 of [A-Za-z0-9_.-], the first alphanumeric. Raises BadName."""
    if not _CONTAINER_ID.fullmatch(text):
        raise BadName(
            f"{text!r} cannot name a container: use 1 to 128 of A-Z a-z 0-9 _ . -, a letter or digit first"
        )
    return text


def parse_image_name(text: str) -> str:
    """A tag such as ``localhost/app:1``: components of 1–255 safe characters joined by single slashes.

    Raises BadName, also for 64 hex digits, which could be taken for an id.
    """
    components = text.split("/")
    if len(text) > 1024 or not all(_IMAGE_COMPONENT.fullmatch(component) for component in components):
        raise BadName(
            f"{text!r} cannot name an image: use components of letters, digits and _ . : @ + - joined by /"
        )
    if is_hex_id(components[0]):
        raise BadName(f"{text!r} cannot name an image: it has the form of an image id")
    return text


def printable(text: str) -> str:
    """`text` on one line, without what a terminal would obey: the unprintable is escaped as in Python."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )
