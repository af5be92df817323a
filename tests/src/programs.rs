//! How Longhaul's programs are called: their settings, command lines and printed events. The only place in
//! the lab that knows.
//!
//! Owns the text of every config file, the certificates' names, the ports, and the reading of the operator
//! program's lines. Leaves alone processes and faults. Promises that the rest of the lab needs no change when
//! a key or an option changes.
//!
//! Expected of the programs: `longhaul-agent --config F`, `longhaul-gateway --config F`, `longhaul pki
//! init|issue`, and `longhaul --api SOCKET run JOB --json`, which prints one JSON object per line and a last
//! one with `"event":"report"`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Read, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::ideas::Ideas;
use crate::lab::{End, Lab};
use crate::process::Launch;
use crate::usage::wait_until;
use crate::wan::spec::LinkSpec;

/// UDP port of the gateways towards each other, and towards their agents. With one address for both sites
/// (loopback) the target's are shifted, and with several labs on one loopback they are shifted again.
const PORT_PEER: u16 = 7401;
const PORT_AGENTS: u16 = 7402;
/// How long programs may take until they are ready.
const READY_LIMIT: Duration = Duration::from_secs(30);

/// The job's file in the lab's directory.
pub const JOB_FILE: &str = "job.toml";

/// More metrics than any gateway has.
const METRICS_MAX: u64 = 4 << 20;

/// Where the programs are.
#[derive(Clone, Debug)]
pub struct Programs {
    directory: PathBuf,
}

/// What is to be moved, and how.
#[derive(Clone, Debug)]
pub struct Job {
    pub image: PathBuf,
    pub format: String,
    pub target_format: String,
    /// Connections between the gateways, if not the default.
    pub connections: Option<u32>,
    /// Whether the target's gateway runs jobs towards the source, too.
    pub both_ways: bool,
    pub ideas: Ideas,
}

/// A line of the operator program.
#[derive(Clone, Debug)]
pub enum Line {
    /// The job's progress, 0 to 100.
    Progress(f64),
    /// The job's report: the last line.
    Report(Value),
    Other,
}

impl Programs {
    /// Those in `LONGHAUL_BIN`, or beside the lab's own program, built now if they lie in a repository.
    ///
    /// # Errors
    /// When they are missing and cannot be built.
    pub fn find() -> io::Result<Self> {
        if let Some(directory) = std::env::var_os("LONGHAUL_BIN") {
            return Ok(Self {
                directory: Path::new(&directory).canonicalize()?,
            });
        }
        let own = crate::own_program()?;
        let directory = own.parent().map(Path::to_path_buf).unwrap_or_default();
        if let Some(repository) = crate::repository() {
            build(&repository, directory.ends_with("release"))?;
        }
        Ok(Self { directory })
    }

