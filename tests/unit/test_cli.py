"""The command line: what it prints, where, and how it exits."""

import datetime
import errno
import json
import logging
import os
import pty
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from rig.tinyimages import make_layout

from fusestore import cli, daemon, mountpoint
from fusestore.errors import AccessDenied, Busy, FusestoreError, NotADirectory, NotFound, NotPermitted
from fusestore.mountpoint import MountOptions, check_mountpoint, detach
from fusestore.names import printable
from fusestore.options import size_of
from fusestore.store import Store
from fusestore.terminal import local_time

ID = re.compile(r"[0-9a-f]{64}\n")


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line on a store of its own, in this process."""
    monkeypatch.setenv("FUSESTORE_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("FUSESTORE_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Outcome:
        code = cli.main(arguments)
        shown = capsys.readouterr()
        return Outcome(code, shown.out, shown.err)

    return run


@pytest.fixture
def stored(run: Run, tmp_path: Path) -> str:
    """The id of an image, `app`, that the store has."""
    make_layout(tmp_path / "oci", "app", [{"file": b"content"}])
    outcome = run("import", f"oci:{tmp_path}/oci:app")
    assert (outcome.code, outcome.err) == (0, "")
    assert ID.fullmatch(outcome.out)
    return outcome.out.strip()


def _fails(outcome: Outcome, *words: str, code: int = 1) -> None:
    assert outcome.code == code
    assert outcome.out == ""
    assert outcome.err.startswith("fusestore: ") and outcome.err.count("\n") == 1
    for word in words:
        assert word in outcome.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("import", "/etc/passwd"), ["no sound archive", "save the image again"]),
        (("import", "/etc"), ["holds no image"]),
        (("import", "busybox:1"), ["give oci:DIR", "fusestore pull NAME"]),
        (("import", "docker-archive:image.tar"), ["no docker archive", "without docker-archive:"]),
        (("import", "oci", "--name", "a b"), ["'a b' cannot name an image"]),
        (("import", "oci", "--store", "/etc"), ["neither empty nor a store"]),
        (("import", "oci", "--store", "/proc/none"), ["/proc/none", "--store"]),
        (("import", "oci", "--store", "file/none"), ["file/none", "another directory"]),
        (("images", "--run-dir", "file"), ["file cannot be used", "--run-dir"]),
        (("images", "--run-dir", "file/none"), ["file/none cannot be used", "--run-dir"]),
        (("images", "--run-dir", "/proc/none"), ["/proc/none cannot be used", "--run-dir"]),
        (("create", "app", "a/b"), ["'a/b' cannot name a container"]),
        (("create", "app", "x", "--name", ".."), ["'..' cannot name a container"]),
        (("mount", "file"), ["not a directory"]),
        (("mount", "/proc"), ["mount point already", "choose another"]),
        (("mount", "."), ["lie in each other", "choose another"]),
        (("umount", "file"), ["no mount of this store"]),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    run: Run, stored: str, tmp_path: Path, arguments: tuple[str, ...], words: list[str]
) -> None:
    (tmp_path / "file").touch()
    with tarfile.open(tmp_path / "image.tar", "w") as archive:
        archive.add(tmp_path / "oci", ".")
    _fails(run(*arguments), *words)


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "make room"),
        (errno.EDQUOT, "make room"),
        (errno.EROFS, "mount it writable"),
        (errno.EIO, "dmesg"),
        (errno.EMFILE, "ulimit -n"),
    ],
)
def test_errors_of_the_system_come_with_advice(number: int, advice: str) -> None:
    assert daemon.describe(OSError(number, os.strerror(number), "/x")).startswith(
        f"/x: {os.strerror(number)}: "
    )
    assert advice in daemon.describe(OSError(number, os.strerror(number)))


def test_every_command_has_help(run: Run) -> None:
    listed = run("--help").out
    for name in ("mount", "umount", "import", "images", "containers", "create", "rm", "start", "stop"):
        assert re.search(rf"^  {name} ", listed, re.MULTILINE)
        outcome = run(name, "--help")
        assert outcome.code == 0
        assert "--store DIR" in outcome.out


def test_help_tells_the_exit_codes(run: Run) -> None:
    assert "Exit codes: 0 done, 1 the operation failed" in run("--help").out


def test_version_is_printed(run: Run) -> None:
    assert run("--version").out == "fusestore 0.1.0\n"


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("no-such-command",),
        ("import",),
        ("images", "--no-such-option"),
        ("create", "a", "b", "c"),
        ("mount", "--driver", "x", "/"),
        ("mount", "--cache-size", "3X", "/"),
        ("mount", "--cache-size", "-1", "/"),
        ("images", "--store", ""),
        ("--run-dir=", "images"),
        ("mount", ""),
        ("umount", ""),
    ],
)
def test_a_wrong_command_line_is_one_line_and_2(run: Run, arguments: tuple[str, ...]) -> None:
    _fails(run(*arguments), "--help", code=2)


@pytest.mark.parametrize(
    "arguments",
    [
        ("images",),
        ("containers", "--json"),
        ("create", "x"),
        ("rm", "x"),
        ("inspect", "x"),
        ("start", "x"),
        ("stop", "x"),
        ("check",),
        ("umount", "."),
    ],
)
def test_without_a_store_each_command_says_what_to_do(run: Run, arguments: tuple[str, ...]) -> None:
    _fails(run(*arguments), "fusestore import", "--store")


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("1k", 1 << 10), ("3M", 3 << 20), ("2G", 2 << 30), ("1t", 1 << 40)],
)
def test_sizes_have_units_of_1024(text: str, size: int) -> None:
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "K", "1.5G", "-1", "1 M", "1MB", "0x10", "१"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        size_of(text)


@pytest.mark.parametrize("where", ["before", "after", "environment", "relative"])
def test_the_store_can_be_named_anywhere(
    run: Run, stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    if where != "environment":
        monkeypatch.setenv("FUSESTORE_STORE", "/nonexistent")
    option = ("--store", "store" if where == "relative" else str(tmp_path / "store"))
    before = option if where == "before" else ()
    after = option if where in ("after", "relative") else ()
    assert stored in run(*before, "images", "--json", *after).out


@pytest.mark.parametrize("name", ["FUSESTORE_STORE", "FUSESTORE_RUN_DIR"])
def test_an_empty_environment_variable_is_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "")
    _fails(run("images"), f"{name} is empty", code=2)


def test_import_names_the_image(run: Run, stored: str, tmp_path: Path) -> None:
    outcome = run("import", f"oci:{tmp_path}/oci", "--name", "localhost/app:1", "--name", "other")
    assert outcome.out == f"{stored}\n"
    (image,) = json.loads(run("images", "--json").out)
    assert image["names"] == ["app", "default", "localhost/app:1", "other"]


@pytest.mark.parametrize("source", ["nothing", "broken"])
def test_a_failed_first_import_leaves_no_store(run: Run, tmp_path: Path, source: str) -> None:
    make_layout(tmp_path / "broken", "app", [{"file": b"content"}])
    for blob in (tmp_path / "broken/blobs/sha256").iterdir():
        if not blob.read_bytes().startswith(b"{"):
            blob.write_bytes(bytes(blob.stat().st_size))
    _fails(run("import", f"oci:{tmp_path}/{source}"))
    assert not (tmp_path / "store").exists()


def test_a_failed_import_leaves_a_store_as_it_was(run: Run, stored: str, tmp_path: Path) -> None:
    _fails(run("import", f"oci:{tmp_path}/nothing"))
    assert [image["id"] for image in json.loads(run("images", "--json").out)] == [stored]


def test_an_empty_store_that_was_there_is_kept(run: Run, tmp_path: Path) -> None:
    Store.open(tmp_path / "store", tmp_path / "run", create=True).close()
    _fails(run("import", f"oci:{tmp_path}/nothing"))
    assert run("images", "--json").out == "[]\n"


def test_import_prints_no_progress_on_a_pipe(run: Run, stored: str) -> None:
    assert run("check") == Outcome(0, "", "")


def test_images_are_a_table_for_people(run: Run, stored: str) -> None:
    header, row = run("images").out.splitlines()
    assert header.split() == ["ID", "NAMES", "CREATED", "LAYERS", "SIZE"]
    assert row.split()[:6] == [stored[:12], "app", "default", *_local("2024-02-03T04:05:06Z"), "1"]


def _local(time: str) -> list[str]:
    return datetime.datetime.fromisoformat(time).astimezone().strftime("%Y-%m-%d %H:%M:%S").split()


def test_images_json_is_what_the_tree_shows(run: Run, stored: str) -> None:
    (image,) = json.loads(run("images", "--json").out)
    assert image == json.loads(run("inspect", "app").out)
    assert {"id", "names", "created", "architecture", "size", "layers"} <= image.keys()


def test_create_prints_the_id(run: Run, stored: str) -> None:
    assert run("create", "app", "mine") == Outcome(0, "mine\n", "")
    assert ID.fullmatch(run("create", "app").out)


@pytest.mark.parametrize("length", [12, 64])
def test_create_takes_an_image_id(run: Run, stored: str, length: int) -> None:
    run("create", stored[:length], "mine")
    shown = json.loads(run("inspect", "mine").out)
    assert shown["image-id"] == stored


def test_create_takes_name_and_label(run: Run, stored: str) -> None:
    run("create", "app", "mine", "--name", "job", "--label", "a:b:c:s0")
    shown = json.loads(run("inspect", "job").out)
    assert (shown["id"], shown["name"], shown["mountlabel"]) == ("mine", "job", "a:b:c:s0")
    assert shown["image-name"] == "app"


def test_a_failed_create_leaves_nothing(run: Run, stored: str) -> None:
    _fails(run("create", "no-such-image", "mine"), "fusestore import")
    _fails(run("create", "app", "../mine"))
    assert json.loads(run("containers", "--json").out) == []


def test_containers_are_a_table_for_people(run: Run, stored: str) -> None:
    run("create", "app", "mine", "--name", "job")
    header, row = run("containers").out.splitlines()
    assert header.split() == ["ID", "NAME", "IMAGE", "CREATED", "STATE"]
    assert row.split()[:3] == ["mine", "job", "app"]
    assert row.split()[-1] == "stopped"
    created = json.loads(run("inspect", "mine").out)["created-at"]
    assert row.split()[3:5] == _local(datetime.datetime.fromtimestamp(created).astimezone().isoformat())


def test_containers_are_listed_by_id_and_long_ids_cut_short(run: Run, stored: str) -> None:
    made = run("create", "app").out.strip()
    run("create", "app", "zz")
    run("create", "app", "Aa")
    rows = [row.split()[:2] for row in run("containers").out.splitlines()[1:]]
    assert rows == [[one, "-"] for one in sorted(["Aa", made[:12], "zz"])]
    listed = [one["id"] for one in json.loads(run("containers", "--json").out)]
    assert listed == sorted(["Aa", made, "zz"])


def test_a_shortened_container_id_will_do(run: Run, stored: str) -> None:
    made = run("create", "app").out.strip()
    assert json.loads(run("inspect", made[:12]).out)["id"] == made
    _fails(run("rm", made[:11]), "containers")
    assert run("rm", made[:12]) == Outcome(0, "", "")


def test_containers_json_is_a_list_of_documents(run: Run, stored: str) -> None:
    run("create", "app", "mine")
    assert json.loads(run("containers", "--json").out) == [json.loads(run("inspect", "mine").out)]


def test_a_damaged_container_does_not_hide_the_others(run: Run, stored: str, tmp_path: Path) -> None:
    run("create", "app", "good")
    run("create", "app", "bad")
    (tmp_path / "store/containers/bad/container").write_bytes(b"{")
    outcome = run("containers", "--json")
    assert outcome.code == 1
    assert [one["id"] for one in json.loads(outcome.out)] == ["good"]
    assert outcome.err.startswith("fusestore: ") and "bad" in outcome.err


def test_a_time_beyond_all_calendars_is_shown(run: Run) -> None:
    assert local_time(10**30) == str(10**30)


def test_rm_goes_on_after_an_error(run: Run, stored: str) -> None:
    run("create", "app", "a")
    run("create", "app", "b")
    _fails(run("rm", "a", "no-such", "b"), "no-such")
    assert json.loads(run("containers", "--json").out) == []


def test_rm_takes_names_and_gives_the_space_back(run: Run, stored: str, tmp_path: Path) -> None:
    run("create", "app", "a", "--name", "job")
    assert run("rm", "job") == Outcome(0, "", "")
    assert os.listdir(tmp_path / "store/trash") == []


def test_inspect_of_nothing_names_both_lists(run: Run, stored: str) -> None:
    _fails(run("inspect", "no such thing"), "containers", "images")


def test_inspect_prefers_a_container(run: Run, stored: str) -> None:
    run("create", "app", "default")
    assert json.loads(run("inspect", "default").out)["image-id"] == stored


def test_start_needs_a_mount(run: Run, stored: str) -> None:
    run("create", "app", "mine")
    _fails(run("start", "mine"), "fusestore mount")


def test_stop_of_what_is_not_started_is_nothing(run: Run, stored: str) -> None:
    run("create", "app", "mine")
    assert run("stop", "mine") == Outcome(0, "", "")


def test_check_prints_a_line_for_each_finding(run: Run, stored: str, tmp_path: Path) -> None:
    blobs = sorted((tmp_path / "store/blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    blobs[0].write_bytes(b"damaged")
    outcome = run("check")
    assert outcome.code == 1
    assert outcome.err == ""
    assert blobs[0].name in outcome.out


# What is shown to people cannot act on their terminal.


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ümläut 日本", "plain ümläut 日本"),
        ("two\nlines", "two\\nlines"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("c1 \x9b1m", "c1 \\x9b1m"),
        ("right \u202e left", "right \\u202e left"),
        ("byte \udcff", "byte \\udcff"),
    ],
)
def test_names_are_printed_without_control_characters(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_an_error_about_a_hostile_name_is_one_harmless_line(run: Run, stored: str) -> None:
    outcome = run("rm", "x\n\x1b[2Jy\udcff")
    _fails(outcome)
    assert outcome.err.isprintable() is False and outcome.err[:-1].isprintable()


def test_labels_in_json_are_ascii(run: Run, stored: str, tmp_path: Path) -> None:
    run("create", "app", "mine", "--label", "\x1bü")
    out = run("inspect", "mine").out
    assert out.isascii() and "\x1b" not in out


# As a process.


def test_python_m_works() -> None:
    command = [sys.executable, "-m", "fusestore", "--version"]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    assert done.stdout == b"fusestore 0.1.0\n"


def test_a_closed_pipe_is_quiet(run: Run, stored: str, tmp_path: Path) -> None:
    for number in range(200):
        run("create", "app", f"container-{number}")
    pipe = (
        'set -o pipefail; "$0" -m fusestore containers --json | head -c 1 > /dev/null; echo ${PIPESTATUS[0]}'
    )
    done = subprocess.run(["bash", "-c", pipe, sys.executable], capture_output=True, timeout=60, check=True)
    assert done.stderr == b""
    assert done.stdout in (b"0\n", b"1\n")


def test_a_terminal_sees_a_progress_bar(run: Run, tmp_path: Path) -> None:
    make_layout(tmp_path / "oci", "app", [{"file": b"x" * 1_000_000}])
    shown = _on_terminal("import", f"oci:{tmp_path}/oci:app")
    assert b"import" in shown and b"\x1b[" in shown


def _on_terminal(*arguments: str) -> bytes:
    """What a command writes to standard error where that is a terminal."""
    leader, follower = pty.openpty()
    try:
        subprocess.run(
            [sys.executable, "-m", "fusestore", *arguments],
            env={**os.environ, "TERM": "xterm"},
            stdout=subprocess.DEVNULL,
            stderr=follower,
            timeout=60,
            check=True,
        )
        return os.read(leader, 1 << 16)
    finally:
        os.close(follower)
        os.close(leader)


# The background process.


def _serve_and_end(ready: Callable[[], None]) -> None:
    ready()


def test_detach_returns_when_ready() -> None:
    daemon.detach(_serve_and_end)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (NotFound("what to do"), "what to do"),
        (PermissionError(13, "Permission denied", "/x"), "/x: Permission denied"),
    ],
)
def test_detach_raises_what_the_process_raised(error: Exception, message: str) -> None:
    def serve(ready: Callable[[], None]) -> None:
        raise error

    with pytest.raises(FusestoreError, match=f"^{message}$"):
        daemon.detach(serve)


def test_detach_notices_the_death_of_its_process() -> None:
    def serve(ready: Callable[[], None]) -> None:
        os.kill(os.getpid(), 9)

    with pytest.raises(FusestoreError, match="killed before it answered"):
        daemon.detach(serve)


def test_detach_leaves_the_starter_as_it_was() -> None:
    before = (os.getcwd(), os.getsid(0), sorted(os.listdir("/proc/self/fd")))
    daemon.detach(_serve_and_end)
    assert (os.getcwd(), os.getsid(0), sorted(os.listdir("/proc/self/fd"))) == before


def test_an_end_after_ready_goes_to_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def serve(ready: Callable[[], None]) -> None:
        # Closed by the end of the process, and by nothing before it.
        os.lockf(os.open(tmp_path / "alive", os.O_WRONLY | os.O_CREAT), os.F_LOCK, 0)
        daemon.log_to(str(log))
        ready()
        raise RuntimeError("unforeseen")

    daemon.detach(serve)
    with open(tmp_path / "alive", "a") as alive:
        os.lockf(alive.fileno(), os.F_LOCK, 0)
    text = log.read_text()
    assert "CRITICAL fusestore: the mount ended: unforeseen" in text
    assert "Traceback" in text


def test_no_text_makes_a_line_of_the_log(tmp_path: Path) -> None:
    """Neither a message nor what an exception says."""
    log, evil = tmp_path / "log", "x\n2026-01-01 00:00:00,000 ERROR fusestore: forged\x1b[8m\udcff"

    def serve(ready: Callable[[], None]) -> None:
        daemon.log_to(str(log))
        try:
            raise RuntimeError(evil)
        except RuntimeError:
            logging.getLogger("fusestore").exception("of %s", evil)
        ready()

    daemon.detach(serve)
    text = log.read_text()
    assert "\x1b" not in text
    assert len(re.findall(r"^\S", text, re.MULTILINE)) == 1
    assert text.count("forged\\x1b[8m\\udcff") == 2


def test_the_log_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    monkeypatch.setattr(daemon, "_LOG_MAX", 1000)

    def serve(ready: Callable[[], None]) -> None:
        daemon.log_to(str(log))
        for number in range(100):
            logging.getLogger("fusestore").info("line %d", number)
        os.write(2, b"what libfuse says\n")
        ready()

    daemon.detach(serve)
    text = log.read_text()
    assert "line 99\nwhat libfuse says\n" in text
    assert "line 0" not in text + (tmp_path / "log.1").read_text()
    assert {path.stat().st_size <= 1100 for path in tmp_path.iterdir()} == {True}
    assert {path.name for path in tmp_path.iterdir()} == {"log", "log.1"}
    assert log.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda path: None, NotFound),
        (lambda path: path.touch(), NotADirectory),
        (lambda path: path.symlink_to("/proc"), Busy),
        (lambda path: path.symlink_to("store"), NotPermitted),
        (lambda path: path.symlink_to("store/inside"), NotPermitted),
        (lambda path: path.symlink_to("."), NotPermitted),
        (lambda path: path.symlink_to("run"), NotPermitted),
        (lambda path: path.symlink_to("elsewhere"), NotPermitted),
        (lambda path: path.symlink_to("layers"), NotPermitted),
        (lambda path: path.symlink_to(Path(daemon.__file__).parent), NotPermitted),
    ],
)
def test_a_mount_point_that_cannot_be_is_refused(
    tmp_path: Path, make: Callable[[Path], None], error: type[FusestoreError]
) -> None:
    (tmp_path / "store/inside").mkdir(parents=True)
    (tmp_path / "layers").mkdir()
    (tmp_path / "store/layers").symlink_to(tmp_path / "layers")
    (tmp_path / "elsewhere/run").mkdir(parents=True)
    (tmp_path / "run").symlink_to("elsewhere/run")
    make(tmp_path / "mnt")
    with pytest.raises(error, match=r"mkdir|choose"):
        check_mountpoint(str(tmp_path / "mnt"), store=str(tmp_path / "store"), run_dir=str(tmp_path / "run"))


def test_a_mount_point_beside_store_and_run_directory_is_fine(tmp_path: Path) -> None:
    mountpoint = tmp_path / "run/mnt"
    mountpoint.mkdir(parents=True)
    check_mountpoint(str(mountpoint), store=str(tmp_path / "store"), run_dir=str(tmp_path / "run"))


def test_a_closed_fuse_device_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "_FUSE_DEVICE", str(tmp_path / "fuse"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (tmp_path / "fuse").touch()
    with pytest.raises(AccessDenied, match="chmod 0666"):
        daemon.check_permission(MountOptions())


def test_a_plain_user_without_fusermount3_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(daemon, "_FUSE_DEVICE", os.devnull)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FusestoreError, match="apt-get install fuse3"):
        daemon.check_permission(MountOptions())
    with pytest.raises(FusestoreError, match="apt-get install fuse3"):
        detach("/nowhere")


@pytest.mark.parametrize(
    ("said", "error", "advice"),
    [
        ("Device or resource busy", Busy, "close its files"),
        ("Invalid argument", NotFound, "not mounted any more"),
        ("No such file or directory", NotFound, "not mounted any more"),
        ("fusermount3: entry for /x not found in /etc/mtab", NotFound, "not mounted any more"),
        ("Operation not permitted", NotPermitted, "have who mounted it do it"),
        ("Input/output error", FusestoreError, "could not be unmounted: Input/output error$"),
    ],
)
def test_why_nothing_was_unmounted_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str, error: type[FusestoreError], advice: str
) -> None:
    command = tmp_path / "fusermount3"
    command.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    command.chmod(0o755)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(error, match=advice):
        detach("/nowhere")


def test_umount_does_not_return_while_the_process_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mount's record ends a moment before its process does."""
    monkeypatch.setattr(mountpoint, "_UNMOUNT_TIMEOUT_S", 0.1)
    with Store.open(tmp_path / "store", create=True) as store, subprocess.Popen(["sleep", "60"]) as daemon:
        record = SimpleNamespace(mountpoint=str(tmp_path), pid=daemon.pid, driver="union")
        records = iter([[record], []])
        monkeypatch.setattr(store, "mounts", lambda: next(records))
        try:
            with pytest.raises(Busy, match="its process still runs"):
                mountpoint.unmount(store, str(tmp_path))
        finally:
            daemon.kill()


