//! The controller alone on a simulated path: what it reaches, what queue it adds, how fast it finds and follows.
//!
//! `LONGHAUL_TRACE="MBIT RTT_MS LOSS_PERCENT JITTER_MS STALL_MS SECONDS [CAP_MBIT]"` prints one run, four lines a second:
//! `LONGHAUL_TRACE="60 300 1 0 0 10" cargo test -p longhaul-common --test congestion_path -- --nocapture trace`.

#![allow(clippy::unwrap_used)]

mod congestion_sim;

use congestion_sim::{Outcome, Path, Simulation};
use longhaul_common::link::congestion::Mode;

fn part(outcome: &Outcome, path: &Path) -> f64 {
    outcome.goodput / path.payload_rate()
}

#[test]
fn the_path_is_filled_at_every_rate_delay_and_loss() {
    for mbit in [20.0, 60.0, 200.0, 1000.0] {
        for ms in [2.0, 30.0, 80.0, 300.0] {
            for loss in [0.0, 0.5, 1.0, 3.0, 5.0] {
                if mbit > 500.0 && ![0.0, 1.0].contains(&loss) {
                    continue;
                }
                let path = Path::new(mbit, ms).lossy(loss);
                let mut simulation = Simulation::blind(path, 4);
                simulation.run(5.0);
                let outcome = simulation.run(if mbit > 500.0 { 3.0 } else { 6.0 });
                // What random loss takes is lost to everybody.
                let least = 0.985 - loss / 100.0;
                // A slow link is burst by bursts: ten packets of four connections are 24 ms at 20 Mbit/s.
                let queue = if mbit < 50.0 { 0.045 } else { 0.025 };
                let good = part(&outcome, &path) > least && outcome.queue_mean < queue;
                assert!(good, "{mbit} Mbit/s, {ms} ms, {loss} %: {outcome:?}");
            }
        }
    }
}

#[test]
fn a_rate_nobody_told_is_found_within_some_round_trips() {
    for (ms, seconds) in [(2.0, 0.3), (30.0, 0.6), (80.0, 1.2), (300.0, 3.6)] {
        let path = Path::new(100.0, ms);
        let mut simulation = Simulation::blind(path, 4);
        simulation.run(seconds);
        let outcome = simulation.run(1.0);
        assert!(part(&outcome, &path) > 0.9, "{ms} ms: {outcome:?}");
    }
}

#[test]
fn a_cap_is_kept_and_reached_whatever_the_path() {
    for (mbit, ms, cap) in [
        (200.0, 80.0, 100.0),
        (1000.0, 0.2, 200.0),
        (1000.0, 2.0, 200.0),
        (400.0, 80.0, 200.0),
        (400.0, 300.0, 50.0),
    ] {
        let path = Path::new(mbit, ms);
        let bytes = cap * 1e6 / 8.0;
        let mut simulation = Simulation::new(path, Mode::Dedicated, 4, 1 << 20, Some(bytes as u64));
        simulation.run(4.0);
        let outcome = simulation.run(10.0);
        let part = outcome.goodput / bytes;
        assert!(
            (0.9..1.06).contains(&part),
            "{mbit} Mbit/s, {ms} ms, cap {cap}: {part:.3}"
        );
        assert!(
            outcome.queue_mean < 0.003,
            "no queue below the path's rate: {outcome:?}"
        );
    }
}

#[test]
fn a_configured_rate_above_the_paths_is_no_promise() {
    let path = Path::new(50.0, 30.0);
    // 200 Mbit/s and 80 ms were configured: half of that product goes out at first.
    let mut simulation = Simulation::new(path, Mode::Dedicated, 4, 1_000_000, Some(25_000_000));
    simulation.run(2.0);
    let outcome = simulation.run(10.0);
    assert!(
        part(&outcome, &path) > 0.97 && outcome.queue_mean < 0.025,
        "{outcome:?}"
    );
}

#[test]
fn a_busy_machine_is_not_taken_for_a_queue() {
    for (mbit, ms) in [(60.0, 2.0), (200.0, 80.0), (100.0, 300.0), (500.0, 0.3)] {
        for noise in [0.03, 0.05] {
            let path = Path::new(mbit, ms);
            let jitter = Path {
                jitter: noise,
                ..path
            };
            // Stalls take a third of the time; what the queue cannot bridge is gone.
            let stalls = Path {
                stalls: noise,
                ..path
            };
            for (path, least) in [(jitter, 0.9), (stalls, 0.7)] {
                let mut simulation = Simulation::blind(path, 4);
                simulation.run(5.0);
                let outcome = simulation.run(15.0);
                assert!(part(&outcome, &path) > least, "{path:?}: {outcome:?}");
            }
        }
    }
}

