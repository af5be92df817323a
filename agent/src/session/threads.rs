//! Blocking work on threads of its own, awaited from the runtime.
//!
//! Owns the hand-over. Promises that disk I/O and hashing never run on the runtime's threads, and that a panic there is an error
//! here.

use tokio::sync::oneshot;

/// The thread panicked or could not be started.
#[derive(Debug, thiserror::Error)]
#[error("a thread of the agent failed; its log says why")]
pub(super) struct ThreadFailed;

/// Runs `work` on a new thread and waits for it.
pub(super) async fn on_thread<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ThreadFailed> {
    let (done, result) = oneshot::channel();
    let body = move || drop(done.send(work()));
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(body)
        .map_err(|_| ThreadFailed)?;
    result.await.map_err(|_| ThreadFailed)
}
