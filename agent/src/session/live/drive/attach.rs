//! Waiting for a way to the target.
//!
//! Owns the wait, and what becomes of RAM that flows meanwhile. Leaves who dials to the gateways. Promises that the VM does not stand while
//! there is no link.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Drive, Stop};
use crate::session::live::uplink::Uplink;
use crate::vm::handover::Reason;

impl Drive {
    /// Waits for a link and the target's session on it; gives up RAM where that takes too long.
    pub(super) async fn attached(&mut self) -> Result<(Arc<Uplink>, u64), Stop> {
        let mut uplinks = self.s.uplink.subscribe();
        let mut heard = self.s.heard.subscribe();
        let hold = Duration::from_millis(self.s.vm.policy.hold_ms);
        let mut give_up = Some(Instant::now() + hold);
        loop {
            self.check_cancel()?;
            let uplink = uplinks
                .borrow_and_update()
                .clone()
                .filter(|uplink| !uplink.is_gone());
            let session = heard.borrow_and_update().session;
            if let (Some(uplink), Some((attempt, session))) = (uplink, session)
                && uplink.attempt == attempt
            {
                return Ok((uplink, session));
            }
            self.runs_on().await?;
            let until = give_up.unwrap_or_else(|| Instant::now() + hold);
            tokio::select! {
                _ = uplinks.changed() => {}
                _ = heard.changed() => {}
                () = self.stopped() => {}
                () = tokio::time::sleep_until(until.into()) => {
                    give_up = None;
                    if self.vm.is_migrating() {
                        self.note(&format!("no link for {} s: the RAM stream is given up, the disks stay as they are", hold.as_secs()));
                        self.vm.give_up(Reason::LinkLost).await?;
                    }
                }
            }
        }
    }

    /// Without a link nothing comes of a stop of QEMU's own: it had sent everything, and the VM would wait for the link.
    async fn runs_on(&mut self) -> Result<(), Stop> {
        if self.stands.take().is_some() || self.vm.is_migrating() && self.vm.stopped_unasked().await? {
            self.note("QEMU stopped the guest by itself while there is no link, so that is undone");
            self.vm.give_up(Reason::LinkLost).await?;
        }
        Ok(())
    }
}
