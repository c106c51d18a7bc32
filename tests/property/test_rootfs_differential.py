"""The same calls on a rootfs and in a directory of the file system that lies below it: errors and trees."""

from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rig.dictmodel import TreeModel, presence
from rig.layers import Member, layer
from rig.snapshot import differences
from rig.treecalls import Area, RealTree, errno_from
from rig.treestrategies import Call, aimed, calls, images, profile

pytestmark = pytest.mark.root


@profile(ci=100, long=2000)
@given(images(), st.lists(calls(), max_size=40), st.integers(0, 40))
def test_a_rootfs_is_what_a_directory_would_be(
    image: list[list[Member]], todo: list[Call], when: int
) -> None:
    model = TreeModel(image)
    with closing(Area([layer(*members) for members in image])) as area:
        kernel = area.kernel()
        with closing(RealTree.made(area.path / "real", model)) as real:
            for number, call in enumerate(todo):
                name, arguments = aimed(call, model)
                errno_from(getattr(model, name), *arguments)
                expected = errno_from(getattr(real, name), *arguments)
                found = errno_from(getattr(kernel, name), *arguments)
                assert (name, arguments, found) == (name, arguments, expected)
                if number in (when, len(todo) - 1):
                    kernel.snapshot()  # to meet the hard links in directories that moved
                    assert not differences(presence(real.snapshot()), presence(kernel.snapshot()))
        kernel.detach()
