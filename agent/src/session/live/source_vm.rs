//! The source's QEMU during a job: what `vm::handover` decides is carried out here.
//!
//! Owns the source's machine, its journal, QEMU's migration and the old copy's images. Leaves disks and rounds to `drive`. Promises the
//! order that `vm::handover` asks for: effects one after the other, a record durable before what relies on it, QEMU asked anew
//! before anything is said of it.

mod commit;
mod held;
mod resolve;

use std::fmt;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use longhaul_common::wire::session::{FromSource, LiveStage, LiveState, Refusal, RefusalKind};
use serde_json::json;
use tokio::sync::mpsc;

use super::drive::Stop;
use super::ram_out::{RamOut, RamView};
use super::resolve::Told;
use super::source::LiveSource;
use super::word::{ToTarget, VmWords};
use crate::session::threads::on_thread;
use crate::vm::facts;
use crate::vm::handover::{
    Effect, Generation, Limits, Note, Reason, SourceEvent, SourceOwner, SourceQemu, SourceState,
};
use crate::vm::io_limit::SavedLimits;
use crate::vm::journal::{Journal, Role};
use crate::vm::media::Medium;
use crate::vm::outgoing::{self, MigrationStats, Outgoing, OutgoingOptions};
use crate::vm::qmp::MigrationStatus;

/// What QEMU believes to be sent and is not, in bytes: bounds the blackout it adds.
const SEND_BUFFER: usize = 64 << 10;
/// How long QEMU may take to stop the VM once it is told to.
const STOP_LIMIT: Duration = Duration::from_secs(5);
/// How long bringing the VM back may take.
const CANCEL_LIMIT: Duration = Duration::from_secs(10);
/// Between two looks at QEMU while the VM stands.
const LOOK: Duration = Duration::from_millis(5);
/// Between two repetitions of a word that was not answered.
const REMIND: Duration = Duration::from_secs(1);

/// Why a RAM stream is over before the VM stood.
pub(super) enum Over {
    /// The target gave it up.
    ByTarget(String),
    /// Something went on too long.
    Stalled(String),
}

impl fmt::Display for Over {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ByTarget(reason) => write!(f, "the target gave the VM up: {reason}"),
            Self::Stalled(words) => f.write_str(words),
        }
    }
}

/// The VM at its source.
pub(super) struct SourceVm {
    s: Arc<LiveSource>,
    owner: SourceOwner,
    journal: Option<Journal>,
    words: mpsc::Receiver<Told>,
    outgoing: Option<Outgoing>,
    ram: Option<Arc<RamOut>>,
    limits: Limits,
    slowed: bool,
    /// That of a handover which was called off, until it has ended.
    hook: Option<super::hooks::Running>,
    /// The drives' own limits while their writes are held down, and to how much.
    io: Option<(Vec<SavedLimits>, u64)>,
    /// Media that are out of their drives.
    out: Vec<Medium>,
}

impl SourceVm {
    /// Opens the journal; a former life's handover is settled first.
    pub(super) async fn open(
        session: &Arc<LiveSource>,
        words: mpsc::Receiver<Told>,
    ) -> Result<Self, Refusal> {
        let (state, job) = (session.agent.settings.paths.state.clone(), session.job);
        let opened = on_thread("journal", move || Journal::open(&state, job, Role::Source)).await;
        let refused = |error: &dyn std::error::Error| Refusal::because(RefusalKind::Refused, error);
        let journal = opened
            .map_err(|error| refused(&error))?
            .map_err(|error| refused(&error))?;
        let (owner, effects) = SourceOwner::restore(journal.records()).map_err(|error| refused(&error))?;
        let mut vm = Self {
            s: Arc::clone(session),
            owner,
            journal: Some(journal),
            words,
            outgoing: None,
            ram: None,
            limits: Limits {
                stalled: Duration::from_millis(session.vm.policy.hold_ms),
                ..Limits::default()
            },
            slowed: false,
            hook: None,
            io: None,
            out: Vec::new(),
        };
        vm.perform(effects).await;
        Ok(vm)
    }

    pub(super) fn is_migrating(&self) -> bool {
        matches!(
            self.owner.state(),
            SourceState::Iterating
                | SourceState::PreSwitchover
                | SourceState::Continuing { .. }
                | SourceState::Barring { .. }
        )
    }

    pub(super) fn next_generation(&self) -> Generation {
        Generation(self.owner.generation().0.saturating_add(1))
    }

