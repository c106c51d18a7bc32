"""One mount's life: start, serve, signals, unmount. Async.

pyfuse3 serves requests in trio tasks. Waiting for the next request through trio costs more than most requests
themselves; `_RequestWait` stands in for the few names of trio that pyfuse3 uses and asks poll(2) first.
It must never read a request that is not there (the read would block the loop), nor keep worker threads and
timers waiting: both rules are in `_RequestWait.wait_readable`.
"""

import contextlib
import errno
import json
import logging
import math
import os
import resource
import select
import signal
import time
import types
from collections.abc import AsyncIterator, Callable, Iterable
from typing import NamedTuple

import pyfuse3
import trio

from .drivers import DRIVERS, UnionDriver
from .errors import BadInput, Busy, FusestoreError, NotFound, NotPermitted
from .fuse import Filesystem
from .hydration import hydrate, hydration
from .inodes import Inodes
from .mountpoint import MountOptions, attach, detach, device_at
from .mounts import BELL_MAX, BY_KERNEL, HOW_ARE_YOU, IDLE, Changed, MountRecord
from .store import Store
from .synthetic import Owner
from .syscalls import syncfs
from .tree import Tree
from .watch import Watch

__all__ = ["run"]

_log = logging.getLogger("fusestore")

_SLICE_S = 0.002
"""How long requests may be served in a row before the other tasks have their turn."""
_PATIENCE_MS = 5
"""How long to block the loop for the next request while no other task could do anything. Where processors are
busy, who makes the requests may take that long until the next one."""
_HEARING_S = 5.0
_BELL_PAUSE_S = 0.1
_RINGING_PAUSE_S = 0.005
"""How long the kernel has to forget, at least, while this mount itself waits at another's bell."""
_GRACE_S = 10.0
_RETRY_S = 2.0
_RETRY_MAX_S = 60.0
_WRITE_BACK_S = 10.0
_THRIFT_PAUSE_S = 2.0


class _NoLock:
    """pyfuse3 guards its wait with a lock, which `_RequestWait` does better."""

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *_: object) -> None:
        pass


class _RequestWait:
    """Stands in for ``trio.lowlevel`` in pyfuse3: waits for requests with poll(2) first, then with trio."""

    def __init__(self, filesystem: Filesystem) -> None:
        self._filesystem = filesystem
        self._poll = select.poll()
        self._fd = -1
        self._slice_end = 0.0
        self._patience_ms = 0
        self._lock = trio.Lock()
        self._is_closing = False
        self.current_task = trio.lowlevel.current_task
        self.current_trio_token = trio.lowlevel.current_trio_token

    def notify_closing(self, fd: int) -> None:
        """No more requests are wanted: also the tasks that wait for their turn to wait must end."""
        self._is_closing = True
        trio.lowlevel.notify_closing(fd)

    async def wait_readable(self, fd: int) -> None:
        """Return when a request can be read without blocking; until the caller reads, no other task runs."""
        if self._fd != fd:
            self._poll.register(fd, select.POLLIN)
            self._fd = fd
        if time.monotonic() > self._slice_end:
            self._filesystem.tree.rest()
            await trio.lowlevel.checkpoint()
            self._begin_slice()
        if self._poll.poll(0 if self._filesystem.waiting else self._patience_ms):
            return
        self._filesystem.tree.rest()
        async with self._lock:  # one task at a time may wait for a descriptor in trio
            while not self._is_closing:
                await trio.lowlevel.wait_readable(fd)
                if self._poll.poll(0):  # unless another task has read that request meanwhile
                    break
            else:
                raise trio.ClosedResourceError
        self._begin_slice()

    def _begin_slice(self) -> None:
        """Whoever can run already, or within the slice, has its turn at its end, or when no request comes."""
        self._slice_end = time.monotonic() + _SLICE_S
        until_deadline_s = trio.lowlevel.current_statistics().seconds_to_next_deadline
        self._patience_ms = _PATIENCE_MS if until_deadline_s > 2 * _PATIENCE_MS / 1000 else 0


