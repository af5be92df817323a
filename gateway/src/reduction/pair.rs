//! The two windows that this gateway shares with one peer, one for each direction.
//!
//! Owns which epoch both ends are in (drawn below), and the windows of all peers by their names, and by tenant: no peer sees what another
//! one sent, and no tenant's payload is made smaller by what another tenant sent. Leaves carrying the words to `send` and `receive`.
//!
//! ```text
//! sender                      receiver
//!   | hello(epoch, slots) ------>|   newer than what it holds: begins empty
//!   |<------ answer(epoch, held) |   older: names its own, the sender begins a later one and says hello again
//!   |== payloads of this epoch =>|
//! ```
//!
//! Promises that a payload of another epoch than the one agreed is never restored from the window: it is asked for plainly.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use dashmap::DashMap;
use longhaul_common::wire::window::{WindowAnswer, WindowHello};

use super::Kept;
use super::block::DigestKey;
use super::persist::Folder;
use super::slot_file::SlotFile;
use super::window::{Size, Window};

/// Peers with windows of their own; as many as there are certificates.
pub struct Windows {
    /// None where there are to be no windows.
    size: Option<Size>,
    /// Who has windows of their own with every peer.
    tenants: BTreeSet<String>,
    key: DigestKey,
    folder: Option<Arc<Folder>>,
    pairs: DashMap<String, Arc<Pair>>,
}

impl Windows {
    /// Windows of this size with every peer, for each of `tenants` and for all others together; none at all without a size.
    pub fn new(size: Option<Size>, tenants: BTreeSet<String>) -> Arc<Self> {
        Arc::new(Self {
            size,
            tenants,
            key: DigestKey::random(),
            folder: None,
            pairs: DashMap::new(),
        })
    }

    /// The same in files below `folder`, that survive an orderly restart.
    ///
    /// # Errors
    /// A folder that cannot be made or written.
    pub fn in_folder(size: Size, tenants: BTreeSet<String>, folder: &Path) -> std::io::Result<Arc<Self>> {
        let (folder, key) = Folder::open(folder)?;
        Ok(Arc::new(Self {
            size: Some(size),
            tenants,
            key,
            folder: Some(Arc::new(folder)),
            pairs: DashMap::new(),
        }))
    }

    /// Keeps all windows for the next life of this program, which is at its end: nothing may be sent or taken any more.
    ///
    /// # Errors
    /// The first file that cannot be written; the windows behind it begin anew.
    pub fn keep(&self) -> std::io::Result<()> {
        let Some(folder) = &self.folder else { return Ok(()) };
        for entry in &self.pairs {
            folder.keep(&out(entry.key()), &entry.value().outgoing)?;
            if let Some(incoming) = entry.value().incoming() {
                folder.keep(&into(entry.key()), &incoming)?;
            }
        }
        Ok(())
    }

    /// Who has windows of their own; the empty name stands for all others.
    pub fn tenants(&self) -> impl Iterator<Item = &str> {
        std::iter::once("").chain(self.tenants.iter().map(String::as_str))
    }

    /// The windows shared with a peer, by its whole name, for one of [`Self::tenants`]; `None` for any other. Reads files where it is
    /// asked for the first time.
    pub fn with(&self, peer: &str, tenant: &str) -> Option<Arc<Pair>> {
        let size = self.size?;
        let name = match tenant {
            "" => peer.to_owned(),
            _ if self.tenants.contains(tenant) => named(peer, tenant),
            _ => return None,
        };
        let new = || Arc::new(Pair::new(&name, size, self.key.clone(), self.folder.clone()));
        Some(Arc::clone(&*self.pairs.entry(name.clone()).or_insert_with(new)))
    }
}

/// A tenant's windows with a peer: no peer's name has a space.
fn named(peer: &str, tenant: &str) -> String {
    format!("{peer} for {tenant}")
}

fn out(name: &str) -> String {
    format!("to {name}")
}

fn into(name: &str) -> String {
    format!("from {name}")
}

/// An epoch that no earlier life of this program has had.
fn new_epoch() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(1, |since| since.as_nanos() as u64)
}

/// The windows shared with one peer.
pub struct Pair {
    name: String,
    folder: Option<Arc<Folder>>,
    size: Size,
    key: DigestKey,
    pub(super) outgoing: Window,
    incoming: Mutex<Option<Arc<Window>>>,
}

impl Pair {
    fn new(name: &str, size: Size, key: DigestKey, folder: Option<Arc<Folder>>) -> Self {
        let resume = |name: &str| {
            let folder = folder.as_ref()?;
            let image = folder.take(name, size)?;
            let file = folder.blocks(name, size).ok()?;
            Some(Window::resumed(size, image, key.clone(), file))
        };
        let incoming = resume(&into(name));
        if let Some(window) = &incoming {
            window.ring().agreed = true;
        }
        let outgoing = resume(&out(name));
        let new = || {
            Window::new(
                size,
                new_epoch(),
                key.clone(),
                blocks(folder.as_deref(), &out(name), size),
            )
        };
        Self {
            name: name.to_owned(),
            size,
            outgoing: outgoing.unwrap_or_else(new),
            key,
            incoming: Mutex::new(incoming.map(Arc::new)),
            folder,
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
            if let Some(window) = entry.as_ref().filter(|_| held) {
                window.agree(epoch, true, hello.slots);
            }
            return WindowAnswer { epoch, held, slots };
        }
        let file = blocks(self.folder.as_deref(), &into(&self.name), self.size);
        let window = Window::new(self.size, hello.epoch, self.key.clone(), file);
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

/// The file of blocks, where there is to be one and it can be had.
fn blocks(folder: Option<&Folder>, name: &str, size: Size) -> Option<Arc<SlotFile>> {
    let file = folder?.blocks(name, size);
    if let Err(error) = &file {
        tracing::warn!("a window has no file and remembers less: {error}");
    }
    file.ok()
}
