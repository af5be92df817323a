//! Who may have a link: every good case, every refusal, and the sentence that each end prints.

#![allow(clippy::unwrap_used)]

mod link_support;

use std::time::Duration;

use link_support::{
    Authority, DAY, TRUST_DOMAIN, Wish, agent, bare_client, call, gateway, listen, pair, quick, refusal,
};
use longhaul_common::link::{
    ALPN_AGENT, ALPN_PEER, Credentials, Identity, LinkError, LinkSettings, Refusal, Role, TlsState, connect,
};

#[tokio::test]
async fn a_good_link_carries_streams_both_ways() {
    let (_authority, _listener, near, far) = pair(&quick()).await;
    assert_eq!(near.peer(), &gateway("munich"));
    assert_eq!(far.peer(), &gateway("berlin"));
    assert_eq!(near.alpn(), ALPN_PEER);
    let mut one_way = near.open_uni(0).await.unwrap();
    one_way.write_all(b"batch").await.unwrap();
    one_way.finish().unwrap();
    assert_eq!(
        far.accept_uni().await.unwrap().read_to_end(100).await.unwrap(),
        b"batch"
    );
    let (mut ask, mut answer) = far.open_bi().await.unwrap();
    ask.write_all(b"?").await.unwrap();
    let (mut reply, mut question) = near.accept_bi().await.unwrap();
    let mut byte = [0];
    question.read_exact(&mut byte).await.unwrap();
    reply.write_all(b"!").await.unwrap();
    answer.read_exact(&mut byte).await.unwrap();
    assert_eq!(&byte, b"!");
    near.close(0x123, "job cancelled");
    let seen = far.closed().await;
    assert_eq!(
        seen.to_string(),
        "the peer closed the link: job cancelled (code 291)"
    );
    assert_eq!(
        near.closed().await.to_string(),
        "the link was closed here: job cancelled"
    );
}

fn refused_by_peer(result: Result<longhaul_common::link::Link, LinkError>) -> Refusal {
    match result {
        Err(LinkError::RefusedByPeer { why, .. }) => why,
        Err(other) => panic!("expected a refusal by the peer, not: {other}"),
        Ok(_) => panic!("the link was made"),
    }
}

fn refused_here(result: Result<longhaul_common::link::Link, LinkError>) -> String {
    match result {
        Err(error @ LinkError::Refused { .. }) => error.to_string(),
        Err(other) => panic!("expected a refusal here, not: {other}"),
        Ok(_) => panic!("the link was made"),
    }
}

#[tokio::test]
async fn a_caller_of_an_unknown_authority_is_refused() {
    let (ours, theirs) = (Authority::new("a"), Authority::new("b"));
    let (listener, address) = listen(&ours.tls(&gateway("munich")), &quick());
    let mut credentials = theirs.issue("caller", &Wish::of(&agent("a-1")));
    // The caller believes both authorities, the listener only its own.
    let both =
        [ours.path("ca.pem"), theirs.path("ca.pem")].map(|path| std::fs::read_to_string(path).unwrap());
    theirs.replace("both.pem", &both.concat());
    (credentials.ca, credentials.crl) = (theirs.path("both.pem"), None);
    let tls = TlsState::load(credentials, Some(Role::Agent)).unwrap();
    let why = refused_by_peer(call(address, &gateway("munich"), ALPN_AGENT, &tls).await);
    assert_eq!(why, Refusal::UnknownAuthority);
    let log = refusal(&listener).await;
    assert!(
        log.starts_with("refused agent a-1 of site berlin at 127.0.0.1:"),
        "{log}"
    );
    assert!(log.contains("issued by an unknown authority"), "{log}");
}

