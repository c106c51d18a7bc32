"""What others may not: users of one mount beside each other, files beside the container, paths out of it."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rig.mounts import Mount, wait_until
from rig.people import as_root, plain_user

pytestmark = [pytest.mark.mounted, pytest.mark.images]

PERSONS = ("root", "erofs", "overlay")

OWNER = 64_001
"""Uid and gid of somebody who is neither root nor who tries."""

BELONGINGS = """
    cd "$1"; umask 0; mkdir private listed sticky shared own; chmod 700 private; chmod 711 listed
    chmod 1777 sticky; chmod 777 shared
    for file in private/f listed/f sticky/f shared/f; do echo secret > $file; chmod 644 $file; done
    chmod 666 private/f
    echo secret > 600; chmod 600 600; echo secret > 640; chmod 640 640; echo secret > 666; chmod 666 666
    echo secret > 220; chmod 220 220; mkfifo fifo; chmod 600 fifo; ln -s 600 link; ln -s private/f inner
    chown -hR $2:$2 private listed sticky shared [0-9]* fifo link inner; chown $3:$3 own; chgrp $3 640 220
"""
"""In $1, of $2 but for what is $3's."""

FILES = (
    *("600", "640", "666", "220", "link", "inner"),
    *(f"{directory}/f" for directory in ("private", "listed", "sticky", "shared")),
)
PLACES = ("private", "listed", "sticky", "shared", "own")


def _read(path: str) -> object:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return os.read(fd, 100)
    finally:
        os.close(fd)


def _write(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))


def _add(directory: str) -> None:
    path = f"{directory}/new"
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    os.unlink(path)


def _replace(path: str) -> None:
    os.close(os.open("own/mine", os.O_WRONLY | os.O_CREAT))
    os.rename("own/mine", path)


ON_FILES: dict[str, Callable[[str], object]] = {
    "stat": lambda path: os.stat(path).st_size,
    "read": _read,
    "write": _write,
    "may read": lambda path: os.access(path, os.R_OK),
    "may write": lambda path: os.access(path, os.W_OK),
    "truncate": lambda path: os.truncate(path, 3),
    "chmod": lambda path: os.chmod(path, 0o777),
    "take": lambda path: os.chown(path, os.geteuid(), -1),
    "give away": lambda path: os.chown(path, -1, 0),
    "set times": lambda path: os.utime(path, (1, 1)),
    "set now": lambda path: os.utime(path),
    "set an xattr": lambda path: os.setxattr(path, "user.x", b"x"),
    "list xattrs": lambda path: len(os.listxattr(path)),
    "link": lambda path: os.link(path, "own/stolen"),
    "move": lambda path: os.rename(path, "own/stolen"),
    "replace": _replace,
    "remove": os.unlink,
}
ON_PLACES: dict[str, Callable[[str], object]] = {
    "list": lambda path: sorted(os.listdir(path)),
    "add": _add,
    "remove": os.rmdir,
    "move": lambda path: os.rename(path, "own/stolen"),
    "chmod": lambda path: os.chmod(path, 0o777),
}


def _attempts(root: Path) -> dict[str, str]:
    """One after the other, the harmless first: what each comes to."""
    os.chdir(root)
    results = {}
    for operations, objects in ((ON_FILES, FILES), (ON_PLACES, PLACES)):
        for name, operation in operations.items():
            for path in objects:
                try:
                    results[f"{name} {path}"] = str(operation(path))
                except OSError as error:
                    results[f"{name} {path}"] = errno.errorcode[error.errno or 0]
    return results


@pytest.fixture
def others(unmounted: Mount) -> Mount:
    """A mount for everybody, with a container c that everybody may enter."""
    unmounted.options = ("--allow-other",)
    unmounted.mount().sh("mkdir containers/c; chmod 755 containers/c/rootfs").ok()
    return unmounted


def test_a_stranger_may_what_modes_allow_and_no_more(others: Mount) -> None:
    """As in a directory of the disk."""
    stranger, results = plain_user(), []
    for root in (others.base / "reference", others.containers / "c/rootfs/area"):
        others.person.call(os.mkdir, root, 0o755)
        ids = str(OWNER), str(stranger.uid)
        others.person.run("bash", "-ec", BELONGINGS, "bash", root, *ids).ok()
        results.append(stranger.call(_attempts, root))
    assert results[1] == results[0]
    assert results[0]["read 600"] == "EACCES" and results[0]["read 640"] == "b'secret\\n'"
    assert results[0]["remove sticky/f"] == "EPERM" and results[0]["remove shared/f"] == "None"


def test_who_may_read_the_metadata_may_not_read_the_files(others: Mount) -> None:
    others.sh("echo secret > containers/c/rootfs/f; chmod 700 containers/c/rootfs").ok()
    script = """
        cd $1; jq -r .id metadata.json; ls -d rootfs
        for part in rootfs workdir rundir; do ls $part; cat $part/f; done
    """
    result = plain_user().run("sh", "-c", script, "sh", others.containers / "c")
    assert result.out == "c\nrootfs\n"
    assert result.err.count("Permission denied") == 6


@as_root
def test_the_store_and_the_run_directory_are_their_owners(others: Mount) -> None:
    for place in (others.store, *others.run_dir.iterdir()):
        assert plain_user().run("ls", place).code != 0


CANARY = "canary: nobody but the test may read or remove this\n"

WAYS_OUT = """
    ln -s $1 absolute; ln -s $1/canary file; ln -s {up}$1 up; mkdir below; ln -s $1 below/dir
    rm -r etc; ln -s $1 etc; rm -r home 2> /dev/null; ln -s /proc/self/root home
"""


@as_root
def test_no_command_follows_a_link_out_of_a_container(others: Mount) -> None:
    """Canaries: what is read shows them, what is removed or changed is missed."""
    outside = others.base / "outside"
    outside.mkdir()
    for name in ("canary", "passwd", "group"):
        (outside / name).write_text(CANARY)
    ways = WAYS_OUT.format(up="../" * 40)
    for part in ("rootfs", "workdir", "rundir"):
        others.sh(f"cd containers/c/{part}; {ways} true", outside)
    others.sh("mkdir containers/c/rootfs/bin/d; ln -s $1 containers/c/rootfs/bin/d/dir", outside).ok()
    for command in (
        *(
            "diff c",
            "export c",
            "commit c localhost/c:1",
            "clone c d",
            "inspect c",
            "check",
            "start c",
            "stop c",
        ),
        *("bundle c bundle", "hydrate localhost/c:1", "rm d", "gc --dry-run", "df"),
    ):
        shown = others.person.run("fusestore", *command.split(), cwd=others.base, env=others.environment)
        assert shown.code == 0 and "canary:" not in shown.out, command
    assert others.sh("grep -c canary: images/localhost/c:1/layers/1/tar").out == "0\n"
    others.sh("rm -r containers/c && fusestore gc > /dev/null").ok()
    wait_until(lambda: os.listdir(others.store / "trash") == [])
    assert {path.name: path.read_text() for path in outside.iterdir()} == dict.fromkeys(
        ("canary", "passwd", "group"), CANARY
    )
