//! Wrong certificates and other versions between the programs: refused, with the reason in the log of both ends.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use longhaul_common::link::{LinkSettings, Listener, Role, connect};
use rcgen::{CertificateParams, DnType, Issuer, KeyPair, SanType};

use crate::site::{Program, SOURCE, Sites, TARGET};

/// The source gateway calls the target gateway; `theirs` and `ours` must stand in the target's and the source's log.
fn both_say(sites: &Sites, source_config: &str, theirs: &[&str], ours: &[&str]) {
    let mut target = Program::usual(sites, TARGET, Role::Gateway);
    target.wait_for(&["listening for peers"]);
    let config = sites.write("source-gateway.toml", source_config);
    let mut source = Program::start(sites, Role::Gateway, "source-gateway", &config);
    target.wait_for(&[&["WARN", "no link"], theirs].concat());
    source.wait_for(&[&["WARN", "cannot reach the peer"], ours].concat());
    target.assert_well();
    source.assert_well();
}

#[test]
fn an_unknown_authority_is_refused_at_both_ends() {
    let (sites, strangers) = (Sites::new(&[]), Sites::new(&[]));
    let foreign = sites.gateway_config(SOURCE).replace(
        &sites.identity_section(SOURCE, Role::Gateway, "source-gateway"),
        &strangers.identity_section(SOURCE, Role::Gateway, "source-gateway"),
    );
    // Whoever calls judges first; what it tells the other end is the alert.
    both_say(&sites, &foreign, &["unknown authority"], &["unknown authority"]);
}

#[test]
fn a_revoked_certificate_is_refused_at_both_ends() {
    let sites = Sites::new(&[]);
    // The list has not reached the revoked program itself yet.
    let (list, old) = (sites.path("pki/crl.pem"), sites.path("old-crl.pem"));
    std::fs::copy(&list, &old).unwrap();
    sites.pki(&["revoke", "source-gateway.gateway.source"]);
    let config = sites
        .gateway_config(SOURCE)
        .replace(&list.display().to_string(), &old.display().to_string());
    both_say(&sites, &config, &["source-gateway", "revoked"], &["revoked"]);
}

#[test]
fn an_expired_certificate_is_refused_at_both_ends() {
    let sites = Sites::new(&[]);
    let lives = Duration::from_secs(4);
    shorten(&sites, SOURCE, Role::Agent, "source-agent", lives);
    let made = SystemTime::now();
    let mut agent = Program::usual(&sites, SOURCE, Role::Agent);
    agent.wait_for(&["cannot reach the gateway", "no answer"]);
    std::thread::sleep((lives + Duration::from_secs(1)).saturating_sub(made.elapsed().unwrap()));
    let mut gateway = Program::usual(&sites, SOURCE, Role::Gateway);
    gateway.wait_for(&["WARN", "no link", "source-agent", "expired"]);
    agent.wait_for(&["WARN", "cannot reach the gateway", "expired"]);
    gateway.assert_well();
    agent.assert_well();
}

/// Signs the program's key anew, valid for a short time only.
fn shorten(sites: &Sites, site: &str, role: Role, name: &str, lives: Duration) {
    let read = |path: std::path::PathBuf| std::fs::read_to_string(path).unwrap();
    let authority = KeyPair::from_pem(&read(sites.path("pki/ca.key"))).unwrap();
    let issuer = Issuer::from_ca_cert_pem(&read(sites.path("pki/ca.pem")), authority).unwrap();
    let identity = sites.identity(site, role, name);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(DnType::CommonName, identity.dns_name());
    params.not_before = rcgen::date_time_ymd(1970, 1, 1) + (now - Duration::from_secs(60));
    params.not_after = rcgen::date_time_ymd(1970, 1, 1) + (now + lives);
    params.subject_alt_names = vec![
        SanType::URI(identity.uri().try_into().unwrap()),
        SanType::DnsName(identity.dns_name().try_into().unwrap()),
    ];
    params.use_authority_key_identifier_extension = true;
    let key = KeyPair::from_pem(&read(sites.issued(site, role, name, "key"))).unwrap();
    let certificate = params.signed_by(&key, &issuer).unwrap();
    std::fs::write(sites.issued(site, role, name, "pem"), certificate.pem()).unwrap();
}

