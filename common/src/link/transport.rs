//! From a [`Tuning`] to quinn's configuration types.
//!
//! The only place where quinn's knobs are turned; the sums behind the numbers are in `tuning`. Leaves alone TLS and sockets.

use std::sync::Arc;
use std::time::Duration;

use quinn::congestion::{BbrConfig, CubicConfig};
use quinn::{AckFrequencyConfig, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};

use super::congestion::{MemberFactory, SharedBudget};
use super::refusal::LinkError;
use super::tuning::{Congestion, LinkSettings, Tuning, bytes_in, tune};

/// quinn's transport parameters for a connection that shares `budget`.
pub(crate) fn transport(
    settings: &LinkSettings,
    budget: &SharedBudget,
) -> Result<Arc<TransportConfig>, LinkError> {
    let tuning = tune(settings);
    let idle = IdleTimeout::try_from(settings.idle)
        .map_err(|_| LinkError::Settings(format!("idle time {:?} is too long", settings.idle)))?;
    let mut config = TransportConfig::default();
    config
        .stream_receive_window(var(tuning.stream_window))
        .receive_window(var(tuning.connection_window))
        .send_window(tuning.send_window)
        .max_concurrent_uni_streams(VarInt::from_u32(settings.uni_streams))
        .max_concurrent_bidi_streams(VarInt::from_u32(settings.bi_streams))
        .initial_rtt(tuning.initial_rtt)
        .initial_mtu(tuning.mtu_initial)
        .mtu_discovery_config(Some(mtu_discovery(&tuning)))
        .packet_threshold(settings.packet_threshold.max(3))
        .ack_frequency_config(Some(ack_frequency(&tuning)))
        .keep_alive_interval(Some(settings.keep_alive))
        .max_idle_timeout(Some(idle))
        .enable_segmentation_offload(tuning.segmentation_offload)
        // Each packet takes from the stream of the highest priority, of which no two have the same: see `Link::open_uni`. Without this
        // a stream that is partly written would be written to its end before any other, however urgent.
        .send_fairness(true)
        // QUIC datagrams are not used: a peer must not fill a buffer with them.
        .datagram_receive_buffer_size(None);
    match tuning.congestion {
        Congestion::Auto | Congestion::Dedicated | Congestion::Shared | Congestion::Background => {
            config.congestion_controller_factory(Arc::new(MemberFactory(budget.clone())));
        }
        Congestion::Cubic => {
            let mut cubic = CubicConfig::default();
            cubic.initial_window(tuning.initial_window);
            config.congestion_controller_factory(Arc::new(cubic));
        }
        Congestion::Bbr => {
            let mut bbr = BbrConfig::default();
            bbr.initial_window(tuning.initial_window);
            config.congestion_controller_factory(Arc::new(bbr));
        }
    }
    Ok(Arc::new(config))
}

/// quinn's per-socket parameters: the receiver must allow what the sender probes for.
pub(crate) fn endpoint(settings: &LinkSettings) -> Result<EndpointConfig, LinkError> {
    let mut config = EndpointConfig::default();
    config
        .max_udp_payload_size(tune(settings).mtu_max.max(1472))
        .map_err(|error| LinkError::Settings(error.to_string()))?;
    Ok(config)
}

fn mtu_discovery(tuning: &Tuning) -> MtuDiscoveryConfig {
    let mut discovery = MtuDiscoveryConfig::default();
    // Random loss alone can look like a path that swallows full packets; with quinn's 60 s each such error is dear.
    discovery
        .upper_bound(tuning.mtu_max)
        .black_hole_cooldown(Duration::from_secs(10));
    discovery
}

/// Fewer acknowledgements on fast links (draft-ietf-quic-ack-frequency-04): one for what arrives in 2 ms, at most ten packets, and 5 ms at
/// the latest. On a slow or short link a longer wait would look like a queue, and open the window in lumps.
fn ack_frequency(tuning: &Tuning) -> AckFrequencyConfig {
    let together = tuning.rate.map_or(10, |rate| {
        bytes_in(rate, Duration::from_millis(2)) / u64::from(tuning.mtu_max)
    });
    let mut frequency = AckFrequencyConfig::default();
    frequency
        .ack_eliciting_threshold(var(together.clamp(2, 10)))
        .max_ack_delay(Some(Duration::from_millis(5)));
    frequency
}

fn var(value: u64) -> VarInt {
    VarInt::from_u64(value).unwrap_or(VarInt::MAX)
}
