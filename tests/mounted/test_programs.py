"""Real programs at work in a rootfs: what each of them says about it afterwards."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig.distribution import Distribution
from rig.mounts import Mount
from rig.people import Person, Result, as_root
from rig.snapshot import differences, snapshot

pytestmark = [pytest.mark.mounted, pytest.mark.images]


_ENTER = """
    exec unshare {namespaces} --mount --propagation private bash -ec '
        {devices}
        mount --rbind /proc "containers/$1/rootfs/proc"
        exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 TERM=dumb \\
            DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 \\
            chroot "containers/$1/rootfs" bash -ec "exec 2>&1; cd; $2" bash "${{@:3}}"
    ' bash "$@"
"""
"""What is mounted is so in a namespace of the command's own, and gone when it ends."""

_AS_ROOT = _ENTER.format(namespaces="", devices='mount -i -o remount,rw,dev,suid "$PWD"')
_AS_USER = _ENTER.format(
    namespaces="--map-root-user", devices='mount --rbind /dev "containers/$1/rootfs/dev"'
)


class Root:
    """A container of the distribution, entered by chroot."""

    def __init__(self, mount: Mount, container: str) -> None:
        self.mount = mount
        self.container = container
        self.path = mount.containers / container / "rootfs"

    def start(self, script: str, *arguments: str, deadline_s: float = 120) -> Result:
        """Runs lines of bash in it, as its root; they stop at what fails. All they print is `out`."""
        enter = _AS_ROOT if self.mount.person.is_root else _AS_USER
        return self.mount.sh(enter, self.container, script, *arguments, deadline_s=deadline_s)

    def run(self, script: str, *arguments: str, deadline_s: float = 120) -> str:
        """What the lines print, none of which fails."""
        result = self.start(script, *arguments, deadline_s=deadline_s)
        assert result.code == 0, f"exit {result.code}: {result.out[-3000:]}{result.err}"
        return result.out

    def write(self, name: str, text: str) -> None:
        """A file, `name` beginning with a slash."""
        self.mount.sh('mkdir -p "$(dirname "$1")" && printf %s "$2" > "$1"', f"{self.path}{name}", text).ok()


@pytest.fixture(scope="module")
def _distribution_mount(person: Person, distribution: Distribution, area: Path) -> Iterator[Mount]:
    # Programs of root change to other users.
    mount = Mount(person, area / f"programs-{person.name}", *(["--allow-other"] if person.is_root else []))
    try:
        mount.fusestore("import", distribution.source).ok()
        yield mount.mount()
    finally:
        mount.close()


@pytest.fixture
def debian(_distribution_mount: Mount, distribution: Distribution) -> Iterator[Root]:
    """A new container with network files, packages in /packages and wheels in /wheels."""
    root = Root(_distribution_mount, _distribution_mount.new_id())
    _distribution_mount.sh(
        'mkdir "containers/$1" && cd "containers/$1/rootfs" && '
        'cp -L /etc/resolv.conf /etc/hosts etc && echo machine > etc/hostname && cp -r "$2" "$3" .',
        root.container, distribution.packages, distribution.wheels,
    ).ok()  # fmt: skip
    yield root
    _distribution_mount.sh('rmdir "containers/$1"', root.container).ok()
    _distribution_mount.check_log()


# Package managers


@as_root
def test_every_file_of_the_distribution_is_as_its_package_says(debian: Root) -> None:
    assert debian.run("dpkg --verify; dpkg --audit; apt-get check -qq") == ""


