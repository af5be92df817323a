//! Where the bytes of a volume lie on the disk, and the volume as something to read.
//!
//! Owns the mapping of a partition or of a logical volume (linear and striped segments) onto disk ranges, in both uses: reading,
//! and translating a free range of the volume. Leaves alone whether a range is free. Promises that a byte of the volume maps to
//! one byte of the disk, and that a range costs time by the segments and stripes it touches, not by its length.

use std::io;

use longhaul_common::extent::Extent;

use crate::disk::ReadAt;

/// Segments of a volume, in volume order, without holes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Layout {
    segments: Vec<Segment>,
    size: u64,
}

/// `len` bytes of a volume, dealt out over `areas` in turns of `chunk` bytes. With one area, `chunk` equals `len`.
#[derive(Clone, Debug)]
struct Segment {
    start: u64,
    len: u64,
    chunk: u64,
    /// First byte of each area on the disk; an area holds `len / areas.len()` bytes.
    areas: Vec<u64>,
}

impl Layout {
    /// A volume that is one range of the disk.
    pub(crate) fn slice(extent: Extent) -> Self {
        let mut layout = Self::default();
        // Only an empty range is refused, and it rightly leaves an empty volume.
        let _ = layout.append(&[extent], extent.len());
        layout
    }

    /// Appends a segment dealt out over `areas` in turns of `chunk` bytes (ignored where there is one area). `None`, and nothing
    /// appended, where the areas are empty, of unequal length, or not a multiple of `chunk`.
    pub(crate) fn append(&mut self, areas: &[Extent], chunk: u64) -> Option<()> {
        let area = areas.first()?.len();
        let chunk = if areas.len() == 1 { area } else { chunk };
        if chunk == 0 || area % chunk != 0 || areas.iter().any(|other| other.len() != area) {
            return None;
        }
        let len = area.checked_mul(areas.len() as u64)?;
        let size = self.size.checked_add(len)?;
        self.segments.push(Segment {
            start: self.size,
            len,
            chunk,
            areas: areas.iter().map(Extent::offset).collect(),
        });
        self.size = size;
        Some(())
    }

    /// Bytes of the volume.
    pub(crate) const fn size(&self) -> u64 {
        self.size
    }

    /// Every range of the disk that the volume uses.
    pub(crate) fn disk_ranges(&self) -> impl Iterator<Item = Extent> + '_ {
        self.segments.iter().flat_map(|segment| {
            let len = segment.len / segment.areas.len() as u64;
            segment
                .areas
                .iter()
                .map(move |start| Extent::between(*start, *start + len))
        })
    }

    /// The smallest range of the disk that holds the whole volume.
    pub(crate) fn hull(&self) -> Extent {
        let start = self.disk_ranges().map(|range| range.offset()).min().unwrap_or(0);
        let end = self.disk_ranges().map(|range| range.end()).max().unwrap_or(0);
        Extent::between(start, end)
    }

    /// Gives the disk ranges of a range of the volume, in no order. What lies beyond the volume's end is left out.
    pub(crate) fn locate(&self, range: Extent, give: &mut dyn FnMut(Extent)) {
        let end = range.end().min(self.size);
        let mut at = range.offset();
        while at < end {
            let Some(segment) = self.segment(at) else { return };
            let stop = end.min(segment.start + segment.len);
            segment.locate(at - segment.start, stop - segment.start, give);
            at = stop;
        }
    }

    fn segment(&self, at: u64) -> Option<&Segment> {
        let behind = self.segments.partition_point(|segment| segment.start <= at);
        self.segments
            .get(behind.checked_sub(1)?)
            .filter(|segment| at - segment.start < segment.len)
    }
}

impl Segment {
    /// The disk position of byte `at` of the segment, and how many bytes follow it there without a break.
    fn place(&self, at: u64) -> (u64, u64) {
        let width = self.areas.len() as u64;
        let (turn, within) = (at / self.chunk, at % self.chunk);
        let area = self.areas[(turn % width) as usize];
        (area + turn / width * self.chunk + within, self.chunk - within)
    }

