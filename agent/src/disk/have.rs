//! Which leaves the target holds durably, and with what content.
//!
//! Owns the comparison that lets a later attempt skip what an earlier one delivered. Promises that a leaf counts as kept only if
//! its digest equals what was just read: a source that changed in between is sent again. Leaves of a shadow have no digest: whoever does not
//! know every change since says so ([`HaveLeaves::forget_shadow`]), and they count as missing.

use std::ops::Range;

use longhaul_common::digest::{Digest, leaf_count};
use longhaul_common::wire::session::{Have, ShadowId};

/// No leaf has this digest: it would be a preimage of all ones.
const UNKNOWN: Digest = Digest([0xff; 32]);
/// Stands for a leaf of zeros, whatever its length.
const ZEROS: Digest = Digest([0; 32]);
/// Stands for a leaf that is as the shadow was left. No leaf has this digest either.
const AS_LEFT: Digest = Digest([0xfe; 32]);

/// Digests of the target's durable leaves: 32 bytes for each leaf of the disk, nothing while none is known.
#[derive(Debug, Default)]
pub(crate) struct HaveLeaves {
    digests: Vec<Digest>,
    /// First leaf that nothing was said of: the target speaks of ascending leaves, once of each.
    next: u64,
    /// The shadow that leaves are as it was left.
    shadow: Option<ShadowId>,
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
        if let Some(shadow) = have.shadow {
            if !have.digests.is_empty() || *self.shadow.get_or_insert(shadow) != shadow {
                return Err(NotThisDisk);
            }
            self.digests[have.first as usize..end as usize].fill(AS_LEFT);
            return Ok(());
        }
        self.digests[have.first as usize..end as usize].fill(ZEROS);
        for (leaf, digest) in &have.digests {
            if !(have.first..end).contains(leaf) {
                return Err(NotThisDisk);
            }
            // A digest that stands for something else is no digest of a leaf.
            self.digests[*leaf as usize] = match *digest {
                AS_LEFT => UNKNOWN,
                digest => digest,
            };
        }
        Ok(())
    }

    /// The shadow that some leaves are as it was left; none once that was forgotten.
    pub(crate) fn shadow(&self) -> Option<ShadowId> {
        self.shadow
    }

    /// Not every change since the shadow is known: its leaves count as missing.
    pub(crate) fn forget_shadow(&mut self) {
        self.shadow = None;
        self.digests
            .iter_mut()
            .filter(|digest| **digest == AS_LEFT)
            .for_each(|digest| *digest = UNKNOWN);
    }

    /// Whether all these leaves are as the shadow was left.
    pub(crate) fn is_shadow(&self, leaves: Range<u64>) -> bool {
        let range = leaves.start as usize..leaves.end as usize;
        let known = self.digests.get(range).filter(|known| !known.is_empty());
        known.is_some_and(|known| known.iter().all(|digest| *digest == AS_LEFT))
    }

    /// What is known of `leaf`: nothing, zeros (`Some(None)`), or a digest.
    pub(crate) fn get(&self, leaf: u64) -> Option<Option<Digest>> {
        let digest = *self.digests.get(leaf as usize)?;
        (digest != UNKNOWN && digest != AS_LEFT).then(|| (digest != ZEROS).then_some(digest))
    }

    /// Whether the target's `leaf` holds `digest` (`None`: zeros), or will once the changes since its shadow are sent.
    pub(crate) fn holds(&self, leaf: u64, digest: Option<Digest>) -> bool {
        self.digests
            .get(leaf as usize)
            .is_some_and(|known| *known == digest.unwrap_or(ZEROS) || *known == AS_LEFT)
    }
}

#[cfg(test)]
mod tests {
    use longhaul_common::digest::LEAF;
    use longhaul_common::ids::{DiskIndex, JobId};

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
            shadow: None,
        };
        have.add(&said(1, 2, vec![(2, one)]), 4 * LEAF).unwrap();
        assert!(have.add(&said(1, 2, vec![(2, one)]), 4 * LEAF).is_err(), "twice");
        assert!(have.holds(1, None) && have.holds(2, Some(one)));
        assert!(!have.holds(2, None) && !have.holds(0, None) && !have.holds(9, None));
        assert!(have.add(&said(3, 2, vec![]), 4 * LEAF).is_err());
        assert!(have.add(&said(u64::MAX, 2, vec![]), 4 * LEAF).is_err());
        assert!(have.add(&said(0, 1, vec![(3, one)]), 4 * LEAF).is_err());
    }

    #[test]
    fn leaves_of_a_shadow_are_held_until_it_is_forgotten() {
        let shadow = ShadowId {
            job: JobId::random(),
            generation: 1,
            disk: DiskIndex(0),
        };
        let said = |first, shadow, digests| Have {
            disk: DiskIndex(0),
            first,
            count: 1,
            digests,
            shadow: Some(shadow),
        };
        let one = Digest::of(b"one");
        let mut have = HaveLeaves::default();
        have.add(&said(0, shadow, vec![]), 4 * LEAF).unwrap();
        have.add(
            &Have {
                shadow: None,
                ..said(1, shadow, vec![(1, one)])
            },
            4 * LEAF,
        )
        .unwrap();
        have.add(&said(2, shadow, vec![]), 4 * LEAF).unwrap();
        assert!(have.add(&said(3, shadow, vec![(3, one)]), 4 * LEAF).is_err());
        let other = ShadowId {
            generation: 2,
            ..shadow
        };
        assert!(have.add(&said(3, other, vec![]), 4 * LEAF).is_err());
        assert!(have.holds(0, None) && have.holds(0, Some(one)) && have.holds(2, None));
        assert!(
            have.is_shadow(0..1) && !have.is_shadow(0..2) && !have.is_shadow(3..5) && !have.is_shadow(9..9)
        );
        have.forget_shadow();
        assert!(!have.holds(0, None) && !have.holds(0, Some(one)) && !have.is_shadow(0..1));
        assert!(have.holds(1, Some(one)) && have.shadow().is_none());
        let mut forged = HaveLeaves::default();
        forged
            .add(
                &Have {
                    shadow: None,
                    ..said(0, shadow, vec![(0, AS_LEFT)])
                },
                LEAF,
            )
            .unwrap();
        assert!(!forged.holds(0, None), "a digest never stands for a shadow");
    }
}
