"""Changes on disk: whole or not at all, locked while they are made, and trash that can always be emptied."""

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from rig.deep import deepen
from rig.stores import fail_to_open

from fusestore import disk
from fusestore.disk import Disk
from fusestore.durable import Workspace, lock_directory, read_file


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    for name in ("tmp", "trash"):
        (tmp_path / name).mkdir()
    return Workspace(tmp=f"{tmp_path}/tmp", trash=f"{tmp_path}/trash", lock=f"{tmp_path}/lock")


class Recorder(Disk):
    """Notes what is done, in order; fsync by the path that is synced."""

    def __init__(self) -> None:
        self.done: list[str] = []

    def fsync(self, fd: int) -> None:
        self.done.append("fsync " + os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        super().fsync(fd)

    def syncfs(self, fd: int) -> None:
        self.done.append("syncfs " + os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        super().syncfs(fd)

    def rename(self, source: str, target: str) -> None:
        self.done.append("rename " + os.path.basename(target))
        super().rename(source, target)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(disk, "current", recorder)
    return recorder


def test_a_file_is_synced_before_it_gets_its_name_and_its_directory_after(
    tmp_path: Path, workspace: Workspace, recorder: Recorder
) -> None:
    (tmp_path / "place").mkdir()
    workspace.write_file(f"{tmp_path}/place/file", b"data")
    assert (tmp_path / "place/file").read_bytes() == b"data"
    assert recorder.done[0].startswith("fsync ")
    assert recorder.done[1:] == ["rename file", "fsync place"]


def test_staged_things_are_synced_with_all_their_directories(
    workspace: Workspace, recorder: Recorder
) -> None:
    with workspace.scratch() as scratch:
        scratch.mkdir("a")
        scratch.mkdir("a/b")
        scratch.write("a/b/file", b"data")
        scratch.sync("a")
        of_it = ["fsync file", "fsync b", "fsync a"]
        assert recorder.done == of_it
        scratch.sync()
        assert recorder.done == [*of_it, *of_it, f"fsync {os.path.basename(scratch.path)}"]


def _socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path)


def _deep(path: str) -> None:
    """A tree whose last paths are longer than the kernel takes."""
    os.close(deepen(Path(path).parent, 30, "d" * 200))


def _whiteout(path: str) -> None:
    os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))


@pytest.mark.parametrize(
    "make", [os.mkfifo, _socket, _whiteout, partial(os.symlink, "/nowhere"), partial(os.symlink, "/"), _deep]
)
def test_what_cannot_be_opened_is_synced_with_the_file_system(
    workspace: Workspace, recorder: Recorder, make: Callable[[str], None]
) -> None:
    with workspace.scratch() as scratch:
        scratch.write("file", b"data")
        make(scratch.join("other"))
        scratch.sync()
        top = os.path.basename(scratch.path)
        assert "fsync file" in recorder.done
        assert recorder.done[-1] == f"syncfs {top}"


