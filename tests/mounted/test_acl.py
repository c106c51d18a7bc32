"""POSIX ACLs, beside the file system below: the same commands give the same lists, modes and errors.

Root's mount enforces them; in a plain user's own mount they are kept, as owners are, and followed by nobody.
"""

import errno
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rig.images import Images
from rig.mounts import Mount
from rig.ocisources import SourceMaker
from rig.people import Person, as_root, as_user

pytestmark = [pytest.mark.mounted, pytest.mark.images]


def _both(mounted: Mount, container: str, script: str, *arguments: str) -> tuple[str, str]:
    """What a script says, run in a fresh directory of the rootfs and in one of the file system below."""
    said = []
    for place in (mounted.containers / container / "rootfs/tmp", mounted.base):
        enter = f'mkdir "$0/here" && cd "$0/here" || exit 99\n{script}\ncd .. && rm -r here'
        result = mounted.person.run("bash", "-c", f"exec 2>&1\n{enter}", place, *arguments)
        assert result.code == 0, result.out
        said.append(result.out.replace(str(place), "."))
    return said[0], said[1]


_SHOW = "getfacl -nR . | grep -v '^$'; find . -printf '%P %m\\n' | sort"

SCRIPTS = {
    "a user more": "touch f; chmod 640 f; setfacl -m u:12:rw f",
    "chmod changes the mask": "touch f; setfacl -m u:12:rwx,g:13:rx f; chmod 640 f; chmod 604 f",
    "no mask, chmod sets the group": "touch f; setfacl -m u:12:rwx f; setfacl -b f; chmod 641 f",
    "a mask takes away": "touch f; setfacl -m u:12:rwx,m:r f; stat -c %A f",
    "a list that is no more than a mode": "touch f; setfacl --set u::rw,g::x,o::w f; getfattr -m system f",
    "an entry removed": "touch f; setfacl -m u:12:r,u:13:w f; setfacl -x u:12 f",
    "the list removed": "mkdir d; setfacl -m u:12:rwx,d:u:12:rwx d; setfacl -b d",
    "the default removed": "mkdir d; setfacl -m d:u:12:rwx d; setfacl -k d; touch d/f",
    "no default on a file": "touch f; setfacl -m d:u:12:r f",
    "inherited": "mkdir d; setfacl -m d:u:12:rwx,d:g:13:rx d; touch d/f; mkdir -p d/e/e; ln -s f d/l",
    "inherited with a mode": "mkdir d; setfacl -m d:u:12:rwx d; install -m 700 /bin/true d/f; cp d/f d/g",
    "inherited again": "mkdir d; setfacl -m d:u:1:r d; touch d/f; mkdir d/e; rm -r d/?; touch d/e; mkdir d/f",
    "a default that is a mode": "mkdir d; setfacl -m d:u::rwx,d:g::rx,d:o::- d; touch d/f; mkdir d/e",
    "a default for the owner": "mkdir d; setfacl -m d:u::r,d:g:5:rwx,d:o::r d; touch d/f; mkdir d/e",
    "moved in": "mkdir d; setfacl -m d:u:12:rwx d; touch f; mv f d",
    "linked": "touch f; setfacl -m u:12:rwx f; ln f g; chmod 600 g",
    "copied": "touch f; setfacl -m u:12:rwx f; cp -a f g; cp f h; mkdir d; setfacl -m d:u:12:r d; cp -a d e",
    "a symlink has none": "ln -s nothing l; setfacl -P -m u:12:r l; getfattr -h -m system l",
    "many entries": "touch f; setfacl -m $(seq -s, -f u:%.0f:rx 1 300) f",
    "nonsense": "touch f; setfattr -n system.posix_acl_access -v 0x0200000099 f; setfattr -n system.k -v x f",
}  # fmt: skip


@pytest.mark.parametrize("what", SCRIPTS)
def test_lists_are_as_elsewhere(mounted: Mount, container: str, what: str) -> None:
    # The kernel takes a plain user's umask off before anybody can know that a default ACL makes up for it.
    umask = "umask 027" if mounted.person.is_root else "umask 0"
    found, expected = _both(mounted, container, f"{umask}\n{SCRIPTS[what]}\n{_SHOW}")
    assert found == expected


