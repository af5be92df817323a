//! Where and with what a run took place.
//!
//! Owns asking the system: versions of what took part, processor, memory, date. Promises a word for everything, also where
//! the system does not say.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

/// A load below which a machine has nothing else to do.
pub const QUIET: f64 = 0.7;

const UNKNOWN: &str = "unknown";

/// The date and time now, RFC 3339.
pub fn now() -> String {
    first_line(Command::new("date").args(["-u", "+%Y-%m-%dT%H:%M:%SZ"]))
}

/// How many processes ran or wanted to, on the mean of the last minute.
pub fn load() -> Option<f64> {
    let text = fs::read_to_string("/proc/loadavg").ok()?;
    text.split(' ').next()?.parse().ok()
}

/// Versions and machine, by name.
pub fn setting(qemu: Option<&Path>) -> BTreeMap<String, String> {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let qemu = qemu.unwrap_or_else(|| Path::new("qemu-system-x86_64"));
    let git = ["-c", "safe.directory=*", "describe", "--always", "--dirty"];
    let version = env!("CARGO_PKG_VERSION");
    let pairs = [
        (
            "longhaul",
            format!("{version} ({})", first_line(Command::new("git").args(git))),
        ),
        ("qemu", first_line(Command::new(qemu).arg("--version"))),
        ("kernel", first_line(Command::new("uname").arg("-sr"))),
        ("processor", processor()),
        ("cores", cores.to_string()),
        ("memory", memory()),
        (
            "accelerator",
            std::env::var("LONGHAUL_ACCEL").unwrap_or_else(|_| "tcg".to_owned()),
        ),
    ];
    pairs
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

fn first_line(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let line = text
        .ok()
        .and_then(|text| text.lines().next().map(|line| line.trim().to_owned()));
    line.filter(|line| !line.is_empty())
        .unwrap_or_else(|| UNKNOWN.to_owned())
}

/// The value of the first line `NAME : VALUE` of a file of the system.
fn field(file: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn processor() -> String {
    field("/proc/cpuinfo", "model name").unwrap_or_else(|| UNKNOWN.to_owned())
}

fn memory() -> String {
    let kib =
        field("/proc/meminfo", "MemTotal").and_then(|value| value.split(' ').next()?.parse::<u64>().ok());
    kib.map_or_else(
        || UNKNOWN.to_owned(),
        |kib| format!("{:.1} GiB", kib as f64 / 1_048_576.0),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_has_a_word() {
        let setting = setting(Some(Path::new("/there/is/no/qemu")));
        assert_eq!(setting["qemu"], UNKNOWN);
        assert!(setting.values().all(|value| !value.is_empty()));
        assert!(now().ends_with('Z') && load().is_some_and(|load| load >= 0.0));
    }
}
