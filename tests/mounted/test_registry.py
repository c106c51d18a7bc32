"""fusestore pull and push as commands, beside skopeo and umoci, with Debian's docker-registry."""

import base64
import hashlib
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rig.images import Images
from rig.mounts import Mount, Place, wait_until
from rig.people import Person, Result
from rig.registries import (
    PASSWORD,
    USER,
    Answer,
    DockerRegistry,
    Fault,
    Proxy,
    docker_registry,
    proxy_of,
    skopeo,
)
from rig.requirements import need
from rig.snapshot import differences, snapshot
from rig.tinyimages import make_layout

from fusestore.sources import machine_platform

pytestmark = [pytest.mark.mounted, pytest.mark.images]


@pytest.fixture(scope="session")
def corners(registry: DockerRegistry, images: Images) -> str:
    """The image corners in the registry."""
    return registry.fill(images.corners.source, "team/corners:1")


@pytest.fixture
def proxy(registry: DockerRegistry) -> Iterator[Proxy]:
    with proxy_of(registry.port) as running:
        yield running


def _new_name(registry: DockerRegistry | Proxy) -> str:
    return f"{registry.name}/r{secrets.token_hex(8)}/app"


def _tiny(place: Place, text: str) -> str:
    """A source with an image of one file."""
    path = place.base / f"tiny-{text}"
    make_layout(path, "app", [{"which": text.encode()}])
    subprocess.run(["chmod", "-R", "a+rX", path], check=True, timeout=10)
    return f"oci:{path}:app"


def _which(place: Place, ref: str) -> str:
    """What the one file of a tiny image of the place's store says."""
    place.fusestore("create", ref, "look").ok()
    try:
        return place.person.run(
            "sh", "-c", "fusestore export look | tar -xOf - which", env=place.environment
        ).ok()
    finally:
        place.fusestore("rm", "look").ok()


def _fails(result_err: str, *words: str) -> None:
    assert result_err.startswith("fusestore: ") and result_err.count("\n") == 1, result_err
    for word in words:
        assert word in result_err


# Pulling


def test_a_pulled_image_is_the_imported_one(mounted: Mount, corners: str, images: Images) -> None:
    """The same id, at once in the mount, with the same tree."""
    imported = json.loads(mounted.fusestore("inspect", "corners").ok())
    mounted.fusestore("pull", corners).ok()
    pulled = json.loads(mounted.fusestore("inspect", corners).ok())
    assert pulled["id"] == imported["id"]
    assert mounted.sh("readlink -f images/$1", corners).ok().strip().endswith(f"/images/{pulled['id']}")
    mounted.sh("rm images/$1", corners).ok()


def test_the_tree_of_a_pulled_image(place: Place, registry: DockerRegistry, images: Images) -> None:
    """In a store of its own, which pull makes: nothing of it was imported."""
    mount = Mount(place.person, place.base / "mounted")
    pulled = mount.fusestore("pull", registry.fill(images.busybox.source, "team/busybox:1")).ok().strip()
    assert json.loads(mount.fusestore("inspect", "default").ok())["id"] == pulled
    mount.mount()
    try:
        found = mount.person.call(snapshot, mount.images / pulled / "rootfs")
        wrong = differences(found, snapshot(images.busybox.reference))
        assert not wrong, "\n".join(wrong)
        assert mount.fusestore("check").ok() == ""
    finally:
        mount.close()


def test_a_name_instead_of_the_reference(place: Place, corners: str) -> None:
    place.fusestore("pull", corners, "--name", "localhost/mine").ok()
    (image,) = json.loads(place.fusestore("images", "--json").ok())
    assert sorted(image["names"]) == ["default", "localhost/mine"]


def test_pull_by_digest(place: Place, corners: str) -> None:
    digest = json.loads(skopeo("inspect", "--tls-verify=false", f"docker://{corners}"))["Digest"]
    reference = f"{corners.rpartition(':')[0]}@{digest}"
    place.fusestore("pull", reference).ok()
    assert json.loads(place.fusestore("inspect", reference).ok())["manifest-digest"] == digest
    result = place.fusestore("pull", reference[:-4] + "0000")
    _fails(result.err, "has no image sha256:", "check name and tag")


