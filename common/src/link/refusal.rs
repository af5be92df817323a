//! Why a link could not be made, or ended: in words.
//!
//! Owns the errors of the link and the translation of TLS alerts, certificate verdicts and QUIC closes into sentences that
//! both ends can print. The end that refuses knows most; what reaches the other end is an alert number and a short text,
//! and both are enough to tell apart every reason in [`Refusal`]. Text from a peer is cut short and cleaned before it is shown.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::ConnectionError;
use rustls::CertificateError;

use super::identity::{Identity, Role, shown};

/// Close codes of the link itself. Programs above it use codes from [`code::FIRST_FREE`].
pub mod code {
    /// The work is done, or nobody needs the link any more.
    pub const DONE: u32 = 0;
    /// The peer's role is not accepted here.
    pub const WRONG_ROLE: u32 = 1;
    /// The peer is another program than the one that was called, or of another trust domain.
    pub const WRONG_NAME: u32 = 2;
    /// The peer's certificate was revoked, expired or lost its authority while the link was up.
    pub const CERTIFICATE: u32 = 3;
    /// Too many links or handshakes at once.
    pub const BUSY: u32 = 4;
    /// The program stops.
    pub const STOPPING: u32 = 5;
    /// The first code that is free for the programs above the link.
    pub const FIRST_FREE: u32 = 0x100;
}

/// Why one end does not talk to the other. Reads as the end of a sentence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Issued by nobody that the refusing side believes.
    #[error("the certificate was issued by an unknown authority (compare the authority files of both sites)")]
    UnknownAuthority,
    /// Past its last day.
    #[error(
        "the certificate has expired (issue a new one with `longhaul pki issue`, or set the clock if it is wrong)"
    )]
    Expired,
    /// Before its first day.
    #[error("the certificate is not valid yet (compare the clocks of both hosts)")]
    NotYetValid,
    /// On the authority's revocation list.
    #[error("the certificate is revoked (issue a new one with `longhaul pki issue`)")]
    Revoked,
    /// The revocation list is of another authority than the certificate.
    #[error(
        "it is unknown whether the certificate is revoked (the revocation list is from another authority than the certificate)"
    )]
    RevocationUnknown,
    /// No certificate was shown.
    #[error("no certificate was shown (every Longhaul program needs one, see `longhaul pki issue`)")]
    NoCertificate,
    /// A role that may not use this port.
    #[error("{0}")]
    WrongRole(String),
    /// Another program, site or trust domain than expected.
    #[error("{0}")]
    WrongName(String),
    /// The two ends share no protocol version.
    #[error("{0}")]
    OtherProtocol(String),
    /// The other end has too much to do.
    #[error("too many links are being made at once (it is tried again)")]
    Busy,
    /// A certificate that cannot be used for another reason.
    #[error("the certificate cannot be used: {0}")]
    Unusable(String),
}

impl Refusal {
    /// A role that is not accepted: what it is, and what would be.
    pub(crate) fn role(found: &Identity, accepted: &[Role]) -> Self {
        let accepted: Vec<&str> = accepted.iter().map(|role| role.as_str()).collect();
        Self::WrongRole(format!(
            "the certificate is for {found}, but only a certificate for the role {} is accepted here",
            accepted.join(" or ")
        ))
    }

    /// The protocols of two ends that do not meet.
    pub(crate) fn protocols(offered: &[String], spoken: &[String]) -> Self {
        Self::OtherProtocol(format!(
            "no common protocol version: {} was offered, {} is spoken here (update the older side)",
            listed(offered),
            listed(spoken)
        ))
    }

    /// The verdict of the TLS library on this end.
    pub(crate) fn of_tls(error: &rustls::Error) -> Self {
        match error {
            rustls::Error::InvalidCertificate(certificate) => Self::of_certificate(certificate),
            rustls::Error::NoCertificatesPresented => Self::NoCertificate,
            other => Self::Unusable(shown(&other.to_string())),
        }
    }

