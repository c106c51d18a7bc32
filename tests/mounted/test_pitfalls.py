"""What other file systems of layers get wrong: long names and paths, removed files that are open, names that
the kernel forgot, times, xattrs, set-user-ID bits, handles. The file system below is the judge where it can.
"""

import ctypes
import errno
import functools
import mmap
import os
import re
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rig.images import Images
from rig.mounts import Mount
from rig.ocisources import SourceMaker
from rig.people import Person, as_root
from rig.tars import END, header, long_name, member, pax

from fusestore.syscalls import RENAME_WHITEOUT, renameat2

pytestmark = [pytest.mark.mounted, pytest.mark.images]

by_union = pytest.mark.by_union
"""overlayfs counts links of the image otherwise, takes set-group-ID away, and gives no handles."""


NAME = b"n" * 255
TARGET = b"/t" * 2047 + b"t"
DEEP = b"/".join([b"d" * 254] * 15)
"""3,824 bytes: with a name of 255 below, 4,080."""
LARGE = b"x" * 65_536

LAYER = b"".join(
    [
        long_name(NAME) + member(b"n", b"long"),
        long_name(TARGET, type=b"K") + header(b"link", type=b"2", link=b"t"),
        long_name(DEEP + b"/" + NAME) + member(b"f", b"deep"),
        pax((b"SCHILY.xattr.user." + b"k" * 250, b"v"), (b"SCHILY.xattr.user.large", LARGE))
        + member(b"xattrs"),
        header(b"d/", type=b"5"),
        member(b"d/a", b"aaa"),
        header(b"d/b", type=b"1", link=b"d/a"),
        member(b"d/c", b"ccc"),
        member(b"f", b"fff"),
        END,
    ]
)


@pytest.fixture(scope="module")
def shared(person: Person, images: Images, area: Path) -> Iterator[Mount]:
    """A mount that root lets others into, of a store whose default image is LAYER."""
    options = ("--allow-other",) if person.is_root else ()
    mount = Mount(person, area / f"pitfalls-{person.name}", *options)
    maker = SourceMaker()
    source = maker.add(maker.image([LAYER]), "pitfalls").directory(mount.base / "source")
    try:
        mount.fusestore("import", source, "--name", "pitfalls").ok()
        yield mount.mount()
    finally:
        mount.close()


@pytest.fixture
def rootfs(shared: Mount) -> Iterator[Path]:
    """The rootfs of a container of its own."""
    name = shared.new_id()
    shared.sh("mkdir containers/$1", name).ok()
    yield shared.containers / name / "rootfs"
    shared.sh("rmdir containers/$1", name).ok()
    shared.check_log()


# Names, paths, targets


def _use_names(root: Path, name: bytes) -> None:
    """Every operation that takes a name."""
    os.chdir(root)
    other = b"o" + name[1:]
    with open(name, "ab") as file:
        file.write(b"more")
    os.rename(name, other)
    os.link(other, name)
    os.unlink(other)
    os.symlink(name, other)
    assert os.readlink(other) == name and Path(os.fsdecode(other)).read_bytes().endswith(b"more")
    os.unlink(name)
    assert not os.path.exists(name)
    os.mkdir(name)
    os.unlink(other)
    os.rename(name, other)
    os.mkfifo(name)
    os.rmdir(other)
    os.setxattr(".", b"user." + name[:250], b"v")
    assert os.listxattr(".") == [os.fsdecode(b"user." + name[:250])]
    os.unlink(name)
    assert set(map(os.fsencode, os.listdir("."))) & {name, other} == set()


@pytest.mark.parametrize("name", [NAME, b"m" * 255], ids=["of the image", "new"])
def test_names_of_255_bytes(shared: Mount, rootfs: Path, name: bytes) -> None:
    shared.person.call(_use_names, rootfs, name)


def _names_of_256(root: Path) -> list[int | None]:
    os.chdir(root)
    name = b"n" * 256
    calls: list[Callable[[], object]] = [
        lambda: os.stat(name), lambda: os.mkdir(name), lambda: os.mkfifo(name), lambda: os.symlink("x", name),
        lambda: os.rename("d", name), lambda: os.link("link", name), lambda: os.unlink(name),
        lambda: os.open(name, os.O_CREAT | os.O_WRONLY),
    ]  # fmt: skip
    return [_errno(call) for call in calls]


