//! The free extents of one allocation group (AG), proven by two trees.
//!
//! Owns the walk of the by-block tree and of the by-length tree and their comparison: the same extents, in their two orders, as
//! many blocks as the AGF counts, beside everything that is known to be used. Leaves alone where the roots come from. Promises
//! that each tree block is read once, by descending level by level: the places of all tree blocks are known before the first
//! leaf is read, so a free extent that covers any of them is noticed.

use std::cmp::Ordering;

use longhaul_common::extent::Extent;

use super::group::{Blocks, Group, Root};
use super::reader::{Reader, Seal, be16, be32, be64};
use super::{Unproven, inconsistent};

/// Tree blocks of one level that are remembered: 12 bytes each. Beyond it the volume is copied whole; at 4 KiB blocks that is an
/// AG of over 16 million free extents.
const LEVEL_BLOCKS_MAX: usize = 64 << 10;
const NO_SIBLING: u32 = u32::MAX;
const SEAL: Seal = Seal {
    crc: 52,
    uuid: 32,
    lsn: 24,
};

/// A free extent, in blocks of the AG.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Record {
    start: u32,
    len: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    ByBlock,
    ByLength,
}

impl Order {
    fn name(self) -> &'static str {
        match self {
            Self::ByBlock => "by-block tree",
            Self::ByLength => "by-length tree",
        }
    }

    fn magic(self, version_5: bool) -> u32 {
        u32::from_be_bytes(match (self, version_5) {
            (Self::ByBlock, false) => *b"ABTB",
            (Self::ByLength, false) => *b"ABTC",
            (Self::ByBlock, true) => *b"AB3B",
            (Self::ByLength, true) => *b"AB3C",
        })
    }

    /// Sorts records as the tree does.
    fn rank(self, record: Record) -> (u32, u32) {
        match self {
            Self::ByBlock => (record.start, 0),
            Self::ByLength => (record.len, record.start),
        }
    }

    /// A key as far as the tree uses it: the by-block tree never looks at the lengths in its keys.
    fn key(self, first: Record) -> Record {
        match self {
            Self::ByBlock => Record { len: 1, ..first },
            Self::ByLength => first,
        }
    }
}

/// Gives every free extent of `group`, in bytes of the volume. On an error, what was given is void.
pub(super) fn scan(reader: &Reader<'_>, group: &Group, free: &mut dyn FnMut(Extent)) -> Result<(), Unproven> {
    let mut used = group.used.clone();
    let by_block = Tree::descend(reader, group, Order::ByBlock, group.by_block, &mut used)?;
    let by_length = Tree::descend(reader, group, Order::ByLength, group.by_length, &mut used)?;
    used.sort_unstable();
    if used.array_windows().any(|[one, next]| one.end > next.start) {
        return Err(inconsistent(format!(
            "allocation group {} uses a block twice",
            group.number
        )));
    }
    let mut beside = Beside::new(group, &used);
    let given = by_block.leaves(|record| {
        beside.require(record)?;
        free(reader.geometry.extent(group.number, record.start, record.len));
        Ok(())
    })?;
    let again = by_length.leaves(|_| Ok(()))?;
    // mkfs.xfs aligns a log that fills its AG, counts the gap before it as free and loses it: nobody can use those blocks.
    let counted = match given.blocks.cmp(&group.free_blocks.into()) {
        Ordering::Less => group.holds_log,
        Ordering::Equal => true,
        Ordering::Greater => false,
    };
    if given != again || !counted || given.longest != group.longest {
        let what = format!(
            "allocation group {} counts its free blocks in two ways",
            group.number
        );
        return Err(inconsistent(what));
    }
    Ok(())
}

/// What a set of extents adds up to, whatever their order. Two sets that differ in one record differ in `mixed`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Tally {
    records: u64,
    blocks: u64,
    longest: u32,
    mixed: (u64, u64),
}

impl Tally {
    fn add(&mut self, record: Record) {
        let word = u64::from(record.start) << 32 | u64::from(record.len);
        self.records += 1;
        self.blocks += u64::from(record.len);
        self.longest = self.longest.max(record.len);
        self.mixed.0 = self.mixed.0.wrapping_add(mix(word ^ 0x6a09_e667_f3bc_c908));
        self.mixed.1 = self.mixed.1.wrapping_add(mix(word ^ 0xbb67_ae85_84ca_a73b));
    }
}

