"""The changes in a container's rootfs that may be cut off at each step, and what shows of them. Blocking.

What a power cut leaves is in order on file systems with a journal, but for content: names and attributes are
those of some moment, and content that was not synced may be gone. `Cut` does that: a process that ends, and
loses it. (What may come in any order is in `rig.powercut`.)
"""

import errno
import os
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from rig.crashes import left_over
from rig.layers import Member, device, directory, fifo, file, hard_link, symlink, tar_layer
from rig.ocisources import SourceMaker
from rig.snapshot import Snapshot, differences
from rig.stores import Exiting, Failing, Unsynced, on_disk, open_at
from rig.treecalls import FakeKernel

from fusestore import acl, disk
from fusestore.drivers import UnionDriver
from fusestore.errors import FusestoreError, errno_of
from fusestore.inodes import ROOT_INODE, Branch, Caller, Inodes, Node, run
from fusestore.scheme import Scheme
from fusestore.store import Store
from fusestore.syscalls import RENAME_EXCHANGE

__all__ = [
    "CHANGES",
    "FAULTS",
    "copy",
    "make_store",
    "states_of",
    "writes",
]

Step = Callable[[FakeKernel], object]
Steps = tuple[Step, ...]
"""System calls, one after the other."""

_CONTAINER = "c"
_OTHER = Caller(uid=12, gid=34, pid=1, umask=0)
_LATER_NS = 10**18
_LONG = bytes(range(256)) * 1024
_IMAGE: list[Member] = [
    directory(b"d", 0o750, uid=7, xattrs=((b"user.k", b"d"),)),
    file(b"d/a", b"content a", 0o755, uid=5, gid=6, xattrs=((b"user.k", b"a"),)),
    file(b"d/long", _LONG),
    file(b"d/gone", b"is removed"),
    directory(b"d/e"),
    file(b"d/e/x", b"content x"),
    file(b"b", b"content b"),
    hard_link(b"d/l", b"b"),
    directory(b"empty"),
    directory(b"moves"),
    file(b"moves/in", b"it"),
    symlink(b"s", b"d/a", uid=9),
    device(b"null", os.makedev(1, 3), mode=0o666),
    fifo(b"fifo"),
]


def make_store(place: Path, scheme: Scheme) -> None:
    """A store with a container in which something was changed."""
    maker = SourceMaker()
    source = maker.add(maker.image([tar_layer(_IMAGE)]), "one").directory(place / "source")
    with open_at(place) as store:
        store.import_image(source)
        store.create_container("one", container_id=_CONTAINER)
        assert store.scheme(scheme.word) == scheme.word
        with opened(store) as kernel:
            kernel.unlink(b"d/gone")
            kernel.rename(b"moves", b"moved", 0)
            kernel.create(b"own", 0o600, b"my own")
            kernel.mkdir(b"new", 0o755)
            kernel.create(b"new/in", 0o644, b"")
            kernel.chmod(b"own", 0o4755)


@contextmanager
def opened(store: Store) -> Iterator[FakeKernel]:
    """The container's rootfs, entered, and a kernel that knows nothing of it."""
    inodes = Inodes()
    with closing(UnionDriver(store, inodes)) as driver:
        tree = driver.container_rootfs(_CONTAINER, Node(Branch(), ROOT_INODE), b"")
        tree.set_quota(1 << 60)
        run(tree.prepare())
        kernel = FakeKernel(tree, inodes)
        yield kernel
        kernel.detach()
        tree.rest()


def tree_of(store: Store) -> Snapshot:
    with opened(store) as kernel:
        return kernel.snapshot()


def copy(old: Path, place: Path) -> Path:
    """With owners, devices and xattrs. `place` is not there yet."""
    subprocess.run(["cp", "-a", "-T", old, place], check=True)
    return place


# The calls


@dataclass(frozen=True, slots=True)
class _Fsync:
    path: bytes

    def __call__(self, kernel: FakeKernel) -> None:
        kernel.hold(0, self.path, False)
        try:
            run(kernel._handles[0].fsync(False))
        finally:
            kernel.release(0)


def _create_as_other(path: bytes, mode: int) -> Step:
    def call(kernel: FakeKernel) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        parent, name = kernel._parent(path)
        _, handle = run(kernel.rootfs.create(parent.node, name, stat.S_IFREG | mode, flags, _OTHER))
        handle.close()

    return call


def _set_acl(path: bytes) -> Step:
    nobody = 0xFFFFFFFF
    entries = [(0x01, 6, nobody), (0x02, 4, 99), (0x04, 4, nobody), (0x10, 4, nobody), (0x20, 0, nobody)]
    value = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    return lambda kernel: run(kernel.rootfs.set_xattr(kernel.node(path), acl.ACCESS, value, _OTHER))


def _call(name: str, *arguments: object) -> Step:
    return lambda kernel: getattr(kernel, name)(*arguments)


