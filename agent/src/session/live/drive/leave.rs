//! The end of a migration, whichever it is.
//!
//! Owns what is undone then. Leaves why it ended to the parent. Promises that nothing of ours stays in QEMU, and that the VM runs on here,
//! as fast as before and with its media, unless it was moved.

use longhaul_common::wire::session::Refusal;

use super::Drive;
use crate::session::live::source::End;
use crate::vm::handover::Reason;

impl Drive {
    /// The end, whichever: nothing of ours stays in QEMU, and the VM runs on here unless it was moved.
    pub(super) async fn leave(mut self, end: Result<(), Refusal>) -> End {
        if let Err(refusal) = &end {
            tracing::warn!(job = %self.s.job, "the VM is not moved: {refusal}");
            if self.vm.is_migrating()
                && let Err(error) = self.vm.give_up(Reason::Cancelled).await
            {
                tracing::error!(job = %self.s.job, "the VM could not be brought back: {error}");
            }
            self.vm.undo_slowing().await;
            self.vm.insert_media().await;
        } else {
            self.keep_way_back().await;
        }
        let socket = self.rounds.socket().to_owned();
        if end.is_err()
            && let Err(error) = self.rounds.remove().await
        {
            tracing::error!(job = %self.s.job, "something of ours is left in the VM's QEMU: {error}");
        }
        match end {
            Ok(()) => {
                // A QEMU that quits leaves its NBD server's name behind.
                let _ = std::fs::remove_file(socket);
                Ok(self.s.moved(Box::new(self.outcome)).await)
            }
            Err(refusal) => {
                self.vm.hook_ended().await;
                let refusal = self.s.stayed(refusal).await;
                self.s.forget().await;
                Err(refusal)
            }
        }
    }
}
