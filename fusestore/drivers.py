"""How a container's rootfs comes into the tree. Blocking.

* **union**: the union in this process, over FUSE; for everyone, everywhere.
* **erofs**: the kernel's overlayfs over an EROFS image, mounted on first use (`fusestore.kernelrootfs`); for
  root. What it cannot serve, the union does.
* **overlay**: the same over the image's rootfs in this very mount; for root, be it of a user namespace.

A driver makes the branches of the tree that serve file trees: containers' rootfs, workdir and rundir, and the
images' own. They are made cheaply and open what they need on first use.
"""

import contextlib
import itertools
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar
from weakref import WeakValueDictionary

from .blobs import LayerReader
from .errors import StoreUnusable
from .images import Image
from .inodes import ROOT_INODE, Branch, Closable, Inodes, Node
from .kernelrootfs import ErofsMounts, KernelMounts, KernelRootfs, OverlayMounts
from .layer import LayerBuilder, LayerIndex
from .layout import Layout
from .lostmount import require_alone
from .nodes import Attr, Xattrs
from .objects import Descriptors, Object
from .rootfs import Opened, Opener, Rootfs
from .scheme import Scheme, find_scheme, for_union_alone
from .store import Store
from .synthetic import SHARED_S, RootfsBranch
from .union import LayerView, Lower
from .upper import Upper
from .writable import WritableRootfs

__all__ = ["DRIVERS", "UnionDriver", "snapshot"]

T = TypeVar("T")

_DIRECTORY_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_EMPTY_LAYER = LayerIndex(LayerBuilder().finish(0))
"""What an image of no layers is shown as."""


class _SharedObject(Object):
    __slots__ = ()

    entry_timeout_s = SHARED_S
    attr_timeout_s = SHARED_S


class _SharedTree(WritableRootfs):
    """A directory in which others write too, past the mount: `Store.work_dir` says where it is."""

    __slots__ = ()

    absence_timeout_s = 0.0
    object_type = _SharedObject


class _NothingHeld:
    """What stands for a hold where nothing can be deleted behind us."""

    def close(self) -> None:
        pass


class UnionDriver:
    """The union in this process. One for a mount; `close` gives its scratch directories back."""

    def __init__(self, store: Store, inodes: Inodes) -> None:
        """Raises StoreUnusable where the store's files are kept in a way this process is not allowed."""
        self._store = store
        self._inodes = inodes
        self._descriptors = Descriptors(_descriptors())
        self._serials = itertools.count()
        self._scratch = store.scratch()
        try:
            self._run_scratch = store.run_scratch()
        except BaseException:
            self._scratch.close()
            raise
        self._homes = {os.fstat(fd).st_dev: fd for fd in (self._run_scratch.fd, self._scratch.fd)}
        """By device: a scratch directory there."""
        self.entered: Callable[[str], object] = lambda image_id: None
        """Told the image of each container that is opened; by any thread."""
        self._lowers: WeakValueDictionary[tuple[LayerIndex, ...], Lower] = WeakValueDictionary()
        try:
            self._scheme = _agreed_scheme(store, self._scratch.fd)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        try:
            self._run_scratch.close()
        finally:
            self._scratch.close()

    def lower(self, layers: Sequence[LayerIndex]) -> Lower:
        """The tree of these layers, bottom first: one object as long as somebody has it."""
        return self._lowers.setdefault(tuple(layers), Lower(layers))

    def rest(self) -> None:
        self._descriptors.rest()

    def approached(self, container_id: str, pid: int) -> None:
        pass

    def look_up(self, container_id: str) -> None:
        pass

    def look_up_anew(self, container_id: str) -> None:
        pass

    def is_walker(self, pid: int) -> bool:
        return False

    def upper(self, root: int) -> Upper:
        """The upper directory at `root`, a descriptor in store or run directory that stays the caller's."""
        return Upper(root, self._homes[os.fstat(root).st_dev], self._scheme)

    def container_rootfs(self, container_id: str, parent: Node, label: bytes) -> RootfsBranch:
        return self._writable(parent, _ContainerOpener(self, self._store, container_id), label)

    def _writable(self, parent: Node, opener: Opener, label: bytes) -> WritableRootfs:
        return WritableRootfs(self._inodes, self._descriptors, next(self._serials), parent, opener, label)

    def container_as_it_is(self, container_id: str, parent: Node) -> Rootfs:
        """The container's rootfs for reading only: looking changes nothing, not even that it was entered."""
        return self._read_only(parent, _ContainerOpener(self, self._store, container_id, is_entering=False))

    def directory(self, path: str, parent: Node) -> WritableRootfs:
        """A real directory of the store's or the run directory's."""
        opener = _DirectoryOpener(self, path)
        return _SharedTree(self._inodes, self._descriptors, next(self._serials), parent, opener)

    def image_rootfs(self, image: Image, parent: Node) -> Rootfs:
        return self._read_only(parent, _ImageOpener(self._store, image, self.lower))

    def layer_rootfs(self, image: Image, number: int, parent: Node) -> Rootfs:
        """Layer `number` of an image alone, 0 the lowest."""
        return self._read_only(
            parent, _ImageOpener(self._store, image, lambda layers: LayerView(layers, number))
        )

    def _read_only(self, parent: Node, opener: Opener) -> Rootfs:
        return Rootfs(self._inodes, self._descriptors, next(self._serials), parent, opener)


