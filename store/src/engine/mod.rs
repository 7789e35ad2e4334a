//! The embedded engine: stable storage in a directory of this machine.
//!
//! How files look and why a crash costs nothing is in ARCHITECTURE.md, "Stable storage". The parts:
//!
//! | module | what |
//! |---|---|
//! | `frame` | the bytes of a frame |
//! | `stream` | writing frames into segments, and finding them again |
//! | `spares` | files that are ready to become segments |
//! | `recover` | what is stored |
//! | `queue` | what is to be written to the log |
//! | `commit` | writing it: group commit |
//! | `live` | where batches are, and what of them is needed |
//! | `unit` | the handle of a unit |
//! | `pages` | pages and tables |
//! | `gc` | giving space back |
//! | `fsck` | checking everything |

mod commit;
mod frame;
mod fsck;
#[cfg(any(test, feature = "testing"))]
pub mod fuzz;
mod gc;
mod live;
mod pages;
mod queue;
mod recover;
mod spares;
mod stream;
mod unit;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::disk::{Disk, RealDisk, is_full};
use crate::{Durability, Error, Finding, Fsck, OpenOptions, Reclaimed, StableStore, UnitInfo, UnitName, UnitStore};
use commit::Committer;
use pages::Pack;
use queue::Queue;
use recover::{CLEAN, CLEAN_NEW, Ends, Loaded, load};
use spares::Spares;
use stream::{Bodies, Files, Stream, Which};
#[cfg(feature = "service")]
pub(crate) use unit::Handle;

/// How an engine works.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Size of the first segment, bytes; each next one is twice as large up to `segment_bytes_max`.
    pub segment_bytes_first: u64,
    /// Size of a segment, bytes. A larger batch gets a segment of its own.
    pub segment_bytes_max: u64,
    /// Bytes that may be queued before appending waits.
    pub queue_bytes_max: usize,
    /// Bytes that a unit may store; 0 is without limit.
    pub quota_bytes: u64,
    /// A log that has had nothing to write for so long is synced and marked.
    pub idle: Duration,
    /// Have segments made before they are needed, and space given back, by threads.
    pub background: bool,
    /// Leases of other processes are waited for. Without it (the default), a directory that was opened is free, since its
    /// lock says that nobody else lives; a service wants it, whose clients live on when it is started again.
    pub keep_leases: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            segment_bytes_first: 1 << 20,
            segment_bytes_max: 64 << 20,
            queue_bytes_max: 16 << 20,
            quota_bytes: 0,
            idle: Duration::from_millis(20),
            background: true,
            keep_leases: false,
        }
    }
}

/// Why something could not be done to a file.
#[derive(Debug)]
struct Failure {
    op: &'static str,
    file: String,
    cause: String,
    full: bool,
}

impl Failure {
    fn new(op: &'static str, file: &str, error: &io::Error) -> Self {
        Self { op, file: file.to_owned(), cause: error.to_string(), full: is_full(error) }
    }

    /// What the store is from now on.
    fn poison(&self, store: &str) -> Error {
        Error::Poisoned { store: store.to_owned(), op: format!("{} {}", self.op, self.file), cause: self.cause.clone() }
    }

    fn error(&self, store: &str) -> Error {
        if self.full {
            return Error::Full { store: store.to_owned() };
        }
        Error::Io { op: self.op.to_owned(), what: format!("{store}/{}", self.file), cause: self.cause.clone() }
    }
}

/// A mutex that a panic elsewhere does not take away: what it protects is changed in steps that cannot panic.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Stable storage in a directory.
#[derive(Debug)]
pub struct Engine {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// What the engine's threads and handles share.
#[derive(Debug)]
struct Shared {
    name: String,
    disk: Arc<dyn Disk>,
    options: Options,
    spares: Arc<Spares>,
    log_files: Files,
    queue: Queue,
    /// Locked by whoever commits.
    committer: Mutex<Committer>,
    pack: Pack,
    /// Held while segments are given back or checked.
    gc: Mutex<()>,
    gc_wanted: gc::Wanted,
    damage: Vec<Finding>,
}

impl Engine {
    /// Opens the store in a directory, which is made if it is missing.
    ///
    /// # Errors
    /// [`Error::InUse`], [`Error::Version`], [`Error::Contradiction`]; the directory cannot be read or written.
    pub fn open(path: &Path, options: Options) -> Result<Self, Error> {
        Self::on(Arc::new(RealDisk::open(path)?), options)
    }

