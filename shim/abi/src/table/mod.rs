//! The table of system calls: one row a call, the single truth for the tracer, the seccomp filter,
//! the replayer, the shim, `ftrun log` and the tests.
//!
//! A row says how a call is treated ([`Class`]), who executes it ([`Place`]), how it may block
//! ([`Wait`]) and what each argument points to ([`Arg`]). From that the supervisor marshals
//! arguments, logs outputs, computes digests, waits and prints. Rows marked [`Row::irregular`] have
//! a hand-written handler in the supervisor; their argument descriptions still serve digests and
//! printing.

mod rows;

pub use rows::ROWS;

/// How a call is treated while recording and in replay (DESIGN section 4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Depends on and changes the process alone: executed again in replay, result compared.
    Local,
    /// Brings something in from outside: result and outputs are logged, not executed in replay.
    Input,
    /// Can be seen from outside: executed once, after output commit; replay returns the logged result.
    Output,
    /// Makes, changes or drops a kernel object (descriptor).
    Object,
    /// Threads, processes, images, signals: hand-written.
    Control,
    /// Answered with the errno in [`Row::deny_errno`] so that programs fall back.
    Deny,
    /// Not understood: executed in the unit, and the interval is unloggable (a checkpoint follows).
    Unknown,
}

/// Who executes the call while recording.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The supervisor, on the descriptor table and directory that it shares with the unit. The unit
    /// can be killed at any instant and the effect and its log entry stay together.
    Supervisor,
    /// The thread itself, because the call concerns its own process (memory, signals, credentials).
    Unit,
}

/// How a call may block, so that the supervisor can try it first and let the thread wait in a call
/// without side effects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Never blocks for long (files on disk count as that).
    Never,
    /// Until the descriptor in argument `.0` is readable, unless it is in nonblocking mode.
    Readable(u8),
    /// Until the descriptor in argument `.0` is writable, unless it is in nonblocking mode.
    Writable(u8),
    /// By rules of its own (futex, poll, sleep, wait4, ...): the handler knows.
    Special,
}

/// A length in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Len {
    /// A constant.
    Fixed(u32),
    /// The value of argument `.0`.
    Arg(u8),
    /// The value of argument `.0` times `.1`.
    ArgTimes(u8, u32),
    /// The `u32` that argument `.0` points to, before the call (socklen_t).
    U32At(u8),
}

/// How much of an output buffer the call really wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Used {
    /// All of its capacity, when the call succeeds (result >= 0).
    All,
    /// `result` bytes.
    Result,
    /// `result` times `.0` bytes.
    ResultTimes(u32),
    /// The `u32` that argument `.0` points to after the call, at most the capacity (socklen_t).
    U32At(u8),
}

/// What an argument is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arg {
    /// A number, printed in decimal.
    Int,
    /// Flags, a mode or a command, printed in hexadecimal.
    Hex,
    /// An address that the call does not read or write through (mmap's hint, a futex word, ...).
    Addr,
    /// A descriptor.
    Fd,
    /// A directory descriptor or `AT_FDCWD`.
    DirFd,
    /// A process or thread id.
    Pid,
    /// A signal number.
    Sig,
    /// NUL-terminated path.
    Path,
    /// NUL-terminated string that is not a path.
    Str,
    /// Memory that the call reads.
    In(Len),
    /// Memory that the call writes: capacity and how much is used.
    Out(Len, Used),
    /// Memory that the call reads and writes.
    InOut(Len),
    /// Array of `struct iovec` that the call reads from; the count is argument `.0`.
    IovIn(u8),
    /// Array of `struct iovec` that the call writes to; the count is argument `.0`; `result` bytes used.
    IovOut(u8),
    /// `struct msghdr` for sending.
    MsgIn,
    /// `struct msghdr` for receiving; `result` bytes used.
    MsgOut,
}

/// One system call, or one command of a call such as `ioctl`.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Number on x86-64.
    pub nr: u16,
    /// Name as in the manual pages, section 2.
    pub name: &'static str,
    /// Treatment.
    pub class: Class,
    /// Executor.
    pub place: Place,
    /// Blocking.
    pub wait: Wait,
    /// One entry per argument.
    pub args: &'static [Arg],
    /// The supervisor has a hand-written handler for it.
    pub irregular: bool,
    /// The errno answered for [`Class::Deny`], 0 otherwise.
    pub deny_errno: i32,
    /// A limitation or reason, for the manual; empty if there is none.
    pub note: &'static str,
}
