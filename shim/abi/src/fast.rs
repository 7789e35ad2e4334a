//! What the supervisor and the shim inside the process share on the fast path: addresses, the control
//! page, and one area for each thread.
//!
//! ```text
//! 0x6f00_0000_0000  gate and scratch memory (the supervisor's business)
//! 0x6f00_7000_0000  the kernel's shared object (vdso(7)) and its data
//! 0x6f00_8000_0000  the shim's code
//! 0x6f00_9000_0000  areas of the threads
//! 0x6f01_0000_0000  control page, output queue, event ring: shared with the supervisor, not with children
//! ```

use core::sync::atomic::Ordering::{Relaxed, SeqCst};
use core::sync::atomic::{AtomicU32, AtomicU64};

/// First address of everything of ours in the unit.
pub const REGION_BASE: u64 = 0x6f00_0000_0000;
/// First address behind it.
pub const REGION_END: u64 = 0x6f02_0000_0000;
/// Where the kernel's shared object is moved.
pub const VDSO_BASE: u64 = 0x6f00_7000_0000;
/// Room for it and its data, bytes.
pub const VDSO_BYTES_MAX: u64 = 1 << 20;
/// Where the shim's code is linked to run.
pub const CODE_BASE: u64 = 0x6f00_8000_0000;
/// Room for the shim's code, bytes.
pub const CODE_BYTES_MAX: u64 = 1 << 20;
/// Where the areas of threads begin.
pub const AREAS_BASE: u64 = 0x6f00_9000_0000;
/// Bytes of the area of one thread: [`Area`], then the stack that its calls run on.
pub const AREA_BYTES: u64 = 32 << 10;
/// Where the control page is.
pub const CONTROL_BASE: u64 = 0x6f01_0000_0000;
/// Bytes of the control page.
pub const CONTROL_BYTES: u64 = 192 << 10;
/// Where the queue of outputs is ([`crate::outputs`]): a ring like that of events.
pub const OUTPUTS_BASE: u64 = CONTROL_BASE + CONTROL_BYTES;
/// Bytes of it: data, and a page for what stands before them.
pub const OUTPUTS_BYTES: u64 = (4 << 20) + 4096;
/// Bytes before the data of an output there.
pub const OUTPUT_HEADER: usize = 24;
/// Most bytes of one output in the queue.
pub const OUTPUT_MAX: u64 = 1 << 20;
/// Where the event ring is.
pub const RING_BASE: u64 = OUTPUTS_BASE + OUTPUTS_BYTES;
/// Descriptors about which [`Control::fds`] can know something.
pub const FDS_MAX: usize = 16384;
/// Most events that one call of `epoll_wait` is given.
pub const EPOLL_EVENTS_MAX: usize = 128;

/// [`Control::mode`]: calls are made and logged.
pub const RECORD: u32 = 0;
/// [`Control::mode`]: results are taken from the ring.
pub const REPLAY: u32 = 1;

/// [`Control::pending`]: no operation is in doubt.
pub const NOTHING: u64 = 0;
/// [`Control::pending`]: a `recvmmsg` into the uncommitted record at the ring's head.
pub const RECEIVE: u64 = 1;
/// [`Control::pending`]: a `sendmmsg`.
pub const SEND: u64 = 2;
/// [`Control::pending`]: an `epoll_wait` into [`Control::events`].
pub const EPOLL: u64 = 3;
/// [`Control::pending`]: a call that opens the descriptor [`Control::pending_fd`], the lowest free one.
pub const OPEN: u64 = 4;
/// [`Control::pending`]: a `close` of the open descriptor [`Control::pending_fd`].
pub const CLOSE: u64 = 5;
/// [`Control::pending`]: a `sendfile` that moves [`Control::offset`] on from [`Control::pending_from`].
pub const TRANSFER: u64 = 6;
/// [`Control::pending`]: a `write` that moves the position of the file [`Control::pending_fd`] on from
/// [`Control::pending_from`].
pub const WRITE_FILE: u64 = 7;
/// [`Control::pending`]: a `read` into the uncommitted record, which sets the position of the file
/// [`Control::pending_fd`] from [`Control::pending_from`] to [`Control::offset`] in the end.
pub const READ_FILE: u64 = 8;
/// [`Control::pending`]: an `epoll_ctl` that adds the descriptor [`Control::pending_fd`], which was in no set.
pub const ENROL: u64 = 9;
/// [`Control::pending`]: a `sendmmsg` of [`Control::pending_from`] bytes on a socket in blocking mode: what is
/// left is the supervisor's to send.
pub const SEND_ALL: u64 = 10;

