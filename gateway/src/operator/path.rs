//! `longhaul link SITE` and `longhaul digest IMAGE`: tests that need no gateway to be running.
//!
//! Owns finding the peer in the gateway's config, and the words of the result. Leaves measuring to `link::probe`.

use std::fs::File;
use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use clap::Args;
use longhaul_common::digest::{Digest, DiskDigest, LEAF};
use longhaul_common::link::probe::{ProbeLimits, ProbeReport, probe};
use longhaul_common::link::{CredentialsError, Identity, NotAnIdentity, Role, TlsState};
use longhaul_common::settings::{self, SettingsError};

use crate::settings::GatewaySettings;

/// `longhaul link`
#[derive(Debug, Args)]
pub(super) struct LinkArguments {
    /// The site of a [[peer]] in the gateway's config.
    site: String,
    /// The gateway's config: its certificate and the peer's address are taken from there.
    #[arg(long, default_value = "/etc/longhaul/gateway.toml")]
    config: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Why a test cannot be made.
#[derive(Debug, thiserror::Error)]
pub(super) enum PathError {
    #[error(transparent)]
    Settings(#[from] SettingsError),
    #[error("{config} has no [[peer]] for site '{site}'; it knows: {known}")]
    NoSuchPeer {
        config: PathBuf,
        site: String,
        known: String,
    },
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    #[error(transparent)]
    Identity(#[from] NotAnIdentity),
    #[error("'{address}' cannot be resolved; see the peer's address in the config and the host's DNS")]
    Resolve { address: String },
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("the digest of {path} cannot be stated")]
    Digest {
        path: PathBuf,
        source: longhaul_common::digest::DigestError,
    },
}

/// Tests the path to a site, and prints what was found. Gives whether all is good.
pub(super) async fn test(arguments: &LinkArguments) -> Result<bool, PathError> {
    let gateway: GatewaySettings = settings::load(&arguments.config)?;
    let peer = gateway
        .peer
        .iter()
        .find(|peer| peer.site == arguments.site)
        .ok_or_else(|| {
            let known: Vec<_> = gateway.peer.iter().map(|peer| peer.site.as_str()).collect();
            PathError::NoSuchPeer {
                config: arguments.config.clone(),
                site: arguments.site.clone(),
                known: known.join(", "),
            }
        })?;
    let tls = TlsState::load(gateway.identity.credentials(), Some(Role::Gateway))?;
    let us = tls.identity();
    let expected = Identity::new(us.trust_domain(), &peer.site, Role::Gateway, &peer.name)?;
    let unresolved = || PathError::Resolve {
        address: peer.address.clone(),
    };
    let found = tokio::net::lookup_host(peer.address.as_str()).await;
    let address: SocketAddr = found
        .ok()
        .and_then(|mut found| found.next())
        .ok_or_else(unresolved)?;
    let mut link = peer.link.far_settings();
    // One connection tests the whole link.
    link.connections = 1;
    let report = probe(address, &expected, &tls, &link, ProbeLimits::default()).await;
    if arguments.json {
        println!("{}", serde_json::to_string(&report).unwrap_or_default());
    } else {
        print!("{}", words(&report));
    }
    Ok(report.ok)
}

fn words(report: &ProbeReport) -> String {
    let mut out = String::new();
    for check in &report.checks {
        let mark = if check.ok { "ok  " } else { "BAD " };
        out += &format!("{mark} {:<12} {}\n", check.name, check.finding);
        if let Some(remedy) = &check.remedy {
            out += &format!("                  remedy: {remedy}\n");
        }
    }
    out
}

/// The digest of a raw image's content.
pub(super) fn digest(path: &Path) -> Result<Digest, PathError> {
    let failed = |source| PathError::Read {
        path: path.to_owned(),
        source,
    };
    let wrong = |source| PathError::Digest {
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).map_err(failed)?;
    let size = std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0)).map_err(failed)?;
    std::io::Seek::rewind(&mut file).map_err(failed)?;
    let mut digest = DiskDigest::new(size);
    let mut leaf = Vec::with_capacity(LEAF as usize);
    for index in 0..longhaul_common::digest::leaf_count(size) {
        leaf.clear();
        let whole = longhaul_common::digest::leaf_extent(index, size).len();
        file.by_ref().take(whole).read_to_end(&mut leaf).map_err(failed)?;
        digest.leaf(index, Digest::of(&leaf)).map_err(wrong)?;
    }
    digest.finish().map_err(wrong)
}
