//! One connection to an export, one command at a time.
//!
//! Owns the commands as callers see them: ranges checked, alignment kept, what is larger than the server
//! takes split. Leaves alone the exchange of one request (`exchange`), pools of connections and the server's
//! life. Promises: a command returns only when its reply is whole.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use longhaul_common::extent::Extent;

use super::export::{Export, Headers};
use super::handshake;
use super::request::{Command, FLAG_NO_HOLE};
use super::transport::{Link, Timed, Timeouts, UnixTransport};
use super::{ConnectOptions, NbdError};

/// Longest zeroing or trim in one request where 64-bit lengths were agreed on: long enough to cost nothing,
/// short enough to end within its deadline.
const EFFECT_MAX: u64 = 1 << 30;

/// A connection to an export. Commands take `&mut self`; for more in parallel, open several.
#[derive(Debug)]
pub struct Connection<T = UnixTransport> {
    pub(super) link: Link<T>,
    pub(super) export: Export,
    pub(super) timeouts: Timeouts,
    /// Of the last request.
    pub(super) cookie: u64,
    pub(super) broken: bool,
}

/// A run of bytes in one state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusRun {
    pub extent: Extent,
    /// As the metadata context defines them: [`super::STATE_HOLE`], [`super::STATE_ZERO`],
    /// [`super::STATE_DIRTY`].
    pub flags: u64,
}

impl Connection<UnixTransport> {
    /// Connects to the export `export` of the server at `socket`, asking for `base:allocation`.
    pub fn connect(socket: &Path, export: &str) -> Result<Self, NbdError> {
        Self::connect_with(socket, export, &ConnectOptions::default())
    }

    /// Connects with chosen metadata contexts and timeouts.
    pub fn connect_with(socket: &Path, export: &str, options: &ConnectOptions) -> Result<Self, NbdError> {
        let deadline = Instant::now() + options.timeouts.handshake;
        let transport = UnixTransport::connect(socket, deadline).map_err(|source| NbdError::Io {
            during: "connect",
            source,
        })?;
        Self::over(transport, export, options)
    }

    /// The same with a socket made before, by [`super::unconnected`].
    pub fn connect_on(
        fd: OwnedFd,
        socket: &Path,
        export: &str,
        options: &ConnectOptions,
    ) -> Result<Self, NbdError> {
        let deadline = Instant::now() + options.timeouts.handshake;
        let transport = UnixTransport::connect_on(fd, socket, deadline);
        let transport = transport.map_err(|source| NbdError::Io {
            during: "connect",
            source,
        })?;
        Self::over(transport, export, options)
    }

    /// Speaks over a socket that is already connected.
    pub fn from_stream(stream: UnixStream, export: &str, options: &ConnectOptions) -> Result<Self, NbdError> {
        Self::over(UnixTransport::from_stream(stream), export, options)
    }
}

impl<T: Timed> Connection<T> {
    /// Speaks over any byte stream with deadlines.
    pub fn over(transport: T, export: &str, options: &ConnectOptions) -> Result<Self, NbdError> {
        let mut link = Link::new(transport);
        let export = handshake::negotiate(&mut link, export, options)?;
        Ok(Self {
            link,
            export,
            timeouts: options.timeouts,
            cookie: 0,
            broken: false,
        })
    }

    /// What is served.
    pub const fn export(&self) -> &Export {
        &self.export
    }

    /// Whether an earlier failure left the connection out of step; it then refuses every command.
    pub const fn is_broken(&self) -> bool {
        self.broken
    }

