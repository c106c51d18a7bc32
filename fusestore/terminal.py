"""What people and programs are shown: lines, tables, JSON, progress. Blocking.

Text that came from outside is printed through `printable`: a name may hold escape sequences and newlines.
Tables are for people, and a line a row off a terminal; JSON is for programs. rich takes longer to load than
most commands to run: it is imported where it is used.
"""

import datetime
import errno
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

import click

from .errors import BadInput
from .names import is_hex_id, printable

__all__ = [
    "SHORT_ID",
    "describe",
    "duration_text",
    "fail",
    "image_time",
    "local_time",
    "output_file",
    "print_json",
    "print_path",
    "print_status",
    "print_table",
    "progress_bar",
    "short_id",
    "size_text",
]

SHORT_ID = 12
"""Hex digits of an id in tables; commands take them as well as the whole."""


def describe(error: BaseException) -> str:
    """One line for a person: what went wrong, where, what to do. For foreseen errors and OSErrors."""
    if isinstance(error, OSError) and error.strerror:
        advice = _ADVICE.get(error.errno or 0)
        parts = [os.fsdecode(error.filename)] if error.filename else []
        return ": ".join([*parts, error.strerror, *([advice] if advice else [])])
    return str(error)


_ADVICE = {
    errno.ENOSPC: "make room there, or name other directories with --store and --run-dir",
    errno.EDQUOT: "make room there, or name other directories with --store and --run-dir",
    errno.EROFS: "mount it writable, or name other directories with --store and --run-dir",
    errno.EIO: "the disk may be failing: look into dmesg",
    errno.EMFILE: "raise the limit with ulimit -n",
    errno.ENFILE: "close files of other programs, or raise fs.file-max with sysctl",
}


def fail(message: str, code: int = 1) -> int:
    print(f"fusestore: {printable(message)}", file=sys.stderr)
    return code


def print_json(value: object) -> None:
    # Pure ASCII: nothing in it can act on a terminal, and file names that are not UTF-8 stay printable.
    click.echo(json.dumps(value, indent=2))


def print_path(prefix: str, path: bytes) -> None:
    """A path as it is, for programs; on a terminal what would act on it is escaped."""
    if sys.stdout.isatty():
        click.echo(prefix + printable(os.fsdecode(path)))
    else:
        sys.stdout.buffer.write(prefix.encode() + path + b"\n")


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    on_terminal = sys.stdout.isatty()
    # Off a terminal a row is a line, whatever its length.
    console = Console(width=None if on_terminal else 1 << 16, highlight=False)
    table = Table(box=SIMPLE_HEAD if on_terminal else None, pad_edge=False)
    for title in header:
        table.add_column(title, no_wrap=not on_terminal, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)


def print_status(report: dict[str, Any]) -> None:
    """What `Store.ask_mount` answers, for people."""
    containers, spans, memory = report["containers"], report["spans"], report["memory"]
    reads = spans["hits"] + spans["misses"]
    for what, value in (
        ("mount point", report["mountpoint"]),
        ("store", report["store"]),
        ("driver", report["driver"]),
        ("process", str(report["pid"])),
        ("up", str(datetime.timedelta(seconds=int(report["uptime-s"])))),
        ("containers", f"{containers['entered']} entered, {containers['in-use']} in use"),
        ("known", f"{report['inodes']} inodes, {report['handles']} open handles"),
        ("waiting", f"{report['waiting']} requests, {report['longest-waiting-s']:.1f} s at most"),
        (
            "memory",
            f"{size_text(memory['resident-bytes'])}, {size_text(memory['anonymous-bytes'])} of them its own",
        ),
        ("descriptors", f"{report['descriptors']['open']} of {report['descriptors']['max']}"),
        (
            "decompressed",
            f"{size_text(spans['bytes'])} of {size_text(spans['bytes-max'])}, "
            + (f"{spans['hits'] / reads:.1%} of {reads} reads hit" if reads else "not read yet"),
        ),
        ("errors", ", ".join(f"{count} {name}" for name, count in report["errors"].items()) or "none"),
    ):
        click.echo(f"{what + ':':14}{printable(value)}")
    print_table(
        ("REQUEST", "COUNT", "PER SECOND", "50 %", "90 %", "99 %"),
        (
            (
                kind,
                str(row["count"]),
                f"{row['per-second']:.1f}",
                *(duration_text(row[f"p{part}-ns"]) for part in (50, 90, 99)),
            )
            for kind, row in report["requests"].items()
        ),
    )


def short_id(made_up_id: str) -> str:
    return made_up_id[:SHORT_ID] if is_hex_id(made_up_id) else made_up_id


def image_time(text: str) -> str:
    """RFC 3339, which an image may break."""
    try:
        return local_time(datetime.datetime.fromisoformat(text).timestamp())
    except (ValueError, OverflowError):
        return text or "-"


def local_time(seconds: float) -> str:
    """Local time."""
    try:
        return datetime.datetime.fromtimestamp(seconds).isoformat(" ", "seconds")
    except (ValueError, OverflowError, OSError):
        # Beyond the years that a calendar has: nobody wrote that through fusestore.
        return str(seconds)


def size_text(count: int) -> str:
    from rich.filesize import decimal

    return decimal(count)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar with rate and time left on a terminal; elsewhere None: nothing is printed."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def duration_text(nanoseconds: int) -> str:
    for unit, length in (("s", 10**9), ("ms", 10**6), ("µs", 10**3)):
        if nanoseconds >= length:
            return f"{nanoseconds / length:.3g} {unit}"
    return f"{nanoseconds} ns"


@contextmanager
def output_file(path: str) -> Iterator[BinaryIO]:
    """Standard output for "-", else a file that is there only when it is whole.

    What is no regular file, a device or a FIFO, is written to as it is.
    """
    if path == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    real = os.path.realpath(path)
    if os.path.lexists(real) and not os.path.isfile(real):
        with open(real, "wb") as file:
            yield file
        return
    directory, name = os.path.split(real)
    if not name or not os.path.isdir(directory):
        raise BadInput(f"{path!r} cannot be written: name a file in a directory that exists")
    partial = os.path.join(directory, f".{name[:100]}.{secrets.token_hex(8)}")
    try:
        with open(partial, "xb") as file:
            yield file
        os.rename(partial, real)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(partial)
        raise