#[test]
fn a_path_that_changes_is_followed() {
    for (ms, down, up, longer) in [
        (2.0, 1.0, 1.0, 2.0),
        (80.0, 1.0, 2.0, 4.0),
        (300.0, 5.0, 5.0, 5.0),
    ] {
        let path = Path::new(100.0, ms);
        let mut simulation = Simulation::blind(path, 4);
        simulation.run(10.0);
        let slow = Path {
            rate: path.rate / 4.0,
            ..path
        };
        simulation.reshape(slow);
        simulation.run(down);
        let outcome = simulation.run(2.0);
        let good = part(&outcome, &slow) > 0.95 && outcome.queue_mean < 0.03;
        assert!(good, "a quarter of the rate at {ms} ms: {outcome:?}");
        simulation.reshape(path);
        simulation.run(up);
        let outcome = simulation.run(2.0);
        assert!(
            part(&outcome, &path) > 0.95,
            "the whole rate again at {ms} ms: {outcome:?}"
        );
        let long = Path {
            rtt: path.rtt + 0.08,
            ..path
        };
        simulation.reshape(long);
        simulation.run(longer);
        let outcome = simulation.run(2.0);
        assert!(
            part(&outcome, &long) > 0.9,
            "80 ms longer than {ms} ms: {outcome:?}"
        );
    }
}

#[test]
fn a_queue_too_short_for_ours_costs_little() {
    for loss in [0.0, 1.0] {
        let mut path = Path::new(100.0, 40.0).lossy(loss);
        path.queue = 0.02 * path.rate * path.rtt + 40.0 * 1480.0;
        let mut simulation = Simulation::blind(path, 4);
        simulation.run(8.0);
        let outcome = simulation.run(20.0);
        assert!(
            part(&outcome, &path) > 0.85 && outcome.lost_part < 0.15,
            "{outcome:?}"
        );
    }
}

#[test]
fn a_dead_connections_part_goes_to_the_others() {
    let path = Path::new(100.0, 40.0);
    let mut simulation = Simulation::blind(path, 4);
    simulation.run(5.0);
    simulation.kill(0);
    simulation.run(1.5);
    let outcome = simulation.run(5.0);
    assert!(
        part(&outcome, &path) > 0.97 && outcome.flows[0] == 0.0,
        "{outcome:?}"
    );
    let (least, most) = (
        outcome.flows[1].min(outcome.flows[2]),
        outcome.flows[1].max(outcome.flows[2]),
    );
    assert!(most < 1.3 * least, "equal parts: {outcome:?}");
}

#[test]
fn what_had_little_to_send_starts_again_at_once() {
    let path = Path::new(100.0, 80.0);
    let mut simulation = Simulation::blind(path, 1);
    simulation.run(5.0);
    simulation.offer(0, 0.0);
    simulation.run(20.0);
    simulation.offer(0, f64::INFINITY);
    simulation.run(0.5);
    let outcome = simulation.run(3.0);
    assert!(part(&outcome, &path) > 0.95, "{outcome:?}");
}

#[test]
fn all_that_find_something_to_send_at_once_share_the_window() {
    for (mbit, ms) in [(100.0, 80.0), (50.0, 100.0), (250.0, 2.0), (100.0, 300.0)] {
        let path = Path::new(mbit, ms);
        let mut simulation = Simulation::blind(path, 4);
        simulation.run(5.0);
        (0..4).for_each(|flow| simulation.offer(flow, 0.0));
        simulation.run(3.0);
        (0..4).for_each(|flow| simulation.offer(flow, f64::INFINITY));
        let burst = simulation.run(0.5 + 2.0 * path.rtt);
        let outcome = simulation.run(3.0);
        assert!(
            part(&outcome, &path) > 0.95 && burst.lost_part < 0.01,
            "{path:?}: {burst:?}, then {outcome:?}"
        );
    }
}

#[test]
fn trace() {
    let Ok(wish) = std::env::var("LONGHAUL_TRACE") else {
        return;
    };
    let wish: Vec<f64> = wish
        .split_whitespace()
        .map(|word| word.parse().unwrap())
        .collect();
    let path = Path {
        jitter: wish[3] / 1e3,
        stalls: wish[4] / 1e3,
        ..Path::new(wish[0], wish[1]).lossy(wish[2])
    };
    let mut simulation = Simulation::blind(path, 4);
    let cap = wish.get(6).map(|mbit| (mbit * 1e6 / 8.0) as u64);
    simulation.budget.set_cap(cap);
    for _ in 0..(4.0 * wish[5]) as usize {
        let outcome = simulation.run(0.25);
        println!(
            "{:6.2} s: {:5.1} %, lost {:4.1} %, queue {:6.1} ms, window {:9}; {:?}",
            simulation.now,
            part(&outcome, &path) * 100.0,
            outcome.lost_part * 100.0,
            outcome.queue_mean * 1e3,
            simulation.budget.window(),
            simulation.budget.control(),
        );
    }
}
