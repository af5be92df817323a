//! Two sites on one loopback address of their own: certificates, configs, and the real programs.
//!
//! Owns starting and ending the programs, and what they have said. Leaves every mistake to the tests. Promises that each test has
//! its own address (127.x.y.z), so that all run at once, and that every wait ends.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use longhaul_common::link::{Credentials, Identity, Role, TlsState};
use longhaul_lab::programs::Programs;

/// What no single step may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
pub(crate) const DOMAIN: &str = "bad.longhaul";
/// Ports of each site's gateway: for peers, for agents.
const PEERS: [u16; 2] = [7401, 7403];
const AGENTS: [u16; 2] = [7402, 7404];

pub(crate) const SOURCE: &str = "source";
pub(crate) const TARGET: &str = "target";

static SITES: AtomicU32 = AtomicU32::new(0);

fn programs() -> &'static Programs {
    static PROGRAMS: OnceLock<Programs> = OnceLock::new();
    PROGRAMS.get_or_init(|| Programs::find().expect("the programs can be built"))
}

/// Waits for `found`.
pub(crate) fn wait<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(Instant::now() < end, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(25));
    }
}

/// Both sites' folder, address and certificates.
pub(crate) struct Sites {
    folder: tempfile::TempDir,
    pub(crate) address: String,
}

