//! The desk: memory that the keeper and every supervisor of a unit share.
//!
//! It holds what the keeper must know, what the unit has of the outside world, and the call that the keeper's
//! hands make in the unit's name (ARCHITECTURE.md, "Death of the supervisor"). It is mapped once, before
//! anything is forked, so it has the same address everywhere. Where the supervisor's death is to be survived it is a
//! file, from which a unit is recovered whose keeper was killed, too.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicI32, AtomicI64, AtomicU32, AtomicU64};

/// Bytes for the arguments of a call.
pub const ARENA_BYTES: usize = 48 << 20;
/// Most bytes of what is kept of the outside world.
const OUTSIDE_BYTES: usize = 1 << 20;
const HEAD_BYTES: usize = 4096;
/// Most descriptors of a unit (`fs.nr_open` as it is by default), and the bytes of a set of them.
const FDS_MAX: usize = 1 << 20;
const FD_BYTES: usize = FDS_MAX / 8;
const FDS_AT: usize = HEAD_BYTES + 2 * OUTSIDE_BYTES;
/// Numbers of descriptors that can be held ([`crate::hold`]), and the bytes of what is noted of them.
pub const HELD_MAX: usize = 1 << 16;
const HELD_BYTES: usize = 4 * HELD_MAX;
const HELD_AT: usize = FDS_AT + FD_BYTES;
const ARENA_AT: usize = HELD_AT + HELD_BYTES;
const BYTES: usize = ARENA_AT + ARENA_BYTES;
/// First word of a desk in a file: changes with the layout.
const MAGIC: u64 = u64::from_le_bytes(*b"ftdesk 2");

/// [`Desk::entered`]: there may be descriptors in the unit's table that are not its own.
const ENTERED: u32 = 1;
/// [`Desk::entered`]: the unit's own are not there, since its keeper was killed: they have to be made again.
const COLD: u32 = 2;
/// [`Desk::entered`]: the unit's own have come back from the service manager, after its keeper was killed.
const RETURNED: u32 = 4;
/// What the unit needs is missing: it may be put back.
const LACKING: u32 = 8;

/// [`Desk::hands`]: nothing to do, or the last call's result has been taken.
pub const IDLE: u32 = 0;
/// A call is to be made.
pub const CALL: u32 = 1;
/// It is being made: whether it has taken effect, only its end tells.
pub const STARTED: u32 = 2;
/// It has been made; the result stands in the desk.
pub const DONE: u32 = 3;
/// A flag beside the others: a supervisor is to be started.
pub const SPAWN: u32 = 0x100;

/// A call for the hands.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Order {
    /// Thread of the unit.
    pub vtid: AtomicI32,
    /// Number of the call that is made.
    pub nr: AtomicU64,
    /// Its arguments; pointers lead into the arena.
    pub args: [AtomicU64; 6],
    /// Digest of the call that the unit has made.
    pub digest: AtomicU64,
    /// Events in the log when it was made.
    pub sii: AtomicU64,
    /// Bytes of the arena that are in use.
    pub used: AtomicU64,
    /// What the kernel returned.
    pub result: AtomicI64,
    /// The file that the call makes or removes, as it was before: its inode, 0 for none.
    pub before: AtomicU64,
    /// Where the arena was for who gave the order.
    pub arena: AtomicU64,
    /// Orders so far.
    pub count: AtomicU32,
    /// What [`Order::counted`] counts, if anything: [`RECEIVED`], [`SENT`] or [`POSITION`].
    pub counts: AtomicU32,
    /// What the kernel said of the descriptor before the call, from which can be told whether it was made.
    pub counted: AtomicU64,
}

/// [`Order::counts`]: bytes taken from a TCP stream.
pub const RECEIVED: u32 = 1;
/// [`Order::counts`]: bytes given to it.
pub const SENT: u32 = 2;
/// [`Order::counts`]: the position in a file.
pub const POSITION: u32 = 3;

