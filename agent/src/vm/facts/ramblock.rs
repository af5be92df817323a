//! RAM blocks, from the one place that lists them: the human monitor's `info ramblock`.
//!
//! Pure. The columns are name, page size with its unit, offset, used and total length; later versions append more.

use serde::{Deserialize, Serialize};

use super::FactsError;
use crate::vm::qmp::wire::printable;

/// Most blocks of one VM.
const BLOCKS_MAX: usize = 1024;

/// A block of RAM or ROM, as the migration stream knows it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RamBlock {
    pub name: String,
    /// Bytes in use now; what is sent.
    pub used: u64,
    /// Bytes it can grow to.
    pub total: u64,
}

/// Reads the list, sorted by name.
///
/// # Errors
/// [`FactsError::RamBlock`] at the first line that does not fit.
pub(super) fn parse(text: &str) -> Result<Vec<RamBlock>, FactsError> {
    let mut blocks = Vec::new();
    for line in text.lines().skip(1).filter(|line| !line.trim().is_empty()) {
        if blocks.len() == BLOCKS_MAX {
            let (what, max) = ("RAM blocks", BLOCKS_MAX);
            return Err(FactsError::TooMany { what, max });
        }
        let block = parse_line(line).ok_or_else(|| FactsError::RamBlock(printable(line)))?;
        blocks.push(block);
    }
    blocks.sort();
    Ok(blocks)
}

/// A name may hold blanks; the three numbers in hexadecimal behind it may not.
fn parse_line(line: &str) -> Option<RamBlock> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let first = words.iter().position(|word| word.starts_with("0x"))?;
    let number = |at: usize| u64::from_str_radix(words.get(at)?.strip_prefix("0x")?, 16).ok();
    let name = words[..first.checked_sub(2)?].join(" ");
    if name.is_empty() || name.len() > 255 {
        return None;
    }
    Some(RamBlock {
        name: printable(&name),
        used: number(first + 1)?,
        total: number(first + 2)?,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn both_versions_lists_are_read() {
        let old = "   Block Name    PSize    Offset    Used    Total\r\n  pc.ram    4 KiB  0x0000000000000000 0x0000000002000000 0x0000000002000000\r\n /rom@etc/acpi/tables    4 KiB  0x3 0x20000 0x200000\r\n";
        let new = "   Block Name    PSize    Offset    Used    Total    HVA  RO\n  pc.ram    2 MiB  0x0 0x2000000 0x2000000 0x00007f12 rw\n";
        let blocks = parse(old).unwrap();
        assert_eq!(
            (blocks[0].name.as_str(), blocks[0].used, blocks[0].total),
            ("/rom@etc/acpi/tables", 0x20000, 0x20_0000)
        );
        assert_eq!(blocks[1].used, 32 << 20);
        assert_eq!(parse(new).unwrap()[0].name, "pc.ram");
        assert!(parse("header\n nonsense").is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "(?s).{0,300}") {
            let _ = parse(&text);
        }

        #[test]
        fn any_columns_are_survived(words in proptest::collection::vec("(0x[0-9a-f]{0,20}|a|4|KiB)", 0..8)) {
            let _ = parse(&format!("header\n{}", words.join(" ")));
        }
    }
}
