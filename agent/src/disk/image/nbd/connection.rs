//! One connection to an export, one command at a time.
//!
//! Owns requests, and what of the server's replies may be believed. Leaves alone pools of connections and the server's
//! life. Promises: a command returns only when its reply is whole; a reply that does not fit its request ends the
//! connection; commands larger than the server takes are split.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use longhaul_common::extent::Extent;

use super::coverage::Coverage;
use super::decode::{self, Chunk, ChunkKind, ServerError};
use super::export::{Export, Headers};
use super::handshake;
use super::transport::{Link, Timed, Timeouts, UnixTransport};
use super::{BASE_ALLOCATION, ConnectOptions, NbdError, WireError};

const MAGIC_REQUEST: u32 = 0x2560_9513;
const MAGIC_REQUEST_EXTENDED: u32 = 0x21e4_1c71;
const FLAG_NO_HOLE: u16 = 1 << 1;
const FLAG_PAYLOAD_LEN: u16 = 1 << 5;
/// Longest zeroing or trim in one request where 64-bit lengths were agreed on: long enough to cost nothing, short enough to
/// end within its deadline.
const EFFECT_MAX: u64 = 1 << 30;
/// Most chunks of one reply: a 32 MiB read in pieces of 512 bytes, and as much again.
const CHUNKS_MAX: usize = 1 << 17;
/// Most runs that one status query gives: about 24 MiB of memory.
const RUNS_MAX: usize = 1 << 20;

/// A connection to an export. Commands take `&mut self`; for more in parallel, open several.
#[derive(Debug)]
pub struct Connection<T = UnixTransport> {
    link: Link<T>,
    export: Export,
    timeouts: Timeouts,
    cookie: u64,
    broken: bool,
}

/// A run of bytes in one state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusRun {
    pub extent: Extent,
    /// As the metadata context defines them: [`super::STATE_HOLE`], [`super::STATE_ZERO`], [`super::STATE_DIRTY`].
    pub flags: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Command {
    Read = 0,
    Write = 1,
    Disconnect = 2,
    Flush = 3,
    Trim = 4,
    WriteZeroes = 6,
    BlockStatus = 7,
}

impl Command {
    const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Disconnect => "disconnect",
            Self::Flush => "flush",
            Self::Trim => "trim",
            Self::WriteZeroes => "zero",
            Self::BlockStatus => "tell the state of",
        }
    }

    const fn during(self) -> &'static str {
        match self {
            Self::Read => "a read",
            Self::Write => "a write",
            Self::Disconnect => "the farewell",
            Self::Flush => "a flush",
            Self::Trim => "a trim",
            Self::WriteZeroes => "a write of zeroes",
            Self::BlockStatus => "a block status query",
        }
    }

    const fn limit(self, timeouts: &Timeouts) -> Duration {
        match self {
            Self::Read | Self::Write | Self::BlockStatus | Self::Disconnect => timeouts.transfer,
            Self::Flush | Self::Trim | Self::WriteZeroes => timeouts.settle,
        }
    }
}

/// A request under way.
#[derive(Clone, Copy)]
struct Request {
    command: Command,
    offset: u64,
    len: u64,
    cookie: u64,
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

