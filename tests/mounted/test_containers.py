"""/containers on a real mount: making, renaming, removing, with the tools of a shell (design section 2)."""

import errno
import json
import os

import pytest
from rig.images import Images
from rig.mounts import Mount, wait_until

pytestmark = [pytest.mark.mounted, pytest.mark.images]

PERSONS = ("root", "user", "erofs", "overlay", "overlay-user")


def test_mkdir_makes_a_whole_container(mounted: Mount, container: str) -> None:
    assert mounted.sh("ls -U containers/$1", container).ok().split() == [
        "metadata.json",
        "rootfs",
        "workdir",
        "rundir",
    ]


def test_mkdir_takes_the_image_tagged_default(mounted: Mount, container: str) -> None:
    shown = json.loads(mounted.sh("cat containers/$1/metadata.json", container).ok())
    default = os.path.basename(mounted.sh("readlink images/default").ok().strip())
    # It says more what the image is called besides.
    assert (shown["image-name"], shown["image-id"]) == ("busybox", default)


def test_the_rootfs_of_a_new_container_is_the_image(mounted: Mount, container: str) -> None:
    assert mounted.sh("cat containers/$1/rootfs/etc/hostname", container).ok() == "busybox\n"


def test_mkdir_p_and_trailing_slashes_work(mounted: Mount) -> None:
    name = mounted.new_id()
    mounted.sh("mkdir -p containers/$1/ && mkdir -p containers/$1 && rmdir containers/$1/", name).ok()


def test_mkdir_m_takes_the_one_mode_there_is(mounted: Mount) -> None:
    name = mounted.new_id()
    mounted.sh("mkdir -m 755 containers/$1 && rmdir containers/$1", name).ok()
    mounted.sh("mkdir -m 700 containers/$1", name).fails_with(errno.EPERM)
    mounted.sh("rmdir containers/$1", name).ok()


def test_a_second_mkdir_of_an_id_is_refused(mounted: Mount, container: str) -> None:
    mounted.sh("mkdir containers/$1", container).fails_with(errno.EEXIST)


def test_mkdir_of_a_taken_name_is_refused(mounted: Mount, container: str) -> None:
    mounted.sh('echo \'{"name": "taken-name"}\' > containers/$1/metadata.json', container).ok()
    mounted.sh("mkdir containers/taken-name").fails_with(errno.EEXIST)


@pytest.mark.parametrize("name", ["-x", ".hidden", "_x", "a b", "ü", "a:b", "a\nb", "a" * 129, "~"])
def test_what_cannot_be_an_id_is_refused(mounted: Mount, name: str) -> None:
    mounted.sh('mkdir -- containers/"$1"', name).fails_with(errno.EINVAL)
    assert name not in mounted.sh("ls containers").ok().split("\n")


@pytest.mark.parametrize("name", ["0", "A.b_c-d", "9..", "a" * 128])
def test_what_can_be_an_id_is_taken(mounted: Mount, name: str) -> None:
    mounted.sh("mkdir containers/$1 && test -e containers/$1/rootfs/bin && rmdir containers/$1", name).ok()


@pytest.mark.parametrize(
    "command",
    ["touch x", "echo > x", "ln -s id x", "mkfifo x", "cp ../images/default/config.json x"],
)
def test_nothing_but_directories_can_be_made(mounted: Mount, command: str) -> None:
    mounted.sh(f"cd containers; {command}").fails_with(errno.EPERM)
    assert "x" not in mounted.sh("ls containers").ok().split()


def test_rmdir_removes_a_container_with_all_that_is_in_it(mounted: Mount) -> None:
    name = mounted.new_id()
    script = "mkdir containers/$1 && cp -r /etc/apt containers/$1/rootfs/ && echo x > containers/$1/workdir/x"
    mounted.sh(script, name).ok()
    mounted.sh("rmdir containers/$1", name).ok()
    mounted.sh("stat containers/$1", name).fails_with(errno.ENOENT)
    assert name not in mounted.sh("ls containers").ok().split()


