//! What Longhaul promises an operator around a live move: hooks run at their moments and stop it where they should; a handover in
//! doubt is decided by his word without the other side, and never makes two owners; a shadow goes when he says so, and not before.
//!
//! Needs what the lab needs; the guests are emulated.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests fail like tests

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use clap::Parser;
use longhaul_lab::lab::End;
use longhaul_lab::live::args::LiveArgs;
use longhaul_lab::live::settings;
use longhaul_lab::live::stage::Stage;
use longhaul_lab::namespace;
use longhaul_lab::programs::Programs;
use serde_json::Value;

/// How long anything may take on a machine that others use, too.
const LIMIT: Duration = Duration::from_secs(120);
const TICK: Duration = Duration::from_millis(20);

#[derive(Debug, Parser)]
#[command(no_binary_name = true)]
struct Words {
    #[command(flatten)]
    args: LiveArgs,
}

/// Notes every moment, fails where a file says so, and holds the handover while another one is there.
const HOOK: &str = r#"#!/bin/sh
cd "$(dirname "$0")" || exit 9
here="$LONGHAUL_ROLE $LONGHAUL_MOMENT"
[ -n "$LONGHAUL_JOB" ] && [ -n "$LONGHAUL_DISKS" ] && [ "$LONGHAUL_SITE" = "$LONGHAUL_ROLE" ] || exit 8
echo "$here, other $LONGHAUL_OTHER_SITE/$LONGHAUL_OTHER_AGENT" >> moments
if [ "$here" = "source at_handover" ] && [ -e hold ]; then
    touch standing
    while [ -e hold ]; do sleep 0.02; done
fi
[ ! -e "fail $here" ]
"#;

struct Site {
    stage: Stage,
    programs: Programs,
    hooks: PathBuf,
}

impl Site {
    fn new(words: &str) -> Self {
        let usual = "--kind tiny --workload idle --rate 300mbit --rtt 20ms --limit 3min";
        let words = format!("{usual} {words}");
        let args = Words::try_parse_from(words.split_whitespace()).unwrap().args;
        let programs = Programs::find().unwrap();
        let stage = Stage::build(&args, Some(&programs), &mut |step| eprintln!("  {step}")).unwrap();
        let hooks = stage.lab.directory().join("hooks");
        fs::create_dir_all(&hooks).unwrap();
        let hook = hooks.join("hook");
        fs::write(&hook, HOOK).unwrap();
        fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).unwrap();
        let mut site = Self {
            stage,
            programs,
            hooks,
        };
        site.hook_agents(&hook);
        site
    }

    fn hook_agents(&mut self, hook: &Path) {
        for end in [End::Source, End::Target] {
            let mut words = "[hooks]\nhandover_timeout = \"5 s\"\n".to_owned();
            for moment in ["before", "at_handover", "after", "on_failure"] {
                words += &format!("{moment} = \"{}\"\n", hook.display());
            }
            settings::add(self.stage.lab.directory(), end, &words).unwrap();
        }
        self.kill("source-agent");
        self.kill("target-agent");
        self.until("the agents are back", |site| site.all_run());
    }

    fn all_run(&self) -> bool {
        self.stage.running.iter().all(|process| process.is_running())
    }

    fn kill(&mut self, who: &str) {
        let mut running = self.stage.running.iter_mut();
        let process = running.find(|process| process.name() == who).unwrap();
        process.kill(Instant::now()).unwrap();
    }

    /// Looks after the programs until it is so.
    fn until(&mut self, what: &str, mut is: impl FnMut(&mut Self) -> bool) {
        let began = Instant::now();
        while !is(self) {
            assert!(began.elapsed() < LIMIT, "{what}: not within {LIMIT:?}");
            self.stage.tend().unwrap();
            std::thread::sleep(TICK);
        }
        eprintln!("  {what} ({:.1} s)", began.elapsed().as_secs_f64());
    }

    fn pass(&mut self, span: Duration) {
        let end = Instant::now() + span;
        self.until("time passes", |_| Instant::now() > end);
    }

    /// What a command prints, and its exit code.
    fn say(&self, end: End, words: &[&str]) -> (i32, String) {
        let mut command = self.programs.order(&self.stage.lab, end, words);
        let output = command.stdin(Stdio::null()).output().unwrap();
        let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
        said.push_str(&String::from_utf8_lossy(&output.stderr));
        let shown: String = said.chars().take(600).collect();
        eprintln!("longhaul {}: {}", words.join(" "), shown.trim());
        (output.status.code().unwrap(), said)
    }

    fn start(&self) -> String {
        let job = self.stage.lab.directory().join("job.toml");
        let (code, said) = self.say(End::Source, &["run", "--detach", &job.display().to_string()]);
        assert_eq!(code, 0, "{said}");
        said.trim().to_owned()
    }

    fn job(&self, job: &str) -> Value {
        let (_, said) = self.say(End::Source, &["status", job, "--json"]);
        serde_json::from_str(&said).unwrap_or_default()
    }

    /// Waits until the job is at rest; gives its state and message.
    fn rest(&mut self, job: &str) -> (String, String) {
        let mut record = Value::Null;
        self.until("the job rests", |site| {
            std::thread::sleep(TICK * 10);
            record = site.job(job);
            matches!(
                record["state"].as_str(),
                Some("failed" | "completed" | "cancelled")
            )
        });
        let of = |key: &str| record[key].as_str().unwrap_or_default().to_owned();
        (of("state"), of("message"))
    }

    /// The moments since the last look.
    fn moments(&self) -> Vec<String> {
        let file = self.hooks.join("moments");
        let text = fs::read_to_string(&file).unwrap_or_default();
        let _ = fs::remove_file(&file);
        let lines = text.lines().map(|line| {
            let (moment, other) = line.split_once(", other ").unwrap();
            let expected = if moment.starts_with("source") {
                "target"
            } else {
                "source"
            };
            assert_eq!(other, format!("{expected}/{expected}-agent"));
            moment.to_owned()
        });
        let lines = lines.collect();
        eprintln!("  hooks: {lines:?}");
        lines
    }

    fn failing(&self, moment: &str, fails: bool) {
        let file = self.hooks.join(format!("fail {moment}"));
        if fails {
            fs::write(file, "").unwrap();
        } else {
            fs::remove_file(file).unwrap();
        }
    }

    fn owners(&self) -> Vec<End> {
        self.stage.owners()
    }

    fn shadows(&self) -> Vec<String> {
        let disk = settings::disk(self.stage.lab.directory(), End::Source, 0);
        let names = fs::read_dir(disk.parent().unwrap()).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
        names.filter(|name| name.contains(".longhaul-")).collect()
    }
}

