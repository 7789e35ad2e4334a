//! The recorder: at durability `node` it brings the unit's events and checkpoints to stable storage, and says up to which
//! event they are there (Powell & Presotto's recorder; ARCHITECTURE.md, "Output commit").
//!
//! Two threads: one follows the log, and appends in one group what has come while the last group was on its way;
//! the other puts checkpoints. What the store has acknowledged is told through the control page, where outputs wait
//! for it.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ftrun_abi::fast::Control;
use ftrun_abi::record::{Record, flag};
use ftrun_ckpt::image::PageSource;
use ftrun_ckpt::runs::PageRun;
use ftrun_ckpt::state::Snapshot;
use ftrun_store::{Batch, Durability, Error as StoreError, Location, NewCheckpoint, OpenOptions, Page, StableStore};
use ftrun_store::{UnitName, UnitStore};
use serde::{Deserialize, Serialize};

use crate::capture::{Capture, read};
use crate::cli::StoreOptions;
use crate::commit::await_commit;
use crate::evlog::{EventLog, LogTail, Reader};
use crate::journal::SharedPages;
use crate::report::Error;
use crate::run::lock;
use crate::service::Service;
use crate::status::StoreInfo;
use crate::unitdir::UnitDir;

/// Events that nobody waits for are brought to the store after this time at the latest.
const LAG: Duration = Duration::from_millis(50);
/// Or when there are so many bytes of them.
const LAG_BYTES: u64 = 1 << 20;
/// Most bytes of one group.
const GROUP_BYTES: usize = 4 << 20;
/// How long the unit is ours after the store has last heard of us.
const LEASE: Duration = Duration::from_secs(10);
/// How often the store hears of a unit that does nothing.
const RENEW: Duration = Duration::from_secs(3);
/// Time between tries to reach a store that does not answer.
const AGAIN: Duration = Duration::from_millis(500);
/// How long a store may take to acknowledge a group before the user is told.
const PATIENCE: Duration = Duration::from_secs(10);
/// Page bytes that may wait to be stored before the unit waits, too.
const WAITING_MAX: u64 = 256 << 20;

/// Where the events and checkpoints of a unit go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The store's URL.
    pub url: String,
    /// The unit's name there.
    pub unit: String,
    /// When an event counts as stable.
    pub durability: Durability,
    /// Who writes: the keeper's process, which outlives supervisors.
    pub holder: Holder,
    /// What is run, for each checkpoint ([`crate::remains::Spec`]).
    pub spec: Vec<u8>,
}

/// A process that may have a unit's lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The machine, since it was started.
    machine: String,
    pid: i32,
}

impl Holder {
    fn this_machine() -> String {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        format!("{}/{}", read("/proc/sys/kernel/hostname"), read("/proc/sys/kernel/random/boot_id"))
    }

    /// The holder of this name is a process of this machine that is not there any more.
    fn is_dead(name: &str) -> bool {
        let Some((machine, pid)) = name.rsplit_once('/') else { return false };
        machine == Self::this_machine()
            // SAFETY: asks whether there is such a process.
            && pid.parse().is_ok_and(|pid: i32| unsafe { libc::kill(pid, 0) } != 0 && last_error() == libc::ESRCH)
    }
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.machine, self.pid)
    }
}

fn last_error() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// What is stored with the pages of a checkpoint.
#[derive(Debug, Serialize, Deserialize)]
pub struct Manifest {
    /// What is run.
    pub spec: Vec<u8>,
    /// The state.
    pub snapshot: Snapshot,
}

/// What the threads and the tracer share.
#[derive(Debug)]
struct Common {
    place: Place,
    name: UnitName,
    /// `None` after a failure that a new one may not have.
    link: Mutex<Option<Link>>,
    /// Events up to this one may be stored, whatever they are: a checkpoint stands for them.
    allowed: AtomicU64,
    /// The newest checkpoint there.
    newest: AtomicU64,
    /// The last event there that has been acknowledged.
    stable: AtomicU64,
    /// The number that the next event there has, if it is known.
    end: Mutex<Option<u64>>,
    /// Page bytes that wait.
    waiting: AtomicU64,
    /// Microseconds that the last groups took: a moving mean.
    commit_us: AtomicU32,
    /// Somebody else has the unit: it must not go on here.
    fenced: AtomicBool,
    /// What keeps events from being stored.
    error: Mutex<Option<String>>,
}

