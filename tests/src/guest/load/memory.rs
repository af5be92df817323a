//! The `mixed` workload: memory full of what real files hold, small writes all over its hot part, and a log.
//!
//! Owns the memory's pattern and its proof. Every write is 16 bytes with its number and a check of number and
//! place, and where write n goes follows from the seed: so `verify` knows for every place which write was the
//! last, and that what was never written still is what the files held. Promises to find one changed byte, one
//! page that is older than it should be, and one that lies elsewhere.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::chance::{below, checksum, mix};
use super::{FOLDER, Guest, record, worker};

const PAGE: usize = 4096;
const SLOT: usize = 16;
/// The standard run's figures for a guest of this memory; other guests get their share.
const STANDARD_RAM_MIB: u64 = 512;
const FILLED_MIB: u64 = 192;
const HOT_MIB: u64 = 48;
const WRITES_PER_SECOND: u64 = 4000;
/// Writes are made in small groups, this far apart.
const STEP: Duration = Duration::from_millis(5);
/// Records of the log.
const LOG_STEP: Duration = Duration::from_millis(20);
const LOG_PAYLOAD: usize = 200 - record::HEAD;
const LOG_SYNC_EVERY: u64 = 8;
/// The log's stream number and name.
pub const LOG_STREAM: u32 = 100;
pub const LOG: &str = "log";

/// Memory with a pattern in it.
#[derive(Debug)]
pub struct Memory {
    pattern: Mutex<Pattern>,
}

#[derive(Debug)]
struct Pattern {
    seed: u64,
    bytes: Vec<u8>,
    /// Writes go to the first so many bytes.
    hot: usize,
    /// Writes made.
    done: u64,
    /// For each hot page, the sum over its places that were never written.
    untouched: Vec<u64>,
    /// For each page after the hot ones, its checksum.
    cold: Vec<u64>,
}

impl Memory {
    fn new(seed: u64, bytes: Vec<u8>, hot: usize) -> Self {
        let untouched = bytes[..hot].chunks(PAGE).enumerate().map(|(page, content)| {
            let places = content.chunks(SLOT).enumerate();
            places.fold(0, |sum: u64, (at, place)| {
                sum.wrapping_add(untouched(page * PAGE / SLOT + at, place))
            })
        });
        let pattern = Pattern {
            seed,
            hot,
            done: 0,
            untouched: untouched.collect(),
            cold: bytes[hot..].chunks(PAGE).map(checksum).collect(),
            bytes,
        };
        Self {
            pattern: Mutex::new(pattern),
        }
    }

    fn write(&self, writes: u64) {
        let mut pattern = self.pattern.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..writes {
            pattern.write();
        }
    }

    /// Changes one byte, as a fault would.
    pub fn corrupt(&self) {
        let mut pattern = self.pattern.lock().unwrap_or_else(PoisonError::into_inner);
        let at = pattern.bytes.len() / 3;
        pattern.bytes[at] ^= 0x20;
    }

    /// Looks at every byte; gives the number of writes made.
    ///
    /// # Errors
    /// A sentence about the first wrong place.
    pub fn verify(&self) -> Result<u64, String> {
        self.pattern
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .verify()
    }
}

impl Pattern {
    fn place(&self, number: u64) -> usize {
        below(self.seed, number, (self.hot / SLOT) as u64) as usize
    }

    fn check(&self, place: usize, number: u64) -> u64 {
        mix(self.seed ^ mix(number) ^ place as u64)
    }

    fn write(&mut self) {
        self.done += 1;
        let place = self.place(self.done);
        let check = self.check(place, self.done);
        let at = place * SLOT;
        if !self.is_written(place) {
            let sum = untouched(place, &self.bytes[at..at + SLOT]);
            let page = at / PAGE;
            self.untouched[page] = self.untouched[page].wrapping_sub(sum);
        }
        self.bytes[at..at + 8].copy_from_slice(&self.done.to_le_bytes());
        self.bytes[at + 8..at + SLOT].copy_from_slice(&check.to_le_bytes());
    }

    fn words(&self, place: usize) -> (u64, u64) {
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&self.bytes[at..at + 8]);
            u64::from_le_bytes(word)
        };
        (word(place * SLOT), word(place * SLOT + 8))
    }

    fn is_written(&self, place: usize) -> bool {
        let (number, check) = self.words(place);
        check == self.check(place, number)
    }

    fn verify(&self) -> Result<u64, String> {
        let mut last = vec![0_u32; self.hot / SLOT];
        for number in 1..=self.done {
            last[self.place(number)] = number as u32;
        }
        for (page, expected) in self.untouched.iter().enumerate() {
            let mut sum = 0_u64;
            for place in page * PAGE / SLOT..(page + 1) * PAGE / SLOT {
                let (number, check) = self.words(place);
                match u64::from(last[place]) {
                    0 => {
                        sum =
                            sum.wrapping_add(untouched(place, &self.bytes[place * SLOT..(place + 1) * SLOT]));
                    }
                    last if number == last && check == self.check(place, last) => {}
                    last => return Err(format!("place {place} holds {number:#x} and not write {last}")),
                }
            }
            if sum != *expected {
                return Err(format!("hot page {page} has changed where nothing was written"));
            }
        }
        for (page, (content, expected)) in self.bytes[self.hot..].chunks(PAGE).zip(&self.cold).enumerate() {
            if checksum(content) != *expected {
                return Err(format!("page {} has changed", self.hot / PAGE + page));
            }
        }
        Ok(self.done)
    }
}