def _errno(call: Callable[[], object]) -> int | None:
    try:
        call()
    except OSError as error:
        return error.errno
    return None


def test_names_of_256_bytes_are_too_long(shared: Mount, rootfs: Path) -> None:
    assert set(shared.person.call(_names_of_256, rootfs)) == {errno.ENAMETOOLONG}


def _use_depth(root: Path, levels: int) -> None:
    """Directories of 255 bytes each, far below what a path can say, and everything in the lowest."""
    os.chdir(root)
    for _ in range(levels):
        os.mkdir(b"p" * 255)
        os.chdir(b"p" * 255)
    Path("x" * 255).touch()
    _use_names(Path("."), b"x" * 255)


def test_far_below_what_a_path_can_say(shared: Mount, rootfs: Path) -> None:
    shared.person.call(_use_depth, rootfs, 100)


def _use_path(root: Path, path: bytes) -> bytes:
    """By a path from the root of the file system as long as paths can be."""
    os.chdir(root)
    path += b"/" * (4095 - len(path) - len(NAME)) + NAME
    assert _errno(lambda: os.stat(path + b"/")) == errno.ENAMETOOLONG
    os.chmod(path, 0o640)
    os.rename(path, b"up")
    os.rename(b"up", path)
    with open(path, "ab") as file:
        file.write(b"er")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o640
    with open(path, "rb") as file:
        content = file.read()
    os.unlink(path)
    assert _errno(lambda: os.stat(path)) == errno.ENOENT
    return content


def test_paths_of_4095_bytes(shared: Mount, rootfs: Path) -> None:
    assert shared.person.call(_use_path, rootfs, DEEP) == b"deeper"


def _use_targets(root: Path) -> None:
    os.chdir(root)
    assert os.readlink(b"link") == TARGET and os.lstat("link").st_size == 4095
    os.rename("link", "moved")  # copied up
    os.symlink(TARGET, "new")
    assert os.readlink(b"moved") == os.readlink(b"new") == TARGET
    assert _errno(lambda: os.symlink(TARGET + b"x", "longer")) == errno.ENAMETOOLONG


def test_targets_of_4095_bytes(shared: Mount, rootfs: Path) -> None:
    shared.person.call(_use_targets, rootfs)


# Removed, but open


def _links(root: Path, path: str, writes: bool, *steps: tuple[Callable[..., None], str]) -> list[int]:
    """Link counts of a file that is open, as fstat says them, at first and after each step."""
    os.chdir(root)
    with open(path, "rb+" if writes else "rb") as file:
        counts = [os.fstat(file.fileno()).st_nlink]
        for call, arguments in steps:
            call(*arguments.split())
            counts.append(os.fstat(file.fileno()).st_nlink)
    return counts


LINKS = {
    "removed": ("d/c", [(os.unlink, "d/c")], [1, 0]),
    "overwritten": ("d/c", [(os.rename, "d/a d/c")], [1, 0]),
    "overwritten from elsewhere": ("d/c", [(os.rename, "f d/c")], [1, 0]),
    "hard links removed": ("d/a", [(os.unlink, "d/b"), (os.unlink, "d/a")], [2, 1, 0]),
    "hard links overwritten": ("d/a", [(os.rename, "d/c d/b"), (os.rename, "d/b d/a")], [2, 1, 0]),
    "linked and removed": (
        "d/c", [(os.link, "d/c d/d"), (os.unlink, "d/c"), (os.unlink, "d/d")], [1, 2, 1, 0]
    ),
    "moved": ("d/c", [(os.rename, "d/c d/d"), (os.unlink, "d/d")], [1, 1, 0]),
}  # fmt: skip


@by_union
@pytest.mark.parametrize("writes", [False, True], ids=["read", "written"])
@pytest.mark.parametrize("what", LINKS)
def test_links_of_a_file_that_is_open(shared: Mount, rootfs: Path, what: str, writes: bool) -> None:
    path, steps, expected = LINKS[what]
    assert shared.person.call(_links, rootfs, path, writes, *steps) == expected


# Forgotten by the kernel


