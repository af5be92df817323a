#!/bin/sh
# Adds a program of a Debian package, with the libraries that it needs, to an initial RAM disk. Installs nothing on the host.
# Usage: program.sh OUTPUT_FILE WORK_DIRECTORY INITRD PACKAGE PROGRAM   (PROGRAM is its place in the guest)
set -eu
out=$1 work=$2 initrd=$3 package=$4 program=$5
cd "$work"

chmod 755 .
apt-get -qq -o APT::Sandbox::User=root download "$package"
mkdir package root
dpkg-deb -x "$package"_*.deb package
mkdir -p "root$(dirname "$program")" root/run
# Releases of Debian disagree on /bin and /usr/bin.
found=$(find package -type f -path "*bin/${program##*/}" | head -n 1)
[ -n "$found" ] || { echo "$package has no ${program##*/}" >&2; exit 1; }
cp "$found" "root$program"
ldd "root$program" | awk '$1 ~ /^\// { print $1 } $3 ~ /^\// { print $3 } /not found/ { print "missing: " $1 > "/dev/stderr"; exit 1 }' > libraries
while read -r library; do
    mkdir -p "root$(dirname "$library")"
    cp -L "$library" "root$library"
done < libraries
(cd root && find . | busybox cpio -o -H newc 2>/dev/null | gzip -1) > archive
cat "$initrd" archive > both
mv both "$out"