#[test]
fn another_name_or_site_than_expected_is_refused_at_both_ends() {
    let sites = Sites::new(&[]);
    let other = sites
        .gateway_config(SOURCE)
        .replace("name = \"target-gateway\"", "name = \"other-gateway\"");
    both_say(&sites, &other, &["other-gateway"], &["target-gateway"]);
    // An agent of one site at the gateway of the other.
    let mut target = Program::usual(&sites, TARGET, Role::Gateway);
    target.wait_for(&["listening for agents"]);
    let astray = sites
        .agent_config(SOURCE)
        .replace(&sites.agents_port(SOURCE), &sites.agents_port(TARGET));
    let config = sites.write("astray.toml", &astray);
    let mut agent = Program::start(&sites, Role::Agent, "source-agent", &config);
    target.wait_for(&["WARN", "no link", "source-gateway"]);
    agent.wait_for(&["WARN", "cannot reach the gateway", "target"]);
    target.assert_well();
    agent.assert_well();
}

/// A program of the wrong role on each port of a gateway, and a wrong one where an agent calls.
#[test]
fn a_wrong_role_is_refused_at_both_ends() {
    let sites = Sites::new(&[(TARGET, Role::Operator, "root")]);
    let mut gateway = Program::usual(&sites, TARGET, Role::Gateway);
    gateway.wait_for(&["the API listens"]);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let settings = LinkSettings::lan();
    let expected = sites.identity(TARGET, Role::Gateway, "target-gateway");
    let wrong = [
        (
            sites.peers_port(TARGET),
            Role::Agent,
            "target-agent",
            longhaul_common::wire::ALPN_PEER,
        ),
        (
            sites.peers_port(TARGET),
            Role::Operator,
            "root",
            longhaul_common::wire::ALPN_PEER,
        ),
        (
            sites.agents_port(TARGET),
            Role::Gateway,
            "target-gateway",
            longhaul_common::wire::ALPN_AGENT,
        ),
        (
            sites.agents_port(TARGET),
            Role::Operator,
            "root",
            longhaul_common::wire::ALPN_AGENT,
        ),
    ];
    for (address, role, name, alpn) in wrong {
        let tls = sites.tls(TARGET, role, name);
        let call = connect(address.parse().unwrap(), &expected, alpn, &tls, &settings);
        let refused = runtime
            .block_on(call)
            .expect_err("a wrong role got through")
            .to_string();
        assert!(
            refused.contains("role") && refused.contains("refused us"),
            "{refused}"
        );
        gateway.wait_for(&["no link", name, "only a certificate for the role"]);
    }
    gateway.assert_well();
    drop(gateway);
    // Now the called end is no gateway.
    let tls = sites.tls(TARGET, Role::Operator, "root");
    let address = sites.agents_port(TARGET).parse().unwrap();
    let listener = runtime.block_on(async {
        Listener::bind(
            address,
            &tls,
            &[longhaul_common::wire::ALPN_AGENT],
            &[Role::Agent],
            &settings,
        )
        .unwrap()
    });
    let mut agent = Program::usual(&sites, TARGET, Role::Agent);
    agent.wait_for(&["WARN", "cannot reach the gateway", "root"]);
    crate::site::wait("the listener's reason", || {
        listener.refused().first().map(|refused| refused.reason.clone())
    });
    agent.assert_well();
}

#[test]
fn a_peer_of_another_version_is_named_at_both_ends() {
    let sites = Sites::new(&[]);
    let mut gateway = Program::usual(&sites, TARGET, Role::Gateway);
    gateway.wait_for(&["listening for peers"]);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let settings = LinkSettings::lan();
    let tls = sites.tls(SOURCE, Role::Gateway, "source-gateway");
    let expected = sites.identity(TARGET, Role::Gateway, "target-gateway");
    let address = sites.peers_port(TARGET).parse().unwrap();
    let call = connect(address, &expected, b"longhaul-peer/2", &tls, &settings);
    let refused = runtime
        .block_on(call)
        .expect_err("another version got through")
        .to_string();
    assert!(
        refused.contains("version") && refused.contains("update the older side"),
        "{refused}"
    );
    gateway.wait_for(&[
        "no link",
        "longhaul-peer/2 was offered",
        "longhaul-peer/1",
        "update the older side",
    ]);
    gateway.assert_well();
    drop(gateway);
    // A newer gateway where an agent calls.
    let tls = sites.tls(TARGET, Role::Gateway, "target-gateway");
    let address = sites.agents_port(TARGET).parse().unwrap();
    let listener = runtime.block_on(async {
        Listener::bind(address, &tls, &[b"longhaul-agent/2"], &[Role::Agent], &settings).unwrap()
    });
    let mut agent = Program::usual(&sites, TARGET, Role::Agent);
    agent.wait_for(&["WARN", "cannot reach the gateway", "version"]);
    let reason = crate::site::wait("the listener's reason", || {
        listener.refused().first().map(|refused| refused.reason.clone())
    });
    assert!(
        reason.contains("longhaul-agent/1") && reason.contains("longhaul-agent/2"),
        "{reason}"
    );
    agent.assert_well();
}
