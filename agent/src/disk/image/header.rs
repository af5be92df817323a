//! What the headers of QEMU's formats refer to and warn of: other files, encryption, damage.
//!
//! Owns as much of each format as decides whether QEMU may be let near the image: the names of further files
//! that it would open by itself, and the marks of encrypted, dirty or corrupt images. Leaves the content to
//! QEMU, and resolving and permitting names to `chain`. Sources: QEMU's docs/interop/{qcow2,qed_spec}.rst;
//! VMware's Virtual Disk Format 1.1; for qcow its header in docs of the same place.
//!
//! Promises: pure, bounded reads (1 MiB at most), no panic on any content.

use std::io;

use super::format::Format;
use crate::disk::ReadAt;

/// QEMU reads no longer names of backing and data files.
const NAME_MAX: u32 = 1023;
/// QEMU reads no longer descriptors of VMDK images.
const DESCRIPTOR_MAX: u64 = (1 << 20) - 1;
/// Most files of one VMDK image: 2 TiB in pieces of 2 GiB.
const PARTS_MAX: usize = 1024;
/// Most header extensions of a qcow2 image looked at; QEMU writes a handful.
const EXTENSIONS_MAX: usize = 256;

/// What a header says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Header {
    pub backing: Option<Backing>,
    /// Where a qcow2 image keeps its data, if not in itself.
    pub data_file: Option<String>,
    /// The files a VMDK descriptor puts together.
    pub parts: Vec<Part>,
    pub encrypted: bool,
    pub dirty: bool,
    pub corrupt: bool,
}

/// A file that holds a part of a VMDK image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    pub name: String,
    /// Whether it is nothing but content; else it has a header of its own, to be looked at with
    /// [`check_part`].
    pub flat: bool,
}

/// An image that is read where this one holds nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    pub name: String,
    /// QEMU's name of its format, where it is recorded.
    pub format: Option<String>,
}

/// Why a header cannot be trusted.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("{0}")]
    Malformed(&'static str),
}

use HeaderError::Malformed;

/// Reads what the header of an image in `format` refers to. Formats that cannot refer to other files give
/// nothing.
pub fn read(format: &Format, image: &dyn ReadAt) -> Result<Header, HeaderError> {
    match format {
        Format::Qcow2 => qcow2(image),
        Format::Qed => qed(image),
        Format::Vmdk => vmdk(image),
        Format::Other(name) if name == "qcow" => qcow(image),
        Format::Vpc => vpc(image),
        // VHDX and VDI have parents too; QEMU refuses those that have one.
        Format::Raw | Format::Vhdx | Format::Vdi | Format::Other(_) => Ok(Header::default()),
    }
}

fn qcow2(image: &dyn ReadAt) -> Result<Header, HeaderError> {
    let mut head = [0; 104];
    read_start(image, &mut head)?;
    if head[..4] != *b"QFI\xfb" {
        return Err(Malformed("the magic number is missing"));
    }
    let version = be32(&head, 4);
    // Version 2 ends before the feature bits.
    let (incompatible, header_len) = match version {
        2 => (0, 72),
        3 => (be64(&head, 72), be32(&head, 100)),
        _ => return Err(Malformed("its version is neither 2 nor 3")),
    };
    let cluster_bits = be32(&head, 20);
    if !(9..=21).contains(&cluster_bits) {
        return Err(Malformed("its cluster size is impossible"));
    }
    let cluster = 1u64 << cluster_bits;
    if u64::from(header_len) > cluster || header_len < 72 || !header_len.is_multiple_of(8) {
        return Err(Malformed("its header length is impossible"));
    }
    if incompatible >> 5 != 0 {
        return Err(Malformed("it uses features newer than this program"));
    }
    let backing_at = be64(&head, 8);
    let backing_len = be32(&head, 16);
    let backing_name = if backing_at == 0 {
        None
    } else {
        Some(name(image, backing_at, backing_len)?)
    };
    // Extensions end where the backing file's name begins, or with the first cluster.
    let end = if backing_at == 0 {
        cluster
    } else {
        backing_at.min(cluster)
    };
    let (backing_format, data_file) = qcow2_extensions(image, header_len.into(), end)?;
    let external = incompatible & 4 != 0;
    if external && data_file.is_none() {
        return Err(Malformed("its data is in another file that it does not name"));
    }
    Ok(Header {
        backing: backing_name.map(|name| Backing {
            name,
            format: backing_format,
        }),
        data_file: data_file.filter(|_| external),
        parts: Vec::new(),
        encrypted: be32(&head, 32) != 0,
        dirty: incompatible & 1 != 0,
        corrupt: incompatible & 2 != 0,
    })
}

