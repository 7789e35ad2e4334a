//! The table of system calls: one row a call, the single truth for the tracer, the seccomp filter,
//! the replayer, the shim, `ftrun log` and the tests.
//!
//! A row says how a call is treated ([`Class`]), who executes it ([`Place`]), how it may block
//! ([`Wait`]) and what each argument points to ([`Arg`]). From that the supervisor marshals
//! arguments, logs outputs, computes digests, waits and prints. Rows marked
//! [`field@Row::irregular`] have a hand-written handler in the supervisor; their argument
//! descriptions still serve digests and printing.
//!
//! [`lookup`] is the way in: it also tells the commands of `fcntl`, `ioctl`, `prctl` and others
//! apart ([`COMMANDS`]).

mod commands;
mod file;
mod ioctl;
mod make;
mod memory;
mod net;
mod other;
mod process;
mod rows;
mod seen;
mod signal;
mod time;

#[cfg(test)]
mod tests;

pub use commands::COMMANDS;
pub use rows::ROWS;
pub use seen::is_seen;

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

/// What a call that succeeded changes of descriptors, of the directory, or of the names of files: what recovery has to
/// know when the kernel's objects are gone, too. Numbers are those of arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing of these.
    None,
    /// The result is a new descriptor of the file whose path is `.0`, after its directory if there is one; the flags
    /// follow (`creat` has none, `openat2` has them in memory).
    Open(u8),
    /// The result is a new file without a name.
    MemoryFile,
    /// The result is a new socket.
    Socket,
    /// Argument 3 is given a pair of sockets.
    Pair,
    /// The result is a connection that was waiting at argument 0.
    Accept,
    /// The socket is connected, or begins to be.
    Connect,
    /// The socket gets an address.
    Bind,
    /// The address of a socket is told.
    Name,
    /// The socket waits for connections.
    Listen,
    /// An option of the socket is set.
    Option,
    /// The stream ends in one direction, or both.
    Shut,
    /// Argument 0 is given both ends of a pipe; the flags follow, if there are any.
    Pipe,
    /// The pipe gets another capacity: argument 2.
    Capacity,
    /// The file in memory gets seals: argument 2.
    Seal,
    /// The result is a new epoll set.
    Epoll,
    /// A descriptor enters an epoll set, is changed there, or leaves it.
    Enrol,
    /// The result is a new eventfd.
    Counter,
    /// The result is a new timerfd.
    Timer,
    /// The timerfd is set.
    SetTimer,
    /// The result is a signalfd, a new one or argument 0.
    Signals,
    /// The result is another descriptor for argument 0.
    Duplicate,
    /// Argument 1 becomes another descriptor for argument 0.
    Onto,
    /// The descriptor is closed.
    Close,
    /// Descriptors from argument 0 to 1 are closed.
    CloseRange,
    /// Argument 2 has the new status flags of the open file.
    Mode,
    /// Argument 2 points to the new value of `O_NONBLOCK`.
    NonBlocking,
    /// Bit 0 of argument 2 says whether the descriptor is closed by `execve`.
    OnExec,
    /// The descriptor is closed by `execve` from now on, or not.
    CloseOnExec(bool),
    /// The position in the file is the result.
    Seek,
    /// Data are taken from the file, the stream or the queue.
    Take,
    /// Entries are taken from a directory.
    TakeEntries,
    /// Data are given to it.
    Give,
    /// Data are given to it at the position in argument 3.
    GiveAt,
    /// The file gets the length in argument 1.
    Resize,
    /// The file's content is changed in another way.
    Rewrite,
    /// Data are moved: from argument `.0`, at the position that argument `.0 + 1` points to, to argument `.1`.
    Transfer(u8, u8),
    /// A record lock is taken or given back.
    Lock,
    /// A lock on the whole file is taken or given back.
    FileLock,
    /// The directory is the path in argument 0.
    Directory,
    /// The directory is the descriptor in argument 0.
    DirectoryOf,
    /// The umask is argument 0.
    Mask,
    /// The file with path `.0` gets the name `.1`.
    Rename(u8, u8),
    /// The name in argument `.0` is removed.
    Remove(u8),
    /// The name in argument `.0` is made.
    Make(u8),
    /// The result, if it is a descriptor, is of a kind that cannot be made again.
    Opaque,
}

