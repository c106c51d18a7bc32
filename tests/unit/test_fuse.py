"""The FUSE layer without a kernel: what it does with what the tree raises."""

import errno
from types import SimpleNamespace
from typing import Any, cast

import pyfuse3
import pytest
import trio
import trio.testing

from fusestore import errors
from fusestore.fuse import Filesystem
from fusestore.inodes import FileHandle, Inodes, Node
from fusestore.tree import Tree

_CONTEXT = cast(pyfuse3.RequestContext, SimpleNamespace(uid=0, gid=0, pid=1, umask=0))


class _LockedTree:
    """Its files cannot be opened the first times."""

    def __init__(self, times: float) -> None:
        self.inodes = Inodes()
        self.times = times
        self.tries = 0

    def rest(self) -> None:
        pass

    def open(self, *_: object) -> tuple[int, FileHandle]:
        self.tries += 1
        if self.tries <= self.times:
            raise errors.Locked("by another process")
        return 7, FileHandle(cast(Node, None))


def _open(tree: _LockedTree) -> Any:
    filesystem = Filesystem(cast(Tree, tree), enable_acl=True)
    clock = trio.testing.MockClock(autojump_threshold=0)
    return trio.run(filesystem.open, 1, 0, _CONTEXT, clock=clock)


def test_what_is_locked_is_tried_again() -> None:
    tree = _LockedTree(times=3)
    assert (_open(tree).fh, tree.tries) == (7, 4)


def test_what_stays_locked_is_busy() -> None:
    tree = _LockedTree(times=float("inf"))
    with pytest.raises(pyfuse3.FUSEError) as caught:
        _open(tree)
    assert caught.value.errno == errno.EBUSY
    assert tree.tries > 3
