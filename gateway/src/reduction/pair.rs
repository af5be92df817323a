//! The two windows that this gateway shares with one peer, one for each direction.
//!
//! Owns which epoch both ends are in (drawn below), and the windows of all peers by their names: no peer sees what another one sent.
//! Leaves carrying the words to `send` and `receive`.
//!
//! ```text
//! sender                      receiver
//!   | hello(epoch, slots) ------>|   newer than what it holds: begins empty
//!   |<------ answer(epoch, held) |   older: names its own, the sender begins a later one and says hello again
//!   |== payloads of this epoch =>|
//! ```
//!
//! Promises that a payload of another epoch than the one agreed is never restored from the window: it is asked for plainly.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dashmap::DashMap;
use longhaul_common::wire::window::{WindowAnswer, WindowHello};

use super::Kept;
use super::block::DigestKey;
use super::window::{Size, Window};

/// Peers with windows of their own; as many as there are certificates.
pub struct Windows {
    /// None where there are to be no windows.
    size: Option<Size>,
    key: DigestKey,
    pairs: DashMap<String, Arc<Pair>>,
}

impl Windows {
    /// Windows of this size with every peer; none at all without one.
    pub fn new(size: Option<Size>) -> Arc<Self> {
        Arc::new(Self {
            size,
            key: DigestKey::random(),
            pairs: DashMap::new(),
        })
    }

    /// The windows shared with a peer; `name` is its whole name.
    pub fn with(&self, name: &str) -> Option<Arc<Pair>> {
        let size = self.size?;
        let new = || Arc::new(Pair::new(size, self.key.clone()));
        Some(Arc::clone(
            &*self.pairs.entry(name.to_owned()).or_insert_with(new),
        ))
    }
}

/// The windows shared with one peer.
pub struct Pair {
    size: Size,
    key: DigestKey,
    pub(super) outgoing: Window,
    incoming: Mutex<Option<Arc<Window>>>,
}

impl Pair {
    fn new(size: Size, key: DigestKey) -> Self {
        Self {
            size,
            outgoing: Window::new(size, 1, key.clone(), None),
            key,
            incoming: Mutex::new(None),
        }
    }

    fn entry(&self) -> MutexGuard<'_, Option<Arc<Window>>> {
        self.incoming.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the peer sends here, where it has begun to.
    pub(super) fn incoming(&self) -> Option<Arc<Window>> {
        self.entry().clone()
    }

    /// What to say to the peer first.
    pub fn hello(&self) -> WindowHello {
        let ring = self.outgoing.ring();
        WindowHello {
            epoch: ring.epoch,
            slots: ring.len(),
        }
    }

    /// The peer's answer; false where hello has to be said again.
    pub fn answered(&self, hello: WindowHello, answer: WindowAnswer) -> bool {
        if answer.epoch == hello.epoch {
            self.outgoing.agree(hello.epoch, answer.held, answer.slots);
            return true;
        }
        // Another connection may have said it in the meantime.
        if self.hello().epoch <= answer.epoch {
            self.outgoing.renew(answer.epoch);
        }
        false
    }

    /// The answer to a peer's hello.
    pub fn greet(&self, hello: WindowHello) -> WindowAnswer {
        let mut entry = self.entry();
        let known = entry.as_ref().map(|window| {
            let ring = window.ring();
            (ring.epoch, ring.len())
        });
        if let Some((epoch, slots)) = known.filter(|(epoch, _)| *epoch >= hello.epoch) {
            let held = epoch == hello.epoch;
            return WindowAnswer { epoch, held, slots };
        }
        let window = Window::new(self.size, hello.epoch, self.key.clone(), None);
        window.agree(hello.epoch, true, hello.slots);
        let slots = window.ring().len();
        *entry = Some(Arc::new(window));
        WindowAnswer {
            epoch: hello.epoch,
            held: false,
            slots,
        }
    }

    /// A payload was accepted: what it stored may be referred to.
    pub fn accepted(&self, kept: &Kept) {
        self.settle(kept, true);
    }

    /// A payload is given up.
    pub fn given_up(&self, kept: &Kept) {
        self.settle(kept, false);
    }

    /// The peer lacks something that a payload refers to.
    pub fn missing(&self, kept: &Kept) {
        if let Some(receipt) = &kept.receipt {
            self.outgoing.forget(receipt);
            self.outgoing.settle(receipt, false);
        }
    }

    fn settle(&self, kept: &Kept, accepted: bool) {
        if let Some(receipt) = &kept.receipt {
            self.outgoing.settle(receipt, accepted);
        }
    }
}
