//! The files that prove who this program is, and whom it believes.
//!
//! Owns reading and judging them: certificate chain, private key, authorities, revocation list. What comes out is a
//! [`Material`] that is known to work: the key fits the certificate, the certificate is valid now and issued by one of the
//! authorities, it names exactly one identity of an allowed role, and the revocation list is signed by the same authority.
//! Anything else is an error that names the file and the remedy.
//!
//! A revocation list past its `nextUpdate` is a loud warning, not an error: the certificates it names stay refused, and a
//! forgotten `longhaul pki crl` must not stop every transfer of two sites at once.
//!
//! Leaves alone when files are read again (`reload`) and what handshakes do with them (`tls`).

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::sign::CertifiedKey;

use super::identity::{Identity, NotAnIdentity, Role};
use super::refusal::Refusal;
use super::reset::ResetSeed;

/// No certificate, key or revocation list file is read beyond this size.
const FILE_LENGTH_MAX: u64 = 4 << 20;
/// More certificates than this in one file is a mistake, not a chain.
const CERTIFICATES_MAX: usize = 64;

/// The paths of a program's identity files, all PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// This program's certificate, followed by intermediates if there are any.
    pub cert: PathBuf,
    /// Its private key (PKCS #8, SEC 1 or PKCS #1). Should be readable by its owner only.
    pub key: PathBuf,
    /// The authorities that peers are believed from; one or more certificates.
    pub ca: PathBuf,
    /// The authority's revocation list; without one nothing can be revoked.
    pub crl: Option<PathBuf>,
}