    /// Opens the store on a disk.
    ///
    /// # Errors
    /// As for [`Engine::open`].
    pub fn on(disk: Arc<dyn Disk>, options: Options) -> Result<Self, Error> {
        let name = disk.name();
        let io = |e: io::Error| Error::io("open", &name, &e);
        let mut loaded = load(&*disk, None, Bodies::Keys)?;
        if let Some(Finding { file, offset, what, .. }) = loaded.refused {
            return Err(Error::Contradiction { store: name, file, offset, what });
        }
        let spares = Spares::new(Arc::clone(&disk), options.segment_bytes_first, options.segment_bytes_max);
        let spares = Arc::new(spares);
        // From here on the files change, so what a clean close has noted no longer holds.
        for stray in disk.list().map_err(io)? {
            if stray == CLEAN || stray == CLEAN_NEW || Spares::is_spare(&stray) || loaded.is_stray(&stray) {
                disk.remove(&stray).map_err(io)?;
            }
        }
        disk.sync().map_err(io)?;
        let (log, log_files) = begin(&spares, &mut loaded, Which::Log).map_err(|f| f.error(&name))?;
        let (pack, pack_files) = begin(&spares, &mut loaded, Which::Pack).map_err(|f| f.error(&name))?;
        let damage = std::mem::take(&mut loaded.findings);
        let state = loaded.state.clone();
        let queue = Queue::new(&mut loaded, &log, &options);
        let pack = Pack::new(pack, pack_files, &mut loaded);
        let shared = Shared {
            name: name.clone(),
            disk,
            options,
            spares,
            log_files,
            queue,
            committer: Mutex::new(Committer::new(log, state)),
            pack,
            gc: Mutex::default(),
            gc_wanted: gc::Wanted::default(),
            damage,
        };
        let shared = Arc::new(shared);
        shared.count_references()?;
        let engine = Self { shared: Arc::clone(&shared), threads: Mutex::default() };
        let committer = Arc::clone(&shared);
        engine.spawn("store-commit", move || committer.commit_in_background()).map_err(io)?;
        if shared.options.background {
            lock(&engine.threads).push(shared.spares.start().map_err(io)?);
            let collector = Arc::clone(&shared);
            engine.spawn("store-gc", move || collector.collect_in_background()).map_err(io)?;
        }
        Ok(engine)
    }

    fn spawn(&self, name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(work)?;
        lock(&self.threads).push(thread);
        Ok(())
    }

    /// Damage that was found when the store was opened.
    pub fn damage(&self) -> &[Finding] {
        &self.shared.damage
    }

    /// Checks a store that nobody has open, changing nothing.
    ///
    /// # Errors
    /// A file cannot be read at all.
    pub fn fsck_on(disk: &dyn Disk) -> Result<Fsck, Error> {
        fsck::check(disk, None)
    }

    /// Bytes of the segment files, and of them those that are live.
    pub fn space(&self) -> (u64, u64) {
        self.shared.space()
    }

    /// Whether the store takes writes.
    ///
    /// # Errors
    /// Why it does not.
    pub fn healthy(&self) -> Result<(), Error> {
        self.shared.queue.check()
    }

    /// Groups committed, and bytes written to the log, since the store was opened.
    pub fn commits(&self) -> (u64, u64) {
        self.shared.queue.commits()
    }

    /// Writes and syncs what is queued, and notes that the store was closed. Later calls fail.
    ///
    /// # Errors
    /// Something could not be written.
    pub fn close(&self) -> Result<(), Error> {
        self.stop(true)
    }

