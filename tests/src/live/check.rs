//! Which acknowledged records a disk holds, looked at offline after its guest has ended.
//!
//! Owns taking the workload's files out of an image (`e2fsck` on a copy after a power loss, then `debugfs`;
//! XFS and NTFS have to be mounted for it) and holding them against what the seed says must be there. Leaves alone how the records got there.
//! Promises to find every acknowledged record that is missing, torn or different, and to say so by name.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::guest::Fs;
use crate::guest::load::compile::{BUILD_STREAM, BUILDS};
use crate::guest::load::files::{Files, Step, WORKERS, folder};
use crate::guest::load::memory::{LOG, LOG_STREAM};
use crate::guest::load::record::decode;
use crate::guest::load::{FOLDER, redis};

const XFS_RECIPE: &str = include_str!("xfs.sh");
const NTFS_RECIPE: &str = include_str!("ntfs.sh");
/// Steps that may be durable beyond the last acknowledgement that was heard.
const AHEAD_MAX: u64 = 20_000;
/// Steps in a row that leave no number behind (renames and deletions); more than this is not plausible.
const SILENT_MAX: u64 = 64;
/// Sentences about what is wrong.
const PROBLEMS_MAX: usize = 20;

/// How the guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It synced, unmounted and powered off: nothing may be half done.
    Cleanly,
    /// Its QEMU was killed: what came after the last acknowledgement may be half done.
    PowerLoss,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Records {
    /// Records that the host heard to be acknowledged, over all streams.
    pub acknowledged: u64,
    /// Of these, records that the disk does not hold as they were acknowledged.
    pub lost: u64,
    /// Of the lost ones, those that are there in part.
    pub torn: u64,
    /// `e2fsck -fn` found nothing.
    pub clean: bool,
    /// What is wrong, in words.
    pub problems: Vec<String>,
}

impl Records {
    /// Nothing is lost, torn or damaged.
    pub fn is_good(&self) -> bool {
        self.lost == 0 && self.torn == 0 && self.clean && self.problems.is_empty()
    }

    fn problem(&mut self, text: String) {
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(text);
        }
    }
}

/// Checks a raw disk against what was acknowledged. `work` is an empty directory for copies.
///
/// # Errors
/// When a tool cannot be run or the disk cannot be read at all.
pub fn check(
    disk: &Path,
    fs: Fs,
    work: &Path,
    seed: u64,
    acknowledged: &BTreeMap<String, u64>,
    ended: Ended,
) -> io::Result<Records> {
    let mut records = Records {
        acknowledged: acknowledged.values().sum(),
        ..Records::default()
    };
    let out = work.join("files");
    fs::create_dir(&out)?;
    if fs != Fs::Ext4 {
        take_out_by_mounting(disk, fs, &out, ended, &mut records)?;
        check_folder(&out.join(FOLDER), seed, acknowledged, ended, &mut records)?;
        return Ok(records);
    }
    let copy = work.join("disk");
    let disk = if ended == Ended::PowerLoss {
        crate::guest::copy(disk, &copy)?;
        // What the next mount would do: the journal is replayed. More than that must not be needed.
        let replayed = run("e2fsck", &["-p".as_ref(), copy.as_os_str()])?;
        if !matches!(replayed.status.code(), Some(0 | 1)) {
            records.problem(format!("e2fsck -p: {}", last_words(&replayed.stdout)));
        }
        copy.as_path()
    } else {
        disk
    };
    let fsck = run("e2fsck", &["-fn".as_ref(), disk.as_os_str()])?;
    records.clean = fsck.status.success();
    if !records.clean {
        records.problem(format!("e2fsck -fn: {}", last_words(&fsck.stdout)));
    }
    if acknowledged.values().all(|upto| *upto == 0) {
        return Ok(records);
    }
    let words = format!("rdump /{FOLDER} {}", out.display());
    run("debugfs", &["-R".as_ref(), words.as_ref(), disk.as_os_str()])?;
    check_folder(&out.join(FOLDER), seed, acknowledged, ended, &mut records)?;
    Ok(records)
}

