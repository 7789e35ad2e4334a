//! The calls that are served in the process, while the program runs.
//!
//! A call is served when nothing about it needs the supervisor: it does not block, it changes nothing that
//! the supervisor keeps, and a kill at any instant leaves behind what is needed to tell whether it took
//! effect. Receiving and sending go through `recvmmsg` and `sendmmsg` with one message, whose length the
//! kernel writes into the shared page before the process can die (DESIGN, in-doubt operations).

use core::arch::asm;
use core::sync::atomic::Ordering::{Relaxed, Release, SeqCst};
use core::sync::atomic::compiler_fence;

use ftrun_abi::fast::{
    Control, EPOLL, EPOLL_EVENTS_MAX, FD_OTHER, FD_SOCKET_BLOCKING, FD_SOCKET_NONBLOCKING, FD_UNKNOWN,
    Message, NOT_YET, NOTHING, RECEIVE, RING_BASE, SEND,
};
use ftrun_abi::record::{Digest, HEADER_BYTES, Header, Kind, OUTPUT_HEADER_BYTES, flag};
use ftrun_abi::ring::Ring;

use crate::memory::copy;

/// Most bytes received or read at once; a stream may give less than was asked for.
const RECEIVE_MAX: u64 = 256 << 10;
/// Most pieces of a `writev` or `sendmsg`.
const PIECES_MAX: u64 = 64;

/// Numbers of calls that are served here.
mod nr {
    pub(crate) const READ: u64 = 0;
    pub(crate) const WRITE: u64 = 1;
    pub(crate) const FSTAT: u64 = 5;
    pub(crate) const PREAD64: u64 = 17;
    pub(crate) const WRITEV: u64 = 20;
    pub(crate) const GETPID: u64 = 39;
    pub(crate) const SENDTO: u64 = 44;
    pub(crate) const RECVFROM: u64 = 45;
    pub(crate) const SENDMSG: u64 = 46;
    pub(crate) const GETSOCKOPT: u64 = 55;
    pub(crate) const KILL: u64 = 62;
    pub(crate) const FCNTL: u64 = 72;
    pub(crate) const GETTIMEOFDAY: u64 = 96;
    pub(crate) const GETPPID: u64 = 110;
    pub(crate) const GETTID: u64 = 186;
    pub(crate) const TIME: u64 = 201;
    pub(crate) const CLOCK_GETTIME: u64 = 228;
    pub(crate) const EPOLL_WAIT: u64 = 232;
    pub(crate) const EPOLL_PWAIT: u64 = 281;
    pub(crate) const RECVMMSG: u64 = 299;
    pub(crate) const SENDMMSG: u64 = 307;
    pub(crate) const GETRANDOM: u64 = 318;
}

const EAGAIN: i64 = -11;
const MSG_DONTWAIT: u64 = 0x40;
const MSG_NOSIGNAL: u64 = 0x4000;
const SIGKILL: u64 = 9;
const SOCK_STREAM: u32 = 1;
const CLOCK_REALTIME: u64 = 0;
const CLOCK_MONOTONIC: u64 = 1;
const CLOCK_REALTIME_COARSE: u64 = 5;

fn syscall(nr: u64, args: [u64; 6]) -> i64 {
    let result;
    // SAFETY: the callers pass what the call asks for; the kernel checks addresses.
    unsafe {
        asm!("syscall", inlateout("rax") nr => result, in("rdi") args[0], in("rsi") args[1], in("rdx") args[2],
            in("r10") args[3], in("r8") args[4], in("r9") args[5], out("rcx") _, out("r11") _);
    }
    result
}

/// A place where tests have the process killed.
#[inline]
fn seam(control: &Control) {
    let left = control.kill_in.load(Relaxed);
    if left != 0 {
        control.kill_in.store(left - 1, Relaxed);
        if left == 1 {
            syscall(nr::KILL, [control.real_pid.load(Relaxed), SIGKILL, 0, 0, 0, 0]);
        }
    }
}

