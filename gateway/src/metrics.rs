//! What the gateway measures: every series, with its unit and its meaning.
//!
//! Owns names and help texts (`longhaul_*`), and the gauges that are looked up when somebody asks. Leaves counting to the modules
//! that see what is counted. Promises that no label grows with jobs: labels are states of jobs and configured sites.

use std::sync::Arc;

use metrics::{Unit, counter, describe_counter, describe_gauge, gauge};

use crate::job::progress::JobState;
use crate::job::table::Jobs;
use crate::receive::Receiving;
use crate::send::ingest::Ingest;
use crate::store::StoreError;

/// Raw data of batches that were taken from agents, before they were reduced.
pub const SENT_RAW: &str = "longhaul_sent_raw_bytes_total";
/// What became of it: payloads with their headers.
pub const SENT_WAN: &str = "longhaul_sent_wan_bytes_total";
/// Payloads that had to be sent a second time because their connection died.
pub const SENT_AGAIN: &str = "longhaul_sent_again_bytes_total";
/// Raw data of batches that were restored for agents.
pub const RECEIVED_RAW: &str = "longhaul_received_raw_bytes_total";
/// Payloads with their headers, as they came from peers.
pub const RECEIVED_WAN: &str = "longhaul_received_wan_bytes_total";

/// Payloads from peers that refer to blocks which this gateway does not hold; each was asked for again.
pub const MISSING: &str = "longhaul_window_missing_total";
/// Raw data by what became of it, label `kind`: zero, reference, xor, compressed, raw.
pub const REDUCED: &str = "longhaul_reduced_bytes_total";
/// What the raw data of kind xor came to.
pub const XOR_PAYLOAD: &str = "longhaul_xor_payload_bytes_total";
/// The part of it in payloads with differences from the same places' earlier content only, raw.
pub const REWRITTEN: &str = "longhaul_rewritten_bytes_total";
/// What that came to.
pub const REWRITTEN_PAYLOAD: &str = "longhaul_rewritten_payload_bytes_total";

const JOBS: &str = "longhaul_jobs";
const AGENTS: &str = "longhaul_agents";
const SEND_MEMORY: &str = "longhaul_send_memory_bytes";
const RECEIVE_MEMORY: &str = "longhaul_receive_memory_bytes";
const PEER_CONNECTIONS: &str = "longhaul_peer_connections";
const PEER_RTT: &str = "longhaul_peer_rtt_seconds";
const PEER_SENT: &str = "longhaul_peer_sent_bytes_total";
const PEER_LOST: &str = "longhaul_peer_lost_packets_total";
const PEER_QUEUE: &str = "longhaul_peer_queue_bytes";
const PEER_IN_FLIGHT: &str = "longhaul_peer_in_flight_bytes";
const PEER_LEVEL: &str = "longhaul_peer_level";
const LINK_REFUSED: &str = "longhaul_link_refused_total";

const STATES: [(JobState, &str); 7] = [
    (JobState::Queued, "queued"),
    (JobState::Running, "running"),
    (JobState::Waiting, "waiting"),
    (JobState::Paused, "paused"),
    (JobState::Completed, "completed"),
    (JobState::Failed, "failed"),
    (JobState::Cancelled, "cancelled"),
];

