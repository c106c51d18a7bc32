"""References to images in registries."""

import pytest

from fusestore.errors import BadName
from fusestore.names import parse_image_name
from fusestore.reference import is_loopback, parse_reference

DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "full"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("docker://busybox:1", "docker.io/library/busybox:1"),
        ("someone/app", "docker.io/someone/app:latest"),
        ("docker.io/busybox", "docker.io/library/busybox:latest"),
        ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
        ("docker.io/someone/app:1", "docker.io/someone/app:1"),
        ("quay.io/a/b/c:v1.2_x", "quay.io/a/b/c:v1.2_x"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app", "localhost:5000/app:latest"),
        ("HOST/app", "HOST/app:latest"),
        ("a-b.example:443/x__y/z--w:T", "a-b.example:443/x__y/z--w:T"),
        (f"busybox@{DIGEST}", f"docker.io/library/busybox@{DIGEST}"),
        (f"localhost:5000/app:1@{DIGEST}", f"localhost:5000/app:1@{DIGEST}"),
        # As docker reads it: a tag, not a port.
        ("localhost:5000", "docker.io/library/localhost:5000"),
    ],
)
def test_full_names(text: str, full: str) -> None:
    found = parse_reference(text)
    assert str(found) == full
    assert parse_reference(full) == found
    assert parse_image_name(full) == full


@pytest.mark.parametrize("text", ["[::1]:5000/app", "[fe80::1]/app"])
def test_an_address_of_six_bytes_and_more_is_a_registry(text: str) -> None:
    assert str(parse_reference(text)) == f"{text}:latest"


@pytest.mark.parametrize(
    "text",
    [
        "", "/", ":", "@", "a b",
        "App", "-a", "a-", "a..b", "a//b", "a/", "/a", "a:", "a:.b", "a:" + 129 * "t",
        "a@sha256:123", "a@md5:0123", "host.example/", "host.example:x/a", "host:123456/a", "ho st.example/a",
        "-host.example/a", "a\n", "a:1\n", "a/\n", "a" * 256, "0123456789abcdef" * 4, "https://host.example/a",
        "ä", "host.example/ä", "a:ä", "[::1/a", "../a", "a/../b",
    ],
)  # fmt: skip
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(BadName) as raised:
        parse_reference(text)
    assert "\n" not in str(raised.value)


def test_a_password_in_a_reference_is_not_repeated() -> None:
    with pytest.raises(BadName) as raised:
        parse_reference("someone:s3cret@host.example/app")
    assert "s3cret" not in str(raised.value)


def test_the_digest_comes_before_the_tag() -> None:
    assert parse_reference(f"app:1@{DIGEST}").target == DIGEST
    assert parse_reference("app:1").target == "1"


def test_where_docker_io_answers() -> None:
    assert parse_reference("busybox").host == "registry-1.docker.io"
    assert parse_reference("localhost:5000/app").host == "localhost:5000"


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True), ("localhost:5000", True), ("127.0.0.1", True), ("127.8.9.1:80", True),
        ("[::1]", True), ("[::1]:5000", True), ("localhost.example", False), ("127.0.0.1.example", False),
        ("10.0.0.1", False), ("[fe80::1]:80", False), ("", False),
    ],
)  # fmt: skip
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback
