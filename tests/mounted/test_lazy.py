"""fusestore pull --lazy: images that are used before they are here, with Debian's docker-registry."""

import base64
import errno
import hashlib
import io
import json
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rig.images import Images
from rig.mounts import Mount, Place, wait_until
from rig.people import Person
from rig.podman import podman_of
from rig.registries import (
    BLOBS,
    PASSWORD,
    USER,
    Answer,
    DockerRegistry,
    Fault,
    Proxy,
    docker_registry,
    hold_back,
    proxy_of,
    skopeo,
)
from rig.snapshot import differences, snapshot
from rig.stargz import LANDMARK, Stargz, make_stargz
from rig.tinyimages import Blob, write_layout

pytestmark = [pytest.mark.mounted, pytest.mark.images]

_NOISE = random.Random(5).randbytes(3 << 20)
"""What no compression makes smaller."""
_MISSING = "is not all here"


@pytest.fixture
def proxy(registry: DockerRegistry) -> Iterator[Proxy]:
    with proxy_of(registry.port) as running:
        yield running


@pytest.fixture
def mount(person: Person, place: Place) -> Iterator[Mount]:
    """A place of its own, not mounted yet, for a store that does not exist yet."""
    made = Mount(person, place.base / "lazy")
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="session")
def chunked(registry: DockerRegistry, images: Images) -> str:
    """The image debian in zstd:chunked: a name in its second layer is not UTF-8."""
    return registry.fill(images.chunked.source, "lazy/chunked:1")