    /// Turns that make up whole rows are one range on each area, however many rows there are.
    fn locate(&self, from: u64, to: u64, give: &mut dyn FnMut(Extent)) {
        let row = self.chunk * self.areas.len() as u64;
        let (first, last) = (from.div_ceil(row), to / row);
        if first >= last {
            return self.locate_turns(from, to, give);
        }
        self.locate_turns(from, first * row, give);
        for area in &self.areas {
            give(Extent::between(
                area + first * self.chunk,
                area + last * self.chunk,
            ));
        }
        self.locate_turns(last * row, to, give);
    }

    fn locate_turns(&self, from: u64, to: u64, give: &mut dyn FnMut(Extent)) {
        let mut at = from;
        while at < to {
            let (disk, run) = self.place(at);
            let len = run.min(to - at);
            give(Extent::between(disk, disk + len));
            at += len;
        }
    }
}

/// A volume of a disk as something to read.
pub(crate) struct View<'a> {
    pub(crate) disk: &'a dyn ReadAt,
    pub(crate) layout: &'a Layout,
}

impl ReadAt for View<'_> {
    fn size(&self) -> u64 {
        self.layout.size
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let (mut rest, mut at) = (buf, offset);
        while !rest.is_empty() {
            let segment = self.layout.segment(at).ok_or(io::ErrorKind::UnexpectedEof)?;
            let (disk, run) = segment.place(at - segment.start);
            let len = usize::try_from(run).unwrap_or(usize::MAX).min(rest.len());
            let (head, tail) = rest.split_at_mut(len);
            self.disk.read_exact_at(head, disk)?;
            rest = tail;
            at += len as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Areas cut from a shuffled disk of 16-byte cells, so that no two share a byte.
    fn layout(shape: &[(usize, u64, u64)]) -> (Layout, usize) {
        let mut layout = Layout::default();
        let mut at = 7;
        for (width, chunk, rows) in shape {
            let areas: Vec<Extent> = (0..*width)
                .map(|i| Extent::new(at + (*width - 1 - i) as u64 * chunk * rows, chunk * rows).unwrap())
                .collect();
            at += *width as u64 * chunk * rows + 3;
            layout.append(&areas, *chunk).unwrap();
        }
        (layout, at as usize)
    }

    proptest! {
        #[test]
        fn a_free_range_covers_just_the_bytes_that_a_read_of_it_touches(
            shape in prop::collection::vec((1usize..5, 1u64..9, 1u64..9), 1..6),
            from in 0u64..400, len in 0u64..400,
        ) {
            let (layout, size) = layout(&shape);
            let disk: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
            let view = View { disk: &disk, layout: &layout };
            let end = (from + len).min(layout.size());
            let mut located = vec![0u32; size];
            layout.locate(Extent::between(from, from + len), &mut |range| {
                for at in range.offset()..range.end() { located[at as usize] += 1; }
            });
            let mut expected = vec![0u32; size];
            for at in from..end {
                let segment = layout.segment(at).unwrap();
                let (disk_at, _) = segment.place(at - segment.start);
                expected[disk_at as usize] += 1;
                let mut byte = [0];
                view.read_exact_at(&mut byte, at).unwrap();
                prop_assert_eq!(byte[0], disk[disk_at as usize]);
            }
            prop_assert!(expected.iter().all(|count| *count <= 1));
            prop_assert_eq!(located, expected);
            let mut whole = vec![0; layout.size() as usize];
            view.read_exact_at(&mut whole, 0).unwrap();
            let beyond = view.read_exact_at(&mut [0; 2], layout.size() - 1);
            prop_assert_eq!(beyond.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        }
    }

    #[test]
    fn stripes_are_dealt_in_turns() {
        let mut layout = Layout::default();
        let areas = [Extent::between(1000, 1008), Extent::between(2000, 2008)];
        layout.append(&areas, 4).unwrap();
        let order: Vec<u64> = (0..16)
            .map(|at| layout.segment(at).unwrap().place(at).0)
            .collect();
        let expected: Vec<u64> = [1000..1004, 2000..2004, 1004..1008, 2004..2008]
            .into_iter()
            .flatten()
            .collect();
        assert_eq!(order, expected);
        assert!(layout.append(&areas, 3).is_none());
        assert!(layout.append(&areas, 0).is_none());
        assert!(layout.append(&[], 4).is_none());
    }
}