    /// Where the program `name` is.
    pub fn program(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Makes certificates and config files in the lab's directory.
    ///
    /// # Errors
    /// When a file cannot be written or `longhaul pki` fails.
    pub fn prepare(&self, lab: &Lab, link: &LinkSpec, job: &Job) -> io::Result<()> {
        let directory = lab.directory();
        let pki = directory.join("pki");
        self.operator(&[
            "pki",
            "init",
            "--dir",
            &text(&pki),
            "--trust-domain",
            "lab.longhaul",
        ])?;
        for end in [End::Source, End::Target] {
            for role in ["gateway", "agent"] {
                let name = format!("{}-{role}", end.name());
                let words = [
                    "pki",
                    "issue",
                    "--dir",
                    &text(&pki),
                    "--role",
                    role,
                    "--site",
                    end.name(),
                    "--name",
                ];
                self.operator(&[&words[..], &[&name]].concat())?;
                for folder in ["run", "state", "disks"] {
                    fs::create_dir_all(directory.join(&name).join(folder))?;
                }
            }
            fs::write(config(directory, end, "agent"), agent_config(lab, end, link, job))?;
            fs::write(
                config(directory, end, "gateway"),
                gateway_config(lab, end, link, job),
            )?;
        }
        fs::write(directory.join(JOB_FILE), job_file(directory, job))
    }

    /// The four programs, in the order in which they are started.
    pub fn launches(&self, lab: &Lab) -> Vec<Launch> {
        let of = |end: End, role: &str| Launch {
            name: format!("{}-{role}", end.name()),
            end,
            program: self.program(&format!("longhaul-{role}")),
            arguments: vec!["--config".to_owned(), text(config(lab.directory(), end, role))],
        };
        vec![
            of(End::Target, "gateway"),
            of(End::Source, "gateway"),
            of(End::Target, "agent"),
            of(End::Source, "agent"),
        ]
    }

    /// Waits until both gateways answer and have their agents, but for those in `without`: a job that begins sooner needs another attempt.
    ///
    /// # Errors
    /// When one does not in time.
    pub fn wait_ready(&self, lab: &Lab, without: &[&str]) -> io::Result<()> {
        for end in [End::Source, End::Target] {
            let agent = format!("{}-agent", end.name());
            let expected = !without.contains(&agent.as_str());
            let ready = wait_until(READY_LIMIT, || {
                let output = self.status(lab, end).output().ok()?;
                let status: Value = serde_json::from_slice(&output.stdout).ok()?;
                let here = status["agents"].as_array()?.iter().any(|name| *name == agent);
                (here || !expected).then_some(())
            });
            if ready.is_none() {
                let name = end.name();
                let message =
                    format!("the {name} gateway does not answer on its API, or its agent is not there");
                return Err(io::Error::other(message));
            }
        }
        Ok(())
    }

    /// The operator's command that runs the job in this file of the lab's directory and prints its events.
    pub fn run_job(&self, lab: &Lab, file: &str) -> Command {
        self.run_file(lab, End::Source, file)
    }

    /// The same at the gateway of an end.
    pub fn run_file(&self, lab: &Lab, end: End, file: &str) -> Command {
        let mut command = lab.command(end, &self.program("longhaul"));
        let socket = api_socket(lab.directory(), end);
        command.args([
            "--api",
            &text(&socket),
            "run",
            &text(lab.directory().join(file)),
            "--json",
        ]);
        command
    }

    /// The operator's command that shows everything, as JSON.
    pub fn status(&self, lab: &Lab, end: End) -> Command {
        let mut command = lab.command(end, &self.program("longhaul"));
        let socket = api_socket(lab.directory(), end);
        command.args(["--api", &text(&socket), "status", "--json"]);
        command
    }

    /// Any other of the operator's commands, about the job's file.
    pub fn with_job(&self, lab: &Lab, words: &[&str]) -> Command {
        let mut command = lab.command(End::Source, &self.program("longhaul"));
        let socket = api_socket(lab.directory(), End::Source);
        command.args(["--api", &text(&socket)]).args(words);
        command.arg(lab.directory().join("job.toml"));
        command
    }

    /// The operator's command that asks what the job would do.
    pub fn plan_job(&self, lab: &Lab) -> Command {
        let mut command = lab.command(End::Source, &self.program("longhaul"));
        let (socket, job) = (
            api_socket(lab.directory(), End::Source),
            lab.directory().join("job.toml"),
        );
        command.args(["--api", &text(&socket), "plan", &text(job), "--json"]);
        command
    }

    /// The operator's command that cancels a job.
    pub fn cancel_job(&self, lab: &Lab, job: &str) -> Command {
        self.order(lab, End::Source, &["cancel", job])
    }

    /// Any command of the operator to the gateway of an end.
    pub fn order(&self, lab: &Lab, end: End, words: &[&str]) -> Command {
        let mut command = lab.command(end, &self.program("longhaul"));
        let socket = api_socket(lab.directory(), end);
        command.args(["--api", &text(&socket)]).args(words);
        command
    }

    /// What the source's gateway made of the data, by kind, in raw bytes; as `xor_payload` what the differences came to, as `rewritten`
    /// and `rewritten_payload` the part against the same places' earlier content. Nothing where it does not say.
    pub fn reduced(&self, lab: &Lab) -> BTreeMap<String, u64> {
        let text = metrics(&api_socket(lab.directory(), End::Source)).unwrap_or_default();
        text.lines().filter_map(reduced_line).collect()
    }

    fn operator(&self, words: &[&str]) -> io::Result<()> {
        let program = self.program("longhaul");
        let output = Command::new(&program).args(words).stdin(Stdio::null()).output();
        let output = output.map_err(|error| {
            io::Error::new(error.kind(), format!("cannot run {}: {error}", program.display()))
        })?;
        if output.status.success() {
            return Ok(());
        }
        let cause = String::from_utf8_lossy(&output.stderr);
        Err(io::Error::other(format!(
            "longhaul {} failed: {}",
            words.join(" "),
            cause.trim()
        )))
    }
}

/// Where the target agent puts the disk.
pub fn target_image(directory: &Path) -> PathBuf {
    directory.join("target-agent").join("disks").join("disk")
}

/// Understands one line of the operator program.
pub fn read_line(line: &str) -> Line {
    let Ok(value) = serde_json::from_str::<Value>(line) else {
        return Line::Other;
    };
    match value["event"].as_str() {
        Some("report") => Line::Report(job_report(&value["job"])),
        Some("progress") => percent(&value["progress"]).map_or(Line::Other, Line::Progress),
        _ => Line::Other,
    }
}

/// The report inside the job's record; without one (the job failed) its cause.
fn job_report(record: &Value) -> Value {
    if record["report"].is_object() {
        return record["report"].clone();
    }
    let state = record["state"].as_str().unwrap_or("without a report");
    let cause = record["message"].as_str().unwrap_or("no reason was given");
    serde_json::json!({ "ok": false, "cause": format!("the job is {state}: {cause}") })
}

/// How far a job is: data that is settled, of the data to be read.
fn percent(progress: &Value) -> Option<f64> {
    let (done, used) = (progress["done_bytes"].as_f64()?, progress["used_bytes"].as_f64()?);
    (used > 0.0).then(|| (done * 100.0 / used).min(100.0))
}

fn build(repository: &Path, release: bool) -> io::Result<()> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args([
        "build",
        "--quiet",
        "-p",
        "longhaul-agent",
        "-p",
        "longhaul-gateway",
        "--bins",
    ]);
    if release {
        command.arg("--release");
    }
    // Standard output belongs to the report.
    let status = command
        .current_dir(repository)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()?;
    status
        .success()
        .then_some(())
        .ok_or_else(|| io::Error::other("Longhaul's programs cannot be built"))
}

