"""metadata.json on a real mount: every way of writing it, and what is refused (design.md section 2)."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from rig.mounts import Mount

pytestmark = [pytest.mark.mounted, pytest.mark.images]

PERSONS = ("root", "user", "erofs", "overlay", "overlay-user")


def _read(mount: Mount, container: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(mount.sh("cat containers/$1/metadata.json", container).ok())
    return found


def test_a_new_container_has_libpods_keys(mounted: Mount, container: str) -> None:
    shown = _read(mounted, container)
    assert list(shown) == ["id", "name", "image-name", "image-id", "created-at", "mounted"]
    assert (shown["id"], shown["name"], shown["mounted"]) == (container, container, False)
    assert type(shown["created-at"]) is int


def test_stat_gives_the_size_that_cat_gives(mounted: Mount, container: str) -> None:
    script = "cd containers/$1; stat -c %s metadata.json; cat metadata.json | wc -c"
    shown = mounted.sh(script, container).ok()
    assert len(set(shown.split())) == 1


WAYS = {
    "echo": "echo '{\"user\": 1}' > metadata.json",
    "echo without newline": "echo -n '{\"user\": 1}' > metadata.json",
    "printf in pieces": "(printf '{\"us'; printf 'er\": '; printf '1}') > metadata.json",
    "append": "echo '{\"user\": 1}' >> metadata.json",
    "tee": "echo '{\"user\": 1}' | tee metadata.json > /dev/null",
    "cat": "echo '{\"user\": 1}' | cat > metadata.json",
    "cp": "echo '{\"user\": 1}' > $2 && cp $2 metadata.json",
    "cp -f": "echo '{\"user\": 1}' > $2 && cp -f --remove-destination $2 metadata.json",
    "cp -p": "echo '{\"user\": 1}' > $2 && cp -p $2 metadata.json",
    "dd": "echo '{\"user\": 1}' | dd of=metadata.json status=none",
    "dd in small blocks": "echo '{\"user\": 1}' | dd of=metadata.json bs=3 status=none",
    "mv within": "echo '{\"user\": 1}' > tmp && mv tmp metadata.json",
    "mv from outside": "echo '{\"user\": 1}' > $2 && mv $2 metadata.json",
    "jq and mv": "jq '.user = 1' metadata.json > tmp && mv tmp metadata.json",
    "sed -i": "echo '{\"user\": 7}' > metadata.json && sed -i '/user/s/7/1/' metadata.json",
    "vim": "echo '{\"user\": 7}' > metadata.json && vim -es -u NONE -c '/user/s/7/1/' -c wq metadata.json",
    "vim with a backup": "echo '{\"user\": 7}' > metadata.json && "
    "vim -es -u NONE -c 'set backup backupcopy=no' -c '/user/s/7/1/' -c wq metadata.json",
    "vim in place": "echo '{\"user\": 7}' > metadata.json && "
    "vim -es -u NONE -c 'set backupcopy=yes' -c '/user/s/7/1/' -c wq metadata.json",
    "python": 'python3 -c \'open("metadata.json", "w").write("{\\"user\\": 1}")\'',
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_writing_replaces_the_document(mounted: Mount, container: str, way: str) -> None:
    before = _read(mounted, container)
    mounted.sh("cd containers/$1 && " + WAYS[way], container, mounted.base / "outside").ok()
    after = _read(mounted, container)
    assert after.pop("user") == 1
    assert after == before


def test_touch_changes_nothing(mounted: Mount, container: str) -> None:
    before = _read(mounted, container)
    mounted.sh("touch containers/$1/metadata.json", container).ok()
    assert _read(mounted, container) == before


@pytest.mark.parametrize("command", ["chmod 600", "chown 12345", "chgrp 12345"])
@pytest.mark.parametrize("person", [name for name in PERSONS if name != "overlay-user"], indirect=True)
def test_mode_and_owner_are_fixed(mounted: Mount, container: str, command: str) -> None:
    for what in ("metadata.json", "."):
        mounted.sh(f"{command} containers/$1/{what}", container).fails_with(errno.EPERM)


def test_appending_white_space_keeps_the_document(mounted: Mount, container: str) -> None:
    script = "cd containers/$1 && echo '{\"user\": 1}' > metadata.json && echo >> metadata.json"
    mounted.sh(script, container).ok()
    assert _read(mounted, container)["user"] == 1


def test_a_write_replaces_the_users_keys(mounted: Mount, container: str) -> None:
    script = "echo '{\"one\": 1}' > metadata.json; echo '{\"two\": 2}' > metadata.json"
    mounted.sh("cd containers/$1 && " + script, container).ok()
    shown = _read(mounted, container)
    assert "one" not in shown and shown["two"] == 2


def test_the_users_keys_keep_their_order(mounted: Mount, container: str) -> None:
    document = '{"z": 1, "a": 2, "m": {"y": 1, "b": 2}}'
    mounted.sh('echo "$2" > containers/$1/metadata.json', container, document).ok()
    shown = _read(mounted, container)
    assert list(shown)[-3:] == ["z", "a", "m"]
    assert list(shown["m"]) == ["y", "b"]


def test_what_was_read_can_be_written_back(mounted: Mount, container: str) -> None:
    before = mounted.sh("cat containers/$1/metadata.json", container).ok()
    script = "cd containers/$1 && cp metadata.json $2 && cp $2 metadata.json"
    mounted.sh(script, container, mounted.base / "saved").ok()
    assert mounted.sh("cat containers/$1/metadata.json", container).ok() == before


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("hello", errno.EINVAL),
        ("[1, 2]", errno.EINVAL),
        ('"text"', errno.EINVAL),
        ("12", errno.EINVAL),
        ("null", errno.EINVAL),
        ('{"a": 1} {"b": 2}', errno.EINVAL),
        ('{"a": NaN}', errno.EINVAL),
        ('{"a": 1,}', errno.EINVAL),
        ("{'a': 1}", errno.EINVAL),
        ('{"mounted": "yes"}', errno.EINVAL),
        ('{"mounted": 1}', errno.EINVAL),
        ('{"mountlabel": 5}', errno.EINVAL),
        ('{"name": ["x"]}', errno.EINVAL),
        ('{"name": "not/a/name"}', errno.EINVAL),
        ('{"created-at": "now"}', errno.EINVAL),
        ('{"id": "other"}', errno.EPERM),
        ('{"image-name": "debian"}', errno.EPERM),
        ('{"image-id": "' + "0" * 64 + '"}', errno.EPERM),
        ('{"created-at": 1}', errno.EPERM),
    ],
)
def test_what_is_refused_reaches_echo(mounted: Mount, container: str, text: str, number: int) -> None:
    before = mounted.sh("cat containers/$1/metadata.json", container).ok()
    mounted.sh('echo "$2" > containers/$1/metadata.json', container, text).fails_with(number)
    assert mounted.sh("cat containers/$1/metadata.json", container).ok() == before


def test_a_taken_name_is_refused(mounted: Mount, container: str) -> None:
    other = mounted.new_id()
    mounted.sh("mkdir containers/$1", other).ok()
    document = json.dumps({"name": other})
    mounted.sh('echo "$2" > containers/$1/metadata.json', container, document).fails_with(errno.EEXIST)
    mounted.sh("rmdir containers/$1", other).ok()


def _write_and_close(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
    written = os.write(fd, data)
    assert written == len(data)
    os.close(fd)


def test_an_unfinished_document_fails_at_close(mounted: Mount, container: str) -> None:
    mounted.expect("not one whole JSON object")
    before = mounted.sh("cat containers/$1/metadata.json", container).ok()
    path = mounted.containers / container / "metadata.json"
    with pytest.raises(OSError) as caught:
        mounted.person.call(_write_and_close, path, b'{"user": ')
    assert caught.value.errno == errno.EINVAL
    assert mounted.sh("cat containers/$1/metadata.json", container).ok() == before


def test_truncating_alone_changes_nothing(mounted: Mount, container: str) -> None:
    before = mounted.sh("cat containers/$1/metadata.json", container).ok()
    mounted.sh(": > containers/$1/metadata.json", container)
    mounted.sh("cp /dev/null containers/$1/metadata.json", container).fails_with(errno.EINVAL)
    mounted.sh("truncate -s 0 containers/$1/metadata.json", container).fails_with(errno.EINVAL)
    assert mounted.sh("cat containers/$1/metadata.json", container).ok() == before


_TOOLS = ["cp $2 metadata.json", "cat $2 > metadata.json", "tee metadata.json < $2 > $2.out"]


@pytest.mark.parametrize("tool", _TOOLS)
def test_over_1_mib_is_refused(mounted: Mount, container: str, tool: str) -> None:
    mounted.expect("not one whole JSON object")
    make = 'python3 -c \'print("{\\"user\\": \\"" + "x" * (1 << 20) + "\\"}")\' > $2'
    mounted.sh(make, container, mounted.base / "large").ok()
    before = mounted.sh("cat containers/$1/metadata.json", container).ok()
    mounted.sh("cd containers/$1 && " + tool, container, mounted.base / "large").fails_with(errno.EINVAL)
    assert mounted.sh("cat containers/$1/metadata.json", container).ok() == before


def test_readers_see_the_old_or_the_new_document(mounted: Mount, container: str) -> None:
    script = """
        cd containers/$1
        for i in $(seq 100); do
            jq --argjson i $i '.user = $i | .pad = $i * "x"' metadata.json > tmp || exit 1
            mv tmp metadata.json || exit 1
        done &
        while kill -0 $! 2> /dev/null; do jq -e .id metadata.json > /dev/null || exit 9; done
        wait $!
    """
    mounted.sh(script, container).ok()


def test_mountlabel_is_shown_when_it_is_not_empty(mounted: Mount, container: str) -> None:
    mounted.sh('echo \'{"mountlabel": "a:b:c:s0"}\' > containers/$1/metadata.json', container).ok()
    assert _read(mounted, container)["mountlabel"] == "a:b:c:s0"
    mounted.sh('echo \'{"mountlabel": ""}\' > containers/$1/metadata.json', container).ok()
    assert "mountlabel" not in _read(mounted, container)


# Scratch files beside it.


def test_scratch_files_are_ordinary_files(mounted: Mount, container: str) -> None:
    script = """
        cd containers/$1
        echo one > tmp; echo two >> tmp; cp tmp tmp2; mv tmp2 tmp3; chmod 600 tmp3; cat tmp3
        ls; rm tmp tmp3; ls
    """
    shown = mounted.sh(script, container).ok().split()
    own = ["metadata.json", "rootfs", "rundir", "workdir"]
    assert shown == ["one", "two", *sorted([*own, "tmp", "tmp3"]), *own]


def test_a_scratch_file_takes_1_mib(mounted: Mount, container: str) -> None:
    mounted.sh("head -c 1048576 /dev/zero > containers/$1/tmp", container).ok()
    mounted.sh("head -c 1048577 /dev/zero > containers/$1/tmp", container).fails_with(errno.EFBIG)


def test_scratch_files_go_with_the_mount(fresh: Mount) -> None:
    fresh.sh("mkdir containers/a && echo x > containers/a/tmp").ok()
    fresh.umount()
    fresh.mount()
    assert "tmp" not in fresh.sh("ls containers/a").ok().split()


def test_scratch_files_do_not_keep_a_container(mounted: Mount) -> None:
    name = mounted.new_id()
    mounted.sh("mkdir containers/$1 && echo x > containers/$1/tmp && rmdir containers/$1", name).ok()


@pytest.mark.parametrize("command", ["mkdir x", "ln -s y x", "mkfifo x"])
def test_only_files_can_be_made_beside_metadata_json(mounted: Mount, container: str, command: str) -> None:
    mounted.sh(f"cd containers/$1; {command}", container).fails_with(errno.EPERM)


@pytest.mark.parametrize("what", ["rootfs", "workdir", "rundir"])
def test_the_parts_of_a_container_cannot_be_renamed(mounted: Mount, container: str, what: str) -> None:
    refusal = mounted.refusal_of(what)
    mounted.sh("mv containers/$1/$2 containers/$1/x", container, what).fails_with(refusal)


# Python's API and the tree show one document.


def test_the_command_shows_the_same_document(mounted: Mount, container: str) -> None:
    mounted.sh('echo \'{"user": {"deep": [1, null, "ü"]}}\' > containers/$1/metadata.json', container).ok()
    assert json.loads(mounted.fusestore("inspect", container).ok()) == _read(mounted, container)
