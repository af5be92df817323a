//! Who moves the guest or the disk, and the lab's words that make it so.
//!
//! Owns the names of contestants and of cases (what is moved), and the command lines of both. Leaves alone when they run.

/// What is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Case {
    /// A running guest with this workload.
    Live(&'static str),
    /// A running guest with the mixed workload after another one of the same template was moved, running, through the same gateways.
    Template,
    /// A powered-off disk.
    Cold,
    /// A powered-off disk, and a TCP flow on the same link.
    Beside,
    /// A running guest with the mixed workload, moved and straight back.
    Back,
    /// A disk that nothing makes smaller: what the link carries, and nothing else, decides.
    Noise,
}

/// Every case, in the order in which they are run.
pub const CASES: [Case; 9] = [
    Case::Live("mixed"),
    Case::Cold,
    Case::Template,
    Case::Live("idle"),
    Case::Live("redis"),
    Case::Live("fsync"),
    Case::Beside,
    Case::Back,
    Case::Noise,
];

impl Case {
    /// As it is written on the command line and in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Live(workload) => workload,
            Self::Template => "template",
            Self::Cold => "cold",
            Self::Beside => "beside",
            Self::Back => "back",
            Self::Noise => "noise",
        }
    }

    /// As people read it.
    pub fn title(self) -> &'static str {
        match self {
            Self::Live("mixed") => "running guest, mixed workload",
            Self::Live("idle") => "running guest, idle",
            Self::Live("redis") => "running guest, redis",
            Self::Live("fsync") => "running guest, fsync",
            Self::Live(other) => other,
            Self::Template => "second VM of a template, mixed workload",
            Self::Cold => "powered-off disk",
            Self::Beside => "powered-off disk beside a TCP flow",
            Self::Back => "running guest that goes straight back, mixed workload",
            Self::Noise => "256 MiB that do not shrink",
        }
    }

    /// Whether a guest runs.
    pub const fn is_live(self) -> bool {
        matches!(self, Self::Live(_) | Self::Template | Self::Back)
    }

    /// The case of this name.
    pub fn named(name: &str) -> Option<Self> {
        CASES.into_iter().find(|case| case.name() == name)
    }
}

/// Who moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Contestant {
    /// As it is written on the command line and in results.
    pub name: &'static str,
    /// As people read it.
    pub title: &'static str,
    words: &'static [&'static str],
}

const fn contestant(name: &'static str, title: &'static str, words: &'static [&'static str]) -> Contestant {
    Contestant { name, title, words }
}

/// The one that the others are held against.
pub const LONGHAUL: Contestant = contestant("longhaul", "Longhaul", &[]);

/// Longhaul with one idea switched off.
pub const ABLATIONS: [Contestant; 5] = [
    contestant(
        "longhaul-no-filter",
        "without the free-block filter",
        &["--without=filter"],
    ),
    contestant("longhaul-no-dedup", "without references", &["--without=dedup"]),
    contestant("longhaul-no-xor", "without differences", &["--without=xor"]),
    contestant("longhaul-lz4", "LZ4 only", &["--level=lz4"]),
    contestant(
        "longhaul-cubic",
        "Cubic instead of our controller",
        &["--congestion=cubic"],
    ),
];

/// QEMU alone: disks by NBD mirror (holes and zeros found at the source), RAM over TCP.
pub const QEMU: [Contestant; 3] = [
    contestant(
        "qemu-multifd-zstd",
        "QEMU, multifd zstd",
        &["--by=qemu", "--qemu-ram=multifd-zstd"],
    ),
    contestant("qemu-xbzrle", "QEMU, XBZRLE", &["--by=qemu", "--qemu-ram=xbzrle"]),
    contestant("qemu-plain", "QEMU, plain", &["--by=qemu", "--qemu-ram=plain"]),
];

/// Tools that copy a disk.
pub const TOOLS: [Contestant; 4] = [
    contestant("tar-zstd", "tar, zstd -3 --long, TLS", &["--by=tar-zstd"]),
    contestant("rsync", "rsync -S, zstd", &["--by=rsync"]),
    contestant("nbdcopy", "nbdcopy", &["--by=nbdcopy"]),
    contestant("qemu-img", "qemu-img convert over NBD", &["--by=qemu-img"]),
];

/// Longhaul's modes that share a link, each beside a TCP flow of each kind.
pub const NEIGHBOURS: [Contestant; 4] = [
    contestant(
        "shared-bbr",
        "shared, beside BBR",
        &["--congestion=shared", "--beside=bbr"],
    ),
    contestant(
        "shared-cubic",
        "shared, beside Cubic",
        &["--congestion=shared", "--beside=cubic"],
    ),
    contestant(
        "background-bbr",
        "background, beside BBR",
        &["--congestion=background", "--beside=bbr"],
    ),
    contestant(
        "background-cubic",
        "background, beside Cubic",
        &["--congestion=background", "--beside=cubic"],
    ),
];

impl Contestant {
    /// The contestant of this name.
    pub fn named(name: &str) -> Option<Self> {
        let rest = ABLATIONS.into_iter().chain(QEMU).chain(TOOLS).chain(NEIGHBOURS);
        std::iter::once(LONGHAUL)
            .chain(rest)
            .find(|contestant| contestant.name == name)
    }

    /// Whether it is Longhaul itself, set as it is by default.
    pub fn is_longhaul(self) -> bool {
        self == LONGHAUL
    }

    /// The lab's command line for this case, but for link and limit; `image` is the disk of a cold move.
    pub fn words(self, case: Case, image: &str) -> Vec<String> {
        let is_tool = TOOLS.contains(&self);
        let mut words = match case {
            Case::Cold if is_tool => vec!["copy".to_owned(), format!("--image={image}")],
            Case::Cold | Case::Beside | Case::Noise => vec!["move".to_owned(), format!("--image={image}")],
            Case::Live(workload) => live(workload),
            Case::Back => {
                let mut words = live("mixed");
                words.push("--back".to_owned());
                words
            }
            Case::Template => {
                let mut words = live("mixed");
                // The standard disk's content in use fits; the memory stays what it is by default.
                words.extend(["--after-first", "--window-file=2GiB"].map(str::to_owned));
                words
            }
        };
        words.extend(self.words.iter().map(|word| (*word).to_owned()));
        words
    }
}

fn live(workload: &str) -> Vec<String> {
    ["live", "--kind=standard", "--ram=512M"]
        .map(str::to_owned)
        .into_iter()
        .chain([format!("--workload={workload}")])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_to_who_and_what() {
        for case in CASES {
            assert_eq!(Case::named(case.name()), Some(case));
        }
        let all = ABLATIONS.into_iter().chain(QEMU).chain(TOOLS).chain(NEIGHBOURS);
        for one in all.chain([LONGHAUL]) {
            assert_eq!(Contestant::named(one.name), Some(one));
        }
        assert_eq!(Contestant::named("nobody"), None);
    }

    #[test]
    fn tools_copy_and_longhaul_moves() {
        assert_eq!(TOOLS[0].words(Case::Cold, "/d")[0], "copy");
        assert_eq!(LONGHAUL.words(Case::Cold, "/d"), ["move", "--image=/d"]);
        let live = QEMU[1].words(Case::Live("redis"), "");
        assert!(live.contains(&"--workload=redis".to_owned()) && live.contains(&"--by=qemu".to_owned()));
    }
}