def test_a_failed_first_pull_leaves_no_store(place: Place, corners: str) -> None:
    result = place.fusestore("pull", f"{corners}-not")
    assert result.code == 1
    _fails(result.err, "team/corners has no image 1-not: check name and tag")
    assert not place.store.exists()


def test_the_command_line_is_checked_before_anything_is_asked(place: Place) -> None:
    for arguments, words in (
        (("pull", "Capital"), "'Capital' cannot name an image of a registry"),
        (("pull", "app", "--name", "a b"), "'a b' cannot name an image"),
        (("pull", "app", "--platform", "arm64"), "'arm64' is no platform: write OS/ARCH"),
        (("pull", "app", "--platform", "windows/amd64"), "not for linux"),
        (("pull", "app", "--authfile", "/none"), "no file of credentials '/none'"),
    ):
        result = place.fusestore(*arguments)
        assert result.code == 1
        _fails(result.err, words)


def test_a_registry_elsewhere_is_not_asked_without_tls(
    place: Place, registry: DockerRegistry, proxy: Proxy, corners: str
) -> None:
    """The proxy stands for all hosts there are."""
    name = f"registry.example/{_new_name(registry).partition('/')[2]}"
    place.fusestore("import", _tiny(place, "far")).ok()
    through = f"http://someone:{PASSWORD}@{proxy.name}"
    env = {**place.environment, "http_proxy": through, "https_proxy": through}
    run = place.person.run
    result = run("fusestore", "push", "app", name, env=env)
    assert result.code == 1
    _fails(result.err, "registry.example cannot be reached through the proxy")
    assert PASSWORD not in result.err
    assert {seen.method for seen in proxy.seen} <= {"CONNECT"}
    run("fusestore", "push", "app", name, "--plain-http", env=env).ok()
    run("fusestore", "pull", name, "--plain-http", env=env).ok()
    assert proxy.hosts == {"registry.example"}
    passed = {seen.headers.get("proxy-authorization") for seen in proxy.requests("/v2/")}
    assert passed == {"Basic " + base64.b64encode(f"someone:{PASSWORD}".encode()).decode()}
    # This machine's are not.
    run("fusestore", "pull", corners, env=env).ok()
    assert proxy.hosts == {"registry.example"}


def test_a_registry_with_tls(place: Place, area: Path) -> None:
    """On this machine too its certificate has to be believed, if it has one."""
    name = f"tls-{place.person.name}"
    with docker_registry(area / name, has_tls=True) as running:
        image = f"{running.name}/app"
        place.fusestore("import", _tiny(place, "tls")).ok()
        result = place.fusestore("push", "app", image)
        assert result.code == 1
        _fails(
            result.err, f"the certificate of {running.name} is not believed: have its authority's installed"
        )
        env = {**place.environment, "SSL_CERT_FILE": f"{area}/{name}/certificate"}
        place.person.run("fusestore", "push", "app", image, env=env).ok()
        place.person.run("fusestore", "pull", image, env=env).ok()
        result = place.person.run("fusestore", "pull", image, "--plain-http", env=env)
        assert result.code == 1
        _fails(result.err, "answers 400")


def test_certificates_are_where_podman_has_them(place: Place, area: Path) -> None:
    """Of a registry that wants to see one, too."""
    base = area / f"certificates-{place.person.name}"
    with docker_registry(base, has_tls=True, wants_certificate=True) as running:
        image = f"{running.name}/app"
        place.fusestore("import", _tiny(place, "certificates")).ok()
        directory = place.base / ".config/containers/certs.d" / running.name
        directory.mkdir(parents=True)
        env = {**place.environment, "HOME": str(place.base)}

        def push() -> Result:
            return place.person.run("fusestore", "push", "app", image, env=env)

        _fails(push().err, f"or in /etc/containers/certs.d/{running.name}")
        shutil.copy(base / "certificate", directory / "ca.crt")
        assert push().code == 1
        shutil.copy(base / "certificate", directory / "client.cert")
        _fails(push().err, f"{directory} has only one of client.cert and client.key: add the other")
        shutil.copyfile(base / "key", directory / "client.key")
        push().ok()
        place.person.run("fusestore", "pull", image, env=env).ok()
        assert json.loads(skopeo("inspect", "--cert-dir", str(directory), f"docker://{image}"))
        (directory / "ca.crt").write_text("none")
        _fails(push().err, f"{directory}/ca.crt cannot be used: put a certificate there in PEM, or remove it")


