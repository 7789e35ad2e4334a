//! The unit: its threads, the model of what the kernel does not keep for us, and its event log.
//!
//! Truth is of two kinds. The **model** ([`Model`]) and the threads belong to the unit's execution: they
//! are part of a checkpoint, roll back with it and are rebuilt by replay. What came from **outside**
//! ([`Outside`]) happened once: it survives the death of the process and is never rolled back.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use ftrun_abi::record::{Kind, RecordBuf, flag};
use ftrun_ckpt::state::Snapshot;
use libc::user_regs_struct;
use serde::{Deserialize, Serialize};

use crate::divergence::Divergence;
use crate::outside::Outside;
use crate::service::Service;
use crate::tracee::{self, SigInfo, TraceError};

/// Why the unit's execution stopped.
#[derive(Debug, thiserror::Error)]
pub enum Halt {
    /// A thread vanished: somebody killed the process.
    #[error("the process died")]
    Died,
    /// The program ended by itself; the wait status.
    #[error("the program ended with wait status {0:#x}")]
    Ended(i32),
    /// The program executed a new image; the process is stopped before its first instruction.
    #[error("the program executed a new image")]
    Exec(i32),
    /// Replay did not reproduce the log.
    #[error(transparent)]
    Diverged(Box<Divergence>),
    /// A call named an address that the unit does not have.
    #[error("a bad address")]
    BadAddress,
    /// The supervisor cannot go on.
    #[error("{0}")]
    Broken(String),
    /// What the unit needs is not there any more.
    #[error("{0}")]
    Lost(String),
}

impl From<TraceError> for Halt {
    fn from(e: TraceError) -> Self {
        match e {
            TraceError::Gone(_) => Halt::Died,
            TraceError::Sys { ref source, .. } if source.raw_os_error() == Some(libc::EFAULT) => Halt::BadAddress,
            TraceError::Sys { .. } => Halt::Broken(e.to_string()),
        }
    }
}

impl From<crate::launch::LaunchError> for Halt {
    fn from(e: crate::launch::LaunchError) -> Self {
        match e {
            crate::launch::LaunchError::Trace(e) => e.into(),
            e @ crate::launch::LaunchError::File(_) => Halt::Lost(e.to_string()),
            e => Halt::Broken(e.to_string()),
        }
    }
}

/// Result of running the unit.
pub type Result<T> = std::result::Result<T, Halt>;

/// What a thread waits for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waiting {
    /// Descriptors and `POLL*` events, as for poll(2).
    pub fds: Vec<(i32, i16)>,
    /// `CLOCK_MONOTONIC` nanoseconds.
    pub deadline: Option<u64>,
    /// Signal mask while it waits (`ppoll`, `rt_sigsuspend`, ...).
    pub mask: Option<u64>,
    /// Waits in a futex queue.
    pub futex: bool,
    /// Waits for a child to end.
    pub child: bool,
}

/// Where a thread is, as the supervisor sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// In user code with the turn.
    Running,
    /// Before a call that has to be tried.
    Entry,
    /// In a call that has been tried and would block.
    Blocked(Waiting),
    /// In user code without the turn: new, or preempted.
    User,
}

/// Where the thread's kernel side is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a ptrace stop.
    Stopped,
    /// Executing the program.
    Program,
    /// Waiting in a call behind the gate.
    Parked,
    /// Waiting in the shim, without the turn.
    Waiting,
}

/// One thread.
#[derive(Debug)]
pub struct Thread {
    /// The kernel's id.
    pub tid: i32,
    /// Index of its scratch memory; 0 is the supervisor's own.
    pub slot: usize,
    /// What it does.
    pub state: State,
    /// Where it is.
    pub place: Place,
    /// Its registers: in a call as they were at its entry.
    pub regs: user_regs_struct,
    /// Its own signal mask while a temporary one is in force.
    pub own_mask: Option<u64>,
    /// Extended state read since it last ran.
    pub xstate: Option<Vec<u8>>,
    /// Alternate signal stack.
    pub altstack: (u64, u64, u32),
    /// `clear_child_tid`.
    pub clear_tid: u64,
    /// Robust list.
    pub robust: (u64, u64),
    /// It let others go first (`sched_yield`).
    pub yielded: bool,
    /// The last event when it was last sent back into the process to wait there.
    pub sent_back: u64,
}

/// A waiter of a futex.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waiter {
    /// Address of the word.
    pub addr: u64,
    /// Thread.
    pub vtid: i32,
    /// Bit set of `FUTEX_WAIT_BITSET`.
    pub bits: u32,
}