/// A bijection that spreads each bit over the word (the finaliser of SplitMix64).
fn mix(word: u64) -> u64 {
    let word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ word >> 31
}

/// Checks ascending records against ascending used blocks in one pass.
struct Beside<'a> {
    group: &'a Group,
    used: &'a [Blocks],
    next: usize,
}

impl<'a> Beside<'a> {
    fn new(group: &'a Group, used: &'a [Blocks]) -> Self {
        Self { group, used, next: 0 }
    }

    fn require(&mut self, record: Record) -> Result<(), Unproven> {
        let end = record.start.saturating_add(record.len);
        while self
            .used
            .get(self.next)
            .is_some_and(|used| used.end <= record.start)
        {
            self.next += 1;
        }
        if self.used.get(self.next).is_some_and(|used| used.start < end) {
            let (start, ag) = (record.start, self.group.number);
            let what = format!("the free extent at block {start} of allocation group {ag} is in use");
            return Err(inconsistent(what));
        }
        Ok(())
    }
}

/// A tree block as its parent names it.
#[derive(Clone, Copy)]
struct Child {
    block: u32,
    /// Its first record; the root has no parent that would know.
    first: Option<Record>,
}

/// A tree whose inner levels have been read: what is left are its leaves, in order.
struct Tree<'a> {
    reader: &'a Reader<'a>,
    group: &'a Group,
    order: Order,
    leaves: Vec<Child>,
    /// Whether the only leaf is the root, which may be nearly empty.
    is_root: bool,
}

impl<'a> Tree<'a> {
    /// Reads every level but the last, and adds all blocks of the tree, leaves too, to `used`.
    fn descend(
        reader: &'a Reader<'a>,
        group: &'a Group,
        order: Order,
        root: Root,
        used: &mut Vec<Blocks>,
    ) -> Result<Self, Unproven> {
        let mut tree = Self {
            reader,
            group,
            order,
            leaves: vec![Child {
                block: root.block,
                first: None,
            }],
            is_root: true,
        };
        used.push(Blocks::one(root.block));
        for level in (1..root.levels).rev() {
            tree.leaves = tree.children(level)?;
            tree.is_root = false;
            used.extend(tree.leaves.iter().map(|child| Blocks::one(child.block)));
        }
        Ok(tree)
    }

    /// Reads the blocks of one inner level and gives those of the level below.
    fn children(&self, level: u32) -> Result<Vec<Child>, Unproven> {
        let mut children = Vec::new();
        let mut keys = Ascending::new(self);
        self.each_block(level, |node| {
            if children.len() + node.count > LEVEL_BLOCKS_MAX {
                let what = format!("{} has more blocks than this version walks", self.place());
                return Err(inconsistent(what));
            }
            for index in 0..node.count {
                let first = self.order.key(node.record(index));
                let block = be32(node.bytes, node.header + 8 * node.capacity + 4 * index);
                keys.require(first)?;
                if !self.group.holds(self.reader.geometry, block) {
                    return Err(self.broken("a pointer out of its allocation group"));
                }
                children.push(Child {
                    block,
                    first: Some(first),
                });
            }
            Ok(())
        })?;
        Ok(children)
    }

    /// Reads every leaf and gives every record.
    fn leaves(&self, mut each: impl FnMut(Record) -> Result<(), Unproven>) -> Result<Tally, Unproven> {
        let mut tally = Tally::default();
        let mut records = Ascending::new(self);
        self.each_block(0, |leaf| {
            for index in 0..leaf.count {
                let record = leaf.record(index);
                records.require(record)?;
                each(record)?;
                tally.add(record);
            }
            Ok(())
        })?;
        Ok(tally)
    }

