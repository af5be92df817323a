//! Convergence against a simulated guest and link.
