//! Stable storage, and the protocols that decide what has to be in it.
//!
//! [`log`] is the embedded event log of one unit: a directory of append-only segment files. It
//! stores opaque records under consecutive numbers (the state interval index, SII) and does not
//! know what they mean.
//!
//! [`protocols`] holds the recovery protocols between units as state machines without input,
//! output, clock or randomness, and the simulator that drives them through failures. [`cli`] is the
//! command `ftstore`.
#![forbid(unsafe_code)]

pub mod cli;
pub mod log;
pub mod protocols;

pub use log::{LogError, LogReader, LogWriter, Lost, Records};
