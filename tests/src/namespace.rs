//! The two sites: a pair of network namespaces.
//!
//! Owns their names, making and removing them, running a closure or a command inside one, and removing what
//! labs that died have left. Leaves alone the devices (the emulator brings them) and the programs. Promises
//! that names never collide between labs, and that a namespace is removed only when the process in its name
//! is dead.
//!
//! A name is `lh-<pid>-<n>-a` (source) or `-b` (target).

use std::ffi::OsStr;
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Each end of the pair, in its own namespace.
const VETH: &str = "wan";
/// Where `ip netns` keeps its names.
const NAMES: &str = "/run/netns";

/// One end of the link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    pub namespace: String,
    pub address: Ipv4Addr,
}

/// Addresses of source and target on the emulated link.
pub const SOURCE_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
pub const TARGET_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);

/// A pair of namespaces; removed when dropped.
#[derive(Debug)]
pub struct Sites {
    pub source: Site,
    pub target: Site,
}

impl Sites {
    /// Makes both namespaces with their loopback up.
    pub fn create() -> io::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let stem = format!(
            "lh-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let site = |end, address| Site {
            namespace: format!("{stem}-{end}"),
            address,
        };
        let sites = Self {
            source: site("a", SOURCE_ADDRESS),
            target: site("b", TARGET_ADDRESS),
        };
        for site in [&sites.source, &sites.target] {
            ip(&["netns", "add", &site.namespace])?;
            ip(&["-n", &site.namespace, "link", "set", "lo", "up"])?;
        }
        Ok(sites)
    }
}

impl Sites {
    /// Joins both by a pair of virtual Ethernet devices.
    pub fn join(&self) -> io::Result<()> {
        let (one, two) = (&self.source.namespace, &self.target.namespace);
        ip(&[
            "link", "add", VETH, "netns", one, "type", "veth", "peer", "name", VETH, "netns", two,
        ])?;
        for site in [&self.source, &self.target] {
            let address = format!("{}/24", site.address);
            ip(&["-n", &site.namespace, "address", "add", &address, "dev", VETH])?;
            ip(&["-n", &site.namespace, "link", "set", VETH, "up"])?;
        }
        Ok(())
    }

    /// Bytes that the pair has carried, with Ethernet's headers: source to target, and back.
    pub fn carried(&self) -> io::Result<(u64, u64)> {
        // Of the thread that reads it: that of the process shows the lab's own devices.
        let read = || std::fs::read_to_string("/proc/thread-self/net/dev");
        let text = inside(&self.source.namespace, read)??;
        carried(&text).ok_or_else(|| io::Error::other("the kernel does not count the pair's bytes"))
    }
}

/// Bytes sent and received by the pair's device, from the kernel's table.
fn carried(text: &str) -> Option<(u64, u64)> {
    let mut lines = text.lines().filter_map(|line| line.trim_start().split_once(':'));
    let (_, counts) = lines.find(|(name, _)| *name == VETH)?;
    let counts: Vec<_> = counts.split_whitespace().collect();
    Some((counts.get(8)?.parse().ok()?, counts.first()?.parse().ok()?))
}

impl Drop for Sites {
    fn drop(&mut self) {
        remove(&self.source.namespace);
        remove(&self.target.namespace);
    }
}

/// Removes a namespace's name if it exists; the kernel frees the rest with its last process.
pub fn remove(namespace: &str) {
    if Path::new(NAMES).join(namespace).exists() {
        let _ = ip(&["netns", "delete", namespace]);
    }
}

/// Ends every process inside a namespace, at once.
pub fn end_processes(namespace: &str) {
    let Ok(output) = Command::new("ip")
        .args(["netns", "pids", namespace])
        .stderr(Stdio::null())
        .output()
    else {
        return;
    };
    let pids = String::from_utf8_lossy(&output.stdout);
    for pid in pids
        .split_whitespace()
        .filter_map(|pid| rustix::process::Pid::from_raw(pid.parse().ok()?))
    {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

/// Removes the namespaces of labs whose process is dead, with what still runs in them. Gives their names.
pub fn remove_stale() -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(NAMES) else {
        return Vec::new();
    };
    let names = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok());
    let stale: Vec<String> = names
        .filter(|name| owner(name).is_some_and(|pid| !is_alive(pid)))
        .collect();
    for name in &stale {
        end_processes(name);
        remove(name);
    }
    stale
}

/// The process that made a namespace of this name, if a lab did.
fn owner(name: &str) -> Option<u32> {
    match name.strip_prefix("lh-")?.split('-').collect::<Vec<_>>()[..] {
        [pid, number, "a" | "b"] if number.parse::<u32>().is_ok() => pid.parse().ok(),
        _ => None,
    }
}

/// Whether a process runs.
pub fn is_alive(pid: u32) -> bool {
    Path::new("/proc").join(pid.to_string()).join("stat").exists()
}

/// Runs `work` on a thread of its own inside a namespace; sockets and devices it opens stay there.
pub fn inside<T: Send>(namespace: &str, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    let link = std::fs::File::open(Path::new(NAMES).join(namespace))?;
    let moved = std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            move_into_link_name_space(std::os::fd::AsFd::as_fd(&link), Some(LinkNameSpaceType::Network))?;
            Ok(work())
        });
        thread.join()
    });
    moved.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// A command that runs inside a namespace, or as it is when there is none.
pub fn command(namespace: Option<&str>, program: impl AsRef<OsStr>) -> Command {
    let Some(namespace) = namespace else {
        return Command::new(program);
    };
    let mut command = Command::new("ip");
    command.args(["netns", "exec", namespace]).arg(program);
    command
}

/// Why this machine cannot emulate a link, or nothing when it can.
pub fn missing_rights() -> Option<String> {
    if let Err(error) = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
    {
        return Some(format!("/dev/net/tun cannot be opened ({error})"));
    }
    let probe = Sites::create();
    probe
        .err()
        .map(|error| format!("network namespaces cannot be made ({error})"))
}

fn ip(arguments: &[&str]) -> io::Result<()> {
    let output = Command::new("ip")
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("cannot run `ip` (Debian package iproute2): {error}"),
            )
        })?;
    if output.status.success() {
        return Ok(());
    }
    let cause = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!(
        "`ip {}` failed: {}",
        arguments.join(" "),
        cause.trim()
    )))
}

/// Where a namespace is found in the file system.
pub fn path(namespace: &str) -> PathBuf {
    Path::new(NAMES).join(namespace)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_a_lab_made_have_an_owner() {
        assert_eq!(owner("lh-17-0-a"), Some(17));
        assert_eq!(owner("lh-17-12-b"), Some(17));
        for name in [
            "lh-17-0-c",
            "lh--0-a",
            "lh-17-a",
            "other",
            "lh-x-0-a",
            "lh-17-0-a-b",
        ] {
            assert_eq!(owner(name), None, "{name}");
        }
    }

    #[test]
    fn the_pairs_bytes_are_found_among_the_devices() {
        let text = "Inter-|   Receive  |  Transmit\n face |bytes packets\n    lo:  5 1 0 0 0 0 0 0 5 1 0 0 0 0 0 0\n   \
                    wan: 70 2 0 0 0 0 0 0 9000 3 0 0 0 0 0 0\n";
        assert_eq!(carried(text), Some((9000, 70)));
        assert_eq!(carried("    lo: 5 1\n   wan: 1 2"), None);
    }

    #[test]
    fn this_process_is_alive_and_an_impossible_one_is_not() {
        assert!(is_alive(std::process::id()));
        assert!(!is_alive(u32::MAX));
    }
}