/// [`Control::pending`]: [`Control::pending_from`] bytes for the socket [`Control::pending_fd`] are put into the queue of
/// outputs, whose end was at [`Control::offset`].
pub const QUEUE: u64 = 11;

/// Added to [`RECEIVE`], [`SEND`] or [`SEND_ALL`]: the operation is a plain one on the socket [`Control::pending_fd`],
/// and what the kernel has counted since [`Control::offset`] tells what came of it (`stream`).
pub const COUNTED: u64 = 0x100;

/// What is known of a descriptor, [`Control::fds`]: nothing yet.
pub const FD_UNKNOWN: u8 = 0;
/// A socket in nonblocking mode.
pub const FD_SOCKET_NONBLOCKING: u8 = 1;
/// A socket in blocking mode.
pub const FD_SOCKET_BLOCKING: u8 = 2;
/// Something else: its calls are the supervisor's.
pub const FD_OTHER: u8 = 3;
/// A regular file.
pub const FD_FILE: u8 = 4;
/// The bits of the above.
pub const FD_KIND: u8 = 0x0f;
/// Added to one of the above: [`Control::streams`] says what the kernel has counted of this socket.
pub const FD_COUNTED: u8 = 0x20;
/// Added: a socket that the unit itself has made or accepted, and that nobody else has.
pub const FD_PRIVATE: u8 = 0x40;
/// Added: a new connection, in no epoll set yet.
pub const FD_FRESH: u8 = 0x80;

/// Descriptors that [`Control::streams`] has room for.
pub const STREAMS: usize = 2048;
/// Calls on a stream from one time the kernel is asked for its counts to the next, if that is needed.
pub const CALLS_PER_COUNT: u32 = 32;

/// What has gone through a TCP socket: true while its descriptor has [`FD_COUNTED`].
#[derive(Debug)]
#[repr(C)]
pub struct Stream {
    /// Bytes taken, from where the kernel began to count.
    pub received: AtomicU64,
    /// Bytes given.
    pub sent: AtomicU64,
    /// Calls that were made while this was not known.
    pub uncounted: AtomicU32,
    /// Bytes that surely find room in the socket's buffer, beside those in the queue of outputs.
    pub credit: AtomicU32,
    /// Where the last output for it in the queue ends.
    pub queued: AtomicU64,
}

/// Ranges of addresses in [`Control::code`].
pub const CODE_RANGES: usize = 64;
/// Most bytes of an address that `accept` returns here.
pub const ADDRESS_BYTES: usize = 128;

/// `struct mmsghdr` with one piece of memory, as the kernel reads and writes it.
#[derive(Debug, Default)]
#[repr(C)]
pub struct Message {
    /// `msg_hdr.msg_name`.
    pub name: u64,
    /// `msg_hdr.msg_namelen`.
    pub name_len: u64,
    /// `msg_hdr.msg_iov`.
    pub iov: u64,
    /// `msg_hdr.msg_iovlen`.
    pub iov_len: u64,
    /// `msg_hdr.msg_control`.
    pub control: u64,
    /// `msg_hdr.msg_controllen`.
    pub control_len: u64,
    /// `msg_hdr.msg_flags`.
    pub flags: u64,
    /// `msg_len`: the kernel writes it when the operation has taken effect. [`NOT_YET`] before.
    pub len: AtomicU64,
    /// The `struct iovec`: address.
    pub piece: u64,
    /// And length.
    pub piece_len: u64,
}

/// [`Message::len`] before the kernel has written it (it writes the lower half).
pub const NOT_YET: u64 = u32::MAX as u64;

/// [`Control::turn`]: whoever wants it may take it.
pub const NOBODY: u32 = 0;
/// [`Control::turn`]: the supervisor has it.
pub const HELD: u32 = u32::MAX;
/// Calls that a thread may make while another wants the turn.
pub const CALLS_PER_TURN: u32 = 64;
/// Threads that can wait in the process; others wait with the supervisor.
pub const SLOTS: usize = 256;

