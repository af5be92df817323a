//! The second look: what was skipped and is allocated now.
//!
//! Owns the comparison shortly before the pause. It is a belt beside the braces: a block that was proven free and allocated since
//! is in a dirty bitmap. Leaves sending to the caller.

use longhaul_common::extent::Extent;

use super::look::Look;
use crate::disk::free_map::FreeMap;

/// What the comparison found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SecondLook {
    /// Skipped and not free any more, in disk order: to be sent.
    pub send: Vec<Extent>,
    /// Bytes of `send`.
    pub bytes: u64,
    /// Bytes skipped that the last look could not see again, because their part gives nothing without a freeze or was read torn.
    pub unseen: u64,
}

/// Compares the blocks that round 0 left out, less those that later rounds sent, with the last look.
pub fn second_look(skipped: &FreeMap, last: &Look) -> SecondLook {
    let mut found = SecondLook::default();
    let mut seen = 0;
    let ranges = last.parts.iter().filter_map(|part| part.found.as_ref());
    for range in ranges.flat_map(|found| &found.ranges) {
        skipped.each_run(range, &mut |run| {
            seen += run.len();
            let mut at = run.offset();
            while at < run.end() {
                let (free, same) = last.free.run(at, run.end());
                if !free {
                    found.bytes += same.len();
                    found.send.push(same);
                }
                at = same.end();
            }
        });
    }
    found.send.sort_unstable();
    found.unseen = skipped.free_bytes().saturating_sub(seen);
    found
}
