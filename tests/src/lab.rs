//! One lab: a directory, two sites, the link between them, and the promise that all of it goes away.
//!
//! Owns the order of making and removing. Leaves alone which programs run in it. Promises that a machine
//! without the rights to make namespaces or TUN devices gets a lab over loopback that names what it does not
//! emulate.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::janitor::Janitor;
use crate::namespace::{self, Sites};
use crate::wan::link::Link;
use crate::wan::spec::LinkSpec;

/// Directories of labs begin with this, followed by process and number.
const DIRECTORY_PREFIX: &str = "longhaul-lab-";
/// A file that keeps a lab's directory from being removed as stale.
const KEEP_MARK: &str = ".keep";

/// A unix socket's path has at most 107 bytes, and `/source-gateway/run/api.sock` follows.
const DIRECTORY_BYTES_MAX: usize = 75;

/// Largest buffer of a TCP connection: four times the bandwidth-delay product of 100 Mbit/s and 300 ms.
const TCP_BUFFER: u32 = 16 << 20;
/// Of the network namespace that reads it.
const TCP_CONTROL: &str = "/proc/sys/net/ipv4/tcp_congestion_control";

/// Which site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    Source,
    Target,
}

impl End {
    /// Its name in file names, certificates and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Target => "target",
        }
    }
}

/// A running lab. The order of the fields is the order in which they end: the link, then (by the janitor)
/// programs, namespaces and directory.
#[derive(Debug)]
pub struct Lab {
    link: Option<Link>,
    janitor: Janitor,
    sites: Option<Sites>,
    directory: PathBuf,
    not_emulated: Vec<String>,
}

