"""POSIX calls as rows of a table, made in a container and in a plain directory. Blocking.

A `Case` says what there is (`given`), what is called and by whom, and what must come of it. `Judge` makes the
calls of all its cases in these places, each case in a directory of its own:

* ``lower``: what is given lies in a layer of the image;
* ``upper``: what is given was made in the container;
* ``shrunk``: as ``lower``, while the kernel is made to forget what it knows, again and again (root's only);
* ``plain``: a directory of the machine's file system: the oracle;
* what a case must give, in its own words.

The calls are made through the C library, by one process for each place that changes its effective ids, and so
what the kernel checks, from call to call. Paths are relative to the case's directory. What is given is of
`MTIME_NS`, so a time that a call changes shows; ctime shows by being later than the preparation.
"""

import ctypes
import errno
import os
import resource
import stat
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from rig.layers import MTIME_NS, Member, directory, tar_layer, unpack_layer
from rig.mounts import Mount
from rig.ocisources import SourceMaker
from rig.people import Person, as_root, as_user
from rig.snapshot import TYPES

__all__ = [
    "BAD_ADDRESS",
    "KEPT",
    "NOW",
    "Call",
    "Case",
    "Identity",
    "Outcome",
    "State",
    "call",
    "judging",
    "make_calls",
]

KEPT, NOW = "kept", "now"
"""A time that is as it was given; one that is of the call or later."""
BAD_ADDRESS = 1
"""A path that is no pointer."""
PLACES = ("lower", "upper", "shrunk")

_CLOCK_REALTIME_COARSE = 5  # time.h; file systems take their times from it

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who calls."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Call:
    """A function of the C library. `by` None: whoever runs the cases."""

    name: str
    arguments: tuple[Any, ...]
    by: Identity | None = None


def call(name: str, *arguments: Any, by: Identity | None = None) -> Call:
    """Paths as bytes, times of utimensat as (atime, mtime) in pairs of s and ns.

    What works on a descriptor (fstat, ftruncate …) takes the one that the last `open` gave: it is left out.
    """
    return Call(name, arguments, by)


@dataclass(frozen=True, slots=True)
class State:
    """What stands at a path."""

    type: str
    mode: int
    uid: int
    gid: int
    nlink: int
    size: int | None
    rdev: int
    target: bytes | None
    content: bytes | None
    times: tuple[Any, Any, Any]
    """atime, mtime, ctime: KEPT, NOW or ns since the epoch. Of links and directories no atime: reading and
    walking change it, in each file system otherwise."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a case."""

    results: tuple[Any, ...]
    """Of each call: None or a value; the name of the errno where it failed."""
    after: Mapping[bytes, State]
    """By path below the case's directory, which is b"."."""


@dataclass(frozen=True, slots=True)
class Case:
    """A row. The result of the last call is judged, and all of it beside the oracle's."""

    name: str
    given: tuple[Member, ...]
    calls: tuple[Call, ...]
    gives: Any = None
    times: Mapping[bytes, str] | None = None
    """Which times are changed after, of what was there before: letters of "amc" by path; all else is KEPT.
    None: not said. Where the last call fails, and nothing is said: nothing."""
    after: Mapping[bytes, Mapping[str, Any] | None] = field(default_factory=dict)
    """Fields of `State` by path, after; None for a path that must not be there."""
    differs: str = ""
    """Why the oracle is not asked."""

    @property
    def is_anybodys(self) -> bool:
        """Whether everybody who owns what is given may make the calls, with the same result."""
        return all(one.by is None for one in self.calls) and all(
            member.uid == member.gid == 0 and member.type not in (b"3", b"4") for member in self.given
        )


# Making the calls


def make_calls(calls: Iterable[Call]) -> tuple[Any, ...]:
    """The result of each, in the current directory; up to the first that fails and is not the last."""
    calls = tuple(calls)
    with ExitStack() as stack:
        maker = _Maker(stack)
        results: list[Any] = []
        for one in calls:
            try:
                with _being(one.by):
                    results.append(maker.make(one))
            except OSError as error:
                results.append(errno.errorcode[error.errno or 0])
        return tuple(results)


