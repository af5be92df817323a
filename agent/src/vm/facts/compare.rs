//! What makes the waiting target unlike the source. Pure.
//!
//! QEMU matches devices and RAM blocks by name and trusts the rest: a CPU that lacks what the guest uses is noticed by the
//! guest, later. So everything that can be told is told before.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use super::{DiskFacts, DiskKind, Finding, PciFacts, Subject, VmFacts};

const NO_UUID: &str = "00000000-0000-0000-0000-000000000000";

/// Every difference that matters, the worst first.
pub fn compare(source: &VmFacts, target: &VmFacts) -> Vec<Finding> {
    let mut findings = Vec::new();
    findings.extend(machine(source, target));
    findings.extend(accelerator(source, target));
    findings.extend(cpu(source, target));
    findings.extend(ram(source, target));
    findings.extend(devices(source, target));
    findings.extend(pci(source, target));
    findings.extend(disks(source, target));
    findings.extend(identity(source, target));
    findings.extend(version(source, target));
    findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    findings
}

fn machine(source: &VmFacts, target: &VmFacts) -> Option<Finding> {
    (source.machine != target.machine).then(|| {
        let cause = format!(
            "the source's machine is a {}, the target's a {}",
            source.machine, target.machine
        );
        let remedy = format!(
            "start the target with -machine {} (no alias such as q35)",
            source.machine
        );
        Finding::refuse(Subject::Machine, cause, remedy)
    })
}

fn accelerator(source: &VmFacts, target: &VmFacts) -> Option<Finding> {
    let name = |vm: &VmFacts| if vm.kvm { "kvm" } else { "tcg" };
    (source.kvm != target.kvm).then(|| {
        let cause = format!(
            "the source runs with {}, the target with {}",
            name(source),
            name(target)
        );
        let remedy = format!("start the target with -accel {}", name(source));
        Finding::refuse(Subject::Accelerator, cause, remedy)
    })
}

fn cpu(source: &VmFacts, target: &VmFacts) -> Vec<Finding> {
    let (from, to) = (&source.cpu, &target.cpu);
    let mut findings = Vec::new();
    let mut refuse = |cause: String, remedy: String| {
        findings.push(Finding::refuse(Subject::Cpu, cause, remedy));
    };
    if from.model != to.model {
        let cause = format!(
            "the source's CPU model is {}, the target's {}",
            from.model, to.model
        );
        refuse(
            cause,
            format!("start the target with -cpu {} and the same options", from.model),
        );
    }
    if from.count != to.count {
        let cause = format!(
            "the source has {} virtual CPUs, the target {}",
            from.count, to.count
        );
        refuse(cause, format!("start the target with {} (-smp)", from.count));
    }
    let differing = differing_words(&from.features, &to.features);
    if !differing.is_empty() {
        let cause = format!(
            "the guest would see other CPU features at the target: {}",
            differing.join(", ")
        );
        let remedy = "give both the same named CPU model with the same features, one that both hosts can run";
        refuse(cause, remedy.to_owned());
    }
    if from.is_migration_safe == Some(false) {
        unsafe_model(source, target, &mut refuse);
    }
    findings
}

/// `host` and `max`: fine only between equals.
fn unsafe_model(source: &VmFacts, target: &VmFacts, refuse: &mut dyn FnMut(String, String)) {
    let model = &source.cpu.model;
    let named = "give the VM a named CPU model that both hosts have, such as x86-64-v2-AES".to_owned();
    if source.kvm && (source.host.digest.is_none() || source.host.digest != target.host.digest) {
        let cause = format!(
            "the CPU model '{model}' is whatever the host has, and the hosts differ: {} and {}",
            source.host.name, target.host.name
        );
        refuse(cause, named);
    } else if !source.kvm
        && (source.version.major, source.version.minor) != (target.version.major, target.version.minor)
    {
        let cause = format!(
            "the CPU model '{model}' changes with QEMU's version: {} and {}",
            source.version, target.version
        );
        refuse(cause, named);
    }
}

/// Where the guest would see other bits: a word that one side does not know counts as zero.
fn differing_words(source: &BTreeMap<String, u32>, target: &BTreeMap<String, u32>) -> Vec<String> {
    let names = source
        .keys()
        .chain(target.keys().filter(|name| !source.contains_key(*name)));
    let differing = names.filter_map(|name| {
        let bits = |words: &BTreeMap<String, u32>| words.get(name).copied().unwrap_or_default();
        let (from, to) = (bits(source), bits(target));
        (from != to).then(|| format!("leaf {name} lacks {:#x}, adds {:#x}", from & !to, to & !from))
    });
    differing.take(4).collect()
}