@as_root
def test_a_fifo_has_a_list(mounted: Mount, container: str) -> None:
    script = f"mkdir d; setfacl -m d:u:12:rwx d; mkfifo d/p f; mknod d/n c 1 3; setfacl -m u:12:r f; {_SHOW}"
    assert len(set(_both(mounted, container, script))) == 1


ACCESSES = "for f in f d/f; do cat $f; echo x >> $f; done; ls d; touch d/new; (cd d); rm d/f"
LISTS = ["u:4242:r", "u:4242:-", "g:4242:rw", "g:4243:r", "u:4242:rwx,m:r", "g:4242:r,g:4244:w", "u:1:rwx"]


@pytest.fixture(scope="module")
def shared(person: Person, images: Images, area: Path) -> Iterator[Mount]:
    """A mount that others may enter, with a container `c`."""
    mount = Mount(person, area / f"acl-{person.name}", "--allow-other")
    try:
        mount.fusestore("import", images.busybox.source).ok()
        mount.mount().sh("mkdir containers/c").ok()
        yield mount
    finally:
        mount.close()


@as_root
@pytest.mark.parametrize("entries", LISTS)
def test_who_may_what_is_as_elsewhere(shared: Mount, entries: str) -> None:
    """For somebody who owns nothing; the mode is changed after the list."""
    script = f"""
        chmod 755 .
        for mode in 600 640 606 777; do
            mkdir d; echo a > f; echo b > d/f; setfacl -m {entries} f d d/f; chmod $mode f d d/f
            setpriv --reuid 4242 --regid 4242 --groups 4243,4244 bash -c '{ACCESSES}'
            setpriv --reuid 4242 --regid 4242 --groups 4243 bash -c 'cat f'
            rm -r f d
        done
    """
    assert len(set(_both(shared, "c", script))) == 1


@as_root
@pytest.mark.parametrize("groups", ["--clear-groups", "--groups 100", "--regid 100 --clear-groups"])
def test_the_set_group_id_bit_goes_from_who_is_not_in_the_group(shared: Mount, groups: str) -> None:
    script = f"""
        chmod 777 .; for f in f g; do touch $f; chown 4242:100 $f; chmod 2755 $f; done
        setpriv --reuid 4242 --regid 4242 {groups} setfacl -m u:7:rwx f
        setpriv --reuid 4242 --regid 4242 {groups} chmod 2754 g
        {_SHOW}
    """
    assert len(set(_both(shared, "c", script))) == 1


def _commands(seed: int) -> list[str]:
    """Random commands on few names, so that they meet each other's work."""
    pick = random.Random(seed)
    names = ["a", "b", "c", "a/b", "b/a", "a/c", "a/b/c"]

    def acl() -> str:
        entries = [
            f"{pick.choice(('u', 'g'))}:{pick.choice((11, 12))}:{pick.choice(('r', 'rw', 'rwx', '-', 'x'))}"
            for _ in range(pick.randint(1, 3))
        ]
        return ",".join(pick.choice(("", "d:")) + entry for entry in entries)

    makers: list[Callable[[str], str]] = [
        lambda name: f"mkdir {name}",
        lambda name: f"mkdir -m 2770 {name}",
        lambda name: f"touch {name}",
        lambda name: f"rm -r {name}",
        lambda name: f"mv -T {name} {pick.choice(names)}",
        lambda name: f"cp -aT {name} {pick.choice(names)}x",
        lambda name: f"chmod {pick.randrange(512) | 0o700:o} {name}",
        lambda name: f"setfacl -m {acl()} {name}",
        lambda name: f"setfacl --set u::rwx,g::{pick.choice('rx-')},o::-,{acl()},m::rx {name}",
        lambda name: f"setfacl -{pick.choice('bk')} {name}",
        lambda name: f"setfacl -x u:{pick.choice((11, 12))} {name}",
    ]
    return [pick.choice(makers)(pick.choice(names)) for _ in range(60)]


@pytest.mark.parametrize("seed", range(6))
def test_random_lists_are_as_elsewhere(mounted: Mount, container: str, seed: int) -> None:
    umask = "umask 022" if mounted.person.is_root else "umask 0"
    script = "\n".join((umask, *_commands(seed), "chmod -R u+rwX .", _SHOW))
    found, expected = _both(mounted, container, script)
    assert found == expected


