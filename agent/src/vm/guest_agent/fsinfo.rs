//! Which file system of the guest lies on which of its disks, as its agent tells it.
//!
//! The guest may lie: it is believed only about its own blocks, and only where a disk can be recognised.

use serde::Deserialize;

/// A mounted file system.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct FsInfo {
    /// Of the device, such as `vda1`.
    pub name: String,
    pub mountpoint: String,
    /// Such as `ext4`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The disks it lies on; none where the agent does not know.
    #[serde(default, rename = "disk")]
    pub disks: Vec<FsDisk>,
}

/// A disk, by what both sides can see of it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FsDisk {
    #[serde(default)]
    pub bus_type: String,
    #[serde(default)]
    pub bus: u32,
    #[serde(default)]
    pub target: u32,
    #[serde(default)]
    pub unit: u32,
    pub pci_controller: Option<PciPlace>,
    /// The disk's serial number, where it was given one.
    pub serial: Option<String>,
    /// The guest's name of it, such as `/dev/vda`.
    pub dev: Option<String>,
}

/// Where the disk's controller is; -1 where the agent does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct PciPlace {
    pub domain: i32,
    pub bus: i32,
    pub slot: i32,
    pub function: i32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_old_and_new_agents_are_read() {
        let text = r#"[{"name":"vda1","mountpoint":"/","type":"ext4","disk":[{"bus-type":"virtio","bus":0,"unit":0,"target":0,
            "pci-controller":{"bus":0,"slot":4,"domain":0,"function":0},"dev":"/dev/vda"}],"used-bytes":1,"total-bytes":2},
            {"name":"tmpfs","mountpoint":"/x","type":"tmpfs"}]"#;
        let all: Vec<FsInfo> = serde_json::from_str(text).unwrap();
        assert_eq!(all[0].disks[0].pci_controller.unwrap().slot, 4);
        assert!(all[1].disks.is_empty());
    }
}
