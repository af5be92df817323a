//! Convergence against a simulated guest and link, over virtual time.

use proptest::prelude::*;

use super::*;

const MB: f64 = 1e6;
const TICK: f64 = 0.02;

/// A guest that writes to a hot set, everywhere, and to a disk; all of it only part of the time, if it is bursty.
#[derive(Clone, Copy)]
struct Guest {
    ram: f64,
    hot: f64,
    hot_rate: f64,
    steady: f64,
    disk_used: f64,
    disk_rate: f64,
    /// (period, busy part of it), seconds.
    bursts: Option<(f64, f64)>,
}

const CALM: Guest = Guest {
    ram: 200.0 * MB,
    hot: 1.0 * MB,
    hot_rate: 0.05 * MB,
    steady: 0.0,
    disk_used: 300.0 * MB,
    disk_rate: 0.01 * MB,
    bursts: None,
};

/// The standard run's guest: 48 MiB hot set, 4,000 small writes a second to pages, an fsynced log.
const MIXED: Guest = Guest {
    hot: 50.0 * MB,
    hot_rate: 16.0 * MB,
    disk_rate: 0.3 * MB,
    ..CALM
};

struct Sim {
    guest: Guest,
    /// Bytes per second from a time on.
    steps: Vec<(f64, f64)>,
    page_ratio: f64,
    now: f64,
    goodput: Rate,
    wire: f64,
    /// Memory: of the running pass, dirtied since its sync in the hot set and elsewhere.
    ram: Option<Pass>,
    dirty_rate: Rate,
    disk_dirty: f64,
    round: f64,
    cpu: u8,
    io: Option<u64>,
    decisions: Vec<(f64, Decision)>,
}

#[derive(Clone, Copy, Default)]
struct Pass {
    left: f64,
    first: bool,
    hot: f64,
    cold: f64,
    began: f64,
    passes: u32,
}

enum End {
    /// Predicted, and as it was.
    HandedOver(f64, f64),
    GaveUp,
    TimeOver,
}

impl Sim {
    fn new(guest: Guest, page_ratio: f64, steps: &[(f64, f64)]) -> Self {
        Self {
            guest,
            steps: steps.to_vec(),
            page_ratio,
            now: 0.0,
            goodput: Rate::new(Duration::from_secs(3)),
            wire: 0.0,
            ram: None,
            dirty_rate: Rate::new(Duration::from_secs(3)),
            disk_dirty: 0.0,
            round: guest.disk_used,
            cpu: 0,
            io: None,
            decisions: Vec::new(),
        }
    }

    fn link(&self) -> f64 {
        self.steps
            .iter()
            .rev()
            .find(|(from, _)| *from <= self.now)
            .map_or(0.0, |(_, rate)| *rate)
    }

    fn busy(&self) -> f64 {
        let awake = self
            .guest
            .bursts
            .is_none_or(|(period, busy)| self.now % period < busy);
        if awake {
            1.0 - f64::from(self.cpu) / 100.0
        } else {
            0.0
        }
    }

    fn tick(&mut self) {
        let busy = self.busy();
        let disk_rate = (self.guest.disk_rate * busy).min(self.io.map_or(f64::MAX, |limit| limit as f64));
        self.disk_dirty += disk_rate * TICK;
        let mut room = self.link() * TICK;
        self.wire += room;
        if let Some(pass) = &mut self.ram {
            let guest = &self.guest;
            pass.hot += guest.hot_rate * busy * TICK * (1.0 - pass.hot / guest.hot);
            pass.cold = (pass.cold + guest.steady * busy * TICK).min(guest.ram);
            let ratio = if pass.first { 0.4 } else { self.page_ratio };
            let sent = (room / ratio).min(pass.left);
            pass.left -= sent;
            room -= sent * ratio;
            if pass.left < 1.0 && self.now - pass.began > 0.1 {
                let dirtied = pass.hot + pass.cold;
                let took = self.now - pass.began;
                self.dirty_rate
                    .measured(Duration::from_secs_f64(took), dirtied / took);
                let passes = pass.passes + 1;
                *pass = Pass {
                    left: dirtied,
                    first: false,
                    hot: 0.0,
                    cold: 0.0,
                    began: self.now,
                    passes,
                };
            }
        }
        self.round -= (room / 0.5).min(self.round);
        self.now += TICK;
        self.goodput
            .sample(Duration::from_secs_f64(self.now), self.wire as u64);
    }

