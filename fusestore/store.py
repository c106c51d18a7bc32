"""A store: images and containers on disk, with or without a mount. The Python API. Blocking.

    with Store.open("/var/lib/fusestore", create=True) as store:
        image = store.import_image("oci:busybox:1")
        info = store.create_container(image_name="busybox:1", container_name="job")
        ...
        store.delete_container("job")

It does what libpod's storage service did: create_container, delete_container, set_/get_container_metadata,
start_container, stop_container, work_dir, run_dir. The files are the truth, not this object: any number of
processes may have the same store open, with a mount or without one, and each sees at once what another did.

A `ref` of a container is its id, its name, or the first 12 or more digits of an id made at random; of an
image a name, an id, or the first 12 or more digits of one. All errors are of `fusestore.errors`, or OSError
where the disk itself fails; an operation that raises has changed nothing. Thread-safe. Whoever opens a store
closes it.
"""

import contextlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import disk, metadata, oci
from .containers import Bindings, Container, Containers, Draft, Hold
from .downloads import discard_download
from .durable import Scratch, Workspace, read_file, read_intent
from .errors import BadInput, Busy, FusestoreError, NotFound, StoreDamaged, StoreUnusable
from .images import Catalog, Entry, Image, Images
from .importer import Importer, Progress
from .layerfiles import Layer, LayerFiles
from .layerref import LayerRef
from .layout import DEFAULT_TAG, INTENT, Layout, RunLayout, default_run_dir
from .mounts import Changed, MountRecord, Mounts, forget_former_boot, is_of_this_boot
from .names import parse_container_id
from .nodes import Digest
from .sources import Source, open_source
from .storedir import prepare_run, require_store
from .syscalls import syncfs

if TYPE_CHECKING:
    from .registry import RegistryOptions

__all__ = [
    "Bindings",
    "Catalog",
    "Container",
    "ContainerInfo",
    "Hold",
    "Image",
    "Layer",
    "LayerRef",
    "MountRecord",
    "Progress",
    "Scratch",
    "SpanUse",
    "Store",
]

_ID_BYTES = 32
"""Of a container id made at random: 64 hex digits, as libpod's."""

_SCHEME_MAX = 1 << 10

_log = logging.getLogger("fusestore")


@dataclass(frozen=True, slots=True)
class ContainerInfo:
    """A container just made."""

    id: str
    dir: Path
    """What `Store.work_dir` gives."""
    run_dir: Path
    """What `Store.run_dir` gives."""
    config: dict[str, Any]
    """The OCI config of its image; {} while it has none."""


class SpanUse(NamedTuple):
    """The cache of what was decompressed (fusestore.spancache)."""

    hits: int = 0
    misses: int = 0
    used: int = 0
    """Bytes on disk."""
    capacity: int = 0
    """Bytes it may take."""


def _usual_registries() -> "RegistryOptions":
    from .registry import usual_options  # urllib3 costs each command 50 ms

    return usual_options(os.environ)