fn config(directory: &Path, end: End, role: &str) -> PathBuf {
    directory.join(format!("{}-{role}.toml", end.name()))
}

fn api_socket(directory: &Path, end: End) -> PathBuf {
    directory
        .join(format!("{}-gateway", end.name()))
        .join("run")
        .join("api.sock")
}

/// Ports of a site's gateway: (towards the peer, towards its agents).
fn ports(lab: &Lab, end: End) -> (u16, u16) {
    if !lab.address(End::Source).is_loopback() {
        return (PORT_PEER, PORT_AGENTS);
    }
    let shift = 4 * (std::process::id() % 5000) as u16 + if end == End::Target { 2 } else { 0 };
    (20_000 + shift, 20_001 + shift)
}

/// The certificate of the program `name`, which is made of its site and its role.
fn identity(directory: &Path, name: &str) -> String {
    let pki = directory.join("pki");
    let (site, role) = name.split_once('-').unwrap_or((name, ""));
    let issued = |end: &str| text(pki.join("issued").join(format!("{name}.{role}.{site}.{end}")));
    let shared = |name: &str| text(pki.join(name));
    format!(
        "[identity]\ncertificate = \"{}\"\nkey = \"{}\"\nca = \"{}\"\ncrl = \"{}\"\n",
        issued("pem"),
        issued("key"),
        shared("ca.pem"),
        shared("crl.pem"),
    )
}

