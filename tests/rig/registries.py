"""Debian's docker-registry on this machine, and a proxy before it that does what networks do. Blocking.

A `Proxy` hands each request on, and its answer back through the first `Fault` that fits: cut, slowed,
corrupted, replaced. It can want tokens too (`Proxy.wants_tokens`), which it then gives out itself, at /token.
"""

import base64
import http.client
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from rig.mounts import wait_until

__all__ = [
    "BLOBS",
    "IDENTITY_TOKEN",
    "PASSWORD",
    "TOOLS",
    "USER",
    "Answer",
    "DockerRegistry",
    "Fault",
    "Proxy",
    "docker_registry",
    "hold_back",
    "proxy_of",
    "skopeo",
]

TOOLS = ("docker-registry", "openssl", "skopeo")

BLOBS = r"GET .*/blobs/"
"""What asks for a blob, or a part of one."""

USER, PASSWORD = "someone", "s3cret-pass"
IDENTITY_TOKEN = "s3cret-pass-as-token"
"""What some registries give at log-in, to be kept instead of the password."""
_HASHED = "$2b$05$abcdefghijklmnopqrstuuV7fpPozvyqJfnY19y0802WTlXUm6Rjy"
"""PASSWORD, as htpasswd -B would write it."""


@dataclass(frozen=True, slots=True)
class DockerRegistry:
    port: int

    @property
    def name(self) -> str:
        return f"127.0.0.1:{self.port}"

    def fill(self, source: str, repository: str, *options: str) -> str:
        """Has skopeo copy an image into it; the reference it has now."""
        reference = f"{self.name}/{repository}"
        skopeo("copy", "--dest-tls-verify=false", *options, source, f"docker://{reference}")
        return reference


