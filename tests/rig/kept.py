"""Where what takes long to make is kept for the next run: by other tools, once, whole. Blocking.

$FUSESTORE_TEST_CACHE (default ~/.cache/fusestore-tests) has a directory for each maker, named by the digest
of the maker's own text: a change there makes its things anew.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["kept_by", "once", "run_tool"]


@contextlib.contextmanager
def kept_by(maker: str) -> Iterator[Path]:
    """The directory of the module at `maker`, with nobody else making things; who comes second waits."""
    cache = Path(os.environ.get("FUSESTORE_TEST_CACHE") or Path.home() / ".cache/fusestore-tests")
    root = cache / hashlib.sha256(Path(maker).read_bytes()).hexdigest()[:12]
    root.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield root


def once(path: Path, make: Callable[[Path], None]) -> None:
    """Makes `path` under another name and renames it: what is there is whole."""
    if path.exists():
        return
    unfinished = path.with_name(f"unfinished-{path.name}")
    if unfinished.is_dir():
        shutil.rmtree(unfinished)
    unfinished.unlink(missing_ok=True)
    make(unfinished)
    unfinished.rename(path)


def run_tool(*command: str | Path, cwd: Path | None = None) -> str:
    """The standard output of a command. RuntimeError, with what it said, when it fails."""
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    if result.returncode:
        said = result.stderr.strip()[-2000:]
        raise RuntimeError(f"{' '.join(map(str, command))}: exit {result.returncode}: {said}")
    return result.stdout
