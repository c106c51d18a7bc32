"""Random images and random calls on them, on few names, so that they meet. Pure."""

import os
import stat
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from rig.dictmodel import TreeModel
from rig.layers import Member, device, directory, fifo, file, hard_link, opaque, symlink, whiteout

from fusestore.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE

__all__ = ["PATHS", "Call", "aimed", "calls", "contents", "images", "modes", "paths", "profile"]

Call = tuple[str, tuple[Any, ...]]
"""A method of the trees in `rig.treecalls`, and its arguments."""

_NAMES = (b"a", b"b", b"c", b"\xff")
_DEPTHS = (
    _NAMES,
    tuple(b"%b/%b" % (head, name) for head in _NAMES[:3] for name in _NAMES[:3]),
    tuple(b"%b/%b/%b" % (x, y, z) for x in _NAMES[:2] for y in _NAMES[:2] for z in _NAMES[:2]),
)
PATHS = tuple(path for depth in _DEPTHS for path in depth)

paths = st.sampled_from(PATHS)
modes = st.sampled_from((0o644, 0o600, 0o755, 0o4755, 0o2755, 0o500))
contents = st.sampled_from((b"", b"x", b"hello", b"0123456789" * 1000))
_MTIMES = st.sampled_from((0, 10**9 + 1, 1_600_000_000_987_654_321))
_OWNERS = st.sampled_from((0, 1, 1000))
_XATTRS = st.sampled_from(
    (
        (b"user.k", b"v"),
        (b"user.k", b"w"),
        (b"trusted.t", b""),
        (b"user.overlay.x", b"1"),
        (b"trusted.overlay.opaque", b"y"),
    )
)
_NULL = os.makedev(1, 3)
_DIRECTORIES = ("directory", "opaque", "renewed", "marker")


def profile(ci: int, long: int, **more: Any) -> settings:
    """Examples by FUSESTORE_TEST_PROFILE (`ci`, the default, or `long`); no deadline, for a disk is in it."""
    name = os.environ.get("FUSESTORE_TEST_PROFILE", "ci")
    return settings(max_examples={"ci": ci, "long": long}[name], deadline=None, **more)


@st.composite
def _members(draw: st.DrawFn, path: bytes, kind: str) -> list[Member]:
    more: dict[str, Any] = {"uid": draw(_OWNERS), "gid": draw(_OWNERS), "mtime_ns": draw(_MTIMES)}
    if kind == "symlink":
        return [symlink(path, draw(st.sampled_from((b"a", b"../b", b"/c"))), **more)]
    if kind == "device":
        return [device(path, _NULL, mode=0o600, **more)]
    if kind == "fifo":
        return [fifo(path, mode=0o600, **more)]
    more |= {"xattrs": draw(st.sampled_from(((), ((b"user.k", b"layer"),)))), "mode": draw(modes)}
    if kind == "file":
        return [file(path, draw(contents), **more)]
    made = [directory(path, **more)]
    if kind == "renewed":
        return [*made, whiteout(path)]
    return made if kind == "directory" else [*made, opaque(path)]


@st.composite
def images(
    draw: st.DrawFn, hard_links: bool = True, lower_links: bool = True, implied: bool = True
) -> list[list[Member]]:
    """One to three layers.

    Without `implied`, each is what overlayfs leaves of changes: all its directories have entries, and
    a whiteout hides something.
    """
    kinds = [
        "file", "directory", "file", "directory", "symlink", "whiteout", "opaque", "device",
        "fifo", *(["hard link"] if hard_links else []), *(["marker", "renewed"] if implied else []),
    ]  # fmt: skip
    layers: list[list[Member]] = []
    files_below: list[bytes] = []
    for _ in range(draw(st.integers(1, 3))):
        wanted = draw(st.dictionaries(paths, st.sampled_from(kinds), min_size=1, max_size=10))
        members: list[Member] = []
        placed: dict[bytes, str] = {}
        for path in sorted(wanted, key=lambda path: (path.count(b"/"), path)):
            kind = wanted[path]
            above = _ancestors(path)
            if any(placed.get(at, "directory") not in _DIRECTORIES for at in above):
                continue
            if kind == "hard link":
                targets = [at for at, there in placed.items() if there == "file"]
                if lower_links:
                    targets += [at for at in files_below if not any(_covers(at, name) for name in wanted)]
                if not targets:
                    continue
                made = [hard_link(path, draw(st.sampled_from(targets)))]
            elif kind == "whiteout":
                made = [whiteout(path)]
            elif kind == "marker":
                made = [opaque(path)]
            else:
                made = draw(_members(path, kind))
            if not implied:
                for at in above:
                    if at not in placed:
                        members.append(directory(at))
                        placed[at] = "directory"
            members += made
            placed[path] = kind
        if not implied:
            _drop_idle_whiteouts(members, TreeModel(layers))
        layers.append(members)
        files_below = [
            at for at in files_below if not any(_covers(name, at) or _covers(at, name) for name in placed)
        ]
        files_below += [at for at, kind in placed.items() if kind in ("file", "hard link")]
    return layers


