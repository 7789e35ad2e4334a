//! The event log in memory: a ring, shared with the shim, that holds every event since the newest
//! checkpoint and those before it that have not been written to disk yet.
//!
//! The tracer and the shim never run at the same time, so together they are the ring's one producer. Two
//! read: replay, from the newest checkpoint on, and the journal's thread, which writes events to disk. What
//! neither needs any more is given back.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ftrun_abi::fast::{CONTROL_BYTES, Control, Message, OUTPUTS_BYTES};
use ftrun_abi::record::{Record, flag};
use ftrun_abi::ring::Ring;

/// Bytes before the ring of events.
const HEAD_BYTES: u64 = CONTROL_BYTES + OUTPUTS_BYTES;

/// Shared memory: a control page, the queue of outputs, and the ring of events.
#[derive(Debug)]
struct Memory {
    file: File,
    at: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the memory is shared between processes anyway; everything in it is accessed through atomics and
// through the ring, whose contract the users of this module keep.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Maps a file of this size, or memory without a name.
    fn new(file: File, bytes: usize) -> std::io::Result<Self> {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a fresh mapping of a file of this size.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), bytes, prot, flags, file.as_raw_fd(), 0) };
        if at == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        let at = NonNull::new(at.cast()).ok_or_else(|| std::io::Error::other("a mapping at 0"))?;
        Ok(Self { file, at, bytes })
    }

    fn ring_bytes(&self) -> usize {
        self.bytes - HEAD_BYTES as usize
    }

    /// The queue of outputs.
    fn outputs(&self) -> Ring {
        // SAFETY: as for `ring`: the unit's running thread is the producer, and the queue's one reader consumes.
        let ring = unsafe { Ring::attach(self.at.as_ptr().add(CONTROL_BYTES as usize), OUTPUTS_BYTES as usize) };
        match ring {
            Ok(ring) => ring,
            Err(e) => panic!("the unit has overwritten its queue of outputs: {e}"),
        }
    }

    fn control(&self) -> &Control {
        // SAFETY: the first bytes of the memory, zero or as shim and supervisor left them; every bit pattern
        // is a `Control`. What is not atomic in it is read while the unit's threads are stopped.
        unsafe { self.at.cast::<Control>().as_ref() }
    }

    fn ring(&self) -> Ring {
        // SAFETY: the ring was created in this memory, which lives as long as `self`, and handles are used
        // by its one producer and by readers that the module documentation describes.
        let ring = unsafe { Ring::attach(self.at.as_ptr().add(HEAD_BYTES as usize), self.ring_bytes()) };
        match ring {
            Ok(ring) => ring,
            Err(e) => panic!("the unit has overwritten its event log: {e}"),
        }
    }
}