def _members(**changes: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
    """Every kind of object, files of several chunks and of none."""
    files = {"dir/big": _NOISE, "dir/small": b"small\n", "empty": b"", "last": b"last\n", **changes}
    made = []

    def add(name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", **fields: object) -> None:
        member = tarfile.TarInfo(name)
        member.type, member.size, member.mtime = kind, len(content), 1_600_000_000
        for key, value in fields.items():
            setattr(member, key, value)
        made.append((member, content))

    add("dir", tarfile.DIRTYPE, mode=0o751, uid=3, gid=4)
    for name, content in files.items():
        add(name, content=content, mode=0o640, uid=1000, pax_headers={"SCHILY.xattr.user.of": name})
    add("dir/link", tarfile.SYMTYPE, linkname="../last")
    add("dir/same", tarfile.LNKTYPE, linkname="dir/small")
    add("fifo", tarfile.FIFOTYPE)
    return made


def _fill(
    registry: DockerRegistry, proxy: Proxy, layers: list[Stargz | Blob], base: Path, **fields: str
) -> str:
    """Puts an image of these layers into the registry: its name through the proxy."""
    blobs = [
        Blob(layer.data, layer.diff_id, annotations=layer.annotations) if isinstance(layer, Stargz) else layer
        for layer in layers
    ]
    name = f"lazy/{secrets.token_hex(8)}"
    layout = base / name.replace("/", "-")
    write_layout(layout, "app", blobs, **fields)
    registry.fill(f"oci:{layout}:app", name)
    return f"{proxy.name}/{name}:latest"


def _gone(answer: Answer) -> None:
    answer.cut_before = True


def _ranges(proxy: Proxy) -> list[tuple[int, int]]:
    """The parts of blobs that were asked for, in order."""
    found = (re.match(r"bytes=(\d+)-(\d+)", seen.headers.get("Range", "")) for seen in proxy.requests(BLOBS))
    return [(int(match[1]), int(match[2]) + 1) for match in found if match]


def _is_lazy(place: Place) -> bool:
    return any(place.store.glob("layers/*/lazy.*"))


def _let_go(mount: Mount, proxy: Proxy, name: str) -> None:
    """The registry is well again. Another pull has the mount try at once."""
    proxy.faults.clear()
    assert mount.fusestore("pull", "--lazy", name).code == 0
    _wait_until_complete(mount)


def _wait_until_complete(mount: Mount) -> None:
    wait_until(lambda: not _is_lazy(mount), 60)


def _sha256(mount: Mount, path: str) -> str:
    return mount.sh("sha256sum < $1", path).ok().split()[0]


def _mount_held(mount: Mount, registry: DockerRegistry, proxy: Proxy, base: Path) -> str:
    """Mounts a store with a lazy image, of which no more comes than is read; its name."""
    name = _fill(registry, proxy, [make_stargz(_members())], base)
    mount.expect(_MISSING)
    hold_back(proxy)
    mount.fusestore("pull", "--lazy", name).ok()
    mount.mount()
    return name


ROOT = "images/default/rootfs"


# What is shown


def test_an_image_in_zstd_chunked(
    mount: Mount, chunked: str, images: Images, registry: DockerRegistry
) -> None:
    """Before its content is here it is the same as after it, and as any tool unpacks it."""
    with proxy_of(registry.port) as proxy:
        mount.expect(_MISSING)
        hold_back(proxy)
        name = f"{proxy.name}/{chunked.partition('/')[2]}"
        pulled = mount.fusestore("pull", "--lazy", name).ok().strip()
        assert _is_lazy(mount)
        mount.mount()
        tree = mount.images / pulled / "rootfs"
        expected = snapshot(images.chunked.reference)
        wrong = differences(mount.person.call(snapshot, tree), expected)
        assert not wrong, "\n".join(wrong)
        assert _is_lazy(mount)
        assert mount.fusestore("check").ok() == ""
        _let_go(mount, proxy, name)
    mount.umount()
    mount.mount()
    wrong = differences(mount.person.call(snapshot, tree), expected)
    assert not wrong, "\n".join(wrong)
    assert mount.fusestore("check").ok() == ""


def test_an_image_in_estargz(mount: Mount, registry: DockerRegistry, proxy: Proxy, tmp_path: Path) -> None:
    """With chunks of a file, and a layer above that hides some of it; then beside the same not lazily."""
    lower = make_stargz(_members(), chunk_size=1 << 20)
    upper = make_stargz([(tarfile.TarInfo("dir/.wh.small"), b""), (tarfile.TarInfo("new"), b"")])
    name = _fill(registry, proxy, [lower, upper], tmp_path)
    mount.expect(_MISSING)
    hold_back(proxy)
    mount.fusestore("pull", "--lazy", name).ok()
    mount.mount()
    before = mount.person.call(snapshot, mount.images / "default/rootfs")
    assert _sha256(mount, f"{ROOT}/dir/big") == hashlib.sha256(_NOISE).hexdigest()
    listed = [".no.prefetch.landmark", "dir", "empty", "fifo", "last", "new", "stargz.index.json"]
    assert mount.sh("ls -A $1", ROOT).ok().split() == listed
    assert mount.sh("cd $1; ls dir; cat last dir/same; readlink dir/link", ROOT).ok().split() == (
        ["big", "link", "same", "last", "small", "../last"]
    )
    assert mount.sh("getfattr --only-values -n user.of $1/last; stat -c ' %a %u' $1/dir", ROOT).ok() == (
        "last 751 3\n"
    )
    assert _is_lazy(mount)
    _let_go(mount, proxy, name)
    mount.umount()
    mount.mount()
    assert not differences(mount.person.call(snapshot, mount.images / "default/rootfs"), before)
    other = Mount(mount.person, mount.base / "whole")
    other.fusestore("pull", name).ok()
    other.mount()
    try:
        wrong = differences(mount.person.call(snapshot, other.images / "default/rootfs"), before)
        assert not wrong, "\n".join(wrong)
    finally:
        other.close()


def test_the_first_read_fetches_little(mount: Mount, chunked: str, registry: DockerRegistry) -> None:
    with proxy_of(registry.port) as proxy:
        mount.expect(_MISSING)
        hold_back(proxy)
        mount.fusestore("pull", "--lazy", f"{proxy.name}/{chunked.partition('/')[2]}").ok()
        (image,) = json.loads(mount.fusestore("images", "--json").ok())
        mount.mount()
        assert mount.sh("cat $1/lower/kept/file0", ROOT).ok() == "kept 0\n"
        assert proxy.fetched() <= 0.02 * image["size"]
        # Once.
        fetched = proxy.fetched()
        mount.umount()
        mount.mount()
        assert mount.sh("cat $1/lower/kept/file0", ROOT).ok() == "kept 0\n"
        assert proxy.fetched() == fetched


def test_a_file_is_fetched_by_its_chunks(
    mount: Mount, registry: DockerRegistry, proxy: Proxy, tmp_path: Path
) -> None:
    name = _fill(registry, proxy, [make_stargz(_members(), chunk_size=1 << 18)], tmp_path)
    mount.expect(_MISSING)
    hold_back(proxy)
    mount.fusestore("pull", "--lazy", name).ok()
    mount.mount()
    before = proxy.fetched()
    part = mount.sh("dd if=$1/dir/big bs=4096 skip=512 count=1 status=none | sha256sum", ROOT).ok()
    assert part.split()[0] == hashlib.sha256(_NOISE[512 * 4096 : 513 * 4096]).hexdigest()
    assert proxy.fetched() - before <= 3 << 18


def test_layers_without_a_table_are_downloaded(
    mount: Mount, registry: DockerRegistry, proxy: Proxy, tmp_path: Path
) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("plain"))
    name = _fill(registry, proxy, [Blob.of(out.getvalue()), make_stargz(_members())], tmp_path)
    mount.expect(_MISSING)
    hold_back(proxy)
    mount.fusestore("pull", "--lazy", name).ok()
    layers = json.loads(mount.fusestore("inspect", name).ok())["layers"]
    there = [(mount.store / "blobs/sha256" / layer["digest"][7:]).exists() for layer in layers]
    assert there == [True, False]
    mount.mount()
    assert mount.sh("ls $1; cat $1/last", ROOT).ok().split()[-1] == "last"


def test_the_platform_that_was_asked_for(
    mount: Mount, registry: DockerRegistry, proxy: Proxy, tmp_path: Path
) -> None:
    name = _fill(registry, proxy, [make_stargz(_members())], tmp_path, architecture="arm")
    mount.fusestore("pull", "--lazy", "--platform", "linux/arm", name).ok()
    assert _is_lazy(mount)
    result = mount.fusestore("pull", "--lazy", "--platform", "linux/s390x", name)
    assert result.code == 1
    assert "not linux/s390x" in result.err


# What goes wrong


def _with_annotation(stargz: Stargz, digest: str) -> Stargz:
    return Stargz(**{**vars(stargz), "annotations": dict.fromkeys(stargz.annotations, digest)})


def test_another_table_than_the_manifest_says_is_refused(
    mount: Mount, registry: DockerRegistry, proxy: Proxy, tmp_path: Path
) -> None:
    wrong = _with_annotation(make_stargz(_members()), f"sha256:{'1' * 64}")
    name = _fill(registry, proxy, [make_stargz(_members(other=b"x")), wrong], tmp_path)
    result = mount.fusestore("pull", "--lazy", name)
    assert result.code == 1
    assert result.err.startswith("fusestore: the table of contents of layer sha256:")
    assert "as its manifest says: pull it again, or without --lazy" in result.err
    assert result.err.count("\n") == 1
    assert not mount.store.exists()


def test_a_damaged_chunk_is_an_error_and_never_shown(
    mount: Mount, registry: DockerRegistry, proxy: Proxy, tmp_path: Path
) -> None:
    stargz = make_stargz(_members())
    name = _fill(registry, proxy, [stargz], tmp_path)
    mount.expect(_MISSING)
    place = next(entry["offset"] for entry in stargz.entries if entry["name"] == "last")
    damaged: set[int] = set()

    def damage(answer: Answer) -> None:
        if any(answer.headers.get("Content-Range", "").startswith(f"bytes {start}-") for start in damaged):
            answer.body = answer.body[:12] + bytes([answer.body[12] ^ 1]) + answer.body[13:]

    hold_back(proxy, damage)
    mount.fusestore("pull", "--lazy", name).ok()
    mount.mount()
    damaged.add(place)
    result = mount.sh("cat $1/last", ROOT)
    assert result.code == 1
    assert result.out == ""
    assert "Input/output error" in result.err
    assert f"what its registry sends at {place} has another digest" in mount.log()
    assert mount.sh("cat $1/dir/small", ROOT).ok() == "small\n"
    damaged.clear()
    assert mount.sh("cat $1/last", ROOT).ok() == "last\n"


def test_without_the_registry_what_is_here_is_read(
    mount: Mount, registry: DockerRegistry, proxy: Proxy, tmp_path: Path
) -> None:
    """What is missing is EIO, until the registry is back; nothing has to be mounted anew."""
    name = _mount_held(mount, registry, proxy, tmp_path)
    mount.sh("mkdir containers/c; cat $1/dir/small > /dev/null", ROOT).ok()
    gone = Fault(".", _gone)
    proxy.faults.insert(0, gone)
    result = mount.sh("cat containers/c/rootfs/last")
    assert result.code == 1
    assert "Input/output error" in result.err
    works = "cat dir/small; ls dir; echo new > last; cat last"
    found = mount.sh(f"cd containers/c/rootfs; {works}").ok().split()
    assert found == ["small", "big", "link", "same", "small", "new"]
    for file in ("blob", "tar"):
        assert "Input/output error" in mount.sh("cat images/default/layers/0/$1 > /dev/null", file).err
    assert mount.fusestore("check").ok() == ""
    proxy.faults.clear()
    wait_until(lambda: mount.sh("cat $1/last", ROOT).code == 0)
    _let_go(mount, proxy, name)


def test_who_waits_for_the_registry_holds_up_nobody(
    mount: Mount, registry: DockerRegistry, proxy: Proxy, tmp_path: Path
) -> None:
    """More readers than the mount has threads for its disk."""
    files = {f"f{number}": b"%d" % number for number in range(20)}
    name = _fill(registry, proxy, [make_stargz(_members(**files))], tmp_path)
    mount.expect(_MISSING)
    mount.expect("fuse_reply_.* failed")  # who asked was killed

    def stall(answer: Answer) -> None:
        answer.stalls_at = 0

    mount.fusestore("pull", "--lazy", name).ok()
    proxy.faults.append(Fault(BLOBS, stall))
    mount.mount()
    mount.sh("mkdir containers/c; echo here > containers/c/rootfs/here").ok()
    found = mount.sh(
        "for number in $(seq 0 19); do cat $1/f$number > /dev/null 2>&1 & done;"
        "until [ $(jobs -r | wc -l) = 20 ]; do :; done;"
        "cat containers/c/rootfs/here; ls $1/dir; jobs -r | wc -l; kill $(jobs -p)",
        ROOT,
        deadline_s=8,
    )  # fmt: skip
    proxy.released.set()
    proxy.faults.clear()
    assert found.out.split() == ["here", "big", "link", "same", "small", "20"]
    wait_until(lambda: mount.fusestore("umount", mount.mountpoint).code == 0, 30)


@pytest.mark.root
@pytest.mark.parametrize("person", ["root"], indirect=True, scope="session")
@pytest.mark.parametrize("driver", ["erofs", "overlay"])
def test_the_kernel_over_a_lazy_image(
    person: Person, place: Place, registry: DockerRegistry, proxy: Proxy, tmp_path: Path, driver: str
) -> None:
    mount = Mount(person, place.base / "lazy", "--driver", driver)
    try:
        name = _mount_held(mount, registry, proxy, tmp_path)
        shown = mount.sh(
            "mkdir containers/c; cat containers/c/rootfs/last; stat -f -c %T containers/c/rootfs/dir"
        )
        assert shown.ok().split() == ["last", "fuseblk" if driver == "erofs" else "overlayfs"]
        _let_go(mount, proxy, name)
        assert mount.sh("cat containers/c/rootfs/dir/small").ok() == "small\n"
        shown = mount.sh("mkdir containers/d; cd containers/d/rootfs; cat last; stat -f -c %T dir")
        assert shown.ok().split() == ["last", "overlayfs"]
    finally:
        mount.close()


def test_killed_in_the_middle(mount: Mount, registry: DockerRegistry, proxy: Proxy, tmp_path: Path) -> None:
    """The next mount goes on; and the blob is the right one."""
    stargz = make_stargz(_members(more=_NOISE[::-1]))
    name = _fill(registry, proxy, [stargz], tmp_path)
    mount.expect(_MISSING)

    def slow(answer: Answer) -> None:
        answer.pause_s = 0.05

    proxy.faults.append(Fault(BLOBS, slow))
    mount.fusestore("pull", "--lazy", name).ok()
    mount.mount()
    wait_until(lambda: any(end > 2 << 20 for _, end in _ranges(proxy)))
    (pid,) = mount.pids()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: mount.pids() == [])
    assert _is_lazy(mount)
    proxy.faults.clear()
    mount.mount()
    _wait_until_complete(mount)
    digest = hashlib.sha256(stargz.data).hexdigest()
    assert mount.sh("sha256sum < images/default/layers/0/blob").ok().split()[0] == digest
    assert mount.fusestore("check").ok() == ""