def skopeo(*arguments: str) -> str:
    done = subprocess.run(["skopeo", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"skopeo {arguments}: {done.stderr}"
    return done.stdout


@contextmanager
def docker_registry(
    base: Path, *, wants_password: bool = False, has_tls: bool = False, wants_certificate: bool = False
) -> Iterator[DockerRegistry]:
    """One on a free port, empty at first. `has_tls`: with a certificate of its own, `base`/certificate.
    `wants_certificate`: then others have to show it too."""
    base.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    clients = f", clientcas: ['{base}/certificate']" if wants_certificate else ""
    tls = f", tls: {{certificate: {base}/certificate, key: {base}/key{clients}}}" if has_tls else ""
    config = (
        "version: 0.1\nlog: {level: warn}\n"
        f"storage: {{filesystem: {{rootdirectory: {base}/data}}}}\nhttp: {{addr: '127.0.0.1:{port}'{tls}}}\n"
    )
    if has_tls:
        _make_certificate(base)
    if wants_password:
        (base / "htpasswd").write_text(f"{USER}:{_HASHED}\n")
        config += f"auth: {{htpasswd: {{realm: test, path: {base}/htpasswd}}}}\n"
    (base / "config.yml").write_text(config)
    with (
        open(base / "log", "wb") as log,
        subprocess.Popen(
            [shutil.which("docker-registry") or "docker-registry", "serve", base / "config.yml"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        ) as process,
    ):
        try:
            wait_until(lambda: process.poll() is not None or _answers(port))
            assert process.poll() is None, (base / "log").read_text()
            yield DockerRegistry(port)
        finally:
            process.terminate()


def _make_certificate(base: Path) -> None:
    options = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -addext subjectAltName=IP:127.0.0.1"
    command = ["openssl", *options.split(), "-keyout", base / "key", "-out", base / "certificate"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@dataclass(slots=True)
class Answer:
    """What goes back; a fault changes it."""

    status: int
    headers: dict[str, str]
    body: bytes
    cut_at: int | None = None
    """Bytes of the body after which the connection ends."""
    cut_before: bool = False
    """The connection ends without an answer."""
    pause_s: float = 0
    """Between pieces of 64 KiB."""
    stalls_at: int | None = None
    """Bytes of the body after which nothing comes any more."""


@dataclass(slots=True)
class Fault:
    """What happens to answers whose ``METHOD PATH`` has a match of `where`, `times` times."""

    where: str
    do: Callable[[Answer], None]
    times: int = 1 << 30
    forget_range: bool = False
    """The registry is not told of the Range."""
    done: int = 0


@dataclass(slots=True)
class Seen:
    """A request that came by: known before its answer goes, since whoever has the answer may ask at once."""

    method: str
    path: str
    headers: dict[str, str]
    status: int
    sent: int = 0
    """Bytes of the body that went back, or are just going."""


@dataclass
class Proxy:
    port: int
    faults: list[Fault] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    wants_tokens: bool = False
    allows_anonymous: bool = True
    token_lives: int = 1 << 30
    """Requests that one token is good for."""
    hosts: set[str] = field(default_factory=set)
    """For which it was asked as an http proxy: all are the one registry."""
    scopes: list[str] = field(default_factory=list)
    """That tokens were asked for, each request's sorted and joined."""
    released: threading.Event = field(default_factory=threading.Event)
    """Set: who stalls goes on (and ends)."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    _tokens: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"127.0.0.1:{self.port}"

    def requests(self, where: str) -> list[Seen]:
        return [seen for seen in self.seen if re.search(where, f"{seen.method} {seen.path}")]

    def fetched(self) -> int:
        """Bytes of blobs that went back."""
        return sum(seen.sent for seen in self.requests(BLOBS) if seen.status in (200, 206))

    def challenge(self) -> str:
        return f'Bearer realm="http://{self.name}/token",service="test"'

    def accepts(self, authorization: str) -> bool:
        """Uses up one of the token's lives."""
        token = authorization.removeprefix("Bearer ")
        with self.lock:
            left = self._tokens.get(token, 0)
            self._tokens[token] = left - 1
            return left > 0

    def give_token(self, authorization: str, query: str) -> tuple[int, bytes]:
        pair = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        fields = parse_qs(query)
        knows = authorization == f"Basic {pair}" or fields.get("refresh_token") == [IDENTITY_TOKEN]
        if not knows and (authorization or "refresh_token" in fields or not self.allows_anonymous):
            return 401, b'{"errors":[{"code":"UNAUTHORIZED"}]}'
        with self.lock:
            self.scopes.append(" ".join(sorted(fields.get("scope", []))))
            token = f"t0ken-{len(self._tokens)}"
            self._tokens[token] = self.token_lives
        return 200, json.dumps({"token": token}).encode()


def hold_back(proxy: Proxy, other: Callable[[Answer], None] = lambda answer: None) -> Fault:
    """Has the registry refuse what fetches blobs from their beginning, as the completion of lazy layers does.

    `other` is done to all other answers with parts of blobs.
    """

    def refuse(answer: Answer) -> None:
        if answer.headers.get("Content-Range", "").startswith("bytes 0-"):
            answer.status = 503
        else:
            other(answer)

    fault = Fault(BLOBS, refuse)
    proxy.faults.append(fault)
    return fault


@contextmanager
def proxy_of(upstream: int, *, host: str = "127.0.0.1") -> Iterator[Proxy]:
    """A proxy before what listens on port `upstream`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            url = urlsplit(self.path)
            if url.netloc:  # we are asked as a proxy for http
                proxy.hosts.add(url.netloc)
                self.path = self.path.partition(url.netloc)[2]
            if url.path == "/token":
                form = body.decode() if self.command == "POST" else url.query
                status, data = proxy.give_token(self.headers.get("Authorization", ""), form)
                return self._answer(Answer(status, {"Content-Type": "application/json"}, data))
            if proxy.wants_tokens and not proxy.accepts(self.headers.get("Authorization", "")):
                return self._answer(Answer(401, {"WWW-Authenticate": proxy.challenge()}, b""))
            with proxy.lock:
                fitting = (f for f in proxy.faults if f.done < f.times and re.search(f.where, self._line))
                fault = next(fitting, None)
                if fault is not None:
                    fault.done += 1
            answer = self._ask(body, forget_range=fault is not None and fault.forget_range)
            if fault is not None:
                fault.do(answer)
            return self._answer(answer)

        do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = _any

        @property
        def _line(self) -> str:
            return f"{self.command} {self.path}"

        def _ask(self, body: bytes, *, forget_range: bool) -> Answer:
            headers = {
                key: value
                for key, value in self.headers.items()
                if not (forget_range and key == "Range")
                and not (proxy.wants_tokens and key == "Authorization")
            }
            connection = http.client.HTTPConnection("127.0.0.1", upstream, timeout=30)
            try:
                connection.request(self.command, self.path, body, headers)
                response = connection.getresponse()
                data = response.read()
                kept = {
                    key: value
                    for key, value in response.getheaders()
                    if key.lower() not in ("content-length", "date", "connection", "transfer-encoding")
                }
                return Answer(response.status, kept, data)
            finally:
                connection.close()

        def _answer(self, answer: Answer) -> None:
            seen = Seen(self.command, self.path, dict(self.headers.items()), answer.status)
            proxy.seen.append(seen)
            with suppress(OSError):  # the other side had enough
                if not answer.cut_before:
                    self._write(answer, seen)
            if answer.cut_before or answer.cut_at is not None or answer.stalls_at is not None:
                self.close_connection = True
                with suppress(OSError):  # the other side has
                    self.connection.shutdown(socket.SHUT_RDWR)

        def _write(self, answer: Answer, seen: Seen) -> None:
            self.send_response_only(answer.status)
            for key, value in answer.headers.items():
                self.send_header(key, value)
            if "Transfer-Encoding" not in answer.headers and "Content-Length" not in answer.headers:
                self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            end = min(x for x in (answer.cut_at, answer.stalls_at, len(answer.body)) if x is not None)
            for start in range(0, end, 64 << 10):
                piece = answer.body[start : min(start + (64 << 10), end)]
                seen.sent += len(piece)
                self.wfile.write(piece)
                time.sleep(answer.pause_s)
            if answer.stalls_at is not None:
                proxy.released.wait(60)

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            if not isinstance(sys.exc_info()[1], OSError):  # as when the other side goes away
                super().handle_error(request, client_address)

    server = Server((host, 0), Handler)
    proxy = Proxy(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield proxy
    finally:
        proxy.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