@as_root
def test_apt_installs_local_packages(debian: Root) -> None:
    install = "apt-get install -q -y --no-install-recommends /packages/*.deb"
    assert "9 newly installed" in debian.run(install)
    assert "0 upgraded, 0 newly installed, 0 to remove" in debian.run(install)
    assert debian.run("dpkg --verify; dpkg --audit; apt-get check -qq") == ""
    assert debian.run("echo '{\"a\": [6, 7]}' | jq -c .a; echo 6*7 | bc; tree --version | cut -d' ' -f1") == (
        "[6,7]\n42\ntree\n"
    )
    shown = debian.run("stat -c '%A %U %G' /usr/bin/crontab /var/spool/cron/crontabs")
    assert shown == "-rwxr-sr-x root crontab\ndrwx-wx--T root crontab\n"
    debian.run("apt-get purge -q -y cron less jq")
    assert debian.run("dpkg --verify; dpkg --audit; ls /usr/bin/jq || true") == (
        "ls: cannot access '/usr/bin/jq': No such file or directory\n"
    )


@as_root
def test_dpkg_configures_what_was_only_unpacked(debian: Root) -> None:
    # cron wants one of the others configured before it is unpacked.
    debian.run("dpkg --unpack $(ls /packages/*.deb | grep -v /cron_)")
    assert debian.run("dpkg --audit | grep -c '^ '; dpkg --configure -a > /dev/null; dpkg --audit") == "8\n"
    assert debian.run("dpkg --configure -a; dpkg --verify") == ""


def test_pip_installs_wheels(debian: Root) -> None:
    debian.run("python3 -m venv /opt/venv")
    install = "/opt/venv/bin/pip install --no-index --find-links /wheels rich click"
    assert "Successfully installed" in debian.run(install)
    assert debian.run("/opt/venv/bin/pip check") == "No broken requirements found.\n"
    assert {line[:29] for line in debian.run(install).splitlines()[1:]} == {"Requirement already satisfied"}
    debian.write("/verify.py", _VERIFY_WHEELS)
    assert int(debian.run("/opt/venv/bin/python /verify.py")) > 300
    assert debian.run("/opt/venv/bin/python -c 'from rich import print; print(6 * 7)'") == "42\n"
    debian.run("/opt/venv/bin/pip uninstall -y rich")
    assert debian.run("ls /opt/venv/lib/python3.11/site-packages | grep -i rich || echo gone") == "gone\n"


_VERIFY_WHEELS = """
import base64, hashlib
from importlib.metadata import distributions
count = 0
for distribution in distributions(path=["/opt/venv/lib/python3.11/site-packages"]):
    for file in distribution.files:
        if file.hash:
            digest = hashlib.new(file.hash.mode, file.read_binary()).digest()
            assert base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == file.hash.value, file
            count += 1
print(count)
"""


# Builders


def test_git_clones_packs_and_finds_nothing_wrong(debian: Root) -> None:
    debian.run("""
        git config --global user.name Tester; git config --global user.email tester@localhost
        mkdir work; cd work; git init -q
        cp -r --preserve=timestamps /usr/lib/python3.11/{asyncio,email,json,lib2to3} .
        git add -A; git commit -q -m all
        for number in 1 2 3; do
            git mv email moved; rm -r json; mv moved email; echo "$number" >> asyncio/tasks.py
            git add -A; git commit -q -m "without json $number"
            git checkout -q HEAD~ -- json; git commit -q -m "with it $number"
        done
        git clone -q /root/work /root/linked
        git clone -q file:///root/work /root/packed
    """)
    for repository in ("work", "linked", "packed"):
        assert (
            debian.run(f"cd {repository}; git status --porcelain; git gc -q; git fsck --full --strict") == ""
        )
        assert debian.run(f"cd {repository}; git status --porcelain; git log --oneline | wc -l") == "7\n"
    assert (
        debian.run("for r in linked packed; do diff -r --no-dereference --exclude .git work $r; done") == ""
    )
    assert debian.run("cd work; git count-objects -v | grep -E '^(count|garbage|packs)'") == (
        "count: 0\npacks: 1\ngarbage: 0\n"
    )


def test_git_believes_the_times_of_directories(debian: Root) -> None:
    shown = debian.run("git init -q new; cd new; git update-index --test-untracked-cache")
    assert shown.endswith(" OK\n")