def test_a_blob_that_came_damaged_is_fetched_anew(
    mount: Mount, registry: DockerRegistry, proxy: Proxy, tmp_path: Path
) -> None:
    """A byte between the chunks: only the whole blob's digest can tell."""
    stargz = make_stargz(_members())
    name = _fill(registry, proxy, [stargz], tmp_path)
    mount.expect("what the registry sent of layer sha256:.* is another blob")

    def damage(answer: Answer) -> None:
        if answer.headers.get("Content-Range", "").startswith("bytes 0-"):
            answer.body = answer.body[:4] + bytes([answer.body[4] ^ 1]) + answer.body[5:]

    proxy.faults.append(Fault(BLOBS, damage, times=4))
    mount.fusestore("pull", "--lazy", name).ok()
    mount.mount()
    _wait_until_complete(mount)
    assert "is another blob" in mount.log()
    assert mount.fusestore("check").ok() == ""


def test_a_table_that_contradicts_the_tar_is_found(
    mount: Mount, registry: DockerRegistry, proxy: Proxy, tmp_path: Path
) -> None:
    """It is what the manifest has the digest of, so it is shown; but not for long, and not in silence."""
    lying = make_stargz(_members(), claims={"last": {"mode": 0o4755}})
    name = _fill(registry, proxy, [lying], tmp_path)
    mount.expect("its table of contents, by which it was shown, says otherwise than its tar: .*'/last'")
    mount.fusestore("pull", "--lazy", name).ok()
    mount.mount()
    _wait_until_complete(mount)
    wait_until(lambda: "says otherwise" in mount.log())
    mount.umount()
    mount.mount()
    assert mount.sh("stat -c %a $1/last", ROOT).ok() == "640\n"


