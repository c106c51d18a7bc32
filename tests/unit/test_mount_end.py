"""The end of a mount: it waits for nothing that the next mount can do."""

import os
import threading
from pathlib import Path

import trio
from rig.stores import open_at

from fusestore.mount import _Trash
from fusestore.store import Store


class _Endless(Store):
    """Has more to delete than anybody waits for."""

    started: threading.Event
    may_end: threading.Event

    def empty_trash(self) -> None:
        self.started.set()
        self.may_end.wait()


def test_the_trash_is_not_waited_for(tmp_path: Path) -> None:
    open_at(tmp_path).close()
    with _Endless.open(tmp_path / "store", tmp_path / "run") as store:
        store.started, store.may_end = threading.Event(), threading.Event()
        watchdog = threading.Timer(30, store.may_end.set)
        watchdog.start()

        async def end_meanwhile() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_Trash(store).run)
                await trio.to_thread.run_sync(store.started.wait)
                nursery.cancel_scope.cancel()

        trio.run(end_meanwhile)
        assert not store.may_end.is_set()
        watchdog.cancel()
        store.may_end.set()


def test_a_store_closes_without_its_trash_where_that_is_left_to_others(tmp_path: Path) -> None:
    with open_at(tmp_path) as store:
        store.leave_trash()
        store.delete_container(store.create_container().id)
    assert len(os.listdir(tmp_path / "store/trash")) == 1
