//! How fast a guest changes its memory, asked of its QEMU while nothing migrates.
//!
//! Owns `calc-dirty-rate`: QEMU hashes a sample of pages twice and tells how many differ, which costs the guest nothing. Leaves what
//! the rate means to `converge`. Promises an answer within a bounded time, and nothing that has to be undone: a measurement ends by
//! itself, whatever becomes of the agent.

use std::time::Duration;

use serde::Deserialize;
use serde_json::json;

use crate::vm::qmp::{Qmp, QmpError};

const MIB: u64 = 1 << 20;
/// QEMU leaves out smaller blocks of memory.
const BLOCK_MIN: u64 = 128 * MIB;
/// Pages that are hashed in all, and for each GiB at least and at most: the sample of a small guest would be too small otherwise.
const PAGES: u64 = 16_384;
const PAGES_PER_GIB: (u64, u64) = (512, 4096);
/// Beyond the time that was asked for.
const SLACK: Duration = Duration::from_secs(5);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(100);

/// Why the rate is not known.
#[derive(Clone, Debug, thiserror::Error)]
pub enum RamRateError {
    #[error("this QEMU does not measure it (calc-dirty-rate): {0}")]
    Refused(QmpError),
    #[error("QEMU measures only memory of 128 MiB and more")]
    TooLittle,
    #[error("QEMU's measurement did not end in time")]
    Late,
    #[error(transparent)]
    Qmp(QmpError),
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Told {
    status: String,
    /// MiB per second; negative where nothing could be measured.
    dirty_rate: Option<i64>,
}

/// Measures for some seconds (1 to 60): bytes of memory per second that become dirty. `ram`: the guest's memory in bytes.
///
/// # Errors
/// See [`RamRateError`]; each is a reason, none a fault of the guest.
pub async fn measure(qmp: &Qmp, ram: u64, seconds: u32) -> Result<u64, RamRateError> {
    if ram < BLOCK_MIN {
        return Err(RamRateError::TooLittle);
    }
    let seconds = seconds.clamp(1, 60);
    let asked = json!({ "calc-time": seconds, "sample-pages": pages_per_gib(ram) });
    match qmp.execute("calc-dirty-rate", asked).await {
        Ok(_) => {}
        Err(error) if error.is_refusal() => return Err(RamRateError::Refused(error)),
        Err(error) => return Err(RamRateError::Qmp(error)),
    }
    let limit = tokio::time::Instant::now() + Duration::from_secs(u64::from(seconds)) + SLACK;
    tokio::time::sleep(Duration::from_secs(u64::from(seconds))).await;
    loop {
        let told: Told = qmp.query("query-dirty-rate").await.map_err(RamRateError::Qmp)?;
        if told.status == "measured" {
            return told
                .dirty_rate
                .and_then(bytes_per_s)
                .ok_or(RamRateError::TooLittle);
        }
        if tokio::time::Instant::now() >= limit {
            return Err(RamRateError::Late);
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn pages_per_gib(ram: u64) -> u64 {
    let gib = (ram >> 30).max(1);
    (PAGES / gib).clamp(PAGES_PER_GIB.0, PAGES_PER_GIB.1)
}

/// QEMU rounds down to whole MiB: half of one is added, so that little is not nothing.
fn bytes_per_s(mib: i64) -> Option<u64> {
    let mib = u64::try_from(mib).ok()?;
    Some(mib.saturating_mul(MIB).saturating_add(MIB / 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_bounded_and_a_rate_is_never_negative() {
        assert_eq!(pages_per_gib(512 << 20), 4096);
        assert_eq!(pages_per_gib(8 << 30), 2048);
        assert_eq!(pages_per_gib(4 << 40), 512);
        assert_eq!((bytes_per_s(-1), bytes_per_s(0)), (None, Some(MIB / 2)));
        assert_eq!(bytes_per_s(i64::MAX), Some(u64::MAX));
    }
}
