//! Longhaul's ideas switched off, and settings that comparisons change: words of the lab, settings of the programs.
//!
//! Owns the words of the command line and the text that they add to config and job files. Leaves alone the rest of those
//! files (`programs`, `live::settings`). Promises that without a word nothing is added: the programs' own defaults are what
//! is measured.

use std::fmt::Write as _;

use clap::{Args, ValueEnum};
use longhaul_common::units::{ByteSize, Rate};

/// An idea that can be switched off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Idea {
    /// Free blocks stay behind
    Filter,
    /// Blocks that the other side has are referred to
    Dedup,
    /// Blocks that changed are sent as the difference
    Xor,
}

/// How the programs are to be set other than by default.
#[derive(Args, Clone, Debug, Default)]
pub struct Ideas {
    /// Switch an idea off; several are separated by commas
    #[arg(long, value_enum, value_delimiter = ',')]
    pub without: Vec<Idea>,
    /// How much work is done to compress, instead of as much as the link leaves time for
    #[arg(long, value_parser = ["raw", "lz4", "zstd1", "zstd3", "zstd9"])]
    pub level: Option<String>,
    /// Who decides how much may be in flight between the gateways
    #[arg(long, value_parser = ["dedicated", "shared", "background", "cubic", "bbr"])]
    pub congestion: Option<String>,
    /// Memory of the gateways for blocks that both sites remember
    #[arg(long)]
    pub window: Option<ByteSize>,
    /// The same in a file, older blocks included
    #[arg(long)]
    pub window_file: Option<ByteSize>,
    /// Most that the job may take of the link between the gateways
    #[arg(long)]
    pub job_rate: Option<Rate>,
    /// Whose job it is; both gateways know this tenant
    #[arg(long)]
    pub tenant: Option<String>,
}

impl Ideas {
    fn is_off(&self, idea: Idea) -> bool {
        self.without.contains(&idea)
    }

    /// The section `[reduction]` of a gateway's file; nothing where all is as by default.
    pub fn reduction(&self) -> String {
        let mut keys = String::new();
        for (idea, key) in [(Idea::Dedup, "dedup"), (Idea::Xor, "xor")] {
            if self.is_off(idea) {
                let _ = writeln!(keys, "{key} = false");
            }
        }
        if let Some(level) = &self.level {
            let _ = writeln!(keys, "level = \"{level}\"");
        }
        for (size, key) in [(self.window, "window"), (self.window_file, "window_file")] {
            if let Some(size) = size {
                let _ = writeln!(keys, "{key} = \"{} B\"", size.0);
            }
        }
        if let Some(tenant) = &self.tenant {
            let _ = writeln!(keys, "tenants = [\"{tenant}\"]");
        }
        if keys.is_empty() {
            keys
        } else {
            format!("[reduction]\n{keys}")
        }
    }

    /// What is added to the section of the link between the gateways.
    pub fn link(&self) -> String {
        let line = |mode| format!("congestion = \"{mode}\"\n");
        self.congestion.as_deref().map(line).unwrap_or_default()
    }

    /// What is added to a job file, before its first section.
    pub fn job(&self) -> String {
        let mut keys = String::new();
        if self.is_off(Idea::Filter) {
            keys += "filter = false\n";
        }
        if let Some(rate) = self.job_rate {
            let _ = writeln!(keys, "rate = \"{rate}\"");
        }
        if let Some(tenant) = &self.tenant {
            let _ = writeln!(keys, "tenant = \"{tenant}\"");
        }
        keys
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        ideas: Ideas,
    }

    fn ideas(words: &[&str]) -> Ideas {
        Line::parse_from(std::iter::once(&"lab").chain(words)).ideas
    }

    #[test]
    fn without_a_word_nothing_is_added() {
        let ideas = ideas(&[]);
        assert_eq!(
            (ideas.reduction(), ideas.link(), ideas.job()),
            (String::new(), String::new(), String::new())
        );
    }

    #[test]
    fn each_word_is_a_setting_that_the_gateway_knows() {
        let ideas = ideas(&[
            "--without=filter,xor",
            "--without=dedup",
            "--level=lz4",
            "--congestion=cubic",
            "--window=1 GiB",
        ]);
        assert_eq!(ideas.job(), "filter = false\n");
        let table: toml::Table = (ideas.reduction() + "[link]\n" + &ideas.link()).parse().unwrap();
        let known: longhaul_gateway::settings::ReductionSection =
            table["reduction"].clone().try_into().unwrap();
        assert!(!known.dedup && !known.xor && known.window.0 == 1 << 30);
        assert_eq!(known.level, longhaul_gateway::settings::LevelSetting::Lz4);
        assert_eq!(table["link"]["congestion"].as_str(), Some("cubic"));
    }
}
