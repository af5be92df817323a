//! A kernel whose initial RAM disk brings the workload program.
//!
//! Owns which sources belong to that program, compiling it statically, and the words of the kernel's command
//! line. Leaves alone what the workloads do (`load`). Promises that the program in the guest is the one that
//! this build of the lab knows: its sources are part of the cache's key.

use std::fs;
use std::io;

use clap::ValueEnum;

use super::{Fs, Kernel, cached, kernel, key, recipe};

const LOAD_RECIPE: &str = include_str!("load.sh");
const PROGRAM_RECIPE: &str = include_str!("program.sh");
const PROGRAM: &str = "mod load;\nfn main() {\n    load::main();\n}\n";
/// Every file of the program, by its name under `load/`.
const SOURCES: [(&str, &str); 9] = [
    ("mod.rs", include_str!("load/mod.rs")),
    ("chance.rs", include_str!("load/chance.rs")),
    ("compile.rs", include_str!("load/compile.rs")),
    ("console.rs", include_str!("load/console.rs")),
    ("files.rs", include_str!("load/files.rs")),
    ("gate.rs", include_str!("load/gate.rs")),
    ("memory.rs", include_str!("load/memory.rs")),
    ("record.rs", include_str!("load/record.rs")),
    ("redis.rs", include_str!("load/redis.rs")),
];

/// What the guest does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Workload {
    /// Heartbeats only
    Idle,
    /// Memory full of real content, small writes all over its hot part, a log
    #[default]
    Mixed,
    /// redis with 150,000 documents and 400 writes a second (standard disk only)
    Redis,
    /// Files created, appended to, renamed and deleted, each step made durable, as fast as it goes
    Fsync,
    /// Many small files written and read, as a build does
    Compile,
}

impl Workload {
    /// Its name on the kernel's command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Mixed => "mixed",
            Self::Redis => "redis",
            Self::Fsync => "fsync",
            Self::Compile => "compile",
        }
    }
}

/// The kernel's command line for a guest with this workload.
pub fn command_line(root: &str, fs: Fs, workload: Workload, seed: u64) -> String {
    format!(
        "console=ttyS0,115200 quiet panic=-1 no_timer_check longhaul.root={root} longhaul.fs={} longhaul.workload={} \
         longhaul.seed={seed}",
        fs.name(),
        workload.name()
    )
}

/// What may be added to a guest's initial RAM disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// QEMU's guest agent; it runs from the start on.
    GuestAgent,
    /// The driver of NTFS.
    Ntfs3g,
}

impl Program {
    /// Debian's package, and the program's place in the guest.
    fn place(self) -> [&'static str; 2] {
        match self {
            Self::GuestAgent => ["qemu-guest-agent", "/usr/sbin/qemu-ga"],
            Self::Ntfs3g => ["ntfs-3g", "/usr/bin/ntfs-3g"],
        }
    }
}

/// The same kernel for guests with one more program, from the cache or made now.
///
/// # Errors
/// A sentence with the last words of the recipe that failed.
pub fn with_program(kernel: Kernel, program: Program, say: &dyn Fn(&str)) -> io::Result<Kernel> {
    let base = kernel.initrd.display().to_string();
    let [package, path] = program.place();
    let initrd = cached(
        &format!("{package}-initrd"),
        &key(&[PROGRAM_RECIPE, package, path, &base]),
        say,
        &format!("{package} for the guest"),
        |out, work| {
            let [out, work, initrd] = [out.as_os_str(), work.as_os_str(), kernel.initrd.as_os_str()];
            recipe(
                &["sh", "-c", PROGRAM_RECIPE, "program.sh"],
                &[out, work, initrd, package.as_ref(), path.as_ref()],
            )
        },
    )?;
    Ok(Kernel { initrd, ..kernel })
}

/// A kernel for guests with a workload, from the cache or made now.
///
/// # Errors
/// A sentence with the last words of the recipe that failed.
pub fn workload_kernel(say: &dyn Fn(&str)) -> io::Result<Kernel> {
    let kernel = kernel(say)?;
    let mut parts = vec![LOAD_RECIPE, PROGRAM];
    parts.extend(SOURCES.iter().flat_map(|(name, text)| [*name, *text]));
    let base = kernel.initrd.display().to_string();
    parts.push(&base);
    let initrd = cached(
        "workload-initrd",
        &key(&parts),
        say,
        "the guest's workload program",
        |out, work| {
            let source = work.join("source");
            fs::create_dir_all(source.join("load"))?;
            fs::write(source.join("main.rs"), PROGRAM)?;
            for (name, text) in SOURCES {
                fs::write(source.join("load").join(name), text)?;
            }
            recipe(
                &["sh", "-c", LOAD_RECIPE, "load.sh"],
                &[out.as_os_str(), work.as_os_str(), kernel.initrd.as_os_str()],
            )
        },
    )?;
    Ok(Kernel { initrd, ..kernel })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_source_of_the_program_is_known() {
        let modules = SOURCES[0].1.lines().filter_map(|line| {
            line.strip_prefix("pub mod ")?
                .strip_suffix(';')
                .map(|name| format!("{name}.rs"))
        });
        let mut named: Vec<_> = modules.chain(["mod.rs".to_owned()]).collect();
        let mut known: Vec<_> = SOURCES.iter().map(|(name, _)| (*name).to_owned()).collect();
        named.sort_unstable();
        known.sort_unstable();
        assert_eq!(named, known);
    }
}
