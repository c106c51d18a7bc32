"""What headers of registries mean, and which way requests go."""

import email.utils
import time

import pytest
import urllib3
from urllib3.util import parse_url

from fusestore import transport
from fusestore.errors import RegistryFailed
from fusestore.reference import parse_reference
from fusestore.transport import Patience, Transport


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        (['Bearer realm="https://a/t",service="s"'], {"bearer": {"realm": "https://a/t", "service": "s"}}),
        (["BASIC realm=\"x\""], {"basic": {"realm": "x"}}),
        (['Basic realm="x"', 'Bearer realm="y"'], {"basic": {"realm": "x"}, "bearer": {"realm": "y"}}),
        (['Basic realm="x", Bearer realm="y",service="s"'],
         {"basic": {"realm": "x"}, "bearer": {"realm": "y", "service": "s"}}),
        (['Bearer realm="a", scope="p:q:pull,push"'], {"bearer": {"realm": "a", "scope": "p:q:pull,push"}}),
        (["Negotiate"], {"negotiate": {}}),
        ([""], {"": {}}),
    ],
)  # fmt: skip
def test_challenges(headers: list[str], found: dict[str, dict[str, str]]) -> None:
    assert dict(transport._parse_challenges(headers)) == found


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(None, None), ("7", 7), ("0", 0), ("-1", None), ("soon", None), ("9" * 10, None), ("", None)],
)
def test_retry_after(text: str | None, seconds: float | None) -> None:
    assert transport._retry_after_s(text) == seconds


@pytest.mark.parametrize(("ahead", "least", "most"), [(100, 90, 100), (-100, 0, 0)])
def test_retry_after_a_date(ahead: int, least: float, most: float) -> None:
    found = transport._retry_after_s(email.utils.formatdate(time.time() + ahead, usegmt=True))
    assert found is not None and least <= found <= most


@pytest.mark.parametrize(
    ("url", "is_proxied"),
    [
        ("https://a.example/x", True),
        ("http://a.example/x", False),
        ("https://b.example/x", False),
        ("https://sub.b.example:444/x", False),
        ("https://localhost:5000/x", False),
        ("https://[::1]/x", False),
    ],
)
def test_proxies(url: str, is_proxied: bool) -> None:
    proxies = {"https": "http://127.0.0.1:1", "no": "b.example"}
    way = Transport(parse_reference("a.example/app"), None, False, Patience(), proxies)
    assert isinstance(way._pools_for(parse_url(url)), urllib3.ProxyManager) == is_proxied
    way.close()


@pytest.mark.parametrize(
    ("registry", "url"),
    [
        ("127.0.0.1:5000", "http://a.example\\@127.0.0.1/"),
        ("127.0.0.1:5000", "http://a.example/\\@127.0.0.1/"),
        ("127.0.0.1:5000", "http://127.0.0.1@a.example/"),
        ("127.0.0.1:5000", "http://someone:secret@127.0.0.1:1/"),
        ("127.0.0.1:5000", "http:///x"),
        ("127.0.0.1:5000", "//127.0.0.1:1/"),
        ("a.example", "http://127.0.0.1:1/"),
        ("a.example", "http://localhost:1/"),
        ("a.example", "https://someone@b.example/"),
        ("a.example", "https://b.example\\@a.example/"),
    ],
)
def test_where_no_request_goes(registry: str, url: str) -> None:
    """It is refused before anybody is asked, where another parser might see another host, too."""
    way = Transport(parse_reference(f"{registry}/app"), None, False, Patience(), {})
    way.interrupt()
    with pytest.raises(RegistryFailed, match="sends us") as raised:
        way._send("GET", url, {})
    assert "secret" not in str(raised.value)
