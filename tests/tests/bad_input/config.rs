//! Mistakes in config files: exit code 2 and one sentence that names file, key and remedy.

use std::fs;
use std::net::{TcpListener, UdpSocket};

use longhaul_common::link::Role;

use crate::site::{Program, SOURCE, Sites, TARGET, said};

/// Starts `role` with `text` as its config: it must refuse in one sentence that holds all `words`.
fn refused(sites: &Sites, role: Role, text: &str, words: &[&str]) {
    let file = sites.write("bad.toml", text).display().to_string();
    refused_file(sites, role, &file, words);
}

fn refused_file(sites: &Sites, role: Role, file: &str, words: &[&str]) {
    let program = format!("longhaul-{}", role.as_str());
    let output = sites.finish(sites.command(&program, &["--config", file]));
    let text = said(&output);
    let what = format!("{words:?}: {text}");
    assert_eq!(output.status.code(), Some(2), "{what}");
    let sentence = text.lines().filter(|line| line.starts_with(&program)).count();
    assert_eq!(sentence, 1, "one sentence: {what}");
    // Before it there may be log lines of what went well; no failure is said twice, and none after the sentence.
    assert!(
        text.lines().last().is_some_and(|line| line.starts_with(&program)),
        "{what}"
    );
    assert!(
        !text.contains("panicked")
            && !text
                .lines()
                .any(|line| line.contains(" WARN ") && !line.contains("the kernel grants"))
            && !text.contains(" ERROR "),
        "{what}"
    );
    let last = text.lines().last().unwrap_or("");
    for word in words {
        assert!(last.contains(word), "'{word}' is missing in: {last}");
    }
}

#[test]
fn a_wrong_key_or_value_is_named() {
    let sites = Sites::new(&[]);
    let gateway = sites.gateway_config(SOURCE);
    let agent = sites.agent_config(SOURCE);
    let swap = |text: &str, from: &str, to: &str| {
        assert!(text.contains(from), "{from}");
        text.replace(from, to)
    };
    let cases: &[(Role, String, &[&str])] = &[
        (
            Role::Gateway,
            swap(&gateway, "state = ", "stat = "),
            &["bad.toml", "'stat'", "did you mean 'state'"],
        ),
        (
            Role::Gateway,
            gateway.clone() + "[limits]\nsend_memry = \"1 MiB\"\n",
            &["limits.send_memry", "send_memory"],
        ),
        (
            Role::Gateway,
            swap(&gateway, "60 Mbit/s", "60 MB"),
            &["peer[0].link.rate", "Mbit/s"],
        ),
        (
            Role::Gateway,
            swap(&gateway, "60 Mbit/s", "60"),
            &["peer[0].link.rate", "Mbit/s"],
        ),
        (
            Role::Gateway,
            swap(&gateway, "40 ms", "40"),
            &["peer[0].link.rtt", "ms"],
        ),
        (
            Role::Gateway,
            gateway.clone() + "[limits]\nsend_memory = \"64 bananas\"\n",
            &["limits.send_memory"],
        ),
        (
            Role::Gateway,
            gateway.clone() + "[limits]\nworkers = 100000000\n",
            &["limits.workers", "1024"],
        ),
        (
            Role::Gateway,
            gateway.clone() + "[limits]\njobs = 0\n",
            &["limits.jobs"],
        ),
        (
            Role::Gateway,
            swap(&gateway, "connections = 2", "connections = 200"),
            &["connections", "16"],
        ),
        (
            Role::Gateway,
            gateway.clone() + "[log]\nlevel = \"a=b=c\"\n",
            &["log.level", "info"],
        ),
        (
            Role::Gateway,
            gateway.clone() + "[log]\nformat = \"xml\"\n",
            &["log.format", "json"],
        ),
        (
            Role::Gateway,
            gateway.clone() + "this is not TOML",
            &["bad.toml", "TOML"],
        ),
        (
            Role::Gateway,
            gateway.clone() + "[agents]\nlisten = \"127.0.0.1:1\"\n",
            &["bad.toml", "TOML"],
        ),
        (
            Role::Gateway,
            swap(&gateway, &sites.agents_port(SOURCE), "nowhere"),
            &["agents.listen"],
        ),
        (
            Role::Gateway,
            gateway.clone() + "[[peer]]\nsite = \"target\"\nname = \"other\"\naddress = \"127.0.0.1:7\"\n",
            &["[[peer]]", "'target'", "keep one"],
        ),
        (
            Role::Gateway,
            swap(&gateway, "site = \"target\"", "site = \"Not A Site\""),
            &["peer", "Not A Site", "a-z"],
        ),
        (
            Role::Gateway,
            swap(&gateway, &sites.peers_port(TARGET), "no-port"),
            &["peer", "no-port", "port"],
        ),
        (
            Role::Agent,
            swap(&agent, "[paths]", "[path]"),
            &["'path'", "did you mean 'paths'"],
        ),
        (
            Role::Agent,
            agent.clone() + "[target]\nmode = \"rw-r--r--\"\n",
            &["target.mode", "0640"],
        ),
        (
            Role::Agent,
            agent.clone() + "[limits]\njob_memory = \"64 KiB\"\n",
            &["limits.job_memory", "4 MiB"],
        ),
        (
            Role::Agent,
            agent.clone() + "[limits]\nread_threads = 0\n",
            &["limits.read_threads"],
        ),
        (
            Role::Agent,
            agent.clone() + "[limits]\nflush_time = \"0 s\"\n",
            &["limits.flush_time"],
        ),
        (
            Role::Agent,
            swap(&agent, &sites.agents_port(SOURCE), "no-port"),
            &["gateway.address", "no-port", "port"],
        ),
        (
            Role::Agent,
            swap(&agent, "source-gateway\"", "Bad Name\""),
            &["gateway.name", "Bad Name", "a-z"],
        ),
        (
            Role::Agent,
            agent.clone() + "[hooks]\nafter = \"relative\"\n",
            &["hooks.after", "relative"],
        ),
    ];
    for (role, text, words) in cases {
        refused(&sites, *role, text, words);
    }
}

