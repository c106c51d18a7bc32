"""The changes of a store that may be cut off at each step, and what a user can tell of it then. Blocking."""

import os
import shutil
import stat
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from rig.ocisources import OCI, SourceMaker, pulled
from rig.stargz import make_stargz
from rig.stores import Exiting, open_at

from fusestore import disk
from fusestore.check import check
from fusestore.clone import clone
from fusestore.commit import CommitOptions, commit
from fusestore.drivers import snapshot
from fusestore.layout import Layout
from fusestore.lazylayer import Origins
from fusestore.reclaim import reclaim
from fusestore.reference import Reference, parse_reference
from fusestore.registry import RegistryOptions
from fusestore.sources import Source, open_source
from fusestore.store import Store
from fusestore.transfer import _in_parts

__all__ = ["OPERATIONS", "STRIDES", "exit_at", "fresh", "left_over", "old_and_new", "prepare", "state"]


def state(store: Store) -> dict[str, object]:
    """What a user can tell of a store."""
    documents = {}
    for container_id in store.container_ids():
        document = store.get_container_metadata(container_id)
        del document["created-at"]
        documents[container_id] = document
    return {
        "images": {image.id: image for image in store.images()},
        "names": store.image_names(),
        "containers": documents,
        "container names": store.container_names(),
        "layers": {
            image.id: [(store.local_tar(layer) is not None, store.is_lazy(layer)) for layer in image.layers]
            for image in store.images()
        },
        "written": {container_id: _files(Path(store.upper_dir(container_id))) for container_id in documents},
        "for the kernel": [
            image.id
            for image in store.images()
            if os.path.exists(Layout(store.path).metadata_image(image.id))
        ],
    }


def _files(root: Path) -> dict[str, bytes]:
    paths = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def prepare(store: Store, one: str) -> None:
    """Images: one with a local tar, one without a name, one that is lazy. Containers: one with a name, one in
    which something was written."""
    image = store.import_image(one)
    for name in store.import_image(_stargz_source(store, "loose")).names:
        store.untag(name)
    store.import_source(lambda _: _lazily(_stargz_source(store, "lazy")))
    store.hydrate_layer(image, image.layers[1], lambda count: None)
    store.create_container(container_id="kept", container_name="its-name")
    store.create_container("one", container_id="plain")
    with snapshot(store, "plain"):
        pass  # now it is said how files are kept
    upper = Path(store.upper_dir("plain"))
    upper.mkdir(stat.S_IRWXU)
    (upper / "written").write_text("content")
    os.utime(upper / "written", (1, 1))


_blobs: dict[str, bytes] = {}
"""By digest: what the registry has."""


def _stargz_source(store: Store, name: str) -> str:
    """Beside the store."""
    maker = SourceMaker()
    member = tarfile.TarInfo(name)
    content = name.encode() * 1000
    member.size = len(content)
    stargz = make_stargz([(member, content)], chunk_size=3000)
    blob = {**maker.blob(stargz.data, OCI + "layer.v1.tar+gzip"), "annotations": stargz.annotations}
    _blobs[blob["digest"]] = stargz.data
    changes = {"rootfs": {"type": "layers", "diff_ids": [stargz.diff_id]}}
    image = maker.image(changes=changes, layers=[blob])
    return maker.add(image, f"{name}:1").directory(Path(store.path).parent / name)


class _Registry:
    """The part of a registry that lazy layers need."""

    reference = parse_reference("registry.test/image:1")

    def blob_range(self, digest: str, size: int, start: int, end: int) -> bytes:
        return _blobs[digest][start:end]

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class _Registries(RegistryOptions):
    def open(self, reference: Reference, *, pushes: bool = False) -> Any:
        return _Registry()


def _lazily(text: str) -> Source:
    """The source, as `pull --lazy` takes it."""
    return _in_parts(open_source(text), cast(Any, _Registry()), plain_http=False)