/// The unit, opened.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    store: Arc<dyn StableStore>,
    pub(crate) unit: Arc<dyn UnitStore>,
}

/// Handle of the tracer.
#[derive(Debug)]
pub struct Recorder {
    common: Arc<Common>,
    worker: Service,
    /// The checkpoint that was handed over last.
    last: Option<u64>,
}

/// Opens a store.
///
/// # Errors
/// The URL is none, or the store cannot be reached.
pub fn open_store(url: &str) -> Result<Box<dyn StableStore>, Error> {
    let location: Location = url.parse().map_err(|e| refused(url, &e))?;
    location.open().map_err(|e| refused(url, &e))
}

/// As the user sees it.
pub(crate) fn refused(url: &str, e: &StoreError) -> Error {
    Error::environment(format!("the store {url}: {e}"), "name another one with --store, or start its service")
}

impl Recorder {
    /// Opens the unit in its store. A `fresh` one must not be there. Call it on the service thread.
    ///
    /// # Errors
    /// The store cannot be reached, another holder has the unit, or it holds the state of a unit that was lost.
    pub fn open(place: &Place, fresh: bool) -> Result<Self, Error> {
        let refused = |e: StoreError| refused(&place.url, &e);
        let name = UnitName::new(place.unit.clone()).map_err(refused)?;
        if fresh && open_store(&place.url)?.units().map_err(refused)?.iter().any(|u| u.name == name) {
            return Err(Error::environment(
                format!("the store {} has the state of a unit {name} that was lost", place.url),
                "bring it back with `ftrun resume`, or remove it with `ftrun rm`",
            ));
        }
        let link = place.open(&name).map_err(refused)?;
        let newest = link.unit.checkpoints().map_err(refused)?.last().map(|c| c.sii);
        let common = Common {
            place: place.clone(),
            name,
            link: Mutex::new(Some(link)),
            allowed: AtomicU64::new(newest.unwrap_or(0)),
            newest: AtomicU64::new(newest.unwrap_or(0)),
            stable: AtomicU64::new(0),
            end: Mutex::new(None),
            waiting: AtomicU64::new(0),
            commit_us: AtomicU32::new(0),
            fenced: AtomicBool::new(false),
            error: Mutex::new(None),
        };
        // Either thread may have to open the unit again, for both.
        let worker = Service::beside().map_err(|e| Error::bug(format!("the recorder's thread: {e}")))?;
        Ok(Self { common: Arc::new(common), worker, last: newest })
    }

    /// The same; a store that does not answer is waited for if the unit `runs` already.
    ///
    /// # Errors
    /// As for [`Recorder::open`].
    pub fn open_until(place: &Place, fresh: bool, runs: bool) -> Result<Self, Error> {
        let mut told = false;
        loop {
            match Self::open(place, fresh) {
                Err(e) if runs => {
                    if !std::mem::replace(&mut told, true) {
                        tracing::warn!("{e}; the unit waits for it");
                    }
                    std::thread::sleep(AGAIN);
                }
                other => return other,
            }
        }
    }

    /// Begins to follow the log. `from` is the newest checkpoint that recovery can begin with, and all its pages: it is
    /// in the store when this returns. Call it on the service thread.
    ///
    /// # Errors
    /// No thread, or the store does not take the checkpoint.
    pub fn follow(&mut self, log: &EventLog, from: Option<(&Snapshot, &dyn PageSource)>) -> Result<(), Error> {
        if let Some((snapshot, pages)) = from.filter(|(snapshot, _)| self.last.is_none_or(|last| last < snapshot.sii)) {
            self.common.put(snapshot, None, pages, &[]).map_err(|e| refused(&self.common.place.url, &e))?;
            self.last = Some(snapshot.sii);
        }
        let tail = log.tail(Reader::Recorder);
        let common = Arc::clone(&self.common);
        let thread = std::thread::Builder::new().name("ftrun-recorder".into());
        thread.spawn(move || common.record(tail)).map_err(|e| Error::bug(format!("the recorder's thread: {e}")))?;
        Ok(())
    }

