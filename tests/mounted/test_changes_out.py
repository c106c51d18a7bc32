"""What leaves a container: diff, export, commit, clone; read back by umoci, buildah and tar, as by podman."""

import json
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig.images import NS, Images
from rig.mounts import Mount, Place
from rig.people import as_root
from rig.requirements import need
from rig.snapshot import differences, snapshot

pytestmark = [pytest.mark.mounted, pytest.mark.images]

PERSONS = ("root", "user", "erofs", "overlay")

CHANGED = """
C /lower
C /lower/kept
C /lower/kept/file0
D /lower/kept/file1
A /lower/moved
A /lower/moved/new
D /lower/opaque
A /new
A /new/fifo
A /new/file
A /new/hard
A /new/link
A /new/sparse
D /upper
"""


def _change(root: Path, is_root: bool) -> None:
    """Every kind of change, of the image `debian`."""
    new = root / "new"
    new.mkdir()
    (new / "file").write_bytes(b"new\n")
    (new / "file").chmod(0o640)
    os.setxattr(new / "file", "user.binary", bytes(range(256)))
    os.utime(new / "file", ns=(NS, NS))
    os.link(new / "file", new / "hard")
    (new / "link").symlink_to("../lower/kept/file0")
    os.mkfifo(new / "fifo", 0o622)
    with open(new / "sparse", "wb") as file:
        file.write(b"first")
        file.seek(3 << 20)
        file.write(b"last")
        file.truncate(8 << 20)
    lower = root / "lower"
    with open(lower / "kept/file0", "ab") as file:
        file.write(b"appended\n")
    (lower / "kept/file1").unlink()
    shutil.move(lower / "opaque", lower / "moved")  # renamed here, copied where that is EXDEV
    shutil.rmtree(root / "upper")
    if is_root:
        os.chown(new / "file", 1234, 5678)
        (new / "file").chmod(0o6755)
        os.mknod(new / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        os.setxattr(new, "trusted.test", b"\0\xff")


@pytest.fixture
def changed(mounted: Mount) -> Iterator[str]:
    """The id of a container of debian in which every kind of thing was changed."""
    name = mounted.new_id()
    mounted.fusestore("create", "debian", name).ok()
    mounted.person.call(_change, mounted.containers / name / "rootfs", mounted.person.is_root)
    yield name
    mounted.fusestore("rm", name).ok()


@pytest.fixture
def committed(mounted: Mount, changed: str) -> Iterator[str]:
    """The name of an image made of `changed`."""
    name = f"localhost/committed:{changed}"
    mounted.fusestore("commit", changed, name).ok()
    yield name
    mounted.sh("rmdir images/$(readlink images/$1 | xargs basename)", name).ok()


@pytest.fixture
def unpacked(mounted: Mount, committed: str, area: Path, tmp_path: Path) -> Path:
    """The image `committed` as umoci unpacks it: root's eyes, whoever made it."""
    need("root", os.geteuid() == 0, "owners and devices of an unpacked image need root")
    layout = _copied(mounted, committed, tmp_path)
    _run("umoci", "unpack", "--image", f"{layout}:committed", tmp_path / "bundle")
    return tmp_path / "bundle/rootfs"


def _copied(mounted: Mount, name: str, tmp_path: Path) -> Path:
    layout = tmp_path / "layout"
    _run("skopeo", "copy", f"oci:{mounted.store}:{name}", f"oci:{layout}:committed")
    return layout


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def _is_same(mounted: Mount, container: str, tree: Path) -> None:
    found = mounted.person.call(snapshot, mounted.containers / container / "rootfs")
    wrong = differences(found, snapshot(tree))
    assert not wrong, "\n".join(wrong)


# diff


def test_diff_lists_what_changed(mounted: Mount, changed: str) -> None:
    found = mounted.fusestore("diff", changed).ok()
    null = "A /new/null\n" if mounted.person.is_root else ""
    assert found == CHANGED.lstrip().replace("A /new/sparse\n", null + "A /new/sparse\n")


def test_diff_as_json(mounted: Mount, changed: str) -> None:
    found = json.loads(mounted.fusestore("diff", "--json", changed).ok())
    assert {"kind": "D", "path": "/upper"} in found
    lines = mounted.fusestore("diff", changed).ok().splitlines()
    assert [f"{change['kind']} {change['path']}" for change in found] == lines


def test_diff_of_a_container_nobody_entered_is_empty_and_enters_it_not(mounted: Mount) -> None:
    name = mounted.new_id()
    mounted.fusestore("create", "debian", name).ok()
    assert mounted.fusestore("diff", name).ok() == ""
    assert not (mounted.store / "containers" / name / "diff").exists()
    mounted.fusestore("rm", name).ok()


def test_looking_is_no_change(mounted: Mount, container: str) -> None:
    mounted.sh("find containers/$1/rootfs -type f -exec cat {} + > /dev/null", container).ok()
    assert mounted.fusestore("diff", container).ok() == ""


def test_a_name_made_again_is_changed(mounted: Mount, container: str) -> None:
    mounted.sh("cd containers/$1/rootfs && rm etc/hostname && echo new > etc/hostname", container).ok()
    assert mounted.fusestore("diff", container).ok() == "C /etc\nC /etc/hostname\n"


def test_a_new_file_where_a_layer_made_a_directory_of_a_file(mounted: Mount) -> None:
    """podman 4.3's diff fails here: it takes the lowest layer's file for the directory."""
    name = mounted.new_id()
    mounted.fusestore("create", "debian", name).ok()
    mounted.sh("touch containers/$1/rootfs/lower/becomes-directory/more", name).ok()
    assert mounted.fusestore("diff", name).ok().split("\n")[:2] == [
        "C /lower/becomes-directory",
        "A /lower/becomes-directory/more",
    ]
    mounted.fusestore("rm", name).ok()


def test_a_file_in_place_of_a_directory_is_one_change(mounted: Mount, container: str) -> None:
    mounted.sh("cd containers/$1/rootfs && rm -r etc && echo new > etc", container).ok()
    assert mounted.fusestore("diff", container).ok() == "C /etc\n"


def test_odd_names_are_written_as_they_are(mounted: Mount, container: str) -> None:
    mounted.sh("touch containers/$1/rootfs/$'a\\e[1mb\\xff'", container).ok()
    assert os.fsencode(mounted.fusestore("diff", container).ok()) == b"A /a\x1b[1mb\xff\n"


def test_diff_of_nothing_is_refused(mounted: Mount) -> None:
    result = mounted.fusestore("diff", "no-such")
    assert (result.code, result.err.count("\n")) == (1, 1) and "no-such" in result.err


# commit


def test_umoci_unpacks_the_tree_of_the_container(mounted: Mount, changed: str, unpacked: Path) -> None:
    _is_same(mounted, changed, unpacked)


def test_holes_are_not_in_the_layer(mounted: Mount, committed: str) -> None:
    assert int(mounted.sh("stat -L -c %s images/$1/layers/2/tar", committed).ok()) < 1 << 20


def test_the_image_shows_the_tree_of_the_container(mounted: Mount, changed: str, committed: str) -> None:
    shown = mounted.person.call(snapshot, mounted.images / committed / "rootfs")
    found = mounted.person.call(snapshot, mounted.containers / changed / "rootfs")
    assert not differences(found, shown)


@pytest.mark.root
def test_buildah_shows_the_tree_of_the_container(
    mounted: Mount, changed: str, committed: str, tmp_path: Path
) -> None:
    layout = _copied(mounted, committed, tmp_path)
    storage = ("--root", tmp_path / "storage", "--runroot", tmp_path / "run", "--storage-driver", "overlay")
    # A relative path, as for podman below.
    made = _run("buildah", *storage, "from", "--quiet", "oci:layout:committed", cwd=layout.parent).strip()
    try:
        tree = Path(_run("buildah", *storage, "mount", made).strip())
        found = mounted.person.call(snapshot, mounted.containers / changed / "rootfs")
        shown = snapshot(tree)
        # containers/storage makes each container's root anew; overlayfs keeps no link counts of directories.
        del found[b"."], shown[b"."]
        assert not differences(found, shown, ignore=frozenset(("nlink",)))
    finally:
        _run("buildah", *storage, "rm", made)
        subprocess.run(["umount", "-q", tmp_path / "storage/overlay"], check=False, timeout=30)


def test_a_container_of_the_image_is_as_the_one_it_was_made_of(
    mounted: Mount, changed: str, committed: str
) -> None:
    name = mounted.new_id()
    mounted.fusestore("create", committed, name).ok()
    first, second = (
        mounted.person.call(snapshot, mounted.containers / one / "rootfs") for one in (changed, name)
    )
    assert not differences(first, second)
    assert mounted.fusestore("diff", name).ok() == ""
    mounted.fusestore("rm", name).ok()


def test_the_config_grows(mounted: Mount, changed: str) -> None:
    changes = ("CMD [\"/bin/true\", \"x y\"]", "ENV A=1 B='two words'", "LABEL who=me", "USER 7:8",
               "EXPOSE 80 53/udp", "VOLUME /data", "WORKDIR /srv", "STOPSIGNAL SIGINT")  # fmt: skip
    options = [word for change in changes for word in ("--change", change)]
    image = mounted.fusestore(
        "commit", "--message", "why", "--author", "me <me@x>", *options, changed, "localhost/grown"
    ).ok().strip()  # fmt: skip
    config = json.loads(mounted.sh("cat images/$1/config.json", image).ok())
    before = json.loads(mounted.sh("cat images/debian/config.json").ok())
    assert config["rootfs"]["diff_ids"][:-1] == before["rootfs"]["diff_ids"]
    assert config["history"][:-1] == before["history"]
    last = config["history"][-1]
    assert (last["comment"], last["author"], config["author"]) == ("why", "me <me@x>", "me <me@x>")
    assert config["config"] == {
        **before["config"],
        "Cmd": ["/bin/true", "x y"],
        "Env": [*before["config"].get("Env", ()), "A=1", "B=two words"],
        "Labels": {**before["config"].get("Labels", {}), "who": "me"},
        "User": "7:8",
        "ExposedPorts": {"80/tcp": {}, "53/udp": {}},
        "Volumes": {"/data": {}},
        "WorkingDir": "/srv",
        "StopSignal": "SIGINT",
    }
    mounted.sh("rmdir images/$1", image).ok()


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
def test_the_same_changes_give_the_same_image(mounted: Mount, changed: str, compression: str) -> None:
    command = 'SOURCE_DATE_EPOCH=1700000000 fusestore commit --compression $2 "$1" localhost/same'
    first, second = (mounted.sh(command, changed, compression).ok() for _ in range(2))
    assert first == second
    mounted.sh("rmdir images/$1", first.strip()).ok()


def test_no_time_is_after_source_date_epoch(mounted: Mount, changed: str) -> None:
    image = mounted.sh("SOURCE_DATE_EPOCH=1700000000 fusestore commit $1 localhost/old", changed).ok().strip()
    assert (
        mounted.sh("find images/$1/rootfs/new images/$1/rootfs/lower/moved -newermt @1700000000", image).ok()
        == ""
    )
    assert (
        json.loads(mounted.sh("cat images/$1/config.json", image).ok())["created"] == "2023-11-14T22:13:20Z"
    )
    mounted.sh("rmdir images/$1", image).ok()


def test_a_container_without_changes_gives_no_layer(mounted: Mount, container: str) -> None:
    image = mounted.fusestore("commit", container, "localhost/empty").ok().strip()
    shown = json.loads(mounted.fusestore("inspect", image).ok())
    config = json.loads(mounted.sh("cat images/$1/config.json", image).ok())
    assert len(shown["layers"]) == 1 and config["history"][-1]["empty_layer"]
    mounted.sh("rmdir images/$1", image).ok()


def test_a_container_without_an_image_can_be_committed(fresh: Mount) -> None:
    fresh.sh("rm images/default && mkdir containers/bare && echo content > containers/bare/rootfs/file").ok()
    fresh.fusestore("commit", "bare", "localhost/bare").ok()
    assert fresh.sh("cat images/localhost/bare/rootfs/file").ok() == "content\n"


def test_a_container_in_use_can_be_committed(mounted: Mount, container: str) -> None:
    script = """
    exec 3> containers/$1/rootfs/open
    echo written >&3
    fusestore commit $1 localhost/in-use > /dev/null
    cat images/localhost/in-use/rootfs/open
    rmdir images/$(basename $(readlink images/localhost/in-use))
    """
    assert mounted.sh(script, container).ok() == "written\n"


def test_what_was_written_but_not_yet_written_back_is_in_it(mounted: Mount, container: str) -> None:
    script = """
    python3 - containers/$1/rootfs/mapped <<'END'
import mmap, subprocess, sys
with open(sys.argv[1], "w+b") as file:
    file.truncate(4096)
    memory = mmap.mmap(file.fileno(), 4096)
    memory[:8] = b"in pages"
    subprocess.run(["fusestore", "export", sys.argv[1].split("/")[1], "-o", "../pages.tar"], check=True)
END
    tar -xOf ../pages.tar mapped | head -c 8
    rm ../pages.tar
    """
    assert mounted.sh(script, container).ok() == "in pages"


def test_what_changes_all_the_time_is_refused(mounted: Mount, container: str) -> None:
    script = """
    head -c 30M /dev/urandom > containers/$1/rootfs/large
    while :; do echo x >> containers/$1/rootfs/log; done & writer=$!
    trap 'kill $writer' EXIT
    fusestore commit $1 localhost/torn
    """
    result = mounted.sh(script, container)
    assert result.code == 1 and "is being written to" in result.err
    assert "torn" not in mounted.fusestore("images").ok()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--change", "RUN x"), "is none of CMD"),
        (("--change", "ENV"), "says nothing"),
        (("--change", "LABEL a='b"), "close the quote"),
        (("--change", "ENV A=1 B"), "no KEY=VALUE"),
    ],
)
def test_wrong_changes_are_refused(
    mounted: Mount, container: str, arguments: tuple[str, ...], said: str
) -> None:
    result = mounted.fusestore("commit", *arguments, container, "localhost/wrong")
    assert result.code == 1 and said in result.err and result.err.count("\n") == 1