def _complete(store: Store) -> None:
    store._layers._origins = Origins(_Registries, is_hasty=False)
    (ref,) = store.lazy_layers()
    store.complete_layer(ref)


def _add_a_file(_: str, directory: str) -> None:
    Path(directory, "workdir/more").touch()


def _commit(store: Store) -> None:
    commit(store, "plain", "made:1", CommitOptions(epoch_s=1))


def _hydrate(store: Store) -> None:
    image = store.image("one")
    store.hydrate_layer(image, image.layers[0], lambda count: None)


def _dehydrate(store: Store) -> None:
    image = store.image("one")
    store.dehydrate_layer(image, image.layers[1])


OPERATIONS: dict[str, Callable[[Store, str], object]] = {
    "create": lambda store, _: store.create_container(container_id="new"),
    "create with a name": lambda store, _: store.create_container(container_id="new", container_name="n"),
    "copy": lambda store, _: store.copy_container("kept", "new", _add_a_file),
    "delete": lambda store, _: store.delete_container("plain"),
    "delete with a name": lambda store, _: store.delete_container("kept"),
    "change an id": lambda store, _: store.rename_container("plain", "moved"),
    "change an id under a name": lambda store, _: store.rename_container("kept", "moved"),
    "change a name": lambda store, _: store.rename_container("its-name", "other"),
    "give up a name": lambda store, _: store.rename_container("its-name", "kept"),
    "set metadata": lambda store, _: store.set_container_metadata("plain", {"a": 1}),
    "set metadata with a name": lambda store, _: store.set_container_metadata("plain", {"a": 1, "name": "n"}),
    "import": lambda store, two: store.import_image(two),
    "pull": lambda store, two: store.import_source(lambda _: pulled(two)),
    "import with names": lambda store, two: store.import_image(two, ["one", "x:1"]),
    "tag": lambda store, _: store.tag("one", "again"),
    "untag": lambda store, _: store.untag("one"),
    "rename a tag": lambda store, _: store.rename_tag("one", "default", replace=True),
    "commit": lambda store, _: _commit(store),
    "hydrate": lambda store, _: _hydrate(store),
    "dehydrate": lambda store, _: _dehydrate(store),
    "clone": lambda store, _: clone(store, "plain", "new"),
    "collect garbage": lambda store, _: list(reclaim(store)),
    "pull lazily": lambda store, _: store.import_source(lambda _: _lazily(_stargz_source(store, "other"))),
    "complete a lazy layer": lambda store, _: _complete(store),
    "make an image for the kernel": lambda store, _: store.metadata_image(store.image("one")),
    "empty the trash": lambda store, _: store.empty_trash(),
}
"""`two` is an image to import."""

STRIDES = {"commit": 19, "import": 3, "pull": 5, "import with names": 3}
"""Of these one step in so many is tried in CI; tests/bench/crashes.py tries all."""


def old_and_new(
    base: Path, one: str, two: str, operation: Callable[[Store, str], object]
) -> tuple[dict[str, object], dict[str, object]]:
    """The states before and after an operation; base/old is left as it was before."""
    with open_at(base / "old") as store:
        prepare(store, one)
        old = state(store)
    with open_at(fresh(base, -1)) as store:
        operation(store, two)
        return old, state(store)


def fresh(base: Path, number: int) -> Path:
    """A copy of what `old_and_new` made."""
    place = base / str(number)
    shutil.copytree(base / "old", place, symlinks=True)
    return place


def exit_at(place: Path, operation: Callable[[Store, str], object], two: str, point: int) -> bool:
    """Does the operation in a process that ends at that point, at once; whether it was done before."""
    pid = os.fork()
    if pid == 0:
        try:
            with open_at(place) as store:
                disk.current = Exiting(point)
                operation(store, two)
                os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, Exiting.CODE)
    return code == 0


def left_over(store: Store) -> list[str]:
    """What should not be in a store that was opened after a crash."""
    found = [str(finding) for finding in check(store)]
    return found + os.listdir(f"{store.path}/tmp")
