//! The program inside the guest.