@by_union
@as_root
def test_everything_again_after_the_kernel_forgot(shared: Mount, rootfs: Path) -> None:
    """`remount` shrinks the dentries of a mount: all that is not open is forgotten."""
    steps = """
        ln d/c d/linked; mkfifo d/fifo; mkdir d/new; mv d/a d/moved; touch d/file; ln -s c d/symlink
        mv d d2; mkdir d; mv d2 d/d2; cat d/d2/moved; echo x >> d/d2/b; cat d/d2/moved; rm d/d2/linked
        chmod 700 d/d2; setfattr -n user.k -v v d/d2/c; mv d/d2/new d/d2/newer; rmdir d/d2/newer; mv d/d2 d3
        rm d3/symlink; cat d3/c; truncate -s 1 d3/c; mv d3/c d3/fifo; rm -r d; mv d3 d
        find d -printf '%p %y %n\\n' | sort
    """
    script = "\n".join(
        f"{step} || echo failed: {step!r}\n$forget" for step in re.split(r"[;\n]", steps) if step.strip()
    )
    forget = f"mount -i -o remount,rw {shared.mountpoint}"
    forgetful = shared.sh(f"cd $1; exec 2>&1\n{script.replace('$forget', forget)}", rootfs).ok()
    copy = shared.base / "copy"
    shared.sh("cp -a $1/d $2/", shared.images / "pitfalls/rootfs", copy.parent).ok()
    shared.person.run("mkdir", copy).ok()
    shared.person.run("mv", copy.parent / "d", copy).ok()
    expected = shared.person.run("bash", "-c", f"exec 2>&1\n{script.replace('$forget', '')}", cwd=copy).ok()
    assert forgetful == expected
    shared.person.run("rm", "-r", copy).ok()


def _shrink_and_work(root: Path, mountpoint: Path) -> list[str]:
    """Work in the middle of FORGETs."""
    forgets = ["bash", "-c", "while :; do mount -i -o remount,rw $0; done", mountpoint]
    with subprocess.Popen(forgets) as shrinking:
        try:
            os.chdir(root)
            for number in range(150):
                os.mkdir(f"m{number}")
                os.rename("d", f"m{number}/d")
                os.link(f"m{number}/d/a", "linked")
                os.rename("linked", f"m{number}/linked")
                os.mkfifo("fifo")
                os.rename(f"m{number}/d", "d")
                os.unlink("fifo")
                with open("d/a", "a") as file:
                    file.write("x")
                os.unlink(f"m{number}/linked")
                os.rmdir(f"m{number}")
        finally:
            shrinking.terminate()
    return [Path("d/a").read_text(), *sorted(os.listdir("d"))]


@as_root
def test_the_kernel_forgets_in_the_middle(shared: Mount, rootfs: Path) -> None:
    found = shared.person.call(_shrink_and_work, rootfs, shared.mountpoint)
    assert found == ["aaa" + "x" * 150, "a", "b", "c"]


# Times

_CLOCK_REALTIME_COARSE = 5  # linux/time.h


def _times(path: str) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns


def _read(root: Path, path: str) -> list[tuple[int, int, int]]:
    os.chdir(root)
    before = _times(path)
    if os.path.isdir(path):
        os.listdir(path)
    else:
        Path(path).read_bytes()
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert mapped[:1]
    os.listxattr(path)
    return [before, _times(path)]


@pytest.mark.parametrize("path", ["d/a", "d/c", "d"])
def test_reading_changes_no_time_of_the_image(shared: Mount, rootfs: Path, path: str) -> None:
    before, after = shared.person.call(_read, rootfs, path)
    assert before == after


def _read_own(root: Path) -> list[tuple[int, int, int]]:
    os.chdir(root)
    with open("own", "wb") as file:
        file.write(b"x")
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    os.utime("own", ns=(10**18, 10**18 + 1))
    return [*_read(root, "own"), *_read(root, "own")]


def test_reading_changes_atime_as_relatime_does(shared: Mount, rootfs: Path) -> None:
    """Where content comes from the store; what the kernel has in its cache is read without our knowing."""
    before, after, then, at_last = shared.person.call(_read_own, rootfs)
    assert before[0] < after[0] and before[1:] == after[1:]
    assert after == then == at_last


def _wait_for_tick() -> None:
    """Of the kernel's coarse clock, which files' times are of."""
    now = time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)
    while time.clock_gettime_ns(_CLOCK_REALTIME_COARSE) == now:
        pass


def _write_twice(path: Path) -> None:
    with open(path, "w") as file:
        file.write("x")
        file.flush()
        _wait_for_tick()
        file.write("y")


