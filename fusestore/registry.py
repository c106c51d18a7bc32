"""One repository of a registry: OCI distribution-spec 1.1, which Docker Registry v2 became. Blocking.

What may go better the next time (no connection, a cut or stalled one, 408, 429, 5xx) is tried again, after
growing pauses or what Retry-After says, within `Patience`; a blob goes on where it was cut, by Range. Nothing
that arrives is trusted: manifests and configs are compared with their digests here, the bytes of a layer by
who reads them (fusestore.blobs), its length in both places.

Thread-safe; each blob is read by one thread.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import urlencode
from urllib.request import getproxies_environment

from . import oci
from .certificates import certificate_directories
from .credentials import Credentials, auth_files, find_credentials
from .errors import AccessDenied, NotFound, NoToc, RegistryFailed
from .nodes import Digest
from .reference import Reference
from .transport import Patience, Response, Transient, Transport, Upload, read_some

__all__ = ["BlobReader", "Registry", "RegistryOptions", "usual_options"]

_ACCEPT = ", ".join(oci.ACCEPTED_TYPES)
_WORKED = 64 << 10
"""Bytes after which a connection that was cut counts as one that worked."""


class Registry:
    """The repository of `reference`. Whoever makes it closes it; nothing is asked before the first call.

    `pushes`: rights to write are asked for. All methods raise RegistryFailed, and AccessDenied where the
    registry wants other credentials.
    """

    def __init__(
        self,
        reference: Reference,
        *,
        credentials: Credentials | None,
        plain_http: bool,
        pushes: bool,
        patience: Patience,
        proxies: Mapping[str, str],
        certificate_directories: Sequence[str],
    ) -> None:
        self.reference = reference
        self.transport = Transport(
            reference, credentials, plain_http, patience, proxies, certificate_directories
        )
        self._scope = f"repository:{reference.repository}:{'pull,push' if pushes else 'pull'}"

    def close(self) -> None:
        """Idempotent."""
        self.transport.close()

    def interrupt(self) -> None:
        """Has everything that waits in other threads fail soon. There is no way back."""
        self.transport.interrupt()

    # Pulling

    def manifest(self, expected: Digest | None = None) -> tuple[bytes, str]:
        """The manifest or index that the reference means, or the one of a digest; and its media type.

        That is "" where it is said to be of no type that a manifest has. Raises NotFound.
        """
        target = expected or self.reference.target
        try:
            return self._document(self._path(f"manifests/{target}"), expected or self.reference.digest)
        except NotFound:
            name = f"{self.reference.registry}/{self.reference.repository}"
            raise NotFound(f"{name} has no image {target}: check name and tag") from None

    def document(self, digest: Digest) -> bytes:
        """A blob that fits in memory."""
        try:
            data, _ = self._document(self._path(f"blobs/{digest}"), digest)
        except NotFound:
            raise self._lost(digest) from None
        return data

    def blob(self, digest: Digest, size: int, offset: int = 0) -> "BlobReader":
        """A blob from `offset` on, to be compared with its digest by who reads it. The caller closes it."""
        return BlobReader(self, digest, size, offset)

    def blob_range(self, digest: Digest, size: int, start: int, end: int) -> bytes:
        """Bytes `start` to `end` (at least one) of a blob of `size` bytes, not compared with anything.

        Raises NoToc where the registry gives whole blobs only.
        """

        def fetch() -> bytes:
            headers = {"Range": f"bytes={start}-{end - 1}"}
            try:
                response = self.ask("GET", self._path(f"blobs/{digest}"), headers)
            except NotFound:
                raise self._lost(digest) from None
            begin, total = _place_of(response)
            if response.status != HTTPStatus.PARTIAL_CONTENT:
                response.close()
                raise NoToc(f"{self.reference.registry} does not give parts of blobs")
            if begin != start or total not in (None, size):
                response.close()
                raise self._wrong(digest, "another part, or another size,")
            data = self.transport.read(response, end - start)
            if len(data) < end - start:
                raise Transient("cuts connections")
            return data

        return self.transport.again(fetch)

    def _document(self, path: str, expected: Digest | None) -> tuple[bytes, str]:
        def fetch() -> tuple[bytes, str]:
            response = self.ask("GET", path, {"Accept": _ACCEPT})
            data = self.transport.read(response, oci.DOCUMENT_MAX)
            said = response.headers.get("docker-content-digest", "")
            wanted = expected or (said if said.startswith("sha256:") else None)
            if wanted is not None and oci.digest_of(data) != wanted:
                raise Transient(f"sends something else than {wanted}")
            media_type = response.headers.get("content-type", "").partition(";")[0].strip()
            return data, media_type if media_type in oci.ACCEPTED_TYPES else ""

        return self.transport.again(fetch)

    def _lost(self, digest: Digest) -> RegistryFailed:
        return RegistryFailed(
            f"{self.reference.registry} has no blob {digest}, which its manifest lists: push the image anew"
        )

    def _wrong(self, digest: Digest, what: str) -> RegistryFailed:
        name = self.reference.registry
        return RegistryFailed(f"{name} sends {what} of blob {digest}: pull again, or another image")

    # Pushing

    def has_blob(self, digest: Digest) -> bool:
        def look() -> bool:
            try:
                self.transport.drop(self.ask("HEAD", self._path(f"blobs/{digest}")))
            except NotFound:
                return False
            return True

        return self.transport.again(look)

    def put_blob(self, digest: Digest, upload: Upload, mount_from: str = "") -> bool:
        """Uploads a blob, unless it was in `mount_from`, another repository of the registry: then True."""

        def put() -> bool:
            location = self._start_upload(digest, mount_from)
            if location is None:
                return True
            url = self.transport.with_query(location, [("digest", digest)])
            headers = {"Content-Type": "application/octet-stream"}
            self.transport.drop(self.ask("PUT", url, headers, upload))
            return False

        return self.transport.again(put)

    def _start_upload(self, digest: Digest, mount_from: str) -> str | None:
        """Where the bytes are to be sent; None: nowhere, the registry has them now."""
        response = self._mount(digest, mount_from) if mount_from else None
        if response is None:
            response = self.ask("POST", self._path("blobs/uploads/"))
        self.transport.drop(response)
        if response.status == HTTPStatus.CREATED:
            return None
        location = response.headers.get("location")
        if location is None:
            raise RegistryFailed(f"{self.reference.registry} does not say where blobs go: it is no registry")
        return self.transport.url(location)

    def _mount(self, digest: Digest, mount_from: str) -> Response | None:
        """None: it may not be read there, which is no reason not to push."""
        query = urlencode({"mount": digest, "from": mount_from})
        try:
            return self.ask(
                "POST", self._path(f"blobs/uploads/?{query}"), also=f"repository:{mount_from}:pull"
            )
        except (AccessDenied, NotFound, RegistryFailed):
            return None

    def put_manifest(self, data: bytes, media_type: str) -> None:
        """Under the reference's tag, or else digest. What it lists must be there."""

        def put() -> None:
            target = self.reference.tag or self.reference.digest
            response = self.ask("PUT", self._path(f"manifests/{target}"), {"Content-Type": media_type}, data)
            self.transport.drop(response)

        self.transport.again(put)

    def ask(
        self,
        method: str,
        path: str,
        headers: dict[str, str] | None = None,
        body: bytes | Upload | None = None,
        also: str = "",
    ) -> Response:
        """`Transport.request` at a path of the registry, or a whole URL. `also`: one more scope."""
        scopes = (self._scope, also) if also else (self._scope,)
        return self.transport.request(method, self.transport.url(path), scopes, headers or {}, body)

    def _path(self, name: str) -> str:
        return f"/v2/{self.reference.repository}/{name}"


