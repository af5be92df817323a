//! The freeze: an instant in which a guest's file systems have all that they hold on their disks.
//!
//! Owns which file systems are frozen (ext and XFS on the job's disks, nothing else), for how long, and what of it counts. Leaves thawing to
//! `thaw` and what it proves to `disk::live_free`. Promises that the freeze is journaled before it happens; that the guest's agent is
//! told to thaw two seconds after it froze, whatever the reading does; and that nothing counts unless the agent confirmed that as many
//! file systems were thawed as it had frozen: then they were frozen in between.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use longhaul_common::ids::JobId;
use longhaul_common::wire::session::Refusal;

use super::record::Freezing;
use super::thaw;
use crate::disk::image::LiveImage;
use crate::disk::live_free::{Freeze, Look, Mount};
use crate::session::Agent;
use crate::session::threads::{ThreadFailed, on_thread};
use crate::vm::guest_agent::{DiskPlace, FsInfo, GuestAgent, GuestAgentError, places};
use crate::vm::qmp::{Qmp, QmpError};
use crate::vm::rounds::RoundsError;

/// How long the thaw may take before the job goes on without waiting for it.
const CONFIRM: Duration = Duration::from_secs(10);

/// What is to be frozen.
pub(super) struct Wish {
    pub job: JobId,
    pub qmp: Qmp,
    pub record: Freezing,
    /// The block nodes of the job's disks, and connections to read them by.
    pub nodes: Vec<String>,
    pub images: Vec<LiveImage>,
}

/// What was frozen, of each disk.
pub(super) struct Frozen {
    pub mounts: Vec<Vec<Mount>>,
    /// What was read meanwhile; none where it took too long.
    pub looks: Vec<Option<Look>>,
    /// How long the guest's writes waited.
    pub lasted: Duration,
}

