//! Calling a peer.
//!
//! Owns one call: an own UDP socket for each connection, the handshake, whether the program that answers is the one that was
//! called, and waiting for its welcome. Leaves alone when to call again: see [`LinkError::is_transient`].

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Connection, Endpoint, TokioRuntime};

use super::congestion::{SharedBudget, budget_towards};
use super::endpoint::{Link, LinkParts, chain_of, close};
use super::identity::Identity;
use super::refusal::{LinkError, Refusal, code, explain};
use super::socket;
use super::tls::{Seen, TlsState};
use super::transport;
use super::tuning::LinkSettings;
use super::welcome::{self, Unwelcome};

/// Calls the program `expected` at `address` and answers when it has accepted us.
///
/// Every call has a UDP socket of its own, so that several links of one pair of programs use several cores and paths.
///
/// # Errors
/// A sentence for the log: no answer, who refused whom and why, or what answered instead of `expected`.
pub async fn connect(
    address: SocketAddr,
    expected: &Identity,
    alpn: &[u8],
    tls: &Arc<TlsState>,
    settings: &LinkSettings,
) -> Result<Link, LinkError> {
    let call = Call {
        address,
        expected,
        alpn,
        tls,
        settings,
        seen: Arc::default(),
    };
    match tokio::time::timeout(settings.handshake, call.run()).await {
        Ok(result) => result,
        Err(_) => Err(LinkError::NoAnswer {
            address,
            waited: settings.handshake,
        }),
    }
}

struct Call<'a> {
    address: SocketAddr,
    expected: &'a Identity,
    alpn: &'a [u8],
    tls: &'a Arc<TlsState>,
    settings: &'a LinkSettings,
    seen: Arc<Seen>,
}

impl Call<'_> {
    async fn run(&self) -> Result<Link, LinkError> {
        let (config, budget) = self.client_config()?;
        let endpoint = self.endpoint()?;
        let connecting = endpoint
            .connect_with(config, self.address, &self.expected.dns_name())
            .map_err(|error| LinkError::Settings(error.to_string()))?;
        let connection = connecting.await.map_err(|error| self.explain(&error))?;
        let result = self.finish(&connection, &endpoint, budget).await;
        if result.is_err() {
            // The reason must reach the peer before the socket goes.
            let _ = tokio::time::timeout(Duration::from_millis(500), endpoint.wait_idle()).await;
        }
        result
    }

    async fn finish(
        &self,
        connection: &Connection,
        endpoint: &Endpoint,
        budget: SharedBudget,
    ) -> Result<Link, LinkError> {
        let chain = chain_of(connection);
        let peer = self.check_peer(&chain).inspect_err(|why| {
            close(connection, code::WRONG_NAME, &why.to_string());
        });
        let peer = peer.map_err(|why| self.refused(why))?;
        self.welcome(connection).await?;
        let parts = LinkParts {
            connection: connection.clone(),
            endpoint: Some(endpoint.clone()),
            peer,
            chain,
            idle: self.settings.idle,
            budget,
            permit: None,
        };
        let broken = || LinkError::Broken {
            address: self.address,
            detail: "no certificate".to_owned(),
        };
        let link = Link::new(parts).ok_or_else(broken)?;
        self.tls.register(link.inner());
        // The files may have changed between the handshake and the registration.
        if let Err(why) = self.tls.judge(link.inner().chain()) {
            link.inner().close_refused(&why);
            return Err(self.refused(why));
        }
        Ok(link)
    }

    fn client_config(&self) -> Result<(ClientConfig, SharedBudget), LinkError> {
        let tls = self.tls.client_config(&[self.alpn.to_vec()], &self.seen)?;
        let quic = QuicClientConfig::try_from(tls).map_err(|error| LinkError::Settings(error.to_string()))?;
        let mut config = ClientConfig::new(Arc::new(quic));
        let budget = budget_towards(self.address, self.expected, self.alpn, self.settings);
        config.transport_config(transport::transport(self.settings, &budget)?);
        Ok((config, budget))
    }

    fn endpoint(&self) -> Result<Endpoint, LinkError> {
        let any: SocketAddr = match self.address {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let socket = socket::bind(any, self.settings.socket_buffer)?;
        let config = transport::endpoint(self.settings)?;
        Endpoint::new(config, None, socket, Arc::new(TokioRuntime)).map_err(|source| LinkError::Socket {
            address: any,
            source: Arc::new(source),
        })
    }

    /// The certificate's DNS name was checked in the handshake; its identity must say the same, and be of our trust domain.
    fn check_peer(&self, chain: &[rustls::pki_types::CertificateDer<'_>]) -> Result<Identity, Refusal> {
        let first = chain.first().ok_or(Refusal::NoCertificate)?;
        let peer = Identity::of_certificate(first).map_err(|error| Refusal::Unusable(error.to_string()))?;
        if peer == *self.expected {
            return Ok(peer);
        }
        let (expected, found) = (self.expected.uri(), peer.uri());
        Err(Refusal::WrongName(format!(
            "{expected} was called, but {found} answered"
        )))
    }

    async fn welcome(&self, connection: &Connection) -> Result<(), LinkError> {
        match welcome::exchange(connection).await {
            Ok(()) => Ok(()),
            Err(Unwelcome::Gone(error)) => Err(self.explain(&error)),
            Err(Unwelcome::Stranger) => {
                let detail = "it did not say welcome as Longhaul does".to_owned();
                close(connection, code::WRONG_NAME, &detail);
                Err(LinkError::Broken {
                    address: self.address,
                    detail,
                })
            }
        }
    }

    fn refused(&self, why: Refusal) -> LinkError {
        let who = self
            .seen
            .shown()
            .who
            .map_or_else(|| "a peer".to_owned(), |who| who.to_string());
        LinkError::Refused {
            address: self.address,
            who,
            why,
        }
    }

    /// Our own verdict on the peer's certificate is better than the alert it became.
    fn explain(&self, error: &quinn::ConnectionError) -> LinkError {
        match (
            explain(error, self.address, self.settings.handshake),
            self.seen.shown().refusal,
        ) {
            (LinkError::Refused { .. }, Some(why)) => self.refused(self.named(why)),
            (LinkError::Silent { .. }, _) => LinkError::NoAnswer {
                address: self.address,
                waited: self.settings.handshake,
            },
            (
                LinkError::RefusedByPeer {
                    address,
                    why: Refusal::OtherProtocol(text),
                },
                _,
            ) => {
                let offered = String::from_utf8_lossy(self.alpn).into_owned();
                let why = Refusal::OtherProtocol(format!("{offered} was offered, {text}"));
                LinkError::RefusedByPeer { address, why }
            }
            (other, _) => other,
        }
    }

    fn named(&self, why: Refusal) -> Refusal {
        match (why, self.seen.shown().who) {
            (Refusal::WrongName(_), Some(who)) => Refusal::WrongName(format!(
                "{} was called, but {} answered",
                self.expected.uri(),
                who.uri()
            )),
            (other, _) => other,
        }
    }
}
