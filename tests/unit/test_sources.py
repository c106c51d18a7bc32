"""Sources of images: which forms are read, and what is refused with which advice."""

import bz2
import gzip
import json
import lzma
import os
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from rig.ocisources import OCI, SourceMaker, docker_archive, tar_of

from fusestore import sourcearchive
from fusestore.errors import BadSource
from fusestore.oci import DOCUMENT_MAX, LAYERS_MAX
from fusestore.sources import Source, machine_platform, open_source

LOWER, UPPER = tar_of({"a": b"1"}), tar_of({"b": b"2"})
ANNOTATION = "org.opencontainers.image.ref.name"


def content(source: Source) -> list[bytes]:
    """The bytes of its layers; closes it."""
    found = []
    for layer in source.layers:
        reader = layer.open()
        data = b""
        while chunk := reader.read(1000):
            data += chunk
        reader.close()
        assert len(data) == layer.size
        found.append(data)
    source.close()
    return found


def plain_layout(path: Path) -> str:
    maker = SourceMaker()
    return maker.add(maker.image([LOWER, UPPER]), "x:1").directory(path).removeprefix("oci:")


def gzipped() -> list[bytes]:
    return [gzip.compress(tar, mtime=0) for tar in (LOWER, UPPER)]


@pytest.mark.parametrize("prefix", ["", "oci:"])
def test_a_directory(tmp_path: Path, prefix: str) -> None:
    source = open_source(prefix + plain_layout(tmp_path / "d"))
    assert source.names == ("x:1",)
    assert content(source) == gzipped()


