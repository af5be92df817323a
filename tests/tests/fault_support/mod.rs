//! Two sites with real programs, for stories in which something goes wrong.
//!
//! Owns starting them, jobs through the operator's program, looking at them through the API, killing, cutting, and the
//! checks that hold at every end: equal disks, nothing left over. At most two worlds run at once, however many tests do.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Condvar, Mutex, OnceLock};
use std::time::{Duration, Instant};

use clap::Parser;
use longhaul_lab::compare;
use longhaul_lab::ideas::Ideas;
use longhaul_lab::lab::Lab;
use longhaul_lab::process::Process;
use longhaul_lab::programs::{Job, Programs};
use longhaul_lab::wan::spec::LinkSpec;
use serde_json::Value;

pub(crate) mod images;

/// `limits.job_memory` and `limits.flush_bytes` of the target agents here: small, so that "in flight" is small beside the images.
pub(crate) const JOB_MEMORY: u64 = 8 << 20;
pub(crate) const FLUSH_BYTES: u64 = 2 << 20;
/// Most that one fault can cost: what credit allows, and what is written but not flushed (one flush under way, one due).
pub(crate) const IN_FLIGHT_MAX: u64 = JOB_MEMORY + 2 * FLUSH_BYTES;

const PATIENCE: Duration = Duration::from_secs(100);

/// One of the two places for worlds that run at once.
struct Place;
static PLACES: (Mutex<u32>, Condvar) = (Mutex::new(2), Condvar::new());

impl Place {
    fn take() -> Self {
        let mut free = PLACES.0.lock().unwrap_or_else(|e| e.into_inner());
        while *free == 0 {
            free = PLACES.1.wait(free).unwrap_or_else(|e| e.into_inner());
        }
        *free -= 1;
        Self
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        *PLACES.0.lock().unwrap_or_else(|e| e.into_inner()) += 1;
        PLACES.1.notify_one();
    }
}

fn programs() -> Programs {
    static FOUND: OnceLock<Programs> = OnceLock::new();
    FOUND
        .get_or_init(|| Programs::find().expect("Longhaul's programs"))
        .clone()
}

#[derive(Parser)]
struct LinkWords {
    #[command(flatten)]
    link: LinkSpec,
}

/// How a world is made.
pub(crate) struct Setup {
    pub(crate) rate: &'static str,
    pub(crate) rtt: &'static str,
    /// Added to the target agent's config.
    pub(crate) target_agent: String,
    /// Programs that are not started.
    pub(crate) without: Vec<&'static str>,
    /// The target's disks lie on a file system of this size.
    pub(crate) disks_size: Option<&'static str>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            rate: "100mbit",
            rtt: "20ms",
            target_agent: String::new(),
            without: Vec::new(),
            disks_size: None,
        }
    }
}

/// A small file system over the target's folder, for as long as this lives.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// Two sites. The fields end in this order.
pub(crate) struct World {
    pub(crate) running: Vec<Process>,
    _mounted: Option<Mounted>,
    pub(crate) lab: Lab,
    /// Where the source images lie.
    pub(crate) images: tempfile::TempDir,
    programs: Programs,
    /// What was done, for a failure's message.
    said: Vec<String>,
    _place: Place,
}

impl World {
    pub(crate) fn new(setup: &Setup) -> Self {
        let place = Place::take();
        let programs = programs();
        let rates = [format!("--rate={}", setup.rate), format!("--rtt={}", setup.rtt)];
        let link = LinkWords::parse_from([&["link".to_owned()], &rates[..]].concat()).link;
        let images = tempfile::tempdir().unwrap();
        let mut lab = Lab::start(&link, &std::env::temp_dir(), false).unwrap();
        let job = Job {
            image: images.path().canonicalize().unwrap().join("disk"),
            format: "raw".to_owned(),
            target_format: "raw".to_owned(),
            connections: None,
            both_ways: false,
            ideas: Ideas::default(),
        };
        programs.prepare(&lab, &link, &job).unwrap();
        let config = lab.directory().join("target-agent.toml");
        let limits =
            format!("[limits]\njob_memory = \"{JOB_MEMORY} B\"\nflush_bytes = \"{FLUSH_BYTES} B\"\n");
        let text = fs::read_to_string(&config).unwrap() + &limits + &setup.target_agent;
        fs::write(config, text).unwrap();
        // Before the programs: each sees the mounts of its start.
        let mounted = setup.disks_size.map(|size| {
            let disks = lab.directory().join("target-agent/disks");
            let options = format!("size={size}");
            let words = ["-t", "tmpfs", "-o", &options, "tmpfs", disks.to_str().unwrap()];
            images::run("mount", &words);
            Mounted(disks)
        });
        let mut running = Vec::new();
        for launch in programs.launches(&lab) {
            if !setup.without.contains(&launch.name.as_str()) {
                running.push(Process::start(&mut lab, launch).unwrap());
            }
        }
        programs.wait_ready(&lab, &setup.without).unwrap();
        Self {
            running,
            _mounted: mounted,
            lab,
            images,
            programs,
            said: Vec::new(),
            _place: place,
        }
    }

