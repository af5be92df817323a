//! What keeps a VM from moving, wherever it should go. Pure.

use super::{DiskFacts, Finding, Subject, VmFacts};

/// Run states from which a move can begin.
const MOVABLE: [&str; 3] = ["running", "paused", "suspended"];
/// Aliases that stand for another machine type in each version of QEMU.
const ALIASES: [&str; 4] = ["q35", "pc", "virt", "s390-ccw-virtio"];
/// Devices that are bound to their host.
const BOUND: [(&str, &str); 5] = [
    ("vfio-", "a device of the host that is passed through"),
    ("usb-host", "a USB device of the host"),
    ("vhost-vdpa", "a device of the host"),
    ("vhost-user-fs", "a directory of the host"),
    ("ivshmem", "memory that is shared on the host"),
];

/// Every reason against moving `source`, whatever the target is.
pub fn refusals(source: &VmFacts) -> Vec<Finding> {
    let mut findings = Vec::new();
    findings.extend(source.blockers.iter().map(|reason| {
        let cause = format!("QEMU cannot migrate this VM: {reason}");
        Finding::refuse(
            Subject::Blocker,
            cause,
            "remove what it names from the VM, then try again",
        )
    }));
    findings.extend(source.block_jobs.iter().map(|job| {
        let cause = format!("the block job {job} is active");
        Finding::refuse(
            Subject::BlockJob,
            cause,
            "let it end or cancel it (block-job-cancel)",
        )
    }));
    findings.extend(source.tpms.iter().map(|model| {
        let cause = format!("the VM has a TPM ({model}), whose state lies outside of QEMU");
        let remedy = "remove the TPM, or move this VM while it is shut down";
        Finding::refuse(Subject::Tpm, cause, remedy)
    }));
    findings.extend(state(source));
    findings.extend(bound_devices(source));
    findings.extend(versioned(&source.machine));
    findings.extend(cpu(source));
    findings.extend(source.disks.iter().flat_map(disk));
    findings
}

fn state(source: &VmFacts) -> Vec<Finding> {
    let mut findings = Vec::new();
    if !MOVABLE.contains(&source.status.as_str()) {
        let cause = format!("the VM is '{}'", source.status);
        let remedy = "bring it to run, or move it shut down as disks only";
        findings.push(Finding::refuse(Subject::State, cause, remedy));
    } else if source.status != "running" {
        let cause = format!("the VM is '{}' and will be so at the target", source.status);
        findings.push(Finding::warn(
            Subject::State,
            cause,
            "resume it where this is not meant",
        ));
    }
    if !matches!(
        source.migration.as_str(),
        "none" | "completed" | "cancelled" | "failed"
    ) {
        let cause = format!("a migration of this VM is under way ('{}')", source.migration);
        let remedy = "wait for its end or cancel it (migrate_cancel)";
        findings.push(Finding::refuse(Subject::State, cause, remedy));
    }
    findings
}

fn bound_devices(source: &VmFacts) -> impl Iterator<Item = Finding> {
    let named = source
        .devices
        .iter()
        .map(|(id, kind)| (id.as_str(), kind.as_str()));
    let nameless = source.nameless.iter().map(|kind| ("without id", kind.as_str()));
    named.chain(nameless).filter_map(|(id, kind)| {
        let (_, what) = BOUND.iter().find(|(begin, _)| kind.starts_with(begin))?;
        let cause = format!("the device {kind} ({id}) is {what} and cannot leave it");
        Some(Finding::refuse(
            Subject::Passthrough,
            cause,
            "unplug it (device_del) before the move",
        ))
    })
}

/// A machine type without a version is another machine after each update of QEMU.
fn versioned(machine: &str) -> Option<Finding> {
    let version = machine.rsplit('-').next().unwrap_or_default();
    let is_version = version.starts_with(|c: char| c.is_ascii_digit()) && version.contains('.');
    (!is_version).then(|| {
        let cause = format!(
            "the machine type '{machine}' has no version, so that its stream may differ between two QEMUs"
        );
        let remedy = "start the VM with a versioned machine type such as pc-q35-7.2";
        Finding::refuse(Subject::Machine, cause, remedy)
    })
}