def test_a_missing_fuse_device_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "_FUSE_DEVICE", str(tmp_path / "fuse"))
    with pytest.raises(FusestoreError, match="modprobe fuse"):
        daemon.check_permission(MountOptions())


@pytest.mark.parametrize(
    ("conf", "allowed"),
    [(None, False), ("#user_allow_other\n", False), ("mount_max = 9\nuser_allow_other\n", True)],
)
def test_allow_other_is_read_from_fuse_conf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, conf: str | None, allowed: bool
) -> None:
    monkeypatch.setattr(daemon, "_FUSE_CONF", str(tmp_path / "fuse.conf"))
    if conf is not None:
        (tmp_path / "fuse.conf").write_text(conf)
    assert daemon._conf_allows_other() is allowed


def _shell(script: str) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return done.stdout


@pytest.mark.parametrize(
    ("words", "completions"),
    [("fusestore um", ["umount"]), ("fusestore commit --comp", ["--compression"]), ("fusestore nothing", [])],
)
def test_bash_completes(words: str, completions: list[str]) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    setup = re.search(r"`(eval .*bash_source fusestore.*)` in", readme)
    assert setup is not None
    ask = f"COMP_WORDS=({words}); COMP_CWORD={len(words.split()) - 1}"
    answer = 'set -- $(complete -p fusestore); "${@: -2:1}" fusestore; printf "%s\\n" "${COMPREPLY[@]}"'
    assert _shell(f"{setup[1]}; {ask}; {answer}").split() == completions


