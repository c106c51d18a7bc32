"""What each layer of an image added, replaced and removed: forensics with nothing but the tree.

    python examples/layer_changes.py MOUNTPOINT IMAGE

Prints one line a change, bottom layer first: the layer's number, ``+`` for what it added, ``~`` for what it
replaced, ``-`` for what it removed, and the path. A layer alone shows removals as overlayfs does: a
character device 0:0 for a name, an xattr for a directory whose lower content is hidden.
"""

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

OPAQUE = ("trusted.overlay.opaque", "user.overlay.opaque")


def main(mountpoint: str, image: str) -> None:
    layers = Path(mountpoint, "images", image, "layers")
    seen: set[str] = set()
    for number in range(len(os.listdir(layers))):
        root = layers / str(number) / "rootfs"
        for sign, path in changes(root, seen):
            print(number, sign, path)


def changes(root: Path, seen: set[str]) -> Iterator[tuple[str, str]]:
    """The changes of one layer; `seen` is what the layers below show, and is brought up to date."""
    for directory, directories, files in os.walk(root):
        directories.sort()
        here = os.path.relpath(directory, root)
        if here != "." and is_opaque(directory):
            yield from ((("-", gone)) for gone in take_away(here, seen))
        for name in sorted([*directories, *files]):
            path = os.path.normpath(os.path.join(here, name))
            status = os.lstat(os.path.join(directory, name))
            if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
                yield "-", path
                seen.discard(path)
                take_away(path, seen)
            elif path not in seen:
                seen.add(path)
                yield "+", path
            elif not stat.S_ISDIR(status.st_mode):
                take_away(path, seen)
                yield "~", path


def is_opaque(directory: str) -> bool:
    present = set(os.listxattr(directory))
    return any(name in present for name in OPAQUE)


def take_away(path: str, seen: set[str]) -> list[str]:
    """Everything that is below `path`."""
    gone = sorted(one for one in seen if one.startswith(f"{path}/"))
    seen.difference_update(gone)
    return gone


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: layer_changes.py MOUNTPOINT IMAGE")
    main(*sys.argv[1:])
