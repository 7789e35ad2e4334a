//! A ring of records in memory that two processes share: one writes, the other reads.
//!
//! ```text
//! 0    magic, version, capacity
//! 64   head: bytes ever written, stored by the producer
//! 128  tail: bytes ever released, stored by the consumer
//! 192  data, `capacity` bytes, a power of two
//! ```
//!
//! A record is framed by 8 bytes, `{ length u32, tag u32 }`, begins at a multiple of 8 and is
//! contiguous: where it does not fit before the end of the data, a pad frame fills the rest. It
//! comes into being by the one store of `head` in [`Ring::commit`]. A producer that is killed before
//! that leaves nothing to see, and [`Ring::attach`] goes on from the last committed record.

use core::fmt;
use core::mem::{align_of, offset_of, size_of};
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU64, Ordering};

/// Marks a ring: "ftrunrng".
const MAGIC: u64 = u64::from_le_bytes(*b"ftrunrng");
/// Version of the layout.
const VERSION: u32 = 1;
/// Bytes before each record.
const FRAME: u64 = 8;
/// The smallest amount of data that makes sense.
const CAPACITY_MIN: u64 = 64;

const TAG_RECORD: u32 = 0x4345_5221;
const TAG_PAD: u32 = 0x4441_5021;

/// A counter on a cache line of its own.
#[derive(Debug)]
#[repr(C, align(64))]
struct Line(AtomicU64);

/// What stands before the data.
#[derive(Debug)]
#[repr(C)]
pub struct RingHeader {
    /// Written last, so that a ring that was not fully created is none.
    magic: AtomicU64,
    version: u32,
    reserved: u32,
    capacity: u64,
    head: Line,
    tail: Line,
}

const _: () = {
    assert!(size_of::<RingHeader>() == 192);
    assert!(align_of::<RingHeader>() == 64);
    assert!(offset_of!(RingHeader, magic) == 0);
    assert!(offset_of!(RingHeader, version) == 8);
    assert!(offset_of!(RingHeader, capacity) == 16);
    assert!(offset_of!(RingHeader, head) == 64);
    assert!(offset_of!(RingHeader, tail) == 128);
};

/// Why memory is not a usable ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingError {
    /// The memory is not aligned to 64 bytes.
    Misaligned,
    /// The memory is too small for a ring, or for the ring that it says it holds.
    TooSmall,
    /// The memory holds no ring.
    Magic,
    /// The ring has the layout of another version.
    Version(u32),
    /// The counters or a frame contradict each other: something wrote over them.
    Corrupt,
}

impl fmt::Display for RingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            RingError::Misaligned => write!(f, "the ring's memory is not aligned to 64 bytes"),
            RingError::TooSmall => write!(f, "the memory is too small for the ring"),
            RingError::Magic => write!(f, "the memory holds no event ring"),
            RingError::Version(v) => {
                write!(f, "the event ring has version {v}, this program knows {VERSION}")
            }
            RingError::Corrupt => write!(f, "the event ring was overwritten"),
        }
    }
}

impl core::error::Error for RingError {}

/// One process's handle on a ring: the producer uses [`Ring::reserve`] and [`Ring::commit`], the
/// consumer [`Ring::peek`] and [`Ring::release`].
#[derive(Debug)]
pub struct Ring {
    header: NonNull<RingHeader>,
    data: NonNull<u8>,
    capacity: u64,
    /// Producer: `head` once the reserved record is committed; 0 if none is.
    reserved: u64,
    /// Producer: the last `tail` that was looked at.
    tail_seen: u64,
    /// Consumer: `tail` once the record that was looked at is released; 0 if none was.
    peeked: u64,
}

// SAFETY: a handle is pointers to memory that is shared on purpose; all that is not atomic is
// accessed by the one producer or the one consumer only, whichever thread it runs on.
unsafe impl Send for Ring {}

/// Bytes that a record of `len` bytes takes.
#[inline]
const fn framed(len: u64) -> u64 {
    FRAME + len.next_multiple_of(8)
}

impl Ring {
    /// Bytes before the data.
    pub const HEADER_BYTES: usize = size_of::<RingHeader>();

