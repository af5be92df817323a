//! What was measured on the way: rates of the guest and of the link.
//!
//! Owns turning counters into the view that `vm::converge` decides on, and into the size of the RAM window. Pure: time is an argument.
//! All bytes are raw data as the agents count it; what the gateways make smaller shows as a faster link.

use std::time::Duration;

use longhaul_common::wire::session::LivePolicy;

use super::ram_out::{RamView as Tap, WINDOW_START};
use super::reduced::Reduced;
use super::uplink::Uplink;
use crate::vm::converge::{DiskView, LinkView, Patience, Policy, RamView, Rate, View};
use crate::vm::outgoing::MigrationStats;

/// Over how long rates are smoothed.
const MEMORY: Duration = Duration::from_secs(2);
/// Device state and its description, raw; QEMU's minimal PC has some 170 KB.
pub(super) const DEVICE_STATE: u64 = 172 << 10;
/// Stopping, loading, flushing and starting, besides the bytes and a round trip, of which the VM waits for a half: measured on small machines.
pub(super) const STEPS: Duration = Duration::from_millis(60);
/// Beyond twice the round trip the window allows for QEMU's and the disks' uneven pace.
/// The gateways hold some tenths of a second of it: only with a queue for the link there is time for the best compression.
const WINDOW_SLACK: Duration = Duration::from_millis(400);
/// Where the window takes all that is left of memory, or less than this is left, in bytes, the end may come at any moment, and what is in
/// the window then is waited for while the VM stands: it is kept short.
const NEAR_END: u64 = 8 << 20;
/// Beyond one round trip then: what agents and gateways take on a busy host. With less than they take, the rate that is measured would fall,
/// and the next window with it.
const SLACK_AT_END: Duration = Duration::from_millis(150);
/// And no less than this, in bytes of stream.
const WINDOW_MIN: u64 = 2 << 20;
/// A stream that is hardly faster than the guest writes is never over, and where a lost packet holds it up for longer than the window
/// reaches, it gets no faster: where the link has room, there is room for so many times what the guest writes.
const KEEP_UP: f64 = 2.0;
/// Before a round trip was measured.
const RTT_UNKNOWN: Duration = Duration::from_millis(100);

/// The counters of one migration.
pub(super) struct Pace {
    dirty: Vec<Dirty>,
    link: Rate,
    /// What it carried when there was enough to carry: a link with little to do is not slow.
    busy: f64,
    /// The most that it ever carried.
    most: f64,
    /// What it carries of dirty blocks. Memory that the target's gateway knows already makes the link look far faster than it is for these.
    reduced: Reduced,
    acked: Rate,
    /// QEMU's last look at its dirty bitmap: which, and when.
    sync: (u64, Duration),
}

/// One disk's writes.
struct Dirty {
    /// Dirty bytes of all closed rounds.
    closed: u64,
    /// Dirty bytes when it was looked at last.
    last: u64,
    rate: Rate,
}

impl Pace {
    pub(super) fn new(disks: usize) -> Self {
        let dirty = || Dirty {
            closed: 0,
            last: 0,
            rate: Rate::new(MEMORY * 2),
        };
        Self {
            dirty: (0..disks).map(|_| dirty()).collect(),
            link: Rate::new(MEMORY),
            busy: 0.0,
            most: 0.0,
            reduced: Reduced::default(),
            acked: Rate::new(MEMORY),
            sync: (0, Duration::ZERO),
        }
    }

    /// So much of a disk's dirty bitmap was sent.
    pub(super) fn sent(&mut self, disk: usize, bytes: u64) {
        if let Some(dirty) = self.dirty.get_mut(disk) {
            dirty.closed += bytes;
        }
    }

    /// Dirty bytes of all disks when they were looked at last.
    pub(super) fn dirty(&self) -> u64 {
        self.dirty.iter().map(|disk| disk.last).sum()
    }

    /// A round of the disks begins.
    pub(super) fn round_begins(&mut self) {
        self.reduced.round_begins();
    }

    /// The link as what is left to send will find it: as fast as it is for the slower kind, and memory made smaller where that is faster.
    fn link(&self, now: Duration, rtt: Option<Duration>) -> LinkView {
        let blocks = self.reduced.blocks();
        let goodput = blocks.map_or(self.busy, |blocks| blocks.min(self.busy));
        let ratio = |rate: f64| if rate > 0.0 { goodput / rate } else { 1.0 };
        // Memory that leaves the link room is slow for what it waits for on its way, and may be as fast again as it was.
        let best = if self.reduced.has_room(now) {
            self.most
        } else {
            self.busy
        };
        LinkView {
            goodput,
            rtt: rtt.unwrap_or_default(),
            page_ratio: ratio(self.busy),
            best_page_ratio: ratio(best),
            block_ratio: 1.0,
        }
    }