    /// Takes over a checkpoint. One that is `irregular`, or the first one, is in the store when this returns: the unit
    /// must not go on from it before.
    ///
    /// # Errors
    /// Somebody else has the unit.
    pub fn checkpoint(&mut self, capture: &Arc<Capture>, pages: &SharedPages, irregular: bool) -> Result<(), String> {
        let sii = capture.snapshot.sii;
        let parent = capture.parent.filter(|parent| self.last == Some(*parent));
        self.last = Some(sii);
        let common = Arc::clone(&self.common);
        if parent.is_none() {
            let pages = read(pages);
            return self.worker.run(|| common.put_until(&capture.snapshot, None, &*pages, &[]));
        }
        let bytes = capture.staged.bytes();
        if self.common.waiting.fetch_add(bytes, SeqCst) + bytes > WAITING_MAX {
            self.worker.run(|| ());
        }
        let capture = Arc::clone(capture);
        let put = move || {
            let Capture { snapshot, staged, gone, .. } = &*capture;
            let result = common.put_until(snapshot, parent, staged, gone);
            common.waiting.fetch_sub(bytes, SeqCst);
            result
        };
        if irregular {
            return self.worker.run(put);
        }
        self.worker.post(move || drop(put()));
        Ok(())
    }

    /// Why the unit must not go on here, if it must not.
    pub fn lost(&self) -> Option<String> {
        self.common
            .fenced
            .load(SeqCst)
            .then(|| format!("the unit has been taken over through {}", self.common.place.url))
    }

    /// The log is full: waits until everything that may be stored has been.
    ///
    /// # Errors
    /// Somebody else has the unit.
    pub fn make_room(&self, control: &Control) -> Result<(), String> {
        while !await_commit(control, AGAIN) {
            self.lost().map_or(Ok(()), Err)?;
        }
        Ok(())
    }

    /// What tells about it, for the status.
    pub fn watch(&self) -> Watch {
        Watch(Arc::clone(&self.common))
    }

    /// The program has ended: nothing of it is needed any more.
    pub fn forget(&self) {
        let common = &self.common;
        let gone = self.worker.run(|| {
            let Link { store, unit } = common.link()?;
            unit.release()?;
            store.remove(&common.name)
        });
        if let Err(e) = gone {
            tracing::warn!("the unit's state stays in {}: {e}", common.place.url);
        }
    }
}

/// Tells how a recorder is getting on.
#[derive(Debug)]
pub struct Watch(Arc<Common>);

impl Watch {
    /// For the status of a unit with so many events, of whose output so many bytes are queued.
    pub fn info(&self, events: u64, queued: u64) -> StoreInfo {
        let Common { place, newest, stable, commit_us, error, .. } = &*self.0;
        let committed = stable.load(SeqCst).max(newest.load(SeqCst));
        StoreInfo {
            url: place.url.clone(),
            committed,
            lag: events.saturating_sub(committed),
            queued,
            commit_us: commit_us.load(SeqCst),
            checkpoint: newest.load(SeqCst),
            error: lock(error).clone(),
        }
    }
}

impl Place {
    /// Where a unit goes whose keeper is process `keeper`.
    pub fn new(store: &StoreOptions, dir: &UnitDir, keeper: i32, spec: Vec<u8>) -> Self {
        Self {
            url: store.url.clone().unwrap_or_else(|| format!("file:{}", dir.store_dir().display())),
            unit: dir.name().to_owned(),
            durability: store.stable.into(),
            holder: Holder { machine: Holder::this_machine(), pid: keeper },
            spec,
        }
    }

    /// Opens the unit for writing.
    pub(crate) fn open(&self, name: &UnitName) -> Result<Link, StoreError> {
        let store: Arc<dyn StableStore> = self.url.parse::<Location>()?.open()?.into();
        let options = |holder| OpenOptions { holder, ttl: LEASE, durability: self.durability };
        let unit = match store.open(name, &options(self.holder.to_string())) {
            Err(StoreError::Held { holder, .. }) if Holder::is_dead(&holder) => {
                // Its lease need not be waited for.
                store.open(name, &options(holder))?.release()?;
                store.open(name, &options(self.holder.to_string()))?
            }
            other => other?,
        };
        Ok(Link { store, unit })
    }
}

