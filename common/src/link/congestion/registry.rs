//! Which budget a new connection belongs to: all that this process calls at one peer share one.
//!
//! Owns the table of living budgets. A budget lives as long as one of its connections; the table keeps no connection alive.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Mutex, OnceLock, PoisonError};

use super::plug::{SharedBudget, WeakBudget};
use crate::link::identity::Identity;
use crate::link::tuning::LinkSettings;

type Peer = (SocketAddr, String, Vec<u8>);

static LIVING: OnceLock<Mutex<HashMap<Peer, WeakBudget>>> = OnceLock::new();

/// The budget of the program `peer` at `address` under protocol `alpn`: the living one, or a new one of `settings`.
pub(crate) fn budget_towards(
    address: SocketAddr,
    peer: &Identity,
    alpn: &[u8],
    settings: &LinkSettings,
) -> SharedBudget {
    let key = (address, peer.uri(), alpn.to_vec());
    let mut living = LIVING
        .get_or_init(Mutex::default)
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    if let Some(budget) = living.get(&key).and_then(WeakBudget::upgrade) {
        return budget;
    }
    living.retain(|_, budget| budget.upgrade().is_some());
    let budget = SharedBudget::of_link(settings);
    living.insert(key, budget.downgrade());
    budget
}
