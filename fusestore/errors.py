"""The exceptions of fusestore, and the errno each becomes. Pure.

::

    FusestoreError                    EIO
    ├── BadInput                      EINVAL        a value from outside is wrong; the message says what to do
    │   ├── BadName                   EINVAL        an id, image name or file name that cannot be one
    │   ├── BadDocument               EINVAL        what was written is no metadata document
    │   ├── BadSource                 EINVAL        what import was given is no image
    │   ├── LayerRefused              EINVAL        a layer's bytes break a rule or a limit
    │   └── NoToc                     EINVAL        a layer cannot be read in parts: it has to be downloaded
    ├── NotFound                      ENOENT        no such name in the tree or the store
    ├── Exists                        EEXIST
    ├── Busy                          EBUSY         in use: pinned, open, entered, or used by a container
    │   ├── Locked                    EBUSY         another process changes it now: soon it is free or gone
    │   └── Running                   ETXTBSY       a program that runs cannot be emptied
    ├── NotPermitted                  EPERM         never allowed here, whoever asks
    ├── AccessDenied                  EACCES
    ├── ReadOnly                      EROFS
    ├── NotADirectory                 ENOTDIR
    ├── IsADirectory                  EISDIR
    ├── NotEmpty                      ENOTEMPTY
    ├── NameTooLong                   ENAMETOOLONG
    ├── NoAttribute                   ENODATA
    ├── NotSupported                  EOPNOTSUPP
    ├── CrossDevice                   EXDEV
    ├── FileTooLarge                  EFBIG
    ├── NoSpace                       ENOSPC
    ├── QuotaExceeded                 EDQUOT        what a container may take on disk is taken
    ├── Stale                         ESTALE        the object behind an inode is gone from the store
    ├── RegistryFailed                EREMOTEIO     a registry does not answer, or not as one
    ├── WrongDigest                   EIO           what is written as a blob is not what its name says
    └── StoreError                    EIO           the store itself is missing something or is damaged
        ├── StoreDamaged              EIO           names the file and the remedy
        ├── NotFetched                EIO           still in a registry, which does not give it now
        └── StoreUnusable             EIO           no store there, or one of another version

An OSError raised by a system call on a container's own files keeps its errno (ENOSPC, EDQUOT, EROFS). One on
a file of the store is StoreDamaged only where it proves damage (durable.is_damage): importing again is no
remedy for too many open files, a missing permission or a failing disk.
What is missing for the user is NotFound; what is missing in the store is StoreDamaged: never the same error.
`errno_of` is the one place that maps an exception to an errno.
"""

import errno
from typing import ClassVar

__all__ = [
    "AccessDenied",
    "BadDocument",
    "BadInput",
    "BadName",
    "BadSource",
    "Busy",
    "CrossDevice",
    "Exists",
    "FileTooLarge",
    "FusestoreError",
    "IsADirectory",
    "LayerRefused",
    "Locked",
    "NameTooLong",
    "NoAttribute",
    "NoSpace",
    "NoToc",
    "NotADirectory",
    "NotEmpty",
    "NotFetched",
    "NotFound",
    "NotPermitted",
    "NotSupported",
    "QuotaExceeded",
    "ReadOnly",
    "RegistryFailed",
    "Running",
    "Stale",
    "StoreDamaged",
    "StoreError",
    "StoreUnusable",
    "WrongDigest",
    "errno_of",
]


class FusestoreError(Exception):
    """Every error fusestore raises on purpose. `str()` is one line that says what to do."""

    errno: ClassVar[int] = errno.EIO


class BadInput(FusestoreError):
    errno = errno.EINVAL


class BadName(BadInput):
    pass


class BadDocument(BadInput):
    pass


class BadSource(BadInput):
    pass


class LayerRefused(BadInput):
    pass


class NoToc(BadInput):
    pass


class NotFound(FusestoreError):
    errno = errno.ENOENT


class Exists(FusestoreError):
    errno = errno.EEXIST


class Busy(FusestoreError):
    errno = errno.EBUSY


class Locked(Busy):
    pass


class Running(Busy):
    errno = errno.ETXTBSY


class NotPermitted(FusestoreError):
    errno = errno.EPERM


class AccessDenied(FusestoreError):
    errno = errno.EACCES


class ReadOnly(FusestoreError):
    errno = errno.EROFS


class NotADirectory(FusestoreError):
    errno = errno.ENOTDIR


class IsADirectory(FusestoreError):
    errno = errno.EISDIR


class NotEmpty(FusestoreError):
    errno = errno.ENOTEMPTY


class NameTooLong(FusestoreError):
    errno = errno.ENAMETOOLONG


class NoAttribute(FusestoreError):
    errno = errno.ENODATA


class NotSupported(FusestoreError):
    errno = errno.EOPNOTSUPP


class CrossDevice(FusestoreError):
    errno = errno.EXDEV


class FileTooLarge(FusestoreError):
    errno = errno.EFBIG


class NoSpace(FusestoreError):
    errno = errno.ENOSPC


class QuotaExceeded(FusestoreError):
    errno = errno.EDQUOT


class Stale(FusestoreError):
    errno = errno.ESTALE


class RegistryFailed(FusestoreError):
    errno = errno.EREMOTEIO


class WrongDigest(FusestoreError):
    errno = errno.EIO


class StoreError(FusestoreError):
    errno = errno.EIO


class StoreDamaged(StoreError):
    pass


class NotFetched(StoreError):
    pass


class StoreUnusable(StoreError):
    pass


def errno_of(error: BaseException) -> int:
    """The errno a system call answers with; EIO for everything not foreseen."""
    if isinstance(error, FusestoreError):
        return error.errno
    if isinstance(error, OSError) and error.errno:
        return error.errno
    return errno.EIO
