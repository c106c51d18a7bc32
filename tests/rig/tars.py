"""Tars made by hand, byte for byte, also such as no tool makes. Pure."""

import stat
from collections.abc import Iterable

from fusestore.layer import LayerBuilder, LayerIndex
from fusestore.nodes import TarEntry
from fusestore.tar import TarLimits, TarScanner

__all__ = [
    "END",
    "content",
    "entry",
    "header",
    "index_of",
    "long_name",
    "member",
    "outline",
    "padded",
    "pax",
    "scan",
    "walk",
]

END = bytes(1024)


def header(
    path: bytes = b"file",
    *,
    type: bytes = b"0",
    size: int | bytes = 0,
    mode: bytes = b"0000644\0",
    uid: bytes = b"0000000\0",
    gid: bytes = b"0000000\0",
    mtime: bytes = b"00000000000\0",
    link: bytes = b"",
    magic: bytes = b"ustar\x0000",
    major: bytes = b"0000000\0",
    minor: bytes = b"0000000\0",
    prefix: bytes = b"",
    checksum: bytes | None = None,
) -> bytes:
    """One block, its checksum right unless it is given. `prefix` runs to the end of the block."""
    size_field = b"%011o\0" % size if isinstance(size, int) else size
    fields = (
        (path, 100), (mode, 8), (uid, 8), (gid, 8), (size_field, 12), (mtime, 12), (b" " * 8, 8), (type, 1),
        (link, 100), (magic, 8), (b"root", 32), (b"root", 32), (major, 8), (minor, 8), (prefix, 167),
    )  # fmt: skip
    assert all(len(value) <= width for value, width in fields)
    block = b"".join(value.ljust(width, b"\0") for value, width in fields)
    return block[:148] + (checksum or b"%06o\0 " % sum(block)) + block[156:]


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def member(path: bytes, content: bytes = b"", **fields: bytes) -> bytes:
    return header(path, size=len(content), **fields) + padded(content)


def pax(*records: tuple[bytes, bytes], type: bytes = b"x") -> bytes:
    body = b""
    for keyword, value in records:
        rest = b" " + keyword + b"=" + value + b"\n"
        length = len(rest) + 1
        while len(b"%d" % length) + len(rest) != length:
            length += 1
        body += b"%d" % length + rest
    return member(b"PaxHeaders/file", body, type=type)


def long_name(name: bytes, type: bytes = b"L") -> bytes:
    return member(b"././@LongLink", name + b"\0", type=type, magic=b"ustar  \0")


def scan(data: bytes, step: int | None = None, limits: TarLimits | None = None) -> list[TarEntry]:
    """All entries, `step` bytes at a time."""
    scanner = TarScanner(limits or TarLimits())
    entries: list[TarEntry] = []
    for start in range(0, len(data), step or len(data) or 1):
        entries += scanner.feed(data[start : start + (step or len(data))])
    scanner.close()
    return entries


def content(entry: TarEntry, tar: bytes) -> bytes:
    """What a reader of the file sees."""
    seen = bytearray(entry.size)
    for offset, length, source in entry.data:
        seen[offset : offset + length] = tar[source : source + length]
    assert len(seen) == entry.size
    return bytes(seen)


def index_of(entries: Iterable[TarEntry], tar_size: int = 0) -> LayerIndex:
    builder = LayerBuilder()
    for entry in entries:
        builder.add(entry)
    return LayerIndex(builder.finish(tar_size))


def walk(index: LayerIndex) -> dict[bytes, int]:
    """Path (without a leading slash; the root is empty) and inode of everything, in the order of a walk."""
    found = {b"": index.ROOT}
    waiting = [(b"", index.ROOT)]
    while waiting:
        path, directory = waiting.pop()
        for name, inode in index.children(directory):
            child = path + b"/" + name if path else name
            found[child] = inode
            if stat.S_ISDIR(index.mode(inode)):
                waiting.append((child, inode))
    return found


def entry(path: bytes, type: bytes = b"0", **fields: object) -> TarEntry:
    """An entry as the scanner gives it: mode 0644, owner root, empty, of 1970, except for `fields`."""
    plain = TarEntry(type, path, b"", 0o644, 0, 0, 0, 0, 0, (), ())
    return plain._replace(**fields)  # type: ignore[arg-type]


def outline(index: LayerIndex) -> dict[bytes, str]:
    """What a layer does with each path, in a word or two; the root is left out.

    Regular files are told apart by their mtime, which a test sets as it likes.
    """
    return {path: _word(index, inode) for path, inode in walk(index).items() if path}


def _word(index: LayerIndex, inode: int) -> str:
    if index.is_whiteout(inode):
        return "whiteout"
    if index.is_lower_link(inode):
        return f"lower {index.target(inode).decode()}"
    mode = index.mode(inode)
    if stat.S_ISDIR(mode):
        marks = [
            mark
            for mark, is_set in (("implicit", index.is_implicit), ("opaque", index.is_opaque))
            if is_set(inode)
        ]
        return " ".join(("directory", *marks))
    if stat.S_ISLNK(mode):
        return f"symlink {index.target(inode).decode()}"
    return f"{'file' if stat.S_ISREG(mode) else 'special'} {index.attr(inode).mtime_ns}"