fn ram(source: &VmFacts, target: &VmFacts) -> Vec<Finding> {
    let at_target: BTreeMap<_, _> = target
        .ram_blocks
        .iter()
        .map(|block| (&block.name, block))
        .collect();
    let mut findings = Vec::new();
    for block in &source.ram_blocks {
        let name = &block.name;
        let (cause, remedy) = match at_target.get(name) {
            None => (
                format!("the source has a RAM block '{name}' that the target has not"),
                "give the target the same memory backends and devices".to_owned(),
            ),
            // What can be resized is, as long as it fits.
            Some(there) if block.used < block.total && block.used <= there.total => continue,
            Some(there) if block.used != there.used || block.used > there.total => (
                format!(
                    "the RAM block '{name}' has {} bytes at the source and room for {} at the target",
                    block.used, there.total
                ),
                "give the target the same memory (-m), video memory and ROM files".to_owned(),
            ),
            Some(_) => continue,
        };
        findings.push(Finding::refuse(Subject::Ram, cause, remedy));
    }
    let known = |name: &String| source.ram_blocks.iter().any(|block| block.name == *name);
    findings.extend(
        target
            .ram_blocks
            .iter()
            .filter(|block| !known(&block.name))
            .map(|block| {
                let cause = format!(
                    "the target has a RAM block '{}' that the source has not",
                    block.name
                );
                Finding::warn(Subject::Ram, cause, "compare the two command lines")
            }),
    );
    findings
}

fn devices(source: &VmFacts, target: &VmFacts) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (id, kind) in &source.devices {
        let cause = match target.devices.get(id) {
            Some(there) if there == kind => continue,
            Some(there) => format!("the device '{id}' is a {kind} at the source and a {there} at the target"),
            None => format!("the source has a device '{id}' ({kind}) that the target has not"),
        };
        let remedy = format!("start the target with -device {kind},id={id} and the same options");
        findings.push(Finding::refuse(Subject::Device, cause, remedy));
    }
    for (id, kind) in target
        .devices
        .iter()
        .filter(|(id, _)| !source.devices.contains_key(*id))
    {
        let cause = format!("the target has a device '{id}' ({kind}) that the source has not");
        findings.push(Finding::refuse(
            Subject::Device,
            cause,
            "remove it from the target's command",
        ));
    }
    if source.nameless != target.nameless {
        let list = |vm: &VmFacts| {
            if vm.nameless.is_empty() {
                "none".to_owned()
            } else {
                vm.nameless.join(", ")
            }
        };
        let cause = format!(
            "the devices without an id are {} at the source and {} at the target",
            list(source),
            list(target)
        );
        let remedy = "give the target the same devices in the same order";
        findings.push(Finding::refuse(Subject::Device, cause, remedy));
    }
    if source.built_in != target.built_in {
        let differ =
            |(kind, count): (&String, &u32)| (target.built_in.get(kind) != Some(count)).then(|| kind.clone());
        let kinds: Vec<_> = source.built_in.iter().filter_map(differ).take(5).collect();
        let cause = format!(
            "the machines' own devices differ (at the source: {})",
            kinds.join(", ")
        );
        let remedy = "compare the two command lines; between versions of QEMU this may be harmless";
        findings.push(Finding::warn(Subject::Device, cause, remedy));
    }
    findings
}

fn pci(source: &VmFacts, target: &VmFacts) -> Vec<Finding> {
    let place = |device: &PciFacts| (device.bus, device.slot, device.function);
    let at_target: BTreeMap<_, _> = target.pci.iter().map(|device| (place(device), device)).collect();
    // A bus behind a bridge has its number from the firmware; before it ran there is none.
    let numbered = source.pci.iter().filter(|device| device.bus == 0);
    let findings = numbered.filter_map(|device| {
        let there = at_target.get(&place(device));
        if there.is_some_and(|there| (there.vendor, there.device) == (device.vendor, device.device)) {
            return None;
        }
        let found = there.map_or_else(
            || "nothing".to_owned(),
            |there| format!("{:04x}:{:04x}", there.vendor, there.device),
        );
        let cause = format!(
            "at PCI {:02x}.{} the source has {:04x}:{:04x} ({}), the target {found}",
            device.slot, device.function, device.vendor, device.device, device.id
        );
        let remedy = format!(
            "give the target's device addr={:#x}.{}",
            device.slot, device.function
        );
        Some(Finding::refuse(Subject::Device, cause, remedy))
    });
    findings.collect()
}

