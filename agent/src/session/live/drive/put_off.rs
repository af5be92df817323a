//! The back of round 0: what may be free and was not proven so.
//!
//! Owns sending it, or dropping it as proofs come in. Leaves looks and proofs to `proof`.

use std::sync::Arc;

use longhaul_common::ids::Round;
use longhaul_common::wire::session::{Refusal, RefusalKind};

use super::{Drive, Stop};
use crate::session::live::uplink::Uplink;
use crate::session::live::{copy, disks};
use crate::session::threads::on_thread;

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

    /// What the first look called free goes last, unless it was proven free meanwhile.
    pub(super) async fn put_off(&mut self, uplink: &Arc<Uplink>) -> Result<(), Stop> {
        self.round += 1;
        for disk in (0..self.s.disks.len() as u16).map(longhaul_common::ids::DiskIndex) {
            let mut from = 0;
            loop {
                self.s.free.look().await;
                self.check_cancel()?;
                let Some((batches, end)) = copy::put_off(&self.s, disk, from).await? else {
                    break;
                };
                for batch in batches {
                    self.s.free.sent(usize::from(disk.0), batch.extents());
                    let (header, data) = batch.addressed(uplink, Round(self.round), false)?;
                    uplink.send_disk(&header, data).await?;
                }
                from = end;
            }
        }
        uplink.settle().await?;
        self.outcome.parts = self.s.free.report();
        Ok(())
    }
}