def test_times_of_a_written_file_after_a_remount(fresh: Mount) -> None:
    """ctime cannot be set: on disk it is when the kernel's pages came there, by and by."""
    path = fresh.containers / "a/rootfs/file"
    fresh.sh("mkdir containers/a").ok()
    fresh.person.call(_write_twice, path)
    before = fresh.person.call(os.stat, path)
    fresh.umount()
    fresh.mount()
    after = fresh.person.call(os.stat, path)
    assert after.st_mtime_ns == before.st_mtime_ns
    assert after.st_ctime_ns >= before.st_ctime_ns


# xattrs


def _use_xattrs(root: Path) -> None:
    os.chdir(root)
    assert os.getxattr("xattrs", "user.large") == LARGE
    assert os.getxattr("xattrs", b"user." + b"k" * 250) == b"v"
    Path("own").touch()
    names = [f"user.{number}" for number in range(90)]
    for name in names:
        os.setxattr("own", name, name.encode())
    assert sorted(os.listxattr("own")) == sorted(names)
    assert [os.getxattr("own", name) for name in names] == [name.encode() for name in names]
    assert _errno(lambda: os.setxattr("own", b"user." + b"k" * 251, b"v")) == errno.ERANGE
    assert _errno(lambda: os.setxattr("own", "user.k", LARGE + b"x")) == errno.E2BIG
    assert _errno(lambda: os.setxattr("own", "user.1", b"", os.XATTR_CREATE)) == errno.EEXIST
    assert _errno(lambda: os.setxattr("own", "user.none", b"", os.XATTR_REPLACE)) == errno.ENODATA


def test_xattrs_large_and_many(shared: Mount, rootfs: Path) -> None:
    shared.person.call(_use_xattrs, rootfs)


def _sizes_refused(root: Path) -> list[int | None]:
    path = root / "sizes"
    path.touch()

    def put(size: int) -> None:
        os.setxattr(path, "user.k", b"x" * size)

    try:
        return [_errno(functools.partial(put, size)) for size in range(0, 69_633, 4096)]
    finally:
        path.unlink()


def test_xattrs_are_as_large_as_the_file_system_below_takes(shared: Mount, rootfs: Path) -> None:
    below = shared.person.call(_sizes_refused, shared.base)
    assert shared.person.call(_sizes_refused, rootfs) == below


# Set-user-ID, set-group-ID, capabilities

_AS_OTHER = "setpriv --reuid 4242 --regid 4242 --clear-groups"
CLEARED = {
    "written by another": f"{_AS_OTHER} sh -c 'echo x >> f'",
    "written by root": "echo x >> f",
    "written in place": f"{_AS_OTHER} dd if=/dev/zero of=f bs=1 count=1 conv=notrunc status=none",
    "mapped and written": f"""{_AS_OTHER} python3 -c 'import mmap
mmap.mmap(open("f", "r+").fileno(), 0)[0] = 1'""",
    "opened for writing": f"{_AS_OTHER} sh -c ': >> f'",
    "truncated by another": f"{_AS_OTHER} truncate -s 1 f",
    "truncated by root": "truncate -s 1 f",
    "truncated by open": f"{_AS_OTHER} sh -c ': > f'",
    "truncated to its size": f"{_AS_OTHER} truncate -s 4 f",
    "owner changed": "chown 4242 f",
    "owner changed to the same": "chown 0:0 f",
    "group changed": "chgrp 4242 f",
    "times changed": "touch f",
    "mode changed": "chmod a+rw f",
    "read": f"{_AS_OTHER} cat f",
    "linked": "ln f g",
    "xattr changed": "setfattr -n user.k -v v f",
}  # fmt: skip


@as_root
@pytest.mark.parametrize("mode", ["4777", "2777", "6777"])
@pytest.mark.parametrize("what", CLEARED)
def test_what_takes_set_user_id_away(shared: Mount, rootfs: Path, what: str, mode: str) -> None:
    script = f"""
        exec 2>&1; umask 0; mkdir $0/bits; cd $0/bits; echo abc > f; setcap cap_net_raw=ep f; chmod {mode} f
        {CLEARED[what]}
        stat -c %a f; getcap f; sync f; stat -c %a f; cd ..; rm -r bits
    """
    found, expected = (shared.person.run("bash", "-c", script, at).ok() for at in (rootfs, shared.base))
    assert found == expected