    /// What the target's QEMU is compared with.
    pub(super) async fn words(&self) -> Result<VmWords, Refusal> {
        let gathered = facts::gather(&self.s.qmp, facts::HostCpu::read()).await;
        let facts = gathered.map_err(|error| Refusal::because(RefusalKind::Refused, &error))?;
        Ok(VmWords::of(facts, &self.s.eject))
    }

    /// After a crash: until QEMU is out of its migration. `true`: who runs the VM is for the target to say, or was said.
    pub(super) async fn settle(&mut self) -> bool {
        let limit = Instant::now() + CANCEL_LIMIT;
        // The target hears of it with the next attempt: nobody is linked before this is done.
        let decided = |vm: &Self| vm.owner.is_closed() || vm.is_in_doubt();
        while !decided(self) && Instant::now() < limit {
            self.look().await;
            tokio::time::sleep(LOOK).await;
        }
        let saved = self.s.record().saved.clone();
        if let Some(saved) = saved.filter(|_| !self.is_in_doubt())
            && let Err(error) = saved.put_back(&self.s.qmp).await
        {
            tracing::warn!(job = %self.s.job, "QEMU's migration settings are not as they were: {error}");
        }
        if !self.is_in_doubt() {
            self.undo_former_life().await;
        }
        matches!(
            self.owner.state(),
            SourceState::HandedOver { .. } | SourceState::Released { .. }
        )
    }

    fn is_in_doubt(&self) -> bool {
        matches!(self.owner.state(), SourceState::HandedOver { .. })
    }

    /// Starts QEMU's migration.
    pub(super) async fn begin(&mut self, generation: Generation) -> Result<(), Stop> {
        self.compact().await;
        self.on(SourceEvent::Begin(generation)).await;
        if self.is_migrating() {
            if let Some(outgoing) = &self.outgoing
                && let Err(error) = outgoing.wait_active(&self.s.qmp, CANCEL_LIMIT).await
            {
                tracing::warn!(job = %self.s.job, "RAM does not flow: {error}");
            }
            return Ok(());
        }
        let text = format!("QEMU does not migrate this VM: {}", self.owner.words());
        Err(Refusal::new(RefusalKind::Refused, text).into())
    }

    /// QEMU's figures while it migrates. A migration that failed is given up here.
    pub(super) async fn stats(&mut self) -> Result<Option<MigrationStats>, Stop> {
        if !self.is_migrating() {
            return Ok(None);
        }
        let stats = self.ask_stats().await?;
        if stats.status.is_settled() && stats.status != MigrationStatus::Completed {
            let why = stats.error.clone().unwrap_or_else(|| stats.status.to_string());
            tracing::warn!(job = %self.s.job, "QEMU gave the migration up: {why}");
            self.look().await;
            self.let_go().await;
            return Ok(None);
        }
        Ok(Some(stats))
    }

    async fn ask_stats(&self) -> Result<MigrationStats, Stop> {
        let stats = outgoing::stats(&self.s.qmp).await;
        stats.map_err(|error| Refusal::because(RefusalKind::Refused, &error).into())
    }

    pub(super) fn ram_out(&self) -> Option<&Arc<RamOut>> {
        self.ram.as_ref()
    }

    pub(super) fn ram_view(&self) -> Option<RamView> {
        self.ram.as_ref().map(|ram| ram.view())
    }

    /// What the target has said, and what goes on too long, become events; gives why this generation is over, where it is.
    pub(super) async fn watch(&mut self) -> Result<Option<Over>, Stop> {
        let migrated = self.is_migrating();
        while let Ok(told) = self.words.try_recv() {
            self.hear(told).await;
        }
        let over = match (*self.owner.state(), self.ram_view()) {
            (SourceState::Settling { reason } | SourceState::Kept { reason, .. }, _) if migrated => {
                Over::ByTarget(self.in_words(reason))
            }
            (_, Some(ram)) => match self.owner.overdue(ram.still, ram.still, &self.limits) {
                Some(overdue) => {
                    self.on(overdue.event).await;
                    Over::Stalled(overdue.to_string())
                }
                None => return Ok(None),
            },
            _ => return Ok(None),
        };
        self.end_generation().await?;
        Ok(Some(over))
    }

    /// A reason, and what the target said of it.
    fn in_words(&self, reason: Reason) -> String {
        match &self.s.heard.borrow().why {
            Some((of, why)) if *of == self.owner.generation() => format!("{reason} ({why})"),
            _ => reason.to_string(),
        }
    }

