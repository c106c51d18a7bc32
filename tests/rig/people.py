"""Root and a plain user, who run commands and calls in processes of their own, bounded in time. Blocking.

Nothing of the test process itself may enter a mount under test: a request that the daemon never answers
cannot be interrupted, not even by SIGKILL. So every access runs in a child; a child that is late is killed
after the rescue hook (`Person.rescue`) has aborted the connections of the mounts under test, which frees it.
"""

import os
import pickle
import pwd
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NoReturn, TypeVar

import pytest
from rig.namespace import enter

__all__ = ["PLAIN_USER", "Person", "Result", "as_root", "as_user", "plain_user", "root"]

T = TypeVar("T")

PLAIN_USER = "fusestore-test"
_DEADLINE_S = 60

as_root = pytest.mark.parametrize("person", ["root"], indirect=True)
as_user = pytest.mark.parametrize("person", ["user"], indirect=True)
"""Marks of a test that is for one of the two alone."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a command ended. Text is UTF-8 with surrogateescape."""

    command: str
    code: int
    out: str
    err: str

    def ok(self) -> str:
        """Standard output, of a command that must have succeeded and complained of nothing."""
        assert self.code == 0 and not self.err, f"{self.command}: exit {self.code}: {self.err}"
        return self.out

    def fails_with(self, number: int) -> str:
        """Standard error, of a command that must have failed with this errno's message."""
        text = os.strerror(number)
        assert self.code != 0, f"{self.command}: succeeded, expected {text}"
        assert text in self.err, f"{self.command}: expected {text}, got {self.err}"
        return self.err


@dataclass(frozen=True)
class Person:
    """A user of the machine, with one environment. Commands see no environment but this one."""

    name: str
    uid: int
    gid: int
    home: str
    driver: str = "union"
    """Of the mounts that this person makes."""
    holder: int | None = None
    """A process in whose namespaces all is done (`rig.namespace.user_namespace`)."""

    @property
    def own_uid(self) -> int:
        """What they see as theirs."""
        return self.uid if self.holder is None else 0

    @property
    def has_kernel_mounts(self) -> bool:
        """Containers are the kernel's overlayfs (README, "Which driver, when")."""
        return self.driver != "union"

    rescue: ClassVar[Callable[[], None]] = staticmethod(lambda: None)
    """Called before a late child is killed."""

    @property
    def is_root(self) -> bool:
        return self.uid == 0

    def environment(self, **more: str) -> dict[str, str]:
        """The installed commands first on PATH; messages in English; nothing else inherited."""
        path = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return {
            "PATH": path,
            "HOME": self.home,
            "USER": self.name,
            "LC_ALL": "C.UTF-8",
            "TERM": "dumb",
            **more,
        }

    def run(
        self,
        *command: str | bytes | Path,
        cwd: str | Path = "/",
        env: dict[str, str] | None = None,
        deadline_s: float = _DEADLINE_S,
    ) -> Result:
        """Runs a command to its end. AssertionError when it is late."""
        changes = os.geteuid() != self.uid
        shown = " ".join(os.fsdecode(word) for word in command)
        if self.holder is not None:
            namespaces = (f"--target={self.holder}", "--user", "--mount", "--preserve-credentials")
            command = ("nsenter", *namespaces, f"--wd={cwd}", "--", *command)
        with subprocess.Popen(
            command, cwd=cwd, env=self.environment(**(env or {})), umask=0o022, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            user=self.uid if changes else None, group=self.gid if changes else None,
            extra_groups=[] if changes else None,
        ) as process:  # fmt: skip
            try:
                out, err = process.communicate(timeout=deadline_s)
            except subprocess.TimeoutExpired:
                Person.rescue()
                os.killpg(process.pid, signal.SIGKILL)
                out, err = process.communicate(timeout=10)
                raise AssertionError(f"{shown}: no end after {deadline_s} s: {os.fsdecode(err)}") from None
        return Result(shown, process.returncode, os.fsdecode(out), os.fsdecode(err))

    def call(self, function: Callable[..., T], *arguments: object, deadline_s: float = _DEADLINE_S) -> T:
        """What `function(*arguments)` returns or raises, in a forked child that is this person."""
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read_end)
            self._answer(write_end, function, arguments)
        os.close(write_end)
        try:
            with os.fdopen(read_end, "rb") as pipe:
                if not select.select([pipe], [], [], deadline_s)[0]:
                    raise AssertionError(f"{function}{arguments}: no end after {deadline_s} s")
                answered, value = pickle.load(pipe)
        except BaseException:
            Person.rescue()
            os.kill(child, signal.SIGKILL)
            raise
        finally:
            os.waitpid(child, 0)
        if answered:
            return value  # type: ignore[no-any-return]
        raise value

    def _answer(self, pipe: int, function: Callable[..., object], arguments: tuple[object, ...]) -> NoReturn:
        """In the child; never returns."""
        try:
            if os.geteuid() != self.uid:
                os.setgroups([])
                os.setresgid(self.gid, self.gid, self.gid)
                os.setresuid(self.uid, self.uid, self.uid)
            if self.holder is not None:
                enter(self.holder)
            os.umask(0o022)
            os.chdir("/")
            try:
                answer = (True, function(*arguments))
            except BaseException as error:
                answer = (False, error)
            with os.fdopen(pipe, "wb") as file:
                pickle.dump(answer, file)
        finally:
            os._exit(0)


def root() -> Person:
    return Person("root", 0, 0, "/root")


def plain_user() -> Person:
    """The user who runs the tests; where that is root, one made for the tests if it does not exist."""
    if os.geteuid() != 0:
        own = pwd.getpwuid(os.geteuid())
        return Person(own.pw_name, own.pw_uid, own.pw_gid, own.pw_dir)
    try:
        found = pwd.getpwnam(PLAIN_USER)
    except KeyError:
        subprocess.run(["useradd", "--create-home", "--shell", "/bin/sh", PLAIN_USER], check=True, timeout=60)
        found = pwd.getpwnam(PLAIN_USER)
    return Person(found.pw_name, found.pw_uid, found.pw_gid, found.pw_dir)
