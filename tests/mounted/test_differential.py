"""The same random calls in a container's rootfs and in a copy of the image on the file system below.

Each call gives the same result or the same errno; at the end, and after a remount, both trees are the same.
"""

import os
from pathlib import Path
from typing import Any

import pytest
from rig.mounts import Mount
from rig.randomcalls import Caller
from rig.snapshot import differences, snapshot

pytestmark = [pytest.mark.mounted, pytest.mark.images]

CALLS = int(os.environ.get("FUSESTORE_TEST_CALLS", "3000"))


def _both(first: Path, second: Path, seed: int, calls: int) -> list[tuple[str, Any, Any]]:
    """The calls that did not give the same."""
    callers = [Caller(root, seed) for root in (first, second)]
    different = []
    for _ in range(calls):
        results = []
        for caller in callers:
            os.chdir(caller.root)
            results.append(caller.step())
        (what, here), (_, there) = results
        if here != there:
            different.append((what, here, there))
    return different


@pytest.mark.parametrize("seed", range(3))
def test_random_calls_do_what_they_do_elsewhere(fresh: Mount, seed: int) -> None:
    person, copy, rootfs = fresh.person, fresh.base / "copy", fresh.containers / "d/rootfs"
    # Owners and times of a copy are those of who makes it, and when; a plain user must be let in everywhere.
    preserved = "--preserve=mode,links,xattr" + (",ownership" if person.is_root else "")
    fresh.sh("mkdir containers/d && chmod -R u+rwX $1 && cp -r $2 $1 $3", rootfs, preserved, copy).ok()
    assert person.call(_both, rootfs, copy, seed, CALLS, deadline_s=280) == []
    ignored = frozenset({"mtime_ns"} if person.is_root else {"mtime_ns", "uid", "gid", "rdev"})
    expected = person.call(snapshot, copy)
    assert differences(expected, person.call(snapshot, rootfs), ignore=ignored) == []
    fresh.umount()
    fresh.mount()
    assert differences(expected, person.call(snapshot, rootfs), ignore=ignored) == []
