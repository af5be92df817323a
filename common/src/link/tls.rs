//! TLS 1.3 with both ends authenticated.
//!
//! Owns the TLS side of every connection: protocol version, provider, verifiers, ALPN, and the current [`Material`] that new
//! handshakes use. Also gives the HTTP API its TLS configuration, so that there is one place where certificates are judged.
//!
//! Promises: nothing below TLS 1.3; no session tickets and no early data (every handshake judges the certificate anew); a
//! revoked certificate is refused on both sides; new material is used by the next handshake without a restart, and
//! links whose peer would be refused now are closed with the reason.
//!
//! Leaves alone roles and names on QUIC links (`listen`, `connect`), which are judged after the handshake so that the refused
//! side is told a whole sentence.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::SystemTime;

use arc_swap::ArcSwap;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};

use super::credentials::{Credentials, CredentialsError, FileMarks, Material, provider, unix_time};
use super::endpoint::LinkInner;
use super::identity::{Identity, Role, shown};
use super::refusal::{LinkError, Refusal};
use super::reset::ResetSeed;

/// A program's current identity files and every link that was made with them. Shared by all listeners and links.
pub struct TlsState {
    paths: Credentials,
    role: Option<Role>,
    material: ArcSwap<Material>,
    /// How the files looked before they were read last, with success or without.
    read_from: Mutex<FileMarks>,
    links: Mutex<Vec<Weak<LinkInner>>>,
}

impl TlsState {
    /// Loads the files and logs what should be looked at. `role` is what this program must be (`None`: any, for tools).
    ///
    /// # Errors
    /// Files that are missing, malformed, do not fit together, or would be refused by peers.
    pub fn load(paths: Credentials, role: Option<Role>) -> Result<Arc<Self>, CredentialsError> {
        let read_from = Mutex::new(paths.marks());
        let material = paths.load(role, SystemTime::now())?;
        for warning in &material.warnings {
            tracing::warn!("{warning}");
        }
        let material = ArcSwap::from_pointee(material);
        Ok(Arc::new(Self {
            paths,
            role,
            material,
            read_from,
            links: Mutex::default(),
        }))
    }

    /// Who this program is.
    pub fn identity(&self) -> Identity {
        self.material.load().identity.clone()
    }

    /// From which the keys of stateless resets are derived.
    pub(crate) fn reset(&self) -> ResetSeed {
        self.material.load().reset.clone()
    }

    /// The last instant at which this program's certificate is valid.
    pub fn not_after(&self) -> SystemTime {
        self.material.load().not_after
    }

    /// When the revocation list is due for renewal, where there is one.
    pub fn crl_next_update(&self) -> Option<SystemTime> {
        self.material.load().crl_next_update
    }

    /// What works but should be looked at (expiry near, list overdue, key readable by others), one sentence each.
    pub fn warnings(&self) -> Vec<String> {
        self.material.load().warnings.clone()
    }

    /// Where the files are.
    pub fn paths(&self) -> &Credentials {
        &self.paths
    }

    /// Whether the files looked like this when they were read last.
    pub(crate) fn was_read_from(&self, marks: &FileMarks) -> bool {
        *self.read_from.lock().unwrap_or_else(PoisonError::into_inner) == *marks
    }

    /// Reads the files again. New handshakes use them at once; links whose peer would be refused now are closed.
    /// Files that cannot be used change nothing.
    ///
    /// # Errors
    /// Why the new files cannot be used; the old ones stay in use.
    pub fn reload(&self) -> Result<(), CredentialsError> {
        let now = SystemTime::now();
        let marks = self.paths.marks();
        *self.read_from.lock().unwrap_or_else(PoisonError::into_inner) = marks;
        let material = self.paths.load(self.role, now)?;
        for warning in &material.warnings {
            tracing::warn!("{warning}");
        }
        self.material.store(Arc::new(material));
        tracing::info!(identity = %self.identity().uri(), "certificate, authority and revocation list read again");
        self.close_refused(now);
        Ok(())
    }

