//! New certificates and revocation lists without a restart.
//!
//! Owns watching the identity files: every two seconds their inode, size and modification time are compared, and when one of
//! them changed and then stood still for a tick, all are read again. Looking needs no kernel interface that a network
//! file system, a bind mount or a symlink swap could defeat.
//!
//! Promises: files that cannot be used leave the old ones in use, with one error in the log per change; a link is closed
//! within one tick after its peer's certificate expired. What new files mean for handshakes and links is `tls`.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::task::JoinHandle;

use super::credentials::{CredentialsError, FileMarks};
use super::tls::TlsState;

/// How often the files are looked at.
const TICK: Duration = Duration::from_secs(2);

/// Watches the files behind a [`TlsState`] until it is dropped.
pub struct Reloader {
    state: Arc<TlsState>,
    task: JoinHandle<()>,
}

impl Reloader {
    /// Begins to watch. Must be called within a tokio runtime.
    pub fn watch(state: &Arc<TlsState>) -> Self {
        Self::watch_every(state, TICK)
    }

    /// Begins to watch with another tick than 2 s.
    pub fn watch_every(state: &Arc<TlsState>, tick: Duration) -> Self {
        let task = tokio::spawn(watch(Arc::clone(state), tick));
        Self {
            state: Arc::clone(state),
            task,
        }
    }

    /// Reads the files now, as after SIGHUP.
    ///
    /// # Errors
    /// Why the files cannot be used; the old ones stay in use.
    pub async fn reload(&self) -> Result<(), CredentialsError> {
        read_again(&self.state).await
    }
}

impl Drop for Reloader {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn watch(state: Arc<TlsState>, tick: Duration) {
    let mut ticks = tokio::time::interval(tick);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut last = look(&state).await;
    loop {
        ticks.tick().await;
        state.close_expired(SystemTime::now());
        let now = look(&state).await;
        // A change is acted upon when it stood still for one tick: certificate and key are two files. What counts is what was
        // read, not what was looked at first: files may change between a program's start and the first look.
        let settled = now == last;
        last = now;
        if settled
            && !state.was_read_from(&last)
            && let Err(error) = read_again(&state).await
        {
            tracing::error!(
                "the changed identity files are not used, the old ones stay: {}",
                chain(&error)
            );
        }
    }
}

async fn read_again(state: &Arc<TlsState>) -> Result<(), CredentialsError> {
    let reader = Arc::clone(state);
    let read = tokio::task::spawn_blocking(move || reader.reload()).await;
    read.unwrap_or(Ok(())) // a join error means that the runtime stops
}

async fn look(state: &Arc<TlsState>) -> FileMarks {
    let paths = state.paths().clone();
    tokio::task::spawn_blocking(move || paths.marks())
        .await
        .unwrap_or_default()
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
