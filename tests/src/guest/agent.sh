#!/bin/sh
# Adds Debian's guest agent, with the libraries that it needs, to an initial RAM disk. Installs nothing on the host.
# Usage: agent.sh OUTPUT_FILE WORK_DIRECTORY INITRD
set -eu
out=$1 work=$2 initrd=$3
cd "$work"

chmod 755 .
apt-get -qq -o APT::Sandbox::User=root download qemu-guest-agent
mkdir package root
dpkg-deb -x qemu-guest-agent_*.deb package
mkdir -p root/usr/sbin root/run
cp package/usr/sbin/qemu-ga root/usr/sbin/
ldd root/usr/sbin/qemu-ga | awk '$1 ~ /^\// { print $1 } $3 ~ /^\// { print $3 } /not found/ { print "missing: " $1 > "/dev/stderr"; exit 1 }' > libraries
while read -r library; do
    mkdir -p "root$(dirname "$library")"
    cp -L "$library" "root$library"
done < libraries
(cd root && find . | busybox cpio -o -H newc 2>/dev/null | gzip -1) > archive
cat "$initrd" archive > both
mv both "$out"