def test_what_may_not_be_read_is_synced_with_the_file_system(
    workspace: Workspace, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with workspace.scratch() as scratch:
        scratch.write("secret", b"data")
        fail_to_open(monkeypatch, scratch.join("secret"), errno.EACCES)
        scratch.sync()
        assert recorder.done[0].startswith("syncfs ")


def test_the_directory_of_what_is_removed_is_synced(
    tmp_path: Path, workspace: Workspace, recorder: Recorder
) -> None:
    (tmp_path / "place").mkdir()
    (tmp_path / "place/old").touch()
    workspace.discard(f"{tmp_path}/place/old", f"{tmp_path}/place/gone already")
    assert [change for change in recorder.done if change.startswith("fsync")] == ["fsync place"]
    assert os.listdir(tmp_path / "place") == []


@pytest.mark.parametrize("step", ["write", "fsync", "rename"])
def test_a_file_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "file"
    workspace.write_file(str(path), b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(Disk, step, full)
        with pytest.raises(OSError, match="no space"):
            workspace.write_file(str(path), b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path / "tmp") == []


def test_short_writes_are_continued(
    tmp_path: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Disk, "write", lambda self, fd, data: os.write(fd, data[:3]))
    workspace.write_file(f"{tmp_path}/file", b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_the_umask_does_not_matter(workspace: Workspace) -> None:
    before = os.umask(0o077)
    try:
        with workspace.scratch() as scratch:
            scratch.mkdir("a", 0o755)
            assert stat.S_IMODE(os.stat(scratch.join("a")).st_mode) == 0o755
    finally:
        os.umask(before)


def test_no_two_versions_of_a_file_look_alike(tmp_path: Path, workspace: Workspace) -> None:
    seen = set()
    for _ in range(100):
        workspace.write_file(f"{tmp_path}/file", b"data")
        found = os.stat(tmp_path / "file")
        seen.add((found.st_ino, found.st_mtime_ns))
    assert len(seen) == 100


def test_the_dead_are_found_and_the_living_are_not(tmp_path: Path, workspace: Workspace) -> None:
    (tmp_path / "tmp/dead").mkdir()
    (tmp_path / "tmp/dead/file").touch()
    (tmp_path / "tmp/file").touch()
    (tmp_path / "tmp/link").symlink_to("/")
    with workspace.scratch() as living:
        found = list(workspace.dead())
        assert [os.path.basename(scratch.path) for scratch in found] == ["dead"]
        for scratch in found:
            scratch.close()
            scratch.close()
        assert sorted(os.listdir(tmp_path / "tmp")) == sorted([os.path.basename(living.path), "link"])


def test_what_is_being_swept_is_not_swept_twice(tmp_path: Path, workspace: Workspace) -> None:
    (tmp_path / "tmp/dead").mkdir()
    (first,) = workspace.dead()
    assert list(workspace.dead()) == []
    first.close()


def test_a_lock_is_of_what_is_there_now(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    fd = lock_directory(f"{tmp_path}/a", fcntl.LOCK_EX)
    assert fd is not None
    os.rename(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a").mkdir()
    again = lock_directory(f"{tmp_path}/a", fcntl.LOCK_EX | fcntl.LOCK_NB)
    with pytest.raises(BlockingIOError):
        lock_directory(f"{tmp_path}/b", fcntl.LOCK_SH | fcntl.LOCK_NB)
    assert again is not None
    os.close(again)
    os.close(fd)
    assert lock_directory(f"{tmp_path}/none", fcntl.LOCK_EX) is None


def test_the_lock_keeps_other_processes_out(tmp_path: Path, workspace: Workspace) -> None:
    with workspace.lock():
        fd = os.open(tmp_path / "lock", os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(fd)


def plain_file(path: Path) -> None:
    path.write_bytes(b"data")


def locked_directories(path: Path) -> None:
    for part in ("a", "a/b", "a/b/c"):
        (path / part).mkdir(parents=True, exist_ok=True)
        (path / part / "file").touch()
    for part in ("a/b/c", "a/b", "a"):
        os.chmod(path / part, 0)


def special_files(path: Path) -> None:
    path.mkdir()
    os.mkfifo(path / "fifo")
    (path / "link").symlink_to("/etc")


def deep(path: Path) -> None:
    path.mkdir()
    os.close(deepen(path, 1100))


@pytest.mark.parametrize("make", [plain_file, locked_directories, special_files, deep])
def test_all_trash_can_be_emptied(tmp_path: Path, workspace: Workspace, make: Callable[[Path], None]) -> None:
    make(tmp_path / "old")
    workspace.discard(f"{tmp_path}/old")
    assert not os.path.lexists(tmp_path / "old")
    workspace.empty_trash()
    assert os.listdir(tmp_path / "trash") == []


def test_trash_that_resists_does_not_keep_the_rest(
    tmp_path: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / "trash" / name).touch()

    def unlink(self: Disk, path: str, dir_fd: None = None) -> None:
        if path.endswith("/b"):
            raise PermissionError(errno.EPERM, "immutable")
        os.unlink(path)

    monkeypatch.setattr(Disk, "unlink", unlink)
    with pytest.raises(PermissionError, match="immutable"):
        workspace.empty_trash()
    assert os.listdir(tmp_path / "trash") == ["b"]


@pytest.mark.parametrize(
    ("size", "limit", "whole"), [(0, 0, True), (5, 5, True), (6, 5, False), (1 << 21, 1 << 20, False)]
)
def test_reading_is_bounded(tmp_path: Path, size: int, limit: int, whole: bool) -> None:
    (tmp_path / "file").write_bytes(b"x" * size)
    if whole:
        assert read_file(f"{tmp_path}/file", limit) == b"x" * size
        return
    with pytest.raises(OSError) as failure:
        read_file(f"{tmp_path}/file", limit)
    assert failure.value.errno == errno.EFBIG


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/etc/passwd", path)])
def test_only_regular_files_are_read(tmp_path: Path, make: Callable[[str], None]) -> None:
    make(f"{tmp_path}/file")
    with pytest.raises(OSError):
        read_file(f"{tmp_path}/file", 100)