    /// Fills `buf` from `offset` on. Any alignment: what the server cannot give alone is read with its surroundings.
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
                let mut block = vec![0; min as usize]; // At most 64 KiB; the export's size is a multiple of it.
                self.read_blocks(&mut block, start)?;
                let inside = &block[(at - start) as usize..];
                let taken = inside.len().min(rest.len());
                rest[..taken].copy_from_slice(&inside[..taken]);
                done += taken;
            }
        }
        Ok(())
    }

    /// Writes `data` at `offset`; both ends at multiples of the server's smallest block. Durable after [`Self::flush`].
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

    /// Makes every completed write of this connection durable (of all connections, where [`multi_conn`] holds).
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

    /// The state of `range` in a negotiated metadata context: runs in order that cover it exactly, neighbours differing.
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

    /// Runs one exchange; whatever leaves the stream out of step (a panic too) makes the connection unusable.
    fn guarded<R>(&mut self, exchange: impl FnOnce(&mut Self) -> Result<R, NbdError>) -> Result<R, NbdError> {
        if self.broken {
            return Err(NbdError::Broken);
        }
        self.broken = true;
        let result = exchange(self);
        self.broken = result.as_ref().is_err_and(|error| !error.keeps_connection());
        result
    }

    fn send(
        &mut self,
        command: Command,
        flags: u16,
        offset: u64,
        len: u64,
        data: &[u8],
    ) -> Result<Request, NbdError> {
        self.link.begin(command.during(), command.limit(&self.timeouts));
        self.cookie = self.cookie.wrapping_add(1);
        let extended = self.export.headers == Headers::Extended;
        // With extended headers, a length says whether it is the payload's or the effect's.
        let flags = if extended && command == Command::Write {
            flags | FLAG_PAYLOAD_LEN
        } else {
            flags
        };
        let magic = if extended {
            MAGIC_REQUEST_EXTENDED
        } else {
            MAGIC_REQUEST
        };
        let mut header = Vec::with_capacity(32);
        header.extend_from_slice(&magic.to_be_bytes());
        header.extend_from_slice(&flags.to_be_bytes());
        header.extend_from_slice(&(command as u16).to_be_bytes());
        header.extend_from_slice(&self.cookie.to_be_bytes());
        header.extend_from_slice(&offset.to_be_bytes());
        if extended {
            header.extend_from_slice(&len.to_be_bytes());
        } else {
            let len = u32::try_from(len).map_err(|_| {
                NbdError::Unusable(format!(
                    "a request of {len} bytes does not fit in a 32-bit NBD header"
                ))
            })?;
            header.extend_from_slice(&len.to_be_bytes());
        }
        self.link.write(&header)?;
        if !data.is_empty() {
            self.link.write(data)?;
        }
        Ok(Request {
            command,
            offset,
            len,
            cookie: self.cookie,
        })
    }

    fn next_chunk(&mut self, request: &Request) -> Result<Chunk, NbdError> {
        // The shortest header of all is 16 bytes; the magic number tells how many more belong to it.
        let mut header = [0; 32];
        self.link.read(&mut header[..16])?;
        let magic = [header[0], header[1], header[2], header[3]];
        let len =
            decode::header_len(magic, self.export.headers).map_err(|error| self.link.violation(error))?;
        self.link.read(&mut header[16..len])?;
        let chunk = decode::chunk(&header[..len]).map_err(|error| self.link.violation(error))?;
        if chunk.cookie != request.cookie {
            return Err(self
                .link
                .violation(WireError::Contradiction("a reply belongs to no request")));
        }
        Ok(chunk)
    }

    /// Takes chunks until the last one. `take` handles those that carry data; errors are kept until the reply is whole.
    fn reply(
        &mut self,
        request: &Request,
        mut take: impl FnMut(&mut Self, &Chunk) -> Result<(), NbdError>,
    ) -> Result<(), NbdError> {
        let mut failure: Option<ServerError> = None;
        for _ in 0..CHUNKS_MAX {
            let chunk = self.next_chunk(request)?;
            match chunk.kind {
                ChunkKind::SimpleError(code) => {
                    failure = Some(ServerError {
                        code,
                        message: String::new(),
                    })
                }
                ChunkKind::Error { with_offset } => {
                    let payload = self.link.payload(chunk.len)?;
                    let error =
                        decode::error(&payload, with_offset).map_err(|error| self.link.violation(error))?;
                    failure.get_or_insert(error);
                }
                ChunkKind::None => {}
                _ => take(self, &chunk)?,
            }
            if chunk.done {
                let Request {
                    command, offset, len, ..
                } = *request;
                let command = command.name();
                return failure.map_or(Ok(()), |error| {
                    Err(NbdError::Command {
                        command,
                        offset,
                        len,
                        error,
                    })
                });
            }
        }
        Err(self
            .link
            .violation(WireError::Contradiction("a reply has too many chunks")))
    }

    fn misplaced(&self) -> NbdError {
        self.link.violation(WireError::Contradiction(
            "a reply's chunk does not fit its request",
        ))
    }

    /// A command whose reply carries nothing.
    fn simple(
        &mut self,
        command: Command,
        flags: u16,
        offset: u64,
        len: u64,
        data: &[u8],
    ) -> Result<(), NbdError> {
        self.guarded(|this| {
            let request = this.send(command, flags, offset, len, data)?;
            this.reply(&request, |this, chunk| match chunk.kind {
                ChunkKind::Simple => Ok(()),
                _ => Err(this.misplaced()),
            })
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

    fn read_blocks(&mut self, buf: &mut [u8], offset: u64) -> Result<(), NbdError> {
        self.guarded(|this| {
            let len = buf.len() as u64;
            let request = this.send(Command::Read, 0, offset, len, &[])?;
            let mut coverage = Coverage::new(offset, offset + len);
            this.reply(&request, |this, chunk| {
                this.take_data(chunk, buf, offset, &mut coverage)
            })?;
            if coverage.is_whole() {
                return Ok(());
            }
            Err(this
                .link
                .violation(WireError::Contradiction("a read was answered only in part")))
        })
    }

    fn take_data(
        &mut self,
        chunk: &Chunk,
        buf: &mut [u8],
        offset: u64,
        coverage: &mut Coverage,
    ) -> Result<(), NbdError> {
        match chunk.kind {
            ChunkKind::Simple if self.export.headers == Headers::Simple => {
                let place = coverage
                    .add(offset, buf.len() as u64)
                    .map_err(|error| self.link.violation(error))?;
                self.link.read(&mut buf[place])
            }
            ChunkKind::OffsetData => {
                let at = decode::data_offset(self.link.array()?);
                let place = coverage
                    .add(at, chunk.len - 8)
                    .map_err(|error| self.link.violation(error))?;
                self.link.read(&mut buf[place])
            }
            ChunkKind::OffsetHole => {
                let payload = self.link.array()?;
                let (at, len) = decode::hole(&payload).map_err(|error| self.link.violation(error))?;
                let place = coverage
                    .add(at, len.into())
                    .map_err(|error| self.link.violation(error))?;
                buf[place].fill(0);
                Ok(())
            }
            _ => Err(self.misplaced()),
        }
    }

    /// Asks once, appends what was told to `runs`, and gives the first byte that is still unknown.
    fn status_once(
        &mut self,
        context: u32,
        at: u64,
        len: u64,
        range: Extent,
        runs: &mut Vec<StatusRun>,
    ) -> Result<u64, NbdError> {
        let request = self.send(Command::BlockStatus, 0, at, len, &[])?;
        let mut told = None;
        self.reply(&request, |this, chunk| {
            let ChunkKind::BlockStatus { wide } = chunk.kind else {
                return Err(this.misplaced());
            };
            let payload = this.link.payload(chunk.len)?;
            let status = decode::block_status(&payload, wide).map_err(|error| this.link.violation(error))?;
            if status.context == context && told.replace(status.runs).is_some() {
                return Err(this
                    .link
                    .violation(WireError::Contradiction("a context was answered twice")));
            }
            Ok(())
        })?;
        let Some(told) = told else {
            return Err(self
                .link
                .violation(WireError::Contradiction("a status query was not answered")));
        };
        let mut at = at;
        let end = at + len;
        for (len, flags) in told {
            // The last run may reach beyond what was asked for; nothing may follow it.
            if at >= end {
                return Err(self
                    .link
                    .violation(WireError::Contradiction("more state was told than was asked for")));
            }
            let run = Extent::between(at, at.saturating_add(len).min(end));
            at = run.end();
            if let Some(extent) = run.intersect(&range) {
                push_run(runs, StatusRun { extent, flags })?;
            }
        }
        Ok(at)
    }
}

/// Appends a run, merged with the one before where both have the same state.
fn push_run(runs: &mut Vec<StatusRun>, run: StatusRun) -> Result<(), NbdError> {
    if let Some(last) = runs.last_mut().filter(|last| last.flags == run.flags) {
        last.extent = Extent::between(last.extent.offset(), run.extent.end());
        return Ok(());
    }
    if runs.len() == RUNS_MAX {
        return Err(NbdError::Unusable(format!(
            "the range has more than {RUNS_MAX} runs: ask for smaller ranges"
        )));
    }
    runs.push(run);
    Ok(())
}

/// See [`super::replay`].
pub(super) fn replay(server: &[u8]) -> Result<(), NbdError> {
    let mut connection = Connection::over(Canned(server), "disk", &ConnectOptions::default())?;
    let size = connection.export().size;
    let mut buf = vec![0; size.min(64 * 1024) as usize];
    connection.read(&mut buf, 0)?;
    connection.block_status(BASE_ALLOCATION, Extent::between(0, size.min(1 << 20)))?;
    connection.flush()?;
    connection.disconnect()
}

/// A server whose bytes are known in advance and that listens to nothing.
struct Canned<'a>(&'a [u8]);

impl std::io::Read for Canned<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(buf)
    }
}

impl std::io::Write for Canned<'_> {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        Ok(buf.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Timed for Canned<'_> {
    fn set_deadline(&mut self, _: Instant) {}
}
