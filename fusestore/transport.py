"""Requests to a registry: origin, rights, redirects, and what a failure means. Blocking; knows no repository.

Plain http is spoken only where it was asked for, and with a registry on this machine itself where no TLS
answers. That goes for where the registry sends us, too: redirects and the servers of tokens.

Rules a maintainer must not break. The Authorization header goes to the registry's own origin and nowhere else
(redirects lead to stores of others, with the right to read in the URL); user and password go there and to the
realm that its challenge names. Where a URL leads is read by urllib3's parser alone, which sends too: two
that disagree are a way around these rules. No error and no log has a header, a URL's query, or what a
library's exception says, as that may quote them.

Thread-safe.
"""

import base64
import contextlib
import email.utils
import http.client
import json
import logging
import random
import re
import socket
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote, urlencode, urljoin
from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection, port_by_scheme
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    LocationValueError,
    NameResolutionError,
    NewConnectionError,
    ProxyError,
    ReadTimeoutError,
    SSLError,
)
from urllib3.util import Url, parse_url
from urllib3.util.ssl_ import create_urllib3_context
from urllib3.util.ssltransport import SSLTransport

from .certificates import Certificates, find_certificates
from .credentials import Credentials
from .errors import AccessDenied, BadInput, NotFound, RegistryFailed
from .reference import Reference, is_loopback

__all__ = ["Patience", "Response", "Transient", "Transport", "Tries", "Upload", "read_some"]

# It logs URLs whole.
logging.getLogger("urllib3.connectionpool").setLevel(logging.CRITICAL)

T = TypeVar("T")
Response = urllib3.BaseHTTPResponse

_READ = 128 << 10
_REDIRECTS_MAX = 5
_ANSWER_MAX = 1 << 20
"""Bytes of a token server's answer and of an error's body."""
_CONNECT_S = 10
_CONNECTIONS = 8
_ERROR_CODE = re.compile(r"[A-Z][A-Z_]{2,40}")
_TOKEN = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to believe that a registry will answer."""

    attempts: int = 5
    """In a row, of one request or of one blob that does not get on."""
    pause_s: float = 0.5
    """After the first attempt; doubled after each other."""
    pause_max_s: float = 60
    """Also the longest Retry-After that is waited for."""
    stall_s: float = 30
    """Without a byte, until a connection is given up."""
    stored_s: float = 600
    """Until the answer to an upload: some registries copy it first."""


class Transient(Exception):
    """What may go better the next time. `str()` continues a sentence that begins with the registry's name."""

    def __init__(self, what: str, retry_after_s: float | None = None) -> None:
        super().__init__(what)
        self.retry_after_s = retry_after_s


class Tries:
    """Counts failures, and waits after each."""

    def __init__(self, registry: str, patience: Patience, stopped: threading.Event) -> None:
        self._registry = registry
        self._patience = patience
        self._stopped = stopped
        self._failures = 0

    def failed(self, error: Transient) -> None:
        """Raises RegistryFailed where that was once too often."""
        self._failures += 1
        if self._failures >= self._patience.attempts:
            raise RegistryFailed(
                f"{self._registry} {error}, {self._failures} times in a row: try again later"
            ) from None
        pause_s = error.retry_after_s
        if pause_s is None:
            pause_s = self._patience.pause_s * 2 ** (self._failures - 1) * random.uniform(0.5, 1)
            pause_s = min(pause_s, self._patience.pause_max_s)
        elif pause_s > self._patience.pause_max_s:
            raise RegistryFailed(
                f"{self._registry} {error} and wants no request for {pause_s:.0f} s: try again then"
            ) from None
        if self._stopped.wait(pause_s):
            raise RegistryFailed("interrupted") from None

    def worked(self) -> None:
        self._failures = 0