CHANGES: dict[str, Steps] = {
    "copy up a file: chmod": (_call("chmod", b"d/a", 0o700),),
    "copy up a file: write": (_call("write", b"d/a", 9, b" and more"), _Fsync(b"d/a")),
    "copy up a long file: write": (_call("write", b"d/long", 300, b"other"), _Fsync(b"d/long")),
    "copy up a file: truncate": (_call("truncate", b"d/a", 3), _Fsync(b"d/a")),
    "copy up a file: empty it": (_call("overwrite", b"d/a", b""),),
    "copy up a file of two names": (_call("write", b"b", 0, b"CONTENT"), _Fsync(b"b")),
    "copy up a directory": (_call("set_xattr", b"d/e", b"user.n", b"v"),),
    "copy up a symlink": (_call("utimens", b"s", _LATER_NS), _call("rename", b"s", b"d/s", 0)),
    "copy up a device": (_call("chmod", b"null", 0o600),),
    "copy up a FIFO": (_call("chmod", b"fifo", 0o600),),
    "create": (_call("create", b"d/e/made", 0o640, b""),),
    "create over a whiteout": (_call("create", b"d/gone", 0o640, b""),),
    "create, owned by another": (_create_as_other(b"made", 0o640),),
    "create over a whiteout, owned by another": (_create_as_other(b"d/gone", 0o4755),),
    "create with set-group-ID": (_call("create", b"made", 0o2044, b""),),
    "create, write, fsync": (
        _call("create", b"made", 0o644, b""),
        _call("write", b"made", 0, _LONG),
        _Fsync(b"made"),
    ),
    "write, fsync": (_call("write", b"own", 0, b"MY"), _Fsync(b"own")),
    "overwrite, fsync": (
        _call("overwrite", b"own", b""),
        _call("write", b"own", 0, b"another"),
        _Fsync(b"own"),
    ),
    "replace as programs do": (
        _call("create", b"own.new", 0o644, b""),
        _call("write", b"own.new", 0, b"new text"),
        _Fsync(b"own.new"),
        _call("rename", b"own.new", b"own", 0),
    ),
    "mkdir": (_call("mkdir", b"d/made", 0o711),),
    "mkdir over a whiteout": (_call("mkdir", b"d/gone", 0o711),),
    "mknod": (_call("mknod", b"d/made", stat.S_IFCHR, 0o640, os.makedev(1, 5)),),
    "symlink": (_call("symlink", b"d/made", b"target"),),
    "link": (_call("link", b"own", b"d/made"),),
    "link a lower file": (_call("link", b"d/a", b"made"),),
    "unlink": (_call("unlink", b"own"),),
    "unlink a lower file": (_call("unlink", b"d/a"),),
    "rmdir": (_call("unlink", b"new/in"), _call("rmdir", b"new")),
    "rmdir a lower directory": (_call("rmdir", b"empty"),),
    "rmdir one with whiteouts": (_call("unlink", b"d/e/x"), _call("rmdir", b"d/e")),
    "rename": (_call("rename", b"own", b"mine", 0),),
    "rename over a lower file": (_call("rename", b"own", b"d/a", 0),),
    "rename a lower directory": (_call("rename", b"d", b"D", 0),),
    "rename a directory over a whiteout": (_call("rename", b"new", b"d/gone", 0),),
    "rename a directory over an empty one": (_call("rename", b"new", b"empty", 0),),
    "rename a directory back": (_call("rename", b"moved", b"moves", 0),),
    "exchange": (_call("rename", b"own", b"d", RENAME_EXCHANGE),),
    "chmod": (_call("chmod", b"own", 0o1640),),
    "chmod to what any file can have": (_call("chmod", b"own", 0o640),),
    "chown": (_call("chown", b"own", 12, 34),),
    "set times": (_call("utimens", b"own", _LATER_NS),),
    "set an xattr": (_call("set_xattr", b"own", b"user.n", b"v"),),
    "remove an xattr": (_call("remove_xattr", b"d", b"user.k"),),
    "set an ACL": (_set_acl(b"own"),),
}


def writes(name: str) -> bool:
    """Whether the change is one of content."""
    return any(isinstance(step, _Fsync) for step in CHANGES[name])


def states_of(name: str, place: Path) -> list[Snapshot]:
    """What shows before the first call of a change, and after each of them, which are made."""
    steps = CHANGES[name]
    with open_at(place) as store:
        found = [tree_of(store)]
        for step in steps:
            with opened(store) as kernel:
                step(kernel)
            found.append(tree_of(store))
    assert found[0] != found[-1]
    return found


def _acknowledged(steps: Steps, done: int) -> int:
    """How many of them a power cut may not undo, when so many had returned."""
    return max((count for count in range(1, done + 1) if isinstance(steps[count - 1], _Fsync)), default=0)


