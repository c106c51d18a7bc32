"""What headers of registries mean, and which way requests go."""

import email.utils
import io
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import urllib3
from urllib3.util import parse_url

from fusestore import transport
from fusestore.errors import RegistryFailed
from fusestore.reference import parse_reference
from fusestore.transport import Patience, Transient, Transport, Upload


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
    ("url", "is_own"),
    [
        ("https://a.example:443/x", True),
        ("HTTPS://A.Example/x", True),
        ("https://a.example:80/x", False),
        ("http://a.example:443/x", False),
        ("https://a.example.b.example/x", False),
        ("https://b.example/x", False),
    ],
)
def test_what_belongs_to_the_registry(url: str, is_own: bool) -> None:
    own = transport._origin_of(parse_url("https://a.example"))
    assert (transport._origin_of(parse_url(url)) == own) == is_own


@pytest.mark.parametrize(
    "proxy",
    ["http://[secret", "http://u:secret@[::1", "http://", "h:3128", "10.0.0.1:3128", "ftp://h", "http://h:x"],
)
def test_what_is_no_proxy_is_refused(proxy: str) -> None:
    way = Transport(parse_reference("a.example/app"), None, False, Patience(), {"https": proxy})
    with pytest.raises(RegistryFailed, match="names no proxy: mend or unset it") as raised:
        way._send("GET", "https://a.example/", {})
    assert "secret" not in str(raised.value)


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


def test_a_connection_that_comes_after_an_interruption_ends() -> None:
    """It is made here while the request is on its way, past the question whether there may be any."""

    @contextmanager
    def interrupting() -> Iterator[io.BytesIO]:
        way.interrupt()
        yield io.BytesIO(b"body")

    with socket.create_server(("127.0.0.1", 0)) as silent:
        name = f"127.0.0.1:{silent.getsockname()[1]}"
        way = Transport(parse_reference(f"{name}/app"), None, True, Patience(stored_s=1), {})
        with pytest.raises(Transient, match="cuts connections"):
            way.request("PUT", f"http://{name}/", (), {}, Upload(4, interrupting))
        way.close()


def _anonymous(protocol: int) -> ssl.SSLContext:
    """TLS without certificates."""
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("AECDH-AES256-SHA:@SECLEVEL=0")
    return context


def test_an_interrupted_connection_does_not_forget_tls() -> None:
    """Who is sending there would go on in the open."""
    ours, theirs = socket.socketpair()
    served: list[ssl.SSLSocket] = []
    server = _anonymous(ssl.PROTOCOL_TLS_SERVER)
    thread = threading.Thread(target=lambda: served.append(server.wrap_socket(theirs, server_side=True)))
    thread.start()
    with _anonymous(ssl.PROTOCOL_TLS_CLIENT).wrap_socket(ours) as connected:
        thread.join()
        connections = transport._Connections()
        connections.add(connected)
        connections.end()
        assert connected.version() == "TLSv1.2"
        with pytest.raises(OSError):
            connected.sendall(b"secret")
    served[0].close()


def test_connections_may_come_while_all_are_ended() -> None:
    connections = transport._Connections()
    # Never opened: as many as are needed for the two threads to meet.
    coming = [socket.socket.__new__(socket.socket) for _ in range(20_000)]
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=lambda: [connections.add(connected) for connected in coming])
    thread.start()
    try:
        while thread.is_alive():
            connections.end()
    finally:
        sys.setswitchinterval(interval_s)
        thread.join()


def test_sending_may_stall_as_long_as_reading() -> None:
    """Longer than a connection may take to be made; also on one that is there already."""
    allowed_s: list[float | None] = []

    class Body(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            allowed_s.extend(connected.gettimeout() for connected in way._connections._sockets)
            return super().read(size)

    def answer() -> None:
        connected, _ = server.accept()
        with connected, connected.makefile("rb") as asked:
            for _ in range(2):
                while asked.readline().strip():
                    pass
                asked.read(4)
                connected.sendall(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        name = f"127.0.0.1:{server.getsockname()[1]}"
        way = Transport(parse_reference(f"{name}/app"), None, True, Patience(stall_s=77), {})
        for _ in range(2):
            way.drop(way.request("PUT", f"http://{name}/", (), {}, Upload(4, lambda: Body(b"body"))))
        thread.join()
        way.close()
    assert len(allowed_s) >= 2 and set(allowed_s) == {77}