def _drop_idle_whiteouts(members: list[Member], below: TreeModel) -> None:
    opaques = {os.path.dirname(member.path) for member in members if member.path.endswith(b"/.wh..wh..opq")}
    exists = {path for path, _ in below.walk()}
    for member in list(members):
        head, name = os.path.split(member.path)
        if name.startswith(b".wh.") and name != b".wh..wh..opq":
            hidden = os.path.join(head, name.removeprefix(b".wh."))
            if hidden not in exists or any(_covers(at, hidden) for at in opaques):
                members.remove(member)


def _ancestors(path: bytes) -> list[bytes]:
    names = path.split(b"/")
    return [b"/".join(names[:count]) for count in range(1, len(names))]


def _covers(name: bytes, path: bytes) -> bool:
    return (path + b"/").startswith(name + b"/")


def aimed(call: Call, model: TreeModel) -> Call:
    """`call`, mostly at something that is there: random paths alone would seldom meet."""
    name, arguments = call
    if name in ("create", "mkdir", "mknod", "symlink"):
        return call
    there = sorted(path for path, _ in model.walk() if path != b".")
    number = PATHS.index(arguments[0])
    if not there or arguments[0] in there or number % 5 == 0:
        return call
    return name, (there[number % len(there)], *arguments[1:])


def calls() -> st.SearchStrategy[Call]:
    """Any call that names its objects by path."""
    flags = st.sampled_from((0, 0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE))
    data = st.sampled_from((b"", b"new", b"z" * 5000))
    formats = st.sampled_from(
        ((stat.S_IFIFO, 0), (stat.S_IFCHR, _NULL), (stat.S_IFREG, 0), (stat.S_IFSOCK, 0))
    )
    return st.one_of(
        st.tuples(st.just("create"), st.tuples(paths, modes, data)),
        st.tuples(st.just("mkdir"), st.tuples(paths, modes)),
        st.tuples(st.just("rename"), st.tuples(paths, paths, flags)),
        st.tuples(st.just("rename"), st.tuples(paths, paths, flags)),
        st.tuples(st.just("unlink"), st.tuples(paths)),
        st.tuples(st.just("rmdir"), st.tuples(paths)),
        st.tuples(st.just("link"), st.tuples(paths, paths)),
        st.tuples(st.just("write"), st.tuples(paths, st.sampled_from((0, 3, 6000)), data)),
        st.tuples(st.just("overwrite"), st.tuples(paths, data)),
        st.tuples(st.just("truncate"), st.tuples(paths, st.sampled_from((0, 1, 5, 5000)))),
        st.tuples(st.just("symlink"), st.tuples(paths, st.just(b"a/target"))),
        st.tuples(paths, modes, formats).map(lambda x: ("mknod", (x[0], x[2][0], x[1] & 0o777, x[2][1]))),
        st.tuples(st.just("chmod"), st.tuples(paths, modes)),
        st.tuples(st.just("chown"), st.tuples(paths, _OWNERS, _OWNERS)),
        st.tuples(st.just("utimens"), st.tuples(paths, _MTIMES)),
        st.tuples(paths, _XATTRS).map(lambda x: ("set_xattr", (x[0], *x[1]))),
        st.tuples(paths, _XATTRS).map(lambda x: ("remove_xattr", (x[0], x[1][0]))),
    )
