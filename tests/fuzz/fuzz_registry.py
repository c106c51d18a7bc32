"""Fuzz target: what registries and their servers of tokens answer, and the files that credentials come from.

Invariant: whatever the bytes of the answers, statuses, headers and bodies, what was asked for or a
FusestoreError, at most as long as it may be; no message has a secret in it, and no host but the registry gets
its token. Every other exception, a crash or a hang is a bug.

    python tests/fuzz/fuzz_registry.py [SECONDS | CORPUS.zip]

With atheris installed it is driven by coverage (then the arguments are libFuzzer's), else by random mutation.
"""

import base64
import contextlib
import hashlib
import io
import json
import os
import random
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import urllib3.connection
from rig.fuzzing import Bytes, drive, own_directory, spliced

from fusestore.credentials import Credentials, find_credentials
from fusestore.errors import BadInput, FusestoreError
from fusestore.nodes import Digest
from fusestore.oci import DOCUMENT_MAX
from fusestore.reference import parse_reference
from fusestore.registry import Registry, RegistryOptions
from fusestore.transport import Patience, Upload

PLACE = own_directory()
BLOB = b"the bytes of a blob " * 50
DIGEST = Digest(f"sha256:{hashlib.sha256(BLOB).hexdigest()}")
BETWEEN = b"\n\x1c\n"
"""Stands between the answers of an input: each has a connection of its own."""
SECRET, TOKEN = "fr0m-the-auth-file", "t0ken-of-the-server"
SECRETS = re.compile(f"{SECRET}|{TOKEN}|{base64.b64encode(f'me:{SECRET}'.encode()).decode()}")
QUICK = Patience(attempts=3, pause_s=0, pause_max_s=0, stall_s=5, stored_s=5)


class Network:
    """Gives each new connection the next answer, whole, and then ends it."""

    def __init__(self, answers: list[bytes]) -> None:
        self._answers = answers
        self._ends: list[tuple[str, socket.socket]] = []

    def connect(self, host: str) -> socket.socket:
        ours, theirs = socket.socketpair()
        self._ends.append((host, theirs))
        if not self._answers:
            theirs.shutdown(socket.SHUT_WR)
            return ours
        theirs.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            theirs.sendall(self._answers.pop(0))
        theirs.shutdown(socket.SHUT_WR)
        return ours

    def asked(self) -> Iterator[tuple[str, bytes]]:
        """Host, and what came there."""
        for host, end in self._ends:
            with contextlib.suppress(OSError):
                yield host, end.recv(1 << 20)
            end.close()


network = Network([])


def _connect(connection: urllib3.connection.HTTPConnection) -> socket.socket:
    return network.connect(connection.host)


urllib3.connection.HTTPConnection._new_conn = _connect  # type: ignore[method-assign]


def _ask(registry: Registry, question: int) -> None:
    match question:
        case 0:
            data, media_type = registry.manifest()
            assert len(data) <= DOCUMENT_MAX and isinstance(media_type, str)
        case 1:
            data, _ = registry.manifest(DIGEST)
            assert data == BLOB
        case 2:
            assert registry.document(DIGEST) == BLOB
        case 3 | 4:
            offset = 0 if question == 3 else 100
            with contextlib.closing(registry.blob(DIGEST, len(BLOB), offset)) as reader:
                left = len(BLOB) - offset
                while data := reader.read(300):
                    left -= len(data)
                    assert left >= 0
                assert not left
        case 5:
            assert len(registry.blob_range(DIGEST, len(BLOB), 100, 200)) == 100
        case 6:
            registry.has_blob(DIGEST)
        case 7:
            registry.put_blob(DIGEST, Upload(len(BLOB), lambda: io.BytesIO(BLOB)), "other/app")
        case _:
            registry.put_manifest(b"{}", "application/vnd.oci.image.manifest.v1+json")


def _talk(answers: list[bytes], question: int, credentials: Credentials | None) -> None:
    global network
    network = Network(answers)
    options = RegistryOptions(lambda reference: credentials, plain_http=True, patience=QUICK)
    registry = options.open(parse_reference("r.example/some/app:1"), pushes=question >= 6)
    try:
        _ask(registry, question)
    except FusestoreError as error:
        assert not SECRETS.search(str(error)), "a message has a secret"
        assert "\n" not in str(error)
    finally:
        registry.close()
        asked = list(network.asked())
    for host, said in asked:
        assert host == "r.example" or TOKEN.encode() not in said, "another host gets the token"


def as_answers(data: bytes) -> None:
    source = Bytes(data)
    question, who = source.byte() % 9, source.byte() % 3
    credentials = (None, Credentials("me", SECRET), Credentials("", identity_token=SECRET))[who]
    _talk(source.rest().split(BETWEEN), question, credentials)