/// Drives: the same device has a disk of the same size, or two of them were mixed up in the target's command.
fn disks(source: &VmFacts, target: &VmFacts) -> Vec<Finding> {
    // Read-only firmware comes with the target's command; a drive without an id may have another path there.
    let told = |disk: &&DiskFacts| {
        let firmware = disk.kind == DiskKind::Flash && disk.is_read_only;
        !firmware && !disk.device.is_empty() && !disk.device.contains("/unattached/")
    };
    let findings = source.disks.iter().filter(told).filter_map(|disk| {
        let name = &disk.name;
        let remedy = "let each drive of the target's command use the {disk0}, {disk1} ... that is its own, or the same medium";
        let Some(there) = target.disks.iter().find(|there| there.device == disk.device) else {
            let cause = format!("the source's drive '{name}' holds {} bytes, the target's nothing", disk.size);
            return Some(Finding::refuse(Subject::Disk, cause, remedy));
        };
        let cause = format!(
            "the drive '{name}' holds {} bytes at the source and {} at the target",
            disk.size, there.size
        );
        match there.size.cmp(&disk.size) {
            Ordering::Equal => None,
            // A block device may be larger than what it has to hold.
            Ordering::Greater if disk.is_live() => Some(Finding::warn(Subject::Disk, cause, "expect a larger disk")),
            _ => Some(Finding::refuse(Subject::Disk, cause, remedy)),
        }
    });
    findings.collect()
}

fn identity(source: &VmFacts, target: &VmFacts) -> Option<Finding> {
    if source.uuid.eq_ignore_ascii_case(&target.uuid) {
        return None;
    }
    let cause = format!(
        "the source's UUID is {}, the target's {}",
        source.uuid, target.uuid
    );
    let remedy = if source.uuid == NO_UUID {
        "remove -uuid from the target's command".to_owned()
    } else {
        format!("start the target with -uuid {}", source.uuid)
    };
    Some(Finding::refuse(Subject::Identity, cause, remedy))
}