def _stand_in(filesystem: Filesystem) -> types.SimpleNamespace:
    """What pyfuse3 looks up in its own name `trio` at each call (pyfuse3.asyncio swaps it too)."""
    return types.SimpleNamespace(
        lowlevel=_RequestWait(filesystem),
        Lock=_NoLock,
        open_nursery=trio.open_nursery,
        ClosedResourceError=trio.ClosedResourceError,
    )


def run(
    store: Store,
    mountpoint: str,
    *,
    driver: str,
    options: MountOptions,
    hydrates: bool,
    ready: Callable[[], None],
    reopen_log: Callable[[], None] | None,
) -> None:
    """Mount the store's tree and serve it until it is unmounted; `ready` is called once it answers.

    SIGTERM and SIGINT unmount (`_Departure`). SIGHUP calls `reopen_log`; without one a terminal has gone, and
    that unmounts too. What was written is on disk when it returns. `driver` is a name of DRIVERS, or
    ``auto``. `hydrates`: the images of containers that are entered, in the background (fusestore.hydration).
    Raises FusestoreError where it cannot be mounted. Only one mount can be served by a process (pyfuse3).
    """
    chosen = next(iter(DRIVERS)) if driver == "auto" else driver
    if chosen not in DRIVERS:
        raise BadInput(f"no driver {driver}: use auto, {', '.join(DRIVERS)}")
    if chosen in BY_KERNEL and os.geteuid():
        raise NotPermitted(
            "only root can have the kernel mount: use --driver union, or overlay in `unshare -Urm`"
        )
    _log.info("driver %s (asked for: %s)", chosen, driver)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.umask(0)  # a file has the mode it is to have as soon as it has its name (fusestore.upper)
    mountpoint = os.path.realpath(mountpoint)
    with contextlib.ExitStack() as stack:
        trash = _Trash(store)
        store.leave_trash()
        hydrator = _Hydrator(store)

        def make_driver(store: Store, inodes: Inodes) -> UnionDriver:
            made = DRIVERS[chosen](store, inodes, mountpoint)
            stack.callback(made.close)
            if hydrates:
                made.entered = hydrator.want
            return made

        tree = Tree(store, make_driver, Owner(os.geteuid(), os.getegid()), trash.wake)
        filesystem = Filesystem(tree, enable_acl="default_permissions" in options.words)
        stack.callback(setattr, pyfuse3, "trio", trio)
        setattr(pyfuse3, "trio", _stand_in(filesystem))  # noqa: B010 - not in its type stubs
        disk = os.open(store.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, disk)
        stack.callback(_sync, disk)
        departure = _Departure(mountpoint, filesystem, reopen_log)
        device = _init(filesystem, store.path, mountpoint, options)
        stack.callback(_close, device, departure)
        departure.device = device_at(mountpoint)
        record = store.record_mount(mountpoint, os.getpid(), chosen, departure.device)
        stack.callback(record.close)
        _require_alone(store, record)
        watch = stack.enter_context(Watch(filesystem.meter, tree, store))
        trio.run(
            _serve,
            record,
            store,
            filesystem,
            _Chores(
                trash,
                hydrator,
                _Completion(store, trash.wake),
                _Thrift(store, is_needed=chosen in BY_KERNEL),
            ),
            departure,
            watch,
            ready,
        )
    _log.info("unmounted %s: %d lookups, %d handles left", mountpoint, tree.lookups, len(tree.handles))


def _require_alone(store: Store, record: MountRecord) -> None:
    """Raises Busy for a second mount of a store of which the kernel serves containers, or is to.

    overlayfs.rst: what else changes an upper directory has undefined behavior.
    """
    for other in store.mounts():
        by_kernel = BY_KERNEL & {other.driver, record.driver}
        if other.bell_name != record.bell_name and by_kernel:
            raise Busy(
                f"the store is mounted at {other.mountpoint} too, and by {min(by_kernel)} it can be "
                f"mounted once: fusestore umount {other.mountpoint}"
            )