fn place(moments: &[String], moment: &str) -> usize {
    let at = moments.iter().position(|known| known == moment);
    at.unwrap_or_else(|| panic!("'{moment}' is not in {moments:?}"))
}

#[test]
fn hooks_run_at_their_moments_and_a_failing_one_stops_the_move() {
    let mut site = Site::new("--loopback");

    site.failing("source before", true);
    let job = site.start();
    let (state, message) = site.rest(&job);
    assert_eq!(state, "failed");
    assert!(
        message.contains("before hook") && message.contains("nothing was moved"),
        "{message}"
    );
    assert_eq!(site.owners(), [End::Source]);
    let moments = site.moments();
    assert_eq!(moments, ["target before", "source before", "source on_failure"]);
    site.failing("source before", false);

    for end in ["source", "target"] {
        let moment = format!("{end} at_handover");
        site.failing(&moment, true);
        assert_eq!(site.say(End::Source, &["resume", &job]).0, 0);
        let (state, message) = site.rest(&job);
        assert_eq!(state, "failed");
        assert!(
            message.contains("at_handover hook") && message.contains("taken back"),
            "{message}"
        );
        assert_eq!(site.owners(), [End::Source]);
        assert!(site.shadows().is_empty());
        site.pass(Duration::from_secs(1));
        let moments = site.moments();
        assert!(
            place(&moments, &moment) < place(&moments, "source on_failure"),
            "{moments:?}"
        );
        if end == "target" {
            assert!(
                place(&moments, &moment) < place(&moments, "target on_failure"),
                "{moments:?}"
            );
        }
        assert!(
            !moments.iter().any(|known| known.ends_with("after")),
            "{moments:?}"
        );
        site.failing(&moment, false);
    }

    assert_eq!(site.say(End::Source, &["resume", &job]).0, 0);
    let (state, message) = site.rest(&job);
    assert_eq!(state, "completed", "{message}");
    assert_eq!(site.owners(), [End::Target]);
    let moments = site.moments();
    let at = |moment: &str| place(&moments, moment);
    assert!(at("source before") < at("source at_handover"), "{moments:?}");
    for end in ["source", "target"] {
        let (handover, after) = (format!("{end} at_handover"), format!("{end} after"));
        assert!(at(&handover) < at("target after"), "{moments:?}");
        assert!(at(&handover) < at(&after), "{moments:?}");
    }
}