    fn view(&self) -> View {
        let dirty_rate = self.dirty_rate.per_second().unwrap_or(0.0);
        let disk_rate =
            (self.guest.disk_rate * self.busy()).min(self.io.map_or(f64::MAX, |limit| limit as f64));
        let measured = (self.guest.hot_rate + self.guest.steady) * self.busy();
        View {
            disks: vec![DiskView {
                dirty: self.disk_dirty as u64,
                unsent: self.round as u64,
                dirty_rate: disk_rate,
            }],
            round_running: self.round >= 1.0,
            ram: self.ram.map(|pass| RamView {
                remaining: pass.left as u64,
                dirty_rate,
                since_sync: Duration::from_secs_f64(self.now - pass.began),
                buffered: 0,
                passes: pass.passes,
            }),
            ram_dirty_rate: Some(measured),
            link: LinkView {
                goodput: self.goodput.per_second().unwrap_or(0.0),
                rtt: Duration::from_millis(80),
                page_ratio: self.page_ratio,
                best_page_ratio: self.page_ratio,
                block_ratio: 0.5,
            },
            device_state: 60_000,
            steps: Duration::from_millis(40),
            cpu_slowed: self.cpu,
            io_limit: self.io,
        }
    }

    fn run(&mut self, policy: &Policy, until: f64) -> End {
        let mut converge = Converge::new();
        while self.now < until {
            (0..12).for_each(|_| self.tick());
            let verdict = converge.decide(Duration::from_secs_f64(self.now), &self.view(), policy);
            assert!(
                !verdict.why.is_empty() && !verdict.why.contains('\n'),
                "{}",
                verdict.why
            );
            if self
                .decisions
                .last()
                .is_none_or(|(_, last)| *last != verdict.decision)
            {
                self.decisions.push((self.now, verdict.decision));
            }
            match verdict.decision {
                Decision::Continue => {}
                Decision::Round => {
                    if self.round < 1.0 {
                        self.round += std::mem::take(&mut self.disk_dirty);
                    }
                }
                Decision::StartRam => {
                    let pass = Pass {
                        left: self.guest.ram,
                        first: true,
                        began: self.now,
                        ..Pass::default()
                    };
                    self.ram.get_or_insert(pass);
                }
                Decision::HandOver { predicted } => {
                    return End::HandedOver(predicted.as_secs_f64(), self.stop());
                }
                Decision::SlowGuest { cpu, io } => {
                    assert!(cpu.is_none_or(|cpu| cpu > self.cpu), "slowing only grows");
                    self.cpu = cpu.unwrap_or(self.cpu);
                    self.io = io.or(self.io);
                }
                Decision::HoldInSync => {
                    self.ram = None;
                    (self.cpu, self.io) = (0, None);
                }
                Decision::GiveUp => return End::GaveUp,
            }
        }
        End::TimeOver
    }

    /// QEMU obeys after a while; then everything that is left crosses.
    fn stop(&mut self) -> f64 {
        (0..6).for_each(|_| self.tick());
        let pass = self.ram.unwrap();
        let bytes = (pass.left + pass.hot + pass.cold) * self.page_ratio
            + (self.disk_dirty + self.round) * 0.5
            + 60_000.0;
        bytes / self.link() + 0.04 + 0.08
    }

    fn count(&self, is: impl Fn(&Decision) -> bool) -> usize {
        self.decisions.iter().filter(|(_, decision)| is(decision)).count()
    }
}

const LINK: &[(f64, f64)] = &[(0.0, 12.5 * MB)];

fn handed_over(sim: &mut Sim, policy: &Policy, until: f64) {
    match sim.run(policy, until) {
        End::HandedOver(predicted, real) => {
            // Just after a step of the link the smoothed goodput is still the old one.
            let off = if sim.steps.len() > 1 {
                real - predicted
            } else {
                (predicted - real).abs()
            };
            assert!(
                off / real.max(predicted) < 0.3,
                "predicted {predicted:.3} s, was {real:.3} s"
            );
            assert!(real < policy.blackout.as_secs_f64() * 1.15, "{real:.3} s");
        }
        End::GaveUp | End::TimeOver => panic!("not handed over: {:?}", sim.decisions),
    }
}

#[test]
fn an_idle_guest_is_handed_over_at_once() {
    let mut sim = Sim::new(CALM, 0.3, LINK);
    handed_over(&mut sim, &Policy::default(), 60.0);
    assert_eq!(sim.count(|decision| *decision == Decision::HoldInSync), 0);
}

#[test]
fn a_hot_set_that_reduces_well_converges_without_slowing_anything() {
    let mut sim = Sim::new(MIXED, 0.02, LINK);
    let all = Policy {
        auto_converge: true,
        io_throttle: true,
        ..Policy::default()
    };
    handed_over(&mut sim, &all, 90.0);
    assert_eq!(
        sim.count(|decision| matches!(decision, Decision::SlowGuest { .. })),
        0
    );
}