#[tokio::test]
async fn a_listener_of_an_unknown_authority_is_refused() {
    let (ours, theirs) = (Authority::new("a"), Authority::new("b"));
    let (listener, address) = listen(&theirs.tls(&gateway("munich")), &quick());
    let said = refused_here(call(address, &gateway("munich"), ALPN_AGENT, &ours.tls(&agent("a-1"))).await);
    assert!(
        said.starts_with("refused gateway gw-1 of site munich at 127.0.0.1:"),
        "{said}"
    );
    assert!(said.contains("issued by an unknown authority"), "{said}");
    let log = refusal(&listener).await;
    assert!(
        log.contains("refused us: the certificate was issued by an unknown authority"),
        "{log}"
    );
}

#[tokio::test]
async fn a_revoked_caller_is_refused() {
    let authority = Authority::new("a");
    let (listener, address) = listen(&authority.tls(&gateway("munich")), &quick());
    let caller = authority.tls_of(
        &agent("a-1"),
        &Wish {
            serial: 66,
            ..Wish::of(&agent("a-1"))
        },
    );
    assert!(
        call(address, &gateway("munich"), ALPN_AGENT, &caller)
            .await
            .is_ok()
    );
    authority.publish(&[66], 30);
    let strict = authority.tls(&gateway("munich"));
    let (listener_2, address_2) = listen(&strict, &quick());
    let why = refused_by_peer(call(address_2, &gateway("munich"), ALPN_AGENT, &caller).await);
    assert_eq!(why, Refusal::Revoked);
    let log = refusal(&listener_2).await;
    assert!(
        log.contains("agent a-1 of site berlin") && log.contains("is revoked"),
        "{log}"
    );
    assert!(listener.refused().is_empty());
}

#[tokio::test]
async fn a_revoked_listener_is_refused() {
    let authority = Authority::new("a");
    let munich = authority.tls_of(
        &gateway("munich"),
        &Wish {
            serial: 66,
            ..Wish::of(&gateway("munich"))
        },
    );
    let (listener, address) = listen(&munich, &quick());
    authority.publish(&[66], 30);
    let said = refused_here(
        call(
            address,
            &gateway("munich"),
            ALPN_AGENT,
            &authority.tls(&agent("a-1")),
        )
        .await,
    );
    assert!(said.contains("the certificate is revoked"), "{said}");
    let log = refusal(&listener).await;
    assert!(log.contains("refused us: the certificate is revoked"), "{log}");
}

#[tokio::test]
async fn an_overdue_revocation_list_still_refuses_whom_it_names_and_only_them() {
    let authority = Authority::new("a");
    authority.publish(&[66], -3);
    let munich = authority.tls(&gateway("munich"));
    assert!(
        munich
            .warnings()
            .iter()
            .any(|w| w.contains("3 days past its renewal date")),
        "{:?}",
        munich.warnings()
    );
    let (listener, address) = listen(&munich, &quick());
    assert!(
        call(
            address,
            &gateway("munich"),
            ALPN_AGENT,
            &authority.tls(&agent("a-1"))
        )
        .await
        .is_ok()
    );
    authority.publish(&[], -3);
    let revoked = authority.tls_of(
        &agent("a-2"),
        &Wish {
            serial: 66,
            ..Wish::of(&agent("a-2"))
        },
    );
    let why = refused_by_peer(call(address, &gateway("munich"), ALPN_AGENT, &revoked).await);
    assert_eq!(why, Refusal::Revoked);
    assert!(refusal(&listener).await.contains("a-2"));
}

