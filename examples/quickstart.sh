#!/usr/bin/env bash
# From nothing to a mounted store with a container in it. Debian 12; root or sudo for the system packages.
#
# The image is made here, of Debian's busybox-static, with umoci; any other image does as well, for instance
#   skopeo copy docker://… oci:DIR:NAME && fusestore import oci:DIR:NAME
# Places: $FUSESTORE_STORE, $FUSESTORE_RUN_DIR (fusestore's own defaults), the mount at $FUSESTORE_MOUNT
# (default: ./mnt here), the virtual environment in $FUSESTORE_VENV (default: ./.venv here).
set -euo pipefail
cd "$(dirname "$0")/.."
mount=${FUSESTORE_MOUNT:-$PWD/mnt}
export FUSESTORE_VENV=${FUSESTORE_VENV:-$PWD/.venv}

.ci/install.sh
PATH=$FUSESTORE_VENV/bin:$PATH

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/root/bin" "$work/root/etc" "$work/root/tmp"
cp "$(command -v busybox)" "$work/root/bin/busybox"
for applet in sh ls cat echo cp mv rm mkdir; do ln -s busybox "$work/root/bin/$applet"; done
echo quickstart > "$work/root/etc/hostname"
umoci init --layout "$work/image"
umoci new --image "$work/image:busybox"
# Not root: the image's files belong to root all the same.
[ "$(id -u)" = 0 ] && rootless=() || rootless=(--rootless)
umoci insert "${rootless[@]}" --image "$work/image:busybox" "$work/root" /
umoci config --image "$work/image:busybox" --config.cmd /bin/sh

fusestore import "oci:$work/image:busybox"
mkdir -p "$mount"
fusestore mount "$mount"
mkdir "$mount/containers/first"

ls "$mount" "$mount/containers/first"
cat "$mount/containers/first/metadata.json" "$mount/containers/first/rootfs/etc/hostname"
echo
echo "The store is mounted at $mount. To end it: $FUSESTORE_VENV/bin/fusestore umount $mount"