@contextmanager
def _being(who: Identity | None) -> Iterator[None]:
    if who is None:
        yield
        return
    os.setgroups(who.groups)
    os.setegid(who.gid)
    os.seteuid(who.uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups([])


class _Maker:
    """Makes the calls of one case; what it leaves open or running ends with `stack`."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._fd = -1

    def make(self, one: Call) -> Any:
        own = getattr(self, f"_{one.name}", None)
        if own is None:
            _c(one.name, *one.arguments)
            return None
        return own(*one.arguments)

    def _open(self, path: bytes, flags: int, mode: int = 0) -> None:
        self._fd = _c("open", path, flags | os.O_CLOEXEC, mode)
        self._stack.callback(os.close, self._fd)

    def _umask(self, mask: int) -> None:
        self._stack.callback(os.umask, os.umask(mask))

    def _ftruncate(self, size: int) -> None:
        _c("ftruncate", self._fd, size)

    def _close(self) -> None:
        os.close(os.dup(self._fd))

    def _fsync(self) -> None:
        os.fsync(self._fd)

    def _fchmod(self, mode: int) -> None:
        _c("fchmod", self._fd, mode)

    def _fchown(self, uid: int, gid: int) -> None:
        _c("fchown", self._fd, uid, gid)

    def _futimens(self, times: tuple[tuple[int, int], ...] | None) -> None:
        _c("futimens", self._fd, _timespecs(times))

    def _posix_fallocate(self, offset: int, length: int) -> None:
        number = _libc.posix_fallocate(self._fd, ctypes.c_long(offset), ctypes.c_long(length))
        if number:
            raise OSError(number, "posix_fallocate")

    def _lseek(self, offset: int, whence: int) -> int:
        return os.lseek(self._fd, offset, whence)

    def _fstat(self) -> tuple[int, int, int]:
        """mode, nlink, size (of a directory 0)."""
        status = os.fstat(self._fd)
        return status.st_mode, status.st_nlink, 0 if stat.S_ISDIR(status.st_mode) else status.st_size

    def _read(self, size: int) -> bytes:
        return os.read(self._fd, size)

    def _write(self, data: bytes) -> int:
        return os.write(self._fd, data)

    def _link_open(self, path: bytes) -> None:
        """A name for what is open (open(2), at O_TMPFILE)."""
        _c("linkat", -100, b"/proc/self/fd/%d" % self._fd, -100, path, 0x400)

    def _list(self, path: bytes) -> list[bytes]:
        return sorted(os.listdir(path))

    def _utimensat(
        self, path: bytes | int, times: tuple[tuple[int, int], ...] | None, flags: int = 0
    ) -> None:
        _c("utimensat", -100, path, _timespecs(times), flags)

    def _renameat2(self, old: bytes, new: bytes, flags: int) -> None:
        _c("renameat2", -100, old, -100, new, flags)

    def _run(self, program: bytes) -> None:
        """Until the end of the case: it is sleep(1)."""
        process = subprocess.Popen([b"./" + program, b"1000"])
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)

    def _limit_size(self, size: int) -> None:
        self._limit(resource.RLIMIT_FSIZE, size)

    def _limit_files(self) -> None:
        """To what is open."""
        free = os.dup(0)
        os.close(free)
        self._limit(resource.RLIMIT_NOFILE, free)

    def _limit(self, kind: int, limit: int) -> None:
        before = resource.getrlimit(kind)
        self._stack.callback(resource.setrlimit, kind, before)
        resource.setrlimit(kind, (limit, before[1]))

    def _bind(self, path: bytes) -> None:
        """A socket's name."""
        _c("mknod", path, stat.S_IFSOCK | 0o644, 0)


def _c(name: str, *arguments: Any) -> int:
    result: int = getattr(_libc, name)(*map(_c_argument, arguments))
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, name)
    return result


def _c_argument(value: Any) -> Any:
    return ctypes.c_long(value) if isinstance(value, int) else value


def _timespecs(times: tuple[tuple[int, int], ...] | None) -> Any:
    return None if times is None else (ctypes.c_long * 4)(*times[0], *times[1])


# Looking at what came of it


def _observe(start_ns: int) -> dict[bytes, State]:
    """Everything in the current directory. Attributes first: reading changes them."""
    found = {b".": os.lstat(b".")}
    waiting = [b""]
    while waiting:
        head = waiting.pop()
        for name in os.listdir(head or b"."):
            path = os.path.join(head, name)
            found[path] = os.lstat(path)
            if stat.S_ISDIR(found[path].st_mode) and _allows(found[path], 0o500):
                waiting.append(path)
    return {path: _state(path, status, start_ns) for path, status in found.items()}


