#!/bin/sh
# Takes a folder out of an XFS image. With "replay" its log is replayed first, as the next mount would do it.
# Usage: xfs.sh IMAGE FOLDER OUTPUT_DIRECTORY [replay]
set -eu
image=$1 folder=$2 out=$3
at=$(mktemp -d "$out/mount.XXXXXX")
if [ "${4:-}" = replay ]; then
    mount -t xfs -o loop,nouuid "$image" "$at"
    umount "$at"
fi
xfs_repair -n "$image" > "$out/repair" 2>&1 || { tail -n 4 "$out/repair"; exit 3; }
mount -t xfs -o loop,ro,norecovery,nouuid "$image" "$at"
if [ -d "$at/$folder" ]; then cp -a "$at/$folder" "$out/"; fi
umount "$at"
rmdir "$at"
