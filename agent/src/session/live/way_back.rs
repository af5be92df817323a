//! The images that a VM left behind when it was moved away, and the copies that begin with them when it comes back.
//!
//! Owns the record of each move's shadows below the state folder: which files, how they were left, and to which job one was lent. Leaves
//! barring them to `old_copy`, taking one to `disk::apply`. Promises that a shadow is called "as it was left" only by the life of this
//! agent that barred it, with the blocks that were left behind as free; that a copy which is given up becomes a shadow again; and that one
//! over which anything was written is from then on compared by digests, never taken on trust.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use longhaul_common::ids::{DiskIndex, JobId};
use longhaul_common::wire::session::{Refusal, ShadowId, TargetDisk, TargetOpen};
use serde::{Deserialize, Serialize};

use super::old_copy::shadow_of;
use super::record;
use super::source::LiveSource;
use crate::disk::apply::{
    Have, Left, Placed, Returned, Shadow, Target, TargetError, TargetOptions, partial_name,
};
use crate::session::threads::on_thread;
use crate::session::{Agent, target_disks};
use crate::settings::AgentSettings;

const KIND: &str = "shadows";
/// More runs of free blocks than this are not remembered: the record has to be read at once. About 30 MiB of text.
pub(super) const FREE_RUNS_MAX: usize = 1 << 20;

/// The shadows of one move.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Shadows {
    /// Which RAM stream the VM was moved by.
    pub generation: u32,
    /// In the order of the job's disks.
    pub disks: Vec<ShadowDisk>,
}

/// One image that stayed behind.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct ShadowDisk {
    /// Its name while the VM was here.
    pub file: PathBuf,
    pub format: String,
    /// Of the disk, in bytes.
    pub size: u64,
    /// None: what it holds has to be read.
    pub left: Option<Left>,
    /// The copy that began with it.
    #[serde(default)]
    pub lent: Option<Lent>,
}

/// A disk of another job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Lent {
    pub job: String,
    pub disk: u16,
}

/// A copy that was opened, and the shadow that some of its leaves are as it was left.
pub(super) type Opened = (Target, Have, Option<ShadowId>);

impl Shadows {
    /// Blocks.
    pub(super) fn save(&self, state: &Path, job: JobId) -> Result<(), String> {
        record::save(state, KIND, job, self)
    }
}

impl ShadowDisk {
    /// Its name now, where it may become this copy: the same folder, format and size.
    fn suits(&self, job: JobId, disk: &TargetDisk, options: &TargetOptions) -> Option<PathBuf> {
        let path = shadow_of(&self.file, job);
        let folder = path.parent()?.canonicalize().ok()?;
        let plain = std::fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_file());
        let same = self.format == disk.format && self.size == disk.size;
        (plain && same && options.path.parent() == Some(&*folder)).then_some(path)
    }

    fn was(&self, options: &TargetOptions) -> bool {
        let folder = self.file.parent().and_then(|folder| folder.canonicalize().ok());
        folder.as_deref() == options.path.parent() && self.file.file_name() == options.path.file_name()
    }
}

impl LiveSource {
    /// Remembers how the images were left. `free`: of each disk the runs that were left behind; nothing where that is not known.
    pub(super) async fn keep_way_back(&self, generation: u32, free: &[Option<Vec<(u64, u64)>>]) {
        let mut seals = self.old_copy.lock().await.seals().to_vec().into_iter();
        let disks = self.disks.iter().enumerate().map(|(index, disk)| {
            // Media are not barred.
            let seal = (!disk.read_only).then(|| seals.next()).flatten().flatten();
            let free = free.get(index).cloned().flatten();
            ShadowDisk {
                file: disk.file.clone(),
                format: disk.format.clone(),
                size: disk.size,
                left: seal.zip(free).map(|(seal, free)| Left { seal, free }),
                lent: None,
            }
        });
        let shadows = Shadows {
            generation,
            disks: disks.collect(),
        };
        let (state, job) = (self.agent.settings.paths.state.clone(), self.job);
        let saved = on_thread("shadows", move || shadows.save(&state, job)).await;
        if let Ok(Err(why)) = saved {
            tracing::warn!(job = %self.job, "a way back would copy the disks whole: {why}");
        }
    }
}

/// Lets go of the locks on shadows that this VM's disks may begin with; gives whose they are.
pub(super) async fn release(agent: &Arc<Agent>, open: &TargetOpen) -> Vec<Arc<LiveSource>> {
    let (with, asked) = (Arc::clone(agent), open.clone());
    let wanted = on_thread("shadows", move || {
        let options = target_disks::all_options(&asked, &with.settings);
        let state = &with.settings.paths.state;
        let of = |(disk, options): (&TargetDisk, Option<TargetOptions>)| {
            find(disk, &options?, state)
                .filter(|_| disk.shadow)
                .map(|(id, _)| id.job)
        };
        asked.disks.iter().zip(options).filter_map(of).collect::<Vec<_>>()
    });
    let sessions = sessions_of(agent, wanted.await.unwrap_or_default()).await;
    for session in &sessions {
        session.old_copy.lock().await.let_go();
    }
    sessions
}

