"""Which image of an index is for which platform."""

from collections.abc import Sequence

import pytest

from fusestore.errors import BadInput, BadSource
from fusestore.nodes import Digest
from fusestore.oci import MANIFEST_TYPE, Descriptor, choose_platform, parse_platform


def _index(*platforms: str) -> Sequence[Descriptor]:
    return [_descriptor(number, *platform.split("/")) for number, platform in enumerate(platforms)]


def _descriptor(number: int, os: str, architecture: str = "", variant: str = "") -> Descriptor:
    return Descriptor(MANIFEST_TYPE, Digest(f"sha256:{number:064x}"), 1, {}, os, architecture, variant)


AMD = ("linux/amd64", "linux/amd64/v3", "windows/amd64", "unknown/unknown")
ARM = ("linux/arm/v5", "linux/arm/v7", "linux/arm64/v8", "linux/amd64")


@pytest.mark.parametrize(
    ("wanted", "platforms", "chosen"),
    [
        ("linux/amd64", AMD, 0),
        ("linux/amd64/v3", AMD, 1),
        ("linux/amd64/v2", AMD, None),
        ("linux/arm", ARM, 1),
        ("linux/arm/v8", ARM, 1),
        ("linux/arm/v7", ARM, 1),
        ("linux/arm/v6", ARM, 0),
        ("linux/arm64", ARM, 2),
        ("linux/arm64/v8", ARM, 2),
        ("linux/arm64/v9", ARM, 2),
        ("linux/s390x", ARM, None),
        ("linux/arm64", ("linux/arm64", "linux/arm64/v9"), 0),
        ("linux/amd64", ("linux", "linux/arm64"), 0),
        ("linux/amd64", ("windows/amd64",), None),
        ("linux/amd64", ("linux/amd64", "linux/amd64"), None),
    ],
)
def test_exactly(wanted: str, platforms: Sequence[str], chosen: int | None) -> None:
    candidates = _index(*platforms)
    if chosen is None:
        with pytest.raises(BadSource, match=f"no single image for {wanted}, but (linux|windows)/amd64"):
            choose_platform(candidates, parse_platform(wanted), "it", exactly=True)
    else:
        assert choose_platform(candidates, parse_platform(wanted), "it", exactly=True) == candidates[chosen]


def test_the_only_one_there_is_will_do_where_none_was_asked_for() -> None:
    candidates = _index("windows/amd64", "linux/riscv64")
    assert choose_platform(candidates, parse_platform("linux/amd64"), "it") == candidates[1]


@pytest.mark.parametrize(
    "text", ["", "linux", "linux/", "/amd64", "linux/arm/v7/x", "linux/a b", "linux/AMD64"]
)
def test_what_is_no_platform(text: str) -> None:
    with pytest.raises(BadInput, match="is no platform: write OS/ARCH"):
        parse_platform(text)


def test_platforms_are_for_linux() -> None:
    with pytest.raises(BadInput, match="not for linux"):
        parse_platform("windows/amd64")