/// A length in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Len {
    /// A constant.
    Fixed(u32),
    /// The value of argument `.0`.
    Arg(u8),
    /// The low 32 bits of argument `.0`, where the kernel takes an `int`.
    Arg32(u8),
    /// The low 32 bits of argument `.0` times `.1`.
    ArgTimes(u8, u32),
    /// The low 32 bits of argument `.0` less `.1` is a number of bits; the memory is the 64-bit
    /// words that hold them (`fd_set`, node masks).
    Bits(u8, u8),
    /// One byte for each page of 4 KiB that the length in argument `.0` touches (`mincore`).
    Pages(u8),
    /// The size in bits 16 to 29 of argument `.0`, an `ioctl` number.
    IocSize(u8),
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
    /// Array of addresses of strings, ended by NULL (`argv`, `envp`).
    Strings,
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Number on x86-64.
    pub nr: u16,
    /// Name as in the manual pages, section 2.
    pub name: &'static str,
    /// Name of the command, if the row is that of a command; empty otherwise.
    pub command: &'static str,
    /// Treatment.
    pub class: Class,
    /// Executor.
    pub place: Place,
    /// Blocking.
    pub wait: Wait,
    /// One entry per argument.
    pub args: &'static [Arg],
    /// What becomes of descriptors.
    pub effect: Effect,
    /// The supervisor has a hand-written handler for it.
    pub irregular: bool,
    /// The errno answered for [`Class::Deny`], 0 otherwise.
    pub deny_errno: i32,
    /// A limitation or reason, for the manual; empty if there is none.
    pub note: &'static str,
}

/// A command of a call whose arguments and treatment hang on the command: it applies where
/// `args[arg] & mask == value` and, if there is `also`, the low 32 bits of that argument match too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    /// Number of the call.
    pub nr: u16,
    /// The argument that selects.
    pub arg: u8,
    /// What it must be.
    pub value: u64,
    /// Which of its bits count.
    pub mask: u64,
    /// A second argument that must have this value in its low 32 bits.
    pub also: Option<(u8, u32)>,
    /// The row that then holds instead of the call's own.
    pub row: Row,
}

impl Command {
    /// Whether the command is the one that these arguments ask for.
    pub const fn matches(&self, args: &[u64; 6]) -> bool {
        args[self.arg as usize] & self.mask == self.value
            && match self.also {
                None => true,
                Some((arg, value)) => args[arg as usize] as u32 == value,
            }
    }
}

/// What selects a command, packed so that the search for it stays in few cache lines.
#[derive(Clone, Copy)]
struct Key {
    value: u32,
    mask: u32,
    arg: u8,
}

/// The keys of [`COMMANDS`].
static KEYS: [Key; COMMANDS.len()] = {
    let mut keys = [Key { value: 0, mask: 0, arg: 0 }; COMMANDS.len()];
    let mut i = 0;
    while i < keys.len() {
        let c = &COMMANDS[i];
        assert!(c.mask >> 32 == 0 && c.value & !c.mask == 0);
        keys[i] = Key { value: c.value as u32, mask: c.mask as u32, arg: c.arg };
        i += 1;
    }
    keys
};

/// For each number the first of its commands and the first that is no longer its.
static RANGES: [(u16, u16); rows::NUMBERS] = {
    let mut ranges = [(0, 0); rows::NUMBERS];
    let mut i = 0;
    while i < COMMANDS.len() {
        let range = &mut ranges[COMMANDS[i].nr as usize];
        if range.1 == 0 {
            range.0 = i as u16;
        } else {
            assert!(range.1 == i as u16, "the commands of a call stand apart");
        }
        range.1 = i as u16 + 1;
        i += 1;
    }
    ranges
};

/// The row of a number that the table does not have.
const UNLISTED: Row = Row {
    nr: u16::MAX,
    name: "unknown",
    command: "",
    class: Class::Unknown,
    place: Place::Unit,
    wait: Wait::Special,
    args: &[Arg::Hex; 6],
    effect: Effect::None,
    irregular: false,
    deny_errno: 0,
    note: "not in the table",
};

/// The row of a number, whatever the arguments.
pub fn by_number(nr: u64) -> Option<&'static Row> {
    let position = *rows::POSITIONS.get(usize::try_from(nr).ok()?)?;
    ROWS.get(usize::from(position))
}

