//! Descriptors come and go, and files are read and written. What a kill leaves open is told afterwards by the
//! descriptor table and by positions in files, which outlive the process (ARCHITECTURE.md, "In doubt").

use core::sync::atomic::Ordering::Relaxed;

use ftrun_abi::fast::{
    ADDRESS_BYTES, CLOSE, Control, ENROL, FD_FILE, FD_COUNTED, FD_FRESH, FD_KIND, FD_PRIVATE, FD_SOCKET_BLOCKING, FD_SOCKET_NONBLOCKING, FD_UNKNOWN, FDS_MAX, OPEN,
    READ_FILE, TRANSFER, WRITE_FILE,
};
use ftrun_abi::record::HEADER_BYTES;

use crate::calls::again;
use crate::call::{Call, EAGAIN, EFAULT, EINTR, syscall, word};
use crate::log::{DATA, commit, end, fill, has_room, log, once, ring, seam, settled, size};
use crate::memory::copy;
use crate::nr;
use crate::sockets::{RECEIVE_MAX, count, kind};
use crate::wait::until_readable;

/// Descriptors that others may have, too: standard input and output.
const STANDARD: u64 = 3;

/// A descriptor is open.
fn is_open(fd: u64) -> bool {
    const F_GETFD: u64 = 1;
    syscall(nr::FCNTL, [fd, F_GETFD, 0, 0, 0, 0]) >= 0
}

/// The lowest descriptor that is not open: what the kernel gives out next.
fn lowest_free(control: &Control) -> u64 {
    let mut fd = control.free_fd.load(Relaxed);
    if control.free_known.load(Relaxed) == 0 {
        while is_open(fd) {
            fd += 1;
        }
        control.free_fd.store(fd, Relaxed);
        control.free_known.store(1, Relaxed);
    }
    fd
}

/// A call that makes a descriptor: `open`, `openat`, `socket`, `dup`, and `accept` on a socket in
/// nonblocking mode.
pub(crate) fn open(control: &mut Control, call: &Call) -> Option<i64> {
    const O_EXCL: u64 = 0o200;
    let flags = match call.number {
        nr::OPEN => call.args[1],
        nr::OPENAT => call.args[2],
        _ => 0,
    };
    if flags & O_EXCL != 0 {
        // Whether it has made the file, the table of descriptors does not tell when it is gone, too.
        return None;
    }
    let accepts = matches!(call.number, nr::ACCEPT | nr::ACCEPT4);
    let digest = call.digest()?;
    if accepts {
        let listener = call.args[0];
        match kind(control, listener) {
            FD_SOCKET_NONBLOCKING => {}
            // A connection that is there stays until somebody takes it.
            FD_SOCKET_BLOCKING if control.alone.load(Relaxed) != 0 => {
                if !until_readable(control, call, digest, listener) {
                    return None;
                }
            }
            _ => return None,
        }
    }
    let (to, len_at) = if accepts { (call.args[1], call.args[2]) } else { (0, 0) };
    let mut own = *call;
    let mut room = 0;
    if to != 0 {
        room = word(len_at).min(ADDRESS_BYTES as u32);
        control.address_len.store(room, Relaxed);
        own.args[1] = (&raw const control.address) as u64;
        own.args[2] = (&raw const control.address_len) as u64;
    }
    if !has_room(control, size(ADDRESS_BYTES as u64) + size(4)) {
        return None;
    }
    let fd = lowest_free(control);
    control.note_change(fd);
    control.pending_fd.store(fd, Relaxed);
    control.pending_from.store(u64::from(room), Relaxed);
    control.offset.store(len_at, Relaxed);
    if call.number == nr::DUP {
        // Before it is so, lest a kill leaves it unsaid.
        control.duplicated.store(1, Relaxed);
        if let Some(known) = control.fds.get_mut(call.args[0] as usize) {
            *known &= !(FD_PRIVATE | FD_COUNTED);
        }
    }
    let result = once(control, OPEN, call, digest, to, || own.make());
    if result == EINTR || result == EFAULT {
        end(control);
        return None;
    }
    let mut outs = [(0, 0); 2];
    let mut used = 0;
    if result >= 0 {
        control.free_fd.store(fd + 1, Relaxed);
        control.free_known.store(0, Relaxed);
        if let Some(known) = control.fds.get_mut(result as usize) {
            *known = match call.number {
                nr::ACCEPT | nr::ACCEPT4 => FD_UNKNOWN | FD_FRESH | FD_PRIVATE,
                nr::SOCKET => FD_UNKNOWN | FD_PRIVATE,
                _ => FD_UNKNOWN,
            };
        }
        if to != 0 {
            let len = control.address_len.load(Relaxed);
            // SAFETY: the program's memory; a fault there is the supervisor's to handle.
            unsafe {
                copy(to as *mut u8, control.address.as_ptr(), len.min(room) as usize);
                (len_at as *mut u32).write_unaligned(len);
            }
            outs = [(to, u64::from(len.min(room))), (len_at, 4)];
            used = 2;
        }
    }
    settled(control, call, digest, result, &outs[..used])
}