    /// Makes an empty ring in the `len` bytes at `ptr`.
    ///
    /// # Safety
    ///
    /// The memory is readable and writable for as long as the handle lives, and nobody else uses it
    /// before this returns. Of all handles on a ring, at most one produces and at most one consumes,
    /// and nothing else writes to it.
    pub unsafe fn create(ptr: *mut u8, len: usize) -> Result<Ring, RingError> {
        let (header, data) = parts(ptr, len)?;
        let available = (len - Self::HEADER_BYTES) as u64;
        let capacity = if available.is_power_of_two() { available } else { available.next_power_of_two() / 2 };
        // SAFETY: `parts` checked alignment and size; the caller gives us the memory.
        unsafe {
            header.write(RingHeader {
                magic: AtomicU64::new(0),
                version: VERSION,
                reserved: 0,
                capacity,
                head: Line(AtomicU64::new(0)),
                tail: Line(AtomicU64::new(0)),
            });
            header.as_ref().magic.store(MAGIC, Ordering::Release);
        }
        Ok(Ring { header, data, capacity, reserved: 0, tail_seen: 0, peeked: 0 })
    }

    /// Uses the ring that is in the `len` bytes at `ptr`, from where its last users left off.
    ///
    /// # Safety
    ///
    /// As for [`Ring::create`], except that others may use the ring meanwhile: the memory stays
    /// valid, and there is at most one producer and one consumer.
    #[inline]
    pub unsafe fn attach(ptr: *mut u8, len: usize) -> Result<Ring, RingError> {
        let (header, data) = parts(ptr, len)?;
        // SAFETY: `parts` checked alignment and size, the caller vouches for the memory, and every
        // bit pattern is a `RingHeader`. Its fields that are not atomic no longer change.
        let shared = unsafe { header.as_ref() };
        if shared.magic.load(Ordering::Acquire) != MAGIC {
            return Err(RingError::Magic);
        }
        if shared.version != VERSION {
            return Err(RingError::Version(shared.version));
        }
        let capacity = shared.capacity;
        if capacity > (len - Self::HEADER_BYTES) as u64 {
            return Err(RingError::TooSmall);
        }
        if capacity < CAPACITY_MIN || !capacity.is_power_of_two() {
            return Err(RingError::Corrupt);
        }
        let ring = Ring { header, data, capacity, reserved: 0, tail_seen: 0, peeked: 0 };
        // The tail first: the head never falls behind a tail that was read before it. The other
        // way is possible, so the distance is judged by `peek` and `reserve`, not here.
        let tail = ring.tail().load(Ordering::Acquire);
        let head = ring.head().load(Ordering::Acquire);
        if head < tail || !head.is_multiple_of(8) || !tail.is_multiple_of(8) {
            return Err(RingError::Corrupt);
        }
        Ok(Ring { tail_seen: tail, ..ring })
    }

    /// The longest record that can always be reserved once the ring is empty.
    #[inline]
    pub fn record_max(&self) -> usize {
        // Half, so that the record and the pad before it fit wherever the head stands.
        ((self.capacity / 2).min(1 << 32) as usize & !7) - FRAME as usize
    }

    /// Producer: room for a record of `len` bytes, to be filled and committed. `None` if the ring is
    /// too full, or if `len` is more than [`Ring::record_max`]. A further `reserve` drops a record
    /// that was not committed.
    #[inline]
    pub fn reserve(&mut self, len: usize) -> Option<&mut [u8]> {
        self.reserved = 0;
        if len > self.record_max() {
            return None;
        }
        let total = framed(len as u64);
        let head = self.head().load(Ordering::Relaxed);
        if head < self.tail_seen || !head.is_multiple_of(8) {
            return None; // overwritten: the consumer reports it
        }
        let to_end = self.capacity - self.place(head);
        let pad = if to_end < total { to_end } else { 0 };
        let end = head.checked_add(pad + total)?;
        if end - self.tail_seen > self.capacity {
            // Acquire: what the consumer read of the old records, it read before we overwrite them.
            let tail = self.tail().load(Ordering::Acquire);
            if tail > head || end - tail > self.capacity {
                return None;
            }
            self.tail_seen = tail;
        }
        if pad != 0 {
            self.write_frame(head, (pad - FRAME) as u32, TAG_PAD);
        }
        self.write_frame(head + pad, len as u32, TAG_RECORD);
        self.reserved = end;
        let at = self.place(head + pad) + FRAME;
        // SAFETY: `at + len` is within the data: the record was placed before its end. Only the
        // producer, and that is us, touches bytes from head to tail + capacity, and the borrow of
        // `self` keeps it to one slice.
        Some(unsafe { core::slice::from_raw_parts_mut(self.data.as_ptr().add(at as usize), len) })
    }

