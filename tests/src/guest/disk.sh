#!/bin/sh
# Makes a raw ext4 disk from a packed root, then uses it as a machine in service does: files are written and deleted, so that
# free blocks hold old data, and some are kept twice. The file system ends unmounted and clean.
# Runs in a mount namespace of its own: the mount is gone with this process, however it ends.
# Usage: disk.sh OUTPUT_FILE WORK_DIRECTORY ROOT_TAR SIZE_MIB DELETED_COPIES
set -eu
out=$1 work=$2 root=$3 size=$4 copies=$5

truncate -s "${size}M" "$work/disk"
mkfs.ext4 -q -b 4096 -L longhaul -E lazy_itable_init=0,lazy_journal_init=0 "$work/disk"
mkdir "$work/mount"
mount -o loop "$work/disk" "$work/mount"
tar -C "$work/mount" --numeric-owner --xattrs -xf "$root"
mkdir "$work/mount/old"
n=0
while [ "$n" -lt "$copies" ]; do
    mkdir "$work/mount/old/$n"
    cp -a "$work/mount/usr" "$work/mount/var" "$work/mount/old/$n/"
    n=$((n + 1))
done
sync -f "$work/mount"
rm -rf "$work/mount/old"
cp -a "$work/mount/usr/lib" "$work/mount/srv/lib"
umount "$work/mount"
e2fsck -fn "$work/disk" > "$work/fsck.log" 2>&1 || { cat "$work/fsck.log" >&2; exit 1; }
mv "$work/disk" "$out"