def test_a_wrong_name_is_refused(mounted: Mount, container: str) -> None:
    result = mounted.fusestore("commit", container, "../x")
    assert result.code == 1 and result.err.count("\n") == 1


# export


def test_export_is_the_whole_tree(mounted: Mount, changed: str, tmp_path: Path) -> None:
    need("root", os.geteuid() == 0, "owners and devices in a tar need root")
    tar = mounted.base / "all.tar"
    mounted.fusestore("export", changed, "-o", tar).ok()
    (tmp_path / "tree").mkdir()
    _run("tar", "-C", tmp_path / "tree", "--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf", tar)
    tar.unlink()
    _is_same(mounted, changed, tmp_path / "tree")


def test_export_to_standard_output_and_to_a_file_are_the_same(mounted: Mount, changed: str) -> None:
    script = "fusestore export $1 -o ../a.tar && fusestore export $1 | cmp - ../a.tar && rm ../a.tar"
    mounted.sh(script, changed).ok()


def test_an_export_that_fails_leaves_no_file(mounted: Mount) -> None:
    assert mounted.fusestore("export", "no-such", "-o", mounted.base / "none.tar").code == 1
    assert not list(mounted.base.glob("none.tar*"))


@pytest.mark.parametrize(
    ("script", "left"),
    [
        ("echo kept > all.tar.part; fusestore export $1 -o all.tar; cat all.tar.part", "kept"),
        ("mkfifo pipe; cat pipe > copy & fusestore export $1 -o pipe; wait; test -s copy; stat -c %F pipe",
         "fifo"),
        ("mkdir dir; fusestore export $1 -o dir 2> /dev/null || ls -A . dir | grep -v dir: | xargs", ". dir"),
        ("touch aim; ln -s aim link; fusestore export $1 -o link; readlink link; test -s aim", "aim"),
        ("fusestore export $1 -o '' 2> /dev/null; ls -A", ""),
        ("fusestore export $1 -o none/x 2> /dev/null; ls -A", ""),
    ],
)  # fmt: skip
def test_export_replaces_nothing_but_a_file_of_that_name(
    mounted: Mount, container: str, script: str, left: str
) -> None:
    inside = 'cd "$(mktemp -d ../export-XXXXXX)" && ' + script
    result = mounted.sh(inside, container)
    subprocess.run(f"rm -r {mounted.base}/export-*", shell=True, check=True, timeout=30)
    assert result.out.replace(":", "").strip() == left


