//! The part of the event log and the checkpoints that is kept in the state directory.
//!
//! Everything is written by a thread of its own, in order: records before the checkpoint that follows
//! them. What waits for it is bounded; the unit waits when the disk is slower than that. A full disk stops
//! nothing and loses nothing at level `process`, where recovery uses memory: the disk then misses
//! something until the next checkpoint, which is stored whole.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use ftrun_ckpt::image::{self, Chain, WriteOptions};
use ftrun_ckpt::pages::PageStore;
use ftrun_store::LogWriter;

use crate::capture::Capture;
use crate::service::Service;

/// Records collected before they are handed to the service thread, bytes.
const BATCH_BYTES: usize = 256 << 10;

/// Checkpoints that stay on disk, with the events behind the oldest of them.
pub const KEPT: usize = 2;

/// Bytes that may wait to be written before the unit waits, too.
const WAITING_MAX: u64 = 256 << 20;

#[derive(Debug)]
struct Disk {
    log: LogWriter,
    dir: PathBuf,
    chain: Chain,
    /// Records that the disk did not take.
    pending: VecDeque<(u64, Box<[u8]>)>,
    warned: bool,
}

/// Handle of the tracer.
#[derive(Debug)]
pub struct Journal {
    disk: Arc<Mutex<Disk>>,
    worker: Service,
    batch: Vec<(u64, Box<[u8]>)>,
    bytes: usize,
    waiting: Arc<AtomicU64>,
    /// Something could not be written, so that changes alone would hang in the air.
    gap: Arc<AtomicBool>,
}

impl Journal {
    /// Opens the log and the checkpoints of a unit. Call it on the service thread.
    pub fn open(log: &std::path::Path, checkpoints: PathBuf) -> Result<Self, crate::report::Error> {
        let chain = Chain::open(&checkpoints).map_err(|e| {
            crate::report::Error::environment(e.to_string(), "remove the unit with `ftrun rm` if it is not needed")
        })?;
        let worker =
            Service::start(Vec::new()).map_err(|e| crate::report::Error::bug(format!("the journal's thread: {e}")))?;
        let disk =
            Disk { log: LogWriter::open(log)?, dir: checkpoints, chain, pending: VecDeque::new(), warned: false };
        Ok(Self {
            disk: Arc::new(Mutex::new(disk)),
            worker,
            batch: Vec::new(),
            bytes: 0,
            waiting: Arc::default(),
            gap: Arc::default(),
        })
    }

    /// Adds a record.
    pub fn append(&mut self, sii: u64, record: &[u8]) {
        self.bytes += record.len();
        self.batch.push((sii, record.into()));
        if self.bytes >= BATCH_BYTES {
            self.hand_over();
        }
    }

    fn hand_over(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        let batch = std::mem::take(&mut self.batch);
        let bytes = std::mem::take(&mut self.bytes) as u64;
        self.post(bytes, move |disk| {
            disk.pending.extend(batch);
            disk.write_records()
        });
    }

    /// Queues a piece of work that holds so many bytes.
    fn post(&self, bytes: u64, work: impl FnOnce(&mut Disk) -> Result<(), String> + Send + 'static) {
        if self.waiting.fetch_add(bytes, Ordering::Relaxed) + bytes > WAITING_MAX {
            self.sync();
        }
        let (disk, waiting, gap) = (Arc::clone(&self.disk), Arc::clone(&self.waiting), Arc::clone(&self.gap));
        self.worker.post(move || {
            let disk = &mut *crate::run::lock(&disk);
            let result = work(disk);
            if result.is_err() {
                gap.store(true, Ordering::SeqCst);
            }
            disk.tell(result);
            waiting.fetch_sub(bytes, Ordering::Relaxed);
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
        self.hand_over();
        self.sync();
    }

    /// Adds a checkpoint: what changed, or all of `pages` when a new base is due.
    ///
    /// # Errors
    /// A base cannot be written. What is on disk stays as it is, and the next checkpoint tries again.
    pub fn checkpoint(&mut self, capture: Capture, pages: &PageStore) -> Result<(), String> {
        self.hand_over();
        let sii = capture.snapshot.sii;
        if capture.parent.is_some() && !self.gap.load(Ordering::SeqCst) {
            self.post(capture.staged.bytes(), move |disk| {
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
            let written = image::write(&disk.dir, &capture.snapshot, None, pages, &[], WriteOptions::default());
            // Memory does not hold these events any more either; the base stands for them.
            disk.pending.clear();
            let mut result = disk.added(sii, written.map(drop));
            if self.gap.load(Ordering::SeqCst) {
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
    fn write_records(&mut self) -> Result<(), String> {
        while let Some((sii, record)) = self.pending.front() {
            self.log.append(*sii, record).map_err(|e| e.to_string())?;
            self.pending.pop_front();
        }
        self.log.flush().map_err(|e| e.to_string())
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
