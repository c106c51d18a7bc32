"""What TarWriter writes, the scanner of layers reads; and so does tarfile."""

import io
import stat
import tarfile

from hypothesis import given
from hypothesis import strategies as st

from fusestore.nodes import Attr, TarEntry
from fusestore.tar import TarScanner
from fusestore.tarwriter import TarWriter

_NAMES = st.binary(min_size=1, max_size=120).map(lambda name: name.replace(b"\0", b"0").replace(b"/", b"s"))
_PATHS = st.lists(_NAMES.filter(lambda name: name not in (b".", b"..")), min_size=1, max_size=4).map(
    b"/".join
)
_FORMATS = st.sampled_from([stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO])
_KINDS = {stat.S_IFDIR: b"5", stat.S_IFLNK: b"2", stat.S_IFCHR: b"3", stat.S_IFBLK: b"4", stat.S_IFIFO: b"6"}
_XATTR_NAMES = st.sampled_from([b"user.a", b"security.capability", b"user.\xff", b"user.a=b%", b"trusted.x"])
_XATTRS = st.dictionaries(_XATTR_NAMES, st.binary(max_size=40))


@st.composite
def _attrs(draw: st.DrawFn, format_bits: int, size: int = 0) -> Attr:
    return Attr(
        mode=format_bits | draw(st.integers(0, 0o7777)),
        uid=draw(st.integers(0, 2**32 - 2)),
        gid=draw(st.integers(0, 2**32 - 2)),
        size=size,
        rdev=draw(st.integers(0, 2**20 - 1)) if format_bits in (stat.S_IFCHR, stat.S_IFBLK) else 0,
        nlink=1,
        blocks=0,
        atime_ns=0,
        mtime_ns=draw(st.integers(-(2**33) * 10**9, 2**35 * 10**9)),
        ctime_ns=0,
    )


def _scan(data: bytes) -> list[TarEntry]:
    return list(TarScanner().feed(data))


@given(st.data(), _PATHS, _FORMATS, _XATTRS, _NAMES)
def test_the_scanner_reads_what_was_added(
    data: st.DataObject, path: bytes, format_bits: int, xattrs: dict[bytes, bytes], target: bytes
) -> None:
    attr = data.draw(_attrs(format_bits))
    out = io.BytesIO()
    tar = TarWriter(out.write)
    target = target if format_bits == stat.S_IFLNK else b""
    tar.add(path, attr, tuple(xattrs.items()), target)
    tar.close()
    (entry,) = _scan(out.getvalue())
    assert entry._replace(xattrs=dict(entry.xattrs), path=entry.path.rstrip(b"/")) == TarEntry(
        type=_KINDS[format_bits],
        path=path,
        link=target,
        mode=attr.mode & 0o7777,
        uid=attr.uid,
        gid=attr.gid,
        size=0,
        mtime_ns=attr.mtime_ns,
        rdev=attr.rdev,
        xattrs=xattrs,
        data=(),
    )


@st.composite
def _contents(draw: st.DrawFn) -> tuple[bytes, list[tuple[int, int]]]:
    """A file's bytes, and where in it data is."""
    content, runs = bytearray(), []
    for hole, piece in draw(st.lists(st.tuples(st.integers(0, 5000), st.binary(min_size=1)), max_size=5)):
        if hole == 0 and runs:
            hole = 1
        content += bytes(hole)
        runs.append((len(content), len(piece)))
        content += piece
    content += bytes(draw(st.integers(0, 3000)))
    return bytes(content), runs


@given(st.data(), _PATHS, _contents())
def test_files_have_their_content_and_their_holes(
    data: st.DataObject, path: bytes, file: tuple[bytes, list[tuple[int, int]]]
) -> None:
    content, runs = file
    out = io.BytesIO()
    tar = TarWriter(out.write)
    attr = data.draw(_attrs(stat.S_IFREG, len(content)))
    tar.add_file(path, attr, (), runs, lambda offset, size: content[offset : offset + size])
    tar.add_link(b"again", attr, path)
    tar.close()
    stored = out.getvalue()
    assert len(stored) % tarfile.RECORDSIZE == 0
    entry, link = _scan(stored)
    found = bytearray(entry.size)
    for extent in entry.data:
        found[extent.offset : extent.offset + extent.length] = stored[extent.source :][: extent.length]
    assert (entry.path, bytes(found), link.type, link.link) == (path, content, b"1", path)
    with tarfile.open(fileobj=io.BytesIO(stored)) as archive:
        member = archive.next()
        assert member is not None
        reader = archive.extractfile(member)
        assert reader is not None and reader.read() == content


@given(st.integers(-(10**19), 10**19), st.integers(0, 10**19))
def test_no_time_is_after_the_latest(mtime_ns: int, latest_ns: int) -> None:
    out = io.BytesIO()
    tar = TarWriter(out.write, latest_ns)
    tar.add(b"x", Attr(stat.S_IFIFO, 0, 0, 0, 0, 1, 0, 0, mtime_ns, 0), ())
    tar.add_whiteout(b"a/b")
    tar.add_opaque(b"c")
    tar.close()
    assert [(entry.path, entry.mtime_ns) for entry in _scan(out.getvalue())] == [
        (b"x", min(mtime_ns, latest_ns)),
        (b"a/.wh.b", 0),
        (b"c/.wh..wh..opq", 0),
    ]
