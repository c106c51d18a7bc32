"""The store as a whole: opening, its run directory, mounts."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rig.ocisources import SourceMaker, tar_of
from rig.requirements import need
from rig.stores import open_at

from fusestore.check import check
from fusestore.containers import Containers, Draft
from fusestore.errors import (
    Busy,
    LayerRefused,
    NotFound,
    StoreUnusable,
)
from fusestore.mounts import BELL_MAX, IDLE, Changed, Mounts
from fusestore.store import Store

pytestmark = pytest.mark.usefixtures("unsynced")

BASE = tar_of({"etc/passwd": b"root"})


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(StoreUnusable, match="there is no store at"):
        Store.open(tmp_path / "none", tmp_path / "run")


@pytest.mark.parametrize("where", [{"path": "", "run_dir": "run"}, {"path": "store", "run_dir": ""}])
def test_an_empty_path_is_not_the_current_directory(
    tmp_path: Path, where: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreUnusable, match="is empty"):
        Store.open(**where, create=True)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


def test_a_directory_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    with pytest.raises(StoreUnusable, match="neither empty nor a store"):
        Store.open(tmp_path / "other", tmp_path / "run", create=True)
    assert os.listdir(tmp_path / "other") == ["file"]


def test_an_oci_layout_of_others_is_refused(tmp_path: Path, one: str) -> None:
    before = sorted(os.listdir(tmp_path / "one"))
    with pytest.raises(StoreUnusable, match="neither empty nor a store"):
        Store.open(tmp_path / "one", tmp_path / "run", create=True)
    assert sorted(os.listdir(tmp_path / "one")) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"format": "fusestore", "version": 2, "features": []}, "version 2, this fusestore knows 1: upgrade"),
        ({"format": "fusestore", "version": 1, "features": ["holes"]}, "uses holes, unknown"),
        ({"format": "other", "version": 1, "features": []}, "fusestore.json is damaged"),
        ({"format": "fusestore", "version": 1}, "fusestore.json is damaged"),
    ],
)
def test_refused_formats(tmp_path: Path, content: object, message: str) -> None:
    open_at(tmp_path).close()
    (tmp_path / "store/fusestore.json").write_text(json.dumps(content))
    with pytest.raises(StoreUnusable, match=message):
        open_at(tmp_path)


def test_a_format_file_that_is_no_json(tmp_path: Path) -> None:
    open_at(tmp_path).close()
    (tmp_path / "store/fusestore.json").write_bytes(b"\0" * 30)
    with pytest.raises(StoreUnusable, match="damaged: restore it"):
        open_at(tmp_path)


def test_a_store_made_in_an_open_directory_is_its_owners_alone(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir(mode=0o755)
    open_at(tmp_path).close()
    assert (tmp_path / "store").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("call", ["flock", "rename", "bind"])
def test_a_mount_that_cannot_be_recorded_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with open_at(tmp_path) as store, monkeypatch.context() as patch:
        before = len(os.listdir("/proc/self/fd"))
        if call == "bind":
            patch.setattr(Mounts, "_hang_bell", full)
        else:
            patch.setattr(fcntl if call == "flock" else os, call, full)
        with pytest.raises(OSError, match="No space"):
            store.record_mount("/mnt", os.getpid(), "union")
        assert len(os.listdir("/proc/self/fd")) == before
        assert os.listdir(Path(store.run_path, "mounts")) == []


def test_made_by_many_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: open_at(tmp_path), range(8)))
    for number, store in enumerate(stores):
        store.create_container(container_id=f"c{number}")
        store.close()
    assert len(os.listdir(tmp_path / "store/containers")) == 8


def test_another_users_store(tmp_path: Path) -> None:
    need("root", os.geteuid() == 0, "only root can give a file away")
    open_at(tmp_path).close()
    os.chown(tmp_path / "store/fusestore.json", 65534, 65534)
    with pytest.raises(StoreUnusable, match="another user's store"):
        open_at(tmp_path)


def test_the_run_directory_is_the_commands_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSESTORE_RUN_DIR", f"{tmp_path}/run")
    with Store.open(tmp_path / "store", create=True) as store:
        assert store.run_path.startswith(f"{tmp_path}/run/")
    monkeypatch.setenv("FUSESTORE_RUN_DIR", "")
    with pytest.raises(StoreUnusable, match="run directory is empty"):
        Store.open(tmp_path / "store")


def test_a_run_directory_of_another_user(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    os.chmod(tmp_path / "run", 0o777)
    with pytest.raises(StoreUnusable, match="not a directory of yours alone"):
        open_at(tmp_path)


def test_what_a_living_process_stages_is_left_alone(tmp_path: Path, store: Store) -> None:
    with store.scratch() as scratch:
        open_at(tmp_path).close()
        assert os.path.isdir(scratch.path)
    assert not os.path.exists(scratch.path)


def test_start_needs_a_mount(store: Store) -> None:
    store.create_container(container_id="c")
    with pytest.raises(NotFound, match="run fusestore mount"):
        store.start_container("c")
    assert store.container("c").mounted is False


def test_start_and_stop(store: Store) -> None:
    store.create_container(container_id="c", container_name="web")
    with store.record_mount("/mnt/x", os.getpid(), "union"):
        for _ in range(2):
            assert store.start_container("web") == Path("/mnt/x/containers/c/rootfs")
        assert store.get_container_metadata("c")["mounted"] is True
    store.stop_container("c")
    store.stop_container("c")
    assert store.get_container_metadata("c")["mounted"] is False


def test_a_mount_that_hears_nobody_fails_no_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process is stopped, and as many wait at its bell as may."""
    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(open_at(tmp_path)) for _ in range(2))
        stack.enter_context(first.record_mount("/mnt/x", os.getpid(), "union"))
        monkeypatch.chdir(Path(first.run_path, "mounts"))  # unix(7): a path has 108 bytes
        (bell,) = Path().glob("*.bell")
        with contextlib.suppress(BlockingIOError):
            while True:
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                waiting.setblocking(False)
                waiting.connect(str(bell))
        second.create_container(container_id="made")
        assert first.container_ids() == ["made"]


