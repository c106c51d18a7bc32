"""A writer of eStargz layers (stargz-snapshotter, docs/estargz.md). Pure.

Each file's content is cut into chunks, each the beginning of a gzip member; what stands between, headers and
padding, goes on in the member before. The table of contents and a footer that says where it is come last.
"""

import base64
import datetime
import hashlib
import json
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["LANDMARK", "NO_LANDMARK", "TOC_DIGEST", "Stargz", "make_stargz"]

LANDMARK, NO_LANDMARK = ".prefetch.landmark", ".no.prefetch.landmark"
TOC_DIGEST = "containerd.io/snapshot/stargz/toc.digest"

_TYPES = {
    tarfile.REGTYPE: "reg", tarfile.DIRTYPE: "dir", tarfile.SYMTYPE: "symlink", tarfile.LNKTYPE: "hardlink",
    tarfile.CHRTYPE: "char", tarfile.BLKTYPE: "block", tarfile.FIFOTYPE: "fifo",
}  # fmt: skip
_XATTR = "SCHILY.xattr."


@dataclass
class Stargz:
    data: bytes
    diff_id: str
    toc_digest: str
    toc_offset: int
    entries: list[dict[str, Any]]
    """Of the table."""
    annotations: dict[str, str] = field(default_factory=dict)


@dataclass
class _Writer:
    out: bytearray = field(default_factory=bytearray)
    tar_hash: Any = field(default_factory=hashlib.sha256)
    member: Any = None

    def write(self, data: bytes) -> None:
        self.tar_hash.update(data)
        if self.member is None:
            self.member = zlib.compressobj(9, wbits=31)
        self.out += self.member.compress(data)

    def cut(self) -> int:
        if self.member is not None:
            self.out += self.member.flush()
        self.member = None
        return len(self.out)


def make_stargz(
    members: Sequence[tuple[tarfile.TarInfo, bytes]],
    *,
    first: Sequence[str] = (),
    chunk_size: int = 4 << 20,
    claims: Mapping[str, Mapping[str, object]] = {},
) -> Stargz:
    """`first`: names of what is to be prefetched; with none, that nothing is. `claims` {name: fields}: what
    the table is to say instead of the truth."""
    prior = [found for found in members if found[0].name in first]
    rest = [found for found in members if found[0].name not in first]
    mark = tarfile.TarInfo(LANDMARK if first else NO_LANDMARK)
    mark.size = 1
    ordered = [*prior, (mark, b"\x0f"), *rest] if first else [(mark, b"\x0f"), *rest]
    writer, entries = _Writer(), []
    for member, content in ordered:
        writer.write(member.tobuf(tarfile.PAX_FORMAT))
        entries += _add(writer, member, content, chunk_size)
    for entry in entries:
        entry.update(claims.get(entry["name"], {}))
    toc_offset = writer.cut()
    toc = json.dumps({"version": 1, "entries": entries}).encode()
    own = tarfile.TarInfo("stargz.index.json")
    own.size = len(toc)
    writer.write(own.tobuf(tarfile.PAX_FORMAT) + toc + bytes(-len(toc) % 512) + bytes(1024))
    writer.cut()
    extra = b"SG\x16\x00%016xSTARGZ" % toc_offset
    footer = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x1a\x00" + extra + b"\x01\0\0\xff\xff" + bytes(8)
    digest = f"sha256:{hashlib.sha256(toc).hexdigest()}"
    return Stargz(
        bytes(writer.out) + footer,
        f"sha256:{writer.tar_hash.hexdigest()}",
        digest,
        toc_offset,
        entries,
        {TOC_DIGEST: digest},
    )


def _add(writer: _Writer, member: tarfile.TarInfo, content: bytes, chunk_size: int) -> list[dict[str, Any]]:
    time = datetime.datetime.fromtimestamp(round(member.mtime), datetime.UTC)
    entry: dict[str, Any] = {
        "name": member.name.removeprefix("./"), "type": _TYPES[member.type], "mode": member.mode,
        "uid": member.uid, "gid": member.gid, "modtime": time.isoformat().replace("+00:00", "Z"),
    }  # fmt: skip
    if member.linkname:
        entry["linkName"] = member.linkname
    if member.type in (tarfile.CHRTYPE, tarfile.BLKTYPE):
        entry |= {"devMajor": member.devmajor, "devMinor": member.devminor}
    xattrs = {
        name.removeprefix(_XATTR): base64.b64encode(value.encode("utf-8", "surrogateescape")).decode()
        for name, value in member.pax_headers.items()
        if name.startswith(_XATTR)
    }
    if xattrs:
        entry["xattrs"] = xattrs
    if not content:
        return [entry]
    entry |= {"size": len(content), "digest": f"sha256:{hashlib.sha256(content).hexdigest()}"}
    entries = []
    for start in range(0, len(content), chunk_size):
        chunk = content[start : start + chunk_size]
        found = entry if start == 0 else {"name": entry["name"], "type": "chunk", "chunkOffset": start}
        found["offset"] = writer.cut()
        found["chunkDigest"] = f"sha256:{hashlib.sha256(chunk).hexdigest()}"
        if start + chunk_size < len(content):
            found["chunkSize"] = chunk_size
        entries.append(found)
        writer.write(chunk)
    writer.write(bytes(-len(content) % 512))
    return entries
