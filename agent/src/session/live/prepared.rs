//! VMs whose dirty bitmaps are switched on ahead of a planned run, so that the age proof holds when it starts.
//!
//! Owns the table of these VMs, its records on disk, and a watch over each: time counts only while its QEMU was seen to run. Leaves what
//! a run does with the bitmaps to `drive`. Promises that a record is there before a bitmap is, so that none is left unknown after a crash;
//! that a bitmap which is not on all of its disks is no proof and is removed; and that a run and `end` take everything away.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use longhaul_common::ids::JobId;
use longhaul_common::link::SendStream;
use longhaul_common::wire::frame;
use longhaul_common::wire::prepare::{PrepareAnswer, PrepareOpen, PrepareTask, PreparedVm};
use longhaul_common::wire::session::{Refusal, RefusalKind};

use super::clock::RunClock;
use super::disks;
use super::record::Prepared;
use super::source::{allowed_guest_agent, allowed_socket};
use super::trim;
use crate::session::Agent;
use crate::session::threads::on_thread;
use crate::vm::PREFIX;
use crate::vm::qmp::{Qmp, QmpError};
use crate::vm::rounds::{self, add_bitmaps, bitmaps, remove_bitmaps};

/// Between two looks at a VM.
const LOOK: Duration = Duration::from_secs(2);
/// Most VMs of one agent: an answer that lists them fits into a frame.
const VMS_MAX: usize = 500;

/// The VMs that are prepared.
#[derive(Default)]
pub(in crate::session) struct PreparedVms {
    vms: Mutex<HashMap<JobId, Arc<Vm>>>,
    /// One is prepared, or ended, at a time.
    door: tokio::sync::Mutex<()>,
}

/// One of them.
pub(super) struct Vm {
    id: JobId,
    record: Prepared,
    seen: Mutex<Seen>,
}

struct Seen {
    /// A monitor takes one client at a time: whoever needs it uses this one.
    qmp: Option<Qmp>,
    clock: RunClock,
}

impl Vm {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn nodes(&self) -> &[String] {
        &self.record.nodes
    }

    pub(super) fn bitmap(&self) -> &str {
        &self.record.bitmap
    }

    /// Since when it has run with its bitmaps on.
    pub(super) fn since(&self) -> Option<Instant> {
        self.seen().clock.since()
    }
}

impl PreparedVms {
    fn vms(&self) -> MutexGuard<'_, HashMap<JobId, Arc<Vm>>> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The VM with this monitor.
    pub(super) fn of(&self, qmp: &Path) -> Option<Arc<Vm>> {
        let vms = self.vms();
        vms.values().find(|vm| vm.record.qmp == qmp).map(Arc::clone)
    }

    fn has(&self, vm: &Vm) -> bool {
        self.vms().contains_key(&vm.id)
    }
}

/// A connection to a VM's monitor, for whoever needs one.
pub(super) async fn monitor(agent: &Agent, socket: &Path) -> Result<Qmp, QmpError> {
    let held = agent
        .prepared
        .of(socket)
        .and_then(|vm| vm.seen().qmp.clone())
        .filter(|qmp| !qmp.is_lost());
    match held {
        Some(qmp) => Ok(qmp),
        None => Qmp::connect(socket).await,
    }
}

/// Does what the gateway asks, and answers.
pub(in crate::session) async fn serve(agent: &Arc<Agent>, mut send: SendStream, task: PrepareTask) {
    let done = match task {
        PrepareTask::Begin(open) => begin(agent, open).await.map(|vm| vec![vm]),
        PrepareTask::End(open) => end(agent, &open).await.map(|vm| vec![vm]),
        PrepareTask::List => Ok(list(agent).await),
    };
    let answer = done.map_or_else(PrepareAnswer::Failed, PrepareAnswer::Prepared);
    if frame::write(&mut send, &answer).await.is_ok() && send.finish().is_ok() {
        let _ = tokio::time::timeout(LOOK, send.stopped()).await;
    }
}

