//! The way back of a guest that was moved: the same programs, the other direction.
//!
//! Owns the second job, what it cost, and the look whether both disks are equal. Leaves alone the guest's own proof, which comes after.
//! Promises that "equal" rests on the lab's own reading: every block that the guest has not written since it came back is as it was left
//! at the other site, by what QEMU says of its writes. Two kinds of blocks may differ: what was free at both moments is left out, and what
//! the file system has taken since may lie in its journal only, which replaces whatever is in its place.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::args::LiveArgs;
use super::monitor::Monitor;
use super::settings;
use super::stage::Stage;
use super::verdict::LiveReport;
use crate::compare;
use crate::lab::End;
use crate::move_disk::Moment;
use crate::programs::{self, Line, Programs};

const TICK: Duration = Duration::from_millis(20);
/// Bytes compared at once: a block of the file system.
const CHUNK: u64 = 4 << 10;

/// The guest's first disk.
const NODE: &str = "node0";

/// What the way back came to.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct BackReport {
    /// The job said that it ended well.
    pub ok: bool,
    pub seconds: f64,
    /// Data of the disks that was at home already, by the job's word.
    pub kept_bytes: u64,
    /// Data of the disks that was sent, raw: in the first pass, and what was written since.
    pub sent_raw_bytes: u64,
    pub dirty_bytes: u64,
    /// As the programs count.
    pub wan_bytes: u64,
    /// Bytes of IP that the emulated link delivered towards home.
    pub link_bytes: Option<u64>,
    pub blackout_ms: Option<f64>,
    /// Bytes that the guest has not written since it came home, and compared.
    pub compared_bytes: u64,
    /// Of these, bytes in blocks that differ from what was left at the other site, and count.
    pub differing_bytes: u64,
    /// Bytes in blocks that differ and that the journal at home replaces before anybody reads them.
    pub journaled_bytes: u64,
    pub notes: Vec<String>,
    pub decisions: Vec<String>,
    pub cause: Option<String>,
    /// The programs' own report.
    pub job: Value,
    /// The job's number.
    pub id: String,
}

impl BackReport {
    /// It arrived, and nothing differs.
    pub fn is_good(&self) -> bool {
        self.ok && self.compared_bytes > 0 && self.differing_bytes == 0 && self.cause.is_none()
    }

    fn read_job(&mut self, job: Value) {
        let sum = |name: &str| {
            let disks = job["disks"].as_array().into_iter().flatten();
            disks.filter_map(|disk| disk[name].as_u64()).sum()
        };
        let list = |value: &Value| serde_json::from_value(value.clone()).unwrap_or_default();
        self.ok = job["ok"] == Value::Bool(true);
        self.cause = job["cause"].as_str().map(str::to_owned);
        (self.kept_bytes, self.sent_raw_bytes) = (sum("kept_bytes"), sum("sent_raw_bytes"));
        self.wan_bytes = job["wan_bytes"].as_u64().unwrap_or(0);
        self.dirty_bytes = job["live"]["dirty_bytes"].as_u64().unwrap_or(0);
        self.blackout_ms = job["live"]["blackout_ms"].as_f64();
        (self.notes, self.decisions) = (list(&job["notes"]), list(&job["live"]["decisions"]));
        self.job = job;
    }
}

/// Moves the guest back, and looks at the disks.
///
/// # Errors
/// When the lab itself cannot work.
pub fn go_back(
    args: &LiveArgs,
    stage: &mut Stage,
    programs: &Programs,
    arrived: &str,
    watch: &mut dyn FnMut(Moment),
) -> io::Result<BackReport> {
    if args.forget_changes {
        let monitor = stage.monitor(End::Target);
        monitor.execute("block-dirty-bitmap-remove", since(monitor)?)?;
    }
    watch(Moment::Step("moving the guest back".to_owned()));
    let directory = stage.lab.directory().to_owned();
    let file = settings::write_job_back(&directory, &stage.machine, arrived, args)?;
    let delivered = |stage: &mut Stage| -> io::Result<Option<u64>> {
        let stats = stage.lab.link().map(|link| link.stats()).transpose()?;
        Ok(stats.map(|stats| stats.back.delivered_bytes))
    };
    let before = delivered(stage)?;
    let began = Instant::now();
    let mut back = BackReport::default();
    if let Err(error) = run_job(args, stage, programs, file, &mut back, watch) {
        back.cause = Some(error.to_string());
    }
    back.seconds = began.elapsed().as_secs_f64();
    let link = delivered(stage)?;
    back.link_bytes = link.zip(before).map(|(after, before)| after - before);
    if back.ok {
        watch(Moment::Step("comparing the disks".to_owned()));
        compare_disks(args, stage, &mut back)?;
    }
    Ok(back)
}

