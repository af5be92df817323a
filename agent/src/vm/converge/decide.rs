//! The next step of a live migration.
//!
//! Owns the decision and the little that it remembers: since when there has been no progress, how often it held. Leaves the
//! arithmetic to `blackout`. Promises: it slows, holds and gives up only after a stretch without progress, and each answer that
//! changes the guest is followed by a stretch in which its effect is waited for, so it does not swing.

use std::time::Duration;

use super::blackout::{
    Blackout, disk_load, floor, predict, predict_stopped, ram_load, ratio, sane, transfer, utilisation,
};
use super::{Decision, Patience, Policy, Verdict, View};

/// Progress is a predicted blackout below this part of the best one so far.
const PROGRESS: f64 = 0.9;
/// No stretch is shorter; longer where two passes take longer.
const STRETCH_MIN: Duration = Duration::from_secs(8);
const STRETCH_MAX: Duration = Duration::from_secs(60);
/// From here on going on is held to be useless, and below the second figure worth another try.
const FULL: f64 = 0.95;
const CALM: f64 = 0.7;
/// A disk is nearly clean when its residue takes less than this, or no longer shrinks.
const NEARLY_CLEAN: Duration = Duration::from_secs(1);
const HOLD_MIN: Duration = Duration::from_secs(30);
const HOLD_MAX: Duration = Duration::from_secs(600);
const CPU_FIRST: u8 = 20;
const CPU_STEP: u8 = 10;
const CPU_MAX: u8 = 90;
/// Between two rounds of the disks memory flows alone for as long as the first one took, but no longer than this.
const TURN_MAX: Duration = Duration::from_secs(2);
/// Below this a guest's disk is as good as stopped.
const IO_MIN: f64 = 256.0 * 1024.0;

/// What a job remembers between two decisions.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Converge {
    /// Best predicted blackout of this try, and when it was last improved.
    best: Option<(Duration, Duration)>,
    held: Option<Held>,
    holds: u32,
    /// When it first became clear that it does not converge.
    stuck: Option<Duration>,
    /// Whether memory migrated at the last look.
    ram: bool,
    /// Residue of the disks when the last round began, reduced bytes.
    round: Option<f64>,
    /// When a round beside memory began: it is over at the next look.
    beside: Option<Duration>,
    /// Until when memory flows alone.
    turn: Duration,
}

/// Memory is held back.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Held {
    since: Duration,
    /// How long at least.
    least: Duration,
    why: &'static str,
}

impl Converge {
    pub fn new() -> Self {
        Self::default()
    }

    /// The next step. `now`: since the migration began.
    pub fn decide(&mut self, now: Duration, view: &View, policy: &Policy) -> Verdict {
        let blackout = predict(view);
        if view.ram.is_some() != self.ram {
            self.ram = view.ram.is_some();
            self.best = None;
        }
        if !view.round_running
            && let Some(began) = self.beside.take()
        {
            self.turn = now + now.saturating_sub(began).min(TURN_MAX);
        }
        self.notice(now, blackout.total);
        let (decision, reason) = self.choose(now, view, policy, &blackout);
        verdict(view, policy, &blackout, decision, &reason)
    }

    /// The guest stands in pre-switchover, unasked: finish (`HandOver`), cancel and go on (`Continue`), or cancel and not try again soon
    /// (`HoldInSync`), for an idle guest would come to the same end each time? `late`: what this stop takes longer than one at a better
    /// moment, such as for the round that runs.
    pub fn unasked(&mut self, now: Duration, view: &View, late: Duration, policy: &Policy) -> Verdict {
        let mut blackout = predict_stopped(view);
        blackout.fixed = blackout.fixed.saturating_add(late);
        blackout.total = blackout.total.saturating_add(late);
        let (decision, reason) = if blackout.total <= policy.blackout {
            let predicted = blackout.total;
            (
                Decision::HandOver { predicted },
                "QEMU stopped the guest by itself, and what is left fits".to_owned(),
            )
        } else if floor(view).total > policy.blackout {
            self.begin_hold(now, "even the shortest blackout would be too long")
        } else {
            (
                Decision::Continue,
                "QEMU stopped the guest by itself with too much left, so that is undone".to_owned(),
            )
        };
        verdict(view, policy, &blackout, decision, &reason)
    }

    fn notice(&mut self, now: Duration, predicted: Duration) {
        match self.best {
            Some((best, _)) if predicted.as_secs_f64() >= best.as_secs_f64() * PROGRESS => {}
            _ => self.best = Some((predicted, now)),
        }
    }

