//! Reading an image through a server of our own, with connections that any number of threads share.
//!
//! Leaves alone the protocol and the pool of connections (`nbd`) and the process (`server`). Promises: a failure says
//! which program serves the image and what it said last.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use longhaul_common::extent::Extent;
use serde_json::Value;

use super::error::ImageError;
use super::nbd::{
    BASE_ALLOCATION, ConnectOptions, Connection, NbdError, Pool, STATE_HOLE, STATE_ZERO, StatusRun,
};
use super::server::{Programs, Server};
use super::{Allocation, Run, Runs};

/// How much is asked about at once.
const STATUS_STEP: u64 = 1 << 30;
/// How much is read between two reminders to the kernel that the image's pages need not be kept.
const FORGET_STEP: u64 = 256 << 20;

/// An image that a server reads for us.
#[derive(Debug)]
pub(super) struct ServedImage {
    // Fields are dropped in this order: clients first, then the server.
    pool: Pool,
    /// Never used for requests: keeps the server from leaving while the pool replaces its connections.
    anchor: Connection,
    server: Server,
    connect: ConnectOptions,
    size: u64,
    has_allocation: bool,
    read: AtomicU64,
}

impl ServedImage {
    pub(super) fn start(
        programs: Programs<'_>,
        options: &Value,
        connections: usize,
        run_dir: &std::path::Path,
    ) -> Result<Self, ImageError> {
        let limit = connections.clamp(1, 64);
        let connect = ConnectOptions::default();
        let (server, anchor) = Server::start(programs, options, limit + 1, run_dir, &connect)?;
        let export = anchor.export();
        let has_allocation = export
            .contexts
            .iter()
            .any(|context| context.name == BASE_ALLOCATION);
        let size = export.size;
        Ok(Self {
            pool: Pool::new(limit),
            anchor,
            server,
            connect,
            size,
            has_allocation,
            read: AtomicU64::new(0),
        })
    }

    pub(super) const fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.with_connection(|connection| connection.read(buf, offset))
    }

    /// Whether so much was read by now that the image's cached pages should be given back.
    pub(super) fn is_time_to_forget(&self, len: u64) -> bool {
        let before = self.read.fetch_add(len, Ordering::Relaxed);
        before / FORGET_STEP != before.wrapping_add(len) / FORGET_STEP
    }

    pub(super) fn allocation(&self, range: Extent) -> io::Result<Vec<Run>> {
        let mut runs = Runs::new(range);
        while !runs.is_complete() {
            let end = runs.end().saturating_add(STATUS_STEP).min(range.end());
            let step = Extent::between(runs.end(), end);
            let told = if self.has_allocation {
                self.with_connection(|connection| connection.block_status(BASE_ALLOCATION, step))?
            } else {
                vec![StatusRun {
                    extent: step,
                    flags: 0,
                }]
            };
            for run in told {
                runs.push_until(run.extent.end(), state(run.flags));
            }
        }
        Ok(runs.finish())
    }

    /// Says goodbye and waits for the server's end.
    pub(super) fn finish(self) {
        self.pool.finish();
        let _ = self.anchor.disconnect(); // The server is going away in any case.
        self.server.finish();
    }

    fn with_connection<R>(&self, ask: impl FnOnce(&mut Connection) -> Result<R, NbdError>) -> io::Result<R> {
        let connect = || self.server.connect(&self.connect);
        self.pool.with(connect, ask).map_err(|error| self.failed(&error))
    }

    fn failed(&self, error: &NbdError) -> io::Error {
        io::Error::new(error.kind(), format!("{error}; {}", self.server.last_words()))
    }
}

/// What a copy may make of `base:allocation`. A hole that is not said to read as zero has to be read.
pub(super) const fn state(flags: u64) -> Allocation {
    match (flags & STATE_ZERO != 0, flags & STATE_HOLE != 0) {
        (true, true) => Allocation::Hole,
        (true, false) => Allocation::Zero,
        (false, _) => Allocation::Data,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_server_is_named_with_its_last_words() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk.raw");
        std::fs::write(&image, vec![1; 1 << 20]).unwrap();
        let options = serde_json::json!({
            "driver": "raw",
            "read-only": true,
            "file": { "driver": "file", "filename": image.to_str().unwrap() },
        });
        let programs = Programs {
            qemu_nbd: std::path::Path::new("qemu-nbd"),
            storage_daemon: std::path::Path::new("qemu-storage-daemon"),
        };
        let mut served = ServedImage::start(programs, &options, 2, folder.path())
            .expect("qemu-nbd of the Debian package qemu-utils");
        let mut buf = [0; 4096];
        served.read_exact_at(&mut buf, 0).unwrap();
        served.server.kill();
        let errors: Vec<_> = (0..3)
            .map(|_| served.read_exact_at(&mut buf, 0).unwrap_err().to_string())
            .collect();
        for error in &errors {
            assert!(
                error.contains("qemu-nbd (process ") && error.contains("the NBD server"),
                "{error}"
            );
        }
        assert_eq!(served.pool.open(), 0);
    }
}
