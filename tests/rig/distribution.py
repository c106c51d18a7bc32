"""A whole Debian with package manager, compiler, git, Python and SQLite, and what to install in it. Blocking.

Made by mmdebstrap in a minute and kept by rig.kept. Nothing of a package is left out: ``dpkg --verify`` of
all of them is silent.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rig.kept import kept_by, once, run_tool

__all__ = ["TOOLS", "Distribution", "make_distribution"]

TOOLS = ("mmdebstrap", "umoci", "apt-get")

PROGRAMS = ("git", "gcc", "libc6-dev", "make", "python3-venv", "sqlite3")

PACKAGES = (
    "jq", "libjq1", "libonig5", "bc", "less", "tree", "cron", "cron-daemon-common", "sensible-utils",
)  # fmt: skip
"""Nothing that is in the image, with all they depend on. cron adds a group and a set-group-ID program."""

WHEELS = ("rich==13.9.4", "click==8.1.8", "markdown-it-py==3.0.0", "mdurl==0.1.2", "pygments==2.19.1")
"""rich, with all it depends on, and one more."""


@dataclass(frozen=True, slots=True)
class Distribution:
    layout: Path
    """An OCI directory with one image, `distribution`."""
    packages: Path
    """A directory of .deb files."""
    wheels: Path
    """A directory of .whl files."""

    @property
    def source(self) -> str:
        """The image, as fusestore import takes it."""
        return f"oci:{self.layout}:distribution"


def make_distribution() -> Distribution:
    """Made by whoever comes first; others wait."""
    with kept_by(__file__) as root:
        once(root / "packages", _download_packages)
        once(root / "wheels", _download_wheels)
        once(root / "distribution", _bootstrap)
    return Distribution(root / "distribution", root / "packages", root / "wheels")


def _download_packages(out: Path) -> None:
    out.mkdir()
    run_tool("apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", *PACKAGES, cwd=out)


def _download_wheels(out: Path) -> None:
    run_tool(
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary",
        ":all:",
        "-d",
        out,
        *WHEELS,
    )


def _bootstrap(out: Path) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        tar = f"{scratch}/root.tar"
        run_tool("mmdebstrap", "--quiet", "--variant=apt", f"--include={','.join(PROGRAMS)}", "bookworm", tar)
        image = f"{out}:distribution"
        run_tool("umoci", "init", "--layout", out)
        run_tool("umoci", "new", "--image", image)
        run_tool("umoci", "raw", "add-layer", "--image", image, tar)
        run_tool("umoci", "gc", "--layout", out)
