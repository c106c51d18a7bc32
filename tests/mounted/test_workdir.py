"""workdir and rundir on a real mount (design.md section 2)."""

import errno
import os

import pytest
from rig.mounts import Mount

pytestmark = [pytest.mark.mounted, pytest.mark.images]

PERSONS = ("root", "user", "erofs", "overlay", "overlay-user")

both = pytest.mark.parametrize("directory", ["workdir", "rundir"])


@both
def test_only_the_owner_gets_in(mounted: Mount, container: str, directory: str) -> None:
    shown = mounted.sh("stat -c '%a %u' containers/$1/$2", container, directory).ok()
    assert shown == f"700 {mounted.person.own_uid}\n"


@both
def test_every_file_operation_works(mounted: Mount, container: str, directory: str) -> None:
    script = """
        cd containers/$1/$2
        mkdir -p a/b && echo text > a/b/file && ln a/b/file hard && ln -s a/b/file soft && mkfifo fifo
        chmod 751 a && truncate -s 5M sparse && touch -d @1.5 a/b/file && mv a/b c
        setfattr -n user.x -v y hard
        stat -c '%F %h %a' hard; readlink soft; stat -c %Y c/file
        getfattr --only-values -n user.x c/file; echo; stat -c %s sparse
        rm -r a c hard soft fifo sparse; ls -A
    """
    assert mounted.sh(script, container, directory).ok().splitlines() == [
        "regular file 2 644",
        "a/b/file",
        "1",
        "y",
        "5242880",
    ]


def test_they_are_not_the_rootfs(mounted: Mount, container: str) -> None:
    mounted.sh("echo w > containers/$1/workdir/w; echo r > containers/$1/rundir/r", container).ok()
    assert mounted.sh("cd containers/$1; ls workdir rundir", container).ok().split() == [
        "rundir:", "r", "workdir:", "w",
    ]  # fmt: skip
    mounted.sh("stat containers/$1/rootfs/w", container).fails_with(errno.ENOENT)


@both
def test_content_survives_a_new_mount(fresh: Mount, directory: str) -> None:
    fresh.sh("mkdir containers/a && echo kept > containers/a/$1/file", directory).ok()
    fresh.umount()
    fresh.mount()
    assert fresh.sh("cat containers/a/$1/file", directory).ok() == "kept\n"


def test_rundir_is_empty_after_a_reboot(fresh: Mount) -> None:
    fresh.sh("mkdir containers/a && echo x > containers/a/rundir/x && echo w > containers/a/workdir/w").ok()
    fresh.umount()
    for boot in fresh.run_dir.glob("*/boot"):
        boot.write_text("of another boot\n")
    fresh.mount()
    assert fresh.sh("ls -A containers/a/rundir; cat containers/a/workdir/w").ok() == "w\n"


def test_workdir_goes_with_the_container(fresh: Mount) -> None:
    fresh.sh("cd containers; mkdir a; echo x > a/workdir/x; echo x > a/rundir/x; rmdir a; mkdir a").ok()
    assert fresh.sh("ls -A containers/a/workdir containers/a/rundir").ok().split() == [
        "containers/a/rundir:", "containers/a/workdir:",
    ]  # fmt: skip


def test_workdir_is_a_directory_of_the_store(mounted: Mount, container: str) -> None:
    mounted.sh("echo x > containers/$1/workdir/x", container).ok()
    assert os.listdir(mounted.store / "containers" / container / "workdir") == ["x"]


def test_rundir_may_lie_on_another_file_system(unmounted: Mount) -> None:
    """As it does by default: /run is a tmpfs."""
    run_dir = unmounted.person.run("mktemp", "-d", "-p", "/dev/shm").ok().strip()
    place = ("--run-dir", run_dir)
    try:
        unmounted.fusestore("mount", *place, unmounted.mountpoint).ok()
        script = "cd containers/$1/rundir && mkdir d && ln -s d l && mkfifo f && echo x > d/x && mv d e && ls"
        unmounted.sh("mkdir containers/$1", "tmpfs").ok()
        assert unmounted.sh(script, "tmpfs").ok().split() == ["e", "f", "l"]
        unmounted.fusestore("umount", *place, unmounted.mountpoint).ok()
    finally:
        unmounted.person.run("rm", "-r", run_dir).ok()


@both
def test_what_others_change_there_shows(mounted: Mount, container: str, directory: str) -> None:
    script = """
        soon() { for i in $(seq 500); do "$@" && return; sleep 0.02; done; exit 1; }
        shown=containers/$1/$2
        if [ $2 = workdir ]; then real=$3; else real=$(echo $4/*); fi
        real=$real/containers/$1/$2
        ! test -e $shown/made && touch $real/made && test -e $shown/made || exit 2
        mkdir $shown/d && chmod 750 $real/d && soon eval '[ $(stat -c %a '$shown'/d) = 750 ]'
        rm $real/made && soon eval '! test -e '$shown/made
        echo new > $real/x && mv $real/x $real/d && soon test -e $shown/d/x && cat $shown/d/x
    """
    assert mounted.sh(script, container, directory, mounted.store, mounted.run_dir).ok() == "new\n"
