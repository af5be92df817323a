//! QUIC connections between programs: identity, TLS, tuning.
