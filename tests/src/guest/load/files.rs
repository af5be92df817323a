//! The `fsync` workload: files created, appended to, renamed and deleted, each step made durable before the
//! next, as fast as it goes.
//!
//! Owns the sequence of steps as a pure function of seed, worker and number, so that the lab can say offline
//! which files a disk must hold after step n, byte by byte. Promises that step n is durable before n is
//! acknowledged.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use super::chance::below;
use super::{Guest, record, worker};

/// Workers, each with a folder and a stream of its own.
pub const WORKERS: u32 = 4;
/// Files of one worker.
const FILES_MIN: usize = 6;
const FILES_MAX: usize = 48;
/// A file is not grown beyond this.
const FILE_BYTES_MAX: usize = 192 << 10;

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// A new file with one record.
    Create {
        name: String,
        payload: usize,
    },
    /// One more record.
    Append {
        name: String,
        payload: usize,
    },
    Rename {
        from: String,
        to: String,
    },
    Delete {
        name: String,
    },
}

/// A file: how often it was renamed, and its records as (number, payload).
type Entry = (u32, Vec<(u64, usize)>);

/// The files of one worker after some steps.
#[derive(Clone, Debug)]
pub struct Files {
    seed: u64,
    worker: u32,
    done: u64,
    /// By the number of the step that made them.
    files: BTreeMap<u64, Entry>,
}

impl Files {
    /// Before the first step.
    pub fn new(seed: u64, worker: u32) -> Self {
        Self {
            seed,
            worker,
            done: 0,
            files: BTreeMap::new(),
        }
    }

    /// Steps taken.
    pub fn done(&self) -> u64 {
        self.done
    }

    /// What the next step is.
    pub fn next(&self) -> Step {
        let number = self.done + 1;
        let draw =
            |what: u64, limit: u64| below(self.seed ^ u64::from(self.worker) << 56, number * 8 + what, limit);
        let payload = match draw(1, 10) {
            0 => 20_000 + draw(2, 45_000),
            1..=3 => 2_000 + draw(2, 10_000),
            _ => 100 + draw(2, 1_500),
        } as usize;
        let share = match self.files.len() {
            ..FILES_MIN => 0,
            FILES_MAX.. => 99,
            _ => draw(3, 100),
        };
        let at = draw(4, self.files.len().max(1) as u64) as usize;
        let Some((file, (generation, records))) = self.files.iter().nth(at).filter(|_| share >= 26) else {
            return Step::Create {
                name: name(number, 0),
                payload,
            };
        };
        let old = name(*file, *generation);
        let bytes: usize = records.iter().map(|(_, payload)| payload + record::HEAD).sum();
        match share {
            ..62 if bytes < FILE_BYTES_MAX => Step::Append { name: old, payload },
            ..76 => Step::Rename {
                from: old,
                to: name(*file, generation + 1),
            },
            _ => Step::Delete { name: old },
        }
    }

    /// Notes that the next step was taken.
    pub fn step(&mut self) -> Step {
        let step = self.next();
        self.done += 1;
        let number = self.done;
        match &step {
            Step::Create { payload, .. } => {
                self.files.insert(number, (0, vec![(number, *payload)]));
            }
            Step::Append { name, payload } => {
                if let Some((_, records)) = self.entry(name) {
                    records.push((number, *payload));
                }
            }
            Step::Rename { from, .. } => {
                if let Some((generation, _)) = self.entry(from) {
                    *generation += 1;
                }
            }
            Step::Delete { name } => {
                self.files.remove(&file_number(name));
            }
        }
        step
    }

    fn entry(&mut self, name: &str) -> Option<&mut Entry> {
        self.files.get_mut(&file_number(name))
    }

    /// Every file by name, with its records as (number, payload).
    pub fn listing(&self) -> BTreeMap<String, &[(u64, usize)]> {
        let entries = self.files.iter();
        entries
            .map(|(file, (generation, records))| (name(*file, *generation), records.as_slice()))
            .collect()
    }

    /// The bytes of a file with these records.
    pub fn content(&self, records: &[(u64, usize)]) -> Vec<u8> {
        let records = records.iter();
        records
            .flat_map(|(number, payload)| record::encode(self.seed, self.worker, *number, *payload))
            .collect()
    }
}

fn name(file: u64, generation: u32) -> String {
    format!("f{file}.{generation}")
}

fn file_number(name: &str) -> u64 {
    let digits = name.trim_start_matches('f').split('.').next();
    digits.and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

/// The folder of a worker.
pub fn folder(worker: u32) -> String {
    format!("w{worker}")
}

/// Starts the workers.
pub(super) fn start(guest: &Guest) -> io::Result<()> {
    for number in 0..WORKERS {
        fs::create_dir(guest.order.folder.join(folder(number)))?;
    }
    File::open(&guest.order.folder)?.sync_all()?;
    for number in 0..WORKERS {
        worker(guest, &folder(number), move |guest| run(guest, number));
    }
    Ok(())
}

fn run(guest: &Guest, number: u32) -> io::Result<()> {
    let stream = folder(number);
    let path = guest.order.folder.join(&stream);
    let mut files = Files::new(guest.order.seed, number);
    while guest.gate.is_open() {
        let step = files.step();
        perform(&path, &step, guest.order.seed, number, files.done())?;
        guest.console.acknowledge(&stream, files.done());
        guest.console.count(1);
    }
    Ok(())
}

fn perform(folder: &Path, step: &Step, seed: u64, worker: u32, number: u64) -> io::Result<()> {
    let bytes = |payload: &usize| record::encode(seed, worker, number, *payload);
    match step {
        Step::Create { name, payload } => {
            let mut file = File::options()
                .write(true)
                .create_new(true)
                .open(folder.join(name))?;
            file.write_all(&bytes(payload))?;
            file.sync_all()?;
        }
        Step::Append { name, payload } => {
            let mut file = File::options().append(true).open(folder.join(name))?;
            file.write_all(&bytes(payload))?;
            return file.sync_data();
        }
        Step::Rename { from, to } => fs::rename(folder.join(from), folder.join(to))?,
        Step::Delete { name } => fs::remove_file(folder.join(name))?,
    }
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_performed_is_what_the_listing_says() {
        let folder = tempfile::tempdir().unwrap();
        let mut files = Files::new(5, 1);
        let mut kinds = [0; 4];
        for _ in 0..400 {
            let step = files.step();
            kinds[match step {
                Step::Create { .. } => 0,
                Step::Append { .. } => 1,
                Step::Rename { .. } => 2,
                Step::Delete { .. } => 3,
            }] += 1;
            perform(folder.path(), &step, 5, 1, files.done()).unwrap();
        }
        assert!(kinds.iter().all(|count| *count > 20), "{kinds:?}");
        let listing = files.listing();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), listing.len());
        for (name, records) in &listing {
            assert_eq!(
                fs::read(folder.path().join(name)).unwrap(),
                files.content(records)
            );
        }
    }

    #[test]
    fn the_steps_follow_from_the_seed_and_stay_within_bounds() {
        let walk = |seed| {
            let mut files = Files::new(seed, 0);
            (0..20_000)
                .map(|_| {
                    assert!(files.files.len() <= FILES_MAX);
                    files.step()
                })
                .collect::<Vec<_>>()
        };
        assert_eq!(walk(1), walk(1));
        assert_ne!(walk(1), walk(2));
    }
}