async fn begin(agent: &Arc<Agent>, open: PrepareOpen) -> Result<PreparedVm, Refusal> {
    let refused = |error: &dyn std::error::Error| Refusal::because(RefusalKind::Refused, error);
    let refuse = |text: String| Err(Refusal::new(RefusalKind::Refused, text));
    let socket = allowed_socket(agent, &open.vm)?;
    let guest_agent = allowed_guest_agent(agent, &open.vm)?;
    let _door = agent.prepared.door.lock().await;
    let qmp = monitor(agent, &socket).await.map_err(|error| refused(&error))?;
    let found = disks::find(&qmp, &open.disks).await?;
    let granularity = rounds::granularity(open.vm.policy.granularity, found.iter().map(|disk| disk.size));
    let nodes: Vec<_> = found.into_iter().map(|disk| disk.node).collect();
    if let Some(vm) = agent.prepared.of(&socket) {
        if vm.record.nodes != nodes {
            return refuse(format!(
                "{} is prepared already, with other disks; end that first: longhaul prepare --end FILE",
                vm.record.name
            ));
        }
        return Ok(show(&vm, vec!["it was prepared already".to_owned()]).await);
    }
    if agent.prepared.vms().len() >= VMS_MAX {
        return refuse(format!("{VMS_MAX} VMs are prepared on this host; end some first"));
    }
    let mut notes = Vec::new();
    if open.vm.fstrim {
        notes.push(trim::trim(guest_agent.as_deref()).await.0);
    }
    let id = JobId::random();
    let record = Prepared {
        name: open.name,
        qmp: socket,
        nodes,
        bitmap: format!("{PREFIX}prepared-{}", id.short()),
    };
    save(agent, id, &record).await?;
    let mut clock = Err(None);
    if let Err(error) = add_bitmaps(&qmp, &record.nodes, &record.bitmap, granularity).await {
        clock = Err(Some(refused(&error)));
    } else if let Ok(started) = RunClock::start(&qmp).await {
        clock = Ok(started);
    }
    let clock = match clock {
        Ok(clock) => clock,
        Err(why) => {
            let left = take_away(agent, id, &record, Some(&qmp)).await;
            let lost = || Refusal::new(RefusalKind::Lost, "QEMU's monitor was lost");
            return Err(why.or_else(|| left.err()).unwrap_or_else(lost));
        }
    };
    tracing::info!(vm = %record.name, "prepared: its dirty bitmaps are on");
    let vm = enter(agent, id, record, Some(qmp), clock);
    Ok(show(&vm, notes).await)
}

async fn end(agent: &Arc<Agent>, open: &PrepareOpen) -> Result<PreparedVm, Refusal> {
    let socket = allowed_socket(agent, &open.vm)?;
    let _door = agent.prepared.door.lock().await;
    let vm = agent.prepared.of(&socket).ok_or_else(|| {
        let text = format!("{} is not prepared; see `longhaul status`", open.name);
        Refusal::new(RefusalKind::Refused, text)
    })?;
    let mut shown = show(&vm, Vec::new()).await;
    forget(agent, &vm).await?;
    shown.notes.push("its dirty bitmaps are gone".to_owned());
    Ok(shown)
}

async fn list(agent: &Arc<Agent>) -> Vec<PreparedVm> {
    let all: Vec<_> = agent.prepared.vms().values().map(Arc::clone).collect();
    let mut shown = Vec::with_capacity(all.len());
    for vm in all {
        shown.push(show(&vm, Vec::new()).await);
    }
    shown.sort_by(|one, other| one.name.cmp(&other.name));
    shown
}

async fn show(vm: &Vm, mut notes: Vec<String>) -> PreparedVm {
    let age = vm.since().map(|since| since.elapsed().as_millis() as u64);
    let qmp = vm.seen().qmp.clone();
    let known = match qmp {
        Some(qmp) => bitmaps(&qmp).await.ok(),
        None => None,
    };
    if known.is_none() {
        notes.push("its QEMU does not answer".to_owned());
    }
    let ours = known.map(|all| {
        let ours = all.into_iter().filter(|bitmap| bitmap.name == vm.record.bitmap);
        ours.fold(0, |sum: u64, bitmap| sum.saturating_add(bitmap.count))
    });
    PreparedVm {
        name: vm.record.name.clone(),
        qmp: vm.record.qmp.display().to_string(),
        disks: vm.record.nodes.len() as u32,
        age_ms: age,
        dirty_bytes: ours,
        notes,
    }
}

/// Nothing of it is left, in QEMU or here.
///
/// # Errors
/// QEMU does not let the bitmaps go: then the VM stays prepared.
pub(super) async fn forget(agent: &Arc<Agent>, vm: &Vm) -> Result<(), Refusal> {
    let qmp = vm.seen().qmp.clone();
    let gone = take_away(agent, vm.id, &vm.record, qmp.as_ref()).await;
    match &gone {
        Ok(()) => drop(agent.prepared.vms().remove(&vm.id)),
        Err(refusal) => tracing::error!(vm = %vm.record.name, "{refusal}"),
    }
    gone
}

