//! How FAT metadata is read: little-endian fields of a structure.
//!
//! Owns every decoding of a number. Promises that a field beyond a structure is 0, never a panic.

/// The 16-bit number at `at`; 0 beyond the end.
pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    match bytes.get(at..at + 2) {
        Some(&[low, high]) => u16::from_le_bytes([low, high]),
        _ => 0,
    }
}

/// The 32-bit number at `at`; 0 beyond the end.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}