    /// Starts a program that was left out.
    pub(crate) fn start(&mut self, name: &str) {
        let launches = self.programs.launches(&self.lab);
        let launch = launches.into_iter().find(|launch| launch.name == name).unwrap();
        self.running.push(Process::start(&mut self.lab, launch).unwrap());
    }

    pub(crate) fn say(&mut self, what: String) {
        self.said.push(what);
    }

    pub(crate) fn disks(&self) -> PathBuf {
        self.lab.directory().join("target-agent/disks")
    }

    fn socket(&self) -> PathBuf {
        self.lab.directory().join("source-gateway/run/api.sock")
    }

    /// Runs the operator's program; gives its exit code, output and errors.
    pub(crate) fn operator(&self, words: &[&str]) -> (i32, String, String) {
        let own = longhaul_lab::own_program().unwrap();
        let folder =
            std::env::var_os("LONGHAUL_BIN").map_or_else(|| own.parent().unwrap().into(), PathBuf::from);
        let mut command = Command::new(folder.join("longhaul"));
        command
            .arg("--api")
            .arg(self.socket())
            .args(words)
            .stdin(Stdio::null());
        let output = command.output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        let code = output.status.code().unwrap_or(-1);
        (code, text(output.stdout), text(output.stderr))
    }

    /// A job file for `disks` of (source name, target name, target format), with more keys at its top and in `[target]`.
    pub(crate) fn job_text(
        &self,
        name: &str,
        top: &str,
        target: &str,
        disks: &[(&str, &str, &str)],
    ) -> String {
        let images = self.images.path().canonicalize().unwrap();
        let mut text = format!(
            "kind = \"move\"\nname = \"{name}\"\n{top}[source]\nagent = \"source-agent\"\n\
             [target]\nsite = \"target\"\nagent = \"target-agent\"\n{target}"
        );
        for (source, disk, format) in disks {
            text += &format!(
                "[[disk]]\nsource = \"{}\"\ntarget = \"{}\"\ntarget_format = \"{format}\"\n",
                images.join(source).display(),
                self.disks().join(disk).display()
            );
        }
        text
    }

    /// Hands a job in and does not wait for it; gives its number.
    pub(crate) fn submit_text(&mut self, name: &str, text: &str) -> String {
        let file = self.lab.directory().join(format!("{name}.toml"));
        fs::write(&file, text).unwrap();
        let (code, out, errors) = self.operator(&["run", file.to_str().unwrap(), "--detach"]);
        assert_eq!(code, 0, "{errors}");
        out.trim().to_owned()
    }

    /// A job of one raw disk.
    pub(crate) fn submit(&mut self, name: &str, source: &str, disk: &str) -> String {
        let text = self.job_text(name, "", "", &[(source, disk, "raw")]);
        self.submit_text(name, &text)
    }

    /// The job's record as the API has it; `None` while the gateway is away.
    pub(crate) fn record(&self, job: &str) -> Option<Value> {
        let mut stream = UnixStream::connect(self.socket()).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
        let ask = format!("GET /v1/jobs/{job} HTTP/1.1\r\nhost: gateway\r\nconnection: close\r\n\r\n");
        stream.write_all(ask.as_bytes()).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let (_, body) = answer.split_once("\r\n\r\n")?;
        serde_json::from_str(body).ok()
    }

