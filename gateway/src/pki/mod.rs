//! `longhaul pki`: a small certificate authority in a directory.
//!
//! Owns the commands `init`, `issue`, `list`, `revoke` and `crl`, and what they print. The directory may live on any host, best on one
//! that is not a gateway; only `ca.pem`, `crl.pem` and each host's own certificate and key are copied to the hosts, which
//! notice changed files by themselves within seconds.
//!
//! Promises: a certificate is recorded before it exists, and a revocation before the list is signed, so after a crash `list` never
//! knows too little; running the same command again completes it. Private keys are 0600, the directory 0700.
//!
//! The revocation list names the day by which it should be renewed. `revoke` and `crl` sign a new one; running `longhaul pki crl`
//! and copying `crl.pem` once a month is enough at the default of 90 days. A list that is overdue is still obeyed, with a
//! loud warning.

mod arguments;
mod authority;
mod error;
mod index;

use std::io::Write;
use std::path::{Path, PathBuf};

use jiff::{SignedDuration, Timestamp};
use longhaul_common::link::{Identity, check_trust_domain};
use serde_json::json;

pub use arguments::{Common, Crl, Init, Issue, PkiCommand, Revoke};
pub use error::PkiError;
use index::{About, Directory, Record, State, make_private, write};

/// The longest validity that can be asked for, in days.
const DAYS_MAX: u32 = 36_500;

/// Runs one command and prints its result to standard output.
///
/// # Errors
/// Why nothing, or not all, was done.
#[expect(
    clippy::needless_pass_by_value,
    reason = "the program has no further use for it"
)]
pub fn run(command: PkiCommand) -> Result<(), PkiError> {
    let mut out = std::io::stdout().lock();
    run_to(&command, Timestamp::now(), &mut out)
}

/// Runs one command at the instant `now` and prints its result to `out`.
///
/// # Errors
/// Why nothing, or not all, was done.
pub fn run_to(command: &PkiCommand, now: Timestamp, out: &mut dyn Write) -> Result<(), PkiError> {
    let text = match command {
        PkiCommand::Init(init) => init.run(now)?,
        PkiCommand::Issue(issue) => issue.run(now)?,
        PkiCommand::List(common) => list(common, now)?,
        PkiCommand::Revoke(revoke) => revoke.run(now)?,
        PkiCommand::Crl(crl) => crl.run(now)?,
    };
    writeln!(out, "{text}").map_err(PkiError::Print)
}

impl Init {
    fn run(&self, now: Timestamp) -> Result<String, PkiError> {
        check_trust_domain(&self.trust_domain)?;
        let not_after = later(now, self.days)?;
        let directory = Directory::create(&self.common.dir)?;
        // The key is written last: without it, an interrupted `init` can be run again.
        if directory.file("ca.key").exists() {
            return Err(PkiError::AuthorityExists {
                directory: self.common.dir.clone(),
            });
        }
        let signed = authority::found(&self.trust_domain, now, not_after)?;
        let issuer = authority::issuer(&signed.certificate, &signed.key)?;
        let list = authority::revocation_list(&issuer, &[], now, later(now, 90)?)?;
        let about = About {
            trust_domain: self.trust_domain.clone(),
            not_after,
        };
        let about = serde_json::to_string(&about).map_err(PkiError::Output)?;
        write(&directory.file("authority.json"), &about, 0o644)?;
        directory.store_records(&[])?;
        write(&directory.file("crl.pem"), &list, 0o644)?;
        write(&directory.file("ca.pem"), &signed.certificate, 0o644)?;
        write(&directory.file("ca.key"), &signed.key, 0o600)?;
        let dir = self.common.dir.display();
        Ok(match self.common.json {
            true => json!({ "trust_domain": self.trust_domain, "not_after": not_after,
                "ca": directory.file("ca.pem"), "crl": directory.file("crl.pem") })
            .to_string(),
            false => format!(
                "Authority for {} made in {dir}, valid until {}.\n\
                 Keep {dir}/ca.key secret and backed up. Copy ca.pem and crl.pem to every host.\n\
                 Next: longhaul pki issue --site SITE --role gateway --name NAME",
                self.trust_domain,
                day(not_after)
            ),
        })
    }
}

