//! What a VM is.
