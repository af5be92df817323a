//! The `redis` workload: Debian's redis-server on the guest's disk, 150,000 documents, and a client that
//! counts the writes that were acknowledged.
//!
//! Owns the server's settings, a client of the few commands it needs, and the proof: for every document the
//! last acknowledged write must be read back. Promises that every write carries its number, so that the lab
//! finds them in the append-only file.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::chance::mix;
use super::{FOLDER, Guest, worker};

/// The stream's name.
pub const STREAM: &str = "redis";
const DOCUMENTS: u64 = 150_000;
const WRITES_PER_SECOND: u64 = 400;
/// Commands that are sent before their answers are read.
const PIPELINE: u64 = 250;
const SOCKET: &str = "run/longhaul-redis.sock";

/// The server, seen by its client.
#[derive(Debug)]
pub struct Store {
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    client: Client,
    seed: u64,
    /// For each document the number of its last acknowledged write.
    last: Vec<u64>,
    done: u64,
}

impl Store {
    /// Reads every document back.
    ///
    /// # Errors
    /// A sentence about the first that is not as it was acknowledged.
    pub fn verify(&self) -> Result<u64, String> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.verify().map_err(|error| error.to_string())
    }

    /// Has the server write everything and end.
    pub fn stop(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // It ends without an answer.
        let _ = state.client.send(&["SHUTDOWN"]);
        let _ = state.client.read();
    }
}

impl State {
    fn write(&mut self, key: u64) -> io::Result<()> {
        self.done += 1;
        let value = document(self.seed, key, self.done);
        self.client.send(&["SET", &format!("doc:{key}"), &value])?;
        self.client.ok()?;
        self.last[key as usize] = self.done;
        Ok(())
    }

    fn load(&mut self) -> io::Result<()> {
        for first in (0..DOCUMENTS).step_by(PIPELINE as usize) {
            let last = (first + PIPELINE).min(DOCUMENTS);
            for key in first..last {
                let value = document(self.seed, key, key + 1);
                self.client.queue(&["SET", &format!("doc:{key}"), &value])?;
            }
            self.client.flush()?;
            for key in first..last {
                self.client.ok()?;
                self.last[key as usize] = key + 1;
            }
        }
        self.done = DOCUMENTS;
        Ok(())
    }

    fn verify(&mut self) -> io::Result<u64> {
        for first in (0..DOCUMENTS).step_by(PIPELINE as usize) {
            let last = (first + PIPELINE).min(DOCUMENTS);
            for key in first..last {
                self.client.queue(&["GET", &format!("doc:{key}")])?;
            }
            self.client.flush()?;
            for key in first..last {
                let expected = document(self.seed, key, self.last[key as usize]);
                if self.client.read()?.as_deref() != Some(expected.as_str()) {
                    let number = self.last[key as usize];
                    return Err(io::Error::other(format!(
                        "document {key} is not as write {number} left it"
                    )));
                }
            }
        }
        Ok(self.done)
    }
}

/// About 250 bytes of JSON.
fn document(seed: u64, key: u64, number: u64) -> String {
    let word = |at: u64| mix(seed ^ mix(key << 8 | at));
    format!(
        "{{\"seq\":{number},\"id\":{key},\"name\":\"customer-{:05}\",\"mail\":\"c{key}@example.net\",\"city\":\"city-{}\",\
         \"tags\":[\"t{}\",\"t{}\",\"t{}\"],\"balance\":{},\"token\":\"{:016x}{:016x}\",\"note\":\"last changed by write {number} of this machine's own client\"}}",
        word(1) % 100_000,
        word(2) % 900,
        word(3) % 50,
        word(4) % 50,
        word(5) % 50,
        mix(word(6) ^ number) % 1_000_000,
        word(7),
        mix(word(8) ^ number),
    )
}

/// Few documents are written often: the share of a document falls with the square of its place.
fn heavy_tailed(seed: u64, number: u64) -> u64 {
    let unit = (mix(seed ^ mix(number)) >> 11) as f64 / (1_u64 << 53) as f64;
    let place = (unit.powi(4) * DOCUMENTS as f64) as u64;
    mix(place) % DOCUMENTS
}

