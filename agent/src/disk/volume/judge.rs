//! What one volume holds, and whether its free space is proven.
//!
//! Owns the decision for a single volume: exactly one file system must claim it, nothing else may, and the file system's own
//! metadata must hold. Leaves alone where the volume lies on the disk and what a physical volume of LVM contains. Promises that
//! an extent given as free lies inside the file system's own size; after [`Outcome::Copied`] every extent given before is void.

use longhaul_common::extent::Extent;

use super::signature::{self, Signature};
use super::{printable, sentence};
use crate::disk::ReadAt;
use crate::disk::fs::{Committed, FileSystem, Unproven};

/// Recognises one kind of file system, as [`crate::disk::fs`] documents it.
pub type Probe = fn(&dyn ReadAt) -> Result<Option<Box<dyn FileSystem>>, Unproven>;

/// What a volume turned out to be.
pub(crate) struct Judgement {
    /// "ext4", "swap", "unknown".
    pub(crate) kind: String,
    /// Volume label, may be empty.
    pub(crate) label: String,
    /// Bytes that the file system needs from the volume's start; 0 where nothing says so.
    pub(crate) needs: u64,
    /// The state that the free extents of a volume that may be in use reflect.
    pub(crate) committed: Option<Committed>,
    pub(crate) outcome: Outcome,
}

pub(crate) enum Outcome {
    /// All extents given are proven free.
    Proven,
    /// It is a physical volume of LVM, and nothing else.
    Physical,
    /// Nothing is proven, for this reason.
    Copied(String),
}

/// Judges `volume`, giving its free extents in bytes from its start.
pub(crate) fn judge(volume: &dyn ReadAt, probes: &[Probe], free: &mut dyn FnMut(Extent)) -> Judgement {
    let signatures = match signature::find(volume) {
        Ok(found) => found,
        Err(e) => return Judgement::copied("unknown", format!("it cannot be read: {e}")),
    };
    let mut claims: Vec<Result<Box<dyn FileSystem>, Unproven>> = probes
        .iter()
        .filter_map(|probe| probe(volume).transpose())
        .collect();
    match (claims.pop(), claims.is_empty()) {
        (None, _) => by_signature(&signatures),
        (Some(claim), true) => judge_claim(volume, claim, &signatures, free),
        (Some(last), false) => {
            let names: Vec<String> = claims.iter().chain([&last]).map(claimant).collect();
            Judgement::copied(
                "unknown",
                format!("several file systems claim it: {}", names.join("; ")),
            )
        }
    }
}

fn claimant(claim: &Result<Box<dyn FileSystem>, Unproven>) -> String {
    match claim {
        Ok(fs) => fs.kind().to_owned(),
        Err(why) => sentence(why),
    }
}

/// No file system of ours: swap, encryption, LVM, something foreign, or nothing known.
fn by_signature(signatures: &[Signature]) -> Judgement {
    let Some(first) = signatures.first() else {
        return Judgement::copied("unknown", "its content is unknown".into());
    };
    let only = signatures.iter().all(|other| other.kind == first.kind);
    match (first.kind, only) {
        ("lvm2", true) => Judgement {
            outcome: Outcome::Physical,
            ..Judgement::copied("lvm2", String::new())
        },
        (kind, true) => Judgement::copied(kind, format!("{} is copied", first.what)),
        (kind, false) => Judgement::copied(
            kind,
            format!("it carries several signatures: {}", names(signatures.iter())),
        ),
    }
}

fn judge_claim(
    volume: &dyn ReadAt,
    claim: Result<Box<dyn FileSystem>, Unproven>,
    signatures: &[Signature],
    free: &mut dyn FnMut(Extent),
) -> Judgement {
    let kind = match &claim {
        Ok(fs) => fs.kind(),
        Err(why) => kind_of(why),
    };
    let foreign: Vec<&Signature> = signatures.iter().filter(|sig| !belongs(kind, sig)).collect();
    if !foreign.is_empty() {
        let other = names(foreign.into_iter());
        return Judgement::copied(
            kind,
            format!("besides {kind} it carries a second signature: {other}"),
        );
    }
    match claim {
        Ok(fs) => judge_fs(volume, &*fs, free),
        Err(why) => Judgement {
            needs: if let Unproven::Truncated { needed, .. } = why {
                needed
            } else {
                0
            },
            ..Judgement::copied(kind, sentence(&why))
        },
    }
}