#[tokio::test]
async fn an_expired_caller_and_an_expired_listener_are_refused() {
    let authority = Authority::new("a");
    let brief = |identity: &Identity| Wish {
        until: 2,
        ..Wish::of(identity)
    };
    let (good_listener, good_address) = listen(&authority.tls(&gateway("munich")), &quick());
    let old_gateway = authority.tls_of(&gateway("paris"), &brief(&gateway("paris")));
    let (old_listener, old_address) = listen(&old_gateway, &quick());
    let old_agent = authority.tls_of(&agent("a-1"), &brief(&agent("a-1")));
    let good_agent = authority.tls(&agent("a-2"));
    tokio::time::sleep(Duration::from_millis(3200)).await;
    let why = refused_by_peer(call(good_address, &gateway("munich"), ALPN_AGENT, &old_agent).await);
    assert_eq!(why, Refusal::Expired);
    let log = refusal(&good_listener).await;
    assert!(
        log.contains("agent a-1 of site berlin") && log.contains("has expired"),
        "{log}"
    );
    let said = refused_here(call(old_address, &gateway("paris"), ALPN_AGENT, &good_agent).await);
    assert!(
        said.contains("gateway gw-1 of site paris") && said.contains("has expired"),
        "{said}"
    );
    let log = refusal(&old_listener).await;
    assert!(log.contains("refused us: the certificate has expired"), "{log}");
}

#[tokio::test]
async fn a_wrong_role_is_refused_with_the_roles_that_would_do() {
    let authority = Authority::new("a");
    let (listener, address) = listen(&authority.tls(&gateway("munich")), &quick());
    let operator = Identity::new(TRUST_DOMAIN, "berlin", Role::Operator, "alice").unwrap();
    let result = call(address, &gateway("munich"), ALPN_AGENT, &authority.tls(&operator)).await;
    let said = result.unwrap_err().to_string();
    let sentence = "the certificate is for operator alice of site berlin, but only a certificate for the role \
                    agent or gateway is accepted here";
    assert_eq!(said, format!("{address} refused us: {sentence}"));
    let log = refusal(&listener).await;
    assert!(
        log.starts_with("refused operator alice of site berlin") && log.ends_with(sentence),
        "{log}"
    );
}

#[tokio::test]
async fn another_program_than_the_one_called_is_refused() {
    let authority = Authority::new("a");
    let (listener, address) = listen(&authority.tls(&gateway("munich")), &quick());
    let caller = authority.tls(&agent("a-1"));
    for wrong in [
        gateway("paris"),
        Identity::new(TRUST_DOMAIN, "munich", Role::Gateway, "gw-2").unwrap(),
    ] {
        let said = refused_here(call(address, &wrong, ALPN_AGENT, &caller).await);
        let expected = format!(
            "{} was called, but {} answered",
            wrong.uri(),
            gateway("munich").uri()
        );
        assert!(said.ends_with(&expected), "{said}");
    }
    refusal(&listener).await;
    let log = listener.refused().remove(0).reason;
    assert!(
        log.contains("refused us: it called gw-1.gateway.paris.longhaul, which is not the name"),
        "{log}"
    );
}

#[tokio::test]
async fn a_certificate_whose_two_names_differ_is_refused() {
    let authority = Authority::new("a");
    let wish = Wish {
        dns: gateway("paris").dns_name(),
        ..Wish::of(&gateway("munich"))
    };
    let (listener, address) = listen(&authority.tls_of(&gateway("munich"), &wish), &quick());
    let said = refused_here(
        call(
            address,
            &gateway("paris"),
            ALPN_AGENT,
            &authority.tls(&agent("a-1")),
        )
        .await,
    );
    assert!(
        said.contains("site/paris/role/gateway/name/gw-1 was called, but"),
        "{said}"
    );
    let log = refusal(&listener).await;
    assert!(
        log.contains("refused us") && log.contains("was called, but"),
        "{log}"
    );
}

#[tokio::test]
async fn another_trust_domain_is_refused_under_the_same_authority() {
    let authority = Authority::new("a");
    let (listener, address) = listen(&authority.tls(&gateway("munich")), &quick());
    let foreign = Identity::new("other.example", "berlin", Role::Agent, "a-1").unwrap();
    let why = refused_by_peer(call(address, &gateway("munich"), ALPN_AGENT, &authority.tls(&foreign)).await);
    assert!(why.to_string().contains("trust domain other.example"), "{why}");
    assert!(refusal(&listener).await.contains("trust domain other.example"));
}