/// Most supplementary groups of a unit that has changed its credentials.
pub const GROUPS_MAX: usize = 256;

/// User and groups in whose name files are accessed (setfsuid(2)).
#[derive(Debug)]
#[repr(C)]
pub struct Owner {
    /// Changes so far.
    pub version: AtomicU32,
    uid: AtomicU32,
    gid: AtomicU32,
    count: AtomicU32,
    groups: [AtomicU32; GROUPS_MAX],
}

impl Owner {
    /// The hands access files in this name from their next call on. They do nothing now.
    pub fn change(&self, uid: u32, gid: u32, groups: &[u32]) {
        self.uid.store(uid, SeqCst);
        self.gid.store(gid, SeqCst);
        for (to, group) in self.groups.iter().zip(groups) {
            to.store(*group, SeqCst);
        }
        self.count.store(groups.len().min(GROUPS_MAX) as u32, SeqCst);
        self.version.fetch_add(1, SeqCst);
    }

    /// In a process that the hands have started: file access is its own again.
    pub fn leave(&self) {
        if self.version.load(SeqCst) > 0 {
            // SAFETY: no arguments.
            let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
            crate::capture::set_fs_credentials(uid, gid, &[]);
        }
    }

    /// User, group, supplementary groups.
    pub fn get(&self) -> (u32, u32, Vec<u32>) {
        let groups = self.groups.iter().take(self.count.load(SeqCst) as usize).map(|g| g.load(SeqCst)).collect();
        (self.uid.load(SeqCst), self.gid.load(SeqCst), groups)
    }
}

/// One of two copies of what the unit has of the outside world.
#[derive(Debug, Default)]
#[repr(C)]
struct Slot {
    /// It holds when the log has come to this event.
    from: AtomicU64,
    /// The later one counts; 0 for none.
    version: AtomicU64,
    bytes: AtomicU64,
}

/// The desk.
#[derive(Debug)]
#[repr(C)]
pub struct Desk {
    magic: AtomicU64,
    /// Exit status of the run, -1 while it goes on.
    pub code: AtomicI32,
    /// The keeper.
    pub keeper: AtomicI32,
    /// The supervisor that was started last.
    pub supervisor: AtomicI32,
    /// Supervisors started so far.
    pub generation: AtomicU32,
    /// The unit's process.
    pub pid: AtomicI32,
    /// Not 0: it lives, as far as is known, and takes signals.
    pub runs: AtomicU32,
    /// Not 0: it has lived.
    pub has_run: AtomicU32,
    /// The unit's process as the program knows it.
    pub vpid: AtomicI32,
    /// Incarnation of the unit.
    pub incarnation: AtomicU32,
    /// Recoveries so far.
    pub recoveries: AtomicU64,
    /// [`ENTERED`], [`COLD`], [`RETURNED`], [`LACKING`].
    entered: AtomicU32,
    /// Signs of life of the supervisor and the unit ([`crate::pulse`]).
    pub beats: AtomicU64,
    /// Not 0: the supervisor's death would not be survived now.
    pub degraded: AtomicU32,
    /// Not 0: the run comes to its end.
    pub ending: AtomicU32,
    /// Not 0: the hands were killed while they made the call in the order; what came of it is not known yet.
    pub in_doubt: AtomicU32,
    /// Cold recovery: the first number out of the unit's way, from which what the process that resumes was given has
    /// been set aside; 0 before and after.
    pub raised: AtomicI32,
    /// Not 0: no supervisor has been started yet since the keeper was replaced.
    pub resumed: AtomicU32,
    /// Not 0: every descriptor of the unit is held for it ([`crate::hold`]), and [`Desk::held`] says where.
    pub holds: AtomicU32,
    /// Not 0: they cannot all be held, and none is.
    pub holds_nothing: AtomicU32,
    /// The first number above those that the program was started with.
    pub given: AtomicU32,
    /// The umask, while descriptors are held.
    pub umask: AtomicU32,
    /// Where the directory is held, as in [`Desk::held`], and in the upper half the order that has changed it.
    pub directory: AtomicU64,
    /// Bytes of the arena that have memory.
    room: AtomicU64,
    /// Whose files the calls access.
    pub owner: Owner,
    /// State of the hands: a futex.
    pub hands: AtomicU32,
    /// What they do.
    pub order: Order,
    outside: [Slot; 2],
}

