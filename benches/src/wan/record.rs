//! The results file: one JSON object per line, one line per finished run.
//!
//! Owns the fields and their units, reading, and appending. Leaves alone what they mean. Promises that a line is on disk
//! before the next run begins, that a last line that was cut off is dropped rather than believed, and that fields which
//! later versions add do not make old lines unreadable.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

/// How a run ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// All of it arrived, and was proved.
    Well,
    /// It took longer than it was given.
    GivenUp,
    #[default]
    Failed,
}

/// One finished run. Sizes in bytes, times in milliseconds unless the name says otherwise.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Record {
    pub profile: String,
    pub case: String,
    pub contestant: String,
    pub run: u32,
    /// When it ended, RFC 3339.
    pub at: String,
    pub end: End,
    pub cause: Option<String>,
    pub seconds: f64,
    /// Bytes of IP that the link delivered to the target during the run.
    pub wan_bytes: u64,
    pub blackout_qmp_ms: Option<f64>,
    /// Longest silence of the guest that a user would have noticed.
    pub heartbeat_gap_ms: Option<f64>,
    /// The same before the run: what the guest does by itself.
    pub heartbeat_before_ms: Option<f64>,
    pub predicted_blackout_ms: Option<f64>,
    /// What the guest got done during the run, as a part of what it got done before.
    pub guest_throughput: Option<f64>,
    /// What the link carried in the middle of the run, as a part of its rate.
    pub link_share: Option<f64>,
    pub phases_ms: BTreeMap<String, f64>,
    /// Raw data by what became of it.
    pub reduced_bytes: BTreeMap<String, u64>,
    /// What the differences among it came to, compressed.
    pub xor_payload_bytes: Option<u64>,
    /// Raw data that was written a little and sent again: differences from what stood at the same place.
    pub rewritten_bytes: Option<u64>,
    /// What this came to, compressed.
    pub rewritten_payload_bytes: Option<u64>,
    /// What going back straight after took on the WAN.
    pub back_wan_bytes: Option<u64>,
    pub cpu_seconds: BTreeMap<String, f64>,
    pub peak_rss_bytes: BTreeMap<String, u64>,
    /// What the first VM of the template took on the WAN, in the run of the second.
    pub first_wan_bytes: Option<u64>,
    /// What a TCP flow got alone on the link, in bits of its stream per second.
    pub beside_alone_bit_per_s: Option<f64>,
    /// What it got beside the job, as a part of that.
    pub beside_kept: Option<f64>,
    /// The job's part of what the link delivered meanwhile.
    pub beside_share: Option<f64>,
    /// Whether there was a link at all; without the rights for one everything runs over loopback.
    pub emulated: bool,
    /// TCP's congestion control, where TCP was used.
    pub tcp: Option<String>,
    /// Load of the machine in the minute before the run: what else it had to do.
    pub load_before: Option<f64>,
    /// Versions of what took part, and the machine.
    pub setting: BTreeMap<String, String>,
}

impl Record {
    /// What tells runs apart.
    pub fn key(&self) -> (&str, &str, &str, u32) {
        (&self.profile, &self.case, &self.contestant, self.run)
    }
}

/// Reads all lines; none where there is no file yet.
///
/// # Errors
/// When the file cannot be read, or a line other than the last is no record.
pub fn read(path: &Path) -> io::Result<Vec<Record>> {
    match fs::read_to_string(path) {
        Ok(text) => parse(&text).map_err(|error| io::Error::other(format!("{}: {error}", path.display()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Understands the text of a results file.
///
/// # Errors
/// Number and problem of a whole line that is no record.
pub fn parse(text: &str) -> Result<Vec<Record>, String> {
    let mut records = Vec::new();
    for (number, line) in text.split_inclusive('\n').enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        match serde_json::from_str(line) {
            Ok(record) => records.push(record),
            // Power was lost, or somebody stopped the benchmark, while it was written.
            Err(_) if !line.ends_with('\n') => {}
            Err(error) => return Err(format!("line {}: {error}", number + 1)),
        }
    }
    Ok(records)
}

/// Appends a line, after whatever is whole in the file.
///
/// # Errors
/// When the file cannot be written.
pub fn append(path: &Path, record: &Record) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let mut file = File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(path)?;
    let text = fs::read_to_string(path)?;
    let whole = text.rfind('\n').map_or(0, |at| at + 1);
    file.set_len(whole as u64)?;
    io::Seek::seek(&mut file, io::SeekFrom::End(0))?;
    writeln!(file, "{}", serde_json::to_string(record)?)?;
    file.sync_data()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(run: u32) -> Record {
        Record {
            contestant: "longhaul".to_owned(),
            run,
            end: End::Well,
            ..Record::default()
        }
    }

    #[test]
    fn what_is_appended_is_read_and_a_torn_line_is_written_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("results").join("runs.jsonl");
        assert_eq!(read(&path).unwrap(), []);
        append(&path, &record(1)).unwrap();
        let torn = fs::read_to_string(&path).unwrap() + "{\"run\": 7, \"cont";
        fs::write(&path, torn).unwrap();
        assert_eq!(read(&path).unwrap(), [record(1)]);
        append(&path, &record(2)).unwrap();
        assert_eq!(read(&path).unwrap(), [record(1), record(2)]);
    }

    #[test]
    fn damage_within_the_file_is_named_and_unknown_fields_are_not_damage() {
        let good = "{\"run\": 3, \"of_a_later_version\": [1]}\n";
        assert_eq!(parse(good).unwrap()[0].run, 3);
        let bad = parse(&format!("{good}nonsense\n{good}"));
        assert!(bad.unwrap_err().starts_with("line 2"));
    }
}
