"""The config of an image: what containers are run by, and as a commit changes it. Pure.

Changes are the instructions of a Dockerfile that set something in the config, as podman, buildah and docker
take them: CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, ONBUILD, STOPSIGNAL, USER, VOLUME, WORKDIR. The
fields are those of the OCI image-spec (config.md); ONBUILD's is Docker's.
"""

import json
import posixpath
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .errors import BadInput
from .nodes import Digest

__all__ = ["extend", "parse", "settings_of"]

Config = dict[str, Any]

_FIELDS: Mapping[str, type] = {
    "User": str,
    "ExposedPorts": dict,
    "Env": list,
    "Entrypoint": list,
    "Cmd": list,
    "Volumes": dict,
    "WorkingDir": str,
    "Labels": dict,
    "StopSignal": str,
    "OnBuild": list,
}
_KINDS: Mapping[type, str] = {str: "text", list: "list of texts", dict: "object of texts"}
_SETS = ("ExposedPorts", "Volumes")
"""Objects of which the names alone count."""


def settings_of(config: Config, names: Iterable[str] = tuple(_FIELDS)) -> Config:
    """What ``config`` in an image's config says (image-spec, config.md), null left out. Raises BadInput.

    Only the fields `names` are looked into.
    """
    settings = config.get("config") or {}
    if not isinstance(settings, dict):
        raise BadInput("config in the image's config is no object: mend the image")
    found = {name: value for name, value in settings.items() if value is not None}
    for name in names:
        kind = _FIELDS[name]
        value = found.get(name, kind())
        members = [*value, *value.values()] if isinstance(value, dict) and name not in _SETS else value
        if not isinstance(value, kind) or not all(isinstance(member, str) for member in members):
            raise BadInput(f"{name} in the image's config is no {_KINDS[kind]}: mend the image")
    return found


def extend(config: Config, diff_id: Digest | None, history: Config) -> None:
    """One more step of the image: a layer, or, without one, only an entry of its history. Raises BadInput."""
    former = config.get("history") or []
    if not isinstance(former, list):
        raise BadInput("history in the image's config is no list: mend the image")
    rootfs = config["rootfs"] = {"type": "layers", **(config.get("rootfs") or {})}
    diff_ids = list(rootfs.get("diff_ids") or ())
    rootfs["diff_ids"] = diff_ids if diff_id is None else [*diff_ids, diff_id]
    step = history if diff_id is not None else {**history, "empty_layer": True}
    config["history"] = [*former, step]
    config["created"] = history["created"]
    if "author" in history:
        config["author"] = history["author"]


def parse(changes: Sequence[str]) -> Callable[[Config], None]:
    """What these instructions do to a config. Raises BadInput, and that does too."""
    steps = [_parse_one(change) for change in changes]

    def apply(config: Config) -> None:
        settings = config["config"] = settings_of(config)
        for step in steps:
            step(settings)

    return apply


def _parse_one(change: str) -> Callable[[Config], None]:
    keyword, _, rest = change.strip().partition(" ")
    make = _INSTRUCTIONS.get(keyword.upper())
    if make is None:
        raise BadInput(f"--change {change!r} is none of {', '.join(_INSTRUCTIONS)}: write KEYWORD VALUE")
    rest = rest.strip()
    if not rest:
        raise BadInput(f"--change {change!r} says nothing: write {keyword.upper()} VALUE")
    return make(rest)


def _command(field: str) -> Callable[[str], Callable[[Config], None]]:
    """The exec form, a JSON array, or the shell form."""

    def make(text: str) -> Callable[[Config], None]:
        words = _json_list(text)
        if words is None:
            words = ["/bin/sh", "-c", text]

        def apply(settings: Config) -> None:
            settings[field] = words
            if field == "Entrypoint":
                settings.pop("Cmd", None)  # it was an argument of the former one

        return apply

    return make


def _text(field: str) -> Callable[[str], Callable[[Config], None]]:
    return lambda text: lambda settings: settings.__setitem__(field, _unquoted(text))


def _workdir(text: str) -> Callable[[Config], None]:
    path = _unquoted(text)

    def apply(settings: Config) -> None:
        settings["WorkingDir"] = posixpath.normpath(posixpath.join("/", settings.get("WorkingDir", ""), path))

    return apply


def _env(text: str) -> Callable[[Config], None]:
    pairs = _pairs(text, "ENV")

    def apply(settings: Config) -> None:
        kept = [entry for entry in settings.get("Env", ()) if entry.partition("=")[0] not in pairs]
        settings["Env"] = [*kept, *(f"{key}={value}" for key, value in pairs.items())]

    return apply


def _labels(text: str) -> Callable[[Config], None]:
    pairs = _pairs(text, "LABEL")
    return lambda settings: settings.__setitem__("Labels", {**settings.get("Labels", {}), **pairs})


def _members(field: str) -> Callable[[str], Callable[[Config], None]]:
    """A set, which the config keeps as an object with empty values."""

    def make(text: str) -> Callable[[Config], None]:
        listed = _json_list(text)
        names = _words(text) if listed is None else listed
        if field == "ExposedPorts":
            names = [name if "/" in name else f"{name}/tcp" for name in names]
        members: dict[str, object] = {name: {} for name in names}
        return lambda settings: settings.__setitem__(field, {**settings.get(field, {}), **members})

    return make


def _onbuild(text: str) -> Callable[[Config], None]:
    return lambda settings: settings.__setitem__("OnBuild", [*settings.get("OnBuild", ()), text])


_INSTRUCTIONS: dict[str, Callable[[str], Callable[[Config], None]]] = {
    "CMD": _command("Cmd"),
    "ENTRYPOINT": _command("Entrypoint"),
    "ENV": _env,
    "EXPOSE": _members("ExposedPorts"),
    "LABEL": _labels,
    "ONBUILD": _onbuild,
    "STOPSIGNAL": _text("StopSignal"),
    "USER": _text("User"),
    "VOLUME": _members("Volumes"),
    "WORKDIR": _workdir,
}


def _pairs(text: str, keyword: str) -> dict[str, str]:
    """KEY=VALUE …, values quoted where they need it; or the old form, KEY VALUE."""
    words = _words(text)
    if "=" not in words[0]:
        key, _, value = text.partition(" ")
        if not value:
            raise BadInput(f"--change {keyword} {text} has no value: write {keyword} {text}=VALUE")
        return {key: value.strip()}
    pairs = [word.partition("=") for word in words]
    wrong = next(
        (word for word, (key, sign, _) in zip(words, pairs, strict=True) if not (key and sign)), None
    )
    if wrong is not None:
        raise BadInput(f"--change {keyword}: {wrong!r} is no KEY=VALUE: quote values with blanks")
    return {key: value for key, _, value in pairs}


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise BadInput(f"--change …{text!r}: {error}: close the quote") from None


def _unquoted(text: str) -> str:
    return " ".join(_words(text))


def _json_list(text: str) -> list[str] | None:
    """The exec form; None if it is none, which then is the shell form, as in a Dockerfile."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_list = isinstance(found, list) and all(isinstance(word, str) for word in found)
    return found if is_list else None
