//! The gate through which every worker passes before each operation.
//!
//! Owns closing it for good and waiting until nobody is inside an operation. Promises that after `close` no
//! worker starts another one, so that what is in memory and on disk stands still.

use std::sync::{Condvar, Mutex, PoisonError};

#[derive(Debug, Default)]
struct State {
    closed: bool,
    working: u32,
}

/// Open until it is closed.
#[derive(Debug, Default)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    /// A worker begins.
    pub fn enter(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).working += 1;
    }

    /// A worker has ended.
    pub fn leave(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.working = state.working.saturating_sub(1);
        self.changed.notify_all();
    }

    /// Whether another operation may begin; a worker that hears no must end.
    pub fn is_open(&self) -> bool {
        !self.state.lock().unwrap_or_else(PoisonError::into_inner).closed
    }

    /// Closes it and waits until every worker has ended.
    pub fn close(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.closed = true;
        while state.working > 0 {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
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
        gate.enter();
        let worker = Arc::clone(&gate);
        let thread = std::thread::spawn(move || {
            while worker.is_open() {
                std::thread::yield_now();
            }
            worker.leave();
        });
        gate.close();
        assert!(!gate.is_open());
        thread.join().unwrap();
    }
}
