//! Asking a QEMU what it is. The same questions at the source and at the waiting target.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Value, json};

use super::{FactsError, HostCpu, PciFacts, VmFacts, cpu, disks, ramblock};
use crate::vm::outgoing::stats;
use crate::vm::qmp::wire::printable;
use crate::vm::qmp::{Qmp, QmpError};

/// Most devices of one kind of list, and of PCI devices.
const DEVICES_MAX: usize = 2048;
/// Most reasons, jobs and capabilities.
const LIST_MAX: usize = 256;
/// Nesting of PCI bridges.
const BRIDGES_MAX: usize = 16;
/// Built-in objects that are no devices.
const NO_DEVICES: [&str; 3] = ["irq", "memory-region", "container"];

#[derive(Deserialize)]
struct Property {
    name: String,
    #[serde(rename = "type")]
    kind: String,
}

/// Gathers all facts. `host` is this host's CPU: [`HostCpu::read`].
///
/// # Errors
/// What QEMU said, or [`FactsError::TooMany`].
pub async fn gather(qmp: &Qmp, host: HostCpu) -> Result<VmFacts, FactsError> {
    let migration = stats(qmp).await?;
    let machine = json!({ "path": "/machine", "property": "type" });
    let machine: String = qmp.query_with("qom-get", machine).await?;
    let peripherals = children(qmp, "/machine/peripheral").await?;
    let mut nameless = children(qmp, "/machine/peripheral-anon").await?;
    nameless.sort_by_key(|(name, _)| place(name));
    let memory: Value = qmp.query("query-memory-size-summary").await?;
    let bytes = |key: &str| memory[key].as_u64().unwrap_or_default();
    Ok(VmFacts {
        version: qmp.version().clone(),
        status: text(qmp, "query-status", "status").await?,
        name: text(qmp, "query-name", "name").await?,
        uuid: text(qmp, "query-uuid", "UUID").await?,
        machine: printable(machine.strip_suffix("-machine").unwrap_or(&machine)),
        kvm: qmp.query::<Value>("query-kvm").await?["enabled"] == true,
        cpu: cpu::gather(qmp).await?,
        host,
        ram: bytes("base-memory").saturating_add(bytes("plugged-memory")),
        ram_blocks: ramblock::parse(&qmp.human("info ramblock").await?)?,
        devices: peripherals.into_iter().collect(),
        nameless: nameless.into_iter().map(|(_, kind)| kind).collect(),
        built_in: built_in(qmp).await?,
        pci: pci(qmp).await?,
        disks: disks::gather(qmp).await?,
        blockers: bounded("migration blockers", migration.blocked, LIST_MAX)?,
        block_jobs: block_jobs(qmp).await?,
        tpms: tpms(qmp).await?,
        migration: migration.status.to_string(),
        capabilities: capabilities(qmp).await?,
    })
}

async fn text(qmp: &Qmp, command: &str, key: &str) -> Result<String, QmpError> {
    let value: Value = qmp.query(command).await?;
    Ok(printable(value[key].as_str().unwrap_or_default()))
}

/// The child objects under a QOM path: name and type.
async fn children(qmp: &Qmp, path: &str) -> Result<Vec<(String, String)>, FactsError> {
    let properties: Vec<Property> = match qmp.query_with("qom-list", json!({ "path": path })).await {
        Ok(properties) => properties,
        Err(error) if error.is_refusal() => return Ok(Vec::new()), // There is none of it.
        Err(error) => return Err(error.into()),
    };
    let children = properties.into_iter().filter_map(|property| {
        let kind = property.kind.strip_prefix("child<")?.strip_suffix('>')?;
        Some((printable(&property.name), printable(kind)))
    });
    bounded("devices", children.collect(), DEVICES_MAX)
}

/// `device[12]` comes after `device[7]`.
fn place(name: &str) -> Option<u32> {
    name.split_once('[')?.1.strip_suffix(']')?.parse().ok()
}