def _answer(bell: socket.socket, heard: list[str], leave: Callable[[], None]) -> None:
    """A mount, until `bell` is shut down."""
    while True:
        try:
            connection, _ = bell.accept()
        except OSError:
            return
        with connection:
            place, _ = Changed.decode(connection.recv(BELL_MAX))
            heard.append(place)
            if place == IDLE:
                leave()
            connection.send(b"!")


@pytest.mark.parametrize(
    "change",
    [lambda store: store.delete_container("a"), lambda store: store.rename_container("a", "b")],
    ids=["delete", "rename"],
)
@pytest.mark.parametrize(
    ("driver", "is_held", "said"),
    [
        ("union", False, ["containers"]),
        ("erofs", False, ["containers"]),
        ("union", True, []),
        ("erofs", True, [IDLE, "containers"]),
    ],
)
def test_only_who_may_keep_an_idle_container_is_asked_to_leave_it(
    tmp_path: Path, change: Callable[[Store], None], driver: str, is_held: bool, said: list[str]
) -> None:
    heard: list[str] = []
    with open_at(tmp_path) as first, open_at(tmp_path) as second, ThreadPoolExecutor() as threads:
        first.create_container(container_id="a")
        with first.record_mount("/mnt/x", os.getpid(), driver) as record, contextlib.ExitStack() as stack:
            if is_held:
                stack.enter_context(first.hold("a"))
            assert record.bell is not None
            answering = threads.submit(_answer, record.bell, heard, stack.close)
            try:
                with contextlib.nullcontext() if said else pytest.raises(Busy):
                    change(second)
            finally:
                record.bell.shutdown(socket.SHUT_RDWR)
            answering.result()
    assert heard == said


