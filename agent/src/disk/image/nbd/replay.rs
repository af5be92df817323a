//! A server whose bytes are known in advance: for fuzzing a whole session.

use std::io::{self, Read, Write};
use std::time::Instant;

use longhaul_common::extent::Extent;

use super::connection::Connection;
use super::transport::Timed;
use super::{BASE_ALLOCATION, ConnectOptions, NbdError};

/// Plays one whole session of the client against canned bytes of a server: handshake, a read, a status query,
/// a flush.
///
/// The entry for fuzzing: whatever the bytes are, this returns, without a panic and with little memory.
pub fn replay(server: &[u8]) -> Result<(), NbdError> {
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

impl Read for Canned<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl Write for Canned<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Timed for Canned<'_> {
    fn set_deadline(&mut self, _: Instant) {}
}