@by_union
@as_root
def test_set_group_id_without_execute_stays(shared: Mount, rootfs: Path) -> None:
    """It stands for mandatory locks, which Linux no longer has; FUSE's kernel keeps it (fs/fuse/dir.c)."""
    script = f"umask 0; cd $1; echo abc > f; chmod 2767 f; {_AS_OTHER} sh -c 'echo x >> f'; stat -c %a f"
    assert shared.sh(script, rootfs).ok() == "2767\n"


@as_root
def test_what_a_set_group_id_directory_hands_on(shared: Mount, rootfs: Path) -> None:
    script = f"""
        exec 2>&1; umask 0; mkdir $0/bits; cd $0/bits; mkdir -m 2777 s; chgrp 100 s; chmod 2777 s
        for who in "" "{_AS_OTHER}" "setpriv --reuid 4242 --regid 4242 --groups 100"; do
            $who mkdir s/d; $who touch s/f; $who mkfifo s/p; $who ln -s x s/l
            $who install -m 2755 /bin/true s/i
            $who python3 -c 'import os; os.open("s/g", os.O_CREAT, 0o2775)'
            stat -c '%n %a %u %g' s/*; rm -r s/*
        done
        cd ..; rm -r bits
    """
    found, expected = (shared.person.run("bash", "-c", script, at).ok() for at in (rootfs, shared.base))
    assert found == expected


# Symbolic links into the mount


def test_the_daemon_follows_no_link(shared: Mount, rootfs: Path) -> None:
    """Into this very mount: it would wait for itself. Out of it: it would change what is not the user's."""
    outside = shared.base / "outside"
    script = """
        echo x > $1/victim; echo x > $2; chmod 644 $1/victim $2
        for target in $1/victim $1/d $2 /proc/self/cwd; do
            ln -sfn $target $1/link && touch -h -d @1 $1/link && chown -h $(id -u):$(id -g) $1/link || exit 1
            [ $(id -u) != 0 ] || setfattr -h -n trusted.k -v v $1/link || exit 1
            mv $1/link $1/link2 && ln $1/link2 $1/link3 && readlink $1/link3 && rm $1/link2 $1/link3 || exit 1
        done
        stat -c '%Y %a' $1/victim $2 | grep -c '^1 '; getfattr -m trusted $1/victim $1/d $2; rm $2
    """
    said = shared.sh(script, rootfs, outside, deadline_s=30)
    assert said.out.split() == [f"{rootfs}/victim", f"{rootfs}/d", str(outside), "/proc/self/cwd", "0"]


# Whiteouts, direct reads and writes, handles


def _rename_whiteout(root: Path) -> tuple[int | None, list[str]]:
    at = os.open(root / "d", os.O_RDONLY)
    return _errno(lambda: renameat2(at, b"a", at, b"z", RENAME_WHITEOUT)), sorted(os.listdir(at))


def test_rename_with_a_whiteout_is_refused(shared: Mount, rootfs: Path) -> None:
    assert shared.person.call(_rename_whiteout, rootfs) == (errno.EINVAL, ["a", "b", "c"])


def _mix_direct(root: Path, path: str) -> None:
    """Each way of writing is seen by each way of reading."""
    page = mmap.mmap(-1, 4096)
    plain = os.open(root / path, os.O_RDWR | os.O_CREAT, 0o644)
    direct = os.open(root / path, os.O_RDWR | os.O_DIRECT)
    os.ftruncate(plain, 8192)
    mapped = mmap.mmap(plain, 8192)
    for round in range(1, 60, 3):
        os.pwrite(plain, bytes([round]) * 4096, 4096)
        assert os.preadv(direct, [page], 4096) == 4096 and page[0] == mapped[4096] == round
        page[:] = bytes([round + 1]) * 4096
        assert os.pwritev(direct, [page], 4096) == 4096
        assert os.pread(plain, 1, 4096)[0] == mapped[4096] == round + 1
        mapped[4096:] = bytes([round + 2]) * 4096
        assert os.preadv(direct, [page], 4096) == 4096 and page[0] == os.pread(plain, 1, 4096)[0] == round + 2


@pytest.mark.parametrize("path", ["d/a", "new"])
def test_direct_and_buffered_are_one(shared: Mount, rootfs: Path, path: str) -> None:
    shared.person.call(_mix_direct, rootfs, path)