    /// Producer: makes the reserved record shorter; what stays is where it was.
    #[inline]
    pub fn shrink(&mut self, len: usize) {
        if self.reserved != 0 {
            let head = self.head().load(Ordering::Relaxed);
            let (_, tag) = self.read_frame(head);
            let to_end = self.capacity - self.place(head);
            let at = if tag == TAG_PAD { head + to_end } else { head };
            let end = at + framed(len as u64);
            if end <= self.reserved {
                self.write_frame(at, len as u32, TAG_RECORD);
                self.reserved = end;
            }
        }
    }

    /// Producer: where the reserved record will end; 0 if there is none.
    #[inline]
    pub fn reserved_end(&self) -> u64 {
        self.reserved
    }

    /// Producer: makes the reserved record visible, all at once. Does nothing if there is none.
    #[inline]
    pub fn commit(&mut self) {
        if self.reserved != 0 {
            // Release: whoever sees the new head sees the record.
            self.head().store(self.reserved, Ordering::Release);
            self.reserved = 0;
        }
    }

    /// Consumer: the oldest record, `None` if there is none. It stays until it is released.
    pub fn peek(&mut self) -> Result<Option<&[u8]>, RingError> {
        self.peeked = 0;
        // Acquire: the frames and records up to the head are there to be read.
        let head = self.head().load(Ordering::Acquire);
        loop {
            let tail = self.tail().load(Ordering::Relaxed);
            let filled = head.checked_sub(tail).ok_or(RingError::Corrupt)?;
            if filled == 0 {
                return Ok(None);
            }
            let at = self.place(tail);
            let room = filled.min(self.capacity - at);
            if filled > self.capacity || !filled.is_multiple_of(8) || !at.is_multiple_of(8) {
                return Err(RingError::Corrupt);
            }
            let (len, tag) = self.read_frame(tail);
            let total = framed(u64::from(len));
            if total > room {
                return Err(RingError::Corrupt);
            }
            match tag {
                TAG_RECORD => {
                    self.peeked = tail + total;
                    let start = (at + FRAME) as usize;
                    // SAFETY: `start + len` is within the data, as `total <= room`. The producer
                    // leaves bytes from tail to head alone, and only we move the tail.
                    return Ok(Some(unsafe {
                        core::slice::from_raw_parts(self.data.as_ptr().add(start), len as usize)
                    }));
                }
                TAG_PAD if at + total == self.capacity => {
                    self.tail().store(tail + total, Ordering::Release);
                }
                _ => return Err(RingError::Corrupt),
            }
        }
    }

    /// Consumer: gives the room of the record last looked at back. Does nothing if there is none.
    pub fn release(&mut self) {
        if self.peeked != 0 {
            // Release: our reads of the record come before the producer's next use of the room.
            self.tail().store(self.peeked, Ordering::Release);
            self.peeked = 0;
        }
    }

    /// Position behind the last committed record: bytes ever written.
    pub fn end(&self) -> u64 {
        self.head().load(Ordering::Acquire)
    }

    /// Position of the oldest record that has not been released.
    pub fn begin(&self) -> u64 {
        self.tail().load(Ordering::Acquire)
    }

    /// The record at a position from [`Ring::begin`] on, and the position behind it; `None` at the end.
    pub fn read_at(&self, mut position: u64) -> Result<Option<(&[u8], u64)>, RingError> {
        loop {
            // Acquire: the frames and records up to the head are there to be read.
            let filled = self.end().checked_sub(position).ok_or(RingError::Corrupt)?;
            if filled == 0 {
                return Ok(None);
            }
            let at = self.place(position);
            let room = filled.min(self.capacity - at);
            if filled > self.capacity || !filled.is_multiple_of(8) || !at.is_multiple_of(8) {
                return Err(RingError::Corrupt);
            }
            let (len, tag) = self.read_frame(position);
            let total = framed(u64::from(len));
            if total > room {
                return Err(RingError::Corrupt);
            }
            match tag {
                TAG_RECORD => {
                    let start = (at + FRAME) as usize;
                    // SAFETY: `start + len` is within the data, as `total <= room`. The producer
                    // leaves bytes from tail to head alone.
                    let record = unsafe { core::slice::from_raw_parts(self.data.as_ptr().add(start), len as usize) };
                    return Ok(Some((record, position + total)));
                }
                TAG_PAD if at + total == self.capacity => position += total,
                _ => return Err(RingError::Corrupt),
            }
        }
    }

