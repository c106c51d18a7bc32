"""Who changes a store and the mounts that are told, without a kernel."""

import threading
import time
from pathlib import Path

import pytest

from fusestore.layout import run_layout
from fusestore.mounts import BELL_MAX, Changed, MountRecord, Mounts

CHANGED = Changed("containers", "c")


@pytest.fixture
def record(tmp_path: Path) -> MountRecord:
    """A mount whose bell nobody answers yet."""
    run = run_layout(str(tmp_path), b"/store")
    for directory in (run.root, *run.directories):
        Path(directory).mkdir(exist_ok=True)
    return Mounts(run).record("/mnt", 1, "union")


@pytest.fixture
def others(tmp_path: Path, record: MountRecord) -> Mounts:
    """Of another process."""
    return Mounts(run_layout(str(tmp_path), b"/store"))


def test_a_busy_mount_is_waited_for(
    others: Mounts, record: MountRecord, caplog: pytest.LogCaptureFixture
) -> None:
    """For longer than fifty processes that wait for the store's lock may take."""
    said: list[Changed] = []

    def answer() -> None:
        assert record.bell is not None
        connection, _ = record.bell.accept()
        with connection:
            said.append(Changed.decode(connection.recv(BELL_MAX)))
            time.sleep(1.2)
            connection.send(b"!")

    with record:
        thread = threading.Thread(target=answer)
        thread.start()
        others.announce(CHANGED)
        thread.join()
    assert (said, caplog.record_tuples) == ([CHANGED], [])


def test_a_stopped_mount_holds_up_the_first_change_most(
    others: Mounts, record: MountRecord, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience: list[float] = []

    def time_out(name: str, message: bytes, patience_s: float, answer_max: int) -> bytes:
        patience.append(patience_s)
        if len(patience) == 3:
            return b"!"
        raise TimeoutError

    monkeypatch.setattr(others, "_say", time_out)
    with record:
        for _ in range(4):
            others.announce(CHANGED)
    assert patience[0] == patience[3] > patience[1] == patience[2]
    assert [message for _, _, message in caplog.record_tuples] == [
        "a mount of this store does not answer: it may show c for a while"
    ] * 3


def test_who_ends_before_it_answers_is_not_warned_of(
    others: Mounts, record: MountRecord, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*_: object) -> bytes:
        record.close()
        raise TimeoutError

    monkeypatch.setattr(others, "_say", end)
    others.announce(CHANGED)
    assert caplog.record_tuples == []
