//! The way of a running VM into this host: its QEMU is made ready, fed, and let run once it is this side's.
//!
//! Owns the session's one task: everything that happens goes through it, one after the other. Leaves the decision to `vm::handover`,
//! QEMU to `target_vm`, copies to `disk::apply`. Promises that `cont` is given only after every copy is closed here, and that the
//! copies take their names only after the VM runs.

mod at_handover;
mod machine;
mod resolve;
mod steps;

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use self::at_handover::HandoverHook;
use self::steps::Steps;
use super::ram_in::{self, RamState};
use super::record::Arriving;
use super::resolve::Resolved;
use super::target::{Arrived, LiveTarget};
use super::target_vm::TargetQemuVm;
use super::way_back;
use super::word::{ToSource, ToTarget};
use crate::disk::apply::Placed;
use crate::session::threads::on_thread;
use crate::session::{outcome, target_disks};
use crate::vm::handover::{
    DiskRound, Effect, Generation, Limits, Note, Reason, Record, Resolve, TargetEvent, TargetOwner,
    TargetState, TargetWatch, Word,
};
use crate::vm::journal::Journal;

pub(super) use self::machine::{Machine, check_template};

/// Between two looks at QEMU: while nothing is expected, and while the source's VM stands.
const LOOK: Duration = Duration::from_millis(500);
const LOOK_CLOSE: Duration = Duration::from_millis(5);
/// Between two repetitions of what may have been lost.
const REMIND: Duration = Duration::from_secs(1);
/// How long writers may take to let go of the copies.
const RELEASE: Duration = Duration::from_secs(30);

/// What happens to a session.
pub(super) enum Event {
    Attached(u32),
    Word(ToTarget),
    /// The operator's cancel.
    GiveUp,
    /// A copy could not be written.
    DiskFailed,
    /// The operator's word; `true`: he knows what it risks.
    Operator(Resolve, bool, oneshot::Sender<Resolved>),
}

/// One session's task.
struct Arrive {
    s: Arc<LiveTarget>,
    owner: TargetOwner,
    journal: Option<Journal>,
    qemu: TargetQemuVm,
    placed: Vec<Placed>,
    limits: Limits,
    watch: TargetWatch,
    /// Why the target's QEMU did not start.
    unfit: Option<String>,
    notes: Vec<String>,
    cancelled: bool,
    steps: Steps,
    /// The generation whose stream was seen to end last.
    ended: Option<Generation>,
    /// The hook of this generation, from when the source's VM stands.
    at_handover: Option<HandoverHook>,
    /// The hook on failure of an earlier one, while it may run.
    undoing: Option<tokio::task::JoinHandle<()>>,
}

/// Serves a session until its VM has arrived and been given its names, or was given up by the operator.
pub(super) async fn run(session: Arc<LiveTarget>, machine: Machine, events: mpsc::Receiver<Event>) {
    let Machine {
        owner,
        journal,
        effects,
    } = machine;
    let watch = TargetWatch::new(&owner, Instant::now());
    let mut arrive = Arrive {
        qemu: TargetQemuVm::new(&session),
        s: session,
        owner,
        journal,
        placed: Vec::new(),
        limits: Limits::default(),
        watch,
        unfit: None,
        notes: Vec::new(),
        cancelled: false,
        steps: Steps::default(),
        ended: None,
        at_handover: None,
        undoing: None,
    };
    arrive.perform(effects).await;
    arrive.look().await;
    arrive.show();
    arrive.serve(events).await;
}

/// Whether the machine knows what becomes of its VM, or at least that nothing is known yet.
pub(super) fn is_decided(session: &LiveTarget) -> bool {
    session.owner.borrow().is_some()
}

/// Whether nothing is left of the VM here but its copies.
pub(super) fn is_given_up(session: &LiveTarget) -> bool {
    matches!(
        *session.owner.borrow(),
        Some(TargetState::Fresh | TargetState::Aborted { .. })
    )
}