fn agent_config(lab: &Lab, end: End, link: &LinkSpec, job: &Job) -> String {
    let name = format!("{}-agent", end.name());
    let home = lab.directory().join(&name);
    let read = match end {
        End::Source => job.image.parent().map(text).unwrap_or_default(),
        End::Target => text(home.join("disks")),
    };
    let mut config = identity(lab.directory(), &name);
    let _ = write!(
        config,
        "[gateway]\naddress = \"{}:{}\"\nname = \"{}-gateway\"\n\
         [link]\n{}[paths]\nread = [\"{read}\"]\nwrite = [\"{}\"]\nrun = \"{}\"\nstate = \"{}\"\n",
        lab.address(end),
        ports(lab, end).1,
        end.name(),
        jumbo(link),
        text(home.join("disks")),
        text(home.join("run")),
        text(home.join("state")),
    );
    config
}

/// The number of the job that the operator's program ran, from the first of its lines that says one.
///
/// # Errors
/// When none does.
pub fn job_number(said: &str) -> io::Result<String> {
    let mut values = said
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let number = values.find_map(|value| value["job"].as_str().map(str::to_owned));
    number.ok_or_else(|| io::Error::other("the job has no number"))
}

/// What a link within a site is told of its packets.
fn jumbo(link: &LinkSpec) -> &'static str {
    if link.jumbo_lan { "jumbo = true\n" } else { "" }
}

/// The link between the sites as a gateway is told of it, under `section`.
fn link_section(section: &str, rate: u64, link: &LinkSpec, job: &Job, emulated: bool) -> String {
    let rtt = if emulated {
        link.rtt.0.as_millis().max(1)
    } else {
        1
    };
    let mut text = format!("[{section}]\nrtt = \"{rtt} ms\"\n");
    if rate > 0 {
        let _ = writeln!(text, "rate = \"{rate} bit/s\"");
    }
    if let Some(connections) = job.connections {
        let _ = writeln!(text, "connections = {connections}");
    }
    text + &job.ideas.link()
}

fn gateway_config(lab: &Lab, end: End, link: &LinkSpec, job: &Job) -> String {
    let name = format!("{}-gateway", end.name());
    let home = lab.directory().join(&name);
    let (address, (peer, agents)) = (lab.address(end), ports(lab, end));
    let (forth, back) = link.shapes();
    // Keys without a section come first in TOML.
    let mut config = format!("state = \"{}\"\n", text(home.join("state")));
    config += &identity(lab.directory(), &name);
    let _ = write!(
        config,
        "[agents]\nlisten = \"{address}:{agents}\"\n[agents.link]\n{}[api]\nsocket = \"{}\"\n[peers]\nlisten = \"{address}:{peer}\"\n",
        jumbo(link),
        text(api_socket(lab.directory(), end)),
    );
    let emulated = !lab.address(end).is_loopback();
    let rate = if !emulated {
        0
    } else if end == End::Source {
        forth.rate_bit_per_s
    } else {
        back.rate_bit_per_s
    };
    config += &link_section("peers.link", rate, link, job, emulated);
    let peer = match end {
        End::Source => Some(End::Target),
        End::Target => job.both_ways.then_some(End::Source),
    };
    if let Some(peer) = peer {
        let (other, port, site) = (lab.address(peer), ports(lab, peer).0, peer.name());
        let _ = write!(
            config,
            "[[peer]]\nsite = \"{site}\"\nname = \"{site}-gateway\"\naddress = \"{other}:{port}\"\n"
        );
        config += &link_section("peer.link", rate, link, job, emulated);
    }
    config + &job.ideas.reduction()
}