    fn choose(
        &mut self,
        now: Duration,
        view: &View,
        policy: &Policy,
        blackout: &Blackout,
    ) -> (Decision, String) {
        // What is written during the first pass QEMU finds at its end: until then nothing says how much that is.
        let is_counted = view.ram.is_some_and(|ram| ram.passes > 0);
        if is_counted && blackout.total <= policy.blackout {
            return (
                Decision::HandOver {
                    predicted: blackout.total,
                },
                "what is left fits into the blackout".to_owned(),
            );
        }
        if let Some(over) = self.over(now, policy) {
            return (Decision::GiveUp, over);
        }
        if let Some(held) = self.held {
            return self.hold(now, held, view, policy);
        }
        match view.ram {
            None => self.disks(now, view, policy),
            Some(_) => self.memory(now, view, policy, blackout),
        }
    }

    fn over(&self, now: Duration, policy: &Policy) -> Option<String> {
        if policy.deadline.is_some_and(|deadline| now >= deadline) {
            return Some("its deadline has passed".to_owned());
        }
        match (policy.patience, self.stuck) {
            (Patience::GiveUp(after), Some(since)) if now.saturating_sub(since) >= after => Some(format!(
                "it did not converge for {} s",
                now.saturating_sub(since).as_secs()
            )),
            _ => None,
        }
    }

    /// Only the disks move: another round, or memory as well?
    fn disks(&mut self, now: Duration, view: &View, policy: &Policy) -> (Decision, String) {
        if view.round_running {
            return (
                Decision::Continue,
                "a round of the disks is being read".to_owned(),
            );
        }
        let residue: f64 = view
            .disks
            .iter()
            .map(|disk| disk.dirty as f64 + disk.unsent as f64)
            .sum();
        let residue = residue * ratio(view.link.block_ratio);
        let shrinks = self.round.is_none_or(|before| residue < before * PROGRESS);
        if transfer(residue, &view.link) <= NEARLY_CLEAN.max(policy.blackout) {
            self.round = None;
            return self.start_ram(now, view, "the disks are nearly clean");
        }
        if disk_load(view) < FULL * sane(view.link.goodput) {
            if shrinks {
                self.round = Some(residue);
                return (
                    Decision::Round,
                    "another round of the disks makes them cleaner".to_owned(),
                );
            }
            self.round = None;
            return self.start_ram(now, view, "further rounds do not make the disks cleaner");
        }
        self.round = Some(residue);
        self.not_converging(now, view, policy, "the disks change faster than the link carries")
            .unwrap_or_else(|| {
                (
                    Decision::Round,
                    "the disks change fast, which may pass".to_owned(),
                )
            })
    }

    fn start_ram(&mut self, now: Duration, view: &View, reason: &str) -> (Decision, String) {
        if view.ram_dirty_rate.is_some() && utilisation(view) >= 1.0 && self.holds > 0 {
            return self.begin_hold(now, "memory changes faster than the link carries");
        }
        (Decision::StartRam, format!("{reason}, so memory starts"))
    }

    /// Memory migrates: wait, slow the guest, or stop trying.
    fn memory(
        &mut self,
        now: Duration,
        view: &View,
        policy: &Policy,
        blackout: &Blackout,
    ) -> (Decision, String) {
        let least = floor(view);
        let full = utilisation(view) >= FULL;
        let reason = if full {
            "the guest changes more than the link carries"
        } else if least.total > policy.blackout {
            "even the shortest blackout would be too long"
        } else {
            "what is left does not shrink"
        };
        // A calm guest with a reachable floor gets there by itself, however long its passes are.
        let doubtful = full || least.total > policy.blackout || view.ram.is_some_and(|ram| ram.passes > 20);
        if doubtful && let Some(answer) = self.not_converging(now, view, policy, reason) {
            return answer;
        }
        let disks_late = transfer(blackout.disk_bytes, &view.link) * 4 > policy.blackout;
        // The last of memory waits while a round runs: rounds that followed each other would never let it end.
        if disks_late && now < self.turn && transfer(blackout.ram_bytes, &view.link) <= NEARLY_CLEAN {
            return (
                Decision::Continue,
                "memory has its turn after a round of the disks".to_owned(),
            );
        }
        if disks_late && !view.round_running {
            self.beside = Some(now);
            return (
                Decision::Round,
                "the disks' part of the blackout is too long".to_owned(),
            );
        }
        (Decision::Continue, "what is left shrinks, or may soon".to_owned())
    }

    /// `None` while there is still progress, or too little was seen to tell.
    fn not_converging(
        &mut self,
        now: Duration,
        view: &View,
        policy: &Policy,
        reason: &'static str,
    ) -> Option<(Decision, String)> {
        let (best, since) = self.best?;
        let pass = transfer(blackout_bytes(view), &view.link) * 2;
        if now.saturating_sub(since) < pass.clamp(STRETCH_MIN, STRETCH_MAX) {
            return None;
        }
        self.stuck.get_or_insert(now);
        // What comes next gets a stretch of its own to show its effect.
        self.best = Some((best, now));
        Some(match slower(view, policy) {
            Some(slow) => (
                slow,
                format!("{reason}, so the guest is slowed as the config allows"),
            ),
            None => self.begin_hold(now, reason),
        })
    }

