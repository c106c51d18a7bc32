"""Pulls from Debian's docker-registry through a proxy that does what networks and registries do at times.

Each ends with the right bytes, or with one line that says what to do, and nothing kept but what the next goes
on from.
"""

import email.utils
import os
import random
import re
import secrets
import socketserver
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from rig.mounts import wait_until
from rig.registries import IDENTITY_TOKEN, PASSWORD, USER, Answer, DockerRegistry, Fault, Proxy, proxy_of
from rig.stores import open_at
from rig.tinyimages import make_layout

from fusestore.check import check
from fusestore.credentials import Credentials
from fusestore.errors import AccessDenied, FusestoreError, LayerRefused, NotFound, RegistryFailed
from fusestore.store import Image, Store
from fusestore.transfer import RegistryOptions, pull, push
from fusestore.transport import Patience

pytestmark = pytest.mark.images

BLOB_SIZE = 1 << 20
LOGIN = Credentials(USER, PASSWORD)
QUICK = Patience(attempts=4, pause_s=0.01, pause_max_s=3, stall_s=0.4)
SECRETS = re.compile(rf"{PASSWORD}|t0ken|Bearer|Basic|secret-in-the-url", re.IGNORECASE)


@dataclass(frozen=True)
class Pushed:
    """An image in the registry, of one small layer and a big one that cannot be compressed."""

    id: str
    repository: str
    source: str


@pytest.fixture(scope="session")
def pushed(registry: DockerRegistry, area: Path) -> Pushed:
    content = random.Random(1).randbytes(BLOB_SIZE)
    image_id = make_layout(area / "faulty", "app", [{"small": b"small"}, {"big": content}])
    registry.fill(f"oci:{area}/faulty:app", "faults/app:1")
    return Pushed(image_id, "faults/app", f"oci:{area}/faulty:app")


@pytest.fixture
def proxy(registry: DockerRegistry, pushed: Pushed) -> Iterator[Proxy]:
    with proxy_of(registry.port) as running:
        yield running


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_at(tmp_path) as opened:
        yield opened


def _pull(store: Store, proxy: Proxy, ref: str = "faults/app:1", **options: object) -> Image:
    return pull(
        store, f"{proxy.name}/{ref}", options=RegistryOptions(patience=QUICK, **options)  # type: ignore[arg-type]
    )  # fmt: skip


def _keeps_nothing(store: Store) -> None:
    assert store.images() == []
    for directory in ("blobs/sha256", "layers", "images", "tmp", "trash"):
        assert os.listdir(f"{store.path}/{directory}") == []


def _downloads(store: Store) -> list[str]:
    path = f"{store.path}/downloads"
    return os.listdir(path) if os.path.isdir(path) else []


# What is done to an answer


def _cut_at(count: int) -> Callable[[Answer], None]:
    def do(answer: Answer) -> None:
        answer.cut_at = count

    return do


def _stall_at(count: int) -> Callable[[Answer], None]:
    def do(answer: Answer) -> None:
        answer.stalls_at = count

    return do


def _cut_before(answer: Answer) -> None:
    answer.cut_before = True


def _slow(answer: Answer) -> None:
    answer.pause_s = 0.02


def _flip(place: int) -> Callable[[Answer], None]:
    def do(answer: Answer) -> None:
        body = bytearray(answer.body)
        body[place] ^= 1
        answer.body = bytes(body)

    return do


def _status(status: int, **headers: str) -> Callable[[Answer], None]:
    def do(answer: Answer) -> None:
        answer.status = status
        answer.headers = {key.replace("_", "-"): value for key, value in headers.items()}
        answer.body = b'{"errors":[{"code":"TOOMANYREQUESTS","message":"secret-in-the-url"}]}'

    return do


def _in_a_second(answer: Answer) -> None:
    when = email.utils.formatdate(time.time() + 1, usegmt=True)
    _status(503, Retry_After=when)(answer)


def _misplace(answer: Answer) -> None:
    answer.headers["Content-Range"] = f"bytes 7-{len(answer.body) + 6}/{len(answer.body) + 7}"


def _lengthen(answer: Answer) -> None:
    answer.body += b"more"


