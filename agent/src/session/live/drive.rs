//! The way of a running VM out of this host, from round 0 to the target's word that it runs.
//!
//! Owns the order of the steps and what is remembered between them. Every step that needs the link ends with `Stop::Detached` where it
//! is lost, and is taken up again on the next one. Leaves who may run the VM to `source_vm`, the decision when to go on to
//! `vm::converge`, reading to `copy`. Promises that whatever ends the job before the handover leaves the VM running here, without
//! anything of ours in its QEMU.

mod attach;
mod begin;
mod foretell;
mod leave;
mod put_off;
mod round;
mod stand;
mod switch;
mod way_back;

use std::sync::Arc;
use std::time::{Duration, Instant};

use longhaul_common::wire::session::{
    FromSource, LiveOutcome, LiveStage, LiveState, Refusal, RefusalKind, ShadowId,
};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use self::foretell::Foretold;
use super::clock::RunClock;
use super::copy;
use super::pace::Pace;
use super::resolve::Told;
use super::source::{End, LiveSource};
use super::source_vm::SourceVm;
use super::uplink::{Detached, Uplink};
use super::word::ToTarget;
use crate::vm::converge::{Converge, Decision, Policy, Verdict};
use crate::vm::handover::Reason;
use crate::vm::qmp::{Event, Events, Heard, MigrationStatus};
use crate::vm::rounds::{Rounds, RoundsError};

/// Between two looks at the VM.
const LOOK: Duration = Duration::from_millis(100);
/// How long the target may take to have a QEMU ready.
const PREPARE: Duration = Duration::from_secs(60);
/// Between two words that are said again.
const SAY_AGAIN: Duration = Duration::from_secs(1);

/// What a session begins with.
pub(super) struct Parts {
    pub rounds: Rounds,
    pub words: mpsc::Receiver<Told>,
}

/// Why a step ended early.
pub(super) enum Stop {
    Detached,
    /// A handover that came to nothing; the VM runs on here.
    CalledOff(String),
    Refused(Refusal),
}

impl std::fmt::Display for Stop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Detached => Detached.fmt(f),
            Self::CalledOff(reason) => write!(f, "the handover was called off: {reason}"),
            Self::Refused(refusal) => refusal.fmt(f),
        }
    }
}

impl From<Detached> for Stop {
    fn from(_: Detached) -> Self {
        Self::Detached
    }
}