class _Handle(ctypes.Structure):
    """struct file_handle, open_by_handle_at(2)."""

    _fields_ = [("bytes", ctypes.c_uint), ("type", ctypes.c_int), ("handle", ctypes.c_ubyte * 128)]


_libc = ctypes.CDLL(None, use_errno=True)


def _handle_of(path: Path) -> bytes:
    handle, mount_id = _Handle(bytes=128), ctypes.c_int()
    path_ = os.fsencode(path)
    if _libc.name_to_handle_at(-100, path_, ctypes.byref(handle), ctypes.byref(mount_id), 0):
        raise OSError(ctypes.get_errno(), "name_to_handle_at")
    return bytes(handle)


def _open_by_handle(mountpoint: Path, handle: bytes) -> bytes | int:
    """The content of what a handle leads to, or an errno."""
    at = os.open(mountpoint, os.O_RDONLY)
    fd = _libc.open_by_handle_at(at, ctypes.byref(_Handle.from_buffer_copy(handle)), os.O_RDONLY)
    if fd < 0:
        return ctypes.get_errno()
    with open(fd, "rb") as file:
        return file.read()


def _handles_of_the_removed(root: Path, mountpoint: Path) -> list[bytes | int]:
    """Inode numbers are used again by the file system below."""
    found = []
    for _ in range(20):
        (root / "old").write_bytes(b"old")
        handle = _handle_of(root / "old")
        os.unlink(root / "old")
        (root / "other").write_bytes(b"other")
        found.append(_open_by_handle(mountpoint, handle))
        os.unlink(root / "other")
    return found


@by_union
@as_root
def test_a_handle_leads_to_its_file_or_nowhere(shared: Mount, rootfs: Path) -> None:
    call, mountpoint = shared.person.call, shared.mountpoint
    handle = call(_handle_of, rootfs / "d/c")
    assert call(_open_by_handle, mountpoint, handle) == b"ccc"
    assert set(call(_handles_of_the_removed, rootfs, mountpoint)) == {errno.ESTALE}


def _handle_after(root: Path, mountpoint: Path, path: str, *steps: tuple[str, ...]) -> bytes | int:
    """What a handle leads to after `steps`, when the kernel has forgotten all but the current directory."""
    os.chdir(root)
    handle = _handle_of(Path(path))
    for name, *arguments in steps:
        getattr(os, name)(*arguments)
    subprocess.run(["mount", "-i", "-o", "remount,rw", mountpoint], check=True, timeout=60)
    return _open_by_handle(mountpoint, handle)


@by_union
@as_root
@pytest.mark.parametrize(
    ("path", "steps", "expected"),
    [
        pytest.param("d/c", (), b"ccc", id="image"),
        pytest.param("d/c", (("chmod", "d/c", 0o600),), b"ccc", id="copied up"),
        pytest.param("d/c", (("rename", "d/c", "moved"),), b"ccc", id="moved"),
        pytest.param("d/c", (("rename", "d", "moved"),), b"ccc", id="directory moved"),
        pytest.param("d/c", (("link", "d/c", "l"), ("unlink", "d/c")), b"ccc", id="other name"),
        pytest.param("d/c", (("unlink", "d/c"),), errno.ESTALE, id="removed"),
        pytest.param("d/c", (("rename", "d/a", "d/c"),), errno.ESTALE, id="replaced"),
    ],
)
def test_a_handle_of_what_the_kernel_forgot(
    shared: Mount, rootfs: Path, path: str, steps: tuple[tuple[str, ...], ...], expected: bytes | int
) -> None:
    found = shared.person.call(_handle_after, rootfs, shared.mountpoint, path, *steps)
    assert found == expected


def _known(paths: list[Path]) -> None:
    for path in paths:
        path.read_bytes()


@by_union
@as_root
def test_a_handle_of_the_mount_before_leads_nowhere(fresh: Mount) -> None:
    call = fresh.person.call
    fresh.sh(
        "mkdir containers/a containers/b; echo a > containers/a/rootfs/f; echo b > containers/b/rootfs/f"
    ).ok()
    files = [fresh.containers / name / "rootfs" / path for name in "ab" for path in ("f", "etc/hostname")]
    handles = [call(_handle_of, path) for path in files]
    fresh.umount()
    fresh.mount()
    call(_known, files[::-1])  # the other way round
    assert {call(_open_by_handle, fresh.mountpoint, handle) for handle in handles} == {errno.ESTALE}
