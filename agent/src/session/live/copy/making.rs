//! Cutting a pass over a running VM's disk into batches.
//!
//! Owns what is read at once, and what becomes one batch. Leaves the threads to the parent. Promises that every byte of the extents it is
//! given is in exactly one batch, in order, and that little is read beside them.

use std::collections::VecDeque;

use longhaul_common::extent::{BLOCK, Extent};
use longhaul_common::ids::DiskIndex;
use longhaul_common::wire::batch::{Content, PIECES_MAX, Piece, RAW_MAX};

use super::Batch;
use crate::disk::ReadAt;
use crate::disk::image::LiveImage;

/// How much of the disk a batch of a later round stands for at most: small ones travel in parallel.
pub(super) const DIRTY_BATCH: usize = 256 << 10;
/// One read goes over gaps of at most so many bytes: asking again costs QEMU more than these do.
const GAP: u64 = 64 << 10;

/// Reads what the export's bitmap calls dirty.
pub(super) fn read_dirty(
    image: &LiveImage,
    making: &mut Making<impl FnMut(Batch) -> bool>,
) -> std::io::Result<()> {
    let mut failed = Ok(());
    image.each_dirty(|extents| {
        if failed.is_ok() {
            failed = making.read(image, extents).map(drop);
        }
    })?;
    failed?;
    making.send();
    Ok(())
}

