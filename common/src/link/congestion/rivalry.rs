//! Placeholder.
use std::time::Instant;
#[derive(Clone, Debug, Default)]
pub(crate) struct Rivalry;
impl Rivalry {
    pub(crate) fn window(&self) -> f64 {
        0.0
    }
    pub(crate) fn on_acks(&mut self, _now: Instant, _bytes: u64) {}
    pub(crate) fn on_lost(&mut self, _now: Instant, _sent: Instant) {}
}
