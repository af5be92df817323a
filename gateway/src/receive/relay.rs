//! A job's control messages between the peer and the target agent.
//!
//! Owns both streams of one attempt, and adds what only the gateway knows: which batches are accepted, and why the attempt cannot go
//! on. Reads nothing into the messages. Promises that when either end is gone the other one learns it.

use std::sync::Arc;

use longhaul_common::link::{Link, RecvStream, SendStream};
use longhaul_common::wire::frame::{self, FrameError};
use longhaul_common::wire::session::{
    AgentTask, FromTarget, PeerTask, Refusal, RefusalKind, TargetOpen, ToTarget,
};
use tokio::sync::mpsc;

use super::Receiving;
use super::delivery::Delivery;

/// Messages that wait for a stream.
const QUEUE: usize = 64;

/// Serves one control stream of a peer.
pub(super) async fn run(receiving: Arc<Receiving>, peer: Link, mut send: SendStream, mut recv: RecvStream) {
    let PeerTask::Target { agent, open } = match frame::read(&mut recv).await {
        Ok(Some(task)) => task,
        Ok(None) => return,
        Err(error) => return tracing::warn!(peer = %peer.peer(), "a peer's task was refused: {error}"),
    };
    tracing::info!(job = %open.job, attempt = %open.attempt, peer = %peer.peer(), %agent, "a job arrives");
    let ended = connect(&receiving, &agent, open, &mut send, recv).await;
    if let Err(refusal) = ended {
        tracing::warn!("an arriving job's attempt ended: {refusal}");
        // A peer that is gone need not be told.
        let _ = frame::write(&mut send, &FromTarget::Failed(refusal)).await;
    }
    let _ = send.finish();
    let _ = send.stopped().await;
}

async fn connect(
    receiving: &Receiving,
    agent: &str,
    open: TargetOpen,
    send: &mut SendStream,
    recv: RecvStream,
) -> Result<(), Refusal> {
    let link = receiving.agents.link(agent)?;
    let (job, attempt) = (open.job, open.attempt);
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
    let delivery = Arc::new(Delivery::new(attempt, link.clone(), failed));
    receiving.deliveries.insert(job, Arc::clone(&delivery));
    let (say, said) = mpsc::channel(QUEUE);
    let (done, over) = mpsc::channel(1);
    let downward = tokio::spawn(pass_down(recv, to_agent, done));
    let upward = tokio::spawn(pass_up(from_agent, say));
    let result = speak(send, &delivery, said, failures, over).await;
    downward.abort();
    upward.abort();
    receiving
        .deliveries
        .remove_if(&job, |_, known| known.attempt == attempt);
    result
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
            () = delivery.said.notified() => FromTarget::Accepted(delivery.take_unsaid()),
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
