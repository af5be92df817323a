//! A bottleneck under virtual time, with our own flows and others on it: deterministic, no socket, no clock.
//!
//! Owns the path (drop-tail queue, rate, random loss, jitter, steps), what quinn does around a controller (pacing at 1.25 windows per
//! smoothed round-trip time in bursts of ten packets, an acknowledgement for ten packets or 5 ms, loss after three later packets) and
//! simple models of TCP's Cubic (RFC 9438) and of a BBR. Leaves the judging to the tests. The models are honest in what
//! decides a contest for a queue, and nothing more: no slow receivers, no timeouts.

#![allow(dead_code, unreachable_pub, reason = "each test program uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

mod path;
pub mod rivals;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::{Duration, Instant};

use longhaul_common::link::congestion::{Budget, ControlConfig, MemberAcks, MemberId, Mode};
pub use path::{Outcome, Path};
use rivals::Rival;

pub const PACKET: u64 = 1452;
/// Bytes of a packet on the bottleneck.
const WIRE: f64 = 1480.0;
const ACK_DELAY: f64 = 0.005;
const ACK_PACKETS: u32 = 10;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Event {
    /// A packet of a sender is at the receiver.
    Arrive { sender: usize, number: u64 },
    /// A receiver's patience for an acknowledgement is over.
    AckTimer { sender: usize, serial: u64 },
    /// An acknowledgement for all that arrived by then is back.
    Ack { sender: usize, serial: u64 },
    /// A sender may look again.
    Wake { sender: usize },
}

#[derive(Clone, Copy, Debug)]
struct Sent {
    number: u64,
    at: f64,
}

/// What brings data to the bottleneck.
enum Kind {
    Own(MemberId),
    Rival(Box<dyn Rival>),
}

struct Sender {
    kind: Kind,
    alive: bool,
    /// Bytes that the application has; infinite for bulk.
    offered: f64,
    in_flight: VecDeque<Sent>,
    next: u64,
    srtt: f64,
    tokens: f64,
    tokens_at: f64,
    wake_at: f64,
    // The receiver's side.
    arrived: Vec<u64>,
    newest_arrived: f64,
    serial: u64,
    acks: VecDeque<(u64, f64, Vec<u64>)>,
    acked: f64,
    lost: f64,
}

pub struct Simulation {
    pub budget: Budget,
    path: Path,
    start: Instant,
    pub now: f64,
    busy_until: f64,
    events: BinaryHeap<Reverse<(u64, u64, usize)>>,
    table: Vec<Event>,
    free: Vec<usize>,
    order: u64,
    senders: Vec<Sender>,
    random: u64,
    queue_samples: Vec<f32>,
    stalled: (f64, f64),
}

impl Simulation {
    pub fn new(path: Path, mode: Mode, flows: usize, initial_window: u64, cap: Option<u64>) -> Self {
        let start = Instant::now();
        let mut budget = Budget::new(
            ControlConfig {
                mode,
                initial_window,
                packet: PACKET,
            },
            start,
        );
        budget.set_cap(cap);
        let mut simulation = Self {
            budget,
            path,
            start,
            now: 0.0,
            busy_until: 0.0,
            events: BinaryHeap::new(),
            table: Vec::new(),
            free: Vec::new(),
            order: 0,
            senders: Vec::new(),
            random: 0x9E37_79B9_7F4A_7C15,
            queue_samples: Vec::new(),
            stalled: (0.0, 0.0),
        };
        for _ in 0..flows {
            let id = simulation.budget.join(start);
            simulation.add(Kind::Own(id));
        }
        simulation
    }

    /// One that knows nothing of the path.
    pub fn blind(path: Path, flows: usize) -> Self {
        Self::new(path, Mode::Dedicated, flows, 32_768 * flows as u64, None)
    }

    pub fn seed(mut self, seed: u64) -> Self {
        self.random = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        self
    }

    pub fn reshape(&mut self, path: Path) {
        self.path = path;
    }

    pub fn add_rival(&mut self, rival: Box<dyn Rival>) -> usize {
        self.add(Kind::Rival(rival))
    }

