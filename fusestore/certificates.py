"""Certificates of registries, from the directories that podman and docker have them in. Blocking; reads.

containers-certs.d(5): a directory for each host, with its port where it has one. In it are ``*.crt``,
authorities that are believed there besides those of the system, and ``NAME.cert`` with ``NAME.key``, which
show the registry who asks. Of several directories for a host the first counts.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .errors import BadInput

__all__ = ["Certificates", "certificate_directories", "find_certificates"]


@dataclass(frozen=True, slots=True)
class Certificates:
    """Paths, by name."""

    authorities: tuple[str, ...]
    own: tuple[tuple[str, str], ...]
    """Certificates with their keys."""


def certificate_directories(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Where the directories of hosts are, in order."""
    home = os.path.join(environ.get("HOME", "/"), ".config/containers/certs.d")
    return (home, "/etc/containers/certs.d", "/etc/docker/certs.d")


def find_certificates(host: str, directories: Sequence[str]) -> Certificates | None:
    """`host`: with the port, as in a URL. Raises BadInput for a certificate without a key, or the reverse."""
    if not host.strip("."):
        return None
    for directory in directories:
        path = os.path.join(directory, host)
        try:
            names = sorted(os.listdir(path))
        except OSError:  # root's may be closed
            continue
        stems = {suffix: {name.removesuffix(suffix) for name in names if name.endswith(suffix)}
                 for suffix in (".crt", ".cert", ".key")}  # fmt: skip
        if lonely := stems[".cert"] ^ stems[".key"]:
            raise BadInput(f"{path} has only one of {min(lonely)}.cert and {min(lonely)}.key: add the other")
        return Certificates(
            tuple(f"{path}/{stem}.crt" for stem in sorted(stems[".crt"])),
            tuple((f"{path}/{stem}.cert", f"{path}/{stem}.key") for stem in sorted(stems[".cert"])),
        )
    return None