# clone


@pytest.fixture
def cloned(mounted: Mount, changed: str) -> Iterator[str]:
    """The id of a clone of `changed`."""
    name = mounted.fusestore("clone", changed).ok().strip()
    yield name
    mounted.fusestore("rm", name).ok()


@pytest.mark.parametrize("part", ["new", "lower"])
def test_a_clone_shows_the_tree_of_its_source(mounted: Mount, changed: str, cloned: str, part: str) -> None:
    first, second = (
        mounted.person.call(snapshot, mounted.containers / one / "rootfs" / part) for one in (changed, cloned)
    )
    assert not differences(first, second)
    assert mounted.fusestore("diff", cloned).ok() == mounted.fusestore("diff", changed).ok()


def test_a_clones_upper_is_its_sources(mounted: Mount, changed: str, cloned: str) -> None:
    """Whiteouts, opaque markers, redirects, hard links, holes, and all xattrs, as they lie on disk."""
    first, second = (mounted.store / "containers" / one / "diff" for one in (changed, cloned))
    # Whiteouts are names of one device, some of them in other directories of the mount's.
    assert not differences(snapshot(first), snapshot(second), ignore=frozenset(("nlink",)))
    sizes = [(one / "new/sparse").stat().st_blocks for one in (first, second)]
    assert sizes[1] <= sizes[0] < 1 << 10


