"""The background process of a mount: what it needs, how it leaves the terminal, its log. Blocking.

The starter returns when the mount answers, and has the one-line error where it never does: the two talk
through a pipe that the background process alone holds open, so its death is noticed too. Nothing may start
threads before `detach`: only the forking thread lives on in a child.
"""

import datetime
import json
import logging
import logging.handlers
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from io import TextIOWrapper
from typing import Any, NoReturn

from .errors import AccessDenied, FusestoreError, StoreUnusable
from .mountpoint import MountOptions
from .names import printable
from .terminal import describe

__all__ = ["check_permission", "detach", "log_to"]

_READY = b"ready"
_LOG_MAX = 4 << 20
"""Bytes of a log file, of which there are two."""
_FUSE_DEVICE = "/dev/fuse"
_FUSE_CONF = "/etc/fuse.conf"


def check_permission(options: MountOptions) -> None:
    """Raises AccessDenied, saying what root has to do, where this user may not mount with FUSE."""
    if not os.path.exists(_FUSE_DEVICE):
        raise StoreUnusable(f"{_FUSE_DEVICE} is missing: modprobe fuse, or give the container this device")
    if not os.access(_FUSE_DEVICE, os.R_OK | os.W_OK):
        raise AccessDenied(
            f"{_FUSE_DEVICE} is not open to you: as root, chmod 0666 {_FUSE_DEVICE} (elsewhere udev does)"
        )
    if os.geteuid() == 0:
        return
    if shutil.which("fusermount3") is None:
        raise StoreUnusable("fusermount3 is missing: apt-get install fuse3")
    if options.allow_dev or options.allow_suid:
        raise AccessDenied("--allow-dev and --allow-suid are for root's mounts")
    if options.allow_other and not _conf_allows_other():
        raise AccessDenied(
            f"--allow-other is root's to permit: put user_allow_other on a line of its own into {_FUSE_CONF}"
        )


def _conf_allows_other() -> bool:
    try:
        with open(_FUSE_CONF) as file:
            return any(line.strip() == "user_allow_other" for line in file)
    except OSError:
        return False


def detach(serve: Callable[[Callable[[], None]], None]) -> None:
    """Runs `serve(ready)` in a background process; returns when that has called `ready`.

    The process is in a session of its own, in ``/``, with /dev/null as its input; `serve` opens its log
    (`log_to`) before it calls `ready`. Raises FusestoreError with the error of `serve` where it ends before.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        _become_daemon(serve, write_end)
    os.close(write_end)
    os.waitpid(child, 0)
    with os.fdopen(read_end, "rb") as pipe:
        said = pipe.read()
    if said != _READY:
        raise FusestoreError(
            said.decode(errors="replace") or "the mount's process was killed before it answered"
        )


def _become_daemon(serve: Callable[[Callable[[], None]], None], pipe: int) -> NoReturn:
    """In the first child: the second fork, then all of the background process's life."""
    status = 1
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.chdir("/")
        with open(os.devnull) as null:
            os.dup2(null.fileno(), 0)
        answered = False

        def ready() -> None:
            nonlocal answered
            answered = True
            os.write(pipe, _READY)
            os.close(pipe)

        try:
            serve(ready)
            status = 0
        except BaseException as error:
            foreseen = isinstance(error, (FusestoreError, OSError))
            if answered:
                logging.getLogger("fusestore").critical(
                    "the mount ended: %s", describe(error), exc_info=not foreseen
                )
            else:
                os.write(pipe, _message(error, foreseen).encode(errors="surrogateescape"))
    finally:
        # Not sys.exit: what the starter registered to run at exit is the starter's.
        logging.shutdown()
        os._exit(status)


def _message(error: BaseException, foreseen: bool) -> str:
    if foreseen:
        return describe(error)
    traceback.print_exception(error)
    return f"the mount failed unforeseen: {error!r}"


def log_to(path: str | None, *, as_json: bool = False) -> Callable[[], None] | None:
    """Sends log records, standard output and error to the end of `path`; None: records to standard error.

    Returns what opens `path` anew, after it was moved away: for any thread. `as_json`: a record is an object
    on a line; what libraries print themselves stays as it is.
    """
    log = None if path is None else _Log(path, maxBytes=_LOG_MAX, backupCount=1)
    handler = log or logging.StreamHandler()
    handler.setFormatter(_JsonFormatter() if as_json else _LineFormatter())
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    return None if log is None else log.reopen


class _LineFormatter(logging.Formatter):
    """For people: a message may have a name in it that would act on a terminal, or look like another line."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        # Set in, as no entry is.
        return "\n".join(f"  {printable(line)}" for line in super().formatException(ei).split("\n"))


class _JsonFormatter(logging.Formatter):
    """ASCII: nothing in it can act on a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created).astimezone()
        said = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said)


class _Log(logging.handlers.RotatingFileHandler):
    """The log file, and the one before it, in `path`.1. Standard output and error go where the log goes."""

    def reopen(self) -> None:
        """Go on in the file of that name, made if need be; in the old one where that cannot be opened."""
        self.acquire()
        try:
            old, self.stream = self.stream, self._open()
            if old is not None:
                old.close()
        finally:
            self.release()

    def _open(self) -> TextIOWrapper:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(self.baseFilename, flags, 0o600)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        return open(fd, "a", encoding="utf-8", errors="backslashreplace")
