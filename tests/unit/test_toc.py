"""fusestore.toc: what tables of contents say, and which are refused."""

import json
import tarfile
from typing import Any

import pytest
from rig.stargz import LANDMARK, make_stargz

from fusestore.errors import NoToc
from fusestore.nodes import Digest
from fusestore.oci import Descriptor
from fusestore.toc import CHUNK_MAX, FOOTER, TocPlace, find_toc, parse_footer, parse_toc

DIGEST = "sha256:" + "ab" * 32
GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"


def _layer(annotations: dict[str, str], media_type: str = GZIP) -> Descriptor:
    return Descriptor(media_type, Digest(DIGEST), 1000, annotations)


def _chunked(prefix: str, position: str = "100:200:3000:1") -> dict[str, str]:
    return {f"{prefix}.manifest-checksum": DIGEST, f"{prefix}.manifest-position": position}


@pytest.mark.parametrize("prefix", ["io.github.containers.zstd-chunked", "io.containers.zstd-chunked"])
def test_where_the_table_of_zstd_chunked_is(prefix: str) -> None:
    assert find_toc(_layer(_chunked(prefix), ZSTD)) == TocPlace(Digest(DIGEST), "zstd", 100, 200, 3000)


def test_the_table_of_estargz_is_found_by_its_footer() -> None:
    annotations = {"containerd.io/snapshot/stargz/toc.digest": DIGEST}
    assert find_toc(_layer(annotations)) == TocPlace(Digest(DIGEST), "gzip")
    stargz = make_stargz([])
    assert parse_footer(stargz.data[-FOOTER:]) == stargz.toc_offset
    with pytest.raises(NoToc, match="footer"):
        parse_footer(stargz.data[-FOOTER - 1 : -1])


def test_an_ordinary_layer_has_none() -> None:
    assert find_toc(_layer({})) is None
    assert find_toc(_layer({"containerd.io/snapshot/stargz/toc.digest": DIGEST}, ZSTD)) is None


@pytest.mark.parametrize(
    "annotations",
    [
        _chunked("io.github.containers.zstd-chunked", "900:200:3000:1"),
        _chunked("io.github.containers.zstd-chunked", "100:0:3000:1"),
        _chunked("io.github.containers.zstd-chunked", "100:200:99999999999:1"),
        _chunked("io.containers.zstd-chunked") | {"io.containers.zstd-chunked.manifest-checksum": "x"},
        {"containerd.io/snapshot/stargz/toc.digest": "md5:1"},
    ],
)  # fmt: skip
def test_annotations_that_cannot_be(annotations: dict[str, str]) -> None:
    with pytest.raises(NoToc):
        find_toc(_layer(annotations, ZSTD if "containerd" not in next(iter(annotations)) else GZIP))


def _file(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "type": "reg", "size": 10, "offset": 7, "digest": DIGEST, **fields}


def _parse(*entries: Any, end: int = 500) -> Any:
    return parse_toc(json.dumps({"version": 1, "entries": entries}).encode(), end)


def test_chunks_are_numbered_through() -> None:
    toc = _parse(
        _file("a", chunkSize=6, chunkDigest=DIGEST),
        {"name": "a", "type": "chunk", "offset": 90, "chunkOffset": 6, "chunkDigest": DIGEST},
        _file("b", offset=200, endOffset=220),
    )
    digest = bytes.fromhex("ab" * 32)
    assert [tuple(chunk) for chunk in toc.chunks] == [
        (0, 7, 90, 0, 6, digest), (6, 90, 200, 0, 4, digest), (10, 200, 220, 0, 10, digest),
    ]  # fmt: skip
    assert (toc.size, toc.prefetch_end) == (20, 0)
    assert [entry.data[0].source for entry in toc.entries] == [0, 10]


def test_a_chunk_inside_of_a_member() -> None:
    """stargz-snapshotter, docs/estargz.md, innerOffset."""
    toc = _parse(_file("a"), _file("b", innerOffset=512))
    assert [(chunk.offset, chunk.end, chunk.inner) for chunk in toc.chunks] == [(7, 500, 0), (7, 500, 512)]


def test_the_landmark() -> None:
    member = tarfile.TarInfo("x")
    stargz = make_stargz([(member, b"")], first=["x"])
    place = next(entry["offset"] for entry in stargz.entries if entry["name"] == LANDMARK)
    assert (
        parse_toc(json.dumps({"entries": stargz.entries}).encode(), stargz.toc_offset).prefetch_end == place
    )


@pytest.mark.parametrize(
    "entries",
    [
        [_file("a", digest="")],
        [_file("a", digest="sha256:zz")],
        [_file("a", chunkSize=6, chunkDigest=DIGEST)],
        [_file("a", chunkSize=11, chunkDigest=DIGEST)],
        [_file("a", chunkSize=6), {"name": "a", "type": "chunk", "offset": 90, "chunkDigest": DIGEST}],
        [_file("a", size=CHUNK_MAX + 1)],
        [_file("a", size=-1)],
        [_file("a", size=True)],
        [_file("a", size="10")],
        [_file("a", offset=500)],
        [_file("a", endOffset=7)],
        [_file("a", endOffset=501)],
        [_file("a", uid=1 << 32)],
        [_file("a", innerOffset=1 << 40)],
        [_file("a", xattrs={"user.x": "%"})],
        [_file("a", xattrs=["user.x"])],
        [_file("not-\ufffd-utf8")],
        [_file("a", xattrs={"user.\ufffd": ""})],
        [{"name": "l", "type": "symlink", "linkName": "\ufffd"}],
        [{"name": "c", "type": "chunk", "offset": 1}],
        [{"name": "s", "type": "socket"}],
        [{"name": 1, "type": "dir"}],
        ["a"],
    ],
    ids=repr,
)
def test_tables_that_are_refused(entries: list[Any]) -> None:
    with pytest.raises(NoToc):
        _parse(*entries)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"entries": 1}', b'{"entries": [' * 1000], ids=len)
def test_what_is_no_table(data: bytes) -> None:
    with pytest.raises(NoToc):
        parse_toc(data, 10)


@pytest.mark.parametrize("value", [b"{}", b"[]", b"1", b'""'])
def test_a_table_of_nothing_but_values_takes_no_memory(value: bytes) -> None:
    """It would take thirty times its own size, and comes in a thousandth of that."""
    data = b'{"entries":[' + (value + b",") * (13 << 20) + value + b"]}"
    with pytest.raises(NoToc, match="too large"):
        parse_toc(data, 10)
