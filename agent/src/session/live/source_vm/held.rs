//! What is done to a guest that runs so that it can be moved: slowed down, media taken out of its drives. All of it is undone.
//!
//! Owns both, and writing down what was before anything is changed. Leaves when to `drive`. Promises that a limit or medium is in the
//! session's record before QEMU is told, and stays there until it was put back; so an agent that comes back after a crash finds it.

use longhaul_common::wire::session::{Refusal, RefusalKind};

use super::SourceVm;
use crate::session::live::drive::Stop;
use crate::vm::{io_limit, outgoing};

impl SourceVm {
    /// Slows the guest down; `None` leaves as it is. Gives a sentence where its disks cannot be slowed.
    pub(in crate::session::live) async fn slow(
        &mut self,
        cpu: Option<u8>,
        io: Option<u64>,
    ) -> Result<Option<String>, Stop> {
        if let Some(percent) = cpu {
            self.slowed = percent > 0;
            let slowed = outgoing::throttle(&self.s.qmp, (percent > 0).then_some(percent)).await;
            slowed.map_err(|error| Stop::from(Refusal::because(RefusalKind::Refused, &error)))?;
        }
        let Some(limit) = io else { return Ok(None) };
        match self.hold_writes(limit).await {
            Ok(()) => Ok(None),
            Err(why) => {
                // As fast as before, all of them, or none.
                self.let_writes_go().await;
                Ok(Some(format!("the VM's disk writes cannot be held down: {why}")))
            }
        }
    }

    /// To how many bytes per second each disk is held now.
    pub(in crate::session::live) fn io_limit(&self) -> Option<u64> {
        self.io.as_ref().map(|(_, limit)| *limit)
    }

    async fn hold_writes(&mut self, limit: u64) -> Result<(), String> {
        if self.io.is_none() {
            let written = self.s.disks.iter().filter(|disk| !disk.read_only);
            let nodes: Vec<_> = written.map(|disk| disk.node.clone()).collect();
            let saved = io_limit::read(&self.s.qmp, &nodes).await;
            let saved = saved.map_err(|error| error.to_string())?;
            let kept = saved.clone();
            let written = self.s.remember(|record| record.limits = kept).await;
            written.map_err(|refusal| refusal.text)?;
            self.io = Some((saved, limit));
        }
        let Some((saved, held)) = &mut self.io else {
            return Ok(());
        };
        *held = limit;
        let held = io_limit::hold(&self.s.qmp, saved, limit).await;
        held.map_err(|error| error.to_string())
    }

    async fn let_writes_go(&mut self) {
        let Some((saved, limit)) = self.io.take() else {
            return;
        };
        if let Err(error) = io_limit::put_back(&self.s.qmp, &saved).await {
            tracing::error!(job = %self.s.job, "the VM's disks may still be held to {limit} bytes/s: {error}");
            // Kept, so that it is tried again.
            self.io = Some((saved, limit));
            return;
        }
        self.say_written(|record| record.limits.clear()).await;
    }

    /// Lets the guest run as fast as it did.
    pub(in crate::session::live) async fn undo_slowing(&mut self) {
        if std::mem::take(&mut self.slowed)
            && let Err(error) = outgoing::throttle(&self.s.qmp, None).await
        {
            tracing::warn!(job = %self.s.job, "the guest may still be slowed: {error}");
        }
        self.let_writes_go().await;
    }

    /// Takes those media out of their drives that are not to move.
    pub(in crate::session::live) async fn eject_media(&mut self) -> Result<(), Stop> {
        for medium in self.s.eject.clone() {
            if self.out.contains(&medium) {
                continue;
            }
            let kept = medium.clone();
            self.s.remember(|record| record.ejected.push(kept)).await?;
            let drive = medium.drive.clone();
            let ejected = medium.eject(&self.s.qmp).await;
            self.out.push(medium);
            ejected.map_err(|error| {
                let text = format!(
                    "the medium in the drive '{drive}' cannot be taken out: {error}; unmount it in the guest, or copy it with a \
                     [[disk]] section"
                );
                Stop::from(Refusal::new(RefusalKind::Refused, text))
            })?;
        }
        Ok(())
    }

    /// Puts media back: the VM stays here.
    pub(in crate::session::live) async fn insert_media(&mut self) {
        if self.out.is_empty() {
            return;
        }
        let mut left = Vec::new();
        for medium in std::mem::take(&mut self.out) {
            if let Err(error) = medium.insert(&self.s.qmp).await {
                let drive = &medium.drive;
                tracing::error!(job = %self.s.job, "the medium of the drive '{drive}' is not back in it: {error}");
                left.push(medium);
            }
        }
        self.out = left;
        if self.out.is_empty() {
            self.say_written(|record| record.ejected.clear()).await;
        }
    }

    /// What a former life of this agent did to the guest.
    pub(super) async fn undo_former_life(&mut self) {
        let (limits, ejected) = {
            let record = self.s.record();
            (record.limits.clone(), record.ejected.clone())
        };
        if !limits.is_empty() {
            self.io = Some((limits, 0));
            self.let_writes_go().await;
        }
        if !ejected.is_empty() {
            self.out = ejected;
            self.insert_media().await;
        }
    }

    async fn say_written(&self, change: impl FnOnce(&mut crate::session::live::record::Leaving)) {
        if let Err(refusal) = self.s.remember(change).await {
            tracing::warn!(job = %self.s.job, "{refusal}");
        }
    }
}