def _unlike(found: Snapshot, allowed: Sequence[Snapshot], states: Sequence[Snapshot]) -> list[list[str]]:
    """How what is there differs from each that may be there; empty where it is one of them."""
    access = os.fsdecode(acl.ACCESS)
    for old, new in pairwise(allowed):
        # A plain user's store sets an ACL and then the mode (fusestore.upper).
        between = {
            path: replace(entry, mode=old[path].mode)
            for path, entry in new.items()
            if path in old and dict(entry.xattrs).get(access) != dict(old[path].xattrs).get(access)
        }
        if between:
            allowed = [*allowed, {**new, **between}]
    wrong = [differences(_masked(state, states), _masked(found, states)) for state in allowed]
    return [] if [] in wrong else wrong


def _masked(snapshot: Snapshot, states: Sequence[Snapshot]) -> Snapshot:
    """Without the times that `states` do not agree on, and how many links files have that have several."""
    result = {}
    for path, entry in snapshot.items():
        known = [state[path] for state in states if path in state]
        times = {one.mtime_ns for one in known}
        if entry.type == "directory" or len(known) != len(states) or len(times) != 1:
            entry = replace(entry, mtime_ns=0)
        if any(one.group for one in known):
            entry = replace(entry, group=None, nlink=None)
        result[path] = entry
    return result


# The faults


class Cut(Exiting):
    """Ends the process, and content that was not synced is as it was when it was synced last."""

    def __init__(self, point: int) -> None:
        super().__init__(point)
        self._unsynced: dict[int, tuple[int, bytes]] = {}
        """By inode number: a descriptor, and what is on disk."""

    def end(self) -> None:
        for fd, content in self._unsynced.values():
            os.truncate(fd, 0)
            os.pwrite(fd, content, 0)
        super().end()

    def _changes(self, what: disk.Target) -> None:
        path = b"/proc/self/fd/%d" % what if isinstance(what, int) else what
        number = os.stat(path).st_ino
        if number not in self._unsynced:
            fd = os.open(path, os.O_RDWR)
            self._unsynced[number] = fd, os.pread(fd, os.fstat(fd).st_size, 0)

    def write(self, fd: int, data: bytes | memoryview) -> int:
        self._changes(fd)
        return super().write(fd, data)

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        self._changes(fd)
        return super().pwrite(fd, data, offset)

    def fsync(self, fd: int) -> None:
        super().fsync(fd)
        self._unsynced.pop(os.fstat(fd).st_ino, None)

    fdatasync = fsync


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a fault came to."""

    is_done: bool
    """The fault would have come later."""
    wrong: Sequence[Sequence[str]]
    """How what is there differs from each that may be there."""
    left: Sequence[str]
    """What does not belong there."""


def after_exit(name: str, place: Path, states: Sequence[Snapshot], fault: Exiting) -> Outcome:
    """Of a process that ends. What a call that had returned did is there; after `Cut`, what fsync(2) did."""
    steps = CHANGES[name]
    done = _exit_at(place, steps, fault)
    least = _acknowledged(steps, done) if isinstance(fault, Cut) else done
    with open_at(place) as store:
        wrong = _unlike(tree_of(store), states[least : done + 2], states)
        return Outcome(done == len(steps), wrong, left_over(store))


def after_error(name: str, place: Path, states: Sequence[Snapshot], fault: Failing) -> Outcome:
    """Of a process that goes on. The call that fails says why, has done nothing, and can be made again."""
    steps = CHANGES[name]
    wrong = []
    done = 0
    has_failed = False
    with open_at(place) as store, opened(store) as kernel:
        while done < len(steps):
            try:
                with on_disk(Unsynced() if has_failed else fault):
                    steps[done](kernel)
                done += 1
            except (OSError, FusestoreError) as error:
                if has_failed or errno_of(error) != fault.number:
                    wrong.append([f"call {done}: {error!r} instead of {errno.errorcode[fault.number]}"])
                    break
                has_failed = True
                kernel.forget()
                found = kernel.snapshot()
                wrong += _unlike(found, states[done : done + 2], states)
                done += bool(_unlike(found, states[done : done + 1], states))

                kernel.forget()
    with open_at(place) as store:
        wrong += _unlike(tree_of(store), states[-1:], states)
        return Outcome(not has_failed and fault.left >= 0, wrong, left_over(store))


def _exit_at(place: Path, steps: Steps, fault: Exiting) -> int:
    """Makes the calls in a process that ends by `fault`: how many of them had returned."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException), open_at(place) as store:
            disk.current = fault
            with opened(store) as kernel:
                for step in steps:
                    step(kernel)
                    os.write(write_end, b".")
                os._exit(0)
        os._exit(1)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        done = len(pipe.read())
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, Exiting.CODE), f"the process ended with {code} after {done} calls"
    assert code or done == len(steps)
    return done


FAULTS: dict[str, tuple[Callable[[int], Exiting | Failing], Callable[..., Outcome]]] = {
    "exit": (Exiting, after_exit),
    "power cut": (Cut, after_exit),
    "error of the disk": (Failing, after_error),
}
