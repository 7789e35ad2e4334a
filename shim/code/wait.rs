//! Calls that wait: first they look, then they wait in the kernel, if the supervisor allows that.

use core::sync::atomic::Ordering::{Relaxed, SeqCst};

use ftrun_abi::fast::{Control, EPOLL, EPOLL_EVENTS_MAX};
use ftrun_abi::record::HEADER_BYTES;

use crate::call::{Call, EFAULT, EINTR, syscall};
use crate::clock::monotonic;
use crate::log::{DATA, begin, commit, end, fill, has_room, log, ring, seam, size};
use crate::memory::copy;
use crate::nr;

const MILLISECOND: u64 = 1_000_000;
const SECOND: u64 = 1_000_000_000;
/// Most entries of a `poll` that is served here.
const POLL_MAX: usize = 256;
/// `CLOCK_MONOTONIC` nanoseconds that never come.
const NEVER: u64 = u64::MAX;

/// `epoll_wait`.
pub(crate) fn epoll(control: &mut Control, call: &Call) -> Option<i64> {
    let [fd, to, max, timeout, ..] = call.args;
    let (max, timeout) = (max as i32, timeout as i32);
    if max <= 0 || to == 0 {
        return None;
    }
    let digest = call.digest()?;
    let room = (max as usize).min(EPOLL_EVENTS_MAX);
    if !has_room(control, size(room as u64 * 12)) {
        return None;
    }
    for event in &mut control.events[..room] {
        // An event that was reported is never 0.
        event[..4].fill(0);
    }
    let events = (&raw const control.events) as u64;
    begin(control, EPOLL, call, digest, to);
    seam(control);
    let look = |ms: u64| syscall(nr::EPOLL_WAIT, [fd, events, room as u64, ms, 0, 0]);
    let mut n = look(0);
    if n == 0 && timeout != 0 {
        let limit = if timeout < 0 { NEVER } else { timeout as u64 * MILLISECOND };
        n = wait(control, digest, limit, look);
        if n == 0 {
            end(control);
            return log(control, call, digest, 0, &[]);
        }
    }
    seam(control);
    if n < 0 {
        end(control);
        return None;
    }
    let mut ring = ring(control)?;
    let out = (n > 0).then_some((to, n as u64 * 12));
    let record = ring.reserve(out.map_or(HEADER_BYTES, |o| size(o.1)))?;
    if n > 0 {
        // SAFETY: `size` made room behind the two headers.
        unsafe { copy(record.as_mut_ptr().add(DATA), events as *const u8, n as usize * 12) };
    }
    fill(record, control, call, digest, n, out);
    commit(control, &mut ring);
    seam(control);
    end(control);
    // SAFETY: the program's buffer; a fault there is the supervisor's to handle.
    unsafe { copy(to as *mut u8, events as *const u8, n as usize * 12) };
    Some(n)
}

/// `poll`, and `ppoll` without a signal mask. Asking changes nothing but the program's memory.
pub(crate) fn poll(control: &Control, call: &Call) -> Option<i64> {
    let [fds, count, timeout, mask, ..] = call.args;
    if count > POLL_MAX as u64 || (count > 0 && fds == 0) {
        return None;
    }
    let limit = match call.number {
        nr::POLL if (timeout as i32) < 0 => NEVER,
        nr::POLL => timeout as u32 as u64 * MILLISECOND,
        _ if mask != 0 => return None,
        _ => duration(timeout)?,
    };
    let digest = call.digest()?;
    if !has_room(control, size(count * 8)) {
        return None;
    }
    // A copy: what the program sees, and what the supervisor takes for the call's input, changes in the end.
    let mut entries = [[0u8; 8]; POLL_MAX];
    let at = entries.as_mut_ptr().cast::<u8>();
    let bytes = count as usize * 8;
    // SAFETY: the program gave this memory to its call, and there is room for so many entries.
    unsafe { copy(at, fds as *const u8, bytes) };
    let look = |ms: u64| syscall(nr::POLL, [at as u64, count, ms, 0, 0, 0]);
    let mut n = look(0);
    if n == 0 && limit != 0 {
        n = wait(control, digest, limit, look);
    }
    if n < 0 {
        return None;
    }
    // SAFETY: as above.
    unsafe { copy(fds as *mut u8, at, bytes) };
    let outs = [(fds, bytes as u64)];
    log(control, call, digest, n, if count > 0 { &outs } else { &[] })
}

