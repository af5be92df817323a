//! Values with units, as people write them: "200 Mbit/s", "80 ms", "64 MiB".
//!
//! Owns parsing and printing. Leaves alone what a value means. Promises that a number without its unit is refused (bits and
//! bytes are not guessed), and that printing and parsing agree.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Text that is no value of the wanted kind.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not {kind}; write it like {example}")]
pub struct NotAValue {
    text: String,
    kind: &'static str,
    example: &'static str,
}

macro_rules! value {
    ($(#[$doc:meta])* $name:ident($inner:ty), $kind:literal, $example:literal, $parse:expr) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(pub $inner);

        impl FromStr for $name {
            type Err = NotAValue;

            fn from_str(text: &str) -> Result<Self, NotAValue> {
                let refused = || NotAValue { text: text.to_owned(), kind: $kind, example: $example };
                let (number, unit) = split(text).ok_or_else(refused)?;
                let parse: fn(f64, &str) -> Option<$inner> = $parse;
                parse(number, &unit).map(Self).ok_or_else(refused)
            }
        }

        impl TryFrom<String> for $name {
            type Error = NotAValue;

            fn try_from(text: String) -> Result<Self, NotAValue> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(value: $name) -> Self {
                value.to_string()
            }
        }
    };
}

value! {
    /// Bits per second.
    Rate(u64), "a rate", "\"200 Mbit/s\" or \"25 MB/s\"", |number, unit| {
        let factor = match unit {
            "bit/s" | "bit" | "bps" => 1.0,
            "kbit/s" | "kbit" | "kbps" => 1e3,
            "mbit/s" | "mbit" | "mbps" => 1e6,
            "gbit/s" | "gbit" | "gbps" => 1e9,
            "kb/s" => 8e3,
            "mb/s" => 8e6,
            "gb/s" => 8e9,
            "kib/s" => 8.0 * 1024.0,
            "mib/s" => 8.0 * 1_048_576.0,
            "gib/s" => 8.0 * 1_073_741_824.0,
            _ => return None,
        };
        whole(number * factor)
    }
}

value! {
    /// Bytes.
    ByteSize(u64), "a size", "\"64 MiB\" or \"10 GB\"", |number, unit| {
        let factor = match unit {
            "b" | "bytes" => 1.0,
            "kb" => 1e3,
            "mb" => 1e6,
            "gb" => 1e9,
            "tb" => 1e12,
            "kib" => 1024.0,
            "mib" => 1_048_576.0,
            "gib" => 1_073_741_824.0,
            "tib" => 1_099_511_627_776.0,
            _ => return None,
        };
        whole(number * factor)
    }
}

value! {
    /// A length of time.
    Span(Duration), "a time", "\"300 ms\", \"15 min\" or \"2 h\"", |number, unit| {
        let seconds = match unit {
            "us" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "min" => 60.0,
            "h" => 3600.0,
            "d" => 86_400.0,
            _ => return None,
        };
        Duration::try_from_secs_f64(number * seconds).ok()
    }
}

value! {
    /// A share between 0 and 1, written in per cent.
    Share(Millionths), "a share", "\"0.5 %\"", |number, unit| {
        let millionths = whole(number * 1e4)?;
        (unit == "%" && millionths <= 1_000_000).then_some(Millionths(millionths as u32))
    }
}

/// Parts in a million; whole numbers, so that a share can be compared and kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Millionths(pub u32);

impl Share {
    /// As a number between 0 and 1.
    pub fn fraction(&self) -> f64 {
        f64::from(self.0.0) / 1e6
    }
}

/// Splits "1.5 MiB" into its number and its unit in lower case.
fn split(text: &str) -> Option<(f64, String)> {
    let text = text.trim();
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.' && c != '_')
        .unwrap_or(text.len());
    let number: f64 = text[..end].replace('_', "").parse().ok()?;
    Some((number, text[end..].trim().to_ascii_lowercase()))
}

fn whole(number: f64) -> Option<u64> {
    (number.is_finite() && (0.0..9e18).contains(&number)).then_some(number.round() as u64)
}

/// The largest of `units` (name, factor; ascending) that `value` reaches, with at most three significant decimals.
fn in_units(f: &mut fmt::Formatter<'_>, value: f64, units: &[(&str, f64)]) -> fmt::Result {
    let (name, factor) = units
        .iter()
        .rev()
        .find(|(_, factor)| value >= *factor)
        .unwrap_or(&units[0]);
    let number = value / factor;
    let decimals = if number.fract() == 0.0 || number >= 1000.0 {
        0
    } else {
        3 - (number.max(1.0).log10() as usize + 1).min(3)
    };
    let text = format!("{number:.decimals$}");
    let text = if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.')
    } else {
        &text
    };
    write!(f, "{text} {name}")
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        in_units(
            f,
            self.0 as f64,
            &[("bit/s", 1.0), ("kbit/s", 1e3), ("Mbit/s", 1e6), ("Gbit/s", 1e9)],
        )
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const K: f64 = 1024.0;
        in_units(
            f,
            self.0 as f64,
            &[
                ("B", 1.0),
                ("KiB", K),
                ("MiB", K * K),
                ("GiB", K * K * K),
                ("TiB", K * K * K * K),
            ],
        )
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [
            ("us", 1e-6),
            ("ms", 1e-3),
            ("s", 1.0),
            ("min", 60.0),
            ("h", 3600.0),
            ("d", 86_400.0),
        ];
        in_units(f, self.0.as_secs_f64(), &units)
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} %", f64::from(self.0.0) / 1e4)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_as_people_write_them() {
        assert_eq!("200 Mbit/s".parse(), Ok(Rate(200_000_000)));
        assert_eq!("100mbit".parse(), Ok(Rate(100_000_000)));
        assert_eq!("25 MB/s".parse(), Ok(Rate(200_000_000)));
        assert_eq!("64 MiB".parse(), Ok(ByteSize(64 << 20)));
        assert_eq!("1_000 B".parse(), Ok(ByteSize(1000)));
        assert_eq!("80ms".parse(), Ok(Span(Duration::from_millis(80))));
        assert_eq!("0.5%".parse(), Ok(Share(Millionths(5000))));
    }

    #[test]
    fn a_missing_or_foreign_unit_is_refused_with_an_example() {
        for text in [
            "200",
            "",
            "fast",
            "1 MB",
            "-1 Mbit/s",
            "1e99 Mbit/s",
            "99999999999999 Gbit/s",
        ] {
            let refused = text.parse::<Rate>().unwrap_err().to_string();
            assert!(refused.contains("\"200 Mbit/s\""), "{refused}");
        }
        assert!("101 %".parse::<Share>().is_err());
        assert!("64 Mbit".parse::<ByteSize>().is_err());
    }

    #[test]
    fn printing_reads_well_and_parses_back() {
        for (rate, text) in [
            (200_000_000, "200 Mbit/s"),
            (1_500, "1.5 kbit/s"),
            (93_400_000, "93.4 Mbit/s"),
            (0, "0 bit/s"),
        ] {
            assert_eq!(Rate(rate).to_string(), text);
            assert_eq!(text.parse(), Ok(Rate(rate)));
        }
        assert_eq!(ByteSize(1536).to_string(), "1.5 KiB");
        assert_eq!(ByteSize(0).to_string(), "0 B");
        assert_eq!(Span(Duration::from_millis(250)).to_string(), "250 ms");
    }
}
