//! What the guest says on its serial console.
//!
//! Owns whole lines, the heartbeat, the throughput and the acknowledgements with their rhythm. Leaves alone
//! what is counted. Promises that a line is written in one piece, and that an acknowledgement never goes back.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Time between two heartbeats.
pub const HEARTBEAT: Duration = Duration::from_millis(50);
/// Time between two looks at what was acknowledged.
const ACKNOWLEDGE: Duration = Duration::from_millis(100);

/// The console and what is counted for it.
#[derive(Debug)]
pub struct Console {
    start: Instant,
    operations: AtomicU64,
    /// Stream: acknowledged, and said.
    streams: Mutex<BTreeMap<String, (u64, u64)>>,
}

impl Console {
    /// Starts the heartbeat and the other regular lines.
    pub(super) fn start() -> Self {
        let start = Instant::now();
        std::thread::spawn(move || {
            let (mut beat, mut due) = (0_u64, start);
            loop {
                beat += 1;
                write_line(&format!("HB {beat} {}", start.elapsed().as_millis()));
                // By the clock, not by sleeping, so that a late beat does not shift the next; after a long delay
                // none is made up for: the counter always goes up by one.
                due = (due + HEARTBEAT).max(Instant::now());
                std::thread::sleep(due.saturating_duration_since(Instant::now()));
            }
        });
        Self {
            start,
            operations: AtomicU64::new(0),
            streams: Mutex::default(),
        }
    }

    /// Says a line.
    pub fn say(&self, line: &str) {
        write_line(line);
    }

    /// Counts operations.
    pub fn count(&self, operations: u64) {
        self.operations.fetch_add(operations, Ordering::Relaxed);
    }

    /// Records 1 to `upto` of a stream are durable.
    pub fn acknowledge(&self, stream: &str, upto: u64) {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = streams.get_mut(stream) {
            entry.0 = entry.0.max(upto);
        } else {
            streams.insert(stream.to_owned(), (upto, 0));
        }
    }

    /// Says every acknowledgement, grown or not.
    pub(super) fn say_acknowledged(&self) {
        for (stream, upto) in self.grown(true) {
            write_line(&format!("ACK {stream} {upto}"));
        }
    }

    fn grown(&self, all: bool) -> Vec<(String, u64)> {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        let mut grown = Vec::new();
        for (stream, (upto, said)) in streams.iter_mut() {
            if all || upto > said {
                *said = *upto;
                grown.push((stream.clone(), *upto));
            }
        }
        grown
    }

    /// Says throughput every second and acknowledgements as they grow, for ever.
    pub(super) fn report(self: &Arc<Self>) {
        let console = Arc::clone(self);
        std::thread::spawn(move || {
            let mut round = 0_u64;
            loop {
                std::thread::sleep(ACKNOWLEDGE);
                for (stream, upto) in console.grown(false) {
                    write_line(&format!("ACK {stream} {upto}"));
                }
                round += 1;
                if round.is_multiple_of(10) {
                    let operations = console.operations.load(Ordering::Relaxed);
                    write_line(&format!(
                        "TP {operations} {}",
                        console.start.elapsed().as_millis()
                    ));
                }
            }
        });
    }
}

/// One write for the whole line: lines of several threads do not mix.
fn write_line(line: &str) {
    let mut out = std::io::stdout().lock();
    // A console that takes nothing is no reason to stop the workload.
    let _ = out.write_all(format!("{line}\n").as_bytes());
    let _ = out.flush();
}
