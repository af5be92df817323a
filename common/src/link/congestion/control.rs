//! One window for all connections to a peer, steered by the queue that it builds. Pure: time is an argument.
//!
//! Owns the law. The window `W` in flight on a path of rate `c` stays there for `W / c`, so a wanted change of the standing queue
//! says by how much the window must change, and no rate has to be known:
//!
//! ```text
//! once per epoch:   W <- W x (1 + (target - queue) / residence)          queue = least delay of the epoch - base delay
//! with a cap:       W <= cap x residence                                 (Little's law: what is in flight / rate = time)
//! ```
//!
//! The queue is the *trough* of an epoch, and for backing off of the last 100 ms: late timers, grouped acknowledgements and a busy
//! machine delay some packets but never all, so they are not taken for a queue. Loss is ignored up to a guard. What the law
//! cannot see is asked of the path by a *dip*, a round trip with less in flight: whether the base delay still holds, and
//! whether a delay that does not yield to backing off is ours at all.
//!
//! Leaves alone the search before it (`search`), who shares the window (`budget`), the contest with others (`rivalry`) and quinn (`plug`).

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::contest::Others;
use super::epoch::{Acks, ControlConfig, Epoch, Mode, Verdict};
use super::rivalry::Rivalry;
use super::search::{Queued, SAMPLES_MIN};

/// Longest time that one stall of a busy machine may hide the truth.
const STALL: Duration = Duration::from_millis(100);
/// A base delay is confirmed at least this often.
const BASE_AGE: Duration = Duration::from_secs(10);
/// `background` believes a longer base delay only after so much time of yielding in vain.
const BASE_AGE_BACKGROUND: Duration = Duration::from_secs(30);
/// The cap is compared with what arrived in at least so much time.
const METER: Duration = Duration::from_millis(100);
/// Part of bytes lost above which loss counts as congestion.
pub(super) const LOSS_GUARD: f64 = 0.10;
/// Growth after a back-off for loss is slow for so long.
pub(super) const LOSS_REST: Duration = Duration::from_secs(5);
/// Most growth and shrinking of one epoch.
const STEP: (f64, f64) = (0.5, 1.25);
/// Growth while the queue stays empty, by how many epochs it has.
const GROWTH: [f64; 5] = [1.0, 1.03, 1.06, 1.12, 1.25];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Doubling per round trip until a queue forms.
    Startup,
    Cruise,
    /// Measuring with less in flight. The second, deeper one decides.
    Dip {
        deep: bool,
    },
}

/// The last back-off for delay, to see whether it helped.
#[derive(Clone, Copy, Debug)]
struct BackOff {
    part: f64,
    rate: f64,
    queue: f64,
}

/// The state. See the module's header for how it thinks.
#[derive(Clone, Debug)]
pub struct Control {
    pub(super) config: ControlConfig,
    pub(super) window: f64,
    pub(super) phase: Phase,
    pub(super) epoch: Epoch,
    /// Smoothed seconds that a byte is in flight.
    pub(super) residence: f64,
    /// The same, smoothed over many epochs.
    pub(super) residence_long: f64,
    /// Bytes/s that arrived in the last whole epoch.
    pub(super) rate: f64,
    pub(super) base: f64,
    /// Troughs of the last epochs.
    pub(super) troughs: VecDeque<(Instant, f64)>,
    pub(super) empty_epochs: usize,
    pub(super) latest_queue: f64,
    /// What showed a queue, while searching.
    pub(super) queued: Queued,
    /// When a sample last came near the base.
    pub(super) touched: Option<Instant>,
    back_off: Option<BackOff>,
    /// Back-offs in a row that did not shorten the queue.
    pub(super) in_vain: u32,
    pub(super) lost: f64,
    pub(super) total: f64,
    pub(super) loss_rest_until: Option<Instant>,
    /// Losses of packets sent before were answered already.
    pub(super) answered: Option<Instant>,
    /// What was seen of them.
    pub(super) others: Others,
    pub(super) cap: Option<f64>,
    /// What the window of the cap must be multiplied with for the rate to come out right.
    pub(super) trim: f64,
    pub(super) metered: (Instant, f64),
    pub(super) rivalry: Rivalry,
}

