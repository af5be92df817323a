//! `dedicated`: fill the configured rate, back off on queueing delay, do not mind random loss.
//!
//! For a link whose rate is known and ours. The window is
//!
//! ```text
//! window = rate x (min_rtt + headroom) x scale          scale in 0.05 ..= 1
//! ```
//!
//! With the true rate configured, `scale` stays 1 and `headroom` worth of bytes stand in the bottleneck's queue: enough that the
//! link never runs dry between two acknowledgements (each is for ten packets). Where less passes than is configured (a slower hop, other traffic), the
//! queueing delay shows it: a window W on a bottleneck c makes a delay W / c, so
//! `scale x (min_rtt + headroom) / (measured delay)` is the right scale in one step. It is looked at once per round trip, with the
//! smallest sample of the round, which is free of acknowledgement delay. Growing back is slow.
//!
//! Loss is ignored below [`DedicatedConfig::loss_guard`]; above it, or when the delay cannot rise because a queue is tiny, the scale goes down.
//! A route that became longer looks like a standing queue: after [`DedicatedConfig::probe_after`] of back-off the window is
//! halved for two rounds and the smallest delay is measured anew.
//!
//! Pure: the clock is an argument, and it knows neither sockets nor quinn.

use std::time::{Duration, Instant};

use super::smooth;
use crate::link::tuning::bytes_in;

/// No link is throttled below this part of its rate.
const SCALE_MIN: f64 = 0.05;
/// Growth per round trip.
const GROWTH: f64 = 0.05;

/// The constants of [`Dedicated`].
#[derive(Clone, Debug)]
pub struct DedicatedConfig {
    /// Window until the first round-trip time is known, in bytes.
    pub initial_window: u64,
    /// Round-trip time assumed until then.
    pub initial_rtt: Duration,
    /// Headroom as a part of the smallest round-trip time.
    pub headroom_part: f64,
    /// Least headroom: covers timers of 1 ms and bursts of offloaded packets.
    pub headroom_min: Duration,
    /// Most headroom: what we add to everybody's delay.
    pub headroom_max: Duration,
    /// Bytes that the peer acknowledges together.
    pub acknowledged_together: u64,
    /// Part of lost bytes above which loss counts as congestion.
    pub loss_guard: f64,
    /// Back-off this long makes the smallest delay be measured anew.
    pub probe_after: Duration,
}

impl Default for DedicatedConfig {
    fn default() -> Self {
        Self {
            initial_window: 1 << 20,
            initial_rtt: Duration::from_millis(100),
            headroom_part: 0.125,
            headroom_min: Duration::from_millis(4),
            headroom_max: Duration::from_millis(20),
            acknowledged_together: 10 * 1452,
            loss_guard: 0.10,
            probe_after: Duration::from_secs(10),
        }
    }
}

/// The controller's state. See the module's header for how it thinks.
#[derive(Clone, Debug)]
pub struct Dedicated {
    config: DedicatedConfig,
    /// Smallest delay known; `None` before the first acknowledgement.
    rtt_min: Option<Duration>,
    scale: f64,
    round: Round,
    /// Highest packet number sent.
    sent_newest: u64,
    /// Bytes over the last rounds, older ones fading: lost, and all.
    lost: f64,
    total: f64,
    /// Smoothed queueing delay, for figures.
    queueing: Duration,
    /// Since when the scale is below 1 without pause.
    backed_off_since: Option<Instant>,
    /// Rounds left of measuring the smallest delay anew.
    probing: u8,
}

/// What one round trip showed.
#[derive(Clone, Debug)]
struct Round {
    /// Ends when this packet is acknowledged.
    last_packet: u64,
    delay_min: Option<Duration>,
    acked: u64,
    lost: u64,
}

impl Dedicated {
    /// A controller for a new connection.
    pub fn new(config: DedicatedConfig) -> Self {
        let round = Round {
            last_packet: 0,

            delay_min: None,
            acked: 0,
            lost: 0,
        };
        Self {
            config,
            rtt_min: None,
            scale: 1.0,
            round,
            sent_newest: 0,
            lost: 0.0,
            total: 0.0,
            queueing: Duration::ZERO,
            backed_off_since: None,
            probing: 0,
        }
    }

    /// Packet `number` was sent.
    pub fn on_sent(&mut self, _bytes: u64, number: u64) {
        self.sent_newest = self.sent_newest.max(number);
    }

    /// A packet of `bytes` was acknowledged `delay` after it was sent.
    pub fn on_ack(&mut self, _now: Instant, delay: Duration, bytes: u64, _app_limited: bool) {
        let delay = delay.max(Duration::from_micros(1));
        self.round.acked = self.round.acked.saturating_add(bytes);
        self.round.delay_min = Some(self.round.delay_min.map_or(delay, |least| least.min(delay)));
        if self.probing == 0 {
            self.rtt_min = Some(self.rtt_min.map_or(delay, |least| least.min(delay)));
        }
    }