#[test]
fn a_hot_set_that_does_not_reduce_is_held_or_slowed_as_allowed() {
    let mut sim = Sim::new(MIXED, 0.9, LINK);
    assert!(matches!(sim.run(&Policy::default(), 600.0), End::TimeOver));
    let holds = sim.count(|decision| *decision == Decision::HoldInSync);
    assert!(
        (1..=12).contains(&holds),
        "{holds} holds in 600 s: {:?}",
        sim.decisions
    );
    let mut sim = Sim::new(MIXED, 0.9, LINK);
    handed_over(
        &mut sim,
        &Policy {
            auto_converge: true,
            ..Policy::default()
        },
        300.0,
    );
    assert!(sim.cpu >= 20);
}

#[test]
fn a_guest_beyond_the_link_is_given_up_in_time() {
    let guest = Guest {
        steady: 30.0 * MB,
        ..MIXED
    };
    let patience = Patience::GiveUp(Duration::from_secs(60));
    let mut sim = Sim::new(guest, 0.9, LINK);
    assert!(matches!(
        sim.run(
            &Policy {
                patience,
                ..Policy::default()
            },
            400.0
        ),
        End::GaveUp
    ));
    assert!(sim.now < 200.0, "after {:.0} s", sim.now);
    let deadline = Some(Duration::from_secs(50));
    let mut sim = Sim::new(guest, 0.9, LINK);
    assert!(matches!(
        sim.run(
            &Policy {
                deadline,
                ..Policy::default()
            },
            400.0
        ),
        End::GaveUp
    ));
    assert!((50.0..51.0).contains(&sim.now));
}

#[test]
fn a_bursty_guest_is_handed_over_in_a_calm_moment() {
    let guest = Guest {
        steady: 40.0 * MB,
        bursts: Some((60.0, 30.0)),
        ..MIXED
    };
    let mut sim = Sim::new(guest, 0.8, LINK);
    handed_over(&mut sim, &Policy::default(), 900.0);
    assert!(
        sim.count(|decision| *decision == Decision::HoldInSync) <= 6,
        "{:?}",
        sim.decisions
    );
}

#[test]
fn a_link_that_falls_and_comes_back_is_waited_for() {
    let mut sim = Sim::new(
        MIXED,
        0.1,
        &[(0.0, 12.5 * MB), (10.0, 1.0 * MB), (80.0, 12.5 * MB)],
    );
    handed_over(&mut sim, &Policy::default(), 400.0);
    assert!(sim.now > 80.0);
    let mut sim = Sim::new(MIXED, 0.1, &[(0.0, 12.5 * MB), (10.0, 0.0)]);
    assert!(
        matches!(sim.run(&Policy::default(), 200.0), End::TimeOver),
        "no link, no handover"
    );
}

#[test]
fn a_disk_beyond_the_link_needs_leave_to_be_throttled() {
    let guest = Guest {
        disk_rate: 40.0 * MB,
        ..CALM
    };
    let mut sim = Sim::new(guest, 0.3, LINK);
    let patience = Patience::GiveUp(Duration::from_secs(60));
    assert!(matches!(
        sim.run(
            &Policy {
                patience,
                ..Policy::default()
            },
            900.0
        ),
        End::GaveUp
    ));
    assert_eq!(
        sim.count(|decision| *decision == Decision::StartRam),
        0,
        "{:?}",
        sim.decisions
    );
    let mut sim = Sim::new(guest, 0.3, LINK);
    handed_over(
        &mut sim,
        &Policy {
            io_throttle: true,
            ..Policy::default()
        },
        900.0,
    );
}

#[test]
fn memory_has_its_turn_between_two_rounds_of_the_disks() {
    let at = Duration::from_secs_f64;
    let mut sim = Sim::new(CALM, 1.0, &[(0.0, 6.0 * MB)]);
    (sim.round, sim.disk_dirty) = (0.0, 2.0 * MB);
    sim.ram = Some(Pass {
        left: 4.0 * MB,
        ..Pass::default()
    });
    sim.goodput.sample(at(0.0), 0);
    sim.goodput.sample(at(1.0), 6_000_000);
    let (view, policy, mut converge) = (sim.view(), Policy::default(), Converge::new());
    let mut next = |seconds| converge.decide(at(seconds), &view, &policy).decision;
    assert_eq!(next(1.0), Decision::Round);
    // The round took 1.5 s, and so much time memory has for itself.
    assert_eq!(next(2.5), Decision::Continue);
    assert_eq!(next(3.9), Decision::Continue);
    assert_eq!(next(4.1), Decision::Round);
    // However long a round takes, the disks wait no longer than this.
    assert_eq!(next(14.1), Decision::Continue);
    assert_eq!(next(16.2), Decision::Round);
}

