"""Stores of a person, mounted by the installed command, watched and always taken away. Blocking.

After a test, `Mount.check_log` fails it for every warning or error in the daemon's log that it did not
declare with `Mount.expect`; after the last, `Mount.close` fails for a mount or process that is still there.
"""

import errno
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from rig.people import Person, Result

__all__ = ["Mount", "Place", "abort_all", "drop_names", "make_area", "sweep", "wait_until"]

_AREA = "fusestore-test-"
_CONNECTIONS = Path("/sys/fs/fuse/connections")
_SERIOUS = re.compile(r"^\S+ \S+ (WARNING|ERROR|CRITICAL) |^Traceback |^\S*(Error|Exception|Warning)\b")
_live: set["Mount"] = set()


def abort_all() -> None:
    """Ends every request to the mounts under test, answered or not."""
    for mount in _live:
        mount.abort()


Person.rescue = staticmethod(abort_all)


class Place:
    """Where a person has a store: directories made for one test or one session, and the command for them."""

    def __init__(self, person: Person, base: Path) -> None:
        self.person = person
        self.base = base
        self.store = base / "store"
        self.run_dir = base / "run"
        self.mountpoint = base / "mnt"
        base.mkdir()
        self.mountpoint.mkdir()
        if os.geteuid() != person.uid:
            for directory in (base, self.mountpoint):
                os.chown(directory, person.uid, person.gid)

    def fusestore(self, *arguments: str | Path, cwd: str | Path = "/", deadline_s: float = 120) -> Result:
        return self.person.run("fusestore", *arguments, cwd=cwd, env=self.environment, deadline_s=deadline_s)

    @property
    def environment(self) -> dict[str, str]:
        return {"FUSESTORE_STORE": str(self.store), "FUSESTORE_RUN_DIR": str(self.run_dir)}

    def files(self) -> list[str]:
        """What there is in store and run directory, but for what mounts keep, which is named by chance."""
        found = []
        for root in (self.store, self.run_dir):
            for directory, directories, files in os.walk(root):
                found += [
                    os.path.relpath(os.path.join(directory, name), root) for name in (*directories, *files)
                ]
        return sorted(
            name for name in found if name.split("/")[-2:][0] != "mounts" and "/tmp/" not in f"/{name}/"
        )

    def log(self) -> str:
        """What all daemons of this place said so far."""
        # Read by the test process: these files are on a file system of the machine.
        return "".join(
            file.read_text(errors="surrogateescape") for file in sorted(self.run_dir.glob("*/mount-*.log"))
        )


class Mount(Place):
    """A place whose store is mounted."""

    def __init__(self, person: Person, base: Path, *options: str) -> None:
        super().__init__(person, base)
        self.options = options
        self.images = self.mountpoint / "images"
        self.containers = self.mountpoint / "containers"
        self._expected: list[re.Pattern[str]] = []
        self._checked: Counter[str] = Counter()
        """Lines that were looked at, of logs that each grow."""
        self._number = 0
        self._is_aborted = False

    def __hash__(self) -> int:
        return id(self)

    def mount(self) -> "Mount":
        self.fusestore("mount", "--driver", self.person.driver, *self.options, self.mountpoint).ok()
        _live.add(self)
        return self

    def revive(self) -> None:
        """Mounts again what was aborted: a test that hung costs those after it nothing."""
        if self._is_aborted:
            wait_until(lambda: self.pids() == [])
            self._is_aborted = False
            self.mount()

    def umount(self) -> None:
        self.fusestore("umount", self.mountpoint).ok()
        _live.discard(self)

    def sh(self, script: str, *arguments: str | Path, deadline_s: float = 60) -> Result:
        """Runs lines of bash in the mount's root; `arguments` are $1, $2, …"""
        # bash enters the mount itself: the test process must not.
        enter = f"cd {shlex.quote(str(self.mountpoint))} || exit 99\n"
        return self.person.run(
            "bash", "-c", enter + script, "bash", *arguments, env=self.environment, deadline_s=deadline_s
        )

    def refusal_of(self, part: str) -> int:
        """How removing or renaming a part of a container fails: the kernel says it where it mounted one."""
        return errno.EBUSY if part == "rootfs" and self.person.has_kernel_mounts else errno.EPERM

    def new_id(self) -> str:
        """An id for a container that no other test has."""
        self._number += 1
        return f"c{self._number}"

    def pids(self) -> list[int]:
        """The processes that have this mount point on their command line: its daemon."""
        word = os.fsencode(self.mountpoint)
        return [pid for pid, words in _command_lines() if b"mount" in words and word in words]

    def descriptors(self) -> list[str]:
        """What its daemon has open."""
        (pid,) = self.pids()
        return [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()]

    def is_mounted(self) -> bool:
        return self._device() is not None

    def _device(self) -> str | None:
        mounts = _mounts(str(self.person.holder or "self"))
        return next((device for device, path in mounts if path == str(self.mountpoint)), None)

    def expect(self, pattern: str) -> None:
        """Declares that the daemon's log may have serious lines that match."""
        self._expected.append(re.compile(pattern))

    def check_log(self) -> None:
        """Fails for each undeclared serious line since the last check; forgets what was declared."""
        log = self.log().splitlines()
        known, self._checked = self._checked, Counter(log)
        lines = (self._checked - known).elements()
        expected, self._expected = self._expected, []
        wrong = [
            line
            for line in lines
            if _SERIOUS.search(line) and not any(pattern.search(line) for pattern in expected)
        ]
        assert not wrong, "undeclared in the daemon's log:\n" + "\n".join(wrong[:20])

    def abort(self) -> None:
        """Ends the connection in the kernel: every request to it fails from now on."""
        device = self._device()
        if device is not None:
            _abort(device)
            self._is_aborted = True

    def close(self) -> None:
        """Takes everything away; fails if the umount command did not do it, or did it late."""
        wrong = []
        if self.is_mounted():
            result = self.fusestore("umount", self.mountpoint, deadline_s=60)
            if result.code or result.err:
                wrong.append(f"umount: exit {result.code}: {result.err}")
        if self.is_mounted():
            wrong.append("still mounted after umount")
            self.abort()
            subprocess.run(["umount", "-l", self.mountpoint], check=False, timeout=30)
        for pid in self.pids():
            wrong.append(f"process {pid} is still there after umount")
            os.kill(pid, signal.SIGKILL)
        _live.discard(self)
        assert not wrong, "; ".join(wrong)
        self.check_log()


