"""What the bench works on: large images, made from Debian's packages and from chance, and kept. Blocking.

::

    debian         two layers, 270 MB, 12,000 names: Debian with python, perl and git; in the upper layer also
                   MODULES modules of Python, compiled                              mmdebstrap, tar, umoci
    many           one layer, 200,000 small files in 50,000, 50,000 and 100,000     tar, umoci
    many-2, -4     a half and a quarter of it, never unpacked
    large          two layers. Lower: `two-gib` and `shared` (200 MiB). Upper: `one-gib`, `half-gib`,
                   `quarter-gib`, and SMALL empty files in small/                   tar, umoci
    source.tar     a git repository, one commit of 7,800 files: Go's sources, of Debian's golang-1.19-src

Takes up to ten minutes and 8 GB in the cache of `rig.kept`, once. All layers are gzip's, as umoci makes them;
beside each image is what ``umoci unpack`` makes of it. As a program it makes them all and prints where they
are.
"""

import os
import py_compile
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rig.images import Image
from rig.kept import kept_by, once, run_tool

__all__ = ["MANY", "MODULES", "SMALL", "TOOLS", "BenchImages", "make_bench_images"]

TOOLS = ("mmdebstrap", "umoci", "git", "tar", "dpkg-deb", "apt-get")

MANY = 200_000
"""Files of `many`."""
MODULES = 500
"""/opt/modules/m0.py and so on."""
SMALL = 20_000

_UPPER_PARTS = ("./usr/lib/python3*", "./usr/lib/git-core", "./usr/share/perl", "./usr/share/perl5")
"""What of Debian is in the upper layer."""
_TAR = ("tar", "--format=pax", "--sort=name", "--numeric-owner", "--pax-option=delete=atime,delete=ctime")
_TIME = 1_600_000_000


@dataclass(frozen=True, slots=True)
class BenchImages:
    debian: Image
    many: Image
    many_half: Image
    many_quarter: Image
    """These two have no reference."""
    large: Image
    source_tree: Path
    """A tar with one directory, `src`."""


def make_bench_images() -> BenchImages:
    """All of them; made by whoever comes first, others wait."""
    with kept_by(__file__) as root:
        once(root / "source.tar", _source_tree)
        once(root / "debian", _debian)
        for name, share in (("many", 1), ("many-2", 2), ("many-4", 4)):
            once(root / name, partial(_many, ref=name, count=MANY // share))
        once(root / "large", _large)
        for name in ("debian", "many", "large"):
            once(root / f"{name}.bundle", partial(_unpack, root / name, name))

    def image(name: str, layers: int = 1) -> Image:
        return Image(root / name, name, root / f"{name}.bundle/rootfs", layers)

    return BenchImages(
        debian=image("debian", 2),
        many=image("many"),
        many_half=image("many-2"),
        many_quarter=image("many-4"),
        large=image("large", 2),
        source_tree=root / "source.tar",
    )


def _source_tree(out: Path) -> None:
    with _scratch(out) as scratch:
        package = "golang-1.19-src"
        run_tool("apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", package, cwd=scratch)
        (deb,) = scratch.glob("*.deb")
        run_tool("dpkg-deb", "-x", deb, scratch / "tree")
        source = scratch / "tree/usr/share/go-1.19"
        git = ("git", "-C", source / "src", "-c", "user.name=bench", "-c", "user.email=bench@localhost")
        for arguments in (("init", "-q"), ("add", "-Af"), ("commit", "-qm", "all"), ("gc", "-q")):
            run_tool(*git, *arguments)
        run_tool(*_TAR, "-C", source, "-cf", out, "src")


def _debian(out: Path) -> None:
    with _scratch(out) as scratch:
        packages = "--include=python3,perl,git"
        run_tool("mmdebstrap", "--quiet", "--variant=minbase", packages, "bookworm", scratch / "all.tar")
        root = scratch / "root"
        root.mkdir()
        run_tool("tar", "-C", root, "--numeric-owner", "-xf", scratch / "all.tar")
        excluded = [f"--exclude={part}" for part in _UPPER_PARTS]
        run_tool(*_TAR, "-C", root, *excluded, "-cf", scratch / "1.tar", ".")
        _modules(root / "opt/modules")
        upper = [path for part in _UPPER_PARTS for path in sorted(root.glob(part))]
        names = [f"./{path.relative_to(root)}" for path in [*upper, root / "opt/modules"]]
        run_tool(*_TAR, "-C", root, "-cf", scratch / "2.tar", *names)
        _image(out, "debian", scratch / "1.tar", scratch / "2.tar")


def _modules(directory: Path) -> None:
    """Modules of some functions each, with their bytecode, as a package manager leaves them."""
    directory.mkdir()
    for number in range(MODULES):
        path = directory / f"m{number}.py"
        path.write_text(
            "".join(f"def f{n}(x):\n    return [x + {n} * y for y in range({number})]\n\n" for n in range(40))
        )
        os.utime(path, (_TIME, _TIME))
        py_compile.compile(str(path), doraise=True)


def _many(out: Path, ref: str, count: int) -> None:
    """A quarter of them in a/, a quarter in b/, half in c/; a hundred in each directory below."""
    with _scratch(out) as scratch:
        root = scratch / "root"
        chance = random.Random(count)
        for name, files in (("a", count // 4), ("b", count // 4), ("c", count // 2)):
            for number in range(files):
                directory = root / name / str(number // 100)
                if number % 100 == 0:
                    directory.mkdir(parents=True)
                (directory / f"file-{number}").write_bytes(b"%x\n" % chance.getrandbits(800))
        run_tool(*_TAR, "-C", root, "-cf", scratch / "1.tar", ".")
        _image(out, ref, scratch / "1.tar")


def _large(out: Path) -> None:
    with _scratch(out) as scratch:
        for number, sizes in (
            (1, {"two-gib": 2048, "shared": 200}),
            (2, {"one-gib": 1024, "half-gib": 512, "quarter-gib": 256}),
        ):
            root = scratch / str(number)
            root.mkdir()
            for name, mebibytes in sizes.items():
                with open(root / name, "wb") as file:
                    text = _text(name)
                    for _ in range(mebibytes):
                        file.write(text)
            if number == 2:
                (root / "small").mkdir()
                for small in range(SMALL):
                    (root / f"small/{small}").touch()
            run_tool(*_TAR, "-C", root, "-cf", scratch / f"{number}.tar", ".")
            shutil.rmtree(root)
        _image(out, "large", scratch / "1.tar", scratch / "2.tar")


def _text(seed: str) -> bytes:
    """1 MiB that gzip makes half as large; no repetition is in its reach."""
    chance = random.Random(seed)
    words = [b"%x" % chance.getrandbits(32) for _ in range(5_000)]
    return b" ".join(chance.choices(words, k=150_000))[: 1 << 20]


def _image(out: Path, ref: str, *tars: Path) -> None:
    run_tool("umoci", "init", "--layout", out)
    run_tool("umoci", "new", "--image", f"{out}:{ref}")
    for tar in tars:
        run_tool("umoci", "raw", "add-layer", "--image", f"{out}:{ref}", tar)
        tar.unlink()
    run_tool("umoci", "config", "--image", f"{out}:{ref}", "--config.cmd", "/bin/sh")
    run_tool("umoci", "gc", "--layout", out)


def _unpack(layout: Path, ref: str, out: Path) -> None:
    run_tool("umoci", "unpack", "--image", f"{layout}:{ref}", out)


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=out.parent) as directory:
        yield Path(directory)


if __name__ == "__main__":
    print(make_bench_images())
