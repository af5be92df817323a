//! A running VM at its source: one session for each job, over any number of wire attempts.
//!
//! Owns the session's life, attaching an attempt to it, and what is heard. Leaves looking at the VM first to `open`, the migration itself to `drive`. Promises that a plan
//! leaves nothing behind in QEMU, that an attempt which ends leaves the VM and the session as they are, and that how the
//! migration ended is said to every attempt that asks.

mod open;
mod preflight;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use longhaul_common::ids::{Attempt, JobId};
use longhaul_common::link::{Link, RecvStream, SendStream};
use longhaul_common::wire::frame;
use longhaul_common::wire::session::{
    AgentWord, FromSource, LiveOutcome, LiveSurvey, OpenedDisk, Refusal, RefusalKind, ShadowId, SourceOpen,
    SourceVm, ToSource,
};
use longhaul_common::wire::words::cleaned;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::disks::{self, VmDisk};
use super::drive::{self, Parts};
use super::old_copy::OldCopy;
use super::proof::FreeProof;
use super::record::Leaving;
use super::resolve::Told;
use super::round_trip::RoundTrip;
use super::uplink::Uplink;
use super::word::{self, ToSource as Said, ToTarget};
use crate::disk::have::HaveLeaves;
use crate::session::stream::{listen, speak};
use crate::session::threads::on_thread;
use crate::session::{Agent, outcome};
use crate::vm::handover::{Generation, Reason, SourceState};
use crate::vm::media::Medium;
use crate::vm::qmp::Qmp;

pub(super) use self::preflight::{allowed_guest_agent, allowed_socket};

/// The first version of QEMU whose disks in iothreads are read.
const IOTHREADS_FROM: (u32, u32) = (8, 1);
/// Messages that wait for the gateway or the driver.
const QUEUE: usize = 64;
/// More steps of an arrival than there are.
const STEPS_MAX: usize = 16;
/// How long the gateway may take to hear the end.
const LAST_WORD: Duration = Duration::from_secs(5);

/// Why the target's QEMU does not wait for the VM.
#[derive(Clone, Debug)]
pub(super) enum Unready {
    /// It does not start or does not fit, in words.
    Unfit(String),
    /// It did, and no generation up to this one is waited for any more.
    GivenUp(Generation, Reason),
}

/// What is known from the target and the operator.
#[derive(Default)]
pub(super) struct Heard {
    /// What the target holds, as told to this attempt.
    pub have: Option<(Attempt, Vec<HaveLeaves>)>,
    /// The life of the target's session, as told to this attempt.
    pub session: Option<(Attempt, u64)>,
    /// The target's QEMU waits, or why not.
    pub prepared: Option<(Generation, Result<Vec<String>, Unready>)>,
    pub cancel: Option<Refusal>,
    /// How long the target's last steps took, in milliseconds since the first.
    pub arrival: Vec<(String, u64)>,
    /// Why the target could not keep a generation, in its words.
    pub why: Option<(Generation, String)>,
    round_trip: RoundTrip,
}

impl Heard {
    /// The way to the target agent and back, once it was measured.
    pub(super) fn rtt(&self) -> Option<Duration> {
        self.round_trip.least()
    }
}

/// How a migration ended.
pub(super) type End = Result<Box<LiveOutcome>, Refusal>;

/// One job's session.
pub(crate) struct LiveSource {
    pub(super) agent: Arc<Agent>,
    pub(super) job: JobId,
    pub(super) vm: SourceVm,
    pub(super) qmp: Qmp,
    /// The guest agent's socket, after links were resolved.
    pub(super) guest_agent: Option<PathBuf>,
    pub(super) disks: Vec<VmDisk>,
    /// Of each disk the shadow since which QEMU knows all writes.
    pub(super) since: Vec<Option<ShadowId>>,
    reports: Vec<OpenedDisk>,
    /// What was found before a byte moved; not by a session that only settles.
    survey: Option<Box<LiveSurvey>>,
    /// Bytes of the VM's RAM, for the forecast.
    pub(super) ram_size: u64,
    /// Media that leave their drives before RAM moves.
    pub(super) eject: Vec<Medium>,
    pub(super) free: Arc<FreeProof>,
    definition: Option<Vec<u8>>,
    pub(super) heard: watch::Sender<Heard>,
    pub(super) uplink: watch::Sender<Option<Arc<Uplink>>>,
    pub(super) words: mpsc::Sender<Told>,
    /// The handover's state, once its machine has begun.
    pub(super) owner: watch::Sender<Option<SourceState>>,
    /// The images, and their locks once the VM is handed over.
    pub(super) old_copy: tokio::sync::Mutex<OldCopy>,
    /// Where the RAM stream of the current generation is told how far the target is.
    pub(super) ram: Mutex<Option<Arc<super::ram_out::RamOut>>>,
    record: Mutex<Leaving>,
    /// What the driver begins with, until it does.
    parts: Mutex<Option<Parts>>,
    ended: watch::Sender<Option<End>>,
}

