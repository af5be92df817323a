//! Whether a running VM's changes fit through the link, and when to hand it over: pure, with time as an argument.
//!
//! Owns the decision, its reasoning in words, and the forecast made by the same arithmetic. Leaves measuring and doing to the
//! session. Promises: an answer for every view, however odd its numbers; a handover is answered only when its predicted blackout
//! is within the budget; what is not allowed is never answered; a guest that cannot converge is told so within a bounded time.

mod blackout;
mod decide;
mod forecast;
mod rate;
#[cfg(test)]
mod tests;

use std::time::Duration;

pub use blackout::{Blackout, predict};
pub use decide::Converge;
pub use forecast::{DiskSurvey, Forecast, Survey, forecast};
pub use rate::Rate;

/// A disk between two rounds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DiskView {
    /// Bytes in the bitmap that the guest writes into now.
    pub dirty: u64,
    /// Bytes of the running round that are not on their way yet; in round 0 also what was not read.
    pub unsent: u64,
    /// Bytes per second that become dirty anew.
    pub dirty_rate: f64,
}

/// The guest's memory while QEMU iterates.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RamView {
    /// Bytes of pages that QEMU has still to send, as of now.
    pub remaining: u64,
    /// Bytes per second that become dirty anew.
    pub dirty_rate: f64,
    /// Since QEMU last synced its bitmap: what was dirtied since is in no count of QEMU's.
    pub since_sync: Duration,
    /// Bytes of QEMU's stream that were taken and have no credit back.
    pub buffered: u64,
    /// Whole passes that QEMU finished.
    pub passes: u32,
}

/// What the link and the reduction give.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkView {
    /// Reduced bytes per second that this job gets.
    pub goodput: f64,
    pub rtt: Duration,
    /// Reduced bytes for each byte of a page that is sent again, 0 to 1.
    pub page_ratio: f64,
    /// What it can become. The same where the link is full; where it has room, a page was not held up by it.
    pub best_page_ratio: f64,
    /// As `page_ratio`, for dirty blocks.
    pub block_ratio: f64,
}

/// All that one decision looks at.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    pub disks: Vec<DiskView>,
    /// Whether round 0 or a later one is still being read.
    pub round_running: bool,
    /// `None` while QEMU does not migrate.
    pub ram: Option<RamView>,
    /// What memory is expected to need while `ram` is `None`, if it was measured (`calc-dirty-rate`): bytes per second.
    pub ram_dirty_rate: Option<f64>,
    pub link: LinkView,
    /// Bytes of device state and description, reduced: a guess before the first, about 60 KiB.
    pub device_state: u64,
    /// What stopping, loading, flushing and starting take besides the bytes.
    pub steps: Duration,
    /// How QEMU is slowed now, in percent of its processors' time.
    pub cpu_slowed: u8,
    /// Bytes per second that each disk is held to now.
    pub io_limit: Option<u64>,
}

/// What to do with a guest that does not converge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// Keep the disks in sync and try again.
    Wait,
    /// The same, but only for this long in all.
    GiveUp(Duration),
}

/// What the config allows and wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Longest blackout.
    pub blackout: Duration,
    pub auto_converge: bool,
    pub io_throttle: bool,
    pub patience: Patience,
    /// Since the migration began; after it nothing is tried any more.
    pub deadline: Option<Duration>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            blackout: Duration::from_millis(300),
            auto_converge: false,
            io_throttle: false,
            patience: Patience::Wait,
            deadline: None,
        }
    }
}

/// What to do next. Each may be answered again and again; doing what is done already does nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Decision {
    /// Swap the bitmaps and read another round of the disks (beside memory, where that migrates).
    Round,
    /// Start QEMU's migration.
    StartRam,
    /// Let it go on as it does.
    Continue,
    /// Raise QEMU's downtime limit.
    HandOver {
        predicted: Duration,
    },
    /// Slow the guest: processors by so many percent, each disk to so many bytes per second; what is `None` stays as it is.
    SlowGuest {
        cpu: Option<u8>,
        io: Option<u64>,
    },
    /// Cancel QEMU's migration if it runs, undo what slows the guest, and only keep the disks in sync.
    HoldInSync,
    GiveUp,
}

/// A decision with its reasons.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    pub decision: Decision,
    /// One sentence with all numbers that led here, for the log and the report.
    pub why: String,
    /// The blackout, were the guest stopped now.
    pub predicted: Duration,
    /// The shortest blackout that going on can lead to.
    pub floor: Duration,
    /// Reduced bytes that the guest dirties, for each byte that the link carries: from 1 on, going on is useless.
    pub utilisation: f64,
}