def _lengthen_unsaid(answer: Answer) -> None:
    """Chunked: nothing says how long it is."""
    data = answer.body + b"more"
    answer.body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data)
    answer.headers["Transfer-Encoding"] = "chunked"


def _shorten(answer: Answer) -> None:
    answer.body = answer.body[:-1]


def _html(answer: Answer) -> None:
    answer.body = b"<html>Please log in to the hotel's network</html>"
    answer.headers = {"Content-Type": "text/html"}


def _huge(answer: Answer) -> None:
    answer.body = b" " * ((4 << 20) + 1)


def _to(url: str) -> Callable[[Answer], None]:
    def do(answer: Answer) -> None:
        answer.status, answer.headers, answer.body = 307, {"Location": url}, b""

    return do


BLOBS = "^GET .*/blobs/"
MANIFESTS = "^GET .*/manifests/"
K = 1 << 10

SURVIVED = {
    "a blob is cut": [Fault(BLOBS, _cut_at(300 * K), 3)],
    "a blob is cut every 100 K": [Fault(BLOBS, _cut_at(100 * K))],
    "a blob is cut before its first byte": [Fault(BLOBS, _cut_at(0), 3)],
    "a blob is cut, and Range is not known": [
        Fault(BLOBS, _cut_at(300 * K), 3),
        Fault(BLOBS, lambda _: None, forget_range=True),
    ],
    "no answer": [Fault(BLOBS, _cut_before, 3), Fault(MANIFESTS, _cut_before, 3)],
    "slow": [Fault(BLOBS, _slow)],
    "stalls": [Fault(BLOBS, _stall_at(300 * K), 2)],
    "429": [
        Fault(BLOBS, _status(429, Retry_After="1"), 1),
        Fault(MANIFESTS, _status(429, Retry_After="0"), 3),
    ],
    "503 with a date": [Fault(MANIFESTS, _in_a_second, 1)],
    "500, 502, 503": [Fault(MANIFESTS, _status(status), 1) for status in (500, 502, 503)],
    "504, 408": [Fault(BLOBS, _status(status), 1) for status in (504, 408)],
    "a Retry-After that is none": [Fault(MANIFESTS, _status(503, Retry_After="soon"), 2)],
    "a manifest is corrupted once": [Fault(MANIFESTS, _flip(20), 1)],
    "a manifest is cut": [Fault(MANIFESTS, _cut_at(20), 2)],
    "a config is corrupted once": [Fault(BLOBS, _flip(5), 1)],
}


@pytest.mark.parametrize("what", SURVIVED)
def test_a_pull_comes_through(store: Store, proxy: Proxy, pushed: Pushed, what: str) -> None:
    proxy.faults = [Fault(f.where, f.do, f.times, f.forget_range) for f in SURVIVED[what]]
    assert _pull(store, proxy).id == pushed.id
    assert check(store) == []
    assert all(fault.done for fault in proxy.faults)


TO_OTHERS = "192.0.2.1/secret-in-the-url"

FATAL: dict[str, tuple[Fault, type[FusestoreError], str]] = {
    "500 for ever": (
        Fault(MANIFESTS, _status(500)),
        RegistryFailed,
        "answers 500 TOOMANYREQUESTS, 4 times in a row: try again later",
    ),
    "blobs 500 for ever": (Fault(BLOBS, _status(500)), RegistryFailed, "answers 500 .*, 4 times in a row"),
    "429 for an hour": (
        Fault(MANIFESTS, _status(429, Retry_After="3600")),
        RegistryFailed,
        "wants no request for 3600 s: try again then",
    ),
    "no answer for ever": (Fault("", _cut_before), RegistryFailed, "cuts connections, 4 times in a row"),
    "cut for ever": (Fault(BLOBS, _cut_at(0)), RegistryFailed, "cuts connections, 4 times in a row"),
    "stalls for ever": (Fault(BLOBS, _stall_at(0)), RegistryFailed, "does not answer in time, 4 times"),
    "a config is corrupted": (Fault(BLOBS, _flip(-9)), RegistryFailed, "sends something else than sha256:"),
    "a manifest is corrupted": (Fault(MANIFESTS, _flip(20)), RegistryFailed, "something else than sha256:"),
    "a manifest of 4 MiB": (Fault(MANIFESTS, _huge), RegistryFailed, "over 4194304 bytes"),
    "400": (Fault(MANIFESTS, _status(400)), RegistryFailed, "answers 400 .*: it does not take this request"),
    "403": (Fault(MANIFESTS, _status(403)), AccessDenied, "log in with podman login"),
    "no blob": (Fault(BLOBS, _status(404)), RegistryFailed, "has no blob .*, which its manifest lists"),
    "no image": (Fault(MANIFESTS, _status(404)), NotFound, "faults/app has no image 1: check name and tag"),
    "in circles": (Fault(BLOBS, _to("")), RegistryFailed, "in circles"),
    "to where there is no TLS": (Fault(BLOBS, _to(f"http://{TO_OTHERS}")), RegistryFailed, "--plain-http"),
    "to who seems to be here": (
        Fault(BLOBS, _to(r"http://192.0.2.1\@127.0.0.1/secret-in-the-url")),
        RegistryFailed,
        "to no address",
    ),
    "to no web server": (Fault(BLOBS, _to(f"ftp://{TO_OTHERS}")), RegistryFailed, "no TLS"),
}


