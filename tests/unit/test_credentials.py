"""Where users and passwords of registries come from."""

import base64
import json
import os
from pathlib import Path

import pytest

from fusestore.credentials import Credentials, auth_files, find_credentials
from fusestore.errors import BadInput
from fusestore.reference import parse_reference


def _entry(user: str, password: str = "pass") -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


def _write(path: Path, document: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return str(path)


def _user(ref: str, *files: str) -> str | None:
    found = find_credentials(parse_reference(ref), files)
    return found.user if found else None


# Which files


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """An environment in which all usual files are there."""
    for name in ("run/containers/auth.json", ".config/containers/auth.json", ".docker/config.json"):
        _write(tmp_path / name, {})
    return {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": f"{tmp_path}/run"}


def test_the_usual_files_in_order(home: dict[str, str], tmp_path: Path) -> None:
    names = ("run/containers/auth.json", ".config/containers/auth.json", ".docker/config.json")
    assert auth_files(home) == tuple(f"{tmp_path}/{name}" for name in names)


def test_files_that_are_not_there_are_left_out(home: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / ".config/containers/auth.json").unlink()
    del home["XDG_RUNTIME_DIR"]
    assert auth_files(home) == (f"{tmp_path}/.docker/config.json",)


def test_a_file_that_is_named_is_the_only_one(home: dict[str, str], tmp_path: Path) -> None:
    named, other = _write(tmp_path / "named", {}), _write(tmp_path / "other", {})
    assert auth_files(home, named) == (named,)
    assert auth_files({**home, "REGISTRY_AUTH_FILE": other}) == (other,)
    assert auth_files({**home, "REGISTRY_AUTH_FILE": other}, named) == (named,)


def test_a_file_that_is_named_must_be_there(home: dict[str, str]) -> None:
    with pytest.raises(BadInput, match="there is no file of credentials '/none'"):
        auth_files(home, "/none")


def test_other_places_for_the_files(tmp_path: Path) -> None:
    environ = {"XDG_CONFIG_HOME": f"{tmp_path}/x", "DOCKER_CONFIG": f"{tmp_path}/d"}
    files = (_write(tmp_path / "x/containers/auth.json", {}), _write(tmp_path / "d/config.json", {}))
    assert auth_files(environ) == files


def test_the_first_file_that_knows_the_registry_counts(tmp_path: Path) -> None:
    one = _write(tmp_path / "1", {"auths": {"a.example": _entry("first")}})
    two = _write(tmp_path / "2", {"auths": {"a.example/app": _entry("second"), "b.example": _entry("other")}})
    assert _user("a.example/app", one, two) == "first"
    assert _user("b.example/app", one, two) == "other"
    assert _user("c.example/app", one, two) is None


# Which entry


@pytest.mark.parametrize(
    ("ref", "user"),
    [
        ("a.example/team/app:1", "repository"),
        ("a.example/team/other", "space"),
        ("a.example/teams/app", "host"),
        ("a.example:5000/team/app", "port"),
        ("b.example/team/app", None),
        ("old.example/app", "url"),
        ("older.example/app", "versioned"),
        ("busybox", "hub"),
        ("docker.io/private/app", "private"),
    ],
)
def test_the_most_specific_key_counts(tmp_path: Path, ref: str, user: str | None) -> None:
    auths = {
        "a.example": _entry("host"),
        "a.example/team": _entry("space"),
        "a.example/team/app": _entry("repository"),
        "a.example:5000": _entry("port"),
        "https://old.example": _entry("url"),
        "https://older.example/v2/": _entry("versioned"),
        "https://index.docker.io/v1/": _entry("hub"),
        "docker.io/private": _entry("private"),
    }
    assert _user(ref, _write(tmp_path / "auth", {"auths": auths})) == user


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        (_entry("u", "p:with:colons"), Credentials("u", "p:with:colons")),
        ({"username": "u", "password": "p"}, Credentials("u", "p")),
        ({"auth": _entry("u")["auth"], "identitytoken": "t"}, Credentials("u", identity_token="t")),
        ({"identitytoken": "t"}, Credentials("", identity_token="t")),
        ({}, None),
        ({"auth": ""}, None),
        ("text", None),
        (None, None),
    ],
)
def test_entries(tmp_path: Path, entry: object, found: Credentials | None) -> None:
    path = _write(tmp_path / "auth", {"auths": {"a.example": entry}})
    assert find_credentials(parse_reference("a.example/app"), [path]) == found


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '"secret-1"', '{"auths": {"a.example": {"auth": "secret-1"}}}', "[" * 100000, "\udcff",
     '{"auths": {"a.example": {"auth": "c2VjcmV0LTE="}}}', '{"credsStore": "../secret-1"}',
     '{"credHelpers": {"a.example": ["secret-1"]}}', '{"auths": {"a.example": {"auth": "secret-1é"}}}',
     '{"auths": {"a.example": {"username": "u", "password": "secret-1\\ud800"}}}',
     '{"auths": {"a.example": {"identitytoken": "secret-1\\ud800"}}}'],
)  # fmt: skip
def test_a_damaged_file_is_named_and_not_quoted(tmp_path: Path, text: str) -> None:
    path = tmp_path / "auth"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(BadInput) as raised:
        _user("a.example/app", str(path))
    assert str(path) in str(raised.value)
    assert "secret-1" not in str(raised.value) and "c2Vj" not in str(raised.value)


