//! One attempt of a job: both agents connected, the disks moved, proved equal, committed.
//!
//! Owns the order of the steps and the dialogue with both agents (drawn in `longhaul_common::wire`). Leaves trying again, pausing and
//! the journal to `driver`. Promises that a commit is asked for only when the digests of all disks are equal and the source said
//! that nothing changed, and that the wish to commit is journaled before it is said.

mod ends;

use std::sync::Arc;
use std::time::{Duration, Instant};

use longhaul_common::digest::Digest;
use longhaul_common::ids::{Attempt, DiskIndex, JobId};
use longhaul_common::wire::session::{
    DiskCounts, FromSource, FromTarget, Refusal, RefusalKind, ToSource, ToTarget,
};

pub use self::ends::{Source, Target, target_open};
use super::board::Board;
use super::ledger::Ledger;
use super::progress::Phase;
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

/// A disk as both sides state it in the end.
#[derive(Clone, Debug)]
pub struct Proof {
    pub source: Digest,
    pub target: Digest,
    pub counts: DiskCounts,
    pub verify_ms: u64,
    pub flush_ms: u64,
}

pub(super) fn out_of_turn(who: &str, message: &impl std::fmt::Debug) -> Refusal {
    let mut said = format!("{message:?}");
    said.truncate(said.floor_char_boundary(80));
    Refusal::new(RefusalKind::Protocol, format!("{who} spoke out of turn: {said}"))
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