/// The backing file's format and the data file's name.
fn qcow2_extensions(
    image: &dyn ReadAt,
    start: u64,
    end: u64,
) -> Result<(Option<String>, Option<String>), HeaderError> {
    let mut found = (None, None);
    let mut at = start;
    for _ in 0..EXTENSIONS_MAX {
        if at + 8 > end || at + 8 > image.size() {
            return Ok(found);
        }
        let mut head = [0; 8];
        image.read_exact_at(&mut head, at)?;
        let (kind, len) = (be32(&head, 0), be32(&head, 4));
        if u64::from(len) > end - at - 8 {
            return Err(Malformed("a header extension reaches beyond its place"));
        }
        match kind {
            0 => return Ok(found),
            0xe279_2aca => found.0 = Some(name(image, at + 8, len)?),
            0x4441_5441 => found.1 = Some(name(image, at + 8, len)?),
            _ => {}
        }
        at += 8 + u64::from(len).next_multiple_of(8);
    }
    Err(Malformed("it has too many header extensions"))
}

fn qed(image: &dyn ReadAt) -> Result<Header, HeaderError> {
    let mut head = [0; 64];
    read_start(image, &mut head)?;
    if head[..4] != *b"QED\0" {
        return Err(Malformed("the magic number is missing"));
    }
    let features = le64(&head, 16);
    let backing = if features & 1 == 0 {
        None
    } else {
        let name = name(image, le32(&head, 56).into(), le32(&head, 60))?;
        Some(Backing {
            name,
            format: (features & 4 != 0).then(|| "raw".to_owned()),
        })
    };
    Ok(Header {
        backing,
        dirty: features & 2 != 0,
        ..Header::default()
    })
}

fn qcow(image: &dyn ReadAt) -> Result<Header, HeaderError> {
    let mut head = [0; 48];
    read_start(image, &mut head)?;
    if head[..8] != *b"QFI\xfb\0\0\0\x01" {
        return Err(Malformed("the magic number is missing"));
    }
    let at = be64(&head, 8);
    let backing = if at == 0 {
        None
    } else {
        Some(Backing {
            name: name(image, at, be32(&head, 16))?,
            format: None,
        })
    };
    Ok(Header {
        backing,
        encrypted: be32(&head, 36) != 0,
        ..Header::default()
    })
}

/// Of a virtual PC image only whether it is a whole one. QEMU reads differencing images as if their parent
/// were empty.
fn vpc(image: &dyn ReadAt) -> Result<Header, HeaderError> {
    let mut head = [0; 64];
    read_start(image, &mut head)?;
    if head[..8] == *b"conectix" && be32(&head, 60) == 4 {
        return Err(Malformed(
            "it is a differencing disk, whose parent QEMU does not read; merge it first",
        ));
    }
    Ok(Header::default())
}

fn vmdk(image: &dyn ReadAt) -> Result<Header, HeaderError> {
    let mut magic = [0; 4];
    read_start(image, &mut magic)?;
    match &magic {
        b"KDMV" => vmdk_sparse(image),
        // An ESX sparse extent: only ever a part of an image that a descriptor puts together.
        b"COWD" => Ok(Header::default()),
        _ => vmdk_descriptor(&text(image, 0, image.size().min(DESCRIPTOR_MAX))?, true),
    }
}

fn vmdk_sparse(image: &dyn ReadAt) -> Result<Header, HeaderError> {
    let mut head = [0; 80];
    read_start(image, &mut head)?;
    let (capacity, at, sectors) = (le64(&head, 12), le64(&head, 28), le64(&head, 36));
    if capacity == 0 {
        // QEMU then takes the embedded descriptor as if it stood alone, with every file it names.
        return Err(Malformed("its sparse header states no capacity"));
    }
    let Some(at) = at.checked_mul(512).filter(|at| *at != 0) else {
        return Ok(Header::default());
    };
    let len = sectors
        .saturating_mul(512)
        .min(DESCRIPTOR_MAX)
        .min(image.size().saturating_sub(at));
    vmdk_descriptor(&text(image, at, len)?, false)
}