    /// Closes every link whose peer certificate would be refused at `now`; answers how many.
    pub fn close_refused(&self, now: SystemTime) -> usize {
        let material = self.material.load();
        let refused: Vec<(Arc<LinkInner>, Refusal)> = self
            .live()
            .into_iter()
            .filter_map(|link| {
                material
                    .judge(link.chain(), unix_time(now))
                    .err()
                    .map(|why| (link, why))
            })
            .collect();
        for (link, why) in &refused {
            link.close_refused(why);
        }
        refused.len()
    }

    /// Closes every link whose peer certificate is past its last day: cheap enough for every tick.
    pub(crate) fn close_expired(&self, now: SystemTime) {
        for link in self.live().iter().filter(|link| link.not_after() < now) {
            link.close_refused(&Refusal::Expired);
        }
    }

    pub(crate) fn register(&self, link: &Arc<LinkInner>) {
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        links.retain(|known| known.strong_count() > 0);
        links.push(Arc::downgrade(link));
    }

    fn live(&self) -> Vec<Arc<LinkInner>> {
        let links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        links.iter().filter_map(Weak::upgrade).collect()
    }

    /// Whether a chain would be believed now by the current material.
    pub(crate) fn judge(&self, chain: &[CertificateDer<'_>]) -> Result<(), Refusal> {
        self.material.load().judge(chain, unix_time(SystemTime::now()))
    }

    /// The server side of one handshake; what the peer shows is noted in `seen`.
    pub(crate) fn server_config(
        self: &Arc<Self>,
        alpns: &[Vec<u8>],
        seen: &Arc<Seen>,
    ) -> Result<rustls::ServerConfig, LinkError> {
        server_config(Judge::new(self, Some(Arc::clone(seen)), None), alpns)
    }

    /// The client side of one handshake; what the peer shows is noted in `seen`.
    pub(crate) fn client_config(
        self: &Arc<Self>,
        alpns: &[Vec<u8>],
        seen: &Arc<Seen>,
    ) -> Result<rustls::ClientConfig, LinkError> {
        let judge = Judge::new(self, Some(Arc::clone(seen)), None);
        let mut config = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| LinkError::Settings(error.to_string()))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::clone(&judge) as Arc<dyn ServerCertVerifier>)
            .with_client_cert_resolver(judge);
        config.alpn_protocols = alpns.to_vec();
        config.resumption = Resumption::disabled();
        Ok(config)
    }
}

/// TLS for the HTTP API over TCP: TLS 1.3, certificates of `roles` only, ALPN `http/1.1`. Follows every reload by itself.
///
/// # Errors
/// Only if the cryptography provider lacks TLS 1.3, which it does not.
pub fn https_server_config(
    state: &Arc<TlsState>,
    roles: &[Role],
) -> Result<Arc<rustls::ServerConfig>, LinkError> {
    let judge = Judge::new(state, None, Some(roles.to_vec()));
    Ok(Arc::new(server_config(judge, &[b"http/1.1".to_vec()])?))
}

fn server_config(judge: Arc<Judge>, alpns: &[Vec<u8>]) -> Result<rustls::ServerConfig, LinkError> {
    let mut config = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| LinkError::Settings(error.to_string()))?
        .with_client_cert_verifier(Arc::clone(&judge) as Arc<dyn ClientCertVerifier>)
        .with_cert_resolver(judge);
    config.alpn_protocols = alpns.to_vec();
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// TLS for the operator's program calling the API over TCP. The server name to expect is the gateway's
/// [`Identity::dns_name`].
///
/// # Errors
/// Only if the cryptography provider lacks TLS 1.3, which it does not.
pub fn https_client_config(state: &Arc<TlsState>) -> Result<Arc<rustls::ClientConfig>, LinkError> {
    Ok(Arc::new(
        state.client_config(&[b"http/1.1".to_vec()], &Arc::default())?,
    ))
}

