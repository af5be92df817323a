//! Who a program is: the name in its certificate.
//!
//! Owns the role and the identity, their text forms, and how an identity is read out of a certificate. Every certificate
//! of a Longhaul authority carries exactly one identity, as a URI in the subject alternative name (the form of SPIFFE,
//! so that other tools can read it): `spiffe://TRUST_DOMAIN/site/SITE/role/ROLE/name/NAME`, and the DNS name
//! `NAME.ROLE.SITE.longhaul`, under which a connecting program expects to find it.
//!
//! Leaves alone whether a certificate is to be believed (`tls`) and who makes it (the gateway's `pki`). A name that does
//! not follow the rules here is never an identity, so no log line, path or DNS name has to escape one.

use std::fmt;
use std::str::FromStr;

use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};

/// The longest site or program name, in bytes. Four labels and the dots stay far below DNS's 253.
pub const NAME_LENGTH_MAX: usize = 40;
/// The longest trust domain, in bytes.
pub const TRUST_DOMAIN_LENGTH_MAX: usize = 100;

/// What a program is allowed to be. A certificate holds exactly one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// A site's gateway.
    Gateway,
    /// A hypervisor host's agent.
    Agent,
    /// A person or script that uses the gateway's API.
    Operator,
}

impl Role {
    /// Every role, in the order of the documentation.
    pub const ALL: [Self; 3] = [Self::Gateway, Self::Agent, Self::Operator];

    /// The word in certificates, configs and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Gateway => "gateway",
            Self::Agent => "agent",
            Self::Operator => "operator",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = NotAnIdentity;

    fn from_str(text: &str) -> Result<Self, NotAnIdentity> {
        let found = Self::ALL.into_iter().find(|role| role.as_str() == text);
        found.ok_or_else(|| NotAnIdentity::Role(shown(text)))
    }
}

/// Text or a certificate that names no program.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotAnIdentity {
    /// A site or program name that breaks the rules.
    #[error("'{0}' is not a valid name: use 1 to 40 of a-z, 0-9 and '-', with no '-' at either end")]
    Name(String),
    /// A trust domain that breaks the rules.
    #[error(
        "'{0}' is not a valid trust domain: use 1 to 100 of a-z, 0-9, '-' and '.', like 'longhaul.example.org'"
    )]
    TrustDomain(String),
    /// A word that is no role.
    #[error("'{0}' is not a role: use gateway, agent or operator")]
    Role(String),
    /// A URI of another shape.
    #[error(
        "'{0}' does not name a Longhaul program: spiffe://TRUST_DOMAIN/site/SITE/role/ROLE/name/NAME was expected"
    )]
    Uri(String),
    /// A certificate with no identity, or with several.
    #[error(
        "the certificate carries {0} Longhaul names, exactly one was expected: issue it with `longhaul pki issue`"
    )]
    Count(usize),
    /// Bytes that are no certificate.
    #[error("the certificate cannot be read")]
    Unreadable,
}

/// One program at one site, as its certificate says.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Identity {
    trust_domain: String,
    site: String,
    role: Role,
    name: String,
}

impl Identity {
    /// An identity of checked parts.
    ///
    /// # Errors
    /// The first part that breaks the rules for names.
    pub fn new(trust_domain: &str, site: &str, role: Role, name: &str) -> Result<Self, NotAnIdentity> {
        check_trust_domain(trust_domain)?;
        check_name(site)?;
        check_name(name)?;
        Ok(Self {
            trust_domain: trust_domain.to_owned(),
            site: site.to_owned(),
            role,
            name: name.to_owned(),
        })
    }

    /// The one identity in a certificate. Says nothing about whether the certificate is to be believed.
    ///
    /// # Errors
    /// Bytes that are no certificate, no or several URI names, or a URI of another shape.
    pub fn of_certificate(certificate: &CertificateDer<'_>) -> Result<Self, NotAnIdentity> {
        let parsed = webpki::EndEntityCert::try_from(certificate).map_err(|_| NotAnIdentity::Unreadable)?;
        let mut names = parsed.valid_uri_names();
        match (names.next(), names.next()) {
            (Some(only), None) => only.parse(),
            (first, second) => Err(NotAnIdentity::Count([first, second].iter().flatten().count())),
        }
    }

    /// The set of programs that share one authority.
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// The site that the program belongs to.
    pub fn site(&self) -> &str {
        &self.site
    }

    /// What the program is.
    pub fn role(&self) -> Role {
        self.role
    }

    /// The program's name within its site and role.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The name in the certificate: `spiffe://TRUST_DOMAIN/site/SITE/role/ROLE/name/NAME`.
    pub fn uri(&self) -> String {
        format!(
            "spiffe://{}/site/{}/role/{}/name/{}",
            self.trust_domain, self.site, self.role, self.name
        )
    }

    /// The name under which a connecting program expects it: `NAME.ROLE.SITE.longhaul`. It is never looked up.
    pub fn dns_name(&self) -> String {
        format!("{}.{}.{}.longhaul", self.name, self.role, self.site)
    }
}

