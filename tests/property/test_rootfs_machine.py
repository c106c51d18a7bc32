"""A container's rootfs against a model of dicts: random images, random calls, forgetting and opening again.

After every few calls the whole tree is compared: names, types, modes, owners, link counts, sizes, content,
targets, xattrs, times, and which names are one file. `rig.treecalls.FakeKernel` checks on the way that what
the kernel knows keeps its node and number, and that lookup and listing agree.
"""

import errno
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import pytest
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from rig.dictmodel import Thing, TreeModel, settled
from rig.layers import Member, layer
from rig.snapshot import Snapshot, differences
from rig.treecalls import CALLER, Area, FakeKernel, errno_from
from rig.treestrategies import Call, aimed, calls, contents, images, modes, paths, profile

from fusestore.inodes import Changes
from fusestore.scheme import Scheme

_SLOTS = st.integers(0, 3)
_OFFSETS = st.sampled_from((0, 3, 6000))
Start = tuple[bytes, int | None, int]
_STARTS = st.tuples(paths, st.sampled_from((None, 0, 3)), modes)
_UNOWNED = frozenset(("symlink", "fifo", "socket"))


class RootfsMachine(RuleBasedStateMachine):
    """One container's life."""

    scheme: ClassVar[Scheme]

    def __init__(self) -> None:
        super().__init__()
        self.area: Area | None = None
        self.kernel: FakeKernel
        self.model: TreeModel
        self.held: dict[int, bool] = {}

    @initialize(image=images(), capacity=st.sampled_from((16, 1000)))
    def start(self, image: list[list[Member]], capacity: int) -> None:
        self.area = Area([layer(*members) for members in image], self.scheme, capacity)
        self.model = TreeModel(image, keeps_owners=self.scheme is Scheme.NATIVE)
        self.kernel = self.area.kernel()

    def teardown(self) -> None:
        if self.area is None:
            return
        try:
            self.look()
            self.kernel.detach()
            assert not self.kernel.rootfs.in_use
        finally:
            self.area.close()

    def look(self) -> None:
        found = self.kernel.snapshot()
        expected = settled(self.model.snapshot(), found)
        if self.scheme is Scheme.PLAIN:
            expected, found = _without_owners(expected), _without_owners(found)
        wrong = differences(expected, found)
        assert not wrong, "\n".join(wrong)
        for slot in self.held:
            assert self.kernel.held(slot) == self.model.held(slot)

    def both(self, name: str, *arguments: Any) -> int:
        expected = errno_from(getattr(self.model, name), *arguments)
        got = errno_from(getattr(self.kernel, name), *arguments)
        assert errno.errorcode.get(got, got) == errno.errorcode.get(expected, expected)
        return got

    # Calls

    def _call(self, call: Call) -> None:
        name, arguments = aimed(call, self.model)
        self.both(name, *arguments)

    @rule(call=calls(), looks=st.booleans(), exhausts=st.booleans())
    def call(self, call: Call, looks: bool, exhausts: bool) -> None:
        self._call(call)
        if exhausts:
            self.kernel.exhaust()
        if looks:
            self.look()

    @rule(path=paths, offset=_OFFSETS, data=contents, twice=calls())
    def write_then(self, path: bytes, offset: int, data: bytes, twice: Call) -> None:
        self.both("write", path, offset, data)
        self._call(twice)

    # Open files

    @rule(slot=_SLOTS, path=paths, writable=st.booleans())
    def hold(self, slot: int, path: bytes, writable: bool) -> None:
        assume(slot not in self.held)
        if not self.both("hold", slot, path, writable):
            self.held[slot] = writable

    @precondition(lambda self: self.held)
    @rule(slot=_SLOTS, offset=_OFFSETS, data=contents, size=st.sampled_from((None, 0, 4, 100)))
    def change_held(self, slot: int, offset: int, data: bytes, size: int | None) -> None:
        assume(self.held.get(slot))
        if size is not None:
            self.both("held_truncate", slot, size)
        self.both("held_write", slot, offset, data)

    @precondition(lambda self: self.held)
    @rule(slot=_SLOTS, mode=modes)
    def chmod_held(self, slot: int, mode: int) -> None:
        assume(slot in self.held)
        self.both("held_chmod", slot, mode)

    @precondition(lambda self: self.held)
    @rule(slot=_SLOTS)
    def release(self, slot: int) -> None:
        assume(slot in self.held)
        self.both("release", slot)
        del self.held[slot]

    # Two at once

    @rule(first=_STARTS, second=_STARTS, meanwhile=calls(), order=st.permutations((0, 1, 2)))
    def overlap(self, first: Start, second: Start, meanwhile: Call, order: list[int]) -> None:
        """Two changes that copy a file up, with the copying and a third call in any order."""
        going = [step for start in (first, second) if (step := self._begin(*start))]
        for number in order:
            if number == 2:
                self._call(meanwhile)
            elif number < len(going):
                going[number]()
        self.look()

    def _begin(self, path: bytes, size: int | None, mode: int) -> Callable[[], None] | None:
        """Start a setattr; what goes on with it, where it has to wait for a copy."""
        try:
            thing = self.model.openable(self.model.at(path))
        except OSError:
            return None
        changes = Changes(mode=mode, size=size)
        steps = self.kernel.rootfs.setattr(self.kernel.node(path), changes, CALLER)
        copy = next(steps, None) if steps is not None else None
        if copy is None:
            self._apply(thing, changes)
            return None

        def go_on() -> None:
            copy()
            assert next(steps, None) is None
            self._apply(thing, changes)

        return go_on

    def _apply(self, thing: Thing, changes: Changes) -> None:
        if changes.size is not None:
            self.model.resize(thing, changes.size)
        if changes.mode is not None:
            thing.mode = changes.mode

    # What the kernel knows

    @rule(path=paths)
    def forget_one(self, path: bytes) -> None:
        self.kernel.forget_one(path)

    @rule()
    def forget(self) -> None:
        self.kernel.forget()

    @rule()
    def open_again(self) -> None:
        assert self.area is not None
        self.kernel.detach()
        for slot in self.held:
            self.model.release(slot)
        self.held.clear()
        self.kernel = self.area.kernel()


def _without_owners(tree: Snapshot) -> Snapshot:
    """What a plain user's store cannot keep left out: of links, FIFOs and sockets the owner."""
    return {
        path: replace(entry, uid=0, gid=0, mode=entry.mode & 0o777) if entry.type in _UNOWNED else entry
        for path, entry in tree.items()
    }


@pytest.mark.root
@pytest.mark.parametrize("scheme", list(Scheme))
def test_a_rootfs_is_what_the_model_says(scheme: Scheme) -> None:
    machine = type("Machine", (RootfsMachine,), {"scheme": scheme})
    run_state_machine_as_test(machine, settings=profile(ci=120, long=3000, stateful_step_count=30))
