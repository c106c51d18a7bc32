"""Every operation on every kind of object of a union: what it gives, and the tree after it.

All is done four times: in a container; in a plain directory that has the same; and, as root, in overlayfs
over the same layers, unpacked, with its defaults and with redirect_dir=on. `DIFFERENCES` is all that may
differ, and each of them must; the README says why. What the kernel serves is as the last of these; by
`--driver overlay` a sample is done, where each kind of object and each operation are often met.
"""

import functools
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from rig.dictmodel import TreeModel
from rig.layers import tar_layer, unpack_layer
from rig.matrix import Cell, Outcome, layers_of, objects, operations, perform
from rig.mounts import Mount
from rig.ocisources import SourceMaker
from rig.people import Person, as_root
from rig.snapshot import Entry, Snapshot, differences
from rig.treecalls import RealTree

pytestmark = [pytest.mark.mounted]

FUSESTORE, PLAIN, DEFAULT, REDIRECTS = "fusestore", "plain", "overlayfs", "overlayfs, redirect_dir=on"
ORACLES = (PLAIN, DEFAULT, REDIRECTS)
GROUPS = sorted({operation.group for operation in operations()})
_DEADLINE_S = 500
_EACH = {"overlay": 1 if os.environ.get("FUSESTORE_TEST_PROFILE") == "long" else 41}
"""Of so many cells one is done, by driver; all of them by the others."""


@dataclass(frozen=True, slots=True)
class Facet:
    """One thing that a container and an oracle have otherwise."""

    cell: Cell
    path: bytes | None
    """None: the result."""
    field: str
    expected: object
    found: object
    outcomes: tuple[Outcome, Outcome]
    """The oracle's and the container's."""

    def __str__(self) -> str:
        where = "gives" if self.path is None else f"{self.path!r} {self.field}"
        return f"{self.cell}: {where} {self.found!r}, in the oracle {self.expected!r}"


@dataclass(frozen=True, slots=True)
class Difference:
    """One way in which a container is not as an oracle is, on purpose. The README's table has the name."""

    name: str
    oracles: tuple[str, ...]
    explains: Callable[[Facet], bool]


def _counts_subdirectories(facet: Facet) -> bool:
    seen = facet.outcomes[1].after.get(facet.path or b".")
    return facet.field == "nlink" and seen is not None and seen.entry.type == "directory"


def _moves_directories(facet: Facet) -> bool:
    return facet.outcomes[0].result == "EXDEV" != facet.outcomes[1].result


def _keeps_hard_links(facet: Facet) -> bool:
    return facet.cell.object.place in ("hard-linked in the lower", "hard-linked in both")


def _changes_what_was_removed(facet: Facet) -> bool:
    return facet.cell.operation.name.startswith("removed while ")


def _leaves_times_when_it_fails(facet: Facet) -> bool:
    results = {outcome.result for outcome in facet.outcomes if isinstance(outcome.result, str)}
    return facet.field == "mtime" and results == {"ENOTEMPTY"} and facet.cell.operation.group == "rename"


def _has_no_unnamed_files(facet: Facet) -> bool:
    return facet.cell.operation.name == "open TMPFILE" and facet.found == "ENOTSUP"


def _refuses_whiteouts(facet: Facet) -> bool:
    return facet.cell.operation.name == "mknod of a whiteout" and facet.outcomes[1].result == "EPERM"


DIFFERENCES = (
    Difference("link counts of directories", (DEFAULT, REDIRECTS), _counts_subdirectories),
    Difference("renaming a directory of the image", (DEFAULT,), _moves_directories),
    Difference("hard links of the image", (DEFAULT, REDIRECTS), _keeps_hard_links),
    Difference("changing what was removed while open", (DEFAULT, REDIRECTS), _changes_what_was_removed),
    Difference("renaming onto a full directory", (DEFAULT, REDIRECTS), _leaves_times_when_it_fails),
    Difference("`O_TMPFILE`", ORACLES, _has_no_unnamed_files),
    Difference("a device 0:0", (PLAIN,), _refuses_whiteouts),
)


