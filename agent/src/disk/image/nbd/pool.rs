//! A small pool of connections to one export that any number of threads share.
//!
//! Owns who uses which connection. Leaves alone how one is made. Promises: a connection that fell out of step is dropped and
//! replaced by the next user; never more than the limit at a time.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::{Connection, NbdError};

/// Connections to one export.
#[derive(Debug)]
pub(in crate::disk::image) struct Pool {
    state: Mutex<State>,
    returned: Condvar,
    limit: usize,
}

#[derive(Debug, Default)]
struct State {
    idle: Vec<Connection>,
    /// Connections that exist or are being made, idle or in use.
    open: usize,
}

impl Pool {
    /// An empty pool of up to `limit` connections, at least 1.
    pub(in crate::disk::image) fn new(limit: usize) -> Self {
        Self {
            state: Mutex::default(),
            returned: Condvar::new(),
            limit: limit.max(1),
        }
    }

    /// Lets `ask` use a connection that nobody else uses; `connect` makes one where there is room for one more.
    pub(in crate::disk::image) fn with<R>(
        &self,
        connect: impl FnOnce() -> Result<Connection, NbdError>,
        ask: impl FnOnce(&mut Connection) -> Result<R, NbdError>,
    ) -> Result<R, NbdError> {
        let mut lease = self.lease(connect)?;
        let result = match &mut lease.connection {
            Some(connection) => ask(connection),
            None => Err(NbdError::Broken),
        };
        if lease.connection.as_ref().is_some_and(Connection::is_broken) {
            lease.connection = None; // Dropped, not returned.
        }
        result
    }

    /// Says goodbye on all idle connections.
    pub(in crate::disk::image) fn finish(self) {
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        for connection in state.idle {
            let _ = connection.disconnect(); // It ends in any case.
        }
    }

    /// Connections that exist or are being made.
    #[cfg(test)]
    pub(in crate::disk::image) fn open(&self) -> usize {
        self.state().open
    }

    fn lease(&self, connect: impl FnOnce() -> Result<Connection, NbdError>) -> Result<Lease<'_>, NbdError> {
        let mut state = self.state();
        loop {
            let idle = state.idle.pop();
            if idle.is_some() {
                let connection = idle;
                return Ok(Lease {
                    pool: self,
                    connection,
                });
            }
            if state.open < self.limit {
                state.open += 1;
                drop(state);
                // From here on the lease gives the place back, whatever happens.
                let mut lease = Lease {
                    pool: self,
                    connection: None,
                };
                lease.connection = Some(connect()?);
                return Ok(lease);
            }
            // Every lease ends within its request's deadline.
            state = self.returned.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right to use one connection of the pool, or to fill its place.
struct Lease<'a> {
    pool: &'a Pool,
    connection: Option<Connection>,
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        let mut state = self.pool.state();
        match self.connection.take() {
            Some(connection) => state.idle.push(connection),
            None => state.open -= 1,
        }
        drop(state);
        self.pool.returned.notify_one();
    }
}
