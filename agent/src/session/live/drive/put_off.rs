//! The back of round 0: what may be free and was not proven so.
//!
//! Owns sending it, or dropping it as proofs come in, and the second look at what was dropped, shortly before the pause. Leaves looks and
//! proofs to `proof`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use longhaul_common::ids::DiskIndex;
use longhaul_common::wire::session::{Refusal, RefusalKind};

use super::{Drive, Stop};
use crate::session::live::copy::{self, Ready};
use crate::session::live::disks;
use crate::session::live::uplink::Uplink;
use crate::session::threads::on_thread;

/// Between two second looks.
const LOOK_AGAIN: Duration = Duration::from_secs(10);

impl Drive {
    /// Has the looks at what is free go through the exports that are open now.
    pub(super) async fn look_anew(&mut self) -> Result<(), Stop> {
        let reach = disks::reach(&mut self.rounds, 1).await?;
        let free = Arc::clone(&self.s.free);
        let renewed = on_thread("free-look", move || {
            disks::connect(reach).map(|images| free.renew(images))
        });
        let renewed = renewed
            .await
            .map_err(|error| Refusal::because(RefusalKind::Protocol, &error))?;
        Ok(renewed?)
    }

    /// Looks at what is free on a thread of its own, where it is time to: reading and sending go on.
    pub(super) fn look_beside(&mut self) {
        let is_under_way = self.looking.as_ref().is_some_and(|look| !look.is_finished());
        if !is_under_way && self.s.free.is_due() {
            let (free, since) = (Arc::clone(&self.s.free), self.clock.since());
            self.looking = Some(tokio::spawn(async move { free.look(since).await }));
        }
    }

    /// Waits for the last of these looks: whoever asks for the proofs waits while one is under way.
    pub(super) async fn looked_beside(&mut self) {
        if let Some(look) = self.looking.take() {
            // One that failed proved nothing.
            let _ = look.await;
        }
    }

    /// What the first look called free goes last, unless it was proven free meanwhile.
    pub(super) async fn put_off(&mut self, uplink: &Arc<Uplink>) -> Result<(), Stop> {
        self.round += 1;
        for disk in (0..self.s.disks.len() as u16).map(DiskIndex) {
            let mut batches = copy::put_off(&self.s, disk, self.address(uplink, false))?;
            while let Some(ready) = batches.recv().await {
                let Ready { batch, header } = ready?;
                self.check_cancel()?;
                self.look_beside();
                self.s.free.sent(usize::from(disk.0), batch.extents());
                uplink.send_disk(&header, batch.data).await?;
            }
        }
        self.looked_beside().await;
        uplink.settle().await?;
        self.outcome.parts = self.s.free.report();
        let free = Arc::clone(&self.s.free);
        // Only a figure of the report: without it the gateway has an estimate.
        if let Ok(Ok(skipped)) = on_thread("live-count", move || free.leave_out()).await {
            self.outcome.skipped_bytes = skipped;
        }
        Ok(())
    }

    /// Beside RAM, through a round's exports: what was proven free, and is allocated now though no round has sent it, is sent with the round.
    /// No proof needs it. Gives whether there was any.
    pub(super) async fn second_look(&mut self, uplink: &Arc<Uplink>) -> Result<bool, Stop> {
        let is_due = self.looked.is_none_or(|at| at.elapsed() >= LOOK_AGAIN);
        if !self.vm.is_migrating() || !self.s.free.is_wanted() || !is_due {
            return Ok(false);
        }
        self.look_anew().await?;
        let free = Arc::clone(&self.s.free);
        let looked = on_thread("second-look", move || free.second_look()).await;
        let looked = looked.map_err(|error| Refusal::because(RefusalKind::Protocol, &error))?;
        self.looked = Some(Instant::now());
        let bytes: u64 = looked.iter().map(|disk| disk.bytes).sum();
        tracing::debug!(job = %self.s.job, bytes, "a second look at what was left out");
        if bytes > 0 {
            self.note(&format!(
                "a second look: {bytes} bytes that were free are allocated now; they are sent"
            ));
        }
        for (disk, found) in (0..).map(DiskIndex).zip(looked) {
            let address = self.address(uplink, false);
            let mut batches = copy::left_out(&self.s, disk, found.send, address)?;
            while let Some(ready) = batches.recv().await {
                let Ready { batch, header } = ready?;
                self.count(&batch);
                uplink.send_disk(&header, batch.data).await?;
            }
        }
        Ok(bytes > 0)
    }
}
