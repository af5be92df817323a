//! Sections that more than one program's config has.
//!
//! Owns their keys, defaults and units. Leaves alone what they set: `link` and `telemetry`.

use std::path::PathBuf;
use std::time::Duration;

use jiff::civil::Time;
use serde::{Deserialize, Serialize};

use crate::link::congestion::{CapSchedule, CapWindow};
use crate::link::{Congestion, Credentials, LinkSettings, MTU_JUMBO, MTU_NEAR, MTU_WAN, WAN_RTT};
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
    /// Most that the link may carry, IP headers included. Without it the link takes what it finds.
    pub rate: Option<Rate>,
    /// Round-trip time without queues; a first guess.
    pub rtt: Option<Span>,
    /// Connections that share the rate.
    pub connections: u32,
    /// Jumbo frames: true where every hop of the link carries 9000-byte packets, false for packets of 1500 bytes. Without it, a link within
    /// a site looks for what passes.
    pub jumbo: Option<bool>,
    pub congestion: Congestion,
    /// Wanted UDP socket buffers.
    pub socket_buffer: ByteSize,
    /// A link is dead when nothing was heard for this long.
    pub dead_after: Span,
    /// Let the network card cut packets (GSO).
    pub segmentation_offload: bool,
    /// Caps by time of day.
    pub cap: Vec<CapSection>,
}

/// `[[...link.cap]]`: a window of the day, local time of this host, and the rate that the link may fill within it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CapSection {
    /// "08:00".
    pub from: Time,
    /// The first moment after; earlier than `from` where the window lies over midnight.
    pub to: Time,
    pub rate: Rate,
}

impl Default for LinkSection {
    fn default() -> Self {
        Self {
            rate: None,
            rtt: None,
            connections: 4,
            jumbo: None,
            congestion: Congestion::default(),
            socket_buffer: ByteSize(8 << 20),
            dead_after: Span(Duration::from_secs(10)),
            segmentation_offload: true,
            cap: Vec::new(),
        }
    }
}

/// Most windows of one link.
const CAPS_MAX: usize = 64;
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
        )?;
        check_count(&format!("the number of {key}.cap"), self.cap.len(), 0..=CAPS_MAX)
    }

    fn caps(&self) -> CapSchedule {
        let window = |cap: &CapSection| CapWindow {
            from: cap.from,
            to: cap.to,
            rate: cap.rate.0,
        };
        CapSchedule {
            windows: self.cap.iter().map(window).collect(),
        }
    }

    /// As [`Self::settings`], for a link to another site. One whose round-trip time is that of a LAN is tuned as such.
    pub fn far_settings(&self) -> LinkSettings {
        let far = self.rtt.is_none_or(|rtt| rtt.0 >= WAN_RTT);
        let settings = self.settings();
        LinkSettings {
            far,
            mtu_max: if far { settings.mtu_due } else { settings.mtu_max },
            ..settings
        }
    }

    /// As the link wants it, for each of the connections.
    pub fn settings(&self) -> LinkSettings {
        let dead_after = self
            .dead_after
            .0
            .clamp(Duration::from_secs(2), Duration::from_secs(3600));
        let mtu_due = match self.jumbo {
            Some(true) => MTU_JUMBO,
            Some(false) | None => MTU_WAN,
        };
        // A configured rate is reckoned with packets of a known size.
        let searched = self.jumbo.is_none() && self.rate.is_none() && self.cap.is_empty();
        LinkSettings {
            rate: self.rate.map(|rate| rate.0),
            rtt: self.rtt.map(|rtt| rtt.0),
            connections: self.connections.clamp(1, CONNECTIONS_MAX),
            mtu_max: if searched { MTU_NEAR } else { mtu_due },
            mtu_due,
            congestion: self.congestion,
            socket_buffer: usize::try_from(self.socket_buffer.0).unwrap_or(usize::MAX),
            idle: dead_after,
            // Two chances to be heard within the time that makes a link dead.
            keep_alive: dead_after / 3,
            segmentation_offload: self.segmentation_offload,
            caps: self.caps(),
            ..LinkSettings::lan()
        }
    }
}

#[cfg(test)]
mod tests {
    use jiff::civil::time;

    use super::*;

    #[test]
    fn caps_by_time_of_day_are_read() {
        let text = r#"
            rate = "200 Mbit/s"
            [[cap]]
            from = "08:00"
            to = "18:00"
            rate = "50 Mbit/s"
        "#;
        let section: LinkSection = toml::from_str(text).unwrap();
        let settings = section.settings();
        assert_eq!(
            settings.caps.at(time(9, 0, 0, 0), settings.rate),
            Some(50_000_000)
        );
        assert_eq!(
            settings.caps.at(time(18, 0, 0, 0), settings.rate),
            Some(200_000_000)
        );
        assert!(
            toml::from_str::<LinkSection>("[[cap]]\nfrom = \"8\"\nto = \"9\"\nrate = \"1 Mbit/s\"").is_err()
        );
    }

    #[test]
    fn a_link_within_a_site_looks_for_the_packets_that_pass_and_one_between_sites_does_not() {
        let section = |text: &str| toml::from_str::<LinkSection>(text).unwrap();
        let sizes = |settings: LinkSettings| (settings.mtu_max, settings.mtu_due);
        assert_eq!(sizes(section("").settings()), (MTU_NEAR, MTU_WAN));
        assert_eq!(sizes(section("").far_settings()), (MTU_WAN, MTU_WAN));
        assert_eq!(
            sizes(section("rtt = \"1 ms\"").far_settings()),
            (MTU_NEAR, MTU_WAN)
        );
        let rated = "rate = \"1 Gbit/s\"\nrtt = \"1 ms\"";
        assert_eq!(sizes(section(rated).far_settings()), (MTU_WAN, MTU_WAN));
        for settings in [LinkSection::settings, LinkSection::far_settings] {
            assert_eq!(sizes(settings(&section("jumbo = true"))), (MTU_JUMBO, MTU_JUMBO));
            assert_eq!(sizes(settings(&section("jumbo = false"))), (MTU_WAN, MTU_WAN));
        }
    }
}
