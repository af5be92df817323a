//! The authority: what it makes is good for our own links and for openssl, and every misuse is refused in words.

#![allow(clippy::unwrap_used)]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use clap::Parser;
use jiff::{SignedDuration, Timestamp};
use longhaul_common::link::{Credentials, Role};
use longhaul_gateway::pki::{PkiCommand, run_to};

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: PkiCommand,
}

struct Bench {
    home: tempfile::TempDir,
    now: Timestamp,
}

impl Bench {
    fn empty() -> Self {
        Self {
            home: tempfile::tempdir().unwrap(),
            now: Timestamp::now(),
        }
    }

    fn new() -> Self {
        let bench = Self::empty();
        bench.run("init --trust-domain test.example").unwrap();
        bench
    }

    fn dir(&self) -> PathBuf {
        self.home.path().join("pki")
    }

    fn run(&self, line: &str) -> Result<String, String> {
        let words = std::iter::once("pki").chain(line.split_whitespace());
        let mut words: Vec<String> = words.map(str::to_owned).collect();
        words.extend(["--dir".to_owned(), self.dir().display().to_string()]);
        let cli = Cli::try_parse_from(words).map_err(|error| error.to_string())?;
        let mut out = Vec::new();
        run_to(&cli.command, self.now, &mut out).map_err(|error| error.to_string())?;
        Ok(String::from_utf8(out).unwrap())
    }

