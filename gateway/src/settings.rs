//! The gateway's config file.
//!
//! Owns every key, its default and its unit; `configs/gateway.toml` shows them all. Leaves reading to `longhaul_common::settings`.

use std::net::SocketAddr;
use std::path::PathBuf;

use longhaul_common::link::check_name;
use longhaul_common::settings::sections::{IdentitySection, LinkSection, check_address, check_count};
use longhaul_common::startup::ProgramSettings;
use longhaul_common::telemetry::LogSettings;
use longhaul_common::units::ByteSize;
use serde::{Deserialize, Serialize};

/// Most threads that reduce and restore.
const WORKERS_MAX: usize = 1024;
/// Most jobs at once.
const JOBS_MAX: usize = 1000;
/// Each has memory of its own.
const TENANTS_MAX: usize = 1000;

/// The whole file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GatewaySettings {
    pub identity: IdentitySection,
    /// The journal of jobs; survives a reboot.
    pub state: PathBuf,
    pub agents: AgentsSection,
    #[serde(default)]
    pub peers: PeersSection,
    /// The gateways this one sends to, one `[[peer]]` each.
    #[serde(default)]
    pub peer: Vec<PeerSection>,
    #[serde(default)]
    pub api: ApiSection,
    #[serde(default)]
    pub limits: LimitsSection,
    #[serde(default)]
    pub reduction: ReductionSection,
    #[serde(default)]
    pub log: LogSettings,
}

/// `[agents]`: the port for this site's agents.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentsSection {
    pub listen: SocketAddr,
    #[serde(default)]
    pub link: LinkSection,
}

/// `[peers]`: the port for other sites' gateways; without `listen` this gateway only sends.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PeersSection {
    pub listen: Option<SocketAddr>,
    pub link: LinkSection,
}

/// `[[peer]]`: one gateway of another site.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerSection {
    pub site: String,
    /// The name in the peer's certificate.
    pub name: String,
    /// "host:port".
    pub address: String,
    #[serde(default)]
    pub link: LinkSection,
}

/// `[api]`: how the operator program reaches this gateway.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ApiSection {
    /// Unix socket; its folder must exist. Whoever may write to it may command the gateway.
    pub socket: PathBuf,
    /// TCP with mutual TLS for operators' certificates; none without it.
    pub listen: Option<SocketAddr>,
}

impl Default for ApiSection {
    fn default() -> Self {
        Self {
            socket: "/run/longhaul/gateway.sock".into(),
            listen: None,
        }
    }
}

/// `[limits]`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsSection {
    /// Payloads held until the peer accepted them, all jobs together.
    pub send_memory: ByteSize,
    /// Payloads and batches on their way to agents, all jobs together.
    pub receive_memory: ByteSize,
    /// Threads that reduce and restore; 0: one for each core.
    pub workers: usize,
    /// Jobs that run at once; others wait in their order.
    pub jobs: usize,
}

impl Default for LimitsSection {
    fn default() -> Self {
        Self {
            send_memory: ByteSize(64 << 20),
            receive_memory: ByteSize(48 << 20),
            workers: 0,
            jobs: 8,
        }
    }
}

/// `[reduction]`: how a batch becomes fewer bytes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReductionSection {
    /// Memory for the blocks that this gateway and a peer both remember, for each peer and direction; the newest ones.
    pub window: ByteSize,
    /// The same in a file below `state`, older ones included; zero for none.
    pub window_file: ByteSize,
    /// Who has windows of their own: a job of a tenant refers to nothing that another's sent. Each takes as much as the common ones.
    pub tenants: Vec<String>,
    /// Blocks that the peer has already are referred to.
    pub dedup: bool,
    /// Blocks that were sent before, or are like one that was, are sent as the difference.
    pub xor: bool,
    pub level: LevelSetting,
}

/// How much work is done for the rest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LevelSetting {
    /// As much as the link leaves time for.
    #[default]
    Adaptive,
    Raw,
    Lz4,
    Zstd1,
    Zstd3,
    Zstd9,
}

impl Default for ReductionSection {
    fn default() -> Self {
        Self {
            // With 112 MiB on their way, 32 MiB to find blocks in the file, and the program itself this stays below 256 MiB for one
            // peer. The file holds what a VM's disk and memory have in common, and the next VM of its template.
            window: ByteSize(48 << 20),
            window_file: ByteSize(2 << 30),
            tenants: Vec::new(),
            dedup: true,
            xor: true,
            level: LevelSetting::Adaptive,
        }
    }
}

impl ProgramSettings for GatewaySettings {
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

impl GatewaySettings {
    /// What no single value can show: a sentence where the sections do not fit together.
    pub fn check(&self) -> Result<(), String> {
        check_count("limits.workers", self.limits.workers, 0..=WORKERS_MAX)?;
        check_count("limits.jobs", self.limits.jobs, 1..=JOBS_MAX)?;
        check_count(
            "the number of reduction.tenants",
            self.reduction.tenants.len(),
            0..=TENANTS_MAX,
        )?;
        for (index, tenant) in self.reduction.tenants.iter().enumerate() {
            check_name(tenant).map_err(|error| format!("reduction.tenants[{index}]: {error}"))?;
        }
        self.agents.link.check("agents.link")?;
        self.peers.link.check("peers.link")?;
        for (index, peer) in self.peer.iter().enumerate() {
            peer.check(&format!("peer[{index}]"))?;
            if self.peer[..index].iter().any(|other| other.site == peer.site) {
                return Err(format!(
                    "two [[peer]] sections are for site '{}'; keep one",
                    peer.site
                ));
            }
        }
        Ok(())
    }
}

impl PeerSection {
    fn check(&self, key: &str) -> Result<(), String> {
        check_name(&self.site).map_err(|error| format!("{key}.site: {error}"))?;
        check_name(&self.name).map_err(|error| format!("{key}.name: {error}"))?;
        check_address(&format!("{key}.address"), &self.address)?;
        self.link.check(&format!("{key}.link"))
    }
}
