"""config.json as it is made of an image's config, and whom its user means."""

from typing import Any

import pytest

from fusestore.errors import BadInput
from fusestore.runtimespec import User, find_user, make_spec

_PASSWD = """root:x:0:0:root:/root:/bin/sh
broken
# comment
app:x:1000:100:App:/srv:/bin/false
late:x:1000:7::/:
77:x:5:6::/:
nogid:x:12:x::/:
"""
_GROUP = """root:x:0:
users:x:100:
audio:x:29:app,other
video:x:44:other,app
77:x:55:
broken:x
"""
_FILES = {"etc/passwd": _PASSWD, "etc/group": _GROUP}


@pytest.mark.parametrize(
    ("text", "user"),
    [
        ("", User(0, 0)),
        ("root", User(0, 0)),
        ("app", User(1000, 100, (29, 44))),
        ("1000", User(1000, 100, (29, 44))),
        ("app:audio", User(1000, 29)),
        ("app:4000", User(1000, 4000)),
        ("1234", User(1234, 0)),
        ("1234:users", User(1234, 100)),
        ("1234:5678", User(1234, 5678)),
        ("77", User(5, 6)),
        ("77:77", User(5, 55)),
        (":users", User(0, 100)),
        ("nogid", User(12, 0)),
        ("4294967294", User(4294967294, 0)),
        ("0" * 5000 + "12", User(12, 0)),
    ],
)
def test_a_user_is_looked_up(text: str, user: User) -> None:
    assert find_user(text, lambda path: _FILES[path]) == user


@pytest.mark.parametrize(
    "text",
    [
        "nobody",
        "app:nobody",
        "broken",
        "4294967295",
        "-1",
        "app:-1",
        "٣",
        "0000000000004294967296",
        "0" * 12 + "1" * 5000,
        "app:" + "9" * 5000,
    ],
)
def test_who_is_not_there_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="add it there"):
        find_user(text, lambda path: _FILES[path])


@pytest.mark.parametrize("separator", "\v\f\x1c\x85\u2028")
def test_only_a_newline_ends_a_line(separator: str) -> None:
    passwd = f"app:x:1000:100:{separator}evil:x:0:0::/:\n"
    with pytest.raises(BadInput, match="add it there"):
        find_user("evil", lambda path: passwd)


def test_numbers_need_no_files() -> None:
    assert find_user("12:34", lambda path: "") == User(12, 34)


_ROOT = User()


def _spec(settings: dict[str, Any], *args: str, user: User = _ROOT, **more: Any) -> dict[str, Any]:
    return make_spec("/mnt/rootfs", "host", settings, args, user, **more)


@pytest.mark.parametrize(
    ("settings", "args", "command"),
    [
        ({"Cmd": ["/bin/sh"]}, (), ["/bin/sh"]),
        ({"Entrypoint": ["/init"], "Cmd": ["x", "y z"]}, (), ["/init", "x", "y z"]),
        ({"Entrypoint": ["/init"], "Cmd": ["x"]}, ("id", "-u"), ["id", "-u"]),
        ({"Entrypoint": None, "Cmd": None}, ("id",), ["id"]),
    ],
)
def test_the_command_is_the_images_or_another(
    settings: dict[str, Any], args: tuple[str, ...], command: list[str]
) -> None:
    assert _spec(settings, *args)["process"]["args"] == command


def test_without_a_command_there_is_no_spec() -> None:
    with pytest.raises(BadInput, match="after --"):
        _spec({"Cmd": []})


def test_environment_directory_and_labels_are_the_images() -> None:
    spec = _spec({"Cmd": ["x"], "Env": ["A=1", "PATH=/bin"], "WorkingDir": "/srv", "Labels": {"a": "b"}})
    assert spec["process"]["env"] == ["A=1", "PATH=/bin"]
    assert (spec["process"]["cwd"], spec["annotations"]) == ("/srv", {"a": "b"})


def test_what_the_image_does_not_say_has_a_default() -> None:
    process = _spec({"Cmd": ["x"]}, has_terminal=True)["process"]
    assert process["cwd"] == "/"
    assert [entry.partition("=")[0] for entry in process["env"]] == ["PATH", "TERM"]


def test_who_is_not_root_has_no_capabilities() -> None:
    held = _spec({"Cmd": ["x"]}, user=User(1, 2, (3,)))["process"]["capabilities"]
    assert list(held) == ["bounding"]
    assert len(_spec({"Cmd": ["x"]})["process"]["capabilities"]["effective"]) == 11


def test_a_plain_user_is_root_in_a_user_namespace() -> None:
    linux = _spec({"Cmd": ["x"]}, rootless_as=(1000, 100))["linux"]
    assert linux["uidMappings"] == [{"containerID": 0, "hostID": 1000, "size": 1}]
    assert linux["gidMappings"] == [{"containerID": 0, "hostID": 100, "size": 1}]
    assert {"type": "user"} in linux["namespaces"] and {"type": "network"} not in linux["namespaces"]


def test_root_is_in_no_user_namespace_and_has_a_network_of_its_own() -> None:
    linux = _spec({"Cmd": ["x"]})["linux"]
    kinds = [namespace["type"] for namespace in linux["namespaces"]]
    assert kinds == ["pid", "ipc", "uts", "mount", "network"] and "uidMappings" not in linux


def test_a_host_name_is_as_long_as_one_may_be() -> None:
    assert make_spec("/r", "n" * 128, {"Cmd": ["x"]}, (), User())["hostname"] == "n" * 64
