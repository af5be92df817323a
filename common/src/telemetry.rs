//! How a program reports on itself.