@as_root
def test_a_clone_shares_its_sources_blocks_where_the_file_system_can(place: Place) -> None:
    script = """
        cd $1; truncate -s 320M disk; mkfs.xfs -q -m reflink=1 disk; mkdir xfs; mount -o loop disk xfs
        trap 'fusestore umount mnt; umount xfs' EXIT
        export FUSESTORE_STORE=$1/xfs/store
        umoci init --layout image; umoci new --image image:empty
        fusestore import oci:image:empty > /dev/null; fusestore mount mnt
        mkdir mnt/containers/a; head -c 1M /dev/urandom > mnt/containers/a/rootfs/large
        fusestore clone a b > /dev/null
        filefrag -v xfs/store/containers/b/diff/large
    """
    shown = place.person.run("bash", "-ec", script, "bash", place.base, env=place.environment).ok()
    assert "shared" in shown


def test_a_clone_and_its_source_are_two(mounted: Mount, changed: str, cloned: str) -> None:
    mounted.sh("echo more >> containers/$1/rootfs/new/file; rm containers/$1/rootfs/new/link", cloned).ok()
    assert mounted.sh("cat containers/$1/rootfs/new/file", changed).ok() == "new\n"
    assert mounted.sh("cat containers/$1/rootfs/new/hard", cloned).ok() == "new\nmore\n"
    assert mounted.sh("ls containers/$1/rootfs/new | grep link", changed).ok() == "link\n"


