"""Fifty processes at one store, by the API, the command and two mounts: nothing is lost, stuck or left.

FUSESTORE_TEST_BUSTLE_S: seconds of it. `pytest -s` prints what was done.
"""

import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rig.bustle import CONTESTED, Account, bustle, seen_by_mount, seen_by_store
from rig.mounts import Mount, drop_names, wait_until
from rig.people import as_root

pytestmark = [pytest.mark.mounted, pytest.mark.images]

PROCESSES = 50
SECONDS = float(os.environ.get("FUSESTORE_TEST_BUSTLE_S", "20"))
DESCRIPTORS_KEPT = 8
"""How many more a daemon may have open afterwards: of layers and spans, which it opens once."""


@pytest.fixture
def two_mounts(fresh: Mount, area: Path) -> Iterator[list[Mount]]:
    """Of one store."""
    base = Path(tempfile.mkdtemp(prefix="own-", dir=area))
    base.rmdir()
    second = Mount(fresh.person, base)
    second.store, second.run_dir = fresh.store, fresh.run_dir
    try:
        yield [fresh, second.mount()]
    finally:
        second.close()


def _mounts(mount: Mount) -> int:
    return Path("/proc/self/mountinfo").read_text().count(str(mount.base.parent))


@as_root
@pytest.mark.timeout(SECONDS + 300)
def test_nothing_is_lost_stuck_or_left(two_mounts: list[Mount]) -> None:
    first, second = two_mounts
    person = first.person
    for mount in two_mounts:  # what is opened once, and stays
        mount.sh("mkdir containers/warm && echo > containers/warm/rootfs/f && rmdir containers/warm").ok()
    wait_until(lambda: os.listdir(first.store / "trash") == [], 60)
    files, mounts = first.files(), _mounts(first)
    descriptors = [len(mount.descriptors()) for mount in two_mounts]

    def work(number: int) -> Account:
        environment = person.environment(**first.environment)
        points = [mount.mountpoint for mount in two_mounts]
        return person.call(
            bustle, number, points, first.store, first.run_dir, environment, SECONDS, deadline_s=SECONDS + 90
        )

    with ThreadPoolExecutor(PROCESSES) as threads:
        accounts = list(threads.map(work, range(PROCESSES)))

    assert [line for account in accounts for line in account.wrong] == []
    done = sum((account.done for account in accounts), Counter[str]())
    print(dict(sorted(done.items())))
    assert done["make"] > PROCESSES and done["contested id made"] > 0
    balance = Counter[str]()
    for account in accounts:
        balance.update(account.balance)
    own = {name: number for account in accounts for name, number in account.own.items()}
    expected = own | {name: 0 for name in CONTESTED if balance[name] == 1}
    assert all(balance[name] in (0, 1) for name in CONTESTED)
    assert person.call(seen_by_store, first.store, first.run_dir) == expected
    for mount in two_mounts:
        assert person.call(seen_by_mount, mount.mountpoint) == expected
    assert first.fusestore("check").ok() == ""

    if expected:
        first.fusestore("rm", *sorted(expected)).ok()
    drop_names()
    wait_until(lambda: first.files() == files, 60)
    assert _mounts(first) == mounts
    for mount, before in zip(two_mounts, descriptors, strict=True):
        wait_until(
            lambda mount=mount, before=before: len(mount.descriptors()) <= before + DESCRIPTORS_KEPT, 60
        )  # type: ignore[misc]
    second.umount()
    first.umount()
    assert os.listdir(first.store / "tmp") == [] == os.listdir(first.store / "trash")
    assert first.fusestore("check").ok() == ""
