//! Event ring.