class _Body(Protocol):
    def read(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Upload:
    """What is sent: `size` bytes of what `open` gives, once for each attempt. What its `read` raises passes,
    but for OSError."""

    size: int
    open: Callable[[], AbstractContextManager[_Body]]


class Transport:
    """The way to one registry. Whoever makes it closes it; nothing is asked before the first request."""

    def __init__(
        self,
        reference: Reference,
        credentials: Credentials | None,
        plain_http: bool,
        patience: Patience,
        proxies: Mapping[str, str],
        certificate_directories: Sequence[str] = (),
    ) -> None:
        self._reference = reference
        self._credentials = credentials
        self._certificate_directories = certificate_directories
        self._plain_http = plain_http
        self._patience = patience
        self.name = reference.registry
        self._proxies = proxies
        self._pools: dict[tuple[str, str], urllib3.PoolManager] = {}
        """By the URL of the proxy, "" for none, and the host, "" for those without certificates."""
        self._certificates: dict[str, Certificates | None] = {}
        """By host."""
        self._lock = threading.Lock()
        """Of the origin and the authorizations."""
        self._origin = ""
        self._authorizations: dict[tuple[str, ...], str] = {}
        self._connections = _Connections()
        self._stopped = threading.Event()

    def close(self) -> None:
        """Idempotent."""
        for pools in self._pools.values():
            pools.clear()

    def interrupt(self) -> None:
        """Has everything that waits in other threads fail soon. There is no way back."""
        self._stopped.set()
        self._connections.end()

    def tries(self) -> Tries:
        return Tries(self.name, self._patience, self._stopped)

    def again(self, attempt: Callable[[], T]) -> T:
        """What `attempt` returns, once it raises no Transient. Raises RegistryFailed."""
        tries = self.tries()
        while True:
            try:
                return attempt()
            except Transient as error:
                tries.failed(error)

    def url(self, path: str) -> str:
        """Of a path at the registry; a whole URL stays as it is. Raises Transient where nothing answers."""
        return self._joined(self._base(), path)

    def with_query(self, url: str, fields: Iterable[tuple[str, str]]) -> str:
        """A whole URL with these besides what it asks already. Raises RegistryFailed."""
        separator = "&" if self._parsed(url).query else "?"
        return f"{url}{separator}{urlencode(tuple(fields))}"

    def _joined(self, base: str, location: str) -> str:
        try:
            return urljoin(base, location)
        except ValueError:
            raise self._lost() from None

    def _lost(self) -> RegistryFailed:
        return RegistryFailed(f"{self.name} sends us to no address: check the name")

    def request(
        self,
        method: str,
        url: str,
        scopes: tuple[str, ...],
        headers: Mapping[str, str],
        body: bytes | Upload | None = None,
    ) -> Response:
        """One request, answered with success; its body is still to be read or dropped.

        `scopes`: the rights that it needs, in the words of distribution's token specification. Raises
        Transient, NotFound for 404, AccessDenied for 401 and 403, RegistryFailed.
        """
        authorization = self._authorizations.get(scopes, "")
        response = self._follow(method, url, headers, authorization, body)
        if response.status == HTTPStatus.UNAUTHORIZED:
            challenges = response.headers.getlist("www-authenticate")
            self.drop(response)
            authorization = self._authorize(challenges, scopes, authorization)
            response = self._follow(method, url, headers, authorization, body)
        if not 200 <= response.status < 300:
            raise self._refusal(response)
        return response

    def read(self, response: Response, limit: int) -> bytes:
        """The whole body, which is closed. Raises Transient; RegistryFailed where it is longer."""
        pieces, left = [], limit
        # With nothing left to read the connection is in the pool again, and not closed.
        with contextlib.closing(response):
            try:
                while data := response.read1(_READ):
                    left -= len(data)
                    if left < 0:
                        raise RegistryFailed(
                            f"{self.name} sends a document of over {limit} bytes: no image needs that much"
                        )
                    pieces.append(data)
            except (HTTPError, OSError) as error:
                raise _meaning(error) from None
        return b"".join(pieces)

    def drop(self, response: Response) -> None:
        """Reads what little there is, for the connection to be used again."""
        with contextlib.suppress(Transient, RegistryFailed):
            self.read(response, _ANSWER_MAX)

    # Sending

    def _follow(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        authorization: str,
        body: bytes | Upload | None,
    ) -> Response:
        """The answer, after redirects."""
        own = _origin_of(self._parsed(self._base()))
        for _ in range(_REDIRECTS_MAX):
            is_own = authorization and _origin_of(self._parsed(url)) == own
            sent = {**headers, "Authorization": authorization} if is_own else headers
            response = self._send(method, url, sent, body)
            location = response.headers.get("location")
            if not 301 <= response.status <= 308 or location is None:
                return response
            self.drop(response)
            if method not in ("GET", "HEAD"):
                raise RegistryFailed(f"{self.name} wants uploads sent elsewhere: give the name it has there")
            url = self._joined(url, location)
        raise RegistryFailed(f"{self.name} sends us round in circles: check the name")

    def _send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | Upload | None = None
    ) -> Response:
        parts = self._parsed(url)
        self._require_safe(parts)
        if self._stopped.is_set():
            raise RegistryFailed("interrupted")
        sent = {"User-Agent": "fusestore", "Accept-Encoding": "identity", **headers}
        with contextlib.ExitStack() as stack:
            content: bytes | _Body | None
            wait_s = self._patience.stall_s
            if isinstance(body, Upload):
                content = stack.enter_context(body.open())
                sent["Content-Length"] = str(body.size)
                wait_s = self._patience.stored_s
            else:
                content = body
            try:
                return self._pools_for(parts).request(
                    method, url, body=content, headers=sent,  # type: ignore[arg-type]
                    redirect=False, preload_content=False, decode_content=False,
                    timeout=urllib3.Timeout(connect=_CONNECT_S, read=wait_s),
                )  # fmt: skip
            except LocationValueError:
                raise self._lost() from None
            except (HTTPError, UnicodeError) as error:
                if _is_distrust(error):
                    raise RegistryFailed(
                        f"the certificate of {self.name} is not believed: have its authority's installed"
                        f" (update-ca-certificates), or in /etc/containers/certs.d/{parts.netloc}"
                    ) from None
                raise _meaning(error) from None

    def _pools_for(self, url: Url) -> urllib3.PoolManager:
        """Raises BadInput for certificates that cannot be used."""
        proxy, host = self._proxies.get(url.scheme or "", ""), url.netloc or ""
        if is_loopback(url.host or "") or proxy_bypass_environment(host, dict(self._proxies)):
            proxy = ""
        if host not in self._certificates:
            self._certificates[host] = find_certificates(host, self._certificate_directories)
        certificates = self._certificates[host]
        key = proxy, host if certificates else ""
        if key in self._pools:
            return self._pools[key]
        context = _make_context(certificates) if certificates else None
        return self._pools.setdefault(
            key, _make_pools(proxy, context, self._patience.stall_s, self._connections)
        )

    def _parsed(self, url: str) -> Url:
        """Raises RegistryFailed where it names no host, or has what parsers disagree on: user, backslash."""
        try:
            parts = parse_url(url)
        except LocationValueError:
            raise self._lost() from None
        if not parts.host or parts.auth is not None or "\\" in url:
            raise self._lost()
        return parts

    def _require_safe(self, url: Url) -> None:
        """Refuses what would cross a network in the open."""
        if url.scheme == "https":
            return
        is_here = is_loopback(self.name) and is_loopback(url.host or "")
        if url.scheme != "http" or not (self._plain_http or is_here):
            raise RegistryFailed(f"{self.name} sends us where there is no TLS: allow that with --plain-http")

    def _base(self) -> str:
        """The registry's scheme and host. Raises Transient where nothing answers."""
        with self._lock:
            if not self._origin:
                is_plain = self._plain_http or (is_loopback(self.name) and not self._speaks_tls())
                self._origin = f"{'http' if is_plain else 'https'}://{self._reference.host}"
            return self._origin

    def _speaks_tls(self) -> bool:
        try:
            self._send("HEAD", f"https://{self._reference.host}/v2/", {}).close()
        except _NoTLS:
            return False
        return True

    def _refusal(self, response: Response) -> Exception:
        """What an answer without success means; closes it."""
        status, code = response.status, self._error_code(response)
        shown = f"answers {status}" + (f" {code}" if code else "")
        if status == HTTPStatus.NOT_FOUND:
            return NotFound(f"{self.name} {shown}")
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            return AccessDenied(
                f"{self.name} does not let you have or change {self._reference.repository}: check the name,"
                " or log in with podman login or docker login"
            )
        if status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS) or status >= 500:
            return Transient(shown, _retry_after_s(response.headers.get("retry-after")))
        return RegistryFailed(f"{self.name} {shown}: it does not take this request, check the name")

    def _error_code(self, response: Response) -> str:
        """The first code of the distribution-spec in the body; "" if there is none."""
        try:
            code = json.loads(self.read(response, _ANSWER_MAX))["errors"][0]["code"]
        except (Transient, RegistryFailed, ValueError, KeyError, IndexError, TypeError, RecursionError):
            return ""
        return code if isinstance(code, str) and _ERROR_CODE.fullmatch(code) else ""

    # Rights

    def _authorize(self, challenges: Iterable[str], scopes: tuple[str, ...], refused: str) -> str:
        """An Authorization header for `scopes`, after one (or none, "") was refused."""
        with self._lock:
            known = self._authorizations.get(scopes, "")
            if known and known != refused:
                return known  # another thread was quicker
            header = self._answer(challenges, scopes)
            self._authorizations[scopes] = header
            return header

    def _answer(self, challenges: Iterable[str], scopes: tuple[str, ...]) -> str:
        """RFC 6750, RFC 7617, and distribution's token specification."""
        found = dict(_parse_challenges(challenges))
        if "bearer" in found:
            return f"Bearer {self._token(found['bearer'], scopes)}"
        if "basic" in found and self._credentials is not None:
            return _basic(self._credentials)
        return ""

    def _token(self, challenge: Mapping[str, str], scopes: tuple[str, ...]) -> str:
        realm, service = self._joined(self._origin, challenge.get("realm", "")), challenge.get("service", "")
        fields = [("service", service)] if service else []
        credentials = self._credentials
        if credentials is not None and credentials.identity_token:
            fields += [("scope", " ".join(scopes)), ("client_id", "fusestore")]
            fields += [("grant_type", "refresh_token"), ("refresh_token", credentials.identity_token)]
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            response = self._send("POST", realm, headers, urlencode(fields).encode())
        else:
            fields += [("scope", scope) for scope in scopes]
            headers = {"Authorization": _basic(credentials)} if credentials is not None else {}
            response = self._send("GET", self.with_query(realm, fields), headers)
        if response.status != HTTPStatus.OK:
            raise self._refusal(response)
        try:
            answer = json.loads(self.read(response, _ANSWER_MAX))
            token = answer.get("token") or answer.get("access_token")
        except (ValueError, AttributeError, RecursionError):
            token = None
        if not isinstance(token, str) or not _TOKEN.fullmatch(token):
            raise RegistryFailed(f"the token server of {self.name} gives no token: try again later")
        return token


