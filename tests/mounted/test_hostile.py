"""Hostile layers through the installed command: refused with a line and no trace, or shown as they are."""

import errno
import gzip
import os
from pathlib import Path

import pytest
from rig.images import Images
from rig.mounts import Mount, Place, wait_until
from rig.ocisources import OCI, SourceMaker, digest
from rig.tars import END, header, long_name, member, pax

pytestmark = [pytest.mark.mounted, pytest.mark.images]

PERSONS = ("root", "user", "erofs", "overlay", "overlay-user")

HARD, SYMBOLIC, DIRECTORY = b"1", b"2", b"5"

TRAVERSING = member(b"../../etc/passwd", b"x")
REFUSED = {
    "a path with ..": TRAVERSING + END,
    "a path with .. inside": member(b"a/../../b", b"x") + END,
    "a component of 256 bytes": long_name(b"n" * 256) + member(b"n", b"x") + END,
    "a path of 5,000 bytes": long_name(b"d/" * 2500 + b"f") + member(b"f", b"x") + END,
    "a hard link to nothing": header(b"l", type=HARD, link=b"nowhere") + END,
    "hard links in a ring": header(b"a", type=HARD, link=b"b") + header(b"b", type=HARD, link=b"a") + END,
    "a hard link to a directory": header(b"d/", type=DIRECTORY) + header(b"l", type=HARD, link=b"d") + END,
    "a size beyond the end": header(b"f", size=10**9) + b"short",
    "a size that is no number": header(b"f", size=b"99999999999\0") + END,
    "a negative size": header(b"f", size=b"\xff" * 12) + END,
    "a size over 2^63": header(b"f", size=b"\x80" + b"\xff" * 11) + END,
    "a wrong checksum": header(b"f", checksum=b"000000\0 ") + END,
    "an extended header of 2 MiB": header(b"x", type=b"x", size=2 << 20) + bytes(2 << 20) + END,
    "an extended header that lies": pax((b"size", b"-1")) + member(b"f", b"x") + END,
    "no tar at all": b"this is no tar" * 1000,
    "a member cut short": member(b"f", b"x" * 5000)[:3000],
}


def _layout(path: Path, tar: bytes, compressed: bytes | None = None) -> str:
    """An image of one layer, `tar`; its blob is `compressed`, or what gzip makes of it."""
    maker = SourceMaker()
    blob = gzip.compress(tar, 1, mtime=0) if compressed is None else compressed
    layer = maker.blob(blob, OCI + "layer.v1.tar+gzip")
    changes = {"rootfs": {"type": "layers", "diff_ids": [digest(tar)]}}
    maker.add(maker.image([], changes, layers=[layer]), "hostile").directory(path)
    return f"oci:{path}:hostile"


@pytest.fixture
def imported(place: Place, images: Images) -> Place:
    """A place with a store that has an image."""
    place.fusestore("import", images.busybox.source).ok()
    return place


def _refuse(place: Place, source: str) -> str:
    """Import is refused in one line, and the store is as before, byte for byte. The line."""
    before = _contents(place.store)
    result = place.fusestore("import", source)
    assert (result.code, result.out) == (1, "")
    assert result.err.count("\n") == 1 and result.err.startswith("fusestore: ")
    assert _contents(place.store) == before
    place.fusestore("check").ok()
    return result.err


