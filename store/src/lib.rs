//! Stable storage.
//!
//! [`log`] is the embedded event log of one unit: a directory of append-only segment files. It
//! stores opaque records under consecutive numbers (the state interval index, SII) and does not
//! know what they mean.
#![forbid(unsafe_code)]

pub mod log;

pub use log::{LogError, LogReader, LogWriter, Lost, Records};
