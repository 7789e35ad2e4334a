//! The time, without a system call where the kernel's own code can be asked.

use core::sync::atomic::Ordering::Relaxed;

use ftrun_abi::fast::Control;
use ftrun_abi::record::HEADER_BYTES;

use crate::call::{Call, syscall};
use crate::log::{DATA, commit, fill, ring, size};
use crate::nr;

const CLOCK_REALTIME: u64 = 0;
const CLOCK_MONOTONIC: u64 = 1;
const CLOCK_REALTIME_COARSE: u64 = 5;

/// The kernel's own code can be asked for the time.
fn available(control: &Control) -> bool {
    control.clock_gettime.load(Relaxed) != 0
}

/// `__vdso_clock_gettime`; only where [`available`] says that it is there.
fn function(control: &Control) -> extern "C" fn(u64, &mut [u64; 2]) -> i64 {
    // SAFETY: the supervisor put the address of that function there, which has this signature.
    unsafe { core::mem::transmute(control.clock_gettime.load(Relaxed)) }
}

/// `CLOCK_MONOTONIC` in nanoseconds.
pub(crate) fn monotonic(control: &Control) -> u64 {
    let mut now = [0u64; 2];
    if available(control) {
        function(control)(CLOCK_MONOTONIC, &mut now);
    } else {
        syscall(nr::CLOCK_GETTIME, [CLOCK_MONOTONIC, (&raw mut now) as u64, 0, 0, 0, 0]);
    }
    now[0] * 1_000_000_000 + now[1]
}

/// The clock that a call asks for, and where the time goes (0: nowhere); `None` when only the kernel knows it.
fn question(call: &Call) -> Option<(u64, u64)> {
    let [a0, a1, ..] = call.args;
    match call.number {
        nr::CLOCK_GETTIME if matches!(a0, 0 | 1 | 4..=7) && a1 != 0 => Some((a0, a1)),
        nr::GETTIMEOFDAY if a0 != 0 && a1 == 0 => Some((CLOCK_REALTIME, a0)),
        nr::TIME if a0 == 0 => Some((CLOCK_REALTIME_COARSE, 0)),
        _ => None,
    }
}

/// `clock_gettime`, `gettimeofday` or `time` without a system call.
pub(crate) fn time(control: &Control, call: &Call) -> Option<i64> {
    let (clock, to) = question(call).filter(|_| available(control))?;
    let ask = function(control);
    let digest = call.digest()?;
    let mut ring = ring(control)?;
    let mut now = [0u64; 2];
    let record = ring.reserve(if to == 0 { HEADER_BYTES } else { size(16) })?;
    if ask(clock, &mut now) != 0 {
        return None;
    }
    // Word by word, as they were written: reading both at once would wait for the writes.
    let [seconds, mut part] = now.map(core::hint::black_box);
    if call.number == nr::GETTIMEOFDAY {
        part /= 1000;
    }
    let result = if call.number == nr::TIME { seconds as i64 } else { 0 };
    if to != 0 {
        // SAFETY: `size` made room behind the two headers; the program's memory may fault, which the
        // supervisor handles.
        unsafe {
            let logged = record.as_mut_ptr().add(DATA).cast::<u64>();
            logged.write(seconds);
            logged.add(1).write(part);
            (to as *mut u64).write_unaligned(seconds);
            (to as *mut u64).add(1).write_unaligned(part);
        }
    }
    fill(record, control, call, digest, result, (to != 0).then_some((to, 16)));
    commit(control, &mut ring);
    Some(result)
}