    /// Fills `buf` from `offset` on. Any alignment: what the server cannot give alone is read with its
    /// surroundings.
    pub fn read(&mut self, buf: &mut [u8], offset: u64) -> Result<(), NbdError> {
        self.check_range(offset, buf.len() as u64)?;
        let min = u64::from(self.export.block.min);
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let rest = &mut buf[done..];
            let blocks = rest.len().min(self.export.block.max as usize) as u64 / min * min;
            if at.is_multiple_of(min) && blocks > 0 {
                self.read_blocks(&mut rest[..blocks as usize], at)?;
                done += blocks as usize;
            } else {
                let start = at / min * min;
                // At most 64 KiB; the export's size is a multiple of it.
                let mut block = vec![0; min as usize];
                self.read_blocks(&mut block, start)?;
                let inside = &block[(at - start) as usize..];
                let taken = inside.len().min(rest.len());
                rest[..taken].copy_from_slice(&inside[..taken]);
                done += taken;
            }
        }
        Ok(())
    }

    /// Writes `data` at `offset`; both ends at multiples of the server's smallest block. Durable after
    /// [`Self::flush`].
    pub fn write(&mut self, data: &[u8], offset: u64) -> Result<(), NbdError> {
        self.check_aligned(Command::Write, offset, data.len() as u64)?;
        let mut at = offset;
        for piece in data.chunks(self.export.block.max as usize) {
            self.simple(Command::Write, 0, at, piece.len() as u64, piece)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Makes `range` read as zero; `no_hole` keeps (or makes) it allocated. Aligned as [`Self::write`].
    pub fn write_zeroes(&mut self, range: Extent, no_hole: bool) -> Result<(), NbdError> {
        if !self.export.flags.write_zeroes() {
            return Err(NbdError::Unusable(
                "the NBD server has no command to write zeroes".into(),
            ));
        }
        self.effect(
            Command::WriteZeroes,
            if no_hole { FLAG_NO_HOLE } else { 0 },
            range,
        )
    }

    /// Gives back the space of `range`, whose content becomes unknown. Aligned as [`Self::write`].
    pub fn trim(&mut self, range: Extent) -> Result<(), NbdError> {
        if !self.export.flags.trim() {
            return Err(NbdError::Unusable("the NBD server has no trim command".into()));
        }
        self.effect(Command::Trim, 0, range)
    }

    /// Makes every completed write of this connection durable (of all connections, where [`multi_conn`]
    /// holds).
    ///
    /// [`multi_conn`]: super::ExportFlags::multi_conn
    pub fn flush(&mut self) -> Result<(), NbdError> {
        if !self.export.flags.flush() {
            return Err(NbdError::Unusable(
                "the NBD server has no flush command: nothing would be durable".into(),
            ));
        }
        self.simple(Command::Flush, 0, 0, 0, &[])
    }

    /// The state of `range` in a negotiated metadata context: runs in order that cover it exactly, neighbours
    /// differing.
    ///
    /// An error where more than 1 Mi runs would be needed: ask for smaller ranges.
    pub fn block_status(&mut self, context: &str, range: Extent) -> Result<Vec<StatusRun>, NbdError> {
        let Some(id) = self
            .export
            .contexts
            .iter()
            .find(|known| known.name == context)
            .map(|known| known.id)
        else {
            return Err(NbdError::Unusable(format!(
                "the NBD server gave no metadata context {context:?}"
            )));
        };
        self.check_range(range.offset(), range.len())?;
        // The query must be aligned; its answer is cut back to what was asked for.
        let min = u64::from(self.export.block.min);
        let end = range.end().next_multiple_of(min);
        let mut at = range.offset() / min * min;
        let mut runs = Vec::new();
        while at < end {
            let longest = match self.export.headers {
                Headers::Extended => end - at,
                Headers::Simple | Headers::Structured => (end - at).min(u64::from(u32::MAX) / min * min),
            };
            at = self.guarded(|this| this.status_once(id, at, longest, range, &mut runs))?;
        }
        Ok(runs)
    }

    /// Ends the session in good order.
    pub fn disconnect(mut self) -> Result<(), NbdError> {
        self.guarded(|this| {
            this.send(Command::Disconnect, 0, 0, 0, &[])?;
            Ok(())
        })
    }

    fn check_range(&self, offset: u64, len: u64) -> Result<(), NbdError> {
        let size = self.export.size;
        match offset.checked_add(len) {
            Some(end) if end <= size => Ok(()),
            _ => Err(NbdError::OutOfRange { offset, len, size }),
        }
    }

    fn check_aligned(&self, command: Command, offset: u64, len: u64) -> Result<(), NbdError> {
        self.check_range(offset, len)?;
        let min = self.export.block.min;
        if offset.is_multiple_of(min.into()) && len.is_multiple_of(min.into()) {
            return Ok(());
        }
        Err(NbdError::Misaligned {
            command: command.during(),
            offset,
            len,
            min,
        })
    }

    /// A command that acts on a range without carrying its content, in steps that fit.
    fn effect(&mut self, command: Command, flags: u16, range: Extent) -> Result<(), NbdError> {
        self.check_aligned(command, range.offset(), range.len())?;
        let step = match self.export.headers {
            Headers::Extended => EFFECT_MAX,
            Headers::Simple | Headers::Structured => self.export.block.max.into(),
        };
        let mut at = range.offset();
        while at < range.end() {
            let len = step.min(range.end() - at);
            self.simple(command, flags, at, len, &[])?;
            at += len;
        }
        Ok(())
    }
}
