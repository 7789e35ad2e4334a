//! The queue of outputs at durability `node`: bytes that the unit has sent, and that leave when the events that they
//! depend on are in stable storage.
//!
//! The unit's running thread puts them there and goes on. Whoever has [`Control::leaver`] lets them leave: the shim when
//! the program comes by with a call, or a thread of the supervisor when it does not. How much of one the kernel has
//! taken it writes into shared memory itself, so that the death of either is settled ([`take_up`]).

use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::SeqCst;

use crate::fast::{Control, Message, NOT_YET, OUTPUT_HEADER};
use crate::ring::{Ring, RingError};
use crate::stream::Kernel;

/// What stands before the data of an output in the queue.
#[derive(Debug)]
#[repr(C)]
pub struct Output {
    /// The socket; with [`OPTION`] the data are an option that is set there: level, name and value, 4 bytes each.
    pub fd: u64,
    /// The event that must be in stable storage before.
    pub needed: u64,
    /// Bytes that have left, or need not leave any more.
    pub done: AtomicU64,
}

/// Added to [`Output::fd`].
pub const OPTION: u64 = 1 << 63;

impl Output {
    fn socket(&self) -> u64 {
        self.fd & !OPTION
    }
}

const _: () = assert!(size_of::<Output>() == OUTPUT_HEADER);

/// [`Control::leaver`]: the unit itself.
pub const BY_SHIM: u32 = 1;
/// [`Control::leaver`]: its supervisor.
pub const BY_SUPERVISOR: u32 = 2;

/// Sockets that are passed over in one pass since their buffers are full.
const FULL_MAX: usize = 16;

const SETSOCKOPT: u64 = 54;
const SENDMMSG: u64 = 307;
/// `MSG_DONTWAIT` and `MSG_NOSIGNAL`.
const FLAGS: u64 = 0x4040;
const EINTR: i64 = -4;
const EAGAIN: i64 = -11;
const ENOMEM: i64 = -12;
const ENOBUFS: i64 = -105;

/// What came of a pass.
#[derive(Clone, Copy, Debug, Default)]
pub struct Passed {
    /// Sockets whose buffers are full.
    pub full: [u64; FULL_MAX],
    /// How many.
    pub full_count: usize,
}

impl Passed {
    fn is_full(&self, fd: u64) -> bool {
        self.full[..self.full_count].contains(&fd)
    }
}

/// The queue is empty.
pub fn is_empty(ring: &Ring) -> bool {
    ring.begin() == ring.end()
}

/// The oldest output may leave.
pub fn is_due(control: &Control, ring: &Ring) -> bool {
    // What is committed is looked at first: what is in the queue by then is there.
    let committed = control.committed.load(SeqCst);
    matches!(ring.read_at(ring.begin()), Ok(Some((record, _))) if parts(record).0.needed <= committed)
}

/// Lets up to `most` outputs leave that may, in the order of each socket; sockets whose buffers are full are passed
/// over. `None` when somebody else is doing that. `who` is not 0 and names the caller.
///
/// # Errors
/// The queue has been overwritten.
///
/// # Safety
/// `message` is that of [`Control::output`], and `ring` the queue, each in this process's mapping of the shared memory.
pub unsafe fn pass(
    kernel: impl Kernel,
    control: &Control,
    message: *mut Message,
    ring: &mut Ring,
    most: usize,
    who: u32,
) -> Result<Option<Passed>, RingError> {
    if control.leaver.compare_exchange(0, who, SeqCst, SeqCst).is_err() {
        return Ok(None);
    }
    let committed = control.committed.load(SeqCst);
    let (mut passed, mut position) = (Passed::default(), ring.begin());
    let mut left = position;
    for _ in 0..most {
        let Some((record, next)) = ring.read_at(position)? else { break };
        let (this, data) = parts(record);
        if this.needed > committed || passed.full_count == FULL_MAX {
            break;
        }
        if !passed.is_full(this.socket()) {
            // SAFETY: by the contract of this function, and nobody else is letting outputs leave.
            if !unsafe { leave(&kernel, control, message, position, this, data) } {
                passed.full[passed.full_count] = this.socket();
                passed.full_count += 1;
            } else if left == position {
                left = next;
            }
        }
        position = next;
    }
    ring.release_to(left);
    control.leaver.store(0, SeqCst);
    Ok(Some(passed))
}

