"""A container's rootfs on a real mount: the work of a shell, and what the kernel and programs rely on."""

import errno
import os
import subprocess
from pathlib import Path

import pytest
from rig.mounts import Mount
from rig.people import as_root, as_user
from rig.snapshot import differences, snapshot

pytestmark = [pytest.mark.mounted, pytest.mark.images]

PERSONS = ("root", "user", "erofs", "overlay", "overlay-user")

by_union = pytest.mark.parametrize("person", ["root", "user"], indirect=True)
"""What the kernel's overlayfs does not do (README, "Which driver, when")."""


def _in_rootfs(mount: Mount, container: str, script: str) -> str:
    return mount.sh(f"cd containers/$1/rootfs && {script}", container).ok()


@pytest.fixture
def debian(mounted: Mount) -> str:
    """The id of a container of the two-layer image; the mount's own fixture takes it away."""
    name = mounted.new_id()
    mounted.fusestore("create", "debian", name).ok()
    return name


@as_root
def test_chroot_runs_a_shell(mounted: Mount, container: str) -> None:
    script = "chroot containers/$1/rootfs /bin/sh -c 'echo hello > /root/file; cat /root/file; id -u; ls /'"
    assert mounted.sh(script, container).ok().split() == [
        *["hello", "0", "bin", "dev", "etc", "proc", "root", "tmp"]
    ]


@as_root
def test_chroot_runs_perl_and_python(mounted: Mount, debian: str) -> None:
    # Scripts from files: perl -e opens /dev/null, which an image need not have.
    script = """
        cd containers/$1/rootfs && echo 'print 6 * 7' > p && echo 'print(6 * 7)' > q &&
        chroot . /bin/bash -c 'perl /p; python3.11 /q'
    """
    assert mounted.sh(script, debian).ok() == "4242\n"


def test_a_plain_namespace_chroot_runs_a_shell(mounted: Mount, container: str) -> None:
    script = "unshare -Ur chroot containers/$1/rootfs /bin/sh -c 'echo $0; id -u'"
    assert mounted.sh(script, container).ok().split() == ["/bin/sh", "0"]


@as_user
def test_links_and_fifos_that_change_become_the_users(mounted: Mount, debian: str) -> None:
    changes = "touch xattrs; mv absolute a; mv fifo f"
    script = f"cd upper; stat -c %u absolute fifo xattrs; {changes}; stat -c %u a f xattrs"
    own = str(mounted.person.uid)
    assert _in_rootfs(mounted, debian, script).split() == ["0", "0", "0", own, own, "0"]