def test_a_clone_has_the_metadata_of_its_source_but_what_is_its_own(mounted: Mount) -> None:
    source, copy = mounted.new_id(), mounted.new_id()
    mounted.fusestore("create", "debian", source, "--name", f"name-of-{source}", "--label", "a:b:c:d").ok()
    write = "jq '.purpose = [1, \"x\"] | .mounted = true' containers/$1/metadata.json > ../document"
    mounted.sh(f"{write}; cp ../document containers/$1/metadata.json", source).ok()
    mounted.sh("touch containers/$1/workdir/of-the-source", source).ok()
    assert mounted.fusestore("clone", f"name-of-{source}", copy).ok() == f"{copy}\n"
    first, second = (json.loads(mounted.fusestore("inspect", one).ok()) for one in (source, copy))
    assert second.pop("created-at") >= first.pop("created-at")
    assert (first.pop("mounted"), second.pop("mounted")) == (True, False)
    assert second == {**first, "id": copy, "name": copy}
    assert first["mountlabel"] == "a:b:c:d" and first["purpose"] == [1, "x"]
    assert mounted.sh("ls containers/$1/workdir", copy).ok() == ""
    mounted.fusestore("stop", source).ok()
    mounted.fusestore("rm", source, copy).ok()


def test_a_clone_of_what_nobody_entered_can_still_be_bound(fresh: Mount) -> None:
    fresh.sh("rm images/default && mkdir containers/bare").ok()
    fresh.fusestore("clone", "bare", "bare2").ok()
    fresh.sh('echo \'{"image-name": "busybox"}\' > containers/bare2/metadata.json').ok()
    assert fresh.sh("ls containers/bare2/rootfs/bin/busybox").code == 0