    /// Holds RAM back nearly whole, or lets it flow.
    pub(super) async fn crawl(&self, crawl: bool) -> Result<(), Stop> {
        let Some(outgoing) = &self.outgoing else {
            return Ok(());
        };
        let said = outgoing.crawl(&self.s.qmp, crawl).await;
        said.map_err(|error| Refusal::because(RefusalKind::Refused, &error).into())
    }

    /// Whether QEMU has stopped the VM by itself: nothing was left to send.
    pub(super) async fn stopped_unasked(&mut self) -> Result<bool, Stop> {
        let stats = self.ask_stats().await?;
        if stats.status != MigrationStatus::PreSwitchover {
            return Ok(false);
        }
        self.on(SourceEvent::Qemu(SourceQemu::PreSwitchover)).await;
        Ok(true)
    }

    /// Has QEMU stop the VM. `false` where it did not within the limit, and iterates on.
    pub(super) async fn switch_over(&mut self) -> Result<bool, Stop> {
        let Some(outgoing) = &self.outgoing else {
            return Ok(false);
        };
        let refused =
            |error: &dyn std::error::Error| Stop::from(Refusal::because(RefusalKind::Refused, error));
        outgoing
            .switch_over(&self.s.qmp)
            .await
            .map_err(|error| refused(&error))?;
        match outgoing.wait_pre_switchover(&self.s.qmp, STOP_LIMIT).await {
            Ok(()) => {
                self.on(SourceEvent::Qemu(SourceQemu::PreSwitchover)).await;
                Ok(true)
            }
            Err(error) => {
                tracing::warn!(job = %self.s.job, "the VM was not stopped: {error}");
                outgoing
                    .hold_back(&self.s.qmp)
                    .await
                    .map_err(|error| refused(&error))?;
                self.look().await;
                Ok(false)
            }
        }
    }

    /// Gives this generation up; the VM runs on here.
    pub(super) async fn give_up(&mut self, reason: Reason) -> Result<(), Stop> {
        self.on(SourceEvent::Stop(reason)).await;
        self.end_generation().await
    }

    /// Until QEMU is out of a migration that is given up.
    async fn end_generation(&mut self) -> Result<(), Stop> {
        let limit = Instant::now() + CANCEL_LIMIT;
        while matches!(self.owner.state(), SourceState::Settling { .. }) && Instant::now() < limit {
            tokio::time::sleep(LOOK).await;
            self.look().await;
        }
        self.let_go().await;
        match self.owner.state() {
            SourceState::Settling { .. } => {
                let text =
                    "QEMU does not end its migration; the VM may stand: look at it with `query-status`";
                Err(Refusal::new(RefusalKind::Refused, text).into())
            }
            _ => Ok(()),
        }
    }

    /// What belongs to a generation that is over.
    async fn let_go(&mut self) {
        if let Some(ram) = self.ram.take() {
            ram.close();
        }
        self.s.ram.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(outgoing) = self.outgoing.take()
            && let Err(error) = outgoing.saved().put_back(&self.s.qmp).await
        {
            tracing::warn!(job = %self.s.job, "QEMU's migration settings are not as they were: {error}");
        }
    }

    async fn look(&mut self) {
        self.perform(vec![Effect::Look]).await;
    }

    async fn on(&mut self, event: SourceEvent) {
        let effects = self.owner.on(event);
        self.perform(effects).await;
    }

    /// Does what the machine wants, in order, and what it wants then.
    async fn perform(&mut self, effects: Vec<Effect>) {
        self.carry_out(effects).await;
        self.s.owner.send_replace(Some(*self.owner.state()));
    }

    async fn carry_out(&mut self, effects: Vec<Effect>) {
        let mut lists = vec![effects.into_iter()];
        while let Some(list) = lists.last_mut() {
            let Some(effect) = list.next() else {
                lists.pop();
                continue;
            };
            match self.act(effect).await {
                Ok(None) => {}
                Ok(Some(event)) => {
                    let more = self.owner.on(event);
                    lists.push(more.into_iter());
                }
                Err(why) => {
                    tracing::warn!(job = %self.s.job, ?effect, "a step of the handover failed: {why}");
                    lists.clear();
                    let more = self.owner.on(SourceEvent::Failed(effect));
                    lists.push(more.into_iter());
                }
            }
        }
    }

