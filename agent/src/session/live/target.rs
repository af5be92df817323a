//! A running VM at its target: one session for each job, over any number of wire attempts.
//!
//! Owns the session's life and attaching an attempt to it: what is there already, the writers, the RAM stream's inlet. Leaves who may run
//! the VM and its QEMU to `arrive`. Promises that images and a loaded QEMU survive the loss of links and gateways, and that the
//! arrival is said to every attempt that asks.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use longhaul_common::ids::{DiskIndex, JobId};
use longhaul_common::link::{RecvStream, SendStream};
use longhaul_common::wire::session::{
    FromTarget, Refusal, RefusalKind, ShadowId, TargetOpen, TargetVm, ToTarget,
};
use tokio::sync::{mpsc, watch};

use super::arrive::{self, Event};
use super::ram_in::RamIn;
use super::record::Arriving;
use super::trial;
use super::way_back;
use super::word::{self, ToSource, ToTarget as Word};
use crate::disk::apply::Target;
use crate::session::arrivals::Seat;
use crate::session::stream::{listen, speak};
use crate::session::target::tell_have;
use crate::session::threads::on_thread;
use crate::session::writers::{LastRound, Writers, Written};
use crate::session::{Agent, target_disks};
use crate::vm::handover::TargetState;

/// Messages to the gateway that may wait.
const OUTGOING: usize = 256;
/// Between two words on how far QEMU is.
const WRITTEN_EVERY: Duration = Duration::from_millis(5);
/// It is said again that often, changed or not.
const WRITTEN_AGAIN: Duration = Duration::from_millis(500);
/// How long a gateway may take to hear the end.
const LAST_WORD: Duration = Duration::from_secs(5);

/// What a copy holds already, and the shadow that some of it may be.
type Held = (crate::disk::apply::Have, Option<ShadowId>);

/// How the VM arrived.
#[derive(Clone, Debug)]
pub(super) struct Arrived {
    pub paths: Vec<PathBuf>,
    /// Why the hook failed, if it did.
    pub hook: Option<String>,
}

/// One job's session.
pub(crate) struct LiveTarget {
    pub(super) agent: Arc<Agent>,
    pub(super) job: JobId,
    pub(super) open: TargetOpen,
    pub(super) vm: TargetVm,
    /// Which life of this session it is.
    id: u64,
    /// No copy was opened in this life of the session: nothing here has one open, and nothing writes.
    pub(super) closed: bool,
    /// The copies while no writer has them.
    pub(super) targets: Mutex<Option<Vec<Target>>>,
    pub(super) last_round: watch::Sender<LastRound>,
    events: mpsc::Sender<Event>,
    /// The gateway of the current attempt.
    say: watch::Sender<Option<mpsc::Sender<FromTarget>>>,
    /// The stream of the current generation.
    pub(super) ram: watch::Sender<Option<Arc<RamIn>>>,
    /// The driver wants the copies: writers let go of them.
    pub(super) wanted: watch::Sender<bool>,
    /// Counts the times that writers have let go.
    pub(super) released: watch::Sender<u64>,
    pub(super) arrived: watch::Sender<Option<Arrived>>,
    /// The session has ended; another one is opened for the next attempt.
    pub(super) over: watch::Sender<bool>,
    /// The handover's state, once the machine has looked at its QEMU.
    pub(super) owner: watch::Sender<Option<TargetState>>,
}

/// Serves one wire attempt.
pub(crate) async fn run(
    agent: &Arc<Agent>,
    send: SendStream,
    recv: RecvStream,
    open: TargetOpen,
    vm: TargetVm,
) {
    tracing::info!(job = %open.job, attempt = %open.attempt, "a running VM is announced");
    let (say, outgoing) = mpsc::channel(OUTGOING);
    let speaker = tokio::spawn(speak(send, outgoing));
    let (hear, heard) = mpsc::channel(OUTGOING);
    let listener = tokio::spawn(listen(recv, hear));
    if let Err(refusal) = serve(agent, open, vm, &say, heard).await {
        tracing::warn!("the arriving VM's attempt ended: {refusal}");
        let _ = say.send(FromTarget::Failed(refusal)).await;
    }
    drop(say);
    listener.abort();
    let _ = tokio::time::timeout(LAST_WORD, speaker).await;
}

