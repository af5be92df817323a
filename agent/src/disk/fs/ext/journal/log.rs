//! The scan of the log from its tail to the newest commit.
//!
//! Owns the chain of transactions: each next block must carry the next number. The first pass finds the newest commit; a second
//! one reads everything up to it again, since only blocks read after their commit block was seen are known to be what was
//! committed. Leaves alone what is done with the tags. Promises that the commit found is the newest one on the disk when the scan
//! began, or says [`Fault::Moved`]: behind the end of the chain nothing may carry a later number.

use std::cell::RefCell;

use super::super::Ext;
use super::header::Header;
use super::place::Places;
use super::tags::{self, Role, Tag};
use super::{Fault, is_after};

/// Blocks behind the end of the chain that must not carry a later number.
const LOOK_BEHIND: u32 = 128;
/// Bytes read at once.
const AHEAD_BYTES: usize = 256 << 10;
/// How often the end of the chain may move on while it is looked at.
const EXTENSIONS_MAX: u32 = 1000;

/// What a transaction says of blocks.
pub(super) enum Word {
    /// `at` is the block of the log that holds the content.
    Logged {
        tag: Tag,
        at: u32,
        sequence: u32,
    },
    Revoked {
        block: u64,
        sequence: u32,
    },
}

/// The log of a journal.
pub(super) struct Log<'a> {
    pub(super) ext: &'a Ext<'a>,
    pub(super) places: &'a Places,
    pub(super) header: Header,
    window: RefCell<Window>,
}

/// Blocks read ahead, so that a log of many small transactions costs few reads.
#[derive(Default)]
struct Window {
    first: u32,
    count: u32,
    raw: Vec<u8>,
}

/// Where a walk along the log stands.
#[derive(Clone, Copy)]
struct Position {
    at: u32,
    /// Blocks passed so far; the log has no more than its length.
    passed: u32,
    sequence: u32,
}

/// What comes next on the way.
enum Next {
    Words(Vec<Word>),
    Commit,
    End,
}

impl<'a> Log<'a> {
    pub(super) fn new(ext: &'a Ext<'a>, places: &'a Places, header: Header) -> Self {
        Self {
            ext,
            places,
            header,
            window: RefCell::default(),
        }
    }

    /// The number of the newest committed transaction.
    pub(super) fn newest(&self) -> Result<u32, Fault> {
        self.forget();
        let mut position = self.tail();
        if self.header.start == 0 {
            return Ok(position.sequence.wrapping_sub(1));
        }
        for _ in 0..EXTENSIONS_MAX {
            while self.transaction(&mut position, &mut |_| Ok(()))? {}
            if !self.goes_on_behind(position)? {
                return Ok(position.sequence.wrapping_sub(1));
            }
        }
        Err(Fault::Moved("its journal is written faster than it can be read"))
    }

    /// Gives every word of all transactions from the tail up to `newest`, in their order.
    pub(super) fn words(
        &self,
        newest: u32,
        give: &mut dyn FnMut(Word) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        // What was read ahead may be older than the commit block that was found.
        self.forget();
        let mut position = self.tail();
        while self.header.start != 0 && !is_after(position.sequence, newest) {
            if !self.transaction(&mut position, give)? {
                return Err(Fault::Moved("its journal moved on under the read"));
            }
        }
        Ok(())
    }

    fn tail(&self) -> Position {
        Position {
            at: self.header.start,
            passed: 0,
            sequence: self.header.sequence,
        }
    }

    /// Goes behind the next transaction, if it is committed; else the position stays.
    fn transaction(
        &self,
        position: &mut Position,
        give: &mut dyn FnMut(Word) -> Result<(), Fault>,
    ) -> Result<bool, Fault> {
        let mut ahead = *position;
        loop {
            match self.next(&mut ahead)? {
                Next::Words(words) => words.into_iter().try_for_each(&mut *give)?,
                Next::Commit => {
                    ahead.sequence = ahead.sequence.wrapping_add(1);
                    *position = ahead;
                    return Ok(true);
                }
                Next::End => return Ok(false),
            }
        }
    }

