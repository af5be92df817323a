//! The gate through which every worker passes before each operation.
//!
//! Owns closing it for good and waiting until nobody is inside an operation. Promises that after `close` no
//! worker starts another one, so that what is in memory and on disk stands still.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

#[derive(Debug, Default)]
struct State {
    closed: bool,
    working: Vec<String>,
}

/// Open until it is closed.
#[derive(Debug, Default)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A worker begins.
    pub fn enter(&self, name: &str) {
        self.state().working.push(name.to_owned());
    }

    /// A worker has ended.
    pub fn leave(&self, name: &str) {
        let mut state = self.state();
        if let Some(at) = state.working.iter().position(|worker| worker == name) {
            state.working.remove(at);
        }
        self.changed.notify_all();
    }

    /// Whether another operation may begin; a worker that hears no must end.
    pub fn is_open(&self) -> bool {
        !self.state().closed
    }

    /// Closes it and waits until every worker has ended.
    ///
    /// # Errors
    /// Who is still inside an operation after `limit`.
    pub fn close(&self, limit: Duration) -> Result<(), Vec<String>> {
        let mut state = self.state();
        state.closed = true;
        let inside = |state: &mut State| !state.working.is_empty();
        let waited = self.changed.wait_timeout_while(state, limit, inside);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match state.working.is_empty() {
            true => Ok(()),
            false => Err(state.working.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_closed_gate_has_nobody_inside() {
        let gate = Arc::new(Gate::default());
        gate.enter("one");
        assert_eq!(gate.close(Duration::from_millis(1)), Err(vec!["one".to_owned()]));
        let worker = Arc::clone(&gate);
        let thread = std::thread::spawn(move || {
            while worker.is_open() {
                std::thread::yield_now();
            }
            worker.leave("one");
        });
        assert_eq!(gate.close(Duration::from_secs(60)), Ok(()));
        assert!(!gate.is_open());
        thread.join().unwrap();
    }
}