def test_a_mount_is_known_until_it_ends(tmp_path: Path, store: Store) -> None:
    record = store.record_mount("/mnt/x", 7, "union")
    with open_at(tmp_path) as other:
        (found,) = other.mounts()
        assert (found.mountpoint, found.pid, found.driver) == ("/mnt/x", 7, "union")
        record.close()
        assert other.mounts() == []


def test_a_mount_whose_process_died_is_none(store: Store) -> None:
    pid = os.fork()
    if pid == 0:
        store.record_mount("/mnt/x", os.getpid(), "union")
        os._exit(0)
    os.waitpid(pid, 0)
    assert store.mounts() == []
    assert os.listdir(Path(store.run_path, "mounts")) == []


def test_after_a_reboot_nothing_is_mounted(tmp_path: Path, store: Store) -> None:
    store.create_container(container_id="c")
    store.set_container_metadata("c", {"mounted": True})
    (store.run_dir("c") / "file").touch()
    Path(store.run_path, "boot").write_text("another boot")
    with open_at(tmp_path) as rebooted:
        assert rebooted.container("c").mounted is False
        assert list(rebooted.run_dir("c").iterdir()) == []


def test_rundir(store: Store) -> None:
    store.create_container(container_id="c")
    path = store.run_dir("c")
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert path.parent.parent.parent == Path(store.run_path)


def test_a_refused_import_leaves_the_store_as_it_was(tmp_path: Path, store: Store) -> None:
    maker = SourceMaker()
    source = maker.add(maker.image([BASE, b"no tar" * 100]), "bad").directory(tmp_path / "bad")
    with pytest.raises(LayerRefused):
        store.import_image(source)
    assert store.images() == []
    assert os.listdir(Path(store.path, "blobs/sha256")) == os.listdir(Path(store.path, "tmp")) == []


def test_who_makes_what_another_deletes_at_once_has_made_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Containers.create

    def create(self: Containers, draft: Draft, confirm_image: Callable[[], None]) -> str:
        run_dir = real(self, draft, confirm_image)
        with open_at(tmp_path) as other:
            other.delete_container("mine")
        return run_dir

    monkeypatch.setattr(Containers, "create", create)
    assert store.create_container(container_id="mine").id == "mine"
    assert store.container_ids() == []


@pytest.mark.parametrize(
    "intent",
    [
        "{",
        "[]",
        '{"names": [], "loose": {}}',
        '{"names": {"n": "c"}}',
        '{"names": {"n": [1]}}',
        '{"names": {"n": ["\\ud800"]}}',
        '{"names": {"../../outside": ["c"]}}',
        '{"loose": {"blobs": [{}]}}',
        '{"loose": {"layers": ["sha256:../../../outside"]}}',
        '{"loose": {"images": ["../../outside"]}}',
        '{"loose": {"images": [".."]}}',
    ],
)
def test_what_nobody_meant_is_not_done(tmp_path: Path, intent: str) -> None:
    """A file where an interrupted change says what it was about to do."""
    open_at(tmp_path).close()
    (tmp_path / "outside").mkdir()
    (tmp_path / "store/tmp/dead").mkdir()
    (tmp_path / "store/tmp/dead/intent").write_text(intent)
    with open_at(tmp_path) as store:
        assert check(store) == []
    assert os.listdir(tmp_path / "store/tmp") == []
    assert (tmp_path / "outside").is_dir() and (tmp_path / "store/images").is_dir()


def test_what_another_deleted_is_not_kept_open(store: Store, tmp_path: Path, two: str) -> None:
    """Else it takes space until so many other layers are opened, or the mount ends."""
    for layer in store.open_layers(store.import_image(two, ["two"])):
        layer.reader.read(0, 100)
    del layer
    with open_at(tmp_path) as other:
        other.untag("two")
        other.delete_image(other.images()[0].id)
    store.reopen_layers()
    open_files = []
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that listed them
            open_files.append(os.readlink(fd))
    assert [path for path in open_files if path.endswith("(deleted)") and str(tmp_path) in path] == []
