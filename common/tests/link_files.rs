//! Identity files: what is refused at the start with which sentence, and what a change of the files does to a running program.

#![allow(clippy::unwrap_used)]

mod link_support;

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, SystemTime};

use link_support::{Authority, DAY, Wish, agent, call, gateway, listen, quick};
use longhaul_common::link::{ALPN_AGENT, Credentials, LinkError, Refusal, Reloader, Role, TlsState};

fn problem(credentials: &Credentials, role: Role) -> String {
    let error = credentials
        .load(Some(role), SystemTime::now())
        .err()
        .expect("the files were accepted");
    let source = std::error::Error::source(&error)
        .map(|s| format!(": {s}"))
        .unwrap_or_default();
    format!("{error}{source}")
}

#[test]
fn each_bad_file_is_named() {
    let authority = Authority::new("a");
    let good = authority.issue("good", &Wish::of(&agent("a-1")));
    assert!(good.load(Some(Role::Agent), SystemTime::now()).is_ok());
    let other = authority.issue("other", &Wish::of(&agent("a-2")));

    let missing = Credentials {
        key: authority.path("no-such.key"),
        ..good.clone()
    };
    assert!(problem(&missing, Role::Agent).contains("cannot read the private key"));
    let mixed = Credentials {
        key: other.key,
        ..good.clone()
    };
    assert!(problem(&mixed, Role::Agent).contains("does not belong to the certificate"));
    let said = problem(&good, Role::Gateway);
    assert!(
        said.contains("is for agent a-1 of site berlin, but this program is a gateway"),
        "{said}"
    );
    let swapped = Credentials {
        cert: good.key.clone(),
        ..good.clone()
    };
    assert!(problem(&swapped, Role::Agent).contains("no CERTIFICATE block"));
    let no_crl = Credentials {
        crl: Some(good.ca.clone()),
        ..good.clone()
    };
    assert!(problem(&no_crl, Role::Agent).contains("no X509 CRL block"));
    let garbage = authority.path("garbage.pem");
    std::fs::write(
        &garbage,
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    )
    .unwrap();
    let said = problem(
        &Credentials {
            cert: garbage.clone(),
            ..good.clone()
        },
        Role::Agent,
    );
    assert!(said.contains("garbage.pem"), "{said}");
    assert!(problem(&Credentials { ca: garbage, ..good }, Role::Agent).contains("the authority"));
}

#[test]
fn a_certificate_that_peers_would_refuse_is_refused_at_the_start() {
    let authority = Authority::new("a");
    let good = authority.issue("good", &Wish::of(&agent("a-1")));
    let stranger = Authority::new("b");
    let foreign_ca = Credentials {
        ca: stranger.path("ca.pem"),
        crl: None,
        ..good.clone()
    };
    assert!(problem(&foreign_ca, Role::Agent).contains("issued by an unknown authority"));
    let foreign_crl = Credentials {
        crl: Some(stranger.path("crl.pem")),
        ..good.clone()
    };
    assert!(problem(&foreign_crl, Role::Agent).contains("revocation list is from another authority"));
    let old = authority.issue(
        "old",
        &Wish {
            until: -DAY / 2,
            ..Wish::of(&agent("a-1"))
        },
    );
    assert!(problem(&old, Role::Agent).contains("has expired"));
    let early = authority.issue(
        "early",
        &Wish {
            from: DAY,
            ..Wish::of(&agent("a-1"))
        },
    );
    assert!(problem(&early, Role::Agent).contains("not valid yet"));
    authority.publish(&[7], 30);
    assert!(problem(&good, Role::Agent).contains("is revoked"));
}

