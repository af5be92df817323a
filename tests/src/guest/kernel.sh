#!/bin/sh
# Unpacks Debian's cloud kernel and makes an initial RAM disk for it: busybox, the modules for a virtio disk with ext4, XFS or FUSE, and an
# init that starts the guest's own check, or a workload if the kernel's command line names one. Installs nothing on the host.
# Usage: kernel.sh OUTPUT_DIRECTORY WORK_DIRECTORY
set -eu
out=$1 work=$2
cd "$work"

package=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image/ { print $2; exit }')
[ -n "$package" ] || { echo "the apt sources of this machine offer no linux-image-cloud-amd64" >&2; exit 1; }
chmod 755 .
apt-get -qq -o APT::Sandbox::User=root download "$package"
mkdir kernel
dpkg-deb -x linux-image-*.deb kernel
version=$(basename kernel/lib/modules/*)
busybox depmod -b "$work/kernel" "$version"

mkdir -p initrd/bin initrd/dev initrd/proc initrd/sys initrd/disk initrd/modules
cp /bin/busybox initrd/bin/busybox 2>/dev/null || cp /usr/bin/busybox initrd/bin/busybox
# Each module after those it needs: modules.dep lists them nearest first.
modules=kernel/lib/modules/$version
: > initrd/modules/order
needs() {
    # crc32c is asked for at run time and in no dependency list.
    for name in virtio_pci virtio_blk virtio_console crc32c_generic crc32c-intel ext4 xfs fuse; do
        awk -F: -v name="/$name.ko" 'substr($1, length($1) - length(name) + 1) == name {
            n = split($2, list, " ")
            for (i = n; i > 0; i--) print list[i]
            print $1
        }' "$modules/modules.dep"
    done | awk '!seen[$0]++'
}
for module in $(needs); do
    cp "$modules/$module" initrd/modules/
    basename "$module" >> initrd/modules/order
done

cat > initrd/init <<'INIT'
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
root=$(/bin/busybox sed -n 's/.*longhaul.root=\([^ ]*\).*/\1/p' /proc/cmdline)
fs=$(/bin/busybox sed -n 's/.*longhaul.fs=\([^ ]*\).*/\1/p' /proc/cmdline)
for module in $(/bin/busybox cat /modules/order); do
    case $module in
        xfs.ko*) [ "$fs" = xfs ] || continue ;;
        fuse.ko*) [ "$fs" = ntfs ] || continue ;;
    esac
    /bin/busybox insmod "/modules/$module"
done
# The small guest has no memory to spare for files that nobody reads again.
/bin/busybox rm -rf /modules
case $fs in
    ntfs) /usr/bin/ntfs-3g -o no_mtab "$root" /disk ;;
    *) /bin/busybox mount -t "${fs:-ext4}" "$root" /disk ;;
esac || { echo "LONGHAUL-GUEST-FAILED cannot mount $root"; /bin/busybox poweroff -f; }
if /bin/busybox grep -q longhaul.workload= /proc/cmdline; then
    # One console for words in both directions: nothing is echoed, lines end as they are written.
    /bin/busybox stty -echo -onlcr < /dev/console
    if [ -x /usr/sbin/qemu-ga ]; then
        for port in /sys/class/virtio-ports/*; do
            [ "$(/bin/busybox cat "$port/name")" = org.qemu.guest_agent.0 ] || continue
            /usr/sbin/qemu-ga -m virtio-serial -p "/dev/${port##*/}" -t /run -f /run/qemu-ga.pid -l /run/qemu-ga.log < /dev/null > /dev/null 2>&1 &
        done
    fi
    /bin/longhaul-guest-load < /dev/console > /dev/console 2>&1
    /bin/busybox umount /disk || /bin/busybox mount -o remount,ro /disk
    /bin/busybox poweroff -f
fi
/bin/busybox mount --move /dev /disk/dev
/bin/busybox mount --move /proc /disk/proc
/bin/busybox chroot /disk /sbin/longhaul-guest
/bin/busybox umount /disk/dev /disk/proc /disk
/bin/busybox poweroff -f
INIT
chmod 755 initrd/init
(cd initrd && find . | busybox cpio -o -H newc 2>/dev/null | gzip -1) > "$out/initrd"
cp kernel/boot/vmlinuz-* "$out/vmlinuz"
echo "$version" > "$out/version"