class KernelDriver(UnionDriver):
    """The kernel serves containers, the union all else."""

    def __init__(
        self, store: Store, inodes: Inodes, mountpoint: str, make_mounts: type[KernelMounts]
    ) -> None:
        super().__init__(store, inodes)
        self._mounts = make_mounts(store, mountpoint, _descriptors(), self._scheme)

    def close(self) -> None:
        self._mounts.mounter.close()
        super().close()

    def approached(self, container_id: str, pid: int) -> None:
        """The kernel gets to know its rootfs: whoever comes can be led into the mount at once.

        Of many only the last: who lists containers goes into none.
        """
        if not self.is_walker(pid):
            self._mounts.mounter.walk_soon(self._mounts.place(container_id))

    def look_up(self, container_id: str) -> None:
        self._mounts.mounter.walk_to(self._mounts.place(container_id))

    def look_up_anew(self, container_id: str) -> None:
        self._mounts.look_up_anew(container_id)

    def is_walker(self, pid: int) -> bool:
        return self._mounts.mounter.is_own(pid)

    def container_rootfs(self, container_id: str, parent: Node, label: bytes) -> KernelRootfs:
        opener = _ContainerOpener(self, self._store, container_id)
        made = KernelRootfs(
            self._inodes,
            parent,
            self._mounts,
            self._store,
            container_id,
            peek=opener.attr,
            prepare_upper=opener.prepare_for_kernel,
            make_union=lambda: self._writable(parent, opener, made.label),
        )
        made.label = label
        return made


DRIVERS: dict[str, Callable[[Store, Inodes, str], UnionDriver]] = {
    "union": lambda store, inodes, mountpoint: UnionDriver(store, inodes),
    "erofs": lambda store, inodes, mountpoint: KernelDriver(store, inodes, mountpoint, ErofsMounts),
    "overlay": lambda store, inodes, mountpoint: KernelDriver(store, inodes, mountpoint, OverlayMounts),
}
"""By name, made with the mount point; `auto` takes the first."""


def _descriptors() -> int:
    """How many of this process's descriptors may be one thing's."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(64, limit // 4)


def _agreed_scheme(store: Store, scratch: int) -> Scheme:
    """How the store's containers are kept: as those before us did, or else as we may."""
    possible = find_scheme(scratch)
    word = store.scheme(possible.word)
    for scheme in Scheme:
        if scheme.word == word:
            break
    else:
        path = Layout(store.path).scheme
        raise StoreUnusable(f"{path} says neither native nor plain: write into it which one the store is")
    if scheme is Scheme.NATIVE and possible is Scheme.PLAIN:
        raise StoreUnusable(
            f"the files in {store.path} are root's (trusted.* xattrs), out of reach here: "
            "mount it as root outside of a user namespace, or name another store with --store"
        )
    return scheme


@contextlib.contextmanager
def snapshot(store: Store, container_id: str) -> Iterator[Rootfs]:
    """A container's rootfs, opened without a mount, for reading. Valid until the context ends, and until then
    the container cannot be deleted. Raises NotFound, Locked.

    What was written through a mount until now is in it, also what that mount's kernel still has in its cache.
    """
    store.write_back()
    inodes = Inodes()
    with store.hold(container_id), contextlib.closing(UnionDriver(store, inodes)) as driver:
        tree = driver.container_as_it_is(container_id, Node(Branch(), ROOT_INODE))
        tree.open_now()
        try:
            yield tree
        finally:
            tree.detach()


class _ImageOpener:
    """The layers of an image, or one of them."""

    def __init__(self, store: Store, image: Image, view: Callable[[list[LayerIndex]], Lower]) -> None:
        self._store = store
        self._image = image
        self._view = view

    def open(self) -> Opened:
        layers = self._store.open_layers(self._image)
        lower = self._view([layer.index for layer in layers] or [_EMPTY_LAYER])
        return Opened(lower, [layer.reader for layer in layers], None, lambda: None)

    def peek(self) -> Attr:
        lower = self.open().lower
        return lower.attr(lower.root)

    def peek_xattrs(self) -> Xattrs:
        lower = self.open().lower
        return lower.xattrs(lower.root)

    def hold(self) -> Closable:
        return _NothingHeld()

    def moved_to(self, place: str) -> None:
        raise AssertionError("images stay where they are")