impl Site {
    /// A handover in doubt: the link is cut and the target's host goes off while the VM stands, before any COMMIT.
    fn doubt(&mut self, job: &str) {
        self.until("the VM stands", |site| site.hooks.join("standing").exists());
        self.stage.lab.link().unwrap().set_cut(true).unwrap();
        // The host is off: its QEMU, and its agent. That is back in a second, and knows what its journal says.
        self.kill("target-agent");
        let pid = self.stage.monitor(End::Target).pid();
        let pid = pid.and_then(|pid| rustix::process::Pid::from_raw(pid.cast_signed()));
        if let Some(pid) = pid {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        fs::remove_file(self.hooks.join("hold")).unwrap();
        fs::remove_file(self.hooks.join("standing")).unwrap();
        self.until("the job is in doubt, in words", |site| {
            std::thread::sleep(TICK * 10);
            let record = site.job(job);
            let progress = &record["progress"];
            let message = record["message"]
                .as_str()
                .or_else(|| progress["message"].as_str());
            message.is_some_and(|message| {
                message.contains("in doubt: the VM is handed over and stopped here")
                    && message.contains("longhaul resolve")
            })
        });
        assert!(self.owners().is_empty());
        assert_eq!(self.shadows().len(), 1);
    }

    /// The link is back, and the target's agent was long there: only the source runs the VM.
    fn heal(&mut self) {
        self.stage.lab.link().unwrap().set_cut(false).unwrap();
        for _ in 0..25 {
            self.pass(Duration::from_millis(200));
            assert_eq!(self.owners(), [End::Source]);
        }
        assert!(!self.stage.monitor(End::Target).is_connected());
    }
}

#[test]
fn the_operator_decides_a_doubt_without_the_other_side_and_forgets_what_is_left() {
    if let Some(cause) = namespace::missing_rights() {
        eprintln!("not tested here: {cause}");
        return;
    }
    let mut site = Site::new("");
    fs::write(site.hooks.join("hold"), "").unwrap();
    let job = site.start();
    let (code, said) = site.say(End::Source, &["resolve", &job, "--run-at", "source"]);
    assert!(code == 4 && said.contains("nothing is in doubt"), "{said}");
    site.doubt(&job);

    let (code, said) = site.say(End::Source, &["resolve", &job, "--run-at", "source"]);
    assert!(
        code == 4 && said.contains("two copies") && said.contains("--the-other-side-is-off"),
        "{said}"
    );
    assert!(site.owners().is_empty());
    let sure = ["resolve", &job, "--run-at", "source", "--the-other-side-is-off"];
    let (code, said) = site.say(End::Source, &sure);
    assert!(code == 0 && said.contains("runs at the source again"), "{said}");
    assert_eq!(site.owners(), [End::Source]);
    assert!(site.shadows().is_empty());
    let (state, message) = site.rest(&job);
    assert!(
        state == "failed" && message.contains("the operator decided"),
        "{message}"
    );
    site.heal();

    // The same once more, and the source's agent is killed in the doubt.
    fs::write(site.hooks.join("hold"), "").unwrap();
    assert_eq!(site.say(End::Source, &["resume", &job]).0, 0);
    site.doubt(&job);
    site.kill("source-agent");
    site.until("the source's agent is back", |site| site.all_run());
    site.until("it takes the word", |site| {
        std::thread::sleep(TICK * 10);
        let (code, said) = site.say(End::Source, &sure);
        code == 0 && said.contains("runs at the source again")
    });
    assert_eq!(site.owners(), [End::Source]);
    let (state, message) = site.rest(&job);
    assert!(
        state == "failed" && message.contains("the operator decided"),
        "{message}"
    );
    let (code, said) = site.say(End::Source, &["forget", &job]);
    assert!(code == 4 && said.contains("cannot be forgotten"), "{said}");
    site.heal();

    assert_eq!(site.say(End::Source, &["resume", &job]).0, 0);
    let (state, message) = site.rest(&job);
    assert_eq!(state, "completed", "{message}");
    assert_eq!(site.owners(), [End::Target]);
    let (code, said) = site.say(End::Source, &sure);
    assert!(code == 4 && said.contains("nothing is in doubt"), "{said}");
    let target = ["resolve", &job, "--run-at", "source", "--agent", "target-agent"];
    let (code, said) = site.say(End::Target, &target);
    assert!(code == 4 && said.contains("belongs to this host"), "{said}");

    // A restarted agent still knows what it left.
    site.kill("source-agent");
    site.until("the source's agent is back", |site| site.all_run());
    assert_eq!(site.shadows().len(), 1);
    site.until("the shadow is forgotten", |site| {
        std::thread::sleep(TICK * 10);
        let (code, said) = site.say(End::Source, &["forget", &job]);
        code == 0 && said.contains("is removed") && said.contains("freed")
    });
    assert!(site.shadows().is_empty());
    let (code, said) = site.say(End::Source, &["forget", &job]);
    assert!(
        code == 0 && said.contains("nothing of this job is left"),
        "{said}"
    );
    assert_eq!(site.owners(), [End::Target]);
}