#[test]
fn the_end_of_the_first_pass_is_not_the_end() {
    // QEMU has next to nothing left of its first pass, and has not looked yet what was written meanwhile.
    let mut sim = Sim::new(CALM, 0.3, LINK);
    (0..2000).for_each(|_| sim.tick());
    sim.ram = Some(Pass::default());
    let decide = |view: &View| {
        let verdict = Converge::new().decide(Duration::ZERO, view, &Policy::default());
        verdict.decision
    };
    let mut view = sim.view();
    assert!(predict(&view).total <= Policy::default().blackout);
    assert_eq!(decide(&view), Decision::Continue);
    view.ram.as_mut().unwrap().passes = 1;
    assert!(matches!(decide(&view), Decision::HandOver { .. }));
}

/// The first pass of a long path is over, with content that took nearly half of its size; what the guest writes again takes far less.
#[test]
fn what_the_first_pass_took_does_not_make_a_try_hopeless() {
    let policy = Policy {
        blackout: Duration::from_millis(600),
        ..Policy::default()
    };
    let mut view = Sim::new(MIXED, 0.46, LINK).view();
    view.ram = Some(RamView {
        remaining: 7_000_000,
        dirty_rate: 17.0 * MB,
        passes: 1,
        ..RamView::default()
    });
    view.link.goodput = 10.7 * MB;
    view.link.rtt = Duration::from_millis(300);
    let given_up = |view: &View| {
        let mut converge = Converge::new();
        let mut decisions = (0..30).map(|second| {
            converge
                .decide(Duration::from_secs(second), view, &policy)
                .decision
        });
        decisions.any(|decision| decision == Decision::HoldInSync)
    };
    view.link.best_page_ratio = 0.23;
    assert!(!given_up(&view));
    // The link is full of it.
    view.link.best_page_ratio = 0.46;
    assert!(given_up(&view));
}

#[test]
fn an_unasked_stop_is_finished_only_if_it_fits() {
    let mut sim = Sim::new(CALM, 0.3, LINK);
    (0..2000).for_each(|_| sim.tick());
    sim.ram = Some(Pass::default());
    let (mut converge, policy) = (Converge::new(), Policy::default());
    assert!(matches!(
        converge
            .unasked(Duration::ZERO, &sim.view(), Duration::ZERO, &policy)
            .decision,
        Decision::HandOver { .. }
    ));
    // It comes too late, but the next one need not.
    let late = Duration::from_secs(1);
    assert_eq!(
        converge
            .unasked(Duration::ZERO, &sim.view(), late, &policy)
            .decision,
        Decision::Continue
    );
    sim.disk_dirty = 40.0 * MB;
    assert_eq!(
        converge
            .unasked(Duration::ZERO, &sim.view(), Duration::ZERO, &policy)
            .decision,
        Decision::Continue
    );
    // An idle guest that can never fit comes to this end each time: it is told so at once, and its patience counts from here.
    let tight = Policy {
        blackout: Duration::from_millis(20),
        patience: Patience::GiveUp(Duration::from_secs(12)),
        ..Policy::default()
    };
    let (mut converge, began) = (Converge::new(), Duration::from_secs(3));
    let view = sim.view();
    assert_eq!(
        converge.unasked(began, &view, Duration::ZERO, &tight).decision,
        Decision::HoldInSync
    );
    let quiet = View { ram: None, ..view };
    assert_ne!(
        converge.decide(began * 2, &quiet, &tight).decision,
        Decision::GiveUp
    );
    let late = began + Duration::from_secs(12);
    assert_eq!(converge.decide(late, &quiet, &tight).decision, Decision::GiveUp);
}

fn survey(guest: &Guest, page_ratio: f64) -> Survey {
    Survey {
        disks: vec![DiskSurvey {
            used: guest.disk_used as u64,
            dirty_rate: guest.disk_rate,
        }],
        ram: guest.ram as u64,
        ram_dirty_rate: guest.hot_rate + guest.steady,
        first_block_ratio: 0.5,
        first_page_ratio: 0.4,
        link: LinkView {
            goodput: 12.5 * MB,
            rtt: Duration::from_millis(80),
            page_ratio,
            best_page_ratio: page_ratio,
            block_ratio: 0.5,
        },
        device_state: 60_000,
        steps: Duration::from_millis(40),
    }
}