async fn sessions_of(agent: &Arc<Agent>, mut jobs: Vec<JobId>) -> Vec<Arc<LiveSource>> {
    jobs.sort_unstable();
    jobs.dedup();
    let mut sessions = Vec::new();
    for job in jobs {
        sessions.extend(agent.live_sources.slot(job).lock().await.clone());
    }
    sessions
}

/// Takes the locks again on what was not taken.
pub(super) async fn hold_again(sessions: &[Arc<LiveSource>]) {
    for session in sessions {
        let shadows = session.record().shadows.clone();
        session.old_copy.lock().await.hold(&shadows).await;
    }
}

/// Gives up a job's copies, and holds those again that are shadows then.
pub(super) async fn give_back(
    agent: &Arc<Agent>,
    job: JobId,
    targets: Vec<Target>,
    mut placed: Vec<Placed>,
) -> Result<(), String> {
    let state = agent.settings.paths.state.clone();
    let given = on_thread("discard", move || {
        let lent = lent_to(job, &state);
        let given = give_up(job, targets, &mut placed, &state);
        (given, lent.into_iter().map(|(id, _)| id.job).collect::<Vec<_>>())
    });
    let (given, jobs) = given.await.map_err(|error| error.to_string())?;
    hold_again(&sessions_of(agent, jobs).await).await;
    given.map_err(|error| error.to_string())
}

/// Opens every disk of a VM that arrives, with the shadows that it may begin with. Blocks.
pub(super) fn open_disks(open: &TargetOpen, settings: &AgentSettings) -> Result<Vec<Opened>, Refusal> {
    let opened = target_disks::open_with(open, settings, |index, disk, options| {
        open_disk(open.job, index, disk, options, &settings.paths.state)
    })?;
    let lent = lent_to(open.job, &settings.paths.state);
    let known = |index: u16| lent.iter().find(|(_, lent)| *lent == index).map(|(id, _)| *id);
    Ok((0..)
        .zip(opened)
        .map(|(index, (target, have))| (target, have, known(index)))
        .collect())
}

fn open_disk(
    job: JobId,
    index: DiskIndex,
    disk: &TargetDisk,
    options: &TargetOptions,
    state: &Path,
) -> Result<(Target, Have), TargetError> {
    let name = options.path.file_name().and_then(|name| name.to_str());
    let partial = name.map(|name| options.path.with_file_name(partial_name(name, job)));
    let goes_on = partial.is_none_or(|partial| partial.exists());
    let Some((id, shadow)) = find(disk, options, state).filter(|_| disk.shadow && !goes_on) else {
        return Target::open(options, disk.size);
    };
    let lent = Lent {
        job: job.to_string(),
        disk: index.0,
    };
    // Before it is taken: who finds the copy after a crash must know where it came from.
    if let Err(why) = lend(&id, Some(lent), state) {
        tracing::warn!(%job, "the shadow of job {} is not used: {why}", id.job.short());
        return Target::open(options, disk.size);
    }
    let opened = Target::open_with(options, disk.size, Some(&shadow));
    let taken = opened
        .as_ref()
        .is_ok_and(|(target, _)| target.began_with_shadow());
    if !taken && let Err(why) = lend(&id, None, state) {
        tracing::warn!(%job, "{why}");
    }
    opened.map(|(mut target, have)| {
        if taken {
            target.note(note(&id, index, have.has_shadow()));
        }
        (target, have)
    })
}

fn note(id: &ShadowId, index: DiskIndex, as_left: bool) -> String {
    let how = if as_left {
        "its VM's QEMU knows what was written since"
    } else {
        "what was written since is not known, so digests are compared"
    };
    format!(
        "disk {index} begins with the shadow of job {}; {how}",
        id.job.short()
    )
}

/// The shadow that a disk may begin with.
fn find(disk: &TargetDisk, options: &TargetOptions, state: &Path) -> Option<(ShadowId, Shadow)> {
    let known = disk.since.and_then(|id| {
        let shadows: Shadows = record::one(state, KIND, id.job)?;
        let shadow = shadows.disks.get(usize::from(id.disk.0)).cloned()?;
        let path = shadow.suits(id.job, disk, options)?;
        let same = shadows.generation == id.generation;
        Some((id, as_shadow(&shadow, &path, same)?))
    });
    known.or_else(|| find_by_name(disk, options, state))
}

