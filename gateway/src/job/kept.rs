//! A job's ledger while a transfer holds it.
//!
//! Owns giving it back. Leaves counting to `ledger`. Promises that what was counted is kept, however a transfer ends.

use super::attempt::Transfer;
use super::ledger::Ledger;

/// Gives the ledger back to the driver when the transfer ends, also when it is interrupted.
pub(super) struct KeepLedger<'a, 'b> {
    pub ledger: &'a mut Ledger,
    pub transfer: Transfer<'b>,
}

impl Drop for KeepLedger<'_, '_> {
    fn drop(&mut self) {
        self.transfer.context.ingest.close(&self.transfer.outflow);
        *self.ledger = self.transfer.outflow.to_next();
    }
}