# How it becomes an ordinary image


def test_it_is_completed_in_the_background(
    mount: Mount, registry: DockerRegistry, tmp_path: Path, area: Path
) -> None:
    """After that it needs no registry. A container that was entered before goes on in it."""
    stargz = make_stargz(_members())
    with docker_registry(area / f"own-{secrets.token_hex(4)}") as own, proxy_of(own.port) as proxy:
        name = _fill(own, proxy, [stargz], tmp_path)
        mount.fusestore("pull", "--lazy", name).ok()
        mount.mount()
        mount.sh("mkdir containers/c; cat containers/c/rootfs/last").ok()
        _wait_until_complete(mount)
    assert mount.sh("cat containers/c/rootfs/dir/small; ls -i containers/c/rootfs/last; mkdir containers/d;"
                    "cat containers/d/rootfs/last").ok().split()[::3] == ["small", "last"]  # fmt: skip
    assert _sha256(mount, "containers/c/rootfs/dir/big") == hashlib.sha256(_NOISE).hexdigest()
    digest = hashlib.sha256(stargz.data).hexdigest()
    assert hashlib.sha256((mount.store / "blobs/sha256" / digest).read_bytes()).hexdigest() == digest
    assert mount.fusestore("check").ok() == ""


def test_an_image_that_comes_while_it_is_mounted(
    mount: Mount, registry: DockerRegistry, proxy: Proxy, tmp_path: Path
) -> None:
    write_layout(tmp_path / "empty", "app", [])
    mount.fusestore("import", _readable(tmp_path / "empty", mount.base)).ok()
    mount.mount()
    name = _fill(registry, proxy, [make_stargz(_members())], tmp_path)
    mount.fusestore("pull", "--lazy", name, "--name", "lazy").ok()
    assert mount.sh("cat images/lazy/rootfs/last").ok() == "last\n"
    _wait_until_complete(mount)


