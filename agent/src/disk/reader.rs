//! From an image to batches: read, find zeros, hash.
//!
//! Owns stage 1 of the data path on the source side. Several threads take spans in offset order and each turns its span into
//! batches; the disk's digest grows on the way. Leaves sending and credit to the receiver of the batches: handing one over may
//! block, and that is the only brake. Promises that every leaf is read or proven hole or free, that its digest enters the disk's
//! digest, and that a leaf is left out of the batches only where the target holds it with the same digest.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use longhaul_common::digest::{Digest, DigestError, DiskDigest, LEAF, leaf_extent};
use longhaul_common::extent::{BLOCK, Extent};
use longhaul_common::ids::{Attempt, DiskIndex, JobId, Round, Sequence};
use longhaul_common::wire::batch::{BatchError, BatchHeader, Content, Leaves, Piece, RAW_MAX};
use longhaul_common::wire::session::{DiskCounts, Have};

use super::ReadAt;
use super::free_map::FreeMap;
use super::have::HaveLeaves;
use super::spans::{AskAllocation, Span, Spans};

/// One batch on its way out.
#[derive(Debug)]
pub(crate) struct Outgoing {
    pub header: BatchHeader,
    pub data: Vec<u8>,
}

/// Why reading a disk ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    #[error("cannot read the source image")]
    Io(#[from] io::Error),
    #[error("the disk's digest cannot be stated")]
    Digest(#[from] DigestError),
    #[error("a batch cannot be made")]
    Batch(#[from] BatchError),
    #[error("the session ended")]
    Stopped,
    #[error("a reader thread died")]
    Died,
}

/// Everything that reading one disk needs.
pub(crate) struct DiskRead<'a> {
    pub job: JobId,
    pub attempt: Attempt,
    pub disk: DiskIndex,
    pub image: &'a dyn ReadAt,
    pub allocation: AskAllocation<'a>,
    pub free: &'a FreeMap,
    pub have: &'a HaveLeaves,
    /// What an earlier attempt on the same, unchanged image has read.
    pub known: &'a KnownLeaves,
    /// Next batch's number, shared by all disks of the job.
    pub sequence: &'a AtomicU64,
    /// Takes a batch; false ends the reading.
    pub emit: &'a (dyn Fn(Outgoing) -> bool + Sync),
}

/// Digests of leaves that were read once; lets a later attempt pass over what the target holds without reading it again.
/// 32 bytes for each leaf once anything was read.
pub(crate) struct KnownLeaves {
    size: u64,
    digests: Mutex<HaveLeaves>,
}

impl KnownLeaves {
    /// Of a disk of `size` bytes, nothing yet.
    pub(crate) fn new(size: u64) -> Self {
        Self {
            size,
            digests: Mutex::default(),
        }
    }

    fn learn(&self, leaves: &ReadLeaves) {
        let (first, count, digests) = (leaves.first, leaves.count, leaves.digests.clone());
        let learned = Have {
            disk: DiskIndex(0),
            first,
            count,
            digests,
            shadow: None,
        };
        if let Ok(mut known) = self.digests.lock() {
            // What was read lies inside the disk by construction.
            let _ = known.add(&learned, self.size);
        }
    }

    /// The span's digests, where every leaf of it is known and `have` holds each of them.
    fn settled(&self, span: &Span, have: &HaveLeaves) -> Option<Vec<(u64, Digest)>> {
        let known = self.digests.lock().ok()?;
        let mut digests = Vec::new();
        for leaf in span.first..span.first + span.count {
            let digest = known.get(leaf)?;
            if !have.holds(leaf, digest) {
                return None;
            }
            digests.extend(digest.map(|digest| (leaf, digest)));
        }
        Some(digests)
    }
}

impl DiskRead<'_> {
    /// Reads the whole disk with `threads` threads, and gives its digest.
    pub(crate) fn run(&self, threads: usize) -> Result<(Digest, DiskCounts), ReadError> {
        let size = self.image.size();
        let cursor = Mutex::new(Spans::new(size));
        let total = Mutex::new((DiskDigest::new(size), DiskCounts::default()));
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..threads.max(1))
                .map(|n| {
                    let body = || self.read_spans(&cursor, &total);
                    std::thread::Builder::new()
                        .name(format!("read-{n}"))
                        .spawn_scoped(scope, body)
                })
                .collect();
            let mut outcome = Ok(());
            for reader in readers {
                let ended = reader
                    .map_err(ReadError::Io)
                    .and_then(|r| r.join().map_err(|_| ReadError::Died)?);
                outcome = outcome.and(ended);
            }
            outcome
        })?;
        let (digest, counts) = total.into_inner().map_err(|_| ReadError::Died)?;
        Ok((digest.finish()?, counts))
    }

    fn read_spans(
        &self,
        cursor: &Mutex<Spans>,
        total: &Mutex<(DiskDigest, DiskCounts)>,
    ) -> Result<(), ReadError> {
        let mut work = SpanWork::new(self);
        loop {
            let span = cursor
                .lock()
                .map_err(|_| ReadError::Died)?
                .next(self.free, self.allocation)?;
            let Some(span) = span else { return Ok(()) };
            let leaves = match self.known.settled(&span, self.have) {
                Some(digests) => work.pass(&span, digests),
                // What these leaves hold is not known here, so the disk's digest says nothing then.
                None if self.have.is_shadow(span.first..span.first + span.count) => {
                    work.pass(&span, Vec::new())
                }
                None => {
                    let leaves = work.read(&span)?;
                    self.known.learn(&leaves);
                    leaves
                }
            };
            let mut entered = total.lock().map_err(|_| ReadError::Died)?;
            enter(&mut entered.0, &leaves)?;
            drop(entered);
            let batches = work.batches(leaves)?;
            let mut counts = work.take_counts();
            counts.batches = batches.len() as u64;
            add(&mut total.lock().map_err(|_| ReadError::Died)?.1, &counts);
            if !batches.into_iter().all(|outgoing| (self.emit)(outgoing)) {
                return Err(ReadError::Stopped);
            }
        }
    }
}

