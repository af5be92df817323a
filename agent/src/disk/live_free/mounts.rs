//! Which part of a disk a mount of the guest is.
//!
//! Owns the way from a device name as the guest's agent tells it ("vda2", "dm-0") to a part. Leaves alone which disk of the VM the
//! device belongs to: the caller gives only the mounts that `guest-get-fsinfo` maps to this disk. Promises to leave a part out
//! where two could be meant.

/// A mounted file system as `guest-get-fsinfo` tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Name of the block device: "vda2", "nvme0n1p1", "dm-0", "sdb".
    pub device: String,
    /// Type: "ext4", "xfs".
    pub kind: String,
}

/// What a device name says of the place on its disk.
#[derive(Debug, PartialEq, Eq)]
enum Device {
    Partition(u32),
    /// Made by the device mapper: a logical volume, if anything of ours.
    Mapped,
    Whole,
}

impl Mount {
    /// Whether one of `mounts` is the file system of `kind` at `place`; `all` are the file systems of the disk.
    pub(super) fn covers(mounts: &[Self], place: &str, kind: &str, all: &[(String, String)]) -> bool {
        let same_kind = |mount: &&Self| family(&mount.kind) == family(kind) && family(kind).is_some();
        let mut mounts = mounts.iter().filter(same_kind);
        if place.starts_with("logical volume ") {
            // The kernel's number of a mapped device says nothing of which volume it is: only a single one can be meant.
            let volumes = all.iter().filter(|(place, other)| {
                place.starts_with("logical volume ") && family(other) == family(kind)
            });
            let mapped = mounts.filter(|mount| device(&mount.device) == Device::Mapped);
            return volumes.count() == 1 && mapped.count() == 1;
        }
        let wanted = match place.strip_prefix("partition ").map(str::parse) {
            Some(Ok(number)) => Device::Partition(number),
            None if place == "whole disk" => Device::Whole,
            _ => return false,
        };
        mounts.any(|mount| device(&mount.device) == wanted)
    }
}

/// File systems that a freeze stops, by the driver that does it.
fn family(kind: &str) -> Option<&'static str> {
    match kind {
        "ext2" | "ext3" | "ext4" => Some("ext"),
        "xfs" => Some("xfs"),
        _ => None,
    }
}

fn device(name: &str) -> Device {
    let name = name.strip_prefix("/dev/").unwrap_or(name);
    if name.starts_with("dm-") || name.contains('/') {
        return Device::Mapped;
    }
    let base = name.trim_end_matches(|c: char| c.is_ascii_digit());
    let number = name[base.len()..].parse();
    // Disks whose own name ends in a digit put a "p" before the partition's.
    let numbered = ["nvme", "mmcblk", "loop", "nbd", "md", "pmem"];
    let is_numbered = numbered.iter().any(|prefix| name.starts_with(prefix));
    let is_partition = !is_numbered
        || base
            .strip_suffix('p')
            .is_some_and(|disk| disk.ends_with(|c: char| c.is_ascii_digit()));
    match number {
        Ok(number) if is_partition => Device::Partition(number),
        _ => Device::Whole,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(device: &str, kind: &str) -> Mount {
        Mount {
            device: device.into(),
            kind: kind.into(),
        }
    }

    #[test]
    fn names_of_devices_tell_partitions() {
        let partitions = [
            "vda2",
            "sdb2",
            "/dev/sda2",
            "nvme0n1p2",
            "mmcblk0p2",
            "xvda2",
            "loop0p2",
        ];
        assert!(partitions.iter().all(|name| device(name) == Device::Partition(2)));
        assert!(
            ["vda", "nvme0n1", "mmcblk0", "loop0", "md0"]
                .iter()
                .all(|name| device(name) == Device::Whole)
        );
        assert!(
            ["dm-0", "/dev/mapper/vg-root"]
                .iter()
                .all(|name| device(name) == Device::Mapped)
        );
    }

    #[test]
    fn a_mapped_mount_counts_only_where_one_volume_can_be_meant() {
        let one = [("logical volume vg/root".to_owned(), "ext4".to_owned())];
        let two = [
            one[0].clone(),
            ("logical volume vg/home".to_owned(), "ext4".to_owned()),
        ];
        let mounts = [mount("dm-0", "ext4")];
        assert!(Mount::covers(&mounts, "logical volume vg/root", "ext4", &one));
        assert!(!Mount::covers(&mounts, "logical volume vg/root", "ext4", &two));
        assert!(!Mount::covers(&mounts, "partition 1", "ext4", &one));
        assert!(!Mount::covers(
            &[mount("vda1", "ntfs")],
            "partition 1",
            "ntfs",
            &[]
        ));
        assert!(Mount::covers(
            &[mount("vda1", "ext3")],
            "partition 1",
            "ext4",
            &[]
        ));
        assert!(!Mount::covers(
            &[mount("vda1", "xfs")],
            "partition 1",
            "ext4",
            &[]
        ));
        assert!(Mount::covers(&[mount("vdb", "xfs")], "whole disk", "xfs", &[]));
    }
}