/// Serves one wire attempt.
pub(crate) async fn run(
    agent: &Arc<Agent>,
    link: Link,
    mut send: SendStream,
    recv: RecvStream,
    open: SourceOpen,
    vm: SourceVm,
) {
    tracing::info!(job = %open.job, attempt = %open.attempt, "a running VM is asked for");
    let slot = agent.live_sources.slot(open.job);
    let found = {
        let mut slot = slot.lock().await;
        // One that failed holds the VM's monitor, which serves one at a time.
        slot.take_if(|session| session.has_failed());
        match slot.as_ref() {
            Some(session) => Ok(Arc::clone(session)),
            None => LiveSource::open(agent, &open, vm).await.inspect(|session| {
                *slot = Some(Arc::clone(session));
            }),
        }
    };
    let session = match found {
        Ok(session) => session,
        Err(refusal) => {
            tracing::warn!(job = %open.job, "the VM cannot be moved: {refusal}");
            let _ = frame::write(&mut send, &FromSource::Failed(refusal)).await;
            let _ = send.finish();
            let _ = tokio::time::timeout(LAST_WORD, send.stopped()).await;
            return;
        }
    };
    let last_word = session.attach(link, send, recv, open.attempt).await;
    if session.is_unused() {
        session.discard().await;
        let mut slot = slot.lock().await;
        slot.take_if(|known| Arc::ptr_eq(known, &session));
    }
    // The VM does not wait for a gateway that reads slowly.
    drop(session);
    let _ = tokio::time::timeout(LAST_WORD, last_word).await;
}

impl LiveSource {
    /// Of each disk, the bytes that round 0 has to send.
    pub(super) fn used(&self) -> Vec<u64> {
        self.reports.iter().map(|report| report.used).collect()
    }

    /// What is remembered of this job.
    pub(super) fn record(&self) -> MutexGuard<'_, Leaving> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this session, which is not over, has that monitor's VM.
    fn has_vm(&self, socket: &std::path::Path) -> bool {
        self.ended.borrow().is_none() && self.record().qmp == socket
    }

    fn has_failed(&self) -> bool {
        self.ended.borrow().as_ref().is_some_and(Result::is_err)
    }

    /// Why it ended without the VM being moved.
    pub(super) fn failure(&self) -> Option<String> {
        let ended = self.ended.borrow();
        ended
            .as_ref()
            .and_then(|end| Some(end.as_ref().err()?.text.clone()))
    }

    /// Whether the target runs the VM.
    pub(super) fn has_moved(&self) -> bool {
        self.ended.borrow().as_ref().is_some_and(Result::is_ok)
    }

    /// Whether nobody ever told it to start.
    fn is_unused(&self) -> bool {
        self.parts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some()
            && self.uplink.borrow().is_none()
    }

    async fn discard(&self) {
        let parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(parts) = parts
            && let Err(error) = parts.rounds.remove().await
        {
            tracing::warn!(job = %self.job, "something of ours is left in the VM's QEMU: {error}");
        }
        self.forget().await;
    }

    /// Nothing of this job is open here any more.
    pub(super) async fn forget(&self) {
        let (state, job) = (self.agent.settings.paths.state.clone(), self.job);
        let _ = on_thread("record", move || Leaving::remove(&state, job)).await;
    }

    /// Writes the record down, changed.
    pub(super) async fn remember(&self, change: impl FnOnce(&mut Leaving)) -> Result<(), Refusal> {
        let record = {
            let mut record = self.record();
            change(&mut record);
            record.clone()
        };
        save(&self.agent, self.job, record).await
    }