/// Looks at a disk whose file system has no tool that takes files out of it without a mount, and takes out those of the workload.
fn take_out_by_mounting(
    disk: &Path,
    fs: Fs,
    out: &Path,
    ended: Ended,
    records: &mut Records,
) -> io::Result<()> {
    let (text, name) = match fs {
        Fs::Ntfs => (NTFS_RECIPE, "ntfs.sh"),
        Fs::Xfs | Fs::Ext4 => (XFS_RECIPE, "xfs.sh"),
    };
    let mut words = vec![
        "--mount".as_ref(),
        "--propagation".as_ref(),
        "private".as_ref(),
        "sh".as_ref(),
        "-c".as_ref(),
        text.as_ref(),
        name.as_ref(),
        disk.as_os_str(),
        FOLDER.as_ref(),
        out.as_os_str(),
    ];
    if ended == Ended::PowerLoss {
        words.push("replay".as_ref());
    }
    let taken = run("unshare", &words)?;
    records.clean = taken.status.success();
    if !records.clean {
        let said = [taken.stdout, taken.stderr].concat();
        records.problem(format!("{}: {}", fs.name(), last_words(&said)));
    }
    Ok(())
}

/// Checks the files that were taken out of a disk.
///
/// # Errors
/// When a file cannot be read.
pub fn check_folder(
    out: &Path,
    seed: u64,
    acknowledged: &BTreeMap<String, u64>,
    ended: Ended,
    records: &mut Records,
) -> io::Result<()> {
    for (stream, upto) in acknowledged {
        let worker = (0..WORKERS).find(|number| folder(*number) == *stream);
        match (stream.as_str(), worker) {
            (_, Some(worker)) => check_worker(&out.join(stream), seed, worker, *upto, ended, records)?,
            (LOG, _) => check_log(&out.join(LOG), LOG_STREAM, *upto, ended, records),
            (BUILDS, _) => check_log(&out.join(BUILDS), BUILD_STREAM, *upto, ended, records),
            (redis::STREAM, _) => check_redis(&out.join("appendonlydir"), *upto, records)?,
            _ => records.problem(format!("nobody knows the stream {stream}")),
        }
    }
    Ok(())
}

