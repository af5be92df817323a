//! The freeze: an instant in which a guest's file systems have all that they hold on their disks.
//!
//! Owns which file systems are frozen (ext and XFS on the job's disks, nothing else), for how long, and what of it counts. Leaves thawing to
//! `thaw` and what it proves to `disk::live_free`. Promises that the freeze is journaled before it happens; that the guest's agent is
//! told to thaw two seconds after it froze, whatever the reading does; and that nothing counts unless the agent confirmed that as many
//! file systems were thawed as it had frozen: then they were frozen in between.

use std::sync::Arc;
use std::time::{Duration, Instant};

use longhaul_common::ids::JobId;
use longhaul_common::wire::session::Refusal;

use super::record::Freezing;
use super::thaw::{self, Thaws};
use crate::disk::image::LiveImage;
use crate::disk::live_free::{Freeze, Look, Mount};
use crate::session::threads::{ThreadFailed, on_thread};
use crate::vm::guest_agent::{DiskPlace, FsInfo, GuestAgent, GuestAgentError};
use crate::vm::qmp::QmpError;
use crate::vm::rounds::RoundsError;

/// What is to be frozen.
pub(super) struct Wish {
    pub job: JobId,
    pub record: Freezing,
    /// Where the job's disks are in the guest, and connections to read them by.
    pub places: Vec<Option<DiskPlace>>,
    pub images: Vec<LiveImage>,
    /// How long the thaw may take before the job goes on without waiting for it.
    pub confirm: Duration,
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
    #[error(
        "of {frozen} frozen file systems {thawed} were so until they were thawed: somebody else thawed the others"
    )]
    Early { frozen: u64, thawed: u64 },
    #[error(
        "the guest's agent does not confirm that the file systems are thawed; it is asked again and again, and the VM is not handed \
         over until it does"
    )]
    Unconfirmed,
}

/// Freezes, reads, thaws. Goes on to its end when nobody waits for it any more.
pub(super) async fn freeze(thaws: &Arc<Thaws>, wish: Wish) -> Result<Frozen, FreezeError> {
    let thaws = Arc::clone(thaws);
    let frozen = tokio::spawn(async move { run(&thaws, wish).await });
    frozen.await.unwrap_or(Err(FreezeError::Thread(ThreadFailed)))
}

async fn run(thaws: &Arc<Thaws>, wish: Wish) -> Result<Frozen, FreezeError> {
    let Wish {
        job,
        record,
        places,
        images,
        confirm,
    } = wish;
    if thaws.is_awaited(&record.guest_agent) {
        return Err(FreezeError::Earlier);
    }
    let mut guest = GuestAgent::connect(&record.guest_agent).await?;
    let chosen = choose(&guest.file_systems().await?, &places);
    if chosen.points.is_empty() {
        return Err(FreezeError::Nothing);
    }
    let asked = chosen.points.len() as u64;
    thaw::expect(thaws, job, &record)
        .await
        .map_err(FreezeError::Journal)?;
    let began = Instant::now();
    let frozen = guest.freeze(Some(&chosen.points)).await;
    let looks = match &frozen {
        Ok(count) if *count == asked => look(images, &chosen.mounts, Instant::now()).await,
        _ => Vec::new(),
    };
    let with = Arc::clone(thaws);
    // A task of its own: it goes on where waiting for it ends.
    let thawing = tokio::spawn(async move { thaw::until_confirmed(&with, job, &record, Some(guest)).await });
    let thawed = tokio::time::timeout(confirm, thawing).await;
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

#[cfg(test)]
mod tests;