def _init(filesystem: Filesystem, source: str, mountpoint: str, options: MountOptions) -> int:
    """Mounts. The device of root's mount, which libfuse did not make, and -1 for others.

    libfuse and fusermount3 say on standard error why they cannot: that goes into the exception.
    """
    if os.geteuid() == 0:
        device = attach(source, mountpoint, options)
        pyfuse3.init(filesystem, f"/dev/fd/{device}", set())
        return device
    own = os.dup(2)
    said = os.memfd_create("stderr")
    os.dup2(said, 2)
    try:
        escaped = source.replace("\\", r"\\").replace(",", r"\,")
        pyfuse3.init(filesystem, mountpoint, {f"fsname={escaped}", "subtype=fusestore", *options.words})
        return -1
    except RuntimeError as error:
        reasons = os.pread(said, 1 << 12, 0).decode(errors="replace").strip().splitlines() or [str(error)]
        refused = f"{mountpoint} could not be mounted ({reasons[-1]})"
        raise FusestoreError(f"{refused}: choose an empty directory of your own") from None
    finally:
        os.dup2(own, 2)
        os.close(own)
        os.close(said)


def _close(device: int, departure: "_Departure") -> None:
    """The connection ends, and the mount if it is still there: after it, for the kernel waits for answers."""
    if device < 0:
        pyfuse3.close(unmount=not departure.is_detached)
        return
    hangup = select.poll()
    hangup.register(device, 0)  # POLLERR comes unasked, once the file system is unmounted
    is_mounted = not departure.is_detached and not hangup.poll(0)
    pyfuse3.close()
    if is_mounted:
        with contextlib.suppress(NotFound):  # a detach that was abandoned was done just now
            detach(departure.mountpoint, lazily=True)


def _sync(disk: int) -> None:
    try:
        syncfs(disk)
    except OSError as error:
        _log.error("the disk did not take all that was written: %s", error.strerror)


class _Completion:
    """Fetches in the background what lazy images lack, again and again where a registry does not give it.

    The end of the mount does not wait for it: the next mount goes on.
    """

    def __init__(self, store: Store, discarded: Callable[[], None]) -> None:
        """`discarded` is told that there may be more in the trash."""
        self._store = store
        self._discarded = discarded
        self._wanted = trio.Event()

    def wake(self) -> None:
        self._wanted.set()

    async def run(self) -> None:
        pause_s = _RETRY_S
        while True:
            self._wanted = trio.Event()
            try:
                problems = await trio.to_thread.run_sync(self._store.complete_layers, abandon_on_cancel=True)
            except Exception:
                _log.exception("fetching lazy images failed unforeseen")
                problems = ["lazy images are not fetched"]
            self._discarded()
            for problem in problems:
                _log.warning("%s; it is tried again in %.0f s", problem, pause_s)
            with trio.move_on_after(pause_s if problems else math.inf) as waiting:
                await self._wanted.wait()
            pause_s = min(2 * pause_s, _RETRY_MAX_S) if problems and waiting.cancelled_caught else _RETRY_S