impl Arrive {
    async fn serve(&mut self, mut events: mpsc::Receiver<Event>) {
        let mut last_round = self.s.last_round.subscribe();
        let mut feeds = self.s.ram.subscribe();
        let mut reminded = Instant::now();
        loop {
            // What a reopened session found may be nothing: it would hold the journal for ever.
            if self.s.closed && is_given_up(&self.s) {
                return self.end_closed().await;
            }
            let feed = feeds.borrow_and_update().clone();
            let mut ram = feed.as_ref().map(|feed| feed.state());
            let generation = feed.as_ref().map(|feed| feed.generation);
            let again = (self.ended == generation).then_some(LOOK_CLOSE);
            let close = self.owner.has_stream() || self.owner.commit().is_some();
            let look = if close { LOOK_CLOSE } else { LOOK };
            tokio::select! {
                event = events.recv() => match event {
                    Some(event) => self.on_event(event).await,
                    None => return,
                },
                _ = last_round.changed() => {
                    let durable = {
                        let last = last_round.borrow_and_update();
                        DiskRound { round: last.of.1.0, batches: last.batches.len() as u32 }
                    };
                    self.on(TargetEvent::DisksDurable(durable)).await;
                }
                state = ram_in::ended(ram.as_mut(), again) => {
                    self.ended = generation;
                    self.on_stream(state).await;
                }
                _ = feeds.changed() => {}
                () = tokio::time::sleep(look) => self.look().await,
            }
            if reminded.elapsed() >= REMIND && !self.owner.is_settled() {
                reminded = Instant::now();
                self.on(TargetEvent::Remind).await;
            }
            self.watch().await;
            self.undo_handover_hook();
            self.show();
            if self.owner.owns() && self.s.arrived.borrow().is_none() && self.is_started() {
                self.arrive().await;
            }
            if self.cancelled && self.finish_cancel().await {
                return;
            }
        }
    }

    /// Lets others see the state.
    fn show(&self) {
        self.s.owner.send_replace(Some(*self.owner.state()));
    }

    fn is_started(&self) -> bool {
        matches!(self.owner.state(), TargetState::Running { started: true, .. })
    }

    async fn on_event(&mut self, event: Event) {
        match event {
            Event::Attached(attempt) => {
                tracing::debug!(job = %self.s.job, attempt, "the VM's source is attached")
            }
            Event::Word(ToTarget::Prepare { generation, vm }) => {
                self.qemu.set_vm(*vm);
                self.prepare(generation).await;
            }
            Event::Word(ToTarget::StreamEnd { generation, stream }) => {
                let feed = self.s.ram.borrow().clone();
                if let Some(feed) = feed.filter(|feed| feed.generation == generation) {
                    feed.set_end(stream).await;
                }
                self.start_handover_hook(generation);
            }
            Event::Word(ToTarget::Handover(word)) => self.hear(word).await,
            Event::Word(ToTarget::Probe(_)) => {} // Answered where it is heard.
            Event::GiveUp => {
                self.cancelled = true;
                self.on(TargetEvent::Stop(Reason::Cancelled)).await;
            }
            Event::Operator(resolve, sure, answer) => {
                let said = self.resolve(resolve, sure).await;
                // Who asked may have gone: the journal says what was decided.
                let _ = answer.send(said);
            }
            Event::DiskFailed => self.on(TargetEvent::Stop(Reason::DiskFailed)).await,
        }
    }

    async fn prepare(&mut self, generation: Generation) {
        if generation > self.owner.generation() {
            self.compact().await;
            self.unfit = None;
            self.notes.clear();
            self.on(TargetEvent::Prepare(generation)).await;
        }
        let upto = self.owner.generation();
        let answer = match (*self.owner.state(), self.unfit.clone()) {
            (TargetState::Aborted { reason }, None) => ToSource::GivenUp {
                generation,
                upto,
                reason,
            },
            _ if generation != upto => return,
            (TargetState::Waiting, None) => ToSource::Prepared {
                generation,
                notes: self.notes.clone(),
            },
            (_, why) => ToSource::Unfit {
                generation,
                why: why.unwrap_or_else(|| self.owner.words().to_owned()),
            },
        };
        self.s.tell(&answer).await;
    }

