//! Tries a backend out on memory of our own.

use super::sys::UFFD_FLAGS;
use super::{DirtyTracker, Full, Kind, Scan, SoftDirty, WpAsync};
use crate::copy::copy_in;
use crate::pages::PageStore;
use crate::runs::PageRun;
use crate::state::{Mapping, PAGE_BYTES};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// The best backend that works here.
pub fn choose() -> Kind {
    Kind::ALL.into_iter().find(|kind| self_test(*kind).is_ok()).unwrap_or(Kind::Full)
}

/// Checks that a backend reports exactly what was written and dropped, on four pages of our own.
///
/// # Errors
/// Says what does not work.
pub fn self_test(kind: Kind) -> Result<(), String> {
    let mut tracker: Box<dyn DirtyTracker> = match kind {
        Kind::WpAsync => {
            let uffd = own_uffd().map_err(|e| format!("cannot make a userfaultfd: {e}"))?;
            Box::new(WpAsync::new(uffd).map_err(|e| e.to_string())?)
        }
        Kind::SoftDirty => Box::new(SoftDirty::new()),
        Kind::Full => Box::new(Full::new()),
    };
    try_out(&mut *tracker)
}

fn own_uffd() -> io::Result<OwnedFd> {
    // SAFETY: makes a new descriptor, touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, UFFD_FLAGS) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Four pages that only the test touches, between two that nobody may. Without those the kernel could merge the
/// mapping with one that another thread makes beside it, and then all of it counts as written.
struct Pages(*mut u8);

const PAGES: u64 = 4;
const LEN: usize = (PAGES * PAGE_BYTES) as usize;
const GUARD: usize = PAGE_BYTES as usize;

impl Pages {
    fn map() -> Result<Self, String> {
        let failed = || io::Error::last_os_error().to_string();
        // SAFETY: a fresh mapping, and a change of a part of it.
        unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let at = libc::mmap(std::ptr::null_mut(), LEN + 2 * GUARD, libc::PROT_NONE, flags, -1, 0);
            if at == libc::MAP_FAILED {
                return Err(failed());
            }
            let pages = Self(at.cast::<u8>().add(GUARD));
            if libc::mprotect(pages.0.cast(), LEN, libc::PROT_READ | libc::PROT_WRITE) != 0 {
                return Err(failed());
            }
            Ok(pages)
        }
    }

    fn write(&self, page: u64, value: u8) {
        // SAFETY: inside the mapping, which nothing refers to; volatile, as others read it.
        unsafe { self.0.add((page * PAGE_BYTES) as usize).write_volatile(value) };
    }

    fn drop_page(&self, page: u64) {
        // SAFETY: inside the mapping, which nothing refers to.
        unsafe {
            libc::madvise(self.0.add((page * PAGE_BYTES) as usize).cast(), PAGE_BYTES as usize, libc::MADV_DONTNEED)
        };
    }

    fn run(&self, page: u64, pages: u64) -> PageRun {
        PageRun { start: self.0 as u64 + page * PAGE_BYTES, pages }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing refers to it.
        unsafe { libc::munmap(self.0.sub(GUARD).cast(), LEN + 2 * GUARD) };
    }
}

fn try_out(tracker: &mut dyn DirtyTracker) -> Result<(), String> {
    let pages = Pages::map()?;
    let pid = std::process::id().cast_signed();
    let maps = [Mapping {
        start: pages.0 as u64,
        end: pages.0 as u64 + LEN as u64,
        prot: (libc::PROT_READ | libc::PROT_WRITE).cast_unsigned(),
        shared: false,
        grows_down: false,
        offset: 0,
        dev: 0,
        inode: 0,
        path: String::new(),
    }];
    let mut store = PageStore::new();
    let mut step = |what: &str, dirty: &[PageRun], gone: &[PageRun]| {
        let scan = tracker.scan(pid, &maps, &store).map_err(|e| e.to_string())?;
        let want = Scan { dirty: dirty.to_vec(), gone: gone.to_vec() };
        if scan != want {
            return Err(format!("{what}: expected {want:x?}, found {scan:x?}"));
        }
        store.drop_runs(&scan.gone);
        let staged = copy_in(pid, &scan.dirty, None).map_err(|e| e.to_string())?;
        store.commit(&staged).map_err(|e| e.to_string())
    };
    (0..PAGES).for_each(|page| pages.write(page, 1));
    step("first scan", &[pages.run(0, 4)], &[])?;
    step("nothing written", &[], &[])?;
    pages.write(2, 2);
    step("one page written", &[pages.run(2, 1)], &[])?;
    pages.drop_page(1);
    step("one page dropped", &[], &[pages.run(1, 1)])?;
    pages.write(1, 3);
    step("written again", &[pages.run(1, 1)], &[])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backends_work_or_say_why() {
        self_test(Kind::Full).expect("full needs nothing");
        for kind in Kind::ALL {
            eprintln!("{kind}: {:?}", self_test(kind));
        }
        self_test(choose()).expect("the chosen one works");
    }
}