    fn credentials(&self, stem: &str) -> Credentials {
        let issued = self.dir().join("issued");
        Credentials {
            cert: issued.join(format!("{stem}.pem")),
            key: issued.join(format!("{stem}.key")),
            ca: self.dir().join("ca.pem"),
            crl: Some(self.dir().join("crl.pem")),
        }
    }
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

fn openssl(arguments: &[&str]) -> (bool, String) {
    let output = Command::new("openssl").args(arguments).output();
    let output = output.expect("this test needs the program openssl: apt-get install openssl");
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

#[test]
fn what_is_issued_is_good_until_it_is_revoked() {
    let bench = Bench::new();
    let said = bench
        .run("issue --site berlin --role agent --name host-1")
        .unwrap();
    assert!(
        said.contains("Certificate for agent host-1 of site berlin"),
        "{said}"
    );
    let files = bench.credentials("host-1.agent.berlin");
    assert_eq!(mode(&files.key), 0o600);
    assert_eq!(mode(&bench.dir()), 0o700);
    assert_eq!(mode(&bench.dir().join("ca.key")), 0o600);
    assert!(files.load(Some(Role::Agent), SystemTime::now()).is_ok());
    assert!(files.load(Some(Role::Gateway), SystemTime::now()).is_err());

    let said = bench.run("revoke host-1").unwrap();
    assert!(said.starts_with("Revoked 1 certificate(s) of 'host-1'"), "{said}");
    let error = files.load(Some(Role::Agent), SystemTime::now()).err().unwrap();
    assert!(error.to_string().contains("is revoked"), "{error}");
    assert!(
        bench
            .run("revoke host-1")
            .unwrap()
            .contains("was revoked already")
    );
    let listed = bench.run("list").unwrap();
    assert!(listed.lines().nth(1).unwrap().ends_with("revoked"), "{listed}");
}

#[test]
fn openssl_agrees() {
    let bench = Bench::new();
    bench
        .run("issue --site berlin --role gateway --name gw-1 --days 10")
        .unwrap();
    let files = bench.credentials("gw-1.gateway.berlin");
    let (ca, crl) = (bench.dir().join("ca.pem"), bench.dir().join("crl.pem"));
    let (ca, crl, cert) = (
        ca.to_str().unwrap(),
        crl.to_str().unwrap(),
        files.cert.to_str().unwrap(),
    );
    for purpose in ["sslserver", "sslclient"] {
        let arguments = [
            "verify",
            "-x509_strict",
            "-CAfile",
            ca,
            "-CRLfile",
            crl,
            "-crl_check",
            "-purpose",
            purpose,
            cert,
        ];
        let (ok, text) = openssl(&arguments);
        assert!(ok, "{text}");
    }
    let (_, text) = openssl(&["x509", "-in", cert, "-noout", "-text"]);
    assert!(
        text.contains("URI:spiffe://test.example/site/berlin/role/gateway/name/gw-1"),
        "{text}"
    );
    assert!(text.contains("DNS:gw-1.gateway.berlin.longhaul"), "{text}");
    assert!(text.contains("NIST CURVE: P-256"), "{text}");
    let (_, key) = openssl(&["pkey", "-in", files.key.to_str().unwrap(), "-noout", "-text"]);
    assert!(key.contains("P-256"), "{key}");

    bench.run("revoke gw-1.gateway.berlin").unwrap();
    let (ok, text) = openssl(&["verify", "-CAfile", ca, "-CRLfile", crl, "-crl_check", cert]);
    assert!(!ok && text.contains("certificate revoked"), "{text}");
    let (ok, text) = openssl(&["crl", "-in", crl, "-noout", "-CAfile", ca, "-text"]);
    assert!(
        ok && text.contains("verify OK") && text.contains("Next Update"),
        "{text}"
    );
}

#[test]
fn a_renewed_certificate_leaves_the_old_one_until_its_serial_is_revoked() {
    let bench = Bench::new();
    let issue = "issue --site berlin --role agent --name host-1 --json";
    let first: serde_json::Value = serde_json::from_str(&bench.run(issue).unwrap()).unwrap();
    let error = bench.run(issue).unwrap_err();
    assert!(error.contains("exists: use --replace"), "{error}");
    let second: serde_json::Value =
        serde_json::from_str(&bench.run(&format!("{issue} --replace")).unwrap()).unwrap();
    assert_eq!(second["earlier_valid"], 1);
    bench
        .run(&format!("revoke {}", first["serial"].as_str().unwrap()))
        .unwrap();
    assert!(
        bench
            .credentials("host-1.agent.berlin")
            .load(Some(Role::Agent), SystemTime::now())
            .is_ok()
    );
    let listed: serde_json::Value = serde_json::from_str(&bench.run("list --json").unwrap()).unwrap();
    assert_eq!(listed[0]["state"], "revoked");
    assert_eq!(listed[1]["state"], "valid");
    assert_eq!(
        listed[1]["identity"],
        "spiffe://test.example/site/berlin/role/agent/name/host-1"
    );
}

#[test]
fn every_misuse_has_its_sentence() {
    let bench = Bench::empty();
    let issue = "issue --site berlin --role agent --name host-1";
    assert!(bench.run(issue).unwrap_err().contains("there is no authority in"));
    assert!(bench.run("list").unwrap_err().contains("longhaul pki init"));
    assert!(
        bench
            .run("init --trust-domain Not_A_Domain")
            .unwrap_err()
            .contains("not a valid trust domain")
    );
    assert!(
        bench
            .run("init --trust-domain a.example --days 0")
            .unwrap_err()
            .contains("0 days is not a usable time")
    );
    bench.run("init --trust-domain a.example --days 100").unwrap();
    assert!(
        bench
            .run("init --trust-domain b.example")
            .unwrap_err()
            .contains("an authority in")
    );
    let long = bench.run(&format!("{issue} --days 200")).unwrap_err();
    assert!(long.contains("use --days 100 or less"), "{long}");
    assert!(
        bench
            .run("issue --site Berlin --role agent --name x --days 9")
            .unwrap_err()
            .contains("'Berlin' is not")
    );
    assert!(
        bench
            .run("issue --site b --role agent --name ../x --days 9")
            .unwrap_err()
            .contains("'../x' is not")
    );
    assert!(
        bench
            .run("issue --site b --role root --name x")
            .unwrap_err()
            .contains("use gateway, agent or operator")
    );
    assert!(
        bench
            .run("revoke nobody")
            .unwrap_err()
            .contains("no certificate of 'nobody'")
    );
    bench
        .run("issue --site berlin --role agent --name x --days 9")
        .unwrap();
    bench
        .run("issue --site munich --role agent --name x --days 9")
        .unwrap();
    let error = bench.run("revoke x").unwrap_err();
    assert!(
        error.contains("x.agent.berlin.longhaul, x.agent.munich.longhaul"),
        "{error}"
    );
    bench.run("revoke x.agent.munich.longhaul").unwrap();
    std::fs::write(bench.dir().join("issued.jsonl"), "{\"serial\":1}\n").unwrap();
    assert!(
        bench
            .run("list")
            .unwrap_err()
            .contains("issued.jsonl is damaged at line 1")
    );
}

#[test]
fn an_expired_certificate_is_listed_as_such_and_an_overdue_list_is_renewed() {
    let mut bench = Bench::new();
    bench
        .run("issue --site berlin --role agent --name host-1 --days 1")
        .unwrap();
    bench
        .run("issue --site berlin --role agent --name host-2 --days 300")
        .unwrap();
    bench.now += SignedDuration::from_hours(24 * 100);
    let listed = bench.run("list").unwrap();
    assert!(listed.lines().nth(1).unwrap().ends_with("expired"), "{listed}");
    let later = SystemTime::from(bench.now);
    let overdue = |bench: &Bench| {
        let files = bench.credentials("host-2.agent.berlin");
        let state = longhaul_common::link::TlsState::load(files, Some(Role::Agent)).unwrap();
        state.crl_next_update().unwrap() < later
    };
    assert!(overdue(&bench));
    let said = bench.run("crl --days 30").unwrap();
    assert!(said.contains("due for renewal on"), "{said}");
    assert!(!overdue(&bench));
}

#[test]
fn commands_at_the_same_time_lose_nothing() {
    let bench = Bench::new();
    std::thread::scope(|scope| {
        for number in 0..8 {
            let bench = &bench;
            scope.spawn(move || {
                bench
                    .run(&format!("issue --site b --role agent --name h-{number}"))
                    .unwrap()
            });
        }
    });
    let listed: serde_json::Value = serde_json::from_str(&bench.run("list --json").unwrap()).unwrap();
    assert_eq!(listed.as_array().unwrap().len(), 8);
    let left: Vec<_> = std::fs::read_dir(bench.dir())
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert!(
        !left.iter().any(|name| name.to_string_lossy().ends_with(".new")),
        "{left:?}"
    );
}