def test_what_was_removed_leaves_the_disk(fresh: Mount) -> None:
    fresh.sh("mkdir containers/a && cp /bin/bash containers/a/rootfs/big && rmdir containers/a").ok()
    assert os.listdir(fresh.store / "containers") == []
    wait_until(lambda: not os.listdir(fresh.store / "trash"))


def test_what_a_mount_left_in_the_trash_the_next_deletes(unmounted: Mount) -> None:
    unmounted.person.run("mkdir", "-p", unmounted.store / "trash/left/deep").ok()
    unmounted.mount()
    wait_until(lambda: not os.listdir(unmounted.store / "trash"))


def test_an_id_can_be_used_again_after_rmdir(mounted: Mount) -> None:
    name = mounted.new_id()
    mounted.sh("cd containers && mkdir $1 && echo old > $1/rootfs/file && rmdir $1", name).ok()
    mounted.sh("mkdir containers/$1", name).ok()
    mounted.sh("cat containers/$1/rootfs/file", name).fails_with(errno.ENOENT)
    mounted.sh("rmdir containers/$1", name).ok()


@pytest.mark.parametrize("remove", ["rm -r", "rm -rf", "find containers/$1 -delete; :"])
def test_rm_r_removes_a_container(mounted: Mount, remove: str) -> None:
    name = mounted.new_id()
    mounted.sh("mkdir containers/$1 && cp -r /etc/apt containers/$1/rootfs/", name).ok()
    command = remove if "$1" in remove else f"{remove} containers/$1"
    result = mounted.sh(command, name)
    if remove == "rm -r":
        result.ok()
    if remove.startswith("find"):
        # find lists a directory whole before it deletes anything: it need not succeed, it must not hang or
        # lie.
        mounted.sh("rm -rf containers/$1", name).ok()
    mounted.sh("stat containers/$1", name).fails_with(errno.ENOENT)
    assert not (mounted.store / "containers" / name).exists()


def test_rm_r_does_not_walk_the_rootfs(mounted: Mount, container: str) -> None:
    script = "cd containers/$1; echo x > rootfs/written; echo x > workdir/written; rm metadata.json"
    mounted.sh(script, container).ok()
    shown = mounted.sh("cd containers/$1; for i in rootfs workdir rundir; do ls -A $i; done", container)
    assert shown.ok() == ""
    assert len(list((mounted.store / "containers" / container).rglob("written"))) == 2


def test_making_metadata_json_again_takes_a_removal_back(mounted: Mount, container: str) -> None:
    script = "cd containers/$1 && echo kept > rootfs/file && cp metadata.json $2 && rm metadata.json"
    mounted.sh(script, container, mounted.base / "saved").ok()
    mounted.sh("cp $2 containers/$1/metadata.json", container, mounted.base / "saved").ok()
    assert mounted.sh("cat containers/$1/rootfs/file", container).ok() == "kept\n"


def test_a_removal_ends_with_the_last_rmdir(mounted: Mount) -> None:
    name = mounted.new_id()
    script = "cd containers; mkdir $1; cd $1; rm metadata.json; rmdir rootfs workdir rundir; ls -A ."
    assert mounted.sh(script, name).ok() == ""
    assert (mounted.store / "containers" / name).exists()
    mounted.sh("rmdir containers/$1", name).ok()
    assert not (mounted.store / "containers" / name).exists()


@pytest.mark.parametrize("directory", ["rootfs", "workdir", "rundir"])
def test_the_parts_of_a_container_stay_while_it_is_not_being_removed(
    mounted: Mount, container: str, directory: str
) -> None:
    mounted.sh("rmdir containers/$1/$2", container, directory).fails_with(mounted.refusal_of(directory))
    mounted.sh("ls containers/$1/$2", container, directory).ok()


