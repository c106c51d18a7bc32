"""A container's rootfs against a model of dicts: random images, random calls, forgetting and opening again.

After every few calls the whole tree is compared: names, types, modes, owners, link counts, sizes, content,
targets, xattrs, times, and which names are one file. `rig.treecalls.FakeKernel` checks on the way that what
the kernel knows keeps its node and number, and that lookup and listing agree.

A hard link in a directory that was renamed may lose its file on copy-up unless the kernel knows it (design of
the union): so once a directory moved, the tree is looked at whenever the kernel has forgotten it.
"""

import errno
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
from rig.dictmodel import TreeModel, settled
from rig.layers import Member, layer
from rig.snapshot import Snapshot, differences
from rig.treecalls import CALLER, Area, FakeKernel, errno_from
from rig.treestrategies import Call, calls, contents, images, modes, paths, profile

from fusestore.inodes import Changes
from fusestore.upper import Scheme

_SLOTS = st.integers(0, 3)
_OFFSETS = st.sampled_from((0, 3, 6000))
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
        self.moved = False

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
        name, arguments = call
        is_move = name == "rename"
        self.moved |= not self.both(name, *arguments) and is_move

    @rule(call=calls(), looks=st.booleans())
    def call(self, call: Call, looks: bool) -> None:
        self._call(call)
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

    @rule(path=paths, size=st.sampled_from((None, 0, 3)), mode=modes, meanwhile=calls(), early=st.booleans())
    def overlap(self, path: bytes, size: int | None, mode: int, meanwhile: Call, early: bool) -> None:
        """setattr, and while it copies a file, before or after the copying itself, another call."""
        try:
            thing = self.model.openable(self.model._at(path))
        except OSError:
            return
        changes = Changes(mode=mode, size=size)
        steps = self.kernel.rootfs.setattr(self.kernel.node(path), changes, CALLER)
        copy = next(steps, None) if steps is not None else None
        if copy is None:
            self._apply(thing, changes)
            self._call(meanwhile)
            return
        if early:
            self._call(meanwhile)
        copy()
        if not early:
            self._call(meanwhile)
        assert next(steps, None) is None
        self._apply(thing, changes)
        self.look()

    def _apply(self, thing: Any, changes: Changes) -> None:
        if changes.size is not None:
            self.model.resize(thing, changes.size)
        thing.mode = changes.mode

    # What the kernel knows

    @rule()
    def forget(self) -> None:
        self.kernel.forget()
        if self.moved:
            self.look()

    @rule()
    def open_again(self) -> None:
        assert self.area is not None
        self.kernel.detach()
        for slot in self.held:
            self.model.release(slot)
        self.held.clear()
        self.kernel = self.area.kernel()
        if self.moved:
            self.look()


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
    run_state_machine_as_test(machine, settings=profile(ci=60, long=3000, stateful_step_count=30))
