#!/bin/sh
# Compiles the guest's workload program, statically, and adds it to the initial RAM disk: the kernel unpacks archives that follow
# one another.
# Usage: load.sh OUTPUT_FILE WORK_DIRECTORY INITRD   (the program's sources are in WORK_DIRECTORY/source)
set -eu
out=$1 work=$2 initrd=$3

"${RUSTC:-rustc}" --edition 2024 --crate-name longhaul_guest_load -C opt-level=2 -C strip=symbols \
    -C target-feature=+crt-static --cap-lints allow -o "$work/program" "$work/source/main.rs"
mkdir -p "$work/root/bin"
cp "$work/program" "$work/root/bin/longhaul-guest-load"
(cd "$work/root" && find . | busybox cpio -o -H newc 2>/dev/null | gzip -1) > "$work/archive"
cat "$initrd" "$work/archive" > "$work/both"
mv "$work/both" "$out"
