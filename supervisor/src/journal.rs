//! What is kept of the event log and the checkpoints in the state directory.
//!
//! Recovery at level `process` uses memory alone, so nothing needs to be written while the unit runs. What
//! `ftrun log` and `ftrun verify` read is written when it is asked for: the checkpoint before, the events since, and
//! a new checkpoint; and at the unit's end, the newest checkpoint and the events since. With `--journal` all of it is
//! written as it comes.
//!
//! Everything is written by a thread of its own, in order: records before the checkpoint that follows
//! them. What waits for it is bounded; the unit waits when the disk is slower than that. A full disk stops
//! nothing and loses nothing, since recovery uses memory: the disk then misses something until a
//! checkpoint has been stored whole again.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use ftrun_abi::record::{Record, flag};
use ftrun_ckpt::image::{self, Chain, WriteOptions};
use ftrun_ckpt::pages::PageStore;
use ftrun_ckpt::state::Snapshot;
use ftrun_store::LogWriter;

use crate::capture::Capture;
use crate::evlog::{EventLog, LogTail, Reader};
use crate::service::Service;

/// Events that are collected before they are written, bytes.
const BATCH_BYTES: u64 = 256 << 10;

/// Checkpoints that stay on disk, with the events behind the oldest of them.
pub const KEPT: usize = 2;

/// Bytes that may wait to be written before the unit waits, too.
const WAITING_MAX: u64 = 256 << 20;

#[derive(Debug)]
struct Disk {
    log: LogWriter,
    dir: PathBuf,
    chain: Chain,
    /// The events that have not been written.
    tail: LogTail,
    /// Events up to this one may be written whatever they are. One behind it that a checkpoint must follow is
    /// written only just before that checkpoint, so that the two are on disk together.
    allowed: u64,
    warned: bool,
    stored: Arc<Mutex<Stored>>,
}

/// The unit's memory at the newest checkpoint. Only a checkpoint changes it.
pub type SharedPages = Arc<RwLock<PageStore>>;

/// [`Journal::newest`]: the newest checkpoint is not on disk.
const MISSING: u8 = 0;
/// It is being written, whole.
const UNDER_WAY: u8 = 1;
/// It is on disk: events and changes since may follow.
const STORED: u8 = 2;

/// Handle of the tracer.
#[derive(Debug)]
pub struct Journal {
    disk: Arc<Mutex<Disk>>,
    worker: Service,
    /// Everything is written as it comes.
    always: bool,
    /// Where the newest checkpoint is: [`MISSING`], [`UNDER_WAY`] or [`STORED`].
    newest: Arc<AtomicU8>,
    /// Storing the newest checkpoint whole has failed.
    refused: bool,
    /// Position in the log up to which writing has been asked for.
    asked: u64,
    waiting: Arc<AtomicU64>,
    /// Pieces of work that have not been done.
    jobs: Arc<AtomicU64>,
    /// The newest checkpoint on disk, and what keeps newer ones from it.
    stored: Arc<Mutex<Stored>>,
}

/// What is on disk.
#[derive(Debug, Default, Clone)]
pub struct Stored {
    /// The newest checkpoint.
    pub checkpoint: Option<u64>,
    /// Why what was to follow is not there.
    pub error: Option<String>,
}

impl Journal {
    /// Opens the log and the checkpoints of a unit. Call it on the service thread.
    pub fn open(
        log: &std::path::Path,
        checkpoints: PathBuf,
        events: &EventLog,
        always: bool,
    ) -> Result<Self, crate::report::Error> {
        let chain = Chain::open(&checkpoints).map_err(|e| {
            crate::report::Error::environment(e.to_string(), "remove the unit with `ftrun rm` if it is not needed")
        })?;
        let worker =
            Service::start(Vec::new()).map_err(|e| crate::report::Error::bug(format!("the journal's thread: {e}")))?;
        let stored = Arc::<Mutex<Stored>>::default();
        let disk = Disk {
            log: LogWriter::open(log)?,
            dir: checkpoints,
            chain,
            tail: events.tail(Reader::Journal),
            allowed: 0,
            warned: false,
            stored: Arc::clone(&stored),
        };
        Ok(Self {
            disk: Arc::new(Mutex::new(disk)),
            worker,
            always,
            newest: Arc::new(AtomicU8::new(MISSING)),
            refused: false,
            asked: events.end(),
            waiting: Arc::default(),
            jobs: Arc::default(),
            stored,
        })
    }

    /// Has events written when there are enough of them. Call it now and then.
    pub fn follow(&mut self, events: &EventLog) {
        if self.always && events.end() - self.asked >= BATCH_BYTES && self.is(STORED) {
            self.asked = events.end();
            self.write_events();
        }
    }

