//! Receiving and sending on stream sockets, by `recvmmsg` and `sendmmsg` with one message whose length the
//! kernel writes into the shared page before the process can die (DESIGN, in-doubt operations).

use core::sync::atomic::Ordering::Relaxed;

use ftrun_abi::fast::{
    Control, FD_FILE, FD_FRESH, FD_OTHER, FD_SOCKET_BLOCKING, FD_SOCKET_NONBLOCKING, FD_UNKNOWN, Message, NOT_YET,
    RECEIVE, SEND, SEND_ALL,
};
use ftrun_abi::record::HEADER_BYTES;

use crate::call::{Call, EAGAIN, message_header, piece, syscall};
use crate::log::{DATA, begin, commit, end, fill, has_room, log, once, ring, seam, settled, size};
use crate::memory::copy;
use crate::nr;
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
    let Some(known) = control.fds.get_mut(fd as usize) else { return FD_OTHER };
    if *known & !FD_FRESH == FD_UNKNOWN {
        *known |= ask(fd);
    }
    *known & !FD_FRESH
}

fn ask(fd: u64) -> u8 {
    const F_GETFL: u64 = 3;
    const O_NONBLOCK: i64 = 0o4000;
    const SOL_SOCKET: u64 = 1;
    const SO_TYPE: u64 = 3;
    const S_IFMT: u32 = 0o170_000;
    const S_IFREG: u32 = 0o100_000;
    const PROC_SUPER_MAGIC: u64 = 0x9fa0;
    let (mut type_, mut len) = (0u32, 4u32);
    let found = syscall(nr::GETSOCKOPT, [fd, SOL_SOCKET, SO_TYPE, (&raw mut type_) as u64, (&raw mut len) as u64, 0]);
    if found != 0 {
        // `struct stat`: the mode is at 24.
        let mut stat = [0u32; 36];
        let found = syscall(nr::FSTAT, [fd, (&raw mut stat) as u64, 0, 0, 0, 0]);
        // `struct statfs`: the type is at 0. What is written to a file of /proc changes the process.
        let mut system = [0u64; 15];
        let known = syscall(nr::FSTATFS, [fd, (&raw mut system) as u64, 0, 0, 0, 0]);
        let plain = found == 0 && known == 0 && stat[6] & S_IFMT == S_IFREG && system[0] != PROC_SUPER_MAGIC;
        return if plain { FD_FILE } else { FD_OTHER };
    }
    let flags = syscall(nr::FCNTL, [fd, F_GETFL, 0, 0, 0, 0]);
    match flags {
        0.. if type_ == SOCK_STREAM && flags & O_NONBLOCK != 0 => FD_SOCKET_NONBLOCKING,
        0.. if type_ == SOCK_STREAM => FD_SOCKET_BLOCKING,
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
        nr::SENDMSG => a2,
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

/// `read`, `readv` or `recv` on a stream socket.
pub(crate) fn receive(control: &mut Control, call: &Call) -> Option<i64> {
    let flags = flags(call)?;
    let fd = call.args[0];
    let [to, len] = match call.number {
        // A stream may give less than there is room for: the first piece.
        nr::READV if call.args[2] > 0 => piece(call.args[1], 0),
        nr::READV => return None,
        _ => [call.args[1], call.args[2]],
    };
    if len == 0 || to == 0 {
        return None;
    }
    let nonblocking = never_waits(control, fd, flags)?;
    let digest = call.digest()?;
    let room = len.min(RECEIVE_MAX);
    let mut wait = None;
    let (mut ring, data) = loop {
        let mut ring = ring(control)?;
        let record = ring.reserve(size(room))?;
        let data = record[DATA..].as_mut_ptr();
        let at = message(control, 0, 1, data as u64, room);
        begin(control, RECEIVE, call, digest, to);
        seam(control);
        let result = syscall(nr::RECVMMSG, [fd, at, 1, flags | MSG_DONTWAIT, 0, 0]);
        seam(control);
        if result == 1 {
            break (ring, data);
        }
        end(control);
        if result != EAGAIN {
            return None;
        }
        if nonblocking {
            return log(control, call, digest, EAGAIN, &[]);
        }
        if wait.is_none() {
            wait = for_data(control, call, digest);
        }
        match wait.as_mut()?.readable(control, fd) {
            Waited::Look => {}
            _ => return None,
        }
    };
    let got = control.message.len.load(Relaxed) & NOT_YET;
    let out = (got > 0).then_some((to, got));
    let used = if got > 0 { size(got) } else { HEADER_BYTES };
    ring.shrink(used);
    // SAFETY: the record that was reserved above, made shorter.
    let record = unsafe { core::slice::from_raw_parts_mut(data.sub(DATA), used) };
    fill(record, control, call, digest, got as i64, out);
    commit(control, &mut ring);
    seam(control);
    end(control);
    // SAFETY: the program's buffer; a fault there is the supervisor's to handle.
    unsafe { copy(to as *mut u8, data, got as usize) };
    Some(got as i64)
}

/// `write`, `send`, `writev` or `sendmsg` on a stream socket.
pub(crate) fn send(control: &mut Control, call: &Call) -> Option<i64> {
    let flags = flags(call)?;
    let [fd, a1, a2, ..] = call.args;
    let (at, len, pieces, count) = match call.number {
        nr::WRITEV => (0, 0, a1, a2),
        nr::SENDMSG => {
            let [name, _, pieces, count, ancillary, _, _] = message_header(a1);
            if name != 0 || ancillary != 0 {
                return None;
            }
            (0, 0, pieces, count)
        }
        _ => (a1, a2, 0, 1),
    };
    if !(1..=PIECES_MAX).contains(&count) || (pieces == 0 && at == 0) {
        return None;
    }
    let nonblocking = never_waits(control, fd, flags)?;
    let digest = call.digest()?;
    if !has_room(control, HEADER_BYTES) {
        return None;
    }
    let total = if pieces == 0 { len } else { (0..count).map(|i| piece(pieces, i)[1]).sum() };
    let message = message(control, pieces, count, at, len);
    control.pending_from.store(total, Relaxed);
    // Without a reader the supervisor makes the call again, with the signal that it brings.
    let make = || syscall(nr::SENDMMSG, [fd, message, 1, flags | MSG_DONTWAIT | MSG_NOSIGNAL, 0, 0]);
    let result = once(control, if nonblocking { SEND } else { SEND_ALL }, call, digest, 0, make);
    let result = match result {
        1 => (control.message.len.load(Relaxed) & NOT_YET) as i64,
        EAGAIN if nonblocking => EAGAIN,
        _ => {
            end(control);
            return None;
        }
    };
    if !nonblocking && (result as u64) < total {
        // What is left is sent when there is room again, by the supervisor, who takes notice of this part.
        return None;
    }
    settled(control, call, digest, result, &[])
}
