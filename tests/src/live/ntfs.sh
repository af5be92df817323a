#!/bin/sh
# Takes a folder out of an NTFS image, after its clusters were counted. What a guest wrote without a journal, as ntfs-3g does, is not
# repaired first.
# Usage: ntfs.sh IMAGE FOLDER OUTPUT_DIRECTORY
set -eu
image=$1 folder=$2 out=$3
ntfsresize -c -f "$image" > "$out/check" 2>&1 || { tail -n 4 "$out/check"; exit 3; }
at=$(mktemp -d "$out/mount.XXXXXX")
ntfs-3g -o ro,no_mtab "$image" "$at" 2> "$out/said" || { tail -n 4 "$out/said"; exit 4; }
if [ -d "$at/$folder" ]; then cp -r "$at/$folder" "$out/"; fi
umount "$at"
rmdir "$at"