/// The first of `waiting` that one read takes: at most `room` bytes of them, close together and within `span` bytes. They are taken out of it.
fn next_read(waiting: &mut VecDeque<Extent>, span: u64, mut room: u64) -> Vec<Extent> {
    let mut parts: Vec<Extent> = Vec::new();
    while let Some(next) = waiting.front().copied() {
        let begin = parts.first().unwrap_or(&next).offset();
        let far = parts.last().is_some_and(|last| next.offset() - last.end() > GAP);
        let most = room.min((begin + span).saturating_sub(next.offset()));
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

/// A batch that is being filled. `sink` takes each that is full; `false`: nobody wants more.
pub(super) struct Making<S> {
    disk: DiskIndex,
    pieces: Vec<Piece>,
    data: Vec<u8>,
    /// Bytes of the disk that it stands for.
    covered: u64,
    buffer: Vec<u8>,
    sink: S,
    gone: bool,
}

impl<S: FnMut(Batch) -> bool> Making<S> {
    /// For batches that stand for at most `size` bytes of the disk each.
    pub(super) fn new(disk: DiskIndex, size: usize, sink: S) -> Self {
        let size = size.min(RAW_MAX);
        Self {
            disk,
            pieces: Vec::new(),
            data: Vec::new(),
            covered: 0,
            buffer: vec![0; size],
            sink,
            gone: false,
        }
    }

    /// Reads these extents, in order and apart from each other; full batches are sent. `false`: nobody wants more.
    pub(super) fn read(&mut self, image: &dyn ReadAt, extents: Vec<Extent>) -> std::io::Result<bool> {
        const { assert!(RAW_MAX / BLOCK as usize <= PIECES_MAX) };
        let size = self.buffer.len() as u64;
        let mut waiting = VecDeque::from(extents);
        while !self.gone {
            let parts = next_read(&mut waiting, size, size - self.covered);
            let (Some(first), Some(last)) = (parts.first(), parts.last()) else {
                break;
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
            if self.covered >= size {
                self.send();
            }
        }
        Ok(!self.gone)
    }

    /// Splits what was read into data and zeros, block by block.
    fn sort(&mut self, bytes: &[u8], mut at: u64) {
        self.covered += bytes.len() as u64;
        for block in bytes.chunks(BLOCK as usize) {
            let extent = Extent::between(at, at + block.len() as u64);
            at = extent.end();
            let zero = block.iter().all(|byte| *byte == 0);
            let content = if zero { Content::Zero } else { Content::Data };
            if !zero {
                self.data.extend_from_slice(block);
            }
            match self.pieces.last_mut() {
                Some(last) if last.content == content && last.extent.end() == extent.offset() => {
                    last.extent = Extent::between(last.extent.offset(), extent.end());
                }
                _ => self.pieces.push(Piece { extent, content }),
            }
        }
    }

    /// Sends what there is of a batch.
    pub(super) fn send(&mut self) {
        if self.pieces.is_empty() {
            return;
        }
        self.covered = 0;
        let full = Batch {
            disk: self.disk,
            pieces: std::mem::take(&mut self.pieces),
            data: std::mem::take(&mut self.data).into(),
        };
        self.gone = !(self.sink)(full);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SPAN: u64 = DIRTY_BATCH as u64;

    #[test]
    fn neighbours_are_read_together_and_what_is_far_is_not() {
        let at = |kib: u64, len: u64| Extent::between(kib << 10, (kib + len) << 10);
        let mut waiting = VecDeque::from(vec![at(0, 4), at(16, 8), at(200, 4), at(500, 300)]);
        assert_eq!(next_read(&mut waiting, SPAN, 256 << 10), [at(0, 4), at(16, 8)]);
        assert_eq!(next_read(&mut waiting, SPAN, 256 << 10), [at(200, 4)]);
        assert_eq!(next_read(&mut waiting, SPAN, 100 << 10), [at(500, 100)]);
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
                let parts = next_read(&mut waiting, SPAN, room * BLOCK);
                let (Some(first), Some(last)) = (parts.first(), parts.last()) else { break };
                prop_assert!(last.end() - first.offset() <= SPAN);
                prop_assert!(parts.iter().map(|part| part.len()).sum::<u64>() <= room * BLOCK);
                read.extend(parts);
            }
            let blocks = |list: &[Extent]| list.iter().flat_map(|e| (e.offset() / BLOCK)..(e.end() / BLOCK)).collect::<Vec<_>>();
            prop_assert_eq!(blocks(&read), blocks(&extents));
        }

        #[test]
        fn every_byte_is_in_one_batch(
            parts in proptest::collection::vec((0_u64..20, 1_u64..90, 0_u8..3), 1..30), size in 1_usize..=256, steps in 1_usize..5,
        ) {
            // Extents of zeros or not, with gaps that are neither.
            let mut image = vec![9_u8; 64 * BLOCK as usize * 60];
            let (mut at, mut extents) = (0, Vec::new());
            for (gap, len, fill) in parts {
                let extent = Extent::between((at + gap) * BLOCK, (at + gap + len) * BLOCK);
                if extent.end() > image.len() as u64 {
                    break;
                }
                image[extent.offset() as usize..extent.end() as usize].fill(fill);
                at += gap + len;
                extents.push(extent);
            }
            let size = size * BLOCK as usize;
            let mut batches = Vec::new();
            let mut making = Making::new(DiskIndex(3), size, |batch| { batches.push(batch); true });
            for some in extents.chunks(extents.len().div_ceil(steps).max(1)) {
                prop_assert!(making.read(&image, some.to_vec()).unwrap());
            }
            making.send();
            let (mut copy, mut end) = (vec![9_u8; image.len()], 0);
            for batch in &batches {
                prop_assert!(batch.covered() <= size as u64 && batch.pieces.len() <= PIECES_MAX);
                let mut data = &batch.data[..];
                for piece in &batch.pieces {
                    prop_assert!(piece.extent.offset() >= end);
                    end = piece.extent.end();
                    let place = &mut copy[piece.extent.offset() as usize..end as usize];
                    match piece.content {
                        Content::Zero => place.fill(0),
                        _ => place.copy_from_slice(data.split_off(..place.len()).unwrap()),
                    }
                }
                prop_assert!(data.is_empty());
            }
            prop_assert!(copy == image);
            let covered: u64 = batches.iter().map(Batch::covered).sum();
            prop_assert_eq!(covered, extents.iter().map(Extent::len).sum::<u64>());
        }

        #[test]
        fn nobody_reads_on_for_nobody(wanted in 0_usize..4) {
            let image = vec![1_u8; 16 * BLOCK as usize];
            let mut taken = 0;
            let mut making = Making::new(DiskIndex(0), BLOCK as usize, |_| { taken += 1; taken <= wanted });
            prop_assert!(!making.read(&image, vec![Extent::between(0, 16 * BLOCK)]).unwrap());
            prop_assert_eq!(taken, wanted + 1);
        }
    }
}
