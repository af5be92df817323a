//! The program inside a lab guest: loads it in a way that it can prove afterwards.
//!
//! Owns the workloads and the words on the serial console. Knows the standard library only and nothing of the
//! lab, because it is also compiled alone, as a static program for the guest's initial RAM disk. Promises
//! that everything it says it acknowledged was made durable before, and that it can tell a RAM page that is
//! not what the program wrote.
//!
//! | guest says | when |
//! |---|---|
//! | `LONGHAUL-GUEST-UP workload=W seed=S` | first |
//! | `HB n ms` | every 50 ms, by a thread of its own; `ms` by the guest's monotonic clock |
//! | `TP n ms` | every second: operations so far |
//! | `LONGHAUL-GUEST-READY` | the workload is in its steady state |
//! | `ACK stream n` | every 100 ms when it has grown: records 1 to n of this stream are durable |
//! | `LONGHAUL-GUEST-RAM ok n` or `... bad WHY` | as answer to `verify`: n writes are where they should be |
//! | `LONGHAUL-GUEST-VERIFIED` | the answer to `verify` is complete, with every `ACK` at its last value |
//! | `LONGHAUL-GUEST-STOPPED` | as answer to `stop`: everything is synced, the guest goes off |
//! | `LONGHAUL-GUEST-STUCK NAMES` | every 20 s while these workers do not end their operation after `verify` or `stop` |
//! | `LONGHAUL-GUEST-FAILED WHY` | the workload met an error |
//!
//! The host says `verify` (the workload pauses for good and is checked), `corrupt` (one byte of the RAM
//! pattern is changed, to see that `verify` tells) and `stop`.

pub mod chance;
pub mod compile;
pub mod console;
pub mod files;
pub mod gate;
pub mod memory;
pub mod record;
pub mod redis;

use std::io::{self, BufRead};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use console::Console;
use gate::Gate;
use memory::Memory;

/// How long an operation may take before its worker is named.
const STUCK: Duration = Duration::from_secs(20);

/// The guest's disk is mounted here.
const DISK: &str = "/disk";
/// Where on the disk the workloads keep what they write.
pub const FOLDER: &str = "longhaul-load";

/// What the kernel's command line asks for.
#[derive(Clone, Debug)]
pub struct Order {
    pub workload: String,
    pub seed: u64,
    /// Where the workload writes.
    pub folder: PathBuf,
    /// The guest's disk, as this program sees it.
    pub disk: PathBuf,
    /// The guest's memory in MiB.
    pub ram_mib: u64,
}

impl Order {
    /// Reads `longhaul.workload=` and `longhaul.seed=`.
    pub fn read(words: &str, ram_mib: u64) -> Self {
        let word = |name: &str| words.split_whitespace().find_map(|word| word.strip_prefix(name));
        let disk = PathBuf::from(DISK);
        Self {
            workload: word("longhaul.workload=").unwrap_or("idle").to_owned(),
            seed: word("longhaul.seed=")
                .and_then(|seed| seed.parse().ok())
                .unwrap_or(1),
            folder: disk.join(FOLDER),
            disk,
            ram_mib,
        }
    }
}

/// What every part of the program sees.
#[derive(Clone, Debug)]
pub struct Guest {
    pub console: Arc<Console>,
    pub gate: Arc<Gate>,
    pub order: Order,
}

/// Runs until told to stop; the caller powers the guest off.
pub fn main() {
    let console = Arc::new(Console::start());
    let words = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let guest = Guest {
        console: Arc::clone(&console),
        gate: Arc::default(),
        order: Order::read(&words, memory_mib(&memory)),
    };
    console.report();
    if let Err(error) = work(&guest) {
        console.say(&format!("LONGHAUL-GUEST-FAILED {error}"));
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// Rounded up to a power of two: the kernel keeps some for itself.
fn memory_mib(meminfo: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib: u64 = line
        .and_then(|line| line.split_whitespace().next()?.parse().ok())
        .unwrap_or(128 << 10);
    (kib >> 10).max(1).next_power_of_two()
}

fn work(guest: &Guest) -> io::Result<()> {
    let order = &guest.order;
    guest.console.say(&format!(
        "LONGHAUL-GUEST-UP workload={} seed={}",
        order.workload, order.seed
    ));
    if order.folder.exists() {
        std::fs::remove_dir_all(&order.folder)?;
    }
    std::fs::create_dir_all(&order.folder)?;
    std::fs::File::open(&order.disk)?.sync_all()?;
    let mut memory = None;
    let mut store = None;
    match order.workload.as_str() {
        "idle" => {}
        "mixed" => memory = Some(memory::start(guest)?),
        "fsync" => files::start(guest)?,
        "compile" => compile::start(guest)?,
        "redis" => store = Some(redis::start(guest)?),
        other => return Err(io::Error::other(format!("no workload is called '{other}'"))),
    }
    guest.console.say("LONGHAUL-GUEST-READY");
    obey(guest, memory.as_deref(), store.as_ref())
}

/// Nobody begins another operation. Says who does not end the one it is in.
fn close(guest: &Guest) {
    while let Err(inside) = guest.gate.close(STUCK) {
        guest
            .console
            .say(&format!("LONGHAUL-GUEST-STUCK {}", inside.join(" ")));
    }
}

/// Does what the host says, until `stop`.
fn obey(guest: &Guest, memory: Option<&Memory>, store: Option<&redis::Store>) -> io::Result<()> {
    for line in io::stdin().lock().lines() {
        match line?.trim() {
            "corrupt" => {
                if let Some(memory) = memory {
                    memory.corrupt();
                }
                guest.console.say("LONGHAUL-GUEST-CORRUPTED");
            }
            "verify" => {
                close(guest);
                let found = match (memory, store) {
                    (Some(memory), _) => memory.verify(),
                    (_, Some(store)) => store.verify(),
                    _ => Ok(0),
                };
                guest.console.say(&match found {
                    Ok(writes) => format!("LONGHAUL-GUEST-RAM ok {writes}"),
                    Err(cause) => format!("LONGHAUL-GUEST-RAM bad {cause}"),
                });
                guest.console.say_acknowledged();
                guest.console.say("LONGHAUL-GUEST-VERIFIED");
            }
            "stop" => {
                close(guest);
                if let Some(store) = store {
                    store.stop();
                }
                guest.console.say_acknowledged();
                std::fs::File::open(&guest.order.disk)?.sync_all()?;
                guest.console.say("LONGHAUL-GUEST-STOPPED");
                return Ok(());
            }
            _ => {}
        }
    }
    Ok(())
}

/// Runs one part of the workload on a thread; its error is said, and ends that part only.
fn worker(guest: &Guest, name: &str, part: impl FnOnce(&Guest) -> io::Result<()> + Send + 'static) {
    let (guest, name) = (guest.clone(), name.to_owned());
    guest.gate.enter(&name);
    std::thread::spawn(move || {
        if let Err(error) = part(&guest) {
            guest
                .console
                .say(&format!("LONGHAUL-GUEST-FAILED {name}: {error}"));
        }
        guest.gate.leave(&name);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_command_line_is_understood() {
        let order = Order::read(
            "console=ttyS0 longhaul.workload=fsync longhaul.seed=77 quiet",
            128,
        );
        assert_eq!((order.workload.as_str(), order.seed), ("fsync", 77));
        assert_eq!(Order::read("quiet", 128).workload, "idle");
        assert_eq!(memory_mib("MemTotal:         102400 kB\nMemFree: 1 kB"), 128);
        assert_eq!(memory_mib("MemTotal:         490000 kB"), 512);
    }
}
