//! A job's control messages between the peer and the target agent.
//!
//! Owns both streams of one attempt, and adds what only the gateway knows: which batches are accepted, and why the attempt cannot go
//! on. Reads nothing into the messages. Promises that when either end is gone the other one learns it.

use std::sync::Arc;
use std::time::Duration;

use longhaul_common::ids::JobId;
use longhaul_common::link::{Identity, Link, RecvStream, SendStream};
use longhaul_common::wire::frame::{self, FrameError};
use longhaul_common::wire::session::{
    AgentTask, FromTarget, PeerTask, Refusal, RefusalKind, TargetOpen, ToTarget,
};
use longhaul_common::wire::window::WindowHello;
use tokio::sync::{Semaphore, mpsc};

use super::Receiving;
use super::delivery::{Delivery, Owner};
use crate::reduction::Vm;

/// Messages that wait for a stream.
const QUEUE: usize = 64;
/// The first frame must be there by then.
const FIRST_FRAME: Duration = Duration::from_secs(20);
/// How long a peer may take to hear why its job ended.
const LAST_WORD: Duration = Duration::from_secs(20);

/// Serves one control stream of a peer, which may have as many jobs at once as `jobs` has places.
pub(super) async fn run(
    receiving: Arc<Receiving>,
    peer: Link,
    jobs: Arc<Semaphore>,
    mut send: SendStream,
    mut recv: RecvStream,
) {
    let first = tokio::time::timeout(FIRST_FRAME, frame::read(&mut recv)).await;
    let refusal = |kind, text: &str| FromTarget::Failed(Refusal::new(kind, text));
    let (agent, tenant, open) = match first {
        Ok(Ok(Some(PeerTask::Target { agent, tenant, open }))) => (agent, tenant, open),
        Ok(Ok(Some(PeerTask::Window { tenant, hello }))) => {
            return agree(&receiving, peer.peer(), tenant, hello, &mut send).await;
        }
        Ok(Ok(Some(PeerTask::Knock))) => return answer_knocks(send, recv).await,
        Ok(Ok(None)) => return,
        Ok(Err(error)) => {
            tracing::warn!(peer = %peer.peer(), "a peer's task was refused: {error}");
            let said = refusal(RefusalKind::Protocol, &error.to_string());
            return last_word(&mut send, &said).await;
        }
        Err(_) => return tracing::warn!(peer = %peer.peer(), "a peer's task never said what it is for"),
    };
    let Ok(_place) = jobs.try_acquire() else {
        let said = refusal(
            RefusalKind::Lost,
            "too many jobs of this gateway arrive at the target site at once",
        );
        return last_word(&mut send, &said).await;
    };
    tracing::info!(job = %open.job, attempt = %open.attempt, peer = %peer.peer(), %agent, "a job arrives");
    let to = Destination {
        agent: &agent,
        tenant,
    };
    let ended = connect(&receiving, peer.peer(), to, open, &mut send, recv).await;
    if let Err(refusal) = ended {
        tracing::warn!("an arriving job's attempt ended: {refusal}");
        return last_word(&mut send, &FromTarget::Failed(refusal)).await;
    }
    close(&mut send).await;
}

/// Sends back what comes, until the peer has enough or is gone.
async fn answer_knocks(mut send: SendStream, mut recv: RecvStream) {
    // What came too late to be told apart is answered once.
    let mut heard = [0; 64];
    while let Ok(Some(_)) = recv.read(&mut heard).await {
        if send.write_all(&heard[..1]).await.is_err() {
            return;
        }
    }
}

/// Answers a peer that says with which window it goes on. One that is to have none gets no answer.
async fn agree(
    receiving: &Receiving,
    peer: &Identity,
    tenant: String,
    hello: WindowHello,
    send: &mut SendStream,
) {
    let (windows, name) = (Arc::clone(&receiving.windows), peer.to_string());
    let greet = move || Some(windows.with(&name, &tenant)?.greet(hello));
    if let Ok(Some(answer)) = receiving.workers.run_as(true, greet).await {
        tracing::debug!(%peer, epoch = answer.epoch, held = answer.held, "a window is agreed on");
        // A peer that is gone need not be told.
        let _ = tokio::time::timeout(LAST_WORD, frame::write(send, &answer)).await;
    }
    close(send).await;
}

async fn last_word(send: &mut SendStream, message: &FromTarget) {
    // A peer that is gone need not be told.
    let _ = tokio::time::timeout(LAST_WORD, frame::write(send, message)).await;
    close(send).await;
}

async fn close(send: &mut SendStream) {
    let _ = send.finish();
    // Until all was taken; a peer that takes nothing is not waited for.
    let _ = tokio::time::timeout(LAST_WORD, send.stopped()).await;
}

/// Where a job's batches go, and whose window they refer to on the way.
struct Destination<'a> {
    agent: &'a str,
    tenant: String,
}