impl Control {
    /// For a new peer; `now` is any instant before the first event.
    pub fn new(config: ControlConfig, now: Instant) -> Self {
        Self {
            window: config.initial_window.max(4 * config.packet) as f64,
            phase: Phase::Startup,
            epoch: Epoch::new(now),
            residence: 0.0,
            residence_long: 0.0,
            rate: 0.0,
            base: 0.0,
            troughs: VecDeque::new(),
            empty_epochs: 0,
            latest_queue: 0.0,
            queued: Queued::default(),
            touched: None,
            back_off: None,
            in_vain: 0,
            lost: 0.0,
            total: 0.0,
            loss_rest_until: None,
            answered: None,
            others: Others::default(),
            cap: None,
            trim: 1.0,
            metered: (now, 0.0),
            rivalry: Rivalry::default(),
            config,
        }
    }

    /// At most so many bytes/s from now on.
    pub fn set_cap(&mut self, bytes_per_second: Option<u64>) {
        self.cap = bytes_per_second.map(|rate| rate.max(1000) as f64);
    }

    /// A full packet's size changed.
    pub fn set_packet(&mut self, bytes: u64) {
        self.config.packet = bytes.max(1);
    }

    /// Bytes that may be in flight, all connections together.
    pub fn window(&self) -> u64 {
        let wanted = match self.phase {
            Phase::Dip { deep } => self.contest_window().unwrap_or(self.window) * self.dip_part(deep),
            _ => self.contest_window().unwrap_or(self.window),
        };
        let most = self.cap_window().unwrap_or(f64::INFINITY);
        wanted.min(most).max(self.floor()) as u64
    }

    /// How it deals with others.
    pub fn mode(&self) -> Mode {
        self.config.mode
    }

    /// Bytes/s that arrived lately.
    pub fn rate(&self) -> u64 {
        self.rate as u64
    }

    /// The standing queue, in seconds.
    pub fn queue(&self) -> f64 {
        self.troughs.back().map_or(0.0, |(_, queue)| *queue)
    }

    /// Part of the bytes lost lately.
    pub fn loss(&self) -> f64 {
        self.lost / self.total.max(1.0)
    }

    /// Whether the rate is still being searched for.
    pub fn is_starting(&self) -> bool {
        self.phase == Phase::Startup
    }

    pub(super) fn floor(&self) -> f64 {
        (4 * self.config.packet) as f64
    }

    /// `None` without a cap, or before anything is known.
    fn cap_window(&self) -> Option<f64> {
        let cap = self.cap?;
        let window = cap * self.residence_long * self.trim + 1.5 * self.config.packet as f64;
        (self.residence > 0.0).then_some(window)
    }

    /// The standing queue that is aimed at, in seconds: enough to keep the link busy between two acknowledgements, and where the link
    /// is ours until a busy sender has its turn again. Four programs and a guest on two cores at 100 Mbit/s, 80 ms: with 8 ms a move
    /// took 28.0 s, with 16 ms 26.3 s (medians of three, alternated).
    pub(super) fn target(&self) -> f64 {
        match self.config.mode {
            Mode::Dedicated => (self.base / 5.0).clamp(0.004, 0.016),
            Mode::Shared => (self.base / 8.0).clamp(0.004, 0.008),
            Mode::Background => 0.003,
        }
    }

    fn dip_part(&self, deep: bool) -> f64 {
        if deep || self.residence <= 0.0 {
            return 0.5;
        }
        (1.0 - (self.queue() + 0.003) / self.residence).clamp(0.4, 0.97)
    }

    /// One acknowledgement came.
    pub fn on_acks(&mut self, now: Instant, acks: &Acks) -> Verdict {
        self.base = acks.base;
        if acks.queue < (0.02 * acks.base).max(0.001) {
            self.touched = Some(now);
        }
        self.touched.get_or_insert(now);
        let first = self.residence <= 0.0;
        if first {
            self.residence = acks.byte_seconds / acks.bytes.max(1) as f64;
            self.residence_long = self.residence;
        }
        if self.phase == Phase::Startup {
            self.search(now, acks);
        }
        let packet = self.config.packet as f64;
        self.rivalry
            .on_acks(now, acks.bytes, acks.queue, acks.base, packet);
        if let Some((_, most)) = self.fair_part() {
            self.rivalry.keep_within(most);
        }
        self.latest_queue = acks.queue;
        self.meter(now, acks);
        self.count_arrived(now, acks.bytes);
        self.total += acks.bytes as f64;
        if acks.sent < self.epoch.started {
            return Verdict::Stay;
        }
        let epoch = &mut self.epoch;
        if epoch.heard.is_none() {
            epoch.heard = Some(now);
        } else {
            // What the first one acknowledges arrived before.
            epoch.acked += acks.bytes as f64;
            epoch.byte_seconds += acks.byte_seconds;
            epoch.limited += if acks.limited { acks.bytes as f64 } else { 0.0 };
        }
        epoch.queue = epoch.queue.min(acks.queue);
        epoch.samples += 1;
        if self.is_epoch_over(now) {
            return self.end_epoch(now);
        }
        Verdict::Stay
    }