    fn begin_hold(&mut self, now: Duration, why: &'static str) -> (Decision, String) {
        let least = HOLD_MIN.saturating_mul(1 << self.holds.min(5)).min(HOLD_MAX);
        self.held = Some(Held {
            since: now,
            least,
            why,
        });
        self.holds = self.holds.saturating_add(1);
        self.stuck.get_or_insert(now);
        let seconds = least.as_secs();
        (
            Decision::HoldInSync,
            format!("{why}; only the disks are kept in sync for {seconds} s or until the guest is calmer"),
        )
    }

    /// Memory is held back: until the guest is calm, or long enough.
    fn hold(&mut self, now: Duration, held: Held, view: &View, policy: &Policy) -> (Decision, String) {
        let Held { since, least, why } = held;
        let held = now.saturating_sub(since);
        // However calm a guest is, it does not shorten the way to the target.
        let reachable = floor(view).total <= policy.blackout;
        let calm = view.ram_dirty_rate.is_some() && utilisation(view) < CALM && reachable;
        if held >= least || calm && held >= STRETCH_MIN {
            self.held = None;
            self.best = None;
            self.round = None;
            let why = if calm {
                "the guest is calmer now"
            } else {
                "it was held long enough"
            };
            return (Decision::Round, format!("{why}, so it is tried again"));
        }
        let residue: f64 = view.disks.iter().map(|disk| disk.dirty as f64).sum();
        let due = transfer(residue * ratio(view.link.block_ratio), &view.link) >= NEARLY_CLEAN;
        if due && !view.round_running && view.ram.is_none() {
            return (Decision::Round, "the disks are kept in sync meanwhile".to_owned());
        }
        (
            Decision::HoldInSync,
            format!("memory waits and only the disks are kept in sync, for {why}"),
        )
    }
}

fn blackout_bytes(view: &View) -> f64 {
    let blackout = predict(view);
    blackout.disk_bytes + blackout.ram_bytes
}

/// The next harder measure that is allowed, if one is left.
fn slower(view: &View, policy: &Policy) -> Option<Decision> {
    let goodput = sane(view.link.goodput);
    let (disk, ram) = (disk_load(view), ram_load(view));
    let io = (policy.io_throttle && disk > 0.0 && disk >= ram.min(goodput / 4.0))
        .then(|| next_io(view, goodput))
        .flatten();
    let cpu = (policy.auto_converge && view.cpu_slowed < CPU_MAX && (ram > 0.0 || io.is_none())).then(|| {
        let next = view.cpu_slowed.saturating_add(CPU_STEP);
        next.clamp(CPU_FIRST, CPU_MAX)
    });
    (cpu.is_some() || io.is_some()).then_some(Decision::SlowGuest { cpu, io })
}

/// Half of the link for all disks together at first, then half of the last limit.
fn next_io(view: &View, goodput: f64) -> Option<u64> {
    let disks = view
        .disks
        .iter()
        .filter(|disk| disk.dirty_rate > 0.0)
        .count()
        .max(1) as f64;
    let first = goodput / 2.0 / ratio(view.link.block_ratio).max(0.01) / disks;
    let next = view.io_limit.map_or(first, |limit| first.min(limit as f64 / 2.0));
    let lowered = view.io_limit.is_none_or(|limit| (next as u64) < limit);
    (next >= IO_MIN && lowered).then_some(next as u64)
}

fn verdict(view: &View, policy: &Policy, blackout: &Blackout, decision: Decision, reason: &str) -> Verdict {
    let (floor, utilisation) = (floor(view).total, utilisation(view));
    let link = &view.link;
    let mbit = |bytes: f64| bytes * 8.0 / 1e6;
    let kib = |bytes: f64| bytes / 1024.0;
    let why = format!(
        "{reason}: a stop now would take {} ms of {} ms allowed ({:.0} KiB of disks, {:.0} KiB of memory and {:.0} KiB of device \
         state at {:.1} Mbit/s, {} ms of steps and round trip), going on leads to {} ms at best; the guest changes {:.1} Mbit/s \
         on disks and {:.1} Mbit/s in memory after reduction to {:.0} % and {:.0} %",
        blackout.total.as_millis(),
        policy.blackout.as_millis(),
        kib(blackout.disk_bytes),
        kib(blackout.ram_bytes),
        kib(blackout.device_bytes),
        mbit(sane(link.goodput)),
        blackout.fixed.as_millis(),
        floor.as_millis(),
        mbit(disk_load(view)),
        mbit(ram_load(view)),
        ratio(link.block_ratio) * 100.0,
        ratio(link.page_ratio) * 100.0,
    );
    Verdict {
        decision,
        why,
        predicted: blackout.total,
        floor,
        utilisation,
    }
}