class _DirectoryOpener:
    """A directory, as it is, in the upper's way of keeping owners."""

    __slots__ = ("_driver", "_path")

    def __init__(self, driver: UnionDriver, path: str) -> None:
        self._driver = driver
        self._path = path

    def open(self) -> Opened:
        root = os.open(self._path, _DIRECTORY_FLAGS)
        return Opened(Lower(()), (), self._driver.upper(root), lambda: os.close(root))

    def peek(self) -> Attr:
        return self._of_root(Upper.attr)

    def peek_xattrs(self) -> Xattrs:
        return self._of_root(Upper.xattrs)

    def _of_root(self, ask: Callable[[Upper, int], T]) -> T:
        """Keeps no descriptor: who lists containers sees all their directories."""
        root = os.open(self._path, _DIRECTORY_FLAGS)
        try:
            return ask(self._driver.upper(root), root)
        finally:
            os.close(root)

    def hold(self) -> Closable:
        return _NothingHeld()

    def moved_to(self, place: str) -> None:
        self._path = place


class _ContainerOpener:
    """An image's layers under the container's diff/, which is made when the rootfs is first entered.

    Whether it is there tells whether the container can still be bound to an image.
    """

    __slots__ = ("_driver", "_id", "_is_entering", "_store")

    def __init__(
        self, driver: UnionDriver, store: Store, container_id: str, *, is_entering: bool = True
    ) -> None:
        self._driver = driver
        self._store = store
        self._id = container_id
        self._is_entering = is_entering

    def open(self) -> Opened:
        image_id = self._store.container(self._id).image_id
        lower, readers = self._layers(image_id)
        if self._is_entering:
            work = self._store.overlay_work_dir(self._id)
            require_alone(self._id, self._store.upper_dir(self._id), work)
            self._driver.entered(image_id)
        path = os.fsencode(self._store.upper_dir(self._id))
        if not self._is_entering and not os.path.exists(path):
            return Opened(lower, readers, None, lambda: None)
        directory = os.open(os.path.dirname(path), _DIRECTORY_FLAGS)
        try:
            root = self._open_upper(directory, os.path.basename(path), lower)
        finally:
            os.close(directory)
        upper = self._driver.upper(root)
        return Opened(lower, readers, upper, lambda: os.close(root), upper.moved())

    def prepare_for_kernel(self) -> str | None:
        """Make the upper directory, and say why the kernel's overlayfs does not understand what is in it."""
        opened = self.open()
        try:
            assert opened.upper is not None, "it was entered"
            path = for_union_alone(opened.upper.root) if opened.upper.scheme.is_plain else None
            return None if path is None else f"the kernel would misunderstand the xattrs of {path}"
        finally:
            opened.close()

    def _open_upper(self, directory: int, name: bytes, lower: Lower) -> int:
        """The upper directory: the root of the image copied up, where it is not there yet."""
        try:
            return os.open(name, _DIRECTORY_FLAGS, dir_fd=directory)
        except FileNotFoundError:
            attr, xattrs = _root_attr(lower), _root_xattrs(lower)
            with contextlib.suppress(FileExistsError):  # by another process, just now
                return self._driver.upper(directory).copy_directory(directory, name, attr, xattrs)
            return os.open(name, _DIRECTORY_FLAGS, dir_fd=directory)

    def _layers(self, image_id: str) -> tuple[Lower, list[LayerReader]]:
        if not image_id:
            return Lower(()), []
        layers = self._store.open_layers(self._store.image(image_id))
        lower = self._driver.lower([layer.index for layer in layers])
        return lower, [layer.reader for layer in layers]

    def peek(self) -> Attr | None:
        return self._of_untouched(_root_attr)

    def peek_xattrs(self) -> Xattrs | None:
        return self._of_untouched(_root_xattrs)

    def _of_untouched(self, ask: Callable[[Lower], T]) -> T | None:
        """None once the container was entered."""
        if os.path.exists(self._store.upper_dir(self._id)):
            return None
        lower, _ = self._layers(self._store.container(self._id).image_id)
        return ask(lower)

    def attr(self) -> Attr:
        """Of the root, whether it was entered or not."""
        peeked = self.peek()
        if peeked is None:
            return _DirectoryOpener(self._driver, self._store.upper_dir(self._id)).peek()
        return peeked

    def hold(self) -> Closable:
        return self._store.hold(self._id)

    def moved_to(self, place: str) -> None:
        self._id = place


def _root_attr(lower: Lower) -> Attr:
    """Of the root directory of a container that nobody has entered."""
    return lower.attr(lower.root) if lower.root else _own_root()


def _root_xattrs(lower: Lower) -> Xattrs:
    return lower.xattrs(lower.root) if lower.root else ()


def _own_root() -> Attr:
    """The root directory of a container without an image."""
    now_ns = time.time_ns()
    return _EMPTY_LAYER.attr(LayerIndex.ROOT)._replace(
        uid=os.geteuid(),
        gid=os.getegid(),
        atime_ns=now_ns,
        mtime_ns=now_ns,
        ctime_ns=now_ns,
    )
