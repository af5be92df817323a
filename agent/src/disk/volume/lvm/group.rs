//! A volume group as its metadata text describes it: members, logical volumes, and which physical extents are in use.
//!
//! Owns the meaning of the text. Leaves alone which members this disk has (`place`). Promises that every physical extent in use by
//! any logical volume is in [`Member::used`]: a segment type, key, status or flag that this version does not know, or a logical
//! volume that names a physical volume in an unusual way, refuses the whole group.

use std::collections::{HashMap, HashSet};

use super::LvmUnproven;
use super::text::{Scalar, Section, Value, parse};

const SECTOR: u64 = 512;
/// As LVM limits it.
const STRIPE_LIMIT: usize = 128;

/// Types that only stand on other logical volumes, which the text lists with segments of their own.
const STACKED: &[&str] = &[
    "cache",
    "cache-pool",
    "error",
    "integrity",
    "mirror",
    "snapshot",
    "thin",
    "thin-pool",
    "vdo",
    "vdo-pool",
    "writecache",
    "zero",
];

#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) name: String,
    /// Without dashes.
    pub(crate) id: String,
    /// Bytes of a physical extent.
    pub(crate) extent: u64,
    pub(crate) members: Vec<Member>,
    pub(crate) logicals: Vec<Logical>,
}

/// A physical volume of the group.
#[derive(Debug)]
pub(crate) struct Member {
    /// Without dashes.
    pub(crate) id: String,
    /// Byte at which extent 0 begins.
    pub(crate) start: u64,
    /// Number of extents.
    pub(crate) count: u64,
    /// Extents in use, (first, count), sorted, never overlapping.
    pub(crate) used: Vec<(u64, u64)>,
}

#[derive(Debug)]
pub(crate) struct Logical {
    pub(crate) name: String,
    /// Every stretch it has on physical volumes, in its own order.
    pub(crate) stretches: Vec<Stretch>,
    /// Why its content is not judged although its place is known.
    pub(crate) refusal: Option<String>,
}

/// Extents dealt out over areas of equal length.
#[derive(Debug)]
pub(crate) struct Stretch {
    /// (index of the member, first extent).
    pub(crate) areas: Vec<(usize, u64)>,
    /// Extents of each area.
    pub(crate) count: u64,
    /// Bytes of a turn; 0 where there is one area.
    pub(crate) chunk: u64,
}

/// Understands a metadata text.
pub(crate) fn understand(bytes: &[u8]) -> Result<Group, LvmUnproven> {
    let root = parse(bytes)?;
    let format = (root.text("contents"), root.number("version"));
    let mut sections = root.sections();
    let (Some((name, vg)), None) = (sections.next(), sections.next()) else {
        return Err(odd("not one volume group in the text"));
    };
    if format != (Some("Text Format Volume Group"), Some(1)) {
        return Err(LvmUnproven::Unknown("the format of the text".into()));
    }
    let keys = [
        "id",
        "seqno",
        "format",
        "status",
        "flags",
        "extent_size",
        "max_lv",
        "max_pv",
        "metadata_copies",
        "tags",
        "allocation_policy",
        "profile",
        "system_id",
        "creation_time",
        "creation_host",
        "physical_volumes",
        "logical_volumes",
        "historical_logical_volumes",
    ];
    only_keys(vg, &keys, "volume group")?;
    only_items(vg, "status", &["RESIZEABLE", "READ", "WRITE"])?;
    only_items(vg, "flags", &[])?;
    if vg.text("format").is_some_and(|format| format != "lvm2") {
        return Err(LvmUnproven::Unknown("the format of the volume group".into()));
    }
    let extent = vg
        .number("extent_size")
        .and_then(|sectors| sectors.checked_mul(SECTOR));
    let mut reader = Reader {
        extent: extent
            .filter(|bytes| *bytes > 0)
            .ok_or_else(|| odd("no extent size"))?,
        members: Vec::new(),
        member_names: HashMap::new(),
        referred: HashSet::new(),
    };
    for (name, pv) in section_of(vg, "physical_volumes").sections() {
        reader.member(name, pv)?;
    }
    let logicals = reader.logicals(section_of(vg, "logical_volumes"))?;
    reader.settle()?;
    Ok(Group {
        name: name.to_owned(),
        id: plain_id(vg)?,
        extent: reader.extent,
        members: reader.members,
        logicals,
    })
}

struct Reader<'a> {
    extent: u64,
    members: Vec<Member>,
    member_names: HashMap<&'a str, usize>,
    /// Whatever any logical volume names that is not a physical volume.
    referred: HashSet<&'a str>,
}

