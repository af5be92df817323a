//! The controller alone on a path, simulated: what it reaches, what queue it adds, how fast it finds and follows.

#![allow(clippy::unwrap_used)]

mod congestion_sim;

use congestion_sim::rivals::{Bbr, Cubic};
use congestion_sim::{Outcome, Path, Simulation};
use longhaul_common::link::congestion::Mode;

fn show(name: &str, path: &Path, outcome: &Outcome) {
    println!(
        "{name:28} {:5.1} % lost {:4.1} % queue {:5.1} ms, 99 % {:5.1} ms",
        outcome.goodput / path.payload_rate() * 100.0,
        outcome.lost_part * 100.0,
        outcome.queue_mean * 1e3,
        outcome.queue_99 * 1e3
    );
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
                let warm = simulation.run(5.0);
                let outcome = simulation.run(if mbit > 500.0 { 8.0 } else { 15.0 });
                show(&format!("{mbit} Mbit/s {ms} ms {loss} %"), &path, &outcome);
                let _ = warm;
            }
        }
    }
}

#[test]
fn caps() {
    for (mbit, ms, cap) in [
        (200.0, 80.0, 100.0),
        (1000.0, 0.2, 200.0),
        (60.0, 2.0, 60.0),
        (200.0, 80.0, 200.0),
        (200.0, 80.0, 400.0),
        (400.0, 80.0, 200.0),
    ] {
        let path = Path::new(mbit, ms);
        let mut simulation =
            Simulation::new(path, Mode::Dedicated, 4, 1 << 20, Some((cap * 1e6 / 8.0) as u64));
        simulation.run(3.0);
        let outcome = simulation.run(10.0);
        show(&format!("{mbit} {ms} cap {cap}"), &path, &outcome);
    }
}

#[test]
fn noise() {
    for (mbit, ms) in [(60.0, 2.0), (200.0, 80.0), (100.0, 300.0), (500.0, 0.3)] {
        for (jitter, stalls) in [(0.03, 0.0), (0.05, 0.0), (0.0, 0.03), (0.0, 0.05)] {
            let path = Path {
                jitter,
                stalls,
                ..Path::new(mbit, ms)
            };
            let mut simulation = Simulation::blind(path, 4);
            simulation.run(5.0);
            let outcome = simulation.run(15.0);
            show(&format!("{mbit} {ms} j {jitter} s {stalls}"), &path, &outcome);
        }
    }
}

#[test]
fn steps() {
    for ms in [2.0, 80.0, 300.0] {
        let path = Path::new(100.0, ms);
        let mut simulation = Simulation::blind(path, 4);
        for second in 0..4 {
            show(&format!("{ms} start {second}"), &path, &simulation.run(1.0));
        }
        simulation.run(10.0);
        let slow = Path {
            rate: path.rate / 4.0,
            ..path
        };
        simulation.reshape(slow);
        for second in 0..6 {
            show(&format!("{ms} down {second}"), &slow, &simulation.run(1.0));
        }
        simulation.reshape(path);
        for second in 0..8 {
            show(&format!("{ms} up {second}"), &path, &simulation.run(1.0));
        }
        let long = Path {
            rtt: path.rtt + 0.08,
            ..path
        };
        simulation.reshape(long);
        for second in 0..8 {
            show(&format!("{ms} long {second}"), &long, &simulation.run(1.0));
        }
    }
}

#[test]
fn trace() {
    let Ok(wish) = std::env::var("TRACE") else { return };
    let n: Vec<f64> = wish.split_whitespace().map(|w| w.parse().unwrap()).collect();
    let path = Path {
        jitter: n[3],
        stalls: n[4],
        ..Path::new(n[0], n[1]).lossy(n[2])
    };
    let mut simulation = Simulation::blind(path, 4);
    if let Some(cap) = n.get(7) {
        simulation.budget.set_cap(Some((cap * 1e6 / 8.0) as u64));
    }
    for _ in 0..n[5] as usize {
        let outcome = simulation.run(n[6]);
        let control = simulation.budget.control();
        println!(
            "{:7.2} good {:5.1} % lost {:4.1} % queue {:6.1}/{:6.1} ms  W {:9} ideal {:9.0} {}",
            simulation.now,
            outcome.goodput / path.payload_rate() * 100.0,
            outcome.lost_part * 100.0,
            outcome.queue_mean * 1e3,
            outcome.queue_99 * 1e3,
            simulation.budget.window(),
            path.payload_rate() * path.rtt,
            control.trace()
        );
    }
}

#[test]
fn rivals() {
    for mode in [Mode::Shared, Mode::Background] {
        for (mbit, ms) in [(50.0, 20.0), (50.0, 80.0), (100.0, 40.0)] {
            for queue in [0.5, 1.0, 2.0] {
                for bbr in [false, true] {
                    let mut path = Path::new(mbit, ms);
                    path.queue = path.rate * path.rtt * queue;
                    let rival = || if bbr { Bbr::boxed() } else { Cubic::boxed() };
                    let mut alone = Simulation::new(path, mode, 0, 10 * 1452, None);
                    alone.add_rival(rival());
                    alone.run(10.0);
                    let alone = alone.run(20.0).rivals[0];
                    let mut simulation = Simulation::new(path, mode, 4, 131_072, None);
                    simulation.run(8.0);
                    simulation.add_rival(rival());
                    simulation.run(10.0);
                    let outcome = simulation.run(30.0);
                    let total = outcome.goodput + outcome.rivals[0];
                    println!(
                        "{mode:?} {mbit}/{ms} queue {queue} {} share {:4.1} % of {:5.1} %, rival keeps {:5.1} % (alone {:5.1} %)",
                        if bbr { "bbr  " } else { "cubic" },
                        outcome.goodput / total * 100.0,
                        total / path.payload_rate() * 100.0,
                        outcome.rivals[0] / alone * 100.0,
                        alone / path.payload_rate() * 100.0
                    );
                }
            }
        }
    }
}

#[test]
fn tracerival() {
    if std::env::var("TRACER").is_err() {
        return;
    };
    let path = Path::new(50.0, 80.0);
    let path = Path {
        queue: path.rate * path.rtt,
        ..path
    };
    let mut simulation = Simulation::new(path, Mode::Shared, 4, 131_072, None);
    simulation.run(8.0);
    simulation.add_rival(Bbr::boxed());
    for _ in 0..60 {
        let outcome = simulation.run(0.25);
        let control = simulation.budget.control();
        println!(
            "{:7.2} good {:5.1} % rival {:5.1} lost {:4.1} % queue {:6.1}/{:6.1} ms  W {:9} {}",
            simulation.now,
            outcome.goodput / path.payload_rate() * 100.0,
            outcome.rivals[0] / path.payload_rate() * 100.0,
            outcome.lost_part * 100.0,
            outcome.queue_mean * 1e3,
            outcome.queue_99 * 1e3,
            simulation.budget.window(),
            control.trace()
        );
    }
}