@as_root
def test_lists_are_on_disk(fresh: Mount) -> None:
    """The upper holds them as overlayfs does."""
    # Of a layer's file in EROFS overlayfs says EOPNOTSUPP (test_kernel_drivers.py).
    copied = "touch etc etc/passwd" if fresh.person.driver == "erofs" else ":"
    script = f"""
        mkdir containers/a; cd containers/a/rootfs; {copied}
        setfacl -m d:u:12:rwx etc; touch etc/f; mkdir etc/d; setfacl -m g:13:rw etc/passwd;
        getfacl -nR etc
    """
    shown = fresh.sh(script).ok()
    fresh.umount()
    fresh.mount()
    assert fresh.sh("cd containers/a/rootfs; getfacl -nR etc").ok() == shown
    fresh.umount()
    below = fresh.person.run("getfacl", "-nR", "etc", cwd=fresh.store / "containers/a/diff").ok()
    assert set(below.split("\n\n")) <= set(shown.split("\n\n")) and "etc/d" in below
    fresh.mount()


WRITERS = {
    "GNU tar": "tar --acls --numeric-owner -cf ../layer.tar .",
    "GNU tar, as xattrs": "tar --xattrs --xattrs-include=* -cf ../layer.tar .",
    "bsdtar": "bsdtar --acls -cf ../layer.tar .",
}


@as_root
@pytest.mark.parametrize("writer", WRITERS)
def test_lists_come_with_the_layers(unmounted: Mount, writer: str) -> None:
    """In each spelling; shown, followed, and kept by the copy-up."""
    base = unmounted.base
    script = f"""
        mkdir made; cd made; mkdir d; echo x > d/f; chmod 711 .
        setfacl -m u:4242:r,g:4243:rwx d/f; setfacl -m u:4242:x,d:u:4244:rwx d; getfacl -nR .
        {WRITERS[writer]}
    """
    expected = unmounted.person.run("bash", "-c", script, cwd=base).ok()
    maker = SourceMaker()
    source = maker.add(maker.image([(base / "layer.tar").read_bytes()]), "acl").directory(base / "source")
    unmounted.fusestore("import", source, "--name", "acl").ok()
    unmounted.options = ("--allow-other",)
    unmounted.mount()
    unmounted.fusestore("create", "acl", "a").ok()
    assert unmounted.sh("cd images/acl/rootfs && getfacl -nR .").ok() == expected
    read = "cd containers/a/rootfs; setpriv --reuid 4242 --regid 4242 --clear-groups cat d/f"
    assert unmounted.sh(read).ok() == "x\n"
    unmounted.sh("cd containers/a/rootfs; echo y >> d/f; touch -d @0 d").ok()
    assert unmounted.sh("cd containers/a/rootfs && getfacl -nR .").ok() == expected


@as_user
def test_a_plain_users_lists_are_kept(fresh: Mount) -> None:
    """What `cp -a` and `rsync -A` copied is there for who copies it out again."""
    script = "mkdir containers/a && cd containers/a/rootfs/tmp && touch f && setfacl -m u:12:rw,g:13:r f"
    fresh.sh(f"{script} && chmod 620 f").ok()
    shown = fresh.sh("getfacl -nc containers/a/rootfs/tmp/f").ok()
    assert shown.split() == [
        *["user::rw-", "user:12:rw-", "#effective:-w-", "group::r--", "#effective:---"],
        *["group:13:r--", "#effective:---", "mask::-w-", "other::---"],
    ]
    fresh.umount()
    fresh.mount()
    assert fresh.sh("getfacl -nc containers/a/rootfs/tmp/f").ok() == shown


@as_user
def test_a_plain_users_umask_is_taken_off_below_a_default_too(mounted: Mount, container: str) -> None:
    script = (
        "umask 077; cd containers/$1/rootfs/tmp; mkdir d; setfacl -m d:u:12:rwx d; touch d/f; getfacl -nc d/f"
    )
    assert "mask::---" in mounted.sh(script, container).ok()


@as_user
def test_a_plain_users_fifo_has_no_list(mounted: Mount, container: str) -> None:
    script = "cd containers/$1/rootfs/tmp; mkfifo p; setfacl -m u:12:r p"
    mounted.sh(script, container).fails_with(errno.EPERM)
