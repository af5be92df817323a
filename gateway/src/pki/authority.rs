//! What the authority signs: itself, certificates, revocation lists.
//!
//! Owns the content of the three (RFC 5280): ECDSA P-256 keys, the identity as URI and DNS name, dates, usages. Knows
//! neither directories nor commands. Random serials of 126 bits, so that two authorities never share one.

use std::time::Duration;

use jiff::Timestamp;
use longhaul_common::link::Identity;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber,
    date_time_ymd,
};

use super::PkiError;
use super::index::Record;

/// Certificates begin this much before they are made: clocks of two sites differ.
const BACKDATED: Duration = Duration::from_secs(3600);

/// A key and its certificate, both PEM.
pub(super) struct Signed {
    pub(super) certificate: String,
    pub(super) key: String,
}

/// An authority for `trust_domain`, with a key of its own.
pub(super) fn found(trust_domain: &str, now: Timestamp, not_after: Timestamp) -> Result<Signed, PkiError> {
    let key = KeyPair::generate().map_err(PkiError::Sign)?;
    let mut params = CertificateParams::default();
    // The number keeps two generations of one authority apart while both are in use.
    let serial = random_serial();
    let name = format!("Longhaul authority {} of {trust_domain}", &hex(&serial)[..8]);
    params.distinguished_name.push(DnType::CommonName, name);
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.not_before = date_time_ymd(1970, 1, 1) + since_1970(now)? - BACKDATED;
    params.not_after = date_time_ymd(1970, 1, 1) + since_1970(not_after)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let certificate = params.self_signed(&key).map_err(PkiError::Sign)?;
    Ok(Signed {
        certificate: certificate.pem(),
        key: key.serialize_pem(),
    })
}

/// The authority, ready to sign.
pub(super) fn issuer(certificate: &str, key: &str) -> Result<Issuer<'static, KeyPair>, PkiError> {
    let key = KeyPair::from_pem(key).map_err(PkiError::Sign)?;
    Issuer::from_ca_cert_pem(certificate, key).map_err(PkiError::Sign)
}

/// A certificate for a program, with a key of its own; and what is to be recorded about it.
pub(super) fn issue(
    issuer: &Issuer<'_, KeyPair>,
    identity: &Identity,
    now: Timestamp,
    not_after: Timestamp,
) -> Result<(Signed, Record), PkiError> {
    let key = KeyPair::generate().map_err(PkiError::Sign)?;
    let serial = random_serial();
    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(DnType::CommonName, identity.dns_name());
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.not_before = date_time_ymd(1970, 1, 1) + since_1970(now)? - BACKDATED;
    params.not_after = date_time_ymd(1970, 1, 1) + since_1970(not_after)?;
    params.subject_alt_names = vec![
        SanType::URI(identity.uri().try_into().map_err(PkiError::Sign)?),
        SanType::DnsName(identity.dns_name().try_into().map_err(PkiError::Sign)?),
    ];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(&key, issuer).map_err(PkiError::Sign)?;
    let record = Record {
        serial: hex(&serial),
        identity: identity.clone(),
        not_before: now,
        not_after,
        revoked: None,
    };
    Ok((
        Signed {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
        },
        record,
    ))
}

/// The revocation list: every revoked certificate, also an expired one, since clocks differ. PEM.
pub(super) fn revocation_list(
    issuer: &Issuer<'_, KeyPair>,
    records: &[Record],
    now: Timestamp,
    next_update: Timestamp,
) -> Result<String, PkiError> {
    let mut revoked_certs = Vec::new();
    for (record, at) in records
        .iter()
        .filter_map(|record| record.revoked.map(|at| (record, at)))
    {
        revoked_certs.push(RevokedCertParams {
            serial_number: SerialNumber::from_slice(&unhex(&record.serial)?),
            revocation_time: date_time_ymd(1970, 1, 1) + since_1970(at)?,
            reason_code: None,
            invalidity_date: None,
        });
    }
    let params = CertificateRevocationListParams {
        this_update: date_time_ymd(1970, 1, 1) + since_1970(now)? - BACKDATED,
        next_update: date_time_ymd(1970, 1, 1) + since_1970(next_update)?,
        // Grows with every list, without a counter to keep.
        crl_number: SerialNumber::from(u64::try_from(now.as_millisecond()).unwrap_or(0)),
        issuing_distribution_point: None,
        revoked_certs,
        key_identifier_method: KeyIdMethod::Sha256,
    };
    params
        .signed_by(issuer)
        .and_then(|list| list.pem())
        .map_err(PkiError::Sign)
}

/// 16 bytes that DER writes as they are: positive, no leading zero.
fn random_serial() -> [u8; 16] {
    let mut serial: [u8; 16] = rand::random();
    serial[0] = (serial[0] & 0x3f) | 0x40;
    serial
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Result<Vec<u8>, PkiError> {
    let bad = || PkiError::Serial(text.to_owned());
    if text.len() != 32 || !text.is_ascii() {
        return Err(bad());
    }
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).map_err(|_| bad()))
        .collect()
}

/// Seconds after 1970, to be added to the certificate library's own kind of date.
fn since_1970(at: Timestamp) -> Result<Duration, PkiError> {
    u64::try_from(at.as_second())
        .map(Duration::from_secs)
        .map_err(|_| PkiError::Date)
}
