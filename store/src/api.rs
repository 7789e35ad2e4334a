//! The interface of stable storage; `engine`, `client` and `nats` implement it.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{Batch, Error};

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;

/// The contents of a page.
pub type Page = [u8; PAGE_BYTES];

/// Name of a unit: 1 to 200 characters of `A-Z a-z 0-9 . _ - /`, no empty part between slashes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct UnitName(String);

impl UnitName {
    /// Checks a name.
    ///
    /// # Errors
    /// It is empty, too long, or has other characters.
    pub fn new(name: impl Into<String>) -> Result<Self, Error> {
        let name = name.into();
        let allowed = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
        if name.len() > 200 || !name.chars().all(allowed) || name.split('/').any(str::is_empty) {
            let why = "a name has 1 to 200 characters of A-Z, a-z, 0-9, `.`, `_`, `-`, and `/` between parts";
            return Err(Error::invalid(format!("unit name {name:?}"), why));
        }
        Ok(Self(name))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for UnitName {
    type Error = Error;

    fn try_from(name: String) -> Result<Self, Error> {
        Self::new(name)
    }
}

impl From<UnitName> for String {
    fn from(name: UnitName) -> Self {
        name.0
    }
}

impl fmt::Display for UnitName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What an acknowledged record survives. In a cluster each level is one of a majority of the replicas.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// The death of the writer, where the store is another process. It is in the store's memory.
    Memory,
    /// The death of every process. It is in the kernel's page cache.
    Cache,
    /// The loss of power. It is on the disk (`fdatasync`).
    Disk,
}

/// How a unit is opened for writing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenOptions {
    /// Who writes. The same holder may take its own unit back at once, another one when the lease has run out.
    pub holder: String,
    /// How long the unit is kept for this holder after it was last heard of.
    pub ttl: Duration,
    /// When an append is acknowledged and a checkpoint is published.
    pub durability: Durability,
}

impl OpenOptions {
    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.holder.is_empty() || self.holder.len() > 200 {
            return Err(Error::invalid("the holder of a lease", "a name of 1 to 200 bytes is needed"));
        }
        Ok(())
    }
}

/// What a store knows of a unit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnitInfo {
    /// Its name.
    pub name: UnitName,
    /// Its log.
    pub log: Range<u64>,
    /// Bytes of its events and of the page data that were first stored for it.
    pub bytes: u64,
    /// Its checkpoints, ascending.
    pub checkpoints: Vec<u64>,
    /// Times that it was opened for writing.
    pub epoch: u64,
    /// Who holds its lease.
    pub holder: Option<String>,
}

/// What a store knows of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointInfo {
    /// The state after this many events.
    pub sii: u64,
    /// Entries of its own table: pages that it changed. All pages, for one that stands alone.
    pub pages: u64,
    /// Bytes that were stored for it: those of its table, and of pages that no other checkpoint had.
    pub bytes: u64,
}

/// Takes pages by address; `None` is a page of zeros.
pub type EachPage<'a> = dyn FnMut(u64, Option<&Page>) -> Result<(), Error> + 'a;

/// Takes records by SII.
pub type EachRecord<'a> = dyn FnMut(u64, &[u8]) -> Result<(), Error> + 'a;

/// Where the pages of a new checkpoint come from.
pub trait Pages {
    /// Calls `put` with each page once, in any order.
    ///
    /// # Errors
    /// Those of `put`.
    fn each(&self, put: &mut dyn FnMut(u64, &Page) -> Result<(), Error>) -> Result<(), Error>;
}

impl Pages for &[(u64, Page)] {
    fn each(&self, put: &mut dyn FnMut(u64, &Page) -> Result<(), Error>) -> Result<(), Error> {
        self.iter().try_for_each(|(address, page)| put(*address, page))
    }
}

/// A checkpoint to be stored.
#[derive(Clone, Copy)]
pub struct NewCheckpoint<'a> {
    /// The state after this many events. One that is stored at the same SII is replaced.
    pub sii: u64,
    /// The checkpoint that `pages` and `gone` change. Without it `pages` is everything.
    pub parent: Option<u64>,
    /// Registers, mappings and all else that is not a page; the store does not look into it.
    pub manifest: &'a [u8],
    /// Pages that are no longer there, as ranges of addresses. Applied before `pages`.
    pub gone: &'a [Range<u64>],
    /// New and changed pages.
    pub pages: &'a dyn Pages,
}

