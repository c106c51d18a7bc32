"""What names from outside do on a terminal, in tables, and in the log: nothing."""

import os

import pytest
from rig.mounts import Mount
from rig.tars import END, member
from rig.tinyimages import Blob, write_layout

pytestmark = [pytest.mark.mounted, pytest.mark.images]

PERSONS = ("user",)

EVIL = "\x1b]0;owned\x07\x1b[8m\nD /etc/passwd\u202e"
ESCAPED = "\\x1b]0;owned\\x07\\x1b[8m\\nD /etc/passwd\\u202e"
"""As it is shown."""
FILE = EVIL.replace("/", "-")


@pytest.fixture
def evil(fresh: Mount) -> Mount:
    """A container of an image that says EVIL wherever it may, in which files, a label and a key do."""
    layout = fresh.base / "evil"
    tar = member(FILE.encode(), b"x") + END
    write_layout(layout, EVIL, [Blob.of(tar)], created=EVIL, architecture=EVIL, author=EVIL)
    fresh.fusestore("import", f"oci:{layout}", "--name", "evil").ok()
    fresh.fusestore("create", "evil", "evil", "--label", "\u202e").ok()
    fresh.sh('jq --arg key "$1" ".[\\$key] = \\$key" containers/evil/metadata.json > containers/evil/new && '
             "mv containers/evil/new containers/evil/metadata.json", EVIL).ok()  # fmt: skip
    fresh.sh('echo x > containers/evil/rootfs/"new$1"', FILE).ok()
    fresh.sh('rm containers/evil/rootfs/"$1"', FILE).ok()
    (fresh.store / "layers" / FILE).mkdir()
    return fresh


COMMANDS = {
    "images": True,
    "images --json": True,
    "containers": False,
    "inspect evil": True,
    "diff evil": True,
    "diff evil --json": True,
    "check": True,
    "gc --dry-run": False,
    "start $'no\\e[8m\\nD /'": True,
    "rm $'no\\e[8m\\nD /'": True,
    "import oci:$'no\\e[8m\\nD /'": True,
    "import $FUSESTORE_STORE/../evil --name $'no\\e[8m\\nD /'": True,
}
"""Whether each shows a name of these."""


def test_nothing_acts_on_a_terminal(evil: Mount) -> None:
    for command, is_shown in COMMANDS.items():
        script = evil.base / "command"
        evil.person.call(script.write_text, f"stty cols 500; fusestore {command}; true")
        shown = evil.person.run("script", "-qc", f"bash {script}", "/dev/null", env=evil.environment).out
        assert not any(text in shown for text in ("\x1b]", "\x1b[8m", "\u202e", "\x07")), command
        assert not any(line.startswith("D /etc") for line in shown.splitlines()), command
        assert ("x1b" in shown or "u001b" in shown) == is_shown, f"{command}: {shown}"


def test_off_a_terminal_a_row_stays_a_line(evil: Mount) -> None:
    for command, rows in (("images", 2), ("containers", 1)):
        lines = evil.fusestore(command).ok().splitlines()
        assert len(lines) == 1 + rows, lines


def test_a_name_makes_no_line_of_the_log(evil: Mount) -> None:
    """It is in what the log says of a damaged file."""
    evil.expect("ERROR")
    path = evil.store / "containers/evil/diff" / f"new{FILE}"
    os.setxattr(path, "user.fusestore.stat", b"nonsense")
    evil.umount()
    evil.mount()
    evil.sh('cat containers/evil/rootfs/"new$1"', FILE).fails_with(5)
    log = evil.log()
    assert f"new{ESCAPED.replace('/', '-')}" in log
    assert "\nD " not in log and "\x1b" not in log
