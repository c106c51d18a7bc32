"""Which certificates are found for a host."""

from pathlib import Path

import pytest

from fusestore.certificates import Certificates, certificate_directories, find_certificates
from fusestore.errors import BadInput


def _make(directory: Path, *names: str) -> str:
    directory.mkdir(parents=True)
    for name in names:
        (directory / name).touch()
    return str(directory)


def test_the_first_directory_with_the_host_counts(tmp_path: Path) -> None:
    places = [str(tmp_path / name) for name in ("none", "first", "second")]
    first = _make(tmp_path / "first/a.example:5000", "b.crt", "a.crt", "x.cert", "x.key", "README")
    _make(tmp_path / "second/a.example:5000", "c.crt")
    second = _make(tmp_path / "second/a.example", "c.crt")
    assert find_certificates("a.example:5000", places) == Certificates(
        (f"{first}/a.crt", f"{first}/b.crt"), ((f"{first}/x.cert", f"{first}/x.key"),)
    )
    assert find_certificates("a.example", places) == Certificates((f"{second}/c.crt",), ())
    assert find_certificates("b.example", places) is None


@pytest.mark.parametrize("host", ["", ".", ".."])
def test_what_is_no_host_leads_nowhere(tmp_path: Path, host: str) -> None:
    _make(tmp_path / "hosts", "a.crt")
    assert find_certificates(host, [str(tmp_path / "hosts")]) is None


@pytest.mark.parametrize("name", ["x.cert", "x.key"])
def test_a_certificate_needs_its_key(tmp_path: Path, name: str) -> None:
    _make(tmp_path / "a.example", name)
    with pytest.raises(BadInput, match="only one of x"):
        find_certificates("a.example", [str(tmp_path)])


def test_the_users_come_before_the_systems() -> None:
    assert certificate_directories({"HOME": "/home/a"}) == (
        "/home/a/.config/containers/certs.d",
        "/etc/containers/certs.d",
        "/etc/docker/certs.d",
    )