impl Sites {
    /// With certificates for the usual four programs, and for `more`: (site, role, name).
    pub(crate) fn new(more: &[(&str, Role, &str)]) -> Self {
        let number = SITES.fetch_add(1, Ordering::Relaxed);
        let process = std::process::id();
        let address = format!(
            "127.{}.{}.{}",
            2 + (process >> 8) % 250,
            process % 256,
            1 + number % 250
        );
        let folder = tempfile::tempdir().unwrap();
        let sites = Self { folder, address };
        sites.pki(&["init", "--trust-domain", DOMAIN]);
        for site in [SOURCE, TARGET] {
            for role in [Role::Gateway, Role::Agent] {
                let name = format!("{site}-{}", role.as_str());
                sites.issue(site, role, &name);
                for folder in ["run", "state", "disks"] {
                    fs::create_dir_all(sites.path(&format!("{name}/{folder}"))).unwrap();
                }
            }
        }
        for (site, role, name) in more {
            sites.issue(site, *role, name);
        }
        sites
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, text).unwrap();
        path
    }

    /// Runs `longhaul pki`.
    pub(crate) fn pki(&self, words: &[&str]) {
        let dir = self.path("pki").display().to_string();
        let output = self.finish(self.command("longhaul", &[&["pki"], words, &["--dir", &dir]].concat()));
        assert!(output.status.success(), "pki {words:?}: {}", said(&output));
    }

    pub(crate) fn issue(&self, site: &str, role: Role, name: &str) {
        self.pki(&["issue", "--site", site, "--role", role.as_str(), "--name", name]);
    }

    /// Where the certificate (`pem`) or key of a program is.
    pub(crate) fn issued(&self, site: &str, role: Role, name: &str, end: &str) -> PathBuf {
        self.path(&format!("pki/issued/{name}.{}.{site}.{end}", role.as_str()))
    }

    pub(crate) fn credentials(&self, site: &str, role: Role, name: &str) -> Credentials {
        Credentials {
            cert: self.issued(site, role, name, "pem"),
            key: self.issued(site, role, name, "key"),
            ca: self.path("pki/ca.pem"),
            crl: Some(self.path("pki/crl.pem")),
        }
    }

    /// The test itself as a program of this trust domain.
    pub(crate) fn tls(&self, site: &str, role: Role, name: &str) -> std::sync::Arc<TlsState> {
        TlsState::load(self.credentials(site, role, name), Some(role)).unwrap()
    }

    pub(crate) fn identity(&self, site: &str, role: Role, name: &str) -> Identity {
        Identity::new(DOMAIN, site, role, name).unwrap()
    }

    /// `address:port` of a site's gateway, for peers or agents.
    pub(crate) fn peers_port(&self, site: &str) -> String {
        format!("{}:{}", self.address, PEERS[usize::from(site == TARGET)])
    }

    pub(crate) fn agents_port(&self, site: &str) -> String {
        format!("{}:{}", self.address, AGENTS[usize::from(site == TARGET)])
    }

    pub(crate) fn api(&self, site: &str) -> PathBuf {
        self.path(&format!("{site}-gateway/run/api.sock"))
    }

    /// The certificate section of `name`'s config.
    pub(crate) fn identity_section(&self, site: &str, role: Role, name: &str) -> String {
        let Credentials { cert, key, ca, crl } = self.credentials(site, role, name);
        let crl = crl.unwrap_or_default();
        format!("[identity]\ncertificate = {cert:?}\nkey = {key:?}\nca = {ca:?}\ncrl = {crl:?}\n")
    }

    pub(crate) fn gateway_config(&self, site: &str) -> String {
        let name = format!("{site}-gateway");
        let mut text = format!("state = {:?}\n", self.path(&format!("{name}/state")));
        text += &self.identity_section(site, Role::Gateway, &name);
        text += &format!(
            "[agents]\nlisten = \"{}\"\n[api]\nsocket = {:?}\n[peers]\nlisten = \"{}\"\n",
            self.agents_port(site),
            self.api(site),
            self.peers_port(site),
        );
        if site == SOURCE {
            text += &format!(
                "[[peer]]\nsite = \"target\"\nname = \"target-gateway\"\naddress = \"{}\"\n\
                 [peer.link]\nrate = \"60 Mbit/s\"\nrtt = \"40 ms\"\nconnections = 2\n",
                self.peers_port(TARGET),
            );
        }
        text
    }

    pub(crate) fn agent_config(&self, site: &str) -> String {
        let name = format!("{site}-agent");
        let home = self.path(&name);
        let disks = home.join("disks");
        let mut text = self.identity_section(site, Role::Agent, &name);
        text += &format!(
            "[gateway]\naddress = \"{}\"\nname = \"{site}-gateway\"\n\
             [paths]\nread = [{disks:?}]\nwrite = [{disks:?}]\nrun = {:?}\nstate = {:?}\n",
            self.agents_port(site),
            home.join("run"),
            home.join("state"),
        );
        text
    }

    pub(crate) fn config(&self, site: &str, role: Role) -> String {
        match role {
            Role::Gateway => self.gateway_config(site),
            _ => self.agent_config(site),
        }
    }

    /// A job that moves `image` (in the source agent's folder) to `copy` in the target agent's.
    pub(crate) fn job(&self, image: &str, copy: &str) -> String {
        format!(
            "kind = \"move\"\nname = \"bad\"\n[source]\nagent = \"source-agent\"\n\
             [target]\nsite = \"target\"\nagent = \"target-agent\"\n[[disk]]\nsource = {:?}\nformat = \"raw\"\ntarget = {:?}\n",
            self.path(&format!("source-agent/disks/{image}")),
            self.path(&format!("target-agent/disks/{copy}")),
        )
    }

    pub(crate) fn command(&self, program: &str, words: &[&str]) -> Command {
        let mut command = Command::new(programs().program(program));
        command.args(words).env_remove("LONGHAUL_API");
        command
    }

    /// Runs a command to its end, which must come in time.
    pub(crate) fn finish(&self, mut command: Command) -> Output {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stdout = gather(child.stdout.take().unwrap());
        let stderr = gather(child.stderr.take().unwrap());
        let end = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > end {
                let _ = child.kill();
                panic!("{command:?} hangs");
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        Output {
            status,
            stdout: stdout.join().unwrap(),
            stderr: stderr.join().unwrap(),
        }
    }
}

fn gather(mut from: impl std::io::Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.read_to_end(&mut bytes);
        bytes
    })
}

/// What a program wrote to standard error.
pub(crate) fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A running program; killed when dropped.
pub(crate) struct Program {
    pub(crate) name: String,
    child: Child,
    log: PathBuf,
}