/// Says what each series means, and begins every counter at zero. Once per program, after metrics were set up.
pub fn describe() {
    let counters = [
        (SENT_RAW, Unit::Bytes, "Raw data of batches taken from agents"),
        (
            SENT_WAN,
            Unit::Bytes,
            "Payloads and headers that these batches became",
        ),
        (
            SENT_AGAIN,
            Unit::Bytes,
            "Payloads sent a second time because their connection died",
        ),
        (
            XOR_PAYLOAD,
            Unit::Bytes,
            "What the raw data of kind xor came to, compressed",
        ),
        (
            REWRITTEN,
            Unit::Bytes,
            "Raw data of kind xor in payloads that differ from the same places' earlier content only",
        ),
        (REWRITTEN_PAYLOAD, Unit::Bytes, "What this came to, compressed"),
        (
            RECEIVED_RAW,
            Unit::Bytes,
            "Raw data of batches restored for agents",
        ),
        (
            RECEIVED_WAN,
            Unit::Bytes,
            "Payloads and headers that came from peers",
        ),
        (
            MISSING,
            Unit::Count,
            "Payloads that refer to blocks which this gateway does not hold",
        ),
        (
            LINK_REFUSED,
            Unit::Count,
            "Peers and agents that were refused a link",
        ),
    ];
    for (name, unit, help) in counters {
        describe_counter!(name, unit, help);
        counter!(name).increment(0);
    }
    describe_counter!(REDUCED, Unit::Bytes, "Raw data by what became of it");
    describe_counter!(PEER_SENT, Unit::Bytes, "UDP payload sent to a site");
    describe_counter!(PEER_LOST, Unit::Count, "Packets to a site that were lost");
    describe_gauges();
}

fn describe_gauges() {
    let gauges = [
        (JOBS, Unit::Count, "Jobs in the journal, by state"),
        (AGENTS, Unit::Count, "Agents linked right now"),
        (
            SEND_MEMORY,
            Unit::Bytes,
            "Memory held by batches and payloads until a peer accepts them",
        ),
        (
            RECEIVE_MEMORY,
            Unit::Bytes,
            "Memory held by payloads and batches on their way to agents",
        ),
        (PEER_CONNECTIONS, Unit::Count, "Connections to a site"),
        (
            PEER_RTT,
            Unit::Seconds,
            "Least round-trip time of the connections to a site",
        ),
        (
            PEER_QUEUE,
            Unit::Bytes,
            "Payloads that wait for a connection to a site",
        ),
        (
            PEER_LEVEL,
            Unit::Count,
            "How much work a lane's data is worth: 0 raw, 1 LZ4, 2 zstd 1, 3 zstd 3, 4 zstd 9",
        ),
        (
            PEER_IN_FLIGHT,
            Unit::Bytes,
            "Payloads sent to a site and not accepted yet",
        ),
    ];
    for (name, unit, help) in gauges {
        describe_gauge!(name, unit, help);
    }
}

/// Where the gauges' values are found.
pub struct Gauges {
    pub ingest: Arc<Ingest>,
    pub receiving: Arc<Receiving>,
}

impl Gauges {
    /// Looks every gauge up.
    ///
    /// # Errors
    /// A journal that cannot be read.
    pub async fn refresh(&self, jobs: &Jobs) -> Result<(), StoreError> {
        let counted = jobs.count().await?;
        for (state, name) in STATES {
            let count = counted
                .iter()
                .find(|(of, _)| *of == state)
                .map_or(0, |(_, count)| *count);
            gauge!(JOBS, "state" => name).set(count as f64);
        }
        gauge!(AGENTS).set(jobs.agents().names().len() as f64);
        gauge!(SEND_MEMORY).set(self.ingest.held() as f64);
        gauge!(RECEIVE_MEMORY).set(self.receiving.held() as f64);
        for peer in jobs.peers() {
            let (site, stats) = (peer.settings.site.clone(), peer.stats());
            for (lane, level) in peer.levels() {
                gauge!(PEER_LEVEL, "site" => site.clone(), "lane" => lane).set(f64::from(level as u8));
            }
            gauge!(PEER_CONNECTIONS, "site" => site.clone()).set(stats.connections as f64);
            gauge!(PEER_RTT, "site" => site.clone()).set(stats.rtt_ms as f64 / 1e3);
            gauge!(PEER_QUEUE, "site" => site.clone()).set(stats.waiting_bytes as f64);
            gauge!(PEER_IN_FLIGHT, "site" => site.clone()).set(stats.in_flight_bytes as f64);
            counter!(PEER_SENT, "site" => site.clone()).absolute(stats.sent_bytes);
            counter!(PEER_LOST, "site" => site).absolute(stats.lost_packets);
        }
        Ok(())
    }
}
