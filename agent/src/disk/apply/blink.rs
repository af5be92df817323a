//! Telling those who use a file from children just being started, which hold their parent's files, locks included, for the blink between
//! fork and exec.

use std::time::{Duration, Instant};

/// Far longer than a blink on a busy host, far shorter than a person's patience.
const PATIENCE: Duration = Duration::from_millis(500);

/// Repeats `attempt` until it gives something, fails, or has given `None` for half a second. Blocks.
pub(crate) fn wait_out<T, E>(mut attempt: impl FnMut() -> Result<Option<T>, E>) -> Result<Option<T>, E> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match attempt()? {
            None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            given => return Ok(given),
        }
    }
}
