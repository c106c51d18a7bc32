"""Work on a store without a pause: by a mount, the API, the command; each worker with a ledger. Blocking.

Workers run in child processes (rig.people) until a time, or until the mount they are in dies, and return
their ledger. What goes wrong they put into it. Each has containers and names of its own, which begin with its
prefix.
"""

import contextlib
import errno
import hashlib
import os
import random
import signal
import subprocess
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rig.bustle import ApiHands, CommandHands, Hands, command, patiently
from rig.exerciser import FileExerciser
from rig.ledger import Box, Ledger, content, judge
from rig.ocisources import SourceMaker, tar_of
from rig.randomcalls import Caller
from rig.rootfswork import RootfsWorker

from fusestore.store import Store
from fusestore.synthetic import SHARED_S

__all__ = [
    "KILLED",
    "Where",
    "by_hands",
    "by_images",
    "calling",
    "exercising",
    "in_rootfs",
    "killing",
    "reading",
]

KILLED = "kill -9 of a command"
"""The kind of change of commands that ended so."""

_COMMAND_S = 1.5
"""About what a command takes on a busy machine."""

_DEAD = (errno.ENOTCONN, errno.ECONNABORTED)
"""What calls fail with whose daemon is dead, or dies."""


@dataclass(frozen=True)
class Where:
    """What a worker works on."""

    mountpoint: Path
    store: Path
    run_dir: Path
    environment: Mapping[str, str]

    @property
    def containers(self) -> Path:
        return self.mountpoint / "containers"


@contextlib.contextmanager
def _accounted(ledger: Ledger, where: Where) -> Iterator[None]:
    """What ends the work is noted: a mount that is gone, or what is wrong."""
    try:
        yield
    except Exception as error:
        is_dead = isinstance(error, OSError) and error.errno in _DEAD
        if is_dead or _is_gone(where):
            ledger.died_s = time.monotonic()
        else:
            after = "\n".join(("", "after", *ledger.last))
            ledger.wrong.append("".join(traceback.format_exception(error)) + after)


def _is_gone(where: Where) -> bool:
    try:
        os.statvfs(where.mountpoint)  # of which a kernel keeps nothing
    except OSError:
        return True
    return not os.path.lexists(where.containers)


def in_rootfs(ledger: Ledger, where: Where, prefix: str, seed: int, end_s: float) -> Ledger:
    """Containers made, filled, changed and removed through the tree."""
    worker = RootfsWorker(ledger, where.mountpoint, where.environment, prefix, seed)
    with _accounted(ledger, where):
        while time.monotonic() < end_s:
            worker.step()
    return ledger


def reading(ledger: Ledger, where: Where, files: Mapping[str, str], image: str, end_s: float) -> Ledger:
    """Files of an image, read as often as not past the page cache; `files`: by path, the SHA-256 of each."""
    chance = random.Random(image)
    paths = sorted(files)
    with _accounted(ledger, where):
        while time.monotonic() < end_s:
            path = chance.choice(paths)
            with open(where.mountpoint / "images" / image / "rootfs" / path, "rb", buffering=0) as file:
                if chance.random() < 0.5:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                found = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
            assert found == files[path], f"images/{image}/rootfs/{path} has another content"
            ledger.done["read a file of an image"] += 1
    return ledger


def calling(ledger: Ledger, where: Where, container: str, seed: int, end_s: float) -> Ledger:
    """Random calls in a container, which are answered somehow. Leaves it when the mount point is free."""
    with _accounted(ledger, where):
        os.chdir(where.containers / container / "rootfs")
        caller = Caller(Path(), seed)
        while time.monotonic() < end_s:
            os.stat(where.containers)
            for _ in range(20):
                _, answer = caller.step()
                if answer in _DEAD:
                    raise OSError(answer, "")
                ledger.done["a call at random"] += 1
    return ledger


def exercising(ledger: Ledger, where: Where, container: str, seed: int, end_s: float) -> Ledger:
    """A file changed in every way, compared with a copy in memory at each step."""
    path = where.containers / container / "rootfs/exercised"
    with _accounted(ledger, where):
        path.write_bytes(b"")
        file = FileExerciser(str(path), b"", random.Random(seed))
        while time.monotonic() < end_s:
            file.step()
            ledger.done["a step in a file, as fsx"] += 1
        file.finish()
    return ledger


def by_hands(ledger: Ledger, where: Where, prefix: str, seed: int, end_s: float, commands: bool) -> Ledger:
    """Containers made, written to, renamed and removed by the API, or by commands."""
    chance = random.Random(seed)
    with _accounted(ledger, where), Store.open(where.store, where.run_dir) as store:
        hands = CommandHands(store, dict(where.environment)) if commands else ApiHands(store)
        kind = "by commands" if commands else "by the API"
        while time.monotonic() < end_s:
            _step_by(hands, ledger, prefix, chance, kind)
            if commands and chance.random() < 0.1:
                _look(ledger, where, chance)
    return ledger