/// [`Slot::state`]: the thread does not wait in the process.
pub const RUNS: u32 = 0;
/// [`Slot::state`]: it waits in the kernel, or is about to.
pub const WAITS: u32 = 1;
/// [`Slot::state`]: what it waited for is there, perhaps, and it wants the turn to look.
pub const WANTS: u32 = 2;
/// [`Slot::state`]: somebody is giving it the turn.
pub const GRANTED: u32 = 3;

/// A thread's waiting.
#[derive(Debug)]
#[repr(C)]
pub struct Slot {
    /// [`RUNS`], [`WAITS`], [`WANTS`] or [`GRANTED`].
    pub state: AtomicU32,
    /// Futex word: changes when the thread is given the turn.
    pub word: AtomicU32,
    /// The thread, as the program knows it.
    pub tid: AtomicU32,
    /// Not zero: the call that the thread comes to the supervisor with has waited already, and was disturbed.
    pub waited: AtomicU32,
    /// Not zero: the call with [`Slot::digest`] is made again, and its wait still ends at [`Slot::deadline`].
    pub again: AtomicU32,
    /// Zero.
    pub reserved: AtomicU32,
    /// The digest of that call.
    pub digest: AtomicU64,
    /// `CLOCK_MONOTONIC` nanoseconds at which that wait ends by itself; 0 for never.
    pub deadline: AtomicU64,
}

