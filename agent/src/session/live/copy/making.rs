//! Cutting a pass over a running VM's disk into batches.
//!
//! Owns what is read at once, and what becomes one batch. Leaves the threads to the parent. Promises that every byte of the extents it is
//! given is in exactly one batch, and that little is read beside them.

use std::collections::VecDeque;

use longhaul_common::extent::{BLOCK, Extent};
use longhaul_common::ids::DiskIndex;
use longhaul_common::wire::batch::{Content, PIECES_MAX, Piece, RAW_MAX};
use longhaul_common::wire::session::Refusal;
use tokio::sync::mpsc;

use super::Batch;
use crate::disk::ReadAt;
use crate::disk::image::LiveImage;

/// How much of a batch of a later round is read at most: small ones travel in parallel.
const DIRTY_BATCH: usize = 256 << 10;
/// One read goes over gaps of at most so many bytes: asking again costs QEMU more than these do.
const GAP: u64 = 64 << 10;

/// Reads what the export's bitmap calls dirty.
pub(super) fn read_dirty(
    disk: DiskIndex,
    image: &LiveImage,
    batches: &mpsc::Sender<Result<Batch, Refusal>>,
) -> std::io::Result<()> {
    let mut making = Making::new(disk);
    let mut failed = Ok(());
    image.each_dirty(|extents| {
        if failed.is_ok() {
            failed = making.read(image, extents, batches);
        }
    })?;
    failed?;
    making.send(batches);
    Ok(())
}

/// The first of `waiting` that one read takes: at most `room` bytes of them, close together. They are taken out of it.
fn next_read(waiting: &mut VecDeque<Extent>, mut room: u64) -> Vec<Extent> {
    let mut parts: Vec<Extent> = Vec::new();
    while let Some(next) = waiting.front().copied() {
        let begin = parts.first().unwrap_or(&next).offset();
        let far = parts.last().is_some_and(|last| next.offset() - last.end() > GAP);
        let most = room.min((begin + DIRTY_BATCH as u64).saturating_sub(next.offset()));
        if far || most == 0 {
            break;
        }
        let part = Extent::between(next.offset(), next.end().min(next.offset() + most));
        waiting.pop_front();
        if part.end() < next.end() {
            waiting.push_front(Extent::between(part.end(), next.end()));
        }
        room -= part.len();
        parts.push(part);
    }
    parts
}

/// A batch that is being filled.
pub(super) struct Making {
    batch: Batch,
    buffer: Vec<u8>,
    gone: bool,
}

impl Making {
    pub(super) fn new(disk: DiskIndex) -> Self {
        let batch = Batch {
            disk,
            pieces: Vec::new(),
            data: Vec::new(),
        };
        Self {
            batch,
            buffer: vec![0; DIRTY_BATCH],
            gone: false,
        }
    }

    /// Reads these extents, in order and apart from each other; full batches are sent.
    pub(super) fn read(
        &mut self,
        image: &LiveImage,
        extents: Vec<Extent>,
        batches: &mpsc::Sender<Result<Batch, Refusal>>,
    ) -> std::io::Result<()> {
        const { assert!(DIRTY_BATCH <= RAW_MAX && DIRTY_BATCH / BLOCK as usize <= PIECES_MAX) };
        let mut waiting = VecDeque::from(extents);
        while !self.gone {
            let room = (DIRTY_BATCH as u64).saturating_sub(self.batch.covered());
            let parts = next_read(&mut waiting, room);
            let (Some(first), Some(last)) = (parts.first(), parts.last()) else {
                return Ok(());
            };
            let (begin, end) = (first.offset(), last.end());
            let mut buffer = std::mem::take(&mut self.buffer);
            let read = &mut buffer[..(end - begin) as usize];
            image.read_exact_at(read, begin)?;
            for part in &parts {
                let from = (part.offset() - begin) as usize;
                self.sort(&read[from..from + part.len() as usize], part.offset());
            }
            self.buffer = buffer;
            if self.batch.covered() >= DIRTY_BATCH as u64 {
                self.send(batches);
            }
        }
        Ok(())
    }

    /// Splits what was read into data and zeros, block by block.
    fn sort(&mut self, bytes: &[u8], mut at: u64) {
        for block in bytes.chunks(BLOCK as usize) {
            let extent = Extent::between(at, at + block.len() as u64);
            at = extent.end();
            let zero = block.iter().all(|byte| *byte == 0);
            let content = if zero { Content::Zero } else { Content::Data };
            if !zero {
                self.batch.data.extend_from_slice(block);
            }
            match self.batch.pieces.last_mut() {
                Some(last) if last.content == content && last.extent.end() == extent.offset() => {
                    last.extent = Extent::between(last.extent.offset(), extent.end());
                }
                _ => self.batch.pieces.push(Piece { extent, content }),
            }
        }
    }

    /// Sends what there is of a batch.
    pub(super) fn send(&mut self, batches: &mpsc::Sender<Result<Batch, Refusal>>) {
        if self.batch.pieces.is_empty() {
            return;
        }
        let next = Batch {
            disk: self.batch.disk,
            pieces: Vec::new(),
            data: Vec::new(),
        };
        let full = std::mem::replace(&mut self.batch, next);
        self.gone = batches.blocking_send(Ok(full)).is_err();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn neighbours_are_read_together_and_what_is_far_is_not() {
        let at = |kib: u64, len: u64| Extent::between(kib << 10, (kib + len) << 10);
        let mut waiting = VecDeque::from(vec![at(0, 4), at(16, 8), at(200, 4), at(500, 300)]);
        assert_eq!(next_read(&mut waiting, 256 << 10), [at(0, 4), at(16, 8)]);
        assert_eq!(next_read(&mut waiting, 256 << 10), [at(200, 4)]);
        assert_eq!(next_read(&mut waiting, 100 << 10), [at(500, 100)]);
        assert_eq!(waiting, [at(600, 200)]);
    }

    proptest! {
        #[test]
        fn every_byte_is_read_once(
            sizes in proptest::collection::vec((1_u64..200, 1_u64..60), 0..80), rooms in proptest::collection::vec(1_u64..64, 1..20),
        ) {
            let mut at = 0;
            let extents: Vec<_> = sizes.iter().map(|(gap, len)| {
                let extent = Extent::between((at + gap) * BLOCK, (at + gap + len) * BLOCK);
                at += gap + len;
                extent
            }).collect();
            let mut waiting = VecDeque::from(extents.clone());
            let mut read = Vec::new();
            for room in rooms.iter().cycle() {
                let parts = next_read(&mut waiting, room * BLOCK);
                let (Some(first), Some(last)) = (parts.first(), parts.last()) else { break };
                prop_assert!(last.end() - first.offset() <= DIRTY_BATCH as u64);
                prop_assert!(parts.iter().map(|part| part.len()).sum::<u64>() <= room * BLOCK);
                read.extend(parts);
            }
            let blocks = |list: &[Extent]| list.iter().flat_map(|e| (e.offset() / BLOCK)..(e.end() / BLOCK)).collect::<Vec<_>>();
            prop_assert_eq!(blocks(&read), blocks(&extents));
        }
    }
}
