//! One run: the lab is called, and what it reports becomes a record.
//!
//! Owns the command line's common part and the reading of both kinds of report. Leaves alone what is run, and when. Promises
//! a record for every run that the lab could play, and none where the lab itself could not work.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use super::contestant::Case;
use super::machine;
use super::plan::Run;
use super::record::{End, Record};

/// Bytes of noise: some 8 s of the fastest link, and under 2 min of the slowest.
const NOISE: u64 = 256 << 20;

/// What every run needs.
#[derive(Clone, Debug)]
pub struct Lab {
    /// The folder with the lab's and Longhaul's programs.
    pub programs: PathBuf,
    /// The standard disk; beside it lies one of noise.
    pub image: PathBuf,
    /// Where labs lie; default: the system's.
    pub directory: Option<PathBuf>,
    /// QEMU's program.
    pub qemu: Option<PathBuf>,
    /// Where the lab's whole reports are kept.
    pub reports: Option<PathBuf>,
}

impl Lab {
    /// Makes the standard disk, where it is not made yet.
    ///
    /// # Errors
    /// When the lab cannot.
    pub fn prepare(&self) -> io::Result<()> {
        if let Some(folder) = self.image.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let noise = self.noise();
        if !noise.exists() {
            let made = noise.with_extension("part");
            io::copy(
                &mut File::open("/dev/urandom")?.take(NOISE),
                &mut File::create(&made)?,
            )?;
            std::fs::rename(made, noise)?;
        }
        if self.image.exists() {
            return Ok(());
        }
        let made = Command::new(self.programs.join("lab"))
            .args(["image", "--kind=standard", "--out"])
            .arg(&self.image)
            .stdin(Stdio::null())
            .status()?;
        made.success()
            .then_some(())
            .ok_or_else(|| io::Error::other("the lab cannot make the standard disk"))
    }

    fn noise(&self) -> PathBuf {
        self.image.with_file_name("noise")
    }

    /// Plays a run.
    ///
    /// # Errors
    /// When the lab itself could not work; its own words are on standard error.
    pub fn play(&self, run: &Run) -> io::Result<Record> {
        let load_before = machine::load();
        let output = self
            .command(run)
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()?;
        if let Some(folder) = &self.reports {
            std::fs::create_dir_all(folder)?;
            std::fs::write(folder.join(name(run)), &output.stdout)?;
        }
        let report: Value = serde_json::from_slice(&output.stdout)
            .map_err(|_| io::Error::other(format!("the lab gave no report ({})", output.status)))?;
        let mut record = read_report(&report);
        record.profile = run.cell.profile.name.to_owned();
        record.case = run.cell.case.name().to_owned();
        record.contestant = run.contestant.name.to_owned();
        record.run = run.number;
        record.load_before = load_before;
        record.at = machine::now();
        record.setting = machine::setting(self.qemu.as_deref());
        Ok(record)
    }

    fn command(&self, run: &Run) -> Command {
        let image = match run.cell.case {
            Case::Noise => self.noise(),
            _ => self.image.clone(),
        };
        let mut command = Command::new(self.programs.join("lab"));
        command
            // What is measured is what was built beside this program.
            .env("LONGHAUL_BIN", &self.programs)
            .args(run.contestant.words(run.cell.case, &text(&image)))
            .args(run.cell.profile.words)
            .args(match run.cell.case {
                case if case.is_live() => run.cell.profile.live,
                _ => &[],
            })
            .arg(format!("--limit={}s", run.limit.as_secs()))
            // Loss and the guest's dice differ between runs, and are the same for all contestants of a round.
            .arg(format!("--seed={}", run.number))
            .arg("--json");
        if let Some(directory) = &self.directory {
            command.arg("--directory").arg(directory);
        }
        if let (Some(qemu), true) = (&self.qemu, run.cell.case.is_live()) {
            command.arg("--qemu").arg(qemu);
        }
        command
    }
}