/// Makes the call and logs it; `None` when the supervisor has to.
pub(crate) fn serve(control: &mut Control, tid: u64, number: u64, args: &[u64; 6]) -> Option<i64> {
    let [a0, a1, a2, a3, a4, _] = *args;
    match number {
        nr::READ => receive(control, tid, number, args, 0),
        nr::RECVFROM if a4 == 0 && a3 & !(MSG_DONTWAIT | MSG_NOSIGNAL) == 0 => receive(control, tid, number, args, a3),
        nr::WRITE => send(control, tid, number, args, 0, a1, a2, 1),
        nr::SENDTO if a4 == 0 && a3 & !(MSG_DONTWAIT | MSG_NOSIGNAL) == 0 => {
            send(control, tid, number, args, a3, a1, a2, 1)
        }
        nr::WRITEV if (1..=PIECES_MAX).contains(&a2) => send(control, tid, number, args, 0, 0, 0, a2),
        nr::SENDMSG if a2 & !(MSG_DONTWAIT | MSG_NOSIGNAL) == 0 => {
            // SAFETY: a `struct msghdr` of the program; a fault there is the supervisor's to handle.
            let header = unsafe { (a1 as *const [u64; 7]).read_unaligned() };
            let [name, _, _, count, ancillary, _, _] = header;
            if name != 0 || ancillary != 0 || !(1..=PIECES_MAX).contains(&count) {
                return None;
            }
            send(control, tid, number, args, a2, 0, 0, count)
        }
        nr::EPOLL_WAIT => epoll(control, tid, number, args),
        nr::EPOLL_PWAIT if a4 == 0 => epoll(control, tid, number, args),
        nr::CLOCK_GETTIME if matches!(a0, 0 | 1 | 4..=7) && a1 != 0 && clock(control) => {
            time(control, tid, number, args, a0, a1)
        }
        nr::GETTIMEOFDAY if a0 != 0 && a1 == 0 && clock(control) => time(control, tid, number, args, CLOCK_REALTIME, a0),
        nr::TIME if a0 == 0 && clock(control) => time(control, tid, number, args, CLOCK_REALTIME_COARSE, 0),
        nr::CLOCK_GETTIME if (0..=11).contains(&a0) && a0 != 2 && a0 != 3 && a1 != 0 => {
            input(control, tid, number, args, a1, 16)
        }
        nr::GETTIMEOFDAY if a0 != 0 && a1 == 0 => input(control, tid, number, args, a0, 16),
        nr::TIME if a0 == 0 => {
            let result = syscall(number, *args);
            log(control, tid, number, digest(number, args)?, result, None)
        }
        nr::GETPID => log(control, tid, number, digest(number, args)?, control.pid.load(Relaxed) as i64, None),
        nr::GETPPID => log(control, tid, number, digest(number, args)?, control.parent.load(Relaxed) as i64, None),
        nr::GETTID => log(control, tid, number, digest(number, args)?, tid as i64, None),
        nr::GETRANDOM if a1 <= 256 && a0 != 0 => input(control, tid, number, args, a0, a1),
        nr::FSTAT if a1 != 0 => input(control, tid, number, args, a1, 144),
        nr::PREAD64 if a1 != 0 && a2 <= RECEIVE_MAX => input(control, tid, number, args, a1, a2),
        _ => None,
    }
}

/// The digest of a call, as the supervisor computes it from the table; `None` for calls not served here.
pub(crate) fn digest(number: u64, args: &[u64; 6]) -> Option<u64> {
    let mut d = Digest::new();
    d.add_u64(number);
    let count = match number {
        nr::GETPID | nr::GETPPID | nr::GETTID => 0,
        nr::TIME => 1,
        nr::FSTAT | nr::CLOCK_GETTIME | nr::GETTIMEOFDAY => 2,
        nr::READ | nr::GETRANDOM => 3,
        nr::PREAD64 | nr::EPOLL_WAIT => 4,
        nr::RECVFROM | nr::EPOLL_PWAIT => 6,
        nr::WRITE | nr::SENDTO => {
            d.add_u64(args[0]);
            d.add_u64(args[1]);
            if args[1] != 0 {
                // SAFETY: the program's buffer; a fault there is the supervisor's to handle.
                d.add_bytes(unsafe { bytes(args[1], args[2]) });
            }
            for arg in &args[2..if number == nr::WRITE { 3 } else { 6 }] {
                d.add_u64(*arg);
            }
            return Some(d.finish());
        }
        nr::WRITEV => {
            d.add_u64(args[0]);
            d.add_u64(args[1]);
            add_pieces(&mut d, args[1], args[2]);
            d.add_u64(args[2]);
            return Some(d.finish());
        }
        nr::SENDMSG => {
            d.add_u64(args[0]);
            d.add_u64(args[1]);
            // SAFETY: as above.
            let header = unsafe { (args[1] as *const [u64; 7]).read_unaligned() };
            // No name and no ancillary data.
            d.add_bytes(&[]);
            d.add_bytes(&[]);
            add_pieces(&mut d, header[2], header[3]);
            d.add_u64(args[2]);
            return Some(d.finish());
        }
        _ => return None,
    };
    for arg in &args[..count] {
        d.add_u64(*arg);
    }
    Some(d.finish())
}