# Several platforms


@pytest.fixture
def several(registry: DockerRegistry, place: Place) -> str:
    """An index of images that say in a file what they are for, and an attestation as buildkit adds it."""
    reference = _new_name(registry)
    own = machine_platform().architecture
    platforms = [
        {"os": "linux", "architecture": own},
        {"os": "linux", "architecture": "arm", "variant": "v6"},
        {"os": "linux", "architecture": "arm", "variant": "v7"},
        {"os": "windows", "architecture": own},
        {"os": "unknown", "architecture": "unknown"},
    ]
    manifests = []
    for platform in platforms:
        text = "-".join(platform.values())
        layout = place.base / f"for-{text}"
        config = {"os": platform["os"], "architecture": platform["architecture"]}
        make_layout(layout, "app", [{"which": text.encode()}], **config)
        tagged = registry.fill(f"oci:{layout}:app", f"{reference.partition('/')[2]}:{text}")
        raw = skopeo("inspect", "--raw", "--tls-verify=false", f"docker://{tagged}").encode()
        digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
        manifests.append({
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": digest, "size": len(raw), "platform": platform,
        })  # fmt: skip
    index = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": manifests,
    }
    _put_manifest(registry, reference, index)
    return reference


def _put_manifest(registry: DockerRegistry, reference: str, document: dict[str, object]) -> None:
    repository = reference.partition("/")[2]
    request = urllib.request.Request(
        f"http://{registry.name}/v2/{repository}/manifests/latest",
        json.dumps(document).encode(),
        {"Content-Type": str(document["mediaType"])},
        method="PUT",
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 201


def test_an_index_gives_the_image_of_the_platform(place: Place, several: str) -> None:
    own = machine_platform().architecture
    for options, expected in (
        ((), f"linux-{own}"),
        (("--platform", f"linux/{own}"), f"linux-{own}"),
        (("--platform", "linux/arm/v6"), "linux-arm-v6"),
        (("--platform", "linux/arm/v7"), "linux-arm-v7"),
        (("--platform", "linux/arm/v8"), "linux-arm-v7"),
        (("--platform", "linux/arm"), "linux-arm-v7"),
    ):
        place.fusestore("pull", several, *options).ok()
        assert _which(place, f"{several}:latest") == expected
    result = place.fusestore("pull", several, "--platform", "linux/s390x")
    _fails(result.err, "no single image for linux/s390x, but", "linux/arm/v6, linux/arm/v7", "windows/")


def test_a_platform_that_was_asked_for_has_to_be_right(place: Place, corners: str) -> None:
    result = place.fusestore("pull", corners, "--platform", "linux/s390x")
    assert result.code == 1
    _fails(result.err, "not linux/s390x")


# Pushing


def test_a_pushed_image_is_what_skopeo_and_umoci_read(
    mounted: Mount, registry: DockerRegistry, images: Images, tmp_path: Path
) -> None:
    name = _new_name(registry)
    digest = mounted.fusestore("push", "corners", name).ok().strip()
    imported = json.loads(mounted.fusestore("inspect", "corners").ok())
    assert digest == imported["manifest-digest"]
    seen = json.loads(skopeo("inspect", "--tls-verify=false", f"docker://{name}"))
    assert (seen["Digest"], seen["Layers"]) == (digest, [layer["digest"] for layer in imported["layers"]])
    need("root", os.geteuid() == 0, "owners and devices of an unpacked image need root")
    skopeo("copy", "--src-tls-verify=false", f"docker://{name}", f"oci:{tmp_path}/layout:back")
    unpack = ["umoci", "unpack", "--image", f"{tmp_path}/layout:back", tmp_path / "bundle"]
    subprocess.run(unpack, check=True, capture_output=True, timeout=60)
    wrong = differences(snapshot(tmp_path / "bundle/rootfs"), snapshot(images.corners.reference))
    assert not wrong, "\n".join(wrong)


def test_a_commit_goes_to_a_registry_and_comes_back(mounted: Mount, container: str, proxy: Proxy) -> None:
    """Of its two layers the one that the registry has in another repository is not sent."""
    base, name = f"{_new_name(proxy)}-base", f"{_new_name(proxy)}:new"
    mounted.fusestore("push", "busybox", base).ok()
    mounted.sh(
        "ln -sfn busybox images/tag; ln -s $(readlink images/busybox) images/x; rm images/x images/tag"
    ).ok()
    mounted.fusestore("pull", base).ok()
    mounted.sh("echo changed > containers/$1/rootfs/etc/hostname", container).ok()
    made = mounted.fusestore("commit", container, f"localhost/committed:{container}").ok().strip()
    proxy.seen.clear()
    mounted.fusestore("push", made, name).ok()
    mounts = [seen.status for seen in proxy.requests("^POST .*mount=sha256")]
    assert mounts == [201]
    assert len(proxy.requests("^PUT .*/uploads/")) == 2  # the new layer and the config
    other = Mount(mounted.person, mounted.base / f"other-{container}")
    assert other.fusestore("pull", name).ok().strip() == made
    mounted.sh("rm images/$1; rmdir images/$2", f"{base}:latest", made).ok()


def test_what_the_registry_has_is_not_sent(place: Place, proxy: Proxy) -> None:
    place.fusestore("import", _tiny(place, "again")).ok()
    name = _new_name(proxy)
    place.fusestore("push", "app", name).ok()
    proxy.seen.clear()
    place.fusestore("push", "app", f"{name}:2").ok()
    assert proxy.requests("^(POST|PATCH)") == []
    assert [seen.path.rpartition("/")[2] for seen in proxy.requests("^PUT")] == ["2"]


def test_a_damaged_blob_is_not_pushed(place: Place, registry: DockerRegistry) -> None:
    place.fusestore("import", _tiny(place, "damaged")).ok()
    (layer,) = json.loads(place.fusestore("inspect", "app").ok())["layers"]
    blob = place.store / "blobs/sha256" / layer["digest"].removeprefix("sha256:")
    damaged = bytearray(blob.read_bytes())
    damaged[-1] ^= 1
    blob.write_bytes(damaged)
    name = _new_name(registry)
    result = place.fusestore("push", "app", name)
    assert result.code == 1
    _fails(result.err, str(blob), "import the image again")
    _fails(place.fusestore("pull", name).err, "has no image latest")


def test_push_needs_an_image(place: Place, registry: DockerRegistry) -> None:
    place.fusestore("import", _tiny(place, "one")).ok()
    _fails(place.fusestore("push", "none-such", _new_name(registry)).err, "none-such")
    _fails(place.fusestore("push", "app", f"{_new_name(registry)}@sha256:{'0' * 64}").err, "leave it out")


# Credentials


@pytest.fixture
def logged_in(place: Place, locked_registry: DockerRegistry) -> Callable[[str], Path]:
    """Writes a file of credentials, readable to its person alone, below the place's base."""

    def write(name: str) -> Path:
        path = place.base / name
        auth = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()

        def do() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"auths": {locked_registry.name: {"auth": auth}}}))
            path.chmod(0o600)

        place.person.call(do)
        return path

    return write


