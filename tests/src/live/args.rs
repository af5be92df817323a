//! What a person asks of `lab live`.
//!
//! Owns the words of the command line. Leaves alone what is done with them (`run`).

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use longhaul_common::units::{ByteSize, Span};

use super::faults::{Cut, Fault, Kill, When};
use super::rival::RamMode;
use crate::guest::workload::Workload;
use crate::guest::{Fs, Kind};
use crate::ideas::Ideas;
use crate::wan::spec::LinkSpec;

/// Who migrates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum By {
    /// Agents and gateways, told by the operator program
    #[default]
    Longhaul,
    /// QEMU alone: disks by NBD mirror, RAM over TCP
    Qemu,
}

/// A guest, a link, and what is to go wrong. `--seed` also is the guest's.
#[derive(Args, Clone, Debug)]
pub struct LiveArgs {
    /// Which disk the guest has
    #[arg(long, value_enum, default_value = "tiny")]
    pub kind: Kind,
    /// A disk of your own instead, with ext4 on the whole of it; it is copied
    #[arg(long)]
    pub disk: Option<PathBuf>,
    /// The file system on the guest's disk
    #[arg(long, value_enum, default_value = "ext4")]
    pub fs: Fs,
    /// Run QEMU's guest agent in the guest, so that its file systems can be frozen
    #[arg(long)]
    pub guest_agent: bool,
    /// Have the guest trim its file systems first; needs its agent
    #[arg(long, requires = "guest_agent")]
    pub fstrim: bool,
    /// Prepare the VM so long before the job
    #[arg(long)]
    pub prepare: Option<Span>,
    /// When the age proof holds, as "30s" or "never"; default: the programs' own
    #[arg(long)]
    pub proof_age: Option<String>,
    /// Format of the disks on both sides
    #[arg(long, default_value = "raw", value_parser = ["raw", "qcow2"])]
    pub format: String,
    /// What the guest does
    #[arg(long, value_enum, default_value = "mixed")]
    pub workload: Workload,
    /// The guest's memory; default: 128M for the tiny disk and 32M more for the guest agent or ntfs-3g, else 512M
    #[arg(long)]
    pub ram: Option<Ram>,
    /// QEMU's program, for both sides
    #[arg(long)]
    pub qemu: Option<PathBuf>,
    /// Run both QEMUs on this core only
    #[arg(long)]
    pub core: Option<u32>,
    #[command(flatten)]
    pub link: LinkSpec,
    /// Cut the link in this window of the job, as "10s..25s", or in a phase, as "ram+1s/10s" (so long); may be
    /// given several times
    #[arg(long)]
    pub cut: Vec<Cut>,
    /// Kill a program or QEMU with -9, as "source-agent@ram", "target-agent@pre-switchover+20ms" or
    /// "source-gateway@30%"; programs are started again after a second
    #[arg(long)]
    pub kill: Vec<Kill>,
    /// Have the operator cancel the job at this moment, as "ram+500ms"
    #[arg(long)]
    pub cancel: Option<When>,
    /// Format of the target's disks; default: that of the source's
    #[arg(long, value_parser = ["raw", "qcow2"])]
    pub target_format: Option<String>,
    /// The pause that the job may cost, as "300ms"; default: the programs' own
    #[arg(long)]
    pub blackout: Option<Span>,
    /// How long a guest that does not converge is kept in sync before the job gives up, as "20s"; default: for ever
    #[arg(long)]
    pub give_up: Option<Span>,
    /// Give the machine a flash with a store of firmware variables, which moves as its second disk
    #[arg(long)]
    pub vars: bool,
    /// Who migrates
    #[arg(long, value_enum, default_value = "longhaul")]
    pub by: By,
    /// How QEMU sends RAM when it migrates alone
    #[arg(long, value_enum, default_value = "plain")]
    pub qemu_ram: RamMode,
    /// Move a first VM of the same template, running, through the same programs before
    #[arg(long)]
    pub after_first: bool,
    /// Have so many bytes of noise on their way through the same programs all the while, as a powered-off disk
    #[arg(long, conflicts_with = "by")]
    pub bulk: Option<ByteSize>,
    /// How long the guest is watched before the job
    #[arg(long, default_value = "6s")]
    pub before: Span,
    /// How long it is watched after the job
    #[arg(long, default_value = "4s")]
    pub after: Span,
    /// QUIC connections between the gateways
    #[arg(long)]
    pub connections: Option<u32>,
    /// Hold the handover until the memory of both QEMUs was compared, page by page: the pause says nothing then
    #[arg(long, conflicts_with = "by")]
    pub compare_memory: bool,
    /// After the move, move the guest back through the same programs, and compare the disks
    #[arg(long, conflicts_with = "by")]
    pub back: bool,
    /// Take from QEMU what it knows of the changes before the way back, as if it had been started anew
    #[arg(long, requires = "back")]
    pub forget_changes: bool,
    #[command(flatten)]
    pub ideas: Ideas,
    /// Keep the lab's directory: config files, logs, consoles, disks
    #[arg(long)]
    pub keep: bool,
    /// Folder in which the lab's directory is made; needs room for two disks
    #[arg(long)]
    pub directory: Option<PathBuf>,
    /// Give the job up after this time
    #[arg(long, default_value = "20 min")]
    pub limit: Span,
}

impl LiveArgs {
    /// The guest's memory in MiB.
    pub fn ram_mib(&self) -> u64 {
        // Programs that the lab adds lie in the guest's memory.
        let added = if self.guest_agent || self.fs == Fs::Ntfs {
            32
        } else {
            0
        };
        let usual = if self.kind == Kind::Tiny && self.disk.is_none() {
            128 + added
        } else {
            512
        };
        self.ram.map_or(usual, |ram| ram.0)
    }

    /// Format of the target's disks.
    pub fn target_format(&self) -> &str {
        self.target_format.as_deref().unwrap_or(&self.format)
    }

    /// Everything that waits for its moment.
    pub fn faults(&self) -> Vec<Fault> {
        let kills = self.kill.iter().cloned().map(Fault::Kill);
        let cuts = self.cut.iter().filter_map(|cut| match cut {
            Cut::From(when, length) => Some(Fault::Cut(when.clone(), *length)),
            Cut::Window(_) => None,
        });
        kills
            .chain(cuts)
            .chain(self.cancel.clone().map(Fault::Cancel))
            .collect()
    }
}

/// Memory in MiB, written as QEMU's `-m` is: "512M", "2G".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ram(pub u64);

impl FromStr for Ram {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refused =
            || format!("'{text}' is no memory size from 64M to 64G; write it like \"512M\" or \"2G\"");
        let plain = text.trim_end_matches("iB");
        let (digits, factor) = match plain.split_at_checked(plain.len().saturating_sub(1)) {
            Some((digits, "M")) => (digits, 1),
            Some((digits, "G")) => (digits, 1024),
            _ => return Err(refused()),
        };
        let number: u64 = digits.parse().map_err(|_| refused())?;
        let mib = number.checked_mul(factor).ok_or_else(refused)?;
        (64..=65_536)
            .contains(&mib)
            .then_some(Self(mib))
            .ok_or_else(refused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_as_qemu_reads_it() {
        assert_eq!("512M".parse(), Ok(Ram(512)));
        assert_eq!("2G".parse(), Ok(Ram(2048)));
        assert_eq!("256MiB".parse(), Ok(Ram(256)));
        for text in [
            "",
            "M",
            "512",
            "1M",
            "9999999999999999999G",
            "18446744073709551615G",
            "-1G",
            "65G",
        ] {
            assert!(text.parse::<Ram>().is_err(), "{text}");
        }
    }
}