fn add_pieces(d: &mut Digest, pieces: u64, count: u64) {
    for i in 0..count {
        // SAFETY: a `struct iovec` of the program and what it describes, as above.
        unsafe {
            let [at, len] = ((pieces + i * 16) as *const [u64; 2]).read_unaligned();
            d.add_bytes(bytes(at, len));
        }
    }
}

/// Memory of the program as a slice.
///
/// # Safety
/// The program handed it to a call that reads it, and no other thread runs.
unsafe fn bytes<'a>(at: u64, len: u64) -> &'a [u8] {
    if at == 0 {
        return &[];
    }
    // SAFETY: by the contract of this function.
    unsafe { core::slice::from_raw_parts(at as *const u8, len as usize) }
}

fn ring(control: &Control) -> Option<Ring> {
    // SAFETY: the supervisor maps the ring there, and the one running thread is its only producer.
    unsafe { Ring::attach(RING_BASE as *mut u8, control.ring_bytes.load(Relaxed) as usize) }.ok()
}

/// Writes the header of a record, and of its one output if there is one.
fn fill(to: &mut [u8], control: &Control, tid: u64, number: u64, digest: u64, result: i64, out: Option<(u64, u64)>) {
    let header = Header {
        len: to.len() as u32,
        kind: Kind::Call as u16,
        nr: number as u16,
        tid: tid as u32,
        flags: flag::FAST,
        sii: control.sii.load(Relaxed) + 1,
        result,
        digest,
        outs: u32::from(out.is_some()),
        reserved: 0,
    };
    let at = to.as_mut_ptr();
    // SAFETY: records begin at multiples of 8, `Header` is laid out as it is encoded on this (little-endian)
    // processor, and `to` has room for both headers.
    unsafe {
        at.cast::<Header>().write(header);
        if let Some((address, len)) = out {
            at.add(HEADER_BYTES).cast::<[u64; 2]>().write([address, len]);
            let end = HEADER_BYTES + OUTPUT_HEADER_BYTES + len as usize;
            for i in end..to.len() {
                at.add(i).write(0);
            }
        }
    }
}

/// Bytes of a record with one output of `len` bytes.
fn size(len: u64) -> usize {
    HEADER_BYTES + OUTPUT_HEADER_BYTES + (len as usize).next_multiple_of(8)
}

/// Makes the reserved record an event.
fn commit(control: &Control, ring: &mut Ring) {
    compiler_fence(Release);
    ring.commit();
    // A kill between the two is settled by the record's own number.
    control.sii.store(control.sii.load(Relaxed) + 1, Relaxed);
}

/// Logs a call that has been made, whose only effect is its result and `out`, memory of the program.
fn log(control: &Control, tid: u64, number: u64, digest: u64, result: i64, out: Option<(u64, u64)>) -> Option<i64> {
    let mut ring = ring(control)?;
    let record = ring.reserve(out.map_or(HEADER_BYTES, |o| size(o.1)))?;
    if let Some((at, len)) = out {
        // SAFETY: `size` made room behind the two headers; the memory has just been written by the call.
        unsafe {
            copy(record.as_mut_ptr().add(HEADER_BYTES + OUTPUT_HEADER_BYTES), at as *const u8, len as usize);
        }
    }
    fill(record, control, tid, number, digest, result, out);
    commit(control, &mut ring);
    Some(result)
}

