"""The process that mounts: whoever asks it is answered, and waits for nothing but their own mount."""

import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fusestore import erofsmount
from fusestore import mounter as module
from fusestore.mounter import Mounter, _Worker

SLOW_S = 20


class SlowKernel:
    """System calls that mount, of which those for what is called ``slow`` wait until `may_end`."""

    def __init__(self) -> None:
        self.started, self.may_end = threading.Event(), threading.Event()

    def umount2(self, target: bytes, flags: int) -> None:
        self._wait_for(os.readlink(target))

    def make_mount(self, kind: bytes, options: list[tuple[bytes, bytes]], attributes: int) -> int:
        self._wait_for(dict(options)[b"source"])
        return os.open("/", os.O_PATH)

    def _wait_for(self, path: bytes) -> None:
        if path.endswith(b"slow"):
            self.started.set()
            assert self.may_end.wait(SLOW_S)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> SlowKernel:
    kernel = SlowKernel()
    monkeypatch.setattr(module, "umount2", kernel.umount2)
    monkeypatch.setattr(erofsmount, "make_mount", kernel.make_mount)
    monkeypatch.setattr(module, "move_mount", lambda mount, directory: None)
    return kernel


@pytest.fixture
def waiting(kernel: SlowKernel) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as waiting:
        yield waiting
        kernel.may_end.set()


def _mount(worker: _Worker, place: Path, image: bytes) -> int:
    place.mkdir()
    return worker.mount(bytes(place), image, [], [(b"source", b"fusestore")], False)[0]


def test_a_slow_unmount_holds_up_no_other(
    kernel: SlowKernel, waiting: ThreadPoolExecutor, tmp_path: Path
) -> None:
    worker = _Worker()
    slow, quick = (_mount(worker, tmp_path / name, b"image") for name in ("slow", "quick"))
    waiting.submit(worker.unmount, slow, False)
    assert kernel.started.wait(SLOW_S)
    waiting.submit(worker.unmount, quick, False).result(SLOW_S / 2)
    waiting.submit(_mount, worker, tmp_path / "new", b"image").result(SLOW_S / 2)


def test_a_slow_image_holds_up_no_other(
    kernel: SlowKernel, waiting: ThreadPoolExecutor, tmp_path: Path
) -> None:
    worker = _Worker()
    late = [waiting.submit(_mount, worker, tmp_path / name, b"slow") for name in ("one", "two")]
    assert kernel.started.wait(SLOW_S)
    waiting.submit(_mount, worker, tmp_path / "quick", b"image").result(SLOW_S / 2)
    kernel.may_end.set()
    assert {one.result(SLOW_S) for one in late} == {2, 3}


def test_who_unmounts_what_is_being_unmounted_waits_for_it(
    kernel: SlowKernel, waiting: ThreadPoolExecutor, tmp_path: Path
) -> None:
    worker = _Worker()
    token = _mount(worker, tmp_path / "slow", b"image")
    both = [waiting.submit(worker.unmount, token, False)]
    assert kernel.started.wait(SLOW_S)
    both.append(waiting.submit(worker.unmount, token, True))
    assert not any(one.done() for one in both)
    kernel.may_end.set()
    for one in both:
        one.result(SLOW_S)


def test_what_it_did_not_expect_is_answered_with_eio() -> None:
    mounter = Mounter()
    with ThreadPoolExecutor() as waiting:
        answer = waiting.submit(mounter.walk_to, "/no\0path")
        try:
            error = answer.exception(timeout=20)
        finally:
            mounter.close()  # ends the wait too
    assert isinstance(error, OSError)
    assert error.errno == errno.EIO and "null character" in str(error)