@dataclass(frozen=True, slots=True)
class RegistryOptions:
    """How to talk to a registry."""

    credentials: Callable[[Reference], Credentials | None] = lambda reference: None
    """Asked once, for the image pulled or pushed (`fusestore.credentials.find_credentials`)."""
    plain_http: bool = False
    """Do without TLS: whoever is on the way can read and change everything but what has a digest."""
    patience: Patience = field(default_factory=Patience)
    proxies: Mapping[str, str] = field(default_factory=dict)
    """Scheme → URL of its proxy; "no" → hosts that need none. As urllib.request.getproxies_environment."""
    certificate_directories: Sequence[str] = ()
    """See fusestore.certificates."""

    def open(self, reference: Reference, *, pushes: bool = False) -> Registry:
        return Registry(
            reference,
            credentials=self.credentials(reference),
            plain_http=self.plain_http,
            pushes=pushes,
            patience=self.patience,
            proxies=self.proxies,
            certificate_directories=self.certificate_directories,
        )


def usual_options(
    environ: Mapping[str, str], *, plain_http: bool = False, authfile: str | None = None
) -> RegistryOptions:
    """As the environment says. Credentials are read when they are asked for, and each time."""
    return RegistryOptions(
        lambda reference: find_credentials(reference, auth_files(environ, authfile)),
        plain_http,
        proxies=getproxies_environment(),
        certificate_directories=certificate_directories(environ),
    )


