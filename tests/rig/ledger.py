"""What a mount or a command acknowledged, and whether it is all there. Blocking.

A `Ledger` is one worker's. It outlives the mount: a change is entered before it is asked for, and crossed off
when it is done, so at most one is open when the mount dies. `judge` compares with what a mount shows: all
that was done must be there, what was open may have happened or not. What is known stands by its path below
the mount point: a container or an image (`Box`) with its files.
"""

import json
import os
import stat
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["GONE", "OWN", "Box", "Ledger", "Spec", "content", "judge"]

Spec = tuple[Any, ...]
"""("directory", mode), ("link", target), ("file", mode, seed, size), or GONE. Of what was seen a file has its
content instead of a seed and a size."""

GONE: Spec = ("gone",)
"""Removed, and of the image."""

OWN = "work"
"""The directory of a rootfs where all there is was made by the ledger's worker."""

_LINE = 20


def content(seed: int, size: int) -> bytes:
    """What is in a file: no two places of any two files are the same."""
    lines = (b"%08x %010d\n" % (seed & 0xFFFFFFFF, number) for number in range(-(-size // _LINE)))
    return b"".join(lines)[:size]


@dataclass(frozen=True, slots=True)
class Box:
    """A container, or, without a number, an image."""

    number: int | None = 0
    """In its metadata."""
    name: str = ""
    """Besides its id."""
    is_started: bool = False
    tree: Mapping[str, Spec] = field(default_factory=dict)
    """By the path below rootfs: all that is in OWN, and what was changed elsewhere."""


@dataclass(frozen=True, slots=True)
class _Change:
    kind: str
    new: Mapping[str, Box | None]
    torn: str
    """The file that is written: what was in it stays, what is added may be there in parts."""


@dataclass
class Ledger:
    """What one worker did."""

    known: dict[str, Box] = field(default_factory=dict)
    open: _Change | None = None
    done: Counter[str] = field(default_factory=Counter)
    died_s: float | None = None
    """When its mount died, by time.monotonic()."""
    wrong: list[str] = field(default_factory=list)
    last: deque[str] = field(default_factory=lambda: deque(maxlen=12))
    """The last changes, for who looks for a fault."""

    @contextmanager
    def change(self, kind: str, new: Mapping[str, Box | None], torn: str = "") -> Iterator[None]:
        """As `begin`; the change is done unless an exception passes."""
        self.begin(kind, new, torn)
        yield
        self.settle(happened=True)

    def begin(self, kind: str, new: Mapping[str, Box | None], torn: str = "") -> None:
        """`new`: what becomes of each of these, None for nothing."""
        self.open = _Change(kind, new, torn)
        self.last.append(f"{kind}: {' '.join(new)} {torn}")

    def settle(self, *, happened: bool) -> None:
        """Whether the open change was made is known."""
        assert self.open is not None
        change, self.open = self.open, None
        if not happened:
            return
        self.done[change.kind] += 1
        for key, box in change.new.items():
            if box is None:
                self.known.pop(key, None)
            else:
                self.known[key] = box


def judge(ledger: Ledger, top: Path) -> list[str]:
    """What the mount at `top` does not show as it should, if anything; settles what was open."""
    open_change = ledger.open
    changing = {} if open_change is None else open_change.new
    wrong = [
        f"{key}: {said}"
        for key, box in ledger.known.items()
        if key not in changing and (said := _difference(box, _seen(top, key, box)))
    ]
    if open_change is None:
        return wrong
    old = {key: ledger.known.get(key) for key in changing}
    seen = {key: _seen(top, key, old[key], box) for key, box in changing.items()}
    as_new = [said for key, box in changing.items() if (said := _difference(box, seen[key]))]
    as_old = [said for key, box in old.items() if (said := _difference(box, seen[key]))]
    if not as_new or not as_old:
        ledger.settle(happened=not as_new)
        return wrong
    ((key, box),) = list(changing.items())[:1]
    if open_change.torn and not (said := _torn(old[key], box, seen[key], open_change.torn)):
        ledger.settle(happened=False)
        _unlink(ledger, top, key, open_change.torn)
        return wrong
    ledger.settle(happened=False)
    return [*wrong, f"{open_change.kind} of {', '.join(changing)}: neither {as_old} nor {as_new}"]


def _unlink(ledger: Ledger, top: Path, key: str, path: str) -> None:
    (top / key / "rootfs" / path).unlink(missing_ok=True)
    box = ledger.known[key]
    tree = {name: spec for name, spec in box.tree.items() if name != path}
    ledger.known[key] = Box(box.number, box.name, box.is_started, tree)


def _torn(old: Box | None, new: Box | None, seen: Box | None, path: str) -> str:
    """What is not as it may be while the file `path` is written."""
    if old is None or new is None or seen is None:
        return "gone"
    before, found = old.tree.get(path), seen.tree.get(path, GONE)
    rest = [
        Box(box.number, box.name, box.is_started, {name: box.tree[name] for name in box.tree if name != path})
        for box in (old, seen)
    ]
    if said := _difference(*rest):
        return said
    if before is None:
        return "" if found[0] in ("gone", "file") else f"{path} is a {found[0]}"
    kept = content(before[2], before[3])
    return "" if found[0] == "file" and found[2].startswith(kept) else f"{path}: what it had is not there"


def _difference(box: Box | None, seen: Box | None) -> str:
    """Empty if there is none."""
    if box is None or seen is None:
        return "" if box is seen else f"is {'back' if box is None else 'gone'}"
    for what in ("number", "name", "is_started"):
        if getattr(box, what) != getattr(seen, what):
            return f"{what} is {getattr(seen, what)!r}, not {getattr(box, what)!r}"
    # Elsewhere than in OWN what is not known is as in the image.
    for path in sorted(box.tree.keys() | {path for path in seen.tree if path.startswith(OWN)}):
        spec, found = box.tree.get(path, GONE), seen.tree.get(path, GONE)
        if spec[0] == "file" and found[0] == "file":
            wanted = content(spec[2], spec[3])
            if spec[1] != found[1]:
                return f"{path} has mode {found[1]:o}, not {spec[1]:o}"
            if wanted != found[2]:
                return f"{path} has {len(found[2])} bytes, not the {len(wanted)} it should have"
        elif spec != found:
            return f"{path} is {found}, not {spec}"[:500]
    return ""


def _seen(top: Path, key: str, *boxes: Box | None) -> Box | None:
    """What is there of `key`, looking where one of `boxes` has something, and at all that is in OWN."""
    place = top / key
    try:
        os.lstat(place)
    except FileNotFoundError:
        return None
    rootfs = place / "rootfs"
    paths = {path for box in boxes if box is not None for path in box.tree}
    if any(path.startswith(OWN) for path in paths):
        paths |= _below(rootfs, OWN)
    tree = {path: _look(rootfs / path) for path in paths}
    tree = {path: spec for path, spec in tree.items() if spec != GONE or not path.startswith(OWN)}
    if key.startswith("images/"):
        return Box(None, tree=tree)
    document = json.loads((place / "metadata.json").read_bytes())
    number, name, own = document.get("number", 0), document["name"], key.partition("/")[2]
    if name == own:
        return Box(number, "", document["mounted"], tree)
    leads = os.readlink(top / "containers" / name)
    assert leads == own, f"containers/{name} leads to {leads}, not to {own}"
    return Box(number, name, document["mounted"], tree)


def _below(rootfs: Path, path: str) -> set[str]:
    found = {path}
    try:
        entries = list(os.scandir(rootfs / path))
    except FileNotFoundError:
        return set()
    for entry in entries:
        below = f"{path}/{entry.name}"
        found |= _below(rootfs, below) if entry.is_dir(follow_symlinks=False) else {below}
    return found


def _look(path: Path) -> Spec:
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return GONE
    mode = stat.S_IMODE(status.st_mode)
    if stat.S_ISDIR(status.st_mode):
        return "directory", mode
    if stat.S_ISLNK(status.st_mode):
        return "link", os.readlink(path)
    return "file", mode, path.read_bytes()