    /// How far the tap may read ahead: enough that the link never runs dry, no more than that. `ram_left`: what QEMU has still to send;
    /// `written`: bytes per second that the guest makes dirty.
    pub(super) fn window(&self, now: Duration, rtt: Option<Duration>, ram_left: u64, written: f64) -> u64 {
        let has_room = self.reduced.has_room(now);
        let rate = self.rate().max(if has_room { KEEP_UP * written } else { 0.0 });
        let rtt = rtt.unwrap_or(RTT_UNKNOWN);
        let window = |reach: Duration| (rate * reach.as_secs_f64()) as u64;
        let long = window(rtt * 2 + WINDOW_SLACK).max(WINDOW_START);
        if ram_left >= long.max(NEAR_END) {
            // A link with room waits for memory, which waits for lost packets or for whoever works on it. A window of what it is seen to
            // carry would keep it at that; twice as much shows whether it can be faster. Later passes know what they have to keep up with.
            let is_first_pass = written <= 0.0;
            let more = if has_room && is_first_pass {
                (ram_left / 2).min(long * 2)
            } else {
                0
            };
            return long.max(more);
        }
        // What is lost takes a round trip and a half more, and holds up all that follows. A reach that is shorter than what memory takes
        // makes the rate fall, and with it the window: on a long, lossy path it would never be over.
        window(rtt + SLACK_AT_END.max(rtt * 3 / 2)).max(WINDOW_MIN)
    }

    /// What the link carries of memory. A stream that has only begun says nothing of it, but the disks do.
    fn rate(&self) -> f64 {
        self.acked.per_second().unwrap_or(0.0).max(self.busy)
    }

    /// How long the link would take for so many bytes; nothing while it is not known.
    pub(super) fn takes(&self, bytes: u64) -> Option<Duration> {
        let rate = self.link.per_second().filter(|rate| *rate > 1.0)?;
        Some(Duration::from_secs_f64((bytes as f64 / rate).min(1e9)))
    }

    /// Takes what the link carried, between decisions, too. `busy`: there was more to send than it took.
    pub(super) fn sample(&mut self, now: Duration, uplink: &Uplink, acked: u64, busy: bool) {
        let delivered = uplink.delivered.load(std::sync::atomic::Ordering::Relaxed);
        self.link.sample(now, delivered.saturating_add(acked));
        self.reduced.sample(now, uplink.carried());
        let rate = self.link.per_second().unwrap_or(0.0);
        self.most = self.most.max(rate);
        if busy || rate > self.busy {
            self.busy = rate;
        }
    }

    /// What a decision looks at.
    pub(super) fn view(
        &mut self,
        now: Duration,
        dirty: &[u64],
        stats: Option<&MigrationStats>,
        tap: Option<&Tap>,
        uplink: &Uplink,
        rtt: Option<Duration>,
    ) -> View {
        let disks = self
            .dirty
            .iter_mut()
            .zip(dirty)
            .map(|(known, dirty)| known.view(now, *dirty));
        let disks = disks.collect();
        let acked = tap.map_or(0, |tap| tap.acked);
        self.acked.sample(now, acked);
        let busy = tap.is_some_and(|tap| tap.buffered >= WINDOW_START / 2);
        self.sample(now, uplink, acked, busy);
        let ram = stats
            .and_then(|stats| stats.ram.as_ref())
            .zip(tap)
            .map(|(ram, tap)| {
                if ram.dirty_sync_count != self.sync.0 {
                    self.sync = (ram.dirty_sync_count, now);
                }
                RamView {
                    remaining: ram.remaining,
                    dirty_rate: ram.dirtied_per_second(),
                    since_sync: now.saturating_sub(self.sync.1),
                    buffered: tap.buffered,
                    // QEMU looks once before the first pass, and then after each.
                    passes: u32::try_from(ram.dirty_sync_count.saturating_sub(1)).unwrap_or(u32::MAX),
                }
            });
        View {
            disks,
            round_running: false,
            ram,
            ram_dirty_rate: None,
            link: self.link(now, rtt),
            device_state: DEVICE_STATE,
            steps: STEPS,
            cpu_slowed: stats.map_or(0, |stats| stats.throttle.min(99) as u8),
            io_limit: None,
        }
    }
}