    fn next(&self, position: &mut Position) -> Result<Next, Fault> {
        if position.passed >= self.header.len() {
            return Ok(Next::End);
        }
        let raw = self.read_ahead(position.at)?;
        let Some((role, sequence)) = tags::head(&raw) else {
            return Ok(Next::End);
        };
        if sequence != position.sequence {
            return Ok(Next::End);
        }
        if !tags::is_whole(&self.header, role, &raw) {
            return Err(Fault::Moved("a block of its journal fails its checksum"));
        }
        let (next, blocks) = match role {
            Role::Commit => (Next::Commit, 1),
            Role::Descriptor => self.descriptor(position, &raw),
            Role::Revoke => (self.revoke(position, &raw)?, 1),
            Role::Other => return Err(Fault::Moved("a block of its journal is of an unknown kind")),
        };
        if blocks > self.header.len() - position.passed {
            return Ok(Next::End);
        }
        position.at = self.header.step(position.at, blocks);
        position.passed += blocks;
        Ok(next)
    }

    /// The words, and the blocks of the log that they take.
    fn descriptor(&self, position: &Position, raw: &[u8]) -> (Next, u32) {
        let tags = tags::tags(&self.header, raw);
        // A block holds fewer tags than bytes.
        let count = tags.len() as u32;
        if count >= self.header.len() {
            return (Next::End, u32::MAX);
        }
        let words = (1..).zip(tags).map(|(by, tag)| Word::Logged {
            tag,
            at: self.header.step(position.at, by),
            sequence: position.sequence,
        });
        (Next::Words(words.collect()), count + 1)
    }

    fn revoke(&self, position: &Position, raw: &[u8]) -> Result<Next, Fault> {
        let blocks = tags::revoked(&self.header, raw).ok_or(Fault::Moved(
            "a revoke block of its journal has an impossible length",
        ))?;
        let words = blocks.into_iter().map(|block| Word::Revoked {
            block,
            sequence: position.sequence,
        });
        Ok(Next::Words(words.collect()))
    }

    /// Whether the transaction at the end of the chain is committed by now. An error where a later one is there without it: then
    /// the chain is broken, and its end is not the newest commit.
    fn goes_on_behind(&self, position: Position) -> Result<bool, Fault> {
        let window = LOOK_BEHIND.min(self.header.len() - position.passed.min(self.header.len()));
        for by in 0..window {
            let raw = self.read_ahead(self.header.step(position.at, by))?;
            let later = tags::head(&raw).is_some_and(|(_, number)| is_after(number, position.sequence));
            if later {
                self.forget();
                return match self.transaction(&mut position.clone(), &mut |_| Ok(()))? {
                    true => Ok(true),
                    false => Err(Fault::Moved(
                        "its journal has a gap before its newest transactions",
                    )),
                };
            }
        }
        Ok(false)
    }

    fn forget(&self) {
        self.window.borrow_mut().count = 0;
    }

    /// Block `at` of the journal, as it was when it was read or read ahead.
    fn read_ahead(&self, at: u32) -> Result<Vec<u8>, Fault> {
        let size = self.ext.superblock.block_size as usize;
        let mut window = self.window.borrow_mut();
        if !(window.first..window.first.saturating_add(window.count)).contains(&at) {
            let (place, run) = self.place(at)?;
            let most = (AHEAD_BYTES / size) as u64;
            let count = run.min(most).min((self.header.end - at).into()).max(1);
            window.count = 0;
            window.raw.resize(count as usize * size, 0);
            self.ext.read_block(place, &mut window.raw)?;
            // At most `most`, which is small.
            (window.first, window.count) = (at, count as u32);
        }
        let from = (at - window.first) as usize * size;
        Ok(window.raw[from..from + size].to_vec())
    }

    /// Block `at` of the journal, read now.
    pub(super) fn read(&self, at: u32) -> Result<Vec<u8>, Fault> {
        let mut raw = vec![0; self.ext.superblock.block_size as usize];
        self.ext.read_block(self.place(at)?.0, &mut raw)?;
        Ok(raw)
    }

    /// Where block `at` lies, and how many follow there without a break, itself among them.
    fn place(&self, at: u32) -> Result<(u64, u64), Fault> {
        let found = self.places.find(at);
        let wrong = || {
            self.ext
                .superblock
                .kind
                .inconsistent("journal: its file is too short")
        };
        Ok(found.ok_or_else(wrong)?)
    }
}
