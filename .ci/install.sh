#!/usr/bin/env bash
# Installs what fusestore needs on Debian 12: system packages, then fusestore itself in a virtual environment.
#
#   .ci/install.sh [dev]      dev: what the tests need besides
#
# The environment is $FUSESTORE_VENV (default: .venv here). Needs root, or sudo, for the packages and for
# /dev/fuse; a machine that has the packages needs neither. May be run again at any time.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${FUSESTORE_VENV:-$PWD/.venv}

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

# pyfuse3 is built here: libfuse3's headers, pkg-config, a compiler, Python's headers.
packages=(fuse3 libfuse3-dev pkg-config gcc libc6-dev python3-dev python3-venv skopeo umoci busybox-static)
if [ "${1-}" = dev ]; then
    packages+=(
        acl
        attr
        buildah
        curl
        crun
        docker-registry
        e2fsprogs
        git
        jq
        libarchive-tools
        libcap2-bin
        mmdebstrap
        openssl
        pigz
        podman
        runc
        rsync
        systemd-container
        uidmap
        vim
        xfsprogs
        zstd
    )
fi
missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    as_root apt-get update -q
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}"
fi

# Bare virtual machines and containers lack the udev rule that lets every user open the device.
if [ -e /dev/fuse ] && [ "$(stat -c %a /dev/fuse)" != 666 ]; then
    as_root chmod 0666 /dev/fuse
fi

# Debian's Python: one in somebody's home could not be run by the plain user of the tests.
[ -x "$venv/bin/python" ] || /usr/bin/python3 -m venv "$venv"
if [ "${1-}" = dev ]; then
    "$venv/bin/pip" install -qq '.[dev]'
else
    "$venv/bin/pip" install -qq .
fi
