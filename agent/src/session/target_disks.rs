//! A job's target images: opened, checked, promoted, and remembered as arrived.
//!
//! Owns what must survive the agent between the first promoted disk and the last: a record below the state folder, written before
//! the first and completed after the last, so that a commit that was cut in the middle is finished by the next attempt. Leaves the
//! writing of one disk to `disk::apply`.

use std::io::Write;
use std::path::{Path, PathBuf};

use longhaul_common::digest::Digest;
use longhaul_common::ids::{DiskIndex, JobId};
use longhaul_common::wire::session::{DISKS_MAX, Refusal, RefusalKind, TargetDisk, TargetOpen};
use serde::{Deserialize, Serialize};

use super::outcome;
use crate::disk::apply::{self, Have, Target, TargetError, TargetFormat, TargetOptions, is_device};
use crate::disk::roots;
use crate::settings::AgentSettings;

/// A commit, under way or done.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Arrival {
    pub digests: Vec<String>,
    pub paths: Vec<PathBuf>,
    /// What tells each copy from every other file, so that a cut commit knows what it has promoted.
    pub copies: Vec<String>,
    pub complete: bool,
    /// The hook has run to its end.
    #[serde(default)]
    pub told: bool,
    /// Why it failed, if it did.
    #[serde(default)]
    pub hook: Option<String>,
}

/// Checks a request and opens nothing: what a plan needs.
pub(super) fn check(open: &TargetOpen, settings: &AgentSettings) -> Result<Vec<String>, Refusal> {
    let mut notes = Vec::new();
    for (index, disk) in (0..).map(DiskIndex).zip(&open.disks) {
        let options = options(open.job, index, disk, settings)?;
        if options.path.exists() && !disk.overwrite && !is_device(&options.path) {
            return Err(outcome::target(&TargetError::Exists { path: options.path }));
        }
        let needed = if disk.preallocate { disk.size } else { disk.needed };
        if let Some(folder) = options.path.parent().filter(|_| !is_device(&options.path)) {
            apply::check_space(folder, needed).map_err(|error| outcome::target(&error))?;
        }
        notes.push(format!("{} is free to be written", options.path.display()));
    }
    Ok(notes)
}

/// Opens every disk, taking up what an earlier attempt of the job left.
pub(super) fn open(open: &TargetOpen, settings: &AgentSettings) -> Result<Vec<(Target, Have)>, Refusal> {
    open_with(open, settings, |_, disk, options| {
        Target::open(options, disk.size)
    })
}

/// The same, each disk by `opening`.
pub(super) fn open_with(
    open: &TargetOpen,
    settings: &AgentSettings,
    opening: impl Fn(DiskIndex, &TargetDisk, &TargetOptions) -> Result<(Target, Have), TargetError>,
) -> Result<Vec<(Target, Have)>, Refusal> {
    if open.disks.is_empty() || open.disks.len() > DISKS_MAX {
        let text = format!(
            "a VM with {} disks cannot be written; 1 to {DISKS_MAX} can",
            open.disks.len()
        );
        return Err(Refusal::new(RefusalKind::Refused, text));
    }
    let disks = (0..).map(DiskIndex).zip(&open.disks);
    disks
        .map(|(index, disk)| open_disk(open.job, index, disk, settings, &opening))
        .collect()
}

fn open_disk(
    job: JobId,
    index: DiskIndex,
    disk: &TargetDisk,
    settings: &AgentSettings,
    opening: &impl Fn(DiskIndex, &TargetDisk, &TargetOptions) -> Result<(Target, Have), TargetError>,
) -> Result<(Target, Have), Refusal> {
    let options = options(job, index, disk, settings)?;
    let (target, have) = opening(index, disk, &options).map_err(|error| outcome::target(&error))?;
    let needed = if disk.preallocate { disk.size } else { disk.needed };
    let missing = needed.saturating_sub(have.bytes());
    if let Some(folder) = options.path.parent().filter(|_| !is_device(&options.path)) {
        // Only a first try is refused for want of space; a resumed one waits for it.
        if have.bytes() == 0 {
            apply::check_space(folder, missing).map_err(|error| outcome::target(&error))?;
        }
    }
    Ok((target, have))
}

