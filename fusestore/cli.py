"""The command line. Blocking; alone in fusestore it parses arguments, and prints, by `terminal`.

Exit codes: 0 done; 1 the operation failed, or check found something; 2 the command line was wrong. An error
is one line on standard error, ``fusestore: …``, that says what to do. People get tables and, on a terminal,
progress bars; programs get JSON, whose keys only ever grow in number.

Modules that take long to load, as trio and pyfuse3 do, are imported where they are used.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from .errors import BadInput, FusestoreError, NotFound
from .layout import RunLayout
from .meter import prometheus
from .names import printable
from .options import (
    Places,
    cache_size_option,
    directory_of,
    json_option,
    place_options,
    registry_options,
    with_places,
)
from .store import Image, Store
from .terminal import (
    SHORT_ID,
    describe,
    fail,
    image_time,
    local_time,
    output_file,
    print_json,
    print_path,
    print_status,
    print_table,
    progress_bar,
    short_id,
    size_text,
)

if TYPE_CHECKING:
    from .registry import RegistryOptions

__all__ = ["main"]

_HELPER_OPTIONS = {
    "allow_other": False,
    "allow_dev": False,
    "allow_suid": False,
    "hydrate": False,
    "driver": True,
    "cache_size": True,
    "run_dir": True,
}
"""After mount(8)'s -o: whether there is a value."""
_ALWAYS_SO = frozenset(["", "rw", "suid", "nosuid", "dev", "nodev", "exec"])
"""What mount(8) adds: mounts are writable; nosuid and nodev unless `_HELPER_OPTIONS` say otherwise."""
_DAY_S = 24 * 60 * 60


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
        return fail(f"{error.format_message()} ({command} --help tells more)", code=2)
    except click.ClickException as error:
        return fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        return fail("interrupted", code=130)
    except BrokenPipeError:
        # Whoever reads has enough (`fusestore images | head -1`); nothing may be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (FusestoreError, OSError) as error:
        return fail(describe(error))
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


@click.group(
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 the operation failed or check found something, 2 wrong usage.",
)
@click.version_option(package_name="fusestore", message="%(prog)s %(version)s")
@place_options
def _commands() -> None:
    """Container storage as files: images are mounted from their layer blobs, never unpacked."""


def _command(function: Callable[..., Any]) -> click.Command:
    return _commands.command(function.__name__.strip("_"))(place_options(function))


@_command
@click.argument("source")
@click.option(
    "--name",
    "names",
    multiple=True,
    metavar="NAME",
    help="A name for it, instead of its own; repeatable.",
)
@cache_size_option
@with_places
def _import(places: Places, source: str, names: tuple[str, ...], cache_size: int | None) -> None:
    """Take an image into the store, and print its id.

    SOURCE is oci:DIR[:REF], oci-archive:FILE[:REF], docker-archive:FILE[:REF], or a plain path, which is told
    apart by its content. The first image of a store is also tagged "default". A store is made where there is
    none.
    """
    with _store_to_fill(places, cache_size) as store, progress_bar("import") as progress:
        image = store.import_image(source, names=names, progress=progress)
    click.echo(image.id)


@contextmanager
def _store_to_fill(places: Places, cache_size: int | None = None) -> Iterator[Store]:
    """Made where there is none, and not left where nothing comes into it."""
    with places.open(create=True, cache_size=cache_size) as store:
        try:
            yield store
        except BaseException:
            if store.is_new:
                store.remove_if_empty()
            raise


@_command
@click.argument("ref")
@click.option("--name", metavar="NAME", help="A name for it, instead of REF in full.")
@click.option("--platform", metavar="OS/ARCH[/VARIANT]", help="Instead of this machine's.")
@click.option("--lazy", "is_lazy", is_flag=True, help="Fetch layers in eStargz and zstd:chunked later.")
@registry_options
@with_places
def _pull(
    places: Places,
    ref: str,
    name: str | None,
    platform: str | None,
    is_lazy: bool,
    plain_http: bool,
    authfile: str | None,
) -> None:
    """Take an image of a registry into the store, and print its id.

    REF is [REGISTRY/]NAME[:TAG][@DIGEST]; busybox is docker.io/library/busybox:latest. A store is made where
    there is none. What the store has is not fetched; what breaks off, or is ended, goes on where it was.

    With --lazy the image can be used at once: of layers in eStargz and zstd:chunked only the table of
    contents is fetched now, and content when it is read, each chunk verified. A mount fetches the rest in the
    background, with the credentials that its own environment leads to; until then what is missing is EIO
    while the registry does not give it. Other layers are fetched now.
    """
    from .oci import parse_platform
    from .transfer import pull

    wanted = parse_platform(platform) if platform else None
    options = _options_of(plain_http, authfile)
    with _store_to_fill(places) as store, progress_bar("pull") as progress:
        image = pull(
            store, ref, name=name, platform=wanted, is_lazy=is_lazy, options=options, progress=progress
        )
    click.echo(image.id)