    /// The acknowledgements of one packet are through; `largest` is the newest packet known to have arrived, `rate` the
    /// configured rate in bytes/s.
    pub fn on_end_acks(&mut self, now: Instant, largest: Option<u64>, rate: u64) {
        if largest.is_some_and(|largest| largest >= self.round.last_packet) {
            self.end_round(now, rate);
        }
    }

    /// `bytes` were declared lost (0: the path marked packets instead of dropping them).
    pub fn on_loss(&mut self, now: Instant, bytes: u64, persistent: bool) {
        self.round.lost = self.round.lost.saturating_add(bytes);
        if bytes == 0 {
            self.back_off(now, 0.9);
        }
        if persistent {
            self.back_off(now, 0.5);
        }
    }

    /// Bytes that may be in flight on a link of `rate` bytes/s.
    pub fn window(&self, rate: u64) -> u64 {
        let Some(rtt_min) = self.rtt_min else {
            return self
                .config
                .initial_window
                .min(bytes_in(rate, self.config.initial_rtt));
        };
        let full = bytes_in(rate, rtt_min.saturating_add(self.headroom(rtt_min, rate)));
        let part = if self.probing > 0 {
            self.scale * 0.5
        } else {
            self.scale
        };
        (full as f64 * part) as u64
    }

    /// The window before anything was measured.
    pub fn initial_window(&self) -> u64 {
        self.config.initial_window
    }

    /// The part of the configured rate that the path is believed to carry, 0.05 to 1.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// Smoothed queueing delay.
    pub fn queueing(&self) -> Duration {
        self.queueing
    }

    fn headroom(&self, rtt_min: Duration, rate: u64) -> Duration {
        let config = &self.config;
        let part = rtt_min
            .mul_f64(config.headroom_part)
            .clamp(config.headroom_min, config.headroom_max);
        // What arrived and waits for its acknowledgement is in flight for us: on a slow link that is a long time.
        let waiting = config.acknowledged_together as f64 / rate.max(1000) as f64;
        part + Duration::from_secs_f64(waiting.min(0.5))
    }

    fn end_round(&mut self, now: Instant, rate: u64) {
        let next = Round {
            last_packet: self.sent_newest + 1,

            delay_min: None,
            acked: 0,
            lost: 0,
        };
        let round = std::mem::replace(&mut self.round, next);
        self.lost = self.lost * 0.875 + round.lost as f64;
        self.total = self.total * 0.875 + round.lost as f64 + round.acked as f64;
        let Some(delay) = round.delay_min else { return };
        if self.probing > 0 {
            self.probe(delay, now);
            return;
        }
        let rtt_min = self.rtt_min.unwrap_or(delay);
        let queueing = delay.saturating_sub(rtt_min);
        self.queueing = smooth(self.queueing, queueing);
        self.adjust(now, rtt_min, queueing, rate);
        let stuck = self.backed_off_since.is_some_and(|since| {
            now.saturating_duration_since(since) > self.config.probe_after.max(rtt_min * 20)
        });
        if stuck {
            self.probing = 2;
        }
    }

    fn adjust(&mut self, now: Instant, rtt_min: Duration, queueing: Duration, rate: u64) {
        let headroom = self.headroom(rtt_min, rate);
        let wanted = rtt_min.saturating_add(headroom).as_secs_f64();
        let measured = rtt_min.saturating_add(queueing).as_secs_f64();
        let enough_bytes = self.total > 64.0 * 1200.0;
        if enough_bytes && self.lost > self.config.loss_guard * self.total {
            let part = self.lost / self.total;
            (self.lost, self.total) = (0.0, 0.0);
            self.back_off(now, 1.0 - part / 2.0);
        } else if queueing > headroom.mul_f64(1.5) {
            self.back_off(now, wanted / measured);
        } else if queueing < headroom && self.scale < 1.0 {
            self.scale = (self.scale + GROWTH * self.scale.max(0.2)).min(1.0);
        }
        if self.scale >= 1.0 {
            self.backed_off_since = None;
        }
    }

    fn back_off(&mut self, now: Instant, part: f64) {
        self.scale = (self.scale * part.clamp(0.25, 1.0)).clamp(SCALE_MIN, 1.0);
        if self.backed_off_since.is_none() {
            self.backed_off_since = Some(now);
        }
    }

    /// The first round of a probe drains the queue, the second measures.
    fn probe(&mut self, delay: Duration, now: Instant) {
        self.probing -= 1;
        if self.probing == 0 {
            self.rtt_min = Some(delay);
            self.backed_off_since = Some(now);
        }
    }
}

#[cfg(test)]
mod tests;
