//! The calls that are served in the process, while the program runs.
//!
//! A call is served when nothing about it needs the supervisor: it does not block, or may wait here; it changes
//! nothing that the supervisor keeps; and a kill at any instant leaves behind what is needed to tell whether it
//! took effect, or it may be made again.

use core::sync::atomic::Ordering::Relaxed;

use ftrun_abi::fast::{Control, FD_COUNTED, FD_FILE, FD_FRESH, FD_PRIVATE};
use ftrun_abi::stream;
use ftrun_abi::record::HEADER_BYTES;
use ftrun_abi::table::{Arg, Class};

use crate::call::{Call, EFAULT, EINTR, word};
use crate::log::{has_room, log, output_size};
use crate::{clock, files, mapping, nr, sockets, stable, wait};

/// Makes the call and logs it; `None` when the supervisor has to.
pub(crate) fn serve(control: &mut Control, call: &Call) -> Option<i64> {
    if control.commits.load(Relaxed) == 0 { make(control, call) } else { stable::serve(control, call) }
}

/// The same for what need not wait for output commit.
pub(crate) fn make(control: &mut Control, call: &Call) -> Option<i64> {
    let [a0, a1, a2, _, a4, _] = call.args;
    let held = control.held.load(Relaxed);
    if held != 0 && (changes_table(call.number, a1 as u32) || (a0 < held.into() && sets_mode(call.number, a1 as u32))) {
        return None;
    }
    match call.number {
        nr::READ => sockets::receive(control, call).or_else(|| files::read(control, call)),
        nr::WRITE => sockets::send(control, call).or_else(|| files::write(control, call)),
        nr::RECVFROM | nr::READV | nr::RECVMSG => sockets::receive(control, call),
        nr::SENDTO | nr::WRITEV | nr::SENDMSG => sockets::send(control, call),
        nr::EPOLL_WAIT => wait::epoll(control, call),
        nr::EPOLL_PWAIT | nr::EPOLL_PWAIT2 if a4 == 0 => wait::epoll(control, call),
        nr::POLL | nr::PPOLL => wait::poll(control, call),
        nr::SELECT | nr::PSELECT6 => wait::select(control, call),
        nr::NANOSLEEP | nr::CLOCK_NANOSLEEP => wait::sleep(control, call),
        nr::CLOCK_GETTIME if a0 > CLOCKS => None,
        nr::CLOCK_GETTIME | nr::GETTIMEOFDAY | nr::TIME => clock::time(control, call).or_else(|| again(control, call)),
        nr::OPEN | nr::OPENAT | nr::SOCKET | nr::ACCEPT | nr::ACCEPT4 | nr::DUP => files::open(control, call),
        nr::CLOSE => files::close(control, call),
        nr::EPOLL_CTL if a1 == EPOLL_CTL_MOD => files::reenrol(control, call),
        nr::EPOLL_CTL => files::enrol(control, call),
        nr::SENDFILE => files::transfer(control, call),
        nr::MMAP | nr::MUNMAP | nr::MREMAP | nr::MPROTECT | nr::MADVISE => mapping::change(control, call),
        nr::FUTEX => futex(control, call),
        nr::SCHED_YIELD if control.budget.load(Relaxed) == u64::MAX => known(control, call, 0),
        nr::GETPID => known(control, call, control.pid.load(Relaxed) as i64),
        nr::GETPPID => known(control, call, control.parent.load(Relaxed) as i64),
        nr::GETTID => known(control, call, call.tid as i64),
        nr::LSEEK if a2 != SEEK_CUR || a1 == 0 => again(control, call),
        nr::PREAD64 if a2 <= sockets::RECEIVE_MAX => again(control, call),
        nr::PWRITE64 | nr::FTRUNCATE | nr::FSYNC | nr::FDATASYNC if sockets::kind(control, a0) == FD_FILE => {
            again(control, call)
        }
        nr::FCNTL | nr::IOCTL => command(control, call),
        nr::SETSOCKOPT if stream::stays_plain(a1, a2) => again(control, call),
        nr::SHUTDOWN => sockets::shutdown(control, call),
        // Asking for the error clears it.
        nr::GETSOCKOPT if (a1, a2) != (SOL_SOCKET, SO_ERROR) => again(control, call),
        nr::GETRANDOM if a1 <= 256 => again(control, call),
        nr::STAT
        | nr::FSTAT
        | nr::LSTAT
        | nr::NEWFSTATAT
        | nr::STATX
        | nr::ACCESS
        | nr::FACCESSAT
        | nr::FACCESSAT2
        | nr::READLINK
        | nr::READLINKAT
        | nr::GETSOCKNAME
        | nr::GETPEERNAME
        | nr::GETUID
        | nr::GETGID
        | nr::GETEUID
        | nr::GETEGID => again(control, call),
        _ => None,
    }
}

/// The call makes or closes descriptors, or changes what belongs to a descriptor rather than to what it leads to; of what is
/// served here.
fn changes_table(number: u64, command: u32) -> bool {
    match number {
        nr::OPEN | nr::OPENAT | nr::SOCKET | nr::ACCEPT | nr::ACCEPT4 | nr::DUP | nr::CLOSE => true,
        nr::FCNTL => command == F_SETFD,
        nr::IOCTL => command == FIOCLEX,
        _ => false,
    }
}

