"""From nothing to the content of one file of an image in a registry: lazy."""

import json
import shutil
from functools import partial

from benchimages import BenchImages
from measure import Bench, Task
from rig.distribution import make_distribution
from rig.people import root
from rig.podman import podman_of
from rig.registries import docker_registry, hold_back, proxy_of
from subjects import COMMAND, run

__all__ = ["lazy"]


def lazy(bench: Bench, images: BenchImages) -> None:
    """Of Debian with a compiler."""
    place = bench.place()
    (place / "mnt").mkdir()
    env = {"FUSESTORE_STORE": str(place / "store"), "FUSESTORE_RUN_DIR": str(place / "run")}

    def ours(reference: str) -> None:
        run(*COMMAND, "pull", "--lazy", reference, env=env)
        run(*COMMAND, "mount", place / "mnt", env=env)
        run("mkdir", place / "mnt/containers/c")
        run("cat", place / "mnt/containers/c/rootfs/etc/debian_version")

    def clear() -> None:
        if (place / "store").exists():
            run(*COMMAND, "umount", place / "mnt", env=env)
            shutil.rmtree(place / "store")

    with (
        docker_registry(place / "registry") as registry,
        proxy_of(registry.port) as proxy,
        podman_of(root(), place) as podman,
    ):
        reference = f"{registry.name}/lazy/app:1"
        options = ("--dest-compress-format", "zstd:chunked", "--dest-tls-verify=false")
        run("skopeo", "copy", *options, make_distribution().source, f"docker://{reference}")

        def theirs() -> None:
            # It warns of what it finds itself: no .ok().
            assert podman("pull", "--quiet", "--tls-verify=false", reference).code == 0
            assert podman.run("--rm", reference, "cat", "/etc/debian_version").code == 0

        work = "pull --lazy, mount, mkdir, read a file"
        tasks = {
            "union": Task(partial(ours, reference), clear),
            "podman": Task(theirs, lambda: podman("rmi", "--all", "--force")),
        }
        figures = bench.alternate(work, tasks)
        clear()
        if len(figures) == len(tasks):
            bench.row(work, "union", "podman pull, podman run", figures["union"], figures["podman"], 0.1)
        hold_back(proxy)
        ours(f"{proxy.name}/lazy/app:1")
        size = json.loads(run(*COMMAND, "images", "--json", env=env))[0]["size"]
        clear()
        bench.ratio("bytes fetched until then", "union", "the image", proxy.fetched() / size)
