//! Who decides how much may be in flight.
//!
//! Owns our own congestion controllers and how they are plugged into quinn. Leaves alone pacing: quinn sends at 1.25 times the
//! window per smoothed round-trip time, whatever the controller says, so a controller here speaks through its window only.

mod dedicated;

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use quinn_proto::RttEstimator;
use quinn_proto::congestion::{Controller, ControllerFactory};

pub use dedicated::{Dedicated, DedicatedConfig};

use super::tuning::{PACKET_OVERHEAD, Tuning};

/// A connection's rate in bytes/s of QUIC packets, which may be changed while the connection runs.
#[derive(Clone, Debug)]
pub(crate) struct RateHandle(Arc<AtomicU64>);

impl RateHandle {
    pub(crate) fn new(bytes_per_second: u64) -> Self {
        Self(Arc::new(AtomicU64::new(bytes_per_second)))
    }

    /// From bit/s with IP headers, at the current packet size.
    pub(crate) fn set(&self, bits_per_second: u64, mtu: u16) {
        let packet = u128::from(mtu.max(1));
        let bytes = u128::from(bits_per_second / 8) * packet / (packet + u128::from(PACKET_OVERHEAD));
        self.0.store(
            u64::try_from(bytes).unwrap_or(u64::MAX).max(1000),
            Ordering::Relaxed,
        );
    }

    fn bytes_per_second(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Makes [`Dedicated`] controllers for quinn.
pub(crate) struct DedicatedFactory {
    rate: RateHandle,
    config: DedicatedConfig,
}

impl DedicatedFactory {
    pub(crate) fn new(rate: RateHandle, tuning: &Tuning) -> Self {
        let config = DedicatedConfig {
            initial_window: tuning.initial_window,
            initial_rtt: tuning.initial_rtt / 2,
            ..DedicatedConfig::default()
        };
        Self { rate, config }
    }
}

impl ControllerFactory for DedicatedFactory {
    fn build(self: Arc<Self>, _now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        let core = Dedicated::new(self.config.clone());
        Box::new(Plugged {
            rate: self.rate.clone(),
            core,
            mtu: current_mtu,
        })
    }
}

/// [`Dedicated`] behind quinn's trait.
#[derive(Clone)]
struct Plugged {
    rate: RateHandle,
    core: Dedicated,
    mtu: u16,
}

impl Controller for Plugged {
    fn on_sent(&mut self, _now: Instant, bytes: u64, last_packet_number: u64) {
        self.core.on_sent(bytes, last_packet_number);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, _: &RttEstimator) {
        self.core
            .on_ack(now, now.saturating_duration_since(sent), bytes, app_limited);
    }

    fn on_end_acks(&mut self, now: Instant, _in_flight: u64, _limited: bool, largest: Option<u64>) {
        self.core.on_end_acks(now, largest, self.rate.bytes_per_second());
    }

    fn on_congestion_event(&mut self, now: Instant, _sent: Instant, persistent: bool, lost_bytes: u64) {
        self.core.on_loss(now, lost_bytes, persistent);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.mtu = new_mtu;
    }

    fn window(&self) -> u64 {
        self.core
            .window(self.rate.bytes_per_second())
            .max(4 * u64::from(self.mtu))
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        self.core.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// Exponentially weighted mean with weight 1/8 for the new sample.
fn smooth(mean: Duration, sample: Duration) -> Duration {
    (mean * 7 + sample) / 8
}
