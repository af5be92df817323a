//! The target side of one attempt: open, tell what is there, write, verify, commit.
//!
//! Owns the order of these steps and the stream to the gateway. Leaves writing to `writers`, images to `target_disks`. Promises
//! that nothing is promoted before the gateway said that all digests are equal, that an attempt whose stream ends flushes and
//! keeps what it has, and that a commit which was cut is finished by the next attempt.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use longhaul_common::digest::Digest;
use longhaul_common::ids::DiskIndex;
use longhaul_common::link::{RecvStream, SendStream};
use longhaul_common::wire::session::{
    FromTarget, HAVE_MAX, Have, Place, Refusal, RefusalKind, ShadowId, TargetOpen, ToTarget,
};
use tokio::sync::{mpsc, watch};

use super::hook::{End, Hooks, Moment};
use super::stream::{listen, speak};
use super::target_disks::Arrival;
use super::threads::{ThreadFailed, on_thread};
use super::writers::{Writers, Written};
use super::{Agent, outcome, target_disks};
use crate::disk::apply::{self, Durable, Target};

/// Messages to the gateway that may wait.
const OUTGOING: usize = 256;
/// Verification tells how far it is each time it has read so much.
const VERIFY_STEP: u64 = 256 << 20;

/// Runs the attempt to its end.
pub(super) async fn run(agent: &Arc<Agent>, send: SendStream, recv: RecvStream, open: TargetOpen) {
    tracing::info!(job = %open.job, attempt = %open.attempt, disks = open.disks.len(), "target opens");
    let (say, outgoing) = mpsc::channel(OUTGOING);
    let (hear, heard) = mpsc::channel(8);
    let speaker = tokio::spawn(speak(send, outgoing));
    let listener = tokio::spawn(listen(recv, hear));
    let mut attempt = Attempt {
        agent: Arc::clone(agent),
        open,
        say,
        heard,
    };
    let ended = attempt.converse().await;
    let open = &attempt.open;
    match ended {
        Ok(words) => tracing::info!(job = %open.job, attempt = %open.attempt, "target: {words}"),
        Err(refusal) => {
            tracing::warn!(job = %open.job, attempt = %open.attempt, "target: {refusal}");
            let _ = attempt.say.send(FromTarget::Failed(refusal)).await;
        }
    }
    drop(attempt);
    // The speaker ends when all it was given is said, or the gateway is gone.
    let _ = speaker.await;
    listener.abort();
}

struct Attempt {
    agent: Arc<Agent>,
    open: TargetOpen,
    say: mpsc::Sender<FromTarget>,
    heard: mpsc::Receiver<ToTarget>,
}

