//! Writing events, and what recovery needs to know of a call that has not become one.

use core::sync::atomic::Ordering::{Relaxed, Release};
use core::sync::atomic::compiler_fence;

use ftrun_abi::fast::{Control, NOT_YET, NOTHING, RING_BASE};
use ftrun_abi::record::{HEADER_BYTES, Header, Kind, OUTPUT_HEADER_BYTES, flag};
use ftrun_abi::ring::Ring;

use crate::call::{Call, syscall};
use crate::memory::copy;
use crate::nr;

const SIGKILL: u64 = 9;

/// A place where tests have the process killed.
#[inline]
pub(crate) fn seam(control: &Control) {
    let left = control.kill_in.load(Relaxed);
    if left != 0 {
        control.kill_in.store(left - 1, Relaxed);
        if left == 1 {
            syscall(nr::KILL, [control.real_pid.load(Relaxed), SIGKILL, 0, 0, 0, 0]);
        }
    }
}

/// The event ring.
pub(crate) fn ring(control: &Control) -> Option<Ring> {
    // SAFETY: the supervisor maps the ring there, and the one running thread is its only producer.
    unsafe { Ring::attach(RING_BASE as *mut u8, control.ring_bytes.load(Relaxed) as usize) }.ok()
}

/// Bytes of a record with one output of `len` bytes.
pub(crate) fn size(len: u64) -> usize {
    HEADER_BYTES + output_size(len)
}

/// Bytes of one output of `len` bytes in a record.
pub(crate) fn output_size(len: u64) -> usize {
    OUTPUT_HEADER_BYTES + (len as usize).next_multiple_of(8)
}

/// Where the data of the one output of a record stands.
pub(crate) const DATA: usize = HEADER_BYTES + OUTPUT_HEADER_BYTES;

fn header(to: &mut [u8], control: &Control, call: &Call, digest: u64, result: i64, outs: usize) {
    let header = Header {
        len: to.len() as u32,
        kind: Kind::Call as u16,
        nr: call.number as u16,
        tid: call.tid as u32,
        flags: flag::FAST,
        sii: control.sii.load(Relaxed) + 1,
        result,
        digest,
        outs: outs as u32,
        reserved: 0,
    };
    // SAFETY: records begin at multiples of 8, `Header` is laid out as it is encoded on this (little-endian)
    // processor, and every record has room for it.
    unsafe { to.as_mut_ptr().cast::<Header>().write(header) };
}

/// Writes the header of an output and zeros behind its data; returns where the data goes.
fn output(to: &mut [u8], at: usize, address: u64, len: u64) -> *mut u8 {
    let end = at + output_size(len);
    // SAFETY: outputs begin at multiples of 8, and the caller made room for this one.
    unsafe {
        let out = to.as_mut_ptr().add(at);
        out.cast::<[u64; 2]>().write([address, len]);
        for i in at + OUTPUT_HEADER_BYTES + len as usize..end {
            to.as_mut_ptr().add(i).write(0);
        }
        out.add(OUTPUT_HEADER_BYTES)
    }
}

/// Completes a record whose one output, if there is one, stands in it already.
pub(crate) fn fill(
    to: &mut [u8],
    control: &Control,
    call: &Call,
    digest: u64,
    result: i64,
    out: Option<(u64, u64)>,
) {
    header(to, control, call, digest, result, usize::from(out.is_some()));
    if let Some((address, len)) = out {
        output(to, HEADER_BYTES, address, len);
    }
}

/// Logs that the calling thread has the turn, standing before a call.
pub(crate) fn turn(control: &Control, call: &Call) -> Option<()> {
    let mut ring = ring(control)?;
    let record = ring.reserve(HEADER_BYTES)?;
    header(record, control, call, 0, 0, 0);
    // SAFETY: that has written a `Header` there.
    let header = unsafe { &mut *record.as_mut_ptr().cast::<Header>() };
    (header.kind, header.nr, header.flags) = (Kind::Sched as u16, 0, 0);
    commit(control, call, &mut ring);
    Some(())
}

/// Makes the reserved record an event.
pub(crate) fn commit(control: &Control, call: &Call, ring: &mut Ring) {
    compiler_fence(Release);
    ring.commit();
    // A kill between the two is settled by the record's own number.
    let sii = control.sii.load(Relaxed) + 1;
    control.sii.store(sii, Relaxed);
    control.needed.store(sii, Relaxed);
    control.last_tid.store(call.tid, Relaxed);
}

/// Logs a call that has been made, with memory of the program that it wrote (address and length).
pub(crate) fn log(control: &Control, call: &Call, digest: u64, result: i64, outs: &[(u64, u64)]) -> Option<i64> {
    let mut ring = ring(control)?;
    let record = ring.reserve(HEADER_BYTES + outs.iter().map(|o| output_size(o.1)).sum::<usize>())?;
    header(record, control, call, digest, result, outs.len());
    let mut at = HEADER_BYTES;
    for (address, len) in outs {
        let to = output(record, at, *address, *len);
        // SAFETY: `output` made room; the memory has just been written by the call.
        unsafe { copy(to, *address as *const u8, *len as usize) };
        at += output_size(*len);
    }
    commit(control, call, &mut ring);
    Some(result)
}

/// There is room for a record of `bytes`. A call that is made has to be logged.
pub(crate) fn has_room(control: &Control, bytes: usize) -> bool {
    ring(control).is_some_and(|mut ring| ring.reserve(bytes).is_some())
}

/// Notes that an operation is under way, so that a kill from here on is settled. `at` is where its data goes.
pub(crate) fn begin(control: &Control, what: u64, call: &Call, digest: u64, at: u64) {
    for (slot, value) in control.pending_call.iter().zip([call.tid, call.number, digest, at]) {
        slot.store(value, Relaxed);
    }
    control.pending_sii.store(control.sii.load(Relaxed), Relaxed);
    control.message.len.store(NOT_YET, Relaxed);
    compiler_fence(Release);
    control.pending.store(what, Release);
}

/// The operation is settled.
pub(crate) fn end(control: &Control) {
    control.pending.store(NOTHING, Relaxed);
}

/// Makes a call that must not be made twice; what it is about stands in the page already.
pub(crate) fn once(control: &Control, what: u64, call: &Call, digest: u64, at: u64, make: impl FnOnce() -> i64) -> i64 {
    begin(control, what, call, digest, at);
    seam(control);
    let result = make();
    seam(control);
    result
}

/// Logs the result of [`once`], and with that it is settled.
pub(crate) fn settled(control: &Control, call: &Call, digest: u64, result: i64, outs: &[(u64, u64)]) -> Option<i64> {
    let logged = log(control, call, digest, result, outs);
    seam(control);
    end(control);
    logged
}
