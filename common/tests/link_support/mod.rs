//! A small authority and two ends of a link, for the link's tests.
//!
//! Makes certificates that the real authority would never make (expired, wrong role, no name), so that every refusal can be
//! provoked. Everything lives in a temporary directory that goes away with it.

#![allow(dead_code, clippy::unwrap_used, unreachable_pub)]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use longhaul_common::link::{
    ALPN_AGENT, ALPN_PEER, ALPN_PROBE, Credentials, Identity, Link, LinkError, LinkSettings, Listener, Role,
    TlsState, connect,
};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType,
    SerialNumber,
};

pub const TRUST_DOMAIN: &str = "test.example";
pub const DAY: i64 = 86_400;

pub struct Authority {
    pub directory: tempfile::TempDir,
    issuer: CertifiedIssuer<'static, KeyPair>,
    label: String,
}

/// What is odd about a certificate; times in seconds from now.
pub struct Wish {
    pub serial: u64,
    pub from: i64,
    pub until: i64,
    pub uris: Vec<String>,
    pub dns: String,
}

impl Wish {
    pub fn of(identity: &Identity) -> Self {
        Self {
            serial: 7,
            from: -DAY,
            until: 90 * DAY,
            uris: vec![identity.uri()],
            dns: identity.dns_name(),
        }
    }
}

pub fn gateway(site: &str) -> Identity {
    Identity::new(TRUST_DOMAIN, site, Role::Gateway, "gw-1").unwrap()
}

pub fn agent(name: &str) -> Identity {
    Identity::new(TRUST_DOMAIN, "berlin", Role::Agent, name).unwrap()
}

macro_rules! at {
    ($seconds:expr) => {{
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64;
        rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs((now + $seconds) as u64)
    }};
}

impl Authority {
    pub fn new(label: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params
            .distinguished_name
            .push(DnType::CommonName, format!("test authority {label}"));
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("ca.pem"), issuer.pem()).unwrap();
        let authority = Self {
            directory,
            issuer,
            label: label.to_owned(),
        };
        authority.publish(&[], 30);
        authority
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Writes a revocation list that is due in `due` days.
    pub fn publish(&self, revoked: &[u64], due: i64) {
        let entry = |serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: at!(-DAY),
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: at!(-40 * DAY),
            next_update: at!(due * DAY),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: revoked.iter().map(entry).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        self.replace("crl.pem", &params.signed_by(&self.issuer).unwrap().pem().unwrap());
    }

    /// As a careful administrator does: another file, moved over the old one.
    pub fn replace(&self, name: &str, content: &str) {
        let new = self.path(&format!("{name}.new"));
        std::fs::write(&new, content).unwrap();
        std::fs::rename(new, self.path(name)).unwrap();
    }

    pub fn issue(&self, stem: &str, wish: &Wish) -> Credentials {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.serial_number = Some(SerialNumber::from(wish.serial));
        (params.not_before, params.not_after) = (at!(wish.from), at!(wish.until));
        params
            .subject_alt_names
            .push(SanType::DnsName(wish.dns.as_str().try_into().unwrap()));
        for uri in &wish.uris {
            params
                .subject_alt_names
                .push(SanType::URI(uri.as_str().try_into().unwrap()));
        }
        params.distinguished_name.push(DnType::CommonName, stem);
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        self.replace(&format!("{stem}.pem"), &certificate.pem());
        self.replace(&format!("{stem}.key"), &key.serialize_pem());
        use std::os::unix::fs::PermissionsExt;
        let private = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(self.path(&format!("{stem}.key")), private).unwrap();
        Credentials {
            cert: self.path(&format!("{stem}.pem")),
            key: self.path(&format!("{stem}.key")),
            ca: self.path("ca.pem"),
            crl: Some(self.path("crl.pem")),
        }
    }

    pub fn tls(&self, identity: &Identity) -> Arc<TlsState> {
        self.tls_of(identity, &Wish::of(identity))
    }

    pub fn tls_of(&self, identity: &Identity, wish: &Wish) -> Arc<TlsState> {
        let stem = format!(
            "{}-{}-{}-{}",
            identity.site(),
            identity.role(),
            identity.name(),
            wish.serial
        );
        TlsState::load(self.issue(&stem, wish), None).unwrap()
    }
}

pub fn quick() -> LinkSettings {
    LinkSettings {
        handshake: Duration::from_secs(5),
        ..LinkSettings::lan()
    }
}

pub fn listen(tls: &Arc<TlsState>, settings: &LinkSettings) -> (Listener, SocketAddr) {
    let any = "127.0.0.1:0".parse().unwrap();
    let roles = [Role::Agent, Role::Gateway];
    let listener = Listener::bind(any, tls, &[ALPN_AGENT, ALPN_PEER, ALPN_PROBE], &roles, settings).unwrap();
    let address = listener.local_address().unwrap();
    (listener, address)
}

/// Both ends of a good link.
pub async fn pair(settings: &LinkSettings) -> (Authority, Listener, Link, Link) {
    let authority = Authority::new("pair");
    let (berlin, munich) = (gateway("berlin"), gateway("munich"));
    let (listener, address) = listen(&authority.tls(&munich), settings);
    let own = authority.tls_of(
        &berlin,
        &Wish {
            serial: 8,
            ..Wish::of(&berlin)
        },
    );
    let near = connect(address, &munich, ALPN_PEER, &own, settings)
        .await
        .unwrap();
    let far = listener.accept().await.unwrap();
    (authority, listener, near, far)
}

/// Waits until the listener has noted a refusal.
pub async fn refusal(listener: &Listener) -> String {
    for _ in 0..500 {
        if let Some(last) = listener.refused().pop() {
            return last.reason;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the listener refused nobody");
}

pub async fn call(
    address: SocketAddr,
    expected: &Identity,
    alpn: &[u8],
    tls: &Arc<TlsState>,
) -> Result<Link, LinkError> {
    connect(address, expected, alpn, tls, &quick()).await
}