@pytest.mark.parametrize("text", ["{}", "", '{"auths": []}', '{"auths": null, "credHelpers": 1}'])
def test_files_without_credentials(tmp_path: Path, text: str) -> None:
    (tmp_path / "auth").write_text(text)
    assert _user("a.example/app", str(tmp_path / "auth")) is None


def test_credentials_do_not_show_their_secrets() -> None:
    assert "secret" not in repr(Credentials("u", "secret", "secret"))


# Helpers


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """docker-credential-test: answers with what the file of the key's name holds, and keeps the questions."""
    directory = tmp_path / "bin"
    directory.mkdir()
    program = directory / "docker-credential-test"
    program.write_text(
        '#!/bin/sh\ncd "${0%/*}" || exit 9\nread -r key\nprintf "%s %s\\n" "$1" "$key" >> asked\n'
        'name=$(printf %s "$key" | tr / _)\n[ -e "$name" ] && exec cat "$name"\n'
        "echo credentials not found in native keychain; echo secret-2 >&2; exit 1\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return directory


def _keep(helper: Path, key: str, user: str = "u", secret: str = "s") -> None:
    answer = {"ServerURL": key, "Username": user, "Secret": secret}
    (helper / key.replace("/", "_")).write_text(json.dumps(answer))


def test_a_helper_of_the_registry(helper: Path, tmp_path: Path) -> None:
    _keep(helper, "a.example")
    document = {"credHelpers": {"a.example": "test"}, "auths": {"a.example": _entry("file")}}
    path = _write(tmp_path / "auth", document)
    assert find_credentials(parse_reference("a.example/app"), [path]) == Credentials("u", "s")
    assert (helper / "asked").read_text() == "get a.example\n"


def test_a_helper_of_another_registry_is_not_asked(helper: Path, tmp_path: Path) -> None:
    path = _write(tmp_path / "auth", {"credHelpers": {"b.example": "test"}})
    assert _user("a.example/app", path) is None
    assert not (helper / "asked").exists()


def test_a_store_of_all_registries(helper: Path, tmp_path: Path) -> None:
    _keep(helper, "a.example:5000")
    path = _write(tmp_path / "auth", {"credsStore": "test", "auths": {"a.example:5000": {}}})
    assert _user("a.example:5000/app", path) == "u"


def test_docker_hub_has_its_own_key(helper: Path, tmp_path: Path) -> None:
    _keep(helper, "https://index.docker.io/v1/")
    assert _user("busybox", _write(tmp_path / "auth", {"credsStore": "test"})) == "u"


def test_a_helper_that_has_none(helper: Path, tmp_path: Path) -> None:
    path = _write(tmp_path / "auth", {"credsStore": "test"})
    other = _write(tmp_path / "other", {"auths": {"a.example": _entry("file")}})
    assert _user("a.example/app", path) is None
    assert _user("a.example/app", path, other) == "file"


def test_a_token_of_a_helper(helper: Path, tmp_path: Path) -> None:
    _keep(helper, "a.example", "<token>", "t")
    path = _write(tmp_path / "auth", {"credsStore": "test"})
    assert find_credentials(parse_reference("a.example/app"), [path]) == Credentials("", identity_token="t")


@pytest.mark.parametrize("answer", ["secret-3", "{}", '{"Username": 1, "Secret": "secret-3"}', "[]",
                                    '{"Username": "u", "Secret": "secret-3\\ud800"}'])  # fmt: skip
def test_a_helper_that_answers_nonsense_is_not_quoted(helper: Path, tmp_path: Path, answer: str) -> None:
    (helper / "a.example").write_text(answer)
    with pytest.raises(BadInput, match=r"docker-credential-test, which .*, failed: run it by hand") as raised:
        _user("a.example/app", _write(tmp_path / "auth", {"credsStore": "test"}))
    assert "secret-3" not in str(raised.value)


def test_a_helper_that_is_not_installed(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"docker-credential-none-such, .*No such file.*: install it"):
        _user("a.example/app", _write(tmp_path / "auth", {"credsStore": "none-such"}))
