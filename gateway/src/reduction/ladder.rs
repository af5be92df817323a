//! How much work a lane's data is worth right now. Pure: time is an argument.
//!
//! Owns the choice of a step of the ladder from what was seen: how fast each step went and what it made of the data, how much waits for
//! the link, what the link delivers, whether batches wait for the workers. Leaves measuring to `send`. One step at a time: up while
//! workers wait for the link and the next step would still keep it full; down while the link waits for workers, if less work makes them
//! faster. Promises that a step that proved too slow is not tried again before its rest is over, and that rests get longer while it keeps
//! proving so.

use std::time::{Duration, Instant};

use super::codec::Level;

/// Between two choices: some round trips' worth of batches have gone meanwhile.
pub const CHOOSE_EVERY: Duration = Duration::from_millis(100);
/// Waiting for the link for this long and more: workers have time to spare.
const LONG_QUEUE: Duration = Duration::from_millis(150);
/// Waiting for the link for less: it may run dry.
const SHORT_QUEUE: Duration = Duration::from_millis(30);
/// The same, in batches of the step in force: a worker ends the one that it has begun before it takes to another step, and one more
/// passes before what it makes then has reached the link.
const SHORT_QUEUE_BATCHES: f64 = 2.0;
/// How much faster than the link a step must look before it is tried.
const MARGIN: f64 = 1.15;
/// Workers that could do so much more than is delivered are not what the link waits for.
const SLOW: f64 = 1.5;
/// A step down has to spare this part of the workers' time: where nearly all is references, it only makes the rest larger.
const SPARED: f64 = 0.1;
/// Waiting for the link for this long: a step up need not prove itself before the next one.
const VERY_LONG_QUEUE: Duration = Duration::from_millis(600);
/// Where a lane begins. Before the first word from the peer comes back, all the memory that a job may take is filled: with LZ4, a 100
/// Mbit/s link would be busy for a second and a half with what zstd makes a fifth smaller; a link of 2 Gbit/s is kept full.
const START: Level = Level::Zstd1;
/// A step that was too slow rests for so long at first, and for so long at most.
const REST: Duration = Duration::from_secs(1);
const REST_MAX: Duration = Duration::from_secs(30);
/// How much of a new measurement is believed at once.
const BELIEF: f64 = 0.3;
/// The same for what the data is: some batches are nothing but content where most are nothing but references.
const BELIEF_IN_KIND: f64 = 0.05;

const STEPS: usize = Level::ALL.len();

/// Before anything is measured: raw bytes per second and thread, and what is left of a byte; one core of a server and an operating
/// system's files.
const EXPECTED: [(f64, f64); STEPS] = [(3e9, 1.0), (4.5e8, 0.5), (2.5e8, 0.4), (1.5e8, 0.37), (3e7, 0.34)];

/// Seconds that a byte of a reference takes, beside them.
const REFERENCE: f64 = 1e-9;

/// What is seen at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    pub now: Instant,
    /// Payload bytes that wait for the link, in this lane and those before it; and what is on its way beyond the congestion windows.
    pub queued: u64,
    /// Payload bytes that the peer has accepted so far.
    pub delivered: u64,
    /// Batches that wait for a worker.
    pub waiting: usize,
    pub workers: usize,
}

/// What became of a batch.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    pub raw: u64,
    /// The part of `raw` that the step was applied to.
    pub content: u64,
    pub payload: u64,
    /// Of one thread.
    pub busy: Duration,
}

/// One lane's choice.
#[derive(Clone, Debug)]
pub struct Ladder {
    level: Level,
    /// Raw bytes per second and thread, and what is left of a byte, by step.
    known: [Option<(f64, f64)>; STEPS],
    /// The part of the data that a step is applied to.
    content: Option<f64>,
    /// Raw bytes of a batch.
    batch: f64,
    /// What the link delivers, in bytes per second.
    rate: f64,
    last: Option<Seen>,
    /// When each step may be tried again, and how long its last rest was.
    rests: [Option<(Instant, Duration)>; STEPS],
    /// A step up was taken at this moment, and has not proved itself.
    risen: Option<Instant>,
}

