//! The event log of one unit.
//!
//! A log is a directory of segments. A segment is a file `seg-%016x`, named by the SII of its first
//! record, with a header and then frames, all little endian:
//!
//! | header offset | field |
//! |---|---|
//! | 0 | magic `FTRUNSEG` |
//! | 8 | format version, u32 |
//! | 12 | SII of the first record, u64 |
//! | 20 | CRC-32 of the 20 bytes before |
//!
//! | frame offset | field |
//! |---|---|
//! | 0 | `len`: bytes of the record, u32 |
//! | 4 | CRC-32 of `sii` and the record |
//! | 8 | `sii`, u64 |
//! | 16 | CRC-32 of the 16 bytes before |
//! | 20 | the record |
//!
//! The second checksum makes `len` trustworthy before the record is read, so that a flipped bit in
//! it is found and not taken for a torn tail.
//!
//! Invariants: SIIs are consecutive in a segment and from one segment to the next. All segments but
//! the last are complete. The last one may end inside a frame (the writer died there): that *torn
//! tail* was never acknowledged; readers stop before it and the next writer cuts it. A tail of
//! zeros, which a power loss can leave, is torn too. Any other bad byte is [`LogError::Corrupt`].
//!
//! A failed `fdatasync` poisons a writer for good: the kernel may have dropped the pages, so only
//! reading the files again says what they hold.

mod format;
mod reader;
mod writer;

#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::path::PathBuf;

pub use format::{FORMAT_VERSION, RECORD_BYTES_MAX, SEGMENT_BYTES};
pub use reader::{LogReader, Records};
pub use writer::LogWriter;

/// A range of records that cannot be read back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lost {
    /// First lost SII.
    pub from: u64,
    /// Last lost SII; `None` when the end is unknown (it is the end of the log).
    pub to: Option<u64>,
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.to {
            Some(to) if to == self.from => write!(f, "event {to} is lost"),
            Some(to) => write!(f, "events {} to {to} are lost", self.from),
            None => write!(f, "all events from {} on are lost", self.from),
        }
    }
}

/// What can go wrong with a log.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// The operating system refused an operation.
    #[error("cannot {op} {}: {source}", path.display())]
    Io {
        /// What was tried.
        op: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A segment holds bytes that were not written by us.
    #[error("log segment {} is damaged at offset {offset} ({what}): {lost}", segment.display())]
    Corrupt {
        /// The segment.
        segment: PathBuf,
        /// Where the bad header, frame or end is.
        offset: u64,
        /// What is wrong there.
        what: &'static str,
        /// What cannot be read because of it.
        lost: Lost,
    },
    /// The records of a segment do not continue where the ones before them end.
    #[error("log segment {} has a gap at offset {offset}: {lost}", segment.display())]
    Gap {
        /// The segment that ends too early or jumps.
        segment: PathBuf,
        /// Where.
        offset: u64,
        /// What is missing.
        lost: Lost,
    },
    /// A segment has another format version.
    #[error("log segment {} has format version {found}, this ftrun reads version {known}", segment.display())]
    Version {
        /// The segment.
        segment: PathBuf,
        /// Its version.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// The log starts after the wanted record.
    #[error("event {wanted} is no longer in the log, which starts at event {first}")]
    NotStored {
        /// The record that was asked for.
        wanted: u64,
        /// The first one that is there.
        first: u64,
    },
    /// An append did not continue the log.
    #[error("event {got} cannot follow in the log, event {expected} is next")]
    OutOfOrder {
        /// The SII that must come next.
        expected: u64,
        /// The one that was given.
        got: u64,
    },
    /// A record exceeds [`RECORD_BYTES_MAX`].
    #[error("event {sii} has {bytes} bytes, the log takes at most {RECORD_BYTES_MAX}")]
    TooLarge {
        /// The record.
        sii: u64,
        /// Its size.
        bytes: usize,
    },
    /// An earlier sync failed, nothing more can be trusted to this writer.
    #[error("the log in {} is closed because an earlier sync to disk failed", dir.display())]
    Poisoned {
        /// Directory of the log.
        dir: PathBuf,
    },
}

impl LogError {
    /// True when the disk (or a quota) is full: nothing is lost, the same call can be made again
    /// once there is space.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Io { source, .. }
            if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
    }

    fn io(op: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::Io { op, path: path.into(), source }
    }
}
