//! One direction's window: a ring of blocks that both gateways hold, and what leads to its slots.
//!
//! Owns positions, slots, the indexes, and what may be referred to. The same type serves both ends: the sender assigns positions and
//! enters a block into the indexes when the peer has accepted it, the receiver stores what it is told and enters it at once. Leaves
//! the choice between references and content to `encode`, and whose window it is to `pair`.
//!
//! Promises: a position is given to one content only, ever; a slot is never overwritten while a payload that is not accepted refers to it;
//! what is read back is exactly what was stored at that position, or nothing.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::alike::{Alike, Features};
use super::block::{BlockDigest, DigestKey, short};
use super::index::Index;
use super::layout::BLOCK_LEN;
use super::slot_file::SlotFile;

/// Most blocks that one batch adds.
pub(super) const BATCH_BLOCKS: u64 = 256;
/// Fewest slots of a window.
pub(super) const SLOTS_MIN: u64 = 4 * BATCH_BLOCKS;
/// Most slots of a window: 8 TiB.
pub const SLOTS_MAX: u64 = 1 << 31;

/// How large a window is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Blocks held in memory: the newest ones.
    pub memory: u64,
    /// Blocks held in all.
    pub slots: u64,
}

impl Size {
    /// Of bytes in memory, and bytes in a file where there is one.
    pub fn of(memory: u64, file: u64) -> Self {
        let blocks = |bytes: u64| (bytes / BLOCK_LEN as u64).clamp(SLOTS_MIN, SLOTS_MAX);
        Self {
            memory: blocks(memory),
            slots: blocks(memory.max(file)),
        }
    }
}

/// What a slot holds. All zeros is empty.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Slot {
    /// With [`SECRET`] set where the content is a guest's memory.
    marked: u64,
    pub(super) digest: BlockDigest,
}

/// All of a window but its blocks, as it survives a restart.
pub(super) struct Image {
    pub epoch: u64,
    pub head: u64,
    pub slots: Vec<Slot>,
    pub by_digest: Vec<u64>,
    pub by_place: Vec<u64>,
}

/// Marks content of a guest's memory: it reaches a disk only encrypted.
pub(super) const SECRET: u64 = 1 << 63;

impl Slot {
    fn position(&self) -> u64 {
        self.marked & !SECRET
    }

    /// The position under which the next life finds it; none for a guest's memory, whose key is lost.
    pub(super) fn kept_position(&self) -> u64 {
        if self.marked & SECRET == 0 { self.marked } else { 0 }
    }

    /// As an earlier life kept it.
    pub(super) fn kept(position: u64, digest: BlockDigest) -> Self {
        let marked = if position < SECRET { position } else { 0 };
        Self { marked, digest }
    }
}

/// A block that a payload refers to, found in a window.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    pub position: u64,
    digest: BlockDigest,
    secret: bool,
}

/// Where a block's content is.
pub(super) enum Read {
    /// It was copied.
    Done,
    /// Only in the file: read it there, without the lock.
    InFile(Found),
    Gone,
}

/// What the payloads on their way need of the window: given back by [`Window::settle`].
#[derive(Debug, Default)]
pub(super) struct Receipt {
    pub epoch: u64,
    /// Positions assigned: first and count.
    pub first: u64,
    pub count: u64,
    /// Of each of these.
    pub features: Vec<Features>,
    /// Of each block with content, the place it has in its VM and the position of its content.
    pub places: Vec<(u64, u64)>,
    /// The oldest position that is referred to.
    pub oldest: Option<u64>,
}

/// The window.
pub(super) struct Window {
    ring: Mutex<Ring>,
    pub(super) key: DigestKey,
    pub(super) file: Option<Arc<SlotFile>>,
}

/// What the lock protects.
pub(super) struct Ring {
    pub(super) epoch: u64,
    /// Whether the peer has agreed to this epoch; a receiver's window always has.
    pub(super) agreed: bool,
    /// Positions that can be referred to: the smaller of both ends' slots.
    reach: u64,
    /// The next position.
    pub(super) head: u64,
    slots: Vec<Slot>,
    memory: Vec<u8>,
    /// What lies before this position is not in `memory`: an earlier life stored it.
    begun: u64,
    by_digest: Index,
    by_place: Index,
    /// Hints only: not kept over a restart, and what it leads to counts if `by_digest` knows it, too.
    alike: Alike,
    /// Oldest positions of payloads on their way, and how many payloads have each.
    pins: BTreeMap<u64, u32>,
}

impl Window {
    /// An empty one.
    pub(super) fn new(size: Size, epoch: u64, key: DigestKey, file: Option<Arc<SlotFile>>) -> Self {
        let slots = if file.is_some() { size.slots } else { size.memory };
        let ring = Ring {
            epoch,
            agreed: false,
            reach: slots,
            head: 1,
            slots: vec![Slot::default(); slots as usize],
            memory: vec![0; size.memory as usize * BLOCK_LEN],
            begun: 0,
            by_digest: Index::new(slots),
            by_place: Index::new(slots),
            alike: Alike::new(slots),
            pins: BTreeMap::new(),
        };
        Self {
            ring: Mutex::new(ring),
            key,
            file,
        }
    }

