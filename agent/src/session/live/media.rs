//! Which of a VM's drives move, and what becomes of the rest.
//!
//! Owns the rule: every disk that the guest can write is named by the job; a read-only medium is copied (a `[[disk]]` names it), taken
//! out, or is at the target already, as `live.media` says. Leaves drives to `vm::media`. Pure. Promises that nothing is left behind
//! without a word.

use longhaul_common::wire::session::MediaRule;

use crate::vm::facts::{DiskFacts, DiskKind};
use crate::vm::media::Medium;

/// What is done about media.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Media {
    pub eject: Vec<Medium>,
    pub notes: Vec<String>,
}

/// Judges every drive that no disk of the job names. `copied`: root nodes of the job's disks.
pub(super) fn judge(disks: &[DiskFacts], copied: &[String], rule: MediaRule) -> Result<Media, String> {
    let mut media = Media::default();
    let mut refused = Vec::new();
    for disk in disks {
        // A backend without a device is seen by no guest; read-only firmware comes with the target's command.
        let firmware = disk.kind == DiskKind::Flash && disk.is_read_only;
        if disk.device.is_empty() || firmware || copied.contains(&disk.node) {
            continue;
        }
        let (name, file) = (&disk.name, &disk.file);
        if !disk.is_read_only {
            refused.push(format!(
                "the VM writes to '{name}' ({file}), which is not in the job and would be left behind: add a [[disk]] section for it, \
                 or take it from the VM"
            ));
            continue;
        }
        match rule {
            MediaRule::Refuse => refused.push(format!(
                "the read-only medium {file} is in the drive '{name}', and the job does not say what becomes of it: add a [[disk]] \
                 section to copy it, or set live.media to \"eject\" or \"map\""
            )),
            MediaRule::Eject if !disk.is_removable => refused.push(format!(
                "'{name}' ({file}) is read-only, but no drive that it could be ejected from: add a [[disk]] section to copy it, or \
                 set live.media to \"map\""
            )),
            MediaRule::Eject if disk.is_locked => refused.push(format!(
                "the guest holds the medium {file} in the drive '{name}': unmount it in the guest, or add a [[disk]] section to copy it"
            )),
            MediaRule::Eject => {
                media.notes.push(format!("the medium {file} is taken out of the drive '{name}' before RAM moves"));
                media.eject.push(Medium::of(disk));
            }
            MediaRule::Map => media.notes.push(format!(
                "the medium {file} in the drive '{name}' is not copied: the target's command has to name the same one (its size is compared)"
            )),
        }
    }
    match refused.is_empty() {
        true => Ok(media),
        false => Err(refused.join("; ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drive(name: &str, change: impl FnOnce(&mut DiskFacts)) -> DiskFacts {
        let mut disk = DiskFacts {
            name: name.to_owned(),
            device: format!("/machine/peripheral/{name}"),
            node: format!("node-{name}"),
            file: format!("/images/{name}"),
            size: 4096,
            ..DiskFacts::default()
        };
        change(&mut disk);
        disk
    }

    fn cdrom(locked: bool) -> DiskFacts {
        drive("cd0", |disk| {
            disk.kind = DiskKind::Cdrom;
            (disk.is_read_only, disk.is_removable, disk.is_locked) = (true, true, locked);
        })
    }

    #[test]
    fn a_disk_that_the_guest_writes_is_never_left_behind() {
        let disks = [drive("vd0", |_| {}), drive("vd1", |_| {})];
        let all = ["node-vd0".to_owned(), "node-vd1".to_owned()];
        assert_eq!(judge(&disks, &all, MediaRule::Refuse), Ok(Media::default()));
        for rule in [MediaRule::Refuse, MediaRule::Eject, MediaRule::Map] {
            let said = judge(&disks, &all[..1], rule).unwrap_err();
            assert!(said.contains("'vd1'") && said.contains("[[disk]]"), "{said}");
        }
        // A variable store of the firmware is a disk; the firmware itself is not.
        let vars = drive("pflash1", |disk| disk.kind = DiskKind::Flash);
        assert!(judge(&[vars], &all, MediaRule::Map).is_err());
        let code = drive("pflash0", |disk| {
            (disk.kind, disk.is_read_only) = (DiskKind::Flash, true)
        });
        assert_eq!(judge(&[code], &all, MediaRule::Refuse), Ok(Media::default()));
        let unused = drive("spare", |disk| disk.device.clear());
        assert_eq!(judge(&[unused], &all, MediaRule::Refuse), Ok(Media::default()));
    }

    #[test]
    fn media_follow_the_rule_and_are_refused_without_one() {
        let free = [cdrom(false)];
        let said = judge(&free, &[], MediaRule::Refuse).unwrap_err();
        assert!(
            said.contains("/images/cd0") && said.contains("live.media"),
            "{said}"
        );
        assert_eq!(
            judge(&free, &["node-cd0".to_owned()], MediaRule::Refuse),
            Ok(Media::default()),
            "copied"
        );
        let taken = judge(&free, &[], MediaRule::Eject).unwrap();
        assert_eq!((taken.eject.len(), taken.eject[0].drive.as_str()), (1, "cd0"));
        assert!(
            judge(&[cdrom(true)], &[], MediaRule::Eject)
                .unwrap_err()
                .contains("unmount")
        );
        let mapped = judge(&[cdrom(true)], &[], MediaRule::Map).unwrap();
        assert!(mapped.eject.is_empty() && mapped.notes.len() == 1);
        let fixed = drive("ro0", |disk| disk.is_read_only = true);
        assert!(
            judge(&[fixed], &[], MediaRule::Eject)
                .unwrap_err()
                .contains("map")
        );
    }
}