fn untouched(place: usize, content: &[u8]) -> u64 {
    mix(checksum(content) ^ mix(place as u64))
}

/// Fills the memory and starts writing.
pub(super) fn start(guest: &Guest) -> io::Result<Arc<Memory>> {
    let share = |mib: u64| ((mib << 20) * guest.order.ram_mib / STANDARD_RAM_MIB) as usize / PAGE * PAGE;
    let mut bytes = Vec::with_capacity(share(FILLED_MIB));
    while bytes.len() < share(FILLED_MIB) {
        let before = bytes.len();
        read_files(&guest.order.disk, share(FILLED_MIB), &mut bytes)?;
        if bytes.len() == before {
            return Err(io::Error::other("the disk has no files to fill memory with"));
        }
    }
    let hot = share(HOT_MIB).min(bytes.len());
    let memory = Arc::new(Memory::new(guest.order.seed, bytes, hot));
    let pattern = Arc::clone(&memory);
    let rate = WRITES_PER_SECOND * guest.order.ram_mib.min(STANDARD_RAM_MIB) / STANDARD_RAM_MIB;
    worker(guest, "memory", move |guest| {
        write_at_rate(guest, &pattern, rate);
        Ok(())
    });
    worker(guest, LOG, log);
    Ok(memory)
}

fn write_at_rate(guest: &Guest, memory: &Memory, rate: u64) {
    let start = Instant::now();
    let mut done = 0;
    while guest.gate.is_open() {
        // What a busy guest missed is made up for, but never more than a tenth of a second at once.
        let due = (start.elapsed().as_millis() as u64 * rate / 1000).min(done + rate / 10);
        memory.write(due - done.min(due));
        guest.console.count(due - done.min(due));
        done = due.max(done);
        std::thread::sleep(STEP);
    }
}

fn log(guest: &Guest) -> io::Result<()> {
    let mut file = File::create_new(guest.order.folder.join(LOG))?;
    File::open(&guest.order.folder)?.sync_all()?;
    let start = Instant::now();
    let mut number = 0;
    while guest.gate.is_open() {
        number += 1;
        file.write_all(&record::encode(guest.order.seed, LOG_STREAM, number, LOG_PAYLOAD))?;
        if number.is_multiple_of(LOG_SYNC_EVERY) {
            file.sync_data()?;
            guest.console.acknowledge(LOG, number);
        }
        guest.console.count(1);
        let due = LOG_STEP.saturating_mul(u32::try_from(number).unwrap_or(u32::MAX));
        std::thread::sleep(due.saturating_sub(start.elapsed()));
    }
    file.sync_data()?;
    guest.console.acknowledge(LOG, number);
    Ok(())
}

/// Appends the content of regular files under `folder`, in the order of their names, up to `limit` bytes.
pub(super) fn read_files(folder: &Path, limit: usize, into: &mut Vec<u8>) -> io::Result<()> {
    let mut entries: Vec<_> = fs::read_dir(folder)?.collect::<Result<_, _>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let kind = entry.file_type()?;
        let left = limit.saturating_sub(into.len());
        if left == 0 {
            break;
        }
        // The guest's own proc and dev are mounted on none of these; what is written by workloads is left out.
        if kind.is_dir() && entry.file_name() != FOLDER {
            read_files(&entry.path(), limit, into)?;
        } else if kind.is_file() {
            File::open(entry.path())?.take(left as u64).read_to_end(into)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::chance::fill;
    use super::*;

    fn memory(writes: u64) -> Memory {
        let mut bytes = vec![0; 64 * PAGE];
        fill(&mut bytes, 8);
        let memory = Memory::new(3, bytes, 16 * PAGE);
        memory.write(writes);
        memory
    }

    #[test]
    fn what_was_written_is_found_and_one_changed_bit_too() {
        for writes in [0, 1, 900, 20_000] {
            let memory = memory(writes);
            assert_eq!(memory.verify(), Ok(writes));
            for at in (0..64 * PAGE).step_by(1017) {
                memory.pattern.lock().unwrap().bytes[at] ^= 1;
                assert!(memory.verify().is_err(), "byte {at} after {writes}");
                memory.pattern.lock().unwrap().bytes[at] ^= 1;
            }
        }
    }

    #[test]
    fn a_page_of_an_earlier_time_is_found() {
        let (old, new) = (memory(5_000), memory(5_400));
        for page in 0..16 {
            let stale = old.pattern.lock().unwrap().bytes[page * PAGE..(page + 1) * PAGE].to_vec();
            let fresh = new.pattern.lock().unwrap().bytes[page * PAGE..(page + 1) * PAGE].to_vec();
            if stale == fresh {
                continue;
            }
            new.pattern.lock().unwrap().bytes[page * PAGE..(page + 1) * PAGE].copy_from_slice(&stale);
            assert!(new.verify().is_err(), "page {page}");
            new.pattern.lock().unwrap().bytes[page * PAGE..(page + 1) * PAGE].copy_from_slice(&fresh);
        }
        assert_eq!(new.verify(), Ok(5_400));
    }

    #[test]
    fn corruption_on_command_is_found() {
        let memory = memory(100);
        memory.corrupt();
        assert!(memory.verify().is_err());
    }
}