#[test]
fn the_forecast_is_what_the_simulation_does() {
    for (guest, page_ratio) in [(CALM, 0.3), (MIXED, 0.02)] {
        let expected = forecast(&survey(&guest, page_ratio), &Policy::default());
        assert!(expected.converges, "{}", expected.why);
        let mut sim = Sim::new(guest, page_ratio, LINK);
        handed_over(&mut sim, &Policy::default(), 90.0);
        let off = (expected.time.as_secs_f64() - sim.now).abs() / sim.now;
        assert!(off < 0.3, "forecast {:?}, was {:.1} s", expected, sim.now);
        assert!(expected.blackout <= Policy::default().blackout);
    }
    let beyond = forecast(
        &survey(
            &Guest {
                steady: 30.0 * MB,
                ..MIXED
            },
            0.9,
        ),
        &Policy::default(),
    );
    assert!(
        !beyond.converges && beyond.why.contains("% of the link"),
        "{}",
        beyond.why
    );
    let tight = Policy {
        blackout: Duration::from_millis(100),
        ..Policy::default()
    };
    let tight = forecast(&survey(&CALM, 0.3), &tight);
    assert!(!tight.converges && tight.why.contains("longer"), "{}", tight.why);
}

#[test]
fn a_rate_is_that_of_its_counter() {
    let mut rate = Rate::new(Duration::from_secs(2));
    assert_eq!(rate.per_second(), None);
    (0..50).for_each(|n| rate.sample(Duration::from_millis(200 * n), 1000 * n));
    assert!((rate.per_second().unwrap() - 5000.0).abs() < 1.0);
    rate.sample(Duration::from_secs(9), 0);
    rate.measured(Duration::from_secs(1), f64::NAN);
    (50..200).for_each(|n| rate.sample(Duration::from_millis(200 * n), 10 * n));
    assert!((rate.per_second().unwrap() - 50.0).abs() < 1.0);
}

fn odd() -> impl Strategy<Value = f64> {
    prop_oneof![
        Just(f64::NAN),
        Just(f64::INFINITY),
        Just(-1.0),
        Just(0.0),
        Just(f64::MAX),
        0.0..1e9
    ]
}

proptest! {
    #[test]
    fn every_view_gets_an_allowed_answer(
        numbers in prop::array::uniform6(odd()), sizes in prop::array::uniform5(any::<u64>()), flags in any::<[bool; 5]>(),
        cpu in any::<u8>(), io in any::<Option<u64>>(),
    ) {
        let view = View {
            disks: vec![DiskView { dirty: sizes[0], unsent: sizes[1], dirty_rate: numbers[0] }; 3],
            round_running: flags[0],
            ram: flags[1].then(|| RamView {
                remaining: sizes[2], dirty_rate: numbers[1], since_sync: Duration::MAX, buffered: sizes[3], passes: u32::MAX,
            }),
            ram_dirty_rate: flags[2].then_some(numbers[2]),
            link: LinkView { goodput: numbers[3], rtt: Duration::from_millis(80), page_ratio: numbers[4], best_page_ratio: numbers[2], block_ratio: numbers[5] },
            device_state: sizes[4],
            steps: Duration::MAX,
            cpu_slowed: cpu,
            io_limit: io,
        };
        let policy = Policy { auto_converge: flags[3], io_throttle: flags[4], ..Policy::default() };
        let mut converge = Converge::new();
        for second in 0..200 {
            let verdict = converge.decide(Duration::from_secs(second), &view, &policy);
            match verdict.decision {
                Decision::HandOver { predicted } => prop_assert!(flags[1] && predicted <= policy.blackout),
                Decision::SlowGuest { cpu: slowed, io: limit } => {
                    prop_assert!(slowed.is_none() || policy.auto_converge && slowed <= Some(90) && slowed > Some(cpu));
                    prop_assert!(limit.is_none() || policy.io_throttle && io.is_none_or(|io| limit < Some(io)));
                }
                Decision::GiveUp => prop_assert!(false, "nobody asked for that"),
                _ => {}
            }
        }
        let survey = Survey {
            disks: vec![DiskSurvey { used: sizes[0], dirty_rate: numbers[0] }],
            ram: sizes[1], ram_dirty_rate: numbers[1], first_block_ratio: numbers[2], first_page_ratio: numbers[2],
            link: view.link, device_state: sizes[2], steps: Duration::MAX,
        };
        prop_assert!(!forecast(&survey, &policy).why.is_empty());
    }
}
