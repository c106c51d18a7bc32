"""TarScanner against the standard library's tarfile, against GNU tar and bsdtar, and on tars that lie."""

import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from rig.requirements import need
from rig.tars import END, content, header, long_name, member, padded, pax, scan

from fusestore import acl
from fusestore.errors import LayerRefused
from fusestore.nodes import Extent, TarEntry
from fusestore.tar import TarLimits, TarScanner

ACL_TEXT = b"user::rw-,user:12:r--,group::r--,mask::r--,other::---"
OTHER_ACL, ACL = (
    acl.inherited(acl.with_mode(acl.from_text(ACL_TEXT) or b"", mode), 0o100666)[1][0][1]
    for mode in (0o600, 0o640)
)

# Against tarfile

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def all_kinds(format: int) -> bytes:
    """What the three formats can all say, and more in those that can."""
    more = format != tarfile.USTAR_FORMAT
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=format) as tar:

        def add(name: str, type: bytes, body: bytes = b"", **fields: object) -> None:
            info = tarfile.TarInfo(name)
            info.type = type
            info.size = len(body)
            for field, value in {"mtime": 1_600_000_000, "mode": 0o4755, **fields}.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(body) if body else None)

        add("./", tarfile.DIRTYPE)
        add("empty", tarfile.REGTYPE)
        add("old", tarfile.AREGTYPE, b"x")
        add("contiguous", tarfile.CONTTYPE, b"xy")
        add("block", tarfile.REGTYPE, b"b" * 512)
        add("blocks", tarfile.REGTYPE, b"c" * 1025, uid=0o7777777, gid=12)
        add("dir/", tarfile.DIRTYPE)
        add("hard", tarfile.LNKTYPE, linkname="block")
        add("soft", tarfile.SYMTYPE, linkname="../x//y/", mode=0o777)
        add("char", tarfile.CHRTYPE, devmajor=1, devminor=300)
        add("disk", tarfile.BLKTYPE, devmajor=259, devminor=0)
        add("fifo", tarfile.FIFOTYPE)
        add("p" * 90 + "/" + "n" * 90, tarfile.REGTYPE, b"long")
        if more:
            add("p/" * 300 + "n" * 200, tarfile.REGTYPE, b"longer")
            add("far", tarfile.SYMTYPE, linkname="t" * 300)
            add("big-owner", tarfile.REGTYPE, uid=4_000_000_000, gid=3_000_000_000)
            add("before-1970", tarfile.REGTYPE, mtime=-86_400)
            add("grün", tarfile.REGTYPE, b"utf-8")
    return made.getvalue()


def as_tarfile_says(info: tarfile.TarInfo) -> tuple[object, ...]:
    type = b"0" if info.isreg() else info.type
    path = info.name.encode(errors="surrogateescape")
    link = info.linkname.encode() if type in b"12" else b""
    size = info.size if info.isreg() else 0
    rdev = os.makedev(info.devmajor, info.devminor) if info.isdev() and not info.isfifo() else 0
    offset = info.offset_data if size else None
    return type, path, link, info.mode, info.uid, info.gid, size, int(info.mtime) * 10**9, rdev, offset


def as_we_say(entry: TarEntry) -> tuple[object, ...]:
    offset = entry.data[0].source if entry.data else None
    return *entry[:1], entry.path.rstrip(b"/"), *entry[2:9], offset


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS.keys())
def test_every_field_is_what_tarfile_reads(format: int) -> None:
    data = all_kinds(format)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [as_tarfile_says(info) for info in tar]
    assert [as_we_say(entry) for entry in scan(data)] == expected


# Against the files that tools packed


def sparse_file(path: Path, runs: list[tuple[int, bytes]], size: int) -> bytes:
    with path.open("wb") as file:
        for offset, data in runs:
            file.seek(offset)
            file.write(data)
        file.truncate(size)
    return path.read_bytes()