def _state(path: bytes, status: os.stat_result, start_ns: int) -> State:
    kind = stat.S_IFMT(status.st_mode)
    accessed = None if kind in (stat.S_IFDIR, stat.S_IFLNK) else _time(status.st_atime_ns, start_ns)
    return State(
        type=TYPES[kind],
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        nlink=status.st_nlink,
        size=None if kind == stat.S_IFDIR else status.st_size,
        rdev=status.st_rdev,
        target=os.readlink(path) if kind == stat.S_IFLNK else None,
        content=_content(path) if kind == stat.S_IFREG and _is_readable(status) else None,
        times=(
            accessed,
            _time(status.st_mtime_ns, start_ns),
            NOW if status.st_ctime_ns >= start_ns else KEPT,
        ),
    )


def _time(time_ns: int, start_ns: int) -> Any:
    if time_ns == MTIME_NS:
        return KEPT
    # What is set on purpose lies in the past or far in the future.
    return NOW if start_ns <= time_ns < start_ns + 3600 * 10**9 else time_ns


def _allows(status: os.stat_result, mode: int) -> bool:
    """Whether a file system that checks modes, as the oracle does, lets the owner or root look at it."""
    return os.geteuid() == 0 or status.st_mode & mode == mode


def _is_readable(status: os.stat_result) -> bool:
    return _allows(status, 0o400) and status.st_size < 1 << 20


def _content(path: bytes) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _run(root: Path, members: Sequence[Member], calls: Sequence[Sequence[Call]]) -> list[Outcome]:
    """Prepare `members` in `root`, then make the calls of each case in its directory there."""
    os.umask(0)
    os.chdir(root)
    unpack_layer(members, Path())
    # A tick of the kernel's clock: what the calls change has later times.
    prepared_ns = time.time_ns()
    while time.clock_gettime_ns(_CLOCK_REALTIME_COARSE) <= prepared_ns:
        pass
    outcomes = []
    for number, some in enumerate(calls):
        os.chdir(root / str(number))
        start_ns = time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)
        results = make_calls(some)
        os.chdir(root / str(number))
        outcomes.append(Outcome(results, _observe(start_ns)))
    return outcomes


# Judging


class Judge:
    """The outcomes of a table's cases, each place's made once, when the first of them is asked for."""

    def __init__(self, mount: Mount, cases: Sequence[Case]) -> None:
        """`mount` is new; it becomes a mount of an image that has all that the cases are given."""
        self._mount = mount
        self._cases = cases
        self._numbers = {id(case): number for number, case in enumerate(cases)}
        self._outcomes: dict[str, list[Outcome] | Exception] = {}
        source = SourceMaker()
        source.add(source.image([tar_layer(self._members())]), "given")
        mount.fusestore("import", f"{source.directory(mount.base / 'source')}:given").ok()
        mount.mount()
        mount.sh(
            "mkdir containers/lower containers/shrunk containers/upper containers/upper/rootfs/made"
        ).ok()
        mount.person.run("mkdir", mount.base / "plain").ok()

    def _members(self) -> list[Member]:
        """What is given, in directories of the cases' numbers. A plain user's is all their own."""
        person = self._mount.person
        mine = {} if person.is_root else {"uid": person.uid, "gid": person.gid}
        members = []
        for number, case in enumerate(self._cases):
            place = b"%d/" % number
            members.append(directory(place[:-1], **mine))
            for member in case.given:
                link = place + member.link if member.type == b"1" else member.link
                members.append(replace(member, path=place + member.path, link=link, **mine))
        return members

    def _outcome(self, place: str, case: Case) -> Outcome:
        if place not in self._outcomes:
            try:
                self._outcomes[place] = self._all(place)
            except Exception as error:
                self._outcomes[place] = error
        outcomes = self._outcomes[place]
        if isinstance(outcomes, Exception):
            raise outcomes
        return outcomes[self._numbers[id(case)]]

    def _all(self, place: str) -> list[Outcome]:
        root, members = {
            "lower": (self._mount.containers / "lower/rootfs", []),
            "shrunk": (self._mount.containers / "shrunk/rootfs", []),
            "upper": (self._mount.containers / "upper/rootfs/made", self._members()),
            "plain": (self._mount.base / "plain", self._members()),
        }[place]
        calls = [case.calls for case in self._cases]
        with _shrinking(self._mount.mountpoint) if place == "shrunk" else nullcontext():
            return self._mount.person.call(_run, root, members, calls, deadline_s=120)

    def judge(self, place: str, case: Case) -> None:
        """AssertionError for what is not as the case, or the oracle, has it."""
        found, oracle = self._outcome(place, case), self._outcome("plain", case)
        if place != "upper":
            found = _without_copying(found, oracle)
        if self._mount.person.has_kernel_mounts:
            found = _without_counting(found, oracle)
        wrong = _wrong(case, found)
        if not case.differs:
            wrong += _differences(oracle, found)
        assert not wrong, "\n".join(wrong)


