//! How far the source may read QEMU's stream ahead of the target's QEMU.
//!
//! Owns the count of bytes that were read and are not acknowledged. Leaves the reading and the size of the window to others. Promises
//! that while QEMU iterates no more than the window is under way, so that QEMU's own estimate of its bandwidth is honest; and that the
//! tail, for which the guest waits, is never held back, but refused where it grows beyond its limit.

/// Why reading cannot go on.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum WindowError {
    #[error(
        "the stream's tail is longer than the {max} bytes that may be buffered; close the socket so that the source VM runs on"
    )]
    TailTooLong { max: u64 },
    #[error("the target acknowledged {acked} bytes of the RAM stream, but only {read} were read")]
    AckBeyondEnd { acked: u64, read: u64 },
}

/// The source's window on the stream. All positions and sizes are bytes of QEMU's stream.
#[derive(Clone, Debug)]
pub struct ReadWindow {
    size: u64,
    read: u64,
    acked: u64,
    tail: Option<u64>,
}

impl ReadWindow {
    /// Up to `size` bytes may be under way.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            read: 0,
            acked: 0,
            tail: None,
        }
    }

    /// Another size from now on; has no effect on the tail.
    pub fn set_size(&mut self, size: u64) {
        self.size = size;
    }

    /// From now on everything is read at full speed, up to `max` bytes under way.
    pub fn begin_tail(&mut self, max: u64) {
        self.tail = Some(max);
    }

    /// QEMU did not go into its tail after all (it was told to go on): the window holds again.
    pub fn end_tail(&mut self) {
        self.tail = None;
    }

    /// How many bytes may be read now; 0: wait for an acknowledgement.
    ///
    /// # Errors
    /// The tail is too long: nothing may be read, and waiting for it would hold QEMU's lock.
    pub fn may_read(&self) -> Result<u64, WindowError> {
        match self.tail {
            None => Ok(self.size.saturating_sub(self.in_flight())),
            Some(max) => match max.saturating_sub(self.in_flight()) {
                0 => Err(WindowError::TailTooLong { max }),
                left => Ok(left),
            },
        }
    }

    /// So many bytes were read.
    pub fn read(&mut self, bytes: u64) {
        self.read = self.read.saturating_add(bytes);
    }

    /// The target's QEMU was given all bytes before `position`; an older position is nothing new.
    ///
    /// # Errors
    /// So much was never read.
    pub fn ack(&mut self, position: u64) -> Result<(), WindowError> {
        if position > self.read {
            return Err(WindowError::AckBeyondEnd {
                acked: position,
                read: self.read,
            });
        }
        self.acked = self.acked.max(position);
        Ok(())
    }

    /// Bytes that were read and are not acknowledged.
    pub fn in_flight(&self) -> u64 {
        self.read - self.acked
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_than_the_window_is_under_way() {
        let mut window = ReadWindow::new(100);
        window.read(70);
        assert_eq!(window.may_read(), Ok(30));
        window.read(30);
        assert_eq!(window.may_read(), Ok(0));
        window.ack(60).unwrap();
        window.ack(10).unwrap();
        assert_eq!((window.may_read(), window.in_flight()), (Ok(60), 40));
        window.set_size(20);
        assert_eq!(window.may_read(), Ok(0));
        assert_eq!(
            window.ack(101),
            Err(WindowError::AckBeyondEnd {
                acked: 101,
                read: 100
            })
        );
    }

    #[test]
    fn the_tail_is_taken_whole_or_not_at_all() {
        let mut window = ReadWindow::new(100);
        window.read(100);
        window.begin_tail(250);
        assert_eq!(window.may_read(), Ok(150));
        window.read(149);
        assert_eq!(window.may_read(), Ok(1));
        window.read(1);
        assert_eq!(window.may_read(), Err(WindowError::TailTooLong { max: 250 }));
        window.ack(50).unwrap();
        assert_eq!(window.may_read(), Ok(50));
        window.end_tail();
        assert_eq!(window.may_read(), Ok(0));
    }
}
