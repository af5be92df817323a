//! From a payload back to the batch's data.
//!
//! Owns restoring, and the checks around it: every length before it is used, every slot's digest, the batch's digest last. What the
//! payload adds to the window is stored only after that. Promises data that the batch digest holds for, or an error, and that
//! nothing larger than the batch's own data is ever allocated for a payload.

use bytes::Bytes;
use longhaul_common::wire::batch::{BatchError, BatchHeader};

use super::block::{self, BlockDigest};
use super::codec::{self, Codec};
use super::encode::{PATCHED, STORES, THEIRS};
use super::layout::{BLOCK_LEN, Layout, Vm, together};
use super::pair::Pair;
use super::plan::{self, Fate};
use super::window::{BATCH_BLOCKS, Found, Read, Ring, Window};
use super::{Encoding, Payload};

/// Why a payload does not become a batch.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// It refers to content that is not there: to be sent again, plainly.
    #[error("the payload refers to blocks that this gateway does not hold; it is asked for again")]
    Missing,
    #[error(transparent)]
    Batch(#[from] BatchError),
}

/// The data that `payload` stands for, verified; what it adds to the window is stored. CPU-bound: call it on [`super::workers`].
///
/// # Errors
/// [`RestoreError::Missing`] where a plain payload would do; a [`BatchError`] where the payload is damaged.
pub fn restore(
    payload: &Payload,
    header: &BatchHeader,
    vm: Vm,
    pair: Option<&Pair>,
) -> Result<Bytes, RestoreError> {
    let len = header.data_len() as usize;
    let codec = match payload.encoding {
        Encoding::Blocks => return restore_blocks(&payload.bytes, header, vm, pair),
        Encoding::Raw if payload.bytes.len() == len => {
            header.verify(&payload.bytes)?;
            return Ok(payload.bytes.clone());
        }
        Encoding::Raw => Codec::Raw,
        Encoding::Lz4 => Codec::Lz4,
        Encoding::Zstd => Codec::Zstd,
    };
    let mut raw = vec![0; len];
    codec::decompress(codec, &payload.bytes, &mut raw)?;
    header.verify(&raw)?;
    Ok(raw.into())
}

fn restore_blocks(
    bytes: &[u8],
    header: &BatchHeader,
    vm: Vm,
    pair: Option<&Pair>,
) -> Result<Bytes, RestoreError> {
    let layout = Layout::of(header, vm);
    let mut parts = Parts::read(bytes, &layout)?;
    let incoming = pair.and_then(Pair::incoming);
    let mut raw = vec![0; header.data_len() as usize];
    // One that refers to nothing is whole without a window; its sender does not keep it in any other form.
    if parts.needs_window() {
        let (Some(pair), Some(incoming)) = (pair, &incoming) else {
            return Err(RestoreError::Missing);
        };
        fetch(&parts, &layout, incoming, pair, &mut raw)?;
    }
    parts.patch(&layout, &raw)?;
    parts.fill(&layout, &mut raw)?;
    match header.verify(&raw) {
        // Sound as it may look, a slot may hold what the sender does not mean: its own end may be of another opinion.
        Err(BatchError::Digest) if parts.needs_window() => return Err(RestoreError::Missing),
        verified => verified?,
    }
    if let Some(incoming) = incoming {
        store(&parts, &layout, &incoming, &raw, header.ram.is_some())?;
    }
    Ok(raw.into())
}

/// A payload taken apart.
struct Parts<'a> {
    flags: u8,
    epoch: u64,
    their_epoch: Option<u64>,
    first: u64,
    fates: Vec<Fate>,
    residues: Vec<u8>,
    /// What the residues are made of, once their bases are there.
    patch: Option<&'a [u8]>,
    plain: Section<'a>,
    raw: &'a [u8],
}

impl<'a> Parts<'a> {
    fn read(mut bytes: &'a [u8], layout: &Layout) -> Result<Self, BatchError> {
        let bytes = &mut bytes;
        let flags = plan::take(bytes, 1)?[0];
        let epoch = number(bytes)?;
        let their_epoch = if flags & THEIRS != 0 {
            Some(number(bytes)?)
        } else {
            None
        };
        let first = plan::get(bytes)?;
        let blocks = layout.blocks.len();
        if blocks as u64 > BATCH_BLOCKS {
            return Err(BatchError::Payload("it has more blocks than a batch may have"));
        }
        let fates = plan::decode(bytes, first, blocks)?;
        let count = |kind: fn(&Fate) -> bool| fates.iter().filter(|fate| kind(fate)).count() * BLOCK_LEN;
        let residues = count(|fate| matches!(fate, Fate::XorOwn(_) | Fate::XorTheirs(_)));
        let plain = count(|fate| *fate == Fate::Plain) + layout.loose_len();
        let raw = count(|fate| *fate == Fate::Raw);
        let (residues, patch) = match bytes.first() {
            Some(codec) if residues > 0 && *codec == Codec::Patch as u8 => {
                plan::take(bytes, 1)?;
                (vec![0; residues], Some(sized(bytes)?))
            }
            _ => (Section::take(bytes, residues)?.content()?, None),
        };
        let plain = Section::take(bytes, plain)?;
        let raw = plan::take(bytes, raw)?;
        if !bytes.is_empty() {
            return Err(BatchError::Payload("bytes follow its end"));
        }
        Ok(Self {
            flags,
            epoch,
            their_epoch,
            first,
            fates,
            residues,
            patch,
            plain,
            raw,
        })
    }