    /// What a former life of this agent left: settled as far as it can be. `true` where somebody may still ask for the session.
    pub(super) async fn settle(
        agent: &Arc<Agent>,
        job: JobId,
        record: Leaving,
        qmp: Option<Qmp>,
    ) -> (Arc<Self>, bool) {
        let (words, heard) = mpsc::channel(QUEUE);
        let qmp = match qmp {
            Some(qmp) => qmp,
            None => Qmp::gone(&record.qmp).await,
        };
        let moved = record.outcome.clone().map(|outcome| Ok(Box::new(outcome)));
        let session = Arc::new(Self {
            agent: Arc::clone(agent),
            job,
            vm: record.vm.clone(),
            qmp,
            guest_agent: None,
            old_copy: OldCopy::of(&record.disks, job),
            disks: record.disks.clone(),
            since: Vec::new(),
            reports: record.disks.iter().map(disks::unread).collect(),
            survey: None,
            ram_size: 0,
            eject: Vec::new(),
            free: Arc::new(FreeProof::none()),
            definition: None,
            heard: watch::Sender::default(),
            uplink: watch::Sender::new(None),
            words,
            owner: watch::Sender::new(None),
            ram: Mutex::default(),
            record: Mutex::new(record),
            parts: Mutex::default(),
            ended: watch::Sender::new(moved.clone()),
        });
        if moved.is_some() {
            session.settle_moved().await;
            return (session, true);
        }
        let asked = drive::settle(&session, heard).await;
        (session, asked)
    }

    /// How the migration ended, for everybody who asks.
    pub(super) fn end(&self, end: End) {
        self.ended.send_replace(Some(end));
    }

    /// Speaks with the gateway for as long as the attempt lasts. Gives what still writes the last words.
    async fn attach(
        self: &Arc<Self>,
        link: Link,
        send: SendStream,
        recv: RecvStream,
        attempt: Attempt,
    ) -> JoinHandle<()> {
        let (say, outgoing) = mpsc::channel(QUEUE);
        let speaker = tokio::spawn(speak(send, outgoing));
        let (hear, mut heard) = mpsc::channel(QUEUE);
        let listener = tokio::spawn(listen(recv, hear));
        let uplink = Arc::new(Uplink::new(self.job, attempt, link, say.clone()));
        self.converse(&uplink, &say, &mut heard).await;
        uplink.end();
        self.uplink
            .send_if_modified(|current| current.take_if(|current| Arc::ptr_eq(current, &uplink)).is_some());
        listener.abort();
        speaker
    }

    async fn converse(
        self: &Arc<Self>,
        uplink: &Arc<Uplink>,
        say: &mpsc::Sender<FromSource>,
        heard: &mut mpsc::Receiver<ToSource>,
    ) {
        let mut ended = self.ended.subscribe();
        let opened = FromSource::Opened {
            disks: self.reports.clone(),
            definition: self.definition.clone(),
            live: self.survey.clone(),
        };
        let over = ended.borrow_and_update().clone();
        if let Some(end) = over {
            return drop(say.send(last_word(end)).await);
        }
        self.say_doubt(say).await;
        if say.send(opened).await.is_err() {
            return;
        }
        let mut have = Some(
            self.disks
                .iter()
                .map(|_| HaveLeaves::default())
                .collect::<Vec<_>>(),
        );
        loop {
            let message = tokio::select! {
                message = heard.recv() => message,
                () = uplink.ended() => None,
                end = has_ended(&mut ended) => {
                    if let Some(end) = end {
                        let _ = say.send(last_word(end)).await;
                    }
                    return;
                }
            };
            let Some(message) = message else { return };
            if let Err(refusal) = self.on_message(message, uplink, &mut have) {
                return drop(say.send(FromSource::Failed(refusal)).await);
            }
        }
    }

    fn on_message(
        self: &Arc<Self>,
        message: ToSource,
        uplink: &Arc<Uplink>,
        have: &mut Option<Vec<HaveLeaves>>,
    ) -> Result<(), Refusal> {
        let protocol = |text: &str| Err(Refusal::new(RefusalKind::Protocol, text));
        match message {
            ToSource::Have(leaves) => {
                let disk = usize::from(leaves.disk.0);
                let size = self.disks.get(disk).map(|disk| disk.size);
                let (Some(have), Some(size)) = (have.as_mut().and_then(|have| have.get_mut(disk)), size)
                else {
                    return protocol("the target speaks of a disk there is not");
                };
                outcome::refused(have.add(&leaves, size))?;
            }
            ToSource::Start => {
                let Some(have) = have.take() else {
                    return protocol("the gateway said twice to start");
                };
                self.heard
                    .send_modify(|heard| heard.have = Some((uplink.attempt, have)));
                if let Some(older) = self.uplink.send_replace(Some(Arc::clone(uplink))) {
                    older.end();
                }
                self.start_driving();
            }
            ToSource::Credit(bytes) => uplink.give_credit(bytes),
            ToSource::Durable(sequences) => uplink.durable(&sequences),
            ToSource::Say(word) => self.on_word(&word, uplink.attempt),
            ToSource::Cancel(refusal) => self.cancel(refusal),
            ToSource::Carried(carried) => uplink.set_carried(carried),
            ToSource::Finish => return protocol("a running VM's source is not told to finish"),
        }
        Ok(())
    }

