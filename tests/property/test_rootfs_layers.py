"""The union of random layers is what unpacking them one over the other makes."""

from contextlib import closing

import pytest
from hypothesis import given
from rig.dictmodel import TreeModel, settled
from rig.layers import Member, layer
from rig.snapshot import differences
from rig.treecalls import Area
from rig.treestrategies import images, profile

pytestmark = pytest.mark.root


@profile(ci=100, long=2000)
@given(images())
def test_layers_merge_as_they_unpack(image: list[list[Member]]) -> None:
    model = TreeModel(image)
    with closing(Area([layer(*members) for members in image])) as area:
        kernel = area.kernel()
        found = kernel.snapshot()
        assert not differences(settled(model.snapshot(), found), found)
        kernel.detach()