fn run_job(
    args: &LiveArgs,
    stage: &mut Stage,
    programs: &Programs,
    file: &str,
    back: &mut BackReport,
    watch: &mut dyn FnMut(Moment),
) -> io::Result<()> {
    let log = File::create(stage.lab.directory().join("longhaul-back.log"))?;
    let mut operator = programs
        .run_file(&stage.lab, End::Target, file)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .process_group(0)
        .spawn()?;
    stage.lab.adopt(operator.id())?;
    let (sender, lines) = mpsc::sync_channel(64);
    if let Some(stdout) = operator.stdout.take() {
        std::thread::spawn(move || {
            let lines = BufReader::new(stdout).lines().map_while(Result::ok);
            for line in lines {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
    }
    let start = Instant::now();
    let mut adopted = stage.monitor(End::Source).pid();
    let outcome = loop {
        match lines.recv_timeout(TICK) {
            Ok(line) => {
                let value: Value = serde_json::from_str(&line).unwrap_or_default();
                if let Some(job) = value["job"].as_str() {
                    job.clone_into(&mut back.id);
                }
                match programs::read_line(&line) {
                    Line::Report(job) => {
                        back.read_job(job);
                        break Ok(());
                    }
                    Line::Progress(percent) => watch(Moment::Progress(percent)),
                    Line::Other => {}
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                let said = fs::read_to_string(stage.lab.directory().join("longhaul-back.log"));
                let said = said.unwrap_or_default();
                break Err(io::Error::other(format!(
                    "longhaul ended without a report: {}",
                    said.trim()
                )));
            }
        }
        // The QEMU that an agent starts here ends with the lab.
        let pid = stage.monitor(End::Source).pid();
        if pid != adopted {
            adopted = pid;
            pid.map_or(Ok(()), |pid| stage.lab.adopt(pid))?;
        }
        stage.tend()?;
        if start.elapsed() > args.limit.0 {
            break Err(io::Error::other(format!(
                "the way back was given up after {}",
                args.limit
            )));
        }
    };
    let _ = operator.kill();
    operator.wait()?;
    outcome
}

/// Compares what the guest has not written since with what was left at the other site.
fn compare_disks(args: &LiveArgs, stage: &mut Stage, back: &mut BackReport) -> io::Result<()> {
    let work = tempfile::tempdir_in(stage.lab.directory())?;
    let monitor = stage.monitor(End::Source).clone();
    monitor.execute("stop", Value::Null)?;
    let (clean, here) = look(&monitor, work.path())?;
    monitor.execute("cont", Value::Null)?;
    let left = shadow(stage, End::Target, &back.id);
    let left = compare::as_raw(&left, args.target_format(), &work.path().join("left"))?;
    // What was free then and is not now holds what the guest had written and not yet told its journal: that has to be here.
    let free_then = compare::free_after_replay(&left, &work.path().join("left-replayed"))?;
    let replayed = work.path().join("here-replayed");
    let free_now = compare::free_after_replay(&here, &replayed)?;
    let clean = without(&clean, &common(&free_then, &free_now));
    let (left, here, replayed) = (File::open(left)?, File::open(here)?, File::open(replayed)?);
    let read = |file: &File, at: u64, bytes: &mut [u8]| file.read_exact_at(bytes, at);
    let mut blocks = [[0; CHUNK as usize]; 3];
    for (mut at, end) in clean {
        while at < end {
            let len = CHUNK.min(end - at) as usize;
            let [one, two, three] = blocks.each_mut().map(|block| &mut block[..len]);
            read(&left, at, one)?;
            read(&here, at, two)?;
            back.compared_bytes += len as u64;
            if one != two {
                // Nobody reads what the journal holds anew: metadata of blocks that the guest took after it left, or since it is here.
                read(&replayed, at, three)?;
                let counted = if two == three {
                    &mut back.differing_bytes
                } else {
                    &mut back.journaled_bytes
                };
                *counted += len as u64;
            }
            at += len as u64;
        }
    }
    Ok(())
}

/// What lies in both; sorted, as each of them is.
fn common(one: &[Range<u64>], two: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut both = Vec::new();
    let (mut at, mut other) = (0, 0);
    while let (Some(a), Some(b)) = (one.get(at), two.get(other)) {
        let (start, end) = (a.start.max(b.start), a.end.min(b.end));
        if start < end {
            both.push(start..end);
        }
        if a.end < b.end { at += 1 } else { other += 1 }
    }
    both
}

/// The parts of sorted `ranges` that are in none of the sorted `holes`.
fn without(ranges: &[(u64, u64)], holes: &[Range<u64>]) -> Vec<(u64, u64)> {
    let mut left = Vec::new();
    for (start, end) in ranges {
        let mut at = *start;
        let first = holes.partition_point(|hole| hole.end <= *start);
        for hole in holes[first..].iter().take_while(|hole| hole.start < *end) {
            if at < hole.start {
                left.push((at, hole.start));
            }
            at = hole.end.max(at);
        }
        if at < *end {
            left.push((at, *end));
        }
    }
    left
}

/// Of the stopped guest: where it has not written since it came, and a copy of its disk.
fn look(monitor: &Monitor, work: &Path) -> io::Result<(Vec<(u64, u64)>, PathBuf)> {
    let bitmap = since(monitor)?;
    let name = bitmap["name"].as_str().unwrap_or_default().to_owned();
    monitor.execute("block-dirty-bitmap-disable", bitmap.clone())?;
    let socket = work.join("nbd");
    let address = json!({ "type": "unix", "data": { "path": socket.display().to_string() } });
    monitor.execute("nbd-server-start", json!({ "addr": address }))?;
    let export = json!({ "type": "nbd", "id": "look", "name": "look", "node-name": NODE, "bitmaps": [name] });
    monitor.execute("block-export-add", export)?;
    let image = format!(
        "driver=nbd,server.type=unix,server.path={},export=look",
        socket.display()
    );
    let dirty = format!("{image},x-dirty-bitmap=qemu:dirty-bitmap:{name}");
    let map = qemu_img(&["map", "--output=json", "--image-opts", &dirty])?;
    let copy = work.join("here");
    qemu_img(&[
        "convert",
        "-O",
        "raw",
        "--image-opts",
        &image,
        &copy.display().to_string(),
    ])?;
    monitor.execute("nbd-server-stop", Value::Null)?;
    monitor.execute("block-dirty-bitmap-enable", bitmap)?;
    let map: Vec<Value> = serde_json::from_slice(&map)?;
    // What is dirty is shown as no data.
    let clean = map
        .iter()
        .filter(|run| run["data"] == Value::Bool(true))
        .filter_map(|run| {
            let (start, length) = (run["start"].as_u64()?, run["length"].as_u64()?);
            Some((start, start + length))
        });
    Ok((clean.collect(), copy))
}

/// The bitmap in which QEMU notes what the guest writes, as QMP wants it named.
fn since(monitor: &Monitor) -> io::Result<Value> {
    let nodes = monitor.execute("query-named-block-nodes", json!({ "flat": true }))?;
    let mut nodes = nodes.as_array().into_iter().flatten();
    let bitmaps = nodes
        .find(|found| found["node-name"] == NODE)
        .and_then(|found| found["dirty-bitmaps"].as_array());
    let mut names = bitmaps
        .into_iter()
        .flatten()
        .filter_map(|bitmap| bitmap["name"].as_str());
    let name = names.find(|name| name.starts_with("longhaul-since-"));
    let name = name.ok_or_else(|| io::Error::other("QEMU does not note what the guest writes"))?;
    Ok(json!({ "node": NODE, "name": name }))
}

fn qemu_img(words: &[&str]) -> io::Result<Vec<u8>> {
    let output = Command::new("qemu-img")
        .args(words)
        .stdin(Stdio::null())
        .output()?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!(
        "qemu-img {}: {}",
        words.join(" "),
        said.trim()
    )))
}

/// What a job left of the disk at an end.
fn shadow(stage: &Stage, end: End, job: &str) -> PathBuf {
    let mut name = stage.disk(end).into_os_string();
    name.push(format!(".longhaul-{}.moved", job.get(..8).unwrap_or_default()));
    name.into()
}

/// What the way back should have cleared up.
pub fn leftovers(stage: &Stage, report: &LiveReport) -> Vec<String> {
    let Some(back) = report.back.as_ref().filter(|back| back.ok) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for only in [stage.disk(End::Source), shadow(stage, End::Target, &back.id)] {
        let folder = only.parent().unwrap_or_else(|| Path::new("/"));
        let others = fs::read_dir(folder)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path());
        found.extend(
            others
                .filter(|path| *path != only || path.is_symlink())
                .map(|path| format!("file {}", path.display())),
        );
    }
    if stage.monitor(End::Target).is_connected() {
        found.push("the QEMU that the guest came back from runs".to_owned());
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_free_at_both_moments_is_left_out() {
        let free = common(&[0..10, 20..30, 40..50], &[5..25, 28..29, 45..60]);
        assert_eq!(free, [5..10, 20..25, 28..29, 45..50]);
        assert_eq!(
            without(&[(0, 7), (8, 22), (26, 70)], &free),
            [(0, 5), (10, 20), (26, 28), (29, 45), (50, 70)]
        );
        assert_eq!(without(&[(3, 4)], &[]), [(3, 4)]);
    }
}