@pytest.mark.parametrize(("shell", "registers"), [("zsh", "compdef"), ("fish", "complete --no-files")])
def test_other_shells_get_a_completion_script(shell: str, registers: str) -> None:
    assert registers in _shell(f"_FUSESTORE_COMPLETE={shell}_source fusestore")


def test_gc_says_what_it_gives_back_and_a_dry_run_the_same(run: Run, stored: str) -> None:
    with Store.open(os.environ["FUSESTORE_STORE"], os.environ["FUSESTORE_RUN_DIR"]) as opened:
        for name in opened.image_names():
            opened.untag(name)
    line = re.compile(rf"{stored}: [0-9.]+ kB, no name, and no container is of it\n[0-9.]+ kB ")
    assert run("gc", "--keep", "1").out == "0 bytes given back\n"
    said = run("gc", "--dry-run")
    assert line.match(said.out) and said.out.endswith(" can be given back\n")
    done = run("gc")
    assert done.out == said.out.replace("can be given back", "given back")
    assert json.loads(run("images", "--json").out) == []


def test_df_says_what_there_is_of_what(run: Run, stored: str) -> None:
    run("create", "app", "c")
    found = {part.pop("what"): part for part in json.loads(run("df", "--json").out)}
    assert " ".join(found) == "images hydrated cache containers trash scratch downloads quarantine"
    assert found["images"]["count"] == found["containers"]["count"] == 1
    assert found["images"]["size"] > 0 == found["images"]["reclaimable"]
    header, images, *_ = run("df").out.splitlines()
    assert header.split() == ["WHAT", "COUNT", "SIZE", "RECLAIMABLE"]
    assert images.split()[:2] == ["images", "1"]