def test_a_clone_is_in_the_mount_at_once(mounted: Mount, container: str) -> None:
    copy = mounted.new_id()
    mounted.sh("ls containers/$2 2> /dev/null; fusestore clone $1 $2; ls containers/$2/metadata.json; "
               "fusestore rm $2", container, copy).ok()  # fmt: skip


def test_what_is_written_to_all_the_time_is_not_cloned(mounted: Mount, container: str) -> None:
    script = """
    head -c 30M /dev/urandom > containers/$1/rootfs/large
    while :; do echo x >> containers/$1/rootfs/log; done & writer=$!
    trap 'kill $writer' EXIT
    fusestore clone $1 torn
    """
    result = mounted.sh(script, container)
    assert result.code == 1 and "is being written to" in result.err
    assert mounted.sh("ls containers").ok().split().count("torn") == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("no-such",), "no container"),
        (("{container}", "../x"), "cannot name a container"),
        (("{container}", "{container}"), "is taken"),
    ],
)
def test_wrong_clones_are_refused(
    mounted: Mount, container: str, arguments: tuple[str, ...], said: str
) -> None:
    result = mounted.fusestore("clone", *(word.format(container=container) for word in arguments))
    assert result.code == 1 and said in result.err and result.err.count("\n") == 1


# podman


@pytest.fixture
def podman() -> Iterator[tuple[str | Path, ...]]:
    """The command, with storage of this test's own on kernel overlayfs."""
    need("root", os.geteuid() == 0, "podman on kernel overlayfs needs root")
    base = Path(tempfile.mkdtemp(prefix="podman-", dir="/var/tmp"))  # it wants 50 characters at most
    yield "podman", "--root", base / "storage", "--runroot", base / "run", "--storage-driver", "overlay"
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        if (mount := line.split()[4]).startswith(f"{base}/"):
            _run("umount", "-l", mount)
    shutil.rmtree(base)


@pytest.mark.root
def test_diff_is_podmans(images: Images, podman: tuple[str | Path, ...], tmp_path: Path) -> None:
    """The same done to a container of podman's."""
    policy = tmp_path / "policy.json"
    policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    debian = images.debian
    pull = ("pull", "--quiet", "--signature-policy", policy, f"oci:{debian.path.name}:{debian.ref}")
    # A relative path: podman makes an image name of it, which an absolute one may not be able to be.
    image = _run(*podman, *pull, cwd=debian.path.parent).strip()
    made = _run(*podman, "create", image).strip()
    _change(Path(_run(*podman, "mount", made).strip()), is_root=True)
    theirs = _run(*podman, "diff", made).splitlines()
    ours = [*CHANGED.split("\n")[1:-1], "A /new/null"]
    assert sorted(theirs) == sorted(ours)