@contextmanager
def _shrinking(mountpoint: Path) -> Iterator[None]:
    """All the time the kernel drops those names of the mount that are not in use (reconfigure_super)."""
    loop = "while mount -i -o remount,rw $0; do :; done"
    with subprocess.Popen(["sh", "-c", loop, mountpoint]) as process:
        try:
            yield
        finally:
            assert process.poll() is None, "the mount could not be remounted"
            process.kill()


def _without_copying(found: Outcome, oracle: Outcome) -> Outcome:
    """What is copied up without being changed has a new ctime, in overlayfs too: that is left out.

    Directories are, for what is in them; a file is, when it is opened for writing.
    """
    after = {}
    for path, state in found.after.items():
        known = oracle.after.get(path)
        if known is not None and known.times[2] == KEPT:
            state = replace(state, times=(*state.times[:2], KEPT))
        after[path] = state
    return Outcome(found.results, after)


def _without_counting(found: Outcome, oracle: Outcome) -> Outcome:
    """overlayfs counts no subdirectories: where it says so a directory's link count is the oracle's."""
    after = {}
    for path, state in found.after.items():
        known = oracle.after.get(path)
        if known is not None and (state.type, state.nlink) == ("directory", 1):
            state = replace(state, nlink=known.nlink)
        after[path] = state
    return Outcome(found.results, after)


def _changed(case: Case, found: Outcome) -> dict[bytes, str]:
    """Which times changed, of what was given and is still there."""
    changed = {}
    for path in (b".", *(member.path for member in case.given)):
        if path in found.after:
            times = zip("amc", found.after[path].times, strict=True)
            letters = "".join(letter for letter, value in times if value not in (KEPT, None))
            if letters:
                changed[path] = letters
    return changed


def _wrong(case: Case, found: Outcome) -> list[str]:
    """What is not as the case says."""
    wrong = []
    if found.results[-1] != case.gives:
        wrong.append(f"{case.calls} give {found.results}, not {case.gives!r} at last")
    failed = isinstance(case.gives, str)
    changed = _changed(case, found)
    if (case.times is not None or (failed and len(case.calls) == 1)) and changed != (case.times or {}):
        wrong.append(f"times changed: {changed}, not {case.times or {}}")
    for path, wanted in case.after.items():
        state = found.after.get(path)
        seen = None if state is None else {name: getattr(state, name) for name in wanted or ("type",)}
        if seen != wanted:
            wrong.append(f"{path!r} is {seen}, not {wanted}")
    return wrong


def _differences(expected: Outcome, found: Outcome) -> list[str]:
    """What is not as in the oracle."""
    wrong = []
    if found.results != expected.results:
        wrong.append(f"the oracle gives {expected.results}, not {found.results}")
    for path in sorted(expected.after.keys() | found.after.keys()):
        there, here = expected.after.get(path), found.after.get(path)
        if there != here:
            wrong.append(f"{path[-40:]!r} is {here}, in the oracle {there}")
    return wrong


def judging(name: str, families: Mapping[str, Sequence[Case]]) -> tuple[Any, Any, Any]:
    """What a module of tables needs besides: the fixture `judge`, `test_root` and `test_a_plain_user`.

    `name` is the module's own. The rows of a plain user's test are those that are theirs to make.
    """

    @pytest.fixture(scope="module")
    def judge(person: Person, area: Path) -> Iterator[Judge]:
        cases = [case for some in families.values() for case in some]
        mount = Mount(
            person, area / f"posix-{name}-{person.name}", *(["--allow-other"] if person.is_root else [])
        )
        try:
            yield Judge(mount, cases if person.is_root else [case for case in cases if case.is_anybodys])
        finally:
            mount.close()

    @as_root
    @_table(families)
    def test_root(judge: Judge, place: str, case: Case) -> None:
        judge.judge(place, case)

    @as_user
    @_table(families, anybodys=True)
    def test_a_plain_user(judge: Judge, place: str, case: Case) -> None:
        judge.judge(place, case)

    return judge, test_root, test_a_plain_user


def _table(families: Mapping[str, Sequence[Case]], anybodys: bool = False) -> Callable[[Any], Any]:
    """Parametrizes a test with `case` and `place`: one for each row and each place it is for.

    `anybodys`: only the rows for a plain user.
    """
    rows = [
        pytest.param(case, place, id=f"{family}: {case.name}-{place}")
        for family, cases in families.items()
        for case in cases
        for place in PLACES
        if not anybodys or (case.is_anybodys and place != "shrunk")
    ]
    return pytest.mark.parametrize(("case", "place"), rows)