#[test]
fn what_works_but_should_be_looked_at_is_said() {
    let authority = Authority::new("a");
    let files = authority.issue(
        "soon",
        &Wish {
            until: 5 * DAY + 60,
            ..Wish::of(&agent("a-1"))
        },
    );
    std::fs::set_permissions(&files.key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let state = TlsState::load(Credentials { crl: None, ..files }, Some(Role::Agent)).unwrap();
    let warnings = state.warnings().join("\n");
    assert!(warnings.contains("expires in 5 days"), "{warnings}");
    assert!(warnings.contains("has mode 644"), "{warnings}");
    assert!(
        warnings.contains("no revocation list is configured"),
        "{warnings}"
    );
}

#[tokio::test]
async fn a_revocation_closes_the_live_link_and_refuses_the_next() {
    let authority = Authority::new("a");
    let munich = authority.tls(&gateway("munich"));
    let _reloader = Reloader::watch_every(&munich, Duration::from_millis(50));
    let (listener, address) = listen(&munich, &quick());
    let of = |name: &str, serial| {
        authority.tls_of(
            &agent(name),
            &Wish {
                serial,
                ..Wish::of(&agent(name))
            },
        )
    };
    let (bad, good) = (of("a-1", 66), of("a-2", 67));
    let doomed = call(address, &gateway("munich"), ALPN_AGENT, &bad).await.unwrap();
    let doomed_far = listener.accept().await.unwrap();
    let kept = call(address, &gateway("munich"), ALPN_AGENT, &good)
        .await
        .unwrap();
    let kept_far = listener.accept().await.unwrap();

    authority.publish(&[66], 30);
    let told = tokio::time::timeout(Duration::from_secs(5), doomed.closed())
        .await
        .unwrap();
    assert!(told.to_string().contains("the certificate is revoked"), "{told}");
    assert!(
        doomed_far
            .closed()
            .await
            .to_string()
            .contains("closed here: the certificate is revoked")
    );
    assert!(kept.close_reason().is_none() && kept_far.close_reason().is_none());
    match call(address, &gateway("munich"), ALPN_AGENT, &bad).await {
        Err(LinkError::RefusedByPeer {
            why: Refusal::Revoked,
            ..
        }) => {}
        other => panic!("{other:?}"),
    }
    assert!(call(address, &gateway("munich"), ALPN_AGENT, &good).await.is_ok());
}

#[tokio::test]
async fn a_link_ends_when_the_certificate_of_its_peer_does() {
    let authority = Authority::new("a");
    let munich = authority.tls(&gateway("munich"));
    let _reloader = Reloader::watch_every(&munich, Duration::from_millis(100));
    let (listener, address) = listen(&munich, &quick());
    let brief = authority.tls_of(
        &agent("a-1"),
        &Wish {
            until: 2,
            ..Wish::of(&agent("a-1"))
        },
    );
    let link = call(address, &gateway("munich"), ALPN_AGENT, &brief)
        .await
        .unwrap();
    let _far = listener.accept().await.unwrap();
    let told = tokio::time::timeout(Duration::from_secs(6), link.closed())
        .await
        .unwrap();
    assert!(told.to_string().contains("the certificate has expired"), "{told}");
}

#[tokio::test]
async fn a_new_certificate_is_used_at_once_and_a_broken_one_never() {
    let authority = Authority::new("a");
    let first = Wish {
        until: 60 * DAY,
        ..Wish::of(&gateway("munich"))
    };
    let files = authority.issue("munich", &first);
    let munich = TlsState::load(files.clone(), Some(Role::Gateway)).unwrap();
    let reloader = Reloader::watch_every(&munich, Duration::from_millis(50));
    let (_listener, address) = listen(&munich, &quick());
    let caller = authority.tls(&agent("a-1"));
    let expiry = async || {
        let link = call(address, &gateway("munich"), ALPN_AGENT, &caller)
            .await
            .unwrap();
        let left = link.peer_not_after().duration_since(SystemTime::now()).unwrap();
        (left.as_secs() + DAY as u64 / 2) / DAY as u64
    };
    let live = call(address, &gateway("munich"), ALPN_AGENT, &caller)
        .await
        .unwrap();
    assert_eq!(expiry().await, 60);

    authority.issue(
        "munich",
        &Wish {
            until: 80 * DAY,
            ..first
        },
    );
    for _ in 0..1000 {
        if expiry().await == 80 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(expiry().await, 80);

    authority.replace("munich.pem", "not a certificate");
    assert!(
        reloader
            .reload()
            .await
            .unwrap_err()
            .to_string()
            .contains("no CERTIFICATE block")
    );
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(expiry().await, 80);
    assert!(live.close_reason().is_none(), "a reload closed a good link");
}

#[tokio::test]
async fn files_that_change_before_they_are_watched_are_noticed() {
    let authority = Authority::new("a");
    let first = Wish {
        until: 60 * DAY,
        ..Wish::of(&gateway("munich"))
    };
    let munich = TlsState::load(authority.issue("munich", &first), Some(Role::Gateway)).unwrap();
    let before = munich.not_after();
    let second = Wish {
        until: 80 * DAY,
        ..first
    };
    authority.issue("munich", &second);
    let _reloader = Reloader::watch_every(&munich, Duration::from_millis(50));
    let noticed = async {
        while munich.not_after() == before {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), noticed)
        .await
        .unwrap();
}
