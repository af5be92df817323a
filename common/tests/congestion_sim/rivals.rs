//! Other people's connections: Cubic (RFC 9438, without slow start's refinements) and a BBR (version 1's model: ten-round maximum of
//! the delivery rate, gain cycle of eight phases, two products in flight, the least delay measured anew every ten seconds).

use std::collections::VecDeque;

use super::PACKET;

const SEGMENT: f64 = PACKET as f64;

/// A sender's decisions; seconds and bytes.
pub trait Rival {
    fn on_sent(&mut self, now: f64, number: u64);
    fn on_ack(&mut self, now: f64, sent: f64, bytes: f64, number: u64);
    fn on_lost(&mut self, now: f64, sent: f64, bytes: f64, number: u64);
    fn window(&self) -> f64;
    fn pacing(&self) -> Option<f64>;
}

pub struct Cubic {
    window: f64,
    threshold: f64,
    most: f64,
    epoch: Option<f64>,
    k: f64,
    reno: f64,
    rtt_min: f64,
    recovery_until: f64,
}

impl Cubic {
    pub fn boxed() -> Box<dyn Rival> {
        Box::new(Self {
            window: 10.0 * SEGMENT,
            threshold: f64::INFINITY,
            most: 0.0,
            epoch: None,
            k: 0.0,
            reno: 0.0,
            rtt_min: f64::INFINITY,
            recovery_until: 0.0,
        })
    }
}

impl Rival for Cubic {
    fn on_sent(&mut self, _: f64, _: u64) {}

    fn on_ack(&mut self, now: f64, sent: f64, bytes: f64, _: u64) {
        let rtt = now - sent;
        self.rtt_min = self.rtt_min.min(rtt);
        if self.window < self.threshold {
            self.window += bytes;
            // HyStart: out of slow start when a queue forms.
            if rtt > self.rtt_min + (self.rtt_min / 8.0).clamp(0.004, 0.016) {
                self.threshold = self.window;
            }
            return;
        }
        let began = *self.epoch.get_or_insert_with(|| {
            self.k = ((self.most - self.window).max(0.0) / SEGMENT / 0.4).cbrt();
            self.reno = self.window;
            now
        });
        let t = now - began + self.rtt_min;
        let cubic = 0.4 * (t - self.k).powi(3) * SEGMENT + self.most.max(self.window.min(self.most));
        self.reno += 3.0 * 0.3 / 1.7 * SEGMENT * bytes / self.window;
        let wanted = cubic.max(self.reno).min(1.5 * self.window);
        if wanted > self.window {
            self.window += (wanted - self.window) * bytes / self.window;
        }
    }

    fn on_lost(&mut self, now: f64, sent: f64, _: f64, _: u64) {
        if sent < self.recovery_until {
            return;
        }
        self.recovery_until = now;
        // Fast convergence.
        self.most = if self.window < self.most {
            self.window * 0.85
        } else {
            self.window
        };
        self.window = (self.window * 0.7).max(2.0 * SEGMENT);
        self.threshold = self.window;
        self.epoch = None;
    }

    fn window(&self) -> f64 {
        self.window
    }

    fn pacing(&self) -> Option<f64> {
        None
    }
}

pub struct Bbr {
    sent: VecDeque<(u64, f64, f64)>,
    delivered: f64,
    rates: VecDeque<(u64, f64)>,
    round: u64,
    round_ends: u64,
    next: u64,
    rtt_min: f64,
    rtt_at: f64,
    phase: usize,
    phase_at: f64,
    full: f64,
    full_rounds: u32,
    state: State,
    probe_until: f64,
}

#[derive(PartialEq)]
enum State {
    Startup,
    Drain,
    Bandwidth,
    Rtt,
}

const CYCLE: [f64; 8] = [1.25, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0];

