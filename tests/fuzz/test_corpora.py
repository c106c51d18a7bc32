"""The kept corpora, replayed: only the declared errors, in bounded time and memory (rig.fuzzing)."""

import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = sorted(Path(__file__).parent.glob("fuzz_*.py"))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.stem)
def test_the_corpus_breaks_no_invariant(target: Path) -> None:
    corpus = target.with_suffix(".zip")
    done = subprocess.run([sys.executable, target, corpus], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.endswith(" inputs, none of them broke the invariant\n")