SPARSE = {
    "hole-first": ([(1 << 20, b"end")], (1 << 20) + 3),
    "hole-last": ([(0, b"begin")], 1 << 20),
    "only-hole": ([], 1 << 20),
    "few": ([(n << 16, b"x" * 5000) for n in range(0, 8, 2)], 600_000),
    "many": ([(n << 13, b"%d" % n) for n in range(0, 300, 2)], 300 << 13),
    "odd-end": ([(0, b"a" * 4096), (100_000, b"z" * 777)], 100_777),
}
SPARSE_FORMATS = {
    "gnu": ["tar", "--format=gnu", "-S"],
    "0.0": ["tar", "--format=posix", "-S", "--sparse-version=0.0"],
    "0.1": ["tar", "--format=posix", "-S", "--sparse-version=0.1"],
    "1.0": ["tar", "--format=posix", "-S", "--sparse-version=1.0"],
    "bsdtar": ["bsdtar", "--format=pax"],
}


@pytest.mark.parametrize("command", SPARSE_FORMATS.values(), ids=SPARSE_FORMATS.keys())
@pytest.mark.parametrize("step", [1, 512, 100_000])
def test_sparse_files_read_as_they_were(area: Path, command: list[str], step: int) -> None:
    need("images", shutil.which(command[0]) is not None, f"install {command[0]}")
    files = area / "sparse"
    files.mkdir(exist_ok=True)
    plain = {}
    for name, (runs, size) in SPARSE.items():
        # Long enough that the PAX forms also need a path record.
        plain[(name * 12)[:120].encode()] = sparse_file(files / (name * 12)[:120], runs, size)
    packed = subprocess.run(
        [*command, "-b1", "-cf", "-", "-C", files, *map(os.fsdecode, plain)], check=True, capture_output=True
    )
    entries = scan(packed.stdout, step)
    assert {entry.path: content(entry, packed.stdout) for entry in entries} == plain
    assert any(len(entry.data) > 100 for entry in entries), "the tool stored no holes"


@pytest.mark.parametrize(
    ("command", "mtime_ns"),
    [
        (["tar", "--format=posix", "--xattrs"], -1_500_000_001),
        (["tar", "--format=posix", "--xattrs"], 1_500_000_001),
        # libarchive 3.6 writes a time before 1970 as seconds rounded down and a positive fraction.
        (["bsdtar", "--format=pax"], 1_500_000_001),
    ],
)
def test_tools_xattrs_and_nanoseconds(area: Path, command: list[str], mtime_ns: int) -> None:
    need("images", shutil.which(command[0]) is not None, f"install {command[0]}")
    file = area / "attributed"
    file.write_bytes(b"content")
    os.setxattr(file, "user.plain", b"value")
    os.setxattr(file, "user.binary", bytes(range(256)))
    os.utime(file, ns=(0, mtime_ns))
    packed = subprocess.run([*command, "-cf", "-", "-C", area, file.name], check=True, capture_output=True)
    (entry,) = scan(packed.stdout)
    assert entry.mtime_ns == mtime_ns
    assert entry.xattrs == ((b"user.binary", bytes(range(256))), (b"user.plain", b"value"))


# What a header means


def only(data: bytes) -> TarEntry:
    (entry,) = scan(data)
    return entry


