"""Where a rootfs ends: nothing is linked or moved out of it or in, and nothing changed in an image."""

import itertools
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rig.layers import directory, fifo, file, symlink, tar_layer
from rig.mounts import Mount
from rig.ocisources import SourceMaker
from rig.people import Person
from rig.posix import Call, call, make_calls
from rig.snapshot import differences, snapshot

from fusestore.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE

pytestmark = [pytest.mark.mounted]

PLACES = {
    "a rootfs": b"containers/a/rootfs",
    "another rootfs": b"containers/b/rootfs",
    "a workdir": b"containers/a/workdir",
    "a rundir": b"containers/a/rundir",
    "an image": b"images/given/rootfs",
    "a layer": b"images/given/layers/0/rootfs",
    "a file system outside": b"../outside",
}
"""Each has a file f, an empty directory d, and no n."""
READ_ONLY = ("an image", "a layer")


def _crossings() -> Iterator[tuple[str, Call]]:
    for (here, old), (there, new) in itertools.permutations(PLACES.items(), 2):
        for what, one in {
            "link": call("link", old + b"/f", new + b"/n"),
            "rename a file": call("rename", old + b"/f", new + b"/n"),
            "rename a file over one": call("rename", old + b"/f", new + b"/f"),
            "rename a directory": call("rename", old + b"/d", new + b"/n"),
            "rename a directory over one": call("rename", old + b"/d", new + b"/d"),
            "NOREPLACE": call("renameat2", old + b"/f", new + b"/n", RENAME_NOREPLACE),
            "EXCHANGE": call("renameat2", old + b"/f", new + b"/f", RENAME_EXCHANGE),
        }.items():
            yield f"{what} from {here} to {there}", one
    for here, old in PLACES.items():
        for there in ("containers", "images", "containers/a"):
            for kind in (b"f", b"d"):
                one = call("rename", old + b"/" + kind, os.fsencode(there) + b"/n")
                yield f"rename {kind.decode()} from {here} to {there}/", one


def _changes() -> Iterator[tuple[str, Call]]:
    for where in READ_ONLY:
        place = PLACES[where] + b"/"
        for what, one in {
            "open for writing": call("open", place + b"f", os.O_WRONLY),
            "open for both": call("open", place + b"f", os.O_RDWR),
            "open to empty": call("open", place + b"f", os.O_RDONLY | os.O_TRUNC),
            "create": call("open", place + b"n", os.O_CREAT | os.O_WRONLY, 0o644),
            "truncate": call("truncate", place + b"f", 0),
            "chmod a file": call("chmod", place + b"f", 0o600),
            "chmod a directory": call("chmod", place + b"d", 0o700),
            "chown": call("lchown", place + b"f", -1, -1),
            "utimensat": call("utimensat", place + b"f", None),
            "utimensat of a link": call("utimensat", place + b"s", None, 0x100),
            "unlink a file": call("unlink", place + b"f"),
            "unlink a link": call("unlink", place + b"s"),
            "unlink a FIFO": call("unlink", place + b"p"),
            "rmdir": call("rmdir", place + b"d"),
            "mkdir": call("mkdir", place + b"n", 0o755),
            "mkfifo": call("mkfifo", place + b"n", 0o644),
            "mknod": call("mknod", place + b"n", stat.S_IFREG | 0o644, 0),
            "symlink": call("symlink", b"target", place + b"n"),
            "link": call("link", place + b"f", place + b"n"),
            "rename": call("rename", place + b"f", place + b"n"),
            "rename a directory": call("rename", place + b"d", place + b"n"),
            "EXCHANGE": call("renameat2", place + b"f", place + b"d", RENAME_EXCHANGE),
            "setxattr": call("setxattr", place + b"f", b"user.x", b"v", 1, 0),
        }.items():
            yield f"{what} in {where}", one
    for name in (b"manifest.json", b"config.json", b"metadata.json", b"layers/0/blob", b"layers/0/tar"):
        path = b"images/given/" + name
        yield f"open {name.decode()} for writing", call("open", path, os.O_WRONLY)
        yield f"truncate {name.decode()}", call("truncate", path, 0)
        yield f"chmod {name.decode()}", call("chmod", path, 0o600)
        yield f"unlink {name.decode()}", call("unlink", path)
    yield "create in an image's directory", call("open", b"images/given/n", os.O_CREAT | os.O_WRONLY, 0o644)
    yield "mkdir in an image's directory", call("mkdir", b"images/given/n", 0o755)


CROSSINGS, CHANGES = dict(_crossings()), dict(_changes())


@dataclass(frozen=True, slots=True)
class Attempts:
    """What came of all calls, and how the places differ after them."""

    results: dict[str, Any]
    differences: list[str]


def _attempt(root: Path, attempts: Sequence[tuple[str, Call]]) -> Attempts:
    os.chdir(root)
    before = [snapshot(os.fsdecode(place)) for place in PLACES.values()]
    results = {name: make_calls([one])[0] for name, one in attempts}
    after = [snapshot(os.fsdecode(place)) for place in PLACES.values()]
    return Attempts(
        results, [line for pair in zip(before, after, strict=True) for line in differences(*pair)]
    )


@pytest.fixture(scope="module")
def attempts(person: Person, area: Path) -> Iterator[Attempts]:
    mount = Mount(person, area / f"borders-{person.name}")
    members = [directory(b"d"), file(b"f", b"content"), symlink(b"s", b"f"), fifo(b"p")]
    source = SourceMaker()
    source.add(source.image([tar_layer(members)]), "given")
    try:
        mount.fusestore("import", f"{source.directory(mount.base / 'source')}:given").ok()
        mount.mount()
        script = """
            mkdir ../outside containers/a containers/b
            for place in containers/a/workdir containers/a/rundir ../outside; do
                mkdir $place/d; echo content > $place/f
            done
        """
        mount.sh(script).ok()
        yield person.call(_attempt, mount.mountpoint, [*CROSSINGS.items(), *CHANGES.items()])
    finally:
        mount.close()


@pytest.mark.parametrize("what", CROSSINGS)
def test_nothing_crosses_a_border(attempts: Attempts, what: str) -> None:
    assert attempts.results[what] == "EXDEV"


@pytest.mark.parametrize("what", CHANGES)
def test_nothing_is_changed_in_an_image(attempts: Attempts, what: str) -> None:
    assert attempts.results[what] == "EROFS"


def test_all_is_as_before(attempts: Attempts) -> None:
    assert attempts.differences == []
