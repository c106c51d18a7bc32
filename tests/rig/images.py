"""Real images, made by skopeo, umoci and buildah from Debian's packages, and kept for the next run. Blocking.

::

    busybox              one layer, Debian's busybox-static           umoci
    debian               two layers, more than 8,000 names            umoci raw add-layer, buildah commit
    corners              debian and a third layer by GNU tar          what buildah's tar writer cannot say
    debian.oci.tar       debian as oci-archive                        skopeo
    debian.docker.tar    debian as docker-archive, uncompressed       skopeo
    debian-zstd          debian, each layer one zstd frame            skopeo
    debian-chunked       debian, zstd:chunked (a frame for each file) skopeo

Needs root: device nodes and owners are part of the content. The reference of what an image contains is the
tree that ``umoci unpack`` makes; `Image.reference` is its path. Kept by rig.kept.

As a program it makes them all and prints where they are.
"""

import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rig.kept import kept_by, once, run_tool

__all__ = ["DOCKER_TAG", "TOOLS", "Image", "Images", "make_images"]

TOOLS = ("skopeo", "umoci", "buildah", "tar", "setcap", "setfattr", "dpkg-deb", "apt-get", "busybox")

PACKAGES = (
    "bash", "coreutils", "dash", "findutils", "grep", "sed", "tar", "perl-base", "perl-modules-5.36",
    "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "tzdata", "ncurses-base",
    "ncurses-term", "libc6", "libc-bin", "libtinfo6", "libacl1", "libattr1", "libselinux1", "libpcre2-8-0",
    "libgmp10", "libcrypt1", "libgcc-s1", "zlib1g", "libexpat1",
)  # fmt: skip
"""What layer 1 of debian is unpacked from: a chroot with a shell, perl and python, and many small files."""

DOCKER_TAG = "localhost/debian:1"

NS = 1_600_000_000_123_456_789
"""A time that has all nine digits of its nanoseconds."""

