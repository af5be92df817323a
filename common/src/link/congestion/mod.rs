//! Who decides how much may be in flight.
//!
//! Owns our own congestion controller and how it is plugged into quinn: the search for a rate (`search`), the law (`control`, with
//! `epoch`), how it meets others (`contest`, `rivalry`), what several connections to one peer share (`budget`, `registry`), caps (`cap`),
//! and the adapter (`plug`). All but the adapter is pure. Leaves alone pacing: quinn sends at 1.25 times the window per smoothed
//! round-trip time, whatever the controller says, so a controller here speaks through its window only.

mod budget;
mod cap;
mod contest;
mod control;
mod epoch;
mod plug;
mod registry;
mod rivalry;
mod search;

pub use budget::{Budget, MemberAcks, MemberId, Share};
pub use cap::{CapSchedule, CapWindow, TokenBucket};
pub use control::Control;
pub use epoch::{Acks, ControlConfig, Mode, Verdict};
pub use plug::SharedBudget;

pub(crate) use plug::MemberFactory;
pub(crate) use registry::budget_towards;
