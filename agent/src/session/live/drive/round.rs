//! One pass over what the guest wrote.
//!
//! Owns sending it and what is counted of it. Leaves when it is time for one to the parent. Promises that its bitmap is kept until all of it
//! is durable at the target, and counts to the next one in doubt; and that what is sent only once with it is never on its way beside the next.

use std::sync::Arc;

use longhaul_common::ids::Round;

use super::{Drive, Stop};
use crate::session::live::copy::{self, Address, Batch, Ready};
use crate::session::live::disks::{self, Reach};
use crate::session::live::uplink::Uplink;

/// With less memory left than this QEMU itself is held back during a round: a socket holds some hundred KiB.
const CRAWL: u64 = 8 << 20;

impl Drive {
    /// One pass over what the guest wrote. It ends when all of it is durable, and until then its bitmap is kept; or when QEMU has stopped the
    /// VM with so much left that it was let go again.
    pub(super) async fn dirty_round(&mut self, uplink: &Arc<Uplink>) -> Result<(), Stop> {
        self.round += 1;
        self.outcome.rounds += 1;
        let bytes = self.pace.dirty();
        self.rounds.next().await?;
        self.pace.round_begins();
        self.hold_ram().await?;
        let sent = self.send_round(uplink, bytes).await;
        let flows = self.let_ram_flow().await;
        match sent {
            Ok(true) => self.rounds.finish().await?,
            // In doubt it counts to the next one.
            Ok(false) => self.rounds.give_back().await?,
            Err(stop) => {
                self.rounds.give_back().await?;
                return Err(stop);
            }
        }
        flows
    }

    /// Once QEMU has sent all of its memory it stops the VM, and that is of no use while the disks are not ready: the last part waits. Little
    /// memory would fit into the socket, so QEMU itself is held back then.
    async fn hold_ram(&mut self) -> Result<(), Stop> {
        let Some(out) = self.vm.ram_out() else {
            return Ok(());
        };
        out.allow(self.ram_left / 2);
        if self.ram_left < CRAWL {
            self.vm.crawl(true).await?;
        }
        Ok(())
    }

    async fn let_ram_flow(&mut self) -> Result<(), Stop> {
        if let Some(out) = self.vm.ram_out() {
            out.let_flow();
        }
        if self.ram_left < CRAWL {
            self.vm.crawl(false).await?;
        }
        Ok(())
    }

    /// `false`: QEMU stopped the VM meanwhile, what is left takes too long, and the VM runs on.
    async fn send_round(&mut self, uplink: &Arc<Uplink>, of_round: u64) -> Result<bool, Stop> {
        let (alone, mut bytes) = (self.vm.ram_out().is_none(), 0);
        let reach = self.reach().await?;
        let mut batches = copy::dirty(reach, self.address(uplink, false))?;
        while let Some(ready) = batches.recv().await {
            let Ready { batch, header } = ready?;
            self.count(&batch);
            bytes += batch.covered();
            let sending = uplink.send_disk(&header, batch.data);
            tokio::pin!(sending);
            let mut goes_on = true;
            // Never left halfway: a batch that counts as sent must arrive.
            loop {
                tokio::select! {
                    sent = &mut sending => break sent?,
                    () = self.stopped(), if !alone && goes_on => {
                        goes_on = self.goes_on(uplink, of_round.saturating_sub(bytes)).await?;
                    }
                }
            }
            if !goes_on {
                return Ok(false);
            }
        }
        let found = self.second_look(uplink).await?;
        loop {
            tokio::select! {
                settled = uplink.settle() => break settled?,
                () = self.stopped(), if !alone => {
                    if self.goes_on(uplink, 0).await? {
                        continue;
                    }
                    if found {
                        // No bitmap knows of it, and what comes after the next round's is left out.
                        uplink.settle().await?;
                    }
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Batches of the round that is under way.
    pub(super) fn address(&self, uplink: &Arc<Uplink>, urgent: bool) -> Address {
        Address {
            uplink: Arc::clone(uplink),
            round: Round(self.round),
            urgent,
        }
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
