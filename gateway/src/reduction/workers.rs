//! Threads for work that would block the async runtime: reducing, restoring, hashing.
//!
//! Owns a fixed number of threads and a bounded queue before them; what a stopped VM waits for goes to its front. Leaves what they compute
//! alone. Promises that a caller waits instead of queueing without bound, and that a panic in one piece of work ends only that piece.

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::{Semaphore, oneshot};

type Work = Box<dyn FnOnce() + Send>;

/// A handle to the threads; they end when the last handle is gone.
#[derive(Clone)]
pub struct Workers {
    shared: Arc<Closer>,
    /// Places in the queue for ordinary work, and for urgent work.
    places: [Arc<Semaphore>; 2],
    threads: usize,
}

/// The piece of work panicked, or the threads are gone.
#[derive(Debug, thiserror::Error)]
#[error("a worker thread failed; the log of this program says why")]
pub struct WorkerFailed;

#[derive(Default)]
struct Queue {
    urgent: VecDeque<Work>,
    ordinary: VecDeque<Work>,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    filled: Condvar,
    /// Time that all threads together have worked, in nanoseconds.
    busy: AtomicU64,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends the threads when it is dropped.
struct Closer(Arc<Shared>);

impl Drop for Closer {
    fn drop(&mut self) {
        self.0.queue().closed = true;
        self.0.filled.notify_all();
    }
}

impl Workers {
    /// Starts `threads` threads.
    pub fn start(threads: usize) -> std::io::Result<Self> {
        let threads = threads.max(1);
        let shared = Arc::new(Shared::default());
        for n in 0..threads {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name(format!("reduce-{n}"))
                .spawn(move || serve(&shared))?;
        }
        let places = || Arc::new(Semaphore::new(threads * 2));
        Ok(Self {
            shared: Arc::new(Closer(shared)),
            places: [places(), places()],
            threads,
        })
    }

    /// How many threads there are.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Time that all threads together have worked so far, in nanoseconds.
    pub fn busy_nanos(&self) -> u64 {
        self.shared.0.busy.load(Ordering::Relaxed)
    }

    /// Runs `work` on one of the threads.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, WorkerFailed> {
        self.run_as(false, work).await
    }

    /// Runs `work` on one of the threads, before everything that waits and is not urgent.
    pub async fn run_as<T: Send + 'static>(
        &self,
        urgent: bool,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, WorkerFailed> {
        let place = Arc::clone(&self.places[usize::from(urgent)])
            .acquire_owned()
            .await;
        let place = place.map_err(|_| WorkerFailed)?;
        let (done, result) = oneshot::channel();
        let boxed: Work = Box::new(move || {
            drop(place);
            // A receiver that is gone has lost interest: nothing to tell.
            let _ = done.send(work());
        });
        {
            let mut queue = self.shared.0.queue();
            if urgent {
                queue.urgent.push_back(boxed)
            } else {
                queue.ordinary.push_back(boxed)
            }
        }
        self.shared.0.filled.notify_one();
        result.await.map_err(|_| WorkerFailed)
    }
}

fn next(shared: &Shared) -> Option<Work> {
    let mut queue = shared.queue();
    loop {
        let work = queue.urgent.pop_front().or_else(|| queue.ordinary.pop_front());
        if work.is_some() || queue.closed {
            return work;
        }
        queue = shared.filled.wait(queue).unwrap_or_else(PoisonError::into_inner);
    }
}

fn serve(shared: &Shared) {
    while let Some(work) = next(shared) {
        let began = Instant::now();
        if std::panic::catch_unwind(AssertUnwindSafe(work)).is_err() {
            tracing::error!("a piece of work panicked on a worker thread");
        }
        shared
            .busy
            .fetch_add(began.elapsed().as_nanos() as u64, Ordering::Relaxed);
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

    #[tokio::test]
    async fn urgent_work_goes_before_what_waits() {
        let workers = Workers::start(1).unwrap();
        let order = Arc::new(Mutex::new(Vec::new()));
        let (open, gate) = std::sync::mpsc::channel::<()>();
        let first = {
            let workers = workers.clone();
            tokio::spawn(async move { workers.run(move || gate.recv().unwrap()).await.unwrap() })
        };
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        let mut tasks = Vec::new();
        for urgent in [false, true] {
            let (workers, order) = (workers.clone(), Arc::clone(&order));
            tasks.push(tokio::spawn(async move {
                let note = move || order.lock().unwrap().push(urgent);
                workers.run_as(urgent, note).await.unwrap();
            }));
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        open.send(()).unwrap();
        first.await.unwrap();
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(*order.lock().unwrap(), [true, false]);
        assert!(workers.busy_nanos() > 0);
    }
}