impl Dirty {
    fn view(&mut self, now: Duration, dirty: u64) -> DiskView {
        self.last = dirty;
        self.rate.sample(now, self.closed.saturating_add(dirty));
        DiskView {
            dirty,
            unsent: 0,
            dirty_rate: self.rate.per_second().unwrap_or(0.0),
        }
    }
}

/// What the job allows.
pub(super) fn policy(policy: &LivePolicy) -> Policy {
    let patience = match policy.give_up_ms {
        None => Patience::Wait,
        Some(ms) => Patience::GiveUp(Duration::from_millis(ms)),
    };
    Policy {
        blackout: Duration::from_millis(policy.blackout_ms),
        auto_converge: policy.auto_converge,
        io_throttle: policy.io_throttle,
        patience,
        deadline: None,
    }
}

#[cfg(test)]
mod tests {
    use longhaul_common::wire::session::Carried;

    use super::*;

    const RTT: Option<Duration> = Some(Duration::from_millis(80));
    const NOW: Duration = Duration::from_secs(20);

    /// A stream of which so many bytes per second come back.
    fn carrying(rate: u64) -> Pace {
        let mut pace = Pace::new(1);
        for second in 0..NOW.as_secs() {
            pace.acked.sample(Duration::from_secs(second), second * rate);
        }
        pace
    }

    /// The gateway says that nothing waits for the link.
    fn leave_room(pace: &mut Pace) {
        pace.reduced
            .sample(NOW - Duration::from_secs(2), Carried::default());
        pace.reduced.sample(NOW, Carried::default());
    }

    #[test]
    fn little_is_on_its_way_when_the_vm_may_stop_at_any_moment() {
        let pace = carrying(40_000_000);
        let megabytes = |left| pace.window(NOW, RTT, left, 0.0) as f64 / 1e6;
        let (much, some, little) = (megabytes(30 << 20), megabytes(18 << 20), megabytes(1 << 20));
        assert!((20.0..25.0).contains(&much), "{much}");
        // The window would take all of it at once.
        assert!((8.5..10.0).contains(&some) && little == some, "{some} {little}");
        // On a long path there is time for what is lost to come again.
        let long = pace.window(NOW, Some(Duration::from_millis(300)), 1 << 20, 0.0) as f64 / 1e6;
        assert!((27.5..33.0).contains(&long), "{long}");
        // A link of which nothing is known yet.
        assert_eq!(Pace::new(1).window(NOW, RTT, u64::MAX, 0.0), WINDOW_START);
        assert_eq!(Pace::new(1).window(NOW, RTT, 0, 0.0), WINDOW_MIN);
    }

    #[test]
    fn a_stream_that_is_hardly_faster_than_the_guest_writes_gets_more_room() {
        let long = Some(Duration::from_millis(300));
        // Each byte comes back after a second: two packets of it are lost now and then.
        let mut pace = carrying(18_000_000);
        let window = |pace: &Pace, left, written| pace.window(NOW, long, left, written);
        let megabytes = |pace: &Pace, written| window(pace, 1 << 20, written) as f64 / 1e6;
        // The link may be full of it: more would only wait.
        assert!((12.5..14.5).contains(&megabytes(&pace, 17e6)));
        leave_room(&mut pace);
        assert!((12.5..14.5).contains(&megabytes(&pace, 3e6)));
        // What is in the window comes back within a second, so it has to be more than what the guest writes in one.
        assert!(megabytes(&pace, 17e6) > 20.0);
        assert!(window(&pace, u64::MAX, 17e6) > window(&pace, 1 << 20, 17e6));
    }

    #[test]
    fn memory_that_leaves_the_link_room_may_become_faster() {
        let mut pace = carrying(10_000_000);
        let megabytes = |pace: &Pace, left| pace.window(NOW, RTT, left, 0.0) as f64 / 1e6;
        let full = megabytes(&pace, 500_000_000);
        assert!((5.0..6.0).contains(&full), "{full}");
        leave_room(&mut pace);
        assert!((1.9..2.1).contains(&(megabytes(&pace, 500_000_000) / full)));
        let later = pace.window(NOW, RTT, 500_000_000, 1e6) as f64 / 1e6;
        assert!((full * 0.99..full * 1.01).contains(&later), "{later}");
        // And it never takes all that is left at once.
        assert!(megabytes(&pace, 16_000_000) <= 8.0);
        assert!(megabytes(&pace, 9_000_000) <= full);
    }
}