async fn serve(
    agent: &Arc<Agent>,
    open: TargetOpen,
    vm: TargetVm,
    say: &mpsc::Sender<FromTarget>,
    heard: mpsc::Receiver<ToTarget>,
) -> Result<(), Refusal> {
    if open.dry_run {
        arrive::check_template(agent, &open, &vm)?;
        let (with, asked) = (Arc::clone(agent), open.clone());
        let notes = on_thread("target-check", move || {
            target_disks::check(&asked, &with.settings)
        });
        let mut notes = notes
            .await
            .map_err(|error| Refusal::because(RefusalKind::Protocol, &error))??;
        notes.extend(trial::run(agent, &open, &vm).await?);
        let _ = say.send(FromTarget::Opened { notes }).await;
        return Ok(());
    }
    let limits = &agent.settings.limits;
    let room = agent.settings.vm.ram_memory.0;
    // Raw bytes and headers of a window of zero pages: a little more than the window itself.
    let room = room.saturating_mul(2);
    let attempt = open.attempt;
    let seat = agent
        .arrivals
        .enter_with_ram(open.job, attempt, limits.job_memory.0, Some(room))
        .await?;
    let slot = agent.live_targets.slot(open.job);
    let mut slot = slot.lock().await;
    let known = slot
        .as_ref()
        .filter(|session| !*session.over.borrow())
        .map(Arc::clone);
    let (session, have) = match known {
        Some(session) => (session, Vec::new()),
        None => {
            let (session, have) = LiveTarget::open(agent, open, vm).await?;
            *slot = Some(Arc::clone(&session));
            (session, have)
        }
    };
    drop(slot);
    session.attach(seat, have, say, heard, attempt.0).await
}

impl LiveTarget {
    async fn open(
        agent: &Arc<Agent>,
        open: TargetOpen,
        vm: TargetVm,
    ) -> Result<(Arc<Self>, Vec<Held>), Refusal> {
        arrive::check_template(agent, &open, &vm)?;
        let machine = arrive::Machine::open(agent, open.job).await?;
        let (with, record) = (
            Arc::clone(agent),
            Arriving {
                open: open.clone(),
                vm: vm.clone(),
            },
        );
        let saved = on_thread("record", move || {
            record.save(&with.settings.paths.state, record.open.job)
        });
        let saved = saved
            .await
            .map_err(|error| Refusal::because(RefusalKind::Protocol, &error))?;
        saved.map_err(|text| Refusal::new(RefusalKind::Refused, text))?;
        let arrived = arrival(agent, open.job)?;
        let (with, asked) = (Arc::clone(agent), open.clone());
        // A VM that belongs here already is not written any more.
        let disks = if arrived.is_some() || machine.owns() {
            Vec::new()
        } else {
            trial::run(agent, &open, &vm).await?;
            super::hooks::before_at_target(agent, &open, &vm).await?;
            let left = way_back::release(agent, &open).await;
            let opened = on_thread("target-open", move || {
                way_back::open_disks(&asked, &with.settings)
            })
            .await;
            way_back::hold_again(&left).await;
            opened.map_err(|error| Refusal::because(RefusalKind::Protocol, &error))??
        };
        let parts = disks
            .into_iter()
            .map(|(target, have, shadow)| (target, (have, shadow)));
        let (targets, have): (Vec<_>, Vec<_>) = parts.unzip();
        let session = Self::start(agent, open, vm, machine, targets, arrived);
        Ok((session, have))
    }

    /// As a former life of this agent left it; the copies are not opened.
    pub(super) async fn reopen(
        agent: &Arc<Agent>,
        open: TargetOpen,
        vm: TargetVm,
        machine: arrive::Machine,
    ) -> Result<Arc<Self>, Refusal> {
        let arrived = arrival(agent, open.job)?;
        Ok(Self::start(agent, open, vm, machine, Vec::new(), arrived))
    }

    fn start(
        agent: &Arc<Agent>,
        open: TargetOpen,
        vm: TargetVm,
        machine: arrive::Machine,
        targets: Vec<Target>,
        arrived: Option<Arrived>,
    ) -> Arc<Self> {
        let (events, inbox) = mpsc::channel(OUTGOING);
        let session = Arc::new(Self {
            agent: Arc::clone(agent),
            job: open.job,
            open,
            vm,
            id: new_life(),
            closed: targets.is_empty(),
            targets: Mutex::new(Some(targets)),
            last_round: watch::Sender::default(),
            events,
            say: watch::Sender::new(None),
            ram: watch::Sender::new(None),
            wanted: watch::Sender::new(false),
            released: watch::Sender::new(0),
            arrived: watch::Sender::new(arrived),
            over: watch::Sender::new(false),
            owner: watch::Sender::new(None),
        });
        tokio::spawn(arrive::run(Arc::clone(&session), machine, inbox));
        session
    }