/// Makes sure that a part of a VMDK image which has a header of its own is only that, and refers to nothing
/// further.
pub fn check_part(part: &dyn ReadAt) -> Result<(), HeaderError> {
    let mut magic = [0; 4];
    read_start(part, &mut magic)?;
    match &magic {
        b"KDMV" => vmdk_sparse(part).map(|_| ()),
        b"COWD" => Ok(()),
        _ => Err(Malformed(
            "one of the files that it is made of is no sparse extent",
        )),
    }
}

/// `alone`: the descriptor is a file of its own, and names the files that hold the data.
///
/// QEMU's parser takes any white space for any other, line ends too. Nothing may pass here that it could read
/// as the name of a file, so lines are taken only in the form in which they are written by everybody.
fn vmdk_descriptor(text: &str, alone: bool) -> Result<Header, HeaderError> {
    let mut header = Header::default();
    let mut has_parent = false;
    let mut parent = None;
    for line in text.lines().map(str::trim) {
        if let Some(id) = line.strip_prefix("parentCID=") {
            has_parent = !id.trim().eq_ignore_ascii_case("ffffffff");
        } else if let Some(hint) = line.strip_prefix("parentFileNameHint=") {
            parent = quoted(hint);
        } else if alone && matches!(line.split_whitespace().next(), Some("RW" | "RDONLY" | "NOACCESS")) {
            header.parts.extend(vmdk_part(line)?);
        } else if alone && !is_assignment(line) {
            return Err(Malformed(
                "its descriptor holds a line that this program does not know",
            ));
        }
        if header.parts.len() > PARTS_MAX {
            return Err(Malformed("it is made of too many files"));
        }
    }
    if parent.is_some() || has_parent {
        let name = parent.ok_or(Malformed("it has a parent that it does not name"))?;
        header.backing = Some(Backing {
            name,
            format: Some("vmdk".into()),
        });
    }
    Ok(header)
}

/// One line: access, sectors, type, and except for zeroes a name in quotation marks.
fn vmdk_part(line: &str) -> Result<Option<Part>, HeaderError> {
    let mut fields = line.split_ascii_whitespace();
    let sectors = fields.nth(1).and_then(|field| field.parse::<u64>().ok());
    let (Some(_), Some(kind)) = (sectors, fields.next()) else {
        return Err(Malformed("its descriptor holds an incomplete line"));
    };
    let name = line.find('"').and_then(|at| quoted(&line[at..]));
    match (kind, name) {
        ("ZERO", None) => Ok(None),
        ("FLAT" | "VMFS", Some(name)) => Ok(Some(Part { name, flat: true })),
        ("SPARSE" | "VMFSSPARSE", Some(name)) => Ok(Some(Part { name, flat: false })),
        _ => Err(Malformed(
            "its descriptor holds a kind of extent that this program does not know",
        )),
    }
}

/// Lines that cannot be part of a file's description: blank ones, comments, and `key=value`.
fn is_assignment(line: &str) -> bool {
    let is_key = |key: &str| {
        key.chars()
            .all(|c| c.is_ascii_alphanumeric() || "._: ".contains(c))
    };
    line.is_empty() || line.starts_with('#') || line.split_once('=').is_some_and(|(key, _)| is_key(key))
}

/// The text between the first two quotation marks.
fn quoted(text: &str) -> Option<String> {
    let mut parts = text.split('"');
    parts.next()?;
    let inside = parts.next()?;
    parts.next().map(|_| inside.to_owned())
}

fn text(image: &dyn ReadAt, at: u64, len: u64) -> Result<String, HeaderError> {
    let mut bytes = vec![0; len as usize]; // Callers bound it to 1 MiB.
    image.read_exact_at(&mut bytes, at)?;
    // C programs stop at the first zero byte.
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    bytes.truncate(end);
    String::from_utf8(bytes).map_err(|_| Malformed("its descriptor is not text"))
}

fn name(image: &dyn ReadAt, at: u64, len: u32) -> Result<String, HeaderError> {
    if len == 0 || len > NAME_MAX {
        return Err(Malformed("the name of a file it refers to is empty or too long"));
    }
    let mut bytes = vec![0; len as usize];
    image.read_exact_at(&mut bytes, at)?;
    let text =
        String::from_utf8(bytes).map_err(|_| Malformed("the name of a file it refers to is not UTF-8"))?;
    if text.contains('\0') {
        return Err(Malformed("the name of a file it refers to holds a zero byte"));
    }
    Ok(text)
}

