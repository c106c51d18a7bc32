"""The options that commands share. Blocking: reads the environment."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from .layout import default_run_dir, default_store_dir
from .store import Store

__all__ = [
    "Places",
    "cache_size_option",
    "directory_of",
    "json_option",
    "place_options",
    "registry_options",
    "size_of",
    "with_places",
]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(slots=True)
class Places:
    """What --store and --run-dir say; the last one on the command line counts."""

    store: str
    run_dir: str

    def open(self, *, create: bool = False, cache_size: int | None = None) -> Store:
        return Store.open(self.store, self.run_dir, create=create, cache_size=cache_size)


def size_of(text: str) -> int:
    """A number of bytes, with an optional K, M, G or T (powers of 1024)."""
    match = re.fullmatch(r"([0-9]+)([KMGT]?)", text, re.IGNORECASE)
    if match is None:
        raise click.BadParameter(f"{text!r} is not a size: write bytes, or a number with K, M, G or T")
    return int(match[1]) * _UNITS[match[2].upper()]


def directory_of(named_by: str, path: str) -> str:
    if not path:
        raise click.UsageError(f"{named_by} is empty: name a directory")
    return os.path.abspath(path)


def place_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--store and --run-dir, which mean the same before and after the name of a command."""

    def keep(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
        # Absolute at once: the process of a mount leaves this directory.
        if ctx.obj is None:
            env, uid = os.environ, os.geteuid()
            ctx.obj = Places(
                directory_of("FUSESTORE_STORE", env.get("FUSESTORE_STORE", default_store_dir(env, uid))),
                directory_of("FUSESTORE_RUN_DIR", default_run_dir(env, uid)),
            )
        if value is not None:
            setattr(ctx.obj, str(param.name), directory_of(param.opts[0], value))

    run_dir = click.option(
        "--run-dir", metavar="DIR", expose_value=False, is_eager=True, callback=keep,
        help="What need not outlive a reboot.  [env: FUSESTORE_RUN_DIR]",
    )  # fmt: skip
    store = click.option(
        "--store", metavar="DIR", expose_value=False, is_eager=True, callback=keep,
        help="The store's directory.  [env: FUSESTORE_STORE]",
    )  # fmt: skip
    return store(run_dir(command))


with_places = click.make_pass_decorator(Places)
cache_size_option = click.option(
    "--cache-size", type=size_of, metavar="SIZE",
    help="Bound of what is kept decompressed, with K, M, G or T.  [default: suits the disk]",
)  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="JSON for programs instead of a table.")


def registry_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--plain-http and --authfile."""
    plain_http = click.option("--plain-http", is_flag=True, help="Talk to the registry without TLS.")
    authfile = click.option(
        "--authfile", metavar="FILE",
        help="Credentials, as podman login and docker login write them.  [env: REGISTRY_AUTH_FILE; default: "
        "what those use]",
    )  # fmt: skip
    return plain_http(authfile(command))