impl From<Refusal> for Stop {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<RoundsError> for Stop {
    fn from(error: RoundsError) -> Self {
        Self::Refused(Refusal::because(RefusalKind::Refused, &error))
    }
}

/// The migration of one VM.
pub(super) struct Drive {
    pub s: Arc<LiveSource>,
    pub rounds: Rounds,
    pub vm: SourceVm,
    converge: Converge,
    /// What the job allows, less what turned out to be impossible.
    policy: Policy,
    pub pace: Pace,
    began: Instant,
    /// The life of the target's session that holds a whole copy but for what the bitmaps say.
    base_for: Option<u64>,
    /// Number of the newest round on the wire: never used twice, whatever happens to rounds in QEMU.
    pub round: u32,
    pub outcome: LiveOutcome,
    /// What was decided last, so that it is noted once.
    last: Option<std::mem::Discriminant<Decision>>,
    counted: bool,
    /// What QEMU had still to send of memory when it was asked last.
    ram_left: u64,
    /// Since when the VM has run without a stop.
    clock: RunClock,
    /// Of each disk: the shadow that the target's copy began with, where everything that was written since counts to the rounds.
    taken_over: Vec<Option<ShadowId>>,
    /// The hook of this handover was begun.
    pub at_handover: bool,
    foretold: Foretold,
    /// A look at what is free, while round 0 goes on.
    looking: Option<JoinHandle<()>>,
    /// When what round 0 left out was looked at again.
    looked: Option<Instant>,
    /// Since when the VM stands, where QEMU stopped it in the midst of a round that is worth finishing.
    stands: Option<Instant>,
    /// What QEMU says unasked.
    events: Events,
    /// The number of the last probe of the way, and when it left.
    probed: Option<(u64, Instant)>,
    /// What the target was asked ahead of the time to make ready.
    ahead: Option<ToTarget>,
    /// How often in a row the target gave up what RAM flowed to, and when last.
    given_up: (u32, Instant),
}

/// Moves the VM.
pub(super) async fn run(session: &Arc<LiveSource>, parts: Parts) -> End {
    let vm = match SourceVm::open(session, parts.words).await {
        Ok(vm) => vm,
        Err(refusal) => {
            let _ = parts.rounds.remove().await;
            return Err(refusal);
        }
    };
    let disks = session.disks.len();
    let mut drive = Drive {
        s: Arc::clone(session),
        rounds: parts.rounds,
        vm,
        converge: Converge::new(),
        policy: super::pace::policy(&session.vm.policy),
        pace: Pace::new(disks),
        began: Instant::now(),
        base_for: None,
        round: 0,
        outcome: blank(disks),
        last: None,
        counted: false,
        ram_left: 0,
        clock: RunClock::stopped(),
        taken_over: vec![None; disks],
        at_handover: false,
        foretold: Foretold::begin(session),
        looking: None,
        looked: None,
        stands: None,
        events: session.qmp.events(),
        probed: None,
        ahead: None,
        given_up: (0, Instant::now()),
    };
    let mut heard = session.heard.subscribe();
    // A freeze goes on to its thaw by itself.
    tokio::select! {
        () = drive.begin() => {}
        _ = heard.wait_for(|heard| heard.cancel.is_some()) => {}
    }
    let end = drive.move_vm().await;
    drive.leave(end).await
}

/// Settles what a former life of this agent left. `true`: the session stays, for the handover is in doubt (a task waits for the answer), was
/// made, or nobody can say.
pub(super) async fn settle(session: &Arc<LiveSource>, words: mpsc::Receiver<Told>) -> bool {
    let mut vm = match SourceVm::open(session, words).await {
        Ok(vm) => vm,
        Err(refusal) => {
            // Who may run the VM is not known: nothing is touched, and whoever asks hears why.
            tracing::error!(job = %session.job, "{refusal}");
            session.end(Err(refusal));
            return true;
        }
    };
    if !vm.settle().await {
        return false;
    }
    let session = Arc::clone(session);
    tokio::spawn(async move {
        let end = match vm.await_answer().await {
            Ok(outcome) => {
                // How the images were left is not known: this agent was away.
                session.keep_way_back(outcome.generation, &[]).await;
                Ok(session.moved(outcome).await)
            }
            Err(refusal) => {
                let refusal = session.stayed(refusal).await;
                session.forget().await;
                Err(refusal)
            }
        };
        session.end(end);
    });
    true
}

/// An outcome of which nothing is known yet.
pub(super) fn blank(disks: usize) -> LiveOutcome {
    LiveOutcome {
        rounds: 0,
        generation: 0,
        predicted_blackout_ms: 0,
        blackout_ms: 0,
        stream_bytes: 0,
        stream_digest: longhaul_common::digest::Digest([0; 32]),
        steps_ms: Vec::new(),
        decisions: Vec::new(),
        notes: Vec::new(),
        dirty_bytes: vec![0; disks],
        parts: Vec::new(),
        skipped_bytes: Vec::new(),
    }
}

impl Drive {
    async fn move_vm(&mut self) -> Result<(), Refusal> {
        if self.s.heard.borrow().cancel.is_none() {
            self.s.hook_before().await?;
        }
        loop {
            match self.step().await {
                Ok(()) => return Ok(()),
                Err(Stop::Refused(refusal)) => return Err(refusal),
                // After a handover that was called off the target needs another QEMU; the copy of its disks stays good.
                Err(stop) => {
                    // The VM runs on here for longer: what was done for its leaving is undone.
                    if std::mem::take(&mut self.at_handover) {
                        self.vm.hook_ended().await;
                        let problem = self.s.hook_failure(&stop.to_string()).await;
                        self.outcome.notes.extend(problem);
                    }
                    self.note(&format!("{stop}; the VM runs on here"));
                    // Nothing is gained by a slow guest while nothing moves.
                    self.vm.undo_slowing().await;
                }
            }
        }
    }

    /// From a link to the target on, as far as it lasts. `Ok`: the VM runs there.
    async fn step(&mut self) -> Result<(), Stop> {
        let (uplink, session) = self.attached().await?;
        if self.base_for != Some(session) {
            if self.vm.is_migrating() {
                self.vm.give_up(Reason::LinkLost).await?;
            }
            self.base(&uplink).await?;
            self.base_for = Some(session);
        }
        self.follow(&uplink).await
    }

