//! The link: authenticated QUIC connections between programs.
//!
//! Owns everything under the wire: who a program is (`identity`, `credentials`), TLS (`tls`, `reload`), UDP sockets and
//! connections (`socket`, `listen`, `connect`, `endpoint`), their tuning (`tuning`, `transport`, `congestion`), when to knock at a
//! silent peer (`knock`), the words for every way in which a link fails (`refusal`), and the test of a path to a peer (`probe`).
//! quinn, rustls, webpki and x509-parser are used here and nowhere else.
//!
//! Leaves alone what is said over a link: messages, batches and their order belong to `wire` and the programs.
//!
//! ```text
//!  connecting program                                   accepting program
//!  connect(address, expected identity, alpn)            Listener::bind(address, alpns, roles)
//!    TLS 1.3: judges authority, dates, revocation  <->    the same, for the other certificate
//!    judges trust domain, site, role, name                judges trust domain, role
//!    welcome  <---------------------------------------->  welcome
//!  Link                                                 Link, from accept()
//! ```

pub mod congestion;
mod connect;
mod credentials;
mod endpoint;
mod identity;
mod knock;
mod listen;
pub mod probe;
mod refusal;
mod reload;
mod reset;
mod socket;
mod tls;
mod transport;
mod tuning;
mod welcome;

pub use connect::connect;
pub use credentials::{Credentials, CredentialsError};
pub use endpoint::{Link, LinkStats};
pub use identity::{
    Identity, NAME_LENGTH_MAX, NotAnIdentity, Role, TRUST_DOMAIN_LENGTH_MAX, check_name, check_trust_domain,
};
pub use knock::{KNOCK_EVERY, Silence};
pub use listen::{Listener, RefusedPeer};
pub use quinn::{
    ClosedStream, ReadError, ReadExactError, ReadToEndError, RecvStream, SendStream, StoppedError, StreamId,
    VarInt, WriteError,
};
pub use refusal::{LinkError, Refusal, code};
pub use reload::Reloader;
pub use tls::{TlsState, https_client_config, https_server_config};
pub use tuning::{
    Congestion, LinkSettings, MTU_JUMBO, MTU_NEAR, MTU_WAN, PACKET_OVERHEAD, Tuning, WAN_RTT, tune,
};

/// The protocol between agents and their gateway.
pub const ALPN_AGENT: &[u8] = b"longhaul-agent/1";
/// The protocol between the gateways of two sites.
pub const ALPN_PEER: &[u8] = b"longhaul-peer/1";
/// The protocol of `longhaul link`.
pub const ALPN_PROBE: &[u8] = b"longhaul-probe/1";
