"""Fixtures of the real thing: images, people, stores, mounts.

A mount costs a second, so most tests share one for each person (`mounted`) and work in containers of their
own (`container`); a test that changes images or mounts takes one for itself (`fresh`).
"""

import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
from rig.distribution import TOOLS as DISTRIBUTION_TOOLS
from rig.distribution import Distribution, make_distribution
from rig.images import TOOLS, Image, Images, make_images
from rig.mounts import Mount, Place, make_area, sweep
from rig.namespace import leave_the_mounts_of_others, user_namespace
from rig.people import Person, plain_user, root
from rig.registries import TOOLS as REGISTRY_TOOLS
from rig.registries import DockerRegistry, docker_registry
from rig.requirements import need

P = TypeVar("P", bound=Place)

DRIVER = os.environ.get("FUSESTORE_TEST_DRIVER", "union")
"""Of root's mounts. With another than the union root's tests are run, but for those marked `by_union`."""


def pytest_configure() -> None:
    if os.geteuid() == 0:
        leave_the_mounts_of_others()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several workers, one tests as root and one as the plain user: each makes its shared mount once."""
    others = [] if DRIVER == "union" else [item for item in items if not _is_drivers(item)]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_person(item) or item.location[0]))


def _is_drivers(item: pytest.Item) -> bool:
    return _person(item) == "root" and item.get_closest_marker("by_union") is None


def _person(item: pytest.Item) -> str | None:
    callspec = getattr(item, "callspec", None)
    return None if callspec is None else callspec.params.get("person")


@pytest.fixture(scope="session")
def area() -> Iterator[Path]:
    """A directory that every user may search, on a disk (tmpfs has no user.* xattrs in older kernels)."""
    parent = os.environ.get("FUSESTORE_TEST_TMP", "/var/tmp")
    sweep(parent)
    path = make_area(parent)
    yield path
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    left = [mount for mount in mounts if mount.startswith(f"{path}/")]
    assert not left, f"mounts are left: {left}"
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def images(area: Path) -> Images:
    """Real images, where every user may read them."""
    _need_tools(TOOLS)
    made = make_images()
    publish = _publisher(area / "images")

    def moved(image: Image) -> Image:
        return replace(image, path=publish(image.path))

    return Images(
        busybox=moved(made.busybox),
        debian=moved(made.debian),
        corners=moved(made.corners),
        zstd=moved(made.zstd),
        chunked=moved(made.chunked),
        oci_archive=publish(made.oci_archive),
        docker_archive=publish(made.docker_archive),
    )


@pytest.fixture(scope="session")
def distribution(area: Path) -> Distribution:
    """A whole Debian, where every user may read it."""
    _need_tools(DISTRIBUTION_TOOLS)
    made = make_distribution()
    publish = _publisher(area / "distribution")
    return Distribution(*map(publish, (made.layout, made.packages, made.wheels)))


@pytest.fixture(scope="session")
def registry(area: Path) -> Iterator[DockerRegistry]:
    """For all tests together: each has repositories of its own."""
    _need_tools(REGISTRY_TOOLS)
    with docker_registry(area / "registry") as running:
        yield running


@pytest.fixture(scope="session")
def locked_registry(area: Path) -> Iterator[DockerRegistry]:
    """One that lets in only USER with PASSWORD (rig.registries)."""
    _need_tools(REGISTRY_TOOLS)
    with docker_registry(area / "locked-registry", wants_password=True) as running:
        yield running


def _need_tools(tools: Sequence[str]) -> None:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    need("images", os.geteuid() == 0 and not missing, f"needs root and {' '.join(missing) or 'nothing else'}")


def _publisher(directory: Path) -> Callable[[Path], Path]:
    """What copies to a new directory that every user may read."""
    directory.mkdir()

    def publish(path: Path) -> Path:
        target = directory / path.name
        subprocess.run(["cp", "-r", path, target], check=True, timeout=120)
        subprocess.run(["chmod", "-R", "a+rX", target], check=True, timeout=120)
        return target

    return publish


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Who makes a test's mounts, where the test does not say: its module's PERSONS, or root and a user."""
    named = any("person" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "person" in metafunc.fixturenames and not named:
        persons = getattr(metafunc.module, "PERSONS", ("root", "user"))
        metafunc.parametrize("person", persons, indirect=True, scope="session")


@pytest.fixture(scope="session")
def person(request: pytest.FixtureRequest) -> Iterator[Person]:
    """Root (by the name of a driver with that), or a plain user: able to run the command and to mount.

    "overlay-user" is the plain user in a user namespace of theirs.
    """
    with ExitStack() as stack:
        yield _find_person(request.param, stack)


def _find_person(name: str, stack: ExitStack) -> Person:
    if name not in ("user", "overlay-user"):
        need("root", os.geteuid() == 0, "run the tests as root to test root's mounts")
        found = replace(root(), driver=DRIVER if name == "root" else name)
    else:
        found = plain_user()
        why = f"{found.name} cannot run the installed fusestore: put it and its Python where all may read"
        need("root", _can_run_fusestore(found), why)
        if name == "overlay-user":
            holder = stack.enter_context(user_namespace(found.uid, found.gid))
            found = replace(found, driver="overlay", holder=holder)
    need("fuse", os.path.exists("/dev/fuse"), "there is no /dev/fuse: modprobe fuse")
    mode = os.stat("/dev/fuse").st_mode
    accessible = found.is_root or bool(mode & stat.S_IWOTH and shutil.which("fusermount3"))
    need("fuse", accessible, "a plain user needs fusermount3 and a /dev/fuse of mode 0666")
    return found


def _can_run_fusestore(person: Person) -> bool:
    try:
        return person.run("fusestore", "--version").code == 0
    except PermissionError:
        return False


@pytest.fixture(scope="session")
def _shared(person: Person, images: Images, area: Path) -> Iterator[Mount]:
    mount = Mount(person, area / f"shared-{person.name}-{person.driver}")
    try:
        # The first becomes the default, which containers made by mkdir are of.
        mount.fusestore("import", images.busybox.source).ok()
        mount.fusestore("import", images.debian.source).ok()
        mount.fusestore("import", images.corners.source).ok()
        mount.mount()
        yield mount
    finally:
        mount.close()


@pytest.fixture
def mounted(_shared: Mount) -> Iterator[Mount]:
    """A mount shared with other tests, of a store with busybox (the default), debian and corners."""
    _shared.revive()
    assert _shared.is_mounted()
    yield _shared
    _shared.check_log()


@pytest.fixture
def container(mounted: Mount) -> Iterator[str]:
    """The id of a new container of busybox, in `mounted`; deleted afterwards if it is still there."""
    name = mounted.new_id()
    mounted.sh("mkdir containers/$1", name).ok()
    yield name
    mounted.sh("if [ -e containers/$1 ]; then echo '{\"mounted\": false}' > containers/$1/metadata.json; "
               "rmdir containers/$1; fi", name).ok()  # fmt: skip


@pytest.fixture
def place(person: Person, area: Path) -> Iterator[Place]:
    """Directories for a store that does not exist yet."""
    yield from _fresh(area, lambda base: Place(person, base))


@pytest.fixture
def unmounted(person: Person, images: Images, area: Path) -> Iterator[Mount]:
    """A store of this test's own with busybox in it, not mounted yet; taken away afterwards."""
    for mount in _fresh(area, lambda base: Mount(person, base)):
        mount.fusestore("import", images.busybox.source).ok()
        try:
            yield mount
        finally:
            mount.close()


@pytest.fixture
def fresh(unmounted: Mount) -> Mount:
    """The same, mounted."""
    return unmounted.mount()


def _fresh(area: Path, make: Callable[[Path], P]) -> Iterator[P]:
    base = Path(tempfile.mkdtemp(prefix="own-", dir=area))
    base.rmdir()
    yield make(base)
    shutil.rmtree(base)