def test_hydrate_says_what_it_takes(run: Run, stored: str) -> None:
    def shown(size: int) -> str:
        return "1 byte" if size == 1 else f"{size:,} bytes" if size < 1000 else f"{size / 1000:.1f} kB"

    would = json.loads(run("hydrate", "app", "--dry-run", "--json").out)
    assert run("hydrate", "app", "--dry-run").out == f"{shown(would['bytes'])} more at most\n"
    done = run("hydrate", "app")
    found = json.loads(run("hydrate", "app", "--json").out)
    assert (done.out, done.err) == (f"{shown(found['size'])} more on disk\n", "")
    assert (found["id"], found["bytes"], found["missing"]) == (stored, 0, 0)
    assert run("hydrate", "app", "--undo").out == f"{shown(found['size'])} given back\n"
    _fails(run("hydrate", "none"), "there is no image 'none'")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("images", "-o"), ["images", "-o"]),
        (("/s",), ["/s"]),
        (("/s", "/m", "-o", "rw,nosuid,nodev"), ["mount", "--store", "/s", "--", "/m"]),
        (("/s", "/m"), ["mount", "--store", "/s", "--", "/m"]),
        (
            ("/s", "/m", "-o", "allow_other,allow_suid,hydrate,driver=union,run_dir=/r"),
            [
                "mount",
                "--store",
                "/s",
                "--allow-other",
                "--allow-suid",
                "--hydrate",
                "--driver=union",
                "--run-dir=/r",
                "--",
                "/m",
            ],
        ),
        (("/s", "-m", "-o", "cache_size=1G"), ["mount", "--store", "/s", "--cache-size=1G", "--", "-m"]),
    ],
)
def test_mount_helper_arguments(arguments: tuple[str, ...], words: list[str]) -> None:
    assert cli._as_a_helper(arguments) == words


@pytest.mark.parametrize("options", ["ro", "noexec", "allow_other=1", "driver", "foreground", "help"])
def test_what_mount_cannot_ask_for_is_refused(run: Run, options: str) -> None:
    _fails(run("/s", "/m", "-o", options), f"-o {options} is not known", code=2)
