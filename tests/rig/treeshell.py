"""A tree without a kernel: a driver of memory, and a caller of `Tree` by path. Pure.

`TreeShell` does what the kernel does for a system call, with nothing cached: it looks each component up,
calls the operation, and forgets what it looked up. It raises what the tree raises.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fusestore.errors import NotFound, Stale
from fusestore.inodes import Branch, Caller, Changes, FileHandle, Inodes, Maybe, Node, Steps, run
from fusestore.nodes import Attr
from fusestore.store import Image, Store
from fusestore.synthetic import BytesHandle, Owner
from fusestore.tree import Entry, Tree

__all__ = ["CALLER", "FakeDriver", "FakeRootfs", "TreeShell"]

CALLER = Caller(uid=1000, gid=1001, pid=4711, umask=0o022)
OWNER = Owner(501, 502)


class FakeRootfs(Branch):
    """A directory with one file, `inside`, that says what it is of."""

    def __init__(self, inodes: Inodes, parent: Node, content: str, label: bytes = b"") -> None:
        self.root = Node(self, inodes.number())
        self.file = Node(self, inodes.number())
        self.content = content.encode()
        self.label = label
        self.quota: int | None = None
        self.place = ""
        """Where it was moved to."""
        self.attached = False
        self.is_detached = False
        self.handles = 0
        self._parent = parent

    @property
    def ready(self) -> bool:
        return self.attached

    def prepare(self) -> Steps[None]:
        if self.is_detached:
            raise Stale("detached")
        yield lambda: None
        self.attached = True

    def set_quota(self, limit: int | None) -> None:
        self.quota = limit

    @property
    def in_use(self) -> bool:
        return self.handles > 0

    is_doorway = False
    is_covered = False

    def before_enter(self) -> None:
        pass

    def require_hope(self, pid: int) -> None:
        pass

    def enter(self, pid: int) -> "FakeRootfs":
        return self

    def rest(self) -> None:
        pass

    def leave(self) -> None:
        pass

    def moved_to(self, place: str) -> None:
        self.place = place

    def detach(self) -> None:
        self.attached = False
        self.is_detached = True

    def attr(self, node: Node) -> Attr:
        if self.is_detached:
            raise Stale("detached")
        mode = stat.S_IFDIR | 0o755 if node is self.root else stat.S_IFREG | 0o644
        return Attr(mode, 0, 0, len(self.content), 0, 2, 0, 0, 0, 0)

    def peek(self, node: Node) -> Steps[Attr]:
        yield lambda: None
        return self.attr(node)

    def lookup(self, node: Node, name: bytes) -> Node:
        if name != b"inside":
            raise NotFound("no such file")
        return self.file

    def listing(self, node: Node) -> list[tuple[bytes, Any]]:
        return [(b"inside", None)]

    def listed(self, node: Node, name: bytes, token: Any) -> Node:
        return self.file

    def parent(self, node: Node) -> Node:
        return self.root if node is self.file else self._parent

    def open(self, node: Node, flags: int, caller: Caller) -> Maybe[FileHandle]:
        self.handles += 1
        return BytesHandle(node, self.content)

    def opened_dir(self, node: Node) -> None:
        self.handles += 1

    def closed_dir(self, node: Node) -> None:
        self.handles -= 1


class FakeDriver:
    """Remembers what it made."""

    def __init__(self, store: Store, inodes: Inodes) -> None:
        self._inodes = inodes
        self.made: list[FakeRootfs] = []

    def rest(self) -> None:
        pass

    def approached(self, container_id: str, pid: int) -> None:
        pass

    def look_up(self, container_id: str) -> None:
        pass

    def is_walker(self, pid: int) -> bool:
        return False

    def container_rootfs(self, container_id: str, parent: Node, label: bytes) -> FakeRootfs:
        return self._make(parent, f"container {container_id}", label)

    def directory(self, path: str, parent: Node) -> FakeRootfs:
        assert os.path.isdir(path)
        return self._make(parent, os.path.basename(path))

    def image_rootfs(self, image: Image, parent: Node) -> FakeRootfs:
        return self._make(parent, f"image {image.id}")

    def layer_rootfs(self, image: Image, number: int, parent: Node) -> FakeRootfs:
        return self._make(parent, f"layer {number}")

    def _make(self, parent: Node, content: str, label: bytes = b"") -> FakeRootfs:
        made = FakeRootfs(self._inodes, parent, content, label)
        self.made.append(made)
        return made


class TreeShell:
    """System calls on a tree, by paths relative to its root."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.deletions = 0
        self.tree = Tree(store, self._make_driver, OWNER, self._count_deletion)

    def _make_driver(self, store: Store, inodes: Inodes) -> FakeDriver:
        self.driver = FakeDriver(store, inodes)
        return self.driver

    def _count_deletion(self) -> None:
        self.deletions += 1

    @contextmanager
    def walk(self, path: str) -> Iterator[Entry]:
        """The entry at `path`, no link followed, known to the kernel meanwhile."""
        entry = run(self.tree.getattr(self.tree.root.ino))
        known = []
        try:
            for name in filter(None, path.split("/")):
                entry = run(self.tree.lookup(entry.node.ino, name.encode()))
                known.append(entry.node.ino)
            yield entry
        finally:
            self.tree.forget([(ino, 1) for ino in reversed(known)])

    @contextmanager
    def _parent(self, path: str) -> Iterator[tuple[int, bytes]]:
        head, name = os.path.split(path)
        with self.walk(head) as entry:
            yield entry.node.ino, name.encode()

    def _forget(self, entry: Entry) -> None:
        self.tree.forget([(entry.node.ino, 1)])

    def stat(self, path: str) -> Attr:
        with self.walk(path) as entry:
            return run(self.tree.getattr(entry.node.ino)).attr

    def ino(self, path: str) -> int:
        with self.walk(path) as entry:
            return entry.node.ino

    def exists(self, path: str) -> bool:
        try:
            self.stat(path)
        except NotFound:
            return False
        return True

    def readlink(self, path: str) -> str:
        with self.walk(path) as entry:
            return run(self.tree.readlink(entry.node.ino)).decode()

    def ls(self, path: str = "", caller: Caller = CALLER) -> list[str]:
        """Without '.' and '..', in the order of readdir."""
        with self.walk(path) as entry:
            fh = run(self.tree.opendir(entry.node.ino, caller))
            try:
                return [name.decode() for name, _, _ in self.readdir(fh) if name not in (b".", b"..")]
            finally:
                self.tree.releasedir(fh)

    def readdir(self, fh: int, start: int = 0, limit: int = 1 << 30) -> list[tuple[bytes, Entry, int]]:
        """What one readdir answers; at most `limit` entries fit. Their lookups are forgotten at once."""
        found: list[tuple[bytes, Entry, int]] = []

        def emit(name: bytes, entry: Entry, position: int) -> bool:
            if len(found) == limit:
                return False
            found.append((name, entry, position))
            return True

        run(self.tree.readdir(fh, start, emit))
        for name, entry, _ in found:
            if name not in (b".", b".."):
                self._forget(entry)
        return found

    def open(self, path: str, flags: int = os.O_RDONLY) -> int:
        """The file stays open and known; `close` ends that."""
        head, name = os.path.split(path)
        try:
            with self.walk(path) as entry:
                self.tree.inodes.remember(entry.node)
                fh, _ = run(self.tree.open(entry.node.ino, flags & ~(os.O_CREAT | os.O_EXCL), CALLER))
        except NotFound:
            if not flags & os.O_CREAT:
                raise
            with self.walk(head) as entry:
                fh, _, _ = run(self.tree.create(entry.node.ino, name.encode(), 0o666, flags, CALLER))
        return fh

    def close(self, fh: int) -> None:
        node = self.tree.handles.file(fh).node
        try:
            run(self.tree.flush(fh))
        finally:
            run(self.tree.release(fh))
            self.tree.forget([(node.ino, 1)])

    def read(self, path: str) -> bytes:
        fh = self.open(path)
        try:
            return run(self.tree.read(fh, 0, 1 << 22))
        finally:
            self.close(fh)

    def write(self, path: str, data: bytes, flags: int = os.O_WRONLY | os.O_CREAT | os.O_TRUNC) -> None:
        """What ``cat > path`` does."""
        fh = self.open(path, flags)
        try:
            run(self.tree.write(fh, 0, data))
        finally:
            self.close(fh)

    def mkdir(self, path: str) -> None:
        with self._parent(path) as (parent, name):
            self._forget(run(self.tree.mkdir(parent, name, 0o755, CALLER)))

    def mknod(self, path: str) -> None:
        with self._parent(path) as (parent, name):
            self._forget(run(self.tree.mknod(parent, name, stat.S_IFIFO | 0o644, 0, CALLER)))

    def symlink(self, target: str, path: str) -> None:
        with self._parent(path) as (parent, name):
            self._forget(run(self.tree.symlink(parent, name, target.encode(), CALLER)))

    def link(self, path: str, new_path: str) -> None:
        with self.walk(path) as entry, self._parent(new_path) as (parent, name):
            self._forget(run(self.tree.link(entry.node.ino, parent, name)))

    def unlink(self, path: str, caller: Caller = CALLER) -> None:
        with self._parent(path) as (parent, name):
            run(self.tree.unlink(parent, name, caller))

    def rmdir(self, path: str) -> None:
        with self._parent(path) as (parent, name):
            run(self.tree.rmdir(parent, name))

    def rename(self, path: str, new_path: str, flags: int = 0) -> None:
        with self._parent(path) as (parent, name), self._parent(new_path) as (new_parent, new_name):
            run(self.tree.rename(parent, name, new_parent, new_name, flags))

    def setattr(self, path: str, changes: Changes, fh: int | None = None) -> Attr:
        with self.walk(path) as entry:
            return run(self.tree.setattr(entry.node.ino, changes, fh, CALLER)).attr

    def rm_r(self, path: str) -> None:
        """What rm -r does, but for going on after errors."""
        with self.walk(path) as entry:
            fh = run(self.tree.opendir(entry.node.ino, CALLER))
            entries = self.readdir(fh)
            for name, child, _ in entries:
                if name in (b".", b".."):
                    continue
                below = f"{path}/{name.decode()}"
                if stat.S_ISDIR(child.attr.mode):
                    self.rm_r(below)
                else:
                    self.unlink(below)
            self.tree.releasedir(fh)
            # The kernel still knows the directory by name.
            self.rmdir(path)