    /// As an earlier life of this program left it. Where the image does not fit, this is an empty one of a later epoch.
    pub(super) fn resumed(size: Size, image: Image, key: DigestKey, file: Arc<SlotFile>) -> Self {
        let window = Self::new(size, image.epoch, key, Some(file));
        {
            let mut ring = window.ring();
            let ring = &mut *ring;
            let fits = image.slots.len() == ring.slots.len()
                && image.head < SECRET
                && ring.by_digest.restore(&image.by_digest)
                && ring.by_place.restore(&image.by_place);
            if fits {
                ring.slots = image.slots;
                ring.head = image.head.max(1);
                ring.begun = ring.head;
            } else {
                ring.forget_all();
                ring.epoch = ring.epoch.saturating_add(1);
            }
        }
        window
    }

    /// What the next life needs to go on.
    pub(super) fn image(&self) -> Image {
        let ring = self.ring();
        Image {
            epoch: ring.epoch,
            head: ring.head,
            slots: ring.slots.clone(),
            by_digest: ring.by_digest.entries().collect(),
            by_place: ring.by_place.entries().collect(),
        }
    }

    /// The state is sound at any moment: a panic elsewhere does not spoil it.
    pub(super) fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the peer answered: it holds `epoch` already or begins it empty, with `slots` slots.
    pub(super) fn agree(&self, epoch: u64, held: bool, slots: u64) {
        let mut ring = self.ring();
        if ring.epoch != epoch {
            return;
        }
        if !held {
            ring.forget_all();
        }
        ring.reach = (ring.slots.len() as u64).min(slots.max(1));
        ring.agreed = true;
    }

    /// A new epoch, above `above`: nothing that was stored before counts any more.
    pub(super) fn renew(&self, above: u64) -> u64 {
        let mut ring = self.ring();
        ring.forget_all();
        ring.agreed = false;
        ring.epoch = ring.epoch.max(above).saturating_add(1);
        ring.epoch
    }

    /// The payload with this receipt was accepted, and so its blocks are stored at the peer; or else it is given up.
    pub(super) fn settle(&self, receipt: &Receipt, accepted: bool) {
        let mut ring = self.ring();
        if receipt.epoch != ring.epoch {
            return;
        }
        if let Some(oldest) = receipt.oldest {
            ring.unpin(oldest);
        }
        if !accepted {
            return;
        }
        for position in receipt.first..receipt.first.saturating_add(receipt.count) {
            ring.enter_digest(position);
        }
        for (position, features) in (receipt.first..).zip(&receipt.features) {
            ring.enter_features(position, *features);
        }
        for (place, position) in &receipt.places {
            ring.enter_place(*place, *position);
        }
    }

    /// The peer does not have these after all.
    pub(super) fn forget(&self, receipt: &Receipt) {
        let mut ring = self.ring();
        for (_, position) in &receipt.places {
            ring.erase(*position);
        }
    }

    /// Copies the content at a position; false where it is gone, or is not what was stored.
    pub(super) fn read_file(&self, found: &Found, into: &mut [u8]) -> bool {
        let Some(file) = &self.file else { return false };
        file.read(found.position, found.secret, into) && self.key.digest(into) == found.digest
    }

    /// Bytes of memory that this window may come to take, besides its blocks.
    #[cfg(test)]
    pub(super) fn index_memory(&self) -> usize {
        let ring = self.ring();
        let slots = ring.slots.len() * size_of::<Slot>();
        slots + ring.by_digest.memory() + ring.by_place.memory() + ring.alike.memory()
    }
}

impl Ring {
    pub(super) fn len(&self) -> u64 {
        self.slots.len() as u64
    }

    fn slot(&self, position: u64) -> Option<&Slot> {
        let slot = self.slots.get((position % self.len()) as usize)?;
        (position != 0 && slot.position() == position).then_some(slot)
    }

    fn forget_all(&mut self) {
        self.slots.fill(Slot::default());
        self.by_digest.clear();
        self.by_place.clear();
        self.alike.clear();
        self.pins.clear();
    }

    /// Whether a payload that is made now may refer to `position`: still there when this batch and all before it are stored.
    fn reaches(&self, position: u64, margin: u64) -> bool {
        position.saturating_add(self.reach) > self.head.saturating_add(margin)
    }

    fn filled(&self, slot: u64) -> u64 {
        self.slots.get(slot as usize).map_or(0, Slot::position)
    }

