//! What the agent measures: every series, with its unit and its meaning.
//!
//! Owns names and help texts (`longhaul_*`). Leaves counting to the modules that see what is counted. No series has a label: an
//! agent's numbers do not grow with its jobs.

use metrics::{Unit, counter, describe_counter, describe_gauge, gauge};

/// Batches that were read and sent to the gateway.
pub const SOURCE_BATCHES: &str = "longhaul_source_batches_total";
/// Raw data in them.
pub const SOURCE_RAW: &str = "longhaul_source_raw_bytes_total";
/// Batches that were checked and written.
pub const TARGET_BATCHES: &str = "longhaul_target_batches_total";
/// Raw data in them.
pub const TARGET_RAW: &str = "longhaul_target_raw_bytes_total";
/// Batches whose writes were flushed.
pub const TARGET_DURABLE: &str = "longhaul_target_durable_batches_total";
/// 1 while there is a link to the gateway.
pub const LINKED: &str = "longhaul_gateway_linked";

/// Says what each series means, and begins every counter at zero. Once per program, after metrics were set up.
pub fn describe() {
    let counters = [
        (
            SOURCE_BATCHES,
            Unit::Count,
            "Batches read and sent to the gateway",
        ),
        (SOURCE_RAW, Unit::Bytes, "Raw data in batches sent to the gateway"),
        (TARGET_BATCHES, Unit::Count, "Batches checked and written"),
        (TARGET_RAW, Unit::Bytes, "Raw data in batches written"),
        (TARGET_DURABLE, Unit::Count, "Batches whose writes were flushed"),
    ];
    for (name, unit, help) in counters {
        describe_counter!(name, unit, help);
        counter!(name).increment(0);
    }
    describe_gauge!(LINKED, Unit::Count, "1 while there is a link to the gateway");
    gauge!(LINKED).set(0.0);
}
