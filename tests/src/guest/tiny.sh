#!/bin/sh
# Makes the tiny disk: 1 GiB ext4 with about 60 MB of real files (libraries of this machine) and about 250 MB of old data in free
# blocks, as after files were deleted. Mounts nothing and needs no rights.
# Usage: tiny.sh OUTPUT_FILE WORK_DIRECTORY
set -eu
out=$1 work=$2

mkdir -p "$work/root/usr/lib" "$work/root/old" "$work/root/run"
# Many libraries up to 60 MB stay; those and the next 130 MB are written once more and deleted.
find -L /usr/lib /usr/share -xdev -type f -size -4M -size +8k -printf '%s %p\n' 2>/dev/null | sort -k2 |
    awk '{ sum += $1; if (sum < 60000000) print "keep", $2; if (sum > 250000000) exit; print "old", $2 }' > "$work/list"
n=0
while read -r what path; do
    n=$((n + 1))
    case $what in
        keep) cp "$path" "$work/root/usr/lib/$n" ;;
        old) cp "$path" "$work/root/old/$n" && echo "rm /old/$n" >> "$work/commands" ;;
    esac
done < "$work/list"
[ "$n" -gt 100 ] || { echo "this machine has too few files under /usr/lib to fill a disk with" >&2; exit 1; }

truncate -s 1024M "$work/disk"
mkfs.ext4 -q -b 4096 -L longhaul -E lazy_itable_init=0,lazy_journal_init=0 -d "$work/root" "$work/disk"
debugfs -w -f "$work/commands" "$work/disk" > "$work/debugfs.log" 2>&1
e2fsck -fn "$work/disk" > "$work/fsck.log" 2>&1 || { cat "$work/fsck.log" >&2; exit 1; }
mv "$work/disk" "$out"
