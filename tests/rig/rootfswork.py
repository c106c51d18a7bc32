"""Work in the tree of a mount, each change entered into a ledger. Blocking; runs in child processes."""

import errno
import json
import os
import random
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from rig.bustle import command, patiently
from rig.ledger import GONE, OWN, Box, Ledger, Spec, content, judge

__all__ = ["RootfsWorker"]

_BOXES = 4
"""Containers of one worker, about."""
_NAMES = 6
_SIZES = (0, 1, 100, 5_000, 70_000, 200_000)
_SIZE_MAX = 1 << 20


class RootfsWorker:
    """Makes, fills, changes and removes containers. What begins with its prefix nobody else touches."""

    def __init__(
        self, ledger: Ledger, top: Path, environment: Mapping[str, str], prefix: str, seed: int
    ) -> None:
        """`top` is the mount point, `environment` what commands need."""
        self._ledger = ledger
        self._top = top
        self._environment = dict(environment)
        self._prefix = prefix
        self._chance = random.Random(seed)

    def step(self) -> None:
        own = [key for key in self._ledger.known if key.startswith("containers/")]
        if len(own) < 2 or (len(own) < _BOXES and self._chance.random() < 0.1):
            self._make()
            return
        key = self._chance.choice(own)
        if OWN not in self._ledger.known[key].tree:  # the mount died just before
            self._furnish(key, self._ledger.known[key])
            return
        name = self._chance.choices(*_STEPS)[0]
        getattr(self, f"_{name}")(key, self._ledger.known[key], self._top / key)

    def _fresh(self, place: str) -> str:
        taken = self._ledger.known
        return next(
            key
            for number in range(1_000)
            if (key := f"{place}/{self._prefix}-{self._chance.randrange(1_000)}-{number}") not in taken
        )

    def _make(self) -> None:
        key = self._fresh("containers")
        with self._ledger.change("mkdir a container", {key: Box()}):
            os.mkdir(self._top / key)
        self._furnish(key, self._ledger.known[key])

    def _furnish(self, key: str, box: Box) -> None:
        tree = {**box.tree, OWN: ("directory", 0o755)}
        with self._ledger.change("mkdir", {key: replace(box, tree=tree)}):
            os.mkdir(self._top / key / "rootfs" / OWN, 0o755)

    # The container

    def _write_document(self, key: str, box: Box, place: Path) -> None:
        number = (box.number or 0) + 1
        name = f"{self._prefix}-name-{self._chance.randrange(1 << 40)}" if number % 3 == 0 else box.name
        if box.is_started:
            name = box.name  # it is refused another
        new = replace(box, number=number, name=name)
        document = json.dumps({"number": number, **({"name": name} if name else {})})
        with self._ledger.change("write metadata.json", {key: new}):
            if self._chance.random() < 0.5:
                (place / "metadata.json").write_text(document)
            else:
                (place / "new").write_text(document)
                os.rename(place / "new", place / "metadata.json")

    def _start_or_stop(self, key: str, box: Box, place: Path) -> None:
        new = replace(box, is_started=not box.is_started)
        with self._ledger.change("start or stop", {key: new}):
            (place / "metadata.json").write_text(
                json.dumps({"number": box.number, "mounted": new.is_started})
            )

    def _rename_box(self, key: str, box: Box, place: Path) -> None:
        new = self._fresh("containers")

        def call() -> None:
            os.rename(place, self._top / new)

        if box.is_started:
            _is_refused(call)
            return
        with self._ledger.change("rename a container", {key: None, new: box}):
            patiently(call)

    def _remove(self, key: str, box: Box, place: Path) -> None:
        kind, call = self._chance.choice((("rm -r", _remove_all), ("rmdir", os.rmdir)))
        if box.is_started:
            _is_refused(lambda: call(place))
            return
        with self._ledger.change(f"{kind} a container", {key: None}):
            patiently(lambda: call(place))

    def _clone(self, key: str, box: Box, place: Path) -> None:
        new = self._fresh("containers")
        if len(self._ledger.known) >= 2 * _BOXES:
            return
        with self._ledger.change("clone", {new: replace(box, name="", is_started=False)}):
            self._command("clone", place.name, new.partition("/")[2])

    def _commit(self, key: str, box: Box, place: Path) -> None:
        images = [key for key in self._ledger.known if key.startswith("images/")]
        if len(images) < 2:
            new = self._fresh("images")
            with self._ledger.change("commit", {new: Box(None, tree=box.tree)}):
                self._command("commit", "--compression", "none", place.name, new.partition("/")[2])
        else:
            image = self._chance.choice(images)
            with self._ledger.change("untag", {image: None}):
                os.unlink(self._top / image)

    def _command(self, *arguments: str) -> None:
        command(self._environment, *arguments)

    # Its files

    def _path(self, box: Box, *kinds: str) -> str | None:
        """One that is there of these kinds; without kinds a new one."""
        directories = [path for path, spec in box.tree.items() if spec[0] == "directory"]
        if kinds:
            found = [p for p, spec in box.tree.items() if spec[0] in kinds and p.startswith(f"{OWN}/")]
            return self._chance.choice(found) if found else None
        path = f"{self._chance.choice(directories)}/{self._chance.randrange(_NAMES)}"
        return path if path not in box.tree and path.count("/") < 4 else None

    def _is_empty(self, box: Box, path: str) -> bool:
        return not any(other.startswith(f"{path}/") for other in box.tree)

    def _write(self, key: str, box: Box, place: Path, path: str, spec: Spec, flags: int) -> None:
        """With fsync(2). What is there already of the content is not written again."""
        before = box.tree[path][3] if path in box.tree else 0
        new = replace(box, tree={**box.tree, path: spec})
        with self._ledger.change("write and fsync", {key: new}, torn=path):
            fd = os.open(place / "rootfs" / path, os.O_WRONLY | flags, 0o644)
            try:
                data = content(spec[2], spec[3])[before:]
                while data:
                    data = data[os.write(fd, data) :]
                os.fsync(fd)
            finally:
                os.close(fd)

    def _create(self, key: str, box: Box, place: Path) -> None:
        if path := self._path(box):
            spec = "file", 0o644, self._chance.getrandbits(32), self._chance.choice(_SIZES)
            self._write(key, box, place, path, spec, os.O_CREAT | os.O_EXCL)

    def _append(self, key: str, box: Box, place: Path) -> None:
        path = self._path(box, "file")
        if path and box.tree[path][3] < _SIZE_MAX:
            kind, mode, seed, size = box.tree[path]
            spec = kind, mode, seed, size + self._chance.choice(_SIZES)
            self._write(key, box, place, path, spec, os.O_APPEND)

    def _rename(self, key: str, box: Box, place: Path) -> None:
        """A file or directory, over another file or to a new name; a file of the image too."""
        old, kind = self._path(box, "file", "directory"), "file"
        if old is None:
            return
        kind = box.tree[old][0]
        over = self._chance.choice((self._path(box, "file"), "etc/hostname")) if kind == "file" else None
        new = over if over and self._chance.random() < 0.6 else self._path(box)
        if new is None or new == old or new.startswith(f"{old}/"):
            return
        tree = {
            new + path.removeprefix(old) if path == old or path.startswith(f"{old}/") else path: spec
            for path, spec in box.tree.items()
            if path != new
        }
        with self._ledger.change("rename", {key: replace(box, tree=tree)}):
            os.rename(place / "rootfs" / old, place / "rootfs" / new)

    def _truncate(self, key: str, box: Box, place: Path) -> None:
        if path := self._path(box, "file"):
            kind, mode, seed, size = box.tree[path]
            spec = kind, mode, seed, self._chance.randint(0, size)
            with self._ledger.change("truncate", {key: replace(box, tree={**box.tree, path: spec})}):
                os.truncate(place / "rootfs" / path, spec[3])

    def _chmod(self, key: str, box: Box, place: Path) -> None:
        if path := self._path(box, "file", "directory"):
            kind, _, *rest = box.tree[path]
            spec = kind, self._chance.choice((0o644, 0o700, 0o640, 0o777)) | 0o600, *rest
            if kind == "directory":
                spec = kind, spec[1] | 0o100
            with self._ledger.change("chmod", {key: replace(box, tree={**box.tree, path: spec})}):
                os.chmod(place / "rootfs" / path, spec[1])

    def _mkdir(self, key: str, box: Box, place: Path) -> None:
        if path := self._path(box):
            tree = {**box.tree, path: ("directory", 0o755)}
            with self._ledger.change("mkdir", {key: replace(box, tree=tree)}):
                os.mkdir(place / "rootfs" / path, 0o755)

    def _symlink(self, key: str, box: Box, place: Path) -> None:
        if path := self._path(box):
            target = f"to/{self._chance.random()}"
            tree = {**box.tree, path: ("link", target)}
            with self._ledger.change("symlink", {key: replace(box, tree=tree)}):
                os.symlink(target, place / "rootfs" / path)

    def _unlink(self, key: str, box: Box, place: Path) -> None:
        if self._chance.random() < 0.1 and "bin/vi" not in box.tree:
            with self._ledger.change("unlink", {key: replace(box, tree={**box.tree, "bin/vi": GONE})}):
                os.unlink(place / "rootfs/bin/vi")
        elif path := self._path(box, "file", "link", "directory"):
            is_directory = box.tree[path][0] == "directory"
            if is_directory and not self._is_empty(box, path):
                return
            tree = {other: spec for other, spec in box.tree.items() if other != path}
            with self._ledger.change("rmdir" if is_directory else "unlink", {key: replace(box, tree=tree)}):
                (os.rmdir if is_directory else os.unlink)(place / "rootfs" / path)

    def _check(self, key: str, box: Box, place: Path) -> None:
        """What is seen of it while the mount lives."""
        self._ledger.wrong += judge(Ledger({key: box}), self._top)


def _remove_all(place: Path) -> None:
    """rm(1): a mount notes which thread it refused to remove a container, and for a while lets it not in."""
    done = subprocess.run(
        ["rm", "-r", place],
        env={**os.environ, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if done.returncode:
        known = (errno.EBUSY, errno.ENOTCONN, errno.ECONNABORTED, errno.ENOENT)
        number = next((number for number in known if os.strerror(number) in done.stderr), errno.EIO)
        raise OSError(number, done.stderr)


def _is_refused(call: Callable[[], None]) -> None:
    """As it must be while the container is started."""
    try:
        call()
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
    else:
        raise AssertionError("a started container was removed or renamed")


_STEPS = (
    ("create", "append", "rename", "truncate", "chmod", "mkdir", "symlink", "unlink", "write_document",
     "start_or_stop", "rename_box", "remove", "clone", "commit", "check"),
    (30, 15, 20, 5, 5, 6, 4, 10, 15, 4, 4, 4, 1, 1.5, 2),
)  # fmt: skip
