//! Thawing what was frozen, whatever happened in between.
//!
//! Owns the list of guests whose file systems may be frozen by us, on disk and in memory, and asking their agents until the thaw is
//! confirmed. Leaves freezing to `freeze`. Promises that a guest is on the list before it is frozen and until its agent said that it is
//! thawed or its QEMU is gone; that an agent which starts thaws before it does anything else; and that a guest on the list is not
//! handed over.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use longhaul_common::ids::JobId;

use super::record::Freezing;
use crate::session::threads::on_thread;
use crate::vm::guest_agent::{GuestAgent, GuestAgentError};
use crate::vm::qmp::{Qmp, QmpError};

/// Between two tries.
const AGAIN: Duration = Duration::from_millis(500);
/// Between two complaints in the log.
const COMPLAIN: Duration = Duration::from_secs(30);

/// The guests that may be frozen.
pub(in crate::session) struct Thaws {
    /// The state folder.
    state: PathBuf,
    list: Mutex<HashMap<JobId, Freezing>>,
}

impl Thaws {
    /// Of the agent with this state folder; nobody is on the list yet.
    pub(in crate::session) fn new(state: PathBuf) -> Self {
        let list = Mutex::default();
        Self { state, list }
    }

    fn list(&self) -> MutexGuard<'_, HashMap<JobId, Freezing>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the guest behind this socket may be frozen.
    pub(super) fn is_awaited(&self, guest_agent: &Path) -> bool {
        self.list()
            .values()
            .any(|record| record.guest_agent == guest_agent)
    }
}

/// Puts a guest on the list, durably.
pub(super) async fn expect(thaws: &Thaws, job: JobId, record: &Freezing) -> Result<(), String> {
    let (state, saving) = (thaws.state.clone(), record.clone());
    let saved = on_thread("record", move || saving.save(&state, job)).await;
    saved.map_err(|error| error.to_string())??;
    thaws.list().insert(job, record.clone());
    Ok(())
}

/// Asks until the thaw is confirmed, and takes the guest off the list. Gives how many file systems were frozen until then, as far as it
/// is known. `guest`: the connection that is there already.
pub(super) async fn until_confirmed(
    thaws: &Thaws,
    job: JobId,
    record: &Freezing,
    mut guest: Option<GuestAgent>,
) -> u64 {
    let mut complained: Option<Instant> = None;
    let thawed = loop {
        let error = match thaw(record, guest.take()).await {
            Ok(thawed) => break thawed,
            Err(error) => error,
        };
        if is_gone(record, &error).await {
            tracing::warn!(%job, "the VM whose file systems were to be thawed does not run any more");
            break 0;
        }
        if complained.is_none_or(|at| at.elapsed() >= COMPLAIN) {
            complained = Some(Instant::now());
            tracing::error!(
                %job,
                "the guest's file systems may be frozen, and its thaw is not confirmed: {error}; it is asked for again and again; if \
                 that does not help, run `fsfreeze -u` on each of them in the guest, and see that qemu-guest-agent runs there"
            );
        }
        tokio::time::sleep(AGAIN).await;
    };
    let state = thaws.state.clone();
    let _ = on_thread("record", move || Freezing::remove(&state, job)).await;
    thaws.list().remove(&job);
    if complained.is_some() {
        tracing::info!(%job, "the guest's file systems are thawed");
    }
    thawed
}

/// One try. The channel takes one client at a time: the connection is gone afterwards.
async fn thaw(record: &Freezing, guest: Option<GuestAgent>) -> Result<u64, GuestAgentError> {
    let mut guest = match guest {
        Some(guest) => guest,
        None => GuestAgent::connect(&record.guest_agent).await?,
    };
    guest.thaw().await
}

/// Nobody listens at either of the VM's sockets.
async fn is_gone(record: &Freezing, error: &GuestAgentError) -> bool {
    let nobody = |error: &io::Error| {
        matches!(
            error.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
        )
    };
    if !matches!(error, GuestAgentError::Io { source, .. } if nobody(source)) {
        return false;
    }
    matches!(Qmp::connect(&record.qmp).await, Err(QmpError::Connect { source, .. }) if nobody(&source))
}

/// The first act of an agent: what a former life of it may have left frozen is thawed. Does not wait for guests that do not answer.
pub(super) async fn after_crash(thaws: &Arc<Thaws>) {
    let state = thaws.state.clone();
    let Ok(found) = on_thread("records", move || Freezing::all(&state)).await else {
        return;
    };
    for (job, record) in found {
        tracing::warn!(%job, "this agent ended while the guest's file systems were frozen: thawing them");
        thaws.list().insert(job, record.clone());
        let thaws = Arc::clone(thaws);
        tokio::spawn(async move { until_confirmed(&thaws, job, &record, None).await });
    }
}