@pytest.mark.parametrize(
    ("records", "field", "value"),
    [
        ([(b"path", b"a/\xff\n=")], "path", b"a/\xff\n="),
        ([(b"size", b"3"), (b"path", b"p")], "path", b"p"),
        ([(b"uid", b"4294967294")], "uid", 4_294_967_294),
        ([(b"gid", b"7")], "gid", 7),
        ([(b"mtime", b"1.000000001")], "mtime_ns", 1_000_000_001),
        ([(b"mtime", b"1700000000.1234567899")], "mtime_ns", 1_700_000_000_123_456_789),
        ([(b"mtime", b"-1.5")], "mtime_ns", -1_500_000_000),
        ([(b"mtime", b"-0.000000001")], "mtime_ns", -1),
        ([(b"mtime", b"9007199254740993.")], "mtime_ns", 9_007_199_254_740_993 * 10**9),
        ([(b"SCHILY.xattr.user.a=b", b"")], "xattrs", ((b"user.a", b"b="),)),
        ([(b"SCHILY.xattr.user.n", b"\0\n=\xff")], "xattrs", ((b"user.n", b"\0\n=\xff"),)),
        ([(b"SCHILY.xattr.user.n", b"")], "xattrs", ((b"user.n", b""),)),
        ([(b"LIBARCHIVE.xattr.user.%41%3D", b"AP8")], "xattrs", ((b"user.A=", b"\0\xff"),)),
        (
            [(b"SCHILY.xattr.b", b"2"), (b"LIBARCHIVE.xattr.b", b"MQ=="), (b"SCHILY.xattr.a", b"")],
            "xattrs",
            ((b"a", b""), (b"b", b"2")),
        ),
        ([(b"SCHILY.acl.access", ACL_TEXT)], "xattrs", ((acl.ACCESS, ACL),)),
        ([(b"SCHILY.acl.default", ACL_TEXT)], "xattrs", ((acl.DEFAULT, ACL),)),
        (
            [(b"SCHILY.xattr." + acl.ACCESS, OTHER_ACL), (b"SCHILY.acl.access", ACL_TEXT)],
            "xattrs",
            ((acl.ACCESS, OTHER_ACL),),
        ),
        ([(b"SCHILY.acl.access", b"user::r,user:anna:r,group::r,mask::r,other::r")], "xattrs", ()),
        ([(b"comment", b"\0"), (b"atime", b"junk"), (b"VENDOR.x", b"y")], "xattrs", ()),
    ],
)
def test_pax_record(records: list[tuple[bytes, bytes]], field: str, value: object) -> None:
    entry = only(pax(*records) + member(b"file", b"abc") + END)
    assert getattr(entry, field) == value


@pytest.mark.parametrize(
    ("data", "path"),
    [
        (pax((b"path", b"g"), type=b"g") + member(b"h"), b"g"),
        (pax((b"path", b"g"), type=b"g") + pax((b"path", b"")) + member(b"h"), b"h"),
        (pax((b"path", b"g"), type=b"g") + pax((b"path", b"x")) + member(b"h"), b"x"),
        (pax((b"path", b"x")) + pax((b"uid", b"1")) + member(b"h"), b"h"),
        (pax((b"path", b"x")) + long_name(b"L") + member(b"h"), b"L"),
        (long_name(b"L") + pax((b"path", b"x")) + member(b"h"), b"L"),
        (member(b"n" * 100), b"n" * 100),
        (member(b"n", prefix=b"p" * 155), b"p" * 155 + b"/n"),
        (member(b"n", prefix=b"p", magic=b"ustar  \0"), b"n"),
        (member(b"n", prefix=b"p" * 131 + b"0" * 32 + b"tar\0"), b"p" * 131 + b"/n"),
    ],
)
def test_path_comes_from(data: bytes, path: bytes) -> None:
    assert only(data + END).path == path


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"mode": b"0100755\0"}, "mode", 0o755),
        ({"mode": b" 644 \0\0\0"}, "mode", 0o644),
        ({"mode": b"\0\0 644 \0"}, "mode", 0o644),
        ({"uid": b"        "}, "uid", 0),
        ({"uid": b"\x80\0\0\0\x12\x34\x56\x78"}, "uid", 0x12345678),
        ({"mtime": b"\xff" * 12}, "mtime_ns", -1_000_000_000),
        ({"mtime": b"\x80\0\0\0\x7f" + b"\xff" * 7}, "mtime_ns", ((1 << 63) - 1) * 10**9),
        ({"type": b"\0"}, "type", b"0"),
        ({"type": b"7"}, "type", b"0"),
        ({"type": b"3", "major": b"0000001\0", "minor": b"0000003\0"}, "rdev", os.makedev(1, 3)),
        ({"type": b"4", "major": b"0007777\0", "minor": b"3777777\0"}, "rdev", os.makedev(4095, 1_048_575)),
    ],
)  # fmt: skip
def test_header_field(fields: dict[str, bytes], name: str, value: object) -> None:
    assert getattr(only(member(b"file", **fields) + END), name) == value


@pytest.mark.parametrize("type", [b"1", b"2", b"3", b"4", b"5", b"6"])
def test_what_is_no_file_has_no_content_whatever_its_size_says(type: bytes) -> None:
    entries = scan(header(b"a", type=type, size=512, link=b"t") + member(b"b", b"content") + END)
    assert [(entry.path, entry.size) for entry in entries] == [(b"a", 0), (b"b", 7)]