class BlobReader:
    """The bytes of one blob, as many as it should have, whatever happens to connections."""

    def __init__(self, registry: Registry, digest: Digest, size: int, offset: int) -> None:
        self._registry = registry
        self._digest = digest
        self._size = size
        self._offset = offset
        self._skip = 0
        """Bytes that were had before, from a server that does not know Range."""
        self._response: Response | None = None
        self._tries = registry.transport.tries()
        self._worked_at = offset

    def read(self, size: int, /) -> bytes:
        """At least one byte, until the end."""
        data = b""
        while not data and self._offset < self._size:
            try:
                data = self._read_some(size)
            except Transient as error:
                self.close()
                self._tries.failed(error)
        self._offset += len(data)
        if self._offset - self._worked_at >= _WORKED:
            self._worked_at = self._offset
            self._tries.worked()
        return data

    def close(self) -> None:
        """Idempotent."""
        response, self._response = self._response, None
        if response is not None:
            response.close()

    def _read_some(self, size: int) -> bytes:
        """Empty: it was skipped."""
        if self._response is None:
            self._response = self._connect()
        data = read_some(self._response, size)
        skipped = min(self._skip, len(data))
        self._skip -= skipped
        if self._offset + len(data) - skipped > self._size:
            raise self._registry._wrong(self._digest, f"over {self._size} bytes")
        return data[skipped:]

    def _connect(self) -> Response:
        headers = {"Range": f"bytes={self._offset}-"} if self._offset else {}
        try:
            response = self._registry.ask("GET", self._registry._path(f"blobs/{self._digest}"), headers)
        except NotFound:
            raise self._registry._lost(self._digest) from None
        start, total = _place_of(response)
        if start not in (0, self._offset) or total not in (None, self._size):
            response.close()
            raise self._registry._wrong(self._digest, "another part, or another size,")
        self._skip = self._offset - start
        return response


def _place_of(response: Response) -> tuple[int, int | None]:
    """Where in the blob the body starts, and the blob's size if that is said; -1: that is not understood."""
    if response.status == HTTPStatus.PARTIAL_CONTENT:
        said = response.headers.get("content-range", "")
        found = re.fullmatch(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)", said)
        if found is None:
            return -1, None
        return int(found[1]), None if found[2] == "*" else int(found[2])
    length = response.headers.get("content-length", "")
    return 0, int(length) if re.fullmatch(r"[0-9]{1,18}", length) else None
