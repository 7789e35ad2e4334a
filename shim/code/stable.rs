//! Output commit: what others can see waits until the events that it depends on are in stable storage
//! (ARCHITECTURE.md, "Output commit").

use core::sync::atomic::Ordering::{Acquire, Relaxed, SeqCst};

use ftrun_abi::fast::{Control, FD_SOCKET_BLOCKING, FD_SOCKET_NONBLOCKING};
use ftrun_abi::table::is_seen;

use crate::call::{Call, message_header, piece, syscall};
use crate::calls::make;
use crate::nr;
use crate::sockets::kind;

/// Longest wait for a commit before the supervisor waits instead, who can do something else meanwhile: nanoseconds at
/// a time, and times.
const PATIENCE: [u64; 2] = [0, 10_000_000];
const TIMES: u32 = 10;

const FUTEX_WAIT: u64 = 0;
const FUTEX_WAKE: u64 = 1;

/// Makes a call, an output of the unit not before it may leave.
pub(crate) fn serve(control: &mut Control, call: &Call) -> Option<i64> {
    if !is_seen(call.row()?, &call.args) {
        return make(control, call);
    }
    // That this thread has the turn has to be known before, too; the supervisor writes that down.
    if control.last_tid.load(Relaxed) != call.tid || !is_committed(control) {
        return None;
    }
    let (needed, sii) = (control.needed.load(Relaxed), control.sii.load(Relaxed));
    let expected = expected(control, call);
    let result = make(control, call)?;
    if Some(result) == expected && control.sii.load(Relaxed) == sii + 1 {
        // Without this event the call would be made again and come out the same.
        control.needed.store(needed, Relaxed);
    }
    Some(result)
}

/// Waits until all that an output now depends on is committed; false when that takes long.
fn is_committed(control: &Control) -> bool {
    let needed = control.needed.load(Relaxed);
    if control.committed.load(Acquire) >= needed {
        return true;
    }
    control.wanted.fetch_max(needed, SeqCst);
    control.want_word.fetch_add(1, SeqCst);
    syscall(nr::FUTEX, [(&raw const control.want_word) as u64, FUTEX_WAKE, 1, 0, 0, 0]);
    for _ in 0..TIMES {
        let word = control.commit_word.load(SeqCst);
        if control.committed.load(SeqCst) >= needed {
            return true;
        }
        if control.slow.load(Relaxed) != 0 {
            return false;
        }
        let (patience, at) = (PATIENCE, (&raw const control.commit_word) as u64);
        syscall(nr::FUTEX, [at, FUTEX_WAIT, u64::from(word), (&raw const patience) as u64, 0, 0]);
    }
    false
}

/// What comes out of a call when nothing stands in its way, and comes out again when it is made again after the loss
/// of the machine: connections are lost with it, so that nothing is sent twice.
fn expected(control: &mut Control, call: &Call) -> Option<i64> {
    let [fd, a1, a2, ..] = call.args;
    let pieces = |at: u64, count: u64| (0..count).map(|i| piece(at, i)[1]).sum::<u64>();
    let sent = match call.number {
        nr::CLOSE | nr::SHUTDOWN => return Some(0),
        nr::WRITE | nr::SENDTO => a2,
        nr::WRITEV => pieces(a1, a2),
        nr::SENDMSG => {
            let [_, _, at, count, ..] = message_header(a1);
            pieces(at, count)
        }
        _ => return None,
    };
    let stream = matches!(kind(control, fd), FD_SOCKET_NONBLOCKING | FD_SOCKET_BLOCKING);
    i64::try_from(sent).ok().filter(|_| stream)
}
