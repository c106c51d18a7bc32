"""Hydrated images: what the commands say, and who needs the mount's process no more."""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rig.images import Images
from rig.mounts import Mount, wait_until

pytestmark = [pytest.mark.mounted, pytest.mark.images]

ALL_FILES = "find . -xdev -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum"


@pytest.fixture
def store(fresh: Mount, images: Images) -> Mount:
    """A mount of a store with debian, which has two layers."""
    fresh.fusestore("import", images.debian.source, "--name", "debian").ok()
    return fresh


def _hydrated_bytes(mount: Mount) -> int:
    parts = json.loads(mount.fusestore("df", "--json").ok())
    return next(part["size"] for part in parts if part["what"] == "hydrated")


def _decoded(mount: Mount) -> int:
    """Reads that were of spans, decoded before or then."""
    spans = json.loads(mount.fusestore("status", "--json", mount.mountpoint).ok())["spans"]
    return int(spans["hits"]) + int(spans["misses"])


def test_hydrate_says_what_it_costs_and_undo_gives_it_back(store: Mount) -> None:
    would = json.loads(store.fusestore("hydrate", "debian", "--dry-run", "--json").ok())
    assert (would["hydrated"], would["layers"], _hydrated_bytes(store)) == (0, 2, 0)
    result = store.fusestore("hydrate", "debian", "--json")
    done = json.loads(result.ok())
    assert result.err == ""
    assert (done["hydrated"], done["layers"], done["missing"]) == (2, 2, 0)
    assert (
        0.9 * would["bytes"] < done["bytes"] == done["size"] == _hydrated_bytes(store) <= 1.1 * would["bytes"]
    )
    assert store.fusestore("hydrate", "debian").ok() == "0 bytes more on disk\n"
    assert store.fusestore("hydrate", "debian", "--undo", "--dry-run").ok().endswith(" can be given back\n")
    assert json.loads(store.fusestore("hydrate", "debian", "--undo", "--json").ok())["bytes"] == done["bytes"]
    assert _hydrated_bytes(store) == 0


def test_a_mount_reads_what_is_hydrated_without_decoding(store: Mount) -> None:
    store.fusestore("create", "debian", "c").ok()
    read = f"cd images/debian/rootfs; {ALL_FILES}"
    store.sh("ls containers/c/rootfs").ok()
    store.fusestore("hydrate", "debian").ok()
    before = _decoded(store)
    hydrated = store.sh(read).ok()
    assert _decoded(store) == before
    store.fusestore("hydrate", "debian", "--undo").ok()
    store.umount()
    store.mount()
    assert store.sh(read).ok() == hydrated
    assert _decoded(store) > 0


def test_a_mount_can_hydrate_what_is_used(unmounted: Mount, images: Images) -> None:
    unmounted.fusestore("import", images.debian.source, "--name", "debian").ok()
    unmounted.fusestore("create", "debian", "c").ok()
    unmounted.options = ("--hydrate",)
    unmounted.mount()
    assert _hydrated_bytes(unmounted) == 0
    unmounted.sh("ls containers/c/rootfs").ok()
    wait_until(lambda: "is hydrated: " in unmounted.log(), 60)
    busybox, debian = (
        json.loads(unmounted.fusestore("hydrate", name, "--dry-run", "--json").ok())["hydrated"]
        for name in ("busybox", "debian")
    )
    assert (busybox, debian) == (0, 2)


def test_umount_does_not_wait_for_what_is_being_hydrated(unmounted: Mount, images: Images) -> None:
    unmounted.fusestore("import", images.debian.source, "--name", "debian").ok()
    unmounted.fusestore("create", "debian", "c").ok()
    unmounted.options = ("--hydrate",)
    unmounted.mount()
    unmounted.sh("ls containers/c/rootfs").ok()
    unmounted.umount()
    assert os.listdir(unmounted.store / "tmp") == []
    assert unmounted.fusestore("check").ok() == ""


@contextmanager
def _somebody_in(mount: Mount, container_id: str, script: str) -> Iterator[Callable[[], str]]:
    """A shell in the rootfs of a container, that waits until it is told to run `script`; gives its output."""
    enter = f"cd {mount.containers}/{container_id}/rootfs && echo && read && {script}"
    with subprocess.Popen(["bash", "-c", enter], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as inside:
        try:
            assert inside.stdin and inside.stdout and inside.stdout.readline() == b"\n"
            yield lambda: inside.communicate(b"\n", timeout=60)[0].decode()
        finally:
            inside.kill()


def _kill(mount: Mount) -> None:
    (pid,) = mount.pids()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not mount.pids())


@pytest.mark.parametrize("person", ["erofs"], indirect=True)
@pytest.mark.parametrize("then", ["", "hydrate --undo debian"], ids=["kept", "given back meanwhile"])
def test_who_is_in_a_hydrated_container_needs_no_daemon(store: Mount, then: str) -> None:
    store.fusestore("create", "debian", "c").ok()
    store.fusestore("hydrate", "debian").ok()
    with _somebody_in(store, "c", f"{ALL_FILES} && echo written > new && cat new") as run:
        if then:
            store.fusestore(*then.split()).ok()
        _kill(store)
        Path("/proc/sys/vm/drop_caches").write_text("1")
        found = run()
    store.mount()
    expected = store.sh(f"cd images/debian/rootfs; {ALL_FILES}").ok()
    assert found == f"{expected}written\n"


@pytest.mark.parametrize("person", ["erofs"], indirect=True)
def test_who_was_in_a_container_before_it_was_hydrated_needs_the_daemon_on(store: Mount) -> None:
    store.fusestore("create", "debian", "before").ok()
    store.fusestore("create", "debian", "after").ok()
    script = "{ find . -xdev -type f -exec cat {} + > /dev/null 2>&1 && echo read || echo lost; }"
    with _somebody_in(store, "before", script) as run_before:
        store.fusestore("hydrate", "debian").ok()
        with _somebody_in(store, "after", script) as run_after:
            _kill(store)
            Path("/proc/sys/vm/drop_caches").write_text("1")
            assert (run_before(), run_after()) == ("lost\n", "read\n")
    store.mount()