_MAKEFILE = """
objects := $(patsubst %.c,%.o,$(wildcard *.c))
program: $(objects) libshared.so
\tgcc -o $@ $(objects) -L. -lshared -Wl,-rpath,'$$ORIGIN'
libshared.so: shared/shared.c
\tgcc -shared -fPIC -o $@ $<
%.o: %.c
\tgcc -O1 -g -MMD -c -o $@ $<
-include *.d
"""


def test_make_builds_once(debian: Root) -> None:
    debian.write("/src/Makefile", _MAKEFILE)
    debian.run("""
        cd /src; mkdir shared; echo 'int shared(void) { return 1000; }' > shared/shared.c
        for n in {1..40}; do
            echo "int f$n(void);" > f$n.h
            printf '#include <stdio.h>\\n#include "f%s.h"\\nint f%s(void) { return %s; }\\n' $n $n $n > f$n.c
        done
        (for n in {1..40}; do echo "#include \\"f$n.h\\""; done
         echo '#include <stdio.h>'; echo 'int shared(void); int main(void) { printf("%d", shared()'
         for n in {1..40}; do echo "+ f$n()"; done; echo '); }') > main.c
    """)
    debian.run("cd /src; make -j2")
    assert debian.run("/src/program") == "1820"
    assert debian.run("cd /src; make -j2") == "make: 'program' is up to date.\n"
    assert (
        debian.run("cd /src; touch f7.h; make | grep -o ' -c .*'")
        == " -c -o f7.o f7.c\n -c -o main.o main.c\n"
    )


# Databases

_WRITER = """
import sqlite3
db = sqlite3.connect("/root/db", isolation_level=None)
assert db.execute("pragma journal_mode = wal").fetchone() == ("wal",)
db.execute("pragma mmap_size = 268435456")
db.execute("create table if not exists facts (n integer primary key, value integer, filler blob)")
number = db.execute("select coalesce(max(n), 0) from facts").fetchone()[0]
while True:
    number += 2
    db.execute("begin")
    db.execute("insert into facts values (?, ?, randomblob(3000))", (number, number))
    db.execute("insert into facts values (?, ?, randomblob(3000))", (number + 1, -number))
    db.execute("update facts set filler = randomblob(2000) where n = abs(random()) % ?", (number,))
    db.execute("commit")
    print(number, flush=True)
"""

_READER = """
import sqlite3
db = sqlite3.connect("/root/db")
while True:
    total, = db.execute("select sum(value) from facts").fetchone()
    assert total == 0, total
    print("balanced", flush=True)
"""

_KILLER = """
import sqlite3, subprocess, sys
for turn in range(5):
    writer = subprocess.Popen([sys.executable, "/writer.py"], stdout=subprocess.PIPE)
    committed = 0
    for line in writer.stdout:
        committed = int(line)
        if committed > turn * 300:
            break
    reader = subprocess.Popen([sys.executable, "/reader.py"], stdout=subprocess.PIPE)
    reader.stdout.readline()
    for line in writer.stdout:
        committed = int(line)
        if committed > turn * 300 + 150 + turn:
            break
    writer.kill()
    committed = max([committed, *map(int, writer.stdout.read().split())])
    writer.wait()
    reader.stdout.readline()
    assert reader.poll() is None
    reader.kill()
    reader.communicate()
    verdict = subprocess.check_output(["sqlite3", "/root/db", "pragma integrity_check"], text=True)
    assert verdict == "ok\\n", verdict
    db = sqlite3.connect("/root/db")
    last, total = db.execute("select max(n), sum(value) from facts").fetchone()
    assert last >= committed + 1 and total == 0, (last, committed, total)
    db.close()
print("sound")
"""


def test_sqlite_keeps_what_was_committed_when_its_writer_is_killed(debian: Root) -> None:
    for name, text in (("writer", _WRITER), ("reader", _READER), ("killer", _KILLER)):
        debian.write(f"/{name}.py", text)
    assert debian.run("python3 /killer.py") == "sound\n"


