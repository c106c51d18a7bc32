"""Each program in examples/ does what it says, on a real store."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rig.mounts import Mount
from rig.people import Result, as_root

pytestmark = [pytest.mark.mounted, pytest.mark.images]

_EXAMPLES = Path(__file__).parents[2] / "examples"


def _run(mount: Mount, name: str, *arguments: str | Path) -> Result:
    # A copy where every user may read it: the checkout may lie in a closed home.
    copy = mount.base.parent / name
    shutil.copy(_EXAMPLES / name, copy)
    return mount.person.run(sys.executable, copy, *arguments, env=mount.environment)


def test_throwaway_leaves_nothing(mounted: Mount) -> None:
    before = os.listdir(mounted.store / "containers")
    shown = _run(mounted, "throwaway.py", mounted.store, "debian").ok()
    assert "['/bin/bash']" in shown
    document = json.loads(shown[shown.index("{") : shown.rindex("}") + 1])
    assert document["purpose"] == "an example"
    assert sorted(os.listdir(mounted.store / "containers")) == sorted(before)


def test_throwaway_says_what_is_wrong(mounted: Mount) -> None:
    result = _run(mounted, "throwaway.py", mounted.store, "no-such-image")
    assert result.code == 1
    assert result.err.startswith("throwaway: ") and result.err.count("\n") == 1


def test_run_in_fresh_root_runs_a_command(mounted: Mount) -> None:
    script = "echo hello > /root/x; cat /root/x; hostname=$(cat /etc/hostname); echo $hostname; exit 3"
    result = _run(mounted, "run_in_fresh_root.py", mounted.mountpoint, "sh", "-c", script)
    assert (result.code, result.out) == (3, "hello\nbusybox\n")
    assert "run-" not in mounted.sh("ls containers").ok()


def test_layer_changes_tells_what_a_layer_did(mounted: Mount) -> None:
    lines = _run(mounted, "layer_changes.py", mounted.mountpoint, "debian").ok().splitlines()
    changes = {line for line in lines if line.startswith("1 ") and " lower" in line}
    assert {
        "1 - lower/gone",
        "1 - lower/kept/file2",
        "1 - lower/opaque/deep/file1",
        "1 + lower/opaque/new",
        "1 ~ lower/becomes-file",
        "1 ~ lower/chmod-later",
        "1 + lower/becomes-directory/inside",
        "1 + lower/link-of-lower",
    } <= changes
    assert not [line for line in changes if "kept/file0" in line or "linked" in line]


def test_the_systemd_unit_is_valid(tmp_path: Path) -> None:
    unit = tmp_path / "fusestore.service"
    command = str(Path(sys.executable).parent / "fusestore")
    text = (_EXAMPLES / unit.name).read_text()
    unit.write_text(text.replace("/usr/local/bin/fusestore", command))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert text.count("/usr/local/bin/fusestore") == 2


@as_root
def test_mount_mounts_the_line_of_the_fstab(unmounted: Mount) -> None:
    """In a mount namespace, where the command is in /usr/local/bin."""
    line = (_EXAMPLES / "fstab").read_text()
    fstab = unmounted.base / "fstab"
    fstab.write_text(
        line.replace("/var/lib/fusestore", str(unmounted.store))
        .replace("/srv/fusestore", str(unmounted.base / "new"))
        .replace("nofail", f"nofail,run_dir={unmounted.run_dir}")
    )
    script = """
        mount -t tmpfs none /usr/local/bin; ln -s "$(command -v fusestore)" /usr/local/bin
        mount --fstab fstab new
        findmnt --noheadings --output FSTYPE new
        mount --fstab fstab --all
        mkdir new/containers/c; cat new/containers/c/rootfs/etc/hostname
        fusestore umount new
        mount -t fuse.fusestore "$FUSESTORE_STORE" new -o ro 2>&1 | grep -o 'ro is not known'
    """
    result = unmounted.person.run("unshare", "--mount", "bash", "-uc", script, cwd=unmounted.base,
                                  env=unmounted.environment)  # fmt: skip
    assert result.ok() == "fuse.fusestore\nbusybox\nro is not known\n"