impl Program {
    /// Starts a gateway or agent with the config file `config`, as `name`.
    pub(crate) fn start(sites: &Sites, role: Role, name: &str, config: &Path) -> Self {
        let log = sites.path(&format!("{name}.log"));
        let file = File::create(&log).unwrap();
        let mut command = sites.command(
            &format!("longhaul-{}", role.as_str()),
            &["--config", &config.display().to_string()],
        );
        command
            .stdin(Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file);
        let child = command.spawn().unwrap();
        Self {
            name: name.to_owned(),
            child,
            log,
        }
    }

    /// Starts a site's gateway or agent with its usual config.
    pub(crate) fn usual(sites: &Sites, site: &str, role: Role) -> Self {
        let name = format!("{site}-{}", role.as_str());
        let config = sites.write(&format!("{name}.toml"), &sites.config(site, role));
        Self::start(sites, role, &name, &config)
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until a line of the log holds all `words`, and gives it.
    pub(crate) fn wait_for(&self, words: &[&str]) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            let log = self.log();
            let found = log
                .lines()
                .find(|line| words.iter().all(|word| line.contains(word)));
            if let Some(line) = found {
                return line.to_owned();
            }
            assert!(
                Instant::now() < end,
                "{} never said {words:?}; it said:\n{log}",
                self.name
            );
            std::thread::sleep(Duration::from_millis(25));
        }
    }

    /// Resident memory, in KiB.
    pub(crate) fn resident_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let line = status
            .lines()
            .find(|line| line.starts_with("VmRSS:"))
            .unwrap_or("VmRSS: 0 kB");
        line.split_whitespace()
            .nth(1)
            .and_then(|number| number.parse().ok())
            .unwrap_or(0)
    }

    /// That it runs, and never panicked.
    pub(crate) fn assert_well(&mut self) {
        let log = self.log();
        assert!(!log.contains("panicked"), "{} panicked:\n{log}", self.name);
        let ended = self.child.try_wait().unwrap();
        assert!(ended.is_none(), "{} ended ({ended:?}):\n{log}", self.name);
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("---- {}:\n{}", self.name, self.log());
        }
    }
}

/// All four programs, linked.
pub(crate) struct Running {
    // Dropped first: their logs lie in the sites' folder.
    pub(crate) programs: Vec<Program>,
    pub(crate) sites: Sites,
}

impl Running {
    pub(crate) fn start(sites: Sites) -> Self {
        let mut programs = Vec::new();
        for role in [Role::Gateway, Role::Agent] {
            for site in [TARGET, SOURCE] {
                programs.push(Program::usual(&sites, site, role));
            }
        }
        let running = Self { sites, programs };
        running
            .program("source-gateway")
            .wait_for(&["linked to the peer"]);
        for site in [SOURCE, TARGET] {
            running
                .program(&format!("{site}-gateway"))
                .wait_for(&["agent linked"]);
        }
        running
    }

    pub(crate) fn program(&self, name: &str) -> &Program {
        self.programs.iter().find(|program| program.name == name).unwrap()
    }

    /// The operator's command on the source gateway.
    pub(crate) fn longhaul(&self, words: &[&str]) -> Command {
        let api = self.sites.api(SOURCE).display().to_string();
        self.sites
            .command("longhaul", &[&["--api", &api], words].concat())
    }

    /// Runs a job to its end: exit code, and the last line's job.
    pub(crate) fn run(&self, job: &str) -> (i32, serde_json::Value, String) {
        static JOBS: AtomicU32 = AtomicU32::new(0);
        let name = format!("job-{}.toml", JOBS.fetch_add(1, Ordering::Relaxed));
        let file = self.sites.write(&name, job).display().to_string();
        let output = self.sites.finish(self.longhaul(&["run", &file, "--json"]));
        let stdout = String::from_utf8_lossy(&output.stdout);
        let last = stdout.lines().last().unwrap_or("null");
        let last: serde_json::Value = serde_json::from_str(last).unwrap_or_default();
        (
            output.status.code().unwrap_or(-1),
            last["job"].clone(),
            said(&output),
        )
    }

    pub(crate) fn assert_well(&mut self) {
        for program in &mut self.programs {
            program.assert_well();
        }
    }
}
