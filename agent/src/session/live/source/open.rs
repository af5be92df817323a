//! The beginning of a session: the VM is looked at from all sides before anything is read, then the first bitmaps are switched on.
//!
//! Owns the order of these looks and what is told of them. Leaves each look to `preflight`, `media`, `disks` and `outlook`. Promises that
//! whatever is refused leaves the VM's QEMU as it was, and that another job's VM is not touched.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use longhaul_common::wire::session::{
    LiveForecast, LiveSurvey, OpenedDisk, Refusal, RefusalKind, SourceOpen, SourceVm,
};
use tokio::sync::{mpsc, watch};

use super::{LiveSource, QUEUE, preflight, save};
use crate::session::Agent;
use crate::session::live::disks::{self, VmDisk};
use crate::session::live::drive::Parts;
use crate::session::live::media::{self, Media};
use crate::session::live::old_copy::OldCopy;
use crate::session::live::outlook;
use crate::session::live::prepared;
use crate::session::live::proof::FreeProof;
use crate::session::live::record::Leaving;
use crate::session::live::word::{self, VmWords};
use crate::session::source_disks::read_definition;
use crate::vm::facts::VmFacts;
use crate::vm::qmp::Qmp;
use crate::vm::rounds::{self, Rounds, RoundsOptions};

/// What was found before anything was added to QEMU.
struct Found {
    facts: VmFacts,
    disks: Vec<VmDisk>,
    media: Media,
    notes: Vec<String>,
}

/// What was read through the first exports.
struct Read {
    reports: Vec<OpenedDisk>,
    free: Arc<FreeProof>,
    definition: Option<Vec<u8>>,
    forecast: Option<LiveForecast>,
}

fn refused(error: &dyn std::error::Error) -> Refusal {
    Refusal::because(RefusalKind::Refused, error)
}

impl LiveSource {
    pub(super) async fn open(
        agent: &Arc<Agent>,
        open: &SourceOpen,
        vm: SourceVm,
    ) -> Result<Arc<Self>, Refusal> {
        let socket = preflight::allowed_socket(agent, &vm)?;
        let guest_agent = preflight::allowed_guest_agent(agent, &vm)?;
        let others = agent.live_sources.others(open.job);
        if others.iter().any(|other| other.has_vm(&socket)) {
            // Perhaps a plan, which is over in a moment.
            let text = "another job or plan has this VM right now; this one begins when that is over";
            return Err(Refusal::new(RefusalKind::Lost, text));
        }
        let qmp = prepared::monitor(agent, &socket)
            .await
            .map_err(|error| refused(&error))?;
        let found = look(&qmp, open, &vm).await?;
        let options = options(agent, open, &vm, &found.disks);
        // What a former life of this agent left in this QEMU for this job.
        let prefix = format!("{}{}-", crate::vm::PREFIX, open.job.short());
        rounds::sweep(&qmp, &options.socket, |name| !name.starts_with(&prefix))
            .await
            .map_err(|error| refused(&error))?;
        let record = record(open, &vm, socket, options.socket.clone(), &found.disks);
        save(agent, open.job, record.clone()).await?;
        let noted = preflight::known_since(&qmp, &options.nodes).await?;
        let since = Instant::now();
        let mut rounds = Rounds::start(&qmp, options)
            .await
            .map_err(|error| refused(&error))?;
        let mut read = match read(agent, open, &vm, &qmp, &mut rounds, &found, since).await {
            Ok(read) => read,
            Err(refusal) => {
                let _ = rounds.remove().await; // The first error is the one to tell.
                return Err(refusal);
            }
        };
        read.reports
            .iter_mut()
            .zip(&noted)
            .for_each(|(report, noted)| report.since = *noted);
        let (words, heard) = mpsc::channel(QUEUE);
        Ok(Arc::new(Self {
            agent: Arc::clone(agent),
            job: open.job,
            vm,
            old_copy: OldCopy::of(&found.disks, open.job),
            qmp,
            guest_agent,
            survey: Some(Box::new(survey(&found, read.forecast))),
            ram_size: found.facts.ram,
            eject: found.media.eject,
            disks: found.disks,
            since: noted,
            reports: read.reports,
            free: read.free,
            definition: read.definition,
            heard: watch::Sender::default(),
            uplink: watch::Sender::new(None),
            words,
            owner: watch::Sender::new(None),
            ram: Mutex::default(),
            record: Mutex::new(record),
            parts: Mutex::new(Some(Parts { rounds, words: heard })),
            ended: watch::Sender::new(None),
        }))
    }
}