/// After the death of who was letting outputs leave (`who`): what the kernel had taken of the last one is taken notice of.
pub fn take_up(control: &Control, ring: &Ring, who: u32) {
    if control.leaver.load(SeqCst) != who {
        return;
    }
    if let Some(at) = control.leaving.load(SeqCst).checked_sub(1) {
        let taken = control.output.len.load(SeqCst) & NOT_YET;
        if taken != NOT_YET
            && at >= ring.begin()
            && let Ok(Some((record, _))) = ring.read_at(at)
        {
            parts(record).0.done.store(control.leaving_done.load(SeqCst) + taken, SeqCst);
        }
        control.leaving.store(0, SeqCst);
    }
    control.leaver.store(0, SeqCst);
}

/// The header and the data of an output.
fn parts(record: &[u8]) -> (&Output, &[u8]) {
    let at = record.as_ptr().cast::<Output>();
    assert!(record.len() >= OUTPUT_HEADER && at.is_aligned());
    // SAFETY: long enough and aligned; every bit pattern is an `Output`, and what changes in it is atomic.
    (unsafe { &*at }, &record[OUTPUT_HEADER..])
}

/// Lets one output leave; false when the socket's buffer is full. On a connection that is gone it counts as gone, too.
///
/// # Safety
/// `message` is [`Control::output`], which nobody else uses.
unsafe fn leave(
    kernel: &impl Kernel,
    control: &Control,
    message: *mut Message,
    position: u64,
    this: &Output,
    data: &[u8],
) -> bool {
    if this.fd & OPTION != 0 {
        if let Some((&[level, name, _], _)) = data.as_chunks::<4>().0.split_first_chunk() {
            let [level, name] = [level, name].map(|word| u64::from(u32::from_le_bytes(word)));
            // After a kill it is set once more.
            kernel.call(SETSOCKOPT, [this.socket(), level, name, data[8..].as_ptr() as u64, 4, 0]);
        }
        this.done.store(data.len() as u64, SeqCst);
        return true;
    }
    loop {
        let done = this.done.load(SeqCst);
        let Some(rest) = data.get(done as usize..).filter(|rest| !rest.is_empty()) else { return true };
        // SAFETY: by the contract of this function.
        let piece = unsafe { &raw mut (*message).piece };
        // SAFETY: as above; the length, which the kernel writes, is told apart from these fields.
        unsafe {
            (*message).len.store(NOT_YET, SeqCst);
            ((*message).name, (*message).name_len) = (0, 0);
            ((*message).control, (*message).control_len, (*message).flags) = (0, 0, 0);
            ((*message).iov, (*message).iov_len) = (piece as u64, 1);
            ((*message).piece, (*message).piece_len) = (rest.as_ptr() as u64, rest.len() as u64);
        }
        control.leaving_done.store(done, SeqCst);
        control.leaving.store(position + 1, SeqCst);
        let result = kernel.call(SENDMMSG, [this.fd, message as u64, 1, FLAGS, 0, 0]);
        match result {
            1 => this.done.store(done + (control.output.len.load(SeqCst) & NOT_YET), SeqCst),
            EINTR | EAGAIN | ENOMEM | ENOBUFS => {}
            _ => {
                if let Some(word) = control.failed.get(this.fd as usize / 64) {
                    word.fetch_or(1 << (this.fd % 64), SeqCst);
                }
                this.done.store(data.len() as u64, SeqCst);
            }
        }
        control.leaving.store(0, SeqCst);
        if matches!(result, EAGAIN | ENOMEM | ENOBUFS) {
            return false;
        }
    }
}