    /// Carries one effect out. Gives what was learned.
    async fn act(&mut self, effect: Effect) -> Result<Option<SourceEvent>, String> {
        match effect {
            Effect::Journal(record) => self.append(record).await?,
            Effect::Send(word) => self.s.tell(&ToTarget::Handover(word)).await,
            Effect::Report(note) => self.report(note).await,
            Effect::Look => return Ok(Some(SourceEvent::Qemu(commit::qemu_state(&self.s.qmp).await))),
            Effect::Migrate => self.migrate().await?,
            Effect::MigrateContinue => {
                if let Some(ram) = &self.ram {
                    ram.begin_tail();
                }
                let outgoing = self.outgoing.as_ref().ok_or("nothing migrates")?;
                outgoing
                    .go_on(&self.s.qmp)
                    .await
                    .map_err(|error| error.to_string())?;
            }
            Effect::CloseStream => {
                if let Some(ram) = &self.ram {
                    ram.close();
                }
            }
            Effect::Cancel | Effect::Cont => {
                let saved = self.outgoing.as_ref().map(Outgoing::saved);
                let cancelled = outgoing::cancel(&self.s.qmp, saved, CANCEL_LIMIT).await;
                cancelled.map_err(|error| error.to_string())?;
            }
            Effect::MakeUnrunnable => self.s.old_copy.lock().await.bar().await?,
            Effect::MakeRunnable => self.s.old_copy.lock().await.free().await?,
            Effect::Quit => {
                // An answer that never comes is the wish fulfilled; `Look` says what is true.
                let _ = self.s.qmp.execute("quit", json!({})).await;
            }
            Effect::StartIncoming | Effect::KillIncoming => return Err("an effect of the target".to_owned()),
            Effect::BootFromDisks => {
                tracing::error!(job = %self.s.job, "the VM's QEMU is gone: start the VM from its disks on this host");
            }
        }
        Ok(None)
    }

    /// Shortens the journal to what matters: a job may try many times.
    async fn compact(&mut self) {
        let (Some(mut journal), snapshot) = (self.journal.take(), self.owner.snapshot()) else {
            return;
        };
        let rewritten = on_thread("journal", move || {
            let rewritten = journal.rewrite(&snapshot);
            (journal, rewritten)
        });
        if let Ok((journal, rewritten)) = rewritten.await {
            self.journal = Some(journal);
            if let Err(error) = rewritten {
                tracing::warn!(job = %self.s.job, "{error}");
            }
        }
    }

    async fn append(&mut self, record: crate::vm::handover::Record) -> Result<(), String> {
        let mut journal = self.journal.take().ok_or("the journal is in use")?;
        let appended = on_thread("journal", move || {
            let appended = journal.append(record);
            (journal, appended)
        });
        let (journal, appended) = appended.await.map_err(|error| error.to_string())?;
        self.journal = Some(journal);
        appended.map_err(|error| error.to_string())
    }

    async fn migrate(&mut self) -> Result<(), String> {
        let generation = self.owner.generation();
        let options = OutgoingOptions {
            send_buffer: SEND_BUFFER,
            may_throttle: self.s.vm.policy.auto_converge,
            ..OutgoingOptions::default()
        };
        let mut before = None;
        let started = Outgoing::start(&self.s.qmp, &options, |saved| {
            // A few hundred bytes, written down before QEMU is changed; a second thread takes over what this one does besides.
            before = Some(tokio::task::block_in_place(|| {
                let mut record = self.s.record();
                record.saved = Some(saved.clone());
                record.save(&self.s.agent.settings.paths.state, self.s.job)
            }));
        })
        .await;
        if let Some(Err(why)) = before {
            tracing::warn!(job = %self.s.job, "QEMU's settings would not be put back after a crash: {why}");
        }
        let (outgoing, socket) = started.map_err(|error| error.to_string())?;
        self.outgoing = Some(outgoing);
        let memory = self.s.agent.settings.vm.ram_memory.0;
        let ram = RamOut::start(generation, socket, memory, self.s.uplink.subscribe());
        let ram = ram.map_err(|error| error.to_string())?;
        *self.s.ram.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&ram));
        self.ram = Some(ram);
        Ok(())
    }

    async fn report(&self, note: Note) {
        tracing::info!(job = %self.s.job, "{note}");
        if note != Note::InDoubt {
            return;
        }
        let uplink = self.s.uplink.borrow().clone();
        if let Some(uplink) = uplink {
            let state = LiveState {
                stage: LiveStage::InDoubt,
                decision: note.to_string(),
                ..LiveState::default()
            };
            uplink.say(FromSource::Live(state)).await;
        }
    }
}