def _facets(cell: Cell, expected: Outcome, found: Outcome) -> Iterator[Facet]:
    def facet(path: bytes | None, field: str, there: object, here: object) -> Iterator[Facet]:
        if there != here:
            yield Facet(cell, path, field, there, here, (expected, found))

    yield from facet(None, "result", expected.result, found.result)
    for path in sorted(expected.after.keys() | found.after.keys()):
        there, here = expected.after.get(path), found.after.get(path)
        if there is None or here is None:
            yield from facet(path, "presence", there and there.entry.type, here and here.entry.type)
            continue
        for name in ("mtime", "was"):
            yield from facet(path, name, getattr(there, name), getattr(here, name))
        for name in (field.name for field in fields(Entry)):
            yield from facet(path, name, getattr(there.entry, name), getattr(here.entry, name))


class Matrix:
    """The cells that are a person's to make, made in each place."""

    def __init__(self, person: Person, base: Path, stack: ExitStack) -> None:
        cells = [Cell(thing, operation) for operation in operations() for thing in objects()]
        cells = cells[:: _EACH.get(person.driver, 1)]
        self.cells = dict(enumerate(cell for cell in cells if person.is_root or not cell.needs_root))
        self.person = person
        self.mount = Mount(person, base)
        stack.callback(self.mount.close)
        self._layers = layers_of(self.cells, (person.uid, person.gid))
        self.outcomes = {FUSESTORE: self._in_container()}
        if not person.has_kernel_mounts:
            self.outcomes[PLAIN] = self._in_directory(stack)
        if person.is_root:
            lowers = []
            for number, layer in enumerate(self._layers):
                lowers.append(base / f"layer{number}")
                lowers[-1].mkdir()
                unpack_layer(layer, lowers[-1])
            self._lower = ":".join(map(str, reversed(lowers)))
            if not person.has_kernel_mounts:
                self.outcomes[DEFAULT] = self._in_overlay(stack, "off")
            self.outcomes[REDIRECTS] = self._in_overlay(stack, "on")

    @property
    def rootfs(self) -> Path:
        return self.mount.containers / "c/rootfs"

    def _perform(self, root: Path, cells: dict[int, Cell]) -> dict[int, Outcome]:
        return self.person.call(lambda: perform(root, cells), deadline_s=_DEADLINE_S)

    def _in_container(self) -> dict[int, Outcome]:
        source = SourceMaker()
        source.add(source.image([tar_layer(layer) for layer in self._layers]), "given")
        self.mount.fusestore("import", f"{source.directory(self.mount.base / 'source')}:given").ok()
        self.mount.mount()
        self.mount.sh("mkdir containers/c").ok()
        return self._perform(self.rootfs, self.cells)

    def _in_directory(self, stack: ExitStack) -> dict[int, Outcome]:
        plain = self.mount.base / "plain"
        RealTree.made(plain, TreeModel(self._layers)).close()
        if self.person.is_root:  # as the mount is: devices do not act
            _mount(stack, plain, "--bind", plain)
            _run("mount", "-o", "remount,bind,nodev,nosuid", plain)
        return self._perform(plain, self.cells)

    def _in_overlay(self, stack: ExitStack, redirects: str) -> dict[int, Outcome]:
        own = self.mount.base / f"redirects-{redirects}"
        for name in ("merged", "diff", "work"):
            (own / name).mkdir(parents=True)
        self.overlay(stack, own / "merged", own, redirects)
        possible = {
            number: cell
            for number, cell in self.cells.items()
            if redirects == "on" or not cell.needs_redirects
        }
        return self._perform(own / "merged", possible)

    def overlay(self, stack: ExitStack, where: Path, own: Path, redirects: str) -> None:
        """The kernel's mount of the image and of the upper in `own`."""
        options = (
            f"nodev,nosuid,index=off,redirect_dir={redirects},lowerdir={self._lower},"
            f"upperdir={own / 'diff'},workdir={own / 'work'}"
        )
        _mount(stack, where, "-t", "overlay", "-o", options, "overlay")

    def snapshot(self, root: Path) -> Snapshot:
        return self.person.call(_snapshot, root, deadline_s=_DEADLINE_S)

    @functools.cached_property
    def tree(self) -> Snapshot:
        """The container's, all cells done; taken in the mount that did them."""
        return self.snapshot(self.rootfs)

    def facets(self, oracle: str, group: str | None = None) -> Iterator[Facet]:
        for number, expected in self.outcomes[oracle].items():
            cell = self.cells[number]
            if group in (None, cell.operation.group):
                yield from _facets(cell, expected, self.outcomes[FUSESTORE][number])


