"""What is no tar, in whatever compression, is refused as a layer and leaves nothing behind."""

import bz2
import gzip
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from rig.ocisources import OCI, SourceMaker, digest
from rig.tars import END, header, member

from fusestore.errors import LayerRefused
from fusestore.store import Store

JUNK = {
    "text": b'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nNAME="Debian GNU/Linux"\n' * 20,
    "too short for a header": b"sorry, not even enough info for a tar header here\n",
    "half a header": header(b"file")[:256],
    "a header without its content": header(b"file", size=1000),
    "one byte off": b"\0" + member(b"file", b"content") + END,
    "noise": bytes((number * number + number // 7) % 251 for number in range(3000)),
}

COMPRESSIONS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "uncompressed": (lambda data: data, "tar"),
    "gzip": (gzip.compress, "tar+gzip"),
    "two gzip members": (lambda data: gzip.compress(data[:20]) + gzip.compress(data[20:]), "tar+gzip"),
    "zstd": (zstandard.compress, "tar+zstd"),
    "bzip2": (bz2.compress, "tar"),
    "xz": (lzma.compress, "tar"),
}


def _contents(store: Store) -> dict[str, bytes]:
    """Every file of the store; that a directory is there says nothing."""
    files = (Path(directory, name) for directory, _, names in os.walk(store.path) for name in names)
    return {str(path): path.read_bytes() for path in files}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("junk", JUNK)
def test_junk_is_refused_without_a_trace(
    tmp_path: Path, store: Store, one: str, junk: str, compression: str
) -> None:
    store.import_image(one)
    before = _contents(store)
    compress, kind = COMPRESSIONS[compression]
    maker = SourceMaker()
    layer = maker.blob(compress(JUNK[junk]), f"{OCI}layer.v1.{kind}")
    rootfs = {"rootfs": {"type": "layers", "diff_ids": [digest(JUNK[junk])]}}
    source = maker.add(maker.image([], rootfs, layers=[layer]), "junk").directory(tmp_path / "junk")
    with pytest.raises(LayerRefused):
        store.import_image(source)
    assert _contents(store) == before
    assert os.listdir(Path(store.path, "tmp")) == []
