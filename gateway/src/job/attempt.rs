//! One attempt of a job: both agents connected, the disks moved, proved equal, committed.
//!
//! Owns the order of the steps and the dialogue with both agents (drawn in `longhaul_common::wire`). Leaves trying again, pausing and
//! the journal to `driver`. Promises that a commit is asked for only when the digests of all disks are equal and the source said
//! that nothing changed, and that the wish to commit is journaled before it is said.

use std::sync::Arc;
use std::time::{Duration, Instant};

use longhaul_common::digest::{Digest, LEAF};
use longhaul_common::ids::{Attempt, DiskIndex, JobId};
use longhaul_common::link::{Link, SendStream};
use longhaul_common::wire::frame;
use longhaul_common::wire::session::{
    AgentTask, AgentWord, DISK_SIZE_MAX, DiskCounts, FromSource, FromTarget, LiveOutcome, LiveStage,
    LiveState, LiveSurvey, OpenedDisk, PeerTask, Refusal, RefusalKind, ShadowId, SourceOpen, TargetDisk,
    TargetOpen, ToSource, ToTarget,
};

use super::board::Board;
use super::hearing::Hearing;
use super::ledger::Ledger;
use super::progress::Phase;
use super::spec::{JobSpec, Kind};
use crate::agents::Agents;
use crate::send::ingest::{Ingest, Outflow};
use crate::send::transmit::Peer;

/// What both ends have nothing to say about for so long is looked into.
const ARRIVAL_TIME: Duration = Duration::from_secs(30);

/// What an attempt works with.
pub struct Context {
    pub agents: Arc<Agents>,
    pub ingest: Arc<Ingest>,
    pub peer: Arc<Peer>,
}

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
    pub(super) heard: Hearing<FromSource>,
    link: Link,
}

/// What a target told while it opened.
pub struct Target {
    pub notes: Vec<String>,
    send: SendStream,
    pub(super) heard: Hearing<FromTarget>,
    link: Link,
    /// It said that everything has arrived already.
    pub arrived: Option<Option<String>>,
    /// Of each disk, the end of the data that is durable there.
    pub durable_below: Vec<u64>,
}

