"""One container's directory in the tree: its document, its parts, its scratch files, its removal. Blocking.

Small reads (two stats, a document of some hundred bytes) are done at once; what takes a lock or syncs is done
in steps by the caller.

Removal has two forms (design.md section 2). Unlinking metadata.json *declares* it: rootfs, workdir and rundir
read as empty, so that ``rm -r`` deletes nothing inside, and the rmdir that follows deletes all at once.
Renaming it, as editors do for a backup, only puts it *aside*: the parts stay; unlinking the file it became
declares. Making metadata.json again takes either back, starting the container the first. All of this is in
memory: a remount shows the container whole.

The rule a maintainer must not break: while a removal is declared no name in here leads to what is on disk,
also not through what the kernel has cached. Hence `Inodes.replace`: the number of the real root becomes the
empty directory.
"""

import json
import os
from types import GeneratorType
from typing import Any, NamedTuple, cast

from . import errors
from .documentfile import DocumentNode
from .inodes import Branch, Inodes, Maybe, Node, Outward, Steps
from .layout import Layout
from .metadata import Document, quota_of
from .nodes import Attr, Inode
from .scratchfile import SCRATCH_FILES_MAX, ScratchFile, ScratchMemory
from .store import Store
from .synthetic import SHARED_S, Owner, RootfsBranch, RootfsDriver

__all__ = ["DOCUMENT", "PARTS", "ContainerDir", "EmptyDir", "Surroundings"]

DOCUMENT = b"metadata.json"
PARTS = (b"rootfs", b"workdir", b"rundir")


class Surroundings:
    """What every container directory of a mount works with."""

    __slots__ = ("driver", "inodes", "layout", "owner", "scratch_memory", "store")

    def __init__(self, store: Store, inodes: Inodes, driver: RootfsDriver, owner: Owner) -> None:
        self.store = store
        self.inodes = inodes
        self.driver = driver
        self.owner = owner
        self.scratch_memory = ScratchMemory()
        self.layout = Layout(os.fspath(store.path))


class EmptyDir(Node):
    """What a part reads as while the removal of its container is declared."""

    __slots__ = ("container", "name")

    entry_timeout_s = 0.0
    attr_timeout_s = 0.0

    def __init__(self, container: "ContainerDir", name: bytes) -> None:
        super().__init__(container.branch, container.around.inodes.number())
        self.container = container
        self.name = name

    def attr(self) -> Attr:
        """Raises Stale once the removal was taken back."""
        if not self.container.is_removing:
            raise errors.Stale("the removal of the container was taken back")
        return self.container.around.owner.directory(mtime_ns=0, nlink=2)


class _Removal:
    """A removal that was declared: what the parts are meanwhile."""

    __slots__ = ("empty", "removed")

    def __init__(self) -> None:
        self.empty: dict[bytes, EmptyDir] = {}
        self.removed: set[bytes] = set()


class _Identity(NamedTuple):
    """What tells a container from another one of the same id; None is not known."""

    directory: int | None
    workdir: int | None
    created_at: int | None