EDITS = {
    "overwrite": ("echo new > etc/hostname; cat etc/hostname", "new"),
    "append": ("echo more >> etc/hostname; cat etc/hostname", "busybox more"),
    "truncate": ("truncate -s 3 etc/hostname; cat etc/hostname; echo; stat -c %s etc/hostname", "bus 3"),
    "grow": ("truncate -s 10 etc/hostname; wc -c < etc/hostname", "10"),
    "write in the middle": (
        "printf XX | dd of=etc/hostname bs=1 seek=2 conv=notrunc status=none; cat etc/hostname",
        "buXXbox",
    ),
    "sed -i": ("sed -i s/busy/lazy/ etc/hostname; cat etc/hostname", "lazybox"),
    "vim": ("vim -es -u NONE -c '%s/busy/lazy/' -c wq etc/hostname; cat etc/hostname", "lazybox"),
    "chmod": ("chmod 4751 etc/hostname; stat -c %a etc/hostname; cat etc/hostname", "4751 busybox"),
    "chmod a directory": ("chmod 1770 etc; stat -c %a etc; cat etc/hostname", "1770 busybox"),
    "touch -d": ("touch -d @1.123456789 etc/hostname; stat -c %.9Y etc/hostname", "1.123456789"),
    "touch -h": ("touch -h -d @5 bin/sh; stat -c %Y bin/sh; readlink bin/sh", "5 busybox"),
    "xattr": (
        "setfattr -n user.x -v 1 etc/hostname; getfattr --only-values -n user.x etc/hostname; "
        "setfattr -x user.x etc/hostname; getfattr etc/hostname",
        "1",
    ),
    "rm": ("rm etc/hostname; ls etc", "passwd"),
    "rm and make again": (
        "rm etc/hostname; echo again > etc/hostname; cat etc/hostname; ls etc",
        "again hostname passwd",
    ),
    "rm -r of a lower directory": ("rm -r etc; ls", "bin dev proc root tmp"),
    "rm -r and mkdir": ("rm -r etc; mkdir etc; ls -A etc", ""),
    "rmdir of a lower directory": ("rmdir dev; mkdir dev; ls -A dev; stat -c %h dev", "2"),
    "mv a lower file": ("mv etc/hostname etc/name; ls etc; cat etc/name", "name passwd busybox"),
    "mv over a lower file": ("mv etc/passwd etc/hostname; ls etc; cut -c1-4 etc/hostname", "hostname root"),
    "mv a lower directory": (
        "mv etc var; ls var; ls; cat var/hostname",
        "hostname passwd bin dev proc root tmp var busybox",
    ),
    "mv a lower directory back": (
        "mv etc var; mv var etc; cat etc/hostname; ls -A etc",
        "busybox hostname passwd",
    ),
    "mv into a renamed directory": (
        "mv etc var; echo x > var/x; mv var root/var; ls root/var; cat root/var/hostname",
        "hostname passwd x busybox",
    ),
    "mv over an empty lower directory": (
        "mv -T etc dev; ls dev; ls",
        "hostname passwd bin dev proc root tmp",
    ),
    "hard link to a lower file": (
        "ln etc/hostname h; echo x >> h; cat etc/hostname; stat -c %h h etc/hostname",
        "busybox x 2 2",
    ),
    "hard link and rm": ("ln etc/hostname h; rm etc/hostname; cat h; stat -c %h h", "busybox 1"),
    "symlink": ("ln -s etc/hostname s; cat s; readlink s; stat -c %s s", "busybox etc/hostname 12"),
    "fifo": ("mkfifo f; (echo through > f &); cat f; stat -c %F f", "through fifo"),
    "long name": ("n=$(printf %255s | tr ' ' n); echo x > $n; cat $n; rm $n; ls | wc -l", "x 6"),
    "name with a marker's prefix": (
        "echo x > etc/.wh.hostname; ls -A etc; cat etc/.wh.hostname",
        ".wh.hostname hostname passwd x",
    ),
    "cp -a": ("cp -a etc copy; diff -r etc copy && stat -c %Y etc/passwd copy/passwd | uniq | wc -l", "1"),
    "tar": ("tar cf - etc | tar xf - -C tmp; diff -r etc tmp/etc; ls tmp", "etc"),
    "sparse": ("truncate -s 1G s; stat -c %s s; du -k s | cut -f1", "1073741824 0"),
    "unlinked while open": (
        "exec 3< etc/hostname; rm etc/hostname; cat <&3; stat -L -c %h /proc/self/fd/3",
        "busybox 0",
    ),
    "written while unlinked": (
        "exec 3<> etc/hostname; rm etc/hostname; echo NEW >&3; cat /proc/self/fd/3",
        "NEW box",
    ),
    "open across copy-up": ("exec 3< etc/hostname; echo new > etc/hostname; cat <&3", "new"),
    "find": ("find etc dev | sort", "dev etc etc/hostname etc/passwd"),
    "sync": ("echo x > etc/new; sync etc/new etc; cat etc/new", "x"),
    "df": ("df --output=fstype . | tail -1", "fuse.fusestore"),
}


BY_KERNEL = {"unlinked while open": "busybox 1", "df": "overlay"}
"""What the kernel's overlayfs answers otherwise."""


@pytest.mark.parametrize("what", EDITS)
def test_an_edit_works_as_in_a_plain_directory(mounted: Mount, container: str, what: str) -> None:
    script, words = EDITS[what]
    if mounted.person.has_kernel_mounts:
        words = BY_KERNEL.get(what, words)
    assert _in_rootfs(mounted, container, script).split() == words.split()