    /// Serves the attempt until its stream ends, a newer one comes, or the VM has arrived.
    async fn attach(
        self: &Arc<Self>,
        mut seat: Seat<'_>,
        have: Vec<Held>,
        say: &mpsc::Sender<FromTarget>,
        mut heard: mpsc::Receiver<ToTarget>,
        attempt: u32,
    ) -> Result<(), Refusal> {
        let limits = &self.agent.settings.limits;
        let targets = self.targets.lock().unwrap_or_else(PoisonError::into_inner).take();
        let targets = targets.unwrap_or_default();
        let notes = targets
            .iter()
            .flat_map(|target| target.notes().to_vec())
            .collect();
        let _ = say.send(FromTarget::Opened { notes }).await;
        let telling = say.clone();
        let told = on_thread("target-have", move || {
            (0..)
                .map(DiskIndex)
                .zip(have)
                .try_for_each(|(disk, (have, shadow))| tell_have(disk, have, shadow, &telling))
        });
        let told = told
            .await
            .map_err(|error| Refusal::because(RefusalKind::Protocol, &error));
        let inbox = std::mem::replace(&mut seat.inbox, mpsc::channel(1).1);
        // Where the copies are closed already, what the source sends once more is nobody's: it is dropped, and the answer is a word.
        let writers = if targets.is_empty() {
            None
        } else {
            let written = targets.into_iter().map(Written::new).collect();
            let started = Writers::start(written, inbox, limits, say.clone(), self.last_round.clone());
            Some(started.map_err(|error| Refusal::because(RefusalKind::Protocol, &error))?)
        };
        let _ = say.send(FromTarget::Ready).await;
        let _ = say.send(FromTarget::Credit(limits.job_memory.0)).await;
        self.say.send_replace(Some(say.clone()));
        let _ = say
            .send(FromTarget::Say(word::encode(&ToSource::Session(self.id))))
            .await;
        self.event(Event::Attached(attempt)).await;
        let ram = std::mem::replace(&mut seat.ram, mpsc::channel(1).1);
        let passing = tokio::spawn(pass_ram(ram, self.ram.subscribe()));
        let positions = tokio::spawn(tell_written(Arc::clone(self), say.clone()));
        let mut writers = writers;
        let ended = match told.and_then(|told| told) {
            Ok(()) => self.converse(&mut seat, say, &mut heard, &mut writers).await,
            Err(refusal) => Err(refusal),
        };
        self.say
            .send_if_modified(|current| current.take_if(|current| current.same_channel(say)).is_some());
        passing.abort();
        positions.abort();
        seat.close();
        match writers.take() {
            Some(writers) => self.let_go(writers).await.and(ended),
            None => ended,
        }
    }

    /// Stops the writers; the copies go back to the session.
    async fn let_go(&self, writers: Writers) -> Result<(), Refusal> {
        // What was written counts; the driver wants nothing but what is durable by now.
        let stopped = on_thread("writers-stop", move || writers.stop(true)).await;
        let stopped = stopped.map_err(|error| Refusal::because(RefusalKind::Protocol, &error))?;
        match stopped {
            Ok(targets) => {
                *self.targets.lock().unwrap_or_else(PoisonError::into_inner) = Some(targets);
                self.released.send_modify(|count| *count += 1);
                Ok(())
            }
            Err(refusal) => {
                // The copies are gone with the thread: the next attempt opens them anew.
                self.event(Event::DiskFailed).await;
                self.released.send_modify(|count| *count += 1);
                Err(refusal)
            }
        }
    }

    async fn converse(
        &self,
        seat: &mut Seat<'_>,
        say: &mpsc::Sender<FromTarget>,
        heard: &mut mpsc::Receiver<ToTarget>,
        writers: &mut Option<Writers>,
    ) -> Result<(), Refusal> {
        let mut wanted = self.wanted.subscribe();
        let mut arrived = self.arrived.subscribe();
        let mut over = self.over.subscribe();
        let mut stop = seat.stop.clone();
        let mut told = false;
        loop {
            tokio::select! {
                message = heard.recv() => match message {
                    None => return Ok(()),
                    Some(message) => self.on_message(message).await?,
                },
                () = is_set(&mut wanted), if writers.is_some() => {
                    // Nothing that is on its way is missed: what the driver waits for is durable.
                    seat.close();
                    if let Some(writers) = writers.take() {
                        self.let_go(writers).await?;
                    }
                }
                here = has_arrived(&mut arrived), if !told => {
                    told = true;
                    if let Some(Arrived { paths, hook }) = here {
                        let _ = say.send(FromTarget::Committed { paths, hook }).await;
                    }
                }
                () = is_set(&mut over) => {
                    if self.closed {
                        let text = "the VM was given up at the target; its copies are opened anew";
                        return Err(Refusal::new(RefusalKind::Lost, text));
                    }
                    let _ = say.send(FromTarget::Aborted).await;
                    return Ok(());
                }
                () = is_set(&mut stop) => return Ok(()),
            }
        }
    }