def _step_by(hands: Hands, ledger: Ledger, prefix: str, chance: random.Random, kind: str) -> None:
    key = f"containers/{prefix}-{chance.randrange(4)}"
    name, box = key.partition("/")[2], ledger.known.get(key)
    other = f"containers/{prefix}-{chance.randrange(4)}"
    if box is None:
        with ledger.change(f"make {kind}", {key: Box()}):
            hands.make(name)
    elif chance.random() < 0.5:
        new = replace(box, number=(box.number or 0) + 1)
        with ledger.change(f"write {kind}", {key: new}):
            hands.write(name, new.number or 0)
        found = hands.read(name)["number"]
        assert found == new.number, f"{key}: wrote {new.number}, read {found}"
    elif other not in ledger.known and chance.random() < 0.5:
        with ledger.change(f"rename {kind}", {key: None, other: box}):
            patiently(lambda: hands.rename(name, other.partition("/")[2]))
    else:
        with ledger.change(f"remove {kind}", {key: None}):
            patiently(lambda: hands.remove(name))


def _look(ledger: Ledger, where: Where, chance: random.Random) -> None:
    """What changes nothing, whoever works meanwhile; gc takes only what nobody has."""
    words = chance.choice(
        ("check", "gc", "df", "images", "containers", f"status {where.mountpoint}", "gc --dry-run")
    ).split()
    said = command(dict(where.environment), *words)
    assert words[0] != "check" or not said, said
    ledger.done[f"fusestore {words[0]}"] += 1


def by_images(ledger: Ledger, where: Where, prefix: str, seed: int, end_s: float) -> Ledger:
    """Images imported by the API, tagged through the tree, renamed and untagged."""
    chance = random.Random(seed)
    images = where.mountpoint / "images"
    with _accounted(ledger, where), Store.open(where.store, where.run_dir) as store:
        while time.monotonic() < end_s:
            key, other = (f"images/{prefix}-{chance.randrange(4)}" for _ in range(2))
            name, new, box = key.partition("/")[2], other.partition("/")[2], ledger.known.get(key)
            if box is None:
                with _source(chance) as (source, box), ledger.change("import by the API", {key: box}):
                    store.import_image(source, [name])
            elif other not in ledger.known:
                if chance.random() < 0.5:
                    with ledger.change("tag", {other: box}):
                        os.symlink(name, images / new)
                else:
                    with ledger.change("rename a tag", {key: None, other: box}):
                        os.rename(images / name, images / new)
            else:
                with ledger.change("untag", {key: None}):
                    os.unlink(images / name)
    return ledger


@contextlib.contextmanager
def _source(chance: random.Random) -> Iterator[tuple[str, Box]]:
    """An image to import, and what it will show."""
    seed, size = chance.getrandbits(32), chance.choice((100, 300_000))
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="fusestore-soak-") as directory:
        maker = SourceMaker()
        maker.add(maker.image([tar_of({"work/app": content(seed, size)})]))
        tree = {"work": ("directory", 0o755), "work/app": ("file", 0o644, seed, size)}
        yield maker.directory(Path(directory)), Box(None, tree=tree)


def killing(ledger: Ledger, where: Where, prefix: str, seed: int, end_s: float) -> Ledger:
    """Commands that are killed somewhere on their way, most of them: KILLED counts these."""
    chance = random.Random(seed)
    with _accounted(ledger, where):
        while time.monotonic() < end_s and not ledger.wrong:
            key = f"containers/{prefix}-{chance.randrange(3)}"
            image = f"images/{prefix}-{chance.randrange(3)}"
            name, box = key.partition("/")[2], ledger.known.get(key)
            if chance.random() < 0.3:
                with _source(chance) as (source, made):
                    _kill(ledger, where, chance, {image: made}, "import", source, "--name", image[7:])
            elif box is None:
                _kill(ledger, where, chance, {key: Box()}, "create", "default", name)
            elif chance.random() < 0.4:
                _kill(ledger, where, chance, {image: Box(None, tree=box.tree)}, "commit", name, image[7:])
            elif (other := f"containers/{prefix}-{chance.randrange(3)}") not in ledger.known:
                _kill(ledger, where, chance, {other: box}, "clone", name, other.partition("/")[2])
            else:
                _kill(ledger, where, chance, {key: None}, "rm", name)
    return ledger


def _kill(
    ledger: Ledger, where: Where, chance: random.Random, new: Mapping[str, Box | None], *words: str
) -> None:
    ledger.begin(f"{words[0]}, to be killed", new)
    with subprocess.Popen(
        ["fusestore", *words], env=dict(where.environment), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(chance.uniform(0, _COMMAND_S))
        process.kill()
        said = process.communicate()[1]
    if process.returncode == -signal.SIGKILL:
        ledger.done[KILLED] += 1
        time.sleep(SHARED_S)  # it may not have told the mounts
        ledger.wrong += judge(ledger, where.mountpoint)
    elif process.returncode == 0:
        ledger.settle(happened=True)
    else:
        raise AssertionError(f"{words}: {os.fsdecode(said)}")
