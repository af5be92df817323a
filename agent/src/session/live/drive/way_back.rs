//! The way back: taking over what the VM's QEMU knows of the changes since it came here, and leaving a shadow behind for the next one.
//!
//! Owns whether leaves that the target calls "as the shadow was left" count as held: only where all that was written since is in the
//! bitmaps of this job's rounds. Leaves bitmaps to `vm::rounds`, the record to `live::way_back`.

use longhaul_common::ids::DiskIndex;

use super::Drive;
use crate::disk::have::HaveLeaves;
use crate::session::live::way_back::FREE_RUNS_MAX;
use crate::vm::rounds::since_name;

impl Drive {
    /// Has what was written since each shadow count to the next round; where that is not known, the shadow's leaves count as missing.
    pub(super) async fn begin_with_shadows(&mut self, mut have: Vec<HaveLeaves>) -> Vec<HaveLeaves> {
        for (disk, have) in have.iter_mut().enumerate() {
            let Some(shadow) = have.shadow() else { continue };
            if self.taken_over.get(disk) == Some(&Some(shadow)) {
                continue;
            }
            let known = self.s.since.get(disk).copied().flatten() == Some(shadow);
            let taken = match known {
                // All of it once more, and all that comes: the rounds read it like everything else that was written.
                true => self
                    .rounds
                    .inherit(disk, &since_name(&shadow))
                    .await
                    .map_err(|error| error.to_string()),
                false => Err("the VM's QEMU counts from another move, or does not count".to_owned()),
            };
            match taken {
                Ok(()) => {
                    // Free blocks are at the target like all others.
                    self.s.free.drop_disk(disk);
                    if let Some(slot) = self.taken_over.get_mut(disk) {
                        *slot = Some(shadow);
                    }
                }
                Err(why) => {
                    self.note(&format!(
                        "disk {disk} is copied whole, not from its shadow: {why}"
                    ));
                    have.forget_shadow();
                }
            }
        }
        have
    }

    /// Says what a shadow saved.
    pub(super) fn note_kept(&mut self, disk: DiskIndex, kept: u64) {
        let shadow = self.taken_over.get(usize::from(disk.0)).copied().flatten();
        if let Some(shadow) = shadow {
            let job = shadow.job.short();
            self.note(&format!(
                "disk {disk}: {kept} bytes are at the target as the shadow of job {job}; what was written since goes with the first round"
            ));
        }
    }

    /// The VM runs at the target: remembers how its images were left here, and what of them was never sent.
    pub(super) async fn keep_way_back(&mut self) {
        let disks = 0..self.s.disks.len();
        let free: Vec<_> = disks
            .map(|disk| self.s.free.left_behind(disk, FREE_RUNS_MAX))
            .collect();
        self.s.keep_way_back(self.outcome.generation, &free).await;
    }
}