    fn is(&self, state: u8) -> bool {
        self.newest.load(Ordering::SeqCst) == state
    }

    /// Queues a piece of work that holds so many bytes and follows what is on disk.
    fn post(&self, bytes: u64, work: impl FnOnce(&mut Disk) -> Result<(), String> + Send + 'static) {
        if self.waiting.fetch_add(bytes, Ordering::Relaxed) + bytes > WAITING_MAX {
            self.sync();
        }
        let (disk, waiting, newest) = (Arc::clone(&self.disk), Arc::clone(&self.waiting), Arc::clone(&self.newest));
        self.jobs.fetch_add(1, Ordering::SeqCst);
        let jobs = Arc::clone(&self.jobs);
        self.worker.post(move || {
            // Behind a gap nothing is of use.
            if newest.load(Ordering::SeqCst) == STORED {
                let disk = &mut *crate::run::lock(&disk);
                let result = work(disk);
                if result.is_err() {
                    newest.store(MISSING, Ordering::SeqCst);
                }
                disk.tell(result);
            }
            waiting.fetch_sub(bytes, Ordering::Relaxed);
            jobs.fetch_sub(1, Ordering::SeqCst);
        });
    }

    fn write_events(&self) {
        self.post(0, |disk| disk.write_events(u64::MAX));
    }

    /// What is on disk, and the thread that writes it: what is run there is run behind what was handed over before.
    pub fn progress(&self) -> (Service, Arc<Mutex<Stored>>) {
        (self.worker.clone(), Arc::clone(&self.stored))
    }

    /// Waits until everything handed over has been written.
    pub fn sync(&self) {
        self.worker.run(|| ());
    }

    /// The log has no room: writes what is wanted of it, and gives back what is not.
    pub fn make_room(&mut self) {
        self.write_events();
        self.sync();
        if self.is(MISSING) {
            crate::run::lock(&self.disk).tail.skip_to_checkpoint();
        }
    }

    /// Stores the first checkpoint.
    ///
    /// # Errors
    /// It cannot be written, so the unit should not be started.
    pub fn begin(&mut self, snapshot: &Arc<Snapshot>, pages: &SharedPages) -> Result<(), String> {
        self.store_whole(snapshot, pages);
        self.sync();
        let error = crate::run::lock(&self.stored).error.clone();
        error.map_or(Ok(()), Err)
    }

    /// Has the newest checkpoint stored if it is not, for a checkpoint that is to be stored after it. True when
    /// that has come to an end.
    pub fn is_ready(&mut self, newest: Option<&Arc<Snapshot>>, pages: &SharedPages) -> bool {
        if self.is(UNDER_WAY) {
            return false;
        }
        if let Some(newest) = newest.filter(|_| self.is(MISSING) && !self.refused) {
            self.store_whole(newest, pages);
            // It is tried once.
            self.refused = true;
            return false;
        }
        true
    }

    /// Before a checkpoint: the memory of the one before it must not be read any more.
    pub fn before_checkpoint(&self) {
        if self.is(UNDER_WAY) {
            self.sync();
        }
    }

    /// Takes over a checkpoint, while the unit is stopped: stored when it is `wanted` and what it follows is there,
    /// as what has changed since; whole when everything is kept.
    pub fn checkpoint(&mut self, events: &mut EventLog, capture: Arc<Capture>, pages: &SharedPages, wanted: bool) {
        self.refused = false;
        let (wanted, stored) = (wanted || self.always, self.is(STORED));
        self.rewind(events, wanted && stored);
        let sii = capture.snapshot.sii;
        if !wanted || !(stored || self.always) {
            self.newest.store(MISSING, Ordering::SeqCst);
        } else if !stored || capture.parent.is_none() {
            self.store_whole(&capture.snapshot, pages);
        } else {
            self.post(capture.staged.bytes(), move |disk| {
                disk.catch_up(sii)?;
                let (parent, pages) = (capture.parent, &capture.staged);
                let written =
                    image::write(&disk.dir, &capture.snapshot, parent, pages, &capture.gone, WriteOptions::default());
                disk.added(sii, written.map(drop))
            });
        }
    }

    /// The memory of the log begins anew when what is wanted of it is on disk.
    fn rewind(&mut self, events: &mut EventLog, wanted: bool) {
        let idle = || self.jobs.load(Ordering::SeqCst) == 0;
        if wanted && idle() {
            self.write_events();
            self.sync();
        }
        if idle() {
            let mut disk = crate::run::lock(&self.disk);
            if !wanted {
                disk.tail.skip_to_checkpoint();
            }
            events.rewind(&mut disk.tail);
            self.asked = events.end();
        }
    }