impl Default for Ladder {
    fn default() -> Self {
        Self {
            level: START,
            known: [None; STEPS],
            content: None,
            batch: 0.0,
            rate: 0.0,
            last: None,
            rests: [None; STEPS],
            risen: None,
        }
    }
}

impl Ladder {
    /// The step in force.
    pub fn level(&self) -> Level {
        self.level
    }

    /// What a batch took at `level`.
    pub fn measured(&mut self, level: Level, work: Work) {
        let Work {
            raw, payload, busy, ..
        } = work;
        if raw == 0 || busy.is_zero() {
            return;
        }
        let now = work.content.min(raw) as f64 / raw as f64;
        let content = self.content.get_or_insert(now);
        *content += BELIEF_IN_KIND * (now - *content);
        self.batch += BELIEF * (raw as f64 - self.batch);
        let now = (raw as f64 / busy.as_secs_f64(), payload as f64 / raw as f64);
        let known = self.known[level as usize].get_or_insert(now);
        known.0 += BELIEF * (now.0 - known.0);
        known.1 += BELIEF * (now.1 - known.1);
    }

    /// What a step would do with the data of the moment: where it was not measured, as it stands to the measured one in force.
    fn expected(&self, level: Level) -> (f64, f64) {
        let (step, here) = (level as usize, self.level as usize);
        let usual = EXPECTED[step];
        let Some((speed, left)) = self.known[here] else {
            return self.known[step].unwrap_or(usual);
        };
        // What is known of another step is of other data: only how it stood to its neighbours is kept.
        let (speed_here, left_here) = EXPECTED[here];
        let scaled = (speed / speed_here * usual.0, left / left_here * usual.1);
        match self.known[step] {
            Some((known, _)) => (known.min(scaled.0), scaled.1),
            None => scaled,
        }
    }

    /// Looks at what there is, and chooses. Cheap where the last choice was just now.
    pub fn choose(&mut self, seen: Seen) -> Level {
        let Some(last) = self.last else {
            self.last = Some(seen);
            return self.level;
        };
        let past = seen.now.saturating_duration_since(last.now);
        if past < CHOOSE_EVERY {
            return self.level;
        }
        self.last = Some(seen);
        let rate = seen.delivered.saturating_sub(last.delivered) as f64 / past.as_secs_f64();
        // An empty queue says nothing of what the link could do, but that it is no less.
        let full = last.queued > 0 && seen.queued > 0;
        if full || rate > self.rate {
            self.rate += if self.rate == 0.0 {
                rate
            } else {
                BELIEF * (rate - self.rate)
            };
        }
        let drain = if self.rate > 0.0 {
            seen.queued as f64 / self.rate
        } else {
            0.0
        };
        // A link that is yet to open up, or a source that gives little, is no reason: workers that could do more are not what it waits for.
        let (speed, left) = self.expected(self.level);
        let slow = speed * left * seen.workers.max(1) as f64 <= self.rate * SLOW;
        let short = (SHORT_QUEUE_BATCHES * self.batch / speed)
            .clamp(SHORT_QUEUE.as_secs_f64(), LONG_QUEUE.as_secs_f64());
        let starving = slow
            && self.is_worth_a_step_down(self.level)
            && drain < short
            && seen.waiting >= seen.workers.max(1);
        if starving {
            self.go_down(seen.now);
        } else if self.level == Level::Raw && !self.is_worth_a_step_down(Level::Lz4) {
            // It came here for data of another kind.
            self.level = Level::Lz4;
        } else if drain > LONG_QUEUE.as_secs_f64() + short {
            self.go_up(seen, drain > VERY_LONG_QUEUE.as_secs_f64());
        }
        self.level
    }

    /// Whether the step below `level` would spare a good part of the workers' time.
    fn is_worth_a_step_down(&self, level: Level) -> bool {
        let content = self.content.unwrap_or(1.0);
        let takes = |level: Level| content / EXPECTED[level as usize].0;
        let (here, below) = (takes(level), takes(level.down()));
        here - below > SPARED * (here + (1.0 - content) * REFERENCE)
    }

    fn go_down(&mut self, now: Instant) {
        let slow = self.level as usize;
        if self.level == Level::Raw {
            return;
        }
        let rest = match (self.risen.take(), self.rests[slow]) {
            // It was tried again, and in vain again.
            (Some(_), Some((_, rest))) => (rest * 2).min(REST_MAX),
            _ => REST,
        };
        self.rests[slow] = Some((now + rest, rest));
        self.level = self.level.down();
    }

