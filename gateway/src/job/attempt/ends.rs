//! Both agents of an attempt, as the source's gateway speaks with them.
//!
//! Owns opening each, and saying something to one. Leaves what is said after that to the parent. Promises that sizes nobody can count
//! with are refused before anybody does.

use longhaul_common::digest::LEAF;
use longhaul_common::ids::{Attempt, JobId};
use longhaul_common::link::{Link, SendStream};
use longhaul_common::wire::frame;
use longhaul_common::wire::session::{
    AgentTask, AgentWord, DISK_SIZE_MAX, FromSource, FromTarget, LiveOutcome, LiveStage, LiveState,
    LiveSurvey, OpenedDisk, PeerTask, Refusal, RefusalKind, SourceOpen, TargetDisk, TargetOpen, ToSource,
    ToTarget,
};

use super::{Context, out_of_turn};
use crate::job::hearing::Hearing;
use crate::job::spec::{DiskSection, JobSpec, Kind};

/// What a source agent told of the disks; enough for a plan.
pub struct Source {
    pub disks: Vec<OpenedDisk>,
    pub definition: Option<Vec<u8>>,
    /// It said that the handover of a running VM is in doubt, in these words.
    pub doubt: Option<String>,
    /// Of a running VM.
    pub survey: Option<Box<LiveSurvey>>,
    /// It said that the VM runs at the target already.
    pub moved: Option<Box<LiveOutcome>>,
    /// A running VM's source: once it has said its last word it hears no more, so what it does not hear ends nothing.
    live: bool,
    send: SendStream,
    pub(in crate::job) heard: Hearing<FromSource>,
    link: Link,
}

/// Numbers that nobody can count with are refused before anybody does.
fn check_disks(disks: &[OpenedDisk]) -> Result<(), Refusal> {
    let unsound = disks.iter().find(|disk| !disk.is_sound());
    unsound.map_or(Ok(()), |disk| {
        let text = format!(
            "the source agent speaks of a disk of {} bytes, of which {} are used: that is larger than the disk, or than \
             {DISK_SIZE_MAX} bytes; see the agent's log",
            disk.size, disk.used
        );
        Err(Refusal::new(RefusalKind::Refused, text))
    })
}

impl Source {
    /// Has the source agent open and scan the disks.
    pub async fn open(context: &Context, spec: &JobSpec, open: SourceOpen) -> Result<Self, Refusal> {
        let link = context.agents.link(&spec.source.agent)?;
        let lost = |error: &dyn std::fmt::Display| {
            Refusal::new(
                RefusalKind::Lost,
                format!("the source agent was lost: {}", link.reason_or(error)),
            )
        };
        let (mut send, recv) = link.open_bi().await.map_err(|error| lost(&error))?;
        let task = AgentTask::Source(open);
        frame::write(&mut send, &task)
            .await
            .map_err(|error| lost(&error))?;
        let mut heard = Hearing::start(recv, link.clone(), "the source agent");
        let mut first = heard.next().await?;
        let mut doubt = None;
        if let FromSource::Live(LiveState {
            stage: LiveStage::InDoubt,
            decision,
            ..
        }) = first
        {
            doubt = Some(decision);
            first = heard.next().await?;
        }
        let (disks, definition, survey, moved) = match first {
            FromSource::Opened {
                disks,
                definition,
                live,
            } if disks.len() == spec.disk.len() => {
                check_disks(&disks)?;
                (disks, definition, live, None)
            }
            FromSource::Moved(outcome) if spec.kind == Kind::Live => (Vec::new(), None, None, Some(outcome)),
            FromSource::Failed(refusal) => return Err(refusal),
            other => return Err(out_of_turn("the source agent", &other)),
        };
        Ok(Self {
            disks,
            definition,
            doubt,
            survey,
            moved,
            live: spec.kind == Kind::Live,
            send,
            heard,
            link,
        })
    }

    /// What the target agent is asked for, with what this source knows of its disks and its VM. The definition goes along once.
    pub fn target_open(
        &mut self,
        spec: &JobSpec,
        job: JobId,
        attempt: Attempt,
        sizes: &[(u64, u64)],
    ) -> TargetOpen {
        let (definition, vm) = (self.definition.take(), self.vm());
        let mut open = target_open(spec, job, attempt, sizes, definition, vm);
        for (disk, known) in open.disks.iter_mut().zip(&self.disks) {
            disk.since = known.since;
        }
        open
    }

    /// What the target agent is to compare its QEMU with.
    pub fn vm(&self) -> Option<AgentWord> {
        self.survey.as_ref().map(|survey| survey.vm.clone())
    }

