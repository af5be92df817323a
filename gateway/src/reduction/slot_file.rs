//! The part of a window that lies in a file: one block for each slot.
//!
//! Owns reading and writing blocks at their slots, and the encryption of guests' memory: a key stream of keyed BLAKE3 under a key that
//! lives as long as the process, a different one for each position, so that what is left of it after a crash is noise. Leaves alone
//! what is valid: the window knows each slot's digest. Never called with the window's lock held.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::layout::BLOCK_LEN;

/// An open file of a window.
pub(super) struct SlotFile {
    file: File,
    slots: u64,
    secret: [u8; 32],
}

impl SlotFile {
    /// Of `slots` blocks.
    pub(super) fn new(file: File, slots: u64) -> Self {
        Self {
            file,
            slots: slots.max(1),
            secret: rand::random(),
        }
    }

    fn offset(&self, position: u64) -> u64 {
        position % self.slots * BLOCK_LEN as u64
    }

    /// Reads the slot of `position`; false where it cannot be read.
    pub(super) fn read(&self, position: u64, secret: bool, into: &mut [u8]) -> bool {
        let read = self.file.read_exact_at(into, self.offset(position)).is_ok();
        if read && secret {
            self.veil(position, into);
        }
        read
    }

    /// Writes blocks to consecutive positions; false where that failed, and then they are not to be found there.
    pub(super) fn write(&self, first: u64, secret: bool, blocks: &mut [u8]) -> bool {
        if secret {
            for (position, block) in (first..).zip(blocks.chunks_exact_mut(BLOCK_LEN)) {
                self.veil(position, block);
            }
        }
        let count = (blocks.len() / BLOCK_LEN) as u64;
        // Up to the end of the ring, and from its beginning.
        let before = (self.slots - first % self.slots).min(count) as usize * BLOCK_LEN;
        let (head, tail) = blocks.split_at(before);
        let wrapped = first.saturating_add((before / BLOCK_LEN) as u64);
        self.file.write_all_at(head, self.offset(first)).is_ok()
            && (tail.is_empty() || self.file.write_all_at(tail, self.offset(wrapped)).is_ok())
    }

    /// Encrypts, and decrypts.
    fn veil(&self, position: u64, block: &mut [u8]) {
        let mut stream = [0; BLOCK_LEN];
        let mut hasher = blake3::Hasher::new_keyed(&self.secret);
        hasher.update(&position.to_le_bytes());
        hasher.finalize_xof().fill(&mut stream);
        super::block::xor(block, &stream);
    }

    /// Waits until all of it is on the disk.
    pub(super) fn sync(&self) -> std::io::Result<()> {
        self.file.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_guests_is_never_in_the_file() {
        let file = tempfile::tempfile().unwrap();
        let slots = SlotFile::new(file, 8);
        let content: Vec<u8> = (0..3 * BLOCK_LEN).map(|n| (n / 7) as u8).collect();
        assert!(slots.write(6, true, &mut content.clone()));
        assert!(slots.write(11, false, &mut content[..BLOCK_LEN].to_vec()));
        let mut block = vec![0; BLOCK_LEN];
        for (n, expected) in content.chunks(BLOCK_LEN).enumerate() {
            assert!(slots.read(6 + n as u64, true, &mut block));
            assert_eq!(block, expected);
            assert!(slots.read(6 + n as u64, false, &mut block));
            assert_ne!(block, expected);
        }
        assert!(slots.read(11, false, &mut block));
        assert_eq!(block, content[..BLOCK_LEN]);
    }
}