    fn go_up(&mut self, seen: Seen, at_once: bool) {
        if let Some(since) = self.risen {
            // It keeps a queue for the link: it has proved itself.
            if !at_once && seen.now.saturating_duration_since(since) < 3 * CHOOSE_EVERY {
                return;
            }
            self.risen = None;
        }
        let next = self.level.up();
        let resting = self.rests[next as usize].is_some_and(|(until, _)| seen.now < until);
        let (speed, left) = self.expected(next);
        let fast = speed * left * seen.workers.max(1) as f64 > self.rate * MARGIN;
        if next != self.level && !resting && fast {
            self.level = next;
            self.risen = Some(seen.now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A link, workers and a source that always has more, in steps of 10 ms.
    struct World {
        ladder: Ladder,
        now: Instant,
        /// Bytes per second.
        link: f64,
        workers: usize,
        /// Of each step: raw bytes per second and thread, what is left of a byte.
        steps: [(f64, f64); STEPS],
        queued: f64,
        delivered: f64,
        raw: f64,
        levels: [u32; STEPS],
        changes: u32,
        /// Raw bytes per second that the source gives at most.
        source: f64,
    }

    const MIB_OF_CONTENT: Work = Work {
        raw: 1 << 20,
        content: 1 << 20,
        payload: 1 << 19,
        busy: Duration::from_millis(2),
    };
    const QUEUE_MAX: f64 = 64e6;
    const STEP: f64 = 0.01;

    impl World {
        fn new(link: f64) -> Self {
            Self {
                ladder: Ladder::default(),
                now: Instant::now(),
                link,
                workers: 2,
                steps: [
                    (2e9, 1.0),
                    (5e8, 0.5),
                    (2.2e8, 0.41),
                    (1.4e8, 0.38),
                    (3.5e7, 0.35),
                ],
                queued: 0.0,
                delivered: 0.0,
                raw: 0.0,
                levels: [0; STEPS],
                changes: 0,
                source: f64::MAX,
            }
        }

        fn run(&mut self, seconds: f64) -> &mut Self {
            (self.levels, self.raw, self.changes) = ([0; STEPS], 0.0, 0);
            for _ in 0..(seconds / STEP) as u32 {
                self.step();
            }
            self
        }

        fn step(&mut self) {
            let before = self.ladder.level();
            let (speed, left) = self.steps[before as usize];
            let able = speed * self.workers as f64 * STEP;
            let room = (QUEUE_MAX - self.queued).max(0.0) / left;
            let raw = able.min(room).min(self.source * STEP);
            self.raw += raw;
            self.queued += raw * left;
            let sent = self.queued.min(self.link * STEP);
            self.queued -= sent;
            self.delivered += sent;
            self.now += Duration::from_secs_f64(STEP);
            if raw > 1.0 {
                let work = Work {
                    raw: raw as u64,
                    content: raw as u64,
                    payload: (raw * left) as u64,
                    busy: Duration::from_secs_f64(raw / speed),
                };
                self.ladder.measured(before, work);
            }
            let level = self.ladder.choose(Seen {
                now: self.now,
                queued: self.queued as u64,
                delivered: self.delivered as u64,
                waiting: if able <= room && able < self.source * STEP {
                    8
                } else {
                    0
                },
                workers: self.workers,
            });
            self.changes += u32::from(level != before);
            self.levels[level as usize] += 1;
        }

        fn mostly(&self) -> Level {
            let most = Level::ALL
                .into_iter()
                .max_by_key(|level| self.levels[*level as usize]);
            most.unwrap_or_default()
        }

        /// Raw bytes per second of the best step.
        fn best(&self) -> f64 {
            let of = |(speed, left): &(f64, f64)| (speed * self.workers as f64).min(self.link / left);
            self.steps.iter().map(of).fold(0.0, f64::max)
        }
    }

    #[test]
    fn a_thin_link_is_given_the_most_work_and_a_fat_one_the_least() {
        let mbit = |mbit: f64| mbit * 125_000.0;
        let mut found = Vec::new();
        for rate in [50.0, 100.0, 1000.0, 10_000.0, 40_000.0] {
            let mut world = World::new(mbit(rate));
            world.run(10.0).run(20.0);
            found.push(world.mostly());
            assert!(
                world.raw / 20.0 > 0.9 * world.best(),
                "{rate} Mbit/s: {} of {}",
                world.raw / 20.0,
                world.best()
            );
        }
        assert_eq!(found[..2], [Level::Zstd9, Level::Zstd9]);
        assert!(found.is_sorted_by(|a, b| a >= b), "{found:?}");
        assert!(found[4] <= Level::Lz4, "{found:?}");
    }

    #[test]
    fn steps_of_the_link_are_followed_within_seconds() {
        let mut world = World::new(12.5e6);
        world.run(10.0);
        assert_eq!(world.ladder.level(), Level::Zstd9);
        world.link = 1.25e9;
        world.run(5.0).run(10.0);
        assert!(world.raw / 10.0 > 0.85 * world.best(), "{:?}", world.levels);
        world.link = 12.5e6;
        world.run(20.0).run(10.0);
        assert_eq!(world.mostly(), Level::Zstd9);
        assert!(world.raw / 10.0 > 0.9 * world.best());
    }

    #[test]
    fn workers_that_become_slow_are_given_less_to_do_and_do_not_swing() {
        let mut world = World::new(25e6);
        world.run(20.0);
        for (speed, _) in &mut world.steps {
            *speed /= 6.0;
        }
        world.run(10.0).run(30.0);
        assert!(
            world.raw / 30.0 > 0.85 * world.best(),
            "{:?} {}",
            world.levels,
            world.raw / 30.0 / world.best()
        );
        assert!(world.changes < 30, "{} changes in 30 s", world.changes);
    }

    #[test]
    fn a_source_that_gives_little_is_no_reason_for_less_work() {
        let mut world = World::new(12.5e6);
        world.source = 5e6;
        world.run(10.0);
        assert!(world.ladder.level() >= Level::Lz4 && world.changes == 0);
    }

    #[test]
    fn a_link_that_opens_up_slowly_is_not_met_with_less_work() {
        let mut world = World::new(12.5e6 / 50.0);
        for _ in 0..50 {
            // The source has more than is taken, and nothing waits yet.
            let seen = Seen {
                now: world.now,
                queued: 0,
                delivered: world.delivered as u64,
                waiting: 8,
                workers: 2,
            };
            world.ladder.measured(START, MIB_OF_CONTENT);
            assert_eq!(world.ladder.choose(seen), START);
            world.delivered += world.link * 0.1;
            world.link += 12.5e6 / 50.0;
            world.now += Duration::from_millis(100);
        }
    }

    #[test]
    fn a_lane_that_saw_nothing_stays_where_it_is() {
        let mut ladder = Ladder::default();
        let seen = Seen {
            now: Instant::now(),
            queued: 0,
            delivered: 0,
            waiting: 0,
            workers: 0,
        };
        assert_eq!((ladder.choose(seen), ladder.choose(seen)), (START, START));
        let nothing = Work {
            raw: 0,
            content: 0,
            payload: 0,
            busy: Duration::ZERO,
        };
        ladder.measured(Level::Lz4, nothing);
    }

    #[test]
    fn less_work_is_not_tried_where_it_spares_none() {
        // The link is idle and batches wait: what takes the workers' time decides.
        let level_after = |content: u64, after: u64| {
            let (mut ladder, mut now) = (Ladder::default(), Instant::now());
            for tenth in 0..200 {
                let content = if tenth < after { 1 << 20 } else { content };
                let work = Work {
                    content,
                    payload: content / 2,
                    ..MIB_OF_CONTENT
                };
                ladder.measured(ladder.level(), work);
                ladder.choose(Seen {
                    now,
                    queued: 0,
                    delivered: tenth * 50_000_000,
                    waiting: 8,
                    workers: 2,
                });
                now += Duration::from_millis(100);
            }
            ladder.level()
        };
        assert_eq!(level_after(1 << 20, 0), Level::Raw);
        assert_eq!(level_after(1 << 15, 0), START, "31 of 32 blocks are references");
        assert_eq!(level_after(1 << 15, 10), Level::Lz4, "they are so after a second");
    }
}
