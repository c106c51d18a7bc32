"""What the rig does when tests hang or are killed: nothing of them is left to those that follow."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rig.images import Images
from rig.mounts import Mount, abort_all, make_area, sweep, wait_until
from rig.people import Person

pytestmark = [pytest.mark.mounted, pytest.mark.images]


def test_an_aborted_mount_is_revived(fresh: Mount) -> None:
    abort_all()
    assert fresh.sh("ls images").code != 0
    fresh.revive()
    assert fresh.sh("ls").ok().split() == ["containers", "images", "views"]


def test_what_a_killed_test_process_left_is_swept(person: Person, images: Images, area: Path) -> None:
    """Its area is one of a process that has ended."""
    (area / "swept").mkdir()
    pid = os.fork()
    if pid == 0:
        make_area(str(area / "swept"))
        os._exit(0)
    os.waitpid(pid, 0)
    (left,) = (area / "swept").iterdir()
    mount = Mount(person, left / "place")
    mount.fusestore("import", images.busybox.source).ok()
    mount.fusestore("mount", mount.mountpoint).ok()
    sweep(str(area / "swept"))
    wait_until(lambda: mount.pids() == [])
    assert not mount.is_mounted()
    assert not left.exists()
    (area / "swept").rmdir()


def test_several_sweep_at_once(tmp_path: Path) -> None:
    """As the workers of one run do when it starts."""
    pid = os.fork()
    if pid == 0:
        for _ in range(20):
            left = make_area(str(tmp_path))
            for number in range(20):
                (left / str(number)).mkdir()
        os._exit(0)
    os.waitpid(pid, 0)
    with ThreadPoolExecutor(4) as pool:
        for swept in [pool.submit(sweep, str(tmp_path)) for _ in range(4)]:
            swept.result()
    assert list(tmp_path.iterdir()) == []
