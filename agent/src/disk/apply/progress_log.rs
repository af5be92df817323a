//! The progress log of one target: an append-only file that says which leaves are durable.
//!
//! Owns the file: its lock (one writer of a target at a time), appending with sync, and reading records in order. Leaves the bytes
//! to `record`, their meaning to `replay`, shortening to `compact`. Promises: after `append` returned, the records survive a crash of
//! the host; after it failed, the log is as long as before or refuses everything from then on.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};

use super::place::Dir;
use super::record::{HEAD, HEADER, Head, Header, Record};
use super::{TargetError, blink};

/// A log file that this process alone may use, content not yet looked at.
pub(crate) struct LockedLog {
    pub(crate) dir: Arc<Dir>,
    pub(crate) name: String,
    pub(crate) file: File,
}

impl LockedLog {
    /// Opens and locks the log; `None` where there is none and none shall be made.
    pub(crate) fn open(dir: &Arc<Dir>, name: &str, create: bool) -> Result<Option<Self>, TargetError> {
        let path = dir.join(name);
        let mut flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        flags.set(OFlags::CREATE, create);
        // A log that is replaced or removed between opening and locking is not ours: look again.
        for _ in 0..16 {
            let file = match rustix::fs::openat(&dir.fd, name, flags, Mode::RUSR | Mode::WUSR) {
                Err(rustix::io::Errno::NOENT) if !create => return Ok(None),
                file => File::from(file.map_err(TargetError::during("open", &path))?),
            };
            let metadata = file.metadata().map_err(TargetError::during("examine", &path))?;
            if !metadata.is_file() || metadata.nlink() > 1 {
                return Err(TargetError::refused(
                    &path,
                    "a progress log must be a plain file with one name",
                ));
            }
            let locked = blink::wait_out(|| {
                match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                    Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
                    locked => locked.map(Some),
                }
            });
            if locked.map_err(TargetError::during("lock", &path))?.is_none() {
                return Err(TargetError::in_use(
                    &path,
                    "another session of an agent writes this target",
                ));
            }
            match rustix::fs::statat(&dir.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) if stat.st_ino == metadata.ino() && stat.st_dev == metadata.dev() => {
                    return Ok(Some(Self {
                        dir: dir.clone(),
                        name: name.to_owned(),
                        file,
                    }));
                }
                _ => {}
            }
        }
        Err(TargetError::in_use(
            &path,
            "another session of an agent replaces it again and again",
        ))
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.join(&self.name)
    }

    /// The header; `None` where it is missing or damaged.
    pub(crate) fn header(&self) -> Result<Option<Header>, TargetError> {
        let mut bytes = [0; HEADER];
        match self.file.read_exact_at(&mut bytes, 0) {
            Ok(()) => Ok(Header::decode(&bytes)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(TargetError::during("read", &self.path())(error)),
        }
    }

    /// Empties the log: from now on it belongs to nothing.
    pub(crate) fn clear(&self) -> Result<(), TargetError> {
        self.file
            .set_len(0)
            .and_then(|()| self.file.sync_all())
            .map_err(TargetError::during("clear", &self.path()))
    }

    /// Writes a header to the cleared log.
    pub(crate) fn start(self, header: Header) -> Result<ProgressLog, TargetError> {
        self.bind(&header)?;
        Ok(self.resume(header, HEADER as u64))
    }

    /// Says what the cleared log belongs to, before anything else is done with that.
    pub(crate) fn bind(&self, header: &Header) -> Result<(), TargetError> {
        self.file
            .write_all_at(&header.encode(), 0)
            .and_then(|()| self.file.sync_all())
            .map_err(TargetError::during("write", &self.path()))?;
        self.dir.sync()
    }

    /// Goes on with a log whose first `len` bytes are good.
    pub(crate) fn resume(self, header: Header, len: u64) -> ProgressLog {
        let Self { dir, name, file } = self;
        ProgressLog {
            dir,
            name,
            file: Arc::new(file),
            header,
            len,
            dead: 0,
            broken: false,
        }
    }

    pub(crate) fn remove(&self) -> Result<(), TargetError> {
        self.dir.remove(self.name.as_ref())
    }
}