/// What the kernel keeps for a process and would lose with it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Model {
    /// Signal actions 1 to 64: handler, flags, restorer, mask.
    pub actions: Vec<[u64; 4]>,
    /// Waiters of futexes in the order of their arrival.
    pub futexes: Vec<Waiter>,
    /// Threads woken from a futex that have not gone on yet.
    pub woken: Vec<i32>,
    /// Current end of the heap.
    pub brk: u64,
    /// `(vtid, waiting)` of threads that were blocked.
    pub blocked: Vec<(i32, Waiting)>,
    /// Threads that stood in user code without the turn.
    pub user: Vec<i32>,
    /// Why the checkpoint was taken, when the events before it do not lead there by replay: the call that
    /// could not be logged, [`PREEMPTED`], or `execve`.
    pub irregular: Option<String>,
    /// Call sites that have been rewritten.
    pub sites: crate::fast::Sites,
    /// Processors that threads asked for (sched_setaffinity(2)), by thread.
    pub affinity: BTreeMap<i32, Vec<u8>>,
    /// Processor that the unit is bound to.
    pub cpu: Option<u32>,
    /// Resource limits (soft, hard) by number.
    pub limits: Vec<(u64, u64)>,
    /// Real, effective, saved user and group ids and groups, when they differ from ours.
    pub credentials: Option<Credentials>,
    /// [`crate::objects::Objects`], in a checkpoint that outlives the supervisor: what the descriptors were. They do
    /// not roll back; only cold recovery uses this.
    pub objects: Option<crate::cold::Seen>,
    /// [`Outside`], as it was then.
    pub outside: Option<Vec<u8>>,
}

/// [`Model::irregular`] of a checkpoint in the middle of a computation.
pub const PREEMPTED: &str = "a computation was preempted";

/// Credentials of the process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// Real, effective, saved user id.
    pub uids: [u32; 3],
    /// Real, effective, saved group id.
    pub gids: [u32; 3],
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// What others ask of the tracer, and what they may read.
#[derive(Debug, Default)]
pub struct Shared {
    /// A checkpoint is wanted.
    pub checkpoint: AtomicBool,
    /// The unit shall be ended.
    pub stop: AtomicBool,
    /// Events so far.
    pub events: AtomicU64,
    /// Bytes of them.
    pub log_bytes: AtomicU64,
    /// Calls on the slow path so far.
    pub slow: AtomicU64,
    /// Calls served in the process so far.
    pub fast: AtomicU64,
    /// Process id of the unit.
    pub pid: std::sync::atomic::AtomicI32,
    /// Checkpoints taken.
    pub checkpoints: AtomicU64,
}

