//! Running VMs: the sessions of their jobs on this host, source and target.
//!
//! Owns the tables of sessions. A session outlives the wire attempts that serve it, because the VM does: gateways and links may go and
//! come. `source` and `target` speak with the gateway, `operator` hears the operator's word, `drive` and `arrive` move the VM,
//! `source_vm` and `target_vm` carry out what the handover's machines decide; `outlook` and `trial` look at both ends before a byte
//! moves. Leaves QEMU to `crate::vm`.

mod arrive;
mod clock;
mod copy;
mod disks;
mod drive;
mod freeze;
mod hooks;
mod media;
mod old_copy;
pub(super) mod operator;
mod outlook;
mod pace;
pub(super) mod prepared;
mod proof;
mod ram_in;
mod ram_out;
mod record;
mod reduced;
mod resolve;
mod round_trip;
pub(super) mod settle;
mod shadow;
pub(super) mod source;
mod source_vm;
pub(super) mod target;
mod target_vm;
pub(super) mod thaw;
mod trial;
mod trim;
mod uplink;
mod way_back;
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

    /// The jobs with a session whose number begins so.
    pub(super) fn beginning_with(&self, start: &str) -> Vec<JobId> {
        let slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // A place that somebody holds is about to be filled, or was just now.
        let empty = |slot: &Slot<T>| slot.try_lock().is_ok_and(|slot| slot.is_none());
        let jobs = slots
            .iter()
            .filter(|(job, slot)| job.to_string().starts_with(start) && !empty(slot));
        jobs.map(|(job, _)| *job).collect()
    }

    /// The sessions of other jobs, as far as none is just being opened.
    pub(super) fn others(&self, job: JobId) -> Vec<Arc<T>> {
        let slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let others = slots.iter().filter(|(other, _)| **other != job);
        others
            .filter_map(|(_, slot)| slot.try_lock().ok()?.clone())
            .collect()
    }
}

/// The running VMs that leave this host.
pub(super) type LiveSources = Sessions<LiveSource>;

/// The running VMs that arrive at this host.
pub(super) type LiveTargets = Sessions<LiveTarget>;
