#!/bin/sh
# Makes the tiny disk with XFS: 1 GiB with about 60 MB of real files (libraries of this machine) and about 190 MB of old data in free
# blocks, as after files were deleted. Mounts nothing and needs no rights.
# Usage: tiny-xfs.sh OUTPUT_FILE WORK_DIRECTORY
set -eu
out=$1 work=$2

find -L /usr/lib /usr/share -xdev -type f -size -4M -size +8k -printf '%s %p\n' 2>/dev/null | sort -k2 |
    awk '{ sum += $1; if (sum < 60000000) print "keep", $2; if (sum > 250000000) exit; print "old", $2 }' > "$work/list"
n=0
printf '/\n0 0\nd--755 0 0\nusr d--755 0 0\nlib d--755 0 0\n' > "$work/tree"
: > "$work/old"
while read -r what path; do
    case $path in *' '*) continue ;; esac
    n=$((n + 1))
    case $what in
        keep) echo "$n ---644 0 0 $path" >> "$work/tree" ;;
        old) echo "$path" >> "$work/old" ;;
    esac
done < "$work/list"
printf '$\n$\n$\n' >> "$work/tree"
[ "$n" -gt 100 ] || { echo "this machine has too few files under /usr/lib to fill a disk with" >&2; exit 1; }

# What was there before the file system was made is what deleted files leave: data in free blocks.
truncate -s 1024M "$work/disk"
xargs -d '\n' cat < "$work/old" | dd of="$work/disk" bs=1M seek=600 conv=notrunc iflag=fullblock 2> "$work/dd.log"
mkfs.xfs -q -f -K -L longhaul -p "$work/tree" "$work/disk"
xfs_repair -n "$work/disk" > "$work/repair.log" 2>&1 || { cat "$work/repair.log" >&2; exit 1; }
mv "$work/disk" "$out"