    /// Stops a sender as if its connection had died: nothing comes back any more.
    pub fn kill(&mut self, sender: usize) {
        self.senders[sender].alive = false;
    }

    /// What the application of `sender` has to send from now on, in bytes.
    pub fn offer(&mut self, sender: usize, bytes: f64) {
        self.senders[sender].offered = bytes;
        self.schedule(self.now, Event::Wake { sender });
    }

    fn add(&mut self, kind: Kind) -> usize {
        let sender = self.senders.len();
        self.senders.push(Sender {
            kind,
            alive: true,
            offered: f64::INFINITY,
            in_flight: VecDeque::new(),
            next: 0,
            srtt: 0.0,
            tokens: 10.0 * PACKET as f64,
            tokens_at: self.now,
            wake_at: f64::INFINITY,
            arrived: Vec::new(),
            newest_arrived: 0.0,
            serial: 0,
            acks: VecDeque::new(),
            acked: 0.0,
            lost: 0.0,
        });
        self.schedule(self.now, Event::Wake { sender });
        sender
    }

    fn chance(&mut self) -> f64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) as f64 / (1u64 << 53) as f64
    }

    fn schedule(&mut self, at: f64, event: Event) {
        self.order += 1;
        let slot = self.free.pop().unwrap_or_else(|| {
            self.table.push(event);
            self.table.len() - 1
        });
        self.table[slot] = event;
        let nanos = (at.max(self.now) * 1e9).ceil() as u64;
        self.events.push(Reverse((nanos, self.order, slot)));
    }

    fn instant(&self, at: f64) -> Instant {
        self.start + Duration::from_secs_f64(at)
    }

    /// Runs on for `seconds`; what it showed.
    pub fn run(&mut self, seconds: f64) -> Outcome {
        let end = self.now + seconds;
        let before: Vec<(f64, f64)> = self.senders.iter().map(|s| (s.acked, s.lost)).collect();
        self.queue_samples.clear();
        while let Some(Reverse((nanos, _, slot))) = self.events.peek().copied() {
            let at = nanos as f64 / 1e9;
            if at > end {
                break;
            }
            self.events.pop();
            self.free.push(slot);
            self.now = self.now.max(at);
            let event = self.table[slot];
            self.handle(event);
        }
        self.now = end;
        self.outcome(seconds, &before)
    }

    fn outcome(&mut self, seconds: f64, before: &[(f64, f64)]) -> Outcome {
        let mut outcome = Outcome {
            seconds,
            ..Outcome::default()
        };
        let mut lost = 0.0;
        for (sender, (acked, was_lost)) in self.senders.iter().zip(before) {
            let good = (sender.acked - acked) / seconds;
            match sender.kind {
                Kind::Own(_) => {
                    outcome.goodput += good;
                    lost += (sender.lost - was_lost) / seconds;
                    outcome.flows.push(sender.acked - acked);
                }
                Kind::Rival(_) => outcome.rivals.push(good),
            }
        }
        outcome.lost_part = lost / (lost + outcome.goodput).max(1.0);
        let samples = &mut self.queue_samples;
        if !samples.is_empty() {
            outcome.queue_mean = samples.iter().map(|q| f64::from(*q)).sum::<f64>() / samples.len() as f64;
            let at = samples.len() * 99 / 100;
            let (_, high, _) = samples.select_nth_unstable_by(at, f32::total_cmp);
            outcome.queue_99 = f64::from(*high);
        }
        outcome
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Arrive { sender, number } => self.arrive(sender, number),
            Event::AckTimer { sender, serial } => {
                if self.senders[sender].serial == serial && !self.senders[sender].arrived.is_empty() {
                    self.acknowledge(sender);
                }
            }
            Event::Ack { sender, serial } => self.acked(sender, serial),
            Event::Wake { sender } => {
                self.senders[sender].wake_at = f64::INFINITY;
                self.send(sender);
            }
        }
    }

    fn window(&self, sender: usize) -> f64 {
        match &self.senders[sender].kind {
            Kind::Own(_) => {
                let own = self.senders[sender].in_flight.len() as u64 * PACKET;
                self.budget.share(self.instant(self.now)).part(own, PACKET) as f64
            }
            Kind::Rival(rival) => rival.window(),
        }
    }

    fn pace(&self, sender: usize, window: f64) -> f64 {
        let Sender { srtt, kind, .. } = &self.senders[sender];
        match kind {
            Kind::Rival(rival) if rival.pacing().is_some() => rival.pacing().unwrap(),
            _ => 1.25 * window / if *srtt > 0.0 { *srtt } else { 0.1 },
        }
    }

    /// Whether the sending machine stalls now; until when.
    fn stall(&mut self) -> Option<f64> {
        if self.path.stalls <= 0.0 {
            return None;
        }
        while self.now >= self.stalled.1 {
            let pause = self.chance() * 2.0 * self.path.stalls;
            let length = self.chance() * self.path.stalls;
            self.stalled = (self.stalled.1 + pause, self.stalled.1 + pause + length);
        }
        (self.now >= self.stalled.0).then_some(self.stalled.1)
    }

    fn wake(&mut self, sender: usize, at: f64) {
        if self.senders[sender].wake_at > at {
            self.senders[sender].wake_at = at;
            self.schedule(at, Event::Wake { sender });
        }
    }

    fn send(&mut self, sender: usize) {
        if !self.senders[sender].alive {
            return;
        }
        let own = matches!(self.senders[sender].kind, Kind::Own(_));
        if own && let Some(until) = self.stall() {
            return self.wake(sender, until);
        }
        loop {
            let window = self.window(sender);
            let pace = self.pace(sender, window);
            let (now, state) = (self.now, &mut self.senders[sender]);
            let in_flight = state.in_flight.len() as f64 * PACKET as f64;
            if in_flight + PACKET as f64 >= window || state.offered < PACKET as f64 {
                return;
            }
            let capacity = (pace / 1.25 * 0.002).clamp(10.0 * PACKET as f64, 256.0 * PACKET as f64);
            state.tokens = (state.tokens + (now - state.tokens_at) * pace).min(capacity);
            state.tokens_at = now;
            if state.tokens < PACKET as f64 {
                // quinn waits until the bucket is full again; timers have 1 ms.
                let wait = (capacity - state.tokens) / pace;
                let at = ((now + wait) * 1000.0).ceil() / 1000.0;
                return self.wake(sender, at.max(now + 1e-4));
            }
            state.tokens -= PACKET as f64;
            state.offered -= PACKET as f64;
            self.put(sender);
        }
    }

    /// One packet enters the queue.
    fn put(&mut self, sender: usize) {
        let now = self.now;
        let state = &mut self.senders[sender];
        let number = state.next;
        state.next += 1;
        state.in_flight.push_back(Sent { number, at: now });
        let in_flight = state.in_flight.len() as u64 * PACKET;
        match &mut state.kind {
            Kind::Rival(rival) => rival.on_sent(now, number),
            Kind::Own(id) => {
                let id = *id;
                self.budget.on_sent(self.instant(now), id, in_flight);
            }
        }
        let waiting = (self.busy_until - now).max(0.0);
        self.queue_samples.push(waiting as f32);
        if waiting * self.path.rate + WIRE > self.path.queue {
            return;
        }
        self.busy_until = now.max(self.busy_until) + WIRE / self.path.rate;
        if self.path.loss > 0.0 && self.chance() < self.path.loss {
            return;
        }
        let at = self.busy_until + self.path.rtt / 2.0;
        self.schedule(at, Event::Arrive { sender, number });
    }

    fn arrive(&mut self, sender: usize, number: u64) {
        let now = self.now;
        let state = &mut self.senders[sender];
        if !state.alive {
            return;
        }
        let expected = state.arrived.last().is_none_or(|last| *last + 1 == number);
        state.arrived.push(number);
        state.newest_arrived = now;
        let serial = state.serial;
        // TCP acknowledges every second packet; a gap is told at once.
        let together = if matches!(state.kind, Kind::Own(_)) {
            ACK_PACKETS as usize
        } else {
            2
        };
        if state.arrived.len() >= together || !expected {
            self.acknowledge(sender);
        } else if state.arrived.len() == 1 {
            self.schedule(now + ACK_DELAY, Event::AckTimer { sender, serial });
        }
    }

    fn acknowledge(&mut self, sender: usize) {
        let jitter = if self.path.jitter > 0.0 {
            self.chance() * self.path.jitter
        } else {
            0.0
        };
        let now = self.now;
        let at = now + self.path.rtt / 2.0 + jitter;
        let state = &mut self.senders[sender];
        let numbers = std::mem::take(&mut state.arrived);
        let waited = now - state.newest_arrived;
        state.acks.push_back((state.serial, waited, numbers));
        let serial = state.serial;
        state.serial += 1;
        self.schedule(at, Event::Ack { sender, serial });
    }

    fn acked(&mut self, sender: usize, serial: u64) {
        if !self.senders[sender].alive {
            return;
        }
        let own = matches!(self.senders[sender].kind, Kind::Own(_));
        if own && let Some(until) = self.stall() {
            return self.schedule(until, Event::Ack { sender, serial });
        }
        let window = self.window(sender);
        let (now, start) = (self.now, self.start);
        let state = &mut self.senders[sender];
        // One that was overtaken says nothing new: each tells of all before it.
        let (mut numbers, mut ack_delay) = (Vec::new(), 0.0);
        while state.acks.front().is_some_and(|(of, ..)| *of <= serial) {
            if let Some((_, waited, of)) = state.acks.pop_front() {
                numbers.extend(of);
                ack_delay = waited;
            }
        }
        let before = state.in_flight.len() as f64 * PACKET as f64;
        let (mut bytes, mut byte_seconds, mut newest) = (0u64, 0.0, None::<Sent>);
        for number in numbers {
            let Ok(at) = state.in_flight.binary_search_by_key(&number, |sent| sent.number) else {
                continue;
            };
            let Some(sent) = state.in_flight.remove(at) else {
                continue;
            };
            bytes += PACKET;
            byte_seconds += PACKET as f64 * (now - sent.at);
            newest = newest.filter(|newest| newest.number > sent.number).or(Some(sent));
        }
        let Some(newest) = newest else { return };
        state.acked += bytes as f64;
        let delay = now - newest.at - ack_delay;
        state.srtt = if state.srtt == 0.0 {
            delay
        } else {
            (7.0 * state.srtt + delay) / 8.0
        };
        let instant = |at: f64| start + Duration::from_secs_f64(at);
        let limited = state.offered >= PACKET as f64 && before + 12.0 * PACKET as f64 >= 0.75 * window;
        match &mut state.kind {
            Kind::Own(id) => self.budget.on_acks(
                instant(now),
                *id,
                &MemberAcks {
                    newest_sent: instant(newest.at),
                    bytes,
                    in_flight: before as u64,
                    byte_seconds,
                    limited,
                },
            ),
            Kind::Rival(rival) => rival.on_ack(now, newest.at, bytes as f64, newest.number),
        }
        self.find_lost(sender, newest.number);
        self.send(sender);
    }

    fn find_lost(&mut self, sender: usize, newest: u64) {
        let (now, start) = (self.now, self.start);
        let instant = |at: f64| start + Duration::from_secs_f64(at);
        let state = &mut self.senders[sender];
        // Lost is what three later packets overtook.
        let mut lost = Vec::new();
        while state
            .in_flight
            .front()
            .is_some_and(|sent| sent.number + 3 <= newest)
        {
            lost.extend(state.in_flight.pop_front());
        }
        if let Some(last) = lost.last() {
            let bytes = lost.len() as u64 * PACKET;
            state.lost += bytes as f64;
            state.offered += bytes as f64;
            match &mut state.kind {
                Kind::Own(_) => self.budget.on_lost(instant(now), instant(last.at), bytes, false),
                Kind::Rival(rival) => rival.on_lost(now, last.at, bytes as f64, last.number),
            }
        }
    }
}