/// Where nobody knows the changes since: the newest shadow of the image that had the target's name here.
fn find_by_name(disk: &TargetDisk, options: &TargetOptions, state: &Path) -> Option<(ShadowId, Shadow)> {
    let mut newest = None;
    for (job, shadows) in record::all::<Shadows>(state, KIND) {
        for (index, shadow) in (0..).map(DiskIndex).zip(&shadows.disks) {
            let path = shadow.suits(job, disk, options).filter(|_| shadow.was(options));
            let Some(path) = path else { continue };
            let left = std::fs::metadata(&path).and_then(|meta| meta.modified()).ok();
            let generation = shadows.generation;
            let id = ShadowId {
                job,
                generation,
                disk: index,
            };
            if let Some(found) = as_shadow(shadow, &path, false)
                && newest.as_ref().is_none_or(|(other, _)| *other < left)
            {
                newest = Some((left, (id, found)));
            }
        }
    }
    newest.map(|(_, found)| found)
}

fn as_shadow(shadow: &ShadowDisk, path: &Path, changes_known: bool) -> Option<Shadow> {
    Some(Shadow {
        name: path.file_name()?.to_owned(),
        // What is, or was, lent holds what nobody knows.
        left: shadow.left.clone().filter(|_| shadow.lent.is_none()),
        changes_known,
    })
}

fn lend(id: &ShadowId, lent: Option<Lent>, state: &Path) -> Result<(), String> {
    change(id, state, |disk| disk.lent = lent)
}

fn change(id: &ShadowId, state: &Path, change: impl FnOnce(&mut ShadowDisk)) -> Result<(), String> {
    let lost = || "its record is gone".to_owned();
    let mut shadows: Shadows = record::one(state, KIND, id.job).ok_or_else(lost)?;
    let disk = shadows.disks.get_mut(usize::from(id.disk.0)).ok_or_else(lost)?;
    change(disk);
    shadows.save(state, id.job)
}

/// The shadows that copies of a job began with, each with the copy's number.
fn lent_to(job: JobId, state: &Path) -> Vec<(ShadowId, u16)> {
    let mut found = Vec::new();
    for (of, shadows) in record::all::<Shadows>(state, KIND) {
        let generation = shadows.generation;
        for (disk, shadow) in (0..).map(DiskIndex).zip(&shadows.disks) {
            if let Some(lent) = shadow.lent.as_ref().filter(|lent| lent.job == job.to_string()) {
                let id = ShadowId {
                    job: of,
                    generation,
                    disk,
                };
                found.push((id, lent.disk));
            }
        }
    }
    found
}

/// Gives up a job's copies: those that began with a shadow become one again, the others are removed. Blocks.
fn give_up(job: JobId, targets: Vec<Target>, placed: &mut [Placed], state: &Path) -> Result<(), TargetError> {
    let lent = lent_to(job, state);
    let shadow = |index: u16| lent.iter().find(|(_, lent)| *lent == index).map(|(id, _)| *id);
    for (index, placed) in (0..).zip(placed) {
        match shadow(index).and_then(|id| Some((id, own_name(&id, state)?))) {
            Some((id, name)) => returned(&id, &placed.give_back(name.as_ref())?, state),
            None => placed.discard()?,
        }
    }
    for (index, target) in (0..).zip(targets) {
        match shadow(index).and_then(|id| Some((id, own_name(&id, state)?))) {
            Some((id, name)) => returned(&id, &target.give_back(name.as_ref())?, state),
            None => {
                target.unlink()?;
                target.discard()?;
            }
        }
    }
    Ok(())
}

fn own_name(id: &ShadowId, state: &Path) -> Option<std::ffi::OsString> {
    let shadows: Shadows = record::one(state, KIND, id.job)?;
    let disk = shadows.disks.get(usize::from(id.disk.0))?;
    Some(shadow_of(&disk.file, id.job).file_name()?.to_owned())
}

fn returned(id: &ShadowId, returned: &Returned, state: &Path) {
    let changed = change(id, state, |disk| {
        disk.lent = None;
        // Its free blocks are zeros already.
        disk.left = returned.untouched.clone().map(|seal| Left {
            seal,
            free: Vec::new(),
        });
    });
    if let Err(why) = changed {
        tracing::warn!("the record of the shadow of job {}: {why}", id.job.short());
    }
}

/// The operator has the job forgotten. Blocks.
pub(super) fn forget(state: &Path, job: JobId) {
    record::remove(state, KIND, job);
}

/// The job's VM has arrived: the shadows that its copies began with are its disks now. Blocks.
pub(super) fn used_up(job: JobId, state: &Path) {
    let mut jobs: Vec<_> = lent_to(job, state).into_iter().map(|(id, _)| id.job).collect();
    jobs.dedup();
    for of in jobs {
        let Some(mut shadows) = record::one::<Shadows>(state, KIND, of) else {
            continue;
        };
        let here = |disk: &ShadowDisk| disk.lent.as_ref().is_some_and(|lent| lent.job == job.to_string());
        if shadows.disks.iter().all(here) {
            record::remove(state, KIND, of);
            continue;
        }
        shadows
            .disks
            .iter_mut()
            .filter(|disk| here(disk))
            .for_each(|disk| disk.left = None);
        if let Err(why) = shadows.save(state, of) {
            tracing::warn!(%job, "{why}");
        }
    }
}

#[cfg(test)]
mod tests;