@pytest.mark.parametrize("prefix", ["", "oci-archive:"])
def test_an_archive(tmp_path: Path, prefix: str) -> None:
    maker = SourceMaker()
    text = maker.add(maker.image([LOWER, UPPER]), "x:1").archive(tmp_path / "a.tar")
    assert content(open_source(prefix + text.removeprefix("oci-archive:"))) == gzipped()


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, zstandard.compress])
def test_a_compressed_archive(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    maker = SourceMaker()
    maker.add(maker.image([LOWER, UPPER]), "x:1")
    (tmp_path / "a").write_bytes(compress(tar_of(maker.all_files())))
    assert content(open_source(str(tmp_path / "a"), scratch=str(tmp_path))) == gzipped()
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("prefix", ["", "docker-archive:"])
def test_docker_save(tmp_path: Path, prefix: str) -> None:
    (tmp_path / "a").write_bytes(tar_of(docker_archive([LOWER, UPPER], ["x:1", "y:2", "not a name"])))
    source = open_source(f"{prefix}{tmp_path}/a")
    assert (source.manifest, source.names) == (None, ("x:1", "y:2"))
    assert content(source) == [LOWER, UPPER]


def test_docker_save_without_tags(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(tar_of(docker_archive([LOWER], None)))
    with open_source(f"{tmp_path}/a") as source:
        assert source.names == ()


def test_legacy_docker_save_links_layers_to_each_other(tmp_path: Path) -> None:
    links = {"1/layer.tar": "../0/layer.tar"}
    files = docker_archive([LOWER, LOWER], ["x:1"], links)
    (tmp_path / "a").write_bytes(tar_of(files, links))
    assert content(open_source(f"{tmp_path}/a")) == [LOWER, LOWER]


@pytest.mark.parametrize("target", ["../../outside", "/etc/passwd", "../1/layer.tar", "missing"])
def test_links_that_lead_nowhere(tmp_path: Path, target: str) -> None:
    links = {"1/layer.tar": target}
    (tmp_path / "a").write_bytes(tar_of(docker_archive([LOWER, LOWER], ["x:1"], links), links))
    with pytest.raises(BadSource, match=r"outside of itself|is missing"):
        open_source(f"{tmp_path}/a")


@pytest.mark.parametrize(
    "ref", ["x:1", "docker.io/library/x:1", "library/x:1"], ids=["short", "full", "without host"]
)
def test_docker_tags_are_found_however_they_are_spelled(tmp_path: Path, ref: str) -> None:
    (tmp_path / "a").write_bytes(tar_of(docker_archive([LOWER], ["docker.io/library/x:1"])))
    with open_source(f"docker-archive:{tmp_path}/a:{ref}") as source:
        assert source.names == (ref,)


def several(tmp_path: Path) -> str:
    maker = SourceMaker()
    maker.add(maker.image([LOWER]), "one").add(maker.image([UPPER]), "two").add(maker.image([LOWER, UPPER]))
    return maker.directory(tmp_path / "several")


@pytest.mark.parametrize("ref", ["", ":three"])
def test_several_images_are_offered_by_name_or_digest(tmp_path: Path, ref: str) -> None:
    with pytest.raises(BadSource, match=r"one, two, sha256:"):
        open_source(several(tmp_path) + ref)


def test_one_of_several_by_name(tmp_path: Path) -> None:
    source = open_source(several(tmp_path) + ":two")
    assert source.names == ("two",)
    assert content(source) == gzipped()[1:]


def test_one_of_several_by_digest(tmp_path: Path) -> None:
    text = several(tmp_path)
    index = json.loads((tmp_path / "several/index.json").read_bytes())
    source = open_source(f"{text}:{index['manifests'][2]['digest']}")
    assert source.names == ()
    assert content(source) == gzipped()


def test_several_in_docker_save(tmp_path: Path) -> None:
    one, two = docker_archive([LOWER], ["one:1"]), docker_archive([UPPER], ["two:1"])
    manifest = json.loads(one["manifest.json"]) + json.loads(two["manifest.json"])
    manifest[1]["Layers"] = ["u"]
    files = {**one, **two, "u": UPPER, "0/layer.tar": LOWER, "manifest.json": json.dumps(manifest).encode()}
    (tmp_path / "a").write_bytes(tar_of(files))
    with pytest.raises(BadSource, match="one:1, two:1"):
        open_source(f"{tmp_path}/a")
    assert content(open_source(f"docker-archive:{tmp_path}/a:two:1")) == [UPPER]
    assert content(open_source(f"docker-archive:{tmp_path}/a:@0")) == [LOWER]


def test_one_image_of_two_names(tmp_path: Path) -> None:
    maker = SourceMaker()
    image = maker.image([LOWER])
    text = maker.add(image, "one").add(image, "two").directory(tmp_path / "d")
    with open_source(text) as source:
        assert source.names == ("one", "two")


def test_names_that_cannot_be_ours_are_left_out(tmp_path: Path) -> None:
    maker = SourceMaker()
    with open_source(maker.add(maker.image([]), "a b").directory(tmp_path / "d")) as source:
        assert source.names == ()


def test_containerds_full_name_is_preferred(tmp_path: Path) -> None:
    maker = SourceMaker()
    annotations = {ANNOTATION: "latest", "io.containerd.image.name": "docker.io/library/x:latest"}
    text = maker.add(maker.image([]), annotations=annotations).directory(tmp_path / "d")
    for ref in ("", ":latest", ":docker.io/library/x:latest"):
        with open_source(text + ref) as source:
            assert source.names == ("docker.io/library/x:latest",)


def test_a_path_with_colons(tmp_path: Path) -> None:
    plain_layout(tmp_path / "a:b:c")
    with open_source(f"oci:{tmp_path}/a:b:c") as source:
        assert source.names == ("x:1",)


OTHER = {"architecture": "none-such", "os": "linux"}


def platform(**fields: str) -> dict[str, str]:
    return {"architecture": machine_platform().architecture, "os": "linux", **fields}


@pytest.mark.parametrize(
    "media_type", [OCI + "index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"]
)
def test_of_a_manifest_list_this_machines_image_is_chosen(tmp_path: Path, media_type: str) -> None:
    maker = SourceMaker()
    index = maker.index(
        {**maker.image([UPPER]), "platform": OTHER},
        {**maker.image([LOWER]), "platform": platform()},
        {**maker.image([]), "platform": {"architecture": "unknown", "os": "unknown"}},
        media_type=media_type,
    )
    assert content(open_source(maker.add(index, "x").directory(tmp_path / "d"))) == gzipped()[:1]


def test_the_only_linux_image_is_taken_whatever_it_is_for(tmp_path: Path) -> None:
    maker = SourceMaker()
    index = maker.index(
        {**maker.image([LOWER]), "platform": OTHER},
        {**maker.image([UPPER]), "platform": platform(os="windows")},
    )
    assert content(open_source(maker.add(index, "x").directory(tmp_path / "d"))) == gzipped()[:1]


def test_no_image_for_this_machine(tmp_path: Path) -> None:
    maker = SourceMaker()
    index = maker.index(
        {**maker.image([LOWER]), "platform": OTHER},
        {**maker.image([UPPER]), "platform": {"architecture": "other", "os": "linux"}},
    )
    with pytest.raises(BadSource, match=r"no single image for linux/.* but linux/none-such, linux/other"):
        open_source(maker.add(index, "x").directory(tmp_path / "d"))


def test_platforms_in_index_json(tmp_path: Path) -> None:
    maker = SourceMaker()
    maker.add(maker.image([UPPER]), "x", platform=OTHER).add(maker.image([LOWER]), "x", platform=platform())
    assert content(open_source(maker.directory(tmp_path / "d") + ":x")) == gzipped()[:1]


def test_indexes_nest_only_so_deep(tmp_path: Path) -> None:
    maker = SourceMaker()
    index = maker.image([])
    for _ in range(10):
        index = maker.index(index)
    with pytest.raises(BadSource, match="not the manifest of an image"):
        open_source(maker.add(index).directory(tmp_path / "d"))


def docker_types(maker: SourceMaker) -> dict[str, Any]:
    layer = maker.blob(gzip.compress(LOWER, mtime=0), "application/vnd.docker.image.rootfs.diff.tar.gzip")
    made = maker.image([LOWER])
    config = json.loads(maker.files["blobs/sha256/" + made["digest"][7:]])["config"]
    return maker.blob(
        json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
                "config": {**config, "mediaType": "application/vnd.docker.container.image.v1+json"},
                "layers": [layer],
            }
        ).encode(),
        "application/vnd.docker.distribution.manifest.v2+json",
    )