impl Common {
    /// The unit in its store, opened again if that has to be.
    fn link(&self) -> Result<Link, StoreError> {
        let mut link = lock(&self.link);
        if let Some(link) = &*link {
            return Ok(link.clone());
        }
        Ok(link.insert(self.place.open(&self.name)?).clone())
    }

    /// Puts a checkpoint, and lets go of what it makes needless.
    fn put(
        &self,
        snapshot: &Snapshot,
        parent: Option<u64>,
        pages: &dyn PageSource,
        gone: &[PageRun],
    ) -> Result<(), StoreError> {
        let manifest =
            postcard::to_stdvec(&(&self.place.spec, snapshot)).map_err(|e| failed("encode", "a checkpoint", e))?;
        let gone: Vec<_> = gone.iter().map(|run| run.start..run.end()).collect();
        let pages = Source(pages);
        let new = NewCheckpoint { sii: snapshot.sii, parent, manifest: &manifest, gone: &gone, pages: &pages };
        let unit = self.link()?.unit;
        unit.put_checkpoint(&new)?;
        crate::fault::point_beside("record-put");
        self.newest.store(snapshot.sii, SeqCst);
        self.allowed.fetch_max(snapshot.sii, SeqCst);
        // Everything up to here can be recovered: that is the recovery state of a unit alone.
        let mut end = lock(&self.end);
        let inside = end.is_some_and(|end| snapshot.sii < end);
        if inside {
            // Events are stored meanwhile: the log's end stays where it is.
            drop(end);
            return unit.collect(snapshot.sii, 0).map(drop);
        }
        *end = None;
        unit.collect(snapshot.sii, 0).map(drop)
    }

    /// The same, tried until it is there.
    fn put_until(
        &self,
        snapshot: &Snapshot,
        parent: Option<u64>,
        pages: &dyn PageSource,
        gone: &[PageRun],
    ) -> Result<(), String> {
        loop {
            let result = self.put(snapshot, parent, pages, gone);
            if self.told(result.as_ref().err()) {
                return Err(format!("{} does not take checkpoints of this unit any more", self.place.url));
            }
            if result.is_ok() {
                return Ok(());
            }
            std::thread::sleep(AGAIN);
        }
    }

    /// Tells the user of a failure, and of its end; true when there is no use in trying again.
    fn told(&self, e: Option<&StoreError>) -> bool {
        if let Some(e) = e
            && !matches!(e, StoreError::Full { .. } | StoreError::Quota { .. } | StoreError::Timeout { .. })
        {
            // A connection that is lost, or an engine that takes nothing more, is no use any more.
            *lock(&self.link) = None;
        }
        let mut known = lock(&self.error);
        match e {
            Some(e) if known.is_none() => {
                tracing::warn!("{}: {e}; what the unit gives out waits", self.place.url);
                *known = Some(e.to_string());
            }
            Some(_) => {}
            None if known.take().is_some() => tracing::warn!("{}: events are stored again", self.place.url),
            None => {}
        }
        if e.is_some_and(StoreError::is_fenced) {
            self.fenced.store(true, SeqCst);
        }
        self.fenced.load(SeqCst)
    }

    /// Follows the log for ever.
    fn record(&self, mut tail: LogTail) {
        let (mut since, mut heard) = (None, Instant::now());
        loop {
            let control = tail.control();
            let word = control.want_word.load(SeqCst);
            control.idle.store(0, SeqCst);
            self.publish(control);
            let wanted = control.wanted.load(SeqCst) > control.committed.load(SeqCst);
            let there = self.next(&tail).is_some();
            let begun = there.then(|| *since.get_or_insert_with(Instant::now));
            let due = begun.is_some_and(|begun: Instant| begun.elapsed() >= LAG) || tail.bytes() >= LAG_BYTES;
            let result = if there && (wanted || due) {
                since = None;
                self.group(&mut tail)
            } else if heard.elapsed() >= RENEW {
                self.link().and_then(|link| link.unit.renew())
            } else {
                control.idle.store(1, SeqCst);
                // Who wants something now finds that we are idle, or is found here.
                if control.wanted.load(SeqCst) <= control.committed.load(SeqCst) || self.next(&tail).is_none() {
                    wait(&control.want_word, word, if there { LAG / 5 } else { LAG });
                }
                continue;
            };
            if self.told(result.as_ref().err()) {
                return;
            }
            heard = Instant::now();
            if result.is_err() {
                *lock(&self.end) = None;
                std::thread::sleep(AGAIN);
            }
        }
    }

