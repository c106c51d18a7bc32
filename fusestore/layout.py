"""The on-disk format: every file of a store and of its run directory. Pure.

Nothing else in fusestore spells a path inside a store; the bytes of each file are described here and nowhere
else. Whoever changes a format changes this page, `FORMAT_VERSION` or that file's own version, and the history
at the end. Paths are str as os.fsdecode makes them (surrogateescape); ids and names are ASCII.

::

    <store>/                          0700
      fusestore.json                  written last: a directory without it is no store yet
      fusestore.lock                  flock: the store's names (see durable.Workspace.lock)
      oci-layout, index.json          OCI image-spec, image-layout.md: the store IS an image layout
      blobs/sha256/<hex>              manifests, configs, layers: their sha256 is their name
      layers/<diff_id hex>/           derived from a layer's blob: may be deleted, is rebuilt when needed
        index                         the layer's tree (fusestore.layer)
        seek.<blob hex>               restart points in that blob, checksums (fusestore.seek)
        cache                         sparse: what was decompressed so far (fusestore.spancache)
        tar                           the layer uncompressed, where `fusestore hydrate` was asked for it
        lazy.<blob hex>/              instead of the three, as long as the blob is not all here
          index                       the layer's tree, content numbered by the chunks
          chunks                      where they are in the blob, their digests (fusestore.chunktable)
          origin                      where the blob is
          part                        sparse: what is here of it
          reached                     how much of its beginning is here for sure
      images/<id>/image               derived from manifest and config: may be deleted
      images/<id>/erofs.1             derived from the layers: may be deleted; made when first mounted
      containers/<id>/                0700, made whole; flock: shared while live, exclusive to change
        container                     the metadata document
        diff/                         upper directory of overlayfs, made when rootfs is first entered: a
                                      container that has one cannot be bound to an image any more
        work/                         work directory of overlayfs
        workdir/                      0700, the container's own directory
      scheme                          how the files of containers say who owns them
      names/<name>                    symlink to the id of the container of that name
      tmp/<unique>                    flocked (shared) while its maker lives; unlocked ones are rubbish
      trash/<unique>                  what was deleted; nothing in it is ever read
      downloads/<hex>                 the beginning of a blob whose download was broken off; flocked
                                      (exclusively) while somebody goes on with it. Made when needed
      quarantine/<unique>/<path>      what `check --repair` took away from <path> of the store; nothing in
                                      it is ever read, or deleted. Made when needed
    <run>/                            0700, on a tmpfs if there is one
      <first 16 hex of sha256(real path of the store)>/
        boot                          the boot id of the kernel: with another one the rest is from before
                                      a reboot
        containers/<id>/mounted       exists while the container is started (pinned)
        tmp/<unique>                  as in the store: what a mount makes for a rundir before it has its name
        containers/<id>/rundir/       0700, made when first asked for
        mounts/<unique>               one live mount, flocked by its daemon; a . before it until it is written
        mounts/<unique>.bell          its socket, where others say what they changed (mounts.Changed)
        mount-<8 hex>.log             of sha256(mount point): what the daemons there had to say
        mount-<8 hex>.log.1           what they said before that
        trash/<unique>                deleted run directories

**fusestore.json**: one JSON object: ``format`` "fusestore", ``version`` (`FORMAT_VERSION`), ``features``:
names of what a reader must know besides the version; none so far.

**index.json**: which images exist, and their names. One descriptor per name, with the annotation
``org.opencontainers.image.ref.name``; an image without names has one descriptor without it. fusestore adds
``io.fusestore.image.id`` (the id, so that listing reads no manifest); it is believed only if
images/<id>/image agrees about the manifest. Descriptors and keys that others wrote are kept. A name that
`names.parse_image_name` refuses, or that lies below another name (``a`` and ``a/b``), is not shown.

**images/<id>/image**: msgpack map: ``version`` 1, ``manifest`` (digest), ``created`` (str), ``architecture``,
``os``, ``layers``: bottom first, [diff_id, blob digest, blob size, media type]. The id is the hex of the
config's digest.

**images/<id>/erofs.1**: an EROFS image of the merged tree (fusestore.erofs), its devices the layers' tars.
The number in its name is raised with every change of what is written (`METADATA_IMAGE_VERSION`).

**layers/<diff_id>/seek.<blob>**: exists only after the blob was decompressed and hashed to that diff_id: it
is the proof that blob and diff_id belong together. Of an uncompressed layer there may be none, from before
there were: it is made when the layer is opened.

**layers/<diff_id>/tar**: what has that diff_id, sparse: whole and verified before it has its name. It may be
removed at any time; who has it open goes on reading it. Of an uncompressed layer there is none: that is its
blob.

**layers/<diff_id>/lazy.<blob>/**: made whole, before the image that needs it; goes when the blob is in its
place, which `part` becomes, and index and seek table are. Its flock is held by who fetches all of it, that of
`part`, shared, by who writes into it, exclusively by who makes it the blob. ``origin``: JSON, ``reference``
and ``plain-http``; no credentials. Nothing in ``part`` is believed: a chunk is compared with its digest
whenever it is read, the whole with the blob's before it becomes one. ``reached``: decimal, the bytes from 0
on that were synced; absent for none.

**containers/<id>/container**: JSON, UTF-8: ``image-name`` and ``image-id`` (both "" while unbound),
``created-at`` (Unix seconds), ``name`` if it is not the id, ``mountlabel`` if not empty, then the user's keys
in the user's order. The id is not in it (it is the directory's name), nor whether it is mounted (the run
directory says so).

**scheme**: "native" or "plain" and a newline (`fusestore.upper`): what the first process to mount the store
was allowed. All that is in diff/, workdir/ and rundir/ is read and written so, by everybody from then on.

**names/<name>**: made before the container or the document that uses it: a link whose target does not exist
reserves nothing. Only for names that differ from the id.

**tmp/<unique>/intent**: JSON, written before an operation of several renames: ``names`` {name: [ids]} are
names that may point wrong, ``loose`` {"blobs": [digests], "layers": [diff_ids], "images": [ids]} what may be
left unreferenced. Who finds it in a dead directory (when opening the store) puts the names right and removes
what index.json does not reach.

**downloads/<hex>**: nothing in it is believed, nor synced before all of it is here; whole, and its digest
compared, it becomes the blob.

**quarantine/<unique>/<path>**: one <unique> a repair. What was there moved with all that is in it; of
index.json a copy; of the xattr user.fusestore.stat of a container's file its value, as
<path>.user.fusestore.stat. ``reasons`` beside it has the lines that `check --repair` printed.

**mounts/<unique>**: JSON: ``mountpoint``, ``pid``, ``driver``, ``device`` (MAJOR:MINOR, or null).

Refused by a reader, in these words (StoreUnusable)::

    "there is no store at …: make one with `fusestore import`, or name another with --store"
    "… is neither empty nor a store: choose another directory for the store"
    "… is a store of version …, this fusestore knows 1: upgrade fusestore"
    "… uses …, unknown to this fusestore: upgrade fusestore"
    "the files in … are root's (trusted.* xattrs), out of reach here: mount it as root outside of a user
     namespace, or name another store with --store"
    "… says neither native nor plain: write into it which one the store is"
    "the path of the store is empty: name a directory, or leave it out"
    "….json is damaged: restore it from a backup, or import the images into a new store"
    "…/index.json is damaged (…): run `fusestore check --repair`, or restore it from a backup" (StoreDamaged)

History::

    1   first version. scheme came later: a store without it gets it when it is mounted. quarantine and
        layers/<diff_id>/tar came later, lazy.<blob> and downloads too, and seek.<blob> of uncompressed layers
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from .nodes import Digest

__all__ = [
    "ANNOTATION_ID",
    "ANNOTATION_NAME",
    "BELL_SUFFIX",
    "DEFAULT_TAG",
    "FORMAT_VERSION",
    "IMAGE_RECORD_VERSION",
    "INTENT",
    "Layout",
    "METADATA_IMAGE_VERSION",
    "OCI_LAYOUT_VERSION",
    "RunLayout",
    "UNFINISHED",
    "UNFINISHED_MOUNT",
    "default_run_dir",
    "default_store_dir",
    "run_layout",
]

FORMAT_VERSION = 1
IMAGE_RECORD_VERSION = 1
METADATA_IMAGE_VERSION = 1
OCI_LAYOUT_VERSION = "1.0.0"

ANNOTATION_NAME = "org.opencontainers.image.ref.name"
ANNOTATION_ID = "io.fusestore.image.id"

INTENT = "intent"
"""Name of the file, in a directory of tmp/, that says what a change of several renames is about to touch."""

BELL_SUFFIX = ".bell"
"""How the name of a mount's socket ends, in mounts/."""

