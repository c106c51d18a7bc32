"""What a test needs of the machine: a skip on a developer's laptop, a failure where it is required.

FUSESTORE_TEST_REQUIRE names, separated by commas, what must be there: ``fuse``, ``images``, ``root``. .ci/run
names all of them, so that no test of the real thing is skipped unnoticed.
"""

import os

import pytest

__all__ = ["need"]

_KINDS = frozenset({"fuse", "images", "root"})


def need(kind: str, present: bool, otherwise: str) -> None:
    """Skips the test unless `present`; fails it where `kind` is required. `otherwise` says what to do."""
    required = set(filter(None, os.environ.get("FUSESTORE_TEST_REQUIRE", "").split(",")))
    if unknown := (required | {kind}) - _KINDS:
        raise ValueError(f"FUSESTORE_TEST_REQUIRE knows {sorted(_KINDS)}, not {sorted(unknown)}")
    if present:
        return
    if kind in required:
        pytest.fail(f"{kind} is required by FUSESTORE_TEST_REQUIRE: {otherwise}", pytrace=False)
    pytest.skip(otherwise)
