//! The part of the event log and the checkpoints that is kept in the state directory.
//!
//! Everything is written by a thread of its own, in order: records before the checkpoint that follows
//! them. What waits for it is bounded; the unit waits when the disk is slower than that. A full disk stops
//! nothing and loses nothing at level `process`, where recovery uses memory: the disk then misses
//! something until the next checkpoint, which is stored whole.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use ftrun_abi::record::{Record, flag};
use ftrun_ckpt::image::{self, Chain, WriteOptions};
use ftrun_ckpt::pages::PageStore;
use ftrun_store::LogWriter;

use crate::capture::Capture;
use crate::evlog::{EventLog, LogTail};
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
}

/// Handle of the tracer.
#[derive(Debug)]
pub struct Journal {
    disk: Arc<Mutex<Disk>>,
    worker: Service,
    /// Position in the log up to which writing has been asked for.
    asked: u64,
    waiting: Arc<AtomicU64>,
    /// Pieces of work that have not been done.
    jobs: Arc<AtomicU64>,
    /// Something could not be written, so that changes alone would hang in the air.
    gap: Arc<AtomicBool>,
}

impl Journal {
    /// Opens the log and the checkpoints of a unit. Call it on the service thread.
    pub fn open(log: &std::path::Path, checkpoints: PathBuf, events: &EventLog) -> Result<Self, crate::report::Error> {
        let chain = Chain::open(&checkpoints).map_err(|e| {
            crate::report::Error::environment(e.to_string(), "remove the unit with `ftrun rm` if it is not needed")
        })?;
        let worker =
            Service::start(Vec::new()).map_err(|e| crate::report::Error::bug(format!("the journal's thread: {e}")))?;
        let disk = Disk {
            log: LogWriter::open(log)?,
            dir: checkpoints,
            chain,
            tail: events.tail(),
            allowed: 0,
            warned: false,
        };
        Ok(Self {
            disk: Arc::new(Mutex::new(disk)),
            worker,
            asked: events.end(),
            waiting: Arc::default(),
            jobs: Arc::default(),
            gap: Arc::default(),
        })
    }

    /// Has events written when there are enough of them. Call it now and then.
    pub fn follow(&mut self, events: &EventLog) {
        if events.end() - self.asked >= BATCH_BYTES {
            self.asked = events.end();
            self.write_events();
        }
    }

    /// After a checkpoint, while the unit is stopped: when the disk has kept up, the last few events are written
    /// and the memory of the log begins anew.
    pub fn rewind(&mut self, events: &mut EventLog) {
        if self.jobs.load(Ordering::SeqCst) == 0 && !self.gap.load(Ordering::SeqCst) {
            self.write_events();
            self.sync();
            events.rewind(&mut crate::run::lock(&self.disk).tail);
            self.asked = events.end();
        }
    }

    fn write_events(&mut self) {
        self.post(0, |disk| disk.write_events(u64::MAX));
    }

    /// Queues a piece of work that holds so many bytes.
    fn post(&self, bytes: u64, work: impl FnOnce(&mut Disk) -> Result<(), String> + Send + 'static) {
        if self.waiting.fetch_add(bytes, Ordering::Relaxed) + bytes > WAITING_MAX {
            self.sync();
        }
        let (disk, waiting, gap) = (Arc::clone(&self.disk), Arc::clone(&self.waiting), Arc::clone(&self.gap));
        self.jobs.fetch_add(1, Ordering::SeqCst);
        let jobs = Arc::clone(&self.jobs);
        self.worker.post(move || {
            let disk = &mut *crate::run::lock(&disk);
            let result = work(disk);
            if result.is_err() {
                gap.store(true, Ordering::SeqCst);
            }
            disk.tell(result);
            waiting.fetch_sub(bytes, Ordering::Relaxed);
            jobs.fetch_sub(1, Ordering::SeqCst);
        });
    }

    /// The thread that writes: what is run there is run behind what was handed over before.
    pub fn writer(&self) -> Service {
        self.worker.clone()
    }

    /// Waits until everything handed over has been written.
    pub fn sync(&self) {
        self.worker.run(|| ());
    }

    /// Writes all that was appended.
    pub fn flush(&mut self) {
        self.write_events();
        self.sync();
    }

    /// Adds a checkpoint: what changed, or all of `pages` when a new base is due. The log must know of it.
    ///
    /// # Errors
    /// A base cannot be written. What is on disk stays as it is, and the next checkpoint tries again.
    pub fn checkpoint(&mut self, capture: Capture, pages: &PageStore) -> Result<(), String> {
        self.write_events();
        let sii = capture.snapshot.sii;
        if capture.parent.is_some() && !self.gap.load(Ordering::SeqCst) {
            self.post(capture.staged.bytes(), move |disk| {
                disk.allowed = sii;
                disk.write_events(sii)?;
                let (parent, pages) = (capture.parent, &capture.staged);
                let written =
                    image::write(&disk.dir, &capture.snapshot, parent, pages, &capture.gone, WriteOptions::default());
                disk.added(sii, written.map(drop))
            });
            return Ok(());
        }
        // The store changes with the next checkpoint, so a base is written before going on.
        let disk = Arc::clone(&self.disk);
        let result = self.worker.run(|| {
            let disk = &mut *crate::run::lock(&disk);
            disk.allowed = sii;
            if !self.gap.load(Ordering::SeqCst)
                && let Err(e) = disk.write_events(sii)
            {
                disk.tell(Err(e));
                self.gap.store(true, Ordering::SeqCst);
            }
            let written = image::write(&disk.dir, &capture.snapshot, None, pages, &[], WriteOptions::default());
            let whole = self.gap.load(Ordering::SeqCst);
            if whole {
                // The base stands for them.
                disk.tail.skip_to_checkpoint();
            }
            let mut result = disk.added(sii, written.map(drop));
            if whole {
                result = result.and_then(|()| disk.begin_anew(sii));
            }
            if sii > 0 {
                // Without the first one the program is not started, and that is said instead.
                disk.tell(result.clone());
            }
            if result.is_ok() && std::mem::take(&mut disk.warned) {
                tracing::warn!(sii, "the state directory takes what is written again; it is whole from this event on");
            }
            result
        });
        self.gap.store(result.is_err(), Ordering::SeqCst);
        result
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
        Ok(())
    }

    /// After a gap: only the base `sii` and what follows it can be used.
    fn begin_anew(&mut self, sii: u64) -> Result<(), String> {
        self.chain.keep_only(sii).map_err(|e| e.to_string())?;
        self.log.truncate_from(0).map_err(|e| e.to_string())
    }

    /// Warns of the first failure; the others are one and the same until a base has been stored again.
    fn tell(&mut self, result: Result<(), String>) {
        if let Err(error) = result
            && !std::mem::replace(&mut self.warned, true)
        {
            tracing::warn!(error, "the state directory does not take what is written; recovery from memory goes on");
        }
    }
}