def test_mv_renames_a_container(mounted: Mount) -> None:
    old, new = mounted.new_id(), mounted.new_id()
    mounted.sh("mkdir containers/$1 && echo here > containers/$1/rootfs/file", old).ok()
    mounted.sh("mv containers/$1 containers/$2", old, new).ok()
    assert mounted.sh("cat containers/$1/rootfs/file", new).ok() == "here\n"
    assert json.loads(mounted.sh("cat containers/$1/metadata.json", new).ok())["id"] == new
    mounted.sh("stat containers/$1", old).fails_with(errno.ENOENT)
    mounted.sh("rmdir containers/$1", new).ok()


def test_what_the_kernel_knew_of_a_container_goes_with_its_new_id(mounted: Mount) -> None:
    """What makes something is not tried again, as what opens is, where the kernel is told ESTALE."""
    old, new = mounted.new_id(), mounted.new_id()
    known = """
        cd containers
        mkdir $1 && mkdir $1/rootfs/d $1/workdir/d $1/rundir/d && touch $1/{rootfs,workdir,rundir}/d/file
        ls -l $1/*/d > /dev/null && mv $1 $2 || exit 1
        for part in rootfs workdir rundir; do
            cd $2/$part/d && mkdir a && ln -s x b && mkfifo c && ln file e && mv file f && echo > g || exit 2
            cd $OLDPWD
        done
        ls $2/*/d | grep -c '[a-g]$'; rmdir $2
    """
    assert mounted.sh(known, old, new).ok() == "18\n"


def test_mv_to_a_taken_id_is_refused(mounted: Mount, container: str) -> None:
    other = mounted.new_id()
    mounted.sh("mkdir containers/$1", other).ok()
    mounted.sh("mv -T containers/$1 containers/$2", container, other).fails_with(errno.EEXIST)
    mounted.sh("rmdir containers/$1", other).ok()


def test_mv_to_what_cannot_be_an_id_is_refused(mounted: Mount, container: str) -> None:
    with pytest.raises(OSError) as caught:
        mounted.person.call(os.rename, mounted.containers / container, mounted.containers / ".hidden")
    assert caught.value.errno == errno.EINVAL


def test_mv_out_of_containers_changes_nothing(mounted: Mount, container: str) -> None:
    result = mounted.sh("mv -T containers/$1 images/x", container)
    assert result.code != 0
    mounted.sh("cat containers/$1/rootfs/etc/hostname", container).ok()
    mounted.sh("rm -r images/x").ok()  # directories for tags are what mv could make there


def test_a_name_is_a_symlink_to_the_id(mounted: Mount, container: str) -> None:
    mounted.sh('echo \'{"name": "by-name"}\' > containers/$1/metadata.json', container).ok()
    assert mounted.sh("readlink containers/by-name").ok().strip() == container
    assert mounted.sh("cat containers/by-name/rootfs/etc/hostname").ok() == "busybox\n"


def test_mv_renames_a_name(mounted: Mount, container: str) -> None:
    mounted.sh('echo \'{"name": "name-1"}\' > containers/$1/metadata.json', container).ok()
    mounted.sh("mv containers/name-1 containers/name-2").ok()
    shown = json.loads(mounted.sh("cat containers/name-2/metadata.json").ok())
    assert (shown["id"], shown["name"]) == (container, "name-2")
    mounted.sh("stat containers/name-1").fails_with(errno.ENOENT)


def test_rm_of_a_name_leaves_the_id(mounted: Mount, container: str) -> None:
    mounted.sh(
        "echo '{\"name\": \"n-'$1'\"}' > containers/$1/metadata.json; rm containers/n-$1", container
    ).ok()
    assert mounted.sh("jq -r .name containers/$1/metadata.json", container).ok() == f"{container}\n"


