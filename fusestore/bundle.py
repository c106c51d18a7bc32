"""A bundle for OCI runtimes (runtime-spec, bundle.md): a config.json for a container's rootfs. Blocking.

The user is looked up in the rootfs without a mount, and no link leads out of it. Beyond that the rootfs is
the mount's: the runtime enters it there.
"""

import errno
import json
import os
import stat
from typing import Any

from .drivers import snapshot
from .errors import BadInput, Exists, NotFound
from .imageconfig import settings_of
from .inodes import run
from .objects import Object
from .rootfs import Rootfs
from .runtimespec import User, find_user, make_spec
from .store import Store

__all__ = ["write_bundle"]

_FIELDS = ("User", "Entrypoint", "Cmd", "Env", "WorkingDir", "Labels")
"""Of an image's config, all that a bundle is made of."""
_FILE_MAX = 16 << 20
"""Bytes of passwd and group."""
_LINKS_MAX = 40
"""As the kernel follows (path_resolution(7))."""


def write_bundle(
    store: Store, ref: str, directory: str, args: list[str], *, has_terminal: bool = False
) -> None:
    """Writes config.json into `directory`, which is made if it is not there.

    A plain user's is for a user namespace, where they are root. `args`: instead of the image's command.
    Raises NotFound, also if no mount is live; Exists if there is a config.json; BadInput.
    """
    container = store.container(ref)
    mounts = store.mounts()
    if not mounts:
        raise NotFound(f"no mount of {store.path} is live: run fusestore mount MOUNTPOINT first")
    settings: dict[str, Any] = {}
    if container.image_id:
        settings = settings_of(store.image_config(store.image(container.image_id)), _FIELDS)
    is_rootless = os.geteuid() != 0
    user = User() if is_rootless else _user_of(store, container.id, settings.get("User") or "")
    spec = make_spec(
        f"{mounts[0].mountpoint}/containers/{container.id}/rootfs",
        container.name,
        settings,
        args,
        user,
        has_terminal=has_terminal,
        rootless_as=(os.geteuid(), os.getegid()) if is_rootless else None,
    )
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, "config.json")
    try:
        with open(path, "x", encoding="utf-8") as file:
            try:
                json.dump(spec, file, indent=2)
                file.write("\n")
                file.flush()
            except BaseException:
                os.unlink(path)  # half of it would be in the way of the next
                raise
    except FileExistsError:
        raise Exists(f"{path} is there already: remove it, or name another directory") from None


def _user_of(store: Store, container_id: str, text: str) -> User:
    with snapshot(store, container_id) as tree:
        return find_user(text, lambda path: _read(tree, os.fsencode(path)))


def _read(tree: Rootfs, path: bytes) -> str:
    """A file's text; "" if it is not there. Raises BadInput."""
    shown = f"/{os.fsdecode(path)} of the container"
    try:
        thing = _follow(tree, path)
    except NotFound:
        return ""
    except RecursionError:
        raise BadInput(f"{shown} is a loop of links: mend it") from None
    size = tree.attr(thing).size
    if not stat.S_ISREG(tree.attr(thing).mode) or size > _FILE_MAX:
        raise BadInput(f"{shown} is no file of at most {_FILE_MAX} bytes: mend it")
    file = tree.open_for(thing, os.O_RDONLY)
    try:
        return run(file.read(0, size)).decode("utf-8", "replace")
    finally:
        file.close()


def _follow(tree: Rootfs, path: bytes) -> Object:
    """path_resolution(7) in a process whose root is the tree's. Raises NotFound, RecursionError."""
    way: list[Object] = [tree.root]
    names = path.split(b"/")[::-1]
    links = 0
    while names:
        name = names.pop()
        if name in (b"", b"."):
            continue
        if name == b"..":
            way = way[:-1] or [tree.root]
            continue
        if not stat.S_ISDIR(tree.attr(way[-1]).mode):
            raise NotFound(os.strerror(errno.ENOTDIR))
        found = tree.lookup(way[-1], name)
        if stat.S_ISLNK(tree.attr(found).mode):
            links += 1
            if links > _LINKS_MAX:
                raise RecursionError
            target = tree.readlink(found)
            if target.startswith(b"/"):
                way = [tree.root]
            names.extend(target.split(b"/")[::-1])
        else:
            way.append(found)
    return way[-1]