@pytest.mark.parametrize(
    ("name", "variable"),
    [
        ("any", "REGISTRY_AUTH_FILE"),
        ("x/containers/auth.json", "XDG_RUNTIME_DIR"),
        (".config/containers/auth.json", "HOME"),
        (".docker/config.json", "HOME"),
    ],
)
def test_credentials_from_the_usual_files(
    place: Place,
    locked_registry: DockerRegistry,
    logged_in: Callable[[str], Path],
    name: str,
    variable: str,
) -> None:
    path = logged_in(name)
    place.fusestore("import", _tiny(place, "private")).ok()
    command = ("fusestore", "push", "app", _new_name(locked_registry))
    value = path if variable == "REGISTRY_AUTH_FILE" else place.base / name.partition("/")[0]
    if variable == "HOME":
        value = place.base
    env = {**place.environment, variable: str(value)}
    place.person.run(*command, env=env).ok()
    path.unlink()
    if variable == "REGISTRY_AUTH_FILE":
        return
    result = place.person.run(*command, env=env)
    assert result.code == 1
    _fails(result.err, "check the name, or log in with podman login or docker login")


def test_what_skopeo_login_writes(place: Place, locked_registry: DockerRegistry) -> None:
    """--authfile comes before all other places."""
    person, file = place.person, place.base / "login.json"
    login = (
        f"skopeo login --tls-verify=false --authfile {file} -u {USER} --password-stdin {locked_registry.name}"
    )
    person.run("sh", "-c", f"echo {PASSWORD} | {login}").ok()
    place.fusestore("import", _tiny(place, "login")).ok()
    name = _new_name(locked_registry)
    place.fusestore("push", "app", name, "--authfile", file).ok()
    assert PASSWORD not in place.fusestore("pull", name).err
    place.fusestore("pull", name, "--authfile", file).ok()