    /// Reads the blocks in `leaves`, checks their headers and gives them in order.
    fn each_block(
        &self,
        level: u32,
        mut each: impl FnMut(&Node<'_>) -> Result<(), Unproven>,
    ) -> Result<(), Unproven> {
        let geometry = self.reader.geometry;
        let mut bytes = vec![0; geometry.block_size as usize];
        let sibling = |index: Option<usize>| {
            let child = index.and_then(|index| self.leaves.get(index));
            child.map_or(NO_SIBLING, |child| child.block)
        };
        for (index, child) in self.leaves.iter().enumerate() {
            self.reader
                .read(&mut bytes, geometry.offset(self.group.number, child.block))?;
            let siblings = (sibling(index.checked_sub(1)), sibling(Some(index + 1)));
            let node = self.node(&bytes, child, level, siblings)?;
            each(&node)?;
        }
        Ok(())
    }

    /// Checks that the block is the one that its parent means.
    fn node<'b>(
        &self,
        bytes: &'b [u8],
        child: &Child,
        level: u32,
        siblings: (u32, u32),
    ) -> Result<Node<'b>, Unproven> {
        let version_5 = self.reader.metadata_uuid.is_some();
        if be32(bytes, 0) != self.order.magic(version_5) {
            return Err(self.broken("a block of another kind"));
        }
        if version_5 {
            let what = format!("block {} of {}", child.block, self.place());
            self.reader.check(&what, bytes, &SEAL)?;
            let sectors = self.reader.geometry.offset(self.group.number, child.block) / 512;
            if be64(bytes, 16) != sectors || be32(bytes, 48) != self.group.number {
                return Err(self.broken("a block of another place"));
            }
        }
        let node = Node::new(bytes, level, version_5);
        if u32::from(be16(bytes, 4)) != level || (be32(bytes, 8), be32(bytes, 12)) != siblings {
            return Err(self.broken("a block at the wrong place in the tree"));
        }
        // A root leaf may be empty, a root node may not; every other block is at least half full.
        let least = match (self.is_root, level) {
            (true, 0) => 0,
            (true, _) => 1,
            (false, _) => node.capacity / 2,
        };
        if !(least..=node.capacity).contains(&node.count) {
            return Err(self.broken("a block with too few or too many records"));
        }
        if child
            .first
            .is_some_and(|first| first != self.order.key(node.record(0)))
        {
            return Err(self.broken("a block that its parent describes differently"));
        }
        Ok(node)
    }

    fn broken(&self, what: &str) -> Unproven {
        inconsistent(format!("{} has {what}", self.place()))
    }

    fn place(&self) -> String {
        format!(
            "the {} of allocation group {}",
            self.order.name(),
            self.group.number
        )
    }
}

/// A tree block whose header was checked.
struct Node<'a> {
    bytes: &'a [u8],
    /// Bytes before the first record or key.
    header: usize,
    /// Records, or keys and pointers, that fit.
    capacity: usize,
    /// Those that are there.
    count: usize,
}

impl<'a> Node<'a> {
    fn new(bytes: &'a [u8], level: u32, version_5: bool) -> Self {
        let header = if version_5 { 56 } else { 16 };
        let entry = if level == 0 { 8 } else { 12 };
        Self {
            bytes,
            header,
            capacity: (bytes.len() - header) / entry,
            count: be16(bytes, 6).into(),
        }
    }

    /// Record or key `index`: they look alike.
    fn record(&self, index: usize) -> Record {
        let at = self.header + 8 * index;
        Record {
            start: be32(self.bytes, at),
            len: be32(self.bytes, at + 4),
        }
    }
}

/// Checks that records or keys lie in the AG and come in the order of their tree, across blocks.
struct Ascending<'a> {
    tree: &'a Tree<'a>,
    /// The least rank that may follow.
    least: (u32, u32),
}

impl<'a> Ascending<'a> {
    fn new(tree: &'a Tree<'a>) -> Self {
        Self { tree, least: (0, 0) }
    }

    fn require(&mut self, record: Record) -> Result<(), Unproven> {
        let end = record.start.checked_add(record.len);
        let inside = end.is_some_and(|end| end <= self.tree.group.len) && record.len > 0;
        let rank = self.tree.order.rank(record);
        if !inside || rank < self.least {
            return Err(self
                .tree
                .broken("a record out of order or out of its allocation group"));
        }
        self.least = match self.tree.order {
            Order::ByBlock => (record.start.saturating_add(record.len), 0),
            Order::ByLength => (record.len, record.start.saturating_add(1)),
        };
        Ok(())
    }
}
