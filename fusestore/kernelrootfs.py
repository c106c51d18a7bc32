"""A container's rootfs that the kernel serves: overlayfs, mounted on first use. Blocking.

Its lower layer is an EROFS image of the container's image (`ErofsMounts`), or what this mount itself shows of
that (`OverlayMounts`).

The kernel's mount lies over the directory ``rootfs`` of this mount, which is then only what a path leads
through. How somebody who comes is led into it (fs/namei.c, fs/fuse/dir.c):

* Until it is mounted the name is asked for each time, since neither name nor attributes may be kept. A LOOKUP
  of a name that the kernel knows holds no lock: it is answered when the mount is there, and the walk crosses
  into it. From then on the kernel believes the name for a while.
* The LOOKUP that makes the name known cannot wait: our own walk to the place would wait behind it. It is
  answered ESTALE, so that the whole path is walked again; meanwhile our walker does (`fusestore.mounter`).
* Whatever else comes is answered ESTALE at once: system calls then walk once more, with a LOOKUP first.
  Holding it could be a deadlock: some ask with the lock of the directory held, which the mount needs too.
  That walk asks for the name also where it is believed, and so finds what was unmounted meanwhile.
* Our walker can have the kernel ask for a name that it believes (`ANEW`), and does where the mount is gone,
  or where somebody's next walk must be refused (`be_asked`).

A LOOKUP that fails, or gives another inode, has the kernel forget the name, and what is mounted over it.

The rules a maintainer must not break: nothing but that one LOOKUP waits for the mount, and that not for long
(`fusestore.fuse`); while it is mounted the name leads to the same inode.
"""

import errno
import itertools
import logging
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

from .erofsmount import mounts_files
from .errors import Busy, FusestoreError, Locked, NotSupported, Stale
from .images import Image
from .inodes import Branch, Closable, Inodes, Maybe, Node, Outward, Pending, Steps
from .lostmount import escaped, left_by
from .mounter import Mounter
from .nodes import Attr
from .scheme import Scheme
from .store import Store
from .synthetic import ANEW, SHARED_S, RootfsBranch
from .syscalls import is_mounted

__all__ = ["ErofsMounts", "KernelMounts", "KernelRootfs", "OverlayMounts"]

_log = logging.getLogger("fusestore")

_FAILURE_S = 1.0
"""How soon somebody walks again whose walk failed, at the latest."""
_HEARING_S = 0.05
"""How long the kernel may take to hear an answer."""