UNFINISHED_MOUNT = "."
"""How the name of a file in mounts/ begins that is not written yet."""

DEFAULT_TAG = "default"
"""The image of a container that is made without naming one."""


def _hex(digest: Digest) -> str:
    return digest.removeprefix("sha256:")


def _join(*parts: str) -> str:
    return "/".join(parts)


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths of one store. `root` is absolute and real, without a slash at its end."""

    root: str

    @property
    def format_file(self) -> str:
        return _join(self.root, "fusestore.json")

    @property
    def lock(self) -> str:
        return _join(self.root, "fusestore.lock")

    @property
    def oci_layout(self) -> str:
        return _join(self.root, "oci-layout")

    @property
    def index(self) -> str:
        return _join(self.root, "index.json")

    @property
    def blobs(self) -> str:
        return _join(self.root, "blobs", "sha256")

    @property
    def layers(self) -> str:
        return _join(self.root, "layers")

    @property
    def images(self) -> str:
        return _join(self.root, "images")

    @property
    def containers(self) -> str:
        return _join(self.root, "containers")

    @property
    def scheme(self) -> str:
        return _join(self.root, "scheme")

    @property
    def names(self) -> str:
        return _join(self.root, "names")

    @property
    def tmp(self) -> str:
        return _join(self.root, "tmp")

    @property
    def trash(self) -> str:
        return _join(self.root, "trash")

    @property
    def downloads(self) -> str:
        return _join(self.root, "downloads")

    def download(self, blob: Digest) -> str:
        return _join(self.downloads, _hex(blob))

    @property
    def quarantine(self) -> str:
        return _join(self.root, "quarantine")

    @property
    def directories(self) -> tuple[str, ...]:
        """What a new store consists of, besides its files."""
        return (
            _join(self.root, "blobs"),
            self.blobs,
            self.layers,
            self.images,
            self.containers,
            self.names,
            self.tmp,
            self.trash,
        )

    def blob(self, digest: Digest) -> str:
        return _join(self.blobs, _hex(digest))

    def layer(self, diff_id: Digest) -> str:
        return _join(self.layers, _hex(diff_id))

    def layer_index(self, diff_id: Digest) -> str:
        return _join(self.layer(diff_id), "index")

    def seek_table(self, diff_id: Digest, blob: Digest) -> str:
        return _join(self.layer(diff_id), f"seek.{_hex(blob)}")

    def span_cache(self, diff_id: Digest) -> str:
        return _join(self.layer(diff_id), "cache")

    def tar(self, diff_id: Digest) -> str:
        return _join(self.layer(diff_id), "tar")

    def lazy(self, diff_id: Digest, blob: Digest) -> str:
        return _join(self.layer(diff_id), f"lazy.{_hex(blob)}")

    # The same for one that is not in its place yet.

    @staticmethod
    def lazy_index_in(directory: str) -> str:
        return _join(directory, "index")

    @staticmethod
    def lazy_chunks_in(directory: str) -> str:
        return _join(directory, "chunks")

    @staticmethod
    def lazy_origin_in(directory: str) -> str:
        return _join(directory, "origin")

    @staticmethod
    def lazy_part_in(directory: str) -> str:
        return _join(directory, "part")

    @staticmethod
    def lazy_reached_in(directory: str) -> str:
        return _join(directory, "reached")

    def image(self, image_id: str) -> str:
        return _join(self.images, image_id)

    def image_record(self, image_id: str) -> str:
        return _join(self.image(image_id), "image")

    def metadata_image(self, image_id: str) -> str:
        return _join(self.image(image_id), f"erofs.{METADATA_IMAGE_VERSION}")

    def container(self, container_id: str) -> str:
        return _join(self.containers, container_id)

    def name(self, name: str) -> str:
        return _join(self.names, name)

    @staticmethod
    def name_target(container_id: str) -> str:
        """What names/<name> holds."""
        return _join("..", "containers", container_id)

    def document(self, container_id: str) -> str:
        return self.document_in(self.container(container_id))

    def upper(self, container_id: str) -> str:
        return self.upper_in(self.container(container_id))

    def work(self, container_id: str) -> str:
        return self.work_in(self.container(container_id))

    def workdir(self, container_id: str) -> str:
        return self.workdir_in(self.container(container_id))

    # What belongs where: `check` finds all else. "lost+found" is the file system's.

    @staticmethod
    def is_at_root(name: str) -> bool:
        return name in UNFINISHED or name in (
            "fusestore.json",
            "scheme",
            "downloads",
            "quarantine",
            "lost+found",
        )

    @staticmethod
    def is_in_layer(name: str) -> bool:
        return name in ("index", "cache", "tar") or name.startswith(("seek.", "lazy."))

    @staticmethod
    def is_in_image(name: str) -> bool:
        return name == "image" or name.startswith("erofs.")

    @staticmethod
    def is_in_container(name: str) -> bool:
        return name in ("container", "diff", "work", "workdir")

    # The same inside a container's directory that is not in its place yet.

    @staticmethod
    def document_in(directory: str) -> str:
        return _join(directory, "container")

    @staticmethod
    def upper_in(directory: str) -> str:
        return _join(directory, "diff")

    @staticmethod
    def work_in(directory: str) -> str:
        return _join(directory, "work")

    @staticmethod
    def workdir_in(directory: str) -> str:
        return _join(directory, "workdir")


UNFINISHED = frozenset(
    ["fusestore.lock", "oci-layout", "index.json", "blobs", "layers", "images", "containers", "names",
     "tmp", "trash"]
)  # fmt: skip
"""What a directory may hold for its creation as a store to be resumed; the lock it must."""


@dataclass(frozen=True, slots=True)
class RunLayout:
    """The paths of one store's run directory."""

    root: str

    @property
    def boot(self) -> str:
        return _join(self.root, "boot")

    @property
    def containers(self) -> str:
        return _join(self.root, "containers")

    @property
    def new_boot(self) -> str:
        """`boot` as it is written, under the store's lock."""
        return _join(self.root, "boot.new")

    @property
    def mounts(self) -> str:
        return _join(self.root, "mounts")

    def mount(self, name: str) -> str:
        return _join(self.mounts, name)

    def new_mount(self, name: str) -> str:
        return _join(self.mounts, UNFINISHED_MOUNT + name)

    def mount_log(self, mountpoint: bytes) -> str:
        return _join(self.root, f"mount-{hashlib.sha256(mountpoint).hexdigest()[:8]}.log")

    @property
    def tmp(self) -> str:
        return _join(self.root, "tmp")

    @property
    def trash(self) -> str:
        return _join(self.root, "trash")

    @property
    def directories(self) -> tuple[str, ...]:
        return (self.containers, self.mounts, self.tmp, self.trash)

    def container(self, container_id: str) -> str:
        return _join(self.containers, container_id)

    def mounted(self, container_id: str) -> str:
        return _join(self.container(container_id), "mounted")

    def rundir(self, container_id: str) -> str:
        return _join(self.container(container_id), "rundir")