/// Starts the server, loads the documents and starts the client.
pub(super) fn start(guest: &Guest) -> io::Result<Store> {
    let disk = &guest.order.disk;
    if !disk.join("usr/bin/redis-server").exists() {
        return Err(io::Error::other(
            "this disk has no redis-server; only the standard disk has",
        ));
    }
    let settings = [
        "/bin/busybox",
        "chroot",
        &disk.display().to_string(),
        "/usr/bin/redis-server",
        "--port",
        "0",
        "--unixsocket",
        &format!("/{SOCKET}"),
        "--dir",
        &format!("/{FOLDER}"),
        "--appendonly",
        "yes",
        "--appendfsync",
        "everysec",
        "--auto-aof-rewrite-percentage",
        "0",
        "--save",
        "",
        "--daemonize",
        "no",
    ]
    .map(str::to_owned);
    Command::new(&settings[0])
        .args(&settings[1..])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let client = Client::connect(&disk.join(SOCKET))?;
    let mut state = State {
        client,
        seed: guest.order.seed,
        last: vec![0; DOCUMENTS as usize],
        done: 0,
    };
    state.load()?;
    let state = Arc::new(Mutex::new(state));
    let writer = Arc::clone(&state);
    worker(guest, STREAM, move |guest| write_at_rate(guest, &writer));
    Ok(Store { state })
}

fn write_at_rate(guest: &Guest, state: &Mutex<State>) -> io::Result<()> {
    let start = Instant::now();
    let mut made = 0;
    while guest.gate.is_open() {
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        let key = heavy_tailed(state.seed, state.done);
        state.write(key)?;
        guest.console.acknowledge(STREAM, state.done);
        drop(state);
        guest.console.count(1);
        made += 1;
        let due = Duration::from_micros(made * 1_000_000 / WRITES_PER_SECOND);
        std::thread::sleep(due.saturating_sub(start.elapsed()));
    }
    Ok(())
}

#[derive(Debug)]
struct Client {
    reader: BufReader<UnixStream>,
    writer: io::BufWriter<UnixStream>,
}

impl Client {
    fn connect(socket: &Path) -> io::Result<Self> {
        let start = Instant::now();
        loop {
            match UnixStream::connect(socket) {
                Ok(stream) => {
                    return Ok(Self {
                        writer: io::BufWriter::new(stream.try_clone()?),
                        reader: BufReader::new(stream),
                    });
                }
                Err(error) if start.elapsed() > Duration::from_secs(60) => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    fn queue(&mut self, words: &[&str]) -> io::Result<()> {
        write!(self.writer, "*{}\r\n", words.len())?;
        words
            .iter()
            .try_for_each(|word| write!(self.writer, "${}\r\n{word}\r\n", word.len()))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }

    fn send(&mut self, words: &[&str]) -> io::Result<()> {
        self.queue(words)?;
        self.flush()
    }

    /// One answer: a simple word, or a value (`None` where there is none).
    fn read(&mut self) -> io::Result<Option<String>> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
        }
        let line = line.trim_end();
        let Some(length) = line.strip_prefix('$') else {
            return match line.strip_prefix('-') {
                Some(cause) => Err(io::Error::other(format!("redis: {cause}"))),
                None => Ok(Some(line.trim_start_matches(['+', ':']).to_owned())),
            };
        };
        let Ok(length) = length.parse::<usize>() else {
            return Ok(None);
        };
        let mut value = vec![0; length + 2];
        io::Read::read_exact(&mut self.reader, &mut value)?;
        value.truncate(length);
        String::from_utf8(value).map(Some).map_err(io::Error::other)
    }

    fn ok(&mut self) -> io::Result<()> {
        let answer = self.read()?;
        (answer.as_deref() == Some("OK"))
            .then_some(())
            .ok_or_else(|| io::Error::other(format!("redis said {answer:?}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_have_the_size_of_the_standard_run_and_carry_their_number() {
        let one = document(1, 77_000, 160_000);
        assert!((220..300).contains(&one.len()), "{} bytes: {one}", one.len());
        assert!(one.starts_with("{\"seq\":160000,"));
        assert_ne!(one, document(1, 77_000, 160_001));
    }

    #[test]
    fn few_documents_are_written_often() {
        let mut counts = std::collections::HashMap::new();
        for number in 0..10_000 {
            *counts.entry(heavy_tailed(1, number)).or_insert(0) += 1;
        }
        let mut counts: Vec<u32> = counts.into_values().collect();
        counts.sort_unstable_by(|one, two| two.cmp(one));
        assert!(counts[0] > 100, "{}", counts[0]);
        assert!(counts.len() > 1000, "{}", counts.len());
    }
}