def test_the_name_goes_with_the_container(mounted: Mount) -> None:
    name = mounted.new_id()
    script = 'cd containers && mkdir $1 && echo \'{"name": "goes-too"}\' > $1/metadata.json && rmdir $1'
    mounted.sh(script, name).ok()
    mounted.sh("readlink -v containers/goes-too").fails_with(errno.ENOENT)


@pytest.mark.parametrize("command", ["rmdir $1", "rm -r $1", "mv $1 x"])
def test_a_container_with_an_open_file_is_busy(mounted: Mount, container: str, command: str) -> None:
    script = f"cd containers; exec 3< $1/rootfs/etc/hostname; {command}"
    mounted.sh(script, container).fails_with(errno.EBUSY)
    assert mounted.sh("cat containers/$1/rootfs/etc/hostname", container).ok() == "busybox\n"


def test_a_locked_container_is_busy_and_the_mount_goes_on(mounted: Mount, container: str) -> None:
    other = mounted.new_id()
    script = """
        mkdir containers/$2
        flock -x $3/containers/$1 sh -c "
            cat containers/$1/rootfs/etc/hostname & cat containers/$2/rootfs/etc/hostname && wait \\$!"
        code=$?
        rmdir containers/$2
        cat containers/$1/rootfs/etc/hostname
        exit $code
    """
    result = mounted.sh(script, container, other, mounted.store)
    assert result.out == "busybox\nbusybox\n"
    result.fails_with(errno.EBUSY)


def test_two_containers_of_one_image_are_distinct(mounted: Mount, container: str) -> None:
    other = mounted.new_id()
    mounted.sh("mkdir containers/$1 && echo a > containers/$1/rootfs/file", other).ok()
    mounted.sh("cat containers/$1/rootfs/file", container).fails_with(errno.ENOENT)
    mounted.sh("rmdir containers/$1", other).ok()


def test_the_list_is_exact(fresh: Mount) -> None:
    fresh.sh("cd containers && mkdir a b c && rmdir b").ok()
    assert sorted(fresh.sh("ls -A containers").ok().split()) == ["a", "c"]
    assert sorted(fresh.sh("ls -a containers").ok().split()) == [".", "..", "a", "c"]


def test_what_was_written_survives_a_new_mount(fresh: Mount) -> None:
    script = "cd containers && mkdir a && echo kept > a/rootfs/file && echo '{\"x\": 1}' > a/metadata.json"
    fresh.sh(script).ok()
    before = fresh.sh("cat containers/a/metadata.json; stat -c %Y:%i containers/a/rootfs/file").ok()
    fresh.umount()
    fresh.mount()
    assert fresh.sh("cat containers/a/rootfs/file").ok() == "kept\n"
    assert fresh.sh("cat containers/a/metadata.json; stat -c %Y:%i containers/a/rootfs/file").ok() == before


def test_the_mount_shows_what_the_command_did(mounted: Mount) -> None:
    name = mounted.new_id()
    mounted.sh("stat containers/$1", name).fails_with(errno.ENOENT)
    mounted.fusestore("create", "default", name).ok()
    assert mounted.sh("cat containers/$1/rootfs/etc/hostname", name).ok() == "busybox\n"
    mounted.fusestore("rm", name).ok()
    mounted.sh("stat containers/$1", name).fails_with(errno.ENOENT)
    assert name not in mounted.sh("ls containers").ok().split()


def test_the_command_sees_what_the_mount_did(mounted: Mount, container: str) -> None:
    listed = json.loads(mounted.fusestore("containers", "--json").ok())
    assert container in [one["id"] for one in listed]


def test_a_container_made_of_two_layers_shows_the_upper_one(mounted: Mount, images: Images) -> None:
    name = mounted.new_id()
    mounted.fusestore("create", "debian", name).ok()
    shown = mounted.sh("cd containers/$1/rootfs/lower; ls opaque; ls kept; cat becomes-file", name).ok()
    assert shown == "new\nfile0\nfile1\nnow a file\n"
    mounted.sh("rmdir containers/$1", name).ok()