/// `nanosleep`, and `clock_nanosleep` for a time from now.
pub(crate) fn sleep(control: &Control, call: &Call) -> Option<i64> {
    const CLOCKS: u64 = 2;
    let request = match call.number {
        nr::NANOSLEEP => call.args[0],
        // CLOCK_REALTIME and CLOCK_MONOTONIC run alike.
        _ if call.args[0] < CLOCKS && call.args[1] == 0 => call.args[2],
        _ => return None,
    };
    let limit = duration(request).filter(|limit| *limit != NEVER)?;
    let digest = call.digest()?;
    if !has_room(control, HEADER_BYTES) {
        return None;
    }
    let n = wait_exactly(control, digest, limit, |left| {
        let time = [left / SECOND, left % SECOND];
        syscall(nr::NANOSLEEP, [(&raw const time) as u64, 0, 0, 0, 0, 0])
    });
    if n != 0 { None } else { log(control, call, digest, 0, &[]) }
}

/// A `struct timespec` of the program in nanoseconds; [`NEVER`] for none, `None` for what is no time.
fn duration(at: u64) -> Option<u64> {
    if at == 0 {
        return Some(NEVER);
    }
    // SAFETY: the program gave it to its call; a fault there is the supervisor's to handle.
    let [s, ns] = unsafe { (at as *const [u64; 2]).read_unaligned() };
    (s < 1 << 32 && ns < SECOND).then(|| s * SECOND + ns)
}

/// Waits until a socket in blocking mode may be readable; false when the supervisor has to go on waiting.
pub(crate) fn wait_readable(control: &Control, digest: u64, fd: u64) -> bool {
    const POLLIN: u64 = 1;
    const SOL_SOCKET: u64 = 1;
    const SO_RCVTIMEO: u64 = 20;
    let (mut limit, mut len) = ([0u64; 2], 16u32);
    let at = [fd, SOL_SOCKET, SO_RCVTIMEO, (&raw mut limit) as u64, (&raw mut len) as u64, 0];
    if syscall(nr::GETSOCKOPT, at) != 0 || limit != [0, 0] {
        return false;
    }
    let entry = fd | POLLIN << 32;
    wait(control, digest, NEVER, |ms| syscall(nr::POLL, [(&raw const entry) as u64, 1, ms, 0, 0, 0])) > 0
}

/// As [`wait_exactly`], in whole milliseconds (`u64::MAX` for ever): a wait is never shorter than it should be.
fn wait(control: &Control, digest: u64, limit: u64, look: impl FnOnce(u64) -> i64) -> i64 {
    wait_exactly(control, digest, limit, |left| {
        look(if left == NEVER { u64::MAX } else { left.div_ceil(MILLISECOND).min(1 << 30) })
    })
}

/// Waits in the kernel until something is ready (a positive number) or so many nanoseconds are over (0).
/// Negative when the supervisor has to go on waiting.
///
/// The supervisor may want the thread at any instant. It sets `slow` and then looks at `waiting`; we set
/// `waiting` and then look at `slow`: one sees the other, and a thread that waits is interrupted.
fn wait_exactly(control: &Control, digest: u64, limit: u64, look: impl FnOnce(u64) -> i64) -> i64 {
    if control.may_wait.load(SeqCst) == 0 {
        return EINTR;
    }
    let until = control.wait_until.load(Relaxed);
    // Without a limit nobody asks for the time.
    let begin = if limit == NEVER && until == 0 { 0 } else { monotonic(control) };
    let deadline = begin.saturating_add(limit);
    let until = if until == 0 { deadline } else { until.min(deadline) };
    let left = if until == NEVER { NEVER } else { until.saturating_sub(begin) };
    control.waiting.store(1, SeqCst);
    let may = control.slow.load(SeqCst) == 0 && control.may_wait.load(SeqCst) != 0;
    let n = if may { look(left) } else { EINTR };
    control.waiting.store(0, SeqCst);
    if n > 0 || (n == 0 && deadline <= until) || n == EFAULT {
        return n;
    }
    control.waited_digest.store(digest, Relaxed);
    control.deadline.store(if deadline == NEVER { 0 } else { deadline }, Relaxed);
    control.waited.store(1, Relaxed);
    EINTR
}