/// File name of a run's whole report.
fn name(run: &Run) -> String {
    let (profile, case) = (run.cell.profile.name, run.cell.case.name());
    format!("{profile}-{case}-{}-{}.json", run.contestant.name, run.number)
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// What a report of `lab live`, `lab move` or `lab copy` says.
pub fn read_report(report: &Value) -> Record {
    let programs = || report["programs"].as_object().into_iter().flatten();
    let delivered = report["link"]["forth"]["delivered_bytes"].as_u64();
    // Of a live run, the link's count of the job alone.
    let during = report["link_bytes"][0].as_u64();
    let back = Some(&report["back"]).filter(|back| back["ok"] == Value::Bool(true));
    let map = |name: &str| serde_json::from_value(report[name].clone()).unwrap_or_default();
    Record {
        end: end(report),
        cause: report["cause"].as_str().map(str::to_owned),
        seconds: report["seconds"].as_f64().unwrap_or_default(),
        wan_bytes: during
            .or(delivered)
            .or_else(|| report["wan_bytes"].as_u64())
            .unwrap_or_default(),
        blackout_qmp_ms: report["blackout_qmp_ms"].as_f64(),
        heartbeat_gap_ms: report["blackout_heartbeat_ms"].as_f64(),
        heartbeat_before_ms: report["heartbeat_before_ms"].as_f64(),
        predicted_blackout_ms: report["predicted_blackout_ms"].as_f64(),
        guest_throughput: report["guest_throughput_ratio"].as_f64(),
        link_share: report["link"]["steady_share"].as_f64(),
        phases_ms: map("phases_ms"),
        reduced_bytes: serde_json::from_value(report["reduced_bytes"].clone()).unwrap_or_default(),
        xor_payload_bytes: report["xor_payload_bytes"].as_u64(),
        rewritten_bytes: report["rewritten_bytes"].as_u64(),
        rewritten_payload_bytes: report["rewritten_payload_bytes"].as_u64(),
        back_wan_bytes: back
            .and_then(|back| back["link_bytes"].as_u64().or_else(|| back["wan_bytes"].as_u64())),
        cpu_seconds: programs()
            .filter_map(|(name, part)| Some((name.clone(), part["cpu_seconds"].as_f64()?)))
            .collect(),
        peak_rss_bytes: programs()
            .filter_map(|(name, part)| Some((name.clone(), part["peak_rss_bytes"].as_u64()?)))
            .collect(),
        first_wan_bytes: report["first_wan_bytes"].as_u64(),
        beside_alone_bit_per_s: report["beside"]["alone_bit_per_s"].as_f64(),
        beside_kept: report["beside"]["kept"].as_f64(),
        beside_share: report["beside"]["share"].as_f64(),
        emulated: report["emulated"] == Value::Bool(true),
        tcp: report["tcp"].as_str().map(str::to_owned),
        ..Record::default()
    }
}

fn end(report: &Value) -> End {
    let cause = report["cause"].as_str().unwrap_or_default();
    if report["ok"] == Value::Bool(true) {
        End::Well
    } else if cause.contains("was given up after") {
        End::GivenUp
    } else {
        End::Failed
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_live_report_counts_the_job_alone_and_a_copy_the_whole_link() {
        let live = json!({"ok": true, "seconds": 21.5, "link_bytes": [300, 9], "wan_bytes": 290,
            "blackout_heartbeat_ms": 240.0, "phases_ms": {"ram": 9000.0}, "reduced_bytes": {"xor": 4096},
            "link": {"forth": {"delivered_bytes": 400}, "steady_share": 0.97},
            "programs": {"source-gateway": {"cpu_seconds": 12.0, "peak_rss_bytes": 5, "kills": 0}}, "emulated": true});
        let record = read_report(&live);
        assert_eq!(
            (record.end, record.wan_bytes, record.seconds),
            (End::Well, 300, 21.5)
        );
        assert_eq!(
            (record.heartbeat_gap_ms, record.link_share),
            (Some(240.0), Some(0.97))
        );
        assert_eq!(
            (record.cpu_seconds["source-gateway"], record.reduced_bytes["xor"]),
            (12.0, 4096)
        );
        let copy = json!({"ok": true, "link": {"forth": {"delivered_bytes": 400}}, "tcp": "bbr"});
        let record = read_report(&copy);
        assert_eq!((record.wan_bytes, record.tcp.as_deref()), (400, Some("bbr")));
    }

    #[test]
    fn patience_that_ended_is_told_from_failure() {
        let given_up = json!({"ok": false, "cause": "the job was given up after 2 min"});
        assert_eq!(end(&given_up), End::GivenUp);
        assert_eq!(
            end(&json!({"ok": false, "cause": "the copy was given up after 1 s"})),
            End::GivenUp
        );
        assert_eq!(end(&json!({"ok": false, "cause": "no space"})), End::Failed);
        assert_eq!(end(&json!({})), End::Failed);
    }
}
