"""The bytes of files that come from a gzip layer, whatever is done to them, checked byte by byte."""

import os
import random
from pathlib import Path

import pytest
from rig.exerciser import exercise
from rig.mounts import Mount
from rig.tinyimages import make_layout

pytestmark = [pytest.mark.mounted, pytest.mark.images]

CALLS = int(os.environ.get("FUSESTORE_TEST_CALLS", "25000"))
"""For each person."""

CALLS_EACH = 5_000
"""So many in each container, half of them before a remount."""

SIZES = (0, 1, 4095, 4096, 100_000, 300_001, 1_200_000)


def _import_random_files(mount: Mount) -> dict[str, bytes]:
    chance = random.Random(1)
    files = {f"f{size}": chance.randbytes(size) for size in SIZES}
    layout = mount.base / "layout"
    make_layout(layout, "random", [files])
    mount.fusestore("import", f"oci:{layout}:random").ok()
    return files


@pytest.mark.by_union  # by the others O_DIRECT wants blocks, as the file system below does
def test_a_file_holds_what_was_written_to_it(fresh: Mount) -> None:
    files = _import_random_files(fresh)
    for number in range(CALLS // CALLS_EACH):
        container = f"c{number}"
        fresh.fusestore("create", "random", container).ok()
        rootfs: Path = fresh.containers / container / "rootfs"
        paths, contents = [str(rootfs / name) for name in files], list(files.values())
        for part in range(2):
            contents = fresh.person.call(
                exercise, paths, contents, 2 * number + part, CALLS_EACH // 2, deadline_s=120
            )
            fresh.umount()
            fresh.mount()
        # As the next mount shows them, and nothing but them.
        assert fresh.person.call(exercise, paths, contents, 0, 0) == contents
        assert sorted(os.fsdecode(name) for name in fresh.person.call(os.listdir, rootfs)) == sorted(files)
        fresh.fusestore("rm", container).ok()