impl Issue {
    fn run(&self, now: Timestamp) -> Result<String, PkiError> {
        let directory = Directory::open_existing(&self.common.dir)?;
        let about = directory.about()?;
        let identity = Identity::new(&about.trust_domain, &self.site, self.role, &self.name)?;
        let not_after = self.not_after(now, about.not_after)?;
        let (certificate, key) = self.files(&directory, &identity)?;
        let mut records = directory.records()?;
        let issuer = authority::issuer(&directory.read("ca.pem")?, &directory.read("ca.key")?)?;
        let (signed, record) = authority::issue(&issuer, &identity, now, not_after)?;
        let same = |r: &&Record| r.identity == identity && r.state(now) == State::Valid;
        let earlier = records.iter().filter(same).count();
        let serial = record.serial.clone();
        records.push(record);
        directory.store_records(&records)?;
        write(&key, &signed.key, 0o600)?;
        write(&certificate, &signed.certificate, 0o644)?;
        if self.common.json {
            let value = json!({ "identity": identity, "serial": serial, "not_after": not_after,
                "certificate": certificate, "key": key, "earlier_valid": earlier });
            return Ok(value.to_string());
        }
        let mut text = format!(
            "Certificate for {identity}, valid until {}, serial {serial}:\n  {}\n  {}\n\
             Copy both, with ca.pem and crl.pem, to its host.",
            day(not_after),
            certificate.display(),
            key.display()
        );
        if earlier > 0 {
            text += &format!(
                "\n{earlier} earlier certificate(s) of it are still valid: see `longhaul pki list`, and revoke by serial."
            );
        }
        Ok(text)
    }

    fn not_after(&self, now: Timestamp, authority: Timestamp) -> Result<Timestamp, PkiError> {
        let not_after = later(now, self.days)?;
        if not_after > authority {
            let days = authority.duration_since(now).as_hours() / 24;
            return Err(PkiError::OutlivesAuthority {
                until: day(authority),
                days,
            });
        }
        Ok(not_after)
    }

    fn files(&self, directory: &Directory, identity: &Identity) -> Result<(PathBuf, PathBuf), PkiError> {
        let out = self.out.clone().unwrap_or_else(|| directory.file("issued"));
        make_private(&out)?;
        let stem = format!("{}.{}.{}", identity.name(), identity.role(), identity.site());
        let (certificate, key) = (out.join(format!("{stem}.pem")), out.join(format!("{stem}.key")));
        let existing = [&certificate, &key]
            .into_iter()
            .find(|path| path.exists())
            .cloned();
        match existing {
            Some(path) if !self.replace => Err(PkiError::Exists { path }),
            _ => Ok((certificate, key)),
        }
    }
}

fn list(common: &Common, now: Timestamp) -> Result<String, PkiError> {
    let records = Directory::open_existing(&common.dir)?.records()?;
    if common.json {
        let value = |r: &Record| {
            json!({ "name": r.identity.name(), "role": r.identity.role(), "site": r.identity.site(),
                "identity": r.identity, "serial": r.serial, "not_before": r.not_before, "not_after": r.not_after,
                "state": r.state(now), "revoked": r.revoked })
        };
        return Ok(json!(records.iter().map(value).collect::<Vec<_>>()).to_string());
    }
    let width =
        |of: fn(&Identity) -> usize| records.iter().map(|r| of(&r.identity)).max().unwrap_or(0).max(4);
    let (name, site) = (width(|i| i.name().len()), width(|i| i.site().len()));
    let mut text = format!(
        "{:name$}  {:8}  {:site$}  {:32}  {:10}  STATE",
        "NAME", "ROLE", "SITE", "SERIAL", "UNTIL"
    );
    for r in &records {
        let i = &r.identity;
        let (role, until, state) = (i.role().as_str(), day(r.not_after), r.state(now).as_str());
        let line = format!(
            "\n{:name$}  {role:8}  {:site$}  {}  {until:10}  {state}",
            i.name(),
            i.site(),
            r.serial
        );
        text += &line;
    }
    Ok(text)
}