@pytest.mark.parametrize("type", [b"0", b"\0", b"7"])
def test_regular_with_a_slash_is_a_directory(type: bytes) -> None:
    assert only(member(b"dir/", type=type) + END).type == b"5"


def test_only_links_have_a_link() -> None:
    assert only(pax((b"linkpath", b"x")) + member(b"file") + END).link == b""


def test_signed_checksums_are_read() -> None:
    block = header(b"\xff" * 100)
    signed = sum(byte - 256 if byte > 127 else byte for byte in block[:148] + b" " * 8 + block[156:])
    assert only(header(b"\xff" * 100, checksum=b"%06o\0 " % signed) + END).path == b"\xff" * 100


def test_sparse_name_and_size_win() -> None:
    records = [
        (b"GNU.sparse.major", b"1"),
        (b"GNU.sparse.minor", b"0"),
        (b"GNU.sparse.name", b"real"),
        (b"GNU.sparse.realsize", b"9"),
    ]
    entry = only(pax(*records) + member(b"GNUSparseFile.0/x", padded(b"2\n1\n2\n9\n0\n") + b"ab") + END)
    assert entry[:7] == (b"0", b"real", b"", 0o644, 0, 0, 9)
    assert [(extent.offset, extent.length) for extent in entry.data] == [(1, 2)]


# Where a tar ends


@pytest.mark.parametrize("end", [b"", bytes(512), END, END + b"anything", END + member(b"second tar") + END])
def test_end_of_the_tar(end: bytes) -> None:
    assert [entry.path for entry in scan(member(b"file", b"x") + end)] == [b"file"]


@pytest.mark.parametrize("data", [b"", bytes(512), END, pax((b"comment", b"of git"), type=b"g")])
def test_a_tar_may_be_empty(data: bytes) -> None:
    assert scan(data) == []


def test_truncated_anywhere_is_refused_or_ends_between_entries() -> None:
    data = all_kinds(tarfile.PAX_FORMAT)
    whole = scan(data)
    for length in range(0, len(data.rstrip(b"\0")), 128):
        try:
            entries = scan(data[:length])
        except LayerRefused:
            continue
        assert entries == whole[: len(entries)]
        assert not data[length : length + -length % 512].strip(b"\0"), "only padding may be missing"


@pytest.mark.parametrize("padding", [b"", b"\0"])
def test_the_last_padding_may_be_missing(padding: bytes) -> None:
    assert scan(header(b"a", size=1) + b"x" + padding) == scan(member(b"a", b"x"))


def test_size_counts_what_follows_the_end_too() -> None:
    scanner = TarScanner()
    scanner.feed(END + b"more")
    assert scanner.size == 1028


# What is refused