async fn connect(
    receiving: &Receiving,
    peer: &Identity,
    to: Destination<'_>,
    mut open: TargetOpen,
    send: &mut SendStream,
    recv: RecvStream,
) -> Result<(), Refusal> {
    let Destination { agent, tenant } = to;
    let link = receiving.agents.link(agent)?;
    if let Some(vm) = &mut open.live {
        vm.source.site = peer.site().to_owned();
    }
    let (job, attempt, vm) = (open.job, open.attempt, Vm::named(&open.name));
    if let Some(newer) = receiving
        .deliveries
        .get(&job)
        .filter(|known| known.attempt > attempt)
    {
        let text = format!("attempt {} of this job has taken over", newer.attempt);
        return Err(Refusal::new(RefusalKind::Superseded, text));
    }
    let lost = |error: &dyn std::fmt::Display| {
        Refusal::new(
            RefusalKind::Lost,
            format!("the target agent '{agent}' was lost: {}", link.reason_or(error)),
        )
    };
    let (mut to_agent, from_agent) = link.open_bi().await.map_err(|error| lost(&error))?;
    frame::write(&mut to_agent, &AgentTask::Target(open))
        .await
        .map_err(|error| lost(&error))?;
    let (failed, failures) = mpsc::channel(1);
    let of = Owner {
        peer: peer.clone(),
        tenant,
        vm,
    };
    let delivery = Arc::new(Delivery::new(attempt, of, link.clone(), failed));
    enter(receiving, job, &delivery)?;
    let (say, said) = mpsc::channel(QUEUE);
    let (done, over) = mpsc::channel(1);
    let downward = tokio::spawn(pass_down(recv, to_agent, done));
    let upward = tokio::spawn(pass_up(from_agent, say));
    let result = speak(send, &delivery, said, failures, over).await;
    downward.abort();
    upward.abort();
    receiving
        .deliveries
        .remove_if(&job, |_, known| Arc::ptr_eq(known, &delivery));
    result
}

/// Puts the delivery into the table, in place of an older attempt of the same peer.
fn enter(receiving: &Receiving, job: JobId, delivery: &Arc<Delivery>) -> Result<(), Refusal> {
    let mut entry = receiving
        .deliveries
        .entry(job)
        .or_insert_with(|| Arc::clone(delivery));
    if Arc::ptr_eq(&entry, delivery) {
        return Ok(());
    }
    if entry.of.peer != delivery.of.peer || entry.attempt >= delivery.attempt {
        let text = format!("attempt {} of this job is already under way", entry.attempt);
        return Err(Refusal::new(RefusalKind::Superseded, text));
    }
    *entry = Arc::clone(delivery);
    Ok(())
}

/// Passes what the peer says on to the agent; ends with the peer's stream.
async fn pass_down(mut recv: RecvStream, mut to_agent: SendStream, done: mpsc::Sender<()>) {
    while let Ok(Some(message)) = frame::read::<ToTarget>(&mut recv).await {
        if frame::write(&mut to_agent, &message).await.is_err() {
            break;
        }
    }
    let _ = to_agent.finish();
    let _ = done.send(()).await;
}

/// Passes what the agent says on to [`speak`].
async fn pass_up(mut from_agent: RecvStream, say: mpsc::Sender<Result<FromTarget, FrameError>>) {
    loop {
        match frame::read::<FromTarget>(&mut from_agent).await {
            Ok(Some(message)) => {
                if say.send(Ok(message)).await.is_err() {
                    return;
                }
            }
            Ok(None) => return,
            Err(error) => return drop(say.send(Err(error)).await),
        }
    }
}

/// Says everything to the peer, in one order: the agent's messages, and what was accepted.
async fn speak(
    send: &mut SendStream,
    delivery: &Delivery,
    mut said: mpsc::Receiver<Result<FromTarget, FrameError>>,
    mut failures: mpsc::Receiver<String>,
    mut over: mpsc::Receiver<()>,
) -> Result<(), Refusal> {
    let peer_lost = |error: FrameError| Refusal::because(RefusalKind::Lost, &error);
    loop {
        let message = tokio::select! {
            message = said.recv() => match message {
                Some(Ok(message)) => message,
                Some(Err(error)) => {
                    return Err(Refusal::new(RefusalKind::Lost, format!("the target agent was lost: {error}")));
                }
                None => return Ok(()),
            },
            () = delivery.said.notified() => {
                let missing = delivery.take_missing();
                if !missing.is_empty() {
                    frame::write(send, &FromTarget::Missing(missing)).await.map_err(peer_lost)?;
                }
                FromTarget::Accepted(delivery.take_unsaid())
            }
            Some(reason) = failures.recv() => return Err(Refusal::new(RefusalKind::Lost, reason)),
            _ = over.recv() => {
                // The peer has nothing more to say; the agent may still have to finish what it was told.
                continue_to_the_end(send, &mut said).await;
                return Ok(());
            }
        };
        frame::write(send, &message).await.map_err(peer_lost)?;
    }
}

async fn continue_to_the_end(
    send: &mut SendStream,
    said: &mut mpsc::Receiver<Result<FromTarget, FrameError>>,
) {
    while let Some(Ok(message)) = said.recv().await {
        if frame::write(send, &message).await.is_err() {
            return;
        }
    }
}