#[tokio::test]
async fn another_protocol_version_is_refused_on_both_ends() {
    let authority = Authority::new("a");
    let (listener, address) = listen(&authority.tls(&gateway("munich")), &quick());
    let result = call(
        address,
        &gateway("munich"),
        b"longhaul-peer/9",
        &authority.tls(&gateway("berlin")),
    )
    .await;
    let said = result.unwrap_err().to_string();
    assert!(
        said.contains("longhaul-peer/9 was offered, it does not speak our protocol version"),
        "{said}"
    );
    let log = refusal(&listener).await;
    assert!(
        log.contains("longhaul-peer/9 was offered, longhaul-agent/1, longhaul-peer/1"),
        "{log}"
    );
}

async fn rogue(
    address: std::net::SocketAddr,
    authority: &Authority,
    credentials: Option<Credentials>,
) -> quinn::ConnectionError {
    let (_endpoint, result) = bare_client(address, authority, credentials).await;
    match result {
        Ok(connection) => connection.closed().await,
        Err(error) => error,
    }
}

#[tokio::test]
async fn a_caller_without_a_certificate_is_refused() {
    let authority = Authority::new("a");
    let (listener, address) = listen(&authority.tls(&gateway("munich")), &quick());
    let told = rogue(address, &authority, None).await;
    assert!(
        matches!(&told, quinn::ConnectionError::ConnectionClosed(close)
        if close.error_code == quinn::TransportErrorCode::crypto(116)),
        "{told}"
    );
    let log = refusal(&listener).await;
    assert!(log.contains("no certificate was shown"), "{log}");
}

#[tokio::test]
async fn a_certificate_of_tomorrow_is_refused() {
    let authority = Authority::new("a");
    let (listener, address) = listen(&authority.tls(&gateway("munich")), &quick());
    let early = authority.issue(
        "early",
        &Wish {
            from: DAY,
            ..Wish::of(&agent("a-1"))
        },
    );
    let told = rogue(address, &authority, Some(early)).await.to_string();
    assert!(told.contains("not valid yet"), "{told}");
    let log = refusal(&listener).await;
    assert!(
        log.contains("agent a-1") && log.contains("not valid yet (compare the clocks"),
        "{log}"
    );
}

#[tokio::test]
async fn a_certificate_without_our_name_is_refused() {
    let authority = Authority::new("a");
    let (listener, address) = listen(&authority.tls(&gateway("munich")), &quick());
    let nameless = authority.issue(
        "nameless",
        &Wish {
            uris: vec![],
            ..Wish::of(&agent("a-1"))
        },
    );
    let told = rogue(address, &authority, Some(nameless)).await.to_string();
    assert!(told.contains("carries 0 Longhaul names"), "{told}");
    assert!(refusal(&listener).await.contains("carries 0 Longhaul names"));
    let two = vec![agent("a-1").uri(), agent("a-2").uri()];
    let double = authority.issue(
        "double",
        &Wish {
            uris: two,
            ..Wish::of(&agent("a-1"))
        },
    );
    let told = rogue(address, &authority, Some(double)).await.to_string();
    assert!(told.contains("carries 2 Longhaul names"), "{told}");
}

#[tokio::test]
async fn a_port_where_nobody_listens_is_named_with_the_remedy() {
    let authority = Authority::new("a");
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap();
    let settings = LinkSettings {
        handshake: Duration::from_millis(300),
        ..quick()
    };
    let result = connect(
        address,
        &gateway("munich"),
        ALPN_AGENT,
        &authority.tls(&agent("a-1")),
        &settings,
    )
    .await;
    let said = result.unwrap_err();
    assert!(said.is_transient());
    assert!(
        said.to_string()
            .contains(&format!("no answer from {address} over UDP within 0.3 s")),
        "{said}"
    );
}
