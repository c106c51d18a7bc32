"""Run a command in a root of its own that nobody else has seen, and throw that root away: the tree alone.

    python examples/run_in_fresh_root.py MOUNTPOINT COMMAND...

What a CI runner or a sandbox does a thousand times a day. mkdir makes the container, of the image tagged
default, and rmdir takes it away; neither takes longer for a large image. Root chroots; anyone else is root in
a user namespace of the command's own.
"""

import os
import subprocess
import sys
import uuid
from pathlib import Path


def main(mountpoint: str, *command: str) -> int:
    container = Path(mountpoint, "containers", f"run-{uuid.uuid4().hex[:12]}")
    container.mkdir()
    try:
        namespace = [] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user"]
        enter = [*namespace, "chroot", str(container / "rootfs"), *command]
        return subprocess.run(enter, env={"PATH": "/usr/bin:/bin:/usr/sbin:/sbin"}, check=False).returncode
    finally:
        container.rmdir()


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: run_in_fresh_root.py MOUNTPOINT COMMAND...")
    sys.exit(main(*sys.argv[1:]))