    async fn on_stream(&mut self, state: RamState) {
        match (state.stream, state.failed) {
            (Some(stream), _) if !self.owner.has_stream() => {
                self.on(TargetEvent::StreamWritten(stream)).await
            }
            (None, Some(why)) => {
                // QEMU's own words say more than a broken pipe.
                self.look().await;
                self.explain(why).await;
                self.on(TargetEvent::Stop(Reason::LoadFailed)).await;
            }
            _ => {}
        }
    }

    async fn look(&mut self) {
        if matches!(
            self.owner.state(),
            TargetState::Waiting | TargetState::Running { started: false, .. }
        ) {
            self.perform(vec![Effect::Look]).await;
        }
    }

    /// Tells the source why a VM that may still stay there will not be kept here.
    async fn explain(&self, why: String) {
        if *self.owner.state() == TargetState::Waiting {
            let generation = self.owner.generation();
            self.s.tell(&ToSource::Why { generation, why }).await;
        }
    }

    /// What goes on too long becomes an event.
    async fn watch(&mut self) {
        let overdue = self.watch.overdue(&self.owner, Instant::now(), &self.limits);
        if let Some(overdue) = overdue {
            tracing::warn!(job = %self.s.job, "{overdue}");
            self.explain(overdue.to_string()).await;
            self.on(overdue.event).await;
        }
    }

    async fn on(&mut self, event: TargetEvent) {
        self.steps.event(&event);
        let effects = self.owner.on(event);
        // What the effects take counts.
        self.watch.note(&self.owner, Instant::now());
        self.perform(effects).await;
    }

    /// Does what the machine wants, in order, and what it wants then.
    async fn perform(&mut self, effects: Vec<Effect>) {
        let mut lists = vec![effects.into_iter()];
        while let Some(list) = lists.last_mut() {
            let Some(effect) = list.next() else {
                lists.pop();
                continue;
            };
            match self.act(effect).await {
                Ok(None) => self.steps.done(&effect),
                Ok(Some(event)) => {
                    self.steps.event(&event);
                    lists.push(self.owner.on(event).into_iter());
                }
                Err(why) => {
                    tracing::warn!(job = %self.s.job, ?effect, "a step of the handover failed: {why}");
                    self.unfit = Some(why);
                    lists.clear();
                    lists.push(self.owner.on(TargetEvent::Failed(effect)).into_iter());
                }
            }
        }
    }

