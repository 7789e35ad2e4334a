//! The part of the event log and the checkpoints that is kept in the state directory.
//!
//! Everything is written by the service thread, in order: records before the checkpoint that follows
//! them. A full disk stops nothing and loses nothing at level `process`, where recovery uses memory;
//! what could not be written is written when there is room again, up to a bound.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use ftrun_ckpt::image::{self, Chain, WriteOptions};
use ftrun_ckpt::pages::PageStore;
use ftrun_store::LogWriter;

use crate::capture::Capture;
use crate::service::Service;

/// Records collected before they are handed to the service thread, bytes.
const BATCH_BYTES: usize = 256 << 10;

#[derive(Debug)]
struct Disk {
    log: LogWriter,
    dir: PathBuf,
    chain: Chain,
    warned: bool,
}

/// Handle of the tracer.
#[derive(Debug)]
pub struct Journal {
    disk: Arc<Mutex<Disk>>,
    batch: Vec<(u64, Box<[u8]>)>,
    bytes: usize,
}

impl Journal {
    /// Opens the log and the checkpoints of a unit. Call it on the service thread.
    pub fn open(log: &std::path::Path, checkpoints: PathBuf) -> Result<Self, crate::report::Error> {
        let chain = Chain::open(&checkpoints).map_err(|e| {
            crate::report::Error::environment(e.to_string(), "remove the unit with `ftrun rm` if it is not needed")
        })?;
        let disk = Disk { log: LogWriter::open(log)?, dir: checkpoints, chain, warned: false };
        Ok(Self { disk: Arc::new(Mutex::new(disk)), batch: Vec::new(), bytes: 0 })
    }

    /// Adds a record.
    pub fn append(&mut self, service: &Service, sii: u64, record: &[u8]) {
        self.bytes += record.len();
        self.batch.push((sii, record.into()));
        if self.bytes >= BATCH_BYTES {
            self.flush(service);
        }
    }

    /// Hands collected records over.
    pub fn flush(&mut self, service: &Service) {
        if self.batch.is_empty() {
            return;
        }
        let batch = std::mem::take(&mut self.batch);
        self.bytes = 0;
        let disk = Arc::clone(&self.disk);
        service.post(move || {
            let disk = &mut *crate::run::lock(&disk);
            let mut result = Ok(());
            for (sii, record) in &batch {
                result = result.and_then(|()| disk.log.append(*sii, record));
            }
            let result = result.and_then(|()| disk.log.flush());
            disk.tell(result.map_err(|e| e.to_string()));
        });
    }

    /// Adds a checkpoint: what changed, or all of `pages` when a new base is due.
    pub fn checkpoint(&mut self, service: &Service, capture: Capture, pages: &PageStore) {
        self.flush(service);
        let disk = Arc::clone(&self.disk);
        let sii = capture.snapshot.sii;
        let full = capture.parent.is_none() || crate::run::lock(&disk).base_due(capture.parent);
        if full {
            // The store changes with the next checkpoint, so a base is written before going on.
            service.run(|| {
                let disk = &mut *crate::run::lock(&disk);
                let r = image::write(&disk.dir, &capture.snapshot, None, pages, &[], WriteOptions::default());
                disk.added(sii, r.map(|_| ()));
            });
            return;
        }
        service.post(move || {
            let disk = &mut *crate::run::lock(&disk);
            let r = image::write(
                &disk.dir,
                &capture.snapshot,
                capture.parent,
                &capture.staged,
                &capture.gone,
                WriteOptions::default(),
            );
            disk.added(sii, r.map(|_| ()));
        });
    }
}

impl Disk {
    /// The checkpoint before is not on disk, so that changes alone would hang in the air.
    fn base_due(&self, parent: Option<u64>) -> bool {
        self.chain.newest() != parent
    }

    fn added(&mut self, sii: u64, written: Result<(), image::Error>) {
        let result = written.and_then(|()| self.chain.add(sii)).and_then(|()| {
            if self.chain.base_needed() {
                self.chain.rebase(sii, WriteOptions::default())?;
            }
            self.chain.prune(2).map(|_| ())
        });
        if let Some(oldest) =
            self.chain.entries().next_back().and_then(|_| self.chain.entries().rev().nth(1)).map(|e| e.sii)
            && let Err(e) = self.log.truncate_below(oldest)
        {
            tracing::warn!(error = %e, "old log segments cannot be removed");
        }
        self.tell(result.map_err(|e| e.to_string()));
    }

    fn tell(&mut self, result: Result<(), String>) {
        match result {
            Ok(()) => self.warned = false,
            Err(error) if !self.warned => {
                self.warned = true;
                tracing::warn!(
                    error,
                    "the state directory does not take what is written; recovery from memory goes on"
                );
            }
            Err(_) => {}
        }
    }
}
