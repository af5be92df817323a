//! How a restarted program tells its peers that their connections are gone.
//!
//! Owns the keys behind QUIC's stateless resets (RFC 9000, section 10.3). They are derived from the program's private key: a program
//! that was killed and started again knows the connections of its former life as such, and answers their packets with a reset
//! that the peer believes. Without it peers would wait for the idle time. Promises that nobody without the private key can make such a reset.

use std::sync::Arc;

use quinn::EndpointConfig;
use quinn_proto::HashedConnectionIdGenerator;
use quinn_proto::crypto::{CryptoError, HmacKey};

/// What the keys are derived from. Not shown anywhere.
#[derive(Clone)]
pub(crate) struct ResetSeed([u8; 32]);

impl ResetSeed {
    /// From the private key's bytes.
    pub(crate) fn of_private_key(key: &[u8]) -> Self {
        Self(blake3::derive_key("longhaul 2026 stateless reset", key))
    }

    /// Has the endpoint answer packets of a former life with a reset.
    pub(crate) fn apply(&self, config: &mut EndpointConfig) {
        let tokens = blake3::derive_key("longhaul 2026 reset tokens", &self.0);
        let ids = blake3::derive_key("longhaul 2026 connection ids", &self.0);
        let [a, b, c, d, e, f, g, h, ..] = ids;
        let key = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        config
            .reset_key(Arc::new(TokenKey(tokens)))
            .cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(key)));
    }
}

struct TokenKey([u8; 32]);

impl HmacKey for TokenKey {
    fn sign(&self, data: &[u8], signature_out: &mut [u8]) {
        let full = blake3::keyed_hash(&self.0, data);
        let len = signature_out.len().min(full.as_bytes().len());
        signature_out[..len].copy_from_slice(&full.as_bytes()[..len]);
    }

    fn signature_len(&self) -> usize {
        32
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        // Compared in constant time by the hash's own equality.
        let stated: [u8; 32] = signature.try_into().map_err(|_| CryptoError)?;
        (blake3::keyed_hash(&self.0, data) == stated)
            .then_some(())
            .ok_or(CryptoError)
    }
}
