//! Replay: a served call is given the result that was logged.

use core::sync::atomic::Ordering::Relaxed;

use ftrun_abi::fast::{Control, RING_BASE};
use ftrun_abi::record::{Kind, Record, flag};
use ftrun_abi::ring::Ring;

use crate::call::Call;
use crate::mapping::change_again;
use crate::memory::copy;

/// The logged result of this call, if the next event is this call and was served here; otherwise the
/// supervisor has to look at it.
pub(crate) fn serve(control: &mut Control, call: &Call) -> Option<i64> {
    // SAFETY: the supervisor maps the ring there; nobody writes to it during replay.
    let ring = unsafe { Ring::attach(RING_BASE as *mut u8, control.ring_bytes.load(Relaxed) as usize) }.ok()?;
    let (mut bytes, mut next) = ring.read_at(control.replay_at.load(Relaxed)).ok()??;
    let (mut record, _) = Record::parse(bytes).ok()?;
    if record.kind == Kind::Sched && u64::from(record.header.tid) == call.tid {
        // Its turn before this call was an event; with it goes what follows.
        (bytes, next) = ring.read_at(next).ok()??;
        (record, _) = Record::parse(bytes).ok()?;
    }
    let h = &record.header;
    if record.kind != Kind::Call
        || h.flags & flag::FAST == 0
        || u64::from(h.tid) != call.tid
        || u64::from(h.nr) != call.number
        || call.digest()? != h.digest
        || !change_again(call, h.result)
    {
        return None;
    }
    for (at, bytes) in record.outputs() {
        // SAFETY: memory of the program that the same call wrote when it was logged.
        unsafe { copy(at as *mut u8, bytes.as_ptr(), bytes.len()) };
    }
    control.sii.store(h.sii, Relaxed);
    control.replay_at.store(next, Relaxed);
    Some(h.result)
}
