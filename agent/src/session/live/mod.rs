//! Running VMs: the sessions of their jobs on this host, source and target.
//!
//! Owns the tables of sessions. A session outlives the wire attempts that serve it, because the VM does: gateways and links may go and
//! come. `source` and `target` speak with the gateway, `drive` and `arrive` move the VM, `source_vm` and `target_vm` carry out what the
//! handover's machines decide. Leaves QEMU to `crate::vm`.

mod arrive;
mod copy;
mod disks;
mod drive;
mod old_copy;
mod pace;
mod proof;
mod ram_in;
mod ram_out;
mod record;
pub(super) mod settle;
mod shadow;
pub(super) mod source;
mod source_vm;
pub(super) mod target;
mod target_vm;
mod uplink;
mod word;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use longhaul_common::ids::JobId;

use self::source::LiveSource;
use self::target::LiveTarget;

/// A job's place in a table: whoever holds it opens or drops the session.
pub(super) type Slot<T> = Arc<tokio::sync::Mutex<Option<Arc<T>>>>;

/// Sessions by job.
pub(super) struct Sessions<T>(Mutex<HashMap<JobId, Slot<T>>>);

impl<T> Default for Sessions<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Sessions<T> {
    /// The place of a job, made where there is none.
    pub(super) fn slot(&self, job: JobId) -> Slot<T> {
        let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Places that nobody holds and nobody filled are not kept.
        slots.retain(|_, slot| {
            Arc::strong_count(slot) > 1 || slot.try_lock().is_ok_and(|slot| slot.is_some())
        });
        Arc::clone(slots.entry(job).or_default())
    }
}

/// The running VMs that leave this host.
pub(super) type LiveSources = Sessions<LiveSource>;

/// The running VMs that arrive at this host.
pub(super) type LiveTargets = Sessions<LiveTarget>;
