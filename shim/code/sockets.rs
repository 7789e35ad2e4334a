//! Receiving and sending on stream sockets.
//!
//! A kill between what the kernel did and the log is settled in one of two ways (DESIGN, in-doubt operations): by
//! `recvmmsg` and `sendmmsg` with one message whose length the kernel writes into the shared page before the process
//! can die, or, where a TCP socket is this unit's alone, by what the kernel has counted of its stream: that leaves
//! the plain calls, which cost less.

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::Relaxed;

use ftrun_abi::fast::{
    CALLS_PER_COUNT, COUNTED, Control, FD_COUNTED, FD_FILE, FD_KIND, FD_OTHER, FD_PRIVATE, FD_SOCKET_BLOCKING,
    FD_SOCKET_NONBLOCKING, FD_UNKNOWN, Message, NOT_YET, RECEIVE, SEND, SEND_ALL, STREAMS, Stream,
};
use ftrun_abi::record::HEADER_BYTES;
use ftrun_abi::stream;

use crate::call::{Call, EAGAIN, EFAULT, message_header, piece, syscall};
use crate::calls::again;
use crate::log::{DATA, commit, end, fill, has_room, log, once, output_size, ring, seam, settled, size};
use crate::memory::copy;
use crate::nr;
use crate::outputs::has_left;
use crate::wait::{Waited, for_data};

/// Most bytes received or read at once; a stream may give less than was asked for.
pub(crate) const RECEIVE_MAX: u64 = 256 << 10;
/// Most pieces of a `writev` or `sendmsg`.
const PIECES_MAX: u64 = 64;

const MSG_DONTWAIT: u64 = 0x40;
const MSG_NOSIGNAL: u64 = 0x4000;
const SOCK_STREAM: u32 = 1;

/// What kind of descriptor this is: as the page knows, or by asking the kernel.
pub(crate) fn kind(control: &mut Control, fd: u64) -> u8 {
    let Some(known) = control.fds.get(fd as usize).copied() else { return FD_OTHER };
    if known & FD_KIND != FD_UNKNOWN {
        return known & FD_KIND;
    }
    let kind = ask(control, fd);
    control.fds[fd as usize] = known | kind;
    kind
}

fn ask(control: &Control, fd: u64) -> u8 {
    const S_IFMT: u32 = 0o170_000;
    const S_IFREG: u32 = 0o100_000;
    const S_IFSOCK: u32 = 0o140_000;
    // `struct stat`: the device is at 0, the mode at 24.
    let mut stat = [0u64; 18];
    if syscall(nr::FSTAT, [fd, (&raw mut stat) as u64, 0, 0, 0, 0]) != 0 {
        return FD_OTHER;
    }
    match stat[3] as u32 & S_IFMT {
        S_IFSOCK => ask_socket(fd),
        S_IFREG if is_plain(control, fd, stat[0]) => FD_FILE,
        _ => FD_OTHER,
    }
}

/// A regular file is no file of /proc: what is written to one of those changes the process.
fn is_plain(control: &Control, fd: u64, device: u64) -> bool {
    const PROC_SUPER_MAGIC: u64 = 0x9fa0;
    /// Bits of the major number, which is 0 where the minor one is given to whatever is mounted next.
    const MAJOR: u64 = 0xffff_f000_000f_ff00;
    if control.plain_device.load(Relaxed) == device {
        return true;
    }
    // `struct statfs`: the type is at 0.
    let mut system = [0u64; 15];
    let known = syscall(nr::FSTATFS, [fd, (&raw mut system) as u64, 0, 0, 0, 0]) == 0;
    let plain = known && system[0] != PROC_SUPER_MAGIC;
    if plain && device & MAJOR != 0 {
        control.plain_device.store(device, Relaxed);
    }
    plain
}

