//! What the other end of a job's control stream says.
//!
//! Owns reading it in a task of its own: a frame that was begun must be read to its end, whoever stops listening meanwhile. Leaves what is
//! said to `attempt` and `live`. Promises that the end of the stream is heard once, with its reason.

use longhaul_common::link::{Link, RecvStream};
use longhaul_common::wire::frame;
use longhaul_common::wire::session::{Refusal, RefusalKind};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// Messages from an agent that may wait.
const QUEUE: usize = 64;

/// Messages of one stream, read by a task of their own: reading a frame must not be interrupted.
pub(super) struct Hearing<T> {
    messages: mpsc::Receiver<Result<T, Refusal>>,
    task: JoinHandle<()>,
}

impl<T> Drop for Hearing<T> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl<T: serde::de::DeserializeOwned + Send + 'static> Hearing<T> {
    pub(super) fn start(mut recv: RecvStream, link: Link, who: &'static str) -> Self {
        let (hear, messages) = mpsc::channel(QUEUE);
        let task = tokio::spawn(async move {
            loop {
                let lost = |why: String| Refusal::new(RefusalKind::Lost, format!("{who} was lost: {why}"));
                let message = match frame::read(&mut recv).await {
                    Ok(Some(message)) => Ok(message),
                    Ok(None) => Err(lost("it ended the job's stream".to_owned())),
                    Err(error) => Err(lost(
                        link.reason_or(&longhaul_common::wire::session::chain(&error)),
                    )),
                };
                let last = message.is_err();
                if hear.send(message).await.is_err() || last {
                    return;
                }
            }
        });
        Self { messages, task }
    }

    pub(super) async fn next(&mut self) -> Result<T, Refusal> {
        let ended = || Refusal::new(RefusalKind::Lost, "the job's stream ended");
        self.messages.recv().await.ok_or_else(ended)?
    }
}
