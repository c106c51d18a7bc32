"""The command line. Blocking; alone in fusestore it prints, parses arguments and reads the environment.

Exit codes: 0 done; 1 the operation failed, or check found something; 2 the command line was wrong. An error
is one line on standard error, ``fusestore: …``, that says what to do. People get tables and, on a terminal,
progress bars; programs get JSON, whose keys only ever grow in number. Text that came from outside is printed
through `printable`: a name may hold escape sequences and newlines.

trio, pyfuse3 and rich take longer to load than most commands to run: they are imported where they are used.
"""

import datetime
import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from . import daemon
from .errors import BadInput, FusestoreError, NotFound
from .layout import RunLayout, default_run_dir, default_store_dir
from .meter import prometheus
from .mountpoint import check_mountpoint, check_not_within, unmount
from .names import is_hex_id
from .store import Image, Store

if TYPE_CHECKING:
    from .transfer import RegistryOptions

__all__ = ["main", "printable"]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_HELPER_OPTIONS = {"allow_other": False, "driver": True, "cache_size": True, "run_dir": True}
"""After mount(8)'s -o: whether there is a value."""
_ALWAYS_SO = frozenset(["", "rw", "suid", "nosuid", "dev", "nodev", "exec"])
"""What mount(8) adds: mounts are writable, and nosuid and nodev whatever it says."""
_DAY_S = 24 * 60 * 60
_SHORT_ID = 12
"""Hex digits of an id in tables; commands take them as well as the whole."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line (default: the process's own); returns its exit code."""
    try:
        code = _commands.main(
            _as_a_helper(sys.argv[1:] if arguments is None else arguments),
            prog_name="fusestore",
            standalone_mode=False,
        )
        sys.stdout.flush()
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "fusestore"
        return _fail(f"{error.format_message()} ({command} --help tells more)", code=2)
    except click.ClickException as error:
        return _fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", code=130)
    except BrokenPipeError:
        # Whoever reads has enough (`fusestore images | head -1`); nothing may be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (FusestoreError, OSError) as error:
        return _fail(daemon.describe(error))
    return code if isinstance(code, int) else 0


def _as_a_helper(arguments: Sequence[str]) -> list[str]:
    """What mount(8) asks for, by mount.fuse3(8): STORE MOUNTPOINT -o OPTIONS. Else the same again."""
    if len(arguments) < 2 or not arguments[0].startswith("/"):
        return list(arguments)
    store, mountpoint, *rest = arguments
    words = ["mount", "--store", store]
    for option in "".join(rest[1:2] if rest[:1] == ["-o"] else rest).split(","):
        name, sign, value = option.partition("=")
        if name in _HELPER_OPTIONS and bool(sign) == _HELPER_OPTIONS[name]:
            words.append(f"--{name.replace('_', '-')}{sign}{value}")
        elif option not in _ALWAYS_SO:
            raise click.UsageError(f"-o {option} is not known: {', '.join(_HELPER_OPTIONS)} are")
    return [*words, "--", mountpoint]


def _fail(message: str, code: int = 1) -> int:
    print(f"fusestore: {printable(message)}", file=sys.stderr)
    return code