@_command
@click.argument("image")
@click.argument("ref")
@registry_options
@with_places
def _push(places: Places, image: str, ref: str, plain_http: bool, authfile: str | None) -> None:
    """Upload an image to a registry, and print the digest it has there.

    IMAGE is an image's name, its id or the first 12 digits of that. Its layers are sent as they are stored;
    those that the registry has are not.
    """
    from .transfer import push

    options = _options_of(plain_http, authfile)
    with places.open() as store, progress_bar("push") as progress:
        digest = push(store, image, ref, options=options, progress=progress)
    click.echo(digest)


def _options_of(plain_http: bool, authfile: str | None) -> "RegistryOptions":
    from .registry import usual_options

    return usual_options(os.environ, plain_http=plain_http, authfile=authfile)


@_command
@click.argument("mountpoint")
@click.option("--driver", type=click.Choice(["auto", "union", "erofs", "overlay"]), default="auto",
              show_default=True, help="How rootfs is served; auto takes the fastest that works.")  # fmt: skip
@click.option("--allow-other", is_flag=True, help="Let users other than you in.")
@click.option("--allow-dev", is_flag=True, help="Let device nodes of images and containers act (root).")
@click.option("--allow-suid", is_flag=True, help="Let their set-user-ID bits and capabilities act (root).")
@click.option("--hydrate", is_flag=True, help="In the background, hydrate the images of containers in use.")
@click.option("--foreground", is_flag=True, help="Stay until unmounted; log to standard error.")
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True,
              help="json: an object on each line.")  # fmt: skip
@cache_size_option
@with_places
def _mount(
    places: Places,
    mountpoint: str,
    driver: str,
    allow_other: bool,
    allow_dev: bool,
    allow_suid: bool,
    hydrate: bool,
    foreground: bool,
    log_format: str,
    cache_size: int | None,
) -> None:
    """Mount the store at a directory.

    Returns when the mount answers. Its log is the file mount-….log in the store's part of the run directory.
    """
    from . import daemon
    from .mountpoint import MountOptions, check_mountpoint, check_not_within

    mountpoint = directory_of("MOUNTPOINT", mountpoint)
    check_mountpoint(mountpoint, store=places.store, run_dir=places.run_dir)
    options = MountOptions(allow_other, allow_dev, allow_suid)
    daemon.check_permission(options)

    def serve(ready: Callable[[], None]) -> None:
        from . import mount

        with places.open(cache_size=cache_size) as store:
            log = None if foreground else RunLayout(store.run_path).mount_log(os.fsencode(mountpoint))
            check_not_within(store, mountpoint, places.run_dir)
            reopen_log = daemon.log_to(log, as_json=log_format == "json")
            mount.run(
                store,
                mountpoint,
                driver=driver,
                options=options,
                hydrates=hydrate,
                ready=ready,
                reopen_log=reopen_log,
            )

    if foreground:
        serve(lambda: None)
    else:
        daemon.detach(serve)


@_command
@click.argument("mountpoint")
@with_places
def _umount(places: Places, mountpoint: str) -> None:
    """Unmount, and wait until everything is on disk.

    The mount's process has gone then, too. Fails while something in MOUNTPOINT is in use.
    """
    from .mountpoint import unmount

    mountpoint = directory_of("MOUNTPOINT", mountpoint)
    with places.open() as store:
        unmount(store, mountpoint)


