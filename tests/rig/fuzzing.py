"""How a fuzz target is driven, its corpus kept, and replayed. Blocking.

By coverage where atheris is installed, else by random mutation. A corpus is a zip beside the target: of all
inputs that were met those that are needed to reach every line, and every jump from one to another, once.
"""

import atexit
import hashlib
import random
import resource
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import fusestore

__all__ = ["Bytes", "drive", "kept", "own_directory", "spliced", "spliced_seed"]

T = TypeVar("T")
INPUT_S = 10.0
MEMORY = 2 << 30
"""Bytes of address space: what asks for more than an input is worth is a MemoryError, and so a bug."""
KEPT_MAX = 8192
"""Bytes of an input that is kept."""


class Bytes:
    """Decisions taken from an input, one after the other; zeros when it has been used up."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._place = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._place

    def byte(self) -> int:
        taken = self.take(1)
        return taken[0] if taken else 0

    def take(self, count: int) -> bytes:
        """Fewer at the end."""
        taken = self._data[self._place : self._place + count]
        self._place += len(taken)
        return taken

    def rest(self) -> bytes:
        return self.take(self.left)

    def choice(self, choices: Sequence[T]) -> T:
        return choices[
            (self.byte() if len(choices) <= 256 else self.byte() << 8 | self.byte()) % len(choices)
        ]

    def number(self) -> int:
        """Of up to 9 bytes; small ones are frequent, and some are negative."""
        kind = self.byte()
        value = int.from_bytes(self.take(kind % 10), "little")
        return -value if kind > 0xF0 else value


def spliced(source: random.Random, data: bytes, tokens: Sequence[bytes], first: int = 0) -> bytes:
    """`data` with a few places, from `first` on, changed: bytes and tokens put in, replaced, taken out."""
    changed = bytearray(data)
    for _ in range(source.choice((0, 1, 1, 2, 3, 8))):
        place = source.randrange(min(first, len(changed)), len(changed) + 1)
        match source.randrange(4):
            case 0:
                changed[place : place + 1] = source.randbytes(1)
            case 1:
                del changed[place : place + source.randrange(1, 30)]
            case 2:
                changed[place:place] = source.choice(tokens)
            case _:
                changed[place : place + source.randrange(20)] = source.choice(tokens)
    return bytes(changed)


def spliced_seed(source: random.Random, seeds: Sequence[Sequence[bytes]], tokens: Sequence[bytes]) -> bytes:
    """The number of a target, and one of its seeds, `spliced`. `seeds` has those of each target."""
    target = source.randrange(len(seeds))
    return bytes([target]) + spliced(source, source.choice(seeds[target]), tokens)


def own_directory() -> Path:
    """A directory for files; it goes with the process."""
    path = Path(tempfile.mkdtemp(prefix="fusestore-fuzz-"))
    atexit.register(shutil.rmtree, path)
    return path


def drive(check: Callable[[bytes], None], mutated: Callable[[random.Random], bytes]) -> None:
    """Calls `check` with input after input, until it raises. On the command line:

    SECONDS; or with atheris libFuzzer's arguments; or CORPUS.zip, to replay one; or --keep DIRECTORY, to add
    what is in there to the corpus beside the target.
    """
    if sys.argv[1:2] == ["--keep"]:
        _keep(check, Path(sys.argv[2]))
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    def check_in_time(data: bytes) -> None:
        start = time.monotonic()
        check(data)
        assert time.monotonic() - start < INPUT_S, "it takes too long"

    if sys.argv[-1].endswith(".zip"):
        _until_one_breaks(check_in_time, kept(Path(sys.argv[-1])))
        return
    try:
        import atheris
    except ModuleNotFoundError:
        _at_random(check_in_time, mutated)
    else:
        # What a mutation made is a seed: coverage finds its own way from there.
        source = random.Random(0)
        seeds = [mutated(source) for _ in range(200)]
        if _corpus().exists():
            seeds += kept(_corpus())

        def mutator(data: bytes, size_max: int, seed: int) -> bytes:
            if seed % 16 == 0:
                return random.Random(seed).choice(seeds)[:size_max]
            return bytes(atheris.Mutate(data, size_max))

        atheris.instrument_all()
        atheris.Setup(sys.argv, check_in_time, custom_mutator=mutator)
        atheris.Fuzz()


def kept(corpus: Path) -> list[bytes]:
    with zipfile.ZipFile(corpus) as archive:
        return [archive.read(name) for name in archive.namelist()]


def _corpus() -> Path:
    return Path(sys.argv[0]).with_suffix(".zip")


def _at_random(check: Callable[[bytes], None], mutated: Callable[[random.Random], bytes]) -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")

    def inputs() -> Iterator[bytes]:
        source, end = random.Random(seed), time.monotonic() + seconds
        while time.monotonic() < end:
            yield mutated(source)

    _until_one_breaks(check, inputs())


def _until_one_breaks(check: Callable[[bytes], None], inputs: Iterator[bytes] | Sequence[bytes]) -> None:
    count = 0
    for data in inputs:
        try:
            check(data)
        except BaseException:
            print(f"input {count}: {data!r}")
            raise
        count += 1
    print(f"{count} inputs, none of them broke the invariant")


def _keep(check: Callable[[bytes], None], directory: Path) -> None:
    """Small ones first: one that reaches nothing new is left out."""
    corpus = _corpus()
    met = {path.read_bytes() for path in directory.iterdir()}
    met |= set(kept(corpus)) if corpus.exists() else set()
    reached: set[tuple[str, int, int]] = set()
    with zipfile.ZipFile(corpus, "w") as archive:
        for data in sorted(met, key=lambda data: (len(data), data)):
            if len(data) > KEPT_MAX:
                break
            new = _reached_by(check, data) - reached
            if new:
                reached |= new
                # The same corpus is the same file.
                member = zipfile.ZipInfo(hashlib.sha256(data).hexdigest()[:16])
                archive.writestr(member, data, zipfile.ZIP_LZMA)


def _reached_by(check: Callable[[bytes], None], data: bytes) -> set[tuple[str, int, int]]:
    """Jumps from line to line in fusestore's own code."""
    ours = str(Path(fusestore.__file__).parent)
    found: set[tuple[str, int, int]] = set()

    def enter(frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(ours):
            return None
        line = frame.f_lineno

        def step(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal line
            found.add((frame.f_code.co_filename, line, frame.f_lineno))
            line = frame.f_lineno
            return step

        return step

    sys.settrace(enter)
    try:
        check(data)
    finally:
        sys.settrace(None)
    return found
