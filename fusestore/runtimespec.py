"""The OCI runtime-spec's config.json (config.md, config-linux.md) of a container, and its user. Pure.

It is what `runc spec` writes, filled in from the image's config as the image-spec says (conversion.md), but
with the capabilities that podman gives, without which no package manager works, and a rootfs to write to. A
plain user's is that of `runc spec --rootless`: a user namespace in which only they are mapped, as root.

/dev is a tmpfs: the mounts of fusestore are mostly nodev.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import BadInput

__all__ = ["User", "find_user", "make_spec"]

_CAPABILITIES = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
)
_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MASKED = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/firmware",
)
_READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
_HOSTNAME_MAX = 64
_ID_MAX = (1 << 32) - 2


@dataclass(frozen=True, slots=True)
class User:
    """Who a process runs as, by the numbers of its container."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    """Besides `gid`."""


@dataclass(frozen=True, slots=True)
class _Line:
    """Of passwd(5) or group(5)."""

    name: str
    id: int
    rest: Sequence[str]
    """From `id` on, as it is written."""


def find_user(text: str, read: Callable[[str], str]) -> User:
    """What ``User`` in an image's config means: user, uid, user:group, uid:gid, … (image-spec config.md).

    `read(path)` gives a file of the rootfs, "" if it is not there. A uid need not be in passwd. Raises
    BadInput.
    """
    name, _, group = text.partition(":")
    uid = _number(name or "0")
    users = [
        line
        for line in _lines(read("etc/passwd"), 4)
        if line.name == name or (uid is not None and line.id == uid)
    ]
    # A name may look like a number; the number comes second, as for runc.
    found = next((line for line in users if line.name == name), next(iter(users), None))
    if found is None and uid is None:
        raise BadInput(f"the image's user {name!r} is not in its /etc/passwd: add it there")
    if group:
        gid = _number(group)
        named = next((line.id for line in _lines(read("etc/group"), 4) if line.name == group), gid)
        if named is None:
            raise BadInput(f"the image's group {group!r} is not in its /etc/group: add it there")
        return User(found.id if found else uid or 0, named)
    if found is None:
        return User(uid or 0)
    members = (line for line in _lines(read("etc/group"), 4) if found.name in line.rest[1].split(","))
    return User(found.id, _number(found.rest[1]) or 0, tuple(line.id for line in members))


def _number(text: str) -> int | None:
    if not text.isascii() or not text.isdigit():
        return None
    digits = text.lstrip("0") or "0"
    # int() refuses thousands of digits.
    return int(digits) if len(digits) <= 10 and int(digits) <= _ID_MAX else None


def _lines(text: str, least: int) -> Iterator[_Line]:
    """Those that are right, with `least` fields or more."""
    for line in text.split("\n"):  # unlike splitlines(), as everybody else reads these files
        fields = line.split(":")
        if len(fields) >= least and (number := _number(fields[2])) is not None:
            yield _Line(fields[0], number, fields[2:])


def make_spec(
    rootfs: str,
    hostname: str,
    settings: Mapping[str, Any],
    args: Sequence[str],
    user: User,
    *,
    has_terminal: bool = False,
    rootless_as: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """config.json for the rootfs at that path. `settings`: the ``config`` of the image's config; its command
    gives way to `args`. `rootless_as`: uid and gid outside, of a plain user.

    Raises BadInput if there is no command.
    """
    command = [*args] or [*(settings.get("Entrypoint") or ()), *(settings.get("Cmd") or ())]
    if not command:
        raise BadInput("the image names no command: give one, after --")
    env = [*(settings.get("Env") or ())]
    if not any(entry.startswith("PATH=") for entry in env):
        env.append(_PATH)
    if has_terminal and not any(entry.startswith("TERM=") for entry in env):
        env.append("TERM=xterm")
    is_root = user.uid == 0
    held = {
        kind: list(_CAPABILITIES) for kind in ("bounding", "effective", "permitted")[: 3 if is_root else 1]
    }
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": has_terminal,
            "user": {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.groups)},
            "args": command,
            "env": env,
            "cwd": settings.get("WorkingDir") or "/",
            "capabilities": held,
            "noNewPrivileges": True,
        },
        "root": {"path": rootfs, "readonly": False},
        "hostname": hostname[:_HOSTNAME_MAX],
        "mounts": list(_mounts(is_rootless=rootless_as is not None)),
        "annotations": dict(settings.get("Labels") or {}),
        "linux": {
            **_separation(rootless_as),
            "maskedPaths": list(_MASKED),
            "readonlyPaths": list(_READ_ONLY),
        },
    }


def _separation(rootless_as: tuple[int, int] | None) -> dict[str, Any]:
    shared = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")]
    if rootless_as is None:
        return {
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "namespaces": [*shared, {"type": "network"}],
        }
    uid, gid = rootless_as
    return {
        "uidMappings": [{"containerID": 0, "hostID": uid, "size": 1}],
        "gidMappings": [{"containerID": 0, "hostID": gid, "size": 1}],
        "namespaces": [*shared, {"type": "user"}],
    }


def _mounts(*, is_rootless: bool) -> Iterator[dict[str, Any]]:
    def mount(where: str, type: str, source: str, *options: str) -> dict[str, Any]:
        return {"destination": where, "type": type, "source": source, "options": list(options)}

    safe = ("nosuid", "noexec", "nodev")
    tty = () if is_rootless else ("gid=5",)
    yield mount("/proc", "proc", "proc", *safe)
    yield mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k")
    pts = ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620")
    yield mount("/dev/pts", "devpts", "devpts", *pts, *tty)
    yield mount("/dev/shm", "tmpfs", "shm", *safe, "mode=1777", "size=65536k")
    yield mount("/dev/mqueue", "mqueue", "mqueue", *safe)
    if is_rootless:
        # sysfs belongs to the network namespace, which is the host's.
        yield mount("/sys", "none", "/sys", "rbind", *safe, "ro")
    else:
        yield mount("/sys", "sysfs", "sysfs", *safe, "ro")
        yield mount("/sys/fs/cgroup", "cgroup", "cgroup", *safe, "relatime", "ro")
