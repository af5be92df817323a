//! [`Dedicated`] on a simulated bottleneck under virtual time: drop-tail queue, random loss, pacing as quinn does it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::{Dedicated, DedicatedConfig};

const PACKET: u64 = 1452;

struct Path {
    /// Bytes per second that the bottleneck passes.
    rate: f64,
    rtt: Duration,
    /// Bytes that its queue holds.
    queue: f64,
    loss: f64,
}

/// What a run showed, from its third second on.
#[derive(Debug)]
struct Outcome {
    goodput: f64,
    lost_part: f64,
    queueing_mean: Duration,
}

struct Flight {
    number: u64,
    sent: Duration,
    /// When the acknowledgement arrives, or when the loss is noticed.
    back: Duration,
    lost: bool,
}

struct Simulation {
    core: Dedicated,
    configured: u64,
    start: Instant,
    now: Duration,
    busy_until: Duration,
    flights: VecDeque<Flight>,
    number: u64,
    next_send: Duration,
    srtt: Duration,
    random: u64,
}

impl Simulation {
    fn new(configured: u64, rtt: Duration) -> Self {
        let initial_window = super::bytes_in(configured, rtt);
        let config = DedicatedConfig {
            initial_window,
            initial_rtt: rtt,
            ..DedicatedConfig::default()
        };
        Self {
            core: Dedicated::new(config),
            configured,
            start: Instant::now(),
            now: Duration::ZERO,
            busy_until: Duration::ZERO,
            flights: VecDeque::new(),
            number: 0,
            next_send: Duration::ZERO,
            srtt: 2 * rtt,
            random: 0x9E37_79B9_7F4A_7C15,
        }
    }

    fn chance(&mut self) -> f64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) as f64 / (1u64 << 53) as f64
    }

    fn run(&mut self, path: &Path, seconds: u64) -> Outcome {
        let (begin, end) = (self.now, self.now + Duration::from_secs(seconds));
        let measured_from = begin + Duration::from_secs(3);
        let (mut good, mut lost, mut queued, mut samples) = (0u64, 0u64, Duration::ZERO, 0u32);
        while self.now < end {
            let window = self.core.window(self.configured).max(4 * PACKET);
            if self.flights.len() as u64 * PACKET < window && self.next_send <= self.now {
                let delay = self.send(path, window);
                if self.now > measured_from {
                    (queued, samples) = (queued + delay, samples + 1);
                }
                continue;
            }
            // Acknowledged are ten packets together, or what waits for 20 ms.
            let patience = |flight: &Flight| flight.back + Duration::from_millis(20);
            let tenth = self.flights.get(9).map_or(Duration::MAX, |flight| flight.back);
            let ack = self.flights.front().map_or(Duration::MAX, patience).min(tenth);
            let can_send = (self.flights.len() as u64) * PACKET < window;
            let next = if can_send { ack.min(self.next_send) } else { ack };
            self.now = self.now.max(next);
            while self.now >= ack && self.flights.front().is_some_and(|flight| flight.back <= self.now) {
                let flight = self.flights.pop_front().unwrap();
                if self.now > measured_from {
                    *(if flight.lost { &mut lost } else { &mut good }) += PACKET;
                }
                self.returned(&flight);
            }
        }
        let measured = (end - measured_from).as_secs_f64();
        Outcome {
            goodput: good as f64 / measured,
            lost_part: lost as f64 / (good + lost).max(1) as f64,
            queueing_mean: queued / samples.max(1),
        }
    }

    /// Sends one packet; answers how long it waits in the queue.
    fn send(&mut self, path: &Path, window: u64) -> Duration {
        self.number += 1;
        self.core.on_sent(PACKET, self.number);
        let per_packet = self.srtt.as_secs_f64() * PACKET as f64 / (1.25 * window as f64);
        // Timers of one millisecond: what was missed since is sent at once.
        let earliest = self.now.saturating_sub(Duration::from_millis(2));
        self.next_send = self.next_send.max(earliest) + Duration::from_secs_f64(per_packet);
        let waiting = self.busy_until.saturating_sub(self.now);
        let full = waiting.as_secs_f64() * path.rate + PACKET as f64 > path.queue;
        let lost = full || self.chance() < path.loss;
        if !full {
            let passing = Duration::from_secs_f64(PACKET as f64 / path.rate);
            self.busy_until = self.now.max(self.busy_until) + passing;
        }
        let back = self.now.max(self.busy_until) + path.rtt;
        self.flights.push_back(Flight {
            number: self.number,
            sent: self.now,
            back,
            lost,
        });
        waiting
    }

    fn returned(&mut self, flight: &Flight) {
        let now = self.start + self.now;
        if flight.lost {
            self.core.on_loss(now, PACKET, false);
            return;
        }
        let delay = self.now - flight.sent;
        self.srtt = super::smooth(self.srtt, delay);
        self.core.on_ack(now, delay, PACKET, false);
        self.core.on_end_acks(now, Some(flight.number), self.configured);
    }
}

