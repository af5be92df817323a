//! The checksums of ext4: CRC-16 over group descriptors (`uninit_bg`), CRC-32C over everything (`metadata_csum`).
//!
//! Owns the two functions in the shape the format wants them: no final inversion, and a seed that can be carried on. Leaves alone
//! which bytes are summed. Source: the kernel's Documentation/filesystems/ext4 (checksums).

/// CRC-32C carried on from `seed` without the customary inversions, as ext4 stores it.
pub(super) fn crc32c(seed: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, bytes)
}

/// CRC-16 (polynomial 0x8005, reflected) carried on from `seed`, as ext4 stores it.
pub(super) fn crc16(seed: u16, bytes: &[u8]) -> u16 {
    bytes.iter().fold(seed, |crc, byte| {
        (0..8).fold(crc ^ u16::from(*byte), |crc, _| {
            if crc & 1 == 1 { crc >> 1 ^ 0xA001 } else { crc >> 1 }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_values_of_the_catalogue() {
        // CRC-16/MODBUS and CRC-32/ISCSI of "123456789"; the latter is stored without its final inversion.
        assert_eq!(crc16(0xFFFF, b"123456789"), 0x4B37);
        assert_eq!(crc32c(u32::MAX, b"123456789"), !0xE306_9283);
    }

    #[test]
    fn a_sum_can_be_carried_on() {
        assert_eq!(crc16(crc16(7, b"1234"), b"56789"), crc16(7, b"123456789"));
        assert_eq!(crc32c(crc32c(7, b"1234"), b"56789"), crc32c(7, b"123456789"));
    }
}
