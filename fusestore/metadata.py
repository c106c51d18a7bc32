"""The metadata document of a container: parsing, what may change in it, how it is shown. Pure.

A document is one JSON object (RFC 8259, UTF-8). The known keys are libpod's; every other key is the user's
and is kept, order included (design.md section 2)::

    id            str   never changes here
    name          str   may change; left out: kept
    image-name    str   "" while unbound; settable then, not after; left out or "": kept
    image-id      str   likewise; ``sha256:`` may stand before it
    created-at    int   Unix seconds; never changes
    mountlabel    str   may change; left out: empty; not shown when empty
    mounted       bool  run-time state, never stored; left out: kept

A user's key too, but with a meaning and a type::

    quota         int   bytes that the container's changes may take on disk, at least 1; left out: any number

Shown are the known keys first, in this order, then the user's keys in the user's order.

The rule a maintainer must not break: `is_prefix` is exact. It is False only when no continuation could be
accepted by `parse_document`, since what it refuses fails in the writer's write(2); and it is True only if one
could, since close(2)'s error is not shown by shells. That jiter says "EOF while …" for every text that is
valid so far is tested.
"""

import codecs
import json
import re
import unicodedata
from dataclasses import dataclass
from typing import Any

import jiter

from .errors import BadDocument, NotPermitted
from .names import parse_container_id

__all__ = [
    "DOCUMENT_MAX",
    "Change",
    "Document",
    "check_label",
    "is_prefix",
    "merge",
    "parse_document",
    "quota_of",
    "render",
]

Document = dict[str, Any]

DOCUMENT_MAX = 1 << 20
"""Bytes of a document, as written and as shown: what was read can always be written back."""

DEPTH_MAX = 128
"""Arrays and objects inside each other. Below jiter's own limit of 200, and far from Python's."""

MOUNTLABEL_MAX = 4096
"""Bytes. SELinux contexts are far shorter."""

_FIXED = ("id", "created-at")
_KNOWN = ("id", "name", "image-name", "image-id", "created-at", "mountlabel", "mounted")


def parse_document(data: bytes) -> Document:
    """The object in `data`; of a key that occurs twice the last value counts.

    Raises BadDocument: no JSON object, larger than `DOCUMENT_MAX`, deeper than `DEPTH_MAX`, numbers beyond a
    double's range, unpaired surrogates. Types of known keys are `merge`'s business.
    """
    if len(data) > DOCUMENT_MAX:
        raise BadDocument(f"the document has over {DOCUMENT_MAX} bytes: keep large data in workdir")
    try:
        document = jiter.from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise BadDocument(f"the document is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise BadDocument("the document is not a JSON object: write { … }")
    _check_values(document)
    return document


def _check_values(document: Document) -> None:
    pending: list[tuple[Any, int]] = [(document, 1)]
    while pending:
        value, depth = pending.pop()
        if isinstance(value, float):
            if value in (float("inf"), float("-inf")):
                raise BadDocument("the document has a number that is too large: write it as a string")
        elif isinstance(value, (dict, list)):
            if depth > DEPTH_MAX:
                raise BadDocument(f"the document nests deeper than {DEPTH_MAX}: make it flatter")
            members = value.values() if isinstance(value, dict) else value
            pending.extend((member, depth + 1) for member in members)


def is_prefix(data: bytes) -> bool:
    """Whether more bytes (or none) can make `data` a document that `parse_document` accepts."""
    if len(data) > DOCUMENT_MAX:
        return False
    if not data.strip(b" \t\n\r"):
        return True
    try:
        document = jiter.from_json(data, allow_inf_nan=False)
    except ValueError as error:
        return str(error).startswith("EOF while") and _may_go_on(data)
    # jiter calls the number 12 complete; in a document nothing but an object is.
    if not isinstance(document, dict):
        return False
    try:
        _check_values(document)
    except BadDocument:
        return False
    return True


_TRAILING_NUMBER = re.compile(rb"(?<![eE0-9.+-])-?[0-9.]+\Z")


def _may_go_on(data: bytes) -> bool:
    """Of `data` that jiter found valid up to its end: what jiter looks at only when there is more of it."""
    if not data.lstrip(b" \t\n\r").startswith(b"{"):
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data)
    except UnicodeDecodeError:
        return False
    # The decoder waits for the third byte of an encoded surrogate (ED A0…BF), which no third byte makes
    # valid.
    if data[-2:-1] == b"\xed" and data[-1] >= 0xA0:
        return False
    if not _escape_can_end(data):
        return False
    # A trailing number without an exponent is left out: an exponent may follow and bring it into range.
    so_far = jiter.from_json(_TRAILING_NUMBER.sub(b"", data), allow_inf_nan=False, partial_mode="on")
    try:
        _check_values(so_far)
    except BadDocument:
        return False
    return True


_LOW_SURROGATE = re.compile(rb"(?:[dD](?:[c-fC-F][0-9a-fA-F]?)?)?")
_NO_LOW_SURROGATE = re.compile(rb"(?![dD][c-fC-F])[0-9a-fA-F]{0,3}")
_HIGH_SURROGATE = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}")


