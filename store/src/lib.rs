//! Stable storage, and the protocols that decide what has to be in it.
//!
//! [`StableStore`] keeps event logs and checkpoints of many units. [`log`] is the plain event log of one
//! unit in a directory of its own, for what only has to be looked at later.
//!
//! [`protocols`] holds the recovery protocols between units as state machines without input,
//! output, clock or randomness, and the simulator that drives them through failures. Nothing there
//! knows of the rest of this library. `cli` is the command `ftstore`.
#![forbid(unsafe_code)]

mod api;
mod batch;
mod bytes;
#[cfg(feature = "service")]
pub mod cli;
pub mod client;
#[cfg(any(test, feature = "testing"))]
pub mod conformance;
pub mod disk;
pub mod engine;
mod error;
mod location;
pub mod log;
#[cfg(feature = "nats")]
pub mod nats;
pub mod net;
pub mod protocols;
#[cfg(feature = "service")]
pub mod service;
mod state;
mod table;
mod watch;

pub use api::{
    CheckpointInfo, Collected, Durability, EachPage, EachRecord, Finding, Fsck, NewCheckpoint, OpenOptions, PAGE_BYTES,
    Page, Pages, Reclaimed, StableStore, UnitInfo, UnitName, UnitStore, each_record,
};
pub use batch::{BATCH_BYTES_MAX, Batch, Records as BatchRecords};
pub use client::Client;
pub use engine::{Engine, Options as EngineOptions};
pub use error::Error;
pub use location::{Location, Nats, Tcp};
pub use log::{LogError, LogReader, LogWriter, Lost, Records};