/// A log in use.
pub(crate) struct ProgressLog {
    pub(crate) dir: Arc<Dir>,
    pub(crate) name: String,
    pub(crate) file: Arc<File>,
    pub(crate) header: Header,
    /// Bytes that count; behind them may lie what a failed append left.
    pub(crate) len: u64,
    /// Bytes of records that say nothing any more, about.
    pub(crate) dead: u64,
    /// Nobody knows what the file holds behind `len`.
    broken: bool,
}

impl ProgressLog {
    pub(crate) fn path(&self) -> PathBuf {
        self.dir.join(&self.name)
    }

    /// Adds `records` and syncs them.
    pub(crate) fn append(&mut self, records: &[Record]) -> Result<(), TargetError> {
        if self.broken {
            return Err(TargetError::Failed { path: self.path() });
        }
        let mut at = self.len;
        let mut bytes = Vec::new();
        for (index, record) in records.iter().enumerate() {
            record.encode(&mut bytes);
            if bytes.len() < 1 << 20 && index + 1 < records.len() {
                continue;
            }
            if let Err(error) = self.file.write_all_at(&bytes, at) {
                self.broken = self.file.set_len(self.len).is_err();
                return Err(TargetError::during("write", &self.path())(error));
            }
            at += bytes.len() as u64;
            bytes.clear();
        }
        if let Err(error) = self.file.sync_data() {
            self.broken = true;
            return Err(TargetError::during("sync", &self.path())(error));
        }
        self.len = at;
        Ok(())
    }

    /// Whether it refuses everything until it is opened again.
    pub(crate) fn is_broken(&self) -> bool {
        self.broken
    }

    /// All records so far, in order.
    pub(crate) fn records(&self) -> Records {
        Records::new(self.file.clone(), self.len, self.header.leaves())
    }
}

struct At {
    file: Arc<File>,
    at: u64,
}

impl Read for At {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buf, self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

/// What comes next in a log.
pub(crate) enum Step {
    Record(Record),
    End,
    /// From here on nothing can be believed.
    Damaged,
}

/// Reads a log from its first record to `end`.
pub(crate) struct Records {
    file: BufReader<At>,
    at: u64,
    end: u64,
    leaves: u64,
}

impl Records {
    pub(crate) fn new(file: Arc<File>, end: u64, leaves: u64) -> Self {
        let at = HEADER as u64;
        Self {
            file: BufReader::with_capacity(64 << 10, At { file, at }),
            at,
            end,
            leaves,
        }
    }

    /// Leaves of the disk it speaks of.
    pub(crate) fn leaves(&self) -> u64 {
        self.leaves
    }

    /// Bytes before the record that comes next.
    pub(crate) fn at(&self) -> u64 {
        self.at
    }

    pub(crate) fn next(&mut self) -> io::Result<Step> {
        if self.at == self.end {
            return Ok(Step::End);
        }
        let mut head = [0; HEAD];
        if !self.fill(&mut head, 0)? {
            return Ok(Step::Damaged);
        }
        let Some(head) = Head::decode(&head, self.leaves) else {
            return Ok(Step::Damaged);
        };
        let mut body = vec![0; head.body_len()];
        if !self.fill(&mut body, HEAD as u64)? {
            return Ok(Step::Damaged);
        }
        let len = (HEAD + body.len()) as u64;
        let Some(record) = head.complete(&body) else {
            return Ok(Step::Damaged);
        };
        self.at += len;
        Ok(Step::Record(record))
    }

    /// `false` where fewer bytes are left, `before` of them read already.
    fn fill(&mut self, buf: &mut [u8], before: u64) -> io::Result<bool> {
        if self.end.saturating_sub(self.at + before) < buf.len() as u64 {
            return Ok(false);
        }
        match self.file.read_exact(buf) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            done => done.map(|()| true),
        }
    }
}
