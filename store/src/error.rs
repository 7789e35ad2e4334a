//! What can go wrong with stable storage. Every message names the thing and what to do about it.

use std::path::PathBuf;

/// An error of a store.
///
/// It can be cloned, since a disk that has failed once fails everybody who waits for it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused an operation; nothing is lost by it.
    #[error("cannot {op} {what}: {cause}")]
    Io {
        /// What was tried.
        op: String,
        /// On which file, address or directory.
        what: String,
        /// Why it failed.
        cause: String,
    },
    /// The disk is full. What was queued stays queued.
    #[error("the disk of {store} is full; free space there, or let old state go with `ftstore gc`")]
    Full {
        /// The store.
        store: String,
    },
    /// A write or a sync failed, so nothing more is written until the store is opened again: the
    /// kernel may have dropped what it could not write, and would report success from now on.
    #[error("{store} takes nothing more because of a failure to {op}: {cause}; look after the disk, then restart")]
    Poisoned {
        /// The store.
        store: String,
        /// What failed.
        op: String,
        /// Why.
        cause: String,
    },
    /// Another process has the directory.
    #[error(
        "{store} is in use by another process; give each ftrun a directory of its own, or share one \
         through `ftstore serve`"
    )]
    InUse {
        /// The store.
        store: String,
    },
    /// Stored bytes are not what was written.
    #[error("{file} is damaged at byte {offset} ({what}); `ftstore fsck` tells what is lost")]
    Damaged {
        /// The file.
        file: String,
        /// Where.
        offset: u64,
        /// What is wrong there.
        what: String,
    },
    /// What a store knows of its units is damaged or contradicts itself. Nothing was changed.
    #[error(
        "{store} is not opened, since what it knows of its units is not to be relied on ({what}; {file}, byte {offset}); \
         put back a copy of the directory, or import into an empty one what `ftstore export` has written"
    )]
    Contradiction {
        /// The store.
        store: String,
        /// The file.
        file: String,
        /// Where.
        offset: u64,
        /// What is wrong there.
        what: String,
    },
    /// Events that were stored cannot be read back.
    #[error(
        "events {from} to {to} of unit {unit} are lost by damage to the store; a checkpoint after them can be used"
    )]
    Lost {
        /// The unit.
        unit: String,
        /// First lost SII.
        from: u64,
        /// Last lost SII; `u64::MAX` when the end is unknown.
        to: u64,
    },
    /// Another program wrote the files.
    #[error("{what} has format {found}, this program knows {known}; use the version that wrote it")]
    Version {
        /// The file, or the other side of a connection.
        what: String,
        /// Its version.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// There is no such unit.
    #[error("the store has no unit {unit}; `ftstore ls` shows those it has")]
    NoUnit {
        /// Its name.
        unit: String,
    },
    /// The unit is being written by somebody else.
    #[error("unit {unit} is held by {holder} for another {remaining_ms} ms; stop it there, or wait")]
    Held {
        /// The unit.
        unit: String,
        /// Who has it.
        holder: String,
        /// Until the lease ends.
        remaining_ms: u64,
    },
    /// Somebody has taken the unit over; this writer must stop.
    #[error("unit {unit} was taken over (epoch {current}, this writer has {epoch}); end this instance")]
    Fenced {
        /// The unit.
        unit: String,
        /// The epoch of the refused writer.
        epoch: u64,
        /// The epoch in force.
        current: u64,
    },
    /// A handle that only reads was asked to write.
    #[error("unit {unit} was opened for reading only; open it with a lease")]
    ReadOnly {
        /// The unit.
        unit: String,
    },
    /// An append does not continue the log.
    #[error("event {got} cannot follow in the log of unit {unit}, event {expected} is next")]
    OutOfOrder {
        /// The unit.
        unit: String,
        /// The SII that must come next.
        expected: u64,
        /// The one that was given.
        got: u64,
    },
    /// The record is below what is kept.
    #[error("event {wanted} of unit {unit} is no longer stored; the log starts at event {first}")]
    NotStored {
        /// The unit.
        unit: String,
        /// What was asked for.
        wanted: u64,
        /// The first one that is there.
        first: u64,
    },
    /// There is no such checkpoint.
    #[error("unit {unit} has no checkpoint at event {sii}")]
    NoCheckpoint {
        /// The unit.
        unit: String,
        /// Its SII.
        sii: u64,
    },
    /// The unit has used up what it may store.
    #[error("unit {unit} stores {used} bytes and may store {limit}; raise its quota or take checkpoints more often")]
    Quota {
        /// The unit.
        unit: String,
        /// Bytes it has.
        used: u64,
        /// Bytes it may have.
        limit: u64,
    },
    /// An argument is out of range.
    #[error("{what}: {why}")]
    Invalid {
        /// Which one.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// What was waited for has not happened in time.
    #[error("event {sii} of unit {unit} has not been acknowledged in time; look at the load of the store")]
    Timeout {
        /// The unit.
        unit: String,
        /// What was waited for.
        sii: u64,
    },
    /// The store has been closed.
    #[error("{store} is closed")]
    Closed {
        /// The store.
        store: String,
    },
    /// The other side does not accept who we are.
    #[error("{server} does not let us in: {why}")]
    Refused {
        /// The address.
        server: String,
        /// Why.
        why: String,
    },
    /// The store cannot be reached, or broke the protocol.
    #[error("the connection to {server} is lost: {why}; see that the store runs there, or look at the network")]
    Disconnected {
        /// The address.
        server: String,
        /// Why.
        why: String,
    },
}

impl Error {
    /// An operation on a file that the system refused; a full disk is [`Error::Full`].
    pub(crate) fn io(op: &str, what: impl Into<PathBuf>, error: &std::io::Error) -> Self {
        Self::Io { op: op.to_owned(), what: what.into().display().to_string(), cause: error.to_string() }
    }

    pub(crate) fn invalid(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Invalid { what: what.into(), why: why.into() }
    }

    /// True when the same call may succeed once there is more space.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Full { .. })
    }

    /// True when this writer must not go on: the unit belongs to somebody else.
    pub fn is_fenced(&self) -> bool {
        matches!(self, Self::Fenced { .. })
    }
}