# Ends before the end


@pytest.fixture
def stalled(place: Place, registry: DockerRegistry, proxy: Proxy) -> tuple[str, Proxy]:
    """The name of an image whose big layer stops in the middle."""
    layout = place.base / "big"
    make_layout(layout, "app", [{"big": random.Random(2).randbytes(1 << 20)}])
    repository = _new_name(registry).partition("/")[2]
    registry.fill(f"oci:{layout}:app", repository)

    def stall(answer: Answer) -> None:
        if len(answer.body) > 1 << 20:
            answer.stalls_at = 300 << 10

    proxy.faults = [Fault("/blobs/", stall)]
    return f"{proxy.name}/{repository}", proxy


def _start(person: Person, place: Place, *command: str) -> "subprocess.Popen[str]":
    is_other = os.geteuid() != person.uid
    return subprocess.Popen(
        command, env=person.environment(**place.environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, user=person.uid if is_other else None, group=person.gid if is_other else None,
        extra_groups=[] if is_other else None, cwd="/",
    )  # fmt: skip


def _fetched(place: Place) -> int:
    """Bytes of the largest blob that is on its way."""
    return max((file.stat().st_size for file in (place.store / "downloads").glob("*")), default=0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_pull_that_is_ended_is_gone_on_with(
    place: Place, stalled: tuple[str, Proxy], number: signal.Signals
) -> None:
    name, proxy = stalled
    with _start(place.person, place, "fusestore", "pull", name) as process:
        wait_until(lambda: _fetched(place) > 200 << 10)
        process.send_signal(number)
        _, err = process.communicate(timeout=10)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert err.strip() == "fusestore: interrupted"
    assert place.fusestore("images", "--json").ok().strip() == "[]"
    proxy.faults.clear()
    place.fusestore("pull", name).ok()
    *_, last = proxy.requests(f"^GET .*/blobs/sha256:{_big_layer(place)}")
    assert int(last.headers["Range"].removeprefix("bytes=").removesuffix("-")) > 200 << 10
    assert os.listdir(place.store / "tmp") == os.listdir(place.store / "downloads") == []
    assert place.fusestore("check").ok() == ""


@pytest.mark.parametrize("command", ["pull", "push"])
def test_ctrl_c_ends_what_waits_for_an_answer(place: Place, stalled: tuple[str, Proxy], command: str) -> None:
    """Not after the half minute, or the ten, that an answer may take: threads that wait are woken."""
    name, proxy = stalled
    fault = Fault("^GET .*/blobs/|^PUT .*/uploads/", lambda _: proxy.released.wait(60) and None)
    if command == "push":
        place.fusestore("import", _tiny(place, "waits")).ok()
        arguments = ["push", "app", _new_name(proxy)]
    else:
        arguments = ["pull", name]
        fault.where = "^GET .*/blobs/sha256:" + _big_layer(place)
    proxy.faults = [fault]
    with _start(place.person, place, "fusestore", *arguments) as process:
        wait_until(lambda: fault.done > 0)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
    assert (process.returncode, err.strip()) == (130, "fusestore: interrupted")


def _big_layer(place: Place) -> str:
    blobs = (place.base / "big/blobs/sha256").iterdir()
    (found,) = (path.name for path in blobs if path.stat().st_size > 1 << 20)
    return found