def test_dockers_media_types(tmp_path: Path) -> None:
    maker = SourceMaker()
    with open_source(maker.add(docker_types(maker)).directory(tmp_path / "d")) as source:
        assert source.layers[0].media_type == "application/vnd.docker.image.rootfs.diff.tar.gzip"


def test_an_image_without_layers(tmp_path: Path) -> None:
    maker = SourceMaker()
    config = {"rootfs": {"type": "layers", "diff_ids": None}}
    assert (
        content(open_source(maker.add(maker.image(changes=config, layers=None)).directory(tmp_path / "d")))
        == []
    )


def bent(**fields: Any) -> Callable[[SourceMaker], dict[str, Any]]:
    return lambda maker: maker.image([LOWER], **fields)


def layers_of(maker: SourceMaker, **fields: Any) -> list[dict[str, Any]]:
    return [{**maker.blob(gzip.compress(LOWER, mtime=0), OCI + "layer.v1.tar+gzip"), **fields}]


WRONG: dict[str, tuple[Callable[[SourceMaker], dict[str, Any]], str]] = {
    "a layer too few": (bent(layers=[]), "lists 0 layers, the config 1"),
    "schema 1": (bent(schemaVersion=1), "schema 1: copy the image with skopeo"),
    "another manifest": (bent(mediaType="application/x"), "not the manifest of an image"),
    "no list of layers": (bent(layers=7), "no list of layers"),
    "a layer of another type": (
        lambda maker: maker.image([LOWER], layers=layers_of(maker, mediaType="application/x+encrypted")),
        "a layer of type 'application/x.encrypted'",
    ),
    "a size that lies": (lambda maker: maker.image([LOWER], layers=layers_of(maker, size=5)), "bytes, not 5"),
    "a negative size": (
        lambda maker: maker.image([LOWER], layers=layers_of(maker, size=-1)),
        "wrong size, -1",
    ),
    "a true size": (
        lambda maker: maker.image([LOWER], layers=layers_of(maker, size=True)),
        "wrong size, True",
    ),
    "no digest": (lambda maker: maker.image([LOWER], layers=layers_of(maker, digest=7)), "without digest"),
    "sha512": (lambda maker: maker.image([LOWER], layers=layers_of(maker, digest="sha512:00")), "sha512:00"),
    "traversal": (
        lambda maker: maker.image([LOWER], layers=layers_of(maker, digest="sha256:../../../../etc/passwd")),
        "is not sha256:<64 hex digits>",
    ),
    "a missing layer": (
        lambda maker: maker.image([LOWER], layers=layers_of(maker, digest="sha256:" + "0" * 64)),
        "cannot be read",
    ),
    "too many layers": (
        lambda maker: maker.image([LOWER], layers=layers_of(maker) * (LAYERS_MAX + 1)),
        "over the limit of",
    ),
    "for windows": (lambda maker: maker.image([LOWER], {"os": "windows"}), "only images for linux"),
    "no diff_ids": (lambda maker: maker.image([LOWER], {"rootfs": {}}), "no rootfs.diff_ids"),
    "bad diff_ids": (
        lambda maker: maker.image([LOWER], {"rootfs": {"diff_ids": ["x"]}}),
        "'x' is not sha256",
    ),
    "one diff_id too many": (
        lambda maker: maker.image([LOWER], {"rootfs": {"diff_ids": ["sha256:" + "0" * 64] * 2}}),
        "lists 1 layers, the config 2",
    ),
    "a helm chart": (
        lambda maker: maker.blob(
            json.dumps(
                {"schemaVersion": 2, "config": maker.blob(b"{}", "application/x"), "layers": []}
            ).encode(),
            OCI + "manifest.v1+json",
        ),
        "is of an artifact",
    ),
    "no JSON": (lambda maker: maker.blob(b"{", OCI + "manifest.v1+json"), "no JSON"),
    "no object": (lambda maker: maker.blob(b"[]", OCI + "manifest.v1+json"), "no JSON object"),
    "nested deep": (lambda maker: maker.blob(b"[" * 100_000, OCI + "manifest.v1+json"), "no JSON"),
    "too large": (lambda maker: maker.blob(b" " * (DOCUMENT_MAX + 1), OCI + "manifest.v1+json"), "has over"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("archived", [False, True])
def test_what_is_refused(tmp_path: Path, kind: str, archived: bool) -> None:
    make, message = WRONG[kind]
    maker = SourceMaker()
    maker.add(make(maker), "x")
    text = maker.archive(tmp_path / "a") if archived else maker.directory(tmp_path / "d")
    with pytest.raises(BadSource, match=message.replace("cannot be read", "cannot be read|is missing")):
        open_source(text)


def test_a_manifest_with_another_digest(tmp_path: Path) -> None:
    maker = SourceMaker()
    image = maker.image([LOWER])
    maker.files["blobs/sha256/" + image["digest"][7:]] += b" "
    with pytest.raises(BadSource, match="another digest or size"):
        open_source(maker.add(image).directory(tmp_path / "d"))


@pytest.mark.parametrize("change", [{"size": 1}, {"digest": 5}, {"mediaType": 5}])
def test_bad_descriptors_in_index_json(tmp_path: Path, change: dict[str, Any]) -> None:
    maker = SourceMaker()
    maker.add({**maker.image([]), **change})
    with pytest.raises(BadSource):
        open_source(maker.directory(tmp_path / "d"))


@pytest.mark.parametrize("manifests", [None, 5, {}, [5], []])
def test_bad_lists_in_index_json(tmp_path: Path, manifests: object) -> None:
    plain_layout(tmp_path / "d")
    (tmp_path / "d/index.json").write_text(json.dumps({"manifests": manifests}))
    with pytest.raises(BadSource):
        open_source(str(tmp_path / "d"))


def test_a_fifo_does_not_hold_us(tmp_path: Path) -> None:
    path = plain_layout(tmp_path / "d")
    os.unlink(f"{path}/index.json")
    os.mkfifo(f"{path}/index.json")
    with pytest.raises(BadSource, match="no regular file"):
        open_source(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("docker://busybox", "is in a registry: fusestore pull docker://busybox"),
        ("docker-daemon:busybox:1", "copy it first, with skopeo copy docker-daemon:busybox:1"),
        ("containers-storage:x", "copy it first"),
        ("oci:/none/such", "there is no /none/such"),
        ("busybox:busybox", "there is no busybox:busybox: give oci:.* fusestore pull NAME"),
        ("/none/such", "there is no /none/such"),
        ("", "there is no such source"),
        ("oci:{}/file", "is not a directory, as oci: wants"),
        ("oci-archive:{}/dir", "is not a file, as oci-archive: wants"),
        ("{}/dir", "holds no image"),
        ("{}/file", "holds no image|no sound archive"),
        ("oci:{}/dir", "no OCI image layout"),
        ("oci-archive:{}/file", "no OCI image layout|no sound archive"),
        ("docker-archive:{}/file", "no docker archive|no sound archive"),
        ("/dev/null", "no regular file"),
    ],
)
def test_what_is_no_source(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "file").write_bytes(b"text")
    with pytest.raises(BadSource, match=message):
        open_source(text.format(tmp_path))


@pytest.mark.parametrize("cut", [1, 100, 511, 512, 700, 1024, 3000])
def test_truncated_archives(tmp_path: Path, cut: int) -> None:
    maker = SourceMaker()
    data = tar_of(maker.add(maker.image([LOWER, UPPER]), "x:1").all_files())
    (tmp_path / "a").write_bytes(data[: -tarfile.RECORDSIZE // 2][:-cut].rstrip(b"\0")[:-cut])
    with pytest.raises(BadSource):
        content(open_source(f"{tmp_path}/a"))


@pytest.mark.parametrize("magic", [b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\0", b"BZh9"])
def test_archives_that_do_not_decompress(tmp_path: Path, magic: bytes) -> None:
    (tmp_path / "a").write_bytes(magic + b"\x07" * 100)
    with pytest.raises(BadSource, match="cannot be decompressed"):
        open_source(f"{tmp_path}/a")


def test_a_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sourcearchive, "ARCHIVE_MAX", 1 << 20)
    (tmp_path / "a").write_bytes(gzip.compress(bytes(2 << 20)))
    with pytest.raises(BadSource, match="bytes decompressed"):
        open_source(f"{tmp_path}/a")


def tar_header(size: bytes, type: bytes = b"0") -> bytes:
    block = bytearray(512)
    block[:4], block[100:108], block[124:136], block[156:157] = b"name", b"0000644\0", size, type
    block[257:265] = b"ustar\00000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "header",
    [
        tar_header(b"\xff" + struct.pack(">3xq", -512)),
        tar_header(b"\xff" + struct.pack(">3xq", -(1 << 40))),
        tar_header(b"\x80" + struct.pack(">3xq", 1 << 62)),
        tar_header(b"77777777777\0", b"x"),
        tar_header(b"77777777777\0", b"L"),
    ],
    ids=["back to itself", "before the start", "enormous", "PAX of 8 GiB", "name of 8 GiB"],
)
def test_archives_that_lie_about_sizes(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "a").write_bytes(header + bytes(2048))
    with pytest.raises(BadSource):
        open_source(f"{tmp_path}/a")


def test_too_many_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sourcearchive, "MEMBERS_MAX", 10)
    (tmp_path / "a").write_bytes(tar_of({str(number): b"" for number in range(11)}))
    with pytest.raises(BadSource, match="no sound archive"):
        open_source(f"{tmp_path}/a")


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    maker = SourceMaker()
    text = maker.add(maker.image([LOWER]), "x").archive(tmp_path / "a")
    before = os.listdir("/proc/self/fd")
    content(open_source(text))
    with pytest.raises(BadSource):
        open_source(text + ":none")
    assert os.listdir("/proc/self/fd") == before
