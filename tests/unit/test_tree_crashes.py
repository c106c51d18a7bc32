"""What a crash, a power cut or an error of the disk at each step of each change of a rootfs leaves."""

import os
import shutil
from pathlib import Path

import pytest
from rig.requirements import need
from rig.treecrashes import CHANGES, FAULTS, copy, make_store, states_of, writes

from fusestore.scheme import Scheme

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("unsynced")]

_STRIDE = 11


@pytest.fixture(scope="module", params=list(Scheme), ids=[scheme.word for scheme in Scheme])
def old(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("root", os.geteuid() == 0, "run the tests as root to have owners and devices in a tree")
    place = tmp_path_factory.mktemp("old")
    make_store(place, request.param)
    return place


@pytest.mark.parametrize(
    "name, fault",
    [(name, fault) for fault in FAULTS for name in CHANGES if fault != "power cut" or writes(name)],
)
def test_a_state_that_was_is_left(tmp_path: Path, old: Path, name: str, fault: str) -> None:
    """Of the points one in `_STRIDE`, others for each change; tests/bench/crashes.py tries all."""
    kind, judge = FAULTS[fault]
    states = states_of(name, copy(old, tmp_path / "done"))
    for point in range(len(name) % _STRIDE, 1000, _STRIDE):
        place = copy(old, tmp_path / str(point))
        outcome = judge(name, place, states, kind(point))
        assert not outcome.wrong, f"at point {point}: {outcome.wrong}"
        assert not outcome.left, f"at point {point}: {outcome.left}"
        shutil.rmtree(place)
        if outcome.is_done:
            return
    pytest.fail("it never came to its end")
