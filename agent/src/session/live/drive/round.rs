//! One pass over what the guest wrote.
//!
//! Owns sending it and what is counted of it. Leaves when it is time for one to the parent. Promises that its bitmap is kept until all of it
//! is durable at the target, and counts to the next one in doubt.

use std::sync::Arc;
use std::time::Instant;

use longhaul_common::ids::Round;

use super::{Drive, Stop};
use crate::session::live::copy::{self, Batch};
use crate::session::live::disks::{self, Reach};
use crate::session::live::uplink::Uplink;

impl Drive {
    /// One pass over what the guest wrote. It ends when all of it is durable; until then its bitmap is kept.
    pub(super) async fn dirty_round(&mut self, uplink: &Arc<Uplink>) -> Result<(), Stop> {
        self.round += 1;
        self.outcome.rounds += 1;
        self.rounds.next().await?;
        // Memory waits with its last part: once QEMU has sent all of it, it stops the VM.
        if let Some(out) = self.vm.ram_out() {
            out.allow(self.ram_left / 2);
        }
        let sent = self.send_round(uplink).await;
        if let Some(out) = self.vm.ram_out() {
            out.let_flow();
        }
        match sent {
            Ok(()) => Ok(self.rounds.finish().await?),
            Err(stop) => {
                // In doubt it counts to the next one.
                self.rounds.give_back().await?;
                Err(stop)
            }
        }
    }

    async fn send_round(&mut self, uplink: &Arc<Uplink>) -> Result<(), Stop> {
        let (began, alone, mut bytes) = (Instant::now(), self.vm.ram_out().is_none(), 0);
        let reach = self.reach().await?;
        let mut batches = copy::dirty(reach).await?;
        while let Some(batch) = batches.recv().await {
            let batch = batch?;
            self.count(&batch);
            bytes += batch.covered();
            let (header, data) = batch.addressed(uplink, Round(self.round), false)?;
            uplink.send_disk(&header, data).await?;
        }
        self.second_look(uplink).await?;
        uplink.settle().await?;
        if alone {
            let rtt = self.s.heard.borrow().rtt();
            self.pace.round(bytes, began.elapsed(), rtt);
        }
        Ok(())
    }

    pub(super) async fn reach(&mut self) -> Result<Reach, Stop> {
        let connections = self.s.agent.settings.limits.read_threads;
        Ok(disks::reach(&mut self.rounds, connections).await?)
    }

    pub(super) fn count(&mut self, batch: &Batch) {
        if let Some(bytes) = self.outcome.dirty_bytes.get_mut(usize::from(batch.disk.0)) {
            *bytes += batch.data.len() as u64;
        }
        let disk = usize::from(batch.disk.0);
        self.s.free.sent(disk, batch.extents());
        self.pace.sent(disk, batch.covered());
    }
}