    /// Looks again and again until `found` gives something. Restarts what was killed meanwhile.
    pub(crate) fn until<T>(&mut self, what: &str, mut found: impl FnMut(&mut Self) -> Option<T>) -> T {
        let began = Instant::now();
        loop {
            if let Some(value) = found(self) {
                return value;
            }
            let Self { running, lab, .. } = self;
            for process in running.iter_mut() {
                process.tend(lab, Instant::now()).unwrap();
            }
            if began.elapsed() > PATIENCE {
                panic!("waited in vain for: {what}\n{}", self.story());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until the job is in this state; gives its record.
    pub(crate) fn until_state(&mut self, job: &str, state: &str) -> Value {
        let record = self.until(&format!("job {state}"), |world| {
            let record = world.record(job)?;
            let now = record["state"].as_str()?;
            let ended = ["completed", "failed", "cancelled"].contains(&now);
            (now == state || ended).then_some(record)
        });
        assert_eq!(record["state"], state, "{record:#}\n{}", self.story());
        record
    }

    pub(crate) fn kill(&mut self, program: &str) {
        self.say(format!("killed {program}"));
        let process = self.running.iter_mut().find(|process| process.name() == program);
        process.unwrap().kill(Instant::now()).unwrap();
    }

    /// What happened, and the ends of all logs.
    pub(crate) fn story(&self) -> String {
        let logs = self.running.iter().map(|process| {
            let log = fs::read_to_string(process.log()).unwrap_or_default();
            let lines: Vec<_> = log.lines().collect();
            let last = lines[lines.len().saturating_sub(25)..].join("\n");
            format!("--- {}\n{last}", process.name())
        });
        format!(
            "{}\n{}",
            self.said.join("; "),
            logs.collect::<Vec<_>>().join("\n")
        )
    }

    /// The lab's own comparison of a copy with its source.
    pub(crate) fn assert_equal(&self, source: (&str, &str), copy: (&str, &str), record: &Value) {
        let folder = tempfile::tempdir().unwrap();
        let (image, disk) = (self.images.path().join(source.0), self.disks().join(copy.0));
        let image = compare::as_raw(&image, source.1, &folder.path().join("source")).unwrap();
        let disk = compare::as_raw(&disk, copy.1, &folder.path().join("target")).unwrap();
        let skipped = record["report"]["skipped_free_bytes"].as_u64().unwrap();
        let compared = compare::compare(&image, &disk, skipped).unwrap();
        assert!(compared.equal, "{compared:?}\n{record:#}\n{}", self.story());
    }

    /// A job that ended well: its report says so, the journal too, and nothing but the copies is left at the target.
    pub(crate) fn assert_arrived(&self, record: &Value, copies: &[&str]) {
        let story = || format!("{record:#}\n{}", self.story());
        assert_eq!(record["state"], "completed", "{}", story());
        for key in ["ok", "equal"] {
            assert_eq!(record["report"][key], true, "{key} in {}", story());
        }
        assert_eq!(
            record["report"]["source_digest"],
            record["report"]["target_digest"],
            "{}",
            story()
        );
        self.assert_nothing_but(copies);
    }

    /// No partial file, no progress log, no helper's socket.
    pub(crate) fn assert_nothing_but(&self, copies: &[&str]) {
        let mut left = names(&self.disks());
        left.retain(|name| !copies.contains(&name.as_str()) && name != "lost+found");
        assert!(
            left.is_empty(),
            "left in the target's folder: {left:?}\n{}",
            self.story()
        );
        for copy in copies {
            assert!(
                self.disks().join(copy).exists(),
                "{copy} is missing\n{}",
                self.story()
            );
        }
        let state = names(&self.lab.directory().join("target-agent/state"));
        let logs: Vec<_> = state.iter().filter(|name| name.ends_with(".log")).collect();
        assert!(logs.is_empty(), "left in the target's state: {logs:?}");
        for agent in ["source-agent", "target-agent"] {
            let sockets = names(&self.lab.directory().join(agent).join("run"));
            assert!(
                sockets.is_empty(),
                "left in the run folder of {agent}: {sockets:?}"
            );
        }
    }
}

pub(crate) fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}