/// Records 1 to n in one file, nothing between them.
fn check_log(path: &Path, stream: u32, upto: u64, ended: Ended, records: &mut Records) {
    let bytes = fs::read(path).unwrap_or_default();
    let (mut at, mut held) = (0, 0);
    while let Some((_, _, length)) =
        decode(&bytes[at..]).filter(|(of, number, _)| *of == stream && *number == held + 1)
    {
        held += 1;
        at += length;
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if held < upto {
        records.lost += upto - held;
        records.torn += u64::from(at < bytes.len());
        records.problem(format!(
            "{name}: {upto} records were acknowledged and {held} are there in one row"
        ));
    } else if at < bytes.len() && ended == Ended::Cleanly {
        records.torn += 1;
        records.problem(format!(
            "{name}: {} bytes after record {held} are no record",
            bytes.len() - at
        ));
    }
}

/// The files of one worker of the `fsync` workload: there must be a step at or after the last acknowledged
/// one after which exactly these files are there, but for the file that the next step was at.
fn check_worker(
    path: &Path,
    seed: u64,
    worker: u32,
    upto: u64,
    ended: Ended,
    records: &mut Records,
) -> io::Result<()> {
    let found = read_files(path)?;
    let newest = found.values().flat_map(|bytes| numbers(bytes)).max().unwrap_or(0);
    let mut files = Files::new(seed, worker);
    while files.done() < upto {
        files.step();
    }
    let at_acknowledged = files.clone();
    if ended == Ended::Cleanly {
        // The last acknowledgement was said after the last step.
        if difference(&files, &found, None).is_none() {
            return Ok(());
        }
    } else {
        // A record of step n can only be there if all steps before are done.
        while files.done() + 1 < newest.min(upto.saturating_add(AHEAD_MAX)) {
            files.step();
        }
        let last = newest
            .max(upto)
            .saturating_add(SILENT_MAX)
            .min(upto.saturating_add(AHEAD_MAX));
        while files.done() <= last {
            if difference(&files, &found, Some(&files.next())).is_none() {
                return Ok(());
            }
            files.step();
        }
    }
    blame(&at_acknowledged, &found, newest, records);
    Ok(())
}

/// The first file that is not as it should be; the one that `next` is at may be before, within or after that
/// step.
fn difference(files: &Files, found: &BTreeMap<String, Vec<u8>>, next: Option<&Step>) -> Option<String> {
    let touched: Vec<&str> = match next {
        None => Vec::new(),
        Some(Step::Create { name, .. } | Step::Append { name, .. } | Step::Delete { name }) => vec![name],
        Some(Step::Rename { from, to }) => vec![from, to],
    };
    let expected = files.listing();
    let surplus = found
        .keys()
        .find(|name| !expected.contains_key(*name) && !touched.contains(&name.as_str()));
    if let Some(name) = surplus {
        return Some(name.clone());
    }
    for (name, records) in &expected {
        let whole = files.content(records);
        let good = match (found.get(name), next) {
            (Some(bytes), None) => *bytes == whole,
            // Appended to, in part perhaps: what was there before must still be there.
            (Some(bytes), Some(_)) if touched.contains(&name.as_str()) => bytes.starts_with(&whole),
            (Some(bytes), Some(_)) => *bytes == whole,
            (None, Some(Step::Delete { .. })) => touched.contains(&name.as_str()),
            (None, Some(Step::Rename { from, to })) => {
                from == name && found.get(to).is_some_and(|bytes| *bytes == whole)
            }
            (None, _) => false,
        };
        if !good {
            return Some(name.clone());
        }
    }
    None
}

/// Says what is wrong, as seen from the last acknowledged step.
fn blame(files: &Files, found: &BTreeMap<String, Vec<u8>>, newest: u64, records: &mut Records) {
    let before = records.lost;
    for (name, expected) in files.listing() {
        let held: Vec<u64> = found.get(&name).map(|bytes| numbers(bytes)).unwrap_or_default();
        let missing = expected
            .iter()
            .filter(|(number, _)| !held.contains(number))
            .count() as u64;
        // A file may be gone rightly, by a step after the last acknowledged one; then this is not the worst.
        if missing > 0 {
            records.lost += missing;
            records.problem(format!(
                "{name}: {missing} of {} records are missing or changed",
                expected.len()
            ));
        }
    }
    for (name, bytes) in found {
        let whole = whole_bytes(bytes);
        if whole < bytes.len() {
            records.torn += 1;
            records.problem(format!("{name}: from byte {whole} on there is no whole record"));
        }
    }
    if records.lost == before {
        records.lost += 1;
        let which = difference(files, found, None).unwrap_or_default();
        records.problem(format!(
            "{which}: no step from {} to {newest} leaves the files as they are",
            files.done()
        ));
    }
}

/// Numbers of the whole records in a file, up to the first that is none.
fn numbers(bytes: &[u8]) -> Vec<u64> {
    let (mut at, mut numbers) = (0, Vec::new());
    while let Some((_, number, length)) = decode(&bytes[at..]) {
        numbers.push(number);
        at += length;
    }
    numbers
}

/// Bytes of the whole records at the start of a file.
fn whole_bytes(bytes: &[u8]) -> usize {
    let mut at = 0;
    while let Some((_, _, length)) = decode(&bytes[at..]) {
        at += length;
    }
    at
}

fn read_files(path: &Path) -> io::Result<BTreeMap<String, Vec<u8>>> {
    let mut found = BTreeMap::new();
    if !path.exists() {
        return Ok(found);
    }
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        found.insert(
            entry.file_name().to_string_lossy().into_owned(),
            fs::read(entry.path())?,
        );
    }
    Ok(found)
}

/// Every write up to `upto` must be in the append-only files.
fn check_redis(path: &Path, upto: u64, records: &mut Records) -> io::Result<()> {
    let mut held = vec![false; usize::try_from(upto).unwrap_or(0) + 1];
    let mark = b"{\"seq\":";
    for bytes in read_files(path)?.values() {
        for (at, window) in bytes.windows(mark.len()).enumerate() {
            if window != mark {
                continue;
            }
            let digits: String = bytes[at + mark.len()..]
                .iter()
                .take(20)
                .map(|byte| char::from(*byte))
                .take_while(char::is_ascii_digit)
                .collect();
            if let Some(held) = digits.parse().ok().and_then(|number: usize| held.get_mut(number)) {
                *held = true;
            }
        }
    }
    let missing = held.iter().skip(1).filter(|held| !**held).count() as u64;
    if missing > 0 {
        records.lost += missing;
        records.problem(format!(
            "redis: {missing} acknowledged writes are not in its append-only file"
        ));
    }
    Ok(())
}

fn run(program: &str, arguments: &[&std::ffi::OsStr]) -> io::Result<std::process::Output> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output();
    output.map_err(|error| {
        io::Error::new(
            error.kind(),
            format!("cannot run {program} (Debian package e2fsprogs): {error}"),
        )
    })
}

fn last_words(output: &[u8]) -> String {
    let text = String::from_utf8_lossy(output);
    let lines: Vec<_> = text.lines().rev().take(4).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join("; ")
}