fn sets_mode(number: u64, command: u32) -> bool {
    const F_SETFL: u32 = 4;
    const FIONBIO: u32 = 0x5421;
    matches!((number, command), (nr::FCNTL, F_SETFL) | (nr::IOCTL, FIONBIO))
}

const F_SETFD: u32 = 2;
const FIOCLEX: u32 = 0x5451;
const EPOLL_CTL_MOD: u64 = 3;
const SEEK_CUR: u64 = 1;
const SOL_SOCKET: u64 = 1;
const SO_ERROR: u64 = 4;
/// The last clock that is not a process's or a thread's: `CLOCK_TAI`.
const CLOCKS: u64 = 11;

/// A call whose result needs nobody to be asked.
fn known(control: &Control, call: &Call, result: i64) -> Option<i64> {
    log(control, call, call.digest()?, result, &[])
}

/// A call that may be made again: killed before it was logged, it comes out the same, or as if the world had
/// changed before it.
pub(crate) fn again(control: &Control, call: &Call) -> Option<i64> {
    let row = call.row().filter(|row| matches!(row.class, Class::Input | Class::Output | Class::Object))?;
    let mut outs = [(0, 0); 3];
    let mut used = [None; 3];
    let mut count = 0;
    for (arg, at) in row.args.iter().zip(call.args) {
        let (len, how) = match *arg {
            Arg::Out(len, how) if at != 0 => (len, Some(how)),
            Arg::InOut(len) if at != 0 => (len, None),
            Arg::Int | Arg::Hex | Arg::Addr | Arg::Fd | Arg::DirFd | Arg::Path | Arg::Str | Arg::In(_) => continue,
            Arg::Out(..) | Arg::InOut(_) => continue,
            _ => return None,
        };
        let room = len.bytes(&call.args, |at| Some(word(at)))?;
        *outs.get_mut(count)? = (at, room);
        used[count] = how;
        count += 1;
    }
    let outs = &mut outs[..count];
    if !has_room(control, HEADER_BYTES + outs.iter().map(|o| output_size(o.1)).sum::<usize>()) {
        return None;
    }
    let digest = call.digest_by(row)?;
    if row.class != Class::Input && call.number != nr::EPOLL_CTL {
        control.note_change(call.args[0]);
    }
    let result = call.make();
    if result == EINTR || result == EFAULT {
        return None;
    }
    if result < 0 {
        return log(control, call, digest, result, &[]);
    }
    for (out, how) in outs.iter_mut().zip(used) {
        if let Some(how) = how {
            out.1 = how.bytes(out.1, result, &call.args, |at| Some(word(at)))?;
        }
    }
    log(control, call, digest, result, outs)
}

/// Commands of `fcntl` and `ioctl` that may be given again.
fn command(control: &mut Control, call: &Call) -> Option<i64> {
    const F_GETFD: u32 = 1;
    const F_GETFL: u32 = 3;
    const F_SETFL: u32 = 4;
    const F_SETLK: u32 = 6;
    const TCGETS: u32 = 0x5401;
    const TIOCGWINSZ: u32 = 0x5413;
    const FIONREAD: u32 = 0x541b;
    const FIONBIO: u32 = 0x5421;
    const O_ASYNC: u64 = 0o20000;
    const SEEK_END: u32 = 2;
    let [fd, command, arg, ..] = call.args;
    let mode = match (call.number, command as u32) {
        (nr::FCNTL, F_GETFD | F_SETFD | F_GETFL | F_SETLK) => false,
        (nr::FCNTL, F_SETFL) if arg & O_ASYNC == 0 => true,
        (nr::IOCTL, TCGETS | TIOCGWINSZ | FIONREAD | FIOCLEX) => false,
        (nr::IOCTL, FIONBIO) => true,
        _ => return None,
    };
    if (call.number, command as u32) == (nr::FCNTL, F_SETLK) {
        // `l_type` and `l_whence`. What is counted from the end is not known when the file has another one.
        if arg == 0 || word(arg) >> 16 == SEEK_END {
            return None;
        }
        control.locked.store(1, Relaxed);
    }
    if mode {
        if control.duplicated.load(Relaxed) != 0 {
            for known in &mut control.fds {
                *known &= FD_PRIVATE | FD_COUNTED;
            }
        } else if let Some(known) = control.fds.get_mut(fd as usize) {
            *known &= FD_FRESH | FD_PRIVATE | FD_COUNTED;
        }
    }
    again(control, call)
}

/// `futex` where nobody waits: nobody is woken, and a word that has another value is not waited for.
fn futex(control: &Control, call: &Call) -> Option<i64> {
    const WAIT: u64 = 0;
    const WAKE: u64 = 1;
    const WAIT_BITSET: u64 = 9;
    const WAKE_BITSET: u64 = 10;
    /// `FUTEX_PRIVATE_FLAG` and `FUTEX_CLOCK_REALTIME`.
    const FLAGS: u64 = 128 | 256;
    let [at, op, value, ..] = call.args;
    if at == 0 || at & 3 != 0 {
        return None;
    }
    match op & !FLAGS {
        WAKE | WAKE_BITSET if control.futex_waiters.load(Relaxed) == 0 => known(control, call, 0),
        WAIT | WAIT_BITSET if word(at) != value as u32 => known(control, call, crate::call::EAGAIN),
        _ => None,
    }
}