LIES = {
    "junk": b"this is no tar" * 100,
    "bad checksum": header(checksum=b"000001\0 "),
    "no checksum": header(checksum=b"        "),
    "checksum is no number": header(checksum=b"zzzzzz\0 "),
    "size is no number": header(size=b"00000000009\0"),
    "size with a sign": header(size=b"-0000000001\0"),
    "size with an underscore": header(size=b"0000000_001\0"),
    "negative size": header(size=b"\xff" * 12),
    "size over 64 bits": header(size=b"\x80" + b"\xff" * 11),
    "size over the limit": header(size=b"\x80\0\0\0\x40" + bytes(7)),
    "negative uid": header(uid=b"\xff" * 8),
    "uid over 32 bits": header(uid=b"\x80\0\0\xff\xff\xff\xff\xff"),
    "uid that chown ignores": pax((b"uid", b"4294967295")) + header(),
    "mtime over 64 bits": header(mtime=b"\x80\0\0\xff" + b"\xff" * 8),
    "major over 12 bits": header(type=b"3", major=b"0010000\0"),
    "negative minor": header(type=b"3", minor=b"\xff" * 8),
    "unknown type": header(type=b"V"),
    "directory with content": header(b"dir/", size=1) + padded(b"x"),
    "extended header over the limit": header(type=b"x", size=(1 << 20) + 1),
    "endless extended headers": pax((b"comment", b"x")) * 17 + header(),
    "zero block, then a header": bytes(512) + header(),
    "truncated header": header()[:-1],
    "truncated content": header(size=513) + bytes(512),
    "truncated extended header": pax((b"comment", b"x"))[:600],
    "truncated after an extended header": pax((b"path", b"x")),
    "pax record longer than the header": member(b"x", b"99 path=x\n", type=b"x") + header(),
    "pax record without newline": member(b"x", b"9 path=xy", type=b"x") + header(),
    "pax record of no length": member(b"x", b"0 path=x\n", type=b"x") + header(),
    "pax record shorter than its length": member(b"x", b"2 path=x\n", type=b"x") + header(),
    "pax record without =": member(b"x", b"8 pathx\n", type=b"x") + header(),
    "pax record without keyword": member(b"x", b"5 =x\n", type=b"x") + header(),
    "pax length that is endless": member(b"x", b"9" * 5000 + b" path=x\n", type=b"x") + header(),
    "NUL in a pax path": pax((b"path", b"a\0b")) + header(),
    "NUL in a pax link": pax((b"linkpath", b"a\0b")) + header(type=b"2"),
    "pax size is no number": pax((b"size", b"-1")) + header(),
    "pax size over 63 bits": pax((b"size", b"9223372036854775808")) + header(),
    "pax size of many digits": pax((b"size", b"9" * 5000)) + header(),
    "pax uid in hex": pax((b"uid", b"0x1")) + header(),
    "pax mtime with exponent": pax((b"mtime", b"1e400")) + header(),
    "pax mtime nan": pax((b"mtime", b"nan")) + header(),
    "pax mtime over 64 bits": pax((b"mtime", b"9223372036854775808")) + header(),
    "xattr without a name": pax((b"SCHILY.xattr.", b"x")) + header(),
    "xattr with a long name": pax((b"SCHILY.xattr." + b"n" * 256, b"x")) + header(),
    "xattr with NUL in its name": pax((b"LIBARCHIVE.xattr.a%00b", b"")) + header(),
    "xattr with a long value": pax((b"SCHILY.xattr.n", b"x" * 65_537)) + header(),
    "ACL of unknown form": pax((b"SCHILY.xattr.system.posix_acl_access", b"x")) + header(),
    "ACL in nonsense": pax((b"SCHILY.acl.default", b"nonsense")) + header(),
    "xattr that is not base64": pax((b"LIBARCHIVE.xattr.n", b"!")) + header(),
    "xattrs over the limit": pax(*((b"SCHILY.xattr.%d" % n, b"x" * 60_000) for n in range(5))) + header(),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("step", [None, 100])
def test_lies_are_refused(lie: str, step: int | None) -> None:
    with pytest.raises(LayerRefused) as refusal:
        scan(LIES[lie], step)
    assert ("truncated" in str(refusal.value)) == lie.startswith("truncated"), "refused for another reason"


def sparse_pax(*records: tuple[bytes, bytes], stored: bytes = b"", type: bytes = b"0") -> bytes:
    return pax(*((b"GNU.sparse." + keyword, value) for keyword, value in records)) + member(
        b"f", stored, type=type
    )


V1 = [(b"major", b"1"), (b"minor", b"0"), (b"realsize", b"9")]


def old_sparse(slots: bytes, real_size: int, stored: bytes = b"", **fields: bytes) -> bytes:
    tail = slots.ljust(96, b"\0") + b"\0" + b"%011o\0" % real_size
    fields = {"magic": b"ustar  \0", "prefix": bytes(41) + tail, **fields}
    return member(b"f", stored, type=b"S", **fields)


SPARSE_LIES = {
    "unknown version": sparse_pax((b"major", b"2"), (b"minor", b"0"), (b"size", b"1")),
    "no size": sparse_pax((b"map", b"0,0")),
    "odd map": sparse_pax((b"map", b"0"), (b"size", b"1")),
    "map that is no list": sparse_pax((b"map", b"0,,0"), (b"size", b"1")),
    "map of another length": sparse_pax((b"map", b"0,0"), (b"numblocks", b"2"), (b"size", b"1")),
    "not ascending": sparse_pax((b"map", b"2,1,0,1"), (b"size", b"9"), stored=b"ab"),
    "overlap": sparse_pax((b"map", b"0,2,1,1"), (b"size", b"9"), stored=b"abc"),
    "beyond the file": sparse_pax((b"map", b"0,2"), (b"size", b"1"), stored=b"ab"),
    "more content than map": sparse_pax((b"map", b"0,1"), (b"size", b"9"), stored=b"ab"),
    "more map than content": sparse_pax((b"map", b"0,2"), (b"size", b"9"), stored=b"a"),
    "out of order": sparse_pax((b"size", b"9"), (b"numbytes", b"0"), (b"offset", b"0")),
    "0.0 without a size": sparse_pax((b"offset", b"0"), (b"numbytes", b"1"), stored=b"a"),
    "no length": sparse_pax((b"size", b"9"), (b"offset", b"0")),
    "of a directory": sparse_pax((b"map", b"0,0"), (b"size", b"1"), type=b"5"),
    "1.0 without content": sparse_pax(*V1),
    "1.0 with a map longer than it": sparse_pax(*V1, stored=padded(b"200\n" + b"1\n" * 100)),
    "1.0 with junk for a count": sparse_pax(*V1, stored=padded(b"x\n")),
    "1.0 with no line": sparse_pax(*V1, stored=b"1" * 1024),
    "1.0 with junk for a number": sparse_pax(*V1, stored=padded(b"1\nx\n1\n")),
    "1.0 with too many": sparse_pax(*V1, stored=padded(b"65537\n")),
    "old, not GNU": old_sparse(b"", 0, magic=b"ustar\x0000"),
    "old, negative": old_sparse(b"\xff" * 12 + b"00000000001\0", 9, b"a"),
    "old, beyond the file": old_sparse(b"00000000000\x0000000000002\0", 1, b"ab"),
    "old, endless empty extensions": (
        header(b"f", type=b"S", magic=b"ustar  \0", prefix=bytes(137) + b"\1")
        + (bytes(504) + b"\1" + bytes(7)) * 2100
    ),
}  # fmt: skip


@pytest.mark.parametrize("data", SPARSE_LIES.values(), ids=SPARSE_LIES.keys())
def test_lies_about_holes_are_refused(data: bytes) -> None:
    with pytest.raises(LayerRefused, match="sparse"):
        scan(data + END)


def test_a_sparse_file_may_be_larger_than_any_tar() -> None:
    entry = only(
        sparse_pax((b"map", b"4611686018427387904,1"), (b"size", b"9223372036854775807"), stored=b"x") + END
    )
    assert (entry.size, entry.data) == ((1 << 63) - 1, (Extent(1 << 62, 1, 1536),))


@pytest.mark.parametrize(
    ("limits", "data"),
    [
        (TarLimits(total=1024), member(b"a") + END),
        (TarLimits(total=1024), member(b"a", bytes(1024))),
        (TarLimits(entries=1), member(b"a") * 2),
        (TarLimits(extended_header=8), pax((b"path", b"a")) + member(b"a")),
        (TarLimits(extended_headers_per_entry=1), pax((b"path", b"a")) * 2 + member(b"a")),
        (TarLimits(sparse_extents=1), sparse_pax((b"map", b"0,0,0,0"), (b"size", b"1"))),
        (TarLimits(xattr_name=1), pax((b"SCHILY.xattr.ab", b"")) + member(b"a")),
        (TarLimits(xattr_value=1), pax((b"SCHILY.xattr.a", b"12")) + member(b"a")),
        (TarLimits(xattrs=2), pax((b"SCHILY.xattr.a", b"12")) + member(b"a")),
        (
            TarLimits(xattrs=3),
            pax((b"SCHILY.xattr.a", b"1"), type=b"g") + pax((b"SCHILY.xattr.b", b"1")) + member(b"a"),
        ),
    ],
)
def test_limits_are_kept_to(limits: TarLimits, data: bytes) -> None:
    scan(data)
    with pytest.raises(LayerRefused, match="limit: "):
        scan(data, limits=limits)