/// Enters leaves into the disk's digest.
fn enter(digest: &mut DiskDigest, leaves: &ReadLeaves) -> Result<(), DigestError> {
    let mut at = leaves.first;
    for (leaf, known) in &leaves.digests {
        digest.zeros(at, leaf - at)?;
        digest.leaf(*leaf, *known)?;
        at = leaf + 1;
    }
    digest.zeros(at, leaves.first + leaves.count - at)
}

fn add(sum: &mut DiskCounts, more: &DiskCounts) {
    sum.batches += more.batches;
    sum.data += more.data;
    sum.hole += more.hole;
    sum.zero += more.zero;
    sum.free += more.free;
    sum.kept += more.kept;
    sum.read_ms += more.read_ms;
    sum.hash_ms += more.hash_ms;
}

/// A span after reading: its pieces with zeros told apart, its data, its digests.
struct ReadLeaves {
    first: u64,
    count: u64,
    pieces: Vec<Piece>,
    data: Vec<u8>,
    digests: Vec<(u64, Digest)>,
}

/// One thread's work on spans, with the buffers it reuses.
struct SpanWork<'a> {
    disk: &'a DiskRead<'a>,
    leaf: Vec<u8>,
    counts: DiskCounts,
    read: Duration,
    hash: Duration,
}

impl<'a> SpanWork<'a> {
    fn new(disk: &'a DiskRead<'a>) -> Self {
        let leaf = vec![0; LEAF as usize];
        Self {
            disk,
            leaf,
            counts: DiskCounts::default(),
            read: Duration::ZERO,
            hash: Duration::ZERO,
        }
    }

    fn take_counts(&mut self) -> DiskCounts {
        let mut counts = std::mem::take(&mut self.counts);
        counts.read_ms = self.read.as_millis() as u64;
        counts.hash_ms = self.hash.as_millis() as u64;
        self.read -= Duration::from_millis(counts.read_ms);
        self.hash -= Duration::from_millis(counts.hash_ms);
        counts
    }