    /// `bytes` sent at `sent` or before were declared lost (0: the path marked packets instead of dropping them).
    pub fn on_lost(&mut self, now: Instant, sent: Instant, bytes: u64, persistent: bool) {
        if sent >= self.epoch.started {
            self.epoch.lost += bytes as f64;
        }
        if self.answered.is_none_or(|at| sent >= at) {
            self.lost += bytes as f64;
            self.total += bytes as f64;
        }
        self.rivalry.on_lost(now, sent, self.config.packet as f64);
        self.yield_to_loss(now, sent);
        if persistent {
            self.window = (self.window / 4.0).max(self.floor());
            self.restart(now);
        }
    }

    /// What is lost of the packets under way is a consequence of the window as it was.
    pub(super) fn answer_losses(&mut self, now: Instant) {
        (self.lost, self.total) = (0.0, 0.0);
        self.answered = Some(now);
    }

    /// Compares what arrives with the cap.
    fn meter(&mut self, now: Instant, acks: &Acks) {
        self.metered.1 += acks.bytes as f64;
        let span = now.saturating_duration_since(self.metered.0);
        if span < METER.max(Duration::from_secs_f64(acks.base.min(10.0))) {
            return;
        }
        let rate = self.metered.1 / span.as_secs_f64();
        self.metered = (now, 0.0);
        self.learn_most(now, rate);
        let (Some(cap), Some(most)) = (self.cap, self.cap_window()) else {
            return;
        };
        let part = cap / rate.max(1.0);
        if part < 1.0 || (self.window >= most && acks.limited) {
            self.trim = (self.trim * part.clamp(0.8, 1.1).sqrt()).clamp(0.5, 8.0);
        }
    }

    fn restart(&mut self, now: Instant) {
        self.phase = Phase::Startup;
        self.back_off = None;
        (self.in_vain, self.empty_epochs, self.queued) = (0, 0, Queued::default());
        self.troughs.clear();
        self.epoch = Epoch::new(now);
    }

    fn is_epoch_over(&self, now: Instant) -> bool {
        let Some(heard) = self.epoch.heard else {
            return false;
        };
        let listened = now.saturating_duration_since(heard);
        let listen = match self.phase {
            Phase::Startup => Duration::ZERO,
            _ => Duration::from_secs_f64((self.base / 2.0).clamp(0.010, 0.050)),
        };
        let enough = listened >= listen && self.epoch.samples >= SAMPLES_MIN;
        enough || listened > 8 * listen.max(STALL)
    }

    fn end_epoch(&mut self, now: Instant) -> Verdict {
        let epoch = std::mem::replace(&mut self.epoch, Epoch::new(now));
        let listened = now
            .saturating_duration_since(epoch.heard.unwrap_or(now))
            .as_secs_f64();
        if epoch.acked > 0.0 && listened > 0.0 {
            self.rate = epoch.acked / listened;
            let residence = epoch.byte_seconds / epoch.acked;
            self.residence += (residence - self.residence) * 0.5;
            self.residence_long +=
                (residence - self.residence_long) * if self.base > 0.02 { 0.5 } else { 0.06 };
        }
        self.lost *= 0.875;
        self.total *= 0.875;
        while self
            .troughs
            .front()
            .is_some_and(|(at, _)| now.saturating_duration_since(*at) > STALL)
        {
            self.troughs.pop_front();
        }
        self.troughs.push_back((now, epoch.queue));
        match self.phase {
            Phase::Startup => {
                if self.is_lossy(now) || self.bound_to_cap() {
                    self.phase = Phase::Cruise;
                }
                Verdict::Stay
            }
            Phase::Cruise => self.cruise(now, &epoch),
            Phase::Dip { deep } => self.end_dip(now, &epoch, deep),
        }
    }

    /// Keeps the window within reach of the cap; whether it was beyond.
    fn bound_to_cap(&mut self) -> bool {
        let Some(most) = self.cap_window() else {
            return false;
        };
        let beyond = self.window > 1.1 * most;
        if beyond {
            self.window = 1.1 * most;
        }
        beyond
    }