class KernelMounts(ABC):
    """What the kernel has mounted for a daemon. `mount` is for threads, the rest for the event loop's."""

    _by_loops = False

    def __init__(self, store: Store, mountpoint: str, most: int, scheme: Scheme) -> None:
        """`most`: how many containers may be mounted. Each takes a descriptor here and one of the mounter."""
        self.mounter = Mounter()
        self.entered: dict[KernelRootfs, None] = {}
        """What is mounted, the oldest first."""
        self._most = most
        self._scheme = scheme
        self._store = store
        self._mountpoint = mountpoint
        self.told_at = -math.inf
        """When the kernel was told last to believe a name for a while."""
        self._serials = itertools.count()

    @abstractmethod
    def make_ready(self, image: Image) -> None:
        """What can take long: in a thread. Asks nothing of the mount; `mount` finds too what is wrong."""

    @abstractmethod
    def _lower(self, image: Image) -> tuple[str, Sequence[str] | None]:
        """`lower` and `devices` of `Mounter.mount`. In a thread."""

    def place(self, container_id: str) -> str:
        """The directory that a container's rootfs is in this mount."""
        return f"{self._mountpoint}/containers/{container_id}/rootfs"

    def look_up_anew(self, container_id: str) -> None:
        """Have the kernel ask for the name of a rootfs. In a thread; makes requests of the mount itself."""
        time.sleep(max(0.0, self.told_at + _HEARING_S - time.monotonic()))
        with suppress(OSError):  # it is gone
            self.mounter.walk_to(self.place_anew(container_id))

    def place_anew(self, container_id: str) -> str:
        """A path to `place` on which the kernel asks for each name: see `ANEW`."""
        return f"{self._mountpoint}/containers/{ANEW}{next(self._serials)}/../{container_id}/rootfs"

    def make_room(self) -> Steps[None]:
        """Precedes a mount. Raises NotSupported where somebody is in too many to have one more."""
        for rootfs in list(self.entered):
            if len(self.entered) < self._most:
                return
            with suppress(Busy):
                yield from rootfs.leave_now()
        if len(self.entered) >= self._most:
            raise NotSupported(f"{self._most} containers are in use: raise `ulimit -n`")

    def mount(self, container_id: str, image: Image, hold: Closable) -> "_Mounted":
        """Makes requests of the mount itself. `hold` is closed when it is unmounted. Raises OSError."""
        token, number = self.mounter.mount(
            self.place(container_id),
            *self._lower(image),
            self._options(container_id),
            by_loops=self._by_loops,
        )
        return _Mounted(
            self.mounter, token, number, hold, left_by(self._store.overlay_work_dir(container_id))
        )

    def _options(self, container_id: str) -> list[tuple[bytes, bytes | None]]:
        """overlayfs.rst. index=off and metacopy=off: what the union reads too; redirect_dir=on: see upper.

        With userxattr the kernel follows no redirects.
        """
        kept: tuple[bytes, bytes | None] = (b"redirect_dir", b"on")
        if self._scheme is Scheme.PLAIN:
            kept = (b"userxattr", None)
        return [
            (b"source", b"fusestore"),
            (b"upperdir", escaped(self._store.upper_dir(container_id))),
            (b"workdir", escaped(self._store.overlay_work_dir(container_id))),
            kept,
            (b"index", b"off"),
            (b"metacopy", b"off"),
            (b"xino", b"on"),
        ]


class ErofsMounts(KernelMounts):
    """Over an EROFS image of the names, which leads into the layers' tars."""

    def __init__(self, store: Store, mountpoint: str, most: int, scheme: Scheme) -> None:
        super().__init__(store, mountpoint, most, scheme)
        file = store.unnamed_file()
        try:
            self._by_loops = not mounts_files(file)
        finally:
            os.close(file)
        if self._by_loops:
            _log.info("the kernel mounts no files: by loop devices, of images that are hydrated for it")

    def make_ready(self, image: Image) -> None:
        """A million names take half a minute."""
        if self._is_lazy(image):
            return
        self._store.metadata_image(image)
        if self._by_loops:
            for layer in image.layers:
                self._store.hydrate_layer(image, layer, lambda count: None)

    def _lower(self, image: Image) -> tuple[str, Sequence[str]]:
        if self._is_lazy(image):
            raise _Unmountable("its image is not all here yet")
        return self._store.metadata_image(image), self._tars(image)

    def _is_lazy(self, image: Image) -> bool:
        """Then there are no tars yet."""
        return any(map(self._store.is_lazy, image.layers))

    def _tars(self, image: Image) -> Sequence[str]:
        """Layers that are on disk uncompressed are read there, the others as this mount shows them."""
        shown = f"{self._mountpoint}/images/{image.id}/layers"
        tars = [
            self._store.local_tar(layer) or f"{shown}/{number}/tar"
            for number, layer in enumerate(image.layers)
        ]
        if self._by_loops and any(tar.startswith(shown) for tar in tars):
            raise NotSupported("its image is not hydrated: there is no room for it, or it was undone")
        return tars


class OverlayMounts(KernelMounts):
    """Over the image's rootfs in this mount."""

    def make_ready(self, image: Image) -> None:
        pass

    def _lower(self, image: Image) -> tuple[str, None]:
        return f"{self._mountpoint}/images/{image.id}/rootfs", None


class _Unmountable(NotSupported):
    """A container that is not for the kernel, as it is now."""


