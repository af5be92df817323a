//! Why a migration could not be started or did not get where it should.

use std::io;
use std::sync::Arc;

use crate::vm::qmp::{MigrationStatus, QmpError};

/// Why a migration could not be started or did not get where it should.
#[derive(Clone, Debug, thiserror::Error)]
pub enum OutgoingError {
    #[error(transparent)]
    Qmp(QmpError),
    #[error("this VM is being migrated already; wait for that migration's end or cancel it")]
    AlreadyMigrating,
    #[error(
        "this QEMU is set to encrypt migrations itself (tls-creds is {0:?}); set tls-creds to \"\" for this move"
    )]
    Tls(String),
    #[error("this QEMU has no capability '{0}'; QEMU 7.2 or later is needed")]
    Capability(&'static str),
    #[error("QEMU's migration ended as '{status}'{}", because(desc))]
    Failed { status: MigrationStatus, desc: String },
    #[error(
        "the VM does not run on after the migration was called off: QEMU says '{status}'; see its log, then try \
             'cont' on its monitor"
    )]
    NotRunning { status: String },
    #[error("cannot make a socket for QEMU's migration: {source}")]
    Socket {
        #[source]
        source: Arc<io::Error>,
    },
}

fn because(desc: &str) -> String {
    if desc.is_empty() {
        String::new()
    } else {
        format!(": {desc}")
    }
}
