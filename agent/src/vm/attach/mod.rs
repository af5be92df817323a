//! Attaching to a running VM by its QMP socket.
//!
//! Owns the first look: monitor, facts, process. A VM that libvirt or Proxmox started is attached to by a second monitor that
//! their configuration adds; QEMU serves any number of them side by side. Promises: changes nothing.

mod process;

use std::path::Path;

use crate::vm::facts::{FactsError, HostCpu, VmFacts, gather};
use crate::vm::qmp::{Qmp, QmpError};

pub use self::process::process_of;

/// A VM that runs, or waits, on this host.
#[derive(Clone, Debug)]
pub struct Attached {
    pub qmp: Qmp,
    pub facts: VmFacts,
    /// QEMU's process; None where it is not in this PID namespace.
    pub process: Option<u32>,
}

/// Attaches to the VM behind the monitor at `socket`.
///
/// # Errors
/// [`FactsError`]: no monitor, another program holds it, or QEMU says what is not understood.
pub async fn attach(socket: &Path) -> Result<Attached, FactsError> {
    let qmp = Qmp::connect(socket).await?;
    let facts = look(&qmp).await?;
    let process = process_of(&qmp).await?;
    Ok(Attached { qmp, facts, process })
}

/// The facts of a VM whose monitor is open already.
pub async fn look(qmp: &Qmp) -> Result<VmFacts, FactsError> {
    let host = tokio::task::spawn_blocking(HostCpu::read).await;
    let host = host.map_err(|error| QmpError::answer("/proc/cpuinfo", error.to_string()))?;
    gather(qmp, host).await
}
