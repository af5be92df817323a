//! Sections that more than one program's config has.
//!
//! Owns their keys, defaults and units. Leaves alone what they set: `link` and `telemetry`.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::link::{Congestion, Credentials, LinkSettings, MTU_JUMBO, MTU_WAN};
use crate::units::{ByteSize, Rate, Span};

/// `[identity]`: this program's certificate, and whom it trusts. Files are read again when they change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IdentitySection {
    pub certificate: PathBuf,
    pub key: PathBuf,
    pub ca: PathBuf,
    /// Revoked certificates; without it none counts as revoked.
    pub crl: Option<PathBuf>,
}

impl IdentitySection {
    /// The files, as the link wants them.
    pub fn credentials(&self) -> Credentials {
        Credentials {
            cert: self.certificate.clone(),
            key: self.key.clone(),
            ca: self.ca.clone(),
            crl: self.crl.clone(),
        }
    }
}

/// Keys of a link within a site, or between sites.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LinkSection {
    /// Rate of the whole link, IP headers included. Without it the link finds its own, slowly.
    pub rate: Option<Rate>,
    /// Round-trip time without queues; a first guess where a rate is given.
    pub rtt: Option<Span>,
    /// Connections that share the rate.
    pub connections: u32,
    /// Jumbo frames: set where every hop of the link carries 9000-byte packets.
    pub jumbo: bool,
    pub congestion: Congestion,
    /// Wanted UDP socket buffers.
    pub socket_buffer: ByteSize,
    /// A link is dead when nothing was heard for this long.
    pub dead_after: Span,
    /// Let the network card cut packets (GSO).
    pub segmentation_offload: bool,
}

impl Default for LinkSection {
    fn default() -> Self {
        Self {
            rate: None,
            rtt: None,
            connections: 4,
            jumbo: false,
            congestion: Congestion::default(),
            socket_buffer: ByteSize(8 << 20),
            dead_after: Span(Duration::from_secs(10)),
            segmentation_offload: true,
        }
    }
}

/// Most connections of one link.
pub const CONNECTIONS_MAX: u32 = 16;

/// Whether `address`, the value of `key`, can be one: "host:port".
///
/// # Errors
/// A sentence.
pub fn check_address(key: &str, address: &str) -> Result<(), String> {
    let parts = address.rsplit_once(':');
    let good =
        parts.is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0));
    good.then_some(()).ok_or_else(|| {
        format!("{key}: '{address}' has no host or no port; write it like \"gateway.example.org:7401\"")
    })
}

/// Whether `count`, the value of `key`, lies within `range`.
///
/// # Errors
/// A sentence.
pub fn check_count(key: &str, count: usize, range: std::ops::RangeInclusive<usize>) -> Result<(), String> {
    let (least, most) = (range.start(), range.end());
    let wrong = || format!("{key}: {count} is not possible; write {least} to {most}");
    range.contains(&count).then_some(()).ok_or_else(wrong)
}

impl LinkSection {
    /// What is out of bounds, as a sentence; `key` is the section's own.
    ///
    /// # Errors
    /// The sentence.
    pub fn check(&self, key: &str) -> Result<(), String> {
        check_count(
            &format!("{key}.connections"),
            self.connections as usize,
            1..=CONNECTIONS_MAX as usize,
        )
    }

    /// As the link wants it, for each of the connections.
    pub fn settings(&self) -> LinkSettings {
        let dead_after = self
            .dead_after
            .0
            .clamp(Duration::from_secs(2), Duration::from_secs(3600));
        LinkSettings {
            rate: self.rate.map(|rate| rate.0),
            rtt: self.rtt.map(|rtt| rtt.0),
            connections: self.connections.clamp(1, CONNECTIONS_MAX),
            mtu_max: if self.jumbo { MTU_JUMBO } else { MTU_WAN },
            congestion: self.congestion,
            socket_buffer: usize::try_from(self.socket_buffer.0).unwrap_or(usize::MAX),
            idle: dead_after,
            // Two chances to be heard within the time that makes a link dead.
            keep_alive: dead_after / 3,
            segmentation_offload: self.segmentation_offload,
            ..LinkSettings::lan()
        }
    }
}