APPLETS = (
    "sh", "ash", "ls", "cat", "cp", "mv", "rm", "ln", "mkdir", "rmdir", "echo", "printf", "touch", "chmod",
    "chown", "stat", "find", "sort", "sha256sum", "wc", "head", "tail", "true", "false", "test", "sed",
    "grep", "awk", "tar", "gzip", "id", "env", "mknod", "mkfifo", "dd", "sleep", "sync", "truncate",
    "readlink", "df", "du", "vi",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Image:
    """One image in an OCI directory."""

    path: Path
    ref: str
    reference: Path
    """What ``umoci unpack`` makes of it."""
    layers: int

    @property
    def source(self) -> str:
        """As fusestore import and skopeo take it."""
        return f"oci:{self.path}:{self.ref}"


@dataclass(frozen=True, slots=True)
class Images:
    busybox: Image
    debian: Image
    corners: Image
    zstd: Image
    chunked: Image
    oci_archive: Path
    docker_archive: Path
    """Its one tag is DOCKER_TAG."""


def make_images() -> Images:
    """All of them; made once, in half a minute, by whoever comes first (others wait)."""
    with kept_by(__file__) as root:
        once(root / "packages", _download)
        once(root / "busybox", _busybox)
        once(root / "debian", lambda out: _debian(root / "packages", out))
        once(root / "corners", lambda out: _corners(root / "debian", out))
        once(root / "debian.oci.tar", lambda out: _copy(root, f"oci-archive:{out}:debian"))
        once(root / "debian.docker.tar", lambda out: _copy(root, f"docker-archive:{out}:{DOCKER_TAG}"))
        once(root / "debian-zstd", lambda out: _copy(root, f"oci:{out}:debian", "zstd"))
        once(root / "debian-chunked", lambda out: _copy(root, f"oci:{out}:debian", "zstd:chunked"))
        for name in ("busybox", "debian", "corners"):
            once(root / f"{name}.bundle", partial(_unpack, root / name, name))
    debian = root / "debian.bundle/rootfs"
    return Images(
        busybox=Image(root / "busybox", "busybox", root / "busybox.bundle/rootfs", 1),
        debian=Image(root / "debian", "debian", debian, 2),
        corners=Image(root / "corners", "corners", root / "corners.bundle/rootfs", 3),
        zstd=Image(root / "debian-zstd", "debian", debian, 2),
        chunked=Image(root / "debian-chunked", "debian", debian, 2),
        oci_archive=root / "debian.oci.tar",
        docker_archive=root / "debian.docker.tar",
    )


def _download(out: Path) -> None:
    out.mkdir()
    run_tool("apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", *PACKAGES, cwd=out)


def _busybox(out: Path) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        root = Path(scratch) / "root"
        for directory in ("bin", "etc", "dev", "proc", "root", "tmp"):
            (root / directory).mkdir(parents=True)
        (root / "tmp").chmod(0o1777)
        shutil.copy(shutil.which("busybox") or "busybox", root / "bin/busybox")
        for applet in APPLETS:
            (root / "bin" / applet).symlink_to("busybox")
        (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
        (root / "etc/hostname").write_text("busybox\n")
        image = f"{out}:busybox"
        run_tool("umoci", "init", "--layout", out)
        run_tool("umoci", "new", "--image", image)
        run_tool("umoci", "insert", "--image", image, root, "/")
        run_tool("umoci", "config", "--image", image, "--config.cmd", "/bin/sh", "--config.env", "PATH=/bin")
        run_tool("umoci", "gc", "--layout", out)


def _debian(packages: Path, out: Path) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        base = Path(scratch) / "root"
        base.mkdir(mode=0o755)
        for package in sorted(packages.glob("*.deb")):
            run_tool("dpkg-deb", "-x", package, base)
        _layer_one(base)
        run_tool("umoci", "init", "--layout", f"{scratch}/oci")
        run_tool("umoci", "new", "--image", f"{scratch}/oci:base")
        run_tool("tar", "-C", base, *_TAR, "-cf", f"{scratch}/1.tar", ".")
        run_tool("umoci", "raw", "add-layer", "--image", f"{scratch}/oci:base", f"{scratch}/1.tar")
        run_tool("umoci", "config", "--image", f"{scratch}/oci:base", "--config.cmd", "/bin/bash")
        _commit(Path(scratch), "oci:oci:base", _layer_two, f"oci:{out}:debian")


_TAR = (
    "--format=pax", "--sort=name", "--numeric-owner", "--xattrs", "--xattrs-include=*",
    "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime",
)  # fmt: skip


def _commit(scratch: Path, base: str, change: Callable[[Path], None], target: str) -> None:
    """buildah, in storage of its own: what `change` does to a mounted container of `base` becomes a layer."""
    storage, policy = scratch / "storage", scratch / "policy.json"
    policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    buildah = ("buildah", "--root", storage, "--runroot", scratch / "run", "--storage-driver", "overlay")
    # A relative path: buildah makes an image name of it, which an absolute one may not be able to be.
    container = run_tool(*buildah, "from", "--signature-policy", policy, "--quiet", base, cwd=scratch).strip()
    try:
        change(Path(run_tool(*buildah, "mount", container).strip()))
        run_tool(*buildah, "umount", container)
        options = ("--signature-policy", policy, "--format", "oci", "--disable-compression=false", "--quiet")
        run_tool(*buildah, "commit", *options, container, target)
    finally:
        run_tool(*buildah, "rm", container)
        # buildah leaves a bind mount over its storage, and nobody could remove the directory.
        subprocess.run(["umount", "-q", storage / "overlay"], check=False, timeout=30)


def _layer_one(root: Path) -> None:
    """What layer 2 changes later, beside the packages' files."""
    lower = root / "lower"
    for directory in ("opaque/deep", "gone/sub", "becomes-file", "kept", "renamed-from"):
        (lower / directory).mkdir(parents=True)
        for number in range(3):
            (lower / directory / f"file{number}").write_text(f"{directory} {number}\n")
    (lower / "becomes-directory").write_text("a file in layer 1\n")
    (lower / "symlink-becomes-directory").symlink_to("kept")
    (lower / "linked-1").write_text("two names in layer 1\n")
    os.link(lower / "linked-1", lower / "linked-2")
    (lower / "link-target").write_text("layer 2 links to this\n")
    (lower / "chmod-later").write_text("only the mode changes above\n")
    os.utime(lower / "kept/file0", ns=(NS, NS))
    os.setxattr(lower / "kept/file1", "user.layer", b"one\0two")


def _sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.seek(1 << 20)
        file.write(b"middle" * 1000)
        file.seek(5 << 20)
        file.write(b"late")
        file.truncate(8 << 20)


def _layer_two(root: Path) -> None:
    """Every kind of change that a build makes."""
    lower, upper = root / "lower", root / "upper"
    shutil.rmtree(lower / "opaque")
    (lower / "opaque").mkdir()
    (lower / "opaque/new").write_text("only this\n")
    shutil.rmtree(lower / "gone")
    (lower / "kept/file2").unlink()
    shutil.rmtree(lower / "becomes-file")
    (lower / "becomes-file").write_text("now a file\n")
    (lower / "becomes-directory").unlink()
    (lower / "becomes-directory").mkdir()
    (lower / "becomes-directory/inside").write_text("now a directory\n")
    (lower / "symlink-becomes-directory").unlink()
    (lower / "symlink-becomes-directory").mkdir()
    (lower / "symlink-becomes-directory/own").write_text("not below kept\n")
    os.link(lower / "link-target", lower / "link-of-lower")
    (lower / "chmod-later").chmod(0o4711)
    os.chown(lower / "kept", 1000, 1001)

    upper.mkdir()
    (upper / "linked-1").write_text("three names\n")
    for number in (2, 3):
        os.link(upper / "linked-1", upper / f"linked-{number}")
    (upper / "setuid").write_bytes(b"#!/bin/true\n")
    os.chown(upper / "setuid", 0, 4242)
    (upper / "setuid").chmod(0o6755)
    (upper / "capable").write_bytes(b"#!/bin/true\n")
    (upper / "capable").chmod(0o755)
    run_tool("setcap", "cap_net_raw,cap_net_bind_service+ep", upper / "capable")
    (upper / "xattrs").write_text("xattrs\n")
    os.setxattr(upper / "xattrs", "user.text", b"value")
    os.setxattr(upper / "xattrs", "user.binary", bytes(range(256)))
    for kind, name, device in (
        (stat.S_IFCHR, "null", (1, 3)),
        (stat.S_IFBLK, "loop", (7, 0)),
        (stat.S_IFCHR, "wide", (300, 70000)),
        (stat.S_IFIFO, "fifo", (0, 0)),
    ):
        os.mknod(upper / name, 0o640 | kind, os.makedev(*device))
    (upper / ("n" * 255)).write_text("a name of 255 bytes\n")
    with open(os.fsencode(upper) + b"/not-\xff\xfe-utf8", "wb") as file:
        file.write(b"bytes\n")
    (upper / "new\nline and \x1b[31mred").write_text("to be escaped on a terminal\n")
    (upper / "ümläut-日本").write_text("unicode\n")
    (upper / "dangling").symlink_to("../no/such/thing")
    (upper / "absolute").symlink_to("/lower/kept/file0")
    (upper / "long-target").symlink_to("x/" * 2000 + "end")
    (upper / "empty").touch()
    (upper / "sticky").mkdir()
    (upper / "sticky").chmod(0o1777)
    (upper / "unreadable").write_text("mode 0\n")
    (upper / "unreadable").chmod(0)
    os.chown(upper / "empty", 4_000_000_000, 3_999_999_999)
    os.utime(upper / "empty", (0, 0))


def _corners(debian: Path, out: Path) -> None:
    shutil.copytree(debian, out)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        links, rest, layer = Path(scratch) / "links", Path(scratch) / "rest", f"{scratch}/3.tar"
        _lower_links(links)
        run_tool("tar", "-C", links, *_TAR, "-cf", layer, ".")
        # Leaves hard links whose target is not in this layer: they mean the file of the layer below.
        run_tool("tar", "--delete", "-f", layer, "./lower/link-target", "./lower/chmod-later")
        _layer_three(rest)
        # Not in layer 1: containers/storage 1.43 cannot give a sparse member back as it was: commit fails.
        run_tool("tar", "-C", rest, *_TAR, "--sparse", "-rf", layer, ".")
        run_tool("umoci", "raw", "add-layer", "--image", f"{out}:debian", "--tag", "corners", layer)
        run_tool("umoci", "rm", "--image", f"{out}:debian")
        run_tool("umoci", "gc", "--layout", out)


def _lower_links(root: Path) -> None:
    lower = root / "lower"
    lower.mkdir(parents=True)
    for target in ("link-target", "chmod-later"):
        (lower / target).touch()
        os.link(lower / target, lower / f"{target}-too")


def _layer_three(root: Path) -> None:
    """What only a tar made by hand says: nanoseconds, holes, marker files, times before 1970."""
    lower, corner = root / "lower", root / "corner"
    lower.mkdir(parents=True)
    corner.mkdir()
    (lower / "renamed-from").mkdir()
    (lower / "renamed-from/.wh..wh..opq").touch()
    (lower / "renamed-from/same-layer").write_text("beside the opaque marker\n")
    (lower / ".wh.linked-1").touch()
    _sparse(corner / "sparse")
    (corner / "hole-only").touch()
    os.truncate(corner / "hole-only", 3 << 20)
    # A path of more than 100 and 255 bytes, deeper than ustar can say.
    deep = corner / "/".join(f"level-{number:03d}" for number in range(60))
    deep.mkdir(parents=True)
    (deep / ("f" * 250)).write_text("deep\n")
    (corner / "before-1970").write_text("old\n")
    os.setxattr(corner / "before-1970", "user.of=equals", b"\n=\n")
    os.chown(corner / "before-1970", 1 << 31, 1 << 30)
    for directory, _, names in os.walk(root, topdown=False):
        for name in names:
            os.utime(os.path.join(directory, name), ns=(NS, NS), follow_symlinks=False)
        os.utime(directory, ns=(NS + 1, NS + 1))
    os.utime(corner / "before-1970", ns=(-1_500_000_000, -1_500_000_000))


def _copy(root: Path, target: str, compression: str | None = None) -> None:
    options = ("--dest-compress-format", compression) if compression else ()
    run_tool("skopeo", "--insecure-policy", "copy", "-q", *options, f"oci:{root}/debian:debian", target)


def _unpack(layout: Path, ref: str, out: Path) -> None:
    run_tool("umoci", "unpack", "--image", f"{layout}:{ref}", out)


if __name__ == "__main__":
    print(make_images())
