//! A call of the program, its digest, and system calls of our own.

use core::arch::asm;

use ftrun_abi::record::Digest;
use ftrun_abi::table::{self, Arg, Row};

pub(crate) const EINTR: i64 = -4;
pub(crate) const EAGAIN: i64 = -11;
pub(crate) const EFAULT: i64 = -14;

/// Longest string that a call is given, bytes.
const STRING_MAX: usize = 4096;
/// Longest memory that a call is given, bytes: the supervisor cuts longer ones.
const BUFFER_MAX: u64 = 16 << 20;

/// A call that a thread is about to make.
#[derive(Clone, Copy)]
pub(crate) struct Call {
    /// The thread, as the program knows it.
    pub(crate) tid: u64,
    pub(crate) number: u64,
    pub(crate) args: [u64; 6],
    /// The thread's slot for waiting.
    pub(crate) slot: usize,
}

impl Call {
    /// What the table says of it.
    pub(crate) fn row(&self) -> Option<&'static Row> {
        table::find(self.number, &self.args)
    }

    /// The digest of number, arguments and memory, as the supervisor computes it; `None` when that is too
    /// much for us. Reading the program's memory may fault, which the supervisor handles.
    #[inline]
    pub(crate) fn digest(&self) -> Option<u64> {
        let Some(args) = table::plain_args(self.number) else { return self.digest_by(self.row()?) };
        let mut d = Digest::new();
        d.add_u64(self.number);
        for value in self.args.iter().take(args) {
            d.add_u64(*value);
        }
        Some(d.finish())
    }

    /// The same, by the row of the call.
    pub(crate) fn digest_by(&self, row: &Row) -> Option<u64> {
        let mut d = Digest::new();
        d.add_u64(self.number);
        for (arg, value) in row.args.iter().zip(self.args) {
            d.add_u64(value);
            if value == 0 {
                continue;
            }
            match *arg {
                Arg::Path | Arg::Str => d.add_bytes(string(value)?),
                Arg::In(len) | Arg::InOut(len) => {
                    let n = len.bytes(&self.args, |at| Some(word(at))).filter(|n| *n <= BUFFER_MAX)?;
                    // SAFETY: the program gave this memory to its call.
                    d.add_bytes(unsafe { bytes(value, n) });
                }
                Arg::IovIn(count) => add_pieces(&mut d, value, self.args[usize::from(count)]),
                Arg::MsgIn => {
                    let header = message_header(value);
                    // No name and no ancillary data: other messages are not served here.
                    d.add_bytes(&[]);
                    d.add_bytes(&[]);
                    add_pieces(&mut d, header[2], header[3]);
                }
                _ => {}
            }
        }
        Some(d.finish())
    }

    /// Makes the call as it is.
    pub(crate) fn make(&self) -> i64 {
        syscall(self.number, self.args)
    }
}

/// `struct msghdr` in words: name, its length, pieces, their number, ancillary data, its length, flags.
pub(crate) fn message_header(at: u64) -> [u64; 7] {
    // SAFETY: the program gave this structure to its call; a fault there is the supervisor's to handle.
    unsafe { (at as *const [u64; 7]).read_unaligned() }
}

/// `struct iovec` number `i`: address and length.
pub(crate) fn piece(pieces: u64, i: u64) -> [u64; 2] {
    // SAFETY: as for `message_header`.
    unsafe { ((pieces + i * 16) as *const [u64; 2]).read_unaligned() }
}

/// A `u32` of the program.
pub(crate) fn word(at: u64) -> u32 {
    // SAFETY: as for `message_header`.
    unsafe { (at as *const u32).read_unaligned() }
}

fn add_pieces(d: &mut Digest, pieces: u64, count: u64) {
    for i in 0..count {
        let [at, len] = piece(pieces, i);
        // SAFETY: memory that the program gave to its call.
        d.add_bytes(unsafe { bytes(at, len) });
    }
}

/// A string without its end; `None` when it is too long.
fn string(at: u64) -> Option<&'static [u8]> {
    for n in 0..STRING_MAX {
        // SAFETY: as for `message_header`.
        if unsafe { (at as *const u8).add(n).read() } == 0 {
            // SAFETY: the bytes have just been read.
            return Some(unsafe { bytes(at, n as u64) });
        }
    }
    None
}

/// Memory of the program as a slice.
///
/// # Safety
/// The program handed it to a call that reads it, and no other thread runs.
pub(crate) unsafe fn bytes<'a>(at: u64, len: u64) -> &'a [u8] {
    if at == 0 {
        return &[];
    }
    // SAFETY: by the contract of this function.
    unsafe { core::slice::from_raw_parts(at as *const u8, len as usize) }
}

/// Makes a system call.
pub(crate) fn syscall(nr: u64, args: [u64; 6]) -> i64 {
    let result;
    // SAFETY: the callers pass what the call asks for; the kernel checks addresses.
    unsafe {
        asm!("syscall", inlateout("rax") nr => result, in("rdi") args[0], in("rsi") args[1], in("rdx") args[2],
            in("r10") args[3], in("r8") args[4], in("r9") args[5], out("rcx") _, out("r11") _);
    }
    result
}