/// For people: `gateway gw-1 of site berlin`.
impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} of site {}", self.role, self.name, self.site)
    }
}

impl FromStr for Identity {
    type Err = NotAnIdentity;

    fn from_str(text: &str) -> Result<Self, NotAnIdentity> {
        let parts: Option<Vec<&str>> = text
            .strip_prefix("spiffe://")
            .map(|rest| rest.split('/').collect());
        match parts.as_deref() {
            Some([domain, "site", site, "role", role, "name", name]) => {
                Self::new(domain, site, role.parse()?, name)
            }
            _ => Err(NotAnIdentity::Uri(shown(text))),
        }
    }
}

impl TryFrom<String> for Identity {
    type Error = NotAnIdentity;

    fn try_from(text: String) -> Result<Self, NotAnIdentity> {
        text.parse()
    }
}

impl From<Identity> for String {
    fn from(identity: Identity) -> Self {
        identity.uri()
    }
}

/// Refuses a site or program name that is not 1 to 40 of `a-z`, `0-9` and `-`, or has a `-` at an end.
///
/// # Errors
/// [`NotAnIdentity::Name`].
pub fn check_name(name: &str) -> Result<(), NotAnIdentity> {
    if name.len() <= NAME_LENGTH_MAX && is_label(name) {
        return Ok(());
    }
    Err(NotAnIdentity::Name(shown(name)))
}

/// Refuses a trust domain that is not dot-separated labels of `a-z`, `0-9` and `-`, 100 bytes at most.
///
/// # Errors
/// [`NotAnIdentity::TrustDomain`].
pub fn check_trust_domain(domain: &str) -> Result<(), NotAnIdentity> {
    if domain.len() <= TRUST_DOMAIN_LENGTH_MAX
        && domain.split('.').all(|part| part.len() <= 63 && is_label(part))
    {
        return Ok(());
    }
    Err(NotAnIdentity::TrustDomain(shown(domain)))
}

fn is_label(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    !text.is_empty() && text.bytes().all(allowed) && !text.starts_with('-') && !text.ends_with('-')
}

/// Foreign text for an error: short, and without control characters.
pub(crate) fn shown(text: &str) -> String {
    const LENGTH_MAX: usize = 400;
    let clean = |c: char| {
        if c.is_control() {
            char::REPLACEMENT_CHARACTER
        } else {
            c
        }
    };
    let mut short: String = text.chars().take(LENGTH_MAX).map(clean).collect();
    if text.chars().nth(LENGTH_MAX).is_some() {
        short.push('…');
    }
    short
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_identity_survives_its_uri() {
        let identity = Identity::new("longhaul.example", "berlin", Role::Gateway, "gw-1").unwrap();
        assert_eq!(
            identity.uri(),
            "spiffe://longhaul.example/site/berlin/role/gateway/name/gw-1"
        );
        assert_eq!(identity.dns_name(), "gw-1.gateway.berlin.longhaul");
        assert_eq!(identity.uri().parse(), Ok(identity.clone()));
        assert_eq!(identity.to_string(), "gateway gw-1 of site berlin");
        let json = serde_json::to_string(&identity).unwrap();
        assert_eq!(serde_json::from_str::<Identity>(&json).unwrap(), identity);
    }

    #[test]
    fn other_shapes_are_refused() {
        for text in [
            "",
            "spiffe://",
            "spiffe://d/site/s/role/gateway",
            "spiffe://d/site/s/role/gateway/name/n/",
            "spiffe://d/site/s/role/root/name/n",
            "spiffe://d/site/S/role/agent/name/n",
            "spiffe://d/site/s/role/agent/name/-n",
            "spiffe://d..e/site/s/role/agent/name/n",
            "spiffe:///site/s/role/agent/name/n",
            "https://d/site/s/role/agent/name/n",
            "spiffe://d/site/s/role/agent/name/n\u{0}",
        ] {
            assert!(text.parse::<Identity>().is_err(), "{text:?} was accepted");
        }
        assert!(check_name(&"a".repeat(40)).is_ok());
        assert!(check_name(&"a".repeat(41)).is_err());
    }

    proptest! {
        #[test]
        fn what_parses_prints_the_same(text in "spiffe://[a-z.-]{0,8}/site/[a-z0-9-]{0,42}/role/(agent|gateway|x)/name/[a-zA-Z0-9-]{0,4}") {
            if let Ok(identity) = text.parse::<Identity>() {
                prop_assert_eq!(identity.uri(), text);
            }
        }

        #[test]
        fn any_text_is_refused_or_an_identity(text in "\\PC{0,200}") {
            let _ = text.parse::<Identity>();
        }

        #[test]
        fn any_bytes_are_refused_or_a_certificate(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(Identity::of_certificate(&CertificateDer::from(bytes)).is_err());
        }
    }
}
