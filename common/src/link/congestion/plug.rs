//! The budget behind quinn's `Controller` trait.
//!
//! Owns the sharing between threads and the clock's edge: a lock per acknowledgement, atomics for the window that quinn asks for with
//! each packet, and the cap that changes with the time of day. Leaves all decisions to `budget`. quinn clones a controller when a
//! peer's address changes: the clone is a member of its own, and the old path falls silent.

use std::any::Any;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use quinn_proto::RttEstimator;
use quinn_proto::congestion::{Controller, ControllerFactory};

use super::budget::{Budget, MemberAcks, MemberId};
use super::control::ControlConfig;
use crate::link::tuning::{LinkSettings, cap, payload_rate, starting_window};

/// Bytes that a burst of offloaded packets may leave of a full window, in packets.
const BURST: u64 = 12;

/// A [`Budget`] that the connections to one peer share.
#[derive(Clone)]
pub struct SharedBudget(Arc<Shared>);

struct Shared {
    budget: Mutex<Budget>,
    window: AtomicU64,
    active: AtomicUsize,
}

/// A [`SharedBudget`] that does not keep it alive.
pub(crate) struct WeakBudget(Weak<Shared>);

impl WeakBudget {
    pub(crate) fn upgrade(&self) -> Option<SharedBudget> {
        self.0.upgrade().map(SharedBudget)
    }
}

impl std::fmt::Debug for SharedBudget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "a budget of {} bytes in flight",
            self.0.window.load(Ordering::Relaxed)
        )
    }
}

impl SharedBudget {
    /// For all connections of a link.
    pub(crate) fn of_link(settings: &LinkSettings) -> Self {
        Self::new(settings, cap(settings), starting_window(settings))
    }

    /// For one of a link's connections that shares with no other.
    pub(crate) fn of_connection(settings: &LinkSettings) -> Self {
        let connections = u64::from(settings.connections.max(1));
        let part = cap(settings).map(|rate| rate / connections);
        Self::new(settings, part, starting_window(settings) / connections)
    }

    fn new(settings: &LinkSettings, cap: Option<u64>, initial_window: u64) -> Self {
        let config = ControlConfig {
            mode: settings.congestion.mode(),
            initial_window,
            packet: 1200,
        };
        let mut budget = Budget::new(config, Instant::now());
        budget.set_cap(cap);
        let window = AtomicU64::new(budget.window());
        Self(Arc::new(Shared {
            budget: Mutex::new(budget),
            window,
            active: AtomicUsize::new(1),
        }))
    }

    pub(crate) fn downgrade(&self) -> WeakBudget {
        WeakBudget(Arc::downgrade(&self.0))
    }

    fn lock(&self) -> MutexGuard<'_, Budget> {
        self.0.budget.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, budget: &Budget, now: Instant) {
        self.0.window.store(budget.window(), Ordering::Relaxed);
        self.0.active.store(budget.active(now), Ordering::Relaxed);
    }

    /// Caps the rate from now on: bit/s with IP headers, at packets of `mtu` bytes.
    pub(crate) fn set_cap(&self, bits_per_second: u64, mtu: u16) {
        self.lock().set_cap(Some(payload_rate(bits_per_second, mtu)));
    }
}

/// Makes members of a budget for quinn.
pub(crate) struct MemberFactory(pub(crate) SharedBudget);

impl ControllerFactory for MemberFactory {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Plugged::join(self.0.clone(), current_mtu, now))
    }
}

/// A member of a budget behind quinn's trait.
struct Plugged {
    shared: SharedBudget,
    id: MemberId,
    mtu: u16,
    acked: u64,
    byte_seconds: f64,
    newest_sent: Option<Instant>,
}

impl Plugged {
    fn join(shared: SharedBudget, mtu: u16, now: Instant) -> Self {
        let mut budget = shared.lock();
        let id = budget.join(now);
        shared.publish(&budget, now);
        drop(budget);
        Self {
            shared,
            id,
            mtu,
            acked: 0,
            byte_seconds: 0.0,
            newest_sent: None,
        }
    }
}

impl Drop for Plugged {
    fn drop(&mut self) {
        self.shared.lock().leave(self.id);
    }
}

impl Controller for Plugged {
    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, _app_limited: bool, _: &RttEstimator) {
        let delay = now.saturating_duration_since(sent).min(Duration::from_secs(3600));
        self.acked = self.acked.saturating_add(bytes);
        self.byte_seconds += bytes as f64 * delay.as_secs_f64();
        self.newest_sent = Some(self.newest_sent.map_or(sent, |newest| newest.max(sent)));
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, _: Option<u64>) {
        let Some(newest_sent) = self.newest_sent.take() else {
            return;
        };
        let before = in_flight.saturating_add(self.acked);
        let limited = !app_limited && before + BURST * u64::from(self.mtu) >= self.window() / 4 * 3;
        let acks = MemberAcks {
            newest_sent,
            bytes: std::mem::take(&mut self.acked),
            in_flight: before,
            byte_seconds: std::mem::take(&mut self.byte_seconds),
            limited,
        };
        let mut budget = self.shared.lock();
        budget.on_acks(now, self.id, &acks);
        self.shared.publish(&budget, now);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, persistent: bool, lost_bytes: u64) {
        let mut budget = self.shared.lock();
        budget.on_lost(now, sent, lost_bytes, persistent);
        self.shared.publish(&budget, now);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.mtu = new_mtu;
        self.shared.lock().set_packet(u64::from(new_mtu));
    }

    fn window(&self) -> u64 {
        let window = self.shared.0.window.load(Ordering::Relaxed);
        let active = self.shared.0.active.load(Ordering::Relaxed);
        Budget::part(window, active, u64::from(self.mtu))
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self::join(self.shared.clone(), self.mtu, Instant::now()))
    }

    fn initial_window(&self) -> u64 {
        self.window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