fn job_file(directory: &Path, job: &Job) -> String {
    format!(
        "kind = \"move\"\nname = \"lab\"\n{}[source]\nagent = \"source-agent\"\n\
         [target]\nsite = \"target\"\nagent = \"target-agent\"\n\
         [[disk]]\nsource = \"{}\"\nformat = \"{}\"\ntarget = \"{}\"\ntarget_format = \"{}\"\n",
        job.ideas.job(),
        text(&job.image),
        job.format,
        text(target_image(directory)),
        job.target_format,
    )
}

/// The metrics as a gateway gives them over its API.
fn metrics(socket: &Path) -> io::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.take(METRICS_MAX).read_to_string(&mut text)?;
    Ok(text)
}

/// Kind and bytes of a line about reduced data.
fn reduced_line(line: &str) -> Option<(String, u64)> {
    for name in ["xor_payload", "rewritten", "rewritten_payload"] {
        if let Some(bytes) = line.strip_prefix(&format!("longhaul_{name}_bytes_total ")) {
            return Some((name.to_owned(), bytes.trim().parse().ok()?));
        }
    }
    let rest = line.strip_prefix("longhaul_reduced_bytes_total{kind=\"")?;
    let (kind, bytes) = rest.split_once("\"} ")?;
    Some((kind.to_owned(), bytes.trim().parse().ok()?))
}

/// A path inside a TOML string or on a command line; the lab refuses images whose names need quoting.
fn text(path: impl AsRef<Path>) -> String {
    path.as_ref().display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_jobs_number_is_in_its_first_line_that_has_one() {
        let said = "a warning\n{\"event\":\"job\",\"job\":\"0a1b\"}\n{\"job\":\"other\"}\n";
        assert_eq!(job_number(said).unwrap(), "0a1b");
        assert!(job_number("nothing\n").is_err());
    }

    #[test]
    fn what_became_of_the_data_is_read_from_the_metrics() {
        let line = "longhaul_reduced_bytes_total{kind=\"xor\"} 4096";
        assert_eq!(reduced_line(line), Some(("xor".to_owned(), 4096)));
        let line = "longhaul_xor_payload_bytes_total 77";
        assert_eq!(reduced_line(line), Some(("xor_payload".to_owned(), 77)));
        let line = "longhaul_rewritten_payload_bytes_total 5";
        assert_eq!(reduced_line(line), Some(("rewritten_payload".to_owned(), 5)));
        for line in [
            "",
            "# TYPE longhaul_reduced_bytes_total counter",
            "longhaul_jobs 3",
        ] {
            assert_eq!(reduced_line(line), None, "{line}");
        }
    }

    #[test]
    fn the_operators_lines_are_understood_and_others_ignored() {
        let progress = r#"{"event":"progress","progress":{"done_bytes":25,"used_bytes":200}}"#;
        assert!(matches!(read_line(progress), Line::Progress(p) if p == 12.5));
        let report = r#"{"event":"report","job":{"state":"completed","report":{"ok":true}}}"#;
        assert!(matches!(read_line(report), Line::Report(value) if value["ok"] == true));
        let failed = r#"{"event":"report","job":{"state":"failed","message":"no space"}}"#;
        let Line::Report(value) = read_line(failed) else {
            panic!("a report")
        };
        assert!(value["ok"] == false && value["cause"].as_str().unwrap().contains("no space"));
        let nothing_yet = r#"{"event":"progress","progress":{"done_bytes":0,"used_bytes":0}}"#;
        for line in [
            "",
            "not json",
            "{}",
            r#"{"event":"progress"}"#,
            r#"{"event":7}"#,
            nothing_yet,
        ] {
            assert!(matches!(read_line(line), Line::Other), "{line}");
        }
    }
}