impl Revoke {
    fn run(&self, now: Timestamp) -> Result<String, PkiError> {
        let directory = Directory::open_existing(&self.common.dir)?;
        let mut records = directory.records()?;
        let chosen = choose(&records, &self.what)?;
        let fresh: Vec<usize> = chosen
            .iter()
            .copied()
            .filter(|at| records[*at].revoked.is_none())
            .collect();
        for at in &fresh {
            records[*at].revoked = Some(now);
        }
        directory.store_records(&records)?;
        let next_update = sign_list(&directory, &records, now, self.crl_days)?;
        let serials: Vec<&str> = fresh.iter().map(|at| records[*at].serial.as_str()).collect();
        let crl = directory.file("crl.pem");
        if self.common.json {
            let value = json!({ "revoked": serials, "crl": crl, "next_update": next_update });
            return Ok(value.to_string());
        }
        let done = match serials.as_slice() {
            [] => format!("'{}' was revoked already; the list was signed anew.", self.what),
            some => format!(
                "Revoked {} certificate(s) of '{}': {}.",
                some.len(),
                self.what,
                some.join(", ")
            ),
        };
        Ok(format!(
            "{done}\nCopy {} to every host: running programs then refuse it within seconds and close its links.",
            crl.display()
        ))
    }
}

impl Crl {
    fn run(&self, now: Timestamp) -> Result<String, PkiError> {
        let directory = Directory::open_existing(&self.common.dir)?;
        let records = directory.records()?;
        let next_update = sign_list(&directory, &records, now, self.days)?;
        let crl = directory.file("crl.pem");
        let revoked = records.iter().filter(|record| record.revoked.is_some()).count();
        Ok(match self.common.json {
            true => json!({ "crl": crl, "revoked": revoked, "next_update": next_update }).to_string(),
            false => format!(
                "Revocation list with {revoked} certificate(s) signed, due for renewal on {}. Copy {} to every host.",
                day(next_update),
                crl.display()
            ),
        })
    }
}

impl Directory {
    fn open_existing(path: &Path) -> Result<Self, PkiError> {
        if !path.join("ca.key").exists() {
            return Err(PkiError::NoAuthority {
                directory: path.to_owned(),
            });
        }
        Self::open(path)
    }
}

fn sign_list(
    directory: &Directory,
    records: &[Record],
    now: Timestamp,
    days: u32,
) -> Result<Timestamp, PkiError> {
    let next_update = later(now, days)?;
    let issuer = authority::issuer(&directory.read("ca.pem")?, &directory.read("ca.key")?)?;
    let list = authority::revocation_list(&issuer, records, now, next_update)?;
    write(&directory.file("crl.pem"), &list, 0o644)?;
    Ok(next_update)
}

/// The records that a serial or a name means: all certificates of exactly one program, or one.
fn choose(records: &[Record], what: &str) -> Result<Vec<usize>, PkiError> {
    let full = what.strip_suffix(".longhaul").unwrap_or(what);
    let means = |record: &Record| {
        let identity = &record.identity;
        let long = identity.dns_name();
        record.serial == what
            || identity.uri() == what
            || long.strip_suffix(".longhaul") == Some(full)
            || identity.name() == what
    };
    let chosen: Vec<usize> = records
        .iter()
        .enumerate()
        .filter(|(_, record)| means(record))
        .map(|(at, _)| at)
        .collect();
    let mut programs: Vec<String> = chosen.iter().map(|at| records[*at].identity.dns_name()).collect();
    programs.sort();
    programs.dedup();
    match programs.len() {
        0 => Err(PkiError::Unknown(what.to_owned())),
        1 => Ok(chosen),
        _ => Err(PkiError::Ambiguous {
            name: what.to_owned(),
            candidates: programs.join(", "),
        }),
    }
}

fn later(now: Timestamp, days: u32) -> Result<Timestamp, PkiError> {
    if days == 0 || days > DAYS_MAX {
        return Err(PkiError::Days(days));
    }
    now.checked_add(SignedDuration::from_hours(24 * i64::from(days)))
        .map_err(|_| PkiError::Date)
}

fn day(at: Timestamp) -> String {
    at.strftime("%Y-%m-%d").to_string()
}