async fn built_in(qmp: &Qmp) -> Result<BTreeMap<String, u32>, FactsError> {
    let mut counts = BTreeMap::new();
    for (_, kind) in children(qmp, "/machine/unattached").await? {
        if !NO_DEVICES.contains(&kind.as_str()) {
            *counts.entry(kind).or_default() += 1;
        }
    }
    Ok(counts)
}

async fn pci(qmp: &Qmp) -> Result<Vec<PciFacts>, FactsError> {
    let buses: Value = match qmp.query("query-pci").await {
        Ok(buses) => buses,
        Err(error) if error.is_refusal() => return Ok(Vec::new()), // A machine without PCI.
        Err(error) => return Err(error.into()),
    };
    let mut found = Vec::new();
    for bus in buses.as_array().into_iter().flatten() {
        collect_pci(&bus["devices"], BRIDGES_MAX, &mut found)?;
    }
    found.sort();
    Ok(found)
}

fn collect_pci(devices: &Value, depth: usize, found: &mut Vec<PciFacts>) -> Result<(), FactsError> {
    let number = |value: &Value| {
        value
            .as_u64()
            .and_then(|n| u32::try_from(n).ok())
            .unwrap_or_default()
    };
    for device in devices.as_array().into_iter().flatten() {
        if found.len() == DEVICES_MAX {
            let (what, max) = ("PCI devices", DEVICES_MAX);
            return Err(FactsError::TooMany { what, max });
        }
        found.push(PciFacts {
            bus: number(&device["bus"]),
            slot: number(&device["slot"]),
            function: number(&device["function"]),
            vendor: number(&device["id"]["vendor"]),
            device: number(&device["id"]["device"]),
            id: printable(device["qdev_id"].as_str().unwrap_or_default()),
        });
        if let Some(depth) = depth.checked_sub(1) {
            collect_pci(&device["pci_bridge"]["devices"], depth, found)?;
        }
    }
    Ok(())
}

async fn block_jobs(qmp: &Qmp) -> Result<Vec<String>, FactsError> {
    let jobs: Vec<Value> = qmp.query("query-block-jobs").await?;
    let name = |job: &Value| {
        let text = |key: &str| job[key].as_str().unwrap_or("?");
        printable(&format!("{} of {}", text("type"), text("device")))
    };
    bounded("block jobs", jobs.iter().map(name).collect(), LIST_MAX)
}

async fn tpms(qmp: &Qmp) -> Result<Vec<String>, FactsError> {
    let tpms: Vec<Value> = match qmp.query("query-tpm").await {
        Ok(tpms) => tpms,
        Err(error) if error.is_refusal() => return Ok(Vec::new()), // Built without TPMs.
        Err(error) => return Err(error.into()),
    };
    let model = |tpm: &Value| printable(tpm["model"].as_str().unwrap_or("tpm"));
    bounded("TPMs", tpms.iter().map(model).collect(), LIST_MAX)
}

async fn capabilities(qmp: &Qmp) -> Result<Vec<String>, FactsError> {
    let all: Vec<Value> = qmp.query("query-migrate-capabilities").await?;
    let on = all.iter().filter(|one| one["state"] == true);
    let names = on.filter_map(|one| one["capability"].as_str().map(printable));
    bounded("capabilities", names.collect(), LIST_MAX)
}

fn bounded<T>(what: &'static str, list: Vec<T>, max: usize) -> Result<Vec<T>, FactsError> {
    if list.len() > max {
        return Err(FactsError::TooMany { what, max });
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bridges_are_followed_so_far() {
        let mut nested = json!([]);
        for bus in (0..40).rev() {
            nested = json!([{ "bus": bus, "slot": 1, "function": 0, "id": { "vendor": 1, "device": 2 }, "pci_bridge": { "devices": nested } }]);
        }
        let mut found = Vec::new();
        collect_pci(&nested, BRIDGES_MAX, &mut found).unwrap();
        assert_eq!(found.len(), BRIDGES_MAX + 1);
        assert_eq!(place("device[12]"), Some(12));
        assert_eq!(place("x"), None);
    }
}
