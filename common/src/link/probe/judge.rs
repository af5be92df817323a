//! What a test's figures mean: each check with a finding and, where it is not good, a remedy. Pure.

use super::super::refusal::LinkError;
use super::super::socket::{Granted, shortage};
use super::super::tuning::LinkSettings;
use super::{Check, ProbeReport};

/// quinn's search for the packet size stops this near to the truth.
const MTU_STEP: u16 = 20;
/// A certificate with less than this is due.
const DAYS_LEAST: f64 = 30.0;
/// Clocks further apart make fresh certificates "not valid yet", and times in reports misleading.
const OFFSET_MS_MAX: f64 = 5_000.0;
/// Bursts of a fast link fit into this.
const BUFFER_LEAST: usize = 1 << 20;

pub(super) fn checks(
    report: &ProbeReport,
    failure: Option<&LinkError>,
    settings: &LinkSettings,
    granted: Option<Granted>,
) -> Vec<Check> {
    let mut checks = vec![reachable(report, failure)];
    checks.extend(
        [
            report
                .peer_certificate_days
                .map(|days| certificate("the peer's", days)),
            report.own_certificate_days.map(|days| certificate("our", days)),
            report.mtu.map(|mtu| packet_size(mtu, settings)),
            report.rtt_min_ms.map(|rtt| delay(rtt, report, settings)),
            report.clock_offset_ms.map(|offset| clock(offset, report)),
            report.loss.map(|loss| lost(loss, report)),
            report.rate_bit_per_s.map(|rate| speed(rate, settings)),
            granted.map(|granted| buffers(granted, settings)),
        ]
        .into_iter()
        .flatten(),
    );
    checks
}

fn check(name: &str, finding: String, remedy: Option<String>) -> Check {
    Check {
        name: name.to_owned(),
        ok: remedy.is_none(),
        finding,
        remedy,
    }
}

fn reachable(report: &ProbeReport, failure: Option<&LinkError>) -> Check {
    match (failure, &report.peer) {
        (None, peer) => {
            let who = peer
                .as_ref()
                .map_or_else(String::new, |peer| format!("{peer} answered "));
            let finding = format!(
                "{who}at {} after {:.0} ms",
                report.address,
                report.handshake_ms.unwrap_or(0.0)
            );
            check("reachable", finding, None)
        }
        (Some(error), peer) => {
            let remedy = match error {
                LinkError::NoAnswer { .. } => {
                    "compare the address with the peer's config; on the peer, see with `ss -ulpn` whether it listens; \
                     allow the UDP port in both firewalls, for answers too"
                }
                LinkError::Refused { .. } => {
                    "compare who runs at this address with the config; see `longhaul pki list` for its certificate"
                }
                LinkError::RefusedByPeer { .. } => {
                    "do what the reason says; the peer's log names the same refusal"
                }
                LinkError::Socket { .. } | LinkError::Settings(_) => {
                    "correct the link's settings on this host"
                }
                _ if peer.is_some() => {
                    "the path works and then stops: look for a firewall that drops UDP flows, and at the peer's log"
                }
                _ => "look at the peer's log",
            };
            check("reachable", error.to_string(), Some(remedy.to_owned()))
        }
    }
}

fn certificate(whose: &str, days: f64) -> Check {
    let remedy = (days < DAYS_LEAST).then(|| {
        "issue a new one with `longhaul pki issue --replace` and copy it to its host: it is used without a restart"
            .to_owned()
    });
    check(
        "certificate",
        format!("{whose} certificate is valid for {days:.0} more days"),
        remedy,
    )
}

fn packet_size(mtu: u16, settings: &LinkSettings) -> Check {
    let short = mtu.saturating_add(MTU_STEP) < settings.mtu_due;
    let remedy = short.then(|| {
        format!(
            "packets of {} bytes do not pass: look for a tunnel or VPN on the way and set the MTU of every hop, or set \
             the link's largest packet to {mtu}",
            settings.mtu_due
        )
    });
    check("mtu", format!("UDP payloads of {mtu} bytes pass"), remedy)
}

fn delay(rtt: f64, report: &ProbeReport, settings: &LinkSettings) -> Check {
    let finding = format!(
        "round-trip time {rtt:.1} ms at best, {:.1} ms on average, jitter {:.1} ms",
        report.rtt_mean_ms.unwrap_or(rtt),
        report.jitter_ms.unwrap_or(0.0)
    );
    let configured = settings.rtt.map(|rtt| rtt.as_secs_f64() * 1e3);
    let remedy = configured.filter(|configured| rtt > configured * 1.5 + 5.0).map(|configured| {
        format!(
            "{configured:.0} ms are configured: windows are too small for {rtt:.0} ms, so set the round-trip time to that"
        )
    });
    check("delay", finding, remedy)
}

fn clock(offset: f64, report: &ProbeReport) -> Check {
    let error = report.rtt_min_ms.unwrap_or(0.0) / 2.0;
    let direction = if offset < 0.0 { "behind" } else { "ahead of" };
    let finding = format!(
        "the peer's clock is {:.1} ms {direction} ours (to {error:.1} ms)",
        offset.abs()
    );
    let remedy = (offset.abs() > OFFSET_MS_MAX + error)
        .then(|| "run a time service (chrony, systemd-timesyncd) on both hosts".to_owned());
    check("clock", finding, remedy)
}

fn lost(loss: f64, report: &ProbeReport) -> Check {
    let finding = format!(
        "{:.2} % of the packets were lost in a burst of {:.1} MB",
        loss * 100.0,
        report.sent_bytes.unwrap_or(0) as f64 / 1e6
    );
    let remedy = (loss > 0.02).then(|| {
        "if the configured rate is higher than the link's, lower it; else look for errors on the way (`ip -s link`, \
         `nstat -az UdpRcvbufErrors` on the peer)"
            .to_owned()
    });
    check("loss", finding, remedy)
}

fn speed(rate: f64, settings: &LinkSettings) -> Check {
    let finding = format!("{:.1} Mbit/s of payload arrived", rate / 1e6);
    let share = settings
        .rate
        .map(|rate| rate as f64 / f64::from(settings.connections.max(1)));
    let remedy = share.filter(|share| rate < 0.8 * share).map(|share| {
        format!(
            "{:.1} Mbit/s are configured for one connection: other traffic uses the link, or it carries less; set the rate \
             to what the provider guarantees",
            share / 1e6
        )
    });
    check("rate", finding, remedy)
}

fn buffers(granted: Granted, settings: &LinkSettings) -> Check {
    let finding = format!(
        "UDP buffers of {} KiB (receive) and {} KiB (send)",
        granted.receive >> 10,
        granted.send >> 10
    );
    let short = granted.receive.min(granted.send) < BUFFER_LEAST;
    check(
        "buffers",
        finding,
        shortage(granted, settings.socket_buffer).filter(|_| short),
    )
}
