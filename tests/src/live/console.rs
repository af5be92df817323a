//! The lab's ears and mouth at the consoles of source and target.
//!
//! Owns two listening sockets, to which each QEMU connects when it starts, and the threads that read them.
//! Leaves alone what is heard (`hearing`). Promises that nothing a guest says is missed: the lab listens
//! before QEMU runs.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::hearing::Hearing;
use crate::lab::End;
use crate::usage::wait_until;

/// Both consoles.
#[derive(Debug)]
pub struct Consoles {
    start: Instant,
    hearing: Arc<Mutex<Hearing>>,
    /// Towards the guest, for the last QEMU that connected at each end.
    mouths: Arc<Mutex<BTreeMap<End, UnixStream>>>,
    directory: PathBuf,
}

impl Consoles {
    /// Listens for both ends, in `directory`; what is heard is kept in files there too.
    ///
    /// # Errors
    /// When a socket or file cannot be made.
    pub fn listen(directory: &Path) -> io::Result<Self> {
        let consoles = Self {
            start: Instant::now(),
            hearing: Arc::default(),
            mouths: Arc::default(),
            directory: directory.to_owned(),
        };
        for end in [End::Source, End::Target] {
            let listener = UnixListener::bind(consoles.socket(end))?;
            let log = File::create(directory.join(format!("{}-console.log", end.name())))?;
            let (start, hearing) = (consoles.start, Arc::clone(&consoles.hearing));
            let mouths = Arc::clone(&consoles.mouths);
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    if let Ok(mouth) = stream.try_clone() {
                        lock(&mouths).insert(end, mouth);
                    }
                    let (hearing, log) = (Arc::clone(&hearing), log.try_clone());
                    std::thread::spawn(move || listen(stream, start, end, &hearing, log.ok()));
                }
            });
        }
        Ok(consoles)
    }

    /// The socket to which QEMU's console at this end must connect.
    pub fn socket(&self, end: End) -> PathBuf {
        self.directory.join(format!("{}-console.sock", end.name()))
    }

    /// Time since the lab began to listen; all times of what is heard are of this clock.
    pub fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// The moment from which those times count.
    pub fn start(&self) -> Instant {
        self.start
    }

    /// Forgets what was heard: another guest will speak.
    pub fn forget(&self) {
        *lock(&self.hearing) = Hearing::default();
    }

    /// What was heard so far.
    pub fn hearing(&self) -> MutexGuard<'_, Hearing> {
        lock(&self.hearing)
    }

    /// Says a line to the guest at this end.
    ///
    /// # Errors
    /// When no QEMU is connected.
    pub fn say(&self, end: End, line: &str) -> io::Result<()> {
        let mut mouths = lock(&self.mouths);
        let mouth = mouths
            .get_mut(&end)
            .ok_or_else(|| io::Error::other(format!("no QEMU is connected to the {} console", end.name())))?;
        mouth.write_all(format!("{line}\n").as_bytes())
    }

    /// Waits for a word after `from`; gives what followed it.
    ///
    /// # Errors
    /// When it is not said in time, or the guest says that it failed.
    pub fn wait_for(&self, beginning: &str, from: Duration, limit: Duration) -> io::Result<String> {
        let heard = wait_until(limit, || {
            let hearing = self.hearing();
            let failed = ["LONGHAUL-GUEST-FAILED", "Kernel panic", "Out of memory: Killed"]
                .iter()
                .find_map(|words| hearing.said(words, Duration::ZERO));
            let said = hearing.said(beginning, from).map(|(_, rest)| Ok(rest));
            said.or_else(|| {
                failed.map(|(_, cause)| Err(io::Error::other(format!("the guest failed: {cause}"))))
            })
        });
        heard.unwrap_or_else(|| {
            let words = self.hearing().words().to_vec();
            let last: Vec<_> = words.iter().rev().take(5).map(|word| word.text.clone()).collect();
            let last = last.into_iter().rev().collect::<Vec<_>>().join("\n  ");
            Err(io::Error::other(format!(
                "the guest did not say {beginning} within {} s; it said last:\n  {last}",
                limit.as_secs()
            )))
        })
    }
}

fn listen(mut stream: UnixStream, start: Instant, end: End, hearing: &Mutex<Hearing>, mut log: Option<File>) {
    let mut buffer = [0; 4096];
    while let Ok(length) = stream.read(&mut buffer) {
        if length == 0 {
            return;
        }
        lock(hearing).bytes(start.elapsed(), end, &buffer[..length]);
        if let Some(log) = &mut log {
            let _ = log.write_all(&buffer[..length]);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
