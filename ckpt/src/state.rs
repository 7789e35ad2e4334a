//! Plain data of a checkpoint, without the pages.

use serde::{Deserialize, Serialize};

/// Size of a page in bytes; the only size that the tool supports (x86-64 base pages).
pub const PAGE_BYTES: u64 = 4096;

/// First address behind those that a process can have.
pub const TASK_END: u64 = 0x7fff_ffff_f000;

/// Registers of one thread in the layout of `struct user_regs_struct` (sys/user.h), 27 words.
pub type Regs = [u64; 27];

/// One line of `/proc/PID/maps`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// First address after it.
    pub end: u64,
    /// `PROT_*` bits.
    pub prot: u32,
    /// Shared with others (`MAP_SHARED`), otherwise private.
    pub shared: bool,
    /// Grows downwards when touched below (`MAP_GROWSDOWN`: the main stack).
    pub grows_down: bool,
    /// Offset in the file, bytes.
    pub offset: u64,
    /// Device number of the file, 0 for anonymous memory.
    pub dev: u64,
    /// Inode of the file, 0 for anonymous memory.
    pub inode: u64,
    /// Path of the file, or a name such as `[heap]`, or empty.
    pub path: String,
}

/// Fields of `mm_struct` that the kernel shows in `/proc` and that `brk(2)` works from
/// (`struct prctl_mm_map`, see prctl(2) `PR_SET_MM`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are those of struct prctl_mm_map")]
pub struct MmFields {
    pub start_code: u64,
    pub end_code: u64,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub brk: u64,
    pub start_stack: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
    pub auxv: Vec<u8>,
    /// Path of the executable.
    pub exe: String,
}

/// One thread.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadState {
    /// Id as the program knows it.
    pub tid: i32,
    /// `/proc/PID/task/TID/comm`.
    pub comm: String,
    /// General registers. A thread inside a call stands before it: it will issue it again.
    pub regs: Regs,
    /// Extended state in the CPU's own layout and size (`NT_X86_XSTATE`).
    pub xstate: Vec<u8>,
    /// Blocked signals, bit n-1 for signal n.
    pub sigmask: u64,
    /// Alternate signal stack: address, size, flags (sigaltstack(2)).
    pub altstack: (u64, u64, u32),
    /// Address of the thread's `clear_child_tid` (set_tid_address(2)).
    pub clear_child_tid: u64,
    /// Head and length of the robust futex list (set_robust_list(2)).
    pub robust_list: (u64, u64),
}

/// A checkpoint without its pages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The checkpoint holds the state after this many events.
    pub sii: u64,
    /// Wall-clock time of the checkpoint, nanoseconds since the epoch.
    pub at_ns: u64,
    /// Incarnation of the unit that wrote it.
    pub incarnation: u32,
    /// Memory layout, ascending.
    pub maps: Vec<Mapping>,
    /// The files in it.
    pub files: Vec<crate::files::MappedFile>,
    /// Fields of the address space.
    pub mm: MmFields,
    /// Threads; the first is the main thread.
    pub threads: Vec<ThreadState>,
    /// Signal actions 1 to 64 as the kernel's `struct sigaction` (handler, flags, restorer, mask).
    pub sigactions: Vec<[u64; 4]>,
    /// The supervisor's model of everything else, in the supervisor's own encoding.
    pub model: Vec<u8>,
}
