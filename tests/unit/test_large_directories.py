"""A directory of many files: each costs as much work as among few, counted in calls, not in time."""

import sys
from collections.abc import Callable
from types import FrameType

import pytest
from rig.layers import directory, file, layer
from rig.treecalls import Area, FakeKernel

pytestmark = pytest.mark.root

FEW, MANY = 50, 500


def _calls(work: Callable[[], object]) -> int:
    """How many functions are called by `work`, of Python and of C."""
    count = 0

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def _names(count: int) -> list[bytes]:
    return [b"d/%d" % number for number in range(count)]


def _create(kernel: FakeKernel, count: int) -> None:
    for name in _names(count):
        kernel.create(name, 0o644, b"")


def _make_directories(kernel: FakeKernel, count: int) -> None:
    for name in _names(count):
        kernel.mkdir(name, 0o755)


def _unlink(kernel: FakeKernel, count: int) -> None:
    for name in _names(count):
        kernel.unlink(name)


def _rmdir(kernel: FakeKernel, count: int) -> None:
    for name in _names(count):
        kernel.rmdir(name)


def _rename(kernel: FakeKernel, count: int) -> None:
    for name in _names(count):
        kernel.rename(name, name + b".new", 0)


def _write(kernel: FakeKernel, count: int) -> None:
    for name in _names(count):
        kernel.write(name, 0, b"x")


def _list(kernel: FakeKernel, count: int) -> None:
    assert len(kernel.snapshot()) == count + 2
    kernel.forget()


Work = Callable[[FakeKernel, int], None]
WORKS: dict[str, tuple[list[Work], Work]] = {
    "create": ([], _create),
    "mkdir": ([], _make_directories),
    "list": ([_create], _list),
    "unlink": ([_create], _unlink),
    "rmdir": ([_make_directories], _rmdir),
    "rename": ([_create], _rename),
}
"""What is done before, and what is measured."""


def _cost(layers: list[object], before: list[Work], work: Work, count: int) -> float:
    """Calls for each file."""
    area = Area([layer(*layers)])  # type: ignore[arg-type]
    kernel = area.kernel()
    for step in before:
        step(kernel, count)
    calls = _calls(lambda: work(kernel, count))
    kernel.forget()
    kernel.rootfs.detach()  # not `kernel.detach`: what a directory grows by is not counted (quota.py)
    area.close()
    return calls / count


@pytest.mark.parametrize("what", WORKS)
def test_a_file_costs_as_much_in_a_large_directory(what: str) -> None:
    before, work = WORKS[what]
    few, many = (_cost([directory(b"d")], before, work, count) for count in (FEW, MANY))
    assert many < few * 1.1


@pytest.mark.parametrize("work", [_list, _unlink, _rename, _write])
def test_a_file_of_a_layer_costs_as_much_in_a_large_directory(work: Work) -> None:
    few, many = (
        _cost([directory(b"d"), *(file(name, b"x") for name in _names(count))], [], work, count)
        for count in (FEW, MANY)
    )
    assert many < few * 1.1