def _readable(layout: Path, base: Path) -> str:
    """An image as import takes it, where everybody can read it."""
    shutil.copytree(layout, base / layout.name)
    subprocess.run(["chmod", "-R", "a+rX", base / layout.name], check=True, timeout=10)
    return f"oci:{base / layout.name}:app"


def test_what_the_landmark_marks_is_fetched_first(
    mount: Mount, registry: DockerRegistry, proxy: Proxy, tmp_path: Path
) -> None:
    """Of all layers, before anything else of any."""
    plain = make_stargz(_members(), chunk_size=1 << 20)
    marked = make_stargz(_members(wanted=_NOISE[:99]), first=["wanted"])
    name = _fill(registry, proxy, [plain, marked], tmp_path)
    mount.fusestore("pull", "--lazy", name).ok()
    proxy.seen.clear()
    mount.mount()
    _wait_until_complete(mount)
    landmark = next(entry["offset"] for entry in marked.entries if entry["name"] == LANDMARK)
    assert _ranges(proxy)[0] == (0, landmark)
    first = proxy.requests(BLOBS)[0]
    assert hashlib.sha256(marked.data).hexdigest() in first.path


@pytest.mark.parametrize("how", ["pull", "import", "push", "commit", "hydrate", "blob", "tar", "skopeo"])
def test_what_needs_all_of_it_fetches_it(
    mount: Mount, registry: DockerRegistry, proxy: Proxy, tmp_path: Path, how: str
) -> None:
    stargz = make_stargz(_members())
    name = _fill(registry, proxy, [stargz], tmp_path)
    mount.expect(_MISSING)
    mount.fusestore("pull", "--lazy", name).ok()
    if how in ("blob", "tar", "skopeo"):
        held = hold_back(proxy)
        mount.mount()
        wait_until(lambda: held.done > 0)
        proxy.faults.clear()
    if how == "pull":
        mount.fusestore("pull", name).ok()
    elif how == "import":
        mount.fusestore("import", _readable(next(tmp_path.glob("lazy-*")), mount.base)).ok()
    elif how == "push":
        mount.fusestore("push", "default", f"{proxy.name}/lazy/{secrets.token_hex(8)}").ok()
    elif how == "commit":
        mount.fusestore("create", "default", "c").ok()
        mount.fusestore("commit", "c", "localhost/committed").ok()
    elif how == "hydrate":
        mount.fusestore("hydrate", "default").ok()
    elif how == "skopeo":
        source, target = f"oci:{mount.mountpoint}/views/oci:{name}", f"oci:{mount.base}/back:app"
        mount.person.run("skopeo", "--insecure-policy", "copy", source, target).ok()
    else:
        digest = stargz.diff_id[7:] if how == "tar" else hashlib.sha256(stargz.data).hexdigest()
        assert _sha256(mount, f"images/default/layers/0/{how}") == digest
        size = int(mount.sh("stat -c %s images/default/layers/0/$1", how).ok())
        assert size == int(mount.sh("wc -c < images/default/layers/0/$1", how).ok())
    assert not _is_lazy(mount)
    assert mount.fusestore("check").ok() == ""