class ContainerDir(Node):
    """/containers/<id>. Its name is asked for each time: others make and delete containers in this store."""

    __slots__ = (
        "_document",
        "_former_doorway",
        "_identity",
        "_label",
        "_parts",
        "_quota",
        "_removal",
        "_rundir",
        "_version",
        "around",
        "aside",
        "id",
        "is_gone",
        "is_leaving",
        "is_mounted",
        "scratch",
        "seekers",
    )

    entry_timeout_s = SHARED_S
    attr_timeout_s = SHARED_S

    def __init__(self, branch: Branch, ino: Inode, around: Surroundings, container_id: str) -> None:
        super().__init__(branch, ino)
        self.around = around
        self.id = container_id
        self.scratch: dict[bytes, ScratchFile] = {}
        self.aside: bytes | None = None
        """The scratch file that metadata.json was renamed to."""
        self.is_gone = False
        """Deleted, by us or behind us: this node leads nowhere."""
        self.is_leaving = False
        """Being deleted or renamed: what comes in meanwhile must not open it again."""
        self.is_mounted = False
        self.seekers: set[int] = set()
        """Threads that were told to walk to rootfs again, since the kernel did not know the name."""
        self._parts: dict[bytes, RootfsBranch] = {}
        self._former_doorway: Node | None = None
        self._removal: _Removal | None = None
        self._rundir: str | None = None
        self._document: DocumentNode | None = None
        self._label = b""
        self._quota: int | None = None
        self._version: object = None
        """Of the store's document as it was last read; None if it could not be."""
        self._identity: _Identity | None = None

    # The store

    def check(self) -> None:
        """As `refresh`, but reads no document as long as nothing depends on which container this is."""
        if self._identity is not None or self.is_gone:
            self.refresh()
        elif not os.path.lexists(self.around.layout.container(self.id)):
            raise errors.NotFound(f"there is no container {self.id}")

    def refresh(self) -> None:
        """Take over what changed in the store.

        Raises NotFound; Stale if another container has the id now; Busy while it is being deleted or renamed.
        """
        if self.is_gone:
            raise errors.Stale(f"container {self.id} was deleted")
        if self.is_leaving:
            raise errors.Busy(f"container {self.id} is being deleted or renamed")
        try:
            version: object = self.around.store.version(self.id)
        except (errors.StoreDamaged, OSError):
            # It can still be looked at and deleted. Whoever opens the document is told.
            version = None
        if version is None or version != self._version:
            self._version = version if self._reread() else None

    def _reread(self) -> bool:
        """Whether the document said all it had to say, if only that it is damaged."""
        is_known = True
        document: dict[str, Any] | None = None
        try:
            document = json.loads(self.around.store.document(self.id))
        except errors.StoreDamaged:
            pass
        except OSError:
            is_known = False
        self._identify(None if document is None else document["created-at"])
        self.is_mounted = self.around.store.is_started(self.id)
        if self.is_mounted and self._removal is not None:
            self.take_back()  # who started it could not know of a removal that only this mount does
        if document is not None:
            self._label = document.get("mountlabel", "").encode()
            self._quota = quota_of(document)
        rootfs = self._parts.get(b"rootfs")
        if rootfs is not None:
            rootfs.label = self._label
            rootfs.set_quota(self._quota)
        return is_known

    def _identify(self, created_at: int | None) -> None:
        """Raises NotFound, or Stale for another container than this node was made for."""
        layout = self.around.layout
        directory = _inode(layout.container(self.id))
        if directory is None:
            raise errors.NotFound(f"container {self.id} was deleted")
        # Inode numbers are used again, but two of them for the same, and in the same second?
        found = _Identity(directory, _inode(layout.workdir(self.id)), created_at)
        known = self._identity or found
        if any(None not in pair and pair[0] != pair[1] for pair in zip(known, found, strict=True)):
            raise errors.Stale(f"container {self.id} was deleted and made again")
        # What is damaged now was known before.
        self._identity = _Identity(
            *(new if new is not None else old for old, new in zip(known, found, strict=True))
        )

    def renamed(self, new_id: str, rundir: str | None) -> None:
        """The store renamed the container; nobody uses it. `rundir` is where that is now, if anywhere."""
        self.id = new_id
        self._rundir = rundir
        places = {b"rootfs": new_id, b"workdir": self.around.layout.workdir(new_id), b"rundir": rundir}
        for name, part in list(self._parts.items()):
            place = places[name]
            if place is None:
                del self._parts[name]
                part.detach()
            else:
                # The kernel goes on knowing all that is in it: mkdir(2) does not try again after ESTALE.
                part.moved_to(place)
        self._version = None
        self._document = None  # it says the id

    def attr(self) -> Attr:
        """Raises Stale when it was deleted."""
        if self.is_gone:
            raise errors.Stale(f"container {self.id} was deleted")
        try:
            status = os.stat(self.around.layout.container(self.id), follow_symlinks=False)
        except FileNotFoundError:
            raise errors.Stale(f"container {self.id} was deleted") from None
        return self.around.owner.directory(status.st_mtime_ns, nlink=2 + len(PARTS))

    # The document

    @property
    def is_removing(self) -> bool:
        """Removal is declared."""
        return self._removal is not None

    @property
    def shows_document(self) -> bool:
        return self._removal is None and self.aside is None

    def document(self) -> DocumentNode:
        """The node of the document as it is now. Raises NotFound while it is unlinked or renamed."""
        if not self.shows_document:
            raise errors.NotFound("metadata.json was removed: make it again to keep the container")
        self.refresh()
        known = self._document
        if known is None or self._version is None or known.version != self._version:
            try:
                data: bytes | None = self.around.store.document(self.id)
                mtime_ns = os.stat(self.around.layout.document(self.id)).st_mtime_ns
            except errors.StoreDamaged:
                data, mtime_ns = None, 0
            ino = self.around.inodes.number()
            known = DocumentNode(self.branch, ino, self, self._version, data, mtime_ns)
            self._document = known
        return known

    def renew_document(self) -> None:
        """The next one who asks for the document gets another node, though the content be the same."""
        self._document = None

    # The parts

    def names(self) -> list[bytes]:
        """What `ls` shows. What declares the removal is first, so that ``rm -r`` unlinks it first."""
        scratch = sorted(self.scratch, key=lambda name: (name != self.aside, name))
        removed = self._removal.removed if self._removal is not None else ()
        document = [DOCUMENT] if self.shows_document else []
        return [*document, *scratch, *(part for part in PARTS if part not in removed)]

    def part(self, name: bytes) -> Node | Steps[Node]:
        """The root of `name`, one of `PARTS`."""
        if name == b"rundir" and self._rundir is None and not self.is_removing:
            return self._part_rundir()
        return self.part_now(name)

    def _part_rundir(self) -> Steps[Node]:
        yield from self.make_rundir()
        return self.part_now(b"rundir")

    def make_rundir(self) -> Steps[None]:
        if self._rundir is None:
            path = yield lambda: self.around.store.run_dir(self.id)
            self._rundir = os.fspath(path)

    def part_now(self, name: bytes) -> Node:
        """As `part`; rundir only after `make_rundir`. Raises NotFound for what was removed."""
        removal = self._removal
        if self.is_gone or self.is_leaving or (removal is not None and name in removal.removed):
            raise errors.NotFound(f"{name!r} was removed")
        if removal is None:
            return self._real(name).root
        if name not in removal.empty:
            removal.empty[name] = EmptyDir(self, name)
        return removal.empty[name]

    def _real(self, name: bytes) -> RootfsBranch:
        part = self._parts.get(name)
        if part is None:
            driver = self.around.driver
            if name == b"rootfs":
                part = driver.container_rootfs(self.id, self, self._label)
                part.set_quota(self._quota)
            elif name == b"workdir":
                part = driver.directory(self.around.layout.workdir(self.id), self)
            elif self._rundir is not None:
                part = driver.directory(self._rundir, self)
            else:
                raise errors.StoreError("rundir could not be made")
            self._parts[name] = part
            former = self._former_doorway
            if name == b"rootfs" and former is not None:
                self._former_doorway = None
                if former.lookups:
                    self.around.inodes.replace(former, part.root)
        return part

    def before_enter(self) -> Maybe[None]:
        """Precedes `enter_rootfs`."""
        self.part_now(b"rootfs")
        part = self._parts.get(b"rootfs")
        return None if part is None else part.before_enter()

    def enter_rootfs(self, pid: int) -> Maybe[None]:
        """Somebody comes to rootfs. Raises Stale where they must come once more."""
        self.part_now(b"rootfs")
        part = self._parts.get(b"rootfs")
        if part is None or not part.is_doorway:
            return None
        if not part.root.lookups:
            # The kernel walks again once, and asks for this directory before. From inside of it it does not.
            part.require_hope(pid)
            if pid not in self.seekers:
                self.seekers.add(pid)
                raise errors.Stale("not known yet: walk again")
            self.seekers.clear()
            return None
        entered = part.enter(pid)
        return None if entered is part else self._enter_rootfs(part, entered)

    def _enter_rootfs(self, part: RootfsBranch, steps: Maybe[RootfsBranch]) -> Steps[None]:
        entered = (yield from steps) if isinstance(steps, GeneratorType) else cast(RootfsBranch, steps)
        if self._parts.get(b"rootfs") is part and entered is not part:
            part.detach()
            self._parts[b"rootfs"] = entered
            self.around.inodes.replace(part.root, entered.root)

    @property
    def is_unknown_to_kernel(self) -> bool:
        """Whether nobody came to rootfs yet."""
        rootfs = self._parts.get(b"rootfs")
        return rootfs is None or not rootfs.root.lookups

    def make_known(self) -> Steps[None]:
        """Has the kernel know the name rootfs."""
        yield Outward(lambda: self.around.driver.look_up(self.id))
        self.seekers.clear()

    def be_asked(self, until: float) -> Steps[None]:
        """Whoever comes to rootfs until then (time.monotonic) is to ask for it."""
        rootfs = self._parts.get(b"rootfs")
        if rootfs is not None and rootfs.is_covered:
            rootfs.be_asked(until)
            yield Outward(lambda: self.around.driver.look_up_anew(self.id))

    @property
    def is_covered(self) -> bool:
        """The kernel has something mounted over rootfs."""
        rootfs = self._parts.get(b"rootfs")
        return rootfs is not None and rootfs.is_covered

    def asks_more(self, document: Document) -> bool:
        """Whether that sets what the kernel's overlayfs knows nothing of: a quota, a mountlabel."""
        label = document.get("mountlabel")
        is_label = isinstance(label, str) and label.encode(errors="ignore") not in (b"", self._label)
        return is_label or quota_of(document) not in (None, self._quota)

    def leave(self) -> Steps[None]:
        """Have every part give back what it holds while nobody is there. Raises Busy."""
        for part in list(self._parts.values()):
            left = part.leave()
            if isinstance(left, GeneratorType):
                yield from left

    @property
    def is_entered(self) -> bool:
        """Someone was in rootfs since it was last let go."""
        rootfs = self._parts.get(b"rootfs")
        return rootfs is not None and rootfs.attached

    @property
    def is_in_use(self) -> bool:
        return any(part.in_use for part in self._parts.values())

    def require_idle(self, what: str) -> None:
        """Raises Busy while the container is pinned or something is open in it, NotFound if it is gone."""
        self.refresh()
        if self.is_mounted:
            raise errors.Busy(f"container {self.id} is started: stop it before you {what} it")
        for part in self._parts.values():
            part.rest()
        if self.is_in_use or self.around.store.is_held(self.id):
            raise errors.Busy(f"container {self.id} is in use: close what is open in it before you {what} it")

    def has_root(self, node: Node) -> bool:
        """Whether `node` is the root of one of the parts."""
        return any(part.root is node for part in self._parts.values())

    def detach(self) -> None:
        """Let go of everything on disk. Known nodes of the parts answer Stale; lookups make them anew."""
        self.detach_doorway()
        parts, self._parts = self._parts, {}
        for part in parts.values():
            part.detach()

    def detach_doorway(self) -> None:
        rootfs = self._parts.get(b"rootfs")
        if rootfs is not None and rootfs.is_doorway:
            # The kernel goes on knowing the name by this number: nothing below it is known.
            self._former_doorway = rootfs.root
            del self._parts[b"rootfs"]
            rootfs.detach()

    @property
    def has_rundir(self) -> bool:
        """It was made, and asked for."""
        return self._rundir is not None

    @property
    def has_state(self) -> bool:
        """Whether this node must stay, also when the kernel forgets it."""
        return bool(self.scratch) or not self.shows_document or self.is_in_use

    # Scratch files

    def add_scratch(self, name: bytes, data: bytes, mode: int, uid: int, gid: int) -> ScratchFile:
        """Raises NoSpace."""
        if len(self.scratch) >= SCRATCH_FILES_MAX:
            raise errors.NoSpace(f"at most {SCRATCH_FILES_MAX} files fit next to metadata.json: use workdir")
        memory = self.around.scratch_memory
        file = ScratchFile(self.branch, self.around.inodes.number(), self, memory, data, mode, uid, gid)
        self.scratch[name] = file
        return file

    def rename_scratch(self, name: bytes, new_name: bytes) -> None:
        """rename(2) between two names of scratch files, the first of which is there."""
        replaced = self.scratch.pop(new_name, None)
        if replaced is not None:
            replaced.unlinked()
        self.scratch[new_name] = self.scratch.pop(name)
        if self.aside in (name, new_name):
            self.aside = new_name

    def unlink_scratch(self, name: bytes) -> None:
        """Raises NotFound; Busy if that declares the removal, and the container is not idle."""
        if name not in self.scratch:
            raise errors.NotFound(f"there is no {name!r}")
        if name == self.aside:
            self.declare_removal()
        self.scratch.pop(name).unlinked()

    # Removal

    def put_aside(self, name: bytes) -> None:
        """metadata.json becomes the scratch file `name`."""
        data = self.document().data
        if data is None:
            raise errors.StoreDamaged(f"container {self.id}: its document is damaged: delete the container")
        owner = self.around.owner
        replaced = self.scratch.pop(name, None)
        self.add_scratch(name, data, 0o644, owner.uid, owner.gid)
        if replaced is not None:
            replaced.unlinked()
        self.aside = name

    def declare_removal(self) -> None:
        """metadata.json, or what it became, is unlinked. Raises Busy."""
        self.require_idle("remove")
        parts = self._parts
        self.detach()
        self._removal = removal = _Removal()
        self.aside = None
        for name, part in parts.items():
            removal.empty[name] = EmptyDir(self, name)
            self.around.inodes.replace(part.root, removal.empty[name])

    def remove_part(self, name: bytes) -> None:
        """rmdir(2) of one of `PARTS`. Raises NotPermitted; Busy where that cannot be helped now."""
        removal = self._removal
        if removal is None:
            self.require_idle("remove")
            raise errors.NotPermitted(f"{name.decode()} is part of the container: rmdir the container itself")
        if name in removal.removed:
            raise errors.NotFound(f"{name!r} was removed")
        removal.removed.add(name)
        removal.empty.pop(name, None)

    def take_back(self) -> None:
        """metadata.json is made again: everything is as it was. Idempotent."""
        removal, self._removal = self._removal, None
        self.aside = None
        self._document = None
        for name, node in removal.empty.items() if removal is not None else ():
            if node.lookups and (name != b"rundir" or self._rundir is not None):
                self.around.inodes.replace(node, self._real(name).root)


def _inode(path: str) -> int | None:
    try:
        return os.stat(path, follow_symlinks=False).st_ino
    except FileNotFoundError:
        return None
