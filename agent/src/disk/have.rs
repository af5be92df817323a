//! Which leaves the target holds durably, and with what content.
//!
//! Owns the comparison that lets a later attempt skip what an earlier one delivered. Promises that a leaf counts as kept only if
//! its digest equals what was just read: a source that changed in between is sent again.

use longhaul_common::digest::{Digest, leaf_count};
use longhaul_common::wire::session::Have;

/// No leaf has this digest: it would be a preimage of all ones.
const UNKNOWN: Digest = Digest([0xff; 32]);
/// Stands for a leaf of zeros, whatever its length.
const ZEROS: Digest = Digest([0; 32]);

/// Digests of the target's durable leaves: 32 bytes for each leaf of the disk, nothing while none is known.
#[derive(Debug, Default)]
pub(crate) struct HaveLeaves {
    digests: Vec<Digest>,
    /// First leaf that nothing was said of: the target speaks of ascending leaves, once of each.
    next: u64,
}

/// A list of leaves that does not fit the disk.
#[derive(Debug, thiserror::Error)]
#[error(
    "the target claims leaves that the disk does not have, or speaks of one twice; it holds another disk's copy"
)]
pub(crate) struct NotThisDisk;

impl HaveLeaves {
    /// Adds what the target says of a disk of `size` bytes.
    pub(crate) fn add(&mut self, have: &Have, size: u64) -> Result<(), NotThisDisk> {
        let leaves = leaf_count(size);
        let end = have
            .first
            .checked_add(have.count)
            .filter(|end| *end <= leaves && have.first >= self.next && have.count > 0)
            .ok_or(NotThisDisk)?;
        self.next = end;
        if self.digests.is_empty() {
            self.digests = vec![UNKNOWN; leaves as usize];
        }
        self.digests[have.first as usize..end as usize].fill(ZEROS);
        for (leaf, digest) in &have.digests {
            if !(have.first..end).contains(leaf) {
                return Err(NotThisDisk);
            }
            self.digests[*leaf as usize] = *digest;
        }
        Ok(())
    }

    /// What is known of `leaf`: nothing, zeros (`Some(None)`), or a digest.
    pub(crate) fn get(&self, leaf: u64) -> Option<Option<Digest>> {
        let digest = *self.digests.get(leaf as usize)?;
        (digest != UNKNOWN).then(|| (digest != ZEROS).then_some(digest))
    }

    /// Whether the target's `leaf` holds `digest` (`None`: zeros).
    pub(crate) fn holds(&self, leaf: u64, digest: Option<Digest>) -> bool {
        self.digests
            .get(leaf as usize)
            .is_some_and(|known| *known == digest.unwrap_or(ZEROS))
    }
}

#[cfg(test)]
mod tests {
    use longhaul_common::digest::LEAF;
    use longhaul_common::ids::DiskIndex;

    use super::*;

    #[test]
    fn only_equal_leaves_are_held() {
        let one = Digest::of(b"one");
        let mut have = HaveLeaves::default();
        assert!(!have.holds(0, None));
        let said = |first, count, digests| Have {
            disk: DiskIndex(0),
            first,
            count,
            digests,
        };
        have.add(&said(1, 2, vec![(2, one)]), 4 * LEAF).unwrap();
        assert!(have.add(&said(1, 2, vec![(2, one)]), 4 * LEAF).is_err(), "twice");
        assert!(have.holds(1, None) && have.holds(2, Some(one)));
        assert!(!have.holds(2, None) && !have.holds(0, None) && !have.holds(9, None));
        assert!(have.add(&said(3, 2, vec![]), 4 * LEAF).is_err());
        assert!(have.add(&said(u64::MAX, 2, vec![]), 4 * LEAF).is_err());
        assert!(have.add(&said(0, 1, vec![(3, one)]), 4 * LEAF).is_err());
    }
}
