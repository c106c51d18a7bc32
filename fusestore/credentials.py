"""Users and passwords of registries, from the files that podman and docker keep them in. Blocking; reads.

containers-auth.json(5), docker's config.json: ``auths`` by key, ``credHelpers`` by registry, ``credsStore``.
Of several files the first that knows the registry counts; in a file a helper for the registry, then the
longest key that the repository begins with, then ``credsStore``.

A rule a maintainer must not break: no error and no repr has a byte of what a file or a helper said.
"""

import base64
import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import BadInput
from .reference import DOCKER_HUB, Reference

__all__ = ["Credentials", "auth_files", "find_credentials"]

_HUB_KEY = "https://index.docker.io/v1/"
"""What docker calls docker.io."""
_HELPER_S = 60
_FILE_MAX = 4 << 20
_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_NOT_FOUND = b"credentials not found"
"""How the protocol of the helpers (docker-credential-helpers) says that there are none."""
_TOKEN_USER = "<token>"


@dataclass(frozen=True, slots=True)
class Credentials:
    """Of one user. `identity_token` is there instead of a password where the registry gave one at log-in."""

    user: str
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)


def auth_files(environ: Mapping[str, str], named: str | None = None) -> tuple[str, ...]:
    """Where to look, in order: `named` or REGISTRY_AUTH_FILE alone, or else the usual files that there are.

    Raises BadInput where the one that was named does not exist.
    """
    only = named or environ.get("REGISTRY_AUTH_FILE")
    if only:
        if not os.path.isfile(only):
            raise BadInput(f"there is no file of credentials {only!r}: name another, or log in to make it")
        return (only,)
    home = environ.get("HOME", "/")
    runtime = environ.get("XDG_RUNTIME_DIR")
    config = environ.get("XDG_CONFIG_HOME") or os.path.join(home, ".config")
    docker = environ.get("DOCKER_CONFIG") or os.path.join(home, ".docker")
    found = [os.path.join(runtime, "containers/auth.json")] if runtime else []
    found += [os.path.join(config, "containers/auth.json"), os.path.join(docker, "config.json")]
    return tuple(path for path in found if os.path.isfile(path))


def find_credentials(reference: Reference, files: Sequence[str]) -> Credentials | None:
    """None: nobody logged in there. Raises BadInput for files and helpers that cannot be used."""
    for path in files:
        document = _read(path)
        found = _from_file(document, reference, path)
        if found is not None:
            return found
    return None


def _read(path: str) -> Mapping[str, Any]:
    try:
        with open(path, "rb") as file:
            document = json.loads(file.read(_FILE_MAX) or b"{}")
    except (ValueError, RecursionError):
        document = None
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}): name another with --authfile") from error
    if not isinstance(document, dict):
        raise BadInput(f"{path} is no JSON object: mend it, or log in anew")
    return document


def _part(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = document.get(key)
    return found if isinstance(found, dict) else {}


def _from_file(document: Mapping[str, Any], reference: Reference, path: str) -> Credentials | None:
    helpers = _part(document, "credHelpers")
    for key in _helper_keys(reference):
        if key in helpers:
            answer = _ask_helper(helpers[key], (key,), path)
            if answer is not None:
                return answer
    entries = {_normalized(key): entry for key, entry in _part(document, "auths").items()}
    for key in _keys(reference):
        found = _from_entry(entries.get(key), key, path)
        if found is not None:
            return found
    store = document.get("credsStore")
    return _ask_helper(store, _helper_keys(reference), path) if store else None


def _keys(reference: Reference) -> Iterator[str]:
    """Most specific first: registry/name/space/repository, …, registry."""
    parts = [reference.registry, *reference.repository.split("/")]
    for length in range(len(parts), 0, -1):
        yield "/".join(parts[:length])


def _helper_keys(reference: Reference) -> tuple[str, ...]:
    """Helpers know only registries."""
    if reference.registry == DOCKER_HUB:
        return (_HUB_KEY, DOCKER_HUB, "index.docker.io")
    return (reference.registry,)


def _normalized(key: str) -> str:
    """docker writes keys as URLs: scheme and API version are none of the name."""
    plain = re.sub(r"^https?://", "", key)
    if plain != key or plain.rstrip("/") in ("index.docker.io/v1", "index.docker.io"):
        plain = plain.partition("/")[0]
    return DOCKER_HUB if plain == "index.docker.io" else plain.rstrip("/")


def _from_entry(entry: Any, key: str, path: str) -> Credentials | None:
    if not isinstance(entry, dict):
        return None
    auth, token = entry.get("auth"), entry.get("identitytoken")
    user: Any
    password: Any
    if isinstance(auth, str) and auth:
        try:
            user, colon, password = base64.b64decode(auth, validate=True).decode().rstrip("\0").partition(":")
        except ValueError:
            colon = ""
        if not colon:
            raise _no_pair(key, path)
    else:
        user, password = entry.get("username"), entry.get("password")
    if not all(_is_text(value) for value in (user, password, token) if isinstance(value, str)):
        raise _no_pair(key, path)
    if isinstance(token, str) and token:
        return Credentials(user if isinstance(user, str) else "", identity_token=token)
    if isinstance(user, str) and isinstance(password, str) and user:
        return Credentials(user, password)
    return None


def _is_text(value: Any) -> bool:
    """A string that can be sent: JSON can spell half of a surrogate pair."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value


def _no_pair(key: str, path: str) -> BadInput:
    return BadInput(f"{path} has an entry for {key} that is no user and password: log in anew")


def _ask_helper(name: Any, keys: Sequence[str], path: str) -> Credentials | None:
    if not isinstance(name, str) or not _HELPER.fullmatch(name):
        raise BadInput(f"{path} names no usable credential helper: mend it, or log in anew")
    program = f"docker-credential-{name}"
    for key in keys:
        try:
            done = subprocess.run(
                [program, "get"],
                input=key.encode(),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=_HELPER_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            said = error.strerror if isinstance(error, OSError) else f"no answer in {_HELPER_S} s"
            raise BadInput(
                f"{program}, which {path} names, cannot be used ({said}): install it, or change that file"
            ) from None
        if done.returncode and done.stdout.strip().lower().startswith(_NOT_FOUND):
            continue
        answer = _parse_answer(done.stdout) if done.returncode == 0 else None
        if answer is None:
            raise BadInput(f"{program}, which {path} names, failed: run it by hand, or change that file")
        return answer
    return None


def _parse_answer(data: bytes) -> Credentials | None:
    try:
        answer = json.loads(data)
        user, secret = answer["Username"], answer["Secret"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not _is_text(user) or not _is_text(secret):
        return None
    if user == _TOKEN_USER:
        return Credentials("", identity_token=secret)
    return Credentials(user, secret)