@pytest.mark.root
@pytest.mark.parametrize("person", ["root"], indirect=True, scope="session")
def test_podman_runs_a_lazy_image(
    mount: Mount, registry: DockerRegistry, proxy: Proxy, tmp_path: Path
) -> None:
    """What it reads is fetched. To save it, podman wants to know first how long its tar is."""
    busybox = tarfile.TarInfo("bin/busybox")
    busybox.mode = 0o755
    content = Path("/bin/busybox").read_bytes()
    busybox.size = len(content)
    stargz = make_stargz([*_members(), (busybox, content)])
    name = _fill(registry, proxy, [stargz], tmp_path)
    mount.expect(_MISSING)
    hold_back(proxy)
    mount.fusestore("pull", "--lazy", name).ok()
    mount.mount()
    with podman_of(mount.person, mount.mountpoint / "views/podman") as podman:
        shown = podman("images", "--no-trunc", "--format", "{{.ID}}", name).ok().split()
        assert shown[0] == "sha256:" + mount.sh("readlink images/default").ok().strip()
        command = "busybox cat last; echo more >> last"
        assert podman.run("--name", "job", name, "/bin/busybox", "sh", "-c", command).ok() == "last\n"
        assert "C /last" in podman("diff", "job").ok().splitlines()
        assert _is_lazy(mount)
        archive = podman.base / "saved.tar"
        save = ("save", "--quiet", "--format", "docker-archive", "--output", archive, name)
        assert podman(*save).code
        assert _is_lazy(mount)
        _let_go(mount, proxy, name)
        podman(*save).ok()
        with tarfile.open(archive) as tar:
            (manifest,) = json.load(tar.extractfile("manifest.json"))  # type: ignore[arg-type]
            (layer,) = manifest["Layers"]
            digest = hashlib.file_digest(tar.extractfile(layer), "sha256").hexdigest()  # type: ignore[arg-type]
    assert f"sha256:{digest}" == stargz.diff_id