    /// A block of this content that may be referred to; `margin` positions are yet to come before it is looked up.
    pub(super) fn same(&self, digest: &BlockDigest, margin: u64) -> Option<u64> {
        let fits = |position| {
            let slot = self.slot(position);
            slot.is_some_and(|slot| slot.digest == *digest) && self.reaches(position, margin)
        };
        self.by_digest.find(short(digest), |slot| self.filled(slot), fits)
    }

    /// The newest known content of a place.
    pub(super) fn at_place(&self, place: u64, margin: u64) -> Option<u64> {
        let fits = |position| self.slot(position).is_some() && self.reaches(position, margin);
        self.by_place.find(place, |slot| self.filled(slot), fits)
    }

    /// A block that is like one with these features, and may be referred to.
    pub(super) fn alike(&self, features: Features, margin: u64) -> Option<u64> {
        let slots = self.alike.find(features);
        let mut held = slots.filter_map(|slot| self.slots.get(slot as usize));
        held.find_map(|slot| self.same(&slot.digest, margin))
    }

    /// Whether the content at `position` is in memory, which holds the newest blocks.
    fn is_resident(&self, position: u64) -> bool {
        let blocks = (self.memory.len() / BLOCK_LEN) as u64;
        position >= self.begun && position.saturating_add(blocks) >= self.head
    }

    /// Where it lies there.
    fn in_memory(&self, position: u64) -> std::ops::Range<usize> {
        let at = (position % (self.memory.len() / BLOCK_LEN) as u64) as usize * BLOCK_LEN;
        at..at + BLOCK_LEN
    }

    /// Copies the content at `position` from memory, or says where it is.
    pub(super) fn read(&self, position: u64, into: &mut [u8]) -> Read {
        let Some(slot) = self.slot(position) else {
            return Read::Gone;
        };
        match self.memory.get(self.in_memory(position)) {
            Some(block) if self.is_resident(position) && into.len() == BLOCK_LEN => {
                into.copy_from_slice(block);
                Read::Done
            }
            _ => Read::InFile(Found {
                position,
                digest: slot.digest,
                secret: slot.marked & SECRET != 0,
            }),
        }
    }

    /// The digest of the content at `position`.
    pub(super) fn digest(&self, position: u64) -> Option<BlockDigest> {
        self.slot(position).map(|slot| slot.digest)
    }

    /// Takes `count` positions; `None` while payloads on their way need the slots.
    pub(super) fn reserve(&mut self, count: u64) -> Option<u64> {
        let end = self.head.checked_add(count)?;
        let free = self
            .pins
            .first_key_value()
            .is_none_or(|(oldest, _)| end <= oldest.saturating_add(self.reach));
        // Beyond this, `SECRET` would be reached.
        if !free || end >= SECRET {
            return None;
        }
        Some(std::mem::replace(&mut self.head, end))
    }

    /// Keeps everything from `oldest` on until it is unpinned.
    pub(super) fn pin(&mut self, oldest: u64) {
        *self.pins.entry(oldest).or_default() += 1;
    }

    fn unpin(&mut self, oldest: u64) {
        if let Some(count) = self.pins.get_mut(&oldest) {
            *count -= 1;
            if *count == 0 {
                self.pins.remove(&oldest);
            }
        }
    }

    /// Puts content into the slot of `position`, unless that holds something newer; tells whether it did.
    pub(super) fn write(&mut self, position: u64, secret: bool, digest: BlockDigest, block: &[u8]) -> bool {
        let index = (position % self.len()) as usize;
        let Some(slot) = self.slots.get_mut(index) else {
            return false;
        };
        if position == 0 || position >= SECRET || slot.position() > position || block.len() != BLOCK_LEN {
            return false;
        }
        let mark = if secret { SECRET } else { 0 };
        *slot = Slot {
            marked: position | mark,
            digest,
        };
        let range = self.in_memory(position);
        if self.is_resident(position)
            && let Some(kept) = self.memory.get_mut(range)
        {
            kept.copy_from_slice(block);
        }
        self.head = self.head.max(position + 1);
        true
    }

    /// Lets `position` be found by what is like it.
    fn enter_features(&mut self, position: u64, features: Features) {
        if self.slot(position).is_some() {
            let slot = position % self.len();
            self.alike.insert(features, slot);
        }
    }

    /// Lets `position` be found by its content.
    pub(super) fn enter_digest(&mut self, position: u64) {
        let Some(slot) = self.slot(position) else { return };
        self.by_digest.insert(short(&slot.digest), position);
    }

    /// Lets `position` be found as the newest content of a place.
    pub(super) fn enter_place(&mut self, place: u64, position: u64) {
        if self.slot(position).is_some() {
            self.by_place.insert(place, position);
        }
    }

    fn erase(&mut self, position: u64) {
        let Some(digest) = self.digest(position) else {
            return;
        };
        self.by_digest.remove(short(&digest), position);
        let index = (position % self.len()) as usize;
        if let Some(slot) = self.slots.get_mut(index) {
            *slot = Slot::default();
        }
    }
}