fn ask_socket(fd: u64) -> u8 {
    const F_GETFL: u64 = 3;
    const O_NONBLOCK: i64 = 0o4000;
    const SOL_SOCKET: u64 = 1;
    const SO_TYPE: u64 = 3;
    let (mut type_, mut len) = (0u32, 4u32);
    let asked = [fd, SOL_SOCKET, SO_TYPE, (&raw mut type_) as u64, (&raw mut len) as u64, 0];
    if syscall(nr::GETSOCKOPT, asked) != 0 || type_ != SOCK_STREAM {
        return FD_OTHER;
    }
    match syscall(nr::FCNTL, [fd, F_GETFL, 0, 0, 0, 0]) {
        flags @ 0.. if flags & O_NONBLOCK != 0 => FD_SOCKET_NONBLOCKING,
        0.. => FD_SOCKET_BLOCKING,
        _ => FD_OTHER,
    }
}

/// Puts one message together in the shared page; returns its address.
fn message(control: &mut Control, pieces: u64, count: u64, at: u64, len: u64) -> u64 {
    let m = &mut control.message;
    let own = (&raw const m.piece) as u64;
    let (iov, iov_len) = if pieces == 0 { (own, 1) } else { (pieces, count) };
    (m.name, m.name_len, m.control, m.control_len, m.flags) = (0, 0, 0, 0, 0);
    (m.iov, m.iov_len, m.piece, m.piece_len) = (iov, iov_len, at, len);
    (&raw const *m) as *const Message as u64
}

/// Flags with which a call is served, and that it has: none for `read` and its like.
fn flags(call: &Call) -> Option<u64> {
    let [_, _, a2, a3, a4, _] = call.args;
    let flags = match call.number {
        nr::RECVFROM | nr::SENDTO if a4 == 0 => a3,
        nr::RECVFROM | nr::SENDTO => return None,
        nr::SENDMSG | nr::RECVMSG => a2,
        _ => 0,
    };
    (flags & !(MSG_DONTWAIT | MSG_NOSIGNAL) == 0).then_some(flags)
}

/// A call on this stream socket does not wait; `None` for what is no such socket.
fn never_waits(control: &mut Control, fd: u64, flags: u64) -> Option<bool> {
    match kind(control, fd) {
        FD_SOCKET_NONBLOCKING => Some(true),
        FD_SOCKET_BLOCKING => Some(flags & MSG_DONTWAIT != 0),
        _ => None,
    }
}

/// What the kernel has counted of this socket is known; it is asked now and then, and at once where that is what lets
/// outputs be queued.
pub(crate) fn is_counted(control: &mut Control, fd: u64) -> bool {
    if fd >= STREAMS as u64 {
        return false;
    }
    let known = control.fds[fd as usize];
    if known & FD_COUNTED != 0 {
        return true;
    }
    let this = &control.streams[fd as usize];
    let calls = this.uncounted.load(Relaxed).wrapping_add(1);
    this.uncounted.store(calls, Relaxed);
    let due = calls % CALLS_PER_COUNT == 0 || control.commits.load(Relaxed) != 0;
    // The kernel does not know yet of what is in the queue.
    if known & FD_PRIVATE == 0 || !due || !has_left(control, Some(fd)) {
        return false;
    }
    match stream::counts(syscall, fd) {
        Some(stream::Counts { received: Some(received), sent }) => {
            this.received.store(received, Relaxed);
            this.sent.store(sent, Relaxed);
            this.credit.store(0, Relaxed);
            control.take_failed(fd);
            control.fds[fd as usize] |= FD_COUNTED;
            true
        }
        _ => {
            control.fds[fd as usize] &= !FD_PRIVATE;
            false
        }
    }
}

/// Takes notice of what has gone through a socket.
pub(crate) fn count(control: &mut Control, fd: u64, way: impl Fn(&Stream) -> &AtomicU64, result: i64) {
    if let (Some(known), Some(stream)) = (control.fds.get(fd as usize), control.streams.get(fd as usize))
        && known & FD_COUNTED != 0
        && result > 0
    {
        let counter = way(stream);
        counter.store(counter.load(Relaxed).wrapping_add(result as u64), Relaxed);
    }
}

/// `shutdown`: the end of a direction is counted, too.
pub(crate) fn shutdown(control: &mut Control, call: &Call) -> Option<i64> {
    if let Some(known) = control.fds.get_mut(call.args[0] as usize) {
        *known &= !(FD_PRIVATE | FD_COUNTED);
    }
    again(control, call)
}

