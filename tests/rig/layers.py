"""Layers made by hand: what a tar would say, as an index with its content, and as overlayfs's directory.

`directory`, `file` … make tar entries; `layer` makes of them what the union reads, `unpack_layer` a directory
that the kernel's overlayfs takes as a lower one. The latter is written apart from `fusestore.layer`, and only
takes layers that leave nothing to interpretation: no name twice, no directory that is only implied.
"""

import io
import os
import stat
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fusestore.layer import LayerBuilder, LayerIndex
from fusestore.nodes import Extent, TarEntry, Xattrs

__all__ = [
    "MTIME_NS",
    "Layer",
    "Member",
    "device",
    "directory",
    "fifo",
    "file",
    "hard_link",
    "layer",
    "opaque",
    "symlink",
    "tar_layer",
    "unpack_layer",
    "whiteout",
]

MTIME_NS = 1_600_000_000_123_456_789
_FORMATS = {
    b"0": stat.S_IFREG,
    b"2": stat.S_IFLNK,
    b"3": stat.S_IFCHR,
    b"4": stat.S_IFBLK,
    b"5": stat.S_IFDIR,
    b"6": stat.S_IFIFO,
}


@dataclass(frozen=True, slots=True)
class Member:
    """One entry of a layer's tar. Whiteouts are files called ``.wh.…``, as in a tar."""

    path: bytes
    type: bytes
    content: bytes = b""
    link: bytes = b""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    rdev: int = 0
    mtime_ns: int = MTIME_NS
    xattrs: Xattrs = ()

    @property
    def format(self) -> int:
        return _FORMATS[self.type]


def file(path: bytes, content: bytes = b"", mode: int = 0o644, **more: object) -> Member:
    return Member(path, b"0", content, mode=mode, **more)  # type: ignore[arg-type]


def directory(path: bytes, mode: int = 0o755, **more: object) -> Member:
    return Member(path, b"5", mode=mode, **more)  # type: ignore[arg-type]


def symlink(path: bytes, target: bytes, **more: object) -> Member:
    return Member(path, b"2", link=target, mode=0o777, **more)  # type: ignore[arg-type]


def hard_link(path: bytes, target: bytes) -> Member:
    return Member(path, b"1", link=target)


def device(path: bytes, rdev: int, **more: object) -> Member:
    return Member(path, b"3", rdev=rdev, **more)  # type: ignore[arg-type]


def fifo(path: bytes, **more: object) -> Member:
    return Member(path, b"6", **more)  # type: ignore[arg-type]


def whiteout(path: bytes) -> Member:
    head, slash, name = path.rpartition(b"/")
    return Member(head + slash + b".wh." + name, b"0")


def opaque(path: bytes) -> Member:
    return Member(path + b"/.wh..wh..opq", b"0")


class _Reader:
    """The content of a layer, in memory."""

    is_remote = False

    def __init__(self, content: bytes) -> None:
        self._content = content

    def read(self, offset: int, size: int) -> bytes:
        return self._content[offset : offset + size]

    read_now = read


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer as the union reads it."""

    index: LayerIndex
    reader: _Reader


def layer(*members: Member) -> Layer:
    builder = LayerBuilder()
    content = bytearray()
    for member in members:
        extents = (Extent(0, len(member.content), len(content)),) if member.content else ()
        builder.add(
            TarEntry(
                type=member.type,
                path=member.path,
                link=member.link,
                mode=member.mode,
                uid=member.uid,
                gid=member.gid,
                size=len(member.content),
                mtime_ns=member.mtime_ns,
                rdev=member.rdev,
                xattrs=tuple(sorted(member.xattrs)),
                data=extents,
            )
        )
        content += member.content
    return Layer(LayerIndex(builder.finish(len(content))), _Reader(bytes(content)))


def tar_layer(members: Sequence[Member]) -> bytes:
    """The layer as a tar."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            info = tarfile.TarInfo(os.fsdecode(member.path))
            info.type, info.mode, info.uid, info.gid = member.type, member.mode, member.uid, member.gid
            info.size, info.linkname = len(member.content), os.fsdecode(member.link)
            info.devmajor, info.devminor = os.major(member.rdev), os.minor(member.rdev)
            info.pax_headers = {"mtime": f"{member.mtime_ns // 10**9}.{member.mtime_ns % 10**9:09}"}
            info.pax_headers.update(
                (f"SCHILY.xattr.{name.decode()}", value.decode()) for name, value in member.xattrs
            )
            tar.addfile(info, io.BytesIO(member.content))
    return out.getvalue()


def unpack_layer(members: Sequence[Member], target: Path, prefix: bytes = b"trusted.overlay.") -> None:
    """Write a layer as overlayfs wants a lower directory. Needs root; hard links within the layer only.

    `prefix` of overlayfs's xattrs: ``user.overlay.`` for mounts with userxattr.
    """
    root = os.fsencode(target)
    for member in members:
        head, name = os.path.split(os.path.join(root, member.path))
        if name == b".wh..wh..opq":
            os.setxattr(head, prefix + b"opaque", b"y")
        elif name.startswith(b".wh."):
            os.mknod(os.path.join(head, name.removeprefix(b".wh.")), stat.S_IFCHR, 0)
        elif member.type == b"1":
            os.link(os.path.join(root, member.link), os.path.join(head, name))
        else:
            _unpack_member(member, os.path.join(head, name))
    for member in reversed(members):  # the directories last: what is made in them changes their times
        if member.type == b"5":
            os.utime(os.path.join(root, member.path), ns=(member.mtime_ns, member.mtime_ns))


def _unpack_member(member: Member, path: bytes) -> None:
    if member.type == b"5":
        os.makedirs(path, exist_ok=True)
    elif member.type == b"2":
        os.symlink(member.link, path)
    else:
        os.mknod(path, member.format | 0o600, member.rdev)
        if member.type == b"0":
            with open(path, "wb") as out:
                out.write(member.content)
    os.chown(path, member.uid, member.gid, follow_symlinks=False)
    if member.type != b"2":
        os.chmod(path, member.mode)
    for key, value in member.xattrs:
        os.setxattr(path, key, value, follow_symlinks=False)
    os.utime(path, ns=(member.mtime_ns, member.mtime_ns), follow_symlinks=False)
