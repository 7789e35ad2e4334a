//! Calls that change the process's own memory. They are made again in replay, at the addresses that were
//! logged. What concerns code is the supervisor's.

use core::sync::atomic::Ordering::Relaxed;

use ftrun_abi::fast::{Control, REGION_BASE, REGION_END};
use ftrun_abi::record::HEADER_BYTES;

use crate::call::{Call, syscall};
use crate::log::{has_room, log};
use crate::nr;

/// `PROT_READ | PROT_WRITE`
const PROT_PLAIN: u64 = 3;
const MAP_PRIVATE: u64 = 2;
const MAP_FIXED: u64 = 0x10;
const MAP_ANONYMOUS: u64 = 0x20;
const MAP_NORESERVE: u64 = 0x4000;
const MAP_STACK: u64 = 0x20000;
const MREMAP_MAYMOVE: u64 = 1;
const MREMAP_FIXED: u64 = 2;
const MADV_DONTNEED: u64 = 4;

/// No code, and nothing of ours, is in this memory.
fn is_plain(control: &Control, at: u64, len: u64) -> bool {
    let Some(end) = at.checked_add(len.next_multiple_of(4096)) else { return false };
    if at < REGION_END && end > REGION_BASE {
        return false;
    }
    let ranges = control.code_ranges.load(Relaxed) as usize;
    control.code[..ranges].iter().all(|[first, last]| end <= first.load(Relaxed) || at >= last.load(Relaxed))
}

/// The call is one of those that are served here.
fn is_served(control: &Control, call: &Call) -> bool {
    let [at, len, a2, a3, ..] = call.args;
    match call.number {
        nr::MMAP => {
            a2 & !PROT_PLAIN == 0
                && a3 & (MAP_PRIVATE | MAP_ANONYMOUS) == MAP_PRIVATE | MAP_ANONYMOUS
                && a3 & !(MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK) == 0
        }
        nr::MUNMAP => is_plain(control, at, len),
        nr::MREMAP => a3 & !MREMAP_MAYMOVE == 0 && len > 0 && is_plain(control, at, len.max(a2)),
        nr::MPROTECT => a2 & !PROT_PLAIN == 0 && is_plain(control, at, len),
        nr::MADVISE => a2 == MADV_DONTNEED && is_plain(control, at, len),
        _ => false,
    }
}

/// Makes the call and logs it. Killed before that, the process is gone with its memory.
pub(crate) fn change(control: &Control, call: &Call) -> Option<i64> {
    if !is_served(control, call) || !has_room(control, HEADER_BYTES) {
        return None;
    }
    let digest = call.digest()?;
    let result = call.make();
    log(control, call, digest, result, &[])
}

/// Makes a call that had this result again. False when it is not one of these.
pub(crate) fn change_again(call: &Call, result: i64) -> bool {
    let [at, len, a2, a3, a4, a5] = call.args;
    let again = match call.number {
        _ if (-4095..0).contains(&result) => return true,
        nr::MMAP => [result as u64, len, a2, a3 | MAP_FIXED, a4, a5],
        nr::MREMAP if result as u64 != at => [at, len, a2, a3 | MREMAP_MAYMOVE | MREMAP_FIXED, result as u64, 0],
        nr::MUNMAP | nr::MREMAP | nr::MPROTECT | nr::MADVISE => call.args,
        _ => return true,
    };
    syscall(call.number, again) == result
}