/// A call without side effects that fills `len` bytes at `at`: killed before it was logged, it is made again.
fn input(control: &Control, tid: u64, number: u64, args: &[u64; 6], at: u64, len: u64) -> Option<i64> {
    let digest = digest(number, args)?;
    // Room first: a call that was made has to be logged.
    ring(control)?.reserve(size(len))?;
    let result = syscall(number, *args);
    let counts = matches!(number, nr::PREAD64 | nr::GETRANDOM);
    if result < 0 {
        return None;
    }
    let written = if counts { result as u64 } else { len };
    log(control, tid, number, digest, result, (written > 0).then_some((at, written)))
}

/// The kernel's own code can be asked for the time.
fn clock(control: &Control) -> bool {
    control.clock_gettime.load(Relaxed) != 0
}

/// `__vdso_clock_gettime`; only where [`clock`] says that it is there.
fn clock_function(control: &Control) -> extern "C" fn(u64, &mut [u64; 2]) -> i64 {
    // SAFETY: the supervisor put the address of that function there, which has this signature.
    unsafe { core::mem::transmute(control.clock_gettime.load(Relaxed)) }
}

/// `clock_gettime`, `gettimeofday` or `time` without a system call.
fn time(control: &Control, tid: u64, number: u64, args: &[u64; 6], clock: u64, to: u64) -> Option<i64> {
    let ask = clock_function(control);
    let digest = digest(number, args)?;
    let mut ring = ring(control)?;
    let mut now = [0u64; 2];
    let record = ring.reserve(if to == 0 { HEADER_BYTES } else { size(16) })?;
    if ask(clock, &mut now) != 0 {
        return None;
    }
    if number == nr::GETTIMEOFDAY {
        now[1] /= 1000;
    }
    let result = if number == nr::TIME { now[0] as i64 } else { 0 };
    if to != 0 {
        // SAFETY: `size` made room behind the two headers; the program's memory may fault, which the
        // supervisor handles.
        unsafe {
            record.as_mut_ptr().add(HEADER_BYTES + OUTPUT_HEADER_BYTES).cast::<[u64; 2]>().write(now);
            (to as *mut [u64; 2]).write_unaligned(now);
        }
    }
    fill(record, control, tid, number, digest, result, (to != 0).then_some((to, 16)));
    commit(control, &mut ring);
    Some(result)
}

/// What kind of descriptor this is: as the page knows, or by asking the kernel.
fn kind(control: &mut Control, fd: u64) -> u8 {
    let Some(known) = control.fds.get_mut(fd as usize) else { return FD_OTHER };
    if *known != FD_UNKNOWN {
        return *known;
    }
    const F_GETFL: u64 = 3;
    const O_NONBLOCK: i64 = 0o4000;
    const SOL_SOCKET: u64 = 1;
    const SO_TYPE: u64 = 3;
    let (mut type_, mut len) = (0u32, 4u32);
    let at = [fd, SOL_SOCKET, SO_TYPE, (&raw mut type_) as u64, (&raw mut len) as u64, 0];
    let found = syscall(nr::GETSOCKOPT, at);
    let flags = syscall(nr::FCNTL, [fd, F_GETFL, 0, 0, 0, 0]);
    *known = match (found, flags) {
        (0, 0..) if type_ == SOCK_STREAM => {
            if flags & O_NONBLOCK != 0 { FD_SOCKET_NONBLOCKING } else { FD_SOCKET_BLOCKING }
        }
        _ => FD_OTHER,
    };
    *known
}

/// Notes that an operation is under way, so that a kill from here on is settled.
fn begin(control: &Control, what: u64, tid: u64, number: u64, digest: u64, at: u64) {
    for (slot, value) in control.pending_call.iter().zip([tid, number, digest, at]) {
        slot.store(value, Relaxed);
    }
    control.pending_sii.store(control.sii.load(Relaxed), Relaxed);
    control.message.len.store(NOT_YET, Relaxed);
    compiler_fence(Release);
    control.pending.store(what, Release);
}

