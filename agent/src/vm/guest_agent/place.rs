//! Which disk of the VM a disk of the guest is.
//!
//! Owns the place of a disk as both sides can name it: where QEMU put its device, and what the guest's agent tells of it. Promises that
//! two disks are never taken for one another: what only one side knows, or what could be two, is no place.

use serde::Deserialize;
use serde_json::{Value, json};

use super::FsDisk;
use crate::vm::qmp::{Qmp, QmpError};

/// A function on the guest's PCI buses (all in domain 0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pci {
    pub bus: i64,
    pub slot: i64,
    pub function: i64,
}

/// Where a disk is in its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskPlace {
    /// A device of its own: virtio-blk, NVMe.
    Device(Pci),
    /// A disk of a SCSI controller.
    Scsi {
        controller: Pci,
        channel: i64,
        target: i64,
        lun: i64,
    },
}

impl DiskPlace {
    /// Whether the guest speaks of the disk at this place.
    pub fn is_of(&self, disk: &FsDisk) -> bool {
        let Some(told) = disk.pci_controller.filter(|told| told.domain == 0) else {
            return false;
        };
        let told = Pci {
            bus: told.bus.into(),
            slot: told.slot.into(),
            function: told.function.into(),
        };
        match *self {
            Self::Device(pci) => told == pci && matches!(disk.bus_type.as_str(), "virtio" | "nvme"),
            Self::Scsi {
                controller,
                channel,
                target,
                lun,
            } => {
                let unit = [disk.bus, disk.target, disk.unit].map(i64::from);
                told == controller && disk.bus_type == "scsi" && unit == [channel, target, lun]
            }
        }
    }
}

#[derive(Deserialize)]
struct Block {
    #[serde(default)]
    qdev: Option<String>,
    #[serde(default)]
    inserted: Option<Value>,
}

/// The places of the disks with these block nodes; `None` where a disk's place is not known on both sides.
///
/// # Errors
/// QEMU does not answer.
pub async fn places(qmp: &Qmp, nodes: &[String]) -> Result<Vec<Option<DiskPlace>>, QmpError> {
    let blocks: Vec<Block> = qmp.query("query-block").await?;
    let buses: Vec<Value> = qmp.query("query-pci").await?;
    let mut found = Vec::new();
    for node in nodes {
        let mut of_node = blocks.iter().filter(|block| {
            let inserted = block.inserted.as_ref();
            inserted.is_some_and(|inserted| inserted["node-name"] == node.as_str())
        });
        // Two devices with one disk cannot be told apart.
        let device = match (of_node.next(), of_node.next()) {
            (Some(block), None) => block.qdev.as_deref().and_then(device_path),
            _ => None,
        };
        found.push(match device {
            Some(path) => place(qmp, &path, &buses).await?,
            None => None,
        });
    }
    Ok(found)
}

/// The device's own path: "disk0" and "/machine/peripheral/disk0/virtio-backend" are "/machine/peripheral/disk0".
fn device_path(qdev: &str) -> Option<String> {
    let path = qdev.strip_suffix("/virtio-backend").unwrap_or(qdev);
    match path.strip_prefix("/machine/peripheral/").unwrap_or(path) {
        id if id.is_empty() || id.contains('/') => None,
        id => Some(format!("/machine/peripheral/{id}")),
    }
}