/// `close`.
pub(crate) fn close(control: &mut Control, call: &Call) -> Option<i64> {
    let fd = call.args[0];
    if fd >= FDS_MAX as u64 {
        return None;
    }
    // What is known of a descriptor is forgotten when it is closed.
    if control.fds[fd as usize] & FD_KIND == FD_UNKNOWN && !is_open(fd) {
        return None;
    }
    let digest = call.digest()?;
    if !has_room(control, HEADER_BYTES) {
        return None;
    }
    control.note_change(fd);
    control.fds[fd as usize] = FD_UNKNOWN;
    control.pending_fd.store(fd, Relaxed);
    let result = once(control, CLOSE, call, digest, 0, || call.make());
    if fd < control.free_fd.load(Relaxed) {
        // It was the lowest that is not open as soon as it was not.
        control.free_fd.store(fd, Relaxed);
        control.free_known.store(1, Relaxed);
    }
    settled(control, call, digest, result, &[])
}

/// `epoll_ctl`: a change, or the entry of a new connection.
pub(crate) fn enrol(control: &mut Control, call: &Call) -> Option<i64> {
    const EPOLL_CTL_ADD: u64 = 1;
    let [set, op, fd, event, ..] = call.args;
    let fresh = control.fds.get(fd as usize).is_some_and(|known| known & FD_FRESH != 0);
    if op != EPOLL_CTL_ADD || !fresh || event == 0 {
        return None;
    }
    let digest = call.digest()?;
    if !has_room(control, HEADER_BYTES) {
        return None;
    }
    control.pending_fd.store(fd, Relaxed);
    control.pending_set.store(set, Relaxed);
    let result = control.note_enrolment(set, fd, event_at(event), || {
        let result = once(control, ENROL, call, digest, 0, || call.make());
        (result == 0, result)
    });
    if result == EFAULT {
        end(control);
        return None;
    }
    control.fds[fd as usize] &= !FD_FRESH;
    settled(control, call, digest, result, &[])
}

/// `struct epoll_event`: events, and the program's own word.
fn event_at(at: u64) -> (u32, u64) {
    // SAFETY: the program gave this structure to its call; a fault there is the supervisor's to handle.
    (word(at), unsafe { ((at + 4) as *const u64).read_unaligned() })
}

/// `epoll_ctl` that changes an entry: it may be made again.
pub(crate) fn reenrol(control: &Control, call: &Call) -> Option<i64> {
    let [set, _, fd, event, ..] = call.args;
    if event == 0 {
        return None;
    }
    control.note_enrolment(set, fd, event_at(event), || {
        let result = again(control, call);
        (result == Some(0), result)
    })
}

/// What `sendfile` takes: a file, from a position of its own that stands in memory.
pub(crate) struct FilePiece {
    file: u64,
    /// Where the position stands.
    pub(crate) at: u64,
    from: u64,
}

impl FilePiece {
    /// `None` for what is not served here.
    pub(crate) fn of(control: &mut Control, call: &Call) -> Option<Self> {
        let [_, file, at, ..] = call.args;
        if at == 0 || kind(control, file) != FD_FILE {
            return None;
        }
        // SAFETY: the program's memory; a fault there is the supervisor's to handle.
        Some(Self { file, at, from: unsafe { (at as *const u64).read_unaligned() } })
    }

    /// Copies up to so many bytes of it; how many there are, if any, and where it goes on behind them.
    pub(crate) fn copy_to(&self, to: *mut u8, most: u64) -> Option<(u64, u64)> {
        let got = u64::try_from(syscall(nr::PREAD64, [self.file, to as u64, most, self.from, 0, 0])).ok()?;
        (got > 0).then_some((got, self.from + got))
    }
}