/// A unit under supervision.
#[derive(Debug)]
pub struct Unit {
    /// The root process.
    pub pid: i32,
    /// The root process as the program knows it.
    pub vpid: i32,
    /// The kernel lets us choose process ids.
    pub set_tid: bool,
    /// Threads by the id that the program knows.
    pub threads: BTreeMap<i32, Thread>,
    /// The program's id by the kernel's.
    pub vtids: HashMap<i32, i32>,
    /// The thread that has the turn.
    pub current: Option<i32>,
    /// When it got it, `CLOCK_MONOTONIC` nanoseconds.
    pub turn_since: u64,
    /// Threads that can go on.
    pub ready: VecDeque<i32>,
    /// Number of events so far.
    pub sii: u64,
    /// What rolls back.
    pub model: Model,
    /// What does not.
    pub outside: Outside,
    /// Events are taken from the log.
    pub replaying: bool,
    /// The unit is a shadow (see [`crate::shadow`]): its execution must not reach the world.
    pub off_line: bool,
    /// Replay ends when the last thread has come to its next call; otherwise it is left on its way.
    pub arrive_last: bool,
    /// Signals that replay produced anew and the log has not delivered yet.
    pub regenerated: HashMap<i32, VecDeque<SigInfo>>,
    /// The log.
    pub log: crate::evlog::EventLog,
    /// Where new records are also sent to be kept on disk.
    pub journal: Option<crate::journal::Journal>,
    /// The newest checkpoint.
    pub snapshot: Option<Arc<Snapshot>>,
    /// Its pages.
    pub pages: crate::journal::SharedPages,
    /// Dirty-page tracking.
    pub tracker: Box<dyn ftrun_ckpt::dirty::DirtyTracker + Send>,
    /// Descriptor work.
    pub service: Service,
    /// Asked and shown.
    pub shared: Arc<Shared>,
    /// Full status shown to users.
    pub status: Arc<std::sync::Mutex<crate::status::Status>>,
    /// Incarnation number.
    pub incarnation: u32,
    /// The program is ending by itself (status if known).
    pub ending: bool,
    /// A fault whose default action ends the program: signal and address.
    pub fault: Option<(i32, u64)>,
    /// Time between checkpoints, nanoseconds.
    pub checkpoint_every: u64,
    /// The files that memory is mapped from.
    pub mapped: ftrun_ckpt::files::Files,
    /// One of them has lost its name, and its content has to be kept before the process dies.
    pub lost_a_file: Arc<std::sync::atomic::AtomicBool>,
    /// When that was looked for last, `CLOCK_MONOTONIC` nanoseconds.
    pub files_looked_at: u64,
    /// Log bytes that make a checkpoint due.
    pub checkpoint_log: u64,
    /// When the last one was taken.
    pub checkpoint_at: u64,
    /// Expected time of replay that makes a checkpoint due, nanoseconds.
    pub replay_max: u64,
    /// What an event takes in replay, nanoseconds: as measured in the last recovery.
    pub(crate) replay_ns: u64,
    /// How long the last checkpoint kept the unit waiting, nanoseconds.
    pub(crate) pause_ns: u64,
    /// An unloggable call was made: a checkpoint must follow.
    pub unloggable: Option<String>,
    /// Signal masks of threads, read for a checkpoint since they last ran.
    pub(crate) masks: HashMap<i32, u64>,
    /// Results of futex calls that replay has tried ahead of their events.
    pub(crate) futex_results: HashMap<i32, i64>,
    /// When the running thread last came to a call.
    pub(crate) last_entry: u64,
    /// How written pages are found.
    pub(crate) backend: ftrun_ckpt::dirty::Kind,
    /// What is shared with the keeper.
    pub(crate) desk: Option<&'static crate::desk::Desk>,
    /// What outlives this supervisor, when its death is to be survived.
    pub(crate) standby: Option<crate::standby::Standby>,
    /// What holds the descriptors, when the death of the keeper is to be survived, too.
    pub(crate) hold: Option<crate::hold::Hold>,
    /// What brings events to stable storage, when the loss of the machine is to be survived.
    pub(crate) recorder: Option<crate::recorder::Recorder>,
    /// The queue of outputs is being emptied.
    pub(crate) has_outputs: bool,
    /// The output that is being made: what comes out if nothing stands in its way, and the last event that it
    /// depends on.
    pub(crate) expected: Option<(i64, u64)>,
    /// What was last kept there of the outside world.
    pub(crate) kept_outside: Vec<u8>,
    /// The signal of a fault that made the unit fail.
    pub(crate) failed_signal: Option<i32>,
    /// Signs of life.
    pub(crate) pulse: crate::pulse::Pulse,
    /// When the running thread was last asked to pass the turn.
    pub(crate) last_tick: u64,
    /// Every thread has looked at the signals kept for any of them.
    pub(crate) offered: bool,
    /// Calls may be served inside the process.
    pub(crate) shim: bool,
    /// Call sites by the address at which their stubs stop.
    pub(crate) stubs: HashMap<u64, u64>,
    /// What is known of instructions in the files that the program has mapped.
    pub(crate) scans: crate::scan::Scanned,
    /// Address of the kernel's clock in the unit, 0 if there is none.
    pub(crate) vdso_clock: u64,
    /// Slow calls by site.
    pub(crate) hot: crate::hot::Hot,
    /// What is known of padding in the files that the program has mapped.
    pub(crate) files: crate::patch::Files,
    /// The processor that the unit is bound to.
    pub(crate) cpu: Option<u32>,
    /// The processors that it was given.
    pub(crate) given_cpus: Vec<u8>,
    /// The call being made took a pending signal of the unit: replay must take it, too.
    pub(crate) took_signal: bool,
    /// What was last seen of the descriptors.
    pub(crate) look: crate::objects::look::Look,
    /// What has to be looked at again.
    pub(crate) changed: crate::cold::Changed,
    /// In cold recovery, until the objects have been made: what they are by now.
    pub(crate) cold: Option<crate::objects::Objects>,
    /// The call of which nobody knows what became of it.
    pub(crate) in_doubt: Option<crate::cold::InDoubt>,
    /// Cold recovery goes on without descriptors that cannot be made again.
    pub(crate) lossy: bool,
    pub(crate) record: RecordBuf,
}

