//! The queue of outputs: what the unit sends before the events that it depends on are in stable storage stands here
//! until they are, and the unit goes on (ARCHITECTURE.md, "Output queue").

use core::sync::atomic::Ordering::{Relaxed, SeqCst};
use core::sync::atomic::AtomicU64;

use ftrun_abi::fast::{
    CONTROL_BASE, Control, FD_COUNTED, FD_PRIVATE, FD_SOCKET_BLOCKING, FD_SOCKET_NONBLOCKING, OUTPUT_HEADER, OUTPUT_MAX, OUTPUTS_BASE, OUTPUTS_BYTES, QUEUE, STREAMS,
};
use ftrun_abi::outputs::{BY_SHIM, OPTION, Output, is_due, is_empty, pass};
use ftrun_abi::ring::Ring;

use crate::call::{Call, syscall, word};
use crate::files::FilePiece;
use crate::log::{begin, has_room, seam, settled, size};
use crate::nr;
use crate::sockets::{Sending, count, is_counted, kind};

fn ring() -> Option<Ring> {
    // SAFETY: the supervisor maps the queue there; the one running thread is its only producer.
    unsafe { Ring::attach(OUTPUTS_BASE as *mut u8, OUTPUTS_BYTES as usize) }.ok()
}

/// Everything that this socket, or anything at all, had in the queue has left.
pub(crate) fn has_left(control: &Control, fd: Option<u64>) -> bool {
    let Some(ring) = ring() else { return true };
    let begin = ring.begin();
    if begin == ring.end() {
        return true;
    }
    let stream = fd.and_then(|fd| control.streams.get(fd as usize));
    stream.is_some_and(|stream| begin >= stream.queued.load(Relaxed))
}

/// Longest wait for a commit, nanoseconds.
const PATIENCE: u64 = 5_000_000;

/// Lets up to so many outputs leave that may.
pub(crate) fn let_leave(control: &Control, most: usize) {
    let Some(mut ring) = ring() else { return };
    if is_empty(&ring) || !is_due(control, &ring) {
        return;
    }
    let kernel = |nr, args| {
        seam(control);
        let result = syscall(nr, args);
        seam(control);
        result
    };
    // SAFETY: an address inside the control page.
    let message = unsafe { &raw mut (*(CONTROL_BASE as *mut Control)).output };
    // SAFETY: the message of that page, and the queue.
    let passed = unsafe { pass(kernel, control, message, &mut ring, most, BY_SHIM) };
    if !matches!(passed, Ok(Some(passed)) if passed.full_count == 0) {
        sweep(control);
    }
}

/// The program is about to wait, and nobody else wants the turn: outputs leave now, or when they may; false when there
/// are none, or it takes long.
pub(crate) fn leave_before_wait(control: &Control) -> bool {
    let Some(ring) = ring() else { return false };
    if is_empty(&ring) {
        return false;
    }
    let word = control.commit_word.load(SeqCst);
    if is_due(control, &ring) {
        let_leave(control, usize::MAX);
        return true;
    }
    // What has come meanwhile is served first: its own outputs then wait together with these.
    if control.slow.load(SeqCst) == 0 && control.wanting.load(SeqCst) == 0 && wait_commit(control, word, PATIENCE) {
        return true;
    }
    sweep(control);
    false
}

/// Waits until more is committed than was when the word was this; false when that takes long.
pub(crate) fn wait_commit(control: &Control, word: u32, patience: u64) -> bool {
    const FUTEX_WAIT: u64 = 0;
    const ETIMEDOUT: i64 = -110;
    let (patience, at) = ([0, patience], (&raw const control.commit_word) as u64);
    syscall(nr::FUTEX, [at, FUTEX_WAIT, u64::from(word), (&raw const patience) as u64, 0, 0]) != ETIMEDOUT
}

/// What is in the queue leaves without us.
fn sweep(control: &Control) {
    control.sweep.store(1, SeqCst);
    tell_sweeper(control);
}

fn tell_sweeper(control: &Control) {
    const FUTEX_WAKE: u64 = 1;
    control.sweep_word.fetch_add(1, SeqCst);
    syscall(nr::FUTEX, [(&raw const control.sweep_word) as u64, FUTEX_WAKE, 1, 0, 0, 0]);
}

/// The socket that a call is about alone, if what others of the unit's have in the queue makes no difference to it.
pub(crate) fn socket_of(control: &Control, call: &Call) -> Option<u64> {
    let fd = call.args[0];
    let alone = matches!(
        call.number,
        nr::WRITE | nr::WRITEV | nr::SENDTO | nr::SENDMSG | nr::SENDFILE | nr::CLOSE | nr::SHUTDOWN
    );
    (alone && is_own(control, fd)).then_some(fd)
}

/// What the kernel has counted of this socket is known, and nobody else has it.
fn is_own(control: &Control, fd: u64) -> bool {
    const OWN: u8 = FD_PRIVATE | FD_COUNTED;
    fd < STREAMS as u64 && control.fds[fd as usize] & OWN == OWN
}

/// Where what is put into the queue comes from.
enum Source {
    Memory(Sending),
    File(FilePiece),
    /// An option of the socket: level, name, value.
    Option([u32; 3]),
}

impl Source {
    /// The socket that it goes to, and at most how many bytes.
    fn of(control: &mut Control, call: &Call) -> Option<(u64, u64, Self)> {
        let [fd, a1, a2, a3, ..] = call.args;
        match call.number {
            nr::SETSOCKOPT => Some((fd, 12, Self::Option([a1 as u32, a2 as u32, word(a3)]))),
            nr::SENDFILE => {
                let stream = matches!(kind(control, fd), FD_SOCKET_NONBLOCKING | FD_SOCKET_BLOCKING);
                Some((fd, a3, Self::File(FilePiece::of(control, call).filter(|_| stream)?)))
            }
            _ => {
                let sending = Sending::of(control, call)?;
                Some((sending.fd, sending.total, Self::Memory(sending)))
            }
        }
    }
}

