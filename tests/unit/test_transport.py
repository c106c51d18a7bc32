"""What headers of registries mean, and which way requests go."""

import email.utils
import time

import pytest
import urllib3

from fusestore import transport
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
    assert isinstance(way._pools_for(url), urllib3.ProxyManager) == is_proxied
    way.close()