/// What the supervisor and the shim share. Only one of them runs at a time, except for [`Control::slow`].
#[derive(Debug)]
#[repr(C)]
pub struct Control {
    /// Not zero: every call goes to the supervisor.
    pub slow: AtomicU32,
    /// [`RECORD`] or [`REPLAY`].
    pub mode: AtomicU32,
    /// Not zero: a call may wait in the process, because no other thread needs the turn before
    /// [`Control::wait_until`] unless the supervisor says so.
    pub may_wait: AtomicU32,
    /// The thread that has the turn, as the program knows it; [`NOBODY`] when it can be taken, and [`HELD`] when
    /// the supervisor has it. Threads in user code, and those that serve a call, have it.
    pub turn: AtomicU32,
    /// Calls of the thread that has the turn since it got it.
    pub turn_calls: AtomicU32,
    /// Threads that want the turn.
    pub wanting: AtomicU32,
    /// Not zero: the supervisor wants it, and is told by a signal when nobody has it.
    pub shared: AtomicU32,
    /// The supervisor's thread that is told.
    pub tracer: AtomicU32,
    /// Not zero: the unit has one thread.
    pub single: AtomicU32,
    /// `CLOCK_MONOTONIC` nanoseconds after which no call may wait in the process; 0 for never.
    pub wait_until: AtomicU64,
    /// Number of the last event.
    pub sii: AtomicU64,
    /// Replay: position in the ring of the next record.
    pub replay_at: AtomicU64,
    /// Bytes of the ring, header included.
    pub ring_bytes: AtomicU64,
    /// Address of `__vdso_clock_gettime`; 0 when the shim may not use it.
    pub clock_gettime: AtomicU64,
    /// Calls served here.
    pub fast: AtomicU64,
    /// The program's own process id.
    pub pid: AtomicU64,
    /// The id of its parent.
    pub parent: AtomicU64,
    /// The supervisor's process, whose [`Control::tracer`] is told of a turn that is free.
    pub supervisor: AtomicU64,
    /// Calls that may be served before one has to stop.
    pub budget: AtomicU64,
    /// The operation in doubt: [`NOTHING`], or one of [`RECEIVE`] and its like.
    pub pending: AtomicU64,
    /// Number of the last event when it was begun.
    pub pending_sii: AtomicU64,
    /// For the operation in doubt: thread, number of the call, digest, address of its buffer.
    pub pending_call: [AtomicU64; 4],
    /// For the operation in doubt: a descriptor.
    pub pending_fd: AtomicU64,
    /// For [`ENROL`]: the epoll set; for a `recvmsg`: its header.
    pub pending_set: AtomicU64,
    /// For the operation in doubt: a position in a file, or bytes to send.
    pub pending_from: AtomicU64,
    /// A position in a file that the operation in doubt moves, or what the kernel had counted before it.
    pub offset: AtomicU64,
    /// The address that `accept` returns, and its length.
    pub address: [u8; ADDRESS_BYTES],
    /// Room, then length of the address.
    pub address_len: AtomicU32,
    /// Not zero: descriptors share open files, so that a change of one changes others.
    pub duplicated: AtomicU32,
    /// A device, as `stat` names it, whose files are no files of /proc; 0 when none is known.
    pub plain_device: AtomicU64,
    /// Every descriptor below this one is open.
    pub free_fd: AtomicU64,
    /// Not zero: [`Control::free_fd`] itself is not open. The supervisor takes this back whenever it has made a call.
    pub free_known: AtomicU32,
    /// Not zero: what others can see waits until [`Control::committed`] has come to [`Control::needed`].
    pub commits: AtomicU32,
    /// Threads that wait for a futex.
    pub futex_waiters: AtomicU32,
    /// Not zero: the unit has no children that could use its open files.
    pub alone: AtomicU32,
    /// Not zero: the program ignores `SIGPIPE`.
    pub ignores_pipe: AtomicU32,
    /// Not zero: descriptors are held for the unit elsewhere, so that calls that make or close one, or change its own flags, are
    /// the supervisor's; and so are those that change the mode of what a number below this one leads to.
    pub held: AtomicU32,
    /// Not zero: the unit has taken record locks of its process's.
    pub locked: AtomicU32,
    /// The last event that is in stable storage with all before it.
    pub committed: AtomicU64,
    /// Futex word: changes with [`Control::committed`].
    pub commit_word: AtomicU32,
    /// Futex word: changes when [`Control::wanted`] has and the recorder is [`Control::idle`].
    pub want_word: AtomicU32,
    /// Not zero: the recorder waits to be told that something is wanted.
    pub idle: AtomicU32,
    /// Who is letting outputs leave, 0 for nobody.
    pub leaver: AtomicU32,
    /// Not zero: whoever lets outputs leave in the unit's place waits to be told that there are any.
    pub sweeper_idle: AtomicU32,
    /// Not zero: the unit does not come by before they may.
    pub sweep: AtomicU32,
    /// Futex word: changes with the two above.
    pub sweep_word: AtomicU32,
    /// The event that somebody waits for to be committed.
    pub wanted: AtomicU64,
    /// The last event that could have come out otherwise: what replay makes of the ones behind it is known.
    pub needed: AtomicU64,
    /// The thread of the last event.
    pub last_tid: AtomicU64,
    /// What the last send depended on.
    pub last_send: AtomicU64,
    /// `CLOCK_MONOTONIC` nanoseconds when it came back to the program.
    pub last_send_at: AtomicU64,
    /// How much the program's sends come in batches, with nothing to do between them.
    pub batches: AtomicU64,
    /// The output that is leaving: its position in the queue and 1, or 0.
    pub leaving: AtomicU64,
    /// What was [`crate::outputs::Output::done`] of it before.
    pub leaving_done: AtomicU64,
    /// By bits: sockets for which an output could not leave, since the connection is gone.
    pub failed: [AtomicU64; STREAMS / 64],
    /// Ranges in use of [`Control::code`].
    pub code_ranges: AtomicU32,
    /// Addresses that may hold code, first and end: the supervisor has to know what happens to them.
    pub code: [[AtomicU64; 2]; CODE_RANGES],
    /// What each thread waits for.
    pub slots: [Slot; SLOTS],
    /// Fault injection: kill the process at the nth seam from now; 0 never.
    pub kill_in: AtomicU64,
    /// The process to kill then, and to ask the kernel about.
    pub real_pid: AtomicU64,
    /// The message of the operation in doubt.
    pub message: Message,
    /// The message of the output that is leaving.
    pub output: Message,
    /// Events of `epoll_wait`.
    pub events: [[u8; 12]; EPOLL_EVENTS_MAX],
    /// What is known of each descriptor.
    pub fds: [u8; FDS_MAX],
    /// What has gone through them.
    pub streams: [Stream; STREAMS],
    /// By bits: descriptors that a call has made, changed or closed since somebody looked at what they are.
    pub changed: [AtomicU64; FDS_MAX / 64],
    /// Changes of epoll sets that [`Control::changed`] does not tell of.
    pub enrolled: [Enrolment; ENROLMENTS],
    /// How many.
    pub enrolments: AtomicU32,
}

/// Room for changes of epoll sets.
pub const ENROLMENTS: usize = 1024;

/// A descriptor that has been entered into an epoll set, or changed there.
#[derive(Debug)]
#[repr(C)]
pub struct Enrolment {
    /// The set, as a descriptor.
    pub set: AtomicU32,
    /// The descriptor.
    pub fd: AtomicU32,
    /// `EPOLL*`.
    pub events: AtomicU64,
    /// The program's own word.
    pub data: AtomicU64,
}