/// An option that decides when data are sent (`TCP_NODELAY`, `TCP_CORK`), of a socket that has data in the queue: it has its
/// place among them.
pub(crate) fn is_behind_outputs(control: &Control, call: &Call) -> bool {
    const SOL_TCP: u64 = 6;
    let [fd, level, option, value, len, _] = call.args;
    let orders = level == SOL_TCP && matches!(option, 1 | 3) && value != 0 && len == 4;
    call.number == nr::SETSOCKOPT && orders && is_own(control, fd) && !has_left(control, Some(fd))
}

/// Puts what a call sends into the queue; `None` when the call has to be made as it is.
pub(crate) fn queue(control: &mut Control, call: &Call) -> Option<i64> {
    let (fd, most, source) = Source::of(control, call)?;
    if !(1..=OUTPUT_MAX).contains(&most) || !is_counted(control, fd) {
        return None;
    }
    if control.take_failed(fd) {
        // The kernel says why, and what it counts is not what the unit has sent.
        control.fds[fd as usize] &= !(FD_PRIVATE | FD_COUNTED);
        return None;
    }
    let mut ring = ring()?;
    let queued = if has_left(control, Some(fd)) { 0 } else { ring.end() - ring.begin() };
    if !(matches!(source, Source::Option(_)) || has_credit(control, fd, most, queued)) || !has_room(control, size(8)) {
        return None;
    }
    let digest = call.digest()?;
    let record = ring.reserve(OUTPUT_HEADER + most as usize)?;
    let what = if matches!(source, Source::Option(_)) { OPTION } else { 0 };
    let output = Output { fd: fd | what, needed: control.needed.load(Relaxed), done: AtomicU64::new(0) };
    // SAFETY: records begin at multiples of 8, and this one has room for the header and the data.
    let data = unsafe {
        record.as_mut_ptr().cast::<Output>().write(output);
        record.as_mut_ptr().add(OUTPUT_HEADER)
    };
    let (total, position_at) = match &source {
        Source::Memory(sending) => {
            sending.copy_to(data);
            (most, 0)
        }
        Source::File(piece) => {
            let (total, position) = piece.copy_to(data, most)?;
            ring.shrink(OUTPUT_HEADER + total as usize);
            control.pending_set.store(position, Relaxed);
            (total, piece.at)
        }
        Source::Option(words) => {
            // SAFETY: as above, there is room for these 12 bytes.
            unsafe { data.cast::<[u32; 3]>().write_unaligned(*words) };
            (0, 0)
        }
    };
    control.streams[fd as usize].queued.store(ring.reserved_end(), Relaxed);
    control.pending_fd.store(fd, Relaxed);
    control.pending_from.store(total, Relaxed);
    control.offset.store(ring.end(), Relaxed);
    begin(control, QUEUE, call, digest, position_at);
    seam(control);
    ring.commit();
    seam(control);
    if control.sweeper_idle.swap(0, SeqCst) != 0 {
        tell_sweeper(control);
    }
    count(control, fd, |stream| &stream.sent, total as i64);
    if position_at == 0 {
        return settled(control, call, digest, total as i64, &[]);
    }
    // SAFETY: the program's memory; a fault there is the supervisor's to handle.
    unsafe { (position_at as *mut u64).write_unaligned(control.pending_set.load(Relaxed)) };
    settled(control, call, digest, total as i64, &[(position_at, 8)])
}

/// An output was made as it is: what the socket's buffer has room for has to be asked for again.
pub(crate) fn forget_credit(control: &Control, fd: u64) {
    if let Some(stream) = control.streams.get(fd as usize) {
        stream.credit.store(0, Relaxed);
    }
}

/// The socket's buffer has room for this, and for the bytes that are `queued`: a send that goes wrong for want of room
/// has to go wrong now.
fn has_credit(control: &Control, fd: u64, bytes: u64, queued: u64) -> bool {
    let stream = &control.streams[fd as usize];
    let cost = weight(bytes);
    let mut credit = u64::from(stream.credit.load(Relaxed));
    if credit < cost {
        credit = room(fd).saturating_sub(weight(queued)).min(u64::from(u32::MAX));
    }
    let enough = credit >= cost;
    stream.credit.store(credit.saturating_sub(if enough { cost } else { 0 }) as u32, SeqCst);
    enough
}

/// What the kernel takes from the buffer's room for so many bytes, at the most: beside them a structure for what is sent
/// at once, of which each has some 16 KiB, and each call may begin one.
fn weight(bytes: u64) -> u64 {
    bytes + 2048 + bytes / 8
}

/// Room in the socket's buffer, in the kernel's own measure (`SO_MEMINFO`).
fn room(fd: u64) -> u64 {
    const SOL_SOCKET: u64 = 1;
    const SO_MEMINFO: u64 = 55;
    const SNDBUF: usize = 3;
    const WMEM_QUEUED: usize = 5;
    let (mut words, mut len) = ([0u32; 9], 36u32);
    let asked = [fd, SOL_SOCKET, SO_MEMINFO, (&raw mut words) as u64, (&raw mut len) as u64, 0];
    if syscall(nr::GETSOCKOPT, asked) != 0 {
        return 0;
    }
    u64::from(words[SNDBUF].saturating_sub(words[WMEM_QUEUED]))
}