impl fmt::Debug for NewCheckpoint<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NewCheckpoint({}, parent {:?})", self.sii, self.parent)
    }
}

/// What [`UnitStore::collect`] removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Collected {
    /// SII of the effective checkpoint for the recovery state, if there is one.
    pub effective: Option<u64>,
    /// Checkpoints removed.
    pub checkpoints: u64,
    /// Records removed.
    pub records: u64,
}

/// Something that is wrong with what is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// The file, empty when it is no single one.
    pub file: String,
    /// Where in it.
    pub offset: u64,
    /// What is wrong.
    pub what: String,
    /// What is lost by it, empty when nothing is.
    pub lost: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.file.is_empty() {
            write!(f, "{}, byte {}: ", self.file, self.offset)?;
        }
        let lost = if self.lost.is_empty() { "nothing is lost" } else { &self.lost };
        write!(f, "{}: {lost}", self.what)
    }
}

/// What a check of everything stored has found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fsck {
    /// What is wrong.
    pub findings: Vec<Finding>,
    /// Bytes that were read.
    pub bytes: u64,
    /// Records whose batches are whole.
    pub records: u64,
    /// Pages that are whole.
    pub pages: u64,
    /// Checkpoints that can be restored.
    pub checkpoints: u64,
}

/// Space that has been given back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reclaimed {
    /// Segment files given back; messages, in a cluster.
    pub segments: u64,
    /// Bytes in them.
    pub bytes: u64,
    /// Bytes of them that were still needed and were written again elsewhere.
    pub moved: u64,
}

/// Stable storage (Johnson §2.1.4; the recorder of Powell & Presotto).
///
/// Every call may be made from any thread.
pub trait StableStore: Send + Sync + fmt::Debug {
    /// Opens a unit for writing; a new one is made. The opener gets an epoch of its own, and writers with earlier
    /// ones are refused from then on.
    ///
    /// # Errors
    /// [`Error::Held`] while another holder's lease lasts.
    fn open(&self, unit: &UnitName, options: &OpenOptions) -> Result<Arc<dyn UnitStore>, Error>;

    /// Opens a unit for reading; whoever writes it is not disturbed.
    ///
    /// # Errors
    /// [`Error::NoUnit`].
    fn view(&self, unit: &UnitName) -> Result<Arc<dyn UnitStore>, Error>;

    /// The units, by name.
    ///
    /// # Errors
    /// The store cannot be reached.
    fn units(&self) -> Result<Vec<UnitInfo>, Error>;

    /// Removes a unit and all it has stored.
    ///
    /// # Errors
    /// [`Error::NoUnit`]; [`Error::Held`] while anybody's lease lasts.
    fn remove(&self, unit: &UnitName) -> Result<(), Error>;

    /// Reads and checks everything that is stored.
    ///
    /// # Errors
    /// A file cannot be read at all; damage is no error here but a finding.
    fn fsck(&self) -> Result<Fsck, Error>;

    /// Gives space back now. The store does so by itself when there is much.
    ///
    /// # Errors
    /// What is still needed cannot be moved.
    fn gc(&self) -> Result<Reclaimed, Error>;
}

/// What is stored of one unit: a log and checkpoints.
pub trait UnitStore: Send + Sync + fmt::Debug {
    /// The epoch of this writer; 0 for one that only reads.
    fn epoch(&self) -> u64;

    /// The SIIs of the records that are stored or queued. Recovery begins here.
    ///
    /// # Errors
    /// The store cannot be reached.
    fn log(&self) -> Result<Range<u64>, Error>;

    /// Queues records behind all those queued before. An empty log may begin anywhere at or after its end, one
    /// that is not empty goes on where it ends. Waits while much is queued.
    ///
    /// # Errors
    /// The records are not queued then; after [`Error::Full`] and [`Error::Quota`] the call can be made again. A store that
    /// is elsewhere may refuse records only after this has returned: then the next call that can fail says so, once,
    /// and appending goes on at the end of [`UnitStore::log`].
    fn append(&self, batch: Batch) -> Result<(), Error>;

    /// Appends records and waits until the last of them is acknowledged, which costs less than doing the one after the
    /// other. A store in this process may write them on the caller's thread, and is then not held to the timeout.
    ///
    /// # Errors
    /// Those of [`UnitStore::append`] and [`UnitStore::wait`]; after those of the latter the records are queued.
    fn commit(&self, batch: Batch, timeout: Duration) -> Result<(), Error> {
        let Some(last) = batch.next().checked_sub(1).filter(|_| !batch.is_empty()) else { return Ok(()) };
        self.append(batch)?;
        self.wait(last, timeout)
    }