    /// Reads what the span asks for, leaf by leaf.
    fn read(&mut self, span: &Span) -> io::Result<ReadLeaves> {
        let data = Vec::with_capacity(RAW_MAX.min(span.data_len() as usize));
        let (first, count) = (span.first, span.count);
        let mut leaves = ReadLeaves {
            first,
            count,
            pieces: Vec::new(),
            data,
            digests: Vec::new(),
        };
        let mut at = 0;
        while at < span.pieces.len() {
            let piece = span.pieces[at];
            if piece.content != Content::Data {
                self.skip(piece, &mut leaves.pieces);
                at += 1;
                continue;
            }
            // A leaf with data: everything of it is laid into the buffer, skipped parts as zeros.
            let leaf = piece.extent.offset() / LEAF;
            let whole = leaf_extent(leaf, self.disk.image.size());
            self.leaf[..whole.len() as usize].fill(0);
            at += self.read_leaf(&span.pieces[at..], &whole, &mut leaves)?;
            let content = &self.leaf[..whole.len() as usize];
            let started = Instant::now();
            if !is_zero(content) {
                leaves.digests.push((leaf, Digest::of(content)));
            }
            self.hash += started.elapsed();
        }
        Ok(leaves)
    }

    /// Counts a span that need not be read: an earlier attempt did, and the target holds it.
    fn pass(&mut self, span: &Span, digests: Vec<(u64, Digest)>) -> ReadLeaves {
        let mut pieces = Vec::new();
        for piece in &span.pieces {
            match piece.content {
                Content::Data => self.counts.kept += piece.extent.len(),
                _ => self.skip(*piece, &mut pieces),
            }
        }
        let (first, count) = (span.first, span.count);
        ReadLeaves {
            first,
            count,
            pieces,
            data: Vec::new(),
            digests,
        }
    }

    fn skip(&mut self, piece: Piece, pieces: &mut Vec<Piece>) {
        match piece.content {
            Content::Free => self.counts.free += piece.extent.len(),
            _ => self.counts.hole += piece.extent.len(),
        }
        push(pieces, piece);
    }

    /// Takes pieces as long as they lie in `leaf`; the last may go on behind it only where it is not data. Gives how many it took.
    fn read_leaf(&mut self, pieces: &[Piece], leaf: &Extent, leaves: &mut ReadLeaves) -> io::Result<usize> {
        let mut taken = 0;
        for piece in pieces
            .iter()
            .take_while(|piece| piece.extent.offset() < leaf.end())
        {
            if piece.content != Content::Data {
                self.skip(*piece, &mut leaves.pieces);
                taken += 1;
                continue;
            }
            let inside = piece.extent.intersect(leaf).unwrap_or(piece.extent);
            let range = (inside.offset() - leaf.offset()) as usize..(inside.end() - leaf.offset()) as usize;
            let started = Instant::now();
            self.disk
                .image
                .read_exact_at(&mut self.leaf[range.clone()], inside.offset())?;
            self.read += started.elapsed();
            self.sort_blocks(&inside, range, leaves);
            taken += 1;
        }
        Ok(taken)
    }

    /// Splits what was read into data and zeros, block by block.
    fn sort_blocks(&mut self, extent: &Extent, range: std::ops::Range<usize>, leaves: &mut ReadLeaves) {
        let mut at = extent.offset();
        for block in self.leaf[range].chunks(BLOCK as usize) {
            let extent = Extent::between(at, at + block.len() as u64);
            at = extent.end();
            let content = if is_zero(block) {
                Content::Zero
            } else {
                Content::Data
            };
            match content {
                Content::Zero => self.counts.zero += extent.len(),
                _ => leaves.data.extend_from_slice(block),
            }
            push(&mut leaves.pieces, Piece { extent, content });
        }
    }

