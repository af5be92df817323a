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
/// Before a round trip was measured.
const RTT_UNKNOWN: Duration = Duration::from_millis(100);

/// The counters of one migration.
pub(super) struct Pace {
    dirty: Vec<Dirty>,
    link: Rate,
    /// What it carried when there was enough to carry: a link with little to do is not slow.
    busy: f64,
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
    fn link(&self, rtt: Option<Duration>) -> LinkView {
        let blocks = self.reduced.blocks();
        let goodput = blocks.map_or(self.busy, |blocks| blocks.min(self.busy));
        LinkView {
            goodput,
            rtt: rtt.unwrap_or_default(),
            page_ratio: if self.busy > 0.0 { goodput / self.busy } else { 1.0 },
            block_ratio: 1.0,
        }
    }

    /// How far the tap may read ahead: enough that the link never runs dry, no more than that. `ram_left`: what QEMU has still to send.
    pub(super) fn window(&self, rtt: Option<Duration>, ram_left: u64) -> u64 {
        let long = self.long_window(rtt);
        if ram_left >= long.max(NEAR_END) {
            return long;
        }
        let rtt = rtt.unwrap_or(RTT_UNKNOWN);
        // What is lost takes a round trip and a half more, and holds up all that follows. A reach that is shorter than what memory takes
        // makes the rate fall, and with it the window: on a long, lossy path it would never be over.
        let reach = rtt + SLACK_AT_END.max(rtt * 3 / 2);
        ((self.rate() * reach.as_secs_f64()) as u64).max(WINDOW_MIN)
    }

    /// What the link carries of memory. A stream that has only begun says nothing of it, but the disks do.
    fn rate(&self) -> f64 {
        self.acked.per_second().unwrap_or(0.0).max(self.busy)
    }

    fn long_window(&self, rtt: Option<Duration>) -> u64 {
        let reach = rtt.unwrap_or(RTT_UNKNOWN) * 2 + WINDOW_SLACK;
        ((self.rate() * reach.as_secs_f64()) as u64).max(WINDOW_START)
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
                    dirty_rate: ram.dirty_pages_rate as f64 * ram.page_size as f64,
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
            link: self.link(rtt),
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
    use super::*;

    const RTT: Option<Duration> = Some(Duration::from_millis(80));

    #[test]
    fn little_is_on_its_way_when_the_vm_may_stop_at_any_moment() {
        // A stream of 40 MB/s over 80 ms.
        let mut pace = Pace::new(1);
        for second in 0..20 {
            pace.acked
                .sample(Duration::from_secs(second), second * 40_000_000);
        }
        let megabytes = |left| pace.window(RTT, left) as f64 / 1e6;
        let (much, some, little) = (megabytes(30 << 20), megabytes(18 << 20), megabytes(1 << 20));
        assert!((20.0..25.0).contains(&much), "{much}");
        // The window would take all of it at once.
        assert!((8.5..10.0).contains(&some) && little == some, "{some} {little}");
        // On a long path there is time for what is lost to come again.
        let long = pace.window(Some(Duration::from_millis(300)), 1 << 20) as f64 / 1e6;
        assert!((27.5..33.0).contains(&long), "{long}");
        // A link of which nothing is known yet.
        assert_eq!(Pace::new(1).window(RTT, u64::MAX), WINDOW_START);
        assert_eq!(Pace::new(1).window(RTT, 0), WINDOW_MIN);
    }
}