/// Puts one message together in the shared page; returns its address.
fn message(control: &mut Control, pieces: u64, count: u64, at: u64, len: u64) -> u64 {
    let m = &mut control.message;
    let own = (&raw const m.piece) as u64;
    let (iov, iov_len) = if count == 1 && pieces == 0 { (own, 1) } else { (pieces, count) };
    (m.name, m.name_len, m.control, m.control_len, m.flags) = (0, 0, 0, 0, 0);
    (m.iov, m.iov_len, m.piece, m.piece_len) = (iov, iov_len, at, len);
    (&raw const *m) as *const Message as u64
}

/// `read` or `recv` on a stream socket.
fn receive(control: &mut Control, tid: u64, number: u64, args: &[u64; 6], flags: u64) -> Option<i64> {
    let [fd, to, len, ..] = *args;
    if len == 0 || to == 0 {
        return None;
    }
    let nonblocking = match kind(control, fd) {
        FD_SOCKET_NONBLOCKING => true,
        FD_SOCKET_BLOCKING => flags & MSG_DONTWAIT != 0,
        _ => return None,
    };
    let digest = digest(number, args)?;
    let mut ring = ring(control)?;
    let room = len.min(RECEIVE_MAX);
    let record = ring.reserve(size(room))?;
    let data = record[HEADER_BYTES + OUTPUT_HEADER_BYTES..].as_mut_ptr();
    let at = message(control, 0, 1, data as u64, room);
    begin(control, RECEIVE, tid, number, digest, to);
    seam(control);
    let result = syscall(nr::RECVMMSG, [fd, at, 1, flags | MSG_DONTWAIT, 0, 0]);
    seam(control);
    if result != 1 {
        control.pending.store(NOTHING, Relaxed);
        if result == EAGAIN && nonblocking {
            return log(control, tid, number, digest, EAGAIN, None);
        }
        return None;
    }
    let got = control.message.len.load(Relaxed) & NOT_YET;
    let out = (got > 0).then_some((to, got));
    let used = if got > 0 { size(got) } else { HEADER_BYTES };
    ring.shrink(used);
    // SAFETY: the record that was reserved above, made shorter.
    let record = unsafe { core::slice::from_raw_parts_mut(data.sub(HEADER_BYTES + OUTPUT_HEADER_BYTES), used) };
    fill(record, control, tid, number, digest, got as i64, out);
    commit(control, &mut ring);
    seam(control);
    control.pending.store(NOTHING, Relaxed);
    // SAFETY: the program's buffer; a fault there is the supervisor's to handle.
    unsafe { copy(to as *mut u8, data, got as usize) };
    Some(got as i64)
}

/// `write`, `send`, `writev` or `sendmsg` on a stream socket: one piece at `at`, or `count` pieces.
#[expect(clippy::too_many_arguments, reason = "four calls in one form")]
fn send(control: &mut Control, tid: u64, number: u64, args: &[u64; 6], flags: u64, at: u64, len: u64, count: u64) -> Option<i64> {
    let fd = args[0];
    // A blocking socket takes all of it, in its time: the supervisor waits for that.
    let nonblocking = match kind(control, fd) {
        FD_SOCKET_NONBLOCKING => true,
        FD_SOCKET_BLOCKING => flags & MSG_DONTWAIT != 0,
        _ => return None,
    };
    if !nonblocking {
        return None;
    }
    let digest = digest(number, args)?;
    ring(control)?.reserve(HEADER_BYTES)?;
    let pieces = match number {
        nr::WRITEV => args[1],
        // SAFETY: read before, in `serve`.
        nr::SENDMSG => unsafe { (args[1] as *const [u64; 7]).read_unaligned()[2] },
        _ => 0,
    };
    let message = message(control, pieces, count, at, len);
    begin(control, SEND, tid, number, digest, 0);
    seam(control);
    // Without a reader the supervisor makes the call again, with the signal that it brings.
    let result = syscall(nr::SENDMMSG, [fd, message, 1, flags | MSG_DONTWAIT | MSG_NOSIGNAL, 0, 0]);
    seam(control);
    let result = match result {
        1 => (control.message.len.load(Relaxed) & NOT_YET) as i64,
        EAGAIN => EAGAIN,
        _ => {
            control.pending.store(NOTHING, Relaxed);
            return None;
        }
    };
    let logged = log(control, tid, number, digest, result, None);
    seam(control);
    control.pending.store(NOTHING, Relaxed);
    logged
}