    /// Each disk's size, and the bytes its content takes at most.
    pub fn sizes(&self) -> Vec<(u64, u64)> {
        self.disks.iter().map(|disk| (disk.size, disk.used)).collect()
    }

    pub(in crate::job) async fn tell(&mut self, message: &ToSource) -> Result<(), Refusal> {
        let lost = |error: frame::FrameError| Refusal::new(RefusalKind::Lost, self.link.reason_or(&error));
        match frame::write(&mut self.send, message).await {
            Err(error) if self.live => {
                tracing::debug!("the source agent does not hear any more: {error}");
                Ok(())
            }
            written => written.map_err(lost),
        }
    }
}

/// What a target told while it opened.
pub struct Target {
    pub notes: Vec<String>,
    send: SendStream,
    pub(in crate::job) heard: Hearing<FromTarget>,
    link: Link,
    /// It said that everything has arrived already.
    pub arrived: Option<Option<String>>,
    /// Of each disk, the end of the data that is durable there.
    pub durable_below: Vec<u64>,
}

impl Target {
    /// Has the target agent open the disks. With a source it is told on the way what is there already.
    pub async fn open(
        context: &Context,
        spec: &JobSpec,
        open: TargetOpen,
        source: Option<&mut Source>,
    ) -> Result<Self, Refusal> {
        let (link, mut send, recv) = context.peer.control().await?;
        let task = PeerTask::Target {
            agent: spec.target.agent.clone(),
            tenant: spec.tenant.clone(),
            open,
        };
        let lost = |error: frame::FrameError| Refusal::because(RefusalKind::Lost, &error);
        frame::write(&mut send, &task).await.map_err(lost)?;
        let heard = Hearing::start(recv, link.clone(), "the target site");
        let mut target = Self {
            notes: Vec::new(),
            send,
            heard,
            link,
            arrived: None,
            durable_below: vec![0; spec.disk.len()],
        };
        match target.heard.next().await? {
            FromTarget::Opened { notes } => target.notes = notes,
            FromTarget::Committed { hook, .. } if spec.kind == Kind::Move => {
                target.arrived = Some(hook);
                return Ok(target);
            }
            FromTarget::Failed(refusal) => return Err(refusal),
            other => return Err(out_of_turn("the target agent", &other)),
        }
        let Some(source) = source else {
            return Ok(target);
        };
        loop {
            match target.heard.next().await? {
                FromTarget::Have(have) => {
                    let below = target.durable_below.get_mut(usize::from(have.disk.0));
                    if let (Some(below), Some((leaf, _))) = (below, have.digests.last()) {
                        *below = leaf.saturating_add(1).saturating_mul(LEAF).max(*below);
                    }
                    source.tell(&ToSource::Have(have)).await?;
                }
                FromTarget::Ready => return Ok(target),
                FromTarget::Say(word) => source.tell(&ToSource::Say(word)).await?,
                FromTarget::Failed(refusal) => return Err(refusal),
                other => return Err(out_of_turn("the target agent", &other)),
            }
        }
    }

    pub(in crate::job) async fn tell(&mut self, message: &ToTarget) -> Result<(), Refusal> {
        let lost = |error: frame::FrameError| Refusal::new(RefusalKind::Lost, self.link.reason_or(&error));
        frame::write(&mut self.send, message).await.map_err(lost)
    }

    /// Has the partial copies removed.
    pub async fn abort(mut self, why: &Refusal) -> Result<(), Refusal> {
        self.tell(&ToTarget::Abort(why.clone())).await?;
        loop {
            match self.heard.next().await? {
                FromTarget::Aborted => return Ok(()),
                FromTarget::Failed(refusal) => return Err(refusal),
                // What was on its way when the abort was said.
                _ => {}
            }
        }
    }
}

/// What the target agent is asked for; `sizes` gives each disk's size and the bytes its content takes at most.
pub fn target_open(
    spec: &JobSpec,
    job: JobId,
    attempt: Attempt,
    sizes: &[(u64, u64)],
    definition: Option<Vec<u8>>,
    vm: Option<AgentWord>,
) -> TargetOpen {
    let disk = |(disk, (size, needed)): (&DiskSection, &(u64, u64))| TargetDisk {
        path: disk.target.clone(),
        format: disk.target_format.clone(),
        size: *size,
        needed: *needed,
        preallocate: spec.target.preallocate,
        overwrite: spec.target.overwrite,
        shadow: spec.kind == Kind::Live && spec.target.shadow,
        since: None,
    };
    let disks = spec.disk.iter().zip(sizes).map(disk).collect();
    TargetOpen {
        job,
        attempt,
        name: spec.name.clone(),
        disks,
        definition,
        dry_run: false,
        live: spec.target_vm(vm),
    }
}