/// A disk as both sides state it in the end.
#[derive(Clone, Debug)]
pub struct Proof {
    pub source: Digest,
    pub target: Digest,
    pub counts: DiskCounts,
    pub verify_ms: u64,
    pub flush_ms: u64,
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

pub(super) fn out_of_turn(who: &str, message: &impl std::fmt::Debug) -> Refusal {
    let mut said = format!("{message:?}");
    said.truncate(said.floor_char_boundary(80));
    Refusal::new(RefusalKind::Protocol, format!("{who} spoke out of turn: {said}"))
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

    /// Of each disk the shadow since which the source agent knows all changes.
    pub fn since(&self) -> Vec<Option<ShadowId>> {
        self.disks.iter().map(|disk| disk.since).collect()
    }

    /// What the target agent is to compare its QEMU with.
    pub fn vm(&self) -> Option<AgentWord> {
        self.survey.as_ref().map(|survey| survey.vm.clone())
    }

    /// Each disk's size, and the bytes its content takes at most.
    pub fn sizes(&self) -> Vec<(u64, u64)> {
        self.disks.iter().map(|disk| (disk.size, disk.used)).collect()
    }

    pub(super) async fn tell(&mut self, message: &ToSource) -> Result<(), Refusal> {
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

    pub(super) async fn tell(&mut self, message: &ToTarget) -> Result<(), Refusal> {
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
    let disk = |(disk, (size, needed)): (&super::spec::DiskSection, &(u64, u64))| TargetDisk {
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

/// The transfer itself, from the first credit to the commit.
pub struct Transfer<'a> {
    pub context: &'a Context,
    pub board: &'a Board,
    pub source: Source,
    pub target: Target,
    pub outflow: Arc<Outflow>,
    pub(super) done: Vec<Option<(Digest, DiskCounts)>>,
}

impl<'a> Transfer<'a> {
    /// With both sides open.
    pub fn new(
        context: &'a Context,
        board: &'a Board,
        source: Source,
        target: Target,
        flow: (JobId, Attempt),
        ledger: Ledger,
    ) -> Self {
        let sizes = source.disks.iter().map(|disk| disk.size).collect();
        let outflow = Arc::new(Outflow::new(flow, Arc::clone(&context.peer), sizes, ledger));
        let done = vec![None; source.disks.len()];
        Self {
            context,
            board,
            source,
            target,
            outflow,
            done,
        }
    }

    /// Moves everything and waits until it is durable.
    pub async fn send_all(&mut self) -> Result<(), Refusal> {
        self.board.phase(Phase::Transfer);
        self.context.ingest.open(Arc::clone(&self.outflow));
        self.source.tell(&ToSource::Start).await?;
        let mut quiet_since = Instant::now();
        while !self.is_durable() {
            tokio::select! {
                message = self.source.heard.next() => self.on_source(message?)?,
                message = self.target.heard.next() => self.on_target(message?).await?,
                reason = self.outflow.refused() => return Err(Refusal::new(RefusalKind::Protocol, reason)),
                () = tokio::time::sleep_until((quiet_since + ARRIVAL_TIME).into()) => self.check_quiet()?,
            }
            quiet_since = Instant::now();
            self.board.count(&self.outflow);
        }
        Ok(())
    }

    /// Nothing was heard for long: sound while batches are on their way, or yet to be read. Batches that were promised and are
    /// nowhere never come.
    fn check_quiet(&self) -> Result<(), Refusal> {
        let promised = self
            .done
            .iter()
            .map(|disk| disk.as_ref().map(|(_, counts)| counts.batches));
        let promised = promised.sum::<Option<u64>>();
        let ledger = self.outflow.ledger();
        match promised {
            Some(promised) if ledger.is_settled() => {
                let arrived = ledger.durable_batches();
                let text = format!(
                    "the source agent has sent {promised} batches, but {} never arrived here; it is tried again, see the agent's log",
                    promised.saturating_sub(arrived)
                );
                Err(Refusal::new(RefusalKind::Lost, text))
            }
            _ => Ok(()),
        }
    }

    /// Whether every batch of every disk is durable.
    fn is_durable(&self) -> bool {
        let batches = self
            .done
            .iter()
            .map(|disk| disk.as_ref().map(|(_, counts)| counts.batches))
            .sum::<Option<u64>>();
        batches.is_some_and(|batches| self.outflow.ledger().durable_batches() >= batches)
    }

    pub(super) fn on_source(&mut self, message: FromSource) -> Result<(), Refusal> {
        match message {
            FromSource::DiskDone { disk, digest, counts } => {
                let size = self.source.disks.get(usize::from(disk.0)).map(|disk| disk.size);
                let slot = self.done.get_mut(usize::from(disk.0));
                let (Some(slot), Some(size)) = (slot, size) else {
                    return Err(out_of_turn("the source agent", &disk));
                };
                if slot.is_some() || !counts.is_sound(size) {
                    return Err(out_of_turn("the source agent", &counts));
                }
                self.board.disk_read(usize::from(disk.0), &counts);
                *slot = Some((digest, counts));
                Ok(())
            }
            FromSource::Failed(refusal) => Err(refusal),
            other => Err(out_of_turn("the source agent", &other)),
        }
    }

    pub(super) async fn on_target(&mut self, message: FromTarget) -> Result<(), Refusal> {
        match message {
            FromTarget::Credit(bytes) => {
                let passed = self.context.ingest.credit(&self.outflow, bytes);
                self.pass_credit(passed).await
            }
            FromTarget::Accepted(sequences) => {
                let passed = self.context.ingest.accepted(&self.outflow, &sequences);
                self.pass_credit(passed).await
            }
            FromTarget::Missing(sequences) => {
                self.context.ingest.send_plainly(&self.outflow, &sequences).await;
                Ok(())
            }
            FromTarget::Durable(sequences) => {
                self.outflow.ledger().durable(&sequences);
                // The word that they were accepted may come later: what is durable is not sent again.
                let passed = self.context.ingest.accepted(&self.outflow, &sequences);
                self.pass_credit(passed).await?;
                self.source.tell(&ToSource::Durable(sequences)).await
            }
            FromTarget::Waiting(refusal) => {
                tracing::warn!("the target waits: {refusal}");
                self.board.waiting(Some(refusal.text));
                Ok(())
            }
            FromTarget::Resumed => {
                self.board.waiting(None);
                Ok(())
            }
            FromTarget::Failed(refusal) => Err(refusal),
            other => Err(out_of_turn("the target agent", &other)),
        }
    }

    async fn pass_credit(&mut self, bytes: u64) -> Result<(), Refusal> {
        match bytes {
            0 => Ok(()),
            bytes => self.source.tell(&ToSource::Credit(bytes)).await,
        }
    }

    /// Has the target read back what it wrote, and compares. The source says that nothing changed meanwhile.
    pub async fn prove(&mut self) -> Result<Vec<Proof>, Refusal> {
        self.board.phase(Phase::Verify);
        self.context.ingest.close(&self.outflow);
        self.target.tell(&ToTarget::Verify).await?;
        let mut proofs = Vec::new();
        let mut verified = 0_u64;
        while proofs.len() < self.done.len() {
            match self.target.heard.next().await? {
                FromTarget::Verifying { bytes, .. } => self.board.verified(verified.saturating_add(bytes)),
                FromTarget::Verified {
                    disk,
                    digest,
                    verify_ms,
                    flush_ms,
                } if usize::from(disk.0) == proofs.len() => {
                    verified += self.source.disks[proofs.len()].size;
                    self.board.verified(verified);
                    let stated = self.done[proofs.len()].take();
                    let (source, counts) = stated.ok_or_else(|| out_of_turn("the target agent", &disk))?;
                    proofs.push(Proof {
                        source,
                        target: digest,
                        counts,
                        verify_ms,
                        flush_ms,
                    });
                }
                FromTarget::Failed(refusal) => return Err(refusal),
                FromTarget::Credit(_)
                | FromTarget::Accepted(_)
                | FromTarget::Durable(_)
                | FromTarget::Missing(_) => {}
                FromTarget::Waiting(refusal) => self.board.waiting(Some(refusal.text)),
                FromTarget::Resumed => self.board.waiting(None),
                other => return Err(out_of_turn("the target agent", &other)),
            }
        }
        self.compare(&proofs)?;
        self.source.tell(&ToSource::Finish).await?;
        match self.source.heard.next().await? {
            FromSource::Finished => Ok(proofs),
            FromSource::Failed(refusal) => Err(refusal),
            other => Err(out_of_turn("the source agent", &other)),
        }
    }

    fn compare(&self, proofs: &[Proof]) -> Result<(), Refusal> {
        let differing = (0..)
            .map(DiskIndex)
            .zip(proofs)
            .find(|(_, proof)| proof.source != proof.target);
        let Some((disk, proof)) = differing else {
            return Ok(());
        };
        let text = format!(
            "disk {disk} differs: the source states {}, the target reads back {}; check the target's storage, then resume",
            proof.source, proof.target
        );
        Err(Refusal::new(RefusalKind::Mismatch, text))
    }

    /// Has the target promote its copies. Gives why the hook failed, if it did.
    pub async fn commit(&mut self, proofs: &[Proof]) -> Result<Option<String>, Refusal> {
        self.board.phase(Phase::Commit);
        let digests = proofs.iter().map(|proof| proof.target).collect();
        self.target.tell(&ToTarget::Commit { digests }).await?;
        loop {
            match self.target.heard.next().await? {
                FromTarget::Committed { hook, .. } => return Ok(hook),
                FromTarget::Failed(refusal) => return Err(refusal),
                FromTarget::Credit(_)
                | FromTarget::Accepted(_)
                | FromTarget::Durable(_)
                | FromTarget::Missing(_) => {}
                other => return Err(out_of_turn("the target agent", &other)),
            }
        }
    }
}

impl Drop for Transfer<'_> {
    fn drop(&mut self) {
        self.context.ingest.close(&self.outflow);
    }
}

/// When a step began; gives its length in milliseconds.
pub fn elapsed_ms(since: Instant) -> u64 {
    since.elapsed().as_millis() as u64
}