const RATE: f64 = 25e6; // 200 Mbit/s
const RTT: Duration = Duration::from_millis(80);
const PRODUCT: f64 = RATE * 0.080;

fn path() -> Path {
    Path {
        rate: RATE,
        rtt: RTT,
        queue: PRODUCT,
        loss: 0.0,
    }
}

#[test]
fn the_configured_rate_is_filled_from_the_third_second() {
    let outcome = Simulation::new(RATE as u64, RTT).run(&path(), 10);
    assert!(outcome.goodput > 0.98 * RATE, "{outcome:?}");
    assert!(outcome.lost_part == 0.0, "{outcome:?}");
    assert!(outcome.queueing_mean < Duration::from_millis(20), "{outcome:?}");
}

#[test]
fn a_slow_short_link_is_filled_in_spite_of_rare_acknowledgements() {
    let (rate, rtt) = (20e6 / 8.0, Duration::from_millis(30));
    let path = Path {
        rate,
        rtt,
        queue: rate * 0.030,
        loss: 0.0,
    };
    let outcome = Simulation::new(rate as u64, rtt).run(&path, 10);
    assert!(
        outcome.goodput > 0.98 * rate && outcome.lost_part == 0.0,
        "{outcome:?}"
    );
}

#[test]
fn random_loss_costs_what_was_lost_and_little_more() {
    for (loss, least) in [(0.005, 0.97), (0.02, 0.94), (0.05, 0.85)] {
        let outcome = Simulation::new(RATE as u64, RTT).run(&Path { loss, ..path() }, 20);
        assert!(outcome.goodput > least * RATE, "loss {loss}: {outcome:?}");
    }
}

#[test]
fn a_rate_configured_too_high_backs_off_to_what_passes() {
    let outcome = Simulation::new(2 * RATE as u64, RTT).run(&path(), 30);
    assert!(outcome.goodput > 0.95 * RATE, "{outcome:?}");
    assert!(outcome.lost_part < 0.05, "{outcome:?}");
    assert!(outcome.queueing_mean < Duration::from_millis(40), "{outcome:?}");
}

#[test]
fn a_link_that_slows_down_is_followed_down_and_up() {
    let mut simulation = Simulation::new(RATE as u64, RTT);
    simulation.run(&path(), 5);
    let slow = Path {
        rate: RATE / 4.0,
        ..path()
    };
    let outcome = simulation.run(&slow, 15);
    assert!(
        outcome.goodput > 0.9 * slow.rate && outcome.lost_part < 0.02,
        "{outcome:?}"
    );
    let outcome = simulation.run(&path(), 15);
    assert!(outcome.goodput > 0.9 * RATE, "{outcome:?}");
}

#[test]
fn a_route_that_became_longer_is_learned() {
    let mut simulation = Simulation::new(RATE as u64, RTT);
    simulation.run(&path(), 5);
    let long = Path {
        rtt: 2 * RTT,
        queue: 2.0 * PRODUCT,
        ..path()
    };
    simulation.run(&long, 30);
    let outcome = simulation.run(&long, 20);
    assert!(outcome.goodput > 0.9 * RATE, "{outcome:?}");
}

#[test]
fn a_queue_much_smaller_than_the_headroom_loses_little() {
    let outcome = Simulation::new(RATE as u64, RTT).run(
        &Path {
            queue: 0.05 * PRODUCT,
            ..path()
        },
        20,
    );
    assert!(outcome.goodput > 0.9 * RATE, "{outcome:?}");
    assert!(outcome.lost_part < 0.10, "{outcome:?}");
}

#[test]
fn four_connections_that_share_a_rate_fill_it_together() {
    // One bottleneck seen by one of four equal senders: a quarter of the rate, the other three being constant.
    let outcome = Simulation::new(RATE as u64 / 4, RTT).run(
        &Path {
            rate: RATE / 4.0,
            queue: PRODUCT / 4.0,
            ..path()
        },
        10,
    );
    assert!(outcome.goodput > 0.97 * RATE / 4.0, "{outcome:?}");
}

#[test]
fn any_sequence_of_events_leaves_a_usable_window() {
    let mut random = Simulation::new(RATE as u64, RTT);
    let start = Instant::now();
    let mut core = Dedicated::new(DedicatedConfig::default());
    let mut now = start;
    for number in 0..200_000u64 {
        now += Duration::from_secs_f64(random.chance() * 0.01);
        let delay = Duration::from_secs_f64(random.chance() * random.chance() * 10.0);
        match (random.chance() * 5.0) as u32 {
            0 => core.on_sent(PACKET, number),
            1 => core.on_ack(now, delay, u64::MAX / 3, false),
            2 => core.on_end_acks(now, Some(number), random.random),
            3 => core.on_loss(now, (random.chance() * 1e9) as u64, random.chance() < 0.1),
            _ => core.on_end_acks(now, None, 0),
        }
        let window = core.window(u64::MAX);
        assert!(window > 0 && (0.05..=1.0).contains(&core.scale()), "{core:?}");
    }
}
