#!/bin/sh
# Makes a small Debian root with debootstrap, from the mirror and release that this machine's apt uses, and packs it.
# Usage: root.sh OUTPUT_FILE WORK_DIRECTORY PACKAGES   (PACKAGES separated by commas, may be empty)
set -eu
out=$1 work=$2 packages=$3

# The first Debian archive in the apt sources that is neither updates nor security.
source=$(apt-get indextargets --format '$(REPO_URI) $(CODENAME) $(LABEL)' 'Created-By: Packages' 'Origin: Debian' 2>/dev/null |
    awk '$3 == "Debian" && $2 !~ /-/ { print $1, $2; exit }')
[ -n "$source" ] || { echo "no Debian archive in this machine's apt sources (try apt-get update)" >&2; exit 1; }
mirror=${source% *} release=${source#* }

debootstrap --variant=minbase ${packages:+--include="$packages"} "$release" "$work/root" "$mirror" > "$work/debootstrap.log" 2>&1 || {
    tail -n 5 "$work/debootstrap.log" >&2
    exit 1
}
rm -rf "$work/root/var/cache/apt/archives" "$work/root/var/lib/apt/lists"
mkdir -p "$work/root/var/cache/apt/archives/partial" "$work/root/var/lib/apt/lists/partial" "$work/root/var/lib/longhaul"
echo longhaul-guest > "$work/root/etc/hostname"

# What the guest checks after it has booted: every file under /usr and /etc.
(cd "$work/root" && find usr etc -xdev -type f -print0 | sort -z | xargs -0 sha256sum) > "$work/manifest"
mv "$work/manifest" "$work/root/var/lib/longhaul/manifest"
cat > "$work/root/sbin/longhaul-guest" <<'GUEST'
#!/bin/sh
# Runs as the first program of the guest: says that it is up, proves its own files, tries a write, says so.
say() { echo "$@" > /dev/console; }
export PATH=/usr/sbin:/usr/bin
say "LONGHAUL-GUEST-UP $(uname -r)"
cd /
if sha256sum --check --quiet /var/lib/longhaul/manifest > /tmp/wrong 2>&1; then
    date > /var/lib/longhaul/booted && sync || { say "LONGHAUL-GUEST-FAILED cannot write"; exit; }
    say "LONGHAUL-GUEST-OK $(wc -l < /var/lib/longhaul/manifest) files"
else
    say "LONGHAUL-GUEST-FAILED $(wc -l < /tmp/wrong) files differ, first: $(head -n 1 /tmp/wrong)"
fi
GUEST
chmod 755 "$work/root/sbin/longhaul-guest"
tar -C "$work/root" --numeric-owner --xattrs -cf "$out" .