    fn check_cancel(&self) -> Result<(), Stop> {
        let cancel = self.s.heard.borrow().cancel.clone();
        cancel.map_or(Ok(()), |refusal| {
            let kind = RefusalKind::Cancelled;
            Err(Stop::Refused(Refusal { kind, ..refusal }))
        })
    }

    /// Round 0: everything that the target does not hold yet.
    async fn base(&mut self, uplink: &Arc<Uplink>) -> Result<(), Stop> {
        self.state(LiveStage::Copy, 0, 0, String::new()).await;
        // The VM may have been changed since a former attempt asked.
        self.ahead = None;
        // Before anything else is on the way.
        self.probe().await;
        let mut have = None;
        self.s.heard.send_if_modified(|heard| {
            have = heard.have.take_if(|(attempt, _)| *attempt == uplink.attempt);
            false
        });
        // Told once for each attempt: a pass that fails without its link would be a fault of QEMU's, and ends the job.
        let Some((_, have)) = have else {
            return Err(Stop::Detached);
        };
        if self.rounds.round() > 0 {
            self.rounds.give_back().await?;
        }
        if self.rounds.exports().is_empty() {
            self.rounds.open_base().await?;
            self.look_anew().await?;
        }
        let have = self.begin_with_shadows(have).await;
        let reach = self.reach().await?;
        let session = Arc::clone(&self.s);
        let mut copying = Box::pin(copy::base(&session, uplink, reach, have));
        let counts = loop {
            tokio::select! {
                counts = &mut copying => break counts?,
                () = tokio::time::sleep(LOOK) => {
                    self.pace.sample(self.began.elapsed(), uplink, 0, true);
                    self.look_beside();
                    self.probe().await;
                    self.foretell(uplink).await?;
                    self.prepare_ahead(uplink).await;
                }
            }
        };
        drop(copying);
        self.looked_beside().await;
        uplink.settle().await?;
        if !self.counted {
            for (disk, (digest, counts)) in (0..).map(longhaul_common::ids::DiskIndex).zip(counts) {
                self.note_kept(disk, counts.kept);
                uplink.say(FromSource::DiskDone { disk, digest, counts }).await;
            }
            self.counted = true;
            self.outcome
                .steps_ms
                .push(("round 0".to_owned(), self.began.elapsed().as_millis() as u64));
        }
        self.put_off(uplink).await?;
        self.rounds.finish().await?;
        Ok(())
    }

    /// Rounds, RAM and the handover, as `vm::converge` says. `Ok`: the VM runs at the target.
    async fn follow(&mut self, uplink: &Arc<Uplink>) -> Result<(), Stop> {
        loop {
            self.check_cancel()?;
            if uplink.is_gone() {
                return Err(Stop::Detached);
            }
            self.probe().await;
            if let Some(over) = self.vm.watch().await? {
                self.begin_anew(&over)?;
            }
            if self.waits_for_thaw().await {
                continue;
            }
            self.stands = self.stands.filter(|_| self.vm.is_migrating());
            if self.stands.is_some() || self.vm.is_migrating() && self.vm.stopped_unasked().await? {
                if self.unasked(uplink).await? {
                    return Ok(());
                }
                continue;
            }
            self.foretell(uplink).await?;
            let verdict = self.decide(uplink).await?;
            match verdict.decision {
                Decision::Round => self.dirty_round(uplink).await?,
                Decision::StartRam => self.start_ram(uplink).await?,
                Decision::Continue => self.rest().await,
                // The tail is taken whole while the VM stands: it has to fit into the memory for it.
                Decision::HandOver { .. } if self.ram_left > self.tail_max() => {
                    self.rest().await;
                }
                Decision::HandOver { predicted } => {
                    self.outcome.predicted_blackout_ms = predicted.as_millis() as u64;
                    if self.vm.switch_over().await? {
                        return self.hand_over(uplink).await;
                    }
                }
                Decision::SlowGuest { cpu, io } => {
                    if let Some(words) = self.vm.slow(cpu, io).await? {
                        self.note(&words);
                        self.policy.io_throttle = false;
                    }
                    self.rest().await;
                }
                Decision::HoldInSync => {
                    if self.vm.is_migrating() {
                        self.vm.give_up(Reason::NoConvergence).await?;
                    }
                    self.vm.undo_slowing().await;
                    self.foretold.measure_ram_again(&self.s);
                    tokio::time::sleep(SAY_AGAIN).await;
                }
                Decision::GiveUp => {
                    let text = format!("the VM was not moved: {}", verdict.why);
                    return Err(Refusal::new(RefusalKind::Refused, text).into());
                }
            }
        }
    }