# Unbound containers: no image is tagged default.


@pytest.fixture
def unbound(fresh: Mount) -> Mount:
    """A mount with a container `u` of no image."""
    fresh.sh("rm images/default && mkdir containers/u").ok()
    return fresh


def test_without_a_default_the_rootfs_is_an_empty_directory(unbound: Mount) -> None:
    assert unbound.sh("ls -A containers/u/rootfs").ok() == ""
    unbound.sh("echo x > containers/u/rootfs/x && cat containers/u/rootfs/x").ok()


def test_an_unbound_container_says_so(unbound: Mount) -> None:
    shown = json.loads(unbound.sh("cat containers/u/metadata.json").ok())
    assert (shown["image-name"], shown["image-id"]) == ("", "")


def test_writing_image_name_binds(unbound: Mount) -> None:
    unbound.sh('echo \'{"image-name": "busybox"}\' > containers/u/metadata.json').ok()
    assert unbound.sh("cat containers/u/rootfs/etc/hostname").ok() == "busybox\n"


def test_writing_image_id_binds(unbound: Mount) -> None:
    image_id = unbound.sh("readlink images/busybox").ok().strip()
    unbound.sh('echo "{\\"image-id\\": \\"$1\\"}" > containers/u/metadata.json', image_id).ok()
    assert unbound.sh("cat containers/u/rootfs/etc/hostname").ok() == "busybox\n"


@pytest.mark.parametrize("used", ["echo x > containers/u/rootfs/x", "ls containers/u/rootfs"])
def test_binding_is_refused_once_the_rootfs_was_used(unbound: Mount, used: str) -> None:
    unbound.sh(used).ok()
    write = 'echo \'{"image-name": "busybox"}\' > containers/u/metadata.json'
    unbound.sh(write).fails_with(errno.EBUSY)


def test_looking_at_the_rootfs_from_outside_does_not_use_it(unbound: Mount) -> None:
    unbound.sh("ls -l containers/u; getfacl -n containers/u/rootfs; getfattr -dm- containers/u/rootfs").ok()
    unbound.sh('echo \'{"image-name": "busybox"}\' > containers/u/metadata.json').ok()
    assert unbound.sh("cat containers/u/rootfs/etc/hostname").ok() == "busybox\n"


def test_binding_to_no_image_is_refused(unbound: Mount) -> None:
    result = unbound.sh('echo \'{"image-name": "no-such"}\' > containers/u/metadata.json')
    result.fails_with(errno.ENOENT)
    assert json.loads(unbound.sh("cat containers/u/metadata.json").ok())["image-name"] == ""


def test_ln_makes_another_image_the_default(fresh: Mount, images: Images) -> None:
    fresh.fusestore("import", images.debian.source, "--name", "localhost/app:1").ok()
    fresh.sh("ln -sfn localhost/app:1 images/default && mkdir containers/a").ok()
    assert fresh.sh("cat containers/a/rootfs/upper/xattrs").ok() == "xattrs\n"


@pytest.mark.parametrize("person", ["root", "user"], indirect=True)  # test_kernel_drivers.py has its own
def test_few_descriptors_serve_many_containers(unmounted: Mount) -> None:
    """Trees that nobody uses give theirs up, and have them again when somebody comes back."""
    script = "ulimit -n 256; exec fusestore mount $1"
    unmounted.person.run("bash", "-c", script, "bash", unmounted.mountpoint, env=unmounted.environment).ok()
    looks = """
        for i in $(seq 200); do mkdir containers/$i && echo $i > containers/$i/rootfs/id || exit 1; done
        ls -lR containers/*/workdir containers/*/rundir > /dev/null || exit 2
        cat containers/*/rootfs/id | sort -n | uniq | wc -l; cat containers/*/rootfs/etc/hostname | wc -l
    """
    assert unmounted.sh(looks).ok() == "200\n200\n"
    unmounted.umount()