@pytest.mark.parametrize("what", FATAL)
def test_a_pull_fails_and_keeps_nothing(store: Store, proxy: Proxy, what: str) -> None:
    fault, kind, message = FATAL[what]
    proxy.faults = [Fault(fault.where, fault.do, fault.times)]
    _fails(store, proxy, kind, message)


def test_what_came_before_a_registry_went_is_not_fetched_again(store: Store, proxy: Proxy, big: str) -> None:
    proxy.faults = [Fault(big, _cut_at(600 * K), 1), Fault(big, _status(503))]
    _fails(store, proxy, RegistryFailed, "503")
    size = os.stat(f"{store.path}/downloads/{big.rpartition(':')[2]}").st_size
    assert size > 0
    proxy.faults.clear()
    _pull(store, proxy)
    assert proxy.requests(big)[-1].headers["Range"] == f"bytes={size}-"
    assert _downloads(store) == []
    assert check(store) == []


def _fails(store: Store, proxy: Proxy, kind: type[FusestoreError], message: str) -> None:
    with pytest.raises(kind, match=message) as raised:
        _pull(store, proxy)
    assert "\n" not in str(raised.value) and not SECRETS.search(str(raised.value))
    _keeps_nothing(store)


@pytest.fixture
def big(pushed: Pushed, area: Path) -> str:
    """What matches requests for the big layer alone."""
    blobs = (area / "faulty/blobs/sha256").iterdir()
    (path,) = (path for path in blobs if path.stat().st_size > BLOB_SIZE)
    return f"^GET .*/blobs/sha256:{path.name}"


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (_flip(500 * K), "layer sha256:.* is refused"),
        (_lengthen, "another part, or another size, of blob"),
        (_lengthen_unsaid, "over [0-9]+ bytes of blob"),
        (_shorten, "another part, or another size, of blob"),
        (_html, "another part, or another size, of blob"),
    ],
)
def test_wrong_bytes_of_a_layer(
    store: Store, proxy: Proxy, big: str, do: Callable[[Answer], None], message: str
) -> None:
    proxy.faults = [Fault(big, do)]
    is_refused = "refused" in message
    _fails(store, proxy, LayerRefused if is_refused else RegistryFailed, message)
    assert not (is_refused and _downloads(store))


def test_a_part_that_was_not_asked_for(store: Store, proxy: Proxy, big: str) -> None:
    proxy.faults = [Fault(big, _cut_at(300 * K), 1), Fault(big, _misplace)]
    _fails(store, proxy, RegistryFailed, "another part")


def test_a_cut_blob_goes_on_where_it_was(store: Store, proxy: Proxy, big: str) -> None:
    proxy.faults = [Fault(big, _cut_at(600 * K), 1)]
    _pull(store, proxy)
    first, second = proxy.requests(big)
    assert "Range" not in first.headers
    start = int(second.headers["Range"].removeprefix("bytes=").removesuffix("-"))
    assert 0 < start <= 600 * K
    assert second.sent < BLOB_SIZE - start + 64 * K