    async fn act(&mut self, effect: Effect) -> Result<Option<TargetEvent>, String> {
        match effect {
            Effect::Journal(record) => self.append(record).await?,
            Effect::Send(word @ Word::Ack { .. }) => {
                self.s.tell(&ToSource::Steps(self.steps.taken())).await;
                self.s.tell(&ToSource::Handover(word)).await;
            }
            Effect::Send(word) => self.s.tell(&ToSource::Handover(word)).await,
            Effect::Report(note) => self.report(note),
            Effect::Look => {
                let found = self.qemu.look().await;
                if let Some(why) = self.qemu.take_why() {
                    self.explain(why).await;
                }
                return Ok(found.map(TargetEvent::Qemu));
            }
            Effect::StartIncoming => {
                let paths = self.link().await?;
                let generation = self.owner.generation();
                self.notes = self.qemu.start(&paths, generation).await?;
            }
            Effect::KillIncoming => self.qemu.kill().await,
            Effect::Cont => {
                self.place().await?;
                self.qemu.run().await?;
            }
            Effect::BootFromDisks => {
                self.place().await?;
                tracing::error!(job = %self.s.job, "start the VM from its disks on this host: {:?}", self.qemu.paths());
            }
            _ => return Err("an effect of the source".to_owned()),
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

    async fn append(&mut self, record: Record) -> Result<(), String> {
        let mut journal = self.journal.take().ok_or("the journal is in use")?;
        let appended = on_thread("journal", move || {
            let appended = journal.append(record);
            (journal, appended)
        });
        let (journal, appended) = appended.await.map_err(|error| error.to_string())?;
        self.journal = Some(journal);
        appended.map_err(|error| error.to_string())
    }

    fn report(&self, note: Note) {
        tracing::info!(job = %self.s.job, "{note}");
    }

    /// Lets the final names lead to the copies, so that QEMU can open them.
    async fn link(&self) -> Result<Vec<std::path::PathBuf>, String> {
        let (job, disks) = (self.s.job, self.s.open.disks.clone());
        let agent = Arc::clone(&self.s.agent);
        let linked = on_thread("link", move || target_disks::link(job, &disks, &agent.settings));
        linked
            .await
            .map_err(|error| error.to_string())?
            .map_err(|refusal| refusal.text)
    }

    /// Closes every copy, so that QEMU may lock and write the images.
    async fn place(&mut self) -> Result<(), String> {
        if self.s.closed || !self.placed.is_empty() || self.s.open.disks.is_empty() {
            return Ok(());
        }
        let targets = self.take_targets().await?;
        let placed = on_thread("place", move || {
            targets
                .into_iter()
                .map(crate::disk::apply::Target::place)
                .collect::<Result<Vec<_>, _>>()
        });
        let placed = placed.await.map_err(|error| error.to_string())?;
        self.placed = placed.map_err(|error| outcome::target(&error).text)?;
        Ok(())
    }

    /// The copies, from the writers that may still have them.
    async fn take_targets(&self) -> Result<Vec<crate::disk::apply::Target>, String> {
        let mut released = self.s.released.subscribe();
        self.s.wanted.send_replace(true);
        let waited = tokio::time::timeout(RELEASE, async {
            loop {
                let taken = self
                    .s
                    .targets
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .take();
                if let Some(targets) = taken.filter(|targets| !targets.is_empty()) {
                    return Ok(targets);
                }
                released
                    .changed()
                    .await
                    .map_err(|_| "the session ended".to_owned())?;
            }
        });
        let taken = waited
            .await
            .unwrap_or_else(|_| Err("the copies were not let go".to_owned()));
        self.s.wanted.send_replace(false);
        taken
    }

    /// The VM runs: its disks take their names, the record is written, the hook called.
    async fn arrive(&mut self) {
        let mut placed = std::mem::take(&mut self.placed);
        let (agent, open) = (Arc::clone(&self.s.agent), self.s.open.clone());
        let named = on_thread("promote", move || {
            let named = target_disks::promote_live(&open, &mut placed, &agent.settings);
            if named.is_ok() {
                way_back::used_up(open.job, &agent.settings.paths.state);
            }
            (named, placed)
        });
        let paths = match named.await {
            Ok((Ok(paths), _)) => paths,
            Ok((Err(refusal), placed)) => {
                self.placed = placed;
                tracing::error!(job = %self.s.job, "the VM runs, but its disks have no names yet: {refusal}; it is tried again");
                return tokio::time::sleep(REMIND).await;
            }
            Err(error) => {
                return tracing::error!(job = %self.s.job, "the VM runs, but its disks have no names: {error}");
            }
        };
        let job = self.s.job;
        let hook = self.s.hook_after(&paths).await;
        let (agent, noted, why) = (Arc::clone(&self.s.agent), paths.clone(), hook.clone());
        let noted = on_thread("arrival", move || {
            target_disks::note_told(job, &noted, why, &agent.settings)
        });
        if let Ok(Err(refusal)) = noted.await {
            tracing::error!(job = %job, "the hook may run again: {refusal}");
        }
        self.qemu.release();
        self.s.arrived.send_replace(Some(Arrived { paths, hook }));
        tracing::info!(job = %job, "the VM has arrived");
    }

    /// The operator gave the job up: the copies are removed. `true` once nothing is left.
    async fn finish_cancel(&mut self) -> bool {
        if self.owner.owns() {
            self.cancelled = false;
            return false;
        }
        self.qemu.kill().await;
        let placed = std::mem::take(&mut self.placed);
        let targets = if placed.is_empty() {
            self.take_targets().await.unwrap_or_default()
        } else {
            Vec::new()
        };
        let given = way_back::give_back(&self.s.agent, self.s.job, targets, placed).await;
        if let Err(why) = given {
            tracing::warn!(job = %self.s.job, "a partial copy is left: {why}");
        }
        let (agent, job) = (Arc::clone(&self.s.agent), self.s.job);
        let _ = on_thread("record", move || {
            Arriving::remove(&agent.settings.paths.state, job)
        })
        .await;
        self.s.hook_failure("the job was cancelled").await;
        self.s.over.send_replace(true);
        true
    }
}