def _escape_can_end(data: bytes) -> bool:
    r"""Whether the ``\uXXXX`` that `data` breaks off in, if any, can still be finished."""
    for digits in reversed(range(4)):  # what begins earlier has what follows for its digits
        start = len(data) - digits - 2
        if _escape_starts(data, start):
            rest = data[start + 2 :]
            if _HIGH_SURROGATE.fullmatch(data, start - 6, start) and _escape_starts(data, start - 6):
                return _LOW_SURROGATE.fullmatch(rest) is not None
            return _NO_LOW_SURROGATE.fullmatch(rest) is not None
    return True


def _escape_starts(data: bytes, start: int) -> bool:
    r"""Whether an escape ``\u`` starts at `start`: there, and its backslash is not itself escaped."""
    if start < 0 or data[start : start + 2] != b"\\u":
        return False
    before = data[: start + 1]
    return (len(before) - len(before.rstrip(b"\\"))) % 2 == 1


@dataclass(frozen=True, slots=True)
class Change:
    """What a written document asks for."""

    document: Document
    """As stored: `merge`'s `old` with the user's keys replaced. Not bound yet, the name unchanged."""
    name: str | None
    """Another name for the container; None: keep it."""
    image_name: str | None
    """Bind to this image; if `image_id` is given too they must agree. None: no request."""
    image_id: str | None
    mounted: bool | None
    """Start or stop; None: keep."""


def merge(old: Document, new: Document, container_id: str) -> Change:
    """What writing `new` over the stored document `old` means.

    Raises BadDocument for a wrong type, BadName for a name that cannot be one, NotPermitted for a change of
    id, created-at, or of the image of a container that is bound.
    """
    _check_types(new)
    shown = {**old, "id": container_id, "name": old.get("name", container_id)}
    for key in _FIXED:
        if key in new and new[key] != shown[key]:
            raise NotPermitted(f"{key} cannot change from {shown[key]!r}: write it as it is, or leave it out")
    bound = bool(old["image-id"])
    binding: dict[str, str | None] = {}
    for key in ("image-name", "image-id"):
        wanted = new.get(key, "")
        if bound and key == "image-id" and wanted.removeprefix("sha256:") == old[key]:
            wanted = old[key]
        if bound and wanted not in ("", old[key]):
            raise NotPermitted(f"{key} cannot change once set: make another container from {wanted!r}")
        binding[key] = wanted if wanted and not bound else None
    name = parse_container_id(new["name"]) if "name" in new else shown["name"]
    kept = ("name", "image-name", "image-id", "created-at")
    document: Document = {key: old[key] for key in kept if key in old}
    if new.get("mountlabel"):
        document["mountlabel"] = new["mountlabel"]
    document.update((key, value) for key, value in new.items() if key not in _KNOWN)
    return Change(
        document=document,
        name=name if name != shown["name"] else None,
        image_name=binding["image-name"],
        image_id=binding["image-id"],
        mounted=new.get("mounted"),
    )


def _check_types(new: Document) -> None:
    for key in ("id", "name", "image-name", "image-id", "mountlabel"):
        if key in new and not isinstance(new[key], str):
            raise BadDocument(f"{key} must be a string")
    created = new.get("created-at", 0)
    if isinstance(created, bool) or not isinstance(created, int):
        raise BadDocument("created-at must be a whole number of seconds")
    if not isinstance(new.get("mounted", False), bool):
        raise BadDocument("mounted must be true or false")
    check_label(new.get("mountlabel", ""))
    if "quota" in new and quota_of(new) is None:
        raise BadDocument("quota must be a whole number of bytes, at least 1: leave it out for none")


def quota_of(document: Document) -> int | None:
    """None where there is none: also where what a store has from before is no number."""
    quota = document.get("quota")
    return quota if isinstance(quota, int) and not isinstance(quota, bool) and quota > 0 else None


def check_label(label: str) -> None:
    """Raises BadDocument for what can be no SELinux label, whatever the policy."""
    try:
        size = len(label.encode())
    except UnicodeEncodeError:
        size = MOUNTLABEL_MAX + 1
    if size > MOUNTLABEL_MAX or any(unicodedata.category(character) == "Cc" for character in label):
        raise BadDocument(
            f"a mountlabel is an SELinux context: UTF-8, no newline or other control character, at most "
            f"{MOUNTLABEL_MAX} bytes"
        )


def render(document: Document, container_id: str, *, mounted: bool) -> bytes:
    """The stored `document` as metadata.json shows it, newline at the end."""
    shown: Document = {
        "id": container_id,
        "name": document.get("name", container_id),
        "image-name": document["image-name"],
        "image-id": document["image-id"],
        "created-at": document["created-at"],
    }
    if document.get("mountlabel"):
        shown["mountlabel"] = document["mountlabel"]
    shown["mounted"] = mounted
    shown.update((key, value) for key, value in document.items() if key not in _KNOWN)
    return json.dumps(shown, ensure_ascii=False, indent=2).encode() + b"\n"
