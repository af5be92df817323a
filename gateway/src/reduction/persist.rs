//! Windows in files: what lies where, and what survives a restart.
//!
//! Owns the folder of a gateway's windows. For each peer and direction there is a file of blocks, written as they are stored, and an
//! index, written once when the program stops in order and removed as soon as it is read: after a crash there is none, and the window
//! begins anew. Guests' memory never survives: its key is gone. Promises that an index that is damaged, of another size or of
//! another version counts as none.
//!
//! ```text
//! key             32 bytes
//! NAME.blocks     slot 0 | slot 1 | ...           4096 bytes each
//! NAME.index      "LHWINDW2" | epoch, head, slots: u64 LE | slots: position u64, digest 16 bytes
//!                 | entries by digest | entries by place: u64 LE each | BLAKE3 of all before
//! ```

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::block::DigestKey;
use super::layout::BLOCK_LEN;
use super::slot_file::SlotFile;
use super::window::{Image, Size, Slot, Window};

const MAGIC: &[u8; 8] = b"LHWINDW2";
/// Bytes of a slot in the index.
const SLOT_LEN: usize = 24;

/// Where windows are kept.
pub(super) struct Folder {
    path: PathBuf,
}

impl Folder {
    /// Makes the folder where it is not there, and gives the key for block digests that belongs to it.
    pub(super) fn open(path: &Path) -> io::Result<(Self, DigestKey)> {
        std::fs::create_dir_all(path)?;
        let key = path.join("key");
        let mut bytes = [0; 32];
        match File::open(&key).and_then(|mut file| file.read_exact(&mut bytes)) {
            Ok(()) => {}
            Err(_) => {
                bytes = DigestKey::random().bytes;
                write_whole(&key, &[&bytes])?;
            }
        }
        Ok((
            Self {
                path: path.to_owned(),
            },
            DigestKey::of(bytes),
        ))
    }

    /// The peer's name as a file name.
    fn file(&self, name: &str, what: &str) -> PathBuf {
        let hash = blake3::hash(name.as_bytes()).to_hex();
        self.path.join(format!("{}.{what}", &hash[..16]))
    }

    /// The file of blocks, of the right size.
    pub(super) fn blocks(&self, name: &str, size: Size) -> io::Result<Arc<SlotFile>> {
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600);
        let file = options.open(self.file(name, "blocks"))?;
        file.set_len(size.slots * BLOCK_LEN as u64)?;
        Ok(Arc::new(SlotFile::new(file, size.slots)))
    }

    /// What an orderly stop left behind; it is gone from the folder then.
    pub(super) fn take(&self, name: &str, size: Size) -> Option<Image> {
        let path = self.file(name, "index");
        let bytes = std::fs::read(&path).ok()?;
        // While the program runs there is no index: a crash must not find an old one.
        std::fs::remove_file(&path).ok()?;
        File::open(&self.path).and_then(|folder| folder.sync_all()).ok()?;
        read(&bytes, size)
    }

    /// Writes what the next life needs.
    pub(super) fn keep(&self, name: &str, window: &Window) -> io::Result<()> {
        if let Some(file) = &window.file {
            file.sync()?;
        }
        let image = window.image();
        let mut bytes = Vec::with_capacity(64 + image.slots.len() * 64);
        bytes.extend_from_slice(MAGIC);
        for number in [image.epoch, image.head, image.slots.len() as u64] {
            bytes.extend(number.to_le_bytes());
        }
        for slot in &image.slots {
            bytes.extend(slot.kept_position().to_le_bytes());
            bytes.extend(slot.digest);
        }
        for entry in image.by_digest.iter().chain(&image.by_place) {
            bytes.extend(entry.to_le_bytes());
        }
        let digest = blake3::hash(&bytes);
        write_whole(&self.file(name, "index"), &[&bytes, digest.as_bytes()])
    }
}

/// Writes a file that is there as a whole or not at all.
fn write_whole(path: &Path, parts: &[&[u8]]) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let mut options = OpenOptions::new();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    parts.iter().try_for_each(|part| file.write_all(part))?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    path.parent()
        .map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

fn read(bytes: &[u8], size: Size) -> Option<Image> {
    let (body, digest) = bytes.split_last_chunk::<32>()?;
    if blake3::hash(body) != *digest {
        return None;
    }
    let rest = body.strip_prefix(MAGIC)?;
    let (numbers, rest) = rest.split_at_checked(24)?;
    let mut numbers = numbers
        .as_chunks::<8>()
        .0
        .iter()
        .map(|bytes| u64::from_le_bytes(*bytes));
    let (epoch, head, slots) = (numbers.next()?, numbers.next()?, numbers.next()?);
    if slots != size.slots {
        return None;
    }
    let (slots, entries) = rest.split_at_checked(usize::try_from(slots).ok()?.checked_mul(SLOT_LEN)?)?;
    let slot = |bytes: &[u8; SLOT_LEN]| {
        let (position, digest) = bytes.split_first_chunk::<8>()?;
        Some(Slot::kept(u64::from_le_bytes(*position), *digest.as_array()?))
    };
    let slots = slots
        .as_chunks::<SLOT_LEN>()
        .0
        .iter()
        .map(slot)
        .collect::<Option<Vec<_>>>()?;
    let (entries, left) = entries.as_chunks::<8>();
    if entries.len() % 2 != 0 || !left.is_empty() {
        return None;
    }
    let (by_digest, by_place) = entries.split_at(entries.len() / 2);
    let numbers = |part: &[[u8; 8]]| part.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect();
    Some(Image {
        epoch,
        head,
        slots,
        by_digest: numbers(by_digest),
        by_place: numbers(by_place),
    })
}