/// Everything that is asked before something is changed.
async fn look(qmp: &Qmp, open: &SourceOpen, vm: &SourceVm) -> Result<Found, Refusal> {
    let (facts, mut notes) = preflight::refuse_unmovable(qmp).await?;
    let disks = disks::find(qmp, &open.disks).await?;
    let copied: Vec<_> = disks.iter().map(|disk| disk.node.clone()).collect();
    let media = media::judge(&facts.disks, &copied, vm.media)
        .map_err(|text| Refusal::new(RefusalKind::Refused, text))?;
    notes.extend(media.notes.iter().cloned());
    Ok(Found {
        facts,
        disks,
        media,
        notes,
    })
}

fn options(agent: &Agent, open: &SourceOpen, vm: &SourceVm, disks: &[VmDisk]) -> RoundsOptions {
    let name = format!("nbd-{}.sock", open.job.short());
    RoundsOptions {
        job: open.job.short(),
        nodes: disks.iter().map(|disk| disk.node.clone()).collect(),
        granularity: rounds::granularity(vm.policy.granularity, disks.iter().map(|disk| disk.size)),
        socket: agent.settings.paths.run.join(name),
        foreign_socket: None,
    }
}

/// What is remembered of a job that has only begun.
fn record(
    open: &SourceOpen,
    vm: &SourceVm,
    qmp: std::path::PathBuf,
    nbd: std::path::PathBuf,
    disks: &[VmDisk],
) -> Leaving {
    Leaving {
        job: open.job.to_string(),
        vm: vm.clone(),
        qmp,
        nbd,
        disks: disks.to_vec(),
        saved: None,
        limits: Vec::new(),
        ejected: Vec::new(),
        outcome: None,
        definition: open.definition.clone(),
        hooked: false,
        told: false,
        shadows: Vec::new(),
    }
}

/// Looks at the disks through the first exports and, for a plan, at how fast the VM changes.
async fn read(
    agent: &Agent,
    open: &SourceOpen,
    vm: &SourceVm,
    qmp: &Qmp,
    rounds: &mut Rounds,
    found: &Found,
    since: Instant,
) -> Result<Read, Refusal> {
    let reach = disks::reach(rounds, 1).await.map_err(|error| refused(&error));
    let (reports, free) = preflight::survey(reach, found.disks.clone(), vm.policy, open.filter).await?;
    let definition = open.definition.as_deref();
    let definition = definition.map(|path| read_definition(path, &agent.settings));
    let forecast = match vm.plan {
        None => None,
        Some(link) => {
            let sample = outlook::sample(qmp, rounds, since, found.facts.ram).await;
            let sample = sample.map_err(|error| refused(&error))?;
            Some(outlook::planned(
                &sample,
                &reports,
                found.facts.ram,
                link,
                &vm.policy,
            ))
        }
    };
    Ok(Read {
        reports,
        free,
        definition: definition.transpose()?,
        forecast,
    })
}

fn survey(found: &Found, forecast: Option<LiveForecast>) -> LiveSurvey {
    let words = VmWords::of(found.facts.clone(), &found.media.eject);
    let mut notes = found.notes.clone();
    notes.extend(forecast.iter().map(|_| outlook::ASSUMED.to_string()));
    LiveSurvey {
        vm: word::encode(&words),
        notes,
        forecast,
    }
}
