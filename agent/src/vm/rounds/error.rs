//! Why a running VM's disks cannot be read.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crate::vm::qmp::QmpError;

/// Why a running VM's disks cannot be read.
#[derive(Clone, Debug, thiserror::Error)]
pub enum RoundsError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error(
        "QEMU's NBD server runs already for somebody else, and QEMU has only one; stop it (nbd-server-stop), or name its \
         unix socket in the config"
    )]
    ServerTaken,
    #[error(
        "{} is not the NBD server of this QEMU; name the unix socket on which this VM's NBD server listens, or stop \
         that server", .0.display()
    )]
    NotItsServer(PathBuf),
    #[error("round {0} is still open; finish it or give it back first")]
    RoundOpen(u32),
    #[error("there were 4 billion rounds; start the job anew")]
    TooManyRounds,
    #[error(
        "the bitmap {bitmap} of {node} is gone: somebody removed it; what was written since is unknown, so the disk \
             has to be copied from the start"
    )]
    BitmapLost { node: String, bitmap: String },
    #[error("a dirty bitmap's granularity is a power of two from 4,096 to 65,536 bytes, not {0}")]
    Granularity(u32),
    #[error("{count} connections to this VM's disks are too many; at most {max} fit")]
    TooManySockets { count: usize, max: u32 },
    #[error("cannot make a socket: {0}")]
    Socket(#[source] Arc<io::Error>),
    #[error("'{0}' cannot be part of a bitmap's name: 1 to 32 letters and digits")]
    JobName(String),
}

impl RoundsError {
    pub(super) fn socket(source: io::Error) -> Self {
        Self::Socket(Arc::new(source))
    }
}
