//! Others' bulk beside a move: a powered-off disk of noise on its way through the same programs, from before the job until after it.
//!
//! Owns that second job: its disk, its file, its end. Leaves alone the guest, and what is measured of it. Promises an error where the bulk
//! was over before the guest's job was: then nothing was beside its handover.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use super::settings;
use crate::lab::{End, Lab};
use crate::programs::{Programs, job_number};
use crate::usage::wait_until;

/// The job's name, its file in the lab's directory, and what it says.
const NAME: &str = "bulk";
const JOB: &str = "bulk.toml";
const LOG: &str = "bulk.log";
/// How long a cancelled job may take to end.
const END: Duration = Duration::from_secs(30);

/// Makes its disk, where the source's agent may read it.
///
/// # Errors
/// When it cannot be written.
pub fn prepare(directory: &Path, bytes: u64) -> io::Result<()> {
    let source = settings::other_disk(directory, End::Source, NAME);
    io::copy(
        &mut File::open("/dev/urandom")?.take(bytes),
        &mut File::create(source)?,
    )?;
    settings::write_other_job(directory, JOB, NAME, "raw")
}

/// It flows.
pub struct Bulk(Child);

impl Bulk {
    /// Begins it.
    ///
    /// # Errors
    /// When the operator's program cannot be run.
    pub fn begin(lab: &mut Lab, programs: &Programs) -> io::Result<Self> {
        let said = File::create(lab.directory().join(LOG))?;
        let mut operator = programs.run_job(lab, JOB);
        let operator = operator
            .stdin(Stdio::null())
            .stderr(said.try_clone()?)
            .stdout(said);
        let operator = operator.spawn()?;
        lab.adopt(operator.id())?;
        Ok(Self(operator))
    }

    /// Ends it, and removes what it had.
    ///
    /// # Errors
    /// When it was over before, or does not end.
    pub fn end(mut self, lab: &Lab, programs: &Programs) -> io::Result<()> {
        let over = self.0.try_wait()?.is_some();
        let said = fs::read_to_string(lab.directory().join(LOG))?;
        if over {
            let last = said.lines().last().unwrap_or_default();
            let what =
                format!("the bulk was over before the guest's job: give it more; its last word: {last}");
            return Err(io::Error::other(what));
        }
        let mut cancel = programs.cancel_job(lab, &job_number(&said)?);
        cancel.stdin(Stdio::null()).output()?;
        let ended = wait_until(END, || self.0.try_wait().ok().flatten());
        ended.ok_or_else(|| io::Error::other("the bulk does not end, cancelled as it is"))?;
        // What lies in the agents' folders at the end is judged.
        fs::remove_file(settings::other_disk(lab.directory(), End::Source, NAME))
    }
}