/// `sendfile` of a file to a socket in nonblocking mode.
pub(crate) fn transfer(control: &mut Control, call: &Call) -> Option<i64> {
    let output = call.args[0];
    let quiet = control.ignores_pipe.load(Relaxed) != 0;
    if !quiet || kind(control, output) != FD_SOCKET_NONBLOCKING {
        return None;
    }
    let FilePiece { at, from, .. } = FilePiece::of(control, call)?;
    let digest = call.digest()?;
    if !has_room(control, size(8)) {
        return None;
    }
    control.pending_from.store(from, Relaxed);
    control.offset.store(from, Relaxed);
    let mut own = *call;
    own.args[2] = (&raw const control.offset) as u64;
    let result = once(control, TRANSFER, call, digest, at, || own.make());
    if result < 0 && result != EAGAIN {
        end(control);
        return None;
    }
    // SAFETY: as above.
    unsafe { (at as *mut u64).write_unaligned(control.offset.load(Relaxed)) };
    let outs = [(at, 8)];
    count(control, output, |stream| &stream.sent, result);
    settled(control, call, digest, result, if result < 0 { &[] } else { &outs })
}

/// Nobody but this process moves the position of the file.
fn is_ours(control: &mut Control, fd: u64) -> bool {
    fd >= STANDARD && control.alone.load(Relaxed) != 0 && kind(control, fd) == FD_FILE
}

/// The position of a file, from where a call is about to move it.
fn position(fd: u64) -> Option<u64> {
    const SEEK_CUR: u64 = 1;
    u64::try_from(syscall(nr::LSEEK, [fd, 0, SEEK_CUR, 0, 0, 0])).ok()
}

/// `write` to a file: what a kill leaves open is told by its position.
pub(crate) fn write(control: &mut Control, call: &Call) -> Option<i64> {
    let [fd, at, len, ..] = call.args;
    if len == 0 || at == 0 || !is_ours(control, fd) {
        return None;
    }
    let digest = call.digest()?;
    let from = position(fd)?;
    if !has_room(control, HEADER_BYTES) {
        return None;
    }
    control.pending_fd.store(fd, Relaxed);
    control.note_change(fd);
    control.pending_from.store(from, Relaxed);
    control.offset.store(len, Relaxed);
    let result = once(control, WRITE_FILE, call, digest, 0, || call.make());
    if result < 0 {
        end(control);
        return None;
    }
    settled(control, call, digest, result, &[])
}

/// `read` from a file: the data first, then the position.
pub(crate) fn read(control: &mut Control, call: &Call) -> Option<i64> {
    const SEEK_SET: u64 = 0;
    let [fd, to, len, ..] = call.args;
    if len == 0 || len > RECEIVE_MAX || to == 0 || !is_ours(control, fd) {
        return None;
    }
    let digest = call.digest()?;
    let from = position(fd)?;
    let mut ring = ring(control)?;
    let record = ring.reserve(size(len))?;
    let data = record[DATA..].as_mut_ptr();
    let got = syscall(nr::PREAD64, [fd, data as u64, len, from, 0, 0]);
    if got <= 0 {
        return if got == 0 { log(control, call, digest, 0, &[]) } else { None };
    }
    control.pending_fd.store(fd, Relaxed);
    control.note_change(fd);
    control.pending_from.store(from, Relaxed);
    control.offset.store(from + got as u64, Relaxed);
    let seek = || syscall(nr::LSEEK, [fd, from + got as u64, SEEK_SET, 0, 0, 0]);
    let moved = once(control, READ_FILE, call, digest, to, seek);
    if moved < 0 {
        end(control);
        return None;
    }
    ring.shrink(size(got as u64));
    // SAFETY: the record that was reserved above, made shorter.
    let record = unsafe { core::slice::from_raw_parts_mut(data.sub(DATA), size(got as u64)) };
    fill(record, control, call, digest, got, Some((to, got as u64)));
    commit(control, call, &mut ring);
    seam(control);
    end(control);
    // SAFETY: the program's buffer; a fault there is the supervisor's to handle.
    unsafe { copy(to as *mut u8, data, got as usize) };
    Some(got)
}
