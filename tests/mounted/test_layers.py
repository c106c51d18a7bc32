"""Images of no layer, of three and of 301: what each layer did, alone and with those above it."""

import errno
from collections.abc import Sequence

import pytest
from rig.mounts import Mount
from rig.ocisources import SourceMaker
from rig.snapshot import Snapshot, snapshot
from rig.tars import END, header, member

pytestmark = [pytest.mark.mounted, pytest.mark.images]

_DIRECTORY = b"5"


def _tar(*names: str) -> bytes:
    """A tar of directories (names that end with a slash) and files with their name in them."""
    return b"".join(_entry(name.encode()) for name in names) + END


def _entry(name: bytes) -> bytes:
    return header(name, type=_DIRECTORY, mode=b"0000755\0") if name.endswith(b"/") else member(name, name)


def _import(mount: Mount, name: str, layers: Sequence[bytes]) -> None:
    """An image called `name`."""
    maker = SourceMaker()
    source = maker.add(maker.image(layers), name).directory(mount.base / f"source-{name}")
    mount.fusestore("import", source).ok()


# One layer above the other

_REMOVAL = (_tar("file", "other"), _tar(".wh.file", "new"), _tar("newer"))


@pytest.fixture
def chain(fresh: Mount) -> Mount:
    """Three images, each one layer more than the one before: the second layer removes a file of the first."""
    for count in (1, 2, 3):
        _import(fresh, f"image{count}", _REMOVAL[:count])
    return fresh


def test_a_file_that_a_layer_removes_stays_in_the_one_below_and_away_in_those_above(chain: Mount) -> None:
    assert chain.sh("cd images; for n in 1 2 3; do ls image$n/rootfs | tr '\n' ' '; echo; done").ok() == (
        "file other \nnew other \nnew newer other \n"
    )
    assert chain.sh("ls images/image3/layers/0/rootfs").ok() == "file\nother\n"


def test_containers_of_each_layer_of_a_chain_are_distinct(chain: Mount) -> None:
    for count in (1, 2, 3):
        chain.fusestore("create", f"image{count}", f"c{count}").ok()
    assert chain.sh("cat containers/c1/rootfs/file").ok() == "file"
    chain.sh("echo again > containers/c2/rootfs/file; rm containers/c1/rootfs/file").ok()
    assert chain.sh("cat containers/c2/rootfs/file images/image1/rootfs/file").ok() == "again\nfile"
    for container in ("c1", "c3"):
        chain.sh("cat containers/$1/rootfs/file", container).fails_with(errno.ENOENT)


# Many layers

_MANY = 301


def test_301_layers_show_the_file_of_each(fresh: Mount) -> None:
    names = [f"file-{number:03d}" for number in range(_MANY)]
    _import(fresh, "many", [_tar(name) for name in names])
    fresh.fusestore("create", "many", "c").ok()
    assert fresh.sh("ls containers/c/rootfs").ok().split() == names
    assert fresh.sh("cat containers/c/rootfs/*").ok() == "".join(names)
    assert len(fresh.sh("ls images/many/layers").ok().split()) == _MANY
    assert fresh.sh("ls images/many/layers/300/rootfs").ok() == "file-300\n"
    fresh.sh("cd containers/c/rootfs; rm file-000 file-300; echo changed > file-150").ok()
    fresh.umount()
    fresh.mount()
    assert fresh.sh("ls containers/c/rootfs").ok().split() == names[1:-1]
    assert (
        fresh.sh("cat containers/c/rootfs/file-150 containers/c/rootfs/file-151").ok() == "changed\nfile-151"
    )
    assert fresh.fusestore("check").ok() == ""


# Few layers or none

_BASES = {
    "no image": "rm images/default; mkdir containers/a containers/b",
    "an image of no layers": "ln -sfn empty images/default; mkdir containers/a containers/b",
    "an image of layers": "mkdir containers/a containers/b",
}


@pytest.mark.parametrize("base", _BASES)
def test_containers_of_any_base_are_listed_distinct_and_lasting(fresh: Mount, base: str) -> None:
    _import(fresh, "empty", [])
    fresh.sh(_BASES[base]).ok()
    assert fresh.sh("ls containers").ok() == "a\nb\n"
    before = fresh.sh("ls containers/a/rootfs").ok()
    fresh.sh("echo kept > containers/a/rootfs/file; mkdir -p containers/a/rootfs/d/e").ok()
    fresh.umount()
    fresh.mount()
    assert fresh.sh("cat containers/a/rootfs/file; ls containers/a/rootfs/d").ok() == "kept\ne\n"
    assert fresh.sh("ls containers; ls containers/b/rootfs").ok() == f"a\nb\n{before}"
    assert fresh.fusestore("check").ok() == ""


def test_an_image_of_no_layers_is_empty(fresh: Mount) -> None:
    _import(fresh, "empty", [])
    assert fresh.sh("ls -A images/empty/rootfs images/empty/layers").ok().split() == [
        "images/empty/layers:",
        "images/empty/rootfs:",
    ]


