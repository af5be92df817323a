//! The words of `longhaul pki` on the command line, with their help texts and defaults. What they do is in the module above.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use longhaul_common::link::Role;

/// The subcommands of `longhaul pki`.
#[derive(Clone, Debug, Subcommand)]
pub enum PkiCommand {
    /// Make a new authority: its key, its certificate and an empty revocation list
    Init(Init),
    /// Make a certificate and key for one program
    Issue(Issue),
    /// Show every certificate and whether it is good
    List(Common),
    /// Refuse a certificate from now on: by serial, or every certificate of a program by its name
    Revoke(Revoke),
    /// Sign the revocation list anew, so that it is not overdue
    Crl(Crl),
}

/// Where the authority is, and how to print.
#[derive(Clone, Debug, Args)]
pub struct Common {
    /// The authority's directory
    #[arg(long, value_name = "DIR", default_value = "/etc/longhaul/pki")]
    pub dir: PathBuf,
    /// Print one JSON value instead of text
    #[arg(long)]
    pub json: bool,
}

/// `longhaul pki init`
#[derive(Clone, Debug, Args)]
pub struct Init {
    /// The name that all programs of this authority share, like longhaul.example.org
    #[arg(long, value_name = "DOMAIN")]
    pub trust_domain: String,
    /// How long the authority is valid
    #[arg(long, default_value_t = 3650)]
    pub days: u32,
    /// Where and how
    #[command(flatten)]
    pub common: Common,
}

/// `longhaul pki issue`
#[derive(Clone, Debug, Args)]
pub struct Issue {
    /// The site that the program belongs to: a-z, 0-9 and '-'
    #[arg(long)]
    pub site: String,
    /// What the program is: gateway, agent or operator
    #[arg(long)]
    pub role: Role,
    /// The program's name, unique within site and role: a-z, 0-9 and '-'
    #[arg(long)]
    pub name: String,
    /// How long the certificate is valid
    #[arg(long, default_value_t = 365)]
    pub days: u32,
    /// Where certificate and key are written; the authority's directory `issued` by default
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Write over an earlier certificate and key of the same name (which stays valid until revoked)
    #[arg(long)]
    pub replace: bool,
    /// Where and how
    #[command(flatten)]
    pub common: Common,
}

/// `longhaul pki revoke`
#[derive(Clone, Debug, Args)]
pub struct Revoke {
    /// A serial of 32 hex digits, or NAME.ROLE.SITE.longhaul, NAME.ROLE.SITE, or NAME where that is only one program
    #[arg(value_name = "NAME|SERIAL")]
    pub what: String,
    /// In how many days the revocation list should be renewed
    #[arg(long, default_value_t = 90)]
    pub crl_days: u32,
    /// Where and how
    #[command(flatten)]
    pub common: Common,
}

/// `longhaul pki crl`
#[derive(Clone, Debug, Args)]
pub struct Crl {
    /// In how many days the list should be renewed
    #[arg(long, default_value_t = 90)]
    pub days: u32,
    /// Where and how
    #[command(flatten)]
    pub common: Common,
}