    /// The batches for what the target does not hold yet: one for each run of such leaves.
    fn batches(&mut self, leaves: ReadLeaves) -> Result<Vec<Outgoing>, BatchError> {
        let missing = missing_runs(&leaves, self.disk.have);
        if missing == [(leaves.first, leaves.first + leaves.count)] {
            self.counts.data += leaves.data.len() as u64;
            let header = self.header(
                leaves.pieces,
                leaves.first,
                leaves.count,
                leaves.digests,
                &leaves.data,
            )?;
            return Ok(vec![Outgoing {
                header,
                data: leaves.data,
            }]);
        }
        let sent = missing
            .iter()
            .map(|(first, end)| self.cut(&leaves, *first, *end))
            .collect::<Result<Vec<_>, _>>()?;
        let sent_data: usize = sent.iter().map(|outgoing| outgoing.data.len()).sum();
        self.counts.data += sent_data as u64;
        self.counts.kept += (leaves.data.len() - sent_data) as u64;
        Ok(sent)
    }

    /// One run of leaves `first..end`, cut out of the span.
    fn cut(&self, leaves: &ReadLeaves, first: u64, end: u64) -> Result<Outgoing, BatchError> {
        let size = self.disk.image.size();
        let range = Extent::between(
            leaf_extent(first, size).offset(),
            leaf_extent(end - 1, size).end(),
        );
        let mut data = Vec::new();
        let mut pieces = Vec::new();
        let mut from = 0;
        for piece in &leaves.pieces {
            let len = if piece.content == Content::Data {
                piece.extent.len() as usize
            } else {
                0
            };
            if let Some(extent) = piece.extent.intersect(&range) {
                if len > 0 {
                    let skip = (extent.offset() - piece.extent.offset()) as usize;
                    data.extend_from_slice(&leaves.data[from + skip..from + skip + extent.len() as usize]);
                }
                pieces.push(Piece {
                    extent,
                    content: piece.content,
                });
            }
            from += len;
        }
        let digests = leaves
            .digests
            .iter()
            .filter(|(leaf, _)| (first..end).contains(leaf))
            .copied()
            .collect();
        let header = self.header(pieces, first, end - first, digests, &data)?;
        Ok(Outgoing { header, data })
    }

    fn header(
        &self,
        pieces: Vec<Piece>,
        first: u64,
        count: u64,
        digests: Vec<(u64, Digest)>,
        data: &[u8],
    ) -> Result<BatchHeader, BatchError> {
        let mut header = BatchHeader {
            job: self.disk.job,
            attempt: self.disk.attempt,
            disk: self.disk.disk,
            round: Round(0),
            sequence: Sequence(self.disk.sequence.fetch_add(1, Ordering::Relaxed)),
            pieces,
            leaves: Leaves {
                first,
                count,
                digests,
            },
            ram: None,
            urgent: false,
            digest: Digest([0; 32]),
        };
        header.digest = header.digest_of(data)?;
        Ok(header)
    }
}

/// Runs of leaves that must be sent, as (first, end).
fn missing_runs(leaves: &ReadLeaves, have: &HaveLeaves) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    let mut digests = leaves.digests.iter().peekable();
    for leaf in leaves.first..leaves.first + leaves.count {
        let digest = digests.next_if(|(at, _)| *at == leaf).map(|(_, digest)| *digest);
        if have.holds(leaf, digest) {
            continue;
        }
        match runs.last_mut() {
            Some(last) if last.1 == leaf => last.1 = leaf + 1,
            _ => runs.push((leaf, leaf + 1)),
        }
    }
    runs
}

/// Whether all bytes are zero, sixteen at a time.
fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<16>();
    chunks.iter().all(|chunk| u128::from_ne_bytes(*chunk) == 0) && rest.iter().all(|byte| *byte == 0)
}

fn push(pieces: &mut Vec<Piece>, piece: Piece) {
    match pieces.last_mut() {
        Some(last) if last.content == piece.content && last.extent.end() == piece.extent.offset() => {
            last.extent = Extent::between(last.extent.offset(), piece.extent.end());
        }
        _ => pieces.push(piece),
    }
}

#[cfg(test)]
mod tests;