    /// Makes changed blocks of their bases, which stand in their places in `raw`.
    fn patch(&mut self, layout: &Layout, raw: &[u8]) -> Result<(), BatchError> {
        let Some(small) = self.patch.take() else {
            return Ok(());
        };
        let mut bases = Vec::with_capacity(self.residues.len());
        for (fate, block) in self.fates.iter().zip(&layout.blocks) {
            if matches!(fate, Fate::XorOwn(_) | Fate::XorTheirs(_)) {
                bases.extend_from_slice(&raw[block.at..block.at + BLOCK_LEN]);
            }
        }
        codec::decompress_against(small, &bases, &mut self.residues)
    }

    fn needs_window(&self) -> bool {
        self.fates.iter().any(|fate| fate.is_reference())
    }

    /// Fills in everything but what came from slots; differences are applied to the bases that stand in their places.
    fn fill(&self, layout: &Layout, raw: &mut [u8]) -> Result<(), BatchError> {
        let content = self.add_plain(layout, raw)?;
        let (mut residues, mut plain, mut noise) = (&self.residues[..], content.as_deref(), self.raw);
        for (index, (fate, place)) in self.fates.iter().zip(&layout.blocks).enumerate() {
            let block = place.at..place.at + BLOCK_LEN;
            match fate {
                Fate::Zero | Fate::Own(_) | Fate::Theirs(_) => {}
                Fate::Same(earlier) => {
                    let earlier = usize::try_from(*earlier).ok().filter(|earlier| *earlier < index);
                    let from = earlier.and_then(|earlier| layout.blocks.get(earlier));
                    let from = from.ok_or(BatchError::Payload(
                        "a block repeats one that does not come before it",
                    ))?;
                    raw.copy_within(from.at..from.at + BLOCK_LEN, block.start);
                }
                Fate::XorOwn(_) | Fate::XorTheirs(_) if self.flags & PATCHED != 0 => {
                    raw[block].copy_from_slice(plan::take(&mut residues, BLOCK_LEN)?);
                }
                Fate::XorOwn(_) | Fate::XorTheirs(_) => {
                    block::xor(&mut raw[block], plan::take(&mut residues, BLOCK_LEN)?);
                }
                Fate::Plain => {
                    if let Some(plain) = &mut plain {
                        raw[block].copy_from_slice(plan::take(plain, BLOCK_LEN)?);
                    }
                }
                Fate::Raw => raw[block].copy_from_slice(plan::take(&mut noise, BLOCK_LEN)?),
            }
        }
        if let Some(mut plain) = plain {
            for range in &layout.loose {
                raw[range.clone()].copy_from_slice(plan::take(&mut plain, range.len())?);
            }
        }
        Ok(())
    }

    /// Puts plain blocks and loose bytes into their places, where these lie together; else gives them.
    fn add_plain(&self, layout: &Layout, raw: &mut [u8]) -> Result<Option<Vec<u8>>, BatchError> {
        let blocks = layout.ranges(|index| self.fates.get(index) == Some(&Fate::Plain));
        match together(blocks.chain(layout.loose.iter().cloned())) {
            Some(range) => self.plain.write(&mut raw[range]).map(|()| None),
            None => self.plain.content().map(Some),
        }
    }
}

fn number(bytes: &mut &[u8]) -> Result<u64, BatchError> {
    let taken = plan::take(bytes, 8)?;
    Ok(u64::from_le_bytes(std::array::from_fn(|n| taken[n])))
}

/// Content, as it came.
struct Section<'a> {
    codec: Codec,
    small: &'a [u8],
    /// Bytes that it stands for.
    len: usize,
}

impl<'a> Section<'a> {
    /// Takes the section that stands for `len` bytes; one of nothing has no bytes at all.
    fn take(bytes: &mut &'a [u8], len: usize) -> Result<Self, BatchError> {
        let (mut codec, mut small) = (Codec::Raw, &[][..]);
        if len > 0 {
            let known = Codec::from_wire(plan::take(bytes, 1)?[0]);
            codec = known.ok_or(BatchError::Payload(
                "its compression is unknown; the peer may run another version",
            ))?;
            small = sized(bytes)?;
        }
        Ok(Self { codec, small, len })
    }

    /// Writes what it stands for, over all of `into`.
    fn write(&self, into: &mut [u8]) -> Result<(), BatchError> {
        codec::decompress(self.codec, self.small, into)
    }

    fn content(&self) -> Result<Vec<u8>, BatchError> {
        let mut content = vec![0; self.len];
        self.write(&mut content)?;
        Ok(content)
    }
}