    async fn on_message(&self, message: ToTarget) -> Result<(), Refusal> {
        match message {
            ToTarget::Say(word) => {
                match word::decode(&word) {
                    // Not behind the driver, who may be starting a QEMU: what is measured is the way.
                    Some(Word::Probe(number)) => self.tell(&ToSource::Echo(number)).await,
                    Some(word) => self.event(Event::Word(word)).await,
                    None => {}
                }
                Ok(())
            }
            ToTarget::Abort(why) => {
                tracing::info!(job = %self.job, "the arriving VM is given up: {why}");
                self.event(Event::GiveUp).await;
                Ok(())
            }
            ToTarget::Verify | ToTarget::Commit { .. } => Err(Refusal::new(
                RefusalKind::Protocol,
                "the gateway asked to prove a running VM's disks",
            )),
        }
    }

    /// Tells the driver; one that has ended needs nothing.
    pub(super) async fn event(&self, event: Event) {
        let _ = self.events.send(event).await;
    }

    /// Says a word to the source agent, if there is a way; it may be lost.
    pub(super) async fn tell(&self, word: &ToSource) {
        let say = self.say.borrow().clone();
        if let Some(say) = say {
            let _ = say.send(FromTarget::Say(word::encode(word))).await;
        }
    }
}

/// How the VM arrived, where it has.
fn arrival(agent: &Agent, job: JobId) -> Result<Option<Arrived>, Refusal> {
    let arrived = target_disks::arrival(job, &agent.settings)?;
    // A hook that did not run to its end runs again.
    let arrived = arrived.filter(|arrival| arrival.complete && arrival.told);
    Ok(arrived.map(|arrival| Arrived {
        paths: arrival.paths,
        hook: arrival.hook,
    }))
}

/// Waits until it is true; for ever where nobody can set it any more.
async fn is_set(flag: &mut watch::Receiver<bool>) {
    if flag.wait_for(|set| *set).await.is_err() {
        std::future::pending::<()>().await;
    }
}

async fn has_arrived(arrived: &mut watch::Receiver<Option<Arrived>>) -> Option<Arrived> {
    arrived
        .wait_for(Option::is_some)
        .await
        .ok()
        .and_then(|here| here.clone())
}

/// A number that no other life of a session on this host has.
fn new_life() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_nanos() as u64)
}

/// Passes parts of the RAM stream to the stream that is being fed; what comes for none is dropped, and sent again.
async fn pass_ram(
    mut parts: mpsc::Receiver<crate::session::arrivals::Arrived>,
    feed: watch::Receiver<Option<Arc<RamIn>>>,
) {
    while let Some(part) = parts.recv().await {
        let feed = feed.borrow().clone();
        if let Some(feed) = feed {
            feed.take(part).await;
        }
    }
}

/// Tells the source how far QEMU is, whenever it got further.
async fn tell_written(session: Arc<LiveTarget>, say: mpsc::Sender<FromTarget>) {
    let mut feeds = session.ram.subscribe();
    loop {
        let feed = feeds.borrow_and_update().clone();
        let Some(feed) = feed else {
            if feeds.changed().await.is_err() {
                return;
            }
            continue;
        };
        let mut state = feed.state();
        loop {
            let position = state.borrow_and_update().written;
            let word = ToSource::Written {
                generation: feed.generation,
                position,
            };
            if say.send(FromTarget::Say(word::encode(&word))).await.is_err() {
                return;
            }
            tokio::time::sleep(WRITTEN_EVERY).await;
            tokio::select! {
                // Words may be lost with a link, or come before the source knows of this stream.
                () = tokio::time::sleep(WRITTEN_AGAIN) => {}
                changed = state.changed() => if changed.is_err() { break },
                changed = feeds.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    break;
                }
            }
        }
        // Where the old stream has ended without another one, the next one is waited for.
        if feeds.borrow().as_ref().is_some_and(|now| Arc::ptr_eq(now, &feed))
            && feeds.changed().await.is_err()
        {
            return;
        }
    }
}