class _NoTLS(Transient):
    """Something answers, but not in TLS."""


def read_some(response: Response, size: int) -> bytes:
    """At least one byte. Raises Transient, at the end too: who asks expects more."""
    try:
        data = response.read1(size)
    except (HTTPError, OSError) as error:
        raise _meaning(error) from None
    if not data:
        raise Transient("cuts connections")
    return data


class _Connections:
    """Those of all pools, to be ended from another thread: what urllib3 can end is only an answer's body.

    Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        """Of the other two."""
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._is_over = False

    def add(self, connected: socket.socket | SSLTransport) -> None:
        """Ends it at once if the others have been."""
        below = connected.socket if isinstance(connected, SSLTransport) else connected
        with self._lock:
            self._sockets.add(below)
            is_over = self._is_over
        if is_over:
            _shut(below)

    def end(self) -> None:
        with self._lock:
            self._is_over = True
            found = tuple(self._sockets)
        for connected in found:
            _shut(connected)


def _shut(connected: socket.socket) -> None:
    """Has who reads or writes there fail."""
    with contextlib.suppress(OSError):
        # An SSLSocket's own would first forget TLS, and what another thread sends then goes out in the open.
        socket.socket.shutdown(connected, socket.SHUT_RDWR)


def _parse_proxy(url: str) -> Url:
    """Raises RegistryFailed."""
    with contextlib.suppress(LocationValueError):
        parts = parse_url(url)
        if parts.host and parts.scheme in ("http", "https"):
            return parts
    raise RegistryFailed("https_proxy or http_proxy names no proxy: mend or unset it")


def _make_context(certificates: Certificates) -> ssl.SSLContext:
    """Raises BadInput."""
    context = create_urllib3_context()
    context.load_default_certs()
    path = ""
    try:
        for path in certificates.authorities:
            context.load_verify_locations(path)
        for path, key in certificates.own:
            context.load_cert_chain(path, key, password="")
    except OSError as error:  # what ssl raises too
        reason = f" ({error.strerror})" if not isinstance(error, ssl.SSLError) else ""
        raise BadInput(
            f"{path} cannot be used{reason}: put a certificate there in PEM, or remove it"
        ) from None
    return context


def _make_pools(
    proxy: str, context: ssl.SSLContext | None, stall_s: float, connections: _Connections
) -> urllib3.PoolManager:
    """`proxy`: its URL, or "". `context`: None for what the system believes. `stall_s`: until sending is
    given up, for which urllib3 has no timeout.

    Raises RegistryFailed.
    """

    class Plain(HTTPConnection):
        def connect(self) -> None:
            super().connect()
            self.sock.settimeout(stall_s)
            connections.add(self.sock)

        def request(self, *args: Any, **options: Any) -> None:
            if self.sock is not None:  # a new one of TLS, or one that is used again
                self.timeout = stall_s
            super().request(*args, **options)

    class TLS(Plain, HTTPSConnection):
        pass

    class PlainPool(urllib3.HTTPConnectionPool):
        ConnectionCls = Plain

    class TLSPool(urllib3.HTTPSConnectionPool):
        ConnectionCls = TLS

    if proxy:
        user = _parse_proxy(proxy).auth
        headers = urllib3.make_headers(proxy_basic_auth=unquote(user)) if user else None
        pools: urllib3.PoolManager = urllib3.ProxyManager(
            proxy, maxsize=_CONNECTIONS, retries=False, proxy_headers=headers, ssl_context=context
        )
    else:
        pools = urllib3.PoolManager(maxsize=_CONNECTIONS, retries=False, ssl_context=context)
    pools.pool_classes_by_scheme = {"http": PlainPool, "https": TLSPool}
    return pools


def _basic(credentials: Credentials) -> str:
    pair = f"{credentials.user}:{credentials.password}".encode()
    return f"Basic {base64.b64encode(pair).decode()}"


def _origin_of(url: Url) -> tuple[str | None, str | None, int | None]:
    """RFC 6454, 4."""
    return url.scheme, url.host, url.port or port_by_scheme.get(url.scheme or "")


def _is_distrust(error: Exception) -> bool:
    return (
        isinstance(error, SSLError)
        and bool(error.args)
        and isinstance(error.args[0], ssl.SSLCertVerificationError)
    )


def _meaning(error: Exception) -> Transient:
    """What a library's error says, without its text."""
    if isinstance(error, SSLError):
        return _NoTLS("does not speak TLS")
    if isinstance(error, ProxyError):
        return Transient("cannot be reached through the proxy")
    if isinstance(error, NameResolutionError):
        return Transient("has no address")
    # Before the next one, of which it is a kind.
    if isinstance(error, NewConnectionError):
        return Transient("cannot be reached")
    if isinstance(error, ReadTimeoutError | ConnectTimeoutError | TimeoutError):
        return Transient("does not answer in time")
    cause = error.args[-1] if error.args else None
    if isinstance(cause, ConnectionResetError | http.client.RemoteDisconnected):
        return _NoTLS("cuts connections")
    return Transient("cuts connections")


def _retry_after_s(text: str | None) -> float | None:
    """RFC 9110, 10.2.3: seconds or a date."""
    if text is None:
        return None
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _parse_challenges(headers: Iterable[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """RFC 9110, 11.6.1: scheme in lower case → parameters."""
    for header in headers:
        for challenge in re.split(r",\s*(?=(?:Bearer|Basic)\s)", header, flags=re.IGNORECASE):
            scheme, _, rest = challenge.strip().partition(" ")
            yield scheme.lower(), dict(re.findall(r'([A-Za-z0-9_-]+)\s*=\s*"([^"]*)"', rest))
