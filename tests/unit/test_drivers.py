"""The union driver: which scheme a store has."""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from rig.requirements import need

from fusestore import drivers
from fusestore.drivers import UnionDriver
from fusestore.errors import StoreUnusable
from fusestore.inodes import Inodes
from fusestore.scheme import Scheme
from fusestore.store import Store


@pytest.fixture
def scheme_file(store: Store) -> Path:
    return Path(store.path, "scheme")


@pytest.fixture
def as_plain_user(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a user namespace, where chown, mknod and trusted.* are refused."""
    monkeypatch.setattr(drivers, "find_scheme", lambda scratch: Scheme.PLAIN)
    yield
    monkeypatch.undo()


def _driver(store: Store) -> UnionDriver:
    return UnionDriver(store, Inodes())


def test_the_first_mount_of_a_store_settles_its_scheme(store: Store, scheme_file: Path) -> None:
    need("root", os.geteuid() == 0, "run the tests as root")
    _driver(store).close()
    assert scheme_file.read_text() == "native\n"


def test_a_plain_users_store_stays_one(store: Store, scheme_file: Path, as_plain_user: None) -> None:
    _driver(store).close()
    assert scheme_file.read_text() == "plain\n"


def test_a_store_is_read_as_it_was_written(store: Store, scheme_file: Path) -> None:
    need("root", os.geteuid() == 0, "run the tests as root")
    scheme_file.write_text("plain\n")
    with closing(_driver(store)) as driver:
        assert driver.upper(driver._scratch.fd).scheme is Scheme.PLAIN
        assert driver.upper(driver._run_scratch.fd).scheme is Scheme.PLAIN


def test_roots_store_is_refused_where_its_marks_cannot_be_read(
    store: Store, scheme_file: Path, as_plain_user: None
) -> None:
    scheme_file.write_text("native\n")
    with pytest.raises(StoreUnusable, match="mount it as root outside of a user namespace"):
        _driver(store)
    assert not os.listdir(Path(store.path, "tmp"))


def test_a_scheme_nobody_knows_is_refused(store: Store, scheme_file: Path) -> None:
    scheme_file.write_bytes(b"\xff\n")
    with pytest.raises(StoreUnusable, match="neither native nor plain"):
        _driver(store)