@_command
@click.argument("mountpoint")
@json_option
@click.option("--prometheus", "as_metrics", is_flag=True, help="Metrics for Prometheus instead of a table.")
@with_places
def _status(places: Places, mountpoint: str, as_json: bool, as_metrics: bool) -> None:
    """Show how a mount does: what it was asked, how fast it answered, what it holds.

    Times are bounds: so many of 100 answers took less.
    """
    if as_json and as_metrics:
        raise click.UsageError("--json and --prometheus exclude each other: give one")
    with places.open() as store:
        report = store.ask_mount(os.path.realpath(directory_of("MOUNTPOINT", mountpoint)))
    if as_json:
        print_json(report)
    elif as_metrics:
        click.echo(prometheus(report), nl=False)
    else:
        print_status(report)


@_command
@json_option
@with_places
def _images(places: Places, as_json: bool) -> None:
    """List the images."""
    with places.open() as store:
        found = [_image_record(store, image) for image in store.images()]
    if as_json:
        print_json(found)
        return
    print_table(
        ("ID", "NAMES", "CREATED", "LAYERS", "SIZE"),
        (
            (
                image["id"][:SHORT_ID],
                " ".join(image["names"]) or "-",
                image_time(image["created"]),
                str(len(image["layers"])),
                size_text(image["size"]),
            )
            for image in found
        ),
    )