fn version(source: &VmFacts, target: &VmFacts) -> Option<Finding> {
    let number = |vm: &VmFacts| (vm.version.major, vm.version.minor);
    (number(target) < number(source)).then(|| {
        let cause = format!(
            "the target's QEMU {} is older than the source's {}",
            target.version, source.version
        );
        let remedy = "update QEMU at the target; the machine type allows this way, few test it";
        Finding::warn(Subject::Version, cause, remedy)
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::vm::facts::{CpuFacts, DiskFacts, HostCpu, RamBlock};
    use crate::vm::qmp::Version;

    /// A plain VM that can move.
    pub(in crate::vm::facts) fn vm() -> VmFacts {
        let block = |name: &str, used, total| RamBlock {
            name: name.into(),
            used,
            total,
        };
        VmFacts {
            version: Version {
                major: 7,
                minor: 2,
                ..Version::default()
            },
            status: "running".into(),
            uuid: "6b2c7f1e-6d1c-4b77-9c53-0123456789ab".into(),
            machine: "pc-q35-7.2".into(),
            migration: "none".into(),
            cpu: CpuFacts {
                model: "Skylake-Server".into(),
                count: 2,
                is_migration_safe: Some(true),
                features: BTreeMap::from([("0x1.0.ECX".into(), 5)]),
            },
            host: HostCpu {
                name: "X".into(),
                digest: Some([1; 32]),
            },
            ram_blocks: vec![
                block("pc.ram", 1 << 30, 1 << 30),
                block("/rom@etc/acpi/tables", 0x20000, 0x20_0000),
            ],
            devices: BTreeMap::from([("vd0".into(), "virtio-blk-pci".into())]),
            pci: vec![PciFacts {
                bus: 0,
                slot: 2,
                function: 0,
                vendor: 0x1af4,
                device: 0x1001,
                id: "vd0".into(),
            }],
            disks: vec![DiskFacts {
                name: "vd0".into(),
                device: "/machine/peripheral/vd0".into(),
                size: 1 << 30,
                ..DiskFacts::default()
            }],
            ..VmFacts::default()
        }
    }

    fn findings(change: impl FnOnce(&mut VmFacts)) -> Vec<(Subject, bool)> {
        between(|_| {}, change)
    }

    fn between(source: impl FnOnce(&mut VmFacts), target: impl FnOnce(&mut VmFacts)) -> Vec<(Subject, bool)> {
        let mut from = vm();
        source(&mut from);
        let mut to = from.clone();
        target(&mut to);
        let found = compare(&from, &to);
        assert!(
            found.iter().all(|finding| !finding.remedy.is_empty()),
            "{found:?}"
        );
        found
            .iter()
            .map(|finding| (finding.subject, finding.is_refusal()))
            .collect()
    }

    #[test]
    fn equals_are_equal() {
        assert_eq!(findings(|_| {}), []);
    }

    #[test]
    fn each_difference_is_found() {
        assert_eq!(
            findings(|vm| vm.machine = "pc-q35-10.0".into()),
            [(Subject::Machine, true)]
        );
        assert_eq!(findings(|vm| vm.kvm = true), [(Subject::Accelerator, true)]);
        assert_eq!(
            findings(|vm| vm.cpu.model = "EPYC".into()),
            [(Subject::Cpu, true)]
        );
        assert_eq!(findings(|vm| vm.cpu.count = 1), [(Subject::Cpu, true)]);
        assert_eq!(
            findings(|vm| {
                let _ = vm.cpu.features.insert("0x1.0.ECX".into(), 4);
            }),
            [(Subject::Cpu, true)]
        );
        assert_eq!(
            findings(|vm| {
                let _ = vm.cpu.features.insert("0x7.0.EBX".into(), 4);
            }),
            [(Subject::Cpu, true)]
        );
        assert_eq!(
            findings(|vm| vm.ram_blocks[0].used = 1 << 29),
            [(Subject::Ram, true)]
        );
        assert_eq!(
            findings(|vm| drop(vm.ram_blocks.remove(0))),
            [(Subject::Ram, true)]
        );
        assert_eq!(findings(|vm| vm.ram_blocks[1].used = 0x10000), [], "resizable");
        assert_eq!(
            findings(|vm| vm.ram_blocks[1].total = 0x10000),
            [(Subject::Ram, true)]
        );
        assert_eq!(findings(|vm| vm.disks[0].size = 512), [(Subject::Disk, true)]);
        assert_eq!(findings(|vm| vm.disks.clear()), [(Subject::Disk, true)]);
        assert_eq!(findings(|vm| vm.devices.clear()), [(Subject::Device, true)]);
        assert_eq!(
            findings(|vm| drop(vm.devices.insert("x".into(), "y".into()))),
            [(Subject::Device, true)]
        );
        assert_eq!(
            findings(|vm| vm.nameless.push("e1000".into())),
            [(Subject::Device, true)]
        );
        assert_eq!(findings(|vm| vm.pci[0].slot = 3), [(Subject::Device, true)]);
        assert_eq!(
            findings(|vm| vm.uuid = NO_UUID.into()),
            [(Subject::Identity, true)]
        );
        assert_eq!(findings(|vm| vm.version.minor = 1), [(Subject::Version, false)]);
        assert_eq!(findings(|vm| vm.version.major = 10), []);
        assert_eq!(
            findings(|vm| {
                let _ = vm.built_in.insert("hpet".into(), 1);
            }),
            [(Subject::Device, false)]
        );
    }

    #[test]
    fn host_and_max_move_between_equals_only() {
        let host = |vm: &mut VmFacts| {
            vm.kvm = true;
            vm.cpu.model = "host".into();
            vm.cpu.is_migration_safe = Some(false);
        };
        assert_eq!(between(host, |_| {}), []);
        assert_eq!(
            between(host, |vm| vm.host.digest = Some([2; 32])),
            [(Subject::Cpu, true)]
        );
        assert_eq!(between(host, |vm| vm.host.digest = None), [(Subject::Cpu, true)]);
        let max = |vm: &mut VmFacts| vm.cpu.is_migration_safe = Some(false);
        assert_eq!(
            between(max, |vm| vm.host.digest = None),
            [],
            "emulated: the host does not matter"
        );
        assert_eq!(between(max, |vm| vm.version.major = 10), [(Subject::Cpu, true)]);
    }

    #[test]
    fn facts_survive_the_wire() {
        let facts = vm();
        let text = serde_json::to_vec(&facts).unwrap();
        assert_eq!(serde_json::from_slice::<VmFacts>(&text).unwrap(), facts);
    }
}
