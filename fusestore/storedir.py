"""The directories of a store and of its run-time state: made, and told from others' directories. Blocking.

A store is what has a fusestore.json of this version: it is written last, so that a store half made is made
again, and never used.
"""

import contextlib
import os
import stat

from . import oci
from .durable import Workspace, read_file
from .errors import BadInput, StoreUnusable
from .layout import FORMAT_VERSION, OCI_LAYOUT_VERSION, UNFINISHED, Layout, RunLayout, run_layout

__all__ = ["prepare_run", "require_store"]


def require_store(layout: Layout, create: bool) -> bool:
    """Checks the format, and makes the store if there is none: whether it did. Raises StoreUnusable."""
    is_new = False
    try:
        data = read_file(layout.format_file, oci.DOCUMENT_MAX)
    except (FileNotFoundError, NotADirectoryError):
        if not create:
            missing = f"there is no store at {layout.root}"
            hint = "make one with `fusestore import`, or name another with --store"
            raise StoreUnusable(f"{missing}: {hint}") from None
        is_new = _make(layout)
        data = read_file(layout.format_file, oci.DOCUMENT_MAX)
    try:
        found = oci.parse_object(data, layout.format_file)
    except BadInput as error:
        raise _format_damaged(layout) from error
    version, features = found.get("version"), found.get("features")
    if found.get("format") != "fusestore" or not isinstance(version, int) or not isinstance(features, list):
        raise _format_damaged(layout)
    if version != FORMAT_VERSION:
        found_version = f"{layout.root} is a store of version {version}"
        raise StoreUnusable(f"{found_version}, this fusestore knows {FORMAT_VERSION}: upgrade fusestore")
    if os.stat(layout.format_file).st_uid != os.geteuid():
        # What another user writes, if only root, its owner could not read any more.
        raise StoreUnusable(f"{layout.root} is another user's store: use it as its owner, or --store another")
    if features:
        raise StoreUnusable(f"{layout.root} uses {features[0]}, unknown to this fusestore: upgrade fusestore")
    return is_new


def _format_damaged(layout: Layout) -> StoreUnusable:
    return StoreUnusable(
        f"{layout.format_file} is damaged: restore it from a backup, or import the images into a new store"
    )


def _make(layout: Layout) -> bool:
    """Makes a store, fusestore.json last; whoever comes second finds it made, and gets False."""
    refusal = StoreUnusable(
        f"{layout.root} is neither empty nor a store: choose another directory for the store"
    )
    try:
        os.makedirs(layout.root, 0o700, exist_ok=True)
        present = set(os.listdir(layout.root))
    except (FileExistsError, NotADirectoryError):
        raise refusal from None
    if present and (os.path.basename(layout.lock) not in present or not present <= UNFINISHED):
        if os.path.exists(layout.format_file):
            return False
        raise refusal
    os.chmod(layout.root, 0o700)
    workspace = Workspace(tmp=layout.tmp, trash=layout.trash, lock=layout.lock)
    with workspace.lock():
        if os.path.exists(layout.format_file):
            return False
        for directory in layout.directories:
            workspace.make_directory(directory)
        if not os.path.exists(layout.index):
            workspace.write_file(layout.index, oci.encode({"schemaVersion": 2, "manifests": []}))
        workspace.write_file(layout.oci_layout, oci.encode({"imageLayoutVersion": OCI_LAYOUT_VERSION}))
        found = {"format": "fusestore", "version": FORMAT_VERSION, "features": []}
        workspace.write_file(layout.format_file, oci.encode(found))
    return True


def prepare_run(run_dir: str | os.PathLike[str], root: str) -> RunLayout:
    """The store's run directory, made if need be."""
    uid = os.geteuid()
    base = os.path.abspath(run_dir)
    os.makedirs(base, 0o700, exist_ok=True)
    found = os.lstat(base) if base.startswith("/tmp/") else os.stat(base)
    # Names in /tmp are anyone's: nothing that another user made there, or may write to.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (uid, 0) or found.st_mode & 0o022:
        raise StoreUnusable(
            f"{base} is not a directory of yours alone: remove it, or name another with --run-dir"
        )
    # A symlink that a mount hides later is not gone through again.
    run = run_layout(os.path.realpath(base), os.fsencode(root))
    with contextlib.suppress(FileExistsError):
        os.mkdir(run.root, 0o700)
    for directory in run.directories:
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory, 0o700)
    return run