/// `read`, `readv` or `recv` on a stream socket.
pub(crate) fn receive(control: &mut Control, call: &Call) -> Option<i64> {
    let flags = flags(call)?;
    let fd = call.args[0];
    let [to, len] = match call.number {
        // A stream may give less than there is room for: the first piece.
        nr::READV if call.args[2] > 0 => piece(call.args[1], 0),
        nr::READV => return None,
        nr::RECVMSG => {
            let [name, _, pieces, count, ancillary, ..] = message_header(call.args[1]);
            if name != 0 || ancillary != 0 || count == 0 {
                return None;
            }
            piece(pieces, 0)
        }
        _ => [call.args[1], call.args[2]],
    };
    if len == 0 || to == 0 {
        return None;
    }
    let nonblocking = never_waits(control, fd, flags)?;
    let digest = call.digest()?;
    let room = len.min(RECEIVE_MAX);
    let mut wait = None;
    let (mut ring, data, got) = loop {
        let mut ring = ring(control)?;
        let record = ring.reserve(size(room) + 2 * output_size(8))?;
        let data = record[DATA..].as_mut_ptr();
        control.pending_set.store(call.args[1], Relaxed);
        let result = if is_counted(control, fd) {
            control.pending_fd.store(fd, Relaxed);
            control.offset.store(control.streams[fd as usize].received.load(Relaxed), Relaxed);
            let make = || syscall(nr::RECVFROM, [fd, data as u64, room, flags | MSG_DONTWAIT, 0, 0]);
            let result = once(control, RECEIVE | COUNTED, call, digest, to, make);
            count(control, fd, |stream| &stream.received, result);
            result
        } else {
            let at = message(control, 0, 1, data as u64, room);
            let make = || syscall(nr::RECVMMSG, [fd, at, 1, flags | MSG_DONTWAIT, 0, 0]);
            match once(control, RECEIVE, call, digest, to, make) {
                1 => (control.message.len.load(Relaxed) & NOT_YET) as i64,
                result => result,
            }
        };
        if result >= 0 {
            break (ring, data, result as u64);
        }
        end(control);
        if nonblocking || result != EAGAIN {
            return log(control, call, digest, result, &[]);
        }
        if wait.is_none() {
            wait = for_data(control, call, digest);
        }
        match wait.as_mut()?.readable(control, fd) {
            Waited::Look => {}
            _ => return None,
        }
    };
    if call.number == nr::RECVMSG {
        let [length, flags] = no_more(call);
        // SAFETY: the program's buffer and header; a fault there is the supervisor's to handle.
        unsafe {
            copy(to as *mut u8, data, got as usize);
            (length.0 as *mut u64).write_unaligned(0);
            (flags.0 as *mut u32).write_unaligned(0);
        }
        let outs = [(to, got), length, flags];
        return settled(control, call, digest, got as i64, if got > 0 { &outs } else { &outs[1..] });
    }
    let out = (got > 0).then_some((to, got));
    let used = if got > 0 { size(got) } else { HEADER_BYTES };
    ring.shrink(used);
    // SAFETY: the record that was reserved above, made shorter.
    let record = unsafe { core::slice::from_raw_parts_mut(data.sub(DATA), used) };
    fill(record, control, call, digest, got as i64, out);
    commit(control, call, &mut ring);
    seam(control);
    end(control);
    // SAFETY: the program's buffer; a fault there is the supervisor's to handle.
    unsafe { copy(to as *mut u8, data, got as usize) };
    Some(got as i64)
}

/// What a message brings besides its data, of which there is nothing here: where the length of the ancillary data and
/// the flags are.
fn no_more(call: &Call) -> [(u64, u64); 2] {
    [(call.args[1] + 40, 8), (call.args[1] + 48, 4)]
}

/// What a call sends on a stream socket.
pub(crate) struct Sending {
    pub(crate) fd: u64,
    /// Address and length of its one piece of memory.
    piece: [u64; 2],
    /// The pieces, where there are several.
    pieces: u64,
    count: u64,
    /// Bytes.
    pub(crate) total: u64,
    flags: u64,
    nonblocking: bool,
}

