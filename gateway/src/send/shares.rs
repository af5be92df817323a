//! How much of the gateway's memory each flow may fill. Pure.
//!
//! Owns the credit of targets that was passed on to sources and has not come to its end at the peer yet, flow by flow, and what is held
//! back of it. Leaves the memory itself to `ingest`. Promises that a flow whose peer is slow, or gone, leaves room for others, and that
//! every flow may have two batches under way.
//!
//! ```text
//! a flow may have   SHARE x (budget - what all flows have)   under way
//! ```
//! so one alone gets three quarters of the budget, two get three sevenths each, and something is left for the next, however many stand
//! still.

use std::collections::BTreeMap;

use longhaul_common::wire::batch::RAW_MAX;

use super::outbox::Flow;

const SHARE: u64 = 3;
/// With less a source that needs credit for one whole batch might wait for ever.
const LEAST: u64 = 2 * RAW_MAX as u64;

/// In bytes.
#[derive(Clone, Copy, Debug, Default)]
struct FlowShare {
    under_way: u64,
    held_back: u64,
}

/// The flows, and what they share.
#[derive(Clone, Debug)]
pub(super) struct Shares {
    budget: u64,
    flows: BTreeMap<Flow, FlowShare>,
}

impl Shares {
    pub(super) fn new(budget: u64) -> Self {
        let flows = BTreeMap::new();
        Self { budget, flows }
    }

    pub(super) fn open(&mut self, flow: Flow) {
        self.flows.entry(flow).or_default();
    }

    pub(super) fn close(&mut self, flow: Flow) {
        self.flows.remove(&flow);
    }

    /// The target gave `credit`; gives how much of it, and of what was held back, the source is to have now.
    pub(super) fn credit(&mut self, flow: Flow, credit: u64) -> u64 {
        let Some(share) = self.flows.get_mut(&flow) else {
            return credit;
        };
        share.held_back = share.held_back.saturating_add(credit);
        self.pass(flow)
    }

    /// The peer has taken over so much; gives how much the source is to have now.
    pub(super) fn taken(&mut self, flow: Flow, bytes: u64) -> u64 {
        let Some(share) = self.flows.get_mut(&flow) else {
            return 0;
        };
        share.under_way = share.under_way.saturating_sub(bytes);
        self.pass(flow)
    }

    fn pass(&mut self, flow: Flow) -> u64 {
        let all: u64 = self.flows.values().map(|share| share.under_way).sum();
        let Some(share) = self.flows.get_mut(&flow) else {
            return 0;
        };
        // What it may have so that it has three times what is left then.
        let others = all - share.under_way;
        let most = self.budget.saturating_sub(others) / (SHARE + 1) * SHARE;
        let room = most.max(LEAST).saturating_sub(share.under_way);
        let passed = share.held_back.min(room);
        share.held_back -= passed;
        share.under_way += passed;
        passed
    }
}

#[cfg(test)]
mod tests {
    use longhaul_common::ids::{Attempt, JobId};
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn flow() -> Flow {
        (JobId::random(), Attempt(1))
    }

    #[test]
    fn flows_whose_peer_is_gone_leave_room_for_others() {
        let mut shares = Shares::new(48 * MIB);
        let dead: Vec<_> = (0..3).map(|_| flow()).collect();
        let mut given = Vec::new();
        for dead in &dead {
            shares.open(*dead);
            given.push(shares.credit(*dead, 64 * MIB) / MIB);
        }
        assert_eq!(given, [36, 9, 2]);
        let alive = flow();
        shares.open(alive);
        let mut under_way = shares.credit(alive, 64 * MIB);
        assert!(under_way >= 2 * MIB, "{under_way}");
        // It goes on as its own batches come to their end, whatever the others do.
        for _ in 0..100 {
            let more = shares.taken(alive, MIB);
            under_way = under_way - MIB + more + shares.credit(alive, MIB);
            assert!(under_way >= 2 * MIB, "{under_way}");
        }
        // When they are given up, the rest of its credit follows.
        dead.iter().for_each(|dead| shares.close(*dead));
        assert!(under_way + shares.taken(alive, MIB) > 30 * MIB);
    }

    #[test]
    fn a_flow_that_is_closed_holds_nothing_back() {
        let (mut shares, job) = (Shares::new(8 * MIB), flow());
        shares.open(job);
        assert_eq!(shares.credit(job, 64 * MIB), 6 * MIB);
        shares.close(job);
        assert_eq!((shares.credit(job, 5), shares.taken(job, 5)), (5, 0));
    }

    proptest! {
        /// No credit is lost or invented, and nobody is left without.
        #[test]
        fn credit_is_kept(steps in prop::collection::vec((0usize..4, 0u64..3 << 20, any::<bool>()), 1..200)) {
            let flows: Vec<_> = (0..4).map(|_| flow()).collect();
            let mut shares = Shares::new(16 * MIB);
            flows.iter().for_each(|flow| shares.open(*flow));
            let (mut given, mut passed, mut taken) = ([0; 4], [0; 4], [0; 4]);
            for (who, bytes, is_credit) in steps {
                if is_credit {
                    given[who] += bytes;
                    passed[who] += shares.credit(flows[who], bytes);
                } else {
                    let bytes = bytes.min(passed[who] - taken[who]);
                    taken[who] += bytes;
                    passed[who] += shares.taken(flows[who], bytes);
                }
                prop_assert!(passed[who] <= given[who]);
                prop_assert!(passed[who] - taken[who] <= 12 * MIB);
                prop_assert!(passed[who] == given[who] || passed[who] - taken[who] >= LEAST);
            }
        }
    }
}