impl<'a> Reader<'a> {
    fn member(&mut self, name: &'a str, pv: &Section<'a>) -> Result<(), LvmUnproven> {
        let keys = [
            "id",
            "device",
            "device_id",
            "device_id_type",
            "status",
            "flags",
            "dev_size",
            "pe_start",
            "pe_count",
            "ba_start",
            "ba_size",
            "tags",
        ];
        only_keys(pv, &keys, "physical volume")?;
        only_items(pv, "status", &["ALLOCATABLE"])?;
        only_items(pv, "flags", &[])?;
        let start = pv
            .number("pe_start")
            .and_then(|sectors| sectors.checked_mul(SECTOR));
        let (Some(start), Some(count)) = (start, pv.number("pe_count")) else {
            return Err(odd("a physical volume without extents"));
        };
        let end = count
            .checked_mul(self.extent)
            .and_then(|len| len.checked_add(start));
        end.ok_or_else(|| odd("a physical volume that ends beyond 64 bits"))?;
        self.member_names.insert(name, self.members.len());
        self.members.push(Member {
            id: plain_id(pv)?,
            start,
            count,
            used: Vec::new(),
        });
        Ok(())
    }

    fn logicals(&mut self, section: &Section<'a>) -> Result<Vec<Logical>, LvmUnproven> {
        let mut logicals = Vec::new();
        for (name, lv) in section.sections() {
            logicals.push(self.logical(name, lv)?);
        }
        for logical in &mut logicals {
            if self.referred.contains(logical.name.as_str()) {
                logical.refusal = Some(
                    "another logical volume refers to it (snapshot, thin, cache, RAID or mirror)".into(),
                );
            }
        }
        Ok(logicals)
    }

    fn logical(&mut self, name: &'a str, lv: &Section<'a>) -> Result<Logical, LvmUnproven> {
        let keys = [
            "id",
            "status",
            "flags",
            "tags",
            "allocation_policy",
            "profile",
            "creation_time",
            "creation_host",
            "read_ahead",
            "segment_count",
        ];
        let mut logical = Logical {
            name: name.to_owned(),
            stretches: Vec::new(),
            refusal: lv_refusal(lv),
        };
        if lv
            .list("status")
            .unwrap_or_default()
            .contains(&Scalar::Text("PVMOVE"))
        {
            return Err(LvmUnproven::Unknown("a pvmove in progress".into()));
        }
        let mut segments = Vec::new();
        for (key, value) in &lv.entries {
            match value {
                Value::Section(segment) if key.starts_with("segment") => segments.push(segment),
                Value::Section(_) => {
                    return Err(LvmUnproven::Unknown(format!("section {key} of a logical volume")));
                }
                _ if keys.contains(key) => {}
                value => {
                    self.refer(value)?;
                    logical.refusal = Some(format!("this version does not know its setting {key}"));
                }
            }
        }
        if lv.number("segment_count") != Some(segments.len() as u64) || segments.is_empty() {
            return Err(odd("a wrong number of segments"));
        }
        segments.sort_by_key(|segment| segment.number("start_extent"));
        let mut next = 0;
        for segment in segments {
            next = self.segment(segment, next, &mut logical)?;
        }
        Ok(logical)
    }

    /// Takes in the segment that must begin at logical extent `at`; returns where the next one begins.
    fn segment(&mut self, segment: &Section<'a>, at: u64, logical: &mut Logical) -> Result<u64, LvmUnproven> {
        let (start, count) = (segment.number("start_extent"), segment.number("extent_count"));
        let (Some(start), Some(count), Some(kind)) = (start, count, segment.text("type")) else {
            return Err(odd("a segment without type or length"));
        };
        let next = start.checked_add(count).filter(|_| start == at && count > 0);
        let next = next.ok_or_else(|| odd("segments that do not follow each other"))?;
        match kind {
            "striped" | "linear" => self.striped(segment, count, logical)?,
            _ => {
                let base = kind.split('+').next().unwrap_or_default();
                if !STACKED.contains(&base) && !base.starts_with("raid") {
                    return Err(LvmUnproven::Unknown(format!("segment type {kind}")));
                }
                for (key, value) in &segment.entries {
                    if !["type", "tags"].contains(key) {
                        self.refer(value)?;
                    }
                }
                logical.refusal = Some(format!("it is of type {kind}"));
            }
        }
        Ok(next)
    }