impl Lab {
    /// Makes a lab under `parent`, after removing what dead labs left there.
    ///
    /// # Errors
    /// When the directory cannot be made, or the link fails although this machine has the rights for it.
    pub fn start(spec: &LinkSpec, parent: &Path, keep: bool) -> io::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        namespace::remove_stale();
        remove_stale_directories(parent);
        let mut janitor = Janitor::start()?;
        let name = format!(
            "{DIRECTORY_PREFIX}{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let named = |error: io::Error| {
            let problem = format!(
                "the lab cannot work in {}: {error}; name a folder that is there",
                parent.display()
            );
            io::Error::new(error.kind(), problem)
        };
        let directory = parent.canonicalize().map_err(named)?.join(name);
        if directory.as_os_str().len() > DIRECTORY_BYTES_MAX {
            let problem = format!(
                "{}: too long for the sockets in it; choose another",
                directory.display()
            );
            return Err(io::Error::other(problem));
        }
        janitor.directory(&directory)?;
        fs::create_dir(&directory)?;
        if keep {
            janitor.keep()?;
            fs::write(directory.join(KEEP_MARK), "")?;
        }
        let mut lab = Self {
            link: None,
            janitor,
            sites: None,
            directory,
            not_emulated: Vec::new(),
        };
        let asked = spec.loopback.then(|| "--loopback was asked for".to_owned());
        match asked.or_else(namespace::missing_rights) {
            None => lab.join_sites(spec)?,
            Some(cause) => lab.not_emulated = not_emulated(spec, &cause),
        }
        Ok(lab)
    }

    fn join_sites(&mut self, spec: &LinkSpec) -> io::Result<()> {
        let sites = Sites::create()?;
        self.janitor.namespace(&sites.source.namespace)?;
        self.janitor.namespace(&sites.target.namespace)?;
        if spec.veth {
            sites.join()?;
        } else {
            self.link = Some(Link::start(spec, &sites.source, &sites.target)?);
        }
        self.sites = Some(sites);
        Ok(())
    }

    /// Where the lab's files are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The emulated link, if there is one.
    pub fn link(&mut self) -> Option<&mut Link> {
        self.link.as_mut()
    }

    /// Bytes that came through so far, towards the target and back; nothing over loopback.
    ///
    /// # Errors
    /// When the emulator or the kernel does not say.
    pub fn delivered(&mut self) -> io::Result<Option<(u64, u64)>> {
        if let Some(link) = &mut self.link {
            let stats = link.stats()?;
            return Ok(Some((stats.forth.delivered_bytes, stats.back.delivered_bytes)));
        }
        self.sites.as_ref().map(Sites::carried).transpose()
    }

    /// Takes the link out, to end it and read its last count.
    pub fn take_link(&mut self) -> Option<Link> {
        self.link.take()
    }

    /// What was asked for and is not emulated on this machine; empty when everything is.
    pub fn not_emulated(&self) -> &[String] {
        &self.not_emulated
    }

    /// The address of a site's gateway on the link; without a link, both are this machine.
    pub fn address(&self, end: End) -> std::net::Ipv4Addr {
        self.site(end)
            .map_or(std::net::Ipv4Addr::LOCALHOST, |site| site.address)
    }

    fn site(&self, end: End) -> Option<&namespace::Site> {
        let sites = self.sites.as_ref()?;
        Some(match end {
            End::Source => &sites.source,
            End::Target => &sites.target,
        })
    }

    /// A command that runs at a site.
    pub fn command(&self, end: End, program: &Path) -> Command {
        namespace::command(self.site(end).map(|site| site.namespace.as_str()), program)
    }

    /// Runs `work` at a site: sockets that it opens stay there.
    ///
    /// # Errors
    /// When the site's namespace is gone.
    pub fn inside<T: Send>(&self, end: End, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        match self.site(end) {
            Some(site) => namespace::inside(&site.namespace, work),
            None => Ok(work()),
        }
    }

    /// Gives TCP at both sites what serves it best on a long link: BBR where the kernel has it, and buffers of
    /// [`TCP_BUFFER`] bytes. For rivals; Longhaul uses no TCP there. Gives the congestion control in force.
    ///
    /// # Errors
    /// When the system's settings cannot be read.
    pub fn favour_tcp(&self) -> io::Result<String> {
        if let Some(sites) = &self.sites {
            for site in [&sites.source, &sites.target] {
                namespace::inside(&site.namespace, set_tcp)?;
            }
            return namespace::inside(&sites.source.namespace, || fs::read_to_string(TCP_CONTROL))?
                .map(|name| name.trim().to_owned());
        }
        Ok(fs::read_to_string(TCP_CONTROL)?.trim().to_owned())
    }

    /// Has the janitor end this process (the leader of its group) with the lab.
    ///
    /// # Errors
    /// When the janitor is gone.
    pub fn adopt(&mut self, pid: u32) -> io::Result<()> {
        self.janitor.process(pid)
    }
}

/// What a kernel lacks or forbids stays as it is: a rival then has what everybody has on this machine.
fn set_tcp() {
    let _ = fs::write(TCP_CONTROL, "bbr");
    for name in ["rmem", "wmem"] {
        let _ = fs::write(
            format!("/proc/sys/net/ipv4/tcp_{name}"),
            format!("4096 131072 {TCP_BUFFER}"),
        );
    }
}

fn not_emulated(spec: &LinkSpec, cause: &str) -> Vec<String> {
    let (forth, back) = spec.shapes();
    let mut missing = vec![
        format!("no emulated link: {cause}; everything runs over loopback"),
        format!(
            "rate of {} and {} bit/s",
            forth.rate_bit_per_s, back.rate_bit_per_s
        ),
        format!("round-trip time of {} ms", spec.rtt.0.as_millis()),
        format!("queue of {} bytes, MTU of {} bytes", forth.queue_bytes, spec.mtu),
    ];
    if forth.loss > 0.0 {
        missing.push(format!("loss of {} %", forth.loss * 100.0));
    }
    if !forth.jitter.is_zero() {
        missing.push(format!("jitter of {} ms", forth.jitter.as_millis()));
    }
    missing
}

/// Removes directories of labs whose process is dead, unless they were asked to be kept.
fn remove_stale_directories(parent: &Path) {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    for entry in entries {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name
            .strip_prefix(DIRECTORY_PREFIX)
            .and_then(|rest| rest.split('-').next()?.parse().ok());
        if owner.is_some_and(|pid| !namespace::is_alive(pid)) && !entry.path().join(KEEP_MARK).exists() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