async fn place(qmp: &Qmp, device: &str, buses: &[Value]) -> Result<Option<DiskPlace>, QmpError> {
    let id = device.rsplit('/').next().unwrap_or_default();
    if let Some(pci) = on_buses(buses, id) {
        return Ok(Some(DiskPlace::Device(pci)));
    }
    let mut told = Vec::new();
    for property in ["type", "parent_bus", "channel", "scsi-id", "lun"] {
        let asked = json!({ "path": device, "property": property });
        match qmp.query_with::<Value>("qom-get", asked).await {
            Ok(value) => told.push(value),
            Err(error) if error.is_refusal() => return Ok(None),
            Err(error) => return Err(error),
        }
    }
    let [kind, bus, channel, target, lun] = &told[..] else {
        return Ok(None);
    };
    let controller = bus
        .as_str()
        .and_then(|bus| bus.strip_prefix("/machine/peripheral/"))
        .and_then(|bus| on_buses(buses, bus.split('/').next()?));
    let place = || {
        Some(DiskPlace::Scsi {
            controller: controller?,
            channel: channel.as_i64()?,
            target: target.as_i64()?,
            lun: lun.as_i64()?,
        })
    };
    Ok((kind == "scsi-hd").then(place).flatten())
}

/// Where the device `id` is, below bridges too.
fn on_buses(buses: &[Value], id: &str) -> Option<Pci> {
    let mut devices: Vec<&Value> = buses.iter().flat_map(|bus| list(&bus["devices"])).collect();
    while let Some(device) = devices.pop() {
        if device["qdev_id"] == id {
            return Some(Pci {
                bus: device["bus"].as_i64()?,
                slot: device["slot"].as_i64()?,
                function: device["function"].as_i64()?,
            });
        }
        // Answers of QEMU are bounded, so is this.
        devices.extend(list(&device["pci_bridge"]["devices"]));
    }
    None
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::PciPlace;
    use super::*;

    /// A disk behind a PCI slot, as the guest's agent tells of it.
    pub(crate) fn told(bus_type: &str, slot: i32, target: u32) -> FsDisk {
        FsDisk {
            bus_type: bus_type.into(),
            bus: 0,
            target,
            unit: 0,
            pci_controller: Some(PciPlace {
                domain: 0,
                bus: 0,
                slot,
                function: 0,
            }),
            serial: None,
            dev: None,
        }
    }

    #[test]
    fn a_disk_is_recognised_by_all_that_is_known_of_it_or_not_at_all() {
        let pci = Pci {
            bus: 0,
            slot: 4,
            function: 0,
        };
        let device = DiskPlace::Device(pci);
        assert!(device.is_of(&told("virtio", 4, 0)) && device.is_of(&told("nvme", 4, 0)));
        assert!(!device.is_of(&told("virtio", 5, 0)) && !device.is_of(&told("scsi", 4, 0)));
        let scsi = DiskPlace::Scsi {
            controller: pci,
            channel: 0,
            target: 1,
            lun: 0,
        };
        assert!(scsi.is_of(&told("scsi", 4, 1)));
        assert!(!scsi.is_of(&told("scsi", 4, 0)) && !scsi.is_of(&told("virtio", 4, 1)));
        let mut other = told("virtio", 4, 0);
        other.pci_controller.as_mut().unwrap().domain = 1;
        assert!(!device.is_of(&other));
        other.pci_controller = None;
        assert!(!device.is_of(&other));
    }

    #[test]
    fn devices_are_found_below_bridges() {
        let buses = [json!({ "bus": 0, "devices": [
            { "bus": 0, "slot": 1, "function": 0, "qdev_id": "" },
            { "bus": 0, "slot": 2, "function": 0, "qdev_id": "rp0",
              "pci_bridge": { "devices": [{ "bus": 1, "slot": 0, "function": 0, "qdev_id": "disk0" }] } },
        ] })];
        let at = on_buses(&buses, "disk0").unwrap();
        assert_eq!((at.bus, at.slot), (1, 0));
        assert_eq!(on_buses(&buses, "disk1"), None);
    }

    #[test]
    fn devices_without_a_name_have_no_place() {
        let path = Some("/machine/peripheral/disk0".to_owned());
        assert_eq!(device_path("disk0"), path);
        assert_eq!(device_path("/machine/peripheral/disk0/virtio-backend"), path);
        assert_eq!(device_path("/machine/unattached/device[16]"), None);
        assert_eq!(device_path(""), None);
    }
}