@_command
@json_option
@with_places
def _containers(places: Places, as_json: bool) -> int:
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
                code = fail(str(error))
    if as_json:
        print_json(found)
        return code
    print_table(
        ("ID", "NAME", "IMAGE", "CREATED", "STATE"),
        (
            (
                short_id(container["id"]),
                container["name"] if container["name"] != container["id"] else "-",
                container["image-name"] or container["image-id"][:SHORT_ID] or "-",
                local_time(container["created-at"]),
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
@with_places
def _create(places: Places, image: str, id: str | None, name: str | None, label: str) -> None:
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
@with_places
def _rm(places: Places, ids: tuple[str, ...]) -> int:
    """Delete containers with everything in them.

    Takes ids and names. Goes on after an error, and fails in the end.
    """
    code = 0
    with places.open() as store:
        for ref in ids:
            try:
                store.delete_container(ref)
            except (FusestoreError, OSError) as error:
                code = fail(describe(error))
    return code


@_command
@click.argument("ref", metavar="ID|NAME|IMAGE")
@with_places
def _inspect(places: Places, ref: str) -> None:
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
    print_json(record)


@_command
@click.argument("ref", metavar="ID")
@with_places
def _start(places: Places, ref: str) -> None:
    """Pin a container, and print where its rootfs is.

    The store has to be mounted. Starting again changes nothing: one stop ends it.
    """
    with places.open() as store:
        rootfs = store.start_container(ref)
    print_path("", os.fsencode(rootfs))


@_command
@click.argument("ref", metavar="ID")
@with_places
def _stop(places: Places, ref: str) -> None:
    """Release what start pinned."""
    with places.open() as store:
        store.stop_container(ref)


@_command
@click.argument("ref", metavar="ID")
@json_option
@with_places
def _diff(places: Places, ref: str, as_json: bool) -> None:
    """List what a container changed in its image.

    A line each: A added, C changed, D deleted, and the path. Of what was deleted only the topmost is named.
    """
    from .changes import differences
    from .drivers import snapshot

    with places.open() as store, snapshot(store, store.container_id(ref)) as tree:
        found = [(kind.value, b"/" + path) for kind, path in differences(tree)]
    if as_json:
        print_json([{"kind": kind, "path": os.fsdecode(path)} for kind, path in found])
        return
    for kind, path in found:
        print_path(kind + " ", path)


@_command
@click.argument("ref", metavar="ID")
@click.option("-o", "--output", metavar="FILE", default="-", help="Instead of standard output.")
@with_places
def _export(places: Places, ref: str, output: str) -> None:
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
        output_file(output) as file,
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
@with_places
def _commit(
    places: Places,
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
    with places.open() as store, progress_bar("commit") as progress:
        image = commit(store, ref, name, options, progress)
    click.echo(image.id)


@_command
@click.argument("ref", metavar="ID")
@click.argument("new", required=False)
@with_places
def _clone(places: Places, ref: str, new: str | None) -> None:
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
@with_places
def _bundle(places: Places, ref: str, directory: str, args: tuple[str, ...], tty: bool) -> None:
    """Write DIR/config.json, with which runc and crun run a container.

    The store has to be mounted. Command, environment, user and directory are the image's; ARGS are another
    command. A plain user's command is root, in a user namespace in which only they are mapped.
    """
    from .bundle import write_bundle

    with places.open() as store:
        write_bundle(store, ref, directory_of("DIR", directory), list(args), has_terminal=tty)


def _source_date_epoch() -> int | None:
    """reproducible-builds.org/specs/source-date-epoch."""
    text = os.environ.get("SOURCE_DATE_EPOCH")
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,11}", text):
        raise BadInput(f"SOURCE_DATE_EPOCH is {text!r}: set it to seconds since 1970, or unset it")
    return int(text)


@_command
@click.option("--repair", "repairs", is_flag=True, help="Make again or set aside what is damaged.")
@with_places
def _check(places: Places, repairs: bool) -> int:
    """Verify every file of the store; change nothing, unless told to repair it.

    Prints one line for each finding, and fails if there is one. With --repair it first prints one line for
    each thing done: nothing is deleted, but moved to the directory quarantine of the store. The store must
    not be in use.
    """
    from .check import check
    from .repair import repair

    def say(line: object) -> None:
        click.echo(printable(str(line)))

    with places.open() as store, progress_bar("check") as progress:
        findings = repair(store, say, progress) if repairs else check(store, progress)
    for finding in findings:
        say(finding)
    return 1 if findings else 0


@_command
@click.argument("image")
@click.option("--undo", is_flag=True, help="Give the space back.")
@click.option("--dry-run", is_flag=True, help="Only say how much it is.")
@json_option
@with_places
def _hydrate(places: Places, image: str, undo: bool, dry_run: bool, as_json: bool) -> None:
    """Keep an image's layers uncompressed on disk, and print how many bytes that takes.

    Reading is faster then, and a container that --driver erofs mounts from then on needs the mount's process
    no more. Layers that are shared are kept once. With --undo they go; what is in use then goes when it is
    left.
    """
    from .hydration import dehydrate, hydrate, hydration

    with places.open() as store:
        found = store.image(image)
        before = after = hydration(store, found)
        if not dry_run:
            if undo:
                dehydrate(store, found)
            else:
                with progress_bar("hydrate") as progress:
                    hydrate(store, found, progress)
            after = hydration(store, found)
    size = before.size if undo else before.missing if dry_run else after.size - before.size
    if as_json:
        print_json({"id": found.id, "bytes": size, **asdict(after)})
    elif undo:
        click.echo(f"{size_text(size)} can be given back" if dry_run else f"{size_text(size)} given back")
    else:
        click.echo(f"{size_text(size)} more at most" if dry_run else f"{size_text(size)} more on disk")


@_command
@click.option("--dry-run", is_flag=True, help="Only say what would be given back.")
@click.option("--keep", type=click.IntRange(min=0), default=0, metavar="DAYS",
              help="Leave what came, and caches that were written, within so many days.")  # fmt: skip
@with_places
def _gc(places: Places, dry_run: bool, keep: int) -> None:
    """Give back what nobody needs, and print it.

    Images without a name that no container is of, what belongs to no image, what was deleted, downloads that
    were broken off, and, while nothing is mounted, what is kept decompressed. Containers are yours to delete:
    see rm.
    """
    from .reclaim import reclaim

    total = 0
    with places.open() as store:
        for item in reclaim(store, keep_s=keep * _DAY_S, is_dry=dry_run):
            click.echo(printable(f"{item.name}: {size_text(item.size)}, {item.why}"))
            total += item.size
    click.echo(f"{size_text(total)} can be given back" if dry_run else f"{size_text(total)} given back")


@_command
@json_option
@with_places
def _df(places: Places, as_json: bool) -> None:
    """Show what the store's space is used for, and what of it gc gives back."""
    from .reclaim import usage

    with places.open() as store:
        found = usage(store)
    if as_json:
        print_json([asdict(part) for part in found])
        return
    print_table(
        ("WHAT", "COUNT", "SIZE", "RECLAIMABLE"),
        ((part.what, str(part.count), size_text(part.size), size_text(part.reclaimable)) for part in found),
    )
