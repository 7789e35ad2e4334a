//! Output commit: what others can see waits until the events that it depends on are in stable storage
//! (ARCHITECTURE.md, "Output commit").

use core::sync::atomic::Ordering::{Relaxed, SeqCst};

use ftrun_abi::fast::{Control, FD_FILE, FD_SOCKET_BLOCKING, FD_SOCKET_NONBLOCKING};
use ftrun_abi::table::is_seen;

use crate::call::{Call, message_header, piece, syscall};
use crate::calls::make;
use crate::clock::monotonic;
use crate::log::{seam, turn};
use crate::{nr, outputs};
use crate::sockets::kind;

/// Longest wait for a commit before the supervisor waits instead, who can do something else meanwhile: nanoseconds at
/// a time, and times.
const PATIENCE: u64 = 10_000_000;
const TIMES: u32 = 10;

/// Most that [`Control::batches`] can say, and what a send takes from it before which the program was busy.
const BATCHES_MAX: u64 = 64;
const BUSY_WEIGHT: u64 = 4;
/// Nanoseconds between sends that are something to do.
const PAUSE: u64 = 3_000;

const FUTEX_WAKE: u64 = 1;

/// Makes a call, an output of the unit not before it may leave.
pub(crate) fn serve(control: &mut Control, call: &Call) -> Option<i64> {
    outputs::let_leave(control, 1);
    let behind = outputs::is_behind_outputs(control, call);
    let closes_file = call.number == nr::CLOSE && closes_file(control, call.args[0]);
    if !behind && !closes_file && !is_seen(call.row()?, &call.args) {
        return make(control, call);
    }
    // That this thread has the turn has to be known before, too.
    if control.last_tid.load(Relaxed) != call.tid {
        turn(control, call)?;
        seam(control);
    }
    let (needed, sii) = (control.needed.load(Relaxed), control.sii.load(Relaxed));
    let expected = expected(control, call);
    let goes_on = behind || is_send(call) && !in_batch(control, needed);
    let stable = closes_file || !behind && may_leave(control, call, needed);
    let queued = if goes_on && !stable { outputs::queue(control, call) } else { None };
    let result = match queued {
        Some(result) => {
            want(control, needed);
            result
        }
        None if stable || waits(control, call, needed) => {
            outputs::forget_credit(control, call.args[0]);
            make(control, call)?
        }
        None => return None,
    };
    if Some(result) == expected && control.sii.load(Relaxed) == sii + 1 {
        // Without this event the call would be made again and come out the same.
        control.needed.store(needed, Relaxed);
    }
    if is_send(call) {
        control.last_send_at.store(monotonic(control), Relaxed);
    }
    Some(result)
}

/// A descriptor of a file is closed, and no locks end with that: who could see it has seen what was written.
fn closes_file(control: &mut Control, fd: u64) -> bool {
    control.locked.load(Relaxed) == 0 && kind(control, fd) == FD_FILE
}

fn is_send(call: &Call) -> bool {
    matches!(call.number, nr::WRITE | nr::WRITEV | nr::SENDTO | nr::SENDMSG | nr::SENDFILE)
}

/// Whether the program sends what it has to say in batches, one after the other. Such a program has nothing to do before
/// the first of them has left: to wait for that costs it nothing, and it is spared the queue. One that takes input or
/// computes between its sends goes on with that.
fn in_batch(control: &Control, needed: u64) -> bool {
    let last = control.last_send.swap(needed, Relaxed);
    let before = control.batches.load(Relaxed);
    let busy = last != needed || monotonic(control).saturating_sub(control.last_send_at.load(Relaxed)) > PAUSE;
    let now = if busy { before.saturating_sub(BUSY_WEIGHT) } else { (before + 1).min(BATCHES_MAX) };
    control.batches.store(now, Relaxed);
    now >= BATCHES_MAX / 2
}

/// All that this output depends on is committed, and what has to leave before it has left.
fn may_leave(control: &Control, call: &Call, needed: u64) -> bool {
    control.committed.load(SeqCst) >= needed && outputs::has_left(control, outputs::socket_of(control, call))
}

/// Asks for a commit.
fn want(control: &Control, needed: u64) {
    if control.want(needed) {
        syscall(nr::FUTEX, [(&raw const control.want_word) as u64, FUTEX_WAKE, 1, 0, 0, 0]);
    }
}

/// Waits until the output may leave; false when that takes long.
fn waits(control: &Control, call: &Call, needed: u64) -> bool {
    want(control, needed);
    for _ in 0..TIMES {
        let word = control.commit_word.load(SeqCst);
        outputs::let_leave(control, usize::MAX);
        if may_leave(control, call, needed) {
            return true;
        }
        if control.slow.load(Relaxed) != 0 {
            return false;
        }
        outputs::wait_commit(control, word, PATIENCE);
    }
    false
}

/// What comes out of a call when nothing stands in its way, and comes out again when it is made again after the loss
/// of the machine: connections are lost with it, so that nothing is sent twice.
fn expected(control: &mut Control, call: &Call) -> Option<i64> {
    let [fd, a1, a2, ..] = call.args;
    let pieces = |at: u64, count: u64| (0..count).map(|i| piece(at, i)[1]).sum::<u64>();
    let sent = match call.number {
        nr::CLOSE | nr::SHUTDOWN | nr::SETSOCKOPT => return Some(0),
        nr::WRITE | nr::SENDTO => a2,
        nr::WRITEV => pieces(a1, a2),
        nr::SENDFILE => call.args[3],
        nr::SENDMSG => {
            let [_, _, at, count, ..] = message_header(a1);
            pieces(at, count)
        }
        _ => return None,
    };
    let stream = matches!(kind(control, fd), FD_SOCKET_NONBLOCKING | FD_SOCKET_BLOCKING);
    i64::try_from(sent).ok().filter(|_| stream)
}
