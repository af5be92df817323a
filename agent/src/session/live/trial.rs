//! The target's QEMU, tried before a byte moves: whether the VM would find in it what it is at its source.
//!
//! Owns starting it for a moment on stand-ins for the disks, the comparison, and its end; a QEMU that waits already is only asked. Leaves
//! what is compared to `vm::facts`. Promises that nothing of it is left, after a crash of the agent neither, and that it takes a bounded
//! time. The QEMU that the VM arrives in is compared again when it is there.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use longhaul_common::ids::JobId;
use longhaul_common::wire::session::{Refusal, RefusalKind, TargetOpen, TargetVm, chain};

use super::word::{self, VmWords};
use crate::disk::apply::{Scratch, TargetOptions};
use crate::session::target_disks::{self, write_durably};
use crate::session::threads::on_thread;
use crate::session::{Agent, outcome};
use crate::settings::AgentSettings;
use crate::vm::facts::{self, Finding, VmFacts};
use crate::vm::incoming::{Files, Incoming, Template, Values};

/// Records of trials under way, below the state folder: the stand-ins that a crash would leave.
const RECORDS: &str = "trying";

fn refuse(text: impl Into<String>) -> Refusal {
    Refusal::new(RefusalKind::Refused, text)
}

/// Compares the VM with the QEMU that it would arrive in. Gives what people should know.
pub(super) async fn run(
    agent: &Arc<Agent>,
    open: &TargetOpen,
    vm: &TargetVm,
) -> Result<Vec<String>, Refusal> {
    let Some(words) = vm.vm.as_ref().and_then(word::decode::<VmWords>) else {
        return Ok(Vec::new());
    };
    if let Some(socket) = &vm.qmp {
        let waiting = Incoming::adopt(socket).await;
        let waiting = waiting.map_err(|error| Refusal::because(RefusalKind::Refused, &error))?;
        return compare(&words, &waiting).await.map_err(refuse);
    }
    let template = Template(agent.settings.vm.command.clone());
    if let Some(source) = source_of(&words).map_err(refuse)?
        && let Some(finding) = facts::machine_option(template.machine(), &source)
    {
        return Err(refuse(finding.to_string()));
    }
    let started = start(agent, open, &template, &words).await;
    let compared = match started {
        Ok((incoming, _stand_ins)) => {
            let compared = compare(&words, &incoming).await;
            incoming.abort().await;
            compared.map_err(refuse)
        }
        Err(refusal) => Err(refusal),
    };
    let (state, run, job) = (
        agent.settings.paths.state.clone(),
        agent.settings.paths.run.clone(),
        open.job,
    );
    let _ = on_thread("trial-end", move || forget(&state, &run, job)).await;
    compared
}

/// Starts the template's QEMU on stand-ins, which live as long as they are held.
async fn start(
    agent: &Arc<Agent>,
    open: &TargetOpen,
    template: &Template,
    words: &VmWords,
) -> Result<(Incoming, Vec<Scratch>), Refusal> {
    let (with, asked) = (Arc::clone(agent), open.clone());
    let made = on_thread("trial", move || stand_in(&asked, &with.settings)).await;
    let (paths, stand_ins) = made.map_err(|error| Refusal::because(RefusalKind::Protocol, &error))??;
    let disks: Vec<&Path> = paths.iter().map(PathBuf::as_path).collect();
    let run = &agent.settings.paths.run;
    let (qmp, files) = (socket(run, open.job), files(run, open.job));
    let _ = std::fs::remove_file(&qmp);
    let values = Values {
        disks: &disks,
        qmp: &qmp,
        pid_file: &files.pid,
        name: &open.name,
        uuid: words.uuid.as_deref(),
    };
    let incoming = Incoming::start(template, &values, &files).await;
    let incoming = incoming.map_err(|error| {
        refuse(format!(
            "the QEMU of the target's vm.command does not come up: {}",
            chain(&error)
        ))
    })?;
    Ok((incoming, stand_ins))
}

/// A stand-in for each disk, or the block device that it is to be. Blocks.
fn stand_in(open: &TargetOpen, settings: &AgentSettings) -> Result<(Vec<PathBuf>, Vec<Scratch>), Refusal> {
    let all = target_disks::all_options(open, settings);
    let options: Vec<TargetOptions> = all
        .into_iter()
        .collect::<Option<_>>()
        .ok_or_else(|| refuse("a disk's path is not allowed on the target host (paths.write)"))?;
    let places: Vec<_> = options.iter().map(Scratch::path_of).collect();
    let left: Vec<_> = places.iter().flatten().cloned().collect();
    remember(&settings.paths.state, open.job, &left)?;
    let mut stand_ins = Vec::new();
    for ((options, place), disk) in options.iter().zip(&places).zip(&open.disks) {
        if let Some(place) = place {
            let made = Scratch::create(options, place, disk.size);
            stand_ins.push(made.map_err(|error| outcome::target(&error))?);
        }
    }
    let paths = options.into_iter().zip(places);
    let paths = paths.map(|(options, place)| place.unwrap_or(options.path));
    Ok((paths.collect(), stand_ins))
}

