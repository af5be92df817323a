//! The stream's header: the configuration's subsections and the list of RAM blocks.
//!
//! Owns the two parts of the grammar that decide how later ones look: capabilities that add fields, and the names and sizes of RAM
//! blocks. Leaves the envelope to the grammar. Promises to keep no more blocks than a part may name.

use longhaul_common::wire::ram::BLOCKS_MAX;

use super::fields::{be32, be64, str8, str8_need};
use super::grammar::{Block, Expect, Found, Grammar, Next, OpaqueReason, PAGE, raw};

impl Grammar {
    /// Behind the machine's name: a subsection follows where the next byte says so.
    pub(super) fn configuration(&mut self, head: &[u8]) -> Next {
        match head.first() {
            None => return Ok(Found::Need(1)),
            Some(5) => {}
            Some(_) => {
                self.expect = Expect::Section;
                return self.section(head);
            }
        }
        let Some((name, at)) = str8(head, 1) else {
            return Ok(Found::Need(str8_need(head, 1)));
        };
        // The version is not looked at: QEMU refuses one that it does not know.
        let at = at + 4;
        let value = be32(head, at);
        match name {
            b"configuration/uuid" if head.len() >= at + 16 => Ok(raw(at + 16)),
            b"configuration/uuid" => Ok(Found::Need(at + 16)),
            b"configuration/target-page-bits" => match value {
                None => Ok(Found::Need(at + 4)),
                Some(12) => Ok(raw(at + 4)),
                Some(_) => Err(OpaqueReason::Configuration),
            },
            b"configuration/capabilities" => match value {
                None => Ok(Found::Need(at + 4)),
                Some(0) => Ok(raw(at + 4)),
                Some(left) => {
                    self.expect = Expect::Capability { left };
                    Ok(raw(at + 4))
                }
            },
            _ => Err(OpaqueReason::Configuration),
        }
    }

    pub(super) fn capability(&mut self, head: &[u8], left: u32) -> Next {
        let Some((name, at)) = str8(head, 0) else {
            return Ok(Found::Need(str8_need(head, 0)));
        };
        match name {
            b"x-ignore-shared" => self.addresses = true,
            _ => return Err(OpaqueReason::Configuration),
        }
        self.expect = match left - 1 {
            0 => Expect::Configuration,
            left => Expect::Capability { left },
        };
        Ok(raw(at))
    }

    pub(super) fn block(&mut self, head: &[u8], left: u64) -> Next {
        let Some((name, at)) = str8(head, 0) else {
            return Ok(Found::Need(str8_need(head, 0)));
        };
        let whole = at + 8 + if self.addresses { 8 } else { 0 };
        if head.len() < whole {
            return Ok(Found::Need(whole));
        }
        let used_length = be64(head, at).ok_or(OpaqueReason::BlockList)?;
        let left = left.checked_sub(used_length).ok_or(OpaqueReason::BlockList)?;
        // With both, page size and address cannot be told apart.
        if name.is_empty() || (self.addresses && self.page_sizes) {
            return Err(OpaqueReason::BlockList);
        }
        self.learn(name, used_length);
        self.expect = after_block(left, self.page_sizes);
        Ok(raw(whole))
    }

    /// Pages of a block that is not learned stay raw.
    fn learn(&mut self, name: &[u8], used_length: u64) {
        let index = self.blocks.len() as u16;
        if index >= BLOCKS_MAX || self.names.contains_key(name) {
            return;
        }
        self.names.insert(name.to_vec(), index);
        self.blocks.push(Block {
            name: name.to_vec(),
            used_length,
        });
    }

    /// A page size begins with a zero byte, a name never does; behind the last block a record of flags follows instead.
    pub(super) fn page_size(&mut self, head: &[u8], left: u64) -> Next {
        if left > 0 && head.first().is_some_and(|first| *first != 0) {
            self.expect = Expect::Block { left };
            return self.block(head, left);
        }
        let Some(word) = be64(head, 0) else {
            return Ok(Found::Need(8));
        };
        let is_size = word.is_power_of_two() && word >= 2 * PAGE;
        self.expect = after_block(left, false);
        match (is_size, left) {
            (true, _) => Ok(raw(8)),
            (false, 0) => self.record(head),
            (false, _) => Err(OpaqueReason::BlockList),
        }
    }
}

/// What follows a block, where so many bytes of blocks are left.
pub(super) fn after_block(left: u64, page_sizes: bool) -> Expect {
    match (page_sizes, left) {
        (true, left) => Expect::PageSize { left },
        (false, 0) => Expect::Record,
        (false, left) => Expect::Block { left },
    }
}
