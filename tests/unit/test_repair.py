"""The repair: what can be is made again, the rest is in the quarantine, and nothing is lost."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from rig.damage import DAMAGE, PLAIN_DAMAGE, Damage, change_middle, layer_blobs
from rig.ocisources import SourceMaker, tar_of
from rig.stores import Crash, Dying, open_at

from fusestore import disk, durable
from fusestore.check import check
from fusestore.errors import Busy
from fusestore.repair import repair
from fusestore.store import Store

BASE, APP = tar_of({"etc/passwd": b"root" * 500}), tar_of({"app": b"1"}, {"link": "app"})

pytestmark = pytest.mark.usefixtures("unsynced")
KINDS = {**DAMAGE, **PLAIN_DAMAGE}


@pytest.fixture
def source(tmp_path: Path) -> str:
    maker = SourceMaker()
    return maker.add(maker.image([BASE, APP]), "x:1").directory(tmp_path / "source")


@pytest.fixture
def store(tmp_path: Path, source: str) -> Store:
    """As in the tests of check."""
    store = open_at(tmp_path)
    store.import_image(source)
    store.create_container(container_id="c", container_name="db")
    store.create_container(container_id="other")
    store.set_container_metadata("other", {"a": 1})
    store.scheme("plain")
    store.close()
    return store


def contents(root: Path) -> list[bytes]:
    """Of all files below a directory, wherever they are; of links what they point to."""
    found = []
    for directory, directories, files in os.walk(root):
        for name in [*directories, *files]:
            path = os.path.join(directory, name)
            if os.path.islink(path):
                found.append(os.fsencode(os.readlink(path)))
            elif os.path.isfile(path):
                found.append(Path(path).read_bytes())
    return sorted(found)


def repaired(tmp_path: Path) -> tuple[list[str], list[str]]:
    """What a repair does and leaves."""
    done: list[str] = []
    with open_at(tmp_path) as store:
        left = [str(finding) for finding in repair(store, done.append)]
        assert left == [str(finding) for finding in check(store)]
    return done, left


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left(tmp_path: Path, store: Store, kind: str) -> None:
    damage: Damage = KINDS[kind]
    damage.do(Path(store.path))
    done, left = repaired(tmp_path)
    assert all("\n" not in line for line in done)
    assert all(damage.left in line for line in left)
    assert bool(left) == bool(damage.left)
    assert done or left


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost(tmp_path: Path, store: Store, kind: str) -> None:
    KINDS[kind].do(Path(store.path))
    before = contents(Path(store.path))
    repaired(tmp_path)
    after = contents(Path(store.path))
    for content in before:
        assert content in after
        after.remove(content)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_repair_does_nothing(tmp_path: Path, store: Store, kind: str) -> None:
    KINDS[kind].do(Path(store.path))
    _, left = repaired(tmp_path)
    assert repaired(tmp_path) == ([], left)


@pytest.mark.parametrize("kind", [kind for kind, damage in KINDS.items() if "image" in damage.left])
def test_import_heals_the_rest(tmp_path: Path, store: Store, source: str, kind: str) -> None:
    if "image x:1" in KINDS[kind].left:
        return  # another image is what that container wants
    KINDS[kind].do(Path(store.path))
    repaired(tmp_path)
    with open_at(tmp_path) as healed:
        healed.import_image(source)
        assert check(healed) == []
        assert sorted(healed.image_names()) == ["default", "x:1"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_crash_at_every_step(
    tmp_path: Path, store: Store, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    KINDS[kind].do(Path(store.path))
    before = contents(Path(store.path))
    for steps in range(0, 1000, 3):
        done = False
        with monkeypatch.context() as patch, open_at(tmp_path) as store:
            patch.setattr(disk, "current", Dying(steps))
            try:
                repair(store, lambda line: None)
                done = True
            except Crash:
                pass
        if done:
            break
    _, left = repaired(tmp_path)
    assert bool(left) == bool(KINDS[kind].left)
    after = contents(Path(store.path))
    assert all(after.count(content) >= before.count(content) for content in before)


def test_reasons_are_kept(tmp_path: Path, store: Store) -> None:
    blob = layer_blobs(Path(store.path))[0]
    change_middle(blob)
    damaged = blob.read_bytes()
    (line,), _ = repaired(tmp_path)
    (quarantine,) = Path(store.path, "quarantine").iterdir()
    assert (quarantine / "reasons").read_text() == f"{line}\n"
    assert line.endswith(f"moved to {quarantine}/blobs/sha256/{blob.name}")
    assert (quarantine / "blobs/sha256" / blob.name).read_bytes() == damaged


def test_a_sound_store_stays_as_it_is(tmp_path: Path, store: Store) -> None:
    before = contents(Path(store.path))
    assert repaired(tmp_path) == ([], [])
    assert contents(Path(store.path)) == before
    assert not os.path.exists(os.path.join(store.path, "quarantine"))


def test_a_lost_index_has_the_names_that_containers_know(tmp_path: Path, store: Store) -> None:
    Path(store.path, "index.json").unlink()
    (line,), _ = repaired(tmp_path)
    assert "made again with 1 images, 0 of them without a name" in line
    with open_at(tmp_path) as reopened:
        assert list(reopened.image_names()) == ["x:1"]


def test_what_is_whole_in_a_damaged_index_stays(tmp_path: Path, store: Store) -> None:
    store.tag("x:1", "y/z")
    text = Path(store.path, "index.json").read_bytes()
    Path(store.path, "index.json").write_bytes(text[:20] + b"\0" + text[20:-3])
    names = ["default", "x:1", "y/z"]
    repaired(tmp_path)
    with open_at(tmp_path) as reopened:
        found = sorted(reopened.image_names())
        # The one that the damage is in is named by a container.
        assert set(found) <= set(names) and {"x:1"} <= set(found) and len(found) >= 2


def test_what_only_a_lenient_reader_takes_is_no_entry(tmp_path: Path, store: Store) -> None:
    """A surrogate, which cannot be written again."""
    entry = r'{"mediaType":"x","digest":"sha256:' + "0" * 64 + r'","size":1,"more":"\ud800"}'
    text = Path(store.path, "index.json").read_text()
    Path(store.path, "index.json").write_text(text.replace('"manifests":[', f'"manifests":[{entry},')[:-1])
    _, left = repaired(tmp_path)
    assert left == []


def test_a_container_is_kept_with_what_was_written(tmp_path: Path, store: Store) -> None:
    upper = Path(store.upper_dir("c"))
    upper.mkdir()
    (upper / "precious").write_text("work")
    Path(store.path, "containers/c/container").write_bytes(b"")
    repaired(tmp_path)
    (kept,) = Path(store.path, "quarantine").glob("*/containers/c/diff/precious")
    assert kept.read_text() == "work"
    with open_at(tmp_path) as reopened:
        assert reopened.container_ids() == ["other"]
        assert reopened.container_names() == {}


# Stores that are in use


@contextmanager
def _mounted(store: Store) -> Iterator[str]:
    with store.record_mount("/mnt/here", os.getpid(), "union"):
        yield "is mounted at /mnt/here"


@contextmanager
def _held(store: Store) -> Iterator[str]:
    with store.hold("c"):
        yield "container c is in use"


@contextmanager
def _started(store: Store) -> Iterator[str]:
    with store.record_mount("/mnt/here", os.getpid(), "union"):
        store.start_container("c")
    yield "container c is started"


@contextmanager
def _importing(store: Store) -> Iterator[str]:
    with store.scratch():
        yield "another process is at work"


@pytest.mark.parametrize("use", [_mounted, _held, _started, _importing])
def test_a_store_in_use_is_not_touched(tmp_path: Path, store: Store, use) -> None:  # type: ignore[no-untyped-def]
    change_middle(layer_blobs(Path(store.path))[0])
    before = contents(Path(store.path))
    with ExitStack() as stack:
        opened = stack.enter_context(open_at(tmp_path))
        reason = stack.enter_context(use(opened))
        with pytest.raises(Busy, match=reason):
            repair(opened, pytest.fail)
    assert contents(Path(store.path)) == before


def test_others_wait_for_the_lock(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    change_middle(layer_blobs(Path(store.path))[0])
    monkeypatch.setattr(durable, "LOCK_TIMEOUT_S", 0.2)

    def create(_: str) -> None:
        with open_at(tmp_path) as other, pytest.raises(Busy, match="has held"):
            other.create_container(container_id="new")

    with open_at(tmp_path) as opened:
        assert repair(opened, create) != []


@pytest.mark.parametrize(("kind", "code"), [("index changed", 0), ("layer changed", 1)])
def test_the_command(tmp_path: Path, store: Store, kind: str, code: int) -> None:
    KINDS[kind].do(Path(store.path))
    command = [sys.executable, "-m", "fusestore", "check", "--repair"]
    places = ["--store", store.path, "--run-dir", tmp_path / "run"]
    done = subprocess.run([*command, *places], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (code, "")
    assert len(done.stdout.splitlines()) == 2  # two indexes made again; or a blob moved, and still missing