    /// The SII below which every record has been acknowledged at the durability of this handle.
    ///
    /// # Errors
    /// What is queued will not be acknowledged, or not before something else happens ([`Error::Full`]).
    fn acknowledged(&self) -> Result<u64, Error>;

    /// Waits until the record of `sii` is acknowledged.
    ///
    /// # Errors
    /// [`Error::Timeout`], and those of [`UnitStore::acknowledged`].
    fn wait(&self, sii: u64, timeout: Duration) -> Result<(), Error>;

    /// Has `call` called, from any thread, whenever [`UnitStore::acknowledged`] may have something new to
    /// say. It replaces what was set before, and must not wait; writing to an eventfd is what it is meant for.
    fn notify(&self, call: Box<dyn Fn() + Send + Sync>);

    /// Reads batches, from the one that holds the record of `from` on, until they have `bytes_max` bytes (but at
    /// least one). Nothing when `from` is the end of the log. Waits for what is queued.
    ///
    /// # Errors
    /// [`Error::NotStored`] below and beyond the log, [`Error::Lost`] where it is damaged.
    fn read(&self, from: u64, bytes_max: usize) -> Result<Vec<Batch>, Error>;

    /// Drops the records below `sii`. A log that ends before continues there.
    ///
    /// # Errors
    /// It cannot be written down.
    fn truncate_below(&self, sii: u64) -> Result<(), Error>;

    /// Drops the records from `sii` on: what a recovery does not come to.
    ///
    /// # Errors
    /// It cannot be written down.
    fn truncate_from(&self, sii: u64) -> Result<(), Error>;

    /// Drops what no recovery can need once the unit's entry of the current recovery state is `recovery`: all
    /// checkpoints before the effective one for that interval, and all events up to it (Johnson §2.1.9, lemmas 2.4
    /// and 2.5). `spare` checkpoints before the effective one are kept all the same, with the events behind them.
    ///
    /// # Errors
    /// It cannot be written down.
    fn collect(&self, recovery: u64, spare: usize) -> Result<Collected, Error>;

    /// Stores a checkpoint. It can be seen whole when this returns, or never.
    ///
    /// # Errors
    /// Nothing is changed then.
    fn put_checkpoint(&self, new: &NewCheckpoint<'_>) -> Result<(), Error>;

    /// The checkpoints, ascending.
    ///
    /// # Errors
    /// The store cannot be reached.
    fn checkpoints(&self) -> Result<Vec<CheckpointInfo>, Error>;

    /// The manifest of a checkpoint.
    ///
    /// # Errors
    /// [`Error::NoCheckpoint`], [`Error::Damaged`].
    fn manifest(&self, sii: u64) -> Result<Vec<u8>, Error>;

    /// Calls `each` with the pages of a checkpoint whose addresses are in `range`, ascending; `None` is a page of
    /// zeros. What the checkpoint has of its parents is there as well.
    ///
    /// # Errors
    /// [`Error::NoCheckpoint`], [`Error::Damaged`], those of `each`.
    fn pages(&self, sii: u64, range: Range<u64>, each: &mut EachPage<'_>) -> Result<(), Error>;

    /// Says that the holder lives. Appending says so, too.
    ///
    /// # Errors
    /// [`Error::Fenced`].
    fn renew(&self) -> Result<(), Error>;

    /// Gives the lease back, so that anybody may open the unit at once. Waits for what is queued.
    ///
    /// # Errors
    /// What was queued cannot be stored.
    fn release(&self) -> Result<(), Error>;
}

/// Calls `each` with every record from `from` on.
///
/// # Errors
/// Those of [`UnitStore::read`] and of `each`.
pub fn each_record(unit: &dyn UnitStore, mut from: u64, each: &mut EachRecord<'_>) -> Result<(), Error> {
    loop {
        let batches = unit.read(from, 4 << 20)?;
        let Some(last) = batches.last() else { return Ok(()) };
        let next = last.next();
        for batch in &batches {
            for (sii, record) in batch.records().filter(|(sii, _)| *sii >= from) {
                each(sii, record)?;
            }
        }
        from = next;
    }
}
