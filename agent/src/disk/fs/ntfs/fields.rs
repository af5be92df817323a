//! How NTFS metadata is read: little-endian fields of a structure, and the fixups that guard them.
//!
//! Owns every decoding of a number. Leaves alone what the numbers mean. Promises that a read beyond a structure is an error, never a
//! panic.

use super::inconsistent;
use crate::disk::fs::Unproven;

/// The stride of fixups, in bytes: 512 on every volume, whatever its sector size.
const STRIDE: usize = 512;

/// The bytes of one structure.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    /// `len` bytes from `at` on.
    pub(super) fn bytes(&self, at: usize, len: usize) -> Result<&'a [u8], Unproven> {
        at.checked_add(len)
            .and_then(|end| self.0.get(at..end))
            .ok_or_else(|| inconsistent("a structure ends before its fields do"))
    }

    fn array<const N: usize>(&self, at: usize) -> Result<[u8; N], Unproven> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(at, N)?);
        Ok(array)
    }

    pub(super) fn u8(&self, at: usize) -> Result<u8, Unproven> {
        self.array(at).map(u8::from_le_bytes)
    }

    pub(super) fn u16(&self, at: usize) -> Result<u16, Unproven> {
        self.array(at).map(u16::from_le_bytes)
    }

    pub(super) fn u32(&self, at: usize) -> Result<u32, Unproven> {
        self.array(at).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&self, at: usize) -> Result<u64, Unproven> {
        self.array(at).map(u64::from_le_bytes)
    }

    /// A 16-bit offset or length, as an index.
    pub(super) fn index(&self, at: usize) -> Result<usize, Unproven> {
        self.u16(at).map(usize::from)
    }

    /// A UTF-16 name of `units` code units at `at`.
    pub(super) fn name(&self, at: usize, units: u8) -> Result<Vec<u16>, Unproven> {
        let bytes = self.bytes(at, usize::from(units) * 2)?;
        Ok(utf16(bytes))
    }
}

/// The code units of little-endian UTF-16; an odd last byte is left out.
pub(super) fn utf16(bytes: &[u8]) -> Vec<u16> {
    bytes
        .chunks_exact(2)
        .map(|pair| u16::from_le_bytes([pair[0], pair[1]]))
        .collect()
}

/// Checks and undoes the fixups of a multi-sector structure: the last two bytes of each 512 hold a number that was written with
/// all of them, and the true bytes lie in an array of the header. A difference means a torn or damaged structure.
pub(super) fn undo_fixups(bytes: &mut [u8], what: &str) -> Result<(), Unproven> {
    let header = Fields(bytes);
    let (array, count) = (header.index(4)?, header.index(6)?);
    let strides = bytes.len() / STRIDE;
    let end = array + count * 2;
    if strides == 0 || count != strides + 1 || array % 2 != 0 || array < 8 || end > STRIDE - 2 {
        return Err(inconsistent(format!(
            "{what} has an update sequence of the wrong shape"
        )));
    }
    let saved = bytes[array..end].to_vec();
    for (stride, truth) in bytes.chunks_exact_mut(STRIDE).zip(saved.chunks_exact(2).skip(1)) {
        let tail = &mut stride[STRIDE - 2..];
        if tail != &saved[..2] {
            return Err(inconsistent(format!(
                "{what} is torn: its update sequence does not match"
            )));
        }
        tail.copy_from_slice(truth);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_field_beyond_the_structure_is_an_error() {
        let fields = Fields(&[1, 2, 3]);
        assert_eq!(fields.u16(0).unwrap(), 0x0201);
        assert!(fields.u16(2).is_err());
        assert!(fields.bytes(usize::MAX, 2).is_err());
    }

    #[test]
    fn fixups_restore_the_bytes_they_saved_and_notice_a_tear() {
        let mut bytes = vec![7; 1024];
        bytes[4..8].copy_from_slice(&[0x30, 0, 3, 0]);
        bytes[0x30..0x36].copy_from_slice(&[9, 9, 1, 2, 3, 4]);
        for end in [510, 1022] {
            bytes[end..end + 2].copy_from_slice(&[9, 9]);
        }
        let mut torn = bytes.clone();
        undo_fixups(&mut bytes, "it").unwrap();
        assert_eq!((bytes[510], bytes[511], bytes[1022], bytes[1023]), (1, 2, 3, 4));
        torn[1023] = 8;
        assert!(undo_fixups(&mut torn, "it").is_err());
    }

    proptest! {
        #[test]
        fn fixups_of_any_bytes_end_in_an_answer(mut bytes in prop::collection::vec(any::<u8>(), 0..2100)) {
            if bytes.len() >= 8 {
                let _ = undo_fixups(&mut bytes, "it");
            } else {
                prop_assert!(undo_fixups(&mut bytes, "it").is_err());
            }
        }
    }
}
