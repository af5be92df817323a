//! Physical volumes written without LVM's tools: for what they refuse to make without device-mapper, and for what they would
//! never write.

use longhaul_common::extent::Extent;

pub(crate) const EXTENT: u64 = 1 << 20;
const MIB: u64 = 1 << 20;

/// LVM's CRC-32, bit by bit.
pub(crate) fn checksum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0xf597_a6cf, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| {
            (sum >> 1) ^ (0xedb8_8320 * (sum & 1))
        })
    })
}

/// A physical volume of the group, numbered from 0.
#[derive(Clone)]
pub(crate) struct Pv {
    pub(crate) index: usize,
    /// Bytes of the volume that holds it.
    pub(crate) size: u64,
    /// Number of its extents.
    pub(crate) count: u64,
    /// Metadata areas.
    pub(crate) areas: Vec<Extent>,
    /// Byte at which extent 0 begins.
    pub(crate) start: u64,
}

impl Pv {
    /// Over `size` bytes, with one metadata area of a MiB in front.
    pub(crate) fn new(index: usize, size: u64) -> Self {
        Self {
            index,
            size,
            count: (size - MIB) / EXTENT,
            areas: vec![Extent::between(4096, MIB)],
            start: MIB,
        }
    }

    pub(crate) fn uuid(&self) -> String {
        format!("{:032}", self.index + 1)
    }

    /// Bytes of its extents `[first, first + count)`, from the volume's start.
    pub(crate) fn extents(&self, first: u64, count: u64) -> Extent {
        Extent::between(self.start + first * EXTENT, self.start + (first + count) * EXTENT)
    }

    fn text(&self) -> String {
        format!(
            "pv{} {{\nid = \"{}\"\ndevice = \"/dev/vd{}\"\nstatus = [\"ALLOCATABLE\"]\nflags = []\ndev_size = {}\n\
             pe_start = {}\npe_count = {}\n}}\n",
            self.index,
            dashed(&self.uuid()),
            self.index,
            self.size / 512,
            self.start / 512,
            self.count
        )
    }

    /// Writes label, header and metadata areas; `text` lies `ring` bytes into each area's ring.
    pub(crate) fn write(&self, volume: &mut [u8], text: &str, ring: u64) {
        let mut sector = vec![0u8; 512];
        sector[..8].copy_from_slice(b"LABELONE");
        sector[8..16].copy_from_slice(&1u64.to_le_bytes());
        sector[20..24].copy_from_slice(&32u32.to_le_bytes());
        sector[24..32].copy_from_slice(b"LVM2 001");
        sector[32..64].copy_from_slice(self.uuid().as_bytes());
        let pairs = [
            vec![(self.start, 0), (0, 0)],
            self.areas.iter().map(|a| (a.offset(), a.len())).collect(),
            vec![(0, 0)],
        ];
        let mut fields = vec![self.size];
        fields.extend(pairs.concat().iter().flat_map(|(at, len)| [*at, *len]));
        for (slot, field) in sector[64..].chunks_exact_mut(8).zip(fields) {
            slot.copy_from_slice(&field.to_le_bytes());
        }
        let sum = checksum(&sector[20..]);
        sector[16..20].copy_from_slice(&sum.to_le_bytes());
        volume[512..1024].copy_from_slice(&sector);
        for area in &self.areas {
            write_area(volume, area, text.as_bytes(), ring);
        }
    }
}

/// A metadata area with one committed text, going around the ring's end where it must.
fn write_area(volume: &mut [u8], area: &Extent, text: &[u8], ring: u64) {
    let mut text = text.to_vec();
    text.push(0);
    let mut header = vec![0u8; 512];
    header[4..20].copy_from_slice(b"\x20LVM2\x20x[5A%r0N*>");
    header[20..24].copy_from_slice(&1u32.to_le_bytes());
    header[24..32].copy_from_slice(&area.offset().to_le_bytes());
    header[32..40].copy_from_slice(&area.len().to_le_bytes());
    header[40..48].copy_from_slice(&(512 + ring).to_le_bytes());
    header[48..56].copy_from_slice(&(text.len() as u64).to_le_bytes());
    header[56..60].copy_from_slice(&checksum(&text).to_le_bytes());
    let sum = checksum(&header[4..]);
    header[..4].copy_from_slice(&sum.to_le_bytes());
    volume[area.offset() as usize..][..512].copy_from_slice(&header);
    for (i, byte) in text.iter().enumerate() {
        let at = 512 + (ring + i as u64) % (area.len() - 512);
        volume[(area.offset() + at) as usize] = *byte;
    }
}