/// Identity files that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// A file cannot be read.
    #[error("cannot read {what} {}", path.display())]
    Unreadable {
        /// Which of the files.
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A file is too large to be what it should be.
    #[error("{what} {} is larger than 4 MiB: this is not a PEM file of certificates", path.display())]
    TooLarge {
        /// Which of the files.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// A file holds something else.
    #[error("{what} {} holds no usable PEM block: {detail}", path.display())]
    NotPem {
        /// Which of the files.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// Key and certificate are not a pair.
    #[error("the private key {} does not belong to the certificate {}", key.display(), cert.display())]
    KeyMismatch {
        /// The key file.
        key: PathBuf,
        /// The certificate file.
        cert: PathBuf,
    },
    /// The key cannot be used for TLS.
    #[error("the private key {} cannot be used: {detail}", path.display())]
    BadKey {
        /// The key file.
        path: PathBuf,
        /// What the TLS library said.
        detail: String,
    },
    /// The certificate names no program.
    #[error("the certificate {} names no Longhaul program", path.display())]
    NoIdentity {
        /// The certificate file.
        path: PathBuf,
        /// What is wrong with its name.
        #[source]
        source: NotAnIdentity,
    },
    /// The certificate belongs to another kind of program.
    #[error("the certificate {} is for {found}, but this program is a {expected}: issue one with `longhaul pki issue --role {expected}`", path.display())]
    WrongRole {
        /// The certificate file.
        path: PathBuf,
        /// Whose certificate it is.
        found: Identity,
        /// The role this program needs.
        expected: Role,
    },
    /// Peers would refuse the certificate.
    #[error("the certificate {} would be refused by every peer: {why}", path.display())]
    Refused {
        /// The certificate file.
        path: PathBuf,
        /// Why.
        why: Refusal,
    },
    /// The authority or revocation list cannot be used.
    #[error("{what} {} cannot be used: {detail}", path.display())]
    Unusable {
        /// Which of the files.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
}

impl CredentialsError {
    /// Whether a file is not there at all: on a host that a config was not made for, that is no mistake of the config.
    pub fn is_absent(&self) -> bool {
        matches!(self, Self::Unreadable { source, .. } if source.kind() == std::io::ErrorKind::NotFound)
    }
}

/// Identity files that were read, judged and found to work together.
pub struct Material {
    pub(crate) identity: Identity,
    pub(crate) key: Arc<CertifiedKey>,
    pub(crate) reset: ResetSeed,
    pub(crate) clients: Arc<dyn ClientCertVerifier>,
    pub(crate) servers: Arc<dyn ServerCertVerifier>,
    pub(crate) not_after: SystemTime,
    pub(crate) crl_next_update: Option<SystemTime>,
    /// What works but should be looked at, one sentence each.
    pub(crate) warnings: Vec<String>,
}

impl Material {
    /// Whether a peer's certificate chain would be believed now: issuer, dates, revocation. Roles are not judged here.
    pub(crate) fn judge(&self, chain: &[CertificateDer<'_>], now: UnixTime) -> Result<(), Refusal> {
        let Some((end_entity, intermediates)) = chain.split_first() else {
            return Err(Refusal::NoCertificate);
        };
        let verdict = self.clients.verify_client_cert(end_entity, intermediates, now);
        verdict.map(drop).map_err(|error| Refusal::of_tls(&error))
    }
}

/// What changes when one of the files is replaced or rewritten.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FileMarks(Vec<Option<Mark>>);

/// A file's device, inode, length, and modification time in seconds and nanoseconds.
type Mark = (u64, u64, u64, i64, i64);

fn mark(path: &Path) -> Option<Mark> {
    let meta = std::fs::metadata(path).ok()?;
    Some((
        meta.dev(),
        meta.ino(),
        meta.size(),
        meta.mtime(),
        meta.mtime_nsec(),
    ))
}

impl Credentials {
    /// How the files look now, without reading them.
    pub(crate) fn marks(&self) -> FileMarks {
        let files = [
            Some(&self.cert),
            Some(&self.key),
            Some(&self.ca),
            self.crl.as_ref(),
        ];
        FileMarks(files.into_iter().flatten().map(|path| mark(path)).collect())
    }

    /// Reads and judges the files, for a program of the given role (`None`: any role, for tools).
    ///
    /// # Errors
    /// The first file that is missing, unreadable, malformed, does not fit the others, or would be refused by peers.
    pub fn load(&self, role: Option<Role>, now: SystemTime) -> Result<Material, CredentialsError> {
        let provider = provider();
        let chain = certificates("the certificate", &self.cert)?;
        let identity =
            Identity::of_certificate(&chain[0]).map_err(|source| CredentialsError::NoIdentity {
                path: self.cert.clone(),
                source,
            })?;
        if let Some(expected) = role.filter(|role| *role != identity.role()) {
            return Err(CredentialsError::WrongRole {
                path: self.cert.clone(),
                found: identity,
                expected,
            });
        }
        let (key, reset) = self.load_key(&chain, &provider)?;
        let key = Arc::new(key);
        let roots = Arc::new(self.load_roots()?);
        let (crls, crl_next_update) = self.load_crl()?;
        let (clients, servers) = self.verifiers(&roots, &crls, &provider)?;
        let (_, not_after) = validity(&chain[0]).ok_or_else(|| self.unreadable_certificate())?;
        let mut warnings = self.warnings(now, not_after, crl_next_update);
        warnings.extend(mode_warning(&self.key));
        let material = Material {
            identity,
            key,
            reset,
            clients,
            servers,
            not_after,
            crl_next_update,
            warnings,
        };
        let verdict = material.judge(&chain, unix_time(now));
        verdict.map_err(|why| CredentialsError::Refused {
            path: self.cert.clone(),
            why,
        })?;
        Ok(material)
    }

    fn load_key(
        &self,
        chain: &[CertificateDer<'static>],
        provider: &CryptoProvider,
    ) -> Result<(CertifiedKey, ResetSeed), CredentialsError> {
        let what = "the private key";
        let pem = read(what, &self.key)?;
        let not_pem = |error: rustls::pki_types::pem::Error| CredentialsError::NotPem {
            what,
            path: self.key.clone(),
            detail: error.to_string(),
        };
        let key = PrivateKeyDer::from_pem_slice(&pem).map_err(not_pem)?;
        let reset = ResetSeed::of_private_key(key.secret_der());
        let key = CertifiedKey::from_der(chain.to_vec(), key, provider).map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => CredentialsError::KeyMismatch {
                key: self.key.clone(),
                cert: self.cert.clone(),
            },
            other => CredentialsError::BadKey {
                path: self.key.clone(),
                detail: other.to_string(),
            },
        })?;
        Ok((key, reset))
    }

    fn load_roots(&self) -> Result<RootCertStore, CredentialsError> {
        let what = "the authority";
        let mut roots = RootCertStore::empty();
        for certificate in certificates(what, &self.ca)? {
            roots
                .add(certificate)
                .map_err(|error| CredentialsError::Unusable {
                    what,
                    path: self.ca.clone(),
                    detail: error.to_string(),
                })?;
        }
        Ok(roots)
    }

    /// The revocation lists of the file, and the earliest instant at which one of them is due for renewal.
    #[allow(clippy::type_complexity)]
    fn load_crl(
        &self,
    ) -> Result<(Vec<CertificateRevocationListDer<'static>>, Option<SystemTime>), CredentialsError> {
        let what = "the revocation list";
        let Some(path) = &self.crl else {
            return Ok((Vec::new(), None));
        };
        let pem = read(what, path)?;
        let not_pem = |detail: String| CredentialsError::NotPem {
            what,
            path: path.clone(),
            detail,
        };
        let lists: Vec<_> = CertificateRevocationListDer::pem_slice_iter(&pem)
            .take(CERTIFICATES_MAX)
            .collect::<Result<_, _>>()
            .map_err(|error| not_pem(error.to_string()))?;
        if lists.is_empty() {
            return Err(not_pem("no X509 CRL block in it".to_owned()));
        }
        let mut earliest = None;
        for list in &lists {
            let due = next_update(list).map_err(not_pem)?;
            earliest = match (earliest, due) {
                (Some(a), Some(b)) => Some(std::cmp::min::<SystemTime>(a, b)),
                (a, b) => a.or(b),
            };
        }
        Ok((lists, earliest))
    }

    #[allow(clippy::type_complexity)]
    fn verifiers(
        &self,
        roots: &Arc<RootCertStore>,
        crls: &[CertificateRevocationListDer<'static>],
        provider: &Arc<CryptoProvider>,
    ) -> Result<(Arc<dyn ClientCertVerifier>, Arc<dyn ServerCertVerifier>), CredentialsError> {
        let unusable = |error: rustls::client::VerifierBuilderError| CredentialsError::Unusable {
            what: "the revocation list",
            path: self.crl.clone().unwrap_or_else(|| self.ca.clone()),
            detail: error.to_string(),
        };
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::clone(roots), Arc::clone(provider))
            .with_crls(crls.iter().cloned())
            .only_check_end_entity_revocation()
            .build()
            .map_err(unusable)?;
        let servers = WebPkiServerVerifier::builder_with_provider(Arc::clone(roots), Arc::clone(provider))
            .with_crls(crls.iter().cloned())
            .only_check_end_entity_revocation()
            .build()
            .map_err(unusable)?;
        Ok((clients, servers))
    }

    fn unreadable_certificate(&self) -> CredentialsError {
        let (path, source) = (self.cert.clone(), NotAnIdentity::Unreadable);
        CredentialsError::NoIdentity { path, source }
    }

    fn warnings(&self, now: SystemTime, not_after: SystemTime, crl: Option<SystemTime>) -> Vec<String> {
        let mut warnings = Vec::new();
        if let Ok(left) = not_after.duration_since(now)
            && left < Duration::from_secs(30 * 86_400)
        {
            let days = left.as_secs() / 86_400;
            let path = self.cert.display();
            warnings.push(format!(
                "the certificate {path} expires in {days} days: issue a new one"
            ));
        }
        if let Some(due) = crl.filter(|due| *due < now) {
            let days = now.duration_since(due).unwrap_or_default().as_secs() / 86_400;
            warnings.push(format!(
                "the revocation list is {days} days past its renewal date; what was revoked since is not known here: \
                 run `longhaul pki crl` and copy crl.pem to this host"
            ));
        }
        if self.crl.is_none() {
            warnings.push(
                "no revocation list is configured: a stolen certificate stays good until it expires".into(),
            );
        }
        warnings
    }
}

/// The one cryptography provider of this program, chosen explicitly so that no other can slip in.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// The instants between which a certificate is valid.
pub(crate) fn validity(certificate: &CertificateDer<'_>) -> Option<(SystemTime, SystemTime)> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let validity = parsed.validity();
    Some((
        instant(validity.not_before.timestamp()),
        instant(validity.not_after.timestamp()),
    ))
}

/// Wall-clock time as the TLS library wants it.
pub(crate) fn unix_time(now: SystemTime) -> UnixTime {
    UnixTime::since_unix_epoch(now.duration_since(UNIX_EPOCH).unwrap_or_default())
}

fn instant(seconds: i64) -> SystemTime {
    let offset = Duration::from_secs(seconds.unsigned_abs());
    let instant = if seconds < 0 {
        UNIX_EPOCH.checked_sub(offset)
    } else {
        UNIX_EPOCH.checked_add(offset)
    };
    instant.unwrap_or(UNIX_EPOCH)
}

fn next_update(list: &CertificateRevocationListDer<'_>) -> Result<Option<SystemTime>, String> {
    let (_, parsed) = x509_parser::parse_x509_crl(list.as_ref()).map_err(|error| error.to_string())?;
    Ok(parsed.next_update().map(|time| instant(time.timestamp())))
}

fn certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, CredentialsError> {
    let pem = read(what, path)?;
    let not_pem = |detail: String| CredentialsError::NotPem {
        what,
        path: path.to_owned(),
        detail,
    };
    let found: Vec<_> = CertificateDer::pem_slice_iter(&pem)
        .take(CERTIFICATES_MAX)
        .collect::<Result<_, _>>()
        .map_err(|error| not_pem(error.to_string()))?;
    if found.is_empty() {
        return Err(not_pem("no CERTIFICATE block in it".to_owned()));
    }
    Ok(found)
}

fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, CredentialsError> {
    use std::io::Read;
    let unreadable = |source| CredentialsError::Unreadable {
        what,
        path: path.to_owned(),
        source,
    };
    let file = std::fs::File::open(path).map_err(unreadable)?;
    let mut content = Vec::new();
    file.take(FILE_LENGTH_MAX + 1)
        .read_to_end(&mut content)
        .map_err(unreadable)?;
    if content.len() as u64 > FILE_LENGTH_MAX {
        return Err(CredentialsError::TooLarge {
            what,
            path: path.to_owned(),
        });
    }
    Ok(content)
}

/// A key that others than its owner (and, for reading, its group) can reach.
fn mode_warning(path: &Path) -> Option<String> {
    use std::os::unix::fs::MetadataExt;
    let mode = std::fs::metadata(path).ok()?.mode() & 0o777;
    let too_open = mode & 0o037 != 0;
    too_open.then(|| {
        format!(
            "the private key {} has mode {mode:03o}, others can use it: chmod 600 it",
            path.display()
        )
    })
}
