//! `cargo lab`: a checklist from words on the command line to one of the lab's parts.

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use longhaul_lab::janitor;
use longhaul_lab::namespace::{SOURCE_ADDRESS, Site, TARGET_ADDRESS};
use longhaul_lab::wan::path::Path;
use longhaul_lab::wan::pump::{Pump, open};
use longhaul_lab::wan::spec::LinkSpec;

/// Two sites on one machine, joined by an emulated WAN.
#[derive(Debug, Parser)]
#[command(name = "lab", version)]
struct Line {
    #[command(subcommand)]
    part: Part,
}

#[derive(Debug, Subcommand)]
enum Part {
    /// Emulate a WAN between two network namespaces (the lab starts this itself)
    Wan(Wan),
    /// Clean up when standard input ends (the lab starts this itself)
    #[command(hide = true)]
    Janitor,
}

#[derive(Args, Debug)]
struct Wan {
    /// Namespace of the source site, as `ip netns` names it
    #[arg(long)]
    source: String,
    /// Namespace of the target site
    #[arg(long)]
    target: String,
    #[command(flatten)]
    link: LinkSpec,
}

fn main() -> ExitCode {
    let outcome = match Line::parse().part {
        Part::Wan(wan) => emulate(wan).map(|()| ExitCode::SUCCESS),
        Part::Janitor => janitor::run().map(|()| ExitCode::SUCCESS),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("lab: {error}");
        ExitCode::from(2)
    })
}

fn emulate(wan: Wan) -> std::io::Result<()> {
    let mtu = wan.link.mtu;
    let source = open(
        &Site {
            namespace: wan.source,
            address: SOURCE_ADDRESS,
        },
        mtu,
    )?;
    let target = open(
        &Site {
            namespace: wan.target,
            address: TARGET_ADDRESS,
        },
        mtu,
    )?;
    let (forth, back) = wan.link.shapes();
    Pump::new(Path::new(forth, back), source, target, mtu).run()
}