impl Desk {
    /// Maps a new desk, in an empty file if its keeper's death is to be survived.
    ///
    /// # Errors
    /// No address space, or no room in the file system.
    pub fn map(file: Option<&File>) -> io::Result<&'static Self> {
        if let Some(file) = file {
            file.set_len(BYTES as u64)?;
            allocate(file, ARENA_AT)?;
        }
        let desk = Self::at_file(file)?;
        desk.magic.store(MAGIC, SeqCst);
        desk.code.store(-1, SeqCst);
        if let Some(file) = file {
            // Before Linux 5.14 memory cannot be had page by page: then it is taken whole.
            if desk.populate(1 << 20).is_err_and(|e| e.raw_os_error() == Some(libc::EINVAL)) {
                allocate(file, BYTES)?;
                desk.room.store(ARENA_BYTES as u64, SeqCst);
            }
        } else {
            desk.room.store(ARENA_BYTES as u64, SeqCst);
        }
        Ok(desk)
    }

    /// Maps the desk of a unit that nobody runs.
    ///
    /// # Errors
    /// It is not a desk, or no address space.
    pub fn find(file: &File) -> io::Result<&'static Self> {
        let wrong = || io::Error::other("this is no desk of this version of ftrun");
        if file.metadata()?.len() != BYTES as u64 {
            return Err(wrong());
        }
        let desk = Self::at_file(Some(file))?;
        if desk.magic.load(SeqCst) == MAGIC { Ok(desk) } else { Err(wrong()) }
    }

    /// Begins with a desk whose keeper was killed: the unit's table is gone, or (`returned`) has been brought back. What the
    /// hands had been told to do and had not begun is forgotten; what they had begun and not ended is in doubt.
    pub fn take_over(&self, returned: bool) {
        if self.call_state() == STARTED {
            self.in_doubt.store(1, SeqCst);
        }
        if self.call_state() != DONE {
            self.hands.store(IDLE, SeqCst);
        }
        self.hands.fetch_and(!SPAWN, SeqCst);
        self.supervisor.store(0, SeqCst);
        self.runs.store(0, SeqCst);
        // One that could not be gone on with may be now.
        self.ending.store(0, SeqCst);
        self.degraded.store(0, SeqCst);
        self.raised.store(0, SeqCst);
        self.resumed.store(1, SeqCst);
        self.holds_nothing.store(0, SeqCst);
        if !returned {
            self.holds.store(0, SeqCst);
        }
        self.entered.store(if returned { RETURNED } else { COLD }, SeqCst);
    }

    /// For each number, how its descriptor is held ([`crate::hold`]); 0 for those that are not open.
    pub fn held(&self) -> &[AtomicU32; HELD_MAX] {
        // SAFETY: inside the mapping, aligned, and used through atomics.
        unsafe { &*self.at(HELD_AT).cast() }
    }

    fn at_file(file: Option<&File>) -> io::Result<&'static Self> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let (flags, fd) = match file {
            Some(file) => (libc::MAP_SHARED, file.as_raw_fd()),
            None => (libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1),
        };
        // SAFETY: a fresh mapping.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), BYTES, prot, flags, fd, 0) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        const { assert!(size_of::<Self>() <= HEAD_BYTES) };
        // SAFETY: as large as a desk, never unmapped, and used through atomics; every bit pattern is a desk.
        Ok(unsafe { &*at.cast::<Self>() })
    }

    /// Makes sure that so many bytes of the arena can be written to. A file system that is full would otherwise end
    /// whoever writes there with SIGBUS.
    ///
    /// # Errors
    /// It is full.
    pub fn populate(&self, bytes: usize) -> io::Result<()> {
        let (from, to) = (self.room.load(SeqCst) as usize, bytes.next_multiple_of(1 << 16).min(ARENA_BYTES));
        if to <= from {
            return Ok(());
        }
        // SAFETY: inside the mapping; the content stays.
        let r = unsafe { libc::madvise(self.arena().add(from).cast(), to - from, libc::MADV_POPULATE_WRITE) };
        if r != 0 {
            return Err(io::Error::last_os_error());
        }
        self.room.store(to as u64, SeqCst);
        Ok(())
    }

    fn at(&self, offset: usize) -> *mut u8 {
        // SAFETY: inside the mapping.
        unsafe { std::ptr::from_ref(self).cast_mut().cast::<u8>().add(offset) }
    }

    /// Memory for the arguments of a call.
    pub fn arena(&self) -> *mut u8 {
        self.at(ARENA_AT)
    }

    /// The supervisor, or the hands, will open descriptors of their own in the unit's table for a moment: these are
    /// the unit's. It makes no call until [`Desk::leave_table`].
    pub fn enter_table(&self, fds: &[i32]) {
        // SAFETY: inside the mapping; who may write there is who has the table: the hands, or the one supervisor.
        let set = unsafe { std::slice::from_raw_parts_mut(self.at(FDS_AT), FD_BYTES) };
        set.fill(0);
        for fd in fds.iter().map(|fd| *fd as usize).filter(|fd| *fd < FDS_MAX) {
            set[fd / 8] |= 1 << (fd % 8);
        }
        self.entered.fetch_or(ENTERED, SeqCst);
    }

    /// None of the unit's descriptors is in the table: they have to be made again.
    pub fn is_cold(&self) -> bool {
        self.entered.load(SeqCst) & COLD != 0
    }

    /// The unit's descriptors have come back, and it has not gone on since.
    pub fn is_returned(&self) -> bool {
        self.entered.load(SeqCst) & RETURNED != 0
    }

    /// The unit lacks something that may be put back: what remains of it is kept for that.
    pub fn lacks(&self) {
        self.entered.fetch_or(LACKING, SeqCst);
    }

    /// What remains of the unit is of no use any more, once its run is over: it has gone on since its keeper was killed,
    /// or that never was.
    pub fn can_be_forgotten(&self) -> bool {
        self.entered.load(SeqCst) & (COLD | RETURNED | LACKING) == 0
    }

    /// Every descriptor in the table is the unit's again, and all of its descriptors are there.
    pub fn leave_table(&self) {
        self.entered.store(0, SeqCst);
    }

    /// The unit's descriptors, where others may be among them; `None` where all are the unit's.
    pub fn entered_table(&self) -> Option<Vec<i32>> {
        if self.entered.load(SeqCst) & ENTERED == 0 {
            return None;
        }
        // SAFETY: as above.
        let set = unsafe { std::slice::from_raw_parts(self.at(FDS_AT), FD_BYTES) };
        let bits = |(i, byte): (usize, &u8)| {
            let byte = *byte;
            (0..8).filter(move |bit| byte >> bit & 1 == 1).map(move |bit| (i * 8 + bit) as i32)
        };
        Some(set.iter().enumerate().filter(|(_, byte)| **byte != 0).flat_map(bits).collect())
    }

    /// Waits until the hands are in another state than `seen`, for 100 ms at most.
    pub fn wait_hands(&self, seen: u32) {
        let limit = libc::timespec { tv_sec: 0, tv_nsec: 100_000_000 };
        // SAFETY: a word and a time that outlive the call.
        unsafe { libc::syscall(libc::SYS_futex, self.hands.as_ptr(), libc::FUTEX_WAIT, seen, &raw const limit) };
    }

    /// Wakes who waits for the hands, and the hands.
    pub fn wake_hands(&self) {
        // SAFETY: a word of the desk.
        unsafe { libc::syscall(libc::SYS_futex, self.hands.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
    }

    /// The call's state, without the flag.
    pub fn call_state(&self) -> u32 {
        self.hands.load(SeqCst) & !SPAWN
    }

    /// Changes the call's state, and leaves the flag.
    pub fn set_call_state(&self, state: u32) {
        let change = |now: u32| Some(now & SPAWN | state);
        // The function always returns a value.
        let _was = self.hands.fetch_update(SeqCst, SeqCst, change);
        self.wake_hands();
    }

    /// Keeps what the unit has of the outside world, as it is when the log, which is at event `now`, has come to
    /// event `from`; what was kept before holds until then.
    ///
    /// # Errors
    /// It is too large.
    pub fn keep_outside(&self, now: u64, from: u64, bytes: &[u8]) -> Result<(), usize> {
        if bytes.len() > OUTSIDE_BYTES {
            return Err(bytes.len());
        }
        let versions = self.outside.each_ref().map(|s| s.version.load(SeqCst));
        // Not over the one that holds now.
        let i = self.holds_at(now).map_or(0, |holds| 1 - holds);
        let slot = &self.outside[i];
        slot.version.store(0, SeqCst);
        // SAFETY: room for so many bytes, which nobody reads while the version is 0.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at(HEAD_BYTES + i * OUTSIDE_BYTES), bytes.len()) };
        slot.bytes.store(bytes.len() as u64, SeqCst);
        slot.from.store(from, SeqCst);
        slot.version.store(versions[0].max(versions[1]) + 1, SeqCst);
        Ok(())
    }

    fn holds_at(&self, sii: u64) -> Option<usize> {
        let fits = |i: &usize| self.outside[*i].version.load(SeqCst) > 0 && self.outside[*i].from.load(SeqCst) <= sii;
        [0, 1].into_iter().filter(fits).max_by_key(|i| self.outside[*i].version.load(SeqCst))
    }

    /// What was kept of the outside world when the log had come to event `sii`.
    pub fn outside(&self, sii: u64) -> Option<Vec<u8>> {
        let i = self.holds_at(sii)?;
        let slot = &self.outside[i];
        // SAFETY: written as a whole before the version was.
        let bytes = unsafe {
            std::slice::from_raw_parts(self.at(HEAD_BYTES + i * OUTSIDE_BYTES), slot.bytes.load(SeqCst) as usize)
        };
        Some(bytes.to_vec())
    }
}

/// Has a file system give a file room for its first bytes.
fn allocate(file: &File, bytes: usize) -> io::Result<()> {
    // SAFETY: plain numbers.
    match unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, bytes as i64) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Break it: give out the later copy whatever the log holds.
    #[test]
    fn what_was_kept_goes_with_the_log() {
        let desk = Desk::map(None).unwrap();
        assert_eq!(desk.outside(9), None);
        desk.keep_outside(0, 0, b"none").unwrap();
        desk.keep_outside(4, 5, b"lost").unwrap();
        // The supervisor was killed before event 5 was in the log.
        desk.keep_outside(4, 5, b"after 5").unwrap();
        assert_eq!(desk.outside(4).as_deref(), Some(&b"none"[..]));
        assert_eq!(desk.outside(5).as_deref(), Some(&b"after 5"[..]));
        desk.keep_outside(5, 5, b"later").unwrap();
        assert_eq!(desk.outside(5).as_deref(), Some(&b"later"[..]));
        assert_eq!(desk.keep_outside(5, 6, &vec![0; OUTSIDE_BYTES + 1]), Err(OUTSIDE_BYTES + 1));
        assert_eq!(desk.outside(6).as_deref(), Some(&b"later"[..]));
    }
}
