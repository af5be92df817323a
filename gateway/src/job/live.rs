//! A running VM's move, as the source's gateway sees it: the agents drive, this carries their words.
//!
//! Owns the relay between both agents during one attempt, and giving up on the operator's word. Leaves every decision about the VM
//! to the agents, and counting to `ledger`. Promises that words pass in both directions for as long as both agents are there,
//! that a cancel reaches the source agent also while the target is away (one in doubt then only waits for the target's word), and that a
//! move counts as done only when both agents said so: what one of them has left to say to the other passes until then.

use std::time::Duration;

use longhaul_common::wire::session::{
    FromSource, FromTarget, LiveOutcome, LiveStage, Refusal, RefusalKind, ToSource, ToTarget,
};

use super::attempt::{Source, Transfer, out_of_turn};
use super::progress::Phase;

/// How long the source agent may take to bring the VM back after a cancel.
const CANCEL_TIME: Duration = Duration::from_secs(60);
/// Between two looks at the counts while nothing is said.
const COUNT_EVERY: Duration = Duration::from_millis(250);

/// What a running VM's move came to.
pub struct Moved {
    pub outcome: Box<LiveOutcome>,
    /// Why the hook at the target failed, if it did.
    pub hook: Option<String>,
}

/// What an end said about its part being over.
#[derive(Default)]
struct Ends {
    source: Option<Box<LiveOutcome>>,
    /// With why its hook failed, if it did.
    target: Option<Option<String>>,
}

impl Ends {
    fn both(&mut self) -> Option<Moved> {
        if self.source.is_none() || self.target.is_none() {
            return None;
        }
        let (outcome, hook) = (self.source.take()?, self.target.take()?);
        Some(Moved { outcome, hook })
    }
}

impl Transfer<'_> {
    /// Carries words and batches until the VM runs at the target and both agents have settled it. Where the job was cancelled, the source
    /// begins nothing any more.
    pub async fn move_live(&mut self, cancelled: Option<Refusal>) -> Result<Moved, Refusal> {
        let mut ends = Ends {
            source: self.source.moved.take(),
            target: None,
        };
        if ends.source.is_none() {
            self.board.phase(Phase::Transfer);
            self.context.ingest.open(std::sync::Arc::clone(&self.outflow));
            if let Some(why) = cancelled {
                self.source.tell(&ToSource::Cancel(why)).await?;
            }
            self.source.tell(&ToSource::Start).await?;
        }
        let mut count = tokio::time::interval(COUNT_EVERY);
        loop {
            if let Some(moved) = ends.both() {
                return Ok(moved);
            }
            tokio::select! {
                // What a settled source does to its stream does not matter any more.
                message = self.source.heard.next(), if ends.source.is_none() => {
                    ends.source = self.on_live_source(message?).await?;
                }
                // A VM that has arrived is not all: its source may still wait for the target's word, which was lost before.
                message = self.target.heard.next() => {
                    let arrived = self.on_live_target(message?).await?;
                    ends.target = arrived.or_else(|| ends.target.take());
                }
                reason = self.outflow.refused() => return Err(Refusal::new(RefusalKind::Protocol, reason)),
                _ = count.tick() => {
                    self.board.count(&self.outflow);
                    if ends.source.is_none() {
                        self.source.tell(&ToSource::Carried(self.outflow.carried())).await?;
                    }
                }
            }
        }
    }

    async fn on_live_source(&mut self, message: FromSource) -> Result<Option<Box<LiveOutcome>>, Refusal> {
        match message {
            FromSource::Say(word) => self.target.tell(&ToTarget::Say(word)).await?,
            FromSource::Live(state) => self.board.live(&state),
            FromSource::Moved(outcome) => return Ok(Some(outcome)),
            message @ FromSource::DiskDone { .. } => self.on_source(message)?,
            FromSource::Failed(refusal) => {
                // Its last word: whoever runs the VM now, it does not wait for the target any more.
                self.board.doubt(None);
                return Err(refusal);
            }
            other => return Err(out_of_turn("the source agent", &other)),
        }
        Ok(None)
    }

    /// Gives the arrival once it is said.
    async fn on_live_target(&mut self, message: FromTarget) -> Result<Option<Option<String>>, Refusal> {
        match message {
            FromTarget::Say(word) => self.source.tell(&ToSource::Say(word)).await?,
            FromTarget::Committed { hook, .. } => return Ok(Some(hook)),
            message => self.on_target(message).await?,
        }
        Ok(None)
    }
}

/// How a cancel of a running VM's move ended.
pub enum Cancelled {
    /// The VM runs on at the source.
    RunsOn,
    /// Too late: it runs at the target, or only the target knows.
    HandedOver,
}

/// Has the source agent bring its VM back.
pub async fn cancel(mut source: Source, why: &Refusal) -> Result<Cancelled, Refusal> {
    if source.moved.is_some() || source.doubt.is_some() {
        return Ok(Cancelled::HandedOver);
    }
    source.tell(&ToSource::Cancel(why.clone())).await?;
    let answer = async {
        loop {
            match source.heard.next().await? {
                FromSource::Failed(refusal) if refusal.kind == RefusalKind::Cancelled => {
                    return Ok(Cancelled::RunsOn);
                }
                FromSource::Failed(refusal) => return Err(refusal),
                FromSource::Moved(_) => return Ok(Cancelled::HandedOver),
                FromSource::Live(state) if state.stage == LiveStage::InDoubt => {
                    return Ok(Cancelled::HandedOver);
                }
                // Words for a target that is not there, progress.
                _ => {}
            }
        }
    };
    let late = || {
        Refusal::new(
            RefusalKind::Lost,
            "the source agent did not say within 60 s that the VM runs on; see its log",
        )
    };
    tokio::time::timeout(CANCEL_TIME, answer)
        .await
        .unwrap_or_else(|_| Err(late()))
}