impl Sending {
    /// `write`, `send`, `writev` or `sendmsg`; `None` for what is not served here.
    pub(crate) fn of(control: &mut Control, call: &Call) -> Option<Self> {
        let flags = flags(call)?;
        let [fd, a1, a2, ..] = call.args;
        let (one, pieces, count) = match call.number {
            nr::WRITEV => ([0, 0], a1, a2),
            nr::SENDMSG => {
                let [name, _, pieces, count, ancillary, _, _] = message_header(a1);
                if name != 0 || ancillary != 0 {
                    return None;
                }
                ([0, 0], pieces, count)
            }
            _ => ([a1, a2], 0, 1),
        };
        if !(1..=PIECES_MAX).contains(&count) || (pieces == 0 && one[0] == 0) {
            return None;
        }
        let nonblocking = never_waits(control, fd, flags)?;
        let one = if count == 1 && pieces != 0 { piece(pieces, 0) } else { one };
        let total = if count == 1 { one[1] } else { (0..count).map(|i| piece(pieces, i)[1]).sum() };
        Some(Self { fd, piece: one, pieces, count, total, flags: flags | MSG_DONTWAIT | MSG_NOSIGNAL, nonblocking })
    }

    /// Copies what is sent: so many bytes as there are in total.
    pub(crate) fn copy_to(&self, mut to: *mut u8) {
        for i in 0..self.count {
            let [at, len] = if self.count == 1 { self.piece } else { piece(self.pieces, i) };
            // SAFETY: the caller made room for all pieces; a fault in the program's memory is the supervisor's to
            // handle.
            unsafe {
                copy(to, at as *const u8, len as usize);
                to = to.add(len as usize);
            }
        }
    }

    /// The message in the shared page that sends it.
    fn message(&self, control: &mut Control) -> u64 {
        let [at, len] = self.piece;
        if self.count == 1 { message(control, 0, 1, at, len) } else { message(control, self.pieces, self.count, 0, 0) }
    }
}

/// `write`, `send`, `writev` or `sendmsg` on a stream socket.
pub(crate) fn send(control: &mut Control, call: &Call) -> Option<i64> {
    const EPIPE: i64 = -32;
    let sending = Sending::of(control, call)?;
    let Sending { fd, total, flags, nonblocking, .. } = sending;
    let digest = call.digest()?;
    if !has_room(control, HEADER_BYTES) {
        return None;
    }
    control.pending_from.store(total, Relaxed);
    let what = if nonblocking { SEND } else { SEND_ALL };
    let result = if is_counted(control, fd) {
        control.pending_fd.store(fd, Relaxed);
        control.offset.store(control.streams[fd as usize].sent.load(Relaxed), Relaxed);
        let message = if sending.count == 1 { 0 } else { sending.message(control) };
        let result = once(control, what | COUNTED, call, digest, 0, || {
            if message == 0 {
                syscall(nr::SENDTO, [fd, sending.piece[0], sending.piece[1], flags, 0, 0])
            } else {
                syscall(nr::SENDMSG, [fd, message, flags, 0, 0, 0])
            }
        });
        count(control, fd, |stream| &stream.sent, result);
        if result >= 0 {
            // Where the supervisor finds it if it has to go on.
            control.message.len.store(result as u64, Relaxed);
        }
        result
    } else {
        let message = sending.message(control);
        match once(control, what, call, digest, 0, || syscall(nr::SENDMMSG, [fd, message, 1, flags, 0, 0])) {
            1 => (control.message.len.load(Relaxed) & NOT_YET) as i64,
            result => result,
        }
    };
    // Without a reader the supervisor makes the call again, with the signal that it brings.
    let left = result == EPIPE && control.ignores_pipe.load(Relaxed) == 0;
    if left || result == EFAULT || (result == EAGAIN && !nonblocking) {
        end(control);
        return None;
    }
    if !nonblocking && result >= 0 && (result as u64) < total {
        // What is left is sent when there is room again, by the supervisor, who takes notice of this part.
        return None;
    }
    settled(control, call, digest, result, &[])
}