/// Bytes behind their length.
fn sized<'a>(bytes: &mut &'a [u8]) -> Result<&'a [u8], BatchError> {
    let len = usize::try_from(plan::get(bytes)?).unwrap_or(usize::MAX);
    plan::take(bytes, len)
}

/// A block that was read from a slot and is yet to be checked, or to be read from a file.
struct Fetched {
    at: usize,
    expected: Result<BlockDigest, Found>,
}

/// Puts the content of slots into the places of those blocks that refer to them.
fn fetch(
    parts: &Parts<'_>,
    layout: &Layout,
    incoming: &Window,
    pair: &Pair,
    raw: &mut [u8],
) -> Result<(), RestoreError> {
    let own = |fate: &Fate| match fate {
        Fate::Own(at) | Fate::XorOwn(at) => Some(*at),
        _ => None,
    };
    let theirs = |fate: &Fate| match fate {
        Fate::Theirs(at) | Fate::XorTheirs(at) => Some(*at),
        _ => None,
    };
    fetch_from(incoming, parts.epoch, &parts.fates, own, layout, raw)?;
    match parts.their_epoch {
        Some(epoch) => fetch_from(&pair.outgoing, epoch, &parts.fates, theirs, layout, raw),
        None if parts.fates.iter().any(|fate| theirs(fate).is_some()) => {
            Err(BatchError::Payload("it refers to the other direction without its epoch").into())
        }
        None => Ok(()),
    }
}

fn fetch_from(
    window: &Window,
    epoch: u64,
    fates: &[Fate],
    position: impl Fn(&Fate) -> Option<u64>,
    layout: &Layout,
    raw: &mut [u8],
) -> Result<(), RestoreError> {
    let mut fetched = Vec::new();
    {
        let ring = window.ring();
        if ring.epoch != epoch {
            return Err(RestoreError::Missing);
        }
        for (fate, block) in fates.iter().zip(&layout.blocks) {
            if let Some(position) = position(fate) {
                fetched.push(read(&ring, position, block.at, raw)?);
            }
        }
    }
    for Fetched { at, expected } in fetched {
        let block = &mut raw[at..at + BLOCK_LEN];
        let sound = match expected {
            Ok(digest) => window.key.digest(block) == digest,
            Err(found) => window.read_file(&found, block),
        };
        if !sound {
            return Err(RestoreError::Missing);
        }
    }
    Ok(())
}

fn read(ring: &Ring, position: u64, at: usize, raw: &mut [u8]) -> Result<Fetched, RestoreError> {
    let expected = match ring.read(position, &mut raw[at..at + BLOCK_LEN]) {
        Read::Done => Ok(ring.digest(position).ok_or(RestoreError::Missing)?),
        Read::InFile(found) => Err(found),
        Read::Gone => return Err(RestoreError::Missing),
    };
    Ok(Fetched { at, expected })
}

/// Stores what is new at the positions that the sender gave it, and notes where each place's content is, if this is its epoch's window.
fn store(
    parts: &Parts<'_>,
    layout: &Layout,
    window: &Window,
    raw: &[u8],
    secret: bool,
) -> Result<(), RestoreError> {
    let block = |index: usize| {
        let at = layout.blocks.get(index).map_or(0, |block| block.at);
        &raw[at..at + BLOCK_LEN]
    };
    let new: Vec<_> = (0..parts.fates.len())
        .filter(|index| parts.flags & STORES != 0 && parts.fates[*index].is_stored())
        .collect();
    let digests: Vec<_> = new.iter().map(|index| window.key.digest(block(*index))).collect();
    if parts.first.checked_add(new.len() as u64).is_none() {
        return Err(BatchError::Payload("its positions end beyond 64 bits").into());
    }
    // What another epoch stores is nothing to this window, and the sender does not refer to it.
    if window.ring().epoch != parts.epoch {
        return Ok(());
    }
    if let Some(file) = window.file.as_ref().filter(|_| !new.is_empty()) {
        let mut blocks = Vec::with_capacity(new.len() * BLOCK_LEN);
        new.iter()
            .for_each(|index| blocks.extend_from_slice(block(*index)));
        // Where this fails, the blocks are in memory for a while, and missing after that.
        file.write(parts.first, secret, &mut blocks);
    }
    let mut ring = window.ring();
    if ring.epoch != parts.epoch {
        return Ok(());
    }
    let mut positions = vec![None; parts.fates.len()];
    for ((index, digest), position) in new.iter().zip(digests).zip(parts.first..) {
        if ring.write(position, secret, digest, block(*index)) {
            ring.enter_digest(position);
            positions[*index] = Some(position);
        }
    }
    for (index, fate) in parts.fates.iter().enumerate() {
        match fate {
            Fate::Own(at) => positions[index] = Some(*at),
            Fate::Same(earlier) => positions[index] = positions.get(*earlier as usize).copied().flatten(),
            _ => {}
        }
        if let Some(position) = positions[index] {
            ring.enter_place(layout.blocks[index].place, position);
        }
    }
    Ok(())
}