/// For each number: how many arguments it has, if its digest is of the number and these alone because it is
/// given no memory to read and has no commands; otherwise [`READS`].
static PLAIN: [u8; rows::NUMBERS] = {
    let mut plain = [READS; rows::NUMBERS];
    let mut i = 0;
    while i < ROWS.len() {
        let (nr, args) = (ROWS[i].nr as usize, ROWS[i].args);
        let mut reads = RANGES[nr].1 != 0 || nr == ioctl::NR as usize;
        let mut a = 0;
        while a < args.len() {
            reads |= matches!(
                args[a],
                Arg::Path
                    | Arg::Str
                    | Arg::Strings
                    | Arg::In(_)
                    | Arg::InOut(_)
                    | Arg::IovIn(_)
                    | Arg::MsgIn
                    | Arg::MsgOut
            );
            a += 1;
        }
        if !reads {
            plain[nr] = args.len() as u8;
        }
        i += 1;
    }
    plain
};
const READS: u8 = u8::MAX;

/// How many arguments the call with this number has, if its digest is of the number and these alone.
#[inline]
pub fn plain_args(nr: u64) -> Option<usize> {
    PLAIN.get(nr as usize).filter(|n| **n != READS).map(|n| usize::from(*n))
}

/// The row of a name.
pub fn by_name(name: &str) -> Option<&'static Row> {
    ROWS.iter().find(|row| row.name == name)
}

/// The row for a call with these arguments: that of its command if the call has commands, and a
/// row of class [`Class::Unknown`] for a number without one (its `nr` is then `u16::MAX` if the
/// number does not fit).
pub fn lookup(nr: u64, args: &[u64; 6]) -> Row {
    match find(nr, args) {
        Some(row) => *row,
        None => Row { nr: u16::try_from(nr).unwrap_or(u16::MAX), ..UNLISTED },
    }
}

/// As [`lookup`], without a copy; `None` for a number without a row.
pub fn find(nr: u64, args: &[u64; 6]) -> Option<&'static Row> {
    let row = by_number(nr)?;
    let (first, end) = RANGES[usize::from(row.nr)];
    for i in usize::from(first)..usize::from(end) {
        let key = &KEYS[i];
        if args[usize::from(key.arg)] as u32 & key.mask == key.value && COMMANDS[i].matches(args) {
            return Some(&COMMANDS[i].row);
        }
    }
    Some(if row.nr == ioctl::NR { &ioctl::BY_SIZE[(args[1] >> 30 & 3) as usize] } else { row })
}

impl Len {
    /// The length in bytes, for these arguments. `u32_at` reads the `u32` at an address of the
    /// unit's memory; `None` where it cannot be read. The kernel refuses lengths that are too large
    /// or negative, so the caller needs a limit of its own.
    pub fn bytes(self, args: &[u64; 6], u32_at: impl FnOnce(u64) -> Option<u32>) -> Option<u64> {
        let low = |i: u8| args[usize::from(i)] & 0xffff_ffff;
        Some(match self {
            Len::Fixed(n) => u64::from(n),
            Len::Arg(i) => args[usize::from(i)],
            Len::Arg32(i) => low(i),
            Len::ArgTimes(i, size) => low(i) * u64::from(size),
            Len::Bits(i, less) => low(i).saturating_sub(u64::from(less)).div_ceil(64) * 8,
            Len::Pages(i) => args[usize::from(i)].div_ceil(4096),
            Len::IocSize(i) => args[usize::from(i)] >> 16 & 0x3fff,
            Len::U32At(i) => u64::from(u32_at(args[usize::from(i)])?),
        })
    }
}

impl Used {
    /// How many bytes of a buffer of `capacity` bytes the call wrote: none if it failed. `u32_at`
    /// is as for [`Len::bytes`], asked after the call.
    pub fn bytes(
        self,
        capacity: u64,
        result: i64,
        args: &[u64; 6],
        u32_at: impl FnOnce(u64) -> Option<u32>,
    ) -> Option<u64> {
        let Ok(result) = u64::try_from(result) else { return Some(0) };
        let used = match self {
            Used::All => capacity,
            Used::Result => result,
            Used::ResultTimes(size) => result.saturating_mul(u64::from(size)),
            Used::U32At(i) => u64::from(u32_at(args[usize::from(i)])?),
        };
        Some(used.min(capacity))
    }
}
