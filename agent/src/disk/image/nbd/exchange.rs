//! One exchange: a request goes out, its reply's chunks come back and are held against it.
//!
//! Owns what of a reply may be believed. Leaves alone splitting and alignment (`connection`). Promises:
//! whatever leaves the stream out of step with the server makes the connection unusable.

use longhaul_common::extent::Extent;

use super::connection::{Connection, StatusRun};
use super::coverage::Coverage;
use super::decode::{self, Chunk, ChunkKind, ServerError};
use super::export::Headers;
use super::request::{Command, Request};
use super::transport::Timed;
use super::{NbdError, WireError};

/// Most chunks of one reply: a 32 MiB read in pieces of 512 bytes, and as much again.
const CHUNKS_MAX: usize = 1 << 17;
/// Most runs that one status query gives: about 24 MiB of memory.
const RUNS_MAX: usize = 1 << 20;

impl<T: Timed> Connection<T> {
    /// Runs one exchange; whatever leaves the stream out of step (a panic too) makes the connection unusable.
    pub(super) fn guarded<R>(
        &mut self,
        exchange: impl FnOnce(&mut Self) -> Result<R, NbdError>,
    ) -> Result<R, NbdError> {
        if self.broken {
            return Err(NbdError::Broken);
        }
        self.broken = true;
        let result = exchange(self);
        self.broken = result.as_ref().is_err_and(|error| !error.keeps_connection());
        result
    }

    pub(super) fn send(
        &mut self,
        command: Command,
        flags: u16,
        offset: u64,
        len: u64,
        data: &[u8],
    ) -> Result<Request, NbdError> {
        self.link.begin(command.during(), command.limit(&self.timeouts));
        self.cookie = self.cookie.wrapping_add(1);
        let request = Request {
            command,
            offset,
            len,
            cookie: self.cookie,
        };
        let header = request.encode(self.export.headers, flags)?;
        self.link.write(&header)?;
        if !data.is_empty() {
            self.link.write(data)?;
        }
        Ok(request)
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

    /// Takes chunks until the last one. `take` handles those that carry data; errors are kept until the reply
    /// is whole.
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
    pub(super) fn simple(
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

    pub(super) fn read_blocks(&mut self, buf: &mut [u8], offset: u64) -> Result<(), NbdError> {
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
    pub(super) fn status_once(
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
