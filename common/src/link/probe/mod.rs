//! The test of a path to a peer: what `longhaul link PEER` finds out.
//!
//! Owns both ends of the test, under its own protocol [`ALPN_PROBE`]: [`probe`] calls, measures and judges; [`serve_probe`] answers on a link
//! that a listener accepted. The answering end never sends more than it is asked for, reads at most [`BYTES_MAX`] and lives for
//! at most a minute.
//!
//! ```text
//!   two-way stream  -> 8 bytes: the caller's clock (µs since 1970, big endian)       repeated
//!                   <- 8 bytes: the answering clock when they came
//!   one-way streams -> anything; read and thrown away
//!   two-way stream  -> 8 bytes of 0xff: how much was thrown away?
//!                   <- 8 bytes: bytes, 8 bytes: µs in which they came; without the first half second of a longer burst
//! ```
//!
//! Leaves alone how the report is shown, and the address book of peers. What a figure means for a person is in `judge`.

mod answer;
mod judge;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use super::connect::connect;
use super::endpoint::Link;
use super::identity::Identity;
use super::refusal::{LinkError, code};
use super::tls::TlsState;
use super::tuning::LinkSettings;
pub use answer::serve_probe;

use super::{ALPN_PROBE, RecvStream, SendStream, socket};

/// The answering end reads no more than this per link.
pub const BYTES_MAX: u64 = 1 << 30;
/// Clock questions per test.
const QUESTIONS: usize = 20;
const TALLY: [u8; 8] = [0xff; 8];

/// How hard the path is tested.
#[derive(Clone, Copy, Debug)]
pub struct ProbeLimits {
    /// How long data is sent.
    pub time: Duration,
    /// How much is sent at most.
    pub bytes: u64,
}

impl Default for ProbeLimits {
    fn default() -> Self {
        Self {
            time: Duration::from_secs(4),
            bytes: 128 << 20,
        }
    }
}

/// What a test found. `None`: it was not got to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ProbeReport {
    /// Whether every check is good.
    pub ok: bool,
    /// Where it called.
    pub address: String,
    /// Who answered.
    pub peer: Option<Identity>,
    /// From the first packet to the welcome, in milliseconds.
    pub handshake_ms: Option<f64>,
    /// Days until the peer's certificate expires.
    pub peer_certificate_days: Option<f64>,
    /// Days until our certificate expires.
    pub own_certificate_days: Option<f64>,
    /// UDP payload per packet that passes, in bytes.
    pub mtu: Option<u16>,
    /// Smallest round-trip time, in milliseconds.
    pub rtt_min_ms: Option<f64>,
    /// Mean round-trip time of the quiet path, in milliseconds.
    pub rtt_mean_ms: Option<f64>,
    /// Mean difference of one round-trip time to the next, in milliseconds.
    pub jitter_ms: Option<f64>,
    /// How much the peer's clock is ahead of ours, in milliseconds; right to half the smallest round-trip time.
    pub clock_offset_ms: Option<f64>,
    /// Payload that arrived, in bit/s.
    pub rate_bit_per_s: Option<f64>,
    /// Part of the packets that were lost.
    pub loss: Option<f64>,
    /// UDP payload that the test sent, in bytes.
    pub sent_bytes: Option<u64>,
    /// What was checked, in order.
    pub checks: Vec<Check>,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What: `reachable`, `certificate`, `mtu`, `delay`, `clock`, `loss`, `rate`, `buffers`.
    pub name: String,
    /// Whether it is good.
    pub ok: bool,
    /// What was found, in a sentence.
    pub finding: String,
    /// What to do about it, where it is not good.
    pub remedy: Option<String>,
}

/// Tests the path to the program `expected` at `address`. Takes [`ProbeLimits::time`] and a few round trips. Never fails: what
/// cannot be done is in the report.
pub async fn probe(
    address: SocketAddr,
    expected: &Identity,
    tls: &Arc<TlsState>,
    settings: &LinkSettings,
    limits: ProbeLimits,
) -> ProbeReport {
    let mut report = ProbeReport {
        address: address.to_string(),
        ..ProbeReport::default()
    };
    report.own_certificate_days = Some(days_until(tls.not_after()));
    let began = Instant::now();
    let failure = match connect(address, expected, ALPN_PROBE, tls, settings).await {
        Ok(link) => {
            report.handshake_ms = Some(ms(began.elapsed()));
            let failure = measure(&link, settings, limits, &mut report).await.err();
            link.close_and_wait(code::DONE, "the test is over").await;
            failure
        }
        Err(error) => Some(error),
    };
    let granted = socket::granted(settings.socket_buffer).ok();
    report.checks = judge::checks(&report, failure.as_ref(), settings, granted);
    report.ok = report.checks.iter().all(|check| check.ok);
    report
}