    fn of_certificate(error: &CertificateError) -> Self {
        match error {
            CertificateError::UnknownIssuer | CertificateError::BadSignature => Self::UnknownAuthority,
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => Self::Expired,
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => Self::NotYetValid,
            CertificateError::Revoked => Self::Revoked,
            CertificateError::UnknownRevocationStatus => Self::RevocationUnknown,
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                Self::WrongName(shown(&error.to_string()))
            }
            other => Self::Unusable(shown(&other.to_string())),
        }
    }

    /// What an alert from the peer (RFC 8446, section 6) and the text beside it say about us.
    fn of_alert(alert: u8, text: &str) -> Self {
        let detail = || {
            if text.is_empty() {
                format!("TLS alert {alert}")
            } else {
                shown(text)
            }
        };
        match alert {
            44 => Self::Revoked,
            45 if text.contains("not valid yet") || text.contains("NotValidYet") => Self::NotYetValid,
            45 => Self::Expired,
            48 if text.contains("UnknownRevocationStatus") => Self::RevocationUnknown,
            48 | 51 => Self::UnknownAuthority,
            116 => Self::NoCertificate,
            120 => Self::OtherProtocol(
                "it does not speak our protocol version (update the older side)".to_owned(),
            ),
            42 if text.contains("not valid for name") => Self::WrongName(called_as(text)),
            49 => Self::WrongRole(
                "the certificate's role is not accepted there (issue one with another `--role`)".to_owned(),
            ),
            _ => Self::Unusable(detail()),
        }
    }
}

/// From the TLS library's sentence about a name that does not fit, what the end that bears another name should know.
fn called_as(text: &str) -> String {
    match text.split('"').nth(1) {
        Some(name) => format!(
            "it called {}, which is not the name in this program's certificate",
            shown(name)
        ),
        None => shown(text),
    }
}

fn listed(protocols: &[String]) -> String {
    if protocols.is_empty() {
        "none".to_owned()
    } else {
        protocols.join(", ")
    }
}

/// Why a link could not be made, or ended.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LinkError {
    /// No UDP socket.
    #[error("cannot use UDP on {address}")]
    Socket {
        /// The local address.
        address: SocketAddr,
        /// What the system said.
        #[source]
        source: Arc<std::io::Error>,
    },
    /// Settings that quinn or the system does not take.
    #[error("the link settings cannot be used: {0}")]
    Settings(String),
    /// Nothing came back.
    #[error(
        "no answer from {address} over UDP within {} s: check that the program runs there and that every firewall on the way lets UDP port {} through",
        waited.as_secs_f32(), address.port()
    )]
    NoAnswer {
        /// Who was called.
        address: SocketAddr,
        /// For how long.
        waited: Duration,
    },
    /// This end does not want the peer.
    #[error("refused {who} at {address}: {why}")]
    Refused {
        /// The peer's address.
        address: SocketAddr,
        /// The peer as its certificate names it, or "a peer".
        who: String,
        /// Why.
        why: Refusal,
    },
    /// The peer does not want this end.
    #[error("{address} refused us: {why}")]
    RefusedByPeer {
        /// The peer's address.
        address: SocketAddr,
        /// Why, as far as it said.
        why: Refusal,
    },
    /// The peer ended the link.
    #[error("the peer closed the link: {reason} (code {code})")]
    Closed {
        /// One of [`code`], or the program's own.
        code: u64,
        /// The peer's sentence, cleaned.
        reason: String,
    },
    /// This end ended the link.
    #[error("the link was closed here: {0}")]
    ClosedHere(String),
    /// Nothing was heard for the idle time.
    #[error("nothing was heard from {address} for {} s: the network is cut or the program there is gone", idle.as_secs())]
    Silent {
        /// The peer's address.
        address: SocketAddr,
        /// The idle limit.
        idle: Duration,
    },
    /// The peer does not know this connection any more.
    #[error("{address} does not know this link any more: the program there was restarted")]
    Restarted {
        /// The peer's address.
        address: SocketAddr,
    },
    /// QUIC was violated, or quinn gave up (code INTERNAL_ERROR). Work on other links is not touched; make a new link.
    #[error("the link to {address} broke: {detail}")]
    Broken {
        /// The peer's address.
        address: SocketAddr,
        /// What quinn said.
        detail: String,
    },
}

impl LinkError {
    /// Whether calling again can help without anybody changing anything.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::NoAnswer { .. } | Self::Silent { .. } | Self::Restarted { .. } | Self::Broken { .. } => {
                true
            }
            Self::RefusedByPeer { why, .. } | Self::Refused { why, .. } => *why == Refusal::Busy,
            Self::Closed { code, .. } => *code == u64::from(code::BUSY) || *code == u64::from(code::STOPPING),
            Self::Socket { .. } | Self::Settings(_) | Self::ClosedHere(_) => false,
        }
    }
}

