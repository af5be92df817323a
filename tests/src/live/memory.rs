//! Whether the guest's memory is the same at both sites at the handover.
//!
//! Owns the hook that holds the handover while both QEMUs stand, and the comparison of what they hold. Leaves alone the guest's own
//! check of its memory (`proof`), which sees less and costs no pause. Promises a figure only where both were seen standing, with the
//! source's memory at its end and the target's before its first step.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::monitor::Monitor;

/// How often both are looked at.
const LOOK: Duration = Duration::from_millis(5);
const PAGE: usize = 4096;
/// The PC's video memory and ROMs: what is read there is no memory of the guest's.
const HOLE: std::ops::Range<usize> = 0xa0000..0x10_0000;
/// Addresses of so many pages are told.
const TOLD: usize = 64;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compared {
    /// Bytes of memory that were compared.
    pub bytes: u64,
    /// Pages of 4 KiB that differ.
    pub differing_pages: u64,
    /// Physical addresses of the first of them.
    pub addresses: Vec<u64>,
}

/// The words in the target agent's file that hold each handover until both were compared, for some 3 s at most: a hook has 5 s.
///
/// # Errors
/// When the hook cannot be written.
pub fn hook(directory: &Path) -> io::Result<String> {
    let (program, compared) = (directory.join("hold-handover"), compared(directory));
    let text = format!(
        "#!/bin/sh\nn=0\nwhile [ ! -e '{0}' ] && [ $n -lt 120 ]; do sleep 0.02; n=$((n + 1)); done\nrm -f '{0}'\n",
        compared.display()
    );
    fs::write(&program, text)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    Ok(format!(
        "[hooks]\nhandover_timeout = \"5 s\"\nat_handover = \"{}\"\n",
        program.display()
    ))
}

/// Its presence lets the handover go on.
fn compared(directory: &Path) -> PathBuf {
    directory.join("memory-compared")
}

/// Waits beside a job for the moment in which both stand.
pub struct Comparison {
    stop: Arc<AtomicBool>,
    found: Arc<Mutex<Option<io::Result<Compared>>>>,
    thread: Option<JoinHandle<()>>,
}

impl Comparison {
    /// For memory of `bytes`.
    pub fn begin(directory: &Path, source: Monitor, target: Monitor, bytes: u64) -> Self {
        let (stop, found) = (Arc::<AtomicBool>::default(), Arc::<Mutex<_>>::default());
        let (stopped, result, directory) = (Arc::clone(&stop), Arc::clone(&found), directory.to_owned());
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                std::thread::sleep(LOOK);
                if !both_stand(&source, &target) {
                    continue;
                }
                let seen = compare(&directory, &source, &target, bytes).transpose();
                *result.lock().unwrap_or_else(PoisonError::into_inner) = seen;
                // Without it the hook goes on by itself.
                let _ = File::create(compared(&directory));
                return;
            }
        });
        Self {
            stop,
            found,
            thread: Some(thread),
        }
    }

    /// What was found; `None` where both never stood, or not for long enough.
    ///
    /// # Errors
    /// When a QEMU did not give its memory.
    pub fn end(mut self) -> io::Result<Option<Compared>> {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.found
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
            .transpose()
    }
}

fn compare(directory: &Path, source: &Monitor, target: &Monitor, bytes: u64) -> io::Result<Option<Compared>> {
    let files = ["memory.source", "memory.target"].map(|name| directory.join(name));
    for (monitor, file) in [source, target].into_iter().zip(&files) {
        let words = json!({"val": 0, "size": bytes, "filename": file});
        monitor.execute("pmemsave", words)?;
    }
    if !both_stand(source, target) {
        // The hook's time was over before the last page was read.
        files.iter().try_for_each(fs::remove_file)?;
        return Ok(None);
    }
    let found = differences(File::open(&files[0])?, File::open(&files[1])?)?;
    if found.differing_pages == 0 {
        files.iter().try_for_each(fs::remove_file)?;
    }
    Ok(Some(found))
}

/// The source's QEMU has sent all, the target's holds all and has not run yet.
fn both_stand(source: &Monitor, target: &Monitor) -> bool {
    target.run_state().as_deref() == Some("paused") && source.run_state().as_deref() == Some("postmigrate")
}

/// Compares page by page what two readers hold.
fn differences(mut one: impl Read, mut other: impl Read) -> io::Result<Compared> {
    let mut found = Compared::default();
    let mut pages = [[0_u8; PAGE]; 2];
    for address in (0..).step_by(PAGE) {
        let read = read_page(&mut one, &mut pages[0])?;
        if read != read_page(&mut other, &mut pages[1])? {
            return Err(io::Error::other("both memories do not have one size"));
        }
        if read == 0 {
            return Ok(found);
        }
        if HOLE.contains(&address) {
            continue;
        }
        found.bytes += read as u64;
        if pages[0][..read] != pages[1][..read] {
            found.differing_pages += 1;
            if found.addresses.len() < TOLD {
                found.addresses.push(address as u64);
            }
        }
    }
    Ok(found)
}

fn read_page(from: &mut impl Read, page: &mut [u8; PAGE]) -> io::Result<usize> {
    let mut read = 0;
    while read < PAGE {
        match from.read(&mut page[read..])? {
            0 => break,
            n => read += n,
        }
    }
    Ok(read)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_differ_are_told_and_the_hole_is_no_memory() {
        let one = vec![7_u8; 0x10_0000 + 3 * PAGE + 100];
        let mut other = one.clone();
        assert_eq!(
            differences(&one[..], &other[..]).unwrap(),
            Compared {
                bytes: (one.len() - HOLE.len()) as u64,
                ..Compared::default()
            }
        );
        for at in [0, HOLE.start, HOLE.end - 1, HOLE.end + PAGE + 9, one.len() - 1] {
            other[at] ^= 1;
        }
        let found = differences(&one[..], &other[..]).unwrap();
        assert_eq!(found.differing_pages, 3);
        assert_eq!(found.addresses, [0, 0x10_1000, 0x10_3000]);
        assert!(differences(&one[..], &other[..PAGE]).is_err());
    }
}