# Copies


@pytest.fixture
def corners(mounted: Mount) -> Iterator[str]:
    """The rootfs, below the mount point, of a container of the image of corner cases, with some changes."""
    name = mounted.new_id()
    mounted.fusestore("create", "corners", name).ok()
    mounted.sh("""
        cd "containers/$1/rootfs"
        mv lower/kept lower/moved; rm -r lower/opaque usr/share/tabset; ln upper/xattrs upper/xattrs-too
        mv usr/share/zoneinfo/Europe usr/share/; echo more >> usr/share/Europe/Paris; chmod 700 etc
        # rsync compares whole seconds: what was changed just now could be copied within the same one.
        find . -newermt "1 hour ago" -exec touch -h -d @1700000000.123456789 {} +
    """, name).ok()  # fmt: skip
    yield f"containers/{name}/rootfs"
    mounted.sh("rmdir containers/$1", name).ok()


@pytest.fixture
def plain(mounted: Mount) -> Iterator[Path]:
    """An empty directory on a file system of the machine."""
    path = mounted.base / "plain"
    mounted.sh("mkdir $1", path).ok()
    yield path
    shutil.rmtree(path)


def _same(mount: Mount, one: str | Path, other: str | Path) -> None:
    trees = [mount.person.call(snapshot, mount.mountpoint / path) for path in (one, other)]
    assert differences(*trees) == []


@as_root
def test_rsync_both_ways_changes_nothing_the_second_time(
    mounted: Mount, corners: str, plain: Path, container: str
) -> None:
    into = f"containers/{container}/rootfs"
    for source, target in ((corners, plain), (plain, into)):
        rsync = "rsync -aHAX --numeric-ids --delete $1/ $2"
        mounted.sh(rsync, source, target, deadline_s=120).ok()
        assert mounted.sh(f"{rsync} --itemize-changes", source, target).ok() == ""
        _same(mounted, source, target)


@as_root
def test_tar_both_ways_finds_no_difference(mounted: Mount, corners: str, plain: Path, container: str) -> None:
    into = f"containers/{container}/rootfs"
    mounted.sh("find $1 -mindepth 1 -delete", into).ok()
    for source, target in ((corners, plain), (plain, into)):
        mounted.sh("""
            options="--format=pax --numeric-owner --xattrs --xattrs-include=* --acls --sparse"
            options="$options --warning=no-timestamp"  # a file from before 1970
            tar $options -cf "$3" -C "$1" . && tar $options -xpf "$3" -C "$2" || exit 1
            for tree in "$1" "$2"; do tar $options --compare -f "$3" -C "$tree" || exit 1; done
        """, source, target, mounted.base / "tar", deadline_s=120).ok()  # fmt: skip
        _same(mounted, source, target)


@as_root
def test_cp_both_ways_makes_equal_trees(mounted: Mount, corners: str, plain: Path, container: str) -> None:
    into = f"containers/{container}/rootfs"
    mounted.sh("find $1 -mindepth 1 -delete", into).ok()
    for source, target in ((corners, plain), (plain, into)):
        # diff has no other words for two devices than that they are what they are.
        options = "-r --no-dereference --exclude=null --exclude=loop --exclude=wide --exclude=fifo"
        mounted.sh(f"cp -aT $1 $2 && diff {options} $1 $2", source, target, deadline_s=120).ok()
        _same(mounted, source, target)


def test_cp_of_packages_makes_an_equal_tree(mounted: Mount, corners: str, plain: Path) -> None:
    """As a plain user too: owners and devices are not theirs to give, all else is."""
    mounted.sh("cp -aT $1/usr $2 && diff -r --no-dereference $1/usr $2", corners, plain).ok()
    trees = [mounted.person.call(snapshot, mounted.mountpoint / path) for path in (f"{corners}/usr", plain)]
    assert differences(*trees, ignore=frozenset(() if mounted.person.is_root else ("uid", "gid"))) == []
