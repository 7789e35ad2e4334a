//! Stable storage.
