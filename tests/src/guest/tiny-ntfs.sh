#!/bin/sh
# Makes the tiny disk with NTFS: 1 GiB with about 60 MB of real files (libraries of this machine) and about 190 MB of old data in free
# clusters, as after files were deleted. Mounts nothing and needs no rights.
# Usage: tiny-ntfs.sh OUTPUT_FILE WORK_DIRECTORY
set -eu
out=$1 work=$2

find -L /usr/lib /usr/share -xdev -type f -size -4M -size +8k -printf '%s %p\n' 2>/dev/null | sort -k2 |
    awk '{ sum += $1; if (sum < 60000000) print "keep", $2; if (sum > 250000000) exit; print "old", $2 }' > "$work/list"
: > "$work/keep"
: > "$work/old"
while read -r what path; do
    echo "$path" >> "$work/$what"
done < "$work/list"
[ -s "$work/old" ] || { echo "this machine has too few files under /usr/lib to fill a disk with" >&2; exit 1; }

# What was there before the file system was made is what deleted files leave: data in free clusters.
truncate -s 1024M "$work/disk"
xargs -d '\n' cat < "$work/old" | dd of="$work/disk" bs=1M seek=700 conv=notrunc iflag=fullblock 2> "$work/dd.log"
mkntfs -q -F -f -L longhaul "$work/disk"
n=0
while read -r path; do
    n=$((n + 1))
    ntfscp -q "$work/disk" "$path" "$n" > "$work/cp.log" 2>&1 || { cat "$work/cp.log" >&2; exit 1; }
done < "$work/keep"
ntfsresize -c "$work/disk" > "$work/check.log" 2>&1 || { cat "$work/check.log" >&2; exit 1; }
mv "$work/disk" "$out"