    /// Consumer: gives back the room of everything before a position that [`Ring::read_at`] returned.
    pub fn release_to(&mut self, position: u64) {
        if position <= self.end() {
            // Release: our reads of the records come before the producer's next use of the room. The
            // largest of several readers' positions stays.
            self.tail().fetch_max(position, Ordering::Release);
        }
    }

    /// Producer: takes back the records from a position on; no reader may have seen them.
    pub fn truncate_to(&mut self, position: u64) {
        if (self.begin()..=self.end()).contains(&position) {
            self.reserved = 0;
            self.head().store(position, Ordering::Release);
        }
    }

    /// Begins anew at the start of the memory, which is warmer than what lies ahead. All records must have been
    /// released, and nobody may use the ring meanwhile. Says whether that was so.
    pub fn rewind(&mut self) -> bool {
        let empty = self.begin() == self.end();
        if empty {
            // The tail first: it is never ahead of the head.
            self.tail().store(0, Ordering::SeqCst);
            self.head().store(0, Ordering::SeqCst);
            (self.reserved, self.tail_seen, self.peeked) = (0, 0, 0);
        }
        empty
    }

    /// The record that a producer had reserved and not committed when it died.
    pub fn uncommitted(&self) -> Option<&[u8]> {
        let mut position = self.end();
        let (len, tag) = self.read_frame(position);
        let room = self.capacity - self.place(position);
        if tag == TAG_PAD {
            if framed(u64::from(len)) != room {
                return None;
            }
            position += room;
        }
        let (len, tag) = self.read_frame(position);
        let at = self.place(position) + FRAME;
        if tag != TAG_RECORD || u64::from(len) > self.capacity - at {
            return None;
        }
        // SAFETY: within the data; the producer is dead, so nobody writes there.
        Some(unsafe { core::slice::from_raw_parts(self.data.as_ptr().add(at as usize), len as usize) })
    }

    #[inline]
    fn head(&self) -> &AtomicU64 {
        // SAFETY: the memory is valid while the handle lives, by the contract of create and attach.
        unsafe { &(*self.header.as_ptr()).head.0 }
    }

    #[inline]
    fn tail(&self) -> &AtomicU64 {
        // SAFETY: as for `head`.
        unsafe { &(*self.header.as_ptr()).tail.0 }
    }

    /// Where a position lies in the data: the capacity is a power of two.
    #[inline]
    fn place(&self, position: u64) -> u64 {
        position & (self.capacity - 1)
    }

    #[inline]
    fn frame(&self, position: u64) -> *mut u64 {
        let at = self.place(position);
        // SAFETY: positions and the capacity are multiples of 8, so 8 bytes at `at` are data.
        unsafe { self.data.as_ptr().add(at as usize).cast() }
    }

    #[inline]
    fn write_frame(&mut self, position: u64, len: u32, tag: u32) {
        let word = u64::from(len) | u64::from(tag) << 32;
        // SAFETY: within the data (see `frame`), aligned to 8 as the data is, and in the part that
        // belongs to the producer.
        unsafe { self.frame(position).write(word.to_le()) }
    }

    #[inline]
    fn read_frame(&self, position: u64) -> (u32, u32) {
        // SAFETY: within the data (see `frame`), aligned to 8 as the data is, and in the part that
        // belongs to the consumer.
        let word = u64::from_le(unsafe { self.frame(position).read() });
        (word as u32, (word >> 32) as u32)
    }
}

/// Header and data of the ring in this memory, which is aligned and large enough.
#[inline]
fn parts(ptr: *mut u8, len: usize) -> Result<(NonNull<RingHeader>, NonNull<u8>), RingError> {
    let base = NonNull::new(ptr).ok_or(RingError::Misaligned)?;
    if !base.as_ptr().addr().is_multiple_of(align_of::<RingHeader>()) {
        return Err(RingError::Misaligned);
    }
    if len < Ring::HEADER_BYTES + CAPACITY_MIN as usize {
        return Err(RingError::TooSmall);
    }
    // SAFETY: the memory has more bytes than that.
    let data = unsafe { base.add(Ring::HEADER_BYTES) };
    Ok((base.cast(), data))
}

#[cfg(all(test, feature = "std"))]
mod tests;
