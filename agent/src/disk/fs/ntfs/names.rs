//! File names: in records, and in the index of the root directory.
//!
//! Owns how a `$FILE_NAME` and a directory index are decoded, and the two names that decide whether free blocks may be skipped.
//! The index is not searched as a tree: every block of it that is in use is read, so that no broken link hides a name. Promises
//! to end on any bytes: each entry is at least 16 bytes long and stays inside its block.

use super::content::Content;
use super::fields::{Fields, undo_fixups};
use super::inconsistent;
use super::mft::{Mft, ROOT};
use super::record::{BITMAP, INDEX_ALLOCATION, INDEX_ROOT, Reference};
use crate::disk::fs::Unproven;

/// Where Windows keeps the memory of a hibernated system, in the root directory.
const HIBERFIL: &str = "hiberfil.sys";

/// In the name of every file that belongs to volume shadow copies.
const SHADOW: &str = "{3808876b-c176-4e48-b7ae-04046e6cc752}";

/// Bytes of the root directory's index: more than a million names.
const BLOCKS_MAX: u64 = 256 << 20;

const INDEX: &str = "$I30";
const LAST: u16 = 2;

/// A name and the directory it stands in.
pub(super) struct FileName {
    parent: Reference,
    name: Vec<u16>,
}

impl FileName {
    pub(super) fn decode(value: &Fields<'_>) -> Result<Self, Unproven> {
        Ok(Self {
            parent: Reference(value.u64(0)?),
            name: value.name(0x42, value.u8(0x40)?)?,
        })
    }

    /// Whether it is the hibernation file of the root directory, in any case.
    pub(super) fn is_hiberfil(&self) -> bool {
        let same = |(unit, expected): (&u16, u8)| lower(*unit) == u16::from(expected);
        self.parent.number() == ROOT
            && self.name.len() == HIBERFIL.len()
            && self.name.iter().zip(HIBERFIL.bytes()).all(same)
    }

    /// Whether it belongs to volume shadow copies, in any directory and any case.
    pub(super) fn is_shadow(&self) -> bool {
        self.name.windows(SHADOW.len()).any(|window| {
            let same = |(unit, expected): (&u16, u8)| lower(*unit) == u16::from(expected);
            window.iter().zip(SHADOW.bytes()).all(same)
        })
    }
}

fn lower(unit: u16) -> u16 {
    u8::try_from(unit).map_or(unit, |byte| byte.to_ascii_lowercase().into())
}

/// Gives every name that the root directory's index holds, with the record it leads to.
pub(super) fn in_root(mft: &Mft<'_>, found: &mut dyn FnMut(FileName, Reference)) -> Result<(), Unproven> {
    let root = mft.content(ROOT, INDEX_ROOT, INDEX)?;
    let Some(Content::Resident(root)) = root else {
        return Err(inconsistent("the root directory has no index"));
    };
    let block = Fields(&root).u32(8)? as usize;
    if Fields(&root).u32(0)? != super::record::FILE_NAME
        || !block.is_power_of_two()
        || !(512..=2 << 20).contains(&block)
    {
        return Err(inconsistent("the root directory's index is not one of names"));
    }
    entries(&Fields(&root), 0x10, found)?;
    let Some(blocks) = mft.content(ROOT, INDEX_ALLOCATION, INDEX)? else {
        return Ok(());
    };
    let used = mft.content(ROOT, BITMAP, INDEX)?;
    let used = used.ok_or_else(|| inconsistent("the root directory's index has no bitmap"))?;
    if blocks.size() > BLOCKS_MAX {
        return Err(inconsistent("the root directory's index is too large"));
    }
    let mut bytes = vec![0; block];
    for number in 0..blocks.size() / block as u64 {
        let mut bits = [0];
        used.read(&mft.reader, &mut bits, number / 8)?;
        if bits[0] >> (number % 8) & 1 == 0 {
            continue;
        }
        blocks.read(&mft.reader, &mut bytes, number * block as u64)?;
        if !bytes.starts_with(b"INDX") {
            return Err(inconsistent(
                "a block of the root directory's index has no valid magic",
            ));
        }
        undo_fixups(&mut bytes, "a block of the root directory's index")?;
        entries(&Fields(&bytes), 0x18, found)?;
    }
    Ok(())
}

/// The entries of one index node, whose header lies at `header`.
fn entries(
    node: &Fields<'_>,
    header: usize,
    found: &mut dyn FnMut(FileName, Reference),
) -> Result<(), Unproven> {
    let broken = || inconsistent("the root directory's index does not decode");
    let (first, used) = (node.u32(header)? as usize, node.u32(header + 4)? as usize);
    let mut rest = node.bytes(header, used)?.get(first..).ok_or_else(broken)?;
    loop {
        let entry = Fields(rest);
        let len = entry.index(8)?;
        if len < 0x10 || len > rest.len() {
            return Err(broken());
        }
        if entry.u16(0x0c)? & LAST != 0 {
            return Ok(());
        }
        let key = Fields(Fields(&rest[..len]).bytes(0x10, entry.index(0x0a)?)?);
        found(FileName::decode(&key)?, Reference(entry.u64(0)?));
        rest = &rest[len..];
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name(parent: u64, name: &str) -> FileName {
        FileName {
            parent: Reference(parent),
            name: name.encode_utf16().collect(),
        }
    }

    #[test]
    fn the_names_that_matter_are_known_in_any_case() {
        assert!(name(5, "hiberfil.sys").is_hiberfil() && name(5 | 5 << 48, "HiberFil.SYS").is_hiberfil());
        assert!(!name(6, "hiberfil.sys").is_hiberfil() && !name(5, "hiberfil.sy").is_hiberfil());
        assert!(name(9, "{3808876B-C176-4e48-B7AE-04046E6CC752}").is_shadow());
        assert!(name(9, "{aa}{3808876b-c176-4e48-b7ae-04046e6cc752}").is_shadow());
        assert!(!name(9, "3808876b").is_shadow());
    }

    proptest! {
        #[test]
        fn any_bytes_end_in_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..300), first in 0u8..60) {
            let mut bytes = bytes;
            if bytes.len() > 24 {
                bytes[16..24].copy_from_slice(&[first, 0, 0, 0, 200, 0, 0, 0]);
            }
            let _ = entries(&Fields(&bytes), 0x10, &mut |_, _| {});
        }
    }
}