/// What quinn's error means, for a link to `address`.
pub(crate) fn explain(error: &ConnectionError, address: SocketAddr, idle: Duration) -> LinkError {
    match error {
        ConnectionError::ApplicationClosed(close) => {
            let reason = shown(&String::from_utf8_lossy(&close.reason));
            of_application(close.error_code.into_inner(), reason, address)
        }
        ConnectionError::ConnectionClosed(close) => {
            let text = String::from_utf8_lossy(&close.reason);
            match alert(u64::from(close.error_code)) {
                Some(number) => LinkError::RefusedByPeer {
                    address,
                    why: Refusal::of_alert(number, &text),
                },
                None if close.error_code == quinn::TransportErrorCode::CONNECTION_REFUSED => {
                    LinkError::RefusedByPeer {
                        address,
                        why: Refusal::Busy,
                    }
                }
                None => LinkError::Broken {
                    address,
                    detail: shown(&close.to_string()),
                },
            }
        }
        ConnectionError::TransportError(own) => match alert(u64::from(own.code)) {
            Some(number) => {
                let why = Refusal::of_alert(number, &own.reason);
                LinkError::Refused {
                    address,
                    who: "the peer".to_owned(),
                    why,
                }
            }
            None => LinkError::Broken {
                address,
                detail: shown(&own.to_string()),
            },
        },
        ConnectionError::TimedOut => LinkError::Silent { address, idle },
        ConnectionError::Reset => LinkError::Restarted { address },
        ConnectionError::LocallyClosed => LinkError::ClosedHere("no longer needed".to_owned()),
        ConnectionError::VersionMismatch => LinkError::RefusedByPeer {
            address,
            why: Refusal::OtherProtocol("it does not speak QUIC version 1".to_owned()),
        },
        ConnectionError::CidsExhausted => LinkError::Broken {
            address,
            detail: error.to_string(),
        },
    }
}

fn of_application(number: u64, reason: String, address: SocketAddr) -> LinkError {
    let refused = |why| LinkError::RefusedByPeer { address, why };
    match u32::try_from(number) {
        Ok(code::WRONG_ROLE) => refused(Refusal::WrongRole(reason)),
        Ok(code::WRONG_NAME) => refused(Refusal::WrongName(reason)),
        Ok(code::BUSY) => refused(Refusal::Busy),
        _ => LinkError::Closed { code: number, reason },
    }
}

/// The TLS alert in a QUIC error code (RFC 9001, section 4.8).
fn alert(code: u64) -> Option<u8> {
    (0x100..0x200).contains(&code).then_some((code & 0xff) as u8)
}

#[cfg(test)]
mod tests {
    use quinn::TransportErrorCode;

    use super::*;

    fn told(alert: u8, text: &str) -> String {
        let close = quinn::ConnectionClose {
            error_code: TransportErrorCode::crypto(alert),
            frame_type: None,
            reason: text.as_bytes().to_vec().into(),
        };
        let address = "192.0.2.1:4433".parse().unwrap();
        explain(
            &ConnectionError::ConnectionClosed(close),
            address,
            Duration::from_secs(30),
        )
        .to_string()
    }

    #[test]
    fn every_alert_has_its_sentence() {
        let cases = [
            (
                44,
                "invalid peer certificate: Revoked",
                "the certificate is revoked",
            ),
            (
                45,
                "invalid peer certificate: certificate expired: verification time",
                "has expired",
            ),
            (
                45,
                "invalid peer certificate: certificate not valid yet: verification time",
                "not valid yet",
            ),
            (
                48,
                "invalid peer certificate: UnknownIssuer",
                "issued by an unknown authority",
            ),
            (
                48,
                "invalid peer certificate: UnknownRevocationStatus",
                "the revocation list is from another",
            ),
            (116, "peer sent no certificates", "no certificate was shown"),
            (120, "", "does not speak our protocol version"),
            (49, "", "role is not accepted there"),
            (
                42,
                "certificate not valid for name \"a.b.c.longhaul\"; certificate is only",
                "it called a.b.c.longhaul",
            ),
            (80, "", "TLS alert 80"),
        ];
        for (alert, text, part) in cases {
            let said = told(alert, text);
            assert!(
                said.starts_with("192.0.2.1:4433 refused us: ") && said.contains(part),
                "{alert}: {said}"
            );
        }
    }

    #[test]
    fn what_a_peer_says_is_cleaned_and_cut() {
        let close = quinn::ApplicationClose {
            error_code: quinn::VarInt::from_u32(700),
            reason: format!("a\x1b[31mb\n{}", "x".repeat(1000)).into_bytes().into(),
        };
        let address = "192.0.2.1:4433".parse().unwrap();
        let said = explain(
            &ConnectionError::ApplicationClosed(close),
            address,
            Duration::from_secs(30),
        );
        let text = said.to_string();
        assert!(
            !text.contains('\x1b') && !text.contains('\n') && text.len() < 600,
            "{text}"
        );
        assert!(!said.is_transient());
    }
}
