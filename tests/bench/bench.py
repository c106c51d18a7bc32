"""How fast, and how large, beside the peers: prints a table of ratios.

    python tests/bench/bench.py [--rounds N] [PART]…

Every work is done by fusestore and its peers in the same run, in turn, N times, by a program that is in
the container; a ratio is median by median, below 1 is for fusestore. Absolute times depend on the machine and
mean little. Cold: caches dropped, all mounted anew, nothing decompressed. The peers have the image as umoci
unpacked it. What fails, or is not installed, is said in its row, the others go on, and the exit code is 1.

Needs root, and of Debian: {packages};
ratarmount from PyPI. The first run makes images for ten minutes and keeps 8 GB (`benchimages`); a run
takes as much again in /var/tmp ($FUSESTORE_TEST_TMP). Parts, one to some minutes each:

{parts}
"""

import argparse
import compileall
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rows_containers
import rows_cost
import rows_lazy
import rows_loop
import rows_rootfs
from benchimages import BenchImages, make_bench_images
from measure import Bench

import fusestore

PACKAGES = "fuse-overlayfs buildah podman skopeo umoci squashfuse squashfs-tools fio git mmdebstrap"

_ALONE = "FUSESTORE_BENCH_ALONE"
"""In the environment of who is in a mount namespace of its own."""

PARTS: dict[str, tuple[Callable[[Bench, BenchImages], None], str]] = {
    "import": (rows_containers.imports, "to the first file read, and the bytes on disk"),
    "containers": (rows_containers.containers, "made, entered, written to, removed"),
    "many": (rows_containers.many, "what containers cost that are not touched"),
    "cold": (rows_rootfs.cold, "walk and read of a Debian"),
    "warm": (rows_rootfs.warm, "walk, lstat, open and read of it"),
    "change": (rows_rootfs.change, "create, write, fio, untar, git, Python's imports"),
    "copyup": (rows_rootfs.copyup, "of 1 GiB by one byte; read of 2 GiB"),
    "pagecache": (rows_cost.pagecache, "how often it has what many containers read"),
    "memory": (rows_cost.memory, "with a million inodes"),
    "growth": (rows_cost.growth, "what four times as much takes"),
    "concurrency": (rows_loop.concurrency, "lstat while 1 GiB is read; two readers"),
    "directory": (rows_loop.directory, "of 200,000 files"),
    "lazy": (rows_lazy.lazy, "pull --lazy, to the first file read"),
    "loop": (rows_loop.loop, "beside pyfuse3's own event loop"),
}


def main() -> int:
    assert __doc__
    parts = "\n".join(f"    {name:12} {text}" for name, (_, text) in PARTS.items())
    parser = argparse.ArgumentParser(
        description=__doc__.format(packages=PACKAGES, parts=parts),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="all, if none is named")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    arguments = parser.parse_args()
    names = arguments.parts or list(PARTS)
    if unknown := set(names) - PARTS.keys():
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    if os.geteuid():
        parser.error("only root can mount the peers and drop caches")
    if _ALONE not in os.environ:
        # Whoever makes a mount namespace has copies of all mounts there, which keeps them busy here.
        os.execvpe("unshare", ["unshare", "--mount", sys.executable, *sys.argv], {**os.environ, _ALONE: "1"})
    # As pip leaves it: PYTHONDONTWRITEBYTECODE, and what changed since, would have each command compile it.
    compileall.compile_dir(os.path.dirname(fusestore.__file__), quiet=2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # what is mounted is unmounted first
    images = make_bench_images()
    bench = Bench(arguments.rounds)
    try:
        bench.begin()
        for name in names:
            bench.part(name, lambda bench, work=PARTS[name][0]: work(bench, images))  # type: ignore[misc]
    finally:
        bench.close()
    print(f"\n{bench.reached} of {bench.reached + bench.missed} ratios that were to be reached are.")
    return 1 if bench.is_failed else 0


if __name__ == "__main__":
    sys.exit(main())