def printable(text: str) -> str:
    """`text` on one line, without what a terminal would obey: the unprintable is escaped as in Python."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )


@dataclass(slots=True)
class _Places:
    """What --store and --run-dir say; the last one on the command line counts."""

    store: str
    run_dir: str

    def open(self, *, create: bool = False, cache_size: int | None = None) -> Store:
        return Store.open(self.store, self.run_dir, create=create, cache_size=cache_size)


def _size_of(text: str) -> int:
    """A number of bytes, with an optional K, M, G or T (powers of 1024)."""
    match = re.fullmatch(r"([0-9]+)([KMGT]?)", text, re.IGNORECASE)
    if match is None:
        raise click.BadParameter(f"{text!r} is not a size: write bytes, or a number with K, M, G or T")
    return int(match[1]) * _UNITS[match[2].upper()]


def _directory(named_by: str, path: str) -> str:
    if not path:
        raise click.UsageError(f"{named_by} is empty: name a directory")
    return os.path.abspath(path)


def _place_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--store and --run-dir, which mean the same before and after the name of a command."""

    def keep(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
        # Absolute at once: the process of a mount leaves this directory.
        if ctx.obj is None:
            env, uid = os.environ, os.geteuid()
            ctx.obj = _Places(
                _directory("FUSESTORE_STORE", env.get("FUSESTORE_STORE", default_store_dir(env, uid))),
                _directory("FUSESTORE_RUN_DIR", env.get("FUSESTORE_RUN_DIR", default_run_dir(env, uid))),
            )
        if value is not None:
            setattr(ctx.obj, str(param.name), _directory(param.opts[0], value))

    run_dir = click.option(
        "--run-dir", metavar="DIR", expose_value=False, is_eager=True, callback=keep,
        help="What need not outlive a reboot.  [env: FUSESTORE_RUN_DIR]",
    )  # fmt: skip
    store = click.option(
        "--store", metavar="DIR", expose_value=False, is_eager=True, callback=keep,
        help="The store's directory.  [env: FUSESTORE_STORE]",
    )  # fmt: skip
    return store(run_dir(command))


_places = click.make_pass_decorator(_Places)
_cache_size = click.option(
    "--cache-size", type=_size_of, metavar="SIZE",
    help="Bound of what is kept decompressed, with K, M, G or T.  [default: suits the disk]",
)  # fmt: skip
_json = click.option("--json", "as_json", is_flag=True, help="JSON for programs instead of a table.")


@click.group(
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 the operation failed or check found something, 2 wrong usage.",
)
@click.version_option(package_name="fusestore", message="%(prog)s %(version)s")
@_place_options
def _commands() -> None:
    """Container storage as files: images are mounted from their layer blobs, never unpacked."""


def _command(function: Callable[..., Any]) -> click.Command:
    return _commands.command(function.__name__.strip("_"))(_place_options(function))


@_command
@click.argument("source")
@click.option(
    "--name",
    "names",
    multiple=True,
    metavar="NAME",
    help="A name for it, instead of its own; repeatable.",
)
@_cache_size
@_places
def _import(places: _Places, source: str, names: tuple[str, ...], cache_size: int | None) -> None:
    """Take an image into the store, and print its id.

    SOURCE is oci:DIR[:REF], oci-archive:FILE[:REF], docker-archive:FILE[:REF], or a plain path, which is told
    apart by its content. The first image of a store is also tagged "default". A store is made where there is
    none.
    """
    with _store_to_fill(places, cache_size) as store, _progress("import") as progress:
        image = store.import_image(source, names=names, progress=progress)
    click.echo(image.id)


@contextmanager
def _store_to_fill(places: _Places, cache_size: int | None = None) -> Iterator[Store]:
    """Made where there is none, and not left where nothing comes into it."""
    with places.open(create=True, cache_size=cache_size) as store:
        try:
            yield store
        except BaseException:
            if store.is_new:
                store.remove_if_empty()
            raise


def _registry_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--plain-http and --authfile."""
    plain_http = click.option("--plain-http", is_flag=True, help="Talk to the registry without TLS.")
    authfile = click.option(
        "--authfile", metavar="FILE",
        help="Credentials, as podman login and docker login write them.  [env: REGISTRY_AUTH_FILE; default: "
        "what those use]",
    )  # fmt: skip
    return plain_http(authfile(command))


@_command
@click.argument("ref")
@click.option("--name", metavar="NAME", help="A name for it, instead of REF in full.")
@click.option("--platform", metavar="OS/ARCH[/VARIANT]", help="Instead of this machine's.")
@_registry_options
@_places
def _pull(
    places: _Places, ref: str, name: str | None, platform: str | None, plain_http: bool, authfile: str | None
) -> None:
    """Take an image of a registry into the store, and print its id.

    REF is [REGISTRY/]NAME[:TAG][@DIGEST]; busybox is docker.io/library/busybox:latest. A store is made where
    there is none. What the store has is not fetched; downloads that break off go on where they were.
    """
    from .oci import parse_platform
    from .transfer import pull

    wanted = parse_platform(platform) if platform else None
    options = _options_of(plain_http, authfile)
    with _store_to_fill(places) as store, _progress("pull") as progress:
        image = pull(store, ref, name=name, platform=wanted, options=options, progress=progress)
    click.echo(image.id)


@_command
@click.argument("image")
@click.argument("ref")
@_registry_options
@_places
def _push(places: _Places, image: str, ref: str, plain_http: bool, authfile: str | None) -> None:
    """Upload an image to a registry, and print the digest it has there.

    IMAGE is an image's name, its id or the first 12 digits of that. Its layers are sent as they are stored;
    those that the registry has are not.
    """
    from .transfer import push

    options = _options_of(plain_http, authfile)
    with places.open() as store, _progress("push") as progress:
        digest = push(store, image, ref, options=options, progress=progress)
    click.echo(digest)


def _options_of(plain_http: bool, authfile: str | None) -> "RegistryOptions":
    from urllib.request import getproxies_environment

    from .credentials import auth_files, find_credentials
    from .transfer import RegistryOptions

    files = auth_files(os.environ, authfile)
    return RegistryOptions(
        lambda reference: find_credentials(reference, files), plain_http, proxies=getproxies_environment()
    )


@_command
@click.argument("mountpoint")
@click.option("--driver", type=click.Choice(["auto", "union", "erofs"]), default="auto", show_default=True,
              help="How rootfs is served; auto takes the fastest that works.")  # fmt: skip
@click.option("--allow-other", is_flag=True, help="Let users other than you in.")
@click.option("--foreground", is_flag=True, help="Stay until unmounted; log to standard error.")
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True,
              help="json: an object on each line.")  # fmt: skip
@_cache_size
@_places
def _mount(
    places: _Places,
    mountpoint: str,
    driver: str,
    allow_other: bool,
    foreground: bool,
    log_format: str,
    cache_size: int | None,
) -> None:
    """Mount the store at a directory.

    Returns when the mount answers. Its log is the file mount-….log in the store's part of the run directory.
    """
    mountpoint = _directory("MOUNTPOINT", mountpoint)
    check_mountpoint(mountpoint, store=places.store, run_dir=places.run_dir)
    daemon.check_permission(allow_other=allow_other)

    def serve(ready: Callable[[], None]) -> None:
        from . import mount

        with places.open(cache_size=cache_size) as store:
            log = None if foreground else RunLayout(store.run_path).mount_log(os.fsencode(mountpoint))
            check_not_within(store, mountpoint, places.run_dir)
            reopen_log = daemon.log_to(log, as_json=log_format == "json")
            mount.run(
                store, mountpoint, driver=driver, allow_other=allow_other, ready=ready, reopen_log=reopen_log
            )

    if foreground:
        serve(lambda: None)
    else:
        daemon.detach(serve)


@_command
@click.argument("mountpoint")
@_places
def _umount(places: _Places, mountpoint: str) -> None:
    """Unmount, and wait until everything is on disk.

    The mount's process has gone then, too. Fails while something in MOUNTPOINT is in use.
    """
    mountpoint = _directory("MOUNTPOINT", mountpoint)
    with places.open() as store:
        unmount(store, mountpoint)


@_command
@click.argument("mountpoint")
@_json
@click.option("--prometheus", "as_metrics", is_flag=True, help="Metrics for Prometheus instead of a table.")
@_places
def _status(places: _Places, mountpoint: str, as_json: bool, as_metrics: bool) -> None:
    """Show how a mount does: what it was asked, how fast it answered, what it holds.

    Times are bounds: so many of 100 answers took less.
    """
    if as_json and as_metrics:
        raise click.UsageError("--json and --prometheus exclude each other: give one")
    with places.open() as store:
        report = store.ask_mount(os.path.realpath(_directory("MOUNTPOINT", mountpoint)))
    if as_json:
        _print_json(report)
    elif as_metrics:
        click.echo(prometheus(report), nl=False)
    else:
        _print_status(report)


def _print_status(report: dict[str, Any]) -> None:
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
        ("memory", f"{_size(memory['resident-bytes'])}, of which {_size(memory['anonymous-bytes'])} its own"),
        ("descriptors", f"{report['descriptors']['open']} of {report['descriptors']['max']}"),
        (
            "decompressed",
            f"{_size(spans['bytes'])} of {_size(spans['bytes-max'])}, "
            + (f"{spans['hits'] / reads:.1%} of {reads} reads hit" if reads else "not read yet"),
        ),
        ("errors", ", ".join(f"{count} {name}" for name, count in report["errors"].items()) or "none"),
    ):
        click.echo(f"{what + ':':14}{printable(value)}")
    _print_table(
        ("REQUEST", "COUNT", "PER SECOND", "50 %", "90 %", "99 %"),
        (
            (
                kind,
                str(row["count"]),
                f"{row['per-second']:.1f}",
                *(_duration(row[f"p{part}-ns"]) for part in (50, 90, 99)),
            )
            for kind, row in report["requests"].items()
        ),
    )


def _duration(nanoseconds: int) -> str:
    for unit, length in (("s", 10**9), ("ms", 10**6), ("µs", 10**3)):
        if nanoseconds >= length:
            return f"{nanoseconds / length:.3g} {unit}"
    return f"{nanoseconds} ns"


@_command
@_json
@_places
def _images(places: _Places, as_json: bool) -> None:
    """List the images."""
    with places.open() as store:
        found = [_image_record(store, image) for image in store.images()]
    if as_json:
        _print_json(found)
        return
    _print_table(
        ("ID", "NAMES", "CREATED", "LAYERS", "SIZE"),
        (
            (
                image["id"][:_SHORT_ID],
                " ".join(image["names"]) or "-",
                _image_time(image["created"]),
                str(len(image["layers"])),
                _size(image["size"]),
            )
            for image in found
        ),
    )


@_command
@_json
@_places
def _containers(places: _Places, as_json: bool) -> int:
    """List the containers.

    Those that cannot be read are left out, with an error each, and fail the command.
    """
    found, code = [], 0
    with places.open() as store:
        for container_id in sorted(store.container_ids()):
            try:
                found.append(store.get_container_metadata(container_id))
            except NotFound:
                # Deleted since it was listed.
                continue
            except FusestoreError as error:
                code = _fail(str(error))
    if as_json:
        _print_json(found)
        return code
    _print_table(
        ("ID", "NAME", "IMAGE", "CREATED", "STATE"),
        (
            (
                _short(container["id"]),
                container["name"] if container["name"] != container["id"] else "-",
                container["image-name"] or container["image-id"][:_SHORT_ID] or "-",
                _time(container["created-at"]),
                "started" if container["mounted"] else "stopped",
            )
            for container in found
        ),
    )
    return code


def _image_record(store: Store, image: Image) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(store.image_metadata(image))
    return record


@_command
@click.argument("image")
@click.argument("id", required=False)
@click.option("--name", metavar="NAME", help="A name beside the id.")
@click.option("--label", metavar="MOUNTLABEL", default="", help="SELinux label of what carries none.")
@_places
def _create(places: _Places, image: str, id: str | None, name: str | None, label: str) -> None:
    """Make a container, and print its id.

    IMAGE is an image's name, its id or the first 12 digits of that. ID is made up where it is not given.
    """
    with places.open() as store:
        image_id = store.image(image).id
        image_name = image if store.image_names().get(image) == image_id else None
        made = store.create_container(
            image_name=image_name, image_id=image_id, container_name=name, container_id=id, mount_label=label
        )
    click.echo(made.id)


@_command
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@_places
def _rm(places: _Places, ids: tuple[str, ...]) -> int:
    """Delete containers with everything in them.

    Takes ids and names. Goes on after an error, and fails in the end.
    """
    code = 0
    with places.open() as store:
        for ref in ids:
            try:
                store.delete_container(ref)
            except (FusestoreError, OSError) as error:
                code = _fail(daemon.describe(error))
    return code


@_command
@click.argument("ref", metavar="ID|NAME|IMAGE")
@_places
def _inspect(places: _Places, ref: str) -> None:
    """Print the metadata of a container or an image.

    JSON, as in the metadata.json of the mounted tree. A container comes before an image of that name.
    """
    with places.open() as store:
        try:
            record = store.get_container_metadata(ref)
        except (NotFound, BadInput):
            try:
                record = _image_record(store, store.image(ref))
            except (NotFound, BadInput):
                raise NotFound(
                    f"there is no container and no image {ref!r}: fusestore containers and images list them"
                ) from None
    _print_json(record)


@_command
@click.argument("ref", metavar="ID")
@_places
def _start(places: _Places, ref: str) -> None:
    """Pin a container, and print where its rootfs is.

    The store has to be mounted. Starting again changes nothing: one stop ends it.
    """
    with places.open() as store:
        rootfs = store.start_container(ref)
    click.echo(os.fspath(rootfs))


@_command
@click.argument("ref", metavar="ID")
@_places
def _stop(places: _Places, ref: str) -> None:
    """Release what start pinned."""
    with places.open() as store:
        store.stop_container(ref)


@_command
@click.argument("ref", metavar="ID")
@_json
@_places
def _diff(places: _Places, ref: str, as_json: bool) -> None:
    """List what a container changed in its image.

    A line each: A added, C changed, D deleted, and the path. Of what was deleted only the topmost is named.
    """
    from .changes import differences
    from .drivers import snapshot

    with places.open() as store, snapshot(store, store.container_id(ref)) as tree:
        found = [(kind.value, b"/" + path) for kind, path in differences(tree)]
    if as_json:
        _print_json([{"kind": kind, "path": os.fsdecode(path)} for kind, path in found])
        return
    for kind, path in found:
        _print_path(kind + " ", path)


@_command
@click.argument("ref", metavar="ID")
@click.option("-o", "--output", metavar="FILE", default="-", help="Instead of standard output.")
@_places
def _export(places: _Places, ref: str, output: str) -> None:
    """Write a container's whole rootfs as a tar.

    Whoever unpacks it (tar -x, podman import) has the tree as it is shown, without sockets.
    """
    from .drivers import snapshot
    from .export import export_tree

    if output == "-" and sys.stdout.isatty():
        raise click.UsageError("a tar does not go to a terminal: redirect it, or name a file with -o")
    with (
        places.open() as store,
        snapshot(store, store.container_id(ref)) as tree,
        _output(output) as file,
    ):
        export_tree(tree, file.write)


@_command
@click.argument("ref", metavar="ID")
@click.argument("name")
@click.option("-m", "--message", default="", metavar="TEXT", help="Comment in the image's history.")
@click.option("-a", "--author", default="", metavar="TEXT", help="Who made the image.")
@click.option("-c", "--change", "changes", multiple=True, metavar="INSTRUCTION",
              help="A Dockerfile's CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, ONBUILD, STOPSIGNAL, USER, VOLUME or "
              "WORKDIR, to be applied to the config; repeatable.")  # fmt: skip
@click.option("--compression", type=click.Choice(["gzip", "zstd", "none"]), default="gzip", show_default=True,
              help="Of the new layer.")  # fmt: skip
@_places
def _commit(
    places: _Places,
    ref: str,
    name: str,
    message: str,
    author: str,
    changes: tuple[str, ...],
    compression: str,
) -> None:
    """Make an image of a container, and print its id.

    It has the layers of the container's image and, on them, what the container changed. NAME moves to it if
    another image has it. With SOURCE_DATE_EPOCH set the same changes give the same image.
    """
    from .commit import CommitOptions, commit

    epoch_s = _source_date_epoch()
    options = CommitOptions(message, author, changes, compression, epoch_s)
    with places.open() as store, _progress("commit") as progress:
        image = commit(store, ref, name, options, progress)
    click.echo(image.id)


@_command
@click.argument("ref", metavar="ID")
@click.argument("new", required=False)
@_places
def _clone(places: _Places, ref: str, new: str | None) -> None:
    """Make another container with what is in this one, and print its id.

    It has the same image, changes, label and keys of yours; it is stopped, and its workdir is empty. Blocks
    are shared where the file system can. NEW, its id, is made up where it is not given.
    """
    from .clone import clone

    with places.open() as store:
        made = clone(store, ref, new)
    click.echo(made.id)


@_command
@click.argument("ref", metavar="ID")
@click.argument("directory", metavar="DIR")
@click.argument("args", nargs=-1, metavar="[-- ARGS...]")
@click.option("-t", "--tty", is_flag=True, help="Give the command a terminal.")
@_places
def _bundle(places: _Places, ref: str, directory: str, args: tuple[str, ...], tty: bool) -> None:
    """Write DIR/config.json, with which runc and crun run a container.

    The store has to be mounted. Command, environment, user and directory are the image's; ARGS are another
    command. A plain user's command is root, in a user namespace in which only they are mapped.
    """
    from .bundle import write_bundle

    with places.open() as store:
        write_bundle(store, ref, _directory("DIR", directory), list(args), has_terminal=tty)


def _source_date_epoch() -> int | None:
    """reproducible-builds.org/specs/source-date-epoch."""
    text = os.environ.get("SOURCE_DATE_EPOCH")
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,11}", text):
        raise BadInput(f"SOURCE_DATE_EPOCH is {text!r}: set it to seconds since 1970, or unset it")
    return int(text)


@contextmanager
def _output(path: str) -> Iterator[BinaryIO]:
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


@_command
@click.option("--repair", "repairs", is_flag=True, help="Make again or set aside what is damaged.")
@_places
def _check(places: _Places, repairs: bool) -> int:
    """Verify every file of the store; change nothing, unless told to repair it.

    Prints one line for each finding, and fails if there is one. With --repair it first prints one line for
    each thing done: nothing is deleted, but moved to the directory quarantine of the store. The store must
    not be in use.
    """
    from .check import check
    from .repair import repair

    def say(line: object) -> None:
        click.echo(printable(str(line)))

    with places.open() as store, _progress("check") as progress:
        findings = repair(store, say, progress) if repairs else check(store, progress)
    for finding in findings:
        say(finding)
    return 1 if findings else 0


@_command
@click.option("--dry-run", is_flag=True, help="Only say what would be given back.")
@click.option("--keep", type=click.IntRange(min=0), default=0, metavar="DAYS",
              help="Leave images that came, and caches that were written, within so many days.")  # fmt: skip
@_places
def _gc(places: _Places, dry_run: bool, keep: int) -> None:
    """Give back what nobody needs, and print it.

    Images without a name that no container is of, what belongs to no image, what was deleted, and, while
    nothing is mounted, what is kept decompressed. Containers are yours to delete: see rm.
    """
    from .reclaim import reclaim

    total = 0
    with places.open() as store:
        for item in reclaim(store, keep_s=keep * _DAY_S, is_dry=dry_run):
            click.echo(f"{item.name}: {_size(item.size)}, {item.why}")
            total += item.size
    click.echo(f"{_size(total)} can be given back" if dry_run else f"{_size(total)} given back")


@_command
@_json
@_places
def _df(places: _Places, as_json: bool) -> None:
    """Show what the store's space is used for, and what of it gc gives back."""
    from .reclaim import usage

    with places.open() as store:
        found = usage(store)
    if as_json:
        _print_json([asdict(part) for part in found])
        return
    _print_table(
        ("WHAT", "COUNT", "SIZE", "RECLAIMABLE"),
        ((part.what, str(part.count), _size(part.size), _size(part.reclaimable)) for part in found),
    )


def _print_json(value: object) -> None:
    # Pure ASCII: nothing in it can act on a terminal, and file names that are not UTF-8 stay printable.
    click.echo(json.dumps(value, indent=2))


def _print_path(prefix: str, path: bytes) -> None:
    """A path as it is, for programs; on a terminal what would act on it is escaped."""
    if sys.stdout.isatty():
        click.echo(prefix + printable(os.fsdecode(path)))
    else:
        sys.stdout.buffer.write(prefix.encode() + path + b"\n")


def _print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
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


def _short(made_up_id: str) -> str:
    return made_up_id[:_SHORT_ID] if is_hex_id(made_up_id) else made_up_id


def _image_time(text: str) -> str:
    """RFC 3339, which an image may break."""
    try:
        return _time(datetime.datetime.fromisoformat(text).timestamp())
    except (ValueError, OverflowError):
        return text or "-"


def _time(seconds: float) -> str:
    """Local time."""
    try:
        return datetime.datetime.fromtimestamp(seconds).isoformat(" ", "seconds")
    except (ValueError, OverflowError, OSError):
        # Beyond the years that a calendar has: nobody wrote that through fusestore.
        return str(seconds)


def _size(count: int) -> str:
    from rich.filesize import decimal

    return decimal(count)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
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