/// Fills `head` from the image's start; beyond a short image's end with zeroes.
fn read_start(image: &dyn ReadAt, head: &mut [u8]) -> io::Result<()> {
    let len = image.size().min(head.len() as u64) as usize;
    image.read_exact_at(&mut head[..len], 0)
}

/// The array of `N` bytes at `at`, which lies inside: the offsets are constants below the buffers' fixed
/// sizes.
fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(field(bytes, at))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(field(bytes, at))
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(field(bytes, at))
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(field(bytes, at))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DESCRIPTOR: &str = "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n\
        createType=\"twoGbMaxExtentFlat\"\n\n# Extent description\nRW 4 FLAT \"a-f001.vmdk\" 0\n\
        RW 4 ZERO\nRDONLY 4 SPARSE \"/etc/shadow\"\n#DDB\nddb.adapterType = \"ide\"\n";

    #[test]
    fn a_descriptor_names_all_its_files() {
        let header = read(&Format::Vmdk, &DESCRIPTOR.as_bytes().to_vec()).unwrap();
        let parts: Vec<_> = header
            .parts
            .iter()
            .map(|part| (part.name.as_str(), part.flat))
            .collect();
        assert_eq!(parts, [("a-f001.vmdk", true), ("/etc/shadow", false)]);
        assert_eq!(header.backing, None);
        let child = DESCRIPTOR.replace("ffffffff", "12345678\nparentFileNameHint=\"base.vmdk\"");
        let backing = read(&Format::Vmdk, &child.into_bytes()).unwrap().backing.unwrap();
        assert_eq!(
            (backing.name.as_str(), backing.format.as_deref()),
            ("base.vmdk", Some("vmdk"))
        );
    }

    #[test]
    fn what_might_hide_a_file_is_refused() {
        // QEMU's scanner would find a name in most of these.
        for odd in [
            "RX 4 FLAT \"/etc/shadow\" 0",
            "RW\n4 FLAT \"/etc/shadow=\" 0",
            "RW 4\nFLAT \"/etc/shadow\" 0",
            "RW 4 FLAT\n\"/etc/shadow=\" 0",
            "RW 4 FLAT /etc/shadow",
            "RW 4 SESPARSE \"/etc/shadow\"",
            "RW many FLAT \"/etc/shadow\" 0",
        ] {
            let text = DESCRIPTOR.replace("RW 4 ZERO", odd);
            assert!(read(&Format::Vmdk, &text.into_bytes()).is_err(), "{odd}");
        }
        let tabs = DESCRIPTOR.replace("RW 4 ZERO", "\tRW\t4\tFLAT\t\"/etc/shadow=\"\t0");
        assert_eq!(read(&Format::Vmdk, &tabs.into_bytes()).unwrap().parts.len(), 3);
        let mut head = vec![0; 512];
        head[..4].copy_from_slice(b"KDMV");
        assert!(read(&Format::Vmdk, &head).is_err());
        assert!(check_part(&head).is_err());
        assert!(check_part(&DESCRIPTOR.as_bytes().to_vec()).is_err());
        let mut differencing = vec![0; 512];
        differencing[..8].copy_from_slice(b"conectix");
        differencing[63] = 4;
        assert!(read(&Format::Vpc, &differencing).is_err());
    }

    proptest! {
        #[test]
        fn no_content_panics(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..2048),
            magic in 0usize..5,
        ) {
            let magics: [&[u8]; 5] =
                [b"QFI\xfb\0\0\0\x03", b"QFI\xfb\0\0\0\x02", b"QED\0", b"KDMV", b"# Disk DescriptorFile\n"];
            bytes.splice(0..0, magics[magic].iter().copied());
            // A plausible cluster size, so that the extensions are reached.
            if bytes.len() > 104 && magic < 2 {
                bytes[20..24].copy_from_slice(&9u32.to_be_bytes());
                bytes[100..104].copy_from_slice(&104u32.to_be_bytes());
                bytes[8..16].copy_from_slice(&400u64.to_be_bytes());
                bytes[72..80].fill(0);
            }
            let qcow = Format::Other("qcow".into());
            for format in [Format::Qcow2, Format::Qed, Format::Vmdk, qcow, Format::Vpc] {
                let _ = read(&format, &bytes);
            }
            let _ = check_part(&bytes);
        }
    }
}