def as_auth_file(data: bytes) -> None:
    """What comes of it is sent, or is an error."""
    path = PLACE / "auth.json"
    path.write_bytes(data)
    try:
        found = find_credentials(parse_reference("r.example/some/app:1"), [str(path)])
    except BadInput as error:
        assert SECRET not in str(error)
        return
    for scheme in ('Basic realm="r"', BEARER):
        _talk([_answer("401 No", b"", WWW_Authenticate=scheme)], 0, found)


TARGETS = (as_answers, as_answers, as_answers, as_auth_file)


def check(data: bytes) -> None:
    if data:
        TARGETS[data[0] % len(TARGETS)](data[1:])


def _answer(status: str, body: bytes = b"", **headers: object) -> bytes:
    lines = [f"HTTP/1.1 {status}", *(f"{key.replace('_', '-')}: {value}" for key, value in headers.items())]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


BEARER = 'Bearer realm="http://auth.example/token",service="r.example",scope="repository:some/app:pull"'
ERROR = json.dumps({"errors": [{"code": "MANIFEST_UNKNOWN", "message": "no"}]}).encode()
ANSWERS = [
    _answer("200 OK", BLOB, Content_Type="application/vnd.oci.image.manifest.v1+json; charset=utf-8"),
    _answer("200 OK", BLOB, Docker_Content_Digest=DIGEST),
    _answer("200 OK", b"{}", Docker_Content_Digest=DIGEST),
    _answer("206 Partial", BLOB[100:200], Content_Range=f"bytes 100-199/{len(BLOB)}"),
    _answer("206 Partial", BLOB[100:], Content_Range=f"bytes 100-{len(BLOB) - 1}/*"),
    _answer("206 Partial", BLOB[100:], Content_Range="bytes */5"),
    _answer("401 No", b"", WWW_Authenticate=BEARER),
    _answer("401 No", b"", WWW_Authenticate='Basic realm="r", ' + BEARER),
    _answer("200 OK", json.dumps({"token": TOKEN, "expires_in": 60}).encode()),
    _answer("200 OK", json.dumps({"access_token": TOKEN}).encode()),
    _answer("307 Away", b"", Location="http://other.example/x?secret=1"),
    _answer("302 Away", b"", Location="/v2/elsewhere"),
    _answer("202 Go on", b"", Location="/v2/some/app/blobs/uploads/1?state=2"),
    _answer("201 Made", b"", Location="/v2/x"),
    _answer("404 No", ERROR),
    _answer("429 Too many", ERROR, Retry_After="0"),
    _answer("503 Later", ERROR, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"),
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\nabc",
    b"HTTP/1.0 200 OK\r\n\r\nall there is",
    b"",
]
PAIR = base64.b64encode(f"me:{SECRET}".encode()).decode()
AUTH_FILES = [
    json.dumps({"auths": {"r.example": {"auth": PAIR}, "https://r.example/v1/": {"identitytoken": SECRET}}}),
    json.dumps({"auths": {"r.example/some": {"username": "me", "password": SECRET}}, "credHelpers": {}}),
    json.dumps({"credHelpers": {"r.example": "no-such-program"}, "credsStore": "nor/this"}),
]
TOKENS = (
    *(
        b"\r\n",
        b"\r\n\r\n",
        b": ",
        b"HTTP/1.1 ",
        b"-1",
        b"99999999999999999999",
        b"0",
        b"\xff",
        b"\0",
        b"=",
        b",",
    ),
    *(
        b'"',
        b"chunked",
        b"Content-Length: ",
        b"Transfer-Encoding: ",
        b"Location: ",
        b"http://",
        b"//",
        b"\\",
        b"@",
    ),
    *(
        b"[::1",
        b"[",
        b"{",
        b"\\ud800",
        b"\\u00e9",
        b"null",
        b"1",
        b"bytes ",
        b"/",
        b"*",
        b"Bearer ",
        b"Basic ",
    ),
    *(
        b"WWW-Authenticate: ",
        b"Content-Range: ",
        b"Retry-After: ",
        b"auth",
        b"a\xc3\xa9:b",
        b"?",
        b"#",
        b"x" * 300,
    ),
    BETWEEN,
)


def mutated(source: random.Random) -> bytes:
    target = source.randrange(len(TARGETS))
    if TARGETS[target] is as_auth_file:
        data = source.choice(AUTH_FILES).encode()
    else:
        answers = BETWEEN.join(source.choice(ANSWERS) for _ in range(source.randint(1, 5)))
        data = bytes([source.randrange(9), source.randrange(3)]) + answers
    return bytes([target]) + spliced(source, data, TOKENS, first=2)


if __name__ == "__main__":
    os.environ["PATH"] = str(PLACE)  # no credential helper is anywhere
    drive(check, mutated)