class Store:
    """An open store. Make one with `open`."""

    def __init__(
        self,
        layout: Layout,
        run: RunLayout,
        cache_size: int | None,
        registries: "Callable[[], RegistryOptions]",
    ) -> None:
        self._layout = layout
        self._run = run
        self._workspace = Workspace(tmp=layout.tmp, trash=layout.trash, lock=layout.lock)
        self._run_workspace = Workspace(tmp=run.tmp, trash=run.trash, lock=layout.lock)
        self._containers = Containers(layout, run, self._workspace)
        self._images = Images(layout, self._workspace)
        self._layers = LayerFiles(layout, self._workspace, cache_size, registries)
        self._importer = Importer(layout, self._workspace, self._images, self._layers)
        self._mounts = Mounts(run)
        self._leaves_trash = False
        self._empties_trash = True
        self.is_new = False
        """Whether `open` made the store."""

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        run_dir: str | os.PathLike[str] | None = None,
        *,
        create: bool = False,
        cache_size: int | None = None,
        registries: "Callable[[], RegistryOptions]" = _usual_registries,
    ) -> "Store":
        """The store at `path`.

        `run_dir`: where run-time state is kept; all who use a store name the same. Default: what the command
        takes too, $FUSESTORE_RUN_DIR, /run/fusestore for root, the user's runtime directory. `create`: make a
        store where nothing or an empty directory is; two processes may do so at once. `cache_size`: bytes of
        decompressed layers to keep on disk, shared by all layers; default: a tenth of what is free.
        `registries`: how to talk to those of lazy images; default: as the environment says.

        What a crash left behind is cleaned up. Raises StoreUnusable, in the words of layout.py.
        """
        if run_dir is None:
            run_dir = default_run_dir(os.environ, os.geteuid())
        for what, directory in (("store", path), ("run directory", run_dir)):
            if not os.fspath(directory):
                raise StoreUnusable(f"the path of the {what} is empty: name a directory, or leave it out")
        root = os.path.realpath(path)
        layout = Layout(root)
        try:
            is_new = require_store(layout, create)
            run = prepare_run(run_dir, root)
            store = cls(layout, run, cache_size, registries)
            store.is_new = is_new
            if not is_of_this_boot(run):
                with store._workspace.lock():
                    forget_former_boot(run)
            store._recover()
        except (PermissionError, FileExistsError, NotADirectoryError, FileNotFoundError) as error:
            reason = f"{error.filename or root} cannot be used ({error.strerror})"
            raise StoreUnusable(f"{reason}: name directories of yours with --store and --run-dir") from error
        return store

    def close(self) -> None:
        """Gives back what this object deleted, and closes layers nobody uses. Idempotent."""
        self._layers.close()
        if self._leaves_trash and self._empties_trash:
            self.empty_trash()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def remove_if_empty(self) -> None:
        """Takes the store away again, where nothing was put into it: for who made it in vain."""
        with self._workspace.lock():
            layout = self._layout
            unused = (layout.blobs, layout.layers, layout.images, layout.containers, layout.names, layout.tmp)
            if any(os.listdir(directory) for directory in unused):
                return
            try:
                os.rmdir(layout.downloads)
            except FileNotFoundError:
                pass
            except OSError:
                return  # there is something to go on from
            self.empty_trash()
            for file in (layout.format_file, layout.oci_layout, layout.index):
                os.unlink(file)
            for directory in reversed(layout.directories):
                os.rmdir(directory)
            os.unlink(layout.lock)
            with contextlib.suppress(OSError):  # it may be a mount point, or in a directory of another's
                os.rmdir(layout.root)

    @property
    def path(self) -> str:
        """Absolute, without symlinks."""
        return self._layout.root

    @property
    def run_path(self) -> str:
        """This store's part of the run directory."""
        return self._run.root

    # Images

    def images_changed_ns(self) -> int:
        """When an image or a name of one came or went last. Raises StoreDamaged."""
        return self._images.changed_ns()

    def images(self) -> list[Image]:
        """In the order in which they came."""
        return list(self._images.catalog().images.values())

    def image_ids(self) -> list[str]:
        return list(self._images.catalog().images)

    def has_image(self, image_id: str) -> bool:
        return image_id in self._images.catalog().images

    def image_names(self) -> dict[str, str]:
        """name → id. One stat, as long as nothing changes."""
        return dict(self._images.catalog().names)

    def catalog(self) -> Catalog:
        """index.json, understood: the same object as long as the file does not change."""
        return self._images.catalog()

    def image_entries(self) -> tuple[Entry, ...]:
        """index.json, also what in it cannot be understood."""
        return self._images.catalog().entries

    def describe_image(self, image: Image) -> Image:
        """`image` as its manifest and config describe it. Raises StoreDamaged, BadSource."""
        descriptor = oci.Descriptor(oci.MANIFEST_TYPE, image.manifest, 0)
        return replace(self._images.image_of(descriptor), names=image.names)

    def forget_images(self) -> None:
        """Has them be read again from disk, where somebody repaired what they are made of."""
        self._images.forget()

    def image(self, ref: str) -> Image:
        """Raises NotFound."""
        return self._images.find(ref)

    def import_image(self, source: str, names: Sequence[str] = (), progress: Progress | None = None) -> Image:
        """Takes in what `source` means (fusestore.sources), whole and verified, or nothing.

        `names`: what to call it, instead of what the source calls it; a name that another image has moves to
        this one. In a store without a `default` the image gets that name too. An image that is there already
        only gets the names, and is repaired where its blobs are missing or damaged.

        Raises BadSource, BadName, LayerRefused, Exists (a name that cannot stand beside another).
        """
        return self.import_source(lambda scratch: open_source(source, scratch=scratch), names, progress)

    def import_source(
        self,
        open_source: Callable[[str], Source],
        names: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> Image:
        """As `import_image`, of what `open_source` opens, given a directory for temporary files.

        It is called again where other processes delete meanwhile what the image shares with others.
        """
        image = self._importer.run(open_source, names, progress)
        self.reopen_layers()
        self._mounts.announce(Changed("images", image.id))
        return image

    def tag(self, ref: str, name: str, replace: bool = False) -> None:
        """Gives an image another name. Raises NotFound, BadName; Exists if it is taken, unless `replace`."""
        self._images.tag(ref, name, replace_other=replace)
        self._mounts.announce(Changed("images", name))

    def untag(self, name: str) -> None:
        """Takes a name away; the image stays. Raises NotFound."""
        self._images.untag(name)
        self._mounts.announce(Changed("images", name))

    def rename_tag(self, old: str, new: str, replace: bool = False) -> None:
        """Raises NotFound, BadName; Exists if `new` is taken, unless `replace`."""
        self._images.rename_tag(old, new, replace_other=replace)
        self._mounts.announce(Changed("images", old))

    def change_names(self, given: Mapping[str, str], taken_away: Mapping[str, str]) -> None:
        """All of it in one step, or nothing. Both: name → id of an image.

        Those of `given` are the images', whoever had them; those of `taken_away` go where they are still that
        image's. Raises NotFound, BadName, Exists.
        """
        self._images.change_names(given, taken_away)
        for name in {**given, **taken_away}:
            self._mounts.announce(Changed("images", name))

    def delete_image(self, ref: str) -> None:
        """Takes an image away, with what only it used. Raises NotFound; Busy while a container uses it."""
        self._delete_image(self.image(ref).id, lambda image_id: self._containers.uses_image(image_id, {}))

    def prune_image(self, image_id: str, known: Bindings, *, is_dry: bool = False) -> None:
        """As `delete_image`, but Busy also while it has a name. `is_dry`: only raises.

        `known`, empty at first, spares later calls what they would read again.
        """

        def user_of(image_id: str) -> str | None:
            if self._images.find(image_id).names:
                raise Busy(f"image {image_id[:12]} has a name: remove that first")
            return self._containers.uses_image(image_id, known)

        # Once before the lock is taken: that reads the documents.
        user = user_of(image_id)
        if user is not None:
            raise Busy(f"image {image_id[:12]} is used by container {user}: delete that first")
        if not is_dry:
            self._delete_image(image_id, user_of)

    def _delete_image(self, image_id: str, user_of: Callable[[str], str | None]) -> None:
        self._leaves_trash = True
        self._layers.drop(self._images.delete(image_id, user_of))
        self._mounts.announce(Changed("images", image_id))

    def unreferenced(self) -> list[str]:
        """Paths of what belongs to no image."""
        return self._images.unreferenced(self._images.parts())

    def sweep(self) -> None:
        """Takes away what belongs to no image."""
        self._leaves_trash = True
        parts = self._images.parts()
        with self._workspace.lock():
            self._images.sweep_locked(parts)

    def discard_cache(self, diff_id: Digest) -> None:
        """Takes away what was kept decompressed of a layer. Who has it open keeps that, and its space."""
        self._leaves_trash = True
        self._workspace.discard(self._layout.span_cache(diff_id))

    def discard_download(self, path: str, *, is_dry: bool = False) -> bool:
        """Takes away what is here of a blob, a file of downloads/; False: somebody is fetching the rest.

        `is_dry`: only looks.
        """
        return discard_download(self._workspace, path, is_dry=is_dry)

    def open_layers(self, image: Image, *, is_whole: bool = False) -> list[Layer]:
        """Bottom first; shared with all others who opened them in this process. Keep them while you read.

        Missing or damaged derived files are made again, which takes time. Raises StoreDamaged for blobs.
        `is_whole`: all readers are of tars, for which lazy layers are fetched; raises NotFetched.
        """
        return [self._layers.open(ref, is_whole=is_whole) for ref in image.layers]

    def open_layer(self, ref: LayerRef) -> Layer:
        """One of them, with `is_whole`."""
        return self._layers.open(ref, is_whole=True)

    def lazy_layers(self) -> list[LayerRef]:
        """Those whose blobs are still in a registry, and read from there in parts. Looks for each layer."""
        images = self._images.catalog().images.values()
        return [ref for ref in dict.fromkeys(ref for image in images for ref in image.layers)
                if self._layers.is_lazy(ref)]  # fmt: skip

    def is_lazy(self, ref: LayerRef) -> bool:
        """Whether it is one of those."""
        return self._layers.is_lazy(ref)

    def complete_layer(self, ref: LayerRef) -> None:
        """Returns when the layer's blob is here: fetched, if need be. Raises NotFetched, StoreDamaged."""
        if self._layers.is_lazy(ref):
            self._layers.complete(ref)

    def complete_layers(self) -> list[str]:
        """Fetches all lazy layers, what is wanted early first. What went wrong, a line for each."""
        problems = {}
        for work in (self._layers.read_ahead, partial(self._layers.complete, is_background=True)):
            try:
                lazy = self.lazy_layers()
            except (FusestoreError, OSError) as error:
                return [str(error)]
            for ref in lazy:
                try:
                    work(ref)
                except (FusestoreError, OSError) as error:
                    problems[ref] = str(error)
        return list(problems.values())

    def layer_tar_size(self, ref: LayerRef) -> int:
        """Bytes of the layer as a tar; -1 where its index has to be made first."""
        return self._layers.tar_size(ref)

    def span_use(self) -> SpanUse:
        """What became of reads of compressed layers, by this process, until now."""
        cache = self._layers.cache
        return SpanUse() if cache is None else SpanUse(cache.hits, cache.misses, cache.used, cache.capacity)

    def local_tar(self, ref: LayerRef) -> str | None:
        """The file that is the layer's tar, where there is one: its blob, or what `hydrate_layer` made."""
        return self._layers.local_tar(ref)

    def hydrate_layer(self, image: Image, ref: LayerRef, progress: Callable[[int], object]) -> None:
        """Makes the local tar of a layer of `image`, where it has none: whole and verified, or not at all.

        `progress` is told the length of each piece. Mounts read it from then on. Raises NotFound (the image
        was deleted meanwhile), StoreDamaged, OSError.
        """
        if self.local_tar(ref) is None:
            self._layers.hydrate(ref, lambda: self._images.find(image.id), progress)
            self._tar_changed(image)

    def dehydrate_layer(self, image: Image, ref: LayerRef) -> None:
        """Takes the local tar of a layer of `image` away, in all images that have it."""
        self._leaves_trash = True
        self._layers.dehydrate(ref)
        self._tar_changed(image)

    def _tar_changed(self, image: Image) -> None:
        self.reopen_layers()
        self._mounts.announce(Changed("images", image.id))

    def reopen_layers(self) -> None:
        """Has open layers read the blobs and tars that are there now: others too replace and remove some."""
        self._layers.reopen()

    def give_back_pages(self) -> None:
        """Has the kernel drop what it caches of the files of layers open here, where it is on disk."""
        self._layers.give_back()

    def metadata_image(self, image: Image) -> str:
        """The file with its merged tree for the kernel (fusestore.erofs), made if it is missing.

        Its devices are the layers' tars, bottom first. Raises NotSupported for a tree EROFS cannot hold.
        """
        path = self._layout.metadata_image(image.id)
        if not os.path.exists(path):
            from .metadataimage import write_metadata_image

            layers = self.open_layers(image, is_whole=True)
            with self._workspace.scratch() as scratch:
                write_metadata_image(layers, scratch.create("image"))
                with self._workspace.lock():
                    self._images.find(image.id)  # deleted meanwhile, it is not to come back
                    self._workspace.publish((scratch.join("image"), path))
        return path

    def manifest(self, image: Image) -> bytes:
        """Raises StoreDamaged."""
        return self._images.read_blob(image.manifest, "manifest")

    def config(self, image: Image) -> bytes:
        """Raises StoreDamaged."""
        return self._images.read_blob(image.config, "config")

    def image_config(self, image: Image) -> dict[str, Any]:
        """The image's OCI config. Raises StoreDamaged."""
        return oci.parse_object(self.config(image), f"config {image.config}")

    def image_metadata(self, image: Image) -> bytes:
        """What images/<id>/metadata.json shows: JSON, newline at the end."""
        shown = {
            "id": image.id,
            "names": list(image.names),
            "created": image.created,
            "architecture": image.architecture,
            "os": image.os,
            "manifest-digest": image.manifest,
            "size": image.size,
            "layers": [
                {
                    "digest": layer.blob,
                    "diff-id": layer.diff_id,
                    "size": layer.size,
                    "media-type": layer.media_type,
                }
                for layer in image.layers
            ],
        }
        return json.dumps(shown, ensure_ascii=False, indent=2).encode() + b"\n"

    def blob_path(self, digest: Digest) -> str:
        """Where a blob is, or would be."""
        return self._layout.blob(digest)

    # Containers

    def container_ids(self) -> list[str]:
        """In no order."""
        return self._containers.ids()

    def container_names(self) -> dict[str, str]:
        """name → id, of containers whose name is not their id."""
        return self._containers.names()

    def container_id(self, ref: str) -> str:
        """Raises NotFound."""
        return self._containers.resolve(ref)

    def container(self, ref: str) -> Container:
        """Raises NotFound."""
        return self._containers.get(ref)

    def create_container(
        self,
        image_name: str | None = None,
        image_id: str | None = None,
        container_name: str | None = None,
        container_id: str | None = None,
        mount_label: str | None = None,
    ) -> ContainerInfo:
        """Makes a container; its cost depends neither on the image's size nor on the number of containers.

        Without an image it gets the one tagged `default`; if there is none it is unbound: empty until its
        metadata names one. An id is made at random where none is given; an empty id, name or label is none.
        Raises NotFound, BadName, BadDocument (the label), Exists.
        """
        chosen_id = _new_id(container_id)
        name = parse_container_id(container_name) if container_name else chosen_id
        label = mount_label or ""
        metadata.check_label(label)
        if image_name is None and image_id is None:
            bound_name, bound_id = self._default_image()
        else:
            bound_name, bound_id = self._image_of(image_name, image_id)
        document = {"image-name": bound_name, "image-id": bound_id}
        if name != chosen_id:
            document["name"] = name
        if label:
            document["mountlabel"] = label
        return self._make_container(Draft(chosen_id, document))

    def copy_container(self, ref: str, new_id: str | None, fill: Callable[[str, str], None]) -> ContainerInfo:
        """Makes a container of the same image, with the same label and keys of the user's; not started.

        `fill(from, to)` puts more of the one directory into the other before anybody sees the new container;
        what it raises is raised. Raises NotFound, BadName, Exists.
        """
        container_id = self._containers.resolve(ref)
        draft = self._containers.draft_like(container_id, _new_id(new_id))
        source = self._layout.container(container_id)
        return self._make_container(replace(draft, fill=partial(fill, source)))

    def _make_container(self, draft: Draft) -> ContainerInfo:
        image_id = draft.document["image-id"]
        config = self.image_config(self._images.find(image_id)) if image_id else {}

        def confirm_image() -> None:
            if image_id:
                self._images.find(image_id)

        run_dir = self._containers.create(draft, confirm_image)
        try:
            self._mounts.announce(Changed("containers", draft.id))
        except BaseException:
            self._containers.delete(draft.id)
            raise
        return ContainerInfo(
            id=draft.id,
            dir=Path(self._layout.workdir(draft.id)),
            run_dir=Path(run_dir),
            config=config,
        )

    def delete_container(self, ref: str) -> None:
        """Takes a container away, with all it holds. Raises NotFound; Busy while started or in use.

        `empty_trash`, or `close`, gives the space back.
        """
        self._leaves_trash = True
        self._have_idle(self._containers.resolve(ref))
        container_id = self._containers.delete(ref)
        self._mounts.announce(Changed("containers", container_id))

    def rename_container(self, old: str, new: str) -> None:
        """An id becomes another id, a name another name. Raises as deleting does, and BadName, Exists."""
        self._have_idle(self._containers.resolve(old))
        self._containers.rename(old, new)
        self._mounts.announce(Changed("containers", old))

    def set_container_metadata(self, ref: str, document: bytes | dict[str, Any]) -> None:
        """Replaces the metadata document (fusestore.metadata): all of it is done, or nothing.

        `mounted` in it starts or stops the container. Raises NotFound, BadDocument, BadName, NotPermitted,
        Exists; Busy for binding a container that was used, and for a new name while started.
        """
        if not isinstance(document, bytes):
            try:
                document = json.dumps(document, allow_nan=False).encode()
            except (TypeError, ValueError, RecursionError) as error:
                raise BadInput(f"the document cannot be JSON: {error}") from None
        parsed = metadata.parse_document(document)
        if metadata.quota_of(parsed) is not None or parsed.get("mountlabel"):
            self._have_idle(self._containers.resolve(ref))  # where the kernel serves it, which knows neither
        with self._workspace.lock():
            container_id = self._containers.resolve(ref)
            self._containers.apply_locked(container_id, parsed, self._image_of)
        self._mounts.announce(Changed("containers", container_id))

    def get_container_metadata(self, ref: str) -> dict[str, Any]:
        """The document as metadata.json shows it. Raises NotFound."""
        return metadata.parse_document(self.document(self._containers.resolve(ref)))

    def document(self, container_id: str) -> bytes:
        """metadata.json. Raises NotFound."""
        return self._containers.document(container_id)

    def is_started(self, container_id: str) -> bool:
        """One stat; no document is read."""
        return self._containers.is_mounted(container_id)

    def version(self, container_id: str) -> tuple[int, ...]:
        """Another value whenever `document` may give another one. Two stats. Raises NotFound."""
        return self._containers.version(container_id)

    def start_container(self, ref: str) -> Path:
        """Pins the container and says where its rootfs is. Started twice is started: one stop ends it.

        Raises NotFound, also if no mount of this store is live.
        """
        mounts = self.mounts()
        if not mounts:
            raise NotFound(f"no mount of {self.path} is live: run fusestore mount MOUNTPOINT first")
        with self._workspace.lock():
            container_id = self._containers.resolve(ref)
            self._containers.set_mounted_locked(container_id, True)
        self._mounts.announce(Changed("containers", container_id))
        return Path(mounts[0].mountpoint, "containers", container_id, "rootfs")

    def stop_container(self, ref: str) -> None:
        """Releases the container; nothing if it is not started. Raises NotFound."""
        with self._workspace.lock():
            container_id = self._containers.resolve(ref)
            self._containers.set_mounted_locked(container_id, False)
        self._mounts.announce(Changed("containers", container_id))

    def work_dir(self, ref: str) -> Path:
        """A directory, 0700, that lives as long as the container. Raises NotFound."""
        return Path(self._layout.workdir(self._containers.resolve(ref)))

    def run_dir(self, ref: str) -> Path:
        """A directory, 0700, that is empty after a reboot; made when first asked for. Raises NotFound."""
        return Path(self._containers.make_rundir(self._containers.resolve(ref)))

    def upper_dir(self, container_id: str) -> str:
        """Its upper directory, in overlayfs's format."""
        return self._layout.upper(container_id)

    def overlay_work_dir(self, container_id: str) -> str:
        """Its work directory for overlayfs."""
        return self._layout.work(container_id)

    def hold(self, ref: str) -> Hold:
        """Keeps a container from being deleted, renamed or bound, while it is in use.

        Raises NotFound, and Locked while another process does one of these: that is soon over.
        """
        return self._containers.hold(ref)

    def is_held(self, container_id: str) -> bool:
        """Whether anybody keeps a container so now."""
        return self._containers.is_held(container_id)

    # Mounts, rubbish

    def record_mount(self, mountpoint: str, pid: int, driver: str, device: str | None = None) -> MountRecord:
        """Makes a mount known to `mounts`, until the record is closed or the process ends. `device` is
        MAJOR:MINOR."""
        return self._mounts.record(mountpoint, pid, driver, device)

    def mounts(self) -> list[MountRecord]:
        """The live mounts of this store."""
        return self._mounts.live()

    def ask_mount(self, mountpoint: str) -> dict[str, Any]:
        """What the mount at `mountpoint`, a path without symlinks, says of itself (fusestore.watch).

        Raises NotFound; Busy where it does not answer within seconds.
        """
        return self._mounts.ask(mountpoint)

    def scheme(self, proposed: str) -> str:
        """How containers' files are kept (layout.py): as the store says, or `proposed` if it does not yet."""
        with self._workspace.lock():
            try:
                return read_file(self._layout.scheme, _SCHEME_MAX).decode("ascii", "replace").strip()
            except FileNotFoundError:
                self._workspace.write_file(self._layout.scheme, f"{proposed}\n".encode())
        return proposed

    def write_back(self) -> None:
        """Has the kernel write what it keeps for the live mounts into the store."""
        for record in self.mounts():
            with contextlib.suppress(OSError):  # unmounted, or dead: then it keeps nothing
                fd = os.open(record.mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    syncfs(fd)
                finally:
                    os.close(fd)

    def ask_to_leave(self, container_id: str = "") -> None:
        """Has every other mount let go of a container, or of all, where it is idle. Returns when done."""
        self._mounts.ask_to_leave(container_id)

    def _have_idle(self, container_id: str) -> None:
        if self.is_held(container_id):
            self.ask_to_leave(container_id)

    def lock(self) -> AbstractContextManager[None]:
        """While it is held nobody adds, removes or renames anything, and every method here that would waits.

        Not reentrant: the thread that holds it only reads. Raises Busy after a minute.
        """
        return self._workspace.lock()

    def scratch(self) -> Scratch:
        """A private directory on the filesystem of the containers; the caller closes it."""
        return self._workspace.scratch()

    def unnamed_file(self) -> int:
        """A descriptor of a new file, to read and write, on the filesystem of the store: gone with it."""
        with self._workspace.scratch() as scratch:
            fd = scratch.create("unnamed")
            disk.current.unlink(scratch.join("unnamed"))
            return fd

    def run_scratch(self) -> Scratch:
        """The same on the filesystem of the run directory, for what becomes part of a rundir."""
        return self._run_workspace.scratch()

    def empty_trash(self) -> None:
        """Gives back the space of what was deleted, by whomever. Takes as long as there is to delete."""
        self._workspace.empty_trash()
        self._containers.empty_run_trash()
        self._leaves_trash = False

    def leave_trash(self) -> None:
        """Have `close` leave what is in the trash to the next `empty_trash`, by whomever: it ends at once."""
        self._empties_trash = False

    # Parts

    def _image_of(self, image_name: str | None, image_id: str | None) -> tuple[str, str]:
        """Name and id of the image asked for by name, id, or both, which must agree. Raises NotFound."""
        by_name = self._images.find(image_name) if image_name else None
        by_id = self._images.find(image_id) if image_id else None
        image = by_id or by_name
        if image is None:
            raise BadInput("name an image: an empty image name and id mean none")
        if by_name is not None and by_name.id != image.id:
            raise BadInput(f"image-name {image_name!r} is not image-id {image.id}: give one of them")
        if image_name in image.names:
            return image_name, image.id
        return next(iter(image.names), ""), image.id

    def _default_image(self) -> tuple[str, str]:
        image_id = self._images.catalog().names.get(DEFAULT_TAG)
        if image_id is None:
            return "", ""
        names = self._images.find(image_id).names
        # It says more what the image is called besides.
        return next((name for name in names if name != DEFAULT_TAG), DEFAULT_TAG), image_id

    def _recover(self) -> None:
        """Finishes or undoes what a crash interrupted."""
        for scratch in self._run_workspace.dead():
            scratch.close()
        for scratch in self._workspace.dead():
            self._leaves_trash = True
            with scratch:
                try:
                    self._fulfil(scratch.join(INTENT))
                except BaseException as error:
                    scratch.abandon()
                    if not isinstance(error, (OSError, StoreDamaged)):
                        raise
                    # Who has a full disk opens the store to delete something.
                    _log.warning("what a crash interrupted is not repaired yet: %s", error)

    def _fulfil(self, path: str) -> None:
        intent = read_intent(path)
        if intent is None:
            return
        with self._workspace.lock():
            self._containers.repair_names(intent.names)
            self._images.sweep_locked(intent.loose)


def _new_id(chosen: str | None) -> str:
    return parse_container_id(chosen) if chosen else secrets.token_hex(_ID_BYTES)
