//! A small authority and two ends of a link, for the link's tests.
//!
//! Makes certificates that the real authority would never make (expired, wrong role, no name), so that every refusal can be
//! provoked. Everything lives in a temporary directory that goes away with it.

#![allow(dead_code, unreachable_pub, reason = "each test program uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

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

/// A path through a bottleneck, in both directions alike.
#[derive(Clone, Copy, Debug)]
pub struct Wan {
    /// Bits per second, IP and UDP headers included.
    pub rate: f64,
    pub rtt: Duration,
    pub loss: f64,
    /// In bandwidth-delay products.
    pub queue: f64,
}

impl Wan {
    /// Relays UDP to `server` until the test's process ends; answers where to call.
    pub fn relay(self, server: SocketAddr) -> SocketAddr {
        let front = udp();
        let back = udp();
        back.connect(server).unwrap();
        let address = front.local_addr().unwrap();
        let caller = Arc::new(std::sync::OnceLock::new());
        let (front_2, back_2) = (front.try_clone().unwrap(), back.try_clone().unwrap());
        let known = Arc::clone(&caller);
        self.direction(
            front,
            move |packet| drop(back.send(packet)),
            move |from| {
                let _ = caller.set(from);
            },
        );
        self.direction(
            back_2,
            move |packet| {
                if let Some(to) = known.get() {
                    let _ = front_2.send_to(packet, to);
                }
            },
            |_| {},
        );
        address
    }

    fn direction(
        self,
        socket: std::net::UdpSocket,
        send: impl Fn(&[u8]) + Send + 'static,
        note: impl Fn(SocketAddr) + Send + 'static,
    ) {
        use std::time::Instant;
        let (release, held) = std::sync::mpsc::sync_channel::<(Instant, Vec<u8>)>(1 << 16);
        std::thread::spawn(move || {
            let mut random = 0x9E37_79B9_7F4A_7C15u64;
            let mut busy_until = Instant::now();
            let limit = self.rtt.mul_f64(self.queue);
            let mut packet = [0; 9000];
            while let Ok((length, from)) = socket.recv_from(&mut packet) {
                note(from);
                let now = Instant::now();
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let lost = (random >> 11) as f64 / ((1u64 << 53) as f64) < self.loss;
                if lost || busy_until.saturating_duration_since(now) > limit {
                    continue;
                }
                let passing = Duration::from_secs_f64((length + 28) as f64 * 8.0 / self.rate);
                busy_until = busy_until.max(now) + passing;
                let _ = release.send((busy_until + self.rtt / 2, packet[..length].to_vec()));
            }
        });
        std::thread::spawn(move || {
            while let Ok((due, packet)) = held.recv() {
                let wait = due.saturating_duration_since(Instant::now());
                if wait > Duration::from_micros(300) {
                    std::thread::sleep(wait);
                }
                send(&packet);
            }
        });
    }
}

fn udp() -> std::net::UdpSocket {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let sized = socket2::SockRef::from(&socket);
    let _ = sized.set_recv_buffer_size(8 << 20);
    let _ = sized.set_send_buffer_size(8 << 20);
    socket
}

/// Sends from `near` to `far` for `seconds`, in streams of 1 MiB, eight at a time. Answers bytes/s received, from the third second on.
pub async fn bulk(near: &[Link], far: &[Link], seconds: u64) -> f64 {
    flow(8, false, near, far, seconds).await
}

/// As [`bulk`], with no more than `streams` written ahead on each link: each ends when the other end has all of it.
pub async fn bulk_ahead(streams: usize, near: &[Link], far: &[Link], seconds: u64) -> f64 {
    flow(streams, true, near, far, seconds).await
}

async fn flow(streams: usize, to_the_end: bool, near: &[Link], far: &[Link], seconds: u64) -> f64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    let received = Arc::new(AtomicU64::new(0));
    let mut tasks = tokio::task::JoinSet::new();
    let batch = bytes::Bytes::from(vec![7u8; 256 << 10]);
    for link in near {
        for _ in 0..streams {
            let (link, batch) = (link.clone(), batch.clone());
            tasks.spawn(async move {
                while let Ok(mut stream) = link.open_uni(0).await {
                    for _ in 0..4 {
                        if stream.write_chunk(batch.clone()).await.is_err() {
                            return;
                        }
                    }
                    let _ = stream.finish();
                    if to_the_end {
                        let _ = stream.stopped().await;
                    }
                }
            });
        }
    }
    for link in far {
        let (link, received) = (link.clone(), Arc::clone(&received));
        tasks.spawn(async move {
            let mut readers = tokio::task::JoinSet::new();
            while let Ok(mut stream) = link.accept_uni().await {
                let received = Arc::clone(&received);
                readers.spawn(async move {
                    while let Ok(Some(chunk)) = stream.read_chunk(1 << 20, false).await {
                        received.fetch_add(chunk.bytes.len() as u64, Ordering::Relaxed);
                    }
                });
                while readers.try_join_next().is_some() {}
            }
        });
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (before, began) = (received.load(Ordering::Relaxed), std::time::Instant::now());
    tokio::time::sleep(Duration::from_secs(seconds.saturating_sub(2))).await;
    let passed = received.load(Ordering::Relaxed) - before;
    let rate = passed as f64 / began.elapsed().as_secs_f64();
    tasks.shutdown().await;
    rate
}

/// A client that is not ours: any certificate, or none.
pub async fn bare_client(
    address: SocketAddr,
    authority: &Authority,
    credentials: Option<Credentials>,
) -> (quinn::Endpoint, Result<quinn::Connection, quinn::ConnectionError>) {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(authority.path("ca.pem")).unwrap())
        .unwrap();
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots);
    let mut tls = match credentials {
        None => builder.with_no_client_auth(),
        Some(files) => builder
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_file(files.cert).unwrap()],
                PrivateKeyDer::from_pem_file(files.key).unwrap(),
            )
            .unwrap(),
    };
    tls.alpn_protocols = vec![ALPN_AGENT.to_vec()];
    let quic = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
    let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let config = quinn::ClientConfig::new(Arc::new(quic));
    let connecting = endpoint
        .connect_with(config, address, &gateway("munich").dns_name())
        .unwrap();
    let result = connecting.await;
    (endpoint, result)
}
