//! The answering end of a test.
//!
//! Owns what is said and thrown away on a link that was accepted for a test. Promises: it sends 16 bytes at most for every 8 that
//! came, reads [`BYTES_MAX`] at most, and ends after a minute whatever the caller does. Leaves alone what the figures mean.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use super::super::endpoint::Link;
use super::super::refusal::code;
use super::super::{RecvStream, SendStream};
use super::{BYTES_MAX, TALLY, micros_since_1970};

/// The answering end ends a test after this time.
const TIME_MAX: Duration = Duration::from_secs(60);
/// The rate of a path shows when windows and packet size have settled.
const SETTLING_MICROS: u64 = 500_000;

/// Answers a test on a link that was accepted with [`ALPN_PROBE`](super::super::ALPN_PROBE), until the caller is done or a
/// minute has passed.
pub async fn serve_probe(link: Link) {
    let answered = tokio::time::timeout(TIME_MAX, answer_until_closed(&link)).await;
    if answered.is_err() {
        link.close(code::DONE, "a test may take a minute at most");
    }
}

async fn answer_until_closed(link: &Link) {
    let thrown = Arc::new(Thrown::default());
    let mut tasks = JoinSet::new();
    loop {
        tokio::select! {
            stream = link.accept_uni() => match stream {
                Ok(stream) => drop(tasks.spawn(throw_away(link.clone(), stream, Arc::clone(&thrown)))),
                Err(_) => return,
            },
            streams = link.accept_bi() => match streams {
                Ok((send, receive)) => drop(tasks.spawn(reply(send, receive, Arc::clone(&thrown)))),
                Err(_) => return,
            },
            Some(_) = tasks.join_next(), if !tasks.is_empty() => {}
        }
    }
}

/// What was thrown away so far; times in microseconds after `began`.
struct Thrown {
    began: Instant,
    bytes: AtomicU64,
    /// Of these, what came when the path was full.
    settled: AtomicU64,
    first: AtomicU64,
    last: AtomicU64,
}

impl Default for Thrown {
    fn default() -> Self {
        let zero = || AtomicU64::new(0);
        let first = AtomicU64::new(u64::MAX);
        Self {
            began: Instant::now(),
            bytes: zero(),
            settled: zero(),
            first,
            last: zero(),
        }
    }
}

impl Thrown {
    /// Counts `length` more bytes; answers how many there were before.
    fn note(&self, length: u64) -> u64 {
        let now = u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX);
        let first = self.first.fetch_min(now, Ordering::Relaxed).min(now);
        self.last.fetch_max(now, Ordering::Relaxed);
        if now > first.saturating_add(SETTLING_MICROS) {
            self.settled.fetch_add(length, Ordering::Relaxed);
        }
        self.bytes.fetch_add(length, Ordering::Relaxed)
    }

    /// Bytes, and the microseconds in which they came.
    fn tally(&self) -> (u64, u64) {
        let (first, last) = (
            self.first.load(Ordering::Relaxed),
            self.last.load(Ordering::Relaxed),
        );
        let time = last.saturating_sub(first);
        match time > 2 * SETTLING_MICROS {
            true => (self.settled.load(Ordering::Relaxed), time - SETTLING_MICROS),
            false => (self.bytes.load(Ordering::Relaxed), time),
        }
    }
}

async fn throw_away(link: Link, mut stream: RecvStream, thrown: Arc<Thrown>) {
    while let Ok(Some(chunk)) = stream.read_chunk(1 << 20, false).await {
        if thrown.note(chunk.bytes.len() as u64) > BYTES_MAX {
            link.close(code::DONE, "a test may send 1 GiB at most");
            return;
        }
    }
}

async fn reply(mut send: SendStream, mut receive: RecvStream, thrown: Arc<Thrown>) {
    let mut words = [0; 8];
    while receive.read_exact(&mut words).await.is_ok() {
        let sent = if words == TALLY {
            let (bytes, micros) = thrown.tally();
            let mut tally = [0; 16];
            tally[..8].copy_from_slice(&bytes.to_be_bytes());
            tally[8..].copy_from_slice(&micros.to_be_bytes());
            send.write_all(&tally).await
        } else {
            send.write_all(&micros_since_1970().to_be_bytes()).await
        };
        if sent.is_err() {
            return;
        }
    }
}
