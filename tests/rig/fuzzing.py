"""How a fuzz target is driven: by coverage where atheris is installed, else by random mutation. Blocking."""

import random
import resource
import sys
import time
from collections.abc import Callable

__all__ = ["drive"]

INPUT_S = 10.0
MEMORY = 4 << 30
"""Bytes of address space: what asks for more than an input is worth is a MemoryError, and so a bug."""


def drive(check: Callable[[bytes], None], mutated: Callable[[random.Random], bytes]) -> None:
    """Calls `check` with input after input, until it raises. On the command line: SECONDS, or with atheris
    libFuzzer's arguments.
    """
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

    def check_in_time(data: bytes) -> None:
        start = time.monotonic()
        check(data)
        assert time.monotonic() - start < INPUT_S, "it takes too long"

    try:
        import atheris
    except ModuleNotFoundError:
        _at_random(check_in_time, mutated)
    else:
        # What a mutation made is a seed: coverage finds its own way from there.
        source = random.Random(0)
        seeds = [mutated(source) for _ in range(200)]

        def mutator(data: bytes, size_max: int, seed: int) -> bytes:
            if seed % 16 == 0:
                return random.Random(seed).choice(seeds)[:size_max]
            return bytes(atheris.Mutate(data, size_max))

        atheris.instrument_all()
        atheris.Setup(sys.argv, check_in_time, custom_mutator=mutator)
        atheris.Fuzz()


def _at_random(check: Callable[[bytes], None], mutated: Callable[[random.Random], bytes]) -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    source, end, count = random.Random(seed), time.monotonic() + seconds, 0
    while time.monotonic() < end:
        data = mutated(source)
        try:
            check(data)
        except BaseException:
            print(f"input {count}: {data!r}")
            raise
        count += 1
    print(f"{count} inputs, none of them broke the invariant")
