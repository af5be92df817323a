//! The process behind a monitor.
//!
//! Owns how it is found: the virtual CPUs' thread numbers lead to it whatever opened the monitor's socket (libvirt opens it
//! on QEMU's behalf, so the socket's own credentials would name libvirt).

use std::path::PathBuf;

use serde::Deserialize;

use crate::vm::qmp::{Qmp, QmpError};

#[derive(Deserialize)]
struct Cpu {
    #[serde(rename = "thread-id")]
    thread: u32,
}

/// The process number of the QEMU behind `qmp`; none where it runs in another PID namespace or on another host.
///
/// # Errors
/// What QEMU or the connection said.
pub async fn process_of(qmp: &Qmp) -> Result<Option<u32>, QmpError> {
    let cpus: Vec<Cpu> = qmp.query("query-cpus-fast").await?;
    let Some(cpu) = cpus.first() else {
        return Ok(None);
    };
    let status = PathBuf::from(format!("/proc/{}/status", cpu.thread));
    let text = tokio::fs::read_to_string(status).await.unwrap_or_default();
    Ok(thread_group(&text))
}

fn thread_group(status: &str) -> Option<u32> {
    let line = status.lines().find_map(|line| line.strip_prefix("Tgid:"))?;
    line.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_thread_group_is_the_process() {
        assert_eq!(thread_group("Name:\tCPU 0/TCG\nTgid:\t77\nPid:\t80\n"), Some(77));
        assert_eq!(thread_group(""), None);
    }
}