class _Trash:
    """Empties the store's trash in the background, one worker at a time.

    The end of the mount does not wait for it: what is left the next mount deletes.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._wanted = trio.Event()

    def wake(self) -> None:
        self._wanted.set()

    async def run(self) -> None:
        while True:
            try:
                await trio.to_thread.run_sync(self._store.empty_trash, abandon_on_cancel=True)
            except OSError as error:
                _log.warning("trash: %s", error)
            await self._wanted.wait()
            self._wanted = trio.Event()


class _Hydrator:
    """Hydrates images in the background, one after the other; the end of the mount breaks it off."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._send, self._wanted = trio.open_memory_channel[str](math.inf)
        self._token: trio.lowlevel.TrioToken | None = None
        self._limiter = trio.CapacityLimiter(1)

    def want(self, image_id: str) -> None:
        """From any thread. "" is no image."""
        if image_id and self._token is not None:
            self._token.run_sync_soon(self._send.send_nowait, image_id)

    async def run(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        done = set()
        async for image_id in self._wanted:
            if image_id not in done:
                done.add(image_id)
                await trio.to_thread.run_sync(self._hydrate, image_id, limiter=self._limiter)

    def _hydrate(self, image_id: str) -> None:
        try:
            image = self._store.image(image_id)
            before = hydration(self._store, image)
            hydrate(self._store, image, lambda done, total: trio.from_thread.check_cancelled())
            size = hydration(self._store, image).size - before.size
            _log.info("image %s is hydrated: %d bytes more on disk", image_id[:12], size)
        except (FusestoreError, OSError) as error:
            _log.warning("image %s is not hydrated: %s", image_id[:12], error)


class _Thrift:
    """Gives back what the kernel caches a second time of layers, where it serves containers itself.

    It keeps what they read once for all of them: the pages of the blob and of what was decompressed, which
    that came from, serve nobody then. Those of the tar stay: EROFS reads one page in a hundred again each
    time. (By the union driver each container has pages of its own, and the next one's come from these.)
    """

    def __init__(self, store: Store, is_needed: bool) -> None:
        self._store = store
        self._is_needed = is_needed

    async def run(self) -> None:
        while self._is_needed:
            await trio.sleep(_THRIFT_PAUSE_S)
            try:
                await trio.to_thread.run_sync(self._store.give_back_pages, abandon_on_cancel=True)
            except OSError as error:
                _log.warning("pages of layers are not given back: %s", error)


class _Chores(NamedTuple):
    """What a mount does in the background."""

    trash: _Trash
    hydrator: _Hydrator
    completion: _Completion
    thrift: _Thrift


async def _serve(
    record: MountRecord,
    store: Store,
    filesystem: Filesystem,
    chores: _Chores,
    departure: "_Departure",
    watch: Watch,
    ready: Callable[[], None],
) -> None:
    async with trio.open_nursery() as nursery:
        filesystem.nursery = nursery
        nursery.start_soon(departure.run)
        nursery.start_soon(_answer_bell, record, store, filesystem, watch, chores.completion)
        nursery.start_soon(_announce, record.mountpoint, ready)
        for chore in chores:
            nursery.start_soon(chore.run)
        await pyfuse3.main()
        nursery.cancel_scope.cancel()


async def _announce(mountpoint: str, ready: Callable[[], None]) -> None:
    await trio.to_thread.run_sync(os.stat, mountpoint)
    _log.info("mounted %s", mountpoint)
    ready()


async def _answer_bell(
    record: MountRecord, store: Store, filesystem: Filesystem, watch: Watch, completion: _Completion
) -> None:
    """Have the kernel forget what other processes say they changed; tell those who ask how the mount does."""
    assert record.bell is not None, "only the daemon has one"
    record.bell.setblocking(False)
    bell = trio.socket.from_stdlib_socket(record.bell)
    async with trio.open_nursery() as nursery:
        while True:
            try:
                connection, _ = await bell.accept()
            except OSError as error:  # EMFILE, above all: the mount survives
                _log.warning("the bell: %s", error)
                await trio.sleep(_BELL_PAUSE_S)
            else:
                nursery.start_soon(_hear, connection, record, store, filesystem, watch, completion, nursery)


async def _hear(
    connection: trio.socket.SocketType,
    record: MountRecord,
    store: Store,
    filesystem: Filesystem,
    watch: Watch,
    completion: _Completion,
    nursery: trio.Nursery,
) -> None:
    with connection:
        try:
            changed = Changed("", "")
            with trio.move_on_after(_HEARING_S):
                said = await connection.recv(BELL_MAX)
                if said == HOW_ARE_YOU:
                    await connection.send(json.dumps(watch.report(record)).encode())
                    return
                changed = Changed.decode(said)
                if changed.place != IDLE:
                    await _have_forgotten(changed, record, store, filesystem.tree, nursery)
                    if changed.place == "images":
                        completion.wake()
                    await connection.send(b"!")
            if changed.place == IDLE:  # as long as the disk takes
                await filesystem.finish(filesystem.tree.let_go(changed.name))
                await connection.send(b"!")
        except BrokenPipeError:
            pass  # who rang waits no more, and has said so
        except (OSError, ValueError) as error:
            _log.warning("not understood at the bell: %s", error)


async def _have_forgotten(
    changed: Changed, record: MountRecord, store: Store, tree: Tree, nursery: trio.Nursery
) -> None:
    if changed.place == "images":
        await trio.to_thread.run_sync(store.reopen_layers)
    place = tree.heard(changed)
    if place is None:
        return
    forgotten = trio.Event()
    nursery.start_soon(_forget, place, forgotten)
    while not forgotten.is_set():
        with trio.move_on_after(_RINGING_PAUSE_S):
            await forgotten.wait()
        if record.is_ringing:
            break


async def _forget(place: tuple[int, bytes], forgotten: trio.Event) -> None:
    try:
        await trio.to_thread.run_sync(_invalidate, *place, abandon_on_cancel=True)
    except OSError as error:
        _log.warning("the kernel did not forget %r: %s", place[1], error)
    finally:
        forgotten.set()


def _invalidate(directory: int, name: bytes) -> None:
    """Blocking: the kernel takes locks that a request in progress may hold."""
    with contextlib.suppress(FileNotFoundError):  # it does not know the name
        pyfuse3.invalidate_entry(pyfuse3.InodeT(directory), name)
    with contextlib.suppress(FileNotFoundError):
        pyfuse3.invalidate_inode(pyfuse3.InodeT(directory), attr_only=True)


class _Departure:
    """The end of a mount that a signal asks for.

    The mount point is free at once. Whoever uses the mount is served until they let go, for `_GRACE_S` at
    most, or until a second signal; then their unwritten pages are fetched from the kernel, and it is over.
    """

    def __init__(
        self, mountpoint: str, filesystem: Filesystem, reopen_log: Callable[[], None] | None
    ) -> None:
        self.mountpoint = mountpoint
        self.device: str | None = None
        """What is mounted there."""
        self._filesystem = filesystem
        self._reopen_log = reopen_log
        self.is_detached = False
        """The mount point may be another's by now."""

    async def run(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            _log.info("signal %d: unmounting", await self._departing(signals))
            with trio.move_on_after(_GRACE_S):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._detach)
                    await self._departing(signals)
                    nursery.cancel_scope.cancel()
        _log.warning("still in use: what is open there fails from now on")
        with trio.move_on_after(_WRITE_BACK_S):
            files = self._filesystem.tree.handles.open_files()
            await trio.to_thread.run_sync(_write_back, files, abandon_on_cancel=True)
        pyfuse3.terminate()

    async def _departing(self, signals: AsyncIterator[int]) -> int:
        """The next signal that is to end the mount."""
        async for number in signals:
            if number != signal.SIGHUP or self._reopen_log is None:
                return number
            try:
                self._reopen_log()
            except OSError as error:
                _log.warning("the log goes on in the old file: %s", error)
        raise AssertionError("signals never end")

    async def _detach(self) -> None:
        """In a thread: the kernel asks us to write what it holds."""
        await self._filesystem.finish(self._filesystem.tree.let_go(""))
        try:
            await trio.to_thread.run_sync(_detach, self.mountpoint, self.device, abandon_on_cancel=True)
        except FusestoreError as error:
            _log.error("%s", error)
        else:
            self.is_detached = True
            self._filesystem.tree.abandon()


def _detach(mountpoint: str, device: str | None) -> None:
    if device_at(mountpoint) != device:
        return  # unmounted already: another mount namespace has it still
    try:
        detach(mountpoint)
    except Busy:
        detach(mountpoint, lazily=True)


def _write_back(files: Iterable[int]) -> None:
    """Blocking: has the kernel write what it holds of these files, also where they are mapped."""
    for ino in files:
        try:
            pyfuse3.invalidate_inode(pyfuse3.InodeT(ino))
        except OSError as error:
            if error.errno != errno.ENOENT:  # it has forgotten the file
                _log.error("inode %d: what the kernel held of it is lost: %s", ino, error)