/// `epoll_wait` that finds something ready, or does not want to wait.
fn epoll(control: &mut Control, tid: u64, number: u64, args: &[u64; 6]) -> Option<i64> {
    let [fd, to, max, timeout, ..] = *args;
    let max = max as i32;
    if max <= 0 || to == 0 {
        return None;
    }
    let digest = digest(number, args)?;
    let room = (max as usize).min(EPOLL_EVENTS_MAX);
    ring(control)?.reserve(size(room as u64 * 12))?;
    for event in &mut control.events[..room] {
        // An event that was reported is never 0.
        event[..4].fill(0);
    }
    let events = (&raw const control.events) as u64;
    begin(control, EPOLL, tid, number, digest, to);
    seam(control);
    let mut n = syscall(nr::EPOLL_WAIT, [fd, events, room as u64, 0, 0, 0]);
    if n == 0 && timeout as i32 != 0 {
        n = wait(control, fd, events, room as u64, timeout as i32);
        if n == 0 {
            // The time is over.
            control.pending.store(NOTHING, Relaxed);
            return log(control, tid, number, digest, 0, None);
        }
    }
    seam(control);
    if n < 0 || (n == 0 && timeout as i32 != 0) {
        control.pending.store(NOTHING, Relaxed);
        return None;
    }
    let mut ring = ring(control)?;
    let out = (n > 0).then_some((to, n as u64 * 12));
    let record = ring.reserve(out.map_or(HEADER_BYTES, |o| size(o.1)))?;
    if n > 0 {
        // SAFETY: `size` made room behind the two headers.
        unsafe {
            let data = record.as_mut_ptr().add(HEADER_BYTES + OUTPUT_HEADER_BYTES);
            copy(data, events as *const u8, n as usize * 12);
        }
    }
    fill(record, control, tid, number, digest, n, out);
    commit(control, &mut ring);
    seam(control);
    control.pending.store(NOTHING, Relaxed);
    // SAFETY: the program's buffer; a fault there is the supervisor's to handle.
    unsafe { copy(to as *mut u8, events as *const u8, n as usize * 12) };
    Some(n)
}

/// Waits in the kernel until something is ready (the number of events) or the time is over (0). Negative when
/// the supervisor has to go on waiting.
///
/// The supervisor may want the thread at any instant. It sets `slow` and then looks at `waiting`; we set
/// `waiting` and then look at `slow`: one sees the other, and a thread that waits is interrupted.
fn wait(control: &Control, fd: u64, events: u64, room: u64, timeout: i32) -> i64 {
    const EINTR: i64 = -4;
    const MILLISECOND: u64 = 1_000_000;
    if control.may_wait.load(SeqCst) == 0 || !clock(control) {
        return EINTR;
    }
    let begin = monotonic(control);
    let deadline = if timeout < 0 { u64::MAX } else { begin + timeout as u64 * MILLISECOND };
    let until = match control.wait_until.load(Relaxed) {
        0 => deadline,
        until => until.min(deadline),
    };
    // A wait is never shorter than it should be, and ends with the millisecond.
    let ms = if until == u64::MAX { u64::MAX } else { until.saturating_sub(begin).div_ceil(MILLISECOND).min(1 << 30) };
    control.waiting.store(1, SeqCst);
    let n = if control.slow.load(SeqCst) == 0 && control.may_wait.load(SeqCst) != 0 { syscall(nr::EPOLL_WAIT, [fd, events, room, ms, 0, 0]) } else { EINTR };
    control.waiting.store(0, SeqCst);
    if n > 0 || (n == 0 && deadline <= until) {
        return n;
    }
    control.deadline.store(if timeout < 0 { 0 } else { deadline }, Relaxed);
    control.waited.store(1, Relaxed);
    EINTR
}

/// `CLOCK_MONOTONIC` in nanoseconds.
fn monotonic(control: &Control) -> u64 {
    let ask = clock_function(control);
    let mut now = [0u64; 2];
    ask(CLOCK_MONOTONIC, &mut now);
    now[0] * 1_000_000_000 + now[1]
}