    fn on_word(&self, word: &AgentWord, attempt: Attempt) {
        let Some(said) = word::decode::<Said>(word) else {
            return;
        };
        match said {
            Said::Session(id) => self
                .heard
                .send_modify(|heard| heard.session = Some((attempt, id))),
            Said::Prepared { generation, notes } => {
                self.heard
                    .send_modify(|heard| heard.prepared = Some((generation, Ok(notes))));
            }
            Said::Unfit { generation, why } => {
                self.heard
                    .send_modify(|heard| heard.prepared = Some((generation, Err(Unready::Unfit(why)))));
            }
            Said::GivenUp {
                generation,
                upto,
                reason,
            } => {
                let given_up = Err(Unready::GivenUp(upto, reason));
                self.heard
                    .send_modify(|heard| heard.prepared = Some((generation, given_up)));
            }
            Said::Written { generation, position } => {
                let ram = self.ram.lock().unwrap_or_else(PoisonError::into_inner).clone();
                if let Some(ram) = ram.filter(|ram| ram.generation == generation) {
                    ram.written(attempt, position);
                }
            }
            Said::Steps(mut steps) => {
                steps.truncate(STEPS_MAX);
                self.heard.send_modify(|heard| heard.arrival = steps);
            }
            Said::Why { generation, why } => {
                let why = Some((generation, cleaned(&why)));
                self.heard.send_modify(|heard| heard.why = why);
            }
            // A queue that is full loses words; each is said again.
            Said::Handover(word) => drop(self.words.try_send(Told::Word(word))),
            Said::Echo(number) => self
                .heard
                .send_modify(|heard| heard.round_trip.echo(number, Instant::now())),
        }
    }

    /// Gives up at the next step; one that is over already stays as it is.
    fn cancel(self: &Arc<Self>, refusal: Refusal) {
        self.heard.send_modify(|heard| heard.cancel = Some(refusal));
        // Nothing was begun: then this only takes the bitmaps away.
        self.start_driving();
    }

    fn start_driving(self: &Arc<Self>) {
        let parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(parts) = parts {
            let session = Arc::clone(self);
            tokio::spawn(async move {
                let end = drive::run(&session, parts).await;
                session.end(end);
            });
        }
    }

    /// Says a word to the target agent, if there is a way; it may be lost.
    pub(super) async fn tell(&self, word: &ToTarget) {
        let uplink = self.uplink.borrow().clone();
        if let Some(uplink) = uplink {
            uplink.say(FromSource::Say(word::encode(word))).await;
        }
    }

    /// Measures the way to the target agent and back.
    pub(super) async fn probe(&self, number: u64) {
        self.heard
            .send_modify(|heard| heard.round_trip.sent(number, Instant::now()));
        self.tell(&ToTarget::Probe(number)).await;
    }
}

async fn save(agent: &Arc<Agent>, job: JobId, record: Leaving) -> Result<(), Refusal> {
    let state = agent.settings.paths.state.clone();
    let saved = on_thread("record", move || record.save(&state, job)).await;
    let saved = saved.map_err(|error| Refusal::because(RefusalKind::Protocol, &error))?;
    saved.map_err(|text| Refusal::new(RefusalKind::Refused, text))
}

async fn has_ended(ended: &mut watch::Receiver<Option<End>>) -> Option<End> {
    ended
        .wait_for(Option::is_some)
        .await
        .ok()
        .and_then(|end| end.clone())
}

fn last_word(end: End) -> FromSource {
    match end {
        Ok(outcome) => FromSource::Moved(outcome),
        Err(refusal) => FromSource::Failed(refusal),
    }
}