/// Why there is no proof by a freeze.
#[derive(Debug, thiserror::Error)]
pub(super) enum FreezeError {
    #[error("{0}")]
    Agent(#[from] GuestAgentError),
    #[error("{0}")]
    Qmp(#[from] QmpError),
    #[error("{0}")]
    Rounds(#[from] RoundsError),
    #[error("{0}")]
    Disks(#[from] Refusal),
    #[error("{0}")]
    Thread(#[from] ThreadFailed),
    #[error("the thaw of an earlier freeze is not confirmed yet")]
    Earlier,
    #[error("the guest's agent names no ext or XFS file system that lies on one of the job's disks alone")]
    Nothing,
    #[error("it cannot be journaled: {0}")]
    Journal(String),
    #[error("the guest's agent froze {frozen} of {asked} file systems")]
    Partly { asked: u64, frozen: u64 },
    #[error("of {frozen} frozen file systems {thawed} were so until they were thawed: somebody else thawed the others")]
    Early { frozen: u64, thawed: u64 },
    #[error(
        "the guest's agent does not confirm that the file systems are thawed; it is asked again and again, and the VM is not handed \
         over until it does"
    )]
    Unconfirmed,
}

/// Freezes, reads, thaws. Goes on to its end when nobody waits for it any more.
pub(super) async fn freeze(agent: &Arc<Agent>, wish: Wish) -> Result<Frozen, FreezeError> {
    let agent = Arc::clone(agent);
    let frozen = tokio::spawn(async move { run(&agent, wish).await });
    frozen.await.unwrap_or(Err(FreezeError::Thread(ThreadFailed)))
}

async fn run(agent: &Arc<Agent>, wish: Wish) -> Result<Frozen, FreezeError> {
    let Wish {
        job,
        qmp,
        record,
        nodes,
        images,
    } = wish;
    if agent.thaws.is_awaited(&record.guest_agent) {
        return Err(FreezeError::Earlier);
    }
    let mut guest = GuestAgent::connect(&record.guest_agent).await?;
    let places = places(&qmp, &nodes).await?;
    let chosen = choose(&guest.file_systems().await?, &places);
    if chosen.points.is_empty() {
        return Err(FreezeError::Nothing);
    }
    let asked = chosen.points.len() as u64;
    thaw::expect(agent, job, &record)
        .await
        .map_err(FreezeError::Journal)?;
    let began = Instant::now();
    let frozen = guest.freeze(Some(&chosen.points)).await;
    let looks = match &frozen {
        Ok(count) if *count == asked => look(images, &chosen.mounts, Instant::now()).await,
        _ => Vec::new(),
    };
    let with = Arc::clone(agent);
    // A task of its own: it goes on where waiting for it ends.
    let thawing =
        tokio::spawn(async move { thaw::until_confirmed(&with, job, &record, Some(guest)).await });
    let thawed = tokio::time::timeout(CONFIRM, thawing).await;
    let lasted = began.elapsed();
    let thawed = match thawed {
        Ok(thawed) => thawed.map_err(|_| ThreadFailed)?,
        Err(_) => return Err(FreezeError::Unconfirmed),
    };
    let frozen = frozen?;
    if frozen != asked {
        return Err(FreezeError::Partly { asked, frozen });
    }
    if thawed != frozen {
        return Err(FreezeError::Early { frozen, thawed });
    }
    Ok(Frozen {
        mounts: chosen.mounts,
        looks,
        lasted,
    })
}

/// What a freeze is asked for.
#[derive(Default)]
struct Chosen {
    points: Vec<String>,
    /// Of each disk.
    mounts: Vec<Vec<Mount>>,
}

/// One mount point of each file system that lies on exactly one of the disks.
fn choose(file_systems: &[FsInfo], places: &[Option<DiskPlace>]) -> Chosen {
    let mut chosen = Chosen {
        points: Vec::new(),
        mounts: vec![Vec::new(); places.len()],
    };
    for fs in file_systems {
        let is_frozen = matches!(fs.kind.as_str(), "ext2" | "ext3" | "ext4" | "xfs");
        let [disk] = &fs.disks[..] else { continue };
        let here = |place: &Option<DiskPlace>| place.is_some_and(|place| place.is_of(disk));
        let Some(index) = places.iter().position(here).filter(|_| is_frozen) else {
            continue;
        };
        let mount = Mount {
            device: fs.name.clone(),
            kind: fs.kind.clone(),
        };
        let mounts = &mut chosen.mounts[index];
        // Mounted a second time it is frozen by the first.
        if !mounts.contains(&mount) {
            mounts.push(mount);
            chosen.points.push(fs.mountpoint.clone());
        }
    }
    chosen
}

/// Reads all disks, at most as long as a freeze lasts; what is read later is nothing.
async fn look(images: Vec<LiveImage>, mounts: &[Vec<Mount>], since: Instant) -> Vec<Option<Look>> {
    let mounts = mounts.to_vec();
    let disks = mounts.len();
    let reading = on_thread("frozen-look", move || {
        let looks = images.iter().zip(&mounts).map(|(image, mounts)| {
            let freeze = Freeze {
                mounts,
                since,
                clock: &Instant::now,
            };
            (!mounts.is_empty() && since.elapsed() < Freeze::LIMIT).then(|| Look::frozen(image, &freeze))
        });
        looks.collect::<Vec<_>>()
    });
    let read = tokio::time::timeout_at((since + Freeze::LIMIT).into(), reading).await;
    match read {
        Ok(Ok(looks)) => looks,
        _ => (0..disks).map(|_| None).collect(),
    }
}

/// The record of a freeze of this VM.
pub(super) fn record(guest_agent: PathBuf, qmp: PathBuf) -> Freezing {
    Freezing { guest_agent, qmp }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::guest_agent::{FsDisk, Pci, PciPlace};

    fn disk(slot: i32) -> FsDisk {
        FsDisk {
            bus_type: "virtio".into(),
            bus: 0,
            target: 0,
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

    fn fs(name: &str, point: &str, kind: &str, disks: &[i32]) -> FsInfo {
        FsInfo {
            name: name.into(),
            mountpoint: point.into(),
            kind: kind.into(),
            disks: disks.iter().map(|slot| disk(*slot)).collect(),
        }
    }

    #[test]
    fn only_what_is_frozen_and_surely_on_the_disk_is_chosen() {
        let place = |slot| {
            let (bus, function) = (0, 0);
            Some(DiskPlace::Device(Pci { bus, slot, function }))
        };
        let all = [
            fs("vda1", "/", "ext4", &[3]),
            fs("vda1", "/mnt/again", "ext4", &[3]),
            fs("vdb", "/srv", "xfs", &[4]),
            fs("vda2", "/boot/efi", "vfat", &[3]),
            fs("vda3", "/win", "ntfs", &[3]),
            fs("dm-0", "/both", "ext4", &[3, 4]),
            fs("vdc", "/elsewhere", "ext4", &[9]),
            fs("tmpfs", "/tmp", "tmpfs", &[]),
        ];
        let chosen = choose(&all, &[place(3), None, place(4)]);
        assert_eq!(chosen.points, ["/", "/srv"]);
        let names = chosen.mounts.iter().map(|mounts| mounts.iter());
        let names: Vec<Vec<_>> = names
            .map(|mounts| mounts.map(|mount| mount.device.as_str()).collect())
            .collect();
        assert_eq!(names, [vec!["vda1"], vec![], vec!["vdb"]]);
    }
}