/// The real place of a target. Our own link from the final name to the partial copy of a running VM is not followed.
fn resolve(job: JobId, path: &Path, settings: &AgentSettings) -> Result<PathBuf, Refusal> {
    let roots = &settings.paths.write;
    let partial = path
        .file_name()
        .and_then(|name| name.to_str())
        .map(|name| apply::partial_name(name, job));
    let linked = partial.filter(|partial| std::fs::read_link(path).is_ok_and(|to| to == Path::new(partial)));
    match (linked, path.file_name()) {
        (Some(partial), Some(name)) => {
            let beside = outcome::refused(roots::resolve_inside(roots, &path.with_file_name(partial)))?;
            Ok(beside.with_file_name(name))
        }
        _ => outcome::refused(roots::resolve_inside(roots, path)),
    }
}

fn options(
    job: JobId,
    index: DiskIndex,
    disk: &TargetDisk,
    settings: &AgentSettings,
) -> Result<TargetOptions, Refusal> {
    let path = resolve(job, &disk.path, settings)?;
    let format = match disk.format.as_str() {
        "raw" => TargetFormat::Raw,
        "qcow2" => TargetFormat::Qcow2,
        other => {
            let text = format!("a target cannot be written as '{other}'; raw and qcow2 can");
            return Err(Refusal::new(RefusalKind::Refused, text));
        }
    };
    let mode = settings
        .target
        .mode_bits()
        .map_err(|text| Refusal::new(RefusalKind::Refused, text))?;
    Ok(TargetOptions {
        path,
        format,
        preallocate: disk.preallocate,
        overwrite: disk.overwrite,
        owner: settings.target.owner,
        mode,
        label: settings.target.label.clone(),
        flush_bytes: settings.limits.flush_bytes.0,
        run_dir: settings.paths.run.clone(),
        state_dir: settings.paths.state.clone(),
        qemu_img: settings.programs.qemu_img.clone(),
        qemu_nbd: settings.programs.qemu_nbd.clone(),
        job,
        disk: index,
    })
}

/// Lets the final names lead to the partial copies of a running VM; gives those names.
pub(super) fn link(
    job: JobId,
    disks: &[TargetDisk],
    settings: &AgentSettings,
) -> Result<Vec<PathBuf>, Refusal> {
    let linked = (0..).map(DiskIndex).zip(disks).map(|(index, disk)| {
        let options = options(job, index, disk, settings)?;
        if !is_device(&options.path) {
            apply::link_early(&options).map_err(|error| outcome::target(&error))?;
        }
        Ok(options.path)
    });
    linked.collect()
}

/// Where each disk of a job lies, as far as its path is still allowed.
pub(super) fn all_options(open: &TargetOpen, settings: &AgentSettings) -> Vec<Option<TargetOptions>> {
    let disks = (0..).map(DiskIndex).zip(&open.disks);
    disks
        .map(|(index, disk)| options(open.job, index, disk, settings).ok())
        .collect()
}

/// After a crash no final name leads to a partial copy any more; the copies stay.
pub(super) fn unlink_all(open: &TargetOpen, settings: &AgentSettings) -> Result<(), String> {
    let unlink = |options: TargetOptions| {
        apply::unlink_after_crash(&options).map_err(|error| outcome::target(&error).text)
    };
    all_options(open, settings)
        .into_iter()
        .flatten()
        .try_for_each(unlink)
}

/// Gives the disks of a VM that runs here already their names, after a crash of this agent, too. The record comes last: without it
/// this is done again.
pub(super) fn promote_live(
    open: &TargetOpen,
    placed: &mut [apply::Placed],
    settings: &AgentSettings,
) -> Result<Vec<PathBuf>, Refusal> {
    let mut paths = Vec::new();
    for (index, disk) in (0..).map(DiskIndex).zip(&open.disks) {
        let named = match placed.get_mut(usize::from(index.0)) {
            Some(placed) => placed.promote(),
            None => apply::promote_after_crash(&options(open.job, index, disk, settings)?),
        };
        paths.push(named.map_err(|error| outcome::target(&error))?);
    }
    keep_definition(open, settings)?;
    let arrival = Arrival {
        digests: Vec::new(),
        paths: paths.clone(),
        copies: Vec::new(),
        complete: true,
        told: false,
        hook: None,
    };
    write_record(open.job, &arrival, settings)?;
    Ok(paths)
}

