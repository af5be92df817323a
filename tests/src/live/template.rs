//! What a site already has: the disk of the guest's template, moved as a powered-off machine before the guest is.
//!
//! Owns that first job: its copy of the disk, its file, its end. Leaves alone the guest, and the measuring of what comes
//! after. Promises an error where the template did not arrive: then nothing that follows would mean what it says.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::Stdio;

use super::settings;
use crate::lab::{End, Lab};
use crate::programs::{Line, Programs, read_line};

/// The job's file in the lab's directory, and its name.
const JOB: &str = "template.toml";
const NAME: &str = "template";

/// Puts the template's disk, as the guest's is before it boots, where the source's agent may read it.
///
/// # Errors
/// When it cannot be copied.
pub fn prepare(directory: &Path, image: &Path, format: &str) -> io::Result<()> {
    crate::guest::copy(image, &settings::other_disk(directory, End::Source, NAME))?;
    settings::write_other_job(directory, JOB, NAME, format)
}

/// Moves it, and gives how many bytes went over the WAN.
///
/// # Errors
/// When the job did not end well.
pub fn move_it(lab: &Lab, programs: &Programs) -> io::Result<u64> {
    let log = File::create(lab.directory().join("template.log"))?;
    let output = programs
        .run_job(lab, JOB)
        .stdin(Stdio::null())
        .stderr(log)
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let report = text.lines().rev().find_map(|line| match read_line(line) {
        Line::Report(report) => Some(report),
        _ => None,
    });
    let report = report.ok_or_else(|| io::Error::other("the template's job gave no report"))?;
    if report["ok"] != true {
        let cause = report["cause"].as_str().unwrap_or("no reason was given");
        return Err(io::Error::other(format!("the template was not moved: {cause}")));
    }
    // The room is the guest's now, and what lies in its folders at the end is judged.
    for end in [End::Source, End::Target] {
        fs::remove_file(settings::other_disk(lab.directory(), end, NAME))?;
    }
    let bytes = report["wan_bytes"].as_u64();
    bytes.ok_or_else(|| io::Error::other("the template's job does not say what it sent"))
}