    /// Says up to which event everything is stable: each is in the store, or a checkpoint behind it.
    fn publish(&self, control: &Control) {
        let stable = self.stable.load(SeqCst).max(self.newest.load(SeqCst));
        if control.committed.fetch_max(stable, SeqCst) < stable {
            control.commit_word.fetch_add(1, SeqCst);
            wake(&control.commit_word);
        }
    }

    /// The next event, if it may be stored: one that is nothing without the checkpoint that follows waits for that.
    fn next<'a>(&self, tail: &'a LogTail) -> Option<(u64, &'a [u8])> {
        let bytes = tail.peek()?;
        let header = Record::parse(bytes).ok()?.0.header;
        let free = header.flags & flag::UNLOGGABLE == 0 || header.sii <= self.allowed.load(SeqCst);
        free.then_some((header.sii, bytes))
    }

    /// Stores one group of events, and says so.
    fn group(&self, tail: &mut LogTail) -> Result<(), StoreError> {
        let begin = Instant::now();
        let mut ahead = tail.ahead();
        let unit = self.link()?.unit;
        let last = {
            // No checkpoint behind the log's end moves that meanwhile.
            let mut end = lock(&self.end);
            let mut next = match *end {
                Some(end) => end,
                None => unit.log()?.end,
            };
            let mut batch = None::<Batch>;
            let mut bytes = 0;
            while let Some((sii, record)) = self.next(&ahead).filter(|_| bytes < GROUP_BYTES) {
                // What is there already, or has a checkpoint behind it, is passed over.
                if sii >= next {
                    batch.get_or_insert_with(|| Batch::new(sii)).push(record);
                    bytes += record.len();
                    next = sii + 1;
                }
                ahead.take();
            }
            if let Some(batch) = batch {
                if end.is_none() && batch.first() > unit.log()?.end {
                    // An event that the checkpoint stands for is not in the log.
                    unit.truncate_below(batch.first())?;
                }
                crate::fault::point_beside("record-grouped");
                unit.commit(batch, PATIENCE)?;
            }
            *end = Some(next);
            next.saturating_sub(1)
        };
        crate::fault::point_beside("record-acknowledged");
        self.stable.fetch_max(last, SeqCst);
        self.publish(tail.control());
        tail.follow(&ahead);
        let us = begin.elapsed().as_micros() as u32;
        let mean = self.commit_us.load(SeqCst);
        self.commit_us.store(if mean == 0 { us } else { (mean * 7 + us) / 8 }, SeqCst);
        Ok(())
    }
}

/// Waits while a word that other processes change, too, is `seen`.
pub(crate) fn wait(word: &AtomicU32, seen: u32, limit: Duration) {
    let limit = libc::timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
    // SAFETY: a word and a time that outlive the call.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, seen, &raw const limit) };
}

/// Wakes all who wait for a word.
pub(crate) fn wake(word: &AtomicU32) {
    // SAFETY: a word of memory that is mapped.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}

/// Pages of ours as pages for the store.
struct Source<'a>(&'a dyn PageSource);

impl ftrun_store::Pages for Source<'_> {
    fn each(&self, put: &mut dyn FnMut(u64, &Page) -> Result<(), StoreError>) -> Result<(), StoreError> {
        let mut refused = None;
        let all = self.0.each_page(&mut |at, page| {
            put(at, page).map_err(|e| {
                let text = e.to_string();
                refused = Some(e);
                std::io::Error::other(text)
            })
        });
        match (refused, all) {
            (Some(e), _) => Err(e),
            (None, Err(e)) => Err(failed("read", "the pages of a checkpoint", e)),
            (None, Ok(())) => Ok(()),
        }
    }
}

fn failed(op: &str, what: &str, cause: impl ToString) -> StoreError {
    StoreError::Io { op: op.into(), what: what.into(), cause: cause.to_string() }
}