    fn stop(&self, clean: bool) -> Result<(), Error> {
        let threads = std::mem::take(&mut *lock(&self.threads));
        if threads.is_empty() {
            return Ok(());
        }
        let shared = &self.shared;
        let result = if clean { shared.queue.barrier(Durability::Disk) } else { Ok(()) };
        shared.gc_wanted.stop();
        shared.spares.stop();
        shared.queue.close();
        for thread in threads {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
        result?;
        if !clean {
            return Ok(());
        }
        shared.queue.not_failed()?;
        let io = |e: io::Error| Error::io("close", &shared.name, &e);
        let ends = Ends { log: shared.queue.end(), pack: shared.pack.close()? };
        let file = shared.disk.create(CLEAN_NEW).map_err(io)?;
        file.write_at(&ends.encode(), 0).and_then(|()| file.sync()).map_err(io)?;
        shared.disk.rename(CLEAN_NEW, CLEAN).and_then(|()| shared.disk.sync()).map_err(io)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // Whoever wants to know whether it worked calls `close`.
        let _ = self.stop(self.shared.queue.check().is_ok());
    }
}

impl Loaded {
    fn is_stray(&self, name: &str) -> bool {
        self.log.stray.iter().chain(&self.pack.stray).any(|n| n == name)
    }
}

/// Begins a new segment behind what was found, in which what was not proven is written again.
fn begin(spares: &Arc<Spares>, loaded: &mut Loaded, which: Which) -> Result<(Stream, Files), Failure> {
    let found = match which {
        Which::Log => &loaded.log,
        Which::Pack => &loaded.pack,
    };
    let files: Files = Arc::default();
    let mut again = Vec::new();
    let last = found.segments.iter().next_back();
    for (number, (file, end)) in &found.segments {
        if let Some(file) = file {
            lock(&files).insert(*number, (Arc::clone(file), *end));
        }
    }
    if let Some((number, (Some(file), _))) = last {
        for (at, head) in &found.tail {
            let from = again.len();
            again.resize(from + head.frame_bytes(), 0);
            let err = |e| Failure::new("read", &Which::file_name(*number), &e);
            file.read_at(&mut again[from..], *at).map_err(err)?;
        }
    }
    let state = (which == Which::Log).then(|| loaded.proven_state.clone());
    let (stream, places) = Stream::begin(spares, Arc::clone(&files), found.highest + 2, state, again)?;
    let moved: HashMap<u64, u64> = found.tail.iter().map(|(at, _)| *at).zip(places).collect();
    let from = last.map(|(number, _)| *number);
    let follow = |place: &mut stream::Place| {
        if Some(place.segment) == from
            && let Some(at) = moved.get(&place.at)
        {
            *place = stream::Place { segment: stream.number(), at: *at };
        }
    };
    match which {
        Which::Log => loaded.index.values_mut().flat_map(|i| i.values_mut()).for_each(|loc| follow(&mut loc.place)),
        Which::Pack => {
            loaded.keys.values_mut().for_each(|page| follow(&mut page.place));
            loaded.tables.values_mut().for_each(|(place, _)| follow(place));
        }
    }
    Ok((stream, files))
}

impl StableStore for Engine {
    fn open(&self, unit: &UnitName, options: &OpenOptions) -> Result<Arc<dyn UnitStore>, Error> {
        Ok(Arc::new(unit::Handle::open(&self.shared, unit, options)?))
    }

    fn view(&self, unit: &UnitName) -> Result<Arc<dyn UnitStore>, Error> {
        Ok(Arc::new(unit::Handle::view(&self.shared, unit)?))
    }

    fn units(&self) -> Result<Vec<UnitInfo>, Error> {
        self.shared.queue.units()
    }

    fn remove(&self, unit: &UnitName) -> Result<(), Error> {
        self.shared.remove(unit)
    }

    fn fsck(&self) -> Result<Fsck, Error> {
        self.shared.fsck()
    }

    fn gc(&self) -> Result<Reclaimed, Error> {
        self.shared.collect_garbage(true)
    }
}

/// Whether a file of this name is a part of a store.
#[cfg(feature = "service")]
pub(crate) fn is_segment(name: &str) -> bool {
    Which::Log.number(name).or(Which::Pack.number(name)).is_some()
}

/// Monotonic time until a lease ends.
fn lease_end(ttl: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(ttl).unwrap_or_else(|| now + Duration::from_secs(1 << 30))
}

#[cfg(feature = "service")]
impl Engine {
    /// Whether an append of so many bytes would not wait.
    pub(crate) fn has_room(&self, bytes: usize) -> bool {
        self.shared.queue.has_room(bytes)
    }

    /// Opens a unit for writing.
    pub(crate) fn writer(&self, unit: &UnitName, options: &OpenOptions) -> Result<Handle, Error> {
        Handle::open(&self.shared, unit, options)
    }

    /// Opens a unit for reading.
    pub(crate) fn reader(&self, unit: &UnitName) -> Result<Handle, Error> {
        Handle::view(&self.shared, unit)
    }

    /// Another handle of the writer with this epoch.
    pub(crate) fn join(&self, unit: &UnitName, epoch: u64, options: &OpenOptions) -> Result<Handle, Error> {
        Handle::join(&self.shared, unit, epoch, options)
    }

    /// Has `call` called after those that [`UnitStore::notify`] asked for, once for all of them. The first one counts.
    pub(crate) fn call_behind(&self, call: Box<dyn Fn() + Send + Sync>) {
        // A second one is not wanted.
        let _ = self.shared.queue.behind.set(call);
    }

    /// Number of units.
    pub(crate) fn unit_count(&self) -> usize {
        self.shared.queue.lock().state.units.len()
    }
}