impl Control {
    /// Everything up to this event is wanted in stable storage; whether the recorder has to be woken for that.
    #[inline]
    pub fn want(&self, event: u64) -> bool {
        self.wanted.fetch_max(event, SeqCst);
        // It says that it is idle before it looks for the last time.
        let wake = self.idle.swap(0, SeqCst) != 0;
        if wake {
            self.want_word.fetch_add(1, SeqCst);
        }
        wake
    }

    /// Whether an output could not leave by this socket since anybody last asked.
    #[inline]
    pub fn take_failed(&self, fd: u64) -> bool {
        let bit = 1 << (fd % 64);
        let word = self.failed.get((fd / 64) as usize);
        word.is_some_and(|word| word.load(Relaxed) & bit != 0 && word.fetch_and(!bit, SeqCst) & bit != 0)
    }

    /// A call is about to make, change or close a descriptor.
    #[inline]
    pub fn note_change(&self, fd: u64) {
        if let Some(word) = self.changed.get((fd / 64) as usize) {
            word.store(word.load(Relaxed) | 1 << (fd % 64), Relaxed);
        }
    }

    /// A descriptor is about to be entered into a set, or changed there, by `make`, which tells whether it was.
    pub fn note_enrolment<R>(&self, set: u64, fd: u64, event: (u32, u64), make: impl FnOnce() -> (bool, R)) -> R {
        let word = self.changed.get((set / 64) as usize);
        let before = word.map(|w| w.load(Relaxed));
        // Whoever is killed in between leaves behind that the set has to be looked at.
        self.note_change(set);
        let (made, result) = make();
        let at = self.enrolments.load(Relaxed);
        if let (Some(word), Some(before), Some(entry)) = (word, before, self.enrolled.get(at as usize)) {
            if made {
                entry.set.store(set as u32, Relaxed);
                entry.fd.store(fd as u32, Relaxed);
                entry.events.store(u64::from(event.0), Relaxed);
                entry.data.store(event.1, Relaxed);
                self.enrolments.store(at + 1, Relaxed);
            }
            word.store(before, Relaxed);
        }
        result
    }
}

/// What belongs to one thread; its address is in the thread's `gs` base.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Area {
    /// The program's stack pointer while the shim runs.
    pub user_sp: u64,
    /// The shim's own stack: where it begins.
    pub stack: u64,
    /// The shim's entry point.
    pub entry: u64,
    /// Where the thread goes on when the supervisor has to serve its call.
    pub slow: u64,
    /// The thread's id as the program knows it.
    pub tid: u64,
    /// Address of this area.
    pub this: u64,
}

const _: () = {
    use core::mem::{offset_of, size_of};
    assert!(offset_of!(Area, user_sp) == 0);
    assert!(offset_of!(Area, stack) == 8);
    assert!(offset_of!(Area, entry) == 16);
    assert!(offset_of!(Area, slow) == 24);
    assert!(offset_of!(Area, this) == 40);
    assert!(offset_of!(Message, len) == 56);
    assert!(offset_of!(Message, piece) == 64);
    assert!(size_of::<Control>() <= CONTROL_BYTES as usize);
};

/// What the entry of the shim saves of a thread, at the top of the thread's shim stack.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Frame {
    /// `xmm0` to `xmm3`: the others are not used.
    pub vectors: [[u64; 2]; 4],
    /// `r15 r14 r13 r12 rbp rbx`: the shim's own code restores them, but a fault in it may not.
    pub kept: [u64; 6],
    /// `r9 r8 r10 rdx rsi rdi`: the arguments, last first.
    pub args: [u64; 6],
    /// `rflags`.
    pub flags: u64,
    /// `rax`: the call's number, then its result.
    pub rax: u64,
    /// The stub's slow part; for a call that was served, where the program goes on.
    pub back: u64,
}

/// Address of the [`Frame`] of a thread whose area is at `area`, while its call is being served.
pub const fn frame_at(area: u64) -> u64 {
    area + AREA_BYTES - FRAME_TOP
}

/// From the frame's begin to the area's end.
pub const FRAME_TOP: u64 = core::mem::size_of::<Frame>() as u64 + 8;

/// The area of the thread in slot `slot`.
pub const fn area(slot: usize) -> u64 {
    AREAS_BASE + slot as u64 * AREA_BYTES
}