    /// Measures the way to the target and back, now and then.
    async fn probe(&mut self) {
        if self.probed.is_none_or(|(_, at)| at.elapsed() >= SAY_AGAIN) {
            let number = self.probed.map_or(0, |(number, _)| number + 1);
            self.probed = Some((number, Instant::now()));
            self.s.probe(number).await;
        }
    }

    /// Until the next look; not that long once QEMU stops the VM, for then everybody waits.
    async fn rest(&mut self) {
        let until = tokio::time::sleep(LOOK);
        tokio::pin!(until);
        loop {
            tokio::select! {
                heard = self.events.next() => match heard {
                    Heard::Event(Event::Stop | Event::Migration(MigrationStatus::PreSwitchover)) => return,
                    Heard::Event(_) | Heard::Missed => {}
                    Heard::Lost => return until.await,
                },
                () = &mut until => return,
            }
        }
    }

    /// How much memory may be left for the tail, in bytes. What is on its way already and what changes until the stop need room, too.
    fn tail_max(&self) -> u64 {
        self.s.agent.settings.vm.ram_memory.0 / 2
    }

    async fn decide(&mut self, uplink: &Uplink) -> Result<Verdict, Stop> {
        let dirty = self.rounds.dirty_bytes().await?;
        let stats = self.vm.stats().await?;
        let rtt = self.s.heard.borrow().rtt();
        let now = self.began.elapsed();
        let ram = self.vm.ram_view();
        if let Some(out) = self.vm.ram_out() {
            let ram = stats.as_ref().and_then(|stats| stats.ram.as_ref());
            let (left, written) =
                ram.map_or((u64::MAX, 0.0), |ram| (ram.remaining, ram.dirtied_per_second()));
            out.set_window(self.pace.window(now, rtt, left, written));
        }
        let mut view = self
            .pace
            .view(now, &dirty, stats.as_ref(), ram.as_ref(), uplink, rtt);
        view.io_limit = self.vm.io_limit();
        // Only what ends a hold early: a measurement does not see how well changed pages reduce, a try does.
        let holds = self.last == Some(std::mem::discriminant(&Decision::HoldInSync));
        view.ram_dirty_rate = self.foretold.ram_rate().filter(|_| holds);
        let verdict = self.converge.decide(now, &view, &self.policy);
        let kind = std::mem::discriminant(&verdict.decision);
        if self.last.replace(kind) != Some(kind) {
            tracing::info!(job = %self.s.job, decision = ?verdict.decision, "{}", verdict.why);
            self.note(&verdict.why);
        }
        let left = view.disks.iter().map(|disk| disk.dirty).sum();
        let ram_left = view.ram.as_ref().map_or(0, |ram| ram.remaining);
        self.ram_left = ram_left;
        let stage = if view.ram.is_some() {
            LiveStage::Ram
        } else {
            LiveStage::Rounds
        };
        self.state(stage, left, ram_left, verdict.why.clone()).await;
        Ok(verdict)
    }

    pub(super) fn note(&mut self, words: &str) {
        if self.outcome.decisions.len() < longhaul_common::wire::words::LIST_MAX {
            let at = self.began.elapsed().as_secs_f64();
            self.outcome.decisions.push(format!("{at:.1} s: {words}"));
        }
    }

    fn step_done(&mut self, name: &str, since: Instant) {
        self.outcome
            .steps_ms
            .push((name.to_owned(), since.elapsed().as_millis() as u64));
    }

    async fn state(&self, stage: LiveStage, disk_left: u64, ram_left: u64, decision: String) {
        let uplink = self.s.uplink.borrow().clone();
        if let Some(uplink) = uplink {
            let round = self.round;
            let state = LiveState {
                stage,
                round,
                disk_left,
                ram_left,
                decision,
            };
            uplink.say(FromSource::Live(state)).await;
        }
    }
}