impl Bbr {
    pub fn boxed() -> Box<dyn Rival> {
        Box::new(Self {
            sent: VecDeque::new(),
            delivered: 0.0,
            rates: VecDeque::new(),
            round: 0,
            round_ends: 0,
            next: 0,
            rtt_min: f64::INFINITY,
            rtt_at: 0.0,
            phase: 2,
            phase_at: 0.0,
            full: 0.0,
            full_rounds: 0,
            state: State::Startup,
            probe_until: 0.0,
        })
    }

    fn rate(&self) -> f64 {
        self.rates.iter().fold(0.0, |most, (_, rate)| most.max(*rate))
    }

    fn product(&self) -> f64 {
        if self.rtt_min.is_finite() {
            self.rate() * self.rtt_min
        } else {
            10.0 * SEGMENT
        }
    }

    fn gain(&self) -> f64 {
        match self.state {
            State::Startup => 2.885,
            State::Drain => 1.0 / 2.885,
            State::Bandwidth => CYCLE[self.phase],
            State::Rtt => 1.0,
        }
    }

    fn advance(&mut self, now: f64) {
        match self.state {
            State::Startup if self.full_rounds >= 3 => self.state = State::Drain,
            State::Drain if self.in_flight() <= self.product() => {
                (self.state, self.phase_at) = (State::Bandwidth, now);
            }
            State::Bandwidth => {
                let drained = CYCLE[self.phase] < 1.0 && self.in_flight() <= self.product();
                if now - self.phase_at > self.rtt_min || drained {
                    (self.phase, self.phase_at) = ((self.phase + 1) % 8, now);
                }
                if now - self.rtt_at > 10.0 {
                    (self.state, self.probe_until) = (State::Rtt, now + 0.2 + self.rtt_min);
                    self.rtt_min = f64::INFINITY;
                }
            }
            State::Rtt if now > self.probe_until => {
                (self.state, self.rtt_at, self.phase_at) = (State::Bandwidth, now, now);
            }
            _ => {}
        }
    }

    fn in_flight(&self) -> f64 {
        self.sent.len() as f64 * SEGMENT
    }
}

impl Rival for Bbr {
    fn on_sent(&mut self, now: f64, number: u64) {
        self.sent.push_back((number, now, self.delivered));
        self.next = number + 1;
    }

    fn on_ack(&mut self, now: f64, sent: f64, bytes: f64, number: u64) {
        self.delivered += bytes;
        let rtt = now - sent;
        if rtt <= self.rtt_min {
            (self.rtt_min, self.rtt_at) = (rtt, now);
        }
        let mut sample = None;
        while self.sent.front().is_some_and(|(of, ..)| *of <= number) {
            sample = self.sent.pop_front();
        }
        if let Some((_, at, delivered)) = sample {
            let rate = (self.delivered - delivered) / (now - at);
            match self.rates.back_mut().filter(|(round, _)| *round == self.round) {
                Some((_, most)) => *most = most.max(rate),
                None => self.rates.push_back((self.round, rate)),
            }
        }
        if number >= self.round_ends {
            (self.round, self.round_ends) = (self.round + 1, self.next);
            let oldest = self.round.saturating_sub(10);
            self.rates.retain(|(round, _)| *round >= oldest);
            if self.rate() > 1.25 * self.full {
                (self.full, self.full_rounds) = (self.rate(), 0);
            } else {
                self.full_rounds += 1;
            }
        }
        self.advance(now);
    }

    fn on_lost(&mut self, _: f64, _: f64, _: f64, _: u64) {}

    fn window(&self) -> f64 {
        match self.state {
            State::Rtt => 4.0 * SEGMENT,
            State::Startup | State::Drain => (2.885 * self.product()).max(10.0 * SEGMENT),
            State::Bandwidth => (2.0 * self.product()).max(4.0 * SEGMENT),
        }
    }

    fn pacing(&self) -> Option<f64> {
        (self.rate() > 0.0).then(|| self.gain() * self.rate())
    }
}
