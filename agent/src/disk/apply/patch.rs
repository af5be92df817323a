//! Rounds after the first: parts of leaves, written over a copy that is whole already.
//!
//! Owns what is different there. A patched leaf keeps its version but loses its digest: the log says void before the first byte, so that
//! after a crash of this host or program such a leaf counts as missing. While the program lives it counts as whole; `seal` states digests
//! again. Leaves ordering between rounds to the sender, which begins one only when the earlier one is durable, or was given up and all of it
//! goes with the next: a leaf's version is that of the newest patch, and what comes late of an older one is left out. Promises that a leaf
//! which was never given whole is never called whole.

use std::ops::Range;

use longhaul_common::digest::{Digest, LEAF, leaf_count, leaf_extent};
use longhaul_common::ids::{Attempt, Round};

use super::board::{Entered, push_joined};
use super::record::{ENTRIES_MAX, Kind, Record, Version};
use super::target::{Applied, Target, Ticket, data_bytes, lock};
use super::{Piece, TargetError};

impl Target {
    /// Writes `pieces`, which ascend and do not overlap, over leaves that are whole.
    ///
    /// Leaves that hold something newer are left alone, all of them where that is so: the ticket stands for what they hold then.
    ///
    /// Errors: `Malformed` where a piece lies in a leaf that was never given whole, and those of [`Target::apply`] but `Stale`.
    pub fn patch(
        &self,
        attempt: Attempt,
        round: Round,
        pieces: &[Piece<'_>],
    ) -> Result<Applied, TargetError> {
        self.require_sound()?;
        let runs = touched_runs(pieces, self.size)?;
        let version = Version::new(attempt, round).ok_or_else(|| {
            TargetError::Malformed(format!("attempt {attempt} round {round} is out of range"))
        })?;
        // Ascending, as everybody enters: no two threads can wait for each other.
        let mut entered: Vec<_> = runs
            .iter()
            .map(|run| self.board.enter(run.clone(), version))
            .collect();
        let admitted: u64 = entered.iter().map(|entered| leaves(&entered.admitted)).sum();
        self.loosen(&entered, version)?;
        for entered in &mut entered {
            // Whatever was there before, zeros are written over it.
            entered.touch_all();
            entered.begin(version, std::iter::empty());
            self.write(within(pieces, entered), entered)
                .map_err(TargetError::during("write to", &self.options.path))?;
        }
        let (ticket, waiting) = {
            let mut pending = lock(&self.pending);
            // All bytes of the batch, written or not: its writer counts them, too.
            let ticket = pending.push_patch(data_bytes(pieces));
            (Ticket(ticket), pending.waiting())
        };
        let given: u64 = runs.iter().map(|run| run.end - run.start).sum();
        Ok(Applied {
            ticket,
            stale_leaves: given - admitted,
            flush_due: waiting.0 >= self.options.flush_bytes,
        })
    }

    /// What the log says of the leaves that are about to be patched holds no more; from now on they are whole without a digest.
    fn loosen(&self, entered: &[Entered<'_>], version: Version) -> Result<(), TargetError> {
        let mut claimed: Vec<Range<u64>> = Vec::new();
        for run in entered.iter().flat_map(|entered| &entered.claimed) {
            push_joined(&mut claimed, run.clone());
        }
        {
            let patched = lock(&self.patched);
            let unknown = entered
                .iter()
                .flat_map(|entered| entered.admitted.iter().flat_map(Clone::clone))
                .find(|leaf| !is_in(&claimed, *leaf) && !patched.contains(leaf));
            if let Some(leaf) = unknown {
                let text = format!("it gives a part of leaf {leaf}, which was never given whole");
                return Err(TargetError::Malformed(text));
            }
        }
        if !claimed.is_empty() {
            // Until the log has said so, a crash would leave a digest that is wrong.
            self.make_void_all(&claimed, version)?;
            lock(&self.patched).extend(claimed.into_iter().flatten());
        }
        Ok(())
    }

    /// Whether every leaf is whole: given completely, patched or not.
    pub(crate) fn require_whole(&self) -> Result<(), TargetError> {
        let patched = lock(&self.patched);
        match self.board.first_unclaimed_but(|leaf| patched.contains(&leaf)) {
            Some(leaf) => Err(TargetError::Incomplete { leaf }),
            None => Ok(()),
        }
    }

    /// Reads patched leaves back and states their digests, so that a later attempt finds them. Nothing may be applied meanwhile.
    pub fn seal(&self) -> Result<(), TargetError> {
        self.flush()?;
        let leaves: Vec<u64> = lock(&self.patched).iter().copied().collect();
        let mut content = vec![0; LEAF as usize];
        for leaves in leaves.chunks(ENTRIES_MAX) {
            let mut records = Vec::new();
            for leaf in leaves {
                let extent = leaf_extent(*leaf, self.size);
                let content = &mut content[..extent.len() as usize];
                self.store
                    .read_at(content, extent.offset())
                    .map_err(TargetError::during("read", &self.options.path))?;
                records.push(Record {
                    kind: Kind::Written,
                    version: self.board.version(*leaf),
                    leaves: *leaf..*leaf + 1,
                    digests: vec![(*leaf, Digest::of(content))],
                });
            }
            lock(&self.pending).push(records, 0);
            for leaf in leaves {
                self.board.claim(*leaf);
            }
            self.flush()?;
            let mut patched = lock(&self.patched);
            patched.retain(|leaf| !leaves.contains(leaf));
        }
        Ok(())
    }
}

/// The leaves that `pieces` touch, neighbours joined.
fn touched_runs(pieces: &[Piece<'_>], size: u64) -> Result<Vec<Range<u64>>, TargetError> {
    let malformed = |what: &str| Err(TargetError::Malformed(what.to_owned()));
    let mut runs: Vec<Range<u64>> = Vec::new();
    let mut at = 0;
    for piece in pieces {
        let extent = piece.extent();
        if extent.is_empty() || extent.offset() < at || extent.end() > size {
            return malformed("its pieces overlap, are out of order or lie beyond the disk");
        }
        at = extent.end();
        let touched = extent.offset() / LEAF..extent.end().div_ceil(LEAF).min(leaf_count(size));
        match runs.last_mut() {
            Some(last) if last.end >= touched.start => last.end = last.end.max(touched.end),
            _ => runs.push(touched),
        }
    }
    match runs.is_empty() {
        true => malformed("it has no pieces"),
        false => Ok(runs),
    }
}

/// The pieces that lie in the leaves of `entered`.
fn within<'a, 'b>(pieces: &'a [Piece<'b>], entered: &Entered<'_>) -> &'a [Piece<'b>] {
    let (Some(first), Some(last)) = (entered.admitted.first(), entered.admitted.last()) else {
        return &[];
    };
    let (start, end) = (first.start * LEAF, last.end.saturating_mul(LEAF));
    let from = pieces.partition_point(|piece| piece.extent().end() <= start);
    let to = pieces.partition_point(|piece| piece.extent().offset() < end);
    &pieces[from..to.max(from)]
}

fn leaves(runs: &[Range<u64>]) -> u64 {
    runs.iter().map(|run| run.end - run.start).sum()
}

fn is_in(runs: &[Range<u64>], leaf: u64) -> bool {
    let at = runs.partition_point(|run| run.end <= leaf);
    runs.get(at).is_some_and(|run| run.start <= leaf)
}
