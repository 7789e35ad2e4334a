//! Anonymous memory that a fork of ours does not copy.

use std::{io, ptr::NonNull};

const HUGE: usize = 2 << 20;

/// A private anonymous mapping marked `MADV_DONTFORK`, aligned for huge pages, all zero at first.
#[derive(Debug)]
pub(crate) struct Anon {
    at: NonNull<u8>,
    len: usize,
}

// SAFETY: it owns its memory like a Box<[u8]>.
unsafe impl Send for Anon {}
// SAFETY: shared access only reads.
unsafe impl Sync for Anon {}

impl Anon {
    /// Maps `len` bytes, rounded up to 2 MiB.
    pub(crate) fn new(len: usize) -> io::Result<Self> {
        let len = len.next_multiple_of(HUGE).max(HUGE);
        let want = len.checked_add(HUGE).ok_or(io::Error::from_raw_os_error(libc::ENOMEM))?;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let raw = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                want,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if raw == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let head = (raw as usize).next_multiple_of(HUGE) - raw as usize;
        // SAFETY: head < HUGE, so the result lies inside the mapping.
        let at = unsafe { raw.cast::<u8>().add(head) };
        // SAFETY: both pieces lie inside the mapping just made and nothing points into them; the
        // middle, which stays, is marked. A refused madvise only costs speed.
        unsafe {
            if head > 0 {
                libc::munmap(raw, head);
            }
            if HUGE - head > 0 {
                libc::munmap(at.add(len).cast(), HUGE - head);
            }
            libc::madvise(at.cast(), len, libc::MADV_DONTFORK);
            libc::madvise(at.cast(), len, libc::MADV_HUGEPAGE);
        }
        let at = NonNull::new(at).ok_or(io::Error::from_raw_os_error(libc::ENOMEM))?;
        Ok(Self { at, len })
    }

    /// Brings the first `len` bytes into memory, so that touching them later costs nothing. A
    /// kernel that refuses (before 5.14) only costs that time later.
    pub(crate) fn populate(&self, len: usize) {
        // SAFETY: inside our mapping; contents stay as they are.
        unsafe { libc::madvise(self.at.as_ptr().cast(), len.min(self.len), libc::MADV_POPULATE_WRITE) };
    }

    /// All of it.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: `len` mapped, initialised (zero) bytes that this value owns.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr(), self.len) }
    }

    /// All of it, for writing.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.len) }
    }
}

impl Drop for Anon {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and no borrow of it is left.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.len) };
    }
}