fn judge_fs(volume: &dyn ReadAt, fs: &dyn FileSystem, free: &mut dyn FnMut(Extent)) -> Judgement {
    let (kind, size) = (fs.kind(), fs.size());
    let copied = |reason| Judgement {
        needs: size,
        ..Judgement::copied(kind, reason)
    };
    if size > volume.size() {
        return copied(format!(
            "{kind} spans {size} bytes, but its volume has {}",
            volume.size()
        ));
    }
    match signature::has_hashes(volume, size) {
        Ok(false) => {}
        Ok(true) => {
            return copied(format!(
                "dm-verity hashes behind {kind} cover its free blocks too"
            ));
        }
        Err(e) => return copied(format!("what lies behind {kind} cannot be read: {e}")),
    }
    let mut joined = Joined {
        limit: size,
        pending: Extent::between(0, 0),
        strayed: false,
        free,
    };
    let summary = fs.scan(volume, &mut |extent| joined.take(extent));
    joined.flush();
    match summary {
        Ok(_) if joined.strayed => copied(format!("{kind} calls bytes beyond its own end free")),
        Ok(summary) => Judgement {
            kind: summary.kind.to_owned(),
            label: printable(&summary.label),
            needs: size,
            committed: fs.committed(),
            outcome: Outcome::Proven,
        },
        Err(why) => copied(sentence(&why)),
    }
}

/// Joins neighbouring extents, so that a block which two of them share is not lost, and notices any that strays.
struct Joined<'a> {
    limit: u64,
    pending: Extent,
    strayed: bool,
    free: &'a mut dyn FnMut(Extent),
}

impl Joined<'_> {
    fn take(&mut self, extent: Extent) {
        if extent.end() > self.limit {
            self.strayed = true;
        } else if extent.offset() == self.pending.end() {
            self.pending = Extent::between(self.pending.offset(), extent.end());
        } else {
            self.flush();
            self.pending = extent;
        }
    }

    fn flush(&mut self) {
        if !self.pending.is_empty() {
            (self.free)(self.pending);
        }
        self.pending = Extent::between(0, 0);
    }
}

/// Whether a signature is the file system's own, or lies in the header that the file system wrote over it.
fn belongs(kind: &str, signature: &Signature) -> bool {
    let header = match kind.get(..3) {
        Some("ext") => Extent::between(1024, 2048),
        _ => Extent::between(0, 512),
    };
    let ours = ["ext", "xfs", "ntfs", "fat"]
        .iter()
        .any(|family| kind.starts_with(family));
    ours && signature.kind != "table"
        && signature.kind != "ext copy"
        && (kind.starts_with(signature.kind) || header.intersect(&signature.at) == Some(signature.at))
}

const fn kind_of(why: &Unproven) -> &'static str {
    match why {
        Unproven::NotClean { kind, .. }
        | Unproven::UnknownFeature { kind, .. }
        | Unproven::Checksum { kind, .. }
        | Unproven::Inconsistent { kind, .. }
        | Unproven::Truncated { kind, .. }
        | Unproven::InUse { kind, .. }
        | Unproven::Read { kind, .. } => kind,
    }
}

fn names<'a>(signatures: impl Iterator<Item = &'a Signature>) -> String {
    let mut names: Vec<&str> = signatures.map(|signature| signature.what).collect();
    names.dedup();
    names.join(", ")
}

impl Judgement {
    fn copied(kind: &str, reason: String) -> Self {
        Self {
            kind: kind.to_owned(),
            label: String::new(),
            needs: 0,
            committed: None,
            outcome: Outcome::Copied(reason),
        }
    }
}
