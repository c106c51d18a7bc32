"""A container that fusestore and the kernel's overlayfs mount in turn, each changing it.

The lower of overlayfs is what umoci unpacks of the image, its upper the container's diff/. Each turn is a
mount of its own; whoever comes next sees what was left, byte for byte and xattr for xattr.
"""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rig.dictmodel import TreeModel, settled
from rig.layers import Member, tar_layer
from rig.mounts import Mount
from rig.ocisources import SourceMaker
from rig.people import Person, as_root
from rig.snapshot import Snapshot, differences
from rig.treecalls import RealTree, errno_from
from rig.treestrategies import Call, aimed, calls, images, profile

pytestmark = [pytest.mark.mounted, pytest.mark.images]

_NLINK = frozenset({"nlink"})
"""overlayfs: always 1 for directories; for hard-linked files names that are hidden are counted."""

Turn = tuple[bool, list[Call]]
"""Whether it is the kernel's, and what is called."""


class _Container:
    """One container of a new image, and what umoci makes of that."""

    def __init__(self, mount: Mount, image: list[list[Member]]) -> None:
        self._mount = mount
        self.name = mount.new_id()
        self._base = mount.base / self.name
        source = SourceMaker()
        source.add(source.image([tar_layer(members) for members in image]), self.name)
        layout = source.directory(self._base / "source").removeprefix("oci:")
        self._bundle = self._base / "bundle"
        command = ("umoci", "unpack", "--image", f"{layout}:{self.name}", self._bundle)
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        mount.fusestore("import", f"oci:{layout}:{self.name}").ok()
        mount.fusestore("create", self.name, self.name).ok()

    @contextmanager
    def fusestores(self) -> Iterator[Path]:
        self._mount.mount()
        yield self._mount.containers / self.name / "rootfs"
        self._mount.umount()

    @contextmanager
    def kernels(self) -> Iterator[Path]:
        own = self._mount.store / "containers" / self.name
        merged = self._base / "merged"
        merged.mkdir(exist_ok=True)
        options = (
            f"redirect_dir=on,index=off,lowerdir={self._bundle / 'rootfs'},"
            f"upperdir={own / 'diff'},workdir={own / 'work'}"
        )
        subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", merged], check=True, timeout=60)
        try:
            yield merged
        finally:
            subprocess.run(["umount", merged], check=True, timeout=60)

    def take_turn(self, is_kernels: bool, todo: list[Call]) -> tuple[Snapshot, list[int], Snapshot]:
        """What is seen before and after, and the errno of each call."""
        with self.kernels() if is_kernels else self.fusestores() as root:
            return self._mount.person.call(_take_turn, root, todo)

    def remove(self) -> None:
        self._mount.fusestore("rm", self.name).ok()
        shutil.rmtree(self._base)


def _take_turn(root: Path, todo: list[Call]) -> tuple[Snapshot, list[int], Snapshot]:
    with closing(RealTree(root)) as tree:
        before = tree.snapshot()
        return before, [errno_from(getattr(tree, name), *more) for name, more in todo], tree.snapshot()


@pytest.fixture(scope="module")
def hands(person: Person, area: Path) -> Iterator[Mount]:
    """A store that is mounted for a turn at a time."""
    mount = Mount(person, area / "hands")
    yield mount
    mount.close()


_turns = st.lists(st.tuples(st.booleans(), st.lists(calls(), max_size=12)), min_size=1, max_size=5)


@as_root
@profile(ci=50, long=500)
@given(images(hard_links=False, implied=False), _turns)
def test_whoever_comes_next_sees_what_was_left(
    hands: Mount, image: list[list[Member]], turns: list[Turn]
) -> None:
    model = TreeModel(image)
    container = _Container(hands, image)
    left, _, _ = container.take_turn(False, [])
    for is_kernels, todo in [*turns, (False, []), (True, [])]:
        wanted, expected = [], []
        for call in todo:
            name, arguments = aimed(call, model)
            wanted.append((name, arguments))
            expected.append(errno_from(getattr(model, name), *arguments))
        before, results, after = container.take_turn(is_kernels, wanted)
        assert differences(left, before, ignore=_NLINK) == []
        assert list(zip(wanted, results, strict=True)) == list(zip(wanted, expected, strict=True))
        assert differences(settled(model.snapshot(), after), after, ignore=_NLINK) == []
        left = after
    container.remove()
