//! The agent's config file.
//!
//! Owns every key, its default and its unit; `configs/agent.toml` shows them all. Leaves reading to `longhaul_common::settings`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use longhaul_common::link::check_name;
use longhaul_common::settings::sections::{IdentitySection, LinkSection, check_address, check_count};
use longhaul_common::startup::ProgramSettings;
use longhaul_common::telemetry::LogSettings;
use longhaul_common::units::{ByteSize, Span};
use serde::{Deserialize, Serialize};

/// Most threads of a kind.
const THREADS_MAX: usize = 256;
/// A few batches: with less than one the source could never send.
const JOB_MEMORY_MIN: u64 = 4 << 20;
const CHANGES_GRANULARITY: std::ops::RangeInclusive<u64> = 4096..=1 << 20;
const FLUSH_TIME_MIN: Duration = Duration::from_millis(10);
/// Well below the limits that the handover itself has for a VM that stands.
const HANDOVER_HOOK_MAX: Duration = Duration::from_secs(5);

/// The whole file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentSettings {
    pub identity: IdentitySection,
    pub gateway: GatewaySection,
    pub paths: PathsSection,
    #[serde(default)]
    pub limits: LimitsSection,
    #[serde(default)]
    pub target: TargetSection,
    #[serde(default)]
    pub hooks: HooksSection,
    #[serde(default)]
    pub programs: ProgramsSection,
    #[serde(default)]
    pub vm: VmSection,
    #[serde(default)]
    pub link: LinkSection,
    #[serde(default)]
    pub log: LogSettings,
    /// Prometheus text on `http://ADDRESS/metrics`; none without it.
    pub metrics: Option<SocketAddr>,
}

/// `[gateway]`: the gateway of this agent's site.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GatewaySection {
    /// "host:port".
    pub address: String,
    /// The name in the gateway's certificate.
    pub name: String,
}

/// `[paths]`: what the agent may touch.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PathsSection {
    /// Folders (and block devices) that a source image may lie in.
    #[serde(default)]
    pub read: Vec<PathBuf>,
    /// Folders (and block devices) that a target image may lie in.
    #[serde(default)]
    pub write: Vec<PathBuf>,
    /// Folders in which QMP sockets of running VMs may lie.
    #[serde(default)]
    pub qmp: Vec<PathBuf>,
    /// Sockets of helper programs; emptied by a reboot.
    pub run: PathBuf,
    /// Progress of block devices, definitions of arrived VMs; survives a reboot.
    pub state: PathBuf,
}

/// `[limits]`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsSection {
    /// Threads that read a source image.
    pub read_threads: usize,
    /// Threads that check and write arriving batches.
    pub write_threads: usize,
    /// Threads that read a target image back.
    pub verify_threads: usize,
    /// Raw bytes of one job between the source agent's read and the target agent's write: what all four programs together may
    /// hold. Twice bandwidth x delay at the expected ratio: 1 Gbit/s x 100 ms x 2 x ratio 2 = 50 MB.
    pub job_memory: ByteSize,
    /// Written bytes are flushed, and so acknowledged, at least this often.
    pub flush_bytes: ByteSize,
    pub flush_time: Span,
    /// How long a source image stays open and locked after its link was lost, so that the next attempt need not scan again.
    pub source_linger: Span,
}

impl Default for LimitsSection {
    fn default() -> Self {
        Self {
            read_threads: 2,
            write_threads: 2,
            verify_threads: 2,
            job_memory: ByteSize(64 << 20),
            flush_bytes: ByteSize(64 << 20),
            flush_time: Span(Duration::from_millis(500)),
            source_linger: Span(Duration::from_secs(600)),
        }
    }
}

/// `[target]`: how new image files are made.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TargetSection {
    /// Numeric user and group.
    pub owner: Option<(u32, u32)>,
    /// Octal digits, such as "0640".
    pub mode: Option<String>,
    /// SELinux label.
    pub label: Option<String>,
}

/// `[hooks]`: programs that the agent runs at the moments of a move; no shell, no arguments.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HooksSection {
    /// A running VM is about to be moved. Its failure ends the job before anything moved.
    pub before: Option<PathBuf>,
    /// A running VM stands, and is about to change sides. Its failure takes the handover back.
    pub at_handover: Option<PathBuf>,
    /// The VM has arrived. Its failure is reported.
    pub after: Option<PathBuf>,
    /// A running VM stays, or comes back: undoes what `before` and `at_handover` did. Its failure is reported.
    pub on_failure: Option<PathBuf>,
    /// What each of them may take, but for `at_handover`.
    pub timeout: Span,
    /// What `at_handover` may take: the VM stands meanwhile.
    pub handover_timeout: Span,
}