async fn measure(
    link: &Link,
    settings: &LinkSettings,
    limits: ProbeLimits,
    report: &mut ProbeReport,
) -> Result<(), LinkError> {
    report.peer = Some(link.peer().clone());
    report.peer_certificate_days = Some(days_until(link.peer_not_after()));
    let patience = settings.idle + limits.time;
    let late = |_| LinkError::Silent {
        address: link.remote_address(),
        idle: patience,
    };
    tokio::time::timeout(patience, ask_clock(link, report))
        .await
        .map_err(late)??;
    let before = link.stats();
    tokio::time::timeout(patience, burst(link, limits, report))
        .await
        .map_err(late)??;
    let after = link.stats();
    let (sent, lost) = (
        after.sent_packets - before.sent_packets,
        after.lost_packets.saturating_sub(before.lost_packets),
    );
    report.loss = (sent > 0).then(|| lost as f64 / sent as f64);
    report.sent_bytes = Some(after.sent_bytes);
    report.mtu = Some(after.mtu);
    Ok(())
}

async fn ask_clock(link: &Link, report: &mut ProbeReport) -> Result<(), LinkError> {
    let (mut ask, mut answer) = link.open_bi().await?;
    let mut samples: Vec<(f64, f64)> = Vec::with_capacity(QUESTIONS);
    for _ in 0..QUESTIONS {
        let (sent_at, sent) = (Instant::now(), micros_since_1970());
        let theirs = question(link, &mut ask, &mut answer, sent.to_be_bytes()).await?;
        let round_trip = sent_at.elapsed();
        let middle = sent as f64 / 1e3 + ms(round_trip) / 2.0;
        samples.push((ms(round_trip), u64::from_be_bytes(theirs) as f64 / 1e3 - middle));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let best = samples.iter().copied().min_by(|a, b| a.0.total_cmp(&b.0));
    let steps: Vec<f64> = samples
        .windows(2)
        .map(|pair| (pair[1].0 - pair[0].0).abs())
        .collect();
    report.rtt_min_ms = best.map(|(rtt, _)| rtt);
    report.clock_offset_ms = best.map(|(_, offset)| offset);
    report.rtt_mean_ms = Some(samples.iter().map(|(rtt, _)| rtt).sum::<f64>() / samples.len() as f64);
    report.jitter_ms = Some(steps.iter().sum::<f64>() / steps.len().max(1) as f64);
    Ok(())
}

async fn question<const N: usize>(
    link: &Link,
    ask: &mut SendStream,
    answer: &mut RecvStream,
    words: [u8; 8],
) -> Result<[u8; N], LinkError> {
    let broken = |error: &dyn std::fmt::Display| LinkError::Broken {
        address: link.remote_address(),
        detail: link.reason_or(error),
    };
    ask.write_all(&words).await.map_err(|error| broken(&error))?;
    let mut reply = [0; N];
    answer
        .read_exact(&mut reply)
        .await
        .map_err(|error| broken(&error))?;
    Ok(reply)
}

/// Sends until the time or the bytes are used up, then asks what arrived.
async fn burst(link: &Link, limits: ProbeLimits, report: &mut ProbeReport) -> Result<(), LinkError> {
    let deadline = Instant::now() + limits.time;
    let left = Arc::new(AtomicU64::new(limits.bytes.min(BYTES_MAX)));
    let mut senders = JoinSet::new();
    for _ in 0..4 {
        senders.spawn(send_until(link.clone(), deadline, Arc::clone(&left)));
    }
    while senders.join_next().await.is_some() {}
    let (mut ask, mut answer) = link.open_bi().await?;
    let tally: [u8; 16] = question(link, &mut ask, &mut answer, TALLY).await?;
    let (bytes, micros) = tally.split_at(8);
    let number = |bytes: &[u8]| bytes.iter().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte));
    let (bytes, micros) = (number(bytes), number(micros));
    report.rate_bit_per_s = (micros > 0).then(|| bytes as f64 * 8e6 / micros as f64);
    Ok(())
}

async fn send_until(link: Link, deadline: Instant, left: Arc<AtomicU64>) {
    // Content does not matter, QUIC encrypts it; small owned pieces keep the send buffer honest.
    const PIECE: u64 = 64 << 10;
    let piece = bytes::Bytes::from(vec![0; PIECE as usize]);
    while Instant::now() < deadline {
        let Ok(mut stream) = link.open_uni(0).await else {
            return;
        };
        for _ in 0..16 {
            let taken = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(PIECE));
            if taken.is_err() || Instant::now() >= deadline {
                let _ = stream.finish();
                return;
            }
            if stream.write_chunk(piece.clone()).await.is_err() {
                return;
            }
        }
        let _ = stream.finish();
    }
}

/// The clock as it goes over the wire.
fn micros_since_1970() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(0)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn days_until(then: SystemTime) -> f64 {
    let left = then
        .duration_since(SystemTime::now())
        .map(|left| left.as_secs_f64());
    left.unwrap_or_else(|past| -past.duration().as_secs_f64()) / 86_400.0
}