fn cpu(source: &VmFacts) -> Option<Finding> {
    (source.cpu.is_migration_safe == Some(false)).then(|| {
        let cause = format!(
            "the CPU model '{}' is not the same on every host",
            source.cpu.model
        );
        let remedy = "give the VM a named model that both hosts have, unless the hosts' CPUs are the same";
        Finding::warn(Subject::Cpu, cause, remedy)
    })
}

fn disk(disk: &DiskFacts) -> Vec<Finding> {
    let mut findings = Vec::new();
    if disk.is_live() && disk.size == 0 {
        let cause = format!("the disk {} has no size", disk.name);
        findings.push(Finding::refuse(Subject::Disk, cause, "remove it from the VM"));
    }
    if disk.snapshots > 0 {
        let cause = format!(
            "{} internal snapshots of {} stay behind",
            disk.snapshots, disk.name
        );
        findings.push(Finding::warn(
            Subject::Disk,
            cause,
            "keep the source image where they are needed",
        ));
    }
    if disk.backing_depth > 0 {
        let cause = format!(
            "{} has a chain of {} images under it",
            disk.name, disk.backing_depth
        );
        let remedy = "expect one flat image at the target";
        findings.push(Finding::warn(Subject::Disk, cause, remedy));
    }
    findings
}

/// Judges the machine type that the target's command names (`Template::machine`) before anything is started.
pub fn machine_option(named: Option<&str>, source: &VmFacts) -> Option<Finding> {
    let remedy = format!("write -machine {} in the target's command", source.machine);
    let cause = match named {
        Some(named) if named == source.machine => return None,
        Some(named) if ALIASES.contains(&named) => {
            format!(
                "the target's command names the machine type '{named}', an alias that each version resolves differently"
            )
        }
        Some(named) => format!(
            "the target's command names the machine type '{named}', the source is a '{}'",
            source.machine
        ),
        None => "the target's command names no machine type, so that its QEMU's default decides".to_owned(),
    };
    Some(Finding::refuse(Subject::Machine, cause, remedy))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::facts::compare::tests::vm;

    fn refused(change: impl FnOnce(&mut VmFacts)) -> Vec<Subject> {
        let mut facts = vm();
        change(&mut facts);
        let all = refusals(&facts);
        assert!(
            all.iter()
                .all(|finding| !finding.remedy.is_empty() && !finding.cause.is_empty())
        );
        all.iter()
            .filter(|finding| finding.is_refusal())
            .map(|finding| finding.subject)
            .collect()
    }

    #[test]
    fn each_reason_is_found() {
        assert_eq!(refused(|_| {}), []);
        assert_eq!(
            refused(|vm| vm.blockers = vec!["9p is mounted".into()]),
            [Subject::Blocker]
        );
        assert_eq!(
            refused(|vm| vm.block_jobs = vec!["mirror of d0".into()]),
            [Subject::BlockJob]
        );
        assert_eq!(refused(|vm| vm.tpms = vec!["tpm-crb".into()]), [Subject::Tpm]);
        assert_eq!(refused(|vm| vm.status = "io-error".into()), [Subject::State]);
        assert_eq!(refused(|vm| vm.migration = "active".into()), [Subject::State]);
        assert_eq!(
            refused(|vm| drop(vm.devices.insert("g".into(), "vfio-pci".into()))),
            [Subject::Passthrough]
        );
        assert_eq!(
            refused(|vm| vm.nameless.push("usb-host".into())),
            [Subject::Passthrough]
        );
        for machine in ["q35", "microvm", "none", "isapc", ""] {
            assert_eq!(
                refused(|vm| vm.machine = machine.into()),
                [Subject::Machine],
                "{machine}"
            );
        }
        assert_eq!(refused(|vm| vm.disks[0].size = 0), [Subject::Disk]);
    }

    #[test]
    fn an_alias_in_the_command_is_refused() {
        let source = vm();
        assert_eq!(machine_option(Some("pc-q35-7.2"), &source), None);
        for named in [Some("q35"), Some("pc-q35-8.0"), None] {
            let finding = machine_option(named, &source).unwrap();
            assert!(
                finding.is_refusal() && finding.remedy.contains("pc-q35-7.2"),
                "{finding}"
            );
        }
    }
}