impl Attempt {
    /// The whole dialogue; gives how it ended.
    async fn converse(&mut self) -> Result<&'static str, Refusal> {
        let agent = Arc::clone(&self.agent);
        if self.open.dry_run {
            let notes = self.blocking("target-check", target_disks::check).await?;
            self.tell(FromTarget::Opened { notes }).await;
            return Ok("checked for a plan");
        }
        let mut seat = agent
            .arrivals
            .enter(
                self.open.job,
                self.open.attempt,
                agent.settings.limits.job_memory.0,
            )
            .await?;
        if let Some(arrival) = target_disks::arrival(self.open.job, &agent.settings)? {
            let arrival = self.blocking("finish-commit", move |open, settings| {
                target_disks::finish_commit(open, arrival, settings)
            });
            let arrival = arrival.await?;
            self.arrived(arrival).await;
            return Ok("had arrived already");
        }
        let disks = self.blocking("target-open", target_disks::open).await?;
        let targets = self.announce(disks).await?;
        let (say, inbox) = (
            self.say.clone(),
            std::mem::replace(&mut seat.inbox, mpsc::channel(1).1),
        );
        let written = targets.into_iter().map(Written::new).collect();
        let last_round = watch::Sender::default();
        let writers = Writers::start(written, inbox, &agent.settings.limits, say, last_round)
            .and_then(Writers::reading_back);
        let writers = writers.map_err(|error| Refusal::because(RefusalKind::Protocol, &error))?;
        let mut stop = seat.stop.clone();
        let asked = self.asked(&mut stop).await;
        seat.close();
        let hurry = !matches!(asked, Some(ToTarget::Verify));
        let targets = on_thread("writers-stop", move || writers.stop(hurry)).await;
        let targets = targets.map_err(|error| Refusal::because(RefusalKind::Protocol, &error))??;
        match asked {
            Some(ToTarget::Verify) => self.verify_and_commit(targets, stop).await,
            Some(ToTarget::Abort(why)) => self.abort(targets, &why).await,
            Some(ToTarget::Commit { .. }) => Err(Refusal::new(
                RefusalKind::Protocol,
                "the gateway asked to commit before anything was verified",
            )),
            Some(ToTarget::Say(_)) => Err(no_live()),
            None => Ok("the attempt ended, the partial copy stays"),
        }
    }

    /// Says what is there already, and gives the first credit.
    async fn announce(&self, disks: Vec<(Target, apply::Have)>) -> Result<Vec<Target>, Refusal> {
        let notes = disks
            .iter()
            .flat_map(|(target, _)| target.notes().to_vec())
            .collect();
        self.tell(FromTarget::Opened { notes }).await;
        let say = self.say.clone();
        let told = on_thread("target-have", move || {
            let mut targets = Vec::new();
            for (index, (target, have)) in (0..).map(DiskIndex).zip(disks) {
                tell_have(index, have, None, &say)?;
                targets.push(target);
            }
            Ok(targets)
        });
        let targets = told
            .await
            .map_err(|error| Refusal::because(RefusalKind::Protocol, &error))??;
        self.tell(FromTarget::Ready).await;
        self.tell(FromTarget::Credit(self.agent.settings.limits.job_memory.0))
            .await;
        Ok(targets)
    }

    async fn verify_and_commit(
        &mut self,
        targets: Vec<Target>,
        mut stop: watch::Receiver<bool>,
    ) -> Result<&'static str, Refusal> {
        let (targets, asked) = self.verify(targets, &mut stop).await?;
        match asked {
            Some(ToTarget::Commit { digests }) => {
                let arrival = self.blocking("commit", move |open, settings| {
                    target_disks::commit(open, targets, &digests, settings)
                });
                let arrival = arrival.await?;
                self.arrived(arrival).await;
                Ok("arrived")
            }
            Some(ToTarget::Abort(why)) => self.abort(targets, &why).await,
            Some(ToTarget::Verify) => Err(Refusal::new(
                RefusalKind::Protocol,
                "the gateway asked to verify twice",
            )),
            Some(ToTarget::Say(_)) => Err(no_live()),
            None => Ok("the attempt ended before the commit, the partial copy stays"),
        }
    }

    /// Reads every disk back from its storage and states its digest; gives what the gateway says next. Ends early where nobody waits
    /// for the digests any more.
    async fn verify(
        &mut self,
        targets: Vec<Target>,
        stop: &mut watch::Receiver<bool>,
    ) -> Result<(Vec<Target>, Option<ToTarget>), Refusal> {
        let given_up = Arc::new(AtomicBool::new(false));
        let (say, threads) = (self.say.clone(), self.agent.settings.limits.verify_threads);
        let flag = Arc::clone(&given_up);
        let verifying = on_thread("verify", move || {
            let verified = verify_disks(&targets, threads, &say, &flag);
            (targets, verified)
        });
        let ended = |_| Refusal::because(RefusalKind::Protocol, &ThreadFailed);
        tokio::pin!(verifying);
        let mut early = None;
        let (targets, verified) = tokio::select! {
            done = &mut verifying => done.map_err(ended)?,
            asked = self.asked(stop) => {
                // A commit is asked for when all digests are known: the thread is just about to say that it has ended.
                let waits = matches!(asked, Some(ToTarget::Commit { .. }));
                given_up.store(!waits, Ordering::Relaxed);
                early = Some(asked);
                verifying.await.map_err(ended)?
            }
        };
        match early {
            Some(asked @ (None | Some(ToTarget::Abort(_)))) => Ok((targets, asked)),
            Some(asked) => verified.map(|()| (targets, asked)),
            None => {
                verified?;
                Ok((targets, self.asked(stop).await))
            }
        }
    }

    /// What the gateway says next; nothing where it is gone, or a newer attempt has come: this one's gateway may be gone without a word.
    async fn asked(&mut self, stop: &mut watch::Receiver<bool>) -> Option<ToTarget> {
        tokio::select! {
            asked = self.heard.recv() => asked,
            _ = stop.wait_for(|stop| *stop) => None,
        }
    }

    async fn abort(&self, targets: Vec<Target>, why: &Refusal) -> Result<&'static str, Refusal> {
        tracing::info!(job = %self.open.job, "the partial copy is removed: {why}");
        let discarded = on_thread("discard", move || {
            targets
                .into_iter()
                .try_for_each(|target| target.discard().map_err(|error| outcome::target(&error)))
        });
        discarded
            .await
            .map_err(|error| Refusal::because(RefusalKind::Protocol, &error))??;
        self.tell(FromTarget::Aborted).await;
        Ok("aborted")
    }

    /// Runs the hook, unless it has run to its end for this job, and tells of the arrival.
    async fn arrived(&self, mut arrival: Arrival) {
        if !arrival.told {
            arrival.hook = self.run_hook(&arrival.paths).await;
            arrival.told = true;
            let kept = arrival.clone();
            let noted = self.blocking("arrival", move |open, settings| {
                target_disks::write_record(open.job, &kept, settings)
            });
            if let Err(refusal) = noted.await {
                tracing::error!(job = %self.open.job, "the hook may run again: {refusal}");
            }
        }
        let Arrival { paths, hook, .. } = arrival;
        self.tell(FromTarget::Committed { paths, hook }).await;
    }

    /// Gives why it failed, if it did.
    async fn run_hook(&self, paths: &[PathBuf]) -> Option<String> {
        let definition = self.blocking("definition", target_disks::keep_definition).await;
        let (definition, problem) = match definition {
            Ok(definition) => (definition, None),
            Err(refusal) => (None, Some(refusal.text)),
        };
        let hooks = Hooks {
            job: self.open.job,
            name: self.open.name.clone(),
            end: End::Target,
            site: self.agent.site(),
            other: Place::default(),
            disks: paths.to_vec(),
            definition,
        };
        let hook = hooks.run_anyway(&self.agent.settings.hooks, Moment::After, None);
        hook.await.or(problem)
    }

    async fn tell(&self, message: FromTarget) {
        // A gateway that is gone is noticed by `heard`.
        let _ = self.say.send(message).await;
    }

    /// Runs a blocking step with the request and the settings at hand.
    async fn blocking<T: Send + 'static>(
        &self,
        name: &str,
        step: impl FnOnce(&TargetOpen, &crate::settings::AgentSettings) -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Refusal> {
        let (agent, open) = (Arc::clone(&self.agent), self.open.clone());
        let done = on_thread(name, move || step(&open, &agent.settings)).await;
        done.map_err(|error| Refusal::because(RefusalKind::Protocol, &error))?
    }
}

