//! The links that contestants meet on.
//!
//! Owns their names and the lab's words for them. Leaves alone what the emulator makes of it.

/// A link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Profile {
    /// As it is written on the command line and in results.
    pub name: &'static str,
    /// As people read it.
    pub title: &'static str,
    /// The lab's words.
    pub words: &'static [&'static str],
    /// What else a running guest's move is told here.
    pub live: &'static [&'static str],
    /// Mbit/s, where there is a limit.
    pub rate: Option<u32>,
}

/// The one on which everything is measured.
pub const MAIN: &str = "100-80";

/// All of them, fastest first.
pub const PROFILES: [Profile; 7] = [
    Profile {
        name: "veth",
        title: "unshaped veth pair",
        words: &["--veth", "--rate=0", "--rtt=0ms"],
        live: &[],
        rate: None,
    },
    Profile {
        name: "250-2",
        title: "250 Mbit/s, 2 ms",
        words: &["--rate=250mbit", "--rtt=2ms"],
        live: &[],
        rate: Some(250),
    },
    Profile {
        name: "200-40",
        title: "200 Mbit/s, 40 ms",
        words: &["--rate=200mbit", "--rtt=40ms"],
        live: &[],
        rate: Some(200),
    },
    Profile {
        name: MAIN,
        title: "100 Mbit/s, 80 ms",
        words: &["--rate=100mbit", "--rtt=80ms"],
        live: &[],
        rate: Some(100),
    },
    Profile {
        name: "50-100",
        title: "50 Mbit/s, 100 ms, 0.5 % loss",
        words: &["--rate=50mbit", "--rtt=100ms", "--loss=0.5%"],
        live: &[],
        rate: Some(50),
    },
    Profile {
        name: "20-200",
        title: "20 Mbit/s, 200 ms, 1 % loss (500 ms of pause allowed)",
        words: &["--rate=20mbit", "--rtt=200ms", "--loss=1%"],
        // The usual 300 ms hold one round trip and a stop with nothing to spare.
        live: &["--blackout=500ms"],
        rate: Some(20),
    },
    Profile {
        name: "100-300",
        title: "100 Mbit/s, 300 ms, 3 % loss (600 ms of pause allowed)",
        words: &["--rate=100mbit", "--rtt=300ms", "--loss=3%"],
        // The usual 300 ms do not hold a round trip and a stop.
        live: &["--blackout=600ms"],
        rate: Some(100),
    },
];

impl Profile {
    /// The profile of this name.
    pub fn named(name: &str) -> Option<Self> {
        PROFILES.into_iter().find(|profile| profile.name == name)
    }
}
