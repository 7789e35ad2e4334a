//! The layout of one event: a fixed header and the memory that the event wrote.

/// What kind of event a record describes. Values are part of the log format: append only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// A system call was completed with `result` and the outputs in the payload.
    Call = 1,
    /// A signal was delivered; the payload's only output is its `siginfo_t` (128 bytes, address 0).
    Signal = 2,
    /// A thread that stood in user code (new, or preempted) was given the turn.
    Sched = 3,
    /// A trapped instruction (`rdtsc`, `rdtscp`, `cpuid`) was given its result.
    Insn = 4,
    /// The unit ended by itself; `result` is its wait status.
    Exit = 5,
    /// The unit executed a new program image; a checkpoint follows.
    Exec = 6,
}

/// Header of a record, 48 bytes, little endian.
///
/// | offset | field |
/// |---|---|
/// | 0 | `len`: whole record in bytes, header included, a multiple of 8 |
/// | 4 | `kind` |
/// | 6 | `nr`: system call number, or signal number for `Kind::Signal` |
/// | 8 | `tid`: thread (as the program knows it) |
/// | 12 | `flags` |
/// | 16 | `sii`: state interval index that this event begins |
/// | 24 | `result` |
/// | 32 | `digest`: of the number, the arguments and the memory they point to |
/// | 40 | `outs`: number of outputs in the payload (u32), then 4 reserved bytes |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Header {
    /// Whole record in bytes.
    pub len: u32,
    /// A [`Kind`].
    pub kind: u16,
    /// System call or signal number.
    pub nr: u16,
    /// Thread id as the program knows it.
    pub tid: u32,
    /// Bits of [`flag`].
    pub flags: u32,
    /// State interval index.
    pub sii: u64,
    /// Result as the kernel returns it (negative errno on failure).
    pub result: i64,
    /// Digest of number, arguments and input memory.
    pub digest: u64,
    /// Number of outputs in the payload.
    pub outs: u32,
    /// Zero.
    pub reserved: u32,
}