class _Mounted:
    """A container's mount."""

    def __init__(self, mounter: Mounter, token: int, number: int, hold: Closable, former: str) -> None:
        """See `Mounter.mount`, and `fusestore.lostmount.left_by` for `former`."""
        self._mounter = mounter
        self._token = token
        self._number = number
        self._hold = hold
        self._former = former

    def is_there(self) -> bool:
        return is_mounted(self._number)

    def unmount(self) -> None:
        """Raises Busy while somebody is in it."""
        try:
            self._mounter.unmount(self._token)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise Busy("somebody is in the rootfs of the container: leave it first") from None
            raise
        with suppress(OSError):
            os.rmdir(self._former)
        self._hold.close()

    def give_up(self) -> None:
        """Unmount, whoever is in it. Returns at once."""
        self._mounter.unmount_lazily(self._token)
        self._hold.close()


class _Doorway(Node):
    """The directory that the kernel's mount lies over."""

    __slots__ = ()

    attr_timeout_s = 0.0

    @property
    def entry_timeout_s(self) -> float:  # type: ignore[override]
        assert isinstance(self.branch, KernelRootfs)
        return self.branch.belief_s()


class KernelRootfs(Branch):
    """Touched by the event loop's thread only, but for `_mount`."""

    in_use = False
    """Who is in it the kernel knows: `leave`."""
    is_doorway = True

    def __init__(
        self,
        inodes: Inodes,
        outer: Node,
        mounts: KernelMounts,
        store: Store,
        container_id: str,
        peek: Callable[[], Attr],
        prepare_upper: Callable[[], str | None],
        make_union: Callable[[], RootfsBranch],
    ) -> None:
        """`outer` is what '..' of the root is. `peek`: the attributes of the root, before it is mounted.

        `prepare_upper` makes the upper directory, and says why the kernel cannot have it; `make_union` makes
        what serves a container that cannot be mounted.
        """
        self.label = b""
        self._quota: int | None = None
        self.root = _Doorway(self, inodes.number())
        self._outer = outer
        self._mounts = mounts
        self._store = store
        self._id = container_id
        self._peek = peek
        self._prepare_upper = prepare_upper
        self._make_union = make_union
        self._mounted: _Mounted | None = None
        self._shown: Attr | None = None
        """The root's attributes as they were before it was mounted."""
        self._union: RootfsBranch | None = None
        self._pending: Pending | None = None
        """Mounting or unmounting, which somebody does now."""
        self._failures: dict[int, tuple[FusestoreError, float]] = {}
        """By thread: why it could not be mounted, for its next walk, and until when that counts."""
        self._is_image_ready = False
        """`KernelMounts.make_ready` was called."""
        self._asked_until = -math.inf
        self._is_detached = False

    @property
    def attached(self) -> bool:
        return self._mounted is not None

    @property
    def is_covered(self) -> bool:
        return self._mounted is not None

    def be_asked(self, until: float) -> None:
        self._asked_until = until

    def belief_s(self) -> float:
        """How long the kernel, which is told so now, may believe that the name leads here."""
        now = time.monotonic()
        if self._mounted is None or now < self._asked_until:
            return 0.0
        self._mounts.told_at = now
        return SHARED_S

    # Whatever comes to the directory itself must look again.

    @property
    def ready(self) -> bool:
        return False

    def prepare(self) -> Steps[None]:
        raise Stale("not through here: walk again")

    def parent(self, node: Node) -> Node:
        return self._outer

    def peek(self, node: Node) -> Steps[Attr]:
        if self._is_detached:
            raise Stale("the container is gone")
        if self._shown is None or self._mounted is None:
            self._shown = yield self._peek
        return self._shown

    def peek_for(self, node: Node, pid: int) -> Steps[Attr]:
        if self._mounted is not None and not self._mounted.is_there():
            self._give_up()  # unmounted by hand, or with a name that the kernel forgot
        if self._mounted is None and not self._mounts.mounter.is_own(pid):
            self.require_hope(pid)
            raise Stale("not mounted yet: walk again")
        return (yield from self.peek(node))

    # Life

    def moved_to(self, place: str) -> None:
        raise AssertionError("a doorway is taken away before")

    def set_quota(self, limit: int | None) -> None:
        """Heeded when it is entered: the kernel knows none."""
        if self._mounted is not None and limit not in (None, self._quota):
            _log.warning(
                "container %s: its quota counts when it is entered anew: now the kernel serves it", self._id
            )
        self._quota = limit

    def before_enter(self) -> Maybe[None]:
        return None if self._mounted is not None or self._is_image_ready else self._before_enter()

    def _before_enter(self) -> Steps[None]:
        yield self._make_ready
        self._is_image_ready = True

    def require_hope(self, pid: int) -> None:
        error, until = self._failures.pop(pid, (None, 0.0))
        if error is not None and time.monotonic() < until:
            raise error

    def _make_ready(self) -> None:
        """In a thread; what it finds wrong `_mount` finds again."""
        with suppress(FusestoreError, OSError):
            self._mounts.make_ready(self._store.image(self._store.container(self._id).image_id))

    def enter(self, pid: int) -> Maybe[RootfsBranch]:
        return self if self._mounted is not None else self._enter(pid)

    def _enter(self, pid: int) -> Steps[RootfsBranch]:
        while self._pending is not None:
            yield self._pending
        if self._is_detached:
            raise Stale("the container is gone")
        if self._mounted is not None or self._union is not None:
            return self._union or self
        with self._doing():
            try:
                yield from self._mounts.make_room()
                mounted = yield Outward(self._mount)
            except (NotSupported, OSError) as error:
                level = logging.INFO if isinstance(error, _Unmountable) else logging.WARNING
                _log.log(level, "container %s is served by the union: %s", self._id, error)
                self._union = self._make_union()
                self._union.set_quota(self._quota)
                return self._union
            except FusestoreError as error:
                self._fail(pid, error)
                raise
        if self._is_detached:
            mounted.give_up()
            raise Stale("the container is gone")
        self._mounted = mounted
        self._mounts.entered[self] = None
        return self

    def _fail(self, pid: int, error: FusestoreError) -> None:
        now = time.monotonic()
        self._failures = {who: told for who, told in self._failures.items() if told[1] > now}
        # Who is told Locked is made to try again, and need not be told by then.
        told = Busy(str(error)) if isinstance(error, Locked) else error
        self._failures[pid] = told, now + _FAILURE_S

    def leave(self) -> Maybe[None]:
        return None if self._mounted is None and self._pending is None else self.leave_now()

    def rest(self) -> None:
        pass

    def leave_now(self) -> Steps[None]:
        """As `leave`."""
        while self._pending is not None:
            if self._mounted is None:
                # Who asks may hold locks that our walk to the place needs.
                raise Busy("somebody is coming to the rootfs of the container: wait until they are in")
            yield self._pending
        if self._mounted is not None:
            with self._doing():
                yield Outward(self._mounted.unmount)
                self._unmounted()

    def detach(self) -> None:
        self._is_detached = True
        self._give_up()

    def _give_up(self) -> None:
        if self._mounted is not None:
            self._mounted.give_up()
            self._unmounted()

    def _unmounted(self) -> None:
        self._mounted = None
        self._mounts.mounter.start_walk(self._mounts.place_anew(self._id))
        self._mounts.entered.pop(self, None)

    def _doing(self) -> ExitStack:
        """While it is open others wait."""
        self._pending = pending = Pending()

        def end() -> None:
            self._pending = None
            pending.finish()

        stack = ExitStack()
        stack.callback(end)
        return stack

    def _mount(self) -> _Mounted:
        """In a thread. Raises NotSupported for what only the union serves, OSError if the kernel cannot."""
        if self.label:
            raise _Unmountable("it has a mountlabel")
        if self._quota is not None:
            raise _Unmountable("it has a quota")
        with ExitStack() as stack:
            hold: Closable = self._store.hold(self._id)
            stack.callback(hold.close)
            image_id = self._store.container(self._id).image_id
            if not image_id:
                raise _Unmountable("it has no image yet")
            objection = self._prepare_upper()
            if objection:
                raise _Unmountable(objection)
            mounted = self._mounts.mount(self._id, self._store.image(image_id), hold)
            stack.pop_all()
            return mounted