/// A word of the other agent, where no running VM arrives.
fn no_live() -> Refusal {
    Refusal::new(
        RefusalKind::Protocol,
        "the source agent speaks of a running VM in a cold move",
    )
}

fn verify_disks(
    targets: &[Target],
    threads: usize,
    say: &mpsc::Sender<FromTarget>,
    given_up: &AtomicBool,
) -> Result<(), Refusal> {
    for (disk, target) in (0..).map(DiskIndex).zip(targets) {
        let (digest, verify_ms, flush_ms) = verify_disk(disk, target, threads, say, given_up)?;
        let _ = say.blocking_send(FromTarget::Verified {
            disk,
            digest,
            verify_ms,
            flush_ms,
        });
    }
    Ok(())
}

fn verify_disk(
    disk: DiskIndex,
    target: &Target,
    threads: usize,
    say: &mpsc::Sender<FromTarget>,
    given_up: &AtomicBool,
) -> Result<(Digest, u64, u64), Refusal> {
    let started = std::time::Instant::now();
    target.flush().map_err(|error| outcome::target(&error))?;
    let flush_ms = started.elapsed().as_millis() as u64;
    let told = AtomicU64::new(0);
    let progress = |bytes: u64| {
        let before = told.load(Ordering::Relaxed);
        if bytes >= before + VERIFY_STEP {
            told.store(bytes, Ordering::Relaxed);
            // Only a hint for people: dropped where the gateway does not keep up.
            let _ = say.try_send(FromTarget::Verifying { disk, bytes });
        }
        match given_up.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    };
    let digest = target
        .verify(threads, &progress)
        .map_err(|error| outcome::target(&error))?;
    Ok((digest, started.elapsed().as_millis() as u64 - flush_ms, flush_ms))
}

/// Tells the durable leaves in frames of bounded size.
pub(super) fn tell_have(
    disk: DiskIndex,
    have: apply::Have,
    shadow: Option<ShadowId>,
    say: &mpsc::Sender<FromTarget>,
) -> Result<(), Refusal> {
    let mut frame: Option<Have> = None;
    for durable in have {
        let (first, count, digest, of) = match durable.map_err(|error| outcome::target(&error))? {
            Durable::Data { leaf, digest } => (leaf, 1, Some((leaf, digest)), None),
            Durable::Zeros { first, count } => (first, count, None, None),
            // Without a name for it nobody can say what these leaves hold.
            Durable::Shadow { .. } if shadow.is_none() => continue,
            Durable::Shadow { first, count } => (first, count, None, shadow),
        };
        let joins = |f: &Have| f.first + f.count == first && f.digests.len() < HAVE_MAX && f.shadow == of;
        if !frame.as_ref().is_some_and(joins)
            && let Some(full) = frame.replace(Have {
                disk,
                first,
                count: 0,
                digests: Vec::new(),
                shadow: of,
            })
        {
            let _ = say.blocking_send(FromTarget::Have(full));
        }
        if let Some(frame) = &mut frame {
            frame.count += count;
            frame.digests.extend(digest);
        }
    }
    if let Some(last) = frame {
        let _ = say.blocking_send(FromTarget::Have(last));
    }
    Ok(())
}