REFUSED = {
    "rmdir of a lower directory with files": ("rmdir etc", errno.ENOTEMPTY),
    "mv over a directory with files": ("mv -T dev etc", errno.ENOTEMPTY),
    "mkdir over a file": ("mkdir etc/hostname", errno.EEXIST),
    "cd into a file": ("cat etc/hostname/x", errno.ENOTDIR),
    "file over a directory": ("mv -T etc/hostname dev", errno.EISDIR),
    "directory over a file": ("mv -T dev etc/hostname", errno.ENOTDIR),
    "directory into itself": ("mv -T etc etc/sub", errno.EINVAL),
    "name too long": ("touch $(printf %256s | tr ' ' n)", errno.ENAMETOOLONG),
    "link to nothing": ("ln nothing x", errno.ENOENT),
    "missing xattr": ("getfattr -n user.none etc", errno.ENODATA),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_plain_directory_refuses_is_refused(mounted: Mount, container: str, what: str) -> None:
    script, number = REFUSED[what]
    result = mounted.sh(f"cd containers/$1/rootfs && {script}", container)
    if number in (errno.EINVAL, errno.EISDIR, errno.ENOTDIR, errno.ENODATA):
        # mv and getfattr say some of these in words of their own, which name no errno.
        assert result.code != 0
    else:
        result.fails_with(number)
    assert _in_rootfs(mounted, container, "ls; ls etc").split() == [
        *["bin", "dev", "etc", "proc", "root", "tmp", "hostname", "passwd"]
    ]


def _inode_across_copy_up(path: Path) -> tuple[int, int]:
    with open(path, "rb+", buffering=0) as file:
        before = os.fstat(file.fileno()).st_ino
        file.write(b"X")
        return before, os.stat(path).st_ino


def test_the_inode_number_survives_copy_up(mounted: Mount, container: str) -> None:
    path = mounted.containers / container / "rootfs/etc/hostname"
    before, after = mounted.person.call(_inode_across_copy_up, path)
    assert before == after


@by_union
def test_a_hard_link_of_the_image_stays_one_through_copy_up(mounted: Mount, debian: str) -> None:
    script = (
        "echo four >> upper/linked-2; cat upper/linked-1; stat -c '%h %i' upper/linked-* | sort -u | wc -l"
    )
    assert _in_rootfs(mounted, debian, script) == "three names\nfour\n1\n"


def test_a_setuid_bit_of_the_image_is_seen(mounted: Mount, debian: str) -> None:
    shown = _in_rootfs(
        mounted, debian, "stat -c '%a %g' upper/setuid; cat /proc/sys/kernel/overflowgid"
    ).split()
    assert shown[:2] == ["6755", "4242" if mounted.person.holder is None else shown[2]]


def test_the_capabilities_of_the_image_are_seen(mounted: Mount, debian: str) -> None:
    shown = _in_rootfs(mounted, debian, "/sbin/getcap upper/capable")
    assert shown == "upper/capable cap_net_bind_service,cap_net_raw=ep\n"


def test_device_nodes_and_setuid_do_not_act(mounted: Mount) -> None:
    """They are kept and shown; root's mount has them act where asked for (test_command.py)."""
    options = mounted.sh("findmnt -n -o VFS-OPTIONS -T .").ok().split(",")
    assert {"nosuid", "nodev"} <= set(map(str.strip, options))


@as_root
def test_writing_takes_setuid_and_capabilities_away_from_others(mounted: Mount, debian: str) -> None:
    shown = _in_rootfs(mounted, debian, "echo x >> upper/capable; /sbin/getcap upper/capable")
    assert shown == ""


@by_union
def test_link_counts_of_directories_follow_their_subdirectories(mounted: Mount, container: str) -> None:
    script = "stat -c %h .; mkdir new; stat -c %h .; rmdir new dev; stat -c %h ."
    assert _in_rootfs(mounted, container, script).split() == ["8", "9", "7"]


def _dots(path: Path) -> tuple[int, int, int, int]:
    listed = {}
    with os.scandir(path) as entries:
        for entry in entries:
            listed[entry.name] = entry.inode()
    return os.stat(path).st_ino, os.stat(path / ".").st_ino, os.stat(path / "etc/..").st_ino, listed["etc"]


def test_dot_and_dot_dot_lead_where_they_should(mounted: Mount, container: str) -> None:
    root = mounted.containers / container / "rootfs"
    own, dot, back, listed = mounted.person.call(_dots, root)
    assert own == dot == back
    assert listed == mounted.person.call(os.stat, root / "etc").st_ino


def test_readdir_while_deleting_misses_nothing(mounted: Mount, container: str) -> None:
    script = "mkdir d && cd d && seq 5000 | xargs touch && find . -type f -delete && ls -A | wc -l"
    assert _in_rootfs(mounted, container, script) == "0\n"


def test_a_large_file_is_read_as_written(mounted: Mount, container: str) -> None:
    script = "head -c 50M /dev/urandom > big; cp big copy; cat big copy | wc -c; cmp big copy"
    assert _in_rootfs(mounted, container, script) == "104857600\n"


def test_two_writers_of_one_file_append_whole_lines(mounted: Mount, container: str) -> None:
    writers = "for w in 1 2; do (for i in $(seq 200); do echo line-$w >> log; done) & done"
    assert _in_rootfs(mounted, container, f"{writers}; wait; sort log | uniq -c").split() == [
        "200",
        "line-1",
        "200",
        "line-2",
    ]


def test_nothing_is_written_to_the_upper_by_reading(mounted: Mount, debian: str) -> None:
    _in_rootfs(mounted, debian, "find . -type f -exec cat {} + > /dev/null; ls -lR > /dev/null")
    assert os.listdir(mounted.store / "containers" / debian / "diff") == []


@as_root
def test_the_kernel_mounts_the_upper(fresh: Mount) -> None:
    """The upper directory is overlayfs's format: the kernel shows what fusestore showed."""
    changes = """
        mkdir containers/a && cd containers/a/rootfs || exit 1
        rm etc/hostname; echo new > etc/new; rm -r root && mkdir root && touch root/only; mv proc moved
        chmod 700 tmp; ln bin/busybox bin/again; ln -s x link; setfattr -n user.k -v v etc/passwd
        mv etc var; echo x >> var/passwd; mknod null c 1 3; mkfifo fifo; rm -r dev
    """
    fresh.sh(changes).ok()
    shown = fresh.person.call(snapshot, fresh.containers / "a/rootfs")
    script = """
        mkdir k && cp -a mnt/images/busybox/rootfs lower && fusestore umount mnt || exit 1
        upper=store/containers/a
        mount -t overlay none k -o "lowerdir=lower,upperdir=$upper/diff,workdir=$upper/work,redirect_dir=on"
    """
    fresh.person.run("bash", "-c", script, cwd=fresh.base, env=fresh.environment).ok()
    try:
        assert differences(shown, fresh.person.call(snapshot, fresh.base / "k")) == []
    finally:
        subprocess.run(["umount", fresh.base / "k"], check=True, timeout=30)


def test_times_shown_are_those_on_disk(mounted: Mount, container: str) -> None:
    """With the writeback cache the kernel knows mtime first: what it shows must be what a remount shows."""
    script = """
        for i in $(seq 30); do echo hi > x$i; echo more >> x$((i / 2)); done
        printf abc > xs; touch -d @5 xs; perl -e 'truncate "xs", 3'
        stat -c '%n %.9Y' x*
    """
    shown = _in_rootfs(mounted, container, script)
    upper = mounted.store / "containers" / container / "diff"
    assert mounted.person.run("bash", "-c", "cd $1 && stat -c '%n %.9Y' x*", "bash", upper).ok() == shown


def test_directories_show_the_ctime_that_a_copy_up_left(mounted: Mount, container: str) -> None:
    """Else tar, which looks before and after it reads a directory, says that it changed meanwhile."""
    look = "stat -c '%n %.9Z' . etc bin"
    shown = _in_rootfs(mounted, container, f"{look} > /dev/null; chmod 700 etc/passwd; rm bin/vi; {look}")
    upper = mounted.store / "containers" / container / "diff"
    assert mounted.person.run("bash", "-c", f"cd $1 && {look}", "bash", upper).ok() == shown


@as_user
def test_a_plain_user_changes_what_the_images_root_owns(mounted: Mount) -> None:
    name = mounted.new_id()
    mounted.fusestore("create", "debian", name).ok()
    script = """
        cd containers/$1/rootfs/upper
        chmod 000 setuid && echo new > setuid && cat setuid
        touch -d @5 linked-1 && setfattr -n user.a xattrs && rm linked-2
    """
    assert mounted.sh(script, name).ok() == "new\n"
    mounted.sh("rmdir containers/$1", name).ok()


@as_user
@pytest.mark.parametrize(
    "command",
    [
        "chown 12 upper/linked-1",
        "mknod null c 1 3",
        "setfattr -n security.capability -v 0x0100000200000000000000000000000000000000 upper/linked-1",
        "setfattr -n trusted.a upper/linked-1",
        "setfacl -m u:12:r upper/linked-1",
        "ln upper/setuid upper/setuid-too",
    ],
)
def test_what_the_kernel_keeps_for_root_or_owners(mounted: Mount, command: str) -> None:
    name = mounted.new_id()
    mounted.fusestore("create", "debian", name).ok()
    mounted.sh(f"cd containers/$1/rootfs && {command}", name).fails_with(errno.EPERM)
    mounted.sh("rmdir containers/$1", name).ok()


@by_union
def test_directories_have_one_size_wherever_they_lie(mounted: Mount, container: str) -> None:
    script = """
        cd containers/$1/rootfs
        mkdir made && touch made/file etc/made
        stat -c '%s %b' . bin etc made
    """
    assert set(mounted.sh(script, container).ok().splitlines()) == {"0 0"}
