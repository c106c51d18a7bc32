#!/usr/bin/env bash
# Installs what the tests need, then runs every check. As root: the tests of root's mounts too, and nothing may
# be skipped. As another user: what needs root is skipped, and said so.
#
#   .ci/test.sh [pytest's arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
# A plain user's mounts are tested with the installed command: root's home would hide it from that user.
if [ "$(id -u)" = 0 ]; then
    export FUSESTORE_VENV=${FUSESTORE_VENV:-/var/tmp/fusestore-test-venv}
    export FUSESTORE_TEST_REQUIRE=${FUSESTORE_TEST_REQUIRE-fuse,images,root}
else
    export FUSESTORE_VENV=${FUSESTORE_VENV:-$PWD/.venv}
fi
.ci/install.sh dev
bin=$FUSESTORE_VENV/bin

"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
"$bin/lint-imports"
# Three workers for two processors: tests of mounts wait for the disk, and for processes to end.
"$bin/pytest" -n 3 --dist loadgroup --durations 40 "$@"