    /// Backs off where more is lost than random loss explains; whether it did.
    fn is_lossy(&mut self, now: Instant) -> bool {
        let (lost, total) = (
            self.lost / self.config.packet as f64,
            self.total / self.config.packet as f64,
        );
        // Three deviations above the guard: few packets prove little.
        let explained = LOSS_GUARD * total + 3.0 * (LOSS_GUARD * total).sqrt();
        if total < 64.0 || lost <= explained {
            return false;
        }
        let part = self.loss();
        self.window = (self.window * (1.0 - part).max(STEP.0)).max(self.floor());
        self.answer_losses(now);
        self.loss_rest_until = Some(now + LOSS_REST);
        true
    }

    fn cruise(&mut self, now: Instant, epoch: &Epoch) -> Verdict {
        let target = self.target();
        let trough = self
            .troughs
            .iter()
            .fold(f64::INFINITY, |least, (_, queue)| least.min(*queue));
        let limited = epoch.limited > 0.5 * epoch.acked;
        if let Some(verdict) = self.contend(now, trough, limited) {
            return verdict;
        }
        if self.is_lossy(now) {
            return Verdict::Stay;
        }
        if trough > target {
            self.empty_epochs = 0;
            self.shrink(epoch, trough, target);
        } else if epoch.queue < target && limited {
            self.grow(now, epoch.queue, target);
        }
        self.bound_to_cap();
        self.maybe_dip(now)
    }

    fn grow(&mut self, now: Instant, queue: f64, target: f64) {
        self.back_off = None;
        self.in_vain = 0;
        let natural = 1.0 + (target - queue) / self.residence.max(1e-6);
        let resting = self.loss_rest_until.is_some_and(|until| now < until);
        if queue < target / 2.0 && !resting {
            self.empty_epochs = (self.empty_epochs + 1).min(GROWTH.len() - 1);
        } else {
            self.empty_epochs = 0;
        }
        let most = if resting { 1.01 } else { STEP.1 };
        self.window *= natural.max(GROWTH[self.empty_epochs]).min(most);
    }

    fn shrink(&mut self, epoch: &Epoch, trough: f64, target: f64) {
        // At the floor nothing more can be tried, so that an equal rate proves nothing.
        let at_floor = self.window <= 1.01 * self.floor();
        let helped = self.back_off.is_none_or(|last| {
            // Were the queue ours, less in flight would shorten it and leave the rate as it was.
            let kept = self.rate > last.rate * (1.0 + last.part) / 2.0;
            trough < 0.7 * last.queue || (kept && !at_floor)
        });
        self.in_vain = if helped { 0 } else { self.in_vain + 1 };
        let part = (1.0 + (target - trough) / self.residence.max(1e-6)).clamp(STEP.0, 1.0);
        let significant = part < 0.9 && epoch.acked > 0.0;
        self.back_off = significant.then_some(BackOff {
            part,
            rate: self.rate,
            queue: trough,
        });
        self.window = (self.window * part).max(self.floor());
    }

    fn maybe_dip(&mut self, now: Instant) -> Verdict {
        let age = self
            .touched
            .map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        let doubtful = self.in_vain >= 2 && self.config.mode != Mode::Background;
        if !doubtful && age < BASE_AGE {
            return Verdict::Stay;
        }
        self.phase = Phase::Dip { deep: doubtful };
        self.in_vain = 0;
        Verdict::Listen
    }

    fn end_dip(&mut self, now: Instant, epoch: &Epoch, deep: bool) -> Verdict {
        let near = epoch.queue < 0.002 + 0.05 * self.base;
        self.back_off = None;
        self.phase = Phase::Cruise;
        if let Some(window) = self.rivalry.window() {
            if self.rivalry.is_still_there(!near) {
                return Verdict::Stay;
            }
            self.window = window / 2.0;
            self.rivalry.end();
        }
        if near {
            self.touched = Some(now);
            return Verdict::Rebase;
        }
        if !deep {
            self.phase = Phase::Dip { deep: true };
            return Verdict::Listen;
        }
        let age = self
            .touched
            .map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        if self.config.mode == Mode::Background && age < BASE_AGE_BACKGROUND {
            return Verdict::Stay;
        }
        self.touched = Some(now);
        self.restart(now);
        Verdict::Rebase
    }
}