def _unlike(matrix: Matrix) -> frozenset[str]:
    """What the next mount shows otherwise: by `overlay` links are known for one only then."""
    return frozenset({"group"} if matrix.person.driver == "overlay" else ())


def _snapshot(root: Path) -> Snapshot:
    with closing(RealTree(root)) as tree:
        return tree.snapshot()


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, timeout=60)


def _mount(stack: ExitStack, where: Path, *words: str | Path) -> None:
    _run("mount", *words, where)
    stack.callback(_run, "umount", where)


def _explain(oracle: str, facet: Facet) -> list[Difference]:
    return [known for known in DIFFERENCES if oracle in known.oracles and known.explains(facet)]


@pytest.fixture(scope="module")
def matrix(person: Person, area: Path) -> Iterator[Matrix]:
    with ExitStack() as stack:
        yield Matrix(person, area / f"matrix-{person.name}-{person.driver}", stack)


@pytest.mark.parametrize("group", GROUPS)
def test_a_container_does_what_a_plain_directory_does(matrix: Matrix, group: str) -> None:
    assert [str(facet) for facet in matrix.facets(PLAIN, group) if not _explain(PLAIN, facet)] == []


@as_root
@pytest.mark.parametrize("oracle", [DEFAULT, REDIRECTS])
@pytest.mark.parametrize("group", GROUPS)
def test_a_container_does_what_overlayfs_does(matrix: Matrix, oracle: str, group: str) -> None:
    assert [str(facet) for facet in matrix.facets(oracle, group) if not _explain(oracle, facet)] == []


def _numbers_links_apart(facet: Facet) -> bool:
    """A link to what was copied up, over FUSE; its mtime is compared by its number."""
    seen = facet.outcomes[1].after.get(facet.path or b".")
    return facet.field in ("was", "mtime", "group") and seen is not None and seen.entry.nlink > 1


@pytest.mark.parametrize("person", ["erofs", "overlay"], indirect=True)
@pytest.mark.parametrize("group", GROUPS)
def test_the_kernels_container_does_all_that_overlayfs_does(matrix: Matrix, group: str) -> None:
    """But for link counts of directories: the lower layer is one, and overlayfs has them where none merge."""
    known = [_counts_subdirectories]
    if matrix.person.driver == "overlay":
        known.append(_numbers_links_apart)
    unlike = (
        facet for facet in matrix.facets(REDIRECTS, group) if not any(explains(facet) for explains in known)
    )
    assert [str(facet) for facet in unlike] == []


@as_root
@pytest.mark.parametrize(
    ("known", "oracle"),
    [
        pytest.param(known, oracle, id=f"{known.name}-{oracle}")
        for known in DIFFERENCES
        for oracle in known.oracles
    ],
)
def test_what_is_said_to_differ_does(matrix: Matrix, known: Difference, oracle: str) -> None:
    assert any(known.explains(facet) for facet in matrix.facets(oracle))


def test_the_readme_has_all_that_differs() -> None:
    readme = Path(__file__, "../../../README.md").resolve().read_text()
    rows = re.findall(r"^\| (.*?) \|", readme.split("### Beside overlayfs")[1].split("\n#")[0], re.MULTILINE)
    assert rows[1:] == [known.name for known in DIFFERENCES]


@pytest.mark.parametrize("person", ["root", "user", "erofs", "overlay"], indirect=True)
def test_the_next_mount_shows_what_this_one_does(matrix: Matrix, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        counts = ", ".join(f"{len(outcomes)} in {place}" for place, outcomes in matrix.outcomes.items())
        print(f"\n{matrix.person.name}, {matrix.person.driver}: cells of the union matrix: {counts}")
    before = matrix.tree
    matrix.mount.umount()
    matrix.mount.mount()
    assert differences(before, matrix.snapshot(matrix.rootfs), ignore=_unlike(matrix)) == []


@pytest.mark.parametrize("person", ["root", "erofs", "overlay"], indirect=True)
def test_overlayfs_shows_what_this_mount_does(matrix: Matrix) -> None:
    before = matrix.tree
    matrix.mount.umount()
    merged = matrix.mount.base / "merged"
    merged.mkdir()
    with ExitStack() as stack:
        matrix.overlay(stack, merged, matrix.mount.store / "containers/c", "on")
        found = matrix.snapshot(merged)
    matrix.mount.mount()
    assert differences(before, found, ignore=_unlike(matrix) | {"nlink"}) == []
