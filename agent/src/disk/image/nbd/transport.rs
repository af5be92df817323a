//! Bytes to and from a server, each exchange within its deadline.
//!
//! Owns the socket and the clock. Leaves alone what the bytes mean. Promises: an exchange ends by its
//! deadline even if the server sends one byte a second; every failure names what was going on.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::{NbdError, WireError};

/// How long each phase may take.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// Connecting and the whole handshake; default 10 s.
    pub handshake: Duration,
    /// One read, write or status request of at most 32 MiB; default 60 s, for disks that others keep busy.
    pub transfer: Duration,
    /// One flush, write of zeroes or trim, which may wait for all earlier writes; default 10 min.
    pub settle: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(10),
            transfer: Duration::from_secs(60),
            settle: Duration::from_secs(600),
        }
    }
}

/// A byte stream whose reads and writes fail with `TimedOut` once a deadline has passed.
pub trait Timed: Read + Write {
    fn set_deadline(&mut self, deadline: Instant);
}

/// A unix socket with a deadline.
#[derive(Debug)]
pub struct UnixTransport {
    stream: UnixStream,
    deadline: Instant,
}

impl UnixTransport {
    /// Connects, waiting at most until `deadline` for a listener whose queue is full.
    pub(super) fn connect(socket: &Path, deadline: Instant) -> io::Result<Self> {
        Self::connect_on(unconnected()?, socket, deadline)
    }

    /// The same with a socket that [`unconnected`] made.
    pub(super) fn connect_on(fd: OwnedFd, socket: &Path, deadline: Instant) -> io::Result<Self> {
        let address = SocketAddrUnix::new(socket)?;
        loop {
            match rustix::net::connect(&fd, &address) {
                Ok(()) => break,
                Err(rustix::io::Errno::AGAIN) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(rustix::io::Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Self::new(fd, deadline)
    }

    fn new(fd: OwnedFd, deadline: Instant) -> io::Result<Self> {
        let stream = UnixStream::from(fd);
        stream.set_nonblocking(false)?;
        Ok(Self { stream, deadline })
    }

    pub(super) fn from_stream(stream: UnixStream) -> Self {
        Self {
            stream,
            deadline: Instant::now(),
        }
    }

    fn remaining(&self) -> io::Result<Duration> {
        match self.deadline.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
            // The kernel counts in its own ticks; what rounds to zero would mean "no timeout".
            left => Ok(left.max(Duration::from_millis(1))),
        }
    }
}

/// A socket for one connection later on.
///
/// It does not block yet: a blocking connect to a listener that accepts nothing would wait for ever; std offers no timeout for
/// it.
pub fn unconnected() -> io::Result<OwnedFd> {
    Ok(rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?)
}

impl Timed for UnixTransport {
    fn set_deadline(&mut self, deadline: Instant) {
        self.deadline = deadline;
    }
}

impl Read for UnixTransport {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(self.remaining()?))?;
        self.stream.read(buf)
    }
}

impl Write for UnixTransport {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(self.remaining()?))?;
        self.stream.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// A transport that knows what it is doing at the moment, so that its errors can say so.
#[derive(Debug)]
pub(super) struct Link<T> {
    io: T,
    during: &'static str,
    limit: Duration,
}

impl<T: Timed> Link<T> {
    pub(super) const fn new(io: T) -> Self {
        Self {
            io,
            during: "connect",
            limit: Duration::ZERO,
        }
    }

    /// Starts an exchange that must end within `limit`.
    pub(super) fn begin(&mut self, during: &'static str, limit: Duration) {
        self.during = during;
        self.limit = limit;
        self.io.set_deadline(Instant::now() + limit);
    }

    pub(super) fn read(&mut self, buf: &mut [u8]) -> Result<(), NbdError> {
        self.io.read_exact(buf).map_err(|source| self.failed(source))
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], NbdError> {
        let mut bytes = [0; N];
        self.read(&mut bytes)?;
        Ok(bytes)
    }

    /// Reads a payload whose length the decoder has already bounded.
    pub(super) fn payload(&mut self, len: u64) -> Result<Vec<u8>, NbdError> {
        let len =
            usize::try_from(len).map_err(|_| self.violation(WireError::Truncated { what: "a payload" }))?;
        let mut bytes = vec![0; len];
        self.read(&mut bytes)?;
        Ok(bytes)
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), NbdError> {
        self.io.write_all(bytes).map_err(|source| self.failed(source))
    }

    pub(super) const fn violation(&self, source: WireError) -> NbdError {
        NbdError::Protocol {
            during: self.during,
            source,
        }
    }

    fn failed(&self, source: io::Error) -> NbdError {
        let during = self.during;
        match source.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                NbdError::Closed { during }
            }
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => NbdError::Timeout {
                during,
                limit: self.limit,
            },
            _ => NbdError::Io { during, source },
        }
    }
}
