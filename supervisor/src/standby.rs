//! The standby: what a new supervisor needs when this one is killed, in memory that outlives it.
//!
//! Checkpoints are written, as they are taken and while the unit runs, as images into a directory of a memory file
//! system. The log, in a file of the keeper's, keeps every event since the newest of them that is complete. So at
//! every instant a checkpoint and all events behind it outlive the supervisor.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use ftrun_ckpt::image::{self, Chain, PageSource, WriteOptions};
use ftrun_ckpt::pages::PageStore;
use ftrun_ckpt::runs::PageRun;
use ftrun_ckpt::state::Snapshot;

use crate::capture::{Capture, read};
use crate::evlog::{EventLog, LogTail, Reader};
use crate::journal::SharedPages;
use crate::report::Error;
use crate::run::lock;
use crate::service::Service;

/// Memory is fast: little effort for compression.
pub(crate) const OPTIONS: WriteOptions = WriteOptions { fsync: false, level: -5 };

/// Page bytes that may wait to be written before the unit waits, too.
const WAITING_MAX: u64 = 256 << 20;

/// A checkpoint and its pages.
pub type State = (Snapshot, PageStore);

#[derive(Debug)]
struct Memory {
    dir: PathBuf,
    chain: Chain,
    tail: Option<LogTail>,
}

/// The standby of a unit.
#[derive(Debug)]
pub struct Standby {
    memory: Arc<Mutex<Memory>>,
    worker: Service,
    /// The newest checkpoint is there, or will be: the next one may build on it.
    follows: Arc<AtomicBool>,
    waiting: Arc<AtomicU64>,
    /// The user knows that it does not take checkpoints.
    warned: Arc<AtomicBool>,
}

impl Standby {
    /// Opens the directory, and finds what a supervisor left there that was killed: its newest complete checkpoint, if
    /// there is one. Call it on the service thread.
    ///
    /// # Errors
    /// The directory cannot be read, or what is there is damaged.
    pub fn open(dir: &Path) -> Result<(Self, Option<State>), Error> {
        let worker = Service::start(Vec::new()).map_err(|e| Error::bug(format!("the standby's thread: {e}")))?;
        let memory = Memory { dir: dir.to_owned(), chain: Chain::open(dir).map_err(wrong)?, tail: None };
        let memory = Arc::new(Mutex::new(memory));
        let standby = Self { memory, worker, follows: Arc::default(), waiting: Arc::default(), warned: Arc::default() };
        let newest = {
            let memory = lock(&standby.memory);
            memory.chain.remove_temporary().map_err(wrong)?;
            memory.chain.newest().map(|sii| memory.chain.load(sii)).transpose().map_err(wrong)?
        };
        standby.follows.store(newest.is_some(), SeqCst);
        Ok((standby, newest))
    }

    /// From now on the log keeps what the newest complete checkpoint here needs.
    pub fn follow(self, log: &EventLog) -> Self {
        lock(&self.memory).tail = Some(log.tail(Reader::Standby));
        self
    }

    /// Takes over a checkpoint. `irregular` says that the events before it do not lead there by replay: then it is
    /// complete when this returns, since the unit must not go on from it before.
    ///
    /// # Errors
    /// It could not be written. The user has been told, and the unit may go on without.
    pub fn checkpoint(
        &self,
        log: &EventLog,
        capture: &Arc<Capture>,
        pages: &SharedPages,
        irregular: bool,
    ) -> Result<(), String> {
        let position = log.begin();
        if capture.parent.is_none() || !self.follows.load(SeqCst) {
            let pages = read(pages);
            let written = self.worker.run(|| lock(&self.memory).store(&capture.snapshot, None, &*pages, &[], position));
            self.follows.store(written.is_ok(), SeqCst);
            return tell(&self.warned, written);
        }
        let bytes = capture.staged.bytes();
        if self.waiting.fetch_add(bytes, SeqCst) + bytes > WAITING_MAX {
            self.worker.run(|| ());
        }
        let (memory, follows, waiting) =
            (Arc::clone(&self.memory), Arc::clone(&self.follows), Arc::clone(&self.waiting));
        let (capture, warned) = (Arc::clone(capture), Arc::clone(&self.warned));
        let store = move || {
            // Behind a gap nothing is of use: the next checkpoint closes it, whole.
            let result = if follows.load(SeqCst) {
                let Capture { snapshot, parent, staged, gone } = &*capture;
                lock(&memory).store(snapshot, *parent, staged, gone, position)
            } else {
                Err("the one before it is missing".to_owned())
            };
            if result.is_err() {
                follows.store(false, SeqCst);
            }
            waiting.fetch_sub(bytes, SeqCst);
            tell(&warned, result)
        };
        if irregular {
            return self.worker.run(store);
        }
        self.worker.post(move || drop(store()));
        Ok(())
    }

    /// The log is full of events that only the standby needs: those that it has not got a checkpoint for are given
    /// up, so that the unit can go on. It survives its supervisor again from its next checkpoint here on.
    pub fn make_room(&self) {
        self.worker.run(|| {
            let mut memory = lock(&self.memory);
            if let Some(tail) = memory.tail.as_mut().filter(|_| !self.follows.load(SeqCst)) {
                tail.skip_to_checkpoint();
            }
        });
    }
}

const BEHIND: &str = "memory that outlives the supervisor does not take a checkpoint: its death may not be survived";

/// Warns of the first failure, and says when it is over.
fn tell(warned: &AtomicBool, result: Result<(), String>) -> Result<(), String> {
    match &result {
        Err(why) if !warned.swap(true, SeqCst) => {
            crate::pulse::degraded(true);
            tracing::warn!(why, "{BEHIND}");
        }
        Ok(()) if warned.swap(false, SeqCst) => {
            crate::pulse::degraded(false);
            tracing::warn!("checkpoints outlive the supervisor again");
        }
        _ => {}
    }
    result
}

impl Memory {
    /// Writes a checkpoint; the log gives back the events before it.
    fn store(
        &mut self,
        snapshot: &Snapshot,
        parent: Option<u64>,
        pages: &dyn PageSource,
        gone: &[PageRun],
        position: u64,
    ) -> Result<(), String> {
        let sii = snapshot.sii;
        let mut write = || -> Result<(), image::Error> {
            image::write(&self.dir, snapshot, parent, pages, gone, OPTIONS)?;
            crate::fault::point("standby-written", 0);
            self.chain.add(sii)?;
            if parent.is_none() {
                self.chain.keep_only(sii)?;
            } else if self.chain.base_needed() {
                self.chain.rebase(sii, OPTIONS)?;
            }
            self.chain.prune(1).map(drop)
        };
        write().map_err(|e| e.to_string())?;
        if let Some(tail) = &mut self.tail {
            tail.give_back_to(position);
        }
        Ok(())
    }
}

fn wrong(e: image::Error) -> Error {
    Error::bug(format!("the memory of a unit whose supervisor was killed: {e}"))
}