#[test]
fn files_that_are_missing_or_wrong_are_named() {
    let sites = Sites::new(&[("other", Role::Operator, "root")]);
    refused_file(
        &sites,
        Role::Gateway,
        "/nowhere/gateway.toml",
        &["/nowhere/gateway.toml", "No such file"],
    );
    let folder = sites.path("").display().to_string();
    refused_file(&sites, Role::Agent, &folder, &["directory"]);
    let gateway = sites.gateway_config(SOURCE);
    let own = |end: &str| {
        sites
            .issued(SOURCE, Role::Gateway, "source-gateway", end)
            .display()
            .to_string()
    };
    let agent = |end: &str| {
        sites
            .issued(SOURCE, Role::Agent, "source-agent", end)
            .display()
            .to_string()
    };
    let with = |from: &str, to: &str| gateway.replace(from, to);
    let garbage = sites
        .write("garbage.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n")
        .display()
        .to_string();
    let empty = sites.write("empty.pem", "").display().to_string();
    let ca = sites.path("pki/ca.pem").display().to_string();
    let crl = sites.path("pki/crl.pem").display().to_string();
    for missing in [own("pem"), own("key"), ca.clone(), crl.clone()] {
        let gone = format!("{missing}.gone");
        refused(&sites, Role::Gateway, &with(&missing, &gone), &[&gone]);
    }
    for broken in [&garbage, &empty] {
        for file in [own("pem"), own("key"), ca.clone(), crl.clone()] {
            refused(&sites, Role::Gateway, &with(&file, broken), &[broken]);
        }
    }
    // Another program's certificate, and a key that is not this certificate's.
    let swapped = with(&own("pem"), &agent("pem")).replace(&own("key"), &agent("key"));
    refused(&sites, Role::Gateway, &swapped, &["agent", "gateway"]);
    refused(&sites, Role::Gateway, &with(&own("key"), &agent("key")), &["key"]);
}

#[test]
fn a_port_socket_or_folder_that_cannot_be_had_is_named() {
    let sites = Sites::new(&[]);
    let gateway = sites.gateway_config(TARGET);
    for (port, key) in [
        (sites.agents_port(TARGET), "agents.listen"),
        (sites.peers_port(TARGET), "peers.listen"),
    ] {
        let held = UdpSocket::bind(&port).unwrap();
        refused(&sites, Role::Gateway, &gateway, &[&port, key, "in use"]);
        drop(held);
    }
    let far = gateway.replace(&sites.peers_port(TARGET), "203.0.113.1:7401");
    refused(&sites, Role::Gateway, &far, &["203.0.113.1:7401"]);
    let held = TcpListener::bind((sites.address.as_str(), 7499)).unwrap();
    let tcp = format!("{}:7499", sites.address);
    let both = gateway.replace("[api]\n", &format!("[api]\nlisten = \"{tcp}\"\n"));
    refused(&sites, Role::Gateway, &both, &["api.listen", &tcp, "in use"]);
    let metrics = format!("metrics = \"{tcp}\"\n{}", sites.agent_config(TARGET));
    refused(&sites, Role::Agent, &metrics, &["metrics", &tcp, "in use"]);
    drop(held);
    let api = sites.api(TARGET).display().to_string();
    refused(
        &sites,
        Role::Gateway,
        &gateway.replace(&api, "/nowhere/api.sock"),
        &["/nowhere/api.sock", "folder"],
    );
    let long = format!("/tmp/{}", "x".repeat(120));
    refused(&sites, Role::Gateway, &gateway.replace(&api, &long), &[&long]);
    // Below a file no folder can be made, not even by root.
    let file = sites.write("file", "");
    let below = file.join("state").display().to_string();
    let state = sites.path("target-gateway/state").display().to_string();
    refused(&sites, Role::Gateway, &gateway.replace(&state, &below), &[&below]);
    let state = sites.path("target-agent/state").display().to_string();
    refused(
        &sites,
        Role::Agent,
        &sites.agent_config(TARGET).replace(&state, &below),
        &[&below],
    );
    // A folder that may be read only: /proc refuses everybody.
    let state = sites.path("target-gateway/state").display().to_string();
    refused(
        &sites,
        Role::Gateway,
        &gateway.replace(&state, "/proc/sys"),
        &["/proc/sys"],
    );
    let damaged = sites.path("damaged");
    fs::create_dir_all(&damaged).unwrap();
    fs::write(
        damaged.join("journal.sqlite"),
        "this is no journal at all, not even nearly".repeat(40),
    )
    .unwrap();
    let other = gateway.replace(&state, &damaged.display().to_string());
    refused(
        &sites,
        Role::Gateway,
        &other,
        &["journal.sqlite", "not a database"],
    );
    // A second gateway beside a living one.
    let mut first = Program::usual(&sites, TARGET, Role::Gateway);
    first.wait_for(&["the API listens"]);
    let ports = gateway.replace(
        &format!("{}:7403", sites.address),
        &format!("{}:7413", sites.address),
    );
    let ports = ports.replace(
        &format!("{}:7404", sites.address),
        &format!("{}:7414", sites.address),
    );
    refused(&sites, Role::Gateway, &ports, &[&api, "another gateway"]);
    first.assert_well();
}