impl Unit {
    /// A unit that has not been started.
    pub fn new(
        service: Service,
        log: crate::evlog::EventLog,
        shared: Arc<Shared>,
        status: Arc<std::sync::Mutex<crate::status::Status>>,
        backend: ftrun_ckpt::dirty::Kind,
    ) -> Self {
        Self {
            pid: 0,
            vpid: 0,
            set_tid: false,
            threads: BTreeMap::new(),
            vtids: HashMap::new(),
            current: None,
            turn_since: 0,
            ready: VecDeque::new(),
            sii: 0,
            model: Model::default(),
            outside: Outside::default(),
            replaying: false,
            off_line: false,
            arrive_last: false,
            regenerated: HashMap::new(),
            log,
            journal: None,
            snapshot: None,
            pages: Arc::default(),
            tracker: Box::new(ftrun_ckpt::dirty::Full::new()),
            service,
            shared,
            status,
            incarnation: 1,
            ending: false,
            fault: None,
            checkpoint_every: 1_000_000_000,
            mapped: ftrun_ckpt::files::Files::default(),
            lost_a_file: Arc::default(),
            files_looked_at: 0,
            checkpoint_log: 64 << 20,
            checkpoint_at: 0,
            replay_max: 150_000_000,
            replay_ns: 25_000,
            pause_ns: 0,
            unloggable: None,
            masks: HashMap::new(),
            futex_results: HashMap::new(),
            last_entry: 0,
            backend,
            desk: None,
            standby: None,
            hold: None,
            recorder: None,
            has_outputs: false,
            expected: None,
            kept_outside: Vec::new(),
            failed_signal: None,
            pulse: crate::pulse::Pulse::default(),
            last_tick: 0,
            offered: false,
            shim: false,
            stubs: HashMap::new(),
            scans: crate::scan::Scanned::default(),
            vdso_clock: 0,
            hot: crate::hot::Hot::default(),
            files: crate::patch::Files::default(),
            cpu: None,
            given_cpus: Vec::new(),
            took_signal: false,
            look: crate::objects::look::Look::default(),
            changed: crate::cold::Changed::default(),
            cold: None,
            in_doubt: None,
            lossy: false,
            record: RecordBuf::new(Kind::Call),
        }
    }

    /// The thread with the program's id `vtid`.
    ///
    /// # Panics
    /// When there is none: callers take ids from the table itself.
    pub fn thread(&mut self, vtid: i32) -> &mut Thread {
        match self.threads.get_mut(&vtid) {
            Some(t) => t,
            None => panic!("no thread {vtid} in the unit"),
        }
    }

    /// The parent that the program knows: the keeper, which the user started and which outlives supervisors.
    pub(crate) fn parent(&self) -> i32 {
        self.desk.map_or(std::process::id() as i32, |d| d.keeper.load(std::sync::atomic::Ordering::SeqCst))
    }

    /// A thread of the unit, or the unit itself; 0 stands for the caller.
    pub(crate) fn is_own(&self, id: i32) -> bool {
        id == 0 || id == self.vpid || self.threads.contains_key(&id)
    }

    /// The arguments with which the unit makes a call, live as in replay: the kernel's process and thread ids,
    /// and pages that are given up at once rather than when the kernel likes.
    pub(crate) fn real_ids(&self, row: &ftrun_abi::table::Row, args: &[u64; 6]) -> [u64; 6] {
        let mut real = *args;
        for (i, arg) in row.args.iter().enumerate() {
            if *arg == ftrun_abi::table::Arg::Pid && args[i] != 0 && self.is_own(args[i] as i32) {
                real[i] = self.real_id(args[i] as i32) as u64;
            }
        }
        if i64::from(row.nr) == libc::SYS_madvise && args[2] as i32 == libc::MADV_FREE {
            real[2] = libc::MADV_DONTNEED as u64;
        }
        real
    }

    /// The kernel's id of a thread.
    pub fn tid(&self, vtid: i32) -> i32 {
        self.threads.get(&vtid).map_or(-1, |t| t.tid)
    }

