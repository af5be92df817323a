//! Threads for work that would block the async runtime: reducing, restoring, hashing.
//!
//! Owns a fixed number of threads and a bounded queue before them. Leaves alone what they compute. Promises that a caller waits
//! instead of queueing without bound, and that a panic in one piece of work ends only that piece.

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex};

use tokio::sync::{mpsc, oneshot};

type Work = Box<dyn FnOnce() + Send>;

/// A handle to the threads; they end when the last handle is gone.
#[derive(Clone)]
pub struct Workers {
    queue: mpsc::Sender<Work>,
}

/// The piece of work panicked, or the threads are gone.
#[derive(Debug, thiserror::Error)]
#[error("a worker thread failed; the log of this program says why")]
pub struct WorkerFailed;

impl Workers {
    /// Starts `threads` threads.
    pub fn start(threads: usize) -> std::io::Result<Self> {
        let threads = threads.max(1);
        let (queue, waiting) = mpsc::channel::<Work>(threads * 2);
        let waiting = Arc::new(Mutex::new(waiting));
        for n in 0..threads {
            let waiting = Arc::clone(&waiting);
            std::thread::Builder::new()
                .name(format!("reduce-{n}"))
                .spawn(move || serve(&waiting))?;
        }
        Ok(Self { queue })
    }

    /// Runs `work` on one of the threads.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, WorkerFailed> {
        let (done, result) = oneshot::channel();
        let boxed: Work = Box::new(move || {
            // A receiver that is gone has lost interest: nothing to tell.
            let _ = done.send(work());
        });
        self.queue.send(boxed).await.map_err(|_| WorkerFailed)?;
        result.await.map_err(|_| WorkerFailed)
    }
}

fn serve(waiting: &Mutex<mpsc::Receiver<Work>>) {
    loop {
        // The lock is held while waiting: the other threads wait for the lock instead, which costs the same.
        let next = match waiting.lock() {
            Ok(mut waiting) => waiting.blocking_recv(),
            Err(_) => None,
        };
        let Some(work) = next else { return };
        if std::panic::catch_unwind(AssertUnwindSafe(work)).is_err() {
            tracing::error!("a piece of work panicked on a worker thread");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_ends_only_its_own_work() {
        let workers = Workers::start(2).unwrap();
        assert!(workers.run::<()>(|| panic!("on purpose")).await.is_err());
        for n in 0..10 {
            assert_eq!(workers.run(move || n * 2).await.unwrap(), n * 2);
        }
    }
}