def test_looking_at_an_image_does_not_wait_for_it(
    mount: Mount, registry: DockerRegistry, proxy: Proxy, tmp_path: Path
) -> None:
    """Names are listed; what a container changed is exported and compared, the rest fetched by its chunks."""
    _mount_held(mount, registry, proxy, tmp_path)
    assert mount.sh("ls images/default/layers/0").ok().split() == ["blob", "rootfs", "tar"]
    mount.sh("mkdir containers/c; echo more >> containers/c/rootfs/last").ok()
    assert mount.fusestore("diff", "c").ok() == "C /last\n"
    script = "fusestore export c | tar -xO ./last last 2>/dev/null"
    found = mount.person.run("sh", "-c", script, env=mount.environment)
    assert found.out == "last\nmore\n"
    assert mount.fusestore("df").ok()
    assert _is_lazy(mount)


def test_a_lazy_image_is_deleted(
    mount: Mount, registry: DockerRegistry, proxy: Proxy, tmp_path: Path
) -> None:
    name = _mount_held(mount, registry, proxy, tmp_path)
    mount.sh("cat $1/last; id=$(readlink images/default); rm images/default images/$2; rmdir images/$id",
             ROOT, name).ok()  # fmt: skip
    assert list(mount.store.glob("layers/*")) == []
    assert mount.fusestore("check").ok() == ""


