"""Many processes that make, write, rename and remove containers of one store at once, each with an account.

Each has hands of one kind: the API, the command, or one of the store's mounts. Its own containers nobody else
touches: what it was told is done must be what everybody sees. The contested ids all reach for: who made one
more often than it was removed has it. Blocking; runs in a child process, which may enter mounts.
"""

import contextlib
import errno
import json
import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fusestore.errors import Busy, Exists, FusestoreError, NotFound, errno_of
from fusestore.store import Store

__all__ = [
    "CONTESTED",
    "Account",
    "ApiHands",
    "CommandHands",
    "Hands",
    "bustle",
    "command",
    "patiently",
    "seen_by_mount",
    "seen_by_store",
]

CONTESTED = tuple(f"contested-{number}" for number in range(8))

_LOSING = {errno.EEXIST, errno.ENOENT, errno.EBUSY}
"""What may become of reaching for an id that others reach for too."""

_BUSY_S = 20.0
"""A mount lets go of a container a moment after close(2), later when the machine is busy."""


@dataclass
class Account:
    """What one process did."""

    done: Counter[str] = field(default_factory=Counter)
    own: dict[str, int] = field(default_factory=dict)
    """Its containers, and the last number written to the metadata of each."""
    balance: Counter[str] = field(default_factory=Counter)
    """Of contested ids: how often made, less how often removed."""
    wrong: list[str] = field(default_factory=list)


class Hands(Protocol):
    """Each raises OSError."""

    def make(self, name: str) -> None: ...
    def write(self, name: str, number: int) -> None: ...
    def read(self, name: str) -> dict[str, Any]: ...
    def rename(self, old: str, new: str) -> None: ...
    def remove(self, name: str) -> None: ...


class ApiHands:
    """Of who has the store open."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def make(self, name: str) -> None:
        _as_os_error(lambda: self._store.create_container(container_id=name))

    def write(self, name: str, number: int) -> None:
        _as_os_error(lambda: self._store.set_container_metadata(name, {"number": number}))

    def read(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        _as_os_error(lambda: found.update(self._store.get_container_metadata(name)))
        return found

    def rename(self, old: str, new: str) -> None:
        _as_os_error(lambda: self._store.rename_container(old, new))

    def remove(self, name: str) -> None:
        _as_os_error(lambda: self._store.delete_container(name))


class MountHands:
    """Of who knows the mount point."""

    def __init__(self, mountpoint: Path) -> None:
        self._containers = mountpoint / "containers"

    def make(self, name: str) -> None:
        os.mkdir(self._containers / name)

    def write(self, name: str, number: int) -> None:
        (self._containers / name / "rootfs/number").write_text(str(number))
        (self._containers / name / "metadata.json").write_text(json.dumps({"number": number}))
        assert (self._containers / name / "rootfs/number").read_text() == str(number)

    def read(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self._containers / name / "metadata.json").read_bytes())
        return found

    def rename(self, old: str, new: str) -> None:
        os.rename(self._containers / old, self._containers / new)

    def remove(self, name: str) -> None:
        os.rmdir(self._containers / name)


class CommandHands(ApiHands):
    """What no command does the API does."""

    def __init__(self, store: Store, environment: dict[str, str]) -> None:
        super().__init__(store)
        self._environment = environment

    def make(self, name: str) -> None:
        command(self._environment, "create", "default", name)

    def read(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(command(self._environment, "inspect", name))
        return found

    def remove(self, name: str) -> None:
        command(self._environment, "rm", name)


def command(environment: dict[str, str], *arguments: str) -> str:
    """What `fusestore ARGUMENTS` prints. Raises OSError with what it complains of."""
    done = subprocess.run(
        ["fusestore", *arguments], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    if done.returncode == 0:
        return done.stdout
    reasons = {"taken": errno.EEXIST, "there is no": errno.ENOENT, "in use": errno.EBUSY}
    number = next((number for text, number in reasons.items() if text in done.stderr), errno.EIO)
    raise OSError(number, f"{arguments}: {done.stderr.strip() or done.stdout.strip()}")


def _as_os_error(call: Callable[[], object]) -> None:
    try:
        call()
    except (Exists, NotFound, Busy, FusestoreError) as error:
        raise OSError(errno_of(error), str(error)) from error


def bustle(
    number: int,
    mountpoints: list[Path],
    store: Path,
    run_dir: Path,
    environment: dict[str, str],
    seconds: float,
) -> Account:
    """The work of process `number`, for that long; at its end it has some containers left."""
    account, chance = Account(), random.Random(number)
    with Store.open(store, run_dir) as opened:
        kinds: list[Hands] = [ApiHands(opened), *map(MountHands, mountpoints)]
        hands = CommandHands(opened, environment) if number % 10 == 9 else kinds[number % len(kinds)]
        names = [f"own-{number}-{one}" for one in range(4)]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            step = _contest if chance.random() < 0.3 else _own_step
            try:
                step(hands, account, chance, names)
            except (OSError, AssertionError, ValueError) as error:
                account.wrong.append(f"{type(hands).__name__}: {error!r}")
                break
    return account


def _contest(hands: Hands, account: Account, chance: random.Random, names: list[str]) -> None:
    name = chance.choice(CONTESTED)
    try:
        if chance.random() < 0.5:
            with contextlib.suppress(FileNotFoundError):  # made, and deleted before mkdir(2) could answer
                hands.make(name)
            account.balance[name] += 1
            account.done["contested id made"] += 1
        else:
            hands.remove(name)
            account.balance[name] -= 1
            account.done["contested id removed"] += 1
    except OSError as error:
        if error.errno not in _LOSING:
            raise
        account.done["contested id refused"] += 1


def _own_step(hands: Hands, account: Account, chance: random.Random, names: list[str]) -> None:
    name, what = chance.choice(names), chance.random()
    if name not in account.own:
        hands.make(name)
        account.own[name] = 0
        account.done["make"] += 1
    elif what < 0.5:
        number = account.own[name] + 1
        hands.write(name, number)
        account.own[name] = number
        found = hands.read(name)
        assert found.get("number") == number, f"{name}: wrote {number}, read {found}"
        account.done["write"] += 1
    elif what < 0.75 and (free := [other for other in names if other not in account.own]):
        patiently(lambda: hands.rename(name, free[0]))
        account.own[free[0]] = account.own.pop(name)
        account.done["rename"] += 1
    else:
        patiently(lambda: hands.remove(name))
        del account.own[name]
        account.done["remove"] += 1


def patiently(call: Callable[[], None]) -> None:
    end = time.monotonic() + _BUSY_S
    while True:
        try:
            return call()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > end:
                raise
        time.sleep(0.02)


def seen_by_mount(mountpoint: Path) -> dict[str, int]:
    """The containers there, and the number in each one's metadata (0: none)."""
    hands = MountHands(mountpoint)
    return {name: hands.read(name).get("number", 0) for name in os.listdir(mountpoint / "containers")}


def seen_by_store(store: Path, run_dir: Path) -> dict[str, int]:
    with Store.open(store, run_dir) as opened:
        return {name: opened.get_container_metadata(name).get("number", 0) for name in opened.container_ids()}
