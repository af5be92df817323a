//! A small table from 64-bit keys to slots of a ring, that forgets rather than grows.
//!
//! Owns buckets of eight entries, one cache line each; two entries for each slot, so a few in a thousand are pushed out early. An entry
//! is 8 bytes: part of the key, the lap of the ring on which the slot was filled, the slot. Leaves what a key means to `window`.
//! Promises nothing but candidates: whoever asks compares the content's digest, or finds that a wrong base is of no help.

/// Entries of a bucket.
const WAYS: usize = 8;
/// Entries for each slot of the ring.
const SPREAD: u64 = 2;

/// The table. All zeros is empty: lap and slot of an entry count from one together, see [`pack`].
pub struct Index {
    buckets: Vec<[u64; WAYS]>,
    /// Slots of the ring.
    slots: u64,
}

impl Index {
    /// For a ring of `slots` slots, at most 2^32 - 2.
    pub fn new(slots: u64) -> Self {
        let buckets = (slots * SPREAD).div_ceil(WAYS as u64).max(1);
        Self {
            buckets: vec![[0; WAYS]; buckets as usize],
            slots,
        }
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.buckets.fill([0; WAYS]);
    }

    fn bucket(&self, key: u64) -> usize {
        // The key's upper bits choose the bucket, its lower ones are kept in the entry.
        ((u128::from(key) * self.buckets.len() as u128) >> 64) as usize
    }

    fn pack(&self, key: u64, position: u64) -> u64 {
        let (lap, slot) = ((position / self.slots) & 0xff, position % self.slots + 1);
        ((key & 0xff_ffff) << 40) | (lap << 32) | slot
    }

    /// The newest position that may belong to `key`, of those for which `fits` holds; `filled` gives the position that a slot holds now.
    pub fn find(&self, key: u64, filled: impl Fn(u64) -> u64, fits: impl Fn(u64) -> bool) -> Option<u64> {
        let bucket = self.buckets.get(self.bucket(key))?;
        let mut best = None;
        for entry in bucket.iter().filter(|entry| **entry != 0) {
            if entry >> 40 != key & 0xff_ffff {
                continue;
            }
            let position = filled((entry & 0xffff_ffff) - 1);
            if self.pack(key, position) == *entry && best.is_none_or(|best| best < position) && fits(position)
            {
                best = Some(position);
            }
        }
        best
    }

    /// From now on `key` leads to `position`. Where the bucket is full, the entry of the oldest position gives way, and so what leads
    /// nowhere any more goes first. Looks at nothing but the bucket: the slots that it leads to are cache lines of their own.
    pub fn insert(&mut self, key: u64, position: u64) {
        let new = self.pack(key, position);
        let (at, slots) = (self.bucket(key), self.slots);
        let Some(bucket) = self.buckets.get_mut(at) else {
            return;
        };
        // Positions are kept but for whole rounds of 256 laps.
        let laps = slots * 256;
        let kept = |entry: u64| (entry >> 32 & 0xff) * slots + (entry & 0xffff_ffff).wrapping_sub(1) % slots;
        let age = |entry: u64| match (kept(new) + laps - kept(entry)) % laps {
            _ if entry == 0 => u64::MAX,
            // The same key, by all that is kept of it: this is its newer position.
            _ if entry >> 40 == new >> 40 => u64::MAX,
            // It came out of turn, and is newer.
            age if age > laps / 2 => 0,
            age => age,
        };
        if let Some(entry) = bucket.iter_mut().max_by_key(|entry| age(**entry)) {
            *entry = new;
        }
    }

    /// Forgets that `key` leads to `position`.
    pub(super) fn remove(&mut self, key: u64, position: u64) {
        let old = self.pack(key, position);
        let at = self.bucket(key);
        if let Some(entry) = self
            .buckets
            .get_mut(at)
            .and_then(|bucket| bucket.iter_mut().find(|entry| **entry == old))
        {
            *entry = 0;
        }
    }

    /// Bytes of memory.
    #[cfg(test)]
    pub(super) fn memory(&self) -> usize {
        self.buckets.len() * WAYS * size_of::<u64>()
    }

    /// Every entry, as it is kept.
    pub(super) fn entries(&self) -> impl Iterator<Item = u64> + '_ {
        self.buckets.iter().flatten().copied()
    }

    /// Takes the entries of another life of the same table; false where they are not as many.
    pub(super) fn restore(&mut self, entries: &[u64]) -> bool {
        if entries.len() != self.buckets.len() * WAYS {
            return false;
        }
        let valid = |entry: u64| {
            if entry & 0xffff_ffff <= self.slots && entry & 0xffff_ffff > 0 {
                entry
            } else {
                0
            }
        };
        for (bucket, from) in self.buckets.iter_mut().zip(entries.chunks_exact(WAYS)) {
            for (entry, from) in bucket.iter_mut().zip(from) {
                *entry = valid(*from);
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u64) -> u64 {
        n.wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    #[test]
    fn nearly_everything_that_a_full_ring_holds_is_found() {
        let slots = 10_000;
        let mut index = Index::new(slots);
        let mut ring = vec![0; slots as usize];
        for position in 1..5 * slots {
            ring[(position % slots) as usize] = position;
            index.insert(key(position), position);
        }
        let held = 4 * slots..5 * slots;
        let found = held.filter(|n| index.find(key(*n), |slot| ring[slot as usize], |_| true) == Some(*n));
        let found = found.count() as u64;
        assert!(found > slots * 99 / 100, "{found} of {slots}");
        let old = (1..4 * slots - 1)
            .filter(|n| index.find(key(*n), |slot| ring[slot as usize], |_| true) == Some(*n));
        assert_eq!(old.count(), 0, "what was overwritten is not found");
        assert!(index.memory() as u64 <= 16 * slots + 64);
    }

    #[test]
    fn of_a_full_bucket_the_oldest_position_gives_way_over_any_number_of_laps() {
        // One bucket only.
        let slots = 4;
        for begin in [2, 250 * slots, 256 * slots - 6, 1000 * slots] {
            let mut index = Index::new(slots);
            // Of two neighbours the newer comes first, as on many streams.
            let positions = (begin..begin + 12).map(|n| n ^ 1);
            for position in positions.clone() {
                index.insert(key(position), position);
            }
            let held = |n: u64| index.find(key(n), |_| n, |_| true) == Some(n);
            let found = positions.filter(|n| held(*n)).count();
            assert_eq!(found, WAYS, "from {begin}");
            let newest = begin + 12 - WAYS as u64..begin + 12;
            assert!(newest.clone().all(held), "from {begin}");
        }
    }

    #[test]
    fn a_key_leads_to_its_newest_position_until_that_is_removed() {
        let mut index = Index::new(100);
        let mut ring = vec![0; 100];
        for position in [5, 17] {
            ring[position as usize] = position;
            index.insert(key(1), position);
        }
        let find = |index: &Index| index.find(key(1), |slot| ring[slot as usize], |_| true);
        assert_eq!(find(&index), Some(17));
        index.remove(key(1), 17);
        assert_eq!(find(&index), None);
    }
}