/// What the source says of its VM, if it says anything.
fn source_of(words: &VmWords) -> Result<Option<VmFacts>, String> {
    let read = words.facts.as_deref().map(serde_json::from_str).transpose();
    read.map_err(|error| {
        format!(
            "what the source says of its VM is not understood: {error}; run the same version on both hosts"
        )
    })
}

/// Compares both VMs. `Err`: they differ in what matters.
pub(super) async fn compare(words: &VmWords, incoming: &Incoming) -> Result<Vec<String>, String> {
    let Some(source) = source_of(words)? else {
        return Ok(Vec::new());
    };
    let target = facts::gather(incoming.qmp(), facts::HostCpu::read()).await;
    let target = target.map_err(|error| error.to_string())?;
    let findings = facts::compare(&source, &target);
    let (refused, noted): (Vec<_>, Vec<_>) = findings.into_iter().partition(Finding::is_refusal);
    let words =
        |findings: Vec<Finding>| -> Vec<String> { findings.iter().map(ToString::to_string).collect() };
    match refused.is_empty() {
        true => Ok(words(noted)),
        false => Err(words(refused).join("; ")),
    }
}

fn socket(run: &Path, job: JobId) -> PathBuf {
    run.join(format!("try-{}.qmp", job.short()))
}

fn files(run: &Path, job: JobId) -> Files {
    Files::in_folder(run, &format!("try-{}", job.short()))
}

fn record(state: &Path, job: JobId) -> PathBuf {
    state.join(RECORDS).join(format!("{job}.json"))
}

fn remember(state: &Path, job: JobId, left: &[PathBuf]) -> Result<(), Refusal> {
    let path = record(state, job);
    let text = serde_json::to_vec(left).unwrap_or_default();
    write_durably(&path, &text).map_err(|error| {
        refuse(format!(
            "the record {} cannot be written: {error}",
            path.display()
        ))
    })
}

/// Removes the files of a trial that is over. Blocks.
fn forget(state: &Path, run: &Path, job: JobId) {
    let files = files(run, job);
    for path in [socket(run, job), files.pid, files.log, record(state, job)] {
        // Whatever is left is found by the next start of the agent.
        let _ = std::fs::remove_file(path);
    }
}

/// Ends the trials of a former life of this agent.
pub(super) async fn settle(agent: &Arc<Agent>) {
    let state = agent.settings.paths.state.clone();
    let found = on_thread("trials", move || left(&state)).await;
    let run = &agent.settings.paths.run;
    for (job, stand_ins) in found.unwrap_or_default() {
        match Incoming::find(&socket(run, job), None, &files(run, job)).await {
            Ok(Some(incoming)) => incoming.abort().await,
            Ok(None) => {}
            Err(error) => tracing::warn!(%job, "a QEMU that was only tried may still be there: {error}"),
        }
        let (state, run) = (agent.settings.paths.state.clone(), run.clone());
        let _ = on_thread("trial-end", move || {
            stand_ins.iter().for_each(|path| Scratch::remove_left(path));
            forget(&state, &run, job);
        })
        .await;
    }
}

fn left(state: &Path) -> Vec<(JobId, Vec<PathBuf>)> {
    let Ok(folder) = std::fs::read_dir(state.join(RECORDS)) else {
        return Vec::new();
    };
    let read = |entry: std::fs::DirEntry| {
        let path = entry.path();
        let job = path.file_stem()?.to_str()?.parse().ok()?;
        let text = std::fs::read(&path).ok()?;
        Some((job, serde_json::from_slice(&text).unwrap_or_default()))
    };
    folder.flatten().filter_map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_crash_leaves_is_found_and_nothing_else_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let job = JobId::random();
        let ours = folder.path().join(format!(".longhaul-try-{}-0", job.short()));
        let foreign = folder.path().join("web.img");
        for file in [&ours, &foreign] {
            std::fs::write(file, "x").unwrap();
        }
        remember(folder.path(), job, &[ours.clone(), foreign.clone()]).unwrap();
        let found = left(folder.path());
        assert_eq!(found, [(job, vec![ours.clone(), foreign.clone()])]);
        found[0].1.iter().for_each(|path| Scratch::remove_left(path));
        forget(folder.path(), folder.path(), job);
        assert!(!ours.exists() && foreign.exists());
        assert_eq!(left(folder.path()), []);
    }
}