    /// Appends the record under construction to the log as the next event.
    ///
    /// # Errors
    /// The log is full, and its events are still needed.
    pub fn append(&mut self, vtid: i32, nr: u16, result: i64, digest: u64, flags: u32) -> Result<()> {
        let sii = self.sii + 1;
        // What the event changes of the outside world has been changed, and holds when it is in the log.
        self.keep_outside(sii);
        self.record.tid(vtid as u32).nr(nr).flags(flags).result(result).digest(digest).sii(sii);
        let record = self.record.finish();
        if self.log.append(record).is_err() {
            if let Some(journal) = &mut self.journal {
                journal.make_room();
            }
            if let Some(standby) = &self.standby {
                standby.make_room();
            }
            if let Some(recorder) = &self.recorder {
                recorder.make_room(self.log.control()).map_err(Halt::Broken)?;
            }
            if self.log.append(record).is_err() {
                return Err(Halt::Broken("the event log is full of events without a checkpoint".into()));
            }
        }
        self.sii = sii;
        let control = self.log.control();
        for now in [&control.sii, &control.needed] {
            now.store(sii, std::sync::atomic::Ordering::SeqCst);
        }
        control.last_tid.store(vtid as u64, std::sync::atomic::Ordering::SeqCst);
        if let Some(journal) = &mut self.journal {
            journal.follow(&self.log);
        }
        self.publish_events();
        Ok(())
    }

    /// Lets others see what has been counted in the log.
    pub(crate) fn publish_events(&self) {
        use std::sync::atomic::Ordering::Relaxed;
        self.shared.events.store(self.sii, Relaxed);
        self.shared.log_bytes.store(self.log.bytes_so_far(), Relaxed);
        self.shared.fast.store(self.log.control().fast.load(Relaxed), Relaxed);
    }

    /// Starts a record.
    pub fn begin_record(&mut self, kind: Kind) {
        self.record.reset(kind);
    }

    /// Lets a thread go on in the program with its registers.
    pub fn resume(&mut self, vtid: i32) -> Result<()> {
        let t = self.thread(vtid);
        t.regs.orig_rax = u64::MAX;
        t.state = State::Running;
        t.place = Place::Program;
        t.xstate = None;
        t.yielded = false;
        let (tid, regs) = (t.tid, t.regs);
        self.masks.remove(&vtid);
        self.current = Some(vtid);
        self.allow_shim();
        tracee::set_regs(tid, &regs)?;
        tracee::cont(tid, 0)?;
        Ok(())
    }

    /// Runs a call inside the unit in the name of a stopped thread. Signals that arrive are kept.
    pub fn gate(&mut self, vtid: i32, nr: libc::c_long, args: [u64; 6]) -> Result<i64> {
        let t = self.thread(vtid);
        let (tid, regs) = (t.tid, t.regs);
        t.place = Place::Stopped;
        let mut caught = Vec::new();
        let r = crate::launch::gate_call(tid, &regs, nr as u64, args, &mut |info| caught.push(info));
        for info in caught {
            self.keep_signal(vtid, info);
        }
        Ok(r?)
    }

    /// Takes a thread out of its wait; it stands in a stop afterwards.
    pub fn unpark(&mut self, vtid: i32) -> Result<()> {
        let t = self.thread(vtid);
        let tid = t.tid;
        match t.place {
            Place::Parked => {}
            Place::Waiting => return self.call_in(vtid),
            Place::Stopped | Place::Program => return Ok(()),
        }
        tracee::interrupt(tid)?;
        loop {
            match tracee::wait_one(tid)? {
                tracee::Event::Stop(_) | tracee::Event::Seccomp => break,
                tracee::Event::Signal(_) => {
                    let info = tracee::get_siginfo(tid)?;
                    self.keep_signal(vtid, info);
                    tracee::cont(tid, 0)?;
                }
                tracee::Event::Other(_) => tracee::cont(tid, 0)?,
                tracee::Event::Ended(_) => return Err(Halt::Died),
            }
        }
        self.thread(vtid).place = Place::Stopped;
        Ok(())
    }

    /// Puts a thread on the list of those that can go on.
    pub fn make_ready(&mut self, vtid: i32) {
        if !self.ready.contains(&vtid) {
            self.ready.push_back(vtid);
        }
    }

    /// The kernel's id for an id of the program (a thread, the unit, or anybody else).
    pub fn real_id(&self, id: i32) -> i32 {
        if id == self.vpid {
            return self.pid;
        }
        self.threads.get(&id).map_or(id, |t| t.tid)
    }

    /// First scratch slot that no thread uses.
    pub fn free_slot(&self) -> usize {
        (1..).find(|s| self.threads.values().all(|t| t.slot != *s)).unwrap_or(1)
    }

    /// Flags for a signal event.
    pub fn signal_flags(after: bool, suspended: bool) -> u32 {
        (if after { flag::AFTER_CALL } else { 0 }) | (if suspended { flag::SUSPENDED } else { 0 })
    }
}

/// `CLOCK_MONOTONIC` in nanoseconds.
pub fn now() -> u64 {
    let mut ts = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `ts` outlives the call.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut ts) };
    ts.tv_sec as u64 * 1_000_000_000 + ts.tv_nsec as u64
}