/// The hook of an arrived VM has run to its end.
pub(super) fn note_told(
    job: JobId,
    paths: &[PathBuf],
    hook: Option<String>,
    settings: &AgentSettings,
) -> Result<(), Refusal> {
    let arrival = Arrival {
        digests: Vec::new(),
        paths: paths.to_vec(),
        copies: Vec::new(),
        complete: true,
        told: true,
        hook,
    };
    write_record(job, &arrival, settings)
}

/// The record of a job's commit, if there is one.
pub(super) fn arrival(job: JobId, settings: &AgentSettings) -> Result<Option<Arrival>, Refusal> {
    let path = record_path(job, settings);
    match std::fs::read(&path) {
        Ok(bytes) => {
            let read = serde_json::from_slice(&bytes);
            read.map(Some).map_err(|error| unusable(&path, &error))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(unusable(&path, &error)),
    }
}

fn unusable(path: &Path, error: &dyn std::fmt::Display) -> Refusal {
    Refusal::new(
        RefusalKind::Refused,
        format!("the record {} cannot be used: {error}", path.display()),
    )
}

fn record_path(job: JobId, settings: &AgentSettings) -> PathBuf {
    settings.paths.state.join("arrived").join(format!("{job}.json"))
}

/// Promotes every disk. The record before and after makes a cut in the middle harmless; the definition is kept before both, since
/// the attempt that finishes a cut commit does not bring it.
pub(super) fn commit(
    open: &TargetOpen,
    targets: Vec<Target>,
    digests: &[Digest],
    settings: &AgentSettings,
) -> Result<Arrival, Refusal> {
    let paths = targets.iter().map(|target| target.path().to_owned()).collect();
    let digests = digests.iter().map(ToString::to_string).collect();
    let job = open.job;
    keep_definition(open, settings)?;
    let mut arrival = Arrival {
        digests,
        paths,
        copies: targets.iter().map(Target::identity).collect(),
        complete: false,
        told: false,
        hook: None,
    };
    write_record(job, &arrival, settings)?;
    for target in targets {
        target.promote().map_err(|error| outcome::target(&error))?;
    }
    arrival.complete = true;
    write_record(job, &arrival, settings)?;
    Ok(arrival)
}

/// Finishes a commit that was cut in the middle.
pub(super) fn finish_commit(
    open: &TargetOpen,
    mut arrival: Arrival,
    settings: &AgentSettings,
) -> Result<Arrival, Refusal> {
    if !arrival.complete {
        if arrival.copies.len() != open.disks.len() {
            let path = record_path(open.job, settings);
            return Err(unusable(&path, &"it was made for another number of disks"));
        }
        for ((index, disk), copy) in (0..).map(DiskIndex).zip(&open.disks).zip(&arrival.copies) {
            let options = options(open.job, index, disk, settings)?;
            apply::finish_promotion(&options, disk.size, copy).map_err(|error| outcome::target(&error))?;
        }
        arrival.complete = true;
        write_record(open.job, &arrival, settings)?;
    }
    Ok(arrival)
}

pub(super) fn write_record(job: JobId, arrival: &Arrival, settings: &AgentSettings) -> Result<(), Refusal> {
    let path = record_path(job, settings);
    let text = serde_json::to_vec_pretty(arrival).map_err(|error| unusable(&path, &error))?;
    write_durably(&path, &text).map_err(|error| unusable(&path, &error))
}

/// Keeps the VM's definition below the state folder, for the hook and the operator.
pub(super) fn keep_definition(
    open: &TargetOpen,
    settings: &AgentSettings,
) -> Result<Option<PathBuf>, Refusal> {
    let path = settings
        .paths
        .state
        .join("definitions")
        .join(open.job.to_string());
    let Some(definition) = &open.definition else {
        // An attempt that only asks whether everything has arrived does not carry it again.
        return Ok(path.exists().then_some(path));
    };
    write_durably(&path, definition).map_err(|error| unusable(&path, &error))?;
    Ok(Some(path))
}

/// Temporary name, sync, rename, sync of the folder.
pub(super) fn write_durably(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or_else(|| Path::new("/"));
    std::fs::create_dir_all(folder)?;
    let temporary = path.with_extension("new");
    let mut file = std::fs::File::create(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    std::fs::File::open(folder)?.sync_all()
}