impl Default for HooksSection {
    fn default() -> Self {
        Self {
            before: None,
            at_handover: None,
            after: None,
            on_failure: None,
            timeout: Span(Duration::from_secs(60)),
            handover_timeout: Span(Duration::from_secs(1)),
        }
    }
}

impl HooksSection {
    fn check(&self) -> Result<(), String> {
        let hooks = [
            ("before", &self.before),
            ("at_handover", &self.at_handover),
            ("after", &self.after),
            ("on_failure", &self.on_failure),
        ];
        for (key, hook) in hooks {
            if let Some(hook) = hook.as_ref().filter(|hook| !hook.is_absolute()) {
                return Err(format!(
                    "hooks.{key}: '{}' is relative; write the whole path",
                    hook.display()
                ));
            }
        }
        if self.handover_timeout.0 > HANDOVER_HOOK_MAX {
            return Err(format!(
                "hooks.handover_timeout: the VM stands meanwhile, so it may be {} at most",
                Span(HANDOVER_HOOK_MAX)
            ));
        }
        Ok(())
    }
}

/// `[vm]`: running VMs that leave or arrive.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VmSection {
    /// Program and arguments that start the QEMU of an arriving VM; no shell. `{disk0}`, `{disk1}` ... stand for its disks, `{qmp}` for
    /// the monitor's socket, `{pidfile}`, `{name}`, `{uuid}` for what they say. `-S` and `-incoming defer` must be among them.
    pub command: Vec<String>,
    /// RAM on its way between the two QEMUs, at each end, in bytes: also the most that may be left to send while the VM stands.
    pub ram_memory: ByteSize,
    /// Have the QEMU of an arriving VM note which blocks are written, for the way back.
    pub note_changes: bool,
    /// What one bit of these notes stands for: a power of two from 4 KiB to 1 MiB. QEMU's memory for a TiB of disk: 2 MiB at 64 KiB.
    pub changes_granularity: ByteSize,
}

impl Default for VmSection {
    fn default() -> Self {
        Self {
            command: Vec::new(),
            ram_memory: ByteSize(32 << 20),
            note_changes: true,
            changes_granularity: ByteSize(64 << 10),
        }
    }
}

/// `[programs]`: QEMU's tools, by name or path.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ProgramsSection {
    pub qemu_img: PathBuf,
    pub qemu_nbd: PathBuf,
}

impl Default for ProgramsSection {
    fn default() -> Self {
        Self {
            qemu_img: "qemu-img".into(),
            qemu_nbd: "qemu-nbd".into(),
        }
    }
}

impl ProgramSettings for AgentSettings {
    fn check(&self) -> Result<(), String> {
        Self::check(self)
    }

    fn identity(&self) -> &IdentitySection {
        &self.identity
    }

    fn log(&self) -> &LogSettings {
        &self.log
    }
}

impl AgentSettings {
    /// What no single value can show, and what no run could live with.
    ///
    /// # Errors
    /// A sentence that names the key.
    pub fn check(&self) -> Result<(), String> {
        self.target.mode_bits()?;
        check_address("gateway.address", &self.gateway.address)?;
        check_name(&self.gateway.name).map_err(|error| format!("gateway.name: {error}"))?;
        let limits = &self.limits;
        for (key, threads) in [
            ("limits.read_threads", limits.read_threads),
            ("limits.write_threads", limits.write_threads),
            ("limits.verify_threads", limits.verify_threads),
        ] {
            check_count(key, threads, 1..=THREADS_MAX)?;
        }
        if limits.job_memory.0 < JOB_MEMORY_MIN {
            return Err("limits.job_memory: a job cannot move within less than 4 MiB".to_owned());
        }
        if self.vm.ram_memory.0 < JOB_MEMORY_MIN {
            return Err("vm.ram_memory: a running VM cannot move within less than 4 MiB".to_owned());
        }
        let granularity = self.vm.changes_granularity.0;
        if !granularity.is_power_of_two() || !CHANGES_GRANULARITY.contains(&granularity) {
            return Err("vm.changes_granularity: a power of two from 4 KiB to 1 MiB is needed".to_owned());
        }
        if limits.flush_time.0 < FLUSH_TIME_MIN {
            return Err("limits.flush_time: disks cannot be flushed more often than every 10 ms".to_owned());
        }
        self.hooks.check()?;
        self.link.check("link")
    }
}

impl TargetSection {
    /// The mode as a number; a sentence where it is none.
    pub fn mode_bits(&self) -> Result<Option<u32>, String> {
        let Some(mode) = &self.mode else { return Ok(None) };
        match u32::from_str_radix(mode, 8) {
            Ok(bits) if bits <= 0o7777 => Ok(Some(bits)),
            _ => Err(format!(
                "target.mode: '{mode}' is no octal mode; write it like \"0640\""
            )),
        }
    }
}