/// An empty file in memory, which lives as long as somebody has it.
fn memory_file() -> std::io::Result<File> {
    // SAFETY: a name and flags; the descriptor is owned by the file made from it.
    unsafe {
        let fd = libc::memfd_create(c"ftrun-log".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(File::from_raw_fd(fd))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`; handles on the ring do not outlive their `Arc` of this.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.bytes) };
    }
}

/// The ring is full of events that are still needed.
#[derive(Debug)]
pub struct Full;

/// The log.
#[derive(Debug)]
pub struct EventLog {
    memory: Arc<Memory>,
    ring: Ring,
    /// Position of the first event after the newest checkpoint.
    begin: u64,
    /// Bytes of events that positions do not count: from before the memory was begun anew, and taken back.
    before: u64,
    kept: Arc<Kept>,
}

/// Up to where each reader needs events no more.
#[derive(Debug)]
struct Kept {
    checkpoint: AtomicU64,
    tails: [AtomicU64; 3],
}

impl Default for Kept {
    fn default() -> Self {
        Self { checkpoint: AtomicU64::new(0), tails: [const { AtomicU64::new(u64::MAX) }; 3] }
    }
}

/// Who needs events beside replay.
#[derive(Clone, Copy, Debug)]
pub enum Reader {
    /// The journal, until it has written them to disk.
    Journal,
    /// The standby, until there is a checkpoint behind them that outlives the supervisor.
    Standby,
    /// The recorder, until they are in stable storage.
    Recorder,
}

/// Another reader's end of the log.
#[derive(Debug)]
pub struct LogTail {
    reader: Reader,
    memory: Arc<Memory>,
    ring: Ring,
    kept: Arc<Kept>,
    position: u64,
}

impl EventLog {
    /// An empty log with room for `bytes` of events.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn new(bytes: u64) -> std::io::Result<Self> {
        let file = memory_file()?;
        file.set_len(Self::file_bytes(bytes))?;
        Self::in_memory(file, bytes)
    }

    /// An empty log in a file that outlives its supervisor. The file gets all of its memory now: a file system that
    /// is full later would end with SIGBUS whoever writes to the mapping, which the program does.
    ///
    /// # Errors
    /// There is not enough memory.
    pub fn create(file: File, bytes: u64) -> std::io::Result<Self> {
        // What a supervisor began that was killed at once is gone.
        file.set_len(0)?;
        // SAFETY: plain numbers.
        match unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, Self::file_bytes(bytes) as i64) } {
            0 => Self::in_memory(file, bytes),
            errno => Err(std::io::Error::from_raw_os_error(errno)),
        }
    }

    /// Bytes of the file of a log with room for `bytes` of events.
    fn file_bytes(bytes: u64) -> u64 {
        let ring = ((bytes as usize).next_power_of_two() + Ring::HEADER_BYTES).next_multiple_of(4096);
        HEAD_BYTES + ring as u64
    }

    /// The log in a file, as a supervisor left it that has died; the newest checkpoint is at event `sii`.
    ///
    /// # Errors
    /// The file cannot be mapped.
    pub fn attach(file: File, sii: u64) -> std::io::Result<Self> {
        let bytes = file.metadata()?.len() as usize;
        if bytes <= HEAD_BYTES as usize {
            return Err(std::io::Error::other("the file of the event log is cut"));
        }
        let memory = Arc::new(Memory::new(file, bytes)?);
        let ring = memory.ring();
        let mut begin = ring.begin();
        let first = |bytes: &[u8]| Record::parse(bytes).is_ok_and(|(r, _)| r.header.sii > sii);
        while let Ok(Some((record, next))) = ring.read_at(begin) {
            if first(record) {
                break;
            }
            begin = next;
        }
        let kept = Arc::new(Kept::default());
        kept.checkpoint.store(begin, Ordering::SeqCst);
        Ok(Self { memory, ring, begin, before: 0, kept })
    }

    fn in_memory(file: File, bytes: u64) -> std::io::Result<Self> {
        let memory = Arc::new(Memory::new(file, Self::file_bytes(bytes) as usize)?);
        let create = |offset: u64, bytes: usize| {
            // SAFETY: fresh memory that nobody else uses yet.
            let ring = unsafe { Ring::create(memory.at.as_ptr().add(offset as usize), bytes) };
            ring.map_err(std::io::Error::other)
        };
        create(CONTROL_BYTES, OUTPUTS_BYTES as usize)?;
        let ring = create(HEAD_BYTES, memory.ring_bytes())?;
        let kept = Arc::new(Kept::default());
        let log = Self { memory, ring, begin: 0, before: 0, kept };
        log.control().ring_bytes.store(log.memory.ring_bytes() as u64, Ordering::SeqCst);
        Ok(log)
    }

    /// The page that is shared with the shim.
    pub fn control(&self) -> &Control {
        self.memory.control()
    }

    /// Forgets what was known of descriptors, of one or of all, but for the bits to keep. No thread of the unit is in
    /// the shim.
    pub fn forget_fds(&mut self, fd: Option<usize>, keep: u8) {
        // SAFETY: as for `control`; the shim, the only other user of the table, does not run.
        let fds = unsafe { &mut (*self.memory.at.cast::<Control>().as_ptr()).fds };
        match fd {
            Some(fd) => {
                if let Some(known) = fds.get_mut(fd) {
                    *known &= keep;
                }
            }
            None => fds.iter_mut().for_each(|known| *known &= keep),
        }
    }

    /// A descriptor is a new socket that nobody else has.
    pub fn note_private(&mut self, fd: usize) {
        // SAFETY: as for `forget_fds`.
        let fds = unsafe { &mut (*self.memory.at.cast::<Control>().as_ptr()).fds };
        if let Some(known) = fds.get_mut(fd) {
            *known = ftrun_abi::fast::FD_PRIVATE;
        }
    }

    /// Descriptor and size of the memory, for mapping it into the unit. The descriptor is of the thread that
    /// made the log.
    pub fn file(&self) -> (i32, u64) {
        (self.memory.file.as_raw_fd(), self.memory.bytes as u64)
    }

    /// The events lead on from a checkpoint at `sii`: none is missing, and none but the last needs a checkpoint of its own.
    pub fn leads_on(&self, sii: u64) -> bool {
        let (mut position, mut sii, mut stuck) = (self.begin, sii, false);
        while let Some((record, next)) = self.read_at(position) {
            let follows = Record::parse(record).is_ok_and(|(r, _)| r.header.sii == sii + 1);
            if !follows || stuck {
                return false;
            }
            (position, sii, stuck) = (next, sii + 1, is_unloggable(record));
        }
        true
    }

    /// The number of the last event, that of the newest checkpoint being `sii`.
    pub fn last_sii(&self, sii: u64) -> u64 {
        let (mut position, mut last) = (self.begin, sii);
        while let Some((record, next)) = self.read_at(position) {
            last = Record::parse(record).map_or(last, |(r, _)| r.header.sii);
            position = next;
        }
        last
    }

    /// Adds a record.
    ///
    /// # Errors
    /// There is no room; what is needed no more must be written to disk, or a checkpoint be taken.
    pub fn append(&mut self, record: &[u8]) -> Result<(), Full> {
        let Some(room) = self.ring.reserve(record.len()) else { return Err(Full) };
        room.copy_from_slice(record);
        self.ring.commit();
        Ok(())
    }

    /// Position of the first event after the newest checkpoint.
    pub fn begin(&self) -> u64 {
        self.begin
    }

    /// Position behind the last event.
    pub fn end(&self) -> u64 {
        self.ring.end()
    }

    /// Bytes of events since the newest checkpoint.
    pub fn bytes(&self) -> u64 {
        self.end() - self.begin
    }

    /// Bytes of all events that were ever logged.
    pub fn bytes_so_far(&self) -> u64 {
        self.before + self.end()
    }

    /// The memory that it takes, to be asked for its size (`st_blocks`); a descriptor of the calling thread, which has made
    /// the log.
    ///
    /// # Errors
    /// No descriptor.
    pub fn share(&self) -> std::io::Result<File> {
        self.memory.file.try_clone()
    }

    /// The record at a position, and the position behind it; `None` at the end.
    pub fn read_at(&self, position: u64) -> Option<(&[u8], u64)> {
        match self.ring.read_at(position) {
            Ok(found) => found,
            Err(e) => panic!("the unit has overwritten its event log: {e}"),
        }
    }

    /// A checkpoint holds the effect of every event so far.
    pub fn checkpointed(&mut self) {
        self.begin = self.end();
        self.kept.checkpoint.store(self.begin, Ordering::SeqCst);
        release(&mut self.ring, &self.kept);
    }

    /// Begins the memory anew if no event in it is needed any more. The unit is stopped.
    pub fn rewind(&mut self, tail: &mut LogTail) {
        // Positions must stay what they are for a reader that goes by them later.
        let by_position = self.kept.tails[Reader::Standby as usize].load(Ordering::SeqCst) != u64::MAX;
        let end = self.end();
        if !by_position && tail.position == end && self.begin == end && self.ring.rewind() {
            self.before += end;
            (self.begin, tail.position) = (0, 0);
            tail.ring = self.memory.ring();
            self.kept.checkpoint.store(0, Ordering::SeqCst);
            tail.give_back();
        }
    }

    /// The process died between a call that cannot be logged and the checkpoint that must follow it: what the
    /// call did to the process is lost with it, so that the call has to be made again.
    pub fn drop_unloggable(&mut self) {
        let (mut position, mut last) = (self.begin, None);
        while let Some((record, next)) = self.read_at(position) {
            last = Some((position, is_unloggable(record)));
            position = next;
        }
        if let Some((position, true)) = last {
            self.before += self.end() - position;
            self.ring.truncate_to(position);
        }
    }

    /// The record that the shim had begun when its process died.
    pub fn uncommitted(&self) -> Option<&[u8]> {
        self.ring.uncommitted()
    }

    /// The queue of outputs; only one of these may give anything back.
    pub fn outputs(&self) -> Queue {
        Queue { ring: self.memory.outputs(), memory: Arc::clone(&self.memory) }
    }

    /// A reader's end: events since the newest checkpoint are kept until it needs them no more.
    pub fn tail(&self, reader: Reader) -> LogTail {
        self.kept.tails[reader as usize].store(self.begin, Ordering::SeqCst);
        LogTail {
            reader,
            memory: Arc::clone(&self.memory),
            ring: self.memory.ring(),
            kept: Arc::clone(&self.kept),
            position: self.begin,
        }
    }
}

/// The queue of outputs, as the supervisor sees it.
#[derive(Debug)]
pub struct Queue {
    pub(crate) ring: Ring,
    memory: Arc<Memory>,
}

impl Queue {
    /// The page that is shared with the shim.
    pub(crate) fn control(&self) -> &Control {
        self.memory.control()
    }

    /// Bytes of outputs that wait, with what is noted of each.
    pub(crate) fn bytes(&self) -> u64 {
        self.ring.end() - self.ring.begin()
    }

    /// The page, and the ring.
    pub(crate) fn parts(&mut self) -> (&Control, &mut Ring) {
        (self.memory.control(), &mut self.ring)
    }

    /// The message of the output that is leaving: the reader's own.
    pub(crate) fn leaving_message(&self) -> *mut Message {
        // SAFETY: the control page is at the beginning of the memory.
        unsafe { &raw mut (*self.memory.at.cast::<Control>().as_ptr()).output }
    }
}

impl LogTail {
    /// The next record that has not been taken, without taking it.
    pub fn peek(&self) -> Option<&[u8]> {
        self.ring.read_at(self.position).ok().flatten().map(|(record, _)| record)
    }

    /// Takes the record that [`LogTail::peek`] shows.
    pub fn take(&mut self) {
        if let Ok(Some((_, next))) = self.ring.read_at(self.position) {
            self.position = next;
        }
    }

    /// Gives back what was taken.
    pub fn give_back(&mut self) {
        self.kept.tails[self.reader as usize].store(self.position, Ordering::SeqCst);
        release(&mut self.ring, &self.kept);
    }

    /// Gives back what lies before a position.
    pub fn give_back_to(&mut self, position: u64) {
        self.position = self.position.max(position);
        self.give_back();
    }

    /// Passes over what the newest checkpoint makes needless.
    pub fn skip_to_checkpoint(&mut self) {
        self.position = self.position.max(self.kept.checkpoint.load(Ordering::SeqCst));
        self.give_back();
    }

    /// The page that is shared with the shim. Only its atomics may be read while the unit runs.
    pub fn control(&self) -> &Control {
        self.memory.control()
    }

    /// Another end at the same place, to look further with. What it takes is not given back.
    pub fn ahead(&self) -> Self {
        Self {
            reader: self.reader,
            memory: Arc::clone(&self.memory),
            ring: self.memory.ring(),
            kept: Arc::clone(&self.kept),
            position: self.position,
        }
    }

    /// Takes what `ahead` has taken, and gives it back.
    pub fn follow(&mut self, ahead: &Self) {
        self.position = ahead.position;
        self.give_back();
    }

    /// Bytes that have not been taken.
    pub fn bytes(&self) -> u64 {
        self.ring.end() - self.position
    }
}

/// Only the checkpoint after this event can stand for it.
fn is_unloggable(record: &[u8]) -> bool {
    Record::parse(record).is_ok_and(|(r, _)| r.header.flags & flag::UNLOGGABLE != 0)
}

fn release(ring: &mut Ring, kept: &Kept) {
    let tails = kept.tails.iter().map(|t| t.load(Ordering::SeqCst));
    ring.release_to(tails.fold(kept.checkpoint.load(Ordering::SeqCst), u64::min));
}