/// What the peer showed during one handshake, for the log when it fails.
#[derive(Default)]
pub(crate) struct Seen {
    shown: Mutex<Shown>,
}

#[derive(Clone, Default)]
pub(crate) struct Shown {
    /// The protocols that the calling side offered.
    pub(crate) offered: Vec<String>,
    /// Whose certificate it was, as far as it could be read.
    pub(crate) who: Option<Identity>,
    /// This end's verdict, when it refused the certificate.
    pub(crate) refusal: Option<Refusal>,
}

impl Seen {
    pub(crate) fn shown(&self) -> Shown {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note(&self, note: impl FnOnce(&mut Shown)) {
        note(&mut self.shown.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// Verifier and certificate source of one handshake (or, for HTTPS, of all): always asks the current material.
struct Judge {
    state: Arc<TlsState>,
    seen: Option<Arc<Seen>>,
    roles: Option<Vec<Role>>,
}

impl Judge {
    fn new(state: &Arc<TlsState>, seen: Option<Arc<Seen>>, roles: Option<Vec<Role>>) -> Arc<Self> {
        Arc::new(Self {
            state: Arc::clone(state),
            seen,
            roles,
        })
    }

    fn note_verdict<T>(&self, certificate: &CertificateDer<'_>, verdict: &Result<T, Error>) {
        let Some(seen) = &self.seen else { return };
        let refusal = verdict.as_ref().err().map(Refusal::of_tls);
        let who = Identity::of_certificate(certificate).ok();
        seen.note(|shown| (shown.who, shown.refusal) = (who, refusal));
    }

    fn check_role(&self, certificate: &CertificateDer<'_>) -> Result<(), Error> {
        let Some(roles) = &self.roles else { return Ok(()) };
        let own = self.state.identity();
        match Identity::of_certificate(certificate) {
            Ok(peer) if roles.contains(&peer.role()) && peer.trust_domain() == own.trust_domain() => Ok(()),
            Ok(peer) => {
                tracing::warn!(peer = %peer.uri(), "refused at the API: {}", Refusal::role(&peer, roles));
                Err(CertificateError::ApplicationVerificationFailure.into())
            }
            Err(error) => {
                tracing::warn!("refused at the API: {error}");
                Err(CertificateError::ApplicationVerificationFailure.into())
            }
        }
    }
}

impl std::fmt::Debug for Judge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Judge({})", self.state.identity().uri())
    }
}

impl ClientCertVerifier for Judge {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[] // a program has one certificate: there is nothing to choose from
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let material = self.state.material.load();
        let verdict = material
            .clients
            .verify_client_cert(end_entity, intermediates, now);
        self.note_verdict(end_entity, &verdict);
        let verified = verdict?;
        self.check_role(end_entity)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.state
            .material
            .load()
            .clients
            .verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.state
            .material
            .load()
            .clients
            .verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.state.material.load().clients.supported_verify_schemes()
    }
}

impl ServerCertVerifier for Judge {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let servers = &self.state.material.load().servers;
        let verdict = servers.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now);
        self.note_verdict(end_entity, &verdict);
        verdict
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.state
            .material
            .load()
            .servers
            .verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.state
            .material
            .load()
            .servers
            .verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.state.material.load().servers.supported_verify_schemes()
    }
}

impl ResolvesServerCert for Judge {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        if let (Some(seen), Some(offered)) = (&self.seen, hello.alpn()) {
            let offered = offered
                .take(8)
                .map(|name| shown(&String::from_utf8_lossy(name)))
                .collect();
            seen.note(|shown| shown.offered = offered);
        }
        Some(Arc::clone(&self.state.material.load().key))
    }
}

impl ResolvesClientCert for Judge {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.state.material.load().key))
    }

    fn has_certs(&self) -> bool {
        true
    }
}