fn dashed(uuid: &str) -> String {
    let cuts = [0, 6, 10, 14, 18, 22, 26, 32];
    let groups: Vec<&str> = cuts.windows(2).map(|pair| &uuid[pair[0]..pair[1]]).collect();
    groups.join("-")
}

/// A logical volume: name and segments. A segment is (extents, type, further lines).
pub(crate) fn lv(name: &str, segments: &[(u64, &str, &str)]) -> String {
    lv_with(name, "\"READ\", \"WRITE\", \"VISIBLE\"", "", segments)
}

/// The same with status words and further lines of its own.
pub(crate) fn lv_with(name: &str, status: &str, lines: &str, segments: &[(u64, &str, &str)]) -> String {
    let number = name
        .bytes()
        .fold(7u64, |sum, byte| sum * 31 % 1_000_000_007 + u64::from(byte));
    let id = dashed(&format!("lv{number:030}"));
    let mut text = format!(
        "{name} {{\nid = \"{id}\"\nstatus = [{status}]\nflags = []\ncreation_time = 1700000000\n\
         creation_host = \"test\"\n{lines}\nsegment_count = {}\n",
        segments.len()
    );
    let mut at = 0;
    for (i, (count, kind, lines)) in segments.iter().enumerate() {
        text += &format!(
            "segment{} {{\nstart_extent = {at}\nextent_count = {count}\ntype = \"{kind}\"\n{lines}\n}}\n",
            i + 1
        );
        at += count;
    }
    text + "}\n"
}

/// A linear segment on `pv` from extent `first` on.
pub(crate) fn linear(pv: usize, first: u64) -> String {
    format!("stripe_count = 1 # linear\nstripes = [\n\"pv{pv}\", {first}\n]")
}

/// Stripes of 64 KiB.
pub(crate) fn striped(areas: &[(usize, u64)]) -> String {
    let list: Vec<String> = areas
        .iter()
        .map(|(pv, first)| format!("\"pv{pv}\", {first}"))
        .collect();
    format!(
        "stripe_count = {}\nstripe_size = 128\nstripes = [ {} ]",
        areas.len(),
        list.join(",\n")
    )
}

/// The metadata text of a group.
pub(crate) fn group(pvs: &[Pv], lvs: &[String]) -> String {
    group_with("", pvs, lvs)
}

/// The same with further lines of the group.
pub(crate) fn group_with(lines: &str, pvs: &[Pv], lvs: &[String]) -> String {
    let pvs: String = pvs.iter().map(Pv::text).collect();
    let id = dashed(&format!("vg{:030}", 1));
    let status = match lines.contains("status") {
        true => "",
        false => "status = [\"RESIZEABLE\", \"READ\", \"WRITE\"]\nflags = []\n",
    };
    format!(
        "vg0 {{\nid = \"{id}\"\nseqno = 5\nformat = \"lvm2\" # informational\n{status}\
         {lines}\nextent_size = {}\nmax_lv = 0\nmax_pv = 0\nmetadata_copies = 0\n\nphysical_volumes {{\n{pvs}}}\n\n\
         logical_volumes {{\n{}}}\n}}\n# Generated by LVM2\n\ncontents = \"Text Format Volume Group\"\nversion = 1\n\n\
         description = \"Write from \\\"test\\\".\"\ncreation_host = \"test\"\t# Linux\ncreation_time = 1700000000\n",
        EXTENT / 512,
        lvs.concat()
    )
}