/// Removes what is there of the bitmaps, then the record: what cannot be removed keeps its record.
async fn take_away(
    agent: &Arc<Agent>,
    id: JobId,
    record: &Prepared,
    qmp: Option<&Qmp>,
) -> Result<(), Refusal> {
    let left = |error: &dyn std::fmt::Display| {
        let text = format!("the dirty bitmaps of {} cannot be removed: {error}", record.name);
        Refusal::new(RefusalKind::Refused, text)
    };
    let qmp = match qmp.filter(|qmp| !qmp.is_lost()) {
        Some(qmp) => Some(qmp.clone()),
        None => connect(&record.qmp).await.map_err(|error| left(&error))?,
    };
    if let Some(qmp) = qmp {
        let all = bitmaps(&qmp).await.map_err(|error| left(&error))?;
        for bitmap in all.into_iter().filter(|bitmap| bitmap.name == record.bitmap) {
            let removed = remove_bitmaps(&qmp, &[bitmap.node], &record.bitmap).await;
            removed.map_err(|error| left(&error))?;
        }
    }
    let state = agent.settings.paths.state.clone();
    let _ = on_thread("record", move || Prepared::remove(&state, id)).await;
    Ok(())
}

/// A connection to a monitor; none where there is no such QEMU any more.
async fn connect(socket: &Path) -> Result<Option<Qmp>, QmpError> {
    match Qmp::connect(socket).await {
        Err(QmpError::Connect { source, .. })
            if matches!(
                source.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            Ok(None)
        }
        connected => connected.map(Some),
    }
}

/// Whether all of the VM's disks have the bitmap, and record in it.
pub(super) async fn is_whole(qmp: &Qmp, vm: &Vm) -> Result<bool, QmpError> {
    let all = bitmaps(qmp).await?;
    let records = |node: &String| {
        all.iter()
            .any(|bitmap| bitmap.node == *node && bitmap.name == vm.record.bitmap && bitmap.recording)
    };
    Ok(vm.record.nodes.iter().all(records))
}

fn enter(agent: &Arc<Agent>, id: JobId, record: Prepared, qmp: Option<Qmp>, clock: RunClock) -> Arc<Vm> {
    let seen = Mutex::new(Seen { qmp, clock });
    let vm = Arc::new(Vm { id, record, seen });
    agent.prepared.vms().insert(id, Arc::clone(&vm));
    tokio::spawn(watch(Arc::clone(agent), Arc::clone(&vm)));
    vm
}

/// Looks after one VM until it is not prepared any more.
async fn watch(agent: Arc<Agent>, vm: Arc<Vm>) {
    while agent.prepared.has(&vm) {
        let is_lost = {
            let mut seen = vm.seen();
            // Taken in before the queue of events is full.
            let _ = seen.clock.since();
            seen.qmp.as_ref().is_none_or(Qmp::is_lost)
        };
        if is_lost && !find_again(&agent, &vm).await {
            tracing::warn!(vm = %vm.record.name, "it is not prepared any more: its QEMU ended, and its dirty bitmaps with it");
            // What cannot be removed now is tried again, as long as the VM is on the list.
            if forget(&agent, &vm).await.is_ok() {
                return;
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Connects anew; `false` where the bitmaps cannot be there any more.
async fn find_again(agent: &Arc<Agent>, vm: &Vm) -> bool {
    let qmp = match connect(&vm.record.qmp).await {
        Ok(Some(qmp)) => qmp,
        Ok(None) => return false,
        Err(_) => return true,
    };
    match is_whole(&qmp, vm).await {
        Ok(true) => {}
        Ok(false) => {
            vm.seen().qmp = Some(qmp);
            return false;
        }
        Err(_) => return true,
    }
    // What happened meanwhile nobody has seen: time counts from now on.
    if let Ok(clock) = RunClock::start(&qmp).await
        && agent.prepared.has(vm)
    {
        *vm.seen() = Seen {
            qmp: Some(qmp),
            clock,
        };
    }
    true
}

/// Takes up again what a former life of this agent had prepared.
pub(super) async fn after_crash(agent: &Arc<Agent>) {
    let state = agent.settings.paths.state.clone();
    let Ok(found) = on_thread("records", move || Prepared::all(&state)).await else {
        return;
    };
    for (id, record) in found {
        tracing::info!(vm = %record.name, "it was prepared: its dirty bitmaps are looked for");
        enter(agent, id, record, None, RunClock::stopped());
    }
}

async fn save(agent: &Arc<Agent>, id: JobId, record: &Prepared) -> Result<(), Refusal> {
    let (state, record) = (agent.settings.paths.state.clone(), record.clone());
    let saved = on_thread("record", move || record.save(&state, id)).await;
    let saved = saved.map_err(|error| Refusal::because(RefusalKind::Protocol, &error))?;
    saved.map_err(|text| Refusal::new(RefusalKind::Refused, text))
}