def run_layout(run_dir: str, real_store_path: bytes) -> RunLayout:
    """The run directory of the store at `real_store_path` (no symlinks in it), inside `run_dir`."""
    return RunLayout(_join(run_dir.rstrip("/"), hashlib.sha256(real_store_path).hexdigest()[:16]))


def default_store_dir(environ: Mapping[str, str], uid: int) -> str:
    """/var/lib/fusestore for root, $XDG_DATA_HOME/fusestore (~/.local/share) for others."""
    if uid == 0:
        return "/var/lib/fusestore"
    data_home = environ.get("XDG_DATA_HOME") or _join(environ.get("HOME", "/"), ".local", "share")
    return _join(data_home, "fusestore")


def default_run_dir(environ: Mapping[str, str], uid: int) -> str:
    """$FUSESTORE_RUN_DIR; else /run/fusestore for root, and for others $XDG_RUNTIME_DIR/fusestore or
    /tmp/fusestore-<uid>."""
    named = environ.get("FUSESTORE_RUN_DIR")
    if named is not None:
        return named
    if uid == 0:
        return "/run/fusestore"
    runtime_dir = environ.get("XDG_RUNTIME_DIR")
    return _join(runtime_dir, "fusestore") if runtime_dir else f"/tmp/fusestore-{uid}"
