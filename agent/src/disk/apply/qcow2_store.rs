//! A qcow2 image as a target, written through QEMU itself: a few NBD connections that the writer threads share.
//!
//! Owns the pool of connections and the translation of writes, zeros, flushes and holes. Leaves the format to QEMU, the processes to
//! `qcow2_server`, the protocol to `image::nbd`. A connection that failed is dropped; the next writer makes another.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use longhaul_common::extent::Extent;
use rustix::fs::Advice;

use super::qcow2_server::{self, Server};
use super::store::Store;
use super::{TargetError, TargetOptions};
use crate::disk::image::nbd::{BASE_ALLOCATION, Connection, NbdError, STATE_ZERO, StatusRun};

/// Connections at most, where the server allows several.
const CONNECTIONS: usize = 4;
/// How much is asked about at once.
const STATUS_STEP: u64 = 256 << 20;
/// A qcow2 image holds whole sectors.
const SECTOR: u64 = 512;

/// The size of the image for a disk of `size` bytes.
pub(crate) fn virtual_size(size: u64) -> u64 {
    size.next_multiple_of(SECTOR)
}

pub(crate) struct Qcow2Store {
    pool: Mutex<Pool>,
    returned: Condvar,
    server: Mutex<Server>,
    /// The image's own file, for its cached pages only.
    file: File,
    size: u64,
    preallocated: bool,
    limit: usize,
    /// The last answer about what is allocated, until something is written.
    status: Mutex<Vec<StatusRun>>,
    /// What to do before the image is good: it was open when its agent died.
    repair: Option<(TargetOptions, std::path::PathBuf)>,
}

#[derive(Default)]
struct Pool {
    idle: Vec<Connection>,
    /// Idle, in use, or being made.
    open: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Qcow2Store {
    /// Serves the image `path`, whose opened file is `file`; `resumed` where an earlier server may have been killed.
    pub(crate) fn open(
        options: &TargetOptions,
        path: &Path,
        file: File,
        size: u64,
        resumed: bool,
    ) -> Result<Self, TargetError> {
        qcow2_server::wait_released(&file, path)?;
        let (server, first) = Server::start(options, path, CONNECTIONS)?;
        let limit = if first.export().flags.multi_conn() {
            CONNECTIONS
        } else {
            1
        };
        if first.export().size != virtual_size(size) {
            let reason = format!(
                "qemu-nbd serves {} bytes of it instead of {size}",
                first.export().size
            );
            return Err(TargetError::refused(path, reason));
        }
        Ok(Self {
            pool: Mutex::new(Pool {
                idle: vec![first],
                open: 1,
            }),
            returned: Condvar::new(),
            server: Mutex::new(server),
            file,
            size,
            preallocated: options.preallocate,
            limit,
            status: Mutex::default(),
            repair: resumed.then(|| (options.clone(), path.to_owned())),
        })
    }

    fn with<R>(&self, ask: impl FnOnce(&mut Connection) -> Result<R, NbdError>) -> io::Result<R> {
        let mut lease = self.lease()?;
        let result = match &mut lease.connection {
            Some(connection) => ask(connection),
            None => Err(NbdError::Broken),
        };
        if lease.connection.as_ref().is_some_and(Connection::is_broken) {
            lease.connection = None;
        }
        result.map_err(|error| io::Error::new(error.kind(), error))
    }

    /// Takes a connection that nobody uses, makes one, or waits for one.
    fn lease(&self) -> io::Result<Lease<'_>> {
        let mut pool = lock(&self.pool);
        loop {
            if let Some(connection) = pool.idle.pop() {
                return Ok(Lease {
                    store: self,
                    connection: Some(connection),
                });
            }
            if pool.open < self.limit {
                pool.open += 1;
                drop(pool);
                // From here on the lease gives the place back, whatever happens.
                let mut lease = Lease {
                    store: self,
                    connection: None,
                };
                let made = lock(&self.server).connect();
                lease.connection = Some(made.map_err(|error| io::Error::new(error.kind(), error))?);
                return Ok(lease);
            }
            // Every lease ends within its request's deadline.
            pool = self.returned.wait(pool).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn forget_status(&self) {
        lock(&self.status).clear();
    }
}

struct Lease<'a> {
    store: &'a Qcow2Store,
    connection: Option<Connection>,
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        let mut pool = lock(&self.store.pool);
        match self.connection.take() {
            Some(connection) => pool.idle.push(connection),
            None => pool.open -= 1,
        }
        drop(pool);
        self.store.returned.notify_one();
    }
}

impl Store for Qcow2Store {
    fn write_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()> {
        self.forget_status();
        match parts {
            [one] => self.with(|connection| connection.write(one, offset)),
            // One request instead of many: a copy in memory costs less than a turn through the socket.
            many => {
                let joined = many.concat();
                self.with(|connection| connection.write(&joined, offset))
            }
        }
    }

    fn zero(&self, extent: Extent) -> io::Result<()> {
        self.forget_status();
        self.with(|connection| connection.write_zeroes(extent, self.preallocated))
    }

    fn flush(&self) -> io::Result<()> {
        self.with(Connection::flush)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.with(|connection| connection.read(buf, offset))
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Extent>> {
        let mut status = lock(&self.status);
        let mut at = offset;
        while at < self.size {
            let known = status.last().is_some_and(|last| last.extent.end() > at)
                && status.first().is_some_and(|first| first.extent.offset() <= at);
            if !known {
                let step = Extent::between(at, at.saturating_add(STATUS_STEP).min(self.size));
                *status = self.with(|connection| connection.block_status(BASE_ALLOCATION, step))?;
            }
            let behind = status.partition_point(|run| run.extent.end() <= at);
            if let Some(data) = status[behind..].iter().find(|run| run.flags & STATE_ZERO == 0) {
                return Ok(Some(Extent::between(
                    data.extent.offset().max(at),
                    data.extent.end(),
                )));
            }
            at = status.last().map_or(self.size, |last| last.extent.end());
        }
        Ok(None)
    }

    /// QEMU writes to the file at once; the kernel decides when it reaches the disk.
    fn start_writeback(&self, _extent: Extent) {}

    fn drop_cache(&self) -> io::Result<()> {
        Ok(rustix::fs::fadvise(&self.file, 0, None, Advice::DontNeed)?)
    }

    fn close(&self) -> io::Result<()> {
        let idle = std::mem::take(&mut lock(&self.pool).idle);
        for connection in idle {
            // The server ends with its last client, however that leaves.
            let _ = connection.disconnect();
        }
        lock(&self.server).finish()?;
        match &self.repair {
            Some((options, path)) => qcow2_server::repair_leaks(options, path).map_err(io::Error::other),
            None => Ok(()),
        }
    }
}