def test_containers_and_then_their_image_are_deleted_in_order(chain: Mount) -> None:
    chain.fusestore("create", "image3", "c").ok()
    image = chain.sh('basename "$(readlink images/image3)"').ok().strip()
    chain.fusestore("start", "c").ok()
    chain.sh("rmdir containers/c").fails_with(errno.EBUSY)
    chain.sh("rmdir images/$1", image).fails_with(errno.EBUSY)
    chain.fusestore("stop", "c").ok()
    chain.sh("rmdir images/$1", image).fails_with(errno.EBUSY)
    chain.sh("rmdir containers/c images/$1", image).ok()
    for gone in ("containers/c", "images/image3", f"images/{image}"):
        chain.sh("stat $1", gone).fails_with(errno.ENOENT)
    assert chain.sh("ls images/image2/rootfs").ok() == "new\nother\n"
    assert chain.fusestore("check").ok() == ""


# What each layer changes: files, empty and full directories, removed and made again

_LAYERS = (
    _tar(
        "file1", "file2", "file3", "dir1/", "dir2/", "dir3/", "dir4/", "dir4/sub/", "dir5/", "dir5/sub/",
        "dir6/", "dir6/sub/", "dir7/", "dir7/file4", "dir8/", "dir8/file5", "dir9/", "dir9/file6",
    ),
    _tar(
        ".wh.file1", ".wh.file2", ".wh.dir1", ".wh.dir2", ".wh.dir4", ".wh.dir5", ".wh.dir7", ".wh.dir8",
        "second1", "dir10/", "dir11/", "dir11/sub/", "dir12/", "dir12/second2",
    ),
    _tar(
        "file1", "dir1/", "dir4/", "dir4/sub/", "dir7/", "dir7/file4", "dir3/", "dir3/third/",
        "dir3/third/deep/",
    ),
)  # fmt: skip

_CHANGES = [
    {"add": 18, "delete": 0, "modify": 0},
    {"add": 6, "delete": 8, "modify": 0},
    {"add": 8, "delete": 0, "modify": 1},
]


def _changes(mount: Mount, image: str) -> list[dict[str, int]]:
    """What the layers of `image` do, bottom first, read off the tree: their own view and those below."""
    below: set[bytes] = set()
    counts = []
    for number in range(3):
        layer = mount.person.call(snapshot, mount.images / image / f"layers/{number}/rootfs")
        del layer[b"."]
        gone = {path for path, entry in layer.items() if entry.type == "char" and entry.rdev == 0}
        there = layer.keys() - gone
        assert gone <= below, "a layer removes only what is there"
        counts.append({"add": len(there - below), "delete": len(gone), "modify": len(there & below)})
        below = {path for path in below if not any(_is_in(path, one) for one in gone)} | there
    assert _names(mount.person.call(snapshot, mount.images / image / "rootfs")) == below
    return counts


def _is_in(path: bytes, top: bytes) -> bool:
    return path == top or path.startswith(top + b"/")


def _names(tree: Snapshot) -> set[bytes]:
    return tree.keys() - {b"."}


def test_three_layers_change_what_they_say(fresh: Mount) -> None:
    _import(fresh, "three", _LAYERS)
    assert _changes(fresh, "three") == _CHANGES


def test_layers_change_the_same_after_export_deletion_and_import(fresh: Mount) -> None:
    _import(fresh, "three", _LAYERS)
    copy = f"oci:{fresh.base}/copy:three"
    fresh.person.run("skopeo", "--insecure-policy", "copy", "-q", f"oci:{fresh.store}:three", copy).ok()
    fresh.sh('rmdir images/"$(basename "$(readlink images/three)")"').ok()
    fresh.sh("stat images/three").fails_with(errno.ENOENT)
    fresh.fusestore("import", copy).ok()
    assert _changes(fresh, "three") == _CHANGES


_WORK = (
    """
    touch file1 file2 file3; mkdir dir1 dir2 dir3 dir7 dir8 dir9; mkdir -p dir4/sub dir5/sub dir6/sub
    touch dir7/file4 dir8/file5 dir9/file6
    """,
    """
    rm file1 file2 dir7/file4 dir8/file5; rmdir dir1 dir2 dir7 dir8; rmdir -p dir4/sub dir5/sub
    touch second1; mkdir -p dir10 dir11/sub dir12; touch dir12/second2
    """,
    "touch file1; mkdir -p dir1 dir4/sub dir7 dir3/third/deep; touch dir7/file4",
)
_SIGNS = {"add": "A", "delete": "D", "modify": "C"}


def test_three_rounds_of_work_are_the_same_changes_by_diff_and_by_layer(fresh: Mount) -> None:
    _import(fresh, "round0", [])
    for number, work in enumerate(_WORK):
        fresh.fusestore("create", f"round{number}", f"c{number}").ok()
        fresh.sh(f"cd containers/c{number}/rootfs; {work}").ok()
        signs = [line[0] for line in fresh.fusestore("diff", f"c{number}").ok().splitlines()]
        assert {kind: signs.count(sign) for kind, sign in _SIGNS.items()} == _CHANGES[number]
        fresh.fusestore("commit", f"c{number}", f"round{number + 1}").ok()
    assert _changes(fresh, "round3") == _CHANGES
    assert _names(fresh.person.call(snapshot, fresh.containers / "c2/rootfs")) == _names(
        fresh.person.call(snapshot, fresh.images / "round3/rootfs")
    )