    /// At the unit's end: stores the newest checkpoint and the events since.
    pub fn finish(&mut self, newest: Option<&Arc<Snapshot>>, pages: &SharedPages) {
        self.sync();
        if let Some(newest) = newest.filter(|_| self.is(MISSING)) {
            self.store_whole(newest, pages);
        }
        self.write_events();
        self.sync();
    }

    /// Queues the newest checkpoint, whole. The unit runs on; its next checkpoint waits.
    fn store_whole(&self, snapshot: &Arc<Snapshot>, pages: &SharedPages) {
        let follows = self.newest.swap(UNDER_WAY, Ordering::SeqCst) == STORED;
        let (disk, snapshot, pages) = (Arc::clone(&self.disk), Arc::clone(snapshot), Arc::clone(pages));
        let (newest, jobs) = (Arc::clone(&self.newest), Arc::clone(&self.jobs));
        jobs.fetch_add(1, Ordering::SeqCst);
        self.worker.post(move || {
            let disk = &mut *crate::run::lock(&disk);
            let pages = pages.read().unwrap_or_else(PoisonError::into_inner);
            let result = disk.store_whole(&snapshot, &pages, follows);
            drop(pages);
            newest.store(if result.is_ok() { STORED } else { MISSING }, Ordering::SeqCst);
            // Without the first one the program is not started, and that is said instead.
            if snapshot.sii > 0 {
                disk.tell(result);
            } else if let Err(error) = result {
                crate::run::lock(&disk.stored).error = Some(error);
            }
            jobs.fetch_sub(1, Ordering::SeqCst);
        });
    }
}

impl Disk {
    /// Writes what may be written of the events up to one.
    fn write_events(&mut self, last: u64) -> Result<(), String> {
        let mut result = Ok(());
        while let Some(record) = self.tail.peek() {
            let h = Record::parse(record).map_err(|e| format!("an event in memory is damaged: {e}"))?.0.header;
            let sii = h.sii;
            if sii > last || (h.flags & flag::UNLOGGABLE != 0 && sii > self.allowed) {
                break;
            }
            result = self.log.append(sii, record).map_err(|e| e.to_string());
            if result.is_err() {
                break;
            }
            self.tail.take();
        }
        self.tail.give_back();
        result.and_then(|()| self.log.flush().map_err(|e| e.to_string()))
    }

    fn added(&mut self, sii: u64, written: Result<(), image::Error>) -> Result<(), String> {
        written.and_then(|()| self.chain.add(sii)).map_err(|e| e.to_string())?;
        if self.chain.base_needed() {
            self.chain.rebase(sii, WriteOptions::default()).map_err(|e| e.to_string())?;
        }
        self.chain.prune(KEPT).map_err(|e| e.to_string())?;
        let oldest = self.chain.entries().rev().nth(KEPT - 1).map(|e| e.sii);
        if let Some(oldest) = oldest
            && let Err(e) = self.log.truncate_below(oldest)
        {
            tracing::warn!(error = %e, "old log segments cannot be removed");
        }
        *crate::run::lock(&self.stored) = Stored { checkpoint: Some(sii), error: None };
        if std::mem::take(&mut self.warned) {
            tracing::warn!(sii, "the state directory takes what is written again; it is whole from this event on");
        }
        Ok(())
    }

    /// Before the checkpoint at event `sii`: every event up to it.
    fn catch_up(&mut self, sii: u64) -> Result<(), String> {
        self.allowed = sii;
        self.write_events(sii)
    }

    /// Stores a checkpoint whole. If it does not follow what is there, with all events between, it stands alone.
    fn store_whole(&mut self, snapshot: &Snapshot, pages: &PageStore, follows: bool) -> Result<(), String> {
        let sii = snapshot.sii;
        let follows = follows && {
            let result = self.catch_up(sii);
            let follows = result.is_ok();
            self.tell(result);
            follows
        };
        let written = image::write(&self.dir, snapshot, None, pages, &[], WriteOptions::default());
        written.map(drop).and_then(|()| self.chain.add(sii)).map_err(|e| e.to_string())?;
        if !follows {
            self.chain.keep_only(sii).map_err(|e| e.to_string())?;
            self.log.truncate_from(0).map_err(|e| e.to_string())?;
            self.tail.skip_to_checkpoint();
            self.allowed = sii;
        }
        self.added(sii, Ok(()))
    }

    /// Warns of the first failure; the others are one and the same until a checkpoint has been stored again.
    fn tell(&mut self, result: Result<(), String>) {
        let Err(error) = result else { return };
        crate::run::lock(&self.stored).error = Some(error.clone());
        if !std::mem::replace(&mut self.warned, true) {
            tracing::warn!(error, "the state directory does not take what is written; recovery from memory goes on");
        }
    }
}
