"""The upper directory is the kernel's format: overlayfs reads and writes what the union reads and writes.

What overlayfs shows otherwise, and is left out: the link count of directories (always 1) and of hard-linked
files (names that are hidden are counted).
"""

import hashlib
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rig.dictmodel import TreeModel, presence, settled
from rig.layers import Member, layer, unpack_layer
from rig.snapshot import Snapshot, differences
from rig.treecalls import Area, FakeKernel, RealTree, errno_from
from rig.treestrategies import Call, aimed, calls, images, profile

from fusestore.scheme import Scheme

pytestmark = pytest.mark.root

_EMPTY = hashlib.sha256().hexdigest()


@contextmanager
def _overlay(area: Area) -> Iterator[RealTree]:
    """The kernel's mount of the upper in `area` over the layers that `_unpack` put there.

    In the plain scheme as in a user namespace, where overlayfs follows no redirects.
    """
    merged = area.path / "merged"
    merged.mkdir(exist_ok=True)
    (area.path / "work").mkdir(exist_ok=True)
    lower = ":".join(str(_layer_path(area, number)) for number in reversed(range(len(area.layers))))
    scheme = "redirect_dir=on,index=off" if area.scheme is Scheme.NATIVE else "userxattr"
    options = f"lowerdir={lower},upperdir={area.diff},workdir={area.path / 'work'},{scheme}"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", merged], check=True, timeout=60)
    try:
        with closing(RealTree(merged)) as tree:
            yield tree
    finally:
        subprocess.run(["umount", "-l", merged], check=True, timeout=60)


@contextmanager
def _union(area: Area) -> Iterator[FakeKernel]:
    kernel = area.kernel()
    try:
        yield kernel
    finally:
        kernel.forget()
        kernel.rootfs.detach()  # not `kernel.detach`: it would count what an overlay beside it did


def _layer_path(area: Area, number: int) -> Path:
    return area.path / f"layer{number}"


def _unpack(area: Area, image: list[list[Member]]) -> None:
    for number, members in enumerate(image):
        path = _layer_path(area, number)
        path.mkdir()
        unpack_layer(members, path, area.scheme.value)


def _check(expected: Snapshot, found: Snapshot) -> None:
    wrong = differences(expected, found, ignore=frozenset(("nlink",)))
    assert not wrong, "\n".join(wrong)


@profile(ci=60, long=1500)
@given(
    images(hard_links=False, implied=False),
    st.lists(st.tuples(st.booleans(), st.lists(calls(), max_size=12)), min_size=1, max_size=5),
)
def test_a_container_changes_hands(image: list[list[Member]], turns: list[tuple[bool, list[Call]]]) -> None:
    model = TreeModel(image)
    with closing(Area([layer(*members) for members in image])) as area:
        _unpack(area, image)
        for is_kernels, todo in turns:
            with (_overlay if is_kernels else _union)(area) as tree:
                for call in todo:
                    name, arguments = aimed(call, model)
                    expected = errno_from(getattr(model, name), *arguments)
                    assert (name, arguments, errno_from(getattr(tree, name), *arguments)) == (
                        name,
                        arguments,
                        expected,
                    )
                found = tree.snapshot()
                _check(settled(model.snapshot(), found), found)
        with _union(area) as mine, _overlay(area) as theirs:
            found = mine.snapshot()
            _check(settled(model.snapshot(), found), found)
            _check(found, theirs.snapshot())


@profile(ci=60, long=1500)
@given(
    images(lower_links=False, implied=False), st.lists(calls(), max_size=25), st.lists(calls(), max_size=25)
)
def test_hard_links_read_the_same(image: list[list[Member]], mine: list[Call], theirs: list[Call]) -> None:
    """overlayfs copies up one name of several: so there is no model, but both see one tree."""
    with closing(Area([layer(*members) for members in image])) as area:
        _unpack(area, image)
        for make, todo in ((_union, mine), (_overlay, theirs)):
            with make(area) as tree:
                for name, arguments in todo:
                    errno_from(getattr(tree, name), *arguments)
            with _union(area) as union, _overlay(area) as overlay:
                _check(presence(union.snapshot()), presence(overlay.snapshot()))


def _is_directory_move(model: TreeModel, call: Call) -> bool:
    name, arguments = call
    ends = [dict(model.walk()).get(path) for path in arguments[:2]] if name == "rename" else []
    return any(end is not None and end.is_directory for end in ends)


def _as_a_plain_user_keeps_it(tree: Snapshot) -> Snapshot:
    """What the files themselves have: owner, mode, devices and foreign xattrs are the store's own."""
    return {
        path: replace(
            entry,
            type="file" if entry.type == "char" else entry.type,
            size=None,
            sha256=entry.sha256 or (_EMPTY if entry.type == "char" else None),
            mode=0,
            uid=0,
            gid=0,
            rdev=0,
            xattrs=tuple((key, value) for key, value in entry.xattrs if _is_plain_xattr(key)),
        )
        for path, entry in tree.items()
    }


def _is_plain_xattr(name: str) -> bool:
    return name.startswith("user.") and not name.startswith("user.fusestore.")


@profile(ci=60, long=1500)
@given(images(hard_links=False, implied=False), st.lists(calls(), max_size=40))
def test_the_kernel_reads_a_plain_users_upper(image: list[list[Member]], todo: list[Call]) -> None:
    model = TreeModel(image, keeps_owners=False)
    with closing(Area([layer(*members) for members in image], Scheme.PLAIN)) as area:
        _unpack(area, image)
        with _union(area) as tree:
            for call in todo:
                name, arguments = aimed(call, model)
                if not _is_directory_move(model, (name, arguments)):
                    expected = errno_from(getattr(model, name), *arguments)
                    assert errno_from(getattr(tree, name), *arguments) == expected
            found = _as_a_plain_user_keeps_it(tree.snapshot())
        with _overlay(area) as theirs:
            _check(found, _as_a_plain_user_keeps_it(theirs.snapshot()))