    fn striped(
        &mut self,
        segment: &Section<'a>,
        count: u64,
        logical: &mut Logical,
    ) -> Result<(), LvmUnproven> {
        let keys = [
            "start_extent",
            "extent_count",
            "type",
            "tags",
            "stripe_count",
            "stripe_size",
            "stripes",
        ];
        only_keys(segment, &keys, "segment")?;
        let areas = segment.list("stripes").unwrap_or_default();
        let width = areas.len() / 2;
        let fits = areas.len().is_multiple_of(2) && (1..=STRIPE_LIMIT).contains(&width);
        if !fits
            || segment.number("stripe_count") != Some(width as u64)
            || !count.is_multiple_of(width as u64)
        {
            return Err(odd("a segment with a wrong number of stripes"));
        }
        let count = count / width as u64;
        let chunk = segment
            .number("stripe_size")
            .and_then(|sectors| sectors.checked_mul(SECTOR))
            .unwrap_or(0);
        if width > 1
            && (chunk == 0
                || !count
                    .checked_mul(self.extent)
                    .is_some_and(|len| len.is_multiple_of(chunk)))
        {
            return Err(odd("a wrong stripe size"));
        }
        let mut stretch = Stretch {
            areas: Vec::new(),
            count,
            chunk,
        };
        for area in areas.chunks_exact(2) {
            let (Scalar::Text(name), Scalar::Number(first)) = (area[0], area[1]) else {
                return Err(odd("a stripe that is not a name and a number"));
            };
            let first = u64::try_from(first).map_err(|_| odd("a stripe before the first extent"))?;
            match self.member_names.get(name) {
                Some(member) => {
                    self.members[*member].used.push((first, count));
                    stretch.areas.push((*member, first));
                }
                None => {
                    self.referred.insert(name);
                    logical.refusal = Some(format!("it stands on another logical volume ({name})"));
                }
            }
        }
        logical.stretches.push(stretch);
        Ok(())
    }

    /// Every name in `value` may be that of a logical volume. None may be that of a physical one: only stripes use those.
    fn refer(&mut self, value: &Value<'a>) -> Result<(), LvmUnproven> {
        let scalars = match value {
            Value::One(scalar) => std::slice::from_ref(scalar),
            Value::List(scalars) => scalars,
            Value::Section(section) => {
                return section
                    .entries
                    .iter()
                    .try_for_each(|(_, value)| self.refer(value));
            }
        };
        for scalar in scalars {
            let Scalar::Text(name) = scalar else { continue };
            if self.member_names.contains_key(name) {
                return Err(LvmUnproven::Unknown(format!(
                    "an unusual use of the physical volume {name}"
                )));
            }
            self.referred.insert(name);
        }
        Ok(())
    }

    /// Sorts what is in use and checks it.
    fn settle(&mut self) -> Result<(), LvmUnproven> {
        for member in &mut self.members {
            member.used.sort_unstable();
            let mut end = 0;
            for (first, count) in &member.used {
                if *first < end {
                    return Err(odd("two logical volumes that share an extent"));
                }
                end = first
                    .checked_add(*count)
                    .ok_or_else(|| odd("a stripe beyond 64 bits"))?;
            }
            if end > member.count {
                return Err(odd("a logical volume beyond the end of its physical volume"));
            }
        }
        Ok(())
    }
}

/// Whether a logical volume is one that a guest uses as a plain disk.
fn lv_refusal(lv: &Section<'_>) -> Option<String> {
    let status = lv.list("status").unwrap_or_default();
    let known = ["READ", "WRITE", "VISIBLE", "FIXED_MINOR"].map(Scalar::Text);
    if let Some(other) = status.iter().find(|item| !known.contains(item)) {
        return Some(format!("this version does not know its status {other}"));
    }
    if !status.contains(&Scalar::Text("VISIBLE")) {
        return Some("it is internal to LVM".into());
    }
    let flag = lv.list("flags").unwrap_or_default().first()?;
    Some(format!("this version does not know its flag {flag}"))
}

fn odd(what: &'static str) -> LvmUnproven {
    LvmUnproven::Inconsistent(what.to_owned())
}

fn section_of<'s, 'a>(vg: &'s Section<'a>, key: &str) -> &'s Section<'a> {
    const EMPTY: &Section<'static> = &Section { entries: Vec::new() };
    vg.section(key).unwrap_or(EMPTY)
}

fn plain_id(section: &Section<'_>) -> Result<String, LvmUnproven> {
    let id = section.text("id").unwrap_or_default().replace('-', "");
    match id.len() == 32 {
        true => Ok(id),
        false => Err(odd("an identifier of a wrong length")),
    }
}

fn only_keys(section: &Section<'_>, known: &[&str], of: &str) -> Result<(), LvmUnproven> {
    match section.entries.iter().find(|(key, _)| !known.contains(key)) {
        Some((key, _)) => Err(LvmUnproven::Unknown(format!("setting {key} of a {of}"))),
        None => Ok(()),
    }
}

fn only_items(section: &Section<'_>, key: &str, known: &[&str]) -> Result<(), LvmUnproven> {
    let items = section.list(key).unwrap_or_default();
    let is_known = |item: &Scalar<'_>| matches!(item, Scalar::Text(text) if known.contains(text));
    match items.iter().find(|item| !is_known(item)) {
        Some(item) => Err(LvmUnproven::Unknown(format!("{key} {item}"))),
        None => Ok(()),
    }
}