def _contents(store: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("tar", REFUSED.values(), ids=REFUSED)
def test_a_hostile_layer_is_refused_without_a_trace(imported: Place, tar: bytes) -> None:
    _refuse(imported, _layout(imported.base / "hostile", tar))


def test_a_truncated_blob_is_refused(imported: Place) -> None:
    tar = member(b"f", os.urandom(50_000)) + END
    _refuse(imported, _layout(imported.base / "hostile", tar, gzip.compress(tar)[:-2000]))


def test_a_blob_of_another_content_is_refused(imported: Place) -> None:
    tar, other = (member(b"f", content) + END for content in (b"said", b"meant"))
    assert "diff_id" in _refuse(imported, _layout(imported.base / "hostile", tar, gzip.compress(other)))


def test_a_decompression_bomb_is_refused(imported: Place) -> None:
    """70 GiB of zeros, in 70 members of a gigabyte each; the declared limit is 64 GiB."""
    gigabyte = gzip.compress(bytes(1 << 30), 9, mtime=0)
    head = gzip.compress(header(b"bomb", size=b"\x80" + (70 << 30).to_bytes(11)), mtime=0)
    source = _layout(imported.base / "hostile", b"", head + gigabyte * 70)
    assert f"at most {64 << 30}" in _refuse(imported, source)


def _show(place: Mount, tar: bytes) -> str:
    """Import an image of `tar`; a container of it."""
    place.fusestore("import", _layout(place.base / "hostile", tar), "--name", "hostile").ok()
    place.fusestore("create", "hostile", "hostile").ok()
    return "containers/hostile/rootfs"


def test_names_that_are_not_text_are_shown(fresh: Mount) -> None:
    names = [b"\xff\xfe", b"new\nline", b"\x1b[31m", b"-rf", b" ", b"*", b"\xc3"]
    rootfs = _show(fresh, b"".join(member(name, name) for name in names) + END)

    def read() -> dict[bytes, bytes]:
        directory = os.fsencode(fresh.mountpoint / rootfs)
        return {
            name: Path(os.fsdecode(os.path.join(directory, name))).read_bytes()
            for name in os.listdir(directory)
        }

    assert fresh.person.call(read) == {name: name for name in names}


def test_symbolic_links_in_a_ring_are_loops(fresh: Mount) -> None:
    ring = header(b"a", type=SYMBOLIC, link=b"b") + header(b"b", type=SYMBOLIC, link=b"a")
    rootfs = _show(fresh, ring + header(b"self", type=SYMBOLIC, link=b"self") + END)
    assert fresh.sh(f"readlink {rootfs}/a {rootfs}/self").ok() == "b\nself\n"
    fresh.sh(f"cat {rootfs}/a").fails_with(40)


def test_a_symbolic_link_is_not_followed_by_what_comes_below_it(fresh: Mount) -> None:
    """The classic: a link to / and a file "in" it. The directory replaces the link."""
    link = header(b"etc", type=SYMBOLIC, link=b"/")
    rootfs = _show(fresh, link + member(b"etc/fusestore-was-here", b"x") + END)
    assert fresh.sh(f"stat -c %F {rootfs}/etc; ls {rootfs}/etc").ok() == "directory\nfusestore-was-here\n"
    assert not os.path.lexists("/fusestore-was-here")


def test_an_absolute_link_out_of_the_rootfs_is_only_text(fresh: Mount) -> None:
    rootfs = _show(fresh, header(b"shadow", type=SYMBOLIC, link=b"/etc/shadow") + END)
    assert fresh.sh(f"readlink {rootfs}/shadow").ok() == "/etc/shadow\n"


OVERLAY = {
    "opaque": b"y", "redirect": b"/other", "metacopy": b"", "whiteout": b"y", "xwhiteouts": b"y",
    "impure": b"y", "origin": b"\0\xfb\x15", "nlink": b"U+1", "uuid": b"\1" * 16, "overlay.opaque": b"y",
}  # fmt: skip
"""What overlayfs reads in an upper directory (fs/overlayfs/overlayfs.h)."""


def _smuggled() -> bytes:
    return pax(
        (b"SCHILY.xattr.user.k", b"v"),
        *(
            (f"SCHILY.xattr.{prefix}.overlay.{name}".encode(), value)
            for prefix in ("trusted", "user")
            for name, value in OVERLAY.items()
        ),
    )


def test_overlayfs_xattrs_in_a_layer_do_not_act(fresh: Mount) -> None:
    """Nor are they shown; nor do they when what has them was changed, and the container is mounted anew."""
    lower = header(b"d/", type=DIRECTORY) + member(b"d/f", b"below") + member(b"g", b"below")
    lower += header(b"other/", type=DIRECTORY) + member(b"other/secret", b"x") + END
    upper = _smuggled() + header(b"d/", type=DIRECTORY) + member(b"d/new")
    upper += _smuggled() + member(b"g", b"above") + _smuggled() + member(b"d/empty") + END
    source = SourceMaker()
    source.add(source.image([lower, upper]), "hostile")
    fresh.fusestore("import", source.directory(fresh.base / "hostile") + ":hostile", "--name", "hostile").ok()
    fresh.fusestore("create", "hostile", "hostile").ok()
    show = "cd containers/hostile/rootfs; getfattr -dm - d g d/empty | grep =; ls d; cat g d/f"
    shown = 'user.k="v"\n' * 3 + "empty\nf\nnew\nabovebelow"
    assert fresh.sh(show).ok() == shown
    fresh.sh("cd containers/hostile/rootfs; chmod 700 d; chmod 600 g d/empty").ok()
    assert fresh.sh(show).ok() == shown
    fresh.umount()
    fresh.mount()
    assert fresh.sh(show).ok() == shown


def test_overlayfs_xattrs_that_are_set_in_a_container_do_not_act(fresh: Mount) -> None:
    """They are kept in an upper of their own kind, as overlayfs escapes them, or refused."""
    rootfs = _show(fresh, header(b"d/", type=DIRECTORY) + member(b"d/f") + member(b"g", b"text") + END)
    prefixes = ("trusted", "user") if fresh.person.own_uid == 0 and fresh.person.holder is None else ("user",)
    for prefix in prefixes:
        for name in ("opaque", "redirect", "metacopy", "whiteout"):
            for path in ("d", "g"):
                fresh.sh(f"setfattr -n {prefix}.overlay.{name} -v y {rootfs}/{path}")
    fresh.umount()
    fresh.mount()
    assert fresh.sh(f"ls {rootfs}/d; cat {rootfs}/g").ok() == "f\ntext"
    assert fresh.fusestore("check").ok() == ""


def test_devices_and_set_user_id_bits_of_a_layer_are_shown_and_do_not_act(fresh: Mount) -> None:
    device = header(b"zero", type=b"3", mode=b"0000666\0", major=b"0000001\0", minor=b"0000005\0")
    program = member(b"id", Path("/usr/bin/id").read_bytes(), mode=b"0006755\0")
    rootfs = _show(fresh, device + program + END)
    assert fresh.sh(f"cd {rootfs}; stat -c '%a %F' zero id").ok().splitlines() == [
        "666 character special file",
        "6755 regular file",
    ]
    fresh.sh(f"head -c 1 {rootfs}/zero").fails_with(errno.EACCES)
    options = fresh.sh('findmnt -rRno OPTIONS "$PWD"').ok().splitlines()
    assert options and all({"nodev", "nosuid"} <= {*line.split(",")} for line in options)


def test_a_thousand_directories_deep(fresh: Mount) -> None:
    rootfs = _show(fresh, long_name(b"d/" * 1000 + b"f") + member(b"f", b"deep") + END)

    def append() -> str:
        os.chdir(fresh.mountpoint / rootfs)
        for _ in range(1000):
            os.chdir("d")
        with open("f", "a") as file:
            file.write("more")
        return Path("f").read_text()

    assert fresh.person.call(append) == "deepmore"
    fresh.sh("rmdir containers/hostile").ok()
    wait_until(lambda: os.listdir(fresh.store / "trash") == [], deadline_s=60)


def test_a_million_empty_files(fresh: Mount) -> None:
    """Imported, listed, deleted; the daemon does not keep what it listed."""
    block = header(bytes(12))
    rest = sum(block[:148]) + 8 * ord(" ") + sum(block[156:])

    def named(name: bytes) -> bytes:
        return name + block[len(name) : 148] + b"%06o\0 " % (rest + sum(name)) + block[156:]

    blocks = (named(b"%03d/%08d" % (number % 1000, number)) for number in range(1_000_000))
    source = _layout(fresh.base / "hostile", b"".join(blocks) + END)
    fresh.fusestore("import", source, "--name", "hostile", deadline_s=300).ok()
    fresh.fusestore("create", "hostile", "hostile").ok()
    fresh.expect("waits for over 10 s")  # by erofs: for the image of a million names
    assert fresh.sh(
        "ls -U containers/hostile/rootfs | wc -l; ls -U containers/hostile/rootfs/007 | wc -l"
    ).ok() == ("1000\n1000\n")
    fresh.sh("test -f containers/hostile/rootfs/999/00999999 && rm -r containers/hostile", deadline_s=20).ok()