def test_what_is_here_is_not_fetched(store: Store, proxy: Proxy, big: str) -> None:
    _pull(store, proxy)
    _pull(store, proxy)
    assert len(proxy.requests(big)) == 1


def test_a_layer_that_another_image_brought_is_not_fetched(
    store: Store, proxy: Proxy, pushed: Pushed, big: str
) -> None:
    store.import_image(pushed.source)
    assert _pull(store, proxy).id == pushed.id
    assert proxy.requests(big) == []


def test_layers_are_fetched_side_by_side(store: Store, proxy: Proxy, big: str) -> None:
    """The big one, which is above it, ends only after the small one."""
    proxy.faults = [Fault(big, lambda _: wait_until(lambda: len(proxy.requests(BLOBS)) == 2))]
    _pull(store, proxy)
    assert len(proxy.requests(BLOBS)) == 3


@contextmanager
def _answering(answer: bytes) -> Iterator[str]:
    """The name of a registry that answers everything with these bytes."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            is_http = self.rfile.readline().endswith(b" HTTP/1.1\r\n")
            while is_http and self.rfile.readline().strip():
                pass
            with suppress(OSError):
                self.wfile.write(answer)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


OK = b"HTTP/1.1 200 OK\r\n"
MOVED = b"HTTP/1.1 307 Moved\r\nContent-Length: 0\r\nLocation: "
WHO = b"HTTP/1.1 401 Who\r\nContent-Length: 0\r\nWWW-Authenticate: "
END = b"\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"\0" * 100, b"\r\n", b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 99999 OK\r\n\r\n",
        b"HTTP/1.1 304 Same\r\n\r\n", b"HTTP/1.1 200", OK + b"a" * 70000, OK + b"a: b\r\n" * 200 + b"\r\n",
        OK + b"Content-Length: -5" + END, OK + b"Content-Length: x" + END + b"{}",
        OK + b"Content-Length: 2\r\nContent-Length: 3" + END + b"{}", OK + b"Content-Length: 2" + END + b"[]",
        OK + b"Content-Length: 2" + END + b"{}", OK + b"Content-Length: 99" + END + b"{}",
        OK + b"Transfer-Encoding: chunked" + END + b"zz\r\n", OK + b"Content-Encoding: gzip" + END + b"{}",
        OK + b"\xff\xfe: \xff" + END, MOVED + b"http://[::1/x" + END, MOVED + b"https://" + END,
        MOVED + b"//" + END, MOVED + b"https://127.0.0.1:99999/" + END, MOVED + b"\xff://\xff" + END,
        MOVED + b"http://127.0.0.1:1/ \x01" + END, MOVED + b"file:///etc/passwd" + END, WHO + END,
        WHO + b"Bearer" + END, WHO + b'Bearer realm=""' + END, WHO + b'Bearer realm="http://[::1"' + END,
        WHO + b'Bearer realm="http://192.0.2.1/"' + END, WHO + b'Bearer realm="https://127.0.0.1:1/"' + END,
        WHO + b"\xff" + END, WHO + b"Digest x=y" + END, WHO + b"Basic realm=x" + END,
    ],
)  # fmt: skip
def test_who_is_no_registry(store: Store, answer: bytes) -> None:
    """Whatever answers, it is one line, and a password goes nowhere that is not safe."""
    options = RegistryOptions(lambda _: LOGIN, patience=replace(QUICK, attempts=2))
    with _answering(answer) as name, pytest.raises(FusestoreError) as raised:
        pull(store, f"{name}/app", options=options)
    assert "\n" not in str(raised.value) and not SECRETS.search(str(raised.value))
    _keeps_nothing(store)


def test_nobody_listens(store: Store, proxy: Proxy) -> None:
    with pytest.raises(RegistryFailed, match=r"127\.0\.0\.1:1 cannot be reached, 4 times in a row"):
        pull(store, "127.0.0.1:1/app", options=RegistryOptions(patience=QUICK))


def test_how_often_is_tried_if_nothing_else_is_said(store: Store, proxy: Proxy) -> None:
    proxy.faults = [Fault(MANIFESTS, _status(502))]
    with pytest.raises(
        RegistryFailed, match="answers 502 TOOMANYREQUESTS, 5 times in a row: try again later"
    ):
        pull(store, f"{proxy.name}/faults/app:1")
    assert len(proxy.requests(MANIFESTS)) == 5


# Rights


def test_tokens_without_a_login(store: Store, proxy: Proxy, pushed: Pushed) -> None:
    proxy.wants_tokens = True
    assert _pull(store, proxy).id == pushed.id
    assert proxy.scopes == ["repository:faults/app:pull"]


def test_tokens_for_who_logged_in(store: Store, proxy: Proxy, pushed: Pushed) -> None:
    proxy.wants_tokens, proxy.allows_anonymous = True, False
    assert _pull(store, proxy, credentials=lambda _: LOGIN).id == pushed.id
    assert all("Basic" not in seen.headers.get("Authorization", "") for seen in proxy.requests("/v2/"))


def test_tokens_for_an_identity_token(store: Store, proxy: Proxy, pushed: Pushed) -> None:
    proxy.wants_tokens, proxy.allows_anonymous = True, False
    credentials = Credentials("", identity_token=IDENTITY_TOKEN)
    assert _pull(store, proxy, credentials=lambda _: credentials).id == pushed.id
    assert proxy.scopes == ["repository:faults/app:pull"]


@pytest.mark.parametrize(
    "credentials",
    [None, Credentials(USER, "another-secret"), Credentials("", identity_token="another-secret")],
)
def test_no_tokens_for_others(store: Store, proxy: Proxy, credentials: Credentials | None) -> None:
    proxy.wants_tokens, proxy.allows_anonymous = True, False
    with pytest.raises(
        AccessDenied, match="does not let you have or change faults/app: check the name"
    ) as raised:
        _pull(store, proxy, credentials=lambda _: credentials)
    assert "another-secret" not in str(raised.value)
    _keeps_nothing(store)


def test_a_token_that_expires_in_the_middle_is_replaced(
    store: Store, proxy: Proxy, pushed: Pushed, big: str
) -> None:
    proxy.wants_tokens, proxy.token_lives = True, 2
    proxy.faults = [Fault(big, _cut_at(200 * K), 4)]
    assert _pull(store, proxy).id == pushed.id
    assert len(proxy.scopes) > 2


def test_the_authorization_goes_to_no_other_host(
    store: Store, proxy: Proxy, registry: DockerRegistry, pushed: Pushed
) -> None:
    """Blobs are often in a store that the registry sends us to, with rights of its own in the URL."""
    proxy.wants_tokens = True
    with proxy_of(registry.port) as other:

        def send_there(answer: Answer) -> None:
            digest = answer.headers["Docker-Content-Digest"]
            _to(f"http://localhost:{other.port}/v2/{pushed.repository}/blobs/{digest}?x=secret-in-the-url")(
                answer
            )

        proxy.faults = [Fault(BLOBS, send_there)]
        assert _pull(store, proxy).id == pushed.id
        assert len(other.seen) == 3
        assert not any("Authorization" in seen.headers for seen in other.seen)


def test_no_log_of_any_level_and_no_traceback_has_a_secret(
    store: Store, proxy: Proxy, registry: DockerRegistry, pushed: Pushed, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(1)
    proxy.wants_tokens, proxy.allows_anonymous = True, False
    tracebacks = []
    for credentials in (LOGIN, Credentials("", identity_token=IDENTITY_TOKEN)):
        for fault in (
            _to("http://localhost:1/x?token=secret-in-the-url"),
            _to("http://me:secret-in-the-url@localhost:1/x"),
            _status(500, Location="http://localhost:1/?secret-in-the-url"),
            _cut_before,
        ):
            proxy.faults = [Fault(BLOBS, fault)]
            with pytest.raises(FusestoreError) as raised:
                _pull(store, proxy, credentials=lambda _, it=credentials: it)
            tracebacks += traceback.format_exception(raised.value)
        proxy.faults = []
        assert _pull(store, proxy, credentials=lambda _, it=credentials: it).id == pushed.id
        store.delete_image(pushed.id)
    assert not SECRETS.search(caplog.text)
    # The lines of the program that they quote have words of these.
    assert not re.search(f"{PASSWORD}|t0ken|secret-in-the-url", "".join(tracebacks))


def test_a_password(store: Store, locked_registry: DockerRegistry, pushed: Pushed) -> None:
    store.import_image(pushed.source, ["app"])
    options = RegistryOptions(lambda _: LOGIN, patience=QUICK)
    name = f"{locked_registry.name}/private/app:1"
    with pytest.raises(AccessDenied, match="log in"):
        push(store, "app", name, options=RegistryOptions(patience=QUICK))
    push(store, "app", name, options=options)
    with pytest.raises(AccessDenied, match="log in"):
        pull(store, name, options=RegistryOptions(patience=QUICK))
    assert pull(store, name, options=options).id == pushed.id


# Pushing


@pytest.fixture
def filled(store: Store, pushed: Pushed) -> Store:
    store.import_image(pushed.source, ["app"])
    return store


def _new_name(proxy: Proxy) -> str:
    """Of a repository in which there is nothing yet."""
    return f"{proxy.name}/pushed/r{secrets.token_hex(8)}:1"


PUSHED_ALL_THE_SAME = {
    "an upload is cut": Fault("^PUT .*/uploads/", _cut_before, 3),
    "an upload is not begun": Fault("^POST", _status(503), 3),
    "an upload ends in 500": Fault("^PUT .*/uploads/", _status(500), 2),
    "429 for a manifest": Fault("^PUT .*/manifests/", _status(429, Retry_After="0"), 2),
    "500 for looking": Fault("^HEAD", _status(500), 2),
}


@pytest.mark.parametrize("what", PUSHED_ALL_THE_SAME)
def test_a_push_comes_through(filled: Store, proxy: Proxy, tmp_path: Path, what: str) -> None:
    fault = PUSHED_ALL_THE_SAME[what]
    proxy.faults = [Fault(fault.where, fault.do, fault.times)]
    name = _new_name(proxy)
    digest = push(filled, "app", name, options=RegistryOptions(patience=QUICK))
    assert digest == filled.image("app").manifest
    assert proxy.faults[0].done
    with open_at(tmp_path / "other") as other:
        assert pull(other, name, options=RegistryOptions(patience=QUICK)).id == filled.image("app").id


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("^PUT .*/uploads/", _status(500)), "answers 500 TOOMANYREQUESTS, 4 times in a row"),
        (Fault("^PUT .*/manifests/", _status(400)), "answers 400"),
        (Fault("^PUT .*/uploads/", _to("http://127.0.0.1:1/secret-in-the-url")), "uploads sent elsewhere"),
    ],
)
def test_a_push_fails(filled: Store, proxy: Proxy, fault: Fault, message: str) -> None:
    proxy.faults = [Fault(fault.where, fault.do, fault.times)]
    with pytest.raises(RegistryFailed, match=message) as raised:
        push(filled, "app", _new_name(proxy), options=RegistryOptions(patience=QUICK))
    assert not SECRETS.search(str(raised.value))
    assert not proxy.requests("^PUT .*/manifests/") or "400" in message


def test_layers_come_from_another_repository_of_the_registry(filled: Store, proxy: Proxy) -> None:
    """With the right to read there."""
    filled.tag("app", f"{proxy.name}/faults/app:1")
    proxy.wants_tokens = True
    name = _new_name(proxy)
    push(filled, "app", name, options=RegistryOptions(patience=QUICK))
    assert [seen.status for seen in proxy.requests("^POST .*mount=") if seen.status != 401] == [201, 201]
    assert len(proxy.requests("^PUT .*/uploads/")) == 1  # the config
    repository = name.partition("/")[2].removesuffix(":1")
    assert f"repository:faults/app:pull repository:{repository}:pull,push" in proxy.scopes


def test_a_layer_that_may_not_be_had_from_there_is_sent(filled: Store, proxy: Proxy) -> None:
    filled.tag("app", f"{proxy.name}/faults/app:1")
    proxy.faults = [Fault("^POST .*mount=", _status(403))]
    push(filled, "app", _new_name(proxy), options=RegistryOptions(patience=QUICK))
    assert proxy.faults[0].done == 2
    assert len(proxy.requests("^PUT .*/uploads/")) == 3