def make_area(parent: str) -> Path:
    """A directory for the mounts of this process, in `parent`; `sweep` knows by its name whose it was."""
    path = Path(tempfile.mkdtemp(prefix=f"{_AREA}{os.getpid()}-", dir=parent))
    path.chmod(0o755)
    return path


def sweep(parent: str) -> None:
    """Takes away what test processes that were killed left in `parent`, mounts and daemons too."""
    for area in Path(parent).glob(f"{_AREA}*-*"):
        name = area.name.removeprefix(_AREA)
        owner = name.partition("-")[0]
        if not owner.isdecimal() or Path("/proc", owner).exists():
            continue
        inside = f"{area}/".encode()
        try:
            if area.stat().st_uid != os.geteuid():
                continue
            # Others sweep too: whoever has renamed it takes it away.
            area = area.rename(area.with_name(f"{_AREA}{os.getpid()}-{name}"))
        except FileNotFoundError:
            continue
        for pid, words in _command_lines():
            if b"mount" in words and any(word.startswith(inside) for word in words):
                os.kill(pid, signal.SIGKILL)
        for device, path in _mounts():
            if path.startswith(f"{area}/"):
                _abort(device)
                unmount = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-uz"]
                subprocess.run([*unmount, path], check=True, timeout=30)
        shutil.rmtree(area)


def _mounts(pid: str = "self") -> list[tuple[str, str]]:
    """Device and path of every mount that a process sees, the last one first."""
    lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    return [(line.split()[2], line.split()[4]) for line in reversed(lines)]


def _abort(device: str) -> None:
    switch = _CONNECTIONS / device.split(":")[1] / "abort"
    if not switch.exists():
        subprocess.run(["mount", "-t", "fusectl", "none", _CONNECTIONS], check=False, timeout=10)
    if switch.exists():
        switch.write_text("1")


def _command_lines() -> Iterator[tuple[int, list[bytes]]]:
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            try:
                with open(f"/proc/{entry.name}/cmdline", "rb") as file:
                    yield int(entry.name), file.read().split(b"\0")
            except OSError:
                # Ended since it was listed.
                continue


def wait_until(condition: Callable[[], bool], deadline_s: float = 10) -> None:
    """Returns when `condition()` is true; AssertionError when that takes longer."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"{condition} is not true after {deadline_s} s"
        time.sleep(0.01)


def drop_names() -> None:
    """Have the kernel forget all names and inodes that nobody uses. Root alone can."""
    for _ in range(3):  # those used since it last looked are kept once
        Path("/proc/sys/vm/drop_caches").write_text("2")