def test_what_nobody_needs_of_a_lazy_image_is_reclaimed(
    mount: Mount, registry: DockerRegistry, proxy: Proxy, tmp_path: Path
) -> None:
    name = _fill(registry, proxy, [make_stargz(_members())], tmp_path)
    mount.fusestore("pull", "--lazy", name, "--name", "localhost/x").ok()
    index = mount.store / "index.json"
    document = json.loads(index.read_text())
    document["manifests"] = document["manifests"][:1]
    document["manifests"][0]["annotations"].pop("org.opencontainers.image.ref.name")
    index.write_text(json.dumps(document))
    mount.fusestore("gc").ok()
    assert list(mount.store.glob("layers/*")) == list(mount.store.glob("images/*")) == []
    assert mount.fusestore("check").ok() == ""


def test_check_finds_what_a_lazy_layer_is_shown_by_damaged(
    mount: Mount, registry: DockerRegistry, proxy: Proxy, tmp_path: Path
) -> None:
    name = _fill(registry, proxy, [make_stargz(_members())], tmp_path)
    mount.fusestore("pull", "--lazy", name).ok()
    (directory,) = mount.store.glob("layers/*/lazy.*")
    for file in ("chunks", "index", "origin"):
        data = (directory / file).read_bytes()
        (directory / file).write_bytes(data[:-1])
        result = mount.fusestore("check")
        assert result.code == 1
        assert result.out == f"{directory}: is damaged: pull the image again\n"
        (directory / file).write_bytes(data)
    assert mount.fusestore("check").ok() == ""


def test_credentials_are_read_anew_and_never_kept(
    mount: Mount, locked_registry: DockerRegistry, tmp_path: Path, credentials: Callable[[Path], Path]
) -> None:
    """The mount's own environment says where they are."""
    name = f"{locked_registry.name}/lazy/{secrets.token_hex(8)}"
    write_layout(tmp_path / "locked", "app", [_as_blob(make_stargz(_members()))])
    skopeo("copy", "--dest-tls-verify=false", f"--dest-creds={USER}:{PASSWORD}",
           f"oci:{tmp_path}/locked:app", f"docker://{name}")  # fmt: skip
    authfile = credentials(mount.base / "auth.json")
    env = {**mount.environment, "REGISTRY_AUTH_FILE": str(authfile)}
    mount.person.run("fusestore", "pull", "--lazy", name, env=env).ok()
    right = authfile.read_text()
    authfile.write_text(json.dumps({"auths": {locked_registry.name: {"auth": WRONG}}}))
    mount.expect(f"does not let you have or change {name.partition('/')[2]}")
    mount.person.run("fusestore", "mount", mount.mountpoint, env=env).ok()
    mount.sh("cat $1/last", ROOT).fails_with(errno.EIO)
    authfile.write_text(right)
    wait_until(lambda: mount.sh("cat $1/last", ROOT).out == "last\n")
    _wait_until_complete(mount)
    for options in ((), ("--json",), ("--prometheus",)):
        _has_no_secret(mount.fusestore("status", mount.mountpoint, *options).ok().encode())
    (pid,) = mount.pids()
    for file in (*mount.store.rglob("*"), *mount.run_dir.rglob("*"), Path(f"/proc/{pid}/cmdline")):
        if file.is_file():
            _has_no_secret(file.read_bytes())


WRONG = base64.b64encode(f"{USER}:wr0ng-pass".encode()).decode()


def _has_no_secret(data: bytes) -> None:
    pair = base64.b64encode(f"{USER}:{PASSWORD}".encode())
    assert not any(secret in data for secret in (PASSWORD.encode(), pair, b"wr0ng-pass", WRONG.encode()))


def _as_blob(stargz: Stargz) -> Blob:
    return Blob(stargz.data, stargz.diff_id, annotations=stargz.annotations)


@pytest.fixture
def credentials(locked_registry: DockerRegistry, person: Person) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        path.write_text(
            json.dumps({"auths": {locked_registry.name: {"auth": "c29tZW9uZTpzM2NyZXQtcGFzcw=="}}})
        )
        os.chown(path, person.uid, person.gid)
        return path

    return write
