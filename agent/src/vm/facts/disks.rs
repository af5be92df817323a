//! A VM's disks: which block node its guest sees as which disk.
//!
//! The root node of a device's backend is what the guest sees, filters on top of the image included; there bitmaps and
//! exports belong. UEFI variable stores (flash) are disks like any other; read-only media are told apart, since they are
//! copied, mapped or ejected by rule.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::FactsError;
use crate::vm::qmp::Qmp;
use crate::vm::qmp::wire::printable;

/// Most disks of one VM.
pub(super) const DISKS_MAX: usize = 256;

/// What a device is to its guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskKind {
    #[default]
    Disk,
    Cdrom,
    Floppy,
    /// Firmware (read-only) or its variables.
    Flash,
}

/// A disk that is inserted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskFacts {
    /// How people call it: the device's id where it has one, else its backend's name, else its path.
    pub name: String,
    /// The device's QOM path; empty where nothing uses it.
    pub device: String,
    /// The root node: what the guest sees.
    pub node: String,
    /// Driver of the root node, such as `qcow2`.
    pub format: String,
    /// What it is stored in, as QEMU names it.
    pub file: String,
    /// Bytes, as the guest sees it.
    pub size: u64,
    pub is_read_only: bool,
    pub kind: DiskKind,
    pub is_removable: bool,
    /// The guest holds the medium: it has locked the tray.
    #[serde(default)]
    pub is_locked: bool,
    /// Images under it.
    pub backing_depth: u32,
    pub is_encrypted: bool,
    /// Internal snapshots, which stay behind.
    pub snapshots: u32,
}

impl DiskFacts {
    /// Whether its content can change while the VM runs: it takes part in rounds.
    pub const fn is_live(&self) -> bool {
        !self.is_read_only
    }
}

pub(super) async fn gather(qmp: &Qmp) -> Result<Vec<DiskFacts>, FactsError> {
    let blocks: Vec<Value> = qmp.query("query-block").await?;
    let mut disks = Vec::new();
    for block in &blocks {
        let Some(mut disk) = disk(block) else {
            continue; // An empty drive.
        };
        if disks.len() == DISKS_MAX {
            let (what, max) = ("disks", DISKS_MAX);
            return Err(FactsError::TooMany { what, max });
        }
        disk.kind = kind(qmp, &disk).await?;
        disks.push(disk);
    }
    Ok(disks)
}

async fn kind(qmp: &Qmp, disk: &DiskFacts) -> Result<DiskKind, FactsError> {
    if disk.device.is_empty() {
        return Ok(DiskKind::Disk);
    }
    let asked = json!({ "path": disk.device, "property": "type" });
    match qmp.query_with::<String>("qom-get", asked).await {
        Ok(name) => Ok(kind_of(&name)),
        Err(error) if error.is_refusal() => Ok(DiskKind::Disk),
        Err(error) => Err(error.into()),
    }
}

fn kind_of(type_name: &str) -> DiskKind {
    match type_name {
        "ide-cd" | "scsi-cd" => DiskKind::Cdrom,
        "floppy" => DiskKind::Floppy,
        name if name.starts_with("cfi.pflash") => DiskKind::Flash,
        _ => DiskKind::Disk,
    }
}

/// Reads one entry of `query-block`.
fn disk(block: &Value) -> Option<DiskFacts> {
    let text = |value: &Value| printable(value.as_str().unwrap_or_default());
    let number = |value: &Value| value.as_u64().and_then(|n| u32::try_from(n).ok());
    let inserted = block.get("inserted")?;
    let image = &inserted["image"];
    // A device with an id is told by it, others by their path.
    let path = match text(&block["qdev"]) {
        id if id.is_empty() || id.starts_with('/') => id,
        id => format!("/machine/peripheral/{id}"),
    };
    let backend = text(&block["device"]);
    let device = path.strip_suffix("/virtio-backend").unwrap_or(&path).to_owned();
    let id = device.strip_prefix("/machine/peripheral/").map(str::to_owned);
    let name = [id.unwrap_or_default(), backend, device.clone()];
    Some(DiskFacts {
        name: name.into_iter().find(|name| !name.is_empty())?,
        node: inserted["node-name"]
            .as_str()
            .filter(|node| node.len() < 256)?
            .to_owned(),
        format: text(&inserted["drv"]),
        file: text(&image["filename"]),
        size: image["virtual-size"].as_u64()?,
        is_read_only: inserted["ro"] == true,
        kind: DiskKind::Disk,
        is_removable: block["removable"] == true,
        is_locked: block["locked"] == true,
        backing_depth: number(&inserted["backing_file_depth"]).unwrap_or_default(),
        is_encrypted: inserted["encrypted"] == true,
        snapshots: image["snapshots"].as_array().map_or(0, |all| all.len() as u32),
        device,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_named_by_its_device() {
        let block = |qdev: &str, device: &str| {
            disk(&json!({
                "qdev": qdev, "device": device, "removable": false,
                "inserted": { "node-name": "#block1", "drv": "raw", "ro": false, "image": { "virtual-size": 512, "filename": "f" } },
            }))
        };
        assert_eq!(
            block("/machine/peripheral/vd0/virtio-backend", "").unwrap().name,
            "vd0"
        );
        assert_eq!(
            block("/machine/unattached/device[16]", "ide0").unwrap().name,
            "ide0"
        );
        assert_eq!(
            block("/machine/system.flash0", "").unwrap().name,
            "/machine/system.flash0"
        );
        assert_eq!(block("cd0", "c0").unwrap().device, "/machine/peripheral/cd0");
        assert_eq!(block("", ""), None);
        assert_eq!(disk(&json!({ "device": "cd", "tray_open": true })), None);
        assert_eq!(
            (kind_of("ide-cd"), kind_of("cfi.pflash01")),
            (DiskKind::Cdrom, DiskKind::Flash)
        );
    }
}
